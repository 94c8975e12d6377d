"""What both language-model examples share: text that every machine has, a tokenizer, the comparison and its table.

The text is the docstrings of Python's own standard library and the licences beside it: about 1.7 million characters,
always in the same order, held out by file.
"""

import ast
import copy
import dataclasses
import gc
import statistics
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Trainer, set_seed

from kd_trainer import newest_resumable

END, PAD = "<|end|>", "<|pad|>"
# The held-out text is measured with these, whatever the training's own settings are; alpha 0 alone is the baseline.
HARD_LOSS_ONLY = {
    "kd_alpha": 0.0,
    "kd_alpha_end": None,
    "kd_temperature": 1.0,
    "kd_temperature_end": None,
    "kd_schedule": "constant",
    "kd_divergence": "forward_kl",
    "kd_beta": None,
    "kd_standardize_logits": False,
    "kd_position_fraction": 1.0,
    "teacher_cache_dir": None,
    "teacher_cache_format": "auto",
    "teacher_cache_k": None,
    "teacher_cache_dtype": None,
}


def docstrings(path: Path) -> list[str]:
    """The docstrings of a Python file, in the order of the file; none where it is no valid Python."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]


def local_texts() -> dict[str, list[str]]:
    """The texts of the standard library: {"train": ..., "validation": ...}, every tenth file held out."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "test/", "dist-packages/")) or "/test" in name:
            continue
        # By its name, so that a file more or less moves no other file to the other side.
        texts["validation" if zlib.crc32(name.encode()) % 10 == 0 else "train"] += docstrings(path)
    texts["train"] += [path.read_text(encoding="utf-8", errors="replace") for path in sorted(root.glob("LICEN[CS]E*"))]
    return texts


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, append_end: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens, at least 258; no text is unknown to it.

    `append_end` puts the end token behind every text, as encoder-decoders expect it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if append_end:
        end = (END, tokenizer.token_to_id(END))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[end])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD)


def train(trainer: Trainer) -> dict[str, float]:
    """Trains and saves the model; upstream's metrics of it, or none where they are not those of the whole training.

    With `--resume_from_checkpoint true` a stopped training continues, and a finished one is read back.
    """
    folder, resume = Path(trainer.args.output_dir), bool(trainer.args.resume_from_checkpoint)
    if resume and (folder / "train_results.json").exists():
        load_model(trainer.model, folder / "model.safetensors", device=str(trainer.args.device))
        return {}
    checkpoint = newest_resumable(folder)[0] if resume else None
    metrics = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", metrics)  # last: it says that all is there
    return {} if checkpoint else metrics


def for_measuring(args):
    """The arguments with which every model is measured on the held-out text."""
    return dataclasses.replace(args, teacher_model_name_or_path=None, kd_reduction="tokenmean", **HARD_LOSS_ONLY)


def measured(model, teacher, metrics: dict[str, float]) -> dict[str, float]:
    """The numbers of the table that are in the metrics of every evaluation; the teacher's own where it is None."""
    numbers = {"Parameters": model.num_parameters(), "Perplexity": metrics["eval_perplexity"]}
    if teacher is not None:
        numbers["KL to teacher (nats)"] = metrics["eval_soft_loss"]
        numbers["Agreement (%)"] = 100 * metrics["eval_teacher_agreement"]
    return numbers


def compare(start, teacher, cost, args, train_student: Callable, measure: Callable) -> dict[str, dict[str, float]]:
    """Distilled student and baseline, from the same start, over the same rows in the same order: {name: numbers}.

    `train_student(student, args)` returns what it cost, as `cost` is the teacher's; `measure(model, teacher)` the rest.
    """
    done = {"teacher": measure(teacher, None) | cost, "student, before": measure(start, teacher)}
    for name, changes in (("distilled", {}), ("baseline", HARD_LOSS_ONLY)):
        student = copy.deepcopy(start)
        set_seed(args.seed)  # the same order of rows
        folder = {"output_dir": f"{args.output_dir}/{name}", "teacher_model_name_or_path": None}
        cost = train_student(student, dataclasses.replace(args, **changes, **folder))
        done[name] = measure(student, teacher) | cost
    return done


def run_seeds(run_seed: Callable, columns: dict[str, str], args, example) -> None:
    """`run_seed(args, example)` for each seed in a folder of its own; prints the table of all."""
    runs = []
    if args.process_index > 0:  # each process prepares the text; one of them shows how far it is
        datasets.disable_progress_bars()
    for seed in range(args.seed, args.seed + example.seeds):
        set_seed(seed)
        folders = {"output_dir": f"{args.output_dir}/seed-{seed}"}
        if args.teacher_cache_dir:  # each seed has a teacher of its own
            folders["teacher_cache_dir"] = f"{args.teacher_cache_dir}/seed-{seed}"
        runs.append(run_seed(dataclasses.replace(args, seed=seed, **folders), example))
    if args.process_index == 0:
        print_comparison(columns, runs)
    gc.collect()  # what torch wraps around a student goes before the group of processes
    PartialState().destroy_process_group()


def print_comparison(columns: dict[str, str], runs: list[dict[str, dict[str, float]]]) -> None:
    """One row a model: mean and sample standard deviation over the runs (seeds); – where a number is not known.

    `columns` gives each number's format, a run is {model: {number: value}}. Below it, how often distillation paid.
    """
    spread = f", mean ± standard deviation over {len(runs)} seeds" if len(runs) > 1 else ""
    table = Table(title=f"Held-out text{spread}", title_justify="left")
    table.add_column("Model")
    for column in columns:
        table.add_column(column, justify="right")
    for name in runs[0]:
        cells = []
        for column, spec in columns.items():
            values = [run[name][column] for run in runs if column in run[name]]
            spread = f" ± {statistics.stdev(values):{spec}}" if len(set(values)) > 1 else ""
            cells.append(f"{statistics.mean(values):{spec}}{spread}" if values else "–")
        table.add_row(name, *cells)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    for number in ("Perplexity", "KL to teacher (nats)"):
        wins = sum(run["distilled"][number] < run["baseline"][number] for run in runs)
        print(f"{number}: distilled below baseline in {wins} of {len(runs)} runs")
