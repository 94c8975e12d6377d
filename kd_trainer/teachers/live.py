"""The teacher that is run: in eval mode, without gradient, on the student's device or sharded as its backend shards.

For: `trainer.py`. Leaves what teacher and student must agree on to `compatibility.py`. The teacher is never registered
with the accelerator and never a submodule of the student, so that no checkpoint and no optimizer holds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..tasks import (
    ROW_ID,
    TEACHER_PREFIX,
    Task,
    accepted_inputs,
    behind_front,
    classes_have_names,
    count_parameters,
    describe,
    logits_of,
    model_inputs,
    name_of,
)
from ..validation import warn
from .batch import TeacherBatch, floating_dtypes
from .compatibility import Classes, class_names, match_classes
from .errors import check_ids, check_widths, explain, widest_input
from .outputs import TeacherOutput
from .sharding import prepare_teacher

logger = logging.getLogger(__name__)

# In place of a teacher: the student with its adapters switched off. A folder of this name is reached as
# "./adapter_off".
ADAPTER_OFF = "adapter_off"
# Columns that describe the tokens in `input_ids` one by one.
OF_THE_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})


class LiveTeacher:
    """A model that gives the soft targets: eval mode, no gradient, the accelerator's own mixed precision.

    Args:
        model: the teacher; its parameters stop requiring gradients.
        compiled: whether its forward goes through `torch.compile`.

    Attributes:
        class_order: indices that reorder the teacher's classes into the student's, or None (see `compatibility`).
        start_tokens: decoder_start_token_id of the student and of the teacher, where they differ: the decoder's inputs,
            made by the student, begin with the teacher's own for the teacher. None where they are the same.
        most_positions: columns of ids that the teacher can take, or None (see `errors.py`).
        id_limit: where the student's embedding has more rows than the teacher's, the number of the latter; the ids of
            every batch are compared with it. None where the student's own lookup would fail first.
    """

    manifest: None = None
    routes: None = None
    is_student = False
    note = ""

    def __init__(self, model: nn.Module, *, compiled: bool = False) -> None:
        self.model = model
        self.compiled = compiled
        self.id_limit: int | None = None
        self._given = TeacherBatch()
        self.most_positions = widest_input(model)
        self.start_tokens: tuple[int, int] | None = None
        self._compiled_model: Any = None
        self.prepared = model  # what is called: the model, or the backend's wrapper around it
        self.class_order: Tensor | None = None
        self.accepted = accepted_inputs(model)
        # Outputs that only cost time and memory: the cache, and the load-balancing loss of a mixture of experts.
        routed = getattr(getattr(model, "config", None), "output_router_logits", False)
        costly = ("use_cache", "output_router_logits") if routed else ("use_cache",)
        self._off = {name: False for name in costly if name in self.accepted}
        self._modules: list[nn.Module] = []
        self.shared: list[nn.Module] = []  # frozen modules that are the student's too, which keep its mode

    @property
    def live(self) -> LiveTeacher:
        """Itself: it is run."""
        return self

    @property
    def members(self) -> tuple[LiveTeacher, ...]:
        return (self,)

    @property
    def parts(self) -> dict[str, Any]:
        """None: no outputs are on disk."""
        return {}

    @property
    def has_own_weights(self) -> bool:
        """Whether it is no part of the student."""
        return not self.is_student

    def for_student(self, student: nn.Module, *, over_tokens: bool) -> LiveTeacher:
        """The teacher itself, which depends on no student."""
        return self

    def describe(self) -> str:
        """One line on the model."""
        return describe(self.model)

    def identity(self) -> dict[str, Any]:
        """`name` and `parameters`, for the summary."""
        return {"name": name_of(self.model), "parameters": count_parameters(self.model)}

    def check_objective(self, divergence: str, temperatures: Sequence[float], standardize: bool = False) -> None:
        """Logits serve every loss."""

    def release(self, student: nn.Module) -> None:
        """Moves it to the CPU, since a script may still hold it; but not what the backend or a loader has placed."""
        placed = any(getattr(self.model, name, None) is not None for name in ("hf_device_map", "quantization_method"))
        if not (placed or self.sharded or self.model is student):
            self.model.to("cpu")
            self._modules = []  # the next `prepare` places it again

    def prepare(self, device: torch.device, accelerator: Any = None) -> None:
        """Places the teacher, once: whole on `device`, or sharded by the accelerator's backend (see `sharding.py`).

        Quantised models and those with a `device_map` stay where they are. Every process must call it.
        """
        if self._modules:
            return
        self.model.requires_grad_(False)
        placed = getattr(self.model, "hf_device_map", None) is not None
        if not placed and getattr(self.model, "quantization_method", None) is None:
            self.prepared = prepare_teacher(self.model, device, accelerator)
        elif len(set((getattr(self.model, "hf_device_map", None) or {}).values())) < 2:  # else accelerate moves inputs
            self._given.device = next(self.model.parameters()).device
        # A forward that failed may not be tried again where other processes take part in it.
        self._given.dtypes = [*floating_dtypes(self.model)[: 1 if self.sharded else None]] or [None]
        self._modules = list(self.model.modules())

    def compare_classes(
        self, student: nn.Module, task: Task | None, *, remap: bool, compare: Callable[..., Classes] = match_classes
    ) -> Classes | None:
        """`match_classes` with the student; None where the classes of the task have no names."""
        if not classes_have_names(student, task):
            return None
        return compare(class_names(student), class_names(self.model), remap=remap)

    @property
    def sharded(self) -> bool:
        """Whether its weights lie on several processes, all of which each forward needs."""
        return any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in self.model.parameters())

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of the batch the teacher reads: the student's columns that its forward takes, `teacher_*` ones first."""
        own = {k[len(TEACHER_PREFIX) :]: v for k, v in batch.items() if k.startswith(TEACHER_PREFIX) and k != ROW_ID}
        if "input_ids" in own:  # another text: the student's columns describe other tokens
            batch = {k: v for k, v in batch.items() if k not in OF_THE_TEXT}
        taken = {**model_inputs({**batch, **own}, self.accepted), **self._off}
        ids = taken.get("decoder_input_ids")
        if self.start_tokens is not None and isinstance(ids, Tensor) and "decoder_input_ids" not in own:
            first = torch.where(ids[:, :1] == self.start_tokens[0], self.start_tokens[1], ids[:, :1])
            taken["decoder_input_ids"] = torch.cat([first, ids[:, 1:]], 1)
        return taken

    def output(
        self,
        batch: Mapping[str, Any],
        accelerator: Any,
        student: nn.Module | None = None,
        *,
        read: Callable[[Any, str], Tensor] = logits_of,
        **mixing: Any,
    ) -> TeacherOutput:
        """The logits as a `TeacherOutput`: see `__call__`."""
        return TeacherOutput(logits=self(batch, accelerator, student, read=read))

    def __call__(
        self,
        batch: Mapping[str, Any],
        accelerator: Any,
        student: nn.Module | None = None,
        *,
        read: Callable[[Any, str], Tensor] = logits_of,
    ) -> Tensor:
        """The teacher's logits for the batch, in the teacher's dtype and on its device; see `outputs`.

        Args:
            read: takes the logits out of what the teacher returns: `Task.logits`.
        """
        logits = self.behind_front(read(self.outputs(batch, accelerator, student), "teacher_model"), batch)
        if self.class_order is not None:
            self.class_order = self.class_order.to(logits.device)
            logits = logits[..., self.class_order]
        return logits

    def behind_front(self, positions: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Its logits or hidden states at the positions of the batch: see `inputs.front_positions`."""
        own = "teacher_pixel_values" in batch
        return behind_front(positions, self.model, self.inputs(batch) if own else batch)

    def outputs(self, batch: Mapping[str, Any], accelerator: Any, student: nn.Module | None = None) -> Any:
        """What the teacher's forward returns for the batch, without gradient, dropout and cache.

        Not under `torch.inference_mode`: its tensors cannot be saved for the backward pass of the soft loss, and the
        copy that would avoid this costs more than the mode saves.

        Args:
            student: the student as the accelerator wrapped it; only an `AdapterOffTeacher` calls it.

        Raises:
            ValueError: an id of the batch has no row in the teacher's embedding; rows longer than its positions.
            TypeError, ValueError, RuntimeError: its forward failed; the original error is the cause: see `explain`.
        """
        inputs = self.inputs(batch)
        if self.id_limit is not None:
            check_ids(inputs, self.id_limit)
        if self.most_positions is not None:
            check_widths(inputs, self.most_positions)
        # Someone may have called teacher.train(), or trained a part of it, since the last step.
        in_training = [module for module in self.shared if module.training]
        if any(module.training for module in self._modules):
            self.model.eval()
        autocast = nullcontext() if accelerator.mixed_precision == "no" else accelerator.autocast()
        # Autocast is entered here because upstream patches only the student's forward with it.
        with torch.no_grad(), autocast:
            try:
                return self._given.forward(lambda **given: self._run(given, student), inputs)
            except Exception as error:  # a forward may raise anything
                explained = explain(self.model, inputs, error)
                if explained is None:
                    raise
                raise explained from error
            finally:
                for module in in_training:
                    module.training = True

    def _run(self, inputs: dict[str, Any], student: nn.Module | None) -> Any:
        if not self.compiled:
            return self.prepared(**inputs)
        if self._compiled_model is not None:
            return self._compiled_model(**inputs)
        self._compiled_model = torch.compile(self.prepared)
        try:
            return self._compiled_model(**inputs)
        except RuntimeError as error:
            outputs = self.prepared(**inputs)  # raises again where the compiler was not to blame
            self.compiled = False
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warn(logger, "teacher_compile: the teacher runs uncompiled, because torch.compile raised: %s", reason)
            return outputs
