"""Cases of `test_backends.py`: each runs in that process alone, and here by `accelerate launch` in two processes.

Usage: backend_run.py OUT BACKEND,... CASE... with the teachers' checkpoints in OUT; a backend is ddp, fsdp2, zero2 or
zero3. Results go into OUT, or OUT/BACKEND for several.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from transformers import BertModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from kd_trainer.tasks import output_head
from kd_trainer.teachers.live import ADAPTER_OFF
from tests.helpers import tiny
from tests.helpers.launch import leave


@dataclass(frozen=True)
class Case:
    """A run: the teacher's kind, training arguments of every run of it, and those of the two processes alone."""

    teacher: str
    arguments: dict[str, Any] = field(default_factory=dict)
    in_two: dict[str, Any] = field(default_factory=dict)


SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
SELECTED = {"kd_position_fraction": 0.5, "learning_rate": 0.02}
FEATURES = {"relation": 1.0, "attention": 0.5, "hidden_mse": 0.5, "hidden_cosine": 0.5}
CASES = {
    "same_layers": Case("llama"),
    "other_layers": Case("gpt2", {"max_steps": 8, **SELECTED}, SPLIT),
    "by_path": Case("gpt2", {"max_steps": 4}),
    "plain": Case("plain", {"max_steps": 4}),
    "bf16": Case("llama", {"bf16": True, "max_steps": 2}),
    "plain_bf16": Case("plain", {"bf16": True, "max_steps": 2}),
    "resumed": Case("llama", {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 6}),
    "fused": Case("llama", {"kd_loss_implementation": "fused"}),
    "fused_other_layers": Case("gpt2", {"kd_loss_implementation": "fused", "max_steps": 8, **SELECTED}, SPLIT),
    "fused_bf16": Case("llama", {"kd_loss_implementation": "fused", "bf16": True, "max_steps": 2}),
    "evaluated": Case("llama", {"max_steps": 0}),
    "adapter_off": Case("lora", {"max_steps": 6, "learning_rate": 0.02}),
    "own_loss": Case("own", {"max_steps": 6}, SPLIT),
    # The student's layers are narrower: the hidden states have projectors.
    "features": Case(
        "llama",
        {"kd_features": FEATURES, "kd_feature_layers": "uniform", "max_steps": 6, **SELECTED},
        SPLIT,
    ),
    "features_resumed": Case(
        "llama",
        {
            **{"kd_features": {"hidden_mse": 0.5}, "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 6},
            "ddp_find_unused_parameters": False,
        },
    ),
    # Of a teacher of another width, with a projector. The bias of keys has a gradient of rounding errors alone, which a
    # larger epsilon keeps small.
    "embedding_resumed": Case(
        "embedding", {"optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 0.02, "max_steps": 6}
    ),
    "student_rows": Case("llama", {"kd_student_fraction": 0.75, "kd_max_new_tokens": 6, "max_steps": 6}),
    "unknown_head": Case("scaled", {"max_steps": 6, "kd_loss_implementation": "auto"}),
}
RESUMED = ("resumed", "features_resumed", "embedding_resumed")
OWN_TEACHER = [name for name, case in CASES.items() if case.teacher not in ("lora", "embedding")]


class Scaled(LlamaForCausalLM):
    """Scales its logits in its forward alone: the fused loss must find out and fall back."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids, attention_mask, **kwargs)
        outputs.logits = 1.5 * outputs.logits
        return outputs


class Smoothing(LlamaForCausalLM):
    """Computes its loss itself, divided by upstream's num_items_in_batch."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, num_items_in_batch: Any = None
    ) -> Any:
        outputs = super().forward(input_ids, attention_mask)
        if labels is not None:
            logits, targets = outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            total = nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.3)
            outputs.loss = total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return outputs

    accepts_loss_kwargs = True


STUDENTS = {"scaled": Scaled, "own": Smoothing}


def zero_config(stage: int, *, has_config: bool) -> dict[str, Any]:
    """Threshold 0: parameters as small as these would otherwise stay whole in every process."""
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
        "reduce_bucket_size": "auto" if has_config else 1000,  # upstream reads it off the student's config
        "stage3_prefetch_bucket_size": 1000,
    }
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**dict.fromkeys(sizes, "auto"), "zero_optimization": zero, "bf16": {"enabled": "auto"}}


def pair(kind: str) -> tuple[nn.Module, Any]:
    """(student, teacher or its name). GPT-2 has other layers than the student, dropout and a head tied to its input."""
    torch.manual_seed(0)
    if kind == "plain":
        return tiny.Plain(), tiny.Plain()
    if kind == "embedding":
        config = functools.partial(tiny.bert_config, initializer_range=0.5)
        # A pooler has no gradient, and FSDP2 loads no optimizer state of which a parameter has none.
        return BertModel(config(16), add_pooling_layer=False), BertModel(config(24), add_pooling_layer=False)
    student = STUDENTS.get(kind, LlamaForCausalLM)(tiny.llama_config(16, num_hidden_layers=2))
    if kind == "lora":
        import peft

        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(student, config), ADAPTER_OFF
    if kind in ("llama", *STUDENTS):
        return student, LlamaForCausalLM(tiny.llama_config(24, num_hidden_layers=3))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = GPT2Config(vocab_size=tiny.VOCAB, n_positions=32, n_embd=24, n_layer=2, n_head=2, **ids)
    return student, GPT2LMHeadModel(config).train()


def build(name: str, out: Path, folder: Path, **arguments: Any) -> Any:
    """The trainer of a case; `arguments` are training arguments on top of the case's own."""
    case = CASES[name]
    student, teacher = pair(case.teacher)
    settings = {"max_steps": 20, "kd_reduction": "tokenmean", "per_device_eval_batch_size": 4, **case.arguments}
    if name == "by_path":
        teacher, settings["teacher_model_name_or_path"] = None, str(out / case.teacher)
    return tiny.trainer(task_of(name), folder, pair=(student, teacher), **{**settings, **arguments})


def task_of(name: str) -> str:
    return {"plain": "plain", "embedding": "embedding"}.get(CASES[name].teacher, "causal_lm")


def run_fsdp2_on_cpu() -> None:
    """Accelerate makes FSDP of GPUs only, and resets the type whenever its state is made again."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
        if getattr(self, "fsdp_plugin", None) is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def run_deepspeed_on_cpu() -> None:
    """Its reduction through shared memory would be compiled first; gloo's needs no compiler."""
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None


def facts(run: Any, name: str, backend: str) -> dict[str, Any]:
    """What accelerator, wrappers and shards look like on this process after the run."""
    batch = run._prepare_inputs(tiny.pad(tiny.rows(task_of(name), 2)))
    found: dict[str, Any] = {
        "world_size": run.accelerator.num_processes,
        "fused": run._plan.heads is not None,
        "own_loss": run._plan.own_loss,
        "student_wrapper": [c.__name__ for c in type(run.model_wrapped).__mro__],
        "known_models": [known is run.model_wrapped for known in run.accelerator._models],
        "logs": tiny.logs(run),
    }
    if name not in OWN_TEACHER:
        return found
    model, (_, fresh) = run.teacher.model, pair(CASES[name].teacher)
    found |= {
        "teacher_wrapper": [c.__name__ for c in type(run.teacher.prepared).__mro__],
        "teacher_training": any(module.training for module in model.modules()),
        "teacher_gradients": [n for n, p in model.named_parameters() if p.requires_grad or p.grad is not None],
        "teacher_dtype": str(run.teacher(batch, run.accelerator).dtype),
    }
    more = {"fsdp2": fsdp2_facts, "zero3": zero3_facts}.get(backend, whole_facts)
    return {**found, **more(run, model, dict(fresh.named_parameters()))}


def only_student(run: Any, optimized: set[int]) -> bool:
    """Whether these are the student's parameters, and as many more as the projectors have that are gone again."""
    student, projectors = ({id(p) for p in module.parameters()} for module in (run.model, run._term_modules._modules))
    return student <= optimized and len(optimized) == len(student) + len(projectors)


def fsdp2_facts(run: Any, model: nn.Module, fresh: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    plugin = run.accelerator.state.fsdp_plugin
    parameters = dict(model.named_parameters())
    sharded = {n: p for n, p in parameters.items() if isinstance(p, DTensor)}
    classes = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    return {
        "share": sum(p.to_local().numel() for p in sharded.values()) / sum(p.numel() for p in fresh.values()),
        "gathered": sorted(set(parameters) - set(sharded)),
        "unchanged": all(torch.equal(p.full_tensor(), fresh[n]) for n, p in sharded.items()),
        "only_student_optimized": only_student(run, optimized),
        # The second base of a sharded module's class is the class it had before.
        "units": sorted(type(m).__mro__[2].__name__ for m in model.modules() if isinstance(m, FSDPModule)),
        "policy": [sorted(c.__name__ for c in classes), plugin.transformer_cls_names_to_wrap],
    }


def zero3_facts(run: Any, model: nn.Module, fresh: dict[str, Any]) -> dict[str, Any]:
    import deepspeed

    parameters = dict(model.named_parameters())
    optimized = {id(p) for group in getattr(run.model_wrapped.optimizer, "fp16_groups", ()) for p in group}
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        unchanged = all(torch.equal(p, fresh[n].to(p.dtype)) for n, p in parameters.items())
    return {
        "share": sum(p.ds_tensor.numel() for p in parameters.values()) / sum(p.numel() for p in fresh.values()),
        "gathered": [n for n, p in parameters.items() if p.ds_status.name != "NOT_AVAILABLE"],
        "persistent": [n for n, p in parameters.items() if p.ds_persist],
        "unchanged": unchanged,
        "only_student_optimized": only_student(run, optimized),
        "student_config_has": sorted(run.accelerator.state.deepspeed_plugin.deepspeed_config),
        "teacher_config_has": sorted(run.teacher.prepared.config),
    }


def whole_facts(run: Any, model: nn.Module, fresh: dict[str, Any]) -> dict[str, Any]:
    return {
        "share": sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in fresh.values()),
        "unchanged": all(torch.equal(p, fresh[n].to(p.dtype)) for n, p in model.named_parameters()),
    }


def begin(backend: str) -> None:
    """Clears what the arguments of the backend before have set, and has this one run on the CPU."""
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(variable, None)
    if backend == "fsdp2":
        run_fsdp2_on_cpu()
    elif backend.startswith("zero"):
        run_deepspeed_on_cpu()


def arguments_of(backend: str, *, loads_once: bool = False, has_config: bool = True) -> dict[str, Any]:
    """Training arguments for two processes with four rows each.

    Args:
        loads_once: FSDP2 has one process load the weights for all. has_config: whether the student has one.
    """
    arguments: dict[str, Any] = {"per_device_train_batch_size": 4}
    if backend == "fsdp2":
        config = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": loads_once}
        arguments |= {"fsdp": True, "fsdp_config": config}
    elif backend != "ddp":
        arguments["deepspeed"] = zero_config(int(backend[-1]), has_config=has_config)
    return arguments


def main(out: Path, backends: list[str], names: list[str]) -> None:
    for backend in backends:
        begin(backend)
        run_cases(out if len(backends) == 1 else out / backend, backend, names)


def run_cases(out: Path, backend: str, names: list[str]) -> None:
    small = output_head.SMALL_VOCABULARY
    for name in names:
        output_head.SMALL_VOCABULARY = 0 if name == "unknown_head" else small
        folder = out / name
        os.environ.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)
        if CASES[name].teacher == "embedding":  # upstream's own list of BERT's layers parts a tied weight
            os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "BertLayer"
        arguments = arguments_of(backend, loads_once=name == "by_path", has_config=CASES[name].teacher != "plain")
        arguments |= CASES[name].in_two
        if name in RESUMED:
            build(name, out, folder, **arguments, save_strategy="steps", save_steps=3).train()
        run = build(name, out, folder, **arguments)
        if name != "evaluated":
            run.train(resume_from_checkpoint=str(folder / "checkpoint-3") if name in RESUMED else None)
        evaluation = run.evaluate(tiny.rows(task_of(name), 24, seed=2))
        if name != "evaluated":
            run.save_model(str(folder / "saved"))
        found = {**facts(run, name, backend), "evaluation": evaluation}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"process_{run.args.process_index}.json").write_text(json.dumps(found))
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
    leave()
