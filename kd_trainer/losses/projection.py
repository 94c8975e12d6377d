"""One model's output projection: from hidden states to logits, with bias, scale and softcap.

Letters: N positions, H hidden size, V classes."""

from __future__ import annotations

from dataclasses import dataclass
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


def cast_as_autocast(tensor: Any) -> Any:
    """The tensor (or None) as torch's autocast would hand it to a matrix product."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
