"""The trainer without logits: the fused loss and full logits are the same run, for every language-model head."""

from __future__ import annotations

import copy
import json
import threading

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import DataCollatorWithFlattening, LlamaForCausalLM, Trainer, TrainingArguments

from kd_trainer import DistillationTrainer
from tests.helpers import fused_run, launch, tiny
from tests.helpers.tiny import VOCAB, arguments, llama_config, models, pad, rows
from tests.losses.test_fused_linear import LargestTensor
from tests.tasks import test_fused_architectures, test_seq2seq
from tests.teachers import test_compatibility


def run(tmp_path, implementation, build, data, collator=pad, **settings):
    """(losses logged at each step, final weights, trainer) of a run of a few steps."""
    student, teacher = build()
    args = arguments(
        tmp_path / implementation,
        **{"kd_loss_implementation": implementation, "kd_reduction": "tokenmean", "logging_steps": 1, **settings},
    )
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=args, data_collator=collator, train_dataset=data,
        eval_dataset=data[:11],
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "soft_loss" in entry]
    return logs, {k: v.detach().clone() for k, v in student.state_dict().items()}, trainer


def assert_same_run(one, other):
    logs, weights, _ = one
    other_logs, other_weights, _ = other
    assert len(logs) == len(other_logs) > 0
    for a, b in zip(logs, other_logs, strict=True):
        for key in ("loss", "hard_loss", "soft_loss", "teacher_agreement"):
            assert (key in a) == (key in b), key
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), key
    for name, value in weights.items():
        assert torch.allclose(value, other_weights[name], atol=1e-5), name


SETTINGS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "batchmean": {"kd_reduction": "batchmean", "learning_rate": 0.005},
    "attended": {"kd_positions": "attended"},
    "alpha 1": {"kd_alpha": 1.0},
    "jsd, T 2.7": {"kd_divergence": "jsd", "kd_temperature": 2.7},
    "reverse_kl": {"kd_divergence": "reverse_kl"},
    "smoothed": {"label_smoothing_factor": 0.1},
    "schedule": {"kd_schedule": "linear", "kd_alpha_end": 0.1, "kd_temperature_end": 1.0},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_fused_is_full(tmp_path, setting):
    steps = 20 if setting in ("plain", "accumulation") else 5
    runs = [
        run(tmp_path, name, lambda: models("causal_lm"), rows("causal_lm", 160), max_steps=steps, **SETTINGS[setting])
        for name in ("fused", "full")
    ]
    assert len(runs[0][0]) == steps
    assert runs[0][2]._plan.heads is not None
    assert_same_run(*runs)


def test_evaluation_is_the_same(tmp_path):
    metrics = []
    for name in ("fused", "full"):
        _, _, trainer = run(tmp_path, name, lambda: models("causal_lm"), rows("causal_lm"), max_steps=1)
        metrics.append(trainer.evaluate())
    for key in EVALUATED:
        assert metrics[0][key] == pytest.approx(metrics[1][key], rel=1e-5), key


# ---- models ----


def pair(student=None, teacher=None):
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(16, **(student or {}))), LlamaForCausalLM(
        llama_config(24, **(teacher or {}))
    )  # fmt: skip


def frozen_head():
    student, teacher = pair()
    student.lm_head.requires_grad_(False)
    return student, teacher


def with_lora(teacher=None, **settings):
    student, other = pair()
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2, **settings)
    return peft.get_peft_model(student, config), teacher or other


def bias_in_the_head():
    both = pair()
    for model in both:
        model.lm_head.bias = nn.Parameter(torch.randn(VOCAB))
    return both


def not_contiguous():
    both = pair()
    for model in both:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().t().contiguous().t())
    return both


MODELS = {
    "bias": bias_in_the_head,
    "tied": lambda: pair({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "frozen head": frozen_head,
    "lora": lambda: with_lora(target_modules=["q_proj", "v_proj"]),
    "adapters off": lambda: with_lora("adapter_off", target_modules=["q_proj"]),
    "larger teacher": lambda: pair(None, {"vocab_size": 40}),
    "not contiguous": not_contiguous,
}


@pytest.mark.parametrize("kind", MODELS)
def test_kinds_of_models(kind, tmp_path):
    runs = [
        run(tmp_path, name, MODELS[kind], rows("causal_lm"), max_steps=4, eval_strategy="steps", eval_steps=2)
        for name in ("fused", "full")
    ]
    assert runs[0][2]._plan.heads is not None
    assert_same_run(*runs)
    assert_same_evaluation(runs[0][2], runs[1][2])
    start = MODELS[kind]()[0].state_dict()
    moved = {name for name, value in runs[0][1].items() if not torch.equal(value, start[name])}
    assert moved
    assert ("lm_head.weight" in moved) == (kind in ("bias", "tied", "larger teacher", "not contiguous"))


@pytest.mark.parametrize("evaluated_first", [False, True])
def test_adapters_off_of_a_model_in_eval_mode(evaluated_first, tmp_path):
    """A model from `from_pretrained` is in eval mode until the first step."""
    found = []
    for name in ("fused", "full"):
        student, _ = with_lora(target_modules=["q_proj"])
        trainer = DistillationTrainer(
            model=student.eval(), teacher_model="adapter_off", data_collator=pad, train_dataset=rows("causal_lm"),
            eval_dataset=rows("causal_lm", 11), args=arguments(tmp_path, kd_loss_implementation=name, max_steps=2),
        )  # fmt: skip
        if evaluated_first:
            trainer.evaluate()
        trainer.train()
        found.append(tiny.logged(trainer, "loss"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


EVALUATED = tuple(
    f"eval_{name}" for name in ("loss", "soft_loss", "hard_loss", "teacher_agreement", "overlap", "perplexity")
)


def assert_same_evaluation(one, other, names=EVALUATED, rel=1e-5):
    for name in names:
        values, others = tiny.logged(one, name), tiny.logged(other, name)
        assert values == pytest.approx(others, rel=rel), name
        assert len(values) > 0


def test_a_larger_student(tmp_path):
    """Its further ids have a hard loss alone."""
    words = test_compatibility.tokenizer([str(i) for i in range(VOCAB - 2)])
    folder = tmp_path / "teacher"
    pair()[1].save_pretrained(folder)
    words.save_pretrained(folder)
    logs = []
    for name in ("fused", "full"):
        student, teacher = pair({"vocab_size": 40})[0], LlamaForCausalLM.from_pretrained(folder)
        trainer = DistillationTrainer(
            model=student, teacher_model=teacher, processing_class=words, data_collator=pad,
            train_dataset=rows("causal_lm"), eval_dataset=rows("causal_lm", 11),
            args=arguments(tmp_path, kd_loss_implementation=name, kd_reduction="tokenmean", eval_strategy="steps",
                           eval_steps=2),
        )  # fmt: skip
        trainer.train()
        assert trainer._plan.common_ids == VOCAB
        logs.append(([e for e in trainer.state.log_history if "soft_loss" in e], student.state_dict(), trainer))
    assert logs[0][2]._plan.heads is not None
    assert_same_run(*logs)
    assert_same_evaluation(logs[0][2], logs[1][2])


@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_adapters_on_the_head_take_full_logits(where, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kd_trainer.tasks.output_head.SMALL_VOCABULARY", 0)
    settings = {"target_modules": ["q_proj"], where: ["lm_head"]}
    runs = [run(tmp_path, name, lambda: with_lora(**settings), rows("causal_lm")) for name in ("auto", "full")]
    assert "full logits: PeftModelForCausalLM has no plain linear output head" in capsys.readouterr().out
    assert runs[0][2]._plan.heads is None
    assert_same_run(*runs)


HALF = {
    "teacher in bfloat16": (torch.float32, torch.bfloat16),
    "both in bfloat16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.float32),
}


@pytest.mark.parametrize("kind", HALF)
def test_half_precision(kind, tmp_path):
    """To what a rounding of bfloat16 (2^-9) makes of logits of a few units, over T."""

    def build():
        student, teacher = pair()
        return student.to(HALF[kind][0]), teacher.to(HALF[kind][1])

    settings = {"bf16": kind == "autocast", "max_steps": 4}
    (one, _, fused), (other, _, full) = (
        run(tmp_path, name, build, rows("causal_lm"), **settings) for name in ("fused", "full")
    )
    assert fused._plan.heads is not None
    for a, b in zip(one, other, strict=True):
        for key in ("loss", "soft_loss", "hard_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-2), key
    assert fused.evaluate()["eval_loss"] == pytest.approx(full.evaluate()["eval_loss"], rel=1e-2)


# ---- batches ----


def pad_left(features):
    turned = [{name: values[::-1] for name, values in row.items()} for row in features]
    return {name: values.flip(1) for name, values in pad(turned).items()}


def without_labels(data):
    return [{name: values for name, values in row.items() if name != "labels"} for row in data]


def with_a_masked_batch(data):
    """Of the first optimizer step's micro-batches, one has no label at all."""
    return [{**row, "labels": [-100] * len(row["labels"])} if i < 2 else row for i, row in enumerate(data)]


SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
BATCHES = {
    "left padding": (lambda data: data, pad_left, {"kd_positions": "attended"}),
    "no labels": (without_labels, pad, {}),
    "no labels, left padding": (without_labels, pad_left, {"kd_alpha": 1.0}),
    "masked micro-batch": (with_a_masked_batch, pad, SPLIT),
    "masked micro-batch, attended": (with_a_masked_batch, pad, {**SPLIT, "kd_positions": "attended"}),
    "packed": (lambda data: data, DataCollatorWithFlattening(), {}),
    "packed, attended": (lambda data: data, DataCollatorWithFlattening(), {**SPLIT, "kd_positions": "attended"}),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_kinds_of_batches(kind, tmp_path):
    change, collator, settings = BATCHES[kind]
    data = change(rows("causal_lm"))
    runs = [run(tmp_path, name, pair, data, collator, **settings) for name in ("fused", "full")]
    assert runs[0][2]._plan.heads is not None
    assert_same_run(*runs)
    assert all(torch.isfinite(value).all() for value in runs[0][1].values())
    metrics = [one[2].evaluate() for one in runs]
    for name in EVALUATED if "labels" in data[0] else EVALUATED[:2]:
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5), name


def test_nothing_counts(tmp_path):
    data = [{**row, "labels": [-100] * len(row["labels"])} for row in rows("causal_lm")]
    logs, weights, _ = run(tmp_path, "fused", pair, data, max_steps=1)
    assert logs[0]["loss"] == 0
    assert all(torch.equal(value, weights[name]) for name, value in pair()[0].state_dict().items())


# ---- evaluation and prediction ----


def test_metrics_get_the_logits_and_training_stays_fused(tmp_path):
    seen = []

    def metrics(predictions):
        seen.append(predictions.predictions)
        return {"width": predictions.predictions.shape[-1]}

    found = []
    for name in ("fused", "full"):
        *_, trainer = run(tmp_path, name, pair, rows("causal_lm"), max_steps=1)
        trainer.compute_metrics = metrics
        found.append((trainer.evaluate(), trainer.predict(rows("causal_lm", 8, seed=3)), trainer))
        assert (trainer._plan.heads is not None) == (name == "fused")
    (fused, predicted, trainer), (full, expected, _) = found
    assert fused["eval_width"] == VOCAB
    for name in EVALUATED:
        assert fused[name] == pytest.approx(full[name], rel=1e-5), name
    assert seen[0] == pytest.approx(seen[2], abs=1e-5)
    assert predicted.predictions == pytest.approx(expected.predictions, abs=1e-5)
    assert predicted.predictions.shape[-1] == VOCAB
    assert predicted.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)


@pytest.mark.parametrize(("kind", "generates"), [("t5", False), ("t5", True), ("bart", False), ("mbart", True)])
def test_encoder_decoders(kind, generates, tmp_path):
    trainers = []
    for name in ("fused", "full"):
        trainer = test_seq2seq.distillation(
            kind, tmp_path / name, kd_loss_implementation=name, kd_reduction="tokenmean", max_steps=4,
            predict_with_generate=generates, generation_max_length=8, eval_strategy="steps", eval_steps=2,
        )  # fmt: skip
        trainer.train()
        trainers.append(trainer)
    fused, full = trainers
    assert fused._plan.heads is not None
    for key in ("loss", "soft_loss", "hard_loss"):
        assert tiny.logged(fused, key) == pytest.approx(tiny.logged(full, key), rel=1e-5), key
    assert_same_evaluation(fused, full)
    torch.testing.assert_close(tiny.weights(fused.model), tiny.weights(full.model), rtol=0, atol=1e-5)
    tokens = [one.predict(test_seq2seq.rows(8)).predictions for one in trainers]
    if generates:
        assert (tokens[0] == tokens[1]).all()


# ---- no logits exist ----

LONG = 64  # positions a row: many more than the few whose product is looked at
CLASSES = 600


def long_rows(count):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (count, LONG), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * LONG, "labels": row} for row in ids]


@pytest.mark.parametrize(
    "name",
    ["LlamaForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM", "BertForMaskedLM", "BartForConditionalGeneration",
     "T5ForConditionalGeneration"],
)  # fmt: skip
def test_the_logits_never_exist(name, tmp_path, monkeypatch):
    """From the first step on; the tile of a chunk holds as many rows as it is allowed, here few."""
    monkeypatch.setattr("kd_trainer.losses.fused_arguments.chunk_rows", lambda *_, **__: 8)
    monkeypatch.setattr("kd_trainer.losses.fused_arguments._TILE_BYTES", 0)
    monkeypatch.setattr("kd_trainer.losses.fused_linear._KEPT", threading.local())
    monkeypatch.setitem(test_fused_architectures.COMMON, "vocab_size", CLASSES)
    monkeypatch.setitem(test_fused_architectures.COMMON, "max_position_embeddings", LONG + 2)
    largest = {}
    # Full logits, which the measurement must find, are of the same size for every class.
    for implementation in ("fused", "full") if name == "LlamaForCausalLM" else ("fused",):
        both = [test_fused_architectures.build(name, hidden) for hidden in (16, 32)]
        trainer = tiny.trainer(
            "causal_lm", tmp_path, pair=both, data=long_rows(8), kd_loss_implementation=implementation,
            kd_reduction="tokenmean", max_steps=2, prediction_loss_only=True,
        )  # fmt: skip
        for when, act in {"train": trainer.train, "evaluate": lambda t=trainer: t.evaluate(long_rows(8))}.items():
            with LargestTensor() as seen:
                act()
            largest[implementation, when] = seen.bytes
    logits = 4 * 8 * LONG * CLASSES
    for (implementation, when), size in largest.items():
        assert size >= logits if implementation == "full" else size < logits / 3, (implementation, when)


# ---- what goes wrong ----


def nan_in_row_2(hidden):
    return hidden.index_fill(0, torch.tensor(2), torch.nan)


@pytest.mark.parametrize("mode", ["step", "log"])
@pytest.mark.parametrize(("side", "which"), [(0, "student"), (1, "teacher")])
def test_nan_is_told_by_the_rows_of_the_hidden_states(side, which, mode, tmp_path):
    both = pair()
    if side == 0:
        both[0].model.norm.register_forward_hook(lambda module, given, out: nan_in_row_2(out))
    else:  # after the first batch, which is looked at before the first step
        calls: list[int] = []
        both[1].model.norm.register_forward_hook(
            lambda module, given, out: nan_in_row_2(out) if calls else calls.append(1)
        )
    message = (
        rf"`loss` is not finite at step 0, process 0: 1 rows of the {which}'s hidden states hold NaN or inf "
        r"\(rows \[2\]\)"
    )
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path, "fused", lambda: both, rows("causal_lm"), kd_check_finite=mode, max_steps=1)


def test_an_infinite_head_is_not_blamed_on_the_hidden_states(tmp_path):
    both = pair()
    both[0].lm_head.weight.data[3] = torch.inf
    message = r"all hidden states are finite, but an output head's weights or logits are not, or the teacher has mass"
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path, "fused", lambda: both, rows("causal_lm"), max_steps=1)


# ---- several processes ----


@pytest.mark.launch
@pytest.mark.parametrize("case", ["plain", "accumulated", "second way", "not plain"])
def test_two_processes_give_what_one_gives(case, tmp_path_factory, tmp_path, monkeypatch):
    """DDP: fused in two processes = fused in one = full logits in one."""
    monkeypatch.setattr("kd_trainer.tasks.output_head.SMALL_VOCABULARY", 0)
    out = launch.once(tmp_path_factory, "fused", lambda folder: launch.two_processes("fused_run.py", str(folder)))
    found = json.loads((out / f"{case}.json").read_text())
    assert found["world_size"] == 2
    assert found["wrapper"] == "DistributedDataParallel"
    assert found["fused"] == (case != "not plain")
    for name in ("auto", "full"):
        alone = fused_run.build(case, tmp_path / name, kd_loss_implementation=name, per_device_train_batch_size=8)
        alone.train()
        assert (alone._plan.heads is not None) == (name == "auto" and case != "not plain")
        torch.testing.assert_close(torch.load(out / f"{case}.pt"), tiny.weights(alone.model), rtol=0, atol=1e-5)
        for key in tiny.LOGGED:
            assert found["logs"][key] == pytest.approx(tiny.logged(alone, key), rel=1e-5), key


class Rounded(nn.Module):
    """A weight rounded to 16 levels a row, with a straight-through gradient."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scale = weight.detach().abs().amax(1) / 8
        zero = torch.zeros(len(weight), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -8, 7)


def quantized():
    """Every linear layer, the output head too, of a student that learns from its own full-precision self."""
    teacher = pair()[1]
    student = copy.deepcopy(teacher)
    for layer in [module for module in student.modules() if isinstance(module, nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", Rounded())
    return student, teacher


def test_a_fake_quantised_student(tmp_path):
    """The same run with logits and without; its files are those of the stock Trainer; resumed it ends in the same."""
    data = rows("causal_lm")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    runs = [run(tmp_path, name, quantized, data, **options) for name in ("fused", "full")]
    assert runs[0][2]._plan.heads is not None
    assert_same_run(*runs)
    student, _ = quantized()
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, runs[0][1][name])}
    assert {name for name in runs[0][1] if name.endswith("original")} < moved
    args = TrainingArguments(tmp_path / "stock", max_steps=1, save_steps=1, use_cpu=True, report_to=[])
    Trainer(student, args, train_dataset=data, data_collator=pad).train()
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("stock/checkpoint-1", "fused/checkpoint-4")]
    assert saved[0].keys() == saved[1].keys()
    assert any(name.endswith("parametrizations.weight.original") for name in saved[0])
    student, teacher = quantized()
    resumed = DistillationTrainer(
        model=student, teacher_model=teacher, args=runs[0][2].args, data_collator=pad, train_dataset=data
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "fused" / "checkpoint-2"))
    for name, value in student.state_dict().items():
        assert torch.equal(value, runs[0][1][name]), name
