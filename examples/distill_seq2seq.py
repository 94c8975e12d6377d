"""A small BART distilled into a smaller one: it repairs docstrings with damaged letters.

    python examples/distill_seq2seq.py configs/distill_seq2seq.json              # a pair that it makes itself
    python examples/distill_seq2seq.py configs/distill_seq2seq.json --seeds 3    # mean and spread
    python examples/distill_seq2seq.py configs/distill_seq2seq.json --train_file pairs.jsonl \\
        --teacher_model_name_or_path path/or/name --student_model_name_or_path path/or/name

Without a file the task is made of the docstrings of Python's standard library: a line with one letter in ten replaced
goes in, the line comes out; the students see 500 such pairs alone. Without a teacher one is trained first, on all
pairs. Without a student it is made of every second layer of the teacher, in encoder and decoder. Distilled student and
baseline take equally many steps on the same pairs from the same start. Every option of the JSON can be given on the
command line too. After Ctrl-C, `--resume_from_checkpoint true` continues.
"""

import dataclasses
import random
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from lm_text import compare, for_measuring, local_texts, measured, run_seeds, train, train_tokenizer
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
)

from kd_trainer import (
    ResumableInterrupt,
    Seq2SeqDistillationTrainer,
    Seq2SeqDistillationTrainingArguments,
    parse_args,
    student_from_teacher,
)

COLUMNS = {
    "Parameters": ",.0f",
    "Perplexity": ".2f",
    "KL to teacher (nats)": ".4f",
    "Agreement (%)": ".1f",
    "Words right (%)": ".1f",
    "Training (s)": ".0f",
}


@dataclass
class ExampleArguments:
    """What this example adds to the training arguments: text and models."""

    train_file: str | None = field(default=None, metadata={"help": "jsonl or csv with two columns; else docstrings."})
    validation_file: str | None = field(default=None, metadata={"help": "The same; split off the train file if unset."})
    source_column: str = field(default="source", metadata={"help": "The column with the text that goes in."})
    target_column: str = field(default="target", metadata={"help": "The column with the text that comes out."})
    max_length: int = field(default=64, metadata={"help": "Tokens of either side; longer ones are cut."})
    num_validation: int = field(default=200, metadata={"help": "Held-out pairs to measure on."})
    student_pairs: int = field(default=500, metadata={"help": "Own pairs: so many for the students; 0: all."})
    student_model_name_or_path: str | None = field(default=None, metadata={"help": "Any model with the same tokens."})
    student_layers: str = field(default="every_2", metadata={"help": "Without it: layers of the teacher to keep."})
    vocab_size: int = field(
        default=258, metadata={"help": "Own teacher: tokens of its tokenizer; 258 are bytes alone."}
    )
    teacher_hidden_size: int = field(default=64, metadata={"help": "Own teacher: its width, a multiple of 32."})
    teacher_num_layers: int = field(default=2, metadata={"help": "Own teacher: layers of encoder and of decoder."})
    teacher_steps: int = field(default=800, metadata={"help": "Own teacher: its optimizer steps."})
    teacher_learning_rate: float = field(default=2e-3, metadata={"help": "Own teacher: its learning rate."})
    seeds: int = field(default=1, metadata={"help": "Repeat with so many seeds: teacher, student and order are new."})


def damaged(text: str, draw: random.Random) -> str:
    """The text with one letter in ten replaced by another one."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(draw.choice(letters) if c.isalpha() and draw.random() < 0.1 else c for c in text)


def load_pairs(example: ExampleArguments) -> datasets.DatasetDict:
    """Sources and targets as text, in the splits train and validation."""
    names = [example.source_column, example.target_column]
    if example.train_file:
        files = {"train": example.train_file, "validation": example.validation_file}
        kind = {"jsonl": "json"}.get(ending := Path(example.train_file).suffix[1:], ending)
        data = datasets.load_dataset(kind, data_files={k: v for k, v in files.items() if v})
    else:
        data, draw = {}, random.Random(0)
        for split, documents in local_texts().items():
            lines = (" ".join(document.split("\n\n")[0].split()) for document in documents)
            targets = list(dict.fromkeys(line[:60] for line in lines if len(line) > 15))
            data[split] = datasets.Dataset.from_dict(
                dict(zip(names, [[damaged(line, draw) for line in targets], targets], strict=True))
            )
    if "validation" not in data:
        parts = data["train"].train_test_split(0.05, seed=0)
        data = {"train": parts["train"], "validation": parts["test"]}
    kept = data["validation"].shuffle(seed=0).take(min(example.num_validation, len(data["validation"])))
    return datasets.DatasetDict({"train": data["train"], "validation": kept}).select_columns(names)


def encode(pairs: datasets.DatasetDict, tokenizer, example: ExampleArguments) -> datasets.DatasetDict:
    """Tokens of both sides, cut at `max_length`, the end token behind them."""

    def tokens(rows: dict) -> dict:
        options = {"truncation": True, "max_length": example.max_length}
        source = tokenizer(rows[example.source_column], **options)
        target = tokenizer(text_target=rows[example.target_column], **options)
        return {"input_ids": source["input_ids"], "labels": target["input_ids"]}

    return pairs.map(tokens, batched=True, remove_columns=pairs["train"].column_names)


def common_arguments(model, tokenizer, data) -> dict:
    """What every trainer of this example is given."""
    return {
        "model": model,
        "train_dataset": data["train"],
        "eval_dataset": data["validation"],
        "data_collator": DataCollatorForSeq2Seq(tokenizer, model=model),
        "processing_class": tokenizer,
    }


def words_right(tokenizer):
    """A `compute_metrics`: the share of the target's words that were generated at their place."""

    def compute_metrics(prediction) -> dict[str, float]:
        sides = []
        for ids in (prediction.predictions, prediction.label_ids):
            texts = tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            sides.append([text.split() for text in texts])
        right = sum(a == b for made, wanted in zip(*sides, strict=True) for a, b in zip(made, wanted, strict=False))
        return {"words_right": right / sum(len(wanted) for wanted in sides[1])}

    return compute_metrics


def make_teacher(tokenizer, data, args, example):
    """A small BART, trained with the stock Seq2SeqTrainer on the same pairs; (model, its seconds if known)."""
    width, layers = example.teacher_hidden_size, example.teacher_num_layers
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=width,
        max_position_embeddings=example.max_length,
        **{f"{side}_layers": layers for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": width // 32 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 2 * width for side in ("encoder", "decoder")},
        dropout=0.0,
        init_std=0.1,  # at the default 0.02 so narrow a model learns to copy several times later
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
    )
    args = dataclasses.replace(
        args,
        output_dir=f"{args.output_dir}/teacher",
        max_steps=example.teacher_steps,
        learning_rate=example.teacher_learning_rate,
    )
    teacher = BartForConditionalGeneration(config)
    trainer = Seq2SeqTrainer(args=args, callbacks=[ResumableInterrupt()], **common_arguments(teacher, tokenizer, data))
    return teacher, seconds(train(trainer))


def seconds(metrics) -> dict[str, float]:
    return {"Training (s)": metrics["train_runtime"]} if metrics else {}


def train_student(student, teacher, tokenizer, data, args) -> dict[str, float]:
    """Trains `student` with the loss that `args` define; the seconds it took, if known."""
    trainer = Seq2SeqDistillationTrainer(teacher_model=teacher, args=args, **common_arguments(student, tokenizer, data))
    return seconds(train(trainer))


def measure(model, teacher, tokenizer, data, args) -> dict[str, float]:
    """The numbers of the table on the held-out pairs; the teacher's own where `teacher` is None."""
    args = for_measuring(args)
    trainer = Seq2SeqDistillationTrainer(
        teacher_model=teacher,
        args=args,
        compute_metrics=words_right(tokenizer) if args.predict_with_generate else None,
        **common_arguments(model, tokenizer, data),
    )
    metrics = trainer.evaluate()
    words = {"Words right (%)": 100 * metrics["eval_words_right"]} if args.predict_with_generate else {}
    return measured(model, teacher, metrics) | words


def run_seed(args, example) -> dict[str, dict[str, float]]:
    """All models of one seed: {name: numbers}."""
    pairs = load_pairs(example)
    if args.teacher_model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        data = encode(pairs, tokenizer, example)
        teacher = AutoModelForSeq2SeqLM.from_pretrained(args.teacher_model_name_or_path, **args.teacher_kwargs)
        cost = {}
    else:
        tokenizer = train_tokenizer(pairs["train"][example.target_column], example.vocab_size, append_end=True)
        data = encode(pairs, tokenizer, example)
        teacher, cost = make_teacher(tokenizer, data, args, example)
    if example.student_model_name_or_path:
        start = AutoModelForSeq2SeqLM.from_pretrained(example.student_model_name_or_path)
    else:
        start = student_from_teacher(teacher, layers=example.student_layers)
    if example.student_pairs and not example.train_file:
        data["train"] = data["train"].shuffle(seed=args.seed).take(min(example.student_pairs, len(data["train"])))
    return compare(
        start,
        teacher,
        cost,
        args,
        train_student=lambda student, args: train_student(student, teacher, tokenizer, data, args),
        measure=lambda model, teacher: measure(model, teacher, tokenizer, data, args),
    )


def main() -> None:
    args, example = parse_args(Seq2SeqDistillationTrainingArguments, ExampleArguments)
    run_seeds(run_seed, COLUMNS, args, example)


if __name__ == "__main__":
    main()
