"""C code on a processor with a C compiler: compiled for the given types and settings, on first use.

That takes a quarter of a second in each process, and nothing is kept on disk. Without a compiler, or where it fails,
what calls this has another way in torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAYS_FROM = 2**18  # logits at once; below it compiling may take longer than it will ever save
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
# Sums may run in any order where a loop allows it. Reordering anything else costs the exponential its last digits.
_FLAGS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


def can_compile(*tensors: Tensor) -> bool:
    """Whether there is a compiler, and tensors of these types lie where its code runs."""
    return _compiler() is not None and all(x.device.type == "cpu" and x.dtype in TYPES for x in tensors)


@functools.lru_cache(maxsize=1)
def _compiler() -> tuple[str, ...] | None:
    """The command: the environment's CC, which may be several words ("ccache gcc"), or the first of the usual names."""
    given = os.environ.get("CC", "").strip()
    if not given:
        return next(((path,) for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if path := shutil.which(given):  # its path may have spaces
        return (path,)
    try:
        first, *others = shlex.split(given)
    except ValueError:  # an open quote, or nothing within quotes
        return None
    return (path, *others) if (path := shutil.which(first)) else None


def call(function: Any, *arguments: Tensor | float) -> int:
    """What a C function returns, an int: it is given tensors as pointers to their first element, whole numbers as
    int64_t and other numbers as float."""
    given: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            given.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            given.append(ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument))
    return function(*given)


@functools.lru_cache(maxsize=128)
def compiled(source: str, **known: str | int) -> ctypes.CDLL:
    """A C file of this folder, compiled with `known` as macros.

    Raises:
        RuntimeError: the compiler failed, with its first line.
    """
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    path = Path(__file__).with_name(source)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = Path(folder, "code.so")
        given = [f"-D{name}={value}" for name, value in known.items()]
        command = [
            *(_compiler() or ("cc",)),
            *_FLAGS,
            *wide,
            *given,
            "-shared",
            "-fPIC",
            str(path),
            "-o",
            str(library),
            "-lm",
        ]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"{command[0]}: {next(iter(made.stderr.splitlines()), made.returncode)}")
        return ctypes.CDLL(str(library))
