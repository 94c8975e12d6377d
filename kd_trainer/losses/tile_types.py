"""What the tiles of a loss share: rows, settings, and powers of the temperature.

Letters: N positions of a tile, V classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The losses of each row [R] of a tile, in float32 or wider."""

    soft: Tensor  # D(p, q), nats, without T^2
    hard: Tensor  # cross-entropy at temperature 1, nats; 0 without a label
    same: Tensor  # bool: whether a class is on top in both


class Setting(NamedTuple):
    """What a tile's loss computes; hashable."""

    divergence: str
    beta: float
    temperature: float
    hard: bool
    standardized: bool = False  # whether the divergence is that of standardised logits
    excluding: bool = False  # whether logits may be -inf unknown to us, which the Triton kernel alone allows


def power_of(halves: int, es: Tensor, out: Tensor | None = None) -> Tensor:
    """es to the power of halves / 2, by multiplications."""
    power = torch.sqrt(es, out=out) if halves % 2 else None
    for _ in range(halves // 2):
        power = es if power is None else torch.mul(power, es, out=out)
    assert power is not None
    return power if power is not es or out is None else out.copy_(es)


def halves_of(temperature: float) -> int:
    """2T where it is a whole number up to 8, else 0."""
    return int(2 * temperature) if 2 * temperature in range(1, 9) else 0


def widened(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """In float32 or wider, into `out` where it is given."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide) if out is None or logits.dtype == wide else out.copy_(logits)
