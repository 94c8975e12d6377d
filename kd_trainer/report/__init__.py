"""The results of runs: metrics, comparison, plots."""

from .comparison import build_report, print_table
from .runs import load_run, save_predictions

__all__ = ["build_report", "load_run", "print_table", "save_predictions"]
