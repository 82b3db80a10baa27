"""How leading singular triplets change with the matrix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from toyfeat.linalg.precise import dot, nonzero
from toyfeat.linalg.tall import Axis, summed
from toyfeat.types import Array


def pushed_forward(
    matrix: Array,
    change: Array,
    u: Array | None,
    s: Array,
    vt: Array,
    axis: Axis = None,
) -> tuple[Array | None, Array, Array]:
    r"""Tangents of ``u``, ``s``, ``vt`` for a tangent of the matrix.

    With :math:`R = (\dot A^\top A + A^\top \dot A) V`, the part of
    :math:`\dot V` inside the kept space is
    :math:`V_j (V_j^\top R_i) / (s_i^2 - s_j^2)`, with equal values (to rounding)
    left out: they have no derivative of their own, and what the splitting of
    equal values adds goes to ``u``, so that ``u s vt`` is right.  The part
    outside solves :math:`(s_i^2 - P A^\top A P) x_i = P R_i` by conjugate
    gradients, which the discarded singular values enter exactly.

    Args:
      matrix: ``[n, D]``, this device's rows.
      change: ``[n, D]``, its tangent.
      u: ``[n, R]`` or ``None``.
      s: ``[R]``.
      vt: ``[R, D]``.
      axis: the mesh axis of the rows.

    Returns:
      Tangents of ``u`` (``None`` if it was), ``s`` and ``vt``.
    """
    level = 32 * float(jnp.finfo(s.dtype).eps)
    size = nonzero(s[0])
    unit, v, zero = s / size, vt.T, jnp.zeros((), s.dtype)
    safe = jnp.where(unit > level, unit, jnp.ones_like(unit))
    inverse = jnp.where(unit > level, 1 / safe, zero)

    def ahead(a: Array, x: Array) -> Array:
        return dot(a, x / size)

    def back(y: Array, a: Array) -> Array:
        return summed(dot(y.T, a), axis).T / size

    left = ahead(matrix, v) * inverse[None, :] if u is None else u
    moved = ahead(change, v)
    slope = summed(jnp.sum(left * moved, axis=0), axis)
    rhs = back(left * unit[None, :], change) + back(moved, matrix)
    inside = dot(vt, rhs)
    gap = unit[None, :] ** 2 - unit[:, None] ** 2
    apart = jnp.abs(gap) > level
    turn = jnp.where(apart, inside / jnp.where(apart, gap, jnp.ones_like(gap)), zero)

    def outside(x: Array) -> Array:
        return x - dot(v, dot(vt, x))

    def system(x: Array) -> Array:
        image = outside(back(ahead(matrix, outside(x)), matrix))
        return (unit**2 + level)[None, :] * x - image

    def solve(system: Callable[[Array], Array], rhs: Array) -> Array:
        eps = float(jnp.finfo(rhs.dtype).eps)
        return jax.scipy.sparse.linalg.cg(system, rhs, tol=eps, maxiter=200)[0]

    # Around the solver's own rule, which cannot be transposed inside jit.
    rest = jax.lax.custom_linear_solve(system, outside(rhs), solve, symmetric=True)
    dv = dot(v, turn) + outside(rest)
    if u is None:
        return None, slope * size, dv.T
    du = (moved + ahead(matrix, dv) - u * slope[None, :]) * inverse[None, :]
    return du, slope * size, dv.T
