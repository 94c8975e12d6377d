"""Teacher outputs on disk: Arrow shards, memory-mapped, beside a manifest that holds their hashes.

The meaning of the columns is in `formats.py`. A folder holds:

    manifest.json      the settings, size and XXH3-128 of each shard; written last: a folder without it is unfinished
    building.json      the settings while it is unfinished
    README.md          a card; `datasets.load_dataset(folder)` reads it
    head.safetensors   with hidden states alone: the teacher's output head
    data/              `datasets.load_from_disk(folder / "data")`: data-00000.arrow, ...

A shard is one record batch. A row has `row_id`, `signature` (a hash of what the teacher read), and its columns: a list
with an entry of fixed width for each of the row's positions.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from ..files import atomic_file, digest, write_atomically
from ..validation import message
from .manifest import (
    BUILD_AGAIN,
    CacheError,
    check_links,
    check_manifest,
    check_settings,
    check_shard,
    read_json,
    shard_index,
    shard_name,
    write_json,
)

MANIFEST, BUILDING, HEAD, DATA = "manifest.json", "building.json", "head.safetensors", "data"
_TOTALS = ("total_rows", "total_positions", "total_bytes")


class Rows(NamedTuple):
    """Some rows of a cache, one behind the other: N positions of B rows."""

    row_ids: np.ndarray  # [B] int64
    signatures: np.ndarray  # [B] uint64
    counts: np.ndarray  # [B] positions of each row
    columns: dict[str, np.ndarray]  # [N, width]


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts."""
    if len(parts) == 1:
        return parts[0]
    ids, signatures, counts = (np.concatenate([part[i] for part in parts]) for i in range(3))
    names = parts[0].columns
    return Rows(ids, signatures, counts, {n: np.concatenate([part.columns[n] for part in parts]) for n in names})


# ---- writing --------------------------------------------------------------------------------------------------------


def begin(folder: Path, settings: dict[str, Any], root: Path | None = None) -> dict[str, Any]:
    """Writes the settings of an unfinished cache; returns those on disk where it was begun before.

    Args:
        root: the folder above it that the user named (see `check_links`).

    Raises:
        CacheError: the settings on disk were changed, are invalid or of another layout; a link leads out of the folder.
    """
    check_links(folder, root)
    path = folder / BUILDING
    (folder / DATA).mkdir(parents=True, exist_ok=True)
    written = ((folder, (".*.json.*", f".{HEAD}.*", ".README.md.*")), (folder / DATA, (".data-*", ".state.json.*")))
    for left in [left for where, patterns in written for pattern in patterns for left in where.glob(pattern)]:
        left.unlink(missing_ok=True)  # of a killed process; the building process holds the lock
    if not path.exists():
        write_json(path, settings)
    begun = read_json(path)
    check_settings(path, begun, complete=False)
    return begun


def write_shard(folder: Path, index: int, rows: Rows) -> None:
    """Writes a shard, whole or not at all; first a note with its hash. The same rows make the same bytes."""
    starts = pa.array(np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int32))
    arrays = {"row_id": pa.array(rows.row_ids), "signature": pa.array(rows.signatures)}
    for name, values in rows.columns.items():
        entries = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        arrays[name] = pa.ListArray.from_arrays(starts, entries)
    batch = pa.RecordBatch.from_pydict(arrays)
    path = folder / DATA / shard_name(index)
    with atomic_file(path) as file:
        hashed = _Hashed(file)
        with pa.ipc.new_stream(pa.PythonFile(hashed, "w"), batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()  # a full disk is an error before the note is written
        note = {"name": path.name, "rows": batch.num_rows, "positions": int(rows.counts.sum()), "bytes": hashed.size}
        write_atomically(path.with_suffix(".json"), json.dumps(note | {"xxh3": hashed.xxh3.hexdigest()}))


class _Hashed(io.RawIOBase):
    """Passes writes on to a file and keeps their size and hash."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.xxh3 = file, 0, xxhash.xxh3_128()  # ten times as fast as SHA-256

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.xxh3.update(content)
        self.size += memoryview(content).nbytes
        return self.file.write(content)


def written_notes(folder: Path) -> dict[int, dict[str, Any]]:
    """The notes beside the shards of an unfinished cache, by index; the shards are not read."""
    found = {}
    for note in sorted((folder / DATA).glob("data-*.json")):
        index = shard_index(note.name)
        try:
            entry = json.loads(note.read_text(encoding="utf-8"))
            if index is not None and isinstance(entry, dict):
                check_shard(note, index, entry)
                found[index] = entry
        except (ValueError, RecursionError):  # cut or changed: that shard is built again
            continue
    return found


def written_shards(folder: Path) -> set[int]:
    """The shards of an unfinished cache that are on disk as they were written; reads them whole."""
    return {index for index, entry in written_notes(folder).items() if damage(folder, entry) is None}


def first_rows(folder: Path, count: int) -> tuple[int, Rows] | None:
    """(index, first rows) of the first whole shard of an unfinished cache; None where it has none yet."""
    for index, entry in sorted(written_notes(folder).items()):
        if damage(folder, entry) is None:
            shard = _mapped(folder / DATA / entry["name"], entry)
            return index, _gathered([(shard, row) for row in range(min(count, len(shard.row_ids)))])
    return None


def reopen(folder: Path, manifest: Mapping[str, Any], damaged: set[int]) -> None:
    """Makes a finished cache unfinished, without the damaged shards."""
    for index, entry in enumerate(manifest["shards"]):
        note = (folder / DATA / entry["name"]).with_suffix(".json")
        if index in damaged:
            note.unlink(missing_ok=True)
        else:
            write_atomically(note, json.dumps(entry))
    settings = {name: value for name, value in manifest.items() if name not in ("shards", "head_sha256", *_TOTALS)}
    write_json(folder / BUILDING, settings)
    (folder / MANIFEST).unlink()


def damage(folder: Path, entry: Mapping[str, Any]) -> str | None:
    """How the shard differs from the one that was written; None where it is intact. Reads all of it."""
    path = folder / DATA / entry["name"]
    if not path.is_file():
        return "the file is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"it has {size:,} bytes where {entry['bytes']:,} were written"
    return None if digest(path, by=xxhash.xxh3_128) == entry["xxh3"] else "its content has changed since it was written"


def finish(folder: Path, settings: dict[str, Any], card: str) -> None:
    """Writes the metadata of a finished cache; the manifest last."""
    import datasets

    shards = [entry for _, entry in sorted(written_notes(folder).items())]
    with pa.OSFile(str(folder / DATA / shards[0]["name"])) as file:
        schema = pa.ipc.open_stream(file).schema
    datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema)).write_to_directory(str(folder / DATA))
    state: dict[str, Any] = {
        "_data_files": [{"filename": entry["name"]} for entry in shards],
        "_fingerprint": hashlib.sha256("".join(entry["xxh3"] for entry in shards).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_atomically(folder / DATA / "state.json", json.dumps(state, indent=2))
    write_atomically(folder / "README.md", card)
    totals = {key: sum(entry[key.removeprefix("total_")] for entry in shards) for key in _TOTALS}
    head = {"head_sha256": digest(folder / HEAD)} if (folder / HEAD).exists() else {}
    write_json(folder / MANIFEST, {**settings, **totals, **head, "shards": shards})
    clean(folder)


def clean(folder: Path) -> None:
    """Removes the files of an unfinished cache."""
    for left in [folder / BUILDING, *(folder / DATA).glob("data-*.json")]:
        left.unlink(missing_ok=True)


# ---- reading --------------------------------------------------------------------------------------------------------


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a cache that was built to its end."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path, root: Path | None = None) -> dict[str, Any]:
    """The settings and shards of a finished cache.

    Args:
        root: the folder above it that the user named (see `check_links`).

    Raises:
        CacheError: there is none, it was changed, is invalid or of another layout; a link leads out of the folder.
    """
    check_links(folder, root)
    if not is_finished(folder):
        begun = (folder / BUILDING).exists()
        fix = "Run the building again: it goes on." if begun else "Build it: trainer.build_teacher_cache()."
        shown = f"{str(folder)!r}, {'which is unfinished' if begun else 'which has no ' + MANIFEST}"
        raise CacheError(message("teacher_cache", shown, "a finished cache", fix))
    manifest = read_json(folder / MANIFEST)
    check_manifest(folder / MANIFEST, manifest)
    return manifest


def damage_message(name: str, reason: str) -> str:
    """The error of a shard that is not as it was written."""
    fix = (
        "Start a training with teacher_model and teacher_cache_dir: that shard alone is built again. Without the "
        "teacher, fetch the file again."
    )
    return message("teacher_cache", f"damaged in {name}", "the file as it was written", fix, because=reason)


def foreign_message(name: str, reason: str) -> str:
    """The message for a file with the right hash that this package did not write."""
    shown = f"one whose {name} this package did not write"
    return message("teacher_cache", shown, "the file of a cache", BUILD_AGAIN, because=reason)


class Store:
    """A finished cache, memory-mapped; a shard is checked when it is first read, and again when its file changes.

    Args:
        folder: as `finish` left it; root: the folder above it that the user named (see `check_links`).

    Attributes:
        manifest: see `read_manifest`.

    Raises:
        CacheError: as `read_manifest`; when reading, a shard that is missing, cut or changed, by name.
    """

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        self.folder, self.manifest = folder, read_manifest(folder, root)
        shards = self.manifest["shards"]
        self._paths = [str(folder / DATA / entry["name"]) for entry in shards]
        self._starts = np.concatenate([[0], np.cumsum([entry["rows"] for entry in shards])]).tolist()
        self._checked: dict[int, tuple[int, int, int]] = {}  # `_stamp` of the file that was found intact
        self._shards: dict[int, _Shard] = {}  # of these
        self._places: dict[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # each process maps the files by itself

    def __len__(self) -> int:
        return self.manifest["total_rows"]

    def check(self, indices: Iterable[int]) -> dict[int, str]:
        """Reads these shards whole; returns the damage by index. Intact ones are read again only if they change."""
        found = {}
        for index in indices:
            stamp = _stamp(self._paths[index])  # before it is read: a change meanwhile shows
            if reason := damage(self.folder, self.manifest["shards"][index]):
                found[index] = reason
            elif stamp is not None:
                self._checked[index] = stamp
        return found

    def head_is_whole(self) -> bool:
        """Whether the file of the teacher's output head is intact."""
        path = self.folder / HEAD
        return path.is_file() and digest(path) == self.manifest.get("head_sha256")

    def take(self, row_ids: Sequence[int]) -> Rows:
        """The rows with these ids, in this order.

        Raises:
            CacheError: a row that is not in the cache; a damaged shard.
        """
        places = [self._locate(int(row_id)) for row_id in row_ids]
        shards = {index: self._shard(index) for index in dict.fromkeys(index for index, _ in places)}
        return _gathered([(shards[index], row) for index, row in places])

    def _locate(self, row_id: int) -> tuple[int, int]:
        """The shard of a row and its place in it."""
        place = row_id
        if self.manifest["row_ids"] != "position":
            if self._places is None:
                ids = np.concatenate([self._shard(index).row_ids for index in range(len(self._paths))])
                self._places = {int(one): i for i, one in enumerate(ids)}
            place = self._places.get(row_id, -1)
        if not 0 <= place < len(self):
            fix = "Train on the rows that the cache was built from, or build one for these."
            expected = f"rows of the teacher cache, which has {len(self):,}"
            raise CacheError(message("train_dataset", f"one with row {row_id}", expected, fix))
        index = bisect.bisect_right(self._starts, place) - 1
        return index, place - self._starts[index]

    def _shard(self, index: int) -> _Shard:
        """A shard, checked again where its file has changed: reading a mapped file that was cut kills the process."""
        stamp = _stamp(self._paths[index])
        if stamp is None or stamp != self._checked.get(index):
            self._shards.pop(index, None)
            if reason := self.check([index]).get(index):
                raise CacheError(damage_message(self._paths[index], reason))
        if index not in self._shards:
            shard = _mapped(Path(self._paths[index]), self.manifest["shards"][index])
            if shard.form() != next(iter(self._shards.values()), shard).form():
                raise CacheError(foreign_message(self._paths[index], "its columns are not those of the other shards"))
            self._shards[index] = shard
        return self._shards[index]


class _Shard(NamedTuple):
    """The rows of a shard, memory-mapped."""

    row_ids: np.ndarray
    signatures: np.ndarray
    starts: np.ndarray  # [rows + 1] the first position of each row, and their number
    columns: dict[str, np.ndarray]  # [positions, width]

    def form(self) -> list[tuple[str, np.dtype, int]]:
        return [(name, values.dtype, values.shape[1]) for name, values in self.columns.items()]


def _gathered(rows: Sequence[tuple[_Shard, int]]) -> Rows:
    """Copies of rows of several shards, in this order."""
    spans = [(shard.columns, slice(shard.starts[row], shard.starts[row + 1])) for shard, row in rows]
    row_ids = np.array([shard.row_ids[row] for shard, row in rows])
    signatures = np.array([shard.signatures[row] for shard, row in rows])
    counts = np.array([span.stop - span.start for _, span in spans], np.int64)
    names = spans[0][0]
    return Rows(row_ids, signatures, counts, {n: np.concatenate([c[n][span] for c, span in spans]) for n in names})


def _stamp(path: str) -> tuple[int, int, int] | None:
    """Inode, size and time of a file, which change when it is written; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _mapped(path: Path, entry: Mapping[str, Any]) -> _Shard:
    """Maps a shard; CacheError where `write_shard` did not write it."""
    try:
        with pa.memory_map(str(path)) as file:
            (batch,) = pa.ipc.open_stream(file)
        batch.validate(full=True)
        if batch.nbytes > entry["bytes"]:
            raise ValueError("it is compressed")
        row_ids, signatures = (np.asarray(batch.column(name)) for name in ("row_id", "signature"))
        if row_ids.dtype != np.int64 or signatures.dtype != np.uint64:
            raise ValueError("row_id is no int64 or signature no uint64")
        columns = {name: batch.column(name) for name in batch.schema.names if name not in ("row_id", "signature")}
        starts = [np.asarray(column.offsets) for column in columns.values()]
        if not starts or any(not np.array_equal(each, starts[0]) for each in starts):
            raise ValueError("it has no columns, or columns of other positions than the first")
        if (batch.num_rows, int(starts[0][-1]) - int(starts[0][0])) != (entry["rows"], entry["positions"]):
            raise ValueError("its numbers of rows or positions are not those of the manifest")
        return _Shard(row_ids, signatures, starts[0], {name: _entries(name, c) for name, c in columns.items()})
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, pa.ArrowException) as error:
        raise CacheError(foreign_message(str(path), (str(error).splitlines() or [type(error).__name__])[0])) from error


def _entries(name: str, column: pa.ListArray) -> np.ndarray:
    """[positions, width] of a column, not copied."""
    entries = column.values
    values = entries.values.to_numpy(zero_copy_only=True)  # raises where one is missing
    if column.null_count or entries.null_count or values.dtype.kind not in "iuf":
        raise ValueError(f"{name} has entries that are no numbers")
    return values.reshape(-1, entries.type.list_size)
