"""Token classification in the order of transformers' examples/pytorch/token-classification/run_ner.py.

Written for the tests: local files alone, and metrics in numpy, since `evaluate.load` asks the hub.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import transformers
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils.versions import require_version

require_version("datasets>=1.8.0")

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A folder or a name of the hub."})
    tokenizer_name: str | None = None
    cache_dir: str | None = None


@dataclass
class DataTrainingArguments:
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    max_seq_length: int | None = None
    pad_to_max_length: bool = False
    label_all_tokens: bool = False
    overwrite_cache: bool = False


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

    given = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    data_files = {name: file for name, file in given.items() if file is not None}
    raw_datasets = load_dataset("json", data_files=data_files, cache_dir=model_args.cache_dir)
    text_column_name, label_column_name = "tokens", "ner_tags"
    label_list = sorted({label for row in raw_datasets["train"][label_column_name] for label in row})
    label_to_id = {label: i for i, label in enumerate(label_list)}

    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path, num_labels=len(label_list), cache_dir=model_args.cache_dir
    )
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path, cache_dir=model_args.cache_dir, use_fast=True
    )
    model = AutoModelForTokenClassification.from_pretrained(
        model_args.model_name_or_path, config=config, cache_dir=model_args.cache_dir
    )
    model.config.label2id = dict(label_to_id)
    model.config.id2label = dict(enumerate(label_list))

    def tokenize_and_align_labels(examples):
        tokenized_inputs = tokenizer(
            examples[text_column_name],
            padding="max_length" if data_args.pad_to_max_length else False,
            truncation=True,
            max_length=data_args.max_seq_length,
            is_split_into_words=True,
        )
        tokenized_inputs["labels"] = []
        for i, tags in enumerate(examples[label_column_name]):
            previous, label_ids = None, []
            for word in tokenized_inputs.word_ids(batch_index=i):
                counted = word is not None and (word != previous or data_args.label_all_tokens)
                label_ids.append(label_to_id[tags[word]] if counted else -100)
                previous = word
            tokenized_inputs["labels"].append(label_ids)
        return tokenized_inputs

    with training_args.main_process_first(desc="dataset map pre-processing"):
        tokenized = raw_datasets.map(
            tokenize_and_align_labels, batched=True, load_from_cache_file=not data_args.overwrite_cache
        )
    train_dataset, eval_dataset = tokenized["train"], tokenized["validation"]
    data_collator = DataCollatorForTokenClassification(tokenizer)

    def compute_metrics(p):
        predictions, labels = p
        predictions = np.argmax(predictions, axis=2)
        counted, outside = labels != -100, label_to_id["O"]
        found, real = counted & (predictions != outside), counted & (labels != outside)
        right = float((found & real & (predictions == labels)).sum())
        precision, recall = right / max(found.sum(), 1), right / max(real.sum(), 1)
        return {
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(2 * precision * recall / max(precision + recall, 1e-12)),
            "accuracy": float((predictions == labels)[counted].mean()),
        }

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=data_collator,
        compute_metrics=compute_metrics,
    )

    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        metrics = train_result.metrics
        trainer.save_model()
        metrics["train_samples"] = len(train_dataset)
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(eval_dataset)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if training_args.do_predict:
        predictions, labels, metrics = trainer.predict(tokenized["test"], metric_key_prefix="predict")
        predictions = np.argmax(predictions, axis=2)
        trainer.log_metrics("predict", metrics)
        trainer.save_metrics("predict", metrics)
        if trainer.is_world_process_zero():
            with open(os.path.join(training_args.output_dir, "predictions.txt"), "w") as writer:
                for row, label in zip(predictions, labels, strict=True):
                    writer.write(" ".join(label_list[p] for p in row[label != -100]) + "\n")

    trainer.create_model_card(finetuned_from=model_args.model_name_or_path, tasks="token-classification")


if __name__ == "__main__":
    main()
