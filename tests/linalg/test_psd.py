import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.linalg import fix_signs, psd_inverse, psd_spectrum

EPS = float(np.finfo(np.float32).eps)
DIM = 24
SCALES = [1e-30, 1e-12, 1.0, 1e12, 1e30]

SPECTRA = {
    "flat": np.ones(DIM),
    "power_law": np.arange(1, DIM + 1) ** -1.0,
    "geometric": 0.5 ** np.arange(DIM),
    "step": np.where(np.arange(DIM) < 5, 1.0, 1e-3),
    "rank_deficient": np.where(np.arange(DIM) < 7, 1.0 / np.arange(1, DIM + 1), 0.0),
    "rank_one": np.where(np.arange(DIM) < 1, 1.0, 0.0),
    "clustered": np.repeat([1.0, 1.0 - 1e-6, 0.5, 0.5 - 1e-6], DIM // 4),
    "zero": np.zeros(DIM),
}


def rotation(dim, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def with_spectrum(values, scale=1.0, seed=0):
    q = rotation(len(values), seed)
    matrix = (q * values) @ q.T
    return (scale * (matrix + matrix.T) / 2).astype(np.float32)


def eigenvalues(matrix):
    return np.linalg.eigvalsh(np.asarray(matrix, np.float64))[::-1]


compiled = jax.jit(psd_spectrum, static_argnames="rank")
inverse = jax.jit(psd_inverse)


def spectrum64(matrix, rank=None):
    parts = compiled(jnp.asarray(matrix), rank)
    return [np.asarray(x, np.float64) for x in parts]


@pytest.mark.slow_cases
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SPECTRA)
def test_values_are_those_of_numpy_and_zero_below_the_cut(name, scale):
    matrix = with_spectrum(SPECTRA[name], scale)
    values, _, rank, cut = spectrum64(matrix)
    want = eigenvalues(matrix)
    error = 4 * np.sqrt(DIM) * EPS * want[0]
    assert np.all(np.diff(values) <= 0)
    np.testing.assert_allclose(cut, DIM * EPS * want[0], rtol=1e-4)
    np.testing.assert_allclose(values[: int(rank)], want[: int(rank)], atol=error)
    assert np.all(values[: int(rank)] > cut)
    assert np.all(values[int(rank) :] == 0)
    assert np.sum(want > cut + error) <= rank <= np.sum(want > cut - error)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SPECTRA)
def test_vectors_are_orthonormal_rebuild_the_matrix_and_are_zero_past_the_rank(
    name, scale
):
    matrix = with_spectrum(SPECTRA[name], scale)
    values, vectors, rank, cut = spectrum64(matrix)
    kept = np.arange(DIM) < rank
    np.testing.assert_allclose(vectors.T @ vectors, np.diag(1.0 * kept), atol=5e-6)
    assert np.all(vectors[:, ~kept] == 0)
    rebuilt = (vectors * values) @ vectors.T
    lost = np.linalg.norm(rebuilt - matrix.astype(np.float64), 2)
    assert lost <= cut + 8 * DIM * EPS * values[0]


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("flat", DIM),
        ("power_law", DIM),
        ("step", DIM),
        ("clustered", DIM),
        ("rank_deficient", 7),
        ("rank_one", 1),
        ("zero", 0),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_rank_is_the_planted_one(name, rank, seed):
    spectrum = compiled(jnp.asarray(with_spectrum(SPECTRA[name], seed=seed)))
    assert int(spectrum.rank) == rank
    assert spectrum.rank.dtype == jnp.int32
    assert spectrum.rank.shape == spectrum.cut.shape == ()


def test_separated_vectors_are_those_of_numpy_up_to_sign():
    matrix = with_spectrum(np.arange(DIM, 0, -1.0))
    _, vectors, _, _ = spectrum64(matrix)
    want = np.linalg.eigh(matrix.astype(np.float64))[1][:, ::-1]
    np.testing.assert_allclose(np.abs(np.sum(vectors * want, 0)), 1, atol=1e-6)
    largest = np.abs(vectors).argmax(0)
    assert np.all(vectors[largest, np.arange(DIM)] > 0)


@pytest.mark.slow_cases
@pytest.mark.parametrize("rank", [1, 3, DIM])
def test_a_rank_keeps_the_leading_pairs(rank):
    matrix = with_spectrum(np.arange(DIM, 0, -1.0))
    whole, some = spectrum64(matrix), spectrum64(matrix, rank)
    assert some[0].shape == (rank,)
    assert some[1].shape == (DIM, rank)
    np.testing.assert_allclose(some[0], whole[0][:rank], rtol=1e-6)
    np.testing.assert_allclose(some[1], whole[1][:, :rank], atol=1e-6)
    assert int(some[2]) == rank


def test_the_rank_counts_kept_values_only():
    matrix = jnp.asarray(with_spectrum(SPECTRA["rank_deficient"]))
    assert [int(compiled(matrix, r).rank) for r in (2, 7, 12)] == [2, 7, 7]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("floor", "rank"), [(0.0, 4), (1e-9, 4), (0.05, 2), (0.5, 1), (2.0, 0)]
)
def test_values_up_to_the_floor_count_as_zero(floor, rank, scale):
    matrix = with_spectrum(np.array([1.0, 0.1, 0.01, 0.001]), scale)
    spectrum = compiled(jnp.asarray(matrix), floor=np.float32(scale * floor))
    want = np.where(np.arange(4) < rank, [1.0, 0.1, 0.01, 0.001], 0)
    np.testing.assert_allclose(
        np.asarray(spectrum.values, np.float64) / scale, want, atol=1e-6
    )
    assert int(spectrum.rank) == rank
    assert np.all(np.asarray(spectrum.vectors)[:, rank:] == 0)
    np.testing.assert_allclose(
        float(spectrum.cut) / scale, max(floor, 4 * EPS), rtol=1e-4
    )


def test_the_floor_may_be_an_array_under_jit():
    matrix = jnp.asarray(with_spectrum(np.array([1.0, 0.1, 0.01])))
    fn = jax.jit(lambda m, f: psd_spectrum(m, floor=f).rank)
    assert [int(fn(matrix, jnp.float32(f))) for f in (0.0, 0.05, 0.5)] == [3, 2, 1]


def test_only_the_symmetric_part_counts():
    matrix = with_spectrum(np.arange(6, 0, -1.0))
    skew = np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)
    twisted = spectrum64(matrix + (skew - skew.T))
    for got, want in zip(twisted, spectrum64(matrix), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_negative_eigenvalues_count_as_zero():
    spectrum = compiled(np.diag(np.float32([1.0, -0.5, 4.0])))
    assert spectrum.values.tolist() == [4.0, 1.0, 0.0]
    assert int(spectrum.rank) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 3)])
def test_entries_that_are_not_finite_make_the_values_nan(bad, place):
    matrix = np.eye(DIM, dtype=np.float32)
    matrix[place] = bad
    assert np.all(np.isnan(compiled(jnp.asarray(matrix)).values))
    assert np.all(np.isnan(compiled(jnp.asarray(matrix), 1).values))
    assert not np.all(np.isfinite(inverse(jnp.asarray(matrix))))


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 3)])
@pytest.mark.parametrize("fn", [psd_spectrum, psd_inverse])
def test_a_matrix_that_is_not_square_raises(fn, shape):
    with pytest.raises(ValueError, match=rf"square.*\({shape[0]}"):
        fn(np.zeros(shape, np.float32))


@pytest.mark.parametrize("rank", [-1, 0, 5])
def test_a_rank_out_of_range_raises(rank):
    with pytest.raises(ValueError, match=rf"rank.*{rank}"):
        psd_spectrum(np.eye(4, dtype=np.float32), rank)


@pytest.mark.slow
def test_eager_is_jit_and_vmap_is_a_loop():
    matrices = np.stack([with_spectrum(s) for s in SPECTRA.values() if s[5] != s[6]])
    values = np.asarray(jax.jit(jax.vmap(psd_spectrum))(matrices).values)
    for i, matrix in enumerate(matrices):
        eager, jitted = psd_spectrum(matrix), compiled(matrix)
        np.testing.assert_allclose(jitted.values, eager.values, atol=1e-5)
        np.testing.assert_allclose(values[i], eager.values, atol=1e-5)
        assert abs(int(jitted.rank) - int(eager.rank)) <= 1


@pytest.mark.slow
def test_float64_inside_enable_x64():
    with jax.enable_x64(True):
        q = rotation(12)
        values = 10.0 ** -np.arange(12)
        spectrum = psd_spectrum(jnp.asarray((q * values) @ q.T))
        assert spectrum.values.dtype == jnp.float64
        np.testing.assert_allclose(spectrum.values, values, atol=1e-14)
        assert int(spectrum.rank) == 12


def test_fix_signs_makes_the_largest_entry_positive_and_moves_nothing_else():
    vectors = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    signed = np.asarray(fix_signs(jnp.asarray(vectors)))
    np.testing.assert_array_equal(np.abs(signed), np.abs(vectors))
    flips = signed / vectors
    assert np.all(flips == flips[:1])
    assert np.all(signed[np.abs(signed).argmax(0), np.arange(40)] > 0)


def test_fix_signs_does_not_depend_on_the_signs_it_is_given():
    vectors = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)
    flips = jnp.array([[1, -1, -1, 1, -1, 1]], jnp.float32)
    np.testing.assert_array_equal(fix_signs(vectors), fix_signs(flips * vectors))


def test_fix_signs_keeps_zero_columns_and_zero_entries():
    vectors = jnp.array([[0.0, 0.0], [0.0, -1.0]])
    assert fix_signs(vectors).tolist() == [[0.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["flat", "power_law", "step", "rank_deficient"])
def test_psd_inverse_is_the_pseudo_inverse_of_numpy(name, scale):
    values = SPECTRA[name]
    matrix = with_spectrum(values, scale)
    want = np.linalg.pinv(matrix.astype(np.float64), rcond=DIM * EPS, hermitian=True)
    got = np.asarray(inverse(jnp.asarray(matrix)), np.float64)
    condition = 1 / values[values > 0].min()
    error = np.linalg.norm(got - want, 2) / np.linalg.norm(want, 2)
    assert error <= 4 * np.sqrt(DIM) * EPS * condition


def test_psd_inverse_of_zero_is_zero():
    assert np.all(np.asarray(inverse(jnp.zeros((DIM, DIM)))) == 0)
