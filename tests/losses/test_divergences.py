"""`divergences.py`: values against torch and against sums written out in float64, gradients, edges, messages."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kd_trainer.losses import formulas
from kd_trainer.losses.distributions import entropy, soft_cross_entropy
from kd_trainer.losses.divergences import (
    DIVERGENCES,
    divergence_terms,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from tests.helpers.written_out import INF, OF_PROBS, WRITTEN_OUT

NAMES = OF_PROBS
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def in_blocks(monkeypatch):
    """All inputs take the blockwise path, in blocks of two rows of at most 8 classes."""
    monkeypatch.setattr(formulas, "_SMALL", 0)
    monkeypatch.setattr(formulas, "_block_elements", lambda device: 16)


@pytest.fixture(params=["plain", "in_blocks"])
def path(request):
    """Runs a test on the plain formula (what small inputs take) and on the blocks."""
    return request.getfixturevalue("in_blocks") if request.param == "in_blocks" else None


def logits(*shape, seed=0, dtype=torch.float32, scale=2.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def pair(*shape, dtype=torch.float32):
    return logits(*shape, seed=1, dtype=dtype), logits(*shape, seed=2, dtype=dtype)


def probabilities(row, temperature):
    weights = [math.exp(z / temperature) for z in row]
    return [w / sum(weights) for w in weights]


BETAS = {
    "jsd": [None, 0.2, 0.9],
    "skew_forward_kl": [None, 0.3],
    "skew_reverse_kl": [None, 0.3],
    "entropy_switch": [None, 1.4],
}
CASES = [(name, beta) for name in NAMES for beta in BETAS.get(name, [None])]


def test_every_entry_is_written_out_and_public():
    import kd_trainer

    assert set(WRITTEN_OUT) == set(NAMES)
    z_s, z_t = pair(5, 7)
    for name, entry in DIVERGENCES.items():
        given = {"labels": torch.arange(5)} if entry.needs_labels else {}
        assert torch.equal(getattr(kd_trainer, name)(z_s, z_t, **given), entry(z_s, z_t, **given))


@pytest.mark.parametrize(("name", "beta"), CASES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_the_definition(path, name, beta, temperature):
    student, teacher = pair(5, 7, dtype=torch.float64)
    used = DIVERGENCES[name].default if beta is None else beta
    expected = [
        WRITTEN_OUT[name](probabilities(z_t, temperature), probabilities(z_s, temperature), used)
        for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    found = DIVERGENCES[name](student.requires_grad_(), teacher, temperature=temperature, beta=beta)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    terms = divergence_terms(name, student, teacher, temperature=temperature, beta=beta)
    assert terms.shape == student.shape
    torch.testing.assert_close(terms.sum(-1), found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_any_leading_dimensions(path, name):
    for shape in [(7,), (3, 7), (2, 3, 7), (2, 2, 2, 7), (0, 7), (3, 1)]:
        student, teacher = pair(*shape)
        student.requires_grad_()
        value = DIVERGENCES[name](student, teacher)
        assert value.shape == shape[:-1]
        flat = DIVERGENCES[name](student.reshape(-1, shape[-1]), teacher.reshape(-1, shape[-1]))
        torch.testing.assert_close(value.reshape(-1), flat)
        value.sum().backward()
        assert student.grad.shape == shape


def test_forward_and_reverse_kl_equal_torch(path):
    student, teacher = pair(6, 8)
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    student.requires_grad_()
    torch.testing.assert_close(
        forward_kl(student, teacher), F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    )
    torch.testing.assert_close(
        reverse_kl(student, teacher), F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    )


def test_reference_figures():
    teacher = torch.tensor([[2.0, 1.0, 0.1], [1.0, 2.0, 0.5]])
    student = torch.tensor([[1.8, 1.1, 0.2], [0.9, 2.1, 0.6]])
    assert round(forward_kl(student, teacher).mean().item(), 6) == 0.006916
    assert round(forward_kl(student, teacher, temperature=3.0).mean().item(), 6) == 0.000850


def test_cross_entropy_is_entropy_plus_kl():
    student, teacher = pair(6, 9, dtype=torch.float64)
    for temperature in (1.0, 2.5):
        options = {"temperature": temperature}
        torch.testing.assert_close(
            soft_cross_entropy(student, teacher, **options),
            entropy(teacher, **options) + forward_kl(student, teacher, **options),
        )
    p = torch.softmax(teacher, -1)
    torch.testing.assert_close(soft_cross_entropy(student, teacher), F.cross_entropy(student, p, reduction="none"))
    torch.testing.assert_close(entropy(teacher), torch.distributions.Categorical(logits=teacher).entropy())


def test_mirrors():
    student, teacher = pair(4, 6)
    torch.testing.assert_close(reverse_kl(student, teacher), forward_kl(teacher, student))
    torch.testing.assert_close(symmetric_kl(student, teacher), symmetric_kl(teacher, student))
    torch.testing.assert_close(jsd(student, teacher, beta=0.3), jsd(teacher, student, beta=0.7))
    torch.testing.assert_close(skew_reverse_kl(student, teacher), skew_forward_kl(teacher, student))
    torch.testing.assert_close(total_variation(student, teacher), total_variation(teacher, student))


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_gradcheck_of_both_sides(name, beta):
    student, teacher = pair(3, 5, dtype=torch.float64)
    settings = {"temperature": 2.0, "beta": beta}
    both = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: DIVERGENCES[name](s, t, **settings), both)
    assert torch.autograd.gradgradcheck(lambda s, t: divergence_terms(name, s, t, **settings).sum(-1), both)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_gradcheck_in_blocks(in_blocks, name, beta):
    student, teacher = pair(2, 3, 5, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: DIVERGENCES[name](s, teacher, temperature=2.0, beta=beta), student)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_blocks_equal_the_plain_formula(in_blocks, name, beta):
    for temperature, dtype in itertools.product(
        [1.0, 3.0], [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    ):
        student, teacher = pair(5, 7, dtype=dtype)
        weights = logits(5, seed=3, dtype=torch.float64)
        blocks, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
        value = DIVERGENCES[name](blocks, teacher, temperature=temperature, beta=beta)
        twin = divergence_terms(name, plain, teacher, temperature=temperature, beta=beta).sum(-1)
        assert type(value.grad_fn).__name__ == "_InBlocksBackward"
        assert value.dtype == twin.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(value, twin)
        (value * weights).sum().backward()
        (twin * weights).sum().backward()
        torch.testing.assert_close(blocks.grad, plain.grad)
        assert blocks.grad.dtype == dtype


def test_blocks_equal_without_gradient_and_with_mixed_dtypes(in_blocks):
    student, teacher = pair(5, 7)
    for name in NAMES:
        with torch.no_grad():
            value = DIVERGENCES[name](student.clone().requires_grad_(), teacher)
        assert not value.requires_grad
        torch.testing.assert_close(value, divergence_terms(name, student, teacher).sum(-1))
        mixed = DIVERGENCES[name](student.bfloat16().requires_grad_(), teacher)
        torch.testing.assert_close(mixed, divergence_terms(name, student.bfloat16().float(), teacher).sum(-1))


def test_blocks_take_strided_logits_and_leave_the_inputs_alone(in_blocks):
    student, teacher = pair(2, 4, 7)
    kept = student.clone(), teacher.clone()
    student.requires_grad_()
    for name in NAMES:
        value = DIVERGENCES[name](student[:, :-1], teacher[:, :-1], temperature=2.0)
        expected = divergence_terms(name, student[:, :-1].clone(), teacher[:, :-1].clone(), temperature=2.0).sum(-1)
        torch.testing.assert_close(value, expected)
        value.sum().backward()
    assert torch.equal(student, kept[0])
    assert torch.equal(teacher, kept[1])


def test_gradient_is_right_when_backward_runs_twice(in_blocks):
    student, teacher = pair(3, 5)
    student.requires_grad_()
    loss = forward_kl(student, teacher).sum() * 2
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * once)


def test_second_derivative_of_blocks_says_what_to_use(in_blocks):
    student, teacher = pair(3, 5)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(forward_kl(student, teacher).sum(), student, create_graph=True)
    torch.testing.assert_close(gradient, torch.softmax(student, -1) - torch.softmax(teacher, -1))
    with pytest.raises(RuntimeError, match=r"differentiated twice.*Use `divergence_terms"):
        gradient.square().sum().backward()


def test_teacher_gradient_in_large_inputs(in_blocks):
    student, teacher = (z.requires_grad_() for z in pair(3, 5))
    for name in NAMES:
        gradients = torch.autograd.grad(DIVERGENCES[name](student, teacher).sum(), (student, teacher))
        twins = torch.autograd.grad(divergence_terms(name, student, teacher).sum(), (student, teacher))
        torch.testing.assert_close(gradients, twins)
        assert twins[1].abs().sum() > 0


# ---- edges ----------------------------------------------------------------------------------------------------------

A, B, BOTH = [0.0, 1.0, -INF], [0.5, -INF, 0.0], [1.0, -0.5, -INF]


@pytest.mark.parametrize(
    ("student", "teacher", "infinite"),
    [
        (A, BOTH, set()),  # the same class excluded on both sides
        (A, [0.5, 1.0, 0.0], {"forward_kl", "symmetric_kl"}),  # p > 0 = q
        ([0.5, 1.0, 0.0], A, {"reverse_kl", "symmetric_kl"}),  # q > 0 = p
        (A, B, {"forward_kl", "reverse_kl", "symmetric_kl"}),
        ([0.0, -200.0, -INF], [0.0, -INF, -200.0], set()),  # what is left of the support underflows to 0
        ([-INF, 0.0, 90.0], [0.0, -INF, 95.0], {"forward_kl", "reverse_kl", "symmetric_kl"}),  # subnormal p
        ([0.0, -INF, -INF], [0.0, -INF, -INF], set()),
    ],
)
def test_excluded_classes_give_inf_or_a_number_but_never_nan(path, student, teacher, infinite):
    for name in NAMES:
        rows = [torch.tensor([row, [0.1, 0.2, 0.3]]).requires_grad_() for row in (student, teacher)]
        value = DIVERGENCES[name](rows[0], rows[1].detach())
        assert not value.isnan().any()
        subnormal_is_zero = 90.0 in student  # float32 may flush exp(-95) either way
        if not subnormal_is_zero:
            taken = "forward_kl" if entropy(torch.tensor(teacher)) > 1 else "reverse_kl"
            assert (value[0].item() == INF) == ((taken if name == "entropy_switch" else name) in infinite)
        assert value[1].isfinite()
        value.sum().backward()
        assert rows[0].grad.isfinite().all()
        both = DIVERGENCES[name](*rows)
        torch.testing.assert_close(both, value)
        both.sum().backward()
        assert rows[1].grad.isfinite().all()


def test_excluded_classes_elsewhere():
    excluded = torch.tensor([0.0, -INF], requires_grad=True)
    even = torch.tensor([0.0, 0.0], requires_grad=True)
    assert entropy(excluded).item() == 0.0
    assert soft_cross_entropy(excluded, even).item() == INF
    assert soft_cross_entropy(even, excluded).item() == pytest.approx(math.log(2))
    (entropy(excluded) + soft_cross_entropy(even, excluded) + soft_cross_entropy(excluded, even)).backward()
    assert excluded.grad.isfinite().all()
    assert even.grad.isfinite().all()


def test_forward_kl_gradient_where_the_value_is_inf(path):
    student = torch.tensor([[0.0, -INF]], requires_grad=True)
    value = forward_kl(student, torch.tensor([[0.0, 0.0]]))
    value.backward()
    assert value.item() == INF
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.5]]))  # q - p


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_nan_in_the_logits_is_not_hidden(path, name, side):
    rows = list(pair(2, 3))
    rows[side][0, 1] = math.nan
    value = DIVERGENCES[name](rows[0].requires_grad_(), rows[1])
    assert value.isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", [name for name, entry in DIVERGENCES.items() if entry.once])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("excludes", [False, True])
def test_what_is_differentiated_once_has_the_same_values_and_gradient(name, beta, excludes):
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = (3 * torch.randn(5, 17, generator=generator, dtype=torch.float64) for _ in range(2))
    if excludes:  # by the student, by the teacher, by both
        z_s[0, :2] = z_t[0, 1:3] = z_t[1, 5] = z_s[2, 4] = -INF
    found = []
    for once in (False, True):
        student = z_s.clone().requires_grad_()
        log_p, log_q = torch.log_softmax(z_t, -1), torch.log_softmax(student, -1)
        sums = DIVERGENCES[name].evaluate(log_p, log_q, beta, once=once).sum(-1)
        (gradient,) = torch.autograd.grad((sums * torch.arange(1.0, 6.0)).sum(), student)
        found.append((sums, gradient))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-13)


def test_bounds():
    a, b = torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0])
    assert jsd(a, b).item() == pytest.approx(math.log(2))
    assert skew_forward_kl(a, b, beta=0.2).item() == pytest.approx(-math.log(0.2))
    assert skew_reverse_kl(a, b, beta=0.2).item() == pytest.approx(-math.log(0.2))
    assert total_variation(a, b).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(path, name, dtype):
    student, teacher = pair(4, 8, dtype=dtype)
    value = DIVERGENCES[name](student.clone().requires_grad_(), teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, DIVERGENCES[name](student.double(), teacher.double()).float())


def test_autocast_changes_nothing(path):
    student, teacher = pair(6, 8)
    for name in NAMES:
        one, other = student.clone().requires_grad_(), student.clone().requires_grad_()
        value = DIVERGENCES[name](one, teacher)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = DIVERGENCES[name](other, teacher)
        assert torch.equal(value, autocast)
        value.sum().backward()
        autocast.sum().backward()
        assert torch.equal(one.grad, other.grad)


def test_large_vocabulary_is_as_exact_as_torch():
    # A small divergence between wide distributions: what a naive dot of p and the logits' difference loses.
    teacher = logits(2, 151_936, seed=4, dtype=torch.float64, scale=3.0)
    student = (teacher + logits(2, 151_936, seed=5, dtype=torch.float64, scale=0.02)).float()
    teacher = teacher.float()
    assert student.numel() > formulas._SMALL
    truth = forward_kl(student.double(), teacher.double())
    found = (forward_kl(student.clone().requires_grad_(), teacher).double() - truth).abs().max()
    twin = (divergence_terms("forward_kl", student, teacher).sum(-1).double() - truth).abs().max()
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    naive = (F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).double() - truth).abs().max()
    assert 1e-4 < truth.max() < 1e-3
    assert found <= max(float(twin), float(naive), EPS)


# ---- messages -------------------------------------------------------------------------------------------------------

Z = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: forward_kl(Z, Z, beta=0.5),
            ValueError,
            r"`beta` is 0.5; expected None with divergence 'forward_kl'.*no",
        ),
        (lambda: jsd(Z, Z, beta=0.0), ValueError, r"`beta` is 0.0; expected a number in \(0, 1\)"),
        (lambda: jsd(Z, Z, beta=1), ValueError, r"`beta` is 1; expected a number in \(0, 1\)"),
        (lambda: skew_forward_kl(Z, Z, beta="x"), TypeError, "`beta` is 'x'"),
        (lambda: forward_kl(Z, Z, temperature=0.0), ValueError, "`temperature` is 0.0; expected a finite number > 0"),
        (lambda: forward_kl(Z, Z, temperature=math.inf), ValueError, "`temperature` is inf"),
        (lambda: entropy(Z, temperature=-1.0), ValueError, "`temperature` is -1.0"),
        (
            lambda: forward_kl(Z, torch.zeros(2, 1)),
            ValueError,
            r"`student_logits` is of shape \[2, 3\] and `teacher_logits` of shape \[2, 1\]; expected equal shapes",
        ),
        (lambda: soft_cross_entropy(Z, torch.zeros(3)), ValueError, r"\[2, 3\] and `teacher_logits` of shape \[3\]"),
        (lambda: forward_kl(torch.zeros(2, 0), torch.zeros(2, 0)), ValueError, "at least one class"),
        (lambda: forward_kl(torch.tensor(0.0), torch.tensor(0.0)), ValueError, "at least one class"),
        (lambda: forward_kl(Z, Z.long()), TypeError, "`teacher_logits` is of dtype torch.int64; expected logits"),
        (lambda: forward_kl([0.0], Z), TypeError, "`student_logits` is of type list; expected a tensor"),
        (
            lambda: divergence_terms("foward_kl", Z, Z),
            ValueError,
            r"`divergence` is 'foward_kl'.*Did you mean `forward_kl`",
        ),
    ],
)
def test_messages(call, error, match):
    with pytest.raises(error, match=match):
        call()
