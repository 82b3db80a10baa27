"""The routes from a matrix to its leading singular triplets."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from toyfeat.linalg.extraction import Extracted, all_right_vectors, extracted
from toyfeat.linalg.leading import leading
from toyfeat.linalg.operators import Operator
from toyfeat.linalg.orthonormal import choose, deviation, orthonormal_rows
from toyfeat.linalg.plans import PROBES, Plan
from toyfeat.linalg.precise import dot, nonzero, norm
from toyfeat.linalg.spectral import signs_of
from toyfeat.linalg.subspaces import Subspace, iterated, krylov
from toyfeat.linalg.tall import inner
from toyfeat.types import SVD, Array, SVDInfo


def svd_of(key: Array, op: Operator, rough: Operator, plan: Plan) -> SVD:
    """Follow the plan.

    Args:
      key: of the random start and the probes.
      op: the matrix.
      rough: the same matrix with products in the precision of the sketch.
      plan: from :func:`toyfeat.linalg.plans.planned`.

    Returns:
      The triplets, with the signs of :func:`toyfeat.linalg.with_signs`.
    """
    kept, plan = plan.with_u, plan._replace(with_u=plan.with_u or plan.wide)
    if plan.method == "full":
        found = _in_full(op, plan)
        passes, width = 2, op.shape[1]
    elif plan.method == "gram":
        found = _by_gram(key, op, plan)
        passes, width = 1 + plan.with_u, op.shape[1]
    else:
        z, probes = _start(key, op, plan.width)
        found = _by_products(op, rough, z, probes, plan)
        passes, width = 2 * plan.iters + 1, plan.width + PROBES
    svd = _finished(found, op, plan, passes, width)
    return svd if kept else svd._replace(u=None)


def _in_full(op: Operator, plan: Plan) -> Extracted:
    """The dense decomposition, its leading part refined by one product."""
    s, vt = all_right_vectors(op.whole(), op.axis)
    z, bad = orthonormal_rows(vt[: plan.width], rounds=2)
    space = _image(op, z, nonzero(s[0]), bad)
    found = extracted(space, plan.rank, op.axis, with_u=plan.with_u)
    return found._replace(residual=norm(s[plan.rank :]))


def _image(op: Operator, z: Array, size: Array, fallback: Array) -> Subspace:
    """What the matrix does to rows, without probes."""
    y = op.forward(z / size)
    none = jnp.zeros((0, op.shape[1]), op.dtype)
    seen = [x[:, :0] for x in y]
    return Subspace(z, [y], inner(y, y, op.axis), none, seen, size, fallback)


def _start(key: Array, op: Operator, width: int) -> tuple[Array, Array]:
    """Orthonormal rows, and probes that know nothing of them."""
    dim = op.shape[1]
    rows = _random_rows(key, width + PROBES, dim, op.dtype)
    if width == dim:
        return jnp.eye(dim, dtype=op.dtype), rows[width:]
    return orthonormal_rows(rows[:width], rounds=2)[0], rows[width:]


def _random_rows(key: Array, num: int, dim: int, dtype: Any) -> Array:
    """Uniform entries of unit variance in 256 steps, none of them zero.

    As good as Gaussian ones and cheaper: one random byte each.
    """
    odd = 2 * jax.random.bits(key, (num, dim), jnp.uint8).astype(dtype) - 255
    return odd / ((256**2 - 1) / 3) ** 0.5


def _by_products(
    op: Operator, rough: Operator, z: Array, probes: Array, plan: Plan
) -> Extracted:
    build = krylov if plan.method == "krylov" else iterated
    space = build(rough, z, probes, plan.iters)
    if plan.sketch != "float32":
        space = _seen_exactly(op, space)
    return extracted(space, plan.rank, op.axis, with_u=plan.with_u)


def _seen_exactly(op: Operator, space: Subspace) -> Subspace:
    """Replace the images of a rough sketch by those of the matrix itself."""
    num = len(space.z)
    both = op.forward(jnp.concatenate([space.z, space.probes]) / space.scale)
    y = [x[:, :num] for x in both]
    return space._replace(
        images=[y], gram=inner(y, y, op.axis), seen=[x[:, num:] for x in both]
    )


def _by_gram(key: Array, op: Operator, plan: Plan) -> Extracted:
    r"""Eigenvectors of ``A^T A``, refined by one product or by iterations.

    Squares keep half the digits: a singular value below 6e-3 of the first is
    wrong by more than 5e-6 of the first.  Then (and only then) the eigenvectors
    are the start of a subspace iteration, which does not square.
    """
    gram, size = op.gram()
    values, z = leading(_start(key, op, plan.width)[0], gram, plan.rank)
    tail = jnp.sqrt(jnp.maximum(jnp.trace(gram) - jnp.sum(values[: plan.rank]), 0))
    low = ~(values[plan.rank - 1] > 4e-5 * values[0])

    def quick(op: Operator, z: Array, values: Array, *rest: Array) -> Extracted:
        size, tail, _ = rest
        sure = jnp.zeros((), bool)
        if not plan.with_u:
            z = z[: plan.rank]
            s = jnp.sqrt(values[: plan.rank]) * size
            vt = z * signs_of(z.T)[:, None]
            off = deviation(dot(vt, vt.T))
            return Extracted(None, s, vt, tail * size, sure, off)
        # All of them: the rounding of squares mixes neighbours across the cut.
        space = _image(op, z, size, sure)
        found = extracted(space, plan.rank, op.axis, with_u=True)
        return found._replace(residual=tail * size)

    def careful(op: Operator, z: Array, values: Array, *rest: Array) -> Extracted:
        del values
        probes = _random_rows(rest[2], PROBES, op.shape[1], op.dtype)
        space = iterated(op, z, probes, 0 if len(z) == op.shape[1] else 4)
        found = extracted(space, plan.rank, op.axis, with_u=plan.with_u)
        return found._replace(fallback=jnp.ones((), bool))

    return _either(op, low, careful, quick, z, values, size, tail, key)


def _either(
    op: Operator,
    pred: Array,
    careful: Callable[..., Any],
    quick: Callable[..., Any],
    *operands: Any,
) -> Any:
    """One of two functions of an operator and arrays."""
    if op.rebuild is not None:
        rebuild = op.rebuild
        return choose(
            pred,
            lambda matrix, *ops: careful(rebuild(matrix), *ops),
            lambda matrix, *ops: quick(rebuild(matrix), *ops),
            op.matrix,
            *operands,
        )
    if not isinstance(pred, Tracer):
        return (careful if pred else quick)(op, *operands)
    return jax.lax.cond(
        pred, lambda *ops: careful(op, *ops), lambda *ops: quick(op, *ops), *operands
    )


def _finished(
    found: Extracted, op: Operator, plan: Plan, passes: int, width: int
) -> SVD:
    """Signs, checks, and what the caller sees."""
    s, vt = found.s, found.vt
    finite = jnp.isfinite(jnp.sum(s)) & jnp.isfinite(jnp.sum(vt))
    bad = jnp.full((), jnp.nan, s.dtype)
    s, vt = jnp.where(finite, s, bad), jnp.where(finite, vt, bad)
    u = None if found.u is None else jnp.concatenate(found.u)
    if plan.wide:
        assert u is not None
        signs = signs_of(u)
        u, vt = vt.T * signs[None, :], u.T * signs[:, None]
    info = SVDInfo(
        method=plan.method,
        passes=passes,
        width=width,
        residual=found.residual,
        orthogonality=found.orthogonality,
        fallback=found.fallback,
        finite=finite,
    )
    return SVD(u, s, vt, info)
