"""A task is one class and one entry: a toy one trains, evaluates and predicts through the trainer, unseen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_trainer.tasks import TASKS, Task
from tests.helpers import tiny

FEATURES, ASPECTS, GRADES = 6, 3, 4


@dataclass(frozen=True)
class GradesTask(Task):
    """Several grades a row: logits [B, D, K], labels [B, D]; both losses of a row are means over its D aspects."""

    softmax: ClassVar[bool] = False

    @property
    def dims(self) -> int:
        return 3

    def targets(self, inputs: Any) -> torch.Tensor | None:
        return self._class_ids(inputs)

    def labelled(self, targets: torch.Tensor) -> torch.Tensor:
        return super().labelled(targets) / targets.shape[1]

    def hard_loss_sum(self, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return super().hard_loss_sum(logits, targets, label_smoothing) / targets.shape[1]


class Grader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, ASPECTS * GRADES)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features).unflatten(-1, (ASPECTS, GRADES))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(TASKS, "grades", GradesTask("grades"))


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "features": torch.randn(FEATURES, generator=generator),
            "labels": torch.randint(0, GRADES, (ASPECTS,), generator=generator),
        }
        for _ in range(count)
    ]


def trainer(folder: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    settings = {"kd_task": "grades", "kd_temperature": 2.0, "learning_rate": 0.1, **kwargs}
    run = tiny.trainer("plain", folder, pair=(Grader(), Grader()), data=rows(32, 1), **settings)
    run.eval_dataset = rows(8, 2)
    return run


def by_hand(run: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(hard, soft), means over rows and aspects, in float64."""
    with torch.no_grad():
        z, y = (model(batch["features"]).double() for model in (run.model, run.teacher.model))
    p, q = F.log_softmax(y / 2, -1), F.log_softmax(z / 2, -1)
    soft = 4 * (p.exp() * (p - q)).sum(-1).mean()
    return float(F.cross_entropy(z.flatten(0, 1), batch["labels"].flatten())), float(soft)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_trains_as_written_out(accumulate, tmp_path, capsys):
    batches = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    run = trainer(tmp_path, max_steps=6, **batches)
    first = by_hand(run, tiny.pad(rows(32, 1)[:8]))
    run.train()
    assert "task     grades" in capsys.readouterr().out
    assert (tiny.logged(run, "hard_loss")[0], tiny.logged(run, "soft_loss")[0]) == pytest.approx(first, rel=1e-5)
    data = rows(10, 3)
    metrics, found = run.evaluate(data), by_hand(run, tiny.pad(data))
    assert (metrics["eval_hard_loss"], metrics["eval_soft_loss"]) == pytest.approx(found, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(0.3 * found[0] + 0.7 * found[1], rel=1e-5)
    assert metrics["eval_soft_loss"] < first[1]
    assert 0 <= metrics["eval_teacher_agreement"] <= 1
    assert run.predict(data).predictions.shape == (10, ASPECTS, GRADES)


def test_check_and_its_errors_know_it(tmp_path):
    findings = trainer(tmp_path).check()
    assert not [row for row in findings if row.status == "error"], findings
    with pytest.raises(ValueError, match=r"giving logits of shape \(8, 5\); expected 3 dimensions for the task 'grad"):
        tiny.trainer("plain", tmp_path, data=rows(32, 1), kd_task="grades").train()
