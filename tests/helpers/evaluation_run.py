"""Run by `accelerate launch` from test_evaluation_counts.py: evaluations whose rows do not fill the last batches.

Usage: evaluation_run.py OUT; the metrics go into OUT.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers import tiny
from tests.helpers.launch import leave

ROW_TASKS = ("classification", "multi_label_classification", "regression", "question_answering", "plain")
ROWS = (17, 21, 23)  # in two processes of four rows, the last batches have 1 and 0, 4 and 1, 4 and 3 rows of their own
SETTINGS: dict[str, dict[str, Any]] = {
    "batchmean": {},
    "tokenmean": {"kd_reduction": "tokenmean"},
    "fused": {"kd_reduction": "tokenmean", "kd_loss_implementation": "fused"},
    "attended": {"kd_reduction": "tokenmean", "kd_positions": "attended"},
}


def data(task: str, count: int, unlabelled: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Rows of a task, those at the places `unlabelled` without a label."""
    rows = tiny.rows(task, count, seed=2)
    for i in unlabelled:
        row = rows[i]
        if task == "question_answering":
            row["start_positions"], row["end_positions"] = -100, 99  # beyond the sequence is none either
        elif task == "regression":
            row["labels"] = math.nan
        elif task == "multi_label_classification":
            row["labels"] = [-100.0] * len(row["labels"])
        else:
            row["labels"] = [-100] * len(row["labels"]) if isinstance(row["labels"], list) else -100
    return rows


def evaluations(folder: Path, batch_size: int) -> dict[str, dict[str, float]]:
    """Metrics of every evaluation by its name."""
    found = {}
    for task in (*ROW_TASKS, "embedding", "causal_lm", "token_classification"):
        for name, settings in SETTINGS.items():
            if name in ("fused", "attended") and task != "causal_lm":
                continue
            hard = {"kd_hard_loss": "task"} if task == "question_answering" else {}
            run = tiny.trainer(task, folder, per_device_eval_batch_size=batch_size, **settings, **hard)
            for count in ROWS:
                found[f"{task} {name} {count}"] = run.evaluate(data(task, count))
            if task in ROW_TASKS:
                found[f"{task} {name} some"] = run.evaluate(data(task, 21, unlabelled=(0, 1, 2, 3, 9, 20)))
    return found


def main(out: Path) -> None:
    found = evaluations(out / "run", 4)
    run = tiny.trainer("plain", out / "run")
    if run.is_world_process_zero():
        result = {"world_size": run.accelerator.num_processes, "evaluations": found}
        (out / "evaluations.json").write_text(json.dumps(result))
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    main(Path(sys.argv[1]))
    leave()
