"""A model's outputs as upstream's `prediction_step` and `evaluation_loop` take them.

For: `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.trainer_pt_utils import nested_detach


def tensors_alone(outputs: Any) -> Any:
    """Without what is no tensor (caches, text, None, ...), None if nothing is left: upstream joins all it is given."""
    if isinstance(outputs, (list, tuple)):
        kept = [tensors for value in outputs if (tensors := tensors_alone(value)) is not None]
        return (kept if isinstance(outputs, list) else tuple(kept)) if kept else None
    if isinstance(outputs, Mapping):
        named = {name: tensors_alone(value) for name, value in outputs.items()}
        named = {name: tensors for name, tensors in named.items() if tensors is not None}
        return type(outputs)(named) if named else None  # type: ignore[call-arg]
    return outputs if isinstance(outputs, Tensor) else None


def kept_outputs(outputs: Mapping[str, Any], model: Any, ignore_keys: Any) -> Any:
    """What upstream's prediction step returns of a model's outputs: detached, without the loss and what is ignored."""
    if ignore_keys is None:
        config = getattr(model, "config", None)
        default = [] if config is None else ["past_key_values", "cache"]  # before and from transformers 5.24
        ignore_keys = getattr(config, "keys_to_ignore_at_inference", default)
    kept = nested_detach(tuple(v for k, v in outputs.items() if k not in [*ignore_keys, "loss"]))
    return kept[0] if len(kept) == 1 else kept


def as_mapping(outputs: Any, loss: Tensor) -> Any:
    """Upstream's `prediction_step` takes the values of a mapping, less "loss": so every kind of output becomes one."""
    if isinstance(outputs, Tensor):
        return {"loss": loss, "logits": outputs}
    if isinstance(outputs, Mapping):
        outputs["loss"] = loss  # type: ignore[index]
        return outputs
    scalars_dropped = [v for v in outputs if not (isinstance(v, Tensor) and v.dim() == 0)]
    return {"loss": loss, **{f"output_{i}": v for i, v in enumerate(scalars_dropped)}}
