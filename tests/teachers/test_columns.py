"""`teachers/columns.py`: a teacher with another tokenizer or another image size, its columns and their padding."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertForSequenceClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from kd_trainer import DistillationTrainer, SoftTargetLoss, TeacherCollator, add_teacher_inputs
from tests.helpers import tiny

WORDS = "the cat sat on a mat while two quick brown dogs jumped over seven lazy foxes"
SENTENCES = [" ".join(WORDS.split()[i % 16 : i % 16 + 1 + i % 5]) for i in range(24)]


@pytest.fixture(scope="module")
def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    read = ["input_ids", "attention_mask"]
    return tiny.byte_level_tokenizer(SENTENCES, 300, ["<pad>"], pad_token="<pad>", model_input_names=read)


def text(count: int = 24) -> Dataset:
    return Dataset.from_dict({"text": SENTENCES[:count], "labels": [i % tiny.CLASSES for i in range(count)]})


def test_the_teachers_columns_are_what_its_tokenizer_says(byte_level):
    data = add_teacher_inputs(text(), byte_level, "text")
    assert data.column_names == ["text", "labels", "teacher_input_ids", "teacher_attention_mask"]
    assert data["teacher_input_ids"][3] == byte_level(SENTENCES[3])["input_ids"]
    cut = add_teacher_inputs(text(), byte_level, "text", max_length=2)
    assert max(map(len, cut["teacher_input_ids"])) == 2


def test_pairs_of_texts_splits_and_streams(wordpiece):
    data = text().add_column("other", SENTENCES[::-1])
    both = add_teacher_inputs(DatasetDict(train=data, test=data), wordpiece, ["text", "other"])
    expected = wordpiece(SENTENCES[5], SENTENCES[-6])["input_ids"]
    assert both["test"]["teacher_input_ids"][5] == expected
    stream = add_teacher_inputs(data.to_iterable_dataset(), wordpiece, ["text", "other"])
    assert list(stream)[5]["teacher_input_ids"] == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("words", r"'words'; expected a column of dataset \(text, labels\)"),
        ([], "expected the name of a column"),
        (["text"] * 3, "or of two"),
    ],
)
def test_columns_that_are_not_there(columns, expected, byte_level):
    with pytest.raises(ValueError, match=f"`columns` is .*{expected}"):
        add_teacher_inputs(text(), byte_level, columns)


def test_each_side_is_padded_by_its_own_tokenizer(wordpiece, byte_level):
    data = add_teacher_inputs(text(), byte_level, "text").map(lambda row: wordpiece(row["text"])).remove_columns("text")
    rows = [data[i] for i in range(6)]
    batch = TeacherCollator(DataCollatorWithPadding(wordpiece), byte_level, pad_to_multiple_of=8)(rows)
    alone = DataCollatorWithPadding(wordpiece)([{k: v for k, v in row.items() if k[:8] != "teacher_"} for row in rows])
    expected = byte_level(SENTENCES[:6], padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert set(batch) == {*alone, "teacher_input_ids", "teacher_attention_mask"}
    for name, value in alone.items():
        assert torch.equal(batch[name], value), name
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[f"teacher_{name}"], expected[name]), name
    assert rows[0].keys() == data[0].keys()  # the rows are left as they are


def test_images_are_stacked_and_batches_without_teacher_columns_left_alone():
    rows = [{"pixel_values": torch.zeros(3, 4, 4), "teacher_pixel_values": torch.ones(3, 8, 8), "labels": 1}] * 3
    batch = TeacherCollator(default_data_collator)(rows)
    assert batch["teacher_pixel_values"].shape == (3, 3, 8, 8)
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert set(TeacherCollator(default_data_collator)([{"x": 1.0}])) == {"x"}


def test_rows_that_lack_the_teachers_columns(byte_level):
    rows = [{"x": 1.0, "teacher_input_ids": [1]}, {"x": 1.0}]
    with pytest.raises(ValueError, match=r"some lack teacher columns; expected the same columns.*add_teacher_inputs"):
        TeacherCollator(default_data_collator, byte_level)(rows)
    with pytest.raises(ValueError, match=r"`teacher_tokenizer` is None; expected a tokenizer"):
        TeacherCollator(default_data_collator)(rows[:1])


def test_a_byte_level_teacher_and_a_wordpiece_student(tmp_path, wordpiece, byte_level):
    torch.manual_seed(0)
    names = {"id2label": tiny.bert_config().id2label, "label2id": tiny.bert_config().label2id}
    student = BertForSequenceClassification(tiny.bert_config(vocab_size=len(wordpiece), initializer_range=0.5))
    teacher = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=len(byte_level), n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.5,
                   pad_token_id=byte_level.pad_token_id, bos_token_id=None, eos_token_id=None, **names)
    )  # fmt: skip
    data = add_teacher_inputs(text(), byte_level, "text")
    data = data.map(lambda batch: wordpiece(batch["text"]), batched=True)
    run = DistillationTrainer(
        student,
        tiny.arguments(tmp_path, remove_unused_columns=True, kd_alpha=1.0, max_steps=20),
        teacher_model=teacher,
        train_dataset=data,
        eval_dataset=data,
        processing_class=wordpiece,
        data_collator=TeacherCollator(DataCollatorWithPadding(wordpiece), byte_level),
    )
    student_inputs = wordpiece(SENTENCES, padding=True, return_tensors="pt")
    teacher_inputs = byte_level(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = SoftTargetLoss(temperature=3.0)(
            student(**student_inputs).logits, teacher.eval()(**teacher_inputs).logits
        )
    before = run.evaluate()
    assert before["eval_soft_loss"] == pytest.approx(expected.item(), rel=1e-4)
    run.train()
    assert run.evaluate()["eval_soft_loss"] < 0.5 * before["eval_soft_loss"]
