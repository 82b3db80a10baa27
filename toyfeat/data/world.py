"""Synthetic worlds: sparse features of known directions in superposition."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from toyfeat.data.config import (
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
from toyfeat.data.hierarchy import Hierarchy, compensation, grown, hierarchy
from toyfeat.types import Array

_ZIPFIAN = ZipfianFiring()
_LEAST_OWN = 0.01  # of a feature's variance in the copula, that no other shares


@flax.struct.dataclass
class World:
    """Features and how they fire; a pytree, to be passed through ``jit``.

    Attributes:
      feature_vectors: ``[F, D]``, unit rows.
      bias: ``[D]``, added to every activation.
      firing_probabilities: ``[F]``, before the hierarchy has taken any away.
      mean_firing_magnitudes: ``[F]``, of the normal that is cut at 0.
      std_firing_magnitudes: ``[F]``, of the same normal.
      correlation_factor: ``[F, r]`` of the copula, or ``None``.
      correlation_diag: ``[F]``, each feature's own variance, or ``None``.
      hierarchy: who fires only under whom, or ``None``.
      config: what it was made from, as files want it (static).
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
    """A world of the kind that SAELens' ``SyntheticModel`` describes.

    Feature ``i`` fires where ``x_i > Phi^-1(1 - p_i)`` for a standard normal ``x``
    with covariance ``factor factor^T + diag``.  Then ``code_i = relu(mean_i + std_i *
    normal)``; from the roots down, of exclusive siblings one that fires is kept, each
    with the same chance, and a child whose parent is 0 becomes 0.

    Args:
      key: a key that is not traced; the trees are built in Python.
      features: ``F``, how many.
      dim: ``D``, of the activations.
      firing_probability: how often a feature fires, in descending order.
      hierarchy: trees over the first features, numbered level by level.
      orthogonalization: Adam steps on the squared cosines; ``None`` leaves random
        unit vectors.
      correlation: of the copula; ``None`` for independent features.
      std_firing_magnitudes: a number, or per feature as described.
      mean_firing_magnitudes: likewise.
      bias: length of the bias, 0 for none.

    Returns:
      :class:`World`, float32.

    Raises:
      ValueError: if a size or a setting is out of range.

    Example:
      >>> import jax
      >>> from toyfeat.data import CorrelationConfig, synthetic_world, world_batch
      >>> world = synthetic_world(
      ...     jax.random.key(0), 20, 8, correlation=CorrelationConfig(rank=2)
      ... )
      >>> acts, codes = world_batch(jax.random.key(1), world, 5)
      >>> acts.shape, codes.shape
      ((5, 8), (5, 20))

    References:
      Chanin and Garriga-Alonso, SynthSAEBench, arXiv 2602.14687.
    """
    if features < 1 or dim < 1:
        raise ValueError(
            f"synthetic_world: wanted features and dim of at least 1, got {features} "
            f"and {dim}"
        )
    parts = jax.random.split(key, 4)
    seed = int(jax.random.randint(parts[0], (), 0, 2**31 - 10))
    config = WorldConfig(
        features,
        dim,
        firing_probability,
        hierarchy,
        orthogonalization,
        correlation,
        std_firing_magnitudes,
        mean_firing_magnitudes,
        float(bias),
        seed,
    )
    vectors = _unit(jax.random.normal(parts[1], (features, dim)))
    if orthogonalization is not None:
        vectors = apart(vectors, orthogonalization)
    along = _unit(jax.random.normal(parts[2], (1, dim)))[0]
    shared = None if correlation is None else _copula(parts[3], features, correlation)
    probabilities, trees = firing(config)
    return assembled(config, vectors, bias * along, probabilities, shared, trees)


def firing(config: WorldConfig) -> tuple[np.ndarray, Hierarchy | None]:
    """Probabilities before the hierarchy, and the hierarchy, of a configuration."""
    probabilities, trees = base_probabilities(config), config.hierarchy
    if trees is None:
        return probabilities, None
    seed = None if config.seed is None else config.seed + 3
    parents, groups = grown(trees, config.num_features, seed)
    if trees.compensate_probabilities:
        factor = compensation(probabilities, parents, groups)
        probabilities = np.minimum(probabilities * factor, 1.0)
    scaled = (parents >= 0) & trees.scale_children_by_parent
    return probabilities, hierarchy(parents, groups, scaled)


def assembled(
    config: WorldConfig,
    vectors: Array,
    bias: Array,
    probabilities: np.ndarray,
    shared: tuple[Array, Array] | None,
    trees: Hierarchy | None,
) -> World:
    """The world of these arrays, and of the magnitudes that its configuration says.

    Raises:
      ValueError: if a parent that scales its children has a mean that is not positive.
    """
    mean = magnitudes(config, "mean_firing_magnitudes")
    if trees is not None:
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
    """The recipe of SynthSAEBench-16k (second version), or of a smaller relative.

    There is one tree for every 128 features: ``features=512, dim=64`` has 4.

    Args:
      key: another key is another world of the same statistics.
      features: how many, at least 128.
      dim: of the activations.

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
            total_root_nodes=features // 128,
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


def _unit(rows: Array) -> Array:
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def apart(vectors: Array, config: OrthogonalizationConfig) -> Array:
    """Unit vectors after Adam steps on squared cosines, and lengths held at 1."""
    num, width = len(vectors), min(config.chunk_size, len(vectors))
    starts = jnp.arange(0, num, width)
    rows = jnp.arange(len(starts) * width).reshape(-1, width)
    optimizer = optax.adam(config.lr)

    def slope(vectors: Array) -> Array:
        """Of sum of squared products + F times (squared length - 1)^2."""

        def chunk(index: Array) -> Array:
            mine = vectors.at[index].get(mode="fill", fill_value=0.0)
            lengths = jnp.sum(mine**2, axis=1, keepdims=True)
            across = (mine @ vectors.T) @ vectors - lengths * mine
            return 4 * across + 4 * num * (lengths - 1) * mine

        return jax.lax.map(chunk, rows).reshape(-1, vectors.shape[1])[:num]

    def step(_: Array, carry: tuple) -> tuple:
        vectors, state = carry
        change, state = optimizer.update(slope(vectors), state)
        return vectors + change, state

    start = vectors, optimizer.init(vectors)
    with jax.numpy_dtype_promotion("standard"):  # as optax is written
        return _unit(jax.lax.fori_loop(0, config.num_steps, step, start)[0])


def _copula(
    key: Array, features: int, config: CorrelationConfig
) -> tuple[Array, Array]:
    if config.rank < 1 or config.correlation_scale < 0:
        raise ValueError(
            "synthetic_world: correlation wants a rank of at least 1 and a scale of at "
            f"least 0, got {config.rank} and {config.correlation_scale}"
        )
    factor = config.correlation_scale * jax.random.normal(key, (features, config.rank))
    square = jnp.sum(factor**2, axis=1, keepdims=True)
    most = 1 - _LEAST_OWN
    fitting = jnp.sqrt(most / jnp.maximum(square, most))
    factor = factor * fitting
    return factor, 1 - jnp.sum(factor**2, axis=1)
