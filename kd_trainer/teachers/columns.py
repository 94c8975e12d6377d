"""Columns of the dataset for a teacher with other inputs than the student, padded beside the student's.

For: `add_teacher_inputs` before training, `TeacherCollator` around the script's own collator. The trainer passes every
column `teacher_<name>` to the teacher as `<name>`; nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tasks import CHUNK_IDS, TEACHER_PREFIX
from ..validation import fail

NO_CHUNK = -1  # the chunk id of a token that is in none, and of padding


def add_teacher_inputs(
    dataset: Any,
    teacher_tokenizer: Any,
    columns: str | Sequence[str],
    *,
    max_length: int | None = None,
    **map_kwargs: Any,
) -> Any:
    """The dataset with the columns that the teacher reads: teacher_input_ids, teacher_attention_mask, ...

    When to use: sequence-level tasks (classification, regression) with a teacher of another tokenizer. Token-level
    tasks compare position by position and need one tokenizer for both.

    Args:
        dataset: a `Dataset`, `DatasetDict` or `IterableDataset` that still has the text.
        teacher_tokenizer: the teacher's tokenizer, or any callable like it (an image processor).
        columns: the column of the text, or those of a pair of texts.
        max_length: texts are cut to so many tokens; None: to the tokenizer's own limit, if it has one.
        map_kwargs: passed to `dataset.map`, e.g. num_proc.

    Returns:
        A new dataset with the added columns.

    Raises:
        ValueError: a column that the dataset does not have, or not one or two columns.

    Example::

        data = add_teacher_inputs(data, teacher_tokenizer, "sentence")
        trainer = DistillationTrainer(..., data_collator=TeacherCollator(collator, teacher_tokenizer))
    """
    check_dataset(dataset, [], "columns")
    _check_callable("teacher_tokenizer", teacher_tokenizer, "the teacher's tokenizer, or a callable like it")
    names = [columns] if isinstance(columns, str) else list(columns) if isinstance(columns, Sequence) else []
    if len(names) not in (1, 2):
        fail(
            "columns",
            repr(columns),
            "the name of a column of text, or of two",
            "Name the columns that the student reads.",
        )
    check_dataset(dataset, names, "columns")
    cut: dict[str, Any] = {"max_length": max_length} if max_length is not None else {}
    limit = getattr(teacher_tokenizer, "model_max_length", 0)
    if max_length is not None or 0 < limit < 10**9:  # larger values mean no limit
        cut["truncation"] = True

    def add(batch: Mapping[str, Any]) -> dict[str, Any]:
        encoded = teacher_tokenizer(*(list(batch[name]) for name in names), **cut)
        return {TEACHER_PREFIX + name: values for name, values in encoded.items()}

    return dataset.map(add, batched=True, **map_kwargs)


def check_dataset(dataset: Any, names: Sequence[str], argument: str) -> None:
    """Raises unless it is a dataset of the datasets library that has the columns; `argument` gave their names."""
    if not hasattr(dataset, "map"):
        shown = dataset if dataset is None else f"of type {type(dataset).__name__}"
        fix = "Make one of it: datasets.Dataset.from_list(rows)."
        fail("dataset", shown, "a dataset of the datasets library", fix, error=TypeError)
    known = getattr(dataset, "column_names", None)
    for split, there in known.items() if isinstance(known, Mapping) else [("dataset", known)]:
        if there is None:  # a stream may have columns that are not known
            continue
        missing = [name for name in names if name not in there]
        if missing:
            fix = "Add the teacher's inputs before the text is removed."
            fail(argument, repr(missing[0]), f"a column of {split} ({', '.join(there)})", fix)


def predicts_teacher_token(batch: Mapping[str, Any]) -> Tensor:
    """Boolean [B, T]: positions of the teacher's text that predict a real token, from a real one."""
    real = batch.get(TEACHER_PREFIX + "attention_mask")
    real = torch.ones_like(batch[TEACHER_PREFIX + "input_ids"]) if real is None else real
    return F.pad((real[:, 1:] != 0) & (real[:, :-1] != 0), (0, 1))


def of_next(values: Tensor, last: int) -> Tensor:
    """[B, S]: at each position the value of the token that is predicted there, the next one."""
    return F.pad(values[:, 1:], (0, 1), value=last)


def _check_callable(argument: str, value: Any, expected: str) -> None:
    if not callable(value):
        shown = value if value is None else f"of type {type(value).__name__}"
        fail(argument, shown, expected, f"Pass `{argument}` itself, not its name or its result.", error=TypeError)


class TeacherCollator:
    """A data collator that pads the `teacher_*` columns by the teacher's tokenizer and the rest by another collator.

    When to use: around the script's own collator, which fails where the teacher's columns differ in length. It pads the
    chunk ids of `align_teacher_tokens` as the tokens beside them.

    Args:
        base_collator: makes the student's batch; it never sees a `teacher_*` column, nor `chunk_ids`.
        teacher_tokenizer: pads the teacher's tokens; None where the teacher reads no tokens (images).
        pad_to_multiple_of: as in transformers' collators. Default None.

    Raises:
        ValueError: some rows of a batch have teacher columns and others not, or tokens without a tokenizer.
    """

    def __init__(
        self,
        base_collator: Callable[[list[dict[str, Any]]], Any],
        teacher_tokenizer: Any = None,
        *,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        _check_callable("base_collator", base_collator, "the data collator that makes the student's batch")
        self.base_collator, self.teacher_tokenizer = base_collator, teacher_tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        rows = [dict(feature) for feature in features]
        chunks = [row.pop(CHUNK_IDS) for row in rows if CHUNK_IDS in row]
        teacher_rows = [{k: row.pop(k) for k in list(row) if k.startswith(TEACHER_PREFIX)} for row in rows]
        teacher_chunks = [
            row.pop(TEACHER_PREFIX + CHUNK_IDS) for row in teacher_rows if TEACHER_PREFIX + CHUNK_IDS in row
        ]
        batch = dict(self.base_collator(rows))
        names = set(teacher_rows[0])
        if any(set(row) != names for row in teacher_rows):
            fix = "Add them to the whole dataset with add_teacher_inputs."
            fail("features", "rows of which some lack teacher columns", "the same columns in all", fix)
        tokens = names & {TEACHER_PREFIX + name for name in self._token_names()}
        for chosen, collate in ((tokens, self._pad), (names - tokens, self._stack)):
            if chosen:
                own = [{k.removeprefix(TEACHER_PREFIX): row[k] for k in sorted(chosen)} for row in teacher_rows]
                batch.update({TEACHER_PREFIX + k: v for k, v in collate(own).items()})
        for prefix, ids in (("", chunks), (TEACHER_PREFIX, teacher_chunks)):
            if ids:
                batch[prefix + CHUNK_IDS] = _padded_chunks(prefix, ids, batch)
        return batch

    def _token_names(self) -> set[str]:
        return {"input_ids", "attention_mask", *getattr(self.teacher_tokenizer, "model_input_names", ())}

    def _pad(self, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        if self.teacher_tokenizer is None:
            fix = "Give TeacherCollator the teacher's tokenizer."
            fail("teacher_tokenizer", None, "a tokenizer, to pad teacher_input_ids", fix)
        return self.teacher_tokenizer.pad(rows, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors="pt")

    @staticmethod
    def _stack(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        from transformers import default_data_collator

        return default_data_collator(rows, return_tensors="pt")


def _padded_chunks(prefix: str, rows: list[Any], batch: Mapping[str, Any]) -> Tensor:
    """Chunk ids beside the tokens that a collator has padded, on whichever side."""
    ids, mask = batch[prefix + "input_ids"], batch.get(prefix + "attention_mask")
    padded = torch.full(ids.shape, NO_CHUNK, dtype=torch.int64)
    widest = max(map(len, rows))
    if ids.dim() != 2 or len(rows) != len(ids) or widest > ids.shape[1]:
        shown = f"making {prefix}input_ids of shape {list(ids.shape)} from {len(rows)} rows of up to {widest} tokens"
        fix = "Use one that only pads: neither packing nor truncation. align_teacher_tokens has max_length."
        fail("base_collator", shown, "a batch with every token of every row", fix, because="tokens have chunk ids")
    for row, values in enumerate(rows):
        left = mask is not None and len(values) < ids.shape[1] and not mask[row, 0]
        first = ids.shape[1] - len(values) if left else 0
        padded[row, first : first + len(values)] = torch.as_tensor(values)
    return padded
