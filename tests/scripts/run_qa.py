"""Question answering in the order of transformers' examples/pytorch/question-answering/run_qa.py.

Written for the tests: local files alone, the best span of each row, and metrics in the place of the hub's squad.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import transformers
from datasets import load_dataset
from trainer_qa import QuestionAnsweringTrainer
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
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
    max_seq_length: int = 384
    doc_stride: int = 128
    max_answer_length: int = 30
    pad_to_max_length: bool = True
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
    raw_datasets = load_dataset("json", data_files=data_files, field="data", cache_dir=model_args.cache_dir)

    config = AutoConfig.from_pretrained(model_args.model_name_or_path, cache_dir=model_args.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path, cache_dir=model_args.cache_dir, use_fast=True
    )
    model = AutoModelForQuestionAnswering.from_pretrained(
        model_args.model_name_or_path, config=config, cache_dir=model_args.cache_dir
    )
    column_names = raw_datasets["train"].column_names

    def tokenized_pairs(examples):
        return tokenizer(
            examples["question"],
            examples["context"],
            truncation="only_second",
            max_length=min(data_args.max_seq_length, tokenizer.model_max_length),
            stride=data_args.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length" if data_args.pad_to_max_length else False,
        )

    def prepare_train_features(examples):
        tokenized_examples = tokenized_pairs(examples)
        sample_mapping = tokenized_examples.pop("overflow_to_sample_mapping")
        offset_mapping = tokenized_examples.pop("offset_mapping")
        tokenized_examples["start_positions"], tokenized_examples["end_positions"] = [], []
        for i, offsets in enumerate(offset_mapping):
            answers = examples["answers"][sample_mapping[i]]
            first = answers["answer_start"][0]
            last = first + len(answers["text"][0])
            inside = [
                k
                for k, (start, end) in enumerate(offsets)
                if tokenized_examples.sequence_ids(i)[k] == 1 and start < last and end > first
            ]
            cls_index = tokenized_examples["input_ids"][i].index(tokenizer.cls_token_id)
            tokenized_examples["start_positions"].append(inside[0] if inside else cls_index)
            tokenized_examples["end_positions"].append(inside[-1] if inside else cls_index)
        return tokenized_examples

    def prepare_validation_features(examples):
        tokenized_examples = tokenized_pairs(examples)
        sample_mapping = tokenized_examples.pop("overflow_to_sample_mapping")
        tokenized_examples["example_id"] = [examples["id"][sample] for sample in sample_mapping]
        for i, offsets in enumerate(tokenized_examples["offset_mapping"]):
            ids = tokenized_examples.sequence_ids(i)
            tokenized_examples["offset_mapping"][i] = [o if ids[k] == 1 else None for k, o in enumerate(offsets)]
        return tokenized_examples

    def features_of(split, function):
        with training_args.main_process_first(desc="dataset map pre-processing"):
            return raw_datasets[split].map(
                function,
                batched=True,
                remove_columns=column_names,
                load_from_cache_file=not data_args.overwrite_cache,
            )

    train_dataset = features_of("train", prepare_train_features)
    eval_examples, eval_dataset = raw_datasets["validation"], features_of("validation", prepare_validation_features)
    data_collator = default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer)

    def post_processing_function(examples, features, predictions, stage="eval"):
        best = {}
        contexts = dict(zip(examples["id"], examples["context"], strict=True))
        for feature, start_logits, end_logits in zip(features, *predictions, strict=True):
            context, offsets = contexts[feature["example_id"]], feature["offset_mapping"]
            of_context = [k for k, offset in enumerate(offsets) if offset is not None]
            for i in of_context:
                for j in of_context[of_context.index(i) : of_context.index(i) + data_args.max_answer_length]:
                    score = start_logits[i] + end_logits[j]
                    if score > best.get(feature["example_id"], (-np.inf, ""))[0]:
                        best[feature["example_id"]] = (score, context[offsets[i][0] : offsets[j][1]].strip())
        formatted = [{"id": str(k), "prediction_text": text} for k, (_, text) in best.items()]
        references = [{"id": str(example["id"]), "answers": example["answers"]} for example in examples]
        return EvalPrediction(predictions=formatted, label_ids=references)

    def compute_metrics(p: EvalPrediction):
        truth = {row["id"]: row["answers"]["text"][0] for row in p.label_ids}
        exact, f1 = [], []
        for row in p.predictions:
            a, b = row["prediction_text"].split(), truth[row["id"]].split()
            exact.append(a == b)
            f1.append(2 * len(set(a) & set(b)) / max(len(set(a)) + len(set(b)), 1))
        return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}

    trainer = QuestionAnsweringTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        eval_examples=eval_examples if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=data_collator,
        post_process_function=post_processing_function,
        compute_metrics=compute_metrics,
    )

    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        metrics = train_result.metrics
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
        predict_dataset = features_of("test", prepare_validation_features)
        results = trainer.predict(predict_dataset, raw_datasets["test"])
        metrics = results.metrics
        metrics["predict_samples"] = len(predict_dataset)
        trainer.log_metrics("predict", metrics)
        trainer.save_metrics("predict", metrics)

    trainer.create_model_card(finetuned_from=model_args.model_name_or_path, tasks="question-answering")


if __name__ == "__main__":
    main()
