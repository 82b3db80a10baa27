"""Products with a few rows of a matrix per example, with what makes them fast on CPUs.

``rows [M, D]`` are the features and ``index [N, k]`` says which of them an example
uses.  On a CPU the rows are gathered a chunk of examples at a time, small enough for
the cache; elsewhere, and where ``k`` is no small part of ``M``, a dense product is
faster and takes its place (docs/decisions/dictionary.md, "Rows are
gathered 64 examples at a time").  Each function's derivative is made of the other two.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.types import Array

# Measured on a CPU: docs/decisions/dictionary.md, "Rows are gathered 64 examples at a
# time".
_CHUNK = 64  # examples whose gathered rows stay in the cache
_DENSE_BELOW = 20  # M / k from which rows are gathered
_SMALL = 2**18  # M D below which dense products are faster, and transposed


@jax.custom_vjp
def weighted_rows(values: Array, index: Array, rows: Array) -> Array:
    """Compute ``sum_i values[n, i] rows[index[n, i]]``, ``[N, D]``."""
    gathered, dense = _weighted_rows, _weighted_rows_dense
    return _choose(gathered, dense, rows.shape, values, index, rows)


@jax.custom_vjp
def row_products(x: Array, index: Array, rows: Array) -> Array:
    """Compute ``x[n] . rows[index[n, i]]``, ``[N, k]``."""
    return _choose(_row_products, _row_products_dense, rows.shape, x, index, rows)


def row_sums(values: Array, index: Array, x: Array, num: int) -> Array:
    """Sum ``values[n, i] x[n]`` over all ``index[n, i] = m``, ``[num, D]``."""
    gathered, dense = partial(_row_sums, num), partial(_row_sums_dense, num)
    return _choose(gathered, dense, (num, x.shape[1]), values, index, x)


def scatter(values: Array, index: Array, num: int) -> Array:
    """Scatter ``values [N, k]`` to ``index`` of zeros ``[N, num]``."""
    examples = jnp.arange(len(values))[:, None]
    zeros = jnp.zeros((len(values), num), values.dtype)
    # An example names no latent twice, so XLA need not order the writes.
    return zeros.at[examples, index].set(values, unique_indices=True)


@jax.custom_vjp
def take(
    x: Array, origin: Array, matrix: Array, bias: Array, pre: Array, index: Array
) -> Array:
    """Take ``pre = affine(x, origin, matrix, bias)`` at ``index [N, k]``.

    The derivative is that of the entries taken, by a few rows per example.
    """
    del x, origin, matrix, bias
    return jnp.take_along_axis(pre, index, axis=1)


def affine(x: Array, origin: Array, matrix: Array, bias: Array) -> Array:
    """Compute ``(x - origin) @ matrix + bias``.

    The derivative by ``origin`` is a matrix times a vector, not a product over the
    batch that is summed afterwards: five large products a step instead of six.
    """
    return _affine(x, origin, matrix, bias)


@jax.custom_vjp
def _affine(x: Array, origin: Array, matrix: Array, bias: Array) -> Array:
    return (x - origin[None, :]) @ matrix + bias[None, :]


def _affine_forward(x: Array, origin: Array, matrix: Array, bias: Array) -> tuple:
    return _affine(x, origin, matrix, bias), (x - origin[None, :], matrix)


def _affine_backward(saved: tuple, change: Array) -> tuple:
    centred, matrix = saved
    total = jnp.sum(change, axis=0)  # not a product [N, M] [M, D] that is then summed
    return change @ matrix.T, -(matrix @ total), centred.T @ change, total


_affine.defvjp(_affine_forward, _affine_backward)


@jax.custom_vjp
def decode_dense(values: Array, rows: Array) -> Array:
    """Compute ``values [N, M] @ rows [M, D]``.

    The derivative by the rows is a :func:`transposed_product`.
    """
    return values @ rows


def transposed_product(values: Array, x: Array) -> Array:
    """Compute ``values [N, M].T @ x [N, D]``, by way of its transpose if it is small.

    A CPU then reads the columns of ``values`` in order, in half the time at 1024 x 128
    by 32; transposing a large result takes what was gained.  Without the barrier XLA
    would simplify the two transpositions away.
    """
    # Transposing a large result would take what was gained.
    if values.shape[1] * x.shape[1] >= _SMALL:
        return values.T @ x
    return jax.lax.optimization_barrier(x.T @ values).T


def _decode_dense_forward(values: Array, rows: Array) -> tuple:
    return decode_dense(values, rows), (values, rows)


def _decode_dense_backward(saved: tuple, change: Array) -> tuple:
    values, rows = saved
    return change @ rows.T, transposed_product(values, change)


decode_dense.defvjp(_decode_dense_forward, _decode_dense_backward)


def _take_forward(
    x: Array, origin: Array, matrix: Array, bias: Array, pre: Array, index: Array
) -> tuple:
    saved = x - origin[None, :], matrix, index
    return take(x, origin, matrix, bias, pre, index), saved


def _take_backward(saved: tuple, change: Array) -> tuple:
    centred, matrix, index = saved
    latents = matrix.shape[1]
    # By the bias: changes of all examples, summed latent by latent.
    total = jnp.zeros(latents, change.dtype).at[index].add(change)
    # By the matrix: every latent's sum of the inputs that took it.
    by_matrix = row_sums(change, index, centred, latents).T
    # By the input: the columns that it took.  The origin has the opposite sign.
    by_x = weighted_rows(change, index, matrix.T)
    return by_x, -(matrix @ total), by_matrix, total, None, None


take.defvjp(_take_forward, _take_backward)


def _choose(
    gathered: Callable[..., Array],
    dense: Callable[..., Array],
    shape: tuple[int, ...],
    left: Array,
    index: Array,
    right: Array,
) -> Array:
    """Gather few rows of a large matrix ``shape`` on a CPU; anything else is dense."""
    num, dim = shape
    if num < _DENSE_BELOW * index.shape[1] or num * dim < _SMALL:
        return dense(left, index, right)
    cpu = partial(_sequential, gathered)
    return jax.lax.platform_dependent(left, index, right, cpu=cpu, default=dense)


def _sequential(fn: Callable[..., Array], *args: Array) -> Array:
    """Run members one after another under ``vmap``: gathers do not batch well."""
    return jax.custom_batching.sequential_vmap(fn)(*args)


def _in_chunks(fn: Callable[..., Array], *arrays: Array) -> Array:
    """Map ``fn`` over chunks of the leading axis; the last may be smaller."""
    num = len(arrays[0])
    end = num - num % _CHUNK  # of the full chunks
    parts = []
    # Full chunks, one after another: the rows of each stay in the cache.
    if end:
        chunks = tuple(a[:end].reshape(-1, _CHUNK, *a.shape[1:]) for a in arrays)
        results = jax.lax.map(lambda chunk: fn(*chunk), chunks)
        parts.append(results.reshape(end, *results.shape[2:]))
    # The examples that fill no chunk.
    if num > end:
        parts.append(fn(*(a[end:] for a in arrays)))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _weighted_rows(values: Array, index: Array, rows: Array) -> Array:
    return _in_chunks(lambda v, i: jnp.einsum("nk,nkd->nd", v, rows[i]), values, index)


def _weighted_rows_dense(values: Array, index: Array, rows: Array) -> Array:
    return scatter(values, index, len(rows)) @ rows


def _row_products(x: Array, index: Array, rows: Array) -> Array:
    return _in_chunks(lambda y, i: jnp.einsum("nd,nkd->nk", y, rows[i]), x, index)


def _row_products_dense(x: Array, index: Array, rows: Array) -> Array:
    return jnp.take_along_axis(x @ rows.T, index, axis=1)


def _row_sums(num: int, values: Array, index: Array, x: Array) -> Array:
    # One example adds to its own k rows: no array [N, k, D] is made.
    def add(n: Array, total: Array) -> Array:
        step = values[n][:, None] * x[n][None, :]
        return total.at[index[n]].add(step, unique_indices=True)

    zeros = jnp.zeros((num, x.shape[1]), x.dtype)
    return jax.lax.fori_loop(0, len(values), add, zeros)


def _row_sums_dense(num: int, values: Array, index: Array, x: Array) -> Array:
    return scatter(values, index, num).T @ x


def _weighted_rows_forward(values: Array, index: Array, rows: Array) -> tuple:
    return weighted_rows(values, index, rows), (values, index, rows)


def _weighted_rows_backward(saved: tuple, change: Array) -> tuple:
    values, index, rows = saved
    by_values = row_products(change, index, rows)
    return by_values, None, row_sums(values, index, change, len(rows))


def _row_products_forward(x: Array, index: Array, rows: Array) -> tuple:
    return row_products(x, index, rows), (x, index, rows)


def _row_products_backward(saved: tuple, change: Array) -> tuple:
    x, index, rows = saved
    by_x = weighted_rows(change, index, rows)
    return by_x, None, row_sums(change, index, x, len(rows))


weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)
row_products.defvjp(_row_products_forward, _row_products_backward)
