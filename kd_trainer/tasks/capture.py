"""Records what chosen layers of a model compute during one forward: hidden states, and queries, keys and values.

For: the feature terms (`kd_features`). Every attention implementation is recorded as it is: while a capture is open,
`AttentionInterface.get_interface` returns a function that records its arguments and calls the implementation, so that
the model computes bit for bit what it computes without. A model that calls no interface (DeBERTa-v2) is read at its
projections, which serve relations alone. Of an encoder-decoder the ENCODER is recorded: its positions are the tokens
of the inputs, it is where published results of these losses are, and a student made by dropping decoder layers
keeps it.
Letters: B rows, S positions, H hidden size, N heads, D size of a head.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from ..losses.features import Attention
from ..validation import fail
from .inputs import real_tokens, text_config

# Names of the projections to queries, keys and values, where a model calls no interface.
_PROJECTIONS = (("query_proj", "key_proj", "value_proj"), ("q", "k", "v"), ("query", "key", "value"))
# Names of lists of layers, where a model does not register the class of its layers.
_LISTS = ("layer", "layers", "h", "block", "blocks")
# Implementations whose mask is a tensor over the scores.
_PLAIN_MASKS = ("eager", "sdpa")
_LAYERDROPS = ("layerdrop", "encoder_layerdrop")
# What checkpointing and compilers put between a list and its layers.
_WRAPPERS = ("._checkpoint_wrapped_module", "._orig_mod")


# ---- layers ----


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of the model, from the first to the last; of an encoder-decoder those of its encoder.

    Args:
        model: unwrapped; or a module with a transformers model inside.

    Raises:
        ValueError: the model has no list of layers that is known, or several, or layers that share a module.
    """
    stack, config = _stack(model)
    named = dict(stack.named_modules())
    classes = _registered(stack)
    found = [name for name, module in named.items() if isinstance(module, classes)] if classes else []
    count = getattr(config, "num_hidden_layers", None)
    if not found:
        lists = [name for name, module in named.items() if isinstance(module, nn.ModuleList) and len(module) == count]
        lists = [name for name in lists if name.rpartition(".")[2] in _LISTS]
        found = [f"{name}.{index}" for name in lists for index in range(len(named[name]))]
    name = type(model).__name__
    if not found:
        _refuse(f"{name} has no list of layers that is known")
    if len({_unwrapped(name).rpartition(".")[0] for name in found}) > 1:
        _refuse(f"{name} has several lists of layers")
    if isinstance(count, int) and len(found) < count:
        _refuse(f"{name} computes {count} layers by {len(found)} shared modules")
    return [named[name] for name in found]


def layer_widths(model: nn.Module) -> list[int | None]:
    """H of the output of each layer, by the config; None where it does not give it."""
    count, (_, config) = len(layers_of(model)), _stack(model)
    if isinstance(getattr(config, "depths", None), (list, tuple)) and hasattr(
        config, "embed_dim"
    ):  # stages, each but the last halves the resolution
        return [config.embed_dim * 2 ** min(stage + 1, count - 1) for stage in range(count)]
    return [getattr(config, "hidden_size", None)] * count


def attended_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """Boolean [B, S] where the positions of a model's layers are tokens of its inputs; None where they are others.

    Rows of several sequences (multiple choice, [B, C, S]) are B * C here.
    """
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if not isinstance(tokens, Tensor):
        return None
    sizes = tokens.shape if "input_ids" in inputs else tokens.shape[:-1]
    shape, mask = (math.prod(sizes[:-1]), sizes[-1]), inputs.get("attention_mask")
    if len(sizes) > 2 and isinstance(mask, Tensor):
        mask = mask.reshape(shape)
    given = real_tokens(mask, shape)
    return torch.ones(shape, dtype=torch.bool, device=tokens.device) if given is None else given


def attended_frames(model: nn.Module, inputs: Mapping[str, Any], length: int) -> Tensor | None:
    """Boolean [B, length] of the frames of a speech model that hold samples which are no padding; None for all."""
    mask, (stack, _) = inputs.get("attention_mask"), _stack(model)
    named: Any = getattr(stack, "_get_feature_vector_attention_mask", None)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or named is None:
        return None
    return named(length, mask, add_adapter=False).bool()


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _stack(model: nn.Module) -> tuple[nn.Module, Any]:
    """The part of a model whose layers are captured, and its config."""
    from transformers import PreTrainedModel

    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        _refuse(f"{type(model).__name__} has no transformers model inside")
    stack: Any = inner
    if getattr(inner.config, "is_encoder_decoder", False):
        stack = inner.get_encoder()
    elif text_config(inner) is not inner.config:  # a vision-language model
        stack = inner.get_decoder()
    return stack, getattr(stack, "config", text_config(inner))


def _registered(stack: nn.Module) -> tuple[type, ...]:
    """Classes of the layers that give upstream's `output_hidden_states`."""
    from transformers import PreTrainedModel

    specs: list[Any] = []
    for module in stack.modules():
        if isinstance(module, PreTrainedModel) and not specs:
            given = (module.can_record_outputs or {}).get("hidden_states", [])
            specs = given if isinstance(given, list) else [given]
    classes = [getattr(spec, "target_class", spec) for spec in specs]
    return tuple(each for each in classes if isinstance(each, type))


def layer_pairs(which: Any, student: int, teacher: int) -> list[tuple[int, int]]:
    """The pairs (student layer, teacher layer) that `kd_feature_layers` names, counted from 0.

    Args:
        which: "last"; "uniform": every student layer i with the teacher's at the same depth, the last with the last;
            or pairs, in which -1 is the last layer.
        student, teacher: the numbers of layers.

    Raises:
        ValueError: a layer that does not exist, or a pair given twice.

    Example:
        >>> layer_pairs("uniform", 3, 12), layer_pairs("last", 3, 12), layer_pairs([[0, 2], [-1, -1]], 3, 12)
        ([(0, 3), (1, 7), (2, 11)], [(2, 11)], [(0, 2), (2, 11)])
    """
    if which == "last":
        return [(student - 1, teacher - 1)]
    if which == "uniform":
        return [(i, -(-(i + 1) * teacher // student) - 1) for i in range(student)]
    pairs = []
    for pair in cast(Sequence[Sequence[int]], which):
        for side, layer, count in zip(("student", "teacher"), pair, (student, teacher), strict=True):
            if not -count <= layer < count:
                fail(
                    "kd_feature_layers", which, f"{side} layers from 0 to {count - 1}, or -1 for the last",
                    f"Replace {layer}.", because=f"the {side} has {count} layers",
                )  # fmt: skip
        pairs.append((pair[0] % student, pair[1] % teacher))
    twice = [list(pair) for pair, count in Counter(pairs).items() if count > 1]
    if twice:
        fail("kd_feature_layers", which, "each pair once", f"Leave {twice[0]} out once.")
    return pairs


# ---- capture ----


class Captured:
    """What the chosen layers computed in a forward; read it after the forward.

    Args:
        model: unwrapped, for messages.
        layers: all of its layers. chosen: the indices of those that are recorded.

    Attributes:
        outputs: of each layer.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], chosen: Sequence[int]) -> None:
        self._name, self._config = type(model).__name__, text_config(model)
        self.outputs: dict[int, Any] = {}
        self._attention: dict[int, Attention] = {}
        self._projected: dict[int, dict[str, Tensor]] = {layer: {} for layer in chosen}
        self._unread: dict[int, str] = {}  # why the probabilities of a layer are unknown
        self._calls: Counter[int] = Counter()  # of the attention interface, by layer
        self._differentiates = self._reentrant = False
        self._thread = threading.get_ident()
        self._layer_of = {id(module): layer for layer in chosen for module in layers[layer].modules()}

    def hidden(self, layer: int) -> Tensor:
        """[B, S, H], the output of a layer.

        Raises:
            ValueError: the layer was not called, or its output has another form.
        """
        self._check_called(layer)
        hidden = self.outputs[layer]
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            shown = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            _refuse(f"layer {layer} of {self._name} returns {shown}, not hidden states [B, S, H]")
        return hidden

    def attention(self, layer: int, *, probabilities: bool = False) -> Attention:
        """The queries, keys and values of a layer.

        Args:
            probabilities: whether the mask and the scaling are needed too.

        Raises:
            ValueError: they could not be recorded; the message gives the reason.
        """
        hidden, where = self.hidden(layer), f"layer {layer} of {self._name}"
        if self._calls[layer] > 1:
            _refuse(f"{where} computes attention {self._calls[layer]} times", _NO_QKV)
        found = self._attention.get(layer)
        if found is None and len(self._projected[layer]) == 3:
            query, key, value = self._projected[layer].values()
            found = Attention(query, key, value)
            self._unread[layer] = "adds to its scores what is not recorded"
        if found is None:
            _refuse(f"{where} does not compute its attention by the AttentionInterface of transformers", _NO_QKV)
        shapes = {(len(x), x.shape[2]) for x in found[:3]}
        if shapes != {(len(hidden), hidden.shape[1])}:
            _refuse(f"{where} computes attention inside windows, or over other positions than its output has", _NO_QKV)
        if probabilities and layer in self._unread:
            _refuse(f"{where} {self._unread[layer]}", _NO_PROBABILITIES)
        return found

    def _check_called(self, layer: int) -> None:
        if self._reentrant:
            fail(
                "gradient_checkpointing_kwargs", "{'use_reentrant': True}", "{'use_reentrant': False} with kd_features",
                "Set use_reentrant to false.", because="reentrant checkpointing keeps no graph inside a layer",
            )  # fmt: skip
        if layer in self.outputs:
            return
        drops = [name for name in _LAYERDROPS if getattr(self._config, name, 0)]
        if drops:
            expected, fix = "0 with kd_features", f"Set {drops[0]} to 0 in the student's config."
            because = "a layer that is skipped has no features"
            fail(drops[0], getattr(self._config, drops[0]), expected, fix, because=because)
        _refuse(f"layer {layer} of {self._name} was not called")

    # ---- recording, during the forward: nothing is raised here, where a backend may hold gathered weights ----

    def begin(self, module: nn.Module, inputs: Any) -> None:
        """The hook in front of the model's forward."""
        self._differentiates = torch.is_grad_enabled()

    def _records(self) -> bool:
        """Whether this call is the forward's own: a recomputation in backward may be another thread's."""
        if threading.get_ident() != self._thread:
            return False
        self._reentrant |= self._differentiates and not torch.is_grad_enabled()
        return True

    def see_output(self, layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
        """The hook on a layer."""
        if self._records():
            self.outputs[layer] = output[0] if isinstance(output, tuple) else output

    def see_projection(self, layer: int, name: str, heads: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """The hook on a projection; its first call is for the tokens, others are for relative positions."""
        if self._records() and name not in self._projected[layer] and output.dim() == 3:
            self._projected[layer][name] = output.unflatten(-1, (heads, -1)).transpose(1, 2)

    def see_attention(
        self, implementation: str, module: nn.Module, qkv: Sequence[Tensor], args: Any, given: Any
    ) -> None:
        """A call of the attention interface."""
        layer = self._layer_of.get(id(module))
        if layer is None or not self._records():
            return
        self._calls[layer] += 1
        if self._calls[layer] > 1:
            return
        mask = args[0] if args else given.get("attention_mask")
        unread = None
        if implementation not in _PLAIN_MASKS:
            unread = f"uses {implementation}, whose mask is not recorded: set attn_implementation to sdpa"
        elif isinstance(mask, Tensor) and (mask.dim() != 4 or mask.shape[-1] != qkv[1].shape[2]):
            unread = "has a mask of another shape than its scores"
        elif given.get("s_aux") is not None:
            unread = "has attention sinks, which are not recorded"
        if unread is not None:
            self._unread[layer], mask = unread, None
        causal = given.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        self._attention[layer] = Attention(
            qkv[0], qkv[1], qkv[2], scaling=given.get("scaling"), mask=mask, bias=given.get("position_bias"),
            softcap=given.get("softcap"), causal=implementation != "eager" and bool(causal),
        )  # fmt: skip


@contextmanager
def capture(model: nn.Module, chosen: Sequence[int], *, attention: bool = True) -> Iterator[Captured]:
    """Records the chosen layers of `layers_of(model)` during the one forward inside.

    Args:
        model: unwrapped; the forward may be that of the wrapped one.
        chosen: indices of layers, counted from 0.
        attention: whether queries, keys and values are recorded beside the hidden states.
    """
    layers = layers_of(model)
    captured = Captured(model, layers, sorted(set(chosen)))
    hooks = [model.register_forward_pre_hook(captured.begin)]
    hooks += [layers[layer].register_forward_hook(partial(captured.see_output, layer)) for layer in set(chosen)]
    for layer in set(chosen) if attention else ():
        for name, module, heads in _projections(layers[layer]):
            hooks.append(module.register_forward_hook(partial(captured.see_projection, layer, name, heads)))
    try:
        with _recording(captured) if attention else nullcontext():
            yield captured
    finally:
        for hook in hooks:
            hook.remove()


def _projections(layer: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """(name, module, heads) of the projections of a layer, where it has one set of them by known names."""
    for module in layer.modules():
        heads = getattr(module, "num_attention_heads", None)
        for names in _PROJECTIONS:
            parts = [getattr(module, name, None) for name in names]
            if isinstance(heads, int) and all(isinstance(part, nn.Module) for part in parts):
                return [(name, part, heads) for name, part in zip(names, parts, strict=True)]  # type: ignore[misc]
    return []


_LOCK = threading.Lock()
_OPEN: list[Captured] = []  # captures that are open, in any thread
_UPSTREAM: list[Any] = []  # upstream's `get_interface`, while a capture is open


@contextmanager
def _recording(captured: Captured) -> Iterator[None]:
    """Lets the calls of the attention interface be recorded; the last capture that closes restores upstream's."""
    from transformers import AttentionInterface

    interface: Any = AttentionInterface
    with _LOCK:
        if not _OPEN:
            _UPSTREAM.append(interface.get_interface)
            interface.get_interface = _recorded(_UPSTREAM[0])
        _OPEN.append(captured)
    try:
        yield
    finally:
        with _LOCK:
            _OPEN.remove(captured)
            if not _OPEN:
                interface.get_interface = _UPSTREAM.pop()


def _recorded(upstream: Callable[..., Callable]) -> Callable[..., Callable]:
    """`AttentionInterface.get_interface`, whose functions are recorded."""

    def get_interface(self: Any, attn_implementation: str, default: Callable) -> Callable:
        function = upstream(self, attn_implementation, default)

        def recorded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            for captured in tuple(_OPEN):
                captured.see_attention(attn_implementation, module, (query, key, value), args, kwargs)
            return function(module, query, key, value, *args, **kwargs)

        return recorded

    return get_interface


_NO_QKV = "Compare hidden states instead: 'hidden_mse' or 'hidden_cosine'."
_NO_PROBABILITIES = "Take 'relation' instead: it needs queries, keys and values alone."


def _refuse(reason: str, fix: str = "Leave kd_features out.") -> NoReturn:
    shown, expected = "with a model whose features cannot be captured", "a model whose layers can be recorded"
    fail("kd_features", shown, expected, fix, because=reason)
