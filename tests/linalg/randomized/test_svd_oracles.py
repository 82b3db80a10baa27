"""What scikit-learn, SciPy and fbpca ask of their decompositions, asked of ours.

The cases follow ``sklearn.utils.tests.test_extmath``,
``scipy.sparse.linalg.tests.test_svds`` and the self tests of ``fbpca``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.linalg import LinearMap, randomized_svd

slow = pytest.mark.slow


def f64(x):
    return np.asarray(x).astype(np.float64)


def orthonormal(rng, n, k):
    return np.linalg.qr(rng.standard_normal((n, k)))[0]


def assert_orthonormal(q, tolerance=1e-5):
    q = f64(q)
    assert np.abs(q.T @ q - np.eye(q.shape[1])).max() <= tolerance


def product(out):
    return (f64(out.u) * f64(out.s)) @ f64(out.vt)


def assert_decomposition(a, out, k, tolerance=5e-6, check_product=True):
    """Shapes, orthogonality, order, values, the best product, both residuals."""
    a = f64(a)
    n, d = a.shape
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    assert (out.u.shape, out.s.shape, out.vt.shape) == ((n, k), (k,), (k, d))
    assert_orthonormal(out.u)
    assert_orthonormal(out.vt.T)
    assert (np.asarray(out.s) >= 0).all()
    assert (np.diff(out.s) <= 0).all()
    atol = tolerance * s[0]
    assert np.abs(f64(out.s) - s[:k]).max() <= atol
    if check_product:
        best = (u[:, :k] * s[:k]) @ vt[:k]
        assert np.abs(product(out) - best).max() <= 4 * atol
    assert np.abs(a @ f64(out.vt).T - f64(out.u) * f64(out.s)).max() <= 4 * atol
    assert np.abs(a.T @ f64(out.u) - f64(out.vt).T * f64(out.s)).max() <= 4 * atol


# scikit-learn

N, D = 100, 500
SMALL = [(7, 6), (6, 7), (6, 6)]


def low_rank(effective_rank, tail, seed=0, shape=(N, D)):
    """A bell of singular values on a tail that decays slowly."""
    rng = np.random.default_rng(seed)
    k = min(shape)
    i = np.arange(k) / effective_rank
    values = (1 - tail) * np.exp(-(i**2)) + tail * np.exp(-0.1 * i)
    return (orthonormal(rng, shape[0], k) * values) @ orthonormal(rng, shape[1], k).T


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "method", ["auto", "subspace", pytest.param("gram", marks=slow)]
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=slow)])
def test_low_rank(key, method, dtype):
    a = low_rank(5, 0.0).astype(dtype)
    assert_decomposition(a, randomized_svd(key, a, 10, method=method), 10)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", pytest.param("subspace", marks=slow)])
def test_low_rank_in_float64(method):
    a = low_rank(5, 0.0)
    with jax.enable_x64(True):
        out = randomized_svd(jax.random.key(0), jnp.asarray(a), 10, method=method)
    assert out.s.dtype == np.float64
    assert_decomposition(a, out, 10, tolerance=1e-9)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_integers_are_refused(key, dtype):
    with pytest.raises(TypeError, match=dtype):
        randomized_svd(key, np.ones((4, 3), dtype), 2)


@pytest.mark.slow
@pytest.mark.parametrize("tail", [0.1, 1.0])
def test_power_iterations_see_through_noise(key, tail):
    """Without iterations the values are off, with them they are not."""
    a = low_rank(5, tail).astype(np.float32)
    values = np.linalg.svd(f64(a), compute_uv=False)[:10]
    rough = randomized_svd(key, a, 10, power_iters=0, method="subspace", oversample=6)
    fine = randomized_svd(key, a, 10, power_iters=10, method="subspace")
    assert np.abs(f64(rough.s) - values).max() >= 0.1 * tail
    np.testing.assert_allclose(f64(fine.s), values, rtol=0, atol=1e-3)


def textbook(a, k, width, power_iters, seed):
    """Subspace iteration from the shorter side, made orthonormal at every step."""
    q = np.random.default_rng(seed).standard_normal((a.shape[0], width))
    for _ in range(power_iters):
        q = np.linalg.qr(a @ np.linalg.qr(a.T @ q)[0])[0]
    return np.linalg.svd(q.T @ a, compute_uv=False)[:k]


@slow
def test_as_accurate_as_the_textbook():
    a = low_rank(5, 1.0)
    values = np.linalg.svd(a, compute_uv=False)[:10]
    options = {"oversample": 10, "power_iters": 5, "method": "subspace"}
    errors = []
    for seed in range(20):
        key = jax.random.key(seed)
        ours = f64(randomized_svd(key, a.astype(np.float32), 10, **options).s)
        theirs = textbook(a, 10, 20, 5, seed)
        errors.append([np.abs(s - values).max() for s in (ours, theirs)])
    ours, theirs = np.mean(errors, axis=0)
    assert ours <= 1.3 * theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["subspace", *[pytest.param(m, marks=slow) for m in ["auto", "krylov"]]]
)
def test_transpose_is_consistent(key, method):
    a = low_rank(4, 0.5).astype(np.float32)
    straight = randomized_svd(key, a, 10, method=method)
    turned = randomized_svd(key, a.T, 10, method=method)
    np.testing.assert_allclose(turned.s, straight.s, rtol=0, atol=1e-4)
    np.testing.assert_allclose(product(turned).T, product(straight), atol=1e-3)
    values = np.linalg.svd(f64(a), compute_uv=False)[:10]
    np.testing.assert_allclose(straight.s, values, rtol=0, atol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "power_iters", [2, 10, *[pytest.param(i, marks=slow) for i in [5, 20, 50]]]
)
def test_many_power_iterations_are_stable(key, power_iters):
    a = low_rank(50, 0.5, seed=42).astype(np.float32) * 100
    values = np.linalg.svd(f64(a), compute_uv=False)
    out = randomized_svd(key, a, 10, method="subspace", power_iters=power_iters)
    residual = np.linalg.norm(a - product(out))
    assert residual <= 1.001 * np.linalg.norm(values[10:])


@pytest.mark.parametrize("seed", range(10))
def test_signs_over_seeds(seed):
    values = np.arange(6.0, 0.0, -1.0)
    a = np.eye(*SMALL[0], dtype=np.float32) * values.astype(np.float32)[None]
    u, s, vt, _ = randomized_svd(jax.random.key(seed), a, 6)
    np.testing.assert_allclose(s, values, rtol=1e-6)
    np.testing.assert_allclose(u, np.eye(*SMALL[0]), atol=1e-6)
    np.testing.assert_allclose(vt, np.eye(6), atol=1e-6)


# scipy.sparse.linalg.svds


def random_matrix(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


KINDS = {
    "random": random_matrix,
    "ones": lambda shape: np.ones(shape, np.float32),
    "zero": lambda shape: np.zeros(shape, np.float32),
    "identity": lambda shape: np.eye(*shape, dtype=np.float32),
    "first row": lambda shape: random_matrix(shape) * np.eye(shape[0])[0][:, None],
    "counting": lambda shape: np.arange(np.prod(shape)).reshape(shape),
}
AT_MOST_RANK_ONE = ["ones", "zero", "first row"]


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("shape", "k"),
    [
        *[(shape, 6) for shape in SMALL],
        (SMALL[0], 1),
        *[pytest.param(shape, 1, marks=slow) for shape in SMALL[1:]],
        *[pytest.param(shape, 3, marks=slow) for shape in SMALL],
        *[pytest.param(shape, 5, marks=slow) for shape in SMALL],
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_small_matrices(key, kind, shape, k):
    a = KINDS[kind](shape).astype(np.float32)
    out = randomized_svd(key, a, k)
    whole_space = k == min(shape) or kind not in ["identity", *AT_MOST_RANK_ONE]
    assert_decomposition(a, out, k, check_product=whole_space)
    if kind in AT_MOST_RANK_ONE:
        assert (np.asarray(out.s)[1:] <= 1e-6 * f64(out.s)[0]).all()


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "method", ["auto", *[pytest.param(m, marks=slow) for m in ["gram", "subspace"]]]
)
@pytest.mark.parametrize("decade", range(1, 8))
def test_small_values(key, method, decade):
    """Values 1 and then ``10**-decade``: the vectors are orthonormal still."""
    rng = np.random.default_rng(decade)
    values = np.where(np.arange(10) < 2, 1.0, 10.0**-decade)
    a = (orthonormal(rng, 10, 10) * values) @ orthonormal(rng, 10, 10).T
    out = randomized_svd(key, a.astype(np.float32), 6, method=method)
    assert_decomposition(a.astype(np.float32), out, 6, check_product=False)


@pytest.mark.parametrize(
    "method", ["auto", *[pytest.param(m, marks=slow) for m in ["gram", "subspace"]]]
)
def test_values_of_all_sizes(key, method):
    rng = np.random.default_rng(1)
    a = (orthonormal(rng, 10, 10) * 10.0 ** -np.arange(10)) @ orthonormal(rng, 10, 10)
    out = randomized_svd(key, a.astype(np.float32), 6, method=method)
    assert_decomposition(a.astype(np.float32), out, 6)


@pytest.mark.parametrize("shape", [(7, 6), pytest.param((6, 7), marks=slow)])
def test_operator(key, shape):
    a = random_matrix(shape)
    products = LinearMap(lambda x: a @ x, lambda x: a.T @ x, shape)
    out = jax.jit(lambda key: randomized_svd(key, products, 6))(key)
    assert_decomposition(a, out, 6)


def test_reproducible():
    a = random_matrix((7, 6))
    runs = [randomized_svd(jax.random.key(3), a, 6) for _ in range(2)]
    for x, y in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("k", [0, 7, -1])
@pytest.mark.parametrize("shape", SMALL)
def test_ranks_out_of_range(key, shape, k):
    with pytest.raises(ValueError, match="rank"):
        randomized_svd(key, random_matrix(shape), k)


# fbpca

SHAPES = [(10, 20), (20, 10), (20, 20)]
# All values, and six of ten: the programs of the small matrices above.
WHOLE_OR_CUT = [*[(shape, 6) for shape in SMALL], ((10, 10), 6)]


def decaying_diagonal(shape):
    a = np.zeros(shape)
    a[range(3), range(3)] = [1.0, 0.1, 0.01]
    return a


def second_differences_cubed(shape):
    m = max(shape)
    a = 2 * np.eye(m) - np.eye(m, k=1) - np.eye(m, k=-1)
    a = np.linalg.matrix_power(a, 3)[: shape[0], : shape[1]]
    return a / np.linalg.norm(a, 2)


@pytest.mark.slow_cases
@pytest.mark.parametrize("of_shape", [decaying_diagonal, second_differences_cubed])
@pytest.mark.parametrize(
    ("shape", "k", "method"),
    [
        *[(*case, "auto") for case in WHOLE_OR_CUT],
        *[pytest.param(shape, 9, "auto", marks=slow) for shape in SHAPES],
        (SHAPES[0], 3, "auto"),
        (SHAPES[0], 3, "subspace"),
        *[pytest.param(shape, 3, "auto", marks=slow) for shape in SHAPES[1:]],
        *[pytest.param(shape, 3, "subspace", marks=slow) for shape in SHAPES[1:]],
        *[pytest.param(shape, 9, "gram", marks=slow) for shape in SHAPES],
        *[pytest.param(shape, 9, "krylov", marks=slow) for shape in SHAPES],
    ],
)
def test_known_matrices(key, of_shape, shape, k, method):
    a = of_shape(shape).astype(np.float32)
    out = randomized_svd(key, a, k, method=method)
    assert_decomposition(a, out, k)
    if of_shape is decaying_diagonal:
        np.testing.assert_allclose(out.s[:3], [1.0, 0.1, 0.01], rtol=0, atol=1e-6)
        assert np.abs(product(out) - a).max() <= 5e-6
