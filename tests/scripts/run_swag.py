"""Multiple choice in the order of transformers' examples/pytorch/multiple-choice/run_swag.py.

Written for the tests: local files alone.
"""

import logging
import os
import sys
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import transformers
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoTokenizer,
    DataCollatorForMultipleChoice,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import check_min_version

check_min_version("5.0.0")

logger = logging.getLogger(__name__)

ENDINGS = [f"ending{i}" for i in range(4)]


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A folder or a name of the hub."})
    tokenizer_name: str | None = None
    cache_dir: str | None = None


@dataclass
class DataTrainingArguments:
    train_file: str | None = field(default=None, metadata={"help": "A csv or a json file."})
    validation_file: str | None = None
    max_seq_length: int = 128
    pad_to_max_length: bool = False
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

    raw_datasets = load_dataset(
        data_args.train_file.split(".")[-1],
        data_files={"train": data_args.train_file, "validation": data_args.validation_file},
        cache_dir=model_args.cache_dir,
    )
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, cache_dir=model_args.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path, cache_dir=model_args.cache_dir
    )
    model = AutoModelForMultipleChoice.from_pretrained(
        model_args.model_name_or_path, config=config, cache_dir=model_args.cache_dir
    )
    max_seq_length = min(data_args.max_seq_length, tokenizer.model_max_length)

    def preprocess_function(examples):
        first_sentences = list(chain(*([context] * len(ENDINGS) for context in examples["sent1"])))
        second_sentences = list(
            chain(*([f"{header} {examples[end][i]}" for end in ENDINGS] for i, header in enumerate(examples["sent2"])))
        )
        padding = "max_length" if data_args.pad_to_max_length else False
        rows = tokenizer(first_sentences, second_sentences, truncation=True, max_length=max_seq_length, padding=padding)
        return {k: [v[i : i + len(ENDINGS)] for i in range(0, len(v), len(ENDINGS))] for k, v in rows.items()}

    with training_args.main_process_first(desc="dataset map pre-processing"):
        raw_datasets = raw_datasets.map(
            preprocess_function, batched=True, load_from_cache_file=not data_args.overwrite_cache
        )
    train_dataset, eval_dataset = raw_datasets["train"], raw_datasets["validation"]

    data_collator = (
        default_data_collator if data_args.pad_to_max_length else DataCollatorForMultipleChoice(tokenizer=tokenizer)
    )

    def compute_metrics(eval_predictions):
        predictions, label_ids = eval_predictions
        return {"accuracy": (np.argmax(predictions, axis=1) == label_ids).astype(np.float32).mean().item()}

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
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(eval_dataset)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    trainer.create_model_card(finetuned_from=model_args.model_name_or_path, tasks="multiple-choice")


if __name__ == "__main__":
    main()
