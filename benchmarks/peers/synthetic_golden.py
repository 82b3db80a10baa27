"""Writes the worlds in tests/golden/synthetic, by SAELens itself.

    pip install torch sae-lens==6.54.12   # in an environment of its own
    python benchmarks/peers/synthetic_golden.py tests/golden/synthetic

Small worlds as SAELens saves them, and the means and variances of its own samples:
``samples.npz`` has for each feature the sums of firing, code and squared code.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens.synthetic import (
    ExponentialMagnitudeConfig,
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearFiringProbabilityConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from sae_lens.synthetic.firing_probabilities import RandomFiringProbabilityConfig

N = 400_000
TREES = {"compensate_probabilities": True, "scale_children_by_parent": True}
CASES = {
    "paths": dict(  # complete exclusive trees
        firing_probability=ZipfianFiringProbabilityConfig(0.5, 0.6, 0.02),
        hierarchy=HierarchyConfig(2, 3, 2, 1.0, **TREES),
        correlation=LowRankCorrelationConfig(3, 0.3),
        orthogonalization=OrthogonalizationConfig(20, 1e-3),
        mean_firing_magnitudes=LinearMagnitudeConfig(2.0, 1.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(0.5, 0.5),
        bias=0.5,
        seed=42,
    ),
    "ragged": dict(  # of several widths, some exclusive
        firing_probability=LinearFiringProbabilityConfig(0.5, 0.1),
        hierarchy=HierarchyConfig(3, (2, 4), 2, 0.5),
        mean_firing_magnitudes=ExponentialMagnitudeConfig(2.0, 0.5),
        std_firing_magnitudes=0.3,
        bias=False,
        seed=7,
    ),
    "plain": dict(
        firing_probability=RandomFiringProbabilityConfig(0.5, 0.1),
        correlation=LowRankCorrelationConfig(2, 0.6),
        seed=3,
    ),
}


def main(folder):
    """Make, save, load, sample."""
    for name, options in CASES.items():
        path = Path(folder) / name
        SyntheticModel(SyntheticModelConfig(32, 12, **options)).save(path)
        model = SyntheticModel.load_from_disk(path)
        torch.manual_seed(0)
        codes = model.activation_generator.sample(N).double()
        powers = torch.stack([(codes > 0).double(), codes, codes**2])
        together = (codes > 0).double()
        np.savez_compressed(
            path / "samples.npz",
            num=N,
            mean=powers.mean(1),
            var=powers.var(1),
            together=(together.T @ together / N).float(),
            std_firing_magnitudes=model.activation_generator.std_firing_magnitudes,
            mean_firing_magnitudes=model.activation_generator.mean_firing_magnitudes,
        )


if __name__ == "__main__":
    main(sys.argv[1])
