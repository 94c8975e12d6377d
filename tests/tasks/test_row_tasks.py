"""Multi-label classification, regression and question answering: one or two answers a row, through the trainer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForSequenceClassification

from kd_trainer import DistillationTrainer
from kd_trainer.losses.divergences import DIVERGENCES
from kd_trainer.losses.modules import SoftTargetLoss
from kd_trainer.tasks.kinds import TASKS
from kd_trainer.tasks.resolve import by_problem_type
from kd_trainer.training.objective import LossInputs, Objective
from tests.helpers import tiny

ROW_TASKS = ["multi_label_classification", "regression", "question_answering"]
T = 2.0


def batch_of(task: str, count: int = 6) -> dict[str, torch.Tensor]:
    return tiny.pad(tiny.rows(task, count))


def logits_of(task: str, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        outputs = model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")})
    return TASKS[task].logits(outputs, "model").double()


# ---- which head ----


@pytest.mark.parametrize(
    ("config", "labels", "task"),
    [
        ({}, torch.tensor([1]), "classification"),
        ({}, None, "classification"),
        ({}, torch.zeros(1, 5), "multi_label_classification"),
        ({"problem_type": "multi_label_classification"}, None, "multi_label_classification"),
        ({"problem_type": "regression"}, torch.zeros(1, 5), "regression"),
        ({"problem_type": "single_label_classification"}, None, "classification"),
        ({"id2label": {0: "score"}, "label2id": {"score": 0}}, torch.zeros(1), "regression"),
        ({"id2label": {0: "score"}, "label2id": {"score": 0}}, torch.tensor([1]), "regression"),
    ],
)
def test_labels_are_of_the_kind_that_upstream_takes_them_for(config, labels, task):
    model = BertForSequenceClassification(tiny.bert_config(**config))
    assert by_problem_type(TASKS["classification"], model, None, labels) is TASKS[task]
    problem_type = model.config.problem_type  # trap 40
    if labels is not None:
        model.config.problem_type = config.get("problem_type")
        model(input_ids=torch.ones(1, 3, dtype=torch.long), labels=labels)
        assert model.config.problem_type == problem_type


def test_kd_task_names_the_kind_where_the_config_does_not():
    model = BertForSequenceClassification(tiny.bert_config())
    assert by_problem_type(TASKS["regression"], model, "regression", None) is TASKS["regression"]
    assert model.config.problem_type == "regression"


def test_a_plain_module_takes_kd_task(tmp_path):
    data = [{**row, "labels": [0.5] * tiny.CLASSES} for row in tiny.rows("plain")]
    run = tiny.trainer("plain", tmp_path, data=data, kd_task="regression", max_steps=1)
    run.train()
    assert run.compute_loss(run.model, tiny.pad(data[:4])) > 0


# ---- the hard loss is the model's own ----


@pytest.mark.parametrize("task", ROW_TASKS)
def test_alpha_zero_is_the_stock_trainer(task, tmp_path):  # trap 37
    distilled = tiny.trainer(task, tmp_path, kd_alpha=0.0, max_steps=8, eval_strategy="steps", eval_steps=4)
    stock = tiny.stock_trainer(task, tmp_path, max_steps=8, eval_strategy="steps", eval_steps=4)
    distilled.train()
    stock.train()
    for key in ("loss", "eval_loss", "grad_norm"):
        assert tiny.logged(distilled, key) == pytest.approx(tiny.logged(stock, key), rel=1e-5), key
    torch.testing.assert_close(tiny.weights(distilled.model), tiny.weights(stock.model), rtol=1e-5, atol=1e-6)


def test_several_outputs_of_a_regression_are_the_models_own_loss(tmp_path):
    torch.manual_seed(0)
    student = BertForSequenceClassification(tiny.bert_config(problem_type="regression"))
    batch = {**batch_of("regression"), "labels": torch.randn(6, tiny.CLASSES)}
    own = student(**batch).loss
    run = tiny.trainer("regression", tmp_path, pair=(student, student.__class__(student.config)), kd_alpha=0.0)
    torch.testing.assert_close(run.compute_loss(student, batch), own)


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
def test_answers_beyond_the_sequence_are_no_labels(reduction, tmp_path):
    student, teacher = tiny.models("question_answering")
    batch = batch_of("question_answering")
    length = batch["input_ids"].shape[1]
    batch["start_positions"][:2], batch["end_positions"][:2] = length, length + 7
    run = tiny.trainer("question_answering", tmp_path, pair=(student, teacher), kd_alpha=0.0, kd_reduction=reduction)
    own = student(**batch).loss  # a mean over the 4 rows that have an answer
    expected = own if reduction == "tokenmean" else own * 4 / 6
    torch.testing.assert_close(run.compute_loss(student, batch), expected)
    # -100 is no label either; upstream would take it for position 0.
    batch["start_positions"][:2], batch["end_positions"][:2] = -100, -100
    torch.testing.assert_close(run.compute_loss(student, batch), expected)


# ---- the soft loss, written out ----


def bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def written_out(task: str, z_s: torch.Tensor, z_t: torch.Tensor, batch: dict[str, torch.Tensor]) -> float:
    """The soft loss summed over the rows, in plain Python."""
    total = 0.0
    for row in range(len(z_s)):
        if task == "regression":
            total += float((z_s[row, 0] - z_t[row, 0]) ** 2)
        elif task == "multi_label_classification":
            p, q = ([1 / (1 + math.exp(-float(z) / T)) for z in zs[row]] for zs in (z_t, z_s))
            total += T * T * sum(map(bernoulli_kl, p, q)) / len(p)
        else:
            there = int(batch["attention_mask"][row].sum())
            for side in range(2):
                p, q = ([math.exp(float(z) / T) for z in zs[row, side, :there]] for zs in (z_t, z_s))
                p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
                total += T * T * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) / 2
    return total


@pytest.mark.parametrize("task", ROW_TASKS)
def test_soft_loss_written_out(task, tmp_path):
    student, teacher = tiny.models(task)
    batch = batch_of(task)
    run = tiny.trainer(task, tmp_path, pair=(student, teacher), kd_alpha=1.0, kd_temperature=T)
    expected = written_out(task, logits_of(task, student, batch), logits_of(task, teacher, batch), batch) / 6
    assert run.compute_loss(student, batch).item() == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "forward_kl"])
@pytest.mark.parametrize("task", ["multi_label_classification", "question_answering"])
def test_every_divergence_has_a_finite_gradient(task, divergence, tmp_path):
    beta = {"kd_beta": 0.3} if divergence == "entropy_switch" else {}  # of a yes or no: below log 2
    run = tiny.trainer(task, tmp_path, kd_alpha=1.0, kd_divergence=divergence, **beta)
    run.compute_loss(run.model, batch_of(task)).backward()
    grads = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
    assert grads.isfinite().all()
    assert grads.abs().max() > 0


@pytest.mark.parametrize("task", ROW_TASKS)
def test_gradient_by_finite_differences(task):
    torch.manual_seed(0)
    shape = {"regression": (3, 2), "multi_label_classification": (3, 4), "question_answering": (3, 2, 4)}[task]
    z_s, z_t = torch.randn(*shape, dtype=torch.float64, requires_grad=True), torch.randn(*shape, dtype=torch.float64)
    batch = {
        "regression": {"labels": torch.tensor([[0.3, 1.0], [math.nan, math.nan], [2.0, -1.0]])},
        "multi_label_classification": {"labels": torch.tensor([[1.0, 0, 0, 1], [-100] * 4, [0, 1, 0, 0]])},
        "question_answering": {
            "input_ids": torch.ones(3, 4, dtype=torch.long),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]),
            "start_positions": torch.tensor([0, -100, 1]),
            "end_positions": torch.tensor([3, -100, 1]),
        },
    }[task]
    objective, soft_loss = Objective(0.4, T), SoftTargetLoss(temperature=T, reduction="sum")
    counts = objective.count(TASKS[task], batch)
    assert float(counts.hard) == 2
    given = LossInputs(TASKS[task], batch, counts)
    assert torch.autograd.gradcheck(lambda z: objective(given, soft_loss, z, z_t).total, (z_s,))


class Uncertain(torch.nn.Module):
    """A teacher that also returns a variance."""

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": features[:, :2], "variance": features[:, 2:4].exp()}


def test_a_teachers_variance_makes_it_a_gaussian_likelihood(tmp_path):
    student = tiny.Plain(classes=2)
    batch = {"features": torch.randn(5, 6), "labels": torch.randn(5, 2)}
    run = DistillationTrainer(
        student, tiny.arguments(tmp_path, kd_task="regression", kd_alpha=1.0), teacher_model=Uncertain(),
        train_dataset=[{"features": torch.zeros(6)}],
    )  # fmt: skip
    z, x = student(batch["features"]), batch["features"]
    variance = x[:, 2:4].exp()
    expected = (((z - x[:, :2]) ** 2 / variance + variance.log()) / 2).mean()
    torch.testing.assert_close(run.compute_loss(student, batch), expected)


def test_a_negative_variance_is_named(tmp_path):
    class Wrong(Uncertain):
        def forward(self, features):
            return {"logits": features[:, :2], "variance": features[:, 2:4] - 9}

    run = DistillationTrainer(
        tiny.Plain(classes=2), tiny.arguments(tmp_path, kd_task="regression"), teacher_model=Wrong(),
        train_dataset=[{"features": torch.zeros(6), "labels": torch.zeros(2)}],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"`variance` is -9 at least once; expected numbers >= 0 from the teacher"):
        run.train()


# ---- rows without labels, padding, predictions ----


@pytest.mark.parametrize("task", ROW_TASKS)
def test_rows_with_and_without_labels_in_one_batch(task, tmp_path):
    student, teacher = tiny.models(task)
    batch = batch_of(task)
    some = {k: v.clone() for k, v in batch.items()}
    names = ("start_positions", "end_positions") if task == "question_answering" else ("labels",)
    for name in names:
        some[name][4:] = math.nan if task == "regression" else -100
    labelled = {k: v[:4] for k, v in batch.items()}
    run = tiny.trainer(task, tmp_path, pair=(student, teacher), kd_reduction="tokenmean", kd_alpha=0.0)
    four = run.compute_loss(student, labelled)
    torch.testing.assert_close(run.compute_loss(student, some), four)
    both = tiny.trainer(task, tmp_path, pair=(student, teacher), kd_reduction="tokenmean", kd_alpha=0.5)
    soft = tiny.trainer(task, tmp_path, pair=(student, teacher), kd_reduction="tokenmean", kd_alpha=1.0)
    expected = 0.5 * four + 0.5 * soft.compute_loss(student, batch)
    torch.testing.assert_close(both.compute_loss(student, some), expected)
    unlabelled = {k: v for k, v in batch.items() if k not in names}
    torch.testing.assert_close(soft.compute_loss(student, unlabelled), soft.compute_loss(student, batch))


@pytest.mark.parametrize("task", ROW_TASKS)
def test_padding_changes_no_soft_loss(task, tmp_path):
    run = tiny.trainer(task, tmp_path, kd_alpha=1.0)
    batch = batch_of(task)
    wider = {k: F.pad(v, (0, 7)) if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}
    torch.testing.assert_close(run.compute_loss(run.model, wider), run.compute_loss(run.model, batch))


@pytest.mark.parametrize("task", ROW_TASKS)
def test_predictions_are_upstreams(task, tmp_path):  # traps 12 and 37
    distilled, stock = tiny.trainer(task, tmp_path, kd_alpha=0.0), tiny.stock_trainer(task, tmp_path)
    found, expected = (run.predict(tiny.rows(task, 5)) for run in (distilled, stock))
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    for name in ("predictions", "label_ids"):
        pair = (getattr(output, name) for output in (found, expected))
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in pair), strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other))


@pytest.mark.parametrize("task", ROW_TASKS)
def test_training_brings_the_student_to_the_teacher(task, tmp_path):
    run = tiny.trainer(task, tmp_path, kd_alpha=1.0, max_steps=40, learning_rate=0.01)
    run.train()
    losses = tiny.logged(run, "soft_loss")
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert ("eval_teacher_agreement" in run.evaluate()) == (task != "regression")


def test_evaluation_of_questions_without_answers(tmp_path):
    run = tiny.trainer("question_answering", tmp_path)
    data = [{k: row[k] for k in ("input_ids", "attention_mask")} for row in tiny.rows("question_answering", 5)]
    metrics = run.evaluate(data)
    assert metrics["eval_loss"] == pytest.approx(0.7 * metrics["eval_soft_loss"], rel=1e-5)
    assert len(run.predict(data).predictions) == 2


def test_outputs_that_fit_no_task_are_described(tmp_path):
    teacher = BertForSequenceClassification(tiny.bert_config())
    run = tiny.trainer("question_answering", tmp_path, pair=(tiny.models("question_answering")[0], teacher))
    with pytest.raises(TypeError, match=r"returns a mapping with the keys logits; expected .*start_logits"):
        run.compute_loss(run.model, batch_of("question_answering"))


def test_a_teacher_of_another_image_size(tmp_path):
    student, teacher = tiny.vit(image_size=8), tiny.vit(image_size=16)
    data = [
        {"pixel_values": torch.randn(3, 8, 8), "teacher_pixel_values": torch.randn(3, 16, 16), "labels": i % 5}
        for i in range(16)
    ]
    run = DistillationTrainer(
        student, tiny.arguments(tmp_path, remove_unused_columns=True), teacher_model=teacher, train_dataset=data
    )
    run.train()
    batch = {k: torch.stack([torch.as_tensor(row[k]) for row in data[:4]]) for k in data[0]}
    expected = SoftTargetLoss(temperature=3.0)(
        student(batch["pixel_values"]).logits, teacher(batch["teacher_pixel_values"]).logits
    )
    hard = student(batch["pixel_values"], labels=batch["labels"]).loss
    torch.testing.assert_close(run.compute_loss(student, batch), 0.7 * expected + 0.3 * hard)
