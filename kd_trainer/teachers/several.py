"""`SeveralTeachers`: a mixture of teachers in probability space, and rows that a column routes to some of them.

    log p = logsumexp over teachers k of (log w_k + log p_k),    p_k = softmax(z_k / T)

Its logits are T * log p, so that softmax(logits / T) = p in every loss. The mean of the logits would be a product of
experts. The teachers run one after another: the running mixture and the logits of one teacher are in memory, or, in the
fused loss, the hidden states of all and the logits of a few positions.
Letters: B rows, N positions, V classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..losses import DIVERGENCES, MixedLogits, MixedPart, OutputProjection
from ..tasks import TEACHER_ID, OutputHead, Task, UnsupportedHead, teacher_hidden, teacher_side, whole_weight
from ..validation import Message, fail, quoted
from .compatibility import Classes, match_classes
from .live import LiveTeacher
from .outputs import COLUMN_PREFIX, TeacherOutput
from .routes import RoutedCollator, Routes
from .teacher import Teacher

_AT_ONCE = 2**22  # numbers that are added to the mixture at once: the memory beside it and a teacher's logits


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
        self.routes: Routes | None = Routes(self.weights, self.names)
        self.compiled = any(member.compiled for member in self.members)
        self.class_orders: list[Tensor | None] = [None] * count
        self.classes: int | None = None
        self.heads: list[OutputHead | None] | None = None

    # ---- what it is ----

    @property
    def sharded(self) -> bool:
        """Whether the weights of one lie on several processes, all of which each forward needs."""
        return any(member.live is not None and member.live.sharded for member in self.members)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of the batch those read that are run, and `teacher_id`."""
        read = {TEACHER_ID: batch[TEACHER_ID]} if TEACHER_ID in batch else {}
        for index, member in enumerate(self.members):
            read |= {} if member.live is None else member.live.inputs(columns_of(batch, index))
        return read

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
        check_mixed(divergence, standardize)
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
        compared: bool = False,
    ) -> TeacherOutput | None:
        """The logits of the mixture, for a loss of this temperature.

        Args:
            compared: whether the top classes of each teacher are needed too.
        """
        assert task is not None
        mixture = Mixture(task, temperature, batch, self.classes, len(self.members) if compared else 0)
        for run in self._runs(batch, accelerator):
            with naming(run.number):
                given: dict[str, Any] = {"read": read, "task": task, "temperature": temperature}
                output = run.member.output(run.batch, accelerator, student, **given)
                if output is None:
                    return None
                if run.rows == []:
                    continue
                order = self.class_orders[run.number]
                logits: Any = (output if order is None else output.reordered(order)).as_logits(accelerator)
                del output  # one teacher's logits at a time
                mixture.add(run.own(logits), run.weights, run.rows, run.number)
                del logits
        counts = self._counts(accelerator) if mixture.tops is not None else None
        return TeacherOutput(logits=mixture.logits(), tops=mixture.tops, counts=counts)

    @contextmanager
    def hidden(
        self,
        batch: Mapping[str, Any],
        accelerator: Any,
        student: nn.Module | None,
        *,
        temperature: float,
        compared: bool = False,
    ) -> Iterator[TeacherOutput | None]:
        """Without logits, which the loss mixes piece by piece; None where `heads` do not allow it.

        The weights of the output heads are whole inside the context.
        """
        if self.heads is None:
            yield None
            return
        with ExitStack() as stack:
            parts: list[MixedPart] = []
            for run in self._runs(batch, accelerator):
                head, live = cast(OutputHead, self.heads[run.number]), cast(LiveTeacher, run.member.live)
                with naming(run.number):
                    hidden = teacher_hidden(partial(live.outputs, run.batch, accelerator, student), head)
                    hidden = live.behind_front(hidden, run.batch)
                side = teacher_side(head, *stack.enter_context(whole_weight(head)), hidden)
                if run.rows == []:
                    continue
                hidden, weights = run.placed(hidden)
                if parts and hidden.shape[:-1] != parts[0].hidden.shape[:-1]:
                    raise UnsupportedHead("the teachers give hidden states for different positions")
                matrix, bias = (
                    None if x is None else x[: self.classes] for x in (side["teacher_weight"], side["teacher_bias"])
                )
                projection = OutputProjection(cast(Any, matrix), bias, head.scale, head.softcap)
                parts.append(MixedPart(hidden, projection, weights, run.number))
            counts = self._counts(accelerator) if compared else None
            yield TeacherOutput(mixed=MixedLogits(tuple(parts), temperature, counts), counts=counts)

    def _counts(self, accelerator: Any) -> Tensor:
        return torch.zeros(len(self.members), 2, device=accelerator.device)

    def _runs(self, batch: Mapping[str, Any], accelerator: Any) -> Iterator[_Run]:
        """What each teacher is run on, in order; those that have no row here are left out where no process waits."""
        shares = cast(Routes, self.routes).of_rows(batch)
        for index, (member, weight) in enumerate(zip(self.members, self.weights, strict=True)):
            if weight == 0:
                continue
            given = columns_of(batch, index)
            if shares is None:
                yield _Run(index, member, given, weight)
                continue
            rows = [row for row, share in enumerate(shares) if index in share]
            if rows == [] and not _needs_every_process(member, accelerator):
                continue
            run = _Run(index, member, given, weight, len(shares))
            if len(rows) < len(shares):
                cut = _can_be_cut(member, given, len(shares))
                # Without rows of its own this process takes one, for the others that wait in the forward.
                given = _rows_of(given, rows or [0], len(shares)) if cut else given
                run = run._replace(batch=given, rows=rows, cut=cut)
            yield run._replace(weights=[shares[row][index] for row in rows])


class _Run(NamedTuple):
    """A teacher with what it is run on."""

    number: int  # of the teacher
    member: Teacher
    batch: Mapping[str, Any]
    weights: float | list[float]  # of it in its rows
    total: int = 0  # of the rows of the whole batch, where they are routed
    rows: list[int] | None = None  # its own; None: all
    cut: bool = False  # whether it is run on these alone

    def own(self, outputs: Tensor) -> Tensor:
        """Of its outputs those of its rows."""
        return outputs if self.rows is None or self.cut else outputs[self.rows]

    def placed(self, hidden: Tensor) -> tuple[Tensor, float | Tensor]:
        """Hidden states for all rows of the batch, and the weight of the teacher at each position."""
        if not isinstance(self.weights, list):
            return hidden, self.weights
        places: Any = slice(None) if self.rows is None else self.rows
        if self.cut:
            whole = hidden.new_zeros(self.total, *hidden.shape[1:])
            whole[places], hidden = hidden, whole
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = torch.zeros(self.total, dtype=wide, device=hidden.device)
        weights[places] = torch.tensor(self.weights, dtype=wide, device=hidden.device)
        return hidden, weights.view(-1, *[1] * (hidden.dim() - 2)).expand(hidden.shape[:-1])


def routed(collator: Callable[[Any], Any], teacher: Teacher | None) -> Callable[[Any], Any]:
    """The script's collator, around which `teacher_id` is read where there are several teachers."""
    return collator if teacher is None or teacher.routes is None else RoutedCollator(collator, teacher.routes)


def check_mixed(divergence: str, standardize: bool) -> None:
    """Raises ValueError where the loss needs logits, of which a mixture has none."""
    because = "a mixture of teachers has probabilities and no logits"
    if standardize:
        fix = "Leave it out, or train with one teacher."
        fail("kd_standardize_logits", True, "False with several teachers", fix, because=because)
    if DIVERGENCES[divergence].of_logits:
        fix = "Set it to forward_kl, or train with one teacher."
        fail("kd_divergence", repr(divergence), "a divergence of probabilities", fix, because=because)


def labels_of(teacher: Teacher | None) -> list[str]:
    """Of each of several teachers, number, name and weight; [""] of a single one."""
    return teacher.labels if isinstance(teacher, SeveralTeachers) else [""]


def mixed_hidden(
    teacher: Teacher, batch: Mapping[str, Any], accelerator: Any, student: nn.Module | None, **options: Any
) -> AbstractContextManager[TeacherOutput | None]:
    """`SeveralTeachers.hidden`; None of another teacher."""
    if not isinstance(teacher, SeveralTeachers):
        return nullcontext()
    return teacher.hidden(batch, accelerator, student, **options)


def keys_of(teacher: Teacher | None) -> list[str]:
    """Of each of several teachers, what stands at the end of its logged names: its name in `teacher_names`, or its
    number; names that are not distinct have the number behind them. [] of a single one."""
    if not isinstance(teacher, SeveralTeachers):
        return []
    numbers = [str(index) for index in range(len(teacher.members))]
    names = [re.sub(r"[^A-Za-z0-9_.-]", "_", name) for name in teacher.names] or numbers
    return names if len(set(names)) == len(names) else [f"{a}_{b}" for a, b in zip(names, numbers, strict=True)]


class Mixture:
    """The running mixture of teachers over the rows of a batch.

    Args:
        task: its `distributions` are mixed, or its numbers.
        temperature: of the loss.
        batch: of all rows.
        classes: the first classes of each teacher that are mixed; None: all.
        compared: how many teachers have their `tops` kept.

    Attributes:
        tops: see `TeacherOutput`; None where none are kept, or numbers are mixed.
    """

    def __init__(
        self, task: Task, temperature: float, batch: Mapping[str, Any], classes: int | None, compared: int = 0
    ) -> None:
        self._task, self._temperature, self._batch, self._classes = task, temperature, batch, classes
        self._compared, self.tops = compared, cast("Tensor | None", None)
        self._sum: Tensor | None = None  # log-probabilities [N, V], or the mean of numbers
        self._shape: tuple[int, ...] = ()

    @torch.no_grad()
    def add(
        self, logits: Tensor, weights: float | Sequence[float], rows: Sequence[int] | None = None, index: int = 0
    ) -> None:
        """Adds a teacher.

        Args:
            logits: of the rows.
            weights: of the teacher in each of the rows, or in all.
            rows: of the batch; None: all.
            index: of the teacher.
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
        if self._compared and probable:
            if self.tops is None:
                self.tops = torch.full((*shape[:-1], self._compared), -1, device=logits.device)
            self.tops[slice(None) if rows is None else list(rows), ..., index] = (
                flat.argmax(-1).view(len(logits), *shape[1:-1]).to(self.tops.device)
            )
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
