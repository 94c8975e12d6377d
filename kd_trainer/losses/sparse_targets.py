"""A teacher given sparsely: its top-k, or some draws of its distribution, and the losses against either.

For: a cache of teacher outputs, far smaller than logits. Leaves storing it to others, and the loss without
logits to `fused_linear.py`.
Letters: V vocabulary, k ids kept, n draws; z_s, z_t student and teacher logits [..., V]; T temperature;
p = softmax(z_t/T) the teacher's, q = softmax(z_s/T) the student's probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..validation import check_temperature, fail
from .checks import check_class_ids, check_logits
from .divergences import DIVERGENCES, check_divergence
from .formulas import BLOCK_ACCELERATOR, log_probs, wide

_BLOCK = 2**19  # logits that a processor reads at once: the buffers stay in its cache


class TopK(NamedTuple):
    """The k most probable ids of each position, and what is left."""

    ids: Tensor  # [..., k] integers, sorted by probability, largest first
    log_probs: Tensor  # [..., k] log-probabilities at temperature T
    log_tail: Tensor  # [...] log of the mass of all other ids at T; -inf where there is none


class Samples(NamedTuple):
    """Draws from each position's distribution, and two numbers that the draws do not hold."""

    ids: Tensor  # [..., n] draws from softmax(z_t / T), each of weight 1/n
    top: Tensor  # [...] the class on top
    entropy: Tensor  # [...] exact entropy of softmax(z_t / T), nats


# ---- from a teacher's logits ----------------------------------------------------------------------------------------


def top_k(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """The k largest log softmax(z_t/T) with their ids, and log(1 - sum of their probabilities).

    When to use: for any divergence. The loss is that of k + 1 buckets, so it is blind to how the teacher spreads the
    tail; `draw_samples` is not.

    Args:
        logits: z_t [..., V], any floating dtype; -inf excludes a class.
        k: ids to keep, 1 to V.
        temperature: T > 0.

    Returns:
        `TopK`, ids int64, the rest float32 or wider. Among equal logits any choice may come out. The tail is summed
        from its own members, not taken from 1: however small it is, its logarithm has the error of a float32.

    Raises:
        ValueError: k or temperature out of range, no class; TypeError: logits that are no floating tensor.

    Example:
        >>> kept = top_k(torch.tensor([0.4, 0.1, 0.5]).log(), 2)
        >>> kept.ids.tolist(), [round(x, 4) for x in kept.log_probs.exp().tolist()]
        ([2, 0], [0.5, 0.4])
        >>> round(kept.log_tail.exp().item(), 4)
        0.1

    Source: Tan et al. 2019, arXiv:1902.10461 (top-k of a translation teacher); the bucket of the rest is new here.
    """
    check_temperature("temperature", temperature)
    check_logits(logits=logits)
    classes = logits.shape[-1]
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= classes:
        fail("k", repr(k), f"a whole number from 1 to {classes}, the vocabulary", "Keep fewer ids, or all of them.")

    def block(z: Tensor) -> tuple[Tensor, ...]:
        ids = z.topk(k).indices
        log_p = log_probs(z, temperature, wide(z))
        kept = log_p.gather(-1, ids)
        # Added, not written: a NaN stays one.
        return ids, kept, log_p.scatter_add_(-1, ids, torch.full_like(kept, -torch.inf)).logsumexp(-1)

    return TopK(*_by_blocks(block, logits))


def draw_samples(logits: Tensor, n: int, *, temperature: float = 1.0, uniform: Tensor) -> Samples:
    """n draws from softmax(z_t/T): the ids under the points (i + uniform)/n, i = 0 .. n-1, of its distribution.

    When to use: for the forward KL, with far fewer ids than `top_k` needs. The expected share of an id among the draws
    is its probability, so that `sampled_forward_kl` and its gradient are those of the dense loss in the mean; since the
    points are evenly spaced, an id comes up within one draw of n times its probability.

    Args:
        logits: z_t [..., V], any floating dtype; -inf excludes a class, which is never drawn.
        n: draws a position, at least 1.
        temperature: T > 0.
        uniform: [...] one number in [0, 1) a position, e.g. `torch.rand(logits.shape[:-1])`. The same numbers give the
            same draws.

    Returns:
        `Samples`, ids int64, entropy in float32 or wider.

    Raises:
        ValueError: n or temperature out of range, no class, `uniform` of another shape or outside [0, 1);
        TypeError: logits that are no floating tensor.

    Example:
        >>> samples = draw_samples(torch.tensor([0.5, 0.25, 0.25]).log(), 4, uniform=torch.tensor(0.5))
        >>> samples.ids.sort().values.tolist(), samples.top.item(), round(samples.entropy.item(), 4)
        ([0, 0, 1, 2], 0, 1.0397)

    Source: Anshumann et al. 2025, arXiv:2503.16870, with systematic instead of independent draws.
    """
    check_temperature("temperature", temperature)
    check_logits(logits=logits)
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        fail("n", repr(n), "a whole number of draws, at least 1", "Take 50 for a start.")
    shape = logits.shape[:-1]
    if not isinstance(uniform, Tensor) or uniform.shape != shape:
        shown = f"of shape {list(uniform.shape)}" if isinstance(uniform, Tensor) else type(uniform).__name__
        fail("uniform", shown, f"one number for each position, {list(shape)}", "Use `torch.rand` of that shape.")
    # On CPU alone: elsewhere looking would wait for the device.
    if uniform.device.type == "cpu" and uniform.numel() and not (uniform.min() >= 0 and uniform.max() < 1):
        shown = f"a tensor from {uniform.min().item():g} to {uniform.max().item():g}"
        fail("uniform", shown, "numbers in [0, 1)", "Use `torch.rand`.")

    def block(z: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
        log_p = log_probs(z, temperature, wide(z))
        probs = log_p.exp()
        entropy = -log_p.clamp_(min=torch.finfo(log_p.dtype).min).mul_(probs).sum(-1)  # 0 log 0 = 0
        heights = probs.cumsum(-1, dtype=uniform.dtype)
        points = (torch.arange(n, device=z.device) + uniform.unsqueeze(-1)) / n
        # Below the last height whatever rounding does; only an id with a probability rises above a point.
        points = points.clamp(max=1 - torch.finfo(points.dtype).eps) * heights[:, -1:]
        return torch.searchsorted(heights, points, right=True), z.argmax(-1), entropy

    double = torch.float64 if logits.device.type != "mps" else torch.float32
    return Samples(*_by_blocks(block, logits, uniform.to(logits.device, double)))


def _by_blocks(block: Callable[..., tuple[Tensor, ...]], logits: Tensor, *others: Tensor) -> list[Tensor]:
    """What `block` makes of some rows of the logits [..., V] and of the others [...], joined."""
    size = max(2, (_BLOCK if logits.device.type == "cpu" else BLOCK_ACCELERATOR) // logits.shape[-1])
    rows = [logits.detach().reshape(-1, logits.shape[-1]), *(x.reshape(-1) for x in others)]
    count = len(rows[0])
    if count == 1:  # threads would share the sum of a single row, whose last bits would depend on their number
        rows = [torch.cat((x, x)) for x in rows]
    splits = (x.tensor_split(max(1, count // size)) for x in rows)
    columns = map(torch.cat, zip(*(block(*some) for some in zip(*splits, strict=True)), strict=True))
    return [column[:count].view((*logits.shape[:-1], *column.shape[1:])) for column in columns]


# ---- the losses against them ----------------------------------------------------------------------------------------


def top_k_divergence(
    student_logits: Tensor,
    teacher: TopK,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """D(p, q) over k + 1 buckets: each kept id is one, all the others together are the last.

    When to use: with `top_k`, taken at the same temperature. It is never more than the divergence over all ids, and
    equal where the tail is alike in both or holds one id or none.

    Args:
        student_logits: z_s [..., V], any floating dtype.
        teacher: `TopK`, ids of any integer dtype.
        temperature: T > 0 of the student, and of `teacher`.
        divergence, beta: as in `DIVERGENCES`, of those with `sparse`.
        labels: [...] class ids, for a divergence that needs them; one that is not among the kept ids counts as none.

    Returns:
        Nats [...], float32 or wider; 0 where the buckets are equal, +inf as the divergence itself.

    Raises:
        ValueError: unknown divergence, beta or temperature out of range, shapes that do not fit.
        TypeError: logits that are no floating tensor.

    Example:
        >>> teacher, student = torch.tensor([0.4, 0.1, 0.5]).log(), torch.zeros(3)
        >>> dense = torch.nn.functional.kl_div(student.log_softmax(0), teacher, log_target=True, reduction="sum")
        >>> bool(torch.isclose(top_k_divergence(student, top_k(teacher, 2)), dense))
        True

    Source: as `top_k`.
    """
    beta = check_divergence(divergence, beta)
    check_sparse(divergence)
    _check_sparse(student_logits, temperature, teacher, [teacher.ids, teacher.log_probs], teacher.log_tail)
    if DIVERGENCES[divergence].needs_labels:
        check_class_ids(labels, student_logits.shape[:-1])
    return bucket_divergence(student_logits.to(wide(student_logits)), teacher, temperature, divergence, beta, labels)


def bucket_labels(ids: Tensor, labels: Tensor | None) -> Tensor | None:
    """The place of each label among the kept ids [..., k]; -1 where it is not one of them."""
    if labels is None:
        return None
    found = ids == labels.unsqueeze(-1)
    return torch.where(found.any(-1), found.to(torch.int8).argmax(-1), -1)


def bucket_divergence(
    logits: Tensor, teacher: TopK, temperature: float, divergence: str, beta: float, labels: Tensor | None = None
) -> Tensor:
    """`top_k_divergence` without checks, in the logits' dtype; `beta` as `check_divergence` returns it."""
    ids, x = teacher.ids.long(), logits / temperature
    least = torch.finfo(x.dtype).min  # not -inf, of which nothing but -inf makes a gradient of NaN
    rest = x.scatter(-1, ids, least).logsumexp(-1, True)
    rest = torch.where(rest < least / 2, -torch.inf, rest)
    log_q = torch.cat((x.gather(-1, ids), rest), -1) - x.logsumexp(-1, True)
    log_p = torch.cat((teacher.log_probs, teacher.log_tail.unsqueeze(-1)), -1).to(log_q.dtype)
    entry = DIVERGENCES[divergence]
    labels = bucket_labels(ids, labels) if entry.needs_labels else None
    return entry.evaluate(log_p, log_q, beta, labels).sum(-1)


def sampled_forward_kl(student_logits: Tensor, teacher: Samples, *, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = -H(p) - sum p log q, the sum estimated by the mean of log q over the draws.

    When to use: with `draw_samples`, taken at the same temperature. The forward KL alone is linear in the teacher's
    probabilities but for its entropy, which is known: only its estimate is unbiased.

    Args:
        student_logits: z_s [..., V], any floating dtype.
        teacher: `Samples`, ids of any integer dtype.
        temperature: T > 0 of the student, and of `teacher`.

    Returns:
        Nats [...], float32 or wider. Of a single position it may be negative; in the mean over draws it is KL(p || q).

    Raises:
        ValueError: temperature out of range, shapes that do not fit; TypeError: logits that are no floating tensor.

    Example:
        >>> teacher = torch.tensor([0.5, 0.25, 0.25]).log()
        >>> samples = draw_samples(teacher, 4, uniform=torch.tensor(0.5))
        >>> abs(sampled_forward_kl(teacher, samples).item()) < 1e-6
        True

    Source: as `draw_samples`.
    """
    _check_sparse(student_logits, temperature, teacher, [teacher.ids], teacher.entropy)
    x = student_logits.to(wide(student_logits)) / temperature
    return x.logsumexp(-1) - x.gather(-1, teacher.ids.long()).mean(-1) - teacher.entropy.to(x.dtype)


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_sparse(divergence: str) -> None:
    """Raises ValueError unless the divergence is defined over the buckets of a top-k."""
    if not DIVERGENCES[divergence].sparse:
        having = ", ".join(f"'{name}'" for name, entry in DIVERGENCES.items() if entry.sparse)
        because = "it needs every class of the teacher"
        fix = "Give the teacher as logits or hidden states for this one."
        fail("divergence", repr(divergence), f"one of {having} with a top-k", fix, because=because)


def _check_sparse(
    logits: Tensor, temperature: float, teacher: TopK | Samples, rows: list[Tensor], narrow: Tensor
) -> None:
    check_temperature("temperature", temperature)
    check_logits(student_logits=logits)
    shape, ids = logits.shape[:-1], teacher.ids.shape
    if narrow.shape != shape or any(column.shape != (*shape, *ids[-1:]) for column in rows):
        shown = " and ".join(f"`{name}` of shape {list(x.shape)}" for name, x in teacher._asdict().items())
        expected = f"one row for each of the student's positions {list(shape)}"
        fail("teacher", shown, expected, "Give both sides the same positions.")
