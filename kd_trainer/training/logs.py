"""What is watched and logged of the loss, from micro-batches to one log line, without waiting for the device at a step.

For: `trainer.py`. `FiniteWatch` raises or notes NaN and inf, with step, process, rows and model (`kd_check_finite`).
Shapes: B rows; logits are [B, C] or [B, S, C].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..losses import bad_rows, divide, is_bad, similarity_correlation
from ..tasks import Fault, Task
from ..teachers import keys_of
from ..validation import fail
from .objective import Counts, Objective, Parts
from .setup import Plan
from .step_loss import BatchLoss, MicroBatch

Row = tuple[Tensor | float | None, ...]  # numbers of one micro-batch, detached; None where one does not exist


def logged_row(parts: Parts, counts: Counts) -> Row:
    """What is logged of a micro-batch: the mean of each term, the teacher's agreement and the number of labels."""
    added = parts.added or (None,) * len(counts.added)
    row = (parts.hard, parts.soft, *added, parts.agreement, counts.hard)
    return tuple([value.detach() if isinstance(value, Tensor) else value for value in row])


class MetricsBuffer:
    """The logged numbers since the last log, kept on the device: no synchronisation before `sums` is read."""

    def __init__(self, device: torch.device) -> None:
        self.steps = 0  # optimizer steps begun
        self.exists: list[bool] = []  # for each entry of a row, whether any row had it; known after `sums`
        self._device = device
        self._sums: list[Tensor] = []
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Takes the numbers of one micro-batch; they are summed up now and then, not at every step."""
        self._rows.append(row)
        if len(self._rows) == 64:
            self._fold()

    def _fold(self) -> None:
        found = [any(value is not None for value in column) for column in zip(*self._rows, strict=True)]
        self.exists = [a or b for a, b in zip(self.exists or found, found, strict=True)]
        self._sums.append(as_tensor(self._rows, self._device).sum(0))
        self._rows = []

    def named(self, task: Task, objective: Objective) -> dict[str, float]:
        """The sums of rows that `logged_row` made, by their logged names."""
        sums = self.sums()
        values = [] if sums is None else sums.tolist()
        return named(task, objective, values, [not math.isnan(value) for value in values]) if values else {}

    def means(self, accelerator: Any, task: Task, objective: Objective) -> dict[str, float]:
        """The means over optimizer steps and processes by their logged names; {} where nothing was added."""
        sums = self.sums()
        if sums is None:
            return {}
        mean, exists = accelerator.reduce(with_existence(sums, self.exists), reduction="mean")
        return named(task, objective, (mean / max(self.steps, 1)).tolist(), exists.tolist())

    def sums(self) -> Tensor | None:
        """Sums since the last log, one for each entry of a row; None where nothing was added.

        A number that some rows lack counts 0 there; one that all of them lack is NaN.
        """
        if self._rows:
            self._fold()
        if not self._sums:
            return None
        lacking = torch.tensor([not exists for exists in self.exists], device=self._device)
        return torch.stack(self._sums).sum(0).masked_fill(lacking, math.nan)


MOST_EMBEDDINGS = 2048  # rows of an evaluation whose pairs are compared: 2 million, half a second on a CPU


class Evaluation:
    """The terms of one evaluation, each row once: as upstream weighs its loss, and as sums over this process's rows.

    Of tasks with one answer a row the loss and its parts are sums over all rows divided by their counts (with
    kd_reduction "tokenmean" the labelled rows for the hard loss), whatever the size of the batches. Perplexity is exp
    of the mean hard loss per labelled token, whatever the batches' size, their padding and kd_reduction; with label
    smoothing it is left out, whose loss is no log-likelihood. The overlap too is a mean over all positions. Of
    embeddings the first `MOST_EMBEDDINGS` rows are kept.
    """

    def __init__(self, device: torch.device) -> None:
        # Of each batch: each term's sum and what it is over; agreements, overlaps, what they are over; labels, rows; of
        # each of several teachers its agreements and what they are over.
        self.sums = MetricsBuffer(device)
        # Tasks by position: the parts of every batch and whether they exist, repeated and gathered as upstream's loss.
        self.rows: list[Tensor] = []
        # Tasks that embed: of the first rows a 1, the student's embedding and the teacher's.
        self.embeddings: list[Tensor] = []

    def _add_embeddings(self, student: Tensor, teacher: Tensor, rows: int | None) -> None:
        """Takes the embeddings of one batch, of its first `rows` (None: all)."""
        kept = sum(map(len, self.embeddings))
        rows = min(len(student) if rows is None else rows, MOST_EMBEDDINGS - kept)
        if rows > 0 or not self.embeddings:  # the widths are needed by a process without a row too
            there = student.new_ones(len(student), 1, dtype=torch.float32)
            both = torch.cat([there, student.detach().float(), teacher.to(student.device).float()], 1)
            self.embeddings.append(both[: max(rows, 0)])
            self._width = student.shape[1]

    def _similarity(self, accelerator: Any) -> float:
        """Whether both models rank pairs of rows alike: the correlation of their similarities over all processes."""
        kept = torch.cat(self.embeddings)[: -(-MOST_EMBEDDINGS // accelerator.num_processes)]
        if accelerator.num_processes > 1:
            kept = accelerator.gather(accelerator.pad_across_processes(kept))
        kept = kept[kept[:, 0] == 1, 1:]
        return similarity_correlation(kept[:, : self._width], kept[:, self._width :]).item()

    def add(self, batch: MicroBatch, result: BatchLoss, gather: Callable[[Tensor], Tensor], repeats: int) -> None:
        """Takes the parts of one batch as sums again.

        Args:
            gather: gathers numbers over the processes as upstream gathers its loss, which it repeats for every row.
        """
        plan, objective, parts, counts = batch.plan, batch.objective, result.parts, result.counts
        if plan.task.embeds and result.teacher is not None:
            student = plan.task.logits(result.outputs, "model")  # without a projection
            self._add_embeddings(student, result.teacher, None if batch.own is None else batch.own.rows)
        row = logged_row(parts, counts)
        *means, agreement, labels = row
        sums = map(_times, means, objective.denominators(counts))
        over = objective.denominators(counts._replace(by_num_items=False))  # counted here, of each row once
        keys = keys_of(plan.teacher)
        given = parts.of_each if keys else None  # a cache of several has no names
        each = [None] * (2 * len(keys)) if given is None else given.flatten().unbind()
        shares = (_times(agreement, counts.soft), _times(parts.overlap, counts.soft))
        self.sums.add((*sums, *over, *shares, counts.soft, labels, counts.rows, *each))
        if plan.task.by_position or plan.own_loss:
            self.rows.append(gather(with_existence_of(row, parts.total.device).repeat(repeats, 1)))

    def add_to(
        self, metrics: dict[str, float], prefix: str, accelerator: Any, plan: Plan, objective: Objective
    ) -> None:
        """Adds what is `logged` to the metrics; a script's own metric named overlap stays."""
        own = {name: value for name, value in metrics.items() if name == f"{prefix}overlap"}
        metrics.update(self.logged(prefix, accelerator, plan, objective) | own)

    def logged(self, prefix: str, accelerator: Any, plan: Plan, objective: Objective) -> dict[str, float]:
        """The terms by their logged names, and what else has a meaning for the task, from the rows of all processes.

        Args:
            objective: with the values at the end of a schedule.
        """
        local = self.sums.sums()
        if local is None:  # a class in front has a compute_loss that does not call this one
            return {}
        totals, exists = accelerator.reduce(with_existence(local, self.sums.exists), reduction="sum").tolist()
        terms = objective.terms
        n = len(terms)
        sums, over, (same, overlap, compared, labelled, rows, *each) = totals[:n], totals[n : 2 * n], totals[2 * n :]
        task, own_loss = plan.task, plan.own_loss
        by_row = not task.by_position and not own_loss
        if by_row:
            means = [*map(divide, sums, over), divide(same, compared), labelled]
            logged = named(task, objective, means, [*exists[:n], *exists[2 * n :]], prefix)
        else:
            weighed = torch.cat(self.rows).mean(0).tolist()
            logged = named(task, objective, weighed[: n + 2], weighed[n + 2 :], prefix)
        for key, found, counted in zip(keys_of(plan.teacher), each[::2], each[1::2], strict=True):
            if counted > 0:
                logged[f"{prefix}{task.agreement_name}_{key}"] = found / counted
        if exists[2 * n + 1] > 0 and compared > 0:
            logged[f"{prefix}overlap"] = divide(overlap, compared)
        if own_loss:
            return logged
        # Of several processes upstream's loss is no mean over each row once.
        if accelerator.num_processes > 1 or (by_row and labelled < rows):
            found = [(term, logged.get(f"{prefix}{term.name}_loss")) for term in terms]
            weights = [(term.weight_for(plan.student), mean) for term, mean in found if mean is not None]
            logged[f"{prefix}loss"] = sum(weight * mean for weight, mean in weights if weight)
        if task.over_tokens and objective.label_smoothing == 0 and labelled > 0:
            hard_sum = dict(zip((term.name for term in terms), sums, strict=True))["hard"]
            logged[f"{prefix}perplexity"] = perplexity(hard_sum, labelled)
        if self.embeddings and not math.isnan(correlation := self._similarity(accelerator)):
            logged[f"{prefix}teacher_spearman"] = correlation
        return logged


def _times(mean: Tensor | float | None, count: Tensor | float) -> Tensor | float | None:
    """The sum that `divide` made a mean of; None where there is none."""
    return None if mean is None else mean * (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def as_tensor(rows: list[Row], device: torch.device) -> Tensor:
    """[N, entries of a row] in float32; 0 where a part does not exist."""
    columns = []
    for column in zip(*rows, strict=True):
        if all(isinstance(value, Tensor) for value in column):
            columns.append(torch.stack(column).to(device, torch.float32))
        else:
            numbers = [0.0 if value is None else float(value) for value in column]
            columns.append(torch.tensor(numbers, device=device))
    return torch.stack(columns, dim=1)


def named(
    task: Task, objective: Objective, values: Sequence[float], exists: Sequence[float], prefix: str = ""
) -> dict[str, float]:
    """The values of a `logged_row` that exist, by their logged names; a hard loss without any label is none.

    Args:
        exists: for each value whether, or in how many processes, it exists.
    """
    *means, agreement, labelled = values
    names = [term.name for term in objective.terms]
    found = {f"{name}_loss": (mean, there) for name, mean, there in zip(names, means, exists, strict=False)}
    found[task.agreement_name] = agreement, exists[len(names)]
    if not labelled > 0:
        del found["hard_loss"]
    return {prefix + name: value for name, (value, there) in found.items() if there > 0}


def with_existence(sums: Tensor, exists: list[bool]) -> Tensor:
    """[2, entries]: the sums, 0 where a part does not exist, over whether it exists; so processes can add them up."""
    known = torch.tensor(exists, device=sums.device)
    return torch.stack([sums.masked_fill(~known, 0.0), known.to(sums.dtype)])


def with_existence_of(row: Row, device: torch.device) -> Tensor:
    """[1, 2 * entries]: a row, 0 where a part does not exist, and whether it exists beside it."""
    exists = torch.tensor([[part is not None for part in row]], device=device)
    return torch.cat([as_tensor([row], device), exists.float()], 1)


def perplexity(hard_sum: float, count: float) -> float:
    """exp(hard_sum / count), nats over tokens; inf where it is too large for a float."""
    try:
        return math.exp(hard_sum / count)
    except OverflowError:
        return math.inf


# ---- NaN and inf ----


class FiniteWatch:
    """Watches the losses of a run.

    Args:
        mode: "step" checks every loss at once (on accelerators this waits for the device); "log" keeps a note on the
            device, read by `raise_noted`; "off" checks nothing.
        process: index of this process, for the message.
    """

    def __init__(self, mode: str, process: int) -> None:
        self.mode, self.process, self._of = mode, process, "logits"
        # step, then for student, teacher and batch: number of bad rows, first of them; step is -1 while all is well.
        self._note: Tensor | None = None
        self._fault: Fault | None = None  # of a batch, for the message

    def see(
        self,
        loss: Tensor,
        student: Tensor,
        teacher: Tensor | None,
        step: int,
        *,
        of: str = "logits",
        fault: Callable[[], Fault | None] = lambda: None,
    ) -> None:
        """Takes one loss with the logits behind it; in mode "step" raises RuntimeError if it is not finite.

        Args:
            of: what `student` and `teacher` are where they are no logits: "hidden states".
            fault: what the batch itself may have wrong, of one kind in every step; named before the models are.
        """
        if self.mode == "off":
            return
        self._of = of
        if self.mode == "step":
            if not math.isfinite(loss.item()):
                self._fault = fault()
                rows = [bad_rows(student), [] if teacher is None else bad_rows(teacher)]
                rows += [[] if self._fault is None else self._fault.rows.nonzero().flatten().tolist()]
                self._raise(step, rows, [len(each) for each in rows])
            return
        ok = torch.isfinite(loss.detach())
        entries = [torch.as_tensor(step, device=ok.device)]
        seen = fault()
        self._fault = seen or self._fault
        sides = [None if logits is None else is_bad(logits) for logits in (student, teacher)]
        for bad in (*sides, None if seen is None else seen.rows):
            bad = ok.new_zeros(1) if bad is None else bad
            entries += [bad.sum(), bad.int().argmax()]
        note = torch.where(ok, -1, torch.stack(entries))
        self._note = note if self._note is None else torch.where(self._note[0] >= 0, self._note, note)

    def raise_noted(self) -> None:
        """Raises RuntimeError for the first bad step noted since the start, if there was one."""
        if self._note is None:
            return
        step, *noted = self._note.tolist()
        if step >= 0:
            counts, first = noted[::2], noted[1::2]
            self._raise(step, [[row][:count] for row, count in zip(first, counts, strict=True)], counts)

    def _raise(self, step: int, rows: list[list[int]], counts: list[int]) -> None:
        named = [", ".join(map(str, known[:8])) + (", ..." if count > len(known[:8]) else "")
                 for known, count in zip(rows, counts, strict=True)]  # fmt: skip
        fault = self._fault
        if fault is not None and counts[2]:
            because = f"the loss at step {step}, process {self.process}, is not finite"
            found = f"{fault.found} in rows [{named[2]}] of the batch"
            fail(fault.argument, found, fault.expected, fault.fix, because=because, error=RuntimeError)
        sides = []
        for side, shown, count in zip(("student", "teacher"), named, counts, strict=False):
            if count:
                sides.append(f"{count} rows of the {side}'s {self._of} hold NaN or inf (rows [{shown}])")
        heads = "an output head's weights or logits are not, or " if self._of != "logits" else ""
        mass = f"all {self._of} are finite, but {heads}the teacher has mass where the student has none"
        cause = "; ".join(sides) or mass
        fail(
            "loss",
            f"not finite at step {step}, process {self.process}: {cause}",
            "finite numbers from both models",
            "Lower the learning rate or use bf16/float32; kd_check_finite sets when this is looked for.",
            error=RuntimeError,
        )
