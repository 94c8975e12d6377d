"""`task.py`, `kinds.py`: the task of every model, targets and masks by hand, the hard loss against the models' own."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput
from transformers.trainer_pt_utils import LabelSmoother

from kd_trainer.data.mlp import MLPConfig, MLPForImageClassification
from kd_trainer.tasks.inputs import Accepted, accepted_inputs, check_batch, main_input, model_inputs
from kd_trainer.tasks.kinds import TASKS
from kd_trainer.tasks.logits import logits_of
from kd_trainer.tasks.resolve import auto_class_of, task_for, task_from_logits
from tests.helpers import tiny

IGNORED = -100


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=tiny.VOCAB, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def bart() -> BartForConditionalGeneration:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=tiny.VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, dropout=0.0,
            decoder_start_token_id=2, pad_token_id=1,
        )
    )  # fmt: skip


MODELS = {
    "bert": (
        lambda: BertForSequenceClassification(tiny.bert_config()),
        "classification",
        "AutoModelForSequenceClassification",
    ),
    "vit": (tiny.vit, "classification", "AutoModelForImageClassification"),
    "mlp": (
        lambda: MLPForImageClassification(MLPConfig(num_features=6, hidden_sizes=[4], num_labels=3)),
        "classification",
        "AutoModelForImageClassification",
    ),
    "bert tokens": (
        lambda: BertForTokenClassification(tiny.bert_config()),
        "token_classification",
        "AutoModelForTokenClassification",
    ),
    "llama": (lambda: LlamaForCausalLM(tiny.llama_config()), "causal_lm", "AutoModelForCausalLM"),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=tiny.VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32)),
        "causal_lm",
        "AutoModelForCausalLM",
    ),
    "bert questions": (
        lambda: BertForQuestionAnswering(tiny.bert_config()),
        "question_answering",
        "AutoModelForQuestionAnswering",
    ),
    "bert choices": (
        lambda: BertForMultipleChoice(tiny.bert_config()),
        "multiple_choice",
        "AutoModelForMultipleChoice",
    ),
    "bert masked": (lambda: BertForMaskedLM(tiny.bert_config()), "masked_lm", "AutoModelForMaskedLM"),
    "bert encoder": (lambda: BertModel(tiny.bert_config()), "embedding", "AutoModelForTextEncoding"),
    "llama decoder": (lambda: LlamaModel(tiny.llama_config()), "embedding", "AutoModel"),
    "t5": (t5, "seq2seq_lm", "AutoModelForSeq2SeqLM"),
    "bart": (bart, "seq2seq_lm", "AutoModelForSeq2SeqLM"),  # upstream lists it as a masked language model too
}


# ---- which task ----


@pytest.mark.parametrize("name", MODELS)
def test_task_and_auto_class_follow_from_the_class_of_a_model(name):
    build, task, auto_class = MODELS[name]
    model = build()
    known = auto_class_of(model)
    assert known is not None
    assert (known[0].name, known[1].__name__) == (task, auto_class)
    assert task_for(model, None, False) is TASKS[task]


def test_every_task_has_a_model_above():
    by_labels = {"multi_label_classification", "regression"}  # of the classifiers above: see test_row_tasks.py
    of_speech = {"ctc", "audio_frame_classification"}  # see test_speech_frames.py
    assert {task for _, task, _ in MODELS.values()} == set(TASKS) - by_labels - of_speech - {"semantic_segmentation"}


class OwnHead(BertModel):
    """A classifier of the user's own on a class of transformers that has no output head."""

    def forward(self, input_ids):
        return super().forward(input_ids).last_hidden_state[:, 0]


@pytest.mark.parametrize("model", [OwnHead(tiny.bert_config()), tiny.Plain()])
def test_models_that_fit_no_task_have_none(model):
    assert auto_class_of(model) is None
    assert task_for(model, None, False) is None
    assert task_for(model, None, True) is TASKS["causal_lm"]  # a loss that upstream shifts is a causal one


@pytest.mark.parametrize("task", TASKS)
def test_kd_task_wins(task):
    assert task_for(tiny.models("classification")[0], task, False) == TASKS[task]
    assert task_for(tiny.Plain(), task, True) == TASKS[task]


def test_the_logits_of_a_plain_module_decide_its_task():
    assert task_from_logits(torch.zeros(2, 3)) is TASKS["classification"]
    assert task_from_logits(torch.zeros(2, 3, 4)) is TASKS["token_classification"]
    with pytest.raises(
        ValueError, match=r"of shape \(2,\); expected \[batch, classes\] or \[batch, sequence, classes\]"
    ):
        task_from_logits(torch.zeros(2))


# ---- targets and masks by hand ----

LABELS = torch.tensor([[4, IGNORED, 6, 7], [8, 9, IGNORED, IGNORED]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
IDS = torch.arange(8).reshape(2, 4)


@pytest.mark.parametrize("name", ["token_classification", "masked_lm", "seq2seq_lm"])
def test_only_decoders_shift(name):
    assert TASKS[name].targets({"labels": LABELS}).tolist() == LABELS.tolist()


def test_causal_targets_are_the_next_labels():
    task = TASKS["causal_lm"]
    expected = [[IGNORED, 6, 7, IGNORED], [9, IGNORED, IGNORED, IGNORED]]
    assert task.targets({"labels": LABELS}).tolist() == expected
    assert task.targets({"labels": LABELS, "shift_labels": LABELS + 0}).tolist() == LABELS.tolist()
    assert task.targets({"labels": LABELS, "shift_labels": None}).tolist() == expected
    assert task.targets({"input_ids": IDS}) is None


def test_classification_targets_are_a_vector():
    assert TASKS["classification"].targets({"labels": torch.tensor([[3], [IGNORED]])}).tolist() == [3, IGNORED]


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.softmax])
def test_float_labels_are_refused(name):
    with pytest.raises(
        TypeError, match=r"`labels` is of dtype torch.float32 and shape \(2, 4\).*Cast the column to int64"
    ):
        TASKS[name].targets({"labels": LABELS.float()})


def test_attended_positions_by_hand():
    batch = {"input_ids": IDS, "attention_mask": MASK}
    assert TASKS["classification"].attended(batch) is None
    for name in ("token_classification", "masked_lm"):
        assert TASKS[name].attended(batch).int().tolist() == MASK.tolist()
        assert TASKS[name].attended({"input_ids": IDS}) is None
    # a prediction counts where it is made at a token AND is about a token
    assert TASKS["causal_lm"].attended(batch).int().tolist() == [[1, 1, 1, 0], [0, 1, 0, 0]]
    assert TASKS["causal_lm"].attended({"input_ids": IDS}).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]


def test_attended_positions_of_an_encoder_decoder_are_the_decoders():
    task, batch = TASKS["seq2seq_lm"], {"input_ids": torch.ones(2, 9), "attention_mask": torch.ones(2, 9)}
    assert task.attended({**batch, "decoder_attention_mask": MASK}).int().tolist() == MASK.tolist()
    # without a mask of its own the decoder's padding stands in the labels alone
    assert task.attended({**batch, "labels": LABELS}).tolist() == (LABELS != IGNORED).tolist()
    assert task.attended({**batch, "decoder_input_ids": IDS}) is None
    assert task.sequences({**batch, "decoder_input_ids": IDS}) is IDS


def test_soft_positions():
    task, batch = TASKS["token_classification"], {"attention_mask": MASK, "labels": LABELS}
    targets = task.targets(batch)
    # a label at padding is predicted at no real token
    assert task.soft_mask(batch, targets, "labels").tolist() == ((LABELS != IGNORED) & MASK.bool()).tolist()
    assert task.soft_mask({"labels": LABELS}, targets, "labels").tolist() == (LABELS != IGNORED).tolist()
    assert task.soft_mask(batch, targets, "attended").int().tolist() == MASK.tolist()
    assert task.soft_mask({"attention_mask": MASK}, None, "labels").int().tolist() == MASK.tolist()
    assert TASKS["classification"].soft_mask({"labels": torch.tensor([1])}, torch.tensor([1]), "labels") is None


def test_sequences_without_labels_are_the_students_inputs():
    task = TASKS["causal_lm"]
    batch = {"teacher_input_ids": torch.ones(2, 9), "inputs_embeds": torch.ones(2, 4, 3)}
    assert task.sequences(batch).shape == (2, 4)
    assert main_input(batch) is batch["inputs_embeds"]
    with pytest.raises(ValueError, match=r"`inputs` is a batch with the keys labels; expected at least one tensor"):
        main_input({"labels": LABELS})


# ---- the hard loss is the model's own ----


def own_loss_case(name: str):
    """(model, batch, task): right-padded text with labels at some positions."""
    torch.manual_seed(0)
    build, task, _ = MODELS[name]
    model = build().eval()
    ids = torch.randint(3, tiny.VOCAB, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.clone() if task in ("causal_lm", "masked_lm", "seq2seq_lm") else ids % tiny.CLASSES
    labels[mask == 0] = IGNORED
    labels[0, 2:4] = IGNORED
    if task == "classification":
        labels = labels[:, 0]
    return model, {"input_ids": ids, "attention_mask": mask, "labels": labels}, TASKS[task]


@pytest.mark.parametrize("name", ["bert", "bert tokens", "bert masked", "llama", "gpt2", "t5", "bart"])
def test_hard_loss_is_the_models_own(name):
    model, batch, task = own_loss_case(name)
    with torch.no_grad():
        outputs = model(**batch)
    targets = task.targets(batch)
    hard_loss = task.hard_loss_sum(outputs.logits, targets) / (targets != IGNORED).sum()
    assert hard_loss.item() == pytest.approx(outputs.loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["bert", "bert tokens", "llama", "t5"])
def test_label_smoothing_is_the_stock_smoothers(name):
    model, batch, task = own_loss_case(name)
    with torch.no_grad():
        outputs = model(**batch)
    targets = task.targets(batch)
    hard_loss = task.hard_loss_sum(outputs.logits, targets, 0.2) / (targets != IGNORED).sum()
    stock = LabelSmoother(epsilon=0.2)(outputs, batch["labels"].clone(), shift_labels=task.shifted)
    assert hard_loss.item() == pytest.approx(stock.item(), rel=1e-6)


def test_hard_loss_is_computed_in_float32_or_wider():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, IGNORED])
    task = TASKS["classification"]
    assert task.hard_loss_sum(logits.bfloat16(), labels).dtype == torch.float32
    exact = task.hard_loss_sum(logits.bfloat16().double(), labels)
    assert exact.dtype == torch.float64
    assert task.hard_loss_sum(logits.bfloat16(), labels).item() == pytest.approx(exact.item(), rel=1e-6)
    assert task.hard_loss_sum(logits, labels.int()).item() == pytest.approx(
        F.cross_entropy(logits[:3], labels[:3], reduction="sum").item()
    )


@pytest.mark.parametrize("wrong", [-1, 5, 99])
def test_a_label_outside_the_classes_is_named(wrong):
    labels = torch.tensor([0, IGNORED, wrong])
    expected = (
        rf"`labels` is {wrong} at position 2 of the batch; expected 0 to 4 \(the logits have 5 classes\), or -100"
    )
    with pytest.raises(ValueError, match=expected):
        TASKS["classification"].check_labels(labels, 5)
    with pytest.raises(ValueError, match=expected):
        TASKS["classification"].hard_loss_sum(torch.zeros(3, 5), labels)
    TASKS["classification"].check_labels(torch.tensor([0, 4, IGNORED]), 5)


def test_shapes_that_do_not_fit_are_refused():
    task, logits = TASKS["classification"], torch.zeros(4, 5)
    task.check_shapes(logits, logits, torch.zeros(4))
    task.check_shapes(logits, None, None)
    with pytest.raises(ValueError, match=r"`model` is giving logits of shape \(4, 5\); expected 3 dimensions.*kd_task"):
        TASKS["causal_lm"].check_shapes(logits, None, None)
    with pytest.raises(
        ValueError, match=r"`teacher_model` is giving logits of shape \(4, 6\); expected the student's shape \(4, 5\)"
    ):
        task.check_shapes(logits, torch.zeros(4, 6), None)
    with pytest.raises(ValueError, match=r"`labels` is of shape \(3,\); expected \(4,\)"):
        task.check_shapes(logits, None, torch.zeros(3))


# ---- inputs ----


def test_inputs_of_transformers_models():
    accepted = accepted_inputs(tiny.models("classification")[0])
    assert {"input_ids", "attention_mask", "token_type_ids", "output_hidden_states"} <= accepted
    assert not {"labels", "num_items_in_batch", "kwargs", "self"} & accepted
    llama = accepted_inputs(tiny.models("causal_lm")[0])
    assert "cu_seq_lens_q" in llama  # packing reaches the model through transformers' own kwargs
    assert "token_type_ids" not in llama


def test_a_required_label_is_an_input():
    class Own(nn.Module):
        def forward(self, features, labels, label=None):
            return features

    assert accepted_inputs(Own()) == {"features", "labels"}


def test_a_module_with_kwargs_takes_everything_but_targets():
    class Own(nn.Module):
        def forward(self, **kwargs):
            return kwargs

    batch = {"x": 1, "y": 2, "labels": 3, "label_ids": 4, "shift_labels": 5, "teacher_x": 6, "num_items_in_batch": 7}
    assert model_inputs(batch, accepted_inputs(Own())) == {"x": 1, "y": 2}
    assert model_inputs(batch, accepted_inputs(Own(), label_names=["y"])) == {"x": 1}
    assert model_inputs(batch, accepted_inputs(Own(), withheld=["x"])) == {"y": 2}
    assert model_inputs(batch, Accepted({"y", "z", "labels"})) == {"y": 2, "labels": 3}
    assert len(batch) == 7


def test_adapters_are_seen_through():
    base = tiny.models("classification")[0]

    class Adapted(nn.Module):
        def get_base_model(self):
            return base

        def forward(self, *args, **kwargs):
            return base(*args, **kwargs)

    assert accepted_inputs(Adapted()) == accepted_inputs(base)


@pytest.mark.parametrize("name", ["label", "label_ids"])
def test_misnamed_labels_are_refused(name):
    check_batch({"x": 1})
    check_batch({"x": 1, "labels": 2, name: 3})
    with pytest.raises(
        ValueError, match=rf"column '{name}' and without 'labels'.*would be ignored\. Rename the column '{name}'"
    ):
        check_batch({"x": 1, name: 3})


def test_a_batch_is_a_mapping():
    from transformers import BatchEncoding

    check_batch(BatchEncoding({"x": 1}))
    with pytest.raises(TypeError, match=r"`inputs` is a batch of type tuple; expected a mapping"):
        check_batch((1, 2))


# ---- logits ----

LOGITS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        {"loss": torch.zeros(()), "logits": LOGITS},
        SequenceClassifierOutput(logits=LOGITS, loss=torch.zeros(())),
        (torch.zeros(()), LOGITS, torch.ones(2, 3)),
        [torch.zeros(2, 3, dtype=torch.long), LOGITS],
        copy.copy((LOGITS,)),
    ],
)
def test_logits_of_every_kind_of_output(outputs):
    assert logits_of(outputs, "model") is LOGITS


@pytest.mark.parametrize(
    ("outputs", "shown"),
    [
        (
            {"last_hidden_state": LOGITS, "pooler_output": LOGITS},
            "a mapping with the keys last_hidden_state, pooler_output",
        ),
        (ModelOutput(start_logits=LOGITS), "a mapping with the keys start_logits"),
        ((torch.zeros(()), "x"), "a tuple of Tensor, str"),
        (SimpleNamespace(logits=LOGITS), "SimpleNamespace"),
        (None, "NoneType"),
    ],
)
def test_outputs_without_logits_are_described(outputs, shown):
    with pytest.raises(
        TypeError, match=f"`teacher_model` is a model that returns {shown}; expected logits.*Wrap the model"
    ):
        logits_of(outputs, "teacher_model")
