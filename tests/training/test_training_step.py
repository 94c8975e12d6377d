"""What a training step is, whatever mode the student is in; and settings that are changed between two evaluations."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from kd_trainer import DistillationTrainer
from tests.helpers import tiny


def stays_in_eval(student: torch.nn.Module) -> torch.nn.Module:
    """A student with dropout frozen by choice: `train()` leaves it in eval mode."""

    class Frozen(type(student)):
        def train(self, mode: bool = True):
            return super().train(False)

    student.__class__ = Frozen
    return student.eval()


@pytest.mark.parametrize("task", ["classification", "causal_lm", "plain"])
def test_a_student_in_eval_mode_trains_as_another(task, tmp_path):
    """No model here has dropout: both runs are the same, with a schedule, parts in the log and evaluations between."""
    settings = {"kd_schedule": "linear", "kd_alpha": 0.9, "kd_alpha_end": 0.1, "kd_temperature_end": 1.0}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "kd_reduction": "tokenmean"}
    student, teacher = tiny.models(task)
    runs = [tiny.trainer(task, tmp_path, **settings)]
    runs += [tiny.trainer(task, tmp_path, pair=(stays_in_eval(student), teacher), **settings)]
    for run in runs:
        run.train()
    assert not runs[1].model.training
    assert tiny.logged(runs[1], "kd_alpha") == pytest.approx([0.9, 0.9 - 0.8 / 3, 0.1 + 0.8 / 3, 0.1])
    names = [*tiny.LOGGED, *("eval_" + name for name in tiny.LOGGED)]
    for name in names:
        one, other = (tiny.logged(run, name) for run in runs)
        assert one
        assert one == pytest.approx(other, rel=1e-6), name
    torch.testing.assert_close(tiny.weights(runs[1].model), tiny.weights(runs[0].model))


def test_a_fused_loss_of_a_student_in_eval_mode(tmp_path):
    student, teacher = tiny.models("causal_lm")
    settings = {"kd_loss_implementation": "fused", "kd_reduction": "tokenmean"}
    runs = [tiny.trainer("causal_lm", tmp_path, **settings)]
    runs += [tiny.trainer("causal_lm", tmp_path, pair=(stays_in_eval(student), teacher), **settings)]
    for run in runs:
        run.train()
    for name in tiny.LOGGED:
        assert len(tiny.logged(runs[0], name)) == 4
        assert tiny.logged(runs[1], name) == pytest.approx(tiny.logged(runs[0], name), rel=1e-6)


def test_the_check_of_a_student_in_eval_mode_has_its_parts(tmp_path):
    student, teacher = tiny.models("classification")
    run = tiny.trainer("classification", tmp_path, pair=(stays_in_eval(student), teacher))
    row = next(row for row in run.check(evaluate=False) if row.what == "loss")
    assert "hard_loss" in row.found
    assert "soft_loss" in row.found
    assert not run.is_in_train


def test_a_student_in_train_mode_is_evaluated(tmp_path):
    """A callback that leaves the student in train mode makes no training step of an evaluation."""
    run = tiny.trainer("classification", tmp_path, kd_schedule="linear", kd_alpha_end=0.1, max_steps=2)
    expected = run.evaluate()
    run.model.eval = lambda: run.model
    run.model.train()
    found = run.evaluate()
    for name in ("eval_loss", "eval_soft_loss", "eval_hard_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    assert run._metrics_buffer.sums() is None


@pytest.mark.parametrize("task", ["classification", "causal_lm", "question_answering", "regression", "plain"])
def test_alpha_0_does_not_call_the_teacher_in_training(task, tmp_path, capsys):
    student, teacher = tiny.models(task)
    teacher.calls = 0
    teacher.register_forward_hook(lambda module, *_: setattr(module, "calls", module.calls + 1))
    run = tiny.trainer(task, tmp_path, pair=(student, teacher), kd_alpha=0.0, kd_reduction="tokenmean")
    run.train()
    assert teacher.calls == 0
    assert not tiny.logged(run, "soft_loss")
    assert "kd_alpha is 0: training does not call the teacher" in capsys.readouterr().out
    assert run.evaluate()["eval_soft_loss"] > 0  # evaluation still runs the teacher
    assert teacher.calls > 0
    calls = teacher.calls
    run.train()
    assert teacher.calls == calls


def test_alpha_0_builds_no_cache(tmp_path):
    student, teacher = tiny.models("classification")
    teacher.calls = 0
    teacher.register_forward_hook(lambda module, *_: setattr(module, "calls", module.calls + 1))
    tiny.trainer("classification", tmp_path, pair=(student, teacher), kd_alpha=0.0,
                 teacher_cache_dir=str(tmp_path / "cache")).train()  # fmt: skip
    assert teacher.calls == 0
    assert not (tmp_path / "cache" / "train").exists()


CHANGES = {
    "kd_alpha": 0.2,
    "kd_temperature": 1.5,
    "kd_divergence": "reverse_kl",
    "kd_reduction": "tokenmean",
    "kd_positions": "attended",
    "kd_loss_implementation": "fused",
    "label_smoothing_factor": 0.2,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changed_between_two_evaluations_counts(name, tmp_path):
    """As if the trainer had been made with it."""
    run = tiny.trainer("causal_lm", tmp_path)
    default, before = getattr(run.args, name), run.evaluate()
    setattr(run.args, name, CHANGES[name])
    after = run.evaluate()
    setattr(run.args, name, default)
    assert run.evaluate()["eval_loss"] == pytest.approx(before["eval_loss"])
    setattr(run.args, name, CHANGES[name])
    tested = run.predict(tiny.rows("causal_lm", 21, seed=2)).metrics
    assert tested["test_loss"] == pytest.approx(after["eval_loss"])
    assert (run._plan.heads is not None) == (name == "kd_loss_implementation")
    expected = tiny.trainer("causal_lm", tmp_path, **{name: CHANGES[name]}).evaluate()
    for key in ("eval_loss", "eval_hard_loss", "eval_soft_loss"):
        assert after[key] == pytest.approx(expected[key], rel=1e-5)
    if name != "kd_loss_implementation":
        assert after["eval_loss"] != pytest.approx(before["eval_loss"], rel=1e-3)


def test_a_bad_setting_between_two_evaluations_is_refused(tmp_path):
    run = tiny.trainer("classification", tmp_path)
    run.evaluate()
    run.args.kd_alpha = 1.5
    with pytest.raises(ValueError, match=r"`kd_alpha` is 1.5; expected a number in \[0, 1\]"):
        run.evaluate()
    alone = tiny.trainer("classification", tmp_path, pair=(tiny.models("classification")[0], None), kd_alpha=0.0)
    alone.evaluate()
    alone.args.kd_alpha = 0.5
    with pytest.raises(ValueError, match=r"`teacher_model` is None; expected a teacher, with kd_alpha 0\.5"):
        alone.evaluate()


def test_a_callback_may_change_alpha(tmp_path):
    class Changes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.kd_alpha = 0.0 if state.global_step == 1 else 1.0

    run = tiny.trainer("classification", tmp_path, max_steps=3)
    run.add_callback(Changes())
    run.train()
    loss, soft = tiny.logged(run, "loss"), tiny.logged(run, "soft_loss")
    assert len(soft) == 2  # the step of kd_alpha 0 has none
    assert loss[1] == pytest.approx(tiny.logged(run, "hard_loss")[1], rel=1e-5)
    assert loss[2] == pytest.approx(soft[1], rel=1e-5)


# ---- micro-batches without labels ----


def without_labels(data: list[dict], *places: int) -> list[dict]:
    return [{**row, "labels": -100} if i in places else row for i, row in enumerate(data)]


class DropsLabels:
    """A collator that leaves the column out where no row of a batch has a label."""

    def __call__(self, features):
        batch = tiny.pad(features)
        if bool((batch["labels"] == -100).all()):
            del batch["labels"]
        return batch


@pytest.mark.parametrize("task", ["classification", "causal_lm", "plain"])
@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
def test_a_micro_batch_without_labels_keeps_the_hard_loss_in_the_log(task, reduction, tmp_path):
    """The same log as that of whole batches, in which the unlabelled rows stand beside labelled ones."""
    data = tiny.rows(task, 16)
    for row in data[2:4]:
        row["labels"] = -100 if task != "causal_lm" else [-100] * len(row["labels"])
    settings = {"data": data, "max_steps": 2, "kd_reduction": reduction, "kd_positions": "attended"}
    whole = tiny.trainer(task, tmp_path, **settings)
    split = tiny.trainer(task, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    split.data_collator = DropsLabels()
    for run in (whole, split):
        run.train()
    for name in tiny.LOGGED:
        assert len(tiny.logged(whole, name)) == 2
        assert tiny.logged(split, name) == pytest.approx(tiny.logged(whole, name), rel=1e-4), name


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_an_evaluation_with_a_batch_without_labels_has_its_hard_loss(task, tmp_path):
    data = tiny.rows(task, 8, seed=2)
    for row in data[2:4]:
        row["labels"] = -100 if task == "classification" else [-100] * len(row["labels"])
    run = tiny.trainer(task, tmp_path, per_device_eval_batch_size=2, kd_positions="attended")
    run.data_collator = DropsLabels()
    metrics = run.evaluate(data)
    mixture = 0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"]
    assert metrics["eval_loss"] == pytest.approx(mixture, rel=1e-5)


def test_a_log_without_any_label_has_no_hard_loss(tmp_path):
    data = without_labels(tiny.rows("classification", 8), *range(8))
    run = tiny.trainer("classification", tmp_path, data=data, max_steps=1)
    run.data_collator = DropsLabels()
    run.train()
    assert not tiny.logged(run, "hard_loss")
    assert tiny.logged(run, "soft_loss")


def test_a_part_that_is_not_a_number_is_logged_as_such(tmp_path):
    """It exists: leaving it out would hide it."""
    student, teacher = tiny.models("plain")
    run = tiny.trainer("plain", tmp_path, pair=(student, teacher), kd_check_finite="off", max_steps=1)
    data = tiny.rows("plain", 8)
    data[3]["features"] = data[3]["features"] * torch.inf
    run.train_dataset = data
    run.train()
    assert math.isnan(tiny.logged(run, "soft_loss")[0])


# ---- what a step costs ----


@pytest.fixture
def unwrapped(monkeypatch):
    """How often the student was unwrapped, which is dear where DeepSpeed is installed."""
    calls = []
    original = Accelerator.unwrap_model

    def counted(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "unwrap_model", counted)
    return calls


def unwrapped_in(calls, function) -> int:
    calls.clear()
    function()
    return len(calls)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_no_step_unwraps_the_student(task, unwrapped, tmp_path):
    runs = [tiny.trainer(task, tmp_path, max_steps=steps, per_device_eval_batch_size=4) for steps in (2, 8)]
    assert unwrapped_in(unwrapped, runs[0].train) == unwrapped_in(unwrapped, runs[1].train)
    data = tiny.rows(task, 24)
    few, many = (lambda part=data[:n]: runs[0].evaluate(part) for n in (4, 24))
    assert unwrapped_in(unwrapped, few) == unwrapped_in(unwrapped, many)


def test_a_model_of_model_init_is_looked_at_again(unwrapped, tmp_path):
    run = DistillationTrainer(
        model_init=lambda: tiny.models("classification")[0],
        args=tiny.arguments(tmp_path, max_steps=2),
        teacher_model=tiny.models("classification")[1],
        train_dataset=tiny.rows("classification"),
        data_collator=tiny.pad,
    )
    run.train()
    first = run._plan.student
    run.train()
    assert run._plan.student is not first
    assert run._plan.student is run.model


def test_no_batch_of_a_generating_evaluation_unwraps_the_student(unwrapped, tmp_path):
    from tests.tasks.test_seq2seq import distillation, rows

    run = distillation("t5", tmp_path, predict_with_generate=True, per_device_eval_batch_size=2)
    data = rows(12)
    run.evaluate(data)
    few, many = (lambda part=data[:n]: run.evaluate(part) for n in (2, 12))
    assert unwrapped_in(unwrapped, few) == unwrapped_in(unwrapped, many)
