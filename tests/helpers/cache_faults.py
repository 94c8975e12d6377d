"""Damages a teacher cache, one fault at a time, and looks whether a wrong number is ever read.

`python tests/helpers/cache_faults.py --faults 50` draws faults and formats. After each, a training that reads the cache
alone must give the losses of the undamaged one, or end with an error that names the file; and a run that has the
teacher must repair the cache, byte for byte and without touching another shard, or report why it does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from kd_trainer import CachedTeacher
from kd_trainer.cache.store import BUILDING, DATA, HEAD, MANIFEST
from tests.helpers import tiny
from tests.helpers.cache_kill_run import FORMATS, trainer
from tests.helpers.cache_kills import content, difference

ROWS, STEPS = 64, 8  # a step for each shard
RIGHT = "the right numbers"

# ---- faults ----


class Damage(NamedTuple):
    """What was done to a cache.

    Args:
        message: the damage in words; files: those that were changed, by their path in the cache.
        repairs: what a run with the teacher does: "shards" or "head" (builds these alone), "all" (builds that part),
            "refuses", "leaves" (what neither it nor a training reads).
    """

    message: str
    files: list[str]
    repairs: str


Fault = Callable[[Path, Path, random.Random], Damage]  # (cache, another teacher's cache of the same data, draw)


def flip(path: Path, draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    places = [draw.randrange(len(data) * 8) for _ in range(draw.choice((1, 1, 3)))]
    for place in set(places):
        data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return f"{len(set(places))} bits flipped"


def cut(path: Path, draw: random.Random) -> str:
    size = draw.randrange(1, path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size} bytes"


def empty(path: Path, draw: random.Random) -> str:
    os.truncate(path, 0)
    return "emptied"


def remove(path: Path, draw: random.Random) -> str:
    path.unlink()
    return "removed"


def append(path: Path, draw: random.Random) -> str:
    with path.open("ab") as file:
        file.write(draw.randbytes(16))
    return "16 bytes appended"


def blank(path: Path, draw: random.Random) -> str:
    """As a disk leaves a file whose blocks were never written."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data) - 64)
    data[start : start + 64] = bytes(64)
    path.write_bytes(data)
    return "64 bytes zeroed"


_CHANGES = (flip, flip, cut, remove, empty, append, blank)


def shard(cache: Path, other: Path, draw: random.Random) -> Damage:
    chosen = draw.choice(sorted(cache.glob(f"*/{DATA}/*.arrow")))
    message = draw.choice(_CHANGES)(chosen, draw)
    return Damage(message, [str(chosen.relative_to(cache))], "shards")


def two_shards(cache: Path, other: Path, draw: random.Random) -> Damage:
    first, second = draw.sample(sorted(cache.glob(f"train/{DATA}/*.arrow")), 2)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    return Damage("swapped", [str(first.relative_to(cache)), str(second.relative_to(cache))], "shards")


def shard_of_another(cache: Path, other: Path, draw: random.Random) -> Damage:
    name = draw.choice(sorted(f.relative_to(cache) for f in cache.glob(f"*/{DATA}/*.arrow")))
    shutil.copy(other / name, cache / name)
    return Damage("another teacher's", [str(name)], "shards")


def head(cache: Path, other: Path, draw: random.Random) -> Damage:
    """Of the format hidden; the head of the first part serves all, that of the others is not read."""
    name = draw.choice(sorted(f.relative_to(cache) for f in cache.glob(f"*/{HEAD}")))
    if draw.random() < 0.2:
        shutil.copy(other / name, cache / name)
        return Damage("another teacher's", [str(name)], "head")
    return Damage(draw.choice(_CHANGES)(cache / name, draw), [str(name)], "head")


def manifest(cache: Path, other: Path, draw: random.Random) -> Damage:
    path = cache / draw.choice(("train", "eval")) / MANIFEST
    message = draw.choice((flip, cut, empty, append))(path, draw)
    return Damage(message, [str(path.relative_to(cache))], "refuses")


_EDITS: dict[str, Any] = {
    "temperature": 1.0, "k": 3, "dtype": "bfloat16", "task": "token_classification", "format": "logits", "classes": 36,
    "positions": "all", "batch_rows": 4, "rows_per_shard": 4, "total_rows": 63, "row_ids": "column", "vocabulary": 36,
    "head_scale": 2.0, "head_sha256": "0" * 64, "columns_read": [], "shape": [36], "part": "test", "layout": 9,
}  # fmt: skip


def manifest_edited(cache: Path, other: Path, draw: random.Random) -> Damage:
    path = cache / draw.choice(("train", "eval")) / MANIFEST
    kept = json.loads(path.read_text())
    edit = draw.choice((*_EDITS, "shards.rows", "shards.xxh3", "shards.name", "shards"))
    if edit == "shards":
        kept["shards"].pop()
    elif edit.startswith("shards."):
        value = {"rows": 7, "xxh3": "0" * 32, "name": "data-00001.arrow"}[edit.removeprefix("shards.")]
        kept["shards"][0][edit.removeprefix("shards.")] = value
    else:
        kept[edit] = _EDITS[edit]
    path.write_text(json.dumps(kept, indent=2, sort_keys=True))
    return Damage(f"{edit} edited", [str(path.relative_to(cache))], "refuses")


def manifest_of_another(cache: Path, other: Path, draw: random.Random) -> Damage:
    part = draw.choice(("train", "eval"))
    source = draw.choice((other / part, cache / ("eval" if part == "train" else "train")))
    shutil.copy(source / MANIFEST, cache / part / MANIFEST)
    message = "another teacher's" if source == other / part else "that of the other part"
    return Damage(message, [f"{part}/{MANIFEST}"], "refuses")


def part_of_another(cache: Path, other: Path, draw: random.Random) -> Damage:
    part = draw.choice(("train", "eval"))
    shutil.rmtree(cache / part)
    shutil.copytree(other / part, cache / part)
    return Damage("another teacher's", [part], "refuses")


def manifest_missing(cache: Path, other: Path, draw: random.Random) -> Damage:
    part = draw.choice(("train", "eval"))
    (cache / part / MANIFEST).unlink()
    return Damage("removed", [f"{part}/{MANIFEST}"], "all")


def unfinished(cache: Path, other: Path, draw: random.Random) -> Damage:
    part = draw.choice(("train", "eval"))
    (cache / part / MANIFEST).rename(cache / part / BUILDING)
    return Damage(f"{BUILDING} in its place", [f"{part}/{MANIFEST}"], "all")


def beside(cache: Path, other: Path, draw: random.Random) -> Damage:
    """What is for other readers: the card, and what `datasets` notes."""
    name = f"{draw.choice(('train', 'eval'))}/{draw.choice(('README.md', 'data/state.json', 'data/dataset_info.json'))}"
    return Damage(draw.choice((flip, cut, remove, empty))(cache / name, draw), [name], "leaves")


FAULTS: dict[str, Fault] = {
    f.__name__: f
    for f in (shard, two_shards, shard_of_another, head, manifest, manifest_edited, manifest_of_another,
              part_of_another, manifest_missing, unfinished, beside)
}  # fmt: skip
_WEIGHTS = (12, 3, 2, 6, 4, 8, 3, 2, 2, 2, 2)


# ---- what comes of them ----


class Caches:
    """Undamaged caches of all formats, and copies of them.

    Args:
        folder: for all of them.
    """

    def __init__(self, folder: Path, formats: tuple[str, ...] = FORMATS) -> None:
        self.folder, self.files, self.numbers = folder, dict[str, dict[str, bytes]](), dict[str, dict[str, Any]]()
        for kept in formats:
            for name, seed in (("whole", 0), ("other", 1)):
                out = folder / f"{name}-{kept}"
                trainer(out, kept, ROWS, pair=tiny.models("causal_lm", seed)).build_teacher_cache()
            self.files[kept] = content(self.whole(kept))
            self.numbers[kept], error = numbers(folder / "run", self.whole(kept))
            assert error is None

    def whole(self, kept: str) -> Path:
        return self.folder / f"whole-{kept}" / "cache"

    def other(self, kept: str) -> Path:
        return self.folder / f"other-{kept}" / "cache"

    def copy(self, kept: str) -> Path:
        """The folder of a run whose cache is a copy."""
        out = self.folder / "damaged"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.whole(kept), out / "cache")
        return out


def numbers(out: Path, cache: Path, **kwargs: Any) -> tuple[dict[str, Any], Exception | None]:
    """Losses of the steps and of an evaluation that read the cache alone; those before an error, and the error."""
    read: dict[str, Any] = {}
    try:
        teacher = CachedTeacher(cache)
        pair = (tiny.models("causal_lm", 5)[0], teacher)
        none = {"teacher_cache_dir": None, "teacher_cache_format": "auto", "teacher_cache_k": None}
        run = trainer(out, "auto", ROWS, pair=pair, max_steps=STEPS, **{**none, **kwargs})
        try:
            run.train()
            found = run.evaluate()
            read |= {name: found[name] for name in ("eval_loss", "eval_soft_loss", "eval_hard_loss") if name in found}
        finally:
            read |= tiny.logs(run)
    except Exception as error:
        return read, error
    return read, None


def alone(caches: Caches, kept: str, out: Path, damage: Damage) -> str:
    """What a training without the teacher makes of it; AssertionError where a wrong number was used."""
    expected = caches.numbers[kept]
    found, error = numbers(out, out / "cache")
    if error is None:
        assert found == expected, f"WRONG NUMBERS: {found} where {expected} are right"
        return RIGHT
    for name, values in found.items():  # up to the error
        right = expected[name][: len(values)] if isinstance(values, list) else expected[name]
        assert values == right, f"WRONG NUMBERS before the error: {name} {values} where {right} are right"
    message = str(error)
    assert isinstance(error, ValueError), f"{type(error).__name__}: {message}"
    part = out / "cache" / damage.files[0].split("/")[0]
    assert str(part) in message or any(Path(name).name in message for name in damage.files), f"names neither: {message}"
    return f"{type(error).__name__} after {len(found.get('loss', []))} steps"


def with_teacher(caches: Caches, kept: str, out: Path, damage: Damage) -> str:
    """The result of a run with the teacher; AssertionError where it differs from `damage.repairs`."""
    cache = out / "cache"
    stamps, before = _stamps(cache), content(cache)
    try:
        trainer(out, kept, ROWS).build_teacher_cache()
    except ValueError as error:
        message = str(error)
        assert damage.repairs == "refuses", message
        assert difference(content(cache), before) in ([], [".eval.lock"], [".train.lock"]), "refused, yet changed"
        assert any(fix in message for fix in ("again", "Or name another teacher_cache_dir")), message
        return "refused"
    assert damage.repairs != "refuses", "not refused"
    wrong = difference(content(cache), caches.files[kept])
    if damage.repairs == "leaves":
        assert wrong == damage.files, wrong
        return "left as it is"
    assert wrong == [], f"not the bytes of the undamaged cache: {wrong}"
    rewritten = [name for name, stamp in _stamps(cache).items() if stamp != stamps.get(name)]
    if damage.repairs == "all":
        part = damage.files[0].split("/")[0]
        assert all(name.startswith(part) for name in rewritten), rewritten
        return f"{part} built again"
    expected = sorted(damage.files) if damage.repairs == "shards" else []
    assert sorted(rewritten) == expected, f"built again: {rewritten} where {expected} were damaged"
    return f"repaired: {', '.join(Path(name).name for name in damage.files)} alone"


def _stamps(cache: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each shard, which change when it is written."""
    shards = sorted(cache.glob(f"*/{DATA}/*.arrow"))
    return {str(f.relative_to(cache)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in shards}


def one_fault(caches: Caches, draw: random.Random, kept: str, name: str) -> tuple[Damage, str, str]:
    """Makes the fault and both runs; AssertionError where one of them is not as it should be."""
    out = caches.copy(kept)
    damage = FAULTS[name](out / "cache", caches.other(kept), draw)
    read = alone(caches, kept, out, damage)
    return damage, read, with_teacher(caches, kept, out, damage)


def draw_fault(draw: random.Random, name: str | None = None) -> tuple[str, str]:
    """(format, name of a fault)."""
    name = name or draw.choices(list(FAULTS), _WEIGHTS)[0]
    return "hidden" if name == "head" else draw.choice(FORMATS), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--fault", choices=FAULTS, help="this kind alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, failed, refused = random.Random(options.seed), 0, 0
    logging.getLogger("kd_trainer").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(None):
            caches = Caches(Path(folder))
        for number in range(1, options.faults + 1):
            kept, name = draw_fault(draw, options.fault)
            try:
                with redirect_stdout(None):
                    damage, read, repaired = one_fault(caches, draw, kept, name)
                message = f"{' and '.join(damage.files)} {damage.message}: alone {read}; with the teacher {repaired}"
                refused += read != RIGHT
            except AssertionError as error:
                failed, message = failed + 1, f"FAILED: {error}"
            print(f"fault {number}, {kept}, {name}: {message}", flush=True)
    print(
        f"{options.faults} faults: {options.faults - failed} as they should be (alone, {refused} are an error that "
        f"names the file or part and {options.faults - failed - refused} touch nothing that is read), {failed} not"
    )
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
