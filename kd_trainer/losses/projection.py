"""One model's output projection: from hidden states to logits, with bias, scale and softcap.

Letters: N positions, H hidden size, V classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True)
class MixedLogits:
    """T * log p of a mixture of teachers, p = sum of w * softmax(z / T): computed for the rows that are sliced.

    Args:
        parts: of each teacher its final hidden states [..., H], its projection and its weight w.
        temperature: T of the loss.
    """

    parts: tuple[tuple[Tensor, OutputProjection, float], ...]
    temperature: float

    def __getitem__(self, rows: slice) -> Tensor:
        """Of some rows of hidden states [N, H]: in memory are these [R, V] and those of one teacher."""
        mixed: Any = None
        for hidden, side, weight in self.parts:
            part = torch.log_softmax(side.logits(hidden[rows]).div_(self.temperature), -1).add_(math.log(weight))
            mixed = part if mixed is None else torch.logaddexp(mixed, part, out=mixed)
        return mixed.mul_(self.temperature)

    def each(self, change: Callable[[Tensor], Tensor]) -> MixedLogits:
        """The same with every tensor of hidden states changed."""
        return replace(self, parts=tuple((change(hidden), side, weight) for hidden, side, weight in self.parts))

    def cast(self) -> MixedLogits:
        """The same, detached and as autocast would hand it to a matrix product."""
        parts = []
        for hidden, side, weight in self.parts:
            side = side.as_autocast()
            bias = None if side.bias is None else side.bias.detach()
            projection = replace(side, weight=side.weight.detach(), bias=bias)
            parts.append((cast_as_autocast(hidden).detach(), projection, weight))
        return replace(self, parts=tuple(parts))

    @property
    def shape(self) -> tuple[int, ...]:
        hidden, side, _ = self.parts[0]
        return (*hidden.shape[:-1], side.weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.parts[0][0].dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.parts[0][0].device

    @property
    def biases(self) -> list[Tensor | None]:
        return [side.bias for _, side, _ in self.parts]


def cast_as_autocast(tensor: Any) -> Any:
    """The tensor (or None) as torch's autocast would hand it to a matrix product."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
