"""Routes from a matrix to its leading singular triplets."""

from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.linalg.orthonormal import deviation, orthonormal_rows
from toyfeat.linalg.precision import (
    GRAM_CUTOFF,
    dot,
    nonzero,
    norm,
    power_of_two,
)
from toyfeat.linalg.psd import column_signs
from toyfeat.linalg.randomized.extraction import (
    Triplets,
    all_right_vectors,
    rayleigh_ritz,
)
from toyfeat.linalg.randomized.leading import leading_eigenvectors
from toyfeat.linalg.randomized.operators import Operator, choose_route, largest_entry
from toyfeat.linalg.randomized.plans import PROBES, Plan
from toyfeat.linalg.randomized.subspaces import (
    Subspace,
    krylov_space,
    subspace_iteration,
)
from toyfeat.linalg.randomized.tall import inner
from toyfeat.linalg.svd import SVD, SVDInfo, is_accurate
from toyfeat.types import Array

_REFINE_ITERS = 4
"""Subspace iterations after a Gram matrix lost small values; chosen by trial."""


def run_plan(key: Array, op: Operator, rough: Operator, plan: Plan) -> SVD:
    """Compute leading singular triplets along the route of the plan.

    Args:
      key: of the random start and the probes.
      op: the matrix.
      rough: the same matrix with products in the precision of the sketch.
      plan: from :func:`toyfeat.linalg.randomized.plans.make_plan`.

    Returns:
      The triplets, with the signs of :func:`toyfeat.linalg.fix_signs`.
    """
    # A wide matrix is used as its transpose, so its right vectors are left ones.
    with_u, plan = plan.with_u, plan._replace(with_u=plan.with_u or plan.wide)

    if plan.method == "full":
        triplets = _full_route(op, plan)
        passes, width = 2, op.shape[1]
    elif plan.method == "gram":
        triplets = _gram_route(key, op, plan)
        passes, width = 1 + plan.with_u, op.shape[1]
    else:
        z, probes = _random_start(key, op, plan.width)
        triplets = _product_route(op, rough, z, probes, plan)
        passes, width = 2 * plan.iters + 1, plan.width + PROBES

    svd = _assemble(triplets, op, plan, passes, width)
    return svd if with_u else svd._replace(u=None)


def _full_route(op: Operator, plan: Plan) -> Triplets:
    """Dense decomposition, its leading part refined by one product."""
    # All right vectors, in units of the largest entry.
    y = op.materialize()
    unit = power_of_two(largest_entry(op, y))
    s, vt = all_right_vectors([block / unit for block in y], op.axis)
    # One product with the leading ones.
    z, bad = orthonormal_rows(vt[: plan.width], rounds=2)
    space = _subspace_of_rows(op, z, nonzero(s[0]) * unit, bad)
    triplets = rayleigh_ritz(space, plan.rank, op.axis, with_u=plan.with_u)
    residual, exact = norm(s[plan.rank :]) * unit, jnp.zeros((), op.dtype)
    return triplets._replace(residual=residual, error=exact)


def _subspace_of_rows(op: Operator, z: Array, size: Array, fallback: Array) -> Subspace:
    """Subspace of orthonormal rows, with their images and without probes."""
    y = op.forward(z, size)
    return Subspace(
        z=z,
        images=[y],
        gram=inner(y, y, op.axis),
        probes=jnp.zeros((0, op.shape[1]), op.dtype),
        probe_images=[x[:, :0] for x in y],
        scale=size,
        fallback=fallback,
        history=[],
    )


def _random_start(key: Array, op: Operator, width: int) -> tuple[Array, Array]:
    """Draw orthonormal rows, and independent probes."""
    dim = op.shape[1]
    rows = _random_rows(key, width + PROBES, dim, op.dtype)
    if width == dim:
        return jnp.eye(dim, dtype=op.dtype), rows[width:]
    return orthonormal_rows(rows[:width], rounds=2)[0], rows[width:]


def _random_rows(key: Array, num: int, dim: int, dtype: Any) -> Array:
    """Draw uniform entries of unit variance in 256 steps, none of them zero.

    One random byte ``b`` each, as the odd number ``2 b - 255``, whose variance is
    ``(256^2 - 1) / 3``.  See "Random starts are uniform bytes, not Gaussian" in
    docs/decisions/linalg.md.
    """
    odd = 2 * jax.random.bits(key, (num, dim), jnp.uint8).astype(dtype) - 255
    return odd / ((256**2 - 1) / 3) ** 0.5


def _product_route(
    op: Operator, rough: Operator, z: Array, probes: Array, plan: Plan
) -> Triplets:
    """Triplets on a Krylov space, or after subspace iteration."""
    build = krylov_space if plan.method == "krylov" else subspace_iteration
    space = build(rough, z, probes, plan.iters)
    if plan.sketch != "float32":
        space = _with_exact_images(op, space)
    return rayleigh_ritz(space, plan.rank, op.axis, with_u=plan.with_u)


def _with_exact_images(op: Operator, space: Subspace) -> Subspace:
    """Replace the images of a rough sketch by those of the matrix itself."""
    num = len(space.z)
    both = op.forward(jnp.concatenate([space.z, space.probes]), space.scale)
    y = [x[:, :num] for x in both]
    return space._replace(
        images=[y],
        gram=inner(y, y, op.axis),
        probe_images=[x[:, num:] for x in both],
    )


def _gram_route(key: Array, op: Operator, plan: Plan) -> Triplets:
    r"""Eigenvectors of ``A^T A``, refined by one product or by iterations.

    Squares lose small singular values (see ``GRAM_CUTOFF``).  Then (and only then)
    the eigenvectors are the start of a subspace iteration, which does not square.
    """
    # Leading eigenpairs, and the energy that they leave: |A|^2 = tr A^T A.
    gram, size = op.gram()
    start = _random_start(key, op, plan.width)[0]
    values, z = leading_eigenvectors(start, gram, plan.rank)
    tail = jnp.sqrt(jnp.maximum(jnp.trace(gram) - jnp.sum(values[: plan.rank]), 0))
    low = ~(values[plan.rank - 1] > GRAM_CUTOFF * values[0])

    def quick(
        op: Operator, z: Array, values: Array, size: Array, tail: Array, key: Array
    ) -> Triplets:
        del key
        fallback, exact = jnp.zeros((), bool), jnp.zeros((), values.dtype)
        # Without left vectors the eigenvectors are the result.
        if not plan.with_u:
            z = z[: plan.rank]
            vt = z * column_signs(z.T)[:, None]
            return Triplets(
                u=None,
                s=jnp.sqrt(values[: plan.rank]) * size,
                vt=vt,
                residual=tail * size,
                fallback=fallback,
                orthogonality=deviation(dot(vt, vt.T)),
                error=exact,
            )
        # One product with all of them, not only the first ``rank``: the rounding of
        # squares mixes neighbours across the cut.
        space = _subspace_of_rows(op, z, size, fallback)
        triplets = rayleigh_ritz(space, plan.rank, op.axis, with_u=True)
        return triplets._replace(residual=tail * size, error=exact)

    # The result of iterations instead; a complete space needs none of them.
    def careful(
        op: Operator, z: Array, values: Array, size: Array, tail: Array, key: Array
    ) -> Triplets:
        del values, size, tail
        probes = _random_rows(key, PROBES, op.shape[1], op.dtype)
        iters = 0 if len(z) == op.shape[1] else _REFINE_ITERS
        space = subspace_iteration(op, z, probes, iters)
        triplets = rayleigh_ritz(space, plan.rank, op.axis, with_u=plan.with_u)
        return triplets._replace(fallback=jnp.ones((), bool))

    return choose_route(op, low, careful, quick, z, values, size, tail, key)


def _assemble(
    triplets: Triplets, op: Operator, plan: Plan, passes: int, width: int
) -> SVD:
    """Make the public result: signs, NaN where the input was not finite, checks."""
    # NaN anywhere makes everything NaN.
    s, vt = triplets.s, triplets.vt
    finite = jnp.isfinite(jnp.sum(s)) & jnp.isfinite(jnp.sum(vt))
    bad = jnp.full((), jnp.nan, s.dtype)
    s, vt = jnp.where(finite, s, bad), jnp.where(finite, vt, bad)

    # Back from the transpose, with the signs of what are right vectors now.
    u = None if triplets.u is None else jnp.concatenate(triplets.u)
    if plan.wide:
        if u is None:
            raise ValueError("run_plan: a plan for a wide matrix needs with_u=True")
        signs = column_signs(u)
        u, vt = vt.T * signs[None, :], u.T * signs[:, None]
    info = SVDInfo(
        method=plan.method,
        passes=passes,
        width=width,
        residual=triplets.residual,
        orthogonality=triplets.orthogonality,
        fallback=triplets.fallback,
        finite=finite,
        error=triplets.error,
        accurate=is_accurate(triplets.error),
    )
    return SVD(u, s, vt, info)
