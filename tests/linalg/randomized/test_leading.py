import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.linalg import randomized_svd
from toyfeat.linalg.orthonormal import orthonormal_rows
from toyfeat.linalg.randomized.leading import leading_eigenvectors

DIM, WIDTH, RANK = 300, 24, 16
INDEX = np.arange(1, DIM + 1)
SPECTRA = {
    "1/j": 1 / INDEX,
    "j^-.5": INDEX**-0.5,
    ".8^j": 0.8**INDEX,
    "one large and a bulk": np.where(INDEX == 1, 1, 0.0075 * (1 - 0.8 * INDEX / DIM)),
    "equal": np.ones(DIM),
    "forty equal": np.where(INDEX <= 40, 1, 0.1),
    "rank 3": np.where(INDEX <= 3, 1.0, 0.0),
    "zero": np.zeros(DIM),
}


def rotation(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


@functools.cache
def start():
    return orthonormal_rows(jax.random.normal(jax.random.key(0), (WIDTH, DIM)))[0]


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values_are_right_and_vectors_are_eigenvectors(name):
    s, q = SPECTRA[name], rotation(DIM)
    gram = ((q * s**2) @ q.T).astype(np.float32)
    values, rows = jax.jit(leading_eigenvectors, static_argnums=2)(
        start(), jnp.asarray(gram), RANK
    )
    values = np.asarray(values)
    exact = np.linalg.eigvalsh(gram.astype(np.float64))[::-1][:RANK]
    assert np.abs(values[:RANK] - exact).max() <= 5e-7 * s[0] ** 2
    assert (np.diff(values) <= 0).all()
    rows = np.asarray(rows, np.float64)
    assert np.abs(rows @ rows.T - np.eye(WIDTH)).max() <= 1e-5
    kept = np.trace(rows[:RANK] @ gram @ rows[:RANK].T)
    assert kept >= (1 - 1e-5) * exact.sum()


@pytest.mark.slow
def test_a_batch_with_one_slow_member_is_right_for_all():
    q = rotation(DIM)
    names = ("1/j", "j^-.5", "rank 3", "one large and a bulk")
    grams = np.stack([(q * SPECTRA[n] ** 2) @ q.T for n in names]).astype(np.float32)
    block = start()
    run = jax.jit(jax.vmap(lambda g: leading_eigenvectors(block, g, RANK)[0]))
    for values, gram in zip(np.asarray(run(grams)), grams, strict=True):
        exact = np.linalg.eigvalsh(gram.astype(np.float64))[::-1][:RANK]
        assert np.abs(values[:RANK] - exact).max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0066, 0.0075, 0.01])
def test_a_noise_bulk_below_one_large_value_is_found(scale):
    u, v = rotation(600, 1)[:, :400], rotation(400, 2)
    s = scale * (1 - 0.8 * np.arange(400) / 400)
    s[0] = 1
    a = ((u * s) @ v.T).astype(np.float32)
    exact = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    out = randomized_svd(jax.random.key(1), jnp.asarray(a), 8, method="gram")
    assert np.abs(np.asarray(out.s) - exact[:8]).max() <= 5e-6
    lost = (a.astype(np.float64) ** 2).sum() - ((a @ np.asarray(out.vt).T) ** 2).sum()
    assert np.sqrt(lost / (exact[8:] ** 2).sum()) <= 1 + 1e-4
