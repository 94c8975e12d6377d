"""A cache is read for its own teacher alone: every setting that can change an output is compared, no other is."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_trainer import CachedTeacher, DistillationTrainer
from kd_trainer.cache.identity import teacher_identity
from kd_trainer.cache.store import CacheError, read_manifest, reopen
from tests.cache.test_cached_teacher import build, cache, losses
from tests.helpers import tiny


class Net(nn.Module):
    """A teacher of the user's own, without a config."""

    def __init__(self, act: Any = None, scale: float = 2.0, eps: float = 1e-5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8, eps=eps), nn.Linear(8, tiny.CLASSES)
        self.act, self.scale, self._calls = act or nn.GELU(), scale, 0
        self.register_buffer("shift", torch.zeros(tiny.CLASSES), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        self._calls += 1
        return self.last(self.norm(self.act(self.first(features)))) * self.scale + self.shift


class Sorted(Net):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).sort(-1).values


def hooked() -> Net:
    net = Net()
    net.last.register_forward_hook(lambda module, args, output: output * 1.5)
    return net


def shifted() -> Net:
    net = Net()
    net.shift += torch.arange(tiny.CLASSES) / 100
    return net


def patched() -> Net:
    net = Net()
    forward = net.forward
    net.forward = lambda features: forward(features).flip(-1)  # type: ignore[method-assign]
    return net


def of(out: Path, teacher: Any, folder: Path, form: str = "logits", **kwargs: Any) -> Any:
    return build(
        "plain",
        out,
        pair=(tiny.models("plain")[0], teacher),
        **{**cache(folder, form, 3 if form == "topk" else None), **kwargs},
    )


OTHERS: dict[str, Any] = {
    "an activation module": lambda: Net(nn.ReLU()),
    "an activation that is near": lambda: Net(nn.GELU(approximate="tanh")),
    "an activation function": lambda: Net(torch.nn.functional.silu),
    "a scale": lambda: Net(scale=2.0001),
    "an epsilon": lambda: Net(eps=1.1e-5),
    "a class": Sorted,
    "a hook": hooked,
    "a buffer that is not saved": shifted,
    "a forward that was replaced": patched,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    for form in ("logits", "topk"):
        of(folder / "run", Net(), folder / form, form).build_teacher_cache()
    of(folder / "run", Net(), folder / "sampled", "sampled", kd_temperature=1.0).build_teacher_cache()
    return folder


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("form", ["logits", "topk", "sampled"])
def test_a_module_that_differs_is_refused(form, case, built, tmp_path):
    more = {"kd_temperature": 1.0} if form == "sampled" else {}
    with pytest.raises(CacheError, match=r"`teacher_model` is one (with|that gives other outputs for rows 0 to 7)"):
        of(tmp_path, OTHERS[case](), built / form, form, **more).train()


SAME: dict[str, Any] = {
    "the same": Net,
    "in training mode": lambda: Net().train(),
    "that was called": lambda: [net := Net(), net(torch.zeros(2, 6))][0],
    "with gradients off": lambda: Net().requires_grad_(False),
    "a copy": lambda: copy.deepcopy(Net()),
}


@pytest.mark.parametrize("case", SAME)
def test_a_module_that_is_the_same_is_taken(case, built, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "kd_trainer.training.teacher_cache.build_shards", lambda *_, **__: pytest.fail("it was built again")
    )
    found = losses(of(tmp_path, SAME[case](), built / "logits"))
    assert found == pytest.approx(losses(build("plain", tmp_path, pair=(tiny.models("plain")[0], Net()))), rel=1e-5)


def test_an_evaluation_alone_compares_the_teacher_too(built, tmp_path):
    with pytest.raises(CacheError, match="`teacher_model` is one with attributes 'scale'"):
        of(tmp_path, Net(scale=3.0), built / "logits").evaluate()


@pytest.mark.parametrize("form", ["logits", "topk", "sampled"])
def test_an_unfinished_cache_does_not_go_on_with_another_teacher(form, tmp_path, monkeypatch):
    monkeypatch.setattr("kd_trainer.cache.settings.SHARD_BYTES", 1)
    more = {"kd_temperature": 1.0} if form == "sampled" else {}
    of(tmp_path, Net(), tmp_path / "cache", form, **more).build_teacher_cache()
    folder = tmp_path / "cache/train"
    manifest = read_manifest(folder)
    reopen(folder, manifest, {0, 2})
    with pytest.raises(
        CacheError, match=r"`teacher_model` is one that gives other outputs for rows 8 to 15 than those"
    ):
        of(tmp_path, hooked(), tmp_path / "cache", form, **more).train()
    of(tmp_path, Net(), tmp_path / "cache", form, **more).build_teacher_cache()
    assert read_manifest(folder) == manifest


def test_dropout_and_the_like_are_no_part_of_it():
    student = tiny.models("causal_lm")[0]
    found = []
    for changes in ({}, {"attention_dropout": 0.5, "initializer_range": 0.1, "use_cache": False}):
        model = tiny.models("causal_lm")[1].train(bool(changes))
        for name, value in changes.items():
            setattr(model.config, name, value)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = changes.get("attention_dropout", 0.0)
        found.append(teacher_identity(model, {}, student))
    assert found[0] == found[1]


def test_the_students_base_is_the_same_under_another_adapter():
    from peft import LoraConfig, get_peft_model

    def identity(**options: Any) -> dict[str, Any]:
        student = get_peft_model(tiny.models("causal_lm")[0], LoraConfig(target_modules=["q_proj"], **options))
        return teacher_identity("adapter_off", {}, student)

    assert identity(r=2) == identity(r=4, lora_alpha=3, lora_dropout=0.5)
    merged = get_peft_model(tiny.models("causal_lm")[0], LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    live = teacher_identity(merged, {}, merged)
    next(module for module in merged.modules() if hasattr(module, "lora_A")).scaling["default"] = 3.0
    assert teacher_identity(merged, {}, merged)["attributes"] != live["attributes"]


# ---- by path ----


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny.models("classification")[1].save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def by_path(out: Path, path: Path, **kwargs: Any) -> DistillationTrainer:
    settings = {"teacher_model_name_or_path": str(path), **cache(out / "cache", "logits"), **kwargs}
    return DistillationTrainer(
        model=tiny.models("classification")[0], args=tiny.arguments(out, **settings), data_collator=tiny.pad,
        train_dataset=tiny.rows("classification"),
    )  # fmt: skip


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_files_that_change_nothing_and_files_that_do(saved, tmp_path):
    by_path(tmp_path, saved).build_teacher_cache()
    edit(saved / "config.json", transformers_version="0", hidden_dropout_prob=0.5, use_cache=False)
    (saved / "training_args.bin").write_bytes(b"x")
    by_path(tmp_path, saved).build_teacher_cache()
    edit(saved / "config.json", hidden_act="relu")
    with pytest.raises(CacheError, match="`teacher_model` is one with a config of SHA-256"):
        by_path(tmp_path, saved).train()


def test_code_that_runs_and_the_base_of_an_adapter(saved, tmp_path):
    def weights(path: Path, **kwargs: Any) -> Any:
        return teacher_identity(str(path), kwargs, nn.Linear(1, 1))["weights"]

    plain, trusted = weights(saved), weights(saved, trust_remote_code=True)
    (saved / "modeling_own.py").write_text("x = 1")
    assert weights(saved) == plain
    assert weights(saved, trust_remote_code=True) != trusted
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(saved)}))
    before = weights(adapter)
    assert before is not None
    (saved / "model.safetensors").write_bytes(b"y")
    assert weights(adapter) not in (before, None)
    shutil.rmtree(saved)
    assert weights(adapter) is None


def without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def half_of_the_shards(path: Path) -> None:
    edit_to = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(edit_to))


@pytest.mark.parametrize("lose", [without_weights, half_of_the_shards, shutil.rmtree], ids=lambda f: f.__name__)
def test_a_cache_on_a_machine_without_the_teachers_weights(lose, saved, tmp_path, caplog):
    """It is used, and one line names what was not compared; a config that is there is compared."""
    first = by_path(tmp_path, saved)
    expected = losses(first)
    lose(saved)
    with caplog.at_level(logging.WARNING):
        found = losses(by_path(tmp_path, saved))
    assert found == expected
    messages = [r.getMessage() for r in caplog.records if "not on this machine: the teacher cache" in r.getMessage()]
    assert len(messages) == 1
    assert ("config" in messages[0]) == (lose is shutil.rmtree)
    with pytest.raises(CacheError, match=r"whose weights are not on this machine; expected the name .*CachedTeacher"):
        by_path(tmp_path, tmp_path / "another").train()
    if saved.exists():
        edit(saved / "config.json", hidden_act="relu")
        with pytest.raises(CacheError, match="with a config of SHA-256"):
            by_path(tmp_path, saved).train()
    assert CachedTeacher(tmp_path / "cache").manifest["total_rows"] == 32
