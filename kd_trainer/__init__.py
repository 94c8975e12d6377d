"""kd_trainer: knowledge distillation for the Hugging Face `Trainer`.

Public names are resolved on first use, so that the tensor functions cost an import of torch and nothing more.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import CachedTeacher as CachedTeacher
    from .checkpoints import newest_resumable as newest_resumable
    from .data import as_tensors as as_tensors
    from .data import collate_tensors as collate_tensors
    from .data import soft_target_data as soft_target_data
    from .data import split_labelled as split_labelled
    from .data import synthetic_classification as synthetic_classification
    from .distributions import kl_bernoulli as kl_bernoulli
    from .distributions import kl_categorical as kl_categorical
    from .distributions import kl_diagonal_gaussian as kl_diagonal_gaussian
    from .distributions import kl_full_gaussian as kl_full_gaussian
    from .distributions import kl_gaussian as kl_gaussian
    from .distributions import kl_to_standard_normal as kl_to_standard_normal
    from .distributions import monte_carlo_kl as monte_carlo_kl
    from .divergences import DIVERGENCES as DIVERGENCES
    from .divergences import entropy as entropy
    from .divergences import forward_kl as forward_kl
    from .divergences import jsd as jsd
    from .divergences import reverse_kl as reverse_kl
    from .divergences import skew_forward_kl as skew_forward_kl
    from .divergences import skew_reverse_kl as skew_reverse_kl
    from .divergences import soft_cross_entropy as soft_cross_entropy
    from .divergences import symmetric_kl as symmetric_kl
    from .divergences import total_variation as total_variation
    from .fused_linear import FusedLoss as FusedLoss
    from .fused_linear import fused_linear_distillation as fused_linear_distillation
    from .fused_linear import fused_linear_distillation_plain as fused_linear_distillation_plain
    from .interrupt import ResumableInterrupt as ResumableInterrupt
    from .loading import load_classification as load_classification
    from .losses import DistillationLoss as DistillationLoss
    from .losses import KLDivergenceLoss as KLDivergenceLoss
    from .losses import SoftTargetLoss as SoftTargetLoss
    from .losses import fit_temperature as fit_temperature
    from .memory import Memory as Memory
    from .memory import estimate_memory as estimate_memory
    from .metrics import Accuracy as Accuracy
    from .metrics import ExpectedCalibrationError as ExpectedCalibrationError
    from .metrics import KLToTeacher as KLToTeacher
    from .metrics import NegativeLogLikelihood as NegativeLogLikelihood
    from .metrics import TeacherAgreement as TeacherAgreement
    from .metrics import classification_metrics as classification_metrics
    from .models import MLPConfig as MLPConfig
    from .models import MLPForImageClassification as MLPForImageClassification
    from .report import build_report as build_report
    from .report import print_table as print_table
    from .runs import load_run as load_run
    from .runs import save_predictions as save_predictions
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
    "checkpoints": ["newest_resumable"],
    "data": ["as_tensors", "collate_tensors", "soft_target_data", "split_labelled", "synthetic_classification"],
    "distributions": [
        "kl_bernoulli",
        "kl_categorical",
        "kl_diagonal_gaussian",
        "kl_full_gaussian",
        "kl_gaussian",
        "kl_to_standard_normal",
        "monte_carlo_kl",
    ],
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
    "interrupt": ["ResumableInterrupt"],
    "loading": ["load_classification"],
    "losses": ["DistillationLoss", "KLDivergenceLoss", "SoftTargetLoss", "fit_temperature"],
    "memory": ["Memory", "estimate_memory"],
    "metrics": [
        "Accuracy",
        "ExpectedCalibrationError",
        "KLToTeacher",
        "NegativeLogLikelihood",
        "TeacherAgreement",
        "classification_metrics",
    ],
    "models": ["MLPConfig", "MLPForImageClassification"],
    "report": ["build_report", "print_table"],
    "runs": ["load_run", "save_predictions"],
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
