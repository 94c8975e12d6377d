"""`sparse_cpu.py`: the C code takes of a teacher's logits what torch takes, and leaves the unusual to torch."""

from __future__ import annotations

import logging
import platform
from contextlib import contextmanager

import pytest
import torch

from kd_trainer import cache_formats, native, sparse_cpu
from kd_trainer.sparse import draw_samples, top_k
from tests.test_visit import compiler

pytestmark = compiler


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(sparse_cpu, "PAYS_FROM", 1)


def logits(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(classes))).to(dtype)


def c_top_k(rows, k, temperature, *, bits=64, dtype=torch.float32):
    """(ids, log_probs, log_tail) and, with uint8, range; None where the C code leaves it to torch."""
    room = sparse_cpu.top_k_room(len(rows), k, bits=bits, dtype=dtype)
    done = sparse_cpu.top_k_on_cpu(rows, k, temperature, room, bits=bits)
    return [room[name] for name in ("ids", "log_probs", "log_tail", "range") if name in room] if done else None


def c_draws(rows, n, temperature, uniform, *, bits=64):
    room = sparse_cpu.draw_room(len(rows), n, bits=bits)
    done = sparse_cpu.draw_on_cpu(rows, n, temperature, uniform, room, bits=bits)
    return [room[name] for name in ("ids", "top", "entropy")] if done else None


def in_torch(monkeypatch, function, *given, **settings):
    with monkeypatch.context() as patch:
        patch.setattr(sparse_cpu, "PAYS_FROM", 10**12)
        return function(*given, **settings)


@contextmanager
def compiled_otherwise(monkeypatch, flags):
    with monkeypatch.context() as patch:
        patch.setattr(native, "_FLAGS", flags)
        native.compiled.cache_clear()
        sparse_cpu._code.cache_clear()
        try:
            yield
        finally:
            native.compiled.cache_clear()
            sparse_cpu._code.cache_clear()


SIZES = [(v, k) for v in (1, 2, 31, 33, 64, 65, 500, 1024, 9973) for k in {1, 3, 64, v - 1, v} if 0 < k <= min(v, 1024)]


@pytest.mark.parametrize(("classes", "k"), SIZES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_is_that_of_float64(classes, k, temperature, dtype):
    rows = logits(7, classes, dtype)
    found = c_top_k(rows, k, temperature)
    assert found is not None
    ids, log_probs, log_tail = found
    exact = top_k(rows.double(), k, temperature=temperature)
    assert torch.equal(rows.gather(1, ids), rows.gather(1, exact.ids))  # of equal ones any
    assert all(len(set(row)) == k for row in ids.tolist())
    torch.testing.assert_close(log_probs.double(), exact.log_probs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_tail.squeeze(1).double(), exact.log_tail, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [14.0, 60.0, 200.0])  # a tail of 1e-6, 1e-26, 1e-87
@pytest.mark.parametrize("k", [2, 5])
def test_the_tail_is_right_however_small(k, shift):
    rows = logits(7, 1000)
    rows[:, :k] += shift
    found, exact = top_k(rows, k), top_k(rows.double(), k)
    torch.testing.assert_close(found.log_tail.double(), exact.log_tail, rtol=1e-6, atol=0)


def test_equal_ones_beyond_the_last_that_is_kept_are_of_the_tail():
    rows = logits(4, 500)
    rows[:, 100:104] = 20.0
    found, exact = top_k(rows, 2), top_k(rows.double(), 2)
    torch.testing.assert_close(found.log_tail.double(), exact.log_tail, rtol=1e-6, atol=1e-6)
    rows[:, :] = rows[:, :1]
    rows[:, 7] += 1
    found, exact = top_k(rows[:, :40], 3), top_k(rows[:, :40].double(), 3)
    torch.testing.assert_close(found.log_tail.double(), exact.log_tail, rtol=1e-6, atol=1e-6)


def test_masked_ids_are_nothing_unusual():
    rows = logits(4, 5000)
    rows[:, 4000:] = torch.finfo(torch.float32).min
    found, exact = c_top_k(rows, 9, 1.0), top_k(rows.double(), 9)
    assert torch.equal(found[0], exact.ids)
    torch.testing.assert_close(found[2].squeeze(1).double(), exact.log_tail, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_masked_ids_add_nothing_to_the_entropy(temperature):
    rows, uniform = logits(4, 5000), torch.rand(4)
    rows[:, 4000:] = torch.finfo(torch.float32).min
    found = c_draws(rows, 9, temperature, uniform)
    exact = draw_samples(rows.double(), 9, temperature=temperature, uniform=uniform)
    torch.testing.assert_close(found[2].squeeze(1).double(), exact.entropy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strange", [float("inf"), float("-inf"), float("nan"), "equal"])
def test_unusual_rows_are_left_to_torch(strange, monkeypatch):
    rows = logits(4, 5000)
    if strange == "equal":
        rows[2] = 1.0
    else:
        rows[2, 77] = strange
    assert c_top_k(rows, 3, 1.0) is None
    found, other = top_k(rows, 3), in_torch(monkeypatch, top_k, rows, 3)
    torch.testing.assert_close(found.log_probs, other.log_probs, equal_nan=True)
    if strange != "equal":
        uniform = torch.rand(4, dtype=torch.float64)
        assert c_draws(rows, 3, 1.0, uniform) is None


@pytest.mark.parametrize("classes", [1, 5, 33, 1024, 9973])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_those_of_torch(classes, temperature, dtype, monkeypatch):
    rows = logits(64, classes, dtype)
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert c_draws(rows, 50, temperature, uniform) is not None
    found = draw_samples(rows, 50, temperature=temperature, uniform=uniform)
    other = in_torch(monkeypatch, draw_samples, rows, 50, temperature=temperature, uniform=uniform)
    assert (found.ids != other.ids).float().mean() < 2e-3  # a point may lie on the border of two
    assert torch.equal(rows.gather(1, found.top.unsqueeze(1)), rows.amax(1, True))
    torch.testing.assert_close(found.entropy, other.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [7, 8, 9, 10, 15, 16, 17, 18, 31, 32])
@pytest.mark.parametrize("k", [1, 8, 50, 128])
def test_ids_are_packed_as_numpy_packs_them(bits, k):
    rows, uniform = logits(33, 128), torch.rand(33, dtype=torch.float64)
    for take, further in ((c_top_k, ()), (c_draws, (uniform,))):
        plain, packed = take(rows, k, 1.0, *further), take(rows, k, 1.0, *further, bits=bits)
        expected = [cache_formats._pack(x, bits) if x.dtype == torch.int64 else x for x in plain]
        assert all(torch.equal(one, other) for one, other in zip(packed, expected, strict=True))


def test_ids_at_both_ends_of_their_bits_are_packed():
    rows = torch.zeros(2, 2**15)
    rows[0, [0, 2**15 - 1]], rows[1, [2**15 - 1, 2**14]] = torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0])
    packed = c_top_k(rows, 2, 1.0, bits=15)[0]
    ids = torch.tensor([[0, 2**15 - 1], [2**15 - 1, 2**14]])
    assert torch.equal(packed, cache_formats._pack(ids, 15))


def test_half_precision_is_that_of_torch():
    rows = torch.logspace(-9, 6, 4000).unsqueeze(1) * logits(4000, 60)
    rows[:60] = -torch.arange(60) - 65_480.0  # 65,520 is the first that half precision calls infinite
    rows[:60, 0] = 0
    rows[60:120, 1:], rows[60:120, 0] = 0, torch.linspace(5, 22, 60)  # the first one's are near 0
    plain, half = (c_top_k(rows, 50, 1.0, dtype=dtype) for dtype in (torch.float32, torch.float16))
    for one, other in zip(plain[1:], half[1:], strict=True):
        assert torch.equal(one.half(), other)
    tiny, large = (half[1] > -(2**-14)) & (half[1] < 0), half[1].isneginf()
    assert tiny.any()
    assert large.any()
    assert half[1][:60].isfinite().any()


@pytest.mark.parametrize("k", [1, 2, 8, 9, 16, 17, 40, 64])
@pytest.mark.parametrize("classes", [65, 300, 1024, 9973])
def test_many_equals_fit_into_the_room(k, classes):
    rows = (2 * logits(500, classes)).round() / 2  # up to 4 k + 64 reach the last one that is kept
    taken = [c_top_k(row.unsqueeze(0), k, 1.0) for row in rows]
    done = [i for i, one in enumerate(taken) if one is not None]
    assert len(done) > 100
    for i in done:
        ids = taken[i][0][0]
        assert torch.equal(rows[i][ids], rows[i].sort(descending=True).values[:k])
        assert len(set(ids.tolist())) == k


@pytest.mark.parametrize(("classes", "k"), [(60, 1), (60, 50), (1024, 64), (9973, 64)])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e3])
def test_8_bits_are_those_of_torch(classes, k, scale):
    rows = scale * logits(300, classes)
    plain, coded = c_top_k(rows, k, 1.0), c_top_k(rows, k, 1.0, dtype=torch.uint8)
    assert torch.equal(coded[0], plain[0])
    assert torch.equal(coded[2], plain[2].half())
    assert torch.equal(coded[3], plain[1][:, [0, -1]].half())
    assert torch.equal(coded[1], cache_formats._in_8_bits(plain[1], coded[3]))


@pytest.mark.parametrize("classes", [300, 1024, 9973])
def test_logits_that_are_close_beside_the_largest_are_put_in_order(classes):
    rows = logits(30, classes)
    rows[:20, 5] = torch.logspace(1, 5, 20)  # beside it the others differ by less than a step
    rows[20:, :90] = 9 + 1e-4 * torch.randn(10, 90, generator=torch.Generator().manual_seed(0))
    ids, _, _ = c_top_k(rows, 64, 1.0)
    exact = rows.sort(dim=-1, descending=True)
    assert torch.equal(rows.gather(1, ids), exact.values[:, :64])


@pytest.mark.parametrize("classes", [3, 33, 1024])
def test_an_id_comes_up_within_one_draw_of_its_share(classes):
    rows = logits(200, classes)
    drawn = draw_samples(rows, 50, uniform=torch.rand(200))
    counts = torch.zeros(200, classes).scatter_add_(1, drawn.ids, torch.ones(200, 50))
    assert (counts - 50 * rows.softmax(-1)).abs().max() < 1 + 1e-3


def test_what_has_no_probability_is_never_drawn():
    rows = logits(100, 100)
    rows[:, 10:] = -1e30
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert draw_samples(rows, 1000, uniform=torch.full((100,), uniform, dtype=torch.float64)).ids.max() < 10
    rows = rows.flip(1)
    for uniform in (torch.rand(100), torch.zeros(100)):
        assert draw_samples(rows, 10, uniform=uniform).ids.min() >= 90
    rows = logits(100, 64)
    rows[:, ::16] = -1e30  # all of the first column
    assert (draw_samples(rows, 10, uniform=torch.zeros(100)).ids % 16 > 0).all()
    rows = torch.zeros(100, 64)
    rows[:, :16] = -1e30  # the first of all columns: each point lies where a column begins
    assert (draw_samples(rows, 16, uniform=torch.zeros(100)).ids == torch.arange(16, 32)).all()


def test_slices_and_threads_change_nothing(monkeypatch):
    wide = logits(40, 700)
    part, uniform = wide[3:33, 50:650], torch.rand(30)
    first = (*top_k(part.contiguous(), 9), *draw_samples(part.contiguous(), 9, uniform=uniform))
    for threads in (1, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for rows in (part, part.t().contiguous().t()):
            again = (*top_k(rows, 9), *draw_samples(rows, 9, uniform=uniform))
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="no x86 processor")
@pytest.mark.parametrize("classes", [16, 300, 1024, 1031, 9973])
def test_a_processor_without_avx_512_finds_the_same(classes, monkeypatch):
    rows = logits(50, classes)
    first = c_top_k(rows, 16, 2.0)
    with compiled_otherwise(monkeypatch, (*native._FLAGS, "-mno-avx512f")):
        again = c_top_k(rows, 16, 2.0)
    assert torch.equal(first[0], again[0])
    for one, other in zip(first[1:], again[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_compiler_that_fails_is_said_once_and_done_without(monkeypatch, caplog):
    rows = logits(5, 300)
    expected = top_k(rows, 4)
    with (
        compiled_otherwise(monkeypatch, ("--no-such-option",)),
        caplog.at_level(logging.WARNING, logger="kd_trainer"),
    ):
        for _ in range(2):
            torch.testing.assert_close(top_k(rows, 4), expected)
    assert caplog.text.count("no-such-option") == 1
