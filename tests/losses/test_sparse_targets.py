"""Top-k and draws against float64 written out; that draws are unbiased; the losses and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_trainer import DIVERGENCES
from kd_trainer.losses import sparse_targets as sparse
from kd_trainer.losses.sparse_targets import Samples, TopK, draw_samples, sampled_forward_kl, top_k, top_k_divergence
from tests.helpers.written_out import INF, OVER_BUCKETS, WRITTEN_OUT


def logits(*shape, seed=0, spread=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(row, temperature):
    powers = [math.exp((z - max(row)) / temperature) for z in row]
    return [power / math.fsum(powers) for power in powers]


BETA = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}


def buckets(row, ids, temperature):
    """The probabilities at the ids, and of all others together."""
    found = probabilities(row, temperature)
    return [found[i] for i in ids] + [math.fsum(p for i, p in enumerate(found) if i not in ids)]


# ---- top-k ----------------------------------------------------------------------------------------------------------


def assert_is_top_k(kept, z, k, temperature, *, room):
    """By value, since among equal logits any choice is right."""
    z, shape = z.double(), z.shape[:-1]
    assert kept.ids.shape == kept.log_probs.shape == (*shape, k)
    assert kept.log_tail.shape == shape
    classes = z.shape[-1]
    rows = zip(*(t.reshape(-1, *t.shape[len(shape) :]) for t in (z, *kept)), strict=True)
    for row, ids, log_probs, log_tail in rows:
        values = row[ids].tolist()
        assert len(set(ids.tolist())) == k
        assert values == sorted(row.tolist(), reverse=True)[:k]
        x = (row - row.max()) / temperature
        lse = x.logsumexp(0)
        assert torch.allclose(log_probs.double(), x[ids] - lse, rtol=room, atol=room)
        others = [i for i in range(classes) if i not in set(ids.tolist())]
        expected = x[others].logsumexp(0) - lse if others else torch.tensor(-INF).double()
        assert torch.allclose(log_tail.double(), expected, rtol=room, atol=room)


@pytest.mark.parametrize("classes", [1, 2, 31, 32, 33, 64, 65, 500, 997])
@pytest.mark.parametrize("k", [1, 3, 64, "V - 1", "V"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_and_its_tail(classes, k, temperature):
    k = {"V - 1": classes - 1, "V": classes}.get(k, k)
    if 1 <= k <= classes:
        z = logits(3, classes)
        assert_is_top_k(top_k(z, k, temperature=temperature), z, k, temperature, room=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top_k_of_other_dtypes_is_wide(dtype):
    z = logits(2, 3, 700, dtype=dtype)
    kept = top_k(z, 5, temperature=2.0)
    assert kept.ids.dtype == torch.int64
    assert kept.log_probs.dtype == kept.log_tail.dtype == torch.float32
    assert_is_top_k(kept, z, 5, 2.0, room=2e-6)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 0), (0,)])
def test_leading_dimensions(shape):
    z, u = logits(*shape, 300), uniform(*shape)
    kept = top_k(z, 4)
    assert [t.shape for t in kept] == [(*shape, 4), (*shape, 4), shape]
    drawn = draw_samples(z, 6, uniform=u)
    assert [t.shape for t in drawn] == [(*shape, 6), shape, shape]
    assert top_k_divergence(z, kept).shape == sampled_forward_kl(z, drawn).shape == shape


def test_what_is_not_contiguous():
    z = logits(300, 8).T
    assert_is_top_k(top_k(z, 4), z, 4, 1.0, room=1e-12)


@pytest.mark.parametrize("classes", [40, 1000])
@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("shift", [14.0, 60.0, 200.0])  # a tail of 1e-6, 1e-26, 1e-87
def test_the_tail_is_right_however_small(classes, k, shift):
    z = logits(6, classes, spread=0.5, dtype=torch.float32)
    z[:, 7 : 7 + k] += shift + math.log(classes)
    kept = top_k(z, k)
    assert kept.log_tail.max() < -0.9 * shift
    assert_is_top_k(kept, z, k, 1.0, room=2e-6)


def test_ties_and_excluded_classes():
    z = torch.full((2, 400), 1.0, dtype=torch.float64)
    z[1] = -INF
    z[1, [3, 150, 399]] = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    for k in (2, 3, 5, 200):
        kept = top_k(z, k)
        assert len(set(kept.ids[0].tolist())) == len(set(kept.ids[1].tolist())) == k
        assert torch.allclose(kept.log_probs[0].exp(), torch.tensor(1 / 400).double())
        assert kept.log_tail[0].exp().item() == pytest.approx(1 - k / 400)
        assert kept.ids[1, : min(k, 3)].tolist() == [150, 3, 399][:k]
        assert (kept.log_probs[1, 3:] == -INF).all()
        share = math.exp(0.0) / (math.exp(0.0) + math.exp(1.0) + math.exp(2.0))
        assert kept.log_tail[1].exp().item() == pytest.approx(share if k == 2 else 0.0)


@pytest.mark.parametrize("elements", [1, 600, 2000])
def test_blocks_change_nothing(monkeypatch, elements):
    z, u = logits(11, 300, dtype=torch.bfloat16), uniform(11)
    whole, drawn = top_k(z, 2, temperature=2.0), draw_samples(z, 9, temperature=2.0, uniform=u)
    monkeypatch.setattr(sparse, "_BLOCK", elements)
    for one, other in zip((*whole, *drawn), (*top_k(z, 2, temperature=2.0),
                          *draw_samples(z, 9, temperature=2.0, uniform=u)), strict=True):  # fmt: skip
        assert torch.equal(one, other)


def test_neither_threads_nor_the_rows_beside_it_change_a_row():
    z, u = logits(21, 50_000, dtype=torch.float32), uniform(21)
    whole, threads = (*top_k(z, 4), *draw_samples(z, 9, uniform=u)), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            parts = [
                (*top_k(x, 4), *draw_samples(x, 9, uniform=v)) for x, v in zip(z.split(1), u.split(1), strict=True)
            ]
            assert all(torch.equal(torch.cat(x), y) for x, y in zip(zip(*parts, strict=True), whole, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wrong", [math.nan, INF])
@pytest.mark.parametrize("k", [3, 40])
def test_a_logit_that_is_not_finite_is_seen_in_the_tail_and_in_the_entropy(wrong, k):
    z = logits(2, 40, dtype=torch.float32)
    z[1, 7] = wrong
    drawn = draw_samples(z, 5, uniform=uniform(2))
    for column in (top_k(z, k).log_tail, drawn.entropy):
        assert column.isnan().tolist() == [False, True]


# ---- draws ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(1, 200), n=st.integers(1, 60), seed=st.integers(0, 10**6), temperature=st.floats(0.1, 10))
def test_an_id_comes_up_within_one_draw_of_its_share(classes, n, seed, temperature):
    """Points 1/n apart: an interval of length p holds floor(n p) or ceil(n p) of them."""
    z, u = logits(3, classes, seed=seed), uniform(3, seed=seed)
    drawn = draw_samples(z, n, temperature=temperature, uniform=u)
    for row, ids in zip(z, drawn.ids, strict=True):
        assert 0 <= ids.min() <= ids.max() < classes
        for share, count in zip(probabilities(row.tolist(), temperature), ids.bincount(minlength=classes), strict=True):
            assert math.floor(n * share - 1e-9) <= count <= math.ceil(n * share + 1e-9)


@pytest.mark.parametrize("classes", [5, 33, 400])
def test_the_expected_share_of_an_id_is_its_probability(classes):
    """The mean over evenly spaced `uniform` is an integral, whose error is at most one draw at each end."""
    many, n = 4000, 7
    z = logits(1, classes).expand(many, -1)
    u = (torch.arange(many).double() + 0.5) / many
    drawn = draw_samples(z, n, temperature=2.0, uniform=u)
    shares = drawn.ids.flatten().bincount(minlength=classes) / (many * n)
    expected = torch.tensor(probabilities(z[0].tolist(), 2.0)).double()
    assert (shares - expected).abs().max() <= 2 / (many * n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [50, 1000])
def test_top_and_entropy(dtype, classes):
    z = logits(5, classes, dtype=dtype)
    z[1, 3:] = -INF
    z[2, 1:] = -INF
    drawn = draw_samples(z, 3, temperature=1.7, uniform=uniform(5))
    for row, top, entropy in zip(z.tolist(), drawn.top, drawn.entropy, strict=True):
        assert row[top] == max(row)
        expected = -math.fsum(p * math.log(p) for p in probabilities(row, 1.7) if p > 0)
        assert entropy.item() == pytest.approx(expected, abs=1e-12 if dtype == torch.float64 else 2e-6)
    assert drawn.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_has_no_probability_is_never_drawn(dtype):
    z = torch.full((4, 3000), -INF, dtype=dtype)
    allowed = torch.arange(1, 3000, 7)
    z[:, allowed] = logits(4, len(allowed), dtype=dtype)
    z[3] = -INF
    z[3, 2999] = 0.0
    smallest, largest = 0.0, 1 - 2**-53
    for u in (smallest, 1e-300, 0.5, largest):
        drawn = draw_samples(z, 50, uniform=torch.full((4,), u, dtype=torch.float64))
        assert (z.gather(1, drawn.ids) > -INF).all()
        assert (drawn.ids[3] == 2999).all()
    z[:, 1] = 200.0  # the others underflow
    assert (draw_samples(z, 50, uniform=torch.full((4,), largest, dtype=torch.float64)).ids == 1).all()


def test_the_same_numbers_give_the_same_draws():
    z = logits(4, 900, dtype=torch.float32)
    one, other = (draw_samples(z, 50, uniform=uniform(4)).ids for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, draw_samples(z, 50, uniform=uniform(4, seed=1)).ids)


# ---- the losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", OVER_BUCKETS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 4, 8, 9])
def test_top_k_divergence_is_written_out(divergence, temperature, k):
    student, teacher = logits(2, 3, 9), logits(2, 3, 9, seed=1)
    kept = top_k(teacher, k, temperature=temperature)
    found = top_k_divergence(student, kept._replace(ids=kept.ids.to(torch.int16)), temperature=temperature,
                             divergence=divergence)  # fmt: skip
    for i in range(2):
        for j in range(3):
            ids = kept.ids[i, j].tolist()
            p, q = (buckets(z[i, j].tolist(), ids, temperature) for z in (teacher, student))
            assert found[i, j].item() == pytest.approx(WRITTEN_OUT[divergence](p, q, BETA.get(divergence)), rel=1e-10)
    if k >= 8:  # the tail is one id, or none
        dense = DIVERGENCES[divergence](student, teacher, temperature=temperature)
        assert torch.allclose(found, dense, rtol=1e-10)


@pytest.mark.parametrize("divergence", list(BETA))
def test_beta(divergence):
    student, teacher = logits(9), logits(9, seed=1)
    kept = top_k(teacher, 3)
    p, q = (buckets(z.tolist(), kept.ids.tolist(), 1.0) for z in (teacher, student))
    found = top_k_divergence(student, kept, divergence=divergence, beta=0.3)
    assert found.item() == pytest.approx(WRITTEN_OUT[divergence](p, q, 0.3), rel=1e-10)


@settings(max_examples=40, deadline=None)
@given(divergence=st.sampled_from(OVER_BUCKETS), k=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_buckets_never_tell_more_than_all_ids(divergence, k, seed):
    student, teacher = logits(12, seed=seed), logits(12, seed=seed + 1)
    dense = DIVERGENCES[divergence](student, teacher)
    assert -1e-12 <= top_k_divergence(student, top_k(teacher, k), divergence=divergence) <= dense + 1e-12


@pytest.mark.parametrize("divergence", [d for d in OVER_BUCKETS if d != "total_variation"])
@pytest.mark.parametrize("k", [3, 9])
def test_gradcheck_of_top_k(divergence, k):
    kept = top_k(logits(2, 9, seed=1), k, temperature=2.0)
    student = logits(2, 9).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: top_k_divergence(z, kept, temperature=2.0, divergence=divergence), student
    )


def test_gradcheck_of_total_variation_and_of_samples():
    student = logits(2, 9).requires_grad_()
    kept = top_k(logits(2, 9, seed=1), 3)  # no bucket alike in both
    assert torch.autograd.gradcheck(lambda z: top_k_divergence(z, kept, divergence="total_variation"), student)
    drawn = draw_samples(logits(2, 9, seed=1), 20, temperature=2.0, uniform=uniform(2))
    assert torch.autograd.gradcheck(lambda z: sampled_forward_kl(z, drawn, temperature=2.0), student)


@pytest.mark.parametrize("divergence", OVER_BUCKETS)
def test_excluded_classes(divergence):
    """Excluded by both in the tail, among the kept ids, and by the teacher alone: 0 log 0 = 0, never NaN."""
    teacher = torch.tensor([[1.0, 0.5, -INF, 0.2, -INF]], dtype=torch.float64)
    student = torch.tensor([[0.3, 0.9, -INF, 0.1, -INF]], dtype=torch.float64)
    for k in range(1, 6):
        z = student.clone().requires_grad_()
        value = top_k_divergence(z, top_k(teacher, k), divergence=divergence)
        kept = top_k(teacher, k).ids[0].tolist()
        p, q = (buckets(x[0].tolist(), kept, 1.0) for x in (teacher, student))
        assert value.item() == pytest.approx(WRITTEN_OUT[divergence](p, q, BETA.get(divergence)), rel=1e-10)
        (gradient,) = torch.autograd.grad(value, z)
        assert gradient.isfinite().all()
        assert (gradient[0, [2, 4]] == 0).all()


@pytest.mark.parametrize("place", ["kept", "tail"])
def test_mass_where_the_student_has_none_is_infinite(place):
    student = torch.tensor([-INF, 0.0, 0.0] if place == "kept" else [0.0, -INF, -INF], dtype=torch.float64)
    student.requires_grad_()
    kept = top_k(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), 1)
    value = top_k_divergence(student, kept)
    assert value == INF
    assert torch.autograd.grad(value, student)[0].isfinite().all()
    drawn = Samples(torch.tensor([0, 1]), torch.tensor(0), torch.tensor(0.5).double())
    value = sampled_forward_kl(student, drawn)
    assert value == INF
    assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_sampled_forward_kl_is_written_out():
    student, temperature = logits(9), 2.0
    drawn = Samples(
        torch.tensor([3, 3, 0, 8], dtype=torch.int32), torch.tensor(3), torch.tensor(0.9, dtype=torch.float64)
    )
    q = probabilities(student.tolist(), temperature)
    expected = -0.9 - math.fsum(math.log(q[i]) for i in (3, 3, 0, 8)) / 4
    assert sampled_forward_kl(student, drawn, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def many_draws():
    """Loss and gradient of the forward KL by 4,000 times 8 draws each, systematic and independent, and the truth."""
    many, n, temperature = 4000, 8, 2.0
    student, teacher = logits(60), logits(60, seed=1)

    def loss_and_gradient(loss):
        z = student.expand(many, -1).clone().requires_grad_()
        values = loss(z)
        (gradient,) = torch.autograd.grad(values.sum(), z)
        return torch.cat((values.detach().unsqueeze(1), gradient), 1)

    rows = teacher.expand(many, -1)
    drawn = draw_samples(rows, n, temperature=temperature, uniform=uniform(many))
    shares = torch.softmax(rows / temperature, -1)
    independent = torch.multinomial(shares, n, replacement=True, generator=torch.Generator().manual_seed(0))
    found = [
        loss_and_gradient(lambda z, ids=ids: sampled_forward_kl(z, drawn._replace(ids=ids), temperature=temperature))
        for ids in (drawn.ids, independent)
    ]
    exact = loss_and_gradient(lambda z: DIVERGENCES["forward_kl"](z, rows, temperature=temperature))[0]
    return *found, exact


def test_loss_and_gradient_are_unbiased(many_draws):
    systematic, _, exact = many_draws
    error = systematic.std(0) / len(systematic) ** 0.5
    deviations = ((systematic.mean(0) - exact) / error).abs()
    assert deviations[0] <= 3
    # Of 60 dependent gradients some are further off than 3 standard errors by chance alone.
    assert (deviations <= 3).double().mean() > 0.98
    assert deviations.max() < 4


def test_systematic_draws_vary_less_than_independent_ones(many_draws):
    systematic, independent, _ = many_draws
    assert systematic[:, 1:].var(0).sum() < 0.8 * independent[:, 1:].var(0).sum()

    def ratio(seed):
        """Of the variances of the loss against one teacher; which ids are neighbours is chance, so it may exceed 1."""
        student, teacher = logits(60, seed=2 * seed), logits(60, seed=2 * seed + 1)
        points = ((torch.arange(500) + 0.5) / 500).double()
        drawn = draw_samples(teacher.expand(500, -1), 8, temperature=2.0, uniform=points)
        shares, log_q = torch.softmax(teacher / 2, -1), torch.log_softmax(student / 2, -1)
        alone = (shares * log_q.square()).sum() - (shares * log_q).sum().square()
        return sampled_forward_kl(student.expand(500, -1), drawn, temperature=2.0).var() / (alone / 8)

    assert torch.stack([ratio(seed) for seed in range(40)]).mean() < 0.9


def test_a_teacher_in_bfloat16_is_widened_before_the_temperature():
    z = logits(3, 500, dtype=torch.bfloat16)
    for one, other in ((top_k(z, 4, temperature=3.0), top_k(z.float(), 4, temperature=3.0)),):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert top_k_divergence(z, top_k(z, 4)).dtype == torch.float32


# ---- messages -------------------------------------------------------------------------------------------------------

Z, U = torch.zeros(2, 5), torch.zeros(2)
KEPT = TopK(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(2))
DRAWN = Samples(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(2))
WRONG = {
    "k of 0": ("k", lambda: top_k(Z, 0)),
    "k above V": ("k", lambda: top_k(Z, 6)),
    "k of no number": ("k", lambda: top_k(Z, 2.0)),
    "temperature": ("temperature", lambda: top_k(Z, 2, temperature=0.0)),
    "no logits": ("logits", lambda: top_k(torch.zeros(3, dtype=torch.int64), 2)),
    "no class": ("logits", lambda: top_k(torch.zeros(3, 0), 2)),
    "n": ("n", lambda: draw_samples(Z, 0, uniform=U)),
    "uniform's shape": ("uniform", lambda: draw_samples(Z, 2, uniform=torch.zeros(3))),
    "uniform of 1": ("uniform", lambda: draw_samples(Z, 2, uniform=torch.ones(2))),
    "uniform below 0": ("uniform", lambda: draw_samples(Z, 2, uniform=U - 0.1)),
    "uniform is NaN": ("uniform", lambda: draw_samples(Z, 2, uniform=U * math.nan)),
    "draws' temperature": ("temperature", lambda: draw_samples(Z, 2, temperature=-1.0, uniform=U)),
    "positions": ("teacher", lambda: top_k_divergence(Z[:1], KEPT)),
    "log-probabilities": ("teacher", lambda: top_k_divergence(Z, KEPT._replace(log_probs=torch.zeros(2, 2)))),
    "tail": ("teacher", lambda: top_k_divergence(Z, KEPT._replace(log_tail=torch.zeros(2, 1)))),
    "divergence": ("divergence", lambda: top_k_divergence(Z, KEPT, divergence="kl")),
    "beta": ("beta", lambda: top_k_divergence(Z, KEPT, beta=0.5)),
    "student": ("student_logits", lambda: top_k_divergence(Z.long(), KEPT)),
    "draws' positions": ("teacher", lambda: sampled_forward_kl(Z[:1], DRAWN)),
    "draws' entropy": ("teacher", lambda: sampled_forward_kl(Z, DRAWN._replace(entropy=torch.zeros(2, 1)))),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_inputs_are_named(wrong):
    argument, call = WRONG[wrong]
    with pytest.raises((ValueError, TypeError), match=rf"^`{argument}` is [\s\S]*; expected ") as caught:
        call()
    assert str(caught.value).endswith(".") or "Did you mean" in str(caught.value)
