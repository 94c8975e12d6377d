"""The formulas of the divergences, from log-probabilities or logits to nats, and their evaluation in blocks of rows.

For: `divergences.py`, whose entries name them. Letters: V classes or vocabulary; log_p, log_q log-probabilities
[..., V] of teacher and student, z_t, z_s their logits, all in float32 or wider; T temperature.

Decided on purpose: 0 log 0 = 0; p > 0 where q = 0 gives +inf and never NaN; logits of -inf (excluded classes) are
allowed on both sides as long as one class of the row is left. Where a value is +inf its gradient is finite: what would
be infinite in it counts as constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..validation import fail


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


def standardize(logits: Tensor) -> Tensor:
    """(z - mean) / std over the classes, in float32 or wider: only shape and order of the logits are left.

    When to use: before T, on both sides, where student and teacher have logits of different spread. The deviation is
    that of the population. Constant logits give zeros. Excluded classes (-inf) stay so and count in neither number.

    Args:
        logits: z [..., V], any floating dtype.

    Returns:
        [..., V] of mean 0 and deviation 1 over the classes, float32 or wider.

    Example:
        >>> standardize(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).tolist()
        [[-1.0, 1.0], [0.0, 0.0]]

    Source: Sun et al. 2024, arXiv:2403.01427.
    """
    z = logits.to(wide(logits))
    excluded = z.isneginf()
    count = (~excluded).sum(-1, keepdim=True).clamp(min=1)
    # Relative to the largest logit, so that rounding leaves nothing of constant ones.
    x = (z - z.detach().amax(-1, keepdim=True)).masked_fill(excluded, 0.0)
    x = (x - x.sum(-1, keepdim=True) / count).masked_fill(excluded, 0.0)
    variance = x.square().sum(-1, keepdim=True) / count
    # Below the floor the deviation counts as constant, and the gradient stays finite.
    return (x * variance.clamp(min=_LEAST_DEVIATION**2).rsqrt()).masked_fill(excluded, -torch.inf)


_LEAST_DEVIATION = 1e-6


# ---- of log-probabilities -------------------------------------------------------------------------------------------


def weigh(probs: Tensor, values: Tensor) -> Tensor:
    """probs * values with 0 * anything = 0; an infinite value passes no gradient on to its weight."""
    if type(probs) is Tensor and probs.device.type == "cpu":  # with contents, and no device is waited for
        # One sum shows that no guard is needed, far cheaper than masks.
        terms = probs * values
        if math.isfinite(terms.detach().sum()):
            return terms
    values = values.masked_fill(probs == 0, 0.0)
    if probs.requires_grad:
        probs = torch.where(values.isinf(), probs.detach(), probs)
    return probs * values


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Elementwise p * (log p - log q) from log-probabilities [..., V]: 0 where p = 0, +inf where p > 0 = q."""
    return weigh(log_p.exp(), log_p - log_q)


def _log_mixture(a: Tensor, b: Tensor, beta: float) -> Tensor:
    # Below the smallest normal number 1/mixture overflows in the gradient; such a class contributes nothing anyway.
    return (beta * a + (1 - beta) * b).clamp(min=torch.finfo(a.dtype).tiny).log()


def kl_to_mixture_terms(log_a: Tensor, log_b: Tensor, beta: float) -> Tensor:
    """Elementwise KL(a || beta a + (1 - beta) b)."""
    a = log_a.exp()
    return weigh(a, log_a - _log_mixture(a, log_b.exp(), beta))


def jsd_terms(log_p: Tensor, log_q: Tensor, *, beta: float, once: bool = False) -> Tensor:
    """Elementwise beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    `once`: the sum is differentiated once, with respect to a q that adds up to 1. The derivatives of log q and log m
    then add up to 0, and are left out.
    """
    p, q = log_p.exp(), log_q.exp()
    log_q, fixed = (log_q.detach(), q.detach()) if once else (log_q, q)
    log_m = _log_mixture(p, fixed, beta)
    return beta * weigh(p, log_p - log_m) + (1 - beta) * weigh(q, log_q - log_m)


def skew_reverse_kl_terms(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """Elementwise KL(q || beta q + (1 - beta) p)."""
    return kl_to_mixture_terms(log_q, log_p, beta)


def total_variation_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Elementwise |p - q| / 2."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs()


def entropy_switch_terms(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """KL(p || q) in rows where the entropy of p is above beta nats, KL(q || p) in the others."""
    with torch.no_grad():
        uncertain = -weigh(log_p.exp(), log_p).sum(-1, keepdim=True) > beta
    if uncertain.device.type == "cpu":  # the rows of a block are often all of one kind
        if bool(uncertain.all()):
            return kl_terms(log_p, log_q)
        if not bool(uncertain.any()):
            return kl_terms(log_q, log_p)
    return torch.where(uncertain, kl_terms(log_p, log_q), kl_terms(log_q, log_p))


def _lowest(dtype: torch.dtype) -> float:
    """A log-probability whose exponential is 0, finite so that differences of two are no NaN."""
    return -torch.finfo(dtype).max / 4


def _with_complement(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """(log a, log b) where a + b = 1: the larger one is taken from the smaller, near 1 the one exact way."""
    half = -math.log(2)
    log_not_a, log_not_b = (torch.log1p(-x.clamp(max=half).exp()) for x in (log_a, log_b))
    return torch.where(log_b < log_a, log_not_b, log_a), torch.where(log_a < log_b, log_not_a, log_b)


def dkd_terms(log_p: Tensor, log_q: Tensor, *, labels: Tensor, beta: float) -> Tensor:
    """TCKD + beta * NCKD: the binary KL of the label's class, at its place, and the KL among the other classes.

    Nothing is taken from 1: the mass of the others is summed from its members.
    """
    at, lowest = labels.unsqueeze(-1), _lowest(log_p.dtype)
    pairs, others = [], []
    for log in (log_p, log_q):
        rest = log.scatter(-1, at, lowest)
        log_rest = rest.logsumexp(-1, keepdim=True)
        pairs.append(torch.cat(_with_complement(log.gather(-1, at), log_rest), -1))
        others.append(rest - log_rest)
    tckd = kl_terms(*pairs).sum(-1, keepdim=True)
    # A teacher that excludes all other classes has no distribution among them.
    others[0] = torch.where(pairs[0][..., 1:] > lowest / 2, others[0], lowest)
    return (beta * kl_terms(*others)).scatter(-1, at, tckd)


# ---- of logits ------------------------------------------------------------------------------------------------------


def squared_error_terms(z_t: Tensor, z_s: Tensor) -> Tensor:
    """(z_s - z_t)² / V, V less the classes that both exclude; +inf at a class that one of them excludes."""
    difference = z_s - z_t
    if difference.device.type == "cpu" and math.isfinite(difference.detach().sum()):
        return difference.square() / z_s.shape[-1]
    excluded = z_s.isneginf() & z_t.isneginf()
    count = (~excluded).sum(-1, keepdim=True).clamp(min=1)
    difference = difference.masked_fill(excluded, 0.0)
    infinite = difference.isinf()
    return (difference.masked_fill(infinite, 0.0).square() / count).masked_fill(infinite, torch.inf)


# ---- of the student's largest logits ---------------------------------------------------------------------------------

_BLOCKS = 64  # classes of a block


def overlap_terms(z_s: Tensor, z_t: Tensor, ids: int, temperature: float) -> Tensor:
    """Contributions [..., some classes] to the mass of softmax(z_t/T) on the classes of the `ids` largest z_s.

    Classes that are equal at the edge share its places. Read first are the blocks with the largest maxima: strided
    maxima take half the time of `topk` of a row.
    """
    p = z_t.to(wide(z_t))
    p = torch.softmax(p if temperature == 1 else p / temperature, -1)
    s, others = z_s, None
    blocks, chosen = z_s.shape[-1] // _BLOCKS, 2 * ids
    if blocks > 2 * chosen:
        whole = blocks * _BLOCKS
        maxima, index = z_s[..., :whole].unflatten(-1, (_BLOCKS, blocks)).amax(-2).topk(chosen + 1)
        index = index[..., None, :chosen].expand(*index.shape[:-1], _BLOCKS, chosen)

        def of_blocks(z: Tensor) -> Tensor:
            few = z[..., :whole].unflatten(-1, (_BLOCKS, blocks)).gather(-1, index)
            return torch.cat((few.flatten(-2), z[..., whole:]), -1)

        s, others = of_blocks(z_s), maxima[..., chosen:]
    top = s.topk(min(ids, s.shape[-1])).values
    edge = top[..., -1:]
    if others is not None:
        if bool((others < edge).all()):
            p = of_blocks(p)
        else:  # other blocks hold classes at the edge too
            s = z_s
    at_edge = s == edge
    places, classes = (x.sum(-1, keepdim=True, dtype=p.dtype) for x in (top == edge, at_edge))
    return (at_edge * (places / classes) + (s > edge)) * p


# ---- of large logits ------------------------------------------------------------------------------------------------
# In blocks of rows that stay in the processor's cache, with the student's gradient computed beside the value: the plain
# formula serves all that needs a gradient of the teacher or a second derivative.

Terms = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (z_s, z_t, labels [...]) -> contributions [..., V]

# Elements in one block of rows. One thread wants its buffers in the nearest cache; several threads wait for each other
# at the end of every operation (for long, where other processes use the cores), so they get fewer and larger blocks;
# an accelerator wants few launches.
_BLOCK_ONE_THREAD, _BLOCK_THREADS, BLOCK_ACCELERATOR = 2**17, 2**22, 2**25
_SMALL = 2**18  # elements below which the plain formula has less overhead than the blocks have gain


def per_position(terms: Terms, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
    """The sum of the terms over V, nats [...], by the faster of the two ways."""
    differentiable = torch.is_grad_enabled()
    if student_logits.numel() < _SMALL or (differentiable and teacher_logits.requires_grad):
        return terms(student_logits, teacher_logits, labels).sum(-1)
    if differentiable and student_logits.requires_grad:
        return _InBlocks.apply(student_logits, teacher_logits, labels, terms)
    return _in_blocks(terms, student_logits, teacher_logits, labels, gradient=None)


class _InBlocks(torch.autograd.Function):
    """A divergence whose gradient with respect to z_s is computed beside the value, into the one buffer it saves."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, terms: Terms
    ) -> Tensor:
        gradient = torch.empty(
            student_logits.shape, dtype=wide(student_logits, teacher_logits), device=student_logits.device
        )
        values = _in_blocks(terms, student_logits, teacher_logits, labels, gradient=gradient)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # requires_grad, so that a second derivative meets the error instead of being left out in silence.
            return _FirstDerivativeOnly.apply(gradient.detach().requires_grad_(), grad_values), None, None, None
        return gradient * grad_values.unsqueeze(-1), None, None, None


class _FirstDerivativeOnly(torch.autograd.Function):
    """The gradient of `_InBlocks` under create_graph=True: a second derivative raises, with what to call instead."""

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
    terms: Terms,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    *,
    gradient: Tensor | None,
) -> Tensor:
    """Nats [...], block of rows by block of rows; fills `gradient` [..., V] with dD/dz_s where it is given."""
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
            values[rows] = terms(z_s, z_t, of_rows).sum(-1)
        else:
            with torch.enable_grad():
                z_s = z_s.to(dtype).requires_grad_()
                block_values = terms(z_s, z_t, of_rows).sum(-1)
                gradient_rows[rows] = torch.autograd.grad(block_values.sum(), z_s)[0]
            values[rows] = block_values.detach()
    return values.view(student_logits.shape[:-1])


def _block_elements(device: torch.device) -> int:
    if device.type != "cpu":
        return BLOCK_ACCELERATOR
    return _BLOCK_ONE_THREAD if torch.get_num_threads() == 1 else _BLOCK_THREADS
