"""Kills a training with SIGKILL at random moments, half of them inside a save, until it has ended all the same.

`python tests/helpers/kills.py --kills 20 --processes 2` prints where each kill fell, and compares the weights with
those of a run that was never killed, bit by bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.kill_run import HOLD
from tests.helpers.launch import two_processes_command

SCRIPT = Path(__file__).with_name("kill_run.py")


class Life:
    """One start of the training, in a process group of its own."""

    def __init__(self, out: Path, processes: int) -> None:
        self.out = out
        self.before = self.saves()
        command = [sys.executable, str(SCRIPT)] if processes == 1 else two_processes_command(SCRIPT.name)
        self.output = (out / "output.txt").open("a")
        self.process = subprocess.Popen(
            [*command, str(out)],
            stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True,
            cwd=SCRIPT.parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    def saves(self) -> set[tuple[str, float]]:
        """The checkpoints that are being written, each with the time at which that began."""
        seen = set()
        for mark in self.out.glob("checkpoint-*.unfinished"):
            try:
                seen.add((mark.name, mark.stat().st_mtime))
            except FileNotFoundError:  # it has ended meanwhile
                continue
        return seen

    def wait_for_a_save(self) -> bool:
        """True when a save of this life begins; False when the training ends before."""
        while self.process.poll() is None:
            if self.saves() - self.before:
                return True
            time.sleep(0.0005)
        return False

    def go_on(self, seconds: float) -> None:
        """Waits, but not for more than three saves: a fast machine would come to the end of the training."""
        until, seen = time.monotonic() + seconds, set()
        while time.monotonic() < until and len(seen) < 3:
            seen |= self.saves() - self.before
            time.sleep(0.0005)

    def kill(self, *, one: bool, draw: random.Random) -> None:
        """SIGKILL to all processes, or to one of the workers: the launcher then ends the other."""
        workers = [p for p in psutil.Process(self.process.pid).children(recursive=True) if SCRIPT.name in _line(p)]
        if one and workers:
            os.kill(draw.choice(workers).pid, signal.SIGKILL)
            self.process.wait(timeout=120)
        else:
            for worker in workers:
                os.kill(worker.pid, signal.SIGKILL)
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=120)

    def end(self) -> int:
        code = self.process.wait(timeout=600)
        self.output.close()
        return code


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def survive(out: Path, *, kills: int, processes: int, seed: int = 0, longest: float = 0.6) -> list[str]:
    """Trains in `out` through `kills` kills; returns where each fell.

    Args:
        longest: seconds after the first save of a life within which a kill that is not inside a save falls.
    """
    draw, fell = random.Random(seed), []
    while len(fell) < kills:
        inside = len(fell) % 2 == 0
        if inside:
            (out / HOLD).touch()  # that save does not end, however fast the disk is
        life = Life(out, processes)
        if not life.wait_for_a_save():
            raise AssertionError(f"ended with {life.end()} after {len(fell)} kills: {_tail(out)}")
        # A save takes about 20 ms here. The other kills fall at steps and in later saves, as it comes.
        life.go_on(draw.uniform(0, 0.02 if inside else longest))
        if life.process.poll() is not None:
            raise AssertionError(f"ended before kill {len(fell) + 1}: {_tail(out)}")
        life.kill(one=processes > 1 and len(fell) % 3 == 2, draw=draw)
        cut = life.saves() - life.before
        (out / HOLD).unlink(missing_ok=True)
        fell.append(f"inside {min(cut)[0].removesuffix('.unfinished')}" if cut else "between saves")
    code = Life(out, processes).end()
    assert code == 0, _tail(out)
    return fell


def whole(out: Path, processes: int) -> bytes:
    """The weights of a run in `out` that is never killed."""
    code = Life(out, processes).end()
    assert code == 0, _tail(out)
    return weights(out)


def weights(out: Path) -> bytes:
    return (out / "final" / "model.safetensors").read_bytes()


def _tail(out: Path) -> str:
    return (out / "output.txt").read_text()[-3000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        killed, unkilled = Path(folder) / "killed", Path(folder) / "unkilled"
        killed.mkdir()
        unkilled.mkdir()
        for number, where in enumerate(survive(killed, **vars(options)), 1):
            print(f"kill {number}: {where}")
        equal = weights(killed) == whole(unkilled, options.processes)
    print(f"{options.kills} kills, {options.processes} process(es): the weights are {'' if equal else 'NOT '}identical")
    raise SystemExit(not equal)


if __name__ == "__main__":
    main()
