"""Run by `accelerate launch` from test_denominators.py: every case with four rows a process, results into a folder."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors.torch import save_file

from tests.helpers import tiny
from tests.helpers.launch import leave


def result_of(run) -> dict:
    return {
        "world_size": run.accelerator.num_processes,
        "wrapper": type(run.model_wrapped).__name__,
        "logs": tiny.logs(run),
    }


def main(out: Path, cases: list[str]) -> None:
    evaluated = tiny.trainer("classification", out / "run", per_device_eval_batch_size=4)
    metrics = {"even": evaluated.evaluate(tiny.rows("classification", 24, seed=2)), "uneven": evaluated.evaluate()}
    lm = tiny.trainer("causal_lm", out / "run", per_device_eval_batch_size=4)
    metrics["causal_lm"] = lm.evaluate(tiny.rows("causal_lm", 24, seed=2))
    # Only one process logs by itself: nothing in `log` may wait for the other.
    if evaluated.is_world_process_zero():
        evaluated.log({"note": 1.0})
        (out / "evaluation.json").write_text(json.dumps(metrics))
    local = tiny.trainer(
        "causal_lm",
        out / "run",
        kd_reduction="tokenmean",
        per_device_train_batch_size=4,
        average_tokens_across_devices=False,
    )
    local.train()
    if local.is_world_process_zero():
        (out / "local.json").write_text(json.dumps(result_of(local)))
    for case in cases:
        task, reduction = case.split("-")
        run = tiny.trainer(task, out / "run", kd_reduction=reduction, per_device_train_batch_size=4)
        run.train()
        if run.is_world_process_zero():
            save_file({"weights": tiny.weights(run.model).contiguous()}, out / f"{case}.safetensors")
            (out / f"{case}.json").write_text(json.dumps(result_of(run)))
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
