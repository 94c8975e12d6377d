"""Pooling, the losses of embeddings and the correlation of similarities against Python's own arithmetic and SciPy."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from kd_trainer.losses.features import (
    EMBEDDING_LOSSES,
    POOLINGS,
    cosine_loss,
    normalised,
    pool,
    similarity_correlation,
    squared_error,
)

LENGTHS = [1, 3, 5, 2]


def padded(side: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(hidden states with NaN at the padding, mask, the states of each row alone)."""
    generator = torch.Generator().manual_seed(5)
    alone = [torch.randn(length, 4, generator=generator, dtype=torch.float64).to(dtype) for length in LENGTHS]
    hidden = torch.full((len(alone), 7, 4), torch.nan, dtype=dtype)
    mask = torch.zeros(len(alone), 7, dtype=torch.bool)
    for row, states in enumerate(alone):
        start = 7 - len(states) if side == "left" else 0
        if side == "both":
            start = 1
        hidden[row, start : start + len(states)] = states
        mask[row, start : start + len(states)] = True
    return hidden, mask, alone


def written_out(states: torch.Tensor, pooling: str) -> list[float]:
    rows = states.double().tolist()
    if pooling == "mean":
        return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    return rows[0] if pooling == "cls" else rows[-1]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_pooling_is_of_the_attended_positions(pooling, side):
    hidden, mask, alone = padded(side)
    expected = torch.tensor([written_out(states, pooling) for states in alone], dtype=torch.float64)
    torch.testing.assert_close(pool(hidden, mask, pooling), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_without_a_mask_counts_every_position(pooling):
    hidden = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = torch.tensor([written_out(states, pooling) for states in hidden], dtype=torch.float64)
    torch.testing.assert_close(pool(hidden, None, pooling), expected)


def test_a_mask_with_a_hole_takes_the_outermost_attended_positions():
    hidden = torch.arange(5.0).reshape(1, 5, 1)
    mask = torch.tensor([[False, True, False, True, False]])
    assert [pool(hidden, mask, name).item() for name in ("mean", "cls", "last")] == [2.0, 1.0, 3.0]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_gradient_of_pooling_leaves_padding_out(pooling, side):
    hidden, mask, _ = padded(side)
    hidden = hidden.nan_to_num(1.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool(x, mask, pooling), hidden)
    pool(hidden, mask, pooling).sum().backward()
    assert (hidden.grad[~mask] == 0).all()
    assert (hidden.grad.sum((1, 2)) - 4).abs().max() < 1e-12  # H numbers, weights of 1 in all


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_of_padding_alone_gives_zeros_and_a_finite_gradient(pooling):
    hidden, mask, _ = padded("right")
    mask[1] = False
    hidden = hidden.nan_to_num(0.0).requires_grad_()
    embeddings = pool(hidden, mask, pooling)
    assert (embeddings[1] == 0).all()
    loss = cosine_loss(embeddings, torch.ones_like(embeddings))
    assert loss[1] == 1
    loss.sum().backward()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[1] == 0).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_half_precision_is_pooled_in_float32(pooling):
    hidden, mask, alone = padded("left", torch.bfloat16)
    expected = torch.tensor([written_out(states, pooling) for states in alone])
    found = pool(hidden, mask, pooling)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"`mask` is of shape \[2, 5\]; expected \[2, 3\]"):
        pool(torch.ones(2, 3, 4), torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`hidden` is of shape \[2, 4\]; expected \[B, S, H\]"):
        pool(torch.ones(2, 4), None)
    with pytest.raises(ValueError, match="`pooling` is 'first'; expected one of 'mean', 'cls', 'last'"):
        pool(torch.ones(2, 3, 4), None, "first")


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    student, teacher = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


def test_the_losses_are_those_written_out():
    student, teacher = pair()
    cosines, errors = [], []
    for a, b in zip(student.tolist(), teacher.tolist(), strict=True):
        product = math.fsum(x * y for x, y in zip(a, b, strict=True))
        cosines.append(1 - product / (math.hypot(*a) * math.hypot(*b)))
        errors.append(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / 5)
    assert cosine_loss(student, teacher).tolist() == pytest.approx(cosines, rel=1e-13)
    assert squared_error(student, teacher).tolist() == pytest.approx(errors, rel=1e-13)


@pytest.mark.parametrize("loss", EMBEDDING_LOSSES)
def test_gradcheck(loss):
    student, teacher = pair()
    assert torch.autograd.gradcheck(lambda x: EMBEDDING_LOSSES[loss](x, teacher), student)


@pytest.mark.parametrize("loss", EMBEDDING_LOSSES)
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(loss):
    _, teacher = pair()
    student = teacher.clone().requires_grad_()
    value = EMBEDDING_LOSSES[loss](student, teacher)
    assert value.abs().max() < 1e-15
    value.sum().backward()
    assert student.grad.abs().max() < 1e-15


def test_the_length_of_an_embedding_does_not_change_the_cosine():
    student, teacher = pair()
    torch.testing.assert_close(cosine_loss(student * 1e6, teacher * 1e-6), cosine_loss(student, teacher))


@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
@pytest.mark.parametrize("loss", EMBEDDING_LOSSES)
def test_zero_vectors_have_a_finite_loss_and_gradient(loss, zero):
    student, teacher = torch.ones(2, 3), torch.ones(2, 3)
    for side, tensor in (("student", student), ("teacher", teacher)):
        if zero in (side, "both"):
            tensor[0] = 0
    student.requires_grad_()
    value = EMBEDDING_LOSSES[loss](student, teacher)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.abs().max() < 10
    if loss == "cosine":
        assert value[0] == 1


@pytest.mark.parametrize("loss", EMBEDDING_LOSSES)
def test_half_precision_is_compared_in_float32(loss):
    student, teacher = (x.detach().bfloat16() for x in pair())
    found = EMBEDDING_LOSSES[loss](student, teacher)
    assert found.dtype == torch.float32
    expected = EMBEDDING_LOSSES[loss](student.double(), teacher.double())
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_normalised_vectors_have_length_one_and_zero_stays():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert normalised(vectors).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]


@pytest.mark.parametrize("rows", [3, 8, 40])
def test_the_correlation_is_scipys(rows):
    generator = torch.Generator().manual_seed(rows)
    teacher = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    student = teacher[:, :3] + torch.randn(rows, 3, generator=generator)
    student[1] = student[0]  # equal rows: ties
    sides = [[], []]
    for i in range(rows):
        for j in range(i + 1, rows):
            for side, x in zip(sides, (student, teacher), strict=True):
                cosine = x[i] @ x[j] / (x[i].norm() * x[j].norm())
                side.append(round(float(cosine), 11))
    expected = scipy.stats.spearmanr(*sides).statistic
    assert similarity_correlation(student, teacher).item() == pytest.approx(expected, abs=1e-12)


def test_the_correlation_of_reversed_similarities_is_minus_one():
    teacher = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])  # cosines .8, 0, .6
    student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])  # cosines 0, .8, .6
    assert similarity_correlation(student, teacher).item() == pytest.approx(-1.0)


def test_the_correlation_of_too_few_or_constant_similarities_is_unknown():
    assert similarity_correlation(torch.ones(2, 3), torch.ones(2, 3)).isnan()
    assert similarity_correlation(torch.ones(5, 3), torch.randn(5, 3)).isnan()


def test_the_correlation_needs_the_same_rows():
    with pytest.raises(ValueError, match=r"of shape \[3, 2\] beside a teacher's of shape \[4, 2\]"):
        similarity_correlation(torch.ones(3, 2), torch.ones(4, 2))
