"""Synthetic worlds: sparse features of known directions in superposition."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from toyfeat.checks import check_int
from toyfeat.types import Array
from toyfeat.worlds.config import (
    CorrelationConfig,
    Firing,
    FoldedNormalMagnitude,
    HierarchyConfig,
    LinearMagnitude,
    Magnitude,
    OrthogonalizationConfig,
    WorldConfig,
    ZipfianFiring,
    base_probabilities,
    magnitudes,
)
from toyfeat.worlds.hierarchy import Hierarchy, compensation, grow_trees, hierarchy

_ZIPFIAN = ZipfianFiring()
_TREES_OFFSET = 3  # of the seed of the trees, in SAELens
_FEATURES_PER_TREE = 128  # of SynthSAEBench-16k: 16384 features, 128 trees
_SEEDS = 2**31 - 10
"""Number of seeds: of 31 bits, with room for the offsets of up to 3 that are added."""

# Least part of a feature's variance in the copula that it shares with no other, so
# that the firing threshold over its square root stays finite.
_MIN_OWN_VARIANCE = 0.01


@flax.struct.dataclass
class World:
    """Synthetic world: features and how they fire, as a pytree.

    Attributes:
      feature_vectors: ``[F, D]``, unit rows.
      bias: ``[D]``, added to every activation.
      firing_probabilities: ``[F]``, before the hierarchy is applied.
      mean_firing_magnitudes: ``[F]``, means of the normals that are cut at 0.
      std_firing_magnitudes: ``[F]``, standard deviations of these normals.
      correlation_factor: ``[F, r]`` factor of the copula, or ``None``.
      correlation_diag: ``[F]`` own variances of the features, or ``None``.
      hierarchy: parents and mutually exclusive siblings, or ``None``.
      config: configuration of the world, which files store (static).
    """

    feature_vectors: Array
    bias: Array
    firing_probabilities: Array
    mean_firing_magnitudes: Array
    std_firing_magnitudes: Array
    correlation_factor: Array | None = None
    correlation_diag: Array | None = None
    hierarchy: Hierarchy | None = None
    config: WorldConfig | None = flax.struct.field(pytree_node=False, default=None)


def synthetic_world(
    key: Array,
    features: int,
    dim: int,
    *,
    firing_probability: Firing = _ZIPFIAN,
    hierarchy: HierarchyConfig | None = None,
    orthogonalization: OrthogonalizationConfig | None = None,
    correlation: CorrelationConfig | None = None,
    std_firing_magnitudes: Magnitude = 0.0,
    mean_firing_magnitudes: Magnitude = 1.0,
    bias: float = 1.0,
) -> World:
    """Create a world of the kind that SAELens' ``SyntheticModel`` describes.

    Feature ``i`` fires where ``x_i > Phi^-1(1 - p_i)`` for a standard normal ``x``
    with covariance ``factor factor^T + diag``.  Then ``code_i = relu(mean_i + std_i *
    normal)``.  From the roots down, one of the exclusive siblings that fire is kept,
    with equal chances, and a child whose parent is 0 becomes 0.

    Args:
      key: a key that is not traced; the trees are built in Python.
      features: number of features ``F``.
      dim: width ``D`` of the activations.
      firing_probability: distribution of firing probabilities, in descending order.
      hierarchy: trees over the first features, numbered level by level.
      orthogonalization: Adam steps on the squared cosines; ``None`` leaves random
        unit vectors.
      correlation: settings of the copula; ``None`` for independent features.
      std_firing_magnitudes: a number, or a distribution over features.
      mean_firing_magnitudes: a number, or a distribution over features.
      bias: norm of the bias, 0 for none.

    Returns:
      :class:`World`, float32.

    Raises:
      ValueError: if a size or a setting is out of range.

    Example:
      >>> import jax
      >>> from toyfeat.worlds import CorrelationConfig, synthetic_world, world_batch
      >>> world = synthetic_world(
      ...     jax.random.key(0), 20, 8, correlation=CorrelationConfig(rank=2)
      ... )
      >>> acts, codes = world_batch(jax.random.key(1), world, 5)
      >>> acts.shape, codes.shape
      ((5, 8), (5, 20))

    References:
      Chanin and Garriga-Alonso, SynthSAEBench, arXiv 2602.14687.
    """
    features = check_int("synthetic_world", "features", features)
    dim = check_int("synthetic_world", "dim", dim)
    # The seed is all that files keep of what is drawn.
    parts = jax.random.split(key, 4)
    seed = int(jax.random.randint(parts[0], (), 0, _SEEDS))
    config = WorldConfig(
        num_features=features,
        hidden_dim=dim,
        firing_probability=firing_probability,
        hierarchy=hierarchy,
        orthogonalization=orthogonalization,
        correlation=correlation,
        std_firing_magnitudes=std_firing_magnitudes,
        mean_firing_magnitudes=mean_firing_magnitudes,
        bias=float(bias),
        seed=seed,
    )
    # Unit feature vectors, made more orthogonal if that is asked for.
    vectors = _draw_directions(parts[1], features, dim)
    if orthogonalization is not None:
        vectors = orthogonalize(vectors, orthogonalization)
    # The bias, and what makes features fire together.
    offset = bias * _draw_directions(parts[2], 1, dim)[0]
    shared = _draw_copula(parts[3], features, correlation)
    probabilities, trees = firing(config)
    return assemble_world(config, vectors, offset, probabilities, shared, trees)


def firing(config: WorldConfig) -> tuple[np.ndarray, Hierarchy | None]:
    """Compute firing probabilities (compensated) and hierarchy of a configuration."""
    probabilities, trees = base_probabilities(config), config.hierarchy
    if trees is None:
        return probabilities, None
    # SAELens draws the trees by a seed of their own.
    seed = None if config.seed is None else config.seed + _TREES_OFFSET
    parents, groups = grow_trees(trees, config.num_features, seed)
    if trees.compensate_probabilities:
        factor = compensation(probabilities, parents, groups)
        probabilities = np.minimum(probabilities * factor, 1.0)
    scaled = (parents >= 0) & trees.scale_children_by_parent
    return probabilities, hierarchy(parents, groups, scaled)


def assemble_world(
    config: WorldConfig,
    vectors: Array,
    bias: Array,
    probabilities: np.ndarray,
    shared: tuple[Array, Array] | None,
    trees: Hierarchy | None,
) -> World:
    """Assemble a world from arrays, with the magnitudes of its configuration.

    Raises:
      ValueError: if a parent that scales its children has a mean that is not positive.
    """
    mean = magnitudes(config, "mean_firing_magnitudes")
    if trees is not None:
        # Children are scaled by their parent over its mean, which must not be 0.
        scaling = np.asarray(trees.parents)[np.asarray(trees.scaled)]
        if (mean[scaling] <= 0).any():
            raise ValueError(
                "synthetic_world: scale_children_by_parent wants parents with mean "
                f"magnitudes above 0, got {mean[scaling].min()}"
            )
    std = magnitudes(config, "std_firing_magnitudes")
    return World(
        feature_vectors=vectors,
        bias=bias,
        firing_probabilities=jnp.asarray(probabilities, jnp.float32),
        mean_firing_magnitudes=jnp.asarray(mean, jnp.float32),
        std_firing_magnitudes=jnp.asarray(std, jnp.float32),
        correlation_factor=None if shared is None else shared[0],
        correlation_diag=None if shared is None else shared[1],
        hierarchy=trees,
        config=config,
    )


def synth_sae_bench(key: Array, *, features: int = 16384, dim: int = 768) -> World:
    """Create the world of SynthSAEBench-16k (second version), or a smaller one.

    There is one tree for every 128 features: ``features=512, dim=64`` has 4.

    Args:
      key: random key; every key gives a world of the same statistics.
      features: number of features, at least 128.
      dim: width of the activations.

    Returns:
      :class:`World`.

    Raises:
      ValueError: if there are too few features for a tree.

    References:
      Chanin and Garriga-Alonso, SynthSAEBench, arXiv 2602.14687.
    """
    return synthetic_world(
        key,
        features,
        dim,
        firing_probability=ZipfianFiring(0.5, 0.4, 5e-4),
        hierarchy=HierarchyConfig(
            total_root_nodes=features // _FEATURES_PER_TREE,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(100, 3e-4),
        correlation=CorrelationConfig(25, 0.1),
        mean_firing_magnitudes=LinearMagnitude(5.0, 4.0),
        std_firing_magnitudes=FoldedNormalMagnitude(0.5, 0.5),
        bias=0.5,
    )


def _draw_directions(key: Array, num: int, dim: int) -> Array:
    """Draw unit vectors ``[num, dim]``, uniform on the sphere."""
    return _normalize_rows(jax.random.normal(key, (num, dim)))


def _normalize_rows(rows: Array) -> Array:
    """Scale rows to unit length."""
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def orthogonalize(vectors: Array, config: OrthogonalizationConfig) -> Array:
    """Minimize squared cosines of unit vectors by Adam, with a penalty on lengths."""
    # Chunks of rows bound the memory to ``chunk * F`` cosines; the last one is filled.
    num, width = len(vectors), min(config.chunk_size, len(vectors))
    starts = jnp.arange(0, num, width)
    rows = jnp.arange(len(starts) * width).reshape(-1, width)
    optimizer = optax.adam(config.lr)

    def gradient(vectors: Array) -> Array:
        """Gradient of the squared dot products + F times (squared length - 1)^2."""

        def chunk(index: Array) -> Array:
            # d/dv of sum_{i != j} (v_i . v_j)^2, then of num * (|v|^2 - 1)^2.
            part = vectors.at[index].get(mode="fill", fill_value=0.0)
            lengths = jnp.sum(part**2, axis=1, keepdims=True)
            across = (part @ vectors.T) @ vectors - lengths * part
            return 4 * across + 4 * num * (lengths - 1) * part

        return jax.lax.map(chunk, rows).reshape(-1, vectors.shape[1])[:num]

    def step(_: Array, carry: tuple) -> tuple:
        vectors, state = carry
        change, state = optimizer.update(gradient(vectors), state)
        return vectors + change, state

    start = vectors, optimizer.init(vectors)
    with jax.numpy_dtype_promotion("standard"):  # as optax is written
        return _normalize_rows(jax.lax.fori_loop(0, config.num_steps, step, start)[0])


def _draw_copula(
    key: Array, features: int, config: CorrelationConfig | None
) -> tuple[Array, Array] | None:
    """Draw factor ``[F, r]`` and own variances ``[F]`` of a copula, if there is one."""
    if config is None:
        return None
    if config.rank < 1 or config.correlation_scale < 0:
        raise ValueError(
            "synthetic_world: correlation wants a rank of at least 1 and a scale of at "
            f"least 0, got {config.rank} and {config.correlation_scale}"
        )
    # Shared and own variance of a feature sum to 1, so that its threshold is right.
    factor = config.correlation_scale * jax.random.normal(key, (features, config.rank))
    square = jnp.sum(factor**2, axis=1, keepdims=True)
    most = 1 - _MIN_OWN_VARIANCE
    shrink = jnp.sqrt(most / jnp.maximum(square, most))  # only rows that are too long
    factor = factor * shrink
    return factor, 1 - jnp.sum(factor**2, axis=1)
