"""The Trainer contract: what must stay as upstream has it, and what distillation adds; traps by their number."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM, Trainer

from kd_trainer import DistillationMixin, DistillationTrainer
from tests.helpers import tiny

TASKS = ["classification", "token_classification", "causal_lm"]
ROW_TASKS = ["multi_label_classification", "regression", "question_answering"]


# ---- kd_alpha = 0 is the stock Trainer ----


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_alpha_zero_is_the_stock_trainer(task, tmp_path):
    distilled = tiny.trainer(
        task, tmp_path, kd_alpha=0.0, kd_reduction="tokenmean", max_steps=20, eval_strategy="steps", eval_steps=5
    )
    stock = tiny.stock_trainer(task, tmp_path, max_steps=20, eval_strategy="steps", eval_steps=5)
    distilled.train()
    stock.train()
    for key in ("loss", "eval_loss", "grad_norm"):
        assert tiny.logged(distilled, key) == pytest.approx(tiny.logged(stock, key), rel=1e-5)
    assert len(tiny.logged(distilled, "loss")) == 20
    torch.testing.assert_close(tiny.weights(distilled.model), tiny.weights(stock.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
def test_classification_at_alpha_zero_is_stock_in_both_reductions(reduction, tmp_path):
    distilled = tiny.trainer("classification", tmp_path, kd_alpha=0.0, kd_reduction=reduction)
    stock = tiny.stock_trainer("classification", tmp_path)
    distilled.train()
    stock.train()
    assert tiny.logged(distilled, "loss") == pytest.approx(tiny.logged(stock, "loss"), rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_label_smoothing_is_the_stock_smoothers_loss(task, tmp_path):  # trap 38
    kwargs = {"label_smoothing_factor": 0.1, "max_steps": 3}
    distilled = tiny.trainer(task, tmp_path, kd_alpha=0.0, kd_reduction="tokenmean", **kwargs)
    stock = tiny.stock_trainer(task, tmp_path, **kwargs)
    distilled.train()
    stock.train()
    assert tiny.logged(distilled, "loss") == pytest.approx(tiny.logged(stock, "loss"), rel=1e-5)


# ---- the value, written out ----


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
@pytest.mark.parametrize("task", TASKS)
def test_first_loss_written_out(task, reduction, tmp_path):
    student, teacher = tiny.models(task)
    run = tiny.trainer(
        task, tmp_path, pair=(student, teacher), kd_reduction=reduction, kd_alpha=0.6, kd_temperature=2.0, max_steps=1
    )
    batch = tiny.pad(tiny.rows(task)[:8])
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        z_s = copy.deepcopy(student)(**inputs).logits.double()
        z_t = copy.deepcopy(teacher)(**inputs).logits.double()
    labels, hard, soft, positions = batch["labels"], 0.0, 0.0, 0
    if task == "classification":
        z_s, z_t, labels = z_s[:, None], z_t[:, None], labels[:, None]
    if task == "causal_lm":
        z_s, z_t, labels = z_s[:, :-1], z_t[:, :-1], labels[:, 1:]
    for b in range(labels.shape[0]):
        for s in range(labels.shape[1]):
            if labels[b, s] == -100:
                continue
            positions += 1
            hard -= F.log_softmax(z_s[b, s], -1)[labels[b, s]].item()
            p, q = F.softmax(z_t[b, s] / 2, -1), F.softmax(z_s[b, s] / 2, -1)
            soft += 4 * (p * (p.log() - q.log())).sum().item()
    count = len(batch["labels"]) if reduction == "batchmean" else positions
    run.train()
    assert tiny.logged(run, "soft_loss")[0] == pytest.approx(soft / count, rel=1e-5)
    assert tiny.logged(run, "hard_loss")[0] == pytest.approx(hard / count, rel=1e-5)
    assert tiny.logged(run, "loss")[0] == pytest.approx((0.6 * soft + 0.4 * hard) / count, rel=1e-5)


def test_causal_lm_with_shift_labels_uses_them_as_they_stand(tmp_path):  # trap 9
    run = tiny.trainer("causal_lm", tmp_path)
    run.model.eval()
    batch = tiny.pad(tiny.rows("causal_lm")[:4])
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    plain = run.compute_loss(run.model, batch)
    given = run.compute_loss(run.model, {**batch, "shift_labels": shifted})
    assert given.item() == pytest.approx(plain.item(), rel=1e-6)
    other = run.compute_loss(run.model, {**batch, "shift_labels": batch["labels"]})
    assert other.item() != pytest.approx(plain.item(), rel=1e-3)


def test_t5_never_shifts(tmp_path):  # trap 8
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = {"vocab_size": tiny.VOCAB, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2,
              "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip
    student, teacher = (T5ForConditionalGeneration(T5Config(**config)) for _ in range(2))
    data = [
        {"input_ids": [3, 4, 5, 6], "attention_mask": [1] * 4, "labels": [7, 8, -100, 9][: 2 + i % 3]} for i in range(8)
    ]
    run = DistillationTrainer(
        model=student, teacher_model=teacher, args=tiny.arguments(tmp_path, kd_alpha=0.0, kd_reduction="tokenmean"),
        data_collator=tiny.pad, train_dataset=data,
    )  # fmt: skip
    stock = Trainer(
        model=copy.deepcopy(student), args=tiny.stock_arguments(tmp_path), data_collator=tiny.pad, train_dataset=data
    )
    run.train()
    stock.train()
    assert tiny.logged(run, "loss") == pytest.approx(tiny.logged(stock, "loss"), rel=1e-5)


# ---- batches without labels, all masked, inputs unchanged ----


@pytest.mark.parametrize("task", [*TASKS, "plain"])
def test_label_free_training_and_evaluation(task, tmp_path):  # trap 10
    free = [{k: v for k, v in row.items() if k != "labels"} for row in tiny.rows(task)]
    run = tiny.trainer(task, tmp_path, data=free)
    run.eval_dataset = free[:20]
    run.train()
    assert all(math.isfinite(x) and x > 0 for x in tiny.logged(run, "loss"))
    assert not tiny.logged(run, "hard_loss")
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(0.7 * metrics["eval_soft_loss"], rel=1e-5)
    assert run.predict(free[:5]).predictions.shape[0] == 5


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
def test_unlabelled_rows_have_a_soft_loss_and_no_hard_loss(reduction, tmp_path):
    data = tiny.rows("plain", 8)
    mixed = [{**row, "labels": row["labels"] if i < 2 else -100} for i, row in enumerate(data)]
    run = tiny.trainer("plain", tmp_path, data=mixed, max_steps=1, kd_reduction=reduction)
    full = tiny.trainer("plain", tmp_path, data=data, max_steps=1, kd_reduction=reduction)
    labelled = tiny.trainer("plain", tmp_path, data=data[:2], max_steps=1, kd_reduction=reduction)
    for trainer in (run, full, labelled):
        trainer.train()
    assert tiny.logged(run, "soft_loss") == pytest.approx(tiny.logged(full, "soft_loss"))
    share = 2 / 8 if reduction == "batchmean" else 1.0
    assert tiny.logged(run, "hard_loss")[0] == pytest.approx(share * tiny.logged(labelled, "hard_loss")[0])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_an_all_masked_micro_batch_is_finite(task, alpha, tmp_path):  # trap 6
    data = tiny.rows(task, 8)
    for row in data[:4]:
        row["labels"] = -100 if task == "classification" else [-100] * len(row["labels"])
    run = tiny.trainer(
        task,
        tmp_path,
        data=data,
        kd_alpha=alpha,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    run.train()
    assert all(math.isfinite(x) for x in tiny.logged(run, "loss"))
    assert torch.isfinite(tiny.weights(run.model)).all()


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_without_any_label_is_finite(task, reduction, tmp_path):  # trap 6
    data = tiny.rows(task, 8)
    for row in data:
        row["labels"] = -100 if task == "classification" else [-100] * len(row["labels"])
    run = tiny.trainer(task, tmp_path, data=data, kd_reduction=reduction, max_steps=2)
    run.train()
    assert all(math.isfinite(x) for x in tiny.logged(run, "loss"))
    assert torch.isfinite(tiny.weights(run.model)).all()


def test_inputs_are_not_changed(tmp_path):  # trap 11
    run = tiny.trainer("causal_lm", tmp_path, label_smoothing_factor=0.1)
    batch = tiny.pad(tiny.rows("causal_lm")[:4])
    before = {k: v.clone() for k, v in batch.items()}
    run.compute_loss(run.model, batch)
    assert list(batch) == list(before)
    assert all(torch.equal(batch[k], before[k]) for k in before)


def test_padding_changes_nothing(tmp_path):
    for task in TASKS:
        run = tiny.trainer(task, tmp_path, kd_positions="attended")
        run.model.eval()
        batch = tiny.pad(tiny.rows(task)[:4])
        wider = {
            k: F.pad(v, (0, 6), value=-100 if k == "labels" else 0) if v.dim() == 2 else v for k, v in batch.items()
        }
        assert run.compute_loss(run.model, wider).item() == pytest.approx(
            run.compute_loss(run.model, batch).item(), rel=1e-5
        )


def test_padding_on_the_left_changes_nothing_where_attended(tmp_path):
    run = tiny.trainer("causal_lm", tmp_path, kd_positions="attended", kd_alpha=1.0)
    run.model.eval()
    batch = tiny.pad([{k: v for k, v in tiny.rows("causal_lm")[0].items() if k != "labels"}])
    left = {k: F.pad(v, (5, 0)) for k, v in batch.items()}
    left["position_ids"] = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert run.compute_loss(run.model, left).item() == pytest.approx(
        run.compute_loss(run.model, batch).item(), rel=1e-4
    )


@pytest.mark.parametrize("positions", ["labels", "attended"])
def test_packed_equals_unpacked(positions, tmp_path):  # trap 41
    from transformers import DataCollatorWithFlattening

    kwargs = {"kd_reduction": "tokenmean", "kd_positions": positions, "per_device_train_batch_size": 4}
    apart, packed = (tiny.trainer("causal_lm", tmp_path, **kwargs) for _ in range(2))
    packed.data_collator = DataCollatorWithFlattening()
    apart.train()
    packed.train()
    batch = packed.data_collator(tiny.rows("causal_lm")[:4])
    assert batch["input_ids"].shape[0] == 1
    assert "attention_mask" not in batch
    for key in ("loss", "soft_loss", "hard_loss"):
        assert tiny.logged(packed, key) == pytest.approx(tiny.logged(apart, key), rel=1e-4)
    torch.testing.assert_close(tiny.weights(packed.model), tiny.weights(apart.model), rtol=0, atol=1e-5)


# ---- predictions, evaluation, logs ----


@pytest.mark.parametrize("task", TASKS)
def test_predictions_equal_the_stock_trainers(task, tmp_path):  # trap 12
    distilled, stock = tiny.trainer(task, tmp_path), tiny.stock_trainer(task, tmp_path)
    for trainer in (distilled, stock):
        trainer.model.config.output_hidden_states = True
    a, b = distilled.predict(distilled.eval_dataset), stock.predict(stock.eval_dataset)
    flat_a, flat_b = (list(_flatten(x.predictions)) for x in (a, b))
    assert [x.shape for x in flat_a] == [x.shape for x in flat_b]
    for x, y in zip(flat_a, flat_b, strict=True):
        torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(y))
    assert (a.label_ids == b.label_ids).all()


def _flatten(x):
    if isinstance(x, (tuple, list)):
        for item in x:
            yield from _flatten(item)
    else:
        yield x


@pytest.mark.parametrize("gives", ["tensor", "tuple", "dict"])
def test_plain_modules_train_evaluate_predict_and_save(gives, tmp_path):  # traps 13 and 39
    torch.manual_seed(0)
    pair = tiny.Plain(gives), tiny.Plain(gives)
    run = tiny.trainer("plain", tmp_path, pair=pair, save_strategy="steps", save_steps=2, remove_unused_columns=True)
    run.compute_metrics = lambda p: {"rows": len(p.label_ids)}
    run.train()
    assert run.evaluate()["eval_rows"] == 21
    predictions = run.predict(run.eval_dataset).predictions
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    features = torch.stack([row["features"] for row in run.eval_dataset])
    torch.testing.assert_close(torch.as_tensor(logits), pair[0].linear(features).detach())
    fresh = tiny.trainer("plain", tmp_path, pair=(tiny.Plain(gives), tiny.Plain(gives)))
    fresh._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(tiny.weights(fresh.model), tiny.weights(run.model))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("task", TASKS)
def test_weighted_parts_equal_the_logged_loss(task, accumulation, tmp_path):  # trap 27
    run = tiny.trainer(
        task, tmp_path, max_steps=6, logging_steps=3, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2, kd_alpha=0.35, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    run.train()
    losses = tiny.logged(run, "loss")
    assert len(losses) == 2
    for loss, soft, hard in zip(losses, tiny.logged(run, "soft_loss"), tiny.logged(run, "hard_loss"), strict=True):
        assert 0.35 * soft + 0.65 * hard == pytest.approx(loss, rel=1e-5)
    for i, loss in enumerate(tiny.logged(run, "eval_loss")):  # trap 28: 21 rows, batches of 8
        soft, hard = (tiny.logged(run, f"eval_{name}")[i] for name in ("soft_loss", "hard_loss"))
        assert 0.35 * soft + 0.65 * hard == pytest.approx(loss, rel=1e-5)


def test_teacher_agreement_is_the_share_of_equal_top_classes(tmp_path):
    run = tiny.trainer("plain", tmp_path, max_steps=1)
    batch = tiny.pad(tiny.rows("plain")[:8])
    with torch.no_grad():
        same = run.model(batch["features"]).argmax(-1) == run.teacher.model(batch["features"]).argmax(-1)
    run.train()
    assert tiny.logged(run, "teacher_agreement")[0] == pytest.approx(same.float().mean().item())
    assert 0 <= run.evaluate()["eval_teacher_agreement"] <= 1


def test_a_users_own_log_is_left_alone(tmp_path):  # trap 26
    run = tiny.trainer("plain", tmp_path)
    run._metrics_buffer.add((torch.ones(()),) * 4)
    run.log({"loss": 1.0})
    assert set(run.state.log_history[-1]) <= {"loss", "epoch", "step"}


def test_resume_gives_the_same_run(tmp_path):
    kwargs = {"max_steps": 8, "logging_steps": 2, "save_strategy": "steps", "save_steps": 4, "kd_schedule": "linear",
              "kd_alpha_end": 0.1, "kd_temperature_end": 1.0, "optim": "adamw_torch"}  # fmt: skip
    whole = tiny.trainer("causal_lm", tmp_path / "whole", **kwargs)
    whole.train()
    half = tiny.trainer("causal_lm", tmp_path / "whole", **kwargs)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for key in ("loss", "soft_loss", "hard_loss", "teacher_agreement", "kd_alpha", "kd_temperature"):
        assert tiny.logged(half, key) == pytest.approx(tiny.logged(whole, key), rel=1e-6), key
    assert torch.equal(tiny.weights(half.model), tiny.weights(whole.model))


def test_checkpoints_and_optimizer_hold_the_student_alone(tmp_path):  # trap 16
    from safetensors.torch import load_file

    student, teacher = tiny.models("classification")
    keys = set(student.state_dict())
    run = tiny.trainer("classification", tmp_path, pair=(student, teacher), save_strategy="steps", save_steps=4)
    before = tiny.weights(teacher).clone()
    run.train()
    assert set(load_file(tmp_path / "checkpoint-4" / "model.safetensors")) == keys
    in_optimizer = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not in_optimizer & {id(p) for p in teacher.parameters()}
    assert torch.equal(tiny.weights(teacher), before)


def test_best_model_by_agreement_with_metrics(tmp_path):
    run = tiny.trainer(
        "classification", tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="teacher_agreement",
    )  # fmt: skip
    run.compute_metrics = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
    run.train()
    assert run.state.best_metric == max(tiny.logged(run, "eval_teacher_agreement"))
    assert len(tiny.logged(run, "eval_accuracy")) == 3
    best = run.evaluate()["eval_teacher_agreement"]
    assert best == pytest.approx(run.state.best_metric)


def test_problem_type_is_in_the_saved_config(tmp_path):  # trap 40
    run = tiny.trainer("classification", tmp_path, save_strategy="steps", save_steps=4)
    run.train()
    saved = json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())
    assert saved["problem_type"] == "single_label_classification"


# ---- the teacher ----


def test_a_teacher_with_dropout_says_the_same_twice(tmp_path):  # trap 14
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Dropout(0.5), tiny.Plain())
    teacher.forward = lambda features: teacher[1](teacher[0](features))  # type: ignore[method-assign]
    run = tiny.trainer("plain", tmp_path, pair=(tiny.Plain(), teacher))
    batch = tiny.pad(tiny.rows("plain")[:8])
    first = run.compute_loss(run.model, batch).item()
    assert run.compute_loss(run.model, batch).item() == first
    teacher.train()
    assert run.compute_loss(run.model, batch).item() == first
    teacher.eval()
    teacher[0].train()
    assert run.compute_loss(run.model, batch).item() == first


def test_bf16_teacher_computes_in_bf16_and_softmax_in_float32(tmp_path):  # traps 17 and 18
    student, teacher = tiny.models("classification")
    run = tiny.trainer("classification", tmp_path, pair=(student, teacher), bf16=True)
    seen = []
    teacher.classifier.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    student.classifier.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    metrics = run.evaluate()  # evaluate first: the student's autocast must be there
    assert set(seen) == {torch.bfloat16}
    run.train()
    assert set(seen) == {torch.bfloat16}
    assert math.isfinite(metrics["eval_loss"])
    run._metrics_buffer.steps = 1
    run.compute_loss(run.model.train(), tiny.pad(tiny.rows("classification")[:4]))
    assert run._metrics_buffer.sums().dtype == torch.float32


def test_constant_alpha_zero_does_not_call_the_teacher_in_training(tmp_path):
    student, teacher = tiny.models("classification")
    run = tiny.trainer("classification", tmp_path, pair=(student, teacher), kd_alpha=0.0)
    run.train()  # the first batch is looked at once
    calls = []
    teacher.register_forward_hook(lambda *a: calls.append(1))
    run.train()
    assert not calls
    assert "eval_teacher_agreement" in run.evaluate()


def test_use_cache_is_off_for_every_call_of_the_teacher(tmp_path):  # trap 19
    student, teacher = tiny.models("causal_lm")
    teacher.config.use_cache = True
    seen = []
    teacher.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["use_cache"]), with_kwargs=True)
    tiny.trainer("causal_lm", tmp_path, pair=(student, teacher)).train()
    assert seen
    assert not any(seen)


def test_columns_reach_only_the_model_that_accepts_them(tmp_path):  # trap 20
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    names = tiny.bert_config()
    student = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=tiny.VOCAB, dim=16, n_layers=1, n_heads=2, hidden_dim=32,
                         max_position_embeddings=32, id2label=names.id2label, label2id=names.label2id, pad_token_id=0)
    )  # fmt: skip
    _, teacher = tiny.models("classification")
    seen = {}
    student.register_forward_pre_hook(lambda m, a, k: seen.update(student=set(k)), with_kwargs=True)
    teacher.register_forward_pre_hook(lambda m, a, k: seen.update(teacher=set(k)), with_kwargs=True)
    data = [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in tiny.rows("classification")]
    import datasets

    run = tiny.trainer(
        "classification",
        tmp_path,
        pair=(student, teacher),
        data=datasets.Dataset.from_list(data),
        remove_unused_columns=True,
    )
    run.train()
    assert seen["student"] == {"input_ids", "attention_mask"}
    assert seen["teacher"] == {"input_ids", "attention_mask", "token_type_ids"}


def test_schedules_move_alpha_and_temperature(tmp_path):
    run = tiny.trainer(
        "plain", tmp_path, max_steps=5, kd_schedule="linear", kd_alpha=1.0, kd_alpha_end=0.0, kd_temperature=4.0,
        kd_temperature_end=2.0,
    )  # fmt: skip
    run.train()
    assert tiny.logged(run, "kd_alpha")[-1] == 0.0
    assert tiny.logged(run, "kd_temperature")[-1] == 2.0
    assert tiny.logged(run, "loss")[0] == pytest.approx(tiny.logged(run, "soft_loss")[0])
    assert tiny.logged(run, "loss")[-1] == pytest.approx(tiny.logged(run, "hard_loss")[-1])
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_hard_loss"])


def test_a_patched_forward_gets_no_labels(tmp_path):  # trap 34
    """As Liger's patches do: with labels, or on demand, such a forward computes its loss without logits."""

    class Patched(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, skip_logits=None, **kwargs):
            assert labels is None
            assert skip_logits is None
            return super().forward(input_ids, attention_mask, **kwargs)

    pair = tuple(Patched(tiny.llama_config(width)) for width in (16, 24))
    run = tiny.trainer("causal_lm", tmp_path, pair=pair, kd_loss_implementation="full")
    run.train()
    run.evaluate()
    assert tiny.logged(run, "soft_loss")


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_weight_zero_does_not_spread_infinities(alpha, tmp_path):
    run = tiny.trainer("plain", tmp_path, kd_alpha=alpha, max_steps=1, kd_check_finite="off")
    batch = tiny.pad(tiny.rows("plain")[:8])
    run.compute_loss(run.model, batch)
    # A teacher certain of a class that the student excludes: soft loss inf, hard loss finite (or the other way round).
    with torch.no_grad():
        run.model.linear.weight.zero_(), run.model.linear.bias.zero_()
        run.model.linear.bias[1] = -torch.inf
        run.teacher.model.linear.weight.zero_(), run.teacher.model.linear.bias.zero_()
        if alpha == 1.0:
            run.teacher.model.linear.bias[1] = -torch.inf
    batch["labels"][:] = 0 if alpha == 0.0 else 1
    assert torch.isfinite(run.compute_loss(run.model, batch))


# ---- the class itself ----


def test_wrong_order_of_bases_raises():  # trap 25
    with pytest.raises(TypeError, match=r"Write class Wrong\(DistillationMixin, Trainer\)"):
        type("Wrong", (Trainer, DistillationMixin), {})
    own = type("Own", (Trainer,), {})
    with pytest.raises(TypeError, match=r"Write class Wrong\(DistillationMixin, Own\)"):
        type("Wrong", (own, DistillationTrainer), {})
    assert issubclass(type("Right", (DistillationMixin, own), {}), own)


def test_start_block_and_model_card(tmp_path, capsys):
    run = tiny.trainer("token_classification", tmp_path, eval_strategy="steps", eval_steps=4)
    run.train()
    shown = capsys.readouterr().out
    assert "loss = 0.7 * soft(forward_kl, T=3) + 0.3 * hard, per row" in shown
    assert '"kd_reduction": "tokenmean"' in shown
    assert "teacher  BertForTokenClassification" in shown
    assert "float32 on cpu" in shown
    run.create_model_card()
    run.create_model_card()  # a second card replaces the section
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Distillation") == 1
    for part in ("BertForTokenClassification", "0.7 * soft(forward_kl, T=3)", "soft_loss"):
        assert part in card
    assert json.loads((tmp_path / "distillation.json").read_text())["temperature"] == 3.0


def test_plain_training_arguments_take_the_defaults(tmp_path):
    student, teacher = tiny.models("plain")
    run = DistillationTrainer(
        model=student, teacher_model=teacher, args=tiny.stock_arguments(tmp_path), data_collator=tiny.pad,
        train_dataset=tiny.rows("plain"),
    )  # fmt: skip
    run.train()
    assert run.kd_args.kd_alpha == 0.7
    assert tiny.logged(run, "soft_loss")


@pytest.mark.parametrize("mode", ["step", "log"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_stops_with_step_rows_and_side(mode, side, tmp_path):
    data = tiny.rows("plain", 32)
    run = tiny.trainer("plain", tmp_path, data=data, kd_check_finite=mode, logging_steps=4)
    model = run.model if side == "student" else run.teacher.model
    calls = []

    def poison(module, args, output):
        calls.append(1)
        # the teacher runs once more than the student: in the setup
        if len(calls) == (3 if side == "student" else 4):
            output = output.clone()
            output[5, 0] = torch.nan
        return output

    model.register_forward_hook(poison)
    with pytest.raises(RuntimeError, match=rf"step 2, process 0: 1 rows of the {side}'s logits .* \(rows \[5\]"):
        run.train()


def test_upstream_names_exist(tmp_path):
    import importlib

    from kd_trainer.training.bases import UPSTREAM_ATTRIBUTES, UPSTREAM_NAMES

    gone = []
    for owner, names in UPSTREAM_NAMES.items():
        module, _, cls = owner.rpartition(".")
        target = getattr(importlib.import_module(module), cls)
        gone += [f"{owner}.{name}" for name in names if not hasattr(target, name)]
    run = tiny.stock_trainer("classification", tmp_path)
    gone += [f"Trainer().{name}" for name in UPSTREAM_ATTRIBUTES if not hasattr(run, name)]
    assert not gone, f"this transformers no longer has: {gone}"


# ---- other ways into the trainer ----


def test_model_init_gives_every_training_a_new_student(tmp_path):
    _, teacher = tiny.models("classification")
    data = tiny.rows("classification")
    run = DistillationTrainer(
        model_init=lambda: tiny.models("classification")[0], teacher_model=teacher, args=tiny.arguments(tmp_path),
        data_collator=tiny.pad, train_dataset=data, eval_dataset=data,
    )  # fmt: skip
    logs = []
    for _ in range(2):
        run.train()
        logs.append(tiny.logged(run, "loss"))
    assert logs[0] == logs[1]
    assert run.evaluate()["eval_loss"] < logs[0][0]


def test_a_hyperparameter_search_moves_the_settings(tmp_path):
    from transformers.trainer_utils import HPSearchBackend

    run = tiny.trainer("plain", tmp_path)
    run.hp_search_backend = HPSearchBackend.WANDB
    run._hp_search_setup({"kd_alpha": 0.125, "kd_divergence": "reverse_kl", "kd_temperature": 1.0})
    assert run.summary()["formula"] == "loss = 0.125 * soft(reverse_kl, T=1) + 0.875 * hard, per row"


def test_changed_arguments_hold_for_the_next_training(tmp_path, capsys):
    run = tiny.trainer("plain", tmp_path)
    run.train()
    run.args.kd_divergence = "reverse_kl"
    run.train()
    assert "0.7 * soft(reverse_kl, T=3)" in capsys.readouterr().out
    bare = DistillationTrainer(
        model=tiny.Plain(), args=tiny.arguments(tmp_path, kd_alpha=0.0), data_collator=tiny.pad,
        train_dataset=tiny.rows("plain"),
    )  # fmt: skip
    bare.train()
    bare.args.kd_alpha = 0.5
    with pytest.raises(ValueError, match=r"`teacher_model` is None; expected a teacher, with kd_alpha 0.5"):
        bare.train()


def test_the_logged_alpha_is_that_of_the_logged_loss(tmp_path):
    run = tiny.trainer("plain", tmp_path, max_steps=5, kd_schedule="linear", kd_alpha=1.0, kd_alpha_end=0.0)
    run.train()
    assert tiny.logged(run, "kd_alpha") == [1.0, 0.75, 0.5, 0.25, 0.0]
    columns = (tiny.logged(run, key) for key in ("kd_alpha", "loss", "soft_loss", "hard_loss"))
    for alpha, loss, soft, hard in zip(*columns, strict=True):
        assert alpha * soft + (1 - alpha) * hard == pytest.approx(loss, rel=1e-5)


def test_nan_after_the_last_log_is_not_forgotten(tmp_path):
    run = tiny.trainer("plain", tmp_path, kd_check_finite="log", logging_steps=100)
    run.model.register_forward_hook(lambda m, a, out: out * (math.nan if run.state.global_step == 2 else 1))
    with pytest.raises(RuntimeError, match=r"step 2, process 0: 8 rows of the student's"):
        run.train()


def test_kd_check_finite_off_never_looks(tmp_path):
    run = tiny.trainer("plain", tmp_path, kd_check_finite="off")
    run.model.register_forward_hook(lambda m, a, out: out * math.nan)
    run.train()
    assert run.state.global_step == 4


def test_predict_without_labels_first_changes_nothing(tmp_path):
    free = [{k: v for k, v in row.items() if k != "labels"} for row in tiny.rows("classification", 5)]
    run, fresh = tiny.trainer("classification", tmp_path), tiny.trainer("classification", tmp_path)
    assert run.predict(free).label_ids is None
    run.train()
    fresh.train()
    assert tiny.logged(run, "loss") == tiny.logged(fresh, "loss")
    assert run.model.config.problem_type == "single_label_classification"


def test_evaluation_sets_by_name(tmp_path):
    run = tiny.trainer("classification", tmp_path, eval_strategy="steps", eval_steps=4)
    run.eval_dataset = {"a": tiny.rows("classification", 9, 3), "b": tiny.rows("classification", 9, 4)}
    run.train()
    for name in "ab":
        keys = [f"eval_{name}_{part}" for part in ("loss", "soft_loss", "hard_loss")]
        (loss,), (soft,), (hard,) = (tiny.logged(run, key) for key in keys)
        assert 0.7 * soft + 0.3 * hard == pytest.approx(loss, rel=1e-5)
    run.create_model_card()
    assert "| eval_b_soft_loss |" in (tmp_path / "README.md").read_text()


def test_metrics_batch_by_batch(tmp_path):
    run, seen = tiny.trainer("classification", tmp_path, batch_eval_metrics=True), []

    def metrics(prediction, compute_result):
        seen.append(len(prediction.label_ids))
        return {"rows": sum(seen)} if compute_result else {}

    run.compute_metrics = metrics
    result, whole = run.evaluate(), tiny.trainer("classification", tmp_path).evaluate()
    assert result["eval_rows"] == 21
    assert result["eval_soft_loss"] == pytest.approx(whole["eval_soft_loss"])


@pytest.mark.parametrize("kind", ["datasets", "torch"])
@pytest.mark.parametrize("task", [*TASKS, *ROW_TASKS])
def test_iterable_datasets(kind, task, tmp_path):
    import datasets

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from tiny.rows(task)

    data = Rows() if kind == "torch" else datasets.Dataset.from_list(tiny.rows(task)).to_iterable_dataset()
    run = tiny.trainer(task, tmp_path, data=data, remove_unused_columns=True)
    whole = tiny.trainer(task, tmp_path)
    run.train()
    whole.train()
    assert tiny.logged(run, "loss") == pytest.approx(tiny.logged(whole, "loss"))
    assert run.evaluate(data)["eval_loss"] == pytest.approx(whole.evaluate(tiny.rows(task))["eval_loss"])


def test_resuming_inside_a_logging_window(tmp_path):
    kwargs = {"max_steps": 8, "logging_steps": 3, "save_strategy": "steps", "save_steps": 4}
    tiny.trainer("plain", tmp_path, **kwargs).train()
    run = tiny.trainer("plain", tmp_path, **kwargs)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    parts = zip(*(tiny.logged(run, key) for key in ("loss", "soft_loss", "hard_loss")), strict=True)
    for loss, soft, hard in parts:
        assert 0.7 * soft + 0.3 * hard == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "kwargs", [{"activation_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "eager"}]
)
@pytest.mark.parametrize("task", ["causal_lm", *ROW_TASKS])
def test_what_wraps_the_student_changes_nothing(kwargs, task, tmp_path):
    run, plain = tiny.trainer(task, tmp_path, **kwargs), tiny.trainer(task, tmp_path)
    run.train()
    plain.train()
    torch.testing.assert_close(tiny.weights(run.model), tiny.weights(plain.model), rtol=0, atol=1e-6)
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("task", ["classification", "plain"])
def test_wrong_labels_are_found_before_the_student_is_asked(task, tmp_path):  # on a GPU they would end the process
    run = tiny.trainer(task, tmp_path)
    run.model.register_forward_pre_hook(lambda *args: pytest.fail("the student was run"))
    batch = tiny.pad(tiny.rows(task)[:8])
    with pytest.raises(ValueError, match=r"`labels` is 7 at position 2 of the batch; expected 0 to 4"):
        run.compute_loss(run.model, {**batch, "labels": batch["labels"].index_fill(0, torch.tensor([2]), 7)})


def test_the_summary_tells_both_ends_of_a_schedule(tmp_path):
    run = tiny.trainer("plain", tmp_path, kd_schedule="cosine", kd_alpha=0.9, kd_alpha_end=0.2)
    run.train()
    assert run.summary()["formula"] == (
        "loss = 0.9 * soft(forward_kl, T=3) + 0.1 * hard, per row; "
        "cosine schedule to loss = 0.2 * soft(forward_kl, T=3) + 0.8 * hard, per row"
    )


def test_a_long_window_is_summed_up_whole(tmp_path):
    kwargs = {"max_steps": 150, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    often, once = (tiny.trainer("plain", tmp_path, logging_steps=steps, **kwargs) for steps in (1, 150))
    often.train()
    once.train()
    for key in ("loss", "hard_loss", "soft_loss", "teacher_agreement"):
        assert tiny.logged(once, key)[0] == pytest.approx(sum(tiny.logged(often, key)) / 150, rel=1e-5)
