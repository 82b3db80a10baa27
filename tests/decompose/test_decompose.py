import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat import decode, describe, encode, gradient_pca, moments, pca
from toyfeat.decompose import truncated
from toyfeat.types import Accumulator, Basis, Moments, Taps

EPS = float(np.finfo(np.float32).eps)
DIM = 8
SCALES = [1e-30, 1e-12, 1e12, 1e30]
DECAY = 2.0 ** -np.arange(DIM)


def rotation(seed, dim=DIM):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def with_spectrum(values, seed):
    q = rotation(seed, len(values))
    return (q * values) @ q.T


def statistics(
    variances=DECAY, strengths=DECAY, grad_mean=None, k=1, weight=50.0, seed=0
):
    """Planted S and G, rounded to float32; the mean is 1, 2, ..."""
    dim = len(variances)
    mean = np.arange(1.0, dim + 1)
    scatter = weight * with_spectrum(np.asarray(variances), seed)
    second = with_spectrum(np.asarray(strengths), seed + 100)
    if grad_mean is None:
        grad_mean = np.zeros(dim)
    parts = (weight, mean, scatter, grad_mean, second, float(k))
    return Moments(*(jnp.asarray(np.asarray(x, np.float32)) for x in parts))


@functools.cache
def accumulator(dim, grads):
    return Accumulator(*(jax.jit(fn) for fn in moments(dim, grads=grads)))


def of_data(acts, grads=None, weights=None, size=None):
    n, dim = acts.shape
    weights = np.ones(n) if weights is None else weights
    parts = (acts, grads, weights)
    taps = Taps(*(None if x is None else np.asarray(x, np.float32) for x in parts))
    acc = accumulator(dim, grads is not None)
    state = acc.init()
    for i in range(0, n, size or n):
        rows = slice(i, i + (size or n))
        state = acc.update(state, jax.tree.map(lambda x: x[rows], taps))  # noqa: B023
    return acc.finish(state)


def f64(x):
    return np.asarray(x).astype(np.float64)


def covariance64(stats):
    return f64(stats.scatter) / f64(stats.weight)


def top(matrix, rank):
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return values[::-1][:rank], vectors[:, ::-1][:, :rank]


def writers64(readers, covariance):
    inner = readers.T @ covariance @ readers
    dim = len(covariance)
    return np.linalg.pinv(inner, rcond=dim * EPS, hermitian=True) @ (
        readers.T @ covariance
    )


def assert_near(got, want, rtol):
    got, want = f64(got), f64(want)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= rtol * max(np.linalg.norm(want), 1e-300)


def assert_same_basis(got, want, rtol=1e-5):
    for name in ("mean", "readers", "writers", "spectrum"):
        assert_near(getattr(got, name), getattr(want, name), rtol)
    assert int(got.diagnostics.rank) == int(want.diagnostics.rank)
    np.testing.assert_allclose(got.diagnostics.total, want.diagnostics.total, rtol=rtol)


def assert_zero_past(basis, rank):
    assert int(basis.diagnostics.rank) == rank
    assert np.all(f64(basis.readers)[:, rank:] == 0)
    assert np.all(f64(basis.writers)[rank:] == 0)
    assert np.all(f64(basis.spectrum)[rank:] == 0)
    assert np.all(f64(basis.spectrum)[:rank] > 0)


def assert_finite(basis):
    assert all(np.isfinite(f64(x)).all() for x in jax.tree.leaves(basis))


METHODS = {
    "pca": pca,
    "gradient_pca": gradient_pca,
    "centred": functools.partial(gradient_pca, center=True),
}


@functools.cache
def compiled(method, rank):
    return jax.jit(lambda stats: method(stats, rank))


def fitted(method, stats, rank):
    return compiled(method, rank)(stats)


every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


# --- pca -----------------------------------------------------------------


@pytest.mark.slow_cases
@pytest.mark.parametrize("rank", [1, 3, DIM])
@pytest.mark.parametrize("seed", range(3))
def test_pca_has_the_spectrum_and_projectors_of_numpy(rank, seed):
    stats = statistics(seed=seed)
    basis = fitted(pca, stats, rank)
    values, vectors = top(covariance64(stats), rank)
    np.testing.assert_allclose(basis.spectrum, values, rtol=2e-5)
    for i in range(rank):
        got = np.outer(f64(basis.readers)[:, i], f64(basis.writers)[i])
        assert_near(got, np.outer(vectors[:, i], vectors[:, i]), 3e-5 * 2**i)
    np.testing.assert_array_equal(basis.mean, stats.mean)
    np.testing.assert_array_equal(basis.writers, np.asarray(basis.readers).T)


@pytest.mark.slow_cases
@every_method
def test_the_largest_entry_of_every_reader_is_positive(method):
    for seed in range(5):
        readers = np.asarray(fitted(method, statistics(seed=seed), DIM).readers)
        assert np.all(readers[np.abs(readers).argmax(0), np.arange(DIM)] > 0)


@pytest.mark.slow_cases
@every_method
def test_readers_are_orthonormal(method):
    readers = f64(fitted(method, statistics(), 3).readers)
    np.testing.assert_allclose(readers.T @ readers, np.eye(3), atol=3e-6)


@pytest.mark.parametrize("rank", [1, 3, DIM])
@pytest.mark.parametrize("planted", [0, 1, 2, DIM])
def test_pca_past_the_numerical_rank_is_zero(planted, rank):
    variances = np.where(np.arange(DIM) < planted, DECAY, 0)
    basis = fitted(pca, statistics(variances=variances), rank)
    assert_zero_past(basis, min(planted, rank))
    assert_finite(basis)


def test_pca_does_not_need_gradients():
    stats = statistics()
    bare = Moments(stats.weight, stats.mean, stats.scatter)
    assert_same_basis(fitted(pca, bare, 3), fitted(pca, stats, 3), rtol=0)


@pytest.mark.slow_cases
@pytest.mark.parametrize("rank", [1, 3, DIM])
def test_pca_keeps_the_share_that_it_says(rank):
    rng = np.random.default_rng(0)
    acts = rng.normal(size=(100, DIM)) * 3 * DECAY @ rotation(1) + 10
    acts, weights = acts.astype(np.float32), rng.uniform(0.2, 2, 100)
    basis = fitted(pca, of_data(acts, weights=weights), rank)
    rebuilt = f64(decode(basis, encode(basis, jnp.asarray(acts))))
    weights = weights.astype(np.float32).astype(np.float64)
    centred = acts - weights @ acts.astype(np.float64) / weights.sum()
    lost = weights @ ((acts - rebuilt) ** 2).sum(1) / (weights @ (centred**2).sum(1))
    said = f64(basis.spectrum).sum() / float(basis.diagnostics.total)
    np.testing.assert_allclose(said, 1 - lost, atol=3e-6)


@pytest.mark.slow_cases
@pytest.mark.parametrize("rank", [1, DIM])
@every_method
def test_the_total_is_that_of_the_whole_spectrum(method, rank):
    stats = statistics(variances=3 * DECAY, strengths=3 * DECAY)
    np.testing.assert_allclose(
        fitted(method, stats, rank).diagnostics.total, 3 * DECAY.sum(), rtol=1e-5
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [1, 10, 100])
@pytest.mark.parametrize("value", [0.1, 1e4 / 3])
def test_pca_of_constant_activations_has_rank_zero(value, size):
    weights = np.random.default_rng(0).uniform(0.1, 2, 100)
    acts = value * np.linspace(-1, 1, DIM) * np.ones((100, 1))
    basis = fitted(pca, of_data(acts, weights=weights, size=size), 3)
    assert_zero_past(basis, 0)
    assert_finite(basis)


def test_pca_of_constant_activations_says_why_its_rank_is_zero():
    basis = fitted(pca, of_data(np.full((100, DIM), 2.0)), 3)
    np.testing.assert_allclose(basis.diagnostics.centring_removed, 1, rtol=1e-6)
    assert "centring" in describe(basis)


# --- gradient_pca --------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_pca_has_the_spectrum_and_projectors_of_numpy(rank, seed):
    stats = statistics(seed=seed)
    basis = fitted(gradient_pca, stats, rank)
    values, vectors = top(f64(stats.grad_second), rank)
    np.testing.assert_allclose(basis.spectrum, values, rtol=2e-5)
    for i in range(rank):
        reader = f64(basis.readers)[:, i]
        want = np.outer(vectors[:, i], vectors[:, i])
        assert_near(np.outer(reader, reader), want, 3e-5 * 2**i)
    np.testing.assert_array_equal(basis.mean, stats.mean)
    assert float(basis.diagnostics.centring_removed) == 0


@pytest.mark.parametrize("rank", [1, 3, DIM])
@pytest.mark.parametrize("center", [False, True])
def test_the_writers_are_the_regression_of_the_activations_on_the_codes(rank, center):
    stats = statistics(variances=1.5 ** -np.arange(DIM))
    basis = fitted(METHODS["centred" if center else "gradient_pca"], stats, rank)
    want = writers64(f64(basis.readers), covariance64(stats))
    assert_near(basis.writers, want, 3e-5)


@pytest.mark.parametrize("rank", [3, DIM])
@pytest.mark.parametrize("planted", [1, 3])
def test_the_writers_need_a_pseudo_inverse_where_activations_are_degenerate(
    planted, rank
):
    variances = np.where(np.arange(DIM) < planted, DECAY, 0)
    stats = statistics(variances=variances)
    basis = fitted(gradient_pca, stats, rank)
    readers, covariance = f64(basis.readers), covariance64(stats)
    exact = np.linalg.pinv(readers.T @ covariance @ readers, rcond=1e-5)
    assert_near(basis.writers, exact @ readers.T @ covariance, 3e-4)
    assert_finite(basis)


@pytest.mark.parametrize("rank", [1, 3, DIM])
@pytest.mark.parametrize("planted", [0, 1, 3, DIM])
def test_gradient_pca_past_the_numerical_rank_is_zero(planted, rank):
    strengths = np.where(np.arange(DIM) < planted, DECAY, 0)
    basis = fitted(gradient_pca, statistics(strengths=strengths), rank)
    assert_zero_past(basis, min(planted, rank))
    assert_finite(basis)


def test_activations_that_do_not_vary_give_zero_writers_and_no_nan():
    basis = fitted(gradient_pca, statistics(variances=np.zeros(DIM)), 3)
    assert np.all(f64(basis.writers) == 0)
    assert int(basis.diagnostics.rank) == 3
    assert_finite(basis)


@pytest.mark.slow_cases
@pytest.mark.parametrize("support", [3, DIM])
@pytest.mark.parametrize("rank", [4, DIM])
def test_a_rank_that_covers_the_gradients_changes_no_readout_to_first_order(
    rank, support
):
    rng = np.random.default_rng(7)
    acts = rng.normal(size=(200, support)) @ rotation(1)[:support] + 3
    grads = rng.normal(size=(200, 2, 4)) @ rotation(2)[:4]
    acts, grads = acts.astype(np.float32), grads.astype(np.float32)
    basis = fitted(gradient_pca, of_data(acts, grads), rank)
    assert int(basis.diagnostics.rank) == 4
    lost = acts - f64(decode(basis, encode(basis, jnp.asarray(acts))))
    change = np.einsum("nkd,nd->nk", grads, lost)
    bound = np.linalg.norm(grads, axis=2) * np.linalg.norm(acts, axis=1)[:, None]
    assert np.abs(change / bound).max() < 1e-5
    if support == DIM:
        assert np.linalg.norm(lost) > 0.1 * np.linalg.norm(acts)


def test_a_rank_that_does_not_cover_the_gradients_changes_readouts():
    rng = np.random.default_rng(7)
    acts, grads = rng.normal(size=(200, DIM)), rng.normal(size=(200, 2, DIM))
    basis = fitted(gradient_pca, of_data(acts, grads), 4)
    lost = acts - f64(decode(basis, encode(basis, jnp.asarray(acts, jnp.float32))))
    assert np.abs(np.einsum("nkd,nd->nk", grads, lost)).mean() > 0.1


# --- constant gradients and centring --------------------------------------


@functools.cache
def constant_gradients(seed, k, dim, scale, size, n):
    rng = np.random.default_rng(seed)
    w = scale * rng.normal(size=dim)
    grads = np.broadcast_to(w, (n, k, dim))
    weights = rng.uniform(0.05, 3, size=n)
    return w, of_data(rng.normal(size=(n, dim)), grads, weights, size=size)


cases = pytest.mark.parametrize(
    ("dim", "k", "n", "size", "scale"),
    [
        (1, 1, 96, 96, 1.0),
        (2, 1, 20_000, 20_000, 1.0),
        (DIM, 1, 96, 1, 1e-3),
        (DIM, 3, 96, 96, 1e3),
        (DIM, 3, 96, 96, 1e-12),
        (DIM, 3, 96, 96, 1e12),
        (DIM, 1, 20_000, 20_000, 1.0),
        (64, 7, 96, 8, 1.0),
    ],
)


@pytest.mark.slow_cases
@cases
@pytest.mark.parametrize("seed", range(3))
def test_a_constant_gradient_uncentred_has_rank_one_and_is_the_reader(
    seed, dim, k, n, size, scale
):
    w, stats = constant_gradients(seed, k, dim, scale, size, n)
    basis = fitted(gradient_pca, stats, min(dim, 3))
    assert_zero_past(basis, 1)
    reader = w / np.linalg.norm(w) * np.sign(w[np.abs(w).argmax()])
    np.testing.assert_allclose(basis.readers[:, 0], reader, atol=1e-6)
    np.testing.assert_allclose(basis.spectrum[0], k * w @ w, rtol=1e-5)
    assert_finite(basis)


@pytest.mark.slow_cases
@cases
@pytest.mark.parametrize("seed", range(3))
def test_a_constant_gradient_centred_has_rank_zero_and_says_why(
    seed, dim, k, n, size, scale
):
    _, stats = constant_gradients(seed, k, dim, scale, size, n)
    basis = fitted(METHODS["centred"], stats, min(dim, 3))
    assert_zero_past(basis, 0)
    assert_finite(basis)
    np.testing.assert_allclose(basis.diagnostics.centring_removed, 1, atol=1e-5)
    said = describe(basis)
    assert "rank 0" in said
    assert "centring removed" in said


@pytest.mark.slow_cases
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("spread", [1.0, 0.1, 0.01])
def test_centring_gradients_with_a_true_spread_keeps_its_rank(spread, k):
    rng = np.random.default_rng(0)
    w = rng.normal(size=DIM)
    noise = rng.normal(size=(200, k, 3)) @ rotation(3)[:3]
    grads = (w + spread * noise).astype(np.float32)
    weights = rng.uniform(0.1, 2, 200).astype(np.float32)
    stats = of_data(rng.normal(size=(200, DIM)), grads, weights)
    basis = fitted(METHODS["centred"], stats, DIM)
    weights, grads = weights.astype(np.float64), grads.astype(np.float64)
    mean = weights @ grads.mean(1) / weights.sum()
    centred = grads - mean
    want = np.einsum("n,nkd,nke->de", weights, centred, centred) / weights.sum()
    second = np.einsum("n,nkd,nke->de", weights, grads, grads) / weights.sum()
    assert_zero_past(basis, 3)
    values, vectors = top(want, 3)
    error = 10 * EPS * np.trace(second)
    np.testing.assert_allclose(basis.spectrum[:3], values, rtol=1e-5, atol=error)
    cosines = np.linalg.svd(vectors.T @ f64(basis.readers)[:, :3])[1]
    sine = DIM * EPS * np.trace(second) / values[-1]
    assert cosines.min() > 1 - sine**2 - 1e-6
    np.testing.assert_allclose(
        basis.diagnostics.centring_removed,
        1 - np.trace(want) / np.trace(second),
        atol=1e-5,
    )


def test_readouts_with_different_constant_gradients_keep_what_tells_them_apart():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2, DIM))
    grads = np.broadcast_to(w, (200, 2, DIM))
    stats = of_data(rng.normal(size=(200, DIM)), grads)
    basis = fitted(METHODS["centred"], stats, DIM)
    centred = w - w.mean(0)
    assert_zero_past(basis, 1)
    np.testing.assert_allclose(
        basis.spectrum[:1], top(centred.T @ centred, 1)[0], rtol=1e-5
    )


@pytest.mark.parametrize("planted", [0, 2, 6])
@every_method
def test_the_explanation_names_the_rank(method, planted):
    values = np.where(np.arange(DIM) < planted, DECAY, 0)
    basis = fitted(method, statistics(variances=values, strengths=values), 3)
    assert f"rank {min(planted, 3)}" in describe(basis)


def test_no_centring_is_blamed_where_nothing_was_centred():
    basis = fitted(gradient_pca, statistics(strengths=np.zeros(DIM)), 3)
    assert "centring" not in describe(basis)


# --- scales, NaN ---------------------------------------------------------


def scaled(stats, acts, grads):
    return Moments(
        stats.weight,
        jnp.float32(np.sqrt(acts)) * stats.mean,
        jnp.float32(acts) * stats.scatter,
        jnp.float32(np.sqrt(grads)) * stats.grad_mean,
        jnp.float32(grads) * stats.grad_second,
        stats.readouts,
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("acts", SCALES)
@pytest.mark.parametrize("grads", SCALES)
@every_method
def test_the_scale_of_the_statistics_changes_the_spectrum_only(method, acts, grads):
    grad_mean = 0.3 * rotation(100)[:, 0]
    plain = statistics(grad_mean=grad_mean)
    want, got = fitted(method, plain, 3), fitted(method, scaled(plain, acts, grads), 3)
    scale = acts if method is pca else grads
    assert_near(f64(got.spectrum) / scale, want.spectrum, 1e-5)
    assert_near(f64(got.diagnostics.total) / scale, want.diagnostics.total, 1e-5)
    assert_near(got.readers, want.readers, 1e-5)
    assert_near(got.writers, want.writers, 1e-5)
    assert_near(
        1 + got.diagnostics.centring_removed,
        1 + want.diagnostics.centring_removed,
        1e-5,
    )
    assert int(got.diagnostics.rank) == 3


@pytest.mark.slow_cases
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
@pytest.mark.parametrize("rank", [1, DIM])
@pytest.mark.parametrize(
    ("name", "field"),
    [("pca", "scatter"), ("gradient_pca", "grad_second"), ("centred", "grad_second")],
)
def test_statistics_that_are_not_finite_make_the_spectrum_nan(
    name, field, rank, place, bad
):
    stats = statistics()
    broken = stats._replace(**{field: getattr(stats, field).at[place].set(bad)})
    assert np.isnan(fitted(METHODS[name], broken, rank).spectrum).all()
    with pytest.raises(ValueError, match=r"pca: stats must be finite"):
        METHODS[name](broken, rank)


def test_a_gradient_mean_that_is_not_finite_makes_the_centred_spectrum_nan():
    stats = statistics(grad_mean=np.r_[np.nan, np.ones(DIM - 1)])
    assert np.isnan(fitted(METHODS["centred"], stats, 3).spectrum).all()


@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_a_covariance_that_is_not_finite_shows_in_the_writers_of_gradients(place):
    stats = statistics()
    broken = stats._replace(scatter=stats.scatter.at[place].set(np.nan))
    assert np.isnan(fitted(gradient_pca, broken, 3).writers).any()


# --- encode, decode, shapes, transformations ------------------------------


@pytest.mark.slow_cases
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
@every_method
def test_encode_and_decode_are_the_documented_formulas(method, lead):
    basis = fitted(method, statistics(), 3)
    acts = np.random.default_rng(0).normal(size=(*lead, DIM)).astype(np.float32)
    codes = encode(basis, jnp.asarray(acts))
    want = (acts.astype(np.float64) - f64(basis.mean)) @ f64(basis.readers)
    np.testing.assert_allclose(codes, want, atol=2e-5)
    rebuilt = decode(basis, codes)
    want = f64(codes) @ f64(basis.writers) + f64(basis.mean)
    np.testing.assert_allclose(rebuilt, want, atol=2e-5)
    assert (codes.shape, rebuilt.shape) == ((*lead, 3), (*lead, DIM))


def test_encode_and_decode_work_in_the_dtype_of_the_basis():
    basis = fitted(pca, statistics(), 3)
    codes = encode(basis, jnp.ones((2, DIM), jnp.bfloat16))
    assert codes.dtype == jnp.float32
    assert decode(basis, codes.astype(jnp.bfloat16)).dtype == jnp.float32


@every_method
def test_decoding_what_was_encoded_twice_is_decoding_it_once(method):
    basis = fitted(method, statistics(variances=1.5 ** -np.arange(DIM)), 3)
    acts = jnp.asarray(np.random.default_rng(0).normal(size=(20, DIM)), jnp.float32)
    once = decode(basis, encode(basis, acts))
    np.testing.assert_allclose(decode(basis, encode(basis, once)), once, atol=1e-4)


@every_method
def test_shapes_and_dtypes_of_a_basis(method):
    basis = fitted(method, statistics(), 3)
    shapes = [basis.mean.shape, basis.readers.shape, basis.writers.shape]
    assert shapes == [(DIM,), (DIM, 3), (3, DIM)]
    assert basis.spectrum.shape == (3,)
    assert all(x.shape == () for x in basis.diagnostics)
    assert basis.diagnostics.rank.dtype == jnp.int32
    assert {x.dtype for x in basis[:4]} == {jnp.dtype(jnp.float32)}


@every_method
def test_a_basis_round_trips_as_a_pytree(method):
    basis = fitted(method, statistics(), 3)
    leaves, structure = jax.tree.flatten(basis)
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, Basis)
    assert_same_basis(again, basis, rtol=0)
    assert_same_basis(jax.jit(lambda b: b)(basis), basis, rtol=0)


@pytest.mark.slow_cases
@every_method
def test_eager_is_jit(method):
    stats = statistics(grad_mean=0.3 * rotation(100)[:, 0], k=2)
    assert_same_basis(fitted(method, stats, 3), method(stats, 3))


@pytest.mark.slow_cases
@every_method
def test_vmap_is_a_loop(method):
    every = [
        statistics(grad_mean=0.3 * rotation(100 + seed)[:, 0], k=2, seed=seed)
        for seed in range(3)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *every)
    batched = jax.jit(jax.vmap(lambda s: method(s, 3)))(stacked)
    for i, stats in enumerate(every):
        one = jax.tree.map(lambda x: x[i], batched)  # noqa: B023
        assert_same_basis(one, fitted(method, stats, 3))


@every_method
def test_numpy_statistics_are_welcome(method):
    stats = statistics()
    assert_same_basis(
        method(Moments(*map(np.asarray, stats)), 3), fitted(method, stats, 3)
    )


@pytest.mark.slow_cases
@every_method
def test_float64_inside_enable_x64(method):
    with jax.enable_x64(True):
        stats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), statistics())
        basis = fitted(method, stats, 3)
        assert {x.dtype for x in basis[:4]} == {jnp.dtype(jnp.float64)}
        source = covariance64(stats) if method is pca else f64(stats.grad_second)
        np.testing.assert_allclose(basis.spectrum, top(source, 3)[0], rtol=1e-12)


# --- errors --------------------------------------------------------------


@pytest.mark.parametrize("rank", [-1, 0, DIM + 1])
@pytest.mark.parametrize("name", METHODS)
def test_a_rank_out_of_range_raises(name, rank):
    who = "gradient_pca" if name == "centred" else name
    with pytest.raises(ValueError, match=rf"{who}.*rank.*{rank}"):
        METHODS[name](statistics(), rank)


def test_the_flag_may_be_an_array():
    rng = np.random.default_rng(0)
    stats = of_data(rng.normal(size=(30, DIM)), rng.normal(size=(30, 2, DIM)) + 1)
    basis = gradient_pca(stats, 2, center=jnp.array(True))
    wanted = gradient_pca(stats, 2, center=True)
    np.testing.assert_array_equal(basis.readers, wanted.readers)


@pytest.mark.parametrize("center", [False, True])
def test_gradient_pca_without_gradients_raises(center):
    stats = Moments(*statistics()[:3])
    with pytest.raises(ValueError, match=r"gradient_pca.*gradients"):
        gradient_pca(stats, 2, center=center)


@pytest.mark.parametrize("shape", [(DIM + 1,), (4, 3), (2, 3, 1)])
def test_encoding_another_width_raises(shape):
    with pytest.raises(ValueError, match=rf"encode.*{shape[-1]}"):
        encode(pca(statistics(), 3), jnp.ones(shape))


@pytest.mark.parametrize("shape", [(DIM,), (4, 2), (2, 3, 1)])
def test_decoding_another_number_of_codes_raises(shape):
    with pytest.raises(ValueError, match=rf"decode.*{shape[-1]}"):
        decode(pca(statistics(), 3), jnp.ones(shape))


@pytest.mark.slow_cases
@pytest.mark.parametrize("rank", [1, 3, DIM])
def test_a_truncated_basis_holds_the_first_directions(rank):
    stats = statistics()
    full, cut = pca(stats, DIM), truncated(pca(stats, DIM), rank)
    direct = pca(stats, rank)
    for name in ("mean", "readers", "writers", "spectrum"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(direct, name))
    assert int(cut.diagnostics.rank) == rank
    assert float(cut.diagnostics.total) == float(full.diagnostics.total)


def test_a_truncated_basis_has_at_most_the_rank_of_the_full_one():
    strengths = np.where(np.arange(DIM) < 2, 1.0, 0.0)
    basis = gradient_pca(statistics(strengths=strengths), DIM)
    assert int(basis.diagnostics.rank) == 2
    assert int(truncated(basis, 5).diagnostics.rank) == 2
    inside = jax.jit(truncated, static_argnums=1)(basis, 1)
    assert int(inside.diagnostics.rank) == 1


@pytest.mark.parametrize("rank", [-1, 0, DIM + 1])
def test_a_basis_is_not_truncated_to_a_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"truncated: rank .* 1 \.\. {DIM}.*{rank}"):
        truncated(pca(statistics(), DIM), rank)
