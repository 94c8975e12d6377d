"""A user's own rows of numbers (csv, parquet, json, or a dataset by name) in the form of `tensor_rows.py`, checked.

Not for text or images of several sizes. Shapes: N rows, F features, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..losses import IGNORE_INDEX
from ..validation import fail, warn
from .tensor_rows import LABEL_NAMES, UNLABELLED, Source, as_dataset, check_count, column_of, label_name

logger = logging.getLogger(__name__)

FILE_TYPES = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".!")


def _read(argument: str, value: str) -> datasets.Dataset:
    """One file as a Dataset; csv, parquet and json (lines) go through `datasets`' own readers."""
    path = Path(value)
    kind = FILE_TYPES.get(path.suffix.lower())
    if kind is None:
        fix = "Convert it, or load it yourself and pass the Dataset to Trainer."
        fail(argument, repr(str(value)), "a file ending in " + ", ".join(FILE_TYPES), fix)
    if not path.is_file():
        fix = "Check the path; a relative one starts at the current directory."
        fail(argument, repr(str(value)), "an existing file", fix, error=FileNotFoundError)
    # One chunk for the whole csv: the type of a column that is 0 in the first 10,000 rows is known only at the end.
    options = {"chunksize": 2**31} if kind == "csv" else {}
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except Exception as error:
        because = f"reading it failed: {_first_line(error.__cause__ or error)}"
        expected = f"a readable {kind} file with at least one row"
        fail(argument, repr(str(value)), expected, "Repair or rewrite the file.", because=because)


def _read_named(name: str, config_name: str | None) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(name, config_name)
    except Exception as error:
        fix = "Check the name and the connection, or give files."
        because = f"`datasets` reports: {_first_line(error)}"
        fail("dataset_name", repr(name), "a dataset of the hub or a local folder", fix, because=because)


def _raw_features(split: datasets.Dataset, label: str | None, source: Source) -> np.ndarray:
    """[N, F] in the type of the file: the column `features`, else an image column, else all columns but the label."""
    names = [name for name in split.column_names if name != label]
    images = [name for name in names if isinstance(split.features[name], datasets.Image)]
    if "features" in names:
        values = column_of(split, "features")
        return values.reshape(len(values), -1)
    if images:
        rows = [np.asarray(image).reshape(-1) for image in split.with_format(None)[images[0]]]
        if len({len(row) for row in rows}) > 1:
            source.refuse("images of several sizes", "one size", "Resize them first, with `dataset.map`.")
        return np.stack(rows)
    return np.column_stack([column_of(split, name) for name in names]) if names else np.empty((len(split), 0))


def _class_ids(values: np.ndarray, feature: Any, num_classes: int, source: Source) -> np.ndarray:
    """Labels as int64 with -100 for unlabelled rows; refuses what is no whole number or out of range."""
    fraction = ~np.isfinite(values) | (values % 1 != 0)
    if fraction.any():
        row = int(fraction.argmax())
        fix = "Write class ids as integers, and -100 where there is none."
        source.refuse(f"the label {values[row]} in row {row}", "whole numbers", fix)
    labels = values.astype(np.int64)
    if isinstance(feature, datasets.ClassLabel):
        labels[labels == -1] = IGNORE_INDEX  # how `datasets` marks a label that is not known
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        row = int(wrong.argmax())
        expected = f"labels from 0 to {num_classes - 1}, or -100 for an unlabelled row"
        source.refuse(f"the label {labels[row]} in row {row}", expected, "Renumber the classes or set `num_classes`.")
    return labels


def _checked(
    split: datasets.Dataset, name: str, source: Source, num_features: int, num_classes: int
) -> dict[str, np.ndarray]:
    """`features` [N, F] in the file's own type and `labels` [N] of one split."""
    label = None
    if name != UNLABELLED or set(LABEL_NAMES) & set(split.column_names):
        label = label_name(split.column_names, source)
    features = _raw_features(split, label, source)
    if features.shape[1] != num_features:
        fix = "Set `num_features`, or keep only the features beside the label column."
        source.refuse(f"{features.shape[1]} features per row", f"{num_features} (`num_features`)", fix)
    bad = ~np.isfinite(features)
    if bad.any():
        row, column = (int(at[0]) for at in np.nonzero(bad))
        source.refuse(f"{features[row, column]} in row {row}, feature {column}", "finite numbers", "Fill or drop it.")
    if name == UNLABELLED or label is None:
        labels = np.full(len(split), IGNORE_INDEX)
    elif isinstance(split.features[label], datasets.Value) and "string" in split.features[label].dtype:
        source.refuse("labels that are text", "class ids as whole numbers", "Number the classes from 0.")
    else:
        labels = _class_ids(column_of(split, label), split.features[label], num_classes, source)
    return {"features": features, "labels": labels}


def _scaled(splits: Mapping[str, dict[str, np.ndarray]], sources: Mapping[str, Source]) -> None:
    """Integer pixels 0..255 become floats in [0, 1], in all splits alike; other numbers keep their values."""
    whole = {name: not np.issubdtype(split["features"].dtype, np.floating) for name, split in splits.items()}
    if len(set(whole.values())) > 1:
        name = next(name for name, is_whole in whole.items() if is_whole)
        fix = "Store the features of all splits as floats on one scale."
        sources[name].refuse("integer features beside a split of floats", "one type for all splits", fix)
    low = min(split["features"].min() for split in splits.values())
    high = max(split["features"].max() for split in splits.values())
    is_pixels = all(whole.values()) and low >= 0 and 1 < high <= 255
    if is_pixels:
        warn(
            logger,
            "The features are integers from %d to %d: taken for pixels and divided by 255. "
            "Store them as floats to keep their values.",
            low,
            high,
        )
    for split in splits.values():
        split["features"] = split["features"].astype(np.float32)
        if is_pixels:
            split["features"] /= np.float32(255)


def load_classification(
    *,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    unlabelled_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    num_features: int = 784,
    num_classes: int = 10,
) -> datasets.DatasetDict:
    """A user's own rows, checked, in the form of `synthetic_classification`.

    A file has a column `labels` or `label` and the features in one of three forms: a column `features` of lists, an
    image column (flattened, row by row), or one column per feature in file order. Other columns are left out where
    `features` or an image column exists. Features of an integer type with values 0..255 are divided by 255, with a
    log line; floats are kept as they are. No code from a dataset repository is run.

    Args:
        train_file, validation_file, test_file: csv, parquet or json (lines); each becomes the split of that name.
        unlabelled_file: the same without need of a label column; the split "unlabelled", labels all -100.
        dataset_name: instead of files, a dataset of the hub or a local folder; all its splits are kept.
        dataset_config_name: which of its configurations; default None.
        num_features: F, numbers per row; default 784.
        num_classes: C; labels are 0..C-1, or -100 (a ClassLabel's -1 is mapped to it); default 10.

    Returns:
        A DatasetDict in torch format with the columns `features` (float32, length F) and `labels` (int64).

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError, TypeError: an unknown ending or unreadable file; a missing label column; another number of features;
            NaN, infinities or nulls; labels out of range or not whole. Each names the file, the row and the fix.

    Example:
        >>> load_classification(train_file="digits.csv", validation_file="more.csv")  # doctest: +SKIP
    """
    check_count("num_features", num_features)
    check_count("num_classes", num_classes, low=2)
    files = {"train": train_file, "validation": validation_file, "test": test_file, UNLABELLED: unlabelled_file}
    given = {name: value for name, value in files.items() if value is not None}
    if (dataset_name is None) == (not given):
        both = "nothing" if dataset_name is None else f"{dataset_name!r} beside {', '.join(f'{n}_file' for n in given)}"
        fail("dataset_name", both, "either files or a dataset's name", "Give `train_file` or `dataset_name`.")
    if dataset_name is not None:
        raw = dict(_read_named(dataset_name, dataset_config_name))
        sources = {name: Source("dataset_name", f"{dataset_name!r} (split {name})") for name in raw}
    else:
        raw = {name: _read(f"{name}_file", value) for name, value in given.items()}
        sources = {name: Source(f"{name}_file", repr(str(value))) for name, value in given.items()}
    splits = {name: _checked(split, name, sources[name], num_features, num_classes) for name, split in raw.items()}
    _scaled(splits, sources)
    return datasets.DatasetDict({name: as_dataset(split) for name, split in splits.items()})
