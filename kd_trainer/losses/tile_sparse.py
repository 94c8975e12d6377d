"""The loss of one tile of the student's logits to a sparse teacher: of each row, with the gradient over the tile.

As `tile.py`, for a teacher of few ids a row. Most of a row has one gradient: a number times its probability. So the
tile is read twice, for its sums and to be overwritten, and between lies work on the few ids alone. Of forward KL, the C
code does all of it row by row, while a row is in the cache.
Letters: R rows, V vocabulary, k ids of a row, kept or drawn; s logits of the student over T [R, V]; q = softmax(s).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import can_compile, overwrite_on_cpu, sparse_tile_on_cpu, sums_on_cpu
from .divergences import DIVERGENCES
from .formulas import wide
from .sparse_targets import Samples, TopK, bucket_labels
from .tile import block_rows, compile_pays, same_compiled, without_wrong
from .tile_types import Rows, Setting, halves_of, power_of, widened

MOST_IDS = 1024  # of a row; the work on more of them, in double precision, would rival that on the tile


def sparse_tile_loss(
    setting: Setting,
    student: Tensor,
    teacher: TopK | Samples,
    weights: Tensor,
    labels: Tensor | None,
    *,
    gradient: bool,
    compiled: bool,
) -> Rows:
    """Losses of a tile's rows; with `gradient`, the tile is overwritten by dL/ds, else by nothing of use.

    Args:
        setting: what is computed; of `Samples` the forward KL.
        student: s [R, V], float32, float64, bfloat16 or float16; finite.
        teacher: rows of ids [R, k] int64, those of `TopK` distinct.
        weights, labels: as in `tile_loss`; a row without a label has the second weight 0.
        compiled: both readings by the C code (CPU) or `torch.compile`, else in blocks of rows as they are.

    Returns:
        `Rows` as of `tile_loss`; `same`: whether the teacher's top is on top in the student.
    """
    if compiled and setting.divergence == "forward_kl" and can_compile(student):
        return _sparse_tile_in_c(setting, student, teacher, weights, labels, gradient)
    wrong = None
    if labels is not None:
        labels, weights, wrong = without_wrong(labels, weights, student.shape[1])
    double = torch.float64 if student.device.type != "mps" else torch.float32
    rows = torch.arange(len(student), device=student.device).unsqueeze(1)
    label = None if labels is None else labels.unsqueeze(1)
    chosen = student[rows, teacher.ids].to(double)
    at_label = None if label is None else student[rows, label.clamp(min=0)].to(double)
    if isinstance(teacher, TopK):
        # What remains is the rest, summed without the kept ids: taken from the sum of all, a small one would be lost.
        student[rows, teacher.ids] = _lowest(student.dtype)
        sums = _Sums(*(x.to(double) for x in _sums(setting, student, compiled)))
        terms = _top_k_terms(setting, teacher, chosen, sums, labels, student.shape[1], gradient)
    else:
        at_top = student[rows, teacher.top.unsqueeze(1)].to(double)
        sums = _Sums(*(x.to(double) for x in _sums(setting, student, compiled)))
        terms = _samples_terms(setting, teacher, chosen, at_top, sums)
    hard = 0 * terms.soft
    if label is not None and at_label is not None:
        hard = torch.where(label >= 0, terms.log_sum_hard - setting.temperature * at_label, 0.0)
        hard = hard if wrong is None else torch.where(wrong.unsqueeze(1), torch.nan, hard)
    if gradient:
        labelled = None if label is None or at_label is None else (label, at_label)
        _write_gradient(setting, student, teacher.ids, chosen, labelled, terms, sums.top, weights.to(double), compiled)
    soft, hard, same = (x.squeeze(1) for x in (terms.soft, hard, terms.same))
    return Rows(soft.to(wide(student)), hard.to(wide(student)), same)


class _Sums(NamedTuple):
    """Of a tile's rows [R, 1], as `_row_sums` gives them."""

    top: Tensor
    total: Tensor
    total_hard: Tensor


class _Terms(NamedTuple):
    """Of a tile's rows, [R, 1] each but for `at_ids`: losses, and the gradient of the soft loss to s."""

    soft: Tensor
    same: Tensor
    log_sum_hard: Tensor  # log of the sum of exp(T s)
    of_rest: Tensor  # at the other classes, as a multiple of exp(s - top)
    at_ids: Tensor  # [R, k]


def _top_k_terms(
    setting: Setting, teacher: TopK, chosen: Tensor, sums: _Sums, labels: Tensor | None, classes: int, gradient: bool
) -> _Terms:
    """`chosen`: s at the kept ids [R, k]; `sums`: of the other classes. Without `gradient` the last two are empty."""
    (top, total, total_hard), temperature = sums, setting.temperature
    kept, kept_hard = (x.logsumexp(-1, True) for x in (chosen, temperature * chosen))
    rest, rest_hard = top + total.log(), temperature * top + total_hard.log()
    if chosen.shape[1] == classes:
        rest, rest_hard = (x.new_full(x.shape, -torch.inf) for x in (rest, rest_hard))
    log_all = torch.logaddexp(rest, kept)
    log_q = torch.cat((chosen, rest), 1) - log_all
    soft, slopes = _bucket_slopes(setting, teacher, log_q, labels, gradient)
    at_top = chosen.gather(1, teacher.log_probs.argmax(-1, True))
    same, log_sum_hard = at_top >= torch.maximum(top, chosen.amax(-1, True)), torch.logaddexp(rest_hard, kept_hard)
    if slopes is None:
        return _Terms(soft, same, log_sum_hard, soft.new_empty(0), soft.new_empty(0))
    of_all = slopes.sum(-1, True)
    of_rest = slopes[:, -1:] / total - of_all * (top - log_all).exp()
    return _Terms(soft, same, log_sum_hard, of_rest, slopes[:, :-1] - log_q[:, :-1].exp() * of_all)


def _samples_terms(setting: Setting, teacher: Samples, chosen: Tensor, at_top: Tensor, sums: _Sums) -> _Terms:
    """`chosen`, `at_top`: s at the drawn ids [R, k] and at the teacher's top class [R, 1]; `sums`: of all classes."""
    log_q = chosen - (sums.top + sums.total.log())
    soft = -log_q.mean(-1, True) - teacher.entropy.unsqueeze(1).to(chosen.dtype)
    log_sum_hard = setting.temperature * sums.top + sums.total_hard.log()
    at_ids = log_q.exp() - _counts(teacher.ids).to(chosen.dtype) / teacher.ids.shape[1]
    return _Terms(soft, at_top >= sums.top, log_sum_hard, 1 / sums.total, at_ids)


def _write_gradient(
    setting: Setting,
    student: Tensor,
    ids: Tensor,
    chosen: Tensor,
    labelled: tuple[Tensor, Tensor] | None,
    terms: _Terms,
    top: Tensor,
    weights: Tensor,
    compiled: bool,
) -> None:
    """Overwrites the tile by dL/ds; `labelled`: the labels [R, 1] and s there."""
    rows = torch.arange(len(student), device=student.device).unsqueeze(1)
    soft_weight, hard_weight = weights.split(1, 1)
    of_rest, at_ids = terms.of_rest * soft_weight, terms.at_ids * soft_weight
    temperature, log_sum_hard = setting.temperature, terms.log_sum_hard
    _overwrite(setting, student, top, of_rest, hard_weight * (temperature * top - log_sum_hard).exp(), compiled)
    if labelled is not None:
        label, at_label = labelled
        at_ids = at_ids + hard_weight * ((temperature * chosen - log_sum_hard).exp() - (ids == label).to(chosen.dtype))
        at = of_rest * (at_label - top).exp()
        at = at + hard_weight * ((temperature * at_label - log_sum_hard).exp() - 1)
        student[rows, label.clamp(min=0)] = at.to(student.dtype)
    student[rows, ids] = at_ids.to(student.dtype)  # the label may be one of them


def hard_tile_loss(
    temperature: float, student: Tensor, weights: Tensor, labels: Tensor, gradient: bool, compiled: bool | None
) -> Rows:
    """The hard loss alone of a tile's rows, as `sparse_tile_loss` of a draw that weighs nothing.

    Args:
        student, weights, labels, gradient: as there; the first of the weights is 0.
        compiled: as `compile_pays` takes it.
    """
    setting = Setting("forward_kl", 0.0, temperature, hard=True)
    compiled = compile_pays_sparse(setting, len(student), student.shape[1], student, compiled)
    zeros = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    drawn = Samples(zeros.unsqueeze(1), zeros, zeros.to(wide(student)))
    rows = sparse_tile_loss(setting, student, drawn, weights, labels, gradient=gradient, compiled=compiled)
    return Rows(torch.zeros_like(rows.soft), rows.hard, torch.zeros_like(rows.same))


def _sparse_tile_in_c(
    setting: Setting, student: Tensor, teacher: TopK | Samples, weights: Tensor, labels: Tensor | None, gradient: bool
) -> Rows:
    if isinstance(teacher, TopK):
        kept, leaders = (teacher.log_probs, teacher.log_tail), teacher.ids.gather(1, teacher.log_probs.argmax(-1, True))
    else:
        kept, leaders = None, teacher.top
    halves = halves_of(setting.temperature)
    soft, hard, same = sparse_tile_on_cpu(
        setting, halves, student, teacher.ids, kept, leaders, labels, weights, gradient
    )
    soft = soft - teacher.entropy if isinstance(teacher, Samples) else soft
    return Rows(soft.float(), hard.float(), same != 0)


def _bucket_slopes(
    setting: Setting, teacher: TopK, log_q: Tensor, labels: Tensor | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """D [R, 1] over the k + 1 buckets, and dD/dlog q [R, k + 1] where the log q are taken as free."""
    log_p = torch.cat((teacher.log_probs, teacher.log_tail.unsqueeze(1)), 1).to(log_q.dtype)
    entry = DIVERGENCES[setting.divergence]
    labels = bucket_labels(teacher.ids, labels) if entry.needs_labels else None
    with torch.set_grad_enabled(gradient):
        log_q.requires_grad_(gradient)
        soft = entry.evaluate(log_p, log_q, setting.beta, labels).sum(-1, True)
        slopes = torch.autograd.grad(soft.sum(), log_q)[0] if gradient else None
    log_q.requires_grad_(False)
    return soft.detach(), slopes


def _counts(ids: Tensor) -> Tensor:
    """How often each of a row's ids [R, k] is among them."""
    ids = ids.contiguous()
    ordered = ids.sort(-1).values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


def _lowest(dtype: torch.dtype) -> float:
    """So low that its exponential is 0 beside any other; not -inf, of which rows without another would make NaN."""
    return -torch.finfo(dtype).max / 4


# ---- the two readings of a tile -------------------------------------------------------------------------------------


def _row_sums(setting: Setting, s: Tensor, temperature: Tensor, room: Tensor | None = None) -> tuple[Tensor, ...]:
    """Columns [R, 1]: the maximum, the sum of exp(s - maximum), the sum of exp(T * (s - maximum))."""
    s = widened(s, None if room is None else room[0, : len(s)])
    top = s.amax(-1, True)
    powers, hard = _exponentials(setting, s, top, temperature, room)
    total = powers.sum(-1, True)
    return top, total, total if hard is None else hard.sum(-1, True)


def _row_gradient(
    setting: Setting, s: Tensor, out: Tensor, columns: Tensor, temperature: Tensor, room: Tensor | None = None
) -> None:
    """columns[1] * exp(s - top) + columns[2] * exp(T * (s - top)) into `out`, which may be s; top is columns[0]."""
    top, of_soft, of_hard = columns.unbind(0)
    one = None if room is None else room[0, : len(s)]
    powers, hard = _exponentials(setting, widened(s, one), top, temperature, room)
    gradient = torch.mul(powers, of_soft, out=one)
    if hard is not None:
        gradient = torch.addcmul(gradient, hard, of_hard, out=None if room is None else gradient)
    out.copy_(gradient)


def _exponentials(
    setting: Setting, s: Tensor, top: Tensor, temperature: Tensor, room: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """exp(s - top), and with a hard loss exp(T * (s - top)); into `room` [2, R, V] where it is given."""
    one, other = (None, None) if room is None else room[:, : len(s)]
    x = torch.sub(s, top, out=one)
    if not setting.hard:
        return torch.exp(x, out=one), None
    if halves_of(setting.temperature):
        powers = torch.exp(x, out=one)
        return powers, power_of(halves_of(setting.temperature), powers, other)
    hard = torch.exp(torch.mul(x, temperature, out=other), out=other)
    return torch.exp(x, out=one), hard


def _sums(setting: Setting, student: Tensor, compiled: bool) -> tuple[Tensor, ...]:
    if compiled and can_compile(student):
        return sums_on_cpu(setting, halves_of(setting.temperature), student)
    temperature = _scalar(setting, student)
    if compiled and len(student) > 1:
        torch._dynamo.mark_dynamic(student, 0)
        return _run_compiled(_row_sums, setting, student, temperature)
    room = _room(student)
    parts = [_row_sums(setting, s, temperature, room) for s in student.split(room.shape[1])]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _overwrite(
    setting: Setting, student: Tensor, top: Tensor, of_rest: Tensor, of_hard: Tensor, compiled: bool
) -> None:
    """The gradient of all that is neither label nor kept."""
    if compiled and can_compile(student):
        of_rows = torch.cat((top, of_rest, of_hard), 1)
        return overwrite_on_cpu(setting, halves_of(setting.temperature), student, of_rows)
    temperature = _scalar(setting, student)
    columns = torch.stack((top, of_rest, of_hard)).to(temperature.dtype)
    if compiled and len(student) > 1:
        # The same memory under a second name: every element is read before it is written, but the compiler, knowing
        # that both are one, would keep a copy of the tile.
        out = torch.from_dlpack(student)
        for tensor, dim in ((student, 0), (out, 0), (columns, 1)):
            torch._dynamo.mark_dynamic(tensor, dim)
        _run_compiled(_row_gradient, setting, student, out, columns, temperature)
        return
    room = _room(student)
    for s, part in zip(student.split(room.shape[1]), columns.split(room.shape[1], 1), strict=True):
        _row_gradient(setting, s, s, part, temperature, room)


def _scalar(setting: Setting, like: Tensor) -> Tensor:
    return torch.full((), setting.temperature, dtype=wide(like), device=like.device)


def _room(tile: Tensor) -> Tensor:
    return torch.empty(2, block_rows(tile), tile.shape[1], dtype=wide(tile), device=tile.device)


# ---- compiled by torch, on GPUs --------------------------------------------------------------------------------------


def _compiled_for(setting: Setting) -> Setting:
    """All that the two readings depend on."""
    known = halves_of(setting.temperature) if setting.hard else 0
    return Setting("forward_kl", 0.0, known / 2, setting.hard)


@functools.lru_cache(maxsize=64)
def _compiled(function: Callable[..., Any], setting: Setting) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _run_compiled(function: Callable[..., Any], setting: Setting, *tensors: Tensor) -> Any:
    setting = _compiled_for(setting)
    with torch._dynamo.config.patch(recompile_limit=64):  # each setting, dtype and vocabulary counts as one
        return _compiled(function, setting)(setting, *tensors)


def compile_pays_sparse(setting: Setting, rows: int, columns: int, like: Tensor, wanted: bool | None) -> bool:
    """As `tile.compile_pays`, for `sparse_tile_loss`."""
    # Forward KL has its own C code; the two readings of a tile are the same for all others.
    divergence = "forward_kl" if setting.divergence == "forward_kl" else "reverse_kl"
    setting = Setting(divergence, 0.0, setting.temperature, setting.hard)
    return compile_pays(setting, rows, columns, like, wanted, agrees=_agrees)


@functools.lru_cache(maxsize=64)
def _agrees(setting: Setting, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    tile = (4 * torch.randn(6, columns, generator=generator)).to(device, dtype)
    ids = torch.randint(columns, (6, 3), generator=generator).to(device)
    drawn = Samples(ids, ids[:, 0], torch.ones(6, device=device))
    ids = torch.rand(6, columns, generator=generator).topk(min(3, columns)).indices.to(device)
    kept = TopK(ids, torch.full(ids.shape, 0.25, device=device).log(), torch.full((6,), 0.25, device=device).log())
    labels = torch.tensor([0, -100, columns - 1, 0, 0, 0], device=device) if setting.hard else None
    weights = torch.tensor([[0.5, 0.25]], device=device).repeat(6, 1)
    weights[1, 1] = 0

    def run(compiled: bool) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for teacher in (drawn, kept):
            student = tile.clone()
            rows = sparse_tile_loss(setting, student, teacher, weights, labels, gradient=True, compiled=compiled)
            found += student.float(), rows.soft, rows.hard
        return tuple(found)

    return same_compiled(run, dtype)
