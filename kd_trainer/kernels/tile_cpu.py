"""`losses/tile.py` and `losses/tile_sparse.py` on a processor with a C compiler: `tile_cpu.c`, for the divergence at
hand.

`torch.compile` makes loops of one sum at a time, each with calls of an exponential in it: this takes 0.5 to 0.6 times
as long as those, and sums ten times as exactly.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .c_compiler import TYPES, call, compiled

# Those that `tile_cpu.c` has; it is optional: the others are computed in torch.
C_DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
)


def tile_on_cpu(
    setting: Any, halves: int, student: Tensor, teacher: Tensor, weights: Tensor, labels: Tensor | None, *,
    gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`tile.tile_loss`: columns [R], float64, of its `Rows`.

    Args:
        setting: a `tile.Setting`; another beta is no other code, another temperature one for each of `halves`.
        halves: `tile.halves_of` the temperature.
        student, teacher: logits over T [R, V], float32 or bfloat16; finite. Rows may lie apart, as in a slice.
        weights, labels: [R, 2] and [R] or None, as in `tile.tile_loss`.
        gradient: whether the student's tile is overwritten by dL/d(student's logits over T).

    Raises:
        RuntimeError: the compiler failed, with its first line.
    """
    assert student.stride(1) == 1
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    weights = weights.to(torch.float32).contiguous()
    (rows, columns), threads = student.shape, torch.get_num_threads()
    labels = torch.full((rows,), -100) if labels is None else labels.to(torch.int64).contiguous()
    stats = torch.empty(rows, 3, dtype=torch.float64)
    room = torch.empty(threads, 2, columns)
    call(
        _code(setting, halves, student, teacher).dense_tile, student, teacher, rows, columns, student.stride(0),
        teacher.stride(0), labels, weights, float(setting.beta), float(setting.temperature), gradient, stats, room,
        threads,
    )  # fmt: skip
    return stats.unbind(1)


def sums_on_cpu(setting: Any, halves: int, student: Tensor) -> tuple[Tensor, ...]:
    """Of each row of s [R, V] its maximum and the sums of es and exp(T s), relative to it: columns [R, 1], float64."""
    assert student.stride(1) == 1
    (rows, columns), threads = student.shape, torch.get_num_threads()
    stats, room = torch.empty(rows, 3, dtype=torch.float64), torch.empty(threads, 2, columns)
    function = _code(setting, halves, student).sum_tile
    call(function, student, rows, columns, student.stride(0), float(setting.temperature), stats, room, threads)
    return stats.split(1, dim=1)


def sparse_tile_on_cpu(
    setting: Any, halves: int, student: Tensor, ids: Tensor, kept: tuple[Tensor, Tensor] | None, leaders: Tensor,
    labels: Tensor | None, weights: Tensor, gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Forward KL to a teacher of few ids, whole: columns [R], float64, of `tile_sparse.Rows`.

    Args:
        kept: log-probabilities [R, k] of the ids and [R] of all others; None where the ids were drawn: the soft loss is
            then the cross-entropy to them.
        ids, leaders, labels: integers in range; leaders [R] or [R, 1]: the teacher's top; labels [R]: -100 none; any
            other that is no class makes the row NaN.
        weights: [R, 2], as in `tile.tile_loss`.
        gradient: whether the tile s [R, V] is overwritten by dL/ds, else by nothing of use.
    """
    assert student.stride(1) == 1
    (rows, columns), threads = student.shape, torch.get_num_threads()
    stats, room = torch.empty(rows, 3, dtype=torch.float64), torch.empty(threads, 2, columns)
    labels = torch.full_like(leaders, -100) if labels is None else labels
    ids, leaders, labels = (x.to(torch.int64).contiguous() for x in (ids, leaders, labels))
    nothing = torch.empty(0, dtype=torch.float64)  # lies at NULL
    log_probs, log_tail = (nothing, nothing) if kept is None else (x.to(torch.float64).contiguous() for x in kept)
    call(
        _code(setting, halves, student).sparse_tile, student, rows, columns, student.stride(0),
        float(setting.temperature), ids, ids.shape[1], log_probs, log_tail, leaders, labels,
        weights.to(torch.float64).contiguous(), gradient, stats, room, threads,
    )  # fmt: skip
    return stats.unbind(1)


def overwrite_on_cpu(setting: Any, halves: int, student: Tensor, of_rows: Tensor) -> None:
    """Of s [R, V] makes of_rows[:, 1] * es + of_rows[:, 2] * exp(T s), relative to the maximum of_rows[:, 0]."""
    assert student.stride(1) == 1
    of_rows = of_rows.to(torch.float32).contiguous()
    function, threads = _code(setting, halves, student).overwrite_tile, torch.get_num_threads()
    call(function, student, *student.shape, student.stride(0), float(setting.temperature), of_rows, threads)


def _code(setting: Any, halves: int, student: Tensor, teacher: Tensor | None = None) -> ctypes.CDLL:
    """What is compiled for a setting and types; without a teacher's tile no divergence matters."""
    return compiled(
        "tile_cpu.c",
        DIVERGENCE="forward_kl" if teacher is None else setting.divergence,
        HARD=int(setting.hard),
        HALVES=halves if setting.hard else 0,
        STUDENT=TYPES[student.dtype],
        TEACHER=TYPES[student.dtype if teacher is None else teacher.dtype],
    )
