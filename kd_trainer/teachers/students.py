"""A student made of its teacher's weights: fewer hidden layers, and fewer heads, neurons and channels in them.

For: a teacher without a student yet; a student that starts from the teacher's weights needs fewer steps than
one drawn at random. Leaves training to `trainer.py`, and what matters most to `pruning.py`.
Works for any transformers model whose config counts the entries of one stack of layers (decoder-only, encoder-only,
vision) or of two (encoder-decoder): the stacks are found in the model, there is no table of architectures for them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..tasks import sentence_folder_of
from ..validation import fail, message, quoted
from .pruning import Pruning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What configs call a number of layers: num_hidden_layers, n_layer, encoder_layers, num_decoder_layers, ...
_COUNT = re.compile(r"(num_|n_)?((hidden|encoder|decoder)_)?(layers?|blocks?)")
# Lists of a config with one entry a layer: layer_types, no_rope_layers, attention_layers, activation_sparsity_pattern.
_PER_LAYER = re.compile(r".*(layer|block|pattern).*")
# Attributes of a layer that are switched at run time and do not change what it computes.
_SWITCHES = frozenset({"training", "gradient_checkpointing"})

# GPT-2's: the one computation by place that no attribute of a layer shows.
_SCALED_BY_PLACE = "scale_attn_by_inverse_layer_idx"


class _Stack(NamedTuple):
    """A `ModuleList` of layers: its path in the model, its length, the fields of the config that count it."""

    path: str
    length: int
    counts: tuple[str, ...]

    @property
    def is_decoder(self) -> bool:
        return "decoder" in self.path


def student_from_teacher(
    teacher: PreTrainedModel | str | Path,
    *,
    layers: str | Sequence[int] = "every_1",
    decoder_layers: str | Sequence[int] | None = None,
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
    hidden_size: int | None = None,
    calibration: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
) -> PreTrainedModel:
    """A model of the teacher's class with the chosen layers of the teacher, narrower if asked, and the rest copied.

    Embeddings, final norm, head, biases and buffers are copies (tied weights stay tied); the config counts the layers
    that are left, and its per-layer lists (`layer_types`, `no_rope_layers`) keep their entries. The teacher is not
    changed and shares no memory with the student. Saved with `save_pretrained` the student is an ordinary checkpoint.

    A smaller width keeps what is most active on the calibration batches: the FFN neurons of a layer by their value
    behind the non-linearity, its heads by the norm of their output, hidden channels (the same ones in all layers) by
    the outputs of the norms; absolute values, the mean over the positions of a row, L2 over the rows. Kept weights are
    copied as they are. Known are BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3 (text),
    ViT, T5 and BART.

    Args:
        teacher: a transformers model, or the folder or hub name of one (loaded with the class that its config names).
        layers: indices of the layers to keep, 0 for the first, ascending; or "every_k" with k >= 1: about n / k of n
            layers (rounded up), evenly spread from the first to the last, both of which are kept wherever two or more
            are left; "every_2" of 12 keeps 0, 2, 4, 7, 9, 11, as DistilBERT does; or "influence_n": the n layers whose
            output is least similar to their input (1 - cosine, mean over the calibration's positions).
        decoder_layers: the same for the decoder of an encoder-decoder, whose encoder `layers` then means; default
            None: `layers` for both.
        num_attention_heads: of each attention of the student; None: the teacher's. With grouped-query attention a
            multiple of the heads that share a key and value. BERT, RoBERTa, DistilBERT, GPT-2, ViT and BART have no
            field for the size of a head: `hidden_size` is pruned with it, in the same proportion.
        intermediate_size: the number of FFN neurons of each layer; None: the teacher's.
        hidden_size: the number of channels between the layers; None: the teacher's.
        calibration: a batch of the model's inputs, or several (a list, a `DataLoader` with the data's collator); some
            hundred rows of the training data. Padding is not counted. Needed for a smaller width and "influence_n".

    Returns:
        The student, in eval mode and trainable as `from_pretrained` leaves it, with the teacher's dtypes, device and
        generation config. With all layers kept its outputs are the teacher's, bit for bit.

    Raises:
        TypeError: `teacher` is no transformers model (a PEFT wrapper: merge it first), or `layers` is of another type.
        ValueError: an index out of range, twice or out of order; no layer at all; another word than "every_k"; a
            quantised teacher; a model whose layers do not follow from its config, or change with their place; a width
            that is larger than the teacher's, does not fit the config or has no calibration; an unknown layout.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> teacher = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2))
        >>> student = student_from_teacher(teacher, layers="every_2")
        >>> student.config.num_hidden_layers, teacher.config.num_hidden_layers
        (3, 6)
        >>> batch = {"input_ids": torch.arange(32).view(4, 8)}
        >>> student = student_from_teacher(teacher, layers="influence_4", intermediate_size=16, calibration=batch)
        >>> student.config.num_hidden_layers, student.config.intermediate_size
        (4, 16)

    Source:
        Sanh et al., "DistilBERT", arXiv 1910.01108; Shleifer and Rush, "Pre-trained Summarization Distillation",
        arXiv 2010.13002; Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
        (Minitron), arXiv 2407.14679; Men et al., "ShortGPT", arXiv 2403.03853.
    """
    model = _load(teacher) if isinstance(teacher, (str, Path)) else teacher
    _check_teacher(model)
    stacks = _find_stacks(model)
    if decoder_layers is not None and len(stacks) == 1:
        because = f"{type(model).__name__} has one stack of layers, {stacks[0].path}"
        fail("decoder_layers", repr(decoder_layers), "None", "Choose its layers with `layers`.", because=because)
    widths = {
        "num_attention_heads": num_attention_heads,
        "intermediate_size": intermediate_size,
        "hidden_size": hidden_size,
    }
    pruning = Pruning(model, [stack.path for stack in stacks], calibration, widths)
    kept = {}
    for stack in stacks:
        own = decoder_layers is not None and stack.is_decoder
        argument, spec = ("decoder_layers", decoder_layers) if own else ("layers", layers)
        kept[stack] = _indices(argument, spec, stack, pruning)
    student = _build(model, kept, pruning)
    narrow = _narrow_teacher(model, pruning) if pruning.narrows else model
    for stack, indices in kept.items():
        _check_places(narrow, student, stack, indices)
    return student


def _load(path: str | Path) -> PreTrainedModel:
    """The model at `path`, with the class that its config names; no remote code runs."""
    import transformers

    try:
        named = transformers.AutoConfig.from_pretrained(path).architectures or []
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        expected = f"a transformers model, or the folder or hub name of one ({reason})"
        raise type(error)(
            message("teacher", repr(str(path)), expected, "Check the path for a typing error.")
        ) from error
    model_class = next((cls for name in named if (cls := getattr(transformers, name, None)) is not None), None)
    if model_class is None:
        because = f"its config names the architectures {named}"
        fix = "Load it with its own class and pass the model."
        fail("teacher", repr(str(path)), "a checkpoint of a class of transformers", fix, because=because)
    return model_class.from_pretrained(path)


def _check_teacher(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        fix = "Give a transformers model, a folder or a hub name; of a PEFT model, `model.merge_and_unload()`."
        fail("teacher", type(model).__name__, "a PreTrainedModel or a path", fix, error=TypeError)
    if getattr(model, "quantization_method", None) is not None:
        fix = "Load the teacher without quantization_config for this; the trainer may then use the quantised one."
        fail("teacher", f"quantised ({model.quantization_method})", "weights that can be trained", fix)
    if any(parameter.is_meta for parameter in model.parameters()):
        fix = "Load it without offloading (device_map) for this."
        fail("teacher", "a model with weights on the meta device", "weights in memory", fix)


def _find_stacks(model: PreTrainedModel) -> list[_Stack]:
    """The stacks of layers: the outermost `ModuleList`s whose length the config counts."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        # A list inside a layer (its experts, T5's sub-layers) is part of that layer.
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
            lists[path] = module
    stacks = []
    for path, layers in lists.items():
        names = _fields_of(model.config, path, _COUNT)
        counts = tuple(name for name in names if getattr(model.config, name) == len(layers))
        if counts and len(layers):
            stacks.append(_Stack(path, len(layers), counts))
    decoders = sum(stack.is_decoder for stack in stacks)
    if len(stacks) == 1 or (len(stacks) == 2 and decoders == 1):
        return stacks
    found = ", ".join(f"{path} ({len(layers)})" for path, layers in lists.items()) or "none"
    fail(
        "teacher",
        f"{type(model).__name__} with these lists of modules: {found}",
        "one list of layers (or an encoder's and a decoder's) whose length stands in the config",
        "Build the student from a config of your own and copy what you need.",
        because="which of them are its hidden layers cannot be told",
    )


def _fields_of(config: Any, path: str, pattern: re.Pattern) -> list[str]:
    """The fields of `config` with such a name that speak of the stack at `path`: a decoder may have its own."""
    names = [name for name in config.to_dict() if pattern.fullmatch(name)]
    own = [name for name in names if "decoder" in name]
    return own if own and "decoder" in path else [name for name in names if name not in own]


def _indices(argument: str, spec: Any, stack: _Stack, pruning: Pruning) -> list[int]:
    """The layers of a stack that `spec` keeps."""
    length = stack.length
    word = re.fullmatch(r"(every|influence)_([1-9]\d*)", spec) if isinstance(spec, str) else None
    if word is not None and word[1] == "influence" and int(word[2]) <= length:
        return pruning.most_influential(stack.path, int(word[2]))
    if word is not None and word[1] == "every":
        count = -(-length // int(word[2]))
        # Rounded to the nearest layer: the first, the last, and the others evenly between them.
        return [(2 * i * (length - 1) + count - 1) // (2 * max(count - 1, 1)) for i in range(count)]
    expected = f'ascending layer indices from 0 to {length - 1}, "every_k" with k >= 1, or "influence_n" up to {length}'
    if isinstance(spec, str):
        fail(argument, quoted(spec), expected, 'Write "every_2" for half of the layers.')
    whole = isinstance(spec, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in spec)
    if not whole:
        fail(argument, quoted(spec), expected, "Write the indices as a list, such as [0, 2, 5].", error=TypeError)
    indices = list(spec)
    if not indices:
        fail(argument, quoted(spec), expected, "Keep at least one layer.")
    outside = [i for i in indices if not 0 <= i < length]
    if outside:
        fail(
            argument,
            quoted(spec),
            expected,
            f"Leave out {outside[0]}.",
            because=f"the teacher has {length} layers there",
        )
    if indices != sorted(set(indices)):
        fail(argument, quoted(spec), expected, "Name every layer once, in the teacher's order.")
    return indices


def _config(model: PreTrainedModel, kept: dict[_Stack, list[int]], pruning: Pruning) -> Any:
    """The teacher's config for fewer layers and smaller widths."""
    config = copy.deepcopy(model.config)
    config._name_or_path = ""  # the student is not the checkpoint that the teacher came from
    for stack, indices in kept.items():
        for name in _fields_of(config, stack.path, _PER_LAYER):
            value = getattr(config, name)
            if isinstance(value, (list, tuple)) and len(value) == stack.length:
                setattr(config, name, type(value)(value[i] for i in indices))
        for name in stack.counts:
            setattr(config, name, len(indices))
    pruning.shrink(config)
    return config


def _build(model: PreTrainedModel, kept: dict[_Stack, list[int]], pruning: Pruning) -> PreTrainedModel:
    """A model of the smaller config, as `from_pretrained` would build it, with copies of the teacher's weights."""
    from transformers.initialization import no_init_weights

    with no_init_weights():  # every weight is copied: drawing them would cost time and shift the seed
        student: Any = type(model)(_config(model, kept, pruning))
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    weights = {
        new: pruning.cut(name, tensor.detach(), shapes.get(new)).clone()
        for name, tensor in model.state_dict().items()
        if (new := _new_name(name, kept)) is not None
    }
    wrong = [name for name in {**shapes, **weights} if name not in weights or shapes.get(name) != weights[name].shape]
    if wrong:
        fail(
            "layers",
            repr(list(kept.values()) if len(kept) > 1 else next(iter(kept.values()))),
            "layers that fit their new places in the student",
            "Keep the first layers, or others of the kind that the teacher has at those places.",
            because=f"these weights are missing, left over or of another shape: {', '.join(wrong[:4])}",
        )
    student.load_state_dict(weights, assign=True)  # keeps each weight's dtype, also where a teacher mixes them
    student.tie_weights()
    student.to(model.device)
    if model.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
    folder = sentence_folder_of(model)
    if folder is not None and not folder.has_weights:
        student.kd_sentence_folder = folder  # an embedding model is trained and saved with its teacher's pooling
    return student.eval()


def _narrow_teacher(model: PreTrainedModel, pruning: Pruning) -> PreTrainedModel:
    """A model with all layers of the teacher and the widths of the student, without weights."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(model.config)
    pruning.shrink(config)
    with torch.device("meta"), no_init_weights():
        return type(model)(config)


def _new_name(name: str, kept: dict[_Stack, list[int]]) -> str | None:
    """What the teacher's weight `name` is called in the student; None if it belongs to a layer that is left out."""
    for stack, indices in kept.items():
        if name.startswith(f"{stack.path}."):
            index, _, rest = name[len(stack.path) + 1 :].partition(".")
            return f"{stack.path}.{indices.index(int(index))}.{rest}" if int(index) in indices else None
    return name


def _check_places(model: PreTrainedModel, student: PreTrainedModel, stack: _Stack, indices: list[int]) -> None:
    """Raises ValueError where a layer would compute something else at its new place, with the same weights.

    An upstream class may derive from the place whether a layer attends locally, rotates positions or shares keys; what
    the config lists layer by layer moves along with the layer, what it counts by an interval does not.
    """
    if getattr(model.config, _SCALED_BY_PLACE, False) and indices != list(range(len(indices))):
        because = f"{_SCALED_BY_PLACE} of the config divides a layer's attention scores by its place"
        fail("layers", indices, "the first layers", "Keep the first layers.", because=because)
    for new, old in enumerate(indices):
        before, after = (
            dict(each.get_submodule(f"{stack.path}.{i}").named_modules()) for each, i in ((model, old), (student, new))
        )
        for path, module in after.items():
            for name, value in vars(module).items():
                was = vars(before[path]).get(name)
                if name.startswith("_") or name in _SWITCHES or not isinstance(value, (bool, int, float, str)):
                    continue
                renumbered = type(value) is int and type(was) is int and was - value == old - new
                if was != value and not renumbered:
                    fail(
                        "layers",
                        indices,
                        f"layers that compute the same at their new places in {stack.path}",
                        "Choose layers of the same kind as those that the teacher has at these places.",
                        because=f"{'.'.join(filter(None, (path, name)))} of layer {old} is {was!r} in the teacher and "
                        f"would be {value!r} at place {new}",
                    )
