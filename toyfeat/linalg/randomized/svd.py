"""Randomized SVD of arrays, linear maps, row blocks and sharded matrices."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from toyfeat.checks import check_key
from toyfeat.linalg.precision import Axis, dot, nonzero, split_scale
from toyfeat.linalg.randomized.derivatives import svd_jvp
from toyfeat.linalg.randomized.inputs import (
    Blocks,
    as_floats,
    check_blocks,
    check_linear_map,
    mesh_and_axis,
)
from toyfeat.linalg.randomized.linear_maps import (
    LinearMap,
    from_linear_map,
    transpose,
)
from toyfeat.linalg.randomized.operators import (
    Sketch,
    from_array,
    from_blocks,
    from_wide_array,
)
from toyfeat.linalg.randomized.plans import (
    Method,
    Plan,
    Request,
    check_request,
    make_plan,
)
from toyfeat.linalg.randomized.routes import run_plan
from toyfeat.linalg.svd import SVD
from toyfeat.types import Array, ArrayLike

_MAP_GRAM_WIDTHS = 4.0
"""Block widths up to which the Gram matrix of a linear map is worth it.

It takes ``D`` products, as a Krylov space of some blocks does; chosen by trial.
"""

_BLOCKS_GRAM_WIDTHS = 50.0
"""Block widths up to which the Gram matrix of row blocks is worth it.

Reading blocks again costs more than multiplying them; chosen by trial.
"""


def randomized_svd(
    key: Array,
    matrix: ArrayLike | LinearMap | Blocks,
    rank: int,
    *,
    oversample: int | None = None,
    power_iters: int = 2,
    method: Method = "auto",
    sketch: Sketch = "float32",
    compute_u: bool = True,
    mesh: Any = None,
    axis: Axis = None,
) -> SVD:
    r"""Compute leading singular values and vectors, :math:`A \approx U S V^\top`.

    ``method="auto"`` takes the first of these that fits:

    - ``"full"``: QR and a small dense decomposition, where the smaller side is
      short or hardly longer than a block is wide;
    - ``"gram"``: eigenvectors of :math:`A^\top A`, exact to rounding, up to a
      smaller side of some block widths.  Values that squares have lost are found
      by iterations that start from the eigenvectors;
    - ``"krylov"``: a block Krylov space of ``power_iters + 1`` blocks, every
      product of which is used;
    - ``"subspace"``: subspace iteration, for sketches of low precision.  It takes
      as many products and less memory, and is less accurate.

    Only the smaller side is ever made orthonormal on the way, by matrix products
    with a check.  Nothing of the length of the larger side goes to a dense
    factorization unless that check fails (``info.fallback``).  All sums run in
    ``Precision.HIGHEST`` unless ``sketch`` says otherwise.

    Works under ``jit`` (with ``rank`` and the options static), ``vmap``, ``jvp``
    and ``grad``, and with the rows split over the devices of a mesh.  Derivatives
    are those of arrays.  At equal singular values they are finite, and right for
    the sum of the values, for the space of the smaller side's vectors and for
    ``u s vt``; the space of the larger side's vectors cannot be right as well.

    Args:
      key: from ``jax.random.key``; the same key gives the same result.
      matrix: ``[N, D]`` float array; or :class:`LinearMap`; or row blocks
        ``[n_i, D]``, a list or a function that returns a fresh iterator (read
        once for the shapes and once per product).  One block is in memory at a
        time, and so are ``N`` rows of the width of a block, unless the method is
        ``"gram"`` and ``compute_u=False``.  Rows that can be read once only go to
        :func:`toyfeat.linalg.stream_svd`.  16-bit floats are cast to float32.
      rank: how many triplets ``R``, ``1 .. min(N, D)``.
      oversample: columns of a block beyond ``rank``; by default chosen for the
        method, more for ``"subspace"`` than for the others.
      power_iters: how often :math:`A^\top A` is applied (``"subspace"``,
        ``"krylov"``).
      method: ``"auto"``, ``"full"``, ``"gram"``, ``"krylov"``, ``"subspace"``.  A
        Krylov space that would not fit is the complete space: ``"subspace"``.
      sketch: precision of the products that only find the subspace; the last
        pass is always float32.  ``"bfloat16"`` costs the values no accuracy, and
        right vectors and residual 1e-3, as long as the last value is above 1e-2
        of the first; ``"tensorfloat32"`` (a GPU's; the same as float32
        elsewhere) above 1e-3.
      compute_u: whether left vectors are wanted.
      mesh: the mesh over whose ``axis`` the rows are split; by default that of
        the array's own sharding.  Then only ``l x D``, ``l x l`` (in a fallback
        one from each device) and ``D x D`` arrays cross devices.
      axis: name of that axis.

    Returns:
      :class:`SVD` ``(u [N, R], s [R], vt [R, D], info)``.  The largest entry of
      each row of ``vt``, by magnitude, is positive.  Where the matrix has a
      smaller rank, further values are 0 to rounding and vectors still
      orthonormal.  ``info.accurate`` is false where the values are not as good as
      promised, 5e-6 of the first: for spectra that fall slowly, beyond the sizes
      for which ``"gram"`` is taken (:mod:`toyfeat.linalg` has the range of sizes).

    Raises:
      ValueError: if an argument is out of range, the matrix is not two
        dimensional, or holds NaN or inf (inside a trace: ``info.finite``), or if
        ``rmatvec`` is not the transpose of ``matvec``.
      TypeError: if the matrix is not of a real floating dtype, a number is no int,
        or the key none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> a = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
      >>> u, s, vt, info = randomized_svd(jax.random.key(0), a, 2)
      >>> s.round(4).tolist(), vt.round(4).tolist()
      ([3.0, 2.0], [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
      >>> info.method, bool(info.finite)
      ('full', True)

    References:
      Halko, Martinsson and Tropp (2011), "Finding structure with randomness";
      Musco and Musco (2015) for the Krylov space; Fukaya et al. (2020) for the
      orthonormalisation; Epperly and Tropp (2024) for the estimate of the error.
      Unlike theirs, no block of length ``N`` is made orthonormal on the way.
    """
    check_key("randomized_svd", key)
    request = check_request(
        Request(
            rank=rank,
            oversample=oversample,
            power_iters=power_iters,
            method=method,
            sketch=sketch,
            with_u=compute_u,
        )
    )
    # Only arrays are split over a mesh.
    others = LinearMap | list | tuple | Iterator
    split = mesh is not None or axis is not None
    if split and (callable(matrix) or isinstance(matrix, others)):
        raise ValueError(
            "randomized_svd: mesh and axis are for arrays, got them with "
            f"{type(matrix).__name__}; leave them out, or pass an array"
        )
    # One function per kind of matrix.
    if isinstance(matrix, LinearMap):
        svd = _decompose_linear_map(key, matrix, request)
    elif callable(matrix) or isinstance(matrix, list | tuple | Iterator):
        svd = _decompose_blocks(key, matrix, request)
    else:
        svd = _decompose_array(key, matrix, request, mesh, axis)
    return _check_finite(svd)


def _check_finite(svd: SVD) -> SVD:
    """Raise if the result is not finite; inside a trace ``info.finite`` says it."""
    finite = svd.info.finite
    if not isinstance(finite, Tracer) and not np.all(finite):
        raise ValueError(
            "randomized_svd: the matrix must be finite, and its singular values of a "
            f"size that {svd.s.dtype} has, got NaN or inf, or larger values; remove "
            "such rows (toyfeat.check_taps finds them), or rescale"
        )
    return svd


def _decompose_array(
    key: Array, matrix: ArrayLike, request: Request, mesh: Any, axis: Axis
) -> SVD:
    """Decompose an array, on one device or sharded."""
    array = as_floats(matrix)
    if array.ndim != 2 or not array.size:
        raise ValueError(
            f"randomized_svd: wanted a matrix [N, D], got shape {array.shape}; use "
            "jax.vmap for a batch of matrices"
        )
    mesh, axis = mesh_and_axis(array, mesh, axis)
    # A wide array is decomposed as its transpose, so that the smaller side is that of
    # the right vectors; the rows of a sharded one stay where they are.
    rows, dim = array.shape
    wide = mesh is None and rows < dim
    plan = make_plan(request, *((dim, rows) if wide else (rows, dim)))
    return _compiled_svd(key, array, plan._replace(wide=wide, axis=axis), mesh)


@partial(jax.jit, static_argnames=("plan", "mesh"))
def _compiled_svd(key: Array, matrix: Array, plan: Plan, mesh: Any) -> SVD:
    """Run the plan under ``jit``, and on the shards of a mesh if there is one."""
    if mesh is None:
        return _differentiable_svd(plan, key, matrix)
    # Rows are split, and all but u is the same on every device.
    split, replicated = PartitionSpec(plan.axis), PartitionSpec()
    svd = jax.shard_map(
        lambda key, matrix: tuple(_differentiable_svd(plan, key, matrix)),
        mesh=mesh,
        in_specs=(replicated, split),
        out_specs=(
            split if plan.with_u else None,
            replicated,
            replicated,
            replicated,
        ),
        check_vma=False,
    )(key, matrix)
    return SVD(*svd)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable_svd(plan: Plan, key: Array, matrix: Array) -> SVD:
    """Run the plan; the derivative is that of the exact triplets."""
    if plan.wide:
        op, rough = from_wide_array(matrix), from_wide_array(matrix, plan.sketch)
        return run_plan(key, op, rough, plan)
    # Each device holds an equal share of the rows.
    devices = 1 if plan.axis is None else jax.lax.axis_size(plan.axis)
    rows = devices * len(matrix)
    op = from_array(matrix, rows, plan.axis)
    rough = from_array(matrix, rows, plan.axis, plan.sketch)
    return run_plan(key, op, rough, plan)


@_differentiable_svd.defjvp
def _(plan: Plan, primals: tuple, tangents: tuple) -> tuple[SVD, SVD]:
    # The rule knows only the exact triplets, whatever route has found them.
    (key, matrix), (_, change) = primals, tangents
    svd = _differentiable_svd(plan, key, matrix)
    u, s, vt, info = svd
    if plan.wide:
        left = None if u is None else u.T
        u_dot, s_dot, vt_dot = _wide_svd_jvp(matrix, change, left, s, vt)
    else:
        u_dot, s_dot, vt_dot = svd_jvp(matrix, change, u, s, vt, plan.axis)
    info_dot = jax.tree.map(_zero_tangent, info)
    return svd, SVD(u_dot, s_dot, vt_dot, info_dot)


def _wide_svd_jvp(
    matrix: Array, change: Array, ut: Array | None, s: Array, vt: Array
) -> tuple[Array | None, Array, Array]:
    """Apply the rule to the transpose, whose left vectors are ``vt.T``."""
    # The rule needs the transpose's right vectors: u^T = S^-1 V^T A^T.
    if ut is None:
        near_one, inner, outer = split_scale(nonzero(s)[:, None])
        ut = dot(vt / inner, matrix.T) / outer / near_one
        v_dot, s_dot, _ = svd_jvp(matrix.T, change.T, vt.T, s, ut)
        return None, s_dot, v_dot.T
    v_dot, s_dot, ut_dot = svd_jvp(matrix.T, change.T, vt.T, s, ut)
    return ut_dot.T, s_dot, v_dot.T


def _zero_tangent(x: Array) -> Any:
    """The zero tangent of an array; jax wants ``float0`` for integers."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _decompose_linear_map(key: Array, products: LinearMap, request: Request) -> SVD:
    """Decompose a matrix that is given by its products."""
    products = check_linear_map(key, products)
    # Columns are the smaller side, so that blocks of vectors are short.
    wide = products.shape[0] < products.shape[1]
    op = from_linear_map(transpose(products) if wide else products)
    plan = make_plan(request, *op.shape, gram_widths=_MAP_GRAM_WIDTHS)
    return run_plan(key, op, op, plan._replace(wide=wide))


def _decompose_blocks(key: Array, blocks: Blocks, request: Request) -> SVD:
    """Decompose row blocks that are read again for every product."""
    read, rows, dim = check_blocks(blocks)
    # A wide matrix is smaller than D x D, and fits in memory.
    if rows < dim:
        matrix = jnp.concatenate(list(read()))
        return _decompose_array(key, matrix, request, None, None)
    plan = make_plan(request, rows, dim, gram_widths=_BLOCKS_GRAM_WIDTHS)
    op = from_blocks(read, (rows, dim), jnp.result_type(float))
    return run_plan(key, op, op, plan)
