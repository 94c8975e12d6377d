"""The trainer without logits: the fused loss and full logits are the same run, for every language-model head."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from kd_trainer import DistillationTrainer
from kd_trainer.fused_forward import OutputHead
from kd_trainer.heads import logits_of

from .tiny import VOCAB, arguments, llama_config, models, pad, rows


def run(tmp_path, implementation, build, data, **settings):
    """(losses logged at each step, final weights, trainer) of a run of a few steps."""
    student, teacher = build()
    args = arguments(
        tmp_path / implementation,
        **{"kd_loss_implementation": implementation, "kd_reduction": "tokenmean", "logging_steps": 1, **settings},
    )
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=data, eval_dataset=data[:11], data_collator=pad
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "soft_loss" in entry]
    return logs, {k: v.detach().clone() for k, v in student.state_dict().items()}, trainer


def assert_same_run(one, other):
    logs, weights, _ = one
    other_logs, other_weights, _ = other
    assert len(logs) == len(other_logs) > 0
    for a, b in zip(logs, other_logs, strict=True):
        for key in ("loss", "hard_loss", "soft_loss", "teacher_agreement"):
            assert (key in a) == (key in b), key
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), key
    for name, value in weights.items():
        assert torch.allclose(value, other_weights[name], atol=1e-5), name


SETTINGS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "batchmean": {"kd_reduction": "batchmean", "learning_rate": 0.005},
    "attended": {"kd_positions": "attended"},
    "alpha 1": {"kd_alpha": 1.0},
    "jsd, T 2.7": {"kd_divergence": "jsd", "kd_temperature": 2.7},
    "reverse_kl": {"kd_divergence": "reverse_kl"},
    "smoothed": {"label_smoothing_factor": 0.1},
    "schedule": {"kd_schedule": "linear", "kd_alpha_end": 0.1, "kd_temperature_end": 1.0},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_fused_is_full(tmp_path, setting):
    runs = [
        run(tmp_path, name, lambda: models("causal_lm"), rows("causal_lm", 160), max_steps=20, **SETTINGS[setting])
        for name in ("fused", "full")
    ]
    assert runs[0][2]._fit.heads is not None
    assert_same_run(*runs)


def test_evaluation_is_the_same(tmp_path):
    metrics = []
    for name in ("fused", "full"):
        _, _, trainer = run(tmp_path, name, lambda: models("causal_lm"), rows("causal_lm"), max_steps=1)
        metrics.append(trainer.evaluate())
    for key in ("eval_loss", "eval_soft_loss", "eval_hard_loss", "eval_teacher_agreement", "eval_perplexity"):
        assert metrics[0][key] == pytest.approx(metrics[1][key], rel=1e-5), key
