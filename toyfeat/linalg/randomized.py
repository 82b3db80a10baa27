"""The leading singular vectors of a matrix, however it is given."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from toyfeat.linalg.derivatives import pushed_forward
from toyfeat.linalg.operators import (
    Products,
    Sketch,
    by_products,
    dense,
    dense_wide,
    in_blocks,
    transposed,
)
from toyfeat.linalg.plans import Method, Plan, Wish, planned, wish
from toyfeat.linalg.routes import svd_of
from toyfeat.linalg.tall import Axis
from toyfeat.types import SVD, Array, ArrayLike

Blocks = (
    Callable[[], Iterable[ArrayLike]]
    | list[ArrayLike]
    | tuple[ArrayLike, ...]
    | Iterator[ArrayLike]
)
"""Row blocks ``[n_i, D]``: a list, or a function that returns a fresh iterator."""


def randomized_svd(
    key: Array,
    matrix: ArrayLike | Products | Blocks,
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
    r"""Leading singular values and vectors, :math:`A \approx U S V^\top`.

    ``method="auto"`` takes the first that fits of

    - ``"full"``: QR and a small dense decomposition, where the smaller side is at
      most 128 or hardly larger than what is asked for;
    - ``"gram"``: eigenvectors of :math:`A^\top A`, exact to rounding, up to a
      smaller side of about ten block widths; values below 6e-3 of the first are
      then found by iterations that start from the eigenvectors;
    - ``"krylov"``: a block Krylov space of ``power_iters + 1`` blocks, every
      product of which is kept;
    - ``"subspace"``: subspace iteration; as many products, less memory, less
      accurate; where the sketch has low precision.

    Only the smaller side is ever made orthonormal on the way, by matrix products
    with a check; nothing of the length of the larger side goes to a dense
    factorization unless that check fails (``info.fallback``).  All sums run in
    ``Precision.HIGHEST`` unless ``sketch`` says otherwise.

    Works under ``jit`` (with ``rank`` and the options static), ``vmap``,
    ``jvp`` and ``grad`` (of arrays; finite at equal values, and there right for
    their sum, for the space of the vectors of the smaller side and for
    ``u s vt``; the space of those of the larger side cannot be right as well),
    and with the rows split over the devices of a mesh.

    Args:
      key: from ``jax.random.key``; the same key gives the same result.
      matrix: ``[N, D]`` float array; or :class:`Products`; or row blocks
        ``[n_i, D]``, a list or a function that returns a fresh iterator (read
        once for the shapes and once per product), which are held in memory one
        at a time; what is kept is ``N`` times the width of a block, unless the
        method is ``"gram"`` and ``compute_u=False``.  Rows that can be read
        once only go to :func:`toyfeat.stream_svd`.  16-bit floats are cast to
        float32.
      rank: how many triplets ``R``, ``1 .. min(N, D)``.
      oversample: columns of a block beyond ``rank``; by default at least 8 (40
        where the method is ``"subspace"``), such that a block is a multiple of 8
        and has at least 24.
      power_iters: how often :math:`A^\top A` is applied (``"subspace"``,
        ``"krylov"``).
      method: ``"auto"``, ``"full"``, ``"gram"``, ``"krylov"``, ``"subspace"``.  A
        Krylov space that would not fit is the whole space: ``"subspace"``.
      sketch: precision of the products that only find the subspace; the last
        pass is float32 always.  ``"bfloat16"`` costs the values no accuracy, and
        right vectors and residual 1e-3, while the last kept value is above 1e-2
        of the first; ``"tensorfloat32"`` (a GPU's; the same as float32
        elsewhere) above 1e-3.
      compute_u: whether left vectors are wanted.
      mesh: the mesh over whose ``axis`` the rows are split; read off the array
        where it says so itself.  Then only ``l x D``, ``l x l`` (in a fallback
        one from each device) and ``D x D`` arrays cross devices.
      axis: name of that axis.

    Returns:
      :class:`SVD` ``(u [N, R], s [R], vt [R, D], info)``.  The largest entry of
      each row of ``vt``, by magnitude, is positive.  Where the matrix has a
      smaller rank, further values are 0 to rounding and vectors still
      orthonormal.

    Raises:
      ValueError: if an argument is out of range, the matrix is not two
        dimensional, or holds NaN or inf (inside a trace: ``info.finite``).
      TypeError: if the matrix is not of a real floating dtype.

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
    want = wish(rank, oversample, power_iters, method, sketch, compute_u)
    if isinstance(matrix, Products):
        svd = _of_products(key, matrix, want)
    elif callable(matrix) or isinstance(matrix, list | tuple | Iterator):
        svd = _of_blocks(key, matrix, want)
    else:
        svd = _of_array(key, matrix, want, mesh, axis)
    finite = svd.info.finite
    if not isinstance(finite, Tracer) and not np.all(finite):
        raise ValueError(
            "randomized_svd: the matrix holds NaN or inf, or its products overflow; "
            "remove such rows (toyfeat.check_taps finds them) or rescale"
        )
    return svd


def _of_array(key: Array, matrix: ArrayLike, want: Wish, mesh: Any, axis: Axis) -> SVD:
    array = _floats(matrix)
    if array.ndim != 2 or not array.size:
        raise ValueError(
            f"randomized_svd: wanted a matrix [N, D], got shape {array.shape}; use "
            "jax.vmap for a batch of matrices"
        )
    mesh, axis = _placement(array, mesh, axis)
    rows, dim = array.shape
    wide = mesh is None and rows < dim
    plan = planned(want, *((dim, rows) if wide else (rows, dim)))
    return _in_memory(key, array, plan._replace(wide=wide, axis=axis), mesh)


@partial(jax.jit, static_argnames=("plan", "mesh"))
def _in_memory(key: Array, matrix: Array, plan: Plan, mesh: Any) -> SVD:
    if mesh is None:
        return _ruled(plan, key, matrix)
    split, whole = PartitionSpec(plan.axis), PartitionSpec()
    svd = jax.shard_map(
        lambda key, matrix: tuple(_ruled(plan, key, matrix)),
        mesh=mesh,
        in_specs=(whole, split),
        out_specs=(split if plan.with_u else None, whole, whole, whole),
        check_vma=False,
    )(key, matrix)
    return SVD(*svd)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _ruled(plan: Plan, key: Array, matrix: Array) -> SVD:
    if plan.wide:
        op, rough = dense_wide(matrix), dense_wide(matrix, plan.sketch)
        return svd_of(key, op, rough, plan)
    devices = 1 if plan.axis is None else jax.lax.axis_size(plan.axis)
    rows = devices * len(matrix)
    op = dense(matrix, rows, plan.axis)
    return svd_of(key, op, dense(matrix, rows, plan.axis, plan.sketch), plan)


@_ruled.defjvp
def _(plan: Plan, primals: tuple, tangents: tuple) -> tuple[SVD, SVD]:
    (key, matrix), (_, change) = primals, tangents
    svd = _ruled(plan, key, matrix)
    u, s, vt, info = svd
    if plan.wide:
        left = None if u is None else u.T
        u_dot, s_dot, vt_dot = _wide_rule(matrix, change, left, s, vt)
    else:
        u_dot, s_dot, vt_dot = pushed_forward(matrix, change, u, s, vt, plan.axis)
    still = jax.tree.map(_no_change, info)
    return svd, SVD(u_dot, s_dot, vt_dot, still)


def _wide_rule(
    matrix: Array, change: Array, ut: Array | None, s: Array, vt: Array
) -> tuple[Array | None, Array, Array]:
    """The rule for the transpose, whose left vectors are ``vt.T``."""
    if ut is None:
        size = jnp.where(s > 0, s, jnp.ones_like(s))
        ut = jnp.matmul(vt, matrix.T, precision="highest") / size[:, None]
        u_dot, s_dot, _ = pushed_forward(matrix.T, change.T, vt.T, s, ut)
        assert u_dot is not None
        return None, s_dot, u_dot.T
    v_dot, s_dot, ut_dot = pushed_forward(matrix.T, change.T, vt.T, s, ut)
    assert v_dot is not None
    return ut_dot.T, s_dot, v_dot.T


def _no_change(x: Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _of_products(key: Array, products: Products, want: Wish) -> SVD:
    wide = products.shape[0] < products.shape[1]
    op = by_products(transposed(products) if wide else products)
    # A Gram matrix takes D products: worth it up to about four blocks.
    plan = planned(want, *op.shape, gram_below=4)
    return svd_of(key, op, op, plan._replace(wide=wide))


def _of_blocks(key: Array, blocks: Blocks, want: Wish) -> SVD:
    if isinstance(blocks, Iterator):
        raise ValueError(
            "randomized_svd: an iterator can be read once only; pass a list of row "
            "blocks or a function that returns a fresh iterator, or fold the blocks "
            "with stream_svd"
        )
    read = blocks if callable(blocks) else lambda: iter(blocks)
    shapes = [_floats(block).shape for block in read()]
    if isinstance(read(), Iterator) and read() is read():
        raise ValueError(
            "randomized_svd: the function returns the same iterator again; return a "
            "fresh one at every call"
        )
    if not shapes or any(len(shape) != 2 for shape in shapes):
        raise ValueError(
            f"randomized_svd: wanted row blocks [n, D], got shapes {shapes[:3]}"
        )
    widths = sorted({shape[1] for shape in shapes})
    if len(widths) > 1:
        raise ValueError(
            f"randomized_svd: wanted row blocks of one width D, got widths {widths}"
        )
    rows, dim = sum(shape[0] for shape in shapes), widths[0]
    if rows < dim:  # few enough to be put together
        whole = jnp.concatenate([_floats(block) for block in read()])
        return _of_array(key, whole, want, None, None)
    plan = planned(want, rows, dim, gram_below=_BLOCKS_GRAM)
    dtype = jnp.result_type(float)
    op = in_blocks(lambda: map(_floats, read()), (rows, dim), dtype)
    return svd_of(key, op, op, plan)


_BLOCKS_GRAM = 50
"""Reading blocks again costs more than multiplying them."""


def _floats(matrix: ArrayLike) -> Array:
    dtype = getattr(matrix, "dtype", None)
    if dtype is None:
        raise TypeError(
            f"randomized_svd: wanted an array, got {type(matrix).__name__}; give "
            "sparse and implicit matrices as Products(matvec, rmatvec, shape)"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"randomized_svd: wanted a real floating dtype, got {dtype}; convert with "
            "matrix.astype(jnp.float32)"
        )
    array = jnp.asarray(matrix)
    small = jnp.finfo(array.dtype).bits < 32
    return array.astype(jnp.float32) if small else array


def _placement(array: Array, mesh: Any, axis: Axis) -> tuple[Any, Axis]:
    """The mesh and axis over which the rows are split, if they are."""
    if (mesh is None) != (axis is None):
        raise ValueError(
            f"randomized_svd: mesh and axis go together, got mesh={mesh}, axis={axis!r}"
        )
    known = jax.typeof(array) if isinstance(array, Tracer) else array
    sharding = getattr(known, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    spec = (*sharding.spec, None, None) if named else (None, None)
    if spec[1] is not None:
        raise ValueError(
            "randomized_svd: rows can be split over devices, columns cannot; got "
            f"sharding {spec[:2]}"
        )
    if mesh is None:
        if not named or spec[0] is None or sharding.mesh.empty:
            return None, None
        mesh, axis = sharding.mesh, spec[0]
    names = axis if isinstance(axis, tuple) else (axis,)
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        raise ValueError(
            f"randomized_svd: the mesh has axes {tuple(mesh.shape)}, got axis={axis!r}"
        )
    shards = int(np.prod([mesh.shape[name] for name in names]))
    if len(array) % shards:
        raise ValueError(
            f"randomized_svd: {len(array)} rows cannot be split over {shards} devices; "
            "add rows of zeros"
        )
    return mesh, axis
