"""Losses between a layer of the student and one of the teacher: attention relations, attention, hidden states; and
between the embeddings that are pooled of the last one.

For: the feature terms of the trainer (`kd_features`), by their names in `FEATURES`, and the task `embedding`. A feature
takes what a layer computed and gives for each row the sum over its attended positions; `training/terms.py` divides and
weighs.
Letters: B rows, S positions, H hidden size, N heads, D size of a head, W = N * D, R relation heads.

To add a feature: write its loss and append an entry to `FEATURES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..validation import check_choice, fail

# Score of a key that is not attended: finite, so that 0 * (score - score) is 0.
_NOT_ATTENDED = -1e30
# MiniLMv2's number of relation heads, for a hidden size of 768.
MOST_RELATION_HEADS = 48


class Attention(NamedTuple):
    """What the self-attention of a layer computes its probabilities from."""

    query: Tensor  # [B, N, S, D], after rotary embeddings
    key: Tensor  # [B, N', S, D]; N' < N where groups of queries share a key
    value: Tensor  # [B, N', S, D']
    scaling: float | None = None  # of the products; None: D ** -0.5
    mask: Tensor | None = None  # broadcast to [B, N, S, S]: boolean, True where attended, or added to the scores
    bias: Tensor | None = None  # as `mask`, added to the scores: relative positions
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    causal: bool = False  # without a mask: whether a position attends to those before it alone

    def parts(self, rows: int, heads: int) -> list[Attention]:
        """Blocks of so many rows and heads; the mask and the bias may be broadcast."""
        shape = self.query.shape
        key = self.key.repeat_interleave(shape[1] // self.key.shape[1], dim=1)
        mask, bias = (x if x is None else x.expand(*shape[:2], *x.shape[2:]) for x in (self.mask, self.bias))

        def cut(x: Tensor | None) -> Any:
            # An index instead of `split` would make a gradient of the whole size for each block.
            return repeat(None) if x is None else [part for some in x.split(rows) for part in some.split(heads, 1)]

        each = zip(cut(self.query), cut(key), cut(mask), cut(bias), strict=False)
        return [self._replace(query=q, key=k, mask=m, bias=b) for q, k, m, b in each]

    def attended(self) -> Tensor:
        """Boolean, broadcast to [B, N, S, S]: True where a query attends to a key."""
        length = self.query.shape[2]
        if self.mask is not None:
            lowest = torch.finfo(self.mask.dtype).min / 2 if self.mask.is_floating_point() else 0
            return self.mask if self.mask.dtype == torch.bool else self.mask > lowest
        every = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.query.device)
        return every.tril() if self.causal else every

    def log_probs(self) -> Tensor:
        """[B, N, S, S], in float32 or wider, without dropout."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query = self.query.to(dtype)
        key = self.key.repeat_interleave(query.shape[1] // self.key.shape[1], dim=1).to(dtype)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if self.scaling is None else self.scaling)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores = scores + self.bias.to(dtype)
        if self.mask is not None and self.mask.is_floating_point():
            scores = (scores + self.mask.to(dtype)).clamp(min=_NOT_ATTENDED)
        elif self.mask is not None or self.causal:
            scores = scores.masked_fill(~self.attended(), _NOT_ATTENDED)
        return scores.log_softmax(-1)


def relation(student: Attention, teacher: Attention, mask: Tensor | None = None, *, heads: int) -> Tensor:
    """KL(A_t || A_s) with A = softmax(X X^T / sqrt(W / R)), mean over X = queries, keys, values and the R heads.

    When to use: a student of another width or another number of heads than the teacher's; no projector is needed.

    Args:
        student, teacher: of the same positions.
        mask: [B, S] bool, True at attended positions, the only ones that count as query and as key; None: all.
        heads: R, into which the concatenated heads are split; it divides the widths W of both.

    Returns:
        [B], nats: the sum over the attended queries. 0 where none is attended.

    Raises:
        ValueError: R does not divide a width.

    Source: MiniLMv2 (arXiv 2012.15828), equations 3 to 5.
    """
    check_relation_heads(heads, *relation_widths(student, teacher))
    total: Any = 0
    for x, y in zip(student[:3], teacher[:3], strict=True):
        total = total + _Relation.apply(_joined(x), _joined(y), mask, heads)
    return total / 3


def _joined(heads: Tensor) -> Tensor:
    """[B, N, S, D] -> [B, S, N * D]"""
    return heads.transpose(1, 2).flatten(2)


def relation_widths(student: Attention, teacher: Attention) -> list[int]:
    """W of queries, keys and values of both."""
    return [x.shape[1] * x.shape[3] for side in (student, teacher) for x in side[:3]]


def default_relation_heads(*widths: int) -> int:
    """The largest common divisor of the widths up to MiniLMv2's 48.

    Example:
        >>> default_relation_heads(768, 384), default_relation_heads(768, 312), default_relation_heads(64, 128)
        (48, 24, 32)
    """
    common = math.gcd(*widths)
    return max(heads for heads in range(1, MOST_RELATION_HEADS + 1) if common % heads == 0)


def check_relation_heads(heads: int, *widths: int) -> None:
    """Raises ValueError unless R divides the width of queries, keys and values of both models."""
    wrong = sorted({width for width in widths if width % heads})
    if wrong:
        shown, common = ", ".join(map(str, wrong)), math.gcd(*widths)
        fix = f"Take a divisor of {common}, e.g. {default_relation_heads(*widths)}, or leave it out."
        expected = "a number that divides the widths of queries, keys and values of both models"
        fail("kd_relation_heads", heads, expected, fix, because=f"it does not divide {shown}")


class _Relation(torch.autograd.Function):
    """Sums of one kind of relation, [B]; the gradient of a row's sum is taken in the same pass over each block.

    Rows do not depend on each other, so that the backward only multiplies by the gradient of each row's sum.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, heads: int) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        sums = student.new_zeros(len(student), dtype=dtype)
        gradient = torch.empty_like(student, dtype=dtype) if ctx.needs_input_grad[0] else None
        with torch.autocast(student.device.type, enabled=False):
            rows, step = _block(student, heads)
            for row, first in product(range(0, len(student), rows), range(0, heads, step)):
                some, last = slice(row, row + rows), first + step
                here = None if mask is None else mask[some, None, :, None]
                x, y = (
                    side[some].unflatten(-1, (heads, -1))[:, :, first:last].transpose(1, 2).to(dtype)
                    for side in (student, teacher)
                )
                if here is not None:
                    x, y = x.masked_fill(~here, 0), y.masked_fill(~here, 0)
                teacher_log_probs, student_log_probs = (_relations(side, here) for side in (y, x))
                teacher_probs = teacher_log_probs.exp()
                differences = teacher_log_probs.sub_(student_log_probs).mul_(teacher_probs)
                # A query that is not attended is 0 in x and y: its relations are alike, its divergence is 0.
                sums[some] += differences.sum((1, 2, 3)) / heads
                if gradient is not None:
                    scores = student_log_probs.exp_().sub_(teacher_probs)
                    products = scores @ x
                    products += scores.mT @ x
                    out = gradient[some].unflatten(-1, (heads, -1))[:, :, first:last]
                    out.copy_(products.transpose(1, 2)).mul_(x.shape[-1] ** -0.5 / heads)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * given[:, None, None]).to(ctx.dtype), None, None, None


def _relations(x: Tensor, mask: Tensor | None) -> Tensor:
    """log softmax(x x^T / sqrt(D)) over the attended keys, of [b, r, S, D]."""
    scores = (x * x.shape[-1] ** -0.5) @ x.mT
    if mask is not None:
        scores += torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, _NOT_ATTENDED).mT
    return scores.log_softmax(-1)


def _block_scores(device: torch.device) -> int:
    """Scores of one side that are held at once: in float32 1 MiB, which a CPU's cache holds, or 16 MiB."""
    return 2**18 if device.type == "cpu" else 2**22


def _block(one: Tensor, heads: int) -> tuple[int, int]:
    """(rows, heads) of a block: some heads of a row, or all of several rows.

    Args:
        one: [B, S, ...].
    """
    held = max(1, _block_scores(one.device) // one.shape[1] ** 2)
    return (1, held) if held < heads else (held // heads, heads)


def attention(student: Attention, teacher: Attention, mask: Tensor | None = None) -> Tensor:
    """KL(A_t || A_s) of the attention probabilities, mean over the heads.

    Where the models have different numbers of heads, the probabilities are averaged over the heads first.

    Args:
        student, teacher: of the same positions, with the same keys attended by each query.
        mask: [B, S] bool, True at the queries that count; None: all.

    Returns:
        [B], nats: the sum over the attended queries. 0 where none is attended.

    Source: TinyBERT (arXiv 1909.10351), section 3; MobileBERT (arXiv 2004.02984), equation 5, has the KL.
    """
    heads, others = student.query.shape[1], teacher.query.shape[1]
    if heads == others:
        rows, step = _block(student.query[:, 0], heads)
        sides = student.parts(rows, step), teacher.parts(rows, step)
    else:
        rows, step = _block(student.query[:, 0], 1)[0], heads
        sides = student.parts(rows, heads), teacher.parts(rows, others)
    masks = [None] * len(sides[0]) if mask is None else [x for x in mask.split(rows) for _ in range(0, heads, step)]
    # The scores are computed again in backward, so that no block's stay in memory.
    sums = [
        checkpoint(_attention, *block, use_reentrant=False, preserve_rng_state=False)
        for block in zip(*sides, masks, strict=True)
    ]
    count = heads if heads == others else 1
    parts = -(-heads // step)
    return torch.cat([sum(sums[i : i + parts], 0 * sums[i]) for i in range(0, len(sums), parts)]) / count


def _attention(student: Attention, teacher: Attention, mask: Tensor | None) -> Tensor:
    """[b], the sum over heads and attended queries."""
    with torch.autocast(student.query.device.type, enabled=False):
        if mask is not None:
            student = student._replace(query=student.query.masked_fill(~mask[:, None, :, None], 0))
        log_q, log_p = student.log_probs(), teacher.log_probs()
        if log_q.shape[1] != log_p.shape[1]:
            log_q, log_p = (x.logsumexp(1, keepdim=True) - math.log(x.shape[1]) for x in (log_q, log_p))
        nats = (log_p.exp() * (log_p - log_q)).sum((1, 3))
        return (nats if mask is None else nats.masked_fill(~mask, 0)).sum(-1)


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error of a hidden state over the teacher's squared norm: |s - t|^2 / |t|^2.

    Args:
        student, teacher: [B, S, H].
        mask: [B, S] bool, True at the positions that count; None: all.

    Returns:
        [B]: the sum over the attended positions. Each position has its norm, so that the result does not depend on the
        split of a batch.
    """
    student, teacher = _counted(student, mask), _counted(teacher, mask)
    norms = teacher.square().sum(-1).clamp(min=torch.finfo(teacher.dtype).tiny)
    return ((student - teacher).square().sum(-1) / norms).sum(-1)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cosine of the hidden states, as half the squared distance of the unit vectors: exactly 0 where they agree.

    Args, returns: as `hidden_mse`.
    """
    units = [torch.nn.functional.normalize(_counted(side, mask), dim=-1) for side in (student, teacher)]
    return (units[0] - units[1]).square().sum((-1, -2)) / 2


def _counted(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """In float32 or wider, 0 at positions that do not count."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return hidden if mask is None else hidden.masked_fill(~mask.unsqueeze(-1), 0)


@dataclass(frozen=True)
class Feature:
    """An entry of `FEATURES`.

    Args:
        loss: (student, teacher, mask) -> [B], the sum over the attended positions of each row.
        reads: "qkv" (an `Attention`, of which mask and scaling may be unknown), "attention" (a whole one), or "hidden"
            (hidden states [B, S, H], after a projector where the widths differ).
        has_heads: whether the loss takes `heads`, the number of relation heads, as well.
    """

    loss: Callable[..., Tensor]
    reads: str
    has_heads: bool = False


FEATURES: dict[str, Feature] = {
    "relation": Feature(relation, "qkv", has_heads=True),
    "attention": Feature(attention, "attention"),
    "hidden_mse": Feature(hidden_mse, "hidden"),
    "hidden_cosine": Feature(hidden_cosine, "hidden"),
}


# ---- embeddings: pooling, the loss of two vectors of a row, and how alike two sets of them are ----


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum(1, keepdim=True).clamp(min=1)
    return hidden.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1) / count


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, mask, mask.int().argmax(1))


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, mask, mask.shape[1] - 1 - mask.flip(1).int().argmax(1))


def _at(hidden: Tensor, mask: Tensor, place: Tensor) -> Tensor:
    """[B, H]: each row's state at its place, zeros where no position of the row counts."""
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, place].masked_fill(~mask.any(1, keepdim=True), 0.0)


POOLINGS = {"mean": _mean, "cls": _first, "last": _last}


def pool(hidden: Tensor, mask: Tensor | None, pooling: str = "mean") -> Tensor:
    """One embedding of a row from its hidden states, over the attended positions alone.

    Args:
        hidden: [B, S, H]. What stands at padding does not matter, NaN included.
        mask: boolean [B, S], True at tokens, padded on either side; None: every position counts.
        pooling: "mean"; "cls", the first attended position; or "last", the last attended one.

    Returns:
        [B, H] in float32 or wider; zeros for a row without any attended position.

    Raises:
        ValueError: another pooling, or shapes that do not fit.

    Example:
        >>> hidden = torch.tensor([[[9.0], [1.0], [3.0]]])
        >>> mask = torch.tensor([[False, True, True]])  # padded on the left
        >>> [pool(hidden, mask, name).item() for name in ("mean", "cls", "last")]
        [2.0, 1.0, 3.0]
    """
    check_choice("pooling", pooling, POOLINGS)
    if hidden.dim() != 3 or 0 in hidden.shape[1:]:
        fix = "Give one hidden state for each position."
        fail("hidden", f"of shape {list(hidden.shape)}", "[B, S, H]", fix)
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if mask.shape != hidden.shape[:2]:
        expected = f"{list(hidden.shape[:2])}, one entry for each position of `hidden`"
        fail("mask", f"of shape {list(mask.shape)}", expected, "Give the attention mask of these positions.")
    return POOLINGS[pooling](_counted(hidden), mask.bool())


def normalised(embeddings: Tensor) -> Tensor:
    """[..., H] of length 1, in float32 or wider; a zero vector stays zero, and its gradient is finite."""
    embeddings = _counted(embeddings)
    length = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    return embeddings / torch.where(length > 0, length, 1.0)


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of each row: 0 for the same direction, 2 for opposite ones, 1 beside a zero vector.

    Args:
        student, teacher: [..., H] of the same shape.

    Returns:
        [...], in float32 or wider.

    Example:
        >>> cosine_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([0.2929])
    """
    return 1 - (normalised(student) * normalised(teacher)).sum(-1)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over H of (student - teacher)² of each row.

    Args:
        student, teacher: [..., H] of the same shape.

    Returns:
        [...], in float32 or wider.

    Example:
        >>> squared_error(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([2.5000])
    """
    return (_counted(student) - _counted(teacher)).square().mean(-1)


EMBEDDING_LOSSES = {"cosine": cosine_loss, "mse": squared_error}


def similarity_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Spearman correlation, over all pairs of rows, of the cosines within one set of embeddings and the other.

    When to use: whether a student ranks pairs of texts as its teacher does. Widths may differ, and nothing is trained.

    Args:
        student: [N, H]; teacher: [N, H'] of the same rows. All N (N - 1) / 2 pairs are ranked: 2,000 rows take about
            half a second on a CPU.

    Returns:
        0-dim float64 in [-1, 1]; NaN below three rows, and where all pairs of a side are equally alike.

    Example:
        >>> teacher = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> similarity_correlation(teacher.roll(1, dims=1) * 7, teacher).item()
        1.0
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        shown = f"of shape {list(student.shape)} beside a teacher's of shape {list(teacher.shape)}"
        fail("student", shown, "embeddings [N, H] of the same N rows", "Embed the same texts with both models.")
    ranks = [_ranks(_cosines(side.detach())) for side in (student, teacher.to(student.device))]
    a, b = (x - x.mean() for x in ranks)
    # Beside constant ranks 0 / 0.
    return ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).clamp(-1, 1)


def _cosines(embeddings: Tensor) -> Tensor:
    """[N (N - 1) / 2] in float64, rounded so that equal vectors are equally alike."""
    units = normalised(embeddings.double())
    above = torch.ones(len(units), len(units), dtype=torch.bool, device=units.device).triu(1)
    return (units @ units.T)[above].mul(2.0**40).round()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 on in float64; equal values have the mean of theirs."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0).double() - (count - 1) / 2)[place]
