"""One visit to a tile of both models' logits: the losses of its rows, and the gradient over the student's tile.

The elementwise middle of `fused_linear.py`, which brings the tiles and multiplies the gradient on. What is written here
is plain torch, which visits blocks of rows that stay in the processor's cache; with a compiler at hand whole tiles go
to the same formulas in `kernels/tile_triton.py` (GPU) or `kernels/tile_cpu.py`.
Letters: R rows, V vocabulary; s, t logits of student and teacher over T [R, V] less their row's maximum; es, et their
exponentials; zs, zt the row sums of these; q = es/zs, p = et/zt.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import PAYS_FROM, can_compile, visit_on_cpu
from ..validation import warn
from .reductions import IGNORE_INDEX, wrong_labels
from .tile_types import Rows, Setting, halves_of, power_of, widened

logger = logging.getLogger(__name__)

# Bytes of one tile's rows that a thread has in a block of the uncompiled visit: all temporaries then stay in its cache.
_BLOCK_BYTES = 3 * 2**17
_LARGE_BLOCK_BYTES = 2**27  # on accelerators, to hold few of them


# Every element-sized result goes into `room`, seven tensors [R, V] of which some may share their memory; single classes
# are given none.
Room = tuple[Tensor | None, ...]
_NO_ROOM: Room = (None,) * 7


def _kl_gradient(
    setting: Setting, d: Tensor, es: Tensor, et: Tensor, stats: tuple[Tensor, ...], weight: Tensor, room: Room
) -> Tensor:
    """weight * dD/ds of a KL; d = es (s - t), unread in forward KL; stats: zs, zt and the row sum of d."""
    zs, zt, reverse = stats
    of_q = weight / zs
    if setting.divergence == "forward_kl":
        return torch.addcmul(torch.mul(es, of_q, out=room[0]), et, weight / zt, value=-1, out=room[0])
    mean = reverse / zs if setting.divergence == "reverse_kl" else reverse / zs - 1
    d = torch.mul(torch.addcmul(d, es, mean, value=-1, out=room[2]), of_q, out=room[2])
    return d if setting.divergence == "reverse_kl" else torch.addcmul(d, et, weight / zt, value=-1, out=room[2])


def _mixture_terms(
    setting: Setting, s: Tensor, t: Tensor, q: Tensor, p: Tensor, room: Room
) -> tuple[Tensor, Tensor, Tensor]:
    """(value, sum of h) [R, 1], and h [R, V] = dD/dlog q where log q is taken as free; dD/ds = h - q * sum(h).

    s and t stand for log q and log p: what they lack, log zs and log zt, is a constant of the row that falls out of the
    gradient. `_mixture_divergence` makes D of it and of the value.
    """
    b, name, tiny = setting.beta, setting.divergence, torch.finfo(p.dtype).tiny
    if name == "total_variation":
        d = torch.mul(torch.sub(q, p, out=room[2]), 0.5, out=room[2])
        h = torch.mul(torch.mul(torch.sign(d, out=room[0]), 0.5, out=room[0]), q, out=room[0])
        return torch.abs(d, out=room[2]).sum(-1, True), h.sum(-1, True), h
    of_q = b if name == "skew_reverse_kl" else 1 - b  # of the mixture
    m = torch.add(torch.mul(p, 1 - of_q, out=room[2]), q, alpha=of_q, out=room[2])
    m = torch.clamp(m, min=tiny, out=room[2])
    if name in ("skew_forward_kl", "skew_reverse_kl"):
        one = p if name == "skew_forward_kl" else q
        share = torch.div(one, m, out=room[1])
        log_share = torch.log(torch.clamp(share, min=tiny, out=room[2]), out=room[2])
        value = torch.mul(one, log_share, out=room[0]).sum(-1, True)
        h = torch.mul(share, -of_q, out=room[0])
        if name == "skew_reverse_kl":
            h = torch.add(torch.add(h, 1, out=room[0]), log_share, out=room[0])
        h = torch.mul(h, q, out=room[0])
        return value, h.sum(-1, True), h
    assert name == "jsd"
    log_m = torch.log(m, out=room[2])
    h = torch.mul(torch.mul(torch.sub(s, log_m, out=room[0]), of_q, out=room[0]), q, out=room[0])
    value = torch.mul(torch.sub(t, log_m, out=room[1]), p, out=room[1]).sum(-1, True)
    return value, h.sum(-1, True), h


def _mixture_divergence(setting: Setting, zs: Tensor, zt: Tensor, value: Tensor, mean: Tensor) -> Tensor:
    """D [R, 1] of `_mixture_terms`."""
    if setting.divergence != "jsd":
        return value
    b = setting.beta
    return b * (value - zt.log()) + mean - (1 - b) * zs.log()


class _Sums(NamedTuple):
    """What every divergence begins with: columns [R, 1] of float32 or wider, then tensors [R, V]."""

    top_s: Tensor
    top_t: Tensor
    zs: Tensor
    zt: Tensor
    same: Tensor  # 0 where a class is on top in both
    s: Tensor
    t: Tensor
    d: Tensor  # s - t
    es: Tensor
    et: Tensor
    power: Tensor | None  # exp(T * s) where it can't be had from es


def _sums(setting: Setting, student: Tensor, teacher: Tensor, room: Room) -> _Sums:
    """Maxima and row sums; where `room` has the same memory for s and es (t and et), s and t are gone afterwards."""
    s, t = widened(student, room[0]), widened(teacher, room[1])
    top_s, top_t = s.amax(-1, True), t.amax(-1, True)
    s, t = torch.sub(s, top_s, out=room[0]), torch.sub(t, top_t, out=room[1])
    same = torch.add(s, t, out=room[2]).amax(-1, True)
    d = torch.sub(s, t, out=room[2]) if setting.divergence in _KLS else s
    early = setting.hard and not halves_of(setting.temperature)
    power = torch.exp(torch.mul(s, setting.temperature, out=room[5]), out=room[5]) if early else None
    es, et = torch.exp(s, out=room[3]), torch.exp(t, out=room[4])
    return _Sums(top_s, top_t, es.sum(-1, True), et.sum(-1, True), same, s, t, d, es, et, power)


def _hard_sum(setting: Setting, sums: _Sums, room: Room) -> tuple[Tensor, Tensor]:
    """The row sum [R, 1] of exp(T * s), and itself."""
    if not setting.hard:
        return sums.zs, sums.es
    power = power_of(halves_of(setting.temperature), sums.es, room[5]) if sums.power is None else sums.power
    return power.sum(-1, True), power


def _kl_visit(
    setting: Setting, student: Tensor, teacher: Tensor, out: Tensor | None, weights: Tensor, room: Room
) -> tuple[Tensor, ...]:
    """KLs: maxima, one pass of sums, one for the gradient; two exponentials a pair of logits. Eight columns [R, 1]."""
    sums = _sums(setting, student, teacher, room)
    d, forward, reverse = sums.d, sums.zs, sums.zs
    if setting.divergence != "reverse_kl":
        forward = torch.mul(sums.et, d, out=room[6]).sum(-1, True)
    if setting.divergence != "forward_kl":
        d = torch.mul(sums.es, d, out=room[2])
        reverse = d.sum(-1, True)
    zh, power = _hard_sum(setting, sums, room)
    if out is not None:
        stats = sums.zs, sums.zt, reverse
        gradient = _kl_gradient(setting, d, sums.es, sums.et, stats, weights[:, :1], room)
        _write(setting, gradient, power, weights[:, 1:] / zh, out, room)
    return *sums[:5], zh, forward, reverse


def _mixture_visit(
    setting: Setting, student: Tensor, teacher: Tensor, out: Tensor | None, weights: Tensor, room: Room
) -> tuple[Tensor, ...]:
    """Divergences to a mixture, whose terms need the normalised p and q: one more pass. Eight columns [R, 1]."""
    sums = _sums(setting, student, teacher, room)
    zh, power = _hard_sum(setting, sums, room)
    q, p = torch.mul(sums.es, 1 / sums.zs, out=room[3]), torch.mul(sums.et, 1 / sums.zt, out=room[4])
    total, mean, h = _mixture_terms(setting, sums.s, sums.t, q, p, room)
    if out is not None:
        gradient = torch.mul(torch.addcmul(h, q, mean, value=-1, out=room[0]), weights[:, :1], out=room[0])
        _write(setting, gradient, power, weights[:, 1:] / zh, out, room)
    return *sums[:5], zh, total, mean


def _write(setting: Setting, gradient: Tensor, power: Tensor, weight: Tensor, out: Tensor, room: Room) -> None:
    """The gradient with that of the hard loss, weight * exp(T * s), into `out`."""
    if not setting.hard:
        out.copy_(gradient)
    elif out.dtype == gradient.dtype:
        torch.addcmul(gradient, power, weight, out=out)
    else:
        out.copy_(torch.addcmul(gradient, power, weight, out=gradient))


def visit(
    setting: Setting,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    *,
    gradient: bool,
    compiled: bool,
) -> Rows:
    """Losses of a tile's rows; with `gradient`, the student's tile is overwritten by dL/d(student's logits over T).

    Args:
        setting: what is computed.
        student, teacher: logits over T [R, V], float32, float64, bfloat16 or float16; finite.
        weights: [R, 2] in float32 or wider: L = sum over rows of weights[:, 0] * D + weights[:, 1] / T * hard.
        labels: [R] class ids, -100 where there is none; None without hard loss. A row with any other label has a hard
            loss of NaN, and a gradient of NaN where the hard loss weighs.
        compiled: the whole tile by the Triton kernel (CUDA) or the C code where these are, else blocks of rows.

    Returns:
        `Rows`; `hard` is 0 in rows without a label.
    """
    if compiled and student.is_cuda:
        from ..kernels.tile_triton import has_triton, visit_on_device

        if has_triton(student):
            return Rows(*visit_on_device(setting, student, teacher, weights, labels, gradient=gradient))
    wrong = None
    if labels is not None:
        labels, weights, wrong = without_wrong(labels, weights, student.shape[1])
    # Not gather and scatter_: on CPU, theirs visit the whole tile in bfloat16.
    index = None if labels is None else (torch.arange(len(labels), device=labels.device), labels.clamp(min=0))
    at_label = None if index is None else (student[index].unsqueeze(1), teacher[index].unsqueeze(1))
    if compiled and can_compile(student, teacher):
        stats = visit_on_cpu(setting, halves_of(setting.temperature), student, teacher, weights, gradient=gradient)
    else:
        stats = _run_in_blocks(setting, student, teacher, weights, gradient)
    top_s, top_t, zs, zt, same, zh = stats[:6]
    if setting.divergence in _KLS:
        ratio = (zs / zt).log()
        soft = 0 * zs
        if setting.divergence != "reverse_kl":
            soft = soft - stats[6] / zt + ratio
        if setting.divergence != "forward_kl":
            soft = soft + stats[7] / zs - ratio
    else:
        soft = _mixture_divergence(setting, zs, zt, *stats[6:])
    hard = 0 * soft
    if at_label is not None and index is not None and labels is not None:
        labelled = labels.unsqueeze(1) >= 0
        s, t = (z.to(zs.dtype) - top for z, top in zip(at_label, (top_s, top_t), strict=True))
        hard = torch.where(labelled, zh.log() - setting.temperature * s, 0.0)
        if gradient:
            at = _gradient_at(setting, s, t, stats, weights[:, :1])
            at = at + (torch.exp(s * setting.temperature) / zh - 1) * weights[:, 1:]
            student[index] = torch.where(labelled.squeeze(1), at.squeeze(1).to(student.dtype), student[index])
    if wrong is not None:
        hard = torch.where(wrong.unsqueeze(1), torch.nan, hard)
    return Rows(soft.squeeze(1), hard.squeeze(1), same.squeeze(1) == 0)


def without_wrong(labels: Tensor, weights: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(labels of which the wrong ones are none, weights [R, 2] that are NaN for these where the hard loss weighs, which
    rows are wrong)."""
    wrong = wrong_labels(labels, classes)
    soft, hard = weights.unbind(1)
    weights = torch.stack((soft, hard.masked_fill(wrong & (hard != 0), torch.nan)), 1)
    return labels.masked_fill(wrong, IGNORE_INDEX), weights, wrong


_KLS = ("forward_kl", "reverse_kl", "symmetric_kl")


def _gradient_at(setting: Setting, s: Tensor, t: Tensor, stats: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    """weight * dD/ds at single classes [R, 1], unrounded: at the label, 1 - q may be less than the tile can hold."""
    zs, zt = stats[2:4]
    es, et = s.exp(), t.exp()
    if setting.divergence in _KLS:
        return _kl_gradient(setting, es * (s - t), es, et, (zs, zt, stats[7]), weight, _NO_ROOM)
    q = es / zs
    return (_mixture_terms(setting, s, t, q, et / zt, _NO_ROOM)[2] - q * stats[7]) * weight


def _run_in_blocks(
    setting: Setting, student: Tensor, teacher: Tensor, weights: Tensor, gradient: bool
) -> tuple[Tensor, ...]:
    block = block_rows(student)
    tensors, rooms = _room(setting)
    memory = torch.empty(tensors, block, student.shape[1], dtype=weights.dtype, device=student.device)
    room: Room = tuple(memory[i] for i in rooms)
    stats, way = [], _kl_visit if setting.divergence in _KLS else _mixture_visit
    for s, t, w in zip(*(x.split(block) for x in (student, teacher, weights)), strict=True):
        if len(s) < block:
            room = tuple(x if x is None else x[: len(s)] for x in room)
        stats.append(way(setting, s, t, s if gradient else None, w, room))
    return stats[0] if len(stats) == 1 else tuple(torch.cat(column) for column in zip(*stats, strict=True))


def block_rows(tile: Tensor) -> int:
    """Rows of a tile that are visited at once where nothing is compiled."""
    size, threads = _LARGE_BLOCK_BYTES, 1
    if tile.device.type == "cpu":
        threads = torch.get_num_threads()
        size = _BLOCK_BYTES * threads
    block = min(tile.shape[0], max(1, size // (4 * tile.shape[1])))
    return block - (block % threads if block > threads else 0)  # whole rows for each thread


def _room(setting: Setting) -> tuple[int, tuple[int, ...]]:
    """How many tensors an uncompiled visit holds, and which of them is used for what in `Room`."""
    if setting.divergence not in _KLS:
        return 6, (0, 1, 2, 3, 4, 5, 0)
    # A KL needs of s and t only their difference: their exponentials take their place. Where exp(T * s) is made of es,
    # it is made so late that it takes the place of what is read no more: et (d's product in forward KL).
    free = {"forward_kl": 2, "reverse_kl": 1}.get(setting.divergence)
    if free is None:
        return 5, (0, 1, 2, 0, 1, 3, 4)
    return (3, (0, 1, 2, 0, 1, free, 2)) if halves_of(setting.temperature) else (4, (0, 1, 2, 0, 1, 3, 2))


# Logits of a tile; below it compiling may take longer than it will ever save.
_PAYS_FROM = {"cpu": PAYS_FROM, "cuda": 2**22}


def compile_pays(
    setting: Setting,
    rows: int,
    columns: int,
    like: Tensor,
    asked: bool | None,
    *,
    agrees: Callable[..., bool] | None = None,
) -> bool:
    """Whether to visit compiled: as asked, or where a compiler is at hand and the tile is large.

    The first time for a setting the compiled visit is compared with the plain one on a small tile, by `agrees`.
    """
    device = like.device.type
    if asked is False or like.dtype == torch.float64 or (device != "cuda" and not can_compile(like)):
        return False
    if asked is None and rows * columns < _PAYS_FROM[device]:
        return False
    if not (setting.hard and halves_of(setting.temperature)):
        setting = setting._replace(temperature=1.3)  # one code for all of them: a schedule compares once
    return (agrees or _agrees)(setting, columns, like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def _agrees(setting: Setting, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    tiles = (4 * torch.randn(2, 6, columns, generator=generator)).to(device, dtype)
    labels = torch.tensor([0, -100, columns - 1, 1, 2, 3], device=device) if setting.hard and columns > 4 else None
    weights = torch.tensor([[0.5, 0.25]], device=device).repeat(6, 1)

    def run(compiled: bool) -> tuple[Tensor, ...]:
        student = tiles[0].clone()
        rows = visit(setting, student, tiles[1], weights, labels, gradient=True, compiled=compiled)
        return student.float(), rows.soft.float(), rows.hard.float()

    return same_compiled(run, dtype)


def same_compiled(run: Callable[[bool], tuple[Tensor, ...]], dtype: torch.dtype) -> bool:
    """Whether `run(True)`, compiled, gives what `run(False)` gives; a warning says so where it does not."""
    try:
        results = [run(compiled) for compiled in (False, True)]
    except Exception as error:  # compilers fail in many ways
        warn(logger, "The loss runs uncompiled: compiling it failed with %s.", str(error).splitlines()[:1])
        return False
    room = 1e-4 if dtype == torch.float32 else 2e-2
    pairs = zip(*results, strict=True)
    if all(torch.allclose(a, b, rtol=room, atol=room * float(a.abs().max())) for a, b in pairs):
        return True
    warn(logger, "The loss runs uncompiled: what the compiler made of it differs from the plain computation.")
    return False
