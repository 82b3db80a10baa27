"""Streams of rows and weights of any size that float32 has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.linalg import stream_svd

DIM, RANK = 12, 3
METHODS = ["gram", "incremental", "frequent_directions"]


@functools.cache
def streams(method, center=False):
    """An accumulator with jitted functions: one for the same settings."""
    acc = stream_svd(DIM, RANK, method=method, center=center, width=DIM)
    return acc._replace(update=jax.jit(acc.update), merge=jax.jit(acc.merge))


def rows_of(size, mean=0.0):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(90, DIM)) * 0.7 ** np.arange(DIM) + mean
    return (rows * size).astype(np.float32)


def fold(acc, rows, weights):
    """Three batches of one shape, the last one merged from a state of its own."""
    states = []
    for part in (slice(0, 60), slice(60, 90)):
        state = acc.init()
        for start in range(part.start, part.stop, 30):
            batch = slice(start, start + 30)
            batch = (jnp.asarray(rows[batch]), jnp.asarray(weights[batch]))
            state = acc.update(state, *batch)
        states.append(state)
    return acc.finish(acc.merge(*states))


def truth_of(rows, weights, center):
    rows, weights = rows.astype(np.float64), weights.astype(np.float64)
    if center:
        rows = rows - weights @ rows / weights.sum()
    return np.linalg.svd(rows * np.sqrt(weights)[:, None])


@pytest.mark.slow_cases
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_rows_and_weights_of_any_size_have_the_values_of_numpy(method, center):
    acc = streams(method, center)
    shares = np.random.default_rng(1).uniform(0.5, 2, size=90)
    for size, mass in [(1e-34, 1), (1e-30, 1), (1e30, 1), (1e34, 1), (1e10, 1e-30)]:
        rows, weights = rows_of(size), (shares * mass).astype(np.float32)
        svd = fold(acc, rows, weights)
        _, s, vt = truth_of(rows, weights, center)
        np.testing.assert_allclose(svd.s, s[:RANK], rtol=2e-5)
        np.testing.assert_allclose(
            np.abs(np.diag(np.asarray(svd.vt) @ vt[:RANK].T)), 1, atol=1e-4
        )
        assert 0 <= float(svd.info.residual) < s[0]


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_small_rows_after_large_ones_are_told_by_their_share(method):
    acc = streams(method)
    rows = np.concatenate([rows_of(1e-30)[:60], rows_of(1.0)[60:]])
    svd = fold(acc, rows, np.ones(90, np.float32))
    s = truth_of(rows, np.ones(90), False)[1]
    np.testing.assert_allclose(svd.s, s[:RANK], rtol=2e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("mean", [1e4, 1e5])
@pytest.mark.parametrize("method", METHODS)
def test_weighted_rows_far_from_the_origin_under_jit(method, mean):
    acc = streams(method, True)
    weights = np.random.default_rng(1).uniform(0.5, 2, size=90).astype(np.float32)
    rows = rows_of(1.0, mean)
    svd = fold(acc, rows, weights)
    s = truth_of(rows, weights, True)[1]
    np.testing.assert_allclose(svd.s, s[:RANK], rtol=5e-6)


@pytest.mark.slow_cases
@pytest.mark.parametrize("bad", [np.nan, -1.0, np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_none_raise_at_the_end(method, bad):
    acc = streams(method)
    weights = np.ones(90, np.float32)
    weights[40] = bad
    with pytest.raises(ValueError, match=r"^stream_svd: .*negative weight"):
        fold(acc, rows_of(1.0), weights)


@pytest.mark.parametrize("method", METHODS)
def test_values_out_of_range_raise_and_name_the_range(method):
    acc = streams(method)
    for size, mass in [(1e-30, 1e-30), (1e30, 1e30)]:
        weights = np.full(90, mass, np.float32)
        with pytest.raises(ValueError, match=r"1e-36 to 1e36"):
            fold(acc, rows_of(size), weights)


def test_a_sketch_tells_how_far_its_values_may_be_off():
    rng = np.random.default_rng(0)
    slow = rng.normal(size=(3000, 60)).astype(np.float32)
    low = slow[:, :3] @ rng.normal(size=(3, 60)).astype(np.float32)
    acc = stream_svd(60, RANK, method="incremental", width=8)
    update = jax.jit(acc.update)
    for rows, accurate in [(slow, False), (low, True)]:
        svd = acc.finish(update(acc.init(), jnp.asarray(rows)))
        s = np.linalg.svd(rows.astype(np.float64), compute_uv=False)[:RANK]
        assert bool(svd.info.accurate) == accurate
        assert np.max(s - svd.s) / s[0] < float(svd.info.error) + 1e-5
