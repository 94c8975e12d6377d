"""A teacher given sparsely: its top-k, or some draws of its distribution, and the losses against either.

For: a cache of what a teacher said, far smaller than its logits. Leaves storing it to others, and the loss without
logits to `fused_linear.py`.
Letters: V vocabulary, k ids kept, n draws; z_s, z_t student and teacher logits [..., V]; T temperature;
p = softmax(z_t/T) the teacher's, q = softmax(z_s/T) the student's probabilities.

With a C compiler at hand `sparse_cpu.py` reads large tensors on CPU. Else `top_k` and `draw_samples` read the logits
once, block of rows by block of rows, and keep of each row the maxima and sums of its C columns: column c holds the ids
c, c + C, c + 2C and so on. The few columns that matter are then looked at again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_temperature, fail
from .divergences import BLOCK_ACCELERATOR, check_divergence, log_prob_terms
from .sparse_cpu import columns_of, draw_on_cpu, draw_room, top_k_on_cpu, top_k_room

_BLOCK = 2**18  # elements that a thread reads at once: two such buffers stay in its cache
_GROUP = 2**22  # elements of the rows whose columns are looked at again together


class TopK(NamedTuple):
    """The k most probable ids of each position, and what is left."""

    ids: Tensor  # [..., k] integers, sorted by probability, largest first
    log_probs: Tensor  # [..., k] log-probabilities at temperature T
    log_tail: Tensor  # [...] log of the mass of all other ids at T; -inf where there is none


class Samples(NamedTuple):
    """Draws from each position's distribution, and the two facts that draws do not tell."""

    ids: Tensor  # [..., n] draws from softmax(z_t / T), each of weight 1/n
    top: Tensor  # [...] the class on top
    entropy: Tensor  # [...] exact entropy of softmax(z_t / T), nats


# ---- from a teacher's logits ----------------------------------------------------------------------------------------


def top_k(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """The k largest log softmax(z_t/T) with their ids, and log(1 - sum of their probabilities).

    When to use: for any divergence. The loss is that of k + 1 buckets, so it is blind to how the teacher spreads the
    tail; `draw_samples` is not.

    Args:
        logits: z_t [..., V], any floating dtype; -inf excludes a class.
        k: ids to keep, 1 to V.
        temperature: T > 0.

    Returns:
        `TopK`, ids int64, the rest float32 or wider. Among equal logits any choice may come out. The tail is summed
        from its own members, not taken from 1: however small it is, its logarithm has the error of a float32.

    Raises:
        ValueError: k or temperature out of range, no class; TypeError: logits that are no floating tensor.

    Example:
        >>> taught = top_k(torch.tensor([0.4, 0.1, 0.5]).log(), 2)
        >>> taught.ids.tolist(), [round(x, 4) for x in taught.log_probs.exp().tolist()]
        ([2, 0], [0.5, 0.4])
        >>> round(taught.log_tail.exp().item(), 4)
        0.1

    Source: Tan et al. 2019, arXiv:1902.10461 (top-k of a translation teacher); the bucket of the rest is ours.
    """
    classes = _check_logits(logits, temperature)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= classes:
        fail("k", repr(k), f"a whole number from 1 to {classes}, the vocabulary", "Keep fewer ids, or all of them.")
    rows = logits.detach().reshape(-1, classes)
    room = top_k_room(len(rows), k)
    if top_k_on_cpu(rows, k, temperature, room):
        found = room["ids"], room["log_probs"], room["log_tail"]
    else:
        kept = _read(rows, temperature, weighted=False)
        parts = [_top_k(rows[some], _Columns(*(x[some] for x in kept)), k, temperature) for some in _groups(rows)]
        found = _joined(parts)
    ids, log_probs, log_tail = found
    shape = logits.shape[:-1]
    return TopK(ids.view(*shape, k), log_probs.view(*shape, k), log_tail.view(shape))


def draw_samples(logits: Tensor, n: int, *, temperature: float = 1.0, uniform: Tensor) -> Samples:
    """n draws from softmax(z_t/T): the ids under the points (i + uniform)/n, i = 0 .. n-1, of its distribution.

    When to use: for the forward KL, with far fewer ids than `top_k` needs. The expected share of an id among the draws
    is its probability, so that `sampled_forward_kl` and its gradient are those of the dense loss in the mean; since the
    points are evenly spaced, an id comes up within one draw of n times its probability.

    Args:
        logits: z_t [..., V], any floating dtype; -inf excludes a class, which is never drawn.
        n: draws a position, at least 1.
        temperature: T > 0.
        uniform: [...] one number in [0, 1) a position, e.g. `torch.rand(logits.shape[:-1])`. The same numbers give the
            same draws.

    Returns:
        `Samples`, ids int64, entropy in float32 or wider.

    Raises:
        ValueError: n or temperature out of range, no class, `uniform` of another shape or outside [0, 1);
        TypeError: logits that are no floating tensor.

    Example:
        >>> taught = draw_samples(torch.tensor([0.5, 0.25, 0.25]).log(), 4, uniform=torch.tensor(0.5))
        >>> taught.ids.sort().values.tolist(), taught.top.item(), round(taught.entropy.item(), 4)
        ([0, 0, 1, 2], 0, 1.0397)

    Source: Anshumann et al. 2025, arXiv:2503.16870, with systematic instead of independent draws.
    """
    classes = _check_logits(logits, temperature)
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        fail("n", repr(n), "a whole number of draws, at least 1", "Take 50 for a start.")
    shape = logits.shape[:-1]
    if not isinstance(uniform, Tensor) or uniform.shape != shape:
        shown = f"of shape {list(uniform.shape)}" if isinstance(uniform, Tensor) else type(uniform).__name__
        fail("uniform", shown, f"one number for each position, {list(shape)}", "Use `torch.rand` of that shape.")
    # On CPU alone: elsewhere looking would wait for the device.
    if uniform.device.type == "cpu" and uniform.numel() and not (uniform.min() >= 0 and uniform.max() < 1):
        shown = f"a tensor from {uniform.min().item():g} to {uniform.max().item():g}"
        fail("uniform", shown, "numbers in [0, 1)", "Use `torch.rand`.")
    offsets = uniform.reshape(-1).to(logits.device, _double(logits))
    rows = logits.detach().reshape(-1, classes)
    room = draw_room(len(rows), n)
    if draw_on_cpu(rows, n, temperature, offsets, room):
        found = room["ids"], room["top"], room["entropy"]
    else:
        kept = _read(rows, temperature, weighted=True)
        of_rows = [(rows[some], _Columns(*(x[some] for x in kept)), offsets[some]) for some in _groups(rows)]
        found = _joined([_draw(some, columns, n, temperature, own) for some, columns, own in of_rows])
    ids, top, entropy = found
    return Samples(ids.view(*shape, n), top.view(shape), entropy.view(shape))


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (torch.cat(column) for column in zip(*parts, strict=True))
    return first, second, third


class _Columns(NamedTuple):
    """What one reading of rows [R, V] keeps, for x = (z - the row's maximum) / T: one entry a row."""

    maxima: Tensor  # [R, C] of z
    sums: Tensor  # [R, C] of exp(x)
    total: Tensor  # [R, 1] sum of exp(x)
    weighted: Tensor  # [R, 1] sum of x exp(x); zeros unless asked for
    peak: Tensor  # [R, 1] maximum of z


def _read(rows: Tensor, temperature: float, *, weighted: bool) -> _Columns:
    count, classes = rows.shape
    wide = _wide(rows)
    columns = columns_of(classes)
    kept = torch.empty(2, count, columns, dtype=wide, device=rows.device)
    dots = torch.zeros(count, 1, dtype=wide, device=rows.device)
    size = _block_rows(rows)
    memory = torch.empty(2, min(size, count), classes, dtype=wide, device=rows.device)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        x, powers = memory[:, : part.stop - part.start]
        z = rows[part] if rows.dtype == wide else powers.copy_(rows[part])
        peak = _by_column(torch.amax, torch.maximum, z, kept[0, part]).amax(-1, True)
        torch.sub(z, peak, out=x)
        if temperature != 1:
            x.div_(temperature)
        powers = torch.exp(x, out=powers if weighted else x)
        _by_column(torch.sum, torch.add, powers, kept[1, part])
        if weighted:
            dot = torch.mul(powers, x, out=x).sum(-1, True)
            if not torch.isfinite(dot).all():  # an excluded class: 0 * -inf
                dot = torch.xlogy(powers, powers, out=x).sum(-1, True)
            dots[part] = dot
    maxima, sums = kept
    return _Columns(maxima, sums, sums.sum(-1, True), dots, maxima.amax(-1, True))


def _by_column(reduce: Any, join: Any, values: Tensor, out: Tensor) -> Tensor:
    """[R, V] reduced to its columns, into `out` [R, C]; the last id of some columns lies outside of V."""
    columns = out.shape[1]
    whole = (values.shape[1] - 1) // columns
    rest = values.shape[1] - whole * columns
    if whole == 0:
        return out.copy_(values)
    reduce(values[:, : whole * columns].unflatten(1, (whole, columns)), 1, out=out)
    join(out[:, :rest], values[:, whole * columns :], out=out[:, :rest])
    return out


def _members(rows: Tensor, chosen: Tensor, columns: int) -> Tensor:
    """The logits [R, members, few] of the chosen columns [R, few]; -inf where a column has one member less."""
    count, classes = rows.shape
    whole = (classes - 1) // columns
    last = rows.gather(1, (chosen + whole * columns).clamp_(max=classes - 1)).unsqueeze(1)
    last.masked_fill_((chosen >= classes - whole * columns).unsqueeze(1), -torch.inf)
    if whole == 0:
        return last
    several = rows[:, : whole * columns].unflatten(1, (whole, columns))
    return torch.cat((several.gather(2, chosen.unsqueeze(1).expand(count, whole, -1)), last), 1)


def _top_k(rows: Tensor, kept: _Columns, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    columns, log_total = kept.maxima.shape[1], kept.total.log()
    if 4 * k <= columns:
        # The k largest logits lie in the k columns with the largest maxima.
        chosen = kept.maxima.topk(k, sorted=False).indices
        candidates = _members(rows, chosen, columns).flatten(1).to(kept.peak.dtype)
        values, places = candidates.topk(k)
        ids = places // k * columns + chosen.gather(1, places % k)
        others = ((candidates - kept.peak) / temperature).exp_().scatter_(1, places, 0.0)
        tail = kept.sums.scatter_(1, chosen, 0.0).sum(-1) + others.sum(-1)
    else:
        values, ids = rows.topk(k)
        values, tail = values.to(kept.peak.dtype), torch.zeros_like(kept.total.squeeze(1))
    log_probs = (values - kept.peak) / temperature - log_total
    log_tail = tail.log() - log_total.squeeze(1)
    # Powers that small have lost digits or are 0, though their logarithm is not.
    thin = (tail < 1e10 * torch.finfo(kept.peak.dtype).tiny).nonzero().squeeze(1)
    for few in thin.split(_block_rows(rows)):
        x = ((rows[few].to(kept.peak.dtype) - kept.peak[few]) / temperature).scatter_(1, ids[few], -torch.inf)
        log_tail[few] = x.logsumexp(-1) - log_total[few].squeeze(1)
    return ids, log_probs, log_tail


def _draw(rows: Tensor, kept: _Columns, n: int, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    columns = kept.maxima.shape[1]
    entropy = (kept.total.log() - kept.weighted / kept.total).squeeze(1)

    # First the column under each point, then the id inside of it. Only what has a probability rises above a point.
    heights = kept.sums.cumsum(-1, dtype=uniform.dtype)
    points = (torch.arange(n, device=rows.device) + uniform.unsqueeze(1)) / n * heights[:, -1:]
    chosen, share = _under(heights, points)
    x = (_members(rows, chosen, columns).to(kept.peak.dtype) - kept.peak.unsqueeze(2)) / temperature
    inner = x.exp_().cumsum(1, dtype=uniform.dtype).transpose(1, 2)
    member, _ = _under(inner, share.unsqueeze(2) * inner[..., -1:])
    ids = member.squeeze(2) * columns + chosen

    best = kept.maxima.argmax(-1, True)
    top = _members(rows, best, columns).argmax(1) * columns + best
    return ids, top.squeeze(1), entropy.to(kept.peak.dtype)


def _under(heights: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """For points [..., n] the step of the staircase `heights` [..., C] above them, and how far along it they are."""
    points = torch.minimum(points, heights[..., -1:] * (1 - 8 * torch.finfo(heights.dtype).eps))
    step = torch.searchsorted(heights.contiguous(), points.contiguous(), right=True).clamp_(max=heights.shape[-1] - 1)
    above = heights.gather(-1, step)
    below = torch.where(step > 0, heights.gather(-1, (step - 1).clamp_(min=0)), 0.0)
    return step, (points - below) / (above - below)


# ---- the losses against them ----------------------------------------------------------------------------------------


def top_k_divergence(
    student_logits: Tensor,
    taught: TopK,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float | None = None,
) -> Tensor:
    """D(p, q) over k + 1 buckets: each kept id is one, all the others together are the last.

    When to use: with `top_k`, taken at the same temperature. It is never more than the divergence over all ids, and
    equal where the tail is alike in both or holds one id or none.

    Args:
        student_logits: z_s [..., V], any floating dtype.
        taught: `TopK`, ids of any integer dtype.
        temperature: T > 0 of the student, and of `taught`.
        divergence, beta: as in `DIVERGENCES`.

    Returns:
        Nats [...], float32 or wider; 0 where the buckets are equal, +inf as the divergence itself.

    Raises:
        ValueError: unknown divergence, beta or temperature out of range, shapes that do not fit.
        TypeError: logits that are no floating tensor.

    Example:
        >>> teacher, student = torch.tensor([0.4, 0.1, 0.5]).log(), torch.zeros(3)
        >>> dense = torch.nn.functional.kl_div(student.log_softmax(0), teacher, log_target=True, reduction="sum")
        >>> bool(torch.isclose(top_k_divergence(student, top_k(teacher, 2)), dense))
        True

    Source: as `top_k`.
    """
    beta = check_divergence(divergence, beta)
    _check_taught(student_logits, temperature, taught, [taught.ids, taught.log_probs], taught.log_tail)
    return bucket_divergence(student_logits.to(_wide(student_logits)), taught, temperature, divergence, beta)


def bucket_divergence(logits: Tensor, taught: TopK, temperature: float, divergence: str, beta: float) -> Tensor:
    """`top_k_divergence` without checks, in the logits' dtype; `beta` as `check_divergence` returns it."""
    ids, x = taught.ids.long(), logits / temperature
    least = torch.finfo(x.dtype).min  # not -inf, of which nothing but -inf makes a gradient of NaN
    rest = x.scatter(-1, ids, least).logsumexp(-1, True)
    rest = torch.where(rest < least / 2, -torch.inf, rest)
    log_q = torch.cat((x.gather(-1, ids), rest), -1) - x.logsumexp(-1, True)
    log_p = torch.cat((taught.log_probs, taught.log_tail.unsqueeze(-1)), -1).to(log_q.dtype)
    return log_prob_terms(divergence, log_p, log_q, beta).sum(-1)


def sampled_forward_kl(student_logits: Tensor, taught: Samples, *, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = -H(p) - sum p log q, the sum estimated by the mean of log q over the draws.

    When to use: with `draw_samples`, taken at the same temperature. The forward KL alone is linear in the teacher's
    probabilities but for its entropy, which is known: only its estimate is unbiased.

    Args:
        student_logits: z_s [..., V], any floating dtype.
        taught: `Samples`, ids of any integer dtype.
        temperature: T > 0 of the student, and of `taught`.

    Returns:
        Nats [...], float32 or wider. Of a single position it may be negative; in the mean over draws it is KL(p || q).

    Raises:
        ValueError: temperature out of range, shapes that do not fit; TypeError: logits that are no floating tensor.

    Example:
        >>> teacher = torch.tensor([0.5, 0.25, 0.25]).log()
        >>> taught = draw_samples(teacher, 4, uniform=torch.tensor(0.5))
        >>> abs(sampled_forward_kl(teacher, taught).item()) < 1e-6
        True

    Source: as `draw_samples`.
    """
    _check_taught(student_logits, temperature, taught, [taught.ids], taught.entropy)
    x = student_logits.to(_wide(student_logits)) / temperature
    return x.logsumexp(-1) - x.gather(-1, taught.ids.long()).mean(-1) - taught.entropy.to(x.dtype)


# ---- checks and sizes -----------------------------------------------------------------------------------------------


def _check_logits(logits: Tensor, temperature: float, name: str = "logits") -> int:
    """Returns V."""
    check_temperature("temperature", temperature)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        shown = f"of dtype {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        mend = "Pass the scores before the softmax, not class ids."
        fail(name, shown, "a tensor of logits of a floating dtype", mend, error=TypeError)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        mend = "Pass logits [..., V]."
        fail(name, f"of shape {list(logits.shape)}", "at least one class in the last dimension", mend)
    return logits.shape[-1]


def _check_taught(
    logits: Tensor, temperature: float, taught: TopK | Samples, wide: list[Tensor], narrow: Tensor
) -> None:
    _check_logits(logits, temperature, "student_logits")
    shape, ids = logits.shape[:-1], taught.ids.shape
    if narrow.shape != shape or any(column.shape != (*shape, *ids[-1:]) for column in wide):
        shown = " and ".join(f"`{name}` of shape {list(x.shape)}" for name, x in taught._asdict().items())
        expected = f"one row for each of the student's positions {list(shape)}"
        fail("taught", shown, expected, "Give both sides the same positions.")


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _double(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.device.type != "mps" else torch.float32


def _groups(rows: Tensor) -> list[slice]:
    size = max(1, _GROUP // rows.shape[1])
    return [slice(start, start + size) for start in range(0, max(1, rows.shape[0]), size)]


def _block_rows(rows: Tensor) -> int:
    if rows.device.type != "cpu":
        return max(1, BLOCK_ACCELERATOR // rows.shape[1])
    threads = torch.get_num_threads()
    block = max(1, _BLOCK * threads // rows.shape[1])
    return block - block % threads if block > threads else block  # whole rows for each thread
