"""Rows of numbers with class labels as tensors: from numpy to Arrow to torch, never through Python lists.

A dataset of this folder has the columns `features` (float32, fixed length) and `labels` (int64, -100 = unlabelled), in
torch format. Shapes: N rows, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.table import InMemoryTable

from ..losses import IGNORE_INDEX
from ..validation import check_number, fail, quoted

UNLABELLED = "unlabelled"
LABEL_NAMES = ("labels", "label")


def check_count(argument: str, value: Any, low: int = 1) -> None:
    """Raises unless `value` is an int >= `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail(argument, quoted(value), f"a whole number >= {low}", f"Give `{argument}` as an int.", error=TypeError)
    check_number(argument, value, low=low)


def as_dataset(columns: Mapping[str, np.ndarray]) -> datasets.Dataset:
    """Arrays [N] or [N, K] as a Dataset in torch format; a 2D array becomes lists of fixed length K, without a copy."""
    arrays = []
    for values in columns.values():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays.append(flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
    return datasets.Dataset(InMemoryTable(pa.table(arrays, names=list(columns)))).with_format("torch")


def _flat_values(column: pa.ChunkedArray, name: str) -> tuple[pa.Array, list[int]]:
    """The numbers of an Arrow column in row order, and the shape [N, ...] they stand for."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    shape = [len(array)]
    while True:
        if isinstance(array, pa.ExtensionArray):  # datasets' Array2D to Array5D
            array = array.storage
        if array.null_count:
            row = pc.index(pc.is_null(array), True).as_py() // int(np.prod(shape[1:]))
            fail(f"column {name}", f"null in row {row}", "a value in every row", "Fill or drop such rows.")
        if isinstance(array, pa.FixedSizeListArray):
            width = array.type.list_size
        elif isinstance(array, (pa.ListArray, pa.LargeListArray)):
            lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
            width = int(lengths[0]) if len(lengths) else 0
            if (lengths != width).any():
                at = int((lengths != width).argmax())
                row = at // int(np.prod(shape[1:]))
                fix = "Pad or crop the rows to one length, or leave the column out."
                fail(f"column {name}", f"{lengths[at]} numbers in row {row}", f"{width} in every row, as in row 0", fix)
        else:
            break
        array = array.flatten()
        shape.append(width)
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
        fail(f"column {name}", f"of type {array.type}", "numbers", "Leave the column out.", error=TypeError)
    return array, shape


def column_of(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """A column as one array [N, ...]; a view of the Arrow memory where that is contiguous. Not to be written to."""
    table = dataset.select_columns([name]).with_format("arrow")[:]
    array, shape = _flat_values(table.column(name), name)
    return array.to_numpy(zero_copy_only=False).reshape(shape)


class TensorRows(torch.utils.data.Dataset):
    """Rows as one tensor per column; a batch is one indexing operation per column.

    The DataLoader gets a whole batch from `__getitems__`: one dict of tensors, which `collate_tensors` returns.
    At 784 features and 32 rows a batch that is 30 times the rows per second of a Dataset in torch format, and 190 times
    those of Python lists. With `Trainer` set `data_collator=collate_tensors` and `remove_unused_columns=False`.

    Args:
        columns: name to tensor [N, ...], all with the same N.

    Raises:
        ValueError: no column, or columns of unequal lengths.

    Example:
        >>> rows = TensorRows({"features": torch.zeros(4, 3), "labels": torch.arange(4)})
        >>> len(rows), rows[1]["labels"], rows[1:3]["labels"], rows.__getitems__([3, 0])["labels"]
        (4, tensor(1), tensor([1, 2]), tensor([3, 0]))
    """

    def __init__(self, columns: Mapping[str, torch.Tensor]) -> None:
        lengths = {name: len(tensor) for name, tensor in columns.items()}
        if len(set(lengths.values())) != 1:
            fail("columns", f"{lengths} (rows)", "at least one column, all of one length", "Align the columns.")
        self.columns = dict(columns)
        self._length = next(iter(lengths.values()))

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> dict[str, torch.Tensor]:
        """One row (an int) or several (a slice) as tensors; copies, because the columns may be read-only memory."""
        if not isinstance(index, slice):
            index = range(self._length)[index]  # negative indices, and an IndexError past the end
        return {name: tensor[index].clone() for name, tensor in self.columns.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return {name: tensor.index_select(0, rows) for name, tensor in self.columns.items()}


def as_tensors(dataset: datasets.Dataset) -> TensorRows:
    """The columns of a Dataset as `TensorRows`: whole tensors, taken from Arrow without Python lists.

    A dataset that is one contiguous piece of memory (or a memory-mapped file) is not copied; one with shuffled or
    selected rows, or of several pieces, is copied once.

    Args:
        dataset: columns of numbers, or of lists of numbers that are equally long in all rows; no nulls.

    Returns:
        `TensorRows` with the same columns, rows and dtypes.

    Raises:
        ValueError: rows of unequal lengths or nulls, with column and row.
        TypeError: a column that is no number (text, images), or something else than a `datasets.Dataset`.

    Example:
        >>> rows = as_tensors(synthetic_classification(num_train=6)["train"])
        >>> rows[0]["features"].shape, rows[:2]["labels"].dtype
        (torch.Size([784]), torch.int64)
    """
    if not isinstance(dataset, datasets.Dataset):
        fix = "Pick one split of a DatasetDict; an IterableDataset has to be read into a Dataset first."
        fail("dataset", f"a {type(dataset).__name__}", "a datasets.Dataset", fix, error=TypeError)
    table = dataset.with_format("arrow")[:]
    columns = {}
    for name in dataset.column_names:
        array, shape = _flat_values(table.column(name), name)
        if pa.types.is_boolean(array.type):  # Arrow packs eight to a byte
            flat = torch.from_numpy(array.to_numpy(zero_copy_only=False))
        else:
            flat = torch.from_dlpack(array)
        columns[name] = flat.view(shape)
    return TensorRows(columns)


def collate_tensors(rows: Any) -> dict[str, Any]:
    """The `data_collator` for `TensorRows`: a batch that is a dict of tensors already is returned as it is.

    Args:
        rows: what `TensorRows.__getitems__` returns; or a list of single rows, as from any other dataset, which goes to
            transformers' `default_data_collator`.

    Returns:
        A dict of tensors [B, ...].

    Raises:
        ValueError: Trainer has taken the batch for a list of rows, because `remove_unused_columns` is on.

    Example:
        >>> collate_tensors([{"labels": 1}, {"labels": 2}])["labels"].tolist()
        [1, 2]
    """
    if isinstance(rows, Mapping):
        return dict(rows)
    if rows and isinstance(rows[0], str):
        because = "Trainer would look for columns in every row, and a batch of TensorRows has none"
        fix = "Set `remove_unused_columns=False` in the training arguments."
        fail("remove_unused_columns", True, "False with TensorRows", fix, because=because)
    from transformers import default_data_collator  # a slow import that whole-batch rows never need

    return default_data_collator(rows)


class Source(NamedTuple):
    """Where rows come from, for messages: the argument that named them and its value, as shown."""

    argument: str
    shown: str

    def refuse(self, found: str, expected: str, fix: str) -> NoReturn:
        """ValueError about the rows of this source."""
        fail(self.argument, f"{self.shown} with {found}", expected, fix)


def label_name(columns: Sequence[str], source: Source) -> str:
    """The one column of class ids: `labels` or `label`."""
    found = [name for name in LABEL_NAMES if name in columns]
    if len(found) != 1:
        names = ", ".join(columns[:8]) + (f", ... ({len(columns)} in all)" if len(columns) > 8 else "")
        fix = "Rename the column of class ids; an unlabelled row has the label -100."
        source.refuse(f"the columns {names}", "one column `labels` or `label`", fix)
    return found[0]


def split_labelled(dataset: datasets.Dataset, num_labelled: int, *, seed: int = 42) -> datasets.DatasetDict:
    """Keeps the labels of `num_labelled` rows, each class in proportion, and takes them from all other rows.

    For the setting where distillation pays: few labelled rows, many unlabelled ones that the teacher labels softly.
    `datasets.concatenate_datasets(list(parts.values()))` trains on both at once.

    Args:
        dataset: a Dataset with a column `labels` or `label` of class ids; rows that have -100 already stay unlabelled.
        num_labelled: rows that keep their label, from 1 to the number of labelled rows. The shares of the classes are
            those in `dataset`, rounded by largest remainder.
        seed: of the choice within each class; a whole number >= 0, default 42.

    Returns:
        A DatasetDict of "labelled" and "unlabelled" (labels all -100), each in the order and format of `dataset`.

    Raises:
        ValueError, TypeError: no label column, or `num_labelled` or `seed` out of range.

    Example:
        >>> train = synthetic_classification(num_train=100)["train"]
        >>> {name: len(part) for name, part in split_labelled(train, 20).items()}
        {'labelled': 20, 'unlabelled': 80}
    """
    name = label_name(dataset.column_names, Source("dataset", "a Dataset"))
    labels = column_of(dataset, name)
    classes, counts = np.unique(labels[labels != IGNORE_INDEX], return_counts=True)
    check_count("num_labelled", num_labelled)
    if num_labelled > counts.sum():
        expected = f"at most {counts.sum()}, the labelled rows of `dataset`"
        fail("num_labelled", num_labelled, expected, "Give a smaller number.")
    check_count("seed", seed, low=0)
    exact = counts * (num_labelled / counts.sum())
    share = np.floor(exact).astype(np.int64)
    share[np.argsort(share - exact, kind="stable")[: num_labelled - share.sum()]] += 1
    generator = np.random.default_rng(seed)
    picked = [
        generator.permutation(np.flatnonzero(labels == label))[:size]
        for label, size in zip(classes, share, strict=True)
    ]
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.concatenate(picked)] = True
    kept, rest = (dataset.select(np.flatnonzero(which)) for which in (chosen, ~chosen))
    return datasets.DatasetDict(
        labelled=_with_labels(kept, name, labels[chosen]),
        unlabelled=_with_labels(rest, name, np.full(len(rest), IGNORE_INDEX)),
    )


def _with_labels(dataset: datasets.Dataset, name: str, labels: np.ndarray) -> datasets.Dataset:
    """The same rows with other labels, as plain int64: a ClassLabel has no -100, and only equal types concatenate."""
    table = dataset.with_format("arrow")[:].replace_schema_metadata(None)
    table = table.set_column(table.column_names.index(name), name, pa.array(labels.astype(np.int64)))
    features = datasets.Features(dataset.features | {name: datasets.Value("int64")})
    relabelled = datasets.Dataset(InMemoryTable(table), info=datasets.DatasetInfo(features=features))
    form = dataset.format
    return relabelled.with_format(
        form["type"],
        columns=form["columns"],
        output_all_columns=form["output_all_columns"],
        **form["format_kwargs"],
    )
