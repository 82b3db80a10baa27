import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.discover import circles, circular_planes
from toyfeat.discover.circles import _orthonormal_pairs, _roundest_set

FEW = {"starts": 192, "steps": 60}


def circle(turn):
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def mixing(rng, num, dim):
    """Rows far from orthogonal, with a condition number of 6."""
    left = np.linalg.qr(rng.normal(size=(num, num)))[0]
    right = np.linalg.qr(rng.normal(size=(dim, dim)))[0][:num]
    return left * np.linspace(0.5, 3.0, num) @ right


def example(waves, alone, dim, *, others=0, seed=0, num=4000):
    """Circles of one angle and of independent ones, mixed, beside sparse codes."""
    rng = np.random.default_rng(seed)
    turn = 2 * np.pi * np.arange(num) / num
    parts = [circle(wave * turn) for wave in waves]
    parts += [circle(rng.permutation(turn)) for _ in range(alone)]
    parts.append(rng.normal(size=(num, others)) * (rng.random((num, others)) < 0.6))
    codes = np.concatenate(parts, axis=1)
    rows = mixing(rng, codes.shape[1], dim)
    planes = rows[: codes.shape[1] - others].reshape(-1, 2, dim)
    return codes @ rows, planes, np.linalg.pinv(rows).T[: 2 * len(planes)]


def closeness(found, planes):
    """``[planes, found]``, the smaller principal cosine of every pair of planes."""
    found = np.asarray(found, np.float64).reshape(-1, 2, planes.shape[2])
    mine, true = (
        [np.linalg.qr(plane.T)[0] for plane in planes] for planes in (found, planes)
    )
    return np.array(
        [[np.linalg.svd(a.T @ b, compute_uv=False).min() for b in mine] for a in true]
    )


PLANTED = {
    "one": ((1,), 0, 2, 0),
    "independent": ((), 3, 6, 0),
    "one angle, several frequencies": ((1, 2, 6), 0, 6, 0),
    "both": ((1, 2), 2, 8, 0),
    "in more dimensions than are spanned": ((1, 2), 1, 13, 0),
    "beside sparse codes": ((2, 5), 1, 9, 3),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", PLANTED)
def test_planes_of_circles_are_found(name, key):
    waves, alone, dim, others = PLANTED[name]
    rows, planes, _ = example(waves, alone, dim, others=others)
    found = circular_planes(key, jnp.asarray(rows, float), **FEW)
    assert found.shape == (2 * len(planes), dim)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    near = closeness(found, planes)
    assert near.max(1).min() > 0.99
    assert sorted(near.argmax(1)) == list(range(len(planes)))


def test_rows_are_those_that_circles_are_made_of_not_those_that_measure_them(key):
    rows, planes, measuring = example((1, 2), 1, 6)
    found = circular_planes(key, rows, **FEW)
    assert closeness(found, planes).max(1).min() > 0.99
    assert closeness(found, measuring.reshape(-1, 2, 6)).max(1).max() < 0.95


@pytest.mark.slow_cases
@pytest.mark.parametrize("seed", range(4))
def test_planes_that_few_starts_reach_are_found_beside_the_others(seed):
    rows, planes, _ = example((1, 2, 6, 13), 1, 10)
    few = {"starts": 24, "steps": 100}
    found = circular_planes(jax.random.key(seed), rows, **few)
    assert closeness(found, planes).max(1).min() > 0.99
    assert len(found) == 2 * len(planes)


def test_two_mixed_planes_do_not_replace_a_true_one():
    """Of planes 0 to 3 the last is missing, and two are halfway between 2 and it."""
    true = np.eye(8).reshape(4, 2, 8)
    mixed = (true[[2, 2]] + np.array([[[1.0]], [[-1.0]]]) * true[[3, 3]]) / 2**0.5
    known = (np.concatenate([true[:3], mixed]), np.array([1.002, 1, 1.001, 1.01, 1.02]))
    planes, ratios = _roundest_set([known], 1.1, 3)
    np.testing.assert_array_equal(planes, true[[1, 2, 0]])
    np.testing.assert_array_equal(ratios, [1, 1.001, 1.002])
    planes, _ = _roundest_set([known], 1.1, 4)
    np.testing.assert_allclose(planes, [*true[[1, 0]], *mixed])
    missing = (true[3:], np.array([1.003]))
    planes, _ = _roundest_set([known, missing], 1.1, 4)
    np.testing.assert_array_equal(planes, true[[1, 2, 0, 3]])
    assert _roundest_set([known], 0.9, 4)[0].shape == (0, 2, 8)
    assert _roundest_set([known], 1.1, 0)[0].shape == (0, 2, 8)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_orthonormal_pairs_are_the_polar_factor(scale):
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(300, 2, 7))
    pairs[:100, 1] = pairs[:100, 0] + 0.1 * pairs[:100, 1]  # nearly parallel
    pairs[100:200, 1] *= 1e-2
    left, _, right = np.linalg.svd(pairs, full_matrices=False)
    found = np.asarray(_orthonormal_pairs(jnp.asarray(scale * pairs, jnp.float32)))
    np.testing.assert_allclose(found, left @ right, atol=1e-3)
    grams = found @ found.swapaxes(1, 2)
    np.testing.assert_allclose(grams, np.tile(np.eye(2), (300, 1, 1)), atol=1e-3)
    again = np.asarray(_orthonormal_pairs(jnp.asarray(found)))
    grams = again @ again.swapaxes(1, 2)
    np.testing.assert_allclose(grams, np.tile(np.eye(2), (300, 1, 1)), atol=1e-6)


def test_pairs_of_less_than_two_dimensions_stay_finite():
    pairs = jnp.asarray([[[0.0, 0.0]] * 2, [[1.0, 2.0]] * 2, [[1.0, 2.0], [0.0, 0.0]]])
    assert np.isfinite(_orthonormal_pairs(pairs)).all()


@pytest.mark.slow_cases
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_the_scale_of_the_rows_does_not_matter(scale, key):
    rows, planes, _ = example((1, 2), 1, 8)
    found = circular_planes(key, jnp.asarray(rows * scale, jnp.float32), **FEW)
    assert len(found) == 2 * len(planes)
    assert closeness(found, planes).max(1).min() > 0.99


def test_another_key_finds_the_same_planes_in_another_basis(key):
    rows, planes, _ = example((1, 2), 1, 6)
    one, same = (circular_planes(key, rows, **FEW) for _ in range(2))
    other = circular_planes(jax.random.key(1), rows, **FEW)
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01
    assert closeness(other, planes).max(1).min() > 0.99


@pytest.mark.slow_cases
@pytest.mark.parametrize("dim", [2, 4, 7])
@pytest.mark.parametrize("kind", ["normal", "sparse", "laplace", "sphere"])
def test_rows_without_circles_give_no_plane(kind, dim, key):
    rng = np.random.default_rng(dim)
    rows = rng.normal(size=(2000, dim))
    if kind == "sparse":
        rows *= rng.random(rows.shape) < 0.2
    elif kind == "laplace":
        rows = rng.laplace(size=rows.shape)
    elif kind == "sphere":
        rows = rng.normal(size=(2000, dim + 1))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = circular_planes(key, rows, **FEW)
    assert found.shape == (0, rows.shape[1])


@pytest.mark.parametrize(
    ("early_ratio", "steps", "descents"),
    [(1.51, 60, [7]), (1.49, 60, [7, 60]), (1.51, 7, [0, 7])],
    ids=["hopeless", "hopeful", "too few steps to tell"],
)
def test_a_hopeless_search_ends_early(early_ratio, steps, descents, key, monkeypatch):
    seen = []

    def descend(steps, planes, rows):
        seen.append(steps)
        return planes, jnp.full(len(planes), 1.2)

    def ratios(planes, rows):
        assert rows is held_out
        return jnp.full(len(planes), early_ratio)

    monkeypatch.setattr(circles, "_descend", descend)
    monkeypatch.setattr(circles, "_ratios", ratios)
    rows, held_out = jax.random.normal(key, (2, 50, 4))
    found = circles._search(key, 3, steps, rows, held_out, 1.1)
    assert found.shape == (0, 2, 4)
    assert seen == descents


def test_planes_that_only_fit_the_rows_of_the_descent_end_it(key, monkeypatch):
    """Of 90 rows in 40 dimensions some planes are below 1.5, on other rows none."""
    seen, descend = [], circles._descend

    def recorded(steps, planes, rows):
        planes, ratios = descend(steps, planes, rows)
        seen.append((steps, float(ratios.min())))
        return planes, ratios

    monkeypatch.setattr(circles, "_descend", recorded)
    rows = np.random.default_rng(0).normal(size=(120, 40))
    assert circular_planes(key, rows, starts=8, steps=160).shape == (0, 40)
    assert len(seen) == 1
    assert seen[0] == (20, pytest.approx(1.25, abs=0.25))


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("tolerance", "planes"), [(1.27, 0), (1.31, 1)], ids=["below", "above"]
)
def test_tolerance_is_the_ratio_of_moments(tolerance, planes, key):
    """Of a radius that is U[.5, 1.5] the ratio is 1.5125 / (13 / 12)² = 1.289."""
    rng = np.random.default_rng(0)
    radius = 0.5 + rng.permutation(4000) / 4000
    rows = radius[:, None] * circle(2 * np.pi * np.arange(4000) / 4000)
    found = circular_planes(key, rows, tolerance=tolerance, **FEW)
    assert len(found) == 2 * planes


@pytest.mark.slow
def test_the_roundest_plane_comes_first(key):
    rng = np.random.default_rng(0)
    turn = 2 * np.pi * np.arange(4000) / 4000
    rough = (1 + 0.2 * rng.choice([-1, 1], 4000))[:, None] * circle(turn)
    rows = np.concatenate([rough, circle(rng.permutation(turn))], axis=1)
    found = circular_planes(key, rows, tolerance=1.2, **FEW)
    assert found.shape == (4, 4)
    near = closeness(found, np.eye(4).reshape(2, 2, 4))
    assert near.argmax(1).tolist() == [1, 0]


@pytest.mark.parametrize(
    "rows",
    [
        np.ones((100, 1)),
        np.outer(np.arange(100.0), [1.0, 2.0, 3.0]),
        np.zeros((100, 3)),
        np.zeros((0, 3)),
        np.full((100, 3), 7.0),
        np.zeros((100, 0)),
        np.zeros((0, 0)),
    ],
    ids=["one column", "rank one", "zero", "no rows", "constant", "no column", "none"],
)
def test_less_than_two_dimensions_have_no_plane(rows, key):
    found = circular_planes(key, rows, **FEW)
    assert found.shape == (0, rows.shape[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_must_be_finite(bad, key):
    rows = np.ones((5, 3))
    rows[1, 2] = bad
    with pytest.raises(ValueError, match=r"circular_planes: wanted finite rows \[N, D"):
        circular_planes(key, rows)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_rows_are_a_matrix(shape, key):
    with pytest.raises(ValueError, match=r"circular_planes: .* got shape \("):
        circular_planes(key, np.ones(shape))


@pytest.mark.parametrize(
    "bad", [{"starts": 0}, {"starts": -1}, {"steps": -1}, {"tolerance": np.nan}]
)
def test_options_are_in_range(bad, key):
    (value,) = bad.values()
    with pytest.raises(ValueError, match=f"circular_planes: wanted starts .*{value}"):
        circular_planes(key, np.eye(3), **bad)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("num", "dim"), [(100, 40), (200, 100), (120, 120), (300, 200)]
)
@pytest.mark.parametrize("kind", ["normal", "sparse"])
def test_few_rows_in_many_dimensions_give_no_plane(num, dim, kind, key):
    rng = np.random.default_rng(num)
    rows = rng.normal(size=(num, dim))
    if kind == "sparse":
        rows *= rng.random(rows.shape) < 0.2
    found = circular_planes(key, rows, starts=32, steps=100)
    assert found.shape == (0, dim)


def test_fewer_rows_than_the_minimum_give_no_plane(key):
    rows = circle(np.random.default_rng(0).uniform(0, 2 * np.pi, 100))
    for num in (2, 1, 79):
        assert circular_planes(key, rows[:num], **FEW).shape == (0, 2)
    assert circular_planes(key, rows[:80], **FEW).shape == (2, 2)


@pytest.mark.slow_cases
@pytest.mark.parametrize("num", [80, 100, 200])
@pytest.mark.parametrize("seed", range(3))
def test_a_circle_in_few_rows_is_found(num, seed):
    rng = np.random.default_rng(seed)
    parts = [circle(rng.uniform(0, 2 * np.pi, num)), rng.normal(size=(num, 6))]
    rows = np.concatenate(parts, axis=1)
    found = circular_planes(jax.random.key(seed), rows, starts=32, steps=60)
    assert found.shape == (2, 8)
    assert closeness(found, np.eye(8)[None, :2]).min() > 0.8
