"""Interaction edges: how strongly features of a site act on those of the next."""

import warnings
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from toyfeat.checks import check_function
from toyfeat.decompose.basis import encode
from toyfeat.decompose.interaction import Batches, required_grads, truncate_model
from toyfeat.meshes import everywhere, run_automatic
from toyfeat.tap import readouts, tap
from toyfeat.types import Array, Basis, Inputs, Params, Probed


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
    check_function(
        "interaction_edges",
        "batches",
        batches,
        "to a fresh iterator",
        hint="write lambda: iter(batches)",
    )
    if not isinstance(bases, Mapping) or not bases:
        raise TypeError(
            f"interaction_edges: bases must be a dict of site to basis, got "
            f"{type(bases).__name__}; local_interaction_basis returns one"
        )
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
        _check_effects(site, name, total)
        edges[site, name] = jnp.asarray(total) / count
    return edges


def _check_effects(site: str, name: str, total: Array | None) -> None:
    """Check that there are effects, and outside of a trace that they are finite."""
    if total is None:
        raise ValueError(
            "interaction_edges: batches() must give at least one batch, got none; "
            "return a fresh iterator at every call"
        )
    if isinstance(total, Tracer):
        return
    if not jnp.all(jnp.isfinite(total)):
        raise ValueError(
            f"interaction_edges: effects of {site!r} on {name!r} must be finite, got "
            "NaN or inf; look at the parameters and the inputs"
        )
    # Zeros everywhere come from sites in another order.
    if not jnp.any(total != 0):
        warnings.warn(
            f"interaction_edges: nothing at {site!r} acts on {name!r}; bases must be "
            "in order from input to output (jax.jit sorts a dict by its keys)",
            stacklevel=3,
        )


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

    def effects(*args: Any) -> Array:
        return _batch_effects(probed, site, next_site, batch_size, *args)

    return run_automatic(effects, everywhere, params, inputs, basis, next_basis)


def _batch_effects(
    probed: Probed,
    site: str,
    next_site: str,
    batch_size: int | None,
    params: Params,
    inputs: Inputs,
    basis: Basis,
    next_basis: Basis | None,
) -> Array:
    """Compute the effects where products need no sharding of their results."""
    # The full Jacobian of the next site's codes.
    model = truncate_model(probed, next_site, next_basis)
    readout = readouts.jacobian()
    taps = tap(
        model, params, inputs, sites=site, readout=readout, batch_size=batch_size
    )[site]
    size = len(jax.tree.leaves(inputs)[0])
    units = jax.eval_shape(lambda: model(params, inputs, {})[0]).shape[-1]
    # Slopes times codes, summed over positions of this site.
    codes = encode(basis, taps.acts)
    slopes = jnp.matmul(required_grads(taps), basis.writers.T, precision="highest")
    effects = (slopes * codes[:, None, :]).reshape(size, -1, *slopes.shape[1:])
    # Squares, summed over inputs and positions of the next site.
    squares = jnp.sum(effects, axis=1) ** 2  # [B, T' R', R]
    squares = squares.reshape(size, -1, units, codes.shape[1])
    return jnp.sum(squares, axis=(0, 1))
