"""Evaluation data of any name, and data that was not there when the cache was built: `predict` has a soft loss."""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from kd_trainer import CachedTeacher, DistillationTrainer
from kd_trainer.cache.cached_teacher import part_of
from kd_trainer.cache.store import CacheError
from tests.cache.test_cached_teacher import build, cache
from tests.helpers import cache_more_run, launch, tiny

NAMES: list[Any] = ["glue/dev", "../x", "..", ".", "", " ", "a b", "ü", "MNLI", "mnli", "a:b", "a\\b", "con", "x" * 300,
                    1, "1", "a\0b", "glue_dev", "-", "test", "train", "eval", ("a", 1)]  # fmt: skip


def test_names_and_folders():
    parts = [part_of("eval", name) for name in NAMES]
    assert len({part.casefold() for part in parts}) == len(NAMES)
    for part in parts:
        assert Path(part).name == part
        assert part.startswith("eval-")
        assert len(part) < 120
        assert part.isascii()
        assert part.isprintable()
    assert part_of("eval", "matched") == "eval-matched"
    assert part_of("eval", part_of("", "a/b")[1:]) != part_of("eval", "a/b"), "no name is another one's folder"


@pytest.mark.parametrize(
    "some", [["glue/dev", "GLUE/dev", "glue_dev"], ["../x", "", " "], ["1", "ü", "x" * 200]], ids=str
)
def test_evaluation_data_of_any_name_is_found(some, tmp_path):
    """As many rows in each, so that the number of rows does not identify them."""
    sets = {name: tiny.rows("classification", 9, seed=i + 3) for i, name in enumerate(some)}
    found = []
    for more in ({}, cache(tmp_path / "cache", "logits")):
        trainer = build("classification", tmp_path / "run", max_steps=1, **more)
        trainer.eval_dataset = sets
        trainer.train()
        found.append(trainer.evaluate())
    assert not [p for p in tmp_path.iterdir() if p.name not in ("cache", "run")], "nothing is written outside"
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 4
    for name in some:
        assert found[1][f"eval_{name}_soft_loss"] == pytest.approx(found[0][f"eval_{name}_soft_loss"], rel=1e-5)
    again = build(
        "classification", tmp_path / "run", pair=(tiny.models("classification")[0], CachedTeacher(tmp_path / "cache"))
    )
    again.eval_dataset = sets
    for name in some:
        assert f"eval_{name}_soft_loss" in again.evaluate()


# ---- predict ----


def held_out(task: str = "classification") -> list[dict[str, Any]]:
    return tiny.rows(task, 13, seed=7)


def metrics(trainer: Any, data: Any) -> dict[str, float]:
    kept = ("_loss", "_agreement", "_perplexity")
    return {name: value for name, value in trainer.predict(data).metrics.items() if name.endswith(kept)}


def live_metrics(task: str, out: Path, data: Any, **more: Any) -> dict[str, float]:
    trainer = build(task, out, **more)
    trainer.train()
    return metrics(trainer, data)


def saved(task: str, out: Path) -> dict[str, Any]:
    """The teacher by path: no module is at hand."""
    tiny.models(task)[1].save_pretrained(out / "teacher")
    return {"pair": (tiny.models(task)[0], str(out / "teacher"))}


@pytest.mark.parametrize(
    ("how", "when", "task", "form"),
    [
        ("module", "before", "classification", "logits"),
        ("path", "after", "classification", "logits"),
        ("module", "after", "causal_lm", "hidden"),
        ("path", "before", "causal_lm", "hidden"),
        ("module", "before", "causal_lm", "logits"),
    ],
)
def test_predict_after_a_cache_of_its_data(how, when, task, form, tmp_path, monkeypatch):
    data, expected = held_out(task), live_metrics(task, tmp_path / "live", held_out(task))
    given = saved(task, tmp_path) if how == "path" else {"pair": tiny.models(task)}
    trainer = build(task, tmp_path / "run", **given, **cache(tmp_path / "cache", form))
    if when == "before":
        trainer.build_teacher_cache(data)
    trainer.train()
    if when == "after":
        trainer.build_teacher_cache(data)
    monkeypatch.setattr(trainer._setup, "load_live", lambda _: pytest.fail("the teacher was run"))
    assert metrics(trainer, data) == pytest.approx(expected, rel=1e-4)
    assert metrics(trainer, held_out(task)) == pytest.approx(expected, rel=1e-4), "known by its rows"
    assert {p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()} == {"train", "eval", "test"}
    reader = build(task, tmp_path / "run", pair=(trainer.model, CachedTeacher(tmp_path / "cache")))
    assert metrics(reader, held_out(task)) == pytest.approx(expected, rel=1e-4)


def test_several_further_data(tmp_path):
    trainer = build(
        "classification", tmp_path / "run", **saved("classification", tmp_path), **cache(tmp_path / "c", "logits")
    )
    trainer.train()
    sets = {"a/b": tiny.rows("classification", 9, seed=3), "c": tiny.rows("classification", 9, seed=4)}
    trainer.build_teacher_cache(sets["c"])
    trainer.build_teacher_cache(sets["a/b"], name="a/b")
    with pytest.raises(CacheError, match=r"`dataset` is one whose row 0 differs"):
        trainer.build_teacher_cache(sets["a/b"])
    trainer.build_teacher_cache(sets)
    for data in sets.values():
        assert "test_soft_loss" in metrics(trainer, data)
        assert "eval_soft_loss" in trainer.evaluate(data)
    parts = {"train", "eval", "test", part_of("test", "a/b"), part_of("test", "c")}
    assert {p.name for p in (tmp_path / "c").iterdir() if p.is_dir()} == parts


def test_the_module_that_the_script_holds_is_asked(tmp_path, caplog):
    """Nothing is kept on disk; where the script does not hold it, one log line names the fix."""
    student, teacher = tiny.models("classification")
    expected = live_metrics("classification", tmp_path / "live", held_out())
    trainer = build("classification", tmp_path / "run", pair=(student, teacher), **cache(tmp_path / "cache", "logits"))
    trainer.train()
    with caplog.at_level(logging.WARNING):
        assert metrics(trainer, held_out()) == pytest.approx(expected, rel=1e-4)
        assert "eval_soft_loss" in trainer.evaluate(held_out())
        assert not [r for r in caplog.records if "no teacher cache" in r.getMessage()]
        assert trainer._teacher_cache._at_hand is None
        del teacher
        gc.collect()
        assert "test_soft_loss" not in metrics(trainer, held_out())
    messages = [r.getMessage() for r in caplog.records if "no teacher cache" in r.getMessage()]
    assert len(messages) == 1
    assert "trainer.build_teacher_cache(dataset)" in messages[0]
    with pytest.raises(RuntimeError, match="`teacher_model` is a module that was deleted; expected the teacher"):
        trainer.build_teacher_cache(held_out())
    trainer.train()
    assert "eval_soft_loss" in trainer.evaluate()


@pytest.mark.parametrize("form", ["topk", "hidden"])
def test_language_models_at_hand(form, tmp_path):
    more = {"kd_temperature": 1.0, "kd_loss_implementation": "fused"}
    pair = tiny.models("causal_lm")
    expected = live_metrics("causal_lm", tmp_path / "live", held_out("causal_lm"), **more)
    trainer = build(
        "causal_lm", tmp_path / "run", pair=pair, **more, **cache(tmp_path / "c", form, 36 if form == "topk" else None)
    )
    trainer.train()
    found = metrics(trainer, held_out("causal_lm"))
    assert found["test_soft_loss"] == pytest.approx(expected["test_soft_loss"], rel=1e-2)
    assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-2)


def test_the_students_own_base_is_at_hand(tmp_path):
    from peft import LoraConfig, get_peft_model

    def trainer(out: str, **more: Any) -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        student = get_peft_model(tiny.models("causal_lm")[0], config)
        return build("causal_lm", tmp_path / out, pair=(student, "adapter_off"), **more)

    live, cached = trainer("live"), trainer("run", **cache(tmp_path / "cache", "hidden"))
    found = []
    for each in (live, cached):
        each.train()
        found.append(metrics(each, held_out("causal_lm")))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_rows_with_numbers_of_their_own_and_streams(tmp_path):
    rows = [{**row, "teacher_row_id": 100 + i} for i, row in enumerate(held_out())]
    trainer = build(
        "classification", tmp_path / "run", **saved("classification", tmp_path), **cache(tmp_path / "c", "logits")
    )
    trainer.build_teacher_cache(rows)
    trainer.train()
    assert "test_soft_loss" in metrics(trainer, rows[::-1][:5])
    assert "test_soft_loss" not in metrics(
        trainer, [{**row, "teacher_row_id": 7 + i} for i, row in enumerate(held_out())]
    )


def test_other_rows_of_the_same_number_are_not_taken_for_them(tmp_path):
    trainer = build(
        "classification", tmp_path / "run", **saved("classification", tmp_path), **cache(tmp_path / "c", "logits")
    )
    trainer.build_teacher_cache(held_out())
    assert "test_soft_loss" not in metrics(trainer, tiny.rows("classification", 13, seed=8))
    rows = held_out()
    rows[4] = {**rows[4], "input_ids": rows[4]["input_ids"][::-1]}
    assert "test_soft_loss" not in metrics(trainer, rows)


def test_data_without_labels(tmp_path):
    data = [{k: v for k, v in row.items() if k != "labels"} for row in held_out()]
    trainer = build(
        "classification", tmp_path / "run", **saved("classification", tmp_path), **cache(tmp_path / "c", "logits")
    )
    trainer.build_teacher_cache(data)
    found = trainer.predict(data)
    assert found.metrics["test_soft_loss"] > 0
    assert found.predictions.shape == (13, tiny.CLASSES)


def test_random_numbers_go_on_as_if_nothing_had_been_asked(tmp_path):
    student, teacher = tiny.models("classification")
    trainer = build("classification", tmp_path / "run", pair=(student, teacher), **cache(tmp_path / "cache", "logits"))
    trainer.train()
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    trainer.build_teacher_cache(datasets.Dataset.from_list(held_out()))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_a_cache_without_a_folder_cannot_be_added_to(tmp_path):
    build("classification", tmp_path / "run", **cache(tmp_path / "cache", "logits")).build_teacher_cache()
    pair = tiny.models("classification")[0], CachedTeacher(tmp_path / "cache")
    reader: DistillationTrainer = build("classification", tmp_path / "run", pair=pair)
    with pytest.raises(ValueError, match="`teacher_cache_dir` is None; expected a folder"):
        reader.build_teacher_cache(held_out())


@pytest.mark.launch
@pytest.mark.parametrize("config", ["ddp_cpu", "fsdp2", "zero3"])
def test_two_processes(config, tmp_path):
    """The same numbers as one process, from the teacher at hand (where it is not sharded) and from what was built."""
    if config == "zero3":
        pytest.importorskip("deepspeed")
    root = Path(__file__).resolve().parents[2]
    options = ["--num_processes", "2", "--mixed_precision", "no"]
    launch.by_config(
        root / f"configs/accelerate/{config}.yaml", options, "cache_more_run.py", str(tmp_path), "causal_lm+hidden"
    )
    alone = tmp_path / "alone"
    alone.mkdir()
    cache_more_run.main(alone, "causal_lm+hidden")
    expected = json.loads((alone / "found-0.json").read_text())
    assert expected["built"] == pytest.approx(expected["at_hand"], rel=1e-5)
    for process in range(2):
        found = json.loads((tmp_path / f"found-{process}.json").read_text())
        assert found["world_size"] == 2
        assert found["built"] == pytest.approx(expected["built"], rel=1e-4)
        assert ("test_soft_loss" in found["at_hand"]) == (config == "ddp_cpu")
        assert "that gives other outputs for rows" in found["refused"]
