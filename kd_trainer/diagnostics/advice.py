"""The rows of `trainer.check()` that refuse nothing: what is suspicious and not always wrong.

For: `check.py`. What training would refuse stands in `training/setup_checks.py`.
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
    Head,
    count_parameters,
    describe,
    times,
    vocabulary_rows,
)
from ..teachers import Classes, LiveTeacher, listed, positions_of, without_names
from ..training import Fit, Objective
from ..validation import fail
from .findings import Finding, error, ok, warning

_CUT_FROM = 32  # tokens; of shorter rows several are as long as the longest by chance


def about_student(student: nn.Module, *, fp16: bool) -> list[Finding]:
    """Size, what of it is trained, what is newly initialised, dtype; `fp16`: training in mixed float16."""
    parameters = dict(student.named_parameters())
    trained = [name for name, p in parameters.items() if p.requires_grad]
    rows = [ok("student", describe(student))]
    if not trained:
        mend = "Call requires_grad_(True) on what shall be trained."
        rows.append(error("trained", "no parameter of the student requires a gradient", mend))
    elif len(trained) < len(parameters):
        frozen = [name for name in parameters if name not in set(trained)]
        found = f"{len(trained)} of {len(parameters)} parameters; frozen are {_some(frozen)}"
        adapted = hasattr(student, "peft_config")
        mend = "Call requires_grad_(True) on the others if that is not meant."
        rows.append(ok("trained", found) if adapted else warning("trained", found, mend))
    fresh = newly_initialised(student)
    if fresh:
        rows.append(ok("student's head", f"newly initialised and about to be trained: {_some(fresh)}"))
    halves = [name for name in trained if parameters[name].dtype == torch.float16]
    if halves:
        found = f"{len(halves)} trained parameters are float16, in which small updates of an optimizer vanish"
        found += " and gradients cannot be unscaled" if fp16 else ""
        mend = "Load the student in float32 and set bf16 (or fp16) for speed, or load it in bfloat16."
        rows.append(warning("student's dtype", found, mend))
    return rows


def about_teacher(
    teacher: LiveTeacher | CachedTeacher | None, student: nn.Module, device: torch.device, *, called: bool, mixed: bool
) -> list[Finding]:
    """Size, mode, dtype and head of the teacher as it was given; `called`: whether training asks it at all."""
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
        mend = "Raise kd_alpha, or leave the teacher out."
        rows.append(warning("teacher", "kd_alpha is 0: it is asked in evaluation alone", mend))
    training = any(module.training for module in model.modules())
    open_to = sum(p.requires_grad for p in model.parameters())
    if training or open_to:
        came = [f"{open_to} trainable parameters"] * bool(open_to) + ["training mode"] * training
        rows.append(ok("teacher's mode", f"it came with {' and in '.join(came)}; it is asked frozen, in eval mode"))
    fresh = newly_initialised(model)
    if fresh:
        found = f"its checkpoint does not hold {_some(fresh)}: newly initialised, they teach noise"
        mend = "Fine-tune the teacher first; nothing to do if that was done in this script."
        rows.append(warning("teacher's head", found, mend))
    if device.type == "cuda" and not mixed and size > 10**8 and next(model.parameters()).dtype == torch.float32:
        mend = 'teacher_model_init_kwargs {"dtype": "bfloat16"} takes half of its memory and less time.'
        rows.append(ok("teacher's dtype", "float32", mend))
    return rows


def newly_initialised(model: nn.Module) -> list[str]:
    """Parameters that `from_pretrained` did not find in the checkpoint; none where nothing tells (a PEFT wrapper too).

    Upstream marks the parameters that it has loaded.
    """
    if hasattr(model, "peft_config"):
        return []
    fresh = [n for n, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
    return fresh if len(fresh) < len(list(model.parameters())) else []


def about_classes(ours: Mapping[int, str] | None, theirs: Mapping[int, str] | None, found: Classes) -> list[Finding]:
    """Whether class i is known to mean the same in both: see `compatibility.match_classes`."""
    if found.order is not None:
        return [ok("classes", "the teacher's are reordered by name (kd_remap_labels)")]
    if ours is None or theirs is None:
        return [ok("classes", "a model without id2label: class i has to mean the same in both")]
    if without_names(ours, theirs):
        return [ok("classes", f"no names ({listed(ours)}) in both: class i has to mean the same in both")]
    if not found.known:
        mend = "Set the same id2label in both configs to have them compared."
        lists = f"teacher: {listed(theirs)}; student: {listed(ours)}"
        return [warning("classes", f"not comparable by name ({lists}): class i has to mean the same in both", mend)]
    return [ok("classes", f"the same {len(ours)} names in the same order")]


def about_tokens(batch: Mapping[str, Any], known_by: str | None) -> list[Finding]:
    """By what the tokens of both models are known to be the same: see `compatibility.check_same_tokens`."""
    if TEACHER_PREFIX + "input_ids" in batch:
        return [ok("tokens", "the teacher reads its own, in teacher_input_ids")]
    if "input_ids" not in batch:
        return []
    if known_by == "tokenizers":
        return [ok("tokens", "the tokenizers of student and teacher have the same ids")]
    compared = "sizes and special ids of the configs alone were compared" if known_by else "nothing could be compared"
    mend = "Pass processing_class=tokenizer to the trainer, and save the teacher's tokenizer beside its weights."
    return [warning("tokens", compared, mend)]


def pad_id_of(tokenizer: Any, student: nn.Module) -> int | None:
    """The padding token, by the tokenizer or by the student's config."""
    pad_id = getattr(tokenizer, "pad_token_id", None)
    pad_id = getattr(getattr(student, "config", None), "pad_token_id", None) if pad_id is None else pad_id
    return pad_id if isinstance(pad_id, int) else None


def check_student_ids(student: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raises ValueError where an id of the batch has no row in the student's embedding."""
    rows, ids = vocabulary_rows(student, measured=True), batch.get("input_ids")
    if rows is None or not isinstance(ids, Tensor) or ids.is_floating_point():
        return
    wrong = ids[(ids < 0) | (ids >= rows)]
    if wrong.numel():
        mend = "Call student.resize_token_embeddings(len(tokenizer)), or take the student's own tokenizer."
        expected = f"0 to {rows - 1}, the rows of the student's embedding"
        fail("input_ids", f"{int(wrong[0])} in the batch", expected, mend)


def about_labels(
    classes: int | None, head: Head, objective: Objective, batch: Mapping[str, Any], pad_id: int | None
) -> list[Finding]:
    """Which share of the batch has a label, of which classes; and settings that do not go with it.

    Args:
        classes: how many the student's logits have; None where that is not known.

    Raises:
        ValueError, TypeError: labels out of range or of another dtype, as training would.
    """
    targets, alpha = head.targets(batch), objective.alpha
    if targets is not None:
        head.check_labels(targets, classes)
    counts = objective.count(head, batch)
    rows, hard = int(counts.rows), float(counts.hard)
    if targets is None or hard == 0:
        if alpha == 0:
            return [error("labels", "no row has one, and kd_alpha is 0: there is nothing to learn", "Raise kd_alpha.")]
        found = "no row of the batch has one" if targets is not None else "the batch has none"
        if alpha == 1:
            return [ok("labels", f"{found}; the loss is the teacher's alone")]
        return [warning("labels", f"{found}: the loss is {alpha:g} times the soft loss", "Set kd_alpha to 1.")]
    if not head.token_level:
        return _row_labels(head, objective, targets, classes, rows, hard)
    found = f"{hard:.0f} of {targets.numel()} positions have one"
    made_at = head.made_at(batch, targets) if head.shifted else None
    at_padding = 0 if made_at is None else int(((targets != IGNORE_INDEX) & ~made_at).sum())
    if at_padding:
        found += f"; {at_padding} first ones of a text are predicted before it: as upstream, the hard loss counts them"
    none = int((targets == IGNORE_INDEX).all(-1).sum())
    findings = []
    if none and objective.positions == "labels":
        mend = 'Set kd_positions to "attended" to have a soft loss there.'
        findings.append(warning("labels", f"{found}; {none} of {rows} rows have none at all", mend))
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if head.encoder_decoder:
        stray = 0 if pad_id is None else int((targets == pad_id).sum())
    else:
        both = isinstance(mask, Tensor) and isinstance(labels, Tensor) and mask.shape == labels.shape
        stray = int(((labels != IGNORE_INDEX) & (mask == 0)).sum()) if both else 0  # type: ignore[union-attr]
    if stray:
        mend = f"Let the collator write {IGNORE_INDEX} there."
        findings.append(warning("labels", f"{found}, {stray} of them at padding", mend))
    findings = findings or [ok("labels", found)]
    if objective.reduction == "batchmean":
        larger = float(divide(torch.as_tensor(float(counts.soft)), rows))
        found = f"batchmean sums over the tokens of a row: the loss is about {larger:.0f} times the stock Trainer's"
        mend = 'Set {"kd_reduction": "tokenmean"} for its scale and its learning rates.'
        findings.append(warning("reduction", found, mend))
    return findings


def _row_labels(
    head: Head, objective: Objective, targets: Tensor, classes: int | None, rows: int, hard: float
) -> list[Finding]:
    found = f"{hard:g} of {rows} rows have one"
    if head.softmax:
        seen = targets[targets != IGNORE_INDEX].unique().tolist()
        of = "" if classes is None else f" of {classes}"
        found += f"; {len(seen)}{of} classes in this batch: {', '.join(map(str, seen[:8]))}"
        found += ", ..." if len(seen) > 8 else ""
    if hard < rows and objective.reduction == "batchmean" and objective.alpha < 1:
        mend = 'Set {"kd_reduction": "tokenmean"} to divide the hard loss by the labelled rows alone.'
        return [warning("labels", f"{found}; the hard loss is divided by all rows", mend)]
    return [ok("labels", found)]


def about_lengths(
    student: nn.Module, teacher: nn.Module | None, head: Head, tokenizer: Any, batch: Mapping[str, Any]
) -> list[Finding]:
    """Rows of the batch beside the positions that the models have and the length at which texts are cut."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return []
    theirs = batch.get(TEACHER_PREFIX + "input_ids", ids)
    sides = [("student", student, ids), *([] if teacher is None else [("teacher", teacher, theirs)])]
    findings, known = [], {}
    for side, model, read in sides:
        positions, learned = positions_of(model)
        if positions is None:
            continue
        known[side] = positions
        longest = _longest(read, head, batch)
        if longest <= positions:
            continue
        found = f"a row of {longest} positions; the {side} has {positions}"
        if learned:
            mend = f"Cut the texts: max_length={positions}, truncation=True in the tokenizer's call."
            findings.append(error("lengths", found, mend))
        else:
            mend = f"Cut the texts to {positions}, or take a {side} made for longer ones."
            findings.append(warning("lengths", f"{found} and was never trained beyond", mend))
    limit = getattr(tokenizer, "model_max_length", None)
    limit = limit if isinstance(limit, int) and 0 < limit < 10**9 else None
    least = min(known.values(), default=None)
    if limit is not None and least is not None and limit > least and not findings:
        mend = f"Set tokenizer.model_max_length to {least}."
        findings.append(warning("lengths", f"the tokenizer cuts texts at {limit} tokens, a model has {least}", mend))
    whole = isinstance(mask, Tensor) and mask.shape == ids.shape
    lengths = mask.sum(-1) if whole else torch.full((ids.shape[0],), ids.shape[1])  # type: ignore[union-attr]
    shortest, longest = int(lengths.min()), int(lengths.max())
    at_end = int((lengths == longest).sum())
    at_limit = longest in {limit, *known.values()}
    # Blocks of running text are all of one length, and nothing of them is cut off.
    cut = at_limit and not head.over_tokens if shortest == longest else at_limit or longest >= _CUT_FROM
    if cut and at_end >= 2 and 4 * at_end >= len(lengths) and not findings:
        found = f"{at_end} of {len(lengths)} rows have exactly {longest} tokens: they were probably cut"
        mend = "Raise max_length if the models have the positions, or leave it if the start of a text is enough."
        findings.append(warning("lengths", found, mend))
    has = "".join(f", the {side} has {positions} positions" for side, positions in known.items())
    found = f"rows of {shortest} to {longest} tokens, padded to {ids.shape[1]}"
    if "position_ids" in batch:
        found = f"texts of up to {_longest(ids, head, batch)} tokens in rows of {ids.shape[1]}"
    return findings or [ok("lengths", found + has)]


def _longest(ids: Tensor, head: Head, batch: Mapping[str, Any]) -> int:
    """The largest number of positions of a row; in a packed row they start again with every text."""
    positions, labels = batch.get("position_ids"), batch.get("labels")
    if isinstance(positions, Tensor) and positions.shape == ids.shape:
        return int(positions.max()) + 1
    decoded = labels.shape[1] if head.encoder_decoder and isinstance(labels, Tensor) else 0
    return max(ids.shape[1], decoded)


def about_images(student: nn.Module, teacher: nn.Module | None, batch: Mapping[str, Any]) -> list[Finding]:
    """Height and width of the images beside those that the configs name."""
    pixels = batch.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() < 4:
        return []
    theirs = batch.get(TEACHER_PREFIX + "pixel_values", pixels)
    findings = []
    for side, model, read in (("student", student, pixels), ("teacher", teacher, theirs)):
        size = getattr(getattr(model, "config", None), "image_size", None)
        wanted = (size, size) if isinstance(size, int) else tuple(size or ())
        got = tuple(read.shape[-2:])
        if len(wanted) == 2 and got != wanted:
            where = "pixel_values" if side == "student" else "teacher_pixel_values"
            mend = f"Give the {side} images from its own image processor, in the column {where}."
            found = f"{got[0]} x {got[1]}; the {side} was made for {wanted[0]} x {wanted[1]}"
            findings.append(warning("images", found, mend))
    return findings or [ok("images", f"{pixels.shape[-2]} x {pixels.shape[-1]}, as the configs say")]


def about_columns(
    dataset: Any, kept: Sequence[str] | None, batch: Mapping[str, Any], read: Iterable[str], pad_id: int | None
) -> list[Finding]:
    """What upstream removes, what neither model reads, and a mask that is missing.

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
    findings = [ok("columns", found)]
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and "attention_mask" not in batch and pad_id is not None and bool((ids == pad_id).any()):
        found = f"there is no attention_mask, and input_ids hold the padding token ({pad_id}): it is read as text"
        findings.append(warning("columns", found, "Keep the attention_mask of the tokenizer in the dataset."))
    return findings


def about_settings(args: Any, head: Head, objective: Objective) -> list[Finding]:
    """Settings that are allowed and rarely meant."""
    findings = []
    if head.tempered and objective.alpha > 0 and not 1 <= objective.temperature <= 20:
        effect = "sharpens" if objective.temperature < 1 else "flattens almost wholly"
        found = f"kd_temperature {objective.temperature:g} {effect} both distributions"
        findings.append(warning("temperature", found, "Take one from 1 to 20."))
    best = getattr(args, "metric_for_best_model", None)
    if getattr(args, "load_best_model_at_end", False) and best in (None, "loss", "eval_loss"):
        mend = 'Set metric_for_best_model to "hard_loss" or your own metric if the task alone shall decide.'
        findings.append(ok("best model", "chosen by eval_loss, the mixture of hard and soft loss", mend))
    return findings


def about_path(fit: Fit, student: nn.Module, wanted: str) -> list[Finding]:
    """Whether the loss is computed with or without logits and why; and what else the first look noted."""
    path = [note for note in fit.notes if note.startswith(("full logits", "the loss is computed inside"))]
    others = [ok("note", note) for note in fit.notes if note not in path]
    if path:
        return [ok("loss path", path[-1]), *others]
    rows = vocabulary_rows(student, written=True) if fit.head.over_tokens else None
    if wanted == "full":
        why = "kd_loss_implementation asks for them"
    elif not fit.head.over_tokens:
        why = f"the task {fit.head.name} has few classes"
    elif rows is not None and rows < SMALL_VOCABULARY:
        why = f"a vocabulary of {rows:,} ids is small"
    else:
        why = "there is no teacher in the loss"
    return [ok("loss path", f"full logits: {why}"), *others]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
