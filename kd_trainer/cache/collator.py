"""A data collator that joins cached teacher outputs to each batch by row id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..validation import message
from .formats import check_columns, decode, format_of
from .signed_collator import ROWS_DIFFER, signed_collator_of
from .store import DATA, CacheError, Store, foreign_message


class CachedCollator:
    """Runs the script's collator and adds the rows' cached teacher outputs in `teacher_cache_*` columns.

    Args:
        collator: makes the batch.
        stores: the cache of the dataset, or of several teachers each one, by the prefix of its columns.

    Raises:
        CacheError: a row differs from the one that the teacher read, is not in the cache, or its shard is damaged.
    """

    def __init__(self, collator: Callable[[Any], Any], stores: Mapping[str, Store]) -> None:
        self.collator, self.stores = collator, stores

    def around(self, wrap: Callable[[Any], Any]) -> CachedCollator:
        """The same with `wrap(collator)` in place of the collator."""
        return CachedCollator(wrap(self.collator), self.stores)

    def __call__(self, features: Any) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for prefix, store in self.stores.items():
            collated, cached = self._read(features, store)
            batch = batch or collated  # each signs the batch that it collates
            batch |= {prefix + name: values for name, values in cached.items()}
        return batch

    def _read(self, features: Any, store: Store) -> tuple[dict[str, Any], dict[str, Any]]:
        """The collated batch, and the cached outputs of its rows."""
        manifest = store.manifest
        collate = signed_collator_of(manifest, self.collator)
        batch, row_ids, mask, counts, seen = collate(features)
        rows = store.take(row_ids)
        wrong = np.flatnonzero((rows.signatures != seen) | (rows.counts != counts))
        if len(wrong):
            fix = "Train on the data that the cache was built from, or name another teacher_cache_dir to build one."
            shown = f"giving a row {rows.row_ids[wrong[0]]} that differs from the one the teacher read"
            raise CacheError(message("train_dataset", shown, "the rows of the teacher cache", fix, because=ROWS_DIFFER))
        kept = format_of(manifest)
        reason = check_columns(kept, rows.columns, kept.width(manifest["hidden_size"], manifest["shape"]))
        decoded = {} if reason else decode(kept, rows.columns)
        for name in ("ids", "top"):
            if name in decoded and decoded[name].numel() and int(decoded[name].max()) >= kept.classes:
                reason = f"{name} are beyond the {kept.classes:,} classes of its manifest"
        if reason:
            raise CacheError(foreign_message(str(store.folder / DATA), reason))
        placed = {}
        for name, values in decoded.items():
            shape = manifest["shape"] if name == "logits" else None
            placed[name] = collate.task.place_positions(values, mask, shape)
        return batch, placed
