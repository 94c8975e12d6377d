"""A tile's loss in two ways: compiled and in blocks of rows they are one; kernels of a temperature schedule."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from kd_trainer.kernels import C_DIVERGENCES, c_compiler
from kd_trainer.losses.tile import compile_pays, tile_loss
from kd_trainer.losses.tile_types import Setting

KLS = ("forward_kl", "reverse_kl", "symmetric_kl")
MIXED = 2e-5  # the gradient of a divergence to a mixture is a difference of which little may remain
compiler = pytest.mark.skipif(c_compiler._compiler() is None, reason="no C compiler (cc, gcc, clang)")


def tile(rows: int = 7, classes: int = 301, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, rows, classes, generator=generator)).to(dtype)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[2] = -100
    weights = torch.rand(rows, 2, generator=generator)
    weights[2, 1] = 0
    return {"student": student, "teacher": teacher, "labels": labels, "weights": weights}


def assert_one(results: list, dtype: torch.dtype, room: float = 1e-6) -> None:
    """The results of two ways on a tile of this dtype."""
    room = room if dtype == torch.float32 else 1e-2  # one rounding of bfloat16 may fall to the other side
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=room, atol=room * float(one.abs().max()))


def results_of(setting: Setting, given: dict, gradient: bool = True, **ways: bool) -> tuple[torch.Tensor, ...]:
    given = {name: x.clone() for name, x in given.items()} | ({} if setting.hard else {"labels": None})
    rows = tile_loss(setting, **given, gradient=gradient, **ways)
    student = given["student"].float()
    return (student if gradient else torch.zeros(1), rows.soft.float(), rows.hard.float(), rows.same.float())


# One of each form of the C code; the others are compiled by CI.
QUICK = ("forward_kl", "jsd", "skew_reverse_kl")


@compiler
@pytest.mark.parametrize(
    "divergence", [pytest.param(d, marks=[] if d in QUICK else pytest.mark.trains) for d in C_DIVERGENCES]
)
def test_compiled_is_eager(divergence):
    # Each temperature is compiled: 1, powers of two on either side, and one whose inverse is rounded.
    # Both dtypes run through the same loops.
    for dtype, temperature in [*((torch.float32, t) for t in (0.5, 1.0, 2.3)), (torch.bfloat16, 2.0)]:
        room = 1e-6 if divergence in KLS else MIXED
        for hard, gradient, classes in ((True, True, 301), (False, True, 4099), (True, False, 5)):
            given = tile(classes=classes, dtype=dtype)
            setting = Setting(divergence, 0.3, temperature, hard)
            assert_one([results_of(setting, given, gradient, compiled=way) for way in (False, True)], dtype, room)


@compiler
@pytest.mark.parametrize("divergence", C_DIVERGENCES)
def test_compiled_is_as_close_to_float64_as_blocks_are(divergence):
    given, setting = tile(4, 151_936), Setting(divergence, 0.3, 2.0, True)
    exact = results_of(
        setting, {n: x.double() if x.is_floating_point() else x for n, x in given.items()}, compiled=False
    )
    errors = []
    for way in (False, True):
        found = results_of(setting, given, compiled=way)
        errors.append([float((a - b).abs().max() / b.abs().max()) for a, b in zip(found[:3], exact[:3], strict=True)])
    for blocks, compiled in zip(*errors, strict=True):
        assert compiled < max(2 * blocks, 1e-6)


@compiler
def test_compiled_reads_slices_and_mixed_types():
    wide, setting = tile(8, 77), Setting("symmetric_kl", 0.5, 2.0, True)
    wide["student"] = wide["student"].bfloat16()
    part = {name: x[1:, 3:70] if x.ndim == 2 and x.shape[1] > 2 else x[1:] for name, x in wide.items()}
    part["teacher"] = part["teacher"].t().contiguous().t()
    part["labels"] = part["labels"].clamp(max=66)
    rest = wide["student"].clone()
    rows = tile_loss(setting, **part, gradient=True, compiled=True)
    rest[1:, 3:70] = part["student"]
    assert torch.equal(rest, wide["student"])  # nothing beside the slice was written
    other = {name: x.clone(memory_format=torch.contiguous_format) for name, x in part.items()}
    other["student"] = tile(8, 77)["student"].bfloat16()[1:, 3:70].clone()
    assert_one([(tile_loss(setting, **other, gradient=True, compiled=False).soft, other["student"].float()),
                (rows.soft.float(), part["student"].float())], torch.bfloat16)  # fmt: skip


@compiler
@pytest.mark.parametrize(
    ("divergence", "dtype"), [*((name, torch.float32) for name in C_DIVERGENCES), ("jsd", torch.bfloat16)]
)
def test_a_kernel_hides_no_nan(divergence, dtype):
    for name in ("student", "teacher"):
        given = tile(dtype=dtype)
        given[name][3, 200] = float("nan")
        student, soft, _, _ = results_of(Setting(divergence, 0.3, 2.0, True), given, compiled=True)
        assert soft.isnan().tolist() == [i == 3 for i in range(7)]
        assert student[3].isnan().any()
        assert not student[[0, 1, 2, 4, 5, 6]].isnan().any()


@compiler
@pytest.mark.parametrize("divergence", C_DIVERGENCES)
def test_far_apart_logits_stay_finite_when_compiled(divergence):
    given, setting = tile(), Setting(divergence, 0.3, 2.0, True)
    given["student"][:, ::7] -= 3000
    given["teacher"][:, ::3] -= 9000
    assert_one([results_of(setting, given, compiled=way) for way in (False, True)], torch.float32, MIXED)


@compiler
@pytest.mark.parametrize("sides", ["teacher", "both"])
@pytest.mark.parametrize("divergence", [name for name in C_DIVERGENCES if name not in ("reverse_kl", "symmetric_kl")])
def test_masked_ids_add_nothing_when_compiled(divergence, sides):
    """As models mask them, with the least number: 0 times that is 0, and 1e-38 times that is 4."""
    given = tile(classes=3000)
    for name in ("teacher", "student")[: 1 + (sides == "both")]:
        given[name][:, 2000:] = torch.finfo(torch.float32).min
    setting = Setting(divergence, 0.3, 2.0, True)
    room = 1e-6 if divergence in KLS else MIXED
    assert_one([results_of(setting, given, compiled=way)[:3] for way in (False, True)], torch.float32, room)


@compiler
def test_temperatures_of_a_schedule_share_one_code():
    c_compiler.compiled.cache_clear()
    for i in range(1, 30):
        for hard in (True, False):
            results_of(Setting("jsd", i / 31, 1 + i / 31, hard), tile(), compiled=True)
    assert c_compiler.compiled.cache_info().currsize == 2


@compiler
def test_threads_share_the_rows(monkeypatch):
    setting, threads = Setting("jsd", 0.3, 2.0, True), torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append(results_of(setting, tile(), compiled=True))
    monkeypatch.undo()
    assert torch.get_num_threads() == threads
    for result in results:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@compiler
def test_every_divergence_passes_the_check_before_its_first_kernel():
    for divergence in C_DIVERGENCES:
        assert compile_pays(Setting(divergence, 0.3, 2.0, True), 7, 301, torch.empty(1), True), divergence


@compiler
def test_a_compiler_that_fails_or_errs_is_not_used(monkeypatch, caplog, tmp_path):
    setting, like = Setting("forward_kl", 0.5, 2.0, True), torch.empty(1)
    with caplog.at_level(logging.WARNING, logger="kd_trainer"):
        monkeypatch.setattr(c_compiler, "_FLAGS", ("--no-such-option",))
        c_compiler.compiled.cache_clear()
        assert not compile_pays(setting, 7, 307, like, True)
        assert "no-such-option" in caplog.text
        monkeypatch.undo()
        monkeypatch.setattr("kd_trainer.losses.tile.tile_on_cpu", lambda *_, **__: torch.rand(3, 6).unbind())
        assert not compile_pays(setting, 7, 311, like, True)
        assert "differs" in caplog.text
    c_compiler.compiled.cache_clear()


def test_without_a_compiler_blocks_are_taken(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    c_compiler._compiler.cache_clear()
    assert not compile_pays(Setting("forward_kl", 0.5, 2.0, True), 256, 10**6, torch.empty(1), None)
    c_compiler._compiler.cache_clear()


def test_small_tiles_and_float64_are_not_compiled():
    setting = Setting("forward_kl", 0.5, 2.0, True)
    assert not compile_pays(setting, 256, 500, torch.empty(1), None)
    assert not compile_pays(setting, 256, 10**6, torch.empty(1, dtype=torch.float64), True)
    assert not compile_pays(setting, 256, 10**6, torch.empty(1), False)
