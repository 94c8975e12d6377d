"""The load-balancing loss of mixtures of experts, which upstream adds only where the model itself sees labels.

For: `terms.py`, and the checks of the first batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..tasks import text_config
from ..validation import fail


def check_router(student: nn.Module) -> None:
    """Raises ValueError where a mixture of experts is asked for a router loss that cannot be had without labels."""
    config: Any = getattr(student, "config", None)
    if not getattr(config, "output_router_logits", False) or not getattr(config, "is_encoder_decoder", False):
        return
    fail(
        "output_router_logits",
        True,
        f"False in the config of the student {type(student).__name__}",
        "Set model.config.output_router_logits to False: its router loss is then left out.",
        because="an encoder-decoder adds its router loss to its own loss, which distillation replaces",
    )


def notes_on_own_losses(student: nn.Module) -> tuple[str, ...]:
    """Lines for the start block: what is added to the loss besides distillation, and what of the model's own is not."""
    config = text_config(student)
    notes: list[str] = []
    weight = router_weight(student) if getattr(config, "output_router_logits", False) else None
    if weight is not None:
        notes.append(f"the loss has {weight:g} * the student's router loss (aux_loss) added")
    if getattr(config, "z_loss_coefficient", 0) > 0:
        notes.append(f"the student's own z-loss (z_loss_coefficient {config.z_loss_coefficient:g}) is left out")
    return tuple(notes)


def router_loss(batch: Any, outputs: Any, teacher: Any) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, which upstream's forward adds only where it sees labels.

    It stays with label smoothing and without labels too, where the stock Trainer loses it. A step has the mean over
    its micro-batches, weighed by their rows, where the stock Trainer has their sum.

    Args:
        outputs: the student's; they hold `aux_loss` where its config sets `output_router_logits`.
    """
    aux = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    return aux if isinstance(aux, Tensor) else None


def required_router_weight(student: nn.Module) -> float:
    """`router_weight` of a student that returns an aux_loss; a ValueError where it has none."""
    weight = router_weight(student)
    if weight is None:
        mend = "Set model.router_aux_loss_coef; 0 leaves the loss out."
        fail("router_aux_loss_coef", None, f"the weight of the aux_loss that {type(student).__name__} returns", mend)
    return weight


def router_weight(student: nn.Module) -> float | None:
    """The weight of `aux_loss` in the student's own loss, where its class keeps it; None where it has none."""
    for owner in (student, text_config(student)):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            weight = getattr(owner, name, None)
            if weight is not None:
                return float(weight)
    return None
