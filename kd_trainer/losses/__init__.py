"""From logits, or hidden states, to nats: formulas, masks, denominators, and the fused loss in torch."""

from .calibration import fit_temperature
from .distributions import (
    KLDivergenceLoss,
    kl_bernoulli,
    kl_categorical,
    kl_diagonal_gaussian,
    kl_full_gaussian,
    kl_gaussian,
    kl_to_standard_normal,
    monte_carlo_kl,
)
from .divergences import (
    DIVERGENCES,
    dkd,
    entropy,
    entropy_switch,
    forward_kl,
    jsd,
    logit_mse,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    symmetric_kl,
    total_variation,
)
from .features import EMBEDDING_LOSSES, POOLINGS, cosine_loss, normalised, pool, similarity_correlation, squared_error
from .fused_arguments import chunk_rows, group_rows
from .fused_linear import FusedLoss, fused_linear_distillation, fused_linear_distillation_plain, release_memory
from .modules import DistillationLoss, SoftTargetLoss
from .projection import OutputProjection, cap_and_scale, cast_as_autocast
from .reductions import IGNORE_INDEX, bad_rows, divide, is_bad, select_positions, wrong_labels
from .small_batch import is_small, small_batch_loss
from .sparse_targets import Samples, TopK, draw_samples, sampled_forward_kl, top_k, top_k_divergence

__all__ = [
    "DIVERGENCES",
    "EMBEDDING_LOSSES",
    "IGNORE_INDEX",
    "POOLINGS",
    "DistillationLoss",
    "FusedLoss",
    "KLDivergenceLoss",
    "OutputProjection",
    "Samples",
    "SoftTargetLoss",
    "TopK",
    "bad_rows",
    "cap_and_scale",
    "cast_as_autocast",
    "chunk_rows",
    "cosine_loss",
    "divide",
    "dkd",
    "draw_samples",
    "entropy",
    "entropy_switch",
    "fit_temperature",
    "forward_kl",
    "fused_linear_distillation",
    "fused_linear_distillation_plain",
    "group_rows",
    "is_bad",
    "is_small",
    "jsd",
    "kl_bernoulli",
    "kl_categorical",
    "kl_diagonal_gaussian",
    "kl_full_gaussian",
    "kl_gaussian",
    "kl_to_standard_normal",
    "logit_mse",
    "monte_carlo_kl",
    "normalised",
    "pool",
    "release_memory",
    "reverse_kl",
    "sampled_forward_kl",
    "select_positions",
    "similarity_correlation",
    "skew_forward_kl",
    "skew_reverse_kl",
    "small_batch_loss",
    "soft_cross_entropy",
    "squared_error",
    "symmetric_kl",
    "top_k",
    "top_k_divergence",
    "total_variation",
    "wrong_labels",
]
