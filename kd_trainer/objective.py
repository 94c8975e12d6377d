"""The objective: sums over the counted positions -> the loss of a micro-batch, divided once.

    loss = scale * ((1 - alpha) * S_hard / D_hard + alpha * S_soft / D_soft)

S_* are sums over THIS micro-batch, D_* count positions (or rows) over ALL micro-batches of the optimizer step and all
processes, so the loss does not depend on how a batch is split. Leaves the counting across processes to `trainer.py`.
Imports: heads, losses, reductions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .heads import Head, main_input
from .losses import SoftTargetLoss
from .reductions import IGNORE_INDEX, divide, select_positions


class Counts(NamedTuple):
    """How much of a batch counts: numbers or 0-dim tensors, local or summed over micro-batches and processes."""

    hard: Tensor | int  # positions with a label
    soft: Tensor | int  # positions counted for the soft loss
    rows: Tensor | int  # rows of the batch
    scale: int = 1  # undoes the averaging of gradients over processes where the counts are global


class Parts(NamedTuple):
    """The loss of a micro-batch and what it is made of; soft holds T^2, agreement is a fraction, both divided alike."""

    total: Tensor
    hard: Tensor | None
    soft: Tensor | None
    agreement: Tensor | None


@dataclass(frozen=True)
class Objective:
    """The settings of the mixture at one step: total = alpha * soft + (1 - alpha) * hard."""

    alpha: float
    temperature: float
    divergence: str = "forward_kl"
    beta: float | None = None
    reduction: str = "batchmean"
    positions: str = "labels"
    label_smoothing: float = 0.0

    def formula(self, *, token_level: bool) -> str:
        """The formula with its numbers, e.g. `loss = 0.7 * soft(forward_kl, T=3) + 0.3 * hard, per row`.

        A term of weight zero is left out, as it is in the loss.
        """
        beta = "" if self.beta is None else f", beta={self.beta:g}"
        terms = {f"soft({self.divergence}{beta}, T={self.temperature:g})": self.alpha, "hard": 1 - self.alpha}
        shown = [name if weight == 1 else f"{weight:g} * {name}" for name, weight in terms.items() if weight > 0]
        per = "per token" if token_level and self.reduction == "tokenmean" else "per row"
        return f"loss = {' + '.join(shown)}, {per}"

    def count(self, head: Head, inputs: Mapping[str, Any]) -> Counts:
        """The counts of one micro-batch, read from its inputs alone."""
        targets = head.targets(inputs)
        rows = (main_input(inputs) if targets is None else targets).shape[0]
        hard: Tensor | int = 0 if targets is None else (targets != IGNORE_INDEX).sum()
        if not head.token_level:
            return Counts(hard, rows, rows)
        if self.positions == "labels" and targets is not None:
            return Counts(hard, hard, rows)
        mask = head.attended(inputs)
        soft = head.sequences(inputs).numel() if mask is None else mask.sum()
        return Counts(hard, soft, rows)

    def __call__(
        self,
        head: Head,
        soft_loss: SoftTargetLoss,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        inputs: Mapping[str, Any],
        counts: Counts,
    ) -> Parts:
        """The loss of one micro-batch.

        Args:
            soft_loss: sums T^2 * D over the positions it is given (reduction "sum").
            student_logits: [B, C] or [B, S, C]; teacher_logits: the same, or None where the teacher is not called.
            counts: the denominators of the whole optimizer step, and the scale.
        """
        targets = head.targets(inputs)
        head.check_shapes(student_logits, teacher_logits, targets)
        mask = head.soft_mask(inputs, targets, self.positions)
        by_rows = self.reduction == "batchmean"
        chosen = student_logits if mask is None else select_positions(student_logits, mask)
        hard = soft = agreement = None
        if targets is not None:
            logits, labels = student_logits, targets
            if mask is not None and self.positions == "labels":  # hard and soft count the same positions
                logits, labels = chosen, select_positions(targets, mask)
            elif head.token_level:  # padding's NaN would reach the gradient: 0 * NaN
                labelled = targets != IGNORE_INDEX
                logits, labels = select_positions(student_logits, labelled), select_positions(targets, labelled)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.alpha < 1):
                hard_sum = head.hard_loss_sum(logits, labels, self.label_smoothing)
            hard = _over(hard_sum, counts.rows if by_rows else counts.hard, counts.scale)
        if teacher_logits is not None:
            taught = teacher_logits if mask is None else select_positions(teacher_logits, mask)
            soft = _over(soft_loss(chosen, taught), counts.rows if by_rows else counts.soft, counts.scale)
            same = chosen.detach().argmax(-1) == taught.argmax(-1)
            agreement = _over(same.sum(), counts.soft, counts.scale)
        return Parts(self._mix(hard, soft, student_logits), hard, soft, agreement)

    def _mix(self, hard: Tensor | None, soft: Tensor | None, student_logits: Tensor) -> Tensor:
        """alpha * soft + (1 - alpha) * hard; a term of weight zero is not added, since 0 * inf is NaN."""
        weighted = [
            term if weight == 1 else weight * term
            for weight, term in ((self.alpha, soft), (1 - self.alpha, hard))
            if term is not None and weight > 0
        ]
        if not weighted:  # nothing counts: zero, with a gradient path for the processes that wait in backward
            return student_logits[..., :0].sum()
        return weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1]


def _over(total: Tensor, count: Tensor | int, scale: int) -> Tensor:
    """This micro-batch's part of a mean over the whole optimizer step."""
    share = divide(total, count)
    return share if scale == 1 else share * scale


def scheduled(start: float, end: float | None, schedule: str, progress: float) -> float:
    """The value of a setting at `progress` in [0, 1] of the training: start -> end, linear or half a cosine.

    Constant where `end` is None. A pure function, so that a resumed run goes on at the same value.
    """
    if end is None or schedule == "constant":
        return start
    share = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share
