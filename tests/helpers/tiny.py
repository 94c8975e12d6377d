"""Tiny models, data and runs that the trainer's tests share. Nothing here is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as models_of_tokens
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from kd_trainer import DistillationTrainer, DistillationTrainingArguments

VOCAB, CLASSES = 37, 5
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert_config(hidden: int = 16, **kwargs: Any) -> BertConfig:
    names = {i: f"class {i}" for i in range(CLASSES)}
    return BertConfig(
        hidden_size=hidden,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
        pad_token_id=0,
        **{
            "vocab_size": VOCAB,
            "num_hidden_layers": 1,
            "id2label": names,
            "label2id": {v: k for k, v in names.items()},
            **NO_DROPOUT,
            **kwargs,
        },
    )


def llama_config(hidden: int = 16, **kwargs: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "initializer_range": 0.5,
            **kwargs,
        }
    )


def vit(image_size: int = 8, **kwargs: Any) -> ViTForImageClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {**sizes, "image_size": image_size, "patch_size": 4, "num_labels": CLASSES, **kwargs}
    return ViTForImageClassification(ViTConfig(**config))


class Plain(nn.Module):
    """A student of the user's own: no config, no labels in its forward; gives a tensor, a tuple or a dict."""

    def __init__(self, gives: str = "tensor", features: int = 6, classes: int = CLASSES) -> None:
        super().__init__()
        self.linear, self.gives = nn.Linear(features, classes), gives

    def forward(self, features: torch.Tensor) -> Any:
        logits = self.linear(features)
        return {"tensor": logits, "tuple": (logits, features.sum(-1, keepdim=True)), "dict": {"logits": logits}}[
            self.gives
        ]


def models(task: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """(student, teacher) of a task, always the same weights for a seed."""
    torch.manual_seed(seed)
    if task == "classification":
        build = lambda h: BertForSequenceClassification(bert_config(h, initializer_range=0.5))  # noqa: E731
    elif task == "multi_label_classification":
        config = {"initializer_range": 0.5, "problem_type": task}
        build = lambda h: BertForSequenceClassification(bert_config(h, **config))  # noqa: E731
    elif task == "regression":
        config = {"initializer_range": 0.5, "id2label": {0: "score"}, "label2id": {"score": 0}}
        build = lambda h: BertForSequenceClassification(bert_config(h, **config))  # noqa: E731
    elif task == "question_answering":
        config = {"initializer_range": 0.5, "id2label": {0: "start", 1: "end"}, "label2id": {"start": 0, "end": 1}}
        build = lambda h: BertForQuestionAnswering(bert_config(h, **config))  # noqa: E731
    elif task == "token_classification":
        build = lambda h: BertForTokenClassification(bert_config(h, initializer_range=0.5))  # noqa: E731
    elif task == "causal_lm":
        build = lambda h: LlamaForCausalLM(llama_config(h))  # noqa: E731
    elif task == "embedding":
        config = bert_config(16, initializer_range=0.5)
        return BertModel(config), BertModel(config)
    else:
        assert task == "plain"
        return Plain(), Plain()
    return build(16), build(24)


def rows(task: str, count: int = 32, seed: int = 1) -> list[dict[str, Any]]:
    """Rows of unequal length with unequal numbers of labels; for "plain" [features, labels] rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    made = []
    for _ in range(count):
        if task == "plain":
            x = torch.randn(6, generator=generator)
            made.append({"features": x, "labels": int(draw(0, CLASSES, 1))})
            continue
        length = int(draw(3, 15, 1))
        ids = draw(1, VOCAB, length)
        row: dict[str, Any] = {"input_ids": ids.tolist(), "attention_mask": [1] * length}
        if task == "embedding":
            made.append(row)
            continue
        if task == "classification":
            row["labels"] = int(draw(0, CLASSES, 1))
        elif task == "multi_label_classification":
            row["labels"] = draw(0, 2, CLASSES).float().tolist()
        elif task == "regression":
            row["labels"] = float(torch.randn((), generator=generator))
        elif task == "question_answering":
            row["start_positions"], row["end_positions"] = int(draw(0, length, 1)), int(draw(0, length, 1))
            for name in ("input_ids", "attention_mask"):  # to a fixed length: upstream's loss is over the padding too
                row[name] = row[name] + [0] * (16 - length)
        else:
            labels = ids.clone() if task == "causal_lm" else draw(0, CLASSES, length)
            labels[torch.rand(length, generator=generator) < 0.4] = -100
            row["labels"] = labels.tolist()
        made.append(row)
    return made


class _Pad:
    """Pads the text columns of a batch on the right; labels with -100, everything else with 0."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {}
        for key in features[0]:
            values = [torch.as_tensor(f[key]) for f in features]
            if values[0].dim() == 1 and key != "features":
                fill = -100 if key == "labels" else 0
                batch[key] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
            else:
                batch[key] = torch.stack(values)
        return batch


pad = _Pad()


def byte_level_tokenizer(texts: list[str], vocab_size: int, special: list[str], **kwargs: Any) -> Any:
    """A byte-level BPE tokenizer, trained on the spot; `kwargs` of `PreTrainedTokenizerFast`."""
    made = Tokenizer(models_of_tokens.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **kwargs)


def arguments(output_dir: str | Path, **kwargs: Any) -> DistillationTrainingArguments:
    """SGD (Adam hides errors of scale), no clipping, rows in order, on CPU."""
    return DistillationTrainingArguments(output_dir=str(output_dir), **{**_BASE, **kwargs})


def stock_arguments(output_dir: str | Path, **kwargs: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(output_dir), **{**_BASE, **kwargs})


_BASE: dict[str, Any] = {
    "use_cpu": True,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 4,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
}


def trainer(task: str, output_dir: str | Path, *, data: Any = None, pair: Any = None, **kwargs: Any) -> Any:
    """A DistillationTrainer on the tiny pair of a task; `kwargs` are training arguments."""
    student, teacher = pair or models(task)
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments(output_dir, **kwargs),
        data_collator=pad,
        train_dataset=rows(task) if data is None else data,
        eval_dataset=rows(task, 21, seed=2),
    )


def stock_trainer(task: str, output_dir: str | Path, **kwargs: Any) -> Trainer:
    return Trainer(
        model=models(task)[0],
        args=stock_arguments(output_dir, **kwargs),
        data_collator=pad,
        train_dataset=rows(task),
        eval_dataset=rows(task, 21, seed=2),
    )


def weights(model: nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


LOGGED = ("loss", "soft_loss", "hard_loss", "teacher_agreement")


def logs(trainer: Any) -> dict[str, list[float]]:
    """The loss and its parts, log by log."""
    return {key: logged(trainer, key) for key in LOGGED}


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]
