"""`losses/tile.py` on a GPU: one kernel for a tile, which reads both models' logits and leaves the gradient in their
place.

One program a row. It reads the row twice (KLs) or three times (divergences whose terms need p and q normalised), and
of nothing but the row's losses is there a copy in memory. No atomics: equal input gives equal bits. The numbers
are those of `losses/tile.py`, to which the tests hold these.
Letters: s, t logits of student and teacher over T [V] less their row's maximum; es, et their exponentials; zs, zt the
row sums of these; q = es/zs, p = et/zt.
Without triton nothing here but `has_triton` may be called.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton, too, looks once: when a kernel is defined
_INSTALLED = importlib.util.find_spec("triton") is not None
if TYPE_CHECKING or _INSTALLED:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    _jit: Any = triton.jit
    _exp2_of: Any = tl if _INTERPRETED else libdevice  # tl's own takes four instructions more, for results below 1e-38
else:

    def _jit(kernel: Any) -> Any:
        return kernel


TRITON_DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
)
_FORWARD, _REVERSE = ("forward_kl", "symmetric_kl"), ("reverse_kl", "symmetric_kl")


def has_triton(like: Tensor) -> bool:
    """Whether `tile_on_device` can take tiles like this one: on a GPU, or anywhere under Triton's interpreter."""
    if not _INSTALLED or like.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return _INTERPRETED or like.device.type == "cuda"


def tile_on_device(
    setting: Any,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    *,
    gradient: bool,
    lanes: int = 256,
    times: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tile.tile_loss` in one launch: the same arguments, the columns of its `Rows`, label's class included.

    Args:
        setting: a `tile.Setting`. Another temperature or beta is no other kernel, except for T = 1, 2, 3 and 4.
        student, teacher: logits over T [R, V], float32, bfloat16 or float16; finite, or with `setting.excluding` also
            -inf where a class is excluded. Rows may lie apart, as in a slice.
        weights: [R, 2], float32: L = sum over rows of weights[:, 0] * D + weights[:, 1] / T * hard.
        labels: [R] class ids, -100 where there is none; None: none anywhere. A row with any other label has a hard loss
            of NaN, and a gradient of NaN where the hard loss weighs.
        gradient: whether the student's tile is overwritten by dL/d(student's logits over T), in float32 rounded once.
        lanes, times: powers of two; a thread is a lane and holds 16 bytes of the student's row so many times at once.
            With the defaults a thread has 64 to 80 registers: three or four programs at a time on a multiprocessor.

    Returns:
        soft [R] and hard [R], nats, float32; same [R], bool.
    """
    assert student.stride(1) == 1
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    rows, columns = student.shape
    labels = torch.full((rows,), -100, device=student.device) if labels is None else labels
    soft, hard = torch.empty(2, rows, dtype=torch.float32, device=student.device).unbind()
    same = torch.empty(rows, dtype=torch.bool, device=student.device)
    name, temperature = setting.divergence, setting.temperature
    with torch.cuda.device_of(student):
        _tile_kernel[(rows,)](
            student, teacher, weights, labels, soft, hard, same,
            columns, student.stride(0), teacher.stride(0), weights.stride(0), weights.stride(1),
            setting.beta, temperature,
            DIVERGENCE=name, FORWARD=name in _FORWARD, REVERSE=name in _REVERSE,
            HARD=setting.hard, GRADIENT=gradient, EXCLUDING=setting.excluding,
            PRECISE=student.dtype == torch.float32 or _INTERPRETED or torch.version.cuda is None,
            WHOLE=int(temperature) if temperature in (1, 2, 3, 4) else 0,
            LOW_S=_low(student), LOW_T=_low(teacher),
            TIMES=times, LANES=lanes, NEIGHBOURS=16 // student.element_size(), num_warps=max(1, lanes // 32),
        )  # fmt: skip
    return soft, hard, same


def _low(tile: Tensor) -> float:
    """What stands beyond a row's end: no maximum, its exponential 0, and finite, since 0 times it must be 0."""
    return max(torch.finfo(tile.dtype).min, -1e30)


# ---- on the GPU; what is in capitals is known when a kernel is compiled ----------------------------------------------


@_jit
def _tile_kernel(
    student, teacher, weights, labels, soft_out, hard_out, same_out,
    columns, student_stride, teacher_stride, weights_stride, weights_column,
    beta, temperature,
    DIVERGENCE: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr,
    HARD: tl.constexpr, GRADIENT: tl.constexpr, EXCLUDING: tl.constexpr, WHOLE: tl.constexpr, PRECISE: tl.constexpr,
    LOW_S: tl.constexpr, LOW_T: tl.constexpr, TIMES: tl.constexpr, LANES: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows * columns may pass 2^31
    student += row * student_stride
    teacher += row * teacher_stride
    label = -1
    at_label = 0.0
    wrong = False
    if HARD:
        given = tl.load(labels + row).to(tl.int64)
        wrong = (given != -100) & ((given < 0) | (given >= columns))
        label = tl.where(wrong, -1, given).to(tl.int32)  # nothing outside of the row is read
        at_label = tl.load(student + tl.maximum(label, 0)).to(tl.float32)
    top_s, top_t, zs, zt, zh, same, forward, reverse = _sums(
        student, teacher, columns, temperature,
        FORWARD, REVERSE, HARD, EXCLUDING, WHOLE, LOW_S, LOW_T, TIMES, LANES, NEIGHBOURS,
    )  # fmt: skip
    mean = reverse / zs
    soft = 0.0
    if FORWARD:
        soft += forward / zt + tl.log(zs / zt)
    if REVERSE:
        soft += mean - tl.log(zs / zt)
    if not (FORWARD or REVERSE):
        soft, mean = _mixture_sums(
            student, teacher, columns, top_s, top_t, zs, zt, beta,
            DIVERGENCE, EXCLUDING, PRECISE, LOW_S, LOW_T, TIMES, LANES, NEIGHBOURS,
        )  # fmt: skip
    tl.store(soft_out + row, soft)
    hard = tl.where(label >= 0, tl.log(zh) - temperature * (at_label - top_s), 0.0)
    tl.store(hard_out + row, tl.where(wrong, float("nan"), hard))
    tl.store(same_out + row, same == 0)
    if GRADIENT:
        weights += row * weights_stride
        soft_weight = tl.load(weights)
        hard_weight = tl.load(weights + weights_column)
        hard_weight = tl.where(wrong & (hard_weight != 0), float("nan"), hard_weight)
        _write_gradient(
            student, teacher, columns, top_s, top_t, zs, zt, zh, mean, soft_weight, hard_weight, label, at_label,
            beta, temperature,
            DIVERGENCE, FORWARD, REVERSE, HARD, EXCLUDING, WHOLE, PRECISE, LOW_S, LOW_T, TIMES, LANES, NEIGHBOURS,
        )  # fmt: skip


@_jit
def _sums(
    student, teacher, columns, temperature,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, HARD: tl.constexpr, EXCLUDING: tl.constexpr, WHOLE: tl.constexpr,
    LOW_S: tl.constexpr, LOW_T: tl.constexpr, TIMES: tl.constexpr, LANES: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """The first pass, from left to right: maxima, zs, zt, zh, same, sum of et (t - s) and of es (s - t).

    Each lane keeps separate maxima and sums until the end: combining them makes threads wait.
    """
    block = _block(TIMES, LANES, NEIGHBOURS)
    top_s = tl.full([LANES], -1e30, tl.float32)
    top_t = tl.full([LANES], -1e30, tl.float32)
    same = tl.full([LANES], -1e30, tl.float32)
    zs = tl.zeros([LANES], tl.float32)
    zt = tl.zeros([LANES], tl.float32)
    zh = tl.zeros([LANES], tl.float32)
    forward = tl.zeros([LANES], tl.float32)
    reverse = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, columns, TIMES * LANES * NEIGHBOURS, num_stages=3):
        at = start + block
        s = tl.load(student + at, mask=at < columns, other=LOW_S).to(tl.float32)
        t = tl.load(teacher + at, mask=at < columns, other=LOW_T).to(tl.float32)
        risen_s = tl.maximum(top_s, tl.max(tl.max(s, 2), 0))
        risen_t = tl.maximum(top_t, tl.max(tl.max(t, 2), 0))
        zs, zt, zh, same, forward, reverse = _lower(
            zs, zt, zh, same, forward, reverse, top_s - risen_s, top_t - risen_t, temperature, FORWARD, REVERSE
        )
        top_s = risen_s
        top_t = risen_t
        s -= top_s[None, :, None]
        t -= top_t[None, :, None]
        es = _exp(s)
        et = _exp(t)
        zs += _lane_sums(es)
        zt += _lane_sums(et)
        same = tl.maximum(same, tl.max(tl.max(s + t, 2), 0))
        if HARD:
            zh += _lane_sums(_power(es, s, temperature, WHOLE))
        if FORWARD:
            forward += _lane_sums(_times(et, t - s, EXCLUDING))
        if REVERSE:
            reverse += _lane_sums(_times(es, s - t, EXCLUDING))
    highest_s = tl.max(top_s, 0)
    highest_t = tl.max(top_t, 0)
    zs, zt, zh, same, forward, reverse = _lower(
        zs, zt, zh, same, forward, reverse, top_s - highest_s, top_t - highest_t, temperature, FORWARD, REVERSE
    )
    return (
        highest_s, highest_t, tl.sum(zs, 0), tl.sum(zt, 0), tl.sum(zh, 0), tl.max(same, 0),
        tl.sum(forward, 0), tl.sum(reverse, 0),
    )  # fmt: skip


@_jit
def _lower(
    zs, zt, zh, same, forward, reverse, fall_s, fall_t, temperature, FORWARD: tl.constexpr, REVERSE: tl.constexpr
):
    """Sums below maxima, brought below risen ones; a fall is the old maximum less the risen one."""
    keep_s = _exp(fall_s)
    keep_t = _exp(fall_t)
    if FORWARD:
        forward = (forward + (fall_t - fall_s) * zt) * keep_t
    if REVERSE:
        reverse = (reverse + (fall_s - fall_t) * zs) * keep_s
    return zs * keep_s, zt * keep_t, zh * _exp(fall_s * temperature), same + (fall_s + fall_t), forward, reverse


@_jit
def _mixture_sums(
    student, teacher, columns, top_s, top_t, zs, zt, beta,
    DIVERGENCE: tl.constexpr, EXCLUDING: tl.constexpr, PRECISE: tl.constexpr,
    LOW_S: tl.constexpr, LOW_T: tl.constexpr,
    TIMES: tl.constexpr, LANES: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """The pass between, from right to left, where the cache still holds the row: D and the sum of h."""
    block = _block(TIMES, LANES, NEIGHBOURS)
    size = TIMES * LANES * NEIGHBOURS
    last = (columns - 1) // size * size
    total = tl.zeros([LANES], tl.float32)
    mean = tl.zeros([LANES], tl.float32)
    for back in tl.range(0, columns, size, num_stages=3):
        at = last - back + block
        s = tl.load(student + at, mask=at < columns, other=LOW_S).to(tl.float32) - top_s
        t = tl.load(teacher + at, mask=at < columns, other=LOW_T).to(tl.float32) - top_t
        value, h = _mixture_terms(t, s, _exp(t) * (1 / zt), _exp(s) * (1 / zs), beta, DIVERGENCE, EXCLUDING, PRECISE)
        total += _lane_sums(value)
        mean += _lane_sums(h)
    divergence = tl.sum(total, 0)
    if DIVERGENCE == "jsd":
        divergence -= beta * tl.log(zt) + (1 - beta) * tl.log(zs)
    return divergence, tl.sum(mean, 0)


@_jit
def _write_gradient(
    student, teacher, columns, top_s, top_t, zs, zt, zh, mean, soft_weight, hard_weight, label, at_label,
    beta, temperature,
    DIVERGENCE: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr, HARD: tl.constexpr,
    EXCLUDING: tl.constexpr, WHOLE: tl.constexpr, PRECISE: tl.constexpr, LOW_S: tl.constexpr, LOW_T: tl.constexpr,
    TIMES: tl.constexpr, LANES: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """The last pass, from right to left: dL/ds over the student's row, in float32 until it is stored."""
    block = _block(TIMES, LANES, NEIGHBOURS)
    size = TIMES * LANES * NEIGHBOURS
    last = (columns - 1) // size * size
    missing = _power(_exp(at_label - top_s), at_label - top_s, temperature, WHOLE) / zh - 1
    for back in tl.range(0, columns, size, num_stages=3):
        at = last - back + block
        s = tl.load(student + at, mask=at < columns, other=LOW_S).to(tl.float32) - top_s
        t = tl.load(teacher + at, mask=at < columns, other=LOW_T).to(tl.float32) - top_t
        es = _exp(s)
        q = es * (1 / zs)
        p = _exp(t) * (1 / zt)
        if FORWARD and REVERSE:
            gradient = _times(q, s - t - mean + 1, EXCLUDING) - p
        elif FORWARD:
            gradient = q - p
        elif REVERSE:
            gradient = _times(q, s - t - mean, EXCLUDING)
        else:
            _, h = _mixture_terms(t, s, p, q, beta, DIVERGENCE, EXCLUDING, PRECISE)
            gradient = h - q * mean
        gradient *= soft_weight
        if HARD:
            gradient += tl.where(at == label, missing, _power(es, s, temperature, WHOLE) * (1 / zh)) * hard_weight
        tl.store(student + at, gradient.to(student.dtype.element_ty), mask=at < columns)


@_jit
def _block(TIMES: tl.constexpr, LANES: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Places [TIMES, LANES, NEIGHBOURS] in a row: a lane, which is a thread, loads neighbours at once."""
    lanes = tl.arange(0, TIMES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return lanes[:, :, None] * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, None, :]


@_jit
def _lane_sums(x):
    return tl.sum(tl.sum(x, 2), 0)


@_jit
def _times(probability, difference, EXCLUDING: tl.constexpr):
    """Their product, where 0 times the infinite difference of an excluded class is 0."""
    product = probability * difference
    if EXCLUDING:
        product = tl.where(probability == 0, 0.0, product)
    return product


@_jit
def _mixture_terms(t, s, p, q, beta, DIVERGENCE: tl.constexpr, EXCLUDING: tl.constexpr, PRECISE: tl.constexpr):
    """(value, h) as in `losses/tile.py`: s and t stand for log q and log p; dD/ds = h - q * sum(h)."""
    tiny = 1.1754943508222875e-38  # keeps log finite where p and q are both 0
    if DIVERGENCE == "total_variation":
        value = 0.5 * tl.abs(p - q)
        h = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    elif DIVERGENCE == "jsd":
        log_m = _log(tl.maximum(beta * p + (1 - beta) * q, tiny), PRECISE)
        h = _times((1 - beta) * q, s - log_m, EXCLUDING)
        value = _times(beta * p, t - log_m, EXCLUDING) + h
    elif DIVERGENCE == "skew_forward_kl":
        share = p / tl.maximum(beta * p + (1 - beta) * q, tiny)
        value = p * _log(tl.maximum(share, tiny), PRECISE)
        h = -(1 - beta) * q * share
    else:
        tl.static_assert(DIVERGENCE == "skew_reverse_kl")
        share = q / tl.maximum(beta * q + (1 - beta) * p, tiny)
        log_share = _log(tl.maximum(share, tiny), PRECISE)
        value = q * log_share
        h = q * (log_share + (1 - beta * share))
    return value, h


@_jit
def _power(es, s, temperature, WHOLE: tl.constexpr):
    """exp(T * s) from es = exp(s): by multiplications where T is a small whole number."""
    if WHOLE == 0:
        power = _exp(s * temperature)
    else:
        power = es
        for _ in tl.static_range(1, WHOLE):
            power = power * es
    return power


@_jit
def _exp(x):
    return _exp2_of.exp2(x * 1.4426950408889634)


@_jit
def _log(x, PRECISE: tl.constexpr):
    """The short form, NVIDIA's, errs by up to 2e-7 where x is near 1; that is far below the rounding of a half tile."""
    return tl.log(x) if PRECISE else libdevice.fast_log2f(x) * 0.6931471805599453
