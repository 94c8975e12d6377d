"""The temperature at which a model's probabilities are calibrated on held-out data."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..validation import check_number, fail
from .checks import check_logits
from .modules import _check_ids, _check_labels
from .reductions import select_positions


def fit_temperature(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    minimum: float = 0.01,
    maximum: float = 100.0,
) -> float:
    """argmin over T of mean -log softmax(logits/T)[label]: the temperature that calibrates a classifier.

    When to use: on held-out data, to report or correct the calibration of a teacher or student (divide its logits by
    the result; the predicted classes do not change). This is not the temperature of distillation.

    The negative log-likelihood is convex in 1/T, so its slope is searched by Newton steps kept inside a bracket, in
    float64, to about 1e-10. On perfectly separable data (every label has the largest logit) the likelihood
    grows without end as T goes to 0, and on labels that are worse than chance as T goes to infinity: then a
    RuntimeWarning is given, and the end of the bracket is returned.

    Args:
        logits: [..., V], finite, any floating dtype.
        labels: [...] integer class ids.
        ignore_index: positions with this label are left out. Default -100.
        minimum, maximum: the bracket, 0 < minimum < maximum. Defaults 0.01 and 100.

    Returns:
        T > 0: above 1 for an overconfident model, below 1 for an underconfident one.

    Raises:
        ValueError: no labelled position, logits that are not finite, labels outside the classes, a bad bracket.
        TypeError: labels that are not integers.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 4)  # 75% right: 4/T = log 3
        3.641

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    check_number("minimum", minimum, low=0.0, open_low=True)
    check_number("maximum", maximum, low=minimum, open_low=True)
    check_logits(logits=logits)
    _check_labels(labels, logits)
    labelled = labels != ignore_index
    rows = select_positions(logits.detach(), labelled).double()
    kept = select_positions(labels, labelled).long()
    if rows.shape[0] == 0:
        shown = f"{ignore_index} at every position"
        fail("labels", shown, "at least one label", "Fit the temperature on labelled data.")
    if not bool(rows.isfinite().all()):
        fail("logits", "not finite everywhere", "finite logits", "Look for NaN or inf in the model's output.")
    _check_ids(kept, rows.shape[-1], ignore_index)
    return _newton_in_bracket(rows, rows.gather(1, kept.unsqueeze(1)), minimum, maximum)


def _newton_in_bracket(rows: Tensor, of_labels: Tensor, minimum: float, maximum: float) -> float:
    """The root of the slope of the mean NLL in b = 1/T, E[z] - z_label averaged over the rows, in the bracket."""

    def slope_and_curvature(b: float) -> tuple[float, float]:
        probs = torch.softmax(rows * b, -1)
        expected = (probs * rows).sum(-1, keepdim=True)
        variance = (probs * (rows - expected).square()).sum(-1)
        return float((expected - of_labels).mean()), float(variance.mean())

    low, high = 1 / maximum, 1 / minimum
    if slope_and_curvature(low)[0] >= 0:
        warnings.warn(
            f"The labels are no likelier than chance under `logits`: the best temperature is infinite, {maximum:g} is "
            "returned. Check that logits and labels belong together.",
            RuntimeWarning,
            stacklevel=3,
        )
        return maximum
    if slope_and_curvature(high)[0] <= 0:
        warnings.warn(
            f"`logits` separate the labels (almost) perfectly: the best temperature goes to 0, {minimum:g} is "
            "returned. Fit on more or harder held-out data before you use it.",
            RuntimeWarning,
            stacklevel=3,
        )
        return minimum
    b = 1.0 if low < 1 < high else (low * high) ** 0.5
    for _ in range(100):
        slope, curvature = slope_and_curvature(b)
        low, high = (b, high) if slope < 0 else (low, b)
        step = b - slope / curvature if curvature > 0 else low
        following = step if low < step < high else (low * high) ** 0.5
        if abs(following - b) <= 1e-12 * b:
            break
        b = following
    return 1 / b
