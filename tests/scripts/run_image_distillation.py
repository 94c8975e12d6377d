"""The code of the transformers documentation's page "Knowledge Distillation for Computer Vision", cell by cell.

Written for the tests: the folders of data, teacher and output are arguments in the place of the hub's names, the
student and the run are small, and there is no fp16, TensorBoard or upload. `Trainer` refuses its class, as the page's.
"""
# ruff: noqa: E402

import sys

data, teacher, output_dir = sys.argv[1:]

from datasets import load_from_disk

dataset = load_from_disk(data)

from transformers import AutoImageProcessor

teacher_processor = AutoImageProcessor.from_pretrained(teacher)


def process(examples):
    return teacher_processor(examples["image"])


processed_datasets = dataset.map(process, batched=True)

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments


class ImageDistilTrainer(Trainer):
    def __init__(self, teacher_model=None, student_model=None, temperature=None, lambda_param=None, *args, **kwargs):
        super().__init__(student_model, *args, **kwargs)
        self.student, self.teacher = student_model, teacher_model.to(Accelerator().device).eval()
        self.divergence = nn.KLDivLoss(reduction="batchmean")
        self.temperature, self.lambda_param = temperature, lambda_param

    def compute_loss(self, student, inputs, return_outputs=False):
        student_output = self.student(**inputs)
        with torch.no_grad():
            teacher_output = self.teacher(**inputs)
        log_probs = F.log_softmax(student_output.logits / self.temperature, dim=-1)
        soft = (
            self.divergence(log_probs, F.softmax(teacher_output.logits / self.temperature, dim=-1))
            * self.temperature**2
        )
        loss = (1.0 - self.lambda_param) * student_output.loss + self.lambda_param * soft
        return (loss, student_output) if return_outputs else loss


from transformers import AutoModelForImageClassification, MobileNetV2Config, MobileNetV2ForImageClassification

training_args = TrainingArguments(
    output_dir=output_dir,
    num_train_epochs=2,
    use_cpu=True,
    logging_strategy="epoch",
    eval_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    report_to="none",
)

num_labels = len(processed_datasets["train"].features["labels"].names)

teacher_model = AutoModelForImageClassification.from_pretrained(
    teacher,
    num_labels=num_labels,
    ignore_mismatched_sizes=True,
)

student_config = MobileNetV2Config(depth_multiplier=0.25, image_size=32)
student_config.num_labels = num_labels
student_model = MobileNetV2ForImageClassification(student_config)

import numpy as np


def compute_metrics(eval_pred):
    predictions, labels = eval_pred
    return {"accuracy": float((np.argmax(predictions, axis=1) == labels).mean())}


from transformers import DefaultDataCollator

data_collator = DefaultDataCollator()
# fmt: off
trainer = ImageDistilTrainer(
    student_model=student_model,
    teacher_model=teacher_model,
    training_args=training_args,
    train_dataset=processed_datasets["train"],
    eval_dataset=processed_datasets["validation"],
    data_collator=data_collator,
    processing_class=teacher_processor,
    compute_metrics=compute_metrics,
    temperature=5,
    lambda_param=0.5
)
# fmt: on

trainer.train()

metrics = trainer.evaluate(processed_datasets["test"])
trainer.save_metrics("eval", metrics)
