"""What can be known before a run: `check()` and memory."""

from .check import examine
from .findings import Finding, has_errors, print_findings
from .memory import Memory, estimate_memory

__all__ = [
    "Finding",
    "Memory",
    "estimate_memory",
    "examine",
    "has_errors",
    "print_findings",
]
