"""What of a batch goes into a model, and how many token ids the model knows.

For: the trainer, the teacher and the heads. Leaves targets to `heads.py`.
Shapes: B rows, S positions. Imports: checks, reductions, transformers (on use).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checks import Shown, fail
from .reductions import IGNORE_INDEX

# Keys of a batch that are targets or bookkeeping, never a model's input.
NOT_INPUTS = frozenset(
    {
        "labels",
        "label",
        "label_ids",
        "shift_labels",
        "start_positions",
        "end_positions",
        "num_items_in_batch",
        "return_loss",
        "skip_logits",
    }
)
TEACHER_PREFIX = "teacher_"
# A column of the dataset that says which row it is: a teacher cache is joined by it. No model reads it.
ROW_ID = TEACHER_PREFIX + "row_id"


def check_batch(batch: Any) -> None:
    """Raises where a batch is no mapping, or where its labels have a name under which nobody would look for them."""
    if not isinstance(batch, Mapping):
        mend = "Let the data collator return a dict."
        fail("inputs", Shown(f"a batch of type {type(batch).__name__}"), "a mapping of columns", mend, error=TypeError)
    misnamed = [name for name in ("label", "label_ids") if name in batch]
    if misnamed and "labels" not in batch:
        fail(
            "inputs",
            Shown(f"a batch with the column {misnamed[0]!r} and without 'labels'"),
            "the class ids in 'labels'",
            f"Rename the column {misnamed[0]!r}, or take the default data collator, which does.",
            because="the labels would be ignored",
        )


def main_input(inputs: Mapping[str, Any]) -> Tensor:
    """The first tensor of a batch that is an input of the student, [B, ...]."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name not in NOT_INPUTS and value.dim() and not name.startswith(TEACHER_PREFIX):
            return value
    fail("inputs", Shown(f"a batch with the keys {', '.join(inputs)}"), "at least one tensor", "Check the collator.")


def begins_next(inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """Boolean [B, S - 1]: whether the position behind begins another sequence of a packed row, by whatever of
    position_ids, seq_idx and cu_seq_lens_q tells it.

    Args:
        mask: [B, S], one entry for each position.
    """
    positions, sequence, starts = (inputs.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q"))
    found = torch.zeros_like(mask[..., 1:], dtype=torch.bool)
    if isinstance(positions, Tensor) and positions.shape == mask.shape:  # they start again with every sequence
        found = found | (positions[..., 1:] <= positions[..., :-1])
    if isinstance(sequence, Tensor) and sequence.shape == mask.shape:
        found = found | (sequence[..., 1:] != sequence[..., :-1])
    if isinstance(starts, Tensor) and mask.shape[0] == 1:  # where each sequence of the one long row begins, and the end
        found[:, starts[1:-1].long() - 1] = True
    return found


def vocabulary_rows(model: Any, *, written: bool = False) -> int | None:
    """How many token ids the model can read (rows of its embedding) or write (classes of its logits); None: unknown.

    Never from a weight's shape, since a sharded one does not tell.
    """
    try:
        layer = model.get_output_embeddings() if written else model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # of a module of the user's own, of a model without tokens
        layer = None
    rows = getattr(layer, "out_features" if written else "num_embeddings", None)
    rows = getattr(getattr(model, "config", None), "vocab_size", None) if rows is None else rows
    return rows if isinstance(rows, int) else None


def text_config(model: nn.Module) -> Any:
    """The config of the language model within, which is the model's own where it has no other part; None without."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def accepted_inputs(model: nn.Module) -> frozenset[str] | None:
    """Names that the model's forward takes; None where it takes any (`**kwargs` of a module of the user's own).

    For transformers' own `**kwargs` only the names that they document are passed: another model's column
    (`token_type_ids`) must not reach a model that would hand it on blindly.
    """
    from transformers import PreTrainedModel
    from transformers.utils.generic import TransformersKwargs

    unwrap: Any = getattr(model, "get_base_model", None)  # PEFT's wrapper takes anything
    model = unwrap() if unwrap is not None else model
    parameters = inspect.signature(model.forward).parameters
    named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    # A label without a default must be given, or the call fails: then it is an input like any other.
    names = {p.name for p in named if p.name not in NOT_INPUTS or p.default is p.empty}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        if not isinstance(model, PreTrainedModel) or not named:
            return None
        names |= set(TransformersKwargs.__annotations__) - NOT_INPUTS
    return frozenset(names)


def decoder_input_ids(student: nn.Module, labels: Tensor) -> Tensor | None:
    """The labels shifted right behind the start token, as the student's own forward makes them; None if unknown."""
    build: Any = getattr(student, "prepare_decoder_input_ids_from_labels", None)
    if build is not None:
        return build(labels=labels)
    config = getattr(student, "config", None)  # M2M100 (NLLB) and Blenderbot do it inside their forward
    start, padding = getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)
    if start is None or padding is None:
        return None
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORE_INDEX, padding)


def model_inputs(inputs: Mapping[str, Any], accepted: frozenset[str] | None) -> dict[str, Any]:
    """A new dict with what of the batch goes into a model: no targets, no `teacher_*` columns, no foreign names."""
    if accepted is None:
        return {k: v for k, v in inputs.items() if k not in NOT_INPUTS and not k.startswith(TEACHER_PREFIX)}
    return {k: v for k, v in inputs.items() if k in accepted}
