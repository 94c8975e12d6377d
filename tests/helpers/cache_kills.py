"""Kills buildings of a teacher cache with SIGKILL, and starts each again until it has ended all the same.

`python tests/helpers/cache_kills.py --kills 20 --processes 2` makes 20 buildings, each of which is killed once at
least: half of them at an exact place (a shard half written, between its digest and itself, around the manifest), the
others at any moment since their start or since their first file. It prints where the kills fell, and compares every
file with those of a building by one process that was never killed. The processes are forks of one that has torch
imported: imports touch no file.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from torch.distributed import TCPStore

from kd_trainer.cache import TOKEN_LOG_PROBS
from tests.helpers import cache_kill_run
from tests.helpers.cache_kill_run import DONE, FORMATS, PLACES
from tests.helpers.script_process import SERVER

_LONGEST = 120.0  # seconds that a building may take


class Life:
    """One start of a building.

    Args:
        out: of the building; the cache is `out`/cache.
        aim: (rank, operation) before which that process kills itself; half: see `cache_kill_run.Places`.
    """

    def __init__(self, out: Path, kept: str, processes: int, aim: tuple[int, int] | None = None, half: bool = False):
        # The two meet at a store that lives here: a free port could be taken by another process before it is bound.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
        port = None if self._store is None else self._store.port
        self.out, self.begun, self.processes = out, time.monotonic(), []
        for left in out.glob(f"{DONE}-*"):
            left.unlink()
        for rank in range(processes):
            place = aim[1] if aim is not None and aim[0] == rank else None
            arguments = (str(out), kept, rank, port, place, half)
            self.processes.append(SERVER.Process(target=cache_kill_run.main, args=arguments))
            self.processes[-1].start()

    def kill_after(self, seconds: float, *, of_writing: bool) -> bool:
        """SIGKILL to all processes at that time since the start, or since the first file; False where they ended."""
        since, before = self.begun, files(self.out)
        while of_writing and self._runs() and files(self.out) == before:
            since = time.monotonic()
        while time.monotonic() - since < seconds and self._runs():
            time.sleep(0.0005)
        running = self._runs()
        self._kill()
        return running and not self.built()

    def end(self, draw: random.Random) -> bool:
        """Waits for the end; where one process is killed the other follows soon. True where the cache was built."""
        until = self.begun + _LONGEST
        while all(p.exitcode is None for p in self.processes) and time.monotonic() < until:
            time.sleep(0.0005)
        if any(p.exitcode == -signal.SIGKILL for p in self.processes):
            time.sleep(draw.uniform(0, 0.1))  # the other goes on writing its shards meanwhile
            self._kill()
            return False
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [p.exitcode for p in self.processes]
        self._kill()
        assert codes == [0] * len(codes), f"ended with {codes}: {_tail(self.out)}"
        return True

    def built(self) -> bool:
        return len(list(self.out.glob(f"{DONE}-*"))) == len(self.processes)

    def _runs(self) -> bool:
        return any(p.exitcode is None for p in self.processes)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def files(out: Path) -> int:
    """How many are in the data folders of the cache, temporary ones too."""
    return len(list(out.glob("cache/*/data/*")))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by its path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def whole(out: Path, kept: str, processes: int) -> tuple[dict[str, bytes], list[list[str]], float]:
    """A building that is never killed: its files, the operations of each process, and its seconds."""
    out.mkdir(parents=True)
    life = Life(out, kept, processes)
    life.end(random.Random(0))
    places = [(out / f"{PLACES}-{rank}").read_text().splitlines() for rank in range(processes)]
    return content(out / "cache"), places, time.monotonic() - life.begun


def survive(
    out: Path, kept: str, processes: int, draw: random.Random, places: list[list[str]], seconds: float, *, aimed: bool
) -> list[str]:
    """Builds in `out` through one to three kills; returns where each fell.

    Args:
        places, seconds: of a building that was not killed (`whole`).
        aimed: whether the first kill falls at a drawn place, a third of these at other files than shards.
    """
    fell: list[str] = []
    for number in range(draw.choice((1, 1, 2, 3))):
        rank = draw.randrange(processes)
        if aimed and number == 0:
            rare = [i for i, place in enumerate(places[rank]) if "data-" not in place]
            among: Any = rare if rare and draw.random() < 1 / 3 else range(len(places[rank]))
            out.mkdir(exist_ok=True)
            life = Life(out, kept, processes, (rank, draw.choice(among)), half=draw.random() < 0.5)
            ended = life.end(draw)
            fell += [] if ended else [_last_place(out, rank)]
        else:
            ended, latest = True, seconds
            while ended:
                out.mkdir(exist_ok=True)
                of_writing = draw.random() < 2 / 3
                after = draw.uniform(0, latest / 2 if of_writing else latest)
                ended = not Life(out, kept, processes).kill_after(after, of_writing=of_writing)
                if not ended:
                    since = "the first file" if of_writing else "the start"
                    fell.append(f"{after:.2f} s after {since}, {files(out)} files in data")
                elif number == 0:  # too late: from the beginning, and earlier
                    shutil.rmtree(out)
                    latest = after
                else:
                    break
        if ended:
            break
    assert fell
    assert Life(out, kept, processes).end(draw)
    return fell


def difference(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """The files that are not the same, or not there, or left over."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def _last_place(out: Path, rank: int) -> str:
    lines = (out / f"output-{rank}.txt").read_text().splitlines()
    return next(line for line in reversed(lines) if line.startswith("killed before"))


def _tail(out: Path) -> str:
    return "".join(log.read_text()[-3000:] for log in sorted(out.glob("output-*.txt")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="buildings, each of which is killed")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    choices = [*FORMATS, TOKEN_LOG_PROBS]
    parser.add_argument("--format", choices=choices, help="one after the other where it is left out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # the killed leave semaphores to it, and it would say so
    draw, identical, kills = random.Random(options.seed), 0, 0
    formats = [options.format] if options.format else choices
    with tempfile.TemporaryDirectory() as folder:
        unkilled = {}
        whole(Path(folder) / "imports", formats[0], 1)  # whose seconds say nothing of the building
        for kept in formats[: options.kills]:
            expected, places, seconds = whole(Path(folder) / f"whole-{kept}", kept, 1)
            if options.processes > 1:
                found, places, seconds = whole(Path(folder) / f"two-{kept}", kept, 2)
                wrong = difference(found, expected)
                print(f"{kept}: two processes and one: {'NOT ' if wrong else ''}identical {', '.join(wrong)}")
                identical -= bool(wrong)
            unkilled[kept] = expected, places, seconds
            shards = sum(name.endswith(".arrow") for name in expected)
            print(f"{kept}: {shards} shards, {len(expected)} files, {seconds:.2f} s without a kill", flush=True)
        for number in range(options.kills):
            kept, out = formats[number % len(formats)], Path(folder) / f"killed-{number}"
            expected, places, seconds = unkilled[kept]
            aimed = (number + number // len(formats)) % 2 == 0
            fell = survive(out, kept, options.processes, draw, places, seconds, aimed=aimed)
            wrong = difference(content(out / "cache"), expected)
            identical, kills = identical + (not wrong), kills + len(fell)
            message = f"NOT identical: {', '.join(wrong)}" if wrong else "identical"
            print(f"building {number + 1}, {kept}: {'; '.join(fell)}: {message}", flush=True)
    print(
        f"{options.kills} buildings, {options.processes} process(es), {kills} kills: "
        f"{identical} caches identical in every file"
    )
    raise SystemExit(identical != options.kills)


if __name__ == "__main__":
    main()
