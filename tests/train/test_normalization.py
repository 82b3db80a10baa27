"""What training divides by, for data of any size and with gaps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.train import normalization

D, M, N, R = 6, 24, 90, 2


def a_trainer(readouts=R):
    sae = ft.dictionaries.topk(D, M, 3)
    objective = ft.losses.attribution(sae)
    made = ft.trainer(sae, objective, readouts=readouts, warm_up=0)
    return made, jax.jit(made.update)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    acts, grads = rng.normal(size=(N, D)), rng.normal(size=(N, R, D))
    grads = grads * np.array([1.0, 5.0])[:, None]
    single = (jnp.asarray(x, jnp.float32) for x in (acts, grads, np.ones(N)))
    return ft.Taps(*single)


@pytest.fixture(scope="module")
def both():
    made, update = a_trainer()
    return made.init(jax.random.key(0)), update


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e20, 1e30])
def test_gradients_of_any_size_train_the_same_dictionary(both, size):
    start, update = both
    plain, other = start, start
    for seed in range(3):
        taps = draw(seed)
        plain, told = update(plain, taps)
        grads = taps.grads * np.float32(size)
        other, same = update(other, taps._replace(grads=grads))
    for name, value in told.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(
        normalization(other).grads, size * normalization(plain).grads, rtol=1e-4
    )
    want = np.sqrt(np.mean(np.stack([draw(s).grads for s in range(3)]) ** 2, (0, 1, 3)))
    np.testing.assert_allclose(normalization(plain).grads, want, rtol=0.05)


def test_what_has_no_weight_may_be_anything(both):
    start, update = both
    taps = draw()
    weights = taps.weights.at[7].set(0)
    none = taps._replace(weights=weights)
    bad = none._replace(
        acts=none.acts.at[7].set(jnp.nan), grads=none.grads.at[7].set(jnp.inf)
    )
    for x, y in zip(
        jax.tree.leaves(update(start, none)),
        jax.tree.leaves(update(start, bad)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow_cases
@pytest.mark.parametrize("first", ["no weight", "constant", "one example"])
def test_the_scale_is_that_of_the_first_batch_that_varies(both, first):
    start, update = both
    taps = draw()
    taps = taps._replace(acts=1000 * taps.acts + 50)
    empty = {
        "no weight": taps._replace(weights=0 * taps.weights),
        "constant": taps._replace(acts=0 * taps.acts + 50),
        "one example": taps._replace(
            weights=0 * taps.weights.at[0].set(0) + jnp.eye(N)[0]
        ),
    }[first]
    state = update(start, empty)[0]
    assert not state.running["begun"]
    state = update(state, taps)[0]
    assert state.running["begun"]
    acts = np.asarray(taps.acts, np.float64)
    np.testing.assert_allclose(normalization(state).acts, acts.std(0).mean(), rtol=0.1)
    later = update(state, taps._replace(acts=9 * taps.acts))[0]
    assert normalization(later).acts == normalization(state).acts


def fitted(acts, weights):
    taps = ft.Taps(np.asarray(acts, np.float32), None, np.asarray(weights, np.float32))
    sae = ft.dictionaries.standard(D, M)
    made = ft.trainer(sae, ft.losses.default(sae))
    return ft.fit(made, made.init(jax.random.key(0)), lambda step: taps, steps=1)


def test_a_first_batch_that_tells_nothing_is_reported():
    acts = np.asarray(draw().acts)
    with pytest.warns(UserWarning, match="first batch have no weight"):
        fitted(acts, np.zeros(N))
    with pytest.warns(UserWarning, match="first batch differ in nothing"):
        fitted(0 * acts + 3, np.ones(N))
    with pytest.raises(ValueError, match=r"must not be negative or NaN, got -1\.0"):
        fitted(acts, np.where(np.arange(N) == 4, -1, 1))
