"""What a run produced: metrics, comparison, plots."""

from .comparison import build_report, print_table
from .metrics import (
    Accuracy,
    ExpectedCalibrationError,
    KLToTeacher,
    NegativeLogLikelihood,
    TeacherAgreement,
    classification_metrics,
)
from .runs import load_run, save_predictions

__all__ = [
    "Accuracy",
    "ExpectedCalibrationError",
    "KLToTeacher",
    "NegativeLogLikelihood",
    "TeacherAgreement",
    "build_report",
    "classification_metrics",
    "load_run",
    "print_table",
    "save_predictions",
]
