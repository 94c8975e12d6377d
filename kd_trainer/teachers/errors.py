"""Checks of a batch for the teacher, and messages for a forward that failed.

For: `live.py`. Cheap checks run before each forward. The others name side, argument and fix of a failed one: pad
token, positions, image size, memory, missing columns.
Shapes: B rows, S positions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..tasks import front_positions, text_config, vocabulary_rows
from ..validation import Message, fail, message

_TABLE_OF_POSITIONS = re.compile(r"(.*\.)?(wpe|\w*position\w*)")
_OWN_COLUMNS = "Give it inputs of its own in teacher_* columns, or wrap it in a module that takes the student's."


def positions_of(model: nn.Module) -> tuple[int | None, bool]:
    """The most positions of a row (None: unknown), and whether a longer row fails (a learned table)."""
    limit, learned, _ = _positions(model)
    return limit, learned


def widest_input(model: nn.Module) -> int | None:
    """The most columns of ids that a model can take, padding included; None: no limit, or unknown.

    RoBERTa and its kin number the real tokens alone, so padding does not count there.
    """
    limit, learned, padding_counts = _positions(model)
    return limit - front_positions(model, {}) if limit is not None and learned and padding_counts else None


def _positions(model: nn.Module) -> tuple[int | None, bool, bool]:
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None, False, True
    usable, learned, padding_counts = limit, False, True
    for name, module in model.named_modules():
        # BART's table has two rows more; RoBERTa's rows begin after its padding.
        named = isinstance(module, nn.Embedding) and _TABLE_OF_POSITIONS.fullmatch(name)
        if named and limit <= module.num_embeddings <= limit + 8:
            learned = True
            if module.padding_idx is not None:
                padding_counts = False
                usable = min(usable, int(module.num_embeddings) - module.padding_idx - 1)
    return usable, learned, padding_counts


def check_widths(inputs: Mapping[str, Any], limit: int) -> None:
    """Raises ValueError where ids have more columns than the teacher has positions; reads shapes only."""
    if "position_ids" in inputs:  # packed rows begin again
        return
    for name in ("input_ids", "decoder_input_ids"):
        ids = inputs.get(name)
        if isinstance(ids, Tensor) and ids.dim() >= 2 and ids.shape[-1] > limit:
            expected = f"at most {limit}, the positions of the teacher (max_position_embeddings)"
            fix = f"Cut the texts: max_length={limit}, truncation=True in the tokenizer's call."
            fail(name, f"of {ids.shape[-1]} positions", expected, f"{fix} Or take a teacher with more positions.")


def check_padding(teacher: nn.Module, inputs: Mapping[str, Any], student_pad: int | None) -> None:
    """For classifiers that read a row at its last token: raises ValueError where the teacher cannot find that token.

    Args:
        student_pad: the student's pad_token_id, for the message.
    """
    forward = inspect.unwrap(type(teacher).forward)
    code = getattr(forward, "__code__", None)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if code is None or "pad_token_id" not in code.co_names or not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    pad = getattr(text_config(teacher), "pad_token_id", None)
    value = "the id with which the collator pads" if student_pad is None else str(student_pad)
    fix = f'Set it in the teacher\'s config; by path: teacher_model_init_kwargs {{"pad_token_id": {value}}}.'
    argument = "teacher_model.config.pad_token_id"
    if pad is None:
        if len(ids) > 1:
            because = f"{type(teacher).__name__} reads the class at the last token that is no padding"
            fail(argument, None, f"{value}, as the rows are padded", fix, because=because)
        return
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return
    places = torch.arange(ids.shape[1], device=ids.device)
    found, real = (((kind * places).argmax(-1)) for kind in ((ids != pad).int(), (mask != 0).int()))
    if bool((found != real).any()):
        row = int((found != real).nonzero()[0])
        token = int(ids[row, found[row]]) if found[row] > real[row] else pad
        because = f"{type(teacher).__name__} would read row {row} at the token {int(found[row])}, not {int(real[row])}"
        fail(argument, pad, f"{token}, the id of the padding (attention_mask 0) in the batch", fix, because=because)


def check_ids(inputs: Mapping[str, Any], rows: int) -> None:
    """Raises ValueError where a token id has no row in the teacher's embedding of `rows` rows."""
    for name in ("input_ids", "decoder_input_ids"):
        ids = inputs.get(name)
        wrong = ids[(ids < 0) | (ids >= rows)] if isinstance(ids, Tensor) else torch.empty(0)
        if wrong.numel():
            fix = "Take a teacher whose tokenizer has that token, or leave the token (a pad token?) out of the data."
            fail(name, f"{int(wrong[0])} in a batch", f"0 to {rows - 1}, the rows of the teacher's embedding", fix)


def explain(teacher: nn.Module, inputs: Mapping[str, Any], error: Exception) -> Exception | None:
    """The error to raise from `error`, with which the teacher's forward failed; None where its message is enough.

    TypeError and ValueError stay, LookupError becomes ValueError, all others RuntimeError. Out of memory keeps its
    class, by which `auto_find_batch_size` knows it.
    """
    if error.args and isinstance(error.args[0], Message):
        return None
    try:
        if isinstance(error, ValueError):
            _check_image_size(teacher, inputs)
        rows, (limit, learned) = vocabulary_rows(teacher, measured=True), positions_of(teacher)
        if isinstance(error, IndexError) and rows is not None:
            check_ids(inputs, rows)
        if limit is not None and learned:
            check_widths(inputs, limit)
    except ValueError as reason:
        return reason
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return _out_of_memory(inputs, error)
    kind: type[Exception] = TypeError if isinstance(error, TypeError) else RuntimeError
    kind = ValueError if isinstance(error, (ValueError, LookupError)) else kind
    cause = (str(error).splitlines() or [""])[0]
    text = f"{type(error).__name__}: {cause}"
    columns = ", ".join(f"{name} {_shape(value)}" for name, value in inputs.items() if isinstance(value, Tensor))
    name = type(teacher).__name__
    missing = re.search(r"missing \d+ required [\w-]+ arguments?: (.*)", cause) if kind is TypeError else None
    surplus = re.search(r"unexpected keyword argument '(\w+)'", cause) if kind is TypeError else None
    shown, fix = f"a {name}, whose forward failed on {columns or 'the batch'} ({text})", _OWN_COLUMNS
    expected = "a model that reads the batch"
    if missing:
        shown = f"a {name}, whose forward needs {missing[1]}; the batch has {columns}"
        fix = f"Add it to the batch as a teacher_* column. ({text})"
    elif surplus:
        shown, expected = f"a {name}, part of which does not take {surplus[1]}", f"{expected} ({columns})"
        fix = f"Remove the column, or wrap the teacher in a module that leaves {surplus[1]} out. ({text})"
    return kind(message("teacher_model", shown, expected, fix))


def _shape(value: Tensor) -> str:
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _check_image_size(teacher: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError where the config of a teacher that failed has another image size."""
    size = getattr(getattr(teacher, "config", None), "image_size", None)
    pixels = inputs.get("pixel_values")
    wanted = [size, size] if isinstance(size, int) else list(size or ())
    if not isinstance(pixels, Tensor) or len(wanted) != 2 or list(pixels.shape[-2:]) == wanted:
        return
    fix = "Give the teacher images of its own size, from its image processor, in the column teacher_pixel_values."
    shown = f"images of {pixels.shape[-2]} x {pixels.shape[-1]}"
    fail("pixel_values", shown, f"{wanted[0]} x {wanted[1]} for the teacher", fix)


def _out_of_memory(inputs: Mapping[str, Any], error: Exception) -> Exception:
    """Keeps class and text of the error: `auto_find_batch_size` reads them."""
    shape = next((list(value.shape) for value in inputs.values() if isinstance(value, Tensor)), None)
    fix = (
        "Lower the batch size (gradient_accumulation_steps makes up for it), or load the teacher smaller: "
        'teacher_model_init_kwargs {"dtype": "bfloat16"}, or in 8 or 4 bits.'
    )
    shown = f"out of memory in its forward on a batch of {shape}"
    text = message("teacher_model", shown, "room for it beside the student", fix)
    return type(error)(f"{text} ({error})")
