"""The teacher's output for a batch, in one of the forms in which a cache keeps it.

For: `cache/formats.py`, which writes and reads them, and `training/objective.py`, which makes losses of them.
Letters: N positions, or [B, S] or [B] of a batch; V classes, H hidden size, k classes kept, n draws; T tokens of the
teacher's text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses import KnownMixture, MixedLogits, OutputProjection, Samples, TopK
from ..tasks import TEACHER_PREFIX

Sparse = TopK | Samples
COLUMN_PREFIX = TEACHER_PREFIX + "cache_"  # of the columns that join cached outputs to a batch


class TokenLogProbs(NamedTuple):
    """Of the teacher's text, which has other tokens: the log-probability of each next token."""

    values: Tensor  # [B, T]


@dataclass(frozen=True)
class TeacherOutput:
    """One of these, aligned with the student's logits; uncounted positions hold zeros.

    Args:
        logits: [..., V].
        hidden: [..., H], final hidden states; `head` then has what makes logits of them, by the argument names of
            `fused_linear_distillation` (teacher_weight, teacher_bias, teacher_scale, teacher_softcap).
        sparse: `TopK` or `Samples` of [..., k] or [..., n]; or `TokenLogProbs`, aligned with the teacher's text.
        mixed: of several teachers, whose heads make logits of hidden states [..., H] piece by piece.
        tops: of several teachers whose mixture is `logits`, in an evaluation: [..., K], the top class of each at every
            distribution of the task; -1 in rows that are not its own.
        counts: of several teachers in an evaluation [K, 2], in which the loss adds up at how many positions each has
            the student's top class, and at how many it has one.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    sparse: Sparse | TokenLogProbs | None = None
    head: Mapping[str, Any] = field(default_factory=dict)
    mixed: MixedLogits | None = None
    tops: Tensor | None = None
    counts: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> TeacherOutput:
        """The same with every tensor of positions changed."""
        sparse = None if self.sparse is None else type(self.sparse)(*map(change, self.sparse))
        logits, hidden, tops = (None if x is None else change(x) for x in (self.logits, self.hidden, self.tops))
        mixed = None if self.mixed is None else self.mixed.each(change)
        return TeacherOutput(logits, hidden, sparse, self.head, mixed, tops, self.counts)

    def to(self, device: torch.device) -> TeacherOutput:
        """The same on a device; itself where it is there."""
        one = next(x for x in (self.logits, self.hidden, self.mixed, *(self.sparse or ())) if x is not None)
        return self if one.device == device else self.each(lambda tensor: tensor.to(device))

    def reordered(self, order: Tensor) -> TeacherOutput:
        """The same with class order[i] in place i; not of hidden states."""
        order = order.to((self.sparse[0] if self.sparse is not None else self.logits).device)  # type: ignore[union-attr]
        place = order.argsort()  # of each class, where it goes
        sparse = self.sparse
        if isinstance(sparse, TopK):
            sparse = sparse._replace(ids=place[sparse.ids.long()])
        elif isinstance(sparse, Samples):
            sparse = sparse._replace(ids=place[sparse.ids.long()], top=place[sparse.top.long()])
        return TeacherOutput(None if self.logits is None else self.logits[..., order], self.hidden, sparse, self.head)

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape of the batch's positions, or of its rows."""
        known = (None if self.sparse is None else self.sparse[0], self.logits, self.hidden, self.mixed)
        one = next((each for each in known if each is not None), None)
        return () if one is None else tuple(one.shape[:-1])

    def as_logits(self, accelerator: Any) -> Tensor | None:
        """The logits, where need be computed of the hidden states; None where it is sparse."""
        if self.hidden is None:
            return self.logits
        side = OutputProjection.from_arguments(self.head, "teacher")
        with torch.no_grad(), accelerator.autocast():
            return side.logits(self.hidden)

    def as_arguments(self) -> dict[str, Any]:
        """The teacher by the argument names of `fused_linear_distillation`."""
        if isinstance(self.sparse, TopK):
            return {"teacher_top_k": tuple(self.sparse)}
        if isinstance(self.sparse, Samples):
            return {"teacher_samples": tuple(self.sparse)}
        logits: Any = self.logits if self.mixed is None else self.mixed
        if self.logits is not None and self.tops is not None and self.counts is not None:
            logits = KnownMixture(self.logits, self.tops, self.counts)
        return {"teacher_hidden": self.hidden, "teacher_logits": logits, **self.head}
