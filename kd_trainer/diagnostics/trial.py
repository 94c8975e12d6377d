"""What `check()` runs: a step, the loss of the batch split and padded, soft and hard gradient, teacher and student.

For: `check.py`, which restores afterwards what is changed here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import torch
from torch import Tensor, nn

from ..losses import IGNORE_INDEX, divide
from ..tasks import behind_front, main_input, model_inputs, unchanged_attributes, vocabulary_rows
from ..teachers import LiveTeacher, positions_of
from ..training import Counts, FirstBatch, LossInputs, Plan
from .advice import about_path, pad_id_of
from .batch_changes import padded, pieces_of, starts_padded
from .inspection import Inspection, LossOfPlan
from .memory import COLUMNS, estimate_memory
from .results import CheckResult, Results, error, has_errors, ok, warning

_EVALUATED = 50  # batches of the evaluation data
_WARM = 10.0  # seconds: a step that took longer is not run a second time for a better measure
_MORE = 8  # positions of padding
_AT_ONCE = 2**27  # logits of a language model
_LARGEST_SHARE = 0.95  # of the gradient, without a warning


class Trial(NamedTuple):
    """Arguments of the passes through the models."""

    inspection: Inspection
    setup: FirstBatch
    plan: Plan
    model: nn.Module  # the student as the accelerator wrapped it
    batch: dict[str, Any]  # prepared, with the inputs of a decoder

    @property
    def trainer(self) -> Any:
        return self.inspection.trainer

    @property
    def whole(self) -> bool:
        """Whether every process has the whole student and may call it any number of times."""
        return not self.setup.sharded

    @property
    def precision(self) -> Any:
        """The mixed precision that the accelerator will set up."""
        accelerator = self.trainer.accelerator
        return accelerator.autocast() if self.whole and accelerator.mixed_precision != "no" else nullcontext()

    def loss(self, batch: Mapping[str, Any], counts: Counts | None = None) -> LossOfPlan:
        """The loss of a batch as training computes it; None as counts: those of the batch."""
        with self.precision:
            return self.inspection.compute_loss(self.model, dict(batch), counts, self.plan)

    def logits(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Of student and live teacher; without gradient."""
        task, live = self.plan.task, cast(LiveTeacher, self.setup.live)
        teacher_logits = live(batch, self.trainer.accelerator, self.model, read=task.logits)
        with torch.no_grad(), self.precision, task.pooled(self.plan.student):
            logits = task.logits(self.model(**model_inputs(batch, self.plan.accepted)), "model")
            logits = behind_front(logits, self.plan.student, batch)
        return logits, teacher_logits.to(logits.device)


def run(trial: Trial, results: Results, evaluate: bool) -> None:
    """Adds the rows of all passes, or that of the step alone where it fails."""
    before = len(results.rows)
    results.add("loss", _step, trial, results)
    if not results.everywhere(not has_errors(results.rows[before:])):
        return
    trial = trial._replace(plan=cast(Plan, results.plan))
    results.rows += about_path(trial.plan, trial.plan.student, trial.setup.kd.kd_loss_implementation)
    results.add("memory", _memory, trial, results.memory_peak)
    results.add("split", _split, trial, results)
    results.add("padding", _padding, trial, results)
    results.add("soft and hard", _shares, trial)
    if evaluate:
        results.add("teacher's quality", _teacher_quality, trial, results)


def _step(trial: Trial, results: Results) -> list[CheckResult]:
    """The loss of a training step and its gradient."""
    trainer, plan = trial.trainer, trial.plan
    plan.student.train()
    # No gradient of a sharded student, or where upstream sets up activation checkpointing in `train`.
    backward = trial.whole and not _checkpoints_activations(trainer.args)
    objective, _ = trial.inspection.objective(training=True)
    counts = objective.count(plan.task, trial.batch)
    memory_peak = _watch_memory(trainer.args.device)

    def step() -> LossOfPlan:
        plan.student.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward), unchanged_attributes(trainer, "is_in_train"):
            trainer.is_in_train = True  # a loss in eval mode is one of training too
            computed = trial.loss(trial.batch, counts)
        if backward:
            computed.loss.backward()
        return computed

    seconds, (loss, metrics, results.plan) = _timed(trainer.args.device, step, once=not trial.whole)
    results.memory_peak = memory_peak() if backward else None
    parts = metrics.named(plan.task, objective)  # none where a subclass has its own compute_loss
    shown = ", ".join(f"{name} {value:.4f}" for name, value in parts.items())
    found = f"{loss.item():.4f} of one batch: {shown}"
    if not math.isfinite(loss.item()):
        fix = 'Set kd_check_finite to "step" to see which rows and whose logits are not finite.'
        return [error("loss", found, fix)]
    rows = [ok("loss", found)]
    if trial.whole:
        rows += _seconds(trial, seconds, backward)
    return [*rows, *_gradient(trainer.args, plan.student)] if backward else rows


def _checkpoints_activations(args: Any) -> bool:
    return any(getattr(args, name, False) for name in ("activation_checkpointing", "gradient_checkpointing"))


def _seconds(trial: Trial, whole: float, backward: bool) -> list[CheckResult]:
    trainer, count = trial.trainer, main_input(trial.batch).shape[0]
    live, teacher = trial.setup.live, 0.0
    if live is not None and not trial.inspection.settings.always_hard:
        forward = partial(live.outputs, trial.batch, trainer.accelerator, trial.model)
        teacher, _ = _timed(trainer.args.device, forward, once=whole > _WARM)
    passes = "forward and backward" if backward else "forward"
    student = f"{max(whole - teacher, 0.0):.3g} s for the student's {passes} and the loss"
    found = f"a batch of {count} row{'' if count == 1 else 's'} takes {student}"
    return [ok("time", found + (f", {teacher:.3g} s for the teacher's forward" if teacher else ""))]


def _gradient(args: Any, student: nn.Module) -> list[CheckResult]:
    trained = [(name, p.grad) for name, p in student.named_parameters() if p.requires_grad]
    unused = [name for name, gradient in trained if gradient is None]
    norms = [gradient.detach().float().norm() for _, gradient in trained if gradient is not None]
    norm = float(torch.stack(norms).norm()) if norms else 0.0
    if not math.isfinite(norm):
        fix = "Use bf16 or float32, or a smaller learning rate, and look for extreme values in the data."
        return [error("gradient", f"its norm is {norm}", fix)]
    if norm == 0:
        found = "no trained parameter gets any"
        return [error("gradient", found, "Check which parameters are trained, and that some position has a label.")]
    limit = args.max_grad_norm
    clipped = f"; max_grad_norm {limit:g} scales it down" if limit and norm > limit else ""
    rows = [ok("gradient", f"norm {norm:.3g}{clipped}")]
    if unused:
        found = f"{len(unused)} trained parameters get none ({', '.join(unused[:3])})"
        fix = "Freeze them, or set ddp_find_unused_parameters to true."
        waits = args.world_size > 1 and not args.ddp_find_unused_parameters
        rows.append(warning("gradient", f"{found}: DDP waits for them", fix) if waits else ok("gradient", found))
    return rows


def _memory(trial: Trial, measured_peak: int | None) -> list[CheckResult]:
    """The estimated and measured memory of a training step, and what the device has."""
    trainer, plan, args = trial.trainer, trial.plan, trial.trainer.args
    if trial.setup.live is None or not trial.whole:
        return []
    on_gpu, peak, measured = args.device.type == "cuda", measured_peak or 0, ""
    if peak:
        what = f"{_amount(peak)}{'' if on_gpu else ' more resident'}"
        measured = f"; measured: {what} at the peak of a forward and backward, without optimizer"
    try:
        memory = estimate_memory(
            plan.student,
            trial.setup.live.model,
            backend="single" if args.world_size == 1 else "ddp",
            processes=args.world_size,
            batch={name: value for name, value in trial.batch.items() if isinstance(value, Tensor)},
            mixed_precision=trainer.accelerator.mixed_precision,
            gradient_checkpointing=_checkpoints_activations(args),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            kd_task=plan.task.name,
            kd_loss_implementation="full" if plan.heads is None else "fused",
            device="cuda" if on_gpu else "cpu",
        )
    except Exception as reason:  # of an unusual model; a check must not fail for that
        return [ok("memory", f"not estimated: {(str(reason).splitlines() or [type(reason).__name__])[0]}{measured}")]
    room = torch.cuda.mem_get_info(args.device)[1] if on_gpu else psutil.virtual_memory().total
    parts = ((part, getattr(memory, part)) for part in COLUMNS.values() if part not in ("backend", "total"))
    each = ", ".join(f"{part} {'not known' if size is None else _amount(size)}" for part, size in parts)
    found = f"about {_amount(memory.total)} a process at the peak of a step, of {_amount(room)}: {each}{measured}"
    shared = 1 if on_gpu else args.world_size
    if max(memory.total, peak + memory.optimizer if on_gpu else 0) * shared < 0.9 * room:
        return [ok("memory", found)]
    fix = (
        "Lower the batch size with gradient_accumulation_steps, set gradient_checkpointing, or load the teacher in "
        "bfloat16 or 8 bits; configs/README.md: From one GPU to many."
    )
    return [warning("memory", found, fix)]


def _watch_memory(device: torch.device) -> Callable[[], int | None]:
    """Returns a function that gives the peak of all tensors on a GPU, or the growth of resident memory on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        before = _most_resident()
    except (OSError, IndexError):
        return lambda: None
    return lambda: _most_resident() - before if device.type == "cpu" else None


def _most_resident() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def _amount(count: float) -> str:
    unit, size = next((unit, size) for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 0)) if count >= size)
    return f"{count / max(size, 2**10):.3g} {unit}"


def _split(trial: Trial, results: Results) -> list[CheckResult]:
    """The batch at once and as two micro-batches of one optimizer step."""
    rows = len(main_input(trial.batch))
    least = 4 if _batch_norms(trial.plan.student) else 2  # batch norm rejects a single row
    parts = pieces_of(trial.batch, (rows + 1) // 2) if rows >= least else None
    if not results.everywhere(parts is not None and len(parts) == 2):
        return [ok("split", "not tried: the batch cannot be cut into rows")]
    with _as_in_training_without_dropout(trial.plan.student):
        whole, halves = _losses(trial, [trial.batch], trial.batch), _losses(trial, cast(list, parts), trial.batch)
    found = f"1 x {rows} rows {whole:.6f}, 2 x {(rows + 1) // 2} {halves:.6f}"
    return [_compared(trial, "split", found, whole, halves, _causes(trial))]


def _padding(trial: Trial, results: Results) -> list[CheckResult]:
    """The batch as it is and with more padding on either side, each divided by its own counts."""
    task, student, teacher = trial.plan.task, trial.plan.student, trial.trainer.teacher
    if teacher is not None and teacher.model is None:
        return []  # what a cache holds is joined to the batch as it is
    ids = trial.batch.get("input_ids")
    width = ids.shape[-1] if isinstance(ids, Tensor) else 0
    limits = [positions_of(model)[0] for model in ([student] if teacher is None else [student, teacher.model])]
    more = min([_MORE, *(limit - width for limit in limits if limit is not None)])
    tokenizer = trial.trainer.processing_class
    pad_id = pad_id_of(tokenizer, student) or 0
    usual = "left" if getattr(tokenizer, "padding_side", "right") == "left" or starts_padded(trial.batch) else "right"
    rows: list[CheckResult] = []
    for side in (usual, "right" if usual == "left" else "left"):
        changed = padded(trial.batch, task, more, pad_id, left=side == "left") if more > 0 else None
        if not results.everywhere(changed is not None):
            return rows
        with _as_in_training_without_dropout(student):
            plain, wider = (_losses(trial, [batch], batch) for batch in (trial.batch, cast(dict, changed)))
        found = f"as it is {plain:.6f}, with {more} more positions on the {side} {wider:.6f}"
        if task.over_positions:
            note = f"the hard loss of {task.name.replace('_', ' ')} runs over the padding, as upstream's"
            rows.append(ok("padding", f"{found}; {note}"))
            continue
        causes = "A model sees the padding: check the attention_mask, its padding side and convolutions or pooling"
        row = _compared(trial, "padding", found, plain, wider, f"{causes} over rows.")
        if side != usual and row.status == "warning":
            row = ok("padding", f"{row.found} (no row of this batch is padded there)")
        rows.append(row)
    return rows


def _losses(trial: Trial, batches: list[dict[str, Any]], whole: Mapping[str, Any]) -> float:
    objective, _ = trial.inspection.objective(training=False)
    counts = objective.count(trial.plan.task, whole)
    with torch.no_grad():
        return sum(float(trial.loss(batch, counts).loss) for batch in batches)


def _compared(trial: Trial, what: str, found: str, one: float, other: float, causes: str) -> CheckResult:
    difference = abs(one - other) / max(abs(one), abs(other), 1e-12)
    halves = {p.dtype for p in trial.plan.student.parameters()} & {torch.float16, torch.bfloat16}
    room = 2e-2 if halves or trial.trainer.accelerator.mixed_precision != "no" else 1e-4
    found = f"{found}: relative difference {difference:.1e}"
    return ok(what, found) if difference <= room else warning(what, found, causes)


def _causes(trial: Trial) -> str:
    norms = ", ".join([*_batch_norms(trial.plan.student)][:3])
    if norms:
        return f"Batch norm ({norms}) depends on the other rows: small micro-batches train otherwise."
    if getattr(getattr(trial.plan.student, "config", None), "output_router_logits", False):
        return "The load-balancing loss of the experts is a mean over micro-batches: small ones train otherwise."
    return "A model depends on the other rows of its batch (experts of limited capacity?): small ones train otherwise."


@contextmanager
def _as_in_training_without_dropout(student: nn.Module) -> Iterator[None]:
    """All modules in eval mode except batch norm, which uses the statistics of the batch in training."""
    student.eval()
    for module in _batch_norms(student).values():
        module.train()
    yield
    student.eval()


def _batch_norms(student: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in student.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def _shares(trial: Trial) -> list[CheckResult]:
    """The shares of soft and hard loss in the gradient at the student's logits."""
    plan, batch = trial.plan, trial.batch
    objective, soft_loss = trial.inspection.objective(training=True)
    if trial.setup.live is None or not 0 < objective.alpha < 1:
        return []
    counts = objective.count(plan.task, batch)
    squares = [0.0, 0.0]
    with _as_in_training_without_dropout(plan.student):
        for piece in _for_logits(trial, batch):
            logits, teacher_logits = trial.logits(piece)
            for i, alpha in enumerate((1.0, 0.0)):  # of one term alone, before its weight
                alone = dataclasses.replace(objective, alpha=alpha)
                leaf = logits.detach().float().requires_grad_()
                given = LossInputs(plan.task, piece, counts, plan.common_ids)
                parts = alone(given, soft_loss, leaf, teacher_logits if alpha else None)
                (gradient,) = torch.autograd.grad(parts.total, leaf)
                squares[i] += gradient.square().sum().item()
    soft, hard = map(math.sqrt, squares)
    weighted = objective.alpha * soft, (1 - objective.alpha) * hard
    if sum(weighted) == 0 or hard == 0:
        return []
    share = weighted[0] / sum(weighted)
    shares = f"the {objective.soft_name} loss has {share:.0%} of the gradient's norm, the hard loss {1 - share:.0%}"
    found = f"at the logits {shares}"
    if max(share, 1 - share) <= _LARGEST_SHARE or soft == 0:
        return [ok("soft and hard", found)]
    fix = f"kd_alpha {hard / (soft + hard):.2g} would give them equal shares."
    return [warning("soft and hard", found, fix)]


def _for_logits(trial: Trial, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The batch in pieces whose logits take little memory; whole where all processes have to call together."""
    classes = vocabulary_rows(trial.plan.student, written=True) if trial.plan.task.over_tokens else None
    if classes is None or not trial.whole:
        return [batch]
    positions = trial.plan.task.sequences(batch).shape[-1]
    return pieces_of(batch, _AT_ONCE // max(positions * classes, 1)) or [batch]


def _teacher_quality(trial: Trial, results: Results) -> list[CheckResult]:
    """Hard loss and accuracy of the teacher and of the student as it starts, on batches of the evaluation data."""
    trainer, plan = trial.trainer, trial.plan
    if trial.setup.live is None or trial.setup.chunks:  # nothing is alike to be compared position by position
        return []
    dataset = trainer.eval_dataset
    if dataset is None:
        return [ok("teacher's quality", "not measured: there is no eval_dataset")]
    sums = None
    with results.attempt("teacher's quality"):
        plan.student.eval()
        loader = trainer.get_eval_dataloader(next(iter(dataset)) if isinstance(dataset, dict) else None)
        pieces = (_for_logits(trial, trial.setup.prepared(given)) for given in batches(loader, _EVALUATED))
        sums = sum((_measured(trial, piece) for piece in itertools.chain(*pieces)), torch.zeros(6))
    if not results.everywhere(sums is not None):
        return []
    sums = cast(Tensor, sums).to(trainer.args.device)
    labelled, *sums = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    if not labelled:
        return [ok("teacher's quality", "not measured: the evaluation data has no labels")]
    student_loss, teacher_loss, student_right, teacher_right, same = (divide(total, labelled) for total in sums)
    found = f"hard loss {teacher_loss:.4f}, of the student as it starts {student_loss:.4f}"
    if plan.task.softmax:
        found += f"; right {teacher_right:.1%} and {student_right:.1%}, the same {same:.1%}"
    found += f" ({labelled:.0f} labels of the evaluation data)"
    better = teacher_loss < student_loss or (plan.task.softmax and teacher_right > student_right)
    if better or not trainer.teacher.has_own_weights:  # a student may start as its own base
        return [ok("teacher's quality", found)]
    fix = "It is no better than where the student starts: check its weights, the order of the classes and the inputs."
    return [warning("teacher's quality", found, fix)]


def _measured(trial: Trial, batch: dict[str, Any]) -> Tensor:
    """Sums: labels, hard loss of student and teacher, correct predictions of both, equal predictions."""
    task, sums = trial.plan.task, torch.zeros(6)
    targets = task.targets(batch)
    student, teacher = trial.logits(batch)
    if targets is None:
        return sums
    teacher = teacher[..., 0] if teacher.dim() > student.dim() else teacher  # the mean of a regression with variance
    sums[0] = float(task.labelled(targets))
    for i, one in enumerate((student, teacher)):
        known = targets.masked_fill(targets >= one.shape[-1], IGNORE_INDEX) if task.softmax else targets
        sums[1 + i] = float(task.hard_loss_sum(one, known))
        if task.softmax:
            sums[3 + i] = float((one.argmax(-1) == targets).sum())
    if task.softmax:
        sums[5] = float(((student.argmax(-1) == teacher.argmax(-1)) & (targets != IGNORE_INDEX)).sum())
    return sums


def batches(loader: Any, count: int) -> list[Any]:
    """The first batches of a loader."""
    try:
        return list(itertools.islice(loader, count))
    finally:
        if hasattr(loader, "end"):  # accelerate keeps a loader as the active one until its end
            loader.end()


def _timed(device: torch.device, call: Callable[[], Any], *, once: bool) -> tuple[float, Any]:
    """Seconds of the faster of two calls, and what the last one returned; a slow call is not repeated."""
    seconds, result = math.inf, None
    for _ in range(2):
        start = _now(device)
        result = call()
        seconds = min(seconds, _now(device) - start)
        if once or seconds > _WARM:
            break
    return seconds, result


def _now(device: torch.device) -> float:
    """Seconds, after the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
