"""One visit to a tile of both models' logits: the losses of its rows, and the gradient over the student's tile.

The elementwise middle of `fused_linear.py`, which brings the tiles and multiplies the gradient on. Each function here
is plain torch; it runs as it stands on blocks of rows that stay in the processor's cache, or compiled on whole tiles.
Letters: R rows, V vocabulary; s, t logits of student and teacher over T [R, V] less their row's maximum; es, et their
exponentials; zs, zt the row sums of these; q = es/zs, p = et/zt.
Imports: visit_triton (on use).
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Bytes of one tile's rows in a block of the uncompiled visit: its temporaries then stay in a core's cache.
_BLOCK_BYTES = 2**19


class Rows(NamedTuple):
    """What a visit says of each row [R], in float32 or wider."""

    soft: Tensor  # D(p, q), nats, without T^2
    hard: Tensor  # cross-entropy at temperature 1, nats; 0 without a label
    same: Tensor  # bool: whether a class is on top in both


class Setting(NamedTuple):
    """What a visit computes; hashable, one compiled function each."""

    divergence: str
    beta: float
    temperature: float
    hard: bool


def _power(setting: Setting, es: Tensor, s: Tensor, temperature: Tensor) -> Tensor:
    """exp(T * s) from es = exp(s): by multiplications where 2T is a small whole number."""
    halves = _halves(setting.temperature)
    if not halves:
        return (s * temperature).exp()
    power = es.sqrt() if halves % 2 else None
    for _ in range(halves // 2):
        power = es if power is None else power * es
    return es if power is None else power


def _halves(temperature: float) -> int:
    """2T where it is a whole number up to 8, else 0."""
    return int(2 * temperature) if 2 * temperature in range(1, 9) else 0


def _kl_gradient(setting: Setting, s: Tensor, t: Tensor, es: Tensor, et: Tensor, stats: tuple[Tensor, ...]) -> Tensor:
    """dD/ds of forward, reverse or symmetric KL; stats: 1/zs, 1/zt, sum of q (s - t)."""
    iz_s, iz_t, mean = stats
    if setting.divergence == "forward_kl":
        return es * iz_s - et * iz_t
    if setting.divergence == "reverse_kl":
        return es * iz_s * ((s - t) - mean)
    return es * iz_s * ((s - t) - mean + 1) - et * iz_t


def _mixture_terms(setting: Setting, s: Tensor, t: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """(value, h) per element: D = sum of value, h = dD/dlog q where log q is taken as free; dD/ds = h - q * sum(h).

    s and t stand for log q and log p: what they lack, log zs and log zt, is a constant of the row that `_lacking` knows
    and that falls out of the gradient.
    """
    b, name = setting.beta, setting.divergence
    if name == "total_variation":
        return 0.5 * (p - q).abs(), 0.5 * (q - p).sign() * q
    tiny = torch.finfo(p.dtype).tiny
    if name == "jsd":
        log_m = (b * p + (1 - b) * q).clamp(min=tiny).log()
        of_q = (1 - b) * q * (s - log_m)
        return b * p * (t - log_m) + of_q, of_q
    if name == "skew_forward_kl":
        m = (b * p + (1 - b) * q).clamp(min=tiny)
        return p * (t - m.log()), -(1 - b) * p * q / m
    assert name == "skew_reverse_kl"
    m = (b * q + (1 - b) * p).clamp(min=tiny)
    value = q * (s - m.log())
    return value, value + q - b * q * q / m


def _lacking(setting: Setting, zs: Tensor, zt: Tensor) -> Tensor:
    """What the sum of `_mixture_terms`' values has too much."""
    b = setting.beta
    of_q, of_p = {"jsd": (1 - b, b), "skew_forward_kl": (0, 1), "skew_reverse_kl": (1, 0)}.get(
        setting.divergence, (0, 0)
    )
    return of_q * zs.log() + of_p * zt.log()


def _sums(
    setting: Setting, student: Tensor, teacher: Tensor, temperature: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor, Tensor]:
    """What every divergence begins with, in float32 or wider: six columns [R, 1], and s, t, es, et [R, V].

    The columns: both maxima, zs, zt, sum of exp(T * s), and 0 where a class is on top in both.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    top_s, top_t = student.to(wide).amax(-1, True), teacher.to(wide).amax(-1, True)
    s, t = student.to(wide) - top_s, teacher.to(wide) - top_t
    es, et = s.exp(), t.exp()
    zs, zt = es.sum(-1, True), et.sum(-1, True)
    zh = _power(setting, es, s, temperature).sum(-1, True) if setting.hard else zs
    return (top_s, top_t, zs, zt, zh, (s + t).amax(-1, True)), s, t, es, et


def _kl_visit(
    setting: Setting, student: Tensor, teacher: Tensor, out: Tensor | None, weights: Tensor, temperature: Tensor
) -> tuple[Tensor, ...]:
    """KLs: maxima, one pass of sums, one for the gradient; two exponentials a pair of logits. Eight columns [R, 1]."""
    sums, s, t, es, et = _sums(setting, student, teacher, temperature)
    _, _, zs, zt, zh, _ = sums
    # Row sums are returned as they are: a division of rows between the passes would part the compiled loops.
    forward = (et * (t - s)).sum(-1, True) if setting.divergence != "reverse_kl" else zs
    reverse = (es * (s - t)).sum(-1, True) if setting.divergence != "forward_kl" else zs
    if out is not None:
        gradient = _kl_gradient(setting, s, t, es, et, (1 / zs, 1 / zt, reverse / zs)) * weights[:, :1]
        if setting.hard:
            gradient = gradient + _power(setting, es, s, temperature) * (weights[:, 1:] / zh)
        out.copy_(gradient)
    return *sums, forward, reverse


def _mixture_visit(
    setting: Setting, student: Tensor, teacher: Tensor, out: Tensor | None, weights: Tensor, temperature: Tensor
) -> tuple[Tensor, ...]:
    """Divergences to a mixture, whose terms need the normalised p and q: one more pass. Eight columns [R, 1]."""
    sums, s, t, es, et = _sums(setting, student, teacher, temperature)
    _, _, zs, zt, zh, _ = sums
    q = es * (1 / zs)
    value, h = _mixture_terms(setting, s, t, q, et * (1 / zt))
    total, mean = value.sum(-1, True), h.sum(-1, True)
    if out is not None:
        gradient = (h - q * mean) * weights[:, :1]
        if setting.hard:
            gradient = gradient + _power(setting, es, s, temperature) * (weights[:, 1:] / zh)
        out.copy_(gradient)
    return *sums, total, mean


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
        labels: [R] class ids, -100 where there is none; None without hard loss.
        compiled: the whole tile by the Triton kernel (CUDA) or `torch.compile`, else blocks of rows as they are.

    Returns:
        `Rows`; `hard` is 0 in rows without a label.
    """
    if compiled and student.is_cuda:
        from .visit_triton import has_triton, visit_on_device

        if has_triton(student):
            return Rows(*visit_on_device(setting, student, teacher, weights, labels, gradient=gradient))
    # Not gather and scatter_: on CPU, theirs visit the whole tile in bfloat16.
    index = None if labels is None else (torch.arange(len(labels), device=labels.device), labels.clamp(min=0))
    at_label = None if index is None else (student[index].unsqueeze(1), teacher[index].unsqueeze(1))
    run = _run_compiled if compiled and student.shape[0] > 1 else _run_in_blocks
    temperature = weights.new_full((), setting.temperature)
    stats = run(setting, student, teacher, weights, temperature, gradient)
    top_s, top_t, zs, zt, zh, same = stats[:6]
    if setting.divergence in _KLS:
        ratio = (zs / zt).log()
        soft = 0 * zs
        if setting.divergence != "reverse_kl":
            soft = soft + stats[6] / zt + ratio
        if setting.divergence != "forward_kl":
            soft = soft + stats[7] / zs - ratio
    else:
        soft = stats[6] - _lacking(setting, zs, zt)
    hard = 0 * soft
    if at_label is not None and index is not None and labels is not None:
        labelled = labels.unsqueeze(1) >= 0
        s, t = (z.to(zs.dtype) - top for z, top in zip(at_label, (top_s, top_t), strict=True))
        hard = torch.where(labelled, zh.log() - setting.temperature * s, 0.0)
        if gradient:
            at = _gradient_at(setting, s, t, stats) * weights[:, :1]
            at = at + (_power(setting, s.exp(), s, temperature) / zh - 1) * weights[:, 1:]
            student[index] = torch.where(labelled.squeeze(1), at.squeeze(1).to(student.dtype), student[index])
    return Rows(soft.squeeze(1), hard.squeeze(1), same.squeeze(1) == 0)


_KLS = ("forward_kl", "reverse_kl", "symmetric_kl")


def _gradient_at(setting: Setting, s: Tensor, t: Tensor, stats: tuple[Tensor, ...]) -> Tensor:
    """dD/ds at single classes [R, 1], unrounded: at the label, 1 - q may be far smaller than the tile can hold."""
    zs, zt = stats[2:4]
    es, et = s.exp(), t.exp()
    if setting.divergence in _KLS:
        return _kl_gradient(setting, s, t, es, et, (1 / zs, 1 / zt, stats[7] / zs))
    q = es / zs
    _, h = _mixture_terms(setting, s, t, q, et / zt)
    return h - q * stats[7]


def _way(setting: Setting) -> Callable[..., tuple[Tensor, ...]]:
    return _kl_visit if setting.divergence in _KLS else _mixture_visit


def _run_in_blocks(
    setting: Setting, student: Tensor, teacher: Tensor, weights: Tensor, temperature: Tensor, gradient: bool
) -> Any:
    block = max(1, _BLOCK_BYTES // (4 * student.shape[1])) if student.device.type == "cpu" else student.shape[0]
    stats = []
    for start in range(0, student.shape[0], block):
        s, t, w = (x[start : start + block] for x in (student, teacher, weights))
        stats.append(_way(setting)(setting, s, t, s if gradient else None, w, temperature))
    return stats[0] if len(stats) == 1 else tuple(torch.cat(column) for column in zip(*stats, strict=True))


def _run_compiled(
    setting: Setting, student: Tensor, teacher: Tensor, weights: Tensor, temperature: Tensor, gradient: bool
) -> Any:
    for tensor in (student, teacher, weights):
        torch._dynamo.mark_dynamic(tensor, 0)
    out = None
    if gradient:
        # The same memory under a second name: every element is read before it is written, but the compiler, knowing
        # that both are one, would keep a copy of the tile.
        out = torch.from_dlpack(student)
        torch._dynamo.mark_dynamic(out, 0)
    setting = _compiled_for(setting)
    with torch._dynamo.config.patch(recompile_limit=64):  # each setting, dtype and vocabulary counts as one
        return _compiled(setting)(setting, student, teacher, out, weights, temperature)


def _compiled_for(setting: Setting) -> Setting:
    """The setting without a temperature that is no constant of the code: a schedule must not compile at every step."""
    if setting.hard and not _halves(setting.temperature):
        return setting._replace(temperature=0.0)
    return setting if setting.hard else setting._replace(temperature=1.0)


@functools.lru_cache(maxsize=64)
def _compiled(setting: Setting) -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_way(setting), dynamic=False)


_PAYS_FROM = 2**22  # logits of a tile; below it compiling may take longer than it will ever save


def compile_pays(setting: Setting, rows: int, columns: int, like: Tensor, asked: bool | None) -> bool:
    """Whether to visit compiled: as asked, or where a compiler is at hand and the tile is large.

    The first time for a setting the compiled visit is compared with the plain one on a small tile.
    """
    if asked is False or like.dtype == torch.float64 or rows < 2:
        return False
    if asked is None and (rows * columns < _PAYS_FROM or not _has_compiler(like.device.type)):
        return False
    return _agrees(_compiled_for(setting), columns, like.dtype, like.device)


@functools.lru_cache(maxsize=4)
def _has_compiler(device: str) -> bool:
    return device == "cuda" or any(shutil.which(name) for name in ("g++", "clang++", "cl"))


@functools.lru_cache(maxsize=64)
def _agrees(setting: Setting, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    tiles = (4 * torch.randn(2, 6, columns, generator=generator)).to(device, dtype)
    labels = torch.tensor([0, -100, columns - 1, 1, 2, 3], device=device) if setting.hard and columns > 4 else None
    weights = torch.tensor([[0.5, 0.25]], device=device).repeat(6, 1)
    results = []
    setting = setting if setting.temperature else setting._replace(temperature=1.3)
    try:
        for compiled in (False, True):
            student = tiles[0].clone()
            rows = visit(setting, student, tiles[1], weights, labels, gradient=True, compiled=compiled)
            results.append((student.float(), rows.soft, rows.hard))
    except Exception as error:  # compilers fail in many ways
        logger.warning("The loss runs uncompiled: torch.compile failed with %s.", str(error).splitlines()[:1])
        return False
    room = 1e-4 if dtype == torch.float32 else 2e-2
    pairs = zip(*results, strict=True)
    if all(torch.allclose(a, b, rtol=room, atol=room * float(a.abs().max())) for a, b in pairs):
        return True
    logger.warning("The loss runs uncompiled: what torch.compile made of it differs from the plain computation.")
    return False
