"""The teacher under the accelerator's backend: whole on the device, or sharded as the student is.

For: `live.py`. One device, DDP, FSDP 1 and ZeRO 0 to 2 keep a whole teacher in every process; FSDP2 and DeepSpeed
ZeRO-3 shard it. The teacher never passes through `accelerator.prepare`: the accelerator holds no model but the student,
so that checkpoints, backward and the patch of autocast stay the student's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..validation import fail

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}

# The parts of a DeepSpeed config on weights and the forward pass; the others are of the student's training.
TEACHER_KEYS = ("zero_optimization", "bf16", "fp16", "torch_autocast", "aio", "communication_data_type", "data_types")


def prepare_teacher(model: nn.Module, device: torch.device, accelerator: Any = None) -> nn.Module:
    """Places a frozen teacher as the backend needs it; every process must call it, since sharding is collective.

    Args:
        model: the teacher, changed in place (under DeepSpeed its dtype too); no parameter requires a gradient.
        device: where a whole teacher goes.
        accelerator: the trainer's; None is a single device.

    Returns:
        The module to call: `model` itself, or its `DeepSpeedEngine` under ZeRO-3.
    """
    if accelerator is None:
        return model.to(device)
    if accelerator.is_fsdp2:
        return _shard_fsdp2(model, accelerator)
    _refuse_weights_of_one_process(accelerator)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return model.to(device)
    if plugin.zero_stage == 3:
        return _shard_zero3(model, plugin)
    # There is no autocast under DeepSpeed: it casts the student's weights, and the batch's floating columns with them.
    dtypes = {name: dtype for dtype, name in HALVES.items()}
    if accelerator.mixed_precision in dtypes:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtypes[accelerator.mixed_precision])
    return model.to(device)


def _refuse_weights_of_one_process(accelerator: Any) -> None:
    """FSDP 1 hands the student's weights on from the first process; a whole teacher's would stay empty elsewhere."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if getattr(plugin, "cpu_ram_efficient_loading", False) and accelerator.num_processes > 1:
        because = "only the first process loads weights, and FSDP 1 does not hand a teacher's on"
        fix = 'Set it to false, or take FSDP 2 ("version": 2).'
        fail("fsdp_config: cpu_ram_efficient_loading", True, "false with FSDP 1", fix, because=because)


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the layer classes to shard one by one: transformers' `_no_split_modules` that the model has.

    Less those that hold the input embedding (`BertEmbeddings`): a tied head needs it in a unit of its own.
    """
    named = set(getattr(model, "_no_split_modules", None) or ())
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    layers = [module for module in model.modules() if type(module).__name__ in named]
    holding = {type(layer).__name__ for layer in layers if any(part is embedding for part in layer.modules())}
    return sorted({type(layer).__name__ for layer in layers} - holding)


@contextmanager
def _wrap_policy_of(model: nn.Module, plugin: Any) -> Iterator[None]:
    """Inside, the plugin's wrap policy is that of `model`; afterwards it is the student's again."""
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    policy, names = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    try:
        # For the student upstream has bound it to the student's classes.
        if getattr(policy, "func", policy) is transformer_auto_wrap_policy:
            plugin.auto_wrap_policy = transformer_auto_wrap_policy
            plugin.transformer_cls_names_to_wrap = layer_classes(model)
        yield
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy, names


def _shard_fsdp2(model: nn.Module, accelerator: Any) -> nn.Module:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = accelerator.state.fsdp_plugin
    with _wrap_policy_of(model, plugin):
        model = fsdp2_prepare_model(accelerator, model)
    if plugin.reshard_after_forward:
        # Upstream keeps root and head gathered for a backward that a teacher never has.
        model.set_reshard_after_forward(True)  # type: ignore[operator]
    return model


def zero3_config(student: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The teacher's own DeepSpeed config: the student's less all that is about training.

    Args:
        student: the student's config, which is not changed; values still "auto" become DeepSpeed's defaults.
        model: the teacher; one in half precision keeps it where the student's config sets no other.
    """
    config = {key: copy.deepcopy(student[key]) for key in TEACHER_KEYS if key in student}
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    config["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
    half = next((HALVES[p.dtype] for p in model.parameters() if p.dtype in HALVES), None)
    if half is not None and not any(config.get(name, {}).get("enabled") is True for name in HALVES.values()):
        config[half] = {"enabled": True}
    # DeepSpeed requires a batch size, on which no forward pass depends.
    return {**config, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


def _shard_zero3(model: nn.Module, plugin: Any) -> nn.Module:
    import deepspeed

    named = (plugin.transformer_moe_cls_names or "").split(",")
    leaves = list({type(module) for module in model.modules() if type(module).__name__ in named})
    if leaves:  # experts: the processes do not all call the same ones, so they are gathered together
        deepspeed.utils.set_z3_leaf_modules(model, leaves)
    engine, *_ = deepspeed.initialize(model=model, config=zero3_config(plugin.deepspeed_config, model))
    return engine


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 keeps gathered behind a forward for a backward that does not come; nothing elsewhere."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
