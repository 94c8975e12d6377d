"""Closed forms of the KL divergence between named distributions, a Monte Carlo estimate, and entropies of logits.

For: Bernoulli and categorical probabilities, Gaussians, the KL term of a VAE, any pair one can sample and score. Leaves
divergences of logits to `divergences.py` and means over a batch to the caller.
Letters: ... batch dimensions; C classes; D dimensions of a Gaussian; N samples. P, the distribution under which the
expectation is taken, comes first, as in `torch.distributions.kl_divergence(p, q)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..validation import check_number, check_temperature, check_tensor, fail
from .checks import check_logits
from .formulas import kl_terms, log_probs, overlap_terms, per_position, weigh, wide
from .reductions import divide

OVERLAP_IDS = 20  # of the student, in logs and reports


def _log(probs: Tensor) -> Tensor:
    """log with log 0 = -inf whose gradient at 0 is 0 rather than the NaN that 0 * inf would give."""
    positive = probs > 0
    return torch.where(positive, torch.where(positive, probs, 1.0).log(), -torch.inf)


def _check_same_shape(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    (first, a), *others = tensors.items()
    for name, b in others:
        if a.shape != b.shape:
            fail(
                first,
                f"of shape {list(a.shape)} and `{name}` of shape {list(b.shape)}",
                "equal shapes",
                "Expand one of them yourself if it is to be repeated.",
            )


def _check(argument: str, valid: Tensor, value: Tensor, expected: str, fix: str) -> None:
    """Raises ValueError with the first offending value unless all of `valid` holds (NaN never does)."""
    if not bool(valid.all()):
        index = tuple(int(i) for i in (~valid).nonzero()[0])
        shown = f"{value[index].item():g} at index {list(index)}"
        fail(argument, shown, expected, fix)


def kl_bernoulli(p_probs: Tensor, q_probs: Tensor) -> Tensor:
    """KL = p log(p/q) + (1 - p) log((1 - p)/(1 - q)), elementwise.

    When to use: independent yes/no outcomes, such as multi-label classifiers. From logits z, where rounding 1 - p would
    lose small probabilities, `forward_kl(stack([z_q, 0]), stack([z_p, 0]))` over the stacked dimension is the same.

    Args:
        p_probs: P(x = 1) under P, in [0, 1], any shape.
        q_probs: P(x = 1) under Q, the same shape.

    Returns:
        Nats, the shape of the arguments; +inf where Q excludes an outcome that P allows.

    Raises:
        ValueError: shapes that differ, probabilities outside [0, 1] or NaN.

    Example:
        >>> round(kl_bernoulli(torch.tensor(0.5), torch.tensor(0.25)).item(), 4)
        0.1438

    Source: Kullback and Leibler 1951.
    """
    _check_same_shape(p_probs=p_probs, q_probs=q_probs)
    for name, probs in (("p_probs", p_probs), ("q_probs", q_probs)):
        _check(name, (probs >= 0) & (probs <= 1), probs, "probabilities in [0, 1]", "Apply a sigmoid to logits first.")
    return kl_terms(_log(p_probs), _log(q_probs)) + kl_terms(_log(1 - p_probs), _log(1 - q_probs))


def kl_categorical(p_probs: Tensor, q_probs: Tensor) -> Tensor:
    """KL = sum over C of p log(p/q), from probabilities.

    When to use: distributions that come as probabilities. From logits take `divergences.forward_kl`, which is exact
    where a softmax has already rounded to 0. Rows are not checked to sum to 1; `modules.KLDivergenceLoss` does.

    Args:
        p_probs: [..., C], non-negative.
        q_probs: [..., C], the same shape.

    Returns:
        Nats [...]; 0 log 0 = 0; +inf where p > 0 = q (such an entry gives no gradient to q, which would be infinite).

    Raises:
        ValueError: shapes that differ, negative or NaN probabilities.

    Example:
        >>> round(kl_categorical(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])).item(), 4)  # log 2
        0.6931

    Source: Kullback and Leibler 1951.
    """
    _check_same_shape(p_probs=p_probs, q_probs=q_probs)
    for name, probs in (("p_probs", p_probs), ("q_probs", q_probs)):
        _check(name, probs >= 0, probs, "probabilities >= 0", "Apply a softmax to logits first.")
    return kl_terms(_log(p_probs), _log(q_probs)).sum(-1)


def kl_gaussian(p_mean: Tensor, p_std: Tensor, q_mean: Tensor, q_std: Tensor) -> Tensor:
    """KL = log(s_q/s_p) + (s_p² + (m_p - m_q)²) / (2 s_q²) - 1/2, elementwise: one-dimensional Gaussians.

    When to use: a value per dimension; for Gaussians with diagonal covariance sum it over the dimensions
    (`kl_diagonal_gaussian`).

    Args:
        p_mean, q_mean: means m_p and m_q, any shape.
        p_std, q_std: standard deviations s_p and s_q > 0 (not variances), the same shape.

    Returns:
        Nats, the shape of the arguments.

    Raises:
        ValueError: shapes that differ, a standard deviation that is not > 0.

    Example:
        >>> p_mean, p_std = torch.tensor([0.0, 1.0, -0.5]), torch.tensor([1.0, 1.5, 0.8])
        >>> q_mean, q_std = torch.tensor([0.1, 1.2, -0.4]), torch.tensor([1.1, 1.4, 0.9])
        >>> round(kl_gaussian(p_mean, p_std, q_mean, q_std).mean().item(), 6)
        0.015625

    Source: Kullback 1959, Information Theory and Statistics, chapter 9.
    """
    _check_same_shape(p_mean=p_mean, p_std=p_std, q_mean=q_mean, q_std=q_std)
    for name, std in (("p_std", p_std), ("q_std", q_std)):
        _check(name, std > 0, std, "standard deviations > 0", "Take exp or softplus of a free parameter.")
    ratio = p_std / q_std
    return 0.5 * (ratio.square() - 1 + ((p_mean - q_mean) / q_std).square()) - ratio.log()


def kl_diagonal_gaussian(p_mean: Tensor, p_std: Tensor, q_mean: Tensor, q_std: Tensor) -> Tensor:
    """KL = sum over D of log(s_q/s_p) + (s_p² + (m_p - m_q)²) / (2 s_q²) - 1/2: Gaussians with independent dimensions.

    When to use: latent variables, Gaussian policies with a standard deviation per action.

    Args: as `kl_gaussian`, each [..., D].
    Returns: nats [...]. Raises: as `kl_gaussian`.

    Example:
        >>> zero, one = torch.zeros(3), torch.ones(3)
        >>> kl_diagonal_gaussian(one, one, zero, one).item()
        1.5

    Source: Kullback 1959, Information Theory and Statistics, chapter 9.
    """
    return kl_gaussian(p_mean, p_std, q_mean, q_std).sum(-1)


def _cholesky(covariance: Tensor, argument: str) -> Tensor:
    if not torch.allclose(covariance, covariance.mT):
        fail(
            argument,
            "not symmetric",
            "a symmetric matrix",
            f"Symmetrise it: 0.5 * ({argument} + its transpose).",
        )
    factor, info = torch.linalg.cholesky_ex(covariance)
    if bool((info != 0).any()):
        order = int(info.flatten()[info.flatten() != 0][0])
        shown = f"not positive definite (its leading minor of order {order} is not)"
        fail(argument, shown, "a positive definite covariance", "Add a small multiple of the identity to it.")
    return factor


def kl_full_gaussian(p_mean: Tensor, p_covariance: Tensor, q_mean: Tensor, q_covariance: Tensor) -> Tensor:
    """KL = 0.5 (tr(S_q^-1 S_p) + (m_q - m_p)' S_q^-1 (m_q - m_p) - D + log det S_q - log det S_p).

    When to use: Gaussians with correlated dimensions. Computed from the Cholesky factors S = L L': two triangular
    solves and the logarithms of the diagonals, no inverse and no determinant.

    Args:
        p_mean, q_mean: means [..., D].
        p_covariance, q_covariance: covariances S_p and S_q [..., D, D], symmetric and positive definite.

    Returns:
        Nats [...].

    Raises:
        ValueError: shapes that do not fit, covariances that are not symmetric or not positive definite.

    Example:
        >>> mean, covariance = torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> round(kl_full_gaussian(mean, covariance, mean, torch.eye(2)).item(), 4)  # 1 - 0.5 log 3
        0.4507

    Source: Kullback 1959, Information Theory and Statistics, chapter 9.
    """
    _check_same_shape(p_mean=p_mean, q_mean=q_mean)
    dimensions = p_mean.shape[-1]
    for name, covariance in (("p_covariance", p_covariance), ("q_covariance", q_covariance)):
        check_tensor(name, covariance)
        if covariance.shape != (*p_mean.shape, dimensions):
            shape = [*p_mean.shape, dimensions]
            fail(name, f"of shape {list(covariance.shape)}", f"shape {shape}", "Give one [D, D] matrix per mean.")
    p_factor, q_factor = _cholesky(p_covariance, "p_covariance"), _cholesky(q_covariance, "q_covariance")
    whitened = torch.linalg.solve_triangular(q_factor, p_factor, upper=False)  # its squared norm is the trace
    offset = torch.linalg.solve_triangular(q_factor, (q_mean - p_mean).unsqueeze(-1), upper=False)
    p_log_diagonal, q_log_diagonal = (f.diagonal(dim1=-2, dim2=-1).log() for f in (p_factor, q_factor))
    squares = whitened.square().sum((-2, -1)) + offset.square().sum((-2, -1))
    return 0.5 * (squares - dimensions) + (q_log_diagonal - p_log_diagonal).sum(-1)


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(m, s²) || N(0, 1)) = 0.5 sum over D of m² + s² - 1 - log s²: the KL term of a VAE.

    When to use: the encoder of a VAE gives m and log s² per latent dimension. The evidence lower bound (ELBO) is
    E[log p(x | z)] - KL, so its negative, the loss, is `reconstruction + kl_to_standard_normal(m, log_variance)`; a
    beta-VAE weighs the second term by beta > 1 for latents that are more independent.

    Args:
        mean: m [..., D].
        log_variance: log s² [..., D], the logarithm of the variance, any real number.

    Returns:
        Nats [...], >= 0, 0 at m = 0, log s² = 0.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> kl_to_standard_normal(torch.tensor([1.0, -1.0]), torch.zeros(2)).item()
        1.0

    Source: Kingma and Welling 2013, arXiv:1312.6114, appendix B; Higgins et al. 2017 (beta-VAE).
    """
    _check_same_shape(mean=mean, log_variance=log_variance)
    # expm1 keeps the digits near log s² = 0, where s² - 1 - log s² vanishes quadratically.
    return 0.5 * (mean.square() + log_variance.expm1() - log_variance).sum(-1)


class MonteCarloKL(NamedTuple):
    """A Monte Carlo estimate and its standard error, both in nats."""

    estimate: Tensor
    standard_error: Tensor


def monte_carlo_kl(p_log_probs: Tensor, q_log_probs: Tensor) -> MonteCarloKL:
    """KL(P || Q) ~ mean over x ~ P of log p(x) - log q(x), with its standard error (sample deviation / sqrt N).

    When to use: pairs without a closed form, such as mixtures or sequence models scored on P's own samples. Unbiased; a
    single estimate may be negative. If the standard error is not small beside the estimate, draw more samples.

    Args:
        p_log_probs: log p(x_i) [N, ...] of N samples drawn from P (not from Q), N >= 2.
        q_log_probs: log q(x_i) [N, ...] of the same samples.

    Returns:
        `MonteCarloKL(estimate, standard_error)`, each [...], in nats; +inf where Q excludes a sample (then the standard
        error is NaN: it does not exist).

    Raises:
        ValueError: shapes that differ, fewer than two samples.

    Example:
        >>> p, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(1.0, 1.0)
        >>> samples = p.sample((10_000,))
        >>> estimate, error = monte_carlo_kl(p.log_prob(samples), q.log_prob(samples))
        >>> bool((estimate - 0.5).abs() < 5 * error)
        True

    Source: Robert and Casella 2004, Monte Carlo Statistical Methods, chapter 3.
    """
    _check_same_shape(p_log_probs=p_log_probs, q_log_probs=q_log_probs)
    if p_log_probs.dim() == 0 or p_log_probs.shape[0] < 2:
        shown = f"of shape {list(p_log_probs.shape)}"
        fail("p_log_probs", shown, "at least two samples in the first dimension", "Draw more samples from P.")
    log_ratio = p_log_probs - q_log_probs
    return MonteCarloKL(log_ratio.mean(0), log_ratio.std(0) / log_ratio.shape[0] ** 0.5)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """H(P) = -sum p log p: the uncertainty of a distribution, in nats.

    When to use: to see how soft the teacher's targets are at a temperature.

    Args:
        logits: [..., V], any floating dtype; p = softmax(logits/T).
        temperature: T > 0.

    Returns:
        Nats [...] between 0 and log V, float32 or wider.

    Raises:
        ValueError, TypeError: as `forward_kl`.

    Example:
        >>> round(entropy(torch.zeros(8)).item(), 4)  # log 8
        2.0794

    Source: Shannon 1948.
    """
    return soft_cross_entropy(logits, logits, temperature=temperature)


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """H(P, Q) = -sum p log q = H(P) + KL(P || Q): cross-entropy with the teacher's probabilities as targets.

    When to use: as a loss with the student's gradient of `forward_kl`, whose floor is H(P) instead of 0.

    Args:
        student_logits: z_s [..., V], any floating dtype.
        teacher_logits: z_t [..., V], the same shape.
        temperature: T > 0, divides both logits.

    Returns:
        Nats [...], float32 or wider; +inf where q = 0 at a class with p > 0.

    Raises:
        ValueError, TypeError: as `forward_kl`.

    Example:
        >>> from kd_trainer import forward_kl
        >>> student, teacher = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0])
        >>> sum_of_both = entropy(teacher) + forward_kl(student, teacher)
        >>> bool(torch.isclose(soft_cross_entropy(student, teacher), sum_of_both))
        True

    Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
    """
    check_temperature("temperature", temperature)
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    dtype = wide(student_logits, teacher_logits)
    log_q = log_probs(student_logits, temperature, dtype)
    return -weigh(log_probs(teacher_logits, temperature, dtype).exp(), log_q).sum(-1)


@torch.no_grad()
def overlap(
    student_logits: Tensor, teacher_logits: Tensor, *, ids: int = OVERLAP_IDS, temperature: float = 1.0
) -> Tensor:
    """sum of p over the ids of the `ids` largest z_s: the share of the teacher's probability mass on the student's top.

    When to use: to see whether the student ranks what the teacher would choose among its own first choices. Unlike the
    share of equal top classes it says something where the teacher is undecided. No gradient.

    Args:
        student_logits: z_s [..., V], any floating dtype. Of equal logits at the edge of the top each counts with the
            same share, so that the order of the classes does not matter.
        teacher_logits: z_t [..., V], the same shape; p = softmax(z_t/T).
        ids: of the student's top, at least 1. With V or more the result is 1.
        temperature: T > 0 of the teacher.

    Returns:
        [...], between 0 and 1, float32 or wider.

    Raises:
        ValueError, TypeError: as `forward_kl`.

    Example:
        >>> teacher = torch.tensor([0.6, 0.3, 0.1]).log()
        >>> round(overlap(torch.tensor([1.0, 3.0, 2.0]), teacher, ids=2).item(), 4)
        0.4

    Source: the mass on the ids that the tops of both models share: Li et al. 2026, arXiv:2604.13016; here on all of
    the student's.
    """
    check_temperature("temperature", temperature)
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    if not isinstance(ids, int) or isinstance(ids, bool) or ids < 1:
        fail("ids", repr(ids), "a whole number of ids, at least 1", f"Take {OVERLAP_IDS}.")
    terms = lambda z_s, z_t, _: overlap_terms(z_s, z_t, ids, temperature)  # noqa: E731
    return per_position(terms, student_logits, teacher_logits, None)


class KLDivergenceLoss(nn.Module):
    """mean over rows of KL(P || Q) = sum p log(p/q), from probabilities.

    When to use: targets that are probabilities already (soft labels in a file, votes of annotators). From logits take
    `SoftTargetLoss`.

    Smoothing: with epsilon > 0 both sides become (p + epsilon) / (1 + C epsilon) over their C classes, which are again
    distributions, so that KL >= 0 and KL(P, P) = 0 stay true. (Adding epsilon to one side, or only inside the
    logarithm, breaks both.) With epsilon 0 nothing is changed: a class with p > 0 and q = 0 gives +inf, as the
    definition says, and no gradient.

    Args:
        epsilon: >= 0, default 1e-8.
        validate: check every row to be a distribution: finite, >= 0, sum 1 to within the rounding of its dtype. Costs a
            synchronisation on an accelerator. Default True.

    Returns:
        From `forward`: nats, a scalar in float32 or wider; 0 for no rows.

    Raises:
        ValueError: epsilon out of range; shapes that differ or are not [N, C]; a row that is no distribution, named.
        TypeError: probabilities that are not floating.

    Example:
        >>> loss = KLDivergenceLoss(epsilon=0.0)
        >>> round(loss(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])).item(), 4)
        0.6931
        >>> loss(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])).item()
        inf

    Source: Kullback and Leibler 1951; additive smoothing: Lidstone 1920.
    """

    def __init__(self, epsilon: float = 1e-8, validate: bool = True) -> None:
        super().__init__()
        check_number("epsilon", epsilon, low=0.0)
        self.epsilon, self.validate = epsilon, validate

    def forward(self, target_probs: Tensor, predicted_probs: Tensor) -> Tensor:
        """Mean KL of `target_probs` P [N, C] to `predicted_probs` Q [N, C]; the target comes first."""
        named = {"target_probs": target_probs, "predicted_probs": predicted_probs}
        for name, probs in named.items():
            check_tensor(name, probs, "a tensor of probabilities [N, C]")
            if not probs.is_floating_point():
                fail(name, f"of dtype {probs.dtype}", "floating", f"Call `{name}.float()`.", error=TypeError)
        if target_probs.shape != predicted_probs.shape or target_probs.dim() != 2:
            shapes = f"of shape {list(target_probs.shape)} and `predicted_probs` of shape {list(predicted_probs.shape)}"
            fail("target_probs", shapes, "both [N, C]", "Give one row of class probabilities per example.")
        if self.validate:
            for name, probs in named.items():
                _check_rows(name, probs.detach())
        values = kl_categorical(self._smooth(target_probs), self._smooth(predicted_probs))
        return divide(values.sum(), values.shape[0])

    def _smooth(self, probs: Tensor) -> Tensor:
        probs = probs.to(wide(probs))
        return (probs + self.epsilon) / (1 + probs.shape[-1] * self.epsilon) if self.epsilon else probs

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, validate={self.validate}"


def _check_rows(argument: str, probs: Tensor) -> None:
    """Raises ValueError naming the first row of `probs` [N, C] that is no distribution."""
    # Rounding C entries is off by an eps or so, the sum inside the softmax that made them by about sqrt(C) of them.
    # What comes as float64 was often made in float32.
    eps = max(torch.finfo(probs.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = eps * (8 + probs.shape[-1] ** 0.5)
    totals = probs.double().sum(-1)
    troubles = {
        "holds NaN or inf": ~probs.isfinite().all(-1),
        "has a negative entry": (probs < 0).any(-1),
        "sums to {total:.6g}": (totals - 1).abs() > tolerance,
    }
    if not bool(torch.stack(list(troubles.values())).any()):
        return
    for trouble, rows in troubles.items():
        if bool(rows.any()):
            row = int(rows.nonzero()[0])
            shown = f"no distribution: row {row} {trouble.format(total=totals[row].item())}"
            fix = "Apply a softmax to logits, or divide each row by its sum; `validate=False` skips the check."
            fail(argument, shown, "rows that are finite, non-negative and sum to 1", fix)
