"""kd_trainer: knowledge distillation for the Hugging Face `Trainer`.

Public names are resolved on first use, so that the tensor functions cost an import of torch and nothing more.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.cached_teacher import CachedTeacher as CachedTeacher
    from .data.mlp import MLPConfig as MLPConfig
    from .data.mlp import MLPForImageClassification as MLPForImageClassification
    from .data.own_files import load_classification as load_classification
    from .data.synthetic import soft_target_data as soft_target_data
    from .data.synthetic import synthetic_classification as synthetic_classification
    from .data.tensor_rows import as_tensors as as_tensors
    from .data.tensor_rows import collate_tensors as collate_tensors
    from .data.tensor_rows import split_labelled as split_labelled
    from .diagnostics.memory import Memory as Memory
    from .diagnostics.memory import estimate_memory as estimate_memory
    from .losses.calibration import fit_temperature as fit_temperature
    from .losses.distributions import KLDivergenceLoss as KLDivergenceLoss
    from .losses.distributions import entropy as entropy
    from .losses.distributions import kl_bernoulli as kl_bernoulli
    from .losses.distributions import kl_categorical as kl_categorical
    from .losses.distributions import kl_diagonal_gaussian as kl_diagonal_gaussian
    from .losses.distributions import kl_full_gaussian as kl_full_gaussian
    from .losses.distributions import kl_gaussian as kl_gaussian
    from .losses.distributions import kl_to_standard_normal as kl_to_standard_normal
    from .losses.distributions import monte_carlo_kl as monte_carlo_kl
    from .losses.distributions import soft_cross_entropy as soft_cross_entropy
    from .losses.divergences import DIVERGENCES as DIVERGENCES
    from .losses.divergences import dkd as dkd
    from .losses.divergences import entropy_switch as entropy_switch
    from .losses.divergences import forward_kl as forward_kl
    from .losses.divergences import jsd as jsd
    from .losses.divergences import logit_mse as logit_mse
    from .losses.divergences import reverse_kl as reverse_kl
    from .losses.divergences import skew_forward_kl as skew_forward_kl
    from .losses.divergences import skew_reverse_kl as skew_reverse_kl
    from .losses.divergences import symmetric_kl as symmetric_kl
    from .losses.divergences import total_variation as total_variation
    from .losses.fused_linear import FusedLoss as FusedLoss
    from .losses.fused_linear import fused_linear_distillation as fused_linear_distillation
    from .losses.fused_linear import fused_linear_distillation_plain as fused_linear_distillation_plain
    from .losses.modules import DistillationLoss as DistillationLoss
    from .losses.modules import SoftTargetLoss as SoftTargetLoss
    from .report.comparison import build_report as build_report
    from .report.comparison import print_table as print_table
    from .report.metrics import Accuracy as Accuracy
    from .report.metrics import ExpectedCalibrationError as ExpectedCalibrationError
    from .report.metrics import KLToTeacher as KLToTeacher
    from .report.metrics import NegativeLogLikelihood as NegativeLogLikelihood
    from .report.metrics import SimilarityCorrelation as SimilarityCorrelation
    from .report.metrics import TeacherAgreement as TeacherAgreement
    from .report.metrics import TeacherOverlap as TeacherOverlap
    from .report.metrics import classification_metrics as classification_metrics
    from .report.runs import load_run as load_run
    from .report.runs import save_predictions as save_predictions
    from .teachers.alignment import align_teacher_tokens as align_teacher_tokens
    from .teachers.columns import TeacherCollator as TeacherCollator
    from .teachers.columns import add_teacher_inputs as add_teacher_inputs
    from .teachers.students import student_from_teacher as student_from_teacher
    from .trainer import DistillationMixin as DistillationMixin
    from .trainer import DistillationTrainer as DistillationTrainer
    from .trainer import Seq2SeqDistillationTrainer as Seq2SeqDistillationTrainer
    from .training.arguments import DistillationArguments as DistillationArguments
    from .training.arguments import DistillationTrainingArguments as DistillationTrainingArguments
    from .training.arguments import Seq2SeqDistillationTrainingArguments as Seq2SeqDistillationTrainingArguments
    from .training.checkpoints import ResumableInterrupt as ResumableInterrupt
    from .training.checkpoints import newest_resumable as newest_resumable
    from .training.parse import parse_args as parse_args

__version__ = "0.1.0"

_HOME = {
    "cache.cached_teacher": ["CachedTeacher"],
    "data.mlp": ["MLPConfig", "MLPForImageClassification"],
    "data.own_files": ["load_classification"],
    "data.synthetic": ["soft_target_data", "synthetic_classification"],
    "data.tensor_rows": ["as_tensors", "collate_tensors", "split_labelled"],
    "diagnostics.memory": ["Memory", "estimate_memory"],
    "losses.calibration": ["fit_temperature"],
    "losses.distributions": [
        "entropy",
        "kl_bernoulli",
        "kl_categorical",
        "kl_diagonal_gaussian",
        "kl_full_gaussian",
        "kl_gaussian",
        "kl_to_standard_normal",
        "KLDivergenceLoss",
        "monte_carlo_kl",
        "soft_cross_entropy",
    ],
    "losses.divergences": [
        "DIVERGENCES",
        "dkd",
        "entropy_switch",
        "forward_kl",
        "jsd",
        "logit_mse",
        "reverse_kl",
        "skew_forward_kl",
        "skew_reverse_kl",
        "symmetric_kl",
        "total_variation",
    ],
    "losses.fused_linear": ["FusedLoss", "fused_linear_distillation", "fused_linear_distillation_plain"],
    "losses.modules": ["DistillationLoss", "SoftTargetLoss"],
    "report.comparison": ["build_report", "print_table"],
    "report.metrics": [
        "Accuracy",
        "ExpectedCalibrationError",
        "KLToTeacher",
        "NegativeLogLikelihood",
        "SimilarityCorrelation",
        "TeacherAgreement",
        "TeacherOverlap",
        "classification_metrics",
    ],
    "report.runs": ["load_run", "save_predictions"],
    "teachers.alignment": ["align_teacher_tokens"],
    "teachers.columns": ["TeacherCollator", "add_teacher_inputs"],
    "teachers.students": ["student_from_teacher"],
    "trainer": ["DistillationMixin", "DistillationTrainer", "Seq2SeqDistillationTrainer"],
    "training.arguments": [
        "DistillationArguments",
        "DistillationTrainingArguments",
        "Seq2SeqDistillationTrainingArguments",
    ],
    "training.checkpoints": ["ResumableInterrupt", "newest_resumable"],
    "training.parse": ["parse_args"],
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
