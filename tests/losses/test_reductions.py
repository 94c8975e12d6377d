"""`reductions.py`: torch's words keep torch's meaning, masks hide everything, nothing counted gives 0."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kd_trainer.losses.reductions import REDUCTIONS, divide, masked_sum, reduce_terms, reduce_total, select_positions


def terms_and_mask():
    terms = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    return terms, torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.filterwarnings("ignore:reduction. .mean.")
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_words_mean_what_torch_means(shape, reduction):
    generator = torch.Generator().manual_seed(1)
    log_q, log_p = (torch.log_softmax(torch.randn(shape, generator=generator), -1) for _ in range(2))
    elementwise = F.kl_div(log_q, log_p, log_target=True, reduction="none")
    expected = F.kl_div(log_q, log_p, log_target=True, reduction=reduction)
    torch.testing.assert_close(reduce_terms(elementwise, reduction=reduction), expected)


def test_masked_denominators():
    terms, mask = terms_and_mask()
    total = sum(terms[b, s].sum() for b in range(3) for s in range(4) if mask[b, s])
    expected = {"sum": total, "mean": total / (4 * 5), "batchmean": total / 3, "tokenmean": total / 4}
    for reduction, value in expected.items():
        torch.testing.assert_close(reduce_terms(terms, mask, reduction=reduction), value)
        torch.testing.assert_close(reduce_terms(terms, mask.int(), reduction=reduction), value)
    torch.testing.assert_close(reduce_terms(terms, mask, reduction="none"), terms * mask.unsqueeze(-1))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_uncounted_positions_may_hold_anything(reduction, bad):
    terms, mask = terms_and_mask()
    broken = terms.masked_fill(~mask.unsqueeze(-1), bad).requires_grad_()
    value = reduce_terms(broken, mask, reduction=reduction)
    torch.testing.assert_close(value, reduce_terms(terms, mask, reduction=reduction))
    value.sum().backward()
    assert broken.grad.isfinite().all()
    assert (broken.grad[~mask] == 0).all()
    assert (broken.grad[mask] != 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_counted_is_zero_with_a_gradient_path(reduction):
    terms = torch.full((2, 3, 4), math.nan, requires_grad=True)
    value = reduce_terms(terms, torch.zeros(2, 3, dtype=torch.bool), reduction=reduction)
    assert (value == 0).all()
    value.sum().backward()
    assert torch.equal(terms.grad, torch.zeros(2, 3, 4))


def test_divide_by_numbers_and_tensors():
    total = torch.tensor(6.0, requires_grad=True)
    assert divide(total, 4).item() == divide(total, torch.tensor(4)).item() == divide(total, 4.0).item() == 1.5
    nothing = divide(total * 0, torch.tensor(0))
    assert nothing.item() == divide(total * 0, 0).item() == 0.0
    nothing.backward()
    assert total.grad.item() == 0.0


def test_select_positions():
    tensor = torch.arange(24.0).view(2, 3, 4).requires_grad_()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    rows = select_positions(tensor, mask)
    assert torch.equal(rows, tensor[mask])
    rows.sum().backward()
    assert torch.equal(tensor.grad, mask.unsqueeze(-1).expand(2, 3, 4).float())
    labels = torch.arange(6).view(2, 3)
    assert select_positions(labels, mask).tolist() == [0, 2, 5]
    assert select_positions(labels, mask.int()).tolist() == [0, 2, 5]
    assert select_positions(tensor, torch.zeros(2, 3, dtype=torch.bool)).shape == (0, 4)


def test_select_positions_copies_nothing_where_all_is_counted():
    tensor = torch.zeros(2, 3, 4)
    for mask in (None, torch.ones(2, 3, dtype=torch.bool)):
        rows = select_positions(tensor, mask)
        assert rows.shape == (6, 4)
        assert rows.data_ptr() == tensor.data_ptr()


def test_masked_sum():
    values = torch.tensor([[1.0, math.nan], [math.inf, 2.0]], requires_grad=True)
    total = masked_sum(values, torch.tensor([[1, 0], [0, 1]]))
    assert total.item() == 3.0
    total.backward()
    assert values.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert masked_sum(torch.ones(2)).item() == 2.0
    assert masked_sum(torch.ones(2**12 + 1, dtype=torch.bfloat16)).item() == 2**12 + 1  # bf16 sums stop at 256
    assert masked_sum(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: reduce_terms(torch.ones(2, 3), reduction="avg"),
            "`reduction` is 'avg'; expected one of 'none', 'sum'",
        ),
        (lambda: reduce_total(torch.ones(()), "none", shape=(2, 3), positions=2), "`reduction` is 'none'"),
        (lambda: reduce_terms(torch.ones(2, 3), torch.ones(3)), r"`mask` is of shape \[3\]; expected .* shape \[2\]"),
        (lambda: masked_sum(torch.ones(2), torch.ones(1)), r"`mask` is of shape \[1\]"),
        (lambda: select_positions(torch.ones(2, 3, 4), torch.ones(2, 1)), r"`mask` is of shape \[2, 1\].*\[2, 3\]"),
    ],
)
def test_messages(call, match):
    with pytest.raises(ValueError, match=match):
        call()
