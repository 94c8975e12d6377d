"""Approximate likelihood matching: a loss between models of different tokenizers, over text chunks that both tile.

For: a student whose tokens are not the teacher's. The log-likelihood of a chunk is the sum of the log-probabilities of
its tokens; student and teacher are compared chunk by chunk as two outcomes, this text or any other. Log-probabilities
are computed from final hidden states, tile by tile, and the logits of no model are held.
Letters: B rows, S tokens, C chunks, N positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
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
    hidden, projection = cast_as_autocast(hidden), projection.as_autocast()
    found = [hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for rows, tile in _filled_tiles(hidden, projection, _tiles(len(hidden), None, tile_rows, projection.weight)):
            found.append(_tile_log_probs(tile, projection, labels[rows])[0])
    return torch.cat(found)


def loss_of_log_probs(
    hidden: Tensor,
    projection: OutputProjection,
    labels: Tensor,
    loss: Callable[[Tensor, slice], tuple[Tensor, ...]],
    *,
    groups: Tensor | None = None,
    tile_rows: int | None = None,
) -> tuple[Tensor, ...]:
    """A loss of the labels' log-probabilities from final hidden states [N, H], with its gradient, without logits.

    As in `fused_linear_distillation` the gradient is computed beside the loss, tile by tile, and backward only scales:
    three products.

    Args:
        hidden: [N, H]; gradients flow into it and into the weight and bias of `projection`.
        labels: [N] class ids; an id out of range gives NaN.
        loss: (log-probabilities of a tile in float32 or wider, its rows) -> the loss of the tile, and further numbers
            that have no gradient; all add up over tiles.
        groups: [N] integers; neighbours with the same number >= 0 are in one tile, which is higher than `tile_rows`
            where a group is.

    Returns:
        The sums of what `loss` returned.
    """
    hidden, projection = cast_as_autocast(hidden), projection.as_autocast()
    tiles = _tiles(len(hidden), groups, tile_rows, projection.weight)
    return _FromLogProbs.apply(
        hidden, projection.weight, projection.bias, projection, labels, loss, tiles, torch.is_grad_enabled()
    )


def _tiles(count: int, groups: Tensor | None, tile_rows: int | None, weight: Tensor) -> list[slice]:
    """The rows of each tile, which parts no group."""
    most = tile_rows or chunk_rows(len(weight), weight.element_size(), on_cpu=weight.device.type == "cpu")
    if groups is None:
        return [slice(start, min(start + most, count)) for start in range(0, count, most)]
    ends = ((groups[1:] != groups[:-1]) | (groups[1:] < 0)).nonzero().squeeze(1).add(1).tolist()
    tiles, start = [], 0
    for end, following in itertools.pairwise([*ends, count, count + most + 1]):
        if following - start > most and end > start:
            tiles.append(slice(start, end))
            start = end
    return tiles


def _filled_tiles(hidden: Tensor, projection: OutputProjection, tiles: list[slice]) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each tile and h @ weight.T + bias, in the same memory."""
    weight, most = projection.weight, max((rows.stop - rows.start for rows in tiles), default=1)
    memory = kept_memory("student", most, len(weight), weight, keep=keeps_tiles(len(hidden), weight.shape[1]))
    for rows in tiles:
        yield rows, projection.product(hidden[rows], 1.0, memory[: rows.stop - rows.start])


def _tile_log_probs(tile: Tensor, projection: OutputProjection, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels' log-probabilities [R] of a tile, and the logarithms of the sums of exponentials [R]."""
    wrong = wrong_labels(labels, tile.shape[1]) | (labels < 0)
    index, found = labels.masked_fill(wrong, 0).long().unsqueeze(1), []
    size = block_rows(tile)
    for block, own in zip(tile.split(size), index.split(size), strict=True):
        logits = projection.capped(widened(block))
        found.append((logits.gather(1, own).squeeze(1), logits.logsumexp(-1)))
    of_label, norms = (torch.cat(column) for column in zip(*found, strict=True))
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
        loss: Callable[[Tensor, slice], tuple[Tensor, ...]],
        tiles: list[slice],
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        wanted = [grad_enabled and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        gradients = _Gradients(hidden, weight, wanted)
        with torch.autocast(hidden.device.type, enabled=False):
            nothing = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
            sums = loss(nothing, slice(0, 0))
            for rows, tile in _filled_tiles(hidden, projection, tiles):
                log_probs, norms = _tile_log_probs(tile, projection, labels[rows])
                with torch.set_grad_enabled(any(wanted)):
                    found = loss(log_probs.requires_grad_(any(wanted)), rows)
                sums = tuple(a + b.detach() for a, b in zip(sums, found, strict=True))
                if any(wanted):
                    (slope,) = torch.autograd.grad(found[0], log_probs, materialize_grads=True)
                    unit = gradients.unit(slope)
                    _to_gradient(tile, projection, labels[rows], log_probs.detach(), norms, slope / unit)
                    gradients.add(tile, hidden[rows], rows, unit)
        ctx.save_for_backward(*gradients.found())
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Any, ...]:
        same = grad_total.device.type == "cpu" and grad_total.item() == 1
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = (g if g is None else (g if same else g.to(grad_total.dtype) * grad_total).to(to) for g, to in pairs)
        return *scaled, None, None, None, None, None


def _to_gradient(
    tile: Tensor, projection: OutputProjection, labels: Tensor, log_probs: Tensor, norms: Tensor, slope: Tensor
) -> None:
    """Overwrites a tile with the gradient at the product, from that of the log-probabilities, `slope` [R]."""
    index = labels.clamp(0, tile.shape[1] - 1).long().unsqueeze(1)
    at_label = (-torch.expm1(log_probs) * slope).unsqueeze(1)  # 1 - q may be very small
    columns = (tile, index, at_label, norms.unsqueeze(1), slope.unsqueeze(1))
    size = block_rows(tile)
    for block, own, of_label, norm, weight in zip(*(column.split(size) for column in columns), strict=True):
        logits = projection.capped(widened(block))
        gradient = torch.exp(logits - norm).mul_(-weight).scatter_(1, own, of_label)
        if projection.softcap is not None:
            gradient.mul_(1 - (logits / projection.softcap).square())
        block.copy_(gradient if projection.scale == 1 else gradient.mul_(projection.scale))


class _Gradients:
    """The gradients of hidden states, weight and bias, summed over tiles.

    In float16 a gradient that is divided by counts would vanish: tiles have a unit, and sums are float32.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: list[bool]) -> None:
        sums = torch.promote_types(weight.dtype, torch.float32)
        self.small, self.weight = hidden.dtype == torch.float16, weight.detach()
        self.of_hidden = torch.empty_like(hidden, dtype=sums if self.small else None) if wanted[0] else None
        self.of_weight = torch.zeros_like(weight, dtype=sums) if wanted[1] else None
        self.of_bias = torch.zeros(len(weight), dtype=sums, device=weight.device) if wanted[2] else None

    def unit(self, slope: Tensor) -> Any:
        return slope.abs().amax().clamp(min=torch.finfo(slope.dtype).tiny) if self.small else 1.0

    def add(self, tile: Tensor, hidden: Tensor, rows: slice, unit: Any) -> None:
        if self.of_hidden is not None:
            if self.small:
                self.of_hidden[rows] = torch.mm(tile, self.weight).float() * unit
            else:
                torch.mm(tile, self.weight, out=self.of_hidden[rows])
        if self.of_weight is not None:
            if self.of_weight.dtype == tile.dtype:
                self.of_weight.addmm_(tile.t(), hidden)
            else:
                self.of_weight += torch.mm(tile.t(), hidden) * unit
        if self.of_bias is not None:
            self.of_bias += tile.sum(0, dtype=self.of_bias.dtype) * unit

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.of_hidden, self.of_weight, self.of_bias
