"""Models that write text about speech, images and text: recognised, trained, evaluated, saved and loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from kd_trainer import (
    DistillationTrainer,
    Seq2SeqDistillationTrainer,
    Seq2SeqDistillationTrainingArguments,
)
from kd_trainer.tasks.resolve import auto_class_of, task_for
from tests.helpers import tiny
from tests.helpers.tiny_generative import KINDS, collate, pair

WRITERS = [name for name, kind in KINDS.items() if kind.task == "seq2seq_lm"]
READERS = [name for name, kind in KINDS.items() if kind.task == "causal_lm"]
BASE = {**tiny._BASE, "kd_reduction": "tokenmean"}


def distillation(name: str, folder: Any, *, teacher: Any = None, **kwargs: Any) -> Any:
    student, other = pair(name)
    kind = KINDS[name]
    data = {"train_dataset": kind.rows(), "eval_dataset": kind.rows(9, seed=2), "data_collator": collate}
    made = {"model": student, "teacher_model": other if teacher is None else teacher, **data}
    if kind.task == "seq2seq_lm":
        args = Seq2SeqDistillationTrainingArguments(output_dir=str(folder), **{**BASE, **kwargs})
        metrics = (lambda p: {"width": p.predictions.shape[1]}) if kwargs.get("predict_with_generate") else None
        return Seq2SeqDistillationTrainer(args=args, compute_metrics=metrics, **made)
    return DistillationTrainer(args=tiny.arguments(folder, **{**BASE, **kwargs}), **made)


def stock(name: str, folder: Any, **kwargs: Any) -> Any:
    kind = KINDS[name]
    data = {"train_dataset": kind.rows(), "eval_dataset": kind.rows(9, seed=2), "data_collator": collate}
    if kind.task == "seq2seq_lm":
        args = Seq2SeqTrainingArguments(output_dir=str(folder), **{**tiny._BASE, **kwargs})
        metrics = (lambda p: {"width": p.predictions.shape[1]}) if kwargs.get("predict_with_generate") else None
        return Seq2SeqTrainer(model=pair(name)[0], args=args, compute_metrics=metrics, **data)
    return Trainer(model=pair(name)[0], args=tiny.stock_arguments(folder, **kwargs), **data)


# ---- which task ----


@pytest.mark.parametrize("name", KINDS)
def test_the_task_follows_from_transformers_mappings(name):
    model, kind = pair(name)[0], KINDS[name]
    known = auto_class_of(model)
    assert known is not None
    assert (known[0].name, known[1].__name__) == (kind.task, kind.auto_class)
    assert task_for(model, None, False) is known[0]


def test_a_subclass_is_what_its_base_is():
    class Own(KINDS["whisper"].build(16).__class__):  # type: ignore[misc]
        pass

    assert task_for(Own(KINDS["whisper"].build(16).config), None, False).name == "seq2seq_lm"


# ---- kd_alpha = 0 is the stock Trainer ----


@pytest.mark.parametrize("name", KINDS)
def test_alpha_zero_is_the_stock_trainer(name, tmp_path):
    expected, got = stock(name, tmp_path), distillation(name, tmp_path, kd_alpha=0.0)
    for trainer in (expected, got):
        trainer.train()
    assert tiny.logged(got, "loss") == pytest.approx(tiny.logged(expected, "loss"), rel=1e-4)
    assert torch.allclose(tiny.weights(got.model), tiny.weights(expected.model), atol=1e-5)


# ---- the soft loss ----


def reference(name: str, batch: dict[str, Any], temperature: float) -> tuple[float, float]:
    """(soft, hard) of a batch per labelled token, from the models' own forwards, in float64."""
    student, teacher = pair(name)
    labels = batch["labels"]
    with torch.no_grad():
        z, y = (model.eval()(**batch).logits.double() for model in (student, teacher))
    if KINDS[name].task == "causal_lm":
        z, y, labels = z[:, :-1], y[:, :-1], labels[:, 1:]
    z, y, labels = z[labels != -100], y[labels != -100], labels[labels != -100]
    p, q = F.log_softmax(y / temperature, -1), F.log_softmax(z / temperature, -1)
    soft = temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
    return soft.item(), F.cross_entropy(z, labels).item()


@pytest.mark.parametrize("implementation", ["full", "fused"])
@pytest.mark.parametrize("name", KINDS)
def test_both_losses_are_those_of_a_float64_reference(name, implementation, tmp_path):
    trainer = distillation(name, tmp_path, kd_loss_implementation=implementation, max_steps=1, kd_temperature=2.0)
    trainer.train()
    soft, hard = reference(name, collate(KINDS[name].rows()[:8]), 2.0)
    assert tiny.logged(trainer, "soft_loss") == pytest.approx([soft], rel=1e-4)
    assert tiny.logged(trainer, "hard_loss") == pytest.approx([hard], rel=1e-4)
    assert (trainer._plan.heads is not None) == (implementation == "fused")


# ---- evaluation, prediction, saving, loading ----


@pytest.mark.parametrize("name", KINDS)
def test_evaluates_predicts_saves_and_loads_by_path(name, tmp_path):
    first = distillation(name, tmp_path / "run", max_steps=1)
    first.train()
    metrics = first.evaluate()
    assert 0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"] == pytest.approx(metrics["eval_loss"])
    predicted = first.predict(KINDS[name].rows(3, seed=3)).predictions
    logits = predicted[0] if isinstance(predicted, tuple) else predicted
    assert (logits.shape[0], logits.shape[-1]) == (3, tiny.VOCAB)
    first.save_model(tmp_path / "saved")
    teacher = pair(name)[1]
    teacher.save_pretrained(tmp_path / "teacher")
    by_path = distillation(name, tmp_path / "again", teacher=str(tmp_path / "teacher"), max_steps=1)
    assert type(by_path.teacher.model) is type(teacher)
    by_path.train()
    assert tiny.logged(by_path, "loss") == tiny.logged(first, "loss")
    saved = type(first.model).from_pretrained(tmp_path / "saved")
    assert torch.equal(tiny.weights(saved), tiny.weights(first.model))


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("florence2", "blip2-t5")])
def test_generation_is_the_stock_trainers(name, tmp_path):
    given = {"predict_with_generate": True, "generation_max_length": 6, "max_steps": 2}
    expected, got = stock(name, tmp_path, **given), distillation(name, tmp_path, kd_alpha=0.0, **given)
    for trainer in (expected, got):
        trainer.train()
        trainer.model.generation_config.max_length = 6
    tokens = [trainer.predict(KINDS[name].rows(5, seed=3)) for trainer in (expected, got)]
    assert (tokens[0].predictions == tokens[1].predictions).all()
    assert tokens[1].metrics["test_width"] == tokens[1].predictions.shape[1]
    assert {"eval_loss", "eval_soft_loss", "eval_hard_loss"} <= set(got.evaluate())


def test_whisper_learns_with_a_frozen_encoder(tmp_path):
    trainer = distillation("whisper", tmp_path, predict_with_generate=True, max_steps=20, learning_rate=0.1)
    trainer.model.freeze_encoder()
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    assert any(name.startswith("model.encoder.layers") for name in frozen)
    trainer.train()
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
    losses = tiny.logged(trainer, "loss")
    assert sum(losses[-3:]) < sum(losses[:3])
    metrics = trainer.evaluate()
    assert 0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"] == pytest.approx(metrics["eval_loss"])


def test_a_teacher_that_reads_images_is_loaded_for_a_student_of_text_alone(tmp_path):
    from transformers import LlamaForCausalLM

    pair("llava")[1].save_pretrained(tmp_path / "teacher")
    torch.manual_seed(0)
    student = LlamaForCausalLM(tiny.llama_config())
    trainer = tiny.trainer(
        "causal_lm", tmp_path, pair=(student, str(tmp_path / "teacher")), data=tiny.rows("causal_lm"), max_steps=1
    )
    assert type(trainer.teacher.model).__name__ == "LlavaForConditionalGeneration"
    trainer.train()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_teacher_that_would_read_image_tokens_as_text_is_refused(name, tmp_path):
    expected = (
        "`teacher_model` is a LlamaForCausalLM, which takes no pixel_values; expected a teacher that takes "
        "pixel_values too, because it would read the image_token_id 5 as text"
    )
    with pytest.raises(ValueError, match=expected):
        distillation(name, tmp_path, teacher=tiny.models("causal_lm")[1]).train()


def test_a_folder_that_no_auto_class_of_the_task_knows_is_refused(tmp_path):
    AutoModel.from_config(tiny.vit().config).save_pretrained(tmp_path / "teacher")
    student = tiny.models("causal_lm")[0]
    expected = r"`teacher_model` is '.*teacher'; expected a folder .* AutoModelForCausalLM can load"
    with pytest.raises(ValueError, match=expected):
        tiny.trainer("causal_lm", tmp_path, pair=(student, str(tmp_path / "teacher")))


def test_a_teacher_of_another_kind_is_a_module(tmp_path):
    """A module that no mapping lists still trains with `kd_task`."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = pair("llava")[1]

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor) -> Any:
            return self.inner(input_ids, attention_mask=attention_mask, pixel_values=pixel_values).logits

    trainer = distillation("llava", tmp_path, teacher=Own(), max_steps=1)
    trainer.train()
    expected = distillation("llava", tmp_path, max_steps=1)
    expected.train()
    assert tiny.logged(trainer, "loss") == tiny.logged(expected, "loss")


@pytest.mark.parametrize("name", ["whisper", "llava", "qwen2_vl"])
def test_a_cache_gives_what_the_live_teacher_gives(name, tmp_path):
    pair(name)[1].save_pretrained(tmp_path / "teacher")
    live = distillation(name, tmp_path / "live", kd_loss_implementation="full")
    cached = distillation(name, tmp_path, teacher=str(tmp_path / "teacher"), teacher_cache_dir=str(tmp_path / "cache"))
    for trainer in (live, cached):
        trainer.train()
    assert tiny.logged(cached, "loss") == pytest.approx(tiny.logged(live, "loss"), rel=1e-5)


@pytest.mark.parametrize("name", ["vision-encoder-decoder", "paligemma"])
def test_check_finds_nothing_wrong(name, tmp_path):
    results = distillation(name, tmp_path).check()
    assert not [row for row in results if row.status == "error"], results


@pytest.mark.parametrize("name", ["llava", "smolvlm", "whisper"])
def test_another_tokenizer_is_seen_in_the_config_of_the_language_model(name, tmp_path):
    teacher = pair(name)[1]
    getattr(teacher.config, "text_config", teacher.config).pad_token_id = 4
    if name == "smolvlm":
        teacher.config.pad_token_id = 4
    with pytest.raises(
        ValueError, match="`teacher_model` is a model with pad_token_id 4; expected 0 as in the student"
    ):
        distillation(name, tmp_path, teacher=teacher).train()
