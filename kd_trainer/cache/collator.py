"""A data collator that joins cached teacher outputs to each batch by row id."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..validation import message
from .cached_teacher import COLUMN_PREFIX
from .formats import check_columns, decode, format_of
from .signed_collator import ROWS_DIFFER, signed_collator_of
from .store import DATA, CacheError, Store, foreign_message


class CachedCollator:
    """Runs the script's collator and adds the rows' cached teacher outputs in `teacher_cache_*` columns.

    Args:
        collator: makes the batch.
        store: the cache of the dataset.

    Raises:
        CacheError: a row differs from the one that the teacher read, is not in the cache, or its shard is damaged.
    """

    def __init__(self, collator: Callable[[Any], Any], store: Store) -> None:
        self.collator, self.store = collator, store

    def around(self, wrap: Callable[[Any], Any]) -> CachedCollator:
        """The same with `wrap(collator)` in place of the collator."""
        return CachedCollator(wrap(self.collator), self.store)

    def __call__(self, features: Any) -> dict[str, Any]:
        manifest = self.store.manifest
        collate = signed_collator_of(manifest, self.collator)
        batch, row_ids, mask, counts, seen = collate(features)
        rows = self.store.take(row_ids)
        wrong = np.flatnonzero((rows.signatures != seen) | (rows.counts != counts))
        if len(wrong):
            fix = "Train on the data that the cache was built from, or name another teacher_cache_dir to build one."
            shown = f"giving a row {rows.row_ids[wrong[0]]} that differs from the one the teacher read"
            raise CacheError(message("train_dataset", shown, "the rows of the teacher cache", fix, because=ROWS_DIFFER))
        kept = format_of(manifest)
        width = manifest["hidden_size"] if kept.name == "hidden" else math.prod(manifest["shape"])
        reason = check_columns(kept, rows.columns, width)
        decoded = {} if reason else decode(kept, rows.columns)
        for name in ("ids", "top"):
            if name in decoded and decoded[name].numel() and int(decoded[name].max()) >= kept.classes:
                reason = f"{name} are beyond the {kept.classes:,} classes of its manifest"
        if reason:
            raise CacheError(foreign_message(str(self.store.folder / DATA), reason))
        for name, values in decoded.items():
            shape = manifest["shape"] if name == "logits" else None
            batch[COLUMN_PREFIX + name] = collate.task.place_positions(values, mask, shape)
        return batch
