"""Choice of a route, a width and the iterations from the shapes alone."""

from typing import Literal, NamedTuple, get_args

from toyfeat.checks import check_choice, check_flag, check_int
from toyfeat.linalg.precision import Axis
from toyfeat.linalg.randomized.operators import Sketch

Method = Literal["auto", "gram", "subspace", "krylov", "full"]

PROBES = 8
"""Random vectors left out of the subspace, for the error estimate.

See "The error estimate leaves out vectors that were fixed beforehand" in
docs/decisions/linalg.md.
"""

GRAM_WIDTHS = 10.0
"""Block widths of the smaller side up to which a Gram matrix is the route.

See "The Gram matrix up to a smaller side of ten block widths" in
docs/decisions/linalg.md.
"""

_FULL_SIDE, _FULL_ASPECT = 128, 8
"""Smaller side up to which ``"full"`` is the route, and how much longer the other.

A matrix that is longer than that takes ``"gram"``.  Both chosen by trial.
"""

_NEARLY_ALL = 1.25
"""Where the subspace times this reaches the smaller side, all of it is taken.

The complete space then costs about as much and is exact; chosen by trial.
"""

_BLOCK_MULTIPLE = 8
"""Block widths are multiples of it, which suits the CPU's product kernel."""

_MIN_WIDTH = 24
"""Narrowest block.

A block of ``l`` rows finds at most ``l`` of several equal singular values; see
"Krylov spaces, not iterations, are the default for wide matrices" in
docs/decisions/linalg.md.
"""

_OVERSAMPLE, _OVERSAMPLE_SUBSPACE = 8, 40
"""Rows of a block beyond the rank, and for ``"subspace"``; chosen by trial.

A Krylov space is several blocks wide.  A single block has to be wider.
"""


class Request(NamedTuple):
    """Options of a call of ``randomized_svd``, checked.

    Attributes:
      rank: how many triplets.
      oversample: columns of a block beyond the rank, or ``None``.
      power_iters: how often ``A^T A`` is applied.
      method: the route, or ``"auto"``.
      sketch: precision of the products that only find the subspace.
      with_u: whether left vectors are wanted.
    """

    rank: int
    oversample: int | None
    power_iters: int
    method: Method
    sketch: Sketch
    with_u: bool


class Plan(NamedTuple):
    """Static settings of a decomposition.

    Attributes:
      method: never ``"auto"``.
      rank: how many triplets.
      width: rows of a block ``z``.
      iters: how often ``A^T A`` is applied.
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


def check_request(request: Request) -> Request:
    """Check the options that can be checked without the matrix.

    Args:
      request: the options of a call.

    Returns:
      The same options, numbers as Python ints.

    Raises:
      TypeError: if a number is no int.
      ValueError: if a number is too small or a name unknown.
    """
    # Numbers.
    who, oversample = "randomized_svd", request.oversample
    if oversample is not None:
        oversample = check_int(who, "oversample", oversample, least=0)
    request = request._replace(
        rank=check_int(who, "rank", request.rank),
        oversample=oversample,
        power_iters=check_int(who, "power_iters", request.power_iters, least=0),
    )
    # Flags and names.
    check_flag(who, "compute_u", request.with_u)
    check_choice(who, "method", request.method, get_args(Method))
    check_choice(who, "sketch", request.sketch, get_args(Sketch))
    return request


def make_plan(
    request: Request, rows: int, dim: int, *, gram_widths: float = GRAM_WIDTHS
) -> Plan:
    """Choose route, width and iterations for a matrix ``[rows, dim]``.

    Measured on CPUs: the Gram matrix costs less than two iterations up to a ``dim``
    of some block widths, and is exact.  Where a Krylov space of the same number of
    products fits, it is more accurate than iterating.

    Args:
      request: the options of the call.
      rows: rows of the matrix.
      dim: its columns.
      gram_widths: up to how many block widths a Gram matrix is the route.

    Returns:
      The plan.

    Raises:
      ValueError: if the rank is larger than the smaller side.
    """
    small, large = min(rows, dim), max(rows, dim)
    if request.rank > small:
        raise ValueError(
            f"randomized_svd: rank must be in 1 .. {small}, the smaller side of "
            f"{(rows, dim)}, got {request.rank}"
        )

    # The route: the first that fits.
    width = min(_block_width(request, request.method), small)
    method = request.method
    if method == "auto":
        if small <= _FULL_SIDE or width >= small / _NEARLY_ALL:
            method = "full" if large <= _FULL_ASPECT * small else "gram"
        elif dim <= gram_widths * (width + PROBES):
            method = "gram"
        else:
            method = "krylov" if request.sketch == "float32" else "subspace"

    # The width, which depends on the route; the complete space where it is near.
    width = min(_block_width(request, method), small)
    iters = request.power_iters
    blocks = iters + 1 if method == "krylov" else 1
    # As wide as there are columns the block is the identity.  With fewer rows than
    # columns, one product with A^T A moves a random block into the row space.
    if blocks * width > small / _NEARLY_ALL:
        width, iters = small, 0 if small == dim else 1
        method = "subspace" if method == "krylov" else method
    return Plan(
        method=method,
        rank=request.rank,
        width=width,
        iters=iters,
        sketch=request.sketch,
        with_u=request.with_u,
    )


def _block_width(request: Request, method: str) -> int:
    """Rows of a block: the rank and the oversampling, rounded up."""
    if request.oversample is not None:
        return request.rank + request.oversample
    extra = _OVERSAMPLE
    if method == "subspace":
        extra = max(request.rank, _OVERSAMPLE_SUBSPACE)
    blocks = -(-(request.rank + extra) // _BLOCK_MULTIPLE)
    return max(_MIN_WIDTH, blocks * _BLOCK_MULTIPLE)
