"""Datasets and small models to start with."""

from .mlp import MLPConfig, MLPForImageClassification
from .own_files import load_classification
from .synthetic import soft_target_data, synthetic_classification
from .tensor_rows import as_tensors, collate_tensors, split_labelled

__all__ = [
    "MLPConfig",
    "MLPForImageClassification",
    "as_tensors",
    "collate_tensors",
    "load_classification",
    "soft_target_data",
    "split_labelled",
    "synthetic_classification",
]
