"""The kinds of `Task`, and the table of tasks.

For: the trainer, which has no code of a single task. A new task is a new entry of `TASKS`.
Shapes: B rows, S positions, C classes or vocabulary entries, D outputs of a regression; logits are [B, C] or [B, S, C].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import DIVERGENCES, IGNORE_INDEX, SoftTargetLoss, divide
from ..validation import fail, message
from .embedding import EmbeddingTask
from .inputs import main_input, real_tokens, token_mask
from .logits import logits_of
from .segmentation import SegmentationTask
from .task import Fault, Task, signed, wide


@dataclass(frozen=True)
class NumbersTask(Task):
    """Labels that are numbers, of the logits' shape; a row is labelled as a whole or not at all."""

    softmax: ClassVar[bool] = False
    a_label_a_logit: ClassVar[bool] = True
    rule: ClassVar[str]  # what labels have to be

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """As numbers, also where they were written as integers."""
        labels = inputs.get(self.label_names[0])
        return labels if labels is None or labels.is_floating_point() else labels.float()

    def labelled(self, targets: Tensor) -> Tensor:
        """How many rows have a label."""
        return (~self._unknown(targets)).all(-1).sum()

    def hard_loss_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        unknown, wrong, logits = self._unknown(targets), self.wrong(targets, None), wide(logits)
        if targets.device.type == "cpu" and bool(wrong.any()):
            self.check_labels(targets, None)
        losses = self._losses(logits, targets.to(logits.dtype).masked_fill(unknown, 0.0)).mean(-1)
        return losses.masked_fill(unknown.all(-1), 0.0).masked_fill(wrong, torch.nan).sum()

    def wrong(self, targets: Tensor, classes: int | None) -> Tensor:
        """Rows [B] with an impossible label, or of which a part alone is labelled."""
        unknown = self._unknown(targets)
        return self._impossible(targets).any(-1) | (unknown.any(-1) & ~unknown.all(-1))

    def check_labels(self, targets: Tensor, classes: int | None) -> None:
        wrong = self.wrong(targets, None)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            impossible = targets[row][self._impossible(targets[row])]
            shown = self._shown(float(impossible[0]) if len(impossible) else None, row)
            fail(self.label_names[0], shown, self.rule, "Fill the row or mask all of it.")

    def fault(self, inputs: Mapping[str, Any], classes: int) -> Fault | None:
        targets = self.targets(inputs)
        if targets is None:
            return None
        name, fix = self.label_names[0], "Correct the label column."
        return Fault(self.wrong(targets, classes), name, "another number", self.rule, fix)

    def _unknown(self, targets: Tensor) -> Tensor:
        """[B, D]: no label."""
        raise NotImplementedError

    def _impossible(self, targets: Tensor) -> Tensor:
        """Of the shape of `targets`: a number that no label can be."""
        raise NotImplementedError

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """[B, D]: the hard loss of each label."""
        raise NotImplementedError

    def _shown(self, impossible: float | None, row: int) -> str:
        """A wrong row for the error; `impossible`: None where only a part of it is labelled."""
        raise NotImplementedError


_ROUNDING = 1e-4  # by which the probabilities of a file may leave [0, 1]


@dataclass(frozen=True)
class MultiLabelTask(NumbersTask):
    """Several yes/no labels a row: logits and labels [B, C], labels floating (as upstream's loss wants them).

    Hard loss of a row: the mean over its labels of the binary cross-entropy. Soft loss: the mean over its labels of
    T² D(Bernoulli(sigmoid(z_t/T)), Bernoulli(sigmoid(z_s/T))), of logit_mse (z_s - z_t)². A row of -100 is unlabelled.
    A label may be a probability, and -100 stands beside no other value.
    """

    rule: ClassVar[str] = f"0 to 1 for each label, or rows of {IGNORE_INDEX} alone"

    def soft_term(self, divergence: str) -> str:
        return f"{divergence} per label"

    def distributions(self, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """[B, C, 2]: softmax([0, z]) = (1 - sigmoid(z), sigmoid(z)), each label a classification into no and yes."""
        return torch.stack([torch.zeros_like(logits), logits], -1)

    def of_distributions(self, distributions: Tensor) -> Tensor:
        return distributions[..., 1] - distributions[..., 0]

    def soft_loss_sum(
        self, soft_loss: SoftTargetLoss, student: Tensor, teacher: Tensor, targets: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        if targets is not None:
            targets = (targets >= 0.5).long().masked_fill(self._unknown(targets), IGNORE_INDEX)
        if DIVERGENCES[soft_loss.divergence].of_logits:  # not of the 0 beside it
            student, teacher = student[..., 1], teacher[..., 1]
        return super().soft_loss_sum(soft_loss, student, teacher, targets, mask)

    def check_classes(self, soft_loss: SoftTargetLoss, classes: int) -> None:
        super().check_classes(soft_loss, 2)  # each label: no and yes

    def _unknown(self, targets: Tensor) -> Tensor:
        return targets == IGNORE_INDEX

    def _impossible(self, targets: Tensor) -> Tensor:
        return ~((targets >= -_ROUNDING) & (targets <= 1 + _ROUNDING) | (targets == IGNORE_INDEX))

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")

    def _shown(self, impossible: float | None, row: int) -> str:
        if impossible is None:
            return f"a row with {IGNORE_INDEX} beside other values (row {row} of the batch)"
        return f"{impossible:g} in row {row} of the batch"


@dataclass(frozen=True)
class RegressionTask(NumbersTask):
    """Numbers instead of classes: outputs and labels [B, D], labels [B] where D is 1. Temperature has no meaning.

    Hard loss of a row: the mean over D of (z_s - y)². Soft loss: of (z_s - z_t)², or, where the teacher's outputs hold
    "variance" [B, D], the Gaussian negative log-likelihood ((z_s - z_t)² / v + log v) / 2. A row whose label is NaN is
    unlabelled (-100 is a number like any other here).
    """

    tempered: ClassVar[bool] = False
    mixed_as: ClassVar[str] = "numbers"
    rule: ClassVar[str] = "finite numbers, or rows of NaN alone for no label"

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
        labels = super().targets(inputs)
        return labels.unsqueeze(-1) if labels is not None and labels.dim() == 1 else labels

    def soft_loss_sum(
        self, soft_loss: SoftTargetLoss, student: Tensor, teacher: Tensor, targets: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        student = wide(student)
        if teacher.dim() == student.dim():
            return (student - teacher).square().mean(-1).sum()
        mean, variance = teacher.to(student.dtype).unbind(-1)
        try:
            return F.gaussian_nll_loss(student, mean, variance, reduction="none").mean(-1).sum()
        except ValueError as error:
            shown, fix = f"{float(variance.min()):g} at least once", "Let it return exp of a log-variance."
            raise ValueError(message("variance", shown, "numbers >= 0 from the teacher", fix)) from error

    def agreement_sum(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor | None:
        return None

    def check_shapes(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor | None, common_ids: int | None = None
    ) -> None:
        means = teacher[..., 0] if teacher is not None and teacher.dim() == 3 else teacher
        super().check_shapes(student, means, targets, common_ids)

    def _unknown(self, targets: Tensor) -> Tensor:
        return targets.isnan()

    def _impossible(self, targets: Tensor) -> Tensor:
        return targets.isinf()

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits - targets).square()

    def _shown(self, impossible: float | None, row: int) -> str:
        return f"{'NaN beside other values' if impossible is None else 'infinite'} in row {row} of the batch"


@dataclass(frozen=True)
class QuestionAnsweringTask(Task):
    """Extractive answers: a distribution over the positions for the start and one for the end, logits [B, 2, S].

    Both losses of a row are means over start and end. A start or end beyond the sequence is no label, as upstream has
    it, and neither is -100. The soft loss compares the attended positions alone, so that padding changes nothing. The
    hard loss is upstream's, whose softmax runs over the padding too: pad to a fixed length, as upstream's scripts do.
    """

    softmax: ClassVar[bool] = False
    over_positions: ClassVar[bool] = True
    along: ClassVar[tuple[int, str, str] | None] = (-1, "position", "Take a teacher that reads the student's tokens.")

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
            fix = "Wrap the model so that its forward returns them, or set kd_task to its task."
            fail(argument, f"a model that returns {offer}", expected, fix, error=TypeError)
        return torch.stack([start, end], 1)

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """[B, 2], start and end."""
        both = [inputs.get(name) for name in self.label_names]
        if both[0] is None or both[1] is None:
            return None
        for name, x in zip(self.label_names, both, strict=True):
            if x is not None and (x.is_floating_point() or x.dtype == torch.bool):
                shown, fix = f"of dtype {x.dtype}", "Cast the column to int64."
                fail(name, shown, "integer positions", fix, error=TypeError)
        positions = torch.stack([signed(x.reshape(-1)) for x in both if x is not None], 1)
        ids = inputs.get("input_ids")
        length = (main_input(inputs) if ids is None else ids).shape[1]
        return positions.masked_fill(positions >= length, IGNORE_INDEX)

    def labelled(self, targets: Tensor) -> Tensor:
        return divide(super().labelled(targets), 2)

    def distributions(self, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """[B, 2, S], with no mass at padding."""
        mask = real_tokens(inputs.get("attention_mask"), (logits.shape[0], logits.shape[-1]))
        return logits if mask is None else logits.masked_fill(~mask.unsqueeze(1), -torch.inf)

    def hard_loss_sum(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return divide(super().hard_loss_sum(logits, targets), 2)

    def kept_positions(self, inputs: Mapping[str, Any], positions: str, rows: int) -> Tensor:
        """Each attended position has a start and an end logit."""
        mask = real_tokens(inputs.get("attention_mask"), inputs["input_ids"].shape)
        return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask

    def take_positions(self, logits: Tensor, mask: Tensor) -> Tensor:
        return logits.transpose(1, 2)[mask]

    def place_positions(self, values: Tensor, mask: Tensor, shape: Sequence[int] | None) -> Tensor:
        whole = values.new_zeros(*mask.shape, values.shape[-1])
        whole[mask] = values
        return whole.transpose(1, 2).contiguous()

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


@dataclass(frozen=True)
class FrameTask(Task):
    """Classes of each frame of speech: logits [B, F, C] of the student's frames; labels [B, F, C], a 1 for each frame.

    Hard loss of a frame: the cross-entropy of its class, padding included, as upstream has it. With `kd_positions`
    "attended" the soft loss counts the frames of real samples alone.

    Args:
        frames: [n] numbers of samples (or of features) -> [n] numbers of frames; of the student: see `of_model`.
    """

    cacheable: ClassVar[bool] = False
    position: ClassVar[str] = "frame"
    along: ClassVar[tuple[int, str, str] | None] = (
        1,
        "frame",
        "Take a teacher whose feature encoder has the student's strides and reads the student's samples.",
    )
    frames: Callable[[Tensor], Tensor] | None = None

    def of_model(self, model: Any) -> Task:
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


@dataclass(frozen=True)
class CTCTask(FrameTask):
    """Speech recognition by CTC: logits [B, F, V], labels [B, L] of fewer tokens than frames, -100 where padded.

    The hard loss is the model's own, which sums over the alignments. Soft loss: T² D of each frame of real samples.
    """

    softmax: ClassVar[bool] = False
    has_formula: ClassVar[bool] = False

    def targets(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """None: no label belongs to a frame."""
        return None

    def check_soft_loss(self, soft_loss: SoftTargetLoss) -> None:
        super().check_soft_loss(soft_loss)
        if soft_loss.needs_labels:
            having = ", ".join(name for name, entry in DIVERGENCES.items() if not entry.needs_labels)
            expected, because = f"one of {having} for the task {self.name!r}", "no label belongs to a frame"
            fail("kd_divergence", repr(soft_loss.divergence), expected, "Choose one of them.", because=because)

    def labelled_in(self, inputs: Mapping[str, Any], targets: Tensor | None) -> Tensor | int:
        """Rows with a label."""
        labels = inputs.get(self.label_names[0])
        return 0 if labels is None else (labels != IGNORE_INDEX).reshape(len(labels), -1).any(-1).sum()


TASKS = {
    task.name: task
    for task in (
        Task(
            "classification",
            named_classes=True,
            auto_classes=(
                "AutoModelForSequenceClassification",
                "AutoModelForImageClassification",
                "AutoModelForAudioClassification",
                "AutoModelForVideoClassification",
                "AutoModelForNextSentencePrediction",
            ),
        ),
        # A classification over the choices of a row: inputs are [B, choices, S].
        Task("multiple_choice", auto_classes=("AutoModelForMultipleChoice",)),
        Task(
            "token_classification",
            token_level=True,
            named_classes=True,
            auto_classes=("AutoModelForTokenClassification",),
        ),
        Task(
            "causal_lm",
            token_level=True,
            shifted=True,
            over_tokens=True,
            left_to_right=True,
            auto_classes=("AutoModelForCausalLM",),
        ),
        # Before masked_lm: upstream lists BART, mBART and MVP under both, and they are trained as encoder-decoders.
        # Its Auto classes list decoders too, whose labels are shifted: see `resolve.auto_class_of`.
        Task(
            "seq2seq_lm",
            token_level=True,
            over_tokens=True,
            encoder_decoder=True,
            auto_classes=(
                "AutoModelForSeq2SeqLM",
                "AutoModelForSpeechSeq2Seq",
                "AutoModelForImageTextToText",
                "AutoModelForMultimodalLM",
            ),
        ),
        Task("masked_lm", token_level=True, over_tokens=True, auto_classes=("AutoModelForMaskedLM",)),
        FrameTask(
            "audio_frame_classification",
            token_level=True,
            named_classes=True,
            auto_classes=("AutoModelForAudioFrameClassification",),
        ),
        CTCTask("ctc", token_level=True, auto_classes=("AutoModelForCTC",)),
        QuestionAnsweringTask(
            "question_answering",
            auto_classes=("AutoModelForQuestionAnswering", "AutoModelForDocumentQuestionAnswering"),
            label_names=("start_positions", "end_positions"),
        ),
        # Most models of these two have the Auto classes of "classification": see `by_problem_type`.
        MultiLabelTask(
            "multi_label_classification", named_classes=True, auto_classes=("AutoModelForVisualQuestionAnswering",)
        ),
        RegressionTask("regression"),
        SegmentationTask(
            "semantic_segmentation", named_classes=True, auto_classes=("AutoModelForSemanticSegmentation",)
        ),
        # Last: the others are of models with an output head. AutoModel would load a T5 with its decoder.
        EmbeddingTask("embedding", auto_classes=("AutoModelForTextEncoding", "AutoModel")),
    )
}
