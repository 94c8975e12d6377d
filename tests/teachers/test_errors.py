"""A teacher that cannot read the batch: the error names the teacher, the argument and the fix."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from kd_trainer import Seq2SeqDistillationTrainer, Seq2SeqDistillationTrainingArguments
from tests.helpers import tiny
from tests.helpers.tiny_generative import KINDS, pair
from tests.tasks.test_seq2seq import build as build_seq2seq
from tests.tasks.test_seq2seq import rows as seq2seq_rows

NAMES = {"id2label": {i: f"class {i}" for i in range(tiny.CLASSES)}}


def gpt2(cls: Any = GPT2ForSequenceClassification, **kwargs: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": tiny.VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return cls(GPT2Config(**{**sizes, **NAMES, "bos_token_id": None, "eos_token_id": None, **kwargs}))


def llama(**kwargs: Any) -> nn.Module:
    return LlamaForSequenceClassification(tiny.llama_config(**NAMES, **kwargs))


def failing(teacher: nn.Module, folder: Any, task: str = "classification", **kwargs: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        tiny.trainer(task, folder, pair=(tiny.models(task)[0], teacher), **kwargs).train()
    return caught.value


# ---- the pad token ----


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_classifier_without_a_pad_token_is_named(build, tmp_path):
    error = failing(build(pad_token_id=None), tmp_path)
    assert isinstance(error, ValueError)
    text = str(error)
    assert text.startswith("`teacher_model.config.pad_token_id` is None; expected 0, as the rows are padded, because ")
    assert 'teacher_model_init_kwargs {"pad_token_id": 0}' in text


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_classifier_with_another_pad_token_than_the_batch_is_refused(build, tmp_path):
    student = tiny.models("classification")[0]
    student.config.pad_token_id = None  # only the batch shows it
    expected = r"`teacher_model\.config\.pad_token_id` is 36; expected 0, the id of the padding"
    with pytest.raises(ValueError, match=expected):
        tiny.trainer("classification", tmp_path, pair=(student, build(pad_token_id=36))).train()


@pytest.mark.parametrize("build", [gpt2, llama])
def test_the_pad_token_may_be_given_by_path(build, tmp_path):
    build(pad_token_id=None).save_pretrained(tmp_path / "teacher")
    build_pair = (build(pad_token_id=0), str(tmp_path / "teacher"))
    trainer = tiny.trainer(
        "classification", tmp_path, pair=build_pair, max_steps=1, teacher_model_init_kwargs={"pad_token_id": 0}
    )
    trainer.train()
    assert trainer.teacher.model.config.pad_token_id == 0


def test_one_row_needs_no_pad_token(tmp_path):
    args = {"per_device_train_batch_size": 1, "max_steps": 1}
    student = tiny.models("classification")[0]
    tiny.trainer("classification", tmp_path, pair=(student, gpt2(pad_token_id=None)), **args).train()


def test_rows_padded_on_the_left_need_the_teachers_pad_token_too(tmp_path):
    rows = tiny.rows("classification")
    for row in rows:
        short = 16 - len(row["input_ids"])
        row["input_ids"], row["attention_mask"] = [0] * short + row["input_ids"], [0] * short + row["attention_mask"]
    student = tiny.models("classification")[0]
    student.config.pad_token_id = None
    # the last token of each row is real, whatever the padding in front of it is
    tiny.trainer("classification", tmp_path, pair=(student, gpt2(pad_token_id=0)), data=rows, max_steps=1).train()


# ---- positions ----


def too_few(name: str) -> nn.Module:
    if name == "gpt2":
        return gpt2(pad_token_id=0, n_positions=8)
    if name == "bert":
        return BertForSequenceClassification(
            BertConfig(**{**tiny.bert_config(24).to_dict(), "max_position_embeddings": 8})
        )
    config = {**tiny.bert_config(24).to_dict(), "max_position_embeddings": 9}
    config.pop("model_type")
    return RobertaForSequenceClassification(RobertaConfig(**config))


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta"])
def test_a_row_longer_than_the_teachers_positions_is_named(name, tmp_path):
    text = str(failing(too_few(name), tmp_path))
    assert text.startswith("`input_ids` is of 14 positions; expected at most 8, the positions of the teacher (max_pos")
    assert "max_length=8, truncation=True" in text


def test_a_later_row_is_looked_at_too(tmp_path):
    rows = sorted(tiny.rows("classification"), key=lambda row: len(row["input_ids"]))
    error = failing(too_few("bert"), tmp_path, data=rows)
    assert "the positions of the teacher" in str(error)


def test_padding_is_no_position_for_roberta(tmp_path):
    rows = tiny.rows("classification")
    for row in rows:
        for name in ("input_ids", "attention_mask"):
            row[name] = row[name][:8] + [0] * (20 - len(row[name][:8]))
    student = tiny.models("classification")[0]
    tiny.trainer("classification", tmp_path, pair=(student, too_few("roberta")), data=rows, max_steps=1).train()


def test_a_language_model_with_too_few_positions_is_named(tmp_path):
    teacher = gpt2(GPT2LMHeadModel, pad_token_id=0, n_positions=8, id2label=None)
    error = failing(teacher, tmp_path, "causal_lm")
    assert "`input_ids` is of 13 positions; expected at most 8, the positions of the teacher" in str(error)


def test_virtual_tokens_take_positions_of_the_teacher(tmp_path):
    peft = pytest.importorskip("peft")
    teacher = gpt2(GPT2LMHeadModel, pad_token_id=0, n_positions=16, id2label=None)
    teacher = peft.get_peft_model(teacher, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    error = failing(teacher, tmp_path, "causal_lm")
    assert "`input_ids` is of 13 positions; expected at most 12, the positions of the teacher" in str(error)


def test_rotary_positions_have_no_end(tmp_path):
    teacher = llama(pad_token_id=0, max_position_embeddings=4)
    student = tiny.models("classification")[0]
    tiny.trainer("classification", tmp_path, pair=(student, teacher), max_steps=1).train()


def test_the_decoders_positions_are_looked_at(tmp_path):
    def bart(positions: int, hidden: int) -> nn.Module:
        config = copy.deepcopy(build_seq2seq("bart", hidden).config)
        config.max_position_embeddings = positions
        return BartForConditionalGeneration(config)

    rows = [{**row, "labels": list(range(4, 24))} for row in seq2seq_rows()]
    args = Seq2SeqDistillationTrainingArguments(output_dir=str(tmp_path), **tiny._BASE)
    trainer = Seq2SeqDistillationTrainer(
        model=bart(64, 16), teacher_model=bart(12, 24), args=args, data_collator=tiny.pad, train_dataset=rows
    )
    with pytest.raises(ValueError, match="`decoder_input_ids` is of 20 positions; expected at most 12, the positions"):
        trainer.train()


# ---- whatever else its forward raises ----


class Teacher(nn.Module):
    """A classifier of the user's own that fails in one way."""

    def __init__(self, fault: Any) -> None:
        super().__init__()
        self.inner, self.fault = tiny.models("classification")[1], fault

    def forward(self, input_ids: Any = None, attention_mask: Any = None) -> Any:
        self.fault(input_ids)
        return self.inner(input_ids, attention_mask=attention_mask)


def raises(error: Exception) -> Any:
    def fault(ids: Any) -> None:
        raise error

    return fault


FAULTS = {
    "IndexError": (raises(IndexError("index out of range in self")), ValueError),
    "KeyError": (raises(KeyError("pixel_values")), ValueError),
    "ValueError": (raises(ValueError("no image")), ValueError),
    "AttributeError": (raises(AttributeError("'NoneType' object has no attribute 'shape'")), RuntimeError),
    "TypeError": (raises(TypeError("unsupported operand")), TypeError),
    "NotImplementedError": (raises(NotImplementedError("later")), RuntimeError),
    "RuntimeError": (lambda ids: torch.zeros(2, 3) @ torch.zeros(2, 3), RuntimeError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_any_error_of_its_forward_says_that_it_was_the_teacher(fault, tmp_path):
    act, kind = FAULTS[fault]
    error = failing(Teacher(act), tmp_path)
    assert type(error) is kind
    assert str(error).startswith("`teacher_model` is a Teacher, whose forward failed on input_ids [8, 14] int64, att")
    assert f"({fault}: " in str(error)
    assert "teacher_* columns" in str(error)
    assert error.__cause__ is not None
    assert type(error.__cause__).__name__ == fault


def test_an_input_that_the_batch_lacks_is_named(tmp_path):
    class Part(nn.Module):
        def forward(self, input_ids: Any, audio: Any, attention_mask: Any = None) -> Any:
            return input_ids

    class Needs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, **inputs: Any) -> Any:
            return self.part(**inputs)

    error = failing(Needs(), tmp_path)
    assert type(error) is TypeError
    assert str(error).startswith("`teacher_model` is a Needs, whose forward needs 'audio'; the batch has input_ids [8,")
    assert "as a teacher_* column" in str(error)
    assert isinstance(error.__cause__, TypeError)


def test_a_column_that_a_part_of_it_does_not_take_is_named(tmp_path):
    class Hands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    error = failing(Hands(), tmp_path)
    assert str(error).startswith("`teacher_model` is a Hands, part of which does not take input_ids; expected a model")
    assert isinstance(error.__cause__, TypeError)


def test_a_teacher_that_reads_images_is_told_that_there_are_none(tmp_path):
    error = failing(tiny.vit(), tmp_path)
    assert "`teacher_model` is a ViTForImageClassification, whose forward" in str(error)


def test_a_batch_that_does_not_fit_into_memory_can_still_be_halved(tmp_path):
    from accelerate.utils.memory import should_reduce_batch_size

    words = "CUDA out of memory. Tried to allocate 2 GiB"
    error = failing(Teacher(raises(RuntimeError(words))), tmp_path)
    assert should_reduce_batch_size(error)


# ---- the decoder's start token ----


@pytest.mark.parametrize("implementation", ["full", "fused"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["t5", "bart", "m2m_100", "whisper"])
def test_each_decoder_begins_with_its_own_start_token(name, given, implementation, tmp_path, capsys):
    def models() -> list[Any]:
        torch.manual_seed(0)
        made = list(pair("whisper")) if name == "whisper" else [build_seq2seq(name, h) for h in (16, 24)]
        made[1].config.decoder_start_token_id = 5
        return made

    rows = KINDS["whisper"].rows() if name == "whisper" else seq2seq_rows()
    student, teacher = models()
    start = student.config.decoder_start_token_id
    assert start != 5

    def collate(features: Any) -> Any:
        batch = tiny.pad(features)
        if given:
            ids = torch.cat([torch.full_like(batch["labels"][:, :1], start), batch["labels"][:, :-1]], 1)
            batch["decoder_input_ids"] = ids.masked_fill(ids == -100, 0)
        return batch

    args = Seq2SeqDistillationTrainingArguments(
        output_dir=str(tmp_path), **{**tiny._BASE, "max_steps": 1}, kd_reduction="tokenmean", kd_temperature=2.0,
        kd_loss_implementation=implementation,
    )  # fmt: skip
    trainer = Seq2SeqDistillationTrainer(
        model=student, teacher_model=teacher, args=args, data_collator=collate, train_dataset=rows
    )
    trainer.train()
    assert "begin with token" in capsys.readouterr().out
    student, teacher = models()
    batch = tiny.pad(rows[:8])
    with torch.no_grad():
        z, y = (model.eval()(**batch).logits.double() for model in (student, teacher))
    counted = batch["labels"] != -100
    p, q = (F.log_softmax(x[counted] / 2, -1) for x in (y, z))
    soft = 4 * (p.exp() * (p - q)).sum(-1).mean()
    assert tiny.logged(trainer, "soft_loss") == pytest.approx([soft.item()], rel=1e-4)


def test_equal_start_tokens_need_no_line(tmp_path, capsys):
    args = Seq2SeqDistillationTrainingArguments(output_dir=str(tmp_path), **{**tiny._BASE, "max_steps": 1})
    student, teacher = (build_seq2seq("t5", hidden) for hidden in (16, 24))
    Seq2SeqDistillationTrainer(
        model=student, teacher_model=teacher, args=args, data_collator=tiny.pad, train_dataset=seq2seq_rows()
    ).train()
    assert "begin with token" not in capsys.readouterr().out
