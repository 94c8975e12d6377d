"""Tiny models that write text about speech, images and text, and rows for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    BertConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Florence2Config,
    Florence2ForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SpeechEncoderDecoderConfig,
    SpeechEncoderDecoderModel,
    T5Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.helpers import tiny

IMAGE, VISION_START, VISION_END = 5, 3, 4
FIRST = 6  # ids below are special
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert(hidden: int, **kwargs: Any) -> BertConfig:
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": hidden, "max_position_embeddings": 32, "pad_token_id": 0}
    return BertConfig(**{**sizes, **LAYERS, "initializer_range": 0.5, **tiny.NO_DROPOUT, **kwargs})


def wav2vec2_config(hidden: int, **kwargs: Any) -> Wav2Vec2Config:
    """Frames of 16 samples; no dropout, no masking."""
    still = ("layerdrop", "hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")
    return Wav2Vec2Config(
        **{
            "hidden_size": hidden, **LAYERS, "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4),
            "num_feat_extract_layers": 2, "feat_extract_norm": "layer", "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "final_dropout": 0.0,
            **dict.fromkeys(still, 0.0), **kwargs,
        }
    )  # fmt: skip


def _with_special_ids(model: Any) -> nn.Module:
    for name, value in SPECIAL.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    return model


def _decoder(hidden: int) -> BertConfig:
    return bert(hidden, is_decoder=True, add_cross_attention=True)


def whisper(hidden: int = 16) -> nn.Module:
    config = WhisperConfig(
        vocab_size=tiny.VOCAB, d_model=hidden, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=10,
        max_target_positions=32, bos_token_id=1, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        init_std=0.5, suppress_tokens=None, begin_suppress_tokens=None, **SPECIAL,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def images_to_text(hidden: int = 16) -> nn.Module:
    images = ViTConfig(hidden_size=hidden, image_size=8, patch_size=4, **LAYERS, **tiny.NO_DROPOUT)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(images, _decoder(hidden))
    return _with_special_ids(VisionEncoderDecoderModel(config))


def speech_to_text(hidden: int = 16) -> nn.Module:
    config = SpeechEncoderDecoderConfig.from_encoder_decoder_configs(wav2vec2_config(hidden), _decoder(hidden))
    return _with_special_ids(SpeechEncoderDecoderModel(config))


def text_to_text(hidden: int = 16) -> nn.Module:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(bert(hidden), _decoder(hidden))
    return _with_special_ids(EncoderDecoderModel(config))


def llava(hidden: int = 16) -> nn.Module:
    images = CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, attention_dropout=0.0, **LAYERS)
    config = LlavaConfig(
        vision_config=images, text_config=tiny.llama_config(hidden), image_token_id=IMAGE, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config)


def qwen2_vl(hidden: int = 16) -> nn.Module:
    text = {
        "vocab_size": tiny.VOCAB, "hidden_size": hidden, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, hidden // 4 - 2], "rope_theta": 10000.0},
        "initializer_range": 0.5, "pad_token_id": 0, **LAYERS,
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2, "hidden_size": hidden}
    config = Qwen2VLConfig(
        text_config=text, vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=IMAGE, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, video_token_id=2,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def smolvlm(hidden: int = 16) -> nn.Module:
    vision = {"hidden_size": 16, "image_size": 8, "patch_size": 2, **LAYERS}
    config = SmolVLMConfig(
        vision_config=vision, text_config=tiny.llama_config(hidden, max_position_embeddings=64).to_dict(),
        image_token_id=IMAGE, scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return SmolVLMForConditionalGeneration(config)


def git(hidden: int = 16) -> nn.Module:
    vision = {"hidden_size": 16, "image_size": 8, "patch_size": 4, **LAYERS}
    config = GitConfig(
        vision_config=vision, vocab_size=tiny.VOCAB, hidden_size=hidden, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.5, **LAYERS, **tiny.NO_DROPOUT,
    )  # fmt: skip
    return GitForCausalLM(config)


def florence2(hidden: int = 16) -> nn.Module:
    """An encoder-decoder whose start token stands in the config of its text model alone."""
    layers = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    text = {
        "vocab_size": tiny.VOCAB, "d_model": hidden, **dict(zip(layers, (1, 1, 2, 2), strict=True)),
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0, "max_position_embeddings": 64,
        "bos_token_id": 3, "init_std": 0.5, **SPECIAL,
    }  # fmt: skip
    vision = {
        "embed_dim": [16] * 4, "depths": [1] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4, "window_size": 2,
        "projection_dim": hidden, "drop_path_rate": 0.0,
    }  # fmt: skip
    return Florence2ForConditionalGeneration(
        Florence2Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )


def blip2_t5(hidden: int = 16) -> nn.Module:
    """Decoder or encoder-decoder by its language model; its own config has neither."""
    vision = {"hidden_size": hidden, "image_size": 8, "patch_size": 4, **LAYERS}
    qformer = {"vocab_size": tiny.VOCAB, "hidden_size": hidden, "encoder_hidden_size": hidden, **LAYERS}
    text = T5Config(
        vocab_size=tiny.VOCAB, d_model=hidden, d_ff=32, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config={**qformer, "cross_attention_frequency": 1, **tiny.NO_DROPOUT},
        text_config=text.to_dict(), num_query_tokens=4, image_token_index=IMAGE, image_token_id=IMAGE,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():  # its query tokens begin as zeros, which explode in tiny layers
        parameter.requires_grad_(name.startswith("language_model"))
    return model


def paligemma(hidden: int = 16) -> nn.Module:
    vision = {"hidden_size": 16, "image_size": 8, "patch_size": 4, "projection_dim": hidden, **LAYERS}
    text = {
        "model_type": "gemma", "vocab_size": tiny.VOCAB, "hidden_size": hidden, "head_dim": 8, "pad_token_id": 0,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.5, **LAYERS,
    }  # fmt: skip
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, projection_dim=hidden, hidden_size=hidden
    )
    return PaliGemmaForConditionalGeneration(config)


Draw = Callable[[torch.Generator], torch.Tensor]


def _ids(length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(FIRST, tiny.VOCAB, (length,), generator=generator)


def _length(generator: torch.Generator) -> int:
    return int(torch.randint(3, 9, (1,), generator=generator))


def encoded_rows(name: str, draw: Draw) -> Callable[[int, int], list[dict[str, Any]]]:
    """Rows of an encoder-decoder: one input of the encoder and labels of unequal length."""

    def rows(count: int = 24, seed: int = 1) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        return [{name: draw(generator), "labels": _ids(_length(generator), generator)} for _ in range(count)]

    return rows


def image_rows(places: int, images: Callable[[torch.Generator], dict[str, torch.Tensor]]) -> Any:
    """Rows of a decoder: `places` image tokens, then text; labels are the text after its first token."""

    def rows(count: int = 24, seed: int = 1) -> list[dict[str, Any]]:
        generator, made = torch.Generator().manual_seed(seed), []
        for _ in range(count):
            before = [VISION_START, *[IMAGE] * places, VISION_END] if places else [VISION_END]
            ids = torch.cat([torch.tensor(before), _ids(_length(generator), generator)])
            labels = ids.clone()
            labels[: len(before) + 1] = -100
            made.append(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **images(generator)}
            )
        return made

    return rows


def pixels(*shape: int) -> Callable[[torch.Generator], dict[str, torch.Tensor]]:
    return lambda generator: {"pixel_values": torch.randn(*shape, generator=generator)}


def written_rows(places: int, images: Any) -> Any:
    """Rows of an encoder-decoder that reads images and text: labels of a length of their own."""

    def rows(count: int = 24, seed: int = 1) -> list[dict[str, Any]]:
        made = image_rows(places, images)(count, seed)
        return [{**row, "labels": row["labels"][places + 3 :]} for row in made]

    return rows


def patches(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """16 flattened patches of Qwen2-VL, merged to 4 places."""
    return {
        "pixel_values": torch.randn(16, 3 * 2 * 2 * 2, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads text; flattened patches of all images stand one after the other, as Qwen2-VL's processor has them."""
    if "image_grid_thw" not in features[0]:
        batch = tiny.pad(features)
        if "input_ids" in batch and batch["labels"].shape == batch["input_ids"].shape:  # what PaliGemma trains with
            batch["token_type_ids"] = (batch["labels"] != -100).long()
        return batch
    flat = {name: torch.cat([f[name] for f in features]) for name in ("pixel_values", "image_grid_thw")}
    text = tiny.pad([{k: v for k, v in f.items() if k not in flat} for f in features])
    types = (text["input_ids"] == IMAGE).int()
    return {**flat, **text, "mm_token_type_ids": types}


class Kind(NamedTuple):
    build: Callable[[int], nn.Module]
    rows: Callable[..., list[dict[str, Any]]]
    task: str
    auto_class: str


KINDS = {
    "whisper": Kind(
        whisper, encoded_rows("input_features", lambda g: torch.randn(8, 20, generator=g)), "seq2seq_lm",
        "AutoModelForSpeechSeq2Seq",
    ),
    "speech-encoder-decoder": Kind(
        speech_to_text, encoded_rows("input_values", lambda g: torch.randn(200, generator=g)), "seq2seq_lm",
        "AutoModelForSpeechSeq2Seq",
    ),
    "vision-encoder-decoder": Kind(
        images_to_text, encoded_rows("pixel_values", lambda g: torch.randn(3, 8, 8, generator=g)), "seq2seq_lm",
        "AutoModelForImageTextToText",
    ),
    "encoder-decoder": Kind(
        text_to_text, encoded_rows("input_ids", lambda g: _ids(7, g)), "seq2seq_lm", "AutoModelForSeq2SeqLM"
    ),
    "llava": Kind(llava, image_rows(4, pixels(3, 8, 8)), "causal_lm", "AutoModelForImageTextToText"),
    "qwen2_vl": Kind(qwen2_vl, image_rows(4, patches), "causal_lm", "AutoModelForImageTextToText"),
    "florence2": Kind(
        florence2, written_rows(2, pixels(3, 32, 32)), "seq2seq_lm", "AutoModelForImageTextToText"
    ),
    "blip2-t5": Kind(blip2_t5, written_rows(4, pixels(3, 8, 8)), "seq2seq_lm", "AutoModelForImageTextToText"),
    "paligemma": Kind(paligemma, image_rows(4, pixels(3, 8, 8)), "causal_lm", "AutoModelForImageTextToText"),
    "smolvlm": Kind(smolvlm, image_rows(4, pixels(1, 3, 8, 8)), "causal_lm", "AutoModelForImageTextToText"),
}  # fmt: skip


def pair(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    build = KINDS[name].build
    return build(16), build(24)
