"""Teacher outputs on disk: Arrow shards under a sealed manifest, written whole or not at all, checked when first read.

For: `cache.py` and `cache_build.py`. Knows rows, columns and files; what the numbers mean is `cache_formats.py`'s.
Imports: cache_manifest, checks, files, datasets, pyarrow, xxhash.

A folder holds:
    manifest.json      the settings, size and XXH3-128 of each shard; written last: a folder without it is unfinished
    building.json      the settings while it is unfinished
    README.md          a card; `datasets.load_dataset(folder)` reads it
    head.safetensors   with hidden states alone: the teacher's output head
    data/              `datasets.load_from_disk(folder / "data")`: data-00000.arrow, ...

A row of the data has `row_id`, `signature` (a hash of what the teacher read), and its columns: a list with an entry of
fixed width for each of the row's positions.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from .cache_manifest import (
    BUILD_AGAIN,
    CacheError,
    check_links,
    check_manifest,
    check_settings,
    check_shard,
    shard_index,
    shard_name,
)
from .checks import message
from .files import atomic_file, digest, write_atomically

LAYOUT = 3  # of the folder; another number is another program's
MANIFEST, BUILDING, HEAD, DATA = "manifest.json", "building.json", "head.safetensors", "data"
_OPEN_FILES = 64
_UNSYNCED = 2**23  # bytes of a shard that may wait for the disk: its end need not wait for all of it
_AT_ONCE = 2**21  # bytes of the columns of a record batch, at least: each costs a third of a millisecond


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
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
    return Rows(ids, signatures, counts, columns)


# ---- writing --------------------------------------------------------------------------------------------------------


def begin(folder: Path, settings: dict[str, Any], root: Path | None = None) -> dict[str, Any]:
    """Notes the settings of an unfinished cache; returns those that were noted when it was begun, if it was.

    Args:
        root: the folder above it that the user named (see `check_links`).

    Raises:
        CacheError: what was noted was changed, cannot be right or is of another layout; a link leads out of the folder.
    """
    check_links(folder, root)
    path = folder / BUILDING
    (folder / DATA).mkdir(parents=True, exist_ok=True)
    written = ((folder, (".*.json.*", f".{HEAD}.*", ".README.md.*")), (folder / DATA, (".data-*", ".state.json.*")))
    for left in [left for where, patterns in written for pattern in patterns for left in where.glob(pattern)]:
        left.unlink(missing_ok=True)  # of a killed process; whoever builds holds the lock
    if not path.exists():
        write_atomically(path, _sealed(settings))
    noted = _of_this_layout(_read_sealed(path))
    check_settings(path, noted, complete=False)
    return noted


class ShardWriter:
    """Writes a shard while its rows come, with its digest beside it: to a temporary name, synced, renamed; first the
    digest. The same rows in the same parts make the same bytes. It may be ended by another thread."""

    def __init__(self, folder: Path, index: int) -> None:
        self.path = folder / DATA / shard_name(index)
        self._whole = atomic_file(self.path)
        self._file = self._whole.__enter__()
        self._sink = _Hashed(self._file)
        self._writer: Any = None
        self._waiting: list[Rows] = []
        self._waiting_bytes = 0  # of a small batch thousands may wait
        self._rows = self._positions = 0

    def add(self, rows: Rows) -> bool:
        """Writes the next rows. Returns whether it is time to `sync`."""
        self._waiting.append(rows)
        self._waiting_bytes += sum(column.nbytes for column in rows.columns.values())
        before = self._sink.size
        if self._waiting_bytes >= _AT_ONCE:
            self._write_waiting()
        return before // _UNSYNCED < self._sink.size // _UNSYNCED

    def _write_waiting(self) -> None:
        together, self._waiting, self._waiting_bytes = joined(self._waiting), [], 0
        batch = _record_batch(together)
        self._writer = self._writer or pa.ipc.new_stream(pa.PythonFile(self._sink, "w"), batch.schema)
        self._writer.write_batch(batch)
        self._rows, self._positions = self._rows + len(together.row_ids), self._positions + int(together.counts.sum())

    def sync(self) -> None:
        """Waits until what was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def end(self) -> None:
        """Writes what is left; afterwards all is on the disk, or an exception leaves nothing."""
        try:
            if self._waiting:
                self._write_waiting()
            self._writer.close()
            entry = {"name": self.path.name, "rows": self._rows, "positions": self._positions, "bytes": self._sink.size}
            write_atomically(self.path.with_suffix(".json"), _sealed(entry | {"xxh3": self._sink.xxh3.hexdigest()}))
        except BaseException:
            self.give_up()
            raise
        self._whole.__exit__(None, None, None)

    def give_up(self) -> None:
        """Leaves no file."""
        with contextlib.suppress(OSError):  # a full disk refuses what waits in the file's buffer
            self._whole.__exit__(GeneratorExit, GeneratorExit(), None)


class _Hashed(io.RawIOBase):
    """A file that is written on, and the size and digest of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.xxh3 = file, 0, xxhash.xxh3_128()  # ten times as fast as SHA-256

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        content = memoryview(content)
        self.xxh3.update(content)
        self.size += content.nbytes
        return self.file.write(content)


def _record_batch(rows: Rows) -> pa.RecordBatch:
    offsets = pa.array(np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int32))
    arrays = {"row_id": pa.array(rows.row_ids), "signature": pa.array(rows.signatures)}
    for name, values in rows.columns.items():
        entries = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        arrays[name] = pa.ListArray.from_arrays(offsets, entries)
    return pa.RecordBatch.from_pydict(arrays)


def written_notes(folder: Path) -> dict[int, dict[str, Any]]:
    """What is noted of the shards of an unfinished cache, by index; the shards themselves are not read."""
    found = {}
    for note in sorted((folder / DATA).glob("data-*.json")):
        index = shard_index(note.name)
        if index is None:
            continue
        try:
            entry = _read_sealed(note)
            check_shard(note, index, entry)
        except CacheError:
            continue
        entry.pop("sealed")
        found[index] = entry
    return found


def written_shards(folder: Path) -> set[int]:
    """The shards of an unfinished cache that are on disk as they were written; reads them whole."""
    return {index for index, entry in written_notes(folder).items() if damage(folder, entry) is None}


def first_rows(folder: Path, count: int) -> tuple[int, Rows] | None:
    """(index, first rows) of the first whole shard of an unfinished cache; None where it has none yet."""
    for index, entry in sorted(written_notes(folder).items()):
        if damage(folder, entry) is None:
            path = folder / DATA / entry["name"]
            with path.open("rb", buffering=0) as file:
                shard = _opened(file, path)
                rows = range(min(count, len(shard.row_ids)))
                columns = {
                    name: np.concatenate([shard.read(file, name, row) for row in rows]) for name in shard.columns
                }
            own = slice(0, len(rows))
            return index, Rows(shard.row_ids[own], shard.signatures[own], shard.counts[own], columns)
    return None


def reopen(folder: Path, manifest: Mapping[str, Any], damaged: set[int]) -> None:
    """Makes an unfinished cache of a finished one, in which the damaged shards are missing."""
    settings = {k: v for k, v in manifest.items() if k not in ("shards", "sealed", "head_sha256", *_TOTALS)}
    for index, entry in enumerate(manifest["shards"]):
        note = (folder / DATA / entry["name"]).with_suffix(".json")
        if index in damaged:
            note.unlink(missing_ok=True)
        else:
            write_atomically(note, _sealed(entry))
    write_atomically(folder / BUILDING, _sealed(settings))
    (folder / MANIFEST).unlink()


_TOTALS = ("total_rows", "total_positions", "total_bytes")


def damage(folder: Path, entry: Mapping[str, Any]) -> str | None:
    """Why the shard is not the one that was written, None where it is; reads all of it."""
    path = folder / DATA / entry["name"]
    if not path.is_file():
        return "the file is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"it has {size:,} bytes where {entry['bytes']:,} were written"
    return None if digest(path, by=xxhash.xxh3_128) == entry["xxh3"] else "its content has changed since it was written"


def finish(folder: Path, settings: dict[str, Any], shards: Sequence[dict[str, Any]], card: str) -> None:
    """Writes what makes the folder a cache; the manifest last."""
    import datasets

    names = [entry["name"] for entry in shards]
    with pa.OSFile(str(folder / DATA / names[0])) as file:
        schema = pa.ipc.open_stream(file).schema
    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema))
    info.write_to_directory(str(folder / DATA))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
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
    write_atomically(folder / MANIFEST, _sealed({**settings, **totals, **head, "shards": list(shards)}))
    clean(folder)


def clean(folder: Path) -> None:
    """Removes what a finished cache needs no more."""
    for left in [folder / BUILDING, *(folder / DATA).glob("data-*.json")]:
        left.unlink(missing_ok=True)


def _sealed(content: Mapping[str, Any]) -> str:
    return json.dumps({**content, "sealed": _seal(content)}, indent=2, sort_keys=True)


def _seal(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sealed"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode("utf-8")).hexdigest()


def _read_sealed(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(content, dict) and content["sealed"] == _seal(content)
    except FileNotFoundError:
        raise CacheError(
            message("teacher_cache", repr(str(path.parent)), f"a folder with {path.name}", BUILD_AGAIN)
        ) from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        whole, content = False, {}
        cause: Exception | None = error
    else:
        cause = None
    if not whole:
        told = message(
            "teacher_cache", repr(str(path)), "the file as it was written", BUILD_AGAIN, because="it was changed or cut"
        )
        raise CacheError(told) from cause
    return content


# ---- reading --------------------------------------------------------------------------------------------------------


def is_finished(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path, root: Path | None = None) -> dict[str, Any]:
    """The settings and shards of a finished cache.

    Args:
        root: the folder above it that the user named (see `check_links`).

    Raises:
        CacheError: there is none, it was changed, is of another layout or holds what cannot be right; a link leads out
            of the folder.
    """
    check_links(folder, root)
    if not is_finished(folder):
        begun = (folder / BUILDING).exists()
        mend = "Run the building again: it goes on." if begun else "Build it: trainer.build_teacher_cache()."
        shown = f"{str(folder)!r}, {'which is unfinished' if begun else 'which has no ' + MANIFEST}"
        raise CacheError(message("teacher_cache", shown, "a finished cache", mend))
    manifest = _of_this_layout(_read_sealed(folder / MANIFEST))
    check_manifest(folder / MANIFEST, manifest)
    return manifest


def _of_this_layout(manifest: dict[str, Any]) -> dict[str, Any]:
    layout = manifest.get("layout")
    if layout != LAYOUT or isinstance(layout, bool):
        mend = "Read it with that version of kd_trainer, or build it again in an empty folder."
        shown = f"of layout {str(layout)[:80]}, from kd_trainer {str(manifest.get('kd_trainer'))[:80]}"
        raise CacheError(message("teacher_cache", shown, f"layout {LAYOUT}", mend))
    return manifest


class _Column(NamedTuple):
    """Where a column lies in a shard."""

    dtype: np.dtype
    width: int
    places: np.ndarray  # [rows] int64: each row's first byte in the file


class _Shard(NamedTuple):
    """What a checked shard holds and where; its file may be closed."""

    name: str
    row_ids: np.ndarray
    signatures: np.ndarray
    counts: np.ndarray  # [rows] positions
    columns: dict[str, _Column]

    def read(self, file: Any, name: str, row: int) -> np.ndarray:
        """A column of a row [positions, width]."""
        dtype, width, places = self.columns[name]
        size = int(self.counts[row]) * width * dtype.itemsize
        content = _read_at(file, size, int(places[row]))
        if len(content) != size:
            raise CacheError(damaged(self.name, "it was cut while it was read"))
        return np.frombuffer(content, dtype).reshape(-1, width)


def damaged(name: str, reason: str) -> str:
    mend = (
        "Start a training with teacher_model and teacher_cache_dir: that shard alone is built again. Without the "
        "teacher, fetch the file again."
    )
    return message("teacher_cache", f"damaged in {name}", "the file as it was written", mend, because=reason)


def foreign(name: str, reason: str) -> str:
    """The message on a file that is as its manifest notes it, and not what this package writes."""
    shown = f"one whose {name} this package did not write"
    return message("teacher_cache", shown, "the file of a cache", BUILD_AGAIN, because=reason)


class Store:
    """A finished cache, read row by row, neither loaded nor mapped; shards are checked when first read or changed.

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
        self._starts = np.concatenate([[0], np.cumsum([entry["rows"] for entry in shards])]).tolist()
        self._checked: dict[int, tuple[int, int, int]] = {}  # the file that was found whole, as `_stamp` knows it
        self._shards: dict[int, _Shard] = {}  # of these; small beside the files
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()  # the files used last
        self._places: dict[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_shards": {}}  # each process opens its own files

    def __len__(self) -> int:
        return self.manifest["total_rows"]

    def check(self, indices: Iterable[int]) -> dict[int, str]:
        """Reads these shards whole; of the damaged ones, why. The others are read whole again only if they change."""
        found = {}
        for index in indices:
            entry = self.manifest["shards"][index]
            path = self.folder / DATA / entry["name"]
            stamp = _stamp(path.stat()) if path.is_file() else None  # before it is read: a change meanwhile shows
            if (reason := damage(self.folder, entry)) is not None:
                found[index] = reason
            elif stamp is not None:
                self._checked[index] = stamp
        return found

    def head_is_whole(self) -> bool:
        """Whether the teacher's output head is as it was written."""
        path = self.folder / HEAD
        return path.is_file() and digest(path) == self.manifest.get("head_sha256")

    def take(self, row_ids: Sequence[int]) -> Rows:
        """The rows with these ids, in this order.

        Raises:
            CacheError: a row that is not in the cache; a damaged shard.
        """
        places = [self._locate(int(row_id)) for row_id in row_ids]
        counts, signatures = np.zeros(len(places), np.int64), np.zeros(len(places), np.uint64)
        parts: dict[str, list[np.ndarray]] = {}
        for at in sorted(range(len(places)), key=places.__getitem__):  # shard by shard: one file at a time is enough
            index, row = places[at]
            file, shard = self._shard(index)
            counts[at], signatures[at] = shard.counts[row], shard.signatures[row]
            for name in shard.columns:
                parts.setdefault(name, [np.zeros(0)] * len(places))[at] = shard.read(file, name, row)
        columns = {name: np.concatenate(read) for name, read in parts.items()}
        return Rows(np.asarray(row_ids), signatures, counts, columns)

    def _locate(self, row_id: int) -> tuple[int, int]:
        """The shard of a row and its place in it."""
        place = row_id
        if self.manifest["row_ids"] != "position":
            if self._places is None:
                ids = np.concatenate([self._shard(i)[1].row_ids for i in range(len(self._starts) - 1)])
                self._places = {int(one): i for i, one in enumerate(ids)}
            place = self._places.get(row_id, -1)
        if not 0 <= place < len(self):
            mend = "Train on the rows that the cache was built from, or build one for these."
            expected = f"a row of the teacher cache, which has {len(self):,}"
            raise CacheError(message("train_dataset", f"asked for row {row_id}", expected, mend))
        index = bisect.bisect_right(self._starts, place) - 1
        return index, place - self._starts[index]

    def _shard(self, index: int) -> tuple[BinaryIO, _Shard]:
        """The open file of a shard, which is as it was checked, and what it holds."""
        file = self._open.get(index)
        if file is not None and _stamp(os.fstat(file.fileno())) == self._checked[index]:
            self._open.move_to_end(index)
            return file, self._shards[index]
        if file is not None:
            self._open.pop(index).close()
        entry = self.manifest["shards"][index]
        path = self.folder / DATA / entry["name"]
        if not path.is_file():
            raise CacheError(damaged(str(path), "the file is missing"))
        file = path.open("rb", buffering=0)
        try:
            stamp = _stamp(os.fstat(file.fileno()))
            if stamp != self._checked.get(index):
                if reason := self.check([index]).get(index):
                    raise CacheError(damaged(str(path), reason))
                self._checked[index] = stamp
                self._shards.pop(index, None)
            if index not in self._shards:
                self._shards[index] = self._read_places(file, path, entry)
        except BaseException:
            file.close()
            raise
        self._open[index] = file
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return file, self._shards[index]

    def _read_places(self, file: BinaryIO, path: Path, entry: Mapping[str, Any]) -> _Shard:
        """Raises CacheError for a file that is as it was written but no shard of this cache."""
        try:
            shard = _opened(file, path)
            alike = [(name, column.dtype, column.width) for name, column in shard.columns.items()]
            known = next(iter(self._shards.values()), shard)
            if alike != [(name, column.dtype, column.width) for name, column in known.columns.items()]:
                raise ValueError("its columns are not those of the other shards")
            if (len(shard.row_ids), int(shard.counts.sum())) != (entry["rows"], entry["positions"]):
                raise ValueError("it has other rows or positions than its manifest says")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, pa.ArrowException) as error:
            raise CacheError(foreign(str(path), (str(error).splitlines() or [type(error).__name__])[0])) from error
        return shard


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    """Tells whether a file was written since: all that can be known without reading it."""
    return found.st_ino, found.st_size, found.st_mtime_ns


def _opened(file: BinaryIO, path: Path) -> _Shard:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content = pa.py_buffer(mapped)
    parts = [_of_batch(batch, content, path) for batch in pa.ipc.open_stream(content)]
    del content
    mapped.close()  # after an error, whose traceback holds the buffer, it is closed with that
    first = parts[0]
    columns = {}
    for name, column in first.columns.items():
        columns[name] = column._replace(places=np.concatenate([part.columns[name].places for part in parts]))
    return first._replace(
        row_ids=np.concatenate([part.row_ids for part in parts]),
        signatures=np.concatenate([part.signatures for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        columns=columns,
    )


def _of_batch(batch: pa.RecordBatch, content: pa.Buffer, path: Path) -> _Shard:
    """What a record batch holds of the shard that is mapped; ValueError for what `ShardWriter` does not write."""
    batch.validate(full=True)
    row_ids, signatures = (np.array(batch.column(name)) for name in ("row_id", "signature"))
    if row_ids.dtype != np.int64 or signatures.dtype != np.uint64:
        raise ValueError("row_id is no int64 or signature no uint64")
    counts, columns = None, {}
    for name in batch.schema.names:
        if name in ("row_id", "signature"):
            continue
        column = batch.column(name)
        entries = column.values
        flat, offsets = entries.values, np.array(column.offsets)
        numbers = pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type)
        if not numbers or column.null_count or entries.null_count or flat.null_count:
            raise ValueError(f"{name} has entries that are no numbers")
        dtype, width = np.dtype(flat.type.to_pandas_dtype()), entries.type.list_size
        size, place, buffer = int(offsets[-1]) * width * dtype.itemsize, 0, flat.buffers()[1]
        if size and buffer is not None:  # nothing lies nowhere
            place = buffer.address - content.address + (flat.offset + entries.offset * width) * dtype.itemsize
        if not 0 <= place <= place + size <= content.size:
            raise ValueError(f"{name} lies outside of the file")
        columns[name] = _Column(dtype, width, place + offsets[:-1].astype(np.int64) * (width * dtype.itemsize))
        if counts is not None and not np.array_equal(counts, np.diff(offsets)):
            raise ValueError(f"{name} has other positions than the columns before it")
        counts = np.diff(offsets)
    if counts is None:
        raise ValueError("it has no columns")
    return _Shard(str(path), row_ids, signatures, counts, columns)


def _read_at(file: Any, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):  # processes that share the file do not move each other's place in it
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)
    return file.read(size)
