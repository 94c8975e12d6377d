"""Models that put positions in front of the batch's: PEFT's prompts, and GIT with its image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertForQuestionAnswering, Trainer

from kd_trainer import DistillationTrainer, Seq2SeqDistillationTrainer, Seq2SeqDistillationTrainingArguments
from tests.helpers import tiny
from tests.helpers.tiny_generative import git, image_rows, pixels
from tests.tasks.test_seq2seq import models as seq2seq_models
from tests.tasks.test_seq2seq import rows as seq2seq_rows

peft = pytest.importorskip("peft")

VIRTUAL = 4
PROMPTS = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=VIRTUAL, encoder_hidden_size=16, encoder_dropout=0.0
    ),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL),
    "multitask": lambda task: peft.MultitaskPromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL, num_tasks=2),
}
TASKS = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS", "token_classification": "TOKEN_CLS"}
REDUCED = {"kd_reduction": "tokenmean", "max_steps": 3}


def adapted(model: nn.Module, prompt: str, task: str) -> nn.Module:
    torch.manual_seed(1)
    return peft.get_peft_model(model, PROMPTS[prompt](TASKS[task]))


def whole_texts() -> list[dict[str, Any]]:
    """Labels as a language modelling collator makes them: the first token's too, predicted at the last virtual one."""
    rows = tiny.rows("causal_lm")
    return [{**row, "labels": list(row["input_ids"])} for row in rows]


def pair(task: str, prompt: str | None, teacher_prompt: str | None = None) -> tuple[nn.Module, nn.Module]:
    student, teacher = tiny.models(task)
    student = student if prompt is None else adapted(student, prompt, task)
    return student, teacher if teacher_prompt is None else adapted(teacher, teacher_prompt, task)


def data(task: str, prompt: str | None = None, seed: int = 1) -> list[dict[str, Any]]:
    """The first token of a text has no label: PEFT's own loss predicts it at the last virtual token."""
    rows = tiny.rows(task, seed=seed)
    for row in rows:
        if task == "causal_lm":
            row["labels"][0] = -100
        if prompt == "multitask":
            row["task_ids"] = 1
    return rows


def distillation(folder: Any, task: str, prompt: str | None, teacher_prompt: str | None = None, **kwargs: Any) -> Any:
    rows = data(task, "multitask" if "multitask" in (prompt, teacher_prompt) else prompt)
    args = tiny.arguments(folder, **{**REDUCED, **kwargs})
    student, teacher = pair(task, prompt, teacher_prompt)
    return DistillationTrainer(
        model=student, teacher_model=teacher, args=args, data_collator=tiny.pad, train_dataset=rows,
        eval_dataset=rows[:9],
    )  # fmt: skip


BY_TASK = [("causal_lm", prompt) for prompt in PROMPTS]
BY_TASK += [("classification", prompt) for prompt in PROMPTS if prompt != "prefix"]  # PEFT: BERT takes no prefix


@pytest.mark.parametrize(("task", "prompt"), BY_TASK)
def test_alpha_zero_is_the_stock_trainer(task, prompt, tmp_path):
    expected = Trainer(
        model=pair(task, prompt)[0], args=tiny.stock_arguments(tmp_path, max_steps=3), data_collator=tiny.pad,
        train_dataset=data(task, prompt), eval_dataset=data(task, prompt)[:9],
    )  # fmt: skip
    got = distillation(tmp_path, task, prompt, kd_alpha=0.0)
    for trainer in (expected, got):
        trainer.train()
    assert tiny.logged(got, "loss") == pytest.approx(tiny.logged(expected, "loss"), rel=1e-4)
    assert torch.allclose(tiny.weights(got.model), tiny.weights(expected.model), atol=1e-5)
    expected_logits, logits = (t.predict(data(task, prompt)[:3]).predictions for t in (expected, got))
    first = lambda p: torch.as_tensor(p[0] if isinstance(p, tuple) else p)  # noqa: E731
    assert torch.allclose(first(logits), first(expected_logits), atol=1e-5)


@pytest.mark.parametrize("prompt", ["prompt", "p-tuning", "prefix"])
def test_alpha_zero_is_the_stock_trainer_where_the_first_token_has_a_label(prompt, tmp_path):
    student, teacher = pair("causal_lm", prompt)
    args = tiny.arguments(tmp_path, **REDUCED, kd_alpha=0.0)
    got = DistillationTrainer(
        model=student, teacher_model=teacher, args=args, data_collator=tiny.pad, train_dataset=whole_texts()
    )
    expected = Trainer(
        model=pair("causal_lm", prompt)[0], args=tiny.stock_arguments(tmp_path, max_steps=3), data_collator=tiny.pad,
        train_dataset=whole_texts(),
    )  # fmt: skip
    for trainer in (expected, got):
        trainer.train()
    assert tiny.logged(got, "loss") == pytest.approx(tiny.logged(expected, "loss"), rel=1e-4)
    assert torch.allclose(tiny.weights(got.model), tiny.weights(expected.model), atol=1e-5)


def soft_and_hard(student: nn.Module, teacher: nn.Module, batch: dict, task: str, fronts: list[int]) -> list[float]:
    """In float64 from the models' own forwards, at temperature 2."""
    read = {k: v for k, v in batch.items() if k not in ("labels", "task_ids")}
    tasks = {"task_ids": batch["task_ids"]} if "task_ids" in batch else {}
    with torch.no_grad():
        z, y = (
            m.eval()(**read, **(tasks if hasattr(m, "peft_config") else {})).logits.double() for m in (student, teacher)
        )
    labels = batch["labels"]
    if task != "classification":
        z, y = z[:, fronts[0] :], y[:, fronts[1] :]
        assert z.shape[1] == y.shape[1] == labels.shape[1]
    if task == "causal_lm":
        z, y, labels = z[:, :-1], y[:, :-1], labels[:, 1:]
    z, y, labels = z[labels != -100], y[labels != -100], labels[labels != -100]
    p, q = F.log_softmax(y / 2, -1), F.log_softmax(z / 2, -1)
    return [(4 * (p.exp() * (p - q)).sum(-1).mean()).item(), F.cross_entropy(z, labels).item()]


def front(prompt: str | None) -> int:
    return 0 if prompt in (None, "prefix") else VIRTUAL


@pytest.mark.parametrize(
    ("prompt", "teacher_prompt"),
    [*((name, None) for name in PROMPTS), *((None, name) for name in PROMPTS), ("prompt", "p-tuning")],
)
@pytest.mark.parametrize("implementation", ["full", "fused"])
def test_language_models_compare_the_texts_own_positions(prompt, teacher_prompt, implementation, tmp_path):
    trainer = distillation(
        tmp_path,
        "causal_lm",
        prompt,
        teacher_prompt,
        kd_temperature=2.0,
        max_steps=1,
        kd_loss_implementation=implementation,
    )
    student, teacher = pair("causal_lm", prompt, teacher_prompt)
    trainer.train()
    batch = tiny.pad(data("causal_lm", "multitask" if "multitask" in (prompt, teacher_prompt) else None)[:8])
    expected = soft_and_hard(student, teacher, batch, "causal_lm", [front(prompt), front(teacher_prompt)])
    got = [tiny.logged(trainer, "soft_loss")[0], tiny.logged(trainer, "hard_loss")[0]]
    assert got == pytest.approx(expected, rel=1e-4)
    metrics = trainer.evaluate()
    assert 0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"] == pytest.approx(metrics["eval_loss"])


@pytest.mark.parametrize(("prompt", "teacher_prompt"), [("prompt", None), (None, "prompt"), ("p-tuning", None)])
@pytest.mark.parametrize("task", ["classification", "token_classification"])
def test_classifiers_compare_their_own_classes(task, prompt, teacher_prompt, tmp_path):
    trainer = distillation(tmp_path, task, prompt, teacher_prompt, kd_temperature=2.0, max_steps=1)
    student, teacher = pair(task, prompt, teacher_prompt)
    trainer.train()
    expected = soft_and_hard(student, teacher, tiny.pad(data(task)[:8]), task, [front(prompt), front(teacher_prompt)])
    got = [tiny.logged(trainer, "soft_loss")[0], tiny.logged(trainer, "hard_loss")[0]]
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("teacher_prompt", [False, True])
def test_a_cache_holds_the_texts_own_positions(teacher_prompt, tmp_path):
    sides = (None, "prompt") if teacher_prompt else ("prompt", None)
    live = distillation(tmp_path / "live", "causal_lm", *sides, kd_loss_implementation="fused")
    live.train()
    pair("causal_lm", None)[1].save_pretrained(tmp_path / "teacher")
    for cache_format in ("logits", "hidden"):
        cached = distillation(
            tmp_path / cache_format, "causal_lm", *sides, teacher_cache_dir=str(tmp_path / f"cache {cache_format}"),
            teacher_cache_format=cache_format,
        )  # fmt: skip
        cached.train()
        assert tiny.logged(cached, "loss") == pytest.approx(tiny.logged(live, "loss"), rel=1e-4)


@pytest.mark.parametrize("prompt", ["prompt", "p-tuning", "prefix"])
def test_encoder_decoders_have_their_prompt_in_the_encoder(prompt, tmp_path):
    student, teacher = seq2seq_models("t5")
    torch.manual_seed(1)
    student = peft.get_peft_model(student, PROMPTS[prompt]("SEQ_2_SEQ_LM"))
    args = Seq2SeqDistillationTrainingArguments(output_dir=str(tmp_path), **{**tiny._BASE, **REDUCED})
    trainer = Seq2SeqDistillationTrainer(
        model=student, teacher_model=teacher, args=args, data_collator=tiny.pad, train_dataset=seq2seq_rows()
    )
    trainer.train()
    assert tiny.logged(trainer, "soft_loss")[0] > 0


@pytest.mark.parametrize("side", ["model", "teacher_model"])
def test_questions_with_virtual_tokens_are_refused(side, tmp_path):
    models = list(tiny.models("question_answering"))
    at = int(side == "teacher_model")
    models[at] = peft.get_peft_model(models[at], PROMPTS["prompt"]("QUESTION_ANS"))
    assert isinstance(models[1 - at], BertForQuestionAnswering)
    expected = rf"`{side}` is a model with 4 virtual tokens \(PROMPT_TUNING\).*because PEFT counts the virtual tokens"
    with pytest.raises(ValueError, match=expected):
        tiny.trainer("question_answering", tmp_path, pair=tuple(models)).train()


def test_multitask_prompts_of_an_encoder_decoder_are_refused(tmp_path):
    student, teacher = seq2seq_models("t5")
    student = peft.get_peft_model(student, PROMPTS["multitask"]("SEQ_2_SEQ_LM"))
    args = Seq2SeqDistillationTrainingArguments(output_dir=str(tmp_path), **{**tiny._BASE, **REDUCED})
    with pytest.raises(ValueError, match=r"`model` is a model with 4 virtual tokens \(MULTITASK_PROMPT_TUNING\)"):
        Seq2SeqDistillationTrainer(
            model=student, teacher_model=teacher, args=args, data_collator=tiny.pad, train_dataset=seq2seq_rows()
        ).train()


# ---- an image in front ----


def test_the_image_of_git_is_in_front(tmp_path):
    rows = image_rows(0, pixels(3, 8, 8))()

    def trainers(cls: Any, args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        return cls(model=git(16), args=args, data_collator=tiny.pad, train_dataset=rows, **kwargs)

    torch.manual_seed(1)
    teacher = git(24)
    expected = trainers(Trainer, tiny.stock_arguments(tmp_path, max_steps=3))
    got = trainers(DistillationTrainer, tiny.arguments(tmp_path, **REDUCED, kd_alpha=0.0), teacher_model=teacher)
    for trainer in (expected, got):
        trainer.train()
    assert got._plan.task.name == "causal_lm"
    assert tiny.logged(got, "loss") == pytest.approx(tiny.logged(expected, "loss"), rel=1e-4)
    soft = {}
    for implementation in ("full", "fused"):
        args = tiny.arguments(tmp_path, **REDUCED, kd_loss_implementation=implementation, kd_temperature=2.0)
        run = trainers(DistillationTrainer, args, teacher_model=teacher)
        run.train()
        soft[implementation] = tiny.logged(run, "soft_loss")
    assert soft["full"] == pytest.approx(soft["fused"], rel=1e-4)
    torch.manual_seed(0)
    batch = tiny.pad(rows[:8])
    expected_parts = soft_and_hard(git(16), teacher, batch, "causal_lm", [5, 5])
    assert soft["full"][0] == pytest.approx(expected_parts[0], rel=1e-4)
