"""Of two processes: data that joins a teacher cache later, a finished cache read again, another teacher refused."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers import backend_run, config_run, launch, tiny


def losses(trainer: Any, data: Any) -> dict[str, float]:
    found = trainer.predict(data).metrics
    return {name: found[name] for name in ("test_loss", "test_soft_loss", "test_hard_loss") if name in found}


def main(out: Path, task: str) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        backend_run.run_fsdp2_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        backend_run.run_deepspeed_on_cpu()
    data, world = tiny.rows("causal_lm", 16, seed=9), int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"per_device_eval_batch_size": 4, "per_device_train_batch_size": 8 // world}
    first = config_run.build(task, out / "run", **settings)
    teacher = first._teacher_cache.given  # held: at hand for an evaluation, where it is not sharded
    first.train()
    at_hand = losses(first, data)
    second = config_run.build(task, out / "run", **settings)
    second.build_teacher_cache(data)
    second.train()
    built = losses(second, data)
    third = config_run.build(task, out / "run", **settings)
    third._teacher_cache.given.model.norm.register_forward_hook(lambda module, args, output: output * 1.5)
    try:
        third.build_teacher_cache()
        refused = ""
    except ValueError as error:
        refused = str(error)
    found = {"at_hand": at_hand, "built": built, "refused": refused, "held": teacher is not None}
    found["world_size"] = first.accelerator.num_processes
    (out / f"found-{first.args.process_index}.json").write_text(json.dumps(found))
    first.accelerator.wait_for_everyone()


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    main(Path(sys.argv[1]), sys.argv[2])
    launch.leave()
