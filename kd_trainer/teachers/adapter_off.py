"""A teacher that is the student's own base: the student with its adapters switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..validation import fail
from .live import ADAPTER_OFF, LiveTeacher


class AdapterOffTeacher(LiveTeacher):
    """The student's own base as the teacher: the student with its adapters off, no second copy of the weights.

    Args:
        student: a model with adapters in its layers (LoRA and its kin): a `PeftModel`, or transformers' `add_adapter`.
        over_tokens: whether the student is a language model (`Task.over_tokens`).

    Raises:
        ValueError: the student has no such adapters, or what is off is no fixed teacher (see `check_adapters`).
    """

    is_student = True
    note = "the teacher is the student with its adapters off"

    def __init__(self, student: nn.Module, *, over_tokens: bool) -> None:
        check_adapters(student, over_tokens=over_tokens)
        super().__init__(student)

    def for_student(self, student: nn.Module, *, over_tokens: bool) -> AdapterOffTeacher:
        """The base of a student from `model_init`."""
        return self if self.model is student else AdapterOffTeacher(student, over_tokens=over_tokens)

    def describe(self) -> str:
        """One line on the teacher."""
        return "the student with its adapters off"

    def prepare(self, device: torch.device, accelerator: Any = None) -> None:
        """Nothing to place: the student is where it belongs."""

    def compare_classes(self, *_: Any, **__: Any) -> None:
        """The classes are the student's."""

    def _run(self, inputs: dict[str, Any], student: nn.Module | None) -> Any:
        # The wrapped one: FSDP and DeepSpeed gather the weights in its forward.
        with adapters_off(self.model):
            return (self.model if student is None else student)(**inputs)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with its adapters off; afterwards each module and each adapter is as it was.

    peft's own `disable_adapter` makes every parameter of the active adapters trainable on its way out, those that were
    frozen on purpose too.
    """
    on = [layer for layer in _adapter_layers(model) if not layer._disable_adapters]
    training = [module for module in model.modules() if module.training]
    try:
        for layer in on:
            layer._disable_adapters = True
        model.eval()
        yield
    finally:
        for layer in on:
            layer._disable_adapters = False
        for module in training:
            module.training = True


def check_adapters(student: nn.Module, *, over_tokens: bool) -> None:
    """Raises ValueError unless the student with its adapters off is a teacher, and stays the same one."""
    layers = _adapter_layers(student)
    own = "Give the teacher as a model of its own, e.g. by path."
    if not layers:
        fix = f"Add adapters with peft first; a folder of that name is './{ADAPTER_OFF}'."
        shown = f"'{ADAPTER_OFF}' with a student of type {type(student).__name__}"
        fail("teacher_model", shown, "a student with adapters in its layers (LoRA and its kin)", fix)
    adapters = adapter_parameters(student)
    moving = [name for name, p in student.named_parameters() if p.requires_grad and id(p) not in adapters]
    if moving:
        shown = f"'{ADAPTER_OFF}' with a student that trains {', '.join(moving[:4])}"
        because = f"these {len(moving)} parameters are the teacher's too and would move with the student"
        fail("teacher_model", shown, "all but the adapters frozen", "Freeze them. Or: " + own, because=because)
    saved = [n for n, m in student.named_modules() if _is_adapter_layer(m) and hasattr(m, "modules_to_save")]
    if saved and not over_tokens:
        shown = f"'{ADAPTER_OFF}' with a classifier in modules_to_save ({saved[0]})"
        because = "the base's own classifier may be newly initialised and teach noise"
        fail("teacher_model", shown, "a classifier without modules_to_save", own, because=because)


def _is_adapter_layer(module: nn.Module) -> bool:
    """A layer of peft that can be switched off, recognised by its attributes, without importing peft."""
    return hasattr(module, "_disable_adapters") and hasattr(module, "adapter_layer_names")


def adapter_parameters(model: nn.Module) -> set[int]:
    """The `id` of every parameter that belongs to an adapter, not to the base."""
    bases = ("base_layer.", "original_module.")
    named = (item for layer in _adapter_layers(model) for item in layer.named_parameters())
    return {id(parameter) for name, parameter in named if not name.startswith(bases)}


def adapter_modules(model: nn.Module) -> set[int]:
    """The `id` of every module that belongs to an adapter or wraps one around the base."""
    bases = ("base_layer", "original_module")
    found = {id(module) for module in model.modules() if type(module).__module__.partition(".")[0] == "peft"}
    for layer in _adapter_layers(model):
        found.add(id(layer))
        found |= {id(module) for name, module in layer.named_modules() if name and not name.startswith(bases)}
    return found


def _adapter_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_adapter_layer(module)]
