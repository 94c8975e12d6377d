"""The teacher's forward for a cache: a batch in, the rows of a format out.

Letters: B rows, S positions, N kept positions, V classes, H hidden size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..losses import OutputProjection, cast_as_autocast, chunk_rows, label_log_probs, logits_log_probs
from ..tasks import OutputHead, Task, UnsupportedHead, teacher_hidden, teacher_side, whole_weight
from ..teachers import of_next
from ..validation import fail
from .formats import SPARSE, Format, encode, room_for
from .signed_collator import SignedBatch
from .store import Rows

logger = logging.getLogger(__name__)

_MOST_ROWS = 1024  # positions of a chunk on CPU: a larger one does not fit the processor's cache


class Dimensions(NamedTuple):
    """Shapes and dtypes of a teacher's outputs at one position."""

    shape: list[int]  # of its logits: the classes last
    logits_dtype: str
    hidden_size: int = 0  # 0 where the logits are more than a linear layer of a hidden state
    hidden_dtype: str = ""


class TeacherReader:
    """Runs the live teacher on a batch and returns its outputs at the kept positions.

    Args:
        teacher: a prepared `LiveTeacher`; or `SeveralTeachers`, whose mixture is read.
        output_head: the teacher's, where it was found before.
        temperature: of the mixture.
    """

    def __init__(
        self,
        teacher: Any,
        accelerator: Any,
        task: Task,
        output_head: OutputHead | None = None,
        *,
        temperature: float = 1.0,
    ) -> None:
        self.teacher, self.accelerator, self.task, self.output_head = teacher, accelerator, task, output_head
        self._temperature = temperature
        self._kept_projection: tuple[torch.dtype, OutputProjection] | None = None
        if output_head is None and teacher.model is not None and task.over_tokens and not teacher.compiled:
            try:
                self.output_head = OutputHead(teacher.model)
            except UnsupportedHead as reason:
                logger.info("The teacher's logits are computed in full: %s.", reason)

    def hidden(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor | None:
        """Final hidden states [N, H] of the kept positions; None where the output head is more than a linear layer."""
        states = self._states(inputs)
        return None if states is None else states.index_select(0, _places_of(mask))  # faster than states[mask]

    def _states(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Final hidden states [B * S, H] of all positions."""
        if self.output_head is None:
            return None
        try:
            states = teacher_hidden(lambda: self.teacher.outputs(inputs, self.accelerator), self.output_head)
            return self.teacher.behind_front(states, inputs).flatten(0, 1)
        except UnsupportedHead as reason:
            logger.info("The teacher's logits are computed in full: %s.", reason)
            self.output_head = None
            return None

    def dimensions(self, inputs: Mapping[str, Any], mask: Tensor) -> Dimensions:
        """The dimensions for a batch; sets `output_head` to None where it cannot be used."""
        head = self.output_head
        known = head is not None and head.hidden_dtype is not None
        if head is not None and (known or self.hidden(inputs, mask) is not None):
            linear, dtype = head.module, str(head.hidden_dtype).removeprefix("torch.")
            return Dimensions([linear.out_features], "float32", linear.in_features, dtype)
        logits = next(self.logits(inputs, mask))
        return Dimensions(list(logits.shape[1:]), str(logits.dtype).removeprefix("torch."))

    def logits(self, inputs: Mapping[str, Any], mask: Tensor) -> Iterator[Tensor]:
        """Logits [n, ...] of the kept positions in chunks; a chunk is overwritten by the next one."""
        states = self._states(inputs)
        if states is None:
            yield self.task.take_positions(self._all_logits(inputs), mask)
            return
        assert self.output_head is not None
        with whole_weight(self.output_head) as whole:
            projection = self._projection(whole, states.dtype)
            weight, plain = projection.weight, projection.scale == 1 and projection.softcap is None
            at_once = chunk_rows(len(weight), weight.element_size(), on_cpu=weight.is_cpu)
            at_once = min(at_once, _MOST_ROWS) if weight.is_cpu else at_once
            places = _places_of(mask)
            parts = places.chunk(max(1, -(-len(places) // at_once)))
            tile = weight.new_empty(len(parts[0]), len(weight))  # the teacher's own memory, just freed
            for part in parts:
                product = projection.product(states.index_select(0, part).to(weight.dtype), 1.0, tile[: len(part)])
                yield product if plain else projection.capped(product.float())

    def token_log_probs(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        """[N]: of the token that each kept position predicts, as `kd_cross_tokenizer` "chunks" has it live."""
        labels, states = of_next(self.teacher.inputs(inputs)["input_ids"], 0)[mask], self._states(inputs)
        if states is None:
            logits = self._all_logits(inputs)
            return logits_log_probs(logits[mask.to(logits.device)], labels.to(logits.device))
        assert self.output_head is not None
        with whole_weight(self.output_head) as whole:
            projection = self._projection(whole, states.dtype)
            hidden = states.index_select(0, _places_of(mask)).to(projection.weight.dtype)
            return label_log_probs(hidden, projection, labels)

    def _all_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """The logits of all positions."""
        options = {"read": self.task.logits, "task": self.task, "temperature": self._temperature}
        return self.teacher.output(inputs, self.accelerator, **options).logits

    def columns(self, kept: Format, inputs: Mapping[str, Any], mask: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        """The columns of the format for a batch; `uniform` [N] in [0, 1) draws samples."""
        if kept.name == "hidden":
            hidden = self.hidden(inputs, mask)
            if hidden is None:
                fail_without_linear_head(self)
            outputs = iter([hidden])
        elif kept.of_teacher_tokens:
            outputs = iter([self.token_log_probs(inputs, mask).unsqueeze(1)])
        else:
            outputs = self.logits(inputs, mask)
        columns: dict[str, Tensor] = {}
        total, done = int(mask.sum()), 0
        for values in outputs:
            if kept.name in SPARSE:
                values = values[..., : kept.classes]
            columns = columns or room_for(kept, total, values)
            own = slice(done, done + len(values))
            encode(kept, values, uniform[own], {name: column[own] for name, column in columns.items()})
            done = own.stop
        return columns

    def in_order(
        self, batches: Iterable[tuple[int, SignedBatch]], rows_of: Callable[[SignedBatch], Rows]
    ) -> Iterator[tuple[int, Callable[[], Rows]]]:
        """(shard, what returns the rows) of each batch, one after the other."""
        return ((index, partial(rows_of, signed)) for index, signed in batches)

    def _projection(self, whole: tuple[Tensor, Tensor | None], dtype: torch.dtype) -> OutputProjection:
        """The output head for hidden states of this dtype; kept where the weight is not sharded."""
        assert self.output_head is not None
        if self._kept_projection is not None and self._kept_projection[0] == dtype:
            return self._kept_projection[1]
        with self.accelerator.autocast():
            weight, bias = (cast_as_autocast(x) for x in self._multiplied(whole, dtype))
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        projection = OutputProjection(weight, bias, self.output_head.scale, self.output_head.softcap)
        if whole[0] is self.output_head.module.weight and not hasattr(whole[0], "ds_id"):
            self._kept_projection = dtype, projection
        return projection

    def head_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weight and bias of the teacher's output head in the dtype of the product; every process must call."""
        assert self.output_head is not None
        with whole_weight(self.output_head) as whole, self.accelerator.autocast():
            named = zip(("weight", "bias"), self._multiplied(whole, dtype), strict=True)
            return {name: x.detach().cpu().contiguous().clone() for name, x in named if x is not None}

    def _multiplied(self, whole: tuple[Tensor, Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as `teacher_side` casts them for hidden states of this dtype."""
        assert self.output_head is not None
        cast = teacher_side(self.output_head, *whole, torch.empty(0, dtype=dtype, device=whole[0].device))
        return cast["teacher_weight"], cast["teacher_bias"]


def _places_of(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)


def fail_without_linear_head(reader: Any) -> NoReturn:
    """ValueError: format `hidden` with a teacher whose logits are not one linear layer of its hidden states."""
    because = "the logits of " + type(reader.teacher.model).__name__ + " are more than its output head's product"
    fix = "Set it to topk or logits."
    fail("teacher_cache_format", "'hidden'", "another format with this teacher", fix, because=because)
