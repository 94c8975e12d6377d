"""Files written whole or not at all, and their digests. Imports: the standard library only."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def digest(path: Path, *, sync: bool = False, by: Callable[[], Any] = hashlib.sha256) -> str:
    """SHA-256 (or another digest) of a file's content, read in blocks; `sync`: which is on the disk afterwards."""
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
    """The same for what is written bit by bit: at the end it is synced and renamed; an exception leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own mode would hide the file from others
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)  # a signal may raise after the renaming too
        raise
