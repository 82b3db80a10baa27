"""Lenses: what a residual stream says, by the model's own derivatives."""

from toyfeat.lens.averages import Estimate
from toyfeat.lens.clusters import cluster_centres
from toyfeat.lens.family import (
    clustered_lens,
    contrast_lens,
    jacobian_lens,
    load,
    logit_lens,
    second_moment_lens,
)
from toyfeat.lens.fitting import FitProgress, fit
from toyfeat.lens.interventions import ablate, random_control, steer, swap
from toyfeat.lens.jacobians import mean_jacobian, second_moment
from toyfeat.lens.maps import LensMap
from toyfeat.lens.model import LensModel, check_model, from_decoder, from_probed
from toyfeat.lens.reading import Lens
from toyfeat.lens.shrinkage import shrunken
from toyfeat.lens.sketches import sketched_jacobian
from toyfeat.lens.tuned import output_divergence, tuned_lens

__all__ = [
    "Estimate",
    "FitProgress",
    "Lens",
    "LensMap",
    "LensModel",
    "ablate",
    "check_model",
    "cluster_centres",
    "clustered_lens",
    "contrast_lens",
    "fit",
    "from_decoder",
    "from_probed",
    "jacobian_lens",
    "load",
    "logit_lens",
    "mean_jacobian",
    "output_divergence",
    "random_control",
    "second_moment",
    "second_moment_lens",
    "shrunken",
    "sketched_jacobian",
    "steer",
    "swap",
    "tuned_lens",
]
