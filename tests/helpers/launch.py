"""Starts a script of the tests in two real processes (gloo), one such run at a time, and leaves none behind."""

from __future__ import annotations

import contextlib
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from filelock import FileLock

_TWO = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
_TWO += ["--dynamo_backend", "no"]
_KEPT: list[socket.socket] = []


def two_processes(script: str, *arguments: str, timeout: float = 900, fresh: bool = False) -> None:
    """Runs a script of this folder in two processes on the CPU; AssertionError with the end of its output.

    Args:
        fresh: by `accelerate launch`, else in two forks of a process that has the imports, with the variables that
            torch's launcher sets, and its store in this process.
    """
    if fresh:
        return _launch(_TWO, script, arguments, timeout)
    from torch.distributed import TCPStore

    from tests.helpers.script_process import SERVER

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.log") for rank in range(2)]
        processes = []
        for rank, log in enumerate(logs):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(SERVER.Process(target=_run_forked, args=(script, arguments, environment, str(log))))
            processes[-1].start()
        until = time.monotonic() + timeout
        try:
            while (running := [p for p in processes if p.is_alive()]) and time.monotonic() < until:
                if any(p.exitcode for p in processes):
                    break  # the other one would wait for it
                wait([p.sentinel for p in running], until - time.monotonic())
        finally:
            for process in processes:
                process.kill()
                process.join()
        output = "\n".join(log.read_text(encoding="utf-8")[-6000:] for log in logs if log.exists())
    assert [process.exitcode for process in processes] == [0, 0], output


def _run_forked(script: str, arguments: tuple[str, ...], environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(Path(__file__).resolve().parents[2])
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    path = Path(__file__).with_name(script)
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def two_processes_command(script: str) -> list[str]:
    """The command line of `two_processes`, without the arguments of the script."""
    return [sys.executable, *_command(_TWO, script)]


def by_config(config: Path, options: list[str], script: str, *arguments: str, timeout: float = 900) -> None:
    """The same with a config file of Accelerate, and options that change it."""
    _launch(["--config_file", str(config), *options], script, arguments, timeout)


def leave() -> None:
    """Ends a started script whose work is on disk: an interpreter's own end has aborted in gloo's threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _command(options: list[str], script: str) -> list[str]:
    """With a port that this process holds: accelerate finds it taken and binds a free one itself.

    A free port could be taken by another process before it is bound.
    """
    if not _KEPT:
        _KEPT.append(socket.create_server(("127.0.0.1", 0), backlog=1024))
    port = str(_KEPT[0].getsockname()[1])
    path = Path(__file__).with_name(script)
    return ["-m", "accelerate.commands.launch", *options, "--main_process_port", port, str(path)]


def _launch(options: list[str], script: str, arguments: tuple[str, ...], timeout: float) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        [sys.executable, *_command(options, script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            process.terminate()  # the launcher ends its processes, which a kill would leave behind
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()
            raise
    assert process.returncode == 0, output[-6000:]


@contextlib.contextmanager
def shared_folder(tmp_path_factory: Any) -> Iterator[Path]:
    """A folder that all test workers of this run share; one at a time."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(str(base / "two_processes.lock")):
        yield base


def once(tmp_path_factory: Any, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` that `make` filled, made by the first test worker that needs it.

    A run that failed is not tried again by the next worker: it fails there too.
    """
    with shared_folder(tmp_path_factory) as base:
        out = base / name
        if not out.exists():
            out.mkdir()
            make(out)
            (out / "done").touch()
    assert (out / "done").exists(), f"the run {name} has failed in another test worker"
    return out
