"""Low-rank sketch of the mean Jacobian, from its products with a few vectors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.checks import check_int, check_number
from toyfeat.lens.averages import Estimate
from toyfeat.lens.model import LensModel, residual_shape
from toyfeat.lens.pullbacks import valid_positions
from toyfeat.linalg import LinearMap, randomized_svd
from toyfeat.meshes import by_rows, everywhere, run_automatic
from toyfeat.types import Array, Inputs, Params


def sketched_jacobian(
    key: Array,
    model: LensModel,
    params: Params,
    inputs: Inputs,
    rank: int,
    *,
    sites: tuple[str, ...] | None = None,
    mask: Any = None,
    skip_first: int = 16,
    skip_last: int = 1,
    centre: float = 1.0,
) -> Estimate:
    r"""Sketch mean Jacobians as ``c I`` and a matrix of low rank.

    :math:`J - c I` is given by its products: with vectors, by one forward derivative
    each, and with covectors, by one pull-back each.  The randomized SVD of the library
    does the rest.  Worth it where the spectrum of :math:`J - c I` falls fast and few
    sites are wanted: each takes products of its own, while one exact pull-back serves
    all sites.

    Args:
      key: of the sketch.
      model: from :func:`from_decoder` or :func:`from_probed`.
      params: its parameters.
      inputs: all prompts, ``[B, T]``; they are run one after the other.
      rank: of the sketch.
      sites: all but the final one by default.
      mask: ``[B, T]``, 0 at padding.
      skip_first: tokens left out at the start of every prompt.
      skip_last: tokens left out at its end.
      centre: ``c``.

    Returns:
      :class:`Estimate`; its ``standard_error`` is what the sketch leaves out, an
      estimate of ``|J - sketch|_F`` for these very prompts, ``relative_error`` the same
      over the norm, and ``refit_cosine`` NaN.

    Raises:
      ValueError: if a size is out of range, or a prompt has no position that counts.
      TypeError: if an argument has the wrong type.

    References:
      Halko, Martinsson and Tropp (2011), "Finding structure with randomness".
    """
    who = "sketched_jacobian"
    batch, time, dim = residual_shape(model, params, inputs, who)
    rank = check_int(who, "rank", rank, most=dim)
    check_number(who, "centre", centre)
    mask = jnp.ones((batch, time)) if mask is None else jnp.asarray(mask)
    valid = _all_valid(who, mask, skip_first, skip_last)
    sites = model.sites[:-1] if sites is None else tuple(sites)
    matrices, errors = {}, {}
    for site, site_key in zip(sites, jax.random.split(key, len(sites)), strict=True):
        run = partial(run_automatic, partial(_decompose, model, site, rank))
        decompose = jax.jit(partial(run, everywhere))
        svd = decompose(site_key, params, inputs, valid, centre)
        low = jnp.matmul(svd.u * svd.s[None], svd.vt, precision="highest")
        matrices[site] = centre * jnp.eye(dim, dtype=low.dtype) + low
        errors[site] = svd.info.residual
    unknown = {site: jnp.full((), jnp.nan) for site in sites}
    return Estimate(
        matrices=matrices,
        standard_error=errors,
        relative_error={s: e / jnp.linalg.norm(matrices[s]) for s, e in errors.items()},
        refit_cosine=unknown,
        prompts=jnp.asarray(batch),
    )


def _all_valid(who: str, mask: Array, skip_first: int, skip_last: int) -> Array:
    """Mark the positions that count, ``[B, T]``, of which every prompt needs one."""
    skip_first = check_int(who, "skip_first", skip_first, least=0)
    skip_last = check_int(who, "skip_last", skip_last, least=0)
    count = partial(valid_positions, skip_first=skip_first, skip_last=skip_last)
    valid = run_automatic(count, by_rows(mask), mask)
    if not bool(jnp.all(jnp.sum(valid, axis=1) > 0)):
        raise ValueError(
            f"{who}: every prompt must be longer than the {skip_first + skip_last} "
            f"positions that are skipped, got prompts of up to {mask.shape[1]} tokens; "
            "leave short ones out"
        )
    return valid


def _decompose(
    model: LensModel,
    site: str,
    rank: int,
    key: Array,
    params: Params,
    inputs: Inputs,
    valid: Array,
    centre: Array,
) -> Any:
    """Decompose ``J - c I`` of a site, ``J`` the mean over prompts."""
    final = model.sites[-1]
    dim = residual_shape(model, params, inputs, "sketched_jacobian")[-1]
    dtype = valid.dtype

    def mean_product(product: Callable[..., Array], vectors: Array) -> Array:
        """Mean over prompts of ``product(run, acts, weights, vectors)``, less ``c``."""

        def of_prompt(prompt: tuple[Inputs, Array]) -> Array:
            inputs, valid = jax.tree.map(lambda x: x[None], prompt)
            acts = model.probed(params, inputs, {})[1][site]
            run = partial(model.run, params, inputs, start=site, stop=final)
            return product(run, acts, valid, vectors) / jnp.sum(valid)

        parts = jax.lax.map(of_prompt, (inputs, valid))
        return jnp.mean(parts, axis=0) - centre * vectors

    return randomized_svd(
        key,
        LinearMap(
            matvec=partial(mean_product, _forward),
            rmatvec=partial(mean_product, _backward),
            shape=(dim, dim),
            dtype=dtype,
        ),
        rank,
    )


def _forward(run: Callable, acts: Array, valid: Array, vectors: Array) -> Array:
    """Products ``[D, l]`` of one prompt's summed Jacobian with columns ``[D, l]``."""
    _, push = jax.linearize(run, acts)
    at = valid.astype(acts.dtype)[:, :, None]

    def product(vector: Array) -> Array:
        moved = push(at * vector.astype(acts.dtype)[None, None])
        return jnp.sum(at * moved, axis=(0, 1))

    columns = jax.vmap(product, in_axes=1, out_axes=1)(vectors)
    return columns.astype(vectors.dtype)


def _backward(run: Callable, acts: Array, valid: Array, vectors: Array) -> Array:
    """Products of the transpose, in the same manner."""
    _, pull = jax.vjp(run, acts)
    at = valid.astype(acts.dtype)[:, :, None]

    def product(vector: Array) -> Array:
        (moved,) = pull(at * vector.astype(acts.dtype)[None, None])
        return jnp.sum(at * moved, axis=(0, 1))

    columns = jax.vmap(product, in_axes=1, out_axes=1)(vectors)
    return columns.astype(vectors.dtype)
