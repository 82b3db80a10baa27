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
from toyfeat.metrics.partition import (
    PartCosines,
    adversarial_error,
    alive_components,
    component_l0,
    dense_ci_error,
    identity_ci_error,
    mean_max_cosine,
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
    "PartCosines",
    "TaskScores",
    "ablation_curve",
    "adversarial_error",
    "alive_components",
    "attribution_faithfulness",
    "attribution_l0",
    "ce_recovered",
    "component_l0",
    "dense_ci_error",
    "edge_ablation",
    "edges_needed",
    "feature_uniqueness",
    "identity_ci_error",
    "latent_classification",
    "match_features",
    "match_mechanisms",
    "mean_active_features",
    "mean_max_cosine",
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
