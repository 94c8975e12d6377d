"""The objective: sums over the counted positions -> the loss of a micro-batch, divided once.

    loss = scale * ((1 - alpha) * S_hard / D_hard + alpha * S_soft / D_soft + sum of weight * S / D of added terms)

S_* are sums over THIS micro-batch, D_* count positions (or rows) over ALL micro-batches of the optimizer step and all
processes, so the loss does not depend on how a batch is split. Hard and soft are computed together here; the others are
in `terms.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..losses import (
    DIVERGENCES,
    IGNORE_INDEX,
    OVERLAP_IDS,
    FusedLoss,
    OutputProjection,
    Samples,
    SoftTargetLoss,
    TopK,
    chunk_rows,
    divide,
    fused_linear_distillation,
    is_small,
    logits_in_tiles,
    position_entropies,
    quota_sum,
    sampled_forward_kl,
    select_positions,
    small_batch_loss,
    top_entropy_mask,
    top_k_divergence,
)
from ..tasks import Task, class_labels, main_input
from ..teachers import Sparse, TeacherOutput
from ..validation import fail
from .terms import Term


class Counts(NamedTuple):
    """How much of a batch counts: numbers or 0-dim tensors, local or summed over micro-batches and processes."""

    hard: Tensor | int  # positions with a label
    soft: Tensor | int  # positions counted for the soft loss
    rows: Tensor | int  # rows of the batch
    scale: int = 1  # undoes the averaging of gradients over processes where the counts are global
    num_items: Any = None  # upstream's num_items_in_batch, where the model's own loss divides by it
    by_num_items: bool = False  # whether the formula's sum is divided by it too, instead of `hard`
    micro_batches: int = 1  # of the optimizer step: upstream divides a loss by it that knows no num_items
    added: tuple[Tensor | int, ...] = ()  # of each term that `Objective.added` lists

    @property
    def hard_divisor(self) -> Any:
        """What the hard loss is divided by with "tokenmean"."""
        return self.num_items if self.by_num_items else self.hard

    @property
    def each(self) -> tuple[Tensor | int, ...]:
        """The numbers that add up over micro-batches and processes."""
        return self.hard, self.soft, self.rows, *self.added

    def with_each(
        self, hard: Tensor | int, soft: Tensor | int, rows: Tensor | int, *added: Tensor | int, scale: int = 1
    ) -> Counts:
        """The same with the numbers of `each` replaced."""
        return self._replace(hard=hard, soft=soft, rows=rows, added=added, scale=scale)

    def over_processes(self, accelerator: Any, device: torch.device, same_batch: int, scale: int) -> Counts:
        """The counts summed over the processes, of which `same_batch` share each batch: one reduce a step."""
        local = torch.stack([torch.as_tensor(c, dtype=torch.float32, device=device) for c in self.each])
        return self.with_each(*accelerator.reduce(local, reduction="sum").div(same_batch).unbind(), scale=scale)


class Parts(NamedTuple):
    """The loss of a micro-batch and what it is made of: each term before its weight, and the teacher's agreement.

    Soft holds T^2, agreement is a fraction, all divided alike; None where a term does not exist.
    """

    total: Tensor
    hard: Tensor | float | None
    soft: Tensor | float | None
    agreement: Tensor | float | None
    added: Sequence[Tensor | float | None] = ()  # of each term that `Objective.added` lists; () where none exists
    of_each: Tensor | None = None  # `TeacherOutput.counts`
    overlap: Tensor | float | None = None  # a fraction; of evaluations
    generated: Tensor | None = None  # [2]: at how many tokens of the student's own both agree, and of how many

    def zeroed(self) -> Parts:
        """The same parts of no rows at all."""
        parts = (*self[1:4], self.overlap, *self.added)
        hard, soft, agreement, overlap, *added = (None if x is None else 0.0 for x in parts)
        of_each = None if self.of_each is None else self.of_each * 0
        return Parts(self.total, hard, soft, agreement, added, of_each, overlap)


class LossInputs(NamedTuple):
    """What the loss of a micro-batch is computed with beside the outputs of the models.

    Args:
        counts: the denominators of the whole optimizer step, and the scale.
        common_ids: where the vocabularies differ in size, soft loss and agreement are over the first `common_ids` ids
            of both, renormalised; the hard loss is over all of the student's. None: equal vocabularies.
        own_hard: with `takes_own` the hard loss, divided as the stock Trainer divides it; None where the batch has no
            labels.
        overlap_temperature: T at which softmax(logits / T) is the teacher's distribution; None: no overlap.
    """

    task: Task
    inputs: Mapping[str, Any]
    counts: Counts
    common_ids: int | None = None
    own_hard: Tensor | None = None
    takes_own: bool = False
    overlap_temperature: float | None = None


@dataclass(frozen=True)
class Objective:
    """The settings of the loss at one step: total = alpha * soft + (1 - alpha) * hard + the added terms."""

    alpha: float
    temperature: float
    divergence: str = "forward_kl"
    beta: float | None = None
    reduction: str = "batchmean"
    positions: str = "labels"
    label_smoothing: float = 0.0
    added: tuple[Term, ...] = ()
    standardize_logits: bool = False
    position_fraction: float = 1.0  # of a row: soft loss at its positions of highest student entropy

    soft_name: ClassVar[str] = "soft"
    by_position: ClassVar[bool] = True  # position i of the student is compared with position i of the teacher

    def soft_loss(self) -> SoftTargetLoss:
        """The sum of the soft loss over logits."""
        more: dict[str, Any] = {"beta": self.beta, "standardize_logits": self.standardize_logits, "reduction": "sum"}
        return SoftTargetLoss(temperature=self.temperature, divergence=self.divergence, **more)

    @cached_property
    def captures(self) -> tuple[tuple[str, Any], ...]:
        """Name and `capture` of each added term that has one."""
        return tuple((term.name, term.capture) for term in self.added if term.capture is not None)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Every term; `logged_row` and `denominators` have the same order."""
        return Term("hard", 1 - self.alpha), Term(self.soft_name, self.alpha), *self.added

    def formula(self, task: Task | None) -> str:
        """The formula with its numbers, e.g. `loss = 0.7 * soft(forward_kl, T=3) + 0.3 * hard, per row`.

        A term of weight zero is left out, as it is in the loss. A weight that the student's config holds is in the
        notes of the start block instead.
        """
        hard, first, *added = ((term.name, term.weight) for term in self.terms)
        terms = [(f"{first[0]}({self.soft_settings(task)})", first[1]), hard, *added]
        weighed = [(name, weight) for name, weight in terms if not callable(weight) and weight != 0]
        shown = [name if weight == 1 else f"{weight:g} * {name}" for name, weight in weighed]
        of_positions = task is not None and task.by_position and self.reduction == "tokenmean"
        return f"loss = {' + '.join(shown)}, per {task.position if task is not None and of_positions else 'row'}"

    def soft_settings(self, task: Task | None) -> str:
        """The settings of the soft loss, for the formula."""
        soft = self.divergence if task is None else task.soft_term(self.divergence)
        if task is None or task.tempered:
            soft += "" if self.beta is None else f", beta={self.beta:g}"
            soft += "" if DIVERGENCES[self.divergence].of_logits else f", T={self.temperature:g}"
            soft += ", standardized logits" if self.standardize_logits else ""
        if self.position_fraction < 1:
            soft += f", {self.position_fraction:g} of the {'position' if task is None else task.position}s"
        return soft

    def count(self, task: Task, inputs: Mapping[str, Any]) -> Counts:
        """The counts of one micro-batch, read from its inputs alone."""
        targets = task.targets(inputs)
        rows = (main_input(inputs) if targets is None else targets).shape[0]
        hard = task.labelled_in(inputs, targets)
        added = tuple([rows if term.count is None else term.count(task, inputs) for term in self.added])
        if not task.by_position:
            return Counts(hard, rows, rows, added=added)
        selects = self.position_fraction < 1
        if not selects and self.positions == "labels" and targets is not None and task.made_at(inputs, targets) is None:
            return Counts(hard, hard, rows, added=added)
        mask = task.soft_mask(inputs, targets, self.positions)
        if selects:
            mask = torch.ones_like(task.sequences(inputs), dtype=torch.bool) if mask is None else mask
            return Counts(hard, quota_sum(mask, self.position_fraction, task.segments(inputs, mask)), rows, added=added)
        soft = task.sequences(inputs).numel() if mask is None else mask.sum()
        return Counts(hard, soft, rows, added=added)

    def count_all(self, task: Task, batches: Sequence[Mapping[str, Any]]) -> Counts:
        """The counts of all micro-batches of an optimizer step on this process."""
        each = [self.count(task, batch) for batch in batches]
        if len(each) == 1:
            return each[0]
        return each[0].with_each(*map(sum, zip(*(counts.each for counts in each), strict=True)))

    def __call__(
        self, given: LossInputs, soft_loss: SoftTargetLoss, student_logits: Tensor, teacher: Tensor | Sparse | None
    ) -> Parts:
        """The loss of one micro-batch.

        Args:
            soft_loss: sums T^2 * D over the positions it is given (reduction "sum").
            student_logits: [B, C] or [B, S, C].
            teacher: logits of the same shape; or `TopK` or `Samples` [B, k] or [B, S, k]; or None where the teacher is
                not called.
        """
        task, inputs, counts, common_ids, own_hard, takes_own, overlap_temperature = given
        targets = task.targets(inputs)
        task.check_shapes(student_logits, teacher if isinstance(teacher, Tensor) else None, targets, common_ids)
        mask = self._soft_mask(given, student_logits, selects=teacher is not None)
        chosen, logits, labels = student_logits, student_logits, targets
        if task.token_level:
            within_labels = self.positions == "labels" and task.generated(inputs) is None
            chosen, teacher, logits, labels = self._counted(student_logits, teacher, targets, mask, within_labels)
        if common_ids is not None and teacher is not None:
            chosen = chosen[..., :common_ids]
            teacher = teacher[..., :common_ids] if isinstance(teacher, Tensor) else teacher
        hard_count, soft_count = self._denominators(counts)
        overlap = None
        if overlap_temperature is not None and isinstance(teacher, Tensor):
            z_s, z_t = (task.distributions(logits, inputs) for logits in (chosen, teacher))
            overlap = self._of_soft(task.overlap_sum(z_s, z_t, mask, overlap_temperature), counts)
        plain = self.divergence != "forward_kl" or self.label_smoothing > 0 or logits is not chosen or not task.softmax
        plain = plain or takes_own or self.standardize_logits
        if not plain and isinstance(teacher, Tensor) and is_small(chosen, teacher):
            parts = self._small_batch(chosen, teacher, labels, float(soft_count), float(hard_count), counts)
            if parts is not None:
                return parts._replace(overlap=overlap)
        hard = soft = agreement = generated = None
        if takes_own:
            hard = own_hard
        elif labels is not None:
            # At alpha 1 the hard loss is for the log alone.
            hard_sum = task.hard_loss_sum(logits if self.alpha < 1 else logits.detach(), labels, self.label_smoothing)
            hard = divide(hard_sum, hard_count) * counts.scale
        if teacher is not None:
            known = targets if soft_loss.needs_labels else None
            if known is not None and task.token_level:
                known = (known if mask is None else select_positions(known, mask)).reshape(chosen.shape[:-1])
            if isinstance(teacher, Tensor):
                z_s, z_t = (task.distributions(logits, inputs) for logits in (chosen, teacher))
                soft_sum = task.soft_loss_sum(soft_loss, z_s, z_t, known, mask)
                same = task.agreement_sum(z_s, z_t, mask)
            else:
                soft_sum, same = self._sparse_sums(chosen, teacher, class_labels(soft_loss, chosen, known))
            soft = divide(soft_sum, soft_count) * counts.scale
            agreement = self._of_soft(same, counts)
            own = task.generated(inputs)
            if own is not None and isinstance(teacher, Tensor):
                own = select_positions(own, mask).flatten()
                generated = _of_own((z_s[own].argmax(-1) == z_t[own].argmax(-1)).sum(), own)
        return Parts(self._mix(hard, soft, student_logits), hard, soft, agreement, (), None, overlap, generated)

    @staticmethod
    def _of_soft(total: Tensor | None, counts: Counts) -> Tensor | None:
        """A sum over the positions of the soft loss, divided by their number."""
        return None if total is None else divide(total, counts.soft) * counts.scale

    def _soft_mask(self, given: LossInputs, student_logits: Tensor, *, selects: bool) -> Tensor | None:
        """The positions of the soft loss; `selects`: by their entropy, where a fraction of them counts."""
        task, inputs = given.task, given.inputs
        mask = task.soft_mask(inputs, task.targets(inputs), self.positions)
        if self.position_fraction == 1 or not selects:
            return mask
        flat = student_logits.detach().flatten(0, 1)
        if mask is None:
            mask = torch.ones(student_logits.shape[:2], dtype=torch.bool, device=flat.device)
        size = chunk_rows(flat.shape[-1], 4, on_cpu=flat.device.type == "cpu")
        entropy = position_entropies(mask, lambda rows: flat[rows], size, classes=given.common_ids)
        return self._of_highest(entropy, task, inputs, mask)

    def count_same(self, given: LossInputs, student_logits: Tensor, teacher: TeacherOutput) -> None:
        """Adds the top classes of several teachers to their `counts`."""
        task, tops, counts = given.task, cast(Tensor, teacher.tops), cast(Tensor, teacher.counts)
        mask = self._soft_mask(given, student_logits, selects=True)
        student = task.distributions(student_logits, given.inputs)[..., : given.common_ids].argmax(-1)
        if task.token_level and mask is not None:
            tops = tops.masked_fill(~mask.unsqueeze(-1), -1)
        for row, top in zip(counts, tops.unbind(-1), strict=True):
            row += torch.stack([task.positions_sum(same, mask) for same in (top == student, top >= 0)])

    def _counted(
        self,
        student_logits: Tensor,
        teacher: Tensor | Sparse | None,
        targets: Tensor | None,
        mask: Tensor | None,
        within_labels: bool,
    ) -> tuple[Tensor, Tensor | Sparse | None, Tensor, Tensor | None]:
        """The counted positions: student logits and teacher of the soft loss, student logits and labels of the hard.

        `within_labels`: every position of the mask has a label.
        """
        logits, labels = student_logits, targets
        if targets is not None:  # padding's NaN would reach the gradient: 0 * NaN
            labelled = targets != IGNORE_INDEX
            logits, labels = select_positions(student_logits, labelled), select_positions(targets, labelled)
        if mask is not None and targets is not None and within_labels:
            within = select_positions(mask, labelled)  # usually all: then the same rows serve both losses
            same_rows = within.device.type == "cpu" and bool(within.all())
            chosen = logits if same_rows else select_positions(logits, within)
        elif mask is None and isinstance(teacher, (TopK, Samples)):
            return student_logits, teacher, logits, labels
        else:
            chosen = select_positions(student_logits, mask)
        if isinstance(teacher, Tensor):
            teacher = select_positions(teacher, mask)
        elif teacher is not None:
            teacher = type(teacher)(*(select_positions(x, mask) for x in teacher))
        return chosen, teacher, logits, labels

    def _sparse_sums(self, student_logits: Tensor, sparse: Sparse, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """(T^2 * sum of D(p, q), number of equal top classes) where the teacher is given sparsely."""
        if isinstance(sparse, TopK):
            nats = top_k_divergence(
                student_logits, sparse, temperature=self.temperature, divergence=self.divergence, beta=self.beta,
                labels=labels,
            )  # fmt: skip
            top = sparse.ids[..., 0]
        else:
            nats, top = sampled_forward_kl(student_logits, sparse, temperature=self.temperature), sparse.top
        return nats.sum() * self.temperature**2, (student_logits.argmax(-1) == top).sum()

    def fused(
        self, given: LossInputs, student_hidden: Tensor, teacher: TeacherOutput, weights: Mapping[str, Any]
    ) -> FusedLoss:
        """The same from final hidden states [B, S, H], without logits: see `fused_linear_distillation`.

        Args:
            teacher: its outputs for [B, S] positions.
            weights: the student's output head, by that function's argument names. Of the result, `parts` makes `Parts`.
        """
        task, inputs, counts, common_ids, *_ = given
        targets = task.targets(inputs)
        shape = student_hidden.shape[:-1]
        if targets is not None and targets.shape != shape:
            expected = f"{tuple(shape)}, one for each position of the model's hidden states"
            fix = "Check the label column and the data collator."
            fail("labels", f"of shape {tuple(targets.shape)}", expected, fix)
        mask = hard = None  # no mask: both losses count the positions with a label, or all of them
        if self.position_fraction < 1:
            mask, targets, hard = self._selected(given, student_hidden, weights, targets)
        elif targets is None or self.positions != "labels" or task.made_at(inputs, targets) is not None:
            mask = task.soft_mask(inputs, targets, self.positions)
            if mask is None and targets is not None:
                mask = torch.ones(shape, dtype=torch.bool, device=student_hidden.device)
        own = task.generated(inputs)
        if targets is None and DIVERGENCES[self.divergence].needs_labels:
            targets = torch.full(shape, IGNORE_INDEX, device=student_hidden.device)
        hard_count, soft_count = self._denominators(counts)
        outputs: dict[str, Any] = {"teacher_hidden": None, "teacher_weight": None}
        outputs |= teacher.each(partial(torch.flatten, start_dim=0, end_dim=1)).as_arguments()
        dense, classes = teacher.sparse is None, common_ids or len(weights["student_weight"])
        if given.overlap_temperature is not None and dense and task.has_overlap(classes):
            outputs |= {"overlap_ids": OVERLAP_IDS, "overlap_temperature": given.overlap_temperature}
        loss = fused_linear_distillation(
            student_hidden.flatten(0, 1),
            labels=None if targets is None else targets.flatten(),
            alpha=self.alpha,
            temperature=self.temperature,
            divergence=self.divergence,
            beta=self.beta,
            standardize_logits=self.standardize_logits,
            soft_mask=None if mask is None else mask.flatten(),
            soft_count=soft_count,
            hard_count=hard_count,
            factor=counts.scale,
            label_smoothing=self.label_smoothing,
            common_ids=common_ids,
            marked=None if own is None else own.flatten(),
            **weights,
            **outputs,
        )
        loss = loss if hard is None else loss._replace(hard=hard)
        return loss if own is None else loss._replace(marked=_of_own(loss.marked, own if mask is None else own & mask))

    def _selected(
        self, given: LossInputs, student_hidden: Tensor, weights: Mapping[str, Any], targets: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The soft mask of the selected positions, the labels that remain, and the hard sum where it is known already.

        The entropies take one product of the student's head. At alpha 1, where the hard loss is for the log alone, it
        is taken from that product, so that both heads then multiply the selected positions alone.
        """
        task, inputs, _, common_ids, *_ = given
        mask = task.soft_mask(inputs, targets, self.positions)
        if mask is None:
            mask = torch.ones(student_hidden.shape[:-1], dtype=torch.bool, device=student_hidden.device)
        head, hidden = OutputProjection.from_arguments(weights, "student"), student_hidden.detach().flatten(0, 1)
        size = chunk_rows(len(head.weight), 4, on_cpu=mask.device.type == "cpu")
        entropies = partial(position_entropies, logits_of=logits_in_tiles(head, hidden, size), tile_rows=size)
        if targets is None or self.alpha < 1:
            return self._of_highest(entropies(mask, classes=common_ids), task, inputs, mask), targets, None
        labels, sums = targets.flatten(), []

        def also(rows: Tensor, logits: Tensor) -> None:
            sums.append(task.hard_loss_sum(logits, labels[rows], self.label_smoothing))

        entropy = entropies(mask | (targets != IGNORE_INDEX), classes=common_ids, also=also)
        mask = self._of_highest(entropy, task, inputs, mask)
        return mask, targets.masked_fill(~mask, IGNORE_INDEX), torch.stack(sums).sum() if sums else None

    def _of_highest(self, entropy: Tensor, task: Task, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        return top_entropy_mask(entropy, mask, self.position_fraction, task.segments(inputs, mask))

    def parts(self, loss: FusedLoss, counts: Counts, *, labelled: bool) -> Parts:
        """`Parts` of a fused loss: its sums over the denominators, as `__call__` gives them."""
        hard_count, soft_count = self._denominators(counts)
        hard = divide(loss.hard, hard_count) * counts.scale if labelled else None
        soft, same = divide(loss.soft, soft_count) * counts.scale, self._of_soft(loss.agreement, counts)
        overlap = self._of_soft(loss.overlap, counts)
        return Parts(loss.total, hard, soft, same, overlap=overlap, generated=loss.marked)

    def with_added(
        self,
        losses: Sequence[Tensor | None],
        student: nn.Module,
        parts: Parts,
        inputs: Mapping[str, Any],
        counts: Counts,
    ) -> Parts:
        """The parts with the added terms, divided and weighed.

        Args:
            losses: of each added term, as `Term.loss` gives it; of more rows than `inputs` have, the first are taken.
            inputs, counts: as in `LossInputs`.
        """
        if all(loss is None for loss in losses):
            return parts
        total, means = parts.total, []
        for term, loss, count in zip(self.added, losses, counts.added, strict=True):
            mean = None
            if loss is not None:
                loss, rows = loss.to(total.device), main_input(inputs).shape[0]
                summed = loss[:rows].sum() * counts.scale if loss.dim() else loss * (rows * counts.scale)
                mean, weight = divide(summed, count), term.weight_for(student)
                total = total + weight * mean if weight else total  # 0 * inf is NaN
            means.append(mean)
        return parts._replace(total=total, added=means)

    def denominators(self, counts: Counts) -> tuple[Tensor | int, ...]:
        """What the sum of each term is divided by, in the order of `terms`."""
        return *self._denominators(counts), *counts.added

    def _denominators(self, counts: Counts) -> tuple[Tensor | int, Tensor | int]:
        """Of hard and soft."""
        return (counts.rows, counts.rows) if self.reduction == "batchmean" else (counts.hard_divisor, counts.soft)

    def _small_batch(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        soft_count: float,
        hard_count: float,
        counts: Counts,
    ) -> Parts | None:
        """The same by `small_batch_loss`, on CPU, where reading a number is free; None: take the plain way."""
        small = small_batch_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            soft_weight=divide(self.alpha * counts.scale, soft_count),
            hard_weight=divide((1 - self.alpha) * counts.scale, hard_count),
            all_labelled=float(counts.hard) == float(counts.rows),
        )
        if small is None:
            return None
        hard = None if labels is None else divide(small.hard * counts.scale, hard_count)
        same = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).sum().item()
        agreement = divide(same * counts.scale, float(counts.soft))
        return Parts(small.total, hard, divide(small.soft * counts.scale, soft_count), agreement)

    def _mix(self, hard: Tensor | None, soft: Tensor | None, student_logits: Tensor) -> Tensor:
        """alpha * soft + (1 - alpha) * hard; a term of weight zero is not added, since 0 * inf is NaN."""
        if soft is None or self.alpha == 0:
            if hard is None:  # nothing counts: zero, with a gradient path for the processes that wait in backward
                return student_logits[..., :0].sum()
            return hard if self.alpha == 0 else (1 - self.alpha) * hard
        if hard is None or self.alpha == 1:
            return soft if self.alpha == 1 else self.alpha * soft
        return torch.add((1 - self.alpha) * hard, soft, alpha=self.alpha)


def _of_own(agreed: Tensor | None, own: Tensor) -> Tensor | None:
    """`Parts.generated`; `own`: which of the counted positions are tokens of the student's own."""
    return None if agreed is None else torch.stack([agreed, own.sum().to(agreed)])
