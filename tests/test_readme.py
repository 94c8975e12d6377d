"""What the READMEs show is true: Python blocks run, JSON blocks parse, the table of options is complete."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kd_trainer
from kd_trainer import (
    DIVERGENCES,
    DistillationArguments,
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainingArguments,
    parse_args,
)

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "examples/README.md", "configs/README.md"]


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for i, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)):
            if language == "python" and '"path/of/' in text:
                continue  # these need models and data: tests/examples/test_guide_blocks.py
            beside = pytest.mark.launch if language == "python" and page != PAGES[0] else ()
            found.append(pytest.param(text, id=f"{page}-{i}", marks=beside))
    return found


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_run(text, tmp_path):
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("text", blocks("json"))
def test_json_blocks_parse(text, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"output_dir": str(tmp_path), **json.loads(text)}))
    assert parse_args(DistillationTrainingArguments, argv=[str(file)]).output_dir == str(tmp_path)


def test_pre_commit_runs_the_pinned_ruff():
    (hook,) = re.findall(r"ruff-pre-commit\n +rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert f"\nruff=={hook} " in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.name)
def test_configs_parse(path):
    script = next(
        name for name in ("distill_mlp", "distill_causal_lm", "distill_seq2seq") if path.stem.startswith(name)
    )
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        example = importlib.import_module(script)
    finally:
        sys.path.pop(0)
    kind = Seq2SeqDistillationTrainingArguments if script == "distill_seq2seq" else DistillationTrainingArguments
    args, _ = parse_args(kind, example.ExampleArguments, argv=[str(path), "--use_cpu", "true"])
    assert args.output_dir.startswith("outputs/")


def test_every_option_and_divergence_has_a_row():
    text = "".join((ROOT / page).read_text() for page in reversed(PAGES))  # of two rows the README's counts
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^`|]+)`? \|", text, re.M))
    for field in dataclasses.fields(DistillationArguments):
        assert field.name in rows, field.name
        shown = rows[field.name].strip()
        assert shown == ("none" if field.default is None else str(field.default).lower()), field.name
    assert all(f"`{name}`" in text for name in DIVERGENCES)


def test_users_type_names_of_the_package_and_not_of_its_files():
    files = {path.stem for path in (ROOT / "kd_trainer").rglob("*")}
    for page in [*map(ROOT.joinpath, PAGES), *(ROOT / "examples").glob("*.py")]:
        found = set(re.findall(r"\bkd_trainer\.(\w+)", page.read_text(encoding="utf-8")))
        assert not found & files, f"{page.name} names a file of the package"
        assert found <= set(kd_trainer.__all__)


def test_the_readme_is_short_and_has_two_setup_commands():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 300
    assert len(re.findall(r"^pip install", text, re.M)) == 2
    assert all((ROOT / link).exists() for link in re.findall(r"\]\(((?!http)[^)#]+)", text))


@pytest.mark.parametrize("page", [*PAGES, "tests/benchmarks/README.md"])
def test_links_lead_to_files_and_headings(page):
    for file, heading in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", (ROOT / page).read_text()):
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), file
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{file}#{heading}"


def test_the_files_that_the_contributing_section_names_exist():
    section = (ROOT / "README.md").read_text().partition("## Contributing")[2]
    named = re.findall(r"`((?:tests/)?\w+/\w+\.py)`", section)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).is_file() or (ROOT / "kd_trainer" / name).is_file(), name


def test_the_pictures_are_small_and_shown():
    pictures = sorted((ROOT / "examples" / "images").glob("*"))
    assert pictures
    for picture in pictures:
        assert picture.suffix == ".png"
        assert picture.stat().st_size <= 60_000
        assert f"](examples/images/{picture.name})" in (ROOT / "README.md").read_text()
