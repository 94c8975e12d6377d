"""`kd_alpha=0` is the stock Trainer: losses and weights after 20 steps, for model classes of every task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, Trainer

from kd_trainer import DistillationTrainer, MLPConfig, MLPForImageClassification
from tests.helpers import tiny
from tests.training import test_own_loss

STEPS = 20
TEXT = {
    "vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40, "type_vocab_size": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": tiny.CLASSES, "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0, "dropout": 0.0,
    "activation_dropout": 0.0, "embedding_size": 16, "head_dim": 8,
}  # fmt: skip
PAIRS = {
    **TEXT, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "dropout_rate": 0.0, "decoder_start_token_id": 1, "init_std": 0.2,
}  # fmt: skip
GPT = {**TEXT, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "n_inner": 32, "attn_pdrop": 0.0,
       "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # fmt: skip
DISTIL = {**TEXT, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "seq_classif_dropout": 0.0,
          "qa_dropout": 0.0}  # fmt: skip
IMAGE = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32, "num_labels": tiny.CLASSES}  # fmt: skip
WIDE = {"num_labels": tiny.CLASSES, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "embedding_size": 8}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2,
        "num_labels": tiny.CLASSES, "drop_path_rate": 0.0}  # fmt: skip
SOUND = {**TEXT, "conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [4, 2], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
         "feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0, "hidden_dropout": 0.0,
         "ctc_loss_reduction": "mean", "ctc_zero_infinity": True}  # fmt: skip
WHISPER = {**PAIRS, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 40, "encoder_layerdrop": 0.0,
           "decoder_layerdrop": 0.0, "use_cache": False}  # fmt: skip


def tokens(kind: str) -> Callable[[], list[dict[str, Any]]]:
    return lambda: tiny.rows(kind, 40)


def masked() -> list[dict[str, Any]]:
    return [row | {"labels": [i if n % 3 else -100 for n, i in enumerate(row["input_ids"])]} for row in texts(40)]


def texts(count: int) -> list[dict[str, Any]]:
    return [{k: row[k] for k in ("input_ids", "attention_mask")} for row in tiny.rows("causal_lm", count)]


def ended() -> list[dict[str, Any]]:
    """Each text has one end, where BART's classifier looks."""
    made = tiny.rows("classification", 40)
    return [row | {"input_ids": [max(i, 3) for i in row["input_ids"][:-1]] + [2]} for row in made]


def translations() -> list[dict[str, Any]]:
    return [row | {"labels": row["input_ids"][:6]} for row in texts(40)]


def pixels(size: int, channels: int = 3) -> Callable[[], list[dict[str, Any]]]:
    def made() -> list[dict[str, Any]]:
        drawn = torch.Generator().manual_seed(0)
        images = torch.randn(40, channels, size, size, generator=drawn)
        labels = torch.randint(tiny.CLASSES, (40,), generator=drawn)
        return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]

    return made


def sounds(words: bool) -> Callable[[], list[dict[str, Any]]]:
    def made() -> list[dict[str, Any]]:
        drawn = torch.Generator().manual_seed(0)
        waves = torch.randn(40, 400, generator=drawn)
        labels = torch.randint(1, tiny.CLASSES, (40, 3), generator=drawn)
        return [
            {"input_values": w, "labels": y.tolist() if words else int(y[0])}
            for w, y in zip(waves, labels, strict=True)
        ]

    return made


def speech() -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(0)
    features = torch.randn(40, 4, 16, generator=drawn)
    return [{"input_features": x, "labels": row["input_ids"][:6]} for x, row in zip(features, texts(40), strict=True)]


def choices() -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(1, tiny.VOCAB, (40, 3, 7), generator=drawn)
    labels = torch.randint(3, (40,), generator=drawn)
    return [
        {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": int(y)}
        for x, y in zip(ids, labels, strict=True)
    ]


# class -> (model type, sizes, rows)
CLASSES: dict[str, tuple[str, dict[str, Any], Callable[[], list[dict[str, Any]]]]] = {
    "BertForSequenceClassification": ("bert", TEXT, tokens("classification")),
    "DistilBertForSequenceClassification": ("distilbert", DISTIL, tokens("classification")),
    "RobertaForSequenceClassification": ("roberta", TEXT, tokens("classification")),
    "AlbertForSequenceClassification": ("albert", TEXT, tokens("classification")),
    "ElectraForSequenceClassification": ("electra", TEXT, tokens("classification")),
    "DebertaV2ForSequenceClassification": ("deberta-v2", {**TEXT, "pooler_hidden_size": 16}, tokens("classification")),
    "GPT2ForSequenceClassification": ("gpt2", GPT, tokens("classification")),
    "LlamaForSequenceClassification": ("llama", TEXT, tokens("classification")),
    "BartForSequenceClassification": ("bart", PAIRS, ended),
    "BertForTokenClassification": ("bert", TEXT, tokens("token_classification")),
    "RobertaForTokenClassification": ("roberta", TEXT, tokens("token_classification")),
    "XLMRobertaForTokenClassification": ("xlm-roberta", TEXT, tokens("token_classification")),
    "BertForQuestionAnswering": ("bert", {**TEXT, "num_labels": 2}, tokens("question_answering")),
    "DistilBertForQuestionAnswering": ("distilbert", {**DISTIL, "num_labels": 2}, tokens("question_answering")),
    "BertForMultipleChoice": ("bert", TEXT, choices),
    "BertForMaskedLM": ("bert", TEXT, masked),
    "RobertaForMaskedLM": ("roberta", TEXT, masked),
    "DistilBertForMaskedLM": ("distilbert", DISTIL, masked),
    "GPT2LMHeadModel": ("gpt2", GPT, tokens("causal_lm")),
    "LlamaForCausalLM": ("llama", TEXT, tokens("causal_lm")),
    "Qwen2ForCausalLM": ("qwen2", TEXT, tokens("causal_lm")),
    "MistralForCausalLM": ("mistral", TEXT, tokens("causal_lm")),
    "Gemma2ForCausalLM": ("gemma2", TEXT, tokens("causal_lm")),
    "OPTForCausalLM": ("opt", {**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16}, tokens("causal_lm")),
    "GPTNeoXForCausalLM": ("gpt_neox", TEXT, tokens("causal_lm")),
    "BartForCausalLM": ("bart", {**PAIRS, "is_decoder": True, "is_encoder_decoder": False}, tokens("causal_lm")),
    "T5ForConditionalGeneration": ("t5", PAIRS, translations),
    "BartForConditionalGeneration": ("bart", PAIRS, translations),
    "MarianMTModel": ("marian", {**PAIRS, "decoder_vocab_size": tiny.VOCAB}, translations),
    "PegasusForConditionalGeneration": ("pegasus", PAIRS, translations),
    "WhisperForConditionalGeneration": ("whisper", WHISPER, speech),
    "ViTForImageClassification": ("vit", IMAGE, pixels(8)),
    "DeiTForImageClassification": ("deit", IMAGE, pixels(8)),
    "ResNetForImageClassification": ("resnet", WIDE, pixels(32)),
    "ConvNextForImageClassification": ("convnext", WIDE, pixels(32)),
    "SwinForImageClassification": ("swin", SWIN, pixels(16)),
    "Wav2Vec2ForSequenceClassification": ("wav2vec2", SOUND, sounds(words=False)),
}
OWN = ["weighted", "focal", "penalised", "weighted tags", "by items", "tuple"]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, sizes, _ = CLASSES[name]
    config = AutoConfig.for_model(kind)
    for key, value in sizes.items():  # each config has some of them
        if hasattr(config, key) or key in ("decoder_start_token_id", "pooler_hidden_size"):
            setattr(config, key, value)
    return getattr(transformers, name)(config)


def trained(model: nn.Module, rows: list[dict[str, Any]], folder: Any, *, stock: bool) -> Any:
    """After 20 steps on rows in order; `model` is copied."""
    fields = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.02}
    given = {"model": copy.deepcopy(model), "train_dataset": rows, "eval_dataset": rows[:9], "data_collator": tiny.pad}
    if stock:
        trainer: Any = Trainer(args=tiny.stock_arguments(folder, **fields), **given)
    else:
        args = tiny.arguments(folder, kd_alpha=0.0, kd_reduction="tokenmean", **fields)
        trainer = DistillationTrainer(args=args, **given)
    torch.manual_seed(1)
    trainer.train()
    return trainer


def assert_stock(model: nn.Module, rows: list[dict[str, Any]], folder: Any) -> Any:
    stock, own = (trained(model, rows, folder, stock=stock) for stock in (True, False))
    losses = tiny.logged(stock, "loss")
    assert len(losses) == STEPS
    assert losses[-1] != losses[0]
    assert tiny.logged(own, "loss") == pytest.approx(losses, rel=1e-5, abs=1e-5)
    weights: list[Tensor] = [tiny.weights(each.model) for each in (own, stock)]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)
    assert own.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)
    return own


@pytest.mark.trains
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_transformers(name, tmp_path):
    own = assert_stock(build(name), CLASSES[name][2](), tmp_path)
    assert not own._plan.own_loss


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_other_kinds_of_labels(kind, tmp_path):
    assert_stock(tiny.models(kind)[0], tiny.rows(kind, 40), tmp_path)


@pytest.mark.trains
@pytest.mark.parametrize("name", OWN)
def test_a_loss_of_its_own(name, tmp_path):
    own = assert_stock(test_own_loss.built(name), tiny.rows(test_own_loss.MODELS[name][1], 40), tmp_path)
    assert own._plan.own_loss


def test_the_packages_own_model(tmp_path):
    torch.manual_seed(0)
    model = MLPForImageClassification(MLPConfig(num_features=6, hidden_sizes=[8], num_labels=tiny.CLASSES))
    assert_stock(model, [{"features": r["features"], "labels": r["labels"]} for r in tiny.rows("plain", 40)], tmp_path)
