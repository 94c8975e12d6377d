"""Which attention heads, FFN neurons, hidden channels and layers of a model matter on calibration batches.

For: `student_from_teacher`, which keeps the most important ones. Widths need a known layout (`_LAYOUTS`); the influence
of layers is measured in every model. Nothing is trained here.
Shapes: B rows, S positions, H hidden size, U units: the heads of an attention or the neurons of an FFN.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..tasks import same_random_numbers, unchanged_modes
from ..validation import fail

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Layout(NamedTuple):
    """Names of the modules inside a layer, as patterns; the group in brackets is the attention that a head belongs to.

    Args:
        heads_in: compute the heads (query, key, value) or hold a number for each. heads_out: reads their outputs.
        neurons_in, neurons_out: the same for the neurons of the FFN.
        neurons: the fields of the config that count them.
        head_size: the field of the config with a head's size; None: hidden size / number of heads.
        fused: `heads_in` computes this many blocks of all heads, one behind the other.
    """

    heads_in: str
    heads_out: str
    neurons_in: str
    neurons_out: str
    neurons: tuple[str, ...] = ("intermediate_size",)
    head_size: str | None = None
    fused: int = 1


_BERT = _Layout(
    r"((?:cross)?attention)\.self\.(?:query|key|value)",
    r"((?:cross)?attention)\.output\.dense",
    r"intermediate\.dense",
    r"output\.dense",
)
_LLAMA = _Layout(
    r"(self_attn)\.[qkv]_proj",
    r"(self_attn)\.o_proj",
    r"mlp\.(?:gate|up)_proj",
    r"mlp\.down_proj",
    head_size="head_dim",
)
# By `model_type` of the config.
_LAYOUTS = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": _Layout(
        r"(attention)\.[qkv]_lin", r"(attention)\.out_lin", r"ffn\.lin1", r"ffn\.lin2", ("hidden_dim",)
    ),
    "gpt2": _Layout(r"(attn)\.c_attn", r"(attn)\.c_proj", r"mlp\.c_fc", r"mlp\.c_proj", ("n_inner",), fused=3),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    "vit": _Layout(r"(attention)\.[qkv]_proj", r"(attention)\.o_proj", r"mlp\.fc1", r"mlp\.fc2"),
    "t5": _Layout(
        r"layer\.\d\.(\w+)\.(?:[qkv]|relative_attention_bias)",
        r"layer\.\d\.(\w+)\.o",
        r"layer\.\d\.DenseReluDense\.wi(?:_\d)?",
        r"layer\.\d\.DenseReluDense\.wo",
        ("d_ff",),
        "d_kv",
    ),
    "bart": _Layout(
        r"(self_attn|encoder_attn)\.[qkv]_proj",
        r"(self_attn|encoder_attn)\.out_proj",
        r"fc1",
        r"fc2",
        ("encoder_ffn_dim", "decoder_ffn_dim"),
    ),
}


class _Widths(NamedTuple):
    """The sizes of a model, with the names that callers give."""

    num_attention_heads: int
    intermediate_size: int
    hidden_size: int
    key_value_heads: int
    head_size: int


class _Role(NamedTuple):
    """The units that a module computes, or `reads`: their name, their number in teacher and student, their blocks."""

    units: str
    total: int
    kept: int
    reads: bool
    blocks: int = 1

    def split(self, values: Tensor, axis: int) -> Tensor:
        """[..., size, ...] -> [..., blocks, units, size of a unit, ...]"""
        return values.unflatten(axis, (self.blocks, self.total, -1))


class _Importance(NamedTuple):
    """Scores: of units [U] by their name, of hidden channels [H], of layers by the path of their list."""

    units: dict[str, Tensor]
    hidden: Tensor | None
    layers: dict[str, Tensor]


class Pruning:
    """The widths of a student, and what of the teacher matters most.

    Args:
        model: the teacher.
        stacks: the paths of its lists of layers.
        calibration: a batch, or batches; read once, when something has to be chosen.
        widths: `num_attention_heads`, `intermediate_size`, `hidden_size` of the student; None: the teacher's.

    Raises:
        TypeError, ValueError: a width that is no whole number, is larger than the teacher's or does not fit its config;
            widths of a model whose layout is unknown; something to choose without `calibration`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stacks: Sequence[str],
        calibration: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None,
        widths: Mapping[str, int | None],
    ) -> None:
        self._model, self._stacks, self._calibration = model, tuple(stacks), calibration
        self._roles: dict[str, _Role] = {}  # by the path of their module
        self._fields: dict[str, int] = {}  # of the student's config, where a width changes
        given = {name: value for name, value in widths.items() if value is not None}
        if not given:
            return
        layout = _layout_of(model, *next(iter(given.items())))
        self._old = _widths_of(model.config, layout, given)
        self._new = _checked(model.config, layout, self._old, given)
        if self._new == self._old:
            return
        self._fields = _config_fields(model.config, layout, self._old, self._new)
        config = copy.deepcopy(model.config)
        self.shrink(config)
        _validate(config, given)
        self._roles = _find_roles(model, self._stacks, layout, self._old, self._new)
        self._batches()

    @property
    def narrows(self) -> bool:
        """Whether a width becomes smaller."""
        return bool(self._fields)

    def shrink(self, config: Any) -> None:
        """Sets the student's widths in its config."""
        for name, value in self._fields.items():
            setattr(config, name, value)

    def cut(self, name: str, weight: Tensor, shape: torch.Size | None) -> Tensor:
        """What the student, whose weight has this shape, keeps of the teacher's weight."""
        if not self.narrows or shape is None or weight.ndim != len(shape):
            return weight
        path, _, leaf = name.rpartition(".")
        role = self._roles.get(path)
        units_axis = None if role is None else _axis(self._model.get_submodule(path), leaf, role.reads)
        for axis, (old, new) in enumerate(zip(weight.shape, shape, strict=True)):
            if role is not None and axis == units_axis:
                kept = _top(self._importance.units[role.units], role.kept)
                places = role.split(torch.arange(old, device=weight.device), 0)[:, kept.to(weight.device)].flatten()
            elif (old, new) == (self._old.hidden_size, self._new.hidden_size) and old != new:
                places = _top(self._importance.hidden, new)
            else:
                continue
            weight = weight.index_select(axis, places.to(weight.device))
        return weight

    def most_influential(self, stack: str, count: int) -> list[int]:
        """The layers of a stack whose output differs most from their input."""
        influence = self._importance.layers[stack].clone()
        first, *others = (layer.state_dict().keys() for layer in _layers(self._model, stack))
        if others and first != others[0]:
            influence[0] = torch.inf  # T5's first layer holds the positions for all
        return _top(influence, count).tolist()

    @cached_property
    def _importance(self) -> _Importance:
        channels = self.narrows and self._new.hidden_size < self._old.hidden_size
        return _measure(self._model, self._stacks, self._roles, channels, self._batches())

    def _batches(self) -> Iterable[Mapping[str, Any]]:
        given = self._calibration
        expected = "a batch of the model's inputs, or several (a list, a DataLoader)"
        fix = "Pass DataLoader(dataset.select(range(64)), batch_size=8, collate_fn=your_collator)."
        if given is None:
            because = "what is kept is chosen by what it computes on them"
            fail("calibration", None, expected, fix, because=because)
        if isinstance(given, Mapping):
            return [given]
        if isinstance(given, str) or not isinstance(given, Iterable):
            fail("calibration", f"of type {type(given).__name__}", expected, fix, error=TypeError)
        return given


# ---- sizes ----


def _layout_of(model: PreTrainedModel, name: str, value: Any) -> _Layout:
    kind = model.config.model_type
    if kind not in _LAYOUTS:
        because = f"which weights of {type(model).__name__} ({kind}) hold its heads, neurons and channels is not known"
        fix = f"Prune its layers alone, with `layers`. The widths of these can be pruned: {', '.join(_LAYOUTS)}."
        fail(name, value, "None", fix, because=because)
    return _LAYOUTS[kind]


def _widths_of(config: Any, layout: _Layout, given: Mapping[str, Any]) -> _Widths:
    heads = [config.num_attention_heads, getattr(config, "decoder_attention_heads", config.num_attention_heads)]
    neurons = [getattr(config, name) or 4 * config.hidden_size for name in layout.neurons]  # GPT-2: None is 4 H
    for name, sizes in (("num_attention_heads", heads), ("intermediate_size", neurons)):
        if name in given and len(set(sizes)) > 1:
            because = f"encoder and decoder differ in it: {' and '.join(map(str, sizes))}"
            fail(name, given[name], "None", "Prune another size.", because=because)
    return _Widths(
        num_attention_heads=heads[0],
        intermediate_size=neurons[0],
        hidden_size=config.hidden_size,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads[0],
        head_size=getattr(config, layout.head_size or "", None) or config.hidden_size // heads[0],
    )


def _checked(config: Any, layout: _Layout, old: _Widths, given: Mapping[str, Any]) -> _Widths:
    """The student's widths; raises where they are no sizes, or the config cannot hold them."""
    for name, value in given.items():
        most = getattr(old, name)
        expected, fix = f"a whole number from 1 to {most}, the teacher's", f"Half of the teacher's is {most // 2}."
        if not isinstance(value, int) or isinstance(value, bool):
            fail(name, value, expected, fix, error=TypeError)
        if not 1 <= value <= most:
            fail(name, value, expected, fix)
    new = old._replace(**given)
    group = old.num_attention_heads // old.key_value_heads
    if new.num_attention_heads % group:
        because = f"{group} heads share one key and value, and are kept or dropped together"
        nearest = max(new.num_attention_heads // group, 1) * group
        expected = f"a multiple of {group}"
        fail("num_attention_heads", new.num_attention_heads, expected, f"Set {nearest}.", because=because)
    new = new._replace(key_value_heads=new.num_attention_heads // group)
    if layout.head_size is None and new.hidden_size != new.num_attention_heads * new.head_size:
        name = "hidden_size" if "hidden_size" in given else "num_attention_heads"
        heads = given.get("num_attention_heads", max(new.hidden_size // new.head_size, 1))
        because = f"a head has {new.head_size} channels and the config of {config.model_type} has no field for that"
        expected = f"hidden_size = {new.head_size} * num_attention_heads"
        fix = f"Set num_attention_heads={heads} and hidden_size={heads * new.head_size}."
        fail(name, given[name], expected, fix, because=because)
    return new


def _config_fields(config: Any, layout: _Layout, old: _Widths, new: _Widths) -> dict[str, int]:
    """The fields of the student's config, also those that it would otherwise derive from the hidden size."""
    fields = {"hidden_size": new.hidden_size, "num_attention_heads": new.num_attention_heads}
    if new.num_attention_heads != old.num_attention_heads and hasattr(config, "decoder_attention_heads"):
        fields["decoder_attention_heads"] = new.num_attention_heads
    if getattr(config, "num_key_value_heads", None) is not None:
        fields["num_key_value_heads"] = new.key_value_heads
    if layout.head_size is not None:
        fields[layout.head_size] = new.head_size
    for name in layout.neurons:
        changed = new.intermediate_size != old.intermediate_size
        fields[name] = new.intermediate_size if changed else getattr(config, name) or old.intermediate_size
    return fields


def _validate(config: Any, given: Mapping[str, Any]) -> None:
    """Raises where the config class itself rejects these sizes: a saved student could not be loaded."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        config.validate()
    except StrictDataclassError as error:
        name, value = next(iter(given.items()))
        reason = str(error.__cause__ or error).rstrip(".")
        fail(name, value, f"sizes that {type(config).__name__} accepts", "Choose sizes that fit.", because=reason)


# ---- weights ----


def _find_roles(
    model: PreTrainedModel, stacks: Sequence[str], layout: _Layout, old: _Widths, new: _Widths
) -> dict[str, _Role]:
    """The modules that compute or read units, by their path."""
    heads, neurons = (old.key_value_heads, new.key_value_heads), (old.intermediate_size, new.intermediate_size)
    kinds = [
        (layout.heads_in, *heads, False, layout.fused),
        (layout.heads_out, *heads, True, 1),
        (layout.neurons_in, *neurons, False, 1),
        (layout.neurons_out, *neurons, True, 1),
    ]
    inside = re.compile(rf"({'|'.join(map(re.escape, stacks))})\.(\d+)\.(.+)")
    roles: dict[str, _Role] = {}
    shared: dict[str, str] = {}
    for path, module in model.named_modules():
        place = inside.fullmatch(path)
        for pattern, total, kept, reads, blocks in kinds if place is not None else ():
            assert place is not None
            stack, layer, name = place.groups()
            found = re.fullmatch(pattern, name)
            if found is not None and total != kept:
                group = found[1] if found.re.groups else ""
                units = f"{stack}.{layer}.{group}"
                roles[path] = _Role(units, total, kept, reads, blocks)
                if isinstance(module, nn.Embedding):  # T5: one table of positions, a number for each head of all layers
                    shared |= {f"{stack}.{i}.{group}": units for i in range(len(_layers(model, stack)))}
    return {path: role._replace(units=shared.get(role.units, role.units)) for path, role in roles.items()}


def _axis(module: nn.Module, leaf: str, reads: bool) -> int | None:
    """The axis of a weight along which its module's units lie; None: of a bias behind the units."""
    from transformers.pytorch_utils import Conv1D

    if leaf == "bias":
        return None if reads else 0
    inputs_first = isinstance(module, (Conv1D, nn.Embedding))
    return 1 if reads != inputs_first else 0


def _top(scores: Tensor | None, count: int) -> Tensor:
    """The places of the `count` highest scores, ascending; the first of equal ones."""
    assert scores is not None
    return scores.argsort(descending=True, stable=True)[:count].sort().values


# ---- importance ----


class _Sums:
    """Sums over the rows of all batches, by the path of the module that they belong to; its methods are hooks."""

    def __init__(self, roles: Mapping[str, _Role]) -> None:
        self.roles = roles
        self.squares: dict[str, Any] = defaultdict(float)
        self.cosines: dict[str, Any] = defaultdict(float)
        self.masks: dict[bool, Tensor | None] = {}  # of the encoder or only stack, and of the decoder (True)

    def read(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        """Runs the model on a batch."""
        self.masks[False] = self.masks[True] = inputs.get("attention_mask")
        if model.config.is_encoder_decoder:
            labels = inputs.get("labels")
            self.masks[True] = inputs.get("decoder_attention_mask", None if labels is None else labels != -100)
        model(**inputs)

    def units(self, path: str, module: nn.Module, args: tuple) -> None:
        """What a module reads of each unit: its norm."""
        self._add(path, self.roles[path].split(_exact(args[0]), -1).norm(dim=-1).squeeze(-2))

    def channels(self, path: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        """What a norm gives for each channel."""
        if output.ndim == 3:  # else it norms the query or key of each head
            self._add(path, _exact(output).abs())

    def layer(self, path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """The cosine of a layer's input and output."""
        before, after = args[0] if args else kwargs["hidden_states"], output
        after = after if isinstance(after, Tensor) else after[0]
        cosine = nn.functional.cosine_similarity(_exact(before), _exact(after), dim=-1)
        counted = self._counted(path, cosine)
        self.cosines[path] += torch.stack([(cosine * counted).sum(), counted.sum()])

    def _counted(self, path: str, values: Tensor) -> Tensor:
        """1 for the positions [B, S] that are no padding."""
        shape, mask = values.shape[:2], self.masks["decoder" in path]
        if mask is None or mask.numel() != shape.numel():
            return values.new_ones(shape)
        return mask.reshape(shape).to(values)

    def _add(self, path: str, values: Tensor) -> None:
        """[B, S, U]: mean over the positions of a row, then the squares of the rows."""
        counted = self._counted(path, values)
        means = (values * counted[..., None]).sum(1) / counted.sum(1).clamp(min=1)[:, None]
        self.squares[path] += means.square().sum(0)


@torch.no_grad()
def _measure(
    model: PreTrainedModel,
    stacks: Sequence[str],
    roles: Mapping[str, _Role],
    with_channels: bool,
    batches: Iterable[Mapping[str, Any]],
) -> _Importance:
    """Runs the model over the batches, in eval mode, and leaves it and the random numbers as they were."""
    sums, handles, norms = _Sums(roles), [], []
    for path, module in model.named_modules():
        if path in roles and roles[path].reads:
            handles.append(module.register_forward_pre_hook(partial(sums.units, path)))
        if with_channels and "Norm" in type(module).__name__:
            handles.append(module.register_forward_hook(partial(sums.channels, path)))
            norms.append(path)
    layers = {stack: [f"{stack}.{i}" for i in range(len(_layers(model, stack)))] for stack in stacks}
    for path in itertools.chain(*layers.values()):
        hook = partial(sums.layer, path)
        handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    try:
        with unchanged_modes(model), same_random_numbers(model.device):
            model.eval()
            for batch in batches:
                sums.read(model, _inputs(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    if not sums.cosines:
        fail("calibration", "empty", "at least one batch", "Pass some rows of the training data.")
    scores = {path: values.sqrt().cpu() for path, values in sums.squares.items()}
    units = {role.units: torch.zeros(role.total) for role in roles.values()}  # cross-attention may not have run
    for path in scores.keys() & roles.keys():
        units[roles[path].units] = units[roles[path].units] + scores[path]
    channels = torch.stack([scores[path] for path in norms if path in scores]).sum(0) if with_channels else None
    influence = {}
    for stack, paths in layers.items():
        cosine, counted = torch.stack([sums.cosines[path].cpu() for path in paths]).unbind(-1)
        influence[stack] = 1 - cosine / counted
    if not all(torch.isfinite(each).all() for each in (*scores.values(), *influence.values())):
        fix = "Load the teacher in float32 or bfloat16, or check its weights."
        fail("calibration", "batches with activations that are not finite", "finite activations", fix)
    return _Importance(units, channels, influence)


def _inputs(model: PreTrainedModel, batch: Any) -> dict[str, Any]:
    """The batch on the model's device."""
    if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
        shown, fix = f"of {type(batch).__name__} without tensors", "Make batches of the rows with your data collator."
        fail("calibration", shown, "batches: dicts of tensors", fix, error=TypeError)
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _layers(model: nn.Module, stack: str) -> list[nn.Module]:
    return list(model.get_submodule(stack).children())


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
