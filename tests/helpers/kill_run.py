"""The training that kills.py kills: dropout, shuffled rows, AdamW and a schedule, so that every state matters.

Started with the folder of the run; goes on from what is there. While that folder holds `HOLD`, no checkpoint is
finished.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import BertForSequenceClassification

from kd_trainer.training import checkpoints
from kd_trainer.training.checkpoints import newest_resumable
from tests.helpers import tiny

STEPS, HOLD = 300, "hold"


def finish_unless_held(out: Path) -> None:
    finish = checkpoints.finish

    def held(*args: Any, **kwargs: Any) -> None:
        while (out / HOLD).exists():
            time.sleep(0.001)
        finish(*args, **kwargs)

    checkpoints.finish = held


def main(out: Path) -> None:
    finish_unless_held(out)
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "initializer_range": 0.5}
    pair = tuple(BertForSequenceClassification(tiny.bert_config(width, **dropout)) for width in (16, 24))
    run = tiny.trainer(
        "classification",
        out,
        pair=pair,
        data=tiny.rows("classification", 100),
        max_steps=STEPS,
        optim="adamw_torch",
        lr_scheduler_type="inverse_sqrt",  # not 0 at the end: a step too many must show
        kd_schedule="cosine",
        kd_alpha_end=0.2,
        train_sampling_strategy="random",
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        save_strategy="steps",
        save_steps=10,
        save_total_limit=2,
        logging_steps=50,
    )
    run.train(resume_from_checkpoint=newest_resumable(out)[0] is not None)
    run.accelerator.wait_for_everyone()
    if run.is_world_process_zero():
        run.save_model(str(out / "final"))
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
