"""A column without which a forward cannot be called: named before it is called, with who took it away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from kd_trainer import DistillationTrainer
from kd_trainer.tasks.inputs import required_inputs
from tests.helpers import tiny

MISSING = r"`inputs` is a batch that has {} for the {}; expected {} too, which the forward of {} cannot do without"


class Reads(nn.Module):
    """forward(x), whatever the dataset calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, tiny.CLASSES)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * self.linear(x)


class ReadsTwo(Reads):
    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * mask.any()


def data(**names: Any) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    columns = {name: torch.randn(16, 6, generator=generator).tolist() for name in names.get("of", ("features",))}
    return Dataset.from_dict({**columns, "labels": [0] * 16})


def trainer(output_dir: Any, student: nn.Module, teacher: nn.Module, dataset: Any, **kwargs: Any) -> Any:
    return DistillationTrainer(
        model=student, teacher_model=teacher, args=tiny.arguments(output_dir, max_steps=1, **kwargs),
        train_dataset=dataset, eval_dataset=dataset,
    )  # fmt: skip


@pytest.mark.parametrize("act", ["train", "evaluate", "check"])
def test_a_column_that_upstream_removed(act, tmp_path):
    made = trainer(tmp_path, Reads(), Reads(), data(), remove_unused_columns=True)
    fix = (
        "remove_unused_columns has taken 'features' away, which that forward does not name: call the column 'x' in "
        "the dataset, or set remove_unused_columns to false"
    )
    if act == "check":
        found = [row for row in made.check(evaluate=False) if row.status == "error"]
        assert [row.what for row in found] == ["first batch"]
        text = f"{found[0].found} {found[0].fix}"
    else:
        with pytest.raises(ValueError, match=MISSING.format("labels", "student", "'x'", "Reads")) as caught:
            getattr(made, act)()
        text = str(caught.value)
    assert fix in text


def test_a_column_of_another_name(tmp_path):
    made = trainer(tmp_path, Reads(), Reads(), data())
    with pytest.raises(ValueError, match=MISSING.format("features, labels", "student", "'x'", "Reads")) as caught:
        made.train()
    assert "Call that column 'x' in the dataset, or in what the data collator returns." in str(caught.value)


def test_several_columns(tmp_path):
    made = trainer(tmp_path, ReadsTwo(), Reads(), data(), kd_alpha=0.0)
    with pytest.raises(ValueError, match=MISSING.format("features, labels", "student", "'mask', 'x'", "ReadsTwo")):
        made.train()


def test_a_column_of_the_teacher(tmp_path):
    made = trainer(tmp_path, tiny.Plain(), Reads(), data())
    with pytest.raises(ValueError, match=MISSING.format("none", "teacher", "'x'", "Reads")):
        made.train()


def test_a_column_that_later_data_lacks(tmp_path):
    made = trainer(tmp_path, Reads(), Reads(), data(of=("x",)))
    made.train()
    with pytest.raises(ValueError, match=MISSING.format("features, labels", "student", "'x'", "Reads")):
        made.evaluate(data())


def test_what_has_a_default_may_be_missing(tmp_path):
    made = trainer(tmp_path, Reads(), Reads(), data(of=("x",)), remove_unused_columns=True)
    made.train()
    assert required_inputs(made.model) == {"x"}
    assert required_inputs(tiny.models("causal_lm")[0]) == set()

    class Any_(nn.Module):
        def forward(self, *inputs: Any, decoder_input_ids: Any, **others: Any) -> None: ...

    assert required_inputs(Any_()) == set()
