"""The trainer's side of a teacher cache: build what is missing, check that it fits, join it to the batches.

For: `trainer.py`, whose mixin stands on the one here. Files and formats are not its business.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    CachedCollator,
    CachedTeacher,
    CacheError,
    NumberedRows,
    Read,
    Reading,
    Rows,
    Speaker,
    Store,
    as_read,
    ask,
    begin,
    build_shards,
    card,
    check_links,
    check_settings,
    class_names,
    clean,
    compare_settings,
    computed,
    far_apart,
    features_of,
    finish,
    first_rows,
    format_of,
    is_finished,
    known_by_position,
    numbered,
    open_part,
    part_of,
    read_manifest,
    reading_of,
    reopen,
    rows_of,
    settings_of,
    teacher_identity,
    translate_os_errors,
)
from ..files import write_atomically
from ..tasks import same_random_numbers
from ..teachers import ADAPTER_OFF, LiveTeacher
from ..validation import fail, message, warn
from .processes import on_main_process
from .setup import FirstLook

logger = logging.getLogger(__name__)

_TRIED_ROWS = 8  # read to the teacher before it is asked about all, to see what it gives
_ASKED_AGAIN = 8  # about which the teacher is asked again before a cache is used or goes on


class OfflineTeacher(FirstLook):
    """Lets a teacher be asked once and read from disk ever after; `trainer.DistillationMixin` sets what is declared."""

    _given_teacher: Any
    _identity: dict[str, Any] | None
    _ready_parts: dict[str, Store]
    _more_parts: dict[str, Any] = {}  # noqa: RUF012  # data of `build_teacher_cache`, by part; replaced, never changed
    _module: Callable[[], nn.Module | None] = staticmethod(lambda: None)  # the given module, as long as it is held
    _at_hand: LiveTeacher | None = None  # asked about evaluation data that is not in the cache
    _compared = False  # whether a cache that was opened for an evaluation was compared

    def _on_main_process(self, ask: Callable[[], Any]) -> Any:
        return on_main_process(self.accelerator, ask)

    def build_teacher_cache(self, dataset: Any = None, *, name: str | None = None) -> CachedTeacher:
        """Asks the teacher once about all training and evaluation data and keeps what it said in `teacher_cache_dir`.

        When to use: by itself before trainings that shall not hold the teacher; `kd_run` "cache" does it from any
        script. `train()` does it too where `teacher_cache_dir` is set. What is there already is checked and kept; an
        interrupted building goes on. Every process must call it: they share the work.

        Args:
            dataset: further data, such as that of `predict`, or a dict of several. It is found again by its rows. After
                a training the teacher is loaded again by its path; a module is there as long as the script holds it.
            name: of that data's part on disk, "test-NAME"; None is "test". Needed for a second one.

        Returns:
            The cached teacher, which from now on is the trainer's.

        Raises:
            ValueError: no `teacher_cache_dir`; a cache there that was made of something else (`CacheError`); data
                whose rows change from one reading to the next.
            RuntimeError: no room on the disk, or no right to write there.
        """
        kd = self.kd_args
        if kd.teacher_cache_dir is None:
            fail("teacher_cache_dir", None, "a folder", "Set it to where the cache shall be.")
        self._require_teacher(self._given_teacher)
        where = Path(kd.teacher_cache_dir)
        more: dict[str, Any] = {}
        if dataset is not None:
            part = TEST if name is None else part_of(TEST, name)
            several = isinstance(dataset, dict)
            more = {part_of(part, key): each for key, each in dataset.items()} if several else {part: dataset}
            changed = {part for part, each in more.items() if self._more_parts.get(part) is not each}
            self._ready_parts = {part: store for part, store in self._ready_parts.items() if part not in changed}
        with same_random_numbers(self.args.device):
            for part, data in [*self._cache_parts(), *{**self._more_parts, **more}.items()]:
                if part not in self._ready_parts:
                    with self._only_builder(where, part) as may_write:
                        self._ready_parts[part] = self._prepare_part(part, data, where / part, may_write)
        self._more_parts = {**self._more_parts, **more}
        self._take_cached(where)
        return cast(CachedTeacher, self.teacher)

    def _cache_parts(self) -> list[tuple[str, Any]]:
        """The data to ask about, by the names of the cache's parts."""
        train = [] if self.train_dataset is None else [(TRAIN, self.train_dataset)]
        evals: Any = self.eval_dataset
        if isinstance(evals, dict):
            return [*train, *((part_of(EVAL, name), each) for name, each in evals.items())]
        return train if evals is None else [*train, (EVAL, evals)]

    def _cache_is_there(self) -> bool:
        """Whether every part is finished, so that the teacher need not be loaded."""
        where = self.kd_args.teacher_cache_dir
        parts = self._cache_parts()
        return where is not None and bool(parts) and all(is_finished(Path(where) / part) for part, _ in parts)

    def _identity_of_teacher(self) -> dict[str, Any]:
        """See `teacher_identity`; taken once, by the main process, before a backend shards the teacher."""
        if self._identity is None and self.is_world_process_zero():
            kwargs = self.kd_args.teacher_kwargs
            self._identity = teacher_identity(self._given_teacher, kwargs, self.unwrapped_student())
        return self._identity or {}

    def _take_cached(self, where: Path) -> None:
        """The cache in the place of the live teacher, whose memory is freed."""
        live, cached, self._fit = self.teacher, CachedTeacher(where), None
        cached.parts.update(self._ready_parts)  # these know which shards were read whole
        self.teacher = cached
        if isinstance(self._given_teacher, nn.Module):
            self._module = weakref.ref(self._given_teacher)
            self._given_teacher = self.teacher  # so that nothing here holds the module
        if isinstance(live, LiveTeacher):
            self._to_cpu(live)
        del live
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def _to_cpu(self, live: LiveTeacher) -> None:
        """Frees the device of a teacher that the script may hold still."""
        placed = any(getattr(live.model, name, None) is not None for name in ("hf_device_map", "quantization_method"))
        if not (placed or live.sharded or live.model is self.unwrapped_student()):
            live.model.to("cpu")

    def _live_teacher(self) -> LiveTeacher:
        """The teacher itself, loaded where a finished cache had made that unnecessary."""
        if not isinstance(self.teacher, LiveTeacher):
            given = self._given_teacher
            if isinstance(given, CachedTeacher):
                given = self._module()
            if given is None:
                fix = "Call build_teacher_cache before train(), hold the module in the script, or give it by path."
                shown = "a module that nothing holds any more"
                fail("teacher_model", shown, "the teacher, to be asked about more data", fix, error=RuntimeError)
            self.teacher, self._fit = self._load_live(given), None
        return self.teacher

    def live_teacher_at_hand(self) -> LiveTeacher | None:
        """The teacher for evaluation data that is not in the cache: the student's base, or the module that was given to
        the trainer while the script holds it; None where there is none, or where it was sharded."""
        if self._at_hand is None:
            given = self._given_teacher if self._given_teacher == ADAPTER_OFF else self._module()
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            if given is None or (sharded and given != ADAPTER_OFF):
                return None
            self._at_hand = self._load_live(given)
            self._at_hand.prepare(self.args.device, self.accelerator)
        return self._at_hand

    def let_go_of_teacher(self) -> None:
        """Frees the device of the teacher that was at hand for an evaluation."""
        live, self._at_hand = self._at_hand, None
        if live is not None:
            self._to_cpu(live)

    # ---- one part ----

    @contextmanager
    def _only_builder(self, where: Path, part: str) -> Iterator[bool]:
        """Holds the lock of a part; waits, and says so, while another run builds it. False where there can be no lock
        and the part is finished: it may lie in a folder that is only read."""
        from filelock import FileLock, Timeout

        lock, said = FileLock(str(where / f".{part}.lock")), False

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
                if not said and self.is_world_process_zero():
                    warn(logger, "[kd_trainer] another run builds the teacher cache %s: waiting for it", where / part)
                said = True
                time.sleep(2.0)
            yield held
        finally:
            lock.release()

    def _prepare_part(self, part: str, dataset: Any, folder: Path, may_write: bool) -> Store:
        """Checks a finished part; builds what is missing of it, or damaged."""
        used, collator = as_read(self, dataset)
        if self._on_main_process(lambda: is_finished(folder)):
            store = open_part(folder, folder.parent)
            self._on_main_process(lambda: compare_settings(self, folder, store.manifest, part, dataset))
            if not self._damaged(store, may_write):
                self._check_outputs_of(store, used, collator)
                if may_write:
                    self._on_main_process(lambda: clean(folder))
                return store
        live = self._live_teacher()
        tried = min(_TRIED_ROWS, self.args.per_device_eval_batch_size)
        sample = dict(collator(numbered(features_of(used, tried)).features))
        speaker = self._speaker(sample)
        settings = settings_of(self, part, dataset, speaker, sample)
        settings = self._on_main_process(lambda: self._begin(folder, settings, part, dataset))
        reading = reading_of(settings, collator)
        self._check_outputs_begun(speaker, used, folder, settings, reading)
        if settings["format"] == "hidden":
            content = save(speaker.head_tensors(getattr(torch, settings["head_dtype"])))
            self._on_main_process(translate_os_errors(folder)(lambda: write_atomically(folder / HEAD, content)))
        failure: Exception | None = None
        try:
            build_shards(self, speaker, used, folder, settings, reading, together=live.sharded, part=part)
        except (ValueError, RuntimeError) as error:
            if live.sharded:  # the others wait inside a forward: their launcher ends them
                raise
            failure = error
        failures = [each for each in gather_object([failure]) if each is not None]
        if failures:
            raise failures[0]
        self._on_main_process(translate_os_errors(folder)(lambda: finish(folder, settings, card(settings))))
        return open_part(folder, folder.parent)

    def _speaker(self, batch: dict[str, Any]) -> Speaker:
        """The live teacher, after a look at a batch."""
        live, fit = self._live_teacher(), self._look_at(batch)
        return Speaker(live, self.accelerator, fit.head, None if fit.heads is None else fit.heads[1])

    def _check_outputs_of(self, store: Store, used: Any, collator: Any) -> None:
        """Asks a teacher that is at hand anyway about some rows of a finished cache, and compares."""
        given, manifest = self._given_teacher, store.manifest
        if not isinstance(given, nn.Module) and given != ADAPTER_OFF:
            return
        by_position = manifest["row_ids"] == "position"
        count = min(_ASKED_AGAIN, manifest["batch_rows"], *([len(store)] if by_position else []))
        read = reading_of(manifest, collator)(rows_of(used, 0, count) if by_position else features_of(used, count))
        self._live_teacher()
        self._fit = None
        speaker, stored = self._speaker(dict(read.batch)), store.take(read.row_ids)
        self._check_outputs(speaker, store.folder, manifest, read, stored, same_draws=by_position)

    def _check_outputs_begun(
        self, speaker: Speaker, used: Any, folder: Path, settings: dict[str, Any], reading: Reading
    ) -> None:
        """The same before an unfinished cache goes on."""
        found = self._on_main_process(lambda: first_rows(folder, min(_ASKED_AGAIN, settings["batch_rows"])))
        if found is None or (isinstance(used, IterableDataset) and found[0] > 0):
            return
        index, stored = found
        read = reading(rows_of(used, index * settings["rows_per_shard"], len(stored.row_ids)))
        if read.row_ids == stored.row_ids.tolist():
            self._check_outputs(speaker, folder, settings, read, stored, same_draws=True)

    def _check_outputs(
        self, speaker: Speaker, folder: Path, kept: dict[str, Any], read: Read, stored: Rows, *, same_draws: bool
    ) -> None:
        """Raises CacheError where the teacher gives something else for some rows than what is kept of them."""
        now = ask(self, speaker, kept, read)
        precision = computed(self, speaker.teacher.model)
        exact = precision == kept["computed"] and precision.startswith("float32 no ")
        if kept["labels"] != class_names(self, speaker.head):
            return  # of other class names: it is told elsewhere
        columns = stored.columns, now.columns
        if now.signatures.tolist() == stored.signatures.tolist() and far_apart(
            format_of(kept), *columns, exact=exact, same_draws=same_draws
        ):
            rows = f"rows {read.row_ids[0]} to {read.row_ids[-1]}"
            shown = f"one that gives other outputs for {rows} than those that are kept"
            built = f"the cache {str(folder)!r} was built (its weights and settings are the same)"
            fix = "Give that teacher, with the same hooks and code, or name another teacher_cache_dir."
            raise CacheError(message("teacher_model", shown, f"the teacher of which {built}", fix))

    def _damaged(self, store: Store, may_write: bool) -> bool:
        """Reads all shards, each process its share; makes an unfinished cache of one with damaged shards."""
        total = len(store.manifest["shards"])
        bad = store.check(range(self.args.process_index, total, self.args.world_size))
        found = dict(gather_object(list(bad.items())) if self.args.world_size > 1 else bad)
        head_lost = store.manifest["format"] == "hidden" and not store.head_is_whole()
        if not found and not head_lost:
            return False
        reasons = {store.manifest["shards"][index]["name"]: reason for index, reason in sorted(found.items())}
        if not may_write:
            name, reason = next(iter((reasons or {HEAD: "it is not as it was written"}).items()))
            shown = f"{str(store.folder)!r}, damaged in {name} ({reason}) and not to be written to"
            mend = "Fetch the file again, or set it to another folder."
            raise CacheError(message("teacher_cache_dir", shown, "a whole cache, or a folder to mend it in", mend))
        if self.is_world_process_zero():
            for name, reason in reasons.items():
                warn(logger, "[kd_trainer] teacher cache %s: %s is built again: %s", store.folder, name, reason)
            with translate_os_errors(store.folder):
                reopen(store.folder, store.manifest, set(found))
        self.accelerator.wait_for_everyone()
        return True

    # ---- what is noted, and what is compared ----

    def _begin(self, folder: Path, settings: dict[str, Any], part: str, dataset: Any) -> dict[str, Any]:
        begun = (folder / BUILDING).exists()
        with translate_os_errors(folder):
            noted = begin(folder, settings, folder.parent)
        if begun:
            check_settings(folder / BUILDING, noted, complete=True)
            compare_settings(self, folder, noted, part, dataset)
        return noted

    def check_given_cache(self) -> None:
        """What of a cache can be compared without its teacher; every row is compared when it is read."""
        parts = cast(CachedTeacher, self.teacher).parts
        with same_random_numbers(self.args.device):
            for part, data in self._cache_parts():
                if (store := parts.get(part)) is not None:
                    self._on_main_process(partial(compare_settings, self, store.folder, store.manifest, part, data))

    # ---- reading ----

    def _store_of(self, dataset: Any) -> Store | None:
        """The part of the cache that was made of this dataset; CacheError where it is there and not whole."""
        if not isinstance(self.teacher, CachedTeacher):
            return None
        self._compare_once()
        for part, known in [*self._cache_parts(), *self._more_parts.items()]:
            if known is dataset:
                if part not in self.teacher.parts and (self.teacher.path / part / DATA).is_dir():
                    read_manifest(self.teacher.path / part)  # raises: it is unfinished, or its manifest is lost
                if part in self.teacher.parts:
                    return self.teacher.parts[part]
        with same_random_numbers(self.args.device):
            return next((store for store in self.teacher.parts.values() if self._holds(store, dataset)), None)

    def _compare_once(self) -> None:
        """Compares a finished cache that is read without a training, as `train` compares it."""
        if self._compared or self._ready_parts or isinstance(self._given_teacher, CachedTeacher):
            return
        self._compared = True
        self.check_given_cache()

    def _holds(self, store: Store, dataset: Any) -> bool:
        """Whether a part is of these rows, as far as some of them tell; each is compared when it is read."""
        kept = store.manifest
        used, collator = as_read(self, dataset)
        by_position = kept["row_ids"] == "position"
        if isinstance(used, IterableDataset) or known_by_position(used) != by_position:
            return False
        if by_position and len(used) != len(store):
            return False
        try:
            read = reading_of(kept, collator)(features_of(used))
            return store.take(read.row_ids).signatures.tolist() == read.signatures.tolist()
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError):  # rows of another form
            return False

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Upstream's; where the teacher is read from disk, its outputs join the batches."""
        store = self._store_of(dataset)
        if store is None:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        sampler_fn = kwargs.get("sampler_fn")
        if sampler_fn is not None:
            kwargs["sampler_fn"] = lambda _, own=dataset: sampler_fn(own)  # it may want to look at columns
        joined = dataset if isinstance(dataset, IterableDataset) else NumberedRows(dataset)
        collator, self.data_collator = self.data_collator, CachedCollator(self.data_collator, store)
        try:
            return super()._get_dataloader(cast(Any, joined), description, *args, **kwargs)
        finally:
            self.data_collator = collator
