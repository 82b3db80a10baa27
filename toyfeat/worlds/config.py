"""Configuration of a synthetic world, with the names of SAELens."""

from typing import NamedTuple

import numpy as np

from toyfeat.worlds.torch_stream import torch_normal, torch_uniform

_SEED_OFFSETS = {"std_firing_magnitudes": 1, "mean_firing_magnitudes": 2}
"""What SAELens adds to the seed of a world for each field that it draws."""


class ZipfianFiring(NamedTuple):
    """Probabilities like ``1 / rank ** exponent``, scaled to the range."""

    exponent: float = 1.0
    max_prob: float = 0.3
    min_prob: float = 0.01


class LinearFiring(NamedTuple):
    """Probabilities in equal steps from ``max_prob`` down to ``min_prob``."""

    max_prob: float = 0.3
    min_prob: float = 0.01


class RandomFiring(NamedTuple):
    """Probabilities drawn uniformly from the range."""

    max_prob: float = 0.5
    min_prob: float = 0.01


class ConstantMagnitude(NamedTuple):
    """Magnitude that all features share; equivalent to a plain number."""

    value: float = 1.0


class LinearMagnitude(NamedTuple):
    """Magnitudes in equal steps from the first to the last feature."""

    start: float
    end: float


class ExponentialMagnitude(NamedTuple):
    """Magnitudes in equal ratios from the first to the last feature."""

    start: float
    end: float


class FoldedNormalMagnitude(NamedTuple):
    """Magnitude ``|mean + std * normal|``, drawn per feature, optionally clipped."""

    mean: float = 0.0
    std: float = 0.1
    min_value: float | None = None
    max_value: float | None = None


class HierarchyConfig(NamedTuple):
    """Trees of features; see :func:`synthetic_world`."""

    total_root_nodes: int = 100
    branching_factor: int | tuple[int, int] = 100
    max_depth: int = 2
    mutually_exclusive_portion: float = 0.0
    mutually_exclusive_min_depth: int = 0
    mutually_exclusive_max_depth: int | None = None
    compensate_probabilities: bool = False
    scale_children_by_parent: bool = False


class OrthogonalizationConfig(NamedTuple):
    """Adam steps that make feature vectors more orthogonal."""

    num_steps: int = 200
    lr: float = 0.01
    chunk_size: int = 1024


class CorrelationConfig(NamedTuple):
    """Gaussian copula: rank and standard deviation of the feature correlations."""

    rank: int = 32
    correlation_scale: float = 0.1
    seed: int | None = None


Firing = ZipfianFiring | LinearFiring | RandomFiring
Magnitude = (
    float
    | ConstantMagnitude
    | LinearMagnitude
    | ExponentialMagnitude
    | FoldedNormalMagnitude
)


class WorldConfig(NamedTuple):
    """Configuration of a world, with the fields of SAELens' ``SyntheticModelConfig``.

    ``seed`` determines random firing probabilities and folded normal magnitudes, here
    and in SAELens.
    """

    num_features: int
    hidden_dim: int
    firing_probability: Firing = ZipfianFiring()
    hierarchy: HierarchyConfig | None = None
    orthogonalization: OrthogonalizationConfig | None = None
    correlation: CorrelationConfig | None = None
    std_firing_magnitudes: Magnitude = 0.0
    mean_firing_magnitudes: Magnitude = 1.0
    bias: float = 1.0
    seed: int | None = None


def base_probabilities(config: WorldConfig) -> np.ndarray:
    """Compute firing probabilities before compensation, ``[F]`` float64."""
    firing, num = config.firing_probability, config.num_features
    low, high = firing.min_prob, firing.max_prob
    if not 0 < low <= high <= 1:
        raise ValueError(
            "synthetic_world: wanted 0 < min_prob <= max_prob <= 1, got "
            f"min_prob={low}, max_prob={high}"
        )
    if isinstance(firing, RandomFiring):
        # As torch draws them, from the seed of the file.
        seed = _require_seed(config, "RandomFiring")
        return low + (high - low) * torch_uniform(seed, num).astype(np.float64)
    if num == 1:
        return np.asarray([high])
    if isinstance(firing, LinearFiring):
        return np.linspace(high, low, num)
    if firing.exponent <= 0:
        raise ValueError(
            f"synthetic_world: exponent must be positive, got {firing.exponent}"
        )
    # Zipf's law, stretched to the largest and the smallest probability.
    shape = np.arange(1, num + 1) ** -float(firing.exponent)
    return low + (high - low) * (shape - shape[-1]) / (shape[0] - shape[-1])


def magnitudes(config: WorldConfig, field: str) -> np.ndarray:
    """Compute ``mean_firing_magnitudes`` or ``std_firing_magnitudes``, ``[F]`` float64.

    Args:
      config: of the world.
      field: name of the one or the other.
    """
    value, num = getattr(config, field), config.num_features
    if isinstance(value, (int, float)):
        value = ConstantMagnitude(float(value))
    if isinstance(value, ConstantMagnitude):
        return np.full(num, value.value, np.float64)
    if isinstance(value, FoldedNormalMagnitude):
        # SAELens draws each field by a seed of its own.
        offset = _SEED_OFFSETS[field]
        seed = _require_seed(config, f"FoldedNormalMagnitude as {field}") + offset
        drawn = np.abs(value.mean + value.std * torch_normal(seed, num))
        least = 0.0 if value.min_value is None else value.min_value
        most = np.inf if value.max_value is None else value.max_value
        return np.clip(drawn.astype(np.float64), least, most)
    if value.start <= 0 or value.end <= 0:
        raise ValueError(
            f"synthetic_world: {field} must start and end above 0, got {value}"
        )
    # From start to end over the features, arithmetically or geometrically.
    steps = np.arange(num) / max(num - 1, 1)
    if isinstance(value, LinearMagnitude):
        return value.start + (value.end - value.start) * steps
    return value.start * (value.end / value.start) ** steps


def _require_seed(config: WorldConfig, who: str) -> int:
    """Return the seed of a configuration, or raise a ValueError if it has none."""
    if config.seed is None:
        raise ValueError(f"synthetic_world: {who} is drawn and needs a seed, got None")
    return config.seed
