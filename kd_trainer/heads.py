"""Task heads: which logits, which labels, which positions count, which shift, which hard loss.

For: the trainer, which knows no task. Leaves the soft loss to `losses.py` and the weighing to `objective.py`.
Shapes: B rows, S positions, C classes or vocabulary entries; logits are [B, C] or [B, S, C].
Imports: checks, reductions, transformers (the Auto classes, on use).

A new task is a new entry of `HEADS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import Shown, fail
from .reductions import IGNORE_INDEX

# Keys of a batch that are targets or bookkeeping, never a model's input.
NOT_INPUTS = frozenset(
    {"labels", "label", "label_ids", "shift_labels", "num_items_in_batch", "return_loss", "skip_logits"}
)
TEACHER_PREFIX = "teacher_"


@dataclass(frozen=True)
class Head:
    """How one kind of task is read.

    Args:
        name: its name in `HEADS` and in `kd_task`.
        token_level: logits are [B, S, C] and every position is a row of its own; else [B, C].
        shifted: the logits at position i are compared with the label at i + 1 (decoder-only language models).
        auto_classes: transformers' Auto classes whose models have this head; the first one loads a teacher by path.
    """

    name: str
    token_level: bool
    shifted: bool
    auto_classes: tuple[str, ...]

    @property
    def over_tokens(self) -> bool:
        """Whether the classes are a vocabulary: token ids, of which embeddings may hold more rows than there are."""
        return self.name.endswith("_lm")

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Labels aligned with the logits' positions ([B] or [B, S], `IGNORE_INDEX` where none), or None.

        `shift_labels` are used as they stand: whoever wrote them has already shifted.
        """
        if inputs.get("shift_labels") is not None:
            return inputs["shift_labels"]
        labels = inputs.get("labels")
        if labels is None:
            return None
        if labels.is_floating_point():
            fail(
                "labels",
                Shown(f"of dtype {labels.dtype} and shape {tuple(labels.shape)}"),
                f"integer class ids for the task {self.name!r}",
                "Cast the column to int64; multi-label and regression targets fit no head of this version.",
                error=TypeError,
            )
        if not self.token_level:
            return labels if labels.dim() == 1 else labels.reshape(-1)
        return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if self.shifted else labels

    def attended(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Boolean [B, S]: positions whose prediction is about a real token; None when every position counts.

        A prediction made AT padding is not counted either, so that padding on the left changes nothing. An
        encoder-decoder without `decoder_attention_mask` has its decoder's padding in the labels alone.
        """
        if not self.token_level:
            return None
        seq2seq = self.name == "seq2seq_lm"
        mask = inputs.get("decoder_attention_mask" if seq2seq else "attention_mask")
        if mask is None and seq2seq and (targets := self.targets(inputs)) is not None:
            return targets != IGNORE_INDEX
        if mask is None and not self.shifted:
            return None
        mask = torch.ones_like(self.sequences(inputs), dtype=torch.bool) if mask is None else mask.bool()
        if not self.shifted:
            return mask
        counted = mask[..., 1:] & mask[..., :-1]
        ids = inputs.get("position_ids")
        if ids is not None and ids.shape == mask.shape:  # in a packed row they start again with every sequence
            counted = counted & (ids[..., 1:] > ids[..., :-1])
        sequence, starts = inputs.get("seq_idx"), inputs.get("cu_seq_lens_q")
        if sequence is not None and sequence.shape == mask.shape:
            counted = counted & (sequence[..., 1:] == sequence[..., :-1])
        if starts is not None and mask.shape[0] == 1:  # where each sequence of the one long row begins, and the end
            counted[:, starts[1:-1].long() - 1] = False
        return F.pad(counted, (0, 1), value=False)

    def sequences(self, inputs: Mapping[str, Any]) -> Tensor:
        """A [B, S] tensor with one entry for each position of the logits of a token-level task."""
        targets = self.targets(inputs)
        if targets is not None:
            return targets
        if self.name == "seq2seq_lm" and inputs.get("decoder_input_ids") is not None:
            return inputs["decoder_input_ids"]
        ids = main_input(inputs)
        return ids if ids.dim() == 2 else ids[..., 0]

    def soft_mask(self, inputs: Mapping[str, Any], targets: Tensor | None, positions: str) -> Tensor | None:
        """Boolean mask of the positions counted for the soft loss, or None when all are.

        `positions` is "labels" (where there is a label) or "attended"; without labels it is always "attended".
        Rows of a classification task all count: an unlabelled row has a soft loss.
        """
        if not self.token_level:
            return None
        if positions == "labels" and targets is not None:
            return targets != IGNORE_INDEX
        return self.attended(inputs)

    def hard_loss_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Sum over labelled positions of the cross-entropy at temperature 1, in nats; float32 or wider inside.

        With label smoothing e: (1 - e) * CE + e * mean over classes of -log q, as transformers' `LabelSmoother`.
        """
        wide = logits if logits.dtype == torch.float64 else logits.float()
        try:
            return F.cross_entropy(
                wide.reshape(-1, wide.shape[-1]),
                targets.reshape(-1).long(),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
                label_smoothing=label_smoothing,
            )
        except IndexError as error:
            check_label_range(targets, wide.shape[-1])
            raise error

    def check_shapes(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor | None, common_ids: int | None = None
    ) -> None:
        """Raises ValueError where logits and labels do not fit each other or this head; never cuts or broadcasts.

        With `common_ids` (see `compatibility.common_ids`) the vocabularies may differ, if the smaller has so many ids.
        """
        dims = 3 if self.token_level else 2
        if student.dim() != dims:
            fail(
                "model",
                Shown(f"giving logits of shape {tuple(student.shape)}"),
                f"{dims} dimensions for the task {self.name!r}",
                "Set kd_task to the task that the model has.",
            )
        fits = teacher is None or teacher.shape == student.shape
        if teacher is not None and not fits and teacher.shape[:-1] == student.shape[:-1]:
            fits = common_ids == min(student.shape[-1], teacher.shape[-1])
        if teacher is not None and not fits:
            fail(
                "teacher_model",
                Shown(f"giving logits of shape {tuple(teacher.shape)}"),
                f"the student's shape {tuple(student.shape)}",
                "Take a teacher and a student with the same classes (or vocabulary) in the same order.",
                because="class i of one must mean class i of the other",
            )
        if targets is not None and targets.shape != student.shape[:-1]:
            fail(
                "labels",
                Shown(f"of shape {tuple(targets.shape)}"),
                f"{tuple(student.shape[:-1])}, one for each position of the logits {tuple(student.shape)}",
                "Check the label column and the data collator.",
            )


HEADS = {
    head.name: head
    for head in (
        Head(
            "classification",
            False,
            False,
            (
                "AutoModelForSequenceClassification",
                "AutoModelForImageClassification",
                "AutoModelForAudioClassification",
                "AutoModelForVideoClassification",
            ),
        ),
        Head("token_classification", True, False, ("AutoModelForTokenClassification",)),
        Head("causal_lm", True, True, ("AutoModelForCausalLM",)),
        # Before masked_lm: upstream lists BART, mBART and MVP under both, and they are trained as encoder-decoders.
        Head("seq2seq_lm", True, False, ("AutoModelForSeq2SeqLM",)),
        Head("masked_lm", True, False, ("AutoModelForMaskedLM",)),
    )
}


def auto_class_of(model: nn.Module) -> tuple[Head, Any] | None:
    """The head and the Auto class of transformers that `model` belongs to; None where no Auto class knows it."""
    import transformers

    config = getattr(model, "config", None)
    if not isinstance(config, transformers.PreTrainedConfig):
        return None
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    for head in HEADS.values():
        for name in head.auto_classes:
            auto_class = getattr(transformers, name)
            classes = auto_class._model_mapping.get(type(config), ())
            if isinstance(model, classes):
                # Speech models that are decoders alone are listed there too; they shift their labels.
                decoder = head.name == "seq2seq_lm" and not getattr(config, "is_encoder_decoder", True)
                return (HEADS["causal_lm"] if decoder else head), auto_class
    return None


def head_for(model: nn.Module, kd_task: str | None, shifts_labels: bool) -> Head | None:
    """The head of `model`: named by `kd_task`, known from its Auto class, or causal where upstream shifts its labels.

    None means that only the logits can tell (a plain module): see `head_from_logits`.
    """
    if kd_task is not None:
        return HEADS[kd_task]
    known = auto_class_of(model)
    if known is not None:
        return known[0]
    return HEADS["causal_lm"] if shifts_labels else None


def head_from_logits(logits: Tensor) -> Head:
    """[B, C] is a classification, [B, S, C] one classification a position (unshifted)."""
    names = {2: "classification", 3: "token_classification"}
    if logits.dim() not in names:
        fail(
            "teacher_model",
            Shown(f"giving logits of shape {tuple(logits.shape)}"),
            "[batch, classes] or [batch, sequence, classes]",
            "Return such logits, or set kd_task.",
        )
    return HEADS[names[logits.dim()]]


def logits_of(outputs: Any, argument: str) -> Tensor:
    """The logits in a model's outputs: a tensor, the key "logits", or the first floating [B, ..., C] of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        if isinstance(outputs.get("logits"), Tensor):
            return outputs["logits"]
        offer = "a mapping with the keys " + ", ".join(map(str, outputs))
    elif isinstance(outputs, (tuple, list)):
        for item in outputs:
            if isinstance(item, Tensor) and item.is_floating_point() and item.dim() >= 2:
                return item
        offer = "a tuple of " + ", ".join(type(item).__name__ for item in outputs)
    else:
        offer = type(outputs).__name__
    fail(
        argument,
        Shown(f"a model that returns {offer}"),
        'logits: a tensor, a tuple that holds it, or a mapping with the key "logits"',
        "Wrap the model so that its forward returns them.",
        error=TypeError,
    )


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


def check_label_range(targets: Tensor, num_classes: int) -> None:
    """Raises ValueError naming the first label outside 0 ... num_classes - 1 that is not `IGNORE_INDEX`."""
    flat = targets.reshape(-1)
    wrong = (flat != IGNORE_INDEX) & ((flat < 0) | (flat >= num_classes))
    if wrong.any():
        place = int(wrong.nonzero()[0])
        fail(
            "labels",
            Shown(f"{int(flat[place])} at position {place} of the batch"),
            f"0 to {num_classes - 1} (the logits have {num_classes} classes), or {IGNORE_INDEX} for no label",
            f"Mend the label column; an unlabelled row is {IGNORE_INDEX}, not -1.",
        )
