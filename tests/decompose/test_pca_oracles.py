"""What scikit-learn asserts of its ``PCA``, as tables of cases against ``pca``.

Every oracle is float64 numpy on the rounded data, or was planted.  Variances are
moments about the mean over ``N`` (``ddof=0``); scikit-learn's are over ``N - 1``.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat import decode, describe, encode, moments, pca
from toyfeat.types import Accumulator, Taps

EPS = float(np.finfo(np.float32).eps)
SIZES = {"tall": (200, 12), "wide": (15, 40), "square": (30, 30)}
KINDS = ["gaussian", "offset", "decaying", "deficient"]
allclose = np.testing.assert_allclose
encoded, decoded = jax.jit(encode), jax.jit(decode)


@functools.cache
def accumulator(dim):
    return Accumulator(*(jax.jit(fn) for fn in moments(dim, grads=False)))


@functools.cache
def compiled(rank):
    return jax.jit(lambda stats: pca(stats, rank))


def folded(acts, batching="whole"):
    acc, n = accumulator(acts.shape[1]), len(acts)
    size = {"whole": n, "ragged": 7, "rows": 1, "merged": 7}[batching]
    states = [acc.init(), acc.init()]
    for i in range(0, n, size):
        part, which = acts[i : i + size], i // size % 2 * (batching == "merged")
        taps = Taps(part, None, np.ones(len(part), np.float32))
        states[which] = acc.update(states[which], taps)
    return acc.finish(acc.merge(*states) if batching == "merged" else states[0])


def fitted(acts, rank, batching="whole"):
    return compiled(rank)(folded(acts, batching))


def f64(x):
    return np.asarray(x).astype(np.float64)


def scores_of(basis, acts):
    return f64(encoded(basis, jnp.asarray(acts)))


def planted(shape, norms, mean=2.0):
    """Rows whose centred matrix has these singular values, and their directions."""
    rng, (n, dim), k = np.random.default_rng(0), shape, len(norms)
    left = np.linalg.qr(np.c_[np.ones(n), rng.normal(size=(n, k))])[0][:, 1:]
    right = np.linalg.qr(rng.normal(size=(dim, k)))[0]
    acts = (left * norms) @ right.T + mean * rng.normal(size=dim)
    return acts.astype(np.float32), right


@functools.cache
def data(shape, kind):
    n, dim = SIZES[shape]
    norms = {"decaying": 0.8 ** np.arange(min(n - 1, dim)), "deficient": [4, 3, 2, 1]}
    if kind in norms:
        return planted((n, dim), np.multiply(norms[kind], np.sqrt(n)))[0]
    rng = np.random.default_rng(0)
    acts = rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim))
    return (acts + (100 if kind == "offset" else 0)).astype(np.float32)


def dense(acts):
    u, s, vt = np.linalg.svd(f64(acts) - f64(acts).mean(0), full_matrices=False)
    return s**2 / len(acts), vt.T, u * s


shapes = pytest.mark.parametrize("shape", SIZES)
kinds = pytest.mark.parametrize("kind", KINDS)
batchings = pytest.mark.parametrize("batching", ["whole", "ragged", "rows", "merged"])


@pytest.mark.slow_cases
@batchings
@kinds
@shapes
def test_pca_is_the_dense_svd_of_the_centred_data(shape, kind, batching):
    acts = data(shape, kind)
    basis, true = fitted(acts, 6, batching), 4 if kind == "deficient" else 6
    values, vectors, scores = dense(acts)
    readers, got = f64(basis.readers), scores_of(basis, acts)
    rounding = 2 * acts.shape[1] * EPS * values[0]
    allclose(f64(basis.mean), f64(acts).mean(0), rtol=1e-6, atol=1e-6)
    allclose(basis.spectrum, np.where(np.arange(6) < true, values[:6], 0), 0, rounding)
    assert int(basis.diagnostics.rank) == true
    assert not readers[:, true:].any()
    np.testing.assert_array_equal(basis.writers, np.asarray(basis.readers).T)
    for i in range(true):
        bound = rounding / np.abs(np.delete(np.append(values, 0), i) - values[i]).min()
        assert bound < 0.01  # or the comparison would prove nothing
        sign = np.sign(readers[:, i] @ vectors[:, i])
        assert np.linalg.norm(sign * readers[:, i] - vectors[:, i]) <= bound
        lost = np.linalg.norm(sign * got[:, i] - scores[:, i])
        assert lost <= bound * np.linalg.norm(scores) + EPS * np.linalg.norm(acts)


@pytest.mark.slow_cases
@kinds
@shapes
def test_the_spectrum_is_the_variance_and_the_squared_norm_of_the_scores(shape, kind):
    acts = data(shape, kind)
    basis, covariance = fitted(acts, 6), np.cov(f64(acts).T, ddof=0)
    scores, spectrum = scores_of(basis, acts)[:, :4], f64(basis.spectrum)[:4]
    allclose(spectrum, np.var(scores, axis=0, ddof=0), rtol=5e-3)
    allclose(spectrum, np.linalg.eigvalsh(covariance)[::-1][:4], rtol=1e-4)
    allclose(np.sqrt(len(acts) * spectrum), np.linalg.norm(scores, axis=0), rtol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize("rank", [1, 6, 12])
@kinds
@shapes
def test_shares_are_those_of_the_total_variance(shape, kind, rank):
    acts = data(shape, kind)
    basis, total = fitted(acts, rank), np.var(f64(acts), axis=0).sum()
    got, want = f64(basis.spectrum), dense(acts)[0][:rank] / total
    allclose(basis.diagnostics.total, total, rtol=1e-5)
    allclose(got / float(basis.diagnostics.total), want, atol=1e-5)
    assert np.all(np.diff(got, append=0) <= 0)  # descending and not negative
    if rank < 4 or kind != "deficient":
        said = re.search(r"([\d.]+) % of the total", describe(basis))
        assert float(said[1]) == pytest.approx(100 * want.sum(), abs=0.051)


@pytest.mark.slow_cases
@batchings
@shapes
def test_planted_singular_values_are_found(shape, batching):
    norms = np.array([3.142, 2.718, 1.0])
    acts, right = planted(SIZES[shape], norms, mean=0.1)
    basis, kept = fitted(acts, 6, batching), np.append(norms, np.zeros(3))
    allclose(np.sqrt(len(acts) * f64(basis.spectrum)), kept, rtol=1e-4)
    allclose(np.linalg.norm(scores_of(basis, acts), axis=0), kept, rtol=1e-4)
    allclose(np.abs(np.sum(right * f64(basis.readers)[:, :3], axis=0)), 1, atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("direction", [(3, 4), (1, -1, 2), (0, 0, -7, 0), (1,) * 10])
@pytest.mark.parametrize("origin", [0.0, 1.0, -300.0])
def test_data_on_a_line_have_the_line_as_their_component(direction, origin):
    unit, along = direction / np.linalg.norm(direction), np.linspace(-2, 5, 50) ** 3
    basis = fitted((origin + along[:, None] * unit).astype(np.float32), 2)
    assert abs(f64(basis.readers)[:, 0] @ unit) == pytest.approx(1, abs=1e-6)
    allclose(basis.spectrum, [along.var(), 0], rtol=1e-4, atol=1e-3)


R97 = 2 * np.sqrt(97)  # the scatter of the second case is [[28, 18], [18, 12]]
BY_HAND = [
    ("0 7; 1 7", [0.25, 0.0]),
    ("1 0; 0 1", [0.5, 0.0]),
    ("-1 -1; -2 -1; -3 -2; 1 1; 2 1; 3 2", [(20 + R97) / 6, (20 - R97) / 6]),
    ("1 0 0; -1 0 0; 0 2 0; 0 -2 0", [2.0, 0.5]),
]


@pytest.mark.slow_cases
@pytest.mark.parametrize(("rows", "variances"), BY_HAND)
def test_small_data_worked_out_by_hand(rows, variances):
    acts = np.array([row.split() for row in rows.split(";")], np.float32)
    basis = fitted(acts, 2)
    scores = scores_of(basis, acts)
    allclose(basis.spectrum, variances, atol=2e-6)
    allclose((scores.mean(0), scores.std(0)), ([0, 0], np.sqrt(variances)), atol=3e-6)


@pytest.mark.slow_cases
@pytest.mark.parametrize("rank", [1, 6, 12])
@shapes
def test_decoding_the_codes_gives_back_data_of_low_rank(shape, rank):
    acts, _ = planted(SIZES[shape], [5.0, 2.0], mean=4.0)
    basis = fitted(acts, rank)
    lost = np.linalg.norm(f64(decoded(basis, encoded(basis, acts))) - acts)
    assert lost == pytest.approx(2 if rank == 1 else 0, abs=5e-5)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_at_full_rank_decoding_the_codes_gives_back_any_data(kind):
    new = 10 * np.random.default_rng(5).normal(size=(200, 12)).astype(np.float32)
    basis = fitted(data("tall", kind), 12)
    allclose(decoded(basis, encoded(basis, new)), new, atol=2e-4)


@pytest.mark.parametrize("rank", [6, 12])
@pytest.mark.parametrize("true", [1, 4, 9, 12])
@shapes
def test_scores_over_the_root_of_the_spectrum_have_unit_covariance(shape, true, rank):
    norms, kept = np.linspace(30, 3, true), min(true, rank)
    acts, _ = planted(SIZES[shape], norms)
    basis = fitted(acts, rank)
    scores = scores_of(basis, acts)
    white = scores[:, :kept] / np.sqrt(f64(basis.spectrum)[:kept])
    allclose(white.mean(0), 0, atol=1e-4)
    allclose(np.cov(white.T, ddof=0), np.eye(kept).squeeze(), atol=3e-4)
    allclose(scores.std(0)[:kept], norms[:kept] / np.sqrt(len(acts)), rtol=1e-3)
    assert not scores[:, kept:].any()


@kinds
@shapes
def test_components_are_orthonormal(shape, kind):
    basis = fitted(data(shape, kind), 12)
    readers, writers = f64(basis.readers), f64(basis.writers)
    want = np.diag(np.arange(12.0) < 4) if kind == "deficient" else np.eye(12)
    for gram in (readers.T @ readers, writers @ writers.T, writers @ readers):
        allclose(gram, want, atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", ["f4", "f2", jnp.bfloat16, "i4", "i1", "f8"])
def test_every_input_is_cast_to_float32(dtype):
    acts = np.asarray(3 * data("tall", "gaussian")).astype(dtype)
    basis, (values, vectors, _) = fitted(acts, 6), dense(acts)
    assert {x.dtype for x in basis[:4]} == {jnp.dtype(jnp.float32)}
    assert encoded(basis, jnp.asarray(acts)).dtype == jnp.float32
    allclose(basis.spectrum, values[:6], rtol=1e-5)
    allclose(np.abs(np.sum(vectors[:, :6] * f64(basis.readers), 0)), 1, atol=1e-5)


@pytest.mark.slow_cases
@batchings
@shapes
def test_the_same_input_twice_gives_the_same_bits(shape, batching):
    acts = data(shape, "gaussian")
    once, again = (fitted(acts.copy(), 6, batching) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)


@batchings
@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("kind", ["gaussian", "decaying"])
@shapes
def test_signs_follow_the_largest_entry_in_any_order(shape, kind, step, batching):
    acts = data(shape, kind)
    readers = f64(fitted(acts[::step], 6, batching).readers)[:, :4]
    vectors = dense(acts)[1][:, :4]
    largest = vectors[np.abs(vectors).argmax(0), np.arange(4)]
    allclose(readers, np.sign(largest) * vectors, atol=1e-4)
    assert np.all(readers[np.abs(readers).argmax(0), np.arange(4)] > 0)


@pytest.mark.parametrize("rank", [-1, 0, 13, 200])
def test_a_rank_out_of_range_raises(rank):
    with pytest.raises(ValueError, match=rf"pca: rank .* 1 \.\. 12\b.* got {rank};"):
        pca(folded(data("tall", "gaussian")), rank)
