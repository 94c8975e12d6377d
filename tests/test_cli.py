"""The `kd-trainer` command as a user runs it: in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from kd_trainer.cli import main
from kd_trainer.report import save_predictions


def run(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kd_trainer.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def runs(tmp_path):
    labels = torch.arange(50) % 2
    for name, wrong in (("teacher", 2), ("kd", 5), ("base=line", 20)):
        predicted = torch.where(torch.arange(50) < wrong, 1 - labels, labels)
        save_predictions(tmp_path / name, torch.nn.functional.one_hot(predicted, 2) * 3.0, labels)
    return tmp_path


@pytest.mark.launch
def test_report_prints_and_writes(runs):
    done = run("report", "teacher", "distilled, 3 epochs=kd", "baseline=base=line", "--output", "out/a", cwd=runs)
    assert (done.returncode, done.stderr) == (0, "")
    assert "distilled, 3 epochs" in done.stdout
    assert "+30.0" in done.stdout
    assert "Written to out/a: report.md, report.json, reliability.png" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if "Written" not in line) <= 100
    content = json.loads((runs / "out/a/report.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in content["rows"]] == ["teacher", "distilled, 3 epochs", "baseline"]


def test_options(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    # A folder whose own name holds a "=" is a folder.
    assert main(["report", "base=line", "--no-plots", "--title", "Mine", "--output", "out"]) == 0
    assert capsys.readouterr().out.startswith("Mine\n")
    assert sorted(file.name for file in (runs / "out").iterdir()) == ["report.json", "report.md"]
    assert json.loads((runs / "out/report.json").read_text())["rows"][0]["name"] == "base=line"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nowhere", "`run` is 'nowhere'; expected an existing folder"),
        ("kd=nowhere", "`run` is 'nowhere'; expected an existing folder"),
        (".", "`run` is '.'; expected the output folder of a Trainer run, with at least one of trainer_state.json"),
        ("=kd", "`run` is '=kd'; expected NAME=DIR or DIR"),
        ("kd=", "`run` is 'kd='; expected NAME=DIR or DIR"),
    ],
)
def test_errors_are_one_line_and_code_2(runs, capsys, monkeypatch, argument, message):
    monkeypatch.chdir(runs)
    assert main(["report", argument]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"kd-trainer: {message}")
    assert error.count("\n") == 1
    assert not (runs / "report").exists()


def test_other_test_rows_are_an_error(runs, capsys):
    save_predictions(runs / "other", torch.zeros(3, 2), [0, 1, 0])
    assert main(["report", str(runs / "teacher"), str(runs / "other"), "--output", str(runs / "out")]) == 2
    assert "with 3 and 50 rows; expected the same test rows" in capsys.readouterr().err


def test_process_exits_with_2_on_an_error(tmp_path):
    done = run("report", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_help_imports_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys\nfrom kd_trainer.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'rich', 'numpy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    shown = {"--help": "memory", "memory --help": "--teacher-bits", "report --help": "report"}
    for arguments, word in shown.items():
        command = [sys.executable, "-c", code, *arguments.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert word in done.stdout
    assert "teacher=out/teacher" in done.stdout
    assert "--no-plots" in done.stdout
