"""The terms of the loss: how one is described, and the list of those beside the hard and the soft loss.

    loss = scale * sum over terms of weight * S / D        S over this micro-batch, D over the whole optimizer step

To add a term: write its loss as a function and append an entry to `ADDED_TERMS` (of a feature: to `FEATURES` in
`losses/features.py`). It is then counted, weighed, added, logged as NAME_loss in training and evaluation, and shown in
the start block, the model card and `check()`.

A term that compares more than logits (hidden states, attention) has three further parts, in the order of use:
1. `module(student, teacher)`, before the optimizer is created: what it returns is `student.kd_projectors[NAME]` during
   training and `check()` (see `projectors.py`). It returns None where nothing is trained or the models do not fit.
2. `check(first)`, on the first batch (a `FirstBatch`: `student`, `teacher`, `batch`, `kd`): calls `fail` where these
   models, this teacher or this cache cannot have the term; returns a line for start block and `check()`, or None.
3. `capture(model, side, batch)`, a context around every forward of the student and of a teacher that is run; `model` is
   unwrapped, `side` is "student" or "teacher", `batch` the `MicroBatch`.
   What it yields is `batch.captured["student", NAME]` and `batch.captured["teacher", NAME]` for `loss`. None of
   the teacher where it is not run (a cache): `loss` returns None, or `check` fails. The teacher's forward is first and
   without gradient. The student's is inside the wrapped forward, where a hook may use `model.kd_projectors`. A forward
   may run twice for a batch: the last one counts. A teacher that is the student without its adapters is the same
   module: nothing may stay on it when the context ends.
A term with a `capture` has the teacher run with kd_alpha 0 too. `loss` is the same for full logits and the fused loss.
Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..tasks import Task, text_config
from ..validation import fail
from .arguments import DistillationArguments
from .features import FeatureTerm


@dataclass(frozen=True)
class Term:
    """One addend of the loss.

    Args:
        name: logged as NAME_loss.
        weight: a number, which the formula of the start block shows; or a function of the unwrapped student, for a
            weight that its config holds. A term of weight 0 is logged and not added.
        loss: (the `MicroBatch`, the student's outputs, the `TeacherOutput` or None) -> [B], the sum over each row's
            counted positions; or a number that holds for every row; or None where the term does not exist. The
            teacher is None where it is not called. Hard and soft have none: `Objective` computes them together.
        count: (task, inputs) -> how many positions of a micro-batch count, read from its inputs alone; None: its rows.
        check, module, capture: see above.
    """

    name: str
    weight: float | Callable[[nn.Module], float]
    loss: Callable[[Any, Any, Any], Tensor | None] = lambda batch, outputs, teacher: None
    count: Callable[[Task, Mapping[str, Any]], Tensor | int] | None = None
    check: Callable[[Any], str | None] | None = None
    module: Callable[[nn.Module, Any], nn.Module | None] | None = None
    capture: Callable[[nn.Module, str, Any], AbstractContextManager[Any]] | None = None

    def weight_for(self, student: nn.Module) -> float:
        """The weight of the term for this student."""
        return self.weight(student) if callable(self.weight) else self.weight


# ---- the load-balancing loss of mixtures of experts, which upstream adds only where the model itself has labels ----


def check_aux_loss(student: nn.Module) -> None:
    """Raises ValueError for a mixture of experts whose router loss cannot be computed without labels."""
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
    weight = aux_weight(student) if getattr(config, "output_router_logits", False) else None
    if weight is not None:
        notes.append(f"the loss has {weight:g} * the student's router loss (aux_loss) added")
    if getattr(config, "z_loss_coefficient", 0) > 0:
        notes.append(f"the student's own z-loss (z_loss_coefficient {config.z_loss_coefficient:g}) is left out")
    return tuple(notes)


def aux_loss(batch: Any, outputs: Any, teacher: Any) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, which upstream's forward adds only where it sees labels.

    It stays with label smoothing and without labels too, where the stock Trainer loses it. A step has the mean over
    its micro-batches, weighed by their rows, where the stock Trainer has their sum.

    Args:
        outputs: the student's; they hold `aux_loss` where its config sets `output_router_logits`.
    """
    aux = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    return aux if isinstance(aux, Tensor) else None


def required_aux_weight(student: nn.Module) -> float:
    """`aux_weight` of a student that returns an aux_loss; a ValueError where it has none."""
    weight = aux_weight(student)
    if weight is None:
        fix = "Set model.router_aux_loss_coef; 0 leaves the loss out."
        fail("router_aux_loss_coef", None, f"the weight of the aux_loss that {type(student).__name__} returns", fix)
    return weight


def aux_weight(student: nn.Module) -> float | None:
    """The weight of `aux_loss` in the student's own loss, where its class keeps it; None where it has none."""
    for owner in (student, text_config(student)):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            weight = getattr(owner, name, None)
            if weight is not None:
                return float(weight)
    return None


# Each makes its term from the distillation arguments; None where they switch it off.
ADDED_TERMS: list[Callable[[DistillationArguments], Term | None]] = [
    lambda kd: Term("aux", required_aux_weight, aux_loss),
]


def added_terms(kd: DistillationArguments) -> tuple[Term, ...]:
    """The terms beside hard and soft that these arguments switch on."""
    terms = [term for make in ADDED_TERMS if (term := make(kd)) is not None]
    return *terms, *(_feature_term(FeatureTerm(name, kd)) for name in kd.features)


def _feature_term(of: FeatureTerm) -> Term:
    return Term(of.name, of.weight, of.loss, of.count, of.check, of.module, of.capture)
