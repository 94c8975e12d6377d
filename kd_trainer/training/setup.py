"""`Setup`: loads the teacher before the first step, and makes the plan of the loss on the first batch.

For: `trainer.py` and `teacher_cache.py`. Formulas and counts are in `objective.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from ..cache import CachedTeacher, ServerTeacher, as_cached_teacher, as_server_teacher
from ..tasks import (
    Accepted,
    Heads,
    Task,
    UnsupportedHead,
    check_required,
    classes_have_names,
    full_logits,
    required_inputs,
    task_for,
)
from ..teachers import (
    ADAPTER_OFF,
    AdapterOffTeacher,
    LiveTeacher,
    SeveralTeachers,
    Teacher,
    check_separate,
    class_order,
    load_teacher,
    naming,
)
from ..validation import fail, quoted, warn
from .arguments import DistillationArguments
from .settings import Settings, pooling_of
from .setup_checks import WITH_MODELS, WITHOUT_MODELS, FirstBatch
from .terms import notes_on_own_losses

logger = logging.getLogger(__name__)


class Plan(NamedTuple):
    """The plan of the loss, made on the first batch; once for a student and a teacher."""

    model: nn.Module  # `trainer.model` when the plan was made: model_init makes a new one
    student: nn.Module  # the same, unwrapped
    teacher: Teacher | None
    task: Task
    accepted: Accepted  # names of the student's inputs
    common_ids: int | None = None  # ids that both vocabularies have, where they differ in size: see `compatibility`
    # Of student and teacher, where the loss needs no logits; the teacher's None where its outputs come from a cache.
    heads: Heads | None = None
    notes: tuple[str, ...] = ()  # lines for the start block
    known_by: str | None = None  # by what the tokens of both are known to be the same: see `compatibility`
    class_order: Tensor | None = None  # of a cache's classes, as `LiveTeacher.class_order`
    teacher_called: bool = (
        True  # whether the teacher was called; it is not where kd_alpha is 0, until an evaluation needs it
    )
    own_loss: bool = False  # the hard loss is the model's own, or the script's compute_loss_func: see `own_loss`
    hard_loss: str = ""  # a line on where the hard loss comes from
    by_num_items: bool = False  # its sum is divided by upstream's num_items_in_batch: see `own_loss.HardLoss`
    required: frozenset[str] = frozenset()  # names of columns without which the student's forward cannot be called
    implementation: str = "auto"  # `kd_loss_implementation`

    def takes_num_items(self, always_hard: bool) -> bool:
        """Whether upstream's num_items_in_batch divides the hard loss: one of the model's own, or, to be the stock
        Trainer with `kd_alpha` 0, a formula whose labels upstream counts otherwise."""
        return self.own_loss or (self.by_num_items and always_hard)

    def with_full_logits(self, reason: UnsupportedHead) -> Plan:
        """The plan without output heads, where a head does more than is known."""
        line = full_logits(reason, self.implementation)
        warn(logger, "[kd_trainer] %s", line)
        return self._replace(heads=None, notes=(*self.notes, line))


def make_plan(first: FirstBatch) -> Plan:
    """The plan of the loss, from what all checks have found."""
    trainer, teacher, hard = first.trainer, first.teacher, first.hard
    assert hard is not None and first.accepted is not None  # noqa: PT018
    notes = [
        *first.task.notes(first.student, teacher),
        first.vocabularies,
        first.path,
        *first.terms,
        *notes_on_own_losses(first.student),
    ]
    if teacher is not None:
        notes = [teacher.note, *notes]
    if teacher is not None and teacher.start_tokens is not None:
        begins = "the decoder's inputs begin with token {} for the student and with its own {} for the teacher"
        notes.append(begins.format(*teacher.start_tokens))
    if not first.teacher_called and teacher is not None:
        notes.append("kd_alpha is 0: training does not call the teacher")
    if first.heads is None and first.path and not trainer.is_in_train:  # training prints all notes in its start block
        warn(logger, "[kd_trainer] %s", first.path)
    return Plan(
        trainer.model, first.student, teacher, first.task, first.accepted, first.common_ids, first.heads,
        tuple(filter(None, notes)), first.known_by, first.class_order, first.teacher_called, own_loss=hard.own,
        hard_loss=hard.line, by_num_items=hard.by_num_items, required=required_inputs(first.student),
        implementation=first.kd.kd_loss_implementation,
    )  # fmt: skip


class Setup:
    """Loads the teacher, and makes the plan of the loss on the first batch.

    Args:
        trainer: its arguments, accelerator, models and data are read; nothing of it is set.
        settings: the distillation arguments of that trainer.
        is_training_step: whether a loss of this student is for a training step now.

    Attributes:
        refused: with `kd_run` "check", the errors of the constructor, which wait for the table.
        each_alone: whether a process may stop alone, so that the others do not wait for it: in `check()`.
    """

    def __init__(self, trainer: Any, settings: Settings, is_training_step: Callable[[nn.Module], bool]) -> None:
        self._trainer, self._settings, self._is_training_step = trainer, settings, is_training_step
        self._watches: list[Any] = []  # hooks that compare buffers shared with a teacher
        self.refused: list[Exception] = []
        self.each_alone = False

    @property
    def kd(self) -> DistillationArguments:
        """The distillation arguments as they were last read."""
        return self._settings.kd

    @contextmanager
    def refusals_wait(self) -> Iterator[None]:
        """With kd_run "check" an error inside waits for the table of results."""
        try:
            yield
        except (ValueError, TypeError) as refusal:
            if self.kd.kd_run != "check":
                raise
            self.refused.append(refusal)

    # ---- the teacher ----

    def named_teacher(self, given: Any) -> Any:
        """The teacher as it was given: by the argument of the trainer, `teacher_model_name_or_path` or
        `teacher_server_url`."""
        kd, named = self.kd, self.kd.teacher_model_name_or_path
        if kd.teacher_server_url is not None:
            others = {"teacher_model": given, "teacher_model_name_or_path": named}
            others |= {"teacher_model_init_kwargs": kd.teacher_model_init_kwargs, "teacher_compile": kd.teacher_compile}
            for name, value in others.items():
                if value is not None and value != {} and value is not False:
                    shown = (
                        quoted(value)
                        if isinstance(value, (str, list, dict, bool))
                        else f"of type {type(value).__name__}"
                    )
                    fail(name, shown, "nothing beside teacher_server_url", "Give the teacher once.")
            return ServerTeacher(
                kd.teacher_server_url, str(kd.teacher_server_model), timeout=kd.teacher_server_timeout,
                retries=kd.teacher_server_retries, concurrency=kd.teacher_server_concurrency,
            )  # fmt: skip
        given = list(given) if isinstance(given, tuple) else given
        if given is not None and named is not None and given != named and str(given) != named:
            expected = "nothing beside the argument teacher_model of the trainer"
            fail("teacher_model_name_or_path", repr(named), expected, "Give the teacher once.")
        return named if given is None else given

    def load(self, given: Any, finished_cache: Callable[[], CachedTeacher | None]) -> Teacher | None:
        """The teacher of what was given; `finished_cache` may make a live one unnecessary."""
        kd = self.kd
        self._settings.require_teacher(given)
        if isinstance(given, list):
            self._check_several(given)
            return finished_cache() or self._load_several(given)
        for name, given_list in (("teacher_weights", kd.teacher_weights), ("teacher_names", kd.teacher_names)):
            if given_list is not None:
                fail(
                    name,
                    quoted(given_list),
                    "nothing with a single teacher",
                    "Leave it out, or give a list of teachers.",
                )
        cached = as_cached_teacher(given)
        if cached is not None:
            of_another = {"teacher_model_init_kwargs": kd.teacher_kwargs, "teacher_cache_dir": kd.teacher_cache_dir}
            for name, value in of_another.items():
                if value:
                    fail(name, quoted(value), "nothing with a CachedTeacher, which has all of it", "Leave it out.")
            return cached
        if given is None:
            return None
        cached = finished_cache()
        if cached is not None:
            return cached
        if (server := as_server_teacher(given)) is None:
            return self.load_live(given)
        if kd.kd_run != "cache":
            expected = f"None with kd_run {kd.kd_run!r} as long as the cache in teacher_cache_dir is unfinished"
            fix = "Run once with kd_run cache; then this run reads the cache."
            fail("teacher_server_url", repr(server.url), expected, fix)
        return server

    def load_run(self, given: Any) -> Any:
        """What is run: a `LiveTeacher`, or `SeveralTeachers`."""
        return self._load_several(given) if isinstance(given, list) else self.load_live(given)

    def _check_several(self, given: list[Any]) -> None:
        kd, kwargs = self.kd, self.kd.teacher_model_init_kwargs
        if len(given) < 2:
            fail("teacher_model", f"a list of {len(given)}", "two teachers or more", "Give a single teacher alone.")
        if kd.teacher_cache_dir is not None and any(as_cached_teacher(each) is not None for each in given):
            expected, fix = "None with a CachedTeacher among the teachers", "Leave it out: caches are read as they are."
            fail("teacher_cache_dir", repr(kd.teacher_cache_dir), expected, fix)
        for name, value in (("teacher_weights", kd.teacher_weights), ("teacher_names", kd.teacher_names)):
            if value is not None and len(cast(Any, value)) != len(given):
                expected = f"{len(given)} values, one for each teacher"
                fail(name, quoted(value), expected, "Give one for each teacher.")
        if isinstance(kwargs, list) and len(kwargs) != len(given):
            expected, fix = f"{len(given)} objects, one for each teacher", "Write {} for a teacher that needs none."
            fail("teacher_model_init_kwargs", quoted(kwargs), expected, fix)
        by_path = [isinstance(each, (str, Path)) and each != ADAPTER_OFF for each in given]
        if kwargs and not isinstance(kwargs, list) and not any(by_path):
            fix = "Leave it out."
            fail("teacher_model_init_kwargs", quoted(kwargs), "nothing where no teacher is given by path", fix)

    def _load_several(self, given: list[Any]) -> Teacher:
        """Each teacher of a list; a module that stands there twice is run as one teacher with two weights."""
        kd, kwargs = self.kd, self.kd.teacher_model_init_kwargs
        by_path = [isinstance(each, (str, Path)) and each != ADAPTER_OFF for each in given]
        loaded: dict[int, Teacher] = {}
        for index, each in enumerate(given):
            # One object for all is for those that are given by path.
            own = kd.teacher_kwargs_of(index) if by_path[index] or isinstance(kwargs, list) else {}
            cached, key = as_cached_teacher(each), index if by_path[index] else id(each)
            if cached is not None and own:
                fail("teacher_model_init_kwargs", quoted(own), "nothing for a CachedTeacher", "Write {} for it.")
            if key not in loaded:
                with naming(index):
                    loaded[key] = self.load_live(each, own, index) if cached is None else cached
        members = [loaded[index if by_path[index] else id(each)] for index, each in enumerate(given)]
        return SeveralTeachers(members, cast(Any, kd.teacher_weights), cast(Any, kd.teacher_names))

    def load_live(
        self, given: nn.Module | str | Path, init_kwargs: dict[str, Any] | None = None, index: int | None = None
    ) -> LiveTeacher:
        """The teacher that is run: a module, a path, or the student's own base.

        Args:
            init_kwargs: of its from_pretrained; None: of the arguments. index: of it among several.
        """
        kd, student = self.kd, self._trainer.unwrapped_student()
        init_kwargs = kd.teacher_kwargs if init_kwargs is None else init_kwargs
        compiled = kd.teacher_compile
        task = task_for(student, kd.kd_task, self._trainer._loss_shifts_labels)
        if isinstance(given, str) and given == ADAPTER_OFF:
            compiled = compiled and index is None  # of several it is for the others
            of_another = {"teacher_model_init_kwargs": init_kwargs, "teacher_compile": compiled}
            for name, value in of_another.items():
                if value:
                    because = "the teacher is the student's own base"
                    fail(name, quoted(value), f"nothing with the teacher {given!r}", "Leave it out.", because=because)
            if task is not None and task.embeds:
                because = "its embeddings are the student's as it starts"
                shown, fix = repr(ADAPTER_OFF), "Give a larger model as the teacher."
                fail("teacher_model", shown, f"a model for the task {task.name!r}", fix, because=because)
            return AdapterOffTeacher(student, over_tokens=task is not None and task.over_tokens)
        if task is not None:
            task = task.with_settings(kd, student, None)
        teacher = load_teacher(given, student, init_kwargs, task)
        check_separate(student, teacher)
        live = LiveTeacher(teacher, compiled=compiled)
        if classes_have_names(student, task):
            with self.refusals_wait(), naming(index):
                live.class_order = class_order(student, teacher, remap=kd.kd_remap_labels)
        return live

    def task(self, teacher: Teacher | None) -> Task | None:
        """The student's task without a batch, where its class tells it."""
        kd, student = self.kd, self._trainer.unwrapped_student()
        task = None if teacher is None else task_for(student, kd.kd_task, self._trainer._loss_shifts_labels)
        return None if task is None else task.with_settings(kd, student, pooling_of(teacher))

    # ---- the plan ----

    def plan(self, batch: Mapping[str, Any], teacher: Teacher | None, known: Plan | None) -> Plan:
        """Runs the checks of `setup_checks` on the first batch, up to the first error, and returns their plan;
        afterwards the known plan, as long as student and teacher are its own."""
        if known is not None and self._holds(known, teacher):
            if not known.required <= batch.keys():
                check_required("student", known.student, batch, self.removed_columns)
            return known
        first = self.first_batch(batch, teacher)
        for _, check in (*WITHOUT_MODELS, *WITH_MODELS):
            check(first)
        return make_plan(first)

    def _holds(self, known: Plan, teacher: Teacher | None) -> bool:
        if known.model is not self._trainer.model or known.teacher is not teacher:
            return False
        return known.teacher_called or (self._settings.always_hard and self._is_training_step(known.student))

    def first_batch(self, batch: Mapping[str, Any], teacher: Teacher | None) -> FirstBatch:
        """What the checks take: the trainer with a batch, of which nothing is known yet."""
        student = self._trainer.unwrapped_student()
        # Where kd_alpha is 0 training does not call the teacher.
        teacher_called = not (self._settings.always_hard and self._is_training_step(student))
        return FirstBatch(self._trainer, self._settings, self, batch, student, teacher, teacher_called)

    def watch_buffers(self, watch: Callable[[], Any] | None) -> None:
        """A further hook that compares the buffers shared with a teacher; None removes all."""
        if watch is not None:
            self._watches.append(watch())
            return
        for hook in filter(None, self._watches):
            hook.remove()
        self._watches = []

    # ---- columns ----

    def kept_columns(self) -> list[str] | None:
        """Columns that upstream keeps where it removes others; None before it has a list."""
        kept: list[str] | None = self._trainer._signature_columns
        return kept

    def removed_columns(self) -> list[str]:
        """Columns of the data that upstream removes."""
        kept = set(self.kept_columns() or ())
        return sorted(self._data_columns() - kept) if self._trainer.args.remove_unused_columns else []

    def withheld_columns(self) -> set[str]:
        """Columns of the data that upstream removes and that stay for the teacher: `**kwargs` do not get them."""
        if not self._trainer.args.remove_unused_columns:
            return set()
        return self._trainer.columns_for_teacher() & self._data_columns()

    def _data_columns(self) -> set[str]:
        evals = self._trainer.eval_dataset
        names: set[str] = set()
        for dataset in (self._trainer.train_dataset, *(evals.values() if isinstance(evals, dict) else (evals,))):
            known = getattr(dataset, "column_names", None)
            if known is None and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
                row = dataset[0]
                known = list(row) if isinstance(row, Mapping) else None
            names |= set(known or ())
        return names
