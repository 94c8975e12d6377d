"""The logged parts of the loss, from micro-batches to one log line, without waiting for the device at a step.

For: `trainer.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..losses import divide
from ..tasks import Head
from .objective import Counts, Objective

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


class Evaluation:
    """The parts of one evaluation, each row once: as upstream weighs its loss, and as sums over this process's rows."""

    def __init__(self, device: torch.device) -> None:
        self.sums = Window(device)  # of `Sums`
        # Tasks by position: the parts of every batch and whether they exist, repeated and gathered as upstream's loss.
        self.rows: list[Tensor] = []

    def add(self, row: Row, counts: Counts, *, tokenmean: bool) -> None:
        """Takes the parts of one batch as sums again; `tokenmean`: whether they were divided by positions."""
        hard, soft, agreement, labels, router = row
        hard_count, soft_count = (counts.hard_divisor, counts.soft) if tokenmean else (counts.rows, counts.rows)
        sums = (_times(hard, hard_count), labels, _times(soft, soft_count), _times(agreement, counts.soft))
        self.sums.add((*sums, counts.rows, _times(router, counts.rows)))

    def logged(
        self,
        prefix: str,
        accelerator: Any,
        head: Head,
        objective: Objective,
        *,
        own_loss: bool,
        several: bool,
        aux_weight: float | None,
    ) -> dict[str, float]:
        """The parts by their logged names, and `perplexity` where it has a meaning, from the rows of all processes.

        Args:
            objective: with the values at the end of a schedule.
            own_loss: the hard loss is the model's own, with its denominators, and need not be a log-likelihood.
            several: whether there are several processes, of which upstream's loss is no mean over each row once.
            aux_weight: of a mixture of experts' router loss.
        """
        sums = self.sums.sums()
        if sums is None:  # a class in front has a compute_loss that does not call this one
            return {}
        totals, exists = accelerator.reduce(with_existence(sums, self.sums.exists), reduction="sum").tolist()
        hard, labelled, rows = totals[0], totals[1], totals[4]
        by_row = not head.token_level and not own_loss
        if by_row:
            logged = named_by_row(totals, exists, prefix, tokenmean=objective.reduction == "tokenmean")
        else:
            weighed = torch.cat(self.rows).mean(0).tolist()
            logged = named(weighed[:5], prefix, weighed[5:])
        if own_loss:
            return logged
        if several or (by_row and labelled < rows):
            total = objective.mixture(logged.get(f"{prefix}hard_loss"), logged.get(f"{prefix}soft_loss"))
            logged[f"{prefix}loss"] = total + (aux_weight or 0.0) * logged.get(f"{prefix}aux_loss", 0.0)
        if head.over_tokens and objective.label_smoothing == 0 and labelled > 0:
            logged[f"{prefix}perplexity"] = perplexity(hard, labelled)
        return logged


def _times(mean: Tensor | float | None, count: Tensor | float) -> Tensor | float | None:
    """The sum that `divide` made a mean of; None where there is none."""
    return None if mean is None else mean * (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


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


def named_by_row(sums: list[float], exists: list[float], prefix: str, *, tokenmean: bool) -> dict[str, float]:
    """The same of the sums over all rows of an evaluation, whatever the size of its batches."""
    hard, labelled, soft, same, rows, router = sums
    hard_mean = divide(hard, labelled if tokenmean else rows)
    means = [hard_mean, divide(soft, rows), divide(same, rows), labelled, divide(router, rows)]
    return named(means, prefix, [exists[i] for i in (0, 2, 3, 1, 5)])


def with_existence(sums: Tensor, exists: list[bool]) -> Tensor:
    """[2, entries]: the sums, 0 where a part does not exist, over whether it exists; so processes can add them up."""
    known = torch.tensor(exists, device=sums.device)
    return torch.stack([sums.masked_fill(~known, 0.0), known.to(sums.dtype)])


def with_existence_of(row: Row, device: torch.device) -> Tensor:
    """[1, 2 * entries]: a row, 0 where a part does not exist, and whether it exists beside it."""
    exists = torch.tensor([[part is not None for part in row]], device=device)
    return torch.cat([as_tensor([row], device), exists.float()], 1)


def perplexity(hard_sum: float, count: float) -> float:
    """exp(hard_sum / count), nats over tokens; inf where it is too large for a float."""
    try:
        return math.exp(hard_sum / count)
    except OverflowError:
        return math.inf
