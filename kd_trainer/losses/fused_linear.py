"""Output head + hard loss + soft loss in one call, without the logits of either model in memory.

For: language models, whose logits are far larger than anything else in a training step. The counted positions are
taken in chunks: both models' logits of a chunk are computed into reused buffers, `tile.py` makes of them losses and,
in place, the gradient at the student's logits, which is multiplied on at once. Backward only scales: four
products in all, three where the student's head is frozen, two without gradients; one less where the teacher is given
as logits or, to `tile_sparse.py`, as top-k or samples.
Letters: N positions, V vocabulary, H hidden size; s and t of student and teacher.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from .distributions import overlap
from .divergences import DIVERGENCES
from .formulas import standardize
from .fused_arguments import CHUNK_ROWS, FusedInputs, Job, group_rows, read
from .projection import AnyMixture, OutputProjection, cast_as_autocast
from .reductions import IGNORE_INDEX, wrong_labels
from .sparse_targets import TopK, bucket_divergence, sampled_forward_kl
from .tile import compile_pays, tile_loss
from .tile_sparse import compile_pays_sparse, hard_tile_loss, sparse_tile_loss
from .tile_types import widened


class FusedLoss(NamedTuple):
    """total is differentiable; the others are detached sums over this call's counted positions."""

    total: Tensor  # factor * (alpha * soft / soft_count + (1 - alpha) * hard / hard_count)
    soft: Tensor  # T^2 * sum of D(p, q), nats
    hard: Tensor  # sum of the cross-entropy at temperature 1, nats
    agreement: Tensor  # number of soft positions where a class is on top in both models
    overlap: Tensor | None = None  # sum of the `overlap` of soft positions, where it is asked for
    marked: Tensor | None = None  # of `agreement`, the marked positions, where some are


def fused_linear_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    alpha: float = 0.7,
    temperature: float = 3.0,
    divergence: str = "forward_kl",
    beta: float | None = None,
    standardize_logits: bool = False,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    soft_mask: Tensor | None = None,
    soft_count: float | Tensor | None = None,
    hard_count: float | Tensor | None = None,
    factor: float = 1.0,
    label_smoothing: float = 0.0,
    common_ids: int | None = None,
    teacher_logits: Tensor | AnyMixture | None = None,
    teacher_top_k: tuple[Tensor, Tensor, Tensor] | None = None,
    teacher_samples: tuple[Tensor, Tensor, Tensor] | None = None,
    overlap_ids: int | None = None,
    overlap_temperature: float = 1.0,
    marked: Tensor | None = None,
    chunk_rows: int | None = None,
    compiled: bool | None = None,
) -> FusedLoss:
    """alpha * T^2 sum D(p, q) / soft_count + (1 - alpha) * sum CE / hard_count, from hidden states, without logits.

    When to use: instead of two output heads and `DistillationLoss`, wherever V is large. Logits are
    softcap * tanh(scale * (h @ weight.T + bias) / softcap), without softcap scale * (h @ weight.T + bias). Several
    positions of one sequence are simply several rows: shift labels before.

    Args:
        student_hidden: [N, Hs]; student_weight: [Vs, Hs]. Gradients flow into both, and into `student_bias`.
        teacher_hidden: [N, Ht]; teacher_weight: [Vt, Ht]. None where the teacher comes in another form, below.
        labels: [N] class ids, -100 where there is none; None: no hard loss.
        alpha: weight of the soft loss, 0 to 1. A term of weight 0 is not added, but its sum is still returned.
        temperature: T > 0 of the soft loss.
        divergence, beta: as in `DIVERGENCES`.
        standardize_logits: as in `SoftTargetLoss`; in torch alone.
        student_bias: [Vs]; teacher_bias: [Vt].
        student_scale, teacher_scale, student_softcap, teacher_softcap: what some models do to their logits.
        soft_mask: [N] bool, positions of the soft loss; None: those with a label, or all where there are no labels.
            Positions counted by neither loss may hold NaN and cost nothing.
        soft_count, hard_count: the denominators, numbers or 0-dim tensors; None: the counts of this call.
        factor: of the total, e.g. the number of processes over which gradients are averaged.
        label_smoothing: of the hard loss, as torch's `cross_entropy`.
        common_ids: the soft loss sees the first so many ids of both vocabularies, renormalised; the hard loss sees all.
        teacher_logits: [N, Vt], the teacher as logits; of several teachers their `MixedLogits`.
        teacher_top_k: distinct ids [N, k], log-probabilities at T [N, k], log of the mass of all other ids at T [N], as
            `sparse_targets.top_k` gives them: the divergence of the k + 1 buckets.
        teacher_samples: ids [N, n], the class on top [N], entropy at T [N], as `sparse_targets.draw_samples` gives
            them: the forward KL, estimated without bias.
        overlap_ids, overlap_temperature: `ids` and `temperature` of `overlap`, the teacher's mass on the student's top,
            of a teacher given as hidden states or logits; None: not measured.
        marked: [N] bool, positions whose agreement is counted apart too.
        chunk_rows: positions of a tile; None: 48 MiB of logits of each model, but from 256 positions to
            160 MiB on CPU; 256 MiB on accelerators. On CPU the first tile has twice as many, in the same memory,
            where the head is wide enough that the gradient of its weight, not written yet, can hold their logits; with
            top-k or samples every tile has.
        compiled: whether to compile the elementwise part; None: where there is a compiler and the problem is large.

    Returns:
        `FusedLoss`, in float32 or wider.

    Raises:
        ValueError: shapes, ranges or ids that do not fit; TypeError: the teacher given in no form, or in several.

    Example:
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> loss = fused_linear_distillation(student, torch.randn(50, 4), teacher, torch.randn(50, 8), alpha=1.0)
        >>> loss.total.backward()
        >>> tuple(student.grad.shape)
        (6, 4)

    Source: the gradient beside the loss, chunk by chunk: Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989; the
    divergences' sources stand with `DIVERGENCES`.
    """
    given = dict(locals())
    job, hidden, weight, bias = read(FusedInputs(**given))
    if hidden.shape[0] == 0:
        return _nothing(job, hidden, weight, bias)
    total, soft, hard, same, *more = _Fused.apply(hidden, weight, bias, job, torch.is_grad_enabled())
    return FusedLoss(total, soft, hard, same, *job.measured(more))


def fused_linear_distillation_plain(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    **options: Any,
) -> FusedLoss:
    """The plain twin of `fused_linear_distillation`, its specification: all logits at once, gradients by autograd."""
    given = inputs_of(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **options)
    job, hidden, weight, bias = read(given)
    if hidden.shape[0] == 0:
        return _nothing(job, hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        z_s = OutputProjection(weight, bias, job.student.scale, job.student.softcap).logits(hidden)
        cut = slice(0, job.soft_rows), slice(job.soft_rows, len(z_s))
        z_t = job.dense_rows(cut[0], z_s[cut[0]])
        z_t = z_t if job.teacher is None else job.teacher.logits(z_t)
        parts = [job.with_marked(_row_losses(job, z_s[rows], z_t, rows), rows) for rows in cut]
        soft, hard, same, *top = (torch.cat(column) for column in zip(*parts, strict=True))
    soft_sum, hard_sum = soft.sum() * job.setting.temperature**2, hard.sum()
    agreement = same.sum().to(hard_sum.dtype)
    measured = job.measured([column.sum().to(hard_sum.dtype) for column in top])
    return FusedLoss(_mix(job, soft_sum, hard_sum), soft_sum.detach(), hard_sum.detach(), agreement, *measured)


def inputs_of(*arguments: Any, **options: Any) -> FusedInputs:
    """The arguments of a call of `fused_linear_distillation`, with its defaults."""
    bound = inspect.signature(fused_linear_distillation).bind(*arguments, **options)
    bound.apply_defaults()
    return FusedInputs(**bound.arguments)


# ---- from logits to sums --------------------------------------------------------------------------------------------


def _row_losses(job: Job, z_s: Tensor, z_t: Tensor | None, rows: slice) -> tuple[Tensor, ...]:
    """(soft without T^2, hard, same) [R] from whole logits, by autograd: the formulas as they are written.

    The fourth is the overlap, where it is asked for.
    """
    setting, n = job.setting, job.common_ids
    zero = hard = z_s.new_zeros(z_s.shape[0])
    top_mass: tuple[Tensor, ...] = ()
    known = None if job.labels is None else job.labels[rows]
    if known is not None:
        labels = known.long()
        wrong = wrong_labels(labels, z_s.shape[-1])  # found on CPU before; elsewhere the row becomes NaN
        hard = F.cross_entropy(
            z_s, labels.masked_fill(wrong, 0), ignore_index=IGNORE_INDEX, reduction="none",
            label_smoothing=job.label_smoothing,
        )  # fmt: skip
        hard = hard * torch.where(wrong, torch.nan, 1.0)  # of the gradient too
    if rows.start >= job.soft_rows:
        return zero, hard, zero.bool(), *(() if job.overlap_ids is None else (zero,))
    common = z_s if n is None else z_s[:, :n]
    teacher = job.sparse_rows(rows)
    if teacher is not None:
        if isinstance(teacher, TopK):
            soft = bucket_divergence(common, teacher, setting.temperature, setting.divergence, setting.beta, known)
            top = teacher.ids.gather(1, teacher.log_probs.argmax(-1, True))
        else:
            soft = sampled_forward_kl(common, teacher, temperature=setting.temperature)
            top = teacher.top.unsqueeze(1)
        same = (common.gather(1, top) == common.amax(-1, True)).squeeze(1)
    else:
        assert z_t is not None
        dense = (z_t if n is None else z_t[:, :n]).to(z_s.dtype)
        same = ((common == common.amax(-1, True)) & (dense == dense.amax(-1, True))).any(-1)
        top_mass = _top_mass(job, common, dense, 1.0)
        entry, compared = DIVERGENCES[setting.divergence], (dense, common)
        if setting.standardized:
            compared = (standardize(dense), standardize(common))
        of_teacher, of_student = (entry.arguments(z / setting.temperature) for z in compared)
        soft = entry.evaluate(of_teacher, of_student, setting.beta, known).sum(-1)
    return soft, hard, same, *top_mass


def _top_mass(job: Job, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """The overlap of each row, where it is asked for; `teacher`: its logits over this temperature."""
    if job.overlap_ids is None:
        return ()
    return (overlap(student, teacher, ids=job.overlap_ids, temperature=job.overlap_temperature / temperature),)


def _mix(job: Job, soft: Tensor, hard: Tensor) -> Tensor:
    """The total from both sums; a term of weight zero is not added, since 0 * inf is NaN."""
    total = torch.zeros_like(soft) if job.alpha == 0 else soft * (job.alpha * job.soft_weight)
    if job.alpha < 1 and job.labels is not None:
        total = total + hard * ((1 - job.alpha) * job.hard_weight)
    return total.to(soft.dtype)


def _nothing(job: Job, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> FusedLoss:
    """Nothing counts: zero, with a gradient path to all that would have one."""
    total = hidden[:0].sum(dtype=torch.float32) + weight[:0].sum(dtype=torch.float32)
    total = total if bias is None else total + bias[:0].sum(dtype=torch.float32)
    zero = torch.zeros((), device=hidden.device)
    measured = job.measured([zero.clone(), zero.clone()])
    return FusedLoss(total, zero, zero.clone(), zero.clone(), *measured)


# ---- the tiles ------------------------------------------------------------------------------------------------------


class _Fused(torch.autograd.Function):
    """The loss with its gradients computed beside it; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, grad_enabled: bool
    ) -> tuple[Tensor, ...]:
        wanted = [grad_enabled and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        # Half precision has no room for gradients divided by the counts: they are divided after the products.
        ctx.unit = 1.0 if hidden.dtype != torch.float16 else job.unit()
        with torch.autocast(hidden.device.type, enabled=False):
            (soft, *sums), gradients = _all_tiles(job, hidden, wanted, ctx.unit)
        ctx.save_for_backward(*gradients)
        soft = soft * job.setting.temperature**2
        total = _mix(job, soft, sums[0])
        ctx.mark_non_differentiable(soft, *sums)
        return total, soft, *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Any, ...]:
        factor = grad_total * ctx.unit
        same = factor.device.type == "cpu" and factor.item() == 1
        return *(g if g is None or same else _scaled(g, factor) for g in ctx.saved_tensors), None, None


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    if gradient.dtype in (torch.float16, torch.bfloat16):
        return (gradient.float() * factor).to(gradient.dtype)
    return gradient * factor.to(gradient.dtype)


def _all_tiles(job: Job, hidden: Tensor, wanted: list[bool], unit: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Chunk by chunk: `job.columns` sums, soft without T^2, and the gradients of total / unit."""
    n, vocabulary = hidden.shape[0], job.student.weight.shape[0]
    pays = compile_pays if job.sparse is None else compile_pays_sparse
    job.plain_rows = job.plain_rows or (job.setting.excluding and not _kernel_excludes(job, n, vocabulary, hidden))
    lone = job.sparse is not None and not job.plain_rows  # no tile of the teacher: the student's is twice as high
    chunk, gradient = min(2 * job.chunk_rows if lone else job.chunk_rows, n), any(wanted)
    products = _Products(job, hidden, wanted, chunk)
    weights = job.row_weights(n, unit) if gradient else hidden.new_zeros(n, 2, dtype=_wide(hidden.dtype))
    compiled = not job.plain_rows and pays(job.setting, chunk, vocabulary, hidden, job.compiled)
    wide = torch.float64 if hidden.device.type != "mps" else torch.float32
    sums = torch.zeros(job.columns, dtype=wide, device=hidden.device)
    # Known gradients are those at z / T, and the product divides for nothing; the others begin at the product.
    factor = 1.0 if job.plain_rows else job.student.scale / job.setting.temperature
    for group, tiles, teacher_tile in products.groups(job, chunk):
        job.student.product(hidden[group], factor, tiles)
        at_once = chunk if teacher_tile is None else len(teacher_tile)
        at_once = len(tiles) if lone else at_once
        cut = min(max(group.start, job.soft_rows), group.stop)
        for rows in (*_parts(group.start, cut, at_once), *_parts(cut, group.stop, len(tiles))):
            tile = tiles[rows.start - group.start : rows.stop - group.start]
            soft_too = rows.start < job.soft_rows
            teacher: Any = _teacher_part(job, rows, teacher_tile, tile) if soft_too else None
            labels: Any = None if job.labels is None else job.labels[rows]
            if job.plain_rows:
                losses = job.with_marked(_plain_tile(job, tile, teacher, weights[rows], rows, gradient), rows)
            elif soft_too:
                loss: Any = tile_loss if job.sparse is None else sparse_tile_loss
                top_mass = _top_mass(job, tile, teacher, job.setting.temperature)  # the tile is overwritten next
                losses = loss(job.setting, tile, teacher, weights[rows], labels, gradient=gradient, compiled=compiled)
                losses = job.with_marked((*losses, *top_mass), rows)
            else:
                losses = hard_tile_loss(job.setting.temperature, tile, weights[rows], labels, gradient, job.compiled)
            sums[: len(losses)] += torch.stack([column.sum(dtype=sums.dtype) for column in losses])
        products.multiply(group, tiles)
    return [column.clone() for column in sums.to(_wide(hidden.dtype)).unbind()], products.gradients()


def _kernel_excludes(job: Job, n: int, vocabulary: int, hidden: Tensor) -> bool:
    """Whether the tile goes to the Triton kernel, which excludes classes as the plain twin does."""
    from ..kernels.tile_triton import has_triton

    chunk = min(job.chunk_rows, n)
    return hidden.is_cuda and has_triton(hidden) and compile_pays(job.setting, chunk, vocabulary, hidden, job.compiled)


def _parts(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _teacher_tile(job: Job, chunk: int, keep: bool) -> Tensor | None:
    if job.teacher is not None:
        return kept_memory("teacher", chunk, job.teacher.weight.shape[0], job.teacher.weight, keep=keep)
    if job.teacher_rows is not None and not job.plain_rows and job.setting.temperature != 1:
        wide = _wide(job.teacher_rows.dtype)  # dividing in half precision would round once more than the twin
        return torch.empty(chunk, job.teacher_rows.shape[1], dtype=wide, device=job.teacher_rows.device)
    return None


def _teacher_part(job: Job, rows: slice, tile: Tensor | None, student: Tensor) -> Any:
    """The teacher's logits of a chunk, over T where the gradient has a formula; or its top-k or samples."""
    if job.teacher_rows is None:
        return job.sparse_rows(rows)
    given, temperature = job.dense_rows(rows, student), job.setting.temperature
    if job.teacher is not None:
        assert tile is not None
        factor = 1.0 if job.plain_rows else job.teacher.scale / temperature
        return job.teacher.product(given, factor, tile[: given.shape[0]])
    return given if tile is None else torch.div(given, temperature, out=tile[: given.shape[0]])


def _plain_tile(
    job: Job, tile: Tensor, teacher: Any, weights: Tensor, rows: slice, gradient: bool
) -> tuple[Tensor, ...]:
    """`tile_loss` by autograd, for settings without a gradient written out; in blocks, to hold little at once."""
    losses = []
    for part in _parts(0, tile.shape[0], max(1, 2**22 // tile.shape[1])):
        here = slice(rows.start + part.start, rows.start + part.stop)
        with torch.set_grad_enabled(gradient):
            raw = tile[part].to(_wide(tile.dtype), copy=True).requires_grad_(gradient)
            z_s = job.student.capped(raw)
            z_t = teacher[part].to(raw.dtype) if isinstance(teacher, Tensor) else None
            z_t = z_t if z_t is None or job.teacher is None else job.teacher.capped(z_t)
            soft, hard, *others = _row_losses(job, z_s, z_t, here)
            if gradient:
                # The weights are those of the gradients of D at z / T and of the hard loss at z, times the scale.
                total = _weighted(soft, weights[part, 0] * job.setting.temperature) + _weighted(hard, weights[part, 1])
                (grad,) = torch.autograd.grad(total, raw)
                tile[part] = grad / job.student.scale
        losses.append((soft.detach(), hard.detach(), *others))
    return tuple(torch.cat(column) for column in zip(*losses, strict=True))


class _Products:
    """The student's logits and the gradient products, of a group of rows: a chunk, or many in half precision."""

    def __init__(self, job: Job, hidden: Tensor, wanted: list[bool], chunk: int) -> None:
        self.hidden, self.student, self.wanted = hidden, job.student, wanted
        n, (vocabulary, width) = hidden.shape[0], self.student.weight.shape
        self.rows = group_rows(n, chunk, vocabulary, width, hidden.element_size()) if wanted[1] else chunk
        # On CPU, products into so few columns are faster in parts: [512, 49152] @ [49152, 576] takes 16 ms, whole 25.
        self.in_parts = hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and 320 < width < 768
        self.grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
        self.memory = kept_memory("gradient", vocabulary, width, self.student.weight) if wanted[1] else None
        self.grad_weight: Tensor | None = None
        self.grad_bias = hidden.new_zeros(vocabulary, dtype=_wide(hidden.dtype)) if wanted[2] else None

    def groups(self, job: Job, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Groups of rows, with memory for the student's logits of a whole group and the teacher's of a chunk.

        On CPU, the teacher's logits of the first group lie where the weight's gradient will be written. In float32 the
        student's may then take both tiles: products of twice as many rows read their weights half as often.
        """
        n, vocabulary = len(self.hidden), len(self.student.weight)
        first, teacher = 0, None if job.teacher is None else job.teacher.weight
        if self.memory is not None and teacher is not None and teacher.dtype == self.memory.dtype and teacher.is_cpu:
            fitting = self.memory.numel() // len(teacher)
            if fitting >= min(CHUNK_ROWS, n):
                first = min(n, 2 * chunk if self.rows == chunk else self.rows)
                lent = self.memory.view(-1)[: min(fitting, first) * len(teacher)].view(-1, len(teacher))
        keep = keeps_tiles(n, self.student.weight.shape[1])
        tiles = kept_memory("student", min(first or self.rows, n), vocabulary, self.student.weight, keep=keep)
        if first:
            yield slice(0, first), tiles, lent
        if first == n:
            return
        teacher_tile = _teacher_tile(job, chunk, keep) if first <= self.rows else None
        if teacher_tile is None and teacher is not None:
            teacher_tile = tiles[chunk:].view(-1)[: chunk * len(teacher)].view(chunk, -1)
        for group in _parts(first, n, self.rows):
            yield group, tiles[: group.stop - group.start], teacher_tile

    def multiply(self, group: slice, gradient: Tensor) -> None:
        """Multiplies the gradient that `tile_loss` left in the tiles of a group on."""
        if self.grad_hidden is not None:
            size = 288 if self.in_parts and len(gradient) > CHUNK_ROWS else self.student.weight.shape[1]
            parts = self.student.weight.split(size, 1), self.grad_hidden[group].split(size, 1)
            for columns, into in zip(*parts, strict=True):
                torch.mm(gradient, columns, out=into)
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(0, dtype=self.grad_bias.dtype)
        if not self.wanted[1]:
            return
        hidden, weight = self.hidden[group], self.student.weight
        if self.grad_weight is None:
            assert self.memory is not None
            self.grad_weight = torch.mm(gradient.t(), hidden, out=self.memory)
            if group.stop < len(self.hidden) and weight.dtype in (torch.bfloat16, torch.float16):
                self.grad_weight = self.grad_weight.float()
        elif self.grad_weight.dtype == gradient.dtype:
            self.grad_weight.addmm_(gradient.t(), hidden)
        else:
            self.grad_weight += torch.mm(gradient.t(), hidden)

    def gradients(self) -> list[Tensor | None]:
        dtype = self.student.weight.dtype
        found = (self.grad_hidden, self.grad_weight, self.grad_bias)
        return [None if g is None else g.to(dtype) for g in found]


_LINE = 64  # bytes of a cache line
_KEPT = threading.local()  # by name: memory, and whether a tensor in it still lives (a weak reference)


def keeps_tiles(positions: int, width: int) -> bool:
    """Whether the memory of tiles is kept from one call to the next.

    Of few positions it is not: backward, with the gradients of two embeddings of this width, is then the peak of a step
    without the fused loss, and idle tiles would be added to it. Of more, full logits are the peak, of which the tiles
    are a part.
    """
    return 2 * positions > width


def release_memory() -> None:
    """Gives back what `kept_memory` keeps in this thread: for the end of a training or an evaluation."""
    _KEPT.__dict__.clear()


def kept_memory(name: str, rows: int, columns: int, like: Tensor, *, keep: bool = True) -> Tensor:
    """A tensor [rows, columns] as `like`; on CPU its memory is kept for the next call that finds it unused.

    Fresh memory costs about as much as a tile's loss, and more on virtual machines whose host takes it back. It
    comes from numpy, which requests huge pages, and begins at a cache line: elsewhere products into it
    take two fifths longer.
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    size = rows * columns * like.element_size()
    room, user = _KEPT.__dict__.get(name, (None, None))
    if room is None or room.nbytes < size + _LINE or user() is not None:
        room = numpy.empty(size + _LINE, numpy.uint8)
    start = -room.ctypes.data % _LINE
    part = room[start : start + size]  # lives as long as a tensor in it
    if keep:
        _KEPT.__dict__[name] = room, weakref.ref(part)
    else:
        _KEPT.__dict__.pop(name, None)
    return torch.from_numpy(part).view(like.dtype).view(rows, columns)


def logits_in_tiles(head: OutputProjection, hidden: Tensor, size: int) -> Callable[[Tensor], Tensor]:
    """From indices of at most `size` rows of hidden [N, H] to their logits, which the next call may overwrite."""
    head, hidden = head.as_autocast(), cast_as_autocast(hidden)
    weight, n = head.weight, len(hidden)
    tile = kept_memory("student", min(size, n), len(weight), weight, keep=keeps_tiles(n, weight.shape[1]))

    def logits(rows: Tensor) -> Tensor:
        product = head.product(hidden[rows], 1.0, tile[: len(rows)])
        return product if head.scale == 1 and head.softcap is None else head.capped(widened(product))

    return logits


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights * values with 0 * inf = 0."""
    return torch.where(weights == 0, 0.0, values * weights).sum()
