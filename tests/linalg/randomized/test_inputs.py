"""Arguments of ``randomized_svd`` that are none say what was wanted, and what came."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from toyfeat import Taps
from toyfeat.linalg import LinearMap, randomized_svd

KEY = jax.random.key(0)
A = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
WIDE = A.repeat(10, 1)  # 40 x 300
SPARSE = scipy.sparse.csr_matrix(A)


def forward(x):
    return A @ x


def backward(y):
    return A.T @ y


def products(matvec=forward, rmatvec=backward, shape=(40, 30), dtype=np.float32):
    return LinearMap(matvec, rmatvec, shape, dtype)


def changing():
    passes = []

    def read():
        passes.append(0)
        return iter([A, A][: 2 if len(passes) < 3 else 1])

    return read


BAD = {
    "float rank": (dict(rank=2.0), "rank must be an int"),
    "word as rank": (dict(rank="3"), "rank must be an int.*got '3'"),
    "vector as rank": (dict(rank=jnp.ones(1, int)), "rank must be an int"),
    "bool as rank": (dict(rank=True), "rank must be an int.*got True"),
    "no rank": (dict(rank=None), "rank must be an int.*got None"),
    "float oversample": (dict(oversample=2.5), "oversample must be an int"),
    "float power_iters": (dict(power_iters=1.0), "power_iters must be an int"),
    "word as compute_u": (dict(compute_u="no"), "compute_u must be True or False"),
    "list as method": (dict(method=["gram"]), "method must be one of"),
    "no key": (dict(key=None), "key must be one random key.*got None"),
    "int key": (dict(key=0), "key must be one random key.*got 0"),
    "keys": (dict(key=jax.random.split(KEY, 2)), "key must be one random key.*shape"),
    "number as mesh": (dict(mesh=5, axis="a"), "mesh must be a jax.sharding.Mesh"),
    "mesh of blocks": (dict(matrix=[A], mesh=5, axis="a"), "mesh and axis are for"),
    "no matrix": (dict(matrix=None), "matrix must be an array, got None"),
    "nested list": (dict(matrix=A.tolist()), r"matrix must be an array, got \["),
    "dict": (dict(matrix={"a": A}), "matrix must be an array, got dict"),
    "taps": (dict(matrix={"a": Taps(A, None, A[:, 0])}), "must be an array, got dict"),
    "scipy sparse": (dict(matrix=SPARSE), "must be an array.*LinearMap"),
    "function of None": (dict(matrix=lambda: None), "must return an iterator"),
    "function of an array": (dict(matrix=lambda: A), "must return an iterator"),
    "blocks of None": (dict(matrix=lambda: iter([None])), "must be an array, got None"),
    "changing blocks": (dict(matrix=changing()), "same at every call"),
    "shape turned": (dict(matrix=products(shape=(30, 40))), "wanted matvec to take"),
    "float shape": (dict(matrix=products(shape=(40.0, 30))), "side of shape must be"),
    "shape of one": (dict(matrix=products(shape=(40,))), r"shape of a LinearMap"),
    "sparse as matvec": (dict(matrix=products(matvec=SPARSE)), "matvec must be a func"),
    "matvec of None": (
        dict(matrix=products(lambda x: None)),
        "return shape .*no array",
    ),
    "complex map": (dict(matrix=products(dtype=np.complex64)), "must be float32"),
    "complex products": (
        dict(matrix=products(lambda x: np.asarray(A @ x) * 1j)),
        "real numbers",
    ),
    "unknown dtype": (dict(matrix=products(dtype="x")), "must be float32"),
    "other transpose": (
        dict(
            matrix=products(lambda x: WIDE @ x, lambda y: 0 * (WIDE.T @ y), (40, 300))
        ),
        "must be the product with the transpose",
    ),
}


@pytest.mark.slow_cases
@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
@pytest.mark.parametrize(("options", "match"), BAD.values(), ids=BAD)
def test_bad_arguments_say_what_was_wanted_and_what_came(options, match):
    arguments = {"key": KEY, "matrix": A, "rank": 3} | options
    with pytest.raises(
        (TypeError, ValueError), match=f"(?s)^randomized_svd: .*{match}"
    ):
        randomized_svd(**arguments)


def test_integers_of_numpy_and_old_keys_are_taken():
    plain = randomized_svd(jax.random.PRNGKey(0), A, np.int64(3), oversample=np.int8(4))
    s = np.linalg.svd(A.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(plain.s, s[:3], rtol=1e-5)


@pytest.mark.slow
def test_a_sparse_matrix_is_taken_as_a_linear_map():
    sparse = products(
        lambda x: SPARSE @ np.asarray(x), lambda y: SPARSE.T @ np.asarray(y)
    )
    s = np.linalg.svd(A.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(randomized_svd(KEY, sparse, 3).s, s[:3], rtol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", ["krylov", "subspace"])
def test_info_says_whether_values_are_as_good_as_promised(method):
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.normal(size=(n, 300)))[0] for n in (400, 300))
    slow, fast = np.arange(1.0, 301) ** -0.3, 0.7 ** np.arange(300)
    for values, accurate in [(slow, False), (fast, True)]:
        a = ((u * values) @ v.T).astype(np.float32)
        svd = randomized_svd(KEY, a, 6, method=method)
        wrong = np.max(np.abs(np.asarray(svd.s, np.float64) - values[:6])) / values[0]
        assert bool(svd.info.accurate) == accurate == (wrong < 5e-6)
        assert not wrong > 3 * max(float(svd.info.error), 2e-6)
