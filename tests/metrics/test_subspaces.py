import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from toyfeat import from_split, gradient_pca, moments, pca
from toyfeat.metrics import (
    output_preserved,
    principal_angles,
    r_squared,
    variance_explained,
)
from toyfeat.types import Basis, Diagnostics, Moments, Taps


def rows(num, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(num, dim))


# --- principal_angles ----------------------------------------------------


angles = jax.jit(principal_angles)


def scipy_cosines(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.sort(np.cos(scipy.linalg.subspace_angles(a.T, b.T)))[::-1]


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("r", "q", "dim"),
    [(1, 1, 3), (2, 2, 5), (2, 4, 5), (4, 2, 5), (3, 3, 3), (3, 1, 9)],
)
@pytest.mark.parametrize("seed", range(3))
def test_principal_angles_are_those_of_scipy(r, q, dim, seed):
    a, b = (rows(n, dim, s).astype(np.float32) for n, s in ((r, seed), (q, seed + 9)))
    got = angles(a, b)
    assert got.shape == (min(r, q),)
    assert np.all(np.diff(np.asarray(got)) <= 0)
    assert np.all((np.asarray(got) >= 0) & (np.asarray(got) <= 1))
    np.testing.assert_allclose(got, scipy_cosines(a, b), atol=1e-5)
    np.testing.assert_allclose(angles(b, a), got, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_principal_angles_do_not_depend_on_the_scale(scale):
    a, b = rows(2, 5).astype(np.float32), rows(3, 5, 1).astype(np.float32)
    want = scipy_cosines(a, b)
    a_scaled, b_scaled = (np.float32(scale) * x for x in (a, b))
    np.testing.assert_allclose(angles(a_scaled, b), want, atol=1e-5)
    np.testing.assert_allclose(angles(a, b_scaled), want, atol=1e-5)


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4])
def test_principal_angles_do_not_depend_on_how_long_each_row_is(ratio):
    a, b = rows(2, 5).astype(np.float32), rows(3, 5, 1).astype(np.float32)
    want = scipy_cosines(a, b)
    a[1] *= np.float32(ratio)
    np.testing.assert_allclose(angles(a, b), want, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_dependent_rows_give_the_angles_that_there_are_and_zeros(scale):
    base, b = rows(2, 6), rows(3, 6, 1).astype(np.float32)
    a = np.stack([base[0], base[1], base[0] - 2 * base[1]]).astype(np.float32)
    want = np.append(scipy_cosines(base, b), 0)
    a = np.float32(scale) * a
    np.testing.assert_allclose(angles(a, b), want, atol=1e-5)
    np.testing.assert_allclose(angles(b, a), want, atol=1e-5)


def test_zero_rows_have_no_angles():
    got = angles(np.zeros((2, 4)), rows(3, 4))
    assert got.tolist() == [0, 0]


def test_more_rows_than_dimensions_span_everything():
    got = angles(rows(5, 3), rows(4, 3, 1))
    np.testing.assert_allclose(got, [1, 1, 1], atol=1e-6)


@pytest.mark.slow
def test_principal_angles_eager_is_jit_and_vmap_is_a_loop():
    a = jnp.asarray(rows(12, 5), jnp.float32).reshape(4, 3, 5)
    b = jnp.asarray(rows(2, 5, 1), jnp.float32)
    batched = jax.jit(jax.vmap(principal_angles, (0, None)))(a, b)
    for i in range(4):
        eager = principal_angles(a[i], b)
        np.testing.assert_allclose(batched[i], eager, atol=1e-6)
        np.testing.assert_allclose(jax.jit(principal_angles)(a[i], b), eager, atol=1e-6)


def test_a_nan_among_the_rows_shows_in_the_cosines():
    a = rows(2, 4)
    a[0, 0] = np.nan
    assert np.isnan(principal_angles(a, rows(2, 4, 1))).any()


@pytest.mark.parametrize(
    ("a", "b"), [((2, 4), (2, 5)), ((4,), (2, 4)), ((2, 4), (1, 2, 4))]
)
def test_principal_angles_of_misfits_raise(a, b):
    match = r"principal_angles.*\(" + ", ".join(map(str, a))
    with pytest.raises(ValueError, match=match):
        principal_angles(np.ones(a), np.ones(b))


# --- r_squared -----------------------------------------------------------


@pytest.mark.slow_cases
@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_r_squared_is_that_of_numpy(mean, scale):
    rng = np.random.default_rng(0)
    target = (scale * (rng.normal(size=300) + mean)).astype(np.float32)
    noise = rng.normal(size=(300, 4)) * [0, 0.5, 2, 100]
    scores = (scale * noise + target[:, None]).astype(np.float32)
    got = jax.jit(r_squared)(scores, target)
    both = np.column_stack([scores, target]).astype(np.float64)
    want = np.corrcoef(both.T)[:-1, -1] ** 2
    assert got.shape == (4,)
    np.testing.assert_allclose(got, want, atol=1e-5)
    one = r_squared(scores[:, 1], target)
    assert one.shape == ()
    np.testing.assert_allclose(one, want[1], atol=1e-5)


def test_r_squared_does_not_see_signs():
    x = rows(1, 50)[0]
    np.testing.assert_allclose(r_squared(-3 * x + 1, x), 1, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e4 / 3])
@pytest.mark.parametrize("n", [3, 1000])
def test_constant_sides_have_no_correlation(value, n):
    vary, constant = rows(1, n)[0], np.full(n, value)
    np.testing.assert_allclose(r_squared(constant, vary), 0, atol=1e-6)
    np.testing.assert_allclose(r_squared(vary, constant), 0, atol=1e-6)
    np.testing.assert_allclose(r_squared(constant, constant), 0, atol=1e-6)
    mixed = r_squared(np.stack([vary, constant], 1), vary)
    np.testing.assert_allclose(mixed, [1, 0], atol=1e-5)


def test_r_squared_does_not_exceed_one():
    for seed in range(5):
        x = rows(1, 1000, seed)[0]
        assert float(r_squared(x, x)) <= 1


@pytest.mark.parametrize(
    ("scores", "target"), [((4,), (5,)), ((4, 2), (2,)), ((4,), (4, 1)), ((), (4,))]
)
def test_r_squared_of_misfits_raises(scores, target):
    match = r"r_squared.*\(" + ", ".join(map(str, scores))
    with pytest.raises(ValueError, match=match):
        r_squared(np.ones(scores), np.ones(target))


# --- variance_explained --------------------------------------------------


@functools.cache
def folded(dim, grads):
    acc = moments(dim, grads=grads)
    return jax.jit(lambda taps: acc.finish(acc.update(acc.init(), taps)))


def of_data(acts, grads=None, weights=None):
    n, dim = acts.shape
    weights = np.ones(n) if weights is None else weights
    taps = [
        None if x is None else jnp.asarray(x, jnp.float32)
        for x in (acts, grads, weights)
    ]
    return folded(dim, grads is not None)(Taps(*taps))


fitted_pca = jax.jit(pca, static_argnames="rank")
fitted_gradient_pca = jax.jit(gradient_pca, static_argnames="rank")
preserved = jax.jit(output_preserved, static_argnames=("probed", "site"))
explained = jax.jit(variance_explained)


def basis_of(mean, readers, writers):
    parts = [jnp.asarray(x, jnp.float32) for x in (mean, readers, writers)]
    rank = parts[1].shape[1]
    nothing = jnp.float32(0)
    return Basis(
        *parts, jnp.ones(rank), Diagnostics(jnp.int32(rank), nothing, nothing, nothing)
    )


def rebuilt64(basis, acts):
    mean, readers, writers = (np.asarray(x, np.float64) for x in basis[:3])
    return (acts - mean) @ readers @ writers + mean


@pytest.mark.slow_cases
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("method", ["pca", "gradient_pca", "any"])
def test_variance_explained_is_that_of_the_rebuilt_data(method, rank):
    rng = np.random.default_rng(0)
    acts = rows(200, 6) @ rows(6, 6, 1) + 5
    weights = rng.uniform(0.1, 2, 200)
    acts, weights = acts.astype(np.float32), weights.astype(np.float32)
    stats = of_data(acts, rows(200, 6, 2).reshape(200, 1, 6), weights)
    if method == "any":
        scale = 0.3
        basis = basis_of(stats.mean, rows(6, rank, 3), scale * rows(rank, 6, 4))
    else:
        basis = {"pca": fitted_pca, "gradient_pca": fitted_gradient_pca}[method](
            stats, rank=rank
        )
    acts, weights = acts.astype(np.float64), weights.astype(np.float64)
    mean = weights @ acts / weights.sum()
    lost = weights @ ((acts - rebuilt64(basis, acts)) ** 2).sum(1)
    want = 1 - lost / (weights @ ((acts - mean) ** 2).sum(1))
    got = explained(basis, stats)
    assert got.shape == ()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_basis_of_rank_zero_explains_nothing():
    stats = of_data(rows(40, 6))
    empty = basis_of(stats.mean, np.zeros((6, 2)), np.zeros((2, 6)))
    np.testing.assert_allclose(explained(empty, stats), 0, atol=1e-6)


def test_activations_that_do_not_vary_are_explained():
    stats = of_data(np.full((40, 6), 2.0))
    empty = basis_of(stats.mean, np.zeros((6, 2)), np.zeros((2, 6)))
    assert float(explained(empty, stats)) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_variance_explained_does_not_depend_on_the_scale(scale):
    stats = of_data(rows(40, 6) @ rows(6, 6, 1))
    mean = jnp.float32(scale**0.5) * stats.mean
    small = Moments(stats.weight, mean, jnp.float32(scale / 40) * stats.scatter)
    want = explained(fitted_pca(stats, rank=2), stats)
    np.testing.assert_allclose(
        explained(fitted_pca(small, rank=2), small), want, atol=1e-5
    )


def test_variance_explained_under_jit():
    stats = of_data(rows(40, 6))
    fn = lambda s: variance_explained(fitted_pca(s, rank=2), s)  # noqa: E731
    np.testing.assert_allclose(jax.jit(fn)(stats), fn(stats), atol=1e-6)


# --- output_preserved ----------------------------------------------------

W_IN, W_OUT = rows(3, 6), rows(6, 2, 1)


def model(shape):
    def prefix(params, inputs):
        return jnp.tanh(inputs @ params["in"])

    def suffix(params, acts):
        y = jnp.maximum(acts, 0) @ params["out"] + jnp.array([3.0, -7.0]).reshape(
            (1,) * (acts.ndim - 1) + (2,)
        )
        return {"vector": y, "scalar": y[..., 0]}[shape]

    params = {k: jnp.asarray(v, jnp.float32) for k, v in (("in", W_IN), ("out", W_OUT))}
    return from_split(prefix, suffix, site="hidden"), params


def model64(acts, shape):
    y = np.maximum(acts, 0) @ np.asarray(W_OUT, np.float32) + [3.0, -7.0]
    return {"vector": y, "scalar": y[..., 0]}[shape]


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("shape", "lead"), [("vector", (40,)), ("scalar", (40,)), ("vector", (10, 4))]
)
@pytest.mark.parametrize("rank", [1, 6])
def test_output_preserved_is_that_of_a_hand_made_splice(rank, shape, lead):
    probed, params = model(shape)
    inputs = rows(40, 3, 5).reshape(*lead, 3).astype(np.float32)
    acts = np.tanh(inputs @ np.asarray(W_IN, np.float32)).astype(np.float64)
    basis = fitted_pca(of_data(acts.reshape(-1, 6)), rank=rank)
    got = preserved(probed, params, jnp.asarray(inputs), site="hidden", basis=basis)
    whole, spliced = (model64(a, shape) for a in (acts, rebuilt64(basis, acts)))
    lost, all_of_it = (
        ((whole - x) ** 2).sum() for x in (spliced, whole.mean(0, keepdims=True))
    )
    assert got.shape == ()
    np.testing.assert_allclose(got, 1 - lost / all_of_it, atol=2e-5)


def test_the_reader_of_a_linear_output_preserves_all_of_it():
    w = rows(1, 6)[0].astype(np.float32)
    probed = from_split(lambda p, x: x, lambda p, a: a @ p)
    inputs = (rows(200, 6, 1) @ rows(6, 6, 2)).astype(np.float32)
    stats = of_data(inputs, np.broadcast_to(w, (200, 1, 6)))
    kept = [
        float(
            preserved(
                probed, jnp.asarray(w), jnp.asarray(inputs), site="acts", basis=basis
            )
        )
        for basis in (fitted_gradient_pca(stats, rank=1), fitted_pca(stats, rank=1))
    ]
    np.testing.assert_allclose(kept[0], 1, atol=1e-6)
    assert kept[1] < 0.9


def test_a_projection_that_does_harm_preserves_less_than_nothing():
    probed = from_split(lambda p, x: x, lambda p, a: a)
    inputs = jnp.asarray(rows(20, 3), jnp.float32)
    mirror = basis_of(np.zeros(3), np.eye(3), -np.eye(3))
    got = preserved(probed, None, inputs, site="acts", basis=mirror)
    assert float(got) < -2


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3])
def test_constant_outputs_are_preserved(value):
    probed = from_split(lambda p, x: x, lambda p, a: 0 * a[:, :2] + p)
    inputs = jnp.asarray(rows(30, 3), jnp.float32)
    empty = basis_of(np.zeros(3), np.zeros((3, 1)), np.zeros((1, 3)))
    got = preserved(probed, jnp.float32(value), inputs, site="acts", basis=empty)
    assert float(got) == 1


@pytest.mark.parametrize("value", [1.0, 0.1])
def test_constant_outputs_that_the_projection_moves_are_not_preserved(value):
    probed = from_split(lambda p, x: x, lambda p, a: a)
    mirror = basis_of(np.zeros(3), np.eye(3), -np.eye(3))
    inputs = jnp.full((30, 3), value, jnp.float32)
    assert preserved(probed, None, inputs, site="acts", basis=mirror) < 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_output_preserved_does_not_depend_on_the_scale_of_the_output(scale):
    probed = from_split(lambda p, x: x, lambda p, a: a * p)
    inputs = rows(40, 6)
    basis = fitted_pca(of_data(inputs), rank=2)
    kept = [
        preserved(
            probed,
            jnp.float32(s),
            jnp.asarray(inputs, jnp.float32),
            site="acts",
            basis=basis,
        )
        for s in (1.0, scale)
    ]
    np.testing.assert_allclose(kept[1], kept[0], atol=1e-5)


def test_output_preserved_under_jit():
    probed, params = model("vector")
    inputs = jnp.asarray(rows(20, 3, 5), jnp.float32)
    basis = fitted_pca(of_data(rows(40, 6)), rank=2)
    fn = functools.partial(output_preserved, probed, site="hidden", basis=basis)
    np.testing.assert_allclose(
        jax.jit(fn)(params, inputs), fn(params, inputs), atol=1e-5
    )


def test_a_basis_of_another_width_raises():
    probed, params = model("vector")
    basis = basis_of(np.zeros(5), np.ones((5, 1)), np.ones((1, 5)))
    with pytest.raises(ValueError, match=r"\b6\b.*\b5\b|\b5\b.*\b6\b"):
        output_preserved(probed, params, jnp.ones((4, 3)), site="hidden", basis=basis)


def test_an_unknown_site_raises():
    probed, params = model("vector")
    basis = basis_of(np.zeros(6), np.ones((6, 1)), np.ones((1, 6)))
    with pytest.raises(ValueError, match="nowhere"):
        output_preserved(probed, params, jnp.ones((4, 3)), site="nowhere", basis=basis)
