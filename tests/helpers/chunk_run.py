"""Tiny language models of two tokenizers on aligned texts; as a script two processes train them.

Usage: chunk_run.py OUT BACKEND..., a backend is ddp, fsdp2 or zero3.
"""

from __future__ import annotations

import functools
import gc
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from kd_trainer import DistillationTrainer, TeacherCollator, align_teacher_tokens
from tests.helpers import backend_run, tiny
from tests.helpers.launch import leave

WORDS = "the cat sat on a mat while two quick brown dogs jumped over seven lazy foxes naïve café 東京 👍".split()  # noqa: SIM905
LOGGED = ("loss", "chunks_loss", "hard_loss")


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 6))) for _ in range(count)]


@functools.cache
def tokenizers() -> tuple[Any, Any]:
    """Of student and teacher."""
    special = ["<pad>", "<end>"]
    names = {"pad_token": "<pad>", "eos_token": "<end>"}
    return tuple(
        tiny.byte_level_tokenizer(texts(20, seed), size, special, **names) for seed, size in ((1, 270), (2, 330))
    )  # type: ignore[return-value]


@functools.cache
def rows(count: int = 32, seed: int = 3, masked: bool = True) -> list[dict[str, Any]]:
    """Aligned rows; with `masked`, of every other row the first tokens have no label."""
    student, teacher = tokenizers()
    data = Dataset.from_dict({"text": texts(count, seed)})
    both = {"tokenizer": student, "teacher_tokenizer": teacher}
    made = align_teacher_tokens(data, "text", **both, append_eos=True, remove_columns=["text"])
    return [
        {**row, "labels": [-100 if masked and i % 2 and j < 3 else token for j, token in enumerate(row["input_ids"])]}
        for i, row in enumerate(made)
    ]


def models(seed: int = 0) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    torch.manual_seed(seed)
    sizes = [len(tokenizer) for tokenizer in tokenizers()]
    options = {"max_position_embeddings": 96, "eos_token_id": 1}
    build = [tiny.llama_config(h, vocab_size=size, **options) for h, size in zip((16, 24), sizes, strict=True)]
    return LlamaForCausalLM(build[0]), LlamaForCausalLM(build[1])


def collator(base: Any = tiny.pad) -> TeacherCollator:
    return TeacherCollator(base, tokenizers()[1])


def trainer(output_dir: Path, *, pair: Any = None, data: Any = None, base: Any = tiny.pad, **kwargs: Any) -> Any:
    student, teacher = pair or models()
    settings = {"kd_cross_tokenizer": "chunks", "kd_alpha": 0.6, "kd_reduction": "tokenmean", **kwargs}
    return DistillationTrainer(
        model=student, teacher_model=teacher, args=tiny.arguments(output_dir, **settings), data_collator=collator(base),
        train_dataset=rows() if data is None else data, eval_dataset=rows(21, 4),
    )  # fmt: skip


# In each backend: full logits, the fused loss, and the fused loss from a cache that the two processes build.
CASES = ("full", "fused", "cached")
BACKENDS = ("ddp", "fsdp2", "zero3")


def of_case(case: str, folder: Path, **kwargs: Any) -> Any:
    settings = {"kd_loss_implementation": "full" if case == "full" else "fused", "max_steps": 4, **kwargs}
    if case == "cached":
        settings["teacher_cache_dir"] = str(folder / "cache")
    return trainer(folder / "run", **settings)


def main(out: Path, backends: list[str]) -> None:
    for backend in backends:
        backend_run.begin(backend)
        arguments = backend_run.arguments_of(backend)
        for case in CASES:
            folder = out / backend / case
            run = of_case(case, folder, **arguments)
            run.train()
            run.save_model(str(folder / "saved"))
            sharded = run.teacher.live is not None and run.teacher.live.sharded
            logs = {key: tiny.logged(run, key) for key in LOGGED}
            found = {"world_size": run.accelerator.num_processes, "logs": logs, "sharded": sharded}
            found |= {"fused": run._plan.heads is not None, "metrics": run.evaluate()}
            (folder / f"process_{run.args.process_index}.json").write_text(json.dumps(found))
            run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
