"""Metrics: found features against the truth, the data and the model itself."""

from toyfeat.dictionary import attribution_l0
from toyfeat.metrics.ablation import ablation_curve, edge_ablation, edges_needed
from toyfeat.metrics.detection import (
    Classification,
    feature_uniqueness,
    latent_classification,
)
from toyfeat.metrics.matching import Match, match_features, random_coverage
from toyfeat.metrics.mechanisms import (
    MechanismMatch,
    match_mechanisms,
    mechanism_kinds,
)
from toyfeat.metrics.planted import TaskScores, mean_active_features, score_task
from toyfeat.metrics.splicing import (
    Faithfulness,
    attribution_faithfulness,
    ce_recovered,
    splice,
)
from toyfeat.metrics.subspaces import (
    output_preserved,
    principal_angles,
    r_squared,
    variance_explained,
)
from toyfeat.train.outliers import OutlierDims, outlier_dims

__all__ = [
    "Classification",
    "Faithfulness",
    "Match",
    "MechanismMatch",
    "OutlierDims",
    "TaskScores",
    "ablation_curve",
    "attribution_faithfulness",
    "attribution_l0",
    "ce_recovered",
    "edge_ablation",
    "edges_needed",
    "feature_uniqueness",
    "latent_classification",
    "match_features",
    "match_mechanisms",
    "mean_active_features",
    "mechanism_kinds",
    "outlier_dims",
    "output_preserved",
    "principal_angles",
    "r_squared",
    "random_coverage",
    "score_task",
    "splice",
    "variance_explained",
]
