"""The files of a cache: what is written is read, by this package and by other readers, and nothing else is."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from kd_trainer.cache import store as cache_store
from kd_trainer.cache.manifest import LAYOUT
from kd_trainer.cache.store import (
    CacheError,
    Rows,
    Store,
    begin,
    finish,
    is_finished,
    read_manifest,
    reopen,
    write_shard,
    written_shards,
)

SETTINGS = {"layout": LAYOUT, "kd_trainer": "0", "row_ids": "position", "format": "logits"}
SHARDS = ((0, 1, 2, 3), (4, 5, 6), (7,))


def rows(ids: tuple[int, ...], seed: int = 0) -> Rows:
    draw = np.random.default_rng([seed, *ids])
    counts = np.array([i % 4 for i in ids])  # row 4 has no position
    columns = {
        "ids": draw.integers(0, 60_000, (counts.sum(), 3)).astype(np.uint16),
        "log_probs": draw.normal(size=(counts.sum(), 3)).astype(np.float16),
        "entropy": draw.normal(size=(counts.sum(), 1)).astype(np.float32),
    }
    return Rows(np.array(ids, np.int64), draw.integers(0, 2**64, len(ids), dtype=np.uint64), counts, columns)


def build(folder: Path, settings: dict | None = None, shards=SHARDS) -> Path:
    settings = settings or SETTINGS
    begin(folder, settings)
    for index, ids in enumerate(shards):
        write_shard(folder, index, rows(ids))
    finish(folder, settings, "---\nconfigs:\n- config_name: default\n  data_files: data/*.arrow\n---\n")
    return folder


def one(row: int) -> Rows:
    """The row as it was written."""
    ids = next(ids for ids in SHARDS if row in ids)
    whole, place = rows(ids), ids.index(row)
    starts = np.concatenate([[0], np.cumsum(whole.counts)])
    part = {name: values[starts[place] : starts[place + 1]] for name, values in whole.columns.items()}
    return Rows(
        whole.row_ids[place : place + 1], whole.signatures[place : place + 1], whole.counts[place : place + 1], part
    )


@pytest.mark.parametrize("row_ids", [[0], [7, 0, 5], [4], [3, 3, 6, 1], list(range(8))])
def test_rows_come_back_in_any_order(tmp_path, row_ids):
    found = Store(build(tmp_path)).take(row_ids)
    expected = cache_store.joined([one(row) for row in row_ids])
    for name, values in expected.columns.items():
        assert found.columns[name].dtype == values.dtype
        np.testing.assert_array_equal(found.columns[name], values)
    for i in range(3):
        np.testing.assert_array_equal(found[i], expected[i])


def test_a_shard_is_one_record_batch_whatever_its_parts(tmp_path):
    begin(tmp_path, SETTINGS)
    for index, ids in enumerate(SHARDS):
        write_shard(tmp_path, index, cache_store.joined([one(row) for row in ids]))
    finish(tmp_path, SETTINGS, "")
    store = Store(tmp_path)
    assert store.manifest["total_rows"] == 8
    assert store.manifest["total_positions"] == sum(int(rows(ids).counts.sum()) for ids in SHARDS)
    read = datasets.load_from_disk(str(tmp_path / "data"))
    assert read["row_id"][:] == list(range(8))
    assert read[5]["ids"] == one(5).columns["ids"].tolist()
    build(tmp_path / "whole")
    for index in range(len(SHARDS)):
        name = f"data/data-0000{index}.arrow"
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        with pa.OSFile(str(tmp_path / name)) as file:
            assert len(list(pa.ipc.open_stream(file))) == 1


def test_a_shard_is_synced_once_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_size), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(Path(new).name), replace(old, new)))
    begin(tmp_path, SETTINGS)
    done.clear()
    write_shard(tmp_path, 0, rows(SHARDS[0]))
    sizes = [(tmp_path / "data" / name).stat().st_size for name in ("data-00000.json", "data-00000.arrow")]
    assert done == [sizes[0], "data-00000.json", sizes[1], "data-00000.arrow"]


def test_a_shard_that_is_given_up_leaves_nothing(tmp_path, monkeypatch):
    begin(tmp_path, SETTINGS)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_store, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 0, rows(SHARDS[0]))
    assert list((tmp_path / "data").iterdir()) == []


def test_an_unfinished_cache_of_another_layout_does_not_go_on(tmp_path):
    (tmp_path / "building.json").write_text(json.dumps({**SETTINGS, "layout": 3, "sealed": "0" * 64}))
    with pytest.raises(CacheError, match=r"of layout 3, from kd_trainer 0; expected layout 4\. .* or build it again"):
        begin(tmp_path, SETTINGS)


def test_a_store_that_is_sent_to_another_process_opens_its_own_files(tmp_path):
    store = Store(build(tmp_path))
    store.take([0])
    again = pickle.loads(pickle.dumps(store))
    assert not again._shards
    np.testing.assert_array_equal(again.take([5]).columns["ids"], one(5).columns["ids"])


def test_rows_with_numbers_of_their_own(tmp_path):
    shards = ((40, 10), (7,))
    store = Store(build(tmp_path, {**SETTINGS, "row_ids": "column"}, shards))
    found = store.take([7, 40])
    np.testing.assert_array_equal(
        found.columns["ids"], np.concatenate([rows((7,)).columns["ids"], rows((40, 10)).columns["ids"][:0]])
    )
    np.testing.assert_array_equal(found.signatures, [rows((7,)).signatures[0], rows((40, 10)).signatures[0]])
    with pytest.raises(CacheError, match="one with row 8; expected rows of the teacher cache, which has 3"):
        store.take([8])


def test_other_programs_read_it(tmp_path):
    build(tmp_path)
    loaded = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "elsewhere"))
    from_disk = datasets.load_from_disk(str(tmp_path / "data"))
    for data in (loaded, from_disk):
        assert data["row_id"] == list(range(8)) or list(data["row_id"]) == list(range(8))
        for row in (3, 4, 6):
            np.testing.assert_array_equal(np.array(data[row]["ids"]).reshape(-1, 3), one(row).columns["ids"])
            assert data[row]["signature"] == int(one(row).signatures[0])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_buildings_are_the_same_bytes_and_leave_nothing_behind(tmp_path):
    first, second = files(build(tmp_path / "a")), files(build(tmp_path / "b"))
    assert first == second
    names = {"manifest.json", "README.md", "data/state.json", "data/dataset_info.json"}
    assert set(first) == names | {f"data/data-0000{i}.arrow" for i in range(3)}


def test_an_unfinished_building_knows_its_whole_shards(tmp_path):
    begin(tmp_path, SETTINGS)
    for index, ids in enumerate(SHARDS):
        write_shard(tmp_path, index, rows(ids))
    assert written_shards(tmp_path) == {0, 1, 2}
    (tmp_path / "data/data-00001.arrow").unlink()  # killed between the digest and the shard
    with (tmp_path / "data/data-00002.arrow").open("ab") as file:
        file.write(b"\0")
    (tmp_path / "data/.data-00009.arrow.x").write_bytes(b"half")  # killed while it was written
    assert written_shards(tmp_path) == {0}
    assert begin(tmp_path, {**SETTINGS, "format": "other"})["format"] == "logits", "what was begun goes on"
    assert not list((tmp_path / "data").glob(".*"))
    with pytest.raises(CacheError, match=r"which is unfinished; expected a finished cache. Run the building again"):
        read_manifest(tmp_path)


def test_a_damaged_shard_is_taken_out_and_written_again(tmp_path):
    build(tmp_path)
    before = files(tmp_path)
    store = Store(tmp_path)
    (tmp_path / "data/data-00001.arrow").write_bytes(b"x" * 100)
    assert list(store.check(range(3))) == [1]
    reopen(tmp_path, store.manifest, {1})
    assert not is_finished(tmp_path)
    assert written_shards(tmp_path) == {0, 2}
    write_shard(tmp_path, 1, rows(SHARDS[1]))
    finish(tmp_path, begin(tmp_path, SETTINGS), before["README.md"].decode())
    assert files(tmp_path) == before


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: flip(p, 0.0), "its content has changed"),
        (lambda p: flip(p, 0.5), "its content has changed"),
        (lambda p: flip(p, 1.0), "its content has changed"),
        (lambda p: os.truncate(p, 100), "it has 100 bytes where"),
        (lambda p: os.truncate(p, 0), "it has 0 bytes where"),
        (lambda p: p.unlink(), "the file is missing"),
        (lambda p: p.write_bytes(p.with_name("data-00000.arrow").read_bytes()), "bytes where"),
    ],
)
def test_damage_is_found_when_a_shard_is_first_read(tmp_path, harm, message):
    store = Store(build(tmp_path))
    harm(tmp_path / "data/data-00001.arrow")
    np.testing.assert_array_equal(store.take([0]).columns["ids"], one(0).columns["ids"])
    with pytest.raises(
        CacheError, match=r"damaged in .*data-00001\.arrow; expected the file as it was written"
    ) as error:
        store.take([0, 5])
    assert message in str(error.value)
    assert "that shard alone is built again" in str(error.value)


def test_a_shard_that_is_cut_later_gives_no_numbers(tmp_path):
    store = Store(build(tmp_path))
    store.take([1])
    os.truncate(tmp_path / "data/data-00000.arrow", 300)
    with pytest.raises(CacheError, match="it has 300 bytes where 1,440 were written"):
        store.take([3])


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"format": "logits"', '"format": "hidden"'),
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"}),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path, edit):
    path = build(tmp_path) / "manifest.json"
    text = path.read_text()
    assert edit(text) != text
    path.write_text(edit(text))
    with pytest.raises(CacheError, match=r"manifest\.json.*because it was changed or cut"):
        Store(tmp_path)


@pytest.mark.parametrize("layout", [3, 99])
def test_another_layout_is_refused(layout, tmp_path):
    path = build(tmp_path) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layout": layout, "kd_trainer": "9.9"}))
    message = rf"of layout {layout}, from kd_trainer 9\.9; expected layout 4\. .* build it again in an empty folder"
    with pytest.raises(CacheError, match=message):
        Store(tmp_path)


def test_no_cache_at_all(tmp_path):
    with pytest.raises(CacheError, match=r"which has no manifest\.json; expected a finished cache"):
        Store(tmp_path)


def test_a_large_cache_is_not_held_in_memory(tmp_path):
    """64 MB in 8 shards, every row read: what is allocated stays far below."""
    begin(tmp_path, SETTINGS)
    values = np.zeros((1024, 2048), np.float32)
    for index in range(8):
        ids = np.arange(index * 32, index * 32 + 32, dtype=np.int64)
        values[:, 0] = index
        write_shard(tmp_path, index, Rows(ids, ids.astype(np.uint64), np.full(32, 32), {"hidden": values}))
    finish(tmp_path, SETTINGS, "")
    del values
    store, most = Store(tmp_path), 0
    tracemalloc.start()
    for row in np.random.default_rng(0).permutation(256):
        found = store.take([int(row)])
        assert found.columns["hidden"][0, 0] == row // 32
        most = max(most, tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes())
    tracemalloc.stop()
    assert sum(entry["bytes"] for entry in store.manifest["shards"]) > 64e6
    assert most < 16e6


def test_a_batch_may_touch_many_shards(tmp_path):
    """Each row of its own shard, in any order, some twice; a changed shard is found all the same."""
    shards = tuple((i,) for i in range(150))
    store = Store(build(tmp_path, shards=shards))
    for seed in range(2):
        order = [*np.random.default_rng(seed).permutation(150).tolist(), 7, 149, 7]
        found, expected = store.take(order), cache_store.joined([rows((i,)) for i in order])
        for name, values in expected.columns.items():
            np.testing.assert_array_equal(found.columns[name], values)
        for i in range(3):
            np.testing.assert_array_equal(found[i], expected[i])
    flip(tmp_path / "data/data-00070.arrow", 0.5)
    with pytest.raises(CacheError, match=r"damaged in .*data-00070\.arrow; .* its content has changed"):
        store.take(list(range(150)))


def test_a_shard_is_read_whole_once(tmp_path, monkeypatch):
    read: list[str] = []
    real = cache_store.damage
    monkeypatch.setattr(cache_store, "damage", lambda folder, entry: read.append(entry["name"]) or real(folder, entry))
    store = Store(build(tmp_path, shards=tuple((i,) for i in range(9))))
    for _ in range(3):
        store.take(list(range(9)))
    assert read == [f"data-0000{i}.arrow" for i in range(9)]
