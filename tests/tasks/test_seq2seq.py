"""`Seq2SeqDistillationTrainer`: encoder-decoders beside the stock `Seq2SeqTrainer`, generation in evaluation."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from kd_trainer import (
    DistillationMixin,
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainer,
    Seq2SeqDistillationTrainingArguments,
    parse_args,
)
from tests.helpers import tiny

KINDS = ["t5", "bart", "m2m_100"]
PARTS = ("loss", "soft_loss", "hard_loss", "teacher_agreement")


def build(kind: str, hidden: int = 16) -> nn.Module:
    if kind == "t5":
        config = T5Config(
            vocab_size=tiny.VOCAB, d_model=hidden, d_ff=2 * hidden, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=1.0,
        )  # fmt: skip
        return T5ForConditionalGeneration(config)
    shape = {
        "vocab_size": tiny.VOCAB, "d_model": hidden, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1,
        "decoder_start_token_id": 1, "forced_eos_token_id": None, "init_std": 0.5, "attention_dropout": 0.0,
        "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "activation_dropout": 0.0,
    }  # fmt: skip
    if kind == "bart":
        return BartForConditionalGeneration(BartConfig(**shape))
    return M2M100ForConditionalGeneration(M2M100Config(**shape))


def models(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return build(kind, 16), build(kind, 24)


def rows(count: int = 32, seed: int = 1, **columns: Any) -> list[dict[str, Any]]:
    """Pairs of unequal length; a hole in some of the labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        source, target = (int(torch.randint(3, 10, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(4, tiny.VOCAB, (source,), generator=generator).tolist()
        labels = torch.randint(4, tiny.VOCAB, (target,), generator=generator).tolist()
        labels[0] = -100 if i % 4 == 0 else labels[0]
        made.append({"input_ids": ids, "attention_mask": [1] * source, "labels": labels, **columns})
    return made


def of_the_trainer(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes out of `kwargs` what is no training argument. Upstream generates only for metrics, so there is one."""
    return {
        "data_collator": kwargs.pop("data_collator", tiny.pad),
        "compute_metrics": kwargs.pop("compute_metrics", lambda p: {"width": p.label_ids.shape[1]}),
    }


def distillation(
    kind: str, output_dir: Any, *, cls: Any = Seq2SeqDistillationTrainer, pair: Any = None, **kwargs: Any
) -> Any:
    """Training arguments and, by their names, what the trainer itself takes."""
    student, teacher = pair or models(kind)
    given = of_the_trainer(kwargs)
    args = Seq2SeqDistillationTrainingArguments(output_dir=str(output_dir), **{**tiny._BASE, **kwargs})
    return cls(
        model=student, teacher_model=teacher, args=args,
        **{"train_dataset": rows(), "eval_dataset": rows(21, seed=2), **given},
    )  # fmt: skip


def stock(kind: str, output_dir: Any, **kwargs: Any) -> Seq2SeqTrainer:
    given = of_the_trainer(kwargs)
    args = Seq2SeqTrainingArguments(output_dir=str(output_dir), **{**tiny._BASE, **kwargs})
    return Seq2SeqTrainer(
        model=models(kind)[0], args=args,
        **{"train_dataset": rows(), "eval_dataset": rows(21, seed=2), **given},
    )  # fmt: skip


class WithDecoderInputs:
    """Pads, and builds the decoder's inputs as upstream's seq2seq collator does when it is given the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = tiny.pad(features)
        build_ids: Any = self.model.prepare_decoder_input_ids_from_labels
        return {**batch, "decoder_input_ids": build_ids(labels=batch["labels"])}


# ---- kd_alpha = 0 is the stock Seq2SeqTrainer ----


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_zero_is_the_stock_trainer(kind, generate, tmp_path):
    kwargs = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 6, "predict_with_generate": generate,
              "generation_max_length": 8, "learning_rate": 0.01}  # fmt: skip
    distilled = distillation(kind, tmp_path, kd_alpha=0.0, kd_reduction="tokenmean", **kwargs)
    plain = stock(kind, tmp_path, **kwargs)
    distilled.train()
    plain.train()
    for key in ("loss", "eval_loss", "grad_norm"):
        assert tiny.logged(distilled, key) == pytest.approx(tiny.logged(plain, key), rel=1e-5), key
    assert len(tiny.logged(distilled, "loss")) == 12
    assert tiny.logged(distilled, "loss")[-1] < tiny.logged(distilled, "loss")[0]
    torch.testing.assert_close(tiny.weights(distilled.model), tiny.weights(plain.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_label_smoothing_is_the_stock_smoothers_loss(kind, generate, tmp_path):  # trap 38
    kwargs = {"label_smoothing_factor": 0.1, "max_steps": 3, "predict_with_generate": generate,
              "generation_max_length": 8}  # fmt: skip
    collator = WithDecoderInputs(models(kind)[0])  # the stock trainer has no labels left to build them from
    distilled = distillation(kind, tmp_path, kd_alpha=0.0, kd_reduction="tokenmean", data_collator=collator, **kwargs)
    plain = stock(kind, tmp_path, data_collator=collator, **kwargs)
    distilled.train()
    plain.train()
    assert tiny.logged(distilled, "loss") == pytest.approx(tiny.logged(plain, "loss"), rel=1e-5)
    # Upstream's generating step weighs each batch's mean; so does the distillation trainer's.
    assert distilled.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


# ---- the value, written out ----


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_loss_written_out_and_never_shifted(kind, reduction, tmp_path):  # trap 8
    student, teacher = models(kind)
    run = distillation(kind, tmp_path, pair=(student, teacher), kd_reduction=reduction, kd_temperature=2.0, max_steps=1)
    batch = tiny.pad(rows()[:8])
    labels = batch.pop("labels")
    start = torch.full_like(labels[:, :1], student.config.decoder_start_token_id)
    batch["decoder_input_ids"] = torch.cat([start, labels[:, :-1]], 1).masked_fill(labels.roll(1, 1) == -100, 0)
    batch["decoder_input_ids"][:, 0] = student.config.decoder_start_token_id
    with torch.no_grad():
        z_s, z_t = (copy.deepcopy(m).double()(**batch).logits for m in (student, teacher))
    hard = F.cross_entropy(z_s.transpose(1, 2), labels, reduction="sum").item()
    p, q = (F.log_softmax(z / 2, -1) for z in (z_t, z_s))
    soft = 4 * ((p.exp() * (p - q)).sum(-1) * (labels != -100)).sum().item()
    count = 8 if reduction == "batchmean" else int((labels != -100).sum())
    run.train()
    assert tiny.logged(run, "soft_loss")[0] == pytest.approx(soft / count, rel=1e-5)
    assert tiny.logged(run, "hard_loss")[0] == pytest.approx(hard / count, rel=1e-5)
    assert tiny.logged(run, "loss")[0] == pytest.approx((0.7 * soft + 0.3 * hard) / count, rel=1e-5)


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_accumulation_changes_nothing(kind, reduction, tmp_path):
    whole = distillation(kind, tmp_path, kd_reduction=reduction, learning_rate=0.01)
    split = distillation(
        kind, tmp_path, kd_reduction=reduction, learning_rate=0.01, per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    whole.train()
    split.train()
    torch.testing.assert_close(tiny.weights(split.model), tiny.weights(whole.model), rtol=0, atol=1e-5)
    for key in PARTS:
        assert tiny.logged(split, key) == pytest.approx(tiny.logged(whole, key), rel=1e-4), key


@pytest.mark.parametrize("positions", ["labels", "attended"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, positions, tmp_path):
    run = distillation(kind, tmp_path, kd_positions=positions)
    run.model.eval()
    batch = tiny.pad(rows(4))
    wider = {k: F.pad(v, (0, 5), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    assert run.compute_loss(run.model, wider).item() == pytest.approx(
        run.compute_loss(run.model, batch).item(), rel=1e-5
    )


def test_decoder_inputs_of_the_batch_are_used_as_they_stand(tmp_path):
    run = distillation("t5", tmp_path)
    run.model.eval()
    batch = tiny.pad(rows(4))
    built = WithDecoderInputs(run.model)(rows(4))
    other = {**built, "decoder_input_ids": built["decoder_input_ids"].clamp(min=5)}
    losses = [run.compute_loss(run.model, inputs).item() for inputs in (batch, built, other)]
    assert losses[0] == losses[1]
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_the_student_is_unwrapped_once_and_not_at_every_step(tmp_path, monkeypatch):
    run = distillation("t5", tmp_path)
    batch = tiny.pad(rows(4))
    run.compute_loss(run.model, batch)
    monkeypatch.setattr(run.accelerator, "unwrap_model", lambda *a, **k: pytest.fail("unwrapped again"))
    run.compute_loss(run.model, batch)


# ---- evaluation with generation ----


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_generation_leaves_the_evaluation_as_it_is(kind, smoothing, reduction, tmp_path):  # trap 23
    kwargs = {"kd_reduction": reduction, "label_smoothing_factor": smoothing, "generation_max_length": 8}
    plain = distillation(kind, tmp_path, **kwargs).evaluate()
    generating = distillation(kind, tmp_path, predict_with_generate=True, **kwargs).evaluate()
    keys = {key for key in plain if not key.endswith(("_runtime", "_per_second", "_time"))}
    assert {"eval_loss", "eval_soft_loss", "eval_hard_loss", "eval_teacher_agreement"} <= keys
    assert ("eval_perplexity" in keys) == (smoothing == 0)
    for key in keys - {"eval_width"}:  # of the labels, padded to the generated tokens' length or to their own
        assert generating[key] == pytest.approx(plain[key], rel=1e-6), key
    mixed = 0.7 * generating["eval_soft_loss"] + 0.3 * generating["eval_hard_loss"]
    assert generating["eval_loss"] == pytest.approx(mixed, rel=1e-5)


GENERATION = [
    {},
    {"max_length": 7, "num_beams": 2},
    {"max_new_tokens": 5},
    {"max_length": 12, "min_length": 6, "no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("options", GENERATION)
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_generated_tokens_are_upstreams(kind, options, tmp_path):
    kwargs = {"predict_with_generate": True, "generation_max_length": 9, "generation_num_beams": 1}
    distilled, plain = distillation(kind, tmp_path, **kwargs), stock(kind, tmp_path, **kwargs)
    a, b = (run.predict(run.eval_dataset, **options) for run in (distilled, plain))
    assert a.predictions.shape == b.predictions.shape
    assert a.predictions.dtype.kind == "i"
    assert (a.predictions == b.predictions).all()
    assert (a.label_ids == b.label_ids).all()
    assert len({tuple(row) for row in a.predictions.tolist()}) > 1  # the models do say something
    assert {"test_soft_loss", "test_hard_loss", "test_perplexity"} <= set(a.metrics)


def test_a_single_step_takes_generations_options(tmp_path):
    kwargs = {"predict_with_generate": True, "generation_max_length": 9}
    steps = [
        run.prediction_step(run.model.eval(), tiny.pad(rows(4)), False, max_length=5, num_beams=2)
        for run in (distillation("bart", tmp_path, **kwargs), stock("bart", tmp_path, **kwargs))
    ]
    assert torch.equal(steps[0][1], steps[1][1])
    assert torch.equal(steps[0][2], steps[1][2])


def test_a_generation_config_in_the_arguments_is_obeyed(tmp_path):
    config = GenerationConfig(max_length=6, num_beams=2, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    kwargs = {"predict_with_generate": True, "generation_config": config}
    runs = distillation("t5", tmp_path, **kwargs), stock("t5", tmp_path, **kwargs)
    a, b = (run.predict(run.eval_dataset).predictions for run in runs)
    assert a.shape == (21, 6)
    assert (a == b).all()


def test_metrics_get_token_ids(tmp_path):
    seen = {}

    def overlap(prediction: Any) -> dict[str, float]:
        """The share of a label's tokens that were generated, as ROUGE-1 counts them."""
        seen["predictions"], seen["labels"] = prediction.predictions, prediction.label_ids
        shares = []
        for made, label in zip(prediction.predictions, prediction.label_ids, strict=True):
            wanted = {int(t) for t in label if t > 0}
            shares.append(len(wanted & {int(t) for t in made}) / len(wanted))
        return {"overlap": sum(shares) / len(shares)}

    kwargs = {"predict_with_generate": True, "generation_max_length": 10, "compute_metrics": overlap}
    metrics = distillation("t5", tmp_path, **kwargs).evaluate()
    tokens = seen["predictions"]
    expected = stock("t5", tmp_path, **kwargs).evaluate()
    assert tokens.ndim == 2
    assert tokens.dtype.kind == "i"
    assert (tokens == seen["predictions"]).all()
    assert metrics["eval_overlap"] == expected["eval_overlap"]


@pytest.mark.parametrize("generate", [False, True])
def test_predictions_have_upstreams_form(generate, tmp_path):  # trap 12
    kwargs = {"predict_with_generate": generate, "generation_max_length": 8}
    runs = distillation("bart", tmp_path, **kwargs), stock("bart", tmp_path, **kwargs)
    a, b = (run.predict(rows(5, seed=3)) for run in runs)
    flat_a, flat_b = ((x.predictions,) if generate else x.predictions for x in (a, b))
    assert [x.shape for x in flat_a] == [x.shape for x in flat_b]
    for x, y in zip(flat_a, flat_b, strict=True):
        torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(y))
    assert (a.label_ids == b.label_ids).all()


def test_the_student_is_called_as_often_as_upstream_calls_it(tmp_path):
    counted = []
    kwargs = {"predict_with_generate": True, "generation_max_length": 8}
    for run in (distillation("t5", tmp_path, **kwargs), stock("t5", tmp_path, **kwargs)):
        run.evaluate()  # the first batch is looked at more closely
        calls: list[int] = []
        run.model.decoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run.evaluate()
        counted.append(len(calls))
    assert counted[0] == counted[1] > 2 * 3  # three batches: more than one token and one loss each


def test_inputs_are_not_changed(tmp_path):  # trap 11
    run = distillation("t5", tmp_path, predict_with_generate=True, generation_max_length=8, label_smoothing_factor=0.1)
    run.model.eval()
    batch = tiny.pad(rows(4, teacher_input_ids=[5, 6], teacher_attention_mask=[1, 1]))
    before = {k: v.clone() for k, v in batch.items()}
    run.compute_loss(run.model, batch)
    run.prediction_step(run.model, batch, False)
    assert list(batch) == list(before)
    assert all(torch.equal(batch[k], before[k]) for k in before)


def test_teacher_columns_reach_the_teacher_and_not_generate(tmp_path):  # trap 21
    kwargs = {"predict_with_generate": True, "generation_max_length": 8, "remove_unused_columns": True}
    other = {"teacher_input_ids": [5, 6, 7], "teacher_attention_mask": [1, 1, 1]}
    plain, given = (distillation("t5", tmp_path, **kwargs) for _ in range(2))
    a, b = plain.predict(rows(6)), given.predict(rows(6, **other))
    assert (a.predictions == b.predictions).all()
    assert b.metrics["test_hard_loss"] == pytest.approx(a.metrics["test_hard_loss"], rel=1e-6)
    assert b.metrics["test_soft_loss"] != pytest.approx(a.metrics["test_soft_loss"], rel=1e-3)


class Hinted(T5ForConditionalGeneration):
    """A teacher with an input that the student lacks."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, decoder_input_ids: Any = None, hints: Any = None
    ) -> Any:
        assert hints is not None
        return super().forward(input_ids, attention_mask, decoder_input_ids)


def test_columns_of_the_teacher_alone_do_not_reach_generate(tmp_path):
    student, teacher = models("t5")
    hinted = Hinted(teacher.config)
    hinted.load_state_dict(teacher.state_dict())
    kwargs = {"predict_with_generate": True, "generation_max_length": 8}
    run = distillation("t5", tmp_path, pair=(student, hinted), **kwargs)
    assert run.evaluate(rows(6, hints=[1]))["eval_loss"] == pytest.approx(
        distillation("t5", tmp_path, **kwargs).evaluate(rows(6))["eval_loss"], rel=1e-6
    )


# ---- without labels, without a teacher ----


def test_without_labels_it_generates_and_has_no_loss(tmp_path):
    free = [{k: v for k, v in row.items() if k != "labels"} for row in rows(6)]
    kwargs = {"predict_with_generate": True, "generation_max_length": 8}
    a, b = (run.predict(free) for run in (distillation("t5", tmp_path, **kwargs), stock("t5", tmp_path, **kwargs)))
    assert (a.predictions == b.predictions).all()
    assert "test_loss" not in a.metrics
    assert "test_perplexity" not in a.metrics


@pytest.mark.parametrize("generate", [False, True])
def test_without_labels_the_decoders_inputs_have_a_soft_loss(generate, tmp_path):  # trap 10
    decoder = {"decoder_input_ids": [0, 5, 6], "decoder_attention_mask": [1, 1, 1]}
    free = [{k: v for k, v in row.items() if k != "labels"} for row in rows(6, **decoder)]
    kwargs = {"predict_with_generate": generate, "generation_max_length": 8}
    metrics = distillation("t5", tmp_path, **kwargs).predict(free, metric_key_prefix="eval").metrics
    assert metrics["eval_loss"] == pytest.approx(0.7 * metrics["eval_soft_loss"], rel=1e-6)
    assert "eval_hard_loss" not in metrics
    assert "eval_perplexity" not in metrics


def test_without_a_teacher_it_is_the_stock_trainer_with_parts(tmp_path):
    student, _ = models("t5")
    kwargs = {"predict_with_generate": True, "generation_max_length": 8}
    run = distillation("t5", tmp_path, pair=(student, None), kd_alpha=0.0, kd_reduction="tokenmean", **kwargs)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(stock("t5", tmp_path, **kwargs).evaluate()["eval_loss"], rel=1e-5)
    assert metrics["eval_hard_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


# ---- construction ----


def test_the_mixin_in_front_of_a_class_of_the_users_own(tmp_path):
    class Counting(Seq2SeqTrainer):
        steps = 0

        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return super().prediction_step(*args, **kwargs)

    class CountingKD(DistillationMixin, Counting):
        pass

    kwargs = {"predict_with_generate": True, "generation_max_length": 8}
    run = distillation("t5", tmp_path, cls=CountingKD, **kwargs)
    metrics = run.evaluate()
    assert run.steps == 3
    assert metrics["eval_loss"] == pytest.approx(
        distillation("t5", tmp_path, **kwargs).evaluate()["eval_loss"], rel=1e-6
    )


def test_arguments_of_upstreams_constructor_pass_untouched(tmp_path):  # trap 24
    run = distillation("t5", tmp_path)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    again = Seq2SeqDistillationTrainer(
        run.model, run.args, tiny.pad, rows(), rows(4), teacher_model=run.teacher.model, optimizers=(optimizer, None)
    )
    assert again.optimizer is optimizer
    assert again.data_collator is tiny.pad
    with pytest.raises(TypeError, match="optimizer_cls_and_kwargs"):  # `Seq2SeqTrainer` does not take it
        Seq2SeqDistillationTrainer(
            run.model, run.args, teacher_model=run.teacher.model, optimizer_cls_and_kwargs=(torch.optim.SGD, {})
        )


@pytest.mark.parametrize("make", [lambda path: None, lambda path: tiny.arguments(path)])
def test_arguments_without_generation_are_refused(make, tmp_path):
    student, teacher = models("t5")
    with pytest.raises(TypeError, match=r"`args` is of type .*; expected Seq2SeqDistillationTrainingArguments\. Build"):
        Seq2SeqDistillationTrainer(model=student, teacher_model=teacher, args=make(tmp_path))


def test_one_file_for_both_argument_classes(tmp_path):
    path = tmp_path / "config.json"
    shared = {"output_dir": str(tmp_path), "kd_alpha": 0.25, "kd_reduction": "tokenmean", "use_cpu": True}
    path.write_text(json.dumps(shared))
    plain = parse_args(DistillationTrainingArguments, argv=[str(path)])
    seq2seq = parse_args(Seq2SeqDistillationTrainingArguments, argv=[str(path), "--predict_with_generate", "true"])
    assert (plain.kd_alpha, seq2seq.kd_alpha, seq2seq.kd_reduction) == (0.25, 0.25, "tokenmean")
    assert seq2seq.predict_with_generate is True
    assert isinstance(seq2seq, Seq2SeqTrainingArguments)
    path.write_text(json.dumps({**shared, "generation_max_length": 9, "generation_num_beams": 2}))
    seq2seq = parse_args(Seq2SeqDistillationTrainingArguments, argv=[str(path)])
    assert (seq2seq.generation_max_length, seq2seq.generation_num_beams) == (9, 2)
    with pytest.raises(ValueError, match="`generation_max_length` is 9"):
        parse_args(DistillationTrainingArguments, argv=[str(path)])
    with pytest.raises(TypeError, match=r"`alpha` is 0\.5"):
        Seq2SeqDistillationTrainingArguments(str(tmp_path), alpha=0.5)
    with pytest.raises(ValueError, match="`kd_alpha` is 2"):
        Seq2SeqDistillationTrainingArguments(str(tmp_path), kd_alpha=2.0)
