"""Atomic writes of files, their digests, and the conversion of values to JSON."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def digest(path: Path, *, sync: bool = False, by: Callable[[], Any] = hashlib.sha256) -> str:
    """SHA-256 (or another digest) of a file's content, read in blocks; `sync` flushes it to the disk first."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        found = by()
        for block in iter(lambda: file.read(2**22), b""):
            found.update(block)
    return found.hexdigest()


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes to a temporary name in the same folder, syncs, renames: a reader sees the old file or the new one.

    The folder is made where it does not exist; text is UTF-8.
    """
    with atomic_file(Path(path)) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to in several steps: at the end it is synced and renamed; an exception leaves nothing behind.

    The file has the mode that the process's umask gives new files, or that of the file it replaces.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = _new_file(path)
    try:
        with os.fdopen(handle, "wb") as file:
            if path.is_file() and not path.is_symlink():
                with contextlib.suppress(OSError):  # a file system without modes
                    os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) & 0o777)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a signal may raise after the renaming too
        raise


def _new_file(path: Path) -> tuple[int, Path]:
    """A new temporary file beside `path`, opened; the system applies the umask."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    while True:
        temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
        with contextlib.suppress(FileExistsError):
            return os.open(temporary, flags, 0o666), temporary


def as_json(value: Any) -> Any:
    """The value in JSON types: objects by their `to_dict`, or else as text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_json(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum):
        return as_json(value.value)
    if hasattr(value, "to_dict") and not isinstance(value, type):
        return as_json(value.to_dict())
    return str(value).removeprefix("torch.")
