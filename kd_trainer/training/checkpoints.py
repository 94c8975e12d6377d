"""Checkpoints that are whole or known not to be (a manifest, written last), and Ctrl-C that writes one.

For: `trainer.py`, which owns a `Checkpoints`; `ResumableInterrupt` is for any `Trainer`. What is in a checkpoint is
upstream's. The stock Trainer resumes from a checkpoint that a kill has cut, with a fresh optimizer or other random
numbers, without a warning.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState

from ..files import digest, write_atomically
from ..tasks import unchanged_attributes
from ..validation import fail, message, warn

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_manifest.json"

# Of a checkpoint without a manifest (another Trainer's): one of each line must be there, whatever the backend.
_NEEDED = {
    "the trainer's state": ("trainer_state.json",),
    "the optimizer's state": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "the state of the random numbers": ("rng_state*.pth",),
}


def begin(folder: Path) -> None:
    """Marks `folder` as unfinished, beside it: another Trainer's checkpoint has no manifest either, and no mark."""
    write_atomically(_mark(folder), "This checkpoint was not written to its end: no training resumes from it.\n")
    (folder / MANIFEST).unlink(missing_ok=True)


def finish(folder: Path, *, step: int, processes: int, resumable: bool) -> None:
    """Writes the manifest of `folder`: every file with its size and SHA-256, synced to the disk before."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
        for path, sha256 in _digests(paths, sync=True)
    }
    manifest = {"format": 1, "step": step, "processes": processes, "resumable": resumable, "files": files}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
    _mark(folder).unlink(missing_ok=True)


def damage(folder: Path) -> str | None:
    """What is missing from `folder` or differs from its manifest; None where the checkpoint is whole."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = _manifest(folder)
    except ValueError:
        return f"{MANIFEST} cannot be read"
    if manifest is None:
        if _mark(folder).exists():
            return "it was not written to its end"
        lacks = (what for what, names in _NEEDED.items() if not any(any(folder.glob(name)) for name in names))
        return next((f"{what} is missing" for what in lacks), None)
    for path, (size, _) in manifest.files.items():  # first: it reads no file
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes, of {size} that were written"
    changed = [path.name for path, sha256 in _digests(list(manifest.files)) if sha256 != manifest.files[path][1]]
    return f"{changed[0]} is not what was written (its SHA-256 differs)" if changed else None


def not_resumable(folder: Path) -> str | None:
    """Why a training cannot go on from `folder` as if it had never stopped; None where it can."""
    found = damage(folder)
    manifest = _manifest(folder) if found is None else None
    return "it holds the model alone (save_only_model)" if manifest and not manifest.resumable else found


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
        _delete(folder)


def on_main_process(accelerator: Any, call: Callable[[], Any]) -> Any:
    """What `call` returns on the main process; its ValueError or RuntimeError is raised on every process."""
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = call()
        except (ValueError, RuntimeError) as error:
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


class Checkpoints(NamedTuple):
    """A trainer's checkpoints: each ends with a manifest, and training resumes from whole ones alone."""

    args: Any  # the trainer's
    accelerator: Any

    def resume_from(self, named: str | bool | None) -> str | bool | None:
        """The checkpoint to resume from, every file of it read: `named`, or the newest whole one for True.

        A checkpoint without a manifest (of another Trainer) is taken with a warning where no part of it is missing.

        Raises:
            ValueError: the checkpoint is not complete, or there is none; in every process.
        """
        return on_main_process(self.accelerator, partial(self._checked, named)) if named else named

    def _checked(self, named: str | bool) -> str:
        whole, refused = newest_resumable(Path(self.args.output_dir)) if named is True else (Path(str(named)), {})
        for name, reason in refused.items():
            warn(logger, "[kd_trainer] %s is passed over: %s.", name, reason)
        if whole is None:
            fix = "Train from the start: leave resume_from_checkpoint out."
            because = "; ".join(f"of {name}: {reason}" for name, reason in refused.items()) or None
            expected = f"a whole checkpoint in {Path(self.args.output_dir)}"
            fail("resume_from_checkpoint", True, expected, fix, because=because)
        flaw = None if named is True else not_resumable(whole)
        if flaw is not None:
            other, _ = newest_resumable(whole.parent)
            fix = f"Resume from {other}, the newest whole one." if other else "There is no whole one beside it."
            fix += " Its weights alone, where they are whole: from_pretrained, and train from the start."
            fail("resume_from_checkpoint", repr(str(whole)), "a whole checkpoint", fix, because=flaw)
        manifest, now = _manifest(whole), self.args.world_size
        if manifest is None:
            warn(logger, "[kd_trainer] %s has no %s: whether its files are whole is not known.", whole, MANIFEST)
        elif manifest.processes != now:
            line = "[kd_trainer] %s was written by %d processes and goes on with %d: orders and random numbers will "
            line += "differ from those of a run that was never stopped."
            warn(logger, line, whole, manifest.processes, now)
        return str(whole)

    @contextmanager
    def saving(self, run_dir: str, state: Any) -> Iterator[None]:
        """Around upstream's writing of a checkpoint; then the manifest, and only then older ones are deleted.

        Raises:
            RuntimeError: it could not be written; what there is of it is removed, and the last whole one is named.
        """
        args, folder = self.args, Path(run_dir, f"checkpoint-{state.global_step}")
        limit = args.save_total_limit
        try:
            if args.should_save:
                begin(folder)
            self.accelerator.wait_for_everyone()
            args.save_total_limit = None  # upstream would delete the last whole one before this one is
            yield
            args.save_total_limit = limit
            if args.should_save and (folder / TRAINING_ARGS_NAME).exists():
                torch.save(args, folder / TRAINING_ARGS_NAME)  # with the limit in it
            self.accelerator.wait_for_everyone()
            if args.should_save:
                resumable = not args.save_only_model
                finish(folder, step=state.global_step, processes=args.world_size, resumable=resumable)
        except Exception as error:  # each library that writes raises another kind
            if (folder / MANIFEST).exists():  # written last: it is whole, the error is another's, as of a data worker
                raise
            if args.should_save:
                _delete(folder)
            raise RuntimeError(_unwritten(folder, error)) from error
        finally:
            args.save_total_limit = limit
        if args.should_save:
            rotate(Path(run_dir), limit, folder, state.best_model_checkpoint)

    def check_best(self, best: str) -> None:
        """Raises ValueError in every process where the best checkpoint differs from its manifest."""

        def check() -> None:
            reason = damage(Path(best))
            if reason is not None and (Path(best) / MANIFEST).exists():
                fix = "The model as the training left it is in the trainer: save it with trainer.save_model()."
                fail("best_model_checkpoint", repr(best), "a whole checkpoint", fix, because=reason)

        on_main_process(self.accelerator, check)


def _unwritten(folder: Path, error: Exception) -> str:
    """The message of a checkpoint that could not be written, with what to go on from."""
    free = shutil.disk_usage(folder.parent).free / 1e6 if folder.parent.is_dir() else 0.0
    shown = f"not written: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    whole, _ = newest_resumable(folder.parent)
    last = f"{whole.name} is whole: go on with" if whole else "There is no other; start again without one:"
    fix = f"{last} trainer.train(resume_from_checkpoint={bool(whole)}) when there is room."
    expected = f"room and permission for it in {folder.parent} ({free:,.0f} MB are free)"
    return message(folder.name, shown, expected, fix)


def _by_step(output_dir: Path) -> list[Path]:
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def _mark(folder: Path) -> Path:
    return folder.with_name(folder.name + ".unfinished")


def _delete(folder: Path) -> None:
    """Deletes a marked checkpoint; the mark stays where part of it does."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        _mark(folder).unlink(missing_ok=True)


def _digests(paths: list[Path], *, sync: bool = False) -> list[tuple[Path, str]]:
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return list(zip(paths, pool.map(partial(digest, sync=sync), paths), strict=True))


class _Manifest(NamedTuple):
    processes: int
    resumable: bool
    files: dict[Path, tuple[int, str]]  # bytes and SHA-256


def _manifest(folder: Path) -> _Manifest | None:
    """None where there is none; ValueError where it cannot be read, or the name of a file leads out of `folder`."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        read = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {Path(name): (entry["bytes"], entry["sha256"]) for name, entry in read["files"].items()}
        typed = type(read["processes"]) is int and isinstance(read["resumable"], bool)
        typed &= all(type(size) is int and isinstance(sha256, str) for size, sha256 in files.values())
        if not typed or any(not name.parts or name.is_absolute() or ".." in name.parts for name in files):
            raise ValueError
        return _Manifest(read["processes"], read["resumable"], {folder / name: files[name] for name in files})
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError from error


@contextmanager
def unchanged_callbacks(handler: Any) -> Iterator[None]:
    """Afterwards upstream's `CallbackHandler` has the callbacks and models it had, and those with a state theirs."""
    states = [
        (callback, name, copy.deepcopy(value))
        for callback in handler.callbacks
        if isinstance(callback, ExportableState)
        for name, value in callback.state().get("attributes", {}).items()
    ]
    held = ("callbacks", "model", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
    try:
        with unchanged_attributes(handler, *held):
            handler.callbacks = list(handler.callbacks)  # a resumed training replaces some of them
            yield
    finally:
        for callback, name, value in states:
            setattr(callback, name, value)


class ResumableInterrupt(TrainerCallback):
    """The first Ctrl-C stops after the current optimizer step with a checkpoint; the second stops at once.

    Training then ends with KeyboardInterrupt, so that the script does not go on as if it were complete. With several
    processes the interrupt is left to the launcher, which stops them at different steps: there the last regular
    checkpoint is the one to resume from.
    """

    def __init__(self) -> None:
        self._asked = False
        self._saved_at = -1
        self._previous: Any = None

    @classmethod
    def add_to(cls, trainer: Any) -> None:
        """Adds the callback to a trainer that has none of this kind."""
        if not any(isinstance(callback, cls) for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(cls())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._asked, self._saved_at = False, -1
        self.restore()  # an earlier training that failed has not come to its end
        if args.world_size > 1 or threading.current_thread() is not threading.main_thread():
            return
        self._previous = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, signum: int, frame: Any) -> None:
        if self._asked:
            self.restore()
            raise KeyboardInterrupt
        self._asked = True
        print("\n[kd_trainer] stopping after this step; press Ctrl-C again to stop at once", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._asked:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved_at = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()
        if self._asked:
            self._asked = False
            if self._saved_at == state.global_step:  # not so if it was pressed after the last step had ended
                print(
                    f"[kd_trainer] interrupted: {args.output_dir}/checkpoint-{state.global_step} is complete; go on "
                    "with trainer.train(resume_from_checkpoint=True), or --resume_from_checkpoint true where the "
                    "script has it",
                    flush=True,
                )
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Restores the earlier handler of Ctrl-C; also for trainings that end with an error."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    @classmethod
    def restore_all(cls, callbacks: Sequence[Any]) -> None:
        """The same for those among some callbacks."""
        for callback in callbacks:
            if isinstance(callback, cls):
                callback.restore()
