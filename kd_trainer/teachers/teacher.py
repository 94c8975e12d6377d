"""`Teacher`: what the trainer uses of a teacher that is run, is the student's own base, or is read from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..tasks import Task
from .compatibility import Classes, match_classes
from .outputs import TeacherOutput
from .routes import Routes

if TYPE_CHECKING:
    from .live import LiveTeacher


class Teacher(Protocol):
    """A kind of teacher: `LiveTeacher`, `AdapterOffTeacher`, `SeveralTeachers`, and in `cache/` `CachedTeacher` and
    `ServerTeacher`.

    Attributes:
        live: the teacher itself where it is run on each batch; None where its outputs are read from disk.
        model: the module that is run; None where its outputs are read from disk.
        manifest: what is known of outputs on disk; None where it is run.
        members: the teachers that it is made of; of a single one itself.
        parts: the data of which outputs are on disk, by name.
        accepted: names of the columns that it reads.
        compiled: whether its forward goes through `torch.compile`.
        is_student: whether it is the student with a part switched off.
        has_own_weights: whether it is run and is no part of the student.
        note: a line for the start block on what kind of teacher it is, or "".
        start_tokens: decoder_start_token_id of the student and of the teacher, where they differ.
        routes: of several teachers, or the cache of their mixture: which of them a row has. None of a single one.
    """

    compiled: bool

    @property
    def routes(self) -> Routes | None: ...

    @property
    def live(self) -> LiveTeacher | None: ...

    @property
    def model(self) -> nn.Module | None: ...

    @property
    def manifest(self) -> Mapping[str, Any] | None: ...

    @property
    def members(self) -> tuple[Teacher, ...]: ...

    @property
    def parts(self) -> Mapping[str, Any]: ...

    @property
    def accepted(self) -> frozenset[str]: ...

    @property
    def is_student(self) -> bool: ...

    @property
    def has_own_weights(self) -> bool: ...

    @property
    def note(self) -> str: ...

    @property
    def start_tokens(self) -> tuple[int, int] | None: ...

    def prepare(self, device: torch.device, accelerator: Any = None) -> None:
        """Places what is run where the student is, once; every process must call it."""

    def for_student(self, student: nn.Module, *, over_tokens: bool) -> Teacher:
        """The teacher of a new student (from `model_init`): another one where it is the student's base, else itself."""

    def compare_classes(
        self, student: nn.Module, task: Task | None, *, remap: bool, compare: Callable[..., Classes] = match_classes
    ) -> Classes | None:
        """`match_classes` with the student; None where the classes of the task have no names."""

    def check_objective(self, divergence: str, temperatures: Sequence[float], standardize: bool = False) -> None:
        """Raises ValueError where the loss needs what its outputs do not hold."""

    def output(
        self,
        batch: Mapping[str, Any],
        accelerator: Any,
        student: nn.Module | None = None,
        *,
        read: Callable[[Any, str], Tensor],
        task: Task | None = None,
        temperature: float = 1.0,
    ) -> TeacherOutput | None:
        """Its output for the batch; None where there is none for these rows.

        Args:
            student: as the accelerator wrapped it.
            read: takes the logits out of what a teacher's forward returns: `Task.logits`.
            task, temperature: of the loss, by which several teachers are mixed.
        """

    def describe(self) -> str:
        """One line for a person."""

    def identity(self) -> Mapping[str, Any]:
        """`name` and `parameters`, for the summary."""

    def release(self, student: nn.Module) -> None:
        """Frees the device, where it is free to."""
