"""Checks of logits and labels that every loss shares: their messages name the argument and the way out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_tensor, fail


def check_logits(**named: Tensor) -> None:
    """Raises unless all are floating tensors of one shape [..., V] with V >= 1; shapes are never broadcast."""
    for argument, logits in named.items():
        check_tensor(argument, logits, "a tensor of logits [..., V]")
        if not logits.is_floating_point():
            fix = "Pass the scores before the softmax, not class ids."
            fail(argument, f"of dtype {logits.dtype}", "logits of a floating dtype", fix, error=TypeError)
    (first, logits), *others = named.items()
    for argument, other in others:
        if logits.shape != other.shape:
            shown = f"of shape {list(logits.shape)} and `{argument}` of shape {list(other.shape)}"
            fix = "Give both sides the same positions and the same classes, in the same order."
            because = "a divergence compares them class by class"
            fail(first, shown, "equal shapes [..., V]", fix, because=because)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        shown = f"of shape {list(logits.shape)}"
        fail(first, shown, "at least one class in the last dimension", "Pass logits [..., V].")


def check_class_ids(labels: Tensor | None, shape: torch.Size) -> None:
    """Raises unless these are integers, one a position: for a divergence that needs labels."""
    because = "this divergence reads the label of each position"
    fix = "Pass class ids, -100 where there is no label: there the forward KL is taken."
    expected = f"integers of shape {list(shape)}"
    if labels is None:
        fail("labels", None, expected, fix, because=because, error=TypeError)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        fail("labels", f"of dtype {labels.dtype}", expected, fix, because=because, error=TypeError)
    if labels.shape != shape:
        fail("labels", f"of shape {list(labels.shape)}", expected, fix, because=because)


def check_standardized(classes: int, argument: str = "standardize_logits") -> None:
    """Raises ValueError where standardised logits would hold nothing but which class is on top."""
    if classes < 3:
        because = "standardised logits of two classes are +1 and -1 whatever the models compute"
        fail(argument, True, "False with fewer than three classes", "Leave it out.", because=because)
