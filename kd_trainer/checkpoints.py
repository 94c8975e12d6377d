"""Checkpoints that are whole or known not to be: a manifest written last, checked before anything is read.

For: `trainer.py`; `CompleteCheckpoints` works in front of any `Trainer`. Leaves what is in a checkpoint to upstream.
The stock Trainer resumes from a checkpoint that a kill has cut, with a fresh optimizer or other random numbers, and
says nothing. Imports: checks, files, transformers.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from .checks import fail, message, warn
from .files import digest, write_atomically

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # at run time the mixin has no base of its own, so that it fits in front of any Trainer class
    _InFrontOf = Trainer
else:
    _InFrontOf = object

MANIFEST = "checkpoint_manifest.json"

# Of a checkpoint without a manifest (another Trainer's): one of each line must be there, whatever the backend.
_NEEDED = {
    "the trainer's state": ("trainer_state.json",),
    "the optimizer's state": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "the state of the random numbers": ("rng_state*.pth",),
}


def begin(folder: Path) -> None:
    """Marks `folder` as unfinished, beside it: another Trainer's checkpoint has no manifest either, and no mark."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_mark(folder), "This checkpoint was not written to its end: no training resumes from it.\n")
    (folder / MANIFEST).unlink(missing_ok=True)


def finish(folder: Path, *, step: int, processes: int, resumable: bool) -> None:
    """Writes the manifest of `folder`: every file with its size and SHA-256, synced to the disk before.

    Args:
        step: optimizer steps done.
        processes: how many processes trained; each has its own random numbers.
        resumable: False where the checkpoint holds the model alone (`save_only_model`).
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        digests = list(pool.map(lambda path: digest(path, sync=True), paths))
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    manifest = {"format": 1, "step": step, "processes": processes, "resumable": resumable, "files": files}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
    _mark(folder).unlink(missing_ok=True)


def damage(folder: Path) -> str | None:
    """What is missing from `folder` or differs from its manifest; None where the checkpoint is whole."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / MANIFEST).exists():
        if _mark(folder).exists():
            return "it was not written to its end"
        lacks = (what for what, names in _NEEDED.items() if not any(any(folder.glob(name)) for name in names))
        return next((f"{what} is missing" for what in lacks), None)
    try:
        manifest = _manifest(folder)
        files = {_inside(folder, name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        wrong = [each for each in files.values() if type(each[0]) is not int or not isinstance(each[1], str)]
        if wrong or type(manifest["processes"]) is not int or not isinstance(manifest["resumable"], bool):
            raise TypeError("a value of another type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    for path, (size, _) in files.items():  # first: it reads no file
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes, of {size} that were written"
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest, files)
        changed = [path.name for path, digest in zip(files, digests, strict=True) if digest != files[path][1]]
    return f"{changed[0]} is not what was written (its SHA-256 differs)" if changed else None


def _inside(folder: Path, name: str) -> Path:
    """The file of a manifest; ValueError where its name leads out of the folder."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ValueError(name)
    return folder / name


def not_resumable(folder: Path) -> str | None:
    """Why a training cannot go on from `folder` as if it had never stopped; None where it can."""
    found = damage(folder)
    if found is None and (folder / MANIFEST).exists() and not _manifest(folder)["resumable"]:
        return "it holds the model alone (save_only_model)"
    return found


def newest_resumable(output_dir: Path) -> tuple[Path | None, dict[str, str]]:
    """The checkpoint of the highest step that a training can go on from, and why not from those of higher steps."""
    refused: dict[str, str] = {}
    for folder in reversed(_by_step(output_dir)):
        reason = not_resumable(folder)
        if reason is None:
            return folder, refused
        refused[folder.name] = reason
    return None, refused


def rotate(output_dir: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Deletes checkpoints beyond `limit`, unfinished ones first, then the oldest; never `newest` and `best`."""
    kept = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    folders = [folder for folder in _by_step(output_dir) if folder.resolve() not in kept]
    folders.sort(key=lambda folder: not _mark(folder).exists())  # a stable sort: within each, by step
    surplus = 0 if not limit or limit < 0 else max(0, len(folders) - max(limit - len(kept), 0))
    for folder in folders[:surplus]:
        begin(folder)  # from here on it is no checkpoint any more, however far the deletion comes
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            _mark(folder).unlink(missing_ok=True)


class CompleteCheckpoints(_InFrontOf):
    """A `Trainer`'s checkpoints end with a manifest, and it resumes from whole ones alone.

    `train(resume_from_checkpoint=True)` takes the newest whole checkpoint; one that is named and is not whole is
    refused. A checkpoint without a manifest (of a Trainer without this class) is taken with a warning where no part of
    it is missing. One process of those that save hashes the files of all, after a barrier.

    Raises:
        ValueError: the checkpoint to resume from is not whole, or there is none.
        RuntimeError: a checkpoint could not be written; which one is the last whole one.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, from a checkpoint that was checked."""
        if resume_from_checkpoint:
            named = None if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            resume_from_checkpoint = self._on_main_process(lambda: self._checked(named))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's; nothing for a run that was resumed at its end, where upstream would take one step more."""
        if self.is_in_train and 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _checked(self, named: Path | None) -> str:
        """The checkpoint to resume from, every file of it read: the one that is named, or the newest."""
        output_dir = Path(str(self.args.output_dir))
        if named is None:
            found, refused = newest_resumable(output_dir)
            for name, reason in refused.items():
                warn(logger, "[kd_trainer] %s is passed over: %s.", name, reason)
            if found is None:
                mend = "Train from the start: leave resume_from_checkpoint out."
                because = "; ".join(f"of {name}: {reason}" for name, reason in refused.items()) or None
                fail("resume_from_checkpoint", True, f"a whole checkpoint in {output_dir}", mend, because=because)
        else:
            found = named
            flaw = not_resumable(named)
            if flaw is not None:
                whole, _ = newest_resumable(named.parent)
                mend = f"Resume from {whole}, the newest whole one." if whole else "There is no whole one beside it."
                mend += " Its weights alone, where they are whole: from_pretrained, and train from the start."
                fail("resume_from_checkpoint", repr(str(named)), "a whole checkpoint", mend, because=flaw)
        if not (found / MANIFEST).exists():
            warn(logger, "[kd_trainer] %s has no %s: whether its files are whole is not known.", found, MANIFEST)
        elif _manifest(found)["processes"] != self.args.world_size:
            warn(
                logger,
                "[kd_trainer] %s was written by %d processes and goes on with %d: orders and random numbers will "
                "differ from those of a run that was never stopped.",
                found,
                _manifest(found)["processes"],
                self.args.world_size,
            )
        return str(found)

    def _on_main_process(self, ask: Callable[[], Any]) -> Any:
        """The answer of the main process; its ValueError or RuntimeError is raised in every process."""
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                answer[0] = ask()
            except (ValueError, RuntimeError) as error:
                answer[1] = error
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Upstream's; then the manifest, and only then older checkpoints are deleted."""
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        limit = self.args.save_total_limit
        try:
            if self.args.should_save:
                begin(folder)
            self.accelerator.wait_for_everyone()
            self.args.save_total_limit = None  # upstream would delete the last whole one before this one is
            super()._save_checkpoint(model, trial)
            self.args.save_total_limit = limit
            if self.args.should_save and (folder / TRAINING_ARGS_NAME).exists():
                torch.save(self.args, folder / TRAINING_ARGS_NAME)  # with the limit in it
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                resumable = not self.args.save_only_model
                finish(folder, step=self.state.global_step, processes=self.args.world_size, resumable=resumable)
        except Exception as error:  # each library that writes raises another kind
            if (folder / MANIFEST).exists():  # written last: it is whole, the error is another's, as of a data worker
                raise
            self._tell_unwritten(folder, error)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate(run_dir, limit, folder, self.state.best_model_checkpoint)

    def _tell_unwritten(self, folder: Path, error: Exception) -> None:
        """Removes what there is of `folder` and raises RuntimeError with what to go on from."""
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                _mark(folder).unlink(missing_ok=True)
        free = shutil.disk_usage(folder.parent).free / 1e6 if folder.parent.is_dir() else 0.0
        shown = f"not written: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        whole, _ = newest_resumable(folder.parent)
        last = f"{whole.name} is whole: go on with" if whole else "There is no other; without one it starts anew:"
        mend = f"{last} trainer.train(resume_from_checkpoint={bool(whole)}) when there is room."
        expected = f"room and permission for it in {folder.parent} ({free:,.0f} MB are free)"
        raise RuntimeError(message(folder.name, shown, expected, mend)) from error

    def _load_best_model(self) -> None:
        """Upstream's, of a checkpoint that was checked."""
        best = str(self.state.best_model_checkpoint)

        def check() -> str:
            reason = damage(Path(best))
            if reason is not None and (Path(best) / MANIFEST).exists():
                mend = "The model as the training left it is in the trainer: save it with trainer.save_model()."
                fail("best_model_checkpoint", repr(best), "a whole checkpoint", mend, because=reason)
            return best

        self._on_main_process(check)
        super()._load_best_model()


def _by_step(output_dir: Path) -> list[Path]:
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def _mark(folder: Path) -> Path:
    return folder.with_name(folder.name + ".unfinished")


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
