"""One model's output projection: from hidden states to logits, with bias, scale and softcap.

Letters: N positions, H hidden size, V classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def cap_and_scale(product: Tensor, scale: float, softcap: float | None) -> Tensor:
    """softcap * tanh(scale * product / softcap); without softcap scale * product."""
    product = product if scale == 1 else scale * product
    return product if softcap is None else softcap * torch.tanh(product / softcap)


@dataclass(frozen=True)
class OutputProjection:
    """A model's way from hidden states to logits: softcap * tanh(scale * (h @ weight.T + bias) / softcap)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def from_arguments(cls, given: Mapping[str, Any], side: str) -> OutputProjection:
        """Of a side, "student" or "teacher", by the argument names of `fused_linear_distillation`."""
        weight, bias, softcap = given[f"{side}_weight"], given.get(f"{side}_bias"), given.get(f"{side}_softcap")
        return cls(weight, bias, given.get(f"{side}_scale", 1.0), softcap)

    def as_autocast(self) -> OutputProjection:
        """With weight and bias as autocast would hand them to a matrix product."""
        return replace(self, weight=cast_as_autocast(self.weight), bias=cast_as_autocast(self.bias))

    def logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        return self.capped(logits if logits.dtype == torch.float64 else logits.float())

    def capped(self, logits: Tensor) -> Tensor:
        """From h @ weight.T + bias to logits."""
        return cap_and_scale(logits, self.scale, self.softcap)

    def product(self, hidden: Tensor, factor: float, out: Tensor) -> Tensor:
        """factor * (h @ weight.T + bias), into `out`."""
        if self.bias is not None:
            return torch.addmm(self.bias, hidden, self.weight.t(), beta=factor, alpha=factor, out=out)
        if factor == 1:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(out, hidden, self.weight.t(), beta=0, alpha=factor, out=out)


class MixedPart(NamedTuple):
    """A teacher of a mixture.

    Args:
        hidden: its final hidden states [..., H]; projection: what makes logits of them.
        weight: w, a number, or one for each position [...]: 0 where the teacher has no part.
        number: of the teacher among all.
    """

    hidden: Tensor
    projection: OutputProjection
    weight: float | Tensor
    number: int = 0


@dataclass(frozen=True)
class MixedLogits:
    """T * log p of a mixture of teachers, p = sum of w * softmax(z / T): computed for the rows that are sliced.

    Args:
        parts: the teachers.
        temperature: T of the loss.
        counts: see `count_same`.
    """

    parts: tuple[MixedPart, ...]
    temperature: float
    counts: Tensor | None = None

    def of_rows(self, rows: slice, student: Tensor) -> Tensor:
        """Of some rows of hidden states [N, H]: in memory are these [R, V] and those of one teacher.

        Args:
            student: their logits [R, V], for `counts`.
        """
        mixed: Any = None
        top = None if self.counts is None else student.argmax(-1)
        for hidden, side, weight, number in self.parts:
            places, states, weights = None, hidden[rows], weight
            if isinstance(weights, Tensor):
                weights = weights[rows]
                found = weights.nonzero().squeeze(1)
                if len(found) < len(weights):
                    places, states, weights = found, states[found], weights[found]
            part = side.logits(states)
            if top is not None and self.counts is not None:
                own = top if places is None else top[places]
                count_same(self.counts[number : number + 1], own, part.argmax(-1, keepdim=True))
            part = torch.log_softmax(part.div_(self.temperature), -1)
            part += weights.log().unsqueeze(1) if isinstance(weights, Tensor) else math.log(weights)
            if places is None:
                mixed = part if mixed is None else torch.logaddexp(mixed, part, out=mixed)
            elif mixed is None:
                mixed = part.new_full((len(hidden[rows]), part.shape[1]), -math.inf)
                mixed[places] = part
            else:
                mixed[places] = torch.logaddexp(mixed[places], part, out=part)
        return mixed.mul_(self.temperature)

    def each(self, change: Callable[[Tensor], Tensor]) -> MixedLogits:
        """The same with every tensor of positions changed."""
        parts = (p._replace(weight=change(p.weight)) if isinstance(p.weight, Tensor) else p for p in self.parts)
        return replace(self, parts=tuple(part._replace(hidden=change(part.hidden)) for part in parts))

    def cast(self) -> MixedLogits:
        """The same, detached and as autocast would hand it to a matrix product."""
        parts = []
        for part in self.parts:
            side = part.projection.as_autocast()
            bias = None if side.bias is None else side.bias.detach()
            projection = replace(side, weight=side.weight.detach(), bias=bias)
            parts.append(part._replace(hidden=cast_as_autocast(part.hidden).detach(), projection=projection))
        return replace(self, parts=tuple(parts))

    @property
    def states(self) -> list[Tensor]:
        return [part.hidden for part in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits."""
        return (*self.parts[0].hidden.shape[:-1], self.parts[0].projection.weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return torch.promote_types(self.parts[0].hidden.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.parts[0].hidden.device

    @property
    def may_exclude(self) -> list[Tensor | None]:
        """Tensors whose -inf excludes classes."""
        return [part.projection.bias for part in self.parts]


@dataclass(frozen=True)
class KnownMixture:
    """The logits of a mixture that is held, with the top class of each teacher; as `MixedLogits` in every other way.

    Args:
        logits: [..., V]; tops: [..., K], -1 where a teacher has no part.
        counts: see `count_same`.
    """

    logits: Tensor
    tops: Tensor
    counts: Tensor

    def of_rows(self, rows: slice, student: Tensor) -> Tensor:
        count_same(self.counts, student.argmax(-1), self.tops[rows])
        return self.logits[rows]

    def each(self, change: Callable[[Tensor], Tensor]) -> KnownMixture:
        return replace(self, logits=change(self.logits), tops=change(self.tops))

    def cast(self) -> KnownMixture:
        return replace(self, logits=self.logits.detach())

    @property
    def states(self) -> list[Tensor]:
        return [self.logits]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits."""
        return tuple(self.logits.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return self.logits.dtype

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def may_exclude(self) -> list[Tensor | None]:
        return [self.logits]


AnyMixture = MixedLogits | KnownMixture


def count_same(counts: Tensor, student: Tensor, tops: Tensor) -> None:
    """Adds up in how many positions each of K teachers has the student's top class, and in how many both have one.

    Args:
        counts: [K, 2].
        student: [R]; tops: [R, K] of the teachers; -1: the position does not count.
    """
    known = (student.unsqueeze(1) >= 0) & (tops >= 0)
    same = known & (tops == student.unsqueeze(1))
    counts += torch.stack([same.sum(0), known.sum(0)], -1)


def cast_as_autocast(tensor: Any) -> Any:
    """The tensor (or None) as torch's autocast would hand it to a matrix product."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
