"""What can be known before a run: `check()` and memory."""

from .memory import Memory, estimate_memory

__all__ = [
    "Memory",
    "estimate_memory",
]
