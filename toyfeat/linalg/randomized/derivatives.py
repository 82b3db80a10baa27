"""Derivatives of leading singular triplets."""

from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp

from toyfeat.linalg.precision import (
    Axis,
    dot,
    largest_size,
    nonzero,
    power_of_two,
    sum_over_devices,
)
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
    # Work in units of the first value; tangents stay in those of ``change``.
    level = _EQUAL_ULPS * float(jnp.finfo(s.dtype).eps)
    first = nonzero(s[0])
    scale = power_of_two(first)
    size, matrix = first / scale, matrix / scale
    unit, v, zero = s / first, vt.T, jnp.zeros((), s.dtype)
    safe = jnp.where(unit > level, unit, jnp.ones_like(unit))
    inverse = jnp.where(unit > level, 1 / safe, zero)

    def forward(x: Array) -> Array:
        return dot(matrix, x / size)

    def backward(y: Array, a: Array) -> Array:
        return sum_over_devices(dot(y.T, a), axis).T / size

    # Tangents of the values, and the right-hand side R.
    left = forward(v) * inverse[None, :] if u is None else u
    moved = dot(change, v / size)
    slope = sum_over_devices(jnp.sum(left * moved, axis=0), axis)
    rhs = backward(left * unit[None, :], change) + backward(moved, matrix)

    # The part inside the span: a rotation of the right vectors.
    turn = _rotation(dot(vt, rhs), unit, level)

    # The part outside: one symmetric linear system per right vector.
    def square(x: Array) -> Array:
        return backward(forward(x), matrix)

    dv = dot(v, turn) + _part_outside(rhs, vt, unit, level, square)
    dvt = (dv / scale).T

    # Left vectors follow from A v = u s.
    if u is None:
        return None, slope * size, dvt
    du = (moved + forward(dv) - u * slope[None, :]) * inverse[None, :]
    return du / scale, slope * size, dvt


def _rotation(inside: Array, unit: Array, level: float) -> Array:
    """Rotation of the right vectors, with none between equal values.

    Args:
      inside: ``[R, R]``, the right-hand sides in the span of the vectors.
      unit: ``[R]``, the values over the first.
      level: difference of squared values below which they are equal.

    Returns:
      ``[R, R]``.
    """
    gap = unit[None, :] ** 2 - unit[:, None] ** 2
    apart = jnp.abs(gap) > level
    quotient = inside / jnp.where(apart, gap, jnp.ones_like(gap))
    return jnp.where(apart, quotient, jnp.zeros_like(quotient))


def _part_outside(
    rhs: Array,
    vt: Array,
    unit: Array,
    level: float,
    square: Callable[[Array], Array],
) -> Array:
    r"""Change of the right vectors outside of their span.

    It is :math:`P x` with :math:`(s_i^2 - P A^\top A P) x_i = P R_i`, where :math:`P`
    takes the part in the span away.

    Args:
      rhs: ``[D, R]``, the right-hand sides.
      vt: ``[R, D]``.
      unit: ``[R]``, the values over the first.
      level: added to the squared values, so that the system has a solution.
      square: ``x -> A^T A x``, both ``[D, R]``, in units of the first value.

    Returns:
      ``[D, R]``.
    """
    v = vt.T

    def project(x: Array) -> Array:
        return x - dot(v, dot(vt, x))

    def system(x: Array) -> Array:
        image = project(square(project(x)))
        return (unit**2 + level)[None, :] * x - image

    # This replaces the solver's own rule, which cannot be transposed inside jit.
    solution = jax.lax.custom_linear_solve(
        system, project(rhs), _conjugate_gradients, symmetric=True
    )
    return project(solution)


def _conjugate_gradients(system: Callable[[Array], Array], rhs: Array) -> Array:
    """Solve a symmetric positive definite system, with a right-hand side of any size.

    The solver squares its residuals, so they are brought near 1 and back.
    """
    eps, unit = float(jnp.finfo(rhs.dtype).eps), power_of_two(largest_size(rhs))
    solution, _ = jax.scipy.sparse.linalg.cg(
        system, rhs / unit, tol=eps, maxiter=_MAX_CG_STEPS
    )
    return solution * unit
