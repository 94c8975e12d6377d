"""The language-model examples run end to end at a tiny setting, and their parts do what they are for."""

from __future__ import annotations

import importlib
import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tests.helpers.script_process import run_script

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, CONFIGS = ROOT / "examples", ROOT / "configs"
TINY = {
    "max_steps": 6,
    "warmup_steps": 0,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 3,
    "teacher_steps": 6,
    "teacher_hidden_size": 32,
    "teacher_num_layers": 4,
    "vocab_size": 300,
    "use_cpu": "true",
    "disable_tqdm": "true",
}


def run(script: str, config: str, folder: Path, **options: Any) -> str:
    """What the example prints when it is started in `folder` with the tiny options; its output goes to `folder`/out."""
    argv = [str(CONFIGS / config), "--output_dir", "out"]
    for name, value in {**TINY, **options}.items():
        argv += [f"--{name}", str(value)]
    return run_script(EXAMPLES / script, argv, folder=folder, timeout=280)


def table(printed: str) -> dict[str, list[str]]:
    """The cells of the printed table, by the name of the model."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def module(name: str) -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def text_file(folder: Path) -> Path:
    draw = random.Random(0)
    words = ["a", "teacher", "and", "its", "student", "read", "the", "same", "words"]
    path = folder / "my.txt"
    path.write_text("".join(" ".join(draw.choices(words, k=12)) + ".\n" for _ in range(300)))
    return path


@pytest.mark.trains
def test_causal_lm_on_a_file_of_text(tmp_path):
    options = {"train_file": text_file(tmp_path), "block_size": 16, "max_validation_blocks": 8}
    printed = run("distill_causal_lm.py", "distill_causal_lm.json", tmp_path, **options)
    assert "loss = 0.8 * soft(forward_kl, T=1) + 0.2 * hard, per token" in printed
    rows = table(printed)
    assert list(rows) == ["teacher", "student, before", "distilled", "baseline"]
    assert rows["distilled"][0] == rows["baseline"][0] == rows["student, before"][0] != rows["teacher"][0]
    assert rows["teacher"][2] == "–"
    assert rows["distilled"][1] != rows["baseline"][1]
    assert len(re.findall(r"distilled below baseline in [01] of 1 runs", printed)) == 2
    folder = tmp_path / "out" / "seed-42"
    student = AutoModelForCausalLM.from_pretrained(folder / "distilled")
    assert student.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(folder / "distilled").decode([0]) == "<|pad|>"
    assert not (folder / "baseline" / "distillation.json").exists()
    assert json.loads((folder / "distilled" / "distillation.json").read_text())["formula"].startswith(
        "loss = 0.8 * soft"
    )

    # the pair by path, with the other config: batchmean is the same training, at 15 times the scale (15 tokens a row)
    pair = {"teacher_model_name_or_path": folder / "teacher", "student_model_name_or_path": folder / "distilled"}
    options |= {**pair, "output_dir": "again"}
    again = run("distill_causal_lm.py", "distill_causal_lm_batchmean.json", tmp_path, **options, max_grad_norm=15)
    assert "per row" in again
    means = run("distill_causal_lm.py", "distill_causal_lm.json", tmp_path, **options)
    for name in ("distilled", "baseline"):
        assert float(table(again)[name][1]) == pytest.approx(float(table(means)[name][1]), rel=2e-3)
    assert table(means)["student, before"][1] == rows["distilled"][1]

    # from the teacher's hidden states, kept on disk
    options |= {"teacher_cache_dir": "cache", "teacher_cache_format": "hidden"}
    cached = run("distill_causal_lm.py", "distill_causal_lm_cache.json", tmp_path, **options)
    for name in ("distilled", "baseline"):
        assert float(table(cached)[name][1]) == pytest.approx(float(table(means)[name][1]), rel=1e-3)
    assert (tmp_path / "cache" / "seed-42" / "train" / "manifest.json").exists()


@pytest.mark.trains
def test_causal_lm_on_its_own_text(tmp_path):
    options = {"block_size": 16, "max_validation_blocks": 8, "student_layers": "every_4"}
    run("distill_causal_lm.py", "distill_causal_lm.json", tmp_path, **options)
    folder = tmp_path / "out" / "seed-42" / "distilled"
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1
    assert "def" in AutoTokenizer.from_pretrained(folder).decode(range(300))


@pytest.mark.trains
def test_causal_lm_over_seeds(tmp_path):
    options = {"train_file": text_file(tmp_path), "block_size": 16, "max_validation_blocks": 8, "seeds": 2}
    printed = run("distill_causal_lm.py", "distill_causal_lm.json", tmp_path, **options)
    assert "mean ± standard deviation over 2 seeds" in printed
    assert "±" in table(printed)["distilled"][1]
    assert "±" not in table(printed)["distilled"][0]
    assert (tmp_path / "out" / "seed-43" / "baseline" / "model.safetensors").exists()


@pytest.mark.trains
def test_a_stopped_run_goes_on(tmp_path):
    options = {"train_file": text_file(tmp_path), "block_size": 16, "max_validation_blocks": 8, "save_steps": 3}
    options["save_strategy"] = "steps"
    whole = table(run("distill_causal_lm.py", "distill_causal_lm.json", tmp_path, **options))
    baseline = tmp_path / "out" / "seed-42" / "baseline"
    for name in ("train_results.json", "model.safetensors"):
        (baseline / name).unlink()
    shutil.rmtree(baseline / "checkpoint-6")
    options["resume_from_checkpoint"] = "true"
    again = table(run("distill_causal_lm.py", "distill_causal_lm.json", tmp_path, **options))
    assert again.keys() == whole.keys()
    for name, row in again.items():
        assert row[:-1] == whole[name][:-1]
        assert row[-1] == "–"  # the time of the last session is not that of the whole training


@pytest.mark.trains
def test_seq2seq_on_its_own_pairs(tmp_path):
    printed = run("distill_seq2seq.py", "distill_seq2seq.json", tmp_path, num_validation=8, generation_max_length=8)
    rows = table(printed)
    assert list(rows) == ["teacher", "student, before", "distilled", "baseline"]
    assert all(0 <= float(row[4]) <= 100 for row in rows.values())
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "seed-42" / "distilled")
    assert (student.config.encoder_layers, student.config.decoder_layers) == (2, 2)


@pytest.mark.trains
def test_seq2seq_on_a_file_of_pairs_without_generation(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"from": f"{i} and {i + 1}", "to": str(2 * i + 1)} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = {"train_file": path, "source_column": "from", "target_column": "to", "predict_with_generate": "false"}
    printed = run("distill_seq2seq.py", "distill_seq2seq.json", tmp_path, **columns)
    assert table(printed)["teacher"][4] == "–"


@pytest.mark.trains
def test_the_local_text_is_held_out_by_file():
    texts = module("lm_text").local_texts()
    assert sum(map(len, texts["train"])) > 1_000_000
    assert 0.02 < sum(map(len, texts["validation"])) / sum(map(len, texts["train"])) < 0.3
    assert texts == module("lm_text").local_texts()


def test_the_tokenizer_loses_nothing():
    lm_text = module("lm_text")
    tokenizer = lm_text.train_tokenizer(["some words, some more words"] * 9, 270)
    text = "Words — and bytes: \u00e9\n\t\U0001f600"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("a" + lm_text.END)["input_ids"][-1] == tokenizer.eos_token_id
    ended = lm_text.train_tokenizer(["some words"], 258, append_end=True)
    assert len(ended) == 258
    assert ended("ab")["input_ids"][2:] == [ended.eos_token_id]
    assert ended("abcdef", truncation=True, max_length=3)["input_ids"][2:] == [ended.eos_token_id]


def test_damage_replaces_letters_only():
    damaged = module("distill_seq2seq").damaged
    text = "The words (of 12 lines), " * 40
    made = damaged(text, random.Random(0))
    assert len(made) == len(text)
    changed = [(a, b) for a, b in zip(text, made, strict=True) if a != b]
    assert all(a.isalpha() and b.isalpha() for a, b in changed)
    assert 0.05 < len(changed) / sum(map(str.isalpha, text)) < 0.15


@pytest.mark.parametrize("name", ["distill_causal_lm.py", "distill_seq2seq.py"])
def test_an_example_opens_with_its_commands(name):
    header = (EXAMPLES / name).read_text(encoding="utf-8").split('"""')[1]
    assert f"python examples/{name} configs/" in header
    for config in re.findall(r"configs/\w+\.json", header):
        assert (ROOT / config).exists()
