"""The settings of a teacher cache: made from a trainer when it is built, and compared with a trainer later.

Read of the trainer: arguments, data, collator, tokenizer, student.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

from .. import __version__
from ..tasks import SMALL_VOCABULARY, TASKS, classes_have_names
from ..teachers import class_names, routed
from ..validation import fail, message, warn
from .build import SHARD_BYTES, Reader, check_packed_rows, columns_read, on_device
from .cached_teacher import TEST, check_objective, check_tokens_kept, open_part
from .formats import DEFAULT_K, DTYPES, TOKEN_LOG_PROBS, Format, check_format, format_of
from .identity import collation, compare, compare_teachers, tokenizer_identity
from .manifest import LAYOUT, CacheError, settings_of_task
from .signed_collator import (
    ROWS_DIFFER,
    NumberedRows,
    SignedBatch,
    SignedCollator,
    have_row_ids,
    signed_collator_of,
    with_row_ids,
)
from .store import MANIFEST
from .teacher_reader import fail_without_linear_head

logger = logging.getLogger(__name__)

Compared = dict[str, tuple[str, str, Any, str]]  # see `identity.compare`
_SAMPLE_ROWS = 32  # compared before a cache is built or read: evenly spread over the data


def data_and_collator(trainer: Any, dataset: Any) -> tuple[Any, Any]:
    """The dataset and the collator as in the training's dataloader."""
    collator = routed(trainer.data_collator, trainer.teacher)
    if isinstance(dataset, datasets.Dataset):
        return trainer._remove_unused_columns(dataset), collator
    return dataset, trainer._get_collator_with_removed_columns(collator)


def labels_of(trainer: Any, task: Any) -> dict[str, str] | None:
    """The names of the student's classes by id, as JSON holds them; None where the task has none."""
    student = trainer.unwrapped_student()
    names = class_names(student) if classes_have_names(student, task) else None
    return {str(i): name for i, name in names.items()} if names else None


def compute_precision(trainer: Any, teacher: Any) -> str:
    """Dtype, autocast and kind of device of the teacher's forward, as text; "server" where it is not run here."""
    models: list[nn.Module] = [member.model for member in teacher.members if member.model is not None]
    if not models:
        return "server"
    dtypes = (next((p.dtype for p in model.parameters()), torch.float32) for model in models)
    named = "+".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return f"{named} {trainer.accelerator.mixed_precision} {trainer.args.device.type}"


def settings_of(
    trainer: Any,
    part: str,
    dataset: Any,
    reader: Reader,
    sample: dict[str, Any],
    known: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> tuple[dict[str, Any], Callable[[], None]]:
    """The settings of a part that is to be built, and a function for the main process that prints and checks its size.

    Args:
        sample: a batch of it.
        known: `common_ids` and `known_by` of the plan.
        identity: of the teacher, see `teacher_identity`.
    """
    kd, task = trainer.kd_args, reader.task
    used, collator = data_and_collator(trainer, dataset)
    prepared = task.with_decoder_inputs(trainer.unwrapped_student(), trainer._prepare_inputs(dict(sample)))
    columns = columns_read(sample, reader.teacher.inputs(prepared))
    chunks = _compares_chunks(kd)
    positions = "attended" if chunks else kd.kd_positions
    collate = SignedCollator(collator, task, positions, columns, of_teacher_tokens=chunks)
    signed = collate(sample_rows(used))
    if row_signatures(signed) != row_signatures(collate(sample_rows(used))):
        because = "the teacher output of one reading would be used for another"
        fix = "Apply it once, before the training (dataset.map), or train with the live teacher."
        shown = "one whose rows differ from one reading to the next (random augmentation, masking or padding)"
        fail(dataset_argument(part), shown, "the same rows each time", fix, because=because)
    kept, extra = _format(trainer, reader, collate(sample_rows(used, 1)), known)
    if len(signed.mask) < len(signed.row_ids):
        check_packed_rows(trainer, reader, collate, with_row_ids(sample_rows(used, 2)))
    row_bytes = kept.bytes_a_position(extra["hidden_size"]) * float(signed.counts.mean()) + 24
    batch_rows = trainer.args.per_device_eval_batch_size
    settings = {
        **{"layout": LAYOUT, "kd_trainer": __version__, "part": part},
        **{"format": kept.name, "classes": kept.classes, "k": kept.k},
        **{"temperature": kept.temperature, "dtype": kept.dtype, **extra},
        **settings_of_task(task),
        **reader.task.teacher_settings(reader.teacher.model),
        **{"positions": positions, "labels": labels_of(trainer, task)},
        "teacher": _with_parameters(identity, reader.teacher.identity()),
        "tokenizer": None if chunks else tokenizer_identity(trainer.processing_class),
        "collation": collation(trainer.data_collator, trainer.processing_class),
        "dataset": {"rows": None if isinstance(used, IterableDataset) else len(used), "sample": row_signatures(signed)},
        "columns_read": columns,
        "kinds": collate.kinds,
        "row_ids": "position" if known_by_position(used) else "column",
        "batch_rows": batch_rows,
        "rows_per_shard": max(1, int(SHARD_BYTES / (row_bytes * batch_rows))) * batch_rows,
        "seed": trainer.args.seed,
        "computed": compute_precision(trainer, reader.teacher),
    }
    return settings, partial(_check_disk_space, trainer, settings, row_bytes)


def _with_parameters(identity: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """The identity with the numbers of parameters, of several teachers of each."""
    if "teachers" not in identity:
        return {**identity, "parameters": run["parameters"]}
    each = zip(identity["teachers"], run["teachers"], strict=True)
    return {**identity, "parameters": run["parameters"], "teachers": [_with_parameters(*pair) for pair in each]}


def _format(
    trainer: Any, reader: Reader, signed: SignedBatch, known: Mapping[str, Any]
) -> tuple[Format, dict[str, Any]]:
    """The format of the arguments, completed by the dimensions of the teacher's outputs."""
    kd, task, common_ids = trainer.kd_args, reader.task, known["common_ids"]
    given = reader.dimensions(*on_device(trainer, reader, signed))
    classes, product = given.shape[-1], reader.output_head
    name, k, dtype = _requested_format(trainer)
    if name == "auto":
        large = task.over_tokens and classes >= SMALL_VOCABULARY and product is not None
        name = "hidden" if large else "logits"
    if name != TOKEN_LOG_PROBS:
        check_format(name, k, dtype, softmax=task.softmax, over_tokens=task.over_tokens, task=task.name)
    several = len(reader.teacher.members) > 1
    if several and name == "hidden":
        fix = "Set it to logits, or build a cache of each teacher alone and give a list of CachedTeachers."
        because = "a mixture of teachers has no hidden states"
        fail(
            "teacher_cache_format",
            repr(name),
            "'logits', 'topk' or 'sampled' of several teachers",
            fix,
            because=because,
        )
    extra: dict[str, Any] = {
        "shape": given.shape, "vocabulary": classes, "common_ids": common_ids, "known_by": known["known_by"],
        "hidden_size": 0, "head_dtype": None, "head_scale": 1.0, "head_softcap": None,
    }  # fmt: skip
    if name == TOKEN_LOG_PROBS:
        return Format(name, classes), extra
    if name == "sampled":
        return Format(name, common_ids or classes, k or DEFAULT_K[name], float(kd.kd_temperature)), extra
    if name == "topk":
        classes, k = common_ids or classes, k or DEFAULT_K[name]
        if kd.teacher_server_url is not None:
            k = min(k, classes - 1)  # all of a vocabulary: the rest is its last class
        if k >= classes:
            expected, fix = f"1 to {classes - 1}, fewer than there are classes", "Lower it, or keep logits."
            fail("teacher_cache_k", repr(k), expected, fix)
        return Format(name, classes, k, float(kd.kd_temperature), dtype or "float16"), extra
    if name == "hidden":
        if product is None:
            fail_without_linear_head(reader)
        extra |= {"hidden_size": given.hidden_size, "head_dtype": given.hidden_dtype}
        extra |= {"head_scale": product.scale, "head_softcap": product.softcap}
    half = {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision)
    own = given.logits_dtype
    if product is not None and (name == "hidden" or (product.scale == 1 and product.softcap is None)):
        own = half or given.hidden_dtype  # a product in half precision has no more digits
    temperature = float(kd.kd_temperature) if several and task.mixed_as == "probabilities" else None
    kept = Format(name, classes, None, temperature, dtype or (own if own in DTYPES else "float32"))
    if several:
        check_objective(kept, kd.kd_divergence, _temperatures(kd), kd.kd_standardize_logits)
    return kept, extra


def _requested_format(trainer: Any) -> tuple[str, int | None, str | None]:
    """Format, k and dtype of the arguments; "auto" takes those of the other parts of the cache."""
    kd = trainer.kd_args
    if kd.teacher_server_url is not None:
        return "topk", kd.teacher_server_top_k, kd.teacher_cache_dtype
    others = sorted(Path(str(kd.teacher_cache_dir)).glob(f"*/{MANIFEST}"))
    if kd.teacher_cache_format != "auto" or not others:
        form = TOKEN_LOG_PROBS if _compares_chunks(kd) else kd.teacher_cache_format
        return form, kd.teacher_cache_k, kd.teacher_cache_dtype
    kept = open_part(others[0].parent, Path(str(kd.teacher_cache_dir))).manifest
    check_tokens_kept(format_of(kept), chunks=_compares_chunks(kd))
    return kept["format"], kept["k"], None if kept["format"] == "sampled" else kept["dtype"]


def _check_disk_space(trainer: Any, settings: dict[str, Any], row_bytes: float) -> None:
    """Prints the size on disk; raises RuntimeError where there is no room for it."""
    rows, where = settings["dataset"]["rows"], Path(str(trainer.kd_args.teacher_cache_dir))
    position_bytes = format_of(settings).bytes_a_position(settings["hidden_size"])
    kept = settings["format"] + "".join(f", {n} {settings[n]:g}" for n in ("k", "temperature") if settings[n])
    kept += "" if settings["format"] == "sampled" else f", {settings['dtype']}"
    size = "a stream of rows" if rows is None else f"{rows:,} rows, about {rows * row_bytes / 1e6:,.1f} MB"
    shown = (
        f"[kd_trainer] teacher cache {str(where / settings['part'])!r}: {kept}, {position_bytes:,g} bytes a position"
    )
    print(f"{shown}; {size}", flush=True)
    parent = next(p for p in (where.absolute(), *where.absolute().parents) if p.exists())
    there = sum(f.stat().st_size for f in (where / settings["part"]).rglob("*") if f.is_file())
    missing, free = (rows or 0) * row_bytes - there, shutil.disk_usage(parent).free
    if missing > free:
        fix = "Make room, or keep less: teacher_cache_format topk or sampled, or a smaller teacher_cache_k."
        shown = f"{str(where)!r} with {free / 1e6:,.0f} MB free"
        expected = f"about {missing / 1e6:,.0f} MB for {rows:,} rows of format {settings['format']}"
        raise RuntimeError(message("teacher_cache_dir", shown, expected, fix))


def compare_settings(
    trainer: Any, folder: Path, kept: dict[str, Any], part: str, dataset: Any, identity: dict[str, Any] | None
) -> None:
    """Raises CacheError where teacher, data or settings of a cache differ from the trainer's.

    Args:
        identity: of the teacher; None where there is no teacher to compare.
    """
    kd, data = trainer.kd_args, dataset_argument(part)
    current: Compared = {}
    check_tokens_kept(format_of(kept), chunks=_compares_chunks(kd))
    if identity is not None:
        unknown = compare_teachers(folder, kept, identity)
        if unknown is not None:
            warn(logger, "[kd_trainer] %s: the teacher cache %s is used without comparing them", unknown, folder)
    form = None if kd.teacher_cache_format == "auto" else kd.teacher_cache_format
    chosen = ("format", "the format", form), ("k", "the value", kd.teacher_cache_k)
    for name, what, value in (*chosen, ("dtype", "the dtype", kd.teacher_cache_dtype)):
        if value is not None:
            current[name] = (f"teacher_cache_{name}", what, value, "Set it so.")
    if kd.teacher_server_url is not None:
        k = min(kd.teacher_server_top_k, kept["classes"] - 1)
        current["k"] = ("teacher_server_top_k", "the value", k, "Set it so.")
    if kept.get("pooling_of_run") and kd.kd_pooling is not None:
        current["pooling"] = ("kd_pooling", "the pooling", kd.kd_pooling, "Set it so.")
    if not format_of(kept).of_teacher_tokens:  # else the student's tokens and positions have no part in it
        current |= _of_student_tokens(trainer, kept)
    by_position = kept["row_ids"] == "position"  # rows with ids may be fewer now
    if by_position and not isinstance(dataset, IterableDataset):
        current["dataset.rows"] = (data, "a number of rows of", len(dataset), "Train on the same rows.")
    compare(folder, kept, current)
    check_objective(format_of(kept), kd.kd_divergence, _temperatures(kd), kd.kd_standardize_logits)
    if by_position:
        _compare_rows(trainer, folder, kept, data, dataset)


def _of_student_tokens(trainer: Any, kept: Mapping[str, Any]) -> Compared:
    """What the outputs depend on where the teacher reads the student's tokens."""
    current: Compared = {}
    if TASKS[kept["task"]].by_position:
        current["positions"] = ("kd_positions", "the positions", trainer.kd_args.kd_positions, "Set it so.")
    vocabulary = tokenizer_identity(trainer.processing_class)
    current["tokenizer"] = ("processing_class", "a vocabulary of SHA-256", vocabulary, "Pass the same tokenizer.")
    for name, value in collation(trainer.data_collator, trainer.processing_class).items():
        current[f"collation.{name}"] = ("data_collator", name, value, "Collate in the same way.")
    return current


def _temperatures(kd: Any) -> list[float]:
    """At the start and at the end of the schedule."""
    return [float(end) for end in (kd.kd_temperature, kd.kd_temperature_end) if end is not None]


def _compare_rows(trainer: Any, folder: Path, kept: dict[str, Any], data: str, dataset: Any) -> None:
    """Raises CacheError where sample rows differ from those of the cache; training compares every row."""
    used, collator = data_and_collator(trainer, dataset)
    now = row_signatures(signed_collator_of(kept, collator)(sample_rows(used)))
    before = dict(kept["dataset"]["sample"])
    different = [row for row, signature in now if before.get(row, signature) != signature]
    if different:
        because = ROWS_DIFFER
        fix = "Train on the data that the cache was built from, or name another teacher_cache_dir."
        shown = f"one whose row {different[0]} differs from the one the teacher read"
        expected = f"the rows of the teacher cache {str(folder)!r}"
        raise CacheError(message(data, shown, expected, fix, because=because))


def _compares_chunks(kd: Any) -> bool:
    return kd.kd_cross_tokenizer == "chunks"


def dataset_argument(part: str) -> str:
    """The argument that holds the data of a part."""
    kind = part.partition("-")[0]
    return "dataset" if kind == TEST else f"{kind}_dataset"


def known_by_position(dataset: Any) -> bool:
    """Whether rows are identified by their index, not by a column of row ids."""
    if isinstance(dataset, IterableDataset):
        return False
    rows = NumberedRows(dataset).__getitems__([0]).features
    return not (isinstance(rows, list) and have_row_ids(rows))


def row_signatures(signed: SignedBatch) -> list[list[int]]:
    """[row id, signature] of each row."""
    return [[row, int(signature)] for row, signature in zip(signed.row_ids, signed.signatures, strict=True)]


def consecutive_rows(dataset: Any, first: int, count: int) -> Any:
    """Consecutive rows as a dataloader fetches them; of a stream the first ones."""
    if isinstance(dataset, IterableDataset):
        return sample_rows(dataset, count)
    return NumberedRows(dataset).__getitems__(list(range(first, first + count)))


def sample_rows(dataset: Any, count: int | None = None) -> Any:
    """`count` (default `_SAMPLE_ROWS`) rows as a dataloader fetches them: evenly spread, or the first of a stream."""
    count = count or _SAMPLE_ROWS
    if isinstance(dataset, IterableDataset):
        return list(itertools.islice(iter(dataset), count))
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)).tolist()
    return NumberedRows(dataset).__getitems__(rows)
