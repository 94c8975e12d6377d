"""`compatibility.py`: what is refused, what is warned of once, and that a remap moves the right numbers."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kd_trainer import DIVERGENCES, DistillationTrainer, SoftTargetLoss
from kd_trainer.tasks.inputs import vocabulary_rows
from kd_trainer.tasks.kinds import TASKS
from kd_trainer.teachers.compatibility import check_same_tokens, class_order, common_ids, vocabulary_line
from kd_trainer.training.objective import LossInputs, Objective
from tests.helpers import tiny

NAMES = ["anger", "joy", "fear"]


def model(names: list[str] | None = None, hidden: int = 16, **kwargs) -> BertForSequenceClassification:
    """A tiny classifier with these class names; None leaves upstream's LABEL_0 ..."""
    if names is None:
        config = tiny.bert_config(hidden, id2label=None, label2id=None, num_labels=3, **kwargs)
    else:
        ids = dict(enumerate(names))
        config = tiny.bert_config(hidden, id2label=ids, label2id={v: k for k, v in ids.items()}, **kwargs)
    return BertForSequenceClassification(config)


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
    ("student_names", "teacher_names"),
    [
        (NAMES, None),
        (None, NAMES),
        (NAMES, ["anger", "joy", "scare"]),
    ],
)
def test_unknown_names_warn_once(student_names, teacher_names, caplog, tmp_path):
    student, teacher = model(student_names), model(teacher_names)
    data = [{**row, "labels": row["labels"] % 3} for row in tiny.rows("classification")]
    with caplog.at_level(logging.WARNING, logger="kd_trainer"):
        run = tiny.trainer("classification", tmp_path, pair=(student, teacher), data=data, max_steps=2)
        run.train()
        run.evaluate(data)
    warnings = [record.message for record in caplog.records if record.name.startswith("kd_trainer")]
    assert len(warnings) == 1
    assert "cannot be compared by name" in warnings[0]
    assert "Set the same id2label in both configs" in warnings[0]


def test_default_names_on_both_sides_are_no_reason_to_warn(caplog, tmp_path):
    data = [{**row, "labels": row["labels"] % 3} for row in tiny.rows("classification")]
    with caplog.at_level(logging.WARNING, logger="kd_trainer"):
        run = tiny.trainer("classification", tmp_path, pair=(model(), model()), data=data, max_steps=1)
        run.train()
        run.evaluate(data)
    assert not [record for record in caplog.records if record.name.startswith("kd_trainer")]
    row = next(row for row in run.check(evaluate=False) if row.what == "classes")
    assert row.status == "ok"
    assert "no names (LABEL_0, LABEL_1, LABEL_2) in both" in row.found


def test_default_names_that_differ_in_number_are_still_refused():
    with pytest.raises(ValueError, match="expected 3 classes as the student has"):
        class_order(model(), model(["LABEL_0", "LABEL_1"]), remap=False)


def test_models_without_classes_do_not_warn(caplog, tmp_path):
    """An encoder alone has upstream's default names in its config, and nothing that they name."""

    class Encoder(BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).pooler_output

    config = tiny.bert_config(id2label=None, label2id=None)
    pair = Encoder(config), Encoder(tiny.bert_config(id2label=None, label2id=None))
    with caplog.at_level(logging.WARNING, logger="kd_trainer"):
        data = [{**row, "labels": row["labels"] % 2} for row in tiny.rows("classification")]
        tiny.trainer("classification", tmp_path, pair=pair, data=data, max_steps=1).train()
    assert not [record for record in caplog.records if record.name.startswith("kd_trainer")]


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


# ---- vocabularies of different size ----


def test_rows_that_a_model_reads_and_writes():
    llama = LlamaForCausalLM(tiny.llama_config())
    assert vocabulary_rows(llama) == vocabulary_rows(llama, written=True) == tiny.VOCAB
    llama.resize_token_embeddings(40)
    assert vocabulary_rows(llama) == vocabulary_rows(llama, written=True) == 40
    llama.model.embed_tokens.weight.data = torch.empty(0)  # as where another process holds the weight
    assert vocabulary_rows(llama) == 40
    assert vocabulary_rows(tiny.Plain()) is None
    assert vocabulary_rows(tiny.Plain(), written=True) is None


def lm(vocabulary: int, hidden: int = 16, **kwargs) -> LlamaForCausalLM:
    return LlamaForCausalLM(tiny.llama_config(hidden, vocab_size=vocabulary, **kwargs))


def lm_with_tokens(folder, vocabulary: int, words: list[str]) -> LlamaForCausalLM:
    """A language model of so many rows, loaded from a folder that holds its tokenizer too."""
    lm(vocabulary).save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "teacher_words"),
    [
        (16, 24, WORDS),  # as Qwen2.5 1.5B and 7B: the same tokens, padded differently
        (24, 16, WORDS),
        (24, 12, WORDS),  # the student's padding is no token
        (12, 13, [*WORDS, "more"]),  # a token that the student cannot write: left out of the soft loss
        (12, 12, [*WORDS, "more"]),  # a token without a row in either
    ],
)
def test_the_same_tokens_in_other_vocabularies_pass(student_rows, teacher_rows, teacher_words, tmp_path):
    teacher = lm_with_tokens(tmp_path, teacher_rows, teacher_words)
    assert check_same_tokens(lm(student_rows), teacher, tokenizer(WORDS), {}) == "tokenizers"


@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "student_words", "teacher_words", "shown"),
    [
        # As Qwen2.5 and Qwen3: '<think>' lies in the student's padding, which its tokenizer cannot decode.
        (16, 24, WORDS, [*WORDS, "<think>"], r"'<think>' with id 12; expected .*'<think>' with id None"),
        # As a pad token added to the student alone: the teacher would read an untrained row, or none.
        (16, 24, [*WORDS, "<pad>"], WORDS, r"'<pad>' with id None; expected .*'<pad>' with id 12"),
        (13, 12, [*WORDS, "<pad>"], WORDS, r"vocab_size 12; expected at least 13, for '<pad>' of processing_class"),
        (13, 12, [*WORDS, "<pad>"], [*WORDS, "<pad>"], r"vocab_size 12; expected at least 13, for '<pad>' of proc"),
        # The same id, another token.
        (16, 24, [*WORDS, "a"], [*WORDS, "b"], r"tokenizer has 13 tokens, '[ab]' with id (None|12)"),
    ],
)
def test_tokens_that_only_one_side_has_are_refused(
    student_rows, teacher_rows, student_words, teacher_words, shown, tmp_path
):
    teacher = lm_with_tokens(tmp_path, teacher_rows, teacher_words)
    with pytest.raises(ValueError, match=shown):
        check_same_tokens(lm(student_rows), teacher, tokenizer(student_words), {})


def test_the_tokenizer_of_a_processor_is_compared(tmp_path):
    teacher = lm_with_tokens(tmp_path, 16, WORDS[::-1])
    processor = type("Processor", (), {"tokenizer": tokenizer(WORDS)})()
    with pytest.raises(ValueError, match="a model whose tokenizer has"):
        check_same_tokens(lm(16), teacher, processor, {})


def test_what_is_known_without_tokenizers():
    assert check_same_tokens(lm(37), lm(40), None, {}) == "special ids"
    none = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    assert check_same_tokens(lm(37, **none), lm(40), None, {}) is None


def test_common_ids():
    assert common_ids(37, 37, None) is None
    assert common_ids(40, 37, "tokenizers") == common_ids(37, 41, "tokenizers") == 37
    assert common_ids(37, 40, "special ids") == 37
    for teacher_size, known_by in ((40, None), (41, "special ids")):
        with pytest.raises(
            ValueError, match=rf"a model of {teacher_size} token ids; expected 37 as the student, because no"
        ):
            common_ids(37, teacher_size, known_by)


def test_the_line_names_the_side():
    assert "the teacher's other 128 are left out" in vocabulary_line(151936, 152064, "tokenizers")
    line = vocabulary_line(152064, 151936, "special ids")
    assert "the student's other 128 are left out and learn from the hard loss alone" in line
    assert "compared by their special ids" in line
    assert "151,936 common ids" in line


@pytest.mark.parametrize("sizes", [(11, 8), (8, 11)])
@pytest.mark.parametrize("positions", ["labels", "attended"])
@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "seq2seq_lm"])
def test_the_loss_over_common_ids_written_out(task, positions, sizes):
    generator = torch.Generator().manual_seed(0)
    z_s = torch.randn(2, 5, sizes[0], generator=generator, dtype=torch.float64, requires_grad=True)
    z_t = torch.randn(2, 5, sizes[1], generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 8, (2, 5), generator=generator)
    labels[0, 1] = labels[1, 3] = -100
    labels[0, 2] = sizes[0] - 1  # of the student alone, where it has more
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": labels}
    task, objective = TASKS[task], Objective(0.6, 2.0, reduction="tokenmean", positions=positions)
    counts = objective.count(task, inputs)
    soft_loss = SoftTargetLoss(temperature=2.0, reduction="sum")
    parts = objective(LossInputs(task, inputs, counts, 8), soft_loss, z_s, z_t)

    soft, hard, same, n_soft, n_hard = 0.0, 0.0, 0, 0, 0
    for row in range(2):
        for i in range(5):
            j = i + 1 if task.name == "causal_lm" else i
            label = int(labels[row, j]) if j < 5 else -100
            if label != -100:
                hard, n_hard = hard - z_s[row, i].log_softmax(-1)[label], n_hard + 1
            if label != -100 if positions == "labels" or task.name == "seq2seq_lm" else j < 5:
                p, q = (z[row, i, :8].div(2.0).softmax(-1) for z in (z_t, z_s))
                soft, n_soft = soft + 4.0 * (p * (p / q).log()).sum(), n_soft + 1
                same += int(z_t[row, i, :8].argmax() == z_s[row, i, :8].argmax())
    torch.testing.assert_close(parts.soft, soft / n_soft, rtol=1e-10, atol=0)
    torch.testing.assert_close(parts.hard, hard / n_hard, rtol=1e-10, atol=0)
    assert float(parts.agreement) == pytest.approx(same / n_soft)
    (gradient,) = torch.autograd.grad(parts.total, z_s, retain_graph=True)
    (expected,) = torch.autograd.grad(0.6 * soft / n_soft + 0.4 * hard / n_hard, z_s)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_left_out_get_no_gradient_from_the_soft_loss(divergence, dtype):
    generator = torch.Generator().manual_seed(0)
    z_s = torch.randn(2, 5, 11, generator=generator).to(dtype).requires_grad_()
    z_t = torch.randn(2, 5, 8, generator=generator).to(dtype)
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    task, objective = TASKS["masked_lm"], Objective(1.0, 1.5, divergence, reduction="tokenmean")
    soft_loss = SoftTargetLoss(temperature=1.5, divergence=divergence, reduction="sum")
    objective(LossInputs(task, inputs, objective.count(task, inputs), 8), soft_loss, z_s, z_t).total.backward()
    assert not z_s.grad[..., 8:].any()
    assert z_s.grad[..., :8].any(-1).all()


@pytest.mark.parametrize("task", [name for name in TASKS if name not in ("question_answering", "embedding")])
def test_no_task_takes_other_sizes_unasked(task):
    task = TASKS[task]
    shape = (2, 5, 5)[: task.dims - 1]
    student, teacher = torch.zeros(*shape, 8), torch.zeros(*shape, 11)
    for common in (None, 7, 11):
        with pytest.raises(ValueError, match=r"giving logits of shape \(.*11\); expected the student's shape"):
            task.check_shapes(student, teacher, None, common)
    with pytest.raises(ValueError, match="giving logits of shape"):
        task.check_shapes(student, torch.zeros(3, *shape[1:], 11), None, 8)


def padded_pair(task: str, student_size: int, teacher_size: int):
    torch.manual_seed(0)
    if task == "causal_lm":
        return lm(student_size), lm(teacher_size, 24)
    if task == "masked_lm":
        return tuple(
            BertForMaskedLM(tiny.bert_config(h, vocab_size=v, initializer_range=0.5))
            for h, v in ((16, student_size), (24, teacher_size))
        )
    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32, "init_std": 0.5}  # fmt: skip
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0,
           "forced_eos_token_id": 2}  # fmt: skip
    return tuple(
        BartForConditionalGeneration(BartConfig(vocab_size=v, d_model=h, **shape, **ids))
        for h, v in ((16, student_size), (24, teacher_size))
    )


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "seq2seq_lm"])
def test_a_padded_teacher_trains_the_common_ids(task, tmp_path, capsys):
    student, teacher = padded_pair(task, 37, 40)
    data = tiny.rows("causal_lm")
    kwargs = {"kd_alpha": 1.0, "kd_temperature": 2.0, "kd_reduction": "tokenmean", "kd_positions": "labels"}
    batch = tiny.pad(data[:8])
    with torch.no_grad():
        z_s, z_t = (m.eval()(**batch).logits for m in (student, teacher))
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:] if task == "causal_lm" else batch["labels"]
    log_q, log_p = (F.log_softmax(z[..., :37] / 2, -1)[labels != -100].double() for z in (z_s, z_t))
    expected = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    run = tiny.trainer(task, tmp_path, pair=(student, teacher), data=data, max_steps=2, **kwargs)
    run.train()
    assert run._plan.common_ids == 37
    assert tiny.logged(run, "soft_loss")[0] == pytest.approx(expected.item(), rel=1e-5)
    line = "[kd_trainer] " + vocabulary_line(37, 40, "special ids")
    assert line in capsys.readouterr().out.splitlines()
    assert run.evaluate(data)["eval_soft_loss"] > 0


def test_equal_vocabularies_have_no_common_ids(tmp_path, capsys):
    run = tiny.trainer("causal_lm", tmp_path, max_steps=1)
    run.train()
    assert run._plan.common_ids is None
    assert "vocabularies" not in capsys.readouterr().out


def test_alpha_0_with_a_padded_teacher_is_the_stock_trainer(tmp_path):
    pair = (tiny.models("causal_lm")[0], lm(40, 24))
    distilled = tiny.trainer("causal_lm", tmp_path, pair=pair, kd_alpha=0.0, kd_reduction="tokenmean")
    stock = tiny.stock_trainer("causal_lm", tmp_path)
    distilled.train()
    stock.train()
    torch.testing.assert_close(tiny.weights(distilled.model), tiny.weights(stock.model), rtol=0, atol=1e-6)


def smaller_teacher_run(tmp_path, data, words=WORDS):
    teacher = lm_with_tokens(tmp_path / "teacher", 12, words)
    return DistillationTrainer(
        model=lm(16), teacher_model=teacher, args=tiny.arguments(tmp_path, kd_reduction="tokenmean", max_steps=2),
        train_dataset=data, data_collator=tiny.pad, processing_class=tokenizer(WORDS),
    )  # fmt: skip


def test_a_smaller_teacher_with_the_same_tokens(tmp_path, capsys):
    data = [{"input_ids": [2, 3, 11, 5], "labels": [2, 3, 11, 5]}] * 8
    run = smaller_teacher_run(tmp_path, data)
    run.train()
    assert run._plan.common_ids == run.teacher.id_limit == 12
    assert "the student's other 4 are left out" in capsys.readouterr().out


@pytest.mark.parametrize("first_bad", [0, 8])
def test_ids_that_the_teacher_has_no_row_for(first_bad, tmp_path):
    good, bad = ({"input_ids": [2, 3, i, 5], "labels": [2, 3, i, 5]} for i in (11, 13))
    run = smaller_teacher_run(tmp_path, [good] * first_bad + [bad] * 8)
    with pytest.raises(ValueError, match=r"`input_ids` is 13 in a batch; expected 0 to 11, the rows of the teacher's"):
        run.train()


def test_own_ids_of_the_teacher_that_it_has_no_row_for(tmp_path):
    student, teacher = tiny.models("classification")
    row = tiny.rows("classification")[0]
    good, bad = ({**row, "teacher_input_ids": [i], "teacher_attention_mask": [1]} for i in (36, 37))
    shown = r"`input_ids` is 37 in a batch; expected 0 to 36, the rows of the teacher's"
    run = tiny.trainer("classification", tmp_path, pair=(student, teacher), data=[good] * 8 + [bad] * 8)
    with pytest.raises(ValueError, match=shown):
        run.train()
    run = tiny.trainer("classification", tmp_path, pair=(student, teacher), data=[bad] * 8)
    teacher.register_forward_pre_hook(lambda *_: pytest.fail("called"))  # on an accelerator this would be the end
    with pytest.raises(ValueError, match=shown):
        run.train()


def test_token_classifiers_read_but_do_not_share_vocabularies(tmp_path):
    student, teacher = (BertForTokenClassification(tiny.bert_config(vocab_size=v)) for v in (37, 40))
    run = tiny.trainer("token_classification", tmp_path, pair=(student, teacher), max_steps=1)
    run.train()
    assert run._plan.common_ids is None
