"""Inputs that a forward takes through `**kwargs`: what the stock Trainer passes is passed, for student and teacher."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EncoderDecoderModel,
    PreTrainedModel,
    Trainer,
)

from kd_trainer import DistillationTrainer
from kd_trainer.tasks.inputs import accepted_inputs
from tests.helpers import tiny


class Open(BertForSequenceClassification):
    """A subclass that names its first input alone."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


class Around(PreTrainedModel):
    """A model of the user's own around another one; nothing is named."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.inner = BertForSequenceClassification(config)
        self.post_init()

    def forward(self, **kwargs):
        return self.inner(**kwargs)


def bert(cls: Any, seed: int = 0, hidden: int = 16) -> Any:
    torch.manual_seed(seed)
    return cls(tiny.bert_config(hidden, initializer_range=0.5))


def encoder_decoder(seed: int = 0) -> EncoderDecoderModel:
    torch.manual_seed(seed)
    config = {"initializer_range": 0.5}
    decoder = tiny.bert_config(is_decoder=True, add_cross_attention=True, **config)
    model = EncoderDecoderModel(encoder=BertModel(tiny.bert_config(**config)), decoder=BertLMHeadModel(decoder))
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def texts(count: int = 16) -> list[dict[str, Any]]:
    """Rows with token types, which change BERT's outputs."""
    made = tiny.rows("classification", count)
    return [row | {"token_type_ids": [i % 2 for i in range(len(row["input_ids"]))]} for row in made]


def pairs(count: int = 16) -> list[dict[str, Any]]:
    return [row | {"labels": row["input_ids"][:5]} for row in texts(count)]


MODELS = {
    "subclass": (lambda seed: bert(Open, seed), texts),
    "around": (lambda seed: bert(Around, seed), texts),
    "encoder-decoder": (encoder_decoder, pairs),
}


def build(name: str, folder: Any, *, stock: bool = False, teacher: Any = None, data: Any = None, **fields: Any) -> Any:
    builder, rows = MODELS[name]
    fields = {"max_steps": 3, "per_device_train_batch_size": 4, **fields}
    data = rows() if data is None else data
    given = {"model": builder(0), "train_dataset": data, "eval_dataset": data, "data_collator": tiny.pad}
    if stock:
        return Trainer(args=tiny.stock_arguments(folder, **fields), **given)
    fields = {"kd_alpha": 0.0, "kd_reduction": "tokenmean", **fields}
    return DistillationTrainer(args=tiny.arguments(folder, **fields), teacher_model=teacher, **given)


@pytest.mark.parametrize("name", MODELS)
def test_kd_alpha_0_is_the_stock_trainer(name, tmp_path):
    stock, own = build(name, tmp_path, stock=True), build(name, tmp_path)
    for trainer in (stock, own):
        trainer.train()
    assert tiny.logged(own, "loss") == pytest.approx(tiny.logged(stock, "loss"), rel=1e-5)
    torch.testing.assert_close(tiny.weights(own.model), tiny.weights(stock.model), rtol=1e-5, atol=1e-6)
    if name != "around":  # upstream finds no label in its signature, and evaluates without a loss
        assert own.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_teacher_reads_all_of_its_inputs(name, tmp_path):
    builder, rows = MODELS[name]
    teacher = builder(7)
    trainer = build(name, tmp_path, teacher=teacher, kd_alpha=1.0, kd_temperature=1.0, max_steps=1)
    trainer.train()
    batch, student = tiny.pad(rows()[:4]), builder(0)
    with torch.no_grad():
        q, p = (m.train(m is student)(**batch).logits.double().log_softmax(-1) for m in (student, teacher))
    nats = (p.exp() * (p - q)).sum(-1)
    if name == "encoder-decoder":
        nats = nats[batch["labels"] != -100]
    assert tiny.logged(trainer, "soft_loss")[0] == pytest.approx(nats.mean().item(), rel=1e-5)


def test_columns_that_upstream_removes_stay_away_from_the_student(tmp_path):
    """A column of the data that only the teacher names is kept for it; the stock Trainer's student has none."""
    data = datasets.Dataset.from_list(texts())
    fields = {"remove_unused_columns": True}
    teacher = tiny.models("classification", seed=5)[1]
    stock = build("subclass", tmp_path, stock=True, data=data, **fields)
    own = build("subclass", tmp_path, data=data, teacher=teacher, **fields)
    for trainer in (stock, own):
        trainer.train()
    assert tiny.logged(own, "loss") == pytest.approx(tiny.logged(stock, "loss"), rel=1e-5)
    distilled = build("subclass", tmp_path, data=data, teacher=teacher, kd_alpha=1.0, kd_temperature=1.0, **fields)
    distilled.train()
    batch, student = tiny.pad(texts()[:4]), bert(Open)
    with torch.no_grad():
        q = student(batch["input_ids"]).logits.double().log_softmax(-1)
        p = teacher.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits.double().log_softmax(-1)
    nats = (p.exp() * (p - q)).sum(-1).mean()
    assert tiny.logged(distilled, "soft_loss")[0] == pytest.approx(nats.item(), rel=1e-5)


def test_another_models_column_reaches_no_model_of_transformers():
    """DistilBERT and Llama take `**kwargs` and have no token types; the parts of a composite model have."""
    config = DistilBertConfig(vocab_size=37, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32)
    for model in (DistilBertForSequenceClassification(config), tiny.models("causal_lm")[0]):
        accepted = accepted_inputs(model)
        assert not accepted.take("token_type_ids")
        assert accepted.take("attention_mask")
    accepted = accepted_inputs(encoder_decoder())
    assert {"token_type_ids", "decoder_token_type_ids", "decoder_attention_mask"} <= accepted
    assert not accepted.take("labels")
    assert not accepted.take("teacher_input_ids")


def test_a_patched_forward_takes_what_it_took(tmp_path):
    model = tiny.models("classification")[0]
    forward = model.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.forward = patched
    assert accepted_inputs(model).take("token_type_ids")
    assert not accepted_inputs(model).take("labels")
    assert accepted_inputs(nn.Linear(2, 2)) == {"input"}
