"""The parts that the trainer is composed of: arguments, setup, objective, logs, checkpoints."""

from .arguments import (
    DistillationArguments,
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainingArguments,
    parse_args,
)
from .checkpoints import ResumableInterrupt, newest_resumable
from .logs import MetricsBuffer
from .objective import Counts, Objective
from .settings import Settings
from .setup import Plan, Setup, make_plan
from .setup_checks import (
    WITH_MODELS,
    WITHOUT_MODELS,
    FirstBatch,
    classes_of_logits,
    is_sharded,
    tokens,
)

__all__ = [
    "WITHOUT_MODELS",
    "WITH_MODELS",
    "Counts",
    "DistillationArguments",
    "DistillationTrainingArguments",
    "FirstBatch",
    "MetricsBuffer",
    "Objective",
    "Plan",
    "ResumableInterrupt",
    "Seq2SeqDistillationTrainingArguments",
    "Settings",
    "Setup",
    "classes_of_logits",
    "is_sharded",
    "make_plan",
    "newest_resumable",
    "parse_args",
    "tokens",
]
