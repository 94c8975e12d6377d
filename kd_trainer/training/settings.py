"""The distillation arguments as a run reads them: now, at a point of a schedule, and after a script has changed them.

For: `trainer.py`, which owns one `Settings`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..losses import SoftTargetLoss
from ..tasks import Task
from ..validation import fail
from .arguments import CHUNKS, DistillationArguments, is_unset
from .chunks import ChunkObjective
from .objective import Objective, scheduled
from .terms import added_terms

_NAMES = (*(f.name for f in dataclasses.fields(DistillationArguments)), "label_smoothing_factor")
# What may change without another plan; and what else may without a teacher cache.
_FREE = frozenset({"kd_alpha", "kd_alpha_end", "kd_beta", "kd_schedule", "kd_check_finite", "kd_run"})
_FREE_WITH_LOGITS = frozenset({"kd_temperature", "kd_temperature_end"})


class Settings:
    """The `kd_*` and `teacher_*` arguments of a trainer as they stand.

    Attributes:
        kd: the arguments, checked.
        added: the terms of the loss beside hard and soft.
        always_hard: whether no term of training needs the teacher: `kd_alpha` is constantly 0 and nothing is captured.
    """

    kd: DistillationArguments
    always_hard: bool

    def __init__(self, args: Any) -> None:
        self._args, self._soft_alone = args, False
        self.read(args)

    def adopt(self, task: Task) -> None:
        """Takes the defaults of a task: without a hard loss an unset kd_alpha is 1."""
        if self._soft_alone == task.has_hard_loss:
            self._soft_alone = not task.has_hard_loss
            self.read(self._args)

    def read(self, args: Any) -> None:
        """Reads the arguments: a script, a callback or a hyperparameter search may have changed them."""
        self._args = args
        self.kd = DistillationArguments.of(args)
        if self._soft_alone and is_unset(self.kd.kd_alpha):
            self.kd = dataclasses.replace(self.kd, kd_alpha=1.0)
        self.added = added_terms(self.kd)
        soft = self.kd.kd_alpha != 0 or self.kd.kd_schedule != "constant"
        self.always_hard = not soft and all(term.capture is None for term in self.added)
        self._smoothing = args.label_smoothing_factor
        self._objectives: dict[tuple[float, float], tuple[Objective, SoftTargetLoss]] = {}
        self._last = self._values(args)

    @staticmethod
    def _values(args: Any) -> tuple[Any, ...]:
        return tuple(map(vars(args).get, _NAMES))

    def follow(self, args: Any, *, cached: bool) -> bool | None:
        """Reads the arguments again where they have changed since; None where they have not.

        Args:
            cached: whether the teacher is read from a cache, which was built for a temperature.

        Returns:
            Whether the plan of the first batch was made for other settings.
        """
        now, before = self._values(args), self._last
        if now == before:
            return None
        changed = {name for name, a, b in zip(_NAMES, now, before, strict=True) if a != b}
        always_hard = self.always_hard
        self.read(args)
        free = _FREE if cached else _FREE | _FREE_WITH_LOGITS
        return always_hard != self.always_hard or bool(changed - free)

    def finite_mode(self, device_type: str) -> str:
        """How `FiniteWatch` watches: `kd_check_finite`, or by default at every step on the CPU, else at logs."""
        return self.kd.kd_check_finite or ("step" if device_type == "cpu" else "log")

    def objective(self, state: Any, *, training: bool, steps_ago: int = 0) -> tuple[Objective, SoftTargetLoss]:
        """The mixture at this step of upstream's `state`; evaluation uses the end of a schedule, so that its losses can
        be compared."""
        done = (state.global_step - steps_ago) / max(state.max_steps - 1, 1) if training else 1.0
        return self.objective_at(min(done, 1.0))

    def require_teacher(self, given: Any) -> None:
        if given is None and not self.always_hard:
            fix = "Pass teacher_model= to the trainer, set teacher_model_name_or_path, or set kd_alpha to 0."
            fail("teacher_model", None, f"a teacher, with kd_alpha {self.kd.kd_alpha:g}", fix)

    def objective_at(self, progress: float) -> tuple[Objective, SoftTargetLoss]:
        """The mixture and its soft loss at `progress` in [0, 1] of the schedule."""
        kd = self.kd
        alpha = scheduled(kd.kd_alpha, kd.kd_alpha_end, kd.kd_schedule, progress)
        temperature = scheduled(kd.kd_temperature, kd.kd_temperature_end, kd.kd_schedule, progress)
        if (alpha, temperature) not in self._objectives:
            divergence, beta = kd.kd_divergence, kd.kd_beta
            settings = (divergence, beta, kd.kd_reduction, kd.kd_positions, self._smoothing, self.added)
            if kd.kd_cross_tokenizer == CHUNKS:
                objective: Objective = ChunkObjective(
                    alpha, temperature, *settings, chunk_temperature=kd.kd_chunk_temperature
                )
            else:
                objective = Objective(alpha, temperature, *settings, standardize_logits=kd.kd_standardize_logits)
            self._objectives = {(alpha, temperature): (objective, objective.soft_loss())}
        return self._objectives[alpha, temperature]
