"""The parts that the trainer is composed of: arguments, setup, objective, logs, checkpoints."""

from .arguments import (
    DistillationArguments,
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainingArguments,
)
from .checkpoints import ResumableInterrupt, newest_resumable, on_main_process, unchanged_callbacks
from .logs import MetricsBuffer
from .objective import Counts, LossInputs, Objective
from .parse import parse_args
from .settings import HARD_LOSS_ONLY, WITHOUT_FEATURES, Settings
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
    "HARD_LOSS_ONLY",
    "WITHOUT_FEATURES",
    "WITHOUT_MODELS",
    "WITH_MODELS",
    "Counts",
    "DistillationArguments",
    "DistillationTrainingArguments",
    "FirstBatch",
    "LossInputs",
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
    "on_main_process",
    "parse_args",
    "tokens",
    "unchanged_callbacks",
]
