"""Projectors: linear maps from hidden states of the student to the teacher's width, trained with the student.

For: `trainer.py`, which owns a `TermModules`, and `features.py`. While it trains they are `student.kd_projectors`, in
the one group of parameters that every backend shards; they are used inside the student's wrapped forward, and are in
checkpoints, never in a saved student.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..files import write_atomically
from ..tasks import PROJECTOR, Task
from ..validation import fail

ATTRIBUTE = "kd_projectors"
FILE = "kd_projectors.safetensors"


class TermModules:
    """The modules of the terms, such as projectors: a part of the student as `kd_projectors` while it trains."""

    def __init__(self) -> None:
        self._made_for: tuple[Any, ...] = ()
        self._modules = nn.ModuleDict()

    @contextmanager
    def on(
        self, student: nn.Module, teacher: Any, settings: Any, seed: int, task: Task | None = None
    ) -> Iterator[None]:
        """Adds them to the student for the time inside: the same ones again for the same student, features and layers.

        Args:
            teacher: a `Teacher`, or None.
            settings: a `Settings`; each of its added terms may have a module.
            task: may need a projector too; None where it is not known yet.
            seed: of their first weights; the random numbers of the run stay as they are.
        """
        kd, terms = settings.kd, settings.added
        widths = None if task is None or teacher is None else task.projected(student, teacher)
        wanted = (student, *kd.features, str(kd.kd_feature_layers), widths)  # a module is equal to itself alone
        if wanted != self._made_for:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made = {term.name: term.module(student, teacher) for term in terms if term.module is not None}
                if widths is not None:
                    made[PROJECTOR] = Projector(*widths)
            self._made_for = wanted
            self._modules = nn.ModuleDict({name: module for name, module in made.items() if module is not None})
        if not self._modules or hasattr(student, ATTRIBUTE):
            yield
            return
        device = next(student.parameters()).device
        if next(self._modules.parameters()).device != device:  # the parameters of an optimizer stay the same tensors
            self._modules.to(device)
        setattr(student, ATTRIBUTE, self._modules)
        own: Any = vars(student)
        ignored = own.get("_keys_to_ignore_on_save")
        if ignored is not None:
            own["_keys_to_ignore_on_save"] = {*ignored, *(f"{ATTRIBUTE}.{name}" for name in self._modules.state_dict())}
        try:
            yield
        finally:
            delattr(student, ATTRIBUTE)
            if ignored is not None:
                own["_keys_to_ignore_on_save"] = ignored

    def left_out(self, student: nn.Module, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """The state of a student that is saved, without theirs; None where the student itself leaves them out.

        Args:
            student: unwrapped. state: what is to be saved; None for the state of the student.
        """
        if state is None and (not hasattr(student, ATTRIBUTE) or "_keys_to_ignore_on_save" in vars(student)):
            return None
        state = student.state_dict() if state is None else state
        return {name: value for name, value in state.items() if not name.startswith(f"{ATTRIBUTE}.")}

    def save(self, folder: Path) -> None:
        """Writes them into a checkpoint whose backend does not keep the state of all of the student's modules."""
        if self._modules:
            write_atomically(folder / FILE, save(self._modules.state_dict()))

    def load(self, folder: Path) -> None:
        """Reads them from a checkpoint.

        Raises:
            ValueError: the checkpoint has none, or others.
        """
        if not self._modules:
            return
        path = folder / FILE
        state = load_file(path) if path.is_file() else {}
        shapes = [{name: tuple(x.shape) for name, x in one.items()} for one in (self._modules.state_dict(), state)]
        if shapes[0] != shapes[1]:
            because = f"{FILE} is missing" if not path.is_file() else f"{FILE} has projectors of other names or widths"
            fix = "Train with the kd_features and kd_feature_layers of that run, or start again without the checkpoint."
            expected = "a checkpoint with the projectors of this run"
            fail("resume_from_checkpoint", repr(str(folder)), expected, fix, because=because)
        self._modules.load_state_dict(state)


class Projector(nn.Linear):
    """A linear map without bias whose first weights are orthogonal, so that it keeps lengths or projects."""

    def __init__(self, width: int, to: int) -> None:
        super().__init__(width, to, bias=False)
        nn.init.orthogonal_(self.weight)


class _After(torch.autograd.Function):
    """The outputs as they are; their gradient comes before that of the projections.

    DDP with `find_unused_parameters` then finds the projectors' parameters in the graph of the outputs, and FSDP2 has
    gathered them before their gradient is taken.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, *projected: Tensor) -> Tensor:
        ctx.shapes = [(x.shape, x.dtype) for x in projected]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, ...]:
        return given, *(given.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes)


def after(outputs: Any, projected: Iterable[Tensor]) -> Any:
    """The outputs of a forward, of which the first tensor with a gradient depends on the projections, with factor 0."""
    if isinstance(outputs, Tensor):
        return _After.apply(outputs, *projected) if outputs.requires_grad else outputs
    names = range(len(outputs)) if isinstance(outputs, (tuple, list)) else list(outputs)
    for name in names:
        value = outputs[name]
        if isinstance(value, Tensor) and value.requires_grad:
            value = _After.apply(value, *projected)
            if isinstance(outputs, tuple):
                return type(outputs)((*outputs[:name], value, *outputs[name + 1 :]))
            outputs[name] = value
            break
    return outputs
