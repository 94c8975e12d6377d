"""Signatures of rows: a hash of everything that the teacher reads of a row, without the padding.

Letters: B rows, S positions of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..tasks import TEACHER_PREFIX, token_mask
from ..validation import fail

# How a column of a batch belongs to its rows. It is found once, from some rows collated together and each alone: shapes
# alone could give another result in another batch.
ROW = "row"  # an entry for each row: [B, ...] or a list of B
TOKEN = "token"  # an entry for each token of each row: [B, S, ...]
SECOND = "second"  # as token, with the rows second: [3, B, S]
SHARED = "shared"  # the same for all rows: a number, a text, [1, S]
CONCATENATED = "own"  # the rows' entries concatenated: flattened patches
KINDS = (ROW, TOKEN, SECOND, SHARED, CONCATENATED)

_UNNOTICED = "a teacher cache could not notice that a row of the data has changed"
_OF_TOKENS = frozenset(
    ["input_ids", "token_type_ids", "position_ids", "inputs_embeds", "bbox", "langs", "mm_token_type_ids"]
)


def flat(batch: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The columns of these names; of one that is a mapping each entry, as "name.entry"."""
    found: dict[str, Any] = {}
    for name in sorted(names):
        value = batch.get(name)
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": each for key, each in flat(value, [str(key) for key in value]).items()}
        elif name in batch:
            found[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype != object else value
    return found


def kinds_of(
    whole: Mapping[str, Any], alone: Sequence[Mapping[str, Any]] | None, rows: int, names: Sequence[str]
) -> dict[str, str]:
    """How each column of a batch belongs to its rows, one of `KINDS`.

    Args:
        whole: some rows, collated; alone: the same rows, each collated alone; None where they cannot be separated.
        names: of the columns that the teacher reads.

    Raises:
        ValueError: a column whose entries belong to no row: a change of a row would not be noticed.
    """
    columns = flat(whole, names)
    parts = None if alone is None else [flat(each, names) for each in alone]
    lengths = [_tokens(each) for each in alone or ()]
    return {
        name: _kind(name, value, None if parts is None else [each.get(name) for each in parts], rows, lengths)
        for name, value in columns.items()
    }


def _tokens(batch: Mapping[str, Any]) -> int | None:
    """The number of tokens of a row collated alone."""
    mask = token_mask(batch.get("attention_mask"))
    if mask is not None:
        return mask.shape[1]
    ids = batch.get("input_ids")
    return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None


def _kind(name: str, value: Any, alone: list[Any] | None, rows: int, lengths: list[int | None]) -> str:
    own = name.removeprefix(TEACHER_PREFIX)
    by_name = own in _OF_TOKENS or own == "labels" or own.startswith("decoder_") or _is_mask(own)
    if not isinstance(value, (Tensor, list, tuple)) or (isinstance(value, Tensor) and not value.dim()):
        if alone is None or all(_equal(each, value) for each in alone):
            return SHARED
    elif not isinstance(value, Tensor):
        if len(value) == rows and (alone is None or all(isinstance(a, (list, tuple)) and len(a) == 1 for a in alone)):
            return ROW
        if alone is not None and _equal([x for a in alone for x in (a or ())], list(value)):
            return CONCATENATED
    elif alone is None:
        if len(value) == rows:
            return TOKEN if by_name else ROW
    else:
        whole_of_each = all(isinstance(each, Tensor) and each.dim() == value.dim() for each in alone)
        if whole_of_each and all(len(each) == 1 for each in alone):
            varied = len(set(lengths)) > 1 and value.dim() > 1
            of_tokens = by_name or (varied and all(a.shape[1] == n for a, n in zip(alone, lengths, strict=True)))
            if len(value) == rows:
                return TOKEN if of_tokens and value.dim() > 1 else ROW
            if len(value) == 1 and all(_begins(value, each) for each in alone):
                return SHARED
        turned = value.dim() > 1 and whole_of_each and value.shape[1] == rows
        if turned and all(each.shape[1] == 1 and len(each) == len(value) for each in alone):
            return SECOND
        if is_concatenation(value, alone):
            return CONCATENATED
    refuse_column(name, value, rows)


def refuse_column(name: str, value: Any, rows: int) -> NoReturn:
    """ValueError: a column of the batch has no entry for each row, so that a change of it would not be noticed."""
    shape = list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
    fix = "Give it row by row, or train with the live teacher."
    expected = "an entry of it for each row, or the rows' entries concatenated"
    fail("data_collator", f"one that makes {name} {shape} of {rows} rows", expected, fix, because=_UNNOTICED)


def is_concatenation(value: Tensor, alone: Sequence[Any]) -> bool:
    """Whether a tensor is the concatenation of those of the rows."""
    there = [each for each in alone if isinstance(each, Tensor)]
    if not there or any(each.shape[1:] != value.shape[1:] for each in there):
        return False
    joined = torch.cat(there)
    return joined.dtype == value.dtype and joined.shape == value.shape and _bytes(joined) == _bytes(value)


def _is_mask(name: str) -> bool:
    return name.partition(".")[0] in ("attention_mask", "global_attention_mask")


def _begins(value: Tensor, part: Tensor) -> bool:
    """Whether the only row of a tensor begins with that of `part`."""
    return value.dim() < 2 or _bytes(value[:, : part.shape[1]]) == _bytes(part)


def _equal(one: Any, other: Any) -> bool:
    return _of_any(one) == _of_any(other)


# ---- the hash -------------------------------------------------------------------------------------------------------


def signatures(
    batch: Mapping[str, Any],
    mask: Tensor,
    names: Sequence[str],
    kinds: Mapping[str, str],
    *,
    causal: bool = False,
    shifted: bool = False,
    apart: bool = False,
    prefix: str = "",
    alone: Callable[[], Sequence[Mapping[str, Any]]] | None = None,
) -> np.ndarray:
    """[B] uint64: a hash of the columns that the teacher reads of each row, and of its kept positions.

    Padding is left out: columns of tokens are hashed at attended positions; without a mask at all positions, or up to
    the last kept one where later ones have no effect (`causal`).

    Args:
        mask: `kept_positions`, on CPU; names: the columns of the batch that the teacher reads.
        kinds: see `kinds_of`.
        shifted: whether a kept position is the one before its label.
        apart: whether the kept positions are those of a decoder and the other columns those of an encoder.
        prefix: of the columns to whose tokens the kept positions belong.
        alone: returns the rows, each collated alone.
    """
    kept = mask.numpy()
    rows = len(kept)
    places = _Places(batch, kept, causal=causal, shifted=shifted, apart=apart, prefix=prefix)
    columns: list[tuple[bytes, Callable[[int], bytes]]] = []
    parts: list[dict[str, Any]] | None = None
    values = {**dict.fromkeys((name for name, kind in kinds.items() if kind == CONCATENATED)), **flat(batch, names)}
    for name, value in sorted(values.items()):
        kind = kinds.get(name, ROW)
        if name.endswith("attention_mask") and places.holds(name, value):
            continue
        by_rows = kind in (ROW, TOKEN) and isinstance(value, (Tensor, list, tuple)) and _length(value) == rows
        read: Callable[[int], bytes]
        if kind == CONCATENATED or (kind in (ROW, TOKEN) and not by_rows):  # rows with several entries, or none
            if parts is None:
                parts = [flat(each, names) for each in (() if alone is None else alone())]
            own = [each.get(name) for each in parts]
            if value is not None and (
                len(own) != rows or (isinstance(value, Tensor) and not is_concatenation(value, own))
            ):
                refuse_column(name, value, rows)
            read = lambda row, own=own: _of_any(own[row] if own else None)  # type: ignore[misc]  # noqa: E731
        elif isinstance(value, Tensor) and value.dim():
            if kind == SHARED:
                value = value.expand(rows, *value.shape[1:]) if len(value) == 1 else value.expand(rows, *value.shape)
            if kind == SECOND:
                value = value.transpose(0, 1)
                value = value.transpose(1, 2) if value.dim() > 2 else value
            own_places = None if kind == ROW else places.of(name, value)
            read = _by_row(value, own_places, square=_square(name, value))
        elif kind == SHARED:
            text = _of_any(value)
            read = lambda _, text=text: text  # type: ignore[misc]  # noqa: E731
        else:
            read = lambda row, value=value: _of_any(value[row : row + 1])  # type: ignore[misc]  # noqa: E731
        columns.append((name.encode(), read))
    found = np.zeros(rows, dtype=np.uint64)
    for row in range(rows):
        content = [places.pattern(row)]
        for title, read in columns:
            part = read(row)
            content += [b"\0", title, len(part).to_bytes(8, "little"), part]
        found[row] = xxhash.xxh3_64_intdigest(b"".join(content))
    return found


class _Places:
    """Which entries of a column belong to tokens, not to padding."""

    def __init__(self, batch: Mapping[str, Any], kept: np.ndarray, *, causal: bool, shifted: bool, apart: bool,
                 prefix: str) -> None:  # fmt: skip
        self.kept, self.causal, self.apart = kept, causal, apart
        self.masks = {prefix: _tokens_of(batch.get(f"{prefix}attention_mask"), len(kept))
                      for prefix in ("", TEACHER_PREFIX, "decoder_")}  # fmt: skip
        own = self.masks["decoder_" if apart else prefix]
        self.within = own if own is not None and own.shape == kept.shape else None
        last = kept.shape[1] - 1 - kept[:, ::-1].argmax(1)  # of a row without a kept position: all of it
        self.until = np.arange(kept.shape[1]) <= last[:, None] + shifted

    def of(self, name: str, value: Tensor) -> np.ndarray | None:
        """Boolean [B, S]; None for all entries."""
        places: np.ndarray | None
        if name == "labels":  # others are -100
            places = self.kept
        elif name.startswith("decoder_"):
            places = self.until if self.masks["decoder_"] is None else self.masks["decoder_"]
        else:
            places = self.masks[TEACHER_PREFIX if name.startswith(TEACHER_PREFIX) else ""]
            if places is None and self.causal and not self.apart:
                places = self.until
        size = value.shape[-1] if _square(name, value) else value.shape[1] if value.dim() > 1 else -1
        return places if places is not None and places.shape[1] == size else None

    def holds(self, name: str, value: Any) -> bool:
        """Whether a column is a plain mask of padding, which `pattern` holds already."""
        known = [f"{prefix}attention_mask" for prefix in self.masks]
        plain = isinstance(value, Tensor) and value.dim() == 2
        return name in known and plain and (value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all()))

    def pattern(self, row: int) -> bytes:
        """Which positions are kept, and where tokens are hidden between others."""
        bits = self.kept[row] if self.within is None else self.kept[row][self.within[row]]
        parts = [np.packbits(bits).tobytes().rstrip(b"\0")]
        for prefix, mask in self.masks.items():
            if mask is None:
                continue
            attended = mask[row].nonzero()[0]
            if len(attended) and attended[-1] - attended[0] + 1 != len(attended):
                within = np.packbits(mask[row][attended[0] : attended[-1] + 1])
                parts += [prefix.encode() + b":", within.tobytes()]
        return b"".join(parts)


def _tokens_of(mask: Any, rows: int) -> np.ndarray | None:
    tokens = token_mask(mask)
    if tokens is None:
        return None
    return (tokens.expand(rows, -1) if len(tokens) == 1 else tokens).numpy()


def _square(name: str, value: Tensor) -> bool:
    """Whether a column is an attention mask [B, S, S] or [B, heads, S, S]."""
    return _is_mask(name.removeprefix(TEACHER_PREFIX)) and value.dim() > 2 and value.shape[-1] == value.shape[-2]


def _length(value: Any) -> int:
    return -1 if isinstance(value, Tensor) and not value.dim() else len(value)


def _by_row(values: Tensor, places: np.ndarray | None, *, square: bool) -> Callable[[int], bytes]:
    """The bytes of a row, with its shape and dtype."""
    dtype, content = str(values.dtype).encode(), _canonical(values)
    if places is None:
        shape = dtype + str((1, *content.shape[1:])).encode()
        return lambda row: shape + content[row].tobytes()
    if square:
        return lambda row: dtype + content[row][..., places[row], :][..., places[row]].tobytes()
    shape = dtype + str(content.shape[2:]).encode()
    return lambda row: shape + content[row][places[row]].tobytes()


def _canonical(values: Tensor) -> np.ndarray:
    """As numpy, with one zero and one NaN; dtypes that numpy lacks as float32."""
    if values.is_floating_point():
        found = (values if values.dtype in (torch.float16, torch.float32, torch.float64) else values.float()).numpy()
        found = found + found.dtype.type(0)  # -0.0 is 0.0
        odd = np.isnan(found)
        if odd.any():
            found[odd] = np.nan
        return found
    return values.numpy()


def _bytes(values: Tensor) -> bytes:
    return _canonical(values).tobytes()


def _of_any(value: Any) -> bytes:
    """Bytes of a value that differ where the value does."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}".encode() + _bytes(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return _of_any(torch.from_numpy(value))
    if isinstance(value, Mapping):
        return b"{" + b"".join(_of_any(str(k)) + _of_any(value[k]) for k in sorted(value, key=str)) + b"}"
    if isinstance(value, (list, tuple)):
        return b"[" + b"".join(map(_of_any, value)) + b"]"
    text = repr(value).encode()
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.generic)):
        return f"{type(value).__name__} {len(text)} ".encode() + text
    fix = "Give numbers, texts, tensors and lists of these, or train with the live teacher."
    shown = f"one that makes objects of type {type(value).__name__}"
    fail("data_collator", shown, "values that can be compared", fix, because=_UNNOTICED)
