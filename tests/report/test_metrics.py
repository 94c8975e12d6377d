"""Metrics against loops written by hand; the evaluate modules without a network; compute_metrics in a Trainer."""

from __future__ import annotations

import math
import socket

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from kd_trainer import MLPConfig, MLPForImageClassification
from kd_trainer.data.synthetic import synthetic_classification
from kd_trainer.data.tensor_rows import as_tensors, collate_tensors
from kd_trainer.report.fidelity import (
    accuracy,
    expected_calibration_error,
    kl_to_teacher,
    negative_log_likelihood,
    reliability_bins,
    similarity_correlation,
    teacher_agreement,
    teacher_overlap,
)
from kd_trainer.report.metrics import (
    Accuracy,
    ExpectedCalibrationError,
    KLToTeacher,
    NegativeLogLikelihood,
    SimilarityCorrelation,
    TeacherAgreement,
    TeacherOverlap,
    classification_metrics,
)

ROWS, CLASSES = 200, 5


@pytest.fixture
def student() -> torch.Tensor:
    return 2 * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher() -> torch.Tensor:
    return 2 * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> torch.Tensor:
    labels = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(2))
    labels[::7] = -100
    return labels


def probabilities(logits: torch.Tensor) -> list[list[float]]:
    exps = [[math.exp(z) for z in row] for row in logits.tolist()]
    return [[value / sum(row) for value in row] for row in exps]


def ece_by_hand(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> float:
    rows = [(p, y) for p, y in zip(probabilities(logits), labels.tolist(), strict=True) if y != -100]
    total = 0.0
    for k in range(bins):
        inside = [(max(p), p.index(max(p)) == y) for p, y in rows if k / bins < max(p) <= (k + 1) / bins]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            right = sum(r for _, r in inside) / len(inside)
            total += len(inside) / len(rows) * abs(right - confidence)
    return total


def test_accuracy_and_nll_by_hand(student, labels) -> None:
    rows = [(p, y) for p, y in zip(probabilities(student), labels.tolist(), strict=True) if y != -100]
    assert len(rows) < ROWS
    assert accuracy(student, labels) == pytest.approx(sum(p.index(max(p)) == y for p, y in rows) / len(rows))
    assert negative_log_likelihood(student, labels) == pytest.approx(-sum(math.log(p[y]) for p, y in rows) / len(rows))


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_ece_by_hand(student, labels, bins) -> None:
    expected = ece_by_hand(student, labels, bins)
    assert expected > 0.05
    assert expected_calibration_error(student, labels, bins) == pytest.approx(expected)


def test_ece_of_a_calibrated_and_of_an_overconfident_model() -> None:
    logits = torch.log(torch.tensor([[0.75, 0.25]])).repeat(4, 1)
    assert expected_calibration_error(logits, [0, 0, 0, 1]) == pytest.approx(0, abs=1e-7)
    sure = torch.tensor([[50.0, 0.0]]).repeat(4, 1)
    assert expected_calibration_error(sure, [0, 1, 1, 1]) == pytest.approx(0.75)


def test_reliability_bins(student, labels) -> None:
    found = reliability_bins(student, labels, bins=10)
    assert found.fraction.sum().item() == pytest.approx(1)
    filled = found.fraction > 0
    assert torch.equal(filled, ~found.accuracy.isnan())
    edges = torch.arange(11, dtype=torch.float64) / 10
    assert (found.confidence[filled] > edges[:-1][filled]).all()
    assert (found.confidence[filled] <= edges[1:][filled] + 1e-12).all()
    on_the_edge = reliability_bins([[0.0, 0.0]], [0], bins=2)  # confidence 0.5 belongs to (0, 0.5]
    assert on_the_edge.fraction.tolist() == [1, 0]
    assert (found.fraction * found.accuracy).nansum().item() == pytest.approx(accuracy(student, labels))


def test_fidelity_by_hand(student, teacher) -> None:
    pairs = list(zip(probabilities(teacher), probabilities(student), strict=True))
    same = sum(p.index(max(p)) == q.index(max(q)) for p, q in pairs) / ROWS
    kl = sum(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in pairs) / ROWS
    assert teacher_agreement(student, teacher) == pytest.approx(same)
    assert kl_to_teacher(student, teacher) == pytest.approx(kl, rel=1e-6)
    top = [sorted(range(CLASSES), key=q.__getitem__)[-2:] for _, q in pairs]
    mass = sum(p[a] + p[b] for (p, _), (a, b) in zip(pairs, top, strict=True)) / ROWS
    assert teacher_overlap(student, teacher, ids=2) == pytest.approx(mass, rel=1e-6)
    assert TeacherOverlap().compute(predictions=student, references=teacher, ids=2) == {"overlap": pytest.approx(mass)}
    assert teacher_agreement(teacher, teacher) == 1
    assert kl_to_teacher(teacher, teacher + 3) == pytest.approx(0, abs=1e-7)


def test_numpy_lists_half_precision_and_leading_dimensions(student, teacher, labels) -> None:
    expected = accuracy(student, labels)
    assert accuracy(student.numpy(), labels.numpy()) == accuracy(student.tolist(), labels.tolist()) == expected
    assert accuracy(student.view(2, -1, CLASSES), labels.view(2, -1)) == expected
    assert kl_to_teacher(teacher.bfloat16(), teacher.bfloat16()) == 0


def test_without_labels_nan_and_no_error(student, teacher) -> None:
    nobody = torch.full((ROWS,), -100)
    for metric in (accuracy, negative_log_likelihood, expected_calibration_error):
        assert math.isnan(metric(student, nobody))
        assert math.isnan(metric(student[:0], nobody[:0]))
    found = reliability_bins(student, nobody)
    assert found.accuracy.isnan().all()
    assert (found.fraction == 0).all()
    assert math.isnan(teacher_agreement(student[:0], teacher[:0]))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda z: accuracy(z[0], [1]), ValueError, r"`logits` is of shape \[5\]; expected \[N, C\]"),
        (lambda z: accuracy(z.argmax(-1, keepdim=True), [1]), TypeError, "`logits` is of dtype torch.int64"),
        (lambda z: accuracy(z, [1, 2]), ValueError, "`labels` is 2 rows; expected 200 rows, as in `logits`"),
        (lambda z: accuracy(z[:1], [5]), ValueError, "`labels` is 5; expected class ids from 0 to 4"),
        (lambda z: accuracy(z[:1], [-1]), ValueError, "`labels` is -1; .* Mark unlabelled rows with -100"),
        (lambda z: accuracy(z[:1], [0.5]), TypeError, "`labels` is of dtype torch.float32; expected integer class ids"),
        (lambda z: reliability_bins(z[:1], [0], bins=0), ValueError, "`bins` is 0; expected a finite number >= 1"),
        (lambda z: reliability_bins(z[:1], [0], bins=1.5), TypeError, "`bins` is 1.5; expected a whole number"),
        (
            lambda z: kl_to_teacher(z, z[:, :4]),
            ValueError,
            r"`teacher_logits` is of shape \[200, 4\]; expected \[200, 5\]",
        ),
        (lambda z: teacher_agreement(z, z[:3]), ValueError, "Run both models on the same rows"),
    ],
)
def test_bad_input(student, call, error, match) -> None:
    with pytest.raises(error, match=match):
        call(student)


@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_evaluate_modules_need_no_network(student, teacher, labels, keep_in_memory, monkeypatch, tmp_path) -> None:
    def refuse(*_args) -> None:
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    cases = [
        (Accuracy, "accuracy", labels, accuracy(student, labels)),
        (NegativeLogLikelihood, "nll", labels, negative_log_likelihood(student, labels)),
        (ExpectedCalibrationError, "ece", labels, expected_calibration_error(student, labels)),
        (TeacherAgreement, "agreement", teacher, teacher_agreement(student, teacher)),
        (TeacherOverlap, "overlap", teacher, 1.0),
        (KLToTeacher, "kl_to_teacher", teacher, kl_to_teacher(student, teacher)),
    ]
    for metric_class, key, references, expected in cases:
        metric = metric_class(keep_in_memory=keep_in_memory, cache_dir=str(tmp_path))
        assert metric.compute(predictions=student, references=references) == {key: expected}
        for start in range(0, ROWS, 50):
            batch = slice(start, start + 50)
            metric.add_batch(predictions=student[batch], references=references[batch].numpy())
        assert metric.compute() == {key: pytest.approx(expected, rel=1e-6)}
    metric = ExpectedCalibrationError(keep_in_memory=keep_in_memory, cache_dir=str(tmp_path))
    metric.add_batch(predictions=student, references=labels)
    assert metric.compute(bins=2)["ece"] == pytest.approx(ece_by_hand(student, labels, 2), rel=1e-6)


def test_classification_metrics(student, teacher, labels) -> None:
    prediction = EvalPrediction(student.numpy(), labels.numpy())
    plain = classification_metrics()(prediction)
    assert list(plain) == ["accuracy", "nll", "ece"]
    assert plain["nll"] == negative_log_likelihood(student, labels)
    full = classification_metrics(teacher)(EvalPrediction((student.numpy(), np.zeros(3)), labels.numpy()))
    assert list(full) == ["accuracy", "nll", "ece", "agreement", "kl_to_teacher"]
    assert full["kl_to_teacher"] == kl_to_teacher(student, teacher)
    with pytest.raises(ValueError, match=r"`teacher_logits` is of shape \[3, 5\]"):
        classification_metrics(teacher[:3])(prediction)


def test_as_compute_metrics_of_the_trainer(tmp_path) -> None:
    data = synthetic_classification(num_train=4, num_validation=30, num_test=1, num_features=6)
    model = MLPForImageClassification(MLPConfig(num_features=6, hidden_sizes=[4]))
    rows = as_tensors(data["validation"])
    with torch.no_grad():
        logits = model(rows[:]["features"]).logits
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
    trainer = Trainer(
        model, args, data_collator=collate_tensors, compute_metrics=classification_metrics(teacher_logits=logits)
    )
    results = trainer.evaluate(rows)
    assert results["eval_accuracy"] == pytest.approx(accuracy(logits, rows[:]["labels"]))
    assert results["eval_agreement"] == 1
    assert results["eval_kl_to_teacher"] == pytest.approx(0, abs=1e-9)


def test_the_correlation_of_similarities_by_scipy():
    generator = torch.Generator().manual_seed(4)
    teacher = torch.randn(12, 6, generator=generator)
    student = teacher[:, :4] + torch.randn(12, 4, generator=generator)
    cosines = []
    for x in (student.double(), teacher.double()):
        x = x / x.norm(dim=-1, keepdim=True)
        cosines.append([float(x[i] @ x[j]) for i in range(12) for j in range(i)])
    expected = scipy.stats.spearmanr(*cosines).statistic
    assert 0 < expected < 0.95
    assert similarity_correlation(student, teacher) == pytest.approx(expected, abs=1e-9)
    metric = SimilarityCorrelation()
    assert metric.compute(predictions=student.numpy(), references=teacher.tolist()) == {
        "teacher_spearman": pytest.approx(expected, abs=1e-9)
    }
    metric.add_batch(predictions=student[:5].tolist(), references=teacher[:5].tolist())
    metric.add_batch(predictions=student[5:].tolist(), references=teacher[5:].tolist())
    assert metric.compute() == {"teacher_spearman": pytest.approx(expected, abs=1e-6)}
    with pytest.raises(ValueError, match="the same N rows"):
        similarity_correlation(student, teacher[1:])
