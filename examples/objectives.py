"""Which objective: forward KL, DKD and standardised logits on handwritten digits with few labels, over 5 seeds.

    python examples/objectives.py               # about 2 minutes on one CPU core

scikit-learn's digits (8 x 8). A teacher of two hidden layers had 1,000 labels; the students, with one small hidden
layer, have 100 labels: first on these rows alone (`kd_alpha` 0.7), then with the other 900 rows, which only the teacher
labels. DKD needs the label of a row; on rows without one it is forward KL. Equal steps and the same start for all.
"""

import statistics

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import Trainer, set_seed

from kd_trainer import (
    DistillationTrainer,
    DistillationTrainingArguments,
    MLPConfig,
    MLPForImageClassification,
    as_tensors,
    classification_metrics,
    collate_tensors,
)

SEEDS, LABELLED, TEACHER_ROWS, STEPS = 5, 100, 1000, 400
OBJECTIVES = {
    "no teacher": None,
    "forward KL": {},
    "DKD, beta 8": {"kd_divergence": "dkd", "kd_beta": 8.0},
    "standardised logits": {"kd_standardize_logits": True},
}
digits = load_digits()
features, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def rows(order, labelled):
    """The rows of `order`; those after the first `labelled` have no label."""
    given = labels[order].where(torch.arange(len(order)) < labelled, -100)
    columns = {"features": features[order].numpy(), "labels": given.numpy()}
    return as_tensors(Dataset.from_dict(columns).with_format("torch"))


def train(hidden_sizes, train_rows, test_rows, seed, teacher=None, **objective):
    """The trained model, and its test accuracy in percent."""
    set_seed(seed)
    model = MLPForImageClassification(MLPConfig(num_features=64, hidden_sizes=hidden_sizes))
    args = DistillationTrainingArguments(
        "outputs/objectives", max_steps=STEPS, per_device_train_batch_size=32, per_device_eval_batch_size=1000,
        learning_rate=2e-3, seed=seed, logging_strategy="no", save_strategy="no", remove_unused_columns=False,
        disable_tqdm=True, kd_temperature=4.0, **objective,
    )  # fmt: skip
    trainer_class, extra = (Trainer, {}) if teacher is None else (DistillationTrainer, {"teacher_model": teacher})
    trainer = trainer_class(
        model, args, train_dataset=train_rows, eval_dataset=test_rows, data_collator=collate_tensors,
        compute_metrics=classification_metrics(), **extra,
    )  # fmt: skip
    trainer.train()
    return model, 100 * trainer.evaluate()["eval_accuracy"]


def main():
    table = {}
    for seed in range(SEEDS):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        known, test = order[:TEACHER_ROWS], rows(order[TEACHER_ROWS:], len(order))
        teacher, accuracy = train([256, 256], rows(known, TEACHER_ROWS), test, seed)
        table.setdefault(("teacher", TEACHER_ROWS), []).append(accuracy)
        few = {LABELLED: rows(known[:LABELLED], LABELLED), TEACHER_ROWS: rows(known, LABELLED)}
        for name, objective in OBJECTIVES.items():
            for count, data in few.items() if objective is not None else [(LABELLED, few[LABELLED])]:
                guide = {} if objective is None else {"teacher": teacher, "kd_alpha": 0.7, **objective}
                table.setdefault((name, count), []).append(train([16], data, test, seed, **guide)[1])
    for (name, count), values in table.items():
        print(f"{name}, {count} rows: {statistics.mean(values):.1f} +- {statistics.stdev(values):.1f}", flush=True)


if __name__ == "__main__":
    main()
