"""Mixtures of experts: the router's auxiliary loss that upstream's forward adds beside labels stays in the loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import NllbMoeConfig, SwitchTransformersConfig

from kd_trainer import DistillationTrainer, DistillationTrainingArguments
from kd_trainer.training.terms import aux_weight
from tests.helpers import tiny

# Where a class keeps its weight differs: JetMoe has aux_loss_coef, the others router_aux_loss_coef.
CAUSAL = ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "JetMoe", "GptOss", "Phimoe", "GraniteMoe", "FlexOlmo",
          "MiniMaxM2", "Ernie4_5_Moe", "Laguna", "Mellum"]  # fmt: skip
WEIGHT = 0.5  # large enough to be seen beside the cross-entropy


def build(kind: str, hidden: int = 16, **kwargs: Any) -> nn.Module:
    config = {
        "vocab_size": tiny.VOCAB, "hidden_size": hidden, "intermediate_size": 32, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "num_local_experts": 4,
        "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "output_router_logits": True, "attention_dropout": 0.0, "initializer_range": 0.3, "router_jitter_noise": 0.0,
        "input_jitter_noise": 0.0, "aux_loss_coef" if kind == "JetMoe" else "router_aux_loss_coef": WEIGHT, **kwargs,
    }  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))


def arguments(output_dir: Any, **kwargs: Any) -> DistillationTrainingArguments:
    return tiny.arguments(output_dir, **{"kd_reduction": "tokenmean", "learning_rate": 0.01, **kwargs})


def distillation(
    kind: str, output_dir: Any, *, student: Any = None, teacher: Any = None, **kwargs: Any
) -> DistillationTrainer:
    return DistillationTrainer(
        model=build(kind) if student is None else student, args=arguments(output_dir, **kwargs),
        teacher_model=tiny.models("causal_lm")[1] if teacher is None else teacher, data_collator=tiny.pad,
        train_dataset=tiny.rows("causal_lm"), eval_dataset=tiny.rows("causal_lm", 21, seed=2),
    )  # fmt: skip


def stock(kind: str, output_dir: Any, **kwargs: Any) -> transformers.Trainer:
    return transformers.Trainer(
        model=build(kind), args=tiny.stock_arguments(output_dir, **{"learning_rate": 0.01, **kwargs}),
        data_collator=tiny.pad, train_dataset=tiny.rows("causal_lm"), eval_dataset=tiny.rows("causal_lm", 21, seed=2),
    )  # fmt: skip


# ---- kd_alpha = 0 is the stock Trainer ----


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "JetMoe"])
def test_alpha_zero_is_the_stock_trainer(kind, tmp_path):
    kwargs = {"max_steps": 20, "eval_strategy": "steps", "eval_steps": 10}
    distilled, plain = distillation(kind, tmp_path, kd_alpha=0.0, **kwargs), stock(kind, tmp_path, **kwargs)
    distilled.train()
    plain.train()
    for key in ("loss", "eval_loss", "grad_norm"):
        assert tiny.logged(distilled, key) == pytest.approx(tiny.logged(plain, key), rel=1e-5), key
    torch.testing.assert_close(tiny.weights(distilled.model), tiny.weights(plain.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CAUSAL)
def test_evaluation_is_the_stock_trainers(kind, tmp_path):
    metrics = distillation(kind, tmp_path, kd_alpha=0.0).evaluate()
    assert metrics["eval_loss"] == pytest.approx(stock(kind, tmp_path).evaluate()["eval_loss"], rel=1e-5)
    assert metrics["eval_aux_loss"] > 0.5
    mixed = metrics["eval_hard_loss"] + WEIGHT * metrics["eval_aux_loss"]
    assert metrics["eval_loss"] == pytest.approx(mixed, rel=1e-5)


def test_predictions_are_the_stock_trainers(tmp_path):  # trap 12
    rows = tiny.rows("causal_lm", 8, seed=2)
    runs = distillation("Mixtral", tmp_path), stock("Mixtral", tmp_path)
    (_, a, labels_a), (_, b, labels_b) = (run.prediction_step(run.model.eval(), tiny.pad(rows), False) for run in runs)
    assert torch.equal(labels_a, labels_b)
    assert len(a) == len(b) == 3  # aux_loss, logits, router_logits
    for x, y in zip((*a[:2], *a[2]), (*b[:2], *b[2]), strict=True):
        torch.testing.assert_close(x, y)


# ---- the parts ----


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", ["Mixtral", "JetMoe"])
def test_weighted_parts_equal_the_logged_loss(kind, accumulation, tmp_path):  # trap 27
    run = distillation(
        kind, tmp_path, kd_alpha=0.35, max_steps=6, logging_steps=3, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    run.train()
    for prefix in ("", "eval_"):
        parts = [tiny.logged(run, f"{prefix}{name}") for name in ("loss", "soft_loss", "hard_loss", "aux_loss")]
        assert [len(values) for values in parts] == [2] * 4
        for loss, soft, hard, aux in zip(*parts, strict=True):
            assert 0.35 * soft + 0.65 * hard + WEIGHT * aux == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
def test_a_step_has_the_mean_over_its_micro_batches_by_their_rows(reduction, tmp_path):
    run = distillation("Mixtral", tmp_path, kd_reduction=reduction)
    rows = tiny.rows("causal_lm")
    batches = [tiny.pad(part) for part in (rows[:5], rows[5:8])]
    run.model.eval()
    with torch.no_grad():
        each = [run.model(**{k: v for k, v in b.items() if k != "labels"}).aux_loss.item() for b in batches]
    expected = (5 * each[0] + 3 * each[1]) / 8
    run.model.train()  # it has no dropout
    _, counts = run.get_batch_samples(iter(batches), 2, run.args.device)
    with torch.no_grad():
        losses = [run.compute_loss(run.model, b, num_items_in_batch=counts).item() for b in batches]
    hard, soft, aux, _, _ = run._metrics_buffer.sums().tolist()
    assert aux == pytest.approx(expected, rel=1e-5)
    assert sum(losses) == pytest.approx(0.3 * hard + 0.7 * soft + WEIGHT * expected, rel=1e-5)
    with torch.no_grad():  # gradients are averaged over two processes: the whole loss is doubled
        doubled = [run.compute_loss(run.model, b, num_items_in_batch=counts._replace(scale=2)).item() for b in batches]
    assert sum(doubled) == pytest.approx(2 * sum(losses), rel=1e-5)


def test_the_router_learns_from_it(tmp_path):
    weights = []
    for coefficient in (0.0, WEIGHT):
        run = distillation("Mixtral", tmp_path, student=build("Mixtral", router_aux_loss_coef=coefficient), max_steps=1)
        run.train()
        assert tiny.logged(run, "aux_loss")[0] > 0.5
        weights.append(run.model.model.layers[0].mlp.gate.weight.detach().clone())
    assert (weights[0] - weights[1]).abs().max() > 1e-6


def test_a_router_loss_of_weight_zero_is_not_added(tmp_path):
    run = distillation("Mixtral", tmp_path, student=build("Mixtral", router_aux_loss_coef=0.0))
    forward = run.model.forward

    def overflowing(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.aux_loss = outputs.aux_loss + torch.inf
        return outputs

    run.model.forward = overflowing
    run.model.eval()
    assert torch.isfinite(run.compute_loss(run.model, tiny.pad(tiny.rows("causal_lm")[:4])))


def test_label_smoothing_keeps_it(tmp_path):
    metrics = distillation("Mixtral", tmp_path, label_smoothing_factor=0.1).evaluate()
    mixed = 0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"] + WEIGHT * metrics["eval_aux_loss"]
    assert metrics["eval_loss"] == pytest.approx(mixed, rel=1e-5)


def test_without_labels_it_is_there_too(tmp_path):
    free = [{k: v for k, v in row.items() if k != "labels"} for row in tiny.rows("causal_lm")]
    metrics = distillation("Mixtral", tmp_path).evaluate(free)
    mixed = 0.7 * metrics["eval_soft_loss"] + WEIGHT * metrics["eval_aux_loss"]
    assert metrics["eval_loss"] == pytest.approx(mixed, rel=1e-5)


# ---- where there is none ----


def test_the_teachers_router_has_no_part(tmp_path):
    run = distillation("Mixtral", tmp_path, student=tiny.models("causal_lm")[0], teacher=build("Mixtral"))
    run.train()
    metrics = run.evaluate()
    assert not tiny.logged(run, "aux_loss")
    assert "eval_aux_loss" not in metrics
    mixed = 0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"]
    assert metrics["eval_loss"] == pytest.approx(mixed, rel=1e-5)


def test_it_is_the_config_that_asks(tmp_path):
    student = build("Mixtral", output_router_logits=False)
    metrics = distillation("Mixtral", tmp_path, student=student).evaluate()
    assert "eval_aux_loss" not in metrics


def test_a_vision_language_model_keeps_the_weight_in_its_text_config():
    student = nn.Identity()
    student.config = transformers.Qwen3VLMoeConfig(text_config={"router_aux_loss_coef": 0.25})
    assert aux_weight(student) == 0.25


def test_the_start_block_says_what_is_added_and_what_is_left_out(tmp_path, capsys):
    student = build("Mixtral")
    student.config.z_loss_coefficient = 0.001  # as Bamba's
    distillation("Mixtral", tmp_path, student=student, max_steps=1).train()
    printed = capsys.readouterr().out
    assert "[kd_trainer] the loss has 0.5 * the student's router loss (aux_loss) added" in printed
    assert "[kd_trainer] the student's own z-loss (z_loss_coefficient 0.001) is left out" in printed
    distillation("Mixtral", tmp_path, student=build("Mixtral", output_router_logits=False), max_steps=1).train()
    assert "aux_loss" not in capsys.readouterr().out


def test_a_teacher_computes_no_router_loss(tmp_path):
    run = distillation("Mixtral", tmp_path, teacher=build("Mixtral"), max_steps=1)
    run.train()
    teacher_outputs = []
    run.teacher.model.register_forward_hook(lambda *a: teacher_outputs.append(a[2]))
    run.evaluate()
    assert teacher_outputs
    assert all(outputs.get("aux_loss") is None for outputs in teacher_outputs)


# ---- refused ----


def nllb_moe() -> nn.Module:
    config = NllbMoeConfig(
        vocab_size=tiny.VOCAB, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_experts=4, encoder_sparse_step=2,
        decoder_sparse_step=2, pad_token_id=0, max_position_embeddings=32, output_router_logits=True,
    )  # fmt: skip
    return transformers.NllbMoeForConditionalGeneration(config)


def switch() -> nn.Module:
    config = SwitchTransformersConfig(
        vocab_size=tiny.VOCAB, d_model=16, d_ff=16, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, pad_token_id=0,
        decoder_start_token_id=0, output_router_logits=True, dropout_rate=0.0, router_jitter_noise=0.0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


@pytest.mark.parametrize("make", [nllb_moe, switch])
def test_an_encoder_decoder_is_refused_with_its_router_and_runs_without(make, tmp_path):
    torch.manual_seed(0)
    student, teacher = make(), make()
    kwargs = {
        "data_collator": tiny.pad,
        "train_dataset": tiny.rows("token_classification"),
        "eval_dataset": tiny.rows("token_classification", 9),
    }
    run = DistillationTrainer(model=student, teacher_model=teacher, args=arguments(tmp_path), **kwargs)
    message = (
        rf"`output_router_logits` is True; expected False in the config of the student {type(student).__name__}, "
        r"because an encoder-decoder adds its router loss to its own loss, which distillation replaces\. "
        r"Set model\.config\.output_router_logits to False"
    )
    with pytest.raises(ValueError, match=message):
        run.train()
    with pytest.raises(ValueError, match=message):
        run.evaluate()
    student.config.output_router_logits = False
    run.train()
    plain = transformers.Trainer(model=student, args=tiny.stock_arguments(tmp_path), **kwargs)
    run.kd_args.kd_alpha = 0.0
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


class WithAux(tiny.Plain):
    """A module of the user's own that returns an auxiliary loss and does not say what it weighs."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.linear(features), "aux_loss": features.square().mean()}


def test_an_auxiliary_loss_without_a_weight_is_refused(tmp_path):
    student = WithAux()
    run = tiny.trainer("plain", tmp_path, pair=(student, tiny.Plain()))
    batch = tiny.pad(tiny.rows("plain")[:4])
    with pytest.raises(ValueError, match=r"`router_aux_loss_coef` is None; expected the weight of the aux_loss that"):
        run.compute_loss(run.model, batch)
    student.router_aux_loss_coef = 2.0
    with_it = run.compute_loss(run.model, batch)
    student.router_aux_loss_coef = 0.0
    difference = with_it - run.compute_loss(run.model, batch)
    assert difference.item() == pytest.approx(2 * batch["features"].square().mean().item(), rel=1e-5)
