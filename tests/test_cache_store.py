"""The files of a cache: what is written is read, by ours and by other readers, and nothing else is."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from kd_trainer import cache_store
from kd_trainer.cache_store import (
    CacheError,
    Rows,
    ShardWriter,
    Store,
    begin,
    finish,
    is_finished,
    read_manifest,
    reopen,
    written_shards,
)

SETTINGS = {"layout": cache_store.LAYOUT, "kd_trainer": "0", "row_ids": "position", "format": "logits"}
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


def write_shard(folder: Path, index: int, parts: Iterable[Rows]) -> None:
    shard = ShardWriter(folder, index)
    try:
        for part in parts:
            if shard.add(part):
                shard.sync()
    except BaseException:
        shard.give_up()
        raise
    shard.end()


def build(folder: Path, settings: dict | None = None, shards=SHARDS) -> Path:
    settings = settings or SETTINGS
    begin(folder, settings)
    for index, ids in enumerate(shards):
        write_shard(folder, index, [rows(ids)])
    notes = cache_store.written_notes(folder)
    finish(
        folder,
        settings,
        [notes[i] for i in sorted(notes)],
        "---\nconfigs:\n- config_name: default\n  data_files: data/*.arrow\n---\n",
    )
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


@pytest.mark.parametrize("asked", [[0], [7, 0, 5], [4], [3, 3, 6, 1], list(range(8))])
def test_rows_come_back_in_any_order(tmp_path, asked):
    found = Store(build(tmp_path)).take(asked)
    expected = cache_store.joined([one(row) for row in asked])
    for name, values in expected.columns.items():
        assert found.columns[name].dtype == values.dtype
        np.testing.assert_array_equal(found.columns[name], values)
    for i in range(3):
        np.testing.assert_array_equal(found[i], expected[i])


def split(whole: Rows, at: int) -> list[Rows]:
    """The same rows in parts of `at` rows."""
    starts = np.concatenate([[0], np.cumsum(whole.counts)])
    found = []
    for first in range(0, len(whole.row_ids), at):
        rows_of, last = slice(first, first + at), min(first + at, len(whole.row_ids))
        columns = {name: values[starts[first] : starts[last]] for name, values in whole.columns.items()}
        found.append(Rows(*(x[rows_of] for x in whole[:3]), columns))
    return found


@pytest.mark.parametrize(("at", "at_once", "batches"), [(1, 1, 3), (2, 16, 2), (3, 10**9, 1)])  # row 0 is empty
def test_a_shard_may_come_in_parts(at, at_once, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_store, "_AT_ONCE", at_once)
    begin(tmp_path, SETTINGS)
    for index, ids in enumerate(SHARDS):
        write_shard(tmp_path, index, iter(split(rows(ids), at)))
    notes = cache_store.written_notes(tmp_path)
    finish(tmp_path, SETTINGS, [notes[i] for i in range(len(SHARDS))], "")
    store, expected = Store(tmp_path), cache_store.joined([one(row) for row in (7, 0, 5, 4, 3, 6)])
    found = store.take([7, 0, 5, 4, 3, 6])
    for name, values in expected.columns.items():
        np.testing.assert_array_equal(found.columns[name], values)
    for i in range(3):
        np.testing.assert_array_equal(found[i], expected[i])
    assert store.manifest["total_rows"] == 8
    assert store.manifest["total_positions"] == sum(int(rows(ids).counts.sum()) for ids in SHARDS)
    read = datasets.load_from_disk(str(tmp_path / "data"))
    assert read["row_id"][:] == list(range(8))
    assert read[5]["ids"] == one(5).columns["ids"].tolist()
    with pa.OSFile(str(tmp_path / "data/data-00000.arrow")) as file:
        assert len(list(pa.ipc.open_stream(file))) == batches


def test_a_shard_goes_to_the_disk_while_it_grows(tmp_path, monkeypatch):
    """At most so many bytes wait for the disk, whatever the size of a shard; the bytes are the same."""
    parts, sizes = [one(row) for row in range(8)], []
    real = os.fsync

    def noted(handle: int) -> None:
        sizes.append(os.fstat(handle).st_size)
        real(handle)

    monkeypatch.setattr(cache_store, "_AT_ONCE", 1)
    monkeypatch.setattr(os, "fsync", noted)
    for name, unsynced in (("at the end", 2**23), ("while it grows", 2000)):
        monkeypatch.setattr(cache_store, "_UNSYNCED", unsynced)
        begin(tmp_path / name, SETTINGS)
        sizes.clear()
        write_shard(tmp_path / name, 0, parts)
        synced = sorted(size for size in sizes if size > 1000)  # the note beside it is smaller
        assert len(synced) == 1 if unsynced == 2**23 else len(synced) > 2
        assert all(after - before < unsynced + 2000 for before, after in zip([0, *synced], synced, strict=False))
    whole, growing = (tmp_path / name / "data" / "data-00000.arrow" for name in ("at the end", "while it grows"))
    assert whole.read_bytes() == growing.read_bytes()
    assert synced[-1] == whole.stat().st_size


def test_a_shard_that_is_given_up_leaves_nothing(tmp_path):
    begin(tmp_path, SETTINGS)

    def parts():
        yield rows(SHARDS[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 0, parts())
    assert list((tmp_path / "data").iterdir()) == []


def test_an_unfinished_cache_of_another_layout_does_not_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(cache_store, "LAYOUT", 1)
        begin(tmp_path, {**SETTINGS, "layout": 1})
    with pytest.raises(CacheError, match=r"of layout 1, from kd_trainer 0; expected layout 3"):
        begin(tmp_path, SETTINGS)


def test_a_store_that_is_sent_to_another_process_opens_its_own_files(tmp_path):
    store = Store(build(tmp_path))
    store.take([0])
    again = pickle.loads(pickle.dumps(store))
    assert not again._open
    np.testing.assert_array_equal(again.take([5]).columns["ids"], one(5).columns["ids"])


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_store, "_OPEN_FILES", 1)
    store = Store(build(tmp_path))
    for row in (0, 7, 5, 1):
        np.testing.assert_array_equal(store.take([row]).columns["ids"], one(row).columns["ids"])
        assert len(store._open) == 1


def test_rows_with_numbers_of_their_own(tmp_path):
    shards = ((40, 10), (7,))
    store = Store(build(tmp_path, {**SETTINGS, "row_ids": "column"}, shards))
    found = store.take([7, 40])
    np.testing.assert_array_equal(
        found.columns["ids"], np.concatenate([rows((7,)).columns["ids"], rows((40, 10)).columns["ids"][:0]])
    )
    np.testing.assert_array_equal(found.signatures, [rows((7,)).signatures[0], rows((40, 10)).signatures[0]])
    with pytest.raises(CacheError, match="asked for row 8; expected a row of the teacher cache, which has 3"):
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
        write_shard(tmp_path, index, [rows(ids)])
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
    write_shard(tmp_path, 1, [rows(SHARDS[1])])
    notes, noted = cache_store.written_notes(tmp_path), begin(tmp_path, SETTINGS)
    finish(
        tmp_path,
        {k: v for k, v in noted.items() if k != "sealed"},
        [notes[i] for i in range(3)],
        before["README.md"].decode(),
    )
    assert files(tmp_path) == before


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "told"),
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
def test_damage_is_found_when_a_shard_is_first_read(tmp_path, harm, told):
    store = Store(build(tmp_path))
    harm(tmp_path / "data/data-00001.arrow")
    np.testing.assert_array_equal(store.take([0]).columns["ids"], one(0).columns["ids"])
    with pytest.raises(
        CacheError, match=r"damaged in .*data-00001\.arrow; expected the file as it was written"
    ) as error:
        store.take([0, 5])
    assert told in str(error.value)
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
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "sealed"}),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path, edit):
    path = build(tmp_path) / "manifest.json"
    text = path.read_text()
    assert edit(text) != text
    path.write_text(edit(text))
    with pytest.raises(CacheError, match=r"manifest\.json.*because it was changed or cut"):
        Store(tmp_path)


def test_a_layout_of_tomorrow_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as tomorrow:
        tomorrow.setattr(cache_store, "LAYOUT", 99)
        build(tmp_path, {**SETTINGS, "layout": 99, "kd_trainer": "9.9"})
    with pytest.raises(CacheError, match=r"of layout 99, from kd_trainer 9\.9; expected layout 3"):
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
        write_shard(tmp_path, index, [Rows(ids, ids.astype(np.uint64), np.full(32, 32), {"hidden": values})])
    notes = cache_store.written_notes(tmp_path)
    finish(tmp_path, SETTINGS, [notes[i] for i in range(8)], "")
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


@pytest.mark.parametrize("open_files", [1, 64])
def test_a_batch_may_touch_more_shards_than_files_are_open(open_files, tmp_path, monkeypatch):
    """Each row of its own shard, in any order, some twice; a changed shard is found all the same."""
    monkeypatch.setattr(cache_store, "_OPEN_FILES", open_files)
    shards = tuple((i,) for i in range(150))
    store = Store(build(tmp_path, shards=shards))
    for seed in range(2):
        asked = [*np.random.default_rng(seed).permutation(150).tolist(), 7, 149, 7]
        found, expected = store.take(asked), cache_store.joined([rows((i,)) for i in asked])
        for name, values in expected.columns.items():
            np.testing.assert_array_equal(found.columns[name], values)
        for i in range(3):
            np.testing.assert_array_equal(found[i], expected[i])
        assert len(store._open) == open_files
    flip(tmp_path / "data/data-00070.arrow", 0.5)
    with pytest.raises(CacheError, match=r"damaged in .*data-00070\.arrow; .* its content has changed"):
        store.take(list(range(150)))


def test_a_shard_is_read_whole_once_however_many_there_are(tmp_path, monkeypatch):
    """Its file may be closed and opened again; what lies where in it stays known."""
    monkeypatch.setattr(cache_store, "_OPEN_FILES", 2)
    read: list[str] = []
    real = cache_store._opened
    monkeypatch.setattr(cache_store, "_opened", lambda file, path: read.append(path.name) or real(file, path))
    store = Store(build(tmp_path, shards=tuple((i,) for i in range(9))))
    for _ in range(3):
        store.take(list(range(9)))
    assert sorted(read) == [f"data-0000{i}.arrow" for i in range(9)]
