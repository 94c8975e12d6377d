"""Speech recognition in the order of transformers' examples/pytorch/speech-recognition/run_speech_recognition_ctc.py.

Written for the tests: a dataset saved on disk, whose audio is decoded already, the student's own vocabulary, and the
word error rate in plain Python.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import transformers
from datasets import load_from_disk
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoProcessor,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import check_min_version
from transformers.utils.versions import require_version

check_min_version("5.0.0")
require_version("datasets>=1.18.0")

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A folder or a name of the hub."})
    cache_dir: str | None = None
    freeze_feature_encoder: bool = True
    mask_time_prob: float = 0.05
    layerdrop: float = 0.0
    ctc_loss_reduction: str = "mean"


@dataclass
class DataTrainingArguments:
    dataset_name: str = field(metadata={"help": "A folder with a saved dataset."})
    audio_column_name: str = "audio"
    text_column_name: str = "text"
    eval_split_name: str = "validation"


@dataclass
class DataCollatorCTCWithPadding:
    """Pads the samples and the labels of a batch, the labels with -100."""

    processor: AutoProcessor

    def __call__(self, features):
        input_features = [{"input_values": feature["input_values"]} for feature in features]
        label_features = [{"input_ids": feature["labels"]} for feature in features]
        batch = self.processor.feature_extractor.pad(input_features, padding=True, return_tensors="pt")
        labels_batch = self.processor.tokenizer.pad(label_features, padding=True, return_tensors="pt")
        batch["labels"] = labels_batch["input_ids"].masked_fill(labels_batch.attention_mask.ne(1), -100)
        return batch


def word_error_rate(predictions, references):
    errors = words = 0
    for prediction, reference in zip(predictions, references, strict=True):
        found, written = prediction.split(), reference.split()
        row = list(range(len(written) + 1))
        for i, word in enumerate(found, 1):
            before, row[0] = row[0], i
            for j, other in enumerate(written, 1):
                before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
        errors, words = errors + row[-1], words + len(written)
    return errors / words


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)])
    logger.setLevel(logging.INFO)
    transformers.utils.logging.set_verbosity_info()
    set_seed(training_args.seed)

    raw_datasets = load_from_disk(data_args.dataset_name)
    folder = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(folder, cache_dir=model_args.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    feature_extractor = AutoFeatureExtractor.from_pretrained(folder, cache_dir=model_args.cache_dir)
    config.update(
        {
            "mask_time_prob": model_args.mask_time_prob,
            "gradient_checkpointing": training_args.gradient_checkpointing,
            "layerdrop": model_args.layerdrop,
            "ctc_loss_reduction": model_args.ctc_loss_reduction,
            "pad_token_id": tokenizer.pad_token_id,
            "vocab_size": len(tokenizer),
        }
    )
    model = AutoModelForCTC.from_pretrained(folder, cache_dir=model_args.cache_dir, config=config)
    if model_args.freeze_feature_encoder:
        model.freeze_feature_encoder()

    def prepare_dataset(batch):
        sample = batch[data_args.audio_column_name]
        inputs = feature_extractor(sample["array"], sampling_rate=sample["sampling_rate"])
        batch["input_values"] = inputs.input_values[0]
        batch["input_length"] = len(batch["input_values"])
        batch["labels"] = tokenizer(batch[data_args.text_column_name].lower() + " ").input_ids
        return batch

    with training_args.main_process_first(desc="dataset map preprocessing"):
        vectorized_datasets = raw_datasets.map(prepare_dataset, remove_columns=raw_datasets["train"].column_names)

    def compute_metrics(pred):
        pred_ids = np.argmax(pred.predictions, axis=-1)
        pred.label_ids[pred.label_ids == -100] = tokenizer.pad_token_id
        pred_str = tokenizer.batch_decode(pred_ids)
        label_str = tokenizer.batch_decode(pred.label_ids, group_tokens=False)
        return {"wer": word_error_rate(pred_str, label_str)}

    feature_extractor.save_pretrained(training_args.output_dir)
    tokenizer.save_pretrained(training_args.output_dir)
    config.save_pretrained(training_args.output_dir)
    processor = AutoProcessor.from_pretrained(training_args.output_dir)

    trainer = Trainer(
        model=model,
        data_collator=DataCollatorCTCWithPadding(processor=processor),
        args=training_args,
        compute_metrics=compute_metrics,
        train_dataset=vectorized_datasets["train"] if training_args.do_train else None,
        eval_dataset=vectorized_datasets[data_args.eval_split_name] if training_args.do_eval else None,
        processing_class=processor,
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

    trainer.create_model_card(
        finetuned_from=model_args.model_name_or_path, tasks="automatic-speech-recognition", tags=["speech"]
    )


if __name__ == "__main__":
    main()
