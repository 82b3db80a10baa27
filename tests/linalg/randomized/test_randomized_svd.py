"""``randomized_svd`` against float64 decompositions of numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.linalg import LinearMap, randomized_svd

N, D, K = 3000, 800, 8  # of the table of hard matrices
METHODS = ["auto", "gram", "subspace", "krylov", "full"]
FORCED = METHODS[1:]
CLUSTERED = ["clustered", "clustered at the cut"]
TALL, WIDE, RANK = (200, 150), (150, 200), 4  # of all that is small
GRAD_RANK = 3
slow = pytest.mark.slow


def orthonormal(rng, n, k):
    return np.linalg.qr(rng.standard_normal((n, k)))[0]


@functools.cache
def bases(shape, seed):
    rng = np.random.default_rng(seed)
    return [orthonormal(rng, n, min(shape)) for n in shape]


def with_values(shape, values, seed=0):
    u, v = (q[:, : len(values)] for q in bases(shape, seed))
    return ((u * values) @ v.T).astype(np.float32)


def scaled(a, factor):
    return (a.astype(np.float64) * factor).astype(np.float32)


def kahan(d, theta=1.2):
    upper = np.eye(d) - np.cos(theta) * np.triu(np.ones((d, d)), 1)
    return np.sin(theta) ** np.arange(d)[:, None] * upper


@functools.cache
def power_law():
    return with_values((N, D), 1 / np.arange(1.0, D + 1))


def hilbert():
    i, j = np.ogrid[:N, :D]
    return 1.0 / (i + j + 1)


def kahan_on_zeros():
    return np.pad(kahan(D), ((0, N - D), (0, 0)))


def clustered(copies):
    return with_values((N, D), np.where(np.arange(D) < copies, 1.0, 0.5))


def duplicated_columns():
    half = power_law()[:, : D // 2]
    return np.concatenate([half, half], axis=1)


def large_mean():
    return np.random.default_rng(1).standard_normal((N, D)) + 1e4


def constant_rows():
    rows = np.random.default_rng(2).standard_normal((N, 1))
    return np.broadcast_to(rows, (N, D))


def one_row():
    a = np.zeros((N, D))
    a[17] = np.random.default_rng(3).standard_normal(D)
    return a


TABLE = {
    "power law": power_law,
    "power law 1e-30": lambda: scaled(power_law(), 1e-30),
    "power law 1e30": lambda: scaled(power_law(), 1e30),
    "rank 1": lambda: with_values((N, D), [3.0]),
    "zero": lambda: np.zeros((N, D)),
    "hilbert": hilbert,
    "kahan": kahan_on_zeros,
    "clustered": lambda: clustered(8),
    "clustered at the cut": lambda: clustered(20),
    "duplicated columns": duplicated_columns,
    "mean 1e4 std": large_mean,
    "constant rows": constant_rows,
    "one nonzero row": one_row,
}


@pytest.fixture(scope="module")
def table():
    """A function: name -> the float32 matrix, its values in float64."""

    @functools.cache
    def case(name):
        a = np.ascontiguousarray(TABLE[name](), dtype=np.float32)
        return a, np.linalg.svd(a.astype(np.float64), compute_uv=False)

    return case


def f64(x):
    return np.asarray(x).astype(np.float64)


def orthogonality_error(q):
    q = f64(q)
    return np.abs(q.T @ q - np.eye(q.shape[1])).max()


def assert_signs(vt):
    vt = np.asarray(vt)
    np.testing.assert_allclose(vt.max(1), np.abs(vt).max(1), rtol=1e-6)


def assert_valid(out, shape, k):
    n, d = shape
    assert (out.u.shape, out.s.shape, out.vt.shape) == ((n, k), (k,), (k, d))
    for x in (out.u, out.s, out.vt, out.info.residual, out.info.orthogonality):
        assert np.isfinite(x).all()
    assert out.info.finite
    assert (np.asarray(out.s) >= 0).all()
    assert (np.diff(out.s) <= 0).all()
    # 128 eps: the rounding of inner products of a thousand entries is that of the
    # processor's own sums, 60 to 95 eps on the ones that were tried.
    assert orthogonality_error(out.u) <= 128 * np.finfo(np.float32).eps
    assert orthogonality_error(out.vt.T) <= 128 * np.finfo(np.float32).eps
    assert_signs(out.vt)


def excess_residual(a, vt, values):
    """|A - A V V'| over that of the best space of that dimension, minus 1."""
    a, vt = f64(a), f64(vt)
    optimum = np.linalg.norm(values[len(vt) :])
    return np.linalg.norm(a - (a @ vt.T) @ vt) / optimum - 1


def assert_values(s, values, tolerance=5e-6):
    s = f64(s)
    assert np.abs(s - values[: len(s)]).max() <= tolerance * values[0]


def assert_same(out, want, tolerance=1e-5, vectors=True):
    scale = f64(want.s)[0]
    np.testing.assert_allclose(f64(out.s), f64(want.s), rtol=0, atol=tolerance * scale)
    if vectors:
        np.testing.assert_allclose(f64(out.vt), f64(want.vt), rtol=0, atol=tolerance)
        if want.u is not None:
            np.testing.assert_allclose(f64(out.u), f64(want.u), rtol=0, atol=tolerance)


# Hard matrices


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TABLE)
def test_hard_matrices(key, table, name, method):
    a, values = table(name)
    out = randomized_svd(key, a, K, method=method)
    assert_valid(out, a.shape, K)
    if name in CLUSTERED:
        assert excess_residual(a, out.vt, values) <= 1e-3
    else:
        assert_values(out.s, values)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("shape", "rank", "method"),
    [
        ((1, 50), 1, "auto"),
        ((50, 1), 1, "auto"),
        ((7, 7), 7, "auto"),
        ((30, 40), 30, "auto"),
        ((40, 30), 30, "auto"),
        ((40, 30), 30, "subspace"),
        pytest.param((1, 50), 1, "gram", marks=slow),
        pytest.param((50, 1), 1, "gram", marks=slow),
        pytest.param((1, 50), 1, "subspace", marks=slow),
        pytest.param((50, 1), 1, "krylov", marks=slow),
        pytest.param((7, 7), 7, "gram", marks=slow),
        pytest.param((7, 7), 7, "krylov", marks=slow),
        pytest.param((40, 30), 30, "gram", marks=slow),
        pytest.param((30, 40), 30, "gram", marks=slow),
        pytest.param((30, 40), 30, "krylov", marks=slow),
        pytest.param((800, 30), 30, "gram", marks=slow),
        pytest.param((1, 1), 1, "auto", marks=slow),
        pytest.param((1, 1), 1, "krylov", marks=slow),
    ],
)
def test_tiny_matrices(key, shape, rank, method):
    a = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    out = randomized_svd(key, a, rank, method=method)
    assert_valid(out, shape, rank)
    assert_values(out.s, np.linalg.svd(f64(a), compute_uv=False))
    product = (f64(out.u) * f64(out.s)) @ f64(out.vt)
    assert np.abs(product - a).max() <= 1e-5 * f64(out.s)[0]


# Info


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", FORCED)
def test_info_names_the_method(key, table, method):
    out = randomized_svd(key, table("power law")[0], K, method=method)
    assert out.info.method == method
    assert out.info.passes >= 2
    assert out.info.width >= K
    error = max(orthogonality_error(out.u), orthogonality_error(out.vt.T))
    assert abs(out.info.orthogonality - error) <= 1e-6


@pytest.fixture(scope="module")
def slow_spectrum():
    return with_values((N, D), np.arange(1.0, D + 1) ** -0.5)


def true_residual(a, out):
    return np.linalg.norm(a - (np.asarray(out.u) * np.asarray(out.s)) @ out.vt)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", FORCED)
def test_residual_of_one_seed(key, slow_spectrum, method):
    out = randomized_svd(key, slow_spectrum, K, method=method)
    truth = true_residual(slow_spectrum, out)
    assert abs(out.info.residual / truth - 1) <= 0.4


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "method", ["subspace", "krylov", pytest.param("gram", marks=slow)]
)
def test_residual_over_seeds(slow_spectrum, method):
    ratios = []
    for seed in range(30):
        out = randomized_svd(jax.random.key(seed), slow_spectrum, K, method=method)
        ratios.append(float(out.info.residual) / true_residual(slow_spectrum, out))
    assert abs(np.mean(ratios) - 1) <= 0.1


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", ["gram", "subspace"])
def test_fallback_is_told(key, table, method):
    easy = randomized_svd(key, table("power law")[0], K, method=method)
    hard = randomized_svd(key, table("constant rows")[0], K, method=method)
    assert (bool(easy.info.fallback), bool(hard.info.fallback)) == (False, True)


# One result by many ways


@pytest.fixture(scope="module")
def tall():
    return with_values(TALL, 0.7 ** np.arange(150.0))


@functools.cache
def jitted(method, rank, compute_u=True):
    options = {"rank": rank, "method": method, "compute_u": compute_u}
    return jax.jit(functools.partial(randomized_svd, **options))


@pytest.mark.parametrize(
    "method", ["auto", "gram", "subspace", pytest.param("full", marks=slow)]
)
def test_deterministic(key, table, method):
    a = table("power law")[0]
    one = randomized_svd(key, a, K, method=method)
    two = randomized_svd(key, a, K, method=method)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "method", ["auto", *[pytest.param(m, marks=slow) for m in FORCED]]
)
def test_jit_is_eager(key, table, method):
    a = table("power law")[0]
    out = jitted(method, K)(key, a)
    want = randomized_svd(key, a, K, method=method)
    assert out.info.method == want.info.method
    assert_same(out, want)
    np.testing.assert_allclose(out.info.residual, want.info.residual, rtol=1e-4)


@functools.cache
def mapped(method):
    return jax.vmap(functools.partial(randomized_svd, rank=RANK, method=method))


VMAPPED = ["gram", "subspace", *[pytest.param(m, marks=slow) for m in METHODS[3:]]]


@pytest.mark.slow
@pytest.mark.parametrize("method", VMAPPED)
def test_vmap_is_a_loop(tall, method):
    batch = [tall, scaled(tall, 1e30), with_values(TALL, [3.0])]
    keys = jax.random.split(jax.random.key(1), 3)
    out = mapped(method)(keys, np.stack(batch))
    assert out.info.method == method
    out = jax.tree.map(np.asarray, out)
    for i, a in enumerate(batch):
        one = jax.tree.map(lambda x, i=i: x[i], out)
        assert_valid(one, TALL, RANK)
        alone = randomized_svd(keys[i], a, RANK, method=method)
        assert bool(one.info.fallback) == bool(alone.info.fallback)
        assert_same(one, alone, vectors=i < 2)
        if i < 2:
            assert_exact(one, a)


def exact(a, k):
    """Triplets of numpy, with the rule of signs."""
    u, s, vt = np.linalg.svd(f64(a), full_matrices=False)
    sign = np.sign(np.take_along_axis(vt, np.abs(vt).argmax(1)[:, None], 1))[:, 0]
    return u[:, :k] * sign[:k], s[:k], vt[:k] * sign[:k, None]


def assert_exact(out, a, tolerance=2e-5):
    u, s, vt = exact(a, len(out.s))
    assert np.abs(f64(out.s) - s).max() <= 5e-6 * s[0]
    assert np.abs(f64(out.vt) - vt).max() <= tolerance
    if out.u is not None:
        assert np.abs(f64(out.u) - u).max() <= tolerance


def numpy_products(a):
    return LinearMap(
        lambda x: a @ np.asarray(x), lambda x: a.T @ np.asarray(x), a.shape
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize(
    "method", ["auto", *[pytest.param(m, marks=slow) for m in FORCED]]
)
def test_products_on_the_host(key, tall, transposed, method):
    a = tall.T.copy() if transposed else tall
    out = randomized_svd(key, numpy_products(a), RANK, method=method)
    assert_valid(out, a.shape, RANK)
    assert_exact(out, a)


def of_products(key, a, method):
    products = LinearMap(lambda x: a @ x, lambda x: a.T @ x, a.shape)
    return randomized_svd(key, products, RANK, method=method)


@pytest.mark.parametrize(
    ("transposed", "method"),
    [
        (True, "subspace"),
        pytest.param(True, "krylov", marks=slow),
        pytest.param(True, "gram", marks=slow),
        pytest.param(True, "full", marks=slow),
        pytest.param(False, "subspace", marks=slow),
        pytest.param(False, "krylov", marks=slow),
        pytest.param(False, "gram", marks=slow),
        pytest.param(False, "full", marks=slow),
    ],
)
def test_products_under_jit(key, tall, transposed, method):
    a = tall.T.copy() if transposed else tall
    out = jax.jit(of_products, static_argnames="method")(key, a, method=method)
    assert_valid(out, a.shape, RANK)
    assert_exact(out, a)


def row_blocks(a, heights):
    return np.split(a, np.cumsum(heights)[:-1])


UNEVEN = [70, 1, 70, 58, 1]


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "method",
    ["auto", "subspace", *[pytest.param(m, marks=slow) for m in ["krylov", "full"]]],
)
def test_blocks_are_dense(key, tall, method):
    blocks = row_blocks(tall, UNEVEN)
    of_list = randomized_svd(key, blocks, RANK, method=method)
    of_call = randomized_svd(key, lambda: iter(blocks), RANK, method=method)
    assert_valid(of_list, tall.shape, RANK)
    assert_exact(of_list, tall)
    assert_same(of_call, of_list, 0.0)


@slow
def test_blocks_of_one_row(key, tall):
    out = randomized_svd(key, row_blocks(tall, [1] * 200), RANK)
    assert_exact(out, tall)


@slow
@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_a_wide_matrix(key, tall, method):
    wide = tall.T.copy()
    out = randomized_svd(key, row_blocks(wide, [70, 70, 10]), RANK, method=method)
    assert_exact(out, wide)


@pytest.mark.parametrize(
    "method",
    ["subspace", *[pytest.param(m, marks=slow) for m in ["gram", "krylov", "full"]]],
)
def test_without_u(key, table, method):
    a = table("power law")[0]
    out = randomized_svd(key, a, K, method=method, compute_u=False)
    want = randomized_svd(key, a, K, method=method)
    assert out.u is None
    assert_same(out, want._replace(u=None))


# Precisions


@pytest.mark.parametrize(
    ("sketch", "last", "method"),
    [
        ("bfloat16", 1.2e-2, "subspace"),
        pytest.param("tensorfloat32", 1.2e-3, "subspace", marks=slow),
        pytest.param("bfloat16", 1.2e-2, "krylov", marks=slow),
        pytest.param("tensorfloat32", 1.2e-3, "krylov", marks=slow),
    ],
)
def test_sketch_of_low_precision(key, sketch, last, method):
    decay = last ** (1 / (RANK - 1))
    a = with_values(TALL, decay ** np.arange(150.0), seed=6)
    out = randomized_svd(key, a, RANK, sketch=sketch, method=method)
    assert_valid(out, a.shape, RANK)
    assert_exact(out, a, tolerance=2e-3 if sketch == "bfloat16" else 1e-4)
    values = np.linalg.svd(f64(a), compute_uv=False)
    assert np.abs(np.asarray(out.s) - values[:RANK]).max() <= 1e-6 * values[0]


@slow
@pytest.mark.parametrize("sketch", ["bfloat16", "tensorfloat32"])
def test_sketch_of_a_larger_matrix(key, table, sketch):
    a, values = table("power law")
    out = randomized_svd(key, a, K, sketch=sketch)
    assert_valid(out, a.shape, K)
    assert_values(out.s, values)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
def test_input_of_16_bits(key, tall, dtype):
    a = jnp.asarray(tall).astype(dtype)
    out = randomized_svd(key, a, RANK)
    assert {x.dtype.name for x in (out.u, out.s, out.vt)} == {"float32"}
    assert_values(out.s, np.linalg.svd(f64(a), compute_uv=False))


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "method", ["gram", *[pytest.param(m, marks=slow) for m in ["full", "subspace"]]]
)
def test_float64(method):
    rng = np.random.default_rng(7)
    u, v = orthonormal(rng, TALL[0], 60), orthonormal(rng, TALL[1], 60)
    values = 0.3 ** np.arange(60.0)
    with jax.enable_x64(True):
        a = jnp.asarray((u * values) @ v.T)
        out = randomized_svd(jax.random.key(0), a, RANK, method=method)
        assert out.s.dtype == jnp.float64
        assert np.abs(np.asarray(out.s) - values[:RANK]).max() <= 1e-10
        projector = v[:, :RANK] @ v[:, :RANK].T
        assert np.abs(np.asarray(out.vt.T @ out.vt) - projector).max() <= 1e-10
        product = (u[:, :RANK] * values[:RANK]) @ v[:, :RANK].T
        of_out = np.asarray((out.u * out.s[None]) @ out.vt)
        assert np.abs(of_out - product).max() <= 1e-10


# Derivatives


def invariants(u, s, vt, weights):
    """Functions that do not depend on the choice of vectors in their space.

    The first one does where values are equal, the others do not.
    """
    of_s, of_v, of_u, of_a = weights
    out = [(of_s * s).sum(), s.sum(), (of_v * (vt.T @ vt)).sum()]
    if u is None:
        return out
    return [*out, (of_u * (u @ u.T)).sum(), (of_a * ((u * s[None]) @ vt)).sum()]


@functools.cache
def grad_case(transposed):
    rng = np.random.default_rng(8)
    shape = (48, 60) if transposed else (60, 48)
    a = with_values(shape, 0.6 ** np.arange(48.0), seed=9)
    of_s = np.arange(1.0, GRAD_RANK + 1)
    n, d = shape
    weights = [of_s, *[rng.standard_normal(m) for m in [(d, d), (n, n), shape]]]
    return a, [w.astype(np.float32) for w in weights], rng.standard_normal((3, *shape))


@functools.cache
def jacobian(transposed, method, compute_u):
    _, weights, _ = grad_case(transposed)

    def functions(a):
        key = jax.random.key(0)
        options = {"method": method, "compute_u": compute_u}
        u, s, vt, _ = randomized_svd(key, a, GRAD_RANK, **options)
        return jnp.stack(invariants(u, s, vt, weights))

    return functions, jax.jit(jax.jacrev(functions))


def of_numpy(a, weights):
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    k = GRAD_RANK
    return np.stack(invariants(u[:, :k], s[:k], vt[:k], weights))


def central_differences(a, weights, directions, step=1e-5):
    a = f64(a)
    rows = [
        (of_numpy(a + step * d, weights) - of_numpy(a - step * d, weights)) / (2 * step)
        for d in directions
    ]
    return np.stack(rows, axis=1)  # [function, direction]


GRADS = [
    (False, "auto", True),
    (False, "subspace", True),
    (True, "gram", True),
    (True, "auto", False),
    pytest.param(False, "gram", True, marks=slow),
    pytest.param(False, "krylov", True, marks=slow),
    pytest.param(False, "auto", False, marks=slow),
    pytest.param(False, "subspace", False, marks=slow),
    pytest.param(True, "auto", True, marks=slow),
    pytest.param(True, "subspace", True, marks=slow),
    pytest.param(True, "krylov", True, marks=slow),
    pytest.param(True, "gram", False, marks=slow),
]


@pytest.mark.slow_cases
@pytest.mark.parametrize(("transposed", "method", "compute_u"), GRADS)
def test_gradient(transposed, method, compute_u):
    a, weights, directions = grad_case(transposed)
    gradient = f64(jacobian(transposed, method, compute_u)[1](a))
    want = central_differences(a, weights, directions)[: len(gradient)]
    got = np.einsum("fnd,mnd->fm", gradient, directions)
    sizes = np.abs(want).max(axis=1, keepdims=True)
    np.testing.assert_allclose(got / sizes, want / sizes, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("transposed", "method"),
    [
        (False, "auto"),
        pytest.param(True, "auto", marks=slow),
        pytest.param(False, "subspace", marks=slow),
        pytest.param(False, "krylov", marks=slow),
        pytest.param(True, "gram", marks=slow),
    ],
)
def test_jvp(transposed, method):
    a, weights, directions = grad_case(transposed)
    functions = jacobian(transposed, method, True)[0]
    push = jax.jit(lambda a, d: jax.jvp(functions, (a,), (d,))[1])
    got = np.stack([push(a, d.astype(np.float32)) for d in directions], axis=1)
    want = central_differences(a, weights, directions)
    sizes = np.abs(want).max(axis=1, keepdims=True)
    np.testing.assert_allclose(got / sizes, want / sizes, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("transposed", "method", "compute_u"), GRADS)
@pytest.mark.parametrize("kind", ["identity", "zero", "rank 1"])
def test_gradient_is_finite_at_equal_values(kind, transposed, method, compute_u):
    shape = grad_case(transposed)[0].shape
    a = np.eye(*shape) if kind == "identity" else np.zeros(shape)
    a = with_values(shape, [1.0]) if kind == "rank 1" else a.astype(np.float32)
    assert np.isfinite(jacobian(transposed, method, compute_u)[1](a)).all()


@pytest.mark.parametrize(("transposed", "method", "compute_u"), GRADS)
@pytest.mark.parametrize("last", [1.0, 0.8])
def test_gradient_at_equal_values(last, transposed, method, compute_u):
    """Of ``sum(s)`` it is U V'; of the rest that of numpy.

    Left out is the projector of the larger side, which cannot be right as well.
    """
    base, weights, directions = grad_case(transposed)
    leading = np.r_[np.ones(GRAD_RANK - 1), last]
    a = with_values(base.shape, np.r_[leading, 0.6 ** np.arange(2.0, 40)])
    gradient = f64(jacobian(transposed, method, compute_u)[1](a))
    u, _, vt = np.linalg.svd(f64(a), full_matrices=False)
    closed_form = u[:, :GRAD_RANK] @ vt[:GRAD_RANK]
    np.testing.assert_allclose(gradient[1], closed_form, rtol=0, atol=1e-5)
    kept = [f for f in range(1, len(gradient)) if f != (2 if transposed else 3)]
    want = central_differences(a, weights, directions)[kept]
    got = np.einsum("fnd,mnd->fm", gradient[kept], directions)
    sizes = np.abs(want).max(axis=1, keepdims=True)
    np.testing.assert_allclose(got / sizes, want / sizes, rtol=0, atol=1e-3)


# Errors


SMALL = np.random.default_rng(10).standard_normal((6, 5)).astype(np.float32)


LARGER = np.ones(TALL, np.float32)


def with_entry(value):
    a = SMALL.copy()
    a[3, 2] = value
    return a


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("matrix", "options", "error", "match"),
    [
        (with_entry(np.nan), {}, ValueError, "NaN or inf"),
        (with_entry(np.inf), {}, ValueError, "NaN or inf"),
        (with_entry(-np.inf), {}, ValueError, "NaN or inf"),
        ([SMALL, with_entry(np.nan)], {}, ValueError, "NaN or inf"),
        (SMALL, {"rank": 0}, ValueError, "rank"),
        (SMALL, {"rank": -1}, ValueError, "rank"),
        (SMALL, {"rank": 6}, ValueError, r"rank .* 1 .. 5"),
        (SMALL[0], {}, ValueError, r"\[N, D\]"),
        (SMALL[None], {}, ValueError, r"\[N, D\]"),
        (SMALL[:0], {}, ValueError, r"\(0, 5\)"),
        (SMALL[:, :0], {}, ValueError, r"\(6, 0\)"),
        (SMALL.astype(np.int32), {}, TypeError, "int32"),
        (SMALL > 0, {}, TypeError, "bool"),
        (SMALL.astype(np.complex64), {}, TypeError, "complex64"),
        ([SMALL.astype(np.int32)], {}, TypeError, "int32"),
        (SMALL, {"method": "lanczos"}, ValueError, "method .*'lanczos'"),
        (SMALL, {"sketch": "float8"}, ValueError, "sketch .*'float8'"),
        (SMALL, {"oversample": -1}, ValueError, "oversample"),
        (SMALL, {"power_iters": -1}, ValueError, "power_iters"),
        (SMALL, {"axis": "rows"}, ValueError, "mesh and axis"),
        ([], {}, ValueError, "row blocks"),
        ([SMALL, SMALL[:, :4]], {}, ValueError, r"one width.*\[4, 5\]"),
        (iter([SMALL, SMALL]), {}, ValueError, "once"),
        ((b for b in [SMALL, SMALL]), {}, ValueError, "once"),
        (lambda: iter([]), {}, ValueError, "row blocks"),
        (
            LinearMap(lambda x: (SMALL @ x)[1:], lambda x: SMALL.T @ x, (6, 5)),
            {"method": "subspace"},
            ValueError,
            "matvec .*shape",
        ),
        (
            LinearMap(lambda x: LARGER @ x, lambda x: (LARGER.T @ x)[1:], TALL),
            {"method": "subspace"},
            ValueError,
            "rmatvec .*shape",
        ),
    ],
)
def test_errors(key, matrix, options, error, match):
    with pytest.raises(error, match=match):
        randomized_svd(key, matrix, **{"rank": 2, **options})


def test_mesh_without_axis(key):
    mesh = jax.make_mesh((1,), ("rows",))
    with pytest.raises(ValueError, match="mesh and axis"):
        randomized_svd(key, SMALL, 2, mesh=mesh)
    with pytest.raises(ValueError, match="'columns'"):
        randomized_svd(key, SMALL, 2, mesh=mesh, axis="columns")


def test_not_finite_under_jit(key, table):
    a = table("power law")[0].copy()
    a[5, 5] = np.nan
    out = jitted("auto", K)(key, a)
    assert not out.info.finite
    assert all(np.isnan(x).all() for x in (out.u, out.s, out.vt))
