"""Output folders of Trainer runs read as `Run`s, and compared with their teacher and baseline as `Row`s.

What a folder does not hold is None.
Shapes: N test rows, C classes; logits are [N, C], labels [N] with -100 = unlabelled.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ..files import write_atomically
from ..losses import OVERLAP_IDS, jsd, reverse_kl
from ..tasks import TASKS
from ..validation import fail
from . import fidelity

PREDICTIONS_FILE = "test_predictions.safetensors"
DISTILLATION_FILE = "distillation.json"
_LOOKED_FOR = (
    "trainer_state.json",
    "all_results.json",
    "model.safetensors",
    "model.safetensors.index.json",
    PREDICTIONS_FILE,
    DISTILLATION_FILE,
)
# The numbers of a run, units in the names; of all rows, so that report.json has the same keys everywhere.
NUMBERS = (
    "parameters",
    "compression_ratio",
    "test_accuracy_percent",
    "improvement_points",
    "gap_points",
    "agreement_percent",
    "overlap_percent",
    "kl_to_teacher_nats",
    "reverse_kl_nats",
    "jsd_nats",
    "ece",
    "nll_nats",
    "teacher_cosine",
    "teacher_spearman",
    "train_seconds",
)


class Predictions(NamedTuple):
    """Test rows of a run: float32 logits [N, C] and int64 labels [N]."""

    logits: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Run:
    """The content of one output folder; None (or empty) where it is missing. A run named "teacher" is the teacher's.

    `steps` are the optimizer steps done, `results` those of `save_metrics`, `distillation` the settings that a
    `DistillationTrainer` writes to its output folder.
    """

    name: str
    path: Path
    log_history: list[dict[str, Any]] = field(default_factory=list)
    steps: int | None = None
    results: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    predictions: Predictions | None = None
    distillation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """The runs (seeds) of one name, with the `NUMBERS` of each.

    `role` is "teacher", "baseline" or "student"; `baseline` is the row that the improvement is measured against, and
    `teachers` holds each run's own teacher.
    """

    name: str
    role: str
    runs: list[Run]
    teachers: list[Run | None]
    seeds: list[dict[str, float | None]]
    baseline: Row | None

    def mean(self, number: str) -> float | None:
        """The mean over the seeds that have the number, in the unit of its name; None where none has it."""
        values = self._values(number)
        return sum(values) / len(values) if values else None

    def std(self, number: str) -> float | None:
        """The sample standard deviation (n - 1) over seeds; None below two seeds, and where a value is infinite."""
        values = self._values(number)
        return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None

    def formulas(self) -> list[str]:
        """The loss formulas of the distilled runs, each once."""
        formulas = [run.distillation["formula"] for run in self.runs if "formula" in run.distillation]
        return list(dict.fromkeys(map(str, formulas)))

    def _values(self, number: str) -> list[float]:
        return [value for seed in self.seeds if (value := seed[number]) is not None]


def save_predictions(output_dir: str | os.PathLike[str], predictions: Any, labels: Any = None) -> Path:
    """Writes logits and labels of the test rows to `output_dir`, where the report finds them.

    Call it on one process only (`if trainer.is_world_process_zero():`): `trainer.predict` gathers on all of them.

    Args:
        output_dir: the run's output folder; made if missing.
        predictions: transformers' `PredictionOutput`, or logits [N, C] (a tensor or array; of a tuple, the first).
        labels: [N] class ids where `predictions` are logits; -100 in a row, or None for all: unlabelled.

    Returns:
        The path of the file, which is written whole or not at all.

    Raises:
        ValueError: logits that are not [N, C], or labels that are not [N].

    Example:
        >>> save_predictions("out/student", trainer.predict(test_data))  # doctest: +SKIP
    """
    if hasattr(predictions, "label_ids"):
        predictions, labels = predictions.predictions, predictions.label_ids
    if isinstance(predictions, tuple):
        predictions = predictions[0]
    logits = torch.as_tensor(predictions).detach().cpu().float().contiguous()
    if labels is None:
        labels = torch.full(logits.shape[:1], fidelity.IGNORE_INDEX)
    written = Predictions(logits, torch.as_tensor(labels).detach().cpu().long().contiguous())
    _check_predictions("predictions", written)
    return write_atomically(Path(output_dir) / PREDICTIONS_FILE, save(written._asdict()))


def load_run(path: str | os.PathLike[str], name: str | None = None) -> Run:
    """Reads the output folder of a Trainer run: logs, results, number of parameters, test predictions.

    `trainer_state.json` and the model may also lie in the newest `checkpoint-*`. Parameters are counted from the
    headers of the safetensors files (tied weights once, stored buffers included). The seconds are `train_runtime`: of
    a resumed run, those of its last session.

    Args:
        path: the folder.
        name: the row of the table; default: the folder's own name. "teacher" and "baseline..." have their roles.

    Returns:
        A `Run`; what is missing is None or empty.

    Raises:
        FileNotFoundError: no such folder, or a folder that holds none of the files looked for.
        ValueError: a file of another type than its name; the message names it.

    Example:
        >>> runs = [load_run("out/teacher"), load_run("out/kd", "distilled")]  # doctest: +SKIP
    """
    folder = Path(path)
    if not folder.is_dir():
        fix = "Give the output_dir of a Trainer run."
        fail("run", repr(str(path)), "an existing folder", fix, error=FileNotFoundError)
    found = {file: _find(folder, file) for file in _LOOKED_FOR}
    if not any(found.values()):
        expected = "the output folder of a Trainer run, with at least one of " + ", ".join(_LOOKED_FOR)
        fix = "Give the run's output_dir (trainer.save_state, save_metrics and save_model write these files)."
        fail("run", repr(str(path)), expected, fix, error=FileNotFoundError)
    name = name or folder.resolve().name
    state = read_json(found["trainer_state.json"])
    history = state.get("log_history") or []
    # For scripts without save_metrics: the Trainer's last log line holds the seconds.
    seconds = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    return Run(
        name="teacher" if name.lower() == "teacher" else name,
        path=folder,
        log_history=history,
        steps=state.get("global_step"),
        results={"train_runtime": seconds[-1] if seconds else None, **read_json(found["all_results.json"])},
        parameters=_count_parameters(found["model.safetensors"] or found["model.safetensors.index.json"]),
        predictions=_read_predictions(found[PREDICTIONS_FILE]),
        distillation=read_json(found[DISTILLATION_FILE]),
    )


def _find(folder: Path, file: str) -> Path | None:
    """`file` in the folder, or else in its newest checkpoint."""
    numbered = [(int(p.name[11:]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    places = [folder, *(path for _, path in sorted(numbered, reverse=True)[:1])]
    return next((place / file for place in places if (place / file).is_file()), None)


def read_json(path: Path | None, argument: str = "run") -> dict[str, Any]:
    """The JSON object in a file, {} where there is none. ValueError names the file and the argument that led to it."""
    if path is None or not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fix = "Fix or remove the file; it may be cut off by a killed run."
        fail(argument, repr(str(path)), f"a JSON file ({error})", fix)
    if not isinstance(value, dict):
        fail(argument, repr(str(path)), "a JSON object", "Fix or remove the file.")
    return value


def _count_parameters(path: Path | None) -> int | None:
    if path is None:
        return None
    files = [path]
    if path.suffix == ".json":
        files = sorted({path.parent / file for file in read_json(path).get("weight_map", {}).values()})
    total = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            fail("run", repr(str(file)), f"a safetensors file ({error})", "Save the model again, or remove the file.")
    return total


def _read_predictions(path: Path | None) -> Predictions | None:
    if path is None:
        return None
    fix = "Write it with kd_trainer.save_predictions."
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        fail("run", repr(str(path)), f"a safetensors file ({error})", fix)
    if not {"logits", "labels"} <= tensors.keys():
        fail("run", repr(str(path)), f"tensors `logits` and `labels`, not {sorted(tensors)}", fix)
    predictions = Predictions(tensors["logits"], tensors["labels"])
    _check_predictions(str(path), predictions)
    return predictions


def _check_predictions(argument: str, predictions: Predictions) -> None:
    logits, labels = predictions
    if logits.dim() != 2:
        fail(argument, f"logits {list(logits.shape)}", "logits [N, C]", "Give one row of logits per test row.")
    if labels.shape != logits.shape[:1]:
        shapes = f"logits {list(logits.shape)} with labels {list(labels.shape)}"
        fail(argument, shapes, "one label per row of logits", "Give labels [N], -100 where a row has none.")


def compare(runs: Sequence[Run]) -> list[Row]:
    """One row per name, the teacher first; every run measured against the teacher and the baseline of its seed.

    The i-th run of a name belongs to the i-th teacher, unless there is one teacher for all; its improvement is over the
    i-th run of its baseline where both have equally many, else over the baseline's mean. A row's baseline is the one
    with the same ending ("distilled, 20 epochs" and "baseline, 20 epochs"), else the one with the shortest name.

    Args:
        runs: from `load_run`, in the same order of seeds for every name.

    Returns:
        The rows; numbers that are not in the folders are None.

    Raises:
        ValueError: more seeds than teachers (and more than one teacher), or test predictions of different rows.
    """
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.name != "teacher"):
        groups.setdefault(run.name, []).append(run)
    teachers = groups.get("teacher", [])
    baselines = [name for name in groups if name.lower().startswith("baseline")]
    rows: dict[str, Row] = {}
    for name in sorted(groups, key=lambda name: name not in baselines):  # a row refers to that of its baseline
        members = groups[name]
        own_teachers = [_teacher_of(run, index, teachers) for index, run in enumerate(members)]
        seeds = [_measure(run, teacher) for run, teacher in zip(members, own_teachers, strict=True)]
        baseline = _baseline_of(name, baselines)
        baseline = None if baseline == name else baseline
        role = "teacher" if name == "teacher" else "baseline" if name in baselines else "student"
        rows[name] = Row(name, role, members, own_teachers, seeds, rows.get(baseline) if baseline else None)
        if teachers and role != "teacher":
            for seed, ahead in zip(seeds, _points_above(members, teachers), strict=True):
                seed["gap_points"] = None if ahead is None else -ahead
        if baseline:
            for seed, ahead in zip(seeds, _points_above(members, groups[baseline]), strict=True):
                seed["improvement_points"] = ahead
    return [rows[name] for name in groups]


def _teacher_of(run: Run, index: int, teachers: Sequence[Run]) -> Run | None:
    if len(teachers) > 1 and index >= len(teachers):
        shown = f"{len(teachers)} teachers and at least {index + 1} runs named {run.name!r}"
        fix = "Give the teachers and the students in the same order of seeds."
        fail("runs", shown, "one teacher for all, or one per seed", fix)
    return teachers[0 if len(teachers) == 1 else index] if teachers else None


def _baseline_of(name: str, baselines: Sequence[str]) -> str | None:
    """The baseline with the longest common ending, which the bare "baseline" has with every name; else the shortest."""
    shortest_first = sorted(baselines, key=len)
    same_ending = [baseline for baseline in shortest_first if name.endswith(baseline[len("baseline") :])]
    return next(iter([*same_ending[::-1], *shortest_first]), None)


def _measure(run: Run, teacher: Run | None) -> dict[str, float | None]:
    """The `NUMBERS` of one run; None where the folder lacks what they need."""
    numbers: dict[str, float | None] = dict.fromkeys(NUMBERS)
    numbers["parameters"] = run.parameters
    if teacher and teacher.parameters and run.parameters:
        numbers["compression_ratio"] = teacher.parameters / run.parameters
    accuracy, _ = accuracy_of(run)
    numbers["test_accuracy_percent"] = None if accuracy is None else 100 * accuracy
    numbers["train_seconds"] = finite(run.results.get("train_runtime"))
    if _embeds(run) and run.predictions and teacher and teacher is not run and teacher.predictions:
        _check_same_rows(run, teacher)
        embeddings = run.predictions.logits, teacher.predictions.logits
        numbers["teacher_spearman"] = fidelity.similarity_correlation(*embeddings)
    for name in ("teacher_cosine", "teacher_spearman"):
        numbers[name] = _stored(run, name) if numbers[name] is None else numbers[name]
    share = _stored(run, "overlap")
    numbers["overlap_percent"] = None if share is None else 100 * share
    if _embeds(run):
        return {key: None if value is not None and math.isnan(value) else value for key, value in numbers.items()}
    if run.predictions:
        numbers["ece"] = fidelity.expected_calibration_error(*run.predictions)
        numbers["nll_nats"] = fidelity.negative_log_likelihood(*run.predictions)
    if run.predictions and teacher and teacher is not run and teacher.predictions:
        _check_same_rows(run, teacher)
        student_logits, teacher_logits = run.predictions.logits.double(), teacher.predictions.logits.double()
        numbers["agreement_percent"] = 100 * fidelity.teacher_agreement(student_logits, teacher_logits)
        if student_logits.shape[-1] > OVERLAP_IDS:
            numbers["overlap_percent"] = 100 * fidelity.teacher_overlap(student_logits, teacher_logits)
        numbers["kl_to_teacher_nats"] = fidelity.kl_to_teacher(student_logits, teacher_logits)
        numbers["reverse_kl_nats"] = reverse_kl(student_logits, teacher_logits).mean().item()
        numbers["jsd_nats"] = jsd(student_logits, teacher_logits).mean().item()
    return {key: None if value is not None and math.isnan(value) else value for key, value in numbers.items()}


def _stored(run: Run, name: str) -> float | None:
    """A number of the test or, without one, of the evaluation."""
    stored = (finite(run.results.get(f"{split}_{name}")) for split in ("test", "eval"))
    return next((value for value in stored if value is not None), None)


def _embeds(run: Run) -> bool:
    """Whether its predictions are embeddings, not logits."""
    task = TASKS.get(str(run.distillation.get("task")))
    return task is not None and task.embeds


def accuracy_of(run: Run) -> tuple[float | None, str]:
    """Accuracy in [0, 1] and its split: of the stored test predictions, else what `save_metrics` wrote; (None, '')."""
    if run.predictions and (run.predictions.labels != fidelity.IGNORE_INDEX).any():
        return fidelity.accuracy(*run.predictions), "test"
    for split in ("test", "eval"):
        value = finite(run.results.get(f"{split}_accuracy"))
        if value is not None:
            return value, split
    return None, ""


def finite(value: Any) -> Any:
    """`value` where it is a finite number, else None."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _check_same_rows(run: Run, other: Run) -> None:
    """Raises unless both runs hold predictions of the same test rows for the same classes (or hold none)."""
    if not run.predictions or not other.predictions:
        return
    (logits, labels), (other_logits, other_labels) = run.predictions, other.predictions
    if len(labels) != len(other_labels):
        reason = f"{len(labels)} and {len(other_labels)} rows"
    elif logits.shape != other_logits.shape and not (_embeds(run) or _embeds(other)):
        reason = f"{logits.shape[-1]} and {other_logits.shape[-1]} classes"
    elif not torch.equal(labels, other_labels):
        reason = f"labels that differ in {int((labels != other_labels).sum())} of {len(labels)} rows"
    else:
        return
    shown = f"{str(run.path)!r} and {str(other.path)!r}, with {reason}"
    fix = "Predict both on the same test data, in the same order."
    fail("runs", shown, f"the same test rows in every {PREDICTIONS_FILE}", fix)


def _points_above(runs: Sequence[Run], others: Sequence[Run]) -> list[float | None]:
    """By how many points of accuracy each run is above `others`: its own partner, or their mean; None if unknown."""
    if len(others) in (1, len(runs)):
        for index, run in enumerate(runs):
            _check_same_rows(run, others[index % len(others)])
    accuracies, references = [accuracy_of(run) for run in runs], [accuracy_of(run) for run in others]
    # A test accuracy and an evaluation accuracy cannot be compared.
    if len({split for value, split in (*accuracies, *references) if value is not None}) > 1:
        return [None] * len(runs)
    levels = [value for value, _ in references]
    if len(levels) != len(runs):
        known = [value for value in levels if value is not None]
        levels = [sum(known) / len(known) if known else None] * len(runs)
    pairs = zip(accuracies, levels, strict=True)
    return [None if value is None or level is None else 100 * (value - level) for (value, _), level in pairs]
