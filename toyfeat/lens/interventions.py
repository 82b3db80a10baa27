"""Change a stream along the directions of a lens, and see what the model says then.

Every function here runs the model once as it is, where it needs that run, and once with
the change.  Four defects of other implementations have no place in it:

- a swap at several layers sets coordinates to targets of the *clean* run.  A swap of
  the coordinates as they are is its own inverse: the second layer undoes the first;
- vectors of tokens are centred (:class:`toyfeat.lens.reading.Lens`): two raw ones are
  nearly parallel, since most of either is the mean over the vocabulary;
- a model in train mode is refused, since dropout would be part of the effect;
- weights are used as they are stored: no norm is folded into a matrix, which would
  change the basis that a lens was fitted in.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.checks import check_key, check_number, is_array
from toyfeat.lens.model import (
    LensModel,
    check_evaluation,
    mark_positions,
    residual_shape,
)
from toyfeat.linalg import dense
from toyfeat.types import Array, Inputs, Params, Probe


def steer(
    model: LensModel,
    params: Params,
    inputs: Inputs,
    vectors: Mapping[str, Array],
    *,
    strength: float = 1.0,
    positions: Array | None = None,
) -> Array:
    """Add vectors to streams.

    Args:
      model: from :func:`from_decoder` or :func:`from_probed`.
      params: its parameters.
      inputs: a batch.
      vectors: by site, ``[D]``.
      strength: what they are multiplied by.
      positions: ``[B, T]``, not 0 where to add; everywhere by default.

    Returns:
      Logits ``[B, T, V]``.

    Raises:
      ValueError: for an unknown site, another width, or a model in train mode.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, toyfeat as ft
      >>> model = ft.lenses.from_probed(
      ...     ft.from_function(lambda p, x, tap: tap("b", 2 * tap("a", x))),
      ...     sites=["a", "b"], unembed=lambda p, h: h,
      ... )
      >>> x, last = jnp.zeros((1, 2, 1)), jnp.array([[0, 1]])
      >>> steer(model, {}, x, {"a": jnp.ones(1)}, strength=3.0, positions=last).tolist()
      [[[0.0], [6.0]]]
    """
    who, subject = "steer", _Subject(model, params, inputs)
    check_number(who, "strength", strength)
    places = _prepare(who, subject, vectors, 1, positions)
    probes: dict[str, Probe] = {
        site: strength * places * vector[None, None]
        for site, vector in _arrays(vectors).items()
    }
    return _logits(subject, probes)


def ablate(
    model: LensModel,
    params: Params,
    inputs: Inputs,
    directions: Mapping[str, Array],
    *,
    means: Mapping[str, Array] | None = None,
    positions: Array | None = None,
) -> Array:
    """Take the part of streams in the span of directions away, or to its mean.

    Args:
      model: from :func:`from_decoder` or :func:`from_probed`.
      params: its parameters.
      inputs: a batch.
      directions: by site, ``[n, D]``, linearly independent.
      means: by site, ``[D]``: a stream of which the part is taken; 0 by default.
      positions: ``[B, T]``, not 0 where to ablate; everywhere by default.

    Returns:
      Logits ``[B, T, V]``.

    Raises:
      ValueError: for an unknown site, another width, or a model in train mode.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, toyfeat as ft
      >>> model = ft.lenses.from_probed(
      ...     ft.from_function(lambda p, x, tap: tap("b", tap("a", x))),
      ...     sites=["a", "b"], unembed=lambda p, h: h,
      ... )
      >>> x, means = jnp.array([[[3.0, 4.0]]]), {"a": jnp.array([1.0, 0.0])}
      >>> ablate(model, {}, x, {"a": jnp.array([[2.0, 0.0]])}, means=means).tolist()
      [[[1.0, 4.0]]]
    """
    who, subject = "ablate", _Subject(model, params, inputs)
    places = _prepare(who, subject, directions, 2, positions)
    if means is not None:
        _prepare(who, subject, means, 1, positions)
    means = _arrays(means or {})

    def probe(act: Array, *, rows: Array, mean: Array) -> Array:
        part = _coordinates(rows, act - mean[None, None]) @ rows
        return act - places * part

    probes: dict[str, Probe] = {
        site: partial(probe, rows=rows, mean=means.get(site, jnp.zeros(rows.shape[1])))
        for site, rows in _arrays(directions).items()
    }
    return _logits(subject, probes)


def swap(
    model: LensModel,
    params: Params,
    inputs: Inputs,
    vectors: Mapping[str, Array],
    order: Sequence[int],
    *,
    strength: float = 1.0,
    positions: Array | None = None,
) -> Array:
    r"""Permute the coordinates of streams along vectors, at one site or several.

    With coordinates :math:`c = V^+ h` of the clean run, every site is set to
    :math:`c + \alpha (\sigma(c) - c)` there.  At one site that is the published
    :math:`h + \alpha V (\sigma(c) - c)`.  At a second site, where the first change has
    arrived, it is set to targets of its own clean run, whatever arrived.

    Args:
      model: from :func:`from_decoder` or :func:`from_probed`.
      params: its parameters.
      inputs: a batch.
      vectors: by site, ``[n, D]``, linearly independent, as of ``lens.vectors``.
      order: ``[n]``, a permutation of ``0 .. n - 1``: coordinate ``i`` becomes
        coordinate ``order[i]``.
      strength: :math:`\alpha`.
      positions: ``[B, T]``, not 0 where to swap; everywhere by default.

    Returns:
      Logits ``[B, T, V]``.

    Raises:
      ValueError: for an unknown site, another width, an order that is no permutation,
        or a model in train mode.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, toyfeat as ft
      >>> model = ft.lenses.from_probed(
      ...     ft.from_function(lambda p, x, tap: tap("b", tap("a", x))),
      ...     sites=["a", "b"], unembed=lambda p, h: h,
      ... )
      >>> x, axes = jnp.array([[[3.0, 4.0, 5.0]]]), jnp.eye(3)[:2]
      >>> swap(model, {}, x, {"a": axes, "b": axes}, [1, 0]).tolist()
      [[[4.0, 3.0, 5.0]]]

    References:
      Gurnee et al. (2026), transformer-circuits.pub/2026/workspace, for the swap.
    """
    who, subject = "swap", _Subject(model, params, inputs)
    check_number(who, "strength", strength)
    places = _prepare(who, subject, vectors, 2, positions)
    numbers = list(map(int, order))
    for site, rows in vectors.items():
        if sorted(numbers) != list(range(len(rows))):
            raise ValueError(
                f"{who}: order must be a permutation of 0 .. {len(rows) - 1}, one "
                f"number per vector at {site!r}, got {numbers}; [1, 0] swaps two"
            )
    clean = model.probed(params, inputs, {})[1]

    def probe(act: Array, *, rows: Array, target: Array) -> Array:
        return act + places * ((target - _coordinates(rows, act)) @ rows)

    probes: dict[str, Probe] = {}
    for site, rows in _arrays(vectors).items():
        coordinates = _coordinates(rows, clean[site])
        change = coordinates[..., jnp.asarray(numbers)] - coordinates
        target = coordinates + strength * change
        probes[site] = partial(probe, rows=rows, target=target)
    return _logits(subject, probes)


def random_control(key: Array, vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Draw random vectors of the same lengths and angles to each other.

    The control of an intervention: each set of vectors is turned as a whole by a
    random rotation, so that it does to a stream what the set itself does, elsewhere.

    Args:
      key: random key.
      vectors: by site, ``[n, D]`` or ``[D]``.

    Returns:
      Vectors of the same shapes.

    Raises:
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> drawn = random_control(jax.random.key(0), {"a": jnp.array([3.0, 4.0])})
      >>> round(float(jnp.linalg.norm(drawn["a"])), 3)
      5.0
    """
    check_key("random_control", key)
    arrays = _arrays(vectors)
    keys = jax.random.split(key, len(arrays))
    drawn = {}
    for (site, rows), site_key in zip(arrays.items(), keys, strict=True):
        dim = rows.shape[-1]
        q, r = dense.qr(jax.random.normal(site_key, (dim, dim)))
        rotation = q * jnp.sign(jnp.diag(r))[None]  # uniform over all rotations
        drawn[site] = rows @ rotation.astype(rows.dtype)
    return drawn


class _Subject(NamedTuple):
    """The model that is changed, and what it is run on.

    Attributes:
      model: lens model.
      params: its parameters.
      inputs: a batch.
    """

    model: LensModel
    params: Params
    inputs: Inputs


def _arrays(vectors: Mapping[str, Array]) -> dict[str, Array]:
    return {site: jnp.asarray(rows) for site, rows in vectors.items()}


def _coordinates(rows: Array, act: Array) -> Array:
    """Coordinates ``[..., n]`` along ``rows [n, D]`` of the part in their span."""
    gram = rows @ rows.T
    products = jnp.einsum("...d,nd->...n", act.astype(rows.dtype), rows)
    flat = products.reshape(-1, len(rows))
    return jnp.linalg.solve(gram, flat.T).T.reshape(products.shape)


def _prepare(
    who: str,
    subject: _Subject,
    vectors: Mapping[str, Any],
    ndim: int,
    positions: Any,
) -> Array:
    """Check the arguments; return the places ``[B, T, 1]`` to intervene at."""
    batch, time, dim = residual_shape(*subject, who)
    model, params, inputs = subject
    check_evaluation(who, model, params, inputs)
    if not isinstance(vectors, Mapping) or not all(map(is_array, vectors.values())):
        raise TypeError(
            f"{who}: vectors must be arrays by site, got {type(vectors).__name__}; "
            "lens.vectors(tokens) gives them"
        )
    for site, rows in vectors.items():
        if site not in model.sites:
            raise ValueError(
                f"{who}: the model has the streams {list(model.sites)}, got {site!r}; "
                "name one of these sites"
            )
        if rows.ndim != ndim or rows.shape[-1] != dim:
            wanted = f"[{dim}]" if ndim == 1 else f"[n, {dim}]"
            raise ValueError(
                f"{who}: vectors at {site!r} must be {wanted}, got shape {rows.shape}; "
                "are they of another model?"
            )
    advice = "give 1 where to intervene and 0 elsewhere"
    places = mark_positions(who, "positions", positions, (batch, time), advice)
    return (places != 0).astype(jnp.result_type(float))[:, :, None]


def _logits(subject: _Subject, probes: Mapping[str, Probe]) -> Array:
    """Run the model with probes and read its final stream."""
    model, params, inputs = subject
    acts = model.probed(params, inputs, probes)[1]
    return model.unembed(params, acts[model.sites[-1]])
