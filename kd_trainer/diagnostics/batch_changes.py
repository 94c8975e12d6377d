"""A batch split or padded: changes that should not change a loss.

For: `trial.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from ..losses import IGNORE_INDEX
from ..tasks import CHUNK_IDS, TEACHER_PREFIX, Task, main_input, token_mask
from ..teachers import NO_CHUNK


def pieces_of(batch: Mapping[str, Any], rows: int) -> list[dict[str, Any]] | None:
    """Pieces of at most `rows` rows of the batch; None where a column does not have one entry for each row."""
    count = len(main_input(batch))
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    positions = tensors.get("position_ids")
    if positions is not None and len(positions) == 1 < count:  # the same for every row
        del tensors["position_ids"]
    if any(len(value) != count for value in tensors.values()):
        return None
    rows = max(rows, 1)
    starts = range(0, count, rows)
    return [{**batch, **{name: value[i : i + rows] for name, value in tensors.items()}} for i in starts]


def padded(batch: Mapping[str, Any], task: Task, more: int, pad_id: int, *, left: bool) -> dict[str, Any] | None:
    """The batch with `more` positions of padding in each row; None without a mask, or with position ids."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    plain = isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.dim() == 2 and mask.shape == ids.shape
    if not plain or {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"} & set(batch):
        return None
    fills = {"input_ids": pad_id, "decoder_input_ids": pad_id, "labels": IGNORE_INDEX, "shift_labels": IGNORE_INDEX}
    fills[CHUNK_IDS] = NO_CHUNK
    made = dict(batch)
    for name, value in batch.items():
        if name in ("start_positions", "end_positions") and left:
            made[name] = value + more
        own = name.startswith(TEACHER_PREFIX)
        decoded = name.startswith("decoder_") or name == "labels"
        width = value.shape[1] if isinstance(value, Tensor) and value.dim() == 2 else None
        of_tokens = width == cast(Tensor, ids).shape[1] or (task.encoder_decoder and decoded)
        if width is None or own or not of_tokens or (decoded and not task.token_level):
            continue
        before = left and not (decoded and task.encoder_decoder)
        made[name] = nn.functional.pad(value, (more, 0) if before else (0, more), value=fills.get(name, 0))
    if left and task.shifted and "labels" in made:
        made["labels"][:, more] = IGNORE_INDEX  # no position predicts the first label of a row
    return made


def starts_padded(batch: Mapping[str, Any]) -> bool:
    """Whether a row begins with padding."""
    mask = token_mask(batch.get("attention_mask"))
    return mask is not None and not bool(mask[:, 0].all())
