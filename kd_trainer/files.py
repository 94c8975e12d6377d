"""Files written whole or not at all, and their digests. Imports: the standard library only."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def digest(path: Path, *, sync: bool = False) -> str:
    """SHA-256 of a file's content, read in blocks; `sync`: which is on the disk afterwards."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        found = hashlib.sha256()
        for block in iter(lambda: file.read(2**22), b""):
            found.update(block)
    return found.hexdigest()


def write_atomically(path: str | os.PathLike[str], content: str | bytes | memoryview) -> Path:
    """Writes to a temporary name in the same folder, syncs, renames: a reader sees the old file or the new one.

    The folder is made where it does not exist; text is UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own mode would hide the file from others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
