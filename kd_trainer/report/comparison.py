"""The comparison of teacher, distilled and baseline runs: table, findings, report files and pictures.

The numbers come from `runs.py`, the drawing is in `plots.py`.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import write_atomically
from ..losses import IGNORE_INDEX
from ..validation import fail
from .paired import Difference, Metric, paired_differences, sentence
from .plots import draw_all
from .runs import NUMBERS, PREDICTIONS_FILE, Row, Run, accuracy_of, compare, finite


class Column(NamedTuple):
    """A number of the table: its key, its headings in full and for the console, its format."""

    number: str
    heading: str
    short: str
    spec: str


_ACCURACY = (
    Column("parameters", "Parameters", "Parameters", ",.0f"),
    Column("compression_ratio", "Compression", "Ratio", ".1f"),
    Column("test_accuracy_percent", "Test accuracy (%)", "Accuracy %", ".1f"),
    Column("improvement_points", "Over baseline (points)", "Over base", "+.1f"),
    Column("gap_points", "Gap to teacher (points)", "Gap", ".1f"),
)
_FIDELITY = (
    Column("agreement_percent", "Agreement with teacher (%)", "Agree %", ".1f"),
    Column("kl_to_teacher_nats", "KL to teacher (nats)", "KL (nats)", ".4f"),
    Column("ece", "ECE", "ECE", ".3f"),
    Column("nll_nats", "NLL (nats)", "NLL (nats)", ".3f"),
    Column("train_seconds", "Training (s)", "Train s", ".1f"),
)
# Shown where a row has them: of more than 20 classes, of embeddings.
_SIMILARITY = (
    Column("overlap_percent", "Teacher's mass on the top 20 (%)", "Overlap %", ".1f"),
    Column("teacher_cosine", "Cosine to teacher", "Cosine", ".3f"),
    Column("teacher_spearman", "Similarities against the teacher's (Spearman)", "Spearman", ".3f"),
)
COLUMNS = (*_ACCURACY, *_FIDELITY)
_WIDTH = 100  # characters, where the output is no terminal; a narrower terminal wraps the cells
_CAPTIONS = {
    "learning_curves.png": "Learning curves: training loss and evaluation accuracy over the optimizer steps",
    "reliability.png": "Reliability: accuracy by confidence on the test data",
    "agreement.png": "Agreement with the teacher, over all test rows and class by class",
    "temperature.png": "What the temperature does to the teacher's soft targets",
    "divergences.png": "Distance of the students Q from the teacher P, by direction of the divergence",
}


@dataclass(frozen=True)
class Report:
    """The finished comparison; `files` are what was written, in the order report.md, report.json, pictures."""

    title: str
    rows: list[Row]
    findings: list[str]
    notes: list[str]
    files: list[Path]
    paired: list[Difference] = field(default_factory=list)

    @property
    def pictures(self) -> list[str]:
        """File names of the pictures."""
        return [path.name for path in self.files if path.suffix == ".png"]


def _findings(rows: Sequence[Row], paired: Sequence[Difference], primary: Metric | None) -> list[str]:
    """Sentences that follow from the numbers alone, good or bad."""
    accuracies = [value for row in rows if (value := row.mean("test_accuracy_percent")) is not None]
    if len(rows) > 1 and len(accuracies) == len(rows) and min(accuracies) >= 99.95:
        return [
            f"All {len(rows)} models reach 100.0% test accuracy: the task is too easy to distinguish them. "
            "This comparison cannot show what distillation brings."
        ]
    teacher = next((row for row in rows if row.role == "teacher"), None)
    if primary is not None:
        sentences: list[str | None] = [
            sentence(each._replace(metric=primary)) for each in paired if each.metric.name == primary.name
        ]
    else:
        sentences = [_verdict(row) for row in rows if row.role == "student"]
    best = teacher.mean("improvement_points") if teacher else None
    if best is not None and best <= 0:
        sentences.append("The teacher is no better than the baseline: a student can gain little from it on these rows.")
    return [sentence for sentence in sentences if sentence]


def _verdict(row: Row) -> str | None:
    """Whether this student beats its baseline by more than chance, and how much of the teacher's lead it makes up."""
    gain = row.mean("improvement_points")
    if gain is None or row.baseline is None:
        return None
    spread, meaning = _spread(row, row.baseline)
    name, baseline = f"“{row.name}”", f"“{row.baseline.name}”"
    if spread is None:
        sentence = (
            f"{name} differs from {baseline} by {gain:+.1f} points in one run; without more seeds or stored "
            "test predictions this cannot be distinguished from chance."
        )
    elif abs(gain) <= spread:
        sentence = f"{name} does not differ from {baseline} beyond the spread: {gain:+.1f} points, {meaning}."
    elif gain < 0:
        sentence = f"{name} is worse than {baseline}: {gain:+.1f} points, {meaning}."
    else:
        sentence = f"{name} beats {baseline}: {gain:+.1f} points, {meaning}."
        gap = row.mean("gap_points")
        if gap is not None and gain + gap > 0:
            sentence += f" That is {100 * gain / (gain + gap):.0f}% of the teacher's lead."
    steps, baseline_steps = row.runs[0].steps, row.baseline.runs[0].steps
    if steps and baseline_steps and max(steps, baseline_steps) > 1.1 * min(steps, baseline_steps):
        sentence += f" They did not train equally long: {steps:,} against {baseline_steps:,} optimizer steps."
    return sentence


def _spread(row: Row, baseline: Row) -> tuple[float | None, str]:
    """The spread of the improvement in points, and its name: over seeds, or over test rows where there is one run."""
    paired = len(row.runs) == len(baseline.runs)
    spreads = [row.std("improvement_points"), None if paired else baseline.std("test_accuracy_percent")]
    known = [spread for spread in spreads if spread is not None]
    if known:
        spread = math.hypot(*known)
        return spread, f"standard deviation {spread:.1f} over {max(len(row.runs), len(baseline.runs))} seeds"
    if len(row.runs) > 1 or not row.runs[0].predictions or not baseline.runs[0].predictions:
        return None, ""
    (logits, labels), baseline_logits = row.runs[0].predictions, baseline.runs[0].predictions.logits
    counted = labels != IGNORE_INDEX
    right, baseline_right = ((each.argmax(-1) == labels)[counted].double() for each in (logits, baseline_logits))
    if len(right) < 2:
        return None, ""
    error = 200 * (right - baseline_right).std().item() / math.sqrt(len(right))
    return error, f"twice the standard error over {len(right):,} test rows {error:.1f} (one run)"


def _missing(rows: Sequence[Row]) -> list[str]:
    """Notes on missing numbers, and how to supply them."""
    notes = []
    if all(row.role != "teacher" for row in rows):
        notes.append("No run is named teacher: teacher=DIR gives compression, gap, agreement and KL.")
    if all(row.role != "baseline" for row in rows):
        notes.append("No run is named baseline: baseline=DIR shows what distillation itself brings.")
    for row in rows:
        if without := [str(run.path) for run in row.runs if not run.predictions]:
            notes.append(f"{row.name}: no {PREDICTIONS_FILE} in {', '.join(without)} (save_predictions writes it).")
        if "eval" in [accuracy_of(run)[1] for run in row.runs]:
            notes.append(f"{row.name}: its accuracy is eval_accuracy; the folder holds no test accuracy.")
        for run in row.runs:
            stored, (measured, split) = finite(run.results.get("test_accuracy")), accuracy_of(run)
            if stored is not None and measured is not None and split == "test" and abs(stored - measured) > 1e-3:
                notes.append(
                    f"{row.name}: test_accuracy {stored:.4f} in all_results.json is not that of the stored predictions "
                    f"({measured:.4f}, shown) in {run.path}."
                )
        for column in COLUMNS:
            count = sum(seed[column.number] is not None for seed in row.seeds)
            if 0 < count < len(row.seeds):
                notes.append(f"{row.name}: {column.heading} is known for {count} of {len(row.seeds)} seeds.")
    return notes


def build_report(
    runs: Sequence[Run],
    output_dir: str | os.PathLike[str],
    *,
    title: str = "Distillation report",
    notes: Iterable[str] = (),
    plots: bool = True,
    primary: Metric | None = None,
) -> Report:
    """Compares runs and writes report.md, report.json and the pictures to `output_dir`.

    Runs of one name are seeds of one row (mean and sample standard deviation). `compare` in `runs.py` pairs them with
    teachers and baselines. The gap is teacher minus model: positive where the model is behind.

    Args:
        runs: from `load_run`, at least one.
        output_dir: made if missing; files of an earlier report are replaced.
        title: the heading.
        notes: sentences to print below the table.
        plots: draw the pictures; without matplotlib the rest is written, with a note on how to install it.
        primary: the metric of the evaluation by which it is said whether distillation helps, from its difference over
            the seeds and the interval of that; None: the test accuracy, by its spread.

    Returns:
        The `Report`, for `print_table` and `markdown_table`.

    Raises:
        ValueError: no runs; test predictions of different rows; more students than teachers.

    Example:
        >>> report = build_report([load_run("out/teacher"), load_run("out/kd", "distilled")], "out")  # doctest: +SKIP
    """
    if not runs:
        fail("runs", list(runs), "at least one run", "Give the output folders of Trainer runs.")
    rows = compare(runs)
    all_notes = [*notes, *(_missing(rows) if primary is None else ())]
    pictures: dict[str, bytes] = {}
    if plots:
        try:
            pictures = draw_all(rows)
        except ImportError as error:
            all_notes.append(str(error))
    names = ["report.md", "report.json", *pictures]
    paired = paired_differences(rows)
    findings = _findings(rows, paired, primary)
    report = Report(title, rows, findings, all_notes, [Path(output_dir, name) for name in names], paired)
    contents: list[str | bytes] = [_markdown(report), _json(report), *pictures.values()]
    for path, content in zip(report.files, contents, strict=True):
        write_atomically(path, content)
    return report


def _cell(row: Row, column: Column) -> str:
    """A number as the table prints it: mean, ± standard deviation over seeds, – where unknown."""
    mean, std = row.mean(column.number), row.std(column.number)
    if mean is None:
        return "–"
    unit = "x" if column.number == "compression_ratio" else ""
    text = f"{mean:{column.spec}}{unit}"
    # Seeds share an architecture: "± 0" parameters would only be noise.
    same = column.number in ("parameters", "compression_ratio") and not std
    return text if std is None or same else f"{text} ± {std:{column.spec.lstrip('+')}}"


def markdown_table(report: Report) -> str:
    """The comparison as a Markdown table, for a model card: one row per model, the seeds' mean ± standard deviation."""
    columns = [*COLUMNS, *(c for c in _SIMILARITY if any(row.mean(c.number) is not None for row in report.rows))]
    lines = ["| Model | " + " | ".join(column.heading for column in columns) + " |", "|:---|" + "---:|" * len(columns)]
    for row in report.rows:
        name = row.name.replace("|", "\\|")
        lines.append(f"| {name} | " + " | ".join(_cell(row, column) for column in columns) + " |")
    return "\n".join(lines)


def _paired_cells(each: Difference) -> list[str]:
    numbers = [each.teacher, statistics.fmean(each.baselines), statistics.fmean(each.students)]
    share = "–" if each.share is None else f"{100 * each.share:.0f}%"
    name = each.metric.name.replace("_", " ") + (" (%)" if each.scale == 100 else "")
    shown = ["–" if number is None else each.shown(number) for number in numbers]
    return [name, *shown, each.shown(each.mean, "+"), each.shown_interval(), share]


_PAIRED_NOTE = (
    "Means over the seeds. Difference: student minus baseline of the same seed; its 95% interval by Student's t. "
    "Of the lead: share of the teacher's lead over the baseline."
)
_PAIRED_HEADINGS = ("Evaluation", "Teacher", "Baseline", "Student", "Difference", "95% interval", "Of the lead")


def _paired_markdown(paired: Sequence[Difference]) -> str:
    lines = [f"| {' | '.join(_PAIRED_HEADINGS)} |", "|:---|" + "---:|" * (len(_PAIRED_HEADINGS) - 1)]
    lines += [f"| {' | '.join(_paired_cells(each))} |" for each in paired]
    return "\n".join(lines)


def _how_to_read(rows: Sequence[Row]) -> str:
    counts = {len(row.runs) for row in rows}
    each = f"seeds ({'; '.join(f'{row.name}: {len(row.runs)}' for row in rows)})"
    if len(counts) == 1:
        each = f"{counts.pop()} seeds"
    text = f"± is the standard deviation over {each}. " if any(len(row.runs) > 1 for row in rows) else ""
    if sum(row.role == "baseline" for row in rows) > 1:
        text += "Each model is compared with the baseline of the same ending. "
    return text + (
        "Gap: teacher minus model. KL: KL(teacher‖model) per test row at temperature 1. "
        "ECE: expected calibration error, 15 bins. –: not in the folders."
    )


def _markdown(report: Report) -> str:
    parts = [f"# {report.title}", markdown_table(report), _how_to_read(report.rows)]
    for name in dict.fromkeys(each.student for each in report.paired):
        table = _paired_markdown([each for each in report.paired if each.student == name])
        parts += [f"## {name.capitalize()} minus baseline, pair by pair", table, _PAIRED_NOTE]
    if report.findings:
        parts += ["## Findings", "\n".join(f"- {sentence}" for sentence in report.findings)]
    formulas = [f"- {row.name}: `{formula}`" for row in report.rows for formula in row.formulas()]
    if formulas:
        parts += ["## Loss", "\n".join(formulas)]
    if report.pictures:
        parts += ["## Pictures", *(f"![{_CAPTIONS[name]}]({name})\n\n*{_CAPTIONS[name]}*" for name in report.pictures)]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def _json(report: Report) -> str:
    """All numbers, per seed and over seeds, as strict JSON: null where a number is not finite."""
    rows = [
        {
            "name": row.name,
            "role": row.role,
            "improvement_over": row.baseline.name if row.baseline else None,
            "formulas": row.formulas(),
            "runs": [
                {"path": str(run.path), "steps": run.steps, **{key: finite(value) for key, value in seed.items()}}
                for run, seed in zip(row.runs, row.seeds, strict=True)
            ],
            "mean": {key: finite(row.mean(key)) for key in NUMBERS},
            "std": {key: finite(row.std(key)) for key in NUMBERS},
        }
        for row in report.rows
    ]
    content: dict[str, Any] = {"title": report.title, "rows": rows, "findings": report.findings, "notes": report.notes}
    content |= {"paired": [each.json() for each in report.paired], "pictures": report.pictures}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def print_table(report: Report, console: Console | None = None) -> None:
    """Prints the comparison as two narrow tables, the findings and the notes; plain where there is no terminal."""
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_WIDTH)
    console.print(Text(report.title, style="bold"))
    wide = console.width >= _WIDTH
    for group in (_ACCURACY, _FIDELITY, _SIMILARITY):
        columns = tuple(c for c in group if any(row.mean(c.number) is not None for row in report.rows))
        if not columns:
            continue
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("Model", overflow="fold")
        for column in columns:
            table.add_column(column.short, justify="right", overflow="fold", no_wrap=wide)
        for row in report.rows:
            table.add_row(Text(row.name), *(_cell(row, column) for column in columns))
        console.print(table)
    if report.paired:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        first, *numbers, last = _PAIRED_HEADINGS
        table.add_column(first, no_wrap=wide)
        for heading in numbers:
            table.add_column(heading, justify="right", no_wrap=wide)
        table.add_column(last, justify="right")
        for each in report.paired:
            table.add_row(*map(Text, _paired_cells(each)))
        console.print(table)
    formulas = [f"Loss of {row.name}: {formula}" for row in report.rows for formula in row.formulas()]
    notes = [f"Note: {note}" for note in report.notes]
    for line in (_how_to_read(report.rows), *formulas, *report.findings, *notes):
        console.print(Text(line))
