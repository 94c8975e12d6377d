"""Multiple choice is a classification over the choices of a row: inputs [B, choices, S], logits [B, choices]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertForMultipleChoice,
    ElectraConfig,
    ElectraForMultipleChoice,
    Trainer,
    XLNetConfig,
    XLNetForMultipleChoice,
)

from kd_trainer import DistillationTrainer
from tests.helpers import tiny

CHOICES = 4


def electra(hidden: int) -> ElectraForMultipleChoice:
    config = tiny.bert_config(hidden, initializer_range=0.5).to_dict()
    return ElectraForMultipleChoice(ElectraConfig(**{**config, "embedding_size": hidden, "summary_last_dropout": 0.0}))


def xlnet(hidden: int) -> XLNetForMultipleChoice:
    config = XLNetConfig(
        vocab_size=tiny.VOCAB, d_model=hidden, n_layer=1, n_head=2, d_inner=32, dropout=0.0, summary_last_dropout=0.0,
        initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    return XLNetForMultipleChoice(config)


BUILDS = {
    "bert": lambda hidden: BertForMultipleChoice(tiny.bert_config(hidden, initializer_range=0.5)),
    "electra": electra,
    "xlnet": xlnet,
}


def pair(kind: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return BUILDS[kind](16), BUILDS[kind](24)


def rows(count: int = 32, choices: int = CHOICES, seed: int = 1) -> list[dict[str, Any]]:
    """More choices than a config's 2 default labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(1, tiny.VOCAB, (choices, 6), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        label = int(torch.randint(0, choices, (1,), generator=generator))
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": label})
    return made


def distillation(folder: Any, kind: str = "bert", data: Any = None, **kwargs: Any) -> Any:
    student, teacher = pair(kind)
    return DistillationTrainer(
        model=student, teacher_model=teacher, args=tiny.arguments(folder, **kwargs), data_collator=tiny.pad,
        train_dataset=rows() if data is None else data, eval_dataset=rows(11, seed=2),
    )  # fmt: skip


@pytest.mark.parametrize("kind", BUILDS)
def test_alpha_zero_is_the_stock_trainer(kind, tmp_path):
    expected = Trainer(
        model=pair(kind)[0], args=tiny.stock_arguments(tmp_path), data_collator=tiny.pad, train_dataset=rows(),
        eval_dataset=rows(11, seed=2),
    )  # fmt: skip
    got = distillation(tmp_path, kind, kd_alpha=0.0)
    for trainer in (expected, got):
        trainer.train()
    assert got._plan.task.name == "multiple_choice"
    assert tiny.logged(got, "loss") == pytest.approx(tiny.logged(expected, "loss"), rel=1e-4)
    assert torch.allclose(tiny.weights(got.model), tiny.weights(expected.model), atol=1e-5)
    assert (got.predict(rows(5, seed=3)).predictions == expected.predict(rows(5, seed=3)).predictions).all()


@pytest.mark.parametrize("kind", BUILDS)
def test_both_losses_are_those_of_a_float64_reference(kind, tmp_path):
    trainer = distillation(tmp_path, kind, max_steps=1, kd_temperature=2.0)
    trainer.train()
    student, teacher = pair(kind)
    batch = tiny.pad(rows()[:8])
    with torch.no_grad():
        z, y = (m.eval()(**batch).logits.double() for m in (student, teacher))
    p, q = F.log_softmax(y / 2, -1), F.log_softmax(z / 2, -1)
    soft = 4 * (p.exp() * (p - q)).sum(-1).mean()
    assert tiny.logged(trainer, "soft_loss") == pytest.approx([soft.item()], rel=1e-4)
    hard = F.cross_entropy(z, batch["labels"])
    assert tiny.logged(trainer, "hard_loss") == pytest.approx([hard.item()], rel=1e-4)


def test_evaluates_saves_and_loads_by_path(tmp_path, capsys):
    trainer = distillation(tmp_path / "run", max_steps=2)
    trainer.train()
    assert "task     multiple_choice" in capsys.readouterr().out
    metrics = trainer.evaluate()
    assert 0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"] == pytest.approx(metrics["eval_loss"])
    student, teacher = pair("bert")
    teacher.save_pretrained(tmp_path / "teacher")
    again = DistillationTrainer(
        model=student, teacher_model=str(tmp_path / "teacher"), args=tiny.arguments(tmp_path, max_steps=2),
        data_collator=tiny.pad, train_dataset=rows(),
    )  # fmt: skip
    again.train()
    assert tiny.logged(again, "loss") == tiny.logged(trainer, "loss")


def test_a_label_beyond_the_choices_is_named_with_their_number(tmp_path):
    data = rows()
    data[3]["labels"] = 6
    with pytest.raises(ValueError, match=r"`labels` is 6 at position 3 of the batch; expected 0 to 3"):
        distillation(tmp_path, data=data).train()


def test_rows_without_a_label_have_a_soft_loss(tmp_path):
    data = [{**row, "labels": -100} for row in rows()]
    trainer = distillation(tmp_path, data=data, max_steps=1, kd_alpha=1.0)
    trainer.train()
    labelled = distillation(tmp_path, max_steps=1, kd_alpha=1.0)
    labelled.train()
    assert tiny.logged(trainer, "soft_loss") == tiny.logged(labelled, "soft_loss")


def test_check_finds_nothing_wrong(tmp_path):
    results = distillation(tmp_path).check()
    assert not [row for row in results if row.status == "error"], results
