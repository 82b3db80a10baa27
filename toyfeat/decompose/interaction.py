"""The local interaction basis: features of a model, layer by layer, from its end."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from toyfeat.decompose.codes import encode
from toyfeat.decompose.second_moments import joint_pca
from toyfeat.linalg.running import (
    merged_rows,
    no_rows,
    outer,
    ratio,
    row_moments,
    value,
)
from toyfeat.tap import readouts, site_shapes, tap
from toyfeat.types import Array, Basis, Inputs, Moments, Params, Probed

Batches = Callable[[], Iterator[Inputs]]


class _Target(NamedTuple):
    """A later site whose code is looked at; the outputs themselves if ``None``."""

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
    r"""Local interaction basis of several sites, solved from the output backwards.

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
      rank: how many directions ``R`` to keep at each site, all ``D`` by default.
      sources: how many random directions of the target stand for the exact
        Jacobian, which takes as many as the target has entries per input
        (``None``).  Unbiased; the error falls as ``1 / sqrt(sources)``.
      over: what a random direction spans, as in
        :func:`toyfeat.readouts.random_directions`.
      key: random key, wanted if ``sources`` is given.
      mask: inputs to weights, as the mask of a readout.
      batch_size: inputs run at a time, to bound memory.

    Returns:
      Site to :class:`Basis`, in the order of ``sites``; ``spectrum`` is
      :math:`\Lambda`.  See :func:`toyfeat.eigengaps` for directions that share a
      value.

    Raises:
      ValueError: if sites are missing, repeated or unknown, there is no batch,
        a rank is out of range, or ``sources`` comes without a key.
      TypeError: if ``batches`` is not a function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import toyfeat as tf
      >>> probed = tf.from_function(lambda w, x, tap: tap("acts", x) @ w)
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> w = jnp.array([[1.0], [0.0], [0.0]])
      >>> bases = tf.local_interaction_basis(
      ...     probed, w, lambda: iter([x]), sites=["acts"]
      ... )
      >>> int(bases["acts"].diagnostics.rank), jnp.abs(bases["acts"].readers[1:]).max()
      (1, Array(..., dtype=float32))

    References:
      Bushnaq et al. (2024), "The local interaction basis", arXiv 2405.10928,
      sections 3.1-3.3, with the plain Jacobian at the data; activations are
      centred, which stands for their constant direction.
    """
    sites = _checked(batches, sites, sources, key)
    stats = _of_acts(probed, params, batches, sites, mask, batch_size)
    bases: dict[str, Basis] = {}
    target: _Target | None = None
    key = jax.random.key(0) if key is None else key
    for index, site in enumerate(reversed(sites)):
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
        state, once = no_rows(len(stats[site].mean)), jax.random.fold_in(key, index)
        basis = None if target is None else target.basis
        for count, inputs in enumerate(batches()):
            fresh = jax.random.fold_in(once, count)
            state = step(state, params, inputs, fresh, basis)
        moments = _with_gradients(stats[site], state)
        full = len(moments.mean) if rank is None else rank
        bases[site] = _in_units_of_effect(joint_pca(moments, full))
        target = _Target(site, _cut(bases[site]))
    return {site: bases[site] for site in sites}


def interaction_edges(
    probed: Probed,
    params: Params,
    batches: Batches,
    bases: dict[str, Basis],
    *,
    batch_size: int | None = None,
) -> dict[tuple[str, str], Array]:
    r"""How strongly each feature of a site acts on each feature of the next.

    .. math:: E_{ij} = \frac{1}{N} \sum_x \sum_t \Big( \sum_s
       \frac{\partial f'_{t,i}}{\partial f_{s,j}} f_{s,j} \Big)^2

    with :math:`f` the codes of a site at its positions :math:`s`, :math:`f'` those
    of the next at :math:`t`.

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
    names = [*bases, "outputs"]
    edges = {}
    for site, name in pairwise(names):
        step = partial(
            _effects, probed=probed, site=site, next_site=name, batch_size=batch_size
        )
        onto = bases.get(name)
        total, count = None, 0
        for inputs in batches():
            part = step(params, inputs, bases[site], onto)
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
def _effects(
    params: Params,
    inputs: Inputs,
    basis: Basis,
    onto: Basis | None,
    *,
    probed: Probed,
    site: str,
    next_site: str,
    batch_size: int | None,
) -> Array:
    """Summed squared effects ``[R', R]``."""
    model = _toward(probed, next_site, onto)
    readout = readouts.jacobian()
    taps = tap(
        model, params, inputs, sites=site, readout=readout, batch_size=batch_size
    )[site]
    assert taps.grads is not None
    size = len(jax.tree.leaves(inputs)[0])
    units = jax.eval_shape(lambda: model(params, inputs, {})[0]).shape[-1]
    codes = encode(basis, taps.acts)
    slopes = jnp.matmul(taps.grads, basis.writers.T, precision="highest")
    effects = (slopes * codes[:, None, :]).reshape(size, -1, *slopes.shape[1:])
    squares = jnp.sum(effects, axis=1) ** 2  # [B, T' R', R]
    squares = squares.reshape(size, -1, units, codes.shape[1])
    return jnp.sum(squares, axis=(0, 1))


def _toward(probed: Probed, site: str | None, basis: Basis | None) -> Probed:
    """The model cut off at a later site, its output that site's code."""
    if site is None or basis is None:
        return probed

    def cut(params: Params, inputs: Inputs, probes: Any) -> Any:
        _, acts = probed(params, inputs, probes)
        return encode(basis, acts[site]), acts

    return cut


def _checked(
    batches: Any, sites: Sequence[str], sources: int | None, key: Array | None
) -> tuple[str, ...]:
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


def _of_acts(
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
        if states is None:
            shapes = site_shapes(probed, params, inputs)
            unknown = [site for site in sites if site not in shapes]
            if unknown:
                raise ValueError(
                    f"local_interaction_basis: no site {unknown[0]!r}; the model has "
                    f"{sorted(shapes)}"
                )
            states = {site: no_rows(shapes[site].shape[-1]) for site in sites}
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
        site: Moments(value(s.weight), value(s.mean), value(s.scatter))
        for site, s in states.items()
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
    """Fold the gradients of one batch."""
    weights = None if mask is None else mask(inputs)
    readout = readouts.jacobian(mask=weights)
    if sources is not None:
        readout = readouts.random_directions(key, sources, over=over, mask=weights)
    model = _toward(probed, next_site, basis)
    taps = tap(
        model, params, inputs, sites=site, readout=readout, batch_size=batch_size
    )[site]
    assert taps.grads is not None
    rows = taps.grads.reshape(-1, taps.grads.shape[-1])
    weights = jnp.repeat(taps.weights, taps.grads.shape[1])
    kind = jnp.result_type(float)
    return merged_rows(state, row_moments(rows.astype(kind), weights.astype(kind)))


def _with_gradients(stats: Moments, state: Any) -> Moments:
    """Add the second moment of the gradients of a target."""
    weight, mean = jnp.asarray(stats.weight), value(state.mean)
    num = ratio(value(state.weight), weight)
    second = ratio(value(state.scatter), weight) + num * outer(mean)
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
    """Fold the activations of one batch."""
    readout = None
    if mask is not None:  # the cheapest readout, for its mask; its gradient is unused
        readout = readouts.random_directions(jax.random.key(0), 1, mask=mask(inputs))
    taps = tap(
        probed, params, inputs, sites=sites, readout=readout, batch_size=batch_size
    )
    kind = jnp.result_type(float)
    return {
        site: merged_rows(
            states[site], row_moments(t.acts.astype(kind), t.weights.astype(kind))
        )
        for site, t in taps.items()
    }


def _in_units_of_effect(basis: Basis) -> Basis:
    """Scale codes of unit variance by the root of their eigenvalues."""
    root = jnp.sqrt(basis.spectrum)
    safe = jnp.where(root > 0, root, jnp.ones_like(root))
    return basis._replace(
        readers=basis.readers * root[None, :], writers=basis.writers / safe[:, None]
    )


def _cut(basis: Basis) -> Basis:
    """Without the columns past the numerical rank, which only cost time."""
    rank = max(1, int(basis.diagnostics.rank))
    return basis._replace(
        readers=basis.readers[:, :rank],
        writers=basis.writers[:rank],
        spectrum=basis.spectrum[:rank],
    )
