"""The teacher: loaded by path, kept in eval mode and on the student's device, asked for its logits.

For: `trainer.py`. Leaves what teacher and student must agree on to `compatibility.py`. The teacher is never registered
with the accelerator and never a submodule of the student: checkpoints and optimizers do not know of it.
Imports: checks, heads, transformers (on use).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import Shown, fail, message
from .heads import TEACHER_PREFIX, accepted_inputs, auto_class_of, logits_of, model_inputs

# Columns that describe the tokens in `input_ids` one by one.
OF_THE_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})


class LiveTeacher:
    """A model that gives the soft targets: eval mode, no gradient, the accelerator's own mixed precision.

    Args:
        model: the teacher; its parameters stop requiring gradients.

    Attributes:
        class_order: indices that reorder the teacher's classes into the student's, or None (see `compatibility`).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.class_order: Tensor | None = None
        self.accepted = accepted_inputs(model)
        self._takes_cache = self.accepted is not None and "use_cache" in self.accepted
        self._modules: list[nn.Module] = []

    def prepare(self, device: torch.device) -> None:
        """Moves the teacher to `device`, once; quantised models and those with a `device_map` stay where they are."""
        if self._modules:
            return
        self.model.requires_grad_(False)
        placed = getattr(self.model, "hf_device_map", None) is not None
        if not placed and getattr(self.model, "quantization_method", None) is None:
            self.model.to(device)
        self._modules = list(self.model.modules())

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of the batch the teacher reads: the student's columns that its forward takes, `teacher_*` ones first."""
        own = {k[len(TEACHER_PREFIX) :]: v for k, v in batch.items() if k.startswith(TEACHER_PREFIX)}
        if "input_ids" in own:  # another text: what the student's columns say of its tokens does not hold for it
            batch = {k: v for k, v in batch.items() if k not in OF_THE_TEXT}
        kwargs = model_inputs({**batch, **own}, self.accepted)
        return {**kwargs, "use_cache": False} if self._takes_cache else kwargs

    def __call__(self, batch: Mapping[str, Any], accelerator: Any) -> Tensor:
        """The teacher's logits for the batch, on the batch's device, in the teacher's dtype.

        Autocast is entered here because upstream patches only the student's forward with it.
        """
        # Someone may have called teacher.train(), or trained a part of it, since the last step.
        if any(module.training for module in self._modules):
            self.model.eval()
        autocast = nullcontext() if accelerator.mixed_precision == "no" else accelerator.autocast()
        with torch.no_grad(), autocast:
            logits = logits_of(self.model(**self.inputs(batch)), "teacher_model")
        if self.class_order is not None:
            self.class_order = self.class_order.to(logits.device)
            logits = logits[..., self.class_order]
        return logits


def load_teacher(teacher_model: nn.Module | str | Path, student: nn.Module, init_kwargs: dict[str, Any]) -> nn.Module:
    """The teacher as a module: itself, or loaded by path with the Auto class of the student's task.

    A path is read from safetensors unless `init_kwargs` asks otherwise, and no remote code runs unless it says so.

    Raises:
        TypeError: neither a module nor a path.
        ValueError: the path cannot be loaded, the student's task is unknown, or the head would be newly initialised.
    """
    if isinstance(teacher_model, nn.Module):
        if init_kwargs:
            mend = "Leave it out, or give the teacher by path."
            fail("teacher_model_init_kwargs", init_kwargs, "nothing where the teacher is a module", mend)
        return teacher_model
    if not isinstance(teacher_model, (str, Path)):
        shown = Shown(f"of type {type(teacher_model).__name__}")
        fail("teacher_model", shown, "a torch module, a folder or a hub name", "Load the model first.", error=TypeError)
    path = str(teacher_model)
    known = auto_class_of(student)
    if known is None:
        fail(
            "teacher_model",
            path,
            "a module, because no Auto class of transformers has a student of type " + type(student).__name__,
            "Load the teacher yourself and give the module.",
        )
    _, auto_class = known
    try:
        model, info = auto_class.from_pretrained(
            path, output_loading_info=True, **{"use_safetensors": True, **init_kwargs}
        )
    except Exception as error:  # upstream and safetensors raise many kinds
        said = f"{auto_class.__name__} can load ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        if init_kwargs and isinstance(error, (TypeError, RuntimeError)):
            expected, mend = f"arguments with which {said}", "Check their names and values."
            raise ValueError(message("teacher_model_init_kwargs", init_kwargs, expected, mend)) from error
        mend = "Check the path for a typing error."
        if any(Path(path).glob("*.bin")):
            mend = (
                "Its weights are a pickle, which can run code: save them again as safetensors, or, if you trust "
                'whoever made it, set teacher_model_init_kwargs to {"use_safetensors": false}.'
            )
        expected = f"a folder with config.json and safetensors weights, or a hub name, that {said}"
        raise ValueError(message("teacher_model", path, expected, mend)) from error
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if fresh:
        fail(
            "teacher_model",
            path,
            "a checkpoint already fine-tuned for the student's task",
            f"Fine-tune the teacher first, or name a checkpoint that has the head of {type(model).__name__}.",
            because=f"these of its weights would be newly initialised and teach noise: {', '.join(fresh[:4])}",
        )
    return model
