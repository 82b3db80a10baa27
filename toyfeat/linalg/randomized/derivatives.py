"""Derivatives of leading singular triplets."""

from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp

from toyfeat.linalg.precision import Axis, dot, nonzero, sum_over_devices
from toyfeat.types import Array

_EQUAL_ULPS = 32
"""Singular values closer than this, in ``eps`` of the first, count as equal.

The same level regularizes the linear system and cuts values that are zero.  It is
some times the rounding of a value; chosen by trial.
"""

_MAX_CG_STEPS = 200
"""Limit on conjugate gradient steps; chosen by trial."""


@overload
def svd_jvp(
    matrix: Array, change: Array, u: Array, s: Array, vt: Array, axis: Axis = None
) -> tuple[Array, Array, Array]: ...


@overload
def svd_jvp(
    matrix: Array,
    change: Array,
    u: Array | None,
    s: Array,
    vt: Array,
    axis: Axis = None,
) -> tuple[Array | None, Array, Array]: ...


def svd_jvp(
    matrix: Array,
    change: Array,
    u: Array | None,
    s: Array,
    vt: Array,
    axis: Axis = None,
) -> tuple[Array | None, Array, Array]:
    r"""Push a tangent of the matrix forward to ``u``, ``s``, ``vt``.

    With :math:`R = (\dot A^\top A + A^\top \dot A) V`, the part of
    :math:`\dot V` inside the span of :math:`V` is
    :math:`V_j (V_j^\top R_i) / (s_i^2 - s_j^2)`.  Terms of equal values (to
    rounding) are left out: such vectors have no derivative of their own.  What the
    splitting of equal values adds goes to ``u``, so that ``u s vt`` is right.  The
    part outside the span solves :math:`(s_i^2 - P A^\top A P) x_i = P R_i` by
    conjugate gradients, which treats the discarded singular values exactly.

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
    # Work in units of the first value, and guard the division by small ones.
    level = _EQUAL_ULPS * float(jnp.finfo(s.dtype).eps)
    size = nonzero(s[0])
    unit, v, zero = s / size, vt.T, jnp.zeros((), s.dtype)
    safe = jnp.where(unit > level, unit, jnp.ones_like(unit))
    inverse = jnp.where(unit > level, 1 / safe, zero)

    def forward(a: Array, x: Array) -> Array:
        return dot(a, x / size)

    def backward(y: Array, a: Array) -> Array:
        return sum_over_devices(dot(y.T, a), axis).T / size

    # Tangents of the values, and the right-hand side R.
    left = forward(matrix, v) * inverse[None, :] if u is None else u
    moved = forward(change, v)
    slope = sum_over_devices(jnp.sum(left * moved, axis=0), axis)
    rhs = backward(left * unit[None, :], change) + backward(moved, matrix)

    # The part inside the span: a rotation of the right vectors.
    inside = dot(vt, rhs)
    gap = unit[None, :] ** 2 - unit[:, None] ** 2
    apart = jnp.abs(gap) > level
    turn = jnp.where(apart, inside / jnp.where(apart, gap, jnp.ones_like(gap)), zero)

    # The part outside: one symmetric linear system per right vector.
    def project(x: Array) -> Array:
        return x - dot(v, dot(vt, x))

    def system(x: Array) -> Array:
        image = project(backward(forward(matrix, project(x)), matrix))
        return (unit**2 + level)[None, :] * x - image

    def solve(system: Callable[[Array], Array], rhs: Array) -> Array:
        eps = float(jnp.finfo(rhs.dtype).eps)
        return jax.scipy.sparse.linalg.cg(system, rhs, tol=eps, maxiter=_MAX_CG_STEPS)[
            0
        ]

    # This replaces the solver's own rule, which cannot be transposed inside jit.
    outside = jax.lax.custom_linear_solve(system, project(rhs), solve, symmetric=True)
    dv = dot(v, turn) + project(outside)

    # Left vectors follow from A v = u s.
    if u is None:
        return None, slope * size, dv.T
    du = (moved + forward(matrix, dv) - u * slope[None, :]) * inverse[None, :]
    return du, slope * size, dv.T
