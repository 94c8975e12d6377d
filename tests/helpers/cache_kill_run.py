"""The building of a teacher cache that cache_kills.py kills: 33 shards of training data, 3 of evaluation data.

A process can kill itself at a given file operation, so that a kill falls at an exact place.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import kd_trainer.cache.settings
from kd_trainer.cache import TOKEN_LOG_PROBS
from tests.helpers import chunk_run, tiny

ROWS = 260
FORMATS = ("hidden", "topk", "sampled", "logits")
PLACES, DONE = "places.txt", "built"
_OPERATIONS = ("open", "os.rename", "os.chmod", "os.remove")


class Places:
    """Counts the operations by which a process changes the cache's folder; ends the process before one of them.

    Args:
        folder: of the cache.
        kill_at: the operation, from 0, before which the process kills itself; None: at none.
        half: whether the file that was just written is cut to half its bytes first, as if the write were under way.
    """

    def __init__(self, folder: Path, kill_at: int | None, half: bool) -> None:
        self.folder, self.kill_at, self.half = str(folder.absolute()), kill_at, half
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or not str(arguments[0]).startswith(self.folder):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        self.seen.append(f"{event} {Path(arguments[0]).name}")
        if len(self.seen) - 1 == self.kill_at:
            cut = self.half and event == "os.rename"  # by then all is written
            if cut:
                os.truncate(arguments[0], Path(arguments[0]).stat().st_size // 2)
            print(f"killed before {self.seen[-1]}{', half written' if cut else ''}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def main(out: str, kept: str, rank: int, port: int | None, kill_at: int | None, half: bool) -> None:
    """Builds in `out`/cache, alone or as one of two that meet at the store on `port`; notes where it ended."""
    log = open(Path(out) / f"output-{rank}.txt", "a")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    if port is not None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # as torchrun does
        os.environ |= {**{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1"}
    places = Places(Path(out) / "cache", kill_at, half)
    run = trainer(Path(out), kept)
    run.build_teacher_cache()
    (Path(out) / f"{DONE}-{rank}").touch()
    (Path(out) / f"{PLACES}-{rank}").write_text("\n".join(places.seen))
    run.accelerator.end_training()


def trainer(out: Path, kept: str, rows: int = ROWS, **kwargs: Any) -> Any:
    """A run whose cache, `out`/cache, has a shard for each batch of 8 rows."""
    kd_trainer.cache.settings.SHARD_BYTES = 1
    if kept == TOKEN_LOG_PROBS:
        return chunk_run.trainer(out, data=chunk_run.rows(rows), teacher_cache_dir=str(out / "cache"), **kwargs)
    k = 4 if kept in ("topk", "sampled") else None
    settings = {"teacher_cache_dir": str(out / "cache"), "teacher_cache_format": kept, "teacher_cache_k": k}
    data = tiny.rows("causal_lm", rows)
    return tiny.trainer("causal_lm", out, data=data, **{"kd_reduction": "tokenmean", **settings, **kwargs})
