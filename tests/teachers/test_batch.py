"""`teachers/batch.py`: floating inputs in the teacher's dtype, and a teacher that writes into what it is given."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from kd_trainer import DistillationTrainer, MLPConfig, MLPForImageClassification
from kd_trainer.teachers.live import LiveTeacher
from tests.helpers import tiny

PLAIN = SimpleNamespace(mixed_precision="no")


def wav2vec2():
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=[8, 8],
            conv_kernel=[10, 3], conv_stride=[5, 2], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            classifier_proj_size=16, num_labels=tiny.CLASSES, do_stable_layer_norm=True, feat_extract_norm="layer",
        )
    )  # fmt: skip


MODELS = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=tiny.CLASSES)
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, num_labels=tiny.CLASSES)
    ),
    "mobilenet": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.1, image_size=32, num_labels=tiny.CLASSES)
    ),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[2], window_size=4, num_labels=tiny.CLASSES)
    ),
    "vit": lambda: tiny.vit(32),
    "mlp": lambda: MLPForImageClassification(MLPConfig(num_features=6, hidden_sizes=[8], num_labels=tiny.CLASSES)),
    "wav2vec2": wav2vec2,
}
INPUTS = {"mlp": ("features", (6,)), "wav2vec2": ("input_values", (400,))}


def data(name: str, count: int = 8) -> list[dict]:
    column, shape = INPUTS.get(name, ("pixel_values", (3, 32, 32)))
    generator = torch.Generator().manual_seed(0)
    return [{column: torch.randn(shape, generator=generator), "labels": i % tiny.CLASSES} for i in range(count)]


def collate(rows: list[dict]) -> dict:
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def train(name: str, folder, student, teacher, **kwargs):
    run = DistillationTrainer(
        model=student, teacher_model=teacher, args=tiny.arguments(folder, max_steps=1, **kwargs),
        data_collator=collate, train_dataset=data(name), eval_dataset=data(name),
    )  # fmt: skip
    run.train()
    return run


# ---- dtypes ----


@pytest.mark.parametrize("name", MODELS)
def test_a_half_precision_teacher_by_path(name, tmp_path):
    torch.manual_seed(0)
    student, teacher = MODELS[name](), MODELS[name]()
    teacher.save_pretrained(tmp_path / "teacher")
    live = tiny.logged(train(name, tmp_path / "full", copy.deepcopy(student), teacher), "soft_loss")[0]
    half = train(
        name, tmp_path / "half", student, str(tmp_path / "teacher"), teacher_model_init_kwargs={"dtype": "bfloat16"}
    )
    assert next(half.teacher.model.parameters()).dtype == torch.bfloat16
    assert tiny.logged(half, "soft_loss")[0] == pytest.approx(live, rel=0.1, abs=0.02)
    assert next(student.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_dtype_with_and_without_autocast(dtype, bf16, tmp_path):
    torch.manual_seed(0)
    student, teacher = MODELS["mlp"](), MODELS["mlp"]()
    expected = tiny.logged(train("mlp", tmp_path / "a", copy.deepcopy(student), copy.deepcopy(teacher)), "soft_loss")[0]
    run = train("mlp", tmp_path / "b", student, teacher.to(dtype), bf16=bf16)
    assert tiny.logged(run, "soft_loss")[0] == pytest.approx(expected, rel=0.05, abs=0.01)


def test_a_cache_check_and_evaluation_too(tmp_path):
    torch.manual_seed(0)
    student, teacher = MODELS["mlp"](), MODELS["mlp"]().to(torch.bfloat16)
    run = DistillationTrainer(
        model=student, teacher_model=teacher, args=tiny.arguments(tmp_path, max_steps=1), data_collator=collate,
        train_dataset=data("mlp"), eval_dataset=data("mlp"),
    )  # fmt: skip
    rows = run.check()
    assert not [row for row in rows if row.status == "error"]
    assert not [row for row in rows if "dtype" in row.found and row.what == "memory"]
    live = run.evaluate()["eval_soft_loss"]
    kept = train("mlp", tmp_path, student, teacher, teacher_cache_dir=str(tmp_path / "cache"), learning_rate=0.0)
    assert kept.evaluate()["eval_soft_loss"] == pytest.approx(live, rel=1e-4)


class Records(nn.Module):
    """A teacher that keeps the dtypes of its inputs."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.linear = nn.Linear(6, tiny.CLASSES, dtype=dtype)
        self.seen: dict = {}

    def forward(self, features, extra=None, **others):
        self.seen = {"features": features.dtype, "extra": extra, **others}
        return self.linear(features)


def run_teacher(model: nn.Module, batch: dict, teacher: LiveTeacher | None = None, accelerator=PLAIN):
    teacher = teacher or LiveTeacher(model)
    teacher.prepare(torch.device("cpu"), None)
    return teacher.outputs(batch, accelerator)


def test_nested_inputs_are_cast_and_whole_numbers_are_not(monkeypatch):
    monkeypatch.setattr("kd_trainer.teachers.live.prepare_teacher", lambda model, device, accelerator: model)
    features, inner = torch.randn(2, 6), torch.randn(2)
    nested = {"a": [inner, torch.arange(2)], "b": (inner > 0, None, "text"), "c": {"d": inner}}
    model = Records()
    run_teacher(model, {"features": features, "extra": nested, "ids": torch.arange(2), "flag": True})
    seen = model.seen["extra"]
    assert model.seen["features"] == seen["a"][0].dtype == seen["c"]["d"].dtype == torch.bfloat16
    assert (seen["a"][1].dtype, seen["b"][0].dtype, seen["b"][1:]) == (torch.int64, torch.bool, (None, "text"))
    assert model.seen["ids"].dtype == torch.int64
    assert model.seen["flag"] is True
    assert inner.dtype == features.dtype == torch.float32
    assert nested["a"][0] is inner


def test_an_additive_mask_stays_finite(monkeypatch):
    monkeypatch.setattr("kd_trainer.teachers.live.prepare_teacher", lambda model, device, accelerator: model)
    mask = torch.full((2, 1, 1, 6), torch.finfo(torch.float32).min)
    model = Records(torch.float16)
    run_teacher(model, {"features": torch.randn(2, 6), "attention_mask": mask})
    assert model.seen["attention_mask"].isfinite().all()


class Mixed(nn.Module):
    """The first parameter is not of the layer that reads the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(tiny.CLASSES))
        self.linear = nn.Linear(6, tiny.CLASSES, dtype=torch.bfloat16)
        self.calls = 0

    def forward(self, features):
        self.calls += 1
        return self.linear(features).float() * self.scale


def test_modules_of_several_dtypes_are_tried_once(tmp_path):
    teacher = Mixed()
    run = tiny.trainer("plain", tmp_path, pair=(tiny.Plain(), teacher), max_steps=3)
    run.train()
    assert teacher.calls == 5  # the first batch twice, of which once failed, and once in each step
    assert len(tiny.logged(run, "soft_loss")) == 3


def test_an_error_of_the_teachers_own_is_passed_on(monkeypatch):
    monkeypatch.setattr("kd_trainer.teachers.live.prepare_teacher", lambda model, device, accelerator: model)

    class Fails(Mixed):
        def forward(self, features):
            self.calls += 1
            raise RuntimeError("something else")

    model = Fails()
    with pytest.raises(RuntimeError, match="something else"):
        run_teacher(model, {"features": torch.randn(2, 6)})
    assert model.calls == 1


# ---- a teacher that writes into its inputs ----


class Writes(nn.Module):
    """Changes its inputs in one of several ways and returns what `tiny.Plain` would for what it was given."""

    def __init__(self, how: str, since: int = 0) -> None:
        super().__init__()
        self.linear, self.how, self.since, self.calls = nn.Linear(6, tiny.CLASSES), how, since, 0

    def forward(self, features, extra=None):
        logits = self.linear(features)
        self.calls += 1
        if self.calls <= self.since or (self.training and self.how == "in eval mode"):
            return logits
        if self.how in ("in place", "in eval mode"):
            features.mul_(0)
        elif self.how == "a view":
            features.view(-1)[::2].zero_()
        elif self.how == "a slice":
            features[0, 0] = 9.0
        elif self.how == ".data":
            features.data.zero_()
        elif self.how == "numpy":
            features.numpy()[:] = 0
        elif self.how == "nested":
            extra.pop("gone", None)
            extra["list"].append(1)
            extra["tensor"].zero_()
        return logits


WAYS = ["in place", "a view", "a slice", ".data", "numpy"]


@pytest.mark.parametrize("how", WAYS)
def test_the_student_reads_the_batch_as_it_came(how, tmp_path):
    torch.manual_seed(0)
    student, teacher = tiny.Plain(), Writes("")
    clean = tiny.trainer("plain", tmp_path, pair=(copy.deepcopy(student), copy.deepcopy(teacher)))
    clean.train()
    teacher.how = how
    run = tiny.trainer("plain", tmp_path, pair=(student, teacher))
    run.train()
    assert tiny.logs(run) == tiny.logs(clean)
    assert torch.equal(tiny.weights(run.model), tiny.weights(clean.model))
    assert run.evaluate()["eval_loss"] == clean.evaluate()["eval_loss"]


@pytest.mark.parametrize("how", ["in place", "numpy"])
def test_check_and_cache_read_it_as_it_came_too(how, tmp_path):
    torch.manual_seed(0)
    student, teacher = tiny.Plain(), Writes("")

    looked_at = ("loss", "gradient", "split", "soft and hard", "teacher's quality")

    def found(folder, **kwargs):
        run = tiny.trainer("plain", folder, pair=(copy.deepcopy(student), teacher), **kwargs)
        rows = [(row.what, row.found) for row in run.check() if row.what in looked_at]
        run.train()
        return rows, tiny.logs(run)

    clean = found(tmp_path / "a"), found(tmp_path / "b", teacher_cache_dir=str(tmp_path / "one"))
    teacher = copy.deepcopy(teacher)
    teacher.how = how
    assert (found(tmp_path / "c"), found(tmp_path / "d", teacher_cache_dir=str(tmp_path / "two"))) == clean


def test_nested_containers_are_the_teachers_own(monkeypatch):
    monkeypatch.setattr("kd_trainer.teachers.live.prepare_teacher", lambda model, device, accelerator: model)
    extra = {"gone": 1, "list": [2], "tensor": torch.ones(2)}
    teacher = LiveTeacher(Writes("nested"))
    for _ in range(2):
        run_teacher(teacher.model, {"features": torch.randn(2, 6), "extra": extra}, teacher)
    assert (extra["gone"], extra["list"], extra["tensor"].tolist()) == (1, [2], [1.0, 1.0])


def test_writing_later_than_on_the_first_batch_is_refused(tmp_path):
    run = tiny.trainer("plain", tmp_path, pair=(tiny.Plain(), Writes("in place", since=2)))
    with pytest.raises(RuntimeError, match=r"writes into its input 'features'; expected .*because the student reads"):
        run.train()


def test_no_copy_is_made_for_a_teacher_that_does_not_write(monkeypatch):
    monkeypatch.setattr("kd_trainer.teachers.live.prepare_teacher", lambda model, device, accelerator: model)
    seen = []

    class Looks(tiny.Plain):
        def forward(self, features):
            seen.append(features)
            return super().forward(features)

    teacher, features = LiveTeacher(Looks()), torch.randn(2, 6)
    features[0, 0] = torch.nan
    for _ in range(3):
        run_teacher(teacher.model, {"features": features}, teacher)
    assert all(x is features for x in seen)


def test_inference_tensors_have_no_version(monkeypatch):
    monkeypatch.setattr("kd_trainer.teachers.live.prepare_teacher", lambda model, device, accelerator: model)
    with torch.inference_mode():
        features = torch.ones(2, 6)
    teacher = LiveTeacher(Writes("in place", since=1))
    for _ in range(3):
        run_teacher(teacher.model, {"features": features}, teacher)
    assert features.eq(1).all()


def test_an_adapter_student_that_writes(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    student, clean = Writes("in eval mode"), Writes("")
    clean.load_state_dict(student.state_dict())
    logged = []
    for model in (student, clean):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["linear"], init_lora_weights=False))
        run = tiny.trainer("plain", tmp_path, pair=(adapted, "adapter_off"), kd_task="classification", max_steps=1)
        run.train()
        logged.append(tiny.logs(run))
    assert logged[0] == logged[1]
