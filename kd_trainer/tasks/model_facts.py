"""A model in one line: its name, its size, where it lies."""

from __future__ import annotations

from torch import nn


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model, trainable or not; under ZeRO-3 of all processes together."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def name_of(model: nn.Module) -> str:
    """Where the model was loaded from, or its class."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or _class_name(model)


def _class_name(model: nn.Module) -> str:
    return getattr(model, "class_name", type(model).__name__)


def times(ratio: float, what: str) -> str:
    """`6.6x WHAT`; of a ratio below 1 with two digits that are no zeros."""
    return f"{ratio:.1f}x {what}" if ratio >= 1 else f"{ratio:.2g}x {what}"


def describe(model: nn.Module) -> str:
    """Class, parameters, dtype and device in one line."""
    first = next(model.parameters(), None)
    where = "no parameters" if first is None else f"{str(first.dtype).removeprefix('torch.')} on {first.device}"
    return f"{_class_name(model)}, {count_parameters(model):,} parameters, {where}"
