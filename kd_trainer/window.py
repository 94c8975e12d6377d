"""The logged parts of the loss, from micro-batches to one log line, without waiting for the device at a step.

For: `trainer.py`. Imports: torch only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# hard, soft, agreement, the number of labels and the router's loss, detached; None where a part does not exist
Row = tuple[Tensor | float | None, ...]


class Window:
    """The logged parts since the last log, kept on the device: no synchronisation before `sums` is read."""

    def __init__(self, device: torch.device) -> None:
        self.steps = 0  # optimizer steps begun
        self._device = device
        self._sums: list[Tensor] = []
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Takes the parts of one micro-batch; they are summed up now and then, not at every step."""
        self._rows.append(row)
        if len(self._rows) == 64:
            self._fold()

    def _fold(self) -> None:
        self._sums.append(as_tensor(self._rows, self._device).sum(0))
        self._rows = []

    def sums(self) -> Tensor | None:
        """Sums over the window, one for each entry of a row; None where nothing was added."""
        if self._rows:
            self._fold()
        return torch.stack(self._sums).sum(0) if self._sums else None


@dataclass
class Evaluation:
    """The parts of one evaluation: as upstream weighs its loss, and by the token for the perplexity."""

    rows: list[Tensor]  # of every batch, repeated and gathered as upstream does with its loss
    tokens: Window  # of this process: the sum of the hard loss and the number of labels


def as_tensor(rows: list[Row], device: torch.device) -> Tensor:
    """[N, entries of a row] in float32; NaN where a part does not exist."""
    columns = []
    for column in zip(*rows, strict=True):
        if all(isinstance(value, Tensor) for value in column):
            columns.append(torch.stack(column).to(device, torch.float32))
        else:
            numbers = [math.nan if value is None else float(value) for value in column]
            columns.append(torch.tensor(numbers, device=device))
    return torch.stack(columns, dim=1)


def named(means: list[float], prefix: str) -> dict[str, float]:
    """The parts that exist, by their logged names; a hard loss without any label is none."""
    hard, soft, agreement, labelled, router = means
    named = {
        "hard_loss": hard if labelled > 0 else math.nan,
        "soft_loss": soft,
        "aux_loss": router,
        "teacher_agreement": agreement,
    }
    return {prefix + name: value for name, value in named.items() if not math.isnan(value)}


def perplexity(hard_sum: float, count: float) -> float:
    """exp(hard_sum / count), nats over tokens; inf where it is too large for a float."""
    try:
        return math.exp(hard_sum / count)
    except OverflowError:
        return math.inf
