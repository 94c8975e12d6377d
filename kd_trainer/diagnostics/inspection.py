"""`Inspection`: what `trainer.check()` reads of a trainer.

For: `trainer.py`, which makes it, and `check.py`. Of `trainer` itself the diagnostics use public names alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..losses import SoftTargetLoss
from ..training import Counts, MetricsBuffer, Objective, Plan, Settings, Setup


class LossOfPlan(NamedTuple):
    """A loss that was computed by a plan.

    Args:
        metrics: its parts, of a training step.
        plan: the same, or one with full logits where the output heads do more than is known.
    """

    loss: Tensor
    metrics: MetricsBuffer
    plan: Plan


@dataclass(frozen=True)
class Inspection:
    """A trainer with what is not public in it; the trainer restores itself afterwards.

    Args:
        trainer: a `DistillationMixin`.
        settings: its distillation arguments.
        setup: makes what the checks take, and holds what the constructor refused.
        loss_shifts_labels: whether upstream compares position i with the label at i + 1, as with a decoder.
        compute_loss: `trainer.compute_loss` by a plan: (wrapped student, batch, counts, plan).
    """

    trainer: Any
    settings: Settings
    setup: Setup
    loss_shifts_labels: bool
    compute_loss: Callable[[nn.Module, dict[str, Any], Counts | None, Plan], LossOfPlan]

    def objective(self, *, training: bool) -> tuple[Objective, SoftTargetLoss]:
        """The objective at the trainer's step, and its soft loss."""
        return self.settings.objective(self.trainer.state, training=training)
