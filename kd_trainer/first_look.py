"""What is settled before the first step: the teacher, and on the first batch how it, the student and the task fit.

For: `trainer.py`, whose mixin stands on the one here. Formulas and their counts are not its business.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from .backends import reshard
from .cache import CachedTeacher
from .cache_identity import tokenizer_identity
from .cache_manifest import head_of
from .checks import fail, quoted, warn
from .compatibility import (
    Classes,
    check_same_tokens,
    check_teacher_columns,
    class_names,
    class_order,
    common_ids,
    match_classes,
    vocabulary_line,
    warned,
)
from .finite import FiniteWatch
from .fused_forward import NotPlain, OutputHead, few_products
from .head import Head
from .head_choice import CLASSIFICATIONS, by_problem_type, check_virtual_tokens, head_for, head_from_logits
from .inputs import (
    TEACHER_PREFIX,
    Accepted,
    accepted_inputs,
    check_batch,
    decoder_input_ids,
    is_packed,
    model_inputs,
    required_inputs,
    start_token,
    text_config,
    vocabulary_rows,
)
from .logits import AmbiguousOutputs, Wanted, logits_of, widths_of
from .own_loss import Comparison, HardLoss
from .reductions import bad_rows
from .router import check_router, notes_on_own_losses, router_weight
from .shared_memory import check_separate, watch_shared_buffers
from .teacher import ADAPTER_OFF, AdapterOffTeacher, LiveTeacher, load_teacher
from .teacher_errors import check_ids, check_padding
from .training_args import DistillationArguments

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # at run time the mixin has no base of its own, so that it fits in front of any Trainer class
    _InFrontOf = Trainer
else:
    _InFrontOf = object

# Below it "auto" takes full logits: they cost little, and the fused loss has more calls.
SMALL_VOCABULARY = 2048


def classes_of(student: nn.Module, head: Head) -> int | None:
    """How many classes the student's logits have: of a vocabulary by its layer, else as its config counts them, which
    need not be true."""
    if head.over_tokens:
        return vocabulary_rows(student, written=True, measured=True)
    if head.name not in CLASSIFICATIONS:  # num_labels says nothing of choices or of positions
        return None
    classes = getattr(getattr(student, "config", None), "num_labels", None)
    return classes if isinstance(classes, int) else None


def classes_have_names(student: nn.Module, head: Head | None) -> bool:
    """Whether class i of the teacher must mean class i of the student by name; `head`: None where not yet known."""
    config: Any = getattr(student, "config", None)
    numbers = getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", None) == 1
    return not numbers and (head is None or head.name in CLASSIFICATIONS)


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Afterwards all random numbers go on as if nothing had been drawn inside."""
    ours, numpys = random.getstate(), np.random.get_state()
    devices = [] if device.type in ("cpu", "mps") else [device]
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


@contextmanager
def as_in_training(student: nn.Module) -> Iterator[None]:
    """The student in training mode; afterwards its modes and buffers are what they were."""
    modes = {module: module.training for module in student.modules()}
    try:
        with unchanged_buffers(student):
            student.train()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Afterwards the model has the buffers that it had, with the same values."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            buffer.detach().copy_(value)


class Fit(NamedTuple):
    """What the first batch told about the models; made once for a student."""

    model: nn.Module  # `trainer.model` as it was when looked at: model_init makes a new one
    student: nn.Module  # the same, unwrapped
    head: Head
    accepted: Accepted  # names of the student's inputs
    common_ids: int | None = None  # ids that both vocabularies have, where they differ in size: see `compatibility`
    # Of student and teacher, where the loss needs no logits; the teacher's None where its outputs come from a cache.
    heads: tuple[OutputHead, OutputHead | None] | None = None
    notes: tuple[str, ...] = ()  # lines for the start block
    known_by: str | None = None  # by what the tokens of both are known to be the same: see `compatibility`
    class_order: Tensor | None = None  # of a cache's classes, as `LiveTeacher.class_order`
    asked: bool = True  # whether the teacher was called; it is not where kd_alpha is 0, until an evaluation needs it
    own_loss: bool = False  # the hard loss is the model's own, or the script's compute_loss_func: see `own_loss`
    hard_loss: str = ""  # a line on where the hard loss comes from
    by_num_items: bool = False  # its sum is divided by upstream's num_items_in_batch: see `own_loss.HardLoss`
    required: frozenset[str] = frozenset()  # names of columns without which the student's forward cannot be called


class FirstLook(_InFrontOf):
    """Loads the teacher and looks at the first batch; `trainer.DistillationMixin` sets what is declared here."""

    kd_args: DistillationArguments
    teacher: LiveTeacher | CachedTeacher | None
    _given_teacher: Any  # as it was given, by whichever argument
    _always_hard: bool
    _finite: FiniteWatch
    _packing: PackingWatch
    _fit: Fit | None
    _refused: list[Exception]
    _watch: Any = None  # the hook that compares buffers shared with the teacher
    _evaluation: Any  # None outside of an evaluation
    _predicting: bool

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
        if given is None and not self._always_hard:
            mend = "Pass teacher_model= to the trainer, set teacher_model_name_or_path, or set kd_alpha to 0."
            fail("teacher_model", None, f"a teacher, with kd_alpha {self.kd_args.kd_alpha:g}", mend)

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
        """Whether a finished cache makes the live teacher unnecessary: see `offline.py`."""
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
        """Fits teacher, student and head together on the first batch; afterwards returns what it found."""
        fit = self._fit if self._fit is not None and self._fit.model is self.model else None
        if fit is not None and (fit.asked or (self._always_hard and self._is_training_step(fit.student))):
            if not fit.required <= batch.keys():
                self._check_columns("model", fit.student, batch)
            return fit
        check_batch(batch)
        student = self.unwrapped_student()
        check_router(student)
        self._check_columns("model", student, batch)
        if isinstance(self.teacher, LiveTeacher) and not self._always_hard:
            self._check_columns("teacher_model", self.teacher.model, self.teacher.inputs(batch))
        head = head_for(student, self.kd_args.kd_task, self._loss_shifts_labels)
        if head is not None:
            head = by_problem_type(head, student, self.kd_args.kd_task, batch.get("labels"))
        teacher_logits = known_by = None
        if isinstance(self.teacher, AdapterOffTeacher) and self.teacher.model is not student:  # from model_init
            self.teacher = AdapterOffTeacher(student, over_tokens=head is not None and head.over_tokens)
        asked = not (self._always_hard and self._is_training_step(student))
        if isinstance(self.teacher, LiveTeacher):
            self._check_memory(student, self.teacher)
            if asked:
                self.teacher.prepare(self.args.device, self.accelerator)
            known_by = self._check_tokens(student, self.teacher, head, batch)
        theirs: int | None = None
        order: Tensor | None = None
        wanted = self._wanted(student, head, batch)
        if isinstance(self.teacher, CachedTeacher):
            head, theirs, known_by = self._check_cached(student, self.teacher, head)
            order = self._classes_of_cache(student, self.teacher, warned).order
        heads, heads_notes = self._output_heads(student, head)
        if asked and (isinstance(self.teacher, LiveTeacher) or (head is None and self.teacher is None)):
            batch = self._with_decoder_inputs(student, head, self._prepare_inputs(dict(batch)))
            try:
                teacher_logits = self._probe(batch, None if heads is None else heads[1], wanted, head)
            except NotPlain as reason:
                heads, heads_notes = None, (self._full_logits(reason),)
                teacher_logits = self._probe(batch, None, wanted, head)
        if head is None and teacher_logits is None:
            dims = getattr(batch.get("labels"), "dim", lambda: 1)()
            head = head_for(student, "classification" if dims == 1 else "token_classification", False)
        head = head_from_logits(teacher_logits) if head is None else head  # type: ignore[arg-type]
        head = head.with_label_names(self.label_names, batch)
        if teacher_logits is not None and not head.over_tokens:
            wanted = wanted._replace(widths=(teacher_logits.shape[-1],))
        head = dataclasses.replace(head, widths=wanted.widths, at_least=wanted.at_least)
        self._check_settings(head)
        check_virtual_tokens(student, head, "model")
        if isinstance(self.teacher, LiveTeacher):
            check_virtual_tokens(self.teacher.model, head, "teacher_model")
        targets, classes = head.targets(batch), classes_of(student, head)
        shared: int | None = None
        notes: tuple[str, ...] = ()
        if isinstance(self.teacher, AdapterOffTeacher):
            notes = ("the teacher is the student with its adapters off",)
        if teacher_logits is not None:  # as many as the student's, or `check_shapes` says so
            theirs = teacher_logits.shape[-1]
        if theirs is not None:
            classes = theirs if classes is None else classes
            if head.over_tokens and classes != theirs:
                shared = common_ids(classes, theirs, known_by)
                notes = (vocabulary_line(classes, theirs, known_by),)
        with self._stop_together():
            if targets is not None:
                self._check_first_labels(student, head, batch, targets, theirs)
        model = cast(nn.Module, self.model)
        accepted = accepted_inputs(student, label_names=self.label_names, withheld=self._withheld_columns())
        hard = self._whose_hard_loss(student, head, batch, accepted)
        head = hard.head
        if hard.labels_are_inputs:
            accepted = accepted.with_names(self.label_names)
        if heads is not None and (hard.own or hard.labels_are_inputs):
            cause = "the hard loss is the model's own" if hard.own else "the model makes its logits of the labels too"
            heads, heads_notes = None, (self._full_logits(NotPlain(cause)),)
        notes = (*notes, *heads_notes, *notes_on_own_losses(student))
        if isinstance(self.teacher, LiveTeacher) and self.teacher.start_tokens is not None:
            begins = "the decoder's inputs begin with token {} for the student and with its own {} for the teacher"
            notes = (*notes, begins.format(*self.teacher.start_tokens))
        if not asked and self.teacher is not None:
            notes = (*notes, "kd_alpha is 0: training does not call the teacher")
        self._fit = Fit(
            model, student, head, accepted, shared, heads, notes, known_by, order, asked, own_loss=hard.own,
            hard_loss=hard.line, by_num_items=hard.by_num_items, required=required_inputs(student),
        )  # fmt: skip
        if heads is None and not self.is_in_train:  # training prints all notes in its start block
            for note in heads_notes:
                warn(logger, "[kd_trainer] %s", note)
        return self._fit

    def _check_columns(self, argument: str, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Raises ValueError where a batch lacks a column without which the model's forward cannot be called."""
        missing = sorted(required_inputs(model) - batch.keys())
        if not missing:
            return
        removed: list[str] = []
        if self.args.remove_unused_columns:
            datasets = (self.train_dataset, self.eval_dataset)
            known = [getattr(dataset, "column_names", None) for dataset in datasets]
            names = {name for columns in known if isinstance(columns, list) for name in columns}
            removed = sorted(names - set(self._signature_columns or []))
        there = ", ".join(name for name in batch if not name.startswith(TEACHER_PREFIX)) or "none"
        fix = f"Call that column {missing[0]!r} in the dataset, or in what the data collator returns."
        if removed:
            lost = ", ".join(map(repr, removed))
            fix = (
                f"remove_unused_columns has taken {lost} away, which that forward does not name: call the column "
                f"{missing[0]!r} in the dataset, or set remove_unused_columns to false and let the data collator do it."
            )
        expected = f"{', '.join(map(repr, missing))} too, which the forward of {type(model).__name__} cannot do without"
        side = "student" if argument == "model" else "teacher"
        fail("inputs", f"a batch that has {there} for the {side}", expected, fix)

    @contextmanager
    def _stop_together(self) -> Iterator[None]:
        """Where a process is refused its labels, the others stop too: they would wait for it in the comparison."""
        refusal: Exception | None = None
        try:
            yield
        except (ValueError, TypeError) as error:
            refusal = error
        if self.accelerator.num_processes > 1 and not self._each_alone:
            stopped = torch.tensor(float(refusal is not None), device=self.args.device)
            if float(self.accelerator.reduce(stopped, reduction="sum")) and refusal is None:
                shown = "refused on another process, whose error names them"
                fail("labels", shown, "labels that fit the task on every process", "See the error of that process.")
        if refusal is not None:
            raise refusal

    def _check_first_labels(
        self, student: nn.Module, head: Head, batch: Mapping[str, Any], targets: Tensor, theirs: int | None
    ) -> None:
        """Raises ValueError for labels that are nothing to the loss, or no class of the logits.

        Args:
            theirs: classes of the teacher's logits, where they are known: the student's are as many, or refused.
        """
        if self.kd_args.kd_hard_loss == "model" or self.compute_loss_func is not None:  # which may mean others by them
            return
        classes = theirs if theirs is not None and classes_of(student, head) in (None, theirs) else None
        if classes is None and head.softmax and self.args.device.type != "cpu":
            classes = self._classes_of_logits(student, head, batch)
        # On CPU the loss itself looks at every label, beside logits that were counted.
        if (classes is not None and classes > 1) or not head.softmax:  # one class is refused for itself
            head.check_labels(targets, classes)

    def _classes_of_logits(self, student: nn.Module, head: Head, batch: Mapping[str, Any]) -> int | None:
        """How many classes the student's logits have, by its output layer or by a forward; None where neither tells."""
        if not head.softmax:
            return None
        if head.over_tokens and (rows := classes_of(student, head)) is not None:
            return rows
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # it is whole in training alone
            return None
        training = [module for module in student.modules() if module.training]
        try:
            inputs = self._with_decoder_inputs(student, head, self._prepare_inputs(dict(batch)))
            student.eval()
            with torch.no_grad(), same_random_numbers(self.args.device), self.accelerator.autocast():
                outputs = student(**model_inputs(inputs, accepted_inputs(student)))
            return int(head.logits(outputs, "model").shape[-1])
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the forward of the training step says what is wrong
            return None
        finally:
            for module in training:
                module.training = True

    def _check_memory(self, student: nn.Module, teacher: LiveTeacher) -> None:
        """The student may have been loaded, or made by model_init, since the teacher was compared with it."""
        if self._watch is not None:
            self._watch.remove()
        if teacher.model is not student:
            self._watch = watch_shared_buffers(student, check_separate(student, teacher.model))
            own = set(student.modules())
            teacher.shared = [module for module in teacher.model.modules() if module in own]

    def _whose_hard_loss(
        self, student: nn.Module, head: Head, batch: Mapping[str, Any], accepted: Accepted
    ) -> HardLoss:
        """Whether the hard loss is the task's formula or the model's own; every process must call it.

        Raises:
            ValueError: `kd_hard_loss` "model" with a model that gives no loss of its own.
        """
        wanted = self.kd_args.kd_hard_loss
        found: HardLoss | None = None
        sharded = bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)
        # Upstream's label smoother replaces the model's own loss; a sharded student is whole in training alone.
        smoothed = self.args.label_smoothing_factor > 0 and self.compute_loss_func is None
        if not head.has_formula and self.compute_loss_func is None:
            return HardLoss(True, head, f"the model's own, as for every model of the task {head.name!r}")
        if not smoothed and (not sharded or self.model_wrapped is not self.model or self.is_in_train):
            try:
                found = self._compare_losses(student, head, batch, accepted, sharded)
            except ValueError:  # labels that are none to the task, and something to the loss that was asked for
                if wanted != "model" and self.compute_loss_func is None:
                    raise
                found = HardLoss(True, head)
        if self.compute_loss_func is not None:
            line = "the script's compute_loss_func, with upstream's num_items_in_batch"
            return (found or HardLoss(True, head))._replace(own=True, line=line)
        if wanted == "task":
            return (found or HardLoss(False, head))._replace(own=False, line="the task's formula, as kd_hard_loss asks")
        if wanted == "model":
            if found is None and (head.targets(batch) is not None or smoothed):
                reason = "label_smoothing_factor replaces it" if smoothed else "its forward gives no loss for labels"
                mend = "Leave it at 'auto', or let the model's forward return its loss."
                fail("kd_hard_loss", repr(wanted), "'auto' or 'task' with this model", mend, because=reason)
            return (found or HardLoss(True, head))._replace(own=True, line="the model's own, as kd_hard_loss asks")
        return found or HardLoss(False, head)

    def _compare_losses(
        self, student: nn.Module, head: Head, batch: Mapping[str, Any], accepted: Accepted, sharded: bool
    ) -> HardLoss | None:
        """The model's own loss beside the task's formula on a piece of the batch, the same answer on every process."""
        batch = self._with_decoder_inputs(student, head, self._prepare_inputs(dict(batch)))
        called = cast(nn.Module, self.model_wrapped) if sharded else student

        def forward(inputs: dict[str, Any]) -> Any:
            own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}  # a forward may write
            with same_random_numbers(self.args.device), torch.no_grad():
                return called(**own)

        with as_in_training(student):
            weight = router_weight(student)
            counts_shifted = self._loss_shifts_labels if self.model_accepts_loss_kwargs else None
            found = Comparison(forward, student, head, accepted, weight, counts_shifted).look(batch)
        if self.accelerator.is_fsdp2:
            reshard(called)
        if self.accelerator.num_processes == 1 or self._each_alone:
            return found
        mine = [False] * 5
        if found is not None:
            toggled = found.head.shifted != head.shifted
            mine = [True, found.own, toggled, found.labels_are_inputs, found.by_num_items]
        seen = torch.tensor([float(x) for x in mine], device=self.args.device)
        anywhere, own, shift, inputs, by_items = (
            bool(x) for x in self.accelerator.reduce(seen, reduction="sum").tolist()
        )
        if not anywhere:
            return None
        found = found or HardLoss(False, head)
        if own and not found.own:
            found = found._replace(line="the model's own, which differs from the task's formula on another process")
        agreed = dataclasses.replace(head, shifted=head.shifted != shift)
        return found._replace(own=own, head=agreed, labels_are_inputs=inputs, by_num_items=by_items)

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

    def _output_heads(
        self, student: nn.Module, head: Head | None
    ) -> tuple[tuple[OutputHead, OutputHead | None] | None, tuple[str, ...]]:
        """Student's and teacher's output heads where the loss can do without logits, and a line for the start block."""
        wanted = self.kd_args.kd_loss_implementation
        if wanted == "full" or self.teacher is None or self._always_hard:
            return None, ()
        if head is None or not head.over_tokens:
            if wanted == "fused":
                expected = "'auto' or 'full' where the task is no language model's"
                fail("kd_loss_implementation", repr(wanted), expected, "Leave it at 'auto'.")
            return None, ()
        rows = vocabulary_rows(student, written=True)
        if wanted == "auto" and rows is not None and rows < SMALL_VOCABULARY:
            return None, ()
        try:
            if self.args.torch_compile or self.teacher.compiled:
                raise NotPlain("a compiled forward cannot leave its output head out")
            ours = OutputHead(student)
            theirs = OutputHead(self.teacher.model) if isinstance(self.teacher, LiveTeacher) else None
            if theirs is not None and ours.module.weight.device != theirs.module.weight.device:
                raise NotPlain("the output heads of student and teacher are on different devices")
        except NotPlain as reason:
            return None, (self._full_logits(reason),)
        return (ours, theirs), ("the loss is computed inside the output heads: no logits are held",)

    def _full_logits(self, reason: NotPlain) -> str:
        """The line that says why; an error where nothing but the fused loss was asked for."""
        if self.kd_args.kd_loss_implementation == "fused":
            expected = "'auto' or 'full' with these models"
            mend = "Set kd_loss_implementation to auto: it takes full logits where it must."
            fail("kd_loss_implementation", "'fused'", expected, mend, because=str(reason))
        return f"full logits: {reason}"

    def _check_tokens(
        self, student: nn.Module, teacher: LiveTeacher, head: Head | None, batch: Mapping[str, Any]
    ) -> str | None:
        """Whether the teacher can read the batch; by what the tokens of both are known to be the same, or None."""
        check_teacher_columns(batch)
        # The positions of an encoder-decoder are the decoder's, and these tokens the encoder's.
        apart = f"{TEACHER_PREFIX}input_ids" in batch
        if apart and head is not None and head.dims == 3 and head.name != "seq2seq_lm":
            because = f"the task {head.name!r} compares position i of one with position i of the other"
            mend = "Take a teacher with the student's tokenizer and no teacher_input_ids."
            shown = "a column of the batch"
            fail("teacher_input_ids", shown, "no tokens of the teacher's own", mend, because=because)
        known_by = None
        reads = "input_ids" in batch or (head is not None and (head.over_tokens or not head.has_formula))
        if reads and not apart and teacher.model is not student:
            known_by = check_same_tokens(student, teacher.model, self.processing_class, self.kd_args.teacher_kwargs)
        ours, theirs = (vocabulary_rows(model, measured=True) for model in (student, teacher.model))
        if theirs is not None:
            teacher.id_limit = theirs if ours is not None and ours > theirs else None
            check_ids(teacher.inputs(batch), theirs)
        if teacher.model is not student:
            starts = start_token(student), start_token(teacher.model)
            teacher.start_tokens = None if None in starts or starts[0] == starts[1] else cast(tuple[int, int], starts)
            check_padding(teacher.model, teacher.inputs(batch), getattr(text_config(student), "pad_token_id", None))
        return known_by

    def _check_cached(
        self, student: nn.Module, teacher: CachedTeacher, head: Head | None
    ) -> tuple[Head, int | None, str | None]:
        """(head, classes of the teacher, by what its tokens are known to be the student's) of a cache."""
        manifest = teacher.manifest
        kept = head_of(manifest)
        if head is not None and head.name != kept.name:
            mend = "Train a student of that task, or build a cache for this one."
            fail("teacher_cache", f"one for the task {kept.name!r}", f"{head.name!r}, the student's", mend)
        if kept.token_level and self.kd_args.kd_positions != manifest["positions"]:
            expected = f"{manifest['positions']!r}, the positions that the teacher cache holds"
            fail("kd_positions", repr(self.kd_args.kd_positions), expected, f"Set it to {manifest['positions']}.")
        ends = (self.kd_args.kd_temperature, self.kd_args.kd_temperature_end)
        teacher.check_objective(self.kd_args.kd_divergence, [end for end in ends if end is not None])
        known_by, ours = manifest["known_by"], tokenizer_identity(self.processing_class)
        if kept.over_tokens and ours is not None and manifest["tokenizer"] is not None:
            if ours != manifest["tokenizer"]:
                because = "class i of one would mean another token than class i of the other"
                mend = "Train with the tokenizer that made the cache."
                expected = "the tokens of the teacher cache (their hashes differ)"
                fail("processing_class", "a tokenizer of other tokens", expected, mend, because=because)
            known_by = "tokenizers"
        return kept, manifest["vocabulary"], known_by

    def _classes_of_cache(self, student: nn.Module, teacher: CachedTeacher, compare: Any = match_classes) -> Classes:
        """Its class names beside the student's; it has none for tasks whose classes are tokens or numbers."""
        kept = teacher.manifest["labels"]
        if not kept:
            return Classes(None, None)
        names = {int(i): str(name) for i, name in kept.items()}
        remap = self.kd_args.kd_remap_labels
        return compare(class_names(student), names, remap=remap, argument="teacher_cache", what="one")

    def _wanted(self, student: nn.Module, head: Head | None, batch: Mapping[str, Any]) -> Wanted:
        """What batch and configs tell of the logits, for models that return several tensors."""
        labels = batch.get(self.label_names[0]) if self.label_names else None
        labels = labels if isinstance(labels, Tensor) and labels.numel() else None
        dims = None if head is None else head.dims
        if head is None and labels is not None:
            dims = {1: 2, 2: 3}.get(labels.dim())
        models = [student, *([self.teacher.model] if isinstance(self.teacher, LiveTeacher) else [])]
        widths: list[Any] = []
        if isinstance(self.teacher, CachedTeacher):
            widths.append(self.teacher.manifest["vocabulary"])
        at_least = 0 if head is not None and not head.softmax else 2
        if head is not None and head.a_label_a_logit:
            widths += [] if labels is None else [labels.shape[-1] if labels.dim() > 1 else 1]
        elif labels is not None and at_least and not labels.is_floating_point():
            at_least = max(at_least, int(labels.max()) + 1)
        if head is not None and head.over_tokens:
            widths += [vocabulary_rows(model, written=True) for model in models]
        elif head is None or head.name in CLASSIFICATIONS:
            widths += [getattr(getattr(model, "config", None), "num_labels", None) for model in models]
        return Wanted(dims, tuple(dict.fromkeys(w for w in widths if isinstance(w, int))), at_least)

    def _common_widths(self, batch: Mapping[str, Any], mine: tuple[int, ...]) -> tuple[int, ...]:
        """Of the widths of a teacher's tensors those that a tensor of the student has too: the classes are the same."""
        student = cast(nn.Module, self.model_wrapped)
        accepted = accepted_inputs(self.unwrapped_student(), label_names=self.label_names)
        with torch.no_grad(), same_random_numbers(self.args.device), self.accelerator.autocast():
            found = widths_of(student(**model_inputs(batch, accepted)))
        return tuple(width for width in mine if width in found)

    def _probe(
        self, batch: Mapping[str, Any], output_head: OutputHead | None, wanted: Wanted, head: Head | None
    ) -> Tensor | None:
        """The teacher's logits on the first batch: their shape tells the head, their values whether it is alive.

        Of a few positions only, where the loss will do without logits.
        """
        if not isinstance(self.teacher, LiveTeacher):
            return None
        if output_head is None:
            logits = self._read_teacher(batch, wanted, head)
        else:
            teacher = self.teacher
            logits = few_products(lambda: teacher.outputs(batch, self.accelerator, self.model_wrapped), output_head)
        bad = bad_rows(logits)
        if bad and (self._finite.mode != "off" or len(bad) == logits.shape[0]):
            fail(
                "teacher_model",
                f"giving NaN or inf on rows {bad[:8]} of the first batch",
                "finite logits",
                "Check its weights, its dtype (float16 overflows where bfloat16 does not) and the inputs.",
            )
        return logits

    def _read_teacher(self, batch: Mapping[str, Any], wanted: Wanted, head: Head | None) -> Tensor:
        """The teacher's logits, found among its outputs; where they leave a choice the student's outputs help."""
        teacher = cast(LiveTeacher, self.teacher)

        def ask(wanted: Wanted) -> Tensor:
            known = None if head is None else dataclasses.replace(head, widths=wanted.widths, at_least=wanted.at_least)
            read = partial(logits_of, wanted=wanted) if known is None else known.logits
            return teacher(batch, self.accelerator, self.model_wrapped, read=read)

        try:
            return ask(wanted)
        except AmbiguousOutputs as ambiguous:
            common = self._common_widths(batch, ambiguous.widths)
            if len(common) != 1:
                raise
            return ask(wanted._replace(widths=common))

    def _check_settings(self, head: Head) -> None:
        """Raises where a setting means nothing for the task, so that it is not ignored in silence."""
        kd, smoothing = self.kd_args, self.args.label_smoothing_factor
        if not head.tempered and kd.kd_divergence != "forward_kl":
            expected = "'forward_kl' (the default) in a regression, whose soft loss is the squared error"
            fail("kd_divergence", repr(kd.kd_divergence), expected, "Leave it out.")
        if kd.kd_remap_labels and head.name not in CLASSIFICATIONS:
            because = "its outputs are no classes with names of their own"
            fail("kd_remap_labels", True, f"False for the task {head.name!r}", "Leave it out.", because=because)
        if not head.has_formula and kd.kd_hard_loss == "task":
            expected = f"'auto' or 'model' for the task {head.name!r}"
            because = "its hard loss is the model's own"
            fail("kd_hard_loss", repr(kd.kd_hard_loss), expected, "Leave it out.", because=because)
        if kd.teacher_cache_dir is not None and not head.cacheable:
            because = "which frames count is known to the student alone"
            expected = f"None for the task {head.name!r}"
            fail(
                "teacher_cache_dir",
                repr(kd.teacher_cache_dir),
                expected,
                "Train with the live teacher.",
                because=because,
            )
        if smoothing > 0 and not head.softmax:
            fail("label_smoothing_factor", smoothing, f"0 for the task {head.name!r}", "Leave it out.")

    @staticmethod
    def _with_decoder_inputs(student: nn.Module, head: Head | None, inputs: dict[str, Any]) -> dict[str, Any]:
        """Encoder-decoders build their decoder's inputs from labels: built once here, for both models."""
        if head is None or head.name != "seq2seq_lm" or "decoder_input_ids" in inputs or inputs.get("labels") is None:
            return inputs
        ids = decoder_input_ids(student, inputs["labels"])
        return inputs if ids is None else {**inputs, "decoder_input_ids": ids}

    def _refuse_packed(self, head: Head, batch: Mapping[str, Any], *, now: bool = False) -> None:
        """Raises where "batchmean" would divide by rows of several sequences: see `PackingWatch`."""
        if head.token_level and self.kd_args.kd_reduction == "batchmean":
            self._packing.see(is_packed(batch, head.sequences(batch).shape), now=now)


class PackingWatch:
    """Looks at every batch for packed rows, which "batchmean" cannot count.

    On CPU, and where the batch tells without a look at its tensors, at once; on accelerators the answer stays on the
    device until `raise_noted` reads it, so that no step waits.
    """

    def __init__(self) -> None:
        self._note: Tensor | None = None

    def see(self, packed: bool | Tensor, *, now: bool = False) -> None:
        """Takes the answer of `is_packed`; raises ValueError where it may be read and is true."""
        if isinstance(packed, Tensor) and packed.device.type != "cpu" and not now:
            self._note = packed if self._note is None else self._note | packed
        elif packed:
            self._refuse()

    def raise_noted(self) -> None:
        """Raises ValueError where a batch since the last call was packed."""
        note, self._note = self._note, None
        if note is not None and note:
            self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        because = "rows of a packed batch are no longer sequences"
        expected, mend = "'tokenmean' with packed batches", "Set kd_reduction to tokenmean."
        fail("kd_reduction", "'batchmean'", expected, mend, because=because)
