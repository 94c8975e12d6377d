"""The measures of `fidelity.py` as `evaluate.Metric` modules that need no hub, and as a `compute_metrics`.

Shapes: N rows, C classes. Logits [N, C], labels [N], -100 = unlabelled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import evaluate

from .fidelity import (
    Array,
    accuracy,
    expected_calibration_error,
    kl_to_teacher,
    negative_log_likelihood,
    similarity_correlation,
    teacher_agreement,
    teacher_overlap,
)


class _LogitsMetric(evaluate.Metric):
    """Predictions are logits, references class ids (or the teacher's logits); `measure` gives the number `key`."""

    key: str
    measure: Callable[..., float]
    references: Any = datasets.Value("int64")

    def _info(self) -> evaluate.MetricInfo:
        text = type(self).__doc__ or ""
        columns = {"predictions": datasets.List(datasets.Value("float32")), "references": self.references}
        return evaluate.MetricInfo(
            description=text, citation="", inputs_description=text, features=datasets.Features(columns)
        )

    def compute(
        self, *, predictions: Array | None = None, references: Array | None = None, **kwargs: Any
    ) -> dict[str, float] | None:
        """As `evaluate.Metric.compute`; rows given in this one call are measured at once, in their own precision.

        Upstream would pass them through an Arrow table, row by row, which takes ten times as long as the metric.
        """
        if predictions is not None and references is not None and self.writer is None and self.num_process == 1:
            return self._compute(predictions, references, **kwargs)
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Array, references: Array, **kwargs: Any) -> dict[str, float]:
        return {self.key: type(self).measure(predictions, references, **kwargs)}


class Accuracy(_LogitsMetric):
    """`accuracy` as an `evaluate.Metric`: predictions are logits [N, C], references class ids [N].

    Example:
        >>> Accuracy().compute(predictions=[[2.0, 1.0], [0.0, 3.0]], references=[0, 0])
        {'accuracy': 0.5}
    """

    key, measure = "accuracy", accuracy


class NegativeLogLikelihood(_LogitsMetric):
    """`negative_log_likelihood` (nats) as an `evaluate.Metric`: logits [N, C] against class ids [N]."""

    key, measure = "nll", negative_log_likelihood


class ExpectedCalibrationError(_LogitsMetric):
    """`expected_calibration_error` as an `evaluate.Metric`: logits [N, C] against class ids [N]; `compute(bins=15)`."""

    key, measure = "ece", expected_calibration_error


class TeacherAgreement(_LogitsMetric):
    """`teacher_agreement` as an `evaluate.Metric`: student logits [N, C] against teacher logits [N, C]."""

    key, measure, references = "agreement", teacher_agreement, datasets.List(datasets.Value("float32"))


class TeacherOverlap(_LogitsMetric):
    """`teacher_overlap` as an `evaluate.Metric`: student logits [N, C] against the teacher's; `compute(ids=20)`.

    Example:
        >>> TeacherOverlap().compute(predictions=[[1.0, 3.0, 2.0]], references=[[1.0, 1.0, 1.0]], ids=3)
        {'overlap': 1.0}
    """

    key, measure, references = "overlap", teacher_overlap, datasets.List(datasets.Value("float32"))


class KLToTeacher(_LogitsMetric):
    """`kl_to_teacher` (nats) as an `evaluate.Metric`: student logits [N, C] against teacher logits [N, C]."""

    key, measure, references = "kl_to_teacher", kl_to_teacher, datasets.List(datasets.Value("float32"))


class SimilarityCorrelation(_LogitsMetric):
    """`similarity_correlation` as an `evaluate.Metric`: student embeddings [N, H] against the teacher's [N, H'].

    Example:
        >>> rows = [[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]
        >>> SimilarityCorrelation().compute(predictions=rows, references=rows)
        {'teacher_spearman': 1.0}
    """

    key, measure, references = "teacher_spearman", similarity_correlation, datasets.List(datasets.Value("float32"))


def classification_metrics(teacher_logits: Array | None = None) -> Callable[[Any], dict[str, float]]:
    """A `compute_metrics` for `Trainer`: accuracy, nll and ece; agreement and kl_to_teacher where the teacher is known.

    Args:
        teacher_logits: [N, C], the teacher's logits on the rows of the evaluation dataset, in its order;
            default None (no comparison with a teacher).

    Returns:
        A function from `EvalPrediction` (predictions [N, C] or a tuple that begins with them, label_ids [N]) to
        `{"accuracy", "nll", "ece"}` plus `{"agreement", "kl_to_teacher"}` where `teacher_logits` is given. Trainer puts
        its `eval_` prefix in front. The three that need labels are NaN where no row is labelled.

    Raises:
        ValueError: at evaluation, `teacher_logits` of another shape than the predictions.

    Example:
        >>> import numpy as np
        >>> from transformers import EvalPrediction
        >>> measure = classification_metrics(teacher_logits=np.array([[2.0, 0.0]]))
        >>> {name: round(value, 3) for name, value in measure(EvalPrediction(np.array([[1.0, 0.0]]), [0])).items()}
        {'accuracy': 1.0, 'nll': 0.313, 'ece': 0.269, 'agreement': 1.0, 'kl_to_teacher': 0.067}
    """

    def compute_metrics(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        if isinstance(logits, tuple):
            logits = logits[0]
        results: dict[str, float] = {}
        for metric in (Accuracy, NegativeLogLikelihood, ExpectedCalibrationError):
            results |= metric().compute(predictions=logits, references=labels) or {}
        if teacher_logits is not None:
            for fidelity in (TeacherAgreement, KLToTeacher):
                results |= fidelity().compute(predictions=logits, references=teacher_logits) or {}
        return results

    return compute_metrics
