"""Hand-written C and Triton kernels of the loss, each with a twin in torch under `losses/`."""

from .c_compiler import PAYS_FROM, can_compile
from .tile_cpu import C_DIVERGENCES, overwrite_on_cpu, sparse_tile_on_cpu, sums_on_cpu, tile_on_cpu

__all__ = [
    "C_DIVERGENCES",
    "PAYS_FROM",
    "can_compile",
    "overwrite_on_cpu",
    "sparse_tile_on_cpu",
    "sums_on_cpu",
    "tile_on_cpu",
]
