"""Batches with the id and the signature of each row: a dataset and a collator around those of the script."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..tasks import ROW_ID, TEACHER_PREFIX, Task, begins_next
from ..teachers import predicts_teacher_token
from ..validation import fail
from .formats import format_of
from .manifest import head_of
from .signatures import kinds_of, refuse_column, signatures

ROWS_DIFFER = (
    "the rows were changed, ordered or tokenised otherwise, a transform is random, or padding is not "
    "marked by an attention_mask"
)


class NumberedBatch(NamedTuple):
    """What `NumberedRows` passes to the collator: row ids, and the rows as the dataset returns them."""

    row_ids: list[int]
    features: Any


class NumberedRows:
    """A map-style dataset that returns row ids with its rows; other attributes are the dataset's."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, row: int) -> Any:
        return self.__getitems__([row])

    def __getitems__(self, rows: list[int]) -> NumberedBatch:
        many = getattr(self.dataset, "__getitems__", None)
        return NumberedBatch(list(rows), many(rows) if many is not None else [self.dataset[row] for row in rows])


def with_row_ids(features: Any) -> NumberedBatch:
    """Rows with their ids, from `NumberedRows` or from the dataset's column `teacher_row_id`."""
    if isinstance(features, NumberedBatch) and not (
        isinstance(features.features, list) and have_row_ids(features.features)
    ):
        return features
    rows = features.features if isinstance(features, NumberedBatch) else features
    if not isinstance(rows, list) or not have_row_ids(rows):
        expected = f"rows with a column {ROW_ID!r}: whole numbers, each once"
        fail("train_dataset", "a stream of rows without a number", expected, "Number them, or use a Dataset.")
    return NumberedBatch(
        [int(row[ROW_ID]) for row in rows], [{k: v for k, v in row.items() if k != ROW_ID} for row in rows]
    )


def have_row_ids(rows: list[Any]) -> bool:
    """Whether every row is numbered by a column `teacher_row_id`."""
    return bool(rows) and all(isinstance(row, Mapping) and ROW_ID in row for row in rows)


class SignedBatch(NamedTuple):
    """A collated batch, and the ids, kept positions and signatures of its rows."""

    batch: dict[str, Any]
    row_ids: list[int]
    mask: Tensor  # `Task.kept_positions`
    counts: np.ndarray  # [rows] how many of them each row has
    signatures: np.ndarray


class SignedCollator:
    """Runs the script's collator and computes the rows' signatures, in the same way for building and training.

    Args:
        kinds: how the columns belong to the rows, see `kinds_of`; None finds it from the first batch.
        of_teacher_tokens: whether the kept positions are those of the teacher's text: see `Format`.
    """

    def __init__(
        self,
        collator: Callable[[Any], Any],
        task: Task,
        positions: str,
        columns: Sequence[str],
        kinds: Mapping[str, str] | None = None,
        *,
        of_teacher_tokens: bool = False,
    ) -> None:
        self.collator, self.task, self.positions, self.columns, self.kinds = collator, task, positions, columns, kinds
        self.of_teacher_tokens = of_teacher_tokens

    def __call__(self, features: Any) -> SignedBatch:
        taken = with_row_ids(features)
        batch = dict(self.collator(taken.features))
        rows = len(taken.row_ids)
        if self.of_teacher_tokens:
            mask = predicts_teacher_token(batch)
        else:
            mask = self.task.kept_positions(batch, self.positions, rows)
        spans = packed_spans(batch, mask, rows)

        def alone() -> list[dict[str, Any]]:
            each = [_single(taken.features, row) for row in range(rows)]
            return [] if any(one is None for one in each) else [dict(self.collator(one)) for one in each]

        options: dict[str, Any] = {"causal": self.task.left_to_right, "shifted": self.task.shifted}
        options |= {"apart": self.task.encoder_decoder, "prefix": TEACHER_PREFIX if self.of_teacher_tokens else ""}
        if spans is None:
            self.kinds = self.kinds or kinds_of(batch, (alone() if rows > 1 else None) or None, rows, self.columns)
            seen = signatures(batch, mask, self.columns, self.kinds, alone=alone, **options)
            return SignedBatch(batch, taken.row_ids, mask, mask.sum(1).numpy(), seen)
        found = []  # packed rows: the signature of each row collated alone
        for one in alone() or refuse_column("input_ids", batch.get("input_ids"), rows):
            self.kinds = self.kinds or kinds_of(one, [one], 1, self.columns)
            own = self.task.kept_positions(one, self.positions, 1)
            found.append(signatures(one, own, self.columns, self.kinds, alone=[one].copy, **options))
        counts = np.array([int(mask[:, span].sum()) for span in spans])
        return SignedBatch(batch, taken.row_ids, mask, counts, np.concatenate(found))


def _single(features: Any, row: int) -> Any:
    """One of some rows, as the collator takes them; None where they cannot be separated."""
    if isinstance(features, (list, Tensor)):
        return features[row : row + 1]
    if isinstance(features, Mapping) and all(isinstance(value, (list, Tensor)) for value in features.values()):
        return {name: value[row : row + 1] for name, value in features.items()}
    return None


def signed_collator_of(manifest: Mapping[str, Any], collator: Callable[[Any], Any]) -> SignedCollator:
    """The collator with the settings of the building."""
    settings = head_of(manifest), manifest["positions"], manifest["columns_read"], manifest["kinds"]
    return SignedCollator(collator, *settings, of_teacher_tokens=format_of(manifest).of_teacher_tokens)


def packed_spans(batch: Mapping[str, Any], mask: Tensor, count: int) -> list[slice] | None:
    """The positions of each of `count` rows in a packed batch of one long row; None where the batch is not packed.

    Raises:
        ValueError: the batch is neither, or its rows' starts are unknown.
    """
    if len(mask) == count:
        return None
    starts = [0, *(begins_next(batch, mask)[0].nonzero().flatten() + 1).tolist()] if len(mask) == 1 else []
    if len(starts) != count:
        shown, because = f"one that makes {len(mask)} rows of {count}", "teacher outputs are joined row by row"
        expected = "a row of the batch for each row of the dataset, or one row with position_ids that show where each"
        fix = "Use DataCollatorWithFlattening, or pack the dataset before (so that its rows are the packed ones)."
        fail("data_collator", shown, f"{expected} begins", fix, because=because)
    return [slice(start, stop) for start, stop in itertools.pairwise([*starts, mask.shape[1]])]
