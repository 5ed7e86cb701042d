"""Metrics of sparse autoencoders: torchmetrics classes, matching of dictionaries, standard errors."""

from aen_lightning.metrics.matching import Matching, match_features, matched_cosine, unit_rows
from aen_lightning.metrics.reconstruction import (
    MSE,
    R2,
    Cosine,
    ExplainedVariance,
    L2Ratio,
    RelativeReconstructionBias,
    ShrinkageRatio,
    SquaredError,
    reconstruction_metrics,
)
from aen_lightning.metrics.sparsity import (
    ACTIVE_THRESHOLD,
    L0,
    L1,
    DeadFeatures,
    FeatureUse,
    density_histogram,
    firing_counts,
    sparsity_metrics,
    utilisation,
)
from aen_lightning.metrics.uncertainty import Estimate, estimate, finite, jackknife, jackknife_metric

__all__ = [
    "ACTIVE_THRESHOLD", "L0", "L1", "MSE", "R2", "Cosine", "DeadFeatures", "Estimate", "ExplainedVariance", "FeatureUse", "L2Ratio",
    "Matching", "RelativeReconstructionBias", "ShrinkageRatio", "SquaredError", "density_histogram", "estimate", "finite",
    "firing_counts", "jackknife", "jackknife_metric", "match_features", "matched_cosine", "reconstruction_metrics",
    "sparsity_metrics", "unit_rows", "utilisation",
]  # fmt: skip
