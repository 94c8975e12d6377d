"""Masks and denominators: from values per position (or per element) to a loss.

For: every loss and the trainer; the only file that divides. Leaves formulas to `divergences.py` and the choice of
counts over micro-batches and processes to the trainer.
Letters: B rows (sequences), S positions, V classes, N counted positions.

Uncounted positions may hold anything, NaN and inf included: they give neither value nor gradient. When nothing is
counted, the result is 0 with a gradient path, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import overload

import torch
from torch import Tensor

from ..validation import check_choice, check_tensor, fail
from .tile_types import widened

IGNORE_INDEX = -100  # a label that is none, as in torch and transformers
REDUCTIONS = ("none", "sum", "mean", "batchmean", "tokenmean")


@overload
def divide(total: Tensor, count: float | Tensor) -> Tensor: ...
@overload
def divide(total: float, count: float) -> float: ...
def divide(total: float | Tensor, count: float | Tensor) -> float | Tensor:
    """total / max(count, 1): the one place where a sum becomes a mean.

    Args:
        total: a sum, any shape, or a number.
        count: how many it is over, a number or a tensor (which stays on its device: no synchronisation).

    Returns:
        The mean; 0 with a gradient path for an empty sum.

    Example:
        >>> divide(torch.tensor(6.0), 4).item(), divide(torch.tensor(0.0), 0).item()
        (1.5, 0.0)
    """
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def wrong_labels(labels: Tensor, classes: int) -> Tensor:
    """True where a label is neither a class, 0 to classes - 1, nor `IGNORE_INDEX`; on the device, unread."""
    return (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= classes))


def as_mask(mask: Tensor, shape: torch.Size | tuple[int, ...], *, argument: str = "mask") -> Tensor:
    """`mask` as a bool tensor (True or nonzero: counted); ValueError unless it has exactly the shape given."""
    check_tensor(argument, mask, "one entry per position")
    if tuple(mask.shape) != tuple(shape):
        fail(
            argument,
            f"of shape {list(mask.shape)}",
            f"one entry per position, shape {list(shape)}",
            f"Give `{argument}` the logits' shape without the last dimension.",
        )
    return mask if mask.dtype == torch.bool else mask != 0


def select_positions(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The counted positions of `tensor` as rows: [..., V] -> [N, V], or [...] -> [N].

    When to use: before a divergence, so that uncounted positions cost nothing, and NaN or inf in them reach neither the
    value nor the gradient (multiplying by zero would keep the NaN).

    Args:
        tensor: [..., V] (one more dimension than the mask) or [...] (as many: labels, values).
        mask: [...] bool or 0/1, True where counted; None counts every position and takes `tensor` as [..., V].

    Returns:
        A tensor [N, V] or [N]; a view where all is counted. N may be 0; the gradient path stays.

    Raises:
        ValueError: the mask is not of the shape of `tensor`, or of its shape without the last dimension.

    Example:
        >>> logits = torch.tensor([[[1.0, 2.0], [torch.nan, torch.nan]]])
        >>> select_positions(logits, torch.tensor([[True, False]])).tolist()
        [[1.0, 2.0]]
    """
    if mask is None:
        return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    per_class = tensor.dim() == mask.dim() + 1
    counted = as_mask(mask, tensor.shape[:-1] if per_class else tensor.shape).reshape(-1)
    rows = tensor.reshape(-1, tensor.shape[-1]) if per_class else tensor.reshape(-1)
    index = counted.nonzero().squeeze(1)
    return rows if index.shape[0] == rows.shape[0] else rows.index_select(0, index)


def masked_sum(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scalar sum of the counted values, in float32 or wider.

    Args:
        values: one per position [...].
        mask: [...] bool or 0/1, True where counted; None counts all.

    Returns:
        A scalar; 0 with a gradient path where nothing is counted, whatever the uncounted values are.

    Raises:
        ValueError: mask and values differ in shape.

    Example:
        >>> masked_sum(torch.tensor([1.0, torch.nan, 2.0]), torch.tensor([True, False, True])).item()
        3.0
    """
    if mask is not None:
        values = values.masked_fill(~as_mask(mask, values.shape), 0.0)
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def reduce_total(total: Tensor, reduction: str, *, shape: torch.Size | tuple[int, ...], positions: int) -> Tensor:
    """The sum over all counted positions and classes, divided as `reduction` says.

    Args:
        total: the sum, a scalar.
        reduction: 'sum', 'mean', 'batchmean' or 'tokenmean', see `reduce_terms`.
        shape: the logits' shape [B, ..., V].
        positions: how many positions are counted, N.

    Returns:
        A scalar.

    Raises:
        ValueError: any other reduction.

    Example:
        >>> reduce_total(torch.tensor(12.0), "batchmean", shape=(2, 3, 5), positions=4).item()
        6.0
    """
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return divide(total, shape[0])
    if reduction == "tokenmean":
        return divide(total, positions)
    check_choice("reduction", reduction, REDUCTIONS[1:])
    return divide(total, positions * shape[-1])


def reduce_terms(terms: Tensor, mask: Tensor | None = None, *, reduction: str = "batchmean") -> Tensor:
    """Elementwise contributions [B, ..., V] to a loss; the words mean what `torch.nn.functional.kl_div` means by them.

    Args:
        terms: contributions [B, ..., V].
        mask: [B, ...] bool or 0/1, True where a position is counted; None counts all.
        reduction: 'none' (the terms, 0 where not counted), 'sum', 'mean' (over the elements of the counted positions),
            'batchmean' (sum / B: on [B, S, V] the sum over positions and classes over the number of rows; fully masked
            rows count in B), or 'tokenmean' (sum / number of counted positions).

    Returns:
        [B, ..., V] for 'none', a scalar otherwise.

    Raises:
        ValueError: an unknown reduction, a mask of another shape.

    Example:
        >>> terms, mask = torch.ones(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]])
        >>> [reduce_terms(terms, mask, reduction=name).item() for name in ("sum", "mean", "batchmean", "tokenmean")]
        [8.0, 1.0, 4.0, 4.0]
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        if mask is None:
            return terms
        return terms.masked_fill(~as_mask(mask, terms.shape[:-1]).unsqueeze(-1), 0.0)
    rows = select_positions(terms, mask)
    return reduce_total(masked_sum(rows), reduction, shape=terms.shape, positions=rows.shape[0])


def _segment_quotas(mask: Tensor, fraction: float, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The segment of each position [B * S], numbered from 0 to B * S - 1, and the quota of each segment [B * S]."""
    rows, width = mask.shape
    groups = torch.arange(rows, device=mask.device).unsqueeze(1).expand(rows, width) * width
    groups = (groups if segments is None else groups + segments).reshape(-1)
    counts = torch.zeros_like(groups).scatter_add_(0, groups, mask.reshape(-1).to(groups.dtype))
    exact = Fraction(fraction).limit_denominator(10**6)  # in floats 0.07 * 100 is above 7
    up = (counts * exact.numerator + exact.denominator - 1) // exact.denominator
    return groups, torch.maximum(up, counts.clamp(max=1))


def quota_sum(mask: Tensor, fraction: float, segments: Tensor | None = None) -> Tensor:
    """How many positions `top_entropy_mask` selects, by the mask alone: 0-dim.

    Example:
        >>> quota_sum(torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool), 0.5).item()
        3
    """
    return _segment_quotas(mask, fraction, segments)[1].sum()


def top_entropy_mask(entropy: Tensor, mask: Tensor, fraction: float, segments: Tensor | None = None) -> Tensor:
    """The ceil(fraction * n) positions of highest entropy among the n counted ones of each row, or of each segment.

    When to use: to distil at the positions where the student is least certain. Because the quota is of a row, the
    result depends neither on the other rows of a batch nor on padding. Of equal entropies the earlier position counts.

    Args:
        entropy: [B, S], read where the mask is True.
        mask: [B, S] bool, True where counted.
        fraction: above 0, at most 1; read as the nearest fraction with a denominator up to a million.
        segments: [B, S] whole numbers from 0 to S - 1, equal within a sequence of a packed row; None: one a row.

    Returns:
        [B, S] bool, a part of the mask.

    Example:
        >>> entropy, mask = torch.tensor([[0.1, 0.9, 0.5, 0.9]]), torch.tensor([[True, True, True, False]])
        >>> top_entropy_mask(entropy, mask, 0.5).tolist()
        [[False, True, True, False]]

    Source: SE-KD, arXiv 2602.01395; there the quota is of a batch.
    """
    groups, quotas = _segment_quotas(mask, fraction, segments)
    highest = entropy.detach().masked_fill(~mask, -torch.inf).reshape(-1).argsort(descending=True, stable=True)
    order = highest[groups[highest].argsort(stable=True)]  # by segment, within it by entropy, within that by position
    sizes = torch.zeros_like(groups).scatter_add_(0, groups, torch.ones_like(groups))
    place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[groups[order]]
    chosen = torch.empty_like(mask.reshape(-1)).scatter_(0, order, place < quotas[groups[order]])
    return chosen.view_as(mask) & mask


def _entropy(logits: Tensor) -> Tensor:
    """Overwrites the logits."""
    logits.sub_(logits.amax(-1, True)).clamp_(min=-1e4)  # of an excluded class 0 * -inf would be NaN
    odds = logits.exp()
    total = odds.sum(-1)
    return total.log() - logits.mul_(odds).sum(-1) / total


@torch.no_grad()
def position_entropies(
    mask: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    tile_rows: int,
    *,
    classes: int | None = None,
    also: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Entropy in nats at temperature 1 of the counted positions [B, S], without a gradient; 0 elsewhere.

    Args:
        mask: [B, S] bool, True where counted.
        logits_of: from indices [R] into the B * S positions to their logits [R, V], which are overwritten.
        tile_rows: R at most.
        classes: the first so many alone, renormalised; None: all.
        also: called with indices and logits, of some positions at a time.
    """
    found: list[Tensor] = []
    index = mask.reshape(-1).nonzero().squeeze(1)
    for rows in index.split(tile_rows) if len(index) else ():
        tile = logits_of(rows)
        # On CPU pieces that stay in its cache take a third of the time.
        size = max(1, 2**19 // tile.shape[-1]) if tile.device.type == "cpu" else tile_rows
        for part, logits in zip(rows.split(size), tile.split(size), strict=True):
            logits = widened(logits)
            if also is not None:
                also(part, logits)
            found.append(_entropy(logits[:, :classes]))
    entropy = torch.zeros(mask.numel(), device=mask.device, dtype=found[0].dtype if found else torch.float32)
    return (entropy.index_copy_(0, index, torch.cat(found)) if found else entropy).view_as(mask)


def bad_rows(logits: Tensor) -> list[int]:
    """Indices of the rows of a batch in which a position holds NaN, +inf, or nothing but -inf."""
    return is_bad(logits).nonzero().flatten().tolist()


def is_bad(logits: Tensor) -> Tensor:
    """True for each row in which a position holds NaN, +inf, or nothing but -inf."""
    # The maximum is NaN or inf where any entry is, and a single -inf is a class that the model excludes on purpose.
    peaks = logits.detach().amax(-1)
    return ~torch.isfinite(peaks).reshape(peaks.shape[0], -1).all(-1)
