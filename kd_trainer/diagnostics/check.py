"""`trainer.check()`: all checks of a setup, advice, and one batch through both models, as a table.

For: `trainer.py`. Nothing is trained, and all state is restored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from ..losses import release_memory
from ..tasks import (
    TEACHER_PREFIX,
    PackingWatch,
    accepted_inputs,
    model_inputs,
    same_random_numbers,
    task_for,
    unchanged_attributes,
    unchanged_buffers,
    unchanged_modes,
)
from ..teachers import labels_of
from ..training import WITH_MODELS, WITHOUT_MODELS, FirstBatch, classes_of_logits, is_sharded, make_plan, tokens
from ..validation import fail
from . import advice as advice
from .inspection import Inspection as Inspection
from .inspection import LossOfPlan as LossOfPlan
from .results import CheckResult, Results, has_errors, print_results, refused, warning
from .trial import Trial, batches, run


def examine(
    inspection: Inspection, *, evaluate: bool = True, batch: Mapping[str, Any] | None = None
) -> list[CheckResult]:
    """All results, the same list on every process; every process must call it, and the first one prints them.

    Args:
        evaluate: whether the teacher is measured on the evaluation data.
        batch: the first batch of training; None takes it from the trainer's own loader.
    """
    trainer = inspection.trainer
    with _as_it_was(trainer):
        results = Results(trainer.accelerator, trainer.args.device)
        results.rows += [refused("setup", refusal) for refusal in inspection.setup.refused]
        _look_at_models(inspection, results)
        if batch is None:
            with results.attempt("data"):
                batch = _first_batch(trainer)
        trial = None
        if results.everywhere(batch is not None):
            trial = _look_at_batch(inspection, results, cast(Mapping, batch))
        if results.everywhere(trial is not None):
            run(cast(Trial, trial), results, evaluate)
        rows = results.of_all_processes()
    release_memory()
    if trainer.is_world_process_zero():
        print_results(rows)
    trainer.accelerator.wait_for_everyone()  # a launcher ends the others when one has ended with 1
    return rows


def _look_at_models(inspection: Inspection, results: Results) -> None:
    trainer, settings = inspection.trainer, inspection.settings
    student, teacher, args = trainer.unwrapped_student(), trainer.teacher, trainer.args
    with results.attempt("settings"):
        settings.read(args)
        if not inspection.setup.refused:  # else the teacher is missing for a reason that already has a row
            settings.require_teacher(teacher)
    results.add("student", advice.about_student, student, fp16=args.fp16)
    use = {"called": not settings.always_hard, "mixed": trainer.accelerator.mixed_precision != "no"}
    members, labels = ((None,) if teacher is None else teacher.members), labels_of(teacher)
    for label, member in zip(labels, members, strict=True):
        with _labelled(results, label):
            results.add("teacher", advice.about_teacher, member, student, args.device, **use)
    task = task_for(student, settings.kd.kd_task, inspection.loss_shifts_labels)
    with results.attempt("classes"):
        for label, member in zip(labels, members, strict=True):
            compared = member and member.compare_classes(student, task, remap=settings.kd.kd_remap_labels)
            with _labelled(results, label):
                results.rows += advice.about_classes(compared) if compared else []


@contextmanager
def _labelled(results: Results, label: str) -> Iterator[None]:
    """Rows that are added inside begin with the label of one of several teachers; "" of a single one."""
    before = len(results.rows)
    yield
    if label:
        results.rows[before:] = [row._replace(found=f"{label}: {row.found}") for row in results.rows[before:]]


def _look_at_batch(inspection: Inspection, results: Results, batch: Mapping[str, Any]) -> Trial | None:
    """The list of checks, and advice on the batch; None where the models could not be run on it."""
    trainer, before = inspection.trainer, len(results.rows)
    setup = inspection.setup.first_batch(batch, trainer.teacher)
    passed = {check: results.passes(what, partial(check, setup)) for what, check in WITHOUT_MODELS}
    for label, one in zip(labels_of(setup.teacher), setup.each or (setup,), strict=True):
        if passed[tokens] and one.teacher is not None and one.teacher.has_own_weights:
            with _labelled(results, label):
                results.rows += advice.about_tokens(batch, one.known_by)
    with results.attempt("student's tokens"):
        advice.check_student_ids(setup.student, batch)
    _look_closer(inspection, setup, results)
    if is_sharded(trainer) and not trainer.is_in_train:
        fix = 'Set {"kd_run": "check"}: trainer.train() then checks with the student as training shards it.'
        results.rows.append(warning("loss", "the models were not run: the student is not sharded yet", fix))
        return None
    # On a GPU an index out of range ends the process.
    fits = results.everywhere(all(passed.values()) and not has_errors(results.rows[before:]))
    fits = fits and all(results.passes(what, partial(check, setup)) for what, check in WITH_MODELS)
    if fits and setup.task_by_logits:
        _look_closer(inspection, setup, results)
    if setup.known_task is not None:
        with results.attempt("reduction"):
            PackingWatch().look(setup.known_task, batch, setup.kd.kd_reduction, now=True)
    if not fits:
        return None
    plan = make_plan(setup)
    model = trainer.model_wrapped if setup.sharded else trainer.model
    return Trial(inspection, setup, plan, model, setup.prepared())


def _look_closer(inspection: Inspection, setup: FirstBatch, results: Results) -> None:
    """Advice on a batch of a known task."""
    trainer, task, batch, student = inspection.trainer, setup.known_task, setup.batch, setup.student
    if task is None:
        return
    teacher_model, tokenizer = getattr(trainer.teacher, "model", None), trainer.processing_class
    objective, pad_id = inspection.objective(training=True)[0], advice.pad_id_of(tokenizer, student)

    def labels() -> list[CheckResult]:
        # On a GPU an index out of range ends the process.
        classes = None if has_errors(results.rows) else classes_of_logits(setup)
        return advice.about_labels(classes, task, objective, batch, pad_id)

    def columns() -> list[CheckResult]:
        accepted = accepted_inputs(
            student, label_names=trainer.label_names, withheld=inspection.setup.withheld_columns()
        )
        read = set(model_inputs(batch, accepted)) | (set(batch) & accepted.targets)
        if trainer.teacher is not None:
            read |= {name for name in batch if name.startswith(TEACHER_PREFIX)}
        for one in setup.each or (setup,):
            read |= set() if one.live is None else set(one.live.inputs(one.batch))
        kept = inspection.setup.kept_columns() if trainer.args.remove_unused_columns else None
        return advice.about_columns(trainer.train_dataset, kept, batch, read, pad_id)

    results.add("task", advice.about_settings, trainer.args, task, objective)
    results.add("labels", labels)
    results.add("lengths", advice.about_lengths, student, teacher_model, task, tokenizer, batch)
    results.add("images", advice.about_images, student, teacher_model, batch)
    results.add("columns", columns)


def _first_batch(trainer: Any) -> dict[str, Any]:
    batch = next(iter(batches(trainer.get_train_dataloader(), 1)), None)
    if batch is None:
        fail("train_dataset", "without a single batch", "rows", "Check how it is loaded and filtered.")
    return batch


@contextmanager
def _as_it_was(trainer: Any) -> Iterator[None]:
    """Afterwards random numbers and the student's modes, buffers, gradients and config are what they were, and
    upstream's list of prepared loaders."""
    student = trainer.unwrapped_student()
    gradients = [(p, p.grad) for p in student.parameters()]
    loaders = list(trainer.accelerator._dataloaders)
    config = getattr(student, "config", None)
    names = ["problem_type"] if hasattr(config, "problem_type") else []
    random_numbers = same_random_numbers(trainer.args.device)
    try:
        with random_numbers, unchanged_modes(student), unchanged_buffers(student), unchanged_attributes(config, *names):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        trainer.accelerator._dataloaders[:] = loaders
