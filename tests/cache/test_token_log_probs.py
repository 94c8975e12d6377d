"""A cache of a teacher with another tokenizer: one float32 for each of its tokens, from which chunks are summed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd_trainer import CachedTeacher, DistillationArguments
from kd_trainer.cache import build as cache_build
from kd_trainer.cache import settings as cache_settings
from kd_trainer.cache.store import CacheError
from tests.helpers import cache_kills, chunk_run, tiny
from tests.helpers.chunk_run import models, rows, trainer

STEPS = 4  # an epoch of rows()


def cached(folder: Path, **kwargs: Any) -> Any:
    return trainer(folder / "run", **{"teacher_cache_dir": str(folder / "cache"), "max_steps": STEPS, **kwargs})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a finished cache of rows() and of rows(21, 4), in eight shards and more."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_settings, "SHARD_BYTES", 1)
        run = cached(folder, per_device_eval_batch_size=4)
        run.build_teacher_cache()
    return folder


def reading(folder: Path, out: Path, **kwargs: Any) -> Any:
    pair = models()[0], CachedTeacher(folder / "cache")
    return trainer(out, **{"pair": pair, "max_steps": STEPS, **kwargs})


def test_it_holds_the_log_probability_of_every_token(built):
    teacher = models()[1]
    stored = CachedTeacher(built / "cache")
    store = stored.parts["train"]
    assert store.manifest["total_positions"] == sum(len(row["teacher_input_ids"]) - 1 for row in rows())
    assert stored.format.bytes_a_position() == 4
    found = store.take([3, 30])
    assert {name: (column.dtype, column.shape[1]) for name, column in found.columns.items()} == {
        "token_log_probs": (np.dtype(np.float32), 1)
    }
    start = 0
    for number, count in zip((3, 30), found.counts, strict=True):
        ids = torch.tensor(rows()[number]["teacher_input_ids"])
        expected = F.log_softmax(teacher(input_ids=ids[None]).logits.double(), -1)[0, :-1].gather(1, ids[1:, None])
        values = torch.from_numpy(found.columns["token_log_probs"][start : start + count].copy()).double()
        torch.testing.assert_close(values, expected.detach(), rtol=0, atol=1e-6)
        start += count


@pytest.mark.parametrize("implementation", ["full", "fused"])
def test_training_and_evaluation_are_those_of_the_live_teacher(implementation, built, tmp_path):
    """Under a tau, counted positions, masks and batches padded on the left that the building did not have."""
    data = [dict(row) for row in rows()]
    for row in data[:10]:  # as an alignment with other labels
        for name in ("chunk_ids", "teacher_chunk_ids"):
            row[name] = [i if i > 1 else -1 for i in row[name]]
    settings = {"kd_chunk_temperature": 2.0, "kd_positions": "attended", "kd_loss_implementation": implementation}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "data": data, "max_steps": STEPS}
    tokenizer, runs = chunk_run.tokenizers()[1], []
    try:
        tokenizer.padding_side = "left"
        for run in (trainer(tmp_path, **settings), reading(built, tmp_path, **settings)):
            run.train()
            runs.append((run, run.evaluate()))
    finally:
        tokenizer.padding_side = "right"
    (live, expected), (read, found) = runs
    assert (read._plan.heads is not None) == (implementation == "fused")
    torch.testing.assert_close(tiny.weights(read.model), tiny.weights(live.model), rtol=0, atol=1e-6)
    assert (tiny.weights(read.model) - tiny.weights(models()[0])).abs().max() > 1e-3
    for key in chunk_run.LOGGED:
        assert tiny.logged(read, key) == pytest.approx(tiny.logged(live, key), rel=1e-6, abs=1e-6)
        assert found[f"eval_{key}"] == pytest.approx(expected[f"eval_{key}"], rel=1e-6, abs=1e-6)


def test_an_interrupted_building_goes_on_to_the_same_files(built, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_settings, "SHARD_BYTES", 1)
    write, written = cache_build.write_shard, []

    def interrupted(folder: Path, index: int, shard: Any) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(index)
        write(folder, index, shard)

    monkeypatch.setattr(cache_build, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, per_device_eval_batch_size=4).build_teacher_cache()
    monkeypatch.setattr(cache_build, "write_shard", write)
    cached(tmp_path, per_device_eval_batch_size=4).build_teacher_cache()
    found = cache_kills.content(tmp_path / "cache")
    assert cache_kills.difference(found, cache_kills.content(built / "cache")) == []
    assert sum(name.endswith(".arrow") for name in found) == 8 + 6


def test_a_student_of_another_tokenizer_reads_the_same_cache(built, tmp_path):
    """The teacher's own tokens: one side more is the other's, and the cache is of neither."""
    data = [
        {name: row[f"teacher_{name.removeprefix('teacher_')}"] for name in row if name != "labels"} for row in rows()
    ]
    for row in data:
        row["chunk_ids"] = row["teacher_chunk_ids"] = list(range(len(row["input_ids"])))
        row["labels"] = row["input_ids"]
    student, other = chunk_run.tokenizers()
    losses = []
    for pair in ((models(3)[1], models()[1]), (models(3)[1], CachedTeacher(built / "cache"))):
        run = trainer(tmp_path, pair=pair, data=data, max_steps=2)
        run.processing_class = other
        run.train()
        losses.append(tiny.logged(run, "chunks_loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6, abs=1e-6)
    run = reading(built, tmp_path, max_steps=2)
    run.processing_class = student
    run.train()


# ---- what is refused ----


def test_other_texts_and_other_lengths_are_refused(built, tmp_path):
    cut = [
        {**row, **{name: row[name][:-1] for name in row if name.startswith("teacher_") and len(row[name]) > 2}}
        for row in rows()
    ]
    for data in (rows(32, 9), cut):
        with pytest.raises(CacheError, match=r"differs from the one the teacher read; expected the rows of the teac"):
            reading(built, tmp_path, data=data).train()
    shutil.copytree(built / "cache", tmp_path / "cache")
    with pytest.raises(CacheError, match=r"`teacher_model` is one with weights of SHA-256"):
        cached(tmp_path, pair=(models()[0], models(5)[1])).train()
    with pytest.raises(CacheError, match=r"`train_dataset` is one with a number of rows of 31"):
        cached(tmp_path, data=rows()[:31]).train()


def test_a_batch_without_the_columns_of_the_alignment_is_refused(built, tmp_path):
    data = [{name: value for name, value in row.items() if name != "chunk_ids"} for row in rows()]
    with pytest.raises(ValueError, match="the column 'chunk_ids' too with kd_cross_tokenizer 'chunks'"):
        reading(built, tmp_path, data=data).train()


def test_a_cache_of_positions_and_one_of_tokens_are_not_taken_for_each_other(built, tmp_path):
    expected = r"`kd_cross_tokenizer` is 'error'; expected 'chunks' with a teacher cache of format token_log_probs"
    plain = [{k: v for k, v in row.items() if k in ("input_ids", "attention_mask", "labels")} for row in rows()]
    with pytest.raises(ValueError, match=expected):
        reading(built, tmp_path, data=plain, kd_cross_tokenizer="error").train()
    of_positions = tiny.trainer("causal_lm", tmp_path / "run", teacher_cache_dir=str(tmp_path / "cache"))
    of_positions.build_teacher_cache()
    expected = (
        r"`kd_cross_tokenizer` is 'chunks'; expected 'error' with a teacher cache of format logits, because it hold"
    )
    with pytest.raises(ValueError, match=expected):
        reading(tmp_path, tmp_path / "run").train()
    with pytest.raises(ValueError, match=expected):
        cached(tmp_path).train()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"teacher_cache_format": "topk"}, "`teacher_cache_format` is 'topk'; expected 'auto' (the default) with kd"),
        (
            {"teacher_cache_k": 8},
            "`teacher_cache_k` is 8; expected None (the default) with kd_cross_tokenizer 'chunks'",
        ),
        (
            {"teacher_cache_dtype": "float16"},
            "`teacher_cache_dtype` is 'float16'; expected None (the default) with kd_",
        ),
        (
            {"kd_cross_tokenizer": "error", "teacher_cache_format": "token_log_probs"},
            "expected one of 'auto', 'logits'",
        ),
        ({"teacher_server_url": "http://x/v1"}, "`teacher_server_url` is 'http://x/v1'; expected None (the default)"),
    ],
)
def test_settings_of_another_format_are_refused(settings, text, tmp_path):
    given = {"kd_cross_tokenizer": "chunks", "teacher_cache_dir": str(tmp_path), **settings}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        DistillationArguments(**given)
    assert text in str(error.value)


def test_nan_of_the_teacher_is_not_kept(tmp_path):
    student, teacher = models()
    teacher.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="`teacher_model` is giving NaN or inf on rows"):
        cached(tmp_path, pair=(student, teacher), kd_run="cache").build_teacher_cache()


def test_a_row_without_teacher_tokens_is_kept(tmp_path):
    """An empty text: nothing of it is compared."""
    empty = {name: [] for name in ("teacher_input_ids", "teacher_attention_mask", "teacher_chunk_ids")}
    data = [dict(row) for row in rows()[:16]]
    data[5] |= {**empty, "chunk_ids": [-1] * len(data[5]["input_ids"])}
    losses = []
    for more in ({}, {"teacher_cache_dir": str(tmp_path / "cache")}):
        run = trainer(tmp_path / "run", data=data, max_steps=2, **more)
        run.train()
        losses.append(tiny.logged(run, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
