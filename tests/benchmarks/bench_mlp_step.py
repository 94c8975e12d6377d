"""Time of a training step of the MLP pair, as ratios within one run:

    python tests/benchmarks/bench_mlp_step.py

bare             a PyTorch loop: teacher forward, student forward and backward, naive loss, clipping, AdamW
naive            the stock Trainer with F.kl_div in compute_loss, no counting, no parts logged
kd_trainer       DistillationTrainer with its defaults on the same tensors
kd_trainer/...   the same with other forms of the data

The variants take turns in random order. Ratios are those of the medians over the rounds and, in brackets, of the lower
quartiles, since other work on the machine only adds time. Bars: kd_trainer/bare <= 1.4, kd_trainer/naive <= 1.05.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from kd_trainer import (
    DistillationTrainer,
    DistillationTrainingArguments,
    MLPConfig,
    MLPForImageClassification,
    as_tensors,
    collate_tensors,
    synthetic_classification,
)

BATCH, ALPHA, T = 32, 0.7, 3.0


def models() -> tuple[MLPForImageClassification, MLPForImageClassification]:
    torch.manual_seed(0)
    teacher = MLPForImageClassification(MLPConfig(hidden_sizes=[256, 256, 256])).eval().requires_grad_(False)
    return MLPForImageClassification(MLPConfig(hidden_sizes=[64])), teacher


class Stopwatch(TrainerCallback):
    """Seconds between the first step's start and the last step's end; the set-up of a Trainer is not a step."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.start


class NaiveTrainer(Trainer):
    def __init__(self, *args, teacher_model, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher_model = teacher_model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher_model(features=inputs["features"]).logits
        soft = F.kl_div(F.log_softmax(outputs.logits / T, -1), F.softmax(teacher_logits / T, -1), reduction="batchmean")
        loss = ALPHA * T * T * soft + (1 - ALPHA) * outputs.loss
        return (loss, outputs) if return_outputs else loss


def bare(data, steps: int) -> float:
    student, teacher = models()
    x, y = data["features"], data["labels"]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    student.train()
    start, done = time.perf_counter(), 0
    while done < steps:
        order = torch.randperm(len(x))
        for i in range(0, len(x) - BATCH + 1, BATCH):
            index = order[i : i + BATCH]
            features, labels = x[index], y[index]
            with torch.no_grad():
                teacher_logits = teacher(features=features).logits
            logits = student(features=features).logits
            soft = F.kl_div(F.log_softmax(logits / T, -1), F.softmax(teacher_logits / T, -1), reduction="batchmean")
            loss = ALPHA * T * T * soft + (1 - ALPHA) * F.cross_entropy(logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
    return time.perf_counter() - start


def through(trainer_class, arguments_class, dataset, collator, steps: int, **kwargs) -> float:
    student, teacher = models()
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments_class(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-3, use_cpu=True,
            save_strategy="no", logging_steps=max(steps // 10, 1), report_to="none", disable_tqdm=True,
            remove_unused_columns=False, **kwargs,
        )  # fmt: skip
        trainer = trainer_class(
            model=student, teacher_model=teacher, args=args, train_dataset=dataset, data_collator=collator,
            callbacks=[watch],
        )  # fmt: skip
        trainer.train()
    return watch.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    dataset = synthetic_classification(num_train=4096, signal=0.15)["train"]
    tensors = as_tensors(dataset)
    batch = tensors[:]
    lists = dataset.with_format(None)
    steps = options.steps
    variants = {
        "bare": lambda: bare(batch, steps),
        "naive": lambda: through(NaiveTrainer, TrainingArguments, tensors, collate_tensors, steps),
        "kd_trainer": lambda: through(
            DistillationTrainer, DistillationTrainingArguments, tensors, collate_tensors, steps
        ),
        "kd_trainer, torch format": lambda: through(
            DistillationTrainer, DistillationTrainingArguments, dataset, None, steps
        ),
        "kd_trainer, Python lists": lambda: through(
            DistillationTrainer, DistillationTrainingArguments, lists, None, steps // 4
        ) * 4,
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(options.rounds + 1):
        slow = round_ > 5  # the other forms of the data differ by far more than the noise
        for name in random.sample([n for n in variants if not (slow and "," in n)], k=3 if slow else len(variants)):
            seconds = variants[name]()
            if round_:  # the first round warms up
                times[name].append(seconds)
    print(f"\n{torch.get_num_threads()} threads, batch {BATCH}, {steps} steps, {options.rounds} rounds, medians")
    print(f"{'variant':26}{'us a step':>12}{'quartile':>10}{'x bare':>14}{'x naive':>14}")
    middle = {name: (statistics.median(s), statistics.quantiles(s, n=4)[0]) for name, s in times.items()}
    for name, (median, quartile) in middle.items():
        ratios = [f"{median / middle[to][0]:.2f} ({quartile / middle[to][1]:.2f})" for to in ("bare", "naive")]
        print(f"{name:26}{median / steps * 1e6:12.0f}{quartile / steps * 1e6:10.0f}{ratios[0]:>14}{ratios[1]:>14}")


if __name__ == "__main__":
    main()
