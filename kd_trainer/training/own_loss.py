"""Whose hard loss: the model's own loss beside the task's formula, compared on the first batch.

For: `setup_checks.py`, which compares once, and `trainer.py`, which then takes the loss that was chosen. A model may
weigh classes, add penalties, shift its labels or not: `kd_alpha=0` has to be the stock `Trainer` for every one. Where
its loss is the task's formula, the formula is used, since that does not depend on how a batch is split; otherwise its
own loss is used.
Shapes: B rows, S positions, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..losses import IGNORE_INDEX, select_positions
from ..tasks import (
    STUDENT_TOKENS,
    Accepted,
    Task,
    as_in_training,
    behind_front,
    model_inputs,
    same_random_numbers,
    text_config,
)
from ..teachers import reshard
from ..validation import fail
from .terms import aux_weight

MOST_ROWS = 8  # of the batch that are compared
MOST_ROWS_OF_TOKENS, MOST_POSITIONS = 2, 64  # of a language model: more would hold large logits
_OF_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})
_CLOSE = 5e-5  # relative; half precision inside the model's own loss rounds to 2e-2

Forward = Callable[[dict[str, Any]], Any]


class _ForwardError(Exception):
    """The student's forward failed, for the reason in its cause."""


class HardLoss(NamedTuple):
    """What the first batch showed of the student's own loss.

    Attributes:
        own: whether the model's own loss is the hard loss; else the task's formula is.
        task: the task, with the shift of the labels that the model's own loss has.
        line: for the start block and `check()`; empty where there was nothing to compare.
        labels_are_inputs: the logits depend on the labels (a decoder's inputs are made of them), so they are passed.
        by_num_items: the formula's sum has to be divided by upstream's num_items_in_batch, as the model divides it:
            upstream counts the labels of some shifting models (GPT-2) as if they did not shift.
    """

    own: bool
    task: Task
    line: str = ""
    labels_are_inputs: bool = False
    by_num_items: bool = False


def own_loss(outputs: Any) -> Tensor | None:
    """The loss in what a model returned for a batch with labels, as the stock Trainer finds it; None without one."""
    if isinstance(outputs, Mapping):
        found = outputs.get("loss")
    else:
        found = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else None
    return found if isinstance(found, Tensor) and found.numel() == 1 and found.is_floating_point() else None


def label_columns(batch: Mapping[str, Any], accepted: Accepted) -> dict[str, Any]:
    """The columns of the batch that hold targets and that the model's forward takes."""
    names = accepted.targets - {"num_items_in_batch", "skip_logits", STUDENT_TOKENS}
    return {k: v for k, v in batch.items() if k in names and v is not None and accepted.take_target(k)}


def without_extras(loss: Tensor, outputs: Any, student: nn.Module, logits: Tensor | None, aux: float | None) -> Tensor:
    """The model's own loss less what distillation adds beside the hard loss or leaves out on purpose.

    That is the load-balancing loss of a mixture of experts, with its weight `aux`, and Bamba's z-loss.
    """
    found = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    if isinstance(found, Tensor) and aux:
        loss = loss - aux * found.to(loss.device)
    weight = getattr(text_config(student), "z_loss_coefficient", 0) or 0
    if logits is not None and weight > 0:
        loss = loss - weight * logits.float().logsumexp(-1).square().mean()
    return loss


class OwnHardLoss(NamedTuple):
    """The model's own loss, or the script's `compute_loss_func`, as the stock Trainer computes and divides it.

    Args:
        function: the script's compute_loss_func; None where the model's loss is taken.
        takes_num_items: whether the model's forward takes `num_items_in_batch`.
        scale: undoes the averaging of gradients over processes.
    """

    function: Any
    takes_num_items: bool
    scale: int

    def labels(self, accepted: Accepted, inputs: Mapping[str, Any], counts: Any) -> dict[str, Any]:
        """What the stock Trainer passes to the model beside its inputs, so that it computes its own loss."""
        labels = label_columns(inputs, accepted)
        if self.function is not None:
            labels.pop("labels", None)
        labels = {name: value for name, value in labels.items() if name not in accepted}
        if self.takes_num_items and counts.num_items is not None:
            labels["num_items_in_batch"] = counts.num_items
        return labels

    def __call__(self, plan: Any, outputs: Any, inputs: Mapping[str, Any], counts: Any) -> Tensor | None:
        """The hard loss, divided as upstream's `compute_loss` and `training_step` divide it; None without labels."""
        if all(inputs.get(name) is None for name in plan.accepted.targets):
            return None
        if self.function is not None:
            loss = self.function(outputs, inputs.get("labels"), num_items_in_batch=counts.num_items)
        else:
            found = own_loss(outputs)
            if found is None:
                fix = "Return it whenever labels are given, or set kd_hard_loss to task."
                shown = "a model that returns no loss for a batch with labels"
                fail("model", shown, "the loss that it returned for the first batch", fix, error=RuntimeError)
            loss = without_extras(found, outputs, plan.student, None, aux_weight(plan.student))
        targets = plan.task.targets(inputs)
        if targets is not None and plan.task.softmax:  # upstream's mean over no label is NaN
            loss = torch.where(plan.task.labelled(targets) > 0, loss, torch.zeros_like(loss))
        if counts.num_items is not None and (self.function is not None or self.takes_num_items):
            return loss * self.scale
        return loss if self.function is not None else loss / counts.micro_batches


class Comparison:
    """The model's own loss beside the task's formula, on a small piece of a batch.

    Args:
        forward: calls the student as a training step would, always with the same random numbers, without gradient.
        student: unwrapped. task, accepted: its task and its inputs.
        aux_weight: of the load-balancing loss in the model's own loss; None without one.
        counts_shifted: whether upstream's num_items_in_batch counts shifted labels; None where the model takes none.
    """

    def __init__(
        self,
        forward: Forward,
        student: nn.Module,
        task: Task,
        accepted: Accepted,
        aux_weight: float | None,
        counts_shifted: bool | None = None,
    ) -> None:
        self.counts_shifted = counts_shifted
        self.forward, self.student, self.task, self.accepted = forward, student, task, accepted
        self.aux_weight = aux_weight
        self.labels_are_inputs = False
        self._logits: Tensor | None = None  # of the last forward without labels

    def look(self, batch: Mapping[str, Any]) -> HardLoss | None:
        """The verdict; None where the model takes no labels or gives no loss for them.

        Two forwards with labels (those of the batch, and varied ones, which show weights of classes that the batch
        does not have) and one without; a few more where the losses differ.
        """
        batch = piece_of(batch, self.task)
        labels = label_columns(batch, self.accepted)
        made_up = {} if labels else self._made_up(batch)
        if not labels and not made_up:
            return None
        try:
            return self._compare(batch, labels or made_up)
        except _ForwardError as error:
            if made_up:
                return None
            cause = error.__cause__
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            line = f"the task's formula: {type(self.student).__name__} fails on the first batch with labels ({reason})"
            return HardLoss(False, self.task, line)

    def _compare(self, batch: Mapping[str, Any], labels: dict[str, Any]) -> HardLoss | None:
        labels = {**labels, **{n: self._filled(labels[n]) for n in self.task.label_names if n in labels}}
        outputs = self._call(batch, labels)
        self._look_without_labels(batch, outputs)
        varied = {name: self._varied(value, name) for name, value in labels.items()}
        found = []
        for probe in (labels, varied):
            try:
                one = self._both(batch, probe, outputs if probe is labels else self._call(batch, probe))
            except _ForwardError:  # it has fewer classes than logits: the labels of the batch decide
                continue
            if one is None:
                return None
            found.append(one)
        found = [(own, formulas, room) for own, formulas, room in found if math.isfinite(own)]
        if not found:
            return None
        name = type(self.student).__name__
        for index, task in enumerate(self._tasks()):
            if all(_close(own, formulas[index], room) for own, formulas, room in found):
                line = f"the task's formula, which {name}'s own loss equals on the first batch"
                by_items = self._divides_by_items(batch, labels, task, found[0])
                return HardLoss(False, task, line, self.labels_are_inputs, by_items)
        own, formulas, _ = found[0]
        line = f"the model's own: {name} gives {own:.4f} on the first batch, the task's formula {formulas[0]:.4f}"
        return HardLoss(True, self._head_by_use(batch, labels), line, self.labels_are_inputs)

    def _divides_by_items(
        self, batch: Mapping[str, Any], labels: dict[str, Any], task: Task, found: tuple[float, list[float], float]
    ) -> bool:
        """Whether the model divides by a num_items_in_batch that upstream counts otherwise than the formula does."""
        if not task.token_level or self.counts_shifted in (None, task.shifted) or "shift_labels" in labels:
            return False
        count, device = 1000.0, next(v.device for v in labels.values() if isinstance(v, Tensor))
        loss = own_loss(self._call(batch, {**labels, "num_items_in_batch": torch.tensor(count, device=device)}))
        targets = task.targets({**batch, **labels})
        if loss is None or targets is None:
            return False
        return _close(float(loss) * count, found[0] * float(task.labelled(targets)), max(found[2], 1e-4))

    def _tasks(self) -> list[Task]:
        """The task as it was taken, and with the other shift where labels could be shifted."""
        task = self.task
        toggled = task.token_level and task.softmax and not task.encoder_decoder
        return [task, dataclasses.replace(task, shifted=not task.shifted)] if toggled else [task]

    def _call(self, batch: Mapping[str, Any], labels: Mapping[str, Any]) -> Any:
        try:
            return self.forward({**model_inputs(batch, self.accepted), **labels})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a forward of the user's own may raise anything
            raise _ForwardError from error

    def _look_without_labels(self, batch: Mapping[str, Any], outputs: Any) -> None:
        """Whether the logits depend on the labels, of which `outputs` were made: a decoder may read them."""
        with_labels = self._logits_of(batch, outputs)
        try:
            self._logits = self._logits_of(batch, self._call(batch, {}))
        except _ForwardError:  # it cannot do without them
            self._logits = None
        alone = self._logits
        if with_labels is None:
            return
        same = alone is not None and alone.shape == with_labels.shape
        self.labels_are_inputs = not (same and _alike(cast(Tensor, alone), with_labels))

    def _logits_of(self, batch: Mapping[str, Any], outputs: Any) -> Tensor | None:
        """The logits; None where the outputs have none (a fused loss leaves them out)."""
        try:
            return behind_front(self.task.logits(outputs, "model"), self.student, batch)
        except (TypeError, ValueError):
            return None

    def _both(
        self, batch: Mapping[str, Any], labels: Mapping[str, Any], outputs: Any
    ) -> tuple[float, list[float], float] | None:
        """(own loss, the formula of each of `_heads`, relative room for rounding) for labels and their outputs."""
        loss, logits = own_loss(outputs), self._logits_of(batch, outputs)
        logits = self._logits if logits is None else logits
        if loss is None or logits is None:
            return None
        half = loss.dtype in (torch.float16, torch.bfloat16)
        own = float(without_extras(loss, outputs, self.student, logits, self.aux_weight))
        inputs = {**batch, **labels}
        return own, [formula(task, logits, inputs) for task in self._tasks()], 2e-2 if half else _CLOSE

    def _head_by_use(self, batch: Mapping[str, Any], labels: dict[str, Any]) -> Task:
        """The shift of a loss that equals no formula: one that shifts does not read the label of the first position."""
        tasks = self._tasks()
        name = self.task.label_names[0]
        given = labels.get(name)
        if len(tasks) == 1 or given is None or "shift_labels" in labels or given.shape[1] < 2:
            return self.task
        full = given.masked_fill(given == IGNORE_INDEX, 0)
        other = full.clone()
        other[:, 0] = (other[:, 0] + 1) % 2
        losses = [own_loss(self._call(batch, {**labels, name: each})) for each in (full, other)]
        if any(loss is None or not math.isfinite(float(loss)) for loss in losses):
            return self.task
        shifted = float(losses[0]) == float(losses[1])  # type: ignore[arg-type]
        return next(task for task in tasks if task.shifted == shifted)

    def _made_up(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Labels for a batch that has none, where their shape is plain."""
        name = self.task.label_names[0]
        if not self.accepted.take_target(name) or not self.task.softmax or len(self.task.label_names) > 1:
            return {}
        ids = batch.get("decoder_input_ids" if self.task.encoder_decoder else "input_ids")
        if self.task.token_level and isinstance(ids, Tensor) and ids.dim() == 2:
            mask = batch.get("decoder_attention_mask" if self.task.encoder_decoder else "attention_mask")
            made = torch.zeros_like(ids)
            if isinstance(mask, Tensor) and mask.shape == ids.shape:
                made = made.masked_fill(mask == 0, IGNORE_INDEX)
            return {name: made}
        if not self.task.token_level:
            first = next((v for v in batch.values() if isinstance(v, Tensor) and v.dim() > 1), None)
            return {} if first is None else {name: torch.zeros(len(first), dtype=torch.long, device=first.device)}
        return {}

    def _filled(self, labels: Tensor) -> Tensor:
        """Without the unlabelled rows of tasks whose own loss knows none."""
        if self.task.softmax or not isinstance(labels, Tensor):
            return labels
        if not self.task.a_label_a_logit:
            return labels.masked_fill(labels == IGNORE_INDEX, 0)
        known = labels.float().masked_fill(labels == IGNORE_INDEX, 0.0) if self.task.tempered else labels.float()
        return known.nan_to_num(0.0)

    def _varied(self, labels: Any, name: str) -> Any:
        """Other labels at the same places: each class, unequal numbers of them in the rows."""
        if name not in (*self.task.label_names, "shift_labels") or not isinstance(labels, Tensor):
            return labels
        steps = torch.arange(labels.numel(), device=labels.device).reshape(labels.shape)
        if labels.is_floating_point():
            odd = steps % 2 == 0
            return torch.where(odd, 1 - labels, labels) if self.task.tempered else labels + (steps % 5 - 2).to(labels)
        classes = self._classes(labels)
        made = torch.where(labels == IGNORE_INDEX, labels, (labels + 1 + steps) % classes)
        if self.task.token_level and len(made) > 1:
            made[0, made.shape[1] // 2 :] = IGNORE_INDEX
        return made

    def _classes(self, labels: Tensor) -> int:
        if self._logits is not None:
            return int(self._logits.shape[-1])
        return max(int(labels.max()) + 1, 1)


def formula(task: Task, logits: Tensor, inputs: Mapping[str, Any]) -> float:
    """The task's hard loss, a mean over the labelled positions (or rows) of this batch; NaN where it has none.

    Raises:
        ValueError: a label outside the classes.
    """
    try:
        targets = task.targets(inputs)
        task.check_shapes(logits, None, targets)
    except (ValueError, TypeError):  # labels of another shape or kind: the model's own loss alone reads them
        return math.nan
    if targets is None:
        return math.nan
    count = float(task.labelled(targets))
    if task.token_level:
        labelled = targets != IGNORE_INDEX
        logits, targets = select_positions(logits, labelled), select_positions(targets, labelled)
    return float(task.hard_loss_sum(logits, targets)) / count if count else math.nan


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-3, equal_nan=True)


def _close(own: float, formula: float, room: float) -> bool:
    return abs(own - formula) <= room * max(abs(own), abs(formula)) + 1e-6


def piece_of(batch: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """A few rows of the batch, of a language model a few hundred positions; a single row is taken twice.

    The batch as it is where a column does not have one entry a row.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    sizes = {len(value) for value in tensors.values()}
    if len(sizes) != 1 or len(tensors) != sum(isinstance(value, Tensor) for value in batch.values()):
        return dict(batch)
    (rows,) = sizes
    most = MOST_ROWS_OF_TOKENS if task.over_tokens else MOST_ROWS
    if rows == 1:
        changed = {name: torch.cat([value, value]) for name, value in tensors.items()}
    else:
        changed = {name: value[:most] for name, value in tensors.items()}
    if task.over_tokens:
        decoded = {name for name in tensors if name.startswith("decoder_")} | set(task.label_names)
        cut = decoded if task.encoder_decoder else _OF_TEXT | set(task.label_names)
        if task.encoder_decoder or set(batch) <= cut:
            changed |= _some_positions({name: value for name, value in changed.items() if name in cut}, task)
    return {**batch, **changed}


def _some_positions(columns: Mapping[str, Tensor], task: Task) -> dict[str, Tensor]:
    """Some positions of each: from the first label on, and one before it, so that a shift finds its position."""
    lengths = {value.shape[1] if value.dim() == 2 else 0 for value in columns.values()}
    if len(lengths) != 1 or max(lengths) <= MOST_POSITIONS:
        return {}
    labels = columns.get(task.label_names[0])
    places = torch.zeros(0) if labels is None else (labels != IGNORE_INDEX).any(0).nonzero()
    start = max(int(places[0]) - 1, 0) if len(places) else 0
    return {name: value[:, start : start + MOST_POSITIONS] for name, value in columns.items()}


def agreed(found: HardLoss | None, task: Task, anywhere: Callable[[list[bool]], list[bool]]) -> HardLoss | None:
    """One verdict for all processes, from what each has found; `anywhere`: whether each is true on any of them."""
    mine = [False] * 5
    if found is not None:
        toggled = found.task.shifted != task.shifted
        mine = [True, found.own, toggled, found.labels_are_inputs, found.by_num_items]
    known, own, toggled, inputs, by_items = anywhere(mine)
    if not known:
        return None
    found = found or HardLoss(False, task)
    if own and not found.own:
        found = found._replace(line="the model's own, which differs from the task's formula on another process")
    task = dataclasses.replace(task, shifted=task.shifted != toggled)
    return found._replace(own=own, task=task, labels_are_inputs=inputs, by_num_items=by_items)


def choose(
    wanted: str, task: Task, labelled: bool, smoothed: bool, with_function: bool, compare: Callable[[], HardLoss | None]
) -> HardLoss:
    """Whether the hard loss is the task's formula or the model's own, by `kd_hard_loss` (`wanted`).

    Args:
        labelled: whether the batch has targets of the task.
        smoothed: whether upstream's label smoother replaces the model's own loss.
        with_function: whether there is a `compute_loss_func`, which is the hard loss then.
        compare: gives the verdict of `Comparison`, on every process; None where the model cannot be called.
    """
    if not task.has_hard_loss:
        return HardLoss(False, task)
    if not task.has_formula and not with_function:
        return HardLoss(True, task, f"the model's own, as for every model of the task {task.name!r}")
    try:
        found = None if smoothed else compare()
    except ValueError:  # labels that only the model's own loss can read
        if wanted != "model" and not with_function:
            raise
        found = HardLoss(True, task)
    if with_function:
        line = "the script's compute_loss_func, with upstream's num_items_in_batch"
        return (found or HardLoss(True, task))._replace(own=True, line=line)
    if wanted == "task":
        return (found or HardLoss(False, task))._replace(own=False, line="the task's formula, as kd_hard_loss sets it")
    if wanted == "model":
        if found is None and (labelled or smoothed):
            reason = "label_smoothing_factor replaces it" if smoothed else "its forward gives no loss for labels"
            fix = "Leave it at 'auto', or let the model's forward return its loss."
            fail("kd_hard_loss", repr(wanted), "'auto' or 'task' with this model", fix, because=reason)
        return (found or HardLoss(True, task))._replace(own=True, line="the model's own, as kd_hard_loss sets it")
    return found or HardLoss(False, task)


def compare_losses(first: Any, accepted: Accepted) -> HardLoss | None:
    """The model's own loss beside the task's formula on a piece of the batch, the same answer on every process."""
    trainer, student, accelerator = first.trainer, first.student, first.trainer.accelerator
    batch, called = first.prepared(), trainer.model_wrapped if first.sharded else student

    def forward(inputs: dict[str, Any]) -> Any:
        own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}  # a forward may write
        with same_random_numbers(trainer.args.device), torch.no_grad():
            return called(**own)

    with as_in_training(student):
        counts_shifted = trainer._loss_shifts_labels if trainer.model_accepts_loss_kwargs else None
        weight = aux_weight(student)
        found = Comparison(forward, student, first.task, accepted, weight, counts_shifted).look(batch)
    if accelerator.is_fsdp2:
        reshard(called)
    if accelerator.num_processes == 1 or first.setup.each_alone:
        return found

    def anywhere(mine: list[bool]) -> list[bool]:
        seen = torch.tensor([float(x) for x in mine], device=trainer.args.device)
        return [bool(x) for x in accelerator.reduce(seen, reduction="sum").tolist()]

    return agreed(found, first.task, anywhere)
