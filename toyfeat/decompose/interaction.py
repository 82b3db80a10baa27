"""Local interaction basis of a model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.checks import check_function, check_int, check_key
from toyfeat.decompose.basis import encode, truncated
from toyfeat.decompose.second_moments import joint_basis
from toyfeat.linalg.compensated import (
    RowMoments,
    empty_moments,
    merge_moments,
    row_moments,
)
from toyfeat.linalg.finished import moments_from_rows
from toyfeat.meshes import everywhere, run_automatic
from toyfeat.moments.batches import gradient_rows
from toyfeat.tap import readouts, site_shapes, tap
from toyfeat.tap.probes import check_sites
from toyfeat.types import Array, Basis, Inputs, Params, Probed, Taps

Batches = Callable[[], Iterator[Inputs]]
"""Function that returns a fresh iterator over batches of inputs."""

_WHO = "local_interaction_basis"


class _Target(NamedTuple):
    """A later site and the basis whose codes are differentiated.

    Attributes:
      site: name of the site.
      basis: its basis.
    """

    site: str
    basis: Basis


class _Sampling(NamedTuple):
    """Which gradients are taken of a batch: options of the public function.

    Attributes:
      sources: number of random directions, or ``None`` for the exact Jacobian.
      over: axes that a random direction spans.
      mask: inputs to weights, or ``None``.
      batch_size: inputs run at a time, or ``None`` for all of a batch.
    """

    sources: int | None
    over: str
    mask: Callable[[Inputs], Array] | None
    batch_size: int | None


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
      ValueError: if sites are missing, repeated or unknown, there is no batch or not
        the same number at every call, a rank is out of range, ``sources`` comes
        without a key, or activations or gradients are not finite.
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
    sites, rank, sources = _check_options(batches, sites, rank, sources, key)
    if mask is not None:
        hint = "write lambda inputs: ..."
        check_function(_WHO, "mask", mask, "of the inputs", hint=hint)
    # Activations at all sites, in one pass over the batches.
    acts, num = _acts_moments(probed, params, batches, sites, mask, batch_size)
    # From the last site back: each basis is the target of the site before it.
    sampling = _Sampling(sources, over, mask, batch_size)
    key = jax.random.key(0) if key is None else key
    bases: dict[str, Basis] = {}
    target: _Target | None = None
    for index, site in enumerate(reversed(sites)):
        site_key = jax.random.fold_in(key, index)
        add = partial(_add_gradients, probed=probed, site=site, sampling=sampling)
        empty = empty_moments(len(acts[site].mean.high))
        grads = _grads_moments(add, empty, params, batches, num, target, site_key)
        stats = moments_from_rows(_WHO, acts[site], grads)
        full = len(stats.mean) if rank is None else rank
        bases[site] = _scale_by_effect(joint_basis(_WHO, stats, full))
        # Columns past the numerical rank would only cost time.
        numerical_rank = max(1, int(bases[site].diagnostics.rank))
        target = _Target(site, truncated(bases[site], numerical_rank))
    return {site: bases[site] for site in sites}


def required_grads(taps: Taps) -> Array:
    """Gradients of taps, which must have some."""
    if taps.grads is None:
        raise ValueError("interaction: the taps carry no gradients; tap with a readout")
    return taps.grads


def truncate_model(probed: Probed, site: str | None, basis: Basis | None) -> Probed:
    """Make the codes of a site the output of the model.

    Without a site, or without a basis, the output stays that of the model.
    """
    if site is None or basis is None:
        return probed

    def run(params: Params, inputs: Inputs, probes: Any) -> Any:
        _, acts = probed(params, inputs, probes)
        return encode(basis, acts[site]), acts

    return run


def _check_options(
    batches: Any,
    sites: Sequence[str],
    rank: int | None,
    sources: int | None,
    key: Array | None,
) -> tuple[tuple[str, ...], int | None, int | None]:
    """Check the arguments that need no model, and return the sites as a tuple."""
    hint = "write lambda: iter(batches)"
    check_function(_WHO, "batches", batches, "to a fresh iterator", hint=hint)
    sites = (sites,) if isinstance(sites, str) else sites
    if not isinstance(sites, Iterable) or not all(isinstance(s, str) for s in sites):
        raise TypeError(
            f"{_WHO}: sites must be names of sites, got {sites!r}; "
            "toyfeat.site_shapes lists them"
        )
    sites = tuple(sites)
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(f"{_WHO}: wanted distinct sites, got {list(sites)}")
    # Numbers, and the key that random sources need.
    rank = None if rank is None else check_int(_WHO, "rank", rank)
    if sources is not None:
        sources = check_int(_WHO, "sources", sources)
        if key is None:
            raise ValueError(
                f"{_WHO}: random sources want a key, such as key=jax.random.key(0)"
            )
    if key is not None:
        check_key(_WHO, key)
    return sites, rank, sources


def _acts_moments(
    probed: Probed,
    params: Params,
    batches: Batches,
    sites: tuple[str, ...],
    mask: Callable[[Inputs], Array] | None,
    batch_size: int | None,
) -> tuple[dict[str, RowMoments], int]:
    """Moments of the activations at all sites, and the number of batches."""
    states, count = None, 0
    for inputs in _iterate(batches):
        # The first batch shows the widths, and whether the sites exist.
        if states is None:
            shapes = site_shapes(probed, params, inputs)
            check_sites(sites, shapes, who=_WHO)
            states = {site: empty_moments(shapes[site].shape[-1]) for site in sites}
        options = {"mask": mask, "batch_size": batch_size}
        states = _add_acts(
            states, params, inputs, probed=probed, sites=sites, **options
        )
        count += 1
    if states is None:
        raise ValueError(
            f"{_WHO}: batches() must give at least one batch, got none; return a fresh "
            "iterator at every call"
        )
    return states, count


def _grads_moments(
    add: Callable[..., RowMoments],
    state: RowMoments,
    params: Params,
    batches: Batches,
    num: int,
    target: _Target | None,
    key: Array,
) -> RowMoments:
    """Moments of the gradients at one site, of the codes of the target."""
    next_site, basis = (None, None) if target is None else target
    count = 0
    for inputs in batches():
        # Every batch has random directions of its own.
        batch_key = jax.random.fold_in(key, count)
        state = add(state, params, inputs, batch_key, basis, next_site=next_site)
        count += 1
    if count != num:
        raise ValueError(
            f"{_WHO}: batches must return a fresh iterator over the same batches "
            f"at every call, got {num} batches at first and {count} later"
        )
    return state


def _iterate(batches: Batches) -> Iterator[Inputs]:
    """Iterate over the batches that a function returns."""
    result = batches()
    if not isinstance(result, Iterable):
        raise TypeError(
            f"{_WHO}: batches() must return an iterator over inputs, got "
            f"{type(result).__name__}; write lambda: iter(batches)"
        )
    return iter(result)


@partial(jax.jit, static_argnames=("probed", "site", "next_site", "sampling"))
def _add_gradients(
    state: RowMoments,
    params: Params,
    inputs: Inputs,
    key: Array,
    basis: Basis | None,
    *,
    probed: Probed,
    site: str,
    next_site: str | None,
    sampling: _Sampling,
) -> RowMoments:
    """Fold the gradients of one batch into running moments."""

    def add(state: RowMoments, params: Any, inputs: Any, key: Array, basis: Any) -> Any:
        # A readout of the next site's codes, exact or along random directions.
        sources, over, mask, batch_size = sampling
        weights = None if mask is None else mask(inputs)
        readout = readouts.jacobian(mask=weights)
        if sources is not None:
            readout = readouts.random_directions(key, sources, over=over, mask=weights)
        model = truncate_model(probed, next_site, basis)
        taps = tap(
            model, params, inputs, sites=site, readout=readout, batch_size=batch_size
        )[site]
        rows, weights = gradient_rows(required_grads(taps), taps.weights)
        dtype = jnp.result_type(float)
        batch = row_moments(rows.astype(dtype), weights.astype(dtype))
        return merge_moments(state, batch)

    return run_automatic(add, everywhere, state, params, inputs, key, basis)


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

    def add(states: Any, params: Params, inputs: Inputs) -> Any:
        # Weights come with a readout; the gradient of this cheapest one is unused.
        readout = None
        if mask is not None:
            readout = readouts.half_squared_norm(mask=mask(inputs))
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

    return run_automatic(add, everywhere, states, params, inputs)


def _scale_by_effect(basis: Basis) -> Basis:
    """Scale codes of unit variance by the root of their eigenvalues."""
    # Readers times the root, writers over it: their product is the same projection.
    root = jnp.sqrt(basis.spectrum)
    safe = jnp.where(root > 0, root, jnp.ones_like(root))
    return basis._replace(
        readers=basis.readers * root[None, :], writers=basis.writers / safe[:, None]
    )
