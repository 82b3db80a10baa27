"""Lenses: what a residual stream says, by the model's own derivatives."""

from toyfeat.lens.averages import Estimate
from toyfeat.lens.clusters import cluster_centres
from toyfeat.lens.jacobians import mean_jacobian, second_moment
from toyfeat.lens.model import LensModel, check_model, from_decoder, from_probed

__all__ = [
    "Estimate",
    "LensModel",
    "check_model",
    "cluster_centres",
    "from_decoder",
    "from_probed",
    "mean_jacobian",
    "second_moment",
]
