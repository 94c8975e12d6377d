"""dkd, logit_mse, entropy_switch and standardized logits of every task: written out in plain Python, or refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from kd_trainer.losses.modules import SoftTargetLoss
from kd_trainer.tasks.kinds import TASKS
from kd_trainer.training.objective import LossInputs, Objective
from tests.helpers import tiny
from tests.losses.test_objectives import by_hand, kl, probabilities
from tests.training.test_objective import ROWS, batch_of

T, BETA, IGNORED = 2.0, 0.6, -100
SETTINGS: dict[str, dict[str, Any]] = {
    "dkd": {"divergence": "dkd", "beta": BETA},
    "logit_mse": {"divergence": "logit_mse"},
    "entropy_switch": {"divergence": "entropy_switch", "beta": BETA},
    "standardized": {"standardize_logits": True},
}
REFUSED = {
    **{(task, name): name for task in ("regression", "embedding") for name in SETTINGS},
    ("ctc", "dkd"): "no label belongs to a frame",
    ("multi_label_classification", "standardized"): "two classes",
}


class Compared(NamedTuple):
    """One comparison of a teacher's distribution with a student's."""

    place: tuple[Any, ...]  # in the logits
    label: int
    weight: float = 1.0


def case(name: str) -> tuple[Any, dict[str, torch.Tensor], tuple[int, ...]]:
    """(task, a batch with rows or positions that do not count or have no label, shape of the logits)."""
    task = TASKS[name]
    if name == "semantic_segmentation":
        labels = torch.tensor([[[0, 255, 1, 2], [0, 1, 2, 2]], [[255, 255, 255, 255], [1, 3, 255, 0]]])
        return task, {"pixel_values": torch.zeros(2, 3, 2, 4), "labels": labels}, (2, 2, 2, 4)
    if name == "question_answering":
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
        ends = {"start_positions": torch.tensor([1, IGNORED, 0]), "end_positions": torch.tensor([4, IGNORED, 2])}
        return task, {"input_ids": torch.ones_like(mask), "attention_mask": mask, **ends}, (3, 2, 5)
    if name == "multi_label_classification":
        labels = torch.tensor([[1.0, 0.0, 0.3, 1.0], [IGNORED] * 4, [0.0, 1.0, 0.0, 0.0]])
        return task, {"features": torch.zeros(3, 2), "labels": labels}, (3, 4)
    if name in ("ctc", "audio_frame_classification"):
        task = dataclasses.replace(task, frames=lambda samples: samples // 4)
        mask = torch.tensor([[1] * 12, [1] * 8 + [0] * 4])
        labels = torch.eye(4)[torch.tensor([[0, 2, 1], [3, 1, 1]])] if name != "ctc" else torch.tensor([[1, 2], [3, 3]])
        return task, {"input_values": torch.zeros(2, 12), "attention_mask": mask, "labels": labels}, (2, 3, 4)
    return task, batch_of(name), (3, 4) if name in ROWS else (2, 3, 4)


def comparisons(name: str, batch: dict[str, torch.Tensor]) -> Iterator[Compared]:
    """What the soft loss compares where `kd_positions` is "labels"."""
    labels = batch.get("labels")
    if name == "semantic_segmentation":  # logits of half the width: columns 2j and 2j + 1, the label of the second
        for b, i, j in (labels != 255).nonzero().tolist():
            label = int(labels[b, i, j // 2 * 2 + 1])
            yield Compared((b, i, j // 2), IGNORED if label == 255 else label)
    elif name == "question_answering":
        for b, side in torch.ones(3, 2).nonzero().tolist():
            label = batch[("start_positions", "end_positions")[side]][b]
            yield Compared((b, side, slice(int(batch["attention_mask"][b].sum()))), int(label), 0.5)
    elif name == "multi_label_classification":
        for b, c in torch.ones(3, 4).nonzero().tolist():
            yield Compared((b, c), IGNORED if labels[b, c] == IGNORED else int(labels[b, c] >= 0.5), 0.25)
    elif name == "ctc":
        yield from (Compared((b, frame), IGNORED) for b in range(2) for frame in range(3 - b))
    elif name == "audio_frame_classification":
        yield from (Compared((b, frame), int(labels[b, frame].argmax())) for b in range(2) for frame in range(3))
    elif name in ROWS:
        yield from (Compared((b,), int(labels[b])) for b in range(3))
    else:
        shift = int(name == "causal_lm")
        for b, s in (labels[:, shift:] != IGNORED).nonzero().tolist():
            yield Compared((b, s), int(labels[b, s + shift]))


def standardized(row: list[float]) -> list[float]:
    mean = math.fsum(row) / len(row)
    deviation = math.sqrt(math.fsum((z - mean) ** 2 for z in row) / len(row))
    return [(z - mean) / deviation for z in row]


def loss_by_hand(objective: str, z_s: list[float], z_t: list[float], label: int) -> float:
    if objective == "standardized":
        return T * T * kl(*(probabilities(standardized(z), T) for z in (z_t, z_s)))
    scale = 1 if objective == "logit_mse" else T * T
    return scale * by_hand(objective, z_s, z_t, label, T, BETA)


COMPUTED = [(task, name) for task in TASKS for name in SETTINGS if (task, name) not in REFUSED]


@pytest.mark.parametrize(("name", "objective"), COMPUTED)
def test_the_soft_loss_written_out(name, objective):
    task, batch, shape = case(name)
    z_s, z_t = 2 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = Objective(1.0, T, reduction="tokenmean", **SETTINGS[objective])
    counts = made.count(task, batch)
    task.check_soft_loss(made.soft_loss())
    task.check_classes(made.soft_loss(), shape[-1])
    parts = made(LossInputs(task, batch, counts), made.soft_loss(), z_s.requires_grad_(), z_t)
    expected = count = 0.0
    for place, label, weight in comparisons(name, batch):
        pair = [z[place].reshape(-1).tolist() for z in (z_s.detach(), z_t)]
        if name == "multi_label_classification" and objective != "logit_mse":
            pair = [[0.0, *z] for z in pair]  # no and yes
        expected += weight * loss_by_hand(objective, *pair, label)
        count += weight
    assert int(counts.soft) == count
    assert parts.soft.item() == pytest.approx(expected / count, rel=1e-12)
    assert torch.autograd.grad(parts.total, z_s)[0].isfinite().all()


@pytest.mark.parametrize(("name", "objective"), REFUSED)
def test_what_has_no_meaning_is_refused(name, objective):
    task = case(name)[0] if name == "ctc" else TASKS[name]
    soft_loss = SoftTargetLoss(**SETTINGS[objective])
    argument = "kd_standardize_logits" if objective == "standardized" else "kd_divergence"
    check = task.check_classes if name == "multi_label_classification" else lambda loss, _: task.check_soft_loss(loss)
    with pytest.raises(ValueError, match=rf"`{argument}` is .*; expected .*({REFUSED[name, objective]}|{name})"):
        check(soft_loss, 4)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"kd_divergence": "entropy_switch"},
            r"`kd_beta` is 1 \(the default\); expected below 0\.6931, the limit for 2",
        ),
        ({"kd_divergence": "entropy_switch", "kd_beta": 0.7}, r"`kd_beta` is 0\.7; expected below 0\.6931"),
        ({"kd_standardize_logits": True}, "`kd_standardize_logits` is True; expected False with fewer than three"),
    ],
)
@pytest.mark.parametrize("classes", [2, "multi-label"])
def test_two_classes_are_too_few(settings, match, classes, tmp_path):
    if classes == 2:
        run = tiny.trainer("plain", tmp_path, pair=(tiny.Plain(classes=2), tiny.Plain(classes=2)), **settings)
    else:
        run = tiny.trainer("multi_label_classification", tmp_path, **settings)
    with pytest.raises(ValueError, match=match):
        run.train()


def test_an_entropy_below_the_limit_is_taken(tmp_path):
    pair = tiny.Plain(classes=2), tiny.Plain(classes=2)
    data = [{**row, "labels": row["labels"] % 2} for row in tiny.rows("plain")]
    tiny.trainer(
        "plain", tmp_path, pair=pair, data=data, kd_divergence="entropy_switch", kd_beta=0.6, max_steps=1
    ).train()
