"""The public functions, given None, lists, text or numbers where they want something else: one clear error each."""

from __future__ import annotations

import os
import re
import stat
import sys

import datasets
import pytest
import torch

import kd_trainer.losses.distributions as closed
import kd_trainer.report.fidelity as fidelity
from kd_trainer import (
    CachedTeacher,
    DistillationArguments,
    DistillationLoss,
    KLDivergenceLoss,
    MLPConfig,
    SoftTargetLoss,
    TeacherCollator,
    add_teacher_inputs,
    entropy,
    estimate_memory,
    fit_temperature,
    forward_kl,
    fused_linear_distillation,
    jsd,
    parse_args,
    soft_cross_entropy,
    soft_target_data,
    student_from_teacher,
    synthetic_classification,
    total_variation,
)
from kd_trainer.kernels import c_compiler
from kd_trainer.losses.sparse_targets import top_k

LOGITS, LABELS = torch.randn(2, 3), torch.tensor([0, 1])
PROBS, HIDDEN, WEIGHT, MASK = LOGITS.softmax(-1), torch.randn(2, 4), torch.randn(3, 4), LABELS > -1
PAIR = {"student_logits": LOGITS, "teacher_logits": LOGITS, "temperature": 1.0}
SETTINGS = {"temperature": 1.0, "divergence": "jsd", "beta": 0.5, "reduction": "sum", "ignore_index": -100}
FORWARD = {"student_logits": LOGITS, "teacher_logits": LOGITS, "labels": LABELS, "mask": LABELS}
GAUSSIAN = {"p_mean": LOGITS, "p_std": PROBS, "q_mean": LOGITS, "q_std": PROBS}
FULL = {"p_mean": torch.zeros(2), "p_covariance": torch.eye(2), "q_mean": torch.zeros(2), "q_covariance": torch.eye(2)}
FUSED = {
    "student_hidden": HIDDEN, "student_weight": WEIGHT, "teacher_hidden": HIDDEN, "teacher_weight": WEIGHT,
    "labels": LABELS, "soft_mask": MASK, "student_bias": torch.zeros(3), "alpha": 0.5, "temperature": 1.0,
    "divergence": "jsd", "beta": 0.5, "factor": 1.0, "label_smoothing": 0.0, "common_ids": 3, "soft_count": 2,
    "hard_count": 2,
}  # fmt: skip
DATA = datasets.Dataset.from_dict({"text": ["a", "b"]})


def tokenize(texts, **_):
    return {"input_ids": [[1]] * len(texts)}


# Function, good arguments, and those of them for which a wrong type means something after all.
CALLS = {
    "forward_kl": (forward_kl, PAIR, ()),
    "jsd": (jsd, {**PAIR, "beta": 0.5}, ()),
    "total_variation": (total_variation, PAIR, ()),
    "soft_cross_entropy": (soft_cross_entropy, PAIR, ()),
    "entropy": (entropy, {"logits": LOGITS, "temperature": 1.0}, ()),
    "KLDivergenceLoss": (KLDivergenceLoss, {"epsilon": 0.1}, ()),
    "KLDivergenceLoss()": (KLDivergenceLoss(), {"target_probs": PROBS, "predicted_probs": PROBS}, ()),
    "SoftTargetLoss": (SoftTargetLoss, SETTINGS, ()),
    "SoftTargetLoss()": (SoftTargetLoss(), FORWARD, ()),
    "DistillationLoss": (DistillationLoss, {"alpha": 0.5, **SETTINGS}, ()),
    "DistillationLoss()": (DistillationLoss(), FORWARD, ()),
    "fit_temperature": (fit_temperature, {"logits": LOGITS, "labels": LABELS, "minimum": 0.1, "maximum": 9.0}, ()),
    "fused": (fused_linear_distillation, FUSED, ()),
    "kl_bernoulli": (closed.kl_bernoulli, {"p_probs": PROBS, "q_probs": PROBS}, ()),
    "kl_categorical": (closed.kl_categorical, {"p_probs": PROBS, "q_probs": PROBS}, ()),
    "kl_gaussian": (closed.kl_gaussian, GAUSSIAN, ()),
    "kl_full_gaussian": (closed.kl_full_gaussian, FULL, ()),
    "kl_to_standard_normal": (closed.kl_to_standard_normal, {"mean": LOGITS, "log_variance": LOGITS}, ()),
    "monte_carlo_kl": (closed.monte_carlo_kl, {"p_log_probs": LOGITS, "q_log_probs": LOGITS}, ()),
    "top_k": (top_k, {"logits": LOGITS, "k": 2, "temperature": 1.0}, ()),
    "accuracy": (fidelity.accuracy, {"logits": LOGITS, "labels": LABELS}, ()),
    "reliability_bins": (fidelity.reliability_bins, {"logits": LOGITS, "labels": LABELS, "bins": 3}, ()),
    "kl_to_teacher": (fidelity.kl_to_teacher, {"student_logits": LOGITS, "teacher_logits": LOGITS}, ()),
    "CachedTeacher": (CachedTeacher, {"path": "no/such/cache"}, ()),
    "synthetic_classification": (synthetic_classification, {"seed": 1}, ()),
    "soft_target_data": (soft_target_data, {"num_examples": 3, "num_features": 2, "num_classes": 2, "seed": 1}, ()),
    "student_from_teacher": (student_from_teacher, {"teacher": "no/such", "layers": "every_2"}, ("layers",)),
    "add_teacher_inputs": (
        add_teacher_inputs,
        {"dataset": DATA, "teacher_tokenizer": tokenize, "columns": "text"},
        (),
    ),
    "TeacherCollator": (TeacherCollator, {"base_collator": lambda rows: {}}, ()),
    "parse_args": (lambda cls, argv: parse_args(cls, argv=argv), {"cls": DistillationArguments, "argv": []}, ()),
    "MLPConfig": (MLPConfig, {"num_features": 3, "hidden_sizes": [3], "activation": "relu", "dropout": 0.0}, ()),
    "estimate_memory": (estimate_memory, {"student": "no/such", "teacher": "no/such"}, ()),
}
OTHERS = [None, [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], "x", 1.5, {"a": 1}, []]


@pytest.mark.parametrize("name", CALLS)
def test_another_type_works_or_is_one_clear_error(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    function, good, left_out = CALLS[name]
    for argument, value in [(a, value) for a in good if a not in left_out for value in OTHERS]:
        raised = ""
        try:
            function(**{**good, argument: value})
        except Exception as error:
            raised = f"{error} ({type(error).__name__})"
        clear = not raised or re.match(r"`[^`]+` is .*; expected .+[.] .+", raised, re.DOTALL)
        assert clear, f"{argument}={value!r}: {raised}"


@pytest.mark.parametrize("value", [PROBS.tolist(), None, PROBS.numpy()])
def test_lists_given_to_KLDivergenceLoss(value):
    with pytest.raises(TypeError, match=r"`target_probs` is .*; expected a tensor of probabilities.*torch\.tensor"):
        KLDivergenceLoss()(value, PROBS)
    with pytest.raises(TypeError, match="`predicted_probs` is "):
        KLDivergenceLoss()(PROBS, value)


@pytest.mark.parametrize(("path", "error"), [(None, TypeError), (3, TypeError), ("", ValueError), ("  ", ValueError)])
def test_a_cached_teacher_of_no_path(path, error):
    with pytest.raises(error, match=r"`path` is .*; expected the folder of a finished teacher cache"):
        CachedTeacher(path)


# ---- the compiler's name ----


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Two programs on the PATH, one of them with a space in its folder; the cache is empty before and after."""
    for name in ("wrap", "gcc-x", "my tools/gcc-y"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\nexit 0\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    c_compiler._compiler.cache_clear()
    yield tmp_path
    c_compiler._compiler.cache_clear()


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ("wrap gcc-x", ["{}/wrap", "gcc-x"]),
        ("  wrap   gcc-x -m64 ", ["{}/wrap", "gcc-x", "-m64"]),
        ("gcc-x", ["{}/gcc-x"]),
        ("{}/my tools/gcc-y", ["{}/my tools/gcc-y"]),
        ("'{}/my tools/gcc-y' -m64", ["{}/my tools/gcc-y", "-m64"]),
        ("/no/such/compiler", None),
        ("nowhere gcc-x", None),
        ("'open", None),
        ("''", None),
    ],
)
def test_CC_may_have_several_words(given, command, tools, monkeypatch):
    monkeypatch.setenv("CC", given.format(tools))
    found = c_compiler._compiler()
    assert found == (None if command is None else tuple(word.format(tools) for word in command))


def test_a_command_of_several_words_compiles(monkeypatch):
    c_compiler._compiler.cache_clear()
    plain = c_compiler._compiler()
    if plain is None:
        pytest.skip("no C compiler (cc, gcc, clang)")
    monkeypatch.setenv("CC", f"env {plain[0]}")
    c_compiler._compiler.cache_clear()
    c_compiler.compiled.cache_clear()
    try:
        assert c_compiler._compiler() is not None
        logits = torch.randn(64, 5000)
        assert torch.isfinite(top_k(logits, 4, temperature=2.0).log_probs).all()
    finally:
        c_compiler._compiler.cache_clear()
        c_compiler.compiled.cache_clear()
