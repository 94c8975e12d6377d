"""`SegmentationTask`: a class for each pixel of an image, from logits of a lower resolution.

For: the table of tasks in `kinds.py`.
Shapes: B images, H x W pixels of image and labels, h x w pixels of the logits, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import IGNORE_INDEX, SoftTargetLoss, select_positions
from ..validation import fail
from .inputs import main_input
from .logits import Wanted, logits_of
from .task import Task, wide


@dataclass(frozen=True)
class SegmentationTask(Task):
    """Semantic segmentation: logits [B, h, w, C] of the models' [B, C, h, w]; labels [B, H, W].

    Hard loss of a pixel of the labels: the cross-entropy of the logits resized to H x W (bilinear), as upstream's
    models have it. Its soft loss: T² D at the pixel of the logits that covers it, so that nothing is resized: each
    pixel of the logits is weighted by the number of counted pixels that it covers (for dkd, its label is the one in
    its middle). Both are sums over the same pixels, whatever the models' strides. Counted are the labelled pixels, or
    with `kd_positions` "attended" all.

    Args:
        ignored: the label of pixels that are not counted; of the student's config, see `of_model`. -100 is too.
    """

    softmax: ClassVar[bool] = False
    position: ClassVar[str] = "pixel"
    along: ClassVar[tuple[int, str, str] | None] = (
        1,
        "pixel row",
        "Take a teacher whose logits have the student's resolution, and images of the same size.",
    )
    ignored: int = field(default=255, kw_only=True)

    @property
    def dims(self) -> int:
        return 4

    @property
    def by_position(self) -> bool:
        return True

    def of_model(self, model: Any) -> Task:
        """With the ignored label of the student's config."""
        config = getattr(model, "config", None)
        names = ("semantic_loss_ignore_index", "loss_ignore_index")  # the second is UperNet's
        found = (getattr(config, name, None) for name in names)
        return replace(self, ignored=next((value for value in found if isinstance(value, int)), self.ignored))

    def logits(self, outputs: Any, argument: str) -> Tensor:
        """[B, h, w, C]."""
        logits = logits_of(outputs, argument, Wanted(self.dims))
        return logits.movedim(1, -1) if logits.dim() == self.dims else logits

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """[B, H, W]."""
        labels = self._class_ids(inputs)
        return None if labels is None else labels.masked_fill(labels == self.ignored, IGNORE_INDEX)

    def soft_mask(self, inputs: Mapping[str, Any], targets: Tensor | None, positions: str) -> Tensor:
        """Boolean [B, H, W]."""
        if positions == "labels" and targets is not None:
            return targets != IGNORE_INDEX
        return torch.ones_like(self.sequences(inputs), dtype=torch.bool)

    def sequences(self, inputs: Mapping[str, Any]) -> Tensor:
        """[B, H, W], of the labels or of the image."""
        targets = self.targets(inputs)
        return main_input(inputs)[:, 0] if targets is None else targets

    def made_at(self, inputs: Mapping[str, Any], targets: Tensor) -> Tensor | None:
        return None

    def soft_loss_sum(
        self, soft_loss: SoftTargetLoss, student: Tensor, teacher: Tensor, targets: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        weights = covered(mask, student)
        chosen = weights > 0  # NaN elsewhere would reach the gradient
        labels = select_positions(self._labels_of(student, targets), chosen) if soft_loss.needs_labels else None
        z_s, z_t = (select_positions(logits, chosen) for logits in (student, teacher))
        return (soft_loss.divergences(z_s, z_t, labels) * weights[chosen]).sum() * soft_loss.scale

    def positions_sum(self, values: Tensor, mask: Tensor | None) -> Tensor:
        weights = covered(mask, values.unsqueeze(-1))
        return torch.where(weights > 0, values * weights, 0.0).sum()

    def hard_loss_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Sum over labelled pixels of the cross-entropy at temperature 1, in nats."""
        logits = wide(logits)
        if logits.shape[1:3] != targets.shape[1:]:
            maps = F.interpolate(logits.movedim(-1, 1), size=targets.shape[1:], mode="bilinear", align_corners=False)
            logits = maps.movedim(1, -1)
        return super().hard_loss_sum(logits, targets, label_smoothing)

    def check_shapes(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor | None, common_ids: int | None = None
    ) -> None:
        super().check_shapes(student, teacher, None, common_ids)
        if student.shape[-1] == 1:
            fix, because = "Set num_labels to 2 or more.", "the softmax of one class is always 1"
            fail("num_labels", 1, "2 classes or more", fix, because=because)
        if targets is not None and (targets.dim() != 3 or len(targets) != len(student)):
            expected = f"({len(student)}, height, width): a class for each pixel"
            fix = "Check the label column and the data collator."
            fail(self.label_names[0], f"of shape {tuple(targets.shape)}", expected, fix)

    def _labels_of(self, logits: Tensor, targets: Tensor | None) -> Tensor:
        """[B, h, w]: the label in the middle of each pixel of the logits."""
        if targets is None:
            return torch.full(logits.shape[:-1], IGNORE_INDEX, device=logits.device)
        rows, columns = (
            ((torch.arange(few, device=logits.device) + 0.5) * many / few).long()
            for few, many in zip(logits.shape[1:3], targets.shape[1:], strict=True)
        )
        return targets[:, rows][:, :, columns]


def covered(mask: Tensor | None, logits: Tensor) -> Tensor:
    """[B, h, w]: how many True pixels of the mask [B, H, W] each pixel of the logits covers, in float32.

    Each pixel of the mask is covered by the one that its middle lies in: the numbers add up to `mask.sum()`.
    """
    assert mask is not None
    ends = []
    for few, many in zip(logits.shape[1:3], mask.shape[1:], strict=True):
        places = ((torch.arange(many, device=mask.device) + 0.5) * few / many).long()
        ends.append(F.one_hot(places, few).to(torch.float32))
    return torch.einsum("yh,byx,xw->bhw", ends[0], mask.to(torch.float32), ends[1])
