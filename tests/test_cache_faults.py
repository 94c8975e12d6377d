"""A teacher cache in a hard world: killed buildings, damaged files, two runs at once, a full or closed disk."""

from __future__ import annotations

import random

import pytest

from kd_trainer import cache_store
from tests import cache_kills

# ---- kills ----


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_building_ends_in_the_files_of_one_that_was_not(processes, tmp_path):
    """Three kills or more; `python tests/cache_kills.py --kills 20 --processes 2` does more of the same."""
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
    cache_store.begin(tmp_path, {"layout": cache_store.LAYOUT})
    found = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    assert found == [".gitattributes", "building.json"]
