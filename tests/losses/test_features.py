"""Feature losses against sums written out in float64, and what holds for every entry of `FEATURES`."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kd_trainer.losses import features
from kd_trainer.losses.features import FEATURES, Attention, default_relation_heads, relation

ROWS, LENGTH, RELATION_HEADS = 3, 5, 4
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()


def side(heads: int = 2, size: int = 8, seed: int = 0, *, length: int = LENGTH, **kwargs) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, heads, length, size)
    qkv = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    return Attention(*(x.requires_grad_() for x in qkv), **kwargs)


def hidden(seed: int = 0, *, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, length, 6, generator=generator, dtype=torch.float64).requires_grad_()


def key_mask(mask: torch.Tensor) -> torch.Tensor:
    return mask[:, None, None, :]


def pair(name: str, mask: torch.Tensor | None = MASK):
    """(student, teacher) for a feature; where it reads attention they differ in heads and width."""
    if FEATURES[name].reads == "hidden":
        return hidden(0), hidden(1)
    keys = None if mask is None else key_mask(mask)
    heads = 4 if name == "relation" else 2
    return side(2, 4, 0, mask=keys), side(heads, 3, 1, mask=keys)


def loss(name: str, student, teacher, mask=MASK):
    feature = FEATURES[name]
    return feature.loss(student, teacher, mask, **({"heads": RELATION_HEADS} if feature.has_heads else {}))


def tensors(one) -> list[torch.Tensor]:
    return [one] if isinstance(one, torch.Tensor) else list(one[:3])


def changed(one, change):
    """The same features with each tensor of positions changed."""
    if isinstance(one, torch.Tensor):
        return change(one, 1)
    return one._replace(**{name: change(getattr(one, name), 2) for name in ("query", "key", "value")})


each = pytest.mark.parametrize("name", FEATURES)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


def dot(x, y) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def test_relation_is_what_the_paper_writes():
    student, teacher = pair("relation")
    expected = []
    for row in range(ROWS):
        attended, total = [i for i in range(LENGTH) if MASK[row, i]], 0.0
        for kind in range(3):
            for head in range(RELATION_HEADS):
                relations = []
                for one in (teacher, student):
                    joined = torch.cat(list(one[kind][row].detach()), -1)  # [S, W], heads one after another
                    size = joined.shape[1] // RELATION_HEADS
                    x = joined[:, head * size : (head + 1) * size].tolist()
                    relations.append([[dot(x[i], x[j]) / math.sqrt(size) for j in attended] for i in attended])
                total += sum(kl(softmax(p), softmax(q)) for p, q in zip(*relations, strict=True))
        expected.append(total / 3 / RELATION_HEADS)
    torch.testing.assert_close(loss("relation", student, teacher), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("teacher_heads", [2, 3])
def test_attention_is_the_divergence_of_probabilities(teacher_heads):
    """With a float and a boolean mask, a bias, a cap, a scaling, and groups of queries that share a key."""
    bias = torch.randn(1, 4, LENGTH, LENGTH, dtype=torch.float64)
    added = torch.zeros(ROWS, 1, 1, LENGTH).double().masked_fill(~key_mask(MASK), torch.finfo(torch.float64).min)
    student = side(4, 8, 0, mask=added, bias=bias, softcap=2.0)
    student = student._replace(key=student.key[:, :2])
    teacher = side(4 if teacher_heads == 2 else 3, 6, 1, mask=key_mask(MASK), scaling=0.3)
    probs = []
    for one, size in ((student, 8**-0.5), (teacher, 0.3)):
        key = one.key.repeat_interleave(len(one.query[0]) // len(one.key[0]), 1)
        scores = torch.einsum("bhid,bhjd->bhij", one.query, key) * size
        if one is student:
            scores = 2 * torch.tanh(scores / 2) + bias
        probs.append(scores.masked_fill(~key_mask(MASK), -math.inf).softmax(-1).detach())
    if teacher_heads == 3:
        probs = [p.mean(1, keepdim=True) for p in probs]
    expected = []
    for row in range(ROWS):
        total = 0.0
        for head in range(probs[0].shape[1]):
            total += sum(
                kl(probs[1][row, head, i].tolist(), probs[0][row, head, i].tolist())
                for i in range(LENGTH)
                if MASK[row, i]
            )
        expected.append(total / probs[0].shape[1])
    torch.testing.assert_close(loss("attention", student, teacher), torch.tensor(expected, dtype=torch.float64))


def test_causal_attention_is_a_triangular_mask():
    student, teacher = side(causal=True), side(seed=1, causal=True)
    triangle = torch.ones(1, 1, LENGTH, LENGTH).bool().tril()
    masked = [one._replace(causal=False, mask=triangle) for one in (student, teacher)]
    torch.testing.assert_close(loss("attention", student, teacher), loss("attention", *masked))
    assert torch.equal(student.attended(), triangle)


def test_hidden_states_are_compared_position_by_position():
    student, teacher = pair("hidden_mse")
    mse, cosine = [], []
    for row in range(ROWS):
        at = [(student[row, i].tolist(), teacher[row, i].tolist()) for i in range(LENGTH) if MASK[row, i]]
        mse.append(sum(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / dot(t, t) for s, t in at))
        cosine.append(sum(1 - dot(s, t) / math.sqrt(dot(s, s) * dot(t, t)) for s, t in at))
    torch.testing.assert_close(loss("hidden_mse", student, teacher), torch.tensor(mse, dtype=torch.float64))
    torch.testing.assert_close(loss("hidden_cosine", student, teacher), torch.tensor(cosine, dtype=torch.float64))


@each
@pytest.mark.parametrize("masked", [True, False])
def test_gradients(name, masked):
    mask = MASK if masked else None
    student, teacher = pair(name, mask)
    leaves = tensors(student)
    if name == "attention":
        leaves = leaves[:2]

    def of(*given):
        made = given[0] if isinstance(student, torch.Tensor) else Attention(*given, *student[len(given) :])
        return loss(name, made, teacher, mask)

    assert torch.autograd.gradcheck(of, leaves)


def test_the_bias_of_a_students_attention_has_a_gradient():
    student, teacher = pair("attention")
    bias = torch.randn(1, 2, LENGTH, LENGTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: loss("attention", student._replace(bias=b), teacher), [bias])


@each
def test_a_copy_has_no_loss_and_no_gradient(name):
    student, _ = pair(name)
    value = loss(name, student, changed(student, lambda x, _: x.detach().clone()))
    gradients = torch.autograd.grad(value.sum(), tensors(student), allow_unused=True)
    assert value.abs().max() == 0
    assert max(float(g.abs().max()) for g in gradients if g is not None) < 1e-15


@each
def test_positions_that_do_not_count_change_nothing(name):
    """Twice the length, with NaN in the hidden states and the relations of the padding."""
    student, teacher = pair(name)
    mask = torch.cat([MASK, torch.zeros_like(MASK)], 1)
    fill = 7.0 if name == "attention" else math.nan

    def padded(x, dim):
        return torch.cat([x, torch.full_like(x, fill)], dim)

    longer = [changed(one, padded) for one in (student, teacher)]
    if name == "attention":
        longer = [one._replace(mask=key_mask(mask)) for one in longer]
    short, long = loss(name, student, teacher), loss(name, *longer, mask)
    torch.testing.assert_close(short, long, rtol=1e-12, atol=1e-12)
    leaves = tensors(student)
    for one, other in zip(
        *(torch.autograd.grad(x.sum(), leaves, allow_unused=True) for x in (short, long)), strict=True
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@each
def test_rows_and_blocks_are_independent(name, monkeypatch):
    student, teacher = pair(name)
    whole = loss(name, student, teacher)
    gradients = torch.autograd.grad(whole.sum(), tensors(student), allow_unused=True)
    for row in range(ROWS):
        cut = [changed(one, lambda x, _, row=row: x[row : row + 1]) for one in (student, teacher)]
        cut = [x if isinstance(x, torch.Tensor) else x._replace(mask=x.mask[row : row + 1]) for x in cut]
        torch.testing.assert_close(loss(name, *cut, MASK[row : row + 1])[0], whole[row])
    for size in (1, 2 * LENGTH**2, 9 * LENGTH**2):  # one head, some heads of a row, several rows
        monkeypatch.setattr(features, "_block_scores", lambda device, size=size: size)
        value = loss(name, student, teacher)
        torch.testing.assert_close(value, whole)
        again = torch.autograd.grad(value.sum(), tensors(student), allow_unused=True)
        for one, other in zip(gradients, again, strict=True):
            assert one is other is None or torch.allclose(one, other, rtol=1e-12, atol=1e-15)


@each
def test_a_row_without_positions_counts_zero(name):
    student, teacher = pair(name, None)
    value = loss(name, student, teacher, torch.zeros_like(MASK))
    gradients = torch.autograd.grad(value.sum(), tensors(student), allow_unused=True)
    assert torch.equal(value, torch.zeros_like(value))
    assert all(g is None or bool((g == 0).all()) for g in gradients)


@each
def test_half_precision_is_computed_in_float32(name):
    student, teacher = pair(name)
    half = [changed(one, lambda x, _: x.detach().bfloat16()) for one in (student, teacher)]
    wide = [changed(one, lambda x, _: x.float()) for one in half]
    leaf = changed(half[0], lambda x, _: x.requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(name, leaf, half[1])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(name, *wide), rtol=1e-6, atol=1e-6)
    value.sum().backward()
    assert tensors(leaf)[0].grad.dtype == torch.bfloat16


def test_relation_heads_divide_every_width():
    student, teacher = side(2, 8), side(2, 6)
    with pytest.raises(
        ValueError, match=r"`kd_relation_heads` is 8; .* because it does not divide 12\. .*divisor of 4"
    ):
        relation(student, teacher, heads=8)
    assert default_relation_heads(16, 12) == 4
    assert default_relation_heads(768) == 48
    assert default_relation_heads(7) == 7


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.gone, key, size)
        return out

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize(("name", "device"), [("relation", "cpu"), ("relation", "cuda"), ("attention", "cuda")])
def test_memory_is_that_of_blocks(name, device, monkeypatch):
    """At 16 rows of 512 positions and a width of 768 at most 300 MB: of one row the blocks, of 16 the gradients."""
    rows, length, heads, size = 1, 512, 12, 64
    x = torch.randn(rows, heads, length, size)
    student, teacher = (Attention(*(x.clone().requires_grad_() for _ in range(3))) for _ in range(2))
    mask = torch.ones(rows, length, dtype=torch.bool)
    scores = features._block_scores(torch.device(device))
    monkeypatch.setattr(features, "_block_scores", lambda device: scores)
    with LiveBytes() as live:
        value = FEATURES[name].loss(student, teacher, mask, **({"heads": 48} if name == "relation" else {}))
        value.sum().backward()
    gradients = 3 * x.nbytes
    assert live.most - gradients + 16 * gradients <= 300e6
