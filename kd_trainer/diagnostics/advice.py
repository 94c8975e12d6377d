"""The rows of `trainer.check()` on what is suspicious and not always wrong.

For: `check.py`. Checks that raise in training are in `training/setup_checks.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..cache import CachedTeacher
from ..losses import IGNORE_INDEX, divide
from ..tasks import (
    NOT_INPUTS,
    SMALL_VOCABULARY,
    TEACHER_PREFIX,
    Task,
    count_parameters,
    describe,
    times,
    vocabulary_rows,
)
from ..teachers import Classes, LiveTeacher, listed, positions_of
from ..training import Objective, Plan
from ..validation import fail
from .results import CheckResult, error, ok, warning

_CUT_FROM = 32  # tokens; of shorter rows several are as long as the longest by chance


def about_student(student: nn.Module, *, fp16: bool) -> list[CheckResult]:
    """Size, trained parameters, newly initialised ones, dtype; `fp16`: training in mixed float16."""
    parameters = dict(student.named_parameters())
    trained = [name for name, p in parameters.items() if p.requires_grad]
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    rows = [ok("student", describe(student))]
    if not trained:
        fix = "Call requires_grad_(True) on what is to be trained."
        rows.append(error("trained", "no parameter of the student requires a gradient", fix))
    elif frozen:
        found = f"{len(trained)} of {len(parameters)} parameters; frozen are {_some(frozen)}"
        fix = "Call requires_grad_(True) on the others if that is not meant."
        rows.append(ok("trained", found) if hasattr(student, "peft_config") else warning("trained", found, fix))
    fresh = newly_initialised(student)
    if fresh:
        rows.append(ok("student's head", f"newly initialised and about to be trained: {_some(fresh)}"))
    halves = [name for name in trained if parameters[name].dtype == torch.float16]
    if halves:
        found = f"{len(halves)} trained parameters are float16, in which small updates of an optimizer vanish"
        found += " and gradients cannot be unscaled" if fp16 else ""
        fix = "Load the student in float32 and set bf16 (or fp16) for speed, or load it in bfloat16."
        rows.append(warning("student's dtype", found, fix))
    return rows


def about_teacher(
    teacher: LiveTeacher | CachedTeacher | None, student: nn.Module, device: torch.device, *, called: bool, mixed: bool
) -> list[CheckResult]:
    """Size, mode, dtype and output head of the teacher as given; `called`: whether training calls it."""
    if teacher is None:
        return [] if called else [ok("teacher", "none: kd_alpha is 0, the loss is the labels' alone")]
    if not teacher.has_own_weights:
        return [ok("teacher", teacher.describe())]
    model = cast(nn.Module, teacher.model)
    size = count_parameters(model)
    ratio = size / max(count_parameters(student), 1)
    found = f"{teacher.describe()} ({times(ratio, 'the student')})"
    swapped = "The smaller model is the teacher: swap them if that is not meant."
    rows = [warning("teacher", found, swapped) if ratio < 1 else ok("teacher", found)]
    if not called:
        fix = "Raise kd_alpha, or leave the teacher out."
        rows.append(warning("teacher", "kd_alpha is 0: it is run in evaluation alone", fix))
    training = any(module.training for module in model.modules())
    open_to = sum(p.requires_grad for p in model.parameters())
    if training or open_to:
        came = [f"{open_to} trainable parameters"] * bool(open_to) + ["training mode"] * training
        rows.append(ok("teacher's mode", f"it came with {' and in '.join(came)}; it runs frozen, in eval mode"))
    fresh = newly_initialised(model)
    if fresh:
        found = f"its checkpoint does not hold {_some(fresh)}: newly initialised, the teacher is random"
        fix = "Fine-tune the teacher first; nothing to do if that was done in this script."
        rows.append(warning("teacher's head", found, fix))
    if device.type == "cuda" and not mixed and size > 10**8 and next(model.parameters()).dtype == torch.float32:
        fix = 'teacher_model_init_kwargs {"dtype": "bfloat16"} takes half of its memory and less time.'
        rows.append(ok("teacher's dtype", "float32", fix))
    return rows


def newly_initialised(model: nn.Module) -> list[str]:
    """Parameters that `from_pretrained` did not find in the checkpoint: it marks those that it has loaded.

    None where no parameter is marked, or in a PEFT wrapper.
    """
    names = [] if hasattr(model, "peft_config") else [name for name, _ in model.named_parameters()]
    fresh = [n for n in names if not getattr(model.get_parameter(n), "_is_hf_initialized", False)]
    return fresh if len(fresh) < len(names) else []


def about_classes(found: Classes) -> list[CheckResult]:
    """Whether class i is known to mean the same in both, by their names: see `compatibility.match_classes`."""
    student, teacher = found.student, found.teacher
    if found.order is not None:
        return [ok("classes", "the teacher's are reordered by name (kd_remap_labels)")]
    if student is None or teacher is None:
        return [ok("classes", "a model without id2label: class i has to mean the same in both")]
    if found.unnamed:
        return [ok("classes", f"no names ({listed(student)}) in both: class i has to mean the same in both")]
    if not found.known:
        fix = "Set the same id2label in both configs to have them compared."
        lists = f"teacher: {listed(teacher)}; student: {listed(student)}"
        return [warning("classes", f"not comparable by name ({lists}): class i has to mean the same in both", fix)]
    return [ok("classes", f"the same {len(student)} names in the same order")]


def about_tokens(batch: Mapping[str, Any], known_by: str | None) -> list[CheckResult]:
    """How the tokens of both models were compared: see `compatibility.check_same_tokens`."""
    if TEACHER_PREFIX + "input_ids" in batch:
        return [ok("tokens", "the teacher reads its own, in teacher_input_ids")]
    if "input_ids" not in batch:
        return []
    if known_by == "tokenizers":
        return [ok("tokens", "the tokenizers of student and teacher have the same ids")]
    compared = "sizes and special ids of the configs alone were compared" if known_by else "nothing could be compared"
    fix = "Pass processing_class=tokenizer to the trainer, and save the teacher's tokenizer beside its weights."
    return [warning("tokens", compared, fix)]


def pad_id_of(tokenizer: Any, student: nn.Module) -> int | None:
    """The padding token, by the tokenizer or by the student's config."""
    ids = (getattr(source, "pad_token_id", None) for source in (tokenizer, getattr(student, "config", None)))
    pad_id = next((pad_id for pad_id in ids if pad_id is not None), None)
    return pad_id if isinstance(pad_id, int) else None


def check_student_ids(student: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raises ValueError where an id of the batch has no row in the student's embedding."""
    rows, ids = vocabulary_rows(student, measured=True), batch.get("input_ids")
    if rows is None or not isinstance(ids, Tensor) or ids.is_floating_point():
        return
    wrong = ids[(ids < 0) | (ids >= rows)]
    if wrong.numel():
        fix = "Call student.resize_token_embeddings(len(tokenizer)), or take the student's own tokenizer."
        expected = f"0 to {rows - 1}, the rows of the student's embedding"
        fail("input_ids", f"{int(wrong[0])} in the batch", expected, fix)


def about_labels(
    classes: int | None, task: Task, objective: Objective, batch: Mapping[str, Any], pad_id: int | None
) -> list[CheckResult]:
    """Share of the batch with a label, their classes, and settings that do not fit them; raises as training would.

    Args:
        classes: of the student's logits; None: not known.
    """
    targets, alpha = task.targets(batch), objective.alpha
    if targets is not None:
        task.check_labels(targets, classes)
    counts = objective.count(task, batch)
    rows, hard = int(counts.rows), float(counts.hard)
    if targets is None or hard == 0:
        if alpha == 0:
            return [error("labels", "no row has one, and kd_alpha is 0: there is nothing to learn", "Raise kd_alpha.")]
        found = "no row of the batch has one" if targets is not None else "the batch has none"
        if alpha == 1:
            return [ok("labels", f"{found}; the loss is the teacher's alone")]
        return [warning("labels", f"{found}: the loss is {alpha:g} times the soft loss", "Set kd_alpha to 1.")]
    if not task.by_position:
        return _row_labels(task, objective, targets, classes, rows, hard)
    found = f"{hard:.0f} of {targets.numel()} positions have one"
    made_at = task.made_at(batch, targets) if task.shifted else None
    at_padding = 0 if made_at is None else int(((targets != IGNORE_INDEX) & ~made_at).sum())
    if at_padding:
        found += f"; {at_padding} first ones of a text are predicted before it: as upstream, the hard loss counts them"
    none = int((targets == IGNORE_INDEX).flatten(1).all(-1).sum())
    results = []
    if none and objective.positions == "labels":
        fix = 'Set kd_positions to "attended" to have a soft loss there.'
        results.append(warning("labels", f"{found}; {none} of {rows} rows have none at all", fix))
    stray = _labels_at_padding(task, batch, targets, pad_id)
    if stray:
        fix = f"Let the collator write {IGNORE_INDEX} there."
        results.append(warning("labels", f"{found}, {stray} of them at padding", fix))
    results = results or [ok("labels", found)]
    if objective.reduction == "batchmean":
        larger = float(divide(torch.as_tensor(float(counts.soft)), rows))
        sums = f"batchmean sums over the {task.position}s of a row"
        found = f"{sums}: the loss is about {larger:.0f} times the stock Trainer's"
        fix = 'Set {"kd_reduction": "tokenmean"} for its scale and its learning rates.'
        results.append(warning("reduction", found, fix))
    return results


def _labels_at_padding(task: Task, batch: Mapping[str, Any], targets: Tensor, pad_id: int | None) -> int:
    if task.encoder_decoder:
        return 0 if pad_id is None else int((targets == pad_id).sum())
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if not isinstance(mask, Tensor) or not isinstance(labels, Tensor) or mask.shape != labels.shape:
        return 0
    return int(((labels != IGNORE_INDEX) & (mask == 0)).sum())


def _row_labels(
    task: Task, objective: Objective, targets: Tensor, classes: int | None, rows: int, hard: float
) -> list[CheckResult]:
    found = f"{hard:g} of {rows} rows have one"
    if task.softmax:
        seen = targets[targets != IGNORE_INDEX].unique().tolist()
        of = "" if classes is None else f" of {classes}"
        found += f"; {len(seen)}{of} classes in this batch: {', '.join(map(str, seen[:8]))}"
        found += ", ..." if len(seen) > 8 else ""
    if hard < rows and objective.reduction == "batchmean" and objective.alpha < 1:
        fix = 'Set {"kd_reduction": "tokenmean"} to divide the hard loss by the labelled rows alone.'
        return [warning("labels", f"{found}; the hard loss is divided by all rows", fix)]
    return [ok("labels", found)]


def about_lengths(
    student: nn.Module, teacher: nn.Module | None, task: Task, tokenizer: Any, batch: Mapping[str, Any]
) -> list[CheckResult]:
    """Lengths of the rows compared with the models' positions and the length at which texts are cut."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return []
    teacher_ids = batch.get(TEACHER_PREFIX + "input_ids", ids)
    results, known = [], {}
    for side, model, read in (("student", student, ids), ("teacher", teacher, teacher_ids)):
        positions, learned = (None, False) if model is None else positions_of(model)
        if positions is None:
            continue
        known[side], longest = positions, _longest(read, task, batch)
        found = f"a row of {longest} positions; the {side} has {positions}"
        if longest > positions and learned:
            fix = f"Cut the texts: max_length={positions}, truncation=True in the tokenizer's call."
            results.append(error("lengths", found, fix))
        elif longest > positions:
            fix = f"Cut the texts to {positions}, or take a {side} made for longer ones."
            results.append(warning("lengths", f"{found} and was never trained beyond", fix))
    if results:
        return results
    limit = getattr(tokenizer, "model_max_length", None)
    limit = limit if isinstance(limit, int) and 0 < limit < 10**9 else None
    least = min(known.values(), default=None)
    if limit is not None and least is not None and limit > least:
        fix = f"Set tokenizer.model_max_length to {least}."
        return [warning("lengths", f"the tokenizer cuts texts at {limit} tokens, a model has {least}", fix)]
    whole = isinstance(mask, Tensor) and mask.shape == ids.shape
    lengths = (mask if whole else torch.ones_like(ids)).sum(-1)  # type: ignore[union-attr]
    shortest, longest = int(lengths.min()), int(lengths.max())
    at_end, at_limit = int((lengths == longest).sum()), longest in {limit, *known.values()}
    # Blocks of running text are all of one length, and nothing of them is cut off.
    cut = at_limit and not task.over_tokens if shortest == longest else at_limit or longest >= _CUT_FROM
    if cut and at_end >= 2 and 4 * at_end >= len(lengths):
        found = f"{at_end} of {len(lengths)} rows have exactly {longest} tokens: they were probably cut"
        fix = "Raise max_length if the models have the positions, or leave it if the start of a text is enough."
        return [warning("lengths", found, fix)]
    found = f"rows of {shortest} to {longest} tokens, padded to {ids.shape[1]}"
    if "position_ids" in batch:
        found = f"texts of up to {_longest(ids, task, batch)} tokens in rows of {ids.shape[1]}"
    has = "".join(f", the {side} has {positions} positions" for side, positions in known.items())
    return [ok("lengths", found + has)]


def _longest(ids: Tensor, task: Task, batch: Mapping[str, Any]) -> int:
    """The largest number of positions in a row; in a packed row they start again with every text."""
    positions, labels = batch.get("position_ids"), batch.get("labels")
    if isinstance(positions, Tensor) and positions.shape == ids.shape:
        return int(positions.max()) + 1
    decoded = labels.shape[1] if task.encoder_decoder and isinstance(labels, Tensor) else 0
    return max(ids.shape[1], decoded)


def about_images(student: nn.Module, teacher: nn.Module | None, batch: Mapping[str, Any]) -> list[CheckResult]:
    """Size of the images compared with the configs."""
    pixels = batch.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() < 4:
        return []
    teacher_pixels = batch.get(TEACHER_PREFIX + "pixel_values", pixels)
    results = []
    for side, model, read in (("student", student, pixels), ("teacher", teacher, teacher_pixels)):
        size = getattr(getattr(model, "config", None), "image_size", None)
        wanted = (size, size) if isinstance(size, int) else tuple(size or ())
        got = tuple(read.shape[-2:])
        if len(wanted) == 2 and got != wanted:
            where = "pixel_values" if side == "student" else "teacher_pixel_values"
            fix = f"Give the {side} images from its own image processor, in the column {where}."
            found = f"{got[0]} x {got[1]}; the {side} was made for {wanted[0]} x {wanted[1]}"
            results.append(warning("images", found, fix))
    return results or [ok("images", f"{pixels.shape[-2]} x {pixels.shape[-1]}, as in the configs")]


def about_columns(
    dataset: Any, kept: Sequence[str] | None, batch: Mapping[str, Any], read: Iterable[str], pad_id: int | None
) -> list[CheckResult]:
    """Columns that are removed or that neither model reads, and a missing mask.

    Args:
        kept: the columns that `remove_unused_columns` keeps; None where it is off.
        read: names that the models and the loss take out of the batch.
    """
    names = getattr(dataset, "column_names", None)
    removed = [name for name in names if name not in kept] if isinstance(names, list) and kept is not None else []
    unread = sorted(set(batch) - set(read) - NOT_INPUTS)
    found = f"read: {', '.join(sorted(set(batch) & {*read, *NOT_INPUTS}))}"
    found += f"; removed before the collator: {', '.join(removed)}" if removed else ""
    found += f"; read by neither model: {', '.join(unread)}" if unread else ""
    results = [ok("columns", found)]
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and "attention_mask" not in batch and pad_id is not None and bool((ids == pad_id).any()):
        found = f"there is no attention_mask, and input_ids hold the padding token ({pad_id}): it is read as text"
        results.append(warning("columns", found, "Keep the attention_mask of the tokenizer in the dataset."))
    return results


def about_settings(args: Any, task: Task, objective: Objective) -> list[CheckResult]:
    """Settings that are allowed but rarely intended."""
    results = []
    if task.tempered and objective.alpha > 0 and not 1 <= objective.temperature <= 20:
        effect = "sharpens" if objective.temperature < 1 else "flattens almost wholly"
        found = f"kd_temperature {objective.temperature:g} {effect} both distributions"
        results.append(warning("temperature", found, "Take one from 1 to 20."))
    best = getattr(args, "metric_for_best_model", None)
    if getattr(args, "load_best_model_at_end", False) and best in (None, "loss", "eval_loss"):
        fix = 'Set metric_for_best_model to "hard_loss" or your own metric if the task alone is to decide.'
        results.append(ok("best model", "chosen by eval_loss, the mixture of hard and soft loss", fix))
    return results


def about_path(plan: Plan, student: nn.Module, wanted: str) -> list[CheckResult]:
    """Whether the loss is computed from logits and why, and the other notes of the plan."""
    path = [note for note in plan.notes if note.startswith(("full logits", "the loss is computed inside"))]
    others = [ok("note", note) for note in plan.notes if note not in path]
    if path:
        return [ok("loss path", path[-1]), *others]
    if plan.task.embeds:
        return others
    rows, why = vocabulary_rows(student, written=True), "there is no teacher in the loss"
    if wanted == "full":
        why = "kd_loss_implementation is full"
    elif not plan.task.over_tokens:
        why = f"the task {plan.task.name} has few classes"
    elif rows is not None and rows < SMALL_VOCABULARY:
        why = f"a vocabulary of {rows:,} ids is small"
    return [ok("loss path", f"full logits: {why}"), *others]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
