"""The loss of one micro-batch: of full logits, or through the output heads without logits, in one form.

For: `trainer.py`, whose `compute_loss` makes a `MicroBatch` and asks it. Formulas stand in `objective.py`.
Shapes: B rows, S positions, V classes; logits are [B, V] or [B, S, V].
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..losses import FusedLoss, OutputProjection, SoftTargetLoss
from ..tasks import (
    OutputHead,
    UnsupportedHead,
    behind_front,
    model_inputs,
    student_loss,
    student_side,
    teacher_hidden,
    teacher_side,
    whole_weight,
)
from ..teachers import LiveTeacher, Teacher, TeacherOutput
from ..validation import fail, warn
from .objective import Counts, Objective, Parts
from .own_loss import OwnHardLoss
from .setup import Plan

logger = logging.getLogger(__name__)


class OwnRows(NamedTuple):
    """The first rows of an evaluation batch, less those that accelerate repeats to fill the last batches."""

    inputs: dict[str, Any]
    counts: Counts
    rows: int


def own_rows(
    accelerator: Any, objective: Objective, plan: Plan, inputs: dict[str, Any], counts: Counts
) -> OwnRows | None:
    """A batch of an evaluation without its repeated rows; None where it has none.

    They stand at the end of the gathered rows, from which `gather_for_metrics` cuts them off.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return None
    rows = int(counts.rows)
    own = min(max(state.remainder - accelerator.process_index * rows, 0), rows)
    if own == rows:
        return None
    cut = {k: v[:own] if isinstance(v, Tensor) and v.shape[:1] == (rows,) else v for k, v in inputs.items()}
    none = Counts(0, 0, 0, added=(0,) * len(objective.added))
    return OwnRows(cut, objective.count(plan.task, cut) if own else none, own)


def counts_of(given: Any, plan: Plan, objective: Objective, inputs: Mapping[str, Any], scale: int | None) -> Counts:
    """The denominators of a batch: those of its optimizer step, or of an evaluation its own.

    Args:
        given: num_items_in_batch as upstream passes it.
        scale: where upstream's number divides the hard loss, by what upstream has multiplied it; else None.
    """
    counts = given if given is not None else objective.count(plan.task, inputs)
    if scale is not None and not isinstance(counts, Counts):  # of an evaluation
        items = given if plan.own_loss else given / scale
        counts = objective.count(plan.task, inputs)._replace(num_items=items, by_num_items=not plan.own_loss)
    if not isinstance(counts, Counts):
        fix = "Call super().get_batch_samples(...), or pass num_items_in_batch=None to count this batch alone."
        fail("num_items_in_batch", counts, "the Counts of get_batch_samples, or None", fix, error=TypeError)
    return counts


class TeacherOutputs:
    """Asks the teacher about a batch, as logits or as hidden states, live or from a cache.

    Args:
        at_hand: gives a live teacher for evaluation data that is not in the cache, or None.
    """

    def __init__(self, at_hand: Callable[[], LiveTeacher | None]) -> None:
        self._at_hand = at_hand
        self._warned_uncached = False

    def logits(self, teacher: Teacher | None, batch: MicroBatch, accelerator: Any) -> TeacherOutput | None:
        """The teacher's logits, or the few numbers that a cache holds instead; None where there is nothing."""
        if teacher is None:
            return None
        output = self._given(teacher, batch, accelerator)
        if output is None and not batch.training and (live := self._at_hand()) is not None:
            return live.output(batch.inputs, accelerator, batch.model, read=batch.plan.task.logits)
        if output is None or output.hidden is None:
            return output
        head = output.head
        side = OutputProjection(
            head["teacher_weight"], head["teacher_bias"], head["teacher_scale"], head["teacher_softcap"]
        )
        with torch.no_grad(), accelerator.autocast():
            return TeacherOutput(logits=side.logits(output.hidden))

    @contextmanager
    def hidden(
        self, teacher: Any, batch: MicroBatch, accelerator: Any, head: OutputHead | None
    ) -> Iterator[TeacherOutput | None]:
        """The teacher's hidden states with its output head, or what a cache holds; None where there is nothing.

        Args:
            head: of a live teacher, whose weight is whole inside the context; None for a cache.
        """
        if head is None:
            yield self._given(teacher, batch, accelerator)
            return
        hidden = teacher_hidden(lambda: teacher.outputs(batch.inputs, accelerator, batch.model), head)
        hidden = teacher.behind_front(hidden, batch.inputs)
        with whole_weight(head) as (weight, bias):
            yield TeacherOutput(hidden=hidden, head=teacher_side(head, weight, bias, hidden))

    def _given(self, teacher: Teacher, batch: MicroBatch, accelerator: Any) -> TeacherOutput | None:
        """The teacher's own output; None, with one warning, for evaluation data that is not in its cache."""
        output = teacher.output(batch.inputs, accelerator, batch.model, read=batch.plan.task.logits)
        if output is None and batch.training:
            fix = "Let the Trainer make the dataloader, or train with the live teacher."
            shown = "a batch without teacher outputs"
            expected = "the columns that the trainer's own dataloader adds from the teacher cache"
            fail("inputs", shown, expected, fix, error=RuntimeError)
        if output is None and not self._warned_uncached and self._at_hand() is None:
            self._warned_uncached = True
            warn(
                logger,
                "[kd_trainer] there is no teacher cache of this evaluation data: its loss is the hard loss alone. "
                "Where the teacher is at hand, call trainer.build_teacher_cache(dataset), or give it as eval_dataset.",
            )
        order = batch.plan.class_order
        return output if output is None or order is None else output.reordered(order)


class BatchLoss(NamedTuple):
    """The loss of a micro-batch, and what is watched and logged of it."""

    parts: Parts
    logged: Parts  # of each row once, divided by `counts`
    counts: Counts
    outputs: Any  # of the student
    student: Tensor  # logits, or hidden states, as `of` says
    teacher: Tensor | None
    classes: int
    of: str = "logits"


@dataclass(slots=True)
class MicroBatch:
    """One micro-batch on its way to its loss.

    Args:
        model: the student as the accelerator wrapped it.
        inputs: the prepared batch; it is not changed.
        counts: of the whole optimizer step.
        own: in an evaluation the batch without repeated rows, which are logged once; None where none is repeated.
    """

    plan: Plan
    objective: Objective
    soft_loss: SoftTargetLoss
    model: nn.Module
    inputs: dict[str, Any]
    counts: Counts
    training: bool
    own: OwnRows | None = None

    def _run(self, labels: Mapping[str, Any]) -> Any:
        return self.model(**model_inputs(self.inputs, self.plan.accepted), **labels)

    def _added(self, outputs: Any, teacher: TeacherOutput | None) -> list[Tensor | None]:
        """The losses of the terms beside hard and soft."""
        return [term.loss(self, outputs, teacher) for term in self.objective.added]

    def full(self, teacher: TeacherOutput | None, own_loss: OwnHardLoss | None) -> BatchLoss:
        """The loss of full logits.

        Args:
            own_loss: takes the hard loss where it is the model's own; None for the task's formula.
        """
        plan = self.plan
        outputs = self._run({} if own_loss is None else own_loss.labels(plan.accepted, self.inputs, self.counts))
        logits = behind_front(plan.task.logits(outputs, "model"), plan.student, self.inputs)
        hard = None if own_loss is None else own_loss(plan, outputs, self.inputs, self.counts)
        teacher = None if teacher is None else teacher.to(logits.device)
        terms = partial(self.objective, plan.task, self.soft_loss, common_ids=plan.common_ids)
        parts = terms(logits, _target(teacher), self.inputs, self.counts, own_hard=hard, takes_own=own_loss is not None)
        losses = self._added(outputs, teacher)
        parts = self.objective.with_added(losses, plan.student, parts, self.inputs, self.counts)
        logged, counts = parts, self.counts
        if self.own is not None:
            logged, counts, rows = parts.zeroed(), self.own.counts, self.own.rows
            if rows:
                first = None if teacher is None else teacher.each(lambda tensor: tensor[:rows])
                logged = terms(logits[:rows], _target(first), self.own.inputs, counts)
                logged = self.objective.with_added(losses, plan.student, logged, self.own.inputs, counts)
        seen = None if teacher is None else teacher.logits
        return BatchLoss(parts, logged, counts, outputs, logits, seen, logits.shape[-1])

    def fused(self, teacher: TeacherOutput) -> BatchLoss:
        """The same without logits; raises `UnsupportedHead` where a model does more with its logits than is known."""
        assert self.plan.heads is not None
        plan, student_head, once = self.plan, self.plan.heads[0], []

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> FusedLoss:
            hidden = behind_front(hidden, plan.student, self.inputs)
            if teacher.positions != hidden.shape[:-1]:
                raise UnsupportedHead("student and teacher give hidden states for different positions")
            here, side = teacher.to(hidden.device), student_side(student_head, weight, bias)
            sums = partial(self.objective.fused, plan.task, weights=side, common_ids=plan.common_ids)
            if self.own is not None and self.own.rows:
                rows = self.own.rows
                first = here.each(lambda tensor: tensor[:rows])
                once.append(sums(hidden[:rows], first, inputs=self.own.inputs, counts=self.own.counts))
            return sums(hidden, here, inputs=self.inputs, counts=self.counts)

        computed, outputs, hidden = student_loss(lambda: self._run({}), student_head, loss)
        parts_of = partial(self.objective.parts, labelled=plan.task.targets(self.inputs) is not None)
        with_added = partial(self.objective.with_added, self._added(outputs, teacher), plan.student)
        parts = with_added(parts_of(computed, self.counts), self.inputs, self.counts)
        logged, counts = parts, self.counts
        if self.own is not None:
            counts = self.own.counts
            logged = with_added(parts_of(once[0], counts), self.own.inputs, counts) if once else parts.zeroed()
        seen = teacher.logits if teacher.hidden is None else teacher.hidden
        classes = student_head.module.out_features
        return BatchLoss(parts, logged, counts, outputs, hidden, seen, classes, of="hidden states")


def _target(teacher: TeacherOutput | None) -> Any:
    return None if teacher is None else teacher.sparse or teacher.logits
