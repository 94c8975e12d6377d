"""Losses as modules: settings in, one call out.

For: those who write their own training loop, and the trainer's soft loss. Leaves formulas to `divergences.py` and
`distributions.py`, masks and denominators to `reductions.py`.
Letters: B rows (sequences), S positions, V classes or vocabulary, N rows of probabilities; T temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..validation import check_choice, check_number, check_temperature, check_tensor, fail
from .checks import check_class_ids, check_logits, check_standardized
from .divergences import DIVERGENCES, check_divergence, divergence_terms
from .formulas import standardize, wide
from .reductions import IGNORE_INDEX, REDUCTIONS, as_mask, masked_sum, reduce_terms, reduce_total, select_positions


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raises unless `labels` are integer class ids, one per position of `logits` [..., V]."""
    check_tensor("labels", labels, "integer class ids")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        shown = f"of dtype {labels.dtype}"
        fail("labels", shown, "integer class ids", "Call `.long()` on labels, not on probabilities.", error=TypeError)
    as_mask(labels, logits.shape[:-1], argument="labels")


class SoftTargetLoss(nn.Module):
    """T² D(softmax(z_t/T), softmax(z_s/T)), reduced as torch reduces: the soft-target loss of distillation.

    When to use: as the distillation term of your own loop; the trainer uses it too. T² is in the value and in the
    gradient, so that the loss keeps its weight beside a hard loss when T changes.

    Args:
        temperature: T > 0; 1 compares the distributions as they are, 2 to 5 is usual. Default 1.
        divergence: a key of `DIVERGENCES`; see the function of that name. Default 'forward_kl'.
        beta: the parameter of the divergence, if it has one; None for its default.
        standardize_logits: whether both sides' logits become (z - mean) / std over the classes before T; see
            `formulas.standardize`. Three classes at least: of two, all that is left is which is larger.
        reduction: 'none' (elementwise [..., V]), 'sum', 'mean' (over elements), 'batchmean' (sum / B: on [B, S, V] per
            sequence) or 'tokenmean' (sum / counted positions); see `reductions.reduce_terms`. Default 'batchmean'.
        ignore_index: positions with this label are not counted. Default -100.

    Returns:
        From `forward`: nats, float32 or wider, a scalar (but for 'none'). 0 with a gradient path where nothing is
        counted; +inf where the divergence is.

    Raises:
        ValueError: a setting out of range; shapes that do not fit.
        TypeError: logits that are not floating, labels that are not integers.

    Example:
        >>> teacher = torch.tensor([[2.0, 1.0, 0.1], [1.0, 2.0, 0.5]])
        >>> student = torch.tensor([[1.8, 1.1, 0.2], [0.9, 2.1, 0.6]])
        >>> loss = SoftTargetLoss(temperature=3.0)
        >>> loss
        SoftTargetLoss(temperature=3.0, divergence='forward_kl', reduction='batchmean', ignore_index=-100)
        >>> round(loss(student, teacher).item() / 3.0**2, 6)
        0.00085

    Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        beta: float | None = None,
        standardize_logits: bool = False,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_temperature("temperature", temperature)
        check_divergence(divergence, beta)
        check_choice("reduction", reduction, REDUCTIONS)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            fail("ignore_index", repr(ignore_index), "a whole number", "Leave it at -100.", error=TypeError)
        self.temperature, self.divergence, self.beta = temperature, divergence, beta
        self.standardize_logits = standardize_logits
        self.reduction, self.ignore_index = reduction, ignore_index

    @property
    def needs_labels(self) -> bool:
        """Whether the divergence reads the label of a position."""
        return DIVERGENCES[self.divergence].needs_labels

    @property
    def scale(self) -> float:
        """T², which multiplies the divergence; 1 for one that has no temperature."""
        return DIVERGENCES[self.divergence].temperature(self.temperature) ** 2

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of `student_logits` [B, ..., V] against `teacher_logits` [B, ..., V], see the class.

        Args:
            student_logits, teacher_logits: the same shape, at least two dimensions.
            labels: [B, ...] integers; positions equal to `ignore_index` are not counted. Their values are used by a
                divergence that needs labels alone.
            mask: [B, ...] bool or 0/1; False or 0 is not counted. With both, a position must be counted by both.
            class_labels: [B, ...] class ids for a divergence that needs labels; None: `labels`. They exclude no
                position: where there is no label the forward KL is taken.
        """
        check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
        shape = student_logits.shape
        if len(shape) < 2:
            shown = f"of shape {list(shape)}"
            fail("student_logits", shown, "at least [B, V]", "Add the batch dimension: `logits.unsqueeze(0)`.")
        counted = None if mask is None else as_mask(mask, shape[:-1])
        if labels is not None:
            _check_labels(labels, student_logits)
            labelled = labels != self.ignore_index
            counted = labelled if counted is None else counted & labelled
        read: dict[str, Tensor] = {}
        if self.needs_labels:
            class_labels = labels if class_labels is None else class_labels
            check_class_ids(class_labels, shape[:-1])
            assert class_labels is not None
            read["labels"] = class_labels.masked_fill(class_labels == self.ignore_index, IGNORE_INDEX)
        if self.reduction == "none":
            return self._elementwise(student_logits, teacher_logits, counted, read)
        if counted is not None:
            student_logits, teacher_logits = (select_positions(z, counted) for z in (student_logits, teacher_logits))
            read = {name: select_positions(x, counted) for name, x in read.items()}
        values = self.divergences(student_logits, teacher_logits, **read)
        total = values.sum() if self.scale == 1 else values.sum() * self.scale
        return reduce_total(total, self.reduction, shape=shape, positions=values.numel())

    def divergences(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """D of each position [...] of logits [..., V] in nats: neither multiplied by `scale` nor masked nor reduced.

        Args:
            labels: [...] class ids for a divergence that needs them, `IGNORE_INDEX` where there is none.
        """
        z_s, z_t = self._compared(student_logits, teacher_logits)
        return DIVERGENCES[self.divergence](z_s, z_t, temperature=self.temperature, beta=self.beta, labels=labels)

    def _compared(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        if not self.standardize_logits:
            return student_logits, teacher_logits
        check_standardized(student_logits.shape[-1])
        return standardize(student_logits), standardize(teacher_logits)

    def _elementwise(
        self, student_logits: Tensor, teacher_logits: Tensor, counted: Tensor | None, read: dict[str, Tensor]
    ) -> Tensor:
        if counted is not None:  # before the formula too, whose gradient at NaN would be NaN
            hidden = ~counted.unsqueeze(-1)
            student_logits, teacher_logits = (z.masked_fill(hidden, 0.0) for z in (student_logits, teacher_logits))
        z_s, z_t = self._compared(student_logits, teacher_logits)
        terms = divergence_terms(self.divergence, z_s, z_t, temperature=self.temperature, beta=self.beta, **read)
        return reduce_terms(terms * self.scale, counted, reduction="none")

    def extra_repr(self) -> str:
        beta = "" if self.beta is None else f", beta={self.beta}"
        beta += ", standardize_logits=True" if self.standardize_logits else ""
        return (
            f"temperature={self.temperature}, divergence={self.divergence!r}{beta}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}"
        )


class DistillationParts(NamedTuple):
    """What `DistillationLoss` returns: `total` to call backward on, and its unweighted parts for the log."""

    total: Tensor
    soft: Tensor
    hard: Tensor


class DistillationLoss(nn.Module):
    """total = alpha * soft + (1 - alpha) * hard; soft = T² D(p, q), hard = cross-entropy with the labels at T = 1.

    When to use: the whole loss of a distillation step in your own loop; `DistillationTrainer` computes the same.

    A term of weight zero is not added (0 * inf would be NaN) and gives no gradient; it is still returned as a part.
    Both terms have the same denominator, so that alpha weighs the same at every length.

    Args:
        alpha: the weight of the SOFT loss, in [0, 1]. Default 0.7. (Some texts put their alpha on the hard loss.)
        temperature: T > 0 of the soft loss. Default 3.
        divergence, beta, standardize_logits: see `SoftTargetLoss`.
        reduction: 'batchmean' (both sums / B), 'tokenmean' (each sum / its counted positions) or 'sum'. ('mean' would
            divide the soft loss by V and the hard loss not.)
        ignore_index: the label of what has no hard loss. Default -100.

    Returns:
        From `forward`: `DistillationParts(total, soft, hard)`, scalars in nats, float32 or wider.

    Raises:
        ValueError, TypeError: as `SoftTargetLoss`; alpha outside [0, 1]; labels outside the classes.

    Example:
        >>> student = torch.tensor([[1.8, 1.1, 0.2], [0.9, 2.1, 0.6]], requires_grad=True)
        >>> teacher = torch.tensor([[2.0, 1.0, 0.1], [1.0, 2.0, 0.5]])
        >>> total, soft, hard = DistillationLoss(alpha=0.7, temperature=3.0)(student, teacher, torch.tensor([0, 1]))
        >>> total.backward()
        >>> bool(torch.isclose(total, 0.7 * soft + 0.3 * hard))
        True

    Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.7,
        temperature: float = 3.0,
        divergence: str = "forward_kl",
        beta: float | None = None,
        standardize_logits: bool = False,
        reduction: str = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_number("alpha", alpha, low=0.0, high=1.0)
        check_choice("reduction", reduction, ("batchmean", "tokenmean", "sum"))
        self.alpha = alpha
        self.soft_loss = SoftTargetLoss(
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            standardize_logits=standardize_logits,
            reduction=reduction,
            ignore_index=ignore_index,
        )

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> DistillationParts:
        """The loss on logits [B, ..., V] and labels [B, ...], see the class.

        Args:
            student_logits, teacher_logits: the same shape.
            labels: integer class ids; `ignore_index` where there is no label.
            mask: [B, ...], what the soft loss counts. None: every row of [B, V], where a row without a label still has
                a teacher; on [B, S, V] the positions that have a label, since the others are mostly padding. Give the
                mask where tokens are flattened to [B * S, V].
        """
        check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
        _check_labels(labels, student_logits)
        counted_by_labels = labels if mask is None and student_logits.dim() > 2 else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.alpha > 0):
            soft = self.soft_loss(student_logits, teacher_logits, counted_by_labels, mask, class_labels=labels)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.alpha < 1):
            hard = self._hard(student_logits, labels)
        if self.alpha in (0, 1):
            return DistillationParts(soft if self.alpha else hard, soft, hard)
        return DistillationParts(self.alpha * soft + (1 - self.alpha) * hard, soft, hard)

    def _hard(self, student_logits: Tensor, labels: Tensor) -> Tensor:
        ignore_index = self.soft_loss.ignore_index
        labelled = labels != ignore_index
        rows = select_positions(student_logits, labelled)
        kept = select_positions(labels, labelled).long()
        _check_ids(kept, rows.shape[-1], ignore_index)
        total = masked_sum(F.cross_entropy(rows.to(wide(rows)), kept, reduction="none"))
        return reduce_total(total, self.soft_loss.reduction, shape=student_logits.shape, positions=rows.shape[0])

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


def _check_ids(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raises ValueError for a label outside [0, classes); on an accelerator, where looking waits, torch asserts."""
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    lowest, highest = (int(x) for x in labels.aminmax())
    if lowest < 0 or highest >= classes:
        shown = f"{lowest if lowest < 0 else highest} at some position"
        fix = f"Mark what has no label with {ignore_index}; check that the model has an output for every class."
        fail("labels", shown, f"class ids in [0, {classes - 1}]", fix)
