"""Local interaction basis of a model, and the interaction edges between sites."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from toyfeat.decompose.basis import encode, truncated
from toyfeat.decompose.second_moments import joint_pca
from toyfeat.linalg.compensated import (
    empty_moments,
    merge_moments,
    outer,
    ratio,
    row_moments,
    to_float,
)
from toyfeat.tap import readouts, site_shapes, tap
from toyfeat.types import Array, Basis, Inputs, Moments, Params, Probed, Taps

Batches = Callable[[], Iterator[Inputs]]
"""Function that returns a fresh iterator over batches of inputs."""


class _Target(NamedTuple):
    """A later site and the basis whose codes are differentiated.

    Attributes:
      site: name of the site.
      basis: its basis.
    """

    site: str
    basis: Basis


def local_interaction_basis(
    probed: Probed,
    params: Params,
    batches: Batches,
    *,
    sites: Sequence[str],
    rank: int | None = None,
    sources: int | None = None,
    over: str = "all",
    key: Array | None = None,
    mask: Callable[[Inputs], Array] | None = None,
    batch_size: int | None = None,
) -> dict[str, Basis]:
    r"""Compute the local interaction basis of several sites, last site first.

    At each site, with :math:`S` the covariance of the activations and :math:`J`
    the Jacobian of the next site's code (of the outputs, for the last site),
    per input and summed over its positions,

    .. math:: S^{1/2} \, E[J^\top J] \, S^{1/2} = V \Lambda V^\top , \quad
       \text{readers } S^{+1/2} V \Lambda^{1/2}, \quad
       \text{writers } \Lambda^{-1/2} V^\top S^{1/2}.

    A code's mean square is its eigenvalue, the mean squared effect of that
    direction on the next site's code, so sizes compare across sites.

    Args:
      probed: the model, from one of the ``from_*`` adapters.
      params: its parameters.
      batches: returns a fresh iterator over batches of inputs; called once per
        site plus once.  Batches of one shape compile once.
      sites: names from input to output.
      rank: how many directions ``R`` to compute at each site, all ``D`` by default.
      sources: how many random directions of the target estimate the Jacobian.
        Unbiased; the error falls as ``1 / sqrt(sources)``.  ``None`` takes the
        exact Jacobian, one direction per entry of the target.
      over: the axes that a random direction spans, as in
        :func:`toyfeat.readouts.random_directions`.
      key: random key, required with ``sources``.
      mask: inputs to weights, as the mask of a readout.
      batch_size: inputs run at a time, to bound memory.

    Returns:
      Site to :class:`Basis`, in the order of ``sites``; ``spectrum`` is
      :math:`\Lambda`.  See :func:`toyfeat.decompose.eigengaps` for directions that
      share a value.

    Raises:
      ValueError: if sites are missing, repeated or unknown, there is no batch,
        a rank is out of range, or ``sources`` comes without a key.
      TypeError: if ``batches`` is not a function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import toyfeat as ft
      >>> probed = ft.from_function(lambda w, x, tap: tap("acts", x) @ w)
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> w = jnp.array([[1.0], [0.0], [0.0]])
      >>> bases = ft.local_interaction_basis(
      ...     probed, w, lambda: iter([x]), sites=["acts"]
      ... )
      >>> int(bases["acts"].diagnostics.rank), jnp.abs(bases["acts"].readers[1:]).max()
      (1, Array(..., dtype=float32))

    References:
      Bushnaq et al. (2024), "The local interaction basis", arXiv 2405.10928,
      sections 3.1-3.3, with the plain Jacobian at the data; activations are
      centred, which stands for their constant direction.
    """
    sites = _check_sites(batches, sites, sources, key)
    stats = _acts_moments(probed, params, batches, sites, mask, batch_size)
    bases: dict[str, Basis] = {}
    target: _Target | None = None
    key = jax.random.key(0) if key is None else key
    for index, site in enumerate(reversed(sites)):
        # Gradients of the next site's codes, over all batches.
        step = partial(
            _add_gradients,
            probed=probed,
            site=site,
            next_site=None if target is None else target.site,
            sources=sources,
            over=over,
            mask=mask,
            batch_size=batch_size,
        )
        state = empty_moments(len(stats[site].mean))
        site_key = jax.random.fold_in(key, index)
        basis = None if target is None else target.basis
        for count, inputs in enumerate(batches()):
            batch_key = jax.random.fold_in(site_key, count)
            state = step(state, params, inputs, batch_key, basis)
        # The basis of this site, and the target of the one before it.
        moments = _join_gradients(stats[site], state)
        full = len(moments.mean) if rank is None else rank
        bases[site] = _scale_by_effect(joint_pca(moments, full))
        # Columns past the numerical rank would only cost time.
        numerical_rank = max(1, int(bases[site].diagnostics.rank))
        target = _Target(site, truncated(bases[site], numerical_rank))
    return {site: bases[site] for site in sites}


def interaction_edges(
    probed: Probed,
    params: Params,
    batches: Batches,
    bases: dict[str, Basis],
    *,
    batch_size: int | None = None,
) -> dict[tuple[str, str], Array]:
    r"""Compute how strongly features of a site act on those of the next.

    .. math:: E_{ij} = \frac{1}{N} \sum_x \sum_t \Big( \sum_s
       \frac{\partial f'_{t,i}}{\partial f_{s,j}} f_{s,j} \Big)^2

    with :math:`f` the codes of a site at its positions :math:`s`, and :math:`f'`
    the codes of the next site at its positions :math:`t`.

    Args:
      probed: the model.
      params: its parameters.
      batches: returns a fresh iterator over batches of inputs; called once per
        site.
      bases: site to basis, from input to output.
      batch_size: inputs run at a time; memory grows with it, the positions and
        the square of the ranks.

    Returns:
      ``(site, next site)`` to ``[R', R]``; the last site's next one is
      ``"outputs"``, whose features are the entries of the last axis.

    Raises:
      ValueError: if there is no batch, or a site is unknown.

    Warns:
      UserWarning: if all edges between two sites are 0, as they are where
        ``bases`` is not in the order in which the model runs.

    References:
      Bushnaq et al. (2024), arXiv 2405.10928, section 3.4, "squared" edges with
      the gradient at the data in place of the integral along a path.
    """
    edges = {}
    for site, name in pairwise([*bases, "outputs"]):
        # Sum squared effects over the batches.
        step = partial(
            _squared_effects,
            probed=probed,
            site=site,
            next_site=name,
            batch_size=batch_size,
        )
        next_basis = bases.get(name)
        total, count = None, 0
        for inputs in batches():
            part = step(params, inputs, bases[site], next_basis)
            total = part if total is None else total + part
            count += len(jax.tree.leaves(inputs)[0])
        if total is None:
            raise ValueError("interaction_edges: batches() gave no batch")
        if not isinstance(total, Tracer) and not jnp.any(total != 0):
            warnings.warn(
                f"interaction_edges: nothing at {site!r} acts on {name!r}; bases must "
                "be in order from input to output (jax.jit sorts a dict by its keys)",
                stacklevel=2,
            )
        edges[site, name] = total / count
    return edges


@partial(jax.jit, static_argnames=("probed", "site", "next_site", "batch_size"))
def _squared_effects(
    params: Params,
    inputs: Inputs,
    basis: Basis,
    next_basis: Basis | None,
    *,
    probed: Probed,
    site: str,
    next_site: str,
    batch_size: int | None,
) -> Array:
    """Sum squared effects over inputs and positions of the next site, ``[R', R]``."""
    # The full Jacobian of the next site's codes.
    model = _truncate_model(probed, next_site, next_basis)
    readout = readouts.jacobian()
    taps = tap(
        model, params, inputs, sites=site, readout=readout, batch_size=batch_size
    )[site]
    size = len(jax.tree.leaves(inputs)[0])
    units = jax.eval_shape(lambda: model(params, inputs, {})[0]).shape[-1]
    # Slopes times codes, summed over positions of this site.
    codes = encode(basis, taps.acts)
    slopes = jnp.matmul(_grads(taps), basis.writers.T, precision="highest")
    effects = (slopes * codes[:, None, :]).reshape(size, -1, *slopes.shape[1:])
    # Squares, summed over inputs and positions of the next site.
    squares = jnp.sum(effects, axis=1) ** 2  # [B, T' R', R]
    squares = squares.reshape(size, -1, units, codes.shape[1])
    return jnp.sum(squares, axis=(0, 1))


def _grads(taps: Taps) -> Array:
    """Gradients of taps, which must have some."""
    if taps.grads is None:
        raise ValueError("interaction: the taps carry no gradients; tap with a readout")
    return taps.grads


def _truncate_model(probed: Probed, site: str | None, basis: Basis | None) -> Probed:
    """Make the codes of a site the output of the model.

    Without a site, or without a basis, the output stays that of the model.
    """
    if site is None or basis is None:
        return probed

    def run(params: Params, inputs: Inputs, probes: Any) -> Any:
        _, acts = probed(params, inputs, probes)
        return encode(basis, acts[site]), acts

    return run


def _check_sites(
    batches: Any, sites: Sequence[str], sources: int | None, key: Array | None
) -> tuple[str, ...]:
    """Check the arguments that need no model, and return the sites as a tuple."""
    if not callable(batches):
        raise TypeError(
            "local_interaction_basis: batches must be a function that returns a fresh "
            f"iterator, got {type(batches).__name__}; write lambda: iter(batches)"
        )
    sites = (sites,) if isinstance(sites, str) else tuple(sites)
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(
            f"local_interaction_basis: wanted distinct sites, got {list(sites)}"
        )
    if sources is not None and key is None:
        raise ValueError(
            "local_interaction_basis: random sources want a key, such as "
            "key=jax.random.key(0)"
        )
    return sites


def _acts_moments(
    probed: Probed,
    params: Params,
    batches: Batches,
    sites: tuple[str, ...],
    mask: Callable[[Inputs], Array] | None,
    batch_size: int | None,
) -> dict[str, Moments]:
    """Mean and scatter of the activations at all sites, in one pass."""
    states = None
    for inputs in batches():
        # The first batch shows the widths, and whether the sites exist.
        if states is None:
            shapes = site_shapes(probed, params, inputs)
            unknown = [site for site in sites if site not in shapes]
            if unknown:
                raise ValueError(
                    f"local_interaction_basis: no site {unknown[0]!r}; the model has "
                    f"{sorted(shapes)}"
                )
            states = {site: empty_moments(shapes[site].shape[-1]) for site in sites}
        states = _add_acts(
            states,
            params,
            inputs,
            probed=probed,
            sites=sites,
            mask=mask,
            batch_size=batch_size,
        )
    if states is None:
        raise ValueError("local_interaction_basis: batches() gave no batch")
    return {
        site: Moments(
            weight=to_float(state.weight),
            mean=to_float(state.mean),
            scatter=to_float(state.scatter),
        )
        for site, state in states.items()
    }


@partial(
    jax.jit,
    static_argnames=(
        *("probed", "site", "next_site", "sources", "over", "mask", "batch_size"),
    ),
)
def _add_gradients(
    state: Any,
    params: Params,
    inputs: Inputs,
    key: Array,
    basis: Basis | None,
    *,
    probed: Probed,
    site: str,
    next_site: str | None,
    sources: int | None,
    over: str,
    mask: Callable[[Inputs], Array] | None,
    batch_size: int | None,
) -> Any:
    """Fold the gradients of one batch into running moments."""
    # A readout of the next site's codes, exact or along random directions.
    weights = None if mask is None else mask(inputs)
    readout = readouts.jacobian(mask=weights)
    if sources is not None:
        readout = readouts.random_directions(key, sources, over=over, mask=weights)
    model = _truncate_model(probed, next_site, basis)
    taps = tap(
        model, params, inputs, sites=site, readout=readout, batch_size=batch_size
    )[site]
    # One row per readout, each with the weight of its example.
    grads = _grads(taps)
    rows = grads.reshape(-1, grads.shape[-1])
    weights = jnp.repeat(taps.weights, grads.shape[1])
    dtype = jnp.result_type(float)
    return merge_moments(state, row_moments(rows.astype(dtype), weights.astype(dtype)))


def _join_gradients(stats: Moments, state: Any) -> Moments:
    """Join moments of the gradients of a target to those of the activations."""
    weight, mean = jnp.asarray(stats.weight), to_float(state.mean)
    num = ratio(to_float(state.weight), weight)
    second = ratio(to_float(state.scatter), weight) + num * outer(mean)
    return stats._replace(grad_mean=mean, grad_second=second, readouts=num)


@partial(jax.jit, static_argnames=("probed", "sites", "mask", "batch_size"))
def _add_acts(
    states: Any,
    params: Params,
    inputs: Inputs,
    *,
    probed: Probed,
    sites: tuple[str, ...],
    mask: Callable[[Inputs], Array] | None,
    batch_size: int | None,
) -> Any:
    """Fold the activations of one batch into running moments."""
    # Weights come with a readout; the gradient of this cheapest one is unused.
    readout = None
    if mask is not None:
        readout = readouts.random_directions(jax.random.key(0), 1, mask=mask(inputs))
    taps = tap(
        probed, params, inputs, sites=sites, readout=readout, batch_size=batch_size
    )
    dtype = jnp.result_type(float)
    return {
        site: merge_moments(
            states[site], row_moments(t.acts.astype(dtype), t.weights.astype(dtype))
        )
        for site, t in taps.items()
    }


def _scale_by_effect(basis: Basis) -> Basis:
    """Scale codes of unit variance by the root of their eigenvalues."""
    root = jnp.sqrt(basis.spectrum)
    safe = jnp.where(root > 0, root, jnp.ones_like(root))
    return basis._replace(
        readers=basis.readers * root[None, :], writers=basis.writers / safe[:, None]
    )
