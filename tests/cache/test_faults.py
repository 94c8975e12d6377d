"""A teacher cache in a hard world: killed buildings, damaged files, two runs at once, a full or closed disk."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import TrainerCallback

from kd_trainer import CachedTeacher
from kd_trainer.cache import manifest as cache_manifest
from kd_trainer.cache import store as cache_store
from kd_trainer.cache.store import CacheError
from kd_trainer.training import teacher_cache as offline
from tests.helpers import cache_faults, cache_kill_run, cache_kills, tiny
from tests.helpers.cache_kill_run import PLACES, trainer
from tests.helpers.script_process import SERVER

# ---- kills ----


@pytest.mark.launch
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_building_ends_in_the_files_of_one_that_was_not(processes, tmp_path):
    """Three kills or more; `python tests/helpers/cache_kills.py --kills 20 --processes 2` does more of the same."""
    draw = random.Random(processes)
    for number, kept in enumerate(("hidden", "topk", "sampled")[: 4 - processes]):
        expected, places, seconds = cache_kills.whole(tmp_path / f"whole-{kept}", kept, 1)
        if processes == 2:
            found, places, seconds = cache_kills.whole(tmp_path / f"two-{kept}", kept, 2)
            assert cache_kills.difference(found, expected) == []
        assert sum(name.endswith(".arrow") for name in expected) > 30
        out = tmp_path / f"killed-{kept}"
        fell = cache_kills.survive(out, kept, processes, draw, places, seconds, aimed=number != 1)
        assert cache_kills.difference(cache_kills.content(out / "cache"), expected) == [], fell


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    (tmp_path / "data").mkdir()
    left = [".manifest.json.a", ".building.json.a", ".head.safetensors.a", ".README.md.a"]
    left += ["data/.data-00003.arrow.a", "data/.data-00003.json.a", "data/.state.json.a"]
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".gitattributes").write_bytes(b"of the hub")
    cache_store.begin(tmp_path, {"layout": cache_manifest.LAYOUT})
    found = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    assert found == [".gitattributes", "building.json"]


# ---- damage ----


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return cache_faults.Caches(tmp_path_factory.mktemp("caches"))


@pytest.mark.parametrize("name", cache_faults.FAULTS)
def test_a_fault_is_an_error_or_touches_nothing_that_is_read(name, caches):
    """Each kind once; `python tests/helpers/cache_faults.py --faults 50` does more of the same."""
    draw = random.Random(name)
    kept, _ = cache_faults.draw_fault(draw, name)
    cache_faults.one_fault(caches, draw, kept, name)


class _Change(TrainerCallback):
    """Does something to a file after a step."""

    def __init__(self, step: int, change: Any) -> None:
        self.step, self.change = step, change

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.change()


def losses(caches, kept, steps, change=lambda: None, after=0, **kwargs):
    """(losses of a training that reads the copied cache, its error); `change` comes after that step."""
    out = caches.folder / "damaged"
    pair = (tiny.models("causal_lm", 5)[0], CachedTeacher(out / "cache"))
    none = {"teacher_cache_dir": None, "teacher_cache_format": "auto", "teacher_cache_k": None}
    run = trainer(out, "auto", cache_faults.ROWS, pair=pair, max_steps=steps, **none, **kwargs)
    run.add_callback(_Change(after, change))
    error = None
    try:
        run.train()
    except Exception as raised:
        error = raised
    return tiny.logged(run, "loss"), error


@pytest.mark.parametrize("change", ["flipped", "cut", "removed"])
def test_a_shard_damaged_before_the_workers_read_it(change, caches):
    path = caches.copy("topk") / "cache/train/data/data-00007.arrow"  # the last one: not read ahead after a step
    done = {"flipped": cache_faults.flip, "cut": cache_faults.cut, "removed": cache_faults.remove}[change]
    found, error = losses(caches, "topk", 8, lambda: done(path, random.Random(0)), 1, dataloader_num_workers=1)
    assert isinstance(error, CacheError)
    assert path.name in str(error)
    right = caches.numbers["topk"]["loss"]
    assert found == right[: len(found)]
    assert len(found) < 8


@pytest.mark.parametrize("change", ["flipped", "cut", "appended", "blanked"])
def test_a_shard_damaged_after_it_was_checked_is_checked_again(change, caches):
    """In the second pass over the data: each shard is open by then."""
    path = caches.copy("hidden") / "cache/train/data/data-00005.arrow"
    right, error = losses(caches, "hidden", 16)
    assert error is None
    done = {"flipped": cache_faults.flip, "cut": cache_faults.cut, "appended": cache_faults.append}
    done["blanked"] = cache_faults.blank
    found, error = losses(caches, "hidden", 16, lambda: done[change](path, random.Random(0)), 10)
    assert isinstance(error, CacheError)
    assert path.name in str(error)
    assert 10 <= len(found) < 16
    assert found == right[: len(found)]


def test_a_shard_replaced_by_the_same_is_read_on(caches):
    """As a run does that repairs the cache beside this one."""
    path = caches.copy("hidden") / "cache/train/data/data-00005.arrow"
    right, _ = losses(caches, "hidden", 16)

    def replace() -> None:
        path.with_name("new").write_bytes(path.read_bytes())
        path.with_name("new").replace(path)

    assert losses(caches, "hidden", 16, replace, 10) == (right, None)


# ---- two runs, and disks ----


@pytest.mark.launch
def test_of_two_runs_at_once_one_builds_and_the_other_waits_and_reads(tmp_path):
    """Both are made to wait first: else it were chance whether they meet."""
    (tmp_path / "cache").mkdir()
    names, logs = (0, 1), [tmp_path / f"output-{name}.txt" for name in (0, 1)]
    runs = [
        SERVER.Process(target=cache_kill_run.main, args=(str(tmp_path), "topk", n, None, None, False)) for n in names
    ]
    with FileLock(str(tmp_path / "cache" / ".train.lock")):
        for run in runs:
            run.start()
        until = time.monotonic() + 300
        while not all(log.exists() and "waiting for it" in log.read_text() for log in logs):
            assert time.monotonic() < until
            time.sleep(0.05)
    for run in runs:
        run.join(300)
    assert [run.exitcode for run in runs] == [0, 0], [log.read_text() for log in logs]
    assert all("another run builds the teacher cache" in log.read_text() for log in logs)
    done = [(tmp_path / f"{PLACES}-{name}").read_text() for name in names]
    assert sum(places.count("os.rename .data-") for places in done) == 2 * 36  # each shard and its digest once
    assert sum(places.count("os.rename .manifest.json") for places in done) == 2  # of two parts


@pytest.mark.parametrize("kept", ["topk", "hidden"])
def test_a_finished_cache_may_lie_where_nothing_can_be_written(kept, caches, monkeypatch):
    out = caches.copy(kept)

    def read_only(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(FileLock, "acquire", read_only)
    monkeypatch.setattr(cache_store, "write_atomically", read_only)
    monkeypatch.setattr(cache_manifest, "write_atomically", read_only)
    monkeypatch.setattr(offline, "write_atomically", read_only)
    before = cache_kills.content(out / "cache")
    assert trainer(out, kept, cache_faults.ROWS).build_teacher_cache().format.name == kept
    assert cache_kills.difference(cache_kills.content(out / "cache"), before) == []

    damaged = "head.safetensors" if kept == "hidden" else "data/data-00003.arrow"
    cache_faults.flip(out / "cache/train" / damaged, random.Random(0))
    with pytest.raises(CacheError, match=rf"damaged in {Path(damaged).name} \(.*\) and not to be written to; expected"):
        trainer(out, kept, cache_faults.ROWS).build_teacher_cache()
    with pytest.raises(RuntimeError, match=r"could not be written .*Read-only file system"):
        trainer(out / "elsewhere", kept, cache_faults.ROWS).build_teacher_cache()


@pytest.mark.parametrize("name", [".data-00000.arrow", ".data-00000.json"])
def test_a_disk_that_refuses_to_be_written_is_told_once(name, caches, tmp_path, monkeypatch):
    """/dev/full, which refuses all that is written, in the place of a file under its temporary name."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    real = os.open

    def full(path: Any, *rest: Any, **kwargs: Any) -> int:
        handle = real(path, *rest, **kwargs)
        if Path(path).name.startswith(name):
            other = real("/dev/full", os.O_WRONLY)
            os.dup2(other, handle)
            os.close(other)
        return handle

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(RuntimeError, match=r"`teacher_cache_dir` is .*No space left on device.*make room and run"):
        trainer(tmp_path, "hidden", cache_faults.ROWS).build_teacher_cache()
    assert list((tmp_path / "cache/train/data").iterdir()) == []


def _no_room(monkeypatch, name: str) -> None:
    """The disk is full when the file of that name is written."""
    write, begin = cache_store.write_atomically, cache_store.atomic_file

    def full(path: Any, content: Any) -> Any:
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    @contextmanager
    def fills_up(path: Path) -> Any:
        with begin(path) as file:
            yield file
            if path.name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_store, "write_atomically", full)
    monkeypatch.setattr(cache_manifest, "write_atomically", full)
    monkeypatch.setattr(cache_store, "atomic_file", fills_up)
    monkeypatch.setattr(offline, "write_atomically", full)


@pytest.mark.parametrize(
    ("name", "built"),
    [("data-00002.arrow", 2), ("data-00002.json", 2), ("building.json", 0), ("head.safetensors", 0),
     ("state.json", 8), ("manifest.json", 8)],
)  # fmt: skip
def test_a_full_disk_keeps_what_is_built(name, built, caches, tmp_path, monkeypatch):
    with monkeypatch.context() as until_there_is_room:
        _no_room(until_there_is_room, name)
        with pytest.raises(RuntimeError, match=r"`teacher_cache_dir` is .* No space left.*make room and run again"):
            trainer(tmp_path, "hidden", cache_faults.ROWS).build_teacher_cache()
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "cache/train/data").glob("data-*.arrow")}
    before = {f"data-0000{i}.arrow" for i in range(built)}
    if name.startswith("data-"):
        assert before <= set(kept)
        assert "data-00002.arrow" not in kept
    else:
        assert before == set(kept)
    trainer(tmp_path, "hidden", cache_faults.ROWS).build_teacher_cache()
    assert {
        f.name: f.stat().st_mtime_ns for f in (tmp_path / "cache/train/data").glob("*.arrow") if f.name in kept
    } == kept
    assert cache_kills.difference(cache_kills.content(tmp_path / "cache"), caches.files["hidden"]) == []


def test_a_full_disk_while_a_damaged_cache_is_repaired(caches, monkeypatch):
    out = caches.copy("topk")
    cache_faults.flip(out / "cache/train/data/data-00003.arrow", random.Random(0))
    with monkeypatch.context() as until_there_is_room:
        _no_room(until_there_is_room, "data-00003.arrow")
        with pytest.raises(RuntimeError, match="make room and run again"):
            trainer(out, "topk", cache_faults.ROWS).build_teacher_cache()
    found, error = losses(caches, "topk", 1)
    assert found == []
    assert "train', which is unfinished" in str(error)
    trainer(out, "topk", cache_faults.ROWS).build_teacher_cache()
    assert cache_kills.difference(cache_kills.content(out / "cache"), caches.files["topk"]) == []


@contextmanager
def _nobody():
    """Without root's rights, which no folder is closed to."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_is_not_ours_is_read_and_said_not_to_be_written(caches):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        out = Path(folder)
        os.chmod(out, 0o755)
        caches.copy("hidden")
        (caches.folder / "damaged" / "cache").rename(out / "cache")
        mine = out / "mine"
        mine.mkdir()
        mine.chmod(0o777)
        for path in (*(out / "cache").rglob("*"), out / "cache", out):
            os.chmod(path, 0o555 if path.is_dir() else 0o444)
        before = cache_kills.content(out / "cache")
        student = tiny.models("causal_lm", 5)[0]
        none = {"teacher_cache_dir": None, "teacher_cache_format": "auto", "teacher_cache_k": None}
        run = trainer(
            mine, "auto", cache_faults.ROWS, pair=(student, CachedTeacher(out / "cache")), **none, max_steps=8
        )
        asking = trainer(mine, "hidden", cache_faults.ROWS, teacher_cache_dir=str(out / "cache"))
        new = trainer(mine, "hidden", cache_faults.ROWS, teacher_cache_dir=str(out / "new"))
        refused = r"`teacher_cache_dir` is .*Permission denied.* Set it to another folder"
        with _nobody():
            run.train()
            assert asking.build_teacher_cache().format.name == "hidden"
            with pytest.raises(RuntimeError, match=refused):
                new.build_teacher_cache()
        assert tiny.logged(run, "loss") == caches.numbers["hidden"]["loss"]
        assert cache_kills.content(out / "cache") == before
        for path in (*out.rglob("*"), out):
            os.chmod(path, 0o755)


def test_a_cache_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    run = trainer(tmp_path, "hidden", cache_faults.ROWS, teacher_cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match=r"`teacher_cache_dir` is .*Set it to another folder"):
        run.build_teacher_cache()
