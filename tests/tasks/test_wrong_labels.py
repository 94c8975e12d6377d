"""A label that is no class, where nobody has looked: nothing is read outside of a row, the row is NaN, the labels are
named. And classes that a teacher excludes by logits of -inf, on devices where looking would cost a wait."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from kd_trainer import DistillationTrainer
from kd_trainer.losses import fused_arguments
from kd_trainer.losses.divergences import DIVERGENCES
from kd_trainer.losses.fused_linear import fused_linear_distillation, fused_linear_distillation_plain, inputs_of
from kd_trainer.losses.sparse_targets import Samples, TopK
from kd_trainer.losses.tile import tile_loss
from kd_trainer.losses.tile_sparse import sparse_tile_loss
from kd_trainer.losses.tile_types import Setting
from kd_trainer.tasks.kinds import TASKS
from kd_trainer.training.logs import FiniteWatch
from tests.helpers import tiny
from tests.losses.test_tile import compiler

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
V, WRONG = 40, [40, 41, -1, -99, -101, 2**31, 2**32 + 5, -(2**40)]
by = pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compiler)], ids=["torch", "C"])


def tiles(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, rows, V, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def weights(rows: int) -> torch.Tensor:
    return torch.tensor([[0.5, 0.25]]).repeat(rows, 1)


def labels_of() -> torch.Tensor:
    return torch.tensor([3, *WRONG, -100, V - 1])


def assert_wrong_rows_are_nan(labels: torch.Tensor, tile: torch.Tensor, hard: torch.Tensor) -> None:
    wrong = (labels != -100) & ((labels < 0) | (labels >= V))
    assert hard.isnan().tolist() == wrong.tolist()
    assert tile.isnan().all(-1).tolist() == wrong.tolist()
    assert tile.isnan().any(-1).tolist() == wrong.tolist()
    assert hard[labels == -100].eq(0).all()


@by
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tile_of_a_dense_teacher(divergence, compiled, dtype):
    labels = labels_of()
    student, teacher = tiles(len(labels), dtype)
    right, plain = student.clone(), torch.where(labels.abs() < V, labels, -100)
    setting = Setting(divergence, 0.5, 2.0, True)
    rows = tile_loss(setting, student, teacher, weights(len(labels)), labels, gradient=True, compiled=compiled)
    assert_wrong_rows_are_nan(labels, student, rows.hard)
    other = tile_loss(setting, right, teacher, weights(len(labels)), plain, gradient=True, compiled=compiled)
    assert rows.soft.equal(other.soft)  # of every row
    fine = ~rows.hard.isnan()
    assert student[fine].equal(right[fine])
    assert rows.hard[fine].equal(other.hard[fine])


@by
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("form", ["top k", "samples"])
def test_the_tile_of_a_sparse_teacher(form, divergence, compiled):
    if form == "samples":
        divergence = "forward_kl"
    labels = labels_of()
    (student, _), count = tiles(len(labels)), len(labels)
    ids = torch.arange(3).repeat(count, 1)
    kept = TopK(ids, torch.full((count, 3), 0.25).log(), torch.full((count,), 0.25).log())
    sparse = kept if form == "top k" else Samples(ids, ids[:, 0], torch.ones(count))
    rows = sparse_tile_loss(Setting(divergence, 0.0, 2.0, True), student, sparse, weights(count), labels, gradient=True,
                        compiled=compiled)  # fmt: skip
    assert_wrong_rows_are_nan(labels, student, rows.hard)
    assert rows.soft.isfinite().all()


@by
def test_a_hard_loss_that_does_not_weigh_spoils_no_gradient(compiled):
    labels = labels_of()
    student, teacher = tiles(len(labels))
    weighs = weights(len(labels)) * torch.tensor([1.0, 0.0])
    setting = Setting("forward_kl", 0.0, 2.0, True)
    rows = tile_loss(setting, student, teacher, weighs, labels, gradient=True, compiled=compiled)
    assert student.isfinite().all()
    assert rows.hard.isnan().sum() == len(WRONG)


def test_the_plain_rows(monkeypatch):
    """The twin by autograd, as accelerators have it where a class is excluded or labels are smoothed."""
    monkeypatch.setattr(fused_arguments, "_check_range", lambda *_, **__: None)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher, other = (torch.randn(n, 6, generator=generator) for n in (5, V, 5, V))
    labels = torch.tensor([1, V, -100, -7, 2])
    for smoothing in (0.0, 0.1):
        for function in (fused_linear_distillation, fused_linear_distillation_plain):
            x = hidden.clone().requires_grad_()
            loss = function(x, weight, teacher, other, labels, label_smoothing=smoothing)
            loss.total.backward()
            assert loss.total.isnan(), function
            assert loss.soft.isfinite()
            assert x.grad.isnan().any(-1).tolist() == [False, True, False, True, False]


# ---- Triton, under its interpreter ----

KERNEL = """
import torch
from kd_trainer.losses.tile import Setting, tile_loss
from kd_trainer.kernels.tile_triton import TRITON_DIVERGENCES, tile_on_device
from kd_trainer.losses.divergences import DIVERGENCES
from tests.tasks import test_wrong_labels as t

def run(setting, student, teacher, labels, **kwargs):
    weights = t.weights(len(student))
    if labels is not None:
        weights[labels == -100, 1] = 0
    columns = tile_on_device(setting, student, teacher, weights, labels, lanes=8, times=1, **kwargs)
    return student, columns

labels = t.labels_of()
for dtype in (torch.int64, torch.int32):
    given = labels.clamp(-(2**31), 2**31 - 1).to(dtype)
    student, teacher = t.tiles(len(labels))
    buffer = torch.full((len(labels) + 2, t.V + 9), torch.nan)
    buffer[1:-1, 3:-6] = student
    tile, (soft, hard, same) = run(Setting("forward_kl", 0.0, 2.0, True), buffer[1:-1, 3:-6], teacher, given,
                                   gradient=True)
    t.assert_wrong_rows_are_nan(given, tile, hard)
    assert soft.isfinite().all()
    buffer[1:-1, 3:-6] = torch.nan
    assert buffer.isnan().all()

for divergence in TRITON_DIVERGENCES:
    for hard in (True, False):
        setting = Setting(divergence, 0.3, 2.0, hard, excluding=True)
        for side in t.EXCLUDED:
            student, teacher, labels = t.excluded(side)
            exact, gradient = t.by_autograd(setting, student, teacher, labels if hard else None)
            tile, (soft, _, same) = run(setting, student.clone(), teacher, labels if hard else None, gradient=True)
            shown = lambda m: f"{setting} {side}: {m}"
            torch.testing.assert_close(soft.double(), exact, rtol=1e-5, atol=1e-6, msg=shown)
            if exact.isfinite().all():
                torch.testing.assert_close(tile.double(), gradient, rtol=1e-4, atol=1e-6)
print("held")
"""
EXCLUDED = ["neither", "teacher", "both", "student"]


def excluded(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tiles with classes of -inf; the labels are none of these."""
    student, teacher = tiles(4)
    if side in ("teacher", "both"):
        teacher[:, 3::5] = -torch.inf
    if side in ("student", "both"):
        student[:, 3::5] = -torch.inf
    return student, teacher, torch.tensor([0, 5, -100, V - 4])


def by_autograd(setting: Setting, student: torch.Tensor, teacher: torch.Tensor, labels: Any) -> tuple:
    """D and the gradient as `tile_loss` defines them, in float64."""
    s, t = student.double().requires_grad_(), teacher.double()
    beta = setting.beta if setting.divergence == "jsd" or "skew" in setting.divergence else None
    soft = DIVERGENCES[setting.divergence](s, t, beta=beta)
    total = 0.5 * soft.sum()
    if labels is not None:  # a row without a label has no weight
        logits = setting.temperature * s
        total = total + 0.25 / setting.temperature * torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=-100, reduction="sum"
        )
    return soft.detach(), torch.autograd.grad(total, s)[0]


@needs_triton
@pytest.mark.launch
def test_the_kernel():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    made = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, timeout=240)
    assert made.stdout.endswith("held\n"), made.stderr[-3000:]


# ---- classes that are excluded where nobody looks ----


def case(side: str) -> tuple[tuple, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, labels = (torch.randn(n, 6, generator=generator) for n in (5, V, 1))
    teacher = torch.randn(5, V, generator=generator)
    labels, options = torch.tensor([1, 2, -100, 7, 10]), {"teacher_logits": teacher}
    if side in ("teacher", "both"):
        teacher[:, 3::5] = -torch.inf
    if side in ("student", "both"):
        options["student_bias"] = torch.zeros(V).index_fill_(0, torch.arange(3, V, 5), -torch.inf)
    return (hidden, weight, None, None, labels), options


def run(function: Any, side: str, **settings: Any) -> tuple:
    (hidden, *rest), options = case(side)
    x = hidden.requires_grad_()
    loss = function(x, *rest, **options, **settings)
    (gradient,) = torch.autograd.grad(loss.total, x)
    return loss.total.detach(), gradient


@pytest.mark.parametrize("side", EXCLUDED)
@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_without_a_look_the_safe_path_is_taken(divergence, side, monkeypatch):
    """As on a GPU without Triton's kernel, with tiles too small for it, or on any other accelerator."""
    monkeypatch.setattr(fused_arguments, "excludes", lambda tensor: None)
    total, gradient = run(fused_linear_distillation, side, divergence=divergence)
    plain, expected = run(fused_linear_distillation_plain, side, divergence=divergence)
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=0)
    assert not total.isnan()
    if plain.isfinite():
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_what_is_unknown_goes_to_the_kernel_where_it_is(monkeypatch):
    """Models without a bias, whose logits are products, are not slowed by any of it."""
    monkeypatch.setattr(fused_arguments, "excludes", lambda tensor: None)
    (hidden, weight, _, _, labels), options = case("neither")
    job = fused_arguments.read(inputs_of(
        student_hidden=hidden, student_weight=weight, teacher_hidden=None, teacher_weight=None, labels=labels, **options
    ))[0]  # fmt: skip
    assert job.setting.excluding
    assert not job.plain_rows
    del options["teacher_logits"]
    job = fused_arguments.read(inputs_of(
        student_hidden=hidden, student_weight=weight, teacher_hidden=hidden, teacher_weight=weight, labels=labels
    ))[0]  # fmt: skip
    assert not job.setting.excluding


@pytest.mark.parametrize("form", ["teacher_top_k", "teacher_samples"])
@pytest.mark.parametrize("compiled", [False, None])
def test_a_student_that_excludes_classes_beside_a_sparse_teacher(form, compiled, monkeypatch):
    ids = torch.arange(3).repeat(5, 1)
    third = torch.full((5,), 0.25)
    given = (ids, torch.full((5, 3), 0.25).log(), third.log())
    given = given if form == "teacher_top_k" else (ids, ids[:, 0], third)
    bias = torch.zeros(V).index_fill_(0, torch.arange(4, V, 5), -torch.inf)
    found = []
    for function, look in ((fused_linear_distillation_plain, True), (fused_linear_distillation, False)):
        if not look:
            monkeypatch.setattr(fused_arguments, "excludes", lambda tensor: None)
        (hidden, weight, *_), _ = case("neither")
        x = hidden.requires_grad_()
        loss = function(x, weight, None, None, torch.tensor([1, 2, -100, 7, 10]), student_bias=bias,
                        compiled=compiled, **{form: given})  # fmt: skip
        found.append((loss.total.detach(), *torch.autograd.grad(loss.total, x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# ---- the message ----


@pytest.mark.parametrize("mode", ["step", "log"])
def test_labels_are_named_and_not_the_learning_rate(mode, tmp_path, monkeypatch):
    """As on a GPU, where the fused loss does not look at labels before it reads them."""
    monkeypatch.setattr(fused_arguments, "_check_range", lambda *_, **__: None)
    torch.manual_seed(0)
    pair = [LlamaForCausalLM(tiny.llama_config(h)) for h in (16, 24)]
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]} for _ in range(16)]
    rows[13]["labels"] = [1, 2, tiny.VOCAB + 3, 4]
    trainer = tiny.trainer("causal_lm", tmp_path, pair=pair, data=rows, kd_loss_implementation="fused",
                           kd_check_finite=mode, max_steps=2)  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        trainer.train()
    assert re_message(str(caught.value)), str(caught.value)
    assert "learning rate" not in str(caught.value)


def re_message(text: str) -> bool:
    wanted = (
        "`labels` is another number in rows [5] of the batch; expected 0 to 36 (the logits have 37 classes), or -100 "
        "for no label, because the loss at step 1, process 0, is not finite. Correct the label column."
    )
    return text == wanted


def test_batches_with_and_without_a_fault_are_noted_alike():
    watch, logits = FiniteWatch("log", 0), torch.zeros(2, 3)
    task = TASKS["classification"]
    for batch in ({}, {"labels": torch.tensor([1, 2])}, {"labels": torch.tensor([1, 7])}, {}):
        bad = "labels" in batch and bool((batch["labels"] > 2).any())
        loss = torch.tensor(torch.nan if bad else 1.0)
        watch.see(loss, logits, None, 4, fault=lambda batch=batch: task.fault(batch, 3))
    with pytest.raises(RuntimeError, match=r"`labels` is another number in rows \[1\].*step 4"):
        watch.raise_noted()


@pytest.mark.parametrize("mode", ["step", "log"])
def test_a_question_without_an_attended_token_is_named(mode, tmp_path):
    rows = tiny.rows("question_answering", 16)
    rows[10]["attention_mask"] = [0] * 16
    trainer = tiny.trainer("question_answering", tmp_path, data=rows, kd_check_finite=mode, max_steps=2)
    with pytest.raises(RuntimeError, match=r"`attention_mask` is 0 everywhere in rows \[2\] of the batch; expected an "
                       r"attended token in every row, because .* Leave out rows without text"):  # fmt: skip
        trainer.train()


def test_a_question_with_a_4d_mask(tmp_path):
    trainer = tiny.trainer("question_answering", tmp_path)
    trainer.model.eval()
    batch = tiny.pad(tiny.rows("question_answering")[:4])
    wide = batch["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 16, -1)
    wide = wide & wide.transpose(2, 3)
    with torch.no_grad():
        losses = [float(trainer.compute_loss(trainer.model, {**batch, "attention_mask": m}))
                  for m in (batch["attention_mask"], wide)]  # fmt: skip
    assert math.isfinite(losses[1])
    assert isinstance(trainer, DistillationTrainer)
