"""Objectives of labels, logits and entropy, and standardised logits: against float64 by hand, at their edges, fused."""

from __future__ import annotations

import math

import pytest
import torch

from kd_trainer import DistillationLoss, SoftTargetLoss, dkd, entropy_switch, forward_kl, logit_mse, reverse_kl
from kd_trainer.losses import formulas
from kd_trainer.losses.divergences import DIVERGENCES
from kd_trainer.losses.formulas import standardize
from kd_trainer.losses.fused_linear import fused_linear_distillation, fused_linear_distillation_plain
from kd_trainer.losses.sparse_targets import draw_samples, top_k, top_k_divergence
from tests.helpers import tiny

NEW = ["dkd", "logit_mse", "entropy_switch"]
EPS = torch.finfo(torch.float32).eps
LABELS = torch.tensor([0, 6, 3, -100, 2])
each = pytest.mark.parametrize("name", NEW)
temperatures = pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0, 1e4])


def pair(rows=5, classes=7, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64))


def probabilities(row, temperature):
    powers = [math.exp((z - max(row)) / temperature) for z in row]
    return [x / math.fsum(powers) for x in powers]


def kl(a, b):
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def by_hand(name, z_s, z_t, label, temperature, beta):
    """Nats of one row, in plain Python, from the paper's definitions."""
    if name == "logit_mse":
        return math.fsum((s - t) ** 2 for s, t in zip(z_s, z_t, strict=True)) / len(z_s)
    p, q = probabilities(z_t, temperature), probabilities(z_s, temperature)
    if name == "entropy_switch":
        entropy = -math.fsum(x * math.log(x) for x in p if x > 0)
        return kl(p, q) if entropy > beta else kl(q, p)
    if label < 0:
        return kl(p, q)
    others = [i for i in range(len(p)) if i != label]
    pairs = [[x[label], math.fsum(x[i] for i in others)] for x in (p, q)]
    hats = [probabilities([z[i] for i in others], temperature) for z in (z_t, z_s)]
    return kl(*pairs) + beta * kl(*hats)


def call(name, z_s, z_t, labels=LABELS, **options):
    given = {"labels": labels} if DIVERGENCES[name].needs_labels else {}
    return DIVERGENCES[name](z_s, z_t, **options, **given)


# ---- values and gradients -------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("temperature", [1.0, 3.0, 1e4])
@pytest.mark.parametrize("way", ["plain", "in blocks"])
def test_equals_the_definition(name, temperature, way, monkeypatch):
    if way == "in blocks":
        monkeypatch.setattr(formulas, "_SMALL", 0)
        monkeypatch.setattr(formulas, "_block_elements", lambda device: 14)
    z_s, z_t = pair()
    for beta in [None] if DIVERGENCES[name].parameter is None else [None, 0.4, 3.0]:
        used = DIVERGENCES[name].default if beta is None else beta
        rows = zip(z_s.tolist(), z_t.tolist(), LABELS.tolist(), strict=True)
        expected = torch.tensor([by_hand(name, *row, temperature, used) for row in rows], dtype=torch.float64)
        found = call(name, z_s.clone().requires_grad_(), z_t, temperature=temperature, beta=beta)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@each
@pytest.mark.parametrize("beta", [None, 0.7])
def test_gradcheck(name, beta, monkeypatch):
    beta = None if DIVERGENCES[name].parameter is None else beta
    z_s, z_t = pair(seed=1)
    z_s.requires_grad_()
    options = {"temperature": 2.0, "beta": beta}
    assert torch.autograd.gradcheck(lambda z: call(name, z, z_t, **options), z_s)
    assert torch.autograd.gradcheck(lambda z: call(name, z_s, z, **options), z_t.clone().requires_grad_())
    monkeypatch.setattr(formulas, "_SMALL", 0)
    assert torch.autograd.gradcheck(lambda z: call(name, z, z_t, **options), z_s)


@each
@temperatures
@pytest.mark.parametrize("classes", [2, 7])
def test_float32_is_close_to_float64(name, temperature, classes):
    """A sum of classes whose log-probabilities are off by their size times the precision."""
    z_s, z_t = (z.float().double() for z in pair(classes=classes))
    labels = LABELS % classes
    s = z_s.float().requires_grad_()
    found = call(name, s, z_t.float(), labels, temperature=temperature)
    exact = call(name, z_s, z_t, labels, temperature=temperature)
    size = 1 if DIVERGENCES[name].of_logits else (z_s - z_t).abs().max() / temperature + math.log(classes)
    room = 16 * EPS * float(size) * (DIVERGENCES[name].default or 1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=room)
    (gradient,) = torch.autograd.grad(found.sum(), s)
    assert gradient.isfinite().all()


# ---- decoupled ------------------------------------------------------------------------------------------------------


def test_beta_of_one_minus_p_is_the_forward_kl():
    z_s, z_t = pair(seed=2)
    for i, label in enumerate(LABELS.tolist()):
        for temperature in (1.0, 4.0):
            p = torch.softmax(z_t[i] / temperature, -1)
            rest = p.sum() - p[label] if label >= 0 else torch.tensor(1.0)
            found = dkd(z_s[i], z_t[i], labels=LABELS[i], temperature=temperature, beta=float(rest))
            expected = forward_kl(z_s[i], z_t[i], temperature=temperature)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("of_teacher", "of_student"), [(1e-9, 1e-6), (1e-9, 0.3), (0.3, 1e-9), (1e-9, 1e-9)])
def test_a_sure_teacher_in_float32(of_teacher, of_student):
    """The label has p = 1 - 1e-9, which float32 rounds to 1; the rest is spread over the other classes."""

    def rows(rest, spread):
        shares = torch.tensor(spread, dtype=torch.float64)
        return torch.cat((torch.tensor([1 - rest]).double(), rest * shares / shares.sum())).log()

    z_t, z_s = rows(of_teacher, [5.0, 3.0, 1.0]), rows(of_student, [1.0, 1.0, 4.0])
    label = torch.tensor(0)
    rest = [torch.tensor([1 - x, x], dtype=torch.float64).tolist() for x in (of_teacher, of_student)]
    tckd = (1 - of_teacher) * (math.log1p(-of_teacher) - math.log1p(-of_student))
    tckd += of_teacher * math.log(rest[0][1] / rest[1][1])
    hats = [[x / sum(spread) for x in spread] for spread in ([5.0, 3.0, 1.0], [1.0, 1.0, 4.0])]
    student = z_s.float().requires_grad_()
    for beta in (0.1, 8.0):
        value = dkd(student, z_t.float(), labels=label, beta=beta)
        assert value.item() == pytest.approx(tckd + beta * kl(*hats), rel=2e-5)
    exact_z = z_s.clone().requires_grad_()
    (found,), (exact,) = (torch.autograd.grad(dkd(z, z_t.to(z.dtype), labels=label), z) for z in (student, exact_z))
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=16 * EPS * 8.0)  # beta


def test_two_classes_and_one_have_no_other_classes():
    z_s, z_t = pair(classes=2)
    labels = torch.tensor([0, 1, 1, -100, 0])
    torch.testing.assert_close(dkd(z_s, z_t, labels=labels, beta=100.0), forward_kl(z_s, z_t))
    single = z_s[:, :1].clone().requires_grad_()
    one = dkd(single, z_t[:, :1], labels=labels.clamp(max=0))
    assert one.tolist() == [0.0] * 5
    assert not torch.autograd.grad(one.sum(), single)[0].any()


def test_excluded_classes():
    z_s, z_t = pair(1, 4)
    label, z_s = torch.tensor([1]), z_s.requires_grad_()
    none = torch.tensor([[False, False, True, False]])
    rest = torch.tensor([[True, False, True, True]])
    both = dkd(z_s.masked_fill(none, -torch.inf), z_t.masked_fill(none, -torch.inf), labels=label)
    torch.testing.assert_close(both, dkd(z_s[:, [0, 1, 3]], z_t[:, [0, 1, 3]], labels=label))
    sure = dkd(z_s, z_t.masked_fill(rest, -torch.inf), labels=label)  # no distribution among the others
    torch.testing.assert_close(sure, forward_kl(z_s, z_t.masked_fill(rest, -torch.inf)))
    lacking = dkd(z_s.masked_fill(none, -torch.inf), z_t, labels=label)
    assert lacking.item() == math.inf
    for value in (both, sure, lacking):
        assert torch.autograd.grad(value.sum(), z_s, retain_graph=True)[0].isfinite().all()


# ---- of logits ------------------------------------------------------------------------------------------------------


@temperatures
def test_no_temperature_in_the_squared_error(temperature):
    z_s, z_t = pair()
    z_s.requires_grad_()
    loss = SoftTargetLoss(temperature=temperature, divergence="logit_mse", reduction="tokenmean")(z_s, z_t)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(z_s, z_t))
    torch.testing.assert_close(torch.autograd.grad(loss, z_s)[0], 2 * (z_s - z_t).detach() / z_s.numel())
    whole = DistillationLoss(temperature=temperature, divergence="logit_mse", alpha=1.0)(z_s, z_t, LABELS)
    torch.testing.assert_close(whole.total, loss)


def test_classes_that_both_exclude_do_not_count():
    z_s, z_t = pair()
    none = torch.tensor([True, False, False, True, False, False, False])
    s, t = (z.masked_fill(none, -torch.inf) for z in (z_s.requires_grad_(), z_t))
    torch.testing.assert_close(logit_mse(s, t), logit_mse(z_s[:, ~none], z_t[:, ~none]))
    assert logit_mse(s, z_t).isinf().all()
    assert torch.autograd.grad(logit_mse(s, z_t).sum(), z_s)[0].isfinite().all()


def test_the_entropy_decides_row_by_row():
    z_s, z_t = pair(rows=4)
    z_t[:2] *= 10
    value = entropy_switch(z_s, z_t, beta=0.5)
    torch.testing.assert_close(value, torch.cat((reverse_kl(z_s, z_t)[:2], forward_kl(z_s, z_t)[2:])))


# ---- standardised logits --------------------------------------------------------------------------------------------


def test_standardize():
    z = pair()[0]
    mean, std = z.mean(-1, keepdim=True), z.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(standardize(z), (z - mean) / std)
    torch.testing.assert_close(standardize(50 * z + 7), standardize(z))
    assert torch.autograd.gradcheck(standardize, z.requires_grad_())
    half = z.detach().to(torch.bfloat16)
    assert torch.equal(standardize(half), standardize(half.float()))


@pytest.mark.parametrize("constant", [0.0, 5.1, -1e30])
def test_constant_logits_give_zeros(constant):
    z = torch.full((2, 7), constant, requires_grad=True)
    found = standardize(z)
    assert not found.any()
    assert torch.autograd.grad(found.square().sum() + found.sum(), z)[0].isfinite().all()


def test_excluded_classes_stay_so_and_do_not_count():
    z = pair()[0].requires_grad_()
    none = torch.tensor([True, False, False, True, False, False, False])
    found = standardize(z.masked_fill(none, -torch.inf))
    assert found[:, none].isneginf().all()
    torch.testing.assert_close(found[:, ~none], standardize(z[:, ~none]))
    assert torch.autograd.grad(found[:, ~none].square().sum(), z)[0].isfinite().all()


def test_the_soft_loss_of_standardised_logits():
    z_s, z_t = pair()
    options = {"temperature": 2.0, "divergence": "jsd"}
    loss = SoftTargetLoss(**options, standardize_logits=True)
    torch.testing.assert_close(loss(z_s, z_t), SoftTargetLoss(**options)(standardize(z_s), standardize(z_t)))
    torch.testing.assert_close(loss(3 * z_s + 1, z_t), loss(z_s, z_t))
    terms = SoftTargetLoss(**options, standardize_logits=True, reduction="none")
    torch.testing.assert_close(terms(z_s, z_t).sum() / len(z_s), loss(z_s, z_t))
    with pytest.raises(ValueError, match="`standardize_logits` is True; expected False with fewer than three classes"):
        loss(z_s[:, :2], z_t[:, :2])


# ---- without logits -------------------------------------------------------------------------------------------------

OPTIONS = [{"divergence": name} for name in NEW] + [
    {"standardize_logits": True},
    {"divergence": "jsd", "standardize_logits": True},
    {"divergence": "dkd", "standardize_logits": True, "temperature": 1.0},
]


def fused(function, form, dtype=torch.float64, **options):
    """The loss and the gradients at hidden states and weight, of the fused function or of whole logits."""
    generator = torch.Generator().manual_seed(3)
    sizes = ((9, 5), (23, 5), (9, 6), (23, 6))
    x = [torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    labels = torch.randint(23, (9,), generator=generator)
    labels[::3] = -100
    mask = torch.tensor([True] * 7 + [False] * 2) if form == "mask" else None
    hidden, weight = (z.clone().requires_grad_() for z in x[:2])
    common = 19 if form == "common" else None
    teacher = {"teacher_logits": x[2] @ x[3].T} if form == "logits" else {}
    caps = {"student_softcap": 3.0, "teacher_scale": 0.8} if form == "curved" else {}
    rows = (None, None) if teacher else (x[2], x[3])
    options = {"temperature": 2.5, "alpha": 0.6, "soft_count": 4, "hard_count": 5} | options
    if function is None:
        z_s, z_t = hidden @ weight.T, x[2] @ x[3].T
        if form == "curved":
            z_s, z_t = 3.0 * torch.tanh(z_s / 3.0), 0.8 * z_t
        counted = labels != -100 if mask is None else mask
        settings = {
            name: options[name] for name in ("divergence", "standardize_logits", "temperature") if name in options
        }
        soft_loss = SoftTargetLoss(**settings, reduction="sum")
        read = {"class_labels": labels} if soft_loss.needs_labels else {}
        soft = soft_loss(z_s[:, :common], z_t[:, :common], mask=counted, **read) / 4
        hard = torch.nn.functional.cross_entropy(z_s, labels, reduction="sum") / 5
        total = 0.6 * soft + 0.4 * hard
    else:
        total = function(
            hidden, weight, *rows, labels, soft_mask=mask, common_ids=common, chunk_rows=4, **teacher, **caps, **options
        ).total
    return total.detach(), *torch.autograd.grad(total, (hidden, weight))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", ["plain", "mask", "common", "logits", "curved"])
@pytest.mark.parametrize("function", [fused_linear_distillation, fused_linear_distillation_plain])
def test_fused_is_full(function, form, options):
    if form == "common" and options.get("divergence") == "dkd":
        options = options | {"temperature": 1.0}  # a label beyond the common ids counts as none
    for one, other in zip(fused(function, form, **options), fused(None, form, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_in_float32(options):
    found, expected = (
        fused(fused_linear_distillation, "plain", torch.float32, **options),
        fused(None, "plain", **options),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dkd", "logit_mse", "entropy_switch", "standardised"])
def test_a_sparse_teacher_is_refused(name):
    z_s, z_t = pair()
    standardised = name == "standardised"
    options = {"standardize_logits": True} if standardised else {"divergence": name}
    given = {"teacher_top_k": top_k(z_t, 3, temperature=3.0)}
    expected = (
        "`standardize_logits` is True" if standardised else f"`divergence` is '{name}'; expected one of .*every class"
    )
    for function in (fused_linear_distillation, fused_linear_distillation_plain):
        with pytest.raises(ValueError, match=expected):
            function(z_s, torch.eye(7).double(), None, None, LABELS, **given, **options)
    if not standardised:
        with pytest.raises(ValueError, match=expected):
            top_k_divergence(z_s, given["teacher_top_k"], divergence=name, labels=LABELS)
    else:
        given = {"teacher_samples": draw_samples(z_t, 3, temperature=3.0, uniform=torch.full((5,), 0.5))}
        with pytest.raises(ValueError, match=expected):
            fused_linear_distillation(z_s, torch.eye(7).double(), None, None, LABELS, **given, **options)


# ---- trained --------------------------------------------------------------------------------------------------------


def train(folder, implementation, **options):
    trainer = tiny.trainer(
        "causal_lm", folder, kd_loss_implementation=implementation, max_steps=20, per_device_train_batch_size=4,
        logging_steps=1, kd_temperature=2.0, learning_rate=0.005, **options,
    )  # fmt: skip
    trainer.train()
    return tiny.logs(trainer)


@pytest.mark.trains
@pytest.mark.parametrize("options", [*({"kd_divergence": n} for n in NEW), {"kd_standardize_logits": True}], ids=str)
def test_twenty_steps_fused_are_those_of_full_logits(tmp_path, options):
    full, fused_logs = (train(tmp_path / way, way, **options) for way in ("full", "fused"))
    for name in ("loss", "soft_loss", "hard_loss"):
        assert fused_logs[name] == pytest.approx(full[name], rel=1e-5), name
