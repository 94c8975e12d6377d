"""A model's outputs as upstream's `prediction_step` and `evaluation_loop` take them.

For: `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
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


def kept_tensors(outputs: Any) -> Any:
    """The predictions that upstream joins over batches: `tensors_alone`, of a tuple of one that one."""
    outputs = tensors_alone(outputs)
    return outputs[0] if isinstance(outputs, tuple) and len(outputs) == 1 else outputs


def kept_outputs(outputs: Mapping[str, Any], model: Any, ignore_keys: Any) -> Any:
    """What upstream's prediction step returns of a model's outputs: detached, without the loss and what is ignored."""
    if ignore_keys is None:
        config = getattr(model, "config", None)
        default = [] if config is None else ["past_key_values", "cache"]  # before and from transformers 5.24
        ignore_keys = getattr(config, "keys_to_ignore_at_inference", default)
    kept = nested_detach(tuple(v for k, v in outputs.items() if k not in [*ignore_keys, "loss"]))
    return kept[0] if len(kept) == 1 else kept


def generated_with_loss(
    stock: Callable[..., Any],
    compute_loss: Callable[..., Tensor],
    inputs: dict[str, Any],
    taken: Container[str],
    distils: bool,
) -> tuple[Any, Any, Any]:
    """Upstream's generating prediction step, with the distillation loss in the place of the model's own.

    Args:
        stock: `Seq2SeqTrainer.prediction_step` as a function of model and inputs.
        compute_loss: the loss of a batch.
        inputs: prepared; `taken` names those that `generate` takes: it rejects columns that only the teacher reads.
        distils: whether a batch without labels has a loss.
    """

    def distilled(**_: Any) -> dict[str, Tensor]:
        return {"loss": compute_loss(inputs)}

    own = {name: value for name, value in inputs.items() if name in taken}
    loss, tokens, labels = stock(distilled, own)
    if loss is None and distils and "decoder_input_ids" in inputs:
        with torch.no_grad():
            loss = compute_loss(inputs)
    return loss, tokens, labels


def as_mapping(outputs: Any, loss: Tensor) -> Any:
    """Upstream's `prediction_step` takes the values of a mapping, less "loss": so every kind of output becomes one."""
    if isinstance(outputs, Tensor):
        return {"loss": loss, "logits": outputs}
    if isinstance(outputs, Mapping):
        outputs["loss"] = loss  # type: ignore[index]
        return outputs
    scalars_dropped = [v for v in outputs if not (isinstance(v, Tensor) and v.dim() == 0)]
    return {"loss": loss, **{f"output_{i}": v for i, v in enumerate(scalars_dropped)}}
