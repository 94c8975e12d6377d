"""Synthetic rows of features with known answers, for examples and benchmarks."""

from __future__ import annotations

import datasets
import numpy as np
import torch

from ..losses import IGNORE_INDEX
from ..validation import check_number
from .tensor_rows import UNLABELLED, as_dataset, check_count


def synthetic_classification(
    *,
    num_train: int = 500,
    num_validation: int = 500,
    num_test: int = 2000,
    num_unlabelled: int = 0,
    num_features: int = 784,
    num_classes: int = 10,
    signal: float = 0.5,
    label_noise: float = 0.0,
    seed: int = 42,
) -> datasets.DatasetDict:
    """x = signal * mean[label] + noise, with mean and noise drawn from N(0, 1) per feature.

    The class means are drawn once and shared by all splits. Every split has its own random stream, row after row: a
    larger split begins with the rows of a smaller one, and the size of one split changes no other.

    Args:
        num_train, num_validation, num_test: rows per split, each >= 1; default 500, 500, 2000.
        num_unlabelled: rows of a further split "unlabelled" whose labels are all -100; default 0 (no such split).
        num_features: F, >= 1; default 784.
        num_classes: C, >= 2; default 10.
        signal: the size of the class means against noise of size 1, >= 0; default 0.5, where with 784 features every
            model reaches 100%. At 0.15 few labels are not enough, and distillation shows.
        label_noise: probability that a TRAIN label is replaced by another class, in [0, 1]; default 0.
        seed: of all draws, a whole number >= 0; default 42.

    Returns:
        A DatasetDict of "train", "validation", "test" (and "unlabelled"), in torch format, with the columns
        `features`: `List(Value("float32"), length=num_features)` and `labels`: `Value("int64")`.

    Raises:
        ValueError, TypeError: an argument out of its range or of another type.

    Example:
        >>> data = synthetic_classification(num_train=20, num_unlabelled=5)
        >>> data["train"][:8]["features"].shape, data["unlabelled"][:3]["labels"].tolist()
        (torch.Size([8, 784]), [-100, -100, -100])
    """
    sizes = {"train": num_train, "validation": num_validation, "test": num_test, UNLABELLED: num_unlabelled}
    for split, size in sizes.items():
        check_count(f"num_{split}", size, low=0 if split == UNLABELLED else 1)
    check_count("num_features", num_features)
    check_count("num_classes", num_classes, low=2)
    check_number("signal", signal, low=0)
    check_number("label_noise", label_noise, low=0, high=1)
    check_count("seed", seed, low=0)

    means_stream, noise_stream, *split_streams = np.random.SeedSequence(seed).spawn(2 + len(sizes))
    means = np.random.default_rng(means_stream).standard_normal((num_classes, num_features), dtype=np.float32)
    splits = datasets.DatasetDict()
    for (split, size), stream in zip(sizes.items(), split_streams, strict=True):
        if size == 0:
            continue
        label_stream, feature_stream = stream.spawn(2)
        labels = np.random.default_rng(label_stream).integers(num_classes, size=size)
        features = np.random.default_rng(feature_stream).standard_normal((size, num_features), dtype=np.float32)
        features += np.float32(signal) * means[labels]
        if split == "train":
            draw = np.random.default_rng(noise_stream).random((size, 2))
            shift = 1 + (draw[:, 1] * (num_classes - 1)).astype(np.int64)  # 1 .. C-1: never the class itself
            labels = np.where(draw[:, 0] < label_noise, (labels + shift) % num_classes, labels)
        elif split == UNLABELLED:
            labels = np.full(size, IGNORE_INDEX)
        splits[split] = as_dataset({"features": features, "labels": labels.astype(np.int64)})
    return splits


def soft_target_data(
    num_examples: int = 100, num_features: int = 10, num_classes: int = 10, *, seed: int | None = 42
) -> datasets.Dataset:
    """Rows with a target distribution each: features from U(0, 1), soft_targets = softmax of U(0, 1) scores.

    There is no relation between the two, so a linear student has an optimum above 0, to compare
    a training run with: with the defaults the mean KL of the best linear model is 0.03233 nats.

    Args:
        num_examples: N, >= 1; default 100.
        num_features: F, >= 1; default 10.
        num_classes: C, >= 2; default 10.
        seed: a whole number >= 0, default 42; None draws from torch's global generator as it stands (one
            `torch.manual_seed(42)` before data and `torch.nn.Linear(10, 10)` then starts at 0.0735 nats).

    Returns:
        A Dataset in torch format with `features` (float32, length F) and `soft_targets` (float32, length C, rows sum
        to 1).

    Raises:
        ValueError, TypeError: an argument out of its range or of another type.

    Example:
        >>> soft_target_data()[:]["soft_targets"].shape
        torch.Size([100, 10])
    """
    check_count("num_examples", num_examples)
    check_count("num_features", num_features)
    check_count("num_classes", num_classes, low=2)
    generator = None
    if seed is not None:
        check_count("seed", seed, low=0)
        generator = torch.Generator().manual_seed(seed)
    features = torch.rand(num_examples, num_features, generator=generator)
    soft_targets = torch.rand(num_examples, num_classes, generator=generator).softmax(-1)
    return as_dataset({"features": features.numpy(), "soft_targets": soft_targets.numpy()})
