"""`native.py`: what every use of the processor rests on."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from kd_trainer.native import keep_freed_memory

if {keep}:
    keep_freed_memory()


def step():
    tensors = [torch.ones(2**20) for _ in range(4)]  # of 4 MiB each


for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc, whose memory this is about")
def test_freed_memory_is_kept_for_the_next_step():
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], check=True, capture_output=True).stdout)
        for keep in (False, True)
    ]
    pages = 20 * 4 * 1024  # of 4 KiB
    assert faults[0] > pages / 2, "nothing to be won: this test says nothing any more"
    assert faults[1] < pages / 20
