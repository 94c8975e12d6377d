"""Labels under any name: `trainer.label_names` as upstream resolves it, for every task, live, cached and checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, BertForTokenClassification, LlamaForCausalLM, Trainer

from kd_trainer import DistillationTrainer
from tests.helpers import tiny


class Named(nn.Module):
    """The labels are class_labels, as upstream finds it in the signature."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, tiny.CLASSES)

    def forward(self, features: Tensor, class_labels: Tensor | None = None) -> Any:
        logits = self.linear(features)
        return {"logits": logits} if class_labels is None else (F.cross_entropy(logits, class_labels), logits)


class Target(Named):
    """The labels are `target`, which only the arguments name."""

    def forward(self, features: Tensor, target: Tensor | None = None) -> Any:
        return super().forward(features, target)


class Kwargs(Named):
    """The labels come through **kwargs."""

    def forward(self, features: Tensor, **kwargs: Any) -> Any:
        return super().forward(features, kwargs.get("target"))


class Tags(BertForTokenClassification):
    def forward(self, input_ids=None, attention_mask=None, tag_labels=None):
        return super().forward(input_ids, attention_mask, labels=tag_labels)


class Words(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, word_labels=None):
        return super().forward(input_ids, attention_mask, labels=word_labels)


class Spans(BertForQuestionAnswering):
    def forward(self, input_ids=None, attention_mask=None, begin=None, finish=None):
        return super().forward(input_ids, attention_mask, start_positions=begin, end_positions=finish)


def config(task: str) -> Any:
    return tiny.models(task)[0].config


# name -> (builder, task of the rows, new names of its columns, label_names of the arguments)
CASES: dict[str, tuple[Any, str, dict[str, str], list[str] | None]] = {
    "class_labels": (Named, "plain", {"labels": "class_labels"}, None),
    "target": (Target, "plain", {"labels": "target"}, ["target"]),
    "target in kwargs": (Kwargs, "plain", {"labels": "target"}, ["target"]),
    "tags": (lambda: Tags(config("token_classification")), "token_classification", {"labels": "tag_labels"}, None),
    "words": (lambda: Words(config("causal_lm")), "causal_lm", {"labels": "word_labels"}, None),
    "spans": (
        lambda: Spans(config("question_answering")),
        "question_answering",
        {"start_positions": "begin", "end_positions": "finish"},
        ["begin", "finish"],
    ),
}


def data_of(name: str, count: int = 16) -> list[dict[str, Any]]:
    _, task, names, _ = CASES[name]
    return [{names.get(key, key): value for key, value in row.items()} for row in tiny.rows(task, count)]


class Collate:
    """`tiny.pad`, which pads labels with -100 by their usual name."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        usual = {new: old for old, new in self.names.items()}
        batch = tiny.pad([{usual.get(key, key): value for key, value in row.items()} for row in features])
        return {self.names.get(key, key): value for key, value in batch.items()}


def build(name: str, folder: Any, *, stock: bool = False, teacher: Any = None, **fields: Any) -> Any:
    builder, _, names, label_names = CASES[name]
    torch.manual_seed(0)
    student, data = builder(), data_of(name)
    fields = {"label_names": label_names, "max_steps": 3, "per_device_train_batch_size": 4, **fields}
    given = {"model": student, "train_dataset": data, "eval_dataset": data, "data_collator": Collate(names)}
    if stock:
        return Trainer(args=tiny.stock_arguments(folder, **fields), **given)
    fields = {"kd_alpha": 0.0, "kd_reduction": "tokenmean", **fields}
    return DistillationTrainer(args=tiny.arguments(folder, **fields), teacher_model=teacher, **given)


@pytest.mark.parametrize("name", CASES)
def test_kd_alpha_0_is_the_stock_trainer(name, tmp_path):
    stock, own = build(name, tmp_path, stock=True), build(name, tmp_path)
    for trainer in (stock, own):
        trainer.train()
    torch.testing.assert_close(tiny.weights(own.model), tiny.weights(stock.model), rtol=1e-5, atol=1e-6)
    assert tiny.logged(own, "loss") == pytest.approx(tiny.logged(stock, "loss"), rel=1e-5)
    assert own.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)
    a, b = own.predict(data_of(name, 6)), stock.predict(data_of(name, 6))
    labels = [x.label_ids if isinstance(x.label_ids, tuple) else (x.label_ids,) for x in (a, b)]
    assert all((x == y).all() for x, y in zip(*labels, strict=True))
    assert not own._plan.own_loss


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_usual_names(name, tmp_path):
    """Labels count by the name they have, in training, evaluation and check(), live and from a cache."""
    _, task, _, _ = CASES[name]
    torch.manual_seed(5)
    teacher = CASES[name][0]() if task == "plain" else tiny.models(task, seed=5)[1]
    usual = tiny.models(task)[0] if task != "plain" else tiny.Plain()
    torch.manual_seed(0)
    reference = CASES[name][0]()
    if task == "plain":
        usual.linear.load_state_dict(reference.linear.state_dict())
    else:
        usual.load_state_dict(reference.state_dict())
    fields = {"kd_alpha": 0.4, "kd_reduction": "tokenmean", "max_steps": 3, "per_device_train_batch_size": 4}
    data = tiny.rows(task, 16)
    expected = DistillationTrainer(
        model=usual, teacher_model=teacher, args=tiny.arguments(tmp_path, **fields), data_collator=tiny.pad,
        train_dataset=data, eval_dataset=data,
    )  # fmt: skip
    live = build(name, tmp_path, teacher=teacher, **fields)
    found = {row.what: row for row in live.check(evaluate=False)}
    assert found["labels"].status == "ok"
    assert not any(row.status == "error" for row in found.values())
    cached = build(name, tmp_path, teacher=teacher, teacher_cache_dir=str(tmp_path / "cache"), **fields)
    for trainer in (expected, live, cached):
        trainer.train()
    for trainer in (live, cached):
        for key in ("loss", "soft_loss", "hard_loss"):
            assert tiny.logged(trainer, key) == pytest.approx(tiny.logged(expected, key), rel=1e-5)
        torch.testing.assert_close(tiny.weights(trainer.model), tiny.weights(expected.model), rtol=1e-5, atol=1e-6)
    assert live.evaluate()["eval_hard_loss"] == pytest.approx(expected.evaluate()["eval_hard_loss"], rel=1e-5)


def test_a_column_that_is_neither_input_nor_label_reaches_no_model(tmp_path):
    class Strict(Target):
        def forward(self, features, target=None):
            return super().forward(features, target)

    torch.manual_seed(0)
    data = [row | {"labels": 0, "index": i} for i, row in enumerate(data_of("target"))]
    args = tiny.arguments(tmp_path, label_names=["target"], kd_alpha=0.0, max_steps=1)
    trainer = DistillationTrainer(model=Strict(), args=args, train_dataset=data, data_collator=tiny.pad)
    trainer.train()
    torch.manual_seed(0)
    batch = tiny.pad(data_of("target")[:8])
    expected = Strict()(batch["features"], batch["target"])[0]
    assert tiny.logged(trainer, "hard_loss")[0] == pytest.approx(expected.item(), rel=1e-5)


def test_smoothing_labels_of_another_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` is 0.1; expected 0 with the labels in 'tag_label"):
        build("tags", tmp_path, label_smoothing_factor=0.1)
