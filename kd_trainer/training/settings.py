"""The distillation arguments as a run reads them: now, at a point of a schedule, and after a script has changed them.

For: `trainer.py`, which owns one `Settings`. `FirstBatch` is what the checks of a setup find by them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..losses import SoftTargetLoss
from ..tasks import Accepted, Heads, Task
from ..teachers import LiveTeacher, Teacher, columns_of, naming
from ..validation import fail
from .arguments import CHUNKS, DistillationArguments, is_unset
from .chunks import ChunkObjective
from .objective import Objective
from .own_loss import HardLoss
from .terms import added_terms

_NAMES = (*(f.name for f in dataclasses.fields(DistillationArguments)), "label_smoothing_factor")
# What may change without another plan; and what else may without a teacher cache.
_FREE = frozenset(
    {"kd_alpha", "kd_alpha_end", "kd_beta", "kd_schedule", "kd_check_finite", "kd_run", "kd_compare_seeds"}
)
_FREE_WITH_LOGITS = frozenset({"kd_temperature", "kd_temperature_end"})

# Arguments that switch the features off; and everything else that needs a teacher.
WITHOUT_FEATURES: dict[str, Any] = {"kd_features": None, "kd_feature_layers": "last", "kd_relation_heads": None}
HARD_LOSS_ONLY: dict[str, Any] = {
    "kd_alpha": 0.0, "kd_alpha_end": None, "kd_temperature_end": None, "kd_schedule": "constant",
    "kd_position_fraction": 1.0, "kd_cross_tokenizer": "error", "kd_chunk_temperature": 1.0, "kd_student_fraction": 0.0,
    "kd_max_new_tokens": None, "kd_generation_kwargs": None, **WITHOUT_FEATURES,
}  # fmt: skip


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

    def follow(self, args: Any, teacher: Teacher | None) -> bool | None:
        """Reads the arguments again where they have changed since; None where they have not.

        Returns:
            Whether the plan of the first batch was made for other settings.

        Raises:
            ValueError: they need a teacher now and there is none.
        """
        now, before = self._values(args), self._last
        if now == before:
            return None
        changed = {name for name, a, b in zip(_NAMES, now, before, strict=True) if a != b}
        always_hard = self.always_hard
        self.read(args)
        self.require_teacher(teacher)
        # A cache is built for a temperature.
        free = _FREE | (frozenset() if teacher is not None and teacher.live is None else _FREE_WITH_LOGITS)
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
        """Raises ValueError without a teacher, where the soft loss has a weight."""
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
                objective = Objective(alpha, temperature, *settings, kd.kd_standardize_logits, kd.kd_position_fraction)
            self._objectives = {(alpha, temperature): (objective, objective.soft_loss())}
        return self._objectives[alpha, temperature]


class Host(Protocol):
    """What the checks use of the `Setup`: the columns of the data, and the hook on buffers shared with the teacher."""

    each_alone: bool

    def removed_columns(self) -> list[str]:
        """Columns of the data that upstream removes."""

    def withheld_columns(self) -> set[str]:
        """Those of them that stay for the teacher alone."""

    def watch_buffers(self, watch: Callable[[], Any] | None) -> None:
        """Adds a hook that compares the buffers shared with a teacher; None removes all."""


@dataclass
class FirstBatch:
    """A trainer and a batch, and what the checks have found so far; `Setup.first_batch` makes it."""

    trainer: Any
    settings: Settings
    setup: Host
    batch: Mapping[str, Any]
    student: nn.Module
    teacher: Teacher | None
    teacher_called: bool  # whether the teacher is called
    known_task: Task | None = None  # the task; None as long as it depends on the teacher's logits
    task_by_logits: bool = False  # whether they had to
    teacher_classes: int | None = None  # of the teacher's logits, or of its cache
    path: str = ""  # a line on whether and why the loss is computed from logits
    vocabularies: str = ""  # a line on vocabularies that differ in size
    terms: tuple[str, ...] = ()  # lines on the added terms
    hard: HardLoss | None = None
    # As in `setup.Plan`.
    accepted: Accepted | None = None
    known_by: str | None = None
    class_order: Tensor | None = None
    common_ids: int | None = None
    heads: Heads | None = None
    index: int | None = None  # of the teacher among several
    each: tuple[FirstBatch, ...] = ()  # with several teachers: one for each

    @property
    def kd(self) -> DistillationArguments:
        return self.settings.kd

    @property
    def chunks(self) -> bool:
        """Whether text chunks are compared, of tokens that differ."""
        return self.kd.kd_cross_tokenizer == CHUNKS

    @property
    def sharded(self) -> bool:
        """Whether the backend shards the student's parameters."""
        return is_sharded(self.trainer)

    @property
    def implementation(self) -> str:
        """`kd_loss_implementation`, which is about the student alone where teachers are mixed."""
        return self.kd.kd_loss_implementation if self.index is None else "auto"

    def of_each(self) -> tuple[FirstBatch, ...]:
        """The same with each of several teachers alone; kept, since later checks need what earlier ones found."""
        members = () if self.teacher is None else self.teacher.members
        if len(members) > 1 and not self.each:
            self.each = tuple(
                dataclasses.replace(self, batch=columns_of(self.batch, index), teacher=member, index=index)
                for index, member in enumerate(members)
            )
        return self.each

    @property
    def task(self) -> Task:
        """Raises AssertionError as long as it is unknown."""
        assert self.known_task is not None
        return self.known_task

    @property
    def live(self) -> LiveTeacher | None:
        """The teacher where it is run, not read from a cache."""
        return None if self.teacher is None else self.teacher.live

    def prepared(self, batch: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The batch, or another one, on the device and with the inputs of a decoder."""
        inputs = self.trainer._prepare_inputs(dict(self.batch if batch is None else batch))
        return inputs if self.known_task is None else self.known_task.with_decoder_inputs(self.student, inputs)


def is_sharded(trainer: Any) -> bool:
    """Whether the student is whole on no process, so that only training's own preparation makes it callable."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


Check = Callable[[FirstBatch], str | None]


def of_each_teacher(check: Callable[[FirstBatch], None]) -> Callable[[FirstBatch], None]:
    """The check for each teacher where there are several, with an error that names it."""

    def checked(first: FirstBatch) -> None:
        each = first.of_each()
        for one in each:
            one.known_task = first.known_task
            with naming(one.index):
                check(one)
            first.known_task = one.known_task
        if not each:
            check(first)

    return checked


def pooling_of(teacher: Teacher | None) -> str | None:
    """Of a teacher of embeddings."""
    if teacher is None:
        return None
    return getattr(teacher.model, "pooling", None) if teacher.manifest is None else teacher.manifest.get("pooling")


def scheduled(start: float, end: float | None, schedule: str, progress: float) -> float:
    """The value of a setting at `progress` in [0, 1] of the training: start -> end, linear or half a cosine.

    Constant where `end` is None. A pure function, so that a resumed run goes on at the same value.
    """
    if end is None or schedule == "constant":
        return start
    share = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share
