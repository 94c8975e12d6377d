"""Models of transformers' smaller lists: those that have a task train, those without class logits are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertForNextSentencePrediction,
    BertForPreTraining,
    CLIPConfig,
    CLIPModel,
    DetrConfig,
    DetrForObjectDetection,
    DPTConfig,
    DPTForDepthEstimation,
    ElectraConfig,
    ElectraForPreTraining,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    LayoutLMConfig,
    LayoutLMForQuestionAnswering,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    ResNetConfig,
    Swin2SRConfig,
    Swin2SRForImageSuperResolution,
    SwinConfig,
    Trainer,
    ViltConfig,
    ViltForQuestionAnswering,
    ViTForMaskedImageModeling,
    Wav2Vec2ForXVector,
    YolosConfig,
    YolosForObjectDetection,
)

from kd_trainer import DistillationTrainer
from kd_trainer.tasks.resolve import outputs_declared, task_for
from tests.helpers import tiny
from tests.helpers.tiny_generative import wav2vec2_config

LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {"hidden_size": 16, **LAYERS, "image_size": 8}


def without_type(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}


# ---- refused models, as a user meets them ----


def electra() -> nn.Module:
    return ElectraForPreTraining(ElectraConfig(**without_type(tiny.bert_config()), embedding_size=16))


def clip() -> nn.Module:
    text = {"vocab_size": tiny.VOCAB, "hidden_size": 16, **LAYERS, "max_position_embeddings": 32}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**VISION, "patch_size": 4}, projection_dim=8))


def bart_without_head() -> nn.Module:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartModel(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=tiny.VOCAB, **heads))


DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 3,
}  # fmt: skip


def detr() -> nn.Module:
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage4"])
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, use_timm_backbone=False, backbone=None, **DETR))


def swin() -> SwinConfig:
    names = [f"stage{i}" for i in range(1, 5)]
    return SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=names
    )


def maskformer() -> nn.Module:
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32}
    return MaskFormerForInstanceSegmentation(
        MaskFormerConfig(backbone_config=swin(), decoder_config=DetrConfig(**DETR), **sizes)
    )


def mask2former() -> nn.Module:
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32}
    layers = {"dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 1, "num_attention_heads": 2}
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=swin(), num_queries=3, **sizes, **layers)
    )


REFUSED: dict[str, tuple[Any, str, str]] = {
    "object detection": (
        lambda: YolosForObjectDetection(YolosConfig(**{**VISION, "image_size": [8, 8]}, patch_size=4)),
        "a YolosForObjectDetection for object detection",
        "pred_boxes",
    ),
    "object detection by queries": (detr, "a DetrForObjectDetection for object detection", "pred_boxes"),
    "instance segmentation": (
        maskformer,
        "a MaskFormerForInstanceSegmentation for segmentation",
        "masks_queries_logits",
    ),
    "universal segmentation": (
        mask2former,
        "a Mask2FormerForUniversalSegmentation for segmentation",
        "masks_queries_logits",
    ),
    "image to image": (
        lambda: Swin2SRForImageSuperResolution(
            Swin2SRConfig(image_size=16, embed_dim=8, depths=[1], num_heads=[1], window_size=4)
        ),
        "a Swin2SRForImageSuperResolution for image to image",
        "reconstruction",
    ),
    "depth": (
        lambda: DPTForDepthEstimation(DPTConfig(**VISION, patch_size=4, backbone_out_indices=[0, 0, 0, 0])),
        "a DPTForDepthEstimation for depth estimation",
        "predicted_depth",
    ),
    "masked images": (
        lambda: ViTForMaskedImageModeling(tiny.vit().config),
        "a ViTForMaskedImageModeling for masked image modelling",
        "reconstruction",
    ),
    "contrastive": (clip, "a CLIPModel for comparing images with texts", "logits_per_image"),
    "pretraining": (
        lambda: BertForPreTraining(tiny.bert_config()),
        "a BertForPreTraining for pretraining",
        "seq_relationship_logits",
    ),
    "one number a token": (electra, "a ElectraForPreTraining for pretraining", "logits"),
    "speakers": (
        lambda: Wav2Vec2ForXVector(wav2vec2_config(16)),
        "a Wav2Vec2ForXVector for speaker embeddings",
        "embeddings",
    ),
    "no output head": (bart_without_head, "a BartModel for hidden states", "encoder_last_hidden_state"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_class_logits_is_refused_with_what_it_offers(name, tmp_path):
    build, shown, offers = REFUSED[name]
    model, teacher = build(), build()
    assert offers in (outputs_declared(model) or ())
    with pytest.raises(ValueError, match=f"`model` is {shown}.*{offers}.*expected a model with class logits for one"):
        DistillationTrainer(model=model, teacher_model=teacher, args=tiny.arguments(tmp_path), train_dataset=[{}])
    with pytest.raises(ValueError, match=f"`model` is {shown}"):  # and where the teacher comes by path
        DistillationTrainer(model=model, teacher_model="nowhere", args=tiny.arguments(tmp_path), train_dataset=[{}])


@pytest.mark.parametrize(("build", "task"), [(maskformer, "semantic_segmentation"), (detr, "token_classification")])
def test_queries_are_no_classes_or_positions_under_any_task(build, task):
    """Query i of one model is not query i of another: their logits would fit by shape."""
    with pytest.raises(
        ValueError, match=r"`model` is a .* for .*segmentation|detection.*; expected a model with class"
    ):
        task_for(build(), task, False)


def test_a_module_of_ones_own_with_kd_task_is_the_way_out(tmp_path):
    class Kinds(nn.Module):
        """Two classes a token, of a model that gives one number for each."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = electra()

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.inner(input_ids).logits
            return {"logits": torch.stack([logits, -logits], -1)}

    data = [{"input_ids": torch.arange(1, 9), "labels": torch.randint(0, 2, (8,))} for _ in range(16)]
    args = tiny.arguments(tmp_path, kd_task="token_classification", max_steps=1)
    trainer = DistillationTrainer(model=Kinds(), teacher_model=Kinds(), args=args, train_dataset=data)
    trainer.train()
    assert tiny.logged(trainer, "soft_loss")[0] > 0


# ---- the smaller lists, trained ----


def layoutlm(hidden: int) -> nn.Module:
    names = {"id2label": {0: "start", 1: "end"}, "label2id": {"start": 0, "end": 1}}
    config = tiny.bert_config(hidden, **names)
    return LayoutLMForQuestionAnswering(LayoutLMConfig(**without_type(config), max_2d_position_embeddings=64))


def vilt(hidden: int) -> nn.Module:
    config = ViltConfig(
        **{**VISION, "hidden_size": hidden}, vocab_size=tiny.VOCAB, patch_size=4, max_position_embeddings=32,
        num_labels=4, max_image_length=-1, **tiny.NO_DROPOUT,
    )  # fmt: skip
    return ViltForQuestionAnswering(config)


def imagegpt(hidden: int) -> nn.Module:
    config = ImageGPTConfig(
        vocab_size=tiny.VOCAB, n_positions=32, n_embd=hidden, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.5,
    )  # fmt: skip
    return ImageGPTForCausalImageModeling(config)


def ids(generator: torch.Generator, top: int = tiny.VOCAB) -> torch.Tensor:
    return torch.randint(1, top, (8,), generator=generator)


def draw(generator: torch.Generator, high: int) -> int:
    return int(torch.randint(0, high, (1,), generator=generator))


def pixels(generator: torch.Generator) -> dict[str, Any]:
    x = ids(generator, tiny.VOCAB - 1)
    return {"input_ids": x, "labels": x.clone()}


TRAINED: dict[str, tuple[Any, Any, str]] = {
    "next sentence": (
        lambda h: BertForNextSentencePrediction(tiny.bert_config(h, id2label={0: "next", 1: "other"})),
        lambda g: {"input_ids": ids(g), "labels": draw(g, 2)},
        "classification",
    ),
    "documents": (
        layoutlm,
        lambda g: {
            "input_ids": ids(g), "bbox": torch.zeros(8, 4).long(), "start_positions": draw(g, 8), "end_positions": 7
        },
        "question_answering",
    ),
    "visual questions": (
        vilt,
        lambda g: {
            "input_ids": ids(g), "pixel_values": torch.randn(3, 8, 8, generator=g), "labels": torch.rand(4, generator=g)
        },
        "multi_label_classification",
    ),
    "pixels": (imagegpt, pixels, "causal_lm"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_the_smaller_lists_train_and_alpha_zero_is_the_stock_trainer(name, tmp_path):
    build, row, task = TRAINED[name]
    generator = torch.Generator().manual_seed(1)
    data = [row(generator) for _ in range(24)]

    def run(cls: Any, args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        trainer = cls(model=build(16), args=args, train_dataset=data, eval_dataset=data[:5], **kwargs)
        torch.manual_seed(0)  # ViLT draws its patches
        trainer.train()
        return trainer

    torch.manual_seed(1)
    teacher = build(24)
    expected = run(Trainer, tiny.stock_arguments(tmp_path, max_steps=3))
    args = tiny.arguments(tmp_path, max_steps=3, kd_alpha=0.0, kd_reduction="tokenmean")
    got = run(DistillationTrainer, args, teacher_model=teacher)
    assert got._plan.task.name == task
    assert tiny.logged(got, "loss") == pytest.approx(tiny.logged(expected, "loss"), rel=1e-4)
    assert torch.allclose(tiny.weights(got.model), tiny.weights(expected.model), atol=1e-5)
    mixed = run(DistillationTrainer, tiny.arguments(tmp_path, max_steps=2), teacher_model=teacher)
    assert tiny.logged(mixed, "soft_loss")[0] > 0
    assert mixed.evaluate()["eval_soft_loss"] > 0
    mixed.predict(data[:3])


def test_a_loss_that_knows_fewer_classes_than_the_logits_is_the_models_own(tmp_path):
    """Its forward fails on labels beyond its own classes, which the comparison of the losses tries."""

    class Margin(tiny.BertForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            outputs = super().forward(input_ids, attention_mask=attention_mask)
            if labels is not None:
                outputs.loss = 3 * nn.functional.cross_entropy(outputs.logits[:, :2], labels)
            return outputs

    data = [{**row, "labels": row["labels"] % 2} for row in tiny.rows("classification")]

    def student() -> nn.Module:
        torch.manual_seed(0)
        return Margin(tiny.bert_config(16, initializer_range=0.5))

    expected = Trainer(model=student(), args=tiny.stock_arguments(tmp_path), data_collator=tiny.pad, train_dataset=data)
    got = tiny.trainer("classification", tmp_path, pair=(student(), student()), data=data, kd_alpha=0.0)
    for trainer in (expected, got):
        trainer.train()
    assert tiny.logged(got, "loss") == pytest.approx(tiny.logged(expected, "loss"), rel=1e-4)
