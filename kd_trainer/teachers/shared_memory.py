"""Does the teacher stay what it is while the student trains? Compares memory, not objects.

For: `training/setup_checks.py`, before the first step. What both models may share is what does not change: parameters
that are frozen in the student, and buffers that its forward does not update.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..tasks import unchanged_modes
from ..validation import fail

_FIX = "Load the teacher as a model of its own, e.g. copy.deepcopy(model) of the trained one"


def check_separate(student: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    """Refuses a teacher whose memory the student's training would change.

    Views, slices, tied weights and `load_state_dict(..., assign=True)` share memory without sharing a parameter.

    Returns:
        The student's buffers that lie in the teacher's memory and are not known to be updated: whether they are, only a
        forward of training tells (`watch_shared_buffers`).

    Raises:
        ValueError: the teacher is the student, or has memory in common with a parameter that the student trains or with
            the running statistics of a normalisation.
    """
    if student is teacher:
        because = "the student would be compared with itself"
        fail("teacher_model", "the student itself", "a second model", f"{_FIX}.", because=because)
    held = _Memory([*teacher.parameters(), *teacher.buffers()])
    trained = [name for name, p in student.named_parameters() if p.requires_grad and held.has(p)]
    if trained:
        _fail_shared(f"{len(trained)} parameters with the student ({trained[0]})", "freeze them in the student")
    buffers = {name: buffer for name, buffer in student.named_buffers() if held.has(buffer)}
    updated = [name for name in _running_statistics(student) if name in buffers] if buffers else []
    if updated:
        _fail_shared(f"{len(updated)} buffers with the student ({updated[0]})", "keep their modules in eval mode")
    return buffers


def _fail_shared(what: str, keep: str) -> NoReturn:
    because = "training the student would change its teacher"
    shown = f"a model that shares {what}"
    fail("teacher_model", shown, "memory of its own there", f"{_FIX}, or {keep}.", because=because)


def _running_statistics(student: nn.Module) -> list[str]:
    """Names of the buffers that normalisations update when the student is in training mode."""
    with unchanged_modes(student):
        student.train()  # as upstream does before every step; a frozen part may override it and stay in eval mode
        return [
            f"{name}.{buffer}" if name else buffer
            for name, module in student.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.training
            for buffer, _ in module.named_buffers(recurse=False)
        ]


def watch_shared_buffers(student: nn.Module, buffers: dict[str, Tensor]) -> Any:
    """Compares buffers shared with the teacher around the student's first forward in training mode, once.

    Returns:
        The handle of a forward hook, which removes itself; None where nothing is shared.

    Raises:
        ValueError: (in that forward) it has changed one of them.
    """
    if not buffers:
        return None
    before = {name: buffer.detach().clone() for name, buffer in buffers.items()}

    def compare(module: nn.Module, *_: Any) -> None:
        if not module.training:
            return
        handle.remove()
        changed = [name for name, buffer in buffers.items() if not torch.equal(buffer, before[name].to(buffer.device))]
        if changed:
            what = f"{len(changed)} buffers with the student, whose forward updates them ({changed[0]})"
            _fail_shared(what, "give the student buffers of its own")

    handle = student.register_forward_hook(compare)
    return handle


class _Memory:
    """The memory of some tensors, to find out whether others share a byte with it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._ids = {id(tensor) for tensor in tensors}  # tensors on the meta device have no memory to compare
        parts = [part for tensor in tensors for part in _plain(tensor)]
        self._spans: dict[torch.device, list[tuple[int, int, Tensor]]] = {}
        for part in parts:
            self._spans.setdefault(part.device, []).append((*_span(part), part))
        self._longest: dict[torch.device, int] = {}
        for device, spans in self._spans.items():
            spans.sort(key=lambda span: span[:2])
            self._longest[device] = max(stop - start for start, stop, _ in spans)

    def has(self, tensor: Tensor) -> bool:
        return id(tensor) in self._ids or any(self._overlaps(part) for part in _plain(tensor))

    def _overlaps(self, tensor: Tensor) -> bool:
        spans = self._spans.get(tensor.device, [])
        start, stop = _span(tensor)
        first = bisect_left(spans, start - self._longest.get(tensor.device, 0), key=lambda span: span[0])
        for low, high, other in spans[first:]:
            if low >= stop:
                return False
            if high > start and _same_elements(tensor, other):
                return True
        return False


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The strided tensors with memory inside a tensor: itself, or the parts of a sharded or quantised one."""
    held = getattr(tensor, "ds_tensor", None)  # DeepSpeed ZeRO-3 keeps its share of a parameter beside it
    if isinstance(held, Tensor):
        yield from _plain(held)
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a DTensor also names its mesh
                yield from _plain(part)
    elif tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.numel():
        yield tensor.detach()


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _same_elements(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose spans overlap have an element in common; rows and columns of one matrix need not."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    size = one.element_size()
    low = min(_span(one)[0], _span(other)[0])
    if size != other.element_size() or any((t.data_ptr() - low) % size for t in (one, other)):
        return True  # read as numbers of another size: taken for shared
    count = (max(_span(one)[1], _span(other)[1]) - low) // size
    marks = torch.zeros(count, dtype=torch.bool)
    marks.as_strided(one.shape, one.stride(), (one.data_ptr() - low) // size).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), (other.data_ptr() - low) // size).any())
