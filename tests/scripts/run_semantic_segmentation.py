"""Segmentation in the order of transformers' examples/pytorch/semantic-segmentation/run_semantic_segmentation.py.

Written for the tests: a dataset saved on disk, transforms and metrics in numpy instead of albumentations and the hub.
"""

import logging
import os
import sys
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import transformers
from datasets import load_from_disk
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils.versions import require_version

require_version("datasets>=2.0.0")

logger = logging.getLogger(__name__)

IGNORED = 255


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "A folder with a saved dataset."})
    num_classes: int = 3


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="nvidia/mit-b0")
    cache_dir: str | None = None


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)])
    logger.setLevel(training_args.get_process_log_level())
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    set_seed(training_args.seed)

    dataset = load_from_disk(data_args.dataset_name)
    id2label = {i: f"class {i}" for i in range(data_args.num_classes)}
    label2id = {name: str(i) for i, name in id2label.items()}

    @torch.no_grad()
    def compute_metrics(eval_pred):
        logits, labels = eval_pred
        logits_tensor = nn.functional.interpolate(
            torch.from_numpy(logits), size=labels.shape[-2:], mode="bilinear", align_corners=False
        ).argmax(dim=1)
        pred_labels = logits_tensor.detach().cpu().numpy()
        known = labels != IGNORED
        ious = []
        for i in id2label:
            both = ((pred_labels == i) & (labels == i) & known).sum()
            either = (((pred_labels == i) | (labels == i)) & known).sum()
            if either:
                ious.append(float(both / either))
        return {"mean_iou": float(np.mean(ious)), "overall_accuracy": float((pred_labels == labels)[known].mean())}

    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path, label2id=label2id, id2label=id2label, cache_dir=model_args.cache_dir
    )
    model = AutoModelForSemanticSegmentation.from_pretrained(
        model_args.model_name_or_path, config=config, cache_dir=model_args.cache_dir
    )
    image_processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path, cache_dir=model_args.cache_dir)
    height, width = image_processor.size["height"], image_processor.size["width"]

    def preprocess_batch(example_batch, flip):
        pixel_values, labels = [], []
        for image, target in zip(example_batch["image"], example_batch["label"], strict=True):
            pixels = np.asarray(image.convert("RGB").resize((width, height)), dtype=np.float32) / 255
            pixels = (pixels - image_processor.image_mean) / image_processor.image_std
            mask = np.asarray(target.resize((width, height), resample=0))
            if flip and np.random.rand() < 0.5:
                pixels, mask = pixels[:, ::-1], mask[:, ::-1]
            pixel_values.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float())
            labels.append(torch.from_numpy(mask.copy()).long())
        return {"pixel_values": torch.stack(pixel_values), "labels": torch.stack(labels)}

    if training_args.do_train:
        dataset["train"].set_transform(partial(preprocess_batch, flip=True))
    if training_args.do_eval:
        dataset["validation"].set_transform(partial(preprocess_batch, flip=False))

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"] if training_args.do_train else None,
        eval_dataset=dataset["validation"] if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=image_processor,
        data_collator=default_data_collator,
    )

    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    trainer.create_model_card(finetuned_from=model_args.model_name_or_path, tasks=["image-segmentation"])


if __name__ == "__main__":
    main()
