"""Every file has the mode that the process's umask gives new files: no more, no less."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kd_trainer import files
from kd_trainer.report import build_report, load_run
from kd_trainer.report.runs import save_predictions
from tests.cache.test_cached_teacher import cache
from tests.helpers import tiny

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """Of every file, in octal digits."""
    return {str(p.relative_to(folder)): oct(stat.S_IMODE(p.stat().st_mode)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_a_new_file(mask, tmp_path):
    with umask(mask):
        files.write_atomically(tmp_path / "a/b", "x")
        with files.atomic_file(tmp_path / "c") as file:
            file.write(b"x")
            (half,) = [p for p in tmp_path.iterdir() if p.name.startswith(".c.")]
            assert not stat.S_IMODE(half.stat().st_mode) & mask, "nor while it is written"
    assert modes(tmp_path) == dict.fromkeys(("a/b", "c"), oct(0o666 & ~mask))


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_a_file_that_is_replaced_keeps_its_mode(mode, tmp_path):
    path = files.write_atomically(tmp_path / "a", "x")
    path.chmod(mode)
    with umask(0o022):
        files.write_atomically(path, "y")
    assert modes(tmp_path) == {"a": oct(mode)}
    assert path.read_text() == "y"


def test_a_link_that_is_replaced_is_a_file_of_its_own(tmp_path):
    (tmp_path / "real").write_text("precious")
    (tmp_path / "a").symlink_to(tmp_path / "real")
    with umask(0o027):
        files.write_atomically(tmp_path / "a", "y")
    assert not (tmp_path / "a").is_symlink()
    assert modes(tmp_path)["a"] == oct(0o640)
    assert (tmp_path / "real").read_text() == "precious"


def test_names_beside_each_other_do_not_meet(tmp_path, monkeypatch):
    """A name that is taken, a link among them, is not written through."""
    taken = [b"\0" * 6, b"\1" * 6, b"\2" * 6]
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f".a.{taken[0].hex()}").symlink_to(tmp_path / "precious")
    (tmp_path / f".a.{taken[1].hex()}").write_text("another's")
    monkeypatch.setattr(os, "urandom", lambda _: taken.pop(0))
    files.write_atomically(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_a_whole_run(mask, tmp_path):
    """Cache (shards, notes, manifests, head, card, lock), checkpoints, card, distillation.json, predictions, report."""
    with umask(mask):
        trainer = tiny.trainer(
            "causal_lm", tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1, kd_reduction="tokenmean",
            kd_loss_implementation="full", **cache(tmp_path / "cache", "hidden"),
        )  # fmt: skip
        trainer.train()
        trainer.evaluate()
        trainer.create_model_card()
        save_predictions(tmp_path / "run", torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
        build_report([load_run(tmp_path / "run", "distilled")], tmp_path / "report")
    found = modes(tmp_path)
    written = {"manifest.json", "head.safetensors", "checkpoint_manifest.json", "distillation.json", "README.md"}
    assert written <= {Path(name).name for name in found}
    assert any(name.startswith("report/") and name.endswith(".png") for name in found)
    own = {name: mode for name, mode in found.items() if Path(name).name != "model.safetensors"}  # upstream's: 0600
    assert {name: mode for name, mode in own.items() if mode != oct(0o666 & ~mask)} == {}
