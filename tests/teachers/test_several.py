"""Several teachers: mixtures in probability space, routed rows, caches, errors. References are computed by hand."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification, LlamaForCausalLM

import kd_trainer
from kd_trainer import (
    DIVERGENCES,
    CachedTeacher,
    DistillationArguments,
    DistillationTrainer,
    forward_kl,
    fused_linear_distillation,
)
from kd_trainer.losses import MixedLogits, MixedPart, OutputProjection, fused_linear
from kd_trainer.tasks import TASKS
from kd_trainer.tasks import output_head as output_head
from kd_trainer.teachers.routes import Routes
from kd_trainer.teachers.several import Mixture
from tests.helpers import tiny

LM = {"kd_reduction": "tokenmean", "kd_temperature": 2.0}
KINDS = ["classification", "multi_label_classification", "regression", "question_answering", "token_classification"]


def several(task: str, count: int = 2, **config) -> list[nn.Module]:
    """Teachers with different weights."""
    return [tiny.models(task, seed)[1] for seed in range(10, 10 + count)]


def run(task: str, teachers, **kwargs):
    kwargs = {**(LM if task == "causal_lm" else {}), "max_steps": 3, **kwargs}
    return tiny.trainer(task, tempfile.mkdtemp(), pair=(tiny.models(task)[0], teachers), **kwargs)


def trained(*args, **kwargs):
    made = run(*args, **kwargs)
    made.train()
    return made


def assert_same(one, other, **tolerance) -> None:
    for key in tiny.LOGGED:
        assert tiny.logged(one, key) == pytest.approx(tiny.logged(other, key), **{"rel": 1e-5, **tolerance})
    torch.testing.assert_close(tiny.weights(one.model), tiny.weights(other.model), rtol=0, atol=1e-6)


def with_ids(data, ids):
    return [{**row, "teacher_id": each} for row, each in zip(data, itertools.cycle(ids))]


# ---- formulas ----


def mixed(task: str, logits, weights, temperature=1.0, batch=None, classes=None):
    mixture = Mixture(TASKS[task], temperature, batch or {}, classes)
    for each, weight in zip(logits, weights, strict=True):
        mixture.add(each, weight)
    return mixture.logits()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_mixture_is_of_probabilities_at_the_temperature(temperature):
    logits, weights = torch.randn(3, 4, 6, 11, dtype=torch.float64) * 4, [0.5, 0.3, 0.2]
    p = sum(w * (z / temperature).softmax(-1) for w, z in zip(weights, logits, strict=True))
    got = (mixed("causal_lm", logits, weights, temperature) / temperature).softmax(-1)
    torch.testing.assert_close(got, p, rtol=1e-12, atol=1e-14)
    mean = sum(w * z for w, z in zip(weights, logits, strict=True))
    assert ((mean / temperature).softmax(-1) - p).abs().max() > 0.05


def test_a_class_that_one_teacher_excludes_has_the_others_probability():
    logits = torch.tensor([[[0.0, -torch.inf, 1.0]], [[0.0, 0.0, -torch.inf]]])
    got = mixed("classification", logits, [0.5, 0.5]).softmax(-1)
    expected = (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2
    torch.testing.assert_close(got, expected)


def test_labels_of_their_own_are_mixed_one_by_one():
    logits = torch.randn(2, 5, 3, dtype=torch.float64)
    p = sum(w * (z / 2).sigmoid() for w, z in zip([0.9, 0.1], logits, strict=True))
    got = mixed("multi_label_classification", logits, [0.9, 0.1], 2.0)
    torch.testing.assert_close((got / 2).sigmoid(), p)


def test_numbers_are_averaged():
    logits = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(mixed("regression", logits, [0.9, 0.1]), 0.9 * logits[0] + 0.1 * logits[1])


def test_answers_are_mixed_over_the_attended_positions():
    logits, mask = torch.randn(2, 2, 2, 5, dtype=torch.float64), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    hidden = logits.masked_fill(mask[:, None] == 0, -torch.inf)
    p = sum(w * z.softmax(-1) for w, z in zip([0.6, 0.4], hidden, strict=True))
    got = mixed("question_answering", logits, [0.6, 0.4], batch={"attention_mask": mask})
    torch.testing.assert_close(got.softmax(-1), p)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_large_batches_are_mixed_piece_by_piece(rows, monkeypatch):
    monkeypatch.setattr("kd_trainer.teachers.several._AT_ONCE", 11 * 3)
    logits = torch.randn(2, rows, 7, 11, dtype=torch.float64)
    expected = (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2
    torch.testing.assert_close(mixed("causal_lm", logits, [0.5, 0.5]).softmax(-1), expected)
    mixture = Mixture(TASKS["causal_lm"], 1.0, {"teacher_id": torch.zeros(rows)}, None)
    mixture.add(logits[0], 1.0)
    mixture = Mixture(TASKS["causal_lm"], 1.0, {"teacher_id": torch.zeros(rows)}, None)
    for row in reversed(range(rows)):
        mixture.add(logits[row % 2][[row]], [1.0], [row])
    chosen = torch.stack([logits[row % 2][row] for row in range(rows)])
    torch.testing.assert_close(mixture.logits().softmax(-1), chosen.softmax(-1))


def test_the_gradient_of_the_sum_of_kls_is_that_of_the_mixture():
    teachers, weights = torch.randn(3, 5, 7, dtype=torch.float64), [0.2, 0.3, 0.5]
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    alone = sum(w * forward_kl(student, z, temperature=2.0).sum() for w, z in zip(weights, teachers, strict=True))
    whole = forward_kl(student, mixed("classification", teachers, weights, 2.0), temperature=2.0).sum()
    one, other = (torch.autograd.grad(loss, student)[0] for loss in (alone, whole))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    probs = [(z / 2).softmax(-1) for z in teachers]
    mixture = sum(w * p for w, p in zip(weights, probs, strict=True))
    js = sum(w * (p * (p / mixture).log()).sum() for w, p in zip(weights, probs, strict=True))
    assert (alone - whole).item() == pytest.approx(float(js), rel=1e-9)


def test_half_precision_is_mixed_in_float32():
    logits = torch.randn(2, 5, 300).bfloat16()
    assert mixed("classification", logits, [0.5, 0.5]).dtype == torch.float32


# ---- training ----


@pytest.mark.parametrize("task", [*KINDS, "causal_lm", "plain"])
def test_copies_of_one_teacher_are_that_teacher(task):
    teacher = tiny.models(task)[1]
    copies = [teacher, copy.deepcopy(teacher), teacher]
    one, other = trained(task, teacher), trained(task, copies, teacher_weights=[1, 2, 3])
    assert_same(one, other)
    a, b = one.evaluate(), other.evaluate()
    assert {k for k in a if "loss" in k} == {k for k in b if "loss" in k}
    for key in ("eval_loss", "eval_soft_loss"):
        assert a[key] == pytest.approx(b[key], rel=1e-6)


def test_copies_are_the_teacher_to_1e_7_in_float64():
    student, teacher = (model.double() for model in tiny.models("causal_lm"))
    losses = []
    for teachers in (teacher, [teacher, copy.deepcopy(teacher), copy.deepcopy(teacher)]):
        made = tiny.trainer("causal_lm", tempfile.mkdtemp(), pair=(copy.deepcopy(student), teachers), **LM)
        losses.append(made.compute_loss(made.model, tiny.pad(tiny.rows("causal_lm", 8))).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)


@pytest.mark.parametrize("divergence", [name for name, entry in DIVERGENCES.items() if not entry.of_logits])
def test_every_divergence_of_probabilities_is_to_the_mixture(divergence):
    teachers, batch = several("classification"), tiny.pad(tiny.rows("classification", 8))
    made = run("classification", teachers, teacher_weights=[3, 1], kd_divergence=divergence, kd_alpha=1.0)
    got = made.compute_loss(made.model, batch)
    columns = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        z_s, *z_t = (model.eval()(**columns).logits for model in (made.model, *teachers))
    p = 0.75 * (z_t[0] / 3).softmax(-1) + 0.25 * (z_t[1] / 3).softmax(-1)
    extra = {"labels": batch["labels"]} if DIVERGENCES[divergence].needs_labels else {}
    nats = getattr(kd_trainer, divergence)(z_s, 3 * p.log(), temperature=3.0, **extra)
    assert got.item() == pytest.approx(9 * float(nats.mean()), rel=1e-4)


def test_evaluation_reports_the_divergence_to_the_mixture():
    teachers, data = several("classification"), tiny.rows("classification", 21, seed=2)
    made = run("classification", teachers, kd_temperature=1.0)
    got = made.evaluate()
    batch = tiny.pad(data)
    labels = batch.pop("labels")
    assert len(labels) == 21
    with torch.no_grad():
        q = made.model.eval()(**batch).logits.log_softmax(-1)
        p = sum(teacher(**batch).logits.softmax(-1) for teacher in teachers) / 2
    assert got["eval_soft_loss"] == pytest.approx(float((p * (p.log() - q)).sum(-1).mean()), rel=1e-5)
    assert got["eval_teacher_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


NAMES = ["a b", "a b", "c"]


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("way", ["full", "fused", "held"])
def test_the_agreement_with_each_teacher(way, routed, request, tmp_path):
    """By hand over the counted tokens of a teacher's rows, in batches of 8 and of 3; full, tile by tile, and where the
    fused loss holds the mixture, as with a cache among the teachers."""
    student, data = tiny.models("causal_lm")[0], tiny.rows("causal_lm", 21, seed=2)
    teachers = [copy.deepcopy(student) for _ in range(3)]
    for seed, teacher in enumerate(teachers):
        torch.manual_seed(seed)
        teacher.lm_head.weight.data += 0.4 * torch.randn_like(teacher.lm_head.weight)
    settings, given = {"kd_loss_implementation": "full" if way == "full" else "fused"}, teachers
    if way != "full":
        request.getfixturevalue("all_fused")
    if way == "held":
        cache = {"teacher_cache_dir": str(tmp_path), "teacher_cache_format": "hidden"}
        given = [teachers[0], run("causal_lm", teachers[1], **cache).build_teacher_cache(data), teachers[2]]
    ids = [["a b", 2, 0][i % 3] if routed else None for i in range(21)]
    batch = tiny.pad(data)
    mask = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100
    with torch.no_grad():
        top, *tops = (
            model.eval()(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1)
            for model in (student, *teachers)
        )
    expected = {}
    for k, key in enumerate(["a_b_0", "a_b_1", "c_2"]):
        rows = torch.tensor([not routed or each == k or (each == "a b" and k < 2) for each in ids])
        counted = mask & rows.unsqueeze(1)
        expected[key] = float((tops[k] == top)[counted].double().mean())
    data = [row | ({} if each is None else {"teacher_id": each}) for row, each in zip(data, ids, strict=True)]
    for size in (8, 3):
        made = run("causal_lm", given, teacher_names=NAMES, per_device_eval_batch_size=size, **settings)
        found = made.evaluate(data)
        assert (made._plan.heads is None) == (way == "full")
        for key, value in expected.items():
            assert found[f"eval_teacher_agreement_{key}"] == pytest.approx(value, abs=1e-6)
    assert len(set(expected.values())) > 1
    assert 0 < min(expected.values()) < max(expected.values()) < 1


@pytest.mark.parametrize("task", ["classification", "multi_label_classification", "question_answering", "regression"])
def test_the_agreement_of_a_copy_is_that_of_the_mixture(task):
    teacher = tiny.models(task)[1]
    found = run(task, [teacher, copy.deepcopy(teacher)]).evaluate()
    each = [found.get(f"eval_teacher_agreement_{k}") for k in range(2)]
    assert each == [found.get("eval_teacher_agreement")] * 2
    assert (each[0] is None) == (task == "regression")
    single = run(task, teacher).evaluate()
    assert not [key for key in single if key.startswith("eval_teacher_agreement_")]


@pytest.mark.parametrize("implementation", ["full", "fused"])
def test_the_overlap_is_with_the_mixture_at_the_temperature_of_the_loss(implementation):
    teachers, data = several("causal_lm"), tiny.rows("causal_lm", 5, seed=2)
    made = run("causal_lm", teachers, kd_temperature=2.0, kd_loss_implementation=implementation)
    got, batch = made.evaluate(data)["eval_overlap"], tiny.pad(data)
    counted = batch.pop("labels")[:, 1:] != -100
    with torch.no_grad():
        z_s, *z_t = (model.eval()(**batch).logits[:, :-1][counted].double() for model in (made.model, *teachers))
    p = sum((z / 2).softmax(-1) for z in z_t) / 2
    expected = p.gather(-1, z_s.topk(20).indices).sum(-1).mean()
    assert got == pytest.approx(expected.item(), rel=1e-6)


class Counting(nn.Module):
    """Counts the rows of each call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.rows = model, []

    def forward(self, features: torch.Tensor):
        self.rows.append(len(features))
        return self.model(features)


def test_a_teacher_of_weight_0_is_never_run():
    first, second = (Counting(teacher) for teacher in several("plain"))
    one, other = trained("plain", [first, second], teacher_weights=[1, 0]), trained("plain", first.model)
    one.evaluate()
    assert first.rows
    assert second.rows == []
    assert_same(one, other)


def test_the_teachers_run_one_after_another():
    """Of the logits of earlier teachers nothing is held while the next one runs."""
    import gc
    import weakref

    alive: list = []

    class Watching(tiny.Plain):
        def forward(self, features):
            gc.collect()
            alive.append(sum(ref() is not None for ref in refs))
            logits = super().forward(features)
            refs.append(weakref.ref(logits))
            return logits

    refs: list = []
    trained("plain", [Watching() for _ in range(4)], max_steps=1)
    assert max(alive[-3:]) == 0


# ---- routes ----


def test_routed_rows_have_their_teachers_output():
    teachers, batch = several("classification", 3), tiny.pad(tiny.rows("classification", 6))
    made = run("classification", teachers, teacher_weights=[1, 2, 1], teacher_names=["a", "a", "b"], kd_alpha=1.0)
    got = made.compute_loss(made.model, {**batch, "teacher_id": ["a", 2, 0, "b", "a", 1]})
    expected = 0.0
    for rows, alone, weights in (([0, 4], teachers[:2], [1, 2]), ([1, 3], [teachers[2]] * 2, [1, 1]),
                                 ([2], [teachers[0]] * 2, [1, 1]), ([5], [teachers[1]] * 2, [1, 1])):  # fmt: skip
        single = run("classification", alone, teacher_weights=weights, kd_alpha=1.0)
        loss = single.compute_loss(single.model, {k: v[rows] for k, v in batch.items()})
        expected += loss.item() * len(rows) / 6
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("task", ["causal_lm", "token_classification", "question_answering"])
def test_a_routed_batch_is_its_separate_batches(task):
    teachers, batch = several(task), tiny.pad(tiny.rows(task, 8))
    made = run(task, teachers, kd_reduction="batchmean", kd_alpha=1.0)
    ids = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0])
    got = made.compute_loss(made.model, {**batch, "teacher_id": ids})
    expected = 0.0
    for i, teacher in enumerate(teachers):
        alone = run(task, teacher, kd_reduction="batchmean", kd_alpha=1.0)
        expected += alone.compute_loss(alone.model, {k: v[ids == i] for k, v in batch.items()}).item() * int(
            (ids == i).sum()
        )
    assert got.item() == pytest.approx(expected / 8, rel=1e-5)


def test_a_teacher_runs_on_its_rows_alone():
    teachers = [Counting(teacher) for teacher in several("plain")]
    data = with_ids(tiny.rows("plain"), [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    run_ = tiny.trainer("plain", tempfile.mkdtemp(), pair=(tiny.Plain(), teachers), data=data, max_steps=4)
    run_.train()
    assert teachers[0].rows == [8, 7, 8, 7, 8]  # the check of the first batch first
    assert teachers[1].rows == [8, 1, 1]


def test_names_in_the_dataset_reach_the_loss():
    datasets = pytest.importorskip("datasets")
    teachers = several("plain")
    data = datasets.Dataset.from_list(
        [{**row, "features": row["features"].tolist()} for row in with_ids(tiny.rows("plain"), ["two", "one"])]
    ).with_format(None)
    numbers = data.map(lambda row: {"teacher_number": int(row["teacher_id"] == "two")})
    numbers = numbers.remove_columns("teacher_id").rename_column("teacher_number", "teacher_id")
    collate = lambda rows: tiny.pad([{**row, "features": torch.tensor(row["features"])} for row in rows])  # noqa: E731
    made = []
    for dataset, names in ((data, ["one", "two"]), (numbers, None)):
        torch.manual_seed(3)
        args = tiny.arguments(tempfile.mkdtemp(), teacher_names=names, remove_unused_columns=True)
        trainer = DistillationTrainer(
            model=tiny.Plain(), teacher_model=teachers, args=args, data_collator=collate, train_dataset=dataset
        )
        trainer.train()
        made.append(trainer)
    assert_same(*made, rel=0)


def test_routes_are_independent_of_the_split():
    teachers, data = several("causal_lm"), with_ids(tiny.rows("causal_lm"), [0, 1, 1, 0, 1])
    student = tiny.models("causal_lm")[0]
    whole, split = (
        tiny.trainer("causal_lm", tempfile.mkdtemp(), pair=(copy.deepcopy(student), teachers), data=data,
                     per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **LM)
        for size in (8, 2)
    )  # fmt: skip
    for each in (whole, split):
        each.train()
    torch.testing.assert_close(tiny.weights(whole.model), tiny.weights(split.model), rtol=0, atol=1e-5)
    assert tiny.logged(whole, "soft_loss") == pytest.approx(tiny.logged(split, "soft_loss"), rel=1e-5)


@pytest.mark.parametrize("given", [2, -1, "three", True, None, 1.0])
def test_an_id_that_no_teacher_has_is_an_error_with_the_row(given):
    with pytest.raises(
        ValueError, match=r"`teacher_id` is .* in row 3 of the batch; expected one of 0 to 1, 'one', 'two'"
    ):
        Routes([0.5, 0.5], ["one", "two"]).code(given, 3)


def test_a_mistyped_name_is_corrected():
    with pytest.raises(ValueError, match=r"Did you mean `german`\?"):
        Routes([0.5, 0.5], ["english", "german"]).of_row("germn", 0)


def test_a_row_of_a_teacher_without_weight_is_an_error():
    with pytest.raises(
        ValueError, match="`teacher_id` is 1 in row 0 of the batch; expected a teacher with a weight above 0"
    ):
        Routes([1.0, 0.0], []).of_row(1, 0)


def test_the_dataloader_reports_a_wrong_id():
    data = with_ids(tiny.rows("plain"), [0, 1, 5])
    made = tiny.trainer("plain", tempfile.mkdtemp(), pair=(tiny.Plain(), several("plain")), data=data)
    with pytest.raises(ValueError, match="`teacher_id` is 5 in row 2 of the batch"):
        made.train()


# ---- each teacher by itself ----


def test_each_teacher_has_its_order_of_classes():
    teachers = several("classification")
    order = torch.tensor([2, 0, 1, 4, 3])
    moved = copy.deepcopy(teachers[1])
    with torch.no_grad():
        for parameter in moved.classifier.parameters():
            parameter.copy_(parameter[order].clone())
    names = teachers[1].config.id2label
    moved.config.id2label = {i: names[int(j)] for i, j in enumerate(order)}
    moved.config.label2id = {name: i for i, name in moved.config.id2label.items()}
    one = trained("classification", teachers)
    other = trained("classification", [teachers[0], moved], kd_remap_labels=True)
    assert_same(one, other)
    with pytest.raises(ValueError, match=r"`teacher_model\[1\]` is a model in which class 'class 0' has id 1"):
        run("classification", [teachers[0], moved])


def test_padded_vocabularies_are_mixed_over_the_common_ids():
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    student, small, large = (LlamaForCausalLM(tiny.llama_config(vocab_size=size, **ids)) for size in (48, 40, 56))
    data = [{k: [min(i, 30) for i in v] if k != "attention_mask" else v for k, v in row.items()} for row in
            tiny.rows("causal_lm")]  # fmt: skip
    with pytest.raises(ValueError, match=r"`teacher_model\[1\]` is a model with vocab_size 40"):
        tiny.trainer("causal_lm", tempfile.mkdtemp(), pair=(student, [large, small]), data=data, **LM).train()
    equal = LlamaForCausalLM(tiny.llama_config(vocab_size=48, **ids))
    made = tiny.trainer("causal_lm", tempfile.mkdtemp(), pair=(student, [large, equal]), data=data, kd_alpha=1.0, **LM)
    batch = tiny.pad(data[:4])
    got = made.compute_loss(made.model, batch)
    mask = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100
    with torch.no_grad():
        z_s, *z_t = (m(batch["input_ids"], batch["attention_mask"]).logits[mask] for m in (student, large, equal))
    p = sum((z[:, :48] / 2).softmax(-1) for z in z_t) / 2
    q = (z_s / 2).log_softmax(-1)
    assert got.item() == pytest.approx(4 * float((p * (p.log() - q)).sum(-1).mean()), rel=1e-5)


def test_teachers_of_other_classes_are_refused():
    teachers = [tiny.Plain(), tiny.Plain(classes=tiny.CLASSES + 1)]
    with pytest.raises(ValueError, match="expected equal numbers of classes"):
        trained("plain", teachers)


def test_each_teacher_has_its_dtype():
    teachers = several("plain")
    made = trained("plain", [teachers[0], copy.deepcopy(teachers[1]).bfloat16()])
    other = trained("plain", teachers)
    assert made.teacher.members[1].model.linear.weight.dtype == torch.bfloat16
    assert tiny.logged(made, "loss") == pytest.approx(tiny.logged(other, "loss"), rel=0.05)


def test_paths_modules_and_the_students_base_in_one_list(tmp_path):
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny.llama_config())
    other, third = (LlamaForCausalLM(tiny.llama_config(24)) for _ in range(2))
    other.save_pretrained(tmp_path / "other")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    plain = copy.deepcopy(base)
    torch.manual_seed(1)
    student = peft.get_peft_model(copy.deepcopy(base), config)
    twin = copy.deepcopy(student)
    kwargs = {**LM, "max_steps": 2, "learning_rate": 0.2}
    given = ["adapter_off", str(tmp_path / "other"), third]
    one = tiny.trainer("causal_lm", tmp_path / "a", pair=(student, given), **kwargs,
                       teacher_model_init_kwargs={"dtype": "float32"})  # fmt: skip
    two = tiny.trainer("causal_lm", tmp_path / "b", pair=(twin, [plain, other, third]), **kwargs)
    for each in (one, two):
        each.train()
    assert tiny.logged(one, "loss") == pytest.approx(tiny.logged(two, "loss"), rel=1e-5)
    assert "adapters off" in one.teacher.describe()


def test_a_json_list_of_paths_with_arguments_for_each(tmp_path):
    for i, teacher in enumerate(several("classification")):
        teacher.save_pretrained(tmp_path / str(i))
    paths = [str(tmp_path / str(i)) for i in range(2)]
    made = run("classification", None, teacher_model_name_or_path=paths, teacher_weights="[3, 1]",
               teacher_model_init_kwargs=[{"dtype": "bfloat16"}, {}])  # fmt: skip
    assert [next(m.model.parameters()).dtype for m in made.teacher.members] == [torch.bfloat16, torch.float32]
    assert made.teacher.weights == [0.75, 0.25]
    assert DistillationArguments(teacher_model_name_or_path='["a", "b"]').teacher_model_name_or_path == ["a", "b"]


@pytest.fixture
def all_fused(monkeypatch):
    """The tiny vocabularies are large ones."""
    monkeypatch.setattr(output_head, "SMALL_VOCABULARY", 0)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "dkd"])
def test_fused_is_full(divergence, all_fused):
    teachers = several("causal_lm", 3)
    settings = {"teacher_weights": [1, 3, 0], "kd_divergence": divergence}
    one = trained("causal_lm", teachers, kd_loss_implementation="fused", **settings)
    other = trained("causal_lm", teachers, kd_loss_implementation="full", **settings)
    assert one._plan.heads is not None
    assert "the loss is computed inside the output heads: no logits are held" in one._plan.notes
    assert_same(one, other, rel=1e-4)
    assert one.evaluate()["eval_soft_loss"] == pytest.approx(other.evaluate()["eval_soft_loss"], rel=1e-5)


def test_fused_makes_no_logits_of_a_teacher(all_fused, monkeypatch):
    monkeypatch.setattr("kd_trainer.teachers.several.Mixture", None)
    made = trained("causal_lm", several("causal_lm"), kd_loss_implementation="fused")
    heads = [member.model.lm_head for member in made.teacher.members]
    assert all(head is not None for head in heads)
    assert len(tiny.logged(made, "loss")) == 3


def test_fused_with_routes_is_full(all_fused):
    data = with_ids(tiny.rows("causal_lm"), [0, 1, 1, 0, 1])
    student, teachers = tiny.models("causal_lm")[0], several("causal_lm")
    made = [
        tiny.trainer("causal_lm", tempfile.mkdtemp(), pair=(copy.deepcopy(student), teachers), data=data,
                     kd_loss_implementation=way, **LM)
        for way in ("fused", "full")
    ]  # fmt: skip
    for each in made:
        each.train()
    assert "the loss is computed inside the output heads: no logits are held" in made[0]._plan.notes
    assert_same(*made, rel=1e-4)


def test_fused_with_routes_makes_no_logits_of_a_batch(all_fused, monkeypatch):
    """Of rows of one teacher, of a named mixture and of another one: the loss of the separate batches."""
    teachers, batch = several("causal_lm", 3), tiny.pad(tiny.rows("causal_lm", 6))
    names, settings = ["a", "a", "b"], {"kd_reduction": "batchmean", "kd_alpha": 1.0}
    made = run("causal_lm", teachers, teacher_weights=[1, 2, 1], teacher_names=names,
               kd_loss_implementation="fused", **settings)  # fmt: skip
    expected = 0.0
    for rows, alone, weights in (
        ([0, 4], teachers[:2], [1, 2]),
        ([1, 3, 5], teachers[2], None),
        ([2], teachers[0], None),
    ):
        single = run("causal_lm", alone, teacher_weights=weights, kd_loss_implementation="full", **settings)
        expected += single.compute_loss(single.model, {k: v[rows] for k, v in batch.items()}).item() * len(rows) / 6
    monkeypatch.setattr("kd_trainer.teachers.several.Mixture", None)
    got = made.compute_loss(made.model, {**batch, "teacher_id": ["a", 2, 0, "b", "a", 2]})
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_loss_of_a_mixture_is_that_of_its_logits(masked):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, v = 9, 31
    hidden, weight = draw(n, 4).requires_grad_(), draw(v, 4).requires_grad_()
    parts = [MixedPart(draw(n, h), OutputProjection(draw(v, h), draw(v) if h == 5 else None, 0.5, cap), w)
             for h, cap, w in ((5, None, 0.7), (3, 4.0, 0.3))]  # fmt: skip
    z = [side.logits(states) for states, side, *_ in parts]
    p = sum(w * (each / 2).softmax(-1) for each, (*_, w, _) in zip(z, parts, strict=True))
    labels = torch.randint(v, (n,), generator=generator)
    options = {"labels": labels, "alpha": 0.6, "temperature": 2.0}
    if masked:
        options["soft_mask"] = torch.arange(n) % 2 == 0
        for states, *_ in parts:
            states[1] = torch.nan
    results = []
    for given in (MixedLogits(tuple(parts), 2.0), 2 * p.log()):
        for function in (fused_linear_distillation, fused_linear.fused_linear_distillation_plain):
            loss = function(hidden, weight, None, None, teacher_logits=given, **options)
            results.append((loss.total, loss.soft, loss.agreement, *torch.autograd.grad(loss.total, (hidden, weight))))
    for other in results[1:]:
        for one, value in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, value.to(one.dtype))


class Largest(TorchDispatchMode):
    """The largest tensor with memory of its own that an operation returns, of all but `torch.full`."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.numbers, self.whole = {t.untyped_storage().data_ptr() for t in known}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            place = made.untyped_storage().data_ptr()
            if func is torch.ops.aten.full.default:
                self.known.add(place)
                self.whole += made.numel()
            elif place not in self.known:
                self.numbers = max(self.numbers, made.numel())
        return made


def test_beside_the_mixture_and_a_teachers_logits_little_is_held(monkeypatch):
    monkeypatch.setattr("kd_trainer.teachers.several._AT_ONCE", 4 * 101)
    logits = torch.randn(3, 6, 50, 101)
    with Largest(logits) as seen:
        mixed("causal_lm", logits, [0.2, 0.3, 0.5], 2.0)
    assert seen.whole == logits[0].numel()
    assert seen.numbers <= 4 * 101


@pytest.mark.parametrize("routed", [False, True])
def test_the_fused_mixture_holds_a_tile_a_teacher(routed):
    head = lambda: OutputProjection(torch.randn(997, 8), None, 1.0, None)  # noqa: E731
    weights = (torch.arange(4096) % 3 == 0).float(), (torch.arange(4096) % 3 != 0).float()
    parts = tuple(MixedPart(torch.randn(4096, 8), head(), w) for w in (weights if routed else (0.5, 0.5)))
    hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(997, 8, requires_grad=True)
    with Largest() as seen:
        loss = fused_linear_distillation(
            hidden, weight, None, None, teacher_logits=MixedLogits(parts, 1.0), alpha=1.0, chunk_rows=64
        )
    assert loss.soft > 0
    assert seen.numbers < 4096 * 997 / 8


# ---- caches ----


def cached(task: str, teacher: nn.Module, folder, **kwargs) -> CachedTeacher:
    settings = {"teacher_cache_dir": str(folder), "kd_reduction": "tokenmean", **kwargs}
    return run(task, teacher, **settings).build_teacher_cache()


@pytest.mark.parametrize("kept", ["logits", "hidden"])
def test_caches_stand_for_teachers(kept, tmp_path):
    teachers = several("causal_lm")
    first = cached("causal_lm", teachers[0], tmp_path / "a", teacher_cache_format=kept)
    second = cached("causal_lm", teachers[1], tmp_path / "b", teacher_cache_format="logits")
    live = trained("causal_lm", teachers, teacher_weights=[1, 3])
    for given in ([first, second], [first, teachers[1]]):
        read = trained("causal_lm", given, teacher_weights=[1, 3])
        assert_same(live, read)
        assert read.evaluate()["eval_soft_loss"] == pytest.approx(live.evaluate()["eval_soft_loss"], rel=1e-5)


def test_a_sparse_cache_is_refused(tmp_path):
    teachers = several("causal_lm")
    sparse = cached("causal_lm", teachers[0], tmp_path / "a", teacher_cache_format="topk", teacher_cache_k=4)
    with pytest.raises(
        ValueError, match=r"`teacher_model\[0\]` is a cache of format topk; expected a cache of format log"
    ):
        trained("causal_lm", [sparse, teachers[1]])


# ---- errors and texts ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_weights": [1]}, r"`teacher_weights` is \[1\]; expected 2 values, one for each teacher"),
        ({"teacher_names": ["a", "b", "c"]}, "`teacher_names` is .* expected 2 values, one for each teacher"),
        ({"teacher_model_init_kwargs": [{}, {}, {}]}, "`teacher_model_init_kwargs` is .* expected 2 objects"),
        ({"teacher_model_init_kwargs": {"dtype": "float32"}}, "expected nothing where no teacher is given by path"),
        ({"kd_standardize_logits": True}, "`kd_standardize_logits` is True; expected False with several teachers"),
        ({"kd_divergence": "logit_mse"}, "`kd_divergence` is 'logit_mse'; expected a divergence of probabilities"),
    ],
)
def test_what_does_not_fit_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        trained("classification", several("classification"), **settings)


def test_a_list_of_one_and_weights_of_one_are_errors():
    teacher = tiny.models("plain")[1]
    with pytest.raises(ValueError, match="`teacher_model` is a list of 1; expected two teachers or more"):
        run("plain", [teacher])
    with pytest.raises(ValueError, match=r"`teacher_weights` is .* expected nothing with a single teacher"):
        run("plain", teacher, teacher_weights=[1])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"teacher_weights": [1, -1]}, ValueError, "`teacher_weights` is -1; expected a finite number >= 0"),
        ({"teacher_weights": [0, 0]}, ValueError, "expected a weight above 0"),
        ({"teacher_weights": 3}, TypeError, "a list of numbers, one for each teacher"),
        ({"teacher_weights": ["a"]}, TypeError, "a finite number"),
        ({"teacher_names": [1]}, TypeError, "a list of texts, one for each teacher"),
        ({"teacher_names": "a,b"}, ValueError, "a JSON value"),
        ({"teacher_model_name_or_path": ["a", "b"], "teacher_names": ["a"]}, ValueError, "2 texts, one for each of"),
        ({"teacher_model_name_or_path": ["a", 1]}, TypeError, "a folder or a hub name"),
        ({"teacher_model_init_kwargs": [1, 2]}, TypeError, "a JSON object: names and values"),
    ],
)
def test_arguments_of_another_form_are_errors(settings, error, message):
    with pytest.raises(error, match=message):
        DistillationArguments(**settings)


def test_every_text_names_each_teacher_and_its_weight(capsys):
    made = trained("plain", several("plain"), teacher_weights=[3, 1], teacher_names=["one", "two"])
    shown = capsys.readouterr().out
    assert "[kd_trainer] teacher  0 (one), weight 0.75: Plain, 35 parameters" in shown
    assert "[kd_trainer] teacher  1 (two), weight 0.25: Plain, 35 parameters" in shown
    summary = made.summary()
    assert summary["teacher"] == "0.75 * Plain + 0.25 * Plain"
    assert summary["teacher_parameters"] == 70
    assert [one["weight"] for one in summary["teachers"]] == [0.75, 0.25]
    assert [one["teacher_id"] for one in summary["teachers"]] == ["one", "two"]


def test_check_has_rows_of_each_teacher():
    made = run("classification", several("classification"), teacher_weights=[3, 1])
    rows = made.check()
    assert not [row for row in rows if row.status == "error"]
    for what, found in (("teacher", "BertForSequenceClassification, 7,349 parameters"),
                        ("classes", "the same 5 names in the same order"),
                        ("tokens", "sizes and special ids of the configs alone were compared")):  # fmt: skip
        lines = [row.found for row in rows if row.what == what]
        assert len(lines) == 2
        for line, label in zip(lines, ["0, weight 0.75: ", "1, weight 0.25: "], strict=True):
            assert line.startswith(label + found)
    assert any(row.what == "split" and row.status == "ok" for row in rows)


def test_check_names_the_teacher_that_does_not_fit():
    other = BertForSequenceClassification(tiny.bert_config(24, vocab_size=20))
    rows = run("classification", [tiny.models("classification")[1], other]).check()
    (wrong,) = [row for row in rows if row.status == "error"]
    assert wrong.what == "tokens"
    assert "`teacher_model[1]` is a model with vocab_size 20" in wrong.found


def test_the_model_card_names_the_teachers():
    made = run("classification", several("classification"), teacher_weights=[3, 1])
    made.train()
    made.save_model()
    made.create_model_card()
    folder = Path(made.args.output_dir)
    name = "0.75 * BertForSequenceClassification + 0.25 * BertForSequenceClassification"
    assert f"Distilled from the teacher `{name}`" in (folder / "README.md").read_text()
    kept = json.loads((folder / "distillation.json").read_text())
    assert [one["weight"] for one in kept["teachers"]] == [0.75, 0.25]


def test_a_variance_is_refused():
    with pytest.raises(ValueError, match="`teacher_model` is one whose outputs hold a variance; expected teachers of"):
        mixed("regression", torch.rand(2, 5, 1, 2), [0.5, 0.5])


def test_features_take_one_teacher():
    with pytest.raises(ValueError, match="`teacher_model` is a list of 2; expected one teacher, because the term"):
        trained("classification", several("classification"), kd_features={"hidden_mse": 1})


def test_a_teacher_is_not_run_where_alpha_is_0():
    teachers = [Counting(teacher) for teacher in several("plain")]
    made = trained("plain", teachers, kd_alpha=0.0)
    assert [teacher.rows for teacher in teachers] == [[], []]
    assert made.evaluate()["eval_soft_loss"] > 0
