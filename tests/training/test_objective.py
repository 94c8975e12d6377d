"""`objective.py`: the loss of a micro-batch, written out in float64 loops, for every task, reduction and choice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from kd_trainer.losses.modules import SoftTargetLoss
from kd_trainer.tasks.kinds import TASKS, Task
from kd_trainer.training.objective import Counts, LossInputs, Objective
from kd_trainer.training.settings import scheduled

IGNORED, CLASSES, T = -100, 4, 2.0
# The tasks of tokens and rows; the others: test_row_tasks.py and test_speech_frames.py.
SOFTMAX = [name for name, task in TASKS.items() if task.softmax and type(task) is Task]
ROWS = ("classification", "multiple_choice")


def batch_of(name: str, *, labelled: bool = True) -> dict[str, torch.Tensor]:
    """Two rows of three positions (or three rows of one), with padding and with positions without a label."""
    if name in ROWS:
        batch = {"features": torch.zeros(3, 2), "labels": torch.tensor([2, IGNORED, 0])}
    else:
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        batch = {
            "input_ids": torch.ones(2, 3, dtype=torch.long),
            "decoder_attention_mask" if name == "seq2seq_lm" else "attention_mask": mask,
            "labels": torch.tensor([[0, IGNORED, 3], [1, 2, IGNORED]]),
        }
    return batch if labelled else {k: v for k, v in batch.items() if k != "labels"}


def logits_of(name: str, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    shape = (3, CLASSES) if name in ROWS else (2, 3, CLASSES)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written_out(name, batch, z_s, z_t, *, reduction, positions, smoothing=0.0) -> tuple[float | None, float, Counts]:
    """(hard, soft, counts) in plain Python, position by position."""
    labels = batch.get("labels")
    if name in ROWS:
        z_s, z_t = z_s[:, None], z_t[:, None]
        labels = None if labels is None else labels[:, None]
        mask = None
    else:
        mask = batch["decoder_attention_mask" if name == "seq2seq_lm" else "attention_mask"]
    shift = 1 if name == "causal_lm" else 0
    hard = soft = 0.0
    n_hard = n_soft = 0
    for b in range(z_s.shape[0]):
        for s in range(z_s.shape[1] - shift):
            q = [math.exp(float(z)) for z in z_s[b, s]]
            q = [x / sum(q) for x in q]
            has_label = labels is not None and int(labels[b, s + shift]) != IGNORED
            if has_label:
                n_hard += 1
                hard -= (1 - smoothing) * math.log(q[int(labels[b, s + shift])])
                hard -= smoothing / CLASSES * sum(map(math.log, q))
            if name in ROWS:
                counted = True
            elif positions == "labels" and labels is not None:
                counted = has_label
            else:
                counted = bool(mask[b, s]) and bool(mask[b, s + shift])
            if counted:
                n_soft += 1
                p = [math.exp(float(z) / T) for z in z_t[b, s]]
                r = [math.exp(float(z) / T) for z in z_s[b, s]]
                p, r = [x / sum(p) for x in p], [x / sum(r) for x in r]
                soft += T * T * sum(x * math.log(x / y) for x, y in zip(p, r, strict=True))
    rows = z_s.shape[0]
    d_hard, d_soft = (rows, rows) if reduction == "batchmean" else (max(n_hard, 1), max(n_soft, 1))
    return (None if labels is None else hard / d_hard), soft / d_soft, Counts(n_hard, n_soft, rows)


def build(alpha: float = 0.3, **kwargs) -> tuple[Objective, SoftTargetLoss]:
    return Objective(alpha, T, **kwargs), SoftTargetLoss(temperature=T, reduction="sum")


def cases() -> Iterator[tuple]:
    yield from itertools.product(SOFTMAX, ["batchmean", "tokenmean"], ["labels", "attended"], [0.0, 0.3, 1.0])


def test_value_and_counts_written_out():
    for labelled, (name, reduction, positions, alpha) in itertools.product([True, False], cases()):
        objective, soft_loss = build(alpha, reduction=reduction, positions=positions)
        batch, z_s, z_t = batch_of(name, labelled=labelled), logits_of(name, 0), logits_of(name, 1)
        hard, soft, expected = written_out(name, batch, z_s, z_t, reduction=reduction, positions=positions)
        counts = objective.count(TASKS[name], batch)
        assert tuple(int(c) for c in counts[:4]) == (*expected[:3], 1)
        parts = objective(LossInputs(TASKS[name], batch, counts), soft_loss, z_s, z_t)
        assert parts.soft.item() == pytest.approx(soft, rel=1e-12)
        total = alpha * soft
        if labelled:
            assert parts.hard.item() == pytest.approx(hard, rel=1e-12)
            total += (1 - alpha) * hard
        else:
            assert parts.hard is None
        assert parts.total.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("name", SOFTMAX)
def test_label_smoothing_written_out(name):
    objective, soft_loss = build(label_smoothing=0.2)
    batch, z_s, z_t = batch_of(name), logits_of(name, 0), logits_of(name, 1)
    hard, _, _ = written_out(name, batch, z_s, z_t, reduction="batchmean", positions="labels", smoothing=0.2)
    parts = objective(LossInputs(TASKS[name], batch, objective.count(TASKS[name], batch)), soft_loss, z_s, z_t)
    assert parts.hard.item() == pytest.approx(hard, rel=1e-12)


def test_agreement_is_the_share_of_counted_positions_with_the_same_top_class():
    z_s = torch.tensor([[[2.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], [[0.0, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0]]])
    z_t = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]], [[0.0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]])
    objective, soft_loss = build()
    task, batch = TASKS["token_classification"], batch_of("token_classification")
    parts = objective(LossInputs(task, batch, objective.count(task, batch)), soft_loss, z_s, z_t)
    assert parts.agreement == pytest.approx(2 / 4)  # labelled: (0, 0) yes, (0, 2) no, (1, 0) yes, (1, 1) no
    assert isinstance(parts.agreement, float)


@pytest.mark.parametrize(("name", "reduction", "positions", "alpha"), cases())
def test_gradient_by_finite_differences(name, reduction, positions, alpha):
    objective, soft_loss = build(alpha, reduction=reduction, positions=positions)
    batch, z_t = batch_of(name), logits_of(name, 1)
    counts = objective.count(TASKS[name], batch)
    z_s = logits_of(name, 0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: objective(LossInputs(TASKS[name], batch, counts), soft_loss, z, z_t).total, (z_s,)
    )


def test_the_hard_loss_has_no_graph_at_alpha_one():
    objective, soft_loss = build(1.0)
    batch, z_s = batch_of("classification"), logits_of("classification", 0).requires_grad_()
    task = TASKS["classification"]
    parts = objective(
        LossInputs(task, batch, objective.count(task, batch)), soft_loss, z_s, logits_of("classification", 1)
    )
    assert not parts.hard.requires_grad
    assert parts.total is parts.soft  # a weight of one multiplies nothing


def test_without_teacher_logits_there_is_no_soft_loss():
    objective, soft_loss = build(0.0)
    batch, z_s = batch_of("causal_lm"), logits_of("causal_lm", 0)
    counts = objective.count(TASKS["causal_lm"], batch)
    parts = objective(LossInputs(TASKS["causal_lm"], batch, counts), soft_loss, z_s, None)
    assert parts.soft is None
    assert parts.agreement is None
    assert parts.total is parts.hard


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
def test_splitting_a_batch_changes_nothing(name, reduction):
    objective, soft_loss = build(reduction=reduction)
    task, batch, z_s, z_t = TASKS[name], batch_of(name), logits_of(name, 0), logits_of(name, 1)
    whole = objective(LossInputs(task, batch, objective.count(task, batch)), soft_loss, z_s, z_t)
    each = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(z_s.shape[0])]
    counts = Counts(*(sum(c) for c in zip(*(objective.count(task, b)[:3] for b in each), strict=True)))
    parts = [
        objective(LossInputs(task, b, counts), soft_loss, z_s[i : i + 1], z_t[i : i + 1]) for i, b in enumerate(each)
    ]
    for field in ("total", "hard", "soft", "agreement"):
        together = sum(getattr(part, field).item() for part in parts)
        assert together == pytest.approx(getattr(whole, field).item(), rel=1e-6), field


def test_the_scale_multiplies_every_part_once():
    objective, soft_loss = build()
    task, batch, z_s, z_t = (
        TASKS["causal_lm"],
        batch_of("causal_lm"),
        logits_of("causal_lm", 0),
        logits_of("causal_lm", 1),
    )
    counts = objective.count(task, batch)
    one = objective(LossInputs(task, batch, counts), soft_loss, z_s, z_t)
    two = objective(LossInputs(task, batch, counts._replace(scale=2)), soft_loss, z_s, z_t)
    for a, b in zip(one[:4], two[:4], strict=True):
        assert b.item() == pytest.approx(2 * a.item())


@pytest.mark.parametrize("name", SOFTMAX)
def test_all_masked_is_zero_with_a_gradient_path(name):
    for alpha, reduction in itertools.product([0.0, 0.3, 1.0], ["batchmean", "tokenmean"]):
        objective, soft_loss = build(alpha, reduction=reduction)
        batch = batch_of(name)
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        z_s = logits_of(name, 0).requires_grad_()
        parts = objective(
            LossInputs(TASKS[name], batch, objective.count(TASKS[name], batch)), soft_loss, z_s, logits_of(name, 1)
        )
        parts.total.backward()
        assert torch.isfinite(z_s.grad).all()
        if name in ROWS and alpha > 0:
            assert parts.total > 0  # an unlabelled row has a soft loss
        else:
            assert parts.total.item() == 0
            assert (z_s.grad == 0).all()


def test_nothing_at_all_is_zero_with_a_gradient_path():
    objective, soft_loss = build(0.0)
    z_s = logits_of("classification", 0).requires_grad_()
    batch = batch_of("classification", labelled=False)
    parts = objective(LossInputs(TASKS["classification"], batch, Counts(0, 3, 3)), soft_loss, z_s, None)
    parts.total.backward()
    assert parts.total.item() == 0
    assert (z_s.grad == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("positions", ["labels", "attended"])
@pytest.mark.parametrize("name", [name for name in SOFTMAX if name not in ROWS])
def test_uncounted_positions_may_hold_anything(name, positions, bad):
    objective, soft_loss = build(positions=positions)
    task, batch = TASKS[name], batch_of(name)
    counts = objective.count(task, batch)
    counted = task.soft_mask(batch, task.targets(batch), positions) | (task.targets(batch) != IGNORED)
    results = []
    for value in (1.0, bad):
        z_s, z_t = logits_of(name, 0), logits_of(name, 1)
        z_s[~counted], z_t[~counted] = value, value
        z_s.requires_grad_()
        parts = objective(LossInputs(task, batch, counts), soft_loss, z_s, z_t)
        parts.total.backward()
        results.append((parts.total.item(), parts.agreement.item(), z_s.grad[counted]))
        assert (z_s.grad[~counted] == 0).all()
    assert not counted.all()
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])


def test_an_infinite_term_of_weight_zero_is_not_added():
    task, batch = TASKS["classification"], {"x": torch.zeros(1, 1), "labels": torch.tensor([0])}
    z_s, z_t = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]])
    objective, soft_loss = build(0.0)
    parts = objective(LossInputs(task, batch, objective.count(task, batch)), soft_loss, z_s, z_t)
    assert parts.soft.item() == math.inf
    assert parts.total.item() == 0.0
    objective, _ = build(1.0)
    batch["labels"] = torch.tensor([1])
    parts = objective(
        LossInputs(task, batch, objective.count(task, batch)), soft_loss, z_s, torch.tensor([[0.0, -math.inf]])
    )
    assert parts.hard.item() == math.inf
    assert parts.total.item() == 0.0


def test_low_precision_logits_are_summed_in_float32():
    objective, soft_loss = build()
    task, batch = TASKS["classification"], batch_of("classification")
    z_s, z_t = (logits_of("classification", i).bfloat16() for i in range(2))
    counts = objective.count(task, batch)
    parts = objective(LossInputs(task, batch, counts), soft_loss, z_s, z_t)
    exact = objective(LossInputs(task, batch, counts), soft_loss, z_s.double(), z_t.double())
    assert parts.total.dtype == torch.float32
    assert parts.total.item() == pytest.approx(exact.total.item(), rel=1e-5)


# ---- schedules and the formula ----


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1.0] * 5), ("linear", [1.0, 0.8, 0.6, 0.4, 0.2]), ("cosine", [1.0, None, 0.6, None, 0.2])],
)
def test_scheduled(schedule, expected):
    values = [scheduled(1.0, 0.2, schedule, i / 4) for i in range(5)]
    for value, wanted in zip(values, expected, strict=True):
        assert wanted is None or value == pytest.approx(wanted)
    assert all(a >= b for a, b in itertools.pairwise(values))
    if schedule == "cosine":
        assert values[1] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_without_an_end_nothing_moves(schedule):
    assert [scheduled(0.7, None, schedule, i / 4) for i in range(5)] == [0.7] * 5


@pytest.mark.parametrize(
    ("objective", "task", "formula"),
    [
        (Objective(0.7, 3.0), "classification", "loss = 0.7 * soft(forward_kl, T=3) + 0.3 * hard, per row"),
        (
            Objective(0.7, 3.0, reduction="tokenmean"),
            "causal_lm",
            "loss = 0.7 * soft(forward_kl, T=3) + 0.3 * hard, per token",
        ),
        (
            Objective(0.7, 3.0, reduction="tokenmean"),
            "classification",
            "loss = 0.7 * soft(forward_kl, T=3) + 0.3 * hard, per row",
        ),
        (Objective(0.0, 3.0), "causal_lm", "loss = hard, per row"),
        (Objective(1, 1.5, "jsd", 0.5), "causal_lm", "loss = soft(jsd, beta=0.5, T=1.5), per row"),
        (
            Objective(0.5, 2.0),
            "multi_label_classification",
            "loss = 0.5 * soft(forward_kl per label, T=2) + 0.5 * hard, per row",
        ),
        (Objective(0.5, 2.0, "logit_mse"), "causal_lm", "loss = 0.5 * soft(logit_mse) + 0.5 * hard, per row"),
        (
            Objective(0.5, 2.0, standardize_logits=True),
            "causal_lm",
            "loss = 0.5 * soft(forward_kl, T=2, standardized logits) + 0.5 * hard, per row",
        ),
        (Objective(0.5, 2.0), "regression", "loss = 0.5 * soft(squared error) + 0.5 * hard, per row"),
        (Objective(0.5, 2.0), None, "loss = 0.5 * soft(forward_kl, T=2) + 0.5 * hard, per row"),
    ],
)
def test_formula(objective, task, formula):
    assert objective.formula(None if task is None else TASKS[task]) == formula
