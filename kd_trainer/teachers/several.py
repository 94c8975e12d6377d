"""`SeveralTeachers`: a mixture of teachers in probability space, and rows that a column routes to some of them.

    log p = logsumexp over teachers k of (log w_k + log p_k),    p_k = softmax(z_k / T)

Its logits are T * log p, so that softmax(logits / T) = p in every loss. The mean of the logits would be a product of
experts. The teachers run one after another: the running mixture and the logits of one teacher are in memory, or, in the
fused loss, the hidden states of all and the logits of a few positions.
Letters: B rows, N positions, V classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..losses import DIVERGENCES, MixedLogits, OutputProjection
from ..tasks import TEACHER_ID, OutputHead, Task, UnsupportedHead, teacher_hidden, teacher_side, whole_weight
from ..validation import Message, fail, nearest, quoted
from .compatibility import Classes, match_classes
from .outputs import COLUMN_PREFIX, TeacherOutput
from .teacher import Teacher

_AT_ONCE = 2**22  # numbers that are added to the mixture at once: the memory beside it and a teacher's logits
_NAMED = 2**20  # a `teacher_id` of a batch from here on is a name's: _NAMED + the first teacher of the name


class SeveralTeachers:
    """Several teachers as one: `DistillationTrainer(teacher_model=[one, "path/of/another", CachedTeacher(path)], ...)`.

    A row without `teacher_id` has the mixture of all. With it, a row has one teacher, by its number, or the mixture of
    those of a name; the weights of a row always add up to 1.

    Args:
        members: the teachers.
        weights: of each, >= 0; they are divided by their sum. None: equal. A teacher of weight 0 is never run.
        names: of each, for `teacher_id`; teachers of the same name are a mixture. None: numbers alone.

    Attributes:
        class_orders: of each, what reorders the classes of a cache into the student's, or None.
        heads: of each that is run, its output head; None where the logits of a teacher are needed.
        classes: of vocabularies that differ in size, how many first ids are mixed; None: all.
    """

    live: None = None
    model: None = None
    manifest: None = None
    is_student = has_own_weights = False

    def __init__(
        self, members: Sequence[Teacher], weights: Sequence[float] | None = None, names: Sequence[str] | None = None
    ) -> None:
        self.members = tuple(members)
        count = len(self.members)
        for name, given in (("teacher_weights", weights), ("teacher_names", names)):
            if given is not None and len(given) != count:
                fail(name, quoted(list(given)), f"{count} values, one for each teacher", "Give one for each teacher.")
        total = math.fsum(weights or [1.0] * count)
        self.weights = [weight / total for weight in weights or [1.0] * count]
        self.names = [] if names is None else list(names)
        self.routes = Routes(self.weights, self.names)
        self.compiled = any(member.compiled for member in self.members)
        self.class_orders: list[Tensor | None] = [None] * count
        self.classes: int | None = None
        self.heads: list[OutputHead | None] | None = None

    # ---- what it is ----

    @property
    def parts(self) -> dict[str, Any]:
        return {}

    @property
    def accepted(self) -> frozenset[str]:
        return frozenset().union(*(member.accepted for member in self.members))

    @property
    def start_tokens(self) -> tuple[int, int] | None:
        return next((m.start_tokens for m in self.members if m.start_tokens is not None), None)

    @property
    def note(self) -> str:
        return f"the teachers' probabilities are mixed by weight; a column {TEACHER_ID} selects the teachers of a row"

    @property
    def labels(self) -> list[str]:
        """Number, name and weight of each."""
        names = [f" ({name})" for name in self.names] or [""] * len(self.members)
        return [f"{index}{names[index]}, weight {weight:.4g}" for index, weight in enumerate(self.weights)]

    def describe(self) -> str:
        """One line a teacher."""
        each = zip(self.labels, self.members, strict=True)
        return "\n".join(f"{label}: {member.describe()}" for label, member in each)

    def identity(self) -> dict[str, Any]:
        """`name` with the weights, `parameters` of all, and `teachers` one by one."""
        teachers = []
        for index, (weight, member) in enumerate(zip(self.weights, self.members, strict=True)):
            known = member.identity()
            one = {"name": known["name"], "parameters": known["parameters"], "weight": weight}
            teachers.append(one | ({"teacher_id": self.names[index]} if self.names else {}))
        name = " + ".join(f"{one['weight']:.4g} * {one['name']}" for one in teachers)
        return {"name": name, "parameters": sum(one["parameters"] for one in teachers), "teachers": teachers}

    # ---- as `Teacher` has it ----

    def prepare(self, device: torch.device, accelerator: Any = None) -> None:
        for member, weight in zip(self.members, self.weights, strict=True):
            if weight > 0:
                member.prepare(device, accelerator)

    def release(self, student: nn.Module) -> None:
        for member in self.members:
            member.release(student)

    def for_student(self, student: nn.Module, *, over_tokens: bool) -> SeveralTeachers:
        """Itself, or one with another teacher where a teacher is the student's base."""
        members = [member.for_student(student, over_tokens=over_tokens) for member in self.members]
        same = all(one is other for one, other in zip(members, self.members, strict=True))
        return self if same else SeveralTeachers(members, self.weights, self.names or None)

    def compare_classes(
        self, student: nn.Module, task: Task | None, *, remap: bool, compare: Callable[..., Classes] = match_classes
    ) -> Classes | None:
        """None: each teacher is compared by itself."""
        return None

    def check_objective(self, divergence: str, temperatures: Sequence[float], standardize: bool = False) -> None:
        """Raises ValueError where the loss needs logits, of which a mixture has none, or a cache holds few classes."""
        because = "a mixture of teachers has probabilities and no logits"
        if standardize:
            fix = "Leave it out, or train with one teacher."
            fail("kd_standardize_logits", True, "False with several teachers", fix, because=because)
        if DIVERGENCES[divergence].of_logits:
            fix = "Set it to forward_kl, or train with one teacher."
            fail("kd_divergence", repr(divergence), "a divergence of probabilities", fix, because=because)
        for index, member in enumerate(self.members):
            kept = None if member.manifest is None else member.manifest["format"]
            if kept in ("topk", "sampled"):
                because = "a mixture needs every class of each teacher"
                fix = "Build that cache with the format logits or hidden."
                expected = "a cache of format logits or hidden"
                fail(f"teacher_model[{index}]", f"a cache of format {kept}", expected, fix, because=because)

    def output(
        self,
        batch: Mapping[str, Any],
        accelerator: Any,
        student: nn.Module | None = None,
        *,
        read: Callable[[Any, str], Tensor],
        task: Task | None = None,
        temperature: float = 1.0,
    ) -> TeacherOutput | None:
        """The logits of the mixture, for a loss of this temperature."""
        assert task is not None
        shares = self.routes.of_rows(batch)
        mixture = Mixture(task, temperature, batch, self.classes)
        for index, member in enumerate(self.members):
            rows: list[int] | None = None
            weights: float | list[float] = self.weights[index]
            if shares is not None:
                rows = [row for row, share in enumerate(shares) if index in share]
                weights = [shares[row][index] for row in rows]
                rows = None if len(rows) == len(shares) else rows
            if self.weights[index] == 0 or (rows == [] and not _needs_every_process(member, accelerator)):
                continue
            with naming(index):
                given, cut = columns_of(batch, index), False
                if rows is not None and _can_be_cut(member, given, len(shares or ())):
                    # Without rows of its own this process takes one, for the others that wait in the forward.
                    given, cut = _rows_of(given, rows or [0], len(shares or ())), True
                output = member.output(given, accelerator, student, read=read, task=task, temperature=temperature)
                if output is None:
                    return None
                if rows == []:
                    continue
                order = self.class_orders[index]
                logits: Any = (output if order is None else output.reordered(order)).as_logits(accelerator)
                del output  # one teacher's logits at a time
                mixture.add(logits if rows is None or cut else logits[rows], weights, rows)
                del logits
        return TeacherOutput(logits=mixture.logits())

    @contextmanager
    def hidden(
        self, batch: Mapping[str, Any], accelerator: Any, student: nn.Module | None, *, temperature: float
    ) -> Iterator[TeacherOutput | None]:
        """Without logits, which the loss mixes piece by piece; None where `heads` or the rows do not allow it.

        The weights of the output heads are whole inside the context.
        """
        if self.heads is None or batch.get(TEACHER_ID) is not None:
            yield None
            return
        with ExitStack() as stack:
            parts: list[Any] = []
            for index, (member, weight, head) in enumerate(zip(self.members, self.weights, self.heads, strict=True)):
                if head is None or member.live is None:
                    continue  # it is never run
                given = columns_of(batch, index)
                with naming(index):
                    hidden = teacher_hidden(partial(member.live.outputs, given, accelerator, student), head)
                    hidden = member.live.behind_front(hidden, given)
                if parts and hidden.shape[:-1] != parts[0][0].shape[:-1]:
                    raise UnsupportedHead("the teachers give hidden states for different positions")
                side = teacher_side(head, *stack.enter_context(whole_weight(head)), hidden)
                matrix, bias = (
                    None if x is None else x[: self.classes] for x in (side["teacher_weight"], side["teacher_bias"])
                )
                parts.append((hidden, OutputProjection(cast(Any, matrix), bias, head.scale, head.softcap), weight))
            yield TeacherOutput(mixed=MixedLogits(tuple(parts), temperature))


class Routes:
    """Which teachers a row has, by its `teacher_id`.

    Args:
        weights: of each teacher; names: of each, or empty.
    """

    def __init__(self, weights: Sequence[float], names: Sequence[str]) -> None:
        self.weights, self.names = weights, names

    def of_rows(self, batch: Mapping[str, Any]) -> list[dict[int, float]] | None:
        """Of each row, the weights of its teachers; None where no column routes the rows."""
        ids = batch.get(TEACHER_ID)
        if ids is None:
            return None
        values = ids.reshape(-1).tolist() if isinstance(ids, Tensor) else list(ids)
        return [self.of_row(self._decoded(each), row) for row, each in enumerate(values)]

    def of_row(self, given: Any, row: int) -> dict[int, float]:
        """The teachers of a row and their weights, which add up to 1.

        Args:
            given: a name, or the number of a teacher.

        Raises:
            ValueError: there is no such teacher, or its weight is 0.
        """
        chosen = []
        if isinstance(given, str):
            chosen = [i for i, name in enumerate(self.names) if name == given]
        elif isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(self.weights):
            chosen = [given]
        total = math.fsum(self.weights[i] for i in chosen)
        if not total > 0:
            shown, fix = f"{quoted(given)} in row {row} of the batch", "Correct the column, or teacher_weights."
            if chosen:
                fail(TEACHER_ID, shown, "a teacher with a weight above 0", fix)
            names = "".join(f", {name!r}" for name in dict.fromkeys(self.names))
            fix = (nearest(given, self.names) if isinstance(given, str) else "") or "Correct the column."
            fail(TEACHER_ID, shown, f"one of 0 to {len(self.weights) - 1}{names}, the teachers", fix)
        return {i: self.weights[i] / total for i in chosen if self.weights[i] > 0}

    def code(self, given: Any, row: int) -> int:
        """A `teacher_id` of a row as the number that stands in a batch."""
        given = given.item() if hasattr(given, "item") else given
        self.of_row(given, row)
        return _NAMED + self.names.index(given) if isinstance(given, str) else given

    def _decoded(self, given: Any) -> Any:
        named = given - _NAMED if isinstance(given, int) else -1
        return self.names[named] if 0 <= named < len(self.names) else given


class RoutedCollator:
    """Runs the script's collator without the column `teacher_id`, and adds the column to the batch as numbers.

    Raises:
        ValueError: there is no such teacher; the message has the row.
    """

    def __init__(self, collator: Callable[[Any], Any], routes: Routes) -> None:
        self.collator, self.routes = collator, routes

    def __call__(self, features: Any) -> Any:
        rows = features if isinstance(features, list) else []
        if not rows or not all(isinstance(row, Mapping) and TEACHER_ID in row for row in rows):
            return self.collator(features)
        ids = [self.routes.code(row[TEACHER_ID], number) for number, row in enumerate(rows)]
        batch = self.collator([{k: v for k, v in row.items() if k != TEACHER_ID} for row in rows])
        batch[TEACHER_ID] = torch.tensor(ids)
        return batch


def routed(collator: Callable[[Any], Any], teacher: Teacher | None) -> Callable[[Any], Any]:
    """The script's collator, around which `teacher_id` is read where there are several teachers."""
    return RoutedCollator(collator, teacher.routes) if isinstance(teacher, SeveralTeachers) else collator


def labels_of(teacher: Teacher | None) -> list[str]:
    """Of each of several teachers, number, name and weight; [""] of a single one."""
    return teacher.labels if isinstance(teacher, SeveralTeachers) else [""]


def mixed_hidden(
    teacher: Teacher, batch: Mapping[str, Any], accelerator: Any, student: nn.Module | None, temperature: float
) -> AbstractContextManager[TeacherOutput | None]:
    """`SeveralTeachers.hidden`; None of another teacher."""
    if not isinstance(teacher, SeveralTeachers):
        return nullcontext()
    return teacher.hidden(batch, accelerator, student, temperature=temperature)


class Mixture:
    """The running mixture of teachers over the rows of a batch.

    Args:
        task: its `distributions` are mixed, or its numbers.
        temperature: of the loss.
        batch: of all rows.
        classes: the first classes of each teacher that are mixed; None: all.
    """

    def __init__(self, task: Task, temperature: float, batch: Mapping[str, Any], classes: int | None) -> None:
        self._task, self._temperature, self._batch, self._classes = task, temperature, batch, classes
        self._sum: Tensor | None = None  # log-probabilities [N, V], or the mean of numbers
        self._shape: tuple[int, ...] = ()

    @torch.no_grad()
    def add(self, logits: Tensor, weights: float | Sequence[float], rows: Sequence[int] | None = None) -> None:
        """Adds a teacher.

        Args:
            logits: of the rows.
            weights: of the teacher in each of the rows, or in all.
            rows: of the batch; None: all.
        """
        count = len(logits) if rows is None else len(self._batch[TEACHER_ID])
        probable = self._task.mixed_as == "probabilities"
        if probable:
            batch = self._batch if rows is None else _rows_of(self._batch, rows, count)
            logits = self._task.distributions(logits, batch)
        elif logits.dim() > 2:
            shown, because = "one whose outputs hold a variance", "the mean of variances is none of the mixture"
            fail("teacher_model", shown, "teachers of numbers alone", "Leave the variance out.", because=because)
        classes = logits.shape[-1] if self._classes is None else self._classes
        shape, flat = (count, *logits.shape[1:-1], classes), logits.flatten(0, -2)[:, :classes]
        positions = flat.shape[0] // max(len(logits), 1)
        if self._sum is None:
            wide, fill = torch.promote_types(logits.dtype, torch.float32), -math.inf if probable else 0.0
            self._shape = shape
            self._sum = torch.full((count * positions, classes), fill, dtype=wide, device=logits.device)
        elif shape != self._shape:
            shown, fix = f"giving logits of shape {tuple(logits.shape)}", "Take teachers with the same classes."
            because = "class i of one must mean class i of the other"
            fail("teacher_model", shown, f"{self._shape} as the teachers before it", fix, because=because)
        held = self._sum
        share = torch.as_tensor(weights, dtype=held.dtype, device=held.device).expand(len(logits))
        share = share.repeat_interleave(positions).unsqueeze(1)
        places = None
        if rows is not None:
            start = torch.tensor(rows, device=held.device).unsqueeze(1) * positions
            places = (start + torch.arange(positions, device=held.device)).flatten()
        step = max(1, _AT_ONCE // classes)
        for first in range(0, len(flat), step):
            these = slice(first, first + step)
            place: Any = these if places is None else places[these]
            part, before = flat[these].to(held.device, held.dtype), held[place]
            if probable:
                part = torch.log_softmax(part / self._temperature, -1).add_(share[these].log())
                held[place] = torch.logaddexp(before, part)
            else:
                held[place] = before + part * share[these]

    def logits(self) -> Tensor:
        """[B, ...], as the task has its logits."""
        assert self._sum is not None
        mixed = self._sum.view(self._shape)
        if self._task.mixed_as != "probabilities":
            return mixed
        return self._task.of_distributions(mixed.mul_(self._temperature))


@contextmanager
def naming(index: int | None) -> Iterator[None]:
    """An error about `teacher_model` inside names the one of several: `teacher_model[1]`; None: there is one."""
    try:
        yield
    except (ValueError, TypeError) as error:
        text = error.args[0] if error.args else None
        if index is None or not isinstance(text, Message) or not text.startswith("`teacher_model`"):
            raise
        named = Message(text.replace("`teacher_model`", f"`teacher_model[{index}]`", 1))
        named.fix = text.fix
        raise type(error)(named) from error.__cause__


def columns_of(batch: Mapping[str, Any], index: int | None) -> dict[str, Any]:
    """The batch as one of several teachers reads it: without the columns of the others' caches and `teacher_id`."""
    if index is None:
        return dict(batch)
    cached = cache_prefix(index)
    kept = {k: v for k, v in batch.items() if not (k.startswith(COLUMN_PREFIX) or k == TEACHER_ID)}
    return kept | {COLUMN_PREFIX + k[len(cached) :]: v for k, v in batch.items() if k.startswith(cached)}


def cache_prefix(index: int) -> str:
    """Of the columns that hold the outputs of one of several caches."""
    return f"{COLUMN_PREFIX}{index}_"


def _rows_of(batch: Mapping[str, Any], rows: Sequence[int], count: int) -> dict[str, Any]:
    """The batch cut down to some of its `count` rows; what is not a tensor with as many is left as it is."""
    index = list(rows)
    return {k: v[index] if isinstance(v, Tensor) and v.shape[:1] == (count,) else v for k, v in batch.items()}


def _can_be_cut(member: Teacher, batch: Mapping[str, Any], count: int) -> bool:
    """Whether all that the teacher reads is a tensor with a row for each row of the batch."""
    if member.live is None:
        return False
    tensors = [value for value in member.live.inputs(batch).values() if isinstance(value, Tensor)]
    return all(tensor.shape[:1] == (count,) for tensor in tensors)


def _needs_every_process(member: Teacher, accelerator: Any) -> bool:
    """Whether the other processes wait for this one in the teacher's forward."""
    live = member.live
    if live is None or getattr(accelerator, "num_processes", 1) == 1:
        return False
    return live.sharded or live.is_student
