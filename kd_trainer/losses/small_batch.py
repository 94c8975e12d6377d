"""Soft and hard loss of small logits in one pass, gradient included: where calls cost more than arithmetic.

The fast path of `training/objective.py` for forward KL on CPU; `SoftTargetLoss` and the head's cross-entropy are its
plain twin. A step of a small classifier is a few dozen operations on tiny tensors: recording and replaying each one for
autograd would take a tenth of the whole step. Shapes: N positions, C classes.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reductions import IGNORE_INDEX

_LARGEST = 2**15  # elements; above it arithmetic rules, and the blocks of `formulas.py` need less memory


class SmallBatchLoss(NamedTuple):
    """total = soft_weight * soft + hard_weight * hard, and the two sums over positions, in nats."""

    total: Tensor
    soft: float  # T^2 * sum of KL(p || q)
    hard: float  # sum of the cross-entropy at T = 1; 0 without labels


def is_small(student_logits: Tensor, teacher_logits: Tensor) -> bool:
    """Whether `small_batch_loss` may take these: float32 on CPU, few elements, no gradient for the teacher."""
    return (
        student_logits.numel() <= _LARGEST
        and student_logits.dtype == teacher_logits.dtype == torch.float32
        and student_logits.device.type == "cpu"
        and not teacher_logits.requires_grad
    )


def small_batch_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    all_labelled: bool = False,
) -> SmallBatchLoss | None:
    """soft_weight * T^2 sum KL(p || q) + hard_weight * sum CE, with its gradient.

    None where a sum is not finite or a label is outside the classes: the caller then takes the plain twin, which has
    0 * log 0 = 0 and an error message that names the label.

    Args:
        student_logits, teacher_logits: [N, C], see `is_small`.
        labels: [N] integers, -100 where there is none; None: no hard loss.
        temperature: T > 0 of the soft loss.
        soft_weight, hard_weight: a term of weight 0 gives no gradient.
        all_labelled: no label is -100 (spares a check).

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531, section 2; dKL/dz = (q - p) / T, dCE/dz = softmax(z) - onehot.
    """
    with torch.no_grad():
        # One softmax for all three: at this size a call costs more than what it computes.
        logits = torch.stack((student_logits, teacher_logits, student_logits)).div_(_divisors(temperature))
        log_probs = torch.log_softmax(logits, -1)
        q, p, q_hard = log_probs.exp().unbind()
        log_q, log_p, log_q_hard = log_probs.unbind()
        soft = log_p.sub_(log_q).mul_(p).sum().item() * temperature**2
        gradient = q.sub_(p).mul_(soft_weight * temperature)
        hard = 0.0
        if labels is not None:
            labels = labels if labels.dtype == torch.int64 else labels.long()
            try:
                hard = F.nll_loss(log_q_hard, labels, ignore_index=IGNORE_INDEX, reduction="sum").item()
            except IndexError:
                return None
            if hard_weight and len(labels):
                gradient.add_(_minus_onehot(q_hard, labels, all_labelled), alpha=hard_weight)
    if not math.isfinite(soft + hard):
        return None
    # Weight 0 is not multiplied: a sum that may be huge stays out of the total.
    value = (soft_weight * soft if soft_weight else 0.0) + (hard_weight * hard if hard_weight else 0.0)
    return SmallBatchLoss(_WithGradient.apply(student_logits, gradient, value), soft, hard)


@functools.lru_cache(maxsize=4)
def _divisors(temperature: float) -> Tensor:
    return torch.tensor([temperature, temperature, 1.0]).view(3, 1, 1)


def _minus_onehot(q: Tensor, labels: Tensor, all_labelled: bool) -> Tensor:
    """dCE/dz = q - onehot(labels) [N, C], in place; zero rows where there is no label."""
    column = labels.unsqueeze(1)
    if all_labelled or labels.min().item() >= 0:
        return q.scatter_(1, column, -1.0, reduce="add")
    unlabelled = column == IGNORE_INDEX
    return q.scatter_(1, column.masked_fill(unlabelled, 0), -1.0, reduce="add").masked_fill_(unlabelled, 0.0)


class _WithGradient(torch.autograd.Function):
    """A number as a function of the logits, whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: Tensor, value: float) -> Tensor:
        ctx.save_for_backward(gradient)
        return torch.full((), value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_value, None, None
