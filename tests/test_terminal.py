"""What a person sees: lines of their own beside a progress bar, warnings from one process, sizes that say something."""

from __future__ import annotations

import ast
import io
import logging
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import kd_trainer
from kd_trainer.tasks.model_facts import times
from kd_trainer.training.start_block import card_section
from kd_trainer.validation import is_first_process, leave_progress_bar, warn
from tests.helpers import tiny

PACKAGE = Path(kd_trainer.__file__).parent


class Terminal(io.StringIO):
    """Where both streams end, as on a screen or in a log file."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


@pytest.fixture(params=[True, False], ids=["screen", "file"])
def terminal(request):
    return Terminal(request.param)


def lines(terminal: Terminal) -> list[str]:
    """As they stand in a file; on a screen a carriage return begins the line again."""
    return re.split(r"[\r\n]" if terminal.tty else "\n", terminal.getvalue())


def test_the_start_block_is_not_glued_to_the_progress_bar(terminal, tmp_path):
    with redirect_stdout(terminal), redirect_stderr(terminal):
        tiny.trainer("classification", tmp_path, disable_tqdm=False).train()
    shown = [line for line in lines(terminal) if "[kd_trainer]" in line]
    assert len(shown) >= 4
    assert all(line.startswith("[kd_trainer] ") for line in shown)
    assert "0/4" in terminal.getvalue()  # there was a bar
    if terminal.tty:  # which is not left above the block
        assert terminal.getvalue().split("[kd_trainer]")[0].endswith("\r")


def test_a_warning_is_not_glued_to_the_progress_bar(terminal):
    from tqdm.auto import tqdm

    logger = logging.Logger("one of its own")
    logger.addHandler(logging.StreamHandler(terminal))
    with tqdm(total=3, file=terminal):
        warn(logger, "the %s", "text")
    assert "the text" in lines(terminal)
    terminal.truncate(0)
    leave_progress_bar()  # the bar is closed
    assert not terminal.getvalue()


@pytest.mark.parametrize("name", ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"])
def test_warnings_come_from_one_process(name, monkeypatch, caplog):
    for known in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"):
        monkeypatch.delenv(known, raising=False)
    assert is_first_process()
    for rank in ("0", "1", "7"):
        monkeypatch.setenv(name, rank)
        assert is_first_process() == (rank == "0")
        warn(logging.getLogger("kd_trainer"), "of %s", rank)
    assert [record.message for record in caplog.records] == ["of 0"]


def test_no_file_warns_from_every_process():
    """`warn` is the one place where the package warns; `warnings.warn` is left to functions that a script calls."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = f"{ast.unparse(node.func.value)}.{node.func.attr}"
                if node.func.attr in ("warning", "warning_once", "warn", "error") and "logg" in called:
                    found.append(path.stem)
    assert found == ["validation"]


def test_class_names_are_warned_about_by_the_first_process(monkeypatch, caplog, tmp_path):
    student, teacher = tiny.models("classification")
    teacher.config.id2label = {i: f"another {i}" for i in range(tiny.CLASSES)}
    monkeypatch.setenv("RANK", "1")
    tiny.trainer("classification", tmp_path, pair=(student, teacher))
    assert not caplog.records
    monkeypatch.setenv("RANK", "0")
    tiny.trainer("classification", tmp_path, pair=(student, teacher))
    assert sum("cannot be compared by name" in record.message for record in caplog.records) == 1


def test_a_teacher_smaller_than_the_student_is_named(capsys, tmp_path):
    student, teacher = tiny.Plain(features=6), tiny.models("plain")[1]
    student.more = tiny.nn.Linear(100, 100)
    tiny.trainer("plain", tmp_path, pair=(student, teacher), max_steps=1).train()
    printed = capsys.readouterr().out
    assert "(0.0035x the student)" in printed
    assert "[kd_trainer] the teacher is smaller than the student: swap them if that is not meant" in printed
    tiny.trainer("plain", tmp_path, max_steps=1).train()
    printed = capsys.readouterr().out
    assert "(1.0x the student)" in printed
    assert "smaller" not in printed


def test_sizes_in_words():
    assert times(6.58, "the student") == "6.6x the student"
    assert times(0.012345, "the student") == "0.012x the student"
    summary = {"teacher": "t", "teacher_parameters": 10, "student_parameters": 20, "formula": "loss"}
    assert "into 20 parameters (2.0x larger)" in card_section(summary, [])
    assert "(2.0x smaller)" in card_section({**summary, "teacher_parameters": 40}, [])
