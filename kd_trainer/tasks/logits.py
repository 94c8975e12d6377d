"""Which tensor in a model's outputs holds the logits: the one that fits the task, or none, and then all are listed.

For: `task.py`. Shapes: B rows, S positions, C classes; logits are [B, C] or [B, S, C].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..validation import fail


class Wanted(NamedTuple):
    """What is known of the logits before they are found.

    Args:
        dims: how many dimensions; None: 2 or more.
        widths: likely numbers of classes, the likeliest first.
        at_least: the least number of classes, by the labels; 1 is none for a softmax.
    """

    dims: int | None = None
    widths: tuple[int, ...] = ()
    at_least: int = 0

    def allows(self, tensor: Tensor) -> bool:
        """Whether the logits may have the tensor's shape."""
        return (self.dims is None or tensor.dim() == self.dims) and tensor.shape[-1] >= self.at_least


class AmbiguousOutputs(TypeError):
    """Several tensors may be the logits. `widths`: their last dimensions."""

    widths: tuple[int, ...] = ()


def logits_of(outputs: Any, argument: str, wanted: Wanted | None = None) -> Tensor:
    """The logits in a model's outputs: a tensor, the key or field "logits", or what alone fits what is `wanted`.

    Args:
        argument: "model" or "teacher_model", for the error.
        wanted: of a tuple's tensors the one that fits it; None takes the first floating [B, ..., C].

    Raises:
        TypeError: there are none; or (`AmbiguousOutputs`) several fit, which are listed.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and isinstance(logits := outputs.get("logits"), Tensor):  # nearly always
        return logits
    found = named_outputs(outputs)
    if isinstance(found.get("logits"), Tensor):
        return found["logits"]
    named = {name: value for name, value in found.items() if _is_called_logits(name) and _may_be(value)}
    if found:
        offer = "a mapping with the keys " + ", ".join(found)
        candidates = [list(named.items())]
    elif isinstance(outputs, (tuple, list)):
        offer = "a tuple of " + ", ".join(type(item).__name__ for item in outputs)
        top = [(f"[{i}]", item) for i, item in enumerate(outputs) if _may_be(item)]
        if wanted is None and top:
            return top[0][1]
        candidates = [top, list(_inside(outputs, ""))]
    else:
        offer, candidates = type(outputs).__name__, []
    chosen = _chosen(candidates, wanted or Wanted())
    if chosen is not None:
        return chosen
    several = candidates[-1] if candidates else []
    if several:
        _fail_ambiguous(several, argument, wanted or Wanted())
    fail(
        argument,
        f"a model that returns {offer}",
        'logits: a tensor, a tuple that holds it, or a mapping with the key "logits"',
        "Wrap the model so that its forward returns them; for embeddings set kd_task to embedding.",
        error=TypeError,
    )


_Candidates = Sequence[tuple[str, Tensor]]


def _chosen(groups: Sequence[_Candidates], wanted: Wanted) -> Tensor | None:
    fitting = [[tensor for _, tensor in group if wanted.allows(tensor)] for group in groups]
    shaped = wanted._replace(at_least=0)  # a label may be wrong
    for width in wanted.widths:
        for group in groups:
            same = [tensor for _, tensor in group if shaped.allows(tensor) and tensor.shape[-1] == width]
            if len(same) == 1:
                return same[0]
            if same:
                return None
    if groups and len(fitting[-1]) == 1:  # the last group has those of the others
        return fitting[-1][0]
    if groups and len(groups[-1]) == 1:  # of another shape than the task has: `check_shapes` raises
        return groups[-1][0][1]
    return None


def _fail_ambiguous(several: _Candidates, argument: str, wanted: Wanted) -> None:
    listed = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in several[:8])
    known = f", of {' or '.join(map(str, wanted.widths))} classes" if wanted.widths else ""
    error = AmbiguousOutputs
    try:
        fail(
            argument,
            f"a model that returns several tensors that may be its logits ({listed})",
            f'one that fits the task{known}, or a mapping with the key "logits"',
            "Let its forward return the logits alone, or name them: {'logits': logits, ...}.",
            error=error,
        )
    except AmbiguousOutputs as ambiguous:
        ambiguous.widths = tuple(dict.fromkeys(t.shape[-1] for _, t in several if wanted.allows(t)))
        raise


def named_outputs(outputs: Any) -> dict[str, Any]:
    """The parts of outputs that have names; empty for others."""
    if isinstance(outputs, Mapping):
        return {str(name): value for name, value in outputs.items()}
    if hasattr(outputs, "_fields"):  # a named tuple: by name where there is one, else by place
        named = dict(zip(outputs._fields, outputs, strict=True))
        return named if isinstance(named.get("logits"), Tensor) else {}
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return {entry.name: getattr(outputs, entry.name) for entry in dataclasses.fields(outputs)}
    return {}


def _is_called_logits(name: str) -> bool:
    return "logit" in name.lower() and name not in ("start_logits", "end_logits")  # of the positions of an answer


def _inside(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that may be logits, however deep, with its place."""
    if _may_be(value):
        yield place, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _inside(each, f"{place}[{name!r}]")
    elif isinstance(value, (tuple, list)):
        for i, each in enumerate(value):
            yield from _inside(each, f"{place}[{i}]")


def widths_of(outputs: Any) -> set[int]:
    """The last dimensions of all tensors that may be logits."""
    return {tensor.shape[-1] for _, tensor in _inside(named_outputs(outputs) or outputs, "")}


def _may_be(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2
