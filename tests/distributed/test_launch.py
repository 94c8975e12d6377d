"""One launch with a backend of each family: two real processes (gloo) give what one gives, with full logits too.

It runs with the README's command; `.ci/run` runs every case and every config file after it, in test_backends.py,
test_accelerate_configs.py, test_denominators.py and others.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import backend_run, launch, tiny

FAMILIES = {
    "ddp": ("DistributedDataParallel", "PreTrainedModel"),
    "fsdp2": ("FSDPModule", "FSDPModule"),
    "zero3": ("DeepSpeedEngine", "DeepSpeedEngine"),
}
RUN = [name for name in FAMILIES if not name.startswith("zero") or importlib.util.find_spec("deepspeed") is not None]


def backends() -> list:
    missing = pytest.mark.skip(reason="deepspeed is not installed")
    return [pytest.param(name, marks=[] if name in RUN else missing) for name in FAMILIES]


@functools.cache
def in_one_process(case: str, folder: Path):
    run = backend_run.build(case, folder, folder / case)
    run.train()
    return run.model.state_dict(), tiny.logs(run), run.evaluate(tiny.rows("causal_lm", 24, seed=2))


@pytest.mark.parametrize("backend", backends())
def test_two_processes_give_what_one_gives(backend, tmp_path_factory):
    def make(out: Path) -> None:
        launch.two_processes("backend_run.py", str(out), ",".join(RUN), "fused")

    folder = launch.once(tmp_path_factory, "families", make) / backend / "fused"
    facts = [json.loads((folder / f"process_{i}.json").read_text()) for i in range(2)]
    for case in ("fused", "same_layers"):  # the second has full logits
        weights, logs, evaluation = in_one_process(case, tmp_path_factory.getbasetemp())
        saved = load_file(folder / "saved" / "model.safetensors")
        assert set(saved) == set(weights)
        for name, value in saved.items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-5)
        for found in facts:
            for key in tiny.LOGGED:
                assert found["logs"][key] == pytest.approx(logs[key], rel=1e-5, abs=1e-5), key
            for key in ("eval_loss", "eval_hard_loss", "eval_soft_loss", "eval_teacher_agreement"):
                assert found["evaluation"][key] == pytest.approx(evaluation[key], rel=1e-4), key
    for found in facts:
        assert found["world_size"] == 2
        assert found["fused"]
        for side, wrapper in zip(("student", "teacher"), FAMILIES[backend], strict=True):
            assert wrapper in found[f"{side}_wrapper"]
        assert found["unchanged"]
        assert not found["teacher_training"]
        assert found["teacher_gradients"] == []
        shares = 1 if backend == "ddp" else 0.5
        assert found["share"] == pytest.approx(shares, abs=0.1)
