"""`trainer.check()` and `kd_run` "check": every result once, the numbers in them, and that nothing is left behind."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from rich.console import Console
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from kd_trainer import DistillationTrainer
from kd_trainer.diagnostics import trial
from kd_trainer.diagnostics.advice import about_teacher, newly_initialised
from kd_trainer.diagnostics.results import CheckResult, has_errors, print_results, refused
from kd_trainer.teachers.errors import positions_of
from kd_trainer.teachers.live import ADAPTER_OFF, LiveTeacher
from tests.helpers import backend_run, launch, tiny
from tests.helpers.script_process import end_of_script
from tests.tasks import test_seq2seq
from tests.teachers import test_compatibility
from tests.training import test_aux_loss as test_moe

CHECK = {"kd_run": "check"}


def row_of(results: list[CheckResult], what: str, status: str | None = None) -> CheckResult:
    rows = [f for f in results if f.what == what and status in (None, f.status)]
    assert rows, f"no row {what!r} among {results}"
    return rows[0]


def build(output_dir: Any, pair: Any, data: Any, **kwargs: Any) -> Any:
    own = {name: kwargs.pop(name) for name in ("processing_class", "eval_dataset", "data_collator") if name in kwargs}
    own.setdefault("data_collator", tiny.pad)
    return DistillationTrainer(
        model=pair[0], teacher_model=pair[1], args=tiny.arguments(output_dir, **kwargs), train_dataset=data, **own
    )


class Case(NamedTuple):
    """A trainer and the row that its check must have."""

    trainer: Callable[[Any], Any]
    status: str
    what: str
    found: str  # a pattern
    fix: str  # a pattern


CASES: dict[str, Case] = {}


def case(status: str, what: str, found: str, fix: str = ""):
    def add(trainer):
        CASES[trainer.__name__.replace("_", " ")] = Case(trainer, status, what, found, fix)
        return trainer

    return add


# ---- what the constructor refuses, in a table ----


@case("error", "setup", "class 'class 0' has id 4; expected id 0", "kd_remap_labels to true")
def permuted_labels(tmp_path):
    names = {i: f"class {4 - i}" for i in range(5)}
    config = tiny.bert_config(24, id2label=names, label2id={v: k for k, v in names.items()})
    pair = tiny.models("classification")[0], BertForSequenceClassification(config)
    return tiny.trainer("classification", tmp_path, pair=pair, **CHECK)


@case("error", "setup", "a model with 3 classes", "the same num_labels")
def other_numbers_of_classes(tmp_path):
    teacher = BertForSequenceClassification(tiny.bert_config(24, id2label=None, label2id=None, num_labels=3))
    pair = tiny.models("classification")[0], teacher
    return tiny.trainer("classification", tmp_path, pair=pair, **CHECK)


@case("error", "setup", "newly initialised and teach noise: classifier", "Fine-tune the teacher first")
def a_teacher_by_path_without_a_head(tmp_path):
    BertModel(tiny.bert_config()).save_pretrained(tmp_path / "body")
    pair = tiny.models("classification")[0], str(tmp_path / "body")
    return tiny.trainer("classification", tmp_path, pair=pair, **CHECK)


@case("error", "setup", "`teacher_model` is None; expected a teacher", "Pass teacher_model=")
def no_teacher(tmp_path):
    return tiny.trainer("plain", tmp_path, pair=(tiny.Plain(), None), **CHECK)


@case("error", "setup", "the student itself", "copy.deepcopy")
def the_student_as_teacher(tmp_path):
    student = tiny.Plain()
    return tiny.trainer("plain", tmp_path, pair=(student, student), **CHECK)


# ---- the models ----


def frozen(model: nn.Module, names: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not re.search(names, name))
    return model


@case("error", "trained", "no parameter of the student requires a gradient", "requires_grad_")
def a_frozen_student(tmp_path):
    return tiny.trainer("plain", tmp_path, pair=(frozen(tiny.Plain(), ""), tiny.Plain()))


@case("warning", "trained", r"2 of 25 parameters; frozen are bert\.embeddings\.word_embeddings", "if that is not meant")
def a_student_of_which_the_head_is_trained(tmp_path):
    student, teacher = tiny.models("classification")
    return tiny.trainer("classification", tmp_path, pair=(frozen(student, "bert"), teacher))


def lora(**kwargs: Any) -> nn.Module:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **kwargs)
    return peft.get_peft_model(tiny.models("causal_lm")[0], config)


@case("ok", "trained", "2 of 14 parameters; frozen are")
def a_student_with_adapters(tmp_path):
    return tiny.trainer("causal_lm", tmp_path, pair=(lora(), ADAPTER_OFF))


@case("ok", "teacher", "the student with its adapters off")
def a_students_own_base_as_teacher(tmp_path):
    return tiny.trainer("causal_lm", tmp_path, pair=(lora(), ADAPTER_OFF))


@case("warning", "student's dtype", "25 trained parameters are float16", "in float32 and set bf16")
def a_student_in_float16(tmp_path):
    student, teacher = tiny.models("classification")
    return tiny.trainer("classification", tmp_path, pair=(student.half(), teacher.half()))


@case("ok", "student's head", r"newly initialised and about to be trained: classifier\.weight, classifier\.bias$")
def a_student_from_a_body(tmp_path):
    BertModel(tiny.bert_config()).save_pretrained(tmp_path / "body")
    student = BertForSequenceClassification.from_pretrained(tmp_path / "body")
    return tiny.trainer("classification", tmp_path, pair=(student, tiny.models("classification")[1]))


@case("warning", "teacher's head", r"does not hold classifier\.weight, classifier\.bias:", "Fine-tune the teacher")
def a_teacher_made_of_a_body_in_the_script(tmp_path):
    BertModel(tiny.bert_config()).save_pretrained(tmp_path / "body")
    teacher = BertForSequenceClassification.from_pretrained(tmp_path / "body")
    return tiny.trainer("classification", tmp_path, pair=(tiny.models("classification")[0], teacher))


@case("warning", "teacher", r"\(0\.51x the student\)", "swap them")
def a_teacher_smaller_than_its_student(tmp_path):
    return tiny.trainer("classification", tmp_path, pair=tiny.models("classification")[::-1])


@case("ok", "teacher's mode", "25 trainable parameters and in training mode; it runs frozen, in eval mode")
def a_teacher_in_training_mode(tmp_path):
    student, teacher = tiny.models("classification")
    return tiny.trainer("classification", tmp_path, pair=(student, teacher.train()))


@case("warning", "teacher", "kd_alpha is 0", "leave the teacher out")
def a_teacher_that_is_never_asked(tmp_path):
    return tiny.trainer("plain", tmp_path, kd_alpha=0.0)


@case("ok", "teacher", "none: kd_alpha is 0")
def no_teacher_and_none_needed(tmp_path):
    return tiny.trainer("plain", tmp_path, pair=(tiny.Plain(), None), kd_alpha=0.0)


@case("ok", "classes", r"no names \(LABEL_0, LABEL_1, LABEL_2\) in both")
def classes_without_names(tmp_path):
    data = [{**row, "labels": row["labels"] % 3} for row in tiny.rows("classification")]
    pair = test_compatibility.model(), test_compatibility.model()
    return tiny.trainer("classification", tmp_path, pair=pair, data=data)


@case("warning", "classes", "not comparable by name .teacher: LABEL_0, .*student: anger", "the same id2label")
def classes_with_names_on_one_side(tmp_path):
    data = [{**row, "labels": row["labels"] % 3} for row in tiny.rows("classification")]
    pair = test_compatibility.model(test_compatibility.NAMES), test_compatibility.model()
    return tiny.trainer("classification", tmp_path, pair=pair, data=data)


@case("ok", "classes", "reordered by name")
def classes_in_another_order_on_demand(tmp_path):
    names = {i: f"class {4 - i}" for i in range(5)}
    config = tiny.bert_config(24, id2label=names, label2id={v: k for k, v in names.items()})
    pair = tiny.models("classification")[0], BertForSequenceClassification(config)
    return tiny.trainer("classification", tmp_path, pair=pair, kd_remap_labels=True)


@case("ok", "classes", "the same 5 names in the same order")
def classes_with_the_same_names(tmp_path):
    return tiny.trainer("classification", tmp_path)


# ---- tokens ----


def tokenizer(tmp_path: Any, words: int = tiny.VOCAB, **kwargs: Any) -> Any:
    vocab = {"[PAD]": 0, **{f"word{i}": i for i in range(1, words)}}
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel(vocab, unk_token="[PAD]"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", **kwargs)


def with_tokenizer(tmp_path: Any, teacher_tokenizer: Any, **kwargs: Any) -> Any:
    student, teacher = tiny.models("classification")
    teacher.save_pretrained(tmp_path / "teacher")
    teacher_tokenizer.save_pretrained(tmp_path / "teacher")
    pair = student, str(tmp_path / "teacher")
    return build(tmp_path, pair, tiny.rows("classification"), processing_class=tokenizer(tmp_path), **kwargs)


@case("ok", "tokens", "the tokenizers of student and teacher have the same ids")
def equal_tokenizers(tmp_path):
    return with_tokenizer(tmp_path, tokenizer(tmp_path))


@case("error", "tokens", "expected the tokens of processing_class", "Take a teacher with the student's tokenizer")
def other_tokenizers(tmp_path):
    return with_tokenizer(tmp_path, tokenizer(tmp_path, 30))


@case("warning", "tokens", "special ids of the configs alone", "Pass processing_class=tokenizer")
def tokens_without_a_tokenizer(tmp_path):
    return tiny.trainer("classification", tmp_path)


@case("warning", "tokens", "nothing could be compared", "Pass processing_class=tokenizer")
def tokens_without_special_ids(tmp_path):
    pair = [BertForSequenceClassification(tiny.bert_config(h)) for h in (16, 24)]
    for model in pair:
        model.config.pad_token_id = None
    return tiny.trainer("classification", tmp_path, pair=pair)


@case("ok", "tokens", "the teacher reads its own")
def a_teacher_with_tokens_of_its_own(tmp_path):
    own = {"teacher_input_ids": [1, 2], "teacher_attention_mask": [1, 1]}
    return tiny.trainer("classification", tmp_path, data=[{**row, **own} for row in tiny.rows("classification")])


@case("error", "student's tokens", "40 in the batch; expected 0 to 36", r"resize_token_embeddings")
def a_token_that_the_student_does_not_know(tmp_path):
    data = tiny.rows("classification")
    data[3]["input_ids"][0] = 40
    config = tiny.bert_config(24, vocab_size=48)
    pair = tiny.models("classification")[0], BertForSequenceClassification(config)
    return tiny.trainer("classification", tmp_path, pair=pair, data=data)


# ---- labels ----


def labelled(change: Callable[[int, Any], Any], task: str = "classification") -> list[dict[str, Any]]:
    return [{**row, "labels": change(i, row["labels"])} for i, row in enumerate(tiny.rows(task))]


@case("error", "labels", "5 at position 3 of the batch; expected 0 to 4", "is -100, not -1")
def a_label_out_of_range(tmp_path):
    return tiny.trainer("classification", tmp_path, data=labelled(lambda i, label: 5 if i == 3 else label))


@case("ok", "labels", "8 of 8 rows have one; 4 of 5 classes in this batch: 0, 1, 3, 4$")
def labels_in_all_rows(tmp_path):
    return tiny.trainer("classification", tmp_path)


@case("warning", "labels", "6 of 8 rows have one; .*divided by all rows", "tokenmean")
def some_rows_without_label(tmp_path):
    return tiny.trainer("classification", tmp_path, data=labelled(lambda i, label: -100 if i < 2 else label))


@case("warning", "labels", "no row of the batch has one: the loss is 0.7 times the soft loss", "Set kd_alpha to 1")
def no_row_with_a_label(tmp_path):
    return tiny.trainer("classification", tmp_path, data=labelled(lambda i, label: -100))


@case("ok", "labels", "the batch has none; the loss is the teacher's alone")
def no_labels_and_none_needed(tmp_path):
    data = [{"features": row["features"]} for row in tiny.rows("plain")]
    return tiny.trainer("plain", tmp_path, data=data, kd_alpha=1.0)


@case("error", "labels", "there is nothing to learn", "Raise kd_alpha")
def neither_labels_nor_a_teacher(tmp_path):
    data = labelled(lambda i, label: -100, "plain")
    return tiny.trainer("plain", tmp_path, pair=(tiny.Plain(), None), data=data, kd_alpha=0.0)


@case("warning", "labels", "35 of 104 positions have one; 1 of 8 rows have none at all", "attended")
def a_text_without_any_label(tmp_path):
    data = labelled(lambda i, label: label if i else [-100] * len(label), "causal_lm")
    return tiny.trainer("causal_lm", tmp_path, data=data)


@case("warning", "labels", "at padding", "write -100 there")
def labels_at_padding(tmp_path):
    def collate(rows):
        batch = tiny.pad(rows)
        return {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, 3)}

    return build(tmp_path, tiny.models("causal_lm"), tiny.rows("causal_lm"), data_collator=collate)


@case("warning", "labels", "at padding", "write -100 there")
def targets_padded_with_the_padding_token(tmp_path):
    data = test_seq2seq.rows()
    data[0]["labels"][-1] = 0
    return build(tmp_path, test_seq2seq.models("t5"), data, kd_reduction="tokenmean")


@case("warning", "reduction", "about 5 times the stock Trainer's", "tokenmean")
def a_token_level_task_with_batchmean(tmp_path):
    return tiny.trainer("causal_lm", tmp_path)


@case("error", "reduction", "'batchmean'; expected 'tokenmean' with packed batches", "Set kd_reduction to tokenmean")
def packed_rows_with_batchmean(tmp_path):
    data = [{**row, "position_ids": [0] * len(row["input_ids"])} for row in tiny.rows("causal_lm")]
    for row in data:
        row["position_ids"][0] = 1
    return tiny.trainer("causal_lm", tmp_path, data=data)


# ---- lengths and images ----


def texts(*lengths: int) -> list[dict[str, Any]]:
    return [{"input_ids": [3] * n, "attention_mask": [1] * n, "labels": i % 5} for i, n in enumerate(lengths)]


def berts(student: int = 128, teacher: int = 128) -> list[nn.Module]:
    pair = [tiny.bert_config(h) for h in (16, 24)]
    for config, positions in zip(pair, (student, teacher), strict=True):
        config.max_position_embeddings = positions
    return [BertForSequenceClassification(config) for config in pair]


@case("error", "lengths", "a row of 40 positions; the student has 32", "max_length=32, truncation=True")
def a_row_longer_than_the_student(tmp_path):
    return build(tmp_path, berts(student=32), texts(5, 40, 3, 4))


@case("error", "lengths", "a row of 40 positions; the teacher has 32", "max_length=32, truncation=True")
def a_row_longer_than_the_teacher(tmp_path):
    return build(tmp_path, berts(teacher=32), texts(5, 40, 3, 4))


@case("warning", "lengths", "a row of 40 positions; the student has 32 and was never trained beyond", "Cut the texts")
def a_row_longer_than_the_student_was_trained_for(tmp_path):
    data = [{"input_ids": [3] * 40, "attention_mask": [1] * 40, "labels": [3] * 40} for _ in range(8)]
    return build(tmp_path, tiny.models("causal_lm"), data, kd_reduction="tokenmean")


@case("warning", "lengths", "the tokenizer cuts texts at 64 tokens, a model has 32", "model_max_length to 32")
def a_tokenizer_that_cuts_too_late(tmp_path):
    cut = tokenizer(tmp_path, model_max_length=64)
    return build(tmp_path, berts(teacher=32), texts(5, 12, 3, 4), processing_class=cut)


@case("warning", "lengths", "3 of 8 rows have exactly 48 tokens: they were probably cut", "Raise max_length")
def texts_that_were_cut(tmp_path):
    return build(tmp_path, berts(), texts(48, 5, 48, 3, 48, 20, 30, 40))


@case("warning", "lengths", "8 of 8 rows have exactly 24 tokens: they were probably cut", "Raise max_length")
def texts_that_were_all_cut(tmp_path):
    cut = tokenizer(tmp_path, model_max_length=24)
    return build(tmp_path, berts(), texts(*[24] * 8), processing_class=cut)


@case("ok", "lengths", "rows of 32 to 32 tokens, padded to 32, the student has 32 positions")
def blocks_of_running_text(tmp_path):
    data = [{"input_ids": [3] * 32, "attention_mask": [1] * 32, "labels": [3] * 32} for _ in range(8)]
    return build(tmp_path, tiny.models("causal_lm"), data, kd_reduction="tokenmean")


@case("ok", "lengths", "texts of up to 14 tokens in rows of 14, the student has 32 positions")
def texts_with_positions(tmp_path):
    data = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in tiny.rows("classification")]
    return tiny.trainer("classification", tmp_path, data=data)


def images(count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 5} for i in range(count)]


def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


@case("warning", "images", "8 x 8; the teacher was made for 16 x 16", "in the column teacher_pixel_values")
def a_teacher_of_larger_images(tmp_path):
    return build(tmp_path, (tiny.vit(8), tiny.vit(16)), images(), data_collator=stack)


@case("error", "first batch", "images of 8 x 8; expected 16 x 16", "from its image processor")
def a_teacher_that_refuses_images(tmp_path):
    return build(tmp_path, (tiny.vit(8), tiny.vit(16)), images(), data_collator=stack)


@case("ok", "images", "8 x 8, as in the configs")
def images_of_the_right_size(tmp_path):
    return build(tmp_path, (tiny.vit(8), tiny.vit(8)), images(), data_collator=stack)


# ---- columns, settings, data ----


@case("ok", "columns", "read: attention_mask, input_ids, labels; removed before the collator: idx, sentence$")
def columns_that_are_removed(tmp_path):
    data = Dataset.from_list([{**row, "idx": 1, "sentence": "a"} for row in tiny.rows("classification")])
    return build(tmp_path, tiny.models("classification"), data, remove_unused_columns=True)


@case("ok", "columns", "read: attention_mask, input_ids, labels; read by neither model: weight$")
def a_column_that_nobody_reads(tmp_path):
    data = [{**row, "weight": 0.5} for row in tiny.rows("classification")]
    return tiny.trainer("classification", tmp_path, data=data)


@case("warning", "columns", r"no attention_mask, and input_ids hold the padding token \(0\)", "Keep the attention_mask")
def a_missing_mask(tmp_path):
    data = [{k: v for k, v in row.items() if k != "attention_mask"} for row in tiny.rows("classification")]
    return tiny.trainer("classification", tmp_path, data=data)


@case("warning", "temperature", "kd_temperature 0.5 sharpens", "from 1 to 20")
def a_low_temperature(tmp_path):
    return tiny.trainer("plain", tmp_path, kd_temperature=0.5)


@case("ok", "best model", "chosen by eval_loss, the mixture", "hard_loss")
def the_best_model_by_the_mixture(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 500}
    return tiny.trainer("plain", tmp_path, **best)


@case("error", "task", "'jsd'; expected 'forward_kl'", "Leave it out")
def a_divergence_between_numbers(tmp_path):
    return tiny.trainer("regression", tmp_path, kd_divergence="jsd")


@case("error", "data", "a batch with the column 'label'", "Rename the column")
def labels_under_another_name(tmp_path):
    data = [{"features": row["features"], "label": row["labels"]} for row in tiny.rows("plain")]
    return tiny.trainer("plain", tmp_path, data=data)


@case("error", "data", r"KeyError: 'features' \(test_check\.py, line \d+\)", "Training would stop with it too")
def a_collator_that_fails(tmp_path):
    def collate(rows):
        return {"features": rows[0]["features"]}

    return build(tmp_path, tiny.models("plain"), tiny.rows("causal_lm"), data_collator=collate)


@case("error", "data", "training requires a train_dataset", "Training would stop")
def no_data(tmp_path):
    return build(tmp_path, tiny.models("plain"), None)


# ---- one batch ----


class Odd(tiny.Plain):
    """A plain student whose logits `change` makes out of what it reads."""

    def __init__(self, change: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change, self.spare = change, nn.Linear(2, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.change(self.linear, features)


def odd(tmp_path: Any, change: Callable[[Any, torch.Tensor], torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return tiny.trainer("plain", tmp_path, pair=(Odd(change), tiny.Plain()), **kwargs)


@case("error", "loss", r"not finite at step 0, process 0: 8 rows of the student's logits", "Lower the learning rate")
def a_student_that_gives_NaN(tmp_path):
    return odd(tmp_path, lambda linear, x: linear(x) * math.nan)


@case("error", "loss", "nan of one batch", 'Set kd_check_finite to "step"')
def a_student_that_gives_NaN_unwatched(tmp_path):
    return odd(tmp_path, lambda linear, x: linear(x) * math.nan, kd_check_finite="off")


@case("error", "loss", r"RuntimeError: .*shapes cannot be multiplied", "Training would stop")
def a_student_that_does_not_fit_the_data(tmp_path):
    return tiny.trainer("plain", tmp_path, pair=(tiny.Plain(features=4), tiny.Plain()))


@case("error", "gradient", "no trained parameter gets any", "Check which parameters")
def a_student_that_learns_nothing(tmp_path):
    return odd(tmp_path, lambda linear, x: linear(x) * 0)


@case("ok", "gradient", r"2 trained parameters get none \(spare\.weight, spare\.bias\)$")
def parameters_that_are_not_used(tmp_path):
    return odd(tmp_path, lambda linear, x: linear(x))


@case("ok", "gradient", r"norm [\d.]+; max_grad_norm 0\.001 scales it down$")
def a_gradient_that_is_clipped(tmp_path):
    return tiny.trainer("plain", tmp_path, max_grad_norm=0.001)


@case("ok", "loss path", "full logits: kd_loss_implementation is full")
def full_logits_on_demand(tmp_path):
    return tiny.trainer("causal_lm", tmp_path, kd_loss_implementation="full")


@case("ok", "loss path", "full logits: a vocabulary of 37 ids is small")
def full_logits_of_a_small_vocabulary(tmp_path):
    return tiny.trainer("causal_lm", tmp_path)


@case("ok", "loss path", "the loss is computed inside the output heads: no logits are held")
def no_logits(tmp_path):
    return tiny.trainer("causal_lm", tmp_path, kd_loss_implementation="fused")


@case("ok", "loss path", "full logits: Scaled does something unknown")
def full_logits_since_the_head_is_not_plain(tmp_path):
    student = backend_run.Scaled(tiny.llama_config(vocab_size=2048))
    pair = student, LlamaForCausalLM(tiny.llama_config(24, vocab_size=2048))
    return tiny.trainer("causal_lm", tmp_path, pair=pair, kd_hard_loss="task")


# ---- the same loss, differently cut ----


class Normed(tiny.Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(features))


@case("warning", "split", "relative difference [1-9].*e-0[12]", r"Batch norm \(norm\)")
def a_student_with_batch_norm(tmp_path):
    torch.manual_seed(0)
    return tiny.trainer("plain", tmp_path, pair=(Normed(), tiny.Plain()))


@case("warning", "split", "relative difference", "depends on the other rows")
def a_head_that_looks_at_the_other_rows(tmp_path):
    return odd(tmp_path, lambda linear, x: linear(x - x.mean(0)))


@case("warning", "split", "relative difference", "load-balancing loss of the experts")
def a_router_loss(tmp_path):
    return test_moe.distillation("Mixtral", tmp_path)


@case("ok", "split", "not tried: the batch cannot be cut into rows")
def a_batch_of_one_row(tmp_path):
    return tiny.trainer("plain", tmp_path, per_device_train_batch_size=1)


@case("ok", "split", "not tried")
def batch_norm_of_two_rows(tmp_path):
    return tiny.trainer("plain", tmp_path, pair=(Normed(), tiny.Plain()), per_device_train_batch_size=2)


class Pooled(BertForSequenceClassification):
    """Averages over the padding too, as no model should."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.classifier(self.bert(input_ids, attention_mask=attention_mask)[0].mean(1))


@case("warning", "padding", "with 8 more positions on the right .*: relative difference", "A model sees the padding")
def a_student_that_sees_the_padding(tmp_path):
    torch.manual_seed(0)
    student = Pooled(tiny.bert_config(initializer_range=0.5))
    return tiny.trainer("classification", tmp_path, pair=(student, tiny.models("classification")[1]))


@case("warning", "padding", "with 8 more positions on the left", "A model sees the padding")
def positions_that_padding_on_the_left_moves(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": tiny.VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    pair = [GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.5, resid_pdrop=0.0)) for _ in range(2)]
    left = tokenizer(tmp_path, padding_side="left")
    return build(tmp_path, pair, tiny.rows("causal_lm"), kd_reduction="tokenmean", processing_class=left)


@case("ok", "padding", "the hard loss of question answering runs over the padding, as upstream's")
def question_answering(tmp_path):
    return tiny.trainer("question_answering", tmp_path)


# ---- soft and hard, teacher and student ----


@case("warning", "soft and hard", "the soft loss has 100% of the gradient's norm, the hard loss 0%", "kd_alpha 0.")
def a_soft_loss_that_rules(tmp_path):
    return tiny.trainer("plain", tmp_path, kd_alpha=0.999)


def labelled_by(count: int, teacher: nn.Module, seed: int = 5) -> list[dict[str, Any]]:
    """Rows labelled with the teacher's predictions."""
    rows = tiny.rows("plain", count, seed)
    with torch.no_grad():
        return [{**row, "labels": int(teacher(row["features"][None]).argmax())} for row in rows]


def teacher_that_knows(factor: float) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student, teacher = tiny.Plain(), tiny.Plain()
    with torch.no_grad():
        teacher.linear.weight.mul_(factor)
    return student, teacher


@case("ok", "teacher's quality", r"right 100\.0% and 10\.0%, the same 10\.0% \(20 labels of the evaluation data\)")
def a_teacher_that_knows(tmp_path):
    student, teacher = teacher_that_knows(20.0)
    data = labelled_by(20, teacher)
    return build(tmp_path, (student, teacher), data, eval_dataset=data)


@case("warning", "teacher's quality", "hard loss .*of the student as it starts", "no better than where the student")
def a_teacher_that_knows_nothing(tmp_path):
    student, teacher = teacher_that_knows(-20.0)
    data = [{**row, "labels": label} for row, label in zip(labelled_by(20, teacher), [0] * 20, strict=True)]
    with torch.no_grad():
        teacher.linear.bias[0] = -50.0
    return build(tmp_path, (student, teacher), data, eval_dataset=data)


@case("ok", "teacher's quality", "not measured: there is no eval_dataset")
def no_evaluation_data(tmp_path):
    return build(tmp_path, tiny.models("plain"), tiny.rows("plain"))


@case("ok", "teacher's quality", "not measured: the evaluation data has no labels")
def evaluation_data_without_labels(tmp_path):
    data = [{"features": row["features"]} for row in tiny.rows("plain")]
    return build(tmp_path, tiny.models("plain"), tiny.rows("plain"), eval_dataset=data)


@case("ok", "teacher's quality", "hard loss")
def a_student_that_starts_as_its_own_base(tmp_path):
    return tiny.trainer("causal_lm", tmp_path, pair=(lora(), ADAPTER_OFF))


@pytest.mark.parametrize("name", CASES)
def test_every_finding(name, tmp_path, capsys):
    wanted = CASES[name]
    trainer = wanted.trainer(tmp_path)
    before = tiny.weights(trainer.model)
    results = trainer.check()
    result = row_of(results, wanted.what, wanted.status)
    same = [f for f in results if f.what == wanted.what and f.status == wanted.status]
    assert any(re.search(wanted.found, f.found) and re.search(wanted.fix, f.fix) for f in same), same
    assert result.fix or result.status == "ok"
    assert f"[kd_trainer] {sum(f.status == 'error' for f in results)} error" in capsys.readouterr().out
    assert torch.equal(tiny.weights(trainer.model), before)
    texts_found = [f.found for f in results]
    assert len(set(texts_found)) == len(texts_found), "reported twice"


def test_every_kind_of_row_is_provoked():
    assert {(c.status, c.what) for c in CASES.values()} >= {
        ("warning", what)
        for what in ("classes", "tokens", "labels", "lengths", "images", "columns", "split", "padding")
    }


# ---- refusals are the same words as in training ----


@pytest.mark.parametrize(
    "name",
    ["permuted labels", "no teacher", "a label out of range", "a divergence between numbers", "other tokenizers"],
)
def test_a_row_says_what_training_says(name, tmp_path, monkeypatch):
    wanted = CASES[name]
    row = row_of(wanted.trainer(tmp_path).check(), wanted.what, "error")
    monkeypatch.setitem(CHECK, "kd_run", "train")
    with pytest.raises((ValueError, TypeError)) as caught:
        wanted.trainer(tmp_path).train()
    assert str(caught.value) == f"{row.found} {row.fix}"


def test_training_raises_the_first_refusal_and_check_collects_all(tmp_path):
    data = tiny.rows("regression")
    data[3]["input_ids"][0] = 40
    trainer = tiny.trainer("regression", tmp_path, data=data, kd_divergence="jsd")
    errors = [row for row in trainer.check() if row.status == "error"]
    assert [row.what for row in errors] == ["tokens", "task", "student's tokens"]
    with pytest.raises(ValueError, match=re.escape(f"{errors[0].found} {errors[0].fix}")):
        trainer.train()


def test_a_refused_teacher_does_not_hide_the_rest(tmp_path):
    results = permuted_labels(tmp_path).check()
    assert "soft_loss" in row_of(results, "loss", "ok").found
    assert row_of(results, "split").status == "ok"
    assert [f.status for f in results].count("error") == 1
    results = packed_rows_with_batchmean(tmp_path).check()
    assert row_of(results, "split").status == "ok"
    results = no_teacher(tmp_path).check()
    assert row_of(results, "labels").status == "ok"


def test_an_error_of_another_kind_names_the_place_and_leaves_a_traceback(caplog):
    try:
        {}["x"]
    except KeyError as error:
        row = refused("data", error)
    assert re.fullmatch(r"KeyError: 'x' \(test_check\.py, line \d+\)", row.found)
    assert caplog.records[0].exc_info
    row = refused("loss", torch.OutOfMemoryError("CUDA out of memory. Tried"))
    assert "gradient_accumulation_steps" in row.fix


# ---- what it receives ----


@pytest.mark.parametrize("path", sorted(Path(trial.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_nothing_private_of_the_trainer_is_read_and_no_kind_is_compared(path):
    source = path.read_text(encoding="utf-8")
    private = re.findall(r"\btrainer\._\w+", source)
    kinds = re.findall(r"isinstance\([^)]*Teacher|task\.name [!=]=", source)
    assert not private + kinds


# ---- the numbers ----


TASKS = ["classification", "multi_label_classification", "regression", "question_answering", "token_classification"]
TASKS += ["causal_lm", "plain"]


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_the_first_that_training_logs(task, tmp_path):
    trainer = tiny.trainer(task, tmp_path, max_steps=1, kd_reduction="tokenmean")
    found = row_of(trainer.check(evaluate=False), "loss").found
    shown = dict(re.findall(r"(\w+) ([\d.]+)", found))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert float(found.split()[0]) == pytest.approx(entry["loss"], abs=6e-5)
    for key in ("hard_loss", "soft_loss", "teacher_agreement"):
        assert (key in shown) == (key in entry)
        assert float(shown.get(key, 0)) == pytest.approx(entry.get(key, 0), abs=6e-5)


@pytest.mark.parametrize("kind", [*TASKS, "t5", "bart", "masked_lm"])
def test_the_loss_does_not_depend_on_how_the_batch_is_cut(kind, tmp_path):
    if kind in ("t5", "bart"):
        trainer = build(tmp_path, test_seq2seq.models(kind), test_seq2seq.rows(), kd_reduction="tokenmean")
    elif kind == "masked_lm":
        pair = [BertForMaskedLM(tiny.bert_config(h, initializer_range=0.5)) for h in (16, 24)]
        trainer = build(tmp_path, pair, tiny.rows("causal_lm"), kd_reduction="tokenmean")
    else:
        trainer = tiny.trainer(kind, tmp_path)
    results = trainer.check(evaluate=False)
    assert not has_errors(results)
    for what in ("split", "padding"):
        if kind == "plain" and what == "padding":
            assert not [f for f in results if f.what == what]
            continue
        row = row_of(results, what, "ok")
        values = [float(value) for value in re.findall(r" (\d+\.\d{6})", row.found)]
        if (kind, what) == ("question_answering", "padding"):
            assert values[0] != values[1]
        else:
            assert values[0] == pytest.approx(values[1], rel=1e-5)
            assert float(row.found.rsplit(" ", 1)[1]) < 1e-5


def test_the_halves_of_a_batch_norm_are_written_out(tmp_path):
    trainer = a_student_with_batch_norm(tmp_path)
    row = row_of(trainer.check(evaluate=False), "split")
    student, teacher = copy.deepcopy(trainer.model).train(), trainer.teacher.model
    batch = tiny.pad(tiny.rows("plain")[:8])

    def loss(rows: slice) -> torch.Tensor:
        x, y = batch["features"][rows], batch["labels"][rows]
        z, t = student(x), teacher(x)
        soft = 9 * F.kl_div(F.log_softmax(z / 3, -1), F.log_softmax(t / 3, -1), log_target=True, reduction="sum")
        return (0.7 * soft + 0.3 * F.cross_entropy(z, y, reduction="sum")) / 8

    whole, halves = loss(slice(8)), loss(slice(4)) + loss(slice(4, 8))
    assert f"1 x 8 rows {whole:.6f}, 2 x 4 {halves:.6f}" in row.found
    difference = abs(whole - halves) / max(whole, halves)
    assert f"{difference:.1e}" in row.found
    assert torch.equal(trainer.model.norm.running_mean, torch.zeros(6))
    assert trainer.model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_the_shares_are_the_closed_form(alpha, tmp_path):
    trainer = tiny.trainer("plain", tmp_path, kd_alpha=alpha, kd_temperature=2.0)
    row = row_of(trainer.check(evaluate=False), "soft and hard")
    batch = tiny.pad(tiny.rows("plain")[:8])
    with torch.no_grad():
        z, t = (model(batch["features"]).double() for model in (trainer.model, trainer.teacher.model))
    hard = (1 - alpha) * (F.softmax(z, -1) - F.one_hot(batch["labels"], 5)) / 8
    soft = alpha * 2 * (F.softmax(z / 2, -1) - F.softmax(t / 2, -1)) / 8
    share = soft.norm() / (soft.norm() + hard.norm())
    assert 0.1 < share < 0.9
    assert f"the soft loss has {share:.0%} of the gradient's norm, the hard loss {1 - share:.0%}" in row.found


def test_the_shares_of_a_language_model_do_not_depend_on_the_pieces_and_leave_out_padding(tmp_path, monkeypatch):
    trainer = tiny.trainer("causal_lm", tmp_path, kd_reduction="tokenmean", kd_loss_implementation="fused")
    found = row_of(trainer.check(evaluate=False), "soft and hard").found
    monkeypatch.setattr(trial, "_AT_ONCE", 1)
    assert row_of(trainer.check(evaluate=False), "soft and hard").found == found
    batch = tiny.pad(tiny.rows("causal_lm")[:8])
    labels = F.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    counted = labels != -100
    with torch.no_grad():
        z, t = (m(**batch).logits[counted].double() for m in (trainer.model, trainer.teacher.model))
    hard = 0.3 * (F.softmax(z, -1) - F.one_hot(labels[counted], tiny.VOCAB))
    soft = 0.7 * 3 * (F.softmax(z / 3, -1) - F.softmax(t / 3, -1))
    assert f"{soft.norm() / (soft.norm() + hard.norm()):.0%} of" in found


def test_the_alpha_of_equal_shares_gives_equal_shares(tmp_path):
    row = row_of(a_soft_loss_that_rules(tmp_path).check(evaluate=False), "soft and hard")
    alpha = float(re.search(r"kd_alpha ([\d.]+) would", row.fix)[1])
    even = row_of(tiny.trainer("plain", tmp_path, kd_alpha=alpha).check(evaluate=False), "soft and hard")
    assert even.status == "ok"
    assert abs(int(re.search(r"(\d+)% of", even.found)[1]) - 50) <= 1


@pytest.mark.parametrize("task", ["classification", "regression", "token_classification", "causal_lm"])
def test_the_teachers_quality_written_out(task, tmp_path, monkeypatch):
    trainer = tiny.trainer(task, tmp_path, kd_reduction="tokenmean")
    found = row_of(trainer.check(), "teacher's quality").found
    losses = []
    for model in (trainer.teacher.model, trainer.model):
        batch = tiny.pad(tiny.rows(task, 21, seed=2))
        labels = batch.pop("labels")
        with torch.no_grad():
            z = model.eval()(**batch).logits
        if task == "regression":
            losses.append(F.mse_loss(z[:, 0], labels))
            continue
        if task == "causal_lm":
            z, labels = z[:, :-1], labels[:, 1:]
        losses.append(F.cross_entropy(z.reshape(-1, z.shape[-1]), labels.reshape(-1), ignore_index=-100))
    assert found.startswith(f"hard loss {losses[0]:.4f}, of the student as it starts {losses[1]:.4f}")
    monkeypatch.setattr(trial, "_EVALUATED", 1)
    fewer = row_of(trainer.check(), "teacher's quality").found
    assert int(re.search(r"\((\d+) labels", fewer)[1]) < int(re.search(r"\((\d+) labels", found)[1])
    assert not [f for f in trainer.check(evaluate=False) if f.what == "teacher's quality"]


def test_positions_that_a_model_has():
    assert positions_of(tiny.models("classification")[0]) == (32, True)
    assert positions_of(tiny.models("causal_lm")[0]) == (32, False)
    assert positions_of(tiny.Plain()) == (None, False)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    roberta = RobertaForSequenceClassification(RobertaConfig(vocab_size=37, max_position_embeddings=34, **shape))
    positions, learned = positions_of(roberta)
    assert (positions, learned) == (32, True)
    roberta(torch.full((1, positions), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, positions + 1), 5))
    bart = test_seq2seq.build("bart")
    assert positions_of(bart) == (64, True)


def test_a_large_teacher_in_float32_on_a_gpu_is_told_of_half_of_the_memory():
    teacher = LiveTeacher(nn.Linear(10_001, 10_000, device="meta"))
    settings = {"called": True, "mixed": False}
    rows = about_teacher(teacher, tiny.Plain(), torch.device("cuda"), **settings)
    assert "bfloat16" in row_of(rows, "teacher's dtype", "ok").fix
    for device, mixed in (("cpu", False), ("cuda", True)):
        rows = about_teacher(teacher, tiny.Plain(), torch.device(device), called=True, mixed=mixed)
        assert not [f for f in rows if f.what == "teacher's dtype"]


def test_adapters_are_no_newly_initialised_head(tmp_path):
    LlamaForCausalLM(tiny.llama_config()).save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert newly_initialised(loaded) == []
    adapted = peft.get_peft_model(loaded, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert newly_initialised(adapted) == []
    assert newly_initialised(LlamaForCausalLM(tiny.llama_config())) == []  # nothing was loaded


def test_several_processes_wait_for_unused_parameters(tmp_path):
    trainer = parameters_that_are_not_used(tmp_path)
    trainer.compute_loss(trainer.model, tiny.pad(tiny.rows("plain")[:8])).backward()
    several = SimpleNamespace(max_grad_norm=0.0, world_size=2, ddp_find_unused_parameters=None)
    row = row_of(trial._gradient(several, trainer.model), "gradient", "warning")
    assert row.found == "2 trained parameters get none (spare.weight, spare.bias): DDP waits for them"
    assert "ddp_find_unused_parameters" in row.fix


# ---- nothing is left behind ----


def student_with_everything() -> nn.Module:
    """Dropout and batch norm: random numbers are drawn, buffers move."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, tiny.CLASSES))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = student_with_everything()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.body(features)


def noisy(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that draws from all three generators."""
    batch = tiny.pad(rows)
    noise = torch.rand(()) + np.random.rand() + random.random()
    return {**batch, "features": batch["features"] + float(noise)}


def shuffled(output_dir: Any, **kwargs: Any) -> Any:
    settings = {"train_sampling_strategy": "random", "max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
    pair = Wrapped(), tiny.Plain()
    data = {"eval_dataset": tiny.rows("plain", 21, seed=2), "data_collator": noisy}
    return build(output_dir, pair, tiny.rows("plain"), **settings, **data, **kwargs)


def trained(trainer: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    random.seed(0), np.random.seed(0), torch.manual_seed(7)
    trainer.train()
    volatile = ("runtime", "per_second", "flos")
    logs = [{k: v for k, v in e.items() if not any(w in k for w in volatile)} for e in trainer.state.log_history]
    return trainer.model.state_dict(), logs


def checked(trainer: Any) -> Any:
    random.seed(0), np.random.seed(0), torch.manual_seed(7)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    trainer.check()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    return trainer


@pytest.mark.parametrize("kind", ["plain", "fused", "classification", "bf16"])
def test_train_after_check_is_train(kind, tmp_path):
    def make() -> Any:
        if kind == "plain":
            return shuffled(tmp_path)
        if kind == "classification":
            dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
            torch.manual_seed(0)
            pair = [BertForSequenceClassification(tiny.bert_config(h, **dropout)) for h in (16, 24)]
            return tiny.trainer(kind, tmp_path, pair=pair, train_sampling_strategy="random")
        implementation = "fused" if kind == "fused" else "auto"
        settings = {"kd_reduction": "tokenmean", "kd_loss_implementation": implementation, "bf16": kind == "bf16"}
        return tiny.trainer("causal_lm", tmp_path, train_sampling_strategy="random", **settings)

    weights, logs = trained(make())
    after, after_logs = trained(checked(make()))
    assert logs == after_logs
    assert len(logs) > 3
    for name, value in weights.items():
        assert torch.equal(value, after[name]), name


def test_a_check_between_two_trainings_changes_nothing(tmp_path):
    twice, thrice = (shuffled(tmp_path, max_grad_norm=1.0) for _ in range(2))
    trained(twice), trained(checked_after(thrice))
    trained(twice), trained(thrice)
    for one, other in zip(twice.model.state_dict().values(), thrice.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def checked_after(trainer: Any) -> Any:
    trainer.train, train = lambda *a, **k: (train(*a, **k), trainer.check()), trainer.train
    return trainer


def test_the_student_is_as_it_was(tmp_path):
    trainer = a_student_with_batch_norm(tmp_path)
    trainer.model.eval()
    trainer.model.norm.train()
    trainer.model.linear.weight.grad = gradient = torch.ones_like(trainer.model.linear.weight)
    state = copy.deepcopy(trainer.model.state_dict())
    kept = {
        name: getattr(trainer, name)
        for name in ("_plan", "_metrics_buffer", "_finite", "teacher", "model", "optimizer")
    }
    loaders, running = list(trainer.accelerator._dataloaders), trainer.accelerator.gradient_state.dataloader_references
    trainer.check()
    assert [m.training for m in trainer.model.modules()] == [False, False, True]
    assert trainer.model.linear.weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert trainer.model.linear.bias.grad is None
    assert all(torch.equal(value, state[name]) for name, value in trainer.model.state_dict().items())
    assert all(getattr(trainer, name) is value for name, value in kept.items())
    assert trainer.accelerator._dataloaders == loaders
    assert trainer.accelerator.gradient_state.dataloader_references == running


def test_the_config_is_as_it_was(tmp_path):
    trainer = tiny.trainer("classification", tmp_path)
    assert trainer.model.config.problem_type is None
    trainer.check()
    assert trainer.model.config.problem_type is None


def test_activation_checkpointing_is_left_to_training(tmp_path):
    trainer = tiny.trainer("causal_lm", tmp_path, gradient_checkpointing=True)
    results = trainer.check()
    assert "student's forward and the loss" in row_of(results, "time").found
    assert not [f for f in results if f.what == "gradient"]


def test_a_slow_step_is_run_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trial, "_WARM", 0.0)
    trainer = odd(tmp_path, lambda linear, x: (calls.append(len(x)), linear(x))[1])
    results = trainer.check(evaluate=False)
    # How many classes its logits have; the step; the batch and its halves; the logits.
    assert calls == [8, 8, 8, 4, 4, 8]
    assert row_of(results, "time")


# ---- the table ----


def test_the_table():
    shown = io.StringIO()
    rows = [
        CheckResult("ok", "student", "small"),
        CheckResult("warning", "labels", "few [of them]", "Write more."),
        CheckResult("error", "trained", "x" * 200, "Change it."),
    ]
    print_results(rows, Console(file=shown, width=60, highlight=False))
    lines = [line.strip() for line in shown.getvalue().splitlines()]
    assert lines[1].split() == ["Check", "Status", "Found"]
    assert "student   ok        small" in lines
    assert "labels    warning   few [of them]" in lines
    assert "-> Write more." in lines
    assert lines[-1] == "[kd_trainer] 1 error, 1 warning"
    assert sum(line.count("x") for line in lines) == 200
    assert max(map(len, lines)) <= 60


# ---- kd_run ----


@pytest.mark.parametrize("value", ["caches", "checks", None])
def test_other_runs_are_refused(value, tmp_path):
    with pytest.raises(ValueError, match=r"`kd_run` is .*; expected one of 'train', 'check', 'cache'"):
        tiny.arguments(tmp_path, kd_run=value)


@pytest.mark.parametrize(("name", "code"), [("labels in all rows", 0), ("permuted labels", 1), ("no data", 1)])
def test_train_ends_the_process(name, code, tmp_path, capsys):
    trainer = CASES[name].trainer(tmp_path)
    trainer.args.kd_run = "check"  # as a script may still say
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == code
    assert trainer.state.global_step == 0
    assert f"[kd_trainer] {code} error" in capsys.readouterr().out
    assert not (tmp_path / "distillation.json").exists()


SCRIPT = """
import sys
from kd_trainer import DistillationTrainer, DistillationTrainingArguments, parse_args
from tests.helpers import tiny
args = parse_args(DistillationTrainingArguments)
teacher = tiny.Plain(classes=int(args.run_name))
trainer = DistillationTrainer(
    model=tiny.Plain(), teacher_model=teacher, args=args, train_dataset=tiny.rows("plain"),
    eval_dataset=tiny.rows("plain", 21, seed=2),
)
trainer.train()
print("trained")
"""


@pytest.mark.launch
@pytest.mark.parametrize(("classes", "code"), [(5, 0), (7, 1)])
def test_a_script_ends_with_0_or_1(classes, code, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    config = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "run_name": str(classes)}
    (tmp_path / "config.json").write_text(json.dumps({**config, "kd_run": "check"}))
    found, output = end_of_script(tmp_path / "script.py", ["config.json"])
    assert found == code, output[-2000:]
    assert "trained\n" not in output
    assert f"[kd_trainer] {code} error" in output
    assert "Traceback" not in output
    if code:
        assert "giving logits of shape (8, 7); expected the student's shape (8, 5)" in " ".join(output.split())
        assert "-> Take a teacher and a student with the same classes" in output
    else:
        assert re.search(r"^ task +ok +classification: loss = 0\.7 \* soft\(forward_kl, T=3\)", output, re.M)


# ---- several processes ----


@pytest.mark.launch
def test_two_processes_tell_of_what_one_has_found(tmp_path):
    launch.two_processes("check_run.py", str(tmp_path), "ddp")
    first, second = (json.loads((tmp_path / f"ddp_{i}.json").read_text()) for i in range(2))
    assert first["world_size"] == second["world_size"] == 2
    for name in ("label", "evaluated"):
        assert first[name] == second[name]
    assert {row[0] for row in first["evaluated"]} == {"ok"}
    quality = next(row[2] for row in first["evaluated"] if row[1] == "teacher's quality")
    assert "(32 labels of the evaluation data)" in quality  # 21 rows fill two batches of 8 on each process
    assert first["same_weights"] is True
    assert second["same_weights"] is True
    (wrong,) = (row for row in first["label"] if row[0] == "error")
    assert re.match(r"process 1: `labels` is 9 at position 0 of the batch; expected 0 to 4", wrong[2])
    assert first["code"] == second["code"] == 1
    assert "1 error, 0 warnings" in first["printed"]
    assert "Found" not in second["printed"]


@pytest.mark.launch
def test_a_sharded_student_is_checked_by_kd_run(tmp_path):
    launch.two_processes("check_run.py", str(tmp_path), "fsdp2")
    for process in range(2):
        found = json.loads((tmp_path / f"fsdp2_{process}.json").read_text())
        assert "FSDPModule" in found["wrappers"]
        assert found["code"] == 0
        early = found["early"][-1]
        assert early[2:] == ["the models were not run: the student is not sharded yet", early[3]]
        assert "kd_run" in early[3]
        rows = ("loss", "loss path", "split", "padding", "soft and hard", "teacher's quality")
        printed = found["printed"].rpartition("Found")[2]
        assert [bool(re.search(rf"^ {row} ", printed, re.M)) for row in rows] == [process == 0] * 6
        if process == 0:
            alone = backend_run.build("fused", tmp_path, tmp_path / "run", per_device_train_batch_size=4)
            for what in ("split", "padding"):  # the rows of the first process are the first of the data
                expected = row_of(alone.check(evaluate=False), what).found.partition(":")[0]
                assert expected.replace(" ", "") in re.sub(r"\s", "", printed)


# ---- memory ----


@pytest.mark.parametrize("task", ["plain", "classification", "causal_lm", "question_answering"])
def test_memory_is_that_of_the_estimate(task, tmp_path):
    run = tiny.trainer(task, tmp_path)
    row = row_of(run.check(evaluate=False), "memory", "ok")
    own = sum(p.numel() for p in run.model.parameters()) * 4 / 2**10
    teachers = sum(p.numel() for p in run.teacher.model.parameters()) * 4 / 2**10
    assert f"student {own:.3g} KiB" in row.found
    assert f"teacher {teachers:.3g} KiB" in row.found


def test_a_step_that_does_not_fit_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(trial.psutil, "virtual_memory", lambda: SimpleNamespace(total=2**17))
    row = row_of(tiny.trainer("classification", tmp_path).check(evaluate=False), "memory", "warning")
    assert "of 128 KiB" in row.found
    assert "gradient_accumulation_steps" in row.fix


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of this process is not known here")
def test_the_memory_of_the_step_is_measured(tmp_path):
    size = 2**24  # numbers that a forward makes and backward keeps: 64 MiB

    def forward(linear, x):
        return linear(x) + 0 * torch.ones(size).mul(linear.weight.sum()).square().sum()

    found = row_of(odd(tmp_path, forward).check(evaluate=False), "memory", "ok").found
    number, unit = re.search(
        r"; measured: ([\d.e+]+) (\w+) more resident at the peak of a forward and backward", found
    ).groups()
    assert float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit] >= 0.9 * 4 * size


def test_an_estimate_that_fails_leaves_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "estimate_memory", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(trial, "_watch_memory", lambda _: lambda: 3 * 2**20)
    found = row_of(tiny.trainer("plain", tmp_path).check(evaluate=False), "memory", "ok").found
    assert found == (
        "not estimated: division by zero; measured: 3 MiB more resident at the peak of a forward and backward, "
        "without optimizer"
    )


def test_where_no_gradient_is_asked_for_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "_watch_memory", lambda _: lambda: 3 * 2**20)
    run = tiny.trainer("causal_lm", tmp_path, gradient_checkpointing=True)
    assert "measured" not in row_of(run.check(evaluate=False), "memory", "ok").found
