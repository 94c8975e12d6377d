"""Divergences between two categorical distributions given as logits: nats per position.

For: every loss that compares a student with a teacher, by name through the dict `DIVERGENCES`. Leaves the temperature
squared, masks, means (`reductions.py`) and settings (`modules.py`) to others.
Letters: V classes or vocabulary; z_s, z_t student and teacher logits [..., V]; T temperature;
p = softmax(z_t/T) the teacher's, q = softmax(z_s/T) the student's probabilities.

Decided on purpose: sums are float32 or wider whatever the logits' dtype; 0 log 0 = 0; p > 0 where q = 0 gives +inf and
never NaN; logits of -inf (excluded classes) are allowed on both sides as long as one class of the row is left. Where a
value is +inf its gradient is finite: what would be infinite in it counts as constant.

Two ways to the same numbers: the plain formulas (`divergence_terms`, differentiable any number of times) and, for large
logits of which only the student's need a gradient, blocks of rows that stay in the processor's cache. A new divergence
is one function, its formula, and one entry of `DIVERGENCES`: all others read the entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..validation import check_choice, check_number, check_temperature, fail
from .checks import check_class_ids, check_logits

# Elements in one block of rows. One thread wants its buffers in the nearest cache; several threads wait for each other
# at the end of every operation (for long, where other processes use the cores), so they get fewer and larger blocks;
# an accelerator wants few launches.
_BLOCK_ONE_THREAD, _BLOCK_THREADS, BLOCK_ACCELERATOR = 2**17, 2**22, 2**25
_SMALL = 2**18  # elements below which the plain formula has less overhead than the blocks have gain


# ---- the formulas: from log-probabilities to elementwise contributions [..., V] -------------------------------------


def _weigh(probs: Tensor, values: Tensor) -> Tensor:
    """probs * values with 0 * anything = 0; an infinite value passes no gradient on to its weight."""
    if type(probs) is Tensor and probs.device.type == "cpu":  # with contents, and no device is waited for
        # One cheap sum tells that nothing needs a guard: masks cost far more.
        terms = probs * values
        if math.isfinite(terms.detach().sum()):
            return terms
    values = values.masked_fill(probs == 0, 0.0)
    if probs.requires_grad:
        probs = torch.where(values.isinf(), probs.detach(), probs)
    return probs * values


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Elementwise p * (log p - log q) from log-probabilities [..., V]: 0 where p = 0, +inf where p > 0 = q."""
    return _weigh(log_p.exp(), log_p - log_q)


def _log_mixture(a: Tensor, b: Tensor, beta: float) -> Tensor:
    # Below the smallest normal number 1/mixture overflows in the gradient; such a class contributes nothing anyway.
    return (beta * a + (1 - beta) * b).clamp(min=torch.finfo(a.dtype).tiny).log()


def _kl_to_mixture_terms(log_a: Tensor, log_b: Tensor, beta: float) -> Tensor:
    """Elementwise KL(a || beta a + (1 - beta) b)."""
    a = log_a.exp()
    return _weigh(a, log_a - _log_mixture(a, log_b.exp(), beta))


def _jsd(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    log_m = _log_mixture(p, q, beta)
    return beta * _weigh(p, log_p - log_m) + (1 - beta) * _weigh(q, log_q - log_m)


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    return _kl_to_mixture_terms(log_q, log_p, beta)


def _total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs()


@dataclass(frozen=True)
class Divergence:
    """A divergence: its formula and what has to be known of it. An entry of `DIVERGENCES`, called as `forward_kl` is.

    Args:
        terms: the formula, (log_p, log_q) -> contributions [..., V] whose sum over V is D(p, q) in nats; log_p and
            log_q are log-probabilities [..., V] of teacher and student, in float32 or wider. It is differentiated with
            respect to log_q. Given `beta=` where there is a default, and with `needs_labels` `labels=` [...] int64
            class ids in range.
        parameter: what `beta` is in the formula, in words; None: it has no parameter.
        default: of the parameter.
        range: the parameter lies strictly between these; an end that is None is open.
        needs_labels: whether the formula reads the label of a position. A position without one has the forward KL.

    Example:
        >>> half_squared = Divergence(lambda log_p, log_q: (log_p.exp() - log_q.exp()).square() / 2)
        >>> half_squared(torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])).item()
        1.0
    """

    terms: Callable[..., Tensor]
    parameter: str | None = None
    default: float | None = None
    range: tuple[float | None, float | None] = (None, None)
    needs_labels: bool = False

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        temperature: float = 1.0,
        beta: float | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """D(p, q) of logits [..., V]: nats [...]. `labels` [...]: class ids, for a divergence that needs them."""
        beta = self.check(beta)
        _check_inputs(self, student_logits, teacher_logits, temperature, labels)
        return _per_position(self, student_logits, teacher_logits, temperature, beta, labels)

    def of_log_probs(self, log_p: Tensor, log_q: Tensor, beta: float, labels: Tensor | None = None) -> Tensor:
        """The formula alone: contributions [..., V] from log-probabilities, in their dtype.

        `beta` as `check` returns it; `labels` [...]: what is no class in range counts as no label, None as none at all.
        """
        given = {} if self.parameter is None else {"beta": beta}
        if not self.needs_labels:
            return self.terms(log_p, log_q, **given)
        if labels is None:
            return kl_terms(log_p, log_q)
        labels = labels.long()
        labelled = (labels >= 0) & (labels < log_q.shape[-1])
        terms = self.terms(log_p, log_q, labels=torch.where(labelled, labels, 0), **given)
        return torch.where(labelled.unsqueeze(-1), terms, kl_terms(log_p, log_q))

    def check(self, beta: float | None, argument: str = "beta") -> float:
        """Returns the beta to use (0 where there is none); raises unless it lies in the range."""
        if self.parameter is None:
            if beta is not None:
                having = ", ".join(f"'{name}'" for name, entry in DIVERGENCES.items() if entry.parameter is not None)
                own = next((f" '{name}'" for name, entry in DIVERGENCES.items() if entry is self), "")
                fix = f"Leave `{argument}` out, or choose one of {having}."
                fail(argument, repr(beta), f"None with divergence{own}", fix, because="this divergence has no beta")
            return 0.0
        if beta is None:
            assert self.default is not None
            return self.default
        low, high = self.range
        check_number(argument, beta, low=low, high=high, open_low=low is not None, open_high=high is not None)
        return beta


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(kl_terms),
    "reverse_kl": Divergence(lambda log_p, log_q: kl_terms(log_q, log_p)),
    "symmetric_kl": Divergence(lambda log_p, log_q: kl_terms(log_p, log_q) + kl_terms(log_q, log_p)),
    "jsd": Divergence(_jsd, "weight of the teacher in the mixture", default=0.5, range=(0, 1)),
    "skew_forward_kl": Divergence(
        _kl_to_mixture_terms, "share of the teacher in the mixture", default=0.1, range=(0, 1)
    ),
    "skew_reverse_kl": Divergence(_skew_reverse_kl, "share of the student in the mixture", default=0.1, range=(0, 1)),
    "total_variation": Divergence(_total_variation),
}


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_divergence(divergence: str, beta: float | None) -> float:
    """Returns the beta to use (0 where there is none); raises ValueError for an unknown name or a bad beta."""
    check_choice("divergence", divergence, DIVERGENCES)
    return DIVERGENCES[divergence].check(beta)


def _check_inputs(
    entry: Divergence, student_logits: Tensor, teacher_logits: Tensor, temperature: float, labels: Tensor | None
) -> None:
    check_temperature("temperature", temperature)
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    if entry.needs_labels:
        check_class_ids(labels, student_logits.shape[:-1])


# ---- from logits to nats --------------------------------------------------------------------------------------------


def log_probs(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """log softmax(z/T), in the dtype."""
    logits = logits.to(dtype)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def wide(*logits: Tensor) -> torch.dtype:
    """float32, or the widest of the tensors' dtypes."""
    dtype = torch.float32
    for one in logits:
        dtype = torch.promote_types(dtype, one.dtype)
    return dtype


def divergence_terms(
    divergence: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    beta: float | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Elementwise contributions of a divergence: D(p, q) = sum over V of the result.

    When to use: where torch's reduction 'none' is wanted, or second derivatives (the plain formula, which
    `DIVERGENCES[divergence]` uses for small inputs and for gradients of the teacher).

    Args:
        divergence: a key of `DIVERGENCES`.
        student_logits: z_s [..., V], any floating dtype.
        teacher_logits: z_t [..., V], the same shape.
        temperature: T > 0, divides both logits.
        beta: the weight of `jsd` and of the skew divergences, strictly between 0 and 1; None is their default.
        labels: [...] class ids, for a divergence that needs them; -100: none.

    Returns:
        Nats [..., V] in float32 or wider. Single contributions of a KL may be negative; their sum is not.

    Raises:
        ValueError: unknown divergence, beta or temperature out of range, shapes that differ.
        TypeError: logits that are no floating tensors.

    Example:
        >>> terms = divergence_terms("total_variation", torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf]))
        >>> terms.tolist()
        [0.25, 0.25]
    """
    beta, entry = check_divergence(divergence, beta), DIVERGENCES[divergence]
    _check_inputs(entry, student_logits, teacher_logits, temperature, labels)
    return _terms(entry, student_logits, teacher_logits, temperature, beta, labels)


def _terms(
    entry: Divergence,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    beta: float,
    labels: Tensor | None,
) -> Tensor:
    dtype = wide(student_logits, teacher_logits)
    log_p = log_probs(teacher_logits, temperature, dtype)
    log_q = log_probs(student_logits, temperature, dtype)
    return entry.of_log_probs(log_p, log_q, beta, labels)


_Settings = tuple[Divergence, float, float, Tensor | None]  # entry, temperature, beta, labels


def _per_position(
    entry: Divergence,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    beta: float,
    labels: Tensor | None,
) -> Tensor:
    """The faster of the two ways: nats [...]."""
    differentiable = torch.is_grad_enabled()
    if student_logits.numel() < _SMALL or (differentiable and teacher_logits.requires_grad):
        return _terms(entry, student_logits, teacher_logits, temperature, beta, labels).sum(-1)
    settings = (entry, temperature, beta, labels)
    if differentiable and student_logits.requires_grad:
        return _InBlocks.apply(student_logits, teacher_logits, settings)
    return _in_blocks(student_logits, teacher_logits, settings, gradient=None)


class _InBlocks(torch.autograd.Function):
    """A divergence whose gradient with respect to z_s is computed beside the value, into the one buffer it saves."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor, settings: _Settings) -> Tensor:
        gradient = torch.empty(
            student_logits.shape, dtype=wide(student_logits, teacher_logits), device=student_logits.device
        )
        values = _in_blocks(student_logits, teacher_logits, settings, gradient=gradient)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # requires_grad, so that a second derivative meets the error instead of being left out in silence.
            return _FirstDerivativeOnly.apply(gradient.detach().requires_grad_(), grad_values), None, None
        return gradient * grad_values.unsqueeze(-1), None, None


class _FirstDerivativeOnly(torch.autograd.Function):
    """The gradient of `_InBlocks` under create_graph=True: usable; a second derivative says what to call instead."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grad_values: Tensor) -> Tensor:
        return gradient * grad_values.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        fail(
            "student_logits",
            "differentiated twice",
            "at most a first derivative of a divergence of large logits",
            "Use `divergence_terms(divergence, ...).sum(-1)`, the plain formula, for second derivatives.",
            because="only the gradient is kept",
            error=RuntimeError,
        )


def _in_blocks(
    student_logits: Tensor, teacher_logits: Tensor, settings: _Settings, *, gradient: Tensor | None
) -> Tensor:
    """Nats [...], block of rows by block of rows; fills `gradient` [..., V] with dD/dz_s where it is given."""
    entry, temperature, beta, labels = settings
    labels = None if labels is None else labels.reshape(-1)
    dtype, device = wide(student_logits, teacher_logits), student_logits.device
    classes = student_logits.shape[-1]
    student_rows, teacher_rows = (z.detach().reshape(-1, classes) for z in (student_logits, teacher_logits))
    positions = student_rows.shape[0]
    block = max(1, _block_elements(device) // classes)
    values = torch.empty(positions, dtype=dtype, device=device)
    gradient_rows = None if gradient is None else gradient.view(-1, classes)
    for start in range(0, positions, block):
        rows = slice(start, min(start + block, positions))
        z_s, z_t = student_rows[rows], teacher_rows[rows]
        of_rows = None if labels is None else labels[rows]
        if gradient_rows is None:
            values[rows] = _terms(entry, z_s, z_t, temperature, beta, of_rows).sum(-1)
        else:
            with torch.enable_grad():
                z_s = z_s.to(dtype).requires_grad_()
                block_values = _terms(entry, z_s, z_t, temperature, beta, of_rows).sum(-1)
                gradient_rows[rows] = torch.autograd.grad(block_values.sum(), z_s)[0]
            values[rows] = block_values.detach()
    return values.view(student_logits.shape[:-1])


def _block_elements(device: torch.device) -> int:
    if device.type != "cpu":
        return BLOCK_ACCELERATOR
    return _BLOCK_ONE_THREAD if torch.get_num_threads() == 1 else _BLOCK_THREADS


# ---- the public functions -------------------------------------------------------------------------------------------


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """KL(p || q) = sum p (log p - log q): the teacher's distribution p is matched everywhere it has mass.

    When to use: the default for distillation (Hinton et al.); the student covers all the teacher's modes. With action
    logits of an old policy as the teacher it is the policy KL of a trust region (TRPO), see the second example.

    Args:
        student_logits: z_s [..., V], any leading dimensions, any floating dtype.
        teacher_logits: z_t [..., V], the same shape (never broadcast). Gradients flow to it when it requires them.
        temperature: T > 0, divides both logits; the result is not multiplied by T².
        beta: must be None: this divergence has none.

    Returns:
        Nats [...], float32 or wider. 0 where the distributions are equal, +inf where q = 0 at a class with p > 0.

    Raises:
        ValueError: a beta, a temperature <= 0 or not finite, shapes that differ, V = 0.
        TypeError: logits that are no floating tensors.

    Example:
        >>> teacher = torch.tensor([[2.0, 1.0, 0.1], [1.0, 2.0, 0.5]])
        >>> student = torch.tensor([[1.8, 1.1, 0.2], [0.9, 2.1, 0.6]])
        >>> round(forward_kl(student, teacher).mean().item(), 6)
        0.006916
        >>> old_policy, policy = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.2]])  # action logits
        >>> bool(forward_kl(policy, old_policy).mean() < 0.01)  # inside a trust region of 0.01 nats
        True

    Source: Kullback and Leibler 1951; Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
    """
    return DIVERGENCES["forward_kl"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """KL(q || p) = sum q (log q - log p): the student puts no mass where the teacher has none.

    When to use: a student too small for all the teacher's modes that shall keep to the likely ones; sequence models
    trained on their own samples (MiniLLM); the KL penalty of a policy q towards a reference policy p.

    Args, Returns, Raises: as `forward_kl`; +inf where p = 0 at a class with q > 0.

    Example:
        >>> policy, reference = torch.tensor([[0.0, 1.2]]), torch.tensor([[0.0, 1.0]])  # action logits
        >>> round(reverse_kl(policy, reference).item(), 4)
        0.0037

    Source: Gu et al. 2023 (MiniLLM), arXiv:2306.08543.
    """
    return DIVERGENCES["reverse_kl"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def symmetric_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """KL(p || q) + KL(q || p), the sum (not the mean) of both directions: Jeffreys' divergence.

    When to use: two models that learn from each other, where neither is the reference.

    Args, Returns, Raises: as `forward_kl`; +inf where either direction is.

    Example:
        >>> a, b = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0])
        >>> bool(torch.isclose(symmetric_kl(a, b), forward_kl(a, b) + reverse_kl(a, b)))
        True

    Source: Jeffreys 1946; Zhang et al. 2018 (deep mutual learning), arXiv:1706.00384.
    """
    return DIVERGENCES["symmetric_kl"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q: the Jensen-Shannon divergence.

    When to use: a bounded loss, finite also where the supports differ; beta moves it between the two KLs' behaviour.
    It vanishes as beta goes to 0 or 1: for a KL take `forward_kl` or `reverse_kl` by name.

    Args: as `forward_kl`; beta: strictly between 0 and 1, default 0.5.
    Returns: nats [...], at most log 2 (at beta 0.5). Raises: as `forward_kl`.

    Example:
        >>> apart = jsd(torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0]))
        >>> round(apart.item(), 4)  # log 2
        0.6931

    Source: Lin 1991; Agarwal et al. 2023 (GKD), arXiv:2306.13649.
    """
    return DIVERGENCES["jsd"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """KL(p || beta p + (1 - beta) q): the forward KL to a mixture that holds a little of the teacher.

    When to use: in place of `forward_kl` where students far from the teacher give large, noisy gradients.

    Args: as `forward_kl`; beta: the lambda of the paper, strictly between 0 and 1, default 0.1.
    Returns: nats [...], at most -log(beta), so never inf. Raises: as `forward_kl`.

    Example:
        >>> apart = skew_forward_kl(torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0]), beta=0.1)
        >>> round(apart.item(), 4)  # -log 0.1
        2.3026

    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """
    return DIVERGENCES["skew_forward_kl"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """KL(q || beta q + (1 - beta) p): the mirror of `skew_forward_kl`.

    When to use: in place of `reverse_kl`; DistiLLM's choice for sequences sampled from the student.

    Args: as `forward_kl`; beta: the lambda of the paper, strictly between 0 and 1, default 0.1.
    Returns: nats [...], at most -log(beta), so never inf. Raises: as `forward_kl`.

    Example:
        >>> a, b = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0])
        >>> bool(skew_reverse_kl(a, b) == skew_forward_kl(b, a))
        True

    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
    """
    return DIVERGENCES["skew_reverse_kl"](student_logits, teacher_logits, temperature=temperature, beta=beta)


def total_variation(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float | None = None
) -> Tensor:
    """0.5 sum |p - q|: the largest difference in probability that any set of classes can show.

    When to use: as a bounded, robust loss, and as a figure one can explain (1 - TV is the acceptance rate of
    speculative decoding with the student as the draft).

    Args, Raises: as `forward_kl`. Returns: [...] in [0, 1]. (No logarithm in it, so no nats.)

    Example:
        >>> total_variation(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])).item()
        0.5

    Source: Wen et al. 2023 (f-distill), arXiv:2307.15190.
    """
    return DIVERGENCES["total_variation"](student_logits, teacher_logits, temperature=temperature, beta=beta)


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
    return -_weigh(log_probs(teacher_logits, temperature, dtype).exp(), log_q).sum(-1)
