"""The teacher: loaded by path, kept in eval mode and on the student's device, asked for its logits.

For: `trainer.py`. Leaves what teacher and student must agree on to `compatibility.py`. The teacher is never registered
with the accelerator and never a submodule of the student: checkpoints and optimizers do not know of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..redaction import scrub, secrets_in
from ..tasks import (
    HEADS,
    ROW_ID,
    TEACHER_PREFIX,
    Head,
    accepted_inputs,
    auto_class_of,
    auto_classes,
    behind_front,
    logits_of,
    model_inputs,
)
from ..validation import fail, message, quoted, warn
from .batch import TeacherBatch, floating_dtypes
from .errors import check_ids, check_widths, explain, widest_input
from .sharding import prepare_teacher

logger = logging.getLogger(__name__)

# In place of a teacher: the student with its adapters switched off. It says what happens and is no likely name of a
# folder, as "base" would be; such a folder is still reached as "./adapter_off".
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
        most_positions: columns of ids that the teacher can take, or None (see `teacher_errors`).
        id_limit: where the student's embedding has more rows than the teacher's, the number of the latter; the ids of
            every batch are compared with it. None where the student would stumble first.
    """

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
        # What would only cost: the cache, and the load-balancing loss of a mixture of experts.
        routed = getattr(getattr(model, "config", None), "output_router_logits", False)
        costly = ("use_cache", "output_router_logits") if routed else ("use_cache",)
        self._off = {name: False for name in costly if name in self.accepted}
        self._modules: list[nn.Module] = []
        self.shared: list[nn.Module] = []  # frozen modules that are the student's too, which keep its mode

    def prepare(self, device: torch.device, accelerator: Any = None) -> None:
        """Places the teacher, once: whole on `device`, or sharded by the accelerator's backend (see `backends`).

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

    @property
    def sharded(self) -> bool:
        """Whether its weights lie on several processes, all of which each forward needs."""
        return any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in self.model.parameters())

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of the batch the teacher reads: the student's columns that its forward takes, `teacher_*` ones first."""
        own = {k[len(TEACHER_PREFIX) :]: v for k, v in batch.items() if k.startswith(TEACHER_PREFIX) and k != ROW_ID}
        if "input_ids" in own:  # another text: what the student's columns say of its tokens does not hold for it
            batch = {k: v for k, v in batch.items() if k not in OF_THE_TEXT}
        taken = {**model_inputs({**batch, **own}, self.accepted), **self._off}
        ids = taken.get("decoder_input_ids")
        if self.start_tokens is not None and isinstance(ids, Tensor) and "decoder_input_ids" not in own:
            first = torch.where(ids[:, :1] == self.start_tokens[0], self.start_tokens[1], ids[:, :1])
            taken["decoder_input_ids"] = torch.cat([first, ids[:, 1:]], 1)
        return taken

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
            read: takes the logits out of what the teacher returns: `Head.logits`.
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
        copy that would mend this costs more than the mode saves.

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
                return self._given.forward(lambda **given: self._ask(given, student), inputs)
            except Exception as error:  # a forward may raise anything
                explained = explain(self.model, inputs, error)
                if explained is None:
                    raise
                raise explained from error
            finally:
                for module in in_training:
                    module.training = True

    def _ask(self, inputs: dict[str, Any], student: nn.Module | None) -> Any:
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
            said = (str(error).splitlines() or [type(error).__name__])[0]
            warn(logger, "teacher_compile: the teacher runs uncompiled, because torch.compile said: %s", said)
            return outputs


class AdapterOffTeacher(LiveTeacher):
    """The student's own base as the teacher: the student with its adapters off, no second copy of the weights.

    Args:
        student: a model with adapters in its layers (LoRA and its kin): a `PeftModel`, or transformers' `add_adapter`.
        over_tokens: whether the student is a language model (`Head.over_tokens`).

    Raises:
        ValueError: the student has no such adapters, or what is off is no fixed teacher (see `check_adapters`).
    """

    def __init__(self, student: nn.Module, *, over_tokens: bool) -> None:
        check_adapters(student, over_tokens=over_tokens)
        super().__init__(student)

    def prepare(self, device: torch.device, accelerator: Any = None) -> None:
        """Nothing to place: the student is where it belongs."""

    def _ask(self, inputs: dict[str, Any], student: nn.Module | None) -> Any:
        # The wrapped one: FSDP and DeepSpeed gather the weights in its forward.
        with adapters_off(self.model):
            return (self.model if student is None else student)(**inputs)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with its adapters off; afterwards each module and each adapter is as it was.

    peft's own `disable_adapter` makes every parameter of the active adapters trainable on its way out, those that were
    frozen on purpose too.
    """
    on = [layer for layer in _adapter_layers(model) if not layer._disable_adapters]
    training = [module for module in model.modules() if module.training]
    try:
        for layer in on:
            layer._disable_adapters = True
        model.eval()
        yield
    finally:
        for layer in on:
            layer._disable_adapters = False
        for module in training:
            module.training = True


def check_adapters(student: nn.Module, *, over_tokens: bool) -> None:
    """Raises ValueError unless the student with its adapters off is a teacher, and stays the same one."""
    layers = _adapter_layers(student)
    own = "Give the teacher as a model of its own, e.g. by path."
    if not layers:
        mend = f"Add adapters with peft first; a folder of that name is './{ADAPTER_OFF}'."
        shown = f"'{ADAPTER_OFF}' with a student of type {type(student).__name__}"
        fail("teacher_model", shown, "a student with adapters in its layers (LoRA and its kin)", mend)
    adapters = adapter_parameters(student)
    moving = [name for name, p in student.named_parameters() if p.requires_grad and id(p) not in adapters]
    if moving:
        shown = f"'{ADAPTER_OFF}' with a student that trains {', '.join(moving[:4])}"
        because = f"these {len(moving)} parameters are the teacher's too and would move with the student"
        fail("teacher_model", shown, "all but the adapters frozen", "Freeze them. Or: " + own, because=because)
    saved = [n for n, m in student.named_modules() if _is_adapter_layer(m) and hasattr(m, "modules_to_save")]
    if saved and not over_tokens:
        shown = f"'{ADAPTER_OFF}' with a classifier in modules_to_save ({saved[0]})"
        because = "the base's own classifier may be newly initialised and teach noise"
        fail("teacher_model", shown, "a classifier without modules_to_save", own, because=because)


def _is_adapter_layer(module: nn.Module) -> bool:
    """A layer of peft that can be switched off, told by the attributes that are used here: no import of peft."""
    return hasattr(module, "_disable_adapters") and hasattr(module, "adapter_layer_names")


def adapter_parameters(model: nn.Module) -> set[int]:
    """The `id` of every parameter that belongs to an adapter, not to the base."""
    bases = ("base_layer.", "original_module.")
    named = (item for layer in _adapter_layers(model) for item in layer.named_parameters())
    return {id(parameter) for name, parameter in named if not name.startswith(bases)}


def adapter_modules(model: nn.Module) -> set[int]:
    """The `id` of every module that belongs to an adapter or wraps one around the base."""
    bases = ("base_layer", "original_module")
    found = {id(module) for module in model.modules() if type(module).__module__.partition(".")[0] == "peft"}
    for layer in _adapter_layers(model):
        found.add(id(layer))
        found |= {id(module) for name, module in layer.named_modules() if name and not name.startswith(bases)}
    return found


def _adapter_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_adapter_layer(module)]


def _from_pretrained(head: Head, auto_class: Any, path: str, kwargs: dict[str, Any]) -> tuple[Any, dict]:
    """(model, loading info) by the student's Auto class, or by another one of its task, where that one knows the path.

    A causal teacher that reads images or speech too has another Auto class than a student of text alone.
    """
    others = [*auto_classes(head), *(auto_classes(HEADS["seq2seq_lm"]) if head.name == "causal_lm" else ())]
    refusal = None
    for candidate in dict.fromkeys([auto_class, *others]):
        try:
            return candidate.from_pretrained(path, output_loading_info=True, **kwargs)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            refusal = refusal or error
    raise refusal or AssertionError("there is at least the student's own Auto class")


# Nothing is unpickled and no code of the checkpoint's runs; left open, upstream asks at the terminal and waits.
_UNLESS_ASKED = {"use_safetensors": True, "trust_remote_code": False}


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
            fail("teacher_model_init_kwargs", quoted(init_kwargs), "nothing where the teacher is a module", mend)
        return teacher_model
    if not isinstance(teacher_model, (str, Path)):
        shown = f"of type {type(teacher_model).__name__}"
        fail("teacher_model", shown, "a torch module, a folder or a hub name", "Load the model first.", error=TypeError)
    path = str(teacher_model)
    known = auto_class_of(student)
    if known is None or known[1] is None:
        fail(
            "teacher_model",
            repr(path),
            "a module, because no Auto class of transformers has a student of type " + type(student).__name__,
            "Load the teacher yourself and give the module.",
        )
    head, auto_class = known
    try:
        model, info = _from_pretrained(head, auto_class, path, {**_UNLESS_ASKED, **init_kwargs})
    except Exception as error:  # upstream and safetensors raise many kinds
        secrets = set(secrets_in(init_kwargs))
        line = scrub((str(error).splitlines() or [""])[0], secrets)
        cause = error if scrub(str(error), secrets) == str(error) else None  # its traceback would show a secret
        said = f"{auto_class.__name__} can load ({type(error).__name__}: {line})"
        if init_kwargs and isinstance(error, (TypeError, RuntimeError, ImportError)):
            expected, mend = f"arguments with which {said}", "Check their names and values."
            raise ValueError(message("teacher_model_init_kwargs", quoted(init_kwargs), expected, mend)) from cause
        mend = "Check the path for a typing error."
        if any(Path(path).glob("*.bin")):
            mend = (
                "Its weights are a pickle, which can run code: save them again as safetensors, or, if you trust "
                'whoever made it, set teacher_model_init_kwargs to {"use_safetensors": false}.'
            )
        if "custom code" in str(error):
            mend = (
                "It comes with code of its own: read it, and if you trust it, set teacher_model_init_kwargs to "
                '{"trust_remote_code": true}.'
            )
        expected = f"a folder with config.json and safetensors weights, or a hub name, that {said}"
        raise ValueError(message("teacher_model", repr(path), expected, mend)) from cause
    if init_kwargs.get("device_map") is not None and getattr(model, "hf_device_map", None) is None:
        model.hf_device_map = {"": model.device}  # upstream notes a map of several devices only
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if fresh:
        fail(
            "teacher_model",
            repr(path),
            "a checkpoint already fine-tuned for the student's task",
            f"Fine-tune the teacher first, or name a checkpoint that has the head of {type(model).__name__}.",
            because=f"these of its weights would be newly initialised and teach noise: {', '.join(fresh[:4])}",
        )
    return model
