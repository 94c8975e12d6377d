"""A causal language model distilled into a smaller one, beside the same student trained on the text alone.

    python examples/distill_causal_lm.py configs/distill_causal_lm.json               # a pair that it makes itself
    python examples/distill_causal_lm.py configs/distill_causal_lm.json --seeds 3     # mean and spread
    python examples/distill_causal_lm.py configs/distill_causal_lm.json --train_file my.txt \\
        --teacher_model_name_or_path path/or/name --student_model_name_or_path path/or/name
    python examples/distill_causal_lm.py configs/distill_causal_lm_cache.json         # the teacher read from disk
    accelerate launch examples/distill_causal_lm.py configs/distill_causal_lm.json    # one process for each GPU

Without a text it takes the docstrings of Python's standard library, of which the students see 300 blocks alone. Without
a teacher one is trained first, on all of the text. Without a student it is made of every second layer of the teacher.
Distilled student and baseline take equally many steps on the same blocks from the same start. Every option of the JSON
can be given on the command line too. After Ctrl-C, `--resume_from_checkpoint true` continues.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from lm_text import END, compare, for_measuring, local_texts, measured, run_seeds, train, train_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    default_data_collator,
)

from kd_trainer import (
    DistillationTrainer,
    DistillationTrainingArguments,
    ResumableInterrupt,
    parse_args,
    student_from_teacher,
)

COLUMNS = {
    "Parameters": ",.0f",
    "Perplexity": ".2f",
    "KL to teacher (nats)": ".4f",
    "Agreement (%)": ".1f",
    "Tokens/s": ",.0f",
}


@dataclass
class ExampleArguments:
    """What this example adds to the training arguments: text and models."""

    train_file: str | None = field(default=None, metadata={"help": "txt, json(l), csv or parquet; else docstrings."})
    validation_file: str | None = field(default=None, metadata={"help": "The same; split off the train file if unset."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the hub or a folder instead."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of its configurations."})
    validation_split_percentage: int = field(default=5, metadata={"help": "Of the train split, where there is none."})
    text_column: str = field(default="text", metadata={"help": "The column with the text."})
    block_size: int = field(default=128, metadata={"help": "Tokens a row; texts are joined and cut into such blocks."})
    max_validation_blocks: int = field(default=300, metadata={"help": "Held-out blocks to measure on."})
    student_blocks: int = field(default=300, metadata={"help": "Own text: blocks that the students see; 0: all."})
    student_model_name_or_path: str | None = field(default=None, metadata={"help": "Any model with the same tokens."})
    student_layers: str = field(default="every_2", metadata={"help": "Without it: layers of the teacher to keep."})
    vocab_size: int = field(default=1024, metadata={"help": "Own teacher: tokens of its tokenizer."})
    teacher_hidden_size: int = field(default=96, metadata={"help": "Own teacher: its width, a multiple of 32."})
    teacher_num_layers: int = field(default=4, metadata={"help": "Own teacher: its layers."})
    teacher_steps: int = field(default=1200, metadata={"help": "Own teacher: its optimizer steps."})
    teacher_learning_rate: float = field(default=5e-3, metadata={"help": "Own teacher: its learning rate."})
    seeds: int = field(default=1, metadata={"help": "Repeat with so many seeds: teacher, student and order are new."})


def load_texts(example: ExampleArguments) -> datasets.DatasetDict:
    """Documents in one column, in the splits train and validation."""
    if example.dataset_name:
        data = datasets.load_dataset(example.dataset_name, example.dataset_config_name)
    elif example.train_file:
        files = {"train": example.train_file, "validation": example.validation_file}
        kind = {"txt": "text", "jsonl": "json"}.get(ending := Path(example.train_file).suffix[1:], ending)
        options = {"keep_linebreaks": True} if kind == "text" else {}
        data = datasets.load_dataset(kind, data_files={k: v for k, v in files.items() if v}, **options)
    else:
        texts = {split: [text + END for text in documents] for split, documents in local_texts().items()}
        data = {split: datasets.Dataset.from_dict({example.text_column: each}) for split, each in texts.items()}
    if "validation" not in data:
        parts = data["train"].train_test_split(example.validation_split_percentage / 100, seed=0)
        data = {"train": parts["train"], "validation": parts["test"]}
    return datasets.DatasetDict({split: data[split] for split in ("train", "validation")})


def pack(texts: datasets.DatasetDict, tokenizer, example: ExampleArguments) -> datasets.DatasetDict:
    """Tokens of the documents, joined and cut into blocks of equal length, as upstream's run_clm does."""
    size = min(example.block_size, tokenizer.model_max_length)

    def blocks(rows: dict) -> dict:
        ids = [token for row in tokenizer(rows[example.text_column])["input_ids"] for token in row]
        cut = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
        return {"input_ids": cut, "labels": copy.deepcopy(cut)}

    data = texts.map(blocks, batched=True, remove_columns=texts["train"].column_names)
    data["validation"] = data["validation"].take(min(example.max_validation_blocks, len(data["validation"])))
    return data


def make_teacher(tokenizer, data, args, example):
    """A small Llama, trained with the stock Trainer on the same blocks; (model, its tokens per second if known)."""
    width = example.teacher_hidden_size
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=example.teacher_num_layers,
        num_attention_heads=width // 32,
        max_position_embeddings=example.block_size,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    args = dataclasses.replace(
        args,
        output_dir=f"{args.output_dir}/teacher",
        max_steps=example.teacher_steps,
        learning_rate=example.teacher_learning_rate,
        max_grad_norm=1.0,  # its loss is a mean over tokens, whatever the students' is
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=data["train"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[ResumableInterrupt()],
    )
    return trainer.model, tokens_per_second(train(trainer), data)


def tokens_per_second(metrics, data) -> dict[str, float]:
    size = len(data["train"][0]["input_ids"])
    return {"Tokens/s": size * metrics["train_samples_per_second"]} if metrics else {}


def train_student(student, teacher, tokenizer, data, args) -> dict[str, float]:
    """Trains `student` with the loss that `args` define; its tokens per second, if known."""
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],  # for kd_run "compare" alone: measure() evaluates
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    return tokens_per_second(train(trainer), data)


def measure(model, teacher, data, args) -> dict[str, float]:
    """The numbers of the table on the held-out blocks; the teacher's own where `teacher` is None."""
    trainer = DistillationTrainer(
        model=model,
        teacher_model=teacher,
        args=for_measuring(args),
        eval_dataset=data["validation"],
        data_collator=default_data_collator,
    )
    return measured(model, teacher, trainer.evaluate())


def run_seed(args, example) -> dict[str, dict[str, float]]:
    """All models of one seed: {name: numbers}."""
    texts = load_texts(example)
    if args.teacher_model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        teacher = AutoModelForCausalLM.from_pretrained(args.teacher_model_name_or_path, **args.teacher_kwargs)
        data, speed = pack(texts, tokenizer, example), {}
    else:
        tokenizer = train_tokenizer(texts["train"][example.text_column], example.vocab_size)
        data = pack(texts, tokenizer, example)
        teacher, speed = make_teacher(tokenizer, data, args, example)
    if example.student_model_name_or_path:
        start = AutoModelForCausalLM.from_pretrained(example.student_model_name_or_path)
    else:
        start = student_from_teacher(teacher, layers=example.student_layers)
    if example.student_blocks and not (example.train_file or example.dataset_name):
        data["train"] = data["train"].shuffle(seed=args.seed).take(min(example.student_blocks, len(data["train"])))
    return compare(
        start,
        teacher,
        speed,
        args,
        train_student=lambda student, args: train_student(student, teacher, tokenizer, data, args),
        measure=lambda model, teacher: measure(model, teacher, data, args),
    )


def main() -> None:
    args, example = parse_args(DistillationTrainingArguments, ExampleArguments)
    run_seeds(run_seed, COLUMNS, args, example)


if __name__ == "__main__":
    main()
