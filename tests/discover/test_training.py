import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted_atoms import planted, unit

from toyfeat.discover import training
from toyfeat.discover.sparse_coding import matching_pursuit
from toyfeat.discover.training import train_dictionaries

SIZES = {"latents_per_dim": 4, "max_latents": 99, "steps": 60, "batch_size": 512}
SMALL = {"latents_per_dim": 1, "max_latents": 99, "steps": 20, "batch_size": 64}


def train(key, rows, *, ks=(2,), starts=1, signed=True, sizes=SIZES):
    return train_dictionaries(key, rows, ks=ks, starts=starts, signed=signed, **sizes)


def least_cosine(atoms, true, *, signed=True):
    """Of the true atoms and the nearest one of each."""
    cosines = true @ np.asarray(atoms, np.float64).T
    return (np.abs(cosines) if signed else cosines).max(axis=1).min()


# Orthogonal matching pursuit.


def by_loops(row, atoms, k, *, signed):
    """One row, with a ridge fit of all chosen atoms at every step."""
    chosen, residual, fit = [], row, np.zeros(0)
    for _ in range(k):
        scores = atoms @ residual
        scores = np.abs(scores) if signed else scores
        best = max(set(range(len(atoms))) - set(chosen), key=lambda j: scores[j])
        chosen.append(best)
        matrix = np.concatenate(
            [atoms[chosen].T, training._RIDGE**0.5 * np.eye(len(chosen))]
        )
        target = np.concatenate([row, np.zeros(len(chosen))])
        fit = np.linalg.lstsq(matrix, target, rcond=None)[0]
        fit = fit if signed else np.maximum(fit, 0)
        residual = row - fit @ atoms[chosen]
    codes = np.zeros(len(atoms))
    codes[chosen] = fit
    return codes, residual


def pursue(max_k, rows, atoms, k, *, signed):
    """Codes ``[N, M]`` and residuals of the pursuit of the training."""
    rows, atoms = jnp.asarray(rows, jnp.float32), jnp.asarray(atoms, jnp.float32)
    index, codes, residual = training._pursue(
        max_k, rows, atoms, jnp.asarray(k), jnp.asarray(signed)
    )
    assert index.shape == codes.shape == (len(rows), max_k)
    assert not np.any(codes[:, k:])
    assert all(len(set(chosen)) == k for chosen in np.asarray(index)[:, :k].tolist())
    dense = np.zeros((len(rows), len(atoms)))
    np.add.at(dense, (np.arange(len(rows))[:, None], index), np.asarray(codes))
    return dense, residual


@pytest.mark.slow_cases
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("max_k", "k"), [(4, 1), (4, 2), (4, 4), (2, 2)])
def test_the_pursuit_equals_one_in_loops(max_k, k, signed):
    rng = np.random.default_rng(0)
    atoms, rows = unit(rng.normal(size=(24, 12))), rng.normal(size=(300, 12))
    codes, residual = pursue(max_k, rows, atoms, k, signed=signed)
    oracle = [by_loops(row, atoms, k, signed=signed) for row in rows]
    close = {"rtol": 1e-3, "atol": 1e-4}
    np.testing.assert_allclose(codes, [code for code, _ in oracle], **close)
    np.testing.assert_allclose(residual, [left for _, left in oracle], **close)
    assert signed or codes.min() >= 0


@pytest.mark.slow_cases
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_signed_pursuit_equals_that_of_the_refinement(k):
    atoms, _, rows = planted(rows=300)
    codes, _ = pursue(3, rows, atoms, k, signed=True)
    oracle = matching_pursuit(rows, atoms, k).matrix(len(atoms)).toarray()
    np.testing.assert_allclose(codes, oracle, rtol=1e-3, atol=2e-3)


def test_codes_stay_finite_where_atoms_are_the_same():
    atoms = np.eye(3)[[0, 0, 1]]
    codes, residual = pursue(3, [[2.0, 1.0, 0.0]], atoms, 3, signed=True)
    np.testing.assert_allclose(codes @ atoms, [[2.0, 1.0, 0.0]], atol=1e-3)
    np.testing.assert_allclose(residual, np.zeros((1, 3)), atol=1e-3)


# Training.


@pytest.mark.slow_cases
@pytest.mark.parametrize("signed", [True, False])
def test_planted_atoms_are_recovered(signed, key):
    """24 in 12 dimensions, two in each row."""
    atoms, codes, rows = planted(dim=12, num=24, rows=6000)
    rows = rows if signed else np.abs(codes) @ atoms
    (found,) = train(key, rows, signed=signed)
    assert found.dtype == np.float32
    assert 24 <= len(found) <= 48
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert least_cosine(found, atoms, signed=signed) > 0.99


def test_there_is_a_dictionary_for_every_k_and_start(key):
    rows = np.random.default_rng(0).normal(size=(200, 6))
    trained = train(key, rows, ks=(1, 2, 30), starts=2, sizes=SMALL)
    assert len(trained) == 6
    for atoms in trained:
        assert atoms.shape[1] == 6
        assert 1 <= len(atoms) <= 16
        np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1, rtol=1e-5)
    for one, other in zip(trained[0::2], trained[1::2], strict=True):
        assert np.abs(one @ other.T).max(axis=1).min() < 0.99  # not the same
    again = train(key, rows, ks=(1, 2, 30), starts=2, sizes=SMALL)
    for one, same in zip(trained, again, strict=True):
        np.testing.assert_array_equal(one, same)


def test_codes_have_a_sign_only_if_they_may(key):
    """Two opposite directions are one atom or two."""
    rows = np.outer(np.tile([1.0, -1.0], 200), np.eye(6)[2])
    for signed in (True, False):
        (found,) = train(key, rows, ks=(1,), signed=signed, sizes=SMALL)
        cosines = found @ np.eye(6)[2]
        np.testing.assert_allclose(np.abs(cosines), 1, rtol=1e-5)
        if not signed:
            assert set(np.sign(cosines)) == {-1, 1}


@pytest.fixture
def calls(monkeypatch):
    """What dictionaries are trained on, instead of training them."""
    seen = []

    def record(key, rows, **options):
        seen.append((rows, options))
        return rows[:1]

    monkeypatch.setattr(training, "_train", record)
    return seen


@pytest.mark.parametrize(("num", "starts"), [(20, 2), (20, 3), (3, 3), (7, 1)])
def test_starts_have_rows_of_their_own(num, starts, key, calls):
    rows = np.arange(2.0 * num).reshape(num, 2)
    train(key, rows, ks=(1, 2), starts=starts)
    assert [options["k"] for _, options in calls] == [1] * starts + [2] * starts
    for part in (calls[:starts], calls[starts:]):
        together = np.concatenate([rows for rows, _ in part])
        np.testing.assert_array_equal(np.sort(together, axis=0), rows)


def test_starts_share_the_rows_if_there_are_fewer(key, calls):
    rows = np.eye(4)[:2]
    train(key, rows, starts=3)
    assert len(calls) == 3
    for part, _ in calls:
        np.testing.assert_array_equal(part, rows)


@pytest.mark.parametrize(
    ("per_dim", "most", "num"), [(2, 99, 40), (1, 99, 20), (2, 30, 30), (0, 99, 16)]
)
def test_latents_are_so_many_per_dimension(per_dim, most, num, key, calls):
    sizes = SIZES | {"latents_per_dim": per_dim, "max_latents": most}
    train(key, np.ones((5, 20)), ks=(1, 50), sizes=sizes)
    assert {options["num_latents"] for _, options in calls} == {num}
    assert {options["max_k"] for _, options in calls} == {num}
    assert [options["k"] for _, options in calls] == [1, num]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("num", [1, 2, 40])
def test_few_rows_are_enough(num, signed, key):
    """Fewer than a step takes, and than there are latents."""
    rows = np.repeat(np.eye(6), 7, axis=0)[:num]
    for atoms in train(key, rows, ks=(1, 2), starts=2, signed=signed, sizes=SMALL):
        assert np.isfinite(atoms).all()
        assert least_cosine(atoms, rows, signed=signed) > 0.999


@pytest.mark.slow_cases
@pytest.mark.parametrize("k", [1, 4])
def test_rows_of_a_line_have_its_direction(k, key):
    line = unit(np.arange(1.0, 6.0))
    rows = np.outer(np.random.default_rng(0).normal(size=300), line)
    for atoms in train(key, rows, ks=(k,), starts=2, sizes=SMALL):
        assert len(atoms) >= 1
        np.testing.assert_allclose(np.abs(atoms @ line), 1, rtol=1e-4)


def test_atoms_stay_in_the_span_of_the_rows(key):
    """Which the last rows alone may have."""
    rows = np.zeros((2000, 4))
    rows[:, 0], rows[-25:, 1] = 1.0, 1.0
    (atoms,) = train(key, rows, sizes=SMALL)
    assert np.linalg.matrix_rank(atoms, tol=1e-3) == 2
    assert not atoms[:, 2:].any()


@pytest.mark.parametrize(("num_rows", "num"), [(5, 3), (5, 5), (5, 13), (1, 4)])
def test_rows_are_drawn_equally_often(num_rows, num):
    drawn = training._draw(np.random.default_rng(0), num_rows, num)
    counts = np.bincount(drawn, minlength=num_rows)
    assert counts.sum() == num
    assert np.ptp(counts) <= 1


# Unused atoms.


def replace(atoms, uses, rows, *, k=1, seed=0):
    """Atoms and sums after unused atoms are replaced."""
    atoms = jnp.asarray(atoms, jnp.float32)
    state = training._State(atoms, 3 * atoms, jnp.asarray(uses, jnp.float32))
    rows = jnp.asarray(rows, jnp.float32)
    more = (rows, jnp.asarray(k), jnp.asarray(True))
    after = training._replace_unused(k, jax.random.key(seed), state, *more)
    np.testing.assert_array_equal(after.uses, state.uses)
    return np.asarray(after.atoms), np.asarray(after.sums)


def test_only_unused_atoms_are_replaced_by_different_residuals():
    rng = np.random.default_rng(0)
    atoms, rows = np.eye(8)[:6], rng.normal(size=(50, 8))
    uses = [5, 0, training._MIN_USES, training._MIN_USES - 1, 9, 1]
    after, sums = replace(atoms, uses, rows)
    kept = [0, 2, 4]
    np.testing.assert_array_equal(after[kept], atoms[kept])
    np.testing.assert_array_equal(sums[kept], 3 * atoms[kept])
    assert not sums[[1, 3, 5]].any()
    # The largest of the first six entries is taken away from each row.
    inside = np.where(np.arange(8) < 6, np.abs(rows), 0)
    largest = inside == inside.max(axis=1, keepdims=True)
    residuals = unit(np.where(largest, 0, rows))
    cosines = after[[1, 3, 5]] @ residuals.T
    np.testing.assert_allclose(cosines.max(axis=1), 1, rtol=1e-3)
    assert len(set(cosines.argmax(axis=1))) == 3


@pytest.mark.parametrize("seed", range(3))
def test_rows_without_a_residual_are_not_drawn(seed):
    """Zeros, whose residual is exactly 0; one row is left for two atoms."""
    rows = np.zeros((30, 4))
    rows[11] = 0, 0, 2, 0
    after, _ = replace(np.eye(4)[:2], [0, 0], rows, seed=seed)
    replaced = np.abs(after @ np.eye(4)[2]) > 0.999
    assert replaced.sum() == 1
    np.testing.assert_array_equal(after[~replaced], np.eye(4)[:2][~replaced])
    same, _ = replace(np.eye(4)[:2], [0, 0], np.zeros((5, 4)), seed=seed)
    np.testing.assert_array_equal(same, np.eye(4)[:2])


def test_fewer_rows_than_unused_atoms_replace_as_many():
    after, _ = replace(np.eye(6)[:5], [0] * 5, np.eye(6)[5:] * 2.0)
    replaced = np.abs(after[:, 5]) > 0.999
    assert replaced.tolist() == [True] + [False] * 4
    np.testing.assert_array_equal(after[1:], np.eye(6)[1:5])


def test_residuals_are_drawn_by_their_squares():
    """Of two rows one has three times the length, nine of ten draws."""
    rows = np.array([[0, 0, 1.0, 0], [0, 0, 0, 3.0]])
    drawn = [replace(np.eye(4)[:1], [0], rows, seed=seed)[0] for seed in range(300)]
    share = np.mean([np.abs(atoms[0, 3]) > 0.999 for atoms in drawn])
    assert share == pytest.approx(0.9, abs=0.06)


@pytest.mark.slow_cases
@pytest.mark.parametrize("seed", range(3))
def test_an_atom_of_one_row_in_500_is_recovered(seed):
    """It replaces one of two copies: nothing else is unexplained."""
    atoms, _, rows = planted(seed, dim=20, num=24, rows=8000, active=1)
    rare = unit(np.random.default_rng(7 + seed).normal(size=(1, 20)))
    rows[::500] = rare
    (found,) = train(jax.random.key(seed), rows, ks=(1,))
    assert least_cosine(found, np.concatenate([atoms, rare])) > 0.99
