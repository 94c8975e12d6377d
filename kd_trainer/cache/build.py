"""Building a teacher cache: the teacher runs once over the data, shard by shard, on any number of processes.

A shard holds whole batches of consecutive rows: its bytes depend neither on the number of processes nor on
interruptions. Letters: B rows, S positions, N kept positions, V classes, H hidden size.
"""

from __future__ import annotations

import errno
import itertools
import logging
import math
import operator
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from ..losses import bad_rows
from ..tasks import TEACHER_PREFIX
from ..validation import fail, message
from .formats import TOKEN_LOG_PROBS, format_of, to_numpy
from .server_reader import ServerReader
from .signed_collator import NumberedBatch, NumberedRows, SignedBatch, SignedCollator
from .store import Rows, joined, write_shard
from .teacher_reader import TeacherReader

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
Reader = TeacherReader | ServerReader


def plan(
    rows: int, settings: Mapping[str, Any], have: set[int], rank: int, world: int, *, together: bool
) -> list[tuple[int, list[int]]]:
    """(shard, rows) of each batch of a process; the missing shards are distributed round-robin.

    Args:
        together: whether each forward of the teacher needs all processes. Then padding batches (shard -1) give every
            process the same number of forwards; their outputs are discarded.
    """
    per, size = settings["rows_per_shard"], settings["batch_rows"]
    missing = [index for index in range(-(-rows // per)) if index not in have]

    def batches_of(who: int) -> list[tuple[int, list[int]]]:
        ends = [(index, min((index + 1) * per, rows)) for index in missing[who::world]]
        return [(i, list(range(s, min(s + size, end)))) for i, end in ends for s in range(i * per, end, size)]

    mine = batches_of(rank)
    if together and missing:
        padding = (-1, list(range(min(size, rows))))
        mine += [padding] * (max(len(batches_of(who)) for who in range(world)) - len(mine))
    return mine


def stream_batches(dataset: Any, settings: Mapping[str, Any], collate: SignedCollator) -> Iterator[tuple[int, Any]]:
    """(shard, collated batch) of a stream, in its order."""
    per, size = settings["rows_per_shard"], settings["batch_rows"]
    rows = iter(dataset)
    for index in itertools.count():
        for _ in range(per // size):
            features = list(itertools.islice(rows, size))
            if not features:
                return
            yield index, collate(features)


def build_shards(trainer: Any, reader: Reader, dataset: Any, folder: Path, settings: dict[str, Any],
                 collate: SignedCollator, have: set[int], *, together: bool, part: str) -> None:  # fmt: skip
    """Runs the teacher for the missing shards of this process and writes them; `have`: those that exist."""
    args = trainer.args
    rank, world = args.process_index, args.world_size
    todo: Iterable[tuple[int, Any]]
    if isinstance(dataset, IterableDataset):
        own = (found for found in stream_batches(dataset, settings, collate) if found[0] not in have)
        todo = own if together else (found for found in own if found[0] % world == rank)
        total = None
    else:
        mine = plan(len(dataset), settings, have, rank, world, together=together)
        batches = [batch for _, batch in mine]
        options: dict[str, Any] = {"collate_fn": collate, "num_workers": args.dataloader_num_workers}
        loader = DataLoader(cast(Any, NumberedRows(dataset)), batch_sampler=batches, **options)
        todo = zip((index for index, _ in mine), loader, strict=True)
        total = sum(len(batch) for index, batch in mine if index >= 0)
    writes = rank == 0 or not together or not isinstance(dataset, IterableDataset)
    with tqdm(total=total, desc=f"teacher cache: {part}", unit=" rows", disable=args.disable_tqdm or rank > 0) as bar:
        encoded = reader.in_order(todo, partial(encode_batch, trainer, reader, settings))
        for index, found in itertools.groupby(encoded, key=operator.itemgetter(0)):
            parts: list[Rows] = []
            for _, encode in found:
                rows = encode()
                if index >= 0 and writes:
                    parts.append(rows)
                    bar.update(len(rows.row_ids))
                del rows, encode  # free the memory before the next forward
            if parts:
                with translate_os_errors(folder):
                    write_shard(folder, index, joined(parts))


def encode_batch(trainer: Any, reader: Reader, settings: Mapping[str, Any], signed: SignedBatch) -> Rows:
    """The teacher's outputs for a batch, encoded."""
    kept, (_, row_ids, _, counts, seen) = format_of(settings), signed
    inputs, positions = on_device(trainer, reader, signed)
    _check_columns(settings, reader, signed.batch, inputs)
    uniform = _uniform(settings, row_ids[0], int(counts.sum())) if kept.name == "sampled" else torch.empty(0)
    columns = reader.columns(kept, inputs, positions, uniform)
    _check_finite(columns, row_ids)
    kept_columns = {name: to_numpy(column) for name, column in columns.items()}
    return Rows(np.asarray(row_ids, np.int64), seen, counts, kept_columns)


def _check_columns(
    settings: Mapping[str, Any], reader: Reader, batch: Mapping[str, Any], inputs: Mapping[str, Any]
) -> None:
    """Raises ValueError for a batch with columns that the sample batches do not have."""
    new = sorted(set(columns_read(batch, reader.teacher.inputs(inputs))) - set(settings["columns_read"]))
    if new:
        shown = f"one that makes {', '.join(new)} in some batches and not in those of the sample rows"
        because = "a teacher cache could not notice that they have changed"
        fix = "Give these columns in every batch, or train with the live teacher."
        fail("data_collator", shown, "the same columns in all batches", fix, because=because)


def columns_read(batch: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """The columns of the collated batch that the teacher reads, `teacher_*` columns with their prefix."""
    own = [name for name in batch if name.startswith(TEACHER_PREFIX) and name.removeprefix(TEACHER_PREFIX) in inputs]
    shared = [name for name in batch if name in inputs and TEACHER_PREFIX + name not in batch]
    shifted = "labels" in batch and "decoder_input_ids" in inputs and "decoder_input_ids" not in batch
    return sorted([*own, *shared, *(["labels"] if shifted else [])])


def on_device(trainer: Any, reader: Reader, signed: SignedBatch) -> tuple[dict[str, Any], Tensor]:
    """A batch and its kept positions where the teacher reads them."""
    inputs = reader.task.with_decoder_inputs(trainer.unwrapped_student(), trainer._prepare_inputs(signed.batch))
    return inputs, signed.mask.to(trainer.args.device)


def check_packed_rows(trainer: Any, reader: Reader, collate: SignedCollator, rows: NumberedBatch) -> None:
    """Raises ValueError where the teacher's output for a packed row depends on the rows before it."""
    batches = collate(rows), collate(NumberedBatch(rows.row_ids[-1:], rows.features[-1:]))
    behind, alone = (torch.cat([x.clone() for x in reader.logits(*on_device(trainer, reader, b))]) for b in batches)
    room = 5e-2 if alone.dtype.itemsize < 4 else 1e-3
    behind = behind[len(behind) - len(alone) :]
    if len(alone) and float((behind - alone).abs().max()) > room * float(alone.abs().max()):
        shown = "one that packs rows, and the teacher attends from one row to another"
        fix = "Use DataCollatorWithFlattening with its position_ids and a teacher that uses them, or pad the rows."
        fail("data_collator", shown, "rows whose teacher outputs do not depend on the other rows of the batch", fix)


def _uniform(settings: Mapping[str, Any], first_row: int, count: int) -> Tensor:
    """[count] numbers in [0, 1) that depend on seed and row alone."""
    generator = torch.Generator().manual_seed((settings["seed"] * 1_000_003 + first_row) % 2**63)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _check_finite(columns: Mapping[str, Tensor], row_ids: list[int]) -> None:
    """Raises ValueError for NaN or inf in the teacher's outputs."""
    for name, values in columns.items():
        if name not in ("logits", "hidden", "entropy", "log_tail", TOKEN_LOG_PROBS) or not len(values):
            continue
        if name == "logits":
            bad = bool(bad_rows(values))
        elif name in ("log_tail", TOKEN_LOG_PROBS):  # -inf is a probability of 0; NaN where a logit is NaN or inf
            bad = math.isnan(values.amin())
        else:
            bad = not all(map(math.isfinite, values.aminmax()))
        if bad:
            shown = f"giving NaN or inf on rows {row_ids[0]} to {row_ids[-1]} of the data"
            fix = "Check its weights, its dtype (float16 overflows where bfloat16 does not) and the inputs."
            fail("teacher_model", shown, "finite outputs", fix)


@contextmanager
def translate_os_errors(folder: Path) -> Iterator[None]:
    """Raises RuntimeError, with what to do, for an OSError inside: a write to a cache's folder."""
    try:
        yield
    except OSError as error:
        shown = f"{str(folder)!r}, where a file could not be written ({error})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
            expected = f"room for it ({shutil.disk_usage(there).free / 1e6:,.0f} MB are free)"
            fix = "What is built stays: make room and run again, the building continues there."
        else:
            expected = "a folder that this run may write to"
            fix = "Set it to another folder. (One with a finished cache of the same data may be read-only.)"
        raise RuntimeError(message("teacher_cache_dir", shown, expected, fix)) from error
