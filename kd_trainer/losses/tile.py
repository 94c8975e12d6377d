"""The loss of one tile of both models' logits: of each row, with the gradient written over the student's tile.

The elementwise middle of `fused_linear.py`, which brings the tiles and multiplies the gradient on. In torch it is
autograd of the divergence's own formula, on blocks of rows that stay in the processor's cache; with a compiler
whole tiles go to `kernels/tile_triton.py` (GPU) or `kernels/tile_cpu.c`, for the divergences these have.
Letters: R rows, V vocabulary; s, t logits of student and teacher over T [R, V]; q = softmax(s), p = softmax(t).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import C_DIVERGENCES, PAYS_FROM, can_compile, tile_on_cpu
from ..validation import warn
from .divergences import DIVERGENCES
from .formulas import standardize
from .reductions import IGNORE_INDEX, wrong_labels
from .tile_types import Rows, Setting, halves_of, widened

logger = logging.getLogger(__name__)

# Bytes of one tile's rows that a thread has in a block of the uncompiled way: all temporaries then stay in its cache.
_BLOCK_BYTES = 3 * 2**17
_LARGE_BLOCK_BYTES = 2**27  # on accelerators, to hold few of them


def tile_loss(
    setting: Setting,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    *,
    gradient: bool,
    compiled: bool,
) -> Rows:
    """Losses of a tile's rows; with `gradient`, the student's tile is overwritten by dL/d(student's logits over T).

    Args:
        setting: what is computed.
        student, teacher: logits over T [R, V], float32, float64, bfloat16 or float16; finite.
        weights: [R, 2] in float32 or wider: L = sum over rows of weights[:, 0] * D + weights[:, 1] / T * hard.
        labels: [R] class ids, -100 where there is none; None without hard loss. A row with any other label has a hard
            loss of NaN, and a gradient of NaN where the hard loss weighs.
        compiled: the whole tile by the Triton kernel (CUDA) or the C code where these are, else blocks of rows.

    Returns:
        `Rows`; `hard` is 0 in rows without a label.
    """
    accelerator = accelerator_of(setting, student, teacher) if compiled else None
    if accelerator == "triton":
        from ..kernels.tile_triton import tile_on_device

        return Rows(*tile_on_device(setting, student, teacher, weights, labels, gradient=gradient))
    if accelerator == "c":
        halves = halves_of(setting.temperature)
        soft, hard, same = tile_on_cpu(setting, halves, student, teacher, weights, labels, gradient=gradient)
        return Rows(soft, hard, same != 0)
    wrong = None
    if labels is not None:
        labels, weights, wrong = without_wrong(labels, weights, student.shape[1])
    size = block_rows(student)
    each = [x.split(size) for x in (student, teacher, weights, *(() if labels is None else (labels,)))]
    blocks = [_block_loss(setting, *some, gradient=gradient) for some in zip(*each, strict=True)]
    soft, hard, same = (torch.cat(column) for column in zip(*blocks, strict=True))
    return Rows(soft, hard if wrong is None else torch.where(wrong, torch.nan, hard), same)


def _block_loss(
    setting: Setting, student: Tensor, teacher: Tensor, weights: Tensor, labels: Tensor | None = None, *, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a block of rows in torch, by autograd of the divergence's own formula."""
    entry, temperature = DIVERGENCES[setting.divergence], setting.temperature
    same = ((student == student.amax(-1, True)) & (teacher == teacher.amax(-1, True))).any(-1)
    s, slope = widened(student), None
    with torch.set_grad_enabled(gradient):
        s = s.detach().requires_grad_(gradient)
        t, compared = widened(teacher), s
        if setting.standardized:
            t, compared = standardize(t) / temperature, standardize(s) / temperature
        of_teacher, of_student = entry.arguments(t), entry.arguments(compared)
        soft = entry.evaluate(of_teacher, of_student, setting.beta, labels, once=True).sum(-1)
        if gradient:
            (slope,) = torch.autograd.grad(soft, s, weights[:, 0].to(soft.dtype))
    hard, soft = torch.zeros_like(soft), soft.detach()
    if setting.hard:
        labels = torch.full_like(same, IGNORE_INDEX, dtype=torch.int64) if labels is None else labels
        labelled, index = labels >= 0, labels.clamp(min=0).unsqueeze(1)
        if entry.of_logits or setting.standardized:
            log_hard = torch.log_softmax(s.detach() * temperature, -1)
        else:
            log_q = of_student.detach()
            log_hard = log_q if temperature == 1 else torch.log_softmax(log_q.mul_(temperature), -1)
        at_label = log_hard.gather(1, index)
        hard = torch.where(labelled, -at_label.squeeze(1), 0.0)
        if slope is not None:
            of_label = slope.gather(1, index) + weights[:, 1:] * at_label.expm1()  # 1 - q may be very small
            slope.addcmul_(log_hard.exp_(), weights[:, 1:])
            slope.scatter_(1, index, torch.where(labelled.unsqueeze(1), of_label, slope.gather(1, index)))
    if slope is not None:
        student.copy_(slope)
    return soft, hard.detach(), same


def accelerator_of(setting: Setting, *tiles: Tensor) -> str | None:
    """Which kernel can take these tiles: "triton", "c" or None; both have the divergences they have."""
    if setting.standardized:
        return None
    if tiles[0].is_cuda:
        from ..kernels.tile_triton import TRITON_DIVERGENCES, has_triton

        return "triton" if setting.divergence in TRITON_DIVERGENCES and has_triton(tiles[0]) else None
    return "c" if setting.divergence in C_DIVERGENCES and can_compile(*tiles) else None


def without_wrong(labels: Tensor, weights: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(labels of which the wrong ones are none, weights [R, 2] that are NaN for these where the hard loss weighs, which
    rows are wrong)."""
    wrong = wrong_labels(labels, classes)
    soft, hard = weights.unbind(1)
    weights = torch.stack((soft, hard.masked_fill(wrong & (hard != 0), torch.nan)), 1)
    return labels.masked_fill(wrong, IGNORE_INDEX), weights, wrong


def block_rows(tile: Tensor) -> int:
    """Rows of a block where nothing is compiled."""
    size, threads = _LARGE_BLOCK_BYTES, 1
    if tile.device.type == "cpu":
        threads = torch.get_num_threads()
        size = _BLOCK_BYTES * threads
    block = min(tile.shape[0], max(1, size // (4 * tile.shape[1])))
    return block - (block % threads if block > threads else 0)  # whole rows for each thread


# Logits of a tile; below it compiling may take longer than it will ever save.
_PAYS_FROM = {"cpu": PAYS_FROM, "cuda": 2**22}


def compile_pays(
    setting: Setting,
    rows: int,
    columns: int,
    like: Tensor,
    wanted: bool | None,
    *,
    agrees: Callable[..., bool] | None = None,
) -> bool:
    """Whether to take a kernel: as `wanted` has it, or where there is a compiler and the tile is large.

    The first time for a setting the kernel is compared with the plain way on a small tile, by `agrees`.
    """
    device = like.device.type
    if wanted is False or like.dtype == torch.float64 or accelerator_of(setting, like) is None:
        return False
    if wanted is None and rows * columns < _PAYS_FROM[device]:
        return False
    if not (setting.hard and halves_of(setting.temperature)):
        setting = setting._replace(temperature=1.3)  # one code for all of them: a schedule compares once
    return (agrees or _agrees)(setting, columns, like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def _agrees(setting: Setting, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    tiles = (4 * torch.randn(2, 6, columns, generator=generator)).to(device, dtype)
    labels = torch.tensor([0, -100, columns - 1, 1, 2, 3], device=device) if setting.hard and columns > 4 else None
    weights = torch.tensor([[0.5, 0.25]], device=device).repeat(6, 1)

    def run(compiled: bool) -> tuple[Tensor, ...]:
        student = tiles[0].clone()
        rows = tile_loss(setting, student, tiles[1], weights, labels, gradient=True, compiled=compiled)
        return student.float(), rows.soft.float(), rows.hard.float()

    return same_compiled(run, dtype)


def same_compiled(run: Callable[[bool], tuple[Tensor, ...]], dtype: torch.dtype) -> bool:
    """Whether `run(True)`, compiled, gives what `run(False)` gives; warns where it does not."""
    try:
        results = [run(compiled) for compiled in (False, True)]
    except Exception as error:  # compilers fail in many ways
        warn(logger, "The loss runs uncompiled: compiling it failed with %s.", str(error).splitlines()[:1])
        return False
    room = 1e-4 if dtype == torch.float32 else 2e-2
    pairs = zip(*results, strict=True)
    if all(torch.allclose(a, b, rtol=room, atol=room * float(a.abs().max())) for a, b in pairs):
        return True
    warn(logger, "The loss runs uncompiled: what the compiler made of it differs from the plain computation.")
    return False
