"""`trainer.check()`: every check of a setup, advice on it, and one batch through both models, as a table.

For: `trainer.py`. Nothing is trained; afterwards everything is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from ..cache import CachedTeacher
from ..tasks import (
    TEACHER_PREFIX,
    accepted_inputs,
    classes_have_names,
    head_for,
    model_inputs,
    same_random_numbers,
    unchanged_buffers,
    unchanged_modes,
)
from ..teachers import AdapterOffTeacher, LiveTeacher, class_names, match_classes
from ..training import (
    WITH_MODELS,
    WITHOUT_MODELS,
    FiniteWatch,
    Setup,
    classes_of_cache,
    classes_of_logits,
    is_sharded,
    plan,
    tokens,
)
from ..validation import fail
from . import advice as advice
from .findings import Finding, Findings, has_errors, refused, warning
from .trial import Trial, batches, run


def examine(trainer: Any, *, evaluate: bool = True, batch: Mapping[str, Any] | None = None) -> list[Finding]:
    """All findings, the same list on every process; every process must call it.

    Args:
        trainer: a `DistillationMixin`.
        evaluate: whether the teacher is measured on the evaluation data.
        batch: the first batch of training; None takes it from the trainer's own loader.
    """
    with _as_it_was(trainer):
        findings = Findings(trainer)
        findings.rows += [refused("setup", refusal) for refusal in trainer._refused]
        _look_at_models(trainer, findings)
        if batch is None:
            with findings.attempt("data"):
                batch = _first_batch(trainer)
        trial = None
        if findings.everywhere(batch is not None):
            trial = _look_at_batch(trainer, findings, cast(Mapping, batch))
        if findings.everywhere(trial is not None):
            run(cast(Trial, trial), findings, evaluate)
        return findings.of_all_processes()


def _look_at_models(trainer: Any, findings: Findings) -> None:
    student, teacher, args = trainer.unwrapped_student(), trainer.teacher, trainer.args
    with findings.attempt("settings"):
        trainer._run_settings.read(trainer.args)
        if not trainer._refused:  # else the teacher is missing for a reason that is told already
            trainer._require_teacher(teacher)
    with findings.attempt("student"):
        findings.rows += advice.about_student(student, fp16=args.fp16)
    with findings.attempt("teacher"):
        mixed, called = trainer.accelerator.mixed_precision != "no", not trainer._always_hard
        findings.rows += advice.about_teacher(teacher, student, args.device, called=called, mixed=mixed)
    kd, head = trainer.kd_args, head_for(student, trainer.kd_args.kd_task, trainer._loss_shifts_labels)
    with findings.attempt("classes"):
        if isinstance(teacher, CachedTeacher) and teacher.manifest["labels"]:
            names = {int(i): name for i, name in teacher.manifest["labels"].items()}
            matched = classes_of_cache(student, teacher, remap=kd.kd_remap_labels)
            findings.rows += advice.about_classes(class_names(student), names, matched)
        elif _has_own_weights(teacher) and classes_have_names(student, head):
            both = class_names(student), class_names(teacher.model)
            findings.rows += advice.about_classes(*both, match_classes(*both, remap=kd.kd_remap_labels))


def _look_at_batch(trainer: Any, findings: Findings, batch: Mapping[str, Any]) -> Trial | None:
    """The list of checks, and what else the batch tells; None where the models could not be run on it."""
    setup, before = Setup(trainer, batch), len(findings.rows)
    passed = {check: findings.passes(what, partial(check, setup)) for what, check in WITHOUT_MODELS}
    if passed[tokens] and _has_own_weights(trainer.teacher):
        findings.rows += advice.about_tokens(batch, setup.known_by)
    with findings.attempt("student's tokens"):
        advice.check_student_ids(setup.student, batch)
    _look_closer(setup, findings)
    if is_sharded(trainer) and not trainer.is_in_train:
        mend = 'Set {"kd_run": "check"}: trainer.train() then checks with the student as training shards it.'
        findings.rows.append(warning("loss", "the models were not run: the student is not sharded yet", mend))
        return None
    # On a GPU an index out of range ends the process.
    fits = findings.everywhere(all(passed.values()) and not has_errors(findings.rows[before:]))
    fits = fits and all(findings.passes(what, partial(check, setup)) for what, check in WITH_MODELS)
    if fits and setup.head_by_logits:
        _look_closer(setup, findings)
    if setup.head is not None:
        with findings.attempt("reduction"):
            trainer._refuse_packed(setup.head, batch, now=True)
    if not fits:
        return None
    trainer._fit = plan(setup)
    return Trial(setup, trainer._fit, trainer.model_wrapped if setup.sharded else trainer.model, setup.prepared())


def _has_own_weights(teacher: Any) -> bool:
    """Whether the teacher is run, and is no part of the student."""
    return isinstance(teacher, LiveTeacher) and not isinstance(teacher, AdapterOffTeacher)


def _look_closer(setup: Setup, findings: Findings) -> None:
    """What is suspicious in a batch of a known task, and not always wrong."""
    trainer, head, batch, student = setup.trainer, setup.head, setup.batch, setup.student
    if head is None:
        return
    teacher_model, tokenizer = trainer._teacher_module(), trainer.processing_class
    objective, pad_id = trainer._objective(training=True)[0], advice.pad_id_of(tokenizer, student)

    def labels() -> list[Finding]:
        # On a GPU an index out of range ends the process.
        classes = None if has_errors(findings.rows) else classes_of_logits(setup)
        return advice.about_labels(classes, head, objective, batch, pad_id)

    def columns() -> list[Finding]:
        accepted = accepted_inputs(student, label_names=trainer.label_names, withheld=trainer._withheld_columns())
        read = set(model_inputs(batch, accepted)) | (set(batch) & accepted.targets)
        if trainer.teacher is not None:
            read |= {name for name in batch if name.startswith(TEACHER_PREFIX)}
        if setup.live is not None:
            read |= set(setup.live.inputs(batch))
        kept = trainer._signature_columns if trainer.args.remove_unused_columns else None
        return advice.about_columns(trainer.train_dataset, kept, batch, read, pad_id)

    looks: dict[str, Callable[[], list[Finding]]] = {
        "task": lambda: advice.about_settings(trainer.args, head, objective),
        "labels": labels,
        "lengths": lambda: advice.about_lengths(student, teacher_model, head, tokenizer, batch),
        "images": lambda: advice.about_images(student, teacher_model, batch),
        "columns": columns,
    }
    for what, look in looks.items():
        with findings.attempt(what):
            findings.rows += look()


def _first_batch(trainer: Any) -> dict[str, Any]:
    batch = next(iter(batches(trainer, trainer.get_train_dataloader(), 1)), None)
    if batch is None:
        fail("train_dataset", "without a single batch", "rows", "Check how it is loaded and filtered.")
    return batch


@contextmanager
def _as_it_was(trainer: Any) -> Iterator[None]:
    """Afterwards the student's buffers, gradients and modes, the random numbers and the trainer are what they were."""
    student = trainer.unwrapped_student()
    gradients = [(p, p.grad) for p in student.parameters()]
    lent = ("_fit", "_window", "_finite", "_packing", "_evaluation", "_each_alone", "teacher")
    kept = {name: getattr(trainer, name) for name in lent}
    problem_type = getattr(getattr(student, "config", None), "problem_type", None)
    loaders = list(trainer.accelerator._dataloaders)
    mode = "off" if trainer._finite.mode == "off" else "step"
    trainer._each_alone = not is_sharded(trainer)
    trainer._finite = FiniteWatch(mode, trainer.args.process_index)
    try:
        with same_random_numbers(trainer.args.device), unchanged_modes(student), unchanged_buffers(student):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        if hasattr(getattr(student, "config", None), "problem_type"):
            student.config.problem_type = problem_type
        trainer.accelerator._dataloaders[:] = loaders
        for name, value in kept.items():
            setattr(trainer, name, value)
