"""Set before torch is imported: one thread a test process (they run side by side), and no network."""

import functools
import gc
import os
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> None:
    """Every training collects garbage: nine tenths of a short one went into looking through what is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def short_trainings_repeat_nothing() -> None:
    """A sixth of a short training is what upstream computes again in each: whether packages are installed (a search
    of the disk), the stack of each seeding for devices that are not there, and the oldest garbage."""
    import torch
    from accelerate.utils import imports, memory

    imports._is_package_available = functools.cache(imports._is_package_available)
    memory.gc = SimpleNamespace(collect=functools.partial(gc.collect, 1))
    for device in (torch.cuda, torch.xpu, torch.mtia):
        device.traceback = SimpleNamespace(format_stack=list)
