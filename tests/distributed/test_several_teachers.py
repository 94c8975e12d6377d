"""Several teachers in two processes: none waits for one without rows, and the weights are one process's."""

from __future__ import annotations

import functools
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import launch, several_run, tiny

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
RUNS = [
    pytest.param(
        backend, case, id=f"{backend}-{case}",
        marks=[pytest.mark.skipif(backend == "zero3" and not HAS_DEEPSPEED, reason="deepspeed is not installed")],
    )
    for backend, cases in several_run.CASES.items()
    for case in cases
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def folder(backend: str):
        make = lambda out: launch.two_processes("several_run.py", str(out), backend, timeout=300)  # noqa: E731
        return launch.once(tmp_path_factory, f"several_{backend}", make)

    return functools.cache(folder)


@pytest.mark.launch
@pytest.mark.parametrize(("backend", "case"), RUNS)
def test_two_processes_give_what_one_gives(backend, case, results, tmp_path):
    folder = results(backend) / backend / case
    alone = several_run.build({"fused": "mixture", "fused_without": "one_without"}.get(case, case), tmp_path)
    alone.train()
    alone.save_model(str(tmp_path / "saved"))
    name = "adapter_model.safetensors" if case == "base_without" else "model.safetensors"
    expected, saved = (load_file(path / "saved" / name) for path in (tmp_path, folder))
    for key, value in expected.items():
        torch.testing.assert_close(saved[key], value, rtol=0, atol=1e-5)
    agreements = several_run.agreements(alone)
    for i in range(2):
        found = json.loads((folder / f"process_{i}.json").read_text())
        assert found["world_size"] == 2
        assert found["sharded"] == [backend != "ddp"] * 2
        for key in tiny.LOGGED:
            assert found["logs"][key] == pytest.approx(tiny.logged(alone, key), rel=1e-5, abs=1e-5), key
        if backend == "ddp":
            assert found["agreement"] == pytest.approx(agreements, abs=1e-6)
