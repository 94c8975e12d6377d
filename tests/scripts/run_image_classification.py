"""Image classification in the order of transformers' examples/pytorch/image-classification/run_image_classification.py.

Written for the tests: local folders alone, transforms and metrics in numpy in the place of torchvision's and the
hub's.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils.versions import require_version

require_version("datasets>=2.14.0")

logger = logging.getLogger(__name__)


@dataclass
class DataTrainingArguments:
    train_dir: str | None = field(default=None, metadata={"help": "A folder with one folder for each class."})
    validation_dir: str | None = None
    image_column_name: str = "image"
    label_column_name: str = "label"


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="google/vit-base-patch16-224-in21k")
    cache_dir: str | None = None
    ignore_mismatched_sizes: bool = False


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

    data_files = {
        "train": os.path.join(data_args.train_dir, "**"),
        "validation": os.path.join(data_args.validation_dir, "**"),
    }
    dataset = load_dataset("imagefolder", data_files=data_files, cache_dir=model_args.cache_dir)

    def collate_fn(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        labels = torch.tensor([example[data_args.label_column_name] for example in examples])
        return {"pixel_values": pixel_values, "labels": labels}

    labels = dataset["train"].features[data_args.label_column_name].names
    label2id, id2label = {}, {}
    for i, label in enumerate(labels):
        label2id[label] = str(i)
        id2label[str(i)] = label

    def compute_metrics(p):
        return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}

    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        num_labels=len(labels),
        label2id=label2id,
        id2label=id2label,
        cache_dir=model_args.cache_dir,
    )
    model = AutoModelForImageClassification.from_pretrained(
        model_args.model_name_or_path,
        config=config,
        cache_dir=model_args.cache_dir,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
    )
    image_processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path, cache_dir=model_args.cache_dir)
    size = (image_processor.size["height"], image_processor.size["width"])

    def to_tensor(image):
        pixels = np.asarray(image.convert("RGB").resize(size), dtype=np.float32) / 255
        return torch.from_numpy((pixels - image_processor.image_mean) / image_processor.image_std).permute(2, 0, 1)

    def transforms(example_batch):
        images = example_batch[data_args.image_column_name]
        example_batch["pixel_values"] = [to_tensor(image).float() for image in images]
        return example_batch

    if training_args.do_train:
        dataset["train"].set_transform(transforms)
    if training_args.do_eval:
        dataset["validation"].set_transform(transforms)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"] if training_args.do_train else None,
        eval_dataset=dataset["validation"] if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=image_processor,
        data_collator=collate_fn,
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

    trainer.create_model_card(finetuned_from=model_args.model_name_or_path, tasks="image-classification")


if __name__ == "__main__":
    main()
