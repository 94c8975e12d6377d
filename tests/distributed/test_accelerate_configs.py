"""configs/accelerate and configs/deepspeed as they stand: what each starts, and the weights after four SGD steps.

Processes are real ones on the CPU (gloo). The files for GPUs are started without mixed precision and, for FSDP2, by the
shim of tests/helpers/backend_run.py; nothing else of them is changed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from kd_trainer.cache.store import Store
from kd_trainer.tasks.kinds import TASKS
from tests.helpers import config_run, launch, tiny

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs" / "accelerate").glob("*.yaml"))
# The wrapper of the student, and of the teacher where it is not the teacher itself.
WRAPPERS = {
    "single": ("PreTrainedModel", "PreTrainedModel"),
    "ddp_cpu": ("DistributedDataParallel", "PreTrainedModel"),
    "ddp": ("DistributedDataParallel", "PreTrainedModel"),
    "fsdp2": ("FSDPModule", "FSDPModule"),
    "zero2": ("DeepSpeedEngine", "PreTrainedModel"),
    "zero3": ("DeepSpeedEngine", "DeepSpeedEngine"),
}
UNCHANGED = ("single", "ddp_cpu")
# Upstream's FSDP2 refuses the student itself: of encoder-decoders, whose embedding is tied three times over, and of
# speech models and SegFormer, whose token embedding it looks for.
REFUSED = {"fsdp2": {"seq2seq_lm", "semantic_segmentation", *config_run.SPEECH}}
RUN = {name: tuple(t for t in config_run.TASKS if t not in REFUSED.get(name, ())) for name in WRAPPERS}


def cases() -> list:
    missing = importlib.util.find_spec("deepspeed") is None
    mark = pytest.mark.skipif(missing, reason="deepspeed is not installed")
    return [
        pytest.param(name, task, marks=[mark] if name.startswith("zero") else [], id=f"{name}-{task}")
        for name in NAMES
        for task in (*RUN[name], *config_run.CACHED)
    ]


@functools.cache
def in_one_process(task: str, folder: Path):
    run = config_run.build(task.partition("+")[0], folder)
    run.train()
    run.save_model(str(folder / task))
    # Saved, keys may have other names, and some backends save both names of a tied weight.
    weights = run.model.state_dict() | load_file(folder / task / "model.safetensors")
    return weights, tiny.logs(run)


@functools.cache
def cache_in_one_process(task: str, base: Path) -> Path:
    folder = base / f"one-{task}"
    config_run.build(task, folder).build_teacher_cache()
    return folder


def same_rows(one: Path, other: Path, *, exact: bool) -> None:
    """Two caches of the same data: the same bytes, or numbers as near as two backends'."""
    for part in ("train", "eval"):
        stores = [Store(folder / part) for folder in (one, other)]
        assert len(stores[0].manifest["shards"]) > 1
        if exact:
            digests = [[entry["xxh3"] for entry in store.manifest["shards"]] for store in stores]
            assert digests[0] == digests[1]
        first, second = (store.take(range(len(store))) for store in stores)
        np.testing.assert_array_equal(first.signatures, second.signatures)
        for name in first.columns:
            np.testing.assert_allclose(first.columns[name], second.columns[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def make(name: str, out: Path) -> None:
        options = [] if name in UNCHANGED else ["--mixed_precision", "no"]
        launch.by_config(ROOT / "configs" / "accelerate" / f"{name}.yaml", options, "config_run.py", str(out),
                         *RUN[name], *config_run.CACHED)  # fmt: skip

    return lambda name: launch.once(tmp_path_factory, f"config_{name}", functools.partial(make, name))


def test_every_file_is_tested():
    assert set(NAMES) == set(WRAPPERS)
    for name in NAMES:
        text = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{name}.yaml").read_text())
        file = text.get("deepspeed_config", {}).get("deepspeed_config_file")
        assert file is None or (ROOT / file).is_file()


@pytest.mark.launch
@pytest.mark.parametrize(("name", "task"), cases())
def test_a_config_starts_what_it_says_and_trains_as_one_process(name, task, results, tmp_path_factory):
    weights, logs = in_one_process(task, tmp_path_factory.getbasetemp())
    folder = results(name)
    world = 1 if name == "single" else 2
    for process in range(world):
        found = json.loads((folder / f"{task}_{process}.json").read_text())
        assert found["world_size"] == world
        for kind, wrapper in zip(("student", "teacher"), WRAPPERS[name], strict=True):
            pooled = "SentenceEncoder" if kind == "teacher" else wrapper
            whole = {"plain": "Plain", "embedding": pooled}.get(task, wrapper)
            assert wrapper.replace("PreTrainedModel", whole) in found[kind]
        for key, values in logs.items():
            assert found["logs"][key] == pytest.approx(values, rel=1e-4, abs=1e-5), key
        assert found["read"] == ("+" in task)
    if "+" in task:
        expected, cache = cache_in_one_process(task, tmp_path_factory.getbasetemp()), f"cache-{task.partition('+')[0]}"
        caches = (folder / "run" / cache, expected / cache)
        same_rows(*caches, exact=name in ("single", "ddp_cpu", "ddp"))
    saved = load_file(folder / task / "model.safetensors")
    assert saved
    for key, value in saved.items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-5)


def test_every_task_runs_under_every_file_but_few():
    """As in the README's table."""
    for name, tasks in RUN.items():
        missing = {*TASKS, "plain"} - set(tasks)
        assert missing == REFUSED.get(name, set())
