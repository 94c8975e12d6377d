"""`logits.py`: of several tensors in a model's outputs the one that fits the task, or an error that lists them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kd_trainer import CachedTeacher
from kd_trainer.tasks.logits import AmbiguousOutputs, Wanted, logits_of
from tests.helpers import tiny

FEATURES, LOGITS, OTHER = torch.zeros(4, 16), torch.ones(4, 5), torch.zeros(4, 5)
STATES = torch.zeros(4, 3, 16)


class Named(NamedTuple):
    features: Any
    logits: Any


class Unnamed(NamedTuple):
    features: Any
    scores: Any


@dataclass
class Data:
    features: Any
    logits: Any


@dataclass
class OtherData:
    features: Any
    class_logits: Any


@pytest.mark.parametrize(
    ("outputs", "wanted"),
    [
        (LOGITS, Wanted(2)),
        ((FEATURES, LOGITS), Wanted(2, (5,))),
        ((LOGITS, FEATURES), Wanted(2, (5,))),
        ([FEATURES, LOGITS], Wanted(2, (2, 5))),  # a config that counts something else comes first
        ((FEATURES, LOGITS), Wanted(2, (5,), at_least=9)),  # a wrong label decides nothing where the width is known
        ((STATES, LOGITS), Wanted(2)),
        ((torch.zeros(4, 1), LOGITS), Wanted(2, (), at_least=2)),
        ((torch.zeros(4, 3), LOGITS), Wanted(2, (), at_least=4)),
        ((torch.zeros(()), FEATURES, LOGITS), Wanted(2, (5,))),
        ((FEATURES, (LOGITS, None)), Wanted(2, (5,))),
        (((FEATURES, LOGITS),), Wanted(2, (5,))),
        ((LOGITS, (STATES, STATES)), Wanted(2)),
        ({"logits": LOGITS, "features": FEATURES}, Wanted(2, (16,))),
        ({"class_logits": LOGITS, "features": FEATURES}, Wanted(2)),
        ({"class_logits": LOGITS, "box_logits": FEATURES}, Wanted(2, (5,))),
        (Named(FEATURES, LOGITS), Wanted(2)),
        (Unnamed(FEATURES, LOGITS), Wanted(2, (5,))),
        (Data(FEATURES, LOGITS), Wanted(2)),
        (OtherData(FEATURES, LOGITS), Wanted(2)),
    ],
)
def test_what_fits_is_taken(outputs, wanted):
    assert logits_of(outputs, "model", wanted) is LOGITS


@pytest.mark.parametrize(
    ("outputs", "wanted"),
    [
        ((FEATURES, LOGITS), Wanted(2)),
        ((OTHER, LOGITS), Wanted(2, (5,))),
        ((FEATURES, LOGITS), Wanted(2, (7,))),
        ({"class_logits": LOGITS, "box_logits": FEATURES}, Wanted(2)),
    ],
)
def test_several_that_fit_are_listed(outputs, wanted):
    with pytest.raises(AmbiguousOutputs, match=r"`model` is a model that returns several tensors.*\[4, 5\]") as caught:
        logits_of(outputs, "model", wanted)
    values = outputs.values() if isinstance(outputs, dict) else outputs
    assert all(str(list(value.shape)) in str(caught.value) for value in values)


@pytest.mark.parametrize(
    "outputs",
    [None, "x", (), {"last_hidden_state": STATES, "pooler_output": FEATURES}, {"scores": LOGITS}, (torch.zeros(4),)],
)
def test_outputs_without_logits_are_refused(outputs):
    with pytest.raises(TypeError, match="expected logits: a tensor, a tuple that holds it, or a mapping"):
        logits_of(outputs, "model", Wanted(2, (5,)))


# ---- in training ----


class Gives(nn.Module):
    """A classifier that returns its features too."""

    def __init__(self, width: int, how: str = "tuple", classes: int = tiny.CLASSES) -> None:
        super().__init__()
        self.body, self.head, self.how = nn.Linear(6, width), nn.Linear(width, classes), how

    def forward(self, features: torch.Tensor) -> Any:
        states = self.body(features).tanh()
        logits = self.head(states)
        return {
            "plain": logits,
            "tuple": (states, logits),
            "list": [states, logits],
            "nested": (states, (logits, None)),
            "dict": {"states": states, "class_logits": logits},
            "dataclass": Data(states, logits),
        }[self.how]


WAYS = ["tuple", "nested", "dict"]


def train(folder, student, teacher, **kwargs):
    run = tiny.trainer("plain", folder, pair=(student, teacher), max_steps=2, **kwargs)
    run.train()
    return run


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("sides", ["student", "teacher", "both"])
def test_the_loss_is_that_of_the_logits(how, sides, tmp_path):
    torch.manual_seed(0)
    student, teacher = Gives(16, "plain"), Gives(12, "plain")
    clean = train(tmp_path, copy.deepcopy(student), copy.deepcopy(teacher))
    student.how = how if sides in ("student", "both") else "plain"
    teacher.how = how if sides in ("teacher", "both") else "plain"
    run = train(tmp_path, student, teacher)
    assert tiny.logs(run) == tiny.logs(clean)
    assert run.evaluate()["eval_loss"] == clean.evaluate()["eval_loss"]


def test_without_a_teacher_the_config_or_the_labels_decide(tmp_path):
    torch.manual_seed(0)
    student = Gives(3)  # fewer features than there are classes
    clean = copy.deepcopy(student)
    clean.how = "plain"
    runs = [train(tmp_path, model, None, kd_alpha=0.0, kd_task="classification") for model in (student, clean)]
    assert tiny.logs(runs[0])["hard_loss"] == tiny.logs(runs[1])["hard_loss"]
    with pytest.raises(AmbiguousOutputs, match=r"several tensors that .* \(\[0\] \[8, 16\], \[1\] \[8, 5"):
        train(tmp_path, Gives(16), None, kd_alpha=0.0, kd_task="classification")


class OwnConfig(PreTrainedConfig):
    model_type = "gives_features"


class WithConfig(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config, width: int) -> None:
        super().__init__(config)
        self.inner = Gives(width)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, features, labels=None):
        outputs = self.inner(features)
        return outputs if labels is None else (nn.functional.cross_entropy(outputs[1], labels), *outputs)


def test_the_issues_example(tmp_path):
    """(features, logits) of a model with a config; as wide on both sides."""
    torch.manual_seed(0)
    student, teacher = (WithConfig(OwnConfig(num_labels=5), 16) for _ in range(2))
    run = tiny.trainer("plain", tmp_path, pair=(student, teacher), max_steps=1)
    batch = tiny.pad(tiny.rows("plain")[:8])
    with torch.no_grad():
        expected = nn.functional.cross_entropy(student(batch["features"])[1], batch["labels"])
    assert not [row for row in run.check() if row.status == "error"]
    run.train()
    assert tiny.logged(run, "hard_loss")[0] == pytest.approx(expected.item(), rel=1e-5)


def test_two_models_that_leave_the_choice_are_refused_before_the_first_step(tmp_path):
    run = tiny.trainer("plain", tmp_path, pair=(Gives(16), Gives(16)))
    before = tiny.weights(run.model)
    with pytest.raises(AmbiguousOutputs, match="`teacher_model` is a model that returns several tensors"):
        run.train()
    assert torch.equal(tiny.weights(run.model), before)


def test_a_cache_is_built_of_the_logits(tmp_path):
    torch.manual_seed(0)
    student, teacher = Gives(16), Gives(12)
    live = train(tmp_path, copy.deepcopy(student), copy.deepcopy(teacher))
    train(tmp_path, copy.deepcopy(student), teacher, teacher_cache_dir=str(tmp_path / "cache"))
    kept = train(tmp_path, student, CachedTeacher(tmp_path / "cache"))
    assert tiny.logs(kept)["soft_loss"] == pytest.approx(tiny.logs(live)["soft_loss"], rel=1e-5)


@pytest.mark.parametrize("task", ["classification", "token_classification", "regression"])
def test_tuples_of_transformers_models(task, tmp_path):
    """`return_dict=False` with hidden states behind the logits."""
    logged = []
    for as_tuple in (False, True):
        pair = tiny.models(task)
        for model in pair:
            model.config.return_dict, model.config.output_hidden_states = not as_tuple, as_tuple
            model.config.use_cache = False
        run = tiny.trainer(task, tmp_path, pair=pair, max_steps=1)
        run.train()
        logged.append(tiny.logs(run))
    assert logged[0] == logged[1]


def test_the_encoders_states_are_no_logits():
    logits, states = torch.zeros(4, 3, 37), torch.zeros(4, 7, 16)
    for outputs in ((logits, (states, states), states), (states, logits)):
        assert logits_of(outputs, "model", Wanted(3, (37,))) is logits
