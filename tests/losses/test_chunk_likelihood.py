"""Chunk likelihoods against float64 written out, and log-probabilities without logits against plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kd_trainer.losses.chunk_likelihood import (
    _tiles,
    chunk_kl,
    chunk_sums,
    label_log_probs,
    log1mexp,
    loss_of_log_probs,
)
from kd_trainer.losses.divergences import DIVERGENCES
from kd_trainer.losses.projection import OutputProjection


def by_hand(l_s: float, l_t: float, tau: float) -> float:
    q, p = math.exp(l_s / tau), math.exp(l_t / tau)
    return p * (math.log(p) - math.log(q)) + (1 - p) * (math.log(1 - p) - math.log(1 - q))


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0, 100.0])
def test_the_divergence_written_out(tau):
    values = [-1e-3, -0.1, -0.7, -1.0, -4.0, -20.0]
    for l_t in values:
        for l_s in values:
            student, teacher = (torch.tensor([x], dtype=torch.float64) for x in (l_s, l_t))
            expected = by_hand(l_s, l_t, tau)
            assert chunk_kl(student, teacher, temperature=tau).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_the_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (-5 * torch.rand(12, generator=generator, dtype=torch.float64) - 1e-3 for _ in range(2))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: chunk_kl(x, teacher, temperature=2.0), (student,))
    assert torch.autograd.gradgradcheck(lambda x: chunk_kl(x, teacher), (student,))


def test_one_tokenizer_and_tau_1_is_the_target_term_of_dkd():
    generator = torch.Generator().manual_seed(1)
    z_s, z_t = (3 * torch.randn(40, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(11, (40,), generator=generator)
    log_q, log_p = (F.log_softmax(z, -1).gather(1, labels[:, None]).squeeze(1) for z in (z_s, z_t))
    target_and_rest = [torch.stack([x.exp(), 1 - x.exp()], 1) for x in (log_p, log_q)]
    expected = (target_and_rest[0] * (target_and_rest[0] / target_and_rest[1]).log()).sum(1)
    torch.testing.assert_close(chunk_kl(log_q, log_p), expected, rtol=1e-9, atol=1e-12)
    without_the_rest = DIVERGENCES["dkd"](z_s, z_t, labels=labels, beta=1e-13)
    torch.testing.assert_close(chunk_kl(log_q, log_p), without_the_rest, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(chunk_kl(log_q.float(), log_p.float()), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_finite_at_the_ends(dtype, tau):
    ends = torch.tensor([0.0, -1e-9, -1e-3, -50.0, -1e4], dtype=dtype)
    student, teacher = (x.flatten().clone() for x in torch.meshgrid(ends, ends, indexing="ij"))
    student.requires_grad_()
    loss = chunk_kl(student, teacher, temperature=tau)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.isfinite().all()
    assert (loss >= -1e-7).all()
    loss.sum().backward()
    if dtype != torch.float16:  # which has no number for 1 / eps of float32
        assert student.grad.isfinite().all()
    assert chunk_kl(ends, ends).tolist() == [0.0] * 5
    never = torch.full((1,), -torch.inf)
    assert chunk_kl(never, never).item() == 0  # 0 log 0
    assert chunk_kl(torch.tensor([-1.0]), never).item() == pytest.approx(-math.log(1 - math.exp(-1)), rel=1e-6)
    assert chunk_kl(never, torch.tensor([-1.0])).item() == math.inf


def test_a_sure_student_is_still_pushed_back():
    student = torch.zeros(1, requires_grad=True)
    chunk_kl(student, torch.tensor([-1.0])).backward()
    assert student.grad.item() > 1e6  # (q - p) / (1 - q) with 1 - q = eps


def test_log1mexp_against_exact_numbers():
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    for x in (-1e-12, -1e-5, -0.3, -0.69, -0.7, -2.0, -36.0, -200.0):
        value = torch.tensor(x, dtype=torch.float64)
        exact = (1 - Decimal(value.item()).exp()).ln()
        assert log1mexp(value).item() == pytest.approx(float(exact), rel=1e-14)


def test_sums_leave_out_what_belongs_to_no_chunk():
    ids = torch.tensor([[-1, 0, 0, 2, 2], [1, 1, 7, -1, 0]])
    values = torch.tensor([[math.nan, 1.0, 2.0, 3.0, 4.0], [1.0, 2.0, math.inf, math.nan, 5.0]], requires_grad=True)
    sums = chunk_sums(values, ids, 3)
    assert sums.tolist() == [[3.0, 0.0, 7.0], [5.0, 3.0, 0.0]]
    sums.sum().backward()
    assert values.grad.tolist() == [[0, 1, 1, 1, 1], [1, 1, 0, 0, 1]]


def test_the_likelihoods_of_a_markov_model_are_the_exact_ones():
    """Letters of a Markov chain, read by letters and by pairs of letters: both sum to the chain's own likelihood."""
    generator = torch.Generator().manual_seed(2)
    chain = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    chain /= chain.sum(1, keepdim=True)
    text = torch.randint(3, (13,), generator=generator)
    steps = chain[text[:-1], text[1:]].log()  # log p(letter | the one before), of 12 letters behind the first
    # The model of pairs: p(xy | .z) = chain[z, x] * chain[x, y].
    pairs = (chain[:, :, None] * chain[None]).reshape(3, 9).log()
    z, xy = text[0:-1:2], 3 * text[1::2] + text[2::2]
    of_pairs = torch.log_softmax(pairs[z], -1).gather(1, xy[:, None]).T
    of_letters = chunk_sums(steps[None], torch.arange(12)[None] // 4, 3)
    of_pairs = chunk_sums(of_pairs, torch.arange(6)[None] // 2, 3)
    exact = [sum(math.log(chain[text[i], text[i + 1]]) for i in range(4 * c, 4 * c + 4)) for c in range(3)]
    torch.testing.assert_close(of_letters[0], torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(of_pairs, of_letters, rtol=0, atol=1e-12)
    assert chunk_kl(of_letters, of_pairs).abs().max() < 1e-12


# ---- log-probabilities without logits -------------------------------------------------------------------------------

WAYS = [(1.0, None, False), (0.5, None, True), (1.0, 5.0, False), (2.0, 3.0, True)]


def problem(dtype: torch.dtype, bias: bool, n: int = 13) -> tuple:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(k, 6, generator=generator, dtype=torch.float64) for k in (n, 29))
    offset = torch.randn(29, generator=generator, dtype=torch.float64) if bias else None
    labels = torch.randint(29, (n,), generator=generator)
    return *(None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, offset)), labels


GROUPS = torch.tensor([0, 0, 0, 1, 1, -1, -1, 4, 4, 4, 4, 4, 9])


def squares(log_probs: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss whose gradient at a position depends on the others of its group."""
    groups = GROUPS[rows]
    same = (groups[:, None] == groups) & (groups >= 0)
    return (same * log_probs[:, None] * log_probs).sum() / 7, log_probs.sum()


@pytest.mark.parametrize(("scale", "softcap", "bias"), WAYS)
@pytest.mark.parametrize("tile_rows", [1, 4, 13, None])
def test_value_and_gradients_are_those_of_whole_logits(scale, softcap, bias, tile_rows):
    hidden, weight, offset, labels = problem(torch.float64, bias)
    projection = OutputProjection(weight, offset, scale, softcap)
    total, log_sum = loss_of_log_probs(hidden, projection, labels, squares, groups=GROUPS, tile_rows=tile_rows)
    (3 * total).backward()
    given = [x for x in (hidden, weight, offset) if x is not None]
    found = [x.grad.clone() for x in given]
    for x in given:
        x.grad = None
    z = scale * F.linear(hidden, weight, offset)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_probs = torch.log_softmax(z, -1)[torch.arange(len(labels)), labels]
    expected, expected_sum = squares(log_probs, slice(None))
    (3 * expected).backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(log_sum, expected_sum)
    assert not log_sum.requires_grad
    for grad, x in zip(found, given, strict=True):
        torch.testing.assert_close(grad, x.grad)
    without = label_log_probs(hidden, projection, labels, tile_rows=tile_rows)
    torch.testing.assert_close(without, log_probs.detach())
    assert not without.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_small_gradients(dtype):
    hidden, weight, _, labels = problem(dtype, bias=False)
    loss_of_log_probs(
        hidden, OutputProjection(weight, None, 1.0, None), labels, lambda x, rows: (x.sum() * 1e-6,), tile_rows=4
    )[0].backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (F.log_softmax(wide[0] @ wide[1].T, -1)[torch.arange(13), labels].sum() * 1e-6).backward()
    for x, exact in zip((hidden, weight), wide, strict=True):
        room = float(exact.grad.abs().max()) * 0.03 + (6e-8 if dtype == torch.float16 else 0)
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=room)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 13, 100])
def test_tiles_part_no_group(rows):
    tiles = _tiles(13, GROUPS, rows, torch.empty(29, 6))
    covered = [i for tile in tiles for i in range(tile.start, tile.stop)]
    assert covered == list(range(13))
    for tile in tiles[:-1]:
        assert GROUPS[tile.stop - 1] != GROUPS[tile.stop] or GROUPS[tile.stop] == -1
    heights = [tile.stop - tile.start for tile in tiles]
    assert max(heights) <= max(rows, 5)  # the largest group
    assert _tiles(0, GROUPS[:0], rows, torch.empty(29, 6)) == []
    if rows == 13:
        assert len(tiles) == 1


def test_nothing_counted_wrong_labels_and_no_gradient():
    hidden, weight, _, labels = problem(torch.float32, bias=False)
    projection = OutputProjection(weight, None, 1.0, None)
    total, *_ = loss_of_log_probs(hidden[:0], projection, labels[:0], lambda x, rows: (x.sum(),))
    total.backward()
    assert total.item() == 0
    assert not weight.grad.any()
    labels[3], labels[5] = 29, -100
    log_probs = label_log_probs(hidden, projection, labels)
    assert log_probs.isnan().nonzero().flatten().tolist() == [3, 5]
    with torch.no_grad():
        total, *_ = loss_of_log_probs(hidden, projection, labels.clamp(0, 28), squares, groups=GROUPS)
    assert not total.requires_grad


def test_the_logits_are_never_whole():
    hidden, weight, _, labels = problem(torch.float32, bias=False, n=400)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (tuple, list)) else [result]
            largest.extend(x.numel() for x in outputs if isinstance(x, torch.Tensor))
            return result

    with Watch():
        loss_of_log_probs(
            hidden, OutputProjection(weight, None, 1.0, None), labels, lambda x, rows: (x.square().sum(),), tile_rows=8
        )[0].backward()
    assert max(largest) <= 400 * 6  # the hidden states; whole logits have 400 * 29
