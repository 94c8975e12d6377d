"""What a student returns beside its logits (caches, None, text, counts, lists of objects) does not stop an evaluation.

Upstream pads and joins all outputs of all batches, and refuses whatever is no tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertForMultipleChoice,
    DynamicCache,
    EncoderDecoderCache,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetForSequenceClassification,
)
from transformers.modeling_outputs import BaseModelOutput

from kd_trainer import Seq2SeqDistillationTrainer, Seq2SeqDistillationTrainingArguments
from kd_trainer.tasks.kinds import TASKS
from tests.helpers import tiny
from tests.helpers.config_run import SPEECH, bart, distilbert
from tests.tasks import test_multiple_choice, test_segmentation, test_speech_frames

LABELS = ("labels", "start_positions", "end_positions")


def extras() -> dict[str, Any]:
    """By the kinds of fields that the outputs of transformers' models have."""
    return {
        "cache": DynamicCache(),
        "both_caches": EncoderDecoderCache(DynamicCache(), DynamicCache()),
        "nothing": None,
        "text": "text",
        "count": 3,
        "scale": 0.5,
        "numbers": [1, 2],
        "set": {1, 2},
        "type": torch.nn.Linear,
        "dicts": [{"offset": 1}],
        "losses": {"loss_ce": "0.5", "count": 1},
        "caches": (None, DynamicCache()),
        "empty": (),
        "nested": BaseModelOutput(last_hidden_state=None),
    }


def pair(task: str) -> Any:
    torch.manual_seed(0)
    if task == "seq2seq_lm":
        return bart(16), bart(24)
    if task == "masked_lm":
        return distilbert(16), distilbert(24)
    if task == "multiple_choice":
        return tuple(BertForMultipleChoice(tiny.bert_config(hidden)) for hidden in (16, 24))
    if task in SPEECH:
        return test_speech_frames.pair_of(task)
    if task == "semantic_segmentation":
        return test_segmentation.segformer(8), test_segmentation.segformer(16)
    return tiny.models(task)


def rows(task: str, *, labelled: bool = True) -> list[dict[str, Any]]:
    if task == "multiple_choice":
        made = test_multiple_choice.rows(11)
    elif task in SPEECH:
        made = test_speech_frames.rows_of(task, 11)
    elif task == "semantic_segmentation":
        made = test_segmentation.rows(11)
    else:
        made = tiny.rows("causal_lm" if task in ("seq2seq_lm", "masked_lm") else task, 11, seed=2)
    if labelled:
        return made
    more = {"decoder_input_ids": [2, 5, 6]} if task == "seq2seq_lm" else {}
    return [{k: v for k, v in row.items() if k not in LABELS} | more for row in made]


def predict(task: str, folder: Any, data: Any, gives: str | None = None, **settings: Any) -> Any:
    """The predictions of a student that gives its outputs as they are, or with `extras` as a mapping or a tuple."""
    both = pair(task)

    def add(module: Any, inputs: Any, outputs: Any) -> Any:
        if gives == "tuple":
            given = {"logits": outputs} if isinstance(outputs, torch.Tensor) else outputs
            first = [given[name] for name in ("loss", "logits", "sentence_embedding") if given.get(name) is not None]
            return (*first, *extras().values())
        named = {"logits": outputs} if isinstance(outputs, torch.Tensor) else outputs
        return {k: v for k, v in named.items() if v is not None} | extras()

    if gives is not None:
        both[0].register_forward_hook(add)
    run = tiny.trainer(task, folder, pair=both, kd_positions="attended", **settings)
    seen = []
    run.compute_metrics = lambda given: seen.append(given.predictions) or {}
    labelled = any(name in data[0] for name in LABELS)
    evaluated = run.evaluate(data)
    found = run.predict(data)
    assert len(seen) == (2 if labelled else 0)
    assert evaluated["eval_loss"] == pytest.approx(found.metrics["test_loss"], rel=1e-5)
    return found


def same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, Mapping):
        same([*found.values()], [*expected.values()])
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("task", "gives", "labelled"),
    [
        *((task, "mapping", True) for task in [*TASKS, "plain"]),
        # In a tuple, the two logits of question answering cannot be distinguished.
        *((task, "tuple", False) for task in [*TASKS, "plain"] if task != "question_answering"),
        *itertools.product(["classification", "causal_lm"], ["mapping"], [False]),
        *itertools.product(["classification", "causal_lm"], ["tuple"], [True]),
        ("question_answering", "mapping", False),
    ],
)
def test_what_is_no_tensor_is_no_prediction(task, gives, labelled, tmp_path):
    data = rows(task, labelled=labelled)
    plain = predict(task, tmp_path, data)
    found = predict(task, tmp_path, data, gives)
    if gives == "tuple" and isinstance(plain.predictions, tuple):  # a mapping of several tensors: the logits come first
        plain = plain._replace(predictions=plain.predictions[0])
    same(found.predictions, plain.predictions)
    assert found.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], rel=1e-6)


def test_it_is_the_same_without_a_teacher(tmp_path):
    both = tiny.models("causal_lm")[0], None
    both[0].register_forward_hook(lambda module, inputs, outputs: {**outputs, **extras()})
    run = tiny.trainer("causal_lm", tmp_path, pair=both, kd_alpha=0.0, kd_reduction="tokenmean")
    expected = tiny.stock_trainer("causal_lm", tmp_path).predict(rows("causal_lm")).predictions
    for labelled in (True, False):
        same(run.predict(rows("causal_lm", labelled=labelled)).predictions, expected)


@pytest.mark.parametrize("labelled", [True, False])
def test_tensors_beside_them_are_kept(labelled, tmp_path):
    """Nested ones too, as upstream keeps them: attentions of which some are None, an encoder's own outputs."""
    both = tiny.models("classification")
    states = torch.arange(8.0)[:, None]

    def add(module: Any, inputs: Any, outputs: Any) -> Any:
        here = states[: len(outputs["logits"])]
        return {
            "logits": outputs["logits"],
            "states": (here, None, (here + 1, DynamicCache())),
            "encoder": BaseModelOutput(last_hidden_state=here + 2),
            "named": {"a": here + 3, "note": "text"},
        }

    both[0].register_forward_hook(add)
    run = tiny.trainer("classification", tmp_path, pair=both)
    _, (first, (second,)), encoder, named = run.predict(rows("classification", labelled=labelled)).predictions
    for offset, found in enumerate((first, second, encoder["last_hidden_state"], named["a"])):
        np.testing.assert_array_equal(found, offset + np.r_[0:8, 0:3, 0:0][:, None])


def test_ignore_keys_still_choose(tmp_path):
    run = tiny.trainer("classification", tmp_path)
    run.model.register_forward_hook(lambda module, inputs, outputs: {**outputs, "more": outputs["logits"] + 1})
    for labelled in (True, False):
        data = rows("classification", labelled=labelled)
        assert isinstance(run.predict(data).predictions, tuple)
        assert run.predict(data, ignore_keys=["more"]).predictions.shape == (11, tiny.CLASSES)


# ---- models whose own outputs hold such things ----


@pytest.mark.parametrize("labelled", [True, False])
def test_a_causal_models_cache_is_no_prediction(labelled, tmp_path):
    both = [LlamaForCausalLM(tiny.llama_config(h, use_cache=True)) for h in (16, 24)]
    run = tiny.trainer("causal_lm", tmp_path, pair=both, kd_positions="attended")
    predictions = run.predict(rows("causal_lm", labelled=labelled)).predictions
    assert predictions.shape[::2] == (11, tiny.VOCAB)
    every = run.predict(rows("causal_lm", labelled=labelled), ignore_keys=[])  # the script keeps all keys
    same(every.predictions, predictions)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoders_caches_are_no_predictions(kind, labelled, tmp_path):
    def t5(hidden: int) -> Any:
        sizes = {"d_model": hidden, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(vocab_size=tiny.VOCAB, decoder_start_token_id=0, **sizes))

    both = [(t5 if kind == "t5" else bart)(hidden) for hidden in (16, 24)]
    args = Seq2SeqDistillationTrainingArguments(str(tmp_path), **tiny._BASE)
    run = Seq2SeqDistillationTrainer(model=both[0], teacher_model=both[1], args=args, data_collator=tiny.pad)
    for ignored in (None, []):
        logits, states = run.predict(rows("seq2seq_lm", labelled=labelled), ignore_keys=ignored).predictions
        assert logits.shape[::2] == (11, tiny.VOCAB)
        assert states.shape[::2] == (11, 16)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_model_that_gives_its_memories(labelled, tmp_path):
    """XLNet's `mems`: a list of tensors whose second dimension is the batch, which its config leaves out."""

    def xlnet(hidden: int) -> Any:
        sizes = {"d_model": hidden, "n_layer": 1, "n_head": 2, "d_inner": 32, "num_labels": tiny.CLASSES}
        return XLNetForSequenceClassification(
            XLNetConfig(vocab_size=tiny.VOCAB, mem_len=4, use_mems_eval=True, **sizes)
        )

    both = [xlnet(16), xlnet(24)]
    run = tiny.trainer("classification", tmp_path, pair=both)
    assert run.predict(rows("classification", labelled=labelled)).predictions.shape == (11, tiny.CLASSES)
