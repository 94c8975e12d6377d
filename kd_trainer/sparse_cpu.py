"""`sparse.py` on a processor with a C compiler: `sparse_cpu.c`, which reads each row while it is in the cache."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import warn
from .native import PAYS_FROM, TYPES, call, can_compile, compiled

logger = logging.getLogger(__name__)

_COLUMN = 32  # ids of a column, at most
_COLUMNS = 16  # of them at least, where there are as many ids: as many as a vector holds
INTEGERS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.int64}  # by their bits
_MOST = 1024  # ids of a row to be put in order: each is compared with each


def top_k_room(count: int, k: int, *, bits: int = 64, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Columns [count, width] that `top_k_on_cpu` fills: ids, log_probs and log_tail.

    Args:
        bits: of an id; ids that are no integers of torch are packed: uint8 [count, bytes], little endian.
        dtype: of log_probs and log_tail, float32 or float16. With uint8 log_probs are steps from the last, 0, to the
            first, 255, and a column `range` has those two, in float16, as is log_tail.
    """
    coded = dtype == torch.uint8
    wide = torch.float16 if coded else dtype
    columns = {"ids": _room_for_ids(count, k, bits), "log_tail": torch.empty(count, 1, dtype=wide)}
    columns["log_probs"] = torch.empty(count, k, dtype=dtype)
    return columns | ({"range": torch.empty(count, 2, dtype=wide)} if coded else {})


def top_k_on_cpu(rows: Tensor, k: int, temperature: float, out: Mapping[str, Tensor], *, bits: int = 64) -> bool:
    """What `top_k_room` says, of logits [R, V], into `out`; False: it is to be done in torch."""
    code = _code_for(rows) if k <= min(_MOST, rows.shape[1]) else None
    if code is None:
        return False
    rows, threads = rows if rows.stride(1) == 1 else rows.contiguous(), torch.get_num_threads()
    count, classes = rows.shape
    # Of more columns than ids are kept, so that the ones with the largest maxima hold few other ids.
    columns = min(classes, max(-(-classes // _COLUMN), 4 * k))
    most = max((2 * k + 32) * -(-classes // columns), 4 * k + 144, columns) + 16  # as the C code says
    room = torch.empty(threads, k + (k + columns + 5 * most + 1) // 2, dtype=torch.float64)
    done = call(
        code.top_k, rows, count, classes, rows.stride(0), columns, k, most, float(temperature), bits,
        out["ids"].stride(0) * out["ids"].itemsize, out["ids"], 8 * out["log_probs"].itemsize, out["log_probs"],
        out.get("range", out["log_tail"]), out["log_tail"], room, room.shape[1], threads,
    )  # fmt: skip
    return bool(done)


def draw_room(count: int, n: int, *, bits: int = 64) -> dict[str, Tensor]:
    """Columns [count, width] that `draw_on_cpu` fills: ids and top of so many bits each, entropy float32."""
    ids, top = _room_for_ids(count, n, bits), _room_for_ids(count, 1, bits)
    return {"ids": ids, "top": top, "entropy": torch.empty(count, 1)}


def draw_on_cpu(
    rows: Tensor, n: int, temperature: float, uniform: Tensor, out: Mapping[str, Tensor], *, bits: int = 64
) -> bool:
    """What `draw_room` says, of logits [R, V], into `out`; False: it is to be done in torch.

    Args:
        uniform: [R] in [0, 1).
    """
    code = _code_for(rows)
    if code is None:
        return False
    rows, uniform = rows if rows.stride(1) == 1 else rows.contiguous(), uniform.double().contiguous()
    count, classes = rows.shape
    columns, threads = max(_COLUMNS, columns_of(classes)), torch.get_num_threads()
    size = 2 * n + columns + 1 + ((-(-classes // columns) + 1) * columns + 3 * n + 1) // 2  # as the C code says
    room = torch.empty(threads, size, dtype=torch.float64)
    ids, top = out["ids"], out["top"]
    done = call(
        code.draw, rows, count, classes, rows.stride(0), columns, n, float(temperature), uniform, bits,
        ids.stride(0) * ids.itemsize, ids, top.stride(0) * top.itemsize, top, out["entropy"], room, size, threads,
    )  # fmt: skip
    return bool(done)


def columns_of(classes: int) -> int:
    """Over how many columns the ids of a row are dealt out, one after the other."""
    return min(classes, max(_COLUMNS, -(-classes // _COLUMN)))


def _room_for_ids(count: int, k: int, bits: int) -> Tensor:
    dtype = INTEGERS.get(bits)
    if dtype is None:
        return torch.empty(count, -(-k * bits // 8), dtype=torch.uint8)
    return torch.empty(count, k, dtype=dtype)


def _code_for(rows: Tensor) -> Any:
    """None where torch is to do it."""
    return _code(rows.dtype) if rows.numel() >= PAYS_FROM and can_compile(rows) else None


@functools.lru_cache(maxsize=4)
def _code(dtype: torch.dtype) -> Any:
    """None, said once, where the compiler fails."""
    try:
        return compiled("sparse_cpu.c", TEACHER=TYPES[dtype])
    except (OSError, RuntimeError) as error:
        warn(logger, "A teacher's top-k and draws are taken in torch: compiling failed with %s.", error)
        return None
