"""The checks of a setup: one list, from the columns of the first batch to whose hard loss it is.

For: `setup.py`, where training runs the list up to the first refusal, and `diagnostics/check.py`, where `check()` runs
all of it and makes a row of each refusal. A check takes the `Setup`, adds to it what later ones need, raises where
training would go wrong, and may return a line on what was found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..cache import CachedTeacher, head_of, tokenizer_identity
from ..losses import bad_rows
from ..tasks import (
    TEACHER_PREFIX,
    Accepted,
    AmbiguousOutputs,
    Head,
    Heads,
    NotPlain,
    Wanted,
    accepted_inputs,
    as_in_training,
    by_problem_type,
    check_batch,
    check_required,
    check_virtual_tokens,
    classes_of,
    few_products,
    full_logits,
    has_named_classes,
    head_for,
    head_from_logits,
    logits_of,
    model_inputs,
    plain_heads,
    same_random_numbers,
    start_token,
    text_config,
    unchanged_modes,
    vocabulary_rows,
    wanted_logits,
    widths_of,
)
from ..teachers import (
    AdapterOffTeacher,
    LiveTeacher,
    check_ids,
    check_padding,
    check_separate,
    reshard,
    watch_shared_buffers,
)
from ..teachers import compatibility as compatibility
from ..validation import fail
from .own_loss import Comparison, HardLoss, agreed, choose
from .router_loss import check_router, router_weight


@dataclass
class Setup:
    """A trainer and a batch, and what the checks have found so far."""

    trainer: Any
    batch: Mapping[str, Any]
    head: Head | None = None  # the task; None as long as only the teacher's logits can tell it
    head_by_logits: bool = False  # whether they had to
    teacher_classes: int | None = None  # of the teacher's logits, or of its cache
    path: str = ""  # a line on whether and why the loss is computed from logits
    vocabularies: str = ""  # a line on vocabularies that differ in size
    hard: HardLoss | None = None
    # As in `setup.Fit`.
    accepted: Accepted | None = None
    known_by: str | None = None
    class_order: Tensor | None = None
    common_ids: int | None = None
    heads: Heads | None = None

    def __post_init__(self) -> None:
        trainer = self.trainer
        self.kd, self.student = trainer.kd_args, trainer.unwrapped_student()
        # Where kd_alpha is 0 training does not call the teacher.
        self.asked = not (trainer._always_hard and trainer._is_training_step(self.student))
        self.sharded = is_sharded(trainer)

    @property
    def task(self) -> Head:
        """The head, where it is known by now."""
        assert self.head is not None
        return self.head

    @property
    def live(self) -> LiveTeacher | None:
        """The teacher where it is run, not read from a cache."""
        return self.trainer.teacher if isinstance(self.trainer.teacher, LiveTeacher) else None

    @property
    def cached(self) -> CachedTeacher | None:
        return self.trainer.teacher if isinstance(self.trainer.teacher, CachedTeacher) else None

    def prepared(self, batch: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The batch, or another one, on the device and with the inputs of a decoder."""
        inputs = self.trainer._prepare_inputs(dict(self.batch if batch is None else batch))
        return self.trainer._with_decoder_inputs(self.student, self.head, inputs)


def is_sharded(trainer: Any) -> bool:
    """Whether the student is whole on no process, so that only training's own preparation makes it callable."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


Check = Callable[[Setup], str | None]


# ---- what the batch and the models tell without a forward ----


def columns(setup: Setup) -> None:
    """Each model can be called with what the batch has."""
    trainer = setup.trainer
    check_required("student", setup.student, setup.batch, trainer._removed_columns)
    if setup.live is not None and not trainer._always_hard:
        check_required("teacher", setup.live.model, setup.live.inputs(setup.batch), trainer._removed_columns)


def task(setup: Setup) -> None:
    """The task is one of `HEADS`, or is left to the teacher's logits."""
    trainer, student, named = setup.trainer, setup.student, setup.kd.kd_task
    head = head_for(student, named, trainer._loss_shifts_labels)
    if head is not None:
        head = by_problem_type(head, student, named, setup.batch.get("labels"))
        setup.head = head.with_label_names(trainer.label_names, setup.batch)
    if isinstance(trainer.teacher, AdapterOffTeacher) and trainer.teacher.model is not student:  # from model_init
        trainer.teacher = AdapterOffTeacher(student, over_tokens=head is not None and head.over_tokens)


def memory(setup: Setup) -> None:
    """The student may have been loaded, or made by model_init, since the teacher's memory was compared with it."""
    trainer, student, teacher = setup.trainer, setup.student, setup.live
    if teacher is None:
        return
    if trainer._watch is not None:
        trainer._watch.remove()
    if teacher.model is not student:
        trainer._watch = watch_shared_buffers(student, check_separate(student, teacher.model))
        own = set(student.modules())
        teacher.shared = [module for module in teacher.model.modules() if module in own]


def tokens(setup: Setup) -> None:
    """The teacher can read the batch, and its tokens are the student's."""
    teacher, student, batch, head = setup.live, setup.student, setup.batch, setup.head
    if teacher is None:
        return
    compatibility.check_teacher_columns(batch)
    # The positions of an encoder-decoder are the decoder's, and these tokens the encoder's.
    apart = f"{TEACHER_PREFIX}input_ids" in batch
    if apart and head is not None and head.dims == 3 and not head.encoder_decoder:
        because = f"the task {head.name!r} compares position i of one with position i of the other"
        fix = "Take a teacher with the student's tokenizer and no teacher_input_ids."
        fail("teacher_input_ids", "a column of the batch", "no tokens of the teacher's own", fix, because=because)
    other = teacher.model is not student
    reads = "input_ids" in batch or (head is not None and (head.over_tokens or not head.has_formula))
    if reads and not apart and other:
        tokenizer = setup.trainer.processing_class
        setup.known_by = compatibility.check_same_tokens(student, teacher.model, tokenizer, setup.kd.teacher_kwargs)
    student_rows, teacher_rows = (vocabulary_rows(model, measured=True) for model in (student, teacher.model))
    if teacher_rows is not None:
        teacher.id_limit = teacher_rows if student_rows is not None and student_rows > teacher_rows else None
        check_ids(teacher.inputs(batch), teacher_rows)
    if other:
        starts = start_token(student), start_token(teacher.model)
        teacher.start_tokens = None if None in starts or starts[0] == starts[1] else cast(tuple[int, int], starts)
        check_padding(teacher.model, teacher.inputs(batch), getattr(text_config(student), "pad_token_id", None))


def cache(setup: Setup) -> None:
    """The outputs of a cache are those of the student's task, classes and tokens."""
    teacher, kd = setup.cached, setup.kd
    if teacher is None:
        return
    manifest, kept = teacher.manifest, head_of(teacher.manifest)
    if setup.head is not None and not setup.head.is_same_task(kept):
        fix = "Train a student of that task, or build a cache for this one."
        fail("teacher_cache", f"one for the task {kept.name!r}", f"{setup.head.name!r}, the student's", fix)
    if kept.token_level and kd.kd_positions != manifest["positions"]:
        expected = f"{manifest['positions']!r}, the positions that the teacher cache holds"
        fail("kd_positions", repr(kd.kd_positions), expected, f"Set it to {manifest['positions']}.")
    ends = (kd.kd_temperature, kd.kd_temperature_end)
    teacher.check_objective(kd.kd_divergence, [end for end in ends if end is not None])
    setup.known_by, student_tokens = manifest["known_by"], tokenizer_identity(setup.trainer.processing_class)
    if kept.over_tokens and student_tokens is not None and manifest["tokenizer"] is not None:
        if student_tokens != manifest["tokenizer"]:
            because = "class i of one would mean another token than class i of the other"
            expected = "the tokens of the teacher cache (their hashes differ)"
            fix = "Train with the tokenizer that made the cache."
            fail("processing_class", "a tokenizer of other tokens", expected, fix, because=because)
        setup.known_by = "tokenizers"
    setup.head = kept.with_label_names(setup.trainer.label_names, setup.batch)
    setup.teacher_classes = manifest["vocabulary"]
    compared = teacher.compare_classes(setup.student, remap=kd.kd_remap_labels, compare=compatibility.warned)
    setup.class_order = None if compared is None else compared.order


def settings(setup: Setup) -> str | None:
    """No setting means nothing for the task, so that none is ignored in silence."""
    head, kd, smoothing = setup.head, setup.kd, setup.trainer.args.label_smoothing_factor
    if head is None:
        return None
    if not head.tempered and kd.kd_divergence != "forward_kl":
        expected = "'forward_kl' (the default) in a regression, whose soft loss is the squared error"
        fail("kd_divergence", repr(kd.kd_divergence), expected, "Leave it out.")
    if kd.kd_remap_labels and not has_named_classes(head):
        because = "its outputs are no classes with names of their own"
        fail("kd_remap_labels", True, f"False for the task {head.name!r}", "Leave it out.", because=because)
    if not head.has_formula and kd.kd_hard_loss == "task":
        expected, because = f"'auto' or 'model' for the task {head.name!r}", "its hard loss is the model's own"
        fail("kd_hard_loss", repr(kd.kd_hard_loss), expected, "Leave it out.", because=because)
    if kd.teacher_cache_dir is not None and not head.cacheable:
        expected, because = f"None for the task {head.name!r}", "which frames count is known to the student alone"
        fix = "Train with the live teacher."
        fail("teacher_cache_dir", repr(kd.teacher_cache_dir), expected, fix, because=because)
    if smoothing > 0 and not head.softmax:
        fail("label_smoothing_factor", smoothing, f"0 for the task {head.name!r}", "Leave it out.")
    check_virtual_tokens(setup.student, head, "model")
    if setup.live is not None:
        check_virtual_tokens(setup.live.model, head, "teacher_model")
    objective, _ = setup.trainer._objective(training=True)
    return f"{head.name}: {objective.formula(head)}"


# ---- what the models have to be run for ----


def outputs(setup: Setup) -> None:
    """The teacher gives finite logits on the batch; their shape tells a task that nothing else does."""
    trainer, live, logits = setup.trainer, setup.live, None
    teacher_model = None if live is None else live.model
    labels = setup.batch.get(trainer.label_names[0]) if trainer.label_names else None
    kept = None if setup.cached is None else setup.teacher_classes
    models = [model for model in (setup.student, teacher_model) if model is not None]
    wanted = wanted_logits(setup.head, labels, models, kept)
    if live is not None and setup.asked:
        live.prepare(trainer.args.device, trainer.accelerator)
    if trainer.teacher is not None and not trainer._always_hard:
        over_tokens, way = setup.head is not None and setup.head.over_tokens, setup.kd.kd_loss_implementation
        compiled = trainer.args.torch_compile or trainer.teacher.compiled
        setup.heads, setup.path = plain_heads(setup.student, teacher_model, over_tokens, way, compiled=compiled)
    if live is not None and setup.asked:
        logits = teacher_logits(setup, live, wanted)
        setup.teacher_classes = logits.shape[-1]  # as many as the student's, or `check_shapes` says so
    if setup.head is None:
        setup.head_by_logits = True
        if logits is None:
            dims = getattr(setup.batch.get("labels"), "dim", lambda: 1)()
            head = head_for(setup.student, "classification" if dims == 1 else "token_classification", False)
        else:
            head = head_from_logits(logits)
        setup.head = cast(Any, head).with_label_names(trainer.label_names, setup.batch)
    if logits is not None and not setup.task.over_tokens:
        wanted = wanted._replace(widths=(logits.shape[-1],))
    setup.head = dataclasses.replace(setup.task, widths=wanted.widths, at_least=wanted.at_least)


def vocabulary(setup: Setup) -> None:
    """Vocabularies of other sizes are known to be padded only."""
    student, teacher = classes_of(setup.student, setup.task), setup.teacher_classes
    if setup.task.over_tokens and student is not None and teacher is not None and student != teacher:
        setup.common_ids = compatibility.common_ids(student, teacher, setup.known_by)
        setup.vocabularies = compatibility.vocabulary_line(student, teacher, setup.known_by)


def labels(setup: Setup) -> None:
    """Every label is a class of the logits; where the model's own loss reads them, they may mean others."""
    with _stop_together(setup):
        targets, head, trainer = setup.task.targets(setup.batch), setup.task, setup.trainer
        if targets is None or setup.kd.kd_hard_loss == "model" or trainer.compute_loss_func is not None:
            return
        # The student's logits have as many classes as the teacher's, or are refused.
        classes = setup.teacher_classes
        if classes_of(setup.student, head) not in (None, classes):
            classes = None
        if classes is None and head.softmax and trainer.args.device.type != "cpu":
            classes = classes_of_logits(setup)
        # On CPU the loss itself looks at every label, beside logits that were counted.
        if (classes is not None and classes > 1) or not head.softmax:  # one class is refused for itself
            head.check_labels(targets, classes)


@contextmanager
def _stop_together(setup: Setup) -> Iterator[None]:
    """Where a process is refused its labels, the others stop too: they would wait for it in the comparison."""
    accelerator, refusal = setup.trainer.accelerator, None
    try:
        yield
    except (ValueError, TypeError) as error:
        refusal = error
    if accelerator.num_processes > 1 and not setup.trainer._each_alone:
        stopped = torch.tensor(float(refusal is not None), device=setup.trainer.args.device)
        if float(accelerator.reduce(stopped, reduction="sum")) and refusal is None:
            shown = "refused on another process, whose error names them"
            fail("labels", shown, "labels that fit the task on every process", "See the error of that process.")
    if refusal is not None:
        raise refusal


def hard_loss(setup: Setup) -> str | None:
    """Whether the hard loss is the task's formula or the model's own; every process must call it."""
    trainer, student = setup.trainer, setup.student
    accepted = accepted_inputs(student, label_names=trainer.label_names, withheld=trainer._withheld_columns())
    with_function, smoothing = trainer.compute_loss_func is not None, trainer.args.label_smoothing_factor
    callable_now = not setup.sharded or trainer.model_wrapped is not trainer.model or trainer.is_in_train
    hard = choose(
        setup.kd.kd_hard_loss,
        setup.task,
        labelled=setup.task.targets(setup.batch) is not None,
        smoothed=smoothing > 0 and not with_function,
        with_function=with_function,
        compare=lambda: compare_losses(setup, accepted) if callable_now else None,
    )
    setup.hard, setup.head = hard, hard.head
    setup.accepted = accepted.with_names(trainer.label_names) if hard.labels_are_inputs else accepted
    if setup.heads is not None and (hard.own or hard.labels_are_inputs):
        cause = "the hard loss is the model's own" if hard.own else "the model makes its logits of the labels too"
        setup.heads, setup.path = None, full_logits(NotPlain(cause), setup.kd.kd_loss_implementation)
    return hard.line or None


# ---- passes through the models ----


def teacher_logits(setup: Setup, teacher: LiveTeacher, wanted: Wanted) -> Tensor:
    """The teacher's logits on the batch: their shape tells the head, their values whether it is alive.

    Of a few positions only, where the loss will do without logits.
    """
    trainer, batch = setup.trainer, setup.prepared()
    if setup.heads is not None and setup.heads[1] is not None:
        try:
            forward = partial(teacher.outputs, batch, trainer.accelerator, trainer.model_wrapped)
            logits = few_products(forward, setup.heads[1])
        except NotPlain as reason:
            setup.heads, setup.path = None, full_logits(reason, setup.kd.kd_loss_implementation)
    if setup.heads is None or setup.heads[1] is None:
        logits = _read_teacher(setup, teacher, batch, wanted)
    bad = bad_rows(logits)
    if bad and (trainer._finite.mode != "off" or len(bad) == logits.shape[0]):
        fix = "Check its weights, its dtype (float16 overflows where bfloat16 does not) and the inputs."
        fail("teacher_model", f"giving NaN or inf on rows {bad[:8]} of the first batch", "finite logits", fix)
    return logits


def _read_teacher(setup: Setup, teacher: LiveTeacher, batch: Mapping[str, Any], wanted: Wanted) -> Tensor:
    """The teacher's logits, found among its outputs; where they leave a choice the student's outputs help."""
    trainer, head = setup.trainer, setup.head

    def ask(wanted: Wanted) -> Tensor:
        known = None if head is None else dataclasses.replace(head, widths=wanted.widths, at_least=wanted.at_least)
        read = partial(logits_of, wanted=wanted) if known is None else known.logits
        return teacher(batch, trainer.accelerator, trainer.model_wrapped, read=read)

    try:
        return ask(wanted)
    except AmbiguousOutputs as ambiguous:  # the classes are the same: a width that the student's outputs have too
        accepted = accepted_inputs(setup.student, label_names=trainer.label_names)
        with torch.no_grad(), same_random_numbers(trainer.args.device), trainer.accelerator.autocast():
            found = widths_of(trainer.model_wrapped(**model_inputs(batch, accepted)))
        common = tuple(width for width in ambiguous.widths if width in found)
        if len(common) != 1:
            raise
        return ask(wanted._replace(widths=common))


def classes_of_logits(setup: Setup) -> int | None:
    """How many classes the student's logits have, by its output layer or by a forward; None where neither tells."""
    head, trainer, student = setup.task, setup.trainer, setup.student
    if not head.softmax:
        return None
    if head.over_tokens and (rows := classes_of(student, head)) is not None:
        return rows
    if setup.sharded:
        return None
    random_numbers = same_random_numbers(trainer.args.device)
    try:
        inputs = setup.prepared()
        with unchanged_modes(student), random_numbers, torch.no_grad(), trainer.accelerator.autocast():
            student.eval()
            outputs = student(**model_inputs(inputs, accepted_inputs(student)))
        return int(head.logits(outputs, "model").shape[-1])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the forward of the training step says what is wrong
        return None


def compare_losses(setup: Setup, accepted: Accepted) -> HardLoss | None:
    """The model's own loss beside the task's formula on a piece of the batch, the same answer on every process."""
    trainer, student, accelerator = setup.trainer, setup.student, setup.trainer.accelerator
    batch, called = setup.prepared(), trainer.model_wrapped if setup.sharded else student

    def forward(inputs: dict[str, Any]) -> Any:
        own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}  # a forward may write
        with same_random_numbers(trainer.args.device), torch.no_grad():
            return called(**own)

    with as_in_training(student):
        counts_shifted = trainer._loss_shifts_labels if trainer.model_accepts_loss_kwargs else None
        weight = router_weight(student)
        found = Comparison(forward, student, setup.task, accepted, weight, counts_shifted).look(batch)
    if accelerator.is_fsdp2:
        reshard(called)
    if accelerator.num_processes == 1 or trainer._each_alone:
        return found

    def anywhere(mine: list[bool]) -> list[bool]:
        seen = torch.tensor([float(x) for x in mine], device=trainer.args.device)
        return [bool(x) for x in accelerator.reduce(seen, reduction="sum").tolist()]

    return agreed(found, setup.task, anywhere)


# In this order, by the name of the row that `check()` makes of a refusal. The first ones run no model and do not need
# each other; each of the others needs all before it.
WITHOUT_MODELS: tuple[tuple[str, Check], ...] = (
    ("data", lambda setup: check_batch(setup.batch)),
    ("student", lambda setup: check_router(setup.student)),
    ("first batch", columns),
    ("task", task),
    ("shared memory", memory),
    ("tokens", tokens),
    ("cache", cache),
    ("task", settings),
)
WITH_MODELS: tuple[tuple[str, Check], ...] = (
    ("first batch", outputs),
    ("task", lambda setup: settings(setup) if setup.head_by_logits else None),
    ("vocabulary", vocabulary),
    ("labels", labels),
    ("hard loss", hard_loss),
)
