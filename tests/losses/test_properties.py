"""Laws that hold for every entry of `DIVERGENCES`, on drawn logits, for the plain formula and for the blocks.

Tolerances: log-probabilities of float32 logits up to `LARGEST` are off by about LARGEST * eps each, and a position sums
them weighted by probabilities, so a divergence is off by a few times that.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd_trainer.losses import formulas
from kd_trainer.losses.distributions import entropy
from kd_trainer.losses.divergences import DIVERGENCES, divergence_terms
from kd_trainer.losses.modules import SoftTargetLoss

CI = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LARGEST = 16.0
SLACK = 8 * LARGEST * torch.finfo(torch.float32).eps

each_divergence = pytest.mark.parametrize("name", DIVERGENCES)
finite = st.floats(-LARGEST, LARGEST, width=32)
temperatures = st.sampled_from([0.5, 1.0, 2.0, 8.0])


@pytest.fixture(autouse=True, params=["plain", "in_blocks"])
def path(request, monkeypatch):
    if request.param == "in_blocks":
        monkeypatch.setattr(formulas, "_SMALL", 0)
        monkeypatch.setattr(formulas, "_block_elements", lambda device: 16)


@st.composite
def pairs(draw, values=finite, dtype=torch.float32):
    """Student and teacher logits [N, V] of equal shape."""
    positions, classes = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rows = st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=positions, max_size=positions)
    return tuple(torch.tensor(draw(rows), dtype=dtype) for _ in range(2))


def betas(name):
    return st.none() if DIVERGENCES[name].parameter is None else st.sampled_from([None, 0.05, 0.5, 0.95])


def labelled(name, logits, data=None):
    """Labels of the positions, -100 among them, for a divergence that needs them."""
    if not DIVERGENCES[name].needs_labels:
        return {}
    classes = st.sampled_from([-100, *range(logits.shape[-1])])
    drawn = [0] * len(logits) if data is None else [data.draw(classes) for _ in logits]
    return {"labels": torch.tensor(drawn, dtype=torch.int64)}


def room(name, temperature):
    """The error of float32: a divergence of logits sums their squares, others differences over T weighed by beta."""
    entry = DIVERGENCES[name]
    return SLACK * LARGEST if entry.of_logits else SLACK * max(1.0, 1 / temperature) * max(1.0, entry.default or 1.0)


@each_divergence
@CI
@given(data=st.data(), pair=pairs(), temperature=temperatures)
def test_never_negative_and_zero_on_itself(name, data, pair, temperature):
    options = {"temperature": temperature, "beta": data.draw(betas(name)), **labelled(name, pair[0], data)}
    slack = room(name, temperature)
    assert (DIVERGENCES[name](*pair, **options) >= -slack).all()
    itself = DIVERGENCES[name](pair[0].clone().requires_grad_(), pair[0], **options)
    torch.testing.assert_close(itself, torch.zeros_like(itself), rtol=0, atol=slack)


@each_divergence
@CI
@given(data=st.data(), pair=pairs(), constants=st.tuples(finite, finite), temperature=temperatures)
def test_a_constant_and_an_order_of_classes_change_nothing(name, data, pair, constants, temperature):
    options = {"temperature": temperature, "beta": data.draw(betas(name))}
    labels = labelled(name, pair[0], data)
    student, teacher = (z.double() for z in pair)
    value = DIVERGENCES[name](student, teacher, **options, **labels)
    other = constants[0] if DIVERGENCES[name].of_logits else constants[1]  # logits are compared as they are
    moved = DIVERGENCES[name](student + constants[0], teacher + other, **options, **labels)
    torch.testing.assert_close(moved, value, rtol=1e-9, atol=1e-12)
    order = torch.tensor(data.draw(st.permutations(range(student.shape[-1]))))
    if labels:
        places = order.argsort()[labels["labels"].clamp(min=0)]
        labels = {"labels": torch.where(labels["labels"] < 0, -100, places)}
    moved = DIVERGENCES[name](student[:, order], teacher[:, order], **options, **labels)
    torch.testing.assert_close(moved, value, rtol=1e-9, atol=1e-12)


@each_divergence
@CI
@given(data=st.data(), pair=pairs(), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_masked_positions_may_hold_anything(name, data, pair, bad):
    student, teacher = pair
    positions = student.shape[0]
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=positions, max_size=positions)))
    given = labelled(name, student[mask])
    expected = DIVERGENCES[name](student[mask], teacher[mask], **given).sum()
    known = torch.zeros(positions, dtype=torch.int64) if given else None
    student, teacher = (z.masked_fill(~mask.unsqueeze(-1), bad) for z in pair)
    student.requires_grad_()
    for labels, counted in ((None, mask), (torch.where(mask, 0, -100), None)):
        value = SoftTargetLoss(divergence=name, reduction="sum")(student, teacher, labels, counted, class_labels=known)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=room(name, 1.0))
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.isfinite().all()
        assert (gradient[~mask] == 0).all()


@each_divergence
@CI
@given(pair=pairs(), temperature=temperatures, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_logits_lose_nothing_more(name, pair, temperature, dtype):
    student, teacher = (z.to(dtype) for z in pair)
    options = {"temperature": temperature, **labelled(name, student)}
    value = DIVERGENCES[name](student.requires_grad_(), teacher, **options)
    truth = DIVERGENCES[name](student.detach().double(), teacher.double(), **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=room(name, temperature))


@each_divergence
@CI
@given(pair=pairs(values=st.one_of(finite, st.just(-math.inf))), temperature=temperatures)
def test_excluded_classes_never_give_nan(name, pair, temperature):
    student, teacher = (torch.cat([z, torch.zeros(len(z), 1)], 1) for z in pair)  # one class of each row is left
    student.requires_grad_()
    value = DIVERGENCES[name](student, teacher, temperature=temperature, **labelled(name, student))
    assert not value.isnan().any()
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    forward, backward = ((p > 0) & (q == 0)).any(-1), ((q > 0) & (p == 0)).any(-1)
    uncertain = entropy(teacher, temperature=temperature) > 1.0
    infinite = {
        "forward_kl": forward,
        "reverse_kl": backward,
        "symmetric_kl": forward | backward,
        "dkd": (teacher.isfinite() & student.isneginf()).any(-1),
        "logit_mse": (teacher.isneginf() != student.isneginf()).any(-1),
        "entropy_switch": torch.where(uncertain, forward, backward),
    }
    assert torch.equal(value.isinf(), infinite.get(name, torch.zeros_like(forward)))


@each_divergence
@CI
@given(data=st.data(), pair=pairs(dtype=torch.float64), temperature=temperatures)
def test_terms_sum_to_the_divergence_and_gradients_sum_to_zero(name, data, pair, temperature):
    options = {"temperature": temperature, "beta": data.draw(betas(name)), **labelled(name, pair[0], data)}
    student, teacher = pair[0].requires_grad_(), pair[1]
    value = DIVERGENCES[name](student, teacher, **options)
    torch.testing.assert_close(
        divergence_terms(name, student, teacher, **options).sum(-1), value, atol=1e-12, rtol=1e-9
    )
    if DIVERGENCES[name].of_logits:
        return
    (gradient,) = torch.autograd.grad(value.sum(), student)  # along a constant nothing changes
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(len(gradient), dtype=torch.float64), rtol=0, atol=1e-10)
