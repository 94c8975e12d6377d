"""An untrusted cache: names, links, types and sizes that its files may not have are one clear error each."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from safetensors.torch import save_file

from kd_trainer import CachedTeacher
from kd_trainer.cache import settings as cache_settings
from kd_trainer.cache.collator import CachedCollator
from kd_trainer.cache.manifest import FIELDS, shard_index, write_json
from kd_trainer.cache.signed_collator import NumberedRows
from kd_trainer.cache.store import CacheError, written_notes
from kd_trainer.files import digest
from kd_trainer.teachers import COLUMN_PREFIX
from kd_trainer.training import checkpoints
from tests.cache.test_cached_teacher import build, cache
from tests.helpers import tiny


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, Path]:
    """A cache of three shards in each format that is read differently."""
    folder, before = tmp_path_factory.mktemp("caches"), cache_settings.SHARD_BYTES
    cache_settings.SHARD_BYTES = 1
    for form, k in (("logits", None), ("hidden", None), ("topk", 4)):
        trainer = build("causal_lm", folder / "run", data=tiny.rows("causal_lm", 20), **cache(folder / form, form, k))
        trainer.eval_dataset = None
        trainer.build_teacher_cache()
    cache_settings.SHARD_BYTES = before
    return {form: folder / form for form in ("logits", "hidden", "topk")}


def copy(caches: dict[str, Path], to: Path, form: str = "logits") -> Path:
    shutil.copytree(caches[form], to / "cache")
    return to / "cache"


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edits a JSON file of a cache and its hash."""
    content = json.loads(path.read_text())
    change(content)
    del content["sha256"]
    write_json(path, content)


def rebuild(folder: Path) -> None:
    trainer = build("causal_lm", folder / "run", data=tiny.rows("causal_lm", 20), **cache(folder / "cache", "auto"))
    trainer.eval_dataset = None
    trainer.build_teacher_cache()


def read(folder: Path) -> None:
    """All rows, as the training's dataloader reads them, and the head."""
    teacher = CachedTeacher(folder / "cache")
    collator = CachedCollator(tiny.pad, {COLUMN_PREFIX: teacher.parts["train"]})
    batch = collator(NumberedRows(tiny.rows("causal_lm", 20)).__getitems__(list(range(20))))
    assert teacher.output(batch) is not None


# ---- names ----

NAMES = ["../../outside.arrow", "/etc/passwd", "data-00000.arrow/../../../outside.arrow", "..", ".", "", "x.arrow",
         "data-00001.arrow", "data-0.arrow", "data-00000.ARROW", "data-00000.arrow\0", "sub/data-00000.arrow",
         "..\\outside.arrow", None, 7, True, ["data-00000.arrow"], {"a": 1}]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_shards_name_is_that_of_a_file_in_the_folder(name, caches, tmp_path):
    folder = copy(caches, tmp_path)
    (tmp_path / "outside.json").write_text("precious")
    (tmp_path / "outside.arrow").write_text("precious")
    reseal(folder / "train/manifest.json", lambda m: m["shards"][0].update(name=name))
    for use in (lambda _: CachedTeacher(folder), rebuild):
        with pytest.raises(
            CacheError, match=r"for 'shards\.0\.name'; expected 'data-00000\.arrow'.*Build the cache again"
        ):
            use(tmp_path)
    assert {path.read_text() for path in tmp_path.glob("outside.*")} == {"precious"}


def test_a_shard_without_a_name_is_refused(caches, tmp_path):
    folder = copy(caches, tmp_path)
    reseal(folder / "train/manifest.json", lambda m: m["shards"][1].pop("name"))
    with pytest.raises(CacheError, match=r"no value for 'shards\.1\.name'"):
        CachedTeacher(folder)


@pytest.mark.parametrize("name", ["../../outside.arrow", None, ["x"], "data-00001.arrow"])
def test_a_note_of_an_unfinished_cache_names_the_shard_beside_it(name, caches, tmp_path):
    folder = copy(caches, tmp_path)
    (folder / "train/manifest.json").rename(folder / "train/building.json")
    note = {"name": name, "rows": 8, "positions": 9, "bytes": 8, "xxh3": xxhash.xxh3_128(b"precious").hexdigest()}
    (folder / "train/data/data-00000.json").write_text(json.dumps(note))
    (folder / "train/data/data-none.json").write_text("{}")
    (tmp_path / "outside.arrow").write_text("precious")
    assert written_notes(folder / "train") == {}


@pytest.mark.parametrize(
    ("name", "index"),
    [("data-00012.arrow", 12), ("data-00012.json", 12), ("data-123456.arrow", 123456), ("data-012345.arrow", None),
     ("data-12.arrow", None), ("data-00012.arrow\n", None), ("x/data-00012.arrow", None), ("data-٠٠٠١٢.arrow", None)],
)  # fmt: skip
def test_the_index_in_a_name(name, index):
    assert shard_index(name) == index


# ---- links ----


def link_shard(folder: Path, outside: Path) -> None:
    shutil.move(folder / "train/data/data-00001.arrow", outside / "data-00001.arrow")
    (folder / "train/data/data-00001.arrow").symlink_to(outside / "data-00001.arrow")


def link_data(folder: Path, outside: Path) -> None:
    shutil.move(folder / "train/data", outside / "data")
    (folder / "train/data").symlink_to(outside / "data")


def link_part(folder: Path, outside: Path) -> None:
    shutil.move(folder / "train", outside / "train")
    (folder / "train").symlink_to(outside / "train")


def link_manifest(folder: Path, outside: Path) -> None:
    shutil.move(folder / "train/manifest.json", outside / "manifest.json")
    (folder / "train/manifest.json").symlink_to(outside / "manifest.json")


def link_note(folder: Path, outside: Path) -> None:
    (outside / "note").write_text("precious")
    (folder / "train/data/data-00001.json").symlink_to(outside / "note")


LINKS = [link_shard, link_data, link_part, link_manifest, link_note]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.__name__)
def test_a_link_out_of_the_folder_is_refused(link, relative, caches, tmp_path):
    folder, outside = copy(caches, tmp_path), tmp_path / "outside"
    outside.mkdir()
    link(folder, outside)
    if relative:
        made = next(p for p in sorted(folder.rglob("*")) if p.is_symlink())
        target = os.path.relpath(os.readlink(made), made.parent)
        made.unlink()
        made.symlink_to(target)
    before = {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()}
    for use in (lambda _: CachedTeacher(folder), rebuild):
        with pytest.raises(CacheError, match=r"with the symbolic link .*expected files inside the folder, because"):
            use(tmp_path)
    if (folder / "train/manifest.json").exists():
        (folder / "train/manifest.json").rename(folder / "train/building.json")
        with pytest.raises(CacheError, match="with the symbolic link"):
            rebuild(tmp_path)
    (folder / "train/building.json").exists() and (folder / "train/building.json").rename(
        folder / "train/manifest.json"
    )
    assert {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()} == before


def test_what_a_killed_process_left_is_removed_in_the_folder_alone(caches, tmp_path):
    """A folder `data` that is a link: files of such names elsewhere stay."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".data-00000.arrow.x").write_text("precious")
    (tmp_path / "cache/train").mkdir(parents=True)
    (tmp_path / "cache/train/data").symlink_to(outside)
    with pytest.raises(CacheError, match="with the symbolic link"):
        rebuild(tmp_path)
    assert [p.name for p in outside.iterdir()] == [".data-00000.arrow.x"]


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "cache/.train.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(CacheError, match="with the symbolic link"):
        rebuild(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


def test_the_folder_that_is_named_may_be_a_link(caches, tmp_path):
    (tmp_path / "real").mkdir()
    copy(caches, tmp_path / "real")
    (tmp_path / "cache").symlink_to(tmp_path / "real/cache")
    read(tmp_path)
    rebuild(tmp_path)
    assert len(CachedTeacher(tmp_path / "cache/train").parts["train"]) == 20


def test_a_snapshot_of_the_hub_links_to_its_blobs(caches, tmp_path):
    """As `snapshot_download` leaves it; a blob that is itself a link elsewhere is refused."""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    blobs.mkdir()
    for path in [p for p in sorted(caches["logits"].rglob("*")) if p.is_file()]:
        place = snapshot / path.relative_to(caches["logits"])
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / digest(path))
        place.symlink_to(os.path.relpath(blobs / digest(path), place.parent))
    assert len(CachedTeacher(snapshot).parts["train"]) == 20
    assert len(CachedTeacher(snapshot / "train").parts["train"]) == 20
    blob = blobs / digest(caches["logits"] / "train/data/data-00000.arrow")
    shutil.move(blob, tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="with the symbolic link"):
        CachedTeacher(snapshot)


def test_nothing_outside_is_uploaded(caches, tmp_path, monkeypatch):
    folder = copy(caches, tmp_path)
    (tmp_path / "key").write_text("precious")
    (folder / "more").symlink_to(tmp_path / "key")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: pytest.fail("the hub was called"))
    with pytest.raises(CacheError, match="with the symbolic link"):
        CachedTeacher(folder).push_to_hub("me/copy")


# ---- types and sizes ----

STRANGE: list[Any] = [
    None,
    -1,
    0,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    True,
    "",
    "x" * 5000,
    "a\x1b[2J",
    [],
    [1],
    {},
    "7",
]
_LOOSE = {"labels", "known_by", "tokenizer", "part", "kd_trainer"}  # of several types
_WRONG = [(field, value) for field, (fits, _) in FIELDS.items() for value in STRANGE if not fits(value)]


def put(content: dict[str, Any], field: str, value: Any) -> None:
    *above, last = field.split(".")
    for part in above:
        content = content[part]
    content[last] = value


@pytest.mark.parametrize("field", FIELDS)
def test_a_setting_of_another_type_or_size_is_one_clear_error(field, caches, tmp_path):
    folder = copy(caches, tmp_path)
    path = folder / "train/manifest.json"
    whole = path.read_text()
    values = [value for name, value in _WRONG if name == field]
    assert values
    for value in values:
        path.write_text(whole)
        reseal(path, lambda m, v=value: put(m, field, v))
        with pytest.raises(CacheError, match=rf"(with .* for '{field}'; expected|of layout .*; expected layout)"):
            CachedTeacher(folder)
    path.write_text(whole)
    reseal(path, lambda m: put(m, field, 0) or [m.pop(field, None), m.get(field.split(".")[0], {}) and 0])
    if "." not in field:
        with pytest.raises(CacheError, match=rf"(no value for '{field}[.\w]*'; expected|of layout None)"):
            CachedTeacher(folder)


@pytest.mark.parametrize("value", [v for v in STRANGE if v not in (0, "7")], ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("field", ["rows", "positions", "bytes", "xxh3"])
def test_a_number_of_a_shard(field, value, caches, tmp_path):
    folder = copy(caches, tmp_path)
    reseal(folder / "train/manifest.json", lambda m: m["shards"][0].update({field: value}))
    with pytest.raises(CacheError, match=rf"for 'shards\.0\.{field}'; expected"):
        CachedTeacher(folder)


TOGETHER: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shards": lambda m: m.update(shards=[]),
    "shards ": lambda m: m.update(shards={"0": m["shards"][0]}),
    "shards  ": lambda m: m.update(shards=[1, 2, 3]),
    "total_rows": lambda m: m.update(total_rows=21),
    "total_bytes": lambda m: m.pop("total_bytes"),
    "total_positions": lambda m: m.update(total_positions=2**60),
    "shards   ": lambda m: [m["shards"][0].update(rows=7), m["shards"][1].update(rows=9)],
    "rows_per_shard": lambda m: m.update(batch_rows=3),
    "k": lambda m: m.update(format="topk", k=37, temperature=1.0, dtype="float16"),
    "k ": lambda m: m.update(format="sampled", k=None, temperature=1.0),
    "temperature": lambda m: m.update(format="topk", k=3, dtype="float16"),
    "dtype": lambda m: m.update(dtype="uint8"),
    "classes": lambda m: m.update(classes=40),
    "classes ": lambda m: m.update(shape=[36]),
    "hidden_size": lambda m: m.update(format="hidden"),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_numbers_that_contradict_each_other(case, caches, tmp_path):
    folder = copy(caches, tmp_path)
    reseal(folder / "train/manifest.json", TOGETHER[case])
    with pytest.raises(CacheError, match=rf"for '{case.strip()}'; expected"):
        CachedTeacher(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "7", '"x"', "null", "[]", "{}", "9" * 10_000, '{"sha256": NaN}', "\ud800"]
)
@pytest.mark.parametrize("name", ["manifest.json", "building.json"])
def test_a_manifest_that_is_no_object(name, text, caches, tmp_path):
    folder = copy(caches, tmp_path)
    (folder / "train/manifest.json").unlink()
    (folder / "train" / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CacheError, match=r"(as it was written, because it was changed or cut|unfinished)"):
        CachedTeacher(folder)
    with pytest.raises(CacheError, match="as it was written, because it was changed or cut"):
        rebuild(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("batch_rows", 0), ("rows_per_shard", "8"), ("task", []), ("seed", None)])
def test_an_unfinished_cache_is_checked_before_it_goes_on(field, value, caches, tmp_path):
    folder = copy(caches, tmp_path)
    (folder / "train/manifest.json").rename(folder / "train/building.json")
    reseal(folder / "train/building.json", lambda m: m.update({field: value}))
    with pytest.raises(CacheError, match=f"building.json' with .* for '{field}'; expected"):
        rebuild(tmp_path)


# ---- what is in the shards ----


def table(rows: int = 8, **columns: Any) -> pa.RecordBatch:
    """A shard as the format `logits` of 37 classes has it, a position for each row, with some columns replaced."""
    ids = np.arange(rows)
    kept = {"row_id": pa.array(ids), "signature": pa.array(ids.astype(np.uint64)), "logits": lists()[:rows], **columns}
    return pa.RecordBatch.from_pydict({name: column for name, column in kept.items() if column is not None})


def lists(width: int = 37, dtype: Any = np.float32) -> pa.ListArray:
    entries = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(8 * width, dtype)), width)
    return pa.ListArray.from_arrays(pa.array(np.arange(9, dtype=np.int32)), entries)


def with_offsets(path: Path, *offsets: int) -> None:
    """What pyarrow would refuse to write."""
    before, after = np.arange(9, dtype=np.int32).tobytes(), np.array(offsets, np.int32).tobytes()
    assert path.read_bytes().count(before) == 1
    path.write_bytes(path.read_bytes().replace(before, after))


SHARDS: dict[str, Any] = {
    "no shard": b"precious",
    "empty": b"",
    "no rows": lambda: table(4),
    "no ids": lambda: table(row_id=None),
    "ids of another type": lambda: table(row_id=pa.array([str(i) for i in range(8)])),
    "signatures of another type": lambda: table(signature=pa.array(np.zeros(8))),
    "no columns": lambda: table(logits=None),
    "another column": lambda: table(logits=None, hidden=lists()),
    "one column more": lambda: table(more=lists()),
    "texts": lambda: table(logits=pa.array([["x"]] * 8)),
    "another width": lambda: table(logits=lists(36)),
    "another dtype": lambda: table(logits=lists(dtype=np.float16)),
    "offsets beyond": table,
    "offsets that fall": table,
    "offsets below": table,
    "compressed": table,
    "nothing in places": lambda: table(logits=pa.array([[[0.0] * 37]] * 7 + [None], lists().type)),
}


@pytest.mark.parametrize("case", SHARDS)
def test_a_shard_with_other_content(case, caches, tmp_path):
    """Its digest is right: the manifest is of the same origin."""
    folder = copy(caches, tmp_path)
    path, made = folder / "train/data/data-00000.arrow", SHARDS[case]
    if isinstance(made, bytes):
        path.write_bytes(made or b"\0")
    else:
        options = pa.ipc.IpcWriteOptions(compression="lz4" if case == "compressed" else None)
        batch = made()
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, batch.schema, options=options) as writer:
            writer.write_batch(batch)
    changed = {"offsets beyond": (0, 1, 2, 3, 4, 5, 6, 7, 10**6), "offsets that fall": (0, 5, 2, 3, 4, 5, 6, 7, 8)}
    changed["offsets below"] = (-(10**6), 1, 2, 3, 4, 5, 6, 7, 8)
    if case in changed:
        with_offsets(path, *changed[case])

    def note(manifest: dict[str, Any]) -> None:
        size = path.stat().st_size
        manifest["total_bytes"] += size - manifest["shards"][0]["bytes"]
        manifest["total_positions"] += 8 - manifest["shards"][0]["positions"]
        manifest["shards"][0] |= {"bytes": size, "xxh3": digest(path, by=xxhash.xxh3_128), "positions": 8}

    reseal(folder / "train/manifest.json", note)
    refused = r"(one whose .*data.* this package did not write; expected .* because|differs from the one)"
    with pytest.raises(CacheError, match=refused):
        read(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"weights": torch.zeros(37, 24)}, {"weight": torch.zeros(36, 24)}, {"weight": torch.zeros(37)},
     {"weight": torch.zeros(37, 24), "bias": torch.zeros(36)}, None],
    ids=str,
)  # fmt: skip
def test_a_head_of_another_shape(tensors, caches, tmp_path):
    folder = copy(caches, tmp_path, "hidden")
    path = folder / "train/head.safetensors"
    path.write_bytes(b"no tensors") if tensors is None else save_file(tensors, path)
    reseal(folder / "train/manifest.json", lambda m: m.update(head_sha256=digest(path)))
    with pytest.raises(CacheError, match=r"one whose .*head\.safetensors this package did not write; .* because it "):
        read(tmp_path)


def test_ids_beyond_the_classes(caches, tmp_path):
    """They would be read out of the bounds of the student's logits."""
    folder = copy(caches, tmp_path, "topk")
    reseal(folder / "train/manifest.json", lambda m: m.update(classes=33, common_ids=33))  # as many bits
    with pytest.raises(CacheError, match=r"because ids are beyond the 33 classes of its manifest"):
        read(tmp_path)


# ---- checkpoints have manifests too ----


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"../outside": {"bytes": 8, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"/etc/hostname": {"bytes": 1, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"x": 7}),
        lambda m: m["files"].update({"x": {"bytes": "8", "sha256": "0" * 64}}),
        lambda m: m["files"].update({"x": {"bytes": 8}}),
        lambda m: m.update(files=[1]),
        lambda m: m.pop("files"),
        lambda m: m.pop("resumable"),
        lambda m: m.update(processes="two"),
    ],
)
def test_a_checkpoints_manifest_of_a_stranger(change, tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (tmp_path / "outside").write_text("precious")
    (folder / "x").write_text("precious")
    checkpoints.finish(folder, step=1, processes=1, resumable=True)
    assert checkpoints.damage(folder) is None
    path = folder / checkpoints.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert checkpoints.not_resumable(folder) == f"{checkpoints.MANIFEST} cannot be read"
