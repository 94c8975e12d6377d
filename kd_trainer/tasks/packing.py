"""Packed rows, of several sequences each: watched for in every batch, without a wait for the device.

For: the trainer, whose "batchmean" divides by rows. Whether one batch is packed: `inputs.is_packed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from ..validation import fail
from .inputs import is_packed
from .task import Task


class PackingWatch:
    """Looks at every batch for packed rows, which "batchmean" cannot count.

    On CPU, and where the batch tells without a look at its tensors, at once; on accelerators the answer stays on the
    device until `raise_noted` reads it, so that no step waits.
    """

    def __init__(self) -> None:
        self._note: Tensor | None = None
        self._embeds = False

    def look(self, task: Task, batch: Mapping[str, Any], reduction: str, *, now: bool = False) -> None:
        """Raises ValueError where "batchmean" would divide by rows of several sequences, or where one would be embedded
        as a whole."""
        ids = batch.get("input_ids")
        if task.embeds and isinstance(ids, Tensor) and ids.dim() == 2:
            self._embeds = True
            self.see(is_packed(batch, ids.shape), now=now)
        elif task.token_level and reduction == "batchmean":
            self.see(is_packed(batch, task.sequences(batch).shape), now=now)

    def see(self, packed: bool | Tensor, *, now: bool = False) -> None:
        """Takes the result of `is_packed`; raises ValueError where it may be read and is true."""
        if isinstance(packed, Tensor) and packed.device.type != "cpu" and not now:
            self._note = packed if self._note is None else self._note | packed
        elif packed:
            self._refuse()

    def raise_noted(self) -> None:
        """Raises ValueError where a batch since the last call was packed."""
        note, self._note = self._note, None
        if note is not None and note:
            self._refuse()

    def _refuse(self) -> NoReturn:
        if self._embeds:
            fix = "Pad the rows: DataCollatorWithPadding."
            because = "an embedding is made of all tokens of a row"
            fail("inputs", "a packed batch", "one text in a row", fix, because=because)
        because = "rows of a packed batch are no longer sequences"
        expected, fix = "'tokenmean' with packed batches", "Set kd_reduction to tokenmean."
        fail("kd_reduction", "'batchmean'", expected, fix, because=because)
