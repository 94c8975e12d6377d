"""The terms of the loss: how one is described, and the list of those beside the hard and the soft loss.

    loss = scale * sum over terms of weight * S / D        S over this micro-batch, D over the whole optimizer step

To add a term: write its loss as a function and append an entry to `ADDED_TERMS`. It is then counted, weighed, added,
logged as NAME_loss in training and evaluation, and shown in the start block and on the model card.
Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..tasks import Task
from .arguments import DistillationArguments
from .router_loss import required_router_weight, router_loss


@dataclass(frozen=True)
class Term:
    """One addend of the loss.

    Args:
        name: logged as NAME_loss.
        weight: a number, which the formula of the start block shows; or a function of the unwrapped student, for a
            weight that its config holds. A term of weight 0 is logged and not added.
        loss: (the `MicroBatch`, the student's outputs, the `TeacherOutput` or None) -> [B], the sum over each row's
            counted positions; or a number that holds for every row; or None where the term does not exist. The
            teacher is None where it is not called. Hard and soft have none: `Objective` computes them together.
        count: (task, inputs) -> how many positions of a micro-batch count, read from its inputs alone; None: its rows.
    """

    name: str
    weight: float | Callable[[nn.Module], float]
    loss: Callable[[Any, Any, Any], Tensor | None] = lambda batch, outputs, teacher: None
    count: Callable[[Task, Mapping[str, Any]], Tensor | int] | None = None

    def weight_for(self, student: nn.Module) -> float:
        return self.weight(student) if callable(self.weight) else self.weight


# Each makes its term from the distillation arguments; None where they do not ask for it.
ADDED_TERMS: list[Callable[[DistillationArguments], Term | None]] = [
    lambda kd: Term("aux", required_router_weight, router_loss),
]


def added_terms(kd: DistillationArguments) -> tuple[Term, ...]:
    """The terms beside hard and soft that these arguments ask for."""
    return tuple(term for make in ADDED_TERMS if (term := make(kd)) is not None)
