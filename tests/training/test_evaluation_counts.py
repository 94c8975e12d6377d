"""An evaluation is a sum over its rows, divided once: whatever the batches, with unlabelled rows, in two processes.

The two processes are real ones (gloo); tests/helpers/evaluation_run.py is what they run.
"""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers import launch, tiny
from tests.helpers.evaluation_run import ROW_TASKS, SETTINGS, data, evaluations

# Upstream's question answering takes -100 for position 0, so that its own loss is another: see `kd_hard_loss`.
TASK = {"question_answering": {"kd_hard_loss": "task"}}
PARTS = ("hard_loss", "soft_loss", "teacher_agreement")
SOME = (0, 1, 2, 3, 9, 20)  # of 21 rows; the first batch of 3 or 4 has no label at all


def parts(metrics: dict[str, float], prefix: str = "eval_") -> dict[str, float]:
    names = ("loss", *PARTS, "overlap", "perplexity", "teacher_cosine", "teacher_spearman")
    return {name: metrics[prefix + name] for name in names if prefix + name in metrics}


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
@pytest.mark.parametrize("task", ROW_TASKS)
def test_unlabelled_rows_are_evaluated_alike_in_every_batch(task, reduction, tmp_path):
    rows = data(task, 21, unlabelled=SOME)
    found = {}
    for size in (1, 3, 21):
        run = tiny.trainer(
            task, tmp_path, per_device_eval_batch_size=size, kd_reduction=reduction, **TASK.get(task, {})
        )
        found[size] = parts(run.evaluate(rows))
        assert parts(run.predict(rows).metrics, "test_") == pytest.approx(found[size], rel=1e-5)
        assert found[size] == pytest.approx(found[1], rel=1e-5)
    # By hand: one batch of all rows, as a training step has them.
    run.model.eval()
    with torch.no_grad():
        whole = run.compute_loss(run.model, tiny.pad(rows)).item()
    assert found[1]["loss"] == pytest.approx(whole, rel=1e-5)
    assert found[1]["loss"] == pytest.approx(0.7 * found[1]["soft_loss"] + 0.3 * found[1]["hard_loss"], rel=1e-5)


@pytest.mark.parametrize("task", ROW_TASKS)
def test_the_hard_loss_is_that_of_the_labelled_rows_alone(task, tmp_path):
    """With tokenmean; with batchmean it is divided by all rows."""
    rows = data(task, 21, unlabelled=SOME)
    labelled = [row for i, row in enumerate(rows) if i not in SOME]
    means = {}
    for reduction in ("tokenmean", "batchmean"):
        run = tiny.trainer(task, tmp_path, per_device_eval_batch_size=4, kd_reduction=reduction, **TASK.get(task, {}))
        means[reduction] = run.evaluate(rows)["eval_hard_loss"]
    assert means["tokenmean"] == pytest.approx(run.evaluate(labelled)["eval_hard_loss"], rel=1e-5)
    assert means["batchmean"] == pytest.approx(means["tokenmean"] * 15 / 21, rel=1e-5)


@pytest.mark.parametrize("task", [task for task in ROW_TASKS if task != "plain"])
@pytest.mark.parametrize("size", [4, 8, 21])
def test_with_all_labels_it_is_the_stock_trainers_number(task, size, tmp_path):
    rows = data(task, 21)
    stock = tiny.stock_trainer(task, tmp_path, per_device_eval_batch_size=size).evaluate(rows)
    run = tiny.trainer(task, tmp_path, per_device_eval_batch_size=size, kd_alpha=0.0, kd_reduction="tokenmean")
    metrics = run.evaluate(rows)
    assert metrics["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-6)
    assert metrics["eval_hard_loss"] == pytest.approx(stock["eval_loss"], rel=1e-5)


def test_half_a_label_counts_half(tmp_path):
    """Question answering: a start without an end."""
    rows = data("question_answering", 9, unlabelled=(1, 5))
    rows[2]["end_positions"] = -100
    rows[8]["start_positions"] = -100
    found = []
    for size in (1, 2, 9):
        run = tiny.trainer("question_answering", tmp_path, per_device_eval_batch_size=size, kd_reduction="tokenmean",
                           kd_hard_loss="task")  # fmt: skip
        found.append(parts(run.evaluate(rows)))
        assert found[-1] == pytest.approx(found[0], rel=1e-5)


def test_the_best_model_is_chosen_by_that_number(tmp_path):
    rows = data("classification", 21, unlabelled=SOME)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run = tiny.trainer("classification", tmp_path, load_best_model_at_end=True, per_device_eval_batch_size=3,
                       kd_reduction="tokenmean", **settings)  # fmt: skip
    run.eval_dataset = rows
    run.train()
    run.args.per_device_eval_batch_size = 21
    assert run.state.best_metric == pytest.approx(run.evaluate()["eval_loss"], rel=1e-5)


def test_no_row_has_a_label(tmp_path):
    rows = data("classification", 6, unlabelled=tuple(range(6)))
    metrics = tiny.trainer("classification", tmp_path, per_device_eval_batch_size=4).evaluate(rows)
    assert "eval_hard_loss" not in metrics
    assert metrics["eval_loss"] == pytest.approx(0.7 * metrics["eval_soft_loss"], rel=1e-5)


@pytest.mark.parametrize("way", ["full", "fused", "logits", "hidden"])
def test_the_overlap_is_a_mean_over_all_positions(way, tmp_path):
    """Of labels, at the teacher's temperature 1, whatever the batches: by hand in float64, also from an exact cache."""
    rows, found = tiny.rows("causal_lm", 7, seed=2), []
    settings = {"kd_loss_implementation": "full" if way == "full" else "fused", "kd_reduction": "tokenmean"}
    if way in ("logits", "hidden"):
        settings |= {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_cache_format": way}
    for size in (1, 3, 7):
        run = tiny.trainer("causal_lm", tmp_path, per_device_eval_batch_size=size, data=rows, **settings)
        found.append(run.evaluate(rows))
    batch, (student, teacher) = tiny.pad(rows), (model.eval() for model in tiny.models("causal_lm"))
    labels = batch.pop("labels")
    with torch.no_grad():
        z_s, z_t = (model(**batch).logits[:, :-1][labels[:, 1:] != -100].double() for model in (student, teacher))
    top = z_s.sort(-1, descending=True).indices[:, :20]
    expected = z_t.softmax(-1).gather(-1, top).sum(-1).mean().item()
    assert 0.5 < expected < 0.9
    assert [metrics["eval_overlap"] for metrics in found] == pytest.approx([expected] * 3, rel=1e-6)
    assert [name for name in found[0] if name.endswith("overlap")] == ["eval_overlap"]


def test_the_overlap_is_measured_in_evaluation_and_where_it_is_exact(tmp_path, monkeypatch):
    """Not of 20 classes or fewer, nor of a cache of few ids, nor in training, nor of what is no distribution."""
    sparse = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_cache_format": "topk", "teacher_cache_k": 30}
    for task, settings in (
        ("causal_lm", sparse), ("classification", {}), ("regression", {}), ("question_answering", {}), ("embedding", {})
    ):  # fmt: skip
        rows = tiny.rows(task, 8)
        run = tiny.trainer(task, tmp_path, data=rows, max_steps=1, eval_strategy="steps", eval_steps=1, **settings)
        run.eval_dataset = rows
        run.train()
        assert tiny.logged(run, "eval_loss"), task
        assert not any("overlap" in key for entry in run.state.log_history for key in entry), task
    monkeypatch.setattr("kd_trainer.tasks.task.overlap", None)
    tiny.trainer("causal_lm", tmp_path, max_steps=1, kd_loss_implementation="full").train()


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    out = launch.once(tmp_path_factory, "evaluations", lambda out: launch.two_processes("evaluation_run.py", str(out)))
    result = json.loads((out / "evaluations.json").read_text())
    assert result["world_size"] == 2
    return result


@pytest.fixture(scope="module")
def in_one(tmp_path_factory):
    return evaluations(tmp_path_factory.mktemp("one"), 4)


@pytest.mark.launch
def test_a_row_that_accelerate_repeats_counts_once(in_two, in_one):
    """The parts are those of one process with the same batches of four rows."""
    assert len(in_two["evaluations"]) == len(in_one) > 2 * len(ROW_TASKS) + len(SETTINGS)
    for name, metrics in in_one.items():
        assert parts(in_two["evaluations"][name]) == pytest.approx(parts(metrics), rel=1e-4), name
