"""The loss of one micro-batch: of full logits, or through the output heads without logits, in one form.

For: `trainer.py`, whose `compute_loss` makes a `MicroBatch` and takes its `loss`. Formulas stand in `objective.py`.
Shapes: B rows, S positions, V classes; logits are [B, V] or [B, S, V].
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from ..losses import FusedLoss, SoftTargetLoss
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
from ..teachers import LiveTeacher, Teacher, TeacherOutput, mixed_hidden
from ..validation import fail, warn
from .objective import Counts, LossInputs, Objective, Parts
from .own_loss import OwnHardLoss
from .setup import Plan

logger = logging.getLogger(__name__)


class OwnRows(NamedTuple):
    """The first rows of an evaluation batch, less those that accelerate repeats to fill the last batches."""

    inputs: dict[str, Any]
    counts: Counts
    rows: int


def own_rows(
    accelerator: Any, objective: Objective, plan: Plan, inputs: dict[str, Any], counts: Counts, same_batch: int
) -> OwnRows | None:
    """A batch of an evaluation without its repeated rows; None where it has none.

    They stand at the end of the gathered rows, from which `gather_for_metrics` cuts them off. Processes that share a
    batch (`same_batch` of them) share its rows in another way.
    """
    if accelerator.num_processes == 1 or same_batch > 1:
        return None
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


def counts_of_step(
    plan: Plan, objective: Objective, batches: Sequence[Mapping[str, Any]], num_items: Any, *, always_hard: bool
) -> Counts:
    """The denominators of an optimizer step on this process.

    Args:
        num_items: upstream's num_items_in_batch, or None.
    """
    by_items = plan.by_num_items and always_hard and num_items is not None
    counts = objective.count_all(plan.task, batches)
    return counts._replace(num_items=num_items, micro_batches=len(batches), by_num_items=by_items)


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
    """Runs the teacher on a batch, for its logits or its hidden states, or reads its outputs from a cache.

    Args:
        at_hand: gives a live teacher for evaluation data that is not in the cache, or None.
    """

    def __init__(self, at_hand: Callable[[], LiveTeacher | None]) -> None:
        self._at_hand = at_hand
        self._warned_uncached = False

    def logits(self, teacher: Teacher, batch: MicroBatch, accelerator: Any) -> TeacherOutput | None:
        """The teacher's logits, or the few numbers that a cache holds instead; None where there is nothing."""
        output = self._output(teacher, batch, accelerator)
        if output is None or output.hidden is None:
            return output
        return TeacherOutput(logits=output.as_logits(accelerator))

    @contextmanager
    def hidden(
        self, teacher: Any, batch: MicroBatch, accelerator: Any, head: OutputHead | None
    ) -> Iterator[TeacherOutput | None]:
        """The teacher's hidden states with its output head, or what a cache holds; None where there is nothing.

        Args:
            head: of a live teacher, whose weight is whole inside the context; None for a cache.
        """
        if head is None:
            options = {"temperature": batch.objective.temperature, "compared": not batch.training}
            with mixed_hidden(teacher, batch.inputs, accelerator, batch.model, **options) as mixed:
                yield self._output(teacher, batch, accelerator) if mixed is None else mixed
            return
        forward = partial(teacher.outputs, batch.inputs, accelerator, batch.model)
        hidden = teacher_hidden(partial(batch.capture, "teacher", teacher.model, forward), head)
        hidden = teacher.behind_front(hidden, batch.inputs)
        with whole_weight(head) as (weight, bias):
            yield TeacherOutput(hidden=hidden, head=teacher_side(head, weight, bias, hidden))

    def _output(self, teacher: Teacher, batch: MicroBatch, accelerator: Any) -> TeacherOutput | None:
        """The teacher's output; None, with one warning, for evaluation data for which there is none."""
        output = _run(teacher, batch, accelerator)
        if output is not None:
            order = batch.plan.class_order
            return output if order is None else output.reordered(order)
        if batch.training:
            fix = "Let the Trainer make the dataloader, or train with the live teacher."
            shown = "a batch without teacher outputs"
            expected = "the columns that the trainer's own dataloader adds from the teacher cache"
            fail("inputs", shown, expected, fix, error=RuntimeError)
        live = self._at_hand()
        if live is not None:
            return _run(live, batch, accelerator)
        if not self._warned_uncached:
            self._warned_uncached = True
            left = "its loss is the hard loss alone" if batch.plan.task.has_hard_loss else "it has no loss"
            warn(
                logger,
                "[kd_trainer] there is no teacher cache of this evaluation data: %s. "
                "Where it can be run, call trainer.build_teacher_cache(dataset), or give it as eval_dataset.",
                left,
            )
        return None


def _run(teacher: Teacher, batch: MicroBatch, accelerator: Any) -> TeacherOutput | None:
    task = batch.plan.task
    mixing: dict[str, Any] = {"task": task, "temperature": batch.objective.temperature, "compared": not batch.training}
    forward = partial(teacher.output, batch.inputs, accelerator, batch.model, read=task.logits, **mixing)
    return forward() if teacher.model is None else batch.capture("teacher", teacher.model, forward)


class BatchLoss(NamedTuple):
    """The loss of a micro-batch, and what is watched and logged of it."""

    parts: Parts  # in an evaluation of each row once
    counts: Counts  # by which they are divided
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
        teacher: None where it is not called.
        inputs: the prepared batch; it is not changed.
        counts: of the whole optimizer step.
        own: in an evaluation the batch without repeated rows, which the loss leaves out; None where none is repeated.
        captured: what the terms captured in the forwards, by side ("student" or "teacher") and name of the term.
    """

    plan: Plan
    objective: Objective
    soft_loss: SoftTargetLoss
    model: nn.Module
    teacher: Teacher | None
    inputs: dict[str, Any]
    counts: Counts
    training: bool
    own: OwnRows | None = None
    captured: dict[tuple[str, str], Any] = field(default_factory=dict)

    def capture(self, side: str, model: nn.Module, forward: Callable[[], Any]) -> Any:
        """forward() of `model`, inside the contexts in which the terms capture what they compare."""
        if not self.objective.captures:
            return forward()
        with ExitStack() as stack:
            for name, context in self.objective.captures:
                self.captured[side, name] = stack.enter_context(context(model, side, self))
            return forward()

    def loss(
        self, teacher_outputs: TeacherOutputs, accelerator: Any, own_loss: OwnHardLoss | None, *, needs_logits: bool
    ) -> BatchLoss:
        """The loss: without logits where the plan has output heads and nothing else needs them, else of full logits.

        Where an output head turns out to do more than is known, `plan` is replaced by one with full logits.

        Args:
            own_loss: takes the hard loss where it is the model's own; None for the task's formula.
        """
        if self.plan.heads is not None and not needs_logits:
            try:
                with teacher_outputs.hidden(self.teacher, self, accelerator, self.plan.heads[1]) as output:
                    if output is not None:
                        return self._fused(output)
            except UnsupportedHead as reason:
                self.plan = self.plan.with_full_logits(reason)
        output = None if self.teacher is None else teacher_outputs.logits(self.teacher, self, accelerator)
        return self._full(output, own_loss)

    @property
    def _overlap_temperature(self) -> float | None:
        """T at which softmax(logits / T) is the teacher's distribution, of a mixture the loss's; None in training."""
        if self.training or self.teacher is None:
            return None
        return 1.0 if self.teacher.routes is None else self.objective.temperature

    def _run_student(self, labels: Mapping[str, Any]) -> Any:
        inputs = model_inputs(self.inputs, self.plan.accepted)
        with self.plan.task.pooled(self.plan.student):
            return self.capture("student", self.plan.student, partial(self.model, **inputs, **labels))

    def _first_rows(self) -> tuple[int | None, dict[str, Any], Counts]:
        """How many rows have a part in the loss (None: all), the inputs of these, and what they are divided by."""
        if self.own is None or self.own.rows == 0:
            return None, self.inputs, self.counts
        return self.own.rows, self.own.inputs, self.own.counts

    def _finished(self, parts: Parts, outputs: Any, teacher: TeacherOutput | None) -> tuple[Parts, Counts, Any]:
        """The parts with the added terms, what they are divided by, and the outputs."""
        _, inputs, counts = self._first_rows()
        losses = [term.loss(self, outputs, teacher) for term in self.objective.added]
        parts = self.objective.with_added(losses, self.plan.student, parts, inputs, counts)
        parts = parts if teacher is None else parts._replace(of_each=teacher.counts)
        if self.own is not None and self.own.rows == 0:  # the processes have to gather as many numbers
            return parts.zeroed(), self.own.counts, outputs
        return parts, counts, outputs

    def _full(self, teacher: TeacherOutput | None, own_loss: OwnHardLoss | None) -> BatchLoss:
        plan, (rows, inputs, counts) = self.plan, self._first_rows()
        outputs = self._run_student({} if own_loss is None else own_loss.labels(plan.accepted, self.inputs, counts))
        logits = behind_front(plan.task.logits(outputs, "model"), plan.student, self.inputs)
        hard = None if own_loss is None else own_loss(plan, outputs, inputs, counts)
        teacher = None if teacher is None else teacher.to(logits.device)
        student_logits, compared = _first(rows, logits, teacher)
        target: Any = None if compared is None else compared.sparse or compared.logits
        given = LossInputs(
            plan.task, inputs, counts, plan.common_ids, hard, own_loss is not None, self._overlap_temperature
        )
        parts = self.objective(given, self.soft_loss, student_logits, target)
        if compared is not None and compared.tops is not None:
            self.objective.count_same(given, student_logits, compared)
        seen = None if teacher is None else teacher.logits
        return BatchLoss(*self._finished(parts, outputs, teacher), logits, seen, logits.shape[-1])

    def _fused(self, teacher: TeacherOutput) -> BatchLoss:
        """The same without logits. Raises UnsupportedHead where a model does more with its logits than is known."""
        assert self.plan.heads is not None
        plan, head, (rows, inputs, counts) = self.plan, self.plan.heads[0], self._first_rows()

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> FusedLoss:
            hidden = behind_front(hidden, plan.student, self.inputs)
            if self.objective.by_position and teacher.positions != hidden.shape[:-1]:
                raise UnsupportedHead("student and teacher give hidden states for different positions")
            hidden, compared = _first(rows, hidden, teacher.to(hidden.device))
            given = LossInputs(
                plan.task, inputs, counts, plan.common_ids, overlap_temperature=self._overlap_temperature
            )
            return self.objective.fused(given, hidden, cast(TeacherOutput, compared), student_side(head, weight, bias))

        computed, outputs, hidden = student_loss(partial(self._run_student, {}), head, loss)
        parts = self.objective.parts(computed, counts, labelled=plan.task.targets(inputs) is not None)
        seen = teacher.logits if teacher.hidden is None else teacher.hidden
        classes = head.module.out_features
        return BatchLoss(*self._finished(parts, outputs, teacher), hidden, seen, classes, of="hidden states")


def _first(rows: int | None, student: Tensor, teacher: TeacherOutput | None) -> tuple[Tensor, TeacherOutput | None]:
    """The first rows of both; all of them for None."""
    if rows is None:
        return student, teacher
    return student[:rows], None if teacher is None else teacher.each(itemgetter(slice(rows)))
