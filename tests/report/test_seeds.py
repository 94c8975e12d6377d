"""`kd_run` "compare": the numbers of separate runs, what is on disk, what goes on after a stop, what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import signal
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertModel, EarlyStoppingCallback, TrainerCallback

from kd_trainer import (
    DistillationTrainer,
    MLPConfig,
    MLPForImageClassification,
    as_tensors,
    classification_metrics,
    collate_tensors,
    load_run,
    synthetic_classification,
)
from kd_trainer.report import seeds
from tests.helpers import launch, tiny, tiny_generative
from tests.helpers.script_process import end_of_script
from tests.tasks import test_multiple_choice, test_segmentation, test_speech_frames

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "initializer_range": 0.5}
SHUFFLED = {"train_sampling_strategy": "random", "max_steps": 6}


def pair_with_dropout():
    torch.manual_seed(0)
    return tuple(BertForSequenceClassification(tiny.bert_config(width, **DROPOUT)) for width in (16, 24))


@pytest.fixture(autouse=True, scope="module")
def without_pictures():
    """They take longer than the runs; other tests draw them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "build_report", partial(seeds.build_report, plots=False))
        yield


def mlp(out, **kwargs):
    """The pair and the data of examples/distill_mlp.py, smaller: most rows have no label."""
    data = synthetic_classification(num_train=40, num_test=60, num_unlabelled=60, signal=0.15)
    rows = as_tensors(datasets.concatenate_datasets([data["train"], data["unlabelled"]]))
    torch.manual_seed(0)
    student, teacher = (MLPForImageClassification(MLPConfig(hidden_sizes=sizes)) for sizes in ([8], [16, 16]))
    return DistillationTrainer(
        model=student, teacher_model=teacher, args=tiny.arguments(out, **{**SHUFFLED, **kwargs}), train_dataset=rows,
        data_collator=collate_tensors, eval_dataset=as_tensors(data["test"]), compute_metrics=classification_metrics(),
    )  # fmt: skip


def build(task, out, pair=None, *, callbacks=(), **kwargs):
    if task == "mlp":
        return mlp(out, **kwargs)
    student, teacher = pair or (pair_with_dropout() if task == "classification" else tiny.models(task))
    compute = {"compute_metrics": classification_metrics()} if task in ("classification", "plain") else {}
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=tiny.arguments(out, **{**SHUFFLED, **kwargs}),
        data_collator=tiny.pad,
        train_dataset=tiny.rows(task),
        eval_dataset=tiny.rows(task, 21, seed=2),
        callbacks=list(callbacks),
        **compute,
    )


def run(trainer):
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 0
    return report_of(trainer)


def report_of(trainer):
    return json.loads((Path(trainer.args.output_dir) / "report" / "report.json").read_text())


def compare(task, out, **kwargs):
    trainer = build(task, out, kd_run="compare", kd_compare_seeds=2, **kwargs)
    return trainer, run(trainer)


@pytest.fixture(scope="module")
def finished(without_pictures, tmp_path_factory):
    """A trainer after its comparison, and its report."""
    return compare("classification", tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copied(finished, tmp_path):
    """The folder of a finished comparison, to go on with."""
    return Path(shutil.copytree(finished[0].args.output_dir, tmp_path / "copied"))


def results(out, name, seed):
    return json.loads((out / f"seed-{seed}" / name / "all_results.json").read_text())


@pytest.mark.parametrize("task", ["classification", "causal_lm", "mlp"])
def test_the_numbers_are_those_of_separate_runs(tmp_path, task):
    reduction = {"kd_reduction": "tokenmean"} if task == "causal_lm" else {}
    compare(task, tmp_path / "switch", seed=5, optim="adamw_torch", learning_rate=1e-3, **reduction)
    for seed in (5, 6):
        for name, alpha in (("baseline", 0.0), ("distilled", 0.7)):
            settings = {"seed": seed, "optim": "adamw_torch", "learning_rate": 1e-3, "kd_alpha": alpha, **reduction}
            alone = build(task, tmp_path / name / str(seed), **settings)
            alone.train()
            weights = load_file(tmp_path / "switch" / f"seed-{seed}" / name / "model.safetensors")
            expected = alone.model.state_dict()
            assert weights
            for key, value in weights.items():
                torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)
            alone.args.kd_alpha = 0.7
            measured, kept = alone.evaluate(), results(tmp_path / "switch", name, seed)
            for key in ("eval_loss", "eval_hard_loss", "eval_soft_loss", "eval_teacher_agreement"):
                assert kept[key] == pytest.approx(measured[key], rel=1e-5), key
            if task != "causal_lm":
                assert kept["eval_accuracy"] == measured["eval_accuracy"]


def test_the_seeds_and_the_students_differ(finished):
    trainer, report = finished
    files = sorted(Path(trainer.args.output_dir).glob("seed-*/*/model.safetensors"))
    weights = [load_file(path)["classifier.weight"] for path in files]
    assert len(weights) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert [(row["name"], len(row["runs"])) for row in report["rows"]] == [
        ("teacher", 1), ("baseline", 2), ("distilled", 2),
    ]  # fmt: skip
    assert {"accuracy", "hard_loss", "soft_loss", "teacher_agreement"} <= {each["metric"] for each in report["paired"]}
    assert report["findings"][0].startswith(("Whether distillation helps", "Distillation"))
    assert "same start" in report["notes"][0]
    assert report["rows"][0]["mean"]["parameters"] == sum(p.numel() for p in trainer.teacher.model.parameters())


def test_the_teacher_is_measured_as_the_students_are(finished):
    trainer, report = finished
    out, teacher = Path(trainer.args.output_dir), trainer.teacher.model.eval()
    batch = tiny.pad(tiny.rows("classification", 21, seed=2))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = teacher(**batch).logits
    kept = json.loads((out / "teacher" / "all_results.json").read_text())
    assert kept["eval_accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert kept["eval_hard_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    torch.testing.assert_close(load_run(out / "teacher").predictions.logits, logits, rtol=1e-5, atol=1e-5)
    accuracy = next(each for each in report["paired"] if each["metric"] == "accuracy")
    assert accuracy["teacher"] == kept["eval_accuracy"]


def test_a_baseline_never_calls_the_teacher(tmp_path, monkeypatch):
    calls = []

    class Counts(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            calls.append((args.output_dir.rpartition("/")[2], trainer.teacher is None, args.kd_alpha))

    trainer = build("classification", tmp_path, kd_run="compare", kd_compare_seeds=1, callbacks=[Counts()])
    run(trainer)
    assert set(calls) == {("baseline", True, 0.0), ("distilled", False, 0.7)}


def test_the_trainer_is_afterwards_as_it_was(tmp_path):
    trainer = build("classification", tmp_path, kd_run="compare", kd_compare_seeds=1)
    args, model, teacher, weights = trainer.args.to_dict(), trainer.model, trainer.teacher, tiny.weights(trainer.model)
    run(trainer)
    assert trainer.args.to_dict() == args
    assert trainer.model is model
    assert trainer.teacher is teacher
    assert trainer.model_init is None
    assert trainer.optimizer is None
    assert torch.equal(tiny.weights(trainer.model), weights)
    trainer.args.kd_run = "train"
    trainer.train()
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("task", ["regression", "plain", "token_classification", "question_answering", "causal_lm"])
def test_other_tasks(tmp_path, task):
    _, report = compare(task, tmp_path, max_steps=2)
    metrics = {each["metric"]: each for each in report["paired"]}
    assert metrics["hard_loss"]["teacher"] is not None
    assert len(metrics["hard_loss"]["interval_95"]) == 2
    primary = {"causal_lm": "perplexity", "plain": "accuracy"}.get(task, "hard loss")
    assert primary in report["findings"][0]


@pytest.mark.trains
@pytest.mark.parametrize("task", ["multi_label_classification", "segmentation", "multiple_choice", "ctc", "whisper"])
def test_further_tasks(tmp_path, task):
    kwargs = {"kd_run": "compare", "kd_compare_seeds": 2, "max_steps": 2}
    trainer = {
        "segmentation": lambda: test_segmentation.distillation(tmp_path, test_segmentation.segformer, **kwargs),
        "multiple_choice": lambda: test_multiple_choice.distillation(tmp_path, **kwargs),
        "ctc": lambda: test_speech_frames.distillation(tmp_path, "wav2vec2", **kwargs),
        "whisper": lambda: tiny.trainer(
            "causal_lm", tmp_path, data=tiny_generative.KINDS[task].rows(), pair=tiny_generative.pair(task), **kwargs
        ),
    }.get(task, lambda: tiny.trainer(task, tmp_path, **kwargs))()
    trainer.eval_dataset = trainer.train_dataset
    metrics = {each["metric"] for each in run(trainer)["paired"]}
    assert {"hard_loss", "soft_loss", "teacher_agreement"} <= metrics


def test_the_teacher_may_be_read_from_disk(finished, tmp_path):
    _, cached = compare("classification", tmp_path / "run", teacher_cache_dir=str(tmp_path / "cache"))
    _, live = finished
    for a, b in zip(cached["paired"], live["paired"], strict=True):
        assert a["students"] == pytest.approx(b["students"], rel=1e-5), a["metric"]
        assert a["teacher"] == b["teacher"]


def test_model_init_gives_each_seed_a_start(tmp_path):
    start, teacher = pair_with_dropout()

    def new():
        return BertForSequenceClassification(start.config)

    trainer = DistillationTrainer(
        model_init=new, teacher_model=teacher, data_collator=tiny.pad, train_dataset=tiny.rows("classification"),
        args=tiny.arguments(tmp_path, kd_run="compare", kd_compare_seeds=2, learning_rate=1e-12),
        eval_dataset=tiny.rows("classification", 21, seed=2),
    )  # fmt: skip
    report = run(trainer)
    first, same, other, _ = (
        load_file(path)["classifier.weight"] for path in sorted(tmp_path.glob("seed-*/*/model.safetensors"))
    )
    torch.testing.assert_close(first, same)
    assert (first - other).abs().max() > 0.01
    assert not report["notes"]
    assert trainer.model_init is new


# ---- stopped and started again ----


class Stop(TrainerCallback):
    """Ends the process at a step of a run, as a kill would."""

    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.folder) and state.global_step == self.step:
            raise MemoryError


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


def without_times(report):
    """A report without seconds and folders."""
    rows = [{**row, "mean": None, "std": None, "runs": None} for row in report["rows"]]
    numbers = [
        {name: value for name, value in each.items() if name not in ("path", "train_seconds")}
        for row in report["rows"]
        for each in row["runs"]
    ]
    return [rows, numbers, report["paired"], report["findings"], report["notes"]]


def early():
    return EarlyStoppingCallback(early_stopping_patience=3)


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_hard_loss", "greater_is_better": False}


@pytest.mark.trains
def test_it_goes_on_where_it_stopped(tmp_path):
    settings = {
        "kd_run": "compare",
        "kd_compare_seeds": 2,
        "max_steps": 8,
        "optim": "adamw_torch",
        **CHECKPOINTS,
        **BEST,
    }
    whole = run(build("classification", tmp_path / "whole", callbacks=[early()], **settings))
    stops = [("seed-42/baseline", 5), ("seed-42/distilled", 3), ("seed-43/baseline", 1), ("seed-43/distilled", 7)]
    for stop in stops:
        torch.manual_seed(len(stop))
        trainer = build("classification", tmp_path / "stopped", callbacks=[early(), Stop(*stop)], **settings)
        with pytest.raises(MemoryError):
            trainer.train()
    kept = (tmp_path / "stopped" / "seed-42" / "distilled" / "all_results.json").stat().st_mtime_ns
    stopped = run(build("classification", tmp_path / "stopped", callbacks=[early()], **settings))
    assert without_times(stopped) == without_times(whole)
    assert (tmp_path / "stopped" / "seed-42" / "distilled" / "all_results.json").stat().st_mtime_ns == kept


def test_a_student_with_other_first_weights_gets_the_first_start(copied):
    before = results(copied, "baseline", 42)
    shutil.rmtree(copied / "seed-42" / "baseline")
    _, teacher = pair_with_dropout()
    torch.manual_seed(99)
    other = BertForSequenceClassification(tiny.bert_config(16, **DROPOUT))
    compare("classification", copied, pair=(other, teacher))
    assert results(copied, "baseline", 42)["eval_hard_loss"] == before["eval_hard_loss"]


def test_more_seeds_can_be_added(copied):
    before = results(copied, "distilled", 43)
    report = run(build("classification", copied, kd_run="compare", kd_compare_seeds=3))
    assert len(report["rows"][2]["runs"]) == 3
    assert results(copied, "distilled", 43) == before


def test_callbacks_begin_each_run_as_they_were(tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    settings = {**CHECKPOINTS, **BEST, "kd_run": "compare", "kd_compare_seeds": 2, "max_steps": 8}
    run(build("classification", tmp_path, callbacks=[stopping], **settings))
    steps = {load_run(folder).steps for folder in tmp_path.glob("seed-*/*")}
    assert steps == {4}  # each stops at its second evaluation; with a counter of the run before at the first
    assert stopping.early_stopping_patience_counter == 0


# ---- what is refused ----


def refusal(trainer):
    with pytest.raises(ValueError, match="expected") as error:
        trainer.train()
    return str(error.value)


def test_other_settings_are_refused(copied):
    shown = refusal(build("classification", copied, kd_run="compare", kd_temperature=2.0))
    assert shown.startswith("`kd_temperature` is 2.0; expected the same in all runs of a comparison, because")
    assert "begun with 3.0" in shown


def test_runs_of_something_else_are_not_taken_for_its_own(copied):
    (copied / seeds.SETTINGS).unlink()
    shown = refusal(build("classification", copied, kd_run="compare"))
    assert "expected a folder without seed-42/baseline/all_results.json" in shown


@pytest.mark.parametrize(("file", "read"), [
    (seeds.SETTINGS, lambda folder: seeds._begin(folder, {})),
    (seeds.RESULTS, lambda folder: seeds._results(folder)),
])  # fmt: skip
def test_a_broken_file_is_named(tmp_path, file, read):
    (tmp_path / file).write_text('{"seed": ')
    with pytest.raises(ValueError, match=rf"`output_dir` is '.*{file}'; expected a JSON file .*Fix or remove the file"):
        read(tmp_path)


def test_another_architecture_is_refused(copied):
    student, teacher = pair_with_dropout()
    trainer = build("classification", copied, pair=(teacher, copy.deepcopy(student)), kd_run="compare")
    assert refusal(trainer).startswith("`model` is BertForSequenceClassification; expected the architecture")


@pytest.mark.parametrize(
    ("change", "begins"),
    [
        ({"eval_dataset": None}, "`eval_dataset` is None; expected data on which the students are compared"),
        ({"teacher": None}, "`teacher_model` is None; expected a teacher, with kd_run 'compare'"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)}, "`optimizers` is given; expected none with kd_run"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, change, begins):
    trainer = build("classification", tmp_path, kd_run="compare")
    vars(trainer).update(change)
    assert refusal(trainer).startswith(begins)


def test_a_student_that_zero3_has_split_is_refused(tmp_path):
    trainer = build("classification", tmp_path, kd_run="compare")
    next(trainer.model.parameters()).ds_id = 0
    assert "ZeRO-3 has split its weights" in refusal(trainer)


def test_the_baseline_itself_is_refused(tmp_path):
    trainer = build("classification", tmp_path, kd_run="compare", kd_alpha=0.0)
    assert refusal(trainer).startswith("`kd_alpha` is 0.0; expected above 0 with kd_run 'compare'")


@pytest.mark.parametrize("starts", [False, True])
def test_embeddings_are_compared_with_the_untrained_student(tmp_path, starts):
    def model(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return BertModel(tiny.bert_config(16, num_hidden_layers=1))

    torch.manual_seed(1)
    trainer = DistillationTrainer(
        model=None if starts else model(seed=0), model_init=model if starts else None,
        teacher_model=BertModel(tiny.bert_config(24)), data_collator=tiny.pad,
        args=tiny.arguments(tmp_path, **SHUFFLED, kd_run="compare", kd_compare_seeds=2),
        train_dataset=tiny.rows("classification"), eval_dataset=tiny.rows("classification", 21, seed=2),
    )  # fmt: skip
    report = run(trainer)
    spearman = next(each for each in report["paired"] if each["metric"] == "teacher_spearman")
    for found, (name, seed) in zip(
        (*spearman["baselines"], *spearman["students"]),
        itertools.product(("baseline", "distilled"), (42, 43)),
        strict=True,
    ):
        student = BertModel.from_pretrained(tmp_path / f"seed-{seed}" / name)
        alone = DistillationTrainer(
            model=student, teacher_model=trainer.teacher.model, args=tiny.arguments(tmp_path / "alone"),
            data_collator=tiny.pad, eval_dataset=tiny.rows("classification", 21, seed=2),
        )  # fmt: skip
        assert found == pytest.approx(alone.evaluate()["eval_teacher_spearman"], abs=1e-6)
        if name == "baseline":
            start = model(seed=0 if not starts else seed)
            assert all(torch.equal(a, b) for a, b in zip(start.parameters(), student.parameters(), strict=True))
    assert any("student before training" in note for note in report["notes"])
    assert "teacher spearman" in " ".join(report["findings"])


@pytest.mark.parametrize("data", ["train_dataset", "eval_dataset"])
def test_rows_without_labels_are_refused(tmp_path, data):
    trainer = build("classification", tmp_path, kd_run="compare")
    for row in getattr(trainer, data):
        del row["labels"]
    trainer.compute_metrics = None
    assert refusal(trainer).startswith(f"`{data}` is without labels")


@pytest.mark.parametrize("value", [0, -1, 2.5, "3"])
def test_the_number_of_seeds_is_checked(tmp_path, value):
    with pytest.raises((ValueError, TypeError), match="`kd_compare_seeds` is"):
        tiny.arguments(tmp_path, kd_compare_seeds=value)


# ---- in processes of their own ----

KILLS = ["seed-42/baseline 5", "results seed-42/baseline", "save seed-42/distilled", "seed-43/baseline 3"]
KILLS += ["seed-43/distilled 7"]


def started(out, *moment):
    script = Path(launch.__file__).with_name("compare_run.py")
    return end_of_script(script, [str(out), *moment], folder=out.parent, timeout=300)


def report_in(out):
    return json.loads((out / "report" / "report.json").read_text())


@pytest.mark.launch
def test_five_kills_give_the_same_report(tmp_path):
    code, output = started(tmp_path / "whole")
    assert code == 0, output[-3000:]
    for moment in KILLS:
        code, output = started(tmp_path / "killed", moment)
        assert code == -signal.SIGKILL, (moment, output[-3000:])
    code, output = started(tmp_path / "killed")
    assert code == 0, output[-3000:]
    assert without_times(report_in(tmp_path / "killed")) == without_times(report_in(tmp_path / "whole"))


@pytest.mark.launch
@pytest.mark.parametrize("zero", ["", "2"])
def test_two_processes_have_the_report_of_one(tmp_path, monkeypatch, zero):
    monkeypatch.setenv("COMPARE_ZERO", zero)
    launch.two_processes("compare_run.py", str(tmp_path / "two"))
    monkeypatch.setitem(DROPOUT, "hidden_dropout_prob", 0.0)
    monkeypatch.setitem(DROPOUT, "attention_probs_dropout_prob", 0.0)
    _, alone = compare("classification", tmp_path / "one", max_steps=8, optim="adamw_torch")
    shared = {each["metric"]: each for each in report_in(tmp_path / "two")["paired"]}
    found = {each["metric"]: each for each in alone["paired"] if each["metric"] in shared}
    assert {"hard_loss", "soft_loss", "accuracy", "teacher_agreement"} <= found.keys()
    for name, each in found.items():
        assert shared[name]["students"] == pytest.approx(each["students"], rel=1e-3), name
        assert shared[name]["baselines"] == pytest.approx(each["baselines"], rel=1e-3), name
