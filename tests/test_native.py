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
    def faults(keep: bool) -> int:
        run = [sys.executable, "-c", FAULTS.format(keep=keep)]
        return int(subprocess.run(run, check=True, capture_output=True).stdout)

    pages = 20 * 4 * 1024  # of 4 KiB
    # What lies above the freed tensors may by chance keep their memory in the process: in every second one.
    lost = any(faults(keep=False) > pages / 2 for _ in range(20))
    assert lost, "nothing to be won: this test says nothing any more"
    assert max(faults(keep=True) for _ in range(3)) < pages / 20
