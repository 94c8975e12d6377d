"""The visit's two ways: compiled and in blocks of rows they are one; a schedule of the temperature compiles once."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from kd_trainer import DIVERGENCES
from kd_trainer.visit import Setting, _compiled_for, compile_pays, visit

compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler (g++)")


def tile(rows: int = 7, classes: int = 301, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, rows, classes, generator=generator)).to(dtype)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[2] = -100
    weights = torch.rand(rows, 2, generator=generator)
    weights[2, 1] = 0
    return {"student": student, "teacher": teacher, "labels": labels, "weights": weights}


def assert_one(results: list, dtype: torch.dtype) -> None:
    """What two ways of a visit to a tile of this dtype gave."""
    room = 1e-6 if dtype == torch.float32 else 1e-2  # one rounding of bfloat16 may fall to the other side
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=room, atol=room * float(one.abs().max()))


def test_temperatures_of_a_schedule_share_one_compiled_visit():
    settings = {_compiled_for(Setting("forward_kl", 0.5, 1 + i / 30, True)) for i in range(1, 30) if i != 15}
    assert len(settings) == 1
    assert len({_compiled_for(Setting("forward_kl", 0.5, 1 + i / 30, False)) for i in range(30)}) == 1
    assert len({_compiled_for(Setting("forward_kl", 0.5, t, True)) for t in (1.0, 2.0, 2.5)}) == 3


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_eager(divergence, dtype):
    for temperature in (2.1, 2.3):
        setting = Setting(divergence, 0.5, temperature, True)
        results = []
        for compiled in (False, True):
            given = tile(dtype=dtype)
            rows = visit(setting, **given, gradient=True, compiled=compiled)
            results.append((given["student"].float(), rows.soft, rows.hard, rows.same.float()))
        assert_one(results, dtype)


@compiler
@pytest.mark.slow
def test_every_divergence_passes_the_check_before_its_first_compiled_visit():
    for divergence in DIVERGENCES:
        assert compile_pays(Setting(divergence, 0.3, 2.0, True), 7, 301, torch.empty(1), True), divergence


def test_small_tiles_and_float64_are_not_compiled():
    setting = Setting("forward_kl", 0.5, 2.0, True)
    assert not compile_pays(setting, 256, 500, torch.empty(1), None)
    assert not compile_pays(setting, 256, 10**6, torch.empty(1, dtype=torch.float64), True)
    assert not compile_pays(setting, 256, 10**6, torch.empty(1), False)
