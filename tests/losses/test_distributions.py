"""`distributions.py` against `torch.distributions`, written-out sums, gradcheck, and samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, MultivariateNormal, Normal, kl_divergence

from kd_trainer.losses.distributions import (
    OVERLAP_IDS,
    kl_bernoulli,
    kl_categorical,
    kl_diagonal_gaussian,
    kl_full_gaussian,
    kl_gaussian,
    kl_to_standard_normal,
    monte_carlo_kl,
    overlap,
)
from kd_trainer.losses.divergences import forward_kl

F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def covariance(*batch, dimensions=4):
    factor = torch.randn(*batch, dimensions, dimensions, **F64)
    return factor @ factor.mT + 0.5 * torch.eye(dimensions, **F64)


def test_bernoulli():
    p, q = torch.rand(5, **F64), torch.rand(5, **F64)
    torch.testing.assert_close(kl_bernoulli(p, q), kl_divergence(Bernoulli(p), Bernoulli(q)))
    z_p, z_q, zero = p.logit(), q.logit(), torch.zeros(5, **F64)
    torch.testing.assert_close(
        kl_bernoulli(p, q), forward_kl(torch.stack([z_q, zero], -1), torch.stack([z_p, zero], -1))
    )
    p, q = (x.clamp(0.05, 0.95).requires_grad_() for x in (p, q))
    assert torch.autograd.gradcheck(kl_bernoulli, (p, q))


def test_bernoulli_at_the_ends():
    p = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.0], requires_grad=True)
    q = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5], requires_grad=True)
    value = kl_bernoulli(p, q)
    assert value.tolist() == [0.0, 0.0, math.inf, math.inf, pytest.approx(math.log(2))]
    value.sum().backward()
    assert p.grad.isfinite().all()
    assert q.grad.isfinite().all()


def test_categorical():
    p, q = torch.softmax(torch.randn(2, 3, 6, **F64), -1)
    torch.testing.assert_close(kl_categorical(p, q), kl_divergence(Categorical(p), Categorical(q)))
    torch.testing.assert_close(kl_categorical(p, q), forward_kl(q.log(), p.log()))
    assert torch.autograd.gradcheck(kl_categorical, (p.requires_grad_(), q.requires_grad_()))


def test_categorical_zeros():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    q = torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.5, 0.0]], requires_grad=True)
    value = kl_categorical(p, q)
    assert value.tolist() == [math.inf, pytest.approx(math.log(2))]
    value.sum().backward()
    assert p.grad.isfinite().all()
    assert q.grad.isfinite().all()


def test_gaussians():
    p_mean, q_mean = torch.randn(2, 3, 4, **F64)
    p_std, q_std = torch.rand(2, 3, 4, **F64) + 0.2
    elementwise = kl_divergence(Normal(p_mean, p_std), Normal(q_mean, q_std))
    torch.testing.assert_close(kl_gaussian(p_mean, p_std, q_mean, q_std), elementwise)
    torch.testing.assert_close(kl_diagonal_gaussian(p_mean, p_std, q_mean, q_std), elementwise.sum(-1))
    full = kl_full_gaussian(p_mean, torch.diag_embed(p_std**2), q_mean, torch.diag_embed(q_std**2))
    torch.testing.assert_close(full, elementwise.sum(-1))
    arguments = tuple(x.requires_grad_() for x in (p_mean, p_std, q_mean, q_std))
    assert torch.autograd.gradcheck(kl_gaussian, arguments)


def test_gaussian_reference_figure():
    p = torch.tensor([0.0, 1.0, -0.5]), torch.tensor([1.0, 1.5, 0.8])
    q = torch.tensor([0.1, 1.2, -0.4]), torch.tensor([1.1, 1.4, 0.9])
    assert round(kl_gaussian(*p, *q).mean().item(), 6) == 0.015625


def test_full_gaussian():
    p_mean, q_mean = torch.randn(2, 3, 4, **F64)
    p_covariance, q_covariance = covariance(3), covariance(3)
    expected = kl_divergence(MultivariateNormal(p_mean, p_covariance), MultivariateNormal(q_mean, q_covariance))
    torch.testing.assert_close(kl_full_gaussian(p_mean, p_covariance, q_mean, q_covariance), expected)
    torch.testing.assert_close(kl_full_gaussian(p_mean, p_covariance, p_mean, p_covariance), torch.zeros(3, **F64))
    factors = torch.randn(2, 2, 2, **F64).requires_grad_()

    def of_factors(p_factor, q_factor):
        p_covariance, q_covariance = (f @ f.mT + torch.eye(2, **F64) for f in (p_factor, q_factor))
        return kl_full_gaussian(torch.zeros(2, **F64), p_covariance, torch.ones(2, **F64), q_covariance)

    assert torch.autograd.gradcheck(of_factors, (factors[0], factors[1]))


def test_to_standard_normal():
    mean, log_variance = torch.randn(3, 4, **F64), torch.randn(3, 4, **F64)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(torch.zeros_like(mean), 1.0)).sum(-1)
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected)
    assert torch.autograd.gradcheck(kl_to_standard_normal, (mean.requires_grad_(), log_variance.requires_grad_()))
    small = torch.tensor([1e-4])  # float32: s² - 1 - log s² = 5e-9, lost without expm1
    assert kl_to_standard_normal(torch.zeros(1), small).item() == pytest.approx(2.5e-9, rel=0.05)


def test_monte_carlo_covers_the_truth():
    p, q = Normal(0.0, 1.0), Normal(0.5, 1.5)
    truth = kl_divergence(p, q)
    samples = p.sample((2000, 200))  # 200 estimates at once
    estimate, error = monte_carlo_kl(p.log_prob(samples), q.log_prob(samples))
    assert estimate.shape == error.shape == (200,)
    within = ((estimate - truth).abs() < 1.96 * error).float().mean()
    assert 0.89 < within < 1.0  # 95% expected, four standard deviations of 200 trials
    assert estimate.std().item() == pytest.approx(error.mean().item(), rel=0.25)


def test_monte_carlo_by_hand():
    estimate, error = monte_carlo_kl(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 0.0]))
    assert estimate.item() == 1.0
    assert error.item() == pytest.approx(1 / math.sqrt(3))
    assert monte_carlo_kl(torch.zeros(2), torch.tensor([0.0, -math.inf])).estimate.item() == math.inf


EYE, ONE = torch.eye(2), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: kl_bernoulli(torch.tensor([0.5, 1.5]), ONE),
            r"`p_probs` is 1.5 at index \[1\]; expected probabilities",
        ),
        (lambda: kl_bernoulli(ONE, torch.ones(3)), r"`p_probs` is of shape \[2\] and `q_probs` of shape \[3\]"),
        (lambda: kl_categorical(ONE, torch.tensor([0.5, -0.5])), r"`q_probs` is -0.5 at index \[1\]"),
        (lambda: kl_categorical(torch.tensor([math.nan, 1.0]), ONE), r"`p_probs` is nan at index \[0\]"),
        (lambda: kl_gaussian(ONE, ONE * 0, ONE, ONE), r"`p_std` is 0 at index \[0\]; expected standard deviations > 0"),
        (lambda: kl_diagonal_gaussian(ONE, ONE, ONE, torch.ones(1)), r"`p_mean`.*`q_std` of shape \[1\]"),
        (lambda: kl_full_gaussian(ONE, -EYE, ONE, EYE), "`p_covariance` is not positive definite"),
        (lambda: kl_full_gaussian(ONE, EYE, ONE, torch.ones(2, 2).triu()), "`q_covariance` is not symmetric"),
        (lambda: kl_full_gaussian(ONE, torch.eye(3), ONE, EYE), r"`p_covariance` is of shape \[3, 3\].*shape \[2, 2\]"),
        (lambda: kl_to_standard_normal(ONE, torch.ones(1)), "`mean` is of shape"),
        (lambda: monte_carlo_kl(torch.ones(1), torch.ones(1)), "at least two samples"),
    ],
)
def test_messages(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def top_mass(z_s, z_t, ids=OVERLAP_IDS, temperature=1.0):
    """The overlap of one row by hand: the mean over all orders of equal classes."""
    p = [math.exp(z / temperature) for z in z_t.double().tolist()]
    z_s = z_s.double().tolist()
    edge = sorted(z_s, reverse=True)[min(ids, len(z_s)) - 1]
    above = [i for i, z in enumerate(z_s) if z > edge]
    equal = [i for i, z in enumerate(z_s) if z == edge]
    places = min(ids, len(z_s)) - len(above)
    return (sum(p[i] for i in above) + places / len(equal) * sum(p[i] for i in equal)) / sum(p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("classes", "ids"), [(21, 20), (64, 20), (7000, 20), (1000, 3), (7, 20)])
def test_overlap_is_the_teachers_mass_on_the_students_top(classes, ids, dtype):
    """In bfloat16 many classes are equal; the widest is read in blocks, of which the last is not full."""
    z_s, z_t = (3 * torch.randn(2, 5, 2 * classes, **F64)).to(dtype)[..., ::2]
    for temperature in (1.0, 2.5):
        found = overlap(z_s, z_t, ids=ids, temperature=temperature)
        expected = [top_mass(s, t, ids, temperature) for s, t in zip(z_s, z_t, strict=True)]
        assert found.tolist() == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-5)
    assert not overlap(z_s.clone().requires_grad_(), z_t).requires_grad


@pytest.mark.parametrize("classes", [100, 9000])
def test_overlap_of_equal_logits(classes):
    """Each of the equal classes has the same share of the places, wherever it stands."""
    z_t = torch.randn(4, classes, **F64)
    constant = torch.zeros(4, classes, **F64)
    torch.testing.assert_close(overlap(constant, z_t), torch.full((4,), OVERLAP_IDS / classes, **F64))
    some = constant.clone()
    some[0, 7::11] = 1.0  # more than 20, in every block
    some[1, [3, classes - 1]] = 1.0
    some[2, 5:] = -math.inf
    some[3, torch.randperm(classes)[:20]] = 1.0
    expected = [top_mass(s, t) for s, t in zip(some.clamp(min=-1), z_t, strict=True)]
    assert overlap(some, z_t).tolist() == pytest.approx(expected, rel=1e-9)
    order = torch.randperm(classes)
    torch.testing.assert_close(overlap(some[:, order], z_t[:, order]), overlap(some, z_t))


def test_overlap_refuses_what_is_no_number_of_ids():
    for ids in (0, 1.5, True):
        with pytest.raises(ValueError, match=rf"`ids` is {ids}; expected a whole number of ids, at least 1"):
            overlap(torch.zeros(3), torch.zeros(3), ids=ids)
