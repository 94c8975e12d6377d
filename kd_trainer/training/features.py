"""What makes a term of the loss of an entry of `FEATURES`: layers, capture, projector, checks and counts.

For: `terms.py`, which makes a `Term` of each name in `kd_features`.
Letters: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.features import FEATURES, Attention, default_relation_heads, relation_widths
from ..tasks import Task, is_packed, main_input
from ..tasks.capture import (
    Captured,
    attended_frames,
    attended_tokens,
    capture,
    layer_pairs,
    layer_widths,
    layers_of,
)
from ..validation import fail
from .arguments import DistillationArguments
from .projectors import ATTRIBUTE, Projector, after

# Columns that give the teacher other positions than the student's.
_OTHER_POSITIONS = ("teacher_input_ids", "teacher_inputs_embeds", "teacher_attention_mask")


class FeatureTerm:
    """The parts of a feature's term; see `terms.py` for what each is called with.

    Args:
        name: of an entry of `FEATURES`.
    """

    def __init__(self, name: str, kd: DistillationArguments) -> None:
        self.name, self.weight, self._feature = name, kd.features[name], FEATURES[name]
        self._which, self._heads = kd.kd_feature_layers, kd.kd_relation_heads
        self._compared = False  # whether the keys that the models attend to were compared, on the first batch

    def _pairs(self, student: nn.Module, teacher: nn.Module) -> list[tuple[int, int]]:
        return layer_pairs(self._which, len(layers_of(student)), len(layers_of(teacher)))

    # ---- before the first step ----

    def module(self, student: nn.Module, teacher: Any) -> nn.Module | None:
        """A projector for each pair of layers whose hidden states differ in width; None where all are equal."""
        if self._feature.reads != "hidden" or teacher is None or teacher.model is None:
            return None
        try:
            pairs, widths = self._pairs(student, teacher.model), (layer_widths(student), layer_widths(teacher.model))
        except ValueError:  # `check` raises it
            return None
        made = {}
        for pair in pairs:
            width, to = widths[0][pair[0]], widths[1][pair[1]]
            if width is not None and to is not None and width != to:
                made[_key(pair)] = Projector(width, to)
        dtype = next(p.dtype for p in student.parameters() if p.is_floating_point())
        return nn.ModuleDict(made).to(dtype) if made else None

    def check(self, first: Any) -> str:
        """Raises ValueError where the models, the teacher or the batch cannot have the feature; a line on its layers.

        Args:
            first: a `setup_checks.FirstBatch`.
        """
        teacher, name = first.teacher, repr(self.name)
        if teacher is None or teacher.model is None:
            because = "a cache holds a teacher's final outputs, no features of its layers"
            fix = "Train with the live teacher, or leave kd_features out."
            fail("kd_features", f"{name} with a teacher cache", "a teacher that is run", fix, because=because)
        other = [column for column in _OTHER_POSITIONS if column in first.batch]
        if other:
            shown, because = f"{name} with the column {other[0]!r}", "features are compared position by position"
            expected, fix = "a teacher that reads the student's tokens", "Take a teacher with the student's tokenizer."
            fail("kd_features", shown, expected, fix, because=because)
        compiled = {"torch_compile": first.trainer.args.torch_compile, "teacher_compile": teacher.compiled}
        for argument in (argument for argument, value in compiled.items() if value):
            because = "a compiled forward cannot be captured"
            fail(argument, True, "False with kd_features", "Leave it out.", because=because)
        tokens = attended_tokens(first.batch)
        if self._feature.has_heads and tokens is not None and is_packed(first.batch, tokens.shape):
            because = "it would compare tokens of different sequences"
            expected, fix = "rows of one sequence", "Leave the packing out, or take another feature."
            fail("kd_features", f"{name} with packed rows", expected, fix, because=because)
        projectors = _projectors(first.student, self.name)
        shown = ", ".join(
            f"{pair[0]}-{pair[1]}" + (f" (projector {x.in_features} to {x.out_features})" if x is not None else "")
            for pair, x in ((pair, projectors.get(_key(pair))) for pair in self._pairs(first.student, teacher.model))
        )
        heads = f", {self._heads} relation heads" if self._feature.has_heads and self._heads else ""
        return f"{self.name}: layers student-teacher {shown}{heads}"

    # ---- at every step ----

    def count(self, task: Task, inputs: Mapping[str, Any]) -> Tensor | int:
        """Attended tokens; rows where positions are no tokens of the inputs: patches, frames."""
        mask = attended_tokens(inputs)
        return len(main_input(inputs)) if mask is None else mask.sum()

    @contextmanager
    def capture(self, model: nn.Module, side: str, batch: Any) -> Iterator[Side]:
        """Records the layers of one side in the forward inside; hidden states of the student are projected there."""
        teacher = side == "teacher"
        pairs = self._pairs(*((batch.plan.student, model) if teacher else (model, batch.teacher.model)))
        layers, projectors = [pair[teacher] for pair in pairs], {} if teacher else _projectors(model, self.name)
        with ExitStack() as stack:
            captured = stack.enter_context(capture(model, layers, attention=self._feature.reads != "hidden"))
            found = Side(captured, layers, [projectors.get(_key(pair)) for pair in pairs])
            if projectors:
                # In front of the hooks by which FSDP2 frees the weights behind the forward.
                hook = model.register_forward_hook(found.project, prepend=True)
                stack.callback(hook.remove)
            yield found

    def loss(self, batch: Any, outputs: Any, teacher: Any) -> Tensor | None:
        """[B]: sums over attended tokens, or means over patches or frames; the mean over the pairs of layers."""
        sides = [batch.captured.get((side, self.name)) for side in ("student", "teacher")]
        if None in sides:
            return None
        values = [side.read(self._feature.reads) for side in sides]
        losses = [self._pair_loss(batch, *pair) for pair in zip(*values, strict=True)]
        self._compared = True
        return torch.stack(losses).mean(0)

    def _pair_loss(self, batch: Any, student: Any, teacher: Any) -> Tensor:
        teacher = _to(teacher, _positions(student).device)
        shapes = [tuple(_positions(side).shape[:2]) for side in (student, teacher)]
        mask = attended_tokens(batch.inputs)
        tokens = mask is not None
        if mask is None:
            mask = attended_frames(batch.plan.student, batch.inputs, shapes[0][1])
        if mask is not None:
            shapes.append(tuple(mask.shape))
        if len(set(shapes)) > 1:
            because = (
                f"the student has {shapes[0]} positions, the teacher {shapes[1]}, and the inputs have {shapes[-1]}"
            )
            expected = "layers with one position for each token, patch or frame of the inputs in both models"
            fail("kd_features", repr(self.name), expected, "Leave it out.", because=because)
        options: dict[str, Any] = {}
        if self._feature.has_heads:
            options["heads"] = self._heads or default_relation_heads(*relation_widths(student, teacher))
        elif isinstance(student, Attention) and not self._compared:
            self._compare_keys(student, teacher, mask)
        elif not isinstance(student, Attention) and student.shape[-1] != teacher.shape[-1]:
            because = f"there is no projector from {student.shape[-1]} to {teacher.shape[-1]}"
            fix = "train(), evaluate() and check() have one where the configs have both widths; or take 'relation'."
            fail("kd_features", repr(self.name), "hidden states of one width", fix, because=because)
        sums = self._feature.loss(student, teacher, mask, **options)
        if not tokens:
            sums = sums / (shapes[0][1] if mask is None else mask.sum(-1).clamp(min=1))
        return sums.view(len(main_input(batch.inputs)), -1).sum(-1)  # of multiple choice B * C rows

    def _compare_keys(self, student: Attention, teacher: Attention, mask: Tensor | None) -> None:
        """Raises ValueError where a query attends to other keys in the student than in the teacher."""
        differ = student.attended().any(1) != teacher.attended().any(1)
        if mask is not None:
            differ = differ & mask[:, :, None] & mask[:, None, :]
        if differ.any():
            because = "the student's layer attends to other positions than the teacher's (a causal mask or a window)"
            fix = "Choose layers with the same attention in kd_feature_layers, or take 'relation'."
            fail("kd_features", "'attention'", "layers that attend to the same positions", fix, because=because)


class Side:
    """The features of one model in one forward, of one layer for each pair.

    Args:
        projectors: of each pair, or None.
    """

    def __init__(self, captured: Captured, layers: list[int], projectors: list[Any]) -> None:
        self._captured, self._layers, self._projectors = captured, layers, projectors
        self._projected: dict[int, Tensor] = {}

    def project(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        """The hook behind the student's forward; it raises nothing, since `read` will."""
        for pair, (layer, projector) in enumerate(zip(self._layers, self._projectors, strict=True)):
            hidden = self._captured.outputs.get(layer)
            if projector is not None and isinstance(hidden, Tensor) and hidden.shape[-1] == projector.in_features:
                self._projected[pair] = projector(hidden.to(projector.weight.dtype))
        return after(outputs, self._projected.values()) if torch.is_grad_enabled() else outputs

    def read(self, what: str) -> list[Any]:
        """By `Feature.reads`, for each pair."""
        if what == "hidden":
            hidden = [self._captured.hidden(layer) for layer in self._layers]
            return [self._projected.get(pair, x) for pair, x in enumerate(hidden)]
        return [self._captured.attention(layer, probabilities=what == "attention") for layer in self._layers]


def _key(pair: tuple[int, int]) -> str:
    return f"{pair[0]}_{pair[1]}"


def _projectors(student: nn.Module, name: str) -> Mapping[str, Any]:
    """The projectors of a feature by pair, where the student has them."""
    terms: Any = getattr(student, ATTRIBUTE, {})
    return dict(terms[name].items()) if name in terms else {}


def _positions(feature: Any) -> Tensor:
    """A tensor [B, S, ...]."""
    return feature.query[:, 0] if isinstance(feature, Attention) else feature


def _to(feature: Any, device: torch.device) -> Any:
    if not isinstance(feature, Attention):
        return feature.to(device)
    moved: dict[str, Any] = {k: v.to(device) for k, v in feature._asdict().items() if isinstance(v, Tensor)}
    return feature._replace(**moved)
