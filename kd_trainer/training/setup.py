"""What is settled before the first step: the teacher, and on the first batch the plan of the loss.

For: `trainer.py`, whose mixin stands on the one here. Formulas and their counts are not its business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import Trainer

from ..cache import CachedTeacher
from ..tasks import (
    Accepted,
    Head,
    Heads,
    PackingWatch,
    check_required,
    classes_have_names,
    decoder_input_ids,
    head_for,
    required_inputs,
)
from ..teachers import ADAPTER_OFF, AdapterOffTeacher, LiveTeacher, check_separate, class_order, load_teacher
from ..validation import fail, quoted, warn
from .arguments import DistillationArguments
from .finite_watch import FiniteWatch
from .router_loss import notes_on_own_losses
from .settings import Settings
from .setup_checks import WITH_MODELS, WITHOUT_MODELS, Setup

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # at run time the mixin has no base of its own, so that it fits in front of any Trainer class
    _InFrontOf = Trainer
else:
    _InFrontOf = object


class Fit(NamedTuple):
    """The plan of the loss, made on the first batch; once for a student."""

    model: nn.Module  # `trainer.model` as it was when looked at: model_init makes a new one
    student: nn.Module  # the same, unwrapped
    head: Head
    accepted: Accepted  # names of the student's inputs
    common_ids: int | None = None  # ids that both vocabularies have, where they differ in size: see `compatibility`
    # Of student and teacher, where the loss needs no logits; the teacher's None where its outputs come from a cache.
    heads: Heads | None = None
    notes: tuple[str, ...] = ()  # lines for the start block
    known_by: str | None = None  # by what the tokens of both are known to be the same: see `compatibility`
    class_order: Tensor | None = None  # of a cache's classes, as `LiveTeacher.class_order`
    asked: bool = True  # whether the teacher was called; it is not where kd_alpha is 0, until an evaluation needs it
    own_loss: bool = False  # the hard loss is the model's own, or the script's compute_loss_func: see `own_loss`
    hard_loss: str = ""  # a line on where the hard loss comes from
    by_num_items: bool = False  # its sum is divided by upstream's num_items_in_batch: see `own_loss.HardLoss`
    required: frozenset[str] = frozenset()  # names of columns without which the student's forward cannot be called

    def takes_num_items(self, always_hard: bool) -> bool:
        """Whether upstream's num_items_in_batch divides the hard loss: one of the model's own, or, to be the stock
        Trainer with `kd_alpha` 0, a formula whose labels upstream counts otherwise."""
        return self.own_loss or (self.by_num_items and always_hard)


def plan(setup: Setup) -> Fit:
    """What the checks have found, for the loss; after all of them."""
    trainer, live, hard = setup.trainer, setup.live, setup.hard
    assert hard is not None and setup.accepted is not None  # noqa: PT018
    notes = [setup.vocabularies, setup.path, *notes_on_own_losses(setup.student)]
    if isinstance(live, AdapterOffTeacher):
        notes = ["the teacher is the student with its adapters off", *notes]
    if live is not None and live.start_tokens is not None:
        begins = "the decoder's inputs begin with token {} for the student and with its own {} for the teacher"
        notes.append(begins.format(*live.start_tokens))
    if not setup.asked and trainer.teacher is not None:
        notes.append("kd_alpha is 0: training does not call the teacher")
    if setup.heads is None and setup.path and not trainer.is_in_train:  # training prints all notes in its start block
        warn(logger, "[kd_trainer] %s", setup.path)
    return Fit(
        trainer.model, setup.student, setup.task, setup.accepted, setup.common_ids, setup.heads,
        tuple(filter(None, notes)), setup.known_by, setup.class_order, setup.asked, own_loss=hard.own,
        hard_loss=hard.line, by_num_items=hard.by_num_items, required=required_inputs(setup.student),
    )  # fmt: skip


class FirstLook(_InFrontOf):
    """Loads the teacher and looks at the first batch; `trainer.DistillationMixin` sets what is declared here."""

    _run_settings: Settings
    teacher: LiveTeacher | CachedTeacher | None
    _given_teacher: Any  # as it was given, by whichever argument
    _finite: FiniteWatch
    _packing: PackingWatch
    _fit: Fit | None
    _refused: list[Exception]
    _watch: Any = None  # the hook that compares buffers shared with the teacher
    _evaluation: Any  # None outside of an evaluation
    _predicting: bool

    @property
    def kd_args(self) -> DistillationArguments:
        """The `kd_*` and `teacher_*` arguments as they were last read."""
        return self._run_settings.kd

    @property
    def _always_hard(self) -> bool:
        return self._run_settings.always_hard

    def _is_training_step(self, student: nn.Module) -> bool:
        """Whether a loss is for a training step, whatever mode the student is in: it may stay in eval mode."""
        if self._evaluation is not None or self._predicting:
            return False
        # Outside of `train` and `evaluate` the mode is all there is to tell; a DeepSpeed engine's own is always True.
        return self.is_in_train or student.training

    def unwrapped_student(self) -> nn.Module:
        """The student without what processes and compilers put around it."""
        model = cast(nn.Module, self.model)
        # accelerate's own search reads the metadata of installed packages first, which costs more than a small step.
        wrapped = hasattr(model, "module") or hasattr(model, "_orig_mod")
        return self.accelerator.unwrap_model(model) if wrapped else model

    _student_columns: frozenset[str]  # those that upstream keeps
    _each_alone = False  # whether a process may stop at what it finds, so that the others must not wait: in `check()`

    @contextmanager
    def _refusals_wait(self) -> Iterator[None]:
        """With kd_run "check" a refusal of the constructor waits for the table of findings."""
        try:
            yield
        except (ValueError, TypeError) as refusal:
            if self.kd_args.kd_run != "check":
                raise
            self._refused.append(refusal)

    def _require_teacher(self, given: Any) -> None:
        self._run_settings.require_teacher(given)

    def _load_teacher(self, given: Any) -> LiveTeacher | CachedTeacher | None:
        kd, named = self.kd_args, self.kd_args.teacher_model_name_or_path
        if given is not None and named is not None and str(given) != named:
            expected = "nothing beside the argument teacher_model of the trainer"
            fail("teacher_model_name_or_path", repr(named), expected, "Give the teacher once.")
        self._given_teacher = given = named if given is None else given
        self._require_teacher(given)
        if isinstance(given, CachedTeacher):
            of_another = {"teacher_model_init_kwargs": kd.teacher_kwargs, "teacher_cache_dir": kd.teacher_cache_dir}
            for name, value in of_another.items():
                if value:
                    fail(name, quoted(value), "nothing with a CachedTeacher, which has all of it", "Leave it out.")
            return given
        if given is None:
            return None
        if self._cache_is_there():
            return CachedTeacher(str(kd.teacher_cache_dir))
        return self._load_live(given)

    def _cache_is_there(self) -> bool:
        """Whether a finished cache makes the live teacher unnecessary: see `teacher_cache.py`."""
        return False

    def _load_live(self, given: nn.Module | str | Path) -> LiveTeacher:
        kd = self.kd_args
        student = self.unwrapped_student()
        head = head_for(student, kd.kd_task, self._loss_shifts_labels)
        if isinstance(given, str) and given == ADAPTER_OFF:
            of_another = {"teacher_model_init_kwargs": kd.teacher_kwargs, "teacher_compile": kd.teacher_compile}
            for name, value in of_another.items():
                if value:
                    because = "the teacher is the student's own base"
                    fail(name, quoted(value), f"nothing with the teacher {given!r}", "Leave it out.", because=because)
            return AdapterOffTeacher(student, over_tokens=head is not None and head.over_tokens)
        teacher = load_teacher(given, student, kd.teacher_kwargs)
        check_separate(student, teacher)
        live = LiveTeacher(teacher, compiled=kd.teacher_compile)
        if classes_have_names(student, head):
            with self._refusals_wait():
                live.class_order = class_order(student, teacher, remap=kd.kd_remap_labels)
        return live

    def _look_at(self, batch: Mapping[str, Any]) -> Fit:
        """Runs the checks of `setup_checks` on the first batch, up to the first refusal; afterwards returns the plan
        that came of them."""
        fit = self._fit if self._fit is not None and self._fit.model is self.model else None
        if fit is not None and (fit.asked or (self._always_hard and self._is_training_step(fit.student))):
            if not fit.required <= batch.keys():
                check_required("student", fit.student, batch, self._removed_columns)
            return fit
        setup = Setup(self, batch)
        for _, check in (*WITHOUT_MODELS, *WITH_MODELS):
            check(setup)
        self._fit = plan(setup)
        return self._fit

    def _removed_columns(self) -> list[str]:
        """Columns of the data that upstream removes."""
        kept: set[str] = set(self._signature_columns or ())
        return sorted(self._data_columns() - kept) if self.args.remove_unused_columns else []

    def _withheld_columns(self) -> set[str]:
        """Columns of the data that upstream removes and that stay for the teacher: `**kwargs` do not get them."""
        if not self.args.remove_unused_columns:
            return set()
        self._set_signature_columns_if_needed()
        return (set(self._signature_columns or ()) - self._student_columns) & self._data_columns()

    def _data_columns(self) -> set[str]:
        evals = self.eval_dataset
        names: set[str] = set()
        for dataset in (self.train_dataset, *(evals.values() if isinstance(evals, dict) else (evals,))):
            known = getattr(dataset, "column_names", None)
            if known is None and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
                row = dataset[0]
                known = list(row) if isinstance(row, Mapping) else None
            names |= set(known or ())
        return names

    @staticmethod
    def _with_decoder_inputs(student: nn.Module, head: Head | None, inputs: dict[str, Any]) -> dict[str, Any]:
        """Encoder-decoders build their decoder's inputs from labels: built once here, for both models."""
        if head is None or not head.encoder_decoder or "decoder_input_ids" in inputs or inputs.get("labels") is None:
            return inputs
        ids = decoder_input_ids(student, inputs["labels"])
        return inputs if ids is None else {**inputs, "decoder_input_ids": ids}

    def _refuse_packed(self, head: Head, batch: Mapping[str, Any], *, now: bool = False) -> None:
        """Raises where "batchmean" would divide by rows of several sequences: see `PackingWatch`."""
        self._packing.look(head, batch, self.kd_args.kd_reduction, now=now)
