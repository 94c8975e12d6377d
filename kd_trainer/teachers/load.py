"""A teacher loaded from a folder or by its hub name, with the class that fits the student's task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..redaction import scrub, secrets_in
from ..tasks import (
    TASKS,
    Task,
    auto_class_of,
    auto_classes,
)
from ..validation import fail, message, quoted


def _from_pretrained(task: Task, auto_class: Any, path: str, kwargs: dict[str, Any]) -> tuple[Any, dict]:
    """(model, loading info) by the student's Auto class; where that has none for the config, by another of its task.

    A causal teacher that reads images or speech too has another Auto class than a student of text alone.
    """
    others = [*auto_classes(task), *(auto_classes(TASKS["seq2seq_lm"]) if task.left_to_right else ())]
    first_error = None
    for candidate in dict.fromkeys([auto_class, *others]):
        try:
            return candidate.from_pretrained(path, output_loading_info=True, **kwargs)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            first_error = first_error or error
    raise first_error or AssertionError("there is at least the student's own Auto class")


# Nothing is unpickled and no code of the checkpoint is run; without a value, upstream waits for an answer at the
# terminal.
_SAFE_LOADING = {"use_safetensors": True, "trust_remote_code": False}


def load_teacher(
    teacher_model: nn.Module | str | Path, student: nn.Module, init_kwargs: dict[str, Any], task: Task | None = None
) -> nn.Module:
    """The teacher as the module that is run: itself, or loaded by path with the Auto class of the student's task.

    A path is read from safetensors, and no remote code runs, unless `init_kwargs` says otherwise.

    Args:
        task: of the student; None where it is not known yet.

    Raises:
        TypeError: neither a module nor a path.
        ValueError: the path cannot be loaded, the student's task is unknown, or the head would be newly initialised.
    """
    if isinstance(teacher_model, nn.Module):
        if init_kwargs:
            fix = "Leave it out, or give the teacher by path."
            fail("teacher_model_init_kwargs", quoted(init_kwargs), "nothing where the teacher is a module", fix)
        return teacher_model if task is None else task.teacher_module(teacher_model)
    if not isinstance(teacher_model, (str, Path)):
        shown = f"of type {type(teacher_model).__name__}"
        fail("teacher_model", shown, "a torch module, a folder or a hub name", "Load the model first.", error=TypeError)
    path = str(teacher_model)
    known = auto_class_of(student)
    if task is not None and task.embeds and (known is None or not known[0].embeds):
        known = task, auto_classes(task)[0]  # any student may have a vector of each row
    if known is None or known[1] is None:
        fail(
            "teacher_model",
            repr(path),
            "a module, because no Auto class of transformers has a student of type " + type(student).__name__,
            "Load the teacher yourself and give the module.",
        )
    loaded_as, auto_class = known
    folder = None if task is None else task.teacher_folder(path, init_kwargs)
    place = {"subfolder": folder.transformer} if folder is not None and folder.transformer else {}
    try:
        model, info = _from_pretrained(loaded_as, auto_class, path, {**_SAFE_LOADING, **place, **init_kwargs})
    except Exception as error:  # upstream and safetensors raise many kinds
        secrets = set(secrets_in(init_kwargs))
        line = scrub((str(error).splitlines() or [""])[0], secrets)
        cause = error if scrub(str(error), secrets) == str(error) else None  # its traceback would show a secret
        loadable = f"{auto_class.__name__} can load ({type(error).__name__}: {line})"
        if init_kwargs and isinstance(error, (TypeError, RuntimeError, ImportError)):
            expected, fix = f"arguments with which {loadable}", "Check their names and values."
            raise ValueError(message("teacher_model_init_kwargs", quoted(init_kwargs), expected, fix)) from cause
        fix = "Check the path for a typing error."
        if any(Path(path).glob("*.bin")):
            fix = (
                "Its weights are a pickle, which can run code: save them again as safetensors, or, if you trust "
                'its source, set teacher_model_init_kwargs to {"use_safetensors": false}.'
            )
        if "custom code" in str(error):
            fix = (
                "It comes with code of its own: read it, and if you trust it, set teacher_model_init_kwargs to "
                '{"trust_remote_code": true}.'
            )
        expected = f"a folder with config.json and safetensors weights, or a hub name, that {loadable}"
        raise ValueError(message("teacher_model", repr(path), expected, fix)) from cause
    if init_kwargs.get("device_map") is not None and getattr(model, "hf_device_map", None) is None:
        model.hf_device_map = {"": model.device}  # upstream notes a map of several devices only
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    fresh = [name for name in fresh if not name.startswith(loaded_as.unread_weights)]
    if fresh:
        fail(
            "teacher_model",
            repr(path),
            "a checkpoint already fine-tuned for the student's task",
            f"Fine-tune the teacher first, or name a checkpoint that has the head of {type(model).__name__}.",
            because=f"these of its weights would be newly initialised and teach noise: {', '.join(fresh[:4])}",
        )
    return model if task is None else task.teacher_module(model, folder)
