"""`features.py` and `projectors.py`: feature terms in training, evaluation, checkpoints, `check()` and refusals."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM

from kd_trainer import CachedTeacher, DistillationArguments, DistillationTrainingArguments, parse_args
from kd_trainer.losses import features as losses
from kd_trainer.losses.features import FEATURES, Feature
from kd_trainer.tasks.capture import attended_frames, attended_tokens, capture, layer_widths
from kd_trainer.training import projectors
from kd_trainer.training.start_block import card_section
from tests.helpers import tiny

ALL = {"relation": 1.0, "attention": 0.5, "hidden_mse": 0.3, "hidden_cosine": 0.2}
SCALE = {"kd_reduction": "tokenmean"}


def pair(task: str = "classification", teacher_width: int = 24, layers: tuple[int, int] = (2, 3)):
    torch.manual_seed(0)
    config, model = {
        "classification": (tiny.bert_config, BertForSequenceClassification),
        "causal_lm": (tiny.llama_config, LlamaForCausalLM),
    }[task]
    widths = zip((16, teacher_width), layers, strict=True)
    return tuple(model(config(width, num_hidden_layers=n, initializer_range=0.5)) for width, n in widths)


def trainer(folder, task: str = "classification", *, models=None, **kwargs):
    kwargs = {"kd_features": ALL, "learning_rate": 0.01, **(SCALE if task == "causal_lm" else {}), **kwargs}
    return tiny.trainer(task, folder, pair=models or pair(task), **kwargs)


def by_hand(run, batch, layers: tuple[int, int]) -> dict[str, float]:
    """Each feature over a whole batch in float64, as the mean over its attended positions."""
    sides, mask = [], batch["attention_mask"].bool()
    for model, layer in zip((run.model, run.teacher.model), layers, strict=True):
        model = copy.deepcopy(model).double().eval()
        with torch.no_grad(), capture(model, [layer]) as captured:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        sides.append((captured.hidden(layer), captured.attention(layer)))
    projector = run._term_modules._modules
    found = {}
    for name, feature in FEATURES.items():
        student, teacher = (side[0] if feature.reads == "hidden" else side[1] for side in sides)
        if name in projector:
            student = student @ projector[name][f"{layers[0]}_{layers[1]}"].weight.detach().double().T
        options = {"heads": 8} if feature.has_heads else {}
        found[name] = (feature.loss(student, teacher, mask, **options).sum() / mask.sum()).item()
    return found


@pytest.mark.parametrize(("task", "rows"), [("classification", 8), ("causal_lm", 100)])
def test_each_is_logged_weighed_and_the_mean_over_attended_positions(task, rows, tmp_path, capsys):
    """In batches of 8 rows the same as over all rows at once; upstream weighs the batches of a language model alike."""
    run = trainer(tmp_path, task, per_device_eval_batch_size=rows)
    metrics = run.evaluate()
    expected = by_hand(run, tiny.pad(run.eval_dataset), (1, 2))
    for name, value in expected.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(value, rel=2e-5), name
    run.train()
    for entry in run.state.log_history[1:-1]:
        added = sum(weight * entry[f"{name}_loss"] for name, weight in ALL.items())
        assert 0.7 * entry["soft_loss"] + 0.3 * entry["hard_loss"] + added == pytest.approx(entry["loss"], rel=1e-5)
    printed = capsys.readouterr().out
    assert "+ relation + 0.5 * attention + 0.3 * hidden_mse + 0.2 * hidden_cosine, per" in printed
    assert "hidden_mse: layers student-teacher 1-2 (projector 16 to 24)" in printed
    card = card_section({"teacher": "t", **run.summary()}, run.state.log_history)
    assert "0.3 * hidden_mse" in card
    assert "| relation_loss |" in card


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_accumulation_and_the_fused_loss_change_nothing(task, tmp_path):
    weights = []
    ways = [("a", 8, "auto"), ("b", 2, "auto"), *([("c", 2, "fused")] if task == "causal_lm" else [])]
    for name, size, way in ways:
        run = trainer(
            tmp_path / name, task, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            kd_loss_implementation=way, kd_feature_layers="uniform", max_steps=3,
        )  # fmt: skip
        run.train()
        assert (run._plan.heads is not None) == (way == "fused")
        weights.append(torch.cat([tiny.weights(run.model), tiny.weights(run._term_modules._modules)]))
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, rtol=0, atol=1e-5)


def test_pairs_of_layers_have_their_mean(tmp_path):
    found = []
    for layers in ([[0, 0]], [[1, 2]], [[0, 0], [1, 2]]):
        run = trainer(tmp_path, kd_features={"relation": 1.0}, kd_feature_layers=layers)
        metrics = run.evaluate()
        found.append(metrics["eval_relation_loss"])
    assert found[2] == pytest.approx((found[0] + found[1]) / 2, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_may_be_anything(alpha, tmp_path):
    run = trainer(tmp_path, "causal_lm", kd_alpha=alpha, kd_features={"relation": 2.0})
    run.train()
    for entry in run.state.log_history[:-1]:
        rest = entry["soft_loss"] if alpha else entry["hard_loss"]
        assert rest + 2 * entry["relation_loss"] == pytest.approx(entry["loss"], rel=1e-5)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(tmp_path):
    student = pair()[0]
    run = trainer(tmp_path, models=(student, copy.deepcopy(student)), kd_alpha=1.0, kd_feature_layers="uniform")
    before = tiny.weights(run.model).clone()
    run.train()
    for name in ALL:
        assert tiny.logged(run, f"{name}_loss") == pytest.approx([0.0] * 4, abs=1e-9)
    torch.testing.assert_close(tiny.weights(run.model), before, rtol=0, atol=1e-7)
    assert not run._term_modules._modules  # equal widths need no projector


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_and_autocast(precision, tmp_path):
    """The recomputed forward adds nothing; under autocast both sides are captured as they compute."""
    logged = []
    for checkpointing in (False, True):
        run = trainer(
            tmp_path, "causal_lm", bf16=precision == "bf16", gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )  # fmt: skip
        run.train()
        logged.append([tiny.logged(run, f"{name}_loss") for name in ALL])
    for one, other in zip(*logged, strict=True):
        assert one == pytest.approx(other, rel=1e-4 if precision == "fp32" else 2e-2)


def test_reentrant_checkpointing_is_refused(tmp_path):
    run = trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    run.model.enable_input_require_grads()
    with pytest.raises(ValueError, match="Set use_reentrant to false"):
        run.train()


def test_one_more_feature_is_one_function_and_one_entry(monkeypatch, tmp_path):
    def norms(student, teacher, mask=None):
        return (student.norm(dim=-1) - teacher.norm(dim=-1)).square().masked_fill(~mask, 0).sum(-1)

    monkeypatch.setitem(FEATURES, "norms", Feature(norms, "hidden"))
    run = trainer(tmp_path, kd_features={"norms": 0.1})
    before = run.evaluate()["eval_norms_loss"]
    run.train()
    assert run.evaluate()["eval_norms_loss"] < before
    assert len(tiny.logged(run, "norms_loss")) == 4


# ---- projectors ----


def test_projectors_are_trained_are_gone_afterwards_and_are_in_no_saved_student(tmp_path, caplog):
    plain = trainer(tmp_path / "plain", kd_features=None)
    keys = list(plain.model.state_dict())
    plain.save_model(tmp_path / "plain" / "saved")
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, load_best_model_at_end=True, eval_strategy="steps",
                  eval_steps=2)  # fmt: skip
    before = run.model._keys_to_ignore_on_save
    found = []

    class Watch(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            weight = model.kd_projectors["hidden_mse"]["1_2"].weight
            assert any(weight is p for group in optimizer.param_groups for p in group["params"])
            found.append(weight.detach().clone())
            model.save_pretrained(tmp_path / "by_callback")

    run.add_callback(Watch())
    with caplog.at_level(logging.WARNING):
        run.train()
    assert "missing keys" not in caplog.text
    torch.testing.assert_close(found[0].T @ found[0], torch.eye(16), rtol=0, atol=0.3)  # one step from orthogonal
    assert not torch.equal(found[0], found[-1])
    assert list(run.model.state_dict()) == keys
    assert run.model._keys_to_ignore_on_save == before
    run.save_model(tmp_path / "saved")
    names = set(load_file(tmp_path / "plain" / "saved" / "model.safetensors"))
    for folder in ("saved", "by_callback", "checkpoint-2", "checkpoint-4"):
        assert set(load_file(tmp_path / folder / "model.safetensors")) == names, folder
        caplog.clear()
        _, info = BertForSequenceClassification.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values())
        assert not caplog.records


def test_the_first_projectors_depend_on_the_seed_alone(tmp_path):
    weights = []
    for seed, used in ((1, 0), (1, 5), (2, 0)):
        run = trainer(tmp_path, kd_features={"hidden_mse": 1.0}, seed=seed)
        torch.rand(used)
        state = torch.get_rng_state()
        with run._with_term_modules():
            weights.append(tiny.weights(run.model.kd_projectors))
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_other_features_have_other_projectors(tmp_path):
    run = trainer(tmp_path, kd_features={"relation": 1.0})
    run.train()
    assert not run._term_modules._modules
    run.args.kd_features, run.args.kd_feature_layers = {"hidden_cosine": 1.0}, "uniform"
    run.train()
    trained = dict(run._term_modules._modules["hidden_cosine"].items())
    assert list(trained) == ["0_1", "1_2"]
    run.evaluate()
    assert run._term_modules._modules["hidden_cosine"]["0_1"] is trained["0_1"]


@pytest.mark.parametrize("features", [ALL, {"hidden_mse": 1.0}])
def test_resumed_is_uninterrupted(features, tmp_path):
    arguments = {"kd_features": features, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", **arguments)
    whole.train()
    resumed = trainer(tmp_path / "whole", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for one, other in ((whole.model, resumed.model), (whole._term_modules._modules, resumed._term_modules._modules)):
        assert torch.equal(tiny.weights(one), tiny.weights(other))
    assert tiny.logged(whole, "hidden_mse_loss")[2:] == tiny.logged(resumed, "hidden_mse_loss")[2:]
    manifest = (tmp_path / "whole" / "checkpoint-2" / "checkpoint_manifest.json").read_text()
    assert projectors.FILE in manifest


def test_a_checkpoint_without_its_projectors_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=2, kd_features={"relation": 1.0}).train()
    assert not (tmp_path / "checkpoint-2" / projectors.FILE).exists()
    with pytest.raises(ValueError, match=f"because {projectors.FILE} is missing"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


class Own(nn.Module):
    """A module of the user's own around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def test_a_plain_module_around_a_model_is_saved_without_projectors(tmp_path):
    student, teacher = map(Own, pair())
    run = trainer(tmp_path, models=(student, teacher), save_strategy="steps", save_steps=4, kd_task="classification")
    run.train()
    assert tiny.logged(run, "hidden_mse_loss")
    assert set(load_file(tmp_path / "checkpoint-4" / "model.safetensors")) == set(Own(pair()[0]).state_dict())
    assert (tmp_path / "checkpoint-4" / projectors.FILE).exists()


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
def test_the_outputs_depend_on_the_projections_and_are_what_they_were(kind):
    logits, feature = torch.randn(2, 3, requires_grad=True), torch.full((2, 4), torch.inf, requires_grad=True)
    number = torch.zeros(1)
    outputs = {"tensor": logits, "tuple": (number, logits), "mapping": {"number": number, "logits": logits}}[kind]
    made = projectors.after(outputs, [feature * 1])
    made = made if kind == "tensor" else made[1 if kind == "tuple" else "logits"]
    assert torch.equal(made, logits)
    gradients = torch.autograd.grad(made.sum(), [logits, feature])
    assert torch.equal(gradients[0], torch.ones(2, 3))
    assert torch.equal(gradients[1], torch.zeros(2, 4))
    assert projectors.after((number,), [feature]) == (number,)


def test_the_students_outputs_depend_on_its_projectors(tmp_path):
    """DDP with find_unused_parameters searches the graph of the outputs."""
    run = trainer(tmp_path, kd_features={"hidden_mse": 1.0})
    batch = tiny.pad(tiny.rows("classification")[:4])
    with run._with_term_modules():
        _, outputs = run.compute_loss(run.model.train(), batch, return_outputs=True)
        weight = run.model.kd_projectors["hidden_mse"]["1_2"].weight
        (gradient,) = torch.autograd.grad(outputs["logits"].sum(), [weight])
    assert torch.equal(gradient, torch.zeros_like(gradient))


# ---- check() and refusals ----


def test_check_names_layers_and_projectors(tmp_path):
    run = trainer(tmp_path, kd_feature_layers=[[0, 0], [-1, 2]], kd_features={"relation": 1.0, "hidden_mse": 1.0})
    rows = run.check(evaluate=False)
    found = [row.found for row in rows]
    assert "relation: layers student-teacher 0-0, 1-2" in found
    assert "hidden_mse: layers student-teacher 0-0 (projector 16 to 24), 1-2 (projector 16 to 24)" in found
    assert not [row for row in rows if row.status == "error"]
    assert not hasattr(run.model, "kd_projectors")


def refusal(run, message: str) -> None:
    assert any(row.what == "added terms" and row.status == "error" for row in run.check(evaluate=False))
    with pytest.raises(ValueError, match=message):
        run.train()


def test_layers_that_do_not_exist_are_refused(tmp_path):
    refusal(trainer(tmp_path, kd_feature_layers=[[0, 7]]), "teacher layers from 0 to 2")


def test_packed_rows_have_no_relation(tmp_path):
    run = trainer(tmp_path, "causal_lm", kd_features={"relation": 1.0})
    run.data_collator = lambda rows: {
        "input_ids": torch.ones(2, 6).long(), "labels": torch.ones(2, 6).long(),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2),
    }  # fmt: skip
    refusal(run, r"`kd_features` is 'relation' with packed rows")


def test_other_tokens_for_the_teacher_are_refused(tmp_path):
    rows = tiny.rows("classification")
    rows = [{**row, **{f"teacher_{name}": row[name] for name in ("input_ids", "attention_mask")}} for row in rows]
    run = tiny.trainer("classification", tmp_path, pair=pair(), data=rows, kd_features={"relation": 1.0})
    with pytest.raises(ValueError, match="Take a teacher with the student's tokenizer"):
        run.train()


def test_a_cache_has_no_features(tmp_path):
    cached = tiny.trainer("classification", tmp_path, pair=pair(), teacher_cache_dir=str(tmp_path / "cache"))
    cached.build_teacher_cache()
    run = trainer(tmp_path / "run", models=(pair()[0], CachedTeacher(tmp_path / "cache")))
    with pytest.raises(
        ValueError, match=r"with a teacher cache; expected a teacher that is run, .*Train with the live"
    ):
        run.train()


def test_models_without_known_layers_are_refused(tmp_path):
    refusal(tiny.trainer("plain", tmp_path, kd_features={"relation": 1.0}), "Plain has no transformers model inside")


def test_layers_that_attend_to_other_positions_are_refused(tmp_path):
    student, teacher = pair("causal_lm")
    for layer in teacher.model.layers:
        layer.self_attn.is_causal = False
    original = teacher.model.forward

    def forward(input_ids, attention_mask, **kwargs):
        everyone = torch.ones(len(input_ids), 1, *input_ids.shape[1:] * 2, dtype=torch.bool)
        return original(input_ids=input_ids, attention_mask=everyone, **kwargs)

    teacher.model.forward = forward
    run = trainer(
        tmp_path, "causal_lm", models=(student, teacher), kd_features={"attention": 1.0},
        kd_feature_layers=[[0, 0], [1, 2]],
    )  # fmt: skip
    with pytest.raises(ValueError, match="attends to other positions than the teacher's"):
        run.train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kd_features": {"relations": 1}}, r"`kd_features` is 'relations'; .*Did you mean `relation`"),
        ({"kd_features": {"relation": -1}}, r"`kd_features\[relation\]` is -1; expected a finite number >= 0"),
        ({"kd_features": "{"}, "a JSON value"),
        ({"kd_features": {"relation": 1}, "kd_feature_layers": "first"}, "'last', 'uniform', or pairs"),
        ({"kd_features": {"relation": 1}, "kd_feature_layers": [[0]]}, "'last', 'uniform', or pairs"),
        ({"kd_feature_layers": "uniform"}, "no value without kd_features"),
        ({"kd_relation_heads": 4}, "no value without relations"),
        ({"kd_features": {"hidden_mse": 1}, "kd_relation_heads": 4}, "add 'relation' to kd_features"),
        ({"kd_features": {"relation": 1}, "teacher_cache_dir": "x"}, "None with kd_features"),
    ],
)
def test_arguments_that_mean_nothing(given, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(**given)


def test_the_command_line_and_json_give_the_same(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--kd_features", '{"relation": 1, "hidden_mse": 0.5}']
    parsed = parse_args(DistillationTrainingArguments, argv=[*argv, "--kd_feature_layers", "[[0, 1], [1, 3]]"])
    assert parsed.kd_features == {"relation": 1, "hidden_mse": 0.5}
    assert parsed.kd_feature_layers == [[0, 1], [1, 3]]
    assert (
        parse_args(DistillationTrainingArguments, argv=[*argv, "--kd_feature_layers", "uniform"]).kd_feature_layers
        == "uniform"
    )


def test_heads_that_divide_nothing_are_refused_in_training(tmp_path):
    with pytest.raises(ValueError, match=r"`kd_relation_heads` is 5; .*Take a divisor of 8, e\.g\. 8"):
        trainer(tmp_path, kd_relation_heads=5).train()


# ---- positions of other kinds ----


def test_images_count_rows_and_take_the_mean_over_patches(tmp_path):
    torch.manual_seed(0)
    student, teacher = tiny.vit(num_hidden_layers=1), tiny.vit(num_hidden_layers=2, hidden_size=32)
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % tiny.CLASSES} for i in range(16)]
    run = tiny.trainer(
        "classification", tmp_path, pair=(student, teacher), data=rows, kd_features=ALL, learning_rate=0.01
    )
    run.eval_dataset = rows
    metrics = run.evaluate()
    images, sides = torch.stack([row["pixel_values"] for row in rows]), []
    for model, layer in ((student, 0), (teacher, 1)):
        with torch.no_grad(), capture(model.eval(), [layer]) as captured:
            model(pixel_values=images)
        sides.append(captured.attention(layer))
    expected = FEATURES["attention"].loss(*sides).mean() / sides[0].query.shape[2]
    assert metrics["eval_attention_loss"] == pytest.approx(expected.item(), rel=1e-5)
    run.train()
    assert run.evaluate()["eval_hidden_cosine_loss"] < metrics["eval_hidden_cosine_loss"]


def test_frames_of_speech_and_choices():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    conv = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**sizes, **conv, **position))
    mask = torch.ones(2, 60).long()
    mask[1, 30:] = 0
    frames = attended_frames(model, {"input_values": torch.zeros(2, 60), "attention_mask": mask}, 13)
    assert frames.sum(-1).tolist() == [13, 6]
    assert attended_tokens({"input_values": torch.zeros(2, 60), "attention_mask": mask}) is None
    assert attended_frames(tiny.vit(), {"attention_mask": mask}, 5) is None
    choices = {"input_ids": torch.ones(2, 3, 4).long(), "attention_mask": torch.tensor([[[1, 1, 0, 0]] * 3] * 2)}
    assert attended_tokens(choices).shape == (6, 4)
    assert int(attended_tokens(choices).sum()) == 12


def test_widths_of_stages():
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [2, 2, 2]}
    model = hf.SwinForImageClassification(hf.SwinConfig(**sizes, window_size=2)).eval()
    with torch.no_grad(), capture(model, [0, 1, 2], attention=False) as captured:
        model(pixel_values=torch.zeros(1, 3, 32, 32))
    assert [captured.hidden(layer).shape[-1] for layer in range(3)] == layer_widths(model) == [16, 32, 32]


def test_seq2seq_compares_encoders(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": tiny.VOCAB,
        "d_kv": 4,
        "d_ff": 32,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    }
    models = [
        hf.T5ForConditionalGeneration(hf.T5Config(d_model=w, num_layers=n, num_decoder_layers=1, **sizes))
        for w, n in ((16, 1), (24, 2))
    ]
    rows = [{**row, "labels": row["labels"][:3]} for row in tiny.rows("token_classification", 16)]
    run = tiny.trainer(
        "classification", tmp_path, pair=tuple(models), data=rows, kd_features=ALL, learning_rate=0.01, **SCALE
    )
    run.eval_dataset = rows
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_relation_loss"] < before["eval_relation_loss"]
    assert after["eval_attention_loss"] < before["eval_attention_loss"]


def test_an_embedding_model_has_features(tmp_path):
    students = [hf.BertModel(tiny.bert_config(16, num_hidden_layers=n, initializer_range=0.5)) for n in (1, 2)]
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in tiny.rows("classification")]
    run = tiny.trainer(
        "classification", tmp_path, pair=tuple(students), data=rows, kd_features=ALL, kd_task="embedding"
    )
    run.eval_dataset = rows
    before = run.evaluate()
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_relation_loss"] < before["eval_relation_loss"]
    assert metrics["eval_hidden_mse_loss"] < before["eval_hidden_mse_loss"]


def test_a_teacher_that_is_the_students_base(tmp_path):
    import peft

    student = peft.get_peft_model(
        pair("causal_lm")[0], peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    run = trainer(tmp_path, "causal_lm", models=(student, "adapter_off"), kd_feature_layers=[[1, 0]])
    before = run.evaluate()["eval_relation_loss"]
    assert before > 0.01
    run.train()
    assert run.evaluate()["eval_relation_loss"] < before


def test_the_blocks_of_a_device_are_known():
    assert losses._block_scores(SimpleNamespace(type="cpu")) < losses._block_scores(SimpleNamespace(type="cuda"))
