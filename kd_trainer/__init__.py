"""kd_trainer: knowledge distillation for the Hugging Face `Trainer`.

Public names are resolved on first use, so that the tensor functions cost an import of torch and nothing more.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import CachedTeacher as CachedTeacher
    from .data import soft_target_data as soft_target_data
    from .data import synthetic_classification as synthetic_classification
    from .divergences import DIVERGENCES as DIVERGENCES
    from .divergences import forward_kl as forward_kl
    from .divergences import jsd as jsd
    from .divergences import reverse_kl as reverse_kl
    from .divergences import symmetric_kl as symmetric_kl
    from .fused_linear import FusedLoss as FusedLoss
    from .fused_linear import fused_linear_distillation as fused_linear_distillation
    from .losses import DistillationLoss as DistillationLoss
    from .losses import KLDivergenceLoss as KLDivergenceLoss
    from .losses import SoftTargetLoss as SoftTargetLoss
    from .losses import fit_temperature as fit_temperature
    from .memory import Memory as Memory
    from .memory import estimate_memory as estimate_memory
    from .models import MLPConfig as MLPConfig
    from .models import MLPForImageClassification as MLPForImageClassification
    from .students import student_from_teacher as student_from_teacher
    from .teacher_inputs import TeacherCollator as TeacherCollator
    from .teacher_inputs import add_teacher_inputs as add_teacher_inputs
    from .trainer import DistillationMixin as DistillationMixin
    from .trainer import DistillationTrainer as DistillationTrainer
    from .trainer import Seq2SeqDistillationTrainer as Seq2SeqDistillationTrainer
    from .training_args import DistillationArguments as DistillationArguments
    from .training_args import DistillationTrainingArguments as DistillationTrainingArguments
    from .training_args import Seq2SeqDistillationTrainingArguments as Seq2SeqDistillationTrainingArguments
    from .training_args import parse_args as parse_args

__version__ = "0.1.0"

_HOME = {
    "cache": ["CachedTeacher"],
    "data": ["synthetic_classification", "soft_target_data"],
    "divergences": [
        "DIVERGENCES",
        "entropy",
        "forward_kl",
        "jsd",
        "reverse_kl",
        "skew_forward_kl",
        "skew_reverse_kl",
        "soft_cross_entropy",
        "symmetric_kl",
        "total_variation",
    ],
    "fused_linear": ["FusedLoss", "fused_linear_distillation", "fused_linear_distillation_plain"],
    "losses": ["DistillationLoss", "KLDivergenceLoss", "SoftTargetLoss", "fit_temperature"],
    "memory": ["Memory", "estimate_memory"],
    "models": ["MLPConfig", "MLPForImageClassification"],
    "students": ["student_from_teacher"],
    "teacher_inputs": ["TeacherCollator", "add_teacher_inputs"],
    "trainer": ["DistillationMixin", "DistillationTrainer", "Seq2SeqDistillationTrainer"],
    "training_args": [
        "DistillationArguments",
        "DistillationTrainingArguments",
        "Seq2SeqDistillationTrainingArguments",
        "parse_args",
    ],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
