"""The cache of a mixture of teachers: the live mixture's loss, at one temperature, of the same teachers alone."""

from __future__ import annotations

import copy
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_trainer import CachedTeacher
from kd_trainer.cache import CacheError
from kd_trainer.cache import build as cache_build
from kd_trainer.cache import settings as cache_settings
from kd_trainer.cache.manifest import write_json
from kd_trainer.losses import top_k
from kd_trainer.tasks import output_head as output_head
from tests.helpers import tiny
from tests.teachers.test_several import assert_same, run, several, trained, with_ids

WEIGHTS = {"teacher_weights": [3, 1], "per_device_eval_batch_size": 4}


def build(folder: Path, task: str = "causal_lm", teachers: Any = None, **kwargs: Any) -> CachedTeacher:
    settings = {**WEIGHTS, "teacher_cache_dir": str(folder), **kwargs}
    return run(task, several(task) if teachers is None else teachers, **settings).build_teacher_cache()


@pytest.mark.parametrize(
    ("task", "way"),
    [("causal_lm", "fused"), *((task, "full") for task in ("causal_lm", "classification", "multi_label_classification",
                                                           "question_answering", "regression"))],
)  # fmt: skip
def test_the_cached_mixture_is_the_live_one(task, way, tmp_path, monkeypatch):
    monkeypatch.setattr(output_head, "SMALL_VOCABULARY", 0 if way == "fused" else output_head.SMALL_VOCABULARY)
    teachers, options = several(task), {"kd_loss_implementation": way} if task == "causal_lm" else {}
    live = trained(task, teachers, **WEIGHTS, **options)
    read = trained(task, teachers, teacher_cache_dir=str(tmp_path), **WEIGHTS, **options)
    assert_same(live, read)
    assert isinstance(read.teacher, CachedTeacher)
    assert (read._plan.heads is not None) == (way == "fused")
    assert read.teacher.format.temperature == (None if task == "regression" else read.args.kd_temperature)
    found, expected = read.evaluate(), live.evaluate()
    assert found["eval_soft_loss"] == pytest.approx(expected["eval_soft_loss"], rel=1e-5)
    assert found.get("eval_teacher_agreement") == pytest.approx(expected.get("eval_teacher_agreement"), abs=1e-6)
    assert found.get("eval_overlap") == pytest.approx(expected.get("eval_overlap"), abs=1e-6)
    alone = trained(task, CachedTeacher(tmp_path), per_device_eval_batch_size=4, **options)
    assert_same(live, alone)


def test_routed_rows_are_cached_as_their_teachers(tmp_path):
    """By name; the collator of the script is given no names, and another route of a row is noticed."""
    student, teachers = tiny.models("causal_lm")[0], several("causal_lm", 3)
    data, options = tiny.rows("causal_lm"), {"teacher_names": ["a", "a", "b"], "kd_reduction": "tokenmean"}
    routed = with_ids(data, ["a", "b", 0, 1, 2])
    made = []
    for more in ({}, {"teacher_cache_dir": str(tmp_path / "cache")}):
        pair = (copy.deepcopy(student), teachers)
        made.append(tiny.trainer("causal_lm", tmp_path / "a", pair=pair, data=routed, **options, **more))
    for each in made:
        each.train()
    assert_same(*made)
    cached = CachedTeacher(tmp_path / "cache")
    alone = tiny.trainer("causal_lm", tmp_path / "c", pair=(copy.deepcopy(student), cached), data=routed,
                         kd_reduction="tokenmean")  # fmt: skip
    alone.train()
    assert_same(made[0], alone)
    other = tiny.trainer("causal_lm", tmp_path / "d", pair=(copy.deepcopy(student), cached),
                         data=with_ids(data, ["b", "a", 0, 1, 2]), kd_reduction="tokenmean")  # fmt: skip
    with pytest.raises(CacheError, match=r"row 0 (that )?differs"):
        other.train()


@pytest.mark.parametrize("kept", ["topk", "sampled"])
def test_sparse_formats_are_of_the_mixture_at_its_temperature(kept, tmp_path):
    teachers = several("causal_lm")
    k = {"topk": 5, "sampled": 20}[kept]
    cached = build(tmp_path, teachers=teachers, teacher_cache_format=kept, teacher_cache_k=k)
    rows = cached.parts["train"].take(list(range(32))).columns
    expected = []
    for row in tiny.rows("causal_lm"):
        batch = tiny.pad([row])
        mask = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100
        with torch.no_grad():
            z = [m.eval()(batch["input_ids"], batch["attention_mask"]).logits[mask] for m in teachers]
        expected.append(2 * (0.75 * (z[0] / 2).softmax(-1) + 0.25 * (z[1] / 2).softmax(-1)).log())
    mixture = torch.cat(expected)
    if kept == "topk":
        found = top_k(mixture, k, temperature=2.0)
        assert torch.equal(torch.from_numpy(rows["ids"].astype("int64")), found.ids)
        torch.testing.assert_close(torch.from_numpy(rows["log_probs"]).float(), found.log_probs, atol=1e-3, rtol=1e-3)
    else:
        p = (mixture / 2).softmax(-1)
        entropy = torch.from_numpy(rows["entropy"]).squeeze(-1)
        torch.testing.assert_close(entropy, -(p * p.log()).sum(-1), atol=1e-5, rtol=1e-5)


def test_the_start_of_what_is_kept_and_shown(tmp_path):
    cached = build(tmp_path, teacher_names=["one", "two"])
    noted = json.loads((tmp_path / "train/manifest.json").read_text())["teacher"]
    assert noted["name"] == "0.75 * LlamaForCausalLM + 0.25 * LlamaForCausalLM"
    assert [(one["weight"], one["teacher_id"], one["parameters"]) for one in noted["teachers"]] == [
        (0.75, "one", 7608), (0.25, "two", 7608)]  # fmt: skip
    assert noted["parameters"] == 2 * 7608
    assert "(logits, T 2;" in cached.describe()
    assert "logits at temperature 2, float32" in (tmp_path / "train/README.md").read_text()


# ---- what differs is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_temperature": 1.0}, r"`kd_temperature` is 1.0; expected 2, for which the teacher cache was built"),
        ({"kd_schedule": "linear", "kd_temperature_end": 4.0}, r"`kd_temperature` is 4.0; expected 2"),
        ({"kd_divergence": "logit_mse"}, "`kd_divergence` is 'logit_mse'; expected a divergence of probabilities"),
        ({"kd_standardize_logits": True}, "`kd_standardize_logits` is True; expected False with several teachers"),
    ],
)
def test_another_loss_than_the_one_of_the_building(settings, message, tmp_path):
    teachers = several("causal_lm")
    build(tmp_path, teachers=teachers)
    for given, more in ((CachedTeacher(tmp_path), {}), (teachers, {**WEIGHTS, "teacher_cache_dir": str(tmp_path)})):
        with pytest.raises(ValueError, match=message):
            trained("causal_lm", given, **more, **settings)


def test_other_teachers_weights_and_names(tmp_path):
    teachers = several("causal_lm")
    build(tmp_path, teachers=teachers)
    other = copy.deepcopy(teachers[1])
    other.lm_head.weight.data += 1
    for given, settings, message in (
        (teachers, {"teacher_weights": [1, 3]}, r"`teacher_weights` is one with the values \[0.25, 0.75\]"),
        (teachers, {"teacher_names": ["a", "b"]}, "`teacher_names` is one with the values"),
        ([teachers[0], other], {}, r"`teacher_model\[1\]` is one with weights of SHA-256"),
        ([*teachers, other], {"teacher_weights": [3, 1, 1]}, "`teacher_weights` is one with the values"),
        (teachers[0], {"teacher_weights": None}, "`teacher_model` is one with given as a 'module'"),
    ):
        with pytest.raises(CacheError, match=message):
            trained("causal_lm", given, **{**WEIGHTS, "teacher_cache_dir": str(tmp_path), **settings})


def test_what_a_mixture_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`teacher_cache_format` is 'hidden'; expected 'logits', 'topk' or 'sampled'"):
        build(tmp_path / "a", teacher_cache_format="hidden")
    one = run("causal_lm", several("causal_lm")[0], teacher_cache_dir=str(tmp_path / "b")).build_teacher_cache()
    with pytest.raises(ValueError, match=r"`teacher_cache_dir` is '.*'; expected None with a CachedTeacher among"):
        build(tmp_path / "c", teachers=[one, several("causal_lm")[1]])
    for settings in ({"kd_divergence": "logit_mse"}, {"kd_schedule": "linear", "kd_temperature_end": 4.0}):
        with pytest.raises(ValueError, match=r"`kd_(divergence|temperature)` is"):
            build(tmp_path / "d", **settings)
    assert not list(tmp_path.glob("[acd]/**/*.arrow"))


@pytest.mark.parametrize("teachers", ["x", [], [{"weight": 1.0}], [{"weight": -1.0}, {"weight": 1}], [{}, {}],
                                      [{"weight": 1, "teacher_id": 3}] * 2])  # fmt: skip
def test_a_manifest_with_other_teachers_is_refused(teachers, tmp_path):
    build(tmp_path)
    path = tmp_path / "train/manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    content["teacher"]["teachers"] = teachers
    write_json(path, content)
    with pytest.raises(CacheError, match=r"for 'teacher.teachers'; expected a list of objects with a weight"):
        CachedTeacher(tmp_path)


# ---- interruptions, paths, more data ----


def content(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}
    return {name: path.read_bytes() for name, path in found.items()}


def test_an_interrupted_building_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_settings, "SHARD_BYTES", 1)
    teachers, write, left = several("causal_lm"), cache_build.write_shard, [0]
    build(tmp_path / "whole", teachers=teachers)
    whole = content(tmp_path / "whole")
    assert sum(name.endswith(".arrow") for name in whole) == 14

    def cut(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("no room")
        write(*args)

    monkeypatch.setattr(cache_build, "write_shard", cut)
    for count in (2, 3):
        left[0] = count
        with pytest.raises(RuntimeError, match="`teacher_cache_dir`"):
            build(tmp_path / "cut", teachers=teachers)
    other = [copy.deepcopy(teachers[0]), teachers[1]]
    other[0].lm_head.weight.data += 1
    left[0] = 100
    with pytest.raises(CacheError, match=r"`teacher_model\[0\]` is one with weights"):
        build(tmp_path / "cut", teachers=other)
    build(tmp_path / "cut", teachers=teachers)
    assert left[0] == 100 - (14 - 2 - 3)
    assert content(tmp_path / "cut") == whole


def test_paths_are_not_loaded_where_the_cache_is_finished(tmp_path):
    teachers = several("classification")
    for i, teacher in enumerate(teachers):
        teacher.save_pretrained(tmp_path / str(i))
    settings = {**WEIGHTS, "teacher_model_name_or_path": [str(tmp_path / "0"), str(tmp_path / "1")]}
    kwargs = {"teacher_model_init_kwargs": [{"dtype": "float32"}, {}], "teacher_cache_dir": str(tmp_path / "cache")}
    built = trained("classification", None, **settings, **kwargs)
    read = run("classification", None, **settings, **kwargs)
    assert isinstance(read.teacher, CachedTeacher)
    read.train()
    assert_same(built, read)
    kwargs["teacher_model_init_kwargs"] = [{"dtype": "bfloat16"}, {}]
    with pytest.raises(CacheError, match=r"`teacher_model_init_kwargs` is one with"):
        trained("classification", None, **settings, **kwargs)


def test_more_data_is_added_while_the_script_holds_the_teachers(tmp_path):
    teachers, more = several("causal_lm"), tiny.rows("causal_lm", 6, seed=9)
    made = run("causal_lm", teachers, teacher_cache_dir=str(tmp_path), **WEIGHTS)
    made.train()
    loose = made.evaluate(tiny.rows("causal_lm", 5, seed=8))["eval_soft_loss"]  # run at hand
    assert loose > 0
    made.build_teacher_cache(more, name="more")
    assert len(CachedTeacher(tmp_path).parts["test-more"]) == 6
    del teachers
    gc.collect()
    with pytest.raises(RuntimeError, match="`teacher_model` is a module that was deleted"):
        made.build_teacher_cache(tiny.rows("causal_lm", 6, seed=10), name="later")
    assert os.path.isdir(tmp_path / "test-more")
