"""The mixin in front of Trainers that others wrote: TRL's SFTTrainer, the question-answering scripts', a user's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    EarlyStoppingCallback,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from kd_trainer import (
    DistillationArguments,
    DistillationMixin,
    DistillationTrainer,
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainingArguments,
    parse_args,
)
from tests.helpers import tiny

SENTENCES = ["the cat sat on the mat " * (1 + i % 3) + "and saw a dog" for i in range(16)]


@dataclass
class SFTDistillationConfig(DistillationArguments, SFTConfig):
    pass


class SFTDistillationTrainer(DistillationMixin, SFTTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = tiny.byte_level_tokenizer(SENTENCES, 290, list(special.values()), **special)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def pair(tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "attn_implementation": "eager"}
    return tuple(LlamaForCausalLM(tiny.llama_config(hidden, **ids, **sizes)) for hidden in (16, 24))  # type: ignore[return-value]


def sft_arguments(output_dir: Any, **kwargs: Any) -> SFTDistillationConfig:
    settings = {**SFT, "kd_reduction": "tokenmean", **kwargs}
    return SFTDistillationConfig(output_dir=str(output_dir), **settings)


SFT = {**tiny._BASE, "remove_unused_columns": True, "max_length": 64, "bf16": False}  # TRL's default is bfloat16
CHAT = [[{"role": "user", "content": s}, {"role": "assistant", "content": "and " + s[::-1]}] for s in SENTENCES]
DATA = {
    "text": {"text": SENTENCES},
    "prompt and completion": {"prompt": SENTENCES, "completion": [s[::-1] for s in SENTENCES]},
    "chat": {"messages": CHAT},
    "chat completion": {"prompt": [c[:1] for c in CHAT], "completion": [c[1:] for c in CHAT]},
}


def sft(tokenizer: Any, output_dir: Any, kind: str = "text", teacher: Any = None, **kwargs: Any) -> Any:
    student, other = pair(tokenizer)
    data = Dataset.from_dict(DATA[kind])
    return SFTDistillationTrainer(
        model=student, teacher_model=other if teacher is None else teacher, args=sft_arguments(output_dir, **kwargs),
        train_dataset=data, eval_dataset=data.select(range(8)), processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "packing"), [*((kind, False) for kind in DATA), ("text", True), ("chat completion", True)]
)
def test_alpha_zero_is_the_stock_sft_trainer(kind, packing, tokenizer, tmp_path):
    distilled = sft(tokenizer, tmp_path, kind, kd_alpha=0.0, packing=packing, eval_packing=False)
    data = Dataset.from_dict(DATA[kind])
    args = SFTConfig(output_dir=str(tmp_path), packing=packing, eval_packing=False, **SFT)
    stock = SFTTrainer(
        pair(tokenizer)[0], args, train_dataset=data, eval_dataset=data.select(range(8)), processing_class=tokenizer
    )
    distilled.train()
    stock.train()
    for key in ("loss", "grad_norm"):
        assert tiny.logged(distilled, key) == pytest.approx(tiny.logged(stock, key), rel=1e-4), key
    torch.testing.assert_close(tiny.weights(distilled.model), tiny.weights(stock.model), rtol=1e-4, atol=1e-5)
    assert distilled.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", DATA)
def test_sft_counts_the_completion_alone(kind, tokenizer, tmp_path):
    run = sft(tokenizer, tmp_path, kind)
    batch = next(iter(run.get_train_dataloader()))
    counts = run._objective(training=True)[0].count(run._plan_of(batch).task, batch)
    labels = batch["labels"][:, 1:]
    assert int(counts.hard) == int(counts.soft) == int((labels != -100).sum())
    if "completion" in kind:
        assert int(counts.hard) < int(batch["attention_mask"][:, 1:].sum())


def test_packed_sft_is_unpacked_sft(tokenizer, tmp_path):  # trap 41
    losses = []
    for packing in (False, True):
        run = sft(tokenizer, tmp_path, packing=packing, max_steps=1, per_device_train_batch_size=16)
        run.train()
        losses.append([tiny.logged(run, key)[0] for key in ("loss", "soft_loss", "hard_loss")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_of_sft_is_lost_is_said(tokenizer, tmp_path, capsys):
    run = sft(tokenizer, tmp_path, max_steps=1)
    run.train()
    assert "SFTTrainer's entropy, mean_token_accuracy and num_tokens are not logged" in capsys.readouterr().out
    assert not set(run.state.log_history[0]) & {"entropy", "mean_token_accuracy", "num_tokens"}
    assert run.evaluate()["eval_perplexity"] > 1


def test_sft_with_lora_and_its_base_as_the_teacher(tokenizer, tmp_path):
    student, _ = pair(tokenizer)
    run = SFTDistillationTrainer(
        model=student, teacher_model="adapter_off", args=sft_arguments(tmp_path, learning_rate=0.5),
        train_dataset=Dataset.from_dict(DATA["text"]), processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    run.train()
    soft = tiny.logged(run, "soft_loss")
    assert soft[0] == pytest.approx(0, abs=1e-6)  # fresh adapters change nothing
    assert soft[-1] > 1e-6


def test_another_loss_of_sft_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"`loss_type` is 'dft'; expected 'nll'"):
        sft(tokenizer, tmp_path, loss_type="dft")


def test_arguments_that_sft_does_not_know_are_named(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    message = r"`args` is of type DistillationTrainingArguments; expected the arguments of SFTTrainer with Distil"
    with pytest.raises(TypeError, match=message):
        SFTDistillationTrainer(
            student, tiny.arguments(tmp_path), teacher_model=teacher, train_dataset=Dataset.from_dict(DATA["text"])
        )


@pytest.mark.parametrize(
    "cls", [DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments, SFTDistillationConfig]
)
def test_one_json_for_every_class_of_arguments(cls, tmp_path):
    path = tmp_path / "config.json"
    settings = {"output_dir": str(tmp_path), "kd_alpha": 0.6, "kd_temperature": 2, "learning_rate": 1e-3,
                "teacher_model_init_kwargs": {"dtype": "bfloat16"}, "use_cpu": True}  # fmt: skip
    path.write_text(json.dumps(settings))
    args = parse_args(cls, argv=[str(path), "--kd_divergence", "jsd"])
    assert isinstance(args, cls)
    assert (args.kd_alpha, args.kd_temperature, args.kd_divergence, args.learning_rate) == (0.6, 2, "jsd", 1e-3)
    assert args.teacher_kwargs == {"dtype": "bfloat16"}


# ---- the question-answering scripts' pattern ----


class QuestionAnsweringTrainer(Trainer):
    """As the example scripts have it: evaluation makes answers of the predictions before it measures them."""

    def __init__(self, *args: Any, eval_examples: Any = None, post_process_function: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_examples, self.post_process_function = eval_examples, post_process_function

    def evaluate(self, eval_dataset: Any = None, eval_examples: Any = None, ignore_keys: Any = None,
                 metric_key_prefix: str = "eval") -> dict[str, float]:  # fmt: skip
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        eval_examples = self.eval_examples if eval_examples is None else eval_examples
        loader, compute_metrics, self.compute_metrics = (
            self.get_eval_dataloader(eval_dataset),
            self.compute_metrics,
            None,
        )
        try:
            output = self.evaluation_loop(
                loader, description="Evaluation", prediction_loss_only=None, ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )  # fmt: skip
        finally:
            self.compute_metrics = compute_metrics
        answers = self.post_process_function(eval_examples, eval_dataset, output.predictions)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in compute_metrics(answers).items()} | output.metrics
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class QuestionAnsweringKD(DistillationMixin, QuestionAnsweringTrainer):
    pass


def test_the_question_answering_pattern(tmp_path):
    student, teacher = tiny.models("question_answering")
    features = [{k: row[k] for k in ("input_ids", "attention_mask")} for row in tiny.rows("question_answering", 9)]
    seen = []

    def answers(examples: Any, features: Any, predictions: Any) -> list[tuple[int, int]]:
        start, end = predictions
        assert start.shape == end.shape == (9, 16)
        seen.append(examples)
        return list(zip(start.argmax(-1), end.argmax(-1), strict=True))

    run = QuestionAnsweringKD(
        student, tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=2), teacher_model=teacher,
        data_collator=tiny.pad, train_dataset=tiny.rows("question_answering"), eval_dataset=features,
        eval_examples=["the examples"], post_process_function=answers, compute_metrics=lambda a: {"found": len(a)},
    )  # fmt: skip
    run.train()
    assert seen == [["the examples"]] * 2
    assert tiny.logged(run, "eval_found") == [9, 9]
    assert tiny.logged(run, "eval_soft_loss")[1] < tiny.logged(run, "eval_soft_loss")[0]


# ---- a user's own ----


def test_a_loss_that_would_never_be_called_is_refused():
    class Weighted(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)

    class Further(Weighted):
        pass

    with pytest.raises(TypeError, match=r"of Wrong with Weighted, which has a compute_loss of its own; .*Move it into"):

        class Wrong(DistillationMixin, Further):
            pass

    class OwnSFT(SFTTrainer):
        compute_loss = Weighted.compute_loss

    with pytest.raises(TypeError, match=r"with OwnSFT, which has a compute_loss of its own"):

        class AlsoWrong(DistillationMixin, OwnSFT):
            pass


def test_a_users_own_class_keeps_what_it_overrides(tmp_path):
    class Own(Trainer):
        steps = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return super().training_step(*args, **kwargs)

    class OwnKD(DistillationMixin, Own):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
            return (2 * loss[0], loss[1]) if return_outputs else 2 * loss

    student, teacher = tiny.models("classification")
    args, data = tiny.arguments(tmp_path), tiny.rows("classification")
    own = OwnKD(student, args, teacher_model=teacher, data_collator=tiny.pad, train_dataset=data)
    own.train()
    plain = tiny.trainer("classification", tmp_path)
    plain.train()
    assert own.steps == 4
    assert tiny.logged(own, "loss")[0] == pytest.approx(2 * tiny.logged(plain, "loss")[0])


def test_one_class_may_be_both_seq2seq_and_distilled():
    class Both(DistillationMixin, Seq2SeqTrainer):
        pass

    assert Both.__mro__.index(DistillationMixin) < Both.__mro__.index(Seq2SeqTrainer)


# ---- what surrounds a Trainer ----


def test_optuna_searches_over_alpha_and_temperature(tmp_path):
    import optuna

    _, teacher = tiny.models("classification")
    seen: list[tuple[float, float]] = []

    class Notes(TrainerCallback):
        def on_train_begin(self, args: Any, *rest: Any, **kwargs: Any) -> None:
            seen.append((args.kd_alpha, args.kd_temperature))

    run = DistillationTrainer(
        model_init=lambda: tiny.models("classification")[0], teacher_model=teacher,
        args=tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=4), data_collator=tiny.pad,
        train_dataset=tiny.rows("classification"), eval_dataset=tiny.rows("classification", 16, seed=2),
        callbacks=[Notes()],
    )  # fmt: skip
    best = run.hyperparameter_search(
        hp_space=lambda trial: {
            "kd_alpha": trial.suggest_float("kd_alpha", 0.2, 1.0),
            "kd_temperature": trial.suggest_float("kd_temperature", 1.0, 4.0),
        },
        compute_objective=lambda metrics: metrics["eval_soft_loss"],
        n_trials=3, backend="optuna", sampler=optuna.samplers.RandomSampler(seed=0),
    )  # fmt: skip
    assert len(set(seen)) == 3
    assert (best.hyperparameters["kd_alpha"], best.hyperparameters["kd_temperature"]) in seen
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    alone = tiny.trainer("classification", tmp_path, kd_alpha=seen[-1][0], kd_temperature=seen[-1][1])
    alone.train()
    assert losses == pytest.approx(tiny.logged(alone, "loss"), rel=1e-5)


@pytest.mark.parametrize(("metric", "larger"), [("eval_loss", False), ("eval_teacher_agreement", True)])
def test_early_stopping(metric, larger, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 40,
                "learning_rate": 1e-9, "load_best_model_at_end": True, "metric_for_best_model": metric,
                "greater_is_better": larger}  # fmt: skip
    run = tiny.trainer("classification", tmp_path, **settings)
    run.add_callback(EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=0.01))
    run.train()
    assert run.state.global_step == 3  # nothing improves at such a learning rate
    assert run.state.best_metric == pytest.approx(tiny.logged(run, metric)[0], abs=1e-6)


def test_a_comparison_in_front_of_sft(tokenizer, tmp_path):
    run = sft(tokenizer, tmp_path, kd_run="compare", kd_compare_seeds=2, max_steps=2)
    with pytest.raises(SystemExit) as end:
        run.train()
    assert end.value.code == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    metrics = {each["metric"]: each for each in report["paired"]}
    start = tiny.weights(run.model)  # SFTTrainer patches the forward: a copy must not compute with these
    for name in ("baseline", "distilled"):
        trained = LlamaForCausalLM.from_pretrained(tmp_path / "seed-42" / name)
        assert not torch.allclose(tiny.weights(trained), start, atol=1e-3)
    assert metrics["perplexity"]["teacher"] > 1
    assert len(metrics["hard_loss"]["students"]) == 2
