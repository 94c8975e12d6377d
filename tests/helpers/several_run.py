"""Run by `accelerate launch` from test_several_teachers.py: several teachers, whose rows lie on one process.

Usage: several_run.py OUT BACKEND..., a backend is ddp, fsdp2 or zero3.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import LlamaForCausalLM

from kd_trainer.tasks import output_head
from tests.helpers import backend_run, tiny
from tests.helpers.launch import leave

_SMALL = output_head.SMALL_VOCABULARY
# Of eight rows of a step the first four are the first process's. The second one has no row of teacher 1.
IDS = {"all_on_one": [0] * 8, "one_without": [0, 1, 1, 0, 0, 0, 0, 0], "base_without": [1, 0, 0, 1, 1, 1, 1, 1],
       "mixture": None, "fused": None, "fused_without": [0, 1, 1, 0, 0, 0, 0, 0]}  # fmt: skip
CASES = {
    "ddp": list(IDS),
    "zero3": ["all_on_one", "one_without", "mixture", "fused", "fused_without"],
    "fsdp2": ["one_without", "mixture", "fused", "fused_without"],
}


def build(case: str, folder: Path, **arguments: Any) -> Any:
    student, base = backend_run.pair("lora" if case == "base_without" else "llama")
    torch.manual_seed(1)
    other = LlamaForCausalLM(tiny.llama_config(24, num_hidden_layers=2))
    data, ids = tiny.rows("causal_lm"), IDS[case]
    if ids is not None:
        data = [{**row, "teacher_id": ids[i % 8]} for i, row in enumerate(data)]
    output_head.SMALL_VOCABULARY = 0 if case.startswith("fused") else _SMALL
    settings = {"kd_reduction": "tokenmean", "max_steps": 4, "teacher_weights": [3, 1], **arguments}
    return tiny.trainer("causal_lm", folder, pair=(student, [base, other]), data=data, **settings)


def agreements(run: Any) -> dict[str, float]:
    """Of an evaluation whose last batches accelerate fills with repeated rows."""
    found = run.evaluate(run.train_dataset[:21])
    return {key: value for key, value in found.items() if key.startswith("eval_teacher_agreement_")}


def main(out: Path, backends: list[str]) -> None:
    for backend in backends:
        backend_run.begin(backend)
        arguments = backend_run.arguments_of(backend)
        for case in CASES[backend]:
            folder = out / backend / case
            run = build(case, folder, **arguments)
            run.train()
            run.save_model(str(folder / "saved"))
            sharded = [member.live.sharded for member in run.teacher.members]
            assert (run.teacher.heads is not None) == case.startswith("fused")
            found = {"world_size": run.accelerator.num_processes, "logs": tiny.logs(run), "sharded": sharded}
            if backend == "ddp":
                found["agreement"] = agreements(run)
            (folder / f"process_{run.args.process_index}.json").write_text(json.dumps(found))
            run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
