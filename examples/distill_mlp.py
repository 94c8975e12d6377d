"""Teacher, distilled student and baseline student on 784 features: trained, compared, drawn.

    python examples/distill_mlp.py configs/distill_mlp.json               # few labels, many unlabelled rows; ~20 s
    python examples/distill_mlp.py configs/distill_mlp.json --seeds 5     # mean and spread; ~85 s
    python examples/distill_mlp.py configs/distill_mlp_classic.json       # 500 labelled rows: all reach 100%
    python examples/distill_mlp.py configs/distill_mlp_digits.json --train_file digits.parquet
    accelerate launch examples/distill_mlp.py configs/distill_mlp.json    # one process for each GPU

Every option of the JSON can be given on the command line too. After Ctrl-C, `--resume_from_checkpoint true` continues.
"""

import dataclasses
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import psutil
from accelerate import PartialState
from transformers import AutoModelForImageClassification, Trainer, set_seed

from kd_trainer import (
    DistillationTrainer,
    DistillationTrainingArguments,
    MLPConfig,
    MLPForImageClassification,
    ResumableInterrupt,
    as_tensors,
    build_report,
    classification_metrics,
    collate_tensors,
    load_classification,
    load_run,
    newest_resumable,
    parse_args,
    print_table,
    save_predictions,
    split_labelled,
    synthetic_classification,
)


@dataclass
class ExampleArguments:
    """What this example adds to the training arguments: data and models."""

    train_file: str | None = field(default=None, metadata={"help": "csv, parquet or json with features and label."})
    validation_file: str | None = field(default=None, metadata={"help": "The same; split off the train file if unset."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the hub instead, e.g. mnist."})
    signal: float = field(default=0.15, metadata={"help": "Synthetic data: distance of the class means."})
    num_teacher_rows: int = field(default=4000, metadata={"help": "Labelled rows that the teacher sees."})
    num_labelled: int = field(default=200, metadata={"help": "Labelled rows that the students see."})
    num_unlabelled: int = field(default=1000, metadata={"help": "Rows that only the teacher labels, softly."})
    num_test: int = field(default=2000, metadata={"help": "Rows held out for the table."})
    teacher_hidden_sizes: list[int] = field(default_factory=lambda: [256, 256, 256])
    student_hidden_sizes: list[int] = field(default_factory=lambda: [64])
    distilled_epochs: int = field(default=0, metadata={"help": "A second, longer comparison: epochs of all rows."})
    seeds: int = field(default=1, metadata={"help": "Repeat with so many seeds: data, models and order are new."})


def load_data(example: ExampleArguments, seed: int) -> dict[str, datasets.Dataset]:
    """teacher: labelled rows for the teacher; labelled and all: for the students; validation and test."""
    if example.train_file or example.dataset_name:
        data = load_classification(
            train_file=example.train_file, validation_file=example.validation_file, dataset_name=example.dataset_name
        )
        if "test" not in data:
            data |= data["train"].train_test_split(example.num_test, seed=seed)
        if "validation" not in data:
            parts = data["train"].train_test_split(500, seed=seed)
            data |= {"train": parts["train"], "validation": parts["test"]}
        teacher = data["train"].shuffle(seed=seed).take(min(example.num_teacher_rows, len(data["train"])))
        parts = split_labelled(teacher, example.num_labelled, seed=seed)
        labelled, unlabelled = parts["labelled"], parts["unlabelled"].take(example.num_unlabelled)
    else:
        size = max(example.num_teacher_rows, example.num_labelled)
        data = synthetic_classification(
            num_train=size,
            num_test=example.num_test,
            num_unlabelled=example.num_unlabelled,
            signal=example.signal,
            seed=seed,
        )
        teacher, labelled = data["train"].take(example.num_teacher_rows), data["train"].take(example.num_labelled)
        unlabelled = data.get("unlabelled")
    rows = datasets.concatenate_datasets([labelled, unlabelled]).with_format("torch") if unlabelled else labelled
    return {
        "teacher": teacher,
        "labelled": labelled,
        "all": rows,
        "validation": data["validation"],
        "test": data["test"],
    }


def new_model(hidden_sizes: list[int], seed: int) -> MLPForImageClassification:
    set_seed(seed)  # the same first weights for every student of a seed
    return MLPForImageClassification(MLPConfig(hidden_sizes=hidden_sizes))


def run(name, model, data, rows, args, *, teacher=None, steps=-1):
    """Trains `model` on data[rows] (0 steps: it is trained already), tests it, keeps all that the report reads."""
    folder = Path(args.output_dir) / f"seed-{args.seed}" / name.replace(", ", "-").replace(" ", "-")
    kwargs = {"output_dir": str(folder), "max_steps": steps, "teacher_model_name_or_path": None}
    if args.process_index == 0:
        print(f"\n== seed {args.seed}: {name} ==", flush=True)
    trainer_class = Trainer if teacher is None else DistillationTrainer
    trainer = trainer_class(
        model=model,
        args=dataclasses.replace(args, **kwargs),
        data_collator=collate_tensors,
        train_dataset=as_tensors(data[rows]),
        eval_dataset=as_tensors(data["validation"]),
        compute_metrics=classification_metrics(),
        **({"callbacks": [ResumableInterrupt()]} if teacher is None else {"teacher_model": teacher}),
    )
    resume = bool(args.resume_from_checkpoint)
    if resume and (folder / "test_predictions.safetensors").exists():
        return AutoModelForImageClassification.from_pretrained(folder), folder
    checkpoint = newest_resumable(folder)[0] if resume else None
    if steps != 0:
        metrics = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
        trainer.save_metrics("train", metrics)
    tested = trainer.predict(as_tensors(data["test"]))
    trainer.save_metrics("test", tested.metrics)
    trainer.save_state()
    trainer.save_model()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        save_predictions(folder, tested)
    return trainer.model, folder


def run_seed(args, example):
    """All runs of one seed: [(name, folder)]."""
    data = load_data(example, args.seed)
    if args.teacher_model_name_or_path:
        teacher = AutoModelForImageClassification.from_pretrained(args.teacher_model_name_or_path)
        teacher, folder = run("teacher", teacher, data, "teacher", args, steps=0)
    else:
        teacher, folder = run("teacher", new_model(example.teacher_hidden_sizes, args.seed), data, "teacher", args)
    done = [("teacher", folder)]

    def compare(ending: str, steps: int) -> None:
        for name, rows, guide in (("distilled", "all", teacher), ("baseline", "labelled", None)):
            student = new_model(example.student_hidden_sizes, args.seed)
            done.append((name + ending, run(name + ending, student, data, rows, args, teacher=guide, steps=steps)[1]))

    batch = args.train_batch_size * args.world_size
    compare("", int(args.num_train_epochs) * -(-len(data["labelled"]) // batch))
    if example.distilled_epochs:
        long = example.distilled_epochs * -(-len(data["all"]) // batch)
        compare(f", {long} steps", long)
    return done


def main() -> None:
    args, example = parse_args(DistillationTrainingArguments, ExampleArguments)
    begun = time.perf_counter()
    imports = time.time() - psutil.Process().create_time()
    runs = []
    for seed in range(args.seed, args.seed + example.seeds):
        runs += run_seed(dataclasses.replace(args, seed=seed), example)
    trained = time.perf_counter()
    if args.process_index == 0:
        report = build_report(
            [load_run(folder, name) for name, folder in runs],
            Path(args.output_dir) / "report",
            title="Teacher, distilled student and baseline student",
        )
        print_table(report)
        parts = {
            "imports": imports,
            "data, training and tests": trained - begun,
            "report and plots": time.perf_counter() - trained,
        }
        shown = ", ".join(f"{name} {seconds:.0f}" for name, seconds in parts.items())
        print(f"\n{sum(parts.values()):.0f} s: {shown}")
    gc.collect()  # what torch wraps around a student goes before the group of processes
    PartialState().destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the trainer has said where it stopped
        raise SystemExit(130) from None
