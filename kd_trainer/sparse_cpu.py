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

_MOST = 1024  # ids of a row to be put in order: each is compared with each


def top_k_on_cpu(rows: Tensor, k: int, temperature: float, column: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """ids int64 and log_probs [R, k], log_tail [R], float32, of logits [R, V]; None: it is to be done in torch.

    Args:
        column: ids of a column at most, as in `sparse.py`.
    """
    count, classes = rows.shape
    code = _code_for(rows) if k <= _MOST else None
    if code is None:
        return None
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    # Of more columns than ids are kept, so that the ones with the largest maxima hold few other ids.
    columns = min(classes, max(-(-classes // column), 4 * k))
    most = max((2 * k + 32) * -(-classes // columns) + 16, columns)  # as the C code says
    threads = torch.get_num_threads()
    ids, log_probs = torch.empty(count, k, dtype=torch.int64), torch.empty(count, k)
    log_tail, room = torch.empty(count), torch.empty(threads, columns + 5 * most)
    done = call(
        code.top_k, rows, count, classes, rows.stride(0), columns, k, most, float(temperature), ids, log_probs,
        log_tail, room, threads,
    )  # fmt: skip
    return (ids, log_probs, log_tail) if done else None


def draw_on_cpu(
    rows: Tensor, n: int, temperature: float, uniform: Tensor, column: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """ids int64 [R, n], top int64 and entropy float32 [R], of logits [R, V]; None: it is to be done in torch.

    Args:
        uniform: [R], float64.
        column: ids of a column at most, as in `sparse.py`: the same draws come out.
    """
    count, classes = rows.shape
    code = _code_for(rows)
    if code is None:
        return None
    rows, uniform = rows if rows.stride(1) == 1 else rows.contiguous(), uniform.contiguous()
    columns, threads = -(-classes // column), torch.get_num_threads()
    size = columns + (-(-classes // columns) * columns + 3 * n + 1) // 2  # as the C code says
    ids, top = torch.empty(count, n, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    entropy, room = torch.empty(count), torch.empty(threads, size, dtype=torch.float64)
    done = call(
        code.draw, rows, count, classes, rows.stride(0), columns, n, float(temperature), uniform, ids, top, entropy,
        room, size, threads,
    )  # fmt: skip
    return (ids, top, entropy) if done else None


def pack_on_cpu(ids: Tensor, bits: int, like: Tensor) -> Tensor | None:
    """uint8 [R, bytes] of ids int64 [R, k], little endian, `bits` each; None: it is to be done in numpy.

    Args:
        like: the logits that they are of: their top-k or draws had the code compiled.
    """
    code = _code_for(like)
    if code is None:
        return None
    count, k = ids.shape
    packed = torch.empty(count, -(-k * bits // 8), dtype=torch.uint8)
    call(code.pack, ids.contiguous(), count, k, bits, packed.shape[1], packed, torch.get_num_threads())
    return packed


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
