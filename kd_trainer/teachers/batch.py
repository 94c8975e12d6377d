"""What the teacher's forward is given of a batch: in its dtype, on its device, and never to write in.

For: `live.py`. The student reads the same tensors afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..validation import fail


def floating_dtypes(model: nn.Module) -> list[torch.dtype]:
    """The floating dtypes of the parameters, in their order: the first ones belong to what reads the inputs."""
    return list(dict.fromkeys(p.dtype for p in model.parameters() if p.is_floating_point()))


class TeacherBatch:
    """Prepares inputs for a teacher, and finds out whether it writes into them.

    A teacher that changes its inputs in place is found on its first batch, which is put back from a copy; from then on
    it gets copies alone. Any other gets the batch's own tensors, and their version counters are compared afterwards,
    which costs no look at the device.
    """

    def __init__(self) -> None:
        # Of floating inputs, the likeliest first; None: as they come. Of several the first batch decides.
        self.dtypes: list[torch.dtype | None] = [None]
        self.device: torch.device | None = None  # of a teacher that its loader placed; None: where the batch is
        self.writes: bool | None = None  # None: not known before the first batch

    def forward(self, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """call(**inputs) on inputs of the teacher's own.

        Raises:
            RuntimeError: it has written into a tensor of the batch, and did not on the first one.
        """
        while True:
            try:
                return self._forward(call, inputs)
            except RuntimeError as error:
                if self.writes is not None or len(self.dtypes) < 2 or not _is_about_dtypes(error):
                    raise
                del self.dtypes[0]

    def _forward(self, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        # Name, tensor, its version, and on the first batch a copy.
        shared: list[tuple[str, Tensor, int, Tensor | None]] = []

        def given(name: str, tensor: Tensor) -> Tensor:
            made = self._moved(name, tensor)
            if made is not tensor:
                return made
            if self.writes or tensor.is_inference():  # the latter have no version
                return tensor.clone()
            shared.append((name, tensor, tensor._version, tensor.clone() if self.writes is None else None))
            return tensor

        handed = {name: _rebuilt(value, partial(given, name)) for name, value in inputs.items()}
        try:
            outputs = call(**handed)
        finally:
            written = [each for each in shared if self._has_changed(*each[1:])]
            for _, tensor, _, copy in written:
                if copy is not None:
                    with torch.no_grad():
                        tensor.copy_(copy)
        if self.writes is None:
            self.writes = bool(written)
        elif written:
            fail(
                "teacher_model",
                f"a model whose forward writes into its input {written[0][0]!r}",
                "a forward that leaves its inputs as they are, as on the first batch",
                "Let it write into a copy (.clone()).",
                because="the student reads the same tensors",
                error=RuntimeError,
            )
        return outputs

    @staticmethod
    def _has_changed(tensor: Tensor, version: int, copy: Tensor | None) -> bool:
        return tensor._version != version or (copy is not None and not _same(tensor, copy))

    def _moved(self, name: str, tensor: Tensor) -> Tensor:
        dtype = self.dtypes[0] if tensor.is_floating_point() else None
        if dtype is not None and dtype != tensor.dtype and name.endswith("mask"):
            limits = torch.finfo(dtype)  # what is added for padding would become -inf, of which a whole row is NaN
            tensor = tensor.clamp(limits.min, limits.max)
        return tensor.to(device=self.device, dtype=dtype)


def _is_about_dtypes(error: RuntimeError) -> bool:
    return any(words in str(error) for words in ("dtype", "scalar type", "should be the same", "expected m1 and m2"))


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(x.nan_to_num() if x.is_floating_point() else x for x in (one, other)))


def _rebuilt(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with its tensors changed; dicts, lists and tuples are new ones."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        made = {key: _rebuilt(each, change) for key, each in value.items()}
        return made if type(value) is dict else type(value)(made)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_rebuilt(each, change) for each in value))
    if type(value) in (list, tuple):
        return type(value)(_rebuilt(each, change) for each in value)
    return value
