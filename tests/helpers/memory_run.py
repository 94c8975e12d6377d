"""Measures what a step of a real run takes: resident bytes of this process, part by part. Used by test_memory.py.

Usage: memory_run.py OUT BACKEND,... CASE...; in a fresh process, or in two by `accelerate launch`, with `MEASURED` in
the environment. Results go into OUT.
"""

from __future__ import annotations

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
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainerCallback

from kd_trainer import DistillationTrainer
from kd_trainer.losses import fused_linear
from kd_trainer.teachers.live import ADAPTER_OFF
from tests.helpers import backend_run, tiny

# So that the process's resident bytes are those of its tensors: tensors give their memory back at once, and MKL keeps
# none of its own (about 30 MB).
MEASURED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1", "OMP_NUM_THREADS": "1"}
BUCKET = 1_000_000  # DeepSpeed's default of 500 million would be most of the memory of models as small as these


@dataclass(frozen=True)
class Case:
    """A pair, rows and tokens of a batch, training arguments."""

    task: str = "causal_lm"
    rows: int = 2
    length: int = 256
    arguments: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    lora: bool = False  # the student learns from its own base


CASES = {
    "fused": Case(),
    "few": Case(rows=1, length=128),
    "tied": Case(rows=4, length=192, tied=True),
    "full": Case(arguments={"kd_loss_implementation": "full"}),
    "accumulated": Case(rows=1, arguments={"gradient_accumulation_steps": 2}),
    "checkpointed": Case(arguments={"gradient_checkpointing": True, "kd_loss_implementation": "full"}),
    "bf16": Case(arguments={"bf16": True}),
    "adapters": Case(rows=1, lora=True),
    "classification": Case("classification", rows=5, length=128),
}


def configs(case: Case) -> tuple[Any, Any]:
    """Of student and teacher: about 15 and 30 million parameters."""
    if case.task == "classification":
        sizes = ((320, 4, 5), (448, 6, 7))
        return tuple(
            BertConfig(vocab_size=16_000, hidden_size=h, num_hidden_layers=n, num_attention_heads=a,
                       intermediate_size=4 * h, num_labels=10) for h, n, a in sizes
        )  # fmt: skip
    return tuple(
        LlamaConfig(vocab_size=16_000, hidden_size=h, num_hidden_layers=n, num_attention_heads=a,
                    num_key_value_heads=a, intermediate_size=i, tie_word_embeddings=case.tied)
        for h, n, a, i in ((320, 4, 5, 864), (448, 6, 7, 1216))
    )  # fmt: skip


def models(case: Case, both: tuple[Any, Any]) -> tuple[nn.Module, Any]:
    """Student and teacher, by the context: in memory or on the meta device."""
    model_class = LlamaForCausalLM if case.task == "causal_lm" else BertForSequenceClassification
    student = model_class(both[0])
    if not case.lora:
        return student, model_class(both[1])
    import peft

    return peft.get_peft_model(student, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])), ADAPTER_OFF


def small(config: Any) -> Any:
    """One that runs through the same code, so that all of it is loaded before the measurement."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    grouped = {"num_key_value_heads": 1, "head_dim": 32} if hasattr(config, "num_key_value_heads") else {}
    return type(config).from_dict({**config.to_dict(), **sizes, **grouped})


def data(case: Case, vocabulary: int, rows: int, length: int) -> list[dict[str, Any]]:
    ids = torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids if case.task == "causal_lm" else torch.zeros(rows, dtype=torch.long)
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]


def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def resident(which: str = "VmRSS") -> int:
    """Bytes of this process in memory; "VmHWM": the most since `restart`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def restart() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Watch(TrainerCallback):
    """What is resident when: "placed" before the first step, "rest" before the second, "peak" in the second."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._note("placed", "rest")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen["peak"] = resident("VmHWM")
        self._note("stepless", "gradients")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen["peak"] = max(self.seen["peak"], resident("VmHWM"))
        self._note("stepped", "end")

    def _note(self, first: str, second: str) -> None:
        gc.collect()
        self.seen[second if first in self.seen else first] = resident()
        restart()


def backend_arguments(backend: str) -> dict[str, Any]:
    if backend == "fsdp2":
        config = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "reshard_after_forward": True}
        return {"fsdp": True, "fsdp_config": config}
    if not backend.startswith("zero"):
        return {}
    zero = {"stage": int(backend[-1]), "overlap_comm": True, "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET}  # fmt: skip
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"deepspeed": {**dict.fromkeys(sizes, "auto"), "zero_optimization": zero, "bf16": {"enabled": "auto"}}}


def run(case: Case, backend: str, both: tuple[Any, Any], rows: int, length: int, out: Path) -> dict[str, Any]:
    """Bytes of the parts and, as "total", the peak of the second step, over what was there before."""
    fused_linear._KEPT.__dict__.clear()
    gc.collect()
    start, watch, body = resident(), Watch(), {}
    student, teacher = models(case, both)
    settings = {
        "max_steps": 2, "per_device_train_batch_size": rows, "optim": "adamw_torch_fused", "learning_rate": 1e-3,
        "max_grad_norm": 1.0, **({"kd_reduction": "tokenmean"} if case.task == "causal_lm" else {}), **case.arguments,
        **backend_arguments(backend),
    }  # fmt: skip
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=tiny.arguments(out / "run", **settings), callbacks=[watch],
        train_dataset=data(case, both[0].vocab_size, 8 * rows, length), data_collator=stack,
    )  # fmt: skip
    inner = next(m for m in student.modules() if type(m).__name__ in ("LlamaModel", "BertModel"))
    inner.register_forward_pre_hook(lambda *_: body.update(before=resident()))
    inner.register_forward_hook(lambda *_: body.update(after=resident()))
    trainer.train()
    seen = watch.seen
    return {
        "weights": seen["placed"] - start,
        "optimizer": seen["stepped"] - seen["stepless"],
        "gradients": seen["gradients"] - seen["rest"],
        "activations": body["after"] - body["before"],
        "total": seen["peak"] - start,
        "world_size": trainer.accelerator.num_processes,
        "wrapper": [c.__name__ for c in type(trainer.model_wrapped).__mro__],
    }


def main(out: Path, backends: list[str], names: list[str]) -> None:
    gc.freeze()  # what is imported is not to be looked through again and again
    warm = set()
    for backend in backends:
        if backend == "fsdp2":
            backend_run.run_fsdp2_on_cpu()
        elif backend.startswith("zero"):
            backend_run.run_deepspeed_on_cpu()
        for name in names:
            case = CASES[name]
            both = configs(case)
            if (backend, case.task) not in warm:
                run(case, backend, (small(both[0]), small(both[0])), 1, 16, out)
                warm.add((backend, case.task))
            found = run(case, backend, both, case.rows, case.length, out)
            process = os.environ.get("RANK", "0")
            (out / f"{backend}_{name}_{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
