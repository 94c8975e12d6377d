"""The list of traps stays true: each line that it breaks is still there, once, and so are the tests that notice."""

from __future__ import annotations

import pytest

from tests.helpers.traps import ROOT, TRAPS


def test_all_traps_are_listed():
    assert list(TRAPS) == list(range(1, 42))


@pytest.mark.parametrize("number", TRAPS)
def test_the_line_is_there_once(number):
    trap = TRAPS[number]
    assert (ROOT / trap.file).read_text(encoding="utf-8").count(trap.line) == 1
    assert trap.line != trap.broken
    for name in trap.tests.split():
        assert not name.endswith(".py") or (ROOT / name).exists()
