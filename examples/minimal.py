"""A Trainer script before and after the swap: the lines marked `# new:` are the whole change.
Expected test accuracy: teacher 95.8%, before (plain student) 60.1%, after (distilled student) 84.7%.
    python examples/minimal.py     # about 13 seconds on one CPU core; `accelerate launch examples/minimal.py` works too
"""

import torch
from datasets import concatenate_datasets  # new:
from transformers import Trainer, TrainingArguments, set_seed

from kd_trainer import DistillationTrainer, DistillationTrainingArguments  # new:
from kd_trainer import MLPConfig, MLPForImageClassification, classification_metrics, synthetic_classification

data = synthetic_classification(num_train=4000, num_unlabelled=1000, signal=0.15)
few = data["train"].select(range(200))  # the student's labelled rows; the teacher has had all 4,000
settings = {"per_device_train_batch_size": 32, "learning_rate": 1e-3, "save_strategy": "no"}
settings["use_cpu"] = not torch.cuda.is_available()  # without it, several processes on the CPU train each alone
shared = {"eval_dataset": data["test"], "compute_metrics": classification_metrics()}


def model(*hidden_sizes):
    set_seed(42)
    return MLPForImageClassification(MLPConfig(hidden_sizes=hidden_sizes))


def run(name, trainer):
    trainer.train()
    trainer.accelerator.print(f"{name}: {trainer.evaluate()['eval_accuracy']:.1%}")


teacher, args = model(256, 256, 256), TrainingArguments("outputs/minimal", max_steps=375, **settings)
run("teacher", Trainer(teacher, args, train_dataset=data["train"], **shared))
args = TrainingArguments("outputs/minimal", max_steps=140, **settings)
run("before", Trainer(model(64), args, train_dataset=few, **shared))
args = DistillationTrainingArguments("outputs/minimal", max_steps=140, kd_alpha=0.7, **settings)  # new:
rows = concatenate_datasets([few, data["unlabelled"]])  # new: rows without labels, from which only a teacher can teach
run("after", DistillationTrainer(model(64), args, teacher_model=teacher, train_dataset=rows, **shared))  # new:
torch.distributed.is_initialized() and torch.distributed.destroy_process_group()  # else the end may abort
