"""Context managers after which random numbers, modes, buffers and attributes are what they were.

For: whatever runs a model outside of training's own steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Afterwards all random numbers go on as if nothing had been drawn inside."""
    python, numpys = random.getstate(), np.random.get_state()
    devices = [] if device.type in ("cpu", "mps") else [device]
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)


@contextmanager
def as_in_training(student: nn.Module) -> Iterator[None]:
    """The student in training mode; afterwards its modes and buffers are what they were."""
    with unchanged_modes(student), unchanged_buffers(student):
        student.train()
        yield


@contextmanager
def unchanged_attributes(owner: Any, *names: str) -> Iterator[None]:
    """Afterwards these attributes of `owner` have the values that they had."""
    values = {name: getattr(owner, name) for name in names}
    try:
        yield
    finally:
        for name, value in values.items():
            setattr(owner, name, value)


@contextmanager
def changed_attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of `owner`; afterwards they have the values that they had."""
    with unchanged_attributes(owner, *values):
        for name, value in values.items():
            setattr(owner, name, value)
        yield


@contextmanager
def unchanged_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards each module is in training or evaluation mode as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Afterwards the model has the buffers that it had, with the same values."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            buffer.detach().copy_(value)
