"""A comparison over two seeds that kills itself at a given moment: `compare_run.py OUT [MOMENT]`.

With COMPARE_ZERO=2 in the environment it runs under DeepSpeed's ZeRO-2.
MOMENT: "seed-43/baseline 5" in that step of that run, "save seed-42/distilled" inside the writing of a checkpoint,
"results seed-42/baseline" before the results of a finished training are written.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import BertForSequenceClassification, TrainerCallback

from kd_trainer.report import seeds
from kd_trainer.training import checkpoints
from tests.helpers import tiny
from tests.helpers.backend_run import run_deepspeed_on_cpu, zero_config


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(TrainerCallback):
    def __init__(self, run: str, step: str) -> None:
        self.run, self.step = run, int(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith(self.run) and state.global_step == self.step:
            kill()


def kill_before(owner: Any, name: str, run: str) -> None:
    """Ends the process in front of a call of `owner.name` whose first argument is a path of that run."""
    function = getattr(owner, name)

    def killed(path: Any, *args: Any, **kwargs: Any) -> Any:
        if run in str(path) and Path(path).name != seeds.SETTINGS:
            kill()
        return function(path, *args, **kwargs)

    setattr(owner, name, killed)


def main(out: Path, moment: str = "") -> None:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "initializer_range": 0.5}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # what each process draws is its own
        dropout = {**dropout, **tiny.NO_DROPOUT}
    pair = tuple(BertForSequenceClassification(tiny.bert_config(width, **dropout)) for width in (16, 24))
    zero = os.environ.get("COMPARE_ZERO")
    if zero:
        run_deepspeed_on_cpu()
    run = tiny.trainer(
        "classification",
        out,
        pair=pair,
        kd_run="compare",
        kd_compare_seeds=2,
        max_steps=8,
        train_sampling_strategy="random",
        optim="adamw_torch",
        save_strategy="steps",
        save_steps=2,
        deepspeed=zero_config(int(zero), has_config=True) if zero else None,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
    )
    words = moment.split()
    if words[:1] == ["save"]:
        kill_before(checkpoints, "finish", words[1])
    elif words[:1] == ["results"]:
        kill_before(seeds, "write_atomically", words[1])
    elif words:
        run.add_callback(KillAt(*words))
    run.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
