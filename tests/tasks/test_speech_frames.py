"""Classes of frames of speech: CTC with the model's own hard loss, and one class a frame (diarization)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    HubertConfig,
    HubertForCTC,
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetForCTC,
    Trainer,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
)

from kd_trainer import DistillationTrainer
from kd_trainer.tasks.kinds import TASKS
from kd_trainer.tasks.resolve import task_for
from tests.helpers import tiny
from tests.helpers.tiny_generative import wav2vec2_config

SPEAKERS = 3


def wav2vec2(hidden: int, **kwargs: Any) -> nn.Module:
    return Wav2Vec2ForCTC(wav2vec2_config(hidden, vocab_size=tiny.VOCAB, pad_token_id=0, **kwargs))


def hubert(hidden: int) -> nn.Module:
    config = wav2vec2_config(hidden, vocab_size=tiny.VOCAB, pad_token_id=0).to_dict()
    return HubertForCTC(HubertConfig(**{k: v for k, v in config.items() if k not in ("model_type", "architectures")}))


def wav2vec2_bert(hidden: int) -> nn.Module:
    config = Wav2Vec2BertConfig(
        vocab_size=tiny.VOCAB, pad_token_id=0, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, feature_projection_input_dim=8, apply_spec_augment=False, layerdrop=0.0,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        conformer_conv_dropout=0.0, position_embeddings_type=None,
    )  # fmt: skip
    return Wav2Vec2BertForCTC(config)


def parakeet(hidden: int) -> nn.Module:
    encoder = ParakeetEncoderConfig(
        hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_mel_bins=8,
        subsampling_conv_channels=4, subsampling_factor=4, conv_kernel_size=3, layerdrop=0.0, dropout=0.0,
        activation_dropout=0.0, attention_dropout=0.0, dropout_positions=0.0, initializer_range=0.5,
    )  # fmt: skip
    return ParakeetForCTC(ParakeetCTCConfig(vocab_size=tiny.VOCAB, pad_token_id=0, encoder_config=encoder.to_dict()))


BUILDS = {"wav2vec2": wav2vec2, "hubert": hubert, "wav2vec2-bert": wav2vec2_bert, "parakeet": parakeet}
READS_FEATURES = ("wav2vec2-bert", "parakeet")


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return BUILDS[kind](16), BUILDS[kind](24)


def rows(kind: str, count: int = 24, seed: int = 1, *, masked: bool = True, labelled: bool = True) -> list[dict]:
    """Speech of unequal length, padded with zeros, and up to four tokens for it."""
    generator, made = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        if kind in READS_FEATURES:
            length, name, speech = 40, "input_features", torch.randn(40, 8, generator=generator)
        else:
            length, name, speech = 320, "input_values", torch.randn(320, generator=generator)
        real = int(torch.randint(length // 2, length + 1, (1,), generator=generator))
        mask = (torch.arange(length) < real).long()
        speech = speech * (mask if speech.dim() == 1 else mask[:, None])
        tokens_count = int(torch.randint(1, 5, (1,), generator=generator))
        tokens = torch.randint(1, tiny.VOCAB, (tokens_count,), generator=generator)
        row = {name: speech, "labels": F.pad(tokens, (0, 4 - len(tokens)), value=-100)}
        row |= {"attention_mask": mask} if masked else {}
        made.append(row if labelled else {k: v for k, v in row.items() if k != "labels"})
    return made


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(f[name]) for f in features]) for name in features[0]}


def distillation(folder: Any, kind: str, data: Any = None, models: Any = None, **kwargs: Any) -> Any:
    student, teacher = models or pair(kind)
    return DistillationTrainer(
        model=student, teacher_model=teacher, args=tiny.arguments(folder, **{"max_steps": 3, **kwargs}),
        data_collator=collate, train_dataset=rows(kind) if data is None else data,
        eval_dataset=rows(kind, 9, seed=2),
    )  # fmt: skip


def soft_by_hand(kind: str, batch: dict[str, Any], temperature: float) -> tuple[float, int, int]:
    """(mean over the frames of real samples, how many these are, how many there are), in float64."""
    student, teacher = pair(kind)
    read = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        z, y = (model(**read).logits.double() for model in (student.train(), teacher.eval()))  # with a BatchNorm
    lengths = torch.full((len(z),), z.shape[1])
    if "attention_mask" in batch:
        count = getattr(student, "_get_feat_extract_output_lengths", None) or student._get_subsampling_output_length
        lengths = count(batch["attention_mask"].sum(-1))
    mask = torch.arange(z.shape[1]) < lengths[:, None]
    p, q = F.log_softmax(y / temperature, -1), F.log_softmax(z / temperature, -1)
    each = temperature**2 * (p.exp() * (p - q)).sum(-1)
    return each[mask].mean().item(), int(mask.sum()), mask.numel()


@pytest.mark.parametrize("kind", BUILDS)
def test_speech_recognition_is_recognised(kind):
    task = task_for(pair(kind)[0], None, False)
    assert task.name == "ctc"
    assert task_for(pair(kind)[0], "ctc", False).frames is not None


# Upstream's loss of a Parakeet needs a mask.
BATCHES = [(k, m, n) for k in BUILDS for m in (True, False) for n in (True, False) if k != "parakeet" or m or not n]


@pytest.mark.parametrize(("kind", "masked", "labelled"), BATCHES)
def test_the_soft_loss_counts_the_frames_of_real_samples(kind, masked, labelled, tmp_path):
    data = rows(kind, masked=masked, labelled=labelled)
    trainer = distillation(
        tmp_path, kind, data, kd_alpha=1.0, kd_temperature=2.0, kd_reduction="tokenmean", max_steps=1
    )
    trainer.train()
    soft, counted, frames = soft_by_hand(kind, collate(data[:8]), 2.0)
    assert (counted < frames) == masked
    assert tiny.logged(trainer, "soft_loss") == pytest.approx([soft], rel=1e-4)


@pytest.mark.parametrize("kind", BUILDS)
def test_alpha_zero_is_the_stock_trainer(kind, tmp_path, capsys):
    expected = Trainer(
        model=pair(kind)[0], args=tiny.stock_arguments(tmp_path, max_steps=5, learning_rate=1e-3),
        data_collator=collate, train_dataset=rows(kind), eval_dataset=rows(kind, 9, seed=2),
    )  # fmt: skip
    got = distillation(tmp_path, kind, kd_alpha=0.0, max_steps=5, learning_rate=1e-3)
    for trainer in (expected, got):
        trainer.train()
    assert "hard loss: the model's own, as for every model of the task 'ctc'" in capsys.readouterr().out
    assert tiny.logged(got, "loss") == pytest.approx(tiny.logged(expected, "loss"), rel=1e-4)
    assert tiny.logged(got, "hard_loss") == tiny.logged(got, "loss")
    assert torch.allclose(tiny.weights(got.model), tiny.weights(expected.model), atol=1e-5)
    metrics = [trainer.evaluate()["eval_loss"] for trainer in (expected, got)]
    assert got.kd_args.kd_alpha == 0
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)
    predicted = [trainer.predict(rows(kind, 3, seed=3)).predictions for trainer in (expected, got)]
    first = [torch.as_tensor(p[0] if isinstance(p, tuple) else p) for p in predicted]
    assert torch.allclose(*first, atol=1e-4)


@pytest.mark.parametrize("own_reduction", ["sum", "mean"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_mixture_of_the_models_own_loss_and_the_frames(accumulate, own_reduction, tmp_path):
    batches = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    (student, teacher), (same, _) = pair("wav2vec2"), pair("wav2vec2")
    for model in (student, same):
        model.config.ctc_loss_reduction = own_reduction
    settings = {"kd_temperature": 2.0, "kd_reduction": "tokenmean", "max_steps": 1, **batches}
    trainer = distillation(tmp_path, "wav2vec2", models=(student, teacher), **settings)
    trainer.train()
    stock = Trainer(
        model=same, args=tiny.stock_arguments(tmp_path, max_steps=1, **batches), data_collator=collate,
        train_dataset=rows("wav2vec2"),
    )  # fmt: skip
    stock.train()
    hard, batch = tiny.logged(stock, "loss")[0], collate(rows("wav2vec2")[:8])
    soft, _, _ = soft_by_hand("wav2vec2", batch, 2.0)
    assert tiny.logged(trainer, "hard_loss") == pytest.approx([hard], rel=1e-4)
    assert tiny.logged(trainer, "soft_loss") == pytest.approx([soft], rel=1e-4)
    assert tiny.logged(trainer, "loss") == pytest.approx([0.7 * soft + 0.3 * hard], rel=1e-4)
    metrics = trainer.evaluate()
    assert 0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"] == pytest.approx(metrics["eval_loss"])


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
def test_the_weights_do_not_depend_on_the_split(reduction, tmp_path):
    """Rows of unequal length, ctc_loss_reduction "sum" (the default); means of rows are added up by upstream."""
    found = []
    for accumulate in (1, 2, 4):
        batches = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
        trainer = distillation(tmp_path, "wav2vec2", kd_reduction=reduction, learning_rate=1e-3, **batches)
        before = tiny.weights(trainer.model).clone()
        trainer.train()
        found.append(tiny.weights(trainer.model))
        assert (found[-1] - before).abs().max() > 1e-2
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_doubled_padding_changes_nothing(alpha, reduction, tmp_path):
    trainer = distillation(tmp_path, "wav2vec2", kd_alpha=alpha, kd_reduction=reduction)
    batch = collate(rows("wav2vec2")[:8])
    longer = {name: F.pad(batch[name], (0, batch[name].shape[1])) for name in ("input_values", "attention_mask")}
    longer["labels"] = F.pad(batch["labels"], (0, 4), value=-100)
    losses = [trainer.compute_loss(trainer.model, inputs).item() for inputs in (batch, longer)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_loads_a_teacher_by_path_and_saves(tmp_path):
    student, teacher = pair("wav2vec2")
    teacher.save_pretrained(tmp_path / "teacher")
    trainer = distillation(tmp_path / "run", "wav2vec2", models=(student, str(tmp_path / "teacher")))
    assert type(trainer.teacher.model) is Wav2Vec2ForCTC
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(tiny.weights(Wav2Vec2ForCTC.from_pretrained(tmp_path / "saved")), tiny.weights(trainer.model))


def test_the_formula_cannot_be_asked_for(tmp_path):
    with pytest.raises(ValueError, match="`kd_hard_loss` is 'task'; expected 'auto' or 'model' for the task 'ctc'"):
        distillation(tmp_path, "wav2vec2", kd_hard_loss="task").train()


def test_check_finds_nothing_wrong(tmp_path):
    results = distillation(tmp_path, "wav2vec2", kd_reduction="tokenmean").check()
    assert not [row for row in results if row.status == "error"], results


def test_other_frame_rates_are_refused(tmp_path):
    teacher = wav2vec2(24, conv_stride=(2, 4))
    expected = r"`teacher_model` is giving logits for \d+ frames; expected 19, the student's, because frame i"
    with pytest.raises(ValueError, match=expected):
        distillation(tmp_path, "wav2vec2", models=(pair("wav2vec2")[0], teacher)).train()


def test_other_vocabularies_are_refused(tmp_path):
    teacher = Wav2Vec2ForCTC(wav2vec2_config(24, vocab_size=tiny.VOCAB, pad_token_id=5))
    with pytest.raises(ValueError, match="`teacher_model` is a model with pad_token_id 5; expected 0 as in the stud"):
        distillation(tmp_path, "wav2vec2", models=(pair("wav2vec2")[0], teacher)).train()
    fewer = Wav2Vec2ForCTC(wav2vec2_config(24, vocab_size=30, pad_token_id=0))
    with pytest.raises(ValueError, match=r"giving logits of shape \(8, 19, 30\); .* because class i of one"):
        distillation(tmp_path, "wav2vec2", models=(pair("wav2vec2")[0], fewer)).train()


def test_a_cache_is_refused(tmp_path):
    pair("wav2vec2")[1].save_pretrained(tmp_path / "teacher")
    models = pair("wav2vec2")[0], str(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"`teacher_cache_dir` is '.*'; expected None for the task 'ctc'"):
        distillation(tmp_path, "wav2vec2", models=models, teacher_cache_dir=str(tmp_path / "cache")).train()


def test_frames_that_nobody_can_count_are_refused(tmp_path):
    task = TASKS["ctc"].of_model(tiny.Plain())
    with pytest.raises(ValueError, match="`kd_task` is 'ctc'; expected a task whose frames the model can count"):
        task.sequences({"input_values": torch.zeros(2, 100)})


# ---- one class a frame ----


def diarization(hidden: int) -> nn.Module:
    return Wav2Vec2ForAudioFrameClassification(wav2vec2_config(hidden, num_labels=SPEAKERS))


def frame_rows(count: int = 24, seed: int = 1) -> list[dict[str, Any]]:
    generator, made = torch.Generator().manual_seed(seed), rows("wav2vec2", count, seed)
    for row in made:
        speaker = torch.randint(0, SPEAKERS, (19,), generator=generator)
        row["labels"] = F.one_hot(speaker, SPEAKERS).float()
    return made


def frame_trainer(folder: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return distillation(folder, "wav2vec2", frame_rows(), (diarization(16), diarization(24)), **kwargs)


def pair_of(task: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return pair("wav2vec2") if task == "ctc" else (diarization(16), diarization(24))


def rows_of(task: str, count: int = 32) -> list[dict[str, Any]]:
    return rows("wav2vec2", count) if task == "ctc" else frame_rows(count)


def test_one_class_a_frame_with_alpha_zero_is_the_stock_trainer(tmp_path):
    torch.manual_seed(0)
    expected = Trainer(
        model=diarization(16), args=tiny.stock_arguments(tmp_path, max_steps=3), data_collator=collate,
        train_dataset=frame_rows(),
    )  # fmt: skip
    got = frame_trainer(tmp_path, kd_alpha=0.0, kd_reduction="tokenmean")
    for trainer in (expected, got):
        trainer.train()
    assert got._plan.task.name == "audio_frame_classification"
    assert tiny.logged(got, "loss") == pytest.approx(tiny.logged(expected, "loss"), rel=1e-4)
    assert torch.allclose(tiny.weights(got.model), tiny.weights(expected.model), atol=1e-5)


@pytest.mark.parametrize("positions", ["labels", "attended"])
def test_one_class_a_frame_has_a_soft_loss_a_frame(positions, tmp_path):
    trainer = frame_trainer(tmp_path, kd_temperature=2.0, kd_reduction="tokenmean", max_steps=1, kd_positions=positions)
    trainer.train()
    torch.manual_seed(0)
    student, teacher, batch = diarization(16), diarization(24), collate(frame_rows()[:8])
    read = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        z, y = (m.eval()(**read).logits.double() for m in (student, teacher))
    lengths = student._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
    mask = torch.arange(19) < lengths[:, None]
    mask = mask if positions == "attended" else torch.ones_like(mask)
    p, q = F.log_softmax(y / 2, -1), F.log_softmax(z / 2, -1)
    soft = 4 * (p.exp() * (p - q)).sum(-1)[mask].mean()
    assert tiny.logged(trainer, "soft_loss") == pytest.approx([soft.item()], rel=1e-4)
    metrics = trainer.evaluate(frame_rows(9, seed=2))
    assert 0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"] == pytest.approx(metrics["eval_loss"])
