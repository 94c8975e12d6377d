"""Set before torch is imported: one thread a test process (they run side by side), and no network."""

import gc
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> None:
    """Every training collects garbage: nine tenths of a short one went into looking through what is imported."""
    gc.collect()
    gc.freeze()
