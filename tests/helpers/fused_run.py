"""Run by `accelerate launch` from test_fused_trainer.py: cases of the fused loss under DDP, results into a folder."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import HyperCLOVAXConfig, HyperCLOVAXForCausalLM

from kd_trainer.tasks import output_head
from tests.helpers import tiny
from tests.helpers.launch import leave

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "second way": {},  # the first forward shows that the logits are multiplied, where most models divide
    "not plain": {},
}


def build(case: str, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    pair = tiny.models("causal_lm")
    if case == "second way":
        config = HyperCLOVAXConfig(**{**tiny.llama_config().to_dict(), "logits_scaling": 0.5, "model_type": None})
        pair = HyperCLOVAXForCausalLM(config), pair[1]
    elif case == "not plain":
        pair[0].lm_head.register_forward_hook(lambda module, given, out: out / 2)
    return tiny.trainer(
        "causal_lm",
        folder,
        pair=pair,
        data=tiny.rows("causal_lm", 80),
        **{"kd_reduction": "tokenmean", "max_steps": 20, **settings},
    )


def main(out: Path) -> None:
    output_head.SMALL_VOCABULARY = 0
    for case, settings in CASES.items():
        run = build(case, out / "run", **{"per_device_train_batch_size": 4, **settings})
        run.train()
        if run.is_world_process_zero():
            torch.save(tiny.weights(run.model), out / f"{case}.pt")
            found = {
                "world_size": run.accelerator.num_processes,
                "wrapper": type(run.model_wrapped).__name__,
                "fused": run._plan.heads is not None,
                "logs": tiny.logs(run),
            }
            (out / f"{case}.json").write_text(json.dumps(found))
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    main(Path(sys.argv[1]))
    leave()
