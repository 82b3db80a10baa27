"""Clusters of activations: k-means, and which centre is nearest."""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.checks import check_array, check_int, check_key
from toyfeat.meshes import everywhere, run_automatic
from toyfeat.types import Array


def nearest(acts: Array, centres: Array) -> Array:
    """Mark the nearest centre of every activation.

    Args:
      acts: ``[..., D]``.
      centres: ``[E, D]``.

    Returns:
      ``[..., E]``, 1.0 at the nearest centre and 0.0 at all others.

    Example:
      >>> import jax.numpy as jnp
      >>> nearest(jnp.array([[3.0], [-1.0]]), jnp.array([[-2.0], [2.0]])).tolist()
      [[0.0, 1.0], [1.0, 0.0]]
    """
    dtype = jnp.result_type(float)
    acts, centres = jnp.asarray(acts, dtype), jnp.asarray(centres, dtype)
    # |a - c|^2 without |a|^2, which is the same for all centres.
    products = jnp.einsum(
        "...d,ed->...e", acts, centres, precision=jax.lax.Precision.HIGHEST
    )
    sizes = jnp.sum(centres**2, axis=1)
    scores = products - jnp.expand_dims(sizes / 2, tuple(range(acts.ndim - 1)))
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), len(centres), dtype=dtype)


def cluster_centres(
    key: Array, acts: Array, clusters: int, *, steps: int = 30
) -> Array:
    """Cluster activations by k-means.

    Args:
      key: random key of the first centres.
      acts: ``[N, D]``.
      clusters: number ``E`` of clusters, at most ``N``.
      steps: of Lloyd's algorithm.

    Returns:
      Centres ``[E, D]``; a cluster without activations keeps its centre.

    Raises:
      ValueError: if ``acts`` are not ``[N, D]``, or sizes are out of range.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> acts = jnp.array([[1.0], [1.5], [-1.0], [-1.5]])
      >>> sorted(cluster_centres(jax.random.key(0), acts, 2).tolist())
      [[-1.25], [1.25]]

    References:
      Lloyd (1982), "Least squares quantization in PCM"; Arthur and Vassilvitskii
      (2007), "k-means++", for the first centres.
    """
    who = "cluster_centres"
    check_key(who, key)
    check_array(who, "acts", acts, hint="tap(...)[site].acts")
    if acts.ndim != 2 or not acts.size:
        raise ValueError(
            f"{who}: acts must be [N, D], got shape {acts.shape}; flatten batch and "
            "positions"
        )
    clusters = check_int(who, "clusters", clusters, most=acts.shape[0])
    steps = check_int(who, "steps", steps, least=0)
    acts = jnp.asarray(acts, jnp.result_type(float))
    return _lloyd(key, acts, clusters=clusters, steps=steps)


@partial(jax.jit, static_argnames=("clusters", "steps"))
def _lloyd(key: Array, acts: Array, *, clusters: int, steps: int) -> Array:
    """Find the centres, on every device of a mesh."""
    move = partial(_move_centres, clusters=clusters, steps=steps)
    return run_automatic(move, everywhere, key, acts)


def _move_centres(key: Array, acts: Array, *, clusters: int, steps: int) -> Array:
    """Draw first centres far from each other, and move each to the mean of its own."""
    centres = _first_centres(key, acts, clusters)

    def step(centres: Array, _: None) -> tuple[Array, None]:
        member = nearest(acts, centres)
        num = jnp.sum(member, axis=0)[:, None]
        means = jnp.einsum("ne,nd->ed", member, acts) / jnp.maximum(num, 1)
        return jnp.where(num > 0, means, centres), None

    return jax.lax.scan(step, centres, None, length=steps)[0]


def _first_centres(key: Array, acts: Array, clusters: int) -> Array:
    """Draw activations by their squared distance to the nearest one drawn before."""
    keys = jax.random.split(key, clusters)
    first = acts[jax.random.randint(keys[0], (), 0, len(acts))]
    centres = jnp.broadcast_to(first[None], (clusters, acts.shape[1]))

    def draw(carry: tuple[Array, Array], key_and_index: tuple[Array, Array]):
        centres, distance = carry
        key, index = key_and_index
        chosen = acts[jax.random.categorical(key, jnp.log(distance))]
        centres = centres.at[index].set(chosen)
        far = jnp.sum((acts - chosen[None]) ** 2, axis=1)
        return (centres, jnp.minimum(distance, far)), None

    distance = jnp.sum((acts - first[None]) ** 2, axis=1)
    (centres, _), _ = jax.lax.scan(
        draw, (centres, distance), (keys[1:], jnp.arange(1, clusters))
    )
    return centres
