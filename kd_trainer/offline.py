"""The trainer's side of a teacher cache: build what is missing, check that it fits, join it to the batches.

For: `trainer.py`, whose mixin stands on the one here. Files and formats are not its business.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import IterableDataset

from . import __version__
from .cache import (
    EVAL,
    ROWS_DIFFER,
    TEST,
    TRAIN,
    CachedCollator,
    CachedTeacher,
    NumberedRows,
    Read,
    Reading,
    check_objective,
    have_ids,
    numbered,
    open_part,
    part_of,
    reading_of,
)
from .cache_build import (
    SHARD_BYTES,
    Speaker,
    ask,
    build_shards,
    check_rows_unseen,
    columns_read,
    fail_no_product,
    on_device,
    translate_os_errors,
)
from .cache_formats import DEFAULT_K, DTYPES, Format, card, check_format, far_apart, format_of
from .cache_identity import collation, compare, compare_teachers, teacher_identity, tokenizer_identity
from .cache_manifest import LAYOUT, check_links, check_settings, settings_of_head
from .cache_store import (
    BUILDING,
    DATA,
    HEAD,
    MANIFEST,
    CacheError,
    Rows,
    Store,
    begin,
    clean,
    finish,
    first_rows,
    is_finished,
    read_manifest,
    reopen,
)
from .checks import fail, message, warn
from .files import write_atomically
from .first_look import FirstLook, Fit
from .fused_forward import SMALL_VOCABULARY
from .head_choice import classes_have_names
from .heads import HEADS
from .model_facts import count_parameters
from .restore import same_random_numbers
from .teacher import ADAPTER_OFF, LiveTeacher

logger = logging.getLogger(__name__)

_TRIED_ROWS = 8  # read to the teacher before it is asked about all, to see what it gives
_ASKED_AGAIN = 8  # about which the teacher is asked again before a cache is used or goes on
_SAMPLE_ROWS = 32  # looked at before a cache is built or read: evenly spread over the data


class OfflineTeacher(FirstLook):
    """Lets a teacher be asked once and read from disk ever after; `trainer.DistillationMixin` sets what is declared."""

    _given_teacher: Any
    _identity: dict[str, Any] | None
    _ready_parts: dict[str, Store]
    _on_main_process: Callable[..., Any]
    _more_parts: dict[str, Any] = {}  # noqa: RUF012  # data of `build_teacher_cache`, by part; replaced, never changed
    _module: Callable[[], nn.Module | None] = staticmethod(lambda: None)  # the given module, as long as it is held
    _at_hand: LiveTeacher | None = None  # asked about evaluation data that is not in the cache
    _compared = False  # whether a cache that was opened for an evaluation was compared

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
            self._identity = teacher_identity(self._given_teacher, kwargs, self._fit_student())
        return self._identity or {}

    def _take_cached(self, where: Path) -> None:
        """The cache in the place of the live teacher, whose memory is freed."""
        live, cached, self._fit = self.teacher, CachedTeacher(where), None
        cached.parts.update(self._ready_parts)  # these know which shards were read whole
        self.teacher = cached
        if isinstance(self._given_teacher, nn.Module):
            self._module = weakref.ref(self._given_teacher)
            self._given_teacher = self.teacher  # so that nothing here holds the module
        if isinstance(live, LiveTeacher) and not live.sharded and live.model is not self._fit_student():
            placed = getattr(live.model, "hf_device_map", None) is not None
            if not placed and getattr(live.model, "quantization_method", None) is None:
                live.model.to("cpu")  # the script may hold it still
        del live
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fit_student(self) -> nn.Module:
        return self.unwrapped_student()

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
        placed = live is None or hasattr(live.model, "hf_device_map") or hasattr(live.model, "quantization_method")
        if live is not None and not placed and live.model is not self._fit_student():
            live.model.to("cpu")

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
        """Checks a finished part and mends its damaged shards; builds what is missing."""
        finished = self._on_main_process(lambda: is_finished(folder))
        if finished:
            store = open_part(folder, folder.parent)
            self._on_main_process(lambda: self._check_fits(store, part, dataset))
            if not self._damaged(store, may_write):
                self._check_outputs_of(store, dataset)
                if may_write:
                    self._on_main_process(lambda: clean(folder))
                return store
        live = self._live_teacher()
        used, collator = self._as_read(dataset)
        tried = min(_TRIED_ROWS, self.args.per_device_eval_batch_size)
        sample = dict(collator(numbered(_features(used, tried)).features))
        fit = self._look_at(sample)
        speaker = Speaker(live, self.accelerator, fit.head, None if fit.heads is None else fit.heads[1])
        settings = self._settings(part, dataset, speaker, sample)
        settings = self._on_main_process(lambda: self._begin(folder, settings, part, dataset))
        reading = reading_of(settings, collator)
        self._check_outputs_begun(speaker, used, folder, settings, reading)
        self._write_head(speaker, settings, folder)
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
        self._on_main_process(lambda: self._finish(folder, settings, part))
        return open_part(folder, folder.parent)

    def _check_outputs_of(self, store: Store, dataset: Any) -> None:
        """Asks a teacher that is at hand anyway about some rows of a finished cache, and compares."""
        given = self._given_teacher
        if not isinstance(given, nn.Module) and given != ADAPTER_OFF:
            return
        manifest = store.manifest
        used, collator = self._as_read(dataset)
        reading = reading_of(manifest, collator)
        by_position = manifest["row_ids"] == "position"
        count = min(_ASKED_AGAIN, manifest["batch_rows"], *([len(store)] if by_position else []))
        features = NumberedRows(used).__getitems__(list(range(count))) if by_position else _features(used, count)
        live, self._fit = self._live_teacher(), None
        fit = self._look_at(dict(reading(features).batch))
        speaker = Speaker(live, self.accelerator, fit.head, None if fit.heads is None else fit.heads[1])
        read = reading(features)
        stored = store.take(read.row_ids)
        self._check_outputs(speaker, store.folder, manifest, read, stored, same_draws=by_position)

    def _check_outputs_begun(
        self, speaker: Speaker, used: Any, folder: Path, settings: dict[str, Any], reading: Reading
    ) -> None:
        """The same before an unfinished cache goes on."""
        found = self._on_main_process(lambda: first_rows(folder, min(_ASKED_AGAIN, settings["batch_rows"])))
        if found is None or (isinstance(used, IterableDataset) and found[0] > 0):
            return
        (index, stored), count = found, len(found[1].row_ids)
        first = index * settings["rows_per_shard"]
        streamed = isinstance(used, IterableDataset)
        features = (
            _features(used, count) if streamed else NumberedRows(used).__getitems__(list(range(first, first + count)))
        )
        read = reading(features)
        if read.row_ids == stored.row_ids.tolist():
            self._check_outputs(speaker, folder, settings, read, stored, same_draws=True)

    def _check_outputs(
        self, speaker: Speaker, folder: Path, kept: dict[str, Any], read: Read, stored: Rows, *, same_draws: bool
    ) -> None:
        """Raises CacheError where the teacher gives something else for some rows than what is kept of them."""
        now = ask(self, speaker, kept, read)
        computed = self._computed(speaker.teacher.model)
        exact = computed == kept["computed"] and computed.startswith("float32 no ")
        form = format_of(kept)
        if kept["labels"] != self._class_names(speaker.head):
            return  # of other class names: it is told elsewhere
        if now.signatures.tolist() != stored.signatures.tolist() or not far_apart(
            form, stored.columns, now.columns, exact=exact, same_draws=same_draws
        ):
            return
        rows = f"rows {read.row_ids[0]} to {read.row_ids[-1]}"
        shown = f"one that gives other outputs for {rows} than those that are kept"
        expected = f"the teacher of which the cache {str(folder)!r} was built (its weights and settings are the same)"
        fix = "Give that teacher, with the same hooks and code, or name another teacher_cache_dir."
        raise CacheError(message("teacher_model", shown, expected, fix))

    def _computed(self, teacher: nn.Module) -> str:
        """In what precision, and on what, the teacher computes."""
        dtype = str(next((p.dtype for p in teacher.parameters()), torch.float32)).removeprefix("torch.")
        return f"{dtype} {self.accelerator.mixed_precision} {self.args.device.type}"

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

    def _as_read(self, dataset: Any) -> tuple[Any, Any]:
        """The dataset and the collator as the training's dataloader has them."""
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator)

    # ---- what is noted, and what is compared ----

    def _settings(self, part: str, dataset: Any, speaker: Speaker, sample: dict[str, Any]) -> dict[str, Any]:
        """Everything that the manifest says of a part that is to be built."""
        kd, head = self.kd_args, speaker.head
        used, collator = self._as_read(dataset)
        prepared = self._prepare_inputs(dict(sample))
        prepared = self._with_decoder_inputs(self._fit_student(), head, prepared)
        columns = columns_read(sample, speaker.teacher.inputs(prepared))
        reading = Reading(
            collator, head, kd.kd_positions, columns
        )  # its first reading finds how columns belong to rows
        read = reading(_features(used, _SAMPLE_ROWS))
        if _signed(read) != _signed(reading(_features(used, _SAMPLE_ROWS))):
            because = "what the teacher said of one reading would be taken for another"
            mend = "Apply it once, before the training (dataset.map), or train with the live teacher."
            shown = "one whose rows differ from one reading to the next (random augmentation, masking or padding)"
            fail(
                f"{'train' if part == TRAIN else 'eval'}_dataset",
                shown,
                "the same rows each time",
                mend,
                because=because,
            )
        kept, extra = self._format(speaker, reading(_features(used, 1)))
        if len(read.mask) < len(read.row_ids):
            check_rows_unseen(self, speaker, reading, numbered(_features(used, 2)))
        row_bytes = kept.bytes_a_position(extra["hidden_size"]) * float(read.counts.mean()) + 24
        batch_rows = self.args.per_device_eval_batch_size
        settings = {
            **{"layout": LAYOUT, "kd_trainer": __version__, "part": part},
            **{"format": kept.name, "classes": kept.classes, "k": kept.k},
            **{"temperature": kept.temperature, "dtype": kept.dtype, **extra},
            **settings_of_head(head),
            **{"positions": kd.kd_positions, "labels": self._class_names(head)},
            "teacher": self._identity_of_teacher() | {"parameters": count_parameters(speaker.teacher.model)},
            "tokenizer": tokenizer_identity(self.processing_class),
            "collation": collation(self.data_collator, self.processing_class),
            "dataset": {
                "rows": None if isinstance(used, IterableDataset) else len(used),
                "columns": sorted(sample),
                "fingerprint": getattr(dataset, "_fingerprint", None),
                "sample": _signed(read),
            },
            "columns_read": columns,
            "kinds": reading.kinds,
            "row_ids": "position" if _by_position(used) else "column",
            "batch_rows": batch_rows,
            "rows_per_shard": max(1, int(SHARD_BYTES / (row_bytes * batch_rows))) * batch_rows,
            "seed": self.args.seed,
            "computed": self._computed(speaker.teacher.model),
        }
        self._on_main_process(lambda: self._tell_size(settings, row_bytes))
        return settings

    def _class_names(self, head: Any) -> dict[str, str] | None:
        student = self._fit_student()
        if not classes_have_names(student, head):
            return None
        names = getattr(getattr(student, "config", None), "id2label", None)
        return {str(i): str(name) for i, name in names.items()} if names else None

    def _format(self, speaker: Speaker, read: Read) -> tuple[Format, dict[str, Any]]:
        """The format that is asked for, completed by what the teacher gives for some rows."""
        kd, head, fit = self.kd_args, speaker.head, cast(Fit, self._fit)
        given = speaker.dimensions(*on_device(self, speaker, read))
        classes, product = given.shape[-1], speaker.output_head
        name, k, asked = self._format_asked()
        if name == "auto":
            large = head.over_tokens and classes >= SMALL_VOCABULARY and product is not None
            name = "hidden" if large else "logits"
        check_format(name, k, asked, softmax=head.softmax, over_tokens=head.over_tokens, task=head.name)
        extra: dict[str, Any] = {
            "shape": given.shape, "vocabulary": classes, "common_ids": fit.common_ids, "known_by": fit.known_by,
            "hidden_size": 0, "head_dtype": None, "head_scale": 1.0, "head_softcap": None,
        }  # fmt: skip
        if name == "sampled":
            return Format(name, fit.common_ids or classes, k or DEFAULT_K[name], float(kd.kd_temperature)), extra
        if name == "topk":
            classes, k = fit.common_ids or classes, k or DEFAULT_K[name]
            if k >= classes:
                expected, mend = f"1 to {classes - 1}, fewer than there are classes", "Lower it, or keep logits."
                fail("teacher_cache_k", repr(k), expected, mend)
            return Format(name, classes, k, float(kd.kd_temperature), asked or "float16"), extra
        if name == "hidden":
            if product is None:
                fail_no_product(speaker)
            extra |= {"hidden_size": given.hidden_size, "head_dtype": given.hidden_dtype}
            extra |= {"head_scale": product.scale, "head_softcap": product.softcap}
        half = {"bf16": "bfloat16", "fp16": "float16"}.get(self.accelerator.mixed_precision)
        own = given.logits_dtype
        if product is not None and (name == "hidden" or (product.scale == 1 and product.softcap is None)):
            own = half or given.hidden_dtype  # a product in half precision has no more digits
        return Format(name, classes, None, None, asked or (own if own in DTYPES else "float32")), extra

    def _format_asked(self) -> tuple[str, int | None, str | None]:
        """Format, k and dtype of the arguments; "auto" keeps to what the other parts of the cache have."""
        kd = self.kd_args
        others = sorted(Path(str(kd.teacher_cache_dir)).glob(f"*/{MANIFEST}"))
        if kd.teacher_cache_format != "auto" or not others:
            return kd.teacher_cache_format, kd.teacher_cache_k, kd.teacher_cache_dtype
        kept = open_part(others[0].parent, Path(str(kd.teacher_cache_dir))).manifest
        return kept["format"], kept["k"], None if kept["format"] == "sampled" else kept["dtype"]

    def _tell_size(self, settings: dict[str, Any], row_bytes: float) -> None:
        """Says what will be kept; raises RuntimeError where the disk has no room for it."""
        rows, where = settings["dataset"]["rows"], Path(str(self.kd_args.teacher_cache_dir))
        position_bytes = format_of(settings).bytes_a_position(settings["hidden_size"])
        kept = settings["format"] + "".join(f", {n} {settings[n]:g}" for n in ("k", "temperature") if settings[n])
        kept += "" if settings["format"] == "sampled" else f", {settings['dtype']}"
        size = "a stream of rows" if rows is None else f"{rows:,} rows, about {rows * row_bytes / 1e6:,.1f} MB"
        print(
            f"[kd_trainer] teacher cache {str(where / settings['part'])!r}: {kept}, "
            f"{position_bytes:,g} bytes a position; {size}",
            flush=True,
        )
        parent = next(p for p in (where.absolute(), *where.absolute().parents) if p.exists())
        there = sum(f.stat().st_size for f in (where / settings["part"]).rglob("*") if f.is_file())
        missing, free = (rows or 0) * row_bytes - there, shutil.disk_usage(parent).free
        if missing > free:
            mend = "Make room, or keep less: teacher_cache_format topk or sampled, or a smaller teacher_cache_k."
            shown = f"{str(where)!r} with {free / 1e6:,.0f} MB free"
            expected = f"about {missing / 1e6:,.0f} MB for {rows:,} rows of format {settings['format']}"
            raise RuntimeError(message("teacher_cache_dir", shown, expected, mend))

    def _begin(self, folder: Path, settings: dict[str, Any], part: str, dataset: Any) -> dict[str, Any]:
        begun = (folder / BUILDING).exists()
        with translate_os_errors(folder):
            noted = begin(folder, settings, folder.parent)
        if begun:
            check_settings(folder / BUILDING, noted, complete=True)
            self._compare(folder, noted, part, dataset)
        return noted

    def _check_fits(self, store: Store, part: str, dataset: Any) -> None:
        self._compare(store.folder, store.manifest, part, dataset)

    def check_given_cache(self) -> None:
        """What of a `CachedTeacher` can be compared without its teacher; every row is compared when it is read."""
        for part, dataset in self._cache_parts():
            store = cast(CachedTeacher, self.teacher).parts.get(part)
            if store is not None:
                with same_random_numbers(self.args.device):
                    self._on_main_process(lambda s=store, p=part, d=dataset: self._compare(s.folder, s.manifest, p, d))

    def _compare(self, folder: Path, kept: dict[str, Any], part: str, dataset: Any) -> None:
        """Raises CacheError where a cache was made of something else than what this trainer has."""
        kd, data = self.kd_args, _argument_of(part)
        asked: dict[str, tuple[str, str, Any, str]] = {}
        if not isinstance(self._given_teacher, CachedTeacher):
            unknown = compare_teachers(folder, kept, self._identity_of_teacher())
            if unknown is not None:
                text = "[kd_trainer] %s: the teacher cache %s is used without comparing them"
                warn(logger, text, unknown, folder)
        if kd.teacher_cache_format != "auto":
            asked["format"] = ("teacher_cache_format", "the format", kd.teacher_cache_format, "Set it so.")
        if kd.teacher_cache_k is not None:
            asked["k"] = ("teacher_cache_k", "the value", kd.teacher_cache_k, "Set it so.")
        if kd.teacher_cache_dtype is not None:
            asked["dtype"] = ("teacher_cache_dtype", "the dtype", kd.teacher_cache_dtype, "Set it so.")
        if HEADS[kept["task"]].token_level:
            asked["positions"] = ("kd_positions", "the positions", kd.kd_positions, "Set it so.")
        vocabulary = tokenizer_identity(self.processing_class)
        asked["tokenizer"] = ("processing_class", "a vocabulary of SHA-256", vocabulary, "Pass the same tokenizer.")
        for name, value in collation(self.data_collator, self.processing_class).items():
            asked[f"collation.{name}"] = ("data_collator", name, value, "Collate in the same way.")
        by_position = kept["row_ids"] == "position"  # rows with numbers of their own may be fewer now
        if by_position and not isinstance(dataset, IterableDataset):
            asked["dataset.rows"] = (data, "a number of rows of", len(dataset), "Train on the same rows.")
        compare(folder, kept, asked)
        check_objective(format_of(kept), kd.kd_divergence, self._temperatures())
        if by_position:
            self._compare_rows(folder, kept, data, dataset)

    def _compare_rows(self, folder: Path, kept: dict[str, Any], data: str, dataset: Any) -> None:
        """Some rows as they are collated now, against what the teacher read; in training each is compared again."""
        used, collator = self._as_read(dataset)
        now = _signed(reading_of(kept, collator)(_features(used, _SAMPLE_ROWS)))
        before = dict(kept["dataset"]["sample"])
        different = [row for row, signature in now if before.get(row, signature) != signature]
        if different:
            because = ROWS_DIFFER
            mend = "Train on the data that the cache was built from, or name another teacher_cache_dir."
            shown = f"one whose row {different[0]} differs from the one the teacher read"
            expected = f"the rows of the teacher cache {str(folder)!r}"
            raise CacheError(message(data, shown, expected, mend, because=because))

    def _temperatures(self) -> list[float]:
        """Every temperature of the run, as far as a cache of one temperature cares."""
        ends = (self.kd_args.kd_temperature, self.kd_args.kd_temperature_end)
        return [float(end) for end in ends if end is not None]

    # ---- files ----

    def _write_head(self, speaker: Speaker, settings: dict[str, Any], folder: Path) -> None:
        if settings["format"] != "hidden":
            return
        from safetensors.torch import save

        tensors = speaker.head_tensors(getattr(torch, settings["head_dtype"]))

        def write() -> None:
            with translate_os_errors(folder):
                write_atomically(folder / HEAD, save(tensors))

        self._on_main_process(write)

    def _finish(self, folder: Path, settings: dict[str, Any], part: str) -> None:
        with translate_os_errors(folder):
            finish(folder, settings, card(settings))

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
        cached = cast(CachedTeacher, self.teacher)
        for part, data in self._cache_parts():
            store = cached.parts.get(part)
            if store is not None:
                with same_random_numbers(self.args.device):
                    self._on_main_process(lambda s=store, p=part, d=data: self._compare(s.folder, s.manifest, p, d))

    def _holds(self, store: Store, dataset: Any) -> bool:
        """Whether a part is of these rows, as far as some of them tell; each is compared when it is read."""
        kept = store.manifest
        used, collator = self._as_read(dataset)
        by_position = kept["row_ids"] == "position"
        if isinstance(used, IterableDataset) or _by_position(used) != by_position:
            return False
        if by_position and len(used) != len(store):
            return False
        try:
            read = reading_of(kept, collator)(_features(used, _SAMPLE_ROWS))
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


def _argument_of(part: str) -> str:
    """By which argument the data of a part came."""
    kind = part.partition("-")[0]
    return "dataset" if kind == TEST else f"{kind}_dataset"


def _by_position(dataset: Any) -> bool:
    """Whether a row is known by its place, not by a column of its own."""
    if isinstance(dataset, IterableDataset):
        return False
    rows = NumberedRows(dataset).__getitems__([0]).features
    return not (isinstance(rows, list) and have_ids(rows))


def _signed(read: Read) -> list[list[int]]:
    """[row id, signature] of each row."""
    return [[row, int(signature)] for row, signature in zip(read.row_ids, read.signatures, strict=True)]


def _features(dataset: Any, count: int) -> Any:
    """Some rows as a dataloader would fetch them: evenly spread, or the first of a stream."""
    if isinstance(dataset, IterableDataset):
        return list(itertools.islice(iter(dataset), count))
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)).tolist()
    return NumberedRows(dataset).__getitems__(rows)
