"""Task heads: which logits, which labels, which positions count, which shift, which hard loss.

For: the trainer, which knows no task. Leaves the soft loss to `losses.py` and the weighing to `objective.py`.
Shapes: B rows, S positions, C classes or vocabulary entries, D outputs of a regression; logits are [B, C] or [B, S, C].
Imports: checks, finite, inputs, logits, losses, reductions.

A new task is a new entry of `HEADS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import fail, message
from .inputs import begins_next, main_input, real_tokens, tells_sequences, token_mask
from .logits import Wanted, logits_of
from .losses import SoftTargetLoss
from .reductions import IGNORE_INDEX, divide, wrong_labels


class Fault(NamedTuple):
    """What in a batch makes a loss that is not finite, whatever the models give."""

    rows: Tensor  # bool [B], on the device
    argument: str
    found: str  # "`argument` is {found} in rows [..]"
    expected: str
    fix: str


@dataclass(frozen=True)
class Head:
    """How one kind of task is read.

    Args:
        name: its name in `HEADS` and in `kd_task`.
        token_level: logits are [B, S, C] and every position is a row of its own; else [B, C].
        shifted: the logits at position i are compared with the label at i + 1 (decoder-only language models).
        auto_classes: transformers' Auto classes whose models have this head; the first one loads a teacher by path.
        label_names: the columns of a batch that hold the targets.
        widths, at_least: likely numbers of classes and the least, where a model returns several tensors; see `Wanted`.
    """

    name: str
    token_level: bool
    shifted: bool
    auto_classes: tuple[str, ...]
    label_names: tuple[str, ...] = ("labels",)
    widths: tuple[int, ...] = field(default=(), compare=False)
    at_least: int = field(default=0, compare=False)

    softmax: ClassVar[bool] = True  # both losses are of one softmax over the classes and of integer labels
    a_label_a_logit: ClassVar[bool] = False  # labels are numbers, of the logits' shape
    tempered: ClassVar[bool] = True  # divergence and temperature mean something
    has_formula: ClassVar[bool] = True  # of the hard loss; else the model's own is the only one
    cacheable: ClassVar[bool] = True  # which positions count can be told from a batch alone

    @property
    def dims(self) -> int:
        """Dimensions of the logits."""
        return 3 if self.token_level else 2

    @property
    def over_tokens(self) -> bool:
        """Whether the classes are a vocabulary: token ids, of which embeddings may hold more rows than there are."""
        return self.name.endswith("_lm")

    def of_model(self, model: Any) -> Head:
        """The head as this student has it; most are the same for every one."""
        return self

    def with_label_names(self, names: Sequence[str], batch: Mapping[str, Any]) -> Head:
        """The head that reads its targets where they stand: `names` are the trainer's `label_names`.

        The usual columns win where `names` has them. Of other names the one counts that the batch holds; several, of
        which none is usual, leave the head without targets (the model's own loss may still read them).
        """
        if set(self.label_names) <= set(names):
            return self
        here = [name for name in names if batch.get(name) is not None] or list(names)
        if len(here) != len(self.label_names):
            return self
        return replace(self, label_names=tuple(here))

    def soft_term(self, divergence: str) -> str:
        """The soft loss by name, for the formula that is printed."""
        return divergence

    def logits(self, outputs: Any, argument: str) -> Tensor:
        """The logits in what a model returned; `argument` is "model" or "teacher_model", for the error."""
        return logits_of(outputs, argument, self.wanted)

    @functools.cached_property
    def wanted(self) -> Wanted:
        """What is known of the logits, to find them among a model's outputs."""
        return Wanted(self.dims, self.widths, max(self.at_least, 2 if self.softmax else 0))

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Labels aligned with the logits' positions ([B] or [B, S], `IGNORE_INDEX` where none), or None.

        `shift_labels` are used as they stand: whoever wrote them has already shifted.
        """
        if inputs.get("shift_labels") is not None:
            return _signed(inputs["shift_labels"])
        labels = inputs.get(self.label_names[0])
        if labels is None:
            return None
        if labels.is_floating_point():
            fail(
                self.label_names[0],
                f"of dtype {labels.dtype} and shape {tuple(labels.shape)}",
                f"integer class ids for the task {self.name!r}",
                "Cast the column to int64, or name the task of such labels: kd_task multi_label_classification or "
                "regression.",
                error=TypeError,
            )
        labels = _signed(labels)
        if not self.token_level:
            return labels if labels.dim() == 1 else labels.reshape(-1)
        return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if self.shifted else labels

    def attended(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Boolean [B, S]: positions whose prediction is about a real token; None when every position counts.

        A prediction made AT padding is not counted either, so that padding on the left changes nothing. An
        encoder-decoder without `decoder_attention_mask` has its decoder's padding in the labels alone.
        """
        if not self.token_level:
            return None
        if self.name == "seq2seq_lm":
            mask, targets = token_mask(inputs.get("decoder_attention_mask")), self.targets(inputs)
            return targets != IGNORE_INDEX if mask is None and targets is not None else mask
        tokens = self.sequences(inputs)
        mask = self._real(inputs, tokens.shape)
        if not self.shifted:
            return mask
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        counted = mask[..., 1:] & mask[..., :-1]
        return F.pad(counted & ~begins_next(inputs, mask), (0, 1), value=False)

    def _real(self, inputs: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
        """Boolean [B, S]: positions that are no padding; None where no mask says."""
        name = "decoder_attention_mask" if self.name == "seq2seq_lm" else "attention_mask"
        return real_tokens(inputs.get(name), shape)

    def made_at(self, inputs: Mapping[str, Any], targets: Tensor) -> Tensor | None:
        """Boolean [B, S]: positions whose prediction is made at a real token, of the sequence that it is about.

        None where nothing in the batch tells padding or sequences: then all are. `shift_labels` name what follows
        themselves, at the end of a sequence too.
        """
        mask = self._real(inputs, targets.shape)
        if not self.shifted or inputs.get("shift_labels") is not None or not tells_sequences(inputs):
            return mask
        within = F.pad(~begins_next(inputs, targets), (0, 1), value=True)
        return within if mask is None else mask & within

    def sequences(self, inputs: Mapping[str, Any]) -> Tensor:
        """A [B, S] tensor with one entry for each position of the logits of a token-level task."""
        targets = self.targets(inputs)
        if targets is not None:
            return targets
        if self.name == "seq2seq_lm" and inputs.get("decoder_input_ids") is not None:
            return inputs["decoder_input_ids"]
        ids = main_input(inputs)
        return ids if ids.dim() == 2 else ids[..., 0]

    def soft_mask(self, inputs: Mapping[str, Any], targets: Tensor | None, positions: str) -> Tensor | None:
        """Boolean mask of the positions counted for the soft loss, or None when all are.

        `positions` is "labels" (where there is a label, predicted at a real token: the hard loss counts those that are
        predicted at padding too, as upstream does) or "attended"; without labels it is always "attended".
        Rows of a classification task all count: an unlabelled row has a soft loss.
        """
        if not self.token_level:
            return None
        if positions == "labels" and targets is not None:
            made_at = self.made_at(inputs, targets)
            return targets != IGNORE_INDEX if made_at is None else made_at & (targets != IGNORE_INDEX)
        return self.attended(inputs)

    def labelled(self, targets: Tensor) -> Tensor:
        """How many rows (or positions) have a label: 0-dim."""
        return (targets != IGNORE_INDEX).sum()

    def labelled_in(self, inputs: Mapping[str, Any], targets: Tensor | None) -> Tensor | int:
        """The same of a batch; 0 without labels."""
        return 0 if targets is None else self.labelled(targets)

    def soft_loss_sum(
        self, soft_loss: SoftTargetLoss, student: Tensor, teacher: Tensor, inputs: Mapping[str, Any]
    ) -> Tensor:
        """Sum of T² D over the rows or positions given; `soft_loss` sums T² D(p, q) over all but the last dimension."""
        return soft_loss(student, teacher)

    def agreement_sum(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """In how many rows or positions both models say the same; None where nothing of the kind can be counted."""
        return (student.argmax(-1) == teacher.argmax(-1)).sum()

    def hard_loss_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Sum over labelled positions of the cross-entropy at temperature 1, in nats; float32 or wider inside.

        With label smoothing e: (1 - e) * CE + e * mean over classes of -log q, as transformers' `LabelSmoother`.
        """
        wide = _wide(logits)
        wrong = None if targets.device.type == "cpu" else wrong_labels(targets, wide.shape[-1])
        if wrong is not None:  # a device would stop the process: NaN says what the rest of the batch is worth
            targets = targets.masked_fill(wrong, IGNORE_INDEX)
        try:
            total = F.cross_entropy(
                wide.reshape(-1, wide.shape[-1]),
                targets.reshape(-1).long(),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
                label_smoothing=label_smoothing,
            )
        except IndexError as error:
            self.check_labels(targets, wide.shape[-1])
            raise error
        return total if wrong is None else total.masked_fill(wrong.any(), torch.nan)

    def wrong(self, targets: Tensor, classes: int | None) -> Tensor:
        """True where a label (of a number each: a row) is nothing that a loss can be taken of; on the device, unread.

        Args:
            classes: of the logits; None: not known, so that only what is wrong for every number counts.
        """
        return wrong_labels(targets, torch.iinfo(torch.int64).max if classes is None else classes)

    def check_labels(self, targets: Tensor, classes: int | None) -> None:
        """Raises ValueError naming the first label that is `wrong`; it waits for the device."""
        if classes is not None:
            check_label_range(targets, classes, self.label_names[0])
            return
        wrong = self.wrong(targets, None).reshape(-1)
        if wrong.any():
            place = int(wrong.nonzero()[0])
            shown = f"{int(targets.reshape(-1)[place])} at position {place} of the batch"
            expected = f"class ids from 0 on, or {IGNORE_INDEX} for no label"
            fix = f"Correct the label column; an unlabelled row is {IGNORE_INDEX}, not -1."
            fail(self.label_names[0], shown, expected, fix)

    def fault(self, inputs: Mapping[str, Any], classes: int) -> Fault | None:
        """What of the batch may make a loss that is not finite, where nothing has looked before."""
        targets = self.targets(inputs)
        if targets is None:
            return None
        rows = self.wrong(targets, classes).reshape(len(targets), -1).any(-1)
        expected = f"0 to {classes - 1} (the logits have {classes} classes), or {IGNORE_INDEX} for no label"
        return Fault(rows, self.label_names[0], "another number", expected, "Correct the label column.")

    def check_shapes(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor | None, common_ids: int | None = None
    ) -> None:
        """Raises ValueError where logits and labels do not fit each other or this head; never cuts or broadcasts.

        With `common_ids` (see `compatibility.common_ids`) the vocabularies may differ, if the smaller has so many ids.
        """
        if student.dim() != self.dims:
            fail(
                "model",
                f"giving logits of shape {tuple(student.shape)}",
                f"{self.dims} dimensions for the task {self.name!r}",
                "Set kd_task to the task that the model has.",
            )
        if self.softmax and not self.token_level and student.shape[-1] == 1:
            mend, because = "Set num_labels, or problem_type to regression.", "the softmax of one class is always 1"
            fail("num_labels", 1, "2 classes or more, or regression", mend, because=because)
        fits = teacher is None or teacher.shape == student.shape
        if teacher is not None and not fits and teacher.shape[:-1] == student.shape[:-1]:
            fits = common_ids == min(student.shape[-1], teacher.shape[-1])
        if teacher is not None and not fits:
            self._fail_different(student, teacher)
        expected = student.shape if self.a_label_a_logit else student.shape[:-1]
        if targets is not None and targets.shape != expected:
            fail(
                "labels",
                f"of shape {tuple(targets.shape)}",
                f"{tuple(expected)}, for logits of shape {tuple(student.shape)}",
                "Check the label column and the data collator.",
            )

    @staticmethod
    def _fail_different(student: Tensor, teacher: Tensor) -> None:
        because, fix = (
            "class i of one must mean class i of the other",
            "Take a teacher and a student with the same classes (or vocabulary) in the same order.",
        )
        if student.shape[:-1] != teacher.shape[:-1]:
            because, fix = (
                "position i of one must be position i of the other",
                "Take a teacher that reads the student's inputs and has one prediction for each of its positions.",
            )
        fail(
            "teacher_model",
            f"giving logits of shape {tuple(teacher.shape)}",
            f"the student's shape {tuple(student.shape)}",
            fix,
            because=because,
        )


_ROUNDING = 1e-4  # by which the probabilities of a file may leave [0, 1]


@dataclass(frozen=True)
class MultiLabelHead(Head):
    """Several yes/no labels a row: logits and labels [B, C], labels floating (as upstream's loss wants them).

    Hard loss of a row: the mean over its labels of the binary cross-entropy. Soft loss: the mean over its labels of
    T² D(Bernoulli(sigmoid(z_t/T)), Bernoulli(sigmoid(z_s/T))), of any divergence. A row of -100 is unlabelled.
    """

    softmax: ClassVar[bool] = False
    a_label_a_logit: ClassVar[bool] = True

    def soft_term(self, divergence: str) -> str:
        return f"{divergence} per label"

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        return _numbers(inputs.get(self.label_names[0]))

    def labelled(self, targets: Tensor) -> Tensor:
        return (targets != IGNORE_INDEX).all(-1).sum()

    def soft_loss_sum(
        self, soft_loss: SoftTargetLoss, student: Tensor, teacher: Tensor, inputs: Mapping[str, Any]
    ) -> Tensor:
        # softmax([z, 0]) = (sigmoid(z), 1 - sigmoid(z)): each label is a classification into yes and no.
        pairs = (torch.stack([z, torch.zeros_like(z)], -1) for z in (student, teacher))
        return divide(soft_loss(*pairs), student.shape[-1])

    def agreement_sum(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        return divide(((student > 0) == (teacher > 0)).sum(), student.shape[-1])

    def hard_loss_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        unknown, wrong, wide = targets == IGNORE_INDEX, self.wrong(targets, None), _wide(logits)
        if targets.device.type == "cpu" and bool(wrong.any()):
            self.check_labels(targets, None)
        filled = targets.to(wide.dtype).masked_fill(unknown, 0.0)
        losses = F.binary_cross_entropy_with_logits(wide, filled, reduction="none").mean(-1)
        return losses.masked_fill(unknown.all(-1), 0.0).masked_fill(wrong, torch.nan).sum()

    def wrong(self, targets: Tensor, classes: int | None) -> Tensor:
        """Rows [B]: a value outside [0, 1] (probabilities are labels too), NaN, or -100 beside other values."""
        unknown = targets == IGNORE_INDEX
        odd = ~((targets >= -_ROUNDING) & (targets <= 1 + _ROUNDING) | unknown)
        return odd.any(-1) | (unknown.any(-1) & ~unknown.all(-1))

    def check_labels(self, targets: Tensor, classes: int | None) -> None:
        wrong = self.wrong(targets, None)
        if not wrong.any():
            return
        row = int(wrong.nonzero()[0])
        values = targets[row]
        odd = values[(values != IGNORE_INDEX) & ~((values >= -_ROUNDING) & (values <= 1 + _ROUNDING))]
        shown = f"a row with {IGNORE_INDEX} beside other values (row {row} of the batch)"
        if len(odd):
            shown = f"{float(odd[0]):g} in row {row} of the batch"
        fail(self.label_names[0], shown, self._rule, "Fill the row or mask all of it.")

    @property
    def _rule(self) -> str:
        return f"0 to 1 for each label, or rows of {IGNORE_INDEX} alone"

    def fault(self, inputs: Mapping[str, Any], classes: int) -> Fault | None:
        targets = self.targets(inputs)
        if targets is None:
            return None
        name, fix = self.label_names[0], "Correct the label column."
        return Fault(self.wrong(targets, classes), name, "another number", self._rule, fix)


@dataclass(frozen=True)
class RegressionHead(Head):
    """Numbers instead of classes: outputs and labels [B, D], labels [B] where D is 1. Temperature has no meaning.

    Hard loss of a row: the mean over D of (z_s - y)². Soft loss: of (z_s - z_t)², or, where the teacher's outputs hold
    "variance" [B, D], the Gaussian negative log-likelihood ((z_s - z_t)² / v + log v) / 2. A row whose label is NaN is
    unlabelled (-100 is a number like any other here).
    """

    softmax: ClassVar[bool] = False
    a_label_a_logit: ClassVar[bool] = True
    tempered: ClassVar[bool] = False

    def soft_term(self, divergence: str) -> str:
        return "squared error"

    def logits(self, outputs: Any, argument: str) -> Tensor:
        """[B, D]; of a teacher with variance [B, D, 2]."""
        values = outputs if isinstance(outputs, Tensor) else logits_of(outputs, argument, self.wanted)
        values = values.unsqueeze(-1) if values.dim() == 1 else values
        variance = outputs.get("variance") if isinstance(outputs, Mapping) and argument == "teacher_model" else None
        if variance is None:
            return values
        return torch.stack([values, variance.reshape(values.shape).to(values.dtype)], -1)

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        labels = _numbers(inputs.get(self.label_names[0]))
        return labels.unsqueeze(-1) if labels is not None and labels.dim() == 1 else labels

    def labelled(self, targets: Tensor) -> Tensor:
        return (~targets.isnan()).all(-1).sum()

    def soft_loss_sum(
        self, soft_loss: SoftTargetLoss, student: Tensor, teacher: Tensor, inputs: Mapping[str, Any]
    ) -> Tensor:
        wide = _wide(student)
        if teacher.dim() == student.dim():
            return (wide - teacher).square().mean(-1).sum()
        mean, variance = teacher.to(wide.dtype).unbind(-1)
        try:
            return F.gaussian_nll_loss(wide, mean, variance, reduction="none").mean(-1).sum()
        except ValueError as error:
            shown, mend = f"{float(variance.min()):g} at least once", "Let it return exp of a log-variance."
            told = message("variance", shown, "numbers >= 0 from the teacher", mend)
            raise ValueError(told) from error

    def agreement_sum(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        return None

    def hard_loss_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        unknown, wrong, wide = targets.isnan(), self.wrong(targets, None), _wide(logits)
        if targets.device.type == "cpu" and bool(wrong.any()):
            self.check_labels(targets, None)
        losses = (wide - targets.to(wide.dtype).masked_fill(unknown, 0.0)).square().mean(-1)
        return losses.masked_fill(unknown.all(-1), 0.0).masked_fill(wrong, torch.nan).sum()

    def wrong(self, targets: Tensor, classes: int | None) -> Tensor:
        """Rows [B]: infinite, or NaN beside other values."""
        unknown = targets.isnan()
        return targets.isinf().any(-1) | (unknown.any(-1) & ~unknown.all(-1))

    def check_labels(self, targets: Tensor, classes: int | None) -> None:
        wrong = self.wrong(targets, None)
        if not wrong.any():
            return
        row = int(wrong.nonzero()[0])
        infinite = bool(targets[row].isinf().any())
        shown = f"{'infinite' if infinite else 'NaN beside other values'} in row {row} of the batch"
        fail(self.label_names[0], shown, self._rule, "Fill the row or mask all of it.")

    @property
    def _rule(self) -> str:
        return "finite numbers, or rows of NaN alone for no label"

    def fault(self, inputs: Mapping[str, Any], classes: int) -> Fault | None:
        targets = self.targets(inputs)
        if targets is None:
            return None
        name, fix = self.label_names[0], "Correct the label column."
        return Fault(self.wrong(targets, classes), name, "another number", self._rule, fix)

    def check_shapes(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor | None, common_ids: int | None = None
    ) -> None:
        means = teacher[..., 0] if teacher is not None and teacher.dim() == 3 else teacher
        super().check_shapes(student, means, targets, common_ids)


@dataclass(frozen=True)
class QuestionAnsweringHead(Head):
    """Extractive answers: a distribution over the positions for the start and one for the end, logits [B, 2, S].

    Both losses of a row are means over start and end. A start or end beyond the sequence is no label, as upstream has
    it, and neither is -100. The soft loss compares the attended positions alone, so that padding changes nothing. The
    hard loss is upstream's, whose softmax runs over the padding too: pad to a fixed length, as upstream's scripts do.
    """

    softmax: ClassVar[bool] = False

    @property
    def dims(self) -> int:
        return 3

    def logits(self, outputs: Any, argument: str) -> Tensor:
        found: list[Any]
        if isinstance(outputs, Mapping):
            found = [outputs.get("start_logits"), outputs.get("end_logits")]
            offer = "a mapping with the keys " + ", ".join(map(str, outputs))
        else:
            parts = outputs if isinstance(outputs, (tuple, list)) else ()
            found = [x for x in parts if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 2][:2]
            offer = type(outputs).__name__
        start, end = [*found, None, None][:2]
        if not isinstance(start, Tensor) or not isinstance(end, Tensor):
            expected = 'the logits of start and end: "start_logits" and "end_logits" [batch, sequence]'
            mend = "Wrap the model so that its forward returns them, or set kd_task to its task."
            fail(argument, f"a model that returns {offer}", expected, mend, error=TypeError)
        return torch.stack([start, end], 1)

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """[B, 2], start and end."""
        both = [inputs.get(name) for name in self.label_names]
        if both[0] is None or both[1] is None:
            return None
        for name, x in zip(self.label_names, both, strict=True):
            if x is not None and (x.is_floating_point() or x.dtype == torch.bool):
                shown, mend = f"of dtype {x.dtype}", "Cast the column to int64."
                fail(name, shown, "integer positions", mend, error=TypeError)
        positions = torch.stack([_signed(x.reshape(-1)) for x in both if x is not None], 1)
        ids = inputs.get("input_ids")
        length = (main_input(inputs) if ids is None else ids).shape[1]
        return positions.masked_fill(positions >= length, IGNORE_INDEX)

    def labelled(self, targets: Tensor) -> Tensor:
        return divide(super().labelled(targets), 2)

    def soft_loss_sum(
        self, soft_loss: SoftTargetLoss, student: Tensor, teacher: Tensor, inputs: Mapping[str, Any]
    ) -> Tensor:
        return divide(soft_loss(self._attended(student, inputs), self._attended(teacher, inputs)), 2)

    def agreement_sum(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        same = super().agreement_sum(self._attended(student, inputs), self._attended(teacher, inputs), inputs)
        return None if same is None else divide(same, 2)

    def hard_loss_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return divide(super().hard_loss_sum(logits, targets), 2)

    @staticmethod
    def _attended(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        mask = real_tokens(inputs.get("attention_mask"), (logits.shape[0], logits.shape[-1]))
        return logits if mask is None else logits.masked_fill(~mask.unsqueeze(1), -torch.inf)

    def check_labels(self, targets: Tensor, classes: int | None) -> None:
        """What lies beyond the sequence is no label (see `targets`), so that a negative position alone is wrong."""
        wrong = (targets < 0) & (targets != IGNORE_INDEX)
        if wrong.any():
            row, side = wrong.nonzero()[0].tolist()
            shown = f"{int(targets[row, side])} in row {row} of the batch"
            expected = f"a position from 0 on, or {IGNORE_INDEX} for no label"
            fail(self.label_names[side], shown, expected, "Correct the column.")

    def fault(self, inputs: Mapping[str, Any], classes: int) -> Fault | None:
        """A row whose mask attends no token has no distribution over tokens; a negative position is no label."""
        mask, targets = token_mask(inputs.get("attention_mask")), self.targets(inputs)
        wrong = None if targets is None else self.wrong(targets, None).any(-1)
        if wrong is not None and (wrong.device.type != "cpu" or bool(wrong.any())) and mask is None:
            expected = f"a position from 0 on, or {IGNORE_INDEX} for no label"
            return Fault(wrong, " or ".join(self.label_names), "negative", expected, "Correct the column.")
        if mask is None:
            return None
        fix = "Leave out rows without text, or give them a token that is attended."
        return Fault(~mask.any(-1), "attention_mask", "0 everywhere", "an attended token in every row", fix)

    @staticmethod
    def _fail_different(student: Tensor, teacher: Tensor) -> None:
        fail(
            "teacher_model",
            f"giving logits for {teacher.shape[-1]} positions",
            f"{student.shape[-1]}, the student's",
            "Take a teacher that reads the student's tokens.",
            because="position i of one must be position i of the other",
        )


@dataclass(frozen=True)
class FrameHead(Head):
    """Classes of each frame of speech: logits [B, F, C] of the student's frames; labels [B, F, C], a 1 for each frame.

    Hard loss of a frame: the cross-entropy of its class, padding included, as upstream has it. With `kd_positions`
    "attended" the soft loss counts the frames of real samples alone.

    Args:
        frames: [n] numbers of samples (or of features) -> [n] numbers of frames; of the student: see `of_model`.
    """

    cacheable: ClassVar[bool] = False
    frames: Callable[[Tensor], Tensor] | None = None

    def of_model(self, model: Any) -> Head:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")
        return replace(self, frames=next((getattr(model, name) for name in names if hasattr(model, name)), None))

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        labels = inputs.get(self.label_names[0])
        return labels.argmax(-1) if labels is not None and labels.dim() == 3 else super().targets(inputs)

    def attended(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Boolean [B, F]: frames of real samples, by the feature extractor's attention_mask; None without one."""
        mask = inputs.get("attention_mask")
        if mask is None:
            return None
        frames = torch.arange(self._count(mask.shape[1]), device=mask.device)
        return frames < self._frames()(mask.sum(-1)).unsqueeze(-1)

    def sequences(self, inputs: Mapping[str, Any]) -> Tensor:
        samples = main_input(inputs)
        return torch.empty(len(samples), self._count(samples.shape[1]), device=samples.device)

    def _count(self, samples: int) -> int:
        return int(self._frames()(torch.tensor([samples])))

    def _frames(self) -> Callable[[Tensor], Tensor]:
        if self.frames is None:
            expected = "a task whose frames the model can count (a speech model of transformers)"
            fail("kd_task", repr(self.name), expected, "Take such a model, or kd_task token_classification.")
        return self.frames

    @staticmethod
    def _fail_different(student: Tensor, teacher: Tensor) -> None:
        if student.shape[1] == teacher.shape[1]:
            Head._fail_different(student, teacher)
        fail(
            "teacher_model",
            f"giving logits for {teacher.shape[1]} frames",
            f"{student.shape[1]}, the student's",
            "Take a teacher whose feature encoder has the student's strides and reads the student's samples.",
            because="frame i of one must be frame i of the other",
        )


@dataclass(frozen=True)
class CTCHead(FrameHead):
    """Speech recognition by CTC: logits [B, F, V], labels [B, L] of fewer tokens than frames, -100 where padded.

    The hard loss is the model's own, which sums over the alignments. Soft loss: T² D of each frame of real samples.
    """

    softmax: ClassVar[bool] = False
    has_formula: ClassVar[bool] = False

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """None: no label belongs to a frame."""
        return None

    def labelled_in(self, inputs: Mapping[str, Any], targets: Tensor | None) -> Tensor | int:
        """Rows with a label."""
        labels = inputs.get(self.label_names[0])
        return 0 if labels is None else (labels != IGNORE_INDEX).reshape(len(labels), -1).any(-1).sum()


HEADS = {
    head.name: head
    for head in (
        Head(
            "classification",
            False,
            False,
            (
                "AutoModelForSequenceClassification",
                "AutoModelForImageClassification",
                "AutoModelForAudioClassification",
                "AutoModelForVideoClassification",
                "AutoModelForNextSentencePrediction",
            ),
        ),
        # A classification over the choices of a row: inputs are [B, choices, S].
        Head("multiple_choice", False, False, ("AutoModelForMultipleChoice",)),
        Head("token_classification", True, False, ("AutoModelForTokenClassification",)),
        Head("causal_lm", True, True, ("AutoModelForCausalLM",)),
        # Before masked_lm: upstream lists BART, mBART and MVP under both, and they are trained as encoder-decoders.
        # Its Auto classes list decoders too, whose labels are shifted: see `head_choice.auto_class_of`.
        Head(
            "seq2seq_lm",
            True,
            False,
            (
                "AutoModelForSeq2SeqLM",
                "AutoModelForSpeechSeq2Seq",
                "AutoModelForImageTextToText",
                "AutoModelForMultimodalLM",
            ),
        ),
        Head("masked_lm", True, False, ("AutoModelForMaskedLM",)),
        FrameHead("audio_frame_classification", True, False, ("AutoModelForAudioFrameClassification",)),
        CTCHead("ctc", True, False, ("AutoModelForCTC",)),
        QuestionAnsweringHead(
            "question_answering",
            False,
            False,
            ("AutoModelForQuestionAnswering", "AutoModelForDocumentQuestionAnswering"),
            label_names=("start_positions", "end_positions"),
        ),
        # Most models of these two have the Auto classes of "classification": see `by_problem_type`.
        MultiLabelHead("multi_label_classification", False, False, ("AutoModelForVisualQuestionAnswering",)),
        RegressionHead("regression", False, False, ()),
    )
}


def _wide(logits: Tensor) -> Tensor:
    """In float32 or wider."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _signed(labels: Tensor) -> Tensor:
    """Labels of a dtype without negative numbers, in which -100 would be a class (156 in uint8), as int64."""
    return labels.long() if labels.dtype == torch.bool or not labels.dtype.is_signed else labels


def _numbers(labels: Tensor | None) -> Tensor | None:
    """Labels that may have been written as integers, as the numbers they are."""
    return labels if labels is None or labels.is_floating_point() else labels.float()


def check_label_range(targets: Tensor, num_classes: int, name: str = "labels") -> None:
    """Raises ValueError naming the first label outside 0 ... num_classes - 1 that is not `IGNORE_INDEX`."""
    flat = targets.reshape(-1)
    wrong = (flat != IGNORE_INDEX) & ((flat < 0) | (flat >= num_classes))
    if wrong.any():
        place = int(wrong.nonzero()[0])
        fail(
            name,
            f"{int(flat[place])} at position {place} of the batch",
            f"0 to {num_classes - 1} (the logits have {num_classes} classes), or {IGNORE_INDEX} for no label",
            f"Mend the label column; an unlabelled row is {IGNORE_INDEX}, not -1.",
        )
