"""The tile's loss to a sparse teacher: compiled and in blocks of rows it is one; it is compared before it is used."""

from __future__ import annotations

import itertools
import logging
import os
import shutil

import pytest
import torch

from kd_trainer.losses import tile_sparse as module
from kd_trainer.losses.sparse_targets import draw_samples, top_k
from kd_trainer.losses.tile_sparse import _compiled_for, compile_pays_sparse, sparse_tile_loss
from kd_trainer.losses.tile_types import Setting
from tests.losses import test_tile
from tests.losses.test_tile import assert_one, compiler

cxx = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler (g++)")


def tile(form, temperature, rows=7, classes=301, dtype=torch.float32):
    given = test_tile.tile(rows, classes, dtype)
    teacher, uniform = given.pop("teacher"), torch.rand(rows, generator=torch.Generator().manual_seed(1))
    return given | {"teacher": top_k(teacher, 5) if form == "top k" else draw_samples(teacher, 9, uniform=uniform)}


def test_temperatures_of_a_schedule_share_one_kernel():
    settings = {_compiled_for(Setting("jsd", 0.5, 1 + i / 30, True)) for i in range(1, 30) if i != 15}
    assert len(settings) == 1
    assert len({_compiled_for(Setting("forward_kl", 0.5, 1 + i / 30, False)) for i in range(30)}) == 1
    assert len({_compiled_for(Setting(d, 0.5, t, True)) for t in (1.0, 2.0, 2.5) for d in ("jsd", "reverse_kl")}) == 3


by_torch = pytest.param("torch", marks=[cxx, pytest.mark.trains])


@pytest.mark.parametrize("by", [pytest.param("C", marks=compiler), by_torch])
@pytest.mark.parametrize("form", ["top k", "samples"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hard", [True, False])
def test_compiled_is_eager(form, dtype, hard, by, monkeypatch):
    monkeypatch.setattr(module, "can_compile", lambda tile: by == "C")
    cases = itertools.product((2.0, 2.1, 2.3), ("forward_kl", "reverse_kl"), (301, 4500))  # the C code's blocks: 2,048
    for temperature, divergence, classes in cases:
        setting = Setting(divergence, 0.0, temperature, hard)
        results = []
        for compiled in (False, True):
            given = tile(form, temperature, classes=classes, dtype=dtype)
            given["labels"] = given["labels"] if hard else None
            rows = sparse_tile_loss(setting, **given, gradient=True, compiled=compiled)
            results.append((given["student"].float(), rows.soft, rows.hard, rows.same.float()))
        assert_one(results, dtype)


EXTREMES = {  # what is added to the student's logits at the ids, at all others, and at the first id
    "alike": (0, 0, 0), "ids far above": (900, 0, 0), "ids far below": (-900, 0, 0), "one id alone": (0, -300, 2000),
    "a rest of 1e-9": (20, 0, 0), "all masked but ids": (0, -1e30, 0), "ids masked": (-3e38, 0, 0),
}  # fmt: skip


@compiler
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("form", ["top k", "samples"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_forward_kl_in_c_is_that_in_float64(extreme, form, gradient):
    """With labels among the ids, beside them and none, and for each temperature's way to the hard loss."""
    of_ids, of_rest, of_first = EXTREMES[extreme]
    for temperature, hard, classes in itertools.product((1.0, 1.5, 2.0, 2.3), (True, False), (301, 4500)):
        setting, given = Setting("forward_kl", 0.0, temperature, hard), tile(form, temperature, classes=classes)
        ids, student = given["teacher"].ids, given["student"]
        shift = torch.full_like(student, of_rest).scatter(1, ids, of_ids)
        student += shift.scatter_add(1, ids[:, :1], torch.full((len(ids), 1), float(of_first)))
        given["labels"] = torch.where(torch.arange(len(ids)) % 2 == 0, given["labels"], ids[:, 1]) if hard else None
        results = []
        for one, compiled in ((student.double(), False), (student, True)):
            rows = sparse_tile_loss(setting, **given | {"student": one}, gradient=gradient, compiled=compiled)
            results.append((rows.soft, rows.hard, rows.same.float(), *([one] if gradient else [])))
        results = [tuple(x.float() for x in found) for found in results]
        if not hard:
            results = [(soft, *others) for soft, _, *others in results]
        assert_one(results, torch.float32, 2e-6)


@compiler
def test_labels_may_be_integers_of_any_size():
    results = []
    for dtype in (torch.int64, torch.int32, torch.int16):
        given = tile("top k", 2.0)
        given["labels"] = given["labels"].to(dtype)
        rows = sparse_tile_loss(Setting("forward_kl", 0.0, 2.0, True), **given, gradient=True, compiled=True)
        results.append((given["student"], rows.hard))
    assert all(torch.equal(one, other) for found in results[1:] for one, other in zip(results[0], found, strict=True))


@compiler
@pytest.mark.parametrize("tail", [-torch.inf, -20.0])
def test_forward_kl_in_c_of_all_classes_kept_is_that_in_float64(tail):
    """Of which one is impossible; a tail that no class is left for makes the loss infinite."""
    given = test_tile.tile(classes=40)
    teacher = given.pop("teacher")
    teacher[:, 3] = -torch.inf
    given["teacher"] = top_k(teacher, 40)._replace(log_tail=torch.full((len(teacher),), tail))
    setting, results = Setting("forward_kl", 0.0, 1.0, True), []
    for one, compiled in ((given["student"].double(), False), (given["student"], True)):
        rows = sparse_tile_loss(setting, **given | {"student": one}, gradient=True, compiled=compiled)
        results.append((rows.hard.float(), rows.same.float(), rows.soft.float(), one.float()))
    if tail == -20:
        assert all(soft.isposinf().all() for _, _, soft, _ in results)
        results = [found[:2] for found in results]
    assert_one(results, torch.float32)


@compiler
def test_the_check_before_the_first_kernel_passes():
    for temperature, hard in ((2.0, True), (2.1, True), (1.0, False), (1.0, True)):
        for divergence in ("jsd", "forward_kl"):
            assert compile_pays_sparse(Setting(divergence, 0.3, temperature, hard), 7, 301, torch.empty(1), True)


@compiler
@pytest.mark.parametrize(("function", "divergence"), [("sums_on_cpu", "jsd"), ("sparse_tile_on_cpu", "forward_kl")])
def test_a_kernel_that_differs_is_not_used(function, divergence, monkeypatch, caplog):
    right = getattr(module, function)

    def wrong(*given):
        first, second, third = right(*given)
        return first, second * 1.01, third

    monkeypatch.setattr(module, function, wrong)
    with caplog.at_level(logging.WARNING):
        assert not compile_pays_sparse(Setting(divergence, 0.0, 2.0, True), 7, 307, torch.empty(1), True)
    assert "differs from the plain computation" in caplog.text


def test_small_tiles_and_float64_are_not_compiled():
    setting = Setting("forward_kl", 0.0, 2.0, True)
    assert not compile_pays_sparse(setting, 256, 500, torch.empty(1), None)
    assert not compile_pays_sparse(setting, 256, 10**6, torch.empty(1, dtype=torch.float64), True)
    assert not compile_pays_sparse(setting, 256, 10**6, torch.empty(1), False)
