"""`kd_run` "compare": baseline and distilled student over several seeds, one pair after another, then the report.

For: `trainer.py`, whose `train()` it repeats. A finished run ends with its results (`RESULTS`, written last) and is not
run again; an unfinished one resumes from its newest whole checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import set_seed

from ..files import write_atomically
from ..losses import IGNORE_INDEX
from ..tasks import TEACHER_PREFIX, Task, task_for, unchanged_attributes
from ..training import (
    HARD_LOSS_ONLY,
    WITHOUT_FEATURES,
    Plan,
    is_sharded,
    newest_resumable,
    on_main_process,
    unchanged_callbacks,
)
from ..validation import fail, leave_progress_bar, quoted
from .comparison import build_report, print_table
from .fidelity import accuracy
from .paired import NO_METRICS, Metric, paired_differences
from .runs import Run, compare, finite, load_run, read_json, save_predictions

RESULTS = "all_results.json"
SETTINGS, START = "comparison.json", "start.safetensors"
BASELINE, DISTILLED, TEACHER = "baseline", "distilled", "teacher"
# Arguments that change no number of a run: a comparison may go on with others.
_FREE: tuple[str, ...] = (
    "output_dir",
    "run_name",
    "kd_run",
    "kd_compare_seeds",
    "kd_check_finite",
    "teacher_cache_dir",
)
_FREE += ("resume_from_checkpoint", "disable_tqdm", "report_to", "do_train", "do_eval", "do_predict", "project")
_FREE_BEGINNINGS = ("log", "save_", "hub_", "push_to_hub", "dataloader_num", "dataloader_p", "trackio", "skip_memory")
# Of an evaluation without labels.
_WITHOUT_LABELS = ("eval_loss", "soft_loss", "teacher_agreement")


@dataclasses.dataclass(frozen=True)
class Compared:
    """A trainer with what is not public in it.

    Args:
        trainer: a `DistillationMixin`.
        changed: the trainer with other arguments and attributes; a teacher that it is without leaves the device.
        plan: the plan of the loss, as soon as a batch was seen.
        loss_shifts_labels: whether upstream compares position i with the label at i + 1.
    """

    trainer: Any
    changed: Callable[..., AbstractContextManager[None]]
    plan: Callable[[], Plan | None]
    loss_shifts_labels: bool

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    @property
    def trains_baseline(self) -> bool:
        """Whether the task has a loss without a teacher; else the baseline is the student before training."""
        trainer = self.trainer
        task = task_for(trainer.unwrapped_student(), trainer.args.kd_task, self.loss_shifts_labels)
        return task is None or task.has_hard_loss

    def on_main_process(self, call: Callable[[], Any]) -> Any:
        return on_main_process(self.trainer.accelerator, call)


class _RunOf(NamedTuple):
    name: str
    seed: int
    folder: Path


def compare_over_seeds(compared: Compared) -> None:
    """Trains and evaluates what is missing, prints the pairs as they finish, and writes the report.

    Every process must call it. The teacher, both students of each seed, and the report have folders of their own in
    `output_dir`.

    Raises:
        ValueError: what cannot be compared; or the folder holds a comparison with other settings.
    """
    trainer = compared.trainer
    _check(compared)
    settings, keeps_start = _settings(compared), trainer.model_init is None
    compared.on_main_process(partial(_begin, compared.folder, settings))
    if keeps_start:
        _same_start(compared)
    runs = [
        _RunOf(name, seed, compared.folder / f"seed-{seed}" / name)
        for seed in range(trainer.args.seed, trainer.args.seed + trainer.args.kd_compare_seeds)
        for name in (BASELINE, DISTILLED)
    ]
    note = _measure_teacher(compared)
    if trainer.args.teacher_cache_dir is not None:
        trainer.build_teacher_cache()
    for run in runs:
        if not compared.on_main_process((run.folder / RESULTS).is_file):
            _train(compared, run)
        if run.name == DISTILLED:
            compared.on_main_process(partial(_print_pairs, compared, runs[: runs.index(run) + 1]))
    notes = [note] if note else []
    if not compared.trains_baseline:
        notes.append("The baseline is the student before training: without a teacher this task has no loss.")
    if keeps_start:
        notes.append("Every seed has the same start: seeds differ in the order of rows and in dropout. A model_init ")
        notes[-1] += "gives each seed a new start."
    compared.on_main_process(partial(_report, compared, runs, notes))
    trainer.accelerator.wait_for_everyone()  # a launcher ends the others when one has ended


# ---- before the first run ----


def _check(compared: Compared) -> None:
    trainer = compared.trainer
    args = trainer.args
    because, fix = (
        "each run of a comparison creates its own",
        "Name it by optim and lr_scheduler_type in the arguments.",
    )
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        fail("optimizers", "given", "none with kd_run 'compare'", fix, because=because)
    if trainer.eval_dataset is None:
        fix = "Give the trainer an eval_dataset with labels."
        fail("eval_dataset", None, "data on which the students are compared, with kd_run 'compare'", fix)
    if trainer.teacher is None:
        fix = "Pass teacher_model= to the trainer, or set teacher_model_name_or_path."
        fail("teacher_model", None, "a teacher, with kd_run 'compare'", fix)
    features = getattr(args, "kd_features", None)
    if any(hasattr(parameter, "ds_id") for parameter in trainer.unwrapped_student().parameters()):
        because = "each run begins with a copy of it, and DeepSpeed's ZeRO-3 has split its weights while it was loaded"
        fix = "Load the model before the training arguments are made, or train both runs and call kd-trainer report."
        fail("model", "split over the processes", "a whole model with kd_run 'compare'", fix, because=because)
    if args.kd_alpha == 0 and args.kd_schedule == "constant" and not features:
        because = "the distilled student would be the baseline"
        fail("kd_alpha", args.kd_alpha, "above 0 with kd_run 'compare'", "Leave it out for 0.7.", because=because)


def _settings(compared: Compared) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON values."""
    trainer = compared.trainer
    kept = {
        name: value
        for name, value in trainer.args.to_dict().items()
        if name not in _FREE and not name.startswith(_FREE_BEGINNINGS)
    }
    sizes = {"processes": trainer.args.world_size, "train_rows": _rows(trainer.train_dataset)}
    sizes["eval_rows"] = _rows(trainer.eval_dataset)
    return json.loads(json.dumps({**kept, **sizes}, default=str))


def _rows(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(name): _rows(each) for name, each in data.items()}
    return len(data) if hasattr(data, "__len__") else None


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings; raises ValueError where the folder holds a comparison with others."""
    path = folder / SETTINGS
    if not path.is_file():
        if others := sorted(folder.glob(f"seed-*/*/{RESULTS}")):
            expected = f"a folder without {others[0].relative_to(folder)}, with kd_run 'compare'"
            fail("output_dir", repr(str(folder)), expected, "Set it to another folder.", because="it is of another run")
        write_atomically(path, json.dumps(settings, indent=1))
        return
    before = read_json(path, "output_dir")
    for name in (*settings, *before):
        if before.get(name) != settings.get(name):
            because = f"the comparison in {str(folder)!r} was begun with {quoted(before.get(name))}"
            fix = "Go on with the settings of before, or set output_dir to another folder."
            fail(name, quoted(settings.get(name)), "the same in all runs of a comparison", fix, because=because)


def _same_start(compared: Compared) -> None:
    """Gives the student the trained parameters of the comparison's first start: a script may initialise others."""
    student, path = compared.trainer.unwrapped_student(), compared.folder / START
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad and p.device.type != "meta"}

    def write() -> None:
        if not path.is_file():
            write_atomically(path, save({name: p.detach().cpu().contiguous() for name, p in trained.items()}))

    compared.on_main_process(write)
    kept = load_file(path)
    shapes = {name: tuple(value.shape) for name, value in kept.items()}
    if trained and shapes != {name: tuple(p.shape) for name, p in trained.items()}:
        fix = "Give the student of before, or set output_dir to another folder."
        expected = f"the architecture with which the comparison in {str(compared.folder)!r} was begun"
        fail("model", type(student).__name__, expected, fix)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(kept[name])


# ---- one run ----


# What a training leaves in a trainer.
_TRAINED = ("model", "model_wrapped", "model_init", "teacher", "optimizer", "lr_scheduler", "state")


@contextmanager
def _run(compared: Compared, changes: Mapping[str, Any], model: nn.Module | None = None) -> Iterator[None]:
    """The trainer of one run, whose memory is given back: `train` begins with a copy of the student, or with what the
    script's `model_init` makes. `model` is evaluated in the student's place."""
    trainer, start = compared.trainer, compared.trainer.unwrapped_student()
    attributes = {name: getattr(trainer, name) for name in _TRAINED}
    attributes["model_init"] = trainer.model_init or (lambda: copied(start))
    if model is not None:
        attributes |= {"model": model, "model_wrapped": model}
    loaders = trainer.accelerator.dataloader_config
    of_loaders, of_callbacks = unchanged_attributes(loaders, "data_seed"), unchanged_callbacks(trainer.callback_handler)
    with of_loaders, of_callbacks, compared.changed(changes, **attributes):
        loaders.data_seed = trainer.args.data_seed
        try:
            yield
        finally:
            trainer.accelerator.free_memory()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. TRL patches the forward of an instance by a function whose closure holds the original's method;
    `deepcopy` copies no function, and the copy would compute with the original's weights."""
    made = copy.deepcopy(model)
    copy_of = dict(zip(map(id, model.modules()), made.modules(), strict=True))
    seen: set[int] = set()

    def rebound(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return copy_of.get(id(value), value)
        if isinstance(value, MethodType):
            return MethodType(rebound(value.__func__), rebound(value.__self__))
        if not isinstance(value, FunctionType) or not value.__closure__ or id(value) in seen:
            return value
        seen.add(id(value))
        cells = tuple(CellType(rebound(cell.cell_contents)) for cell in value.__closure__)
        function = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        function.__kwdefaults__ = value.__kwdefaults__
        function.__dict__.update(value.__dict__)
        return function

    for module in made.modules():
        if "forward" in vars(module):
            module.forward = rebound(module.forward)
    return made


def _train(compared: Compared, run: _RunOf) -> None:
    trainer, args = compared.trainer, compared.trainer.args
    changes = {
        "output_dir": str(run.folder),
        "seed": run.seed,
        "data_seed": None if args.data_seed is None else args.data_seed + run.seed - args.seed,
        "kd_run": "train",
        "push_to_hub": False,
        "restore_callback_states_from_checkpoint": True,
    }
    if trainer.is_world_process_zero():
        leave_progress_bar()
        print(f"\n[kd_trainer] compare: {run.name}, seed {run.seed}, in {run.folder}", flush=True)
    untrained = run.name == BASELINE and not compared.trains_baseline
    with _run(compared, changes, _start(trainer, run.seed) if untrained else None):
        metrics = {} if untrained else _trained(compared, run)
        trainer.save_model()
        _finish(compared, run.folder, metrics)


def _start(trainer: Any, seed: int) -> nn.Module:
    """The student with which `train` would begin."""
    set_seed(seed)
    return trainer.unwrapped_student() if trainer.model_init is None else trainer.call_model_init()


def _trained(compared: Compared, run: _RunOf) -> dict[str, Any]:
    """Trains, from the newest checkpoint if there is one; returns the metrics of the training."""
    trainer = compared.trainer
    checkpoint = compared.on_main_process(lambda: newest_resumable(run.folder)[0])
    baseline = compared.changed(HARD_LOSS_ONLY, teacher=None)
    with baseline if run.name == BASELINE else nullcontext():
        metrics = dict(trainer.train(None if checkpoint is None else str(checkpoint)).metrics)
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    if run.name == BASELINE and losses and not any("hard_loss" in entry for entry in losses):
        because = "the baseline learns from labels alone"
        fix = "Label some rows."
        fail("train_dataset", "without labels", "labels, with kd_run 'compare'", fix, because=because)
    if checkpoint is not None:  # these are of the last part alone
        metrics |= dict.fromkeys(("train_runtime", "train_samples_per_second", "train_steps_per_second"))
    return metrics


def _finish(compared: Compared, folder: Path, metrics: dict[str, Any], *, teacher: bool = False) -> None:
    """Evaluates the trainer's model, with the teacher unless it is the teacher; writes the results last."""
    trainer = compared.trainer
    alone = compared.changed(HARD_LOSS_ONLY, teacher=None)
    with alone if teacher else compared.changed(WITHOUT_FEATURES):
        evaluated, plan = dict(trainer.evaluate()), compared.plan()
    without = (*_WITHOUT_LABELS, *NO_METRICS)
    if all(name.endswith(without) for name in evaluated if name.startswith("eval_")):
        fix = "Give labels in the eval_dataset, or a compute_metrics."
        fail("eval_dataset", "without labels and metrics", "what the students can be compared by", fix)
    if teacher:
        own = [name for name in evaluated if name.endswith("loss") and not name.endswith("hard_loss")]
        for name in own:  # a student's has the soft loss in it
            del evaluated[name]
    else:
        trainer.save_state()
    predictions = None if plan is None else _predict(compared, plan.task)

    def write() -> None:
        if predictions is not None:
            save_predictions(folder, *predictions)
            if (predictions[1] != IGNORE_INDEX).any():
                evaluated.setdefault("eval_accuracy", accuracy(*predictions))
        write_atomically(folder / RESULTS, json.dumps({**metrics, **evaluated}, indent=2, default=float))

    compared.on_main_process(write)


def _predict(compared: Compared, task: Task) -> tuple[Tensor, Tensor] | None:
    """Logits [N, C] and class labels [N] of the evaluation data, on the main process; None for other tasks."""
    trainer = compared.trainer
    several = isinstance(trainer.eval_dataset, dict)
    if several or task.by_position or task.over_positions or task.a_label_a_logit or not task.has_hard_loss:
        return None
    bare = {"teacher": None, "compute_metrics": None, "preprocess_logits_for_metrics": None}
    with compared.changed(HARD_LOSS_ONLY, **bare):
        output = trainer.predict(trainer.eval_dataset)
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    shapes = getattr(logits, "shape", ()), getattr(output.label_ids, "shape", ())
    if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1] or output.label_ids.dtype.kind != "i":
        return None
    return torch.as_tensor(logits), torch.as_tensor(output.label_ids)


def _measure_teacher(compared: Compared) -> str | None:
    """The teacher's own numbers on the evaluation data, once; a note where there are none."""
    trainer, folder = compared.trainer, compared.folder / TEACHER
    if compared.on_main_process((folder / RESULTS).is_file):
        return None
    live = trainer.teacher.live
    if live is None:
        reason = "it is not one model that is run"
    elif not live.has_own_weights:
        reason = "it is the student with a part switched off"
    elif is_sharded(trainer):
        reason = "FSDP and DeepSpeed prepare a model for training alone"
    elif not compared.trains_baseline:
        reason = "the students are compared with it"
    elif live.class_order is not None or live.start_tokens is not None or _reads_other_columns(trainer.eval_dataset):
        reason = "it reads other columns or classes than the student"
    else:
        return _evaluate_teacher(compared, live.model, folder)
    return f"The teacher itself was not evaluated: {reason}."


def _evaluate_teacher(compared: Compared, model: nn.Module, folder: Path) -> str | None:
    args = compared.trainer.args
    plain = {name: False for name in ("fp16_full_eval", "bf16_full_eval") if hasattr(args, name)}  # they cast the model
    try:
        with _run(compared, {"output_dir": str(folder), "kd_run": "train", **plain}, model):
            _finish(compared, folder, {}, teacher=True)
    except (TypeError, RuntimeError, KeyError, AttributeError) as error:  # its forward may not take these columns
        return f"The teacher itself was not evaluated: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        compared.trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # its own forward again
    return None


def _reads_other_columns(data: Any) -> bool:
    """Whether evaluation data has columns for the teacher alone."""
    for each in data.values() if isinstance(data, dict) else [data]:
        names = getattr(each, "column_names", None)
        if names is None and hasattr(each, "__getitem__") and hasattr(each, "__len__") and len(each):
            names = each[0] if isinstance(each[0], Mapping) else None
        if any(str(name).startswith(TEACHER_PREFIX) for name in names or ()):
            return True
    return False


# ---- what is shown ----


def _results(folder: Path) -> dict[str, Any]:
    return read_json(folder / RESULTS, "output_dir")


def _primary(args: Any, results: Mapping[str, Any]) -> Metric | None:
    """The metric by which it is said whether distillation helps: `metric_for_best_model`, or the first of these."""
    names = [
        name.removeprefix("eval_")
        for name, value in results.items()
        if name[:5] == "eval_" and finite(value) is not None
    ]
    chosen = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if chosen != "loss" and chosen in names:
        known = Metric.of(chosen)
        return known if args.greater_is_better is None else known._replace(higher_is_better=args.greater_is_better)
    for wanted in ("accuracy", "perplexity", "hard_loss", "teacher_spearman"):
        for name in names:
            if name == wanted or name.endswith(f"_{wanted}"):
                return Metric.of(name)
    return None


def _print_pairs(compared: Compared, runs: Sequence[_RunOf]) -> None:
    """The table of the seeds that are finished, by the primary metric."""
    primary = _primary(compared.trainer.args, _results(runs[0].folder))
    rows = compare([Run(TEACHER, compared.folder, results=_results(compared.folder / TEACHER))] + [
        Run(run.name, run.folder, results=_results(run.folder)) for run in runs
    ])  # fmt: skip
    found = [each for each in paired_differences(rows) if primary is not None and each.metric.name == primary.name]
    if not found:
        return
    each, seeds = found[0], [run.seed for run in runs if run.name == BASELINE]
    teacher = "" if each.teacher is None else f", teacher {each.shown(each.teacher)}"
    lines = [f"{each.metric.name.replace('_', ' ')}{' (%)' * (each.scale == 100)}{teacher}"]
    lines.append(f"{'seed':>6} {BASELINE:>10} {DISTILLED:>10} {'difference':>11}")
    for numbers in zip(seeds, each.baselines, each.students, each.differences, strict=True):
        seed, baseline, student, difference = numbers
        shown = each.shown(baseline), each.shown(student), each.shown(difference, "+")
        lines.append(f"{seed:>6} {shown[0]:>10} {shown[1]:>10} {shown[2]:>11}")
    if each.interval is not None:
        lines.append(f"mean difference {each.shown(each.mean, '+')}, 95% interval {each.shown_interval()}")
    leave_progress_bar()
    print("\n" + "\n".join(f"[kd_trainer] {line}" for line in lines), flush=True)


def _report(compared: Compared, runs: Sequence[_RunOf], notes: Sequence[str]) -> None:
    trainer, folder = compared.trainer, compared.folder / TEACHER
    teacher = load_run(folder, TEACHER) if (folder / RESULTS).is_file() else Run(TEACHER, folder)
    teacher = dataclasses.replace(teacher, parameters=trainer.teacher.identity().get("parameters"))
    loaded = [teacher, *(load_run(run.folder, run.name) for run in runs)]
    title = f"Distilled against baseline over {trainer.args.kd_compare_seeds} seeds"
    primary = _primary(trainer.args, loaded[1].results)
    report = build_report(loaded, compared.folder / "report", title=title, notes=notes, primary=primary)
    leave_progress_bar()
    print(flush=True)
    print_table(report)
    print(f"Written to {compared.folder / 'report'}: {', '.join(path.name for path in report.files)}", flush=True)
