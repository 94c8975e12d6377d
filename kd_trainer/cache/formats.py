"""The formats of a teacher cache: teacher outputs at N positions -> columns of numbers, and back.

Letters: N positions, V classes, H hidden size, k classes kept, n draws.

    logits     [N, V] in the teacher's dtype, or in half precision (relative error 2^-11 in float16, 2^-8 in bfloat16);
               of several teachers T times the log-probabilities of their mixture at temperature T
    hidden     [N, H], the same
    topk       the k largest: ids, log-probabilities at the temperature of the building and the log of the mass of the
               rest, both in float16 (error |log p| / 2048)
    sampled    n ids drawn at that temperature, each of weight 1/n, the id on top, the exact entropy in float32
    token_log_probs   of a teacher with another tokenizer: the log-probability of each token of its text, in float32:
               4 bytes a teacher token

Ids are uint16 up to 65,536 classes, uint32 above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..losses import Samples, TopK, draw_samples, top_k
from ..teachers import TeacherOutput, TokenLogProbs
from ..validation import check_choice, fail

FORMATS = ("logits", "hidden", "topk", "sampled")
TOKEN_LOG_PROBS = "token_log_probs"  # of kd_cross_tokenizer "chunks" alone: positions are the teacher's
SPARSE = ("topk", "sampled")
DEFAULT_K = {"topk": 64, "sampled": 50}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Format(NamedTuple):
    """How a cache keeps the teacher outputs; the manifest holds all of it.

    Args:
        name: one of `FORMATS`.
        classes: V, or the ids that student and teacher share where the format is sparse.
        k: classes kept of each position (topk), draws (sampled); None otherwise.
        temperature: of the distribution that is kept (sparse formats, and mixtures of teachers); None otherwise.
        dtype: of logits, hidden states and top-k values: a name of `DTYPES`.
    """

    name: str
    classes: int
    k: int | None = None
    temperature: float | None = None
    dtype: str = "float32"

    @property
    def id_dtype(self) -> torch.dtype:
        """The dtype in which class ids are kept: 2 bytes where they fit."""
        return torch.uint16 if self.classes <= 2**16 else torch.uint32

    @property
    def of_teacher_tokens(self) -> bool:
        """Whether the positions are those of the teacher's text, which has other tokens than the student's."""
        return self.name == TOKEN_LOG_PROBS

    def width(self, hidden_size: int, shape: Sequence[int]) -> int:
        """Numbers of a position that is kept whole; `shape`: of its logits."""
        return 1 if self.of_teacher_tokens else hidden_size if self.name == "hidden" else math.prod(shape)

    def bytes_a_position(self, hidden_size: int = 0) -> int:
        """Bytes on disk of one position, without the 20 or so of each row."""
        width = self.width(hidden_size, [self.classes])
        return sum(column.nbytes for column in room_for(self, 1, torch.empty(0, width)).values())


def format_of(manifest: Mapping[str, Any]) -> Format:
    """The format in a manifest."""
    return Format(*(manifest[name] for name in ("format", "classes", "k", "temperature", "dtype")))


def check_format(name: str, k: int | None, dtype: str | None, *, softmax: bool, over_tokens: bool, task: str) -> None:
    """Raises ValueError where a format does not go with the task, with k or with the dtype."""
    check_choice("teacher_cache_format", name, FORMATS)
    if dtype is not None:
        check_choice("teacher_cache_dtype", dtype, DTYPES)
    if name in SPARSE and not softmax:
        expected = f"'logits' for the task {task!r}, whose outputs are no softmax over classes"
        fail("teacher_cache_format", repr(name), expected, "Set it to logits.")
    if name == "hidden" and not over_tokens:
        fail("teacher_cache_format", repr(name), "'logits', 'topk' or 'sampled' where the task is no language model's",
             "Set it to logits: it is exact too.")  # fmt: skip
    if k is not None and name not in SPARSE:
        fail(
            "teacher_cache_k", repr(k), f"no value with teacher_cache_format {name!r}, which keeps all", "Leave it out."
        )
    if dtype is not None and name == "sampled":
        fail("teacher_cache_dtype", repr(dtype), "no value with teacher_cache_format 'sampled'", "Leave it out.")
    if dtype == "bfloat16" and name == "topk":
        expected = "'float16' or 'float32' with teacher_cache_format 'topk'"
        fail("teacher_cache_dtype", repr(dtype), expected, "Leave it out.")


def room_for(kept: Format, count: int, outputs: Tensor) -> dict[str, Tensor]:
    """Empty columns [count, width] for `encode`; `outputs`: logits (or hidden states) [N, ...] of the same width."""
    if kept.name not in SPARSE:
        return {kept.name: torch.empty(count, outputs[:0].flatten(1).shape[1], dtype=DTYPES[kept.dtype])}
    assert kept.k is not None
    dtype = DTYPES[kept.dtype]
    columns = {"ids": (kept.k, kept.id_dtype), "log_probs": (kept.k, dtype), "log_tail": (1, dtype)}
    if kept.name == "sampled":
        columns = {"ids": (kept.k, kept.id_dtype), "top": (1, kept.id_dtype), "entropy": (1, torch.float32)}
    return {name: torch.empty(count, width, dtype=dtype) for name, (width, dtype) in columns.items()}


def encode(kept: Format, outputs: Tensor, uniform: Tensor, out: Mapping[str, Tensor]) -> None:
    """Writes logits (or what the format keeps whole) [N, ...] into columns of `room_for`; `uniform` [N] in [0, 1) draws
    samples."""
    if kept.name not in SPARSE:
        out[kept.name].copy_(outputs.flatten(1))
        return
    assert kept.k is not None
    assert kept.temperature is not None
    found: TopK | Samples
    if kept.name == "sampled":
        found = draw_samples(outputs, kept.k, temperature=kept.temperature, uniform=uniform)
    else:
        found = top_k(outputs, kept.k, temperature=kept.temperature)
    put(found, out)


def put(found: TopK | Samples, out: Mapping[str, Tensor]) -> None:
    """A sparse distribution into columns of `room_for`."""
    for name, column in found._asdict().items():
        out[name].copy_(column.view(out[name].shape))


def check_columns(kept: Format, columns: Mapping[str, np.ndarray], width: int) -> str | None:
    """The first difference between columns that were read and those that `encode` makes; None where they agree.

    Args:
        width: numbers of a position in the formats logits and hidden.
    """
    room = room_for(kept, 0, torch.empty(0, width))
    if set(columns) != set(room):
        return f"it has the columns {', '.join(columns)} where {', '.join(room)} belong to the format {kept.name!r}"
    for name, tensor in room.items():
        expected, found = to_numpy(tensor), columns[name]
        if (found.dtype, found.shape[1:]) != (expected.dtype, expected.shape[1:]):
            shapes = f"{found.dtype} x {found.shape[1]} where {expected.dtype} x {expected.shape[1]}"
            return f"its column {name} has {shapes} belongs to the format {kept.name!r}"
    return None


def outputs_differ(kept: Format, one: dict[str, np.ndarray], other: dict[str, np.ndarray], *, exact: bool,
              same_draws: bool) -> bool:  # fmt: skip
    """Whether two encodings of the same rows differ by more than rounding.

    Args:
        exact: whether both were computed in float32 without autocast on the same kind of device; else a relative
            difference of 3% is accepted, as in half precision.
        same_draws: whether samples were drawn with the same random numbers.
    """
    room = 2e-3 if exact and kept.dtype in ("float32", "float16") else 3e-2
    columns = [decode(kept, columns) for columns in (one, other)]
    if any(a.shape != b.shape for a, b in zip(columns[0].values(), columns[1].values(), strict=True)):
        return True
    if not all(values.numel() for values in columns[0].values()):
        return False

    def apart(name: str, dtype: torch.dtype) -> bool:
        a, b = (each[name].view(dtype).double() for each in columns)
        a, b = a.clamp(-1e30, 1e30), b.clamp(-1e30, 1e30)
        return bool(((a - b).abs() > room * b.abs().amax().clamp(min=1e-6)).any())

    def unequal(name: str) -> float:
        a, b = (each[name].sort(-1).values for each in columns)
        return float((a != b).double().mean())

    if kept.name not in SPARSE:
        return apart(kept.name, DTYPES[kept.dtype])
    if kept.name == "sampled":
        drawn = same_draws and exact and unequal("ids") > 0.02
        return apart("entropy", torch.float32) or unequal("top") > 0.1 or drawn
    return apart("log_probs", torch.float32) or unequal("ids") > (0.02 if exact else 0.2)


def decode(kept: Format, columns: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Tensors [N, width] for a batch, all of integers, which a backend that casts floating columns leaves alone."""
    if kept.name not in SPARSE:
        return {kept.name: torch.from_numpy(columns[kept.name].copy()).view(_INTEGERS[DTYPES[kept.dtype]])}
    ids = torch.from_numpy(columns["ids"].astype(np.int32))
    if kept.name == "sampled":
        top = torch.from_numpy(columns["top"].astype(np.int32))
        return {"ids": ids, "top": top, "entropy": _bits(torch.from_numpy(columns["entropy"].copy()))}
    values, tail = (torch.from_numpy(columns[name].astype(np.float32)) for name in ("log_probs", "log_tail"))
    buckets = torch.cat([values, tail], -1)
    # Rounded probabilities are normalised again: else the divergence of equal distributions is not 0.
    buckets = buckets - buckets.logsumexp(-1, keepdim=True)
    return {
        "ids": ids,
        "log_probs": _bits(buckets[:, :-1].contiguous()),
        "log_tail": _bits(buckets[:, -1:].contiguous()),
    }


def output(kept: Format, columns: dict[str, Tensor], head: dict[str, Any]) -> TeacherOutput:
    """The columns of `decode`, aligned with a batch [..., width], as the input of the loss."""
    if kept.name not in SPARSE:
        values = columns[kept.name].view(DTYPES[kept.dtype])
        if kept.name == "logits":
            return TeacherOutput(logits=values)
        if kept.of_teacher_tokens:
            return TeacherOutput(sparse=TokenLogProbs(values.squeeze(-1)))
        return TeacherOutput(hidden=values.to(head["teacher_weight"].dtype), head=head)  # the cache may keep fewer bits
    if kept.name == "sampled":
        entropy = columns["entropy"].view(torch.float32).squeeze(-1)
        return TeacherOutput(sparse=Samples(columns["ids"], columns["top"].squeeze(-1), entropy))
    log_probs, log_tail = (columns[name].view(torch.float32) for name in ("log_probs", "log_tail"))
    return TeacherOutput(sparse=TopK(columns["ids"], log_probs, log_tail.squeeze(-1)))


def _bits(values: Tensor) -> Tensor:
    """A floating tensor as integers of the same bits."""
    return values.contiguous().view(_INTEGERS[values.dtype])


def to_numpy(column: Tensor) -> np.ndarray:
    """The column's numbers; bfloat16, which numpy and Arrow lack, as int16 of the same bits."""
    column = column.view(torch.int16) if column.dtype == torch.bfloat16 else column
    return column.cpu().contiguous().numpy()


def card(settings: dict[str, Any]) -> str:
    """README.md of a cache: its columns, and how to read it without this package."""
    kept = format_of(settings)
    temperature = "" if kept.temperature is None else f" at temperature {kept.temperature:g}"
    dtype = f"{kept.dtype} (as int16 of the same bits)" if kept.dtype == "bfloat16" else kept.dtype
    columns = {
        "logits": [f"`logits`: the teacher's {kept.classes:,} logits{temperature}, {dtype}"],
        "hidden": [f"`hidden`: its final hidden state, {dtype}; `head.safetensors` makes logits of it"],
        "topk": [
            f"`ids`: the {kept.k} likeliest of {kept.classes:,} classes",
            f"`log_probs`: their log-probabilities{temperature}, {dtype}",
            "`log_tail`: the log of the probability of all others together",
        ],
        "sampled": [
            f"`ids`: {kept.k} draws from its distribution over {kept.classes:,} classes{temperature}",
            "`top`: the likeliest class",
            "`entropy`: of that distribution, in nats",
        ],
        TOKEN_LOG_PROBS: ["`token_log_probs`: the log-probability of each token of its text but the first, float32"],
    }[kept.name]
    listed = "\n".join(f"- {line}" for line in columns)
    return f"""---
configs:
- config_name: default
  data_files: data/*.arrow
---

# Teacher outputs

Outputs of `{settings["teacher"]["name"]}` for the task `{settings["task"]}`, kept for distillation: row by row and,
where a row has several positions, position by position ({settings["positions"]}).

- `row_id`: the row of the data that the teacher read; `signature`: a hash of that row
{listed}

`manifest.json` holds the teacher, tokenizer, data and settings of the building, and a hash of every shard.

```python
from datasets import load_dataset
from kd_trainer import CachedTeacher, DistillationTrainer

rows = load_dataset("path/to/this/folder")  # any reader of Arrow will do
trainer = DistillationTrainer(model=student, teacher_model=CachedTeacher("path/to/this/folder"), ...)
```
"""
