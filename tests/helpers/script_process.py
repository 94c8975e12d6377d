"""Runs a script in a process of its own without waiting for its imports: a fork of a server that has them already."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

from tests.helpers import tiny  # noqa: F401  what the scripts import: torch, transformers' models and Trainer, kd_trainer

SERVER = multiprocessing.get_context("forkserver")  # a fork of the test process itself would inherit its threads
SERVER.set_forkserver_preload([__name__])


def run_script(path: Path, argv: list[str], *, folder: Path | None = None, timeout: float = 120) -> str:
    """What `python path *argv` prints; AssertionError where it does not end with 0.

    Args:
        folder: where it is started; None: in the script's folder.
    """
    code, output = end_of_script(path, argv, folder=folder, timeout=timeout)
    assert code == 0, f"{path.name} ended with {code}:\n{output[-4000:]}"
    return output


def end_of_script(
    path: Path, argv: list[str], *, folder: Path | None = None, timeout: float = 120
) -> tuple[int | None, str]:
    """The exit code, negative for a signal, and the output; arguments as of `run_script`."""
    folder = folder or path.parent
    printed = folder / f"{path.stem}.log"
    process = SERVER.Process(target=_main, args=(str(path), argv, str(folder), str(printed)))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, printed.read_text(encoding="utf-8")


def _main(path: str, argv: list[str], folder: str, printed: str) -> None:
    gc.freeze()  # see conftest.py
    os.chdir(folder)
    with open(printed, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [path, *argv]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
