"""`kd_cross_tokenizer` "chunks": the trainer's loss of text chunks against loops over rows and chunks in float64."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import LlamaForCausalLM

from kd_trainer import DistillationArguments, DistillationTrainer
from kd_trainer.teachers import TeacherOutput, TokenLogProbs
from kd_trainer.training.chunks import ChunkObjective
from tests.helpers import chunk_run, config_run, launch, tiny
from tests.helpers.chunk_run import collator, models, rows, trainer
from tests.losses.test_fused_linear import LargestTensor

IMPLEMENTATIONS = ["full", "fused"]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def by_hand(pair, data, tau: float = 1.0) -> tuple[torch.Tensor, int, torch.Tensor, int]:
    """Sum over chunks and how many there are, sum of the hard loss and how many labels, row by row without padding."""
    chunk_sum, hard_sum, chunks, labelled = torch.zeros((), dtype=torch.float64), 0.0, 0, 0
    for row in data:
        likelihoods: list[dict[int, list]] = []
        for model, prefix in zip(pair, ("", "teacher_"), strict=True):
            ids = torch.tensor([row[prefix + "input_ids"]])
            log_probs = F.log_softmax(model(input_ids=ids).logits.double(), -1)[0]
            found: dict[int, list] = {}
            for j, (token, chunk) in enumerate(zip(row[prefix + "input_ids"], row[prefix + "chunk_ids"], strict=True)):
                known = j > 0 and (prefix or row["labels"][j] != -100)
                if known and not prefix:
                    hard_sum, labelled = hard_sum - log_probs[j - 1, token], labelled + 1
                if chunk >= 0:
                    found.setdefault(chunk, []).append(log_probs[j - 1, token] if known else None)
            likelihoods.append(found)
        student, teacher = likelihoods
        assert student.keys() == teacher.keys()
        for chunk in student:
            if None in student[chunk] + teacher[chunk]:
                continue
            q, p = (torch.exp(sum(each[chunk]) / tau) for each in (student, teacher))
            p = p.detach()
            chunk_sum, chunks = chunk_sum + p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(), chunks + 1
    return chunk_sum, chunks, hard_sum, labelled


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("alpha", "tau", "reduction"), [(0.6, 1.0, "tokenmean"), (1.0, 4.0, "batchmean"), (0.3, 1.0, "batchmean")]
)
def test_value_and_gradient_are_those_of_loops(implementation, alpha, tau, reduction, tmp_path):
    student, teacher = models()
    settings = {"kd_alpha": alpha, "kd_chunk_temperature": tau, "kd_reduction": reduction}
    run = trainer(tmp_path, pair=(student, teacher), kd_loss_implementation=implementation, **settings)
    data = rows()[:8]
    run.compute_loss(student, collator()(data)).backward()
    assert (run._plan.heads is None) == (implementation == "full")
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    chunk_sum, chunks, hard_sum, labelled = by_hand((student, teacher), data, tau)
    assert 20 < chunks < sum(max(row["chunk_ids"]) + 1 for row in data)  # some are masked
    hard_count = labelled if reduction == "tokenmean" else 8
    expected = alpha * chunk_sum / chunks + (1 - alpha) * hard_sum / hard_count
    expected.backward()
    assert run.compute_loss(student, collator()(data)).item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in student.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert not any(p.grad is not None for p in teacher.parameters())


def test_fused_and_full_are_the_same_run_and_log_the_term(tmp_path):
    settings = {"kd_schedule": "linear", "kd_alpha_end": 0.2, "max_steps": 6}
    runs = [trainer(tmp_path, kd_loss_implementation=name, **settings) for name in IMPLEMENTATIONS]
    for run in runs:
        run.train()
    torch.testing.assert_close(*(tiny.weights(run.model) for run in runs), rtol=0, atol=1e-5)
    for key in chunk_run.LOGGED:
        assert len(tiny.logged(runs[0], key)) == 6
        assert tiny.logged(runs[0], key) == pytest.approx(tiny.logged(runs[1], key), rel=1e-4)
    for key in ("soft_loss", "teacher_agreement"):  # of what is not compared
        assert tiny.logged(runs[0], key) == []
    weighted = [0.6 * c + 0.4 * h for c, h in zip(*(tiny.logged(runs[0], f"{x}_loss") for x in ("chunks", "hard")))]  # noqa: B905
    assert tiny.logged(runs[0], "loss")[0] == pytest.approx(weighted[0], rel=1e-5)
    metrics = [run.evaluate() for run in runs]
    for key in ("eval_loss", "eval_chunks_loss", "eval_hard_loss", "eval_perplexity"):
        assert metrics[0][key] == pytest.approx(metrics[1][key], rel=1e-4), key
    assert metrics[0]["eval_loss"] == pytest.approx(
        0.2 * metrics[0]["eval_chunks_loss"] + 0.8 * metrics[0]["eval_hard_loss"], rel=1e-5
    )
    assert "eval_soft_loss" not in metrics[0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4)])
@pytest.mark.parametrize("reduction", ["tokenmean", "batchmean"])
def test_accumulation_changes_nothing(implementation, batch, accumulation, reduction, tmp_path):
    settings = {"kd_loss_implementation": implementation, "kd_reduction": reduction, "learning_rate": 0.01}
    whole = trainer(tmp_path, **settings)
    split = trainer(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **settings
    )  # fmt: skip
    whole.train()
    split.train()
    torch.testing.assert_close(tiny.weights(split.model), tiny.weights(whole.model), rtol=0, atol=1e-5)
    for key in chunk_run.LOGGED:
        assert tiny.logged(split, key) == pytest.approx(tiny.logged(whole, key), rel=1e-4), key
    assert (tiny.weights(whole.model) - tiny.weights(models()[0])).abs().max() > 1e-3


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    backends = [name for name in chunk_run.BACKENDS if name != "zero3" or HAS_DEEPSPEED]
    make = lambda out: launch.two_processes("chunk_run.py", str(out), *backends, timeout=300)  # noqa: E731
    return launch.once(tmp_path_factory, "chunks", make)


@pytest.mark.launch
@pytest.mark.parametrize("case", chunk_run.CASES)
@pytest.mark.parametrize("backend", chunk_run.BACKENDS)
def test_two_processes_change_nothing(backend, case, two_processes, tmp_path):
    """Of teachers that are sharded each process runs its part, also while a cache is built."""
    from safetensors.torch import load_file

    if backend == "zero3" and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    whole = chunk_run.of_case(case, tmp_path)
    whole.train()
    whole.save_model(str(tmp_path / "saved"))
    metrics, folder = whole.evaluate(), two_processes / backend / case
    saved, expected = (load_file(path / "saved/model.safetensors") for path in (folder, tmp_path))
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-5, msg=name)
    for rank in range(2):
        found = json.loads((folder / f"process_{rank}.json").read_text())
        assert found["world_size"] == 2
        assert found["sharded"] == (backend != "ddp" and case != "cached")
        assert found["fused"] == (case != "full")
        for key in chunk_run.LOGGED:
            assert found["logs"][key] == pytest.approx(tiny.logged(whole, key), rel=1e-4), key
            assert found["metrics"][f"eval_{key}"] == pytest.approx(metrics[f"eval_{key}"], rel=1e-4), key


def shifted(features):
    """A base collator that pads on the left."""
    batch, width = {}, max(len(row["input_ids"]) for row in features)
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        batch[name] = torch.tensor([[fill] * (width - len(row[name])) + row[name] for row in features])
    for row, feature in enumerate(features):
        batch["labels"][row, width - len(feature["labels"])] = -100  # which padding would predict
    return batch


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_changes_nothing(implementation, tmp_path):
    run = trainer(tmp_path, kd_loss_implementation=implementation)
    data, losses = rows()[:6], []
    tokenizer = chunk_run.tokenizers()[1]
    alone = collator()(data)
    try:
        for base, side, multiple in ((tiny.pad, "right", None), (shifted, "left", None), (tiny.pad, "right", 16)):
            tokenizer.padding_side = side
            made = collator(base)
            made.pad_to_multiple_of = multiple
            losses.append(run.compute_loss(run.model, made(data)).item())
    finally:
        tokenizer.padding_side = "right"
    fills = {"labels": -100, "chunk_ids": -1}
    student = {name: value for name, value in alone.items() if not name.startswith("teacher_")}
    more = alone | {name: F.pad(value, (0, 5), value=fills.get(name, 0)) for name, value in student.items()}
    losses.append(run.compute_loss(run.model, more).item())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_tokenizer_is_the_target_term_of_dkd(implementation, tmp_path):
    """The same tokens on both sides: chunks of one token each, and KL of (p_y, 1 - p_y)."""
    torch.manual_seed(0)
    student, teacher = (LlamaForCausalLM(tiny.llama_config(h)) for h in (16, 24))
    data = []
    for row in tiny.rows("causal_lm", 8):
        same = {name: row[name] for name in ("input_ids", "attention_mask")}
        same["chunk_ids"] = list(range(len(row["labels"])))
        data.append({**row, **same, **{f"teacher_{name}": value for name, value in same.items()}})
    run = trainer(tmp_path, pair=(student, teacher), kd_alpha=1.0, kd_loss_implementation=implementation)
    batch = collator()(data)
    loss = run.compute_loss(student, batch)
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    names = ("input_ids", "attention_mask")
    z_s, z_t = (model(**{name: batch[name] for name in names}).logits.double() for model in (student, teacher))
    q, p = (F.softmax(z, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets != -100] for z in (z_s, z_t))
    target_term = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert loss.item() == pytest.approx(target_term.item(), abs=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_labels_and_batches_without_chunks(implementation, tmp_path):
    run = trainer(tmp_path, kd_alpha=1.0, kd_loss_implementation=implementation)
    data = rows(8, 5, masked=False)
    labelled = run.compute_loss(run.model, collator()(data)).item()
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in data]
    assert run.compute_loss(run.model, collator()(unlabelled)).item() == pytest.approx(labelled, rel=1e-6)
    fills = {"chunk_ids": -1, "labels": -100}
    nothing = [row | {name: [fill] * len(row[name]) for name, fill in fills.items()} for row in data]
    loss = run.compute_loss(run.model, collator()(nothing))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in run.model.parameters())


def test_logits_of_no_model_are_held(tmp_path):
    student, teacher = models()
    run = trainer(tmp_path, pair=(student, teacher), kd_loss_implementation="fused")
    batch = collator()(rows()[:16])
    whole = run.compute_loss(student, batch).item()  # makes the plan, with its comparisons
    sizes = []
    for model, name in ((student, "input_ids"), (teacher, "teacher_input_ids")):
        sizes.append(batch[name].numel() * model.config.vocab_size)
    import kd_trainer.losses.chunk_likelihood as module

    with pytest.MonkeyPatch.context() as patch, LargestTensor() as largest:
        patch.setattr(module, "chunk_rows", lambda *args, **kwargs: 8)
        loss = run.compute_loss(student, batch)
        loss.backward()
    assert loss.item() == pytest.approx(whole, rel=1e-6)
    assert largest.bytes < 2 * min(sizes)  # half of the logits in float32


@pytest.mark.trains  # measures time
def test_the_term_takes_at_most_5_percent_of_a_step(tmp_path):
    """Beside the products of both heads, which every distillation has: the counts, and the sums over chunks."""
    options = {"max_position_embeddings": 96, "vocab_size": 4000, "num_hidden_layers": 2}
    pair = [LlamaForCausalLM(tiny.llama_config(h, intermediate_size=4 * h, **options)) for h in (128, 192)]
    run = trainer(tmp_path, pair=pair, kd_loss_implementation="fused")
    batch = collator()(rows(32, 5))
    run.compute_loss(run.model, batch)  # makes the plan
    plan, (objective, _) = run._plan, run._run_settings.objective(run.state, training=True)
    teacher = TeacherOutput(sparse=TokenLogProbs(-torch.rand(batch["teacher_input_ids"].shape)))

    def seconds(work: Callable[[], Any]) -> float:
        found = []
        for _ in range(5):
            start = time.process_time()
            work()
            found.append(time.process_time() - start)
        return min(found)

    def term() -> None:
        objective.count(plan.task, batch)
        scored = objective._scored(plan.task, teacher, batch)
        log_probs = (-torch.rand(len(scored.labels))).requires_grad_()
        chunks, hard = objective._sums(scored, log_probs, slice(None))
        torch.autograd.grad(chunks + hard, log_probs)

    assert seconds(term) < 0.05 * seconds(lambda: run.compute_loss(run.model, batch).backward())


def test_alpha_0_is_the_stock_trainer_and_needs_no_columns(tmp_path):
    plain = [{k: v for k, v in row.items() if k in ("input_ids", "attention_mask", "labels")} for row in rows()]
    run = DistillationTrainer(
        model=models()[0], args=tiny.arguments(tmp_path, kd_alpha=0.0, kd_cross_tokenizer="chunks"),
        data_collator=tiny.pad, train_dataset=plain,
    )  # fmt: skip
    run.train()
    other = trainer(tmp_path, kd_alpha=0.0, kd_reduction="batchmean")
    other.train()
    torch.testing.assert_close(tiny.weights(run.model), tiny.weights(other.model))


def test_datasets_keep_their_columns(tmp_path):
    """A `Dataset` and a stream, with upstream's removal of columns that no forward takes."""
    data = Dataset.from_list([{**row, "note": "x"} for row in rows()])
    weights = []
    for given in (data, data.to_iterable_dataset()):
        run = trainer(tmp_path, data=given, remove_unused_columns=True)
        run.train()
        weights.append(tiny.weights(run.model))
    plain = trainer(tmp_path)
    plain.train()
    for each in weights:
        torch.testing.assert_close(each, tiny.weights(plain.model))


def test_check_runs_through(tmp_path):
    results = trainer(tmp_path, kd_loss_implementation="fused").check()
    assert not [row for row in results if row.status == "error"]
    by_name = {row.what: row for row in results}
    assert "chunks_loss" in by_name["loss"].found
    assert by_name["split"].status == by_name["padding"].status == "ok"
    assert "the chunks loss has" in by_name["soft and hard"].found
    assert "teacher's quality" not in by_name


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_without_the_switch_other_tokens_are_refused_and_the_switch_is_named(tmp_path):
    run = trainer(tmp_path, kd_cross_tokenizer="error")
    refusal = r"`teacher_input_ids` is a column .*align_teacher_tokens with kd_cross_tokenizer 'chunks'"
    with pytest.raises(ValueError, match=refusal):
        run.train()
    student, teacher = models()
    teacher.config.eos_token_id = 5
    plain = [{k: v for k, v in row.items() if k in ("input_ids", "attention_mask", "labels")} for row in rows()]
    run = trainer(tmp_path, pair=(student, teacher), data=plain, kd_cross_tokenizer="error")
    with pytest.raises(
        ValueError, match=r"`teacher_model` is a model with eos_token_id 5.*kd_cross_tokenizer 'chunks'"
    ):
        run.train()


def test_batches_that_are_not_aligned_are_refused(tmp_path):
    for missing in ("chunk_ids", "teacher_chunk_ids", "teacher_input_ids"):
        gone = {missing, "teacher_attention_mask" if missing == "teacher_input_ids" else missing}
        data = [{k: v for k, v in row.items() if k not in gone} for row in rows()]
        with pytest.raises(ValueError, match=f"the column '{missing}' too with kd_cross_tokenizer 'chunks'"):
            DistillationTrainer(
                model=models()[0], teacher_model=models()[1], train_dataset=data,
                args=tiny.arguments(tmp_path, kd_cross_tokenizer="chunks"),
                data_collator=collator() if missing != "teacher_input_ids" else no_tokens,
            ).train()  # fmt: skip
    refusal = r"`label_smoothing_factor` is 0\.1; expected 0 with kd_cross_tokenizer 'chunks'"
    with pytest.raises(ValueError, match=refusal):
        trainer(tmp_path, label_smoothing_factor=0.1).train()
    seq2seq = config_run.bart(16), config_run.bart(24)
    for task, data, pair in (("classification", "classification", None), ("seq2seq_lm", "causal_lm", seq2seq)):
        run = tiny.trainer(task, tmp_path, data=tiny.rows(data, 8), pair=pair, kd_cross_tokenizer="chunks")
        with pytest.raises(
            ValueError, match=f"`kd_cross_tokenizer` is 'chunks'; expected 'error' for the task '{task}"
        ):
            run.train()


def no_tokens(features):
    batch = tiny.pad([{k: v for k, v in row.items() if not k.startswith("teacher_")} for row in features])
    return batch | {"teacher_chunk_ids": batch["chunk_ids"]}


REFUSED = [
    ({"kd_cross_tokenizer": "words"}, "`kd_cross_tokenizer` is 'words'; expected one of 'error', 'chunks'"),
    ({"kd_chunk_temperature": 2.0}, "`kd_chunk_temperature` is 2.0; expected 1 with kd_cross_tokenizer 'error'"),
    ({"kd_chunk_temperature": 0.0}, "`kd_chunk_temperature` is 0.0; expected a finite number > 0"),
    ({"kd_temperature": 1.0}, "`kd_temperature` is 1.0; expected 3.0 (the default) with kd_cross_tokenizer 'chunks'"),
    ({"kd_divergence": "jsd"}, "`kd_divergence` is 'jsd'; expected 'forward_kl' (the default)"),
    ({"kd_standardize_logits": True}, "`kd_standardize_logits` is True; expected False (the default)"),
    ({"kd_features": {"relation": 1}}, "`kd_features` is {'relation': 1}; expected None (the default)"),
]


@pytest.mark.parametrize(("settings", "text"), REFUSED)
def test_settings_that_do_not_go_together_are_refused(settings, text):
    given = {"kd_cross_tokenizer": "chunks"} if "kd_chunk_temperature" not in settings else {}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        DistillationArguments(**given | settings)
    assert text in str(error.value)


def test_the_formula_names_the_term():
    formula = ChunkObjective(0.6, 3.0, reduction="tokenmean", chunk_temperature=2.0).formula(None)
    assert formula == "loss = 0.6 * chunks(tau=2) + 0.4 * hard, per row"
    assert math.isclose(DistillationArguments(kd_cross_tokenizer="chunks").kd_chunk_temperature, 1.0)
