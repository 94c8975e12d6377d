"""The objective of `kd_cross_tokenizer` "chunks": likelihoods of text chunks in place of the soft loss.

    loss = scale * ((1 - alpha) * S_hard / D_hard + alpha * S_chunks / D_chunks + ...)

S_chunks is the sum of `chunk_kl` over the counted chunks and D_chunks their number, whatever `kd_reduction` is. A chunk
counts if every one of its tokens is predicted on both sides, at a real token and, on the student's side, where
`kd_positions` counts. Columns: see `align_teacher_tokens`.
Shapes: B rows, S tokens of the student, T tokens of the teacher, V classes, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..losses import (
    IGNORE_INDEX,
    FusedLoss,
    OutputProjection,
    SoftTargetLoss,
    chunk_kl,
    chunk_sums,
    divide,
    label_log_probs,
    logits_log_probs,
    loss_of_log_probs,
)
from ..tasks import CHUNK_IDS, TEACHER_PREFIX, Task
from ..teachers import NO_CHUNK, TeacherOutput, TokenLogProbs, of_next, predicts_teacher_token
from ..validation import fail
from .arguments import CHUNKS
from .objective import Counts, LossInputs, Objective, Parts

_TEACHER_IDS, _TEACHER_CHUNKS = TEACHER_PREFIX + "input_ids", TEACHER_PREFIX + CHUNK_IDS


class _Scored(NamedTuple):
    """The N positions of the student whose log-probability either loss needs, and the C chunks of all rows."""

    places: Tensor  # [N] in [B * S]
    labels: Tensor  # [N]
    labelled: Tensor  # [N] bool: counted by the hard loss
    chunks: Tensor  # [N] number of the chunk; -1: none
    counted: Tensor  # [C] bool
    likelihoods: Tensor  # [C] of the teacher


@dataclass(frozen=True)
class ChunkObjective(Objective):
    """An `Objective` whose soft loss is that of text chunks, named "chunks"."""

    chunk_temperature: float = 1.0

    by_position: ClassVar[bool] = False
    soft_name: ClassVar[str] = CHUNKS

    def soft_settings(self, task: Task | None) -> str:
        return f"tau={self.chunk_temperature:g}"

    def count(self, task: Task, inputs: Mapping[str, Any]) -> Counts:
        """As `Objective.count`; the soft loss counts what the chunks are made of."""
        counts = super().count(task, inputs)
        return counts._replace(soft=_counted(task, inputs, self.positions).sum() if CHUNK_IDS in inputs else 0)

    def _denominators(self, counts: Counts) -> tuple[Tensor | int, Tensor | int]:
        return super()._denominators(counts)[0], counts.soft

    def __call__(self, given: LossInputs, soft_loss: SoftTargetLoss, student_logits: Tensor, teacher: Any) -> Parts:
        """The loss of one micro-batch from logits: the student's [B, S, V], the teacher's [B, T, V]."""
        if teacher is None:
            return super().__call__(given, soft_loss, student_logits, None)
        task, inputs, counts, *_ = given
        targets = task.targets(inputs)
        task.check_shapes(student_logits, None, targets)
        output = TeacherOutput(logits=teacher) if isinstance(teacher, Tensor) else TeacherOutput(sparse=teacher)
        scored = self._scored(task, output, inputs)
        log_probs = logits_log_probs(student_logits.flatten(0, 1)[scored.places], scored.labels)
        chunks_sum, hard_sum = self._sums(scored, log_probs, slice(None))
        hard_count, soft_count = self._denominators(counts)
        hard: Any = None if targets is None else divide(hard_sum, hard_count) * counts.scale
        hard, chunks = given.own_hard if given.takes_own else hard, divide(chunks_sum, soft_count) * counts.scale
        return Parts(self._mix(hard, chunks, student_logits), hard, chunks, None)

    def fused(
        self, given: LossInputs, student_hidden: Tensor, teacher: TeacherOutput, weights: Mapping[str, Any]
    ) -> FusedLoss:
        """The same from final hidden states [B, S, H] and [B, T, H], without logits."""
        task, inputs, counts, *_ = given
        scored, (hard_count, soft_count) = self._scored(task, teacher, inputs), self._denominators(counts)
        has_labels = task.targets(inputs) is not None

        def loss(log_probs: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            chunks, hard = self._sums(scored, log_probs, rows)
            hard_mean = divide(hard, hard_count) * counts.scale if has_labels else None
            return self._mix(hard_mean, divide(chunks, soft_count) * counts.scale, log_probs), chunks, hard

        hidden, projection = (
            student_hidden.flatten(0, 1)[scored.places],
            OutputProjection.from_arguments(weights, "student"),
        )
        total, chunks, hard = loss_of_log_probs(hidden, projection, scored.labels, loss, groups=scored.chunks)
        return FusedLoss(total, chunks, hard, torch.zeros_like(hard))

    def parts(self, loss: FusedLoss, counts: Counts, *, labelled: bool) -> Parts:
        """As `Objective.parts`, without an agreement: the vocabularies differ."""
        return super().parts(loss, counts, labelled=labelled)._replace(agreement=None)

    def _scored(self, task: Task, teacher: TeacherOutput, inputs: Mapping[str, Any]) -> _Scored:
        targets, chunks = task.targets(inputs), of_next(inputs[CHUNK_IDS], NO_CHUNK)
        mask, labels = task.soft_mask(inputs, targets, self.positions), of_next(inputs["input_ids"], 0)
        scored = chunks >= 0 if mask is None else mask & (chunks >= 0)
        labelled = torch.zeros_like(scored) if targets is None else targets != IGNORE_INDEX
        if targets is not None:
            labels, scored = torch.where(labelled, targets, labels), scored | labelled
        places = scored.flatten().nonzero().squeeze(1)
        first = torch.arange(len(chunks), device=chunks.device).unsqueeze(1) * chunks.shape[1]
        chunks = torch.where(chunks >= 0, chunks + first, NO_CHUNK)  # numbered over all rows
        counted, likelihoods = _counted(task, inputs, self.positions), self._teacher_likelihoods(teacher, inputs)
        labels, labelled, chunks = (x.flatten()[places] for x in (labels, labelled, chunks))
        likelihoods = likelihoods.to(places.device).flatten()
        return _Scored(places, labels, labelled, chunks, counted.flatten(), likelihoods)

    def _sums(self, scored: _Scored, log_probs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The sums of the chunk and the hard loss over these rows of the scored positions; they part no chunk."""
        slots = len(scored.counted)
        chunks = torch.where(scored.chunks[rows] >= 0, scored.chunks[rows], slots)
        likelihoods = log_probs.new_zeros(slots + 1).index_add(0, chunks, log_probs)[:slots]
        here = torch.zeros(slots + 1, dtype=torch.bool, device=chunks.device).index_fill(0, chunks, True)[:slots]
        left_out = ~(here & scored.counted)
        student, teacher = (x.masked_fill(left_out, -1.0) for x in (likelihoods, scored.likelihoods))
        chunks_sum = chunk_kl(student, teacher, temperature=self.chunk_temperature).sum()
        return chunks_sum, -log_probs.masked_fill(~scored.labelled[rows], 0.0).sum()

    @staticmethod
    def _teacher_likelihoods(teacher: TeacherOutput, inputs: Mapping[str, Any]) -> Tensor:
        """[B, S]: log-likelihoods of the chunks by their numbers; one float for each token of the teacher before."""
        slots = inputs[CHUNK_IDS].shape[1]
        if isinstance(teacher.sparse, TokenLogProbs):  # of a cache
            values = teacher.sparse.values
            return chunk_sums(values, of_next(inputs[_TEACHER_CHUNKS].to(values.device), NO_CHUNK), slots)
        given = teacher.logits if teacher.hidden is None else teacher.hidden
        assert given is not None
        ids, chunks = (inputs[name].to(given.device) for name in (_TEACHER_IDS, _TEACHER_CHUNKS))
        chunks = of_next(chunks, NO_CHUNK)
        index = (chunks >= 0).flatten().nonzero().squeeze(1)
        rows, labels = given.flatten(0, 1)[index], of_next(ids, 0).flatten()[index]
        with torch.no_grad():
            if teacher.hidden is None:
                log_probs = logits_log_probs(rows, labels)
            else:
                log_probs = label_log_probs(rows, OutputProjection.from_arguments(teacher.head, "teacher"), labels)
            placed = log_probs.new_zeros(chunks.numel()).index_put((index,), log_probs).view(chunks.shape)
            return chunk_sums(placed, chunks, slots)


def _counted(task: Task, inputs: Mapping[str, Any], positions: str) -> Tensor:
    """[B, S] bool: which chunks count, by their numbers."""
    _check_columns(inputs)
    ids, teacher_ids, slots = inputs[CHUNK_IDS], inputs[_TEACHER_CHUNKS], inputs[CHUNK_IDS].shape[1]
    mask = task.soft_mask(inputs, task.targets(inputs), positions)
    return _complete(ids, mask, slots) & _complete(teacher_ids, predicts_teacher_token(inputs), slots)


def _complete(ids: Tensor, mask: Tensor | None, slots: int) -> Tensor:
    """[B, slots] bool: whether each token of the chunk is predicted, at a position of the mask (None: all)."""
    predicted = torch.ones_like(ids) if mask is None else mask
    tokens = chunk_sums(torch.ones_like(ids, dtype=torch.float32), ids, slots)
    return (tokens > 0) & (chunk_sums(predicted.float(), of_next(ids, NO_CHUNK), slots) == tokens)


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_chunks(task: Task | None, batch: Mapping[str, Any], label_smoothing: float) -> None:
    """Raises ValueError where models, columns or settings do not allow the chunk term."""
    if task is None or not task.left_to_right:
        name = "unknown" if task is None else repr(task.name)
        because = "the likelihood of a text is that of a causal language model"
        fix = "Take a teacher with the student's tokenizer, and leave kd_cross_tokenizer out."
        fail("kd_cross_tokenizer", repr(CHUNKS), f"'error' for the task {name}", fix, because=because)
    if label_smoothing > 0:
        expected = "0 with kd_cross_tokenizer 'chunks'"
        fail("label_smoothing_factor", label_smoothing, expected, "Leave it out.")
    _check_columns(batch)


def _check_columns(batch: Mapping[str, Any]) -> None:
    for name in ("input_ids", CHUNK_IDS, _TEACHER_IDS, _TEACHER_CHUNKS):
        if name not in batch:
            fix = "Make the dataset with align_teacher_tokens, and wrap the data collator in TeacherCollator."
            expected = f"the column {name!r} too with kd_cross_tokenizer 'chunks'"
            fail("inputs", f"a batch that has {', '.join(batch)}", expected, fix)
    for prefix in ("", TEACHER_PREFIX):
        ids, chunks = batch[prefix + "input_ids"], batch[prefix + CHUNK_IDS]
        if ids.shape != chunks.shape:
            fix = "Wrap the data collator in TeacherCollator, which pads both alike."
            shown = f"of shape {tuple(chunks.shape)}"
            fail(prefix + CHUNK_IDS, shown, f"{tuple(ids.shape)}, as {prefix}input_ids", fix)
