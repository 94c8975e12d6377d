"""`losses/modules.py`: T² in value and gradient, denominators, masks, validation of rows, calibration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kd_trainer.losses import formulas
from kd_trainer.losses.calibration import fit_temperature
from kd_trainer.losses.distributions import KLDivergenceLoss
from kd_trainer.losses.divergences import DIVERGENCES, divergence_terms, forward_kl
from kd_trainer.losses.modules import DistillationLoss, SoftTargetLoss

INF, NAN = math.inf, math.nan


def logits(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2).to(dtype)


def kl_div(student, teacher, reduction, temperature):
    log_q, log_p = (torch.log_softmax(z / temperature, -1) for z in (student, teacher))
    return F.kl_div(log_q, log_p, log_target=True, reduction=reduction) * temperature**2


# ---- SoftTargetLoss -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:reduction. .mean.")
@pytest.mark.parametrize("small", [0, 2**12])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_soft_target_loss_equals_torch_times_t_squared(monkeypatch, reduction, shape, temperature, small):
    monkeypatch.setattr(formulas, "_SMALL", small)
    teacher = logits(*shape, seed=1)
    one, other = (logits(*shape, seed=2).requires_grad_() for _ in range(2))
    value = SoftTargetLoss(temperature=temperature, reduction=reduction)(one, teacher)
    expected = kl_div(other, teacher, reduction, temperature)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_soft_target_loss_of_every_divergence(name):
    student, teacher, entry = logits(4, 6, seed=1), logits(4, 6, seed=2), DIVERGENCES[name]
    labels, scale = torch.arange(4) if entry.needs_labels else None, 1 if entry.of_logits else 4
    loss = SoftTargetLoss(divergence=name, temperature=2.0, reduction="sum")
    expected = divergence_terms(name, student, teacher, temperature=2.0, labels=labels).sum() * scale
    torch.testing.assert_close(loss(student, teacher, class_labels=labels), expected)
    beta = None if entry.parameter is None else 0.3
    loss = SoftTargetLoss(divergence=name, beta=beta, reduction="tokenmean")
    expected = entry(student, teacher, beta=beta, labels=labels).mean()
    torch.testing.assert_close(loss(student, teacher, class_labels=labels), expected)


def test_gradient_keeps_its_size_when_temperature_grows():
    # What T² is for: as T grows, the gradient approaches (z_s - z_t) / V of centred logits, whatever T is.
    student, teacher = logits(1, 8, seed=1, dtype=torch.float64), logits(1, 8, seed=2, dtype=torch.float64)
    student.requires_grad_()
    limit = (student - student.mean() - teacher + teacher.mean()).detach() / 8
    for temperature in (1e3, 1e4):
        (gradient,) = torch.autograd.grad(SoftTargetLoss(temperature=temperature)(student, teacher), student)
        torch.testing.assert_close(gradient, limit, rtol=0, atol=20 / temperature)


MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
LABELS = torch.where(MASK, torch.arange(12).view(3, 4) % 5, -100)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_masked_positions_do_not_exist(name):
    for how, (reduction, denominator) in itertools.product(
        [{"labels": LABELS}, {"mask": MASK}, {"mask": MASK.long()}],
        [("sum", 1), ("mean", 20), ("batchmean", 3), ("tokenmean", 4), ("none", None)],
    ):
        teacher, student = logits(3, 4, 5, seed=1), logits(3, 4, 5, seed=2)
        entry = DIVERGENCES[name]
        known = LABELS.clamp(min=0) if entry.needs_labels else None
        per_position = entry(student, teacher, temperature=2.0, labels=known) * (1 if entry.of_logits else 4)
        teacher[~MASK], student[~MASK] = NAN, INF
        student.requires_grad_()
        value = SoftTargetLoss(temperature=2.0, divergence=name, reduction=reduction)(
            student, teacher, class_labels=known, **how
        )
        if denominator is None:
            torch.testing.assert_close(value.sum(-1), per_position * MASK)
        else:
            torch.testing.assert_close(value, per_position[MASK].sum() / denominator)
        value.sum().backward()
        assert student.grad.isfinite().all()
        assert (student.grad[~MASK] == 0).all()
        assert (student.grad[MASK] != 0).any()


def test_labels_and_mask_must_both_count():
    teacher, student = logits(3, 4, 5, seed=1), logits(3, 4, 5, seed=2)
    other = torch.rand(3, 4, generator=torch.Generator().manual_seed(3)) > 0.4
    loss = SoftTargetLoss(reduction="tokenmean")
    torch.testing.assert_close(loss(student, teacher, LABELS, other), loss(student, teacher, mask=MASK & other))
    renamed = SoftTargetLoss(reduction="tokenmean", ignore_index=7)
    torch.testing.assert_close(renamed(student, teacher, LABELS.masked_fill(~MASK, 7)), loss(student, teacher, LABELS))


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "tokenmean"])
def test_all_masked_is_zero_with_a_gradient_path(reduction):
    student = torch.full((2, 3, 5), NAN, requires_grad=True)
    value = SoftTargetLoss(reduction=reduction)(student, student.detach(), torch.full((2, 3), -100))
    assert value.item() == 0.0
    value.backward()
    assert torch.equal(student.grad, torch.zeros(2, 3, 5))


def test_soft_target_loss_shows_its_settings():
    assert repr(SoftTargetLoss(divergence="jsd", beta=0.3)) == (
        "SoftTargetLoss(temperature=1.0, divergence='jsd', beta=0.3, reduction='batchmean', ignore_index=-100)"
    )
    assert "alpha=0.7" in repr(DistillationLoss())
    assert "temperature=3.0" in repr(DistillationLoss())
    assert repr(KLDivergenceLoss()) == "KLDivergenceLoss(epsilon=1e-08, validate=True)"


# ---- KLDivergenceLoss -----------------------------------------------------------------------------------------------


def test_kl_divergence_loss_equals_torch():
    p, q = torch.softmax(logits(6, 5, seed=1), -1), torch.softmax(logits(6, 5, seed=2), -1)
    torch.testing.assert_close(KLDivergenceLoss(epsilon=0.0)(p, q), F.kl_div(q.log(), p, reduction="batchmean"))
    torch.testing.assert_close(KLDivergenceLoss()(p, q), F.kl_div(q.log(), p, reduction="batchmean"))


def test_smoothing_written_out_and_still_a_divergence():
    p, q, e = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]), 0.01
    smooth = [[(x + e) / (1 + 3 * e) for x in row] for row in ([0.5, 0.5, 0.0], [1.0, 0.0, 0.0])]
    expected = sum(a * math.log(a / b) for a, b in zip(*smooth, strict=True))
    loss = KLDivergenceLoss(epsilon=e)
    assert loss(p, q).item() == pytest.approx(expected, rel=1e-6)
    rows = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])]
    others = torch.eye(4)[torch.tensor([0, 0, 2, 1, 3])]
    for epsilon in (0.0, 1e-8, 1e-3, 1.0):
        loss = KLDivergenceLoss(epsilon=epsilon)
        assert loss(rows, rows).item() == 0.0
        assert loss(rows, others).item() > 0.0


def test_support_mismatch_is_inf_at_epsilon_zero_only():
    p, q = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    q.requires_grad_()
    value = KLDivergenceLoss(epsilon=0.0)(p, q)
    value.backward()
    assert value.item() == INF
    assert q.grad.isfinite().all()
    assert KLDivergenceLoss()(p, q).isfinite()
    assert KLDivergenceLoss(epsilon=0.0)(q.detach(), p).item() == pytest.approx(math.log(2) / 2)


def test_kl_divergence_loss_gradient_dtypes_and_no_rows():
    p, q = (torch.softmax(logits(3, 4, seed=s, dtype=torch.float64), -1) for s in (1, 2))
    loss = KLDivergenceLoss(epsilon=1e-3, validate=False)
    assert torch.autograd.gradcheck(loss, (p.requires_grad_(), q.requires_grad_()))
    for dtype in (torch.bfloat16, torch.float16):
        value = KLDivergenceLoss(epsilon=1e-3)(
            p.detach().to(dtype), q.detach().to(dtype)
        )  # rows of that dtype are accepted
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(p, q).item(), rel=8 * torch.finfo(dtype).eps)
    assert KLDivergenceLoss()(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0.0


GOOD = torch.tensor([[0.5, 0.5], [0.2, 0.8]])


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([[0.5, 0.5], [0.5, 0.6]], "row 1 sums to 1.1; expected rows that are finite, non-negative and sum to 1"),
        ([[1.2, -0.2], [0.5, 0.5]], "row 0 has a negative entry"),
        ([[0.5, 0.5], [NAN, 0.5]], "row 1 holds NaN or inf"),
        ([[0.5, 0.5], [2.0, 1.0]], "row 1 sums to 3.*Apply a softmax to logits"),
    ],
)
def test_rows_are_validated(rows, match):
    rows = torch.tensor(rows)
    with pytest.raises(ValueError, match="`target_probs` is no distribution: " + match):
        KLDivergenceLoss()(rows, GOOD)
    with pytest.raises(ValueError, match="`predicted_probs` is no distribution: " + match):
        KLDivergenceLoss()(GOOD, rows)


def test_a_float32_softmax_over_a_large_vocabulary_is_a_distribution():
    rows = torch.softmax(logits(2, 151_936, seed=1), -1)
    assert KLDivergenceLoss()(rows, rows.double().float()).item() == 0.0
    assert KLDivergenceLoss()(rows.double(), rows.double()).item() == 0.0


def test_a_small_error_is_found_in_float32():
    with pytest.raises(ValueError, match=r"row 0 sums to 1\.00001"):
        KLDivergenceLoss()(torch.tensor([[0.5, 0.50001]]), GOOD[:1])


# ---- DistillationLoss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_distillation_loss_on_classes(alpha):
    student, teacher, labels = logits(4, 5, seed=1), logits(4, 5, seed=2), torch.tensor([0, 4, 2, 1])
    student.requires_grad_()
    total, soft, hard = DistillationLoss(alpha=alpha, temperature=2.0)(student, teacher, labels)
    torch.testing.assert_close(soft, kl_div(student, teacher, "batchmean", 2.0))
    torch.testing.assert_close(hard, F.cross_entropy(student, labels))
    torch.testing.assert_close(total, alpha * soft + (1 - alpha) * hard)
    (gradient,) = torch.autograd.grad(total, student)
    expected = alpha * kl_div(student, teacher, "batchmean", 2.0) + (1 - alpha) * F.cross_entropy(student, labels)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])
    assert (soft.requires_grad, hard.requires_grad) == (alpha > 0, alpha < 1)


@pytest.mark.parametrize(("reduction", "denominator"), [("batchmean", 3), ("tokenmean", 4), ("sum", 1)])
def test_distillation_loss_on_tokens_has_one_denominator(reduction, denominator):
    student, teacher = logits(3, 4, 5, seed=1), logits(3, 4, 5, seed=2)
    total, soft, hard = DistillationLoss(reduction=reduction)(student, teacher, LABELS)
    torch.testing.assert_close(hard, F.cross_entropy(student[MASK], LABELS[MASK], reduction="sum") / denominator)
    torch.testing.assert_close(soft, 9 * forward_kl(student, teacher, temperature=3.0)[MASK].sum() / denominator)
    torch.testing.assert_close(total, 0.7 * soft + 0.3 * hard)


@pytest.mark.parametrize(("reduction", "hard_denominator"), [("batchmean", 3), ("tokenmean", 2)])
def test_a_row_without_a_label_still_has_a_teacher(reduction, hard_denominator):
    student, teacher, labels = logits(3, 5, seed=1), logits(3, 5, seed=2), torch.tensor([1, -100, 4])
    _, soft, hard = DistillationLoss(reduction=reduction)(student, teacher, labels)
    torch.testing.assert_close(soft, kl_div(student, teacher, "batchmean", 3.0))
    kept = labels != -100
    torch.testing.assert_close(hard, F.cross_entropy(student[kept], labels[kept], reduction="sum") / hard_denominator)
    _, soft, _ = DistillationLoss(reduction="tokenmean")(student, teacher, labels, mask=kept)
    torch.testing.assert_close(soft, kl_div(student[kept], teacher[kept], "batchmean", 3.0))


def test_a_term_of_weight_zero_is_not_added():
    student, labels = logits(2, 3, seed=1).requires_grad_(), torch.tensor([0, 1])
    broken = torch.full((2, 3), NAN)
    total, soft, _ = DistillationLoss(alpha=0.0)(student, broken, labels)
    total.backward()
    assert total.isfinite()
    assert soft.isnan()
    assert student.grad.isfinite().all()
    excluded = torch.tensor([[0.0, -INF]], requires_grad=True)
    total, _, hard = DistillationLoss(alpha=1.0)(excluded, torch.tensor([[0.0, -INF]]), torch.tensor([1]))
    assert (total.item(), hard.item()) == (0.0, INF)


def test_nothing_labelled_and_nothing_counted():
    student = torch.full((2, 3, 5), NAN, requires_grad=True)
    total, soft, hard = DistillationLoss()(student, student.detach(), torch.full((2, 3), -100))
    assert (total.item(), soft.item(), hard.item()) == (0.0, 0.0, 0.0)
    total.backward()
    assert torch.equal(student.grad, torch.zeros(2, 3, 5))


def test_bf16_losses_are_float32():
    student, teacher = logits(4, 5, seed=1, dtype=torch.bfloat16), logits(4, 5, seed=2, dtype=torch.bfloat16)
    labels = torch.tensor([0, 4, 2, 1])
    found = DistillationLoss()(student, teacher, labels)
    assert all(part.dtype == torch.float32 for part in found)
    torch.testing.assert_close(found, DistillationLoss()(student.float(), teacher.float(), labels))


# ---- fit_temperature ------------------------------------------------------------------------------------------------


def test_fit_temperature_is_the_minimum():
    scores = logits(500, 4, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.softmax(scores / 2.5, -1), 1, generator=generator).squeeze(1)
    fitted = fit_temperature(scores, labels)
    assert fitted == pytest.approx(2.5, rel=0.2)
    nll = {t: F.cross_entropy(scores / t, labels).item() for t in (fitted, fitted * 1.001, fitted / 1.001)}
    assert min(nll, key=nll.get) == fitted
    log_t = torch.tensor(math.log(fitted), dtype=torch.float64, requires_grad=True)
    F.cross_entropy(scores / log_t.exp(), labels).backward()
    assert abs(log_t.grad) < 1e-9
    assert fit_temperature(scores * 7, labels) == pytest.approx(7 * fitted, rel=1e-9)
    assert fit_temperature((scores + 3).float(), labels) == pytest.approx(fitted, rel=1e-5)


def test_fit_temperature_ignores_unlabelled_positions():
    scores, generator = logits(2, 50, 3, seed=1), torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.softmax(scores, -1).view(100, 3), 1, generator=generator).view(2, 50)
    with_ignored = labels.clone()
    with_ignored[1] = -100
    scores[1] = NAN
    assert fit_temperature(scores, with_ignored) == fit_temperature(scores[0], labels[0])


def test_fit_temperature_has_no_optimum():
    scores = torch.tensor([[4.0, 0.0], [0.0, 3.0]])
    with pytest.warns(RuntimeWarning, match="separate the labels .* 0.05 is returned"):
        assert fit_temperature(scores, torch.tensor([0, 1]), minimum=0.05) == 0.05
    with pytest.warns(RuntimeWarning, match="no likelier than chance .* 100 is returned"):
        assert fit_temperature(scores, torch.tensor([1, 0])) == 100.0


# ---- messages -------------------------------------------------------------------------------------------------------

Z, Y = torch.zeros(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: SoftTargetLoss(temperature=-1.0), ValueError, "`temperature` is -1.0; expected a finite number > 0"),
        (lambda: SoftTargetLoss(divergence="kl"), ValueError, "`divergence` is 'kl'; expected one of 'forward_kl'"),
        (lambda: SoftTargetLoss(beta=0.5), ValueError, "`beta` is 0.5; expected None with divergence 'forward_kl'"),
        (lambda: SoftTargetLoss(reduction="batch_mean"), ValueError, "Did you mean `batchmean`"),
        (lambda: SoftTargetLoss()(Z[0], Z[0]), ValueError, r"shape \[3\]; expected at least \[B, V\].*unsqueeze"),
        (
            lambda: SoftTargetLoss()(Z, Z, Z),
            TypeError,
            "`labels` is of dtype torch.float32; expected integer class ids",
        ),
        (lambda: SoftTargetLoss()(Z, Z, Y[:1]), ValueError, r"`labels` is of shape \[1\]; expected .* shape \[2\]"),
        (lambda: SoftTargetLoss()(Z, Z, mask=torch.ones(2, 3)), ValueError, r"`mask` is of shape \[2, 3\]"),
        (lambda: DistillationLoss(alpha=1.5), ValueError, r"`alpha` is 1.5; expected a number in \[0, 1\]"),
        (lambda: DistillationLoss(reduction="mean"), ValueError, "`reduction` is 'mean'; expected one of 'batchmean'"),
        (lambda: DistillationLoss()(Z, Z, Y + 2), ValueError, r"`labels` is 3 at some position; expected .* \[0, 2\]"),
        (lambda: DistillationLoss()(Z, Z, Y - 1), ValueError, "`labels` is -1 at some position.*no label with -100"),
        (lambda: DistillationLoss()(Z, torch.zeros(2, 4), Y), ValueError, r"`teacher_logits` of shape \[2, 4\]"),
        (lambda: KLDivergenceLoss(epsilon=-1.0), ValueError, "`epsilon` is -1.0; expected a finite number >= 0"),
        (lambda: KLDivergenceLoss()(GOOD, GOOD[:1]), ValueError, r"`target_probs` is of shape \[2, 2\] and `predicted"),
        (lambda: KLDivergenceLoss()(GOOD[0], GOOD[0]), ValueError, r"both \[N, C\]"),
        (lambda: KLDivergenceLoss()(GOOD.long(), GOOD), TypeError, "`target_probs` is of dtype torch.int64"),
        (lambda: fit_temperature(Z, torch.tensor([-100, -100])), ValueError, "`labels` is -100 at every position"),
        (lambda: fit_temperature(Z / 0, Y), ValueError, "`logits` is not finite everywhere"),
        (lambda: fit_temperature(Z, Y + 5), ValueError, "`labels` is 6 at some position"),
        (lambda: fit_temperature(Z, Y, minimum=0.0), ValueError, "`minimum` is 0.0"),
        (lambda: fit_temperature(Z, Y, minimum=2.0, maximum=1.0), ValueError, "`maximum` is 1.0; expected .* > 2"),
    ],
)
def test_messages(call, error, match):
    with pytest.raises(error, match=match):
        call()
