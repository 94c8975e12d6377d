"""`teachers/sequences.py`: rows that the student writes are the same however a step is split, and only they change."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from kd_trainer import CachedTeacher, forward_kl
from kd_trainer.teachers.sequences import InverseCDF, RowNumbers, StudentRows, _rebuilt
from tests.helpers import tiny

ON = {"kd_student_fraction": 1.0, "kd_max_new_tokens": 6}
HALF = {**ON, "kd_student_fraction": 0.5}
NUMBERS = ("loss", "grad_norm", "soft_loss", "student_rows", "student_length", "student_ended", "student_agreement")


def run(folder, **kwargs):
    made = tiny.trainer("causal_lm", folder, **{"kd_reduction": "tokenmean", "max_steps": 3, **kwargs})
    made.train()
    return made


def written(trainer, rows):
    """The batch of one optimizer step as `get_batch_samples` returns it, and its counts."""
    (batch,), counts = trainer.get_batch_samples(iter([tiny.pad(rows)]), 1, trainer.args.device)
    return batch, counts


def on_the_left(rows):
    """Padded on the left, with position_ids."""
    flipped = [{name: list(reversed(values)) for name, values in row.items()} for row in rows]
    batch = {name: values.flip(1) for name, values in tiny.pad(flipped).items()}
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


# ---- the split ----


@pytest.mark.parametrize(
    "settings",
    [
        ON,
        HALF,
        {**HALF, "kd_loss_implementation": "fused"},
        {**HALF, "kd_reduction": "batchmean", "kd_divergence": "reverse_kl"},
        {**HALF, "kd_hard_loss": "model"},
        {**HALF, "kd_positions": "attended", "kd_divergence": "dkd"},
        {**ON, "kd_generation_kwargs": {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2}},
    ],
    ids=["all", "half", "fused", "batchmean", "own_loss", "attended", "options"],
)
def test_a_step_does_not_depend_on_how_it_is_split(settings, tmp_path):
    whole = run(tmp_path, **settings)
    assert min(tiny.logged(whole, "student_rows")) > 0
    for size in (4, 2, 1) if settings is HALF else (1,):
        split = run(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings)
        for key in NUMBERS:
            assert tiny.logged(split, key) == pytest.approx(tiny.logged(whole, key), rel=1e-5), (key, size)
        torch.testing.assert_close(tiny.weights(split.model), tiny.weights(whole.model), rtol=0, atol=1e-5)


def test_neither_the_side_nor_the_width_of_padding_matters(tmp_path):
    # A first label that is predicted at padding counts for upstream's hard loss alone: the rows here have some.
    rows = [{**row, "labels": [-100, *row["labels"][1:]]} for row in tiny.rows("causal_lm")]
    found = []
    for collate in (tiny.pad, on_the_left):
        trainer = tiny.trainer("causal_lm", tmp_path, data=rows, kd_reduction="tokenmean", max_steps=3, **HALF)
        trainer.data_collator = collate
        trainer.train()
        found.append(tiny.weights(trainer.model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_row_numbers_are_those_of_the_whole_step():
    def rows(batch_size, processes):
        """The draws in the order of the rows of the step."""
        of = [RowNumbers(7, 3, batch_size, processes, index) for index in range(processes)]
        steps = 8 // batch_size // processes
        return torch.cat([of[i].draws(step, batch_size, 5) for step in range(steps) for i in range(processes)])

    expected = rows(8, 1)
    assert expected.unique().numel() == 40
    for split in ((4, 1), (2, 1), (1, 1), (4, 2), (2, 2), (1, 4)):
        assert torch.equal(rows(*split), expected)
    assert not torch.equal(RowNumbers(7, 4, 8, 1, 0).draws(0, 8, 5), expected)
    assert not torch.equal(RowNumbers(8, 3, 8, 1, 0).draws(0, 8, 5), expected)


@pytest.mark.parametrize("settings", [HALF, {**HALF, "kd_loss_implementation": "fused"}], ids=["full", "fused"])
def test_a_resumed_run_draws_the_same_rows_and_tokens(settings, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **settings}
    whole = run(tmp_path, **saving)
    resumed = tiny.trainer("causal_lm", tmp_path, kd_reduction="tokenmean", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(tiny.weights(resumed.model), tiny.weights(whole.model))
    for key in NUMBERS:
        assert tiny.logged(resumed, key) == tiny.logged(whole, key), key


# ---- sampling ----


def test_tokens_are_drawn_from_the_distribution():
    torch.manual_seed(0)
    scores = torch.randn(1, 6)
    scores[0, 2] = -torch.inf
    grid = (torch.arange(2000) + 0.5) / 2000
    drawn = InverseCDF(grid[:, None], 3)(torch.zeros(2000, 3, dtype=torch.long), scores.expand(2000, -1))
    assert (drawn == 0).sum() == 2000  # one id of each row is left
    shares = torch.bincount(drawn.argmax(1), minlength=6) / 2000
    torch.testing.assert_close(shares, scores[0].softmax(-1), rtol=0, atol=1e-3)
    edges = torch.tensor([[0.0], [1 - 2**-24]])
    ends = InverseCDF(edges, 0)(torch.zeros(2, 0, dtype=torch.long), torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 2))
    assert ends.argmax(1).tolist() == [1, 1]


def test_each_step_of_a_row_has_its_own_draw():
    draws, scores = torch.tensor([[0.1, 0.9]]), torch.zeros(1, 2)
    sampler = InverseCDF(draws, 4)
    assert sampler(torch.zeros(1, 4, dtype=torch.long), scores).argmax() == 0
    assert sampler(torch.zeros(1, 5, dtype=torch.long), scores).argmax() == 1


def test_greedy_text_is_what_the_model_prefers(tmp_path):
    trainer = tiny.trainer("causal_lm", tmp_path, **ON, kd_generation_kwargs={"do_sample": False})
    batch, _ = written(trainer, tiny.rows("causal_lm", 4))
    trainer.model.eval()
    with torch.no_grad():
        best = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    new = batch["student_tokens"]
    assert new.any(1).all()
    assert torch.equal(batch["input_ids"][:, 1:][new[:, 1:]], best[:, :-1][new[:, 1:]])


def test_only_the_student_decides_what_is_sampled(tmp_path):
    """The model's own generation config, made for users who chat with it, does not."""
    trainer = tiny.trainer("causal_lm", tmp_path, **ON)
    plain, _ = written(trainer, tiny.rows("causal_lm", 4))
    trainer.model.generation_config.update(do_sample=True, temperature=0.1, top_k=1, repetition_penalty=3.0)
    again, _ = written(trainer, tiny.rows("causal_lm", 4))
    assert torch.equal(plain["input_ids"], again["input_ids"])


# ---- the batch ----


@pytest.mark.parametrize("left", [False, True])
def test_rows_are_put_back_by_hand(left):
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, 7, 8], [-100, 10, 11, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]]),
        "weights": torch.ones(2, 4),
        "row": torch.tensor([1, 2]),
    }
    if left:
        for name in ("input_ids", "attention_mask", "labels", "position_ids"):
            batch[name][1] = batch[name][1].roll(1)
    kept = {name: value.clone() for name, value in batch.items()}
    made = _rebuilt(batch, torch.tensor([0]), [torch.tensor([5, 6])], [torch.tensor([1, 3, 2])], 99)
    assert made.keys() == {*batch, "student_tokens"} - {"weights"}
    other = {"input_ids": [9, 10, 11], "attention_mask": [1, 1, 1], "labels": [-100, 10, 11], "position_ids": [0, 1, 2]}
    pads = {"input_ids": [0, 99], "attention_mask": [0, 0], "labels": [-100, -100], "position_ids": [0, 0]}
    for name, values in other.items():
        assert made[name][1].tolist() == (pads[name][::-1] + values if left else values + pads[name]), name
    assert made["input_ids"][0].tolist() == [5, 6, 1, 3, 2]
    assert made["attention_mask"][0].tolist() == [1] * 5
    assert made["position_ids"][0].tolist() == [0, 1, 2, 3, 4]
    assert made["labels"][0].tolist() == [-100] * 5
    assert made["student_tokens"].tolist() == [[False, False, True, True, True], [False] * 5]
    for name, value in kept.items():
        assert torch.equal(batch[name], value), name


def test_everything_behind_the_first_eos_is_padding(tmp_path):
    trainer = tiny.trainer("causal_lm", tmp_path, **ON)
    rows = tiny.rows("causal_lm", 16)
    end = {2, 11, 17, 23, 29, 30, 31}  # so that rows end early
    trainer.args.kd_generation_kwargs = {"eos_token_id": sorted(end)}
    batch, counts = written(trainer, rows)
    lengths = []
    for row, ids, real, new, labels in zip(
        rows, *(batch[name] for name in ("input_ids", "attention_mask", "student_tokens", "labels")), strict=True
    ):
        labelled = [i for i, label in enumerate(row["labels"]) if label != -100]
        if not [i for i in labelled if i]:  # no label that is predicted: the row stays
            assert not new.any()
            continue
        prompt = max(labelled[0], 1)
        length = int(new.sum())
        assert ids[:prompt].tolist() == row["input_ids"][:prompt]
        assert new.tolist() == [prompt <= i < prompt + length for i in range(len(new))]
        assert real.tolist() == [int(i < prompt + length) for i in range(len(new))]
        generated = ids[prompt : prompt + length].tolist()
        assert not end & {*generated[:-1]}
        assert generated[-1] in end or length == 6
        assert (labels == -100).all()
        lengths.append(length)
    assert min(lengths) < 6
    assert counts.soft == sum(lengths)
    assert trainer._student_rows.counts[1:3] == [len(lengths), sum(lengths)]


@pytest.mark.parametrize("way", ["full", "fused"])
def test_the_loss_by_hand(way, tmp_path):
    """Soft loss over generated tokens and labels, hard loss over the labels of the other rows."""
    settings = {**HALF, "kd_loss_implementation": way, "kd_reduction": "tokenmean", "kd_temperature": 2.0}
    trainer = tiny.trainer("causal_lm", tmp_path, **settings)
    batch, counts = written(trainer, tiny.rows("causal_lm", 8))
    own = batch["student_tokens"].any(1)
    assert 0 < own.sum() < 8
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=counts)
    student, teacher = trainer.model.double(), trainer.teacher.model.double().eval()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    z_s, z_t = (model(ids, attention_mask=mask).logits[:, :-1] for model in (student, teacher))
    labelled = batch["labels"][:, 1:] != -100
    counted = labelled | batch["student_tokens"][:, 1:]
    soft = 4 * forward_kl(z_s, z_t, temperature=2.0)[counted].mean()
    hard = nn.functional.cross_entropy(z_s[labelled], ids[:, 1:][labelled])
    assert loss.item() == pytest.approx((0.7 * soft + 0.3 * hard).item(), rel=1e-6)


def test_without_the_option_nothing_changes(tmp_path, monkeypatch):
    plain = run(tmp_path)
    monkeypatch.setattr(StudentRows, "written", None)
    zero = run(tmp_path, kd_student_fraction=0.0)
    assert torch.equal(tiny.weights(plain.model), tiny.weights(zero.model))
    assert not tiny.logged(zero, "student_rows")


def test_an_evaluation_generates_nothing(tmp_path, monkeypatch):
    trainer, plain = (tiny.trainer("causal_lm", tmp_path, **kwargs) for kwargs in (ON, {}))
    monkeypatch.setattr(trainer.model, "generate", None)
    metrics, expected = trainer.evaluate(), plain.evaluate()
    assert metrics["eval_loss"] == expected["eval_loss"]
    assert not [name for name in metrics if "student" in name]


def test_modes_flags_and_random_numbers_are_restored(tmp_path):
    trainer = tiny.trainer("causal_lm", tmp_path, **ON)
    student = trainer.model
    written(trainer, tiny.rows("causal_lm", 4))  # makes the plan, which runs the models too
    student.train()
    student.model.layers[0].mlp.eval()
    student.activation_checkpointing_enable({"use_reentrant": False})
    student.config.use_cache = False
    modes = [module.training for module in student.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    seen, generate = [], student.generate

    def watched(**kwargs):
        flags = [getattr(module, "gradient_checkpointing", False) for module in student.modules()]
        seen.append((student.training, any(flags), torch.is_grad_enabled(), kwargs["generation_config"].use_cache))
        torch.rand(1), random.random(), np.random.rand()
        return generate(**kwargs)

    student.generate = watched
    written(trainer, tiny.rows("causal_lm", 4))
    assert seen == [(False, False, False, True)]
    assert [module.training for module in student.modules()] == modes
    assert student.is_activation_checkpointing
    assert student.config.use_cache is False
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_a_lora_student_writes_with_its_adapters_on(tmp_path):
    peft = pytest.importorskip("peft")
    base, texts = tiny.models("causal_lm")[0], []
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    student = peft.get_peft_model(base, config)
    trainer = tiny.trainer("causal_lm", tmp_path, pair=(student, "adapter_off"), learning_rate=0.5, **ON)
    texts.append(written(trainer, tiny.rows("causal_lm", 8))[0]["input_ids"])
    with student.disable_adapter():
        texts.append(written(trainer, tiny.rows("causal_lm", 8))[0]["input_ids"])
    assert texts[0].shape != texts[1].shape or not torch.equal(*texts)
    trainer.train()
    assert tiny.logged(trainer, "student_rows") == pytest.approx([1.0] * 4, abs=0.2)


@pytest.mark.parametrize("kept", [{}, {"kd_position_fraction": 0.5}], ids=["all", "selected"])
@pytest.mark.parametrize("way", ["full", "fused"])
def test_the_agreement_on_the_students_text(way, kept, tmp_path):
    made = run(tmp_path, kd_loss_implementation=way, **ON, **kept)  # no other text counts
    assert tiny.logged(made, "student_agreement") == pytest.approx(tiny.logged(made, "teacher_agreement"), abs=1e-6)
    made = tiny.trainer("causal_lm", tmp_path, kd_loss_implementation=way, kd_reduction="tokenmean", **HALF)
    batch, counts = written(made, tiny.rows("causal_lm", 8))
    made._student_rows.agreed.clear()
    made.is_in_train = True
    with torch.no_grad():
        made.compute_loss(made.model, batch, num_items_in_batch=counts)
        names = ("input_ids", "attention_mask")
        student, teacher = (model(**{k: batch[k] for k in names}).logits for model in (made.model, made.teacher.model))
    own = batch["student_tokens"][:, 1:]
    same = (student.argmax(-1) == teacher.argmax(-1))[:, :-1][own]
    assert made._student_rows.agreed[0].tolist() == [same.sum(), own.sum()]
    assert 0 < own.sum() < batch["attention_mask"].sum()


def test_several_teachers_score_the_same_text(tmp_path):
    student, first = tiny.models("causal_lm")
    second = tiny.models("causal_lm", seed=1)[1]
    whole, *splits = (
        run(tmp_path, pair=(copy.deepcopy(student), [first, second]), per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size, **HALF)
        for size in (8, 2)
    )  # fmt: skip
    for key in NUMBERS:
        assert tiny.logged(splits[0], key) == pytest.approx(tiny.logged(whole, key), rel=1e-5), key


# ---- what is refused ----


def positions(rows):
    batch = tiny.pad(rows)
    return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).remainder(2).expand(len(rows), -1)}


@pytest.mark.parametrize(
    ("collate", "match"),
    [
        (positions, r"`inputs` is a packed batch; expected one sequence in a row with kd_student_fraction"),
        (lambda rows: {k: v for k, v in tiny.pad(rows).items() if k != "labels"}, r"expected input_ids and labels"),
        (
            lambda rows: {**tiny.pad(rows), "inputs_embeds": torch.zeros(len(rows), 3, 16)},
            r"`inputs` is a batch with inputs_embeds; expected text alone",
        ),
    ],
    ids=["packed", "unlabelled", "another input"],
)
def test_batches_that_cannot_be_written_again_are_refused(collate, match, tmp_path):
    trainer = tiny.trainer("causal_lm", tmp_path, kd_reduction="tokenmean", **ON)
    written(trainer, tiny.rows("causal_lm", 4))
    with pytest.raises(ValueError, match=match):
        trainer.get_batch_samples(iter([collate(tiny.rows("causal_lm", 4))]), 1, trainer.args.device)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kd_student_fraction": 1.5}, "`kd_student_fraction` is 1.5"),
        ({"kd_max_new_tokens": 3}, "`kd_max_new_tokens` is 3; expected no value without kd_student_fraction"),
        ({"kd_generation_kwargs": "{}"}, "`kd_generation_kwargs` is .* no value without kd_student_fraction"),
        ({**ON, "kd_max_new_tokens": 0}, "`kd_max_new_tokens` is 0"),
        ({**ON, "kd_alpha": 0.0}, "expected 0 with kd_alpha 0, because the rows .* have no hard loss"),
        ({**ON, "teacher_cache_dir": "c"}, "expected 0 with teacher_cache_dir, because a cache holds no outputs"),
        ({**ON, "kd_generation_kwargs": {"num_beams": 4}}, r"`kd_generation_kwargs\[num_beams\]` is 4"),
        ({**ON, "kd_generation_kwargs": {"temperature": 0.0}}, r"`kd_generation_kwargs\[temperature\]` is 0.0"),
    ],
)
def test_arguments_without_a_meaning_are_refused(settings, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        tiny.arguments(tmp_path, **settings)
    with pytest.raises(TypeError, match="a JSON object"):
        tiny.arguments(tmp_path, **ON, kd_generation_kwargs=[1])


def test_tasks_that_do_not_generate_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected 0 for the task 'token_classification', because only causal"):
        run_task("token_classification", tmp_path)


def run_task(task, folder):
    tiny.trainer(task, folder, **ON).train()


def test_prompts_that_leave_no_room_are_refused(tmp_path):
    trainer = tiny.trainer("causal_lm", tmp_path, **{**ON, "kd_max_new_tokens": 31})
    with pytest.raises(ValueError, match=r"`kd_max_new_tokens` is 31; expected at most \d+ for a prompt of .* tokens"):
        written(trainer, tiny.rows("causal_lm", 8))


def test_a_cached_teacher_is_refused(tmp_path):
    built = tiny.trainer("causal_lm", tmp_path / "build", teacher_cache_dir=str(tmp_path / "cache"))
    built.build_teacher_cache()
    pair = (tiny.models("causal_lm")[0], CachedTeacher(str(tmp_path / "cache")))
    with pytest.raises(ValueError, match="expected 0 with a CachedTeacher, because a cache holds no outputs"):
        tiny.trainer("causal_lm", tmp_path, pair=pair, **ON).train()
