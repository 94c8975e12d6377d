"""Run by `accelerate launch` from test_server.py: two processes fill the cache of a teacher behind a server.

Usage: server_run.py OUT URL [ROWS]: at that row the second process kills itself.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kd_trainer import DistillationTrainer
from kd_trainer.cache import settings as cache_settings
from kd_trainer.cache.server import ServerTeacher
from tests.helpers import tiny
from tests.helpers.launch import leave


def main(out: str, url: str, rows: int | None) -> None:
    cache_settings.SHARD_BYTES = 1
    served = {"url": url, "model": "tiny", "top_k": 5, "retries": 0, "concurrency": 2}
    run = DistillationTrainer(
        model=tiny.models("causal_lm")[0],
        args=tiny.arguments(
            Path(out, "run"), kd_reduction="tokenmean", kd_temperature=1.0, per_device_eval_batch_size=4,
            teacher_cache_dir=str(Path(out, "cache")), kd_run="cache",
            **{f"teacher_server_{name}": value for name, value in served.items()},
        ),
        data_collator=tiny.pad,
        train_dataset=tiny.rows("causal_lm", 24),
    )  # fmt: skip
    assert run.accelerator.num_processes == 2
    fetch, fetched = ServerTeacher.fetch, []

    def counted(self, *args):
        fetched.append(args)
        if run.args.process_index == 1 and len(fetched) == rows:
            while not list(Path(out).rglob("*.arrow")):  # a shard is complete, of either process
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return fetch(self, *args)

    ServerTeacher.fetch = counted
    with contextlib.suppress(SystemExit):  # kd_run "cache" ends the process
        run.train()
    Path(out, f"fetched_{run.args.process_index}").write_text(str(len(fetched)))


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
    leave()
