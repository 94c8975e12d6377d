"""The loss of a small batch against its plain twin and against float64 written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kd_trainer import SoftTargetLoss
from kd_trainer.losses.small_batch import is_small, small_batch_loss


def case(labels: str = "all") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(7, 5, generator=generator) for _ in range(2))
    targets = torch.randint(5, (7,), generator=generator)
    if labels == "some":
        targets[[0, 3]] = -100
    if labels == "none":
        targets[:] = -100
    return student.requires_grad_(), teacher, None if labels == "no column" else targets


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("labels", ["all", "some", "none", "no column"])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.0), (0.0, 0.25)])
def test_value_and_gradient(temperature, labels, weights):
    student, teacher, targets = case(labels)
    small = small_batch_loss(
        student, teacher, targets, temperature=temperature, soft_weight=weights[0], hard_weight=weights[1]
    )
    (2 * small.total).backward()
    wide = student.detach().double().requires_grad_()
    p, log_q = F.softmax(teacher.double() / temperature, -1), F.log_softmax(wide / temperature, -1)
    soft = temperature**2 * (p * (p.log() - log_q)).sum()
    hard = wide.sum() * 0
    for row, label in enumerate([] if targets is None else targets.tolist()):
        if label != -100:
            hard = hard - F.log_softmax(wide[row], -1)[label]
    (2 * (weights[0] * soft + weights[1] * hard)).backward()
    assert small.soft == pytest.approx(soft.item(), rel=1e-5)
    assert small.hard == pytest.approx(hard.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)


def test_it_rounds_as_its_plain_twin():
    student, teacher, targets = case()
    small = small_batch_loss(student, teacher, targets, temperature=3.0, soft_weight=1.0, hard_weight=1.0)
    assert small.soft == pytest.approx(
        SoftTargetLoss(temperature=3.0, reduction="sum")(student, teacher).item(), rel=2e-7
    )
    assert small.hard == F.cross_entropy(student, targets, reduction="sum").item()


@pytest.mark.parametrize("bad", ["student nan", "teacher nan", "support", "label"])
def test_what_is_not_finite_or_no_label_is_left_to_the_twin(bad):
    student, teacher, targets = case()
    with torch.no_grad():
        if bad == "student nan":
            student[1, 1] = torch.nan
        elif bad == "teacher nan":
            teacher[1, 1] = torch.nan
        elif bad == "support":
            student[1, 1] = -torch.inf
        else:
            targets[2] = 5
    assert small_batch_loss(student, teacher, targets, temperature=1.0, soft_weight=0.5, hard_weight=0.5) is None


def test_only_small_float32_on_the_cpu_without_a_learning_teacher():
    small = torch.zeros(2, 3)
    assert is_small(small, small)
    assert not is_small(torch.zeros(2**9, 2**7), torch.zeros(2**9, 2**7))
    assert not is_small(small.double(), small.double())
    assert not is_small(small, small.bfloat16())
    assert not is_small(small, torch.zeros(2, 3, requires_grad=True))
    assert not is_small(small.to("meta"), small.to("meta"))


def test_a_second_derivative_is_refused():
    student, teacher, targets = case()
    small = small_batch_loss(student, teacher, targets, temperature=1.0, soft_weight=0.5, hard_weight=0.5)
    (gradient,) = torch.autograd.grad(small.total, student, create_graph=True)
    with pytest.raises(RuntimeError, match="grad"):
        gradient.sum().backward()
