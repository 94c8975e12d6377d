"""`kd_position_fraction`: the soft loss at the positions of highest student entropy, chosen by a quota of each row."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from kd_trainer.losses import OutputProjection, SoftTargetLoss, position_entropies, quota_sum, top_entropy_mask
from kd_trainer.tasks.kinds import TASKS
from kd_trainer.teachers import TeacherOutput
from kd_trainer.training.objective import LossInputs, Objective
from tests.helpers import tiny

IGNORED, VOCABULARY, T = -100, 7, 2.0


def entropies_by_hand(logits: torch.Tensor) -> list[list[float]]:
    found = []
    for row in logits.double().tolist():
        found.append([])
        for z in row:
            odds = [math.exp(each - max(z)) for each in z]
            found[-1].append(-sum(x / sum(odds) * math.log(x / sum(odds)) for x in odds if x))
    return found


def by_hand(entropy, mask, percent: int, segments=None) -> list[list[bool]]:
    """Sorted in plain Python: the quota in whole numbers, ties by position."""
    chosen = []
    for b, counted in enumerate(mask):
        chosen.append([False] * len(counted))
        of = [0] * len(counted) if segments is None else segments[b]
        for segment in set(of):
            places = [s for s, each in enumerate(counted) if each and of[s] == segment]
            quota = -(-percent * len(places) // 100)
            for s in sorted(places, key=lambda s: (-entropy[b][s], s))[:quota]:
                chosen[b][s] = True
    return chosen


def random_mask(generator, rows: int, width: int) -> torch.Tensor:
    mask = torch.rand(rows, width, generator=generator) < 0.7
    mask[0] = False
    return mask


@pytest.mark.parametrize("percent", [1, 7, 20, 30, 50, 99, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_selection_is_the_one_written_out_by_hand(percent, packed):
    generator = torch.Generator().manual_seed(percent)
    mask, logits = random_mask(generator, 5, 41), torch.randn(5, 41, VOCABULARY, generator=generator).double()
    segments = torch.randint(2, (5, 41), generator=generator).cumsum(-1) if packed else None
    entropy = position_entropies(mask, lambda rows: logits.flatten(0, 1)[rows], 8)
    known = torch.tensor(entropies_by_hand(logits), dtype=torch.float64)
    assert torch.allclose(entropy, known * mask, atol=1e-12)
    expected = by_hand(entropy.tolist(), mask.tolist(), percent, None if segments is None else segments.tolist())
    chosen = top_entropy_mask(entropy, mask, percent / 100, segments)
    assert chosen.tolist() == expected
    assert quota_sum(mask, percent / 100, segments) == chosen.sum()


@pytest.mark.parametrize(("fraction", "count", "quota"), [(0.2, 5, 1), (0.07, 100, 7), (0.1, 30, 3), (1 / 3, 9, 3),
                                                          (1e-9, 4, 1), (0.2, 6, 2), (0.5, 0, 0)])  # fmt: skip
def test_quota_is_the_exact_ceiling(fraction, count, quota):
    mask = torch.arange(100).unsqueeze(0) < count
    assert quota_sum(mask, fraction) == quota == top_entropy_mask(torch.rand(1, 100), mask, fraction).sum()


def test_equal_entropies_go_by_position():
    mask = torch.tensor([[True, False, True, True, True]])
    assert top_entropy_mask(torch.ones(1, 5), mask, 0.5).tolist() == [[True, False, True, False, False]]
    later = torch.tensor([[1.0, 9.0, 1.0, 2.0, 1.0]])
    assert top_entropy_mask(later, mask, 0.5).tolist() == [[True, False, False, True, False]]


def test_excluded_classes_and_what_is_not_counted_do_not_reach_the_entropies():
    logits = torch.tensor([[[0.0, 0.0, -torch.inf], [torch.nan] * 3, [1e5, 0.0, 0.0]]])
    mask = torch.tensor([[True, False, True]])
    found = position_entropies(mask, lambda rows: logits.flatten(0, 1)[rows], 2)
    assert found[0].tolist() == pytest.approx([math.log(2), 0, 0])
    assert not position_entropies(mask & False, lambda rows: logits.flatten(0, 1)[rows], 2).any()


def batch(width: int = 12, side: str = "right", pad: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(VOCABULARY, (4, width), generator=generator)
    labels[torch.rand(4, width, generator=generator) < 0.3] = IGNORED
    labels[:, 0] = IGNORED  # with padding on the left the hard loss counts it, as upstream does
    made = {"input_ids": torch.zeros(4, width, dtype=torch.long), "labels": labels}
    made["attention_mask"] = torch.ones_like(labels)
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    ends = (pad, 0) if side == "left" else (0, pad)
    return {name: torch.nn.functional.pad(column, ends, value=fill[name]) for name, column in made.items()}


def logits_of(width: int = 12, side: str = "right", pad: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    ends = (0, 0, pad, 0) if side == "left" else (0, 0, 0, pad)
    both = [torch.randn(4, width, VOCABULARY, generator=generator, dtype=torch.float64) * 3 for _ in range(2)]
    return [torch.nn.functional.pad(z, ends, value=torch.nan) for z in both]


def parts_of(reduction: str, positions: str, side: str = "right", pad: int = 0, fraction: float = 0.4):
    objective = Objective(0.3, T, reduction=reduction, positions=positions, position_fraction=fraction)
    inputs, (student, teacher), task = batch(side=side, pad=pad), logits_of(side=side, pad=pad), TASKS["causal_lm"]
    counts = objective.count(task, inputs)
    student.requires_grad_()
    loss = objective(LossInputs(task, inputs, counts), SoftTargetLoss(temperature=T, reduction="sum"), student, teacher)
    loss.total.backward()
    return loss, counts, student.grad


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
@pytest.mark.parametrize("positions", ["labels", "attended"])
def test_loss_is_the_one_written_out_in_float64(reduction, positions):
    parts, counts, _ = parts_of(reduction, positions)
    (student, teacher), labels = logits_of(), batch()["labels"]
    mask = [[positions == "attended" or int(y) != IGNORED for y in row[1:]] + [False] for row in labels]
    chosen = by_hand(entropies_by_hand(student), mask, 40)
    soft = same = number = 0
    for b, s in ((b, s) for b in range(4) for s in range(12) if chosen[b][s]):
        p, q = ([math.exp(z / T) for z in side[b, s].tolist()] for side in (teacher, student))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        soft += T * T * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        same, number = same + (p.index(max(p)) == q.index(max(q))), number + 1
    assert (int(counts.soft), int(counts.hard)) == (number, int((labels[:, 1:] != IGNORED).sum()))
    assert float(parts.soft.detach()) == pytest.approx(soft / (4 if reduction == "batchmean" else number), rel=1e-12)
    assert float(parts.agreement) == pytest.approx(same / number)
    whole, _, _ = parts_of(reduction, positions, fraction=1.0)
    assert float(parts.hard.detach()) == pytest.approx(float(whole.hard.detach()), rel=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["labels", "attended"])
def test_padding_doubled_changes_nothing(side, positions):
    parts, _, gradient = parts_of("tokenmean", positions)
    padded, _, other = parts_of("tokenmean", positions, side, 12)
    assert padded.soft.item() == pytest.approx(parts.soft.item(), rel=1e-6)
    other = other[:, 12:] if side == "left" else other[:, :12]
    assert torch.allclose(other, gradient, atol=1e-6)
    assert torch.isfinite(other).all()


def test_packed_rows_are_selected_by_segment():
    task, objective = TASKS["causal_lm"], Objective(1.0, T, reduction="tokenmean", position_fraction=0.4)
    (student, teacher), rows, lengths = logits_of(), batch(), (5, 12, 7, 9)
    cut = [[each[b, :n] for b, n in enumerate(lengths)] for each in (student, teacher, rows["labels"])]
    for labels in cut[2]:
        labels[0] = IGNORED  # as DataCollatorWithFlattening has it
    packed = {"labels": torch.cat(cut[2])[None], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    packed["input_ids"] = packed["labels"].clamp(min=0)
    soft_loss = SoftTargetLoss(temperature=T, reduction="sum")
    counts = objective.count(task, packed)
    found = objective(LossInputs(task, packed, counts), soft_loss, torch.cat(cut[0])[None], torch.cat(cut[1])[None])
    single = [{"labels": y[None], "input_ids": y[None].clamp(min=0)} for y in cut[2]]
    whole = objective.count_all(task, single)
    assert int(whole.soft) == int(counts.soft)
    each = [
        objective(LossInputs(task, x, whole), soft_loss, s[None], t[None])
        for s, t, x in zip(*cut[:2], single, strict=True)
    ]
    assert float(sum(part.total for part in each)) == pytest.approx(float(found.total), rel=1e-12)


def run(tmp_path, task: str = "causal_lm", **settings):
    made = tiny.trainer(task, tmp_path, **{"kd_position_fraction": 0.4, "kd_reduction": "tokenmean", **settings})
    made.train()
    return tiny.weights(made.model), tiny.logs(made), made


@pytest.mark.parametrize("task", ["causal_lm", "token_classification"])
@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
def test_a_batch_split_otherwise_gives_the_same_weights(reduction, task, tmp_path):
    settings = {"kd_reduction": reduction, "kd_alpha": 0.5, "learning_rate": 0.01}
    whole, logs, _ = run(tmp_path, task, **settings)
    for size in (4, 2):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        weights, other, _ = run(tmp_path, task, **settings, **split)
        assert torch.allclose(weights, whole, atol=1e-5)
        assert other["soft_loss"] == pytest.approx(logs["soft_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"kd_alpha": 1.0},
        {"kd_alpha": 0.5},
        {"kd_alpha": 1.0, "label_smoothing_factor": 0.1, "kd_positions": "attended"},
        {"kd_alpha": 1.0, "kd_divergence": "dkd", "kd_reduction": "batchmean", "learning_rate": 0.01},
        {"kd_alpha": 0.5, "kd_divergence": "jsd", "kd_positions": "attended"},
    ],
    ids=str,
)
def test_fused_loss_is_the_full_loss(settings, tmp_path):
    full, logs, _ = run(tmp_path, **settings, kd_loss_implementation="full")
    fused, other, made = run(tmp_path, **settings, kd_loss_implementation="fused")
    assert torch.allclose(fused, full, atol=1e-5)
    for key, values in logs.items():
        assert other[key] == pytest.approx(values, rel=1e-5, abs=1e-7), key
    assert made.evaluate()["eval_soft_loss"] > 0


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_teachers_head_multiplies_the_selected_positions_alone(alpha, monkeypatch):
    """One product of the student's head for the entropies, of every counted position; then the fused loss: at alpha 1
    of the selected positions too, else of all that have a label."""
    sizes: list[int] = []
    product = OutputProjection.product

    def counted(self, hidden, factor, out):
        sizes.append(len(hidden))
        return product(self, hidden, factor, out)

    monkeypatch.setattr(OutputProjection, "product", counted)
    generator, task = torch.Generator().manual_seed(2), TASKS["causal_lm"]
    hidden, weight, teacher = (torch.randn(*shape, generator=generator) for shape in ((4, 12, 5), (VOCABULARY, 5),
                                                                                     (4, 12, 5)))  # fmt: skip
    objective, inputs = Objective(alpha, T, reduction="tokenmean", position_fraction=0.4), batch()
    counts = objective.count(task, inputs)
    output = TeacherOutput(hidden=teacher, head={"teacher_weight": weight, "teacher_bias": None})
    weights = {"student_weight": weight.clone().requires_grad_()}
    found = objective.fused(LossInputs(task, inputs, counts), hidden.requires_grad_(), output, weights)
    assert sizes == [int(counts.hard), int(counts.soft if alpha == 1 else counts.hard), int(counts.soft)]
    found.total.backward()
    soft_loss = SoftTargetLoss(temperature=T, reduction="sum")
    parts = objective(LossInputs(task, inputs, counts), soft_loss, hidden @ weight.T, teacher @ weight.T)
    assert objective.parts(found, counts, labelled=True).hard.item() == pytest.approx(parts.hard.item(), rel=1e-5)
    assert found.total.item() == pytest.approx(parts.total.item(), rel=1e-5)
    gradient = torch.autograd.grad(parts.total, hidden)[0]
    assert torch.allclose(hidden.grad, gradient, atol=1e-5)


@pytest.mark.parametrize("implementation", ["full", "fused"])
def test_the_fraction_1_is_the_loss_without_it(implementation, tmp_path):
    settings = {"kd_loss_implementation": implementation}
    whole, logs, _ = run(tmp_path, **settings, kd_position_fraction=1.0)
    unset = tiny.trainer("causal_lm", tmp_path, kd_reduction="tokenmean", **settings)
    unset.train()
    assert torch.equal(tiny.weights(unset.model), whole)
    assert tiny.logs(unset) == logs


def test_the_formula_shows_it():
    shown = Objective(0.3, T, position_fraction=0.2).formula(TASKS["causal_lm"])
    assert shown.startswith("loss = 0.3 * soft(forward_kl, T=2, 0.2 of the tokens) + 0.7 * hard")


@pytest.mark.parametrize("kept", ["logits", "hidden", "topk", "sampled"])
def test_a_cache_serves_it(kept, tmp_path):
    """An exact one as the live teacher; of all classes, top-k too."""
    exact = {"kd_alpha": 0.5, "kd_temperature": 1.0}
    live, _, _ = run(tmp_path / "live", **exact)
    more = {"topk": {"teacher_cache_k": tiny.VOCAB - 1, "teacher_cache_dtype": "float32"}}.get(kept, {})
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_cache_format": kept, **more}
    cached, _, made = run(tmp_path / "cached", **exact, **cache)
    assert made.evaluate()["eval_soft_loss"] > 0
    assert torch.allclose(cached, live, atol=1e-5) or kept == "sampled"
    assert torch.isfinite(cached).all()


@pytest.mark.parametrize("task", ["classification", "regression", "question_answering", "multi_label_classification"])
def test_tasks_without_tokens_refuse_it(task, tmp_path):
    with pytest.raises(ValueError, match=r"`kd_position_fraction` is 0.5; expected 1.0 \(the default\) for the task"):
        tiny.trainer(task, tmp_path, kd_position_fraction=0.5).train()


@pytest.mark.parametrize("value", [0, -0.1, 1.5])
def test_a_fraction_outside_its_range_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match=r"`kd_position_fraction` is .*; expected a number in \(0, 1\]"):
        tiny.arguments(tmp_path, kd_position_fraction=value)


def test_chunks_refuse_it(tmp_path):
    with pytest.raises(ValueError, match=r"`kd_position_fraction` is 0.5; expected 1.0 .*'chunks'"):
        tiny.arguments(tmp_path, kd_position_fraction=0.5, kd_cross_tokenizer="chunks")


def test_quotas_add_up_over_rows():
    generator = torch.Generator().manual_seed(1)
    mask = random_mask(generator, 8, 30)
    cuts = [0, 3, 4, 8]
    assert quota_sum(mask, 0.3) == sum(quota_sum(mask[a:b], 0.3) for a, b in pairwise(cuts))
