"""A divergence is one function and one entry: a toy that reads labels trains with full logits and without, unseen."""

from __future__ import annotations

import pytest
import torch

from kd_trainer import DistillationLoss, DistillationTrainingArguments, SoftTargetLoss
from kd_trainer.losses.divergences import DIVERGENCES, Divergence, divergence_terms, forward_kl
from kd_trainer.losses.formulas import kl_terms
from kd_trainer.losses.fused_linear import fused_linear_distillation, fused_linear_distillation_plain
from kd_trainer.losses.sparse_targets import top_k, top_k_divergence
from tests.helpers import tiny

V = 40


def label_weighted(log_p, log_q, *, labels, beta):
    """Forward KL whose term at the label weighs 1 + beta."""
    terms = kl_terms(log_p, log_q)
    at_label = torch.nn.functional.one_hot(labels, log_q.shape[-1]).to(terms.dtype)
    return terms * (1 + beta * at_label)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    entry = Divergence(label_weighted, "weight of the label", default=2.0, range=(0.0, None), needs_labels=True)
    monkeypatch.setitem(DIVERGENCES, "toy", entry)


def expected(z_s, z_t, labels, temperature=2.0, beta=2.0):
    log_p, log_q = ((z / temperature).log_softmax(-1) for z in (z_t, z_s))
    terms = log_p.exp() * (log_p - log_q)
    at_label = terms.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return terms.sum(-1) + beta * torch.where(labels >= 0, at_label, 0.0)


def logits(rows=6, classes=V):
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = 2 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[1] = -100
    return z_s.requires_grad_(), z_t, labels


@pytest.mark.parametrize("classes", [V, 2**16])  # the second in blocks of rows
def test_called_by_name(classes):
    z_s, z_t, labels = logits(classes=classes)
    values = DIVERGENCES["toy"](z_s, z_t, temperature=2.0, labels=labels)
    torch.testing.assert_close(values, expected(z_s, z_t, labels))
    torch.testing.assert_close(divergence_terms("toy", z_s, z_t, temperature=2.0, labels=labels).sum(-1), values)
    torch.testing.assert_close(values[1], forward_kl(z_s, z_t, temperature=2.0)[1])
    (found,) = torch.autograd.grad(values.sum(), z_s)
    torch.testing.assert_close(found, torch.autograd.grad(expected(z_s, z_t, labels).sum(), z_s)[0])


def test_modules():
    z_s, z_t, labels = logits()
    nats = expected(z_s, z_t, labels)
    loss = SoftTargetLoss(temperature=2.0, divergence="toy", reduction="sum")
    torch.testing.assert_close(loss(z_s, z_t, labels), 4 * nats[labels >= 0].sum())
    torch.testing.assert_close(loss(z_s, z_t, class_labels=labels), 4 * nats.sum())
    whole = DistillationLoss(temperature=2.0, divergence="toy", reduction="sum")(z_s, z_t, labels)
    torch.testing.assert_close(whole.soft, 4 * nats.sum())
    elementwise = SoftTargetLoss(temperature=2.0, divergence="toy", reduction="none")
    torch.testing.assert_close(elementwise(z_s, z_t, class_labels=labels).sum(), 4 * nats.sum())


def test_over_the_kept_ids_a_label_that_is_not_kept_is_none():
    z_s, z_t, labels = logits()
    kept = top_k(z_t, V - 1, temperature=2.0)
    found = top_k_divergence(z_s, kept, temperature=2.0, divergence="toy", labels=labels)
    is_kept = (kept.ids == labels.unsqueeze(-1)).any(-1)
    torch.testing.assert_close(found, expected(z_s, z_t, torch.where(is_kept, labels, -100)))


@pytest.mark.parametrize("form", ["hidden", "logits", "top k"])
@pytest.mark.parametrize("function", [fused_linear_distillation, fused_linear_distillation_plain])
def test_fused(function, form):
    generator = torch.Generator().manual_seed(1)
    hidden, teacher_hidden = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    weight, teacher_weight = torch.randn(2, V, 8, generator=generator, dtype=torch.float64)
    labels, mask = logits()[2], torch.tensor([True, True, False, True, True, True])
    weight.requires_grad_()
    z_t = teacher_hidden @ teacher_weight.T
    given = {"teacher_hidden": None, "teacher_weight": None}
    if form == "hidden":
        given = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    elif form == "logits":
        given["teacher_logits"] = z_t
    else:
        given["teacher_top_k"] = top_k(z_t, V, temperature=2.0)
    options = {"temperature": 2.0, "divergence": "toy", "beta": 0.7, "soft_count": 1.0, "soft_mask": mask}
    loss = function(hidden, weight, labels=labels, alpha=1.0, **given, **options)
    total = 4 * expected(hidden @ weight.T, z_t, labels, beta=0.7)[mask].sum()
    torch.testing.assert_close(loss.total, total)
    (found,) = torch.autograd.grad(loss.total, weight)
    torch.testing.assert_close(found, torch.autograd.grad(total, weight)[0])


def train(tmp_path, implementation, labelled=True):
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "kd_divergence": "toy"}
    rows = tiny.rows("causal_lm")
    if not labelled:
        rows = [{name: x for name, x in row.items() if name != "labels"} for row in rows]
        options |= {"kd_alpha": 1.0, "kd_positions": "attended"}
    trainer = tiny.trainer("causal_lm", tmp_path, data=rows, kd_loss_implementation=implementation, **options)
    trainer.train()
    return tiny.logs(trainer), trainer.model.state_dict()


def test_training_with_full_logits_and_fused(tmp_path):
    full, weights = train(tmp_path / "full", "full")
    fused, other = train(tmp_path / "fused", "fused")
    for name in ("loss", "soft_loss", "hard_loss"):
        assert fused[name] == pytest.approx(full[name], rel=1e-5), name
    for name, weight in weights.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", ["classification", "multi_label_classification", "question_answering"])
def test_training_of_row_tasks(tmp_path, task):
    trainer = tiny.trainer(task, tmp_path, max_steps=2, kd_divergence="toy")
    trainer.train()
    assert all(value > 0 for value in tiny.logs(trainer)["soft_loss"])


def test_what_has_no_parameter_and_no_labels_says_so():
    z_s, z_t, labels = logits()
    with pytest.raises(TypeError, match=r"`labels` is None; expected integers of shape \[6\], because this divergence"):
        DIVERGENCES["toy"](z_s, z_t)
    with pytest.raises(TypeError, match="`labels` is None"):
        SoftTargetLoss(divergence="toy")(z_s, z_t)
    with pytest.raises(ValueError, match=r"`labels` is of shape \[5\]"):
        DIVERGENCES["toy"](z_s, z_t, labels=labels[1:])
    with pytest.raises(ValueError, match=r"`beta` is -1.0; expected a finite number > 0"):
        SoftTargetLoss(divergence="toy", beta=-1.0)
    with pytest.raises(ValueError, match="`kd_beta` is -1"):
        DistillationTrainingArguments(output_dir="out", kd_divergence="toy", kd_beta=-1)
    with pytest.raises(ValueError, match=r"choose kd_divergence jsd, .*, entropy_switch or toy"):
        DistillationTrainingArguments(output_dir="out", kd_beta=1)
