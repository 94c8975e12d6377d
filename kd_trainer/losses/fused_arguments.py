"""The arguments of the fused loss, checked, cut down to the counted positions and cast as autocast would.

For: `fused_linear.py`, which computes it. Letters: N positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..validation import check_number, check_temperature, check_tensor, fail
from .checks import check_class_ids, check_standardized
from .divergences import DIVERGENCES, check_divergence
from .projection import AnyMixture, KnownMixture, MixedLogits, OutputProjection, cast_as_autocast
from .reductions import IGNORE_INDEX, divide
from .sparse_targets import Samples, TopK, check_sparse
from .tile_sparse import MOST_IDS
from .tile_types import Setting

# Rows of a chunk: as many as fit in a tile of these bytes (each product reads all of a weight again), at least 256 (or
# the products lose speed: 7% at 128), unless the tile is then larger than the second number.
_TILE_BYTES, _LARGEST_TILE_BYTES = 48 * 2**20, 160 * 2**20
CHUNK_ROWS = 256
_MIXTURES = (MixedLogits, KnownMixture)
GROUP_BYTES = 256 * 2**20  # half precision: gradient rows kept for one product with the hidden states


@dataclass(frozen=True, kw_only=True)
class FusedInputs:
    """The arguments of `fused_linear_distillation`, where they are explained."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    labels: Tensor | None
    alpha: float
    temperature: float
    divergence: str
    beta: float | None
    standardize_logits: bool
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    student_scale: float
    teacher_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    soft_mask: Tensor | None
    soft_count: float | Tensor | None
    hard_count: float | Tensor | None
    factor: float
    label_smoothing: float
    common_ids: int | None
    teacher_logits: Tensor | AnyMixture | None
    teacher_top_k: tuple[Tensor, Tensor, Tensor] | None
    teacher_samples: tuple[Tensor, Tensor, Tensor] | None
    overlap_ids: int | None
    overlap_temperature: float
    marked: Tensor | None
    chunk_rows: int | None
    compiled: bool | None


@dataclass
class Job:
    """Everything but the student's tensors; rows are the N counted positions, those of the soft loss first."""

    setting: Setting
    student: OutputProjection
    teacher: OutputProjection | None
    teacher_rows: Any  # of the soft rows: hidden states, or logits where `teacher` is None; None with `sparse`
    sparse: TopK | Samples | None  # of the soft rows; ids int64, in range
    labels: Tensor | None
    soft_rows: int  # how many of the rows are counted for the soft loss
    alpha: float
    soft_weight: Any  # factor / soft_count, factor / hard_count: numbers or 0-dim tensors
    hard_weight: Any
    label_smoothing: float
    common_ids: int | None
    overlap_ids: int | None
    overlap_temperature: float
    marked: Tensor | None
    chunk_rows: int
    compiled: bool | None
    plain_rows: bool = False

    def __post_init__(self) -> None:
        """Sets `plain_rows`: whether the rows need whole logits, by autograd from the head's output on."""
        capped = any(side is not None and side.softcap is not None for side in (self.student, self.teacher))
        capped = capped or self.label_smoothing > 0 or self.common_ids is not None
        capped = capped or (self.sparse is not None and self.sparse.ids.shape[1] > MOST_IDS)
        rows = self.teacher.bias if self.teacher is not None else self.teacher_rows
        excluding = [self.student.bias, *(rows.may_exclude if isinstance(rows, _MIXTURES) else [rows])]
        known = [excludes(x) for x in excluding if x is not None]
        self.plain_rows = capped or any(known)
        if None in known and self.sparse is None:
            self.setting = self.setting._replace(excluding=True)

    def sparse_rows(self, rows: slice) -> TopK | Samples | None:
        """The rows of `sparse`."""
        return None if self.sparse is None else type(self.sparse)(*(x[rows] for x in self.sparse))

    def dense_rows(self, rows: slice, student: Tensor) -> Any:
        """The rows of `teacher_rows`; None with `sparse`.

        Args:
            student: the student's logits of these rows, which the tops of several teachers are compared with.
        """
        if not isinstance(self.teacher_rows, _MIXTURES):
            return None if self.teacher_rows is None else self.teacher_rows[rows]
        return self.teacher_rows.of_rows(rows, student[:, : self.common_ids])

    def with_marked(self, losses: Any, rows: slice) -> Any:
        """The losses of some rows, and behind them which of the marked ones agree, where rows are marked."""
        return losses if self.marked is None else (*losses, losses[2] & self.marked[rows])

    def measured(self, sums: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What is asked for beside the losses: the sums of the overlap and of the marked rows that agree."""
        overlap = sums[0] if self.overlap_ids is not None else None
        return overlap, None if self.marked is None else sums[-1]

    @property
    def columns(self) -> int:
        """Sums of the rows: soft, hard, agreement, and what else is asked for."""
        return 3 + (self.overlap_ids is not None) + (self.marked is not None)

    def unit(self) -> Any:
        """The larger of the two weights a position can have."""
        weights = [self.alpha * self.soft_weight, (1 - self.alpha) * self.hard_weight]
        if not any(isinstance(w, Tensor) for w in weights):
            return max(weights)
        device = self.student.weight.device
        return torch.stack([torch.as_tensor(w, dtype=torch.float32, device=device) for w in weights]).max()

    def row_weights(self, n: int, unit: Any) -> Tensor:
        """[N, 2]: what a position's D(p, q) and hard loss weigh in the gradient at the head's output, over `unit`."""
        weight, scale = self.student.weight, self.student.scale
        weights = torch.zeros(n, 2, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        # T^2 of the loss, 1/T of the logits that the divergence sees.
        weights[:, 0] = self.alpha * self.soft_weight * self.setting.temperature * scale
        weights[self.soft_rows :, 0] = 0
        if self.labels is not None:
            weights[:, 1] = (1 - self.alpha) * self.hard_weight * scale
            weights[:, 1] *= self.labels != IGNORE_INDEX
        return weights / unit


def read(given: FusedInputs) -> tuple[Job, Tensor, Tensor, Tensor | None]:
    """Checks; selects the counted positions; casts as autocast would. Job, hidden, weight and bias of the student."""
    g = given
    _check_numbers(g)
    beta = check_divergence(g.divergence, g.beta)
    _check_shapes(g)
    labels, mask = g.labels, g.soft_mask
    labelled = None if labels is None else labels != IGNORE_INDEX
    soft = labelled if mask is None else mask != 0
    order, soft_rows = _counted_rows(len(g.student_hidden), soft, labelled)
    soft_weight = g.factor * _one_over(g.soft_count, soft, g.student_hidden)
    hard_weight = g.factor * _one_over(g.hard_count, labelled, g.student_hidden)

    select = functools.partial(_rows_of, order)
    of_teacher = functools.partial(_rows_of, None if order is None else order[:soft_rows])
    labels = select(labels)
    hidden = cast_as_autocast(select(g.student_hidden))
    weight, bias = cast_as_autocast(g.student_weight), cast_as_autocast(g.student_bias)
    teacher_hidden = cast_as_autocast(of_teacher(g.teacher_hidden))
    teacher_weight, teacher_bias = cast_as_autocast(g.teacher_weight), cast_as_autocast(g.teacher_bias)
    assert hidden is not None
    assert weight is not None
    teacher = None
    common = g.common_ids
    if teacher_weight is not None and common is not None:
        teacher_weight, teacher_bias = teacher_weight[:common], None if teacher_bias is None else teacher_bias[:common]
        common = None if common == weight.shape[0] else common
    if teacher_weight is not None:
        teacher = OutputProjection(teacher_weight.detach(), _detached(teacher_bias), g.teacher_scale, g.teacher_softcap)
    teacher_rows: Any
    if isinstance(g.teacher_logits, _MIXTURES):
        teacher_rows = g.teacher_logits.cast().each(cast(Any, of_teacher))
    else:
        teacher_rows = _detached(of_teacher(g.teacher_logits) if teacher_hidden is None else teacher_hidden)
    sparse = _sparse(g, of_teacher)
    temperature = DIVERGENCES[g.divergence].temperature(float(g.temperature))
    setting = Setting(g.divergence, beta, temperature, labels is not None, g.standardize_logits)
    side = OutputProjection(weight.detach(), _detached(bias), g.student_scale, g.student_softcap)
    job = Job(
        setting,
        side,
        teacher,
        teacher_rows,
        sparse,
        labels,
        soft_rows,
        g.alpha,
        soft_weight,
        hard_weight,
        g.label_smoothing,
        common,
        g.overlap_ids,
        g.overlap_temperature,
        select(g.marked),
        g.chunk_rows or chunk_rows(len(weight), weight.element_size(), on_cpu=weight.device.type == "cpu"),
        g.compiled,
    )
    return job, hidden, weight, bias


def _counted_rows(rows: int, soft: Tensor | None, labelled: Tensor | None) -> tuple[Tensor | None, int]:
    """Indices of the counted rows, those of the soft loss first, and how many these are; None: all rows as they are."""
    if soft is None:
        return None, rows
    order = soft.nonzero().squeeze(1)
    count = len(order)
    if labelled is not None and labelled is not soft:
        order = torch.cat((order, (labelled & ~soft).nonzero().squeeze(1)))
    return (None if count == rows else order), count


def _rows_of(order: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or order is None else tensor.index_select(0, order)


def _sparse(g: FusedInputs, select: Callable[[Tensor | None], Tensor | None]) -> TopK | Samples | None:
    """The rows of a teacher given sparsely that the soft loss counts."""
    name = "teacher_top_k" if g.teacher_top_k is not None else "teacher_samples"
    if getattr(g, name) is None:
        return None
    ids, second, third = (
        cast(Tensor, select(x.detach() if x.is_floating_point() else x.long())) for x in getattr(g, name)
    )
    vocabulary = g.common_ids or g.student_weight.shape[0]
    _check_range(name, ids, vocabulary, or_none=False)
    if name == "teacher_top_k":
        return TopK(ids, second, third)
    _check_range(name, second, vocabulary, or_none=False)
    return Samples(ids, second, third)


def _one_over(given: float | Tensor | None, mask: Tensor | None, hidden: Tensor) -> float | Tensor:
    """1 / a denominator: the given one, or the number of counted positions."""
    if given is None:
        given = hidden.shape[0] if mask is None else mask.sum()
    wide = torch.float32 if hidden.device.type == "mps" else torch.float64
    return divide(1.0, given) if not isinstance(given, Tensor) else divide(given.new_ones((), dtype=wide), given)


def excludes(tensor: Tensor) -> bool | None:
    """Whether classes are excluded by logits of -inf, which the kernels in C do not expect; None: unknown, on
    accelerators, where looking would wait for the device."""
    return bool(tensor.isneginf().any()) if tensor.device.type == "cpu" else None


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def chunk_rows(vocabulary: int, itemsize: int, *, on_cpu: bool) -> int:
    """Positions of a tile, whose logits take `itemsize` bytes each."""
    row = vocabulary * itemsize
    if not on_cpu:
        return max(1, GROUP_BYTES // row)
    return max(1, min(max(CHUNK_ROWS, _TILE_BYTES // row), _LARGEST_TILE_BYTES // row))


def group_rows(positions: int, chunk: int, vocabulary: int, width: int, itemsize: int) -> int:
    """Positions whose gradients are multiplied on at once: a chunk, or in half precision as many chunks as pay.

    There the weight's gradient is best made in one product: a float32 sum would be updated once for each chunk.
    """
    if itemsize != 2:
        return chunk
    most = min(2 * width, GROUP_BYTES // (vocabulary * itemsize))
    return min(positions, max(chunk, most // chunk * chunk))


def _check_numbers(g: FusedInputs) -> None:
    check_number("alpha", g.alpha, low=0, high=1)
    check_temperature("temperature", g.temperature)
    check_number("factor", g.factor, low=0, open_low=True)
    check_number("label_smoothing", g.label_smoothing, low=0, high=1)
    for name in ("student_softcap", "teacher_softcap"):
        if getattr(g, name) is not None:
            check_number(name, getattr(g, name), low=0, open_low=True)
    for name in ("student_scale", "teacher_scale"):
        check_number(name, getattr(g, name), low=0, open_low=True)
    if g.chunk_rows is not None and (not isinstance(g.chunk_rows, int) or g.chunk_rows < 1):
        fail(
            "chunk_rows",
            repr(g.chunk_rows),
            "a whole number of positions, at least 1",
            "Leave it out for the default.",
        )


def _check_types(g: FusedInputs) -> None:
    for name in ("labels", "soft_mask", "marked", "student_bias", "teacher_bias", "teacher_logits"):
        if getattr(g, name) is not None and not isinstance(getattr(g, name), _MIXTURES):
            check_tensor(name, getattr(g, name))
    for name in ("soft_count", "hard_count"):
        if getattr(g, name) is not None and not isinstance(getattr(g, name), Tensor):
            check_number(name, getattr(g, name), low=0)
    common = g.common_ids
    if common is not None and (isinstance(common, bool) or not isinstance(common, int)):
        fix = "Count the ids that both share."
        fail("common_ids", repr(common), "a whole number of ids, at least 1", fix, error=TypeError)


def _check_shapes(g: FusedInputs) -> None:
    _check_types(g)
    hidden, weight = g.student_hidden, g.student_weight
    _check_product("student", hidden, weight, g.student_bias)
    positions = hidden.shape[0]
    forms = {
        name: getattr(g, name) for name in ("teacher_hidden", "teacher_logits", "teacher_top_k", "teacher_samples")
    }
    given = [name for name, value in forms.items() if value is not None]
    expected = (
        "the teacher in one form: teacher_hidden with teacher_weight, teacher_logits, teacher_top_k or teacher_samples"
    )
    if len(given) != 1:
        shown = " and ".join(given[1:]) + " given as well" if given else "None, and no other form is given"
        fail("teacher_hidden", shown, expected, "Leave the others out.", error=TypeError)
    if (g.teacher_hidden is None) != (g.teacher_weight is None):
        fix = "Give both or neither."
        fail(
            "teacher_weight",
            "given alone" if given != ["teacher_hidden"] else "None",
            expected,
            fix,
            error=TypeError,
        )
    vocabulary, owner = weight.shape[0], given[0]
    if g.teacher_hidden is not None and g.teacher_weight is not None:
        _check_product("teacher", g.teacher_hidden, g.teacher_weight, g.teacher_bias)
        vocabulary, owner = g.teacher_weight.shape[0], "teacher_weight"
    elif g.teacher_logits is not None:
        vocabulary = g.teacher_logits.shape[-1]
    if g.common_ids is None and vocabulary != weight.shape[0]:
        shown = f"of {vocabulary} ids where the student has {weight.shape[0]}"
        fix = "If the first ids mean the same tokens in both, pass their number as common_ids."
        fail(owner, shown, "equal vocabularies", fix, because="they are compared id by id")
    if g.common_ids is not None and not 1 <= g.common_ids <= min(vocabulary, weight.shape[0]):
        expected = f"1 to {min(vocabulary, weight.shape[0])}, the smaller vocabulary"
        fail("common_ids", repr(g.common_ids), expected, "Count the ids that both share.")
    columns = {"labels": g.labels, "soft_mask": g.soft_mask, "marked": g.marked}
    if given[0] in ("teacher_top_k", "teacher_samples"):
        columns[given[0]] = _check_sparse(given[0], forms[given[0]], positions, g.common_ids or weight.shape[0])
        if given[0] == "teacher_samples" and g.divergence != "forward_kl":
            because = "their estimate is unbiased only where the loss is linear in the teacher's probabilities"
            fix = "Give teacher_top_k for the other divergences."
            fail("divergence", repr(g.divergence), "'forward_kl' with teacher_samples", fix, because=because)
        check_sparse(g.divergence)
        if g.overlap_ids is not None:
            because = "few ids at T hold no probabilities of all the student's"
            fix = "Give the teacher as logits or hidden states."
            fail("overlap_ids", g.overlap_ids, f"None with {given[0]}", fix, because=because)
        if g.standardize_logits:
            because = "log-probabilities at T hold no logits to standardise"
            fix = "Give the teacher as logits or hidden states."
            fail("standardize_logits", True, f"False with {given[0]}", fix, because=because)
    else:
        form = forms[given[0]]
        for rows in form.states if isinstance(form, _MIXTURES) else [form]:
            columns[given[0]] = rows[..., 0] if rows.dim() == 2 else rows
    for name, column in columns.items():
        if column is not None and tuple(column.shape) != (positions,):
            shown = f"of shape {list(column.shape)}"
            fail(name, shown, f"one row for each of the {positions} positions", "Flatten batch and sequence alike.")
    if g.labels is not None and g.labels.is_floating_point():
        fail("labels", f"of dtype {g.labels.dtype}", "integer ids", "Cast to int64.", error=TypeError)
    if DIVERGENCES[g.divergence].needs_labels:
        check_class_ids(g.labels, hidden.shape[:1])
    if g.standardize_logits:
        check_standardized(g.common_ids or weight.shape[0])
    _check_range("labels", g.labels, weight.shape[0])


def _check_sparse(name: str, given: Any, positions: int, vocabulary: int) -> Tensor:
    """Returns the last part, of one number a position."""
    samples = name == "teacher_samples"
    parts = "ids, the top and the entropy" if samples else "ids, log-probabilities and log of the tail's mass"
    if len(given) != 3:
        fail(name, f"a tuple of {len(given)}", parts, "Give all three.")
    ids, second, last = given
    if ids.dim() != 2 or ids.shape[0] != positions or second.shape != (ids.shape[:1] if samples else ids.shape):
        shown = f"of shapes {list(ids.shape)} and {list(second.shape)}"
        columns = f"[{positions}, n] and tops [{positions}]" if samples else f"and log-probabilities [{positions}, k]"
        fail(name, shown, f"ids {columns}", "Give one row a position.")
    if ids.is_floating_point() or ids.shape[1] < 1 or (samples and second.is_floating_point()):
        fail(name, f"with ids of {ids.dtype}, {ids.shape[1]} a row", "integer ids, at least one", "Cast to int64.")
    if not samples and ids.shape[1] > vocabulary:
        fix = "Keep at most as many as there are."
        fail(name, f"of {ids.shape[1]} ids a row", f"1 to {vocabulary} distinct ids", fix)
    return last


def _check_product(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for argument, tensor in ((f"{name}_hidden", hidden), (f"{name}_weight", weight)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            shown = f"of dtype {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            fail(argument, shown, "a floating tensor", "Pass the hidden states and the head's weight.", error=TypeError)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shown = f"of shape {list(hidden.shape)} with {name}_weight of shape {list(weight.shape)}"
        fail(f"{name}_hidden", shown, "[N, H] and [V, H]", "Flatten batch and sequence; give the head of this model.")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        fail(f"{name}_bias", f"of shape {list(bias.shape)}", f"[{weight.shape[0]}]", "Give the head's own bias.")


def _check_range(name: str, ids: Tensor | None, vocabulary: int, or_none: bool = True) -> None:
    """On CPU alone: elsewhere looking would wait for the device, whose own indexing raises."""
    if ids is None or ids.device.type != "cpu" or not ids.numel():
        return
    wrong = (ids < 0) | (ids >= vocabulary)
    wrong = wrong & (ids != IGNORE_INDEX) if or_none else wrong
    if wrong.any():
        expected = f"ids from 0 to {vocabulary - 1}" + (f", or {IGNORE_INDEX} for no label" if or_none else "")
        fail(name, f"a tensor that holds {int(ids[wrong][0])}", expected, "Take the ids of this vocabulary.")
