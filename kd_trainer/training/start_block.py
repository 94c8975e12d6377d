"""What a person reads: the block before the first step and the model card's section on the distillation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import write_atomically
from ..losses import divide
from ..tasks import Task, count_parameters, describe, times
from ..validation import leave_progress_bar
from .objective import Counts, Objective
from .setup import Plan


def start_block(
    student: nn.Module,
    teacher: nn.Module | None,
    task: Task,
    first: Objective,
    last: Objective,
    counts: Counts,
    *,
    labelled: bool,
    cached: str | None = None,
) -> str:
    """The lines before the first step: models, task, formula with its numbers, and what may surprise.

    Args:
        first, last: the objective at the first step and at the end of its schedule.
        counts: of the first optimizer step on this process; labelled: whether the batch has labels.
        cached: a line on the teacher where its outputs are read from disk; a line for each of several teachers.
    """
    lines = [f"student  {describe(student)}"]
    if teacher is not None:
        ratio = count_parameters(teacher) / max(count_parameters(student), 1)
        lines = [f"teacher  {describe(teacher)} ({times(ratio, 'the student')})", *lines]
        if ratio < 1:
            lines.append("the teacher is smaller than the student: swap them if that is not meant")
    if cached is not None:
        lines = [*(f"teacher  {line}" for line in cached.splitlines()), *lines]
    lines += [f"task     {task.name}", first.formula(task)]
    if first != last:
        lines.append(f"at the end of the schedule: {last.formula(task)}")
    if not labelled and task.has_hard_loss:
        lines.append("no labels in the batch: the hard loss is absent")
    if task.by_position and first.reduction == "batchmean":
        larger = float(divide(torch.as_tensor(float(counts.soft)), int(counts.rows)))
        lines.append(
            f"batchmean sums over the {task.position}s of a row: the loss is about {larger:.0f} times "
            "the stock Trainer's; "
            'set {"kd_reduction": "tokenmean"} for its scale'
        )
    return "\n".join("[kd_trainer] " + line for line in lines)


def card_section(summary: Mapping[str, Any], log_history: Sequence[Mapping[str, float]]) -> str:
    """The model card's section: teacher, formula and the last evaluation's numbers (or the last logged ones).

    Args:
        summary: `DistillationMixin.summary()`; log_history: `trainer.state.log_history`.
    """
    teacher, size = f"the teacher `{summary['teacher']}`", ""
    if summary["teacher_parameters"] is not None:  # a server does not tell
        teacher += f" ({summary['teacher_parameters']:,} parameters)"
        ratio = summary["teacher_parameters"] / max(summary["student_parameters"], 1)
        size = f" ({ratio:.1f}x smaller)" if ratio >= 1 else f" ({1 / max(ratio, 1e-9):.1f}x larger)"
    lines = [
        "## Distillation",
        "",
        f"Distilled from {teacher} into {summary['student_parameters']:,} parameters{size} with kd_trainer:",
        "",
        f"    {summary['formula']}",
        "",
        "| Result | Value |",
        "|---|---|",
    ]
    last = next((entry for entry in reversed(log_history) if any(k.startswith("eval_") for k in entry)), None)
    last = last or next((entry for entry in reversed(log_history) if "loss" in entry), {})
    shown = {k: v for k, v in last.items() if isinstance(v, float) and not k.endswith(("_runtime", "_per_second"))}
    return "\n".join([*lines, *(f"| {key} | {value:.4f} |" for key, value in shown.items())]) + "\n"


def write_summary(folder: Any, summary: Mapping[str, Any]) -> None:
    """Writes `distillation.json`, for the report."""
    write_atomically(Path(str(folder)) / "distillation.json", json.dumps(summary, indent=2))


def put_card_section(folder: Any, summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Puts the section on the distillation at the end of the folder's model card, in place of an older one."""
    path = Path(str(folder)) / "README.md"
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8").split("\n## Distillation\n")[0].rstrip()
    write_atomically(path, f"{text}\n\n{card_section(summary, history)}")


def print_start(
    plan: Plan,
    first: Objective,
    last: Objective,
    batch: Mapping[str, Any],
    counts: Counts,
    label_names: Sequence[str],
    notes: Sequence[str],
) -> None:
    """Prints the start block with the notes of the plan and further ones.

    Args:
        batch: the first one; of its columns `label_names` hold labels.
    """
    labelled = plan.task.targets(batch) is not None
    labelled |= plan.own_loss and any(batch.get(name) is not None for name in label_names)
    model = None if plan.teacher is None else plan.teacher.model
    cached = None if plan.teacher is None or model is not None else plan.teacher.describe()
    block = start_block(plan.student, model, plan.task, first, last, counts, labelled=labelled, cached=cached)
    hard = [f"hard loss: {plan.hard_loss}"] if plan.hard_loss else []
    leave_progress_bar()
    print("\n".join([block, *("[kd_trainer] " + note for note in (*hard, *plan.notes, *notes))]), flush=True)


def summary_of(
    kd: Any, task: Task | None, formulas: Sequence[str], teacher: Mapping[str, Any] | None, student: nn.Module
) -> dict[str, Any]:
    """Teacher, formula and the numbers in it, as JSON values.

    Args:
        kd: the distillation arguments. task: None where it is not known yet.
        formulas: at the start and at the end of the schedule.
        teacher: its `identity()`, or None.
    """
    formula = (
        formulas[0] if kd.kd_schedule == "constant" else f"{formulas[0]}; {kd.kd_schedule} schedule to {formulas[1]}"
    )
    teacher = teacher or {}
    return {
        "formula": formula,
        "teacher": teacher.get("name"),
        "teacher_parameters": teacher.get("parameters"),
        **({"teachers": teacher["teachers"]} if "teachers" in teacher else {}),
        "student_parameters": count_parameters(student),
        **{f.name.removeprefix("kd_"): getattr(kd, f.name) for f in dataclasses.fields(kd) if f.name[:3] == "kd_"},
        "task": kd.kd_task if task is None else task.name,
    }
