"""Files written whole or not at all. Imports: the standard library only."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
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
