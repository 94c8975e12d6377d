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

from kd_trainer.losses import divergences
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
        monkeypatch.setattr(divergences, "_SMALL", 0)
        monkeypatch.setattr(divergences, "_block_elements", lambda device: 16)


@st.composite
def pairs(draw, values=finite, dtype=torch.float32):
    """Student and teacher logits [N, V] of equal shape."""
    positions, classes = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rows = st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=positions, max_size=positions)
    return tuple(torch.tensor(draw(rows), dtype=dtype) for _ in range(2))


def betas(name):
    none = name not in ("jsd", "skew_forward_kl", "skew_reverse_kl")
    return st.none() if none else st.sampled_from([None, 0.05, 0.5, 0.95])


@each_divergence
@CI
@given(data=st.data(), pair=pairs(), temperature=temperatures)
def test_never_negative_and_zero_on_itself(name, data, pair, temperature):
    options = {"temperature": temperature, "beta": data.draw(betas(name))}
    slack = SLACK * max(1.0, 1 / temperature)
    assert (DIVERGENCES[name](*pair, **options) >= -slack).all()
    itself = DIVERGENCES[name](pair[0].clone().requires_grad_(), pair[0], **options)
    torch.testing.assert_close(itself, torch.zeros_like(itself), rtol=0, atol=slack)


@each_divergence
@CI
@given(data=st.data(), pair=pairs(), constants=st.tuples(finite, finite), temperature=temperatures)
def test_a_constant_and_an_order_of_classes_change_nothing(name, data, pair, constants, temperature):
    options = {"temperature": temperature, "beta": data.draw(betas(name))}
    student, teacher = (z.double() for z in pair)
    value = DIVERGENCES[name](student, teacher, **options)
    moved = DIVERGENCES[name](student + constants[0], teacher + constants[1], **options)
    torch.testing.assert_close(moved, value, rtol=1e-9, atol=1e-12)
    order = torch.tensor(data.draw(st.permutations(range(student.shape[-1]))))
    torch.testing.assert_close(
        DIVERGENCES[name](student[:, order], teacher[:, order], **options), value, rtol=1e-9, atol=1e-12
    )


@each_divergence
@CI
@given(data=st.data(), pair=pairs(), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_masked_positions_may_hold_anything(name, data, pair, bad):
    student, teacher = pair
    positions = student.shape[0]
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=positions, max_size=positions)))
    expected = DIVERGENCES[name](student[mask], teacher[mask]).sum()
    student, teacher = (z.masked_fill(~mask.unsqueeze(-1), bad) for z in pair)
    student.requires_grad_()
    for labels, counted in ((None, mask), (torch.where(mask, 0, -100), None)):
        value = SoftTargetLoss(divergence=name, reduction="sum")(student, teacher, labels, counted)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=SLACK)
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.isfinite().all()
        assert (gradient[~mask] == 0).all()


@each_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@CI
@given(pair=pairs(), temperature=temperatures)
def test_half_precision_logits_lose_nothing_more(name, dtype, pair, temperature):
    student, teacher = (z.to(dtype) for z in pair)
    value = DIVERGENCES[name](student.requires_grad_(), teacher, temperature=temperature)
    truth = DIVERGENCES[name](student.detach().double(), teacher.double(), temperature=temperature)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=SLACK * max(1.0, 1 / temperature))


@each_divergence
@CI
@given(pair=pairs(values=st.one_of(finite, st.just(-math.inf))), temperature=temperatures)
def test_excluded_classes_never_give_nan(name, pair, temperature):
    student, teacher = (torch.cat([z, torch.zeros(len(z), 1)], 1) for z in pair)  # one class of each row is left
    student.requires_grad_()
    value = DIVERGENCES[name](student, teacher, temperature=temperature)
    assert not value.isnan().any()
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()
    bounded = name not in ("forward_kl", "reverse_kl", "symmetric_kl")
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    forward, backward = ((p > 0) & (q == 0)).any(-1), ((q > 0) & (p == 0)).any(-1)
    infinite = {"forward_kl": forward, "reverse_kl": backward, "symmetric_kl": forward | backward}
    assert torch.equal(value.isinf(), torch.zeros_like(forward) if bounded else infinite[name])


@each_divergence
@CI
@given(data=st.data(), pair=pairs(dtype=torch.float64), temperature=temperatures)
def test_terms_sum_to_the_divergence_and_gradients_sum_to_zero(name, data, pair, temperature):
    options = {"temperature": temperature, "beta": data.draw(betas(name))}
    student, teacher = pair[0].requires_grad_(), pair[1]
    value = DIVERGENCES[name](student, teacher, **options)
    torch.testing.assert_close(
        divergence_terms(name, student, teacher, **options).sum(-1), value, atol=1e-12, rtol=1e-9
    )
    (gradient,) = torch.autograd.grad(value.sum(), student)  # along a constant nothing changes
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(len(gradient), dtype=torch.float64), rtol=0, atol=1e-10)
