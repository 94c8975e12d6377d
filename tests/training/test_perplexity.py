"""`eval_perplexity`: exp of the hard loss per token over a whole evaluation, against a float64 computation by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertForMaskedLM, T5Config, T5ForConditionalGeneration

from kd_trainer import DistillationTrainer
from kd_trainer.training.logs import perplexity
from tests.helpers import tiny

TASKS = ["causal_lm", "masked_lm", "seq2seq_lm"]
COUNT = 21  # fills no batch of 4 or 8


def pair(task: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    if task == "causal_lm":
        return tiny.models("causal_lm")
    if task == "masked_lm":
        return tuple(BertForMaskedLM(tiny.bert_config(h, initializer_range=0.5)) for h in (16, 24))  # type: ignore[return-value]
    config = {"vocab_size": tiny.VOCAB, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
              "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip
    return tuple(T5ForConditionalGeneration(T5Config(d_model=h, **config)) for h in (16, 24))  # type: ignore[return-value]


def data(task: str, seed: int = 2) -> list[dict[str, Any]]:
    return tiny.rows("causal_lm" if task == "causal_lm" else "token_classification", COUNT, seed)


def trainer(task: str, output_dir: Any, **kwargs: Any) -> DistillationTrainer:
    return tiny.trainer("causal_lm", output_dir, pair=pair(task), data=data(task, seed=1), **kwargs)


def by_hand(task: str, model: nn.Module) -> float:
    """Row by row, without padding, in float64."""
    model, total, count = copy.deepcopy(model).double().eval(), 0.0, 0
    for row in data(task):
        inputs = {k: torch.tensor([v]) for k, v in row.items()}
        labels = inputs.pop("labels")
        if task == "seq2seq_lm":
            inputs["decoder_input_ids"] = model._shift_right(labels)  # type: ignore[operator]
        with torch.no_grad():
            logits = model(**inputs).logits
        if task == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    return math.exp(total / count)


@pytest.mark.parametrize(
    ("batch", "reduction"), [(1, "batchmean"), (4, "tokenmean"), (8, "batchmean"), (21, "tokenmean")]
)
@pytest.mark.parametrize("task", TASKS)
def test_perplexity_is_per_token_whatever_the_batches(task, batch, reduction, tmp_path):
    run = trainer(task, tmp_path, kd_reduction=reduction, per_device_eval_batch_size=batch)
    metrics = run.evaluate(data(task))
    assert metrics["eval_perplexity"] == pytest.approx(by_hand(task, run.model), rel=1e-5)
    assert metrics["eval_perplexity"] != pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-2)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_weight_of_the_soft_loss_changes_nothing(alpha, tmp_path):
    run = trainer("causal_lm", tmp_path, kd_alpha=alpha)
    metrics = run.evaluate(data("causal_lm"))
    assert metrics["eval_perplexity"] == pytest.approx(by_hand("causal_lm", run.model), rel=1e-5)


def test_predict_has_it_with_its_own_prefix(tmp_path):
    run = trainer("causal_lm", tmp_path)
    expected = by_hand("causal_lm", run.model)
    assert run.predict(data("causal_lm")).metrics["test_perplexity"] == pytest.approx(expected, rel=1e-5)
    metrics = run.evaluate(data("causal_lm"), metric_key_prefix="held_out")
    assert metrics["held_out_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert "eval_perplexity" not in metrics


def test_it_is_logged_and_can_choose_the_best_model(tmp_path):
    run = trainer(
        "causal_lm", tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="perplexity", greater_is_better=False,
    )  # fmt: skip
    run.train()
    assert run.state.best_metric == min(tiny.logged(run, "eval_perplexity"))


def test_no_labels_no_key(tmp_path):
    free = [{k: v for k, v in row.items() if k != "labels"} for row in data("causal_lm")]
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in data("causal_lm")]
    for rows in (free, masked):
        metrics = trainer("causal_lm", tmp_path).evaluate(rows)
        assert "eval_soft_loss" in metrics
        assert "eval_perplexity" not in metrics


def test_a_batch_without_labels_does_not_hide_the_others(tmp_path):
    rows = data("causal_lm")
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in rows[:8]]
    run = trainer("causal_lm", tmp_path)
    metrics = run.evaluate([*masked, *rows])
    assert metrics["eval_perplexity"] == pytest.approx(by_hand("causal_lm", run.model), rel=1e-5)


def test_label_smoothing_has_no_perplexity(tmp_path):
    metrics = trainer("causal_lm", tmp_path, label_smoothing_factor=0.1).evaluate(data("causal_lm"))
    assert "eval_hard_loss" in metrics
    assert "eval_perplexity" not in metrics


@pytest.mark.parametrize("task", ["classification", "token_classification", "plain"])
def test_other_tasks_have_none(task, tmp_path):
    assert "eval_perplexity" not in tiny.trainer(task, tmp_path).evaluate()


def test_too_large_a_number_is_inf(tmp_path):
    assert perplexity(800.0, 1) == math.inf
    assert perplexity(math.inf, 1) == math.inf
    assert perplexity(3 * math.log(7), 3) == pytest.approx(7)
    run = trainer("causal_lm", tmp_path, kd_check_finite="off")
    with torch.no_grad():
        run.model.lm_head.weight.mul_(1e6)
    assert run.evaluate(data("causal_lm"))["eval_perplexity"] == math.inf


def test_no_step_of_an_evaluation_waits_for_the_device(tmp_path, monkeypatch):
    """Numbers are read from the sums once, at the end, however many batches there are."""
    read: list[int] = []
    tolist = torch.Tensor.tolist
    run = trainer("causal_lm", tmp_path, per_device_eval_batch_size=1)
    run.evaluate(data("causal_lm")[:1])
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(1) or tolist(self))
    counts = []
    for rows in (data("causal_lm")[:2], data("causal_lm")):
        read.clear()
        run.evaluate(rows)
        counts.append(len(read))
    assert counts[0] == counts[1]
