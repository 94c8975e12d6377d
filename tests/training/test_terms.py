"""`terms.py`: a term that is added by one function and one entry is counted, weighed and shown like the others."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from kd_trainer.training import terms
from kd_trainer.training.logs import logged_row
from kd_trainer.training.objective import Counts, Objective, Parts
from kd_trainer.training.start_block import card_section
from kd_trainer.training.step_loss import own_rows
from kd_trainer.training.terms import Term
from tests.helpers import tiny

WEIGHT = 0.5


def attended(batch: Any) -> torch.Tensor:
    return batch["attention_mask"] if "attention_mask" in batch else torch.ones(len(batch["labels"]), 1)


def toy_loss(batch: Any, outputs: Any, teacher: Any) -> torch.Tensor | None:
    """Squared difference of the logits over the counted positions, as a feature term would compare hidden states."""
    if teacher is None or teacher.logits is None:
        return None
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs["logits"]
    squares = (logits - teacher.logits.to(logits.dtype)).square().mean(-1)
    return (squares * attended(batch.inputs)).sum(-1) if squares.dim() == 2 else squares


def toy_count(task: Any, inputs: Any) -> torch.Tensor:
    return attended(inputs).sum()


@pytest.fixture
def toy(monkeypatch):
    """Adds the term: that is all there is to do."""

    def add(count: Any = None, loss: Any = toy_loss, weight: Any = WEIGHT) -> None:
        monkeypatch.setattr(terms, "ADDED_TERMS", [*terms.ADDED_TERMS, lambda kd: Term("toy", weight, loss, count)])

    return add


CASES = [("plain", None), ("causal_lm", toy_count)]  # over rows, over attended positions


def weighed(metrics: dict[str, float], prefix: str = "") -> float:
    soft, hard, toy = (metrics[f"{prefix}{name}_loss"] for name in ("soft", "hard", "toy"))
    return 0.7 * soft + 0.3 * hard + WEIGHT * toy


@pytest.mark.parametrize(("task", "count"), CASES)
def test_it_trains_is_logged_and_weighed(task, count, toy, tmp_path):
    toy(count)
    run = tiny.trainer(task, tmp_path, kd_loss_implementation="full", kd_reduction="tokenmean")
    before = run.evaluate()["eval_toy_loss"]
    run.train()
    logs = [entry for entry in run.state.log_history if "toy_loss" in entry]
    assert len(logs) == 4
    for entry in logs:
        assert weighed(entry) == pytest.approx(entry["loss"], rel=1e-5)
    metrics = run.evaluate()
    assert metrics["eval_toy_loss"] < before
    assert weighed(metrics, "eval_") == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert "aux_loss" not in logs[0]


@pytest.mark.parametrize(("task", "count"), CASES)
@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
def test_accumulation_changes_nothing(task, count, reduction, toy, tmp_path):
    toy(count)
    weights, logged = [], []
    for name, size in (("whole", 8), ("pieces", 2)):
        run = tiny.trainer(
            task, tmp_path / name, kd_reduction=reduction, kd_loss_implementation="full", max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, learning_rate=0.01,
        )  # fmt: skip
        run.train()
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
        logged.append(tiny.logged(run, "toy_loss"))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_it_is_there_without_logits_too(toy, tmp_path):
    toy(loss=lambda batch, outputs, teacher: batch.plan.student.lm_head.weight.square().sum())
    run = tiny.trainer("causal_lm", tmp_path, kd_loss_implementation="fused", kd_reduction="tokenmean")
    run.train()
    metrics = run.evaluate()
    for entry, prefix in ((run.state.log_history[0], ""), (metrics, "eval_")):
        assert weighed(entry, prefix) == pytest.approx(entry[f"{prefix}loss"], rel=1e-5)
    assert metrics["eval_toy_loss"] == pytest.approx(run.model.lm_head.weight.square().sum().item(), rel=1e-5)


def test_its_gradient_is_its_weight_times_that_of_its_mean(toy, tmp_path):
    def gradient(run: Any) -> torch.Tensor:
        run.model.zero_grad()
        run.compute_loss(run.model.train(), batch).backward()
        return run.model.linear.weight.grad.clone()

    batch = tiny.pad(tiny.rows("plain")[:8])
    pair = tiny.models("plain", 0)[0], tiny.models("plain", 3)[0]
    without = gradient(tiny.trainer("plain", tmp_path, pair=copy.deepcopy(pair)))
    toy()
    within = gradient(tiny.trainer("plain", tmp_path, pair=copy.deepcopy(pair)))
    student, teacher = pair
    ((student(batch["features"]) - teacher(batch["features"]).detach()).square().mean() * WEIGHT).backward()
    torch.testing.assert_close(within - without, student.linear.weight.grad, rtol=1e-4, atol=1e-6)


def test_it_stands_in_the_formula_the_check_and_the_card(toy, tmp_path, capsys):
    toy()
    run = tiny.trainer("plain", tmp_path)
    row = next(row for row in run.check(evaluate=False) if row.what == "loss")
    assert "toy_loss" in row.found
    capsys.readouterr()
    run.train()
    formula = "loss = 0.7 * soft(forward_kl, T=3) + 0.3 * hard + 0.5 * toy, per row"
    assert formula in capsys.readouterr().out
    run.evaluate()
    card = card_section({"teacher": "t", **run.summary()}, run.state.log_history)
    assert formula in card
    assert "| eval_toy_loss |" in card


# ---- a term that compares what the forwards of both models compute on the way ----


class Kept:
    """The last hidden state of a forward."""

    hidden: torch.Tensor


@contextmanager
def last_hidden(model: torch.nn.Module, side: str, batch: Any):
    kept = Kept()
    assert model is (batch.plan.student if side == "student" else batch.teacher.model)
    projectors = getattr(model, "kd_projectors", {})

    def keep(module: Any, args: Any, output: Any) -> None:
        hidden = output[0]
        kept.hidden = projectors["hidden"](hidden) if "hidden" in projectors else hidden

    handle = model.base_model.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def projector(student: torch.nn.Module, teacher: Any) -> torch.nn.Module:
    return torch.nn.Linear(student.config.hidden_size, teacher.model.config.hidden_size)


def hidden_loss(batch: Any, outputs: Any, teacher: Any) -> torch.Tensor | None:
    if ("teacher", "hidden") not in batch.captured:
        return None
    student, teacher = (batch.captured[side, "hidden"].hidden.float() for side in ("student", "teacher"))
    width = min(student.shape[-1], teacher.shape[-1])
    squares = (student[..., :width] - teacher[..., :width]).square().mean(-1)
    return (squares * attended(batch.inputs)).sum(-1)


@pytest.fixture
def features(monkeypatch):
    """Adds the term: one entry."""

    def add(**options: Any) -> None:
        term = Term("hidden", WEIGHT, hidden_loss, toy_count, capture=last_hidden, **options)
        monkeypatch.setattr(terms, "ADDED_TERMS", [*terms.ADDED_TERMS, lambda kd: term])

    return add


def hidden_states(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model.eval().base_model(**inputs)[0].double()


@pytest.mark.parametrize("implementation", ["full", "fused"])
def test_a_term_of_hidden_states_is_their_difference(implementation, features, tmp_path):
    features(check=lambda first: f"hidden states of {type(first.student).__name__}")
    run = tiny.trainer(
        "causal_lm", tmp_path, kd_loss_implementation=implementation, kd_reduction="tokenmean",
        per_device_eval_batch_size=1000,
    )  # fmt: skip
    metrics, batch = run.evaluate(), tiny.pad(run.eval_dataset)
    assert (run._plan.heads is not None) == (implementation == "fused")
    student, teacher = (hidden_states(model, batch) for model in (run.model, run.teacher.model))
    width = min(student.shape[-1], teacher.shape[-1])
    squares = (student[..., :width] - teacher[..., :width]).square().mean(-1) * batch["attention_mask"]
    assert metrics["eval_hidden_loss"] == pytest.approx(
        (squares.sum() / batch["attention_mask"].sum()).item(), rel=1e-5
    )
    assert not run.model.base_model._forward_hooks
    assert not run.teacher.model.base_model._forward_hooks
    run.train()
    entry = run.state.log_history[-2]
    expected = 0.7 * entry["soft_loss"] + 0.3 * entry["hard_loss"] + WEIGHT * entry["hidden_loss"]
    assert expected == pytest.approx(entry["loss"], rel=1e-5)
    assert run.evaluate()["eval_hidden_loss"] < metrics["eval_hidden_loss"]


def test_it_is_the_same_with_and_without_logits_and_for_any_split(features, tmp_path):
    features()
    weights = []
    for name, size, implementation in (("a", 8, "full"), ("b", 8, "fused"), ("c", 2, "fused")):
        run = tiny.trainer(
            "causal_lm", tmp_path / name, kd_loss_implementation=implementation, max_steps=2, learning_rate=0.01,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, kd_reduction="tokenmean",
        )  # fmt: skip
        run.train()
        weights.append(tiny.weights(run.model))
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, rtol=1e-4, atol=1e-6)


def test_it_has_the_teacher_run_though_alpha_is_zero(features, tmp_path):
    features()
    run = tiny.trainer("causal_lm", tmp_path, kd_alpha=0.0, kd_reduction="tokenmean")
    run.train()
    for entry in run.state.log_history[:-1]:
        assert entry["hard_loss"] + WEIGHT * entry["hidden_loss"] == pytest.approx(entry["loss"], rel=1e-5)


def test_its_module_trains_with_the_student_and_is_gone_afterwards(features, tmp_path, capsys):
    features(module=projector, check=lambda first: f"a projector to width {first.teacher.model.config.hidden_size}")
    run = tiny.trainer("causal_lm", tmp_path, kd_reduction="tokenmean", learning_rate=0.01)
    names = [name for name, _ in run.model.named_parameters()]
    found = [row.found for row in run.check(evaluate=False)]
    line = f"a projector to width {run.teacher.model.config.hidden_size}"
    assert line in found
    assert any("hidden_loss" in row for row in found)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
            weight = model.kd_projectors["hidden"].weight
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert id(weight) in trained
            seen.append(weight.detach().clone())

    run.add_callback(Watch())
    run.train()
    assert not torch.equal(seen[0], seen[-1])
    assert [name for name, _ in run.model.named_parameters()] == names
    assert line in capsys.readouterr().out


def test_a_term_that_does_not_fit_is_refused_before_the_first_step(features, tmp_path):
    def check(first: Any) -> None:
        raise ValueError("no hidden states")

    features(check=check)
    run = tiny.trainer("causal_lm", tmp_path)
    assert any(row.what == "added terms" and row.status == "error" for row in run.check(evaluate=False))
    with pytest.raises(ValueError, match="no hidden states"):
        run.train()


def test_a_term_that_no_batch_has_is_not_logged(toy, tmp_path):
    toy(loss=lambda batch, outputs, teacher: None)
    run = tiny.trainer("plain", tmp_path)
    run.train()
    assert not tiny.logged(run, "toy_loss")
    assert "eval_toy_loss" not in run.evaluate()


@pytest.mark.parametrize("scale", [1, 2])
def test_rows_and_numbers_are_divided_alike(scale):
    """A number holds for every row; of more rows than the inputs have, the first are taken."""
    rows = Term("rows", 0.5, toy_loss)
    number, infinite = Term("number", lambda student: 2.0), Term("infinite", 0.0)
    objective = Objective(0.5, 1.0, added=(rows, number, infinite))
    losses = torch.tensor([1.0, 2.0, 3.0, 99.0]), torch.tensor(4.0), torch.tensor(float("inf"))
    parts = Parts(torch.tensor(10.0), 1.0, 2.0, None)
    inputs, counts = {"features": torch.zeros(3, 2)}, Counts(6, 6, 6, scale=scale, added=(12, 6, 6))
    added = objective.with_added(losses, torch.nn.Identity(), parts, inputs, counts)
    assert [float(mean) for mean in added.added] == [6 * scale / 12, 4 * 3 * scale / 6, float("inf")]
    assert added.total.item() == 10 + 0.5 * 6 * scale / 12 + 2 * 4 * 3 * scale / 6
    assert [term.name for term in objective.terms] == ["hard", "soft", "rows", "number", "infinite"]
    assert len(logged_row(added, counts)) == len(objective.denominators(counts)) + 2 == 7


@pytest.mark.parametrize("added", [(), (7,)])
def test_counts_add_up(added):
    counts = Counts(1, 2, 3, num_items=5, added=added)
    doubled = counts.with_each(*(2 * number for number in counts.each), scale=4)
    assert doubled == Counts(2, 4, 6, 4, num_items=5, added=tuple(2 * number for number in added))


def test_a_process_whose_rows_all_repeat_logs_as_many_numbers(toy, tmp_path):
    """Accelerate fills the last batches of an evaluation; the process that has no row of its own there logs zeros."""
    run = tiny.trainer("classification", tmp_path)
    batch = next(iter(run.get_train_dataloader()))
    plan = run._plan_of(batch)
    objective, _ = run._objective(training=False)
    counts = objective.count(plan.task, batch)
    state = SimpleNamespace(end_of_dataloader=True, remainder=1)
    other = SimpleNamespace(gradient_state=state, process_index=1, num_processes=2)
    own = own_rows(other, objective, plan, batch, counts, same_batch=1)
    assert own.rows == 0
    parts = Parts(torch.zeros(()), 1.0, 1.0, 1.0, [1.0] * len(objective.added))
    rows = logged_row(parts, counts), logged_row(parts.zeroed(), own.counts)
    assert len(rows[0]) == len(rows[1])
    assert len(objective.denominators(own.counts)) == len(objective.terms)
    assert not any(rows[1])
