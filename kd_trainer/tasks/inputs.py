"""What of a batch goes into a model, and how many token ids the model reads.

For: the trainer, the teacher and the tasks. Leaves targets to `task.py`.
Shapes: B rows, S positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ..losses import IGNORE_INDEX
from ..validation import fail

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
        "chunk_ids",
        "student_tokens",
    }
)
TEACHER_PREFIX = "teacher_"
# A column of the student, and with the prefix one of the teacher: the number of the text chunk that each token is in.
CHUNK_IDS = "chunk_ids"
# A column that marks the tokens that the student has generated, of rows without labels: see `teachers/sequences.py`.
STUDENT_TOKENS = "student_tokens"
# A column of the dataset with the number of the row, by which a teacher cache is joined. No model reads it.
ROW_ID = TEACHER_PREFIX + "row_id"
# The column that selects the teachers of a row among several, by number or name.
TEACHER_ID = TEACHER_PREFIX + "id"


class WithTeacherColumns(list):
    """Names of columns, and every `teacher_*` one, with the chunk ids beside them."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or str(name).startswith((TEACHER_PREFIX, CHUNK_IDS))


def student_columns(kept: list[str] | None, student: nn.Module) -> list[str]:
    """The columns that upstream keeps for the student's forward, and those of a forward that names none."""
    kept = kept or []
    return [*kept, *sorted(accepted_inputs(student) - set(kept))] if takes_features(student) else kept


def teacher_columns(kept: list[str], accepted: Iterable[str] = (), of: Iterable[str] = ()) -> list[str]:
    """The kept columns with those for the teacher, which upstream would remove.

    Args:
        accepted: inputs of the teacher; it may also have them as `teacher_*`.
        of: columns of a dataset: every `teacher_*` one of them.
    """
    names = {*accepted, *(TEACHER_PREFIX + name for name in accepted), ROW_ID, CHUNK_IDS}
    names.update(name for name in of if name.startswith(TEACHER_PREFIX))
    return [*kept, *sorted(names - set(kept))]


def check_batch(batch: Any) -> None:
    """Raises where a batch is no mapping, or where its labels have a name under which nobody would look for them."""
    if not isinstance(batch, Mapping):
        fix = "Let the data collator return a dict."
        fail("inputs", f"a batch of type {type(batch).__name__}", "a mapping of columns", fix, error=TypeError)
    misnamed = [name for name in ("label", "label_ids") if name in batch]
    if misnamed and "labels" not in batch:
        fail(
            "inputs",
            f"a batch with the column {misnamed[0]!r} and without 'labels'",
            "the class ids in 'labels'",
            f"Rename the column {misnamed[0]!r}, or take the default data collator, which does.",
            because="the labels would be ignored",
        )


# Inputs with an entry for each row, the likeliest first; a vision-language batch has tokens for each row, and images
# or patches of images as they come.
_OF_ROWS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "features")
# Inputs whose first dimension may be another: broadcast, or of sequences, patches, heads or layers.
_NOT_OF_ROWS = frozenset(
    {"position_ids", "rope_deltas", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    | {"seq_idx", "attention_mask", "head_mask", "image_grid_thw", "video_grid_thw", "image_sizes"}
)


def main_input(inputs: Mapping[str, Any]) -> Tensor:
    """The tensor of a batch that is an input of the student with an entry for each row, [B, ...].

    By its name, wherever it stands in the batch; of other names the first that is no mask, no place in a sequence and
    not broadcast. A batch that holds mappings or lists is looked through.
    """
    own = {name: value for name, value in _tensors(inputs) if value.dim()}
    tokens = next((own[name] for name in _OF_ROWS if name in own), None)
    if tokens is not None and tokens is own.get("pixel_values") and tokens.dim() == 2:  # flattened patches
        tokens = own.get("image_grid_thw", tokens)
    if tokens is not None:
        return tokens
    others = [value for name, value in own.items() if name not in _NOT_OF_ROWS] or list(own.values())
    # A vector beside tensors of more dimensions, or one row beside several, is more likely something else.
    found = min(others, key=lambda value: (value.dim() == 1, len(value) == 1), default=None)
    if found is None:
        keys = ", ".join(inputs)
        fail("inputs", f"a batch with the keys {keys}", "at least one tensor", "Check the collator.")
    return found


def _tensors(inputs: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor that is an input of the student; inside mappings and lists too."""
    if isinstance(inputs, Tensor):
        yield name, inputs
    elif isinstance(inputs, Mapping):
        for key, value in inputs.items():
            if key not in NOT_INPUTS and not str(key).startswith(TEACHER_PREFIX):
                yield from _tensors(value, str(key))
    elif isinstance(inputs, (list, tuple)):
        for value in inputs:
            yield from _tensors(value, name)


def real_tokens(mask: Any, shape: Sequence[int]) -> Tensor | None:
    """`token_mask` for positions of this shape (B, S); None where it has others."""
    mask = token_mask(mask)
    if mask is None:
        return None
    rows = mask.expand(shape[0], -1) if len(mask) == 1 else mask
    return rows if tuple(rows.shape) == tuple(shape) else None


def token_mask(mask: Any) -> Tensor | None:
    """Boolean [B, S] of an attention mask: True at tokens, False at padding; None where there is none.

    Args:
        mask: [B, S]; or who reads whom, [B, S, S] or [B, heads, S, S], as booleans or as what is added to the scores;
            or a mapping of such, one for each kind of layer.
    """
    mask = _one_mask(mask)
    if mask is None:
        return None
    if mask.dim() > 2:  # a token reads itself
        mask = mask.diagonal(dim1=-2, dim2=-1)
        return mask >= 0 if mask.is_floating_point() else mask != 0
    return mask if mask.dtype == torch.bool else mask != 0


def _one_mask(mask: Any) -> Tensor | None:
    """[B, S] or [B, S, S]."""
    if isinstance(mask, Mapping):
        masks = [value for value in (mask.get("full_attention"), *mask.values()) if isinstance(value, Tensor)]
        mask = masks[0] if masks else None
    if not isinstance(mask, Tensor) or not 2 <= mask.dim() <= 4:
        return None
    mask = mask[:, 0] if mask.dim() == 4 else mask
    return mask if mask.dim() == 2 or mask.shape[-1] == mask.shape[-2] else None


def begins_next(inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """Boolean [B, S - 1]: whether the position behind begins another sequence of a packed row, by whatever of
    position_ids, seq_idx, cu_seq_lens_q and an attention mask of who reads whom tells it.

    Args:
        mask: [B, S], one entry for each position.
    """
    sequence, starts = inputs.get("seq_idx"), inputs.get("cu_seq_lens_q")
    found = torch.zeros_like(mask[..., 1:], dtype=torch.bool)
    positions = _positions(inputs, mask.shape)
    if positions is not None:  # they start again with every sequence
        found = found | (positions[..., 1:] <= positions[..., :-1])
    if isinstance(sequence, Tensor) and sequence.shape == mask.shape:
        found = found | (sequence[..., 1:] != sequence[..., :-1])
    if isinstance(starts, Tensor) and mask.shape[0] == 1:  # where each sequence of the one long row begins, and the end
        found[:, starts[1:-1].long() - 1] = True
    reads = _one_mask(inputs.get("attention_mask"))
    if reads is not None and reads.shape[1:] == (mask.shape[1],) * 2:
        before = reads.diagonal(offset=-1, dim1=-2, dim2=-1)
        found = found | (before < 0 if before.is_floating_point() else before == 0)
    return found


def tells_sequences(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch has something by which `begins_next` can tell sequences apart."""
    reads = _one_mask(inputs.get("attention_mask"))
    names = ("position_ids", "seq_idx", "cu_seq_lens_q")
    return (reads is not None and reads.dim() > 2) or any(isinstance(inputs.get(name), Tensor) for name in names)


def _positions(inputs: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
    """position_ids [B, S], broadcast ones too; of multimodal ones [4, B, S] those of the text."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor):
        return None
    if positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]
    positions = positions.unsqueeze(0) if positions.dim() == 1 else positions
    if positions.dim() != 2 or positions.shape[1] != shape[1] or len(positions) not in (1, shape[0]):
        return None
    return positions.expand(*shape)


def is_packed(inputs: Mapping[str, Any], shape: Sequence[int]) -> bool | Tensor:
    """Whether a row of the batch holds several sequences: a number where that is known, else a 0-dim tensor.

    Padding is none: with an attention mask real tokens alone count; without one, a sequence has two tokens or more,
    so that the equal positions which are usual at padding make none.

    Args:
        shape: (B, S) of the positions.
    """
    starts = inputs.get("cu_seq_lens_q")
    if isinstance(starts, Tensor) and shape[0] == 1 and starts.numel() > 2:
        return True
    mask = real_tokens(inputs.get("attention_mask"), shape)
    found: list[Tensor] = []
    positions, sequence = _positions(inputs, shape), inputs.get("seq_idx")
    if positions is not None and mask is not None:
        highest = torch.where(mask, positions, -1).cummax(-1).values
        found.append((mask[:, 1:] & (positions[:, 1:] <= highest[:, :-1])).any())
    elif positions is not None:
        grows = positions[:, 1:] > positions[:, :-1]
        begins = torch.cat([grows[:, :1], grows[:, 1:] & ~grows[:, :-1]], 1)
        found.append((begins.sum(-1) > 1).any())
    if isinstance(sequence, Tensor) and tuple(sequence.shape) == tuple(shape):
        counted, ends = sequence >= 0 if mask is None else mask, torch.iinfo(sequence.dtype)
        first = torch.where(counted, sequence, ends.max).amin(-1)
        found.append((torch.where(counted, sequence, ends.min).amax(-1) > first).any())
    reads = _one_mask(inputs.get("attention_mask"))
    if mask is not None and reads is not None and reads.dim() == 3:
        apart = begins_next({"attention_mask": reads}, mask)
        found.append((apart & mask[:, 1:] & mask[:, :-1]).any())
    return torch.stack(found).any() if found else False


def vocabulary_rows(model: Any, *, written: bool = False, measured: bool = False) -> int | None:
    """How many token ids the model can read (rows of its embedding) or write (classes of its logits); None: unknown.

    Never from a weight's shape, since a sharded one does not tell. With `measured` from the layers alone: a config may
    count something else, so that no refusal may rest on it.
    """
    try:
        layer = model.get_output_embeddings() if written else model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # of a module of the user's own, of a model without tokens
        layer = None
    rows = getattr(layer, "out_features" if written else "num_embeddings", None)
    if rows is None and not measured:
        rows = getattr(getattr(model, "config", None), "vocab_size", None)
    return rows if isinstance(rows, int) else None


# What of PEFT's prompt learning adds no positions to the logits: by its keys and values, or by its kind of model.
_NO_POSITIONS = ("PREFIX_TUNING", "CARTRIDGE")
_POSITIONS_IN_LOGITS = ("CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS")


def front_positions(model: Any, inputs: Mapping[str, Any]) -> int:
    """How many positions a model puts in front of those of its inputs: PEFT's virtual tokens, the image of a GIT.

    Its logits have these positions too; no label and no position of the other model belongs to them.
    """
    peft: Any = getattr(model, "active_peft_config", None)
    config: Any = getattr(model, "config", None)
    count = 0
    if getattr(peft, "is_prompt_learning", False):
        kinds = [str(getattr(kind, "value", kind)) for kind in (peft.peft_type, peft.task_type)]
        if kinds[0] not in _NO_POSITIONS and kinds[1] in _POSITIONS_IN_LOGITS:
            count = peft.num_virtual_tokens
    pixels = inputs.get("pixel_values")
    if getattr(config, "model_type", None) == "git" and isinstance(pixels, Tensor):
        vision = config.vision_config
        count += ((vision.image_size // vision.patch_size) ** 2 + 1) * (pixels.shape[1] if pixels.dim() == 5 else 1)
    return count


def behind_front(positions: Tensor, model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """[B, S, ...] of the inputs' own positions, of [B, front + S, ...]; what has no positions [B, C] stays."""
    if positions.dim() < 3:
        return positions
    count = front_positions(model, inputs)
    return positions[:, count:] if count else positions


def text_config(model: nn.Module) -> Any:
    """The config of the language model within, which is the model's own where it has no other part; None without."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


class Accepted(frozenset[str]):
    """Names that a model's forward takes as inputs: those it names, and whether it passes on any others.

    Attributes:
        others: a forward with `**kwargs` of the user's own takes every column but the targets. Default False.
        targets: columns that are no inputs: labels and bookkeeping.
        taken_targets: those of them that the forward takes nevertheless, for a loss of its own; None: any, `**kwargs`.
    """

    others: bool
    targets: frozenset[str]
    taken_targets: frozenset[str] | None

    def __new__(
        cls,
        names: Iterable[str],
        *,
        others: bool = False,
        targets: Iterable[str] = NOT_INPUTS,
        taken_targets: Iterable[str] | None = (),
    ) -> Accepted:
        made = super().__new__(cls, names)
        made.others, made.targets = others, frozenset(targets)
        made.taken_targets = None if taken_targets is None else frozenset(taken_targets)
        return made

    def take(self, name: str) -> bool:
        """Whether a column of this name goes into the model."""
        if name in self:
            return True
        return self.others and name not in self.targets and not name.startswith(TEACHER_PREFIX)

    def with_names(self, names: Iterable[str]) -> Accepted:
        """The same with further inputs."""
        return Accepted(self | set(names), others=self.others, targets=self.targets, taken_targets=self.taken_targets)

    def take_target(self, name: str) -> bool:
        """Whether the model's forward takes a column of targets of this name."""
        return self.taken_targets is None or name in self.taken_targets


# Upstream's models of two parts hand on what they do not name: to the encoder, or with this prefix to the decoder.
_COMPOSITE = ("EncoderDecoderModel", "VisionEncoderDecoderModel", "SpeechEncoderDecoderModel")
_DECODER_PREFIX = "decoder_"


def accepted_inputs(model: nn.Module, *, label_names: Iterable[str] = (), withheld: Iterable[str] = ()) -> Accepted:
    """Names of the columns that the model's forward takes as inputs.

    A forward of the user's own that takes `**kwargs` gets every column that is no target, as the stock Trainer passes
    it. For the `**kwargs` of transformers' own models only the names that they document are passed: another model's
    column (`token_type_ids`) must not reach a model that would hand it on blindly.

    Args:
        model: unwrapped; of a PEFT model the base counts, since the wrapper takes anything.
        label_names: columns that hold targets, beside those that upstream's names tell (`labels`, `class_labels`, ...).
        withheld: columns that `**kwargs` do not get, e.g. those that were kept for the teacher alone.
    """
    from transformers import PreTrainedModel
    from transformers.utils.generic import TransformersKwargs, find_labels

    model = _with_columns(model)
    unwrap: Any = getattr(model, "get_base_model", None)
    wrapper, model = model, unwrap() if unwrap is not None else model
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    targets = NOT_INPUTS | set(find_labels(type(model))) | set(label_names)
    # A label without a default must be given, or the call fails: then it is an input like any other.
    names = {name for name, p in named.items() if name not in targets or p.default is p.empty}
    if getattr(wrapper, "active_peft_config", None) is not None:  # task_ids of multitask prompts
        names |= set(inspect.signature(wrapper.forward).parameters) - targets - {"args", "kwargs"}
    open_ended = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    if not open_ended:
        return Accepted(names, targets=targets, taken_targets=named.keys() & targets)
    where = getattr(inspect.unwrap(model.forward), "__module__", None) or ""
    if not isinstance(model, PreTrainedModel) or not where.startswith("transformers.models."):
        return Accepted(names, others=True, targets={*targets, *withheld}, taken_targets=None)
    names |= set(TransformersKwargs.__annotations__) | _documented(open_ended[0].annotation)
    if type(model).__name__ in _COMPOSITE:
        names |= accepted_inputs(cast(nn.Module, model.encoder))
        names |= {_DECODER_PREFIX + name for name in accepted_inputs(cast(nn.Module, model.decoder))}
    return Accepted(names - targets, targets=targets, taken_targets=None)


def takes_features(model: Any) -> bool:
    """Whether it is a `SentenceTransformer`, whose forward takes one dict of columns."""
    names = ((cls.__module__.partition(".")[0], cls.__name__) for cls in type(model).__mro__)
    return ("sentence_transformers", "SentenceTransformer") in names


def _with_columns(model: Any) -> Any:
    """The module whose forward names the columns: the transformer in a `SentenceTransformer` or a `SentenceEncoder`."""
    inner = getattr(model, "transformers_model", None)
    return model if inner is None else _with_columns(inner)


def required_inputs(model: Any) -> frozenset[str]:
    """Names without which the forward cannot be called, but the decoder's inputs, which may be made of the labels."""
    model = _with_columns(model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty}
    return frozenset(named - {"decoder_input_ids"})


def check_required(side: str, model: nn.Module, batch: Mapping[str, Any], removed: Callable[[], list[str]]) -> None:
    """Raises ValueError where a batch lacks a column without which the forward of `side` cannot be called.

    Args:
        side: "student" or "teacher". removed: the columns of the data that upstream has removed.
    """
    missing = sorted(required_inputs(model) - batch.keys())
    if not missing:
        return
    there = ", ".join(name for name in batch if not name.startswith(TEACHER_PREFIX)) or "none"
    fix = f"Call that column {missing[0]!r} in the dataset, or in what the data collator returns."
    if lost := ", ".join(map(repr, removed())):
        fix = (
            f"remove_unused_columns has taken {lost} away, which that forward does not name: call the column "
            f"{missing[0]!r} in the dataset, or set remove_unused_columns to false and let the data collator do it."
        )
    expected = f"{', '.join(map(repr, missing))} too, which the forward of {type(model).__name__} cannot do without"
    fail("inputs", f"a batch that has {there} for the {side}", expected, fix)


def _documented(annotation: Any) -> set[str]:
    """The keys of `**kwargs: Unpack[SomeTypedDict]`."""
    return {name for part in get_args(annotation) for name in getattr(part, "__annotations__", {})}


def start_token(model: Any) -> int | None:
    """The id with which an encoder-decoder's decoder begins; None where there is none."""
    return _special_id(model, "decoder_start_token_id")


def _special_id(model: Any, name: str) -> int | None:
    """By the config, the config of the language model within (Florence-2, BLIP-2 with a T5), or that of generation."""
    configs = (getattr(model, "config", None), text_config(model), getattr(model, "generation_config", None))
    found = (getattr(config, name, None) for config in configs)
    return next((value for value in found if isinstance(value, int)), None)


def decoder_input_ids(student: nn.Module, labels: Tensor) -> Tensor | None:
    """The labels shifted right behind the start token, as the student's own forward makes them; None if unknown."""
    build: Any = getattr(student, "prepare_decoder_input_ids_from_labels", None)
    if build is not None:
        return build(labels=labels)
    # M2M100 (NLLB), Blenderbot and Whisper do it inside their forward.
    start, padding = start_token(student), _special_id(student, "pad_token_id")
    if start is None or padding is None:
        return None
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORE_INDEX, padding)


def model_inputs(inputs: Mapping[str, Any], accepted: Accepted) -> dict[str, Any]:
    """A new dict with what of the batch goes into a model: no targets, no `teacher_*` columns, no foreign names."""
    return {k: v for k, v in inputs.items() if accepted.take(k)}
