"""`validation.py` and `files.py`: one form for every message, and files that are whole or not there."""

from __future__ import annotations

import math
import os
import pickle
import re
from pathlib import Path

import pytest

from kd_trainer.files import write_atomically
from kd_trainer.validation import check_choice, check_number, fail, message, nearest, quoted

# ---- checks ----


def test_message_has_the_house_form():
    assert message("a", 3, "a number < 2", "Set it lower.") == "`a` is 3; expected a number < 2. Set it lower."
    assert message("a", quoted("x"), "y", "Fix.") == "`a` is 'x'; expected y. Fix."
    assert message("a", "of shape (2, 3)", "y", "Fix.") == "`a` is of shape (2, 3); expected y. Fix."
    assert message("a", None, "y", "Fix.", because="of z") == "`a` is None; expected y, because of z. Fix."


def test_message_remembers_the_fix():
    made = message("a", 3, "a number. Or two", "Fix. It.")
    assert made.fix == "Fix. It."
    assert pickle.loads(pickle.dumps(ValueError(made))).args[0].fix == "Fix. It."


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, FileNotFoundError])
def test_fail_raises_the_kind_asked_for(error):
    with pytest.raises(error, match=r"^`a` is 1; expected 2\. Fix\.$") as caught:
        fail("a", 1, "2", "Fix.", error=error)
    assert type(caught.value) is error


def test_fail_raises_a_value_error_by_default():
    with pytest.raises(ValueError, match="because z"):
        fail("a", 1, "2", "Fix.", because="z")


def test_nearest_names_the_closest_or_nothing():
    assert nearest("kd_alfa", ["kd_beta", "kd_alpha"]) == "Did you mean `kd_alpha`?"
    assert nearest("xyz", ["kd_beta", "kd_alpha"]) == ""


def test_choice():
    check_choice("a", "x", ["x", "y"])
    check_choice("a", "y", iter(["x", "y"]))  # an iterator is read once
    with pytest.raises(
        ValueError, match=r"`a` is 'foward'; expected one of 'forward', 'reverse'. Did you mean `forward`"
    ):
        check_choice("a", "foward", ["forward", "reverse"])
    with pytest.raises(ValueError, match=r"`a` is 7; expected one of 'x'\. Set `a` to one of these\."):
        check_choice("a", 7, ["x"])


@pytest.mark.parametrize(
    ("value", "interval"),
    [(0, {"low": 0}), (1.0, {"low": 0, "high": 1}), (1e-9, {"low": 0, "open_low": True}), (-3, {"high": -3}), (7, {})],
)
def test_numbers_inside(value, interval):
    check_number("a", value, **interval)


@pytest.mark.parametrize(
    ("value", "interval", "expected"),
    [
        (0, {"low": 0, "open_low": True}, "a finite number > 0"),
        (-1, {"low": 0}, "a finite number >= 0"),
        (1, {"high": 1, "open_high": True}, "a finite number < 1"),
        (2, {"high": 1}, "a finite number <= 1"),
        (1, {"low": 0, "high": 1, "open_low": True, "open_high": True}, "a number in (0, 1)"),
        (1.5, {"low": 0, "high": 1}, "a number in [0, 1]"),
        (math.inf, {"low": 0}, "a finite number >= 0"),
        (-math.inf, {}, "a finite number"),
        (math.nan, {"low": 0, "high": 1}, "a number in [0, 1]"),
    ],
)
def test_numbers_outside(value, interval, expected):
    with pytest.raises(ValueError, match=re.escape(f"`a` is {value}; expected {expected}. Set `a` to a value in that")):
        check_number("a", value, **interval)


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, [1.0]])
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match=rf"Give `a` as a number, not as {type(value).__name__}\."):
        check_number("a", value, low=0)


# ---- files ----


@pytest.mark.parametrize(("content", "data"), [("grün\n", "grün\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_write_atomically_writes_the_content_and_nothing_else(content, data, tmp_path):
    path = write_atomically(tmp_path / "new" / "folder" / "file.txt", content)
    assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644
    assert write_atomically(str(path), "second").read_text() == "second"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_temporary_one(call, tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "file.txt", "old")

    def broken(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, call, broken)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    path, seen = write_atomically(tmp_path / "file.txt", "old"), []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (seen.append((path.read_text(), Path(a).read_text())), replace(a, b))
    )
    write_atomically(path, "new")
    assert seen == [("old", "new")]
