"""Semantic segmentation: logits [B, C, h, w], labels [B, H, W]; losses by hand, every architecture against upstream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    ConvNextConfig,
    DPTConfig,
    DPTForSemanticSegmentation,
    MobileViTConfig,
    MobileViTForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from kd_trainer.losses.divergences import DIVERGENCES
from kd_trainer.losses.modules import SoftTargetLoss
from kd_trainer.tasks.kinds import TASKS
from kd_trainer.tasks.resolve import task_for
from kd_trainer.tasks.segmentation import covered
from kd_trainer.training.objective import LossInputs, Objective
from tests.helpers import tiny

CLASSES, SIDE, IGNORED = 3, 16, 255


def named(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


CONFIG = {**named(*(f"class {i}" for i in range(CLASSES))), "initializer_range": 0.3}  # logits that differ
LAYERS = {"num_hidden_layers": 4, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4, **tiny.NO_DROPOUT}


def segformer(hidden: int, **kwargs: Any) -> nn.Module:
    config = SegformerConfig(
        num_encoder_blocks=1, depths=[1], hidden_sizes=[hidden], num_attention_heads=[1], patch_sizes=[3], strides=[4],
        sr_ratios=[1], mlp_ratios=[2], decoder_hidden_size=hidden, drop_path_rate=0.0, classifier_dropout_prob=0.0,
        **{**tiny.NO_DROPOUT, **CONFIG, **kwargs},
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config)


def by_row(hidden: int) -> nn.Module:
    """Without the batch norm, so that a row is computed alone."""
    model: Any = segformer(hidden)
    model.decode_head.batch_norm = nn.Identity()
    return model


def upernet(hidden: int, *, auxiliary: bool = False) -> nn.Module:
    names = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ConvNextConfig(hidden_sizes=[hidden] * 4, depths=[1] * 4, patch_size=2, out_features=names)
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=hidden, pool_scales=[1, 2], use_auxiliary_head=auxiliary,
        auxiliary_channels=hidden, auxiliary_in_channels=hidden, **CONFIG,
    )  # fmt: skip
    return UperNetForSemanticSegmentation(config)


def beit(hidden: int, *, auxiliary: bool = False) -> nn.Module:
    config = BeitConfig(
        hidden_size=hidden, intermediate_size=32, out_indices=[1, 2, 3, 4], pool_scales=[1, 2], drop_path_rate=0.0,
        use_auxiliary_head=auxiliary, auxiliary_channels=hidden, **LAYERS, **CONFIG,
    )  # fmt: skip
    return BeitForSemanticSegmentation(config)


def dpt(hidden: int, *, auxiliary: bool = False) -> nn.Module:
    config = DPTConfig(
        hidden_size=hidden, intermediate_size=32, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8, use_auxiliary_head=auxiliary, semantic_classifier_dropout=0.0, **LAYERS, **CONFIG,
    )  # fmt: skip
    return DPTForSemanticSegmentation(config)


def mobilevit(hidden: int) -> nn.Module:
    config = MobileViTConfig(
        image_size=SIDE, patch_size=1, output_stride=8, hidden_sizes=[hidden] * 3, neck_hidden_sizes=[8] * 7,
        num_attention_heads=2, aspp_out_channels=8, aspp_dropout_prob=0.0, classifier_dropout_prob=0.0,
        **tiny.NO_DROPOUT, **CONFIG,
    )  # fmt: skip
    return MobileViTForSemanticSegmentation(config)


PLAIN = {"segformer": segformer, "upernet": upernet, "beit": beit, "dpt": dpt, "mobilevit": mobilevit}
# The model's own loss has a second term then.
AUXILIARY: dict[str, Any] = {
    "upernet, auxiliary head": lambda hidden: upernet(hidden, auxiliary=True),
    "beit, auxiliary head": lambda hidden: beit(hidden, auxiliary=True),
    "dpt, auxiliary head": lambda hidden: dpt(hidden, auxiliary=True),
}
BUILDS: dict[str, Any] = {**PLAIN, **AUXILIARY}


class Strided(nn.Module):
    """A model of the user's own: no batch norm, so that each row is computed alone; logits of half the resolution."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, CLASSES, 3, stride=stride, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layer(pixel_values)


def rows(count: int = 16, seed: int = 1, side: int = SIDE, *, labelled: bool = True) -> list[dict[str, torch.Tensor]]:
    """Unequal numbers of ignored pixels."""
    generator, made = torch.Generator().manual_seed(seed), []
    for i in range(count):
        row = {"pixel_values": torch.randn(3, side, side, generator=generator)}
        if labelled:
            row["labels"] = torch.randint(0, CLASSES, (side, side), generator=generator)
            row["labels"][: i % 5 * 3] = IGNORED
        made.append(row)
    return made


def distillation(folder: Any, build: Any, data: Any = None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    pair = build(8), build(16)
    if isinstance(pair[0], Strided):
        kwargs = {"kd_task": "semantic_segmentation", **kwargs}
    settings = {"kd_reduction": "tokenmean", "max_steps": 3, "per_device_train_batch_size": 4, **kwargs}
    return tiny.trainer("segmentation", folder, pair=pair, data=rows() if data is None else data, **settings)


def strided(hidden: int) -> Strided:
    return Strided()


@pytest.fixture(autouse=True)
def evaluation_rows(monkeypatch):
    of = tiny.rows
    monkeypatch.setattr(tiny, "rows", lambda task, *a, **k: rows(6, 2) if task == "segmentation" else of(task, *a, **k))


# ---- transformers' models ----


def stock(folder: Any, build: Any, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    args = tiny.stock_arguments(folder, max_steps=3, per_device_train_batch_size=4, **kwargs)
    return Trainer(model=build(8), args=args, data_collator=tiny.pad, train_dataset=rows(), eval_dataset=rows(6, 2))


# Upstream's DPT fails on labels without an auxiliary head.
@pytest.mark.parametrize("name", sorted(set(BUILDS) - {"dpt"}))
def test_alpha_zero_is_the_stock_trainer(name, tmp_path, capsys):
    run, expected = distillation(tmp_path, BUILDS[name], kd_alpha=0.0), stock(tmp_path, BUILDS[name])
    for trainer in (run, expected):
        torch.manual_seed(0)  # an auxiliary head has dropout
        trainer.train()
    assert run._plan.task.name == "semantic_segmentation"
    assert ("hard loss: the model's own" in capsys.readouterr().out) == (name in AUXILIARY)
    for key in ("loss", "grad_norm"):
        assert tiny.logged(run, key) == pytest.approx(tiny.logged(expected, key), rel=1e-4), key
    torch.testing.assert_close(tiny.weights(run.model), tiny.weights(expected.model), rtol=1e-4, atol=1e-6)
    losses = [trainer.evaluate()["eval_loss"] for trainer in (run, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    found, known = (trainer.predict(rows(5, 3)) for trainer in (run, expected))
    assert found.predictions.shape == known.predictions.shape
    torch.testing.assert_close(torch.tensor(found.predictions), torch.tensor(known.predictions), rtol=1e-4, atol=1e-4)
    assert (found.label_ids == known.label_ids).all()


@pytest.mark.parametrize("name", PLAIN)
def test_the_mixture_trains(name, tmp_path):
    """DPT as well, whose own loss fails: the task's formula is the hard loss."""
    run = distillation(tmp_path, BUILDS[name], max_steps=2)
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_soft_loss"] > 0
    assert 0.7 * metrics["eval_soft_loss"] + 0.3 * metrics["eval_hard_loss"] == pytest.approx(metrics["eval_loss"])
    assert 0 <= metrics["eval_teacher_agreement"] <= 1
    unlabelled = run.evaluate(rows(6, 2, labelled=False))
    assert "eval_hard_loss" not in unlabelled
    assert unlabelled["eval_soft_loss"] > 0


@pytest.mark.parametrize(
    ("build", "ignored"),
    [(lambda: segformer(8, semantic_loss_ignore_index=2), 2), (lambda: upernet(8), 255), (Strided, 255)],
)
def test_the_ignored_label_is_the_configs(build, ignored):
    task = task_for(build(), "semantic_segmentation", False)
    labels = torch.tensor([[[0, 1, 2, 255, -100]]])
    expected = [-100 if x in (ignored, -100) else x for x in labels.flatten().tolist()]
    assert task.targets({"labels": labels}).flatten().tolist() == expected


def test_loads_a_teacher_by_path_and_saves(tmp_path):
    torch.manual_seed(0)
    student, teacher = segformer(8), segformer(16)
    teacher.save_pretrained(tmp_path / "teacher")
    pair = student, str(tmp_path / "teacher")
    run = tiny.trainer("segmentation", tmp_path, pair=pair, data=rows(), kd_reduction="tokenmean", max_steps=1)
    run.train()
    assert type(run.teacher.model) is SegformerForSemanticSegmentation
    run.save_model(tmp_path / "saved")
    saved = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "saved")
    assert torch.equal(tiny.weights(saved), tiny.weights(run.model))


# ---- the losses, written out ----


def by_hand(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """[B, H, W]: T² KL of each pixel of the labels, from logits [B, C, h, w] repeated to their resolution."""
    repeat = SIDE // student.shape[-1]
    z, y = (
        F.log_softmax(logits.double() / temperature, 1).repeat_interleave(repeat, -1).repeat_interleave(repeat, -2)
        for logits in (student, teacher)
    )
    return temperature**2 * (y.exp() * (y - z)).sum(1)


@pytest.mark.parametrize("positions", ["labels", "attended"])
@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
def test_a_pixel_of_the_labels_has_the_losses_of_its_place(positions, reduction, tmp_path):
    run = distillation(
        tmp_path, strided, kd_positions=positions, kd_reduction=reduction, kd_temperature=2.0, max_steps=1,
        per_device_train_batch_size=8, learning_rate=1e-3,
    )  # fmt: skip
    batch = tiny.pad(rows()[:8])
    with torch.no_grad():
        z, y = (model(batch["pixel_values"]) for model in (run.model, run.teacher.model))
    labelled = batch["labels"] != IGNORED
    counted = labelled if positions == "labels" else torch.ones_like(labelled)
    soft = by_hand(z, y, 2.0)[counted]
    resized = F.interpolate(z.double(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    hard = F.cross_entropy(resized, batch["labels"], ignore_index=IGNORED, reduction="none")[labelled]
    same = (z.argmax(1) == y.argmax(1)).repeat_interleave(2, -1).repeat_interleave(2, -2)[counted].double().mean()
    run.train()
    mean = (lambda x: x.mean()) if reduction == "tokenmean" else (lambda x: x.sum() / 8)
    assert tiny.logged(run, "soft_loss") == pytest.approx([mean(soft).item()], rel=1e-5)
    assert tiny.logged(run, "hard_loss") == pytest.approx([mean(hard).item()], rel=1e-5)
    assert tiny.logged(run, "loss") == pytest.approx([(0.7 * mean(soft) + 0.3 * mean(hard)).item()], rel=1e-5)
    assert tiny.logged(run, "teacher_agreement") == pytest.approx([same.item()], rel=1e-5)


@pytest.mark.parametrize("reduction", ["batchmean", "tokenmean"])
def test_accumulation_changes_nothing(reduction, tmp_path):
    found = []
    for accumulate in (1, 4):
        batches = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
        run = distillation(tmp_path, strided, kd_reduction=reduction, learning_rate=1e-3, **batches)
        run.train()
        found.append((tiny.weights(run.model), tiny.logs(run)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for key, values in found[0][1].items():
        assert found[1][1][key] == pytest.approx(values, rel=1e-5), key


def test_padding_of_an_image_has_no_soft_loss(tmp_path):
    run, losses = distillation(tmp_path, strided, kd_alpha=1.0, max_steps=1), []
    for wider in (0, 8):
        batch = tiny.pad(rows()[:4])
        batch["pixel_values"] = F.pad(batch["pixel_values"], (0, wider, 0, wider))
        batch["labels"] = F.pad(batch["labels"], (0, wider, 0, wider), value=IGNORED)
        losses.append(run.compute_loss(run.model, batch))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_has_its_gradient(divergence):
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 2, 2, 3, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (2, 4, 6), generator=generator)
    labels[0, :3] = IGNORED
    task, batch = TASKS["semantic_segmentation"], {"pixel_values": torch.zeros(2, 3, 4, 6), "labels": labels}
    objective = Objective(0.7, 2.0, divergence, reduction="tokenmean")
    counts = objective.count(task, batch)
    assert (int(counts.hard), int(counts.soft), counts.rows) == (30, 30, 2)
    soft_loss = SoftTargetLoss(temperature=2.0, divergence=divergence, reduction="sum")
    given = LossInputs(task, batch, counts)
    loss = lambda z: objective(given, soft_loss, z, y).total  # noqa: E731
    assert torch.autograd.gradcheck(loss, (z.requires_grad_(),))
    # Each pixel of the labels written out, with the label in the middle of the logits' pixel for those that need one.
    entry, nats = DIVERGENCES[divergence], 0.0
    for b, i, j in (labels != IGNORED).nonzero().tolist():
        here = {"labels": labels[b, i // 2 * 2 + 1, j // 2 * 2 + 1]} if entry.needs_labels else {}
        here = {name: x.masked_fill(x == IGNORED, -100)[None] for name, x in here.items()}
        nats += entry(z[b, i // 2, j // 2][None], y[b, i // 2, j // 2][None], temperature=2.0, **here).sum()
    parts = objective(given, soft_loss, z, y)
    torch.testing.assert_close(parts.soft, (nats if entry.of_logits else 4 * nats) / 30)


def test_a_batch_without_any_label_has_a_gradient_path():
    task, objective = TASKS["semantic_segmentation"], Objective(0.7, 2.0, reduction="tokenmean")
    batch = {"pixel_values": torch.ones(1, 3, 4, 4), "labels": torch.full((1, 4, 4), IGNORED)}
    z = torch.full((1, 2, 2, CLASSES), torch.nan, requires_grad=True)  # what is not counted may be anything
    soft_loss = SoftTargetLoss(temperature=2.0, reduction="sum")
    parts = objective(LossInputs(task, batch, objective.count(task, batch)), soft_loss, z, z.detach())
    assert float(parts.soft.detach()) == 0
    (gradient,) = torch.autograd.grad(parts.soft, z)
    assert not gradient.any()


@pytest.mark.parametrize(("side", "few"), [(16, 4), (15, 4), (7, 7), (5, 8), (9, 1)])
def test_each_counted_pixel_is_covered_once(side, few):
    mask = torch.rand(2, side, side + 2, generator=torch.Generator().manual_seed(0)) < 0.6
    weights = covered(mask, torch.zeros(2, few, few, CLASSES))
    assert weights.sum((1, 2)).tolist() == mask.sum((1, 2)).tolist()
    for y, x in [(0, 0), (side - 1, side + 1)]:
        one = torch.zeros_like(mask)
        one[0, y, x] = True
        place = int((y + 0.5) * few / side), int((x + 0.5) * few / (side + 2))
        assert covered(one, torch.zeros(2, few, few, CLASSES))[0].nonzero().tolist() == [[*place]]


# ---- caches and errors ----


def test_the_overlap_counts_pixels_of_the_labels():
    """As the agreement: each pixel of the logits by the counted pixels that it covers; the others may be NaN."""
    z_s, z_t = torch.randn(2, 2, 2, 3, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, :2, :2] = False
    z_t[0, 0, 0] = torch.nan
    expected = 0.0
    for image, y, x in mask.nonzero().tolist():
        s, t = (z[image, y // 2, x // 2] for z in (z_s, z_t))
        expected += t.softmax(-1)[s.topk(20).indices].sum().item()
    assert TASKS["semantic_segmentation"].overlap_sum(z_s, z_t, mask, 1.0).item() == pytest.approx(expected, rel=1e-6)


def test_a_cache_of_its_maps_is_the_live_teacher(tmp_path):
    live = distillation(tmp_path / "live", strided)
    cached = distillation(tmp_path / "cached", strided, teacher_cache_dir=str(tmp_path / "cache"))
    for run in (live, cached):
        run.train()
    for key, values in tiny.logs(live).items():
        assert tiny.logged(cached, key) == pytest.approx(values, rel=1e-5), key
    torch.testing.assert_close(tiny.weights(cached.model), tiny.weights(live.model))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda labels: labels[0], r"`labels` is of shape \(4, 16\); expected \(4, height, width\)"),
        (lambda labels: labels.float(), r"`labels` is of dtype torch.float32 .*; expected integer"),
        (lambda labels: labels + 1, r"`labels` is 3 at position .*; expected 0 to 2"),
    ],
)
def test_labels_that_are_no_maps_of_classes_are_refused(change, match, tmp_path):
    with pytest.raises((ValueError, TypeError), match=match):
        distillation(tmp_path, strided, [{**row, "labels": change(row["labels"])} for row in rows()]).train()


def test_what_does_not_fit_is_refused(tmp_path):
    pair = Strided(), Strided(4)
    settings = {"kd_task": "semantic_segmentation", "data": rows(), "kd_reduction": "tokenmean"}
    match = "`teacher_model` is giving logits for 4 pixel rows; expected 8, the student's"
    with pytest.raises(ValueError, match=match):
        tiny.trainer("segmentation", tmp_path, pair=pair, **settings).train()
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` is 0\.1; expected 0 for the task 'semantic_segm"):
        distillation(tmp_path, segformer, label_smoothing_factor=0.1).train()
    one = [{**row, "labels": torch.zeros(SIDE, SIDE).long()} for row in rows()]
    with pytest.raises(ValueError, match="`num_labels` is 1; expected 2 classes or more"):
        distillation(tmp_path, lambda hidden: segformer(hidden, **named("one")), one).train()
    other = segformer(8, **named("class 1", "class 0", "class 2"))
    with pytest.raises(ValueError, match="class 0"):
        tiny.trainer("segmentation", tmp_path, pair=(segformer(8), other), data=rows())


def test_check_finds_nothing_wrong(tmp_path):
    rows_of_it = {row[1]: row for row in distillation(tmp_path, strided).check()}
    assert {what for what, row in rows_of_it.items() if row.status != "ok"} <= {"teacher's quality"}  # untrained
    assert rows_of_it["labels"].found == "736 of 1024 positions have one"
    by_row = {row[1]: row for row in distillation(tmp_path, strided, kd_reduction="batchmean").check()}
    assert "batchmean sums over the pixels of a row: the loss is about 184 times" in by_row["reduction"].found
