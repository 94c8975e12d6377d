"""The column `teacher_id`, which selects the teachers of a row among several, by number or name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tasks import TEACHER_ID
from ..validation import fail, nearest, quoted

_NAMED = 2**20  # a `teacher_id` of a batch from here on is a name's: _NAMED + the first teacher of the name


class Routes:
    """Which teachers a row has, by its `teacher_id`.

    Args:
        weights: of each teacher; names: of each, or empty.
    """

    def __init__(self, weights: Sequence[float], names: Sequence[str]) -> None:
        self.weights, self.names = weights, names

    def of_rows(self, batch: Mapping[str, Any]) -> list[dict[int, float]] | None:
        """Of each row, the weights of its teachers; None where no column routes the rows."""
        ids = batch.get(TEACHER_ID)
        if ids is None:
            return None
        values = ids.reshape(-1).tolist() if isinstance(ids, Tensor) else list(ids)
        return [self.of_row(self._decoded(each), row) for row, each in enumerate(values)]

    def of_row(self, given: Any, row: int) -> dict[int, float]:
        """The teachers of a row and their weights, which add up to 1.

        Args:
            given: a name, or the number of a teacher.

        Raises:
            ValueError: there is no such teacher, or its weight is 0.
        """
        chosen = []
        if isinstance(given, str):
            chosen = [i for i, name in enumerate(self.names) if name == given]
        elif isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(self.weights):
            chosen = [given]
        total = math.fsum(self.weights[i] for i in chosen)
        if not total > 0:
            shown, fix = f"{quoted(given)} in row {row} of the batch", "Correct the column, or teacher_weights."
            if chosen:
                fail(TEACHER_ID, shown, "a teacher with a weight above 0", fix)
            names = "".join(f", {name!r}" for name in dict.fromkeys(self.names))
            fix = (nearest(given, self.names) if isinstance(given, str) else "") or "Correct the column."
            fail(TEACHER_ID, shown, f"one of 0 to {len(self.weights) - 1}{names}, the teachers", fix)
        return {i: self.weights[i] / total for i in chosen if self.weights[i] > 0}

    def code(self, given: Any, row: int) -> int:
        """A `teacher_id` of a row as the number that stands in a batch."""
        given = given.item() if hasattr(given, "item") else given
        self.of_row(given, row)
        return _NAMED + self.names.index(given) if isinstance(given, str) else given

    def _decoded(self, given: Any) -> Any:
        named = given - _NAMED if isinstance(given, int) else -1
        return self.names[named] if 0 <= named < len(self.names) else given


class RoutedCollator:
    """Runs the script's collator without the column `teacher_id`, and adds the column to the batch as numbers.

    Raises:
        ValueError: there is no such teacher; the message has the row.
    """

    def __init__(self, collator: Callable[[Any], Any], routes: Routes) -> None:
        self.collator, self.routes = collator, routes

    def __call__(self, features: Any) -> Any:
        rows = features if isinstance(features, list) else []
        if not rows or not all(isinstance(row, Mapping) and TEACHER_ID in row for row in rows):
            return self.collator(features)
        ids = [self.routes.code(row[TEACHER_ID], number) for number, row in enumerate(rows)]
        batch = self.collator([{k: v for k, v in row.items() if k != TEACHER_ID} for row in rows])
        batch[TEACHER_ID] = torch.tensor(ids)
        return batch
