"""Run by `accelerate launch --config_file configs/accelerate/...` from test_accelerate_configs.py: four SGD steps.

Usage: config_run.py OUT TASK...; weights, logs and what the backend made of the models go into OUT.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMultipleChoice,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
)

from kd_trainer import CachedTeacher
from kd_trainer.cache import settings as cache_settings
from tests.helpers import backend_run, tiny
from tests.helpers.launch import leave
from tests.tasks import test_multiple_choice, test_segmentation, test_speech_frames

BERTS = (
    "classification",
    "multi_label_classification",
    "regression",
    "question_answering",
    "token_classification",
    "multiple_choice",
    "embedding",
)
SPEECH = ("audio_frame_classification", "ctc")
TASKS = (*BERTS, *SPEECH, "semantic_segmentation", "masked_lm", "causal_lm", "seq2seq_lm", "plain")
# The teacher's outputs are built into a cache of this format first, by all processes, and read in training.
CACHED = ("causal_lm+hidden", "classification+logits")
# The layers that FSDP2 shards, where the model's own list would part a tied weight: see the comment in fsdp2.yaml.
LAYERS = {**dict.fromkeys(BERTS, "BertLayer"), "masked_lm": "TransformerBlock"}


def bart(hidden: int) -> BartForConditionalGeneration:
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
              (("layers", 1), ("attention_heads", 2), ("ffn_dim", 2 * hidden))}  # fmt: skip
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(
        vocab_size=tiny.VOCAB, d_model=hidden, max_position_embeddings=64, dropout=0.0, init_std=0.3,
        forced_eos_token_id=None, **layers, **ids,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def distilbert(hidden: int) -> DistilBertForMaskedLM:
    """Not BERT: upstream's FSDP2 refuses the bias that its head holds twice."""
    config = DistilBertConfig(
        vocab_size=tiny.VOCAB, dim=hidden, hidden_dim=2 * hidden, n_layers=1, n_heads=2, max_position_embeddings=32,
        dropout=0.0, attention_dropout=0.0, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    return DistilBertForMaskedLM(config)


def build(task: str, folder: Path, **arguments: Any) -> Any:
    torch.manual_seed(0)
    task, _, form = task.partition("+")
    if form:
        cache_settings.SHARD_BYTES = 600  # several shards
        arguments = {"teacher_cache_dir": str(folder / f"cache-{task}"), "teacher_cache_format": form, **arguments}
    if task == "seq2seq_lm":
        pair: Any = (bart(16), bart(24))
    elif task == "masked_lm":
        pair = distilbert(16), distilbert(24)
    elif task == "multiple_choice":
        pair = tuple(BertForMultipleChoice(tiny.bert_config(hidden, initializer_range=0.5)) for hidden in (16, 24))
    elif task == "embedding":  # with a projector
        pair = tuple(BertModel(tiny.bert_config(hidden, initializer_range=0.5)) for hidden in (16, 24))
    elif task in SPEECH:
        pair = test_speech_frames.pair_of(task)
    elif task == "semantic_segmentation":
        pair = test_segmentation.by_row(8), test_segmentation.by_row(16)
    else:
        pair = tiny.models(task)
    if task == "multiple_choice":
        data = test_multiple_choice.rows()
    elif task in SPEECH:
        data = test_speech_frames.rows_of(task)
    elif task == "semantic_segmentation":
        data = test_segmentation.rows(32)
    else:
        data = tiny.rows("causal_lm" if task in ("seq2seq_lm", "masked_lm") else task)
    settings = {"kd_reduction": "tokenmean", "max_steps": 4, **arguments}
    return tiny.trainer(task, folder, pair=pair, data=data, **settings)


def main(out: Path, tasks: list[str]) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        backend_run.run_fsdp2_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        backend_run.run_deepspeed_on_cpu()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for task in tasks:
        os.environ.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)
        if task.partition("+")[0] in LAYERS:
            os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = LAYERS[task.partition("+")[0]]
        run = build(task, out / "run", per_device_train_batch_size=8 // world)
        teacher = run.teacher
        run.train()
        run.save_model(str(out / task))
        found = {
            "world_size": run.accelerator.num_processes,
            "student": [c.__name__ for c in type(run.model_wrapped).__mro__],
            "teacher": [c.__name__ for c in type(teacher.prepared).__mro__],
            "read": isinstance(run.teacher, CachedTeacher),
            "logs": tiny.logs(run),
        }
        (out / f"{task}_{run.args.process_index}.json").write_text(json.dumps(found))
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
