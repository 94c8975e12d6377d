"""The logged parts of the loss, from micro-batches to one log line, without waiting for the device at a step.

For: `trainer.py`.
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
        self.exists: list[bool] = []  # for each entry of a row, whether any row had it
        self._device = device
        self._sums: list[Tensor] = []
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Takes the parts of one micro-batch; they are summed up now and then, not at every step."""
        self._rows.append(row)
        known = self.exists or [False] * len(row)
        self.exists = [before or value is not None for before, value in zip(known, row, strict=True)]
        if len(self._rows) == 64:
            self._fold()

    def _fold(self) -> None:
        self._sums.append(as_tensor(self._rows, self._device).sum(0))
        self._rows = []

    def sums(self) -> Tensor | None:
        """Sums over the window, one for each entry of a row; None where nothing was added.

        A part that some rows lack counts 0 there; one that all of them lack is NaN.
        """
        if self._rows:
            self._fold()
        if not self._sums:
            return None
        lacking = torch.tensor([not exists for exists in self.exists], device=self._device)
        return torch.stack(self._sums).sum(0).masked_fill(lacking, math.nan)


# Entries of `Evaluation.sums`: sums before any denominator, and what they are over.
Sums = tuple[Tensor | float | None, ...]  # hard sum, labels, soft sum, agreement sum, rows, router's loss * rows


@dataclass
class Evaluation:
    """The parts of one evaluation, each row once: as upstream weighs its loss, and as sums over this process's rows."""

    # Tasks by position: the parts of every batch and whether they exist, repeated and gathered as upstream's loss is.
    rows: list[Tensor]
    sums: Window  # of `Sums`


def as_tensor(rows: list[Row], device: torch.device) -> Tensor:
    """[N, entries of a row] in float32; 0 where a part does not exist."""
    columns = []
    for column in zip(*rows, strict=True):
        if all(isinstance(value, Tensor) for value in column):
            columns.append(torch.stack(column).to(device, torch.float32))
        else:
            numbers = [0.0 if value is None else float(value) for value in column]
            columns.append(torch.tensor(numbers, device=device))
    return torch.stack(columns, dim=1)


def named(means: list[float], prefix: str, exists: list[float] | None = None) -> dict[str, float]:
    """The parts that exist, by their logged names; a hard loss without any label is none.

    Args:
        exists: for each entry whether any process had it; None where a part that does not exist is NaN.
    """
    hard, soft, agreement, labelled, router = means
    there = [not math.isnan(value) for value in means] if exists is None else [count > 0 for count in exists]
    named = {
        "hard_loss": (hard, there[0] and labelled > 0),
        "soft_loss": (soft, there[1]),
        "aux_loss": (router, there[4]),
        "teacher_agreement": (agreement, there[2]),
    }
    return {prefix + name: value for name, (value, is_there) in named.items() if is_there}


def with_existence(sums: Tensor, exists: list[bool]) -> Tensor:
    """[2, entries]: the sums, 0 where a part does not exist, over whether it exists; so processes can add them up."""
    known = torch.tensor(exists, device=sums.device)
    return torch.stack([sums.masked_fill(~known, 0.0), known.to(sums.dtype)])


def perplexity(hard_sum: float, count: float) -> float:
    """exp(hard_sum / count), nats over tokens; inf where it is too large for a float."""
    try:
        return math.exp(hard_sum / count)
    except OverflowError:
        return math.inf
