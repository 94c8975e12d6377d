"""`compatibility.py`: what is refused, what is warned of once, and that a remap moves the right numbers."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from kd_trainer import DistillationTrainer
from kd_trainer.compatibility import check_same_tokens, check_separate, class_order
from tests import tiny

NAMES = ["anger", "joy", "fear"]


def model(names: list[str] | None = None, hidden: int = 16, **kwargs) -> BertForSequenceClassification:
    """A tiny classifier with these class names; None leaves upstream's LABEL_0 ..."""
    if names is None:
        config = tiny.bert_config(hidden, id2label=None, label2id=None, num_labels=3, **kwargs)
    else:
        ids = dict(enumerate(names))
        config = tiny.bert_config(hidden, id2label=ids, label2id={v: k for k, v in ids.items()}, **kwargs)
    return BertForSequenceClassification(config)


# ---- the same weights ----


def test_the_student_cannot_teach_itself():
    student = model(NAMES)
    with pytest.raises(
        ValueError, match=r"`teacher_model` is the student itself; expected a second model.*copy\.deepcopy"
    ):
        check_separate(student, student)
    check_separate(student, copy.deepcopy(student))


def test_a_shared_parameter_is_refused():
    student, teacher = model(NAMES), model(NAMES)
    teacher.bert.embeddings.word_embeddings = student.bert.embeddings.word_embeddings
    with pytest.raises(
        ValueError, match=r"shares 1 parameters with the student \(bert\.embeddings\.word_embeddings\.weight\)"
    ):
        check_separate(student, teacher)


# ---- class names ----


def test_equal_names_pass_in_silence(caplog):
    assert class_order(model(NAMES), model(NAMES), remap=False) is None
    assert class_order(tiny.Plain(), model(NAMES), remap=False) is None
    assert not caplog.records


def test_different_numbers_of_classes():
    with pytest.raises(
        ValueError, match=r"a model with 2 classes \(no, yes\); expected 3 classes as the student has \(anger, joy"
    ):
        class_order(model(NAMES), model(["no", "yes"]), remap=True)


PERMUTED = ["fear", "anger", "joy"]


def test_a_permutation_is_refused():
    with pytest.raises(
        ValueError, match=r"class 'anger' has id 1; expected id 0 as in the student.*kd_remap_labels to true"
    ):
        class_order(model(NAMES), model(PERMUTED), remap=False)


def test_a_permutation_is_applied_on_demand():
    order = class_order(model(NAMES), model(PERMUTED), remap=True)
    assert [PERMUTED[i] for i in order] == NAMES


@pytest.mark.parametrize("remap", [False, True])
def test_moved_names_that_are_no_permutation_are_refused(remap):
    with pytest.raises(ValueError, match=r"class 'anger' has id 1; expected id 0.*Give both configs the same id2label"):
        class_order(model(NAMES), model(["joy", "anger", "disgust"]), remap=remap)


def test_a_remap_puts_the_right_numbers_into_the_loss(tmp_path):
    torch.manual_seed(0)
    student, teacher = model(NAMES, initializer_range=0.5), model(PERMUTED, 24, initializer_range=0.5)
    data = [{**row, "labels": row["labels"] % 3} for row in tiny.rows("classification")]
    batch = tiny.pad(data[:8])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        z_s, z_t = student.eval()(**inputs).logits, teacher.eval()(**inputs).logits
    by_hand = torch.stack([z_t[:, PERMUTED.index(name)] for name in NAMES], dim=1)
    log_q, log_p = F.log_softmax(z_s / 2, -1), F.log_softmax(by_hand / 2, -1)
    expected = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    unmapped = 4 * F.kl_div(log_q, F.log_softmax(z_t / 2, -1), log_target=True, reduction="batchmean")
    assert abs(expected - unmapped) > 0.01
    with pytest.raises(ValueError, match="kd_remap_labels"):
        tiny.trainer("classification", tmp_path, pair=(student, teacher), data=data)
    run = tiny.trainer(
        "classification",
        tmp_path,
        pair=(student, teacher),
        data=data,
        kd_remap_labels=True,
        kd_temperature=2.0,
        max_steps=1,
    )
    run.train()
    assert tiny.logged(run, "soft_loss")[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (None, None),
        (NAMES, None),
        (None, NAMES),
        (NAMES, ["Joy", "Fear", "Anger"]),  # a difference of case says nothing for certain
        (NAMES, ["anger", "joy", "scare"]),
    ],
)
def test_unknown_names_warn_once(ours, theirs, caplog, tmp_path):
    student, teacher = model(ours), model(theirs)
    data = [{**row, "labels": row["labels"] % 3} for row in tiny.rows("classification")]
    with caplog.at_level(logging.WARNING, logger="kd_trainer"):
        run = tiny.trainer("classification", tmp_path, pair=(student, teacher), data=data, max_steps=2)
        run.train()
        run.evaluate(data)
    warnings = [record.message for record in caplog.records if record.name.startswith("kd_trainer")]
    assert len(warnings) == 1
    assert "cannot be compared by name" in warnings[0]
    assert "Set the same id2label in both configs" in warnings[0]


def test_language_models_have_no_classes_to_compare(caplog, tmp_path):
    tiny.trainer("causal_lm", tmp_path)
    assert not [record for record in caplog.records if record.name.startswith("kd_trainer")]


# ---- tokens ----


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


WORDS = [f"w{i}" for i in range(10)]


def saved_teacher(folder, words: list[str] | None, **kwargs):
    """A teacher loaded from a folder that holds its tokenizer too."""
    model(NAMES, **kwargs).save_pretrained(folder)
    if words is not None:
        tokenizer(words).save_pretrained(folder)
    return BertForSequenceClassification.from_pretrained(folder)


def test_the_same_tokens_pass(tmp_path):
    teacher = saved_teacher(tmp_path, WORDS, vocab_size=200, sep_token_id=7)
    check_same_tokens(model(NAMES, sep_token_id=8), teacher, tokenizer(WORDS), {})  # the tokens decide, not the configs


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            [*WORDS[1:], WORDS[0]],
            r"12 tokens, 'w0' with id 11; expected the tokens of processing_class \(12, 'w0' with id 2\)",
        ),
        ([*WORDS, "more"], r"13 tokens, 'more' with id 12; expected .*\(12, 'more' with id None\)"),
        (WORDS[:-1], r"11 tokens, 'w9' with id None; expected .*\(12, 'w9' with id 11\)"),
    ],
)
def test_other_tokens_are_refused(words, shown, tmp_path):
    teacher = saved_teacher(tmp_path, words)
    with pytest.raises(ValueError, match=shown + ".*read the student's input_ids as other words.*teacher_"):
        check_same_tokens(model(NAMES), teacher, tokenizer(WORDS), {})


def test_other_tokens_are_refused_by_the_trainer_before_the_first_step(tmp_path):
    teacher = saved_teacher(tmp_path, WORDS[::-1])
    kwargs = {"data_collator": tiny.pad, "processing_class": tokenizer(WORDS)}
    data = [{**row, "labels": row["labels"] % 3} for row in tiny.rows("classification")]
    run = DistillationTrainer(
        model=model(NAMES), teacher_model=teacher, args=tiny.arguments(tmp_path), train_dataset=data, **kwargs
    )
    before = tiny.weights(run.model)
    with pytest.raises(ValueError, match="tokenizer"):
        run.train()
    assert torch.equal(tiny.weights(run.model), before)
    own = [
        {**row, "teacher_input_ids": row["input_ids"], "teacher_attention_mask": row["attention_mask"]} for row in data
    ]
    run = DistillationTrainer(
        model=model(NAMES), teacher_model=teacher, args=tiny.arguments(tmp_path), train_dataset=own, **kwargs
    )
    run.train()  # a teacher with its own inputs may have its own tokens


def test_a_folder_without_a_tokenizer_falls_back_on_the_configs(tmp_path):
    """Upstream makes up a tokenizer of five special tokens for such a folder: that one must not be compared."""
    teacher = saved_teacher(tmp_path, None)
    check_same_tokens(model(NAMES), teacher, tokenizer(WORDS), {})


@pytest.mark.parametrize(
    "name", ["pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "bos_token_id", "eos_token_id"]
)
def test_other_special_ids_are_refused(name):
    build = LlamaForCausalLM
    student, teacher, unset = (build(tiny.llama_config()) for _ in range(3))
    for m, value in ((student, 3), (teacher, 4), (unset, None)):
        setattr(m.config, name, value)
    with pytest.raises(
        ValueError, match=rf"`teacher_model` is a model with {name} 4; expected 3 as in the student.*processing_c"
    ):
        check_same_tokens(student, teacher, None, {})
    check_same_tokens(student, copy.deepcopy(student), None, {})
    check_same_tokens(student, unset, None, {})


def test_several_ends_of_a_text_may_overlap():
    student, teacher = (LlamaForCausalLM(tiny.llama_config()) for _ in range(2))
    student.config.eos_token_id, teacher.config.eos_token_id = 5, [7, 5]
    check_same_tokens(student, teacher, None, {})
    teacher.config.eos_token_id = [7, 8]
    with pytest.raises(ValueError, match=r"eos_token_id \[7, 8\]; expected 5"):
        check_same_tokens(student, teacher, None, {})


def test_a_teacher_with_fewer_tokens_is_refused():
    with pytest.raises(
        ValueError, match=r"with vocab_size 30; expected at least 37, the student's, because .*embedding"
    ):
        check_same_tokens(model(NAMES), model(NAMES, vocab_size=30), None, {})
    check_same_tokens(model(NAMES, vocab_size=30), model(NAMES), None, {})
    check_same_tokens(tiny.Plain(), model(NAMES), None, {})
