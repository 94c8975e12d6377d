"""Accuracy, negative log-likelihood, calibration error, agreement and overlap with and KL to the teacher, from logits;
the correlation of similarities, from embeddings.

Shapes: N rows, C classes, K bins. Logits are [N, C] of any floating dtype (leading dimensions are flattened), labels
[N] class ids; rows with -100 are left out. Where no row is left the result is NaN.
All raise ValueError for labels outside 0..C-1 (and not -100) and for numbers of rows or shapes that differ, TypeError
for logits that are no floating point numbers and labels that are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..losses import IGNORE_INDEX, OVERLAP_IDS, forward_kl, overlap
from ..losses import similarity_correlation as _similarity_correlation
from ..validation import check_number, fail, message

Array = Any  # a torch tensor, a numpy array or nested lists: whatever torch.as_tensor takes


class ReliabilityBins(NamedTuple):
    """What a reliability diagram shows, one entry per bin: three float64 tensors [K].

    `confidence` and `accuracy` are the means over the rows of the bin (NaN where it has none), `fraction` is its share
    of all labelled rows (0 where empty).
    """

    confidence: torch.Tensor
    accuracy: torch.Tensor
    fraction: torch.Tensor


def _tensor(argument: str, values: Array) -> torch.Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:  # text, None, rows of unequal length
        shown = values if values is None else f"of type {type(values).__name__}"
        fix = "Give all rows the same length."
        raise TypeError(message(argument, shown, "numbers: a tensor, an array or lists", fix)) from error


def _logits(argument: str, logits: Array) -> torch.Tensor:
    """[..., C] as float64 [N, C]: a metric needs more digits than bf16 has."""
    logits = _tensor(argument, logits).detach()
    if logits.dim() < 2:
        fail(argument, f"of shape {list(logits.shape)}", "[N, C]", "Give one row of logits per example.")
    if not logits.is_floating_point():
        fix = "Give the model's raw outputs, not class ids."
        fail(argument, f"of dtype {logits.dtype}", "floating point logits", fix, error=TypeError)
    return logits.reshape(-1, logits.shape[-1]).double()


def _labelled(logits: Array, labels: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that carry a label: float64 logits [N', C] and int64 labels [N']."""
    rows = _logits("logits", logits)
    targets = _tensor("labels", labels).to(rows.device).reshape(-1)
    if targets.is_floating_point():
        fail("labels", f"of dtype {targets.dtype}", "integer class ids", "Cast them to int64.", error=TypeError)
    if len(targets) != len(rows):
        fail("labels", f"{len(targets)} rows", f"{len(rows)} rows, as in `logits`", "Give one label per row.")
    counted = targets != IGNORE_INDEX
    rows, targets = rows[counted], targets[counted].long()
    wrong = (targets < 0) | (targets >= rows.shape[-1])
    if wrong.any():
        expected = f"class ids from 0 to {rows.shape[-1] - 1}"
        fail("labels", int(targets[wrong][0]), expected, "Mark unlabelled rows with -100.")
    return rows, targets


def _pair(student_logits: Array, teacher_logits: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides as float64 [N, C] on the student's device; refused where the shapes differ."""
    student = _logits("student_logits", student_logits)
    teacher = _logits("teacher_logits", teacher_logits).to(student.device)
    if student.shape != teacher.shape:
        expected = f"{list(student.shape)}, the shape of the student's logits"
        fix = "Run both models on the same rows, in the same order."
        fail("teacher_logits", f"of shape {list(teacher.shape)}", expected, fix)
    return student, teacher


def accuracy(logits: Array, labels: Array) -> float:
    """The fraction of labelled rows whose largest logit is the label's, in [0, 1].

    Example:
        >>> accuracy([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]], [0, 1, -100])
        1.0
    """
    rows, targets = _labelled(logits, labels)
    return (rows.argmax(-1) == targets).double().mean().item()


def negative_log_likelihood(logits: Array, labels: Array) -> float:
    """The mean of -log softmax(logits)[label] over the labelled rows, in nats.

    Example:
        >>> round(negative_log_likelihood([[0.0, 0.0]], [1]), 4)
        0.6931
    """
    rows, targets = _labelled(logits, labels)
    return F.cross_entropy(rows, targets).item()


def reliability_bins(logits: Array, labels: Array, bins: int = 15) -> ReliabilityBins:
    """Confidence against accuracy, in `bins` bins of equal width over (0, 1]: the data of a reliability diagram.

    A row's confidence is its largest probability; bin k holds the confidences in (k / bins, (k + 1) / bins].

    Example:
        >>> reliability_bins([[0.0, 0.0], [0.0, 0.0]], [0, 1], bins=2).accuracy.tolist()
        [0.5, nan]
    """
    check_number("bins", bins, low=1)
    if not isinstance(bins, int):
        fail("bins", repr(bins), "a whole number", "Give `bins` as an int.", error=TypeError)
    rows, targets = _labelled(logits, labels)
    confidence, predicted = rows.softmax(-1).max(-1)
    right = (predicted == targets).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(index, minlength=bins).double()
    return ReliabilityBins(
        confidence=torch.bincount(index, weights=confidence, minlength=bins) / count,
        accuracy=torch.bincount(index, weights=right, minlength=bins) / count,
        fraction=count / max(len(rows), 1),
    )


def expected_calibration_error(logits: Array, labels: Array, bins: int = 15) -> float:
    """The mean over rows of |accuracy - confidence| of the row's bin, in [0, 1]; 0 is perfectly calibrated.

    Example:
        >>> expected_calibration_error([[0.0, 0.0], [0.0, 0.0]], [0, 0])
        0.5

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, equation 3.
    """
    found = reliability_bins(logits, labels, bins)
    if not found.fraction.any():
        return float("nan")
    return (found.fraction * (found.accuracy - found.confidence).abs()).nansum().item()


def teacher_agreement(student_logits: Array, teacher_logits: Array) -> float:
    """The fraction of rows where student and teacher have the same largest logit, in [0, 1].

    Example:
        >>> teacher_agreement([[2.0, 1.0], [0.0, 3.0]], [[5.0, 1.0], [4.0, 3.0]])
        0.5
    """
    student, teacher = _pair(student_logits, teacher_logits)
    return (student.argmax(-1) == teacher.argmax(-1)).double().mean().item()


def teacher_overlap(student_logits: Array, teacher_logits: Array, ids: int = OVERLAP_IDS) -> float:
    """The mean over rows of the teacher's probability mass on the student's `ids` largest logits, in [0, 1].

    Example:
        >>> round(teacher_overlap([[1.0, 3.0, 2.0]], [[3.0, 2.0, 1.0]], ids=2), 4)
        0.3348
    """
    student, teacher = _pair(student_logits, teacher_logits)
    return overlap(student, teacher, ids=ids).mean().item()


def kl_to_teacher(student_logits: Array, teacher_logits: Array) -> float:
    """The mean over rows of KL(softmax(teacher) || softmax(student)) at temperature 1, in nats.

    Example:
        >>> round(kl_to_teacher([[1.8, 1.1, 0.2], [0.9, 2.1, 0.6]], [[2.0, 1.0, 0.1], [1.0, 2.0, 0.5]]), 6)
        0.006916
    """
    student, teacher = _pair(student_logits, teacher_logits)
    return forward_kl(student, teacher).mean().item()


def similarity_correlation(student_embeddings: Array, teacher_embeddings: Array) -> float:
    """The Spearman correlation, over all pairs of rows, of the student's cosine similarities and the teacher's.

    Embeddings [N, H] and [N, H'] of the same rows; NaN below three rows, and for equal similarities.

    Example:
        >>> similarity_correlation([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], [[2.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        0.5
    """
    sides = {"student_embeddings": student_embeddings, "teacher_embeddings": teacher_embeddings}
    return _similarity_correlation(*(_logits(name, values) for name, values in sides.items())).item()
