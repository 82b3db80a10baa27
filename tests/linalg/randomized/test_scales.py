"""Matrices and tangents of any size that float32 has: results are those at 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.linalg import LinearMap, randomized_svd

KEY = jax.random.key(1)
TALL, WIDE = (200, 150), (150, 200)
CASES = [
    *(("array", TALL, name) for name in ("full", "gram", "krylov", "subspace")),
    *(("array", WIDE, name) for name in ("full", "gram", "krylov")),
    *(("blocks", TALL, name) for name in ("gram", "krylov")),
    *(("map", TALL, name) for name in ("gram", "krylov")),
]
SCALES = [-116, -100, -80, 100, 118, 124]  # powers of two: 1e-35 to 2e37


def hilbert(shape):
    i, j = np.ogrid[: shape[0], : shape[1]]
    return (1.0 / (i + j + 1)).astype(np.float32)


def decompose(kind, matrix, method):
    if kind == "array":
        return randomized_svd(KEY, matrix, 4, method=method)
    if kind == "blocks":
        return randomized_svd(KEY, [matrix[:90], matrix[90:]], 4, method=method)
    products = LinearMap(lambda x: matrix @ x, lambda y: matrix.T @ y, matrix.shape)
    return randomized_svd(KEY, products, 4, method=method)


@pytest.mark.slow_cases
@pytest.mark.parametrize(("kind", "shape", "method"), CASES)
def test_values_and_vectors_of_any_size_are_those_of_numpy(kind, shape, method):
    base = hilbert(shape)
    for power in SCALES:
        matrix = (base * np.float64(2.0) ** power).astype(np.float32)
        _, truth, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        svd = decompose(kind, jnp.asarray(matrix), method)
        error = np.abs(np.asarray(svd.s, np.float64) - truth[:4]).max() / truth[0]
        assert error < 5e-6, (power, error)
        cosine = np.abs(np.asarray(svd.vt)[:2] @ right[:2].T)
        np.testing.assert_allclose(np.diag(cosine), 1, atol=1e-4)
        u = np.asarray(svd.u)
        np.testing.assert_allclose(u.T @ u, np.eye(4), atol=1e-5)


def test_ordinary_sizes_change_no_bits_but_the_exponent():
    base = hilbert(TALL)
    plain, scaled = (
        randomized_svd(KEY, base * np.float32(f), 4) for f in (1.0, 2.0**40)
    )
    np.testing.assert_array_equal(plain.u, scaled.u)
    np.testing.assert_array_equal(plain.vt, scaled.vt)
    np.testing.assert_array_equal(plain.s * 2.0**40, scaled.s)


def test_values_beyond_the_range_raise_and_zeros_do_not():
    with pytest.raises(ValueError, match=r"^randomized_svd: .* size"):
        randomized_svd(KEY, np.full(TALL, 1e37, np.float32), 4)
    assert not np.any(randomized_svd(KEY, np.zeros(TALL, np.float32), 4).s)


def planted():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(8, 5)))
    v, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    matrix = (u * np.array([5.0, 3.5, 2.0, 1.2, 0.6])) @ v.T
    return matrix, rng.normal(size=(8, 5)), rng.normal(size=(2, 5))


def right_vectors(matrix):
    vt = np.linalg.svd(matrix, full_matrices=False)[2][:2]
    largest = np.take_along_axis(vt, np.abs(vt).argmax(1)[:, None], 1)
    return vt * np.sign(largest)


def triplets(matrix):
    return randomized_svd(KEY, matrix, 2)


@jax.jit
def push(matrix, change):
    return jax.jvp(lambda a: (triplets(a).s, triplets(a).vt), (matrix,), (change,))[1]


@jax.jit
def pull(matrix, weight):
    return jax.grad(lambda a: jnp.sum(triplets(a).vt * weight))(matrix)


@jax.jit
def push_twice(matrix, change):
    def slope(a):
        return jax.jvp(lambda a: triplets(a).s, (a,), (change,))[1]

    return jax.jvp(slope, (matrix,), (change,))[1]


def relative(x, truth):
    return np.abs(np.asarray(x, np.float64) - truth).max() / np.abs(truth).max()


SIZES = [(1, 1), (1e25, 1), (1e-25, 1), (1, 1e-30), (1e30, 1e30), (1e-30, 1e-30)]


@pytest.mark.slow_cases
@pytest.mark.parametrize("transpose", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize(("size", "step"), [*SIZES, (1e25, 1e-8), (1e18, 1)])
def test_tangents_of_any_size_are_those_of_differences(size, step, transpose):
    matrix, change, _ = (x.T if transpose else x for x in planted())
    h = 1e-6
    ahead, behind = matrix + h * change, matrix - h * change
    truth = (right_vectors(ahead) - right_vectors(behind)) / (2 * h)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    slopes = np.sum((u.T @ change) * vt, axis=1)[:2]
    s_dot, vt_dot = push(jnp.float32(matrix * size), jnp.float32(change * step))
    assert relative(np.float64(s_dot) / step, slopes) < 1e-5
    assert relative(np.float64(vt_dot) * size / step, truth) < 1e-4


@pytest.mark.parametrize("step", [1e-30, 1e-22, 1e-18, 1e18, 1e25, 1e30])
def test_gradients_of_any_size_are_those_of_tangents(step):
    matrix, change, weight = planted()
    h = 1e-6
    ahead, behind = matrix + h * change, matrix - h * change
    truth = np.vdot((right_vectors(ahead) - right_vectors(behind)) / (2 * h), weight)
    grad = np.float64(pull(jnp.float32(matrix), jnp.float32(weight * step)))
    assert abs(np.vdot(grad / step, change) / truth - 1) < 1e-4


@pytest.mark.parametrize("size", [1, 1e18, 1e25, 1e-20, 1e-25])
def test_second_derivatives_of_any_size_are_those_of_differences(size):
    matrix, change, _ = planted()
    h = 1e-3
    ahead, here, behind = (
        np.linalg.svd(matrix + t * change, compute_uv=False)[:2] for t in (h, 0, -h)
    )
    truth = (ahead - 2 * here + behind) / h**2
    second = push_twice(jnp.float32(matrix * size), jnp.float32(change))
    assert relative(np.float64(second) * size, truth) < 1e-3
