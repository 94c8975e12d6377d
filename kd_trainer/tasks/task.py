"""`Task`: which logits, which labels, which positions count, which shift, which hard loss a kind of task has.

For: `kinds.py`, which has the kinds and their table. Leaves the soft loss to `losses/modules.py` and the weighing to
`training/objective.py`. This class is every task whose labels are classes, a row or a position each.
Shapes: B rows, S positions, C classes or vocabulary entries; logits are [B, C] or [B, S, C].
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import (
    DIVERGENCES,
    IGNORE_INDEX,
    OVERLAP_IDS,
    SoftTargetLoss,
    check_standardized,
    divide,
    overlap,
    wrong_labels,
)
from ..validation import fail
from .inputs import STUDENT_TOKENS, begins_next, decoder_input_ids, main_input, real_tokens, tells_sequences, token_mask
from .logits import Wanted, logits_of


class Fault(NamedTuple):
    """What in a batch makes a loss that is not finite, whatever the models give."""

    rows: Tensor  # bool [B], on the device
    argument: str
    found: str  # "`argument` is {found} in rows [..]"
    expected: str
    fix: str


@dataclass(frozen=True)
class Task:
    """How one kind of task is read.

    Args:
        name: its name in `TASKS` and in `kd_task`.
        token_level: logits are [B, S, C] and every position is a row of its own; else [B, C].
        shifted: the logits at position i are compared with the label at i + 1 (decoder-only language models).
        over_tokens: the classes are token ids, of which an embedding may hold more rows than a tokenizer has tokens.
        encoder_decoder: the positions are a decoder's, whose inputs are made of the labels.
        left_to_right: a position is computed from those before it alone.
        named_classes: the classes are those of a config's id2label, and class i must mean the same in both models.
        auto_classes: transformers' Auto classes whose models have this task; the first one loads a teacher by path.
        label_names: the columns of a batch that hold the targets.
        widths, at_least: likely numbers of classes and the least, where a model returns several tensors; see `Wanted`.
    """

    name: str
    token_level: bool = field(default=False, kw_only=True)
    shifted: bool = field(default=False, kw_only=True)
    over_tokens: bool = field(default=False, kw_only=True)
    encoder_decoder: bool = field(default=False, kw_only=True)
    left_to_right: bool = field(default=False, kw_only=True)
    named_classes: bool = field(default=False, kw_only=True)
    auto_classes: tuple[str, ...] = field(default=(), kw_only=True)
    label_names: tuple[str, ...] = field(default=("labels",), kw_only=True)
    widths: tuple[int, ...] = field(default=(), compare=False)
    at_least: int = field(default=0, compare=False)

    softmax: ClassVar[bool] = True  # both losses are of one softmax over the classes and of integer labels
    a_label_a_logit: ClassVar[bool] = False  # labels are numbers, of the logits' shape
    tempered: ClassVar[bool] = True  # divergence and temperature mean something
    has_formula: ClassVar[bool] = True  # of the hard loss; else the model's own is the only one
    position: ClassVar[str] = "token"  # what a position is called
    over_positions: ClassVar[bool] = False  # the classes are the positions of a row
    cacheable: ClassVar[bool] = True  # which positions count follows from a batch alone
    has_hard_loss: ClassVar[bool] = True
    embeds: ClassVar[bool] = False  # a row's output is a vector, by which it is compared with other rows
    mixed_as: ClassVar[str] = "probabilities"  # what of several teachers is mixed: these, "numbers", or "" for neither
    agreement_name: ClassVar[str] = "teacher_agreement"  # the logged key of `agreement_sum`
    unread_weights: ClassVar[tuple[str, ...]] = ()  # names, in a checkpoint, of weights without a part in the outputs
    # Along which dimension the models may differ in length: its number, the name of one entry, and what to do then.
    along: ClassVar[tuple[int, str, str] | None] = None

    @property
    def dims(self) -> int:
        """Dimensions of the logits."""
        return 3 if self.token_level else 2

    @property
    def by_position(self) -> bool:
        """Whether the losses of a row are sums over positions, which "tokenmean" divides by."""
        return self.token_level

    def is_same_task(self, other: Task) -> bool:
        """Whether the other task is of the same entry of `TASKS`, however its labels are read."""
        return self.name == other.name

    def of_model(self, model: Any) -> Task:
        """The task as this student has it; most are the same for every one."""
        return self

    def with_label_names(self, names: Sequence[str], batch: Mapping[str, Any]) -> Task:
        """The task that reads its targets where they stand: `names` are the trainer's `label_names`.

        The usual columns win where `names` has them. Of other names the one counts that the batch holds; several, of
        which none is usual, leave the task without targets (the model's own loss may still read them).
        """
        if set(self.label_names) <= set(names):
            return self
        here = [name for name in names if batch.get(name) is not None] or list(names)
        if len(here) != len(self.label_names):
            return self
        return replace(self, label_names=tuple(here))

    def with_settings(self, kd: Any, student: Any, teacher_pooling: str | None) -> Task:
        """The task as the distillation arguments and the models have it: see `EmbeddingTask`."""
        return self

    def teacher_folder(self, path: str, init_kwargs: Mapping[str, Any]) -> Any:
        """What a teacher's folder holds for the task beside its transformer; None where there is nothing."""
        return None

    def teacher_module(self, teacher: Any, folder: Any = None) -> Any:
        """The module that is run as the teacher."""
        return teacher

    def set_teacher(self, teacher: Any) -> None:
        """Changes what the settings decide of the module that is run as the teacher."""

    def teacher_settings(self, teacher: Any) -> dict[str, Any]:
        """What a teacher cache notes of the teacher, beside its identity, that its outputs depend on."""
        return {}

    def save(self, student: Any, output_dir: str) -> None:
        """What the task adds to a folder into which upstream has saved the student."""

    def load(self, student: Any, folder: str) -> bool:
        """Loads weights that `save` has written in place of upstream's; False where they are upstream's."""
        return False

    def pooled(self, student: Any) -> AbstractContextManager[None]:
        """Around a forward of the wrapped student: see `EmbeddingTask`."""
        return nullcontext()

    def projected(self, student: Any, teacher: Any) -> tuple[int, int] | None:
        """Widths of the student's and the teacher's outputs, where a projector from one to the other is trained."""
        return None

    def notes(self, student: Any, teacher: Any) -> list[str]:
        """Lines for the start block."""
        return []

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

        `shift_labels` are used as they stand: they are shifted already.
        """
        if inputs.get("shift_labels") is not None:
            return signed(inputs["shift_labels"])
        labels = self._class_ids(inputs)
        if labels is None:
            return None
        if not self.token_level:
            return labels if labels.dim() == 1 else labels.reshape(-1)
        return self._where_predicted(labels, IGNORE_INDEX)

    def _where_predicted(self, column: Tensor, fill: int) -> Tensor:
        """What is known of each token [B, S], at the position that predicts it."""
        return F.pad(column, (0, 1), value=fill)[..., 1:] if self.shifted else column

    def generated(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Boolean [B, S]: positions that predict a token of the student's, which is no label; None without any."""
        tokens = inputs.get(STUDENT_TOKENS)
        return None if tokens is None else self._where_predicted(tokens, False)

    def _class_ids(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The label column as it stands, signed; raises TypeError where it holds no integers."""
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
        return signed(labels)

    def attended(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Boolean [B, S]: positions whose prediction is about a real token; None when every position counts.

        A prediction made AT padding is not counted either, so that padding on the left changes nothing. An
        encoder-decoder without `decoder_attention_mask` has its decoder's padding in the labels alone.
        """
        if not self.token_level:
            return None
        if self.encoder_decoder:
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
        """Boolean [B, S]: positions that are no padding; None without a mask."""
        name = "decoder_attention_mask" if self.encoder_decoder else "attention_mask"
        return real_tokens(inputs.get(name), shape)

    def made_at(self, inputs: Mapping[str, Any], targets: Tensor) -> Tensor | None:
        """Boolean [B, S]: positions whose prediction is made at a real token, of the sequence that it is about.

        None where the batch marks neither padding nor sequences: then all are. `shift_labels` name what follows
        themselves, at the end of a sequence too.
        """
        mask = self._real(inputs, targets.shape)
        if not self.shifted or inputs.get("shift_labels") is not None or not tells_sequences(inputs):
            return mask
        within = F.pad(~begins_next(inputs, targets), (0, 1), value=True)
        return within if mask is None else mask & within

    def with_decoder_inputs(self, student: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Encoder-decoders build their decoder's inputs from labels: built once here, for both models."""
        if not self.encoder_decoder or "decoder_input_ids" in inputs or inputs.get("labels") is None:
            return inputs
        ids = decoder_input_ids(student, inputs["labels"])
        return inputs if ids is None else {**inputs, "decoder_input_ids": ids}

    def sequences(self, inputs: Mapping[str, Any]) -> Tensor:
        """A [B, S] tensor with one entry for each position of the logits of a token-level task."""
        targets = self.targets(inputs)
        if targets is not None:
            return targets
        if self.encoder_decoder and inputs.get("decoder_input_ids") is not None:
            return inputs["decoder_input_ids"]
        ids = main_input(inputs)
        return ids if ids.dim() == 2 else ids[..., 0]

    def soft_mask(self, inputs: Mapping[str, Any], targets: Tensor | None, positions: str) -> Tensor | None:
        """Boolean mask of the positions counted for the soft loss, or None when all are.

        `positions` is "labels" (where there is a label or a `generated` token, predicted at a real token: the hard loss
        counts labels that are predicted at padding too, as upstream does) or "attended"; without labels it is always
        "attended".
        Rows of a classification task all count: an unlabelled row has a soft loss.
        """
        if not self.token_level:
            return None
        if positions == "labels" and targets is not None:
            made_at, generated = self.made_at(inputs, targets), self.generated(inputs)
            counted = targets != IGNORE_INDEX if generated is None else generated | (targets != IGNORE_INDEX)
            return counted if made_at is None else made_at & counted
        return self.attended(inputs)

    def segments(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor | None:
        """[B, S]: which sequence of its row a position belongs to, from 0 on; None where each row is one.

        Args:
            mask: [B, S], one entry for each position.
        """
        if self.encoder_decoder or not tells_sequences(inputs):
            return None
        return F.pad(begins_next(inputs, mask), (1, 0)).cumsum(-1)

    def kept_positions(self, inputs: Mapping[str, Any], positions: str, rows: int) -> Tensor:
        """Boolean [B, S]: positions of which a cache keeps the teacher's output; [B, 1] where rows have one each."""
        targets = self.targets(inputs)
        if not self.token_level:
            return torch.ones(rows, 1, dtype=torch.bool)
        mask = self.soft_mask(inputs, targets, positions)
        return torch.ones_like(self.sequences(inputs), dtype=torch.bool) if mask is None else mask

    def take_positions(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The kept positions of logits, as rows [N, ...]."""
        return logits[mask] if self.token_level else logits

    def place_positions(self, values: Tensor, mask: Tensor, shape: Sequence[int] | None) -> Tensor:
        """[N, width] of the kept positions -> [B, S, width], or [B, width] where rows have one each; zeros elsewhere.

        Args:
            shape: of the logits of a row that has one output; None where the values are no logits.
        """
        if not self.token_level:
            return values if shape is None else values.view(len(values), *shape)
        whole = values.new_zeros(*mask.shape, values.shape[-1])
        whole[mask] = values
        return whole

    def labelled(self, targets: Tensor) -> Tensor:
        """How many rows (or positions) have a label: 0-dim."""
        return (targets != IGNORE_INDEX).sum()

    def labelled_in(self, inputs: Mapping[str, Any], targets: Tensor | None) -> Tensor | int:
        """The same of a batch; 0 without labels."""
        return 0 if targets is None else self.labelled(targets)

    def distributions(self, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """[..., K]: logits of the distributions that the soft loss compares, of these rows or positions.

        Where a row has several, [B, D, K], its soft loss is their mean.
        """
        return logits

    def of_distributions(self, distributions: Tensor) -> Tensor:
        """Logits of which `distributions` makes these."""
        return distributions

    def check_soft_loss(self, soft_loss: SoftTargetLoss) -> None:
        """Raises ValueError for a setting of the soft loss that has no meaning for this task."""
        if self.tempered:
            return
        if soft_loss.divergence != "forward_kl":
            expected = f"'forward_kl' (the default) for the task {self.name!r}"
            because = f"its soft loss is {self.soft_term(soft_loss.divergence)}"
            fail("kd_divergence", repr(soft_loss.divergence), expected, "Leave it out.", because=because)
        if soft_loss.standardize_logits:
            expected = f"False for the task {self.name!r}, whose outputs are no logits"
            fail("kd_standardize_logits", True, expected, "Leave it out.")

    def check_classes(self, soft_loss: SoftTargetLoss, classes: int) -> None:
        """Raises ValueError for a setting that has no meaning for so few classes; `classes`: of the logits."""
        if self.tempered and not self.over_positions:
            DIVERGENCES[soft_loss.divergence].check(soft_loss.beta, "kd_beta", classes)
            if soft_loss.standardize_logits:
                check_standardized(classes, "kd_standardize_logits")

    def soft_loss_sum(
        self, soft_loss: SoftTargetLoss, student: Tensor, teacher: Tensor, targets: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Sum over rows or positions of T² D of the `distributions`.

        Args:
            soft_loss: sums T² D(p, q) over all but the last dimension.
            targets: of these rows or positions, for a divergence that needs labels; None: no labels.
            mask: `soft_mask`; of a token-level task only its positions are given.
        """
        total = soft_loss(student, teacher, class_labels=class_labels(soft_loss, student, targets))
        return self._of_rows(total, student)

    def agreement_sum(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor | None:
        """In how many rows or positions the models have the same top class, as `soft_loss_sum`; None: not defined."""
        return self.positions_sum(student.argmax(-1) == teacher.argmax(-1), mask)

    def has_overlap(self, classes: int) -> bool:
        """Whether `overlap` has a meaning and is not always 1."""
        return self.tempered and not self.over_positions and classes > OVERLAP_IDS

    def overlap_sum(self, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float) -> Tensor | None:
        """Sum over rows or positions of `overlap`, as `soft_loss_sum`; None: not defined. `temperature`: its own."""
        if not self.has_overlap(student.shape[-1]):
            return None
        return self.positions_sum(overlap(student, teacher, temperature=temperature), mask)

    def positions_sum(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """Sum over rows or positions of a number, or bool, of each of the `distributions`, as `agreement_sum`."""
        return self._of_rows(values.sum(), values.unsqueeze(-1))

    def _of_rows(self, total: Tensor, distributions: Tensor) -> Tensor:
        several = not self.token_level and distributions.dim() == 3
        return divide(total, distributions.shape[1]) if several else total

    def hard_loss_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Sum over labelled positions of the cross-entropy at temperature 1, in nats; float32 or wider inside.

        With label smoothing e: (1 - e) * CE + e * mean over classes of -log q, as transformers' `LabelSmoother`.
        """
        logits = wide(logits)
        wrong = None if targets.device.type == "cpu" else wrong_labels(targets, logits.shape[-1])
        if wrong is not None:  # a device would stop the process; a batch with a wrong label gets NaN
            targets = targets.masked_fill(wrong, IGNORE_INDEX)
        try:
            total = F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]),
                targets.reshape(-1).long(),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
                label_smoothing=label_smoothing,
            )
        except IndexError as error:
            self.check_labels(targets, logits.shape[-1])
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
        wrong = self.wrong(targets, classes).reshape(-1)
        if wrong.any():
            place = int(wrong.nonzero()[0])
            shown = f"{int(targets.reshape(-1)[place])} at position {place} of the batch"
            known = "class ids from 0 on" if classes is None else _range_of(classes)
            expected = f"{known}, or {IGNORE_INDEX} for no label"
            fix = f"Correct the label column; an unlabelled row is {IGNORE_INDEX}, not -1."
            fail(self.label_names[0], shown, expected, fix)

    def fault(self, inputs: Mapping[str, Any], classes: int) -> Fault | None:
        """What of the batch may make a loss that is not finite, where nothing has looked before."""
        targets = self.targets(inputs)
        if targets is None:
            return None
        rows = self.wrong(targets, classes).reshape(len(targets), -1).any(-1)
        expected = f"{_range_of(classes)}, or {IGNORE_INDEX} for no label"
        return Fault(rows, self.label_names[0], "another number", expected, "Correct the label column.")

    def check_shapes(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor | None, common_ids: int | None = None
    ) -> None:
        """Raises ValueError where logits and labels do not fit each other or this task; never cuts or broadcasts.

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
            fix, because = "Set num_labels, or problem_type to regression.", "the softmax of one class is always 1"
            fail("num_labels", 1, "2 classes or more, or regression", fix, because=because)
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

    def _fail_different(self, student: Tensor, teacher: Tensor) -> NoReturn:
        shown, expected = f"of shape {tuple(teacher.shape)}", f"the student's shape {tuple(student.shape)}"
        one, fix = "class", "Take a teacher and a student with the same classes (or vocabulary) in the same order."
        if self.along is not None and student.shape[self.along[0]] != teacher.shape[self.along[0]]:
            dim, one, fix = self.along
            shown, expected = f"for {teacher.shape[dim]} {one}s", f"{student.shape[dim]}, the student's"
        elif student.shape[:-1] != teacher.shape[:-1]:
            one = "position"
            fix = "Take a teacher that reads the student's inputs and has one prediction for each of its positions."
        because = f"{one} i of one must {'mean' if one == 'class' else 'be'} {one} i of the other"
        fail("teacher_model", f"giving logits {shown}", expected, fix, because=because)


def _range_of(classes: int) -> str:
    return f"0 to {classes - 1} (the logits have {classes} classes)"


def wide(logits: Tensor) -> Tensor:
    """In float32 or wider."""
    return logits if logits.dtype == torch.float64 else logits.float()


def signed(labels: Tensor) -> Tensor:
    """Labels of a dtype without negative numbers, in which -100 would be a class (156 in uint8), as int64."""
    return labels.long() if labels.dtype == torch.bool or not labels.dtype.is_signed else labels


def class_labels(soft_loss: SoftTargetLoss, logits: Tensor, targets: Tensor | None) -> Tensor | None:
    """The targets where the divergence reads them; without any, no label for each position of the logits."""
    if not soft_loss.needs_labels:
        return None
    return torch.full(logits.shape[:-1], IGNORE_INDEX, device=logits.device) if targets is None else targets
