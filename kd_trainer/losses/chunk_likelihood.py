"""Approximate likelihood matching: a loss between models of different tokenizers, over text chunks that both tile.

For: a student whose tokens are not the teacher's. The log-likelihood of a chunk is the sum of the log-probabilities of
its tokens; student and teacher are compared chunk by chunk as two outcomes, this text or any other. Log-probabilities
are computed from final hidden states, tile by tile, and the logits of no model are held.
Letters: B rows, S tokens, C chunks, N positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..validation import check_temperature, fail
from .divergences import kl_terms, wide
from .fused_arguments import chunk_rows
from .fused_linear import keeps_tiles, kept_memory
from .projection import OutputProjection, cast_as_autocast
from .reductions import wrong_labels
from .tile import block_rows
from .tile_types import widened

_LOG_HALF = -0.6931471805599453


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, without cancellation; -inf at 0.

    Source: Maechler 2012, Accurately computing log(1 - exp(-|a|)).
    """
    near = x > _LOG_HALF  # each branch gets harmless values where the other one is taken: its gradient there is not NaN
    at_one = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, at_one, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def chunk_kl(student_log_likelihoods: Tensor, teacher_log_likelihoods: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL between Bernoulli(exp(l_t / tau)) and Bernoulli(exp(l_s / tau)), elementwise.

    When to use: text chunks that models of two tokenizers both tile. The loss knows the probability of the text alone,
    not what else the teacher thinks likely: train with the labels' loss beside it. With one tokenizer and tau = 1 it is
    the target term of decoupled distillation (DKD). tau > 1 gives chunks of several tokens, whose likelihood is small,
    a larger share; the gradient falls about as 1 / tau.

    Args:
        student_log_likelihoods: l_s <= 0, sums of the log-probabilities of each chunk's tokens, any shape.
        teacher_log_likelihoods: l_t, the same shape.
        temperature: tau > 0.

    Returns:
        Nats, the shape of the arguments, float32 or wider. 0 where both are equal, -inf included; +inf where the
        student alone excludes the text. l / tau counts as at most -eps of its dtype, since any probability above
        1 - eps is rounded to 1: value and gradient are finite at l = 0.

    Raises:
        ValueError: shapes that differ, tau out of range.

    Example:
        >>> round(chunk_kl(torch.tensor(0.25).log(), torch.tensor(0.5).log()).item(), 4)
        0.1438

    Source: Minixhofer, Vulic and Ponti 2025, Universal cross-tokenizer distillation via approximate likelihood
    matching, arXiv:2503.20083; the target term: Zhao et al. 2022, arXiv:2203.08679.
    """
    check_temperature("temperature", temperature)
    if student_log_likelihoods.shape != teacher_log_likelihoods.shape:
        shown = f"of shape {list(student_log_likelihoods.shape)}"
        expected = f"{list(teacher_log_likelihoods.shape)}, as `teacher_log_likelihoods`"
        fail("student_log_likelihoods", shown, expected, "Give one number a chunk on both projections.")
    dtype = wide(student_log_likelihoods, teacher_log_likelihoods)
    log_q, log_p = (_below_zero(x.to(dtype) / temperature) for x in (student_log_likelihoods, teacher_log_likelihoods))
    return kl_terms(log_p, log_q) + kl_terms(log1mexp(log_p), log1mexp(log_q))


def _below_zero(x: Tensor) -> Tensor:
    """At most -eps, with the gradient of the identity: at the bound it still points away from 1."""
    bound = -torch.finfo(x.dtype).eps
    return torch.where(x > bound, x - (x - bound).detach(), x)


def chunk_sums(values: Tensor, chunk_ids: Tensor, slots: int) -> Tensor:
    """[B, slots]: the sum of the values of each chunk of a row; ids outside 0 to slots - 1 belong to no chunk.

    Args:
        values: [B, S]; those of no chunk may be NaN.
        chunk_ids: [B, S] integers.

    Example:
        >>> chunk_sums(torch.tensor([[1.0, 2.0, 3.0, torch.nan]]), torch.tensor([[0, 0, 1, -1]]), 2).tolist()
        [[3.0, 3.0]]
    """
    within = (chunk_ids >= 0) & (chunk_ids < slots)
    index = torch.where(within, chunk_ids, slots).long()
    sums = values.new_zeros(len(values), slots + 1).scatter_add(1, index, values.masked_fill(~within, 0))
    return sums[:, :slots]


def logits_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[label] [N] of logits [N, V], in float32 or wider; an id out of range gives NaN."""
    wrong = wrong_labels(labels, logits.shape[-1]) | (labels < 0)
    losses = F.cross_entropy(logits.to(wide(logits)), labels.masked_fill(wrong, 0).long(), reduction="none")
    return (-losses).masked_fill(wrong, torch.nan)


# ---- log-probabilities of labels, without logits --------------------------------------------------------------------


def label_log_probs(
    hidden: Tensor, projection: OutputProjection, labels: Tensor, *, tile_rows: int | None = None
) -> Tensor:
    """log softmax(logits)[label] [N] from final hidden states [N, H], without gradient; a tile of logits at a time.

    Args:
        projection: the output projection.
        labels: [N] class ids; an id out of range gives NaN.
        tile_rows: positions of a tile; None: as the fused loss.
    """
    hidden, projection = cast_as_autocast(hidden), _as_autocast(projection)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        log_probs, _ = _all_log_probs(hidden, projection, labels, _tile(hidden, projection, tile_rows))
    return log_probs


def loss_of_log_probs(
    hidden: Tensor,
    projection: OutputProjection,
    labels: Tensor,
    loss: Callable[[Tensor], tuple[Tensor, ...]],
    *,
    tile_rows: int | None = None,
) -> tuple[Tensor, ...]:
    """A loss of the labels' log-probabilities from final hidden states [N, H], with its gradient, without logits.

    As in `fused_linear_distillation` the gradient is computed beside the loss and backward only scales. The gradient at
    a position may depend on all others, so tiles are computed twice, except for the last one: four products at most.

    Args:
        hidden: [N, H]; gradients flow into it and into the weight and bias of `projection`.
        labels: [N] class ids; an id out of range gives NaN.
        loss: log-probabilities [N], in float32 or wider -> the loss, and further tensors that have no gradient.

    Returns:
        What `loss` returned.
    """
    hidden, projection = cast_as_autocast(hidden), _as_autocast(projection)
    return _FromLogProbs.apply(
        hidden, projection.weight, projection.bias, projection, labels, loss, tile_rows, torch.is_grad_enabled()
    )


def _as_autocast(projection: OutputProjection) -> OutputProjection:
    return OutputProjection(
        cast_as_autocast(projection.weight), cast_as_autocast(projection.bias), projection.scale, projection.softcap
    )


def _tile(hidden: Tensor, projection: OutputProjection, tile_rows: int | None) -> Tensor:
    """Memory for the logits of a tile."""
    weight = projection.weight
    rows = tile_rows or chunk_rows(len(weight), weight.element_size(), on_cpu=weight.device.type == "cpu")
    keep = keeps_tiles(len(hidden), weight.shape[1])
    return kept_memory("student", max(1, min(rows, len(hidden))), len(weight), weight, keep=keep)


def _parts(rows: slice, size: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def _all_log_probs(hidden: Tensor, projection: OutputProjection, labels: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
    """The labels' log-probabilities [N] and the log of the sum of exponentials [N]; the last tile stays filled."""
    wrong = wrong_labels(labels, len(projection.weight)) | (labels < 0)
    index = labels.masked_fill(wrong, 0).long().unsqueeze(1)
    of_label = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    norms = torch.empty_like(of_label)
    for rows in _parts(slice(0, len(hidden)), len(tile)):
        filled = projection.product(hidden[rows], 1.0, tile[: rows.stop - rows.start])
        for part in _parts(rows, block_rows(filled)):
            logits = projection.capped(widened(filled[part.start - rows.start : part.stop - rows.start]))
            norms[part] = logits.logsumexp(-1)
            of_label[part] = logits.gather(1, index[part]).squeeze(1)
    return (of_label - norms).clamp(max=0).masked_fill(wrong, torch.nan), norms


class _FromLogProbs(torch.autograd.Function):
    """The loss with its gradients computed beside it; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projection: OutputProjection,
        labels: Tensor,
        loss: Callable[[Tensor], tuple[Tensor, ...]],
        tile_rows: int | None,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        wanted = [grad_enabled and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        with torch.autocast(hidden.device.type, enabled=False):
            tile = _tile(hidden, projection, tile_rows)
            log_probs, norms = _all_log_probs(hidden, projection, labels, tile)
            with torch.set_grad_enabled(any(wanted)):
                results = loss(log_probs.requires_grad_(any(wanted)))
                if any(wanted):
                    (slope,) = torch.autograd.grad(results[0], log_probs, materialize_grads=True)
            gradients: list[Tensor | None] = [None, None, None]
            ctx.unit = 1.0
            if any(wanted):
                log_probs = log_probs.detach()
                if hidden.dtype == torch.float16 and len(slope):  # gradients divided by counts would vanish
                    ctx.unit = slope.abs().amax().clamp(min=torch.finfo(slope.dtype).tiny)
                gradients = _gradients(hidden, projection, labels, tile, log_probs, norms, slope / ctx.unit, wanted)
        ctx.save_for_backward(*gradients)
        results = tuple(each.detach() for each in results)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Any, ...]:
        factor = grad_total * ctx.unit
        scaled = (g if g is None else (g.to(factor.dtype) * factor).to(g.dtype) for g in ctx.saved_tensors)
        return *scaled, None, None, None, None, None


def _gradients(
    hidden: Tensor, projection: OutputProjection, labels: Tensor, tile: Tensor, log_probs: Tensor, norms: Tensor,
    slope: Tensor, wanted: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of hidden states, weight and bias from that of the log-probabilities, `slope` [N].

    Args:
        tile: the logits of the last rows, as `_all_log_probs` left them.
    """
    weight = projection.weight
    sums = torch.promote_types(weight.dtype, torch.float32)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_weight = torch.zeros_like(weight, dtype=sums) if wanted[1] else None
    of_bias = torch.zeros(len(weight), dtype=sums, device=weight.device) if wanted[2] else None
    index = labels.clamp(0, len(weight) - 1).long().unsqueeze(1)
    last_first = reversed(list(_parts(slice(0, len(hidden)), len(tile))))
    for number, rows in enumerate(last_first):
        filled = tile[: rows.stop - rows.start]
        if number:
            projection.product(hidden[rows], 1.0, filled)
        for part in _parts(rows, block_rows(filled)):
            block = filled[part.start - rows.start : part.stop - rows.start]
            logits = projection.capped(widened(block))
            gradient = torch.exp(logits - norms[part, None]).mul_(-slope[part, None])
            at_label = -torch.expm1(log_probs[part]) * slope[part]  # 1 - q may be very small
            gradient.scatter_(1, index[part], at_label.unsqueeze(1))
            if projection.softcap is not None:
                gradient.mul_(1 - (logits / projection.softcap).square())
            block.copy_(gradient if projection.scale == 1 else gradient.mul_(projection.scale))
        if of_hidden is not None:
            torch.mm(filled, weight, out=of_hidden[rows])
        if of_weight is not None:
            if of_weight.dtype == filled.dtype:
                of_weight.addmm_(filled.t(), hidden[rows])
            else:
                of_weight += torch.mm(filled.t(), hidden[rows])
        if of_bias is not None:
            of_bias += filled.sum(0, dtype=sums)
    return [None if g is None else g.to(weight.dtype) for g in (of_hidden, of_weight, of_bias)]
