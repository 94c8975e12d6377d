"""`TeacherCache`: builds what is missing of a trainer's teacher cache, checks that it fits, and finds a dataset's part.

For: `trainer.py`. Files and formats are in `cache/`.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from accelerate.utils import gather_object
from safetensors.torch import save
from torch import nn
from torch.utils.data import IterableDataset

from ..cache import (
    BUILDING,
    DATA,
    EVAL,
    HEAD,
    TEST,
    TRAIN,
    CachedTeacher,
    CacheError,
    NumberedRows,
    Reader,
    Rows,
    ServerReader,
    SignedBatch,
    SignedCollator,
    Store,
    TeacherReader,
    as_cached_teacher,
    as_server_teacher,
    begin,
    build_shards,
    card,
    check_links,
    check_settings,
    clean,
    compare_settings,
    compute_precision,
    consecutive_rows,
    data_and_collator,
    encode_batch,
    finish,
    first_rows,
    format_of,
    is_finished,
    known_by_position,
    labels_of,
    mixture_identity,
    open_part,
    outputs_differ,
    part_of,
    read_manifest,
    reopen,
    sample_rows,
    settings_of,
    signed_collator_of,
    teacher_identity,
    translate_os_errors,
    with_row_ids,
    written_shards,
)
from ..files import write_atomically
from ..tasks import same_random_numbers
from ..teachers import ADAPTER_OFF, COLUMN_PREFIX, Teacher, cache_prefix
from ..validation import fail, message, warn
from .checkpoints import on_main_process
from .settings import Settings
from .setup import Plan, Setup

logger = logging.getLogger(__name__)

_TRIED_ROWS = 8  # rows of the first forward, which decides the format and the size of the cache
_COMPARED_ROWS = 8  # rows of a cache that are compared with the teacher before it is used or continued


class TeacherCache:
    """The teacher cache of a trainer: the teacher is run once, its outputs are read from disk afterwards.

    Args:
        trainer: its arguments, accelerator, data, collator and student are read; nothing of it is set.
        setup: loads the teacher, and makes the plan by which it is run.
        settings: the distillation arguments of that trainer.

    Attributes:
        given: the teacher as it was given, by whichever argument.
    """

    def __init__(self, trainer: Any, setup: Setup, settings: Settings) -> None:
        self._trainer, self._setup, self._settings = trainer, setup, settings
        self.given: Any = None
        self._identity: dict[str, Any] | None = None  # of the teacher whose outputs are kept
        self._ready_parts: dict[str, Store] = {}  # built or checked by this trainer
        self._more_parts: dict[str, Any] = {}  # data of `build`, by part
        self._held: Callable[[], Any] = lambda: None  # the given modules, as long as the script holds them
        self._live: Any = None  # the teacher that is run, while the cache is built: a `LiveTeacher`, or several
        self._plan: Plan | None = None  # by which it is run
        self._at_hand: Any = None  # run on evaluation data that is not in the cache
        self._compared = False  # whether a cache that was opened for an evaluation was compared

    def _on_main_process(self, call: Callable[[], Any]) -> Any:
        return on_main_process(self._trainer.accelerator, call)

    @property
    def can_build(self) -> bool:
        """Whether there are a folder and a teacher to run."""
        return self._settings.kd.teacher_cache_dir is not None and self.given is not None and not self._reads_caches

    @property
    def _reads_caches(self) -> bool:
        """Whether what was given is a cache, or several teachers of which one is."""
        return any(as_cached_teacher(each) is not None for each in _each(self.given))

    def build(self, teacher: Teacher | None, dataset: Any = None, name: str | None = None) -> CachedTeacher:
        """Runs the teacher on the data that no finished part holds; the teacher is released.

        Args:
            teacher: of the trainer, by now.
            dataset: further data, such as that of `predict`, or a dict of several. It is found again by its rows. After
                a training the teacher is loaded again by its path; a module is there as long as the script holds it.
            name: of that data's part on disk, "test-NAME"; None is "test". Needed for a second one.

        Raises:
            ValueError: no `teacher_cache_dir`; a cache there that was made of something else (`CacheError`); data
                whose rows change from one reading to the next.
            RuntimeError: no room on the disk, or no right to write there.
        """
        folder = self._settings.kd.teacher_cache_dir
        if folder is None:
            fail("teacher_cache_dir", None, "a folder", "Set it to the folder for the cache.")
        self._settings.require_teacher(self.given)
        where = Path(folder)
        more: dict[str, Any] = {}
        if dataset is not None:
            part = TEST if name is None else part_of(TEST, name)
            several = isinstance(dataset, dict)
            more = {part_of(part, key): each for key, each in dataset.items()} if several else {part: dataset}
            changed = {part for part, each in more.items() if self._more_parts.get(part) is not each}
            self._ready_parts = {part: store for part, store in self._ready_parts.items() if part not in changed}
        self._live = _run_here(teacher) or self._live
        server = as_server_teacher(self.given)
        with same_random_numbers(self._trainer.args.device), nullcontext() if server is None else server.released():
            for part, data in [*self._cache_parts(), *{**self._more_parts, **more}.items()]:
                if part not in self._ready_parts:
                    with self._only_builder(where, part) as may_write:
                        self._ready_parts[part] = self._prepare_part(part, data, where / part, may_write)
        self._more_parts = {**self._more_parts, **more}
        return self._opened(where)

    def _cache_parts(self) -> list[tuple[str, Any]]:
        """The data to run the teacher on, by the names of the cache's parts."""
        train, evals = self._trainer.train_dataset, self._trainer.eval_dataset
        parts = [] if train is None else [(TRAIN, train)]
        if isinstance(evals, dict):
            return [*parts, *((part_of(EVAL, name), each) for name, each in evals.items())]
        return parts if evals is None else [*parts, (EVAL, evals)]

    def finished(self) -> CachedTeacher | None:
        """The cache where every part is finished, so that the teacher need not be loaded; else None."""
        where, parts = self._settings.kd.teacher_cache_dir, self._cache_parts()
        if where is None or not parts or not all(is_finished(Path(where) / part) for part, _ in parts):
            return None
        return CachedTeacher(str(where))

    def identity(self) -> dict[str, Any]:
        """See `teacher_identity`; taken once, by the main process, before a backend shards the teacher."""
        if self._identity is None and self._trainer.is_world_process_zero():
            kd = self._settings.kd
            each = [teacher_identity(one, kd.teacher_kwargs_of(index), self._student)
                    for index, one in enumerate(_each(self.given))]  # fmt: skip
            several = isinstance(self.given, list)
            self._identity = mixture_identity(each, kd.teacher_weights, kd.teacher_names) if several else each[0]
        return self._identity or {}

    def _compared_identity(self) -> dict[str, Any] | None:
        """The same; None where there is no teacher but a cache."""
        return None if self._reads_caches else self.identity()

    @property
    def _student(self) -> nn.Module:
        return self._trainer.unwrapped_student()

    def _opened(self, where: Path) -> CachedTeacher:
        """The cache in the place of the live teacher, whose memory is freed."""
        cached = CachedTeacher(where)
        cached.parts.update(self._ready_parts)  # these know which shards were read whole
        if any(isinstance(each, nn.Module) for each in _each(self.given)):
            self._held = _weakly(self.given)
            self.given = cached  # so that nothing here holds the modules
        live, self._live, self._plan = self._live, None, None
        if live is not None:
            live.release(self._student)
        return cached

    def _live_teacher(self) -> Any:
        """The teacher itself, loaded where a finished cache had made that unnecessary."""
        if self._live is None:
            given = self._held() if as_cached_teacher(self.given) else self.given
            if given is None:
                fix = "Call build_teacher_cache before train(), hold the module in the script, or give it by path."
                shown = "a module that was deleted"
                fail("teacher_model", shown, "the teacher, which has to be run on more data", fix, error=RuntimeError)
            self._live, self._plan = self._setup.load_run(given), None
        return self._live

    def at_hand(self) -> Any:
        """The teacher for evaluation data that is not in the cache: the student's base, or the module that was given to
        the trainer while the script holds it; None where there is none, or where it was sharded."""
        if self._at_hand is None:
            trainer, given = self._trainer, self.given if self.given == ADAPTER_OFF else self._held()
            sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
            if given is None or (sharded and given != ADAPTER_OFF):
                return None
            self._at_hand = self._setup.load_run(given)
            self._at_hand.prepare(trainer.args.device, trainer.accelerator)
        return self._at_hand

    def release_at_hand(self) -> None:
        """Frees the device of the teacher that was at hand for an evaluation."""
        live, self._at_hand = self._at_hand, None
        if live is not None:
            live.release(self._student)

    # ---- one part ----

    @contextmanager
    def _only_builder(self, where: Path, part: str) -> Iterator[bool]:
        """Holds the lock of a part; waits, with a warning, while another run builds it. False without a lock, where
        the part is finished: its folder may be read-only."""
        from filelock import FileLock, Timeout

        lock, warned = FileLock(str(where / f".{part}.lock")), False

        def acquire() -> bool | None:
            check_links(where / f".{part}.lock", where)  # it would be emptied
            with translate_os_errors(where):
                where.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    return None
                except OSError:
                    if not is_finished(where / part):
                        raise
                return lock.is_locked

        try:
            while (held := self._on_main_process(acquire)) is None:
                if not warned and self._trainer.is_world_process_zero():
                    warn(logger, "[kd_trainer] another run builds the teacher cache %s: waiting for it", where / part)
                warned = True
                time.sleep(2.0)
            yield held
        finally:
            lock.release()

    def _prepare_part(self, part: str, dataset: Any, folder: Path, may_write: bool) -> Store:
        """Checks a finished part; builds what is missing of it, or damaged."""
        used, collator = data_and_collator(self._trainer, dataset)
        if self._on_main_process(lambda: is_finished(folder)):
            store = open_part(folder, folder.parent)
            self._on_main_process(lambda: self._compare(folder, store.manifest, part, dataset))
            if not self._damaged(store, may_write):
                self._check_outputs_of(store, used, collator)
                if may_write:
                    self._on_main_process(lambda: clean(folder))
                return store
        trainer = self._trainer
        tried = min(_TRIED_ROWS, trainer.args.per_device_eval_batch_size)
        sample = dict(collator(with_row_ids(sample_rows(used, tried)).features))
        reader, plan = self._teacher_reader(sample)
        known = {"common_ids": plan.common_ids, "known_by": plan.known_by}
        settings, size = settings_of(trainer, part, dataset, reader, sample, known, self.identity())
        self._on_main_process(size)
        settings = self._on_main_process(lambda: self._begin(folder, settings, part, dataset))
        collate = signed_collator_of(settings, collator)
        self._check_outputs_begun(reader, used, folder, settings, collate)
        if settings["format"] == "hidden":
            content = save(cast(TeacherReader, reader).head_tensors(getattr(torch, settings["head_dtype"])))
            self._on_main_process(translate_os_errors(folder)(lambda: write_atomically(folder / HEAD, content)))
        failure: Exception | None = None
        together = reader.teacher.sharded
        try:
            have = self._on_main_process(lambda: written_shards(folder))
            build_shards(trainer, reader, used, folder, settings, collate, have, together=together, part=part)
        except (ValueError, RuntimeError) as error:
            if together:  # the others wait inside a forward: their launcher ends them
                raise
            failure = error
        failures = [each for each in gather_object([failure]) if each is not None]
        if failures:
            raise failures[0]
        self._on_main_process(translate_os_errors(folder)(lambda: finish(folder, settings, card(settings))))
        return open_part(folder, folder.parent)

    def _teacher_reader(self, batch: dict[str, Any]) -> tuple[Reader, Plan]:
        """The teacher, and the plan that was made on a batch."""
        if (server := as_server_teacher(self.given)) is not None:
            plan, k = self._setup.plan(batch, server, None), self._settings.kd.teacher_server_top_k
            return ServerReader(server, plan.task, self._student, self._trainer.processing_class, k), plan
        plan = self._plan = self._setup.plan(batch, self._live_teacher(), self._plan)
        self._live = _run_here(plan.teacher)
        head, temperature = None if plan.heads is None else plan.heads[1], self._settings.kd.kd_temperature
        return TeacherReader(self._live, self._trainer.accelerator, plan.task, head, temperature=temperature), plan

    def _check_outputs_of(self, store: Store, used: Any, collator: Any) -> None:
        """Compares some rows of a finished cache with the teacher, where it is loaded anyway."""
        manifest = store.manifest
        if not all(isinstance(each, nn.Module) or each == ADAPTER_OFF for each in _each(self.given)):
            return
        by_position = manifest["row_ids"] == "position"
        count = min(_COMPARED_ROWS, manifest["batch_rows"], *([len(store)] if by_position else []))
        signed = signed_collator_of(manifest, collator)(
            consecutive_rows(used, 0, count) if by_position else sample_rows(used, count)
        )
        self._plan = None
        reader, _ = self._teacher_reader(dict(signed.batch))
        stored = store.take(signed.row_ids)
        self._check_outputs(reader, store.folder, manifest, signed, stored, same_draws=by_position)

    def _check_outputs_begun(
        self, reader: Reader, used: Any, folder: Path, settings: dict[str, Any], collate: SignedCollator
    ) -> None:
        """The same before an unfinished cache goes on."""
        found = self._on_main_process(lambda: first_rows(folder, min(_COMPARED_ROWS, settings["batch_rows"])))
        if found is None or (isinstance(used, IterableDataset) and found[0] > 0):
            return
        index, stored = found
        signed = collate(consecutive_rows(used, index * settings["rows_per_shard"], len(stored.row_ids)))
        if signed.row_ids == stored.row_ids.tolist():
            self._check_outputs(reader, folder, settings, signed, stored, same_draws=True)

    def _check_outputs(
        self,
        reader: Reader,
        folder: Path,
        kept: dict[str, Any],
        signed: SignedBatch,
        stored: Rows,
        *,
        same_draws: bool,
    ) -> None:
        """Raises CacheError where the teacher gives something else for some rows than what is kept of them."""
        now = encode_batch(self._trainer, reader, kept, signed)
        precision = compute_precision(self._trainer, reader.teacher)
        exact = precision == kept["computed"] and precision.startswith("float32 no ")
        if kept["labels"] != labels_of(self._trainer, reader.task):
            return  # of other class names: another check raises
        columns = stored.columns, now.columns
        if now.signatures.tolist() == stored.signatures.tolist() and outputs_differ(
            format_of(kept), *columns, exact=exact, same_draws=same_draws
        ):
            rows = f"rows {signed.row_ids[0]} to {signed.row_ids[-1]}"
            shown = f"one that gives other outputs for {rows} than those that are kept"
            built = f"the cache {str(folder)!r} was built (its weights and settings are the same)"
            fix = "Give that teacher, with the same hooks and code, or name another teacher_cache_dir."
            raise CacheError(message("teacher_model", shown, f"the teacher of which {built}", fix))

    def _damaged(self, store: Store, may_write: bool) -> bool:
        """Reads all shards, each process its share; makes an unfinished cache of one with damaged shards."""
        args, total = self._trainer.args, len(store.manifest["shards"])
        bad = store.check(range(args.process_index, total, args.world_size))
        found = dict(gather_object(list(bad.items())) if args.world_size > 1 else bad)
        head_lost = store.manifest["format"] == "hidden" and not store.head_is_whole()
        if not found and not head_lost:
            return False
        reasons = {store.manifest["shards"][index]["name"]: reason for index, reason in sorted(found.items())}
        if not may_write:
            name, reason = next(iter((reasons or {HEAD: "it is not as it was written"}).items()))
            shown = f"{str(store.folder)!r}, damaged in {name} ({reason}) and not to be written to"
            fix = "Fetch the file again, or set it to another folder."
            raise CacheError(message("teacher_cache_dir", shown, "a whole cache, or a folder to repair it in", fix))
        if self._trainer.is_world_process_zero():
            for name, reason in reasons.items():
                warn(logger, "[kd_trainer] teacher cache %s: %s is built again: %s", store.folder, name, reason)
            with translate_os_errors(store.folder):
                reopen(store.folder, store.manifest, set(found))
        self._trainer.accelerator.wait_for_everyone()
        return True

    # ---- what is written and compared ----

    def _begin(self, folder: Path, settings: dict[str, Any], part: str, dataset: Any) -> dict[str, Any]:
        begun = (folder / BUILDING).exists()
        with translate_os_errors(folder):
            noted = begin(folder, settings, folder.parent)
        if begun:
            check_settings(folder / BUILDING, noted, complete=True)
            self._compare(folder, noted, part, dataset)
        return noted

    def _compare(self, folder: Path, kept: dict[str, Any], part: str, dataset: Any) -> None:
        compare_settings(self._trainer, folder, kept, part, dataset, self._compared_identity())

    def check(self, teacher: Teacher) -> None:
        """What of a cache can be compared without its teacher; every row is compared when it is read."""
        for parts in (member.parts for member in teacher.members if member.parts):
            with same_random_numbers(self._trainer.args.device):
                for part, data in self._cache_parts():
                    if (store := parts.get(part)) is not None:
                        self._on_main_process(partial(self._compare, store.folder, store.manifest, part, data))

    # ---- reading ----

    def stores(self, dataset: Any, teacher: Teacher | None) -> dict[str, Store]:
        """The part of a cache that was made of this dataset by the prefix of its columns; of several teachers each."""
        members = () if teacher is None else teacher.members
        prefixes = [COLUMN_PREFIX] if len(members) == 1 else map(cache_prefix, range(len(members)))
        found = {prefix: self.part_of(dataset, member) for prefix, member in zip(prefixes, members, strict=True)}
        return {prefix: store for prefix, store in found.items() if store is not None}

    def part_of(self, dataset: Any, teacher: Teacher | None) -> Store | None:
        """The part of the cache that was made of this dataset; CacheError where it is there and not whole."""
        cached = as_cached_teacher(teacher)
        if cached is None:
            return None
        if not (self._compared or self._ready_parts or self._reads_caches):
            self._compared = True  # a finished cache that is read without a training
            self.check(cached)
        for part, known in [*self._cache_parts(), *self._more_parts.items()]:
            if known is dataset:
                if part not in cached.parts and (cached.path / part / DATA).is_dir():
                    read_manifest(cached.path / part)  # raises: it is unfinished, or its manifest is lost
                if part in cached.parts:
                    return cached.parts[part]
        with same_random_numbers(self._trainer.args.device):
            return next((store for store in cached.parts.values() if self._holds(store, dataset)), None)

    def numbered(self, dataset: Any, description: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A dataset whose batches know their rows, and upstream's options for its dataloader."""
        if isinstance(dataset, datasets.Dataset):
            dataset = self._trainer._remove_unused_columns(dataset, description=description)
        sampler_fn = options.get("sampler_fn")
        if sampler_fn is not None:
            options = {**options, "sampler_fn": lambda _: sampler_fn(dataset)}  # it may read columns
        return (dataset if isinstance(dataset, IterableDataset) else NumberedRows(dataset)), options

    def _holds(self, store: Store, dataset: Any) -> bool:
        """Whether a part is of these rows, by a few of them; each is compared when it is read."""
        kept = store.manifest
        used, collator = data_and_collator(self._trainer, dataset)
        by_position = kept["row_ids"] == "position"
        if isinstance(used, IterableDataset) or known_by_position(used) != by_position:
            return False
        if by_position and len(used) != len(store):
            return False
        try:
            signed = signed_collator_of(kept, collator)(sample_rows(used))
            return store.take(signed.row_ids).signatures.tolist() == signed.signatures.tolist()
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError):  # rows of another form
            return False


def _each(given: Any) -> list[Any]:
    """The teachers of what was given, which may be one."""
    return given if isinstance(given, list) else [given]


def _run_here(teacher: Teacher | None) -> Any:
    """The teacher, one or several, where all of it is run; else None."""
    if teacher is None or any(member.live is None for member in teacher.members):
        return None
    return teacher


def _weakly(given: Any) -> Callable[[], Any]:
    """What returns the given teachers; None where a module of them was deleted."""
    refs = [weakref.ref(each) if isinstance(each, nn.Module) else lambda each=each: each for each in _each(given)]
    several = isinstance(given, list)

    def held() -> Any:
        found = [ref() for ref in refs]
        if any(each is None for each in found):
            return None
        return found if several else found[0]

    return held
