"""Checkpoints: whole ones are gone on from, others are refused, whatever happened while they were written."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from kd_trainer.training.checkpoints import MANIFEST, Checkpoints, damage, finish, newest_resumable, rotate
from tests.helpers import tiny
from tests.helpers.kills import survive, weights, whole
from tests.helpers.launch import shared_folder

STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}


def trained(folder: Path, **kwargs):
    run = tiny.trainer("plain", folder, **{**STEPS, **kwargs})
    run.train()
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run's folder with checkpoints 2, 4 and 6, and its weights; not to be written to."""
    folder = tmp_path_factory.mktemp("original")
    return folder, tiny.weights(trained(folder).model)


@pytest.fixture
def run_folder(original, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(original[0], tmp_path / "run"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def never_finished(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    folder.with_name(folder.name + ".unfinished").touch()


# ---- the manifest ----


def test_a_checkpoint_ends_with_a_manifest_of_all_its_files(original):
    folder = original[0] / "checkpoint-4"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {MANIFEST}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"} <= set(manifest["files"])
    assert manifest["step"] == 4
    assert manifest["processes"] == 1
    assert manifest["resumable"]
    assert damage(folder) is None
    assert not list(original[0].glob("*.unfinished"))


def test_files_in_subfolders_count(tmp_path):
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3" / "shard.pt").write_bytes(b"abc")
    finish(tmp_path, step=3, processes=2, resumable=True)
    assert damage(tmp_path) is None
    flip_a_bit(tmp_path / "global_step3" / "shard.pt")
    assert "shard.pt" in damage(tmp_path)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (lambda folder: cut(folder / "scheduler.pt"), "scheduler.pt has .* bytes, of .* that were written"),
        (lambda folder: flip_a_bit(folder / "model.safetensors"), "model.safetensors is not what was written"),
        (lambda folder: flip_a_bit(folder / "trainer_state.json"), "trainer_state.json is not what was written"),
        (lambda folder: (folder / MANIFEST).write_text("{"), f"{MANIFEST} cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), f"{MANIFEST} cannot be read"),
        (lambda folder: never_finished(folder), "it was not written to its end"),
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over(run_folder, harm, reason, caplog):
    harm(run_folder / "checkpoint-6")
    run = tiny.trainer("plain", run_folder, **STEPS)
    before = tiny.weights(run.model)
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` is .*checkpoint-6.*{reason}") as error:
        run.train(resume_from_checkpoint=str(run_folder / "checkpoint-6"))
    assert f"Resume from {run_folder / 'checkpoint-4'}" in str(error.value)
    assert torch.equal(tiny.weights(run.model), before)
    with caplog.at_level(logging.WARNING):
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6
    assert ("checkpoint-6 is passed over" in caplog.text) == (reason != "there is no such folder")


def test_passing_over_a_damaged_one_ends_in_the_same_weights(run_folder, original):
    flip_a_bit(run_folder / "checkpoint-6" / "optimizer.pt")
    resumed = tiny.trainer("plain", run_folder, **STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(tiny.weights(resumed.model), original[1])
    assert damage(run_folder / "checkpoint-6") is None, "it was written again"


def test_a_run_that_had_ended_takes_no_further_step(run_folder, original):
    """Killed after its last checkpoint: upstream would go on to the end of the optimizer step after it."""
    resumed = tiny.trainer("plain", run_folder, **STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert torch.equal(tiny.weights(resumed.model), original[1])
    assert not (run_folder / "checkpoint-7").exists()


def test_no_whole_checkpoint_at_all(run_folder):
    for step in (2, 4, 6):
        (run_folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    run = tiny.trainer("plain", run_folder, **STEPS)
    with pytest.raises(ValueError, match=r"a whole checkpoint in .*of checkpoint-2: optimizer\.pt is missing"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="There is no whole one beside it"):
        run.train(resume_from_checkpoint=str(run_folder / "checkpoint-2"))


def test_a_checkpoint_of_the_model_alone_is_not_gone_on_from(tmp_path):
    run = trained(tmp_path, save_only_model=True)
    assert damage(tmp_path / "checkpoint-6") is None
    with pytest.raises(ValueError, match=r"it holds the model alone \(save_only_model\)"):
        run.train(resume_from_checkpoint=True)


def test_another_trainers_checkpoint_is_taken_with_a_warning(tmp_path, caplog):
    stock = tiny.stock_trainer("classification", tmp_path, **STEPS)
    stock.train()
    run = tiny.trainer("classification", tmp_path, **{**STEPS, "max_steps": 8})
    with caplog.at_level(logging.WARNING):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert "whether its files are whole is not known" in caplog.text
    assert run.state.global_step == 8
    assert damage(tmp_path / "checkpoint-8") is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("optimizer.pt", "the optimizer's state is missing"),
        ("rng_state.pth", "the state of the random numbers is missing"),
        ("trainer_state.json", "the trainer's state is missing"),
    ],
)
def test_where_part_of_another_trainers_checkpoint_is_missing_it_is_refused(run_folder, name, reason):
    (run_folder / "checkpoint-6" / MANIFEST).unlink()
    (run_folder / "checkpoint-6" / name).unlink()
    run = tiny.trainer("plain", run_folder, **STEPS)
    with pytest.raises(ValueError, match=reason):
        run.train(resume_from_checkpoint=str(run_folder / "checkpoint-6"))


def test_another_number_of_processes_is_told(run_folder, caplog):
    manifest = json.loads((run_folder / "checkpoint-4" / MANIFEST).read_text())
    (run_folder / "checkpoint-4" / MANIFEST).write_text(json.dumps({**manifest, "processes": 2}))
    with caplog.at_level(logging.WARNING):
        tiny.trainer("plain", run_folder, **STEPS).train(resume_from_checkpoint=str(run_folder / "checkpoint-4"))
    assert "was written by 2 processes and goes on with 1" in caplog.text


def test_the_stock_trainer_reads_our_checkpoints(run_folder):
    stock = tiny.stock_trainer("plain", run_folder, **STEPS)
    stock.compute_loss = lambda model, inputs, **kwargs: model(inputs["features"]).square().mean()
    stock.train(resume_from_checkpoint=str(run_folder / "checkpoint-4"))
    assert stock.state.global_step == 6


def test_with_the_stock_trainer_too(tmp_path):
    class Careful(Trainer):
        def train(self, resume_from_checkpoint=None, *args, **kwargs):
            checkpoints = Checkpoints(self.args, self.accelerator)
            return super().train(checkpoints.resume_from(resume_from_checkpoint), *args, **kwargs)

        def _save_checkpoint(self, model, trial):
            with Checkpoints(self.args, self.accelerator).saving(self._get_output_dir(trial=trial), self.state):
                super()._save_checkpoint(model, trial)

    pair = {"model": tiny.models("classification")[0], "train_dataset": tiny.rows("classification")}
    for steps in (4, 6):
        run = Careful(
            **pair, args=tiny.stock_arguments(tmp_path, **{**STEPS, "max_steps": steps}), data_collator=tiny.pad
        )
        run.train(resume_from_checkpoint=steps == 6)
    assert damage(tmp_path / "checkpoint-6") is None
    (tmp_path / "checkpoint-6" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"scheduler.pt is missing"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


# ---- rotation ----


def test_the_last_whole_one_outlives_a_save_that_is_cut(tmp_path):
    """With room for one checkpoint upstream deletes the old one while the new one is not yet known to be whole."""

    run = tiny.trainer("plain", tmp_path, **{**STEPS, "save_total_limit": 1})
    seen = []

    def watched(folder, **kwargs):
        seen.append(sorted(p.name for p in tmp_path.glob("checkpoint-*") if p.is_dir()))
        return finish(folder, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kd_trainer.training.checkpoints.finish", watched)
        run.train()
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False).save_total_limit == 1


def test_rotation_takes_unfinished_ones_first_and_keeps_the_best(original, tmp_path):
    for step in (1, 2, 3, 10, 20):
        shutil.copytree(original[0] / "checkpoint-4", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-10.unfinished").touch()
    (tmp_path / "checkpoint-mine").mkdir()

    def left() -> list[str]:
        return sorted(p.name for p in tmp_path.iterdir())

    rotate(tmp_path, None, tmp_path / "checkpoint-20", None)
    assert len(left()) == 7
    rotate(tmp_path, 4, tmp_path / "checkpoint-20", str(tmp_path / "checkpoint-1"))
    assert left() == ["checkpoint-1", "checkpoint-2", "checkpoint-20", "checkpoint-3", "checkpoint-mine"]
    rotate(tmp_path, 1, tmp_path / "checkpoint-20", str(tmp_path / "checkpoint-1"))
    assert left() == ["checkpoint-1", "checkpoint-20", "checkpoint-mine"]
    rotate(tmp_path, 1, tmp_path / "checkpoint-20", str(tmp_path / "checkpoint-20"))
    assert left() == ["checkpoint-20", "checkpoint-mine"]


def test_a_half_deleted_checkpoint_is_none(original, tmp_path, monkeypatch):
    """A kill in the middle of a deletion."""
    for step in (4, 6):
        shutil.copytree(original[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
    rotate(tmp_path, 1, tmp_path / "checkpoint-6", None)
    assert damage(tmp_path / "checkpoint-4") == "it was not written to its end"
    assert newest_resumable(tmp_path) == (tmp_path / "checkpoint-6", {})


def test_the_best_model_is_checked_before_it_is_loaded(tmp_path):
    class Harm(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 6:
                flip_a_bit(Path(state.best_model_checkpoint) / "model.safetensors")

    options = {**STEPS, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trained(tmp_path / "well", **options)
    run = tiny.trainer("plain", tmp_path / "harmed", **options)
    run.add_callback(Harm())
    with pytest.raises(ValueError, match=r"`best_model_checkpoint` is .*model.safetensors is not what was written"):
        run.train()


# ---- full disks, NaN, memory ----


@pytest.mark.parametrize("full", ["optimizer.pt", "trainer_state.json"])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(full, tmp_path, original):
    """/dev/full refuses every write as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")

    class FillDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                (tmp_path / "checkpoint-4").mkdir()
                (tmp_path / "checkpoint-4" / full).symlink_to("/dev/full")

    run = tiny.trainer("plain", tmp_path, **{**STEPS, "save_total_limit": 1})
    run.add_callback(FillDisk())
    with pytest.raises(RuntimeError, match=r"`checkpoint-4` is not written: .*; expected room .* MB are free") as error:
        run.train()
    assert "checkpoint-2 is whole: go on with trainer.train(resume_from_checkpoint=True)" in str(error.value)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    resumed = tiny.trainer("plain", tmp_path, **STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(tiny.weights(resumed.model), original[1])


def test_the_first_save_has_nothing_to_go_back_to(tmp_path):
    class NoFolder(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            (tmp_path / "checkpoint-2").touch()  # a file where the folder should be

    run = tiny.trainer("plain", tmp_path, **STEPS)
    run.add_callback(NoFolder())
    with pytest.raises(RuntimeError, match=r"`checkpoint-2` is not written: .*There is no other"):
        run.train()


def test_nan_leaves_the_last_checkpoint_whole(tmp_path, original):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.linear.weight.fill_(float("nan"))

    run = tiny.trainer("plain", tmp_path, **STEPS)
    run.add_callback(Spoil())
    with pytest.raises(RuntimeError, match="not finite at step 4"):
        run.train()
    assert newest_resumable(tmp_path) == (tmp_path / "checkpoint-4", {})
    resumed = tiny.trainer("plain", tmp_path, **STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(tiny.weights(resumed.model), original[1])


# Row 28 kills the process that reads it, once the first checkpoint is whole (its batch is read two steps ahead).
# Apart from pytest: torch raises at the death of a worker wherever the main process happens to be.
DEADLY = """
import os, sys, time
from pathlib import Path
from tests.helpers import tiny

class Rows(list):
    def __getitem__(self, index):
        if index == 28:
            while not Path(sys.argv[1], "checkpoint-2", "checkpoint_manifest.json").exists():
                time.sleep(0.01)
            os._exit(1)
        return super().__getitem__(index)

options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
tiny.trainer("plain", sys.argv[1], data=Rows(tiny.rows("plain")), dataloader_num_workers=1, **options).train()
"""


@pytest.mark.launch
def test_a_dataloader_worker_that_dies_leaves_the_last_checkpoint(tmp_path, original):
    run = subprocess.run(
        [sys.executable, "-c", DEADLY, str(tmp_path)], capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[2], timeout=120,
    )  # fmt: skip
    assert run.returncode != 0
    assert re.search("RuntimeError: DataLoader worker .* exited unexpectedly", run.stderr)
    assert newest_resumable(tmp_path) == (tmp_path / "checkpoint-2", {})
    resumed = tiny.trainer("plain", tmp_path, **STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(tiny.weights(resumed.model), original[1])


def test_what_fails_after_the_end_of_a_checkpoint_leaves_it(tmp_path, monkeypatch):
    def die(*args, **kwargs):
        finish(*args, **kwargs)
        raise RuntimeError("a data worker died")  # as from a signal, at any line

    monkeypatch.setattr("kd_trainer.training.checkpoints.finish", die)
    with pytest.raises(RuntimeError, match="a data worker died"):
        tiny.trainer("plain", tmp_path, **STEPS).train()
    assert newest_resumable(tmp_path)[0] is not None


# ---- kills ----


@pytest.mark.launch
@pytest.mark.parametrize(("processes", "kills"), [(1, 3), (2, 3)])
def test_a_killed_training_ends_in_the_weights_of_one_that_was_not(processes, kills, tmp_path, tmp_path_factory):
    """`python tests/helpers/kills.py --kills 20 --processes 2` does more of the same."""
    for name in ("killed", "unkilled"):
        (tmp_path / name).mkdir()
    with shared_folder(tmp_path_factory):  # no second start of two processes beside it
        fell = survive(tmp_path / "killed", kills=kills, processes=processes)
        assert any("inside" in where for where in fell), fell
        assert weights(tmp_path / "killed") == whole(tmp_path / "unkilled", processes)
