"""Which objective: forward KL, DKD and standardised logits on handwritten digits with few labels, over 5 seeds.

    python examples/objectives.py               # about 75 seconds on one CPU core

scikit-learn's digits. The teacher had 1,000 labels. The students have 100: first on these rows alone, then with the
900 others, which only the teacher labels (on these DKD is forward KL). All students of a seed have the same start and
600 steps. The unlabelled rows bring the most; no other objective is better than forward KL here.
Expected test accuracy in percent (teacher 98.1 ± 0.7):

                         100 labelled rows   with 900 unlabelled
    no teacher           89.3 ± 2.0          84.4 ± 6.2
    forward KL           92.0 ± 0.8          95.3 ± 0.4
    DKD, beta 8          90.8 ± 0.7          94.2 ± 0.9
    standardised logits  91.8 ± 1.8          93.8 ± 1.3
"""

import statistics

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import Trainer, set_seed

from kd_trainer import DistillationTrainer, DistillationTrainingArguments
from kd_trainer import MLPConfig, MLPForImageClassification, as_tensors, classification_metrics, collate_tensors

LABELLED, TEACHER_ROWS = 100, 1000
OBJECTIVES = {
    "no teacher": {"kd_alpha": 0.0},
    "forward KL": {},
    "DKD, beta 8": {"kd_divergence": "dkd", "kd_beta": 8.0},
    "standardised logits": {"kd_standardize_logits": True},
}
digits = load_digits()
features, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def rows(order, labelled):
    """The rows of `order`; those after the first `labelled` have no label."""
    kept = labels[order].where(torch.arange(len(order)) < labelled, -100)
    return as_tensors(Dataset.from_dict({"features": features[order], "labels": kept}).with_format("torch"))


def train(hidden_sizes, train_rows, test_rows, seed, steps, teacher=None, **objective):
    set_seed(seed)
    model = MLPForImageClassification(MLPConfig(num_features=64, hidden_sizes=hidden_sizes))
    args = DistillationTrainingArguments(
        "outputs/objectives", max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=1000,
        learning_rate=1e-2, seed=seed, logging_strategy="no", save_strategy="no", remove_unused_columns=False,
        **{"kd_alpha": 0.7, "kd_temperature": 4.0, "kd_reduction": "tokenmean", **objective},
    )  # fmt: skip
    trainer_class, guide = (Trainer, {}) if teacher is None else (DistillationTrainer, {"teacher_model": teacher})
    trainer = trainer_class(
        model, args, train_dataset=train_rows, eval_dataset=test_rows, data_collator=collate_tensors,
        compute_metrics=classification_metrics(), **guide,
    )  # fmt: skip
    trainer.train()
    return model, 100 * trainer.evaluate()["eval_accuracy"]


def main(seeds=5, steps=600):
    found, teachers = {name: ([], []) for name in OBJECTIVES}, []
    for seed in range(seeds):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        known, test = order[:TEACHER_ROWS], rows(order[TEACHER_ROWS:], len(order))
        teacher, accuracy = train([256, 256], rows(known, TEACHER_ROWS), test, seed, steps)
        teachers.append(accuracy)
        for name, objective in OBJECTIVES.items():
            for accuracies, data in zip(found[name], (known[:LABELLED], known), strict=True):
                accuracies.append(train([16], rows(data, LABELLED), test, seed, steps, teacher, **objective)[1])
    print(f"{'teacher':20} {statistics.mean(teachers):.1f} ± {statistics.stdev(teachers):.1f}")
    print(f"{'':20} 100 labelled rows   with 900 unlabelled")
    for name, columns in found.items():
        cells = (f"{statistics.mean(column):.1f} ± {statistics.stdev(column):.1f}" for column in columns)
        print(f"{name:20} {'          '.join(cells)}")


if __name__ == "__main__":
    main()
