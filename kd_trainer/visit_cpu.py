"""`visit.py` on a processor with a C compiler: `visit_cpu.c`, compiled for the divergence at hand on its first use.

That takes a quarter of a second in each process. `torch.compile`, which takes ten, makes loops of one sum at a time,
each with calls of an exponential in it: this takes 0.5 to 0.6 times as long as those, and sums ten times as exactly.
Imports: torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
# Sums in any order are asked for loop by loop; nothing else may be reordered, or the exponential loses its last digits.
_FLAGS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


def has_visit(*tiles: Tensor) -> bool:
    """Whether `visit_on_cpu` can visit tiles of these types, if the compiler does its work."""
    return _compiler() is not None and all(tile.device.type == "cpu" and tile.dtype in _TYPES for tile in tiles)


def visit_on_cpu(
    setting: Any, halves: int, student: Tensor, teacher: Tensor, weights: Tensor, *, gradient: bool
) -> tuple[Tensor, ...]:
    """What `visit._kl_visit` and `visit._mixture_visit` return: eight columns [R, 1], here in float64.

    Args:
        setting: a `visit.Setting`; another beta is no other code, another temperature one for each of `halves`.
        halves: `visit.halves_of` the temperature.
        student, teacher: logits over T [R, V], float32 or bfloat16; finite. Rows may lie apart, as in a slice.
        weights: [R, 2], as in `visit.visit`.
        gradient: whether the student's tile is overwritten by dL/d(student's logits over T), without the label's part.

    Raises:
        RuntimeError: the compiler failed; what it said.
    """
    assert student.stride(1) == 1
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    weights = weights.to(torch.float32).contiguous()
    (rows, columns), threads = student.shape, torch.get_num_threads()
    stats = torch.empty(rows, 8, dtype=torch.float64)
    room = torch.empty(threads, 2, columns)
    function = _function(
        setting.divergence, setting.hard, halves if setting.hard else 0, _TYPES[student.dtype], _TYPES[teacher.dtype]
    )
    function(
        student.data_ptr(), teacher.data_ptr(), rows, columns, student.stride(0), teacher.stride(0),
        weights.data_ptr(), setting.beta, setting.temperature, gradient, stats.data_ptr(), room.data_ptr(), threads,
    )  # fmt: skip
    return stats.split(1, dim=1)


@functools.lru_cache(maxsize=1)
def _compiler() -> str | None:
    names = (os.environ["CC"],) if os.environ.get("CC") else ("cc", "gcc", "clang")
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.lru_cache(maxsize=64)
def _function(divergence: str, hard: bool, halves: int, student: str, teacher: str) -> Any:
    known = {"DIVERGENCE": divergence, "HARD": int(hard), "HALVES": halves, "STUDENT": student, "TEACHER": teacher}
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = Path(folder, "visit.so")
        given = [f"-D{name}={value}" for name, value in known.items()]
        source = Path(__file__).with_name("visit_cpu.c")
        command = [str(_compiler()), *_FLAGS, *wide, *given, "-shared", "-fPIC", str(source), "-o", str(library), "-lm"]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"{command[0]}: {next(iter(made.stderr.splitlines()), made.returncode)}")
        function = ctypes.CDLL(str(library)).visit
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [pointer, pointer, number, number, number, number, pointer, ctypes.c_float, ctypes.c_float]
    function.argtypes += [ctypes.c_int, pointer, pointer, ctypes.c_int]
    function.restype = None
    return function
