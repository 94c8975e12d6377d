"""A teacher cache in a hard world: killed buildings, damaged files, two runs at once, a full or closed disk."""

from __future__ import annotations

from kd_trainer import cache_store

# ---- kills ----


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    (tmp_path / "data").mkdir()
    left = [".manifest.json.a", ".building.json.a", ".head.safetensors.a", ".README.md.a"]
    left += ["data/.data-00003.arrow.a", "data/.data-00003.json.a", "data/.state.json.a"]
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".gitattributes").write_bytes(b"of the hub")
    cache_store.begin(tmp_path, {"layout": cache_store.LAYOUT})
    found = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    assert found == [".gitattributes", "building.json"]
