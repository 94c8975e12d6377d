"""The manifest of a teacher cache: written with a hash, every value checked when it is read.

A cache may be untrusted, and the files that its manifest names are read, written and removed. So every value is checked
before use: plain file names, known types and sizes, no links out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..losses import POOLINGS
from ..tasks import TASKS, Task
from ..validation import message
from .formats import DTYPES, FORMATS, SPARSE, TOKEN_LOG_PROBS
from .signatures import KINDS

LAYOUT = 4  # version of the folder and its shards
_LARGEST = 2**53  # of a count or a number of bytes: beyond it a float no longer holds every integer
BUILD_AGAIN = "Build the cache again in an empty folder, or fetch it again."


class CacheError(ValueError):
    """A cache on disk is damaged, or does not fit the teacher, data or settings of the run."""


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"data-{index:05d}.arrow"


def shard_index(name: str) -> int | None:
    """The index in the file name of a shard or of the note beside it; None for other names."""
    found = re.fullmatch(r"data-([0-9]{5,9})\.(arrow|json)", name)
    return int(found[1]) if found and Path(shard_name(int(found[1]))).stem == Path(name).stem else None


# ---- files ----


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a manifest, finished or not, with a hash of its content."""
    write_atomically(path, json.dumps({**content, "sha256": json_sha256(content)}, indent=2, sort_keys=True))


def json_sha256(content: Any) -> str:
    """SHA-256 of the content as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
        CacheError: it was changed or cut, or is of another layout.
    """
    content, cause = {}, None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        content = found if isinstance(found, dict) else {}
    except (ValueError, RecursionError) as error:
        cause = error
    layout, version = content.get("layout"), str(content.get("kd_trainer"))[:80]
    if type(layout) is int and layout != LAYOUT:  # first: another layout may keep its hash elsewhere
        fix = "Read it with that version of kd_trainer, or build it again in an empty folder."
        shown = f"{str(path.parent)!r} of layout {str(layout)[:80]}, from kd_trainer {version}"
        raise CacheError(message("teacher_cache", shown, f"layout {LAYOUT}", fix))
    if content.pop("sha256", None) != json_sha256(content):
        because = "it was changed or cut"
        text = message("teacher_cache", repr(str(path)), "the file as it was written", BUILD_AGAIN, because=because)
        raise CacheError(text) from cause
    return content


# ---- links ----


def check_links(folder: Path, root: Path | None = None) -> None:
    """Raises CacheError for a symbolic link in a folder, or in place of it, that leads out of the folder.

    Links to the blobs of the hub's own cache are allowed where the folder lies in one of its snapshots.

    Args:
        folder: a part of a cache; root: the folder above it that the user named, which itself may be a link.
    """
    inside = Path(os.path.realpath(folder))
    if root is not None:
        inside = Path(os.path.realpath(root)) / os.path.relpath(os.path.abspath(folder), os.path.abspath(root))
    allowed = [
        inside,
        *(up.parent.parent / "blobs" for up in (inside, *inside.parents) if up.parent.name == "snapshots"),
    ]
    for path in _links(folder):
        target = Path(os.path.realpath(path))
        if not any(target == each or each in target.parents for each in allowed):
            shown = f"{str(folder)!r} with the symbolic link {str(path)!r} to {str(target)!r}"
            fix = "Copy the file into the folder, or remove the link."
            because = "a cache must not read, overwrite or upload files elsewhere"
            raise CacheError(message("teacher_cache", shown, "files inside the folder", fix, because=because))


def _links(folder: Path) -> Iterator[Path]:
    if folder.is_symlink():
        yield folder
    for where, folders, files in os.walk(folder):
        yield from (path for name in (*folders, *files) if (path := Path(where, name)).is_symlink())


# ---- values ----

Kind = tuple[Callable[[Any], bool], str]  # the check of a value, and the words for what is expected


def _whole(low: int, high: int = _LARGEST) -> Kind:
    return (lambda v: type(v) is int and low <= v <= high), f"a whole number from {low:,} to {high:,}"


def _number(above: float = -1e300) -> Kind:
    words = "a finite number" + (f" > {above:g}" if above > -1e300 else "")
    return (lambda v: type(v) in (int, float) and above < v < 1e300), words


def _text(longest: int = 4096) -> Kind:
    return (lambda v: isinstance(v, str) and len(v) <= longest and v.isprintable()), "printable text"


def _one_of(*choices: str) -> Kind:
    return (lambda v: isinstance(v, str) and v in choices), "one of " + ", ".join(map(repr, choices))


def _digits(count: int) -> Kind:
    pattern = re.compile(f"[0-9a-f]{{{count}}}")
    return (lambda v: isinstance(v, str) and bool(pattern.fullmatch(v))), f"{count} hexadecimal digits"


def _or_null(kind: Kind) -> Kind:
    return (lambda v: v is None or kind[0](v)), f"{kind[1]}, or null"


def _list_of(kind: Kind, shortest: int = 0) -> Kind:
    return (lambda v: isinstance(v, list) and len(v) >= shortest and all(map(kind[0], v))), f"a list of {kind[1]}"


def _object_of(kind: Kind) -> Kind:
    return (lambda v: isinstance(v, dict) and all(map(kind[0], v.values()))), f"an object of {kind[1]}"


_ANY: Kind = (lambda v: True), "anything"
_OBJECT: Kind = _object_of(_ANY)[0], "an object"
_PAIR: Kind = (lambda v: isinstance(v, list) and [type(x) for x in v] == [int, int]), "pairs of whole numbers"
_BOOLEAN: Kind = (lambda v: isinstance(v, bool)), "true or false"
_IDS = 2**31 - 1
FIELDS: dict[str, Kind] = {
    "layout": _whole(0),
    "kd_trainer": _text(),
    "part": _text(),
    "format": _one_of(*FORMATS, TOKEN_LOG_PROBS),
    "classes": _whole(1, _IDS),
    "k": _or_null(_whole(1, _IDS)),
    "temperature": _or_null(_number(above=0)),
    "dtype": _one_of(*DTYPES),
    "shape": _list_of(_whole(1, _IDS), 1),
    "vocabulary": _whole(1, _IDS),
    "common_ids": _or_null(_whole(1, _IDS)),
    "known_by": _or_null(_text()),
    "hidden_size": _whole(0, _IDS),
    "head_dtype": _or_null(_one_of(*DTYPES)),
    "head_scale": _number(),
    "head_softcap": _or_null(_number(above=0)),
    "task": _one_of(*TASKS),
    "positions": _one_of("labels", "attended"),
    "labels": _or_null(_object_of(_text())),
    "teacher": _OBJECT,
    "teacher.given": _text(),
    "teacher.name": _text(),
    "teacher.parameters": _or_null(_whole(0)),
    "teacher.weights": _or_null(_digits(64)),
    "tokenizer": _or_null(_digits(64)),
    "collation": _OBJECT,
    "dataset": _OBJECT,
    "dataset.rows": _or_null(_whole(1)),
    "dataset.sample": _list_of(_PAIR),
    "columns_read": _list_of(_text()),
    "kinds": _object_of(_one_of(*KINDS)),
    "row_ids": _one_of("position", "column"),
    "batch_rows": _whole(1, _IDS),
    "rows_per_shard": _whole(1),
    "seed": _whole(-_LARGEST),
    "computed": _text(),
}  # the settings, by path
_SHARE: Kind = (lambda v: _number(above=-1)[0](v) and v >= 0), "a number >= 0"
_A_TEACHER: Kind = (
    (lambda v: isinstance(v, dict) and _SHARE[0](v.get("weight")) and _text()[0](v.get("teacher_id", ""))),
    "objects with a weight >= 0, and a teacher_id that is printable text or none",
)
_OPTIONAL = {
    "teacher.teachers": _list_of(_A_TEACHER, 2),
    "shifted": _BOOLEAN,
    "label_names": _list_of(_text(), 1),
    "pooling": _one_of(*POOLINGS),
    "pooling_of_run": _BOOLEAN,
}  # where they are not the task's usual ones
_OF_A_SHARD = {"rows": _whole(1), "positions": _whole(0), "bytes": _whole(1), "xxh3": _digits(32)}
_OF_A_MANIFEST = {"row_ids": FIELDS["row_ids"], "total_rows": _whole(1), "total_positions": _whole(0),
                  "total_bytes": _whole(1), "shards": _list_of(_OBJECT, 1)}  # fmt: skip
_ABSENT = object()


def _at(content: Mapping[str, Any], field: str) -> Any:
    value: Any = content
    for part in field.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value


def _refuse(path: Path, field: str, value: Any, expected: str, because: str | None = None) -> None:
    text = "no value" if value is _ABSENT else repr(value)
    text = text if len(text) <= 120 else f"{text[:117]}..."
    shown = f"{str(path)!r} with {text} for {field!r}"
    raise CacheError(message("teacher_cache", shown, expected, BUILD_AGAIN, because=because))


def _check(path: Path, content: Mapping[str, Any], fields: Mapping[str, Kind], *, complete: bool, of: str = "") -> None:
    for field, (fits, expected) in fields.items():
        value = _at(content, field)
        if (value is _ABSENT and complete) or (value is not _ABSENT and not fits(value)):
            _refuse(path, of + field, value, expected)


def check_settings(path: Path, settings: Mapping[str, Any], *, complete: bool) -> None:
    """Raises CacheError for the first setting of a cache with a wrong type or size.

    Args:
        path: the file that holds them; complete: whether every field has to be there.
    """
    _check(path, settings, FIELDS, complete=complete)
    _check(path, settings, _OPTIONAL, complete=False)
    if not complete:
        return
    form, k, classes, batch_rows = (settings[name] for name in ("format", "k", "classes", "batch_rows"))
    sparse, with_format = form in SPARSE, f"with the format {form!r}"
    shape, vocabulary = settings["shape"], settings["vocabulary"]
    right: list[tuple[str, bool, str]] = [
        ("rows_per_shard", settings["rows_per_shard"] % batch_rows == 0, f"a multiple of {batch_rows} (batch_rows)"),
        ("k", not sparse or (k is not None and (form != "topk" or k < classes)), f"1 to {classes - 1} {with_format}"),
        ("temperature", not sparse or settings["temperature"] is not None, f"a number {with_format}"),
        ("classes", classes <= vocabulary == shape[-1], f"at most {vocabulary}, the last number of the shape {shape}"),
        ("hidden_size", form != "hidden" or bool(settings["hidden_size"] and settings["head_dtype"]),
         f"a width and a head_dtype {with_format}"),
    ]  # fmt: skip
    for field, fits, expected in right:
        if not fits:
            _refuse(path, field, settings[field], expected)


def head_of(settings: Mapping[str, Any]) -> Task:
    """The task of a cache, with the shift and the label columns of the student at its building."""
    task = TASKS[settings["task"]]
    names = tuple(settings.get("label_names", task.label_names))
    return replace(task, shifted=settings.get("shifted", task.shifted), label_names=names)


def settings_of_task(task: Task) -> dict[str, Any]:
    """The settings that `head_of` reads."""
    usual = TASKS[task.name]
    settings: dict[str, Any] = {"task": task.name}
    if task.shifted != usual.shifted:
        settings["shifted"] = task.shifted
    return settings if task.label_names == usual.label_names else settings | {"label_names": list(task.label_names)}


def check_shard(path: Path, index: int, entry: Mapping[str, Any]) -> None:
    """Raises CacheError unless an entry has the file name of this index and valid numbers."""
    name = entry.get("name", _ABSENT)
    if name != shard_name(index):
        because = "a name in a manifest is a file in its own folder"
        _refuse(path, f"shards.{index}.name", name, repr(shard_name(index)), because)
    _check(path, entry, _OF_A_SHARD, complete=True, of=f"shards.{index}.")


def check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raises CacheError where the shards, the totals or a setting of a finished cache are invalid."""
    check_settings(path, manifest, complete=False)
    _check(path, manifest, _OF_A_MANIFEST, complete=True)
    for index, entry in enumerate(manifest["shards"]):
        check_shard(path, index, entry)
    for what in ("rows", "positions", "bytes"):
        total = sum(entry[what] for entry in manifest["shards"])
        if manifest[f"total_{what}"] != total:
            _refuse(path, f"total_{what}", manifest[f"total_{what}"], f"{total}, the sum over the shards")
    rows, full = [entry["rows"] for entry in manifest["shards"]], manifest.get("rows_per_shard")
    if full is not None and (set(rows[:-1]) - {full} or rows[-1] > full):
        _refuse(path, "shards", rows, f"{full} rows in each shard but the last")
