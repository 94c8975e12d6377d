"""`fused_linear.py`: the fused loss against its plain twin, against float64 written out, and at its edges."""

from __future__ import annotations

import inspect
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kd_trainer.losses import MixedLogits, OutputProjection, fused_linear, overlap
from kd_trainer.losses.fused_arguments import FusedInputs
from kd_trainer.losses.fused_linear import FusedLoss, fused_linear_distillation, fused_linear_distillation_plain
from kd_trainer.losses.projection import MixedPart
from kd_trainer.losses.sparse_targets import draw_samples
from tests.helpers.written_out import OF_PROBS, OVER_BUCKETS
from tests.losses.test_tile import compiler

NAMES = OF_PROBS
BOTH = [fused_linear_distillation, fused_linear_distillation_plain]
both = pytest.mark.parametrize("function", BOTH, ids=["fused", "plain"])
each_divergence = pytest.mark.parametrize("divergence", NAMES)
each_over_buckets = pytest.mark.parametrize("divergence", OVER_BUCKETS)
LEARNED = ("student_hidden", "student_weight", "student_bias")
CURVED = {"student_scale": 0.7, "teacher_scale": 1.2, "student_softcap": 3.0, "teacher_softcap": 4.0}  # with biases


# ---- inputs, one call, and the definition written out ---------------------------------------------------------------


def problem(rows=7, classes=23, sizes=(5, 6), *, bias=False, labels=True, dtype=torch.float64, seed=0, spread=2.0):
    """Keyword arguments of the function: logits of standard deviation `spread`, every third row without a label."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    x = {
        "student_hidden": normal(rows, sizes[0]),
        "student_weight": normal(classes, sizes[0], scale=spread / sizes[0] ** 0.5),
        "teacher_hidden": normal(rows, sizes[1]),
        "teacher_weight": normal(classes, sizes[1], scale=spread / sizes[1] ** 0.5),
    }
    if labels:
        x["labels"] = torch.randint(classes, (rows,), generator=generator)
        x["labels"][::3] = -100
    if bias:
        x |= {"student_bias": normal(classes), "teacher_bias": normal(classes)}
    return x


def learn(x, names=LEARNED):
    """A copy whose student side consists of fresh leaves that learn."""
    return {k: v.detach().clone().requires_grad_() if k in names and k in x else v for k, v in x.items()}


def gradients(function, x, **options):
    """The loss and the gradients of what learns, by name."""
    x = learn(x)
    loss = function(**x, **options)
    loss.total.backward()
    return loss, {name: x[name].grad for name in LEARNED if name in x}


def error(found, expected):
    """Relative, by the Euclidean norm over all entries."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def assert_same(one, other, *, rtol):
    (loss, found), (expected_loss, expected) = one, other
    for name in ("total", "soft", "hard"):
        assert error(getattr(loss, name), getattr(expected_loss, name)) <= rtol, name
    assert loss.agreement == expected_loss.agreement
    assert found.keys() == expected.keys()
    for name in found:
        assert error(found[name], expected[name]) <= rtol, name


def softmax(z):
    powers = (z - z.max()).exp()
    return powers / powers.sum()


def kl(a, b):
    some = a > 0
    return (a[some] * (a[some] / b[some]).log()).sum()


# p the teacher's probabilities, q the student's, b the beta.
WRITTEN_OUT = {
    "forward_kl": lambda p, q, b: kl(p, q),
    "reverse_kl": lambda p, q, b: kl(q, p),
    "symmetric_kl": lambda p, q, b: kl(p, q) + kl(q, p),
    "jsd": lambda p, q, b: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q),
    "skew_forward_kl": lambda p, q, b: kl(p, b * p + (1 - b) * q),
    "skew_reverse_kl": lambda p, q, b: kl(q, b * q + (1 - b) * p),
    "total_variation": lambda p, q, b: 0.5 * (p - q).abs().sum(),
    "entropy_switch": lambda p, q, b: kl(p, q) if -(p * p.log()).nansum() > b else kl(q, p),
}
BETA = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1, "entropy_switch": 1.0}


def head(hidden, weight, bias, scale, softcap):
    z = hidden.double() @ weight.double().T
    z = scale * (z if bias is None else z + bias.double())
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def written_out(
    student_hidden, student_weight, teacher_hidden=None, teacher_weight=None, labels=None, *, alpha=0.7,
    temperature=3.0, divergence="forward_kl", beta=None, student_bias=None, teacher_bias=None, student_scale=1.0,
    teacher_scale=1.0, student_softcap=None, teacher_softcap=None, soft_mask=None, soft_count=None, hard_count=None,
    label_smoothing=0.0, common_ids=None, teacher_top_k=None, teacher_samples=None,
):  # fmt: skip
    """The whole specification in float64, row by row, sharing no code with the package."""
    z_s = head(student_hidden, student_weight, student_bias, student_scale, student_softcap)
    if teacher_hidden is not None:
        z_t = head(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    beta = BETA.get(divergence) if beta is None else beta
    soft, hard, agreement, soft_rows, hard_rows = z_s.new_zeros(()), z_s.new_zeros(()), 0, 0, 0
    for row in range(len(z_s)):
        label = -100 if labels is None else labels[row].item()
        counted = labels is None or label != -100 if soft_mask is None else bool(soft_mask[row])
        if counted:
            q = softmax(z_s[row, :common_ids] / temperature)
            if teacher_samples is not None:
                ids, top, entropy = (t[row] for t in teacher_samples)
                agreement += int(top == q.argmax())
                nats = -entropy.double() - sum(q[i].log() for i in ids.tolist()) / len(ids)
            elif teacher_top_k is None:
                p = softmax(z_t[row, :common_ids] / temperature)
                agreement += int(p.argmax() == q.argmax())
            else:
                ids, log_probs, log_tail = (t[row] for t in teacher_top_k)
                agreement += int(ids[log_probs.argmax()] == q.argmax())
                p = torch.cat([log_probs.double(), log_tail.double()[None]]).exp()
                others = torch.ones_like(q, dtype=torch.bool)
                others[ids.long()] = False
                q = torch.cat([q[ids.long()], q[others].sum()[None]])
            if teacher_samples is None:
                nats = WRITTEN_OUT[divergence](p, q, beta)
            soft = soft + temperature**2 * nats
            soft_rows += 1
        if label != -100:
            z = z_s[row] - z_s[row].max()
            log_q = z - z.exp().sum().log()
            hard = hard - (1 - label_smoothing) * log_q[label] - label_smoothing * log_q.mean()
            hard_rows += 1
    total = 0.0 * z_s.sum()
    if alpha > 0:
        total = total + alpha * soft / max(float(soft_rows if soft_count is None else soft_count), 1.0)
    if alpha < 1:
        total = total + (1 - alpha) * hard / max(float(hard_rows if hard_count is None else hard_count), 1.0)
    return FusedLoss(total, soft.detach(), hard.detach(), torch.tensor(agreement))


# ---- values and gradients -------------------------------------------------------------------------------------------


@both
@each_divergence
def test_equals_the_definition(function, divergence):
    for temperature, form in itertools.product(
        [1.0, 2.0, 2.5], ["plain", "curved", "common", "unlabelled", "positions", "smoothed"]
    ):
        x = problem(bias=form == "curved", labels=form != "unlabelled")
        options = {"divergence": divergence, "temperature": temperature}
        if form == "curved":
            options |= CURVED
        elif form == "common":
            x["teacher_weight"] = torch.cat([x["teacher_weight"], torch.ones(4, 6)]).double()
            options["common_ids"] = 19
        elif form == "positions":  # soft on some rows that have a label and on some that have none
            options["soft_mask"] = torch.tensor([True, True, False, False, True, False, True])
        elif form == "smoothed":
            options["label_smoothing"] = 0.1
        assert_same(gradients(function, x, **options), gradients(written_out, x, **options), rtol=1e-11)


@each_divergence
def test_equals_the_twin_in_float64(divergence):
    for temperature, hard, curved in itertools.product(
        [1, 2.0, 2.5, 3.0], ["hard", "no hard", "smoothed"], [False, True]
    ):
        x = problem(11, 101, bias=curved, labels=hard != "no hard")
        options = {"temperature": temperature, "divergence": divergence, "label_smoothing": 0.2 * (hard == "smoothed")}
        options |= CURVED if curved else {}
        twin = gradients(fused_linear_distillation_plain, x, **options)
        assert_same(gradients(fused_linear_distillation, x, **options, chunk_rows=4), twin, rtol=1e-10)


@both
@pytest.mark.parametrize(("divergence", "beta"), [("jsd", 0.2), ("skew_forward_kl", 0.3), ("skew_reverse_kl", 0.3)])
def test_beta(function, divergence, beta):
    options = {"divergence": divergence, "beta": beta, "temperature": 2.0}
    assert_same(gradients(function, problem(), **options), gradients(written_out, problem(), **options), rtol=1e-11)


@each_divergence
@pytest.mark.parametrize("curved", [False, True], ids=["plain head", "bias, scale, softcap"])
def test_gradcheck(divergence, curved):
    x = problem(4, 5, (2, 3), bias=True)
    names = [name for name in LEARNED if name in x]

    def total(*learned):
        options = {"divergence": divergence, "temperature": 2.0, "label_smoothing": 0.1} | (CURVED if curved else {})
        return fused_linear_distillation(**(x | dict(zip(names, learned, strict=True))), **options).total

    assert torch.autograd.gradcheck(total, [x[name].clone().requires_grad_() for name in names])


def assert_no_more_error(problems: list, dtype: torch.dtype) -> None:
    """At most 1.5 times the twin's error against float64 on the same inputs, in the root mean square over the problems
    (inputs, the same in float64, options); a value may also be wrong by four roundings of float32, since the twin's own
    errors sometimes cancel."""
    squares: dict[str, dict[str, float]] = {"fused": {}, "plain": {}}
    for x, wide, options in problems:
        exact_loss, exact = gradients(fused_linear_distillation_plain, wide, **options)
        for function, sums in zip(BOTH, squares.values(), strict=True):
            loss, found = gradients(function, x, **options)
            errors = {name: error(getattr(loss, name), getattr(exact_loss, name)) for name in ("total", "soft", "hard")}
            errors |= {name: error(found[name], exact[name]) for name in found}
            assert all(found[name].dtype == dtype for name in found)
            assert loss.soft.dtype == loss.hard.dtype == torch.float32
            for name, value in errors.items():
                sums[name] = sums.get(name, 0.0) + value**2 / len(problems)
    for name, square in squares["fused"].items():
        floor = 0.0 if name in LEARNED else 4 * torch.finfo(torch.float32).eps
        assert square**0.5 <= 1.5 * squares["plain"][name] ** 0.5 + floor, name


@each_divergence
def test_no_more_error_than_the_twin(divergence):
    for dtype, curved in itertools.product([torch.float32, torch.bfloat16, torch.float16], [False, True]):
        options = {"divergence": divergence, "temperature": 2.0} | (CURVED if curved else {})
        problems = []
        for seed in range(4):
            x = problem(40, 1009, (48, 64), bias=curved, dtype=dtype, seed=seed)
            problems.append((x, {k: v.double() if v.is_floating_point() else v for k, v in x.items()}, options))
        assert_no_more_error(problems, dtype)


@both
@each_divergence
def test_large_logits_stay_finite(function, divergence):
    x = problem(spread=300.0, dtype=torch.float32)
    expected = gradients(written_out, {k: v.double() if v.is_floating_point() else v for k, v in x.items()},
                         divergence="total_variation", alpha=0.0)  # fmt: skip
    loss, found = gradients(function, x, divergence=divergence, alpha=0.0)
    assert error(loss.total, expected[0].total) < 1e-5
    assert loss.soft.isfinite()
    assert all(gradient.isfinite().all() for gradient in found.values())


@both
@each_divergence
def test_a_class_that_both_exclude_counts_for_nothing(function, divergence):
    """A bias of -inf: 0 log 0 = 0."""
    x = problem(bias=True)
    assert not (x["labels"] == 4).any()
    without = {k: v if "hidden" in k or k == "labels" else torch.cat([v[:4], v[5:]]) for k, v in x.items()}
    without["labels"] = torch.where(x["labels"] > 4, x["labels"] - 1, x["labels"])
    x["student_bias"][4] = x["teacher_bias"][4] = -math.inf
    loss, found = gradients(function, x, divergence=divergence)
    expected_loss, expected = gradients(written_out, without, divergence=divergence)
    assert error(loss.total, expected_loss.total) < 1e-11
    assert error(found["student_hidden"], expected["student_hidden"]) < 1e-11
    assert found["student_weight"][4].abs().sum() == 0


@both
def test_a_class_that_only_the_student_excludes_is_infinite_and_not_nan(function):
    x = problem(bias=True, labels=False)
    x["student_bias"][4] = -math.inf
    loss = function(**x)
    assert loss.soft == math.inf
    assert loss.total == math.inf


def test_the_arguments_are_those_of_the_public_function():
    given = inspect.signature(fused_linear_distillation).parameters
    assert list(given) == list(inspect.signature(FusedInputs).parameters)


# ---- what is counted ------------------------------------------------------------------------------------------------


@both
@each_divergence
def test_uncounted_rows_may_hold_anything(function, divergence):
    for garbage in [math.nan, math.inf]:
        x = problem()
        counted = x["labels"] != -100
        rows = {k: v[counted] if "hidden" in k or k == "labels" else v for k, v in x.items()}
        expected_loss, expected = gradients(written_out, rows, divergence=divergence)
        for name in ("student_hidden", "teacher_hidden"):
            x[name][~counted] = garbage
        loss, found = gradients(function, x, divergence=divergence)
        assert error(loss.total, expected_loss.total) < 1e-11
        assert error(found["student_weight"], expected["student_weight"]) < 1e-11
        assert error(found["student_hidden"][counted], expected["student_hidden"]) < 1e-11
        assert torch.equal(found["student_hidden"][~counted], torch.zeros(3, 5, dtype=torch.float64))


@both
def test_the_teacher_may_hold_anything_where_only_the_hard_loss_counts(function):
    x, mask = problem(), torch.tensor([True, True, False, True, False, True, True])
    expected = gradients(written_out, x, soft_mask=mask)
    x["teacher_hidden"][~mask] = math.nan
    assert_same(gradients(function, x, soft_mask=mask), expected, rtol=1e-11)


@both
@pytest.mark.parametrize("case", ["no rows", "no rows, no labels", "no labels among them", "mask", "all NaN"])
def test_nothing_counted_is_zero_with_a_gradient_path(function, case):
    x = problem(0 if case.startswith("no rows") else 4, labels=case != "no rows, no labels")
    if "labels" in x:
        x["labels"][:] = -100
    if case == "all NaN":
        x["student_hidden"][:] = math.nan
    mask = torch.zeros(4, dtype=torch.bool) if case == "mask" else None
    loss, found = gradients(function, x, soft_mask=mask)
    assert (loss.total, loss.soft, loss.hard, loss.agreement) == (0, 0, 0, 0)
    for name, gradient in found.items():
        assert torch.equal(gradient, torch.zeros_like(x[name]))


@both
def test_parts_are_detached_sums_and_the_total_is_made_of_them(function):
    x = learn(problem(dtype=torch.bfloat16))
    loss = function(**x, alpha=0.6)
    assert all(part.shape == () and not part.requires_grad for part in loss[1:4])
    assert loss.overlap is None
    assert loss.total.shape == ()
    assert loss.total.requires_grad
    assert loss.total.item() == pytest.approx(0.6 * loss.soft.item() / 4 + 0.4 * loss.hard.item() / 4, rel=1e-6)


@both
@pytest.mark.parametrize("kind", [float, torch.tensor, lambda n: torch.tensor(float(n))])
def test_denominators(function, kind):
    x = problem()
    counts = {"soft_count": kind(20), "hard_count": kind(9)}
    assert_same(gradients(function, x, **counts), gradients(written_out, x, soft_count=20, hard_count=9), rtol=1e-11)


@both
def test_a_denominator_of_zero_counts_as_one(function):
    counts = {"soft_count": torch.tensor(0), "hard_count": 0}
    expected = gradients(written_out, problem(), soft_count=1, hard_count=1)
    assert_same(gradients(function, problem(), **counts), expected, rtol=1e-11)


@both
@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0])
def test_a_term_of_weight_zero_is_still_reported(function, alpha):
    expected = gradients(written_out, problem(), alpha=alpha)
    assert_same(gradients(function, problem(), alpha=alpha), expected, rtol=1e-11)


@both
@pytest.mark.parametrize("infinite", ["soft", "hard"])
def test_a_term_of_weight_zero_is_not_added(function, infinite):
    """It is infinite here: 0 * inf would be NaN."""
    x, alpha = problem(bias=True), float(infinite == "hard")
    x["teacher_bias"][4] = -math.inf
    if infinite == "hard":  # the label is a class that both exclude
        x["student_bias"][4] = -math.inf
        x["labels"][1] = 4
    loss, found = gradients(function, x, divergence="reverse_kl", alpha=alpha)
    assert getattr(loss, infinite) == math.inf
    assert loss.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in found.values())
    if infinite == "soft":
        expected_loss, expected = gradients(written_out, problem(bias=True), alpha=0.0)
        assert error(loss.total, expected_loss.total) < 1e-11
        assert error(found["student_weight"], expected["student_weight"]) < 1e-11


# ---- other forms of the teacher -------------------------------------------------------------------------------------


@both
@each_divergence
def test_teacher_logits(function, divergence):
    for dtype in [torch.float64, torch.float32]:
        x = problem(dtype=dtype)
        expected = gradients(function, x, divergence=divergence, temperature=2.0)
        teacher_logits = x.pop("teacher_hidden") @ x.pop("teacher_weight").T
        x |= {"teacher_hidden": None, "teacher_weight": None, "teacher_logits": teacher_logits}
        before = teacher_logits.clone()
        rtol = 1e-11 if dtype == torch.float64 else 1e-5
        assert_same(gradients(function, x, divergence=divergence, temperature=2.0), expected, rtol=rtol)
        assert torch.equal(teacher_logits, before)


def top_k(x, k, temperature, *, shift=0.0):
    """The teacher's k largest tempered log-probabilities and the log of the rest, instead of its hidden states."""
    x = dict(x)
    logits = x.pop("teacher_hidden") @ x.pop("teacher_weight").T
    logits[:, :k] += shift
    log_probs = torch.log_softmax(logits / temperature, -1)
    values, ids = log_probs.topk(k)
    rest = log_probs.scatter(1, ids, -math.inf).logsumexp(-1)
    return x | {"teacher_hidden": None, "teacher_weight": None, "teacher_top_k": (ids.int(), values, rest)}


def samples(x, n, temperature):
    """Draws instead of the teacher's hidden states, many of them repeated."""
    x = dict(x)
    logits = x.pop("teacher_hidden") @ x.pop("teacher_weight").T
    uniform = torch.linspace(0, 0.99, len(logits), dtype=torch.float64)
    ids, top, entropy = draw_samples(logits, n, temperature=temperature, uniform=uniform)
    return x | {"teacher_hidden": None, "teacher_weight": None, "teacher_samples": (ids.int(), top.int(), entropy)}


SPARSE = [*OVER_BUCKETS, "samples"]


def sparse(x, form, temperature, k=4):
    """The problem with its teacher given sparsely, and the options; `form`: a divergence of the top-k, or samples."""
    if form == "samples":
        return samples(x, 9, temperature), {"temperature": temperature}
    return top_k(x, k, temperature), {"temperature": temperature, "divergence": form}


@pytest.fixture
def fast(monkeypatch):
    """No row is left to autograd."""
    monkeypatch.setattr("kd_trainer.losses.fused_linear._plain_tile", None)


@both
@each_over_buckets
def test_top_k_is_the_divergence_over_the_classes_and_the_rest(function, divergence):
    for temperature, k in itertools.product([1.0, 2.0], [1, 4]):
        x = top_k(problem(bias=False), k, temperature)
        options = {"divergence": divergence, "temperature": temperature}
        assert_same(gradients(function, x, **options), gradients(written_out, x, **options), rtol=1e-10)


@both
@each_over_buckets
def test_top_k_of_all_classes_but_one_is_the_dense_divergence(function, divergence):
    options = {"divergence": divergence, "temperature": 2.0}
    dense = gradients(function, problem(), **options)
    assert_same(gradients(function, top_k(problem(), 22, 2.0), **options), dense, rtol=1e-9)


@both
@each_over_buckets
def test_top_k_with_hardly_anything_in_the_rest(function, divergence):
    """1 - sum of the student's other classes would be 0 here, and its logarithm infinite."""
    x = problem(labels=False) | {"student_bias": torch.zeros(23, dtype=torch.float64)}
    x["student_bias"][:4] = 90.0
    x = top_k(x, 4, 1.0, shift=100.0)
    assert x["teacher_top_k"][2].max() < -60
    options = {"divergence": divergence, "temperature": 1.0}
    loss, found = gradients(function, x, **options)
    expected_loss, expected = gradients(written_out, x, **options)
    assert error(loss.total, expected_loss.total) < 1e-9
    assert error(found["student_weight"], expected["student_weight"]) < 1e-9


@both
def test_top_k_beside_masked_rows_bias_and_softcap(function):
    x = top_k(problem(bias=True), 3, 2.0)
    x.pop("teacher_bias")
    ids, log_probs, log_tail = x["teacher_top_k"]
    options = {"temperature": 2.0, "student_softcap": 3.0, "student_scale": 0.7, "label_smoothing": 0.1}
    expected = gradients(written_out, x, **options)
    unlabelled = x["labels"] == -100
    log_probs[unlabelled], log_tail[unlabelled], ids[unlabelled] = math.nan, math.nan, -1
    assert_same(gradients(function, x, **options), expected, rtol=1e-10)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("form", SPARSE)
def test_a_sparse_teacher_equals_the_twin_and_the_definition(form):
    for temperature, hard, scaled in itertools.product([1.0, 1.5, 2.0, 2.3], ["hard", "no hard"], [False, True]):
        x, options = sparse(problem(11, 101, labels=hard == "hard"), form, temperature)
        if scaled:
            x["student_bias"] = torch.linspace(-1, 1, 101, dtype=torch.float64)
            options["student_scale"] = 0.7
        twin = gradients(fused_linear_distillation_plain, x, **options)
        found = gradients(fused_linear_distillation, x, **options, chunk_rows=2)
        assert_same(found, twin, rtol=1e-10)
        assert_same(found, gradients(written_out, x, **options), rtol=1e-10)


@both
@pytest.mark.parametrize("form", SPARSE)
def test_a_sparse_teachers_labels_kept_and_not_kept(function, form):
    x, options = sparse(problem(12, 30), form, 2.0)
    ids = x["teacher_top_k" if form != "samples" else "teacher_samples"][0].long()
    x["labels"] = torch.stack([ids[row, row % 4] if row % 2 else (ids[row].max() + 1) % 30 for row in range(12)])
    assert_same(gradients(function, x, **options), gradients(written_out, x, **options), rtol=1e-10)


@both
@pytest.mark.parametrize("form", SPARSE)
def test_a_sparse_teacher_may_say_anything_where_only_the_hard_loss_counts(function, form):
    for garbage in [math.nan, math.inf]:
        x, options = sparse(problem(), form, 2.0)
        mask = torch.tensor([True, True, False, True, False, True, True])
        expected = gradients(written_out, x, soft_mask=mask, **options)
        for part in x["teacher_top_k" if form != "samples" else "teacher_samples"]:
            part[~mask] = garbage if part.is_floating_point() else -1
        assert_same(gradients(function, x, soft_mask=mask, **options), expected, rtol=1e-10)


@both
@each_over_buckets
def test_top_k_of_all_classes(function, divergence):
    x, options = sparse(problem(), divergence, 2.0, k=23)
    assert x["teacher_top_k"][2].max() == -math.inf
    dense = gradients(function, problem(), **options)
    assert_same(gradients(function, x, **options), dense, rtol=1e-10)


@both
def test_a_rest_where_the_student_has_none_is_infinite(function):
    x, options = sparse(problem(), "forward_kl", 2.0, k=23)
    x["teacher_top_k"][2][:] = -9.0
    loss, found = gradients(function, x, **options)
    assert loss.soft == math.inf
    assert all(gradient.isfinite().all() for gradient in found.values())


@both
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int64])
@pytest.mark.parametrize("form", ["forward_kl", "samples"])
def test_ids_of_any_integer_dtype(function, dtype, form):
    x, options = sparse(problem(), form, 2.0)
    expected = gradients(function, x, **options)
    name = "teacher_top_k" if form != "samples" else "teacher_samples"
    x[name] = tuple(part if part.is_floating_point() else part.to(dtype) for part in x[name])
    assert_same(gradients(function, x, **options), expected, rtol=1e-12)


@pytest.mark.parametrize("form", ["reverse_kl", "samples"])
def test_so_many_ids_that_autograd_takes_no_longer(monkeypatch, form):
    x, options = sparse(problem(), form, 2.0)
    expected, tiles = gradients(fused_linear_distillation, x, **options), []
    plain = fused_linear._plain_tile
    monkeypatch.setattr(fused_linear, "_plain_tile", lambda *given: tiles.append(1) or plain(*given))
    monkeypatch.setattr("kd_trainer.losses.fused_arguments.MOST_IDS", 3)
    assert_same(gradients(fused_linear_distillation, x, **options), expected, rtol=1e-10)
    assert tiles


@pytest.mark.parametrize("form", SPARSE)
def test_gradcheck_of_a_sparse_teacher(form):
    x, options = sparse(problem(4, 9, (2, 3)) | {"student_bias": torch.zeros(9).double()}, form, 2.0, k=3)

    def total(*learned):
        return fused_linear_distillation(**(x | dict(zip(LEARNED, learned, strict=True))), **options).total

    assert torch.autograd.gradcheck(total, [x[name].clone().requires_grad_() for name in LEARNED])


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", SPARSE)
def test_a_sparse_teacher_makes_no_more_error_than_the_twin(dtype, form):
    """As `test_no_more_error_than_the_twin`."""
    problems = []
    for seed in range(4):
        x, options = sparse(problem(40, 1009, (48, 64), seed=seed), form, 2.0, k=12)
        x = {k: v.to(dtype) if k.startswith("student") else v for k, v in x.items()}
        problems.append((x, {k: v.double() if k.startswith("student") else v for k, v in x.items()}, options))
    assert_no_more_error(problems, dtype)


@each_over_buckets
def test_a_small_rest_keeps_its_digits_in_float32(divergence):
    """The student leaves 1e-8 to it, less than the last digit of the sum of all."""
    x = problem(labels=False, dtype=torch.float32) | {"student_bias": torch.zeros(23)}
    x["student_bias"][:4] = 22.0
    x = top_k(x, 4, 1.0, shift=22.0)
    wide = {k: v.double() if k.startswith("student") else v for k, v in x.items()}
    loss, found = gradients(fused_linear_distillation, x, divergence=divergence, temperature=1.0)
    exact, expected = gradients(written_out, wide, divergence=divergence, temperature=1.0)
    room = 22 * torch.finfo(torch.float32).eps  # a rounding of such logits
    assert error(loss.soft, exact.soft) <= room
    for name in found:
        rest = (slice(4, None),) if name != "student_hidden" else ()
        assert error(found[name][rest], expected[name][rest]) <= room


@pytest.mark.parametrize("form", SPARSE)
def test_blocks_change_nothing_of_a_sparse_teacher(monkeypatch, form):
    for dtype in [torch.float64, torch.bfloat16]:
        x, options = sparse(problem(17, 101), form, 2.3)
        x = {k: v.to(dtype) if k.startswith("student") else v for k, v in x.items()}
        whole = gradients(fused_linear_distillation, x, **options)
        monkeypatch.setattr(
            "kd_trainer.losses.tile._BLOCK_BYTES", 4 * 101 * 4 // torch.get_num_threads()
        )  # 4 of 11 rows
        found = gradients(fused_linear_distillation, x, **options)
        assert_same(found, whole, rtol=1e-12 if dtype == torch.float64 else 1e-2)


@pytest.mark.parametrize("form", SPARSE)
def test_a_sparse_teacher_without_gradient_and_in_evaluation(form):
    x, options = sparse(problem(), form, 2.0)
    expected = fused_linear_distillation(**learn(x), **options)
    with torch.no_grad():
        loss = fused_linear_distillation(**learn(x), **options)
    assert not loss.total.requires_grad
    assert torch.allclose(torch.stack(loss[:3]), torch.stack([part.detach() for part in expected[:3]]), rtol=1e-12)


@both
def test_samples_beside_softcap_smoothing_and_common_ids(function):
    x, options = sparse(problem(), "samples", 2.0)
    x["teacher_samples"][0].clamp_(max=18)
    x["teacher_samples"][1].clamp_(max=18)
    options |= {"student_softcap": 3.0, "student_scale": 0.7, "label_smoothing": 0.1, "common_ids": 19}
    assert_same(gradients(function, x, **options), gradients(written_out, x, **options), rtol=1e-10)


# ---- layouts, graphs, precision contexts ----------------------------------------------------------------------------


@each_divergence
def test_the_chunk_size_changes_nothing(divergence):
    for chunk_rows in [1, 3, 7, 100]:
        options = {"divergence": divergence, "temperature": 2.0}
        expected = gradients(fused_linear_distillation, problem(), **options)
        found = gradients(fused_linear_distillation, problem(), **options, chunk_rows=chunk_rows)
        assert_same(found, expected, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.bfloat16, 2e-2)])
def test_a_head_wide_enough_to_lend_its_gradients_memory(dtype, rtol):
    for learned, chunk_rows in itertools.product(
        [LEARNED, ("student_hidden",), ("student_weight",)], [1, 5, 13, 20, 100]
    ):
        x = problem(60, 101, (48, 16), dtype=dtype)  # 40 of 60 rows count
        wide = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
        expected_loss, expected = gradients(fused_linear_distillation_plain, wide, temperature=2.0)
        for _ in range(2):  # in fresh memory, then in kept memory
            x = learn(x, learned)
            loss = fused_linear_distillation(**x, temperature=2.0, chunk_rows=chunk_rows)
            loss.total.backward()
            found = {name: x[name].grad for name in LEARNED if name in learned and name in x}
            assert_same((loss, found), (expected_loss, {name: expected[name] for name in found}), rtol=rtol)
            del loss, found


@each_divergence
def test_blocks_change_nothing(monkeypatch, divergence):
    for temperature, dtype in itertools.product([1.0, 1.5, 2.0, 2.3], [torch.float64, torch.bfloat16]):
        options = {"divergence": divergence, "temperature": temperature}
        problems = [problem(17, 101, dtype=dtype), problem(11, 101, dtype=dtype, labels=False)]
        whole = [gradients(fused_linear_distillation, x, **options) for x in problems]
        monkeypatch.setattr(
            "kd_trainer.losses.tile._BLOCK_BYTES", 4 * 101 * 4 // torch.get_num_threads()
        )  # 4 of 11 rows
        for x, expected in zip(problems, whole, strict=True):
            found = gradients(fused_linear_distillation, x, **options)
            assert_same(found, expected, rtol=1e-12 if dtype == torch.float64 else 1e-2)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_that_are_not_contiguous(function, dtype):
    x = problem(dtype=dtype, bias=True)
    expected = gradients(function, x)
    wide = {k: torch.stack([v, torch.full_like(v, -1)], -1) if v.dim() else v for k, v in x.items()}
    leaves = {name: wide[name].requires_grad_() for name in LEARNED}
    views = {k: v[..., 0] for k, v in wide.items()}
    views["student_weight"] = views["student_weight"].T.contiguous().T
    assert not any(v.is_contiguous() for v in views.values())
    loss = function(**views)
    loss.total.backward()
    found = {name: leaf.grad[..., 0] for name, leaf in leaves.items()}
    assert_same((loss, found), expected, rtol=1e-12 if dtype == torch.float64 else 1e-2)


@both
def test_inputs_are_left_as_they_are(function):
    x = problem(bias=True)
    before = {k: v.clone() for k, v in x.items()}
    gradients(function, x, **CURVED)
    assert all(torch.equal(x[k], before[k]) for k in x)


def test_a_head_tied_to_the_embedding():
    ids = torch.tensor([1, 5, 5, 22, 0, 3, 7])
    found = []
    for function in BOTH:
        x = problem()
        embedding = nn.Embedding.from_pretrained(x.pop("student_weight"), freeze=False)
        x["student_hidden"] = torch.tanh(embedding(ids))
        function(**x, student_weight=embedding.weight, chunk_rows=2).total.backward()
        found.append(embedding.weight.grad)
    assert error(*found) < 1e-12


def test_one_weight_in_two_losses_of_one_graph():
    found = []
    for function in BOTH:
        one, other = learn(problem(seed=1)), learn(problem(seed=2))
        other["student_weight"] = one["student_weight"]
        (function(**one).total + 3 * function(**other, divergence="jsd").total).backward()
        found.append(torch.cat([one["student_weight"].grad, one["student_hidden"].grad, other["student_hidden"].grad]))
    assert error(*found) < 1e-12


def products(x, function=fused_linear_distillation, **options):
    """Matrix products [N, V, 64] that forward and backward cost, by the count of their multiplications."""
    with FlopCounterMode(display=False) as counter:
        loss = function(**x, **options)
        if loss.total.requires_grad:
            loss.total.backward()
    return counter.get_total_flops() / (2 * 64 * 60 * 101)


@pytest.mark.parametrize(
    ("learned", "expected"),
    [(LEARNED, 4), (("student_hidden",), 3), (("student_weight",), 3), (("student_bias",), 2), ((), 2)],
)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_what_is_frozen_gets_no_gradient_and_costs_nothing(learned, expected, divergence):
    x = problem(60, 101, (64, 64), bias=True, labels=False, dtype=torch.float32)
    everything = gradients(fused_linear_distillation, x, divergence=divergence)
    x = learn(x, learned)
    assert expected <= products(x, divergence=divergence) < expected + 0.4  # the rest are sums over rows
    for name in LEARNED:
        if name in learned:
            assert error(x[name].grad, everything[1][name]) < 1e-6
        else:
            assert x[name].grad is None


def test_only_counted_rows_are_multiplied():
    x = problem(60, 101, (64, 64), dtype=torch.float32)
    x["labels"][:30] = -100
    x["labels"][30:] = 1
    assert 2 <= products(learn(x), alpha=1.0) < 2.3


@pytest.mark.parametrize(("learned", "expected"), [(LEARNED, 3), (("student_hidden",), 2), ((), 1)])
@pytest.mark.parametrize("form", ["reverse_kl", "samples"])
def test_a_sparse_teacher_costs_no_product(learned, expected, form):
    x, options = sparse(problem(60, 101, (64, 64), labels=False, dtype=torch.float32), form, 2.0)
    assert expected <= products(learn(x, learned), **options) < expected + 0.4


@each_divergence
def test_without_gradient(divergence):
    x = learn(problem())
    expected = fused_linear_distillation(**x, divergence=divergence)
    with torch.no_grad():
        loss = fused_linear_distillation(**x, divergence=divergence)
    assert not loss.total.requires_grad
    assert torch.allclose(torch.stack(loss[:3]), torch.stack([part.detach() for part in expected[:3]]), rtol=1e-12)
    assert loss.agreement == expected.agreement
    with torch.no_grad():
        x = problem(60, 101, (64, 64), dtype=torch.float32, labels=False)
        assert 2 <= products(learn(x), divergence=divergence) < 2.4


class LargestTensor(TorchDispatchMode):
    """The most bytes of a tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor):
                self.bytes = max(self.bytes, one.numel() * one.element_size())
        return result


@pytest.mark.parametrize(
    ("form", "divergence"),
    [("hidden", name) for name in NAMES] + [(form, n) for form in ("top k", "top k, plain") for n in OVER_BUCKETS],
)
def test_the_logits_never_exist(monkeypatch, divergence, form):
    rows, classes = 64, 101
    monkeypatch.setattr("kd_trainer.losses.tile._BLOCK_BYTES", 1)  # of rows as short as these it would hold all
    x = problem(rows, classes, (8, 8))
    x = learn(x if form == "hidden" else top_k(x, 4, 2.0))
    with LargestTensor() as largest:
        options = {"divergence": divergence, "temperature": 2.0, "label_smoothing": 0.1 * (form != "top k")}
        fused_linear_distillation(**x, **options, chunk_rows=8).total.backward()
    assert largest.bytes <= 8 * max(2 * 8 * classes, rows * 8) + 64  # float64, from the beginning of a cache line
    with LargestTensor() as largest:
        fused_linear_distillation_plain(**x, **options)
    assert largest.bytes >= 8 * 40 * classes


def test_kept_memory_is_never_that_of_a_gradient_in_use():
    kept, addresses = [], set()
    for seed in range(4):
        x = learn(problem(seed=seed))
        expected = gradients(fused_linear_distillation_plain, x)[1]["student_weight"]
        fused_linear_distillation(**x).total.backward()
        weight = x["student_weight"]
        held = [weight.grad, weight.grad[1:].view(-1), weight.grad.detach()][seed % 3]  # or a view of it
        kept.append((held, held.clone()))
        addresses.add(weight.grad.untyped_storage().data_ptr())
        torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-12)
        weight.grad = None
        for one, copy in kept:
            assert torch.equal(one, copy)
    assert len(addresses) == 4
    kept.clear()
    del held, one, copy
    for _ in range(3):  # nobody holds it: the same memory again
        fused_linear_distillation(**x).total.backward()
        addresses.add(x["student_weight"].grad.untyped_storage().data_ptr())
        x["student_weight"].grad = None
    assert len(addresses) <= 5


def test_threads_do_not_share_memory():
    problems = [learn(problem(64, 2001, seed=seed)) for seed in range(4)]
    expected = [gradients(fused_linear_distillation_plain, x)[1]["student_weight"] for x in problems]

    def repeatedly(x):
        for _ in range(20):
            x["student_weight"].grad = None
            fused_linear_distillation(**x, chunk_rows=16).total.backward()
        return x["student_weight"].grad

    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(repeatedly, problems), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@both
@pytest.mark.parametrize("scale", [2.0**16, 0.0])
def test_the_incoming_gradient_scales_all(function, scale):
    expected = gradients(function, problem(bias=True))[1]
    x = learn(problem(bias=True))
    (scale * function(**x).total).backward()
    for name in LEARNED:
        assert torch.allclose(x[name].grad, scale * expected[name], rtol=1e-12)


@both
def test_backward_twice_over_a_kept_graph(function):
    expected = gradients(function, problem(bias=True))[1]
    x = learn(problem(bias=True))
    total = function(**x).total
    (5 * total).backward(retain_graph=True)
    total.backward()
    for name in LEARNED:
        assert error(x[name].grad, 6 * expected[name]) < 1e-12


def test_a_second_derivative_is_refused():
    x = learn(problem())
    (gradient,) = torch.autograd.grad(fused_linear_distillation(**x).total, x["student_hidden"], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_autocast(divergence):
    x = problem(40, 1009, (48, 64), bias=True, dtype=torch.float32)
    options = {"divergence": divergence, "temperature": 2.0}
    exact_loss, exact = gradients(fused_linear_distillation_plain, x, **options)
    errors = []
    for function in BOTH:
        learned = learn(x)
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(**learned, **options)
        loss.total.backward()
        assert loss.total.dtype == loss.soft.dtype == torch.float32
        assert all(learned[name].grad.dtype == torch.float32 for name in LEARNED)
        errors.append([error(learned[name].grad, exact[name]) for name in LEARNED])
        assert 1e-6 < error(loss.soft, exact_loss.soft) < 1e-2  # bfloat16 products, but a float32 softmax
    for fused, plain in zip(*errors, strict=True):
        assert 1e-4 < fused <= 1.5 * plain


@compiler
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_compiled_equals_eager(divergence):
    for rows in (40, 33):  # other numbers of rows, of the last chunk too
        x = problem(rows, 101, dtype=torch.float32)
        options = {"divergence": divergence, "temperature": 2.0, "label_smoothing": 0.1, "chunk_rows": 16}
        eager = gradients(fused_linear_distillation, x, **options, compiled=False)
        assert_same(gradients(fused_linear_distillation, x, **options, compiled=True), eager, rtol=2e-6)


@compiler
@pytest.mark.parametrize("form", ["reverse_kl", "jsd", "samples"])
@pytest.mark.parametrize("temperature", [2.0, 2.3])
def test_compiled_equals_eager_with_a_sparse_teacher(form, temperature):
    for rows in (40, 33):
        x, options = sparse(problem(rows, 101, dtype=torch.float32), form, temperature)
        eager = gradients(fused_linear_distillation, x, **options, chunk_rows=8, compiled=False)
        found = gradients(fused_linear_distillation, x, **options, chunk_rows=8, compiled=True)
        assert_same(found, eager, rtol=2e-6)


# ---- messages -------------------------------------------------------------------------------------------------------

WRONG = {
    "temperature": ("temperature", {"temperature": 0.0}),
    "alpha": ("alpha", {"alpha": 1.5}),
    "divergence": ("divergence", {"divergence": "forward_lk"}),
    "beta": ("beta", {"beta": 0.5}),
    "label_smoothing": ("label_smoothing", {"label_smoothing": 1.5}),
    "student_softcap": ("student_softcap", {"student_softcap": 0.0}),
    "teacher_softcap": ("teacher_softcap", {"teacher_softcap": -1.0}),
    "student_scale": ("student_scale", {"student_scale": math.nan}),
    "teacher_scale": ("teacher_scale", {"teacher_scale": math.inf}),
    "chunk_rows": ("chunk_rows", {"chunk_rows": 0}),
    "hidden of three dimensions": ("student_hidden", {"student_hidden": torch.zeros(1, 7, 5)}),
    "hidden of integers": ("student_hidden", {"student_hidden": torch.zeros(7, 5, dtype=torch.int64)}),
    "hidden and weight": ("student_weight|student_hidden", {"student_weight": torch.zeros(23, 4)}),
    "teacher's hidden and weight": ("teacher_weight|teacher_hidden", {"teacher_weight": torch.zeros(23, 4)}),
    "rows of the teacher": ("teacher_hidden", {"teacher_hidden": torch.zeros(6, 6, dtype=torch.float64)}),
    "other vocabulary": ("(student|teacher)_weight|common_ids", {"teacher_weight": torch.zeros(25, 6).double()}),
    "common_ids too large": ("common_ids", {"common_ids": 24}),
    "common_ids of nothing": ("common_ids", {"common_ids": 0}),
    "no teacher": ("teacher_hidden|teacher", {"teacher_hidden": None, "teacher_weight": None}),
    "half a teacher": ("teacher_weight|teacher_hidden", {"teacher_weight": None}),
    "two teachers": ("teacher_logits|teacher_hidden", {"teacher_logits": torch.zeros(7, 23).double()}),
    "labels of another length": ("labels", {"labels": torch.zeros(6, dtype=torch.int64)}),
    "labels that are numbers": ("labels", {"labels": torch.zeros(7)}),
    "label too large": ("labels", {"labels": torch.full((7,), 23)}),
    "label below zero": ("labels", {"labels": torch.full((7,), -1)}),
    "mask of another length": ("soft_mask", {"soft_mask": torch.ones(6, dtype=torch.bool)}),
    "bias of another length": ("student_bias", {"student_bias": torch.zeros(22).double()}),
    "teacher's bias": ("teacher_bias", {"teacher_bias": torch.zeros(22).double()}),
}
NO_HEAD = {"teacher_hidden": None, "teacher_weight": None}
IDS, LOG_PROBS, LOG_TAIL = torch.zeros(7, 2, dtype=torch.int64), torch.zeros(7, 2).double(), torch.zeros(7).double()
WRONG |= {
    "teacher_logits": ("teacher_logits", NO_HEAD | {"teacher_logits": torch.zeros(7, 22).double()}),
    "top k": ("teacher_top_k", NO_HEAD | {"teacher_top_k": (IDS, LOG_PROBS[:, :1], LOG_TAIL)}),
    "top k, rows": ("teacher_top_k", NO_HEAD | {"teacher_top_k": (IDS, LOG_PROBS, LOG_TAIL[:3])}),
    "top k, ids": ("teacher_top_k", NO_HEAD | {"teacher_top_k": (IDS + 23, LOG_PROBS, LOG_TAIL)}),
    "top k, two parts": ("teacher_top_k", NO_HEAD | {"teacher_top_k": (IDS, LOG_PROBS)}),
    "top k, more than V": (
        "teacher_top_k",
        NO_HEAD | {"teacher_top_k": (IDS[:, :1].expand(7, 24), LOG_PROBS[:, :1].expand(7, 24), LOG_TAIL)},
    ),
    "top k, ids of floats": ("teacher_top_k", NO_HEAD | {"teacher_top_k": (LOG_PROBS, LOG_PROBS, LOG_TAIL)}),
    "samples, ids": ("teacher_samples", NO_HEAD | {"teacher_samples": (IDS - 1, IDS[:, 0], LOG_TAIL)}),
    "samples, tops": ("teacher_samples", NO_HEAD | {"teacher_samples": (IDS, IDS[:, 0] + 23, LOG_TAIL)}),
    "samples, rows": ("teacher_samples", NO_HEAD | {"teacher_samples": (IDS, IDS[:, 0], LOG_TAIL[:3])}),
    "samples, rows of tops": ("teacher_samples", NO_HEAD | {"teacher_samples": (IDS, IDS, LOG_TAIL)}),
    "samples, none": ("teacher_samples", NO_HEAD | {"teacher_samples": (IDS[:, :0], IDS[:, 0], LOG_TAIL)}),
    "samples beside a head": ("teacher_hidden", {"teacher_samples": (IDS, IDS[:, 0], LOG_TAIL)}),
}


@both
@each_divergence
def test_samples_are_for_the_forward_kl_alone(function, divergence):
    x, options = samples(problem(), 5, 3.0), {"divergence": divergence}
    if divergence == "forward_kl":
        assert function(**x, **options).total.isfinite()
        return
    with pytest.raises(ValueError, match=r"^`divergence` is .* unbiased only where the loss is linear in the teacher"):
        function(**x, **options)


@both
def test_bad_inputs_are_named(function):
    for wrong in WRONG:
        argument, options = WRONG[wrong]
        with pytest.raises((ValueError, TypeError), match=rf"^`({argument})[^`]*` is [\s\S]*; expected ") as caught:
            function(**(problem() | options))
        assert str(caught.value).endswith((".", "?"))


# ---- overlap --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("options", [{}, {"soft_mask": True}, CURVED, {"common_ids": 25}, {"logits": True},
                                     {"mixed": True}, {"compiled": False}], ids=str)  # fmt: skip
def test_overlap_is_the_mean_of_whole_logits(function, options):
    """Summed over the counted positions, whatever the tiles, at the temperature of the teacher's own distribution."""
    options = dict(options)
    x = problem(9, 33, bias=options == CURVED)
    z_t = head(x["teacher_hidden"], x["teacher_weight"], x.get("teacher_bias"), options.get("teacher_scale", 1.0),
               options.get("teacher_softcap"))  # fmt: skip
    z_s = head(x["student_hidden"], x["student_weight"], x.get("student_bias"), options.get("student_scale", 1.0),
               options.get("student_softcap"))  # fmt: skip
    counted = x["labels"] != -100
    if options.pop("soft_mask", False):
        options["soft_mask"] = counted = torch.arange(9) % 2 == 0
    at = 1.5 if options.get("mixed") else 1.0
    if options.pop("logits", False):
        x |= {"teacher_logits": z_t, "teacher_hidden": None, "teacher_weight": None}
    if options.pop("mixed", False):
        side = OutputProjection(x["teacher_weight"], None, 1.0, None)
        parts = tuple(MixedPart(x["teacher_hidden"], side, weight) for weight in (0.25, 0.75))
        x |= {"teacher_logits": MixedLogits(parts, 1.5)}
        x |= {"teacher_hidden": None, "teacher_weight": None}
    ids = options.get("common_ids")
    expected = overlap(z_s[:, :ids], z_t[:, :ids], ids=6, temperature=at)[counted].sum()
    for rows in (2, 9):
        given = {"temperature": 1.5, "overlap_ids": 6, "overlap_temperature": at, "chunk_rows": rows}
        loss = function(**learn(x), **given, **options)
        assert error(loss.overlap, expected) <= 1e-9
        loss.total.backward()
    assert function(**x).overlap is None
    x["labels"] = torch.full((9,), -100)
    assert function(**x, overlap_ids=6).overlap == 0


@both
def test_marked_positions_have_an_agreement_of_their_own(function):
    x = problem(60, 3)
    marked = torch.arange(60) % 2 == 0
    apart = x | {name: x[name][marked] for name in ("student_hidden", "teacher_hidden", "labels")}
    assert 0 < function(**apart).agreement < function(**x).agreement
    for more in ({}, {"label_smoothing": 0.1}, {"overlap_ids": 2}):
        loss = function(**x, marked=marked, chunk_rows=2, **more)
        assert loss.marked == function(**apart).agreement
        assert loss.agreement == function(**x).agreement
        assert (loss.overlap is None) is ("overlap_ids" not in more)
    assert function(**x).marked is None


@both
def test_overlap_needs_all_classes_of_the_teacher(function):
    x = top_k(problem(), 4, 1.0)
    with pytest.raises(ValueError, match="`overlap_ids` is 20; expected None with teacher_top_k, because few ids"):
        function(**x, overlap_ids=20)
