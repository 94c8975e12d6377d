"""Which head of `HEADS` a model has: by its Auto class, its config, its labels, or in the end by its logits.

For: the trainer on the first batch, and the teacher, whom the same Auto class loads.
Imports: checks, heads, transformers (the Auto classes, on use).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .checks import Shown, fail
from .heads import HEADS, Head

# Where class i of the teacher must mean class i of the student by name.
CLASSIFICATIONS = ("classification", "multi_label_classification", "token_classification")


def auto_class_of(model: nn.Module) -> tuple[Head, Any] | None:
    """The head and the Auto class of transformers that `model` belongs to; None where no Auto class knows it."""
    import transformers

    config = getattr(model, "config", None)
    if not isinstance(config, transformers.PreTrainedConfig):
        return None
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    for head in HEADS.values():
        for name in head.auto_classes:
            auto_class = getattr(transformers, name)
            classes = auto_class._model_mapping.get(type(config), ())
            if isinstance(model, classes):
                # Speech models that are decoders alone are listed there too; they shift their labels.
                decoder = head.name == "seq2seq_lm" and not getattr(config, "is_encoder_decoder", True)
                return (HEADS["causal_lm"] if decoder else head), auto_class
    return None


def head_for(model: nn.Module, kd_task: str | None, shifts_labels: bool) -> Head | None:
    """The head of `model`: named by `kd_task`, known from its Auto class, or causal where upstream shifts its labels.

    None means that only the logits can tell (a plain module): see `head_from_logits`.
    """
    if kd_task is not None:
        return HEADS[kd_task]
    known = auto_class_of(model)
    if known is not None:
        return known[0]
    return HEADS["causal_lm"] if shifts_labels else None


# What upstream's classifiers call their kinds of labels, and the head of each.
PROBLEM_TYPES = {
    "single_label_classification": "classification",
    "multi_label_classification": "multi_label_classification",
    "regression": "regression",
}


def by_problem_type(head: Head, student: nn.Module, kd_task: str | None, labels: Tensor | None) -> Head:
    """The head that a classifier's loss has upstream: by `config.problem_type`, else by num_labels and labels' dtype.

    Upstream's forward writes `problem_type` into the config when it sees labels; here labels never reach it, so this
    does.
    """
    config: Any = getattr(student, "config", None)
    if head.name not in PROBLEM_TYPES.values() or not hasattr(config, "problem_type"):
        return head
    known = config.problem_type
    if known is not None and known not in PROBLEM_TYPES:
        fail("problem_type", known, "one of " + ", ".join(PROBLEM_TYPES), "Mend the student's config.")
    if kd_task is not None:
        name = kd_task
        if known is not None and PROBLEM_TYPES[known] != name:
            expected = f"{PROBLEM_TYPES[known]!r}, as the student's config says (problem_type)"
            fail("kd_task", kd_task, expected, "Leave it out, or change problem_type in the config.")
    elif known is not None:
        name = PROBLEM_TYPES[known]
    elif config.num_labels == 1:
        name = "regression"
    else:
        name = "multi_label_classification" if labels is not None and labels.is_floating_point() else "classification"
    if name == "classification" and config.num_labels == 1:
        expected, mend = "2 classes or more, or regression", "Set num_labels, or problem_type to regression."
        fail("num_labels", 1, expected, mend, because="the softmax of one class is 1 whatever the model says")
    config.problem_type = next(problem for problem, task in PROBLEM_TYPES.items() if task == name)
    return HEADS[name]


def head_from_logits(logits: Tensor) -> Head:
    """[B, C] is a classification, [B, S, C] one classification a position (unshifted)."""
    names = {2: "classification", 3: "token_classification"}
    if logits.dim() not in names:
        fail(
            "teacher_model",
            Shown(f"giving logits of shape {tuple(logits.shape)}"),
            "[batch, classes] or [batch, sequence, classes]",
            "Return such logits, or set kd_task.",
        )
    return HEADS[names[logits.dim()]]
