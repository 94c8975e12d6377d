"""`sparse.py` on a processor with a C compiler: `sparse_cpu.c`, which reads each row while it is in the cache.

Imports: native.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from .native import PAYS_FROM, TYPES, call, can_compile, compiled

logger = logging.getLogger(__name__)

COLUMN = 32  # ids of a column, at most
INTEGERS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.int64}  # by their bits
_MOST = 1024  # ids of a row to be put in order: each is compared with each


def top_k_on_cpu(
    rows: Tensor, k: int, temperature: float, *, bits: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor] | None:
    """ids [R, k], log_probs [R, k] and log_tail [R, 1] of logits [R, V]; None: it is to be done in torch.

    Args:
        bits: of an id; ids that are no integers of torch are packed: uint8 [R, bytes], little endian.
        dtype: of log_probs and log_tail, float32 or float16.
    """
    code = _code_for(rows) if k <= min(_MOST, rows.shape[1]) else None
    if code is None:
        return None
    rows, threads = rows if rows.stride(1) == 1 else rows.contiguous(), torch.get_num_threads()
    count, classes = rows.shape
    # Of more columns than ids are kept, so that the ones with the largest maxima hold few other ids.
    columns = min(classes, max(-(-classes // COLUMN), 4 * k))
    most = max((2 * k + 32) * -(-classes // columns), 4 * k + 80, columns) + 16  # as the C code says
    ids, width = _room_for_ids(count, k, bits)
    log_probs, log_tail = torch.empty(count, k, dtype=dtype), torch.empty(count, 1, dtype=dtype)
    room = torch.empty(threads, k + (k + columns + 5 * most + 1) // 2, dtype=torch.float64)
    done = call(
        code.top_k, rows, count, classes, rows.stride(0), columns, k, most, float(temperature), bits, width, ids,
        dtype == torch.float16, log_probs, log_tail, room, room.shape[1], threads,
    )  # fmt: skip
    return (ids, log_probs, log_tail) if done else None


def draw_on_cpu(
    rows: Tensor, n: int, temperature: float, uniform: Tensor, *, bits: int = 64
) -> tuple[Tensor, Tensor, Tensor] | None:
    """ids [R, n], top [R, 1] and entropy float32 [R, 1] of logits [R, V]; None: it is to be done in torch.

    Args:
        uniform: [R] in [0, 1).
        bits: of an id, as in `top_k_on_cpu`.
    """
    code = _code_for(rows)
    if code is None:
        return None
    rows, uniform = rows if rows.stride(1) == 1 else rows.contiguous(), uniform.double().contiguous()
    count, classes = rows.shape
    columns, threads = -(-classes // COLUMN), torch.get_num_threads()
    ids, width = _room_for_ids(count, n, bits)
    top, top_width = _room_for_ids(count, 1, bits)
    entropy = torch.empty(count, 1)
    size = n + columns + (-(-classes // columns) * columns + 3 * n + 1) // 2  # as the C code says
    room = torch.empty(threads, size, dtype=torch.float64)
    done = call(
        code.draw, rows, count, classes, rows.stride(0), columns, n, float(temperature), uniform, bits, width, ids,
        top_width, top, entropy, room, size, threads,
    )  # fmt: skip
    return (ids, top, entropy) if done else None


def _room_for_ids(count: int, k: int, bits: int) -> tuple[Tensor, int]:
    """A tensor for ids [count, k] of so many bits each, and the bytes of a row."""
    width = -(-k * bits // 8)
    dtype = INTEGERS.get(bits)
    room = torch.empty(count, k, dtype=dtype) if dtype else torch.empty(count, width, dtype=torch.uint8)
    return room, width


def _code_for(rows: Tensor) -> Any:
    """None where torch is to do it."""
    return _code(rows.dtype) if rows.numel() >= PAYS_FROM and can_compile(rows) else None


@functools.lru_cache(maxsize=4)
def _code(dtype: torch.dtype) -> Any:
    """None, said once, where the compiler fails."""
    try:
        return compiled("sparse_cpu.c", TEACHER=TYPES[dtype])
    except (OSError, RuntimeError) as error:
        logger.warning("A teacher's top-k and draws are taken in torch: compiling failed with %s.", error)
        return None
