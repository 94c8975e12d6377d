"""Embedding models: which models have the task, its loss, its settings, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from kd_trainer import CachedTeacher, DistillationTrainer
from kd_trainer.losses import EMBEDDING_LOSSES, POOLINGS
from kd_trainer.tasks import TASKS, task_for
from tests.helpers import tiny


def rows(count: int = 16, seed: int = 1) -> list[dict[str, Any]]:
    kept = ("input_ids", "attention_mask")
    return [{name: row[name] for name in kept} for row in tiny.rows("classification", count, seed)]


def pad(side: str = "right") -> Any:
    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in features) + 2
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
        for row in features:
            for name, values in batch.items():
                filler = [0] * (longest - len(row["input_ids"]))
                values.append(filler + row[name] if side == "left" else row[name] + filler)
        return {name: torch.tensor(values) for name, values in batch.items()}

    return collate


def roberta(seed: int, hidden: int = 16) -> RobertaModel:
    """Its positions begin at the first attended token, so that padding on the left changes nothing."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"vocab_size": tiny.VOCAB, "max_position_embeddings": 40, "pad_token_id": 0, "initializer_range": 0.5}
    return RobertaModel(RobertaConfig(**sizes, **config, **tiny.NO_DROPOUT))


def trainer(output_dir: Any, student: Any = None, teacher: Any = None, side: str = "right", **kwargs: Any) -> Any:
    """`kwargs`: training arguments, or arguments of the trainer."""
    of_trainer = {name: kwargs.pop(name) for name in ("compute_loss_func", "data_collator") if name in kwargs}
    return DistillationTrainer(
        model=roberta(0) if student is None else student,
        teacher_model=roberta(1) if teacher is None else teacher,
        args=tiny.arguments(output_dir, **kwargs),
        train_dataset=rows(),
        eval_dataset=rows(11, seed=2),
        **{"data_collator": pad(side), **of_trainer},
    )


def written_out(model: nn.Module, pooling: str) -> list[torch.Tensor]:
    """The embedding of each evaluation row, alone and without padding, in float64."""
    embeddings = []
    for row in rows(11, seed=2):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0].double()
        embeddings.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    return embeddings


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("loss", EMBEDDING_LOSSES)
def test_the_soft_loss_is_the_one_written_out(loss, pooling, side, tmp_path):
    run = trainer(tmp_path, side=side, kd_pooling=pooling, kd_embedding_loss=loss, per_device_eval_batch_size=4)
    metrics = run.evaluate()
    pairs = [*zip(written_out(run.model, pooling), written_out(roberta(1), pooling), strict=True)]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
    each = [1 - c for c in cosines] if loss == "cosine" else [float((a - b).square().mean()) for a, b in pairs]
    assert metrics["eval_soft_loss"] == pytest.approx(sum(each) / len(each), abs=1e-6)
    assert metrics["eval_loss"] == metrics["eval_soft_loss"]
    assert metrics["eval_teacher_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert not {"eval_hard_loss", "eval_teacher_agreement"} & metrics.keys()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_predictions_are_the_embeddings(pooling, tmp_path):
    run = trainer(tmp_path, side="left", kd_pooling=pooling)
    found = run.predict(rows(11, seed=2)).predictions
    expected = torch.stack(written_out(run.model, pooling))
    torch.testing.assert_close(torch.tensor(found).double(), expected, rtol=0, atol=3e-6)


def test_predictions_beside_labels_are_the_embeddings(tmp_path):
    """A column of similarities, say, for the script's compute_metrics."""
    labelled = [{**row, "labels": i} for i, row in enumerate(rows(11, seed=2))]

    def collate(features):
        labels = torch.tensor([row["labels"] for row in features])
        return {**pad()(features), "labels": labels}

    run = trainer(tmp_path, data_collator=collate)
    run.compute_metrics = lambda p: {"width": p.predictions.shape[-1], "labels": sum(p.label_ids)}
    metrics = run.evaluate(labelled)
    assert (metrics["eval_width"], metrics["eval_labels"]) == (16, 55)
    assert "eval_hard_loss" not in metrics


def test_the_correlation_of_similarities_is_logged(tmp_path):
    run = trainer(tmp_path, side="left", per_device_eval_batch_size=4)
    sides = [torch.stack(written_out(model, "mean")) for model in (run.model, roberta(1))]
    sides = [x / x.norm(dim=-1, keepdim=True) for x in sides]
    pairs = [(i, j) for i in range(11) for j in range(i)]
    similarities = [[float(x[i] @ x[j]) for i, j in pairs] for x in sides]
    expected = scipy.stats.spearmanr(*similarities).statistic
    assert run.evaluate()["eval_teacher_spearman"] == pytest.approx(expected, abs=1e-6)
    assert run.predict(rows(11, seed=2)).metrics["test_teacher_spearman"] == pytest.approx(expected, abs=1e-6)
    assert "eval_teacher_spearman" not in run.evaluate(rows(2))  # of one pair there is none
    assert run.evaluate(rows(11, seed=2))["eval_teacher_spearman"] == pytest.approx(expected, abs=1e-6)


def test_the_first_rows_alone_are_correlated_of_a_large_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr("kd_trainer.training.logs.MOST_EMBEDDINGS", 6)
    run = trainer(tmp_path, per_device_eval_batch_size=4)
    few = run.evaluate(rows(11, seed=2)[:6])["eval_teacher_spearman"]
    assert run.evaluate()["eval_teacher_spearman"] == pytest.approx(few, abs=1e-6)


def test_the_student_learns_and_its_forward_is_as_before(tmp_path):
    run = trainer(tmp_path, max_steps=40, learning_rate=0.2)
    before = run.evaluate()["eval_teacher_cosine"]
    run.train()
    assert run.evaluate()["eval_teacher_cosine"] > before + 0.2
    assert "last_hidden_state" in run.model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert not run.model._forward_hooks
    assert [key for key in run.state.log_history[0] if key.endswith(("loss", "cosine"))] == [
        "loss", "soft_loss", "teacher_cosine",
    ]  # fmt: skip


def test_padding_and_accumulation_change_nothing(tmp_path):
    whole = trainer(tmp_path)
    split = trainer(tmp_path, side="left", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.train()
    split.train()
    torch.testing.assert_close(tiny.weights(split.model), tiny.weights(whole.model), rtol=0, atol=1e-6)


# ---- which models have the task ----


def t5(cls: Any) -> Any:
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": tiny.VOCAB}
    return cls(T5Config(**sizes, decoder_start_token_id=0))


@pytest.mark.parametrize(
    "build",
    [
        lambda: BertModel(tiny.bert_config()),
        lambda: LlamaModel(tiny.llama_config()),
        lambda: t5(T5EncoderModel),
        lambda: ViTModel(tiny.vit().config),
    ],
)
def test_a_model_without_an_output_head_embeds(build):
    assert task_for(build(), None, False) is TASKS["embedding"]


def test_an_encoder_decoder_has_no_embedding():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": tiny.VOCAB}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with pytest.raises(ValueError, match=r"`model` is a BartModel for .*encoder_last_hidden_state"):
        task_for(BartModel(BartConfig(**sizes, **heads)), None, False)


class Embeds(nn.Module):
    """A model of the user's own."""

    def __init__(self, gives: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.gives = nn.Embedding(tiny.VOCAB, 16), gives

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        states = self.table(input_ids)
        vectors = (states * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True)
        given = {"tensor": vectors, "mapping": {"sentence_embedding": vectors, "other": states}}
        return {**given, "states": {"last_hidden_state": states}, "tokens": states, "tuple": (vectors,)}[self.gives]


@pytest.mark.parametrize("gives", ["tensor", "mapping", "states"])
def test_modules_of_ones_own_on_both_sides(gives, tmp_path):
    run = trainer(tmp_path, Embeds(gives), Embeds(gives), kd_task="embedding")
    assert run.evaluate()["eval_soft_loss"] == pytest.approx(0, abs=1e-6)
    assert run.predict(rows(3)).predictions.shape == (3, 16)
    run.train()
    assert tiny.logged(run, "soft_loss") == pytest.approx([0] * 4, abs=1e-6)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (Embeds("tuple"), "`model` is a model that returns tuple; expected 'sentence_embedding'"),
        (Embeds("tokens"), r"`model` is giving embeddings of shape \(8, 16, 16\); expected \[batch, width\]"),
        (
            BertForSequenceClassification(tiny.bert_config()),
            "`model` is a model that returns logits; expected 'sentence_embedding'",
        ),
    ],
)
def test_a_student_without_an_embedding_is_refused(student, message, tmp_path):
    run = trainer(tmp_path, student, Embeds("tensor"), kd_task="embedding")
    with pytest.raises((TypeError, ValueError), match=message):
        run.evaluate()


def test_hidden_states_that_no_mask_belongs_to_are_refused(tmp_path):
    """The mask of the samples does not mark which frames are padding."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    conv = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
    more = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    speech = Wav2Vec2Model(Wav2Vec2Config(**small, **conv, **more))
    batch = {"input_values": torch.randn(2, 400), "attention_mask": torch.ones(2, 400, dtype=torch.long)}
    run = trainer(tmp_path, speech, speech.__class__(speech.config))
    with pytest.raises(ValueError, match=r"hidden states for an attention_mask of shape \(2, 400\)"):
        run.compute_loss(run.model, batch)


def test_other_widths_without_a_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"embeddings of shape \(8, 24\); expected the student's shape \(8, 16\)"):
        trainer(tmp_path, Embeds("tensor"), roberta(1, hidden=24), kd_task="embedding").train()


# ---- a teacher of another width ----


def test_a_projector_is_trained_and_not_saved(tmp_path):
    run = trainer(tmp_path, teacher=roberta(1, hidden=24), max_steps=30, learning_rate=0.2)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_teacher_cosine"] > before["eval_teacher_cosine"] + 0.2
    assert not hasattr(run.model, "kd_projectors")
    run.save_model(str(tmp_path / "saved"))
    kept = RobertaModel.from_pretrained(tmp_path / "saved")
    assert kept.state_dict().keys() == roberta(0).state_dict().keys()
    torch.testing.assert_close(tiny.weights(kept), tiny.weights(run.model))


def test_the_projection_is_compared_and_the_embedding_predicted(tmp_path):
    teacher = roberta(1, hidden=24)
    run = trainer(tmp_path, teacher=teacher)
    metrics, predictions = run.evaluate(), run.predict(rows(11, seed=2)).predictions
    student = torch.stack(written_out(run.model, "mean"))
    torch.testing.assert_close(torch.tensor(predictions).double(), student, rtol=0, atol=3e-6)
    with run._with_term_modules():
        weight = run.model.kd_projectors["embedding"].weight.detach().double()
    torch.testing.assert_close(weight.T @ weight, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-5)
    cosines = torch.nn.functional.cosine_similarity(student @ weight.T, torch.stack(written_out(teacher, "mean")))
    assert metrics["eval_teacher_cosine"] == pytest.approx(cosines.mean().item(), abs=1e-6)


def test_a_projector_goes_on_from_a_checkpoint(tmp_path):
    def run(name: str) -> Any:
        kwargs = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        return trainer(tmp_path / name, teacher=roberta(1, hidden=24), **kwargs)

    whole, resumed = run("whole"), run("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    torch.testing.assert_close(tiny.weights(resumed.model), tiny.weights(whole.model), rtol=0, atol=0)
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


# ---- settings ----


def test_an_unset_alpha_is_one(tmp_path):
    run = trainer(tmp_path)
    assert run.args.kd_alpha == 0.7
    run.train()
    assert run.kd_args.kd_alpha == 1
    assert run.summary()["formula"] == "loss = soft(1 - cosine), per row"
    assert tiny.logged(run, "loss") == tiny.logged(run, "soft_loss")


def test_an_alpha_of_one_may_be_written(tmp_path):
    trainer(tmp_path, kd_alpha=1.0, kd_embedding_loss="mse").train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_alpha": 0.7}, "`kd_alpha` is 0.7; expected 1, the default for this task, because the task 'embedding'"),
        ({"kd_alpha": 0.0}, "`kd_alpha` is 0.0; expected 1"),
        ({"kd_alpha": 1, "kd_alpha_end": 0.5, "kd_schedule": "linear"}, "`kd_alpha_end` is 0.5; expected 1"),
        ({"kd_hard_loss": "model"}, "`kd_hard_loss` is 'model'; expected 'auto', because the task 'embedding' has no"),
        ({"compute_loss_func": lambda *_, **__: 0}, "`compute_loss_func` is a function; expected None"),
        ({"kd_divergence": "jsd"}, "expected 'forward_kl' .* because its soft loss is 1 - cosine"),
        ({"kd_loss_implementation": "fused"}, "`kd_loss_implementation` is 'fused'; expected 'auto' or 'full'"),
        ({"kd_remap_labels": True}, "`kd_remap_labels` is True; expected False for the task 'embedding'"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1; expected 0 for the task 'embedding'"),
        ({"teacher": "adapter_off"}, "`teacher_model` is 'adapter_off'; expected a model for the task 'embedding'"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(tmp_path, **settings).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_pooling": "mean"}, "`kd_pooling` is 'mean'; expected None .* for the task 'classification'"),
        ({"kd_embedding_loss": "mse"}, "`kd_embedding_loss` is 'mse'; expected 'cosine' .* its outputs are no embed"),
    ],
)
def test_settings_of_embeddings_are_refused_for_other_tasks(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny.trainer("classification", tmp_path, **settings).train()


def test_a_pooling_that_a_script_changes_is_that_of_both_models(tmp_path):
    run, other = trainer(tmp_path, kd_pooling="cls"), trainer(tmp_path, kd_pooling="last")
    run.evaluate()
    run.args.kd_pooling = "last"
    run.train()
    other.train()
    assert tiny.logged(run, "loss") == tiny.logged(other, "loss")
    run.args.kd_pooling = "cls"
    assert run.evaluate() != other.evaluate()


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match="`kd_pooling` is 'max'; expected one of 'mean', 'cls', 'last'"):
        tiny.arguments("out", kd_pooling="max")
    with pytest.raises(ValueError, match="`kd_embedding_loss` is 'l1'; expected one of 'cosine', 'mse'"):
        tiny.arguments("out", kd_embedding_loss="l1")


def test_packed_rows_are_refused(tmp_path):
    def flatten(features):
        ids = [token for row in features for token in row["input_ids"]]
        places = [place for row in features for place in range(len(row["input_ids"]))]
        return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([places])}

    student, teacher = (LlamaModel(tiny.llama_config()) for _ in range(2))
    with pytest.raises(ValueError, match="`inputs` is a packed batch; expected one text in a row"):
        trainer(tmp_path, student, teacher, data_collator=flatten).train()


def test_a_teacher_of_another_tokenizer_reads_its_own_columns(tmp_path):
    """Twice as long: nothing is compared by position."""

    def collate(features):
        batch = pad()(features)
        teacher_ids = batch["input_ids"].repeat_interleave(2, 1)
        mask = batch["attention_mask"].repeat_interleave(2, 1)
        return {**batch, "teacher_input_ids": teacher_ids, "teacher_attention_mask": mask}

    teacher = BertModel(BertConfig(**{**tiny.bert_config().to_dict(), "pad_token_id": 0}))
    run = trainer(tmp_path, teacher=teacher, data_collator=collate)
    batch = collate(rows(4))
    loss = run.compute_loss(run.model, dict(batch))
    with torch.no_grad():
        expected = []
        for row in range(4):
            ids = [batch[name][row][batch[f"{name.removesuffix('input_ids')}attention_mask"][row] == 1]
                   for name in ("input_ids", "teacher_input_ids")]  # fmt: skip
            a, b = (m(input_ids=i[None])[0][0].mean(0) for m, i in zip((run.model, teacher), ids, strict=True))
            expected.append(1 - float(a @ b / (a.norm() * b.norm())))
    assert loss.item() == pytest.approx(sum(expected) / 4, abs=1e-6)


def test_a_cache_holds_one_vector_a_row(tmp_path):
    """Its width is known without the teacher, and the pooling that it was built with is compared."""

    def run(name: str, **kwargs: Any) -> Any:
        cached = {"teacher_cache_dir": str(tmp_path / "cache")} if name != "live" else {}
        return trainer(tmp_path / name, teacher=roberta(1, hidden=24), **{"kd_pooling": "cls", **cached, **kwargs})

    live, cached = run("live"), run("cached")
    live.train()
    cached.train()
    assert tiny.logged(cached, "loss") == pytest.approx(tiny.logged(live, "loss"), rel=1e-6)
    torch.testing.assert_close(tiny.weights(cached.model), tiny.weights(live.model), rtol=0, atol=1e-6)
    found, expected = cached.evaluate(), live.evaluate()
    for name in ("eval_loss", "eval_teacher_cosine", "eval_teacher_spearman"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    manifest = cached.teacher.manifest
    assert (manifest["format"], manifest["shape"], manifest["pooling"]) == ("logits", [24], "cls")
    again = trainer(tmp_path / "again", teacher=CachedTeacher(tmp_path / "cache"))  # with the pooling of the cache
    again.train()
    assert tiny.logged(again, "loss") == pytest.approx(tiny.logged(live, "loss"), rel=1e-6)
    with pytest.raises(ValueError, match="`kd_pooling` is one with the pooling 'mean'; expected the pooling 'cls'"):
        run("other", kd_pooling="mean").train()
    with pytest.raises(ValueError, match="'logits' for the task 'embedding', whose outputs are no softmax"):
        run("sparse", teacher_cache_dir=str(tmp_path / "sparse"), teacher_cache_format="topk").train()


def test_check_start_block_and_card_tell_of_the_embeddings(tmp_path, capsys):
    run = trainer(tmp_path, teacher=roberta(1, hidden=24), kd_embedding_loss="mse", kd_pooling="last")
    found = [(row.status, row.what, row.found) for row in run.check()]
    assert "error" not in [status for status, *_ in found]
    assert ("ok", "task", "embedding: loss = soft(squared error), per row") in found
    notes = ["last pooling of the student's last hidden state"]
    notes += ["a projector from 16 numbers to the teacher's 24 is trained, and not saved with the student"]
    assert [text for _, what, text in found if what == "note"] == notes
    assert not hasattr(run.model, "kd_projectors")
    capsys.readouterr()
    run.train()
    printed = capsys.readouterr().out
    assert all(f"[kd_trainer] {line}" in printed for line in ("task     embedding", *notes))
    assert "hard loss" not in printed
    assert "T=" not in printed
    run.evaluate()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "loss = soft(squared error), per row" in card
    assert "| eval_teacher_spearman |" in card
    assert "| eval_teacher_cosine |" in card
