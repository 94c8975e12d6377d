"""The parts that the trainer is composed of: arguments, setup, objective, logs, checkpoints."""

from .arguments import (
    DistillationArguments,
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainingArguments,
    parse_args,
    refuse_borrowed_names,
)
from .bases import check_bases, check_options, check_smoothing, no_room_for_fields, not_logged, refuse_no_trainer
from .checkpoints import Checkpoints, newest_resumable
from .finite_watch import FiniteWatch
from .interrupt import ResumableInterrupt
from .logs import Evaluation, Window, named, with_existence, with_existence_of
from .objective import Counts, Objective, Parts
from .own_loss import OwnHardLoss
from .processes import on_main_process, refuse_lone_processes
from .router_loss import router_weight
from .settings import Settings
from .setup import Fit, plan
from .setup_checks import WITH_MODELS, WITHOUT_MODELS, Setup, classes_of_cache, classes_of_logits, is_sharded, tokens
from .start_block import card_section, start_block, summary_of
from .step_loss import BatchLoss, MicroBatch, TeacherOutputs, own_rows
from .teacher_cache import OfflineTeacher

__all__ = [
    "WITHOUT_MODELS",
    "WITH_MODELS",
    "BatchLoss",
    "Checkpoints",
    "Counts",
    "DistillationArguments",
    "DistillationTrainingArguments",
    "Evaluation",
    "FiniteWatch",
    "Fit",
    "MicroBatch",
    "Objective",
    "OfflineTeacher",
    "OwnHardLoss",
    "Parts",
    "ResumableInterrupt",
    "Seq2SeqDistillationTrainingArguments",
    "Settings",
    "Setup",
    "TeacherOutputs",
    "Window",
    "card_section",
    "check_bases",
    "check_options",
    "check_smoothing",
    "classes_of_cache",
    "classes_of_logits",
    "is_sharded",
    "named",
    "newest_resumable",
    "no_room_for_fields",
    "not_logged",
    "on_main_process",
    "own_rows",
    "parse_args",
    "plan",
    "refuse_borrowed_names",
    "refuse_lone_processes",
    "refuse_no_trainer",
    "router_weight",
    "start_block",
    "summary_of",
    "tokens",
    "with_existence",
    "with_existence_of",
]
