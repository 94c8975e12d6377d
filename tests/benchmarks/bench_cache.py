"""The offline teacher: what each format of a cache costs and keeps, as ratios within one run.

    python tests/benchmarks/bench_cache.py                          # all three parts, about an hour on two cores
    python tests/benchmarks/bench_cache.py --part speed             # a pair with 50,257 token ids, and a small one
    python tests/benchmarks/bench_cache.py --part quality --seeds 3 # the pair of examples/distill_causal_lm.py
    python tests/benchmarks/bench_cache.py --part memory            # a cache of 10 GB, read in training

speed    bytes on disk a token; the whole of `build_teacher_cache` over a bare loop of teacher forwards (with logits) on
         the same batches; a training step (batch from the dataloader included) over the student's step with
         cross-entropy alone in the stock Trainer, and over live distillation; what it saves of a live step over the
         teacher's bare forward, taken in the same rounds; soft loss and its gradient at the student's weights against
         the live teacher's. Medians over rounds in random order. The bare forward writes 103 MB of logits a batch: what
         that costs depends on the memory allocator, which is the system's own.
quality  held-out perplexity and KL to the teacher after equal steps, mean and standard deviation over the seeds.
memory   peak resident memory of a training from a small cache and from one of 10 GB: the shards of the small one copied
         under new names, and the rows of the dataset repeated alike, so that every shard is read.

The pairs of `speed` are Llamas with random weights, the teacher's head such that its logits have a standard deviation
of 4: "50k" has GPT-2's 50,257 ids, a teacher of its shape (12 layers x 768) and a student of 4 x 256, 4 rows of 128
tokens a batch, 24 batches; "small" is the pair of examples/distill_causal_lm.py, 32 rows a batch, 320 batches.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import torch.nn.functional as F
from bench_fused import resident_peak, wait_until_quiet
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from kd_trainer import CachedTeacher, DistillationTrainer, DistillationTrainingArguments
from kd_trainer.cache.manifest import shard_name, write_json
from kd_trainer.cache.store import DATA, MANIFEST, read_manifest

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 128


class Pair(NamedTuple):
    """Layers and width of both models, ids, rows of a batch, batches of the data."""

    teacher: tuple[int, int]
    student: tuple[int, int]
    vocabulary: int
    batch: int
    batches: int  # some ten seconds of the teacher: building has a start of 0.04 s


PAIRS = {"50k": Pair((12, 768), (4, 256), 50_257, 4, 24), "small": Pair((4, 96), (2, 96), 1024, 32, 320)}
# Name in the table: format, k, dtype.
FORMS: dict[str, tuple[str, int | None, str | None]] = {
    "logits": ("logits", None, None),
    "hidden": ("hidden", None, None),
    "hidden, bfloat16": ("hidden", None, "bfloat16"),
    "topk 16": ("topk", 16, None),
    "topk 64": ("topk", 64, None),
    "sampled 12": ("sampled", 12, None),
    "sampled 50": ("sampled", 50, None),
}


def cache_options(folder: Path, name: str) -> dict[str, Any]:
    form, k, dtype = FORMS[name]
    return {
        "teacher_cache_dir": str(folder / name.replace(" ", "_").replace(",", "")),
        "teacher_cache_format": form,
        "teacher_cache_k": k,
        "teacher_cache_dtype": dtype,
    }


def llama(pair: Pair, layers: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(layers)
    heads = width // (64 if width % 64 == 0 else 32)
    config = LlamaConfig(
        vocab_size=pair.vocabulary, num_hidden_layers=layers, hidden_size=width, intermediate_size=width * 11 // 4,
        num_attention_heads=heads, num_key_value_heads=heads, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def models(pair: Pair) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """(teacher, student)."""
    teacher = llama(pair, *pair.teacher).eval().requires_grad_(False)
    teacher.lm_head.weight.normal_(std=4 / pair.teacher[1] ** 0.5)
    return teacher, llama(pair, *pair.student)


def random_rows(pair: Pair, batches: int) -> datasets.Dataset:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, pair.vocabulary, (batches * pair.batch, LENGTH), generator=draw).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(out: Path, batch: int, **options: Any) -> DistillationTrainingArguments:
    distillation = {"kd_reduction": "tokenmean", "kd_temperature": 1.0}
    return DistillationTrainingArguments(**{**_base(out, batch), **distillation, **options})


def _base(out: Path, batch: int) -> dict[str, Any]:
    return {
        "output_dir": str(out), "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch,
        "learning_rate": 1e-4, "logging_steps": 1000, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "max_grad_norm": 0.0,
    }  # fmt: skip


# ---- speed ----


class StepClock(TrainerCallback):
    """Seconds from the beginning of one step to the beginning of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def bare_forwards(pair: Pair, teacher: Any, data: Any, batches: int | None = None) -> list[float]:
    """Seconds of each batch: loaded, and through the teacher."""
    seconds = []
    loader = DataLoader(data, batch_size=pair.batch, collate_fn=default_data_collator)
    start = time.perf_counter()
    with torch.no_grad():
        for batch in itertools.islice(loader, batches):
            teacher(input_ids=batch["input_ids"], use_cache=False)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return seconds


def time_building(
    pair: Pair, teacher: Any, student: Any, data: Any, folder: Path, rounds: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """(seconds of the bare forward and of each building, manifest of each)."""

    def build(name: str) -> dict[str, Any]:
        options = cache_options(folder, name)
        shutil.rmtree(options["teacher_cache_dir"], ignore_errors=True)
        args = arguments(folder / "run", pair.batch, **options)
        trainer = DistillationTrainer(
            model=student, teacher_model=teacher, args=args, train_dataset=data, data_collator=default_data_collator
        )
        start = time.perf_counter()
        manifest = trainer.build_teacher_cache().manifest
        seconds[name].append(time.perf_counter() - start)
        return manifest

    seconds: dict[str, list[float]] = defaultdict(list)
    manifests = {}
    for _ in range(rounds):
        for name in random.sample(["bare", "bare", *FORMS], len(FORMS) + 2):
            os.sync()  # what the last one left for the disk is not this one's
            if name == "bare":
                seconds[name].append(sum(bare_forwards(pair, teacher, data)))
            else:
                manifests[name] = build(name)
    return {name: statistics.median(times) for name, times in seconds.items()}, manifests


def time_steps(
    pair: Pair, teacher: Any, student: Any, data: Any, folder: Path, rounds: int, steps: int
) -> dict[str, float]:
    """Median seconds of a training step of each variant, and of the teacher's forward; the first round warms up."""
    seconds: dict[str, list[float]] = defaultdict(list)
    names = ["bare", "cross-entropy", "live", *FORMS]
    for round_ in range(rounds + 1):
        for name in random.sample(names, len(names)):
            if name == "bare":
                seconds[name] += bare_forwards(pair, teacher, data, steps)[2:] if round_ else []
                continue
            clock = StepClock()
            common = {"train_dataset": data, "data_collator": default_data_collator, "callbacks": [clock]}
            own = copy.deepcopy(student)
            if name == "cross-entropy":
                args = TrainingArguments(**{**_base(folder / "run", pair.batch), "max_steps": steps})
                Trainer(model=own, args=args, **common).train()
            else:
                taught = teacher if name == "live" else CachedTeacher(cache_options(folder, name)["teacher_cache_dir"])
                args = arguments(folder / "run", pair.batch, max_steps=steps)
                DistillationTrainer(model=own, teacher_model=taught, args=args, **common).train()
            if round_:
                seconds[name] += clock.seconds[2:]
    return {name: statistics.median(times) for name, times in seconds.items()}


def errors(
    pair: Pair, teacher: Any, student: Any, data: Any, folder: Path, batches: int = 4
) -> dict[str, tuple[float, float, float]]:
    """(relative error of the soft loss, of its gradient, cosine of the gradients), of each format against live."""

    def gradient(taught: Any) -> tuple[float, torch.Tensor]:
        own = copy.deepcopy(student)
        args = arguments(folder / "run", pair.batch, kd_alpha=1.0, train_sampling_strategy="sequential")
        trainer = DistillationTrainer(
            model=own, teacher_model=taught, args=args, train_dataset=data, data_collator=default_data_collator
        )
        own.train()
        total = 0.0
        for _, batch in zip(range(batches), trainer.get_train_dataloader(), strict=False):
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in own.parameters()]).double()

    loss, grad = gradient(teacher)
    found = {}
    for name in FORMS:
        other, its = gradient(CachedTeacher(cache_options(folder, name)["teacher_cache_dir"]))
        distance = float((its - grad).norm() / grad.norm())
        found[name] = (abs(other - loss) / loss, distance, float(F.cosine_similarity(its, grad, dim=0)))
    return found


def speed(options: argparse.Namespace, folder: Path) -> None:
    for name in options.pairs:
        _speed(name, options, folder / name)


def _speed(name_of_pair: str, options: argparse.Namespace, folder: Path) -> None:
    pair = PAIRS[name_of_pair]
    (teacher, student), data = models(pair), random_rows(pair, options.batches or pair.batches)
    wait_until_quiet(options.max_load)
    load = os.getloadavg()[0]
    building, manifests = time_building(pair, teacher, student, data, folder, options.rounds)
    stepping = time_steps(pair, teacher, student, data, folder, options.rounds, options.steps)
    wrong = errors(pair, teacher, student, data, folder)
    tokens, threads = len(data) * LENGTH, torch.get_num_threads()
    asked = 1e3 * building["bare"] * pair.batch / len(data)
    plain, live = stepping["cross-entropy"], stepping["live"]
    print(
        f"\n{name_of_pair}: {pair.vocabulary:,} ids, {tokens:,} tokens, {threads} threads, load {load:.2f} before, "
        f"{options.rounds} rounds"
    )
    print(
        f"teacher's forward {building['bare']:.1f} s, {asked:.0f} ms a batch (beside the steps: "
        f"{1e3 * stepping['bare']:.0f} ms); step: "
        f"cross-entropy {1e3 * plain:.0f} ms, live {1e3 * live:.0f} ms = {live / plain:.2f} x cross-entropy"
    )
    columns = ["Format", "bytes a token", "build / bare forward", "step / cross-entropy", "step / live"]
    columns += ["saved / bare forward", "loss error", "gradient error", "cosine"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in FORMS:
        size = manifests[name]["total_bytes"] / manifests[name]["total_positions"]
        step, saved = stepping[name], (live - stepping[name]) / stepping["bare"]
        ratios = (building[name] / building["bare"], step / plain, step / live, saved)
        loss, grad, cosine = wrong[name]
        times = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {size:,.1f} | {times} | {loss:.1e} | {grad:.1e} | {cosine:.5f} |")


# ---- quality ----


def quality(options: argparse.Namespace, folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import distill_causal_lm as example_script
    from lm_text import HARD_LOSS_ONLY, train_tokenizer
    from transformers import set_seed

    from kd_trainer import parse_args, student_from_teacher

    config = str(ROOT / "configs" / "distill_causal_lm.json")
    base, example = parse_args(DistillationTrainingArguments, example_script.ExampleArguments, argv=[config])
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in range(42, 42 + options.seeds):
        set_seed(seed)
        args = dataclasses.replace(
            base, seed=seed, output_dir=str(folder / f"seed-{seed}"), disable_tqdm=True, logging_steps=1000
        )
        texts = example_script.load_texts(example)
        tokenizer = train_tokenizer(texts["train"][example.text_column], example.vocab_size)
        data = example_script.pack(texts, tokenizer, example)
        teacher, _ = example_script.make_teacher(tokenizer, data, args, example)
        start = student_from_teacher(teacher, layers=example.student_layers)
        data["train"] = data["train"].shuffle(seed=seed).take(example.student_blocks)
        for name in ("teacher", "cross-entropy", "live", *FORMS):
            student = teacher if name == "teacher" else copy.deepcopy(start)
            if name != "teacher":
                more: dict[str, Any] = HARD_LOSS_ONLY if name == "cross-entropy" else {}
                if name in FORMS:
                    more = cache_options(folder / f"seed-{seed}", name)
                set_seed(seed)
                example_script.train_student(student, teacher, tokenizer, data, dataclasses.replace(args, **more))
            judge = None if name == "teacher" else teacher
            runs[name].append(example_script.measure(student, judge, data, args))
            if name in FORMS:
                manifest = read_manifest(Path(more["teacher_cache_dir"]) / "train")
                runs[name][-1]["bytes"] = manifest["total_bytes"] / manifest["total_positions"]
    print(f"\n{len(tokenizer):,} ids, {options.seeds} seeds, {args.max_steps} steps each; mean ± standard deviation")
    print("| Teacher | bytes a token | held-out perplexity | KL to teacher, nats | KL / live's |")
    print("|---|---|---|---|---|")
    for name, numbers in runs.items():
        kl, shown = "KL to teacher (nats)", ["–", "–", "–"]
        if kl in numbers[0]:
            ratios = [one[kl] / live[kl] for one, live in zip(numbers, runs["live"], strict=True)]
            shown = [
                f"{numbers[0]['bytes']:,.1f}" if "bytes" in numbers[0] else "–",
                _spread([n[kl] for n in numbers], ".4f"),
                _spread(ratios, ".3f"),
            ]
        print(
            f"| {name} | {shown[0]} | {_spread([n['Perplexity'] for n in numbers], '.2f')} | {shown[1]} | {shown[2]} |"
        )


def _spread(values: list[float], spec: str) -> str:
    return f"{statistics.mean(values):{spec}}" + (f" ± {statistics.stdev(values):{spec}}" if len(values) > 1 else "")


# ---- memory ----


def repeat_cache(folder: Path, times: int) -> Path:
    """The cache in `folder` with its shards `times` times, copied under new names, beside it."""
    other = folder.with_name(folder.name + f"-x{times}")
    shutil.copytree(folder, other)
    manifest = read_manifest(other)
    entries = []
    for copy_ in range(times):
        for entry in manifest["shards"]:
            name = shard_name(len(entries))
            if copy_:
                shutil.copyfile(other / DATA / entry["name"], other / DATA / name)
            entries.append({**entry, "name": name})
    totals = {f"total_{k}": times * manifest[f"total_{k}"] for k in ("rows", "positions", "bytes")}
    manifest |= {"shards": entries, **totals, "dataset": {**manifest["dataset"], "rows": totals["total_rows"]}}
    write_json(other / MANIFEST, manifest)
    return other


class Repeated(torch.utils.data.Dataset):
    def __init__(self, rows: Any, times: int) -> None:
        self.rows, self.times = rows, times

    def __len__(self) -> int:
        return len(self.rows) * self.times

    def __getitem__(self, row: int) -> Any:
        return self.rows[row % len(self.rows)]


def train_from(folder: Path, times: int, batches: int, steps: int) -> None:
    """Run in a process of its own: prints the peak of its resident memory."""
    pair = PAIRS["50k"]
    trainer = DistillationTrainer(
        model=llama(pair, 2, 64),
        teacher_model=CachedTeacher(folder),
        args=arguments(folder.parent / "run", pair.batch, max_steps=steps, train_sampling_strategy="random"),
        train_dataset=Repeated(random_rows(pair, batches).with_format("torch"), times),
        data_collator=default_data_collator,
    )
    trainer.train()
    shards = trainer.teacher.parts["train"]._checked
    print(json.dumps({"peak": resident_peak(), "shards": len(shards)}))


def memory(options: argparse.Namespace, folder: Path) -> None:
    pair = PAIRS["50k"]
    teacher, data = models(pair)[0], random_rows(pair, options.batches or pair.batches)
    args = arguments(folder / "run", pair.batch, **cache_options(folder, "hidden"))
    trainer = DistillationTrainer(
        model=llama(pair, 2, 64),
        teacher_model=teacher,
        args=args,
        train_dataset=data,
        data_collator=default_data_collator,
    )
    small = Path(args.teacher_cache_dir) / "train"
    size = trainer.build_teacher_cache().manifest["total_bytes"]
    times = max(1, round(options.gigabytes * 1e9 / size))
    peaks = {}
    for count in (1, times):
        where = small if count == 1 else repeat_cache(small, count)
        command = [
            sys.executable,
            __file__,
            "--child",
            str(where),
            str(count),
            str(len(data) // pair.batch),
            str(options.memory_steps),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        peaks[count] = found["peak"]
        print(f"cache of {size * count / 1e9:.2f} GB ({len(data) * count:,} rows): peak {found['peak'] / 1e6:,.0f} MB, "
              f"{found['shards']} shards read")  # fmt: skip
    print(f"difference {(peaks[times] - peaks[1]) / 1e6:,.0f} MB")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        folder, *numbers = sys.argv[2:]
        train_from(Path(folder), *map(int, numbers))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "speed", "quality", "memory"), default="all")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, help="of the data; by default 24 of the pair 50k, 320 of the small one")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--memory_steps", type=int, default=300)
    parser.add_argument("--max_load", type=float, default=0.5)
    options = parser.parse_args()
    if options.part == "all":  # each in a process of its own: memory is measured as it is by default
        for part in ("speed", "quality", "memory"):
            subprocess.run([sys.executable, *sys.argv, "--part", part], check=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        {"speed": speed, "quality": quality, "memory": memory}[options.part](options, Path(folder))


if __name__ == "__main__":
    main()
