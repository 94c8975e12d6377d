"""The examples in the docstrings run, for the modules that need torch only."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

MODULES = ["divergences", "sparse_targets", "distributions", "reductions", "modules"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"kd_trainer.losses.{name}")
    torch.manual_seed(0)
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0
