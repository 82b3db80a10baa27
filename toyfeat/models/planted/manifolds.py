"""Tasks whose activations have structure that the model does not read.

References:
  Chughtai and Bushnaq (2025), "Activation space interpretability may be doomed",
  examples 1, 2 and 3.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.models.planted import heads
from toyfeat.models.planted.heads import dot, dual, unit
from toyfeat.models.planted.task import Task, Truth
from toyfeat.types import Array, Params

_GRID = 4096  # points of the curve behind thresholds: 2.5e-4 of it between two

_WAVES = np.array([[1, 0], [0, 1], [1, 1], [1, -1]])  # turns of both angles of a torus


def ignored_structure(
    key: Array,
    *,
    dim: int = 56,
    features: int = 20,
    parts: int = 2,
    manifold: int = 8,
    probability: float = 0.05,
    size: float = 4.0,
    tilt: float = 1.0,
    threshold: float = 0.1,
) -> Task:
    """Plant a surface of large variance, and differences, that the model ignores.

    The activations are sparse sources times their writers, plus a point of a torus
    that lives in ``manifold`` dimensions and moves independently of them.  Writers
    lean into these dimensions, readers are orthogonal to them, and each reads the sum
    of ``parts`` sources, which the model does not tell apart.

    Args:
      key: random key of the task.
      dim: width ``D`` of the activations.
      features: ``F``; ``features * parts`` is at most ``dim - manifold``.
      parts: sources of a feature.
      manifold: dimensions of the surface, even.
      probability: of a source to be active.
      size: root mean square length of the surface, at most 1000; that of a writer's
        part outside of the surface's dimensions is 1.
      tilt: length of a writer's part in the surface's dimensions, at most 1000.
      threshold: under which a reader is silent, in 0 .. 0.5; codes are .5 at least.

    Returns:
      :class:`toyfeat.models.planted.Task`, ``ignored`` are the surface's dimensions; a
      feature's writer is the mean of its sources'.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.

    Example:
      >>> import jax
      >>> task = ignored_structure(jax.random.key(0))
      >>> inputs = task.sample(jax.random.key(1), 5)
      >>> task.probed(task.params, inputs, {})[0].shape
      (5, 20)
    """
    _check_surface(dim, features, parts, manifold, probability, size, tilt)
    heads.check_threshold("ignored_structure", threshold)
    sources = features * parts
    axes_key, rows_key, lean_key, mix_key = jax.random.split(key, 4)
    # The surface has dimensions of its own; readers are orthogonal to them.
    surface, others = jnp.split(heads.rotation(axes_key, dim), [manifold])
    plain = unit(dot(jax.random.normal(rows_key, (sources, dim - manifold)), others))
    readers = dual(plain).reshape(features, parts, dim).sum(1)
    # Writers lean into the surface, so that its variance hides them.
    writers = plain + tilt * _draw_leaning(lean_key, sources, surface)
    params = heads.head(mix_key, readers, threshold)
    # A pair of cosine and sine has mean square 1/2 per dimension.
    params |= {"writers": writers, "surface": size * surface * (2 / manifold) ** 0.5}
    # A feature is active where at least one of its sources is.
    frequency = jnp.full(features, 1 - (1 - probability) ** parts)
    return heads.make_task(
        "ignored structure",
        _on_surface,
        params,
        partial(_codes_and_angles, sources, probability),
        Truth(
            readers=readers,
            writers=writers.reshape(features, parts, dim).mean(1),
            frequency=frequency,
        ),
        ignored=surface,
        about=f"{features} features in {dim} dimensions, each a sum of {parts} sparse "
        f"sources, and a torus of {manifold} dimensions, {size:g} times as long as "
        "what is read of a source. The model reads neither the torus nor what tells "
        "the sources of a sum apart.",
        limits="Nothing that the model computes tells the sources of a sum apart.",
    )


def _draw_leaning(key: Array, sources: int, surface: Array) -> Array:
    """Draw unit vectors in the dimensions of a surface, one per source."""
    return dot(unit(jax.random.normal(key, (sources, len(surface)))), surface)


def _check_surface(
    dim: int,
    features: int,
    parts: int,
    manifold: int,
    probability: float,
    size: float,
    tilt: float,
) -> None:
    sizes = {"dim": dim, "features": features, "parts": parts, "manifold": manifold}
    heads.check_ints("ignored_structure", **sizes)
    fits = manifold >= 2 and manifold % 2 == 0 and parts >= 1
    fits = fits and 1 <= features * parts <= dim - manifold
    if not (fits and 0 < probability <= 1):
        raise ValueError(
            "ignored_structure: wanted an even manifold >= 2, features * parts in "
            "1 .. dim - manifold and probability in (0, 1], got dim "
            f"{dim}, manifold {manifold}, features {features}, parts {parts}, "
            f"probability {probability}"
        )
    if not (0 <= size <= 1e3 and 0 <= tilt <= 1e3):  # beyond, rounding hides sources
        raise ValueError(
            "ignored_structure: wanted size and tilt in 0 .. 1000, got size "
            f"{size}, tilt {tilt}"
        )


def _codes_and_angles(
    features: int, probability: float, key: Array, num: int
) -> dict[str, Array]:
    codes_key, angles_key = jax.random.split(key)
    return {
        "codes": heads.sparse_codes(codes_key, (num, features), probability),
        "angles": jax.random.uniform(angles_key, (num, 2), maxval=2 * jnp.pi),
    }


def _on_surface(params: Params, inputs: dict[str, Array]) -> Array:
    """Add a point of the torus to the sources, which are independent of it."""
    surface, angles = params["surface"], inputs["angles"]
    pairs = np.arange(len(surface) // 2)
    # The four waves of the two angles, then their double frequencies, and so on.
    turns = _WAVES[pairs % len(_WAVES)] * (1 + pairs // len(_WAVES))[:, None]
    phase = dot(angles, jnp.asarray(turns.T, angles.dtype))
    waves = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1)
    return dot(inputs["codes"], params["writers"]) + dot(waves, surface)


def tiled_curve(
    key: Array,
    *,
    dim: int = 32,
    harmonics: int = 12,
    reads: int = 8,
    share: float = 0.2,
    decay: float = 0.5,
) -> Task:
    """Plant a closed curve in many dimensions, of which the model reads a few.

    The activation is a point of a curve with ``harmonics`` frequencies; each reader
    is active on the ``share`` of the curve that lies farthest along it.

    Args:
      key: random key of the task.
      dim: width ``D``, at least ``2 * harmonics``.
      harmonics: frequencies of the curve.
      reads: ``F``.
      share: of the curve on which a reader is active.
      decay: amplitude of frequency ``h`` is ``h ** -decay``; in -10 .. 10.

    Returns:
      :class:`toyfeat.models.planted.Task`; writers are the regression patterns of
      the readers.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.

    References:
      Haufe et al. (2014), equation 6, for the writers.
    """
    heads.check_ints("tiled_curve", dim=dim, harmonics=harmonics, reads=reads)
    if not (1 <= 2 * harmonics <= dim and reads >= 1 and 0 < share < 1):
        raise ValueError(
            "tiled_curve: wanted dim >= 2 * harmonics, reads >= 1 and share in (0, 1), "
            f"got dim {dim}, harmonics {harmonics}, reads {reads}, share {share}"
        )
    if not abs(decay) <= 10:
        raise ValueError(f"tiled_curve: wanted decay in -10 .. 10, got {decay}")
    axes_key, rows_key, mix_key = jax.random.split(key, 3)
    span = heads.rotation(axes_key, dim)[: 2 * harmonics]
    order = jnp.arange(1, harmonics + 1, dtype=jnp.result_type(float))
    curve = span * jnp.tile(order**-decay, 2)[:, None]
    readers = unit(dot(jax.random.normal(rows_key, (reads, 2 * harmonics)), span))
    # Thresholds are quantiles over a grid of the whole curve.
    angles = jnp.linspace(0, 2 * jnp.pi, _GRID)[:-1]
    along = dot(_on_curve({"curve": curve}, angles), readers.T)
    threshold = jnp.quantile(along, 1 - share, axis=0)
    params = heads.head(mix_key, readers, threshold) | {"curve": curve}
    # Regression patterns: the covariance is curve^T curve / 2.
    writers = dot(dot(readers, curve.T), curve) / 2
    return heads.make_task(
        "tiled curve",
        _on_curve,
        params,
        _angles,
        Truth(readers=readers, writers=writers, frequency=jnp.full(reads, share)),
        about=f"A closed curve through {2 * harmonics} dimensions, read along {reads} "
        f"directions, each active on {share:.0%} of it. A dictionary of the "
        "activations tiles the curve.",
        limits="Activations never leave the curve, so writers are regression patterns. "
        "Readers are directions and no planes, though the curve is round: each is "
        "silent on most of it, and its own part is seen in what it does there.",
    )


def _angles(key: Array, num: int) -> Array:
    return jax.random.uniform(key, (num,), maxval=2 * jnp.pi)


def _on_curve(params: Params, angles: Array) -> Array:
    """Points of the curve: cosines of all frequencies, then their sines."""
    curve = params["curve"]
    order = jnp.arange(1, len(curve) // 2 + 1, dtype=angles.dtype)
    phase = angles[:, None] * order[None, :]
    return dot(jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1), curve)


def product_space(
    key: Array,
    *,
    dim: int = 24,
    colours: int = 10,
    shapes: int = 10,
    threshold: float = 0.1,
) -> Task:
    """Plant one colour and one shape in every example, which the model reads apart.

    The activation is ``size (colour + shape)`` with one size for both, so that a
    dictionary with a latent for every pair uses one code where the truth uses two.

    Args:
      key: random key of the task.
      dim: width ``D``, at least ``colours + shapes``.
      colours: how many.
      shapes: how many.
      threshold: under which a reader is silent, in 0 .. 0.5; codes are .5 at least.

    Returns:
      :class:`toyfeat.models.planted.Task`, colours first.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    heads.check_ints("product_space", dim=dim, colours=colours, shapes=shapes)
    num = colours + shapes
    if min(colours, shapes) < 2 or num > dim:
        raise ValueError(
            "product_space: wanted colours and shapes of at least 2, together at most "
            f"dim, got {colours}, {shapes} and dim {dim}"
        )
    heads.check_threshold("product_space", threshold)
    rows_key, mix_key = jax.random.split(key)
    # Readers are dual to random writers: each sees its own feature and no other.
    writers = unit(jax.random.normal(rows_key, (num, dim)))
    readers = dual(writers)
    params = heads.head(mix_key, readers, threshold) | {"writers": writers}
    frequency = jnp.concatenate(
        [jnp.full(colours, 1 / colours), jnp.full(shapes, 1 / shapes)]
    )
    return heads.make_task(
        "product space",
        heads.write_codes,
        params,
        partial(_products, colours, shapes),
        Truth(readers=readers, writers=writers, frequency=frequency),
        about=f"{colours} colours times {shapes} shapes in {dim} dimensions, read as "
        f"{num} features. One latent per pair is the sparser description of the "
        "activations.",
        limits="Adding a vector to all colours and taking it from all shapes changes "
        "no activation: writers are known up to that, readers exactly.",
    )


def _products(colours: int, shapes: int, key: Array, num: int) -> Array:
    """Draw one colour and one shape of one size, as codes ``[N, colours + shapes]``."""
    size_key, colour_key, shape_key = jax.random.split(key, 3)
    chosen = [
        jax.nn.one_hot(jax.random.randint(key, (num,), 0, count), count)
        for key, count in ((colour_key, colours), (shape_key, shapes))
    ]
    sizes = jax.random.uniform(size_key, (num, 1), minval=0.5, maxval=1.5)
    return sizes * jnp.concatenate(chosen, axis=1)
