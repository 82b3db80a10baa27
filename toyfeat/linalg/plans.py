"""Which route is taken, decided from the shapes alone."""

import operator
from typing import Literal, NamedTuple, get_args

from toyfeat.linalg.operators import Sketch
from toyfeat.linalg.tall import Axis

Method = Literal["auto", "gram", "subspace", "krylov", "full"]

PROBES = 8
"""Random vectors that are left out of the subspace, for the error estimate."""


class Wish(NamedTuple):
    """What the caller asked for."""

    rank: int
    oversample: int | None
    power_iters: int
    method: Method
    sketch: Sketch
    with_u: bool


class Plan(NamedTuple):
    """Everything that is known before the numbers are.

    Attributes:
      method: never ``"auto"``.
      rank: how many triplets are kept.
      width: rows of a block ``z``.
      iters: how often the matrix is applied forth and back.
      sketch: precision of the products that only find the subspace.
      with_u: whether left vectors are wanted.
      wide: the matrix is used as its own transpose.
      axis: the mesh axis of the rows.
    """

    method: str
    rank: int
    width: int
    iters: int
    sketch: Sketch
    with_u: bool
    wide: bool = False
    axis: Axis = None


def wish(
    rank: int,
    oversample: int | None,
    power_iters: int,
    method: Method,
    sketch: Sketch,
    with_u: bool,
) -> Wish:
    """Check what can be checked without the matrix."""
    for name, value, least in (
        ("rank", rank, 1),
        ("oversample", 0 if oversample is None else oversample, 0),
        ("power_iters", power_iters, 0),
    ):
        if operator.index(value) < least:
            raise ValueError(
                f"randomized_svd: {name} must be at least {least}, got {value}"
            )
    for name, value, known in (
        ("method", method, get_args(Method)),
        ("sketch", sketch, get_args(Sketch)),
    ):
        if value not in known:
            raise ValueError(
                f"randomized_svd: {name} must be one of {', '.join(known)}, got "
                f"{value!r}"
            )
    return Wish(rank, oversample, power_iters, method, sketch, with_u)


def planned(want: Wish, rows: int, dim: int, *, gram_below: float = 10.0) -> Plan:
    """Choose route, width and iterations for a matrix ``[rows, dim]``.

    Measured on CPUs: the Gram matrix costs less than two iterations up to
    ``dim`` of about ten times the width, and is exact; where a Krylov space of
    the same number of products fits, it is more accurate than iterating.

    Raises:
      ValueError: if the rank is larger than the smaller side.
    """
    small, large = min(rows, dim), max(rows, dim)
    if want.rank > small:
        raise ValueError(
            f"randomized_svd: rank must be in 1 .. {small}, the smaller side of "
            f"{(rows, dim)}, got {want.rank}"
        )
    width = min(_width(want, want.method), small)
    method = want.method
    if method == "auto":
        if small <= 128 or width >= small / 1.25:
            method = "full" if large <= 8 * small else "gram"
        elif dim <= gram_below * (width + PROBES):
            method = "gram"
        else:
            method = "krylov" if want.sketch == "float32" else "subspace"
    width, iters = min(_width(want, method), small), want.power_iters
    blocks = iters + 1 if method == "krylov" else 1
    if blocks * width > small / 1.25:  # then the whole space costs no more
        width, iters = small, 0 if small == dim else 1
        method = "subspace" if method == "krylov" else method
    return Plan(method, want.rank, width, iters, want.sketch, want.with_u)


def _width(want: Wish, method: str) -> int:
    """Rows of a block, a multiple of 8, and at least 24.

    A Krylov space is several blocks wide; one block alone has to be wider.
    """
    if want.oversample is not None:
        return want.rank + want.oversample
    extra = max(want.rank, 40) if method == "subspace" else 8
    return max(24, -(-(want.rank + extra) // 8) * 8)
