"""The checks of a setup: one list, from the columns of the first batch to whose hard loss it is.

For: `setup.py`, where training runs the list up to the first refusal, and `diagnostics/check.py`, where `check()` runs
all of it and makes a row of each refusal. A check takes the `FirstBatch`, adds to it what later ones need, raises where
training would go wrong, and may return a line on what was found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..cache import check_tokens_kept, format_of, head_of, tokenizer_identity
from ..losses import bad_rows
from ..tasks import (
    TEACHER_PREFIX,
    AmbiguousOutputs,
    Task,
    UnsupportedHead,
    Wanted,
    accepted_inputs,
    by_problem_type,
    check_batch,
    check_required,
    check_virtual_tokens,
    classes_of,
    few_products,
    full_logits,
    logits_of,
    model_inputs,
    plain_heads,
    same_random_numbers,
    start_token,
    takes_features,
    task_for,
    task_from_logits,
    text_config,
    unchanged_modes,
    vocabulary_rows,
    wanted_logits,
    widths_of,
)
from ..teachers import LiveTeacher, check_ids, check_padding, check_separate, naming, watch_shared_buffers
from ..teachers import compatibility as compatibility
from ..teachers.sequences import check_student_rows
from ..validation import fail
from .chunks import check_chunks
from .own_loss import choose, compare_losses
from .settings import Check, FirstBatch, of_each_teacher, pooling_of
from .settings import is_sharded as is_sharded
from .terms import check_aux_loss

# ---- checks without a forward ----


@of_each_teacher
def columns(first: FirstBatch) -> None:
    """Each model can be called with what the batch has."""
    check_required("student", first.student, first.batch, first.setup.removed_columns)
    if first.live is not None and not first.settings.always_hard:
        taken = first.live.inputs(first.batch)
        check_required("teacher", first.live.model, taken, first.setup.removed_columns)
        compatibility.check_placeholders(first.student, first.live.model, first.batch, taken)


def task(first: FirstBatch) -> None:
    """The task is one of `TASKS`, or is left to the teacher's logits."""
    trainer, student, named = first.trainer, first.student, first.kd.kd_task
    task = task_for(student, named, trainer._loss_shifts_labels)
    if task is not None:
        task = by_problem_type(task, student, named, first.batch.get("labels"))
        task = task.with_settings(first.kd, student, pooling_of(first.teacher))
        first.known_task = task.with_label_names(trainer.label_names, first.batch)
        first.settings.adopt(task)
        if first.live is not None:
            task.set_teacher(first.live.model)
    if first.teacher is not None:
        first.teacher = first.teacher.for_student(student, over_tokens=task is not None and task.over_tokens)
        for one, member in zip(first.of_each(), first.teacher.members, strict=False):
            one.teacher = member


@of_each_teacher
def memory(first: FirstBatch) -> None:
    """The student may have been loaded, or made by model_init, since the teacher's memory was compared with it."""
    student, teacher = first.student, first.live
    if teacher is None:
        return
    if not first.index:
        first.setup.watch_buffers(None)
    if teacher.model is not student:
        shared = check_separate(student, teacher.model)
        first.setup.watch_buffers(lambda: watch_shared_buffers(student, shared))
        own = set(student.modules())
        teacher.shared = [module for module in teacher.model.modules() if module in own]


@of_each_teacher
def tokens(first: FirstBatch) -> None:
    """The teacher can read the batch, and its tokens are the student's."""
    teacher, student, batch, task = first.live, first.student, first.batch, first.known_task
    if teacher is None:
        return
    compatibility.check_teacher_columns(batch)
    # The positions of an encoder-decoder are the decoder's, and these tokens the encoder's.
    apart = f"{TEACHER_PREFIX}input_ids" in batch
    if first.chunks:
        check_chunks(task, batch, first.trainer.args.label_smoothing_factor)
    elif apart and task is not None and task.dims == 3 and not task.encoder_decoder:
        because = f"the task {task.name!r} compares position i of one with position i of the other"
        fix = f"Take a teacher with the student's tokenizer and no teacher_input_ids{compatibility.OR_CHUNKS}"
        fail("teacher_input_ids", "a column of the batch", "no tokens of the teacher's own", fix, because=because)
    other = teacher.model is not student
    reads = "input_ids" in batch or (task is not None and (task.over_tokens or not task.has_formula))
    if reads and not apart and other:
        tokenizer = first.trainer.processing_class
        init_kwargs = first.kd.teacher_kwargs_of(first.index or 0)
        first.known_by = compatibility.check_same_tokens(student, teacher.model, tokenizer, init_kwargs)
    student_rows, teacher_rows = (vocabulary_rows(model, measured=True) for model in (student, teacher.model))
    if teacher_rows is not None:
        teacher.id_limit = teacher_rows if student_rows is not None and student_rows > teacher_rows else None
        check_ids(teacher.inputs(batch), teacher_rows)
    if other:
        starts = start_token(student), start_token(teacher.model)
        teacher.start_tokens = None if None in starts or starts[0] == starts[1] else cast(tuple[int, int], starts)
        check_padding(teacher.model, teacher.inputs(batch), getattr(text_config(student), "pad_token_id", None))


@of_each_teacher
def cache(first: FirstBatch) -> None:
    """The outputs of a cache are those of the student's task, classes and tokens."""
    teacher, kd = first.teacher, first.kd
    if teacher is None or teacher.manifest is None:
        return
    check_tokens_kept(format_of(teacher.manifest), chunks=first.chunks)
    if first.chunks:
        check_chunks(first.known_task, first.batch, first.trainer.args.label_smoothing_factor)
    manifest, kept = teacher.manifest, head_of(teacher.manifest)
    if first.known_task is not None and not first.known_task.is_same_task(kept):
        fix = "Train a student of that task, or build a cache for this one."
        fail("teacher_cache", f"one for the task {kept.name!r}", f"{first.known_task.name!r}, the student's", fix)
    if kept.by_position and not first.chunks and kd.kd_positions != manifest["positions"]:
        expected = f"{manifest['positions']!r}, the positions that the teacher cache holds"
        fail("kd_positions", repr(kd.kd_positions), expected, f"Set it to {manifest['positions']}.")
    ends = (kd.kd_temperature, kd.kd_temperature_end)
    temperatures = [end for end in ends if end is not None]
    teacher.check_objective(kd.kd_divergence, temperatures, kd.kd_standardize_logits)
    first.known_by, student_tokens = manifest["known_by"], tokenizer_identity(first.trainer.processing_class)
    if kept.over_tokens and student_tokens is not None and manifest["tokenizer"] is not None:
        if student_tokens != manifest["tokenizer"]:
            because = "class i of one would mean another token than class i of the other"
            expected = "the tokens of the teacher cache (their hashes differ)"
            fix = "Train with the tokenizer that made the cache."
            fail("processing_class", "a tokenizer of other tokens", expected, fix, because=because)
        first.known_by = "tokenizers"
    task = first.known_task if first.known_task is not None and kept.embeds else kept
    first.known_task = task.with_label_names(first.trainer.label_names, first.batch)
    first.teacher_classes = manifest["vocabulary"]
    compared = teacher.compare_classes(first.student, kept, remap=kd.kd_remap_labels, compare=compatibility.warned)
    first.class_order = None if compared is None else compared.order


def settings(first: FirstBatch) -> str | None:
    """Every setting has a meaning for the task, so that none is ignored silently."""
    task, kd, smoothing = first.known_task, first.kd, first.trainer.args.label_smoothing_factor
    if task is None:
        return None
    objective, soft_loss = first.settings.objective(first.trainer.state, training=True)
    task.check_soft_loss(soft_loss)
    unused = {} if task.embeds else dict.fromkeys(("kd_pooling", "kd_embedding_loss"), "its outputs are no embeddings")
    unused |= {} if task.token_level else {"kd_position_fraction": "it selects among the tokens of a row"}
    for name, because in unused.items():
        value, default = getattr(kd, name), getattr(type(kd), name)
        if value != default:
            expected = f"{default!r} (the default) for the task {task.name!r}"
            fail(name, repr(value), expected, "Leave it out.", because=because)
    if not task.has_hard_loss:
        _check_soft_alone(first, task)
    if task.embeds and first.sharded and takes_features(first.student):
        because = "it saves itself, and its weights are in parts"
        fix = "Give its transformer (an AutoModel) as the student."
        fail("model", "a SentenceTransformer under FSDP or DeepSpeed", "one process, or DDP", fix, because=because)
    if kd.kd_remap_labels and not task.named_classes:
        because = "its outputs are no classes with names of their own"
        fail("kd_remap_labels", True, f"False for the task {task.name!r}", "Leave it out.", because=because)
    if not task.has_formula and kd.kd_hard_loss == "task":
        expected, because = f"'auto' or 'model' for the task {task.name!r}", "its hard loss is the model's own"
        fail("kd_hard_loss", repr(kd.kd_hard_loss), expected, "Leave it out.", because=because)
    if kd.teacher_cache_dir is not None and not task.cacheable:
        expected, because = f"None for the task {task.name!r}", "which frames count is known to the student alone"
        fail("teacher_cache_dir", repr(kd.teacher_cache_dir), expected, "Train with the live teacher.", because=because)
    if smoothing > 0 and not task.softmax:
        fail("label_smoothing_factor", smoothing, f"0 for the task {task.name!r}", "Leave it out.")
    check_virtual_tokens(first.student, task, "model")
    for one in first.of_each() or (first,):
        if one.live is not None:
            with naming(one.index):
                check_virtual_tokens(one.live.model, task, "teacher_model")
    if first.each and first.teacher is not None:
        if not task.mixed_as or first.chunks:
            what = "with kd_cross_tokenizer 'chunks'" if first.chunks else f"for the task {task.name!r}"
            fail("teacher_model", f"a list of {len(first.each)}", f"one teacher {what}", "Give a single one.")
        first.teacher.check_objective(kd.kd_divergence, (), kd.kd_standardize_logits)
    return f"{task.name}: {objective.formula(task)}"


def added_terms(first: FirstBatch) -> None:
    """Each added term can be computed with these models."""
    captured = [term.name for term in first.settings.added if term.capture is not None]
    if captured and first.of_each():
        because = f"the term {captured[0]} compares hidden states, and a mixture has none"
        fix = "Give one, or leave the term out."
        fail("teacher_model", f"a list of {len(first.each)}", "one teacher", fix, because=because)
    lines = [term.check(first) for term in first.settings.added if term.check is not None]
    first.terms = tuple(line for line in lines if line is not None)


def student_rows(first: FirstBatch) -> str | None:
    """The student can write rows, and the teacher is run on them."""
    fsdp1 = bool(first.trainer.is_fsdp_enabled) and not first.trainer.accelerator.is_fsdp2
    line = check_student_rows(first.kd, first.student, first.known_task, first.teacher, fsdp1)
    first.terms += () if line is None else (line,)
    return line


def _check_soft_alone(first: FirstBatch, task: Task) -> None:
    """Raises ValueError for a setting that speaks of a hard loss where there is none."""
    kd, because = first.kd, f"the task {task.name!r} has no hard loss"
    for name, value in (("kd_alpha", kd.kd_alpha), ("kd_alpha_end", kd.kd_alpha_end)):
        if value not in (1, None):
            fail(name, value, "1, the default for this task", "Leave it out.", because=because)
    if kd.kd_hard_loss != "auto":
        fail("kd_hard_loss", repr(kd.kd_hard_loss), "'auto'", "Leave it out.", because=because)
    if first.trainer.compute_loss_func is not None:
        fail("compute_loss_func", "a function", "None", "Leave it out.", because=because)


# ---- checks that run the models ----


def outputs(first: FirstBatch) -> None:
    """The teacher's logits on the batch are finite; their shape decides the task where nothing else does."""
    if first.of_each():
        _outputs_of_each(first)
        return
    trainer, live, logits = first.trainer, first.live, None
    teacher_model = None if live is None else live.model
    labels = first.batch.get(trainer.label_names[0]) if trainer.label_names else None
    kept = None if first.live is not None else first.teacher_classes
    models = [model for model in (first.student, teacher_model) if model is not None]
    wanted = wanted_logits(first.known_task, labels, models, kept)
    if live is not None and first.teacher_called:
        live.prepare(trainer.args.device, trainer.accelerator)
    if first.teacher is not None and not first.settings.always_hard:
        _find_heads(first, teacher_model)
    if live is not None and first.teacher_called:
        logits = teacher_logits(first, live, wanted)
        first.teacher_classes = logits.shape[-1]  # as many as the student's, or `check_shapes` raises
    if first.known_task is None:
        first.task_by_logits = True
        if logits is None:
            dims = getattr(first.batch.get("labels"), "dim", lambda: 1)()
            task = task_for(first.student, "classification" if dims == 1 else "token_classification", False)
        else:
            task = task_from_logits(logits)
        first.known_task = cast(Any, task).with_label_names(trainer.label_names, first.batch)
    if logits is not None and not first.task.over_tokens:
        wanted = wanted._replace(widths=(logits.shape[-1],))
    first.known_task = dataclasses.replace(first.task, widths=wanted.widths, at_least=wanted.at_least)


def _find_heads(first: FirstBatch, teacher_model: nn.Module | None) -> None:
    over_tokens = first.known_task is not None and first.known_task.over_tokens
    compiled = first.trainer.args.torch_compile or (first.teacher is not None and first.teacher.compiled)
    way = first.implementation
    first.heads, first.path = plain_heads(first.student, teacher_model, over_tokens, way, compiled=compiled)


def _outputs_of_each(first: FirstBatch) -> None:
    teacher: Any = first.teacher
    for one, weight in zip(first.each, teacher.weights, strict=True):
        if weight > 0:  # else it is never run
            one.known_task = first.known_task
            with naming(one.index):
                outputs(one)
            first.known_task, first.task_by_logits = one.known_task, first.task_by_logits or one.task_by_logits
    if first.settings.always_hard:
        return
    _find_heads(first, None)
    if first.heads is None:
        return
    heads = [None if one.heads is None else one.heads[1] for one in first.each]
    run = [head is not None for head, weight in zip(heads, teacher.weights, strict=True) if weight > 0]
    teacher.heads = heads if all(run) else None
    if teacher.heads is None:
        first.path = "no logits of the student are held; of the teachers one mixture and one teacher's logits at a time"


def vocabulary(first: FirstBatch) -> None:
    """Vocabularies of other sizes are known to be padded only."""
    if first.of_each():
        _vocabularies(first)
        return
    student, teacher = classes_of(first.student, first.task), first.teacher_classes
    if first.chunks:  # no class of one is compared with a class of the other
        return
    if first.task.over_tokens and student is not None and teacher is not None and student != teacher:
        first.common_ids = compatibility.common_ids(student, teacher, first.known_by)
        first.vocabularies = compatibility.vocabulary_line(student, teacher, first.known_by)


def _vocabularies(first: FirstBatch) -> None:
    """Of several teachers: how many first ids are mixed, and how the classes of caches are reordered."""
    teacher: Any = first.teacher
    known = [one for one in first.each if one.teacher_classes is not None]
    for one in known:
        with naming(one.index):
            one.known_task = first.task
            vocabulary(one)
    sizes = {int(one.teacher_classes or 0) for one in known}
    student = classes_of(first.student, first.task)
    if first.task.over_tokens and known:
        least = min(size for size in (*sizes, student) if size is not None)
        teacher.classes = least if len(sizes) > 1 or least not in sizes else None
        first.common_ids = None if least == student else least
        first.vocabularies = "; ".join(one.vocabularies for one in known if one.vocabularies)
        sizes = {least}
    if len(sizes) > 1:
        because = "class i of one must mean class i of the other"
        shown = f"models of {' and '.join(map(str, sorted(sizes)))} classes"
        fail("teacher_model", shown, "equal numbers of classes", "Take teachers of the same classes.", because=because)
    first.teacher_classes, first.known_by = next(iter(sizes), None), next((one.known_by for one in known), None)
    teacher.class_orders = [one.class_order for one in first.each]


def classes(first: FirstBatch) -> None:
    """The soft loss has a meaning for as few classes as there are."""
    _, soft_loss = first.settings.objective(first.trainer.state, training=True)
    for one in first.of_each() or (first,):
        if one.teacher_classes is not None and not first.chunks:
            first.task.check_classes(soft_loss, one.teacher_classes)


def labels(first: FirstBatch) -> None:
    """Every label is a class of the logits; where the model's own loss reads them, they may mean others."""
    with _stop_together(first):
        targets, task, trainer = first.task.targets(first.batch), first.task, first.trainer
        if targets is None or first.kd.kd_hard_loss == "model" or trainer.compute_loss_func is not None:
            return
        # The student's logits have as many classes as the teacher's, or an error is raised.
        classes = first.teacher_classes
        if classes_of(first.student, task) not in (None, classes):
            classes = None
        if classes is None and task.softmax and trainer.args.device.type != "cpu":
            classes = classes_of_logits(first)
        # On CPU the loss checks every label beside the logits.
        if (classes is not None and classes > 1) or not task.softmax:  # one class is an error in itself
            task.check_labels(targets, classes)


@contextmanager
def _stop_together(first: FirstBatch) -> Iterator[None]:
    """Where the labels of a process are wrong, the others stop too: they would wait for it in the comparison."""
    accelerator, refusal = first.trainer.accelerator, None
    try:
        yield
    except (ValueError, TypeError) as error:
        refusal = error
    if accelerator.num_processes > 1 and not first.setup.each_alone:
        stopped = torch.tensor(float(refusal is not None), device=first.trainer.args.device)
        if float(accelerator.reduce(stopped, reduction="sum")) and refusal is None:
            shown = "wrong on another process, whose error names them"
            fail("labels", shown, "labels that fit the task on every process", "See the error of that process.")
    if refusal is not None:
        raise refusal


def hard_loss(first: FirstBatch) -> str | None:
    """Whether the hard loss is the task's formula or the model's own; every process must call it."""
    trainer, student = first.trainer, first.student
    accepted = accepted_inputs(student, label_names=trainer.label_names, withheld=first.setup.withheld_columns())
    with_function, smoothing = trainer.compute_loss_func is not None, trainer.args.label_smoothing_factor
    callable_now = not first.sharded or trainer.model_wrapped is not trainer.model or trainer.is_in_train
    hard = choose(
        first.kd.kd_hard_loss,
        first.task,
        labelled=first.task.targets(first.batch) is not None,
        smoothed=smoothing > 0 and not with_function,
        with_function=with_function,
        compare=lambda: compare_losses(first, accepted) if callable_now else None,
    )
    first.hard, first.known_task = hard, hard.task
    first.accepted = accepted.with_names(trainer.label_names) if hard.labels_are_inputs else accepted
    if first.heads is not None and (hard.own or hard.labels_are_inputs):
        cause = "the hard loss is the model's own" if hard.own else "the model makes its logits of the labels too"
        first.heads, first.path = None, full_logits(UnsupportedHead(cause), first.kd.kd_loss_implementation)
    return hard.line or None


# ---- passes through the models ----


def teacher_logits(first: FirstBatch, teacher: LiveTeacher, wanted: Wanted) -> Tensor:
    """The teacher's logits on the batch: their shape decides the task, their values have to be finite.

    Of a few positions only, where the loss will do without logits.
    """
    trainer, batch = first.trainer, first.prepared()
    if first.heads is not None and first.heads[1] is not None:
        try:
            forward = partial(teacher.outputs, batch, trainer.accelerator, trainer.model_wrapped)
            logits = few_products(forward, first.heads[1])
        except UnsupportedHead as reason:
            first.heads, first.path = None, full_logits(reason, first.implementation)
    if first.heads is None or first.heads[1] is None:
        logits = _read_teacher(first, teacher, batch, wanted)
    bad = bad_rows(logits)
    if bad and (first.settings.finite_mode(trainer.args.device.type) != "off" or len(bad) == logits.shape[0]):
        fix = "Check its weights, its dtype (float16 overflows where bfloat16 does not) and the inputs."
        fail("teacher_model", f"giving NaN or inf on rows {bad[:8]} of the first batch", "finite logits", fix)
    return logits


def _read_teacher(first: FirstBatch, teacher: LiveTeacher, batch: Mapping[str, Any], wanted: Wanted) -> Tensor:
    """The teacher's logits, found among its outputs; where they leave a choice the student's outputs help."""
    trainer, task = first.trainer, first.known_task

    def ask(wanted: Wanted) -> Tensor:
        known = None if task is None else dataclasses.replace(task, widths=wanted.widths, at_least=wanted.at_least)
        read = partial(logits_of, wanted=wanted) if known is None else known.logits
        return teacher(batch, trainer.accelerator, trainer.model_wrapped, read=read)

    try:
        return ask(wanted)
    except AmbiguousOutputs as ambiguous:  # the classes are the same: a width that the student's outputs have too
        accepted = accepted_inputs(first.student, label_names=trainer.label_names)
        with torch.no_grad(), same_random_numbers(trainer.args.device), trainer.accelerator.autocast():
            found = widths_of(trainer.model_wrapped(**model_inputs(batch, accepted)))
        common = tuple(width for width in ambiguous.widths if width in found)
        if len(common) != 1:
            raise
        return ask(wanted._replace(widths=common))


def classes_of_logits(first: FirstBatch) -> int | None:
    """How many classes the student's logits have, by its output layer or by a forward; None where neither shows it."""
    task, trainer, student = first.task, first.trainer, first.student
    if not task.softmax:
        return None
    if task.over_tokens and (rows := classes_of(student, task)) is not None:
        return rows
    if first.sharded:
        return None
    random_numbers = same_random_numbers(trainer.args.device)
    try:
        inputs = first.prepared()
        with unchanged_modes(student), random_numbers, torch.no_grad(), trainer.accelerator.autocast():
            student.eval()
            outputs = student(**model_inputs(inputs, accepted_inputs(student)))
        return int(task.logits(outputs, "model").shape[-1])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the forward of the training step raises it again
        return None


# In this order, by the name of the row that `check()` makes of a refusal. The first ones run no model and do not need
# each other; each of the others needs all before it.
WITHOUT_MODELS: tuple[tuple[str, Check], ...] = (
    ("data", lambda first: check_batch(first.batch)),
    ("student", lambda first: check_aux_loss(first.student)),
    ("first batch", columns),
    ("task", task),
    ("shared memory", memory),
    ("tokens", tokens),
    ("cache", cache),
    ("task", settings),
    ("added terms", added_terms),
    ("student rows", student_rows),
)
WITH_MODELS: tuple[tuple[str, Check], ...] = (
    ("first batch", outputs),
    ("task", lambda first: settings(first) if first.task_by_logits else None),
    ("vocabulary", vocabulary),
    ("task", classes),
    ("labels", labels),
    ("hard loss", hard_loss),
)
