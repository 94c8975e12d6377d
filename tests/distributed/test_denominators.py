"""The loss does not depend on how a batch is split: one process, accumulation, two processes give the same weights.

SGD, unequal numbers of labels in every micro-batch and process, every reduction. The two processes are real ones
(gloo), started by `accelerate launch`; tests/helpers/distributed_run.py is what they run.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from tests.helpers import launch, tiny

TASKS = ["classification", "token_classification", "causal_lm"]
ROW_TASKS = ["multi_label_classification", "regression", "question_answering", "embedding"]
CASES = [f"{task}-{reduction}" for task, reduction in itertools.product(TASKS, ["tokenmean", "batchmean"])]
CASES += [f"{task}-batchmean" for task in ROW_TASKS]


def run_case(case: str, output_dir: Path, **kwargs):
    task, reduction = case.split("-")
    run = tiny.trainer(task, output_dir, kd_reduction=reduction, **kwargs)
    run.train()
    return run


@pytest.mark.parametrize("case", CASES)
def test_accumulation_changes_nothing(case, tmp_path):  # traps 1 to 3
    whole = run_case(case, tmp_path)
    split = run_case(case, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    torch.testing.assert_close(tiny.weights(split.model), tiny.weights(whole.model), rtol=0, atol=1e-5)
    for key in ("loss", "soft_loss", "hard_loss", "teacher_agreement"):
        assert tiny.logged(split, key) == pytest.approx(tiny.logged(whole, key), rel=1e-4), key
    assert bool(tiny.logged(whole, "teacher_agreement")) == (not case.startswith(("regression", "embedding")))
    start = tiny.weights(tiny.models(case.split("-")[0])[0])
    assert (tiny.weights(whole.model) - start).abs().max() > 1e-3  # it did learn something


@pytest.mark.parametrize("task", TASKS)
def test_an_incomplete_last_window_changes_nothing(task, tmp_path):  # trap 5
    data = tiny.rows(task, 12)  # a step of 8 rows, then one of 4
    kwargs = {"data": data, "max_steps": -1, "num_train_epochs": 2, "kd_reduction": "tokenmean"}
    whole = tiny.trainer(task, tmp_path, **kwargs)
    split = tiny.trainer(task, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **kwargs)
    whole.train()
    split.train()
    assert whole.state.global_step == split.state.global_step == 4
    torch.testing.assert_close(tiny.weights(split.model), tiny.weights(whole.model), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes of four rows each made of every case: {case: {"weights": ..., "logs": ..., "world": ...}}."""
    return launch.once(
        tmp_path_factory, "denominators", lambda out: launch.two_processes("distributed_run.py", str(out), *CASES)
    )


@pytest.mark.launch
@pytest.mark.parametrize("case", CASES)
def test_two_processes_change_nothing(case, two_processes, tmp_path):
    from safetensors.torch import load_file

    result = json.loads((two_processes / f"{case}.json").read_text())
    assert result["world_size"] == 2
    assert result["wrapper"] == "DistributedDataParallel"
    whole = run_case(case, tmp_path)
    weights = load_file(two_processes / f"{case}.safetensors")["weights"]
    torch.testing.assert_close(weights, tiny.weights(whole.model), rtol=0, atol=1e-5)
    for key in ("loss", "soft_loss", "hard_loss", "teacher_agreement"):
        assert result["logs"].get(key, []) == pytest.approx(tiny.logged(whole, key), rel=1e-4), key


@pytest.mark.launch
def test_two_processes_with_local_counts(two_processes, tmp_path):  # trap 4
    """Each process divides by its own labels, and the gradients are averaged: of the first step's loss, the mean."""
    result = json.loads((two_processes / "local.json").read_text())
    assert result["world_size"] == 2
    rows = tiny.rows("causal_lm")
    run = tiny.trainer("causal_lm", tmp_path, kd_reduction="tokenmean")
    halves, whole = ([run.compute_loss(run.model, tiny.pad(part)).item() for part in parts] for parts in
                     ((rows[:4], rows[4:8]), (rows[:8],)))  # fmt: skip
    assert result["logs"]["loss"][0] == pytest.approx(sum(halves) / 2, rel=1e-5)
    assert result["logs"]["loss"][0] != pytest.approx(whole[0], rel=1e-3)


@pytest.mark.launch
def test_two_processes_evaluate_as_one(two_processes, tmp_path):
    result = json.loads((two_processes / "evaluation.json").read_text())
    one = tiny.trainer("classification", tmp_path, per_device_eval_batch_size=8)
    metrics = one.evaluate(tiny.rows("classification", 24, seed=2))
    for name in ("eval_loss", "eval_hard_loss", "eval_soft_loss", "eval_teacher_agreement"):
        assert result["even"][name] == pytest.approx(metrics[name], rel=1e-4), name
    lm = tiny.trainer("causal_lm", tmp_path, per_device_eval_batch_size=8)
    perplexity = lm.evaluate(tiny.rows("causal_lm", 24, seed=2))["eval_perplexity"]
    assert result["causal_lm"]["eval_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    # 21 rows do not fill the last batches: see test_evaluation_counts.py.
    uneven = result["uneven"]
    assert 0.7 * uneven["eval_soft_loss"] + 0.3 * uneven["eval_hard_loss"] == pytest.approx(
        uneven["eval_loss"], rel=1e-4
    )
