import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.train.outliers import warn_of_outliers

D, N = 32, 600


def drawn(seed=0, **changes):
    """Normal activations, with columns shifted and stretched."""
    acts = np.random.default_rng(seed).normal(size=(N, D))
    for d in changes.get("stretched", ()):
        acts[:, d] *= changes["by"]
    for d, far in changes.get("shifted", {}).items():
        acts[:, d] += far
    return ft.Taps(jnp.asarray(acts, jnp.float32), None, jnp.ones(N))


def test_planted_outliers_are_found_with_their_ratios():
    found = ft.metrics.outlier_dims(drawn(shifted={3: 40.0, 17: -9.0}))
    assert found.dims.tolist() == [3, 17]
    np.testing.assert_allclose(found.ratios, [40, 9], rtol=0.1)
    assert found.share == 2 / D
    np.testing.assert_allclose(found.severity, np.hypot(40, 9) / D**0.5, rtol=0.05)
    assert found.massive.size == 0
    assert found.spread < 1.3


def test_massive_dimensions_are_found_with_their_share():
    found = ft.metrics.outlier_dims(drawn(stretched=(5, 6), by=30.0))
    assert sorted(found.massive.tolist()) == [5, 6]
    np.testing.assert_allclose(found.spread, 30, rtol=0.1)
    np.testing.assert_allclose(found.massive_variance, 1800 / 1830, rtol=1e-3)
    assert found.dims.size == 0


@pytest.mark.parametrize("num", [2, 8, 600])
def test_normal_data_and_sparse_codes_raise_no_alarm(num):
    taps = drawn()
    found = ft.metrics.outlier_dims(jax.tree.map(lambda x: x[:num], taps))
    assert found.severity < 1.5
    assert found.massive.size == 0
    sparse = jax.nn.relu(taps.acts - 1.5)
    found = ft.metrics.outlier_dims(taps._replace(acts=sparse))
    assert found.severity < 1
    assert found.massive.size == 0


@pytest.mark.slow
def test_examples_count_by_weight_and_moments_say_the_same():
    taps = drawn(shifted={1: 5.0})
    junk = taps.acts.at[:100].set(1e9)
    weights = jnp.arange(N, dtype=jnp.float32).at[:100].set(0)
    got = ft.metrics.outlier_dims(ft.Taps(junk, None, weights))
    rest, of_rest = (np.asarray(x[100:], np.float64) for x in (junk, weights))
    mean = np.average(rest, axis=0, weights=of_rest)
    std = np.average((rest - mean) ** 2, axis=0, weights=of_rest) ** 0.5
    np.testing.assert_allclose(got.severity, np.linalg.norm(mean) / np.linalg.norm(std))
    acc = ft.moments(D, grads=False)
    moments = acc.finish(acc.update(acc.init(), ft.Taps(junk, None, weights)))
    same = ft.metrics.outlier_dims(moments)
    np.testing.assert_allclose(same.ratios, got.ratios, rtol=1e-4)
    assert same.dims.tolist() == got.dims.tolist() == [1]


def test_dimensions_that_do_not_vary():
    acts = drawn().acts.at[:, 0].set(0.0).at[:, 1].set(2.0)
    found = ft.metrics.outlier_dims(ft.Taps(acts, None, jnp.ones(N)))
    assert found.dims.tolist() == [1]
    assert np.isinf(found.ratios[0])
    nothing = ft.metrics.outlier_dims(ft.Taps(jnp.zeros((4, 3)), None, jnp.ones(4)))
    assert (nothing.severity, nothing.spread, nothing.massive_variance) == (0, 0, 0)
    still = ft.metrics.outlier_dims(ft.Taps(jnp.ones((4, 3)), None, jnp.ones(4)))
    assert still.severity == np.inf


def test_errors():
    taps = drawn()
    with pytest.raises(ValueError, match="limit must be a number above 0, got 0"):
        ft.metrics.outlier_dims(taps, limit=0)
    with pytest.raises(ValueError, match="no example has weight"):
        ft.metrics.outlier_dims(taps._replace(weights=jnp.zeros(N)))
    with pytest.raises(ValueError, match="not all finite; see check_taps"):
        ft.metrics.outlier_dims(taps._replace(acts=taps.acts.at[0, 0].set(jnp.nan)))
    with pytest.raises(TypeError, match="wanted Taps or Moments, got dict"):
        ft.metrics.outlier_dims({"mlp": taps})
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(ft.metrics.outlier_dims)(taps)


@functools.cache  # one compilation for all the data
def made(center=True, population=False):
    sae = ft.dictionaries.standard(D, 4)
    trainer = ft.trainer(sae, ft.losses.default(sae), center=center)
    if population:
        trainer = ft.population(trainer)
        return trainer, trainer.init(jax.random.split(jax.random.key(0), 2))
    return trainer, trainer.init(jax.random.key(0))


def warned(taps, *, check_data=True, **options):
    """What ``fit`` says before the first step."""
    trainer, state = made(**options)
    settings = {"chunk": 1, "check_data": check_data}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state = ft.fit(trainer, state, lambda step: taps, steps=1, **settings)
        ft.fit(trainer, state, lambda step: taps, steps=2, **settings)
    assert all(warning.filename == __file__ for warning in said)
    return [str(warning.message) for warning in said]


@pytest.mark.slow
def test_fit_warns_once_where_a_mean_will_not_be_taken_away():
    far = drawn(shifted={3: 40.0})
    assert warned(far) == []
    (said,) = warned(far, center=False)
    assert "mean is 7" in said
    assert f"dimensions 3 ({ft.metrics.outlier_dims(far).ratios[0]:.3g})" in said
    assert "leave trainer(center=True) on" in said
    (said,) = warned(far, population=True, center=False)
    assert "not centred" in said
    assert warned(far, center=False, check_data=False) == []
    assert warned(drawn(), center=False) == []


def test_fit_warns_of_massive_dimensions_in_any_case():
    (said,) = warned(drawn(stretched=(5,), by=50.0))
    assert "1 of 32 dimensions (5) have 99% of the variance" in said
    assert warned(drawn(stretched=(5,), by=50.0), check_data=False) == []


def test_a_transcoder_and_codes_that_compete_take_less():
    some = drawn(shifted={3: 1.5 * D**0.5})  # a mean 1.5 times as long
    narrow, sparse = (
        ft.dictionaries.standard(D, 4).config,
        ft.dictionaries.topk(D, 4, 2).config,
    )
    writes = ft.dictionaries.standard(
        D, 4, target_dim=3
    ).config  # b_dec is not subtracted
    far = drawn(shifted={3: 40.0})
    warn_of_outliers(some, narrow, center=False)  # -W error
    warn_of_outliers(some, sparse, center=True)
    with pytest.warns(UserWarning, match="leave trainer"):
        warn_of_outliers(some, sparse, center=False)
    with pytest.warns(UserWarning, match="subtract the mean of the activations"):
        warn_of_outliers(far, writes, center=True)
    bad = far._replace(acts=far.acts.at[0, 0].set(jnp.nan))
    warn_of_outliers(bad, writes, center=True)  # the loss will say it


def test_moments_that_are_not_finite_are_refused():
    taps = ft.Taps(jnp.ones((9, 4)), None, jnp.ones(9))
    stats = ft.moments_of(taps)
    stats = stats._replace(mean=stats.mean.at[0].set(jnp.nan))
    with pytest.raises(ValueError, match="not all finite"):
        ft.metrics.outlier_dims(stats)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0.0, 1.0])
@pytest.mark.parametrize("reads_grads", [False, True])
def test_fit_tells_of_gradients_that_are_all_zero(lost, reads_grads):
    sae = ft.dictionaries.standard(6, 8)
    loss = ft.losses.default(sae)
    if reads_grads:
        loss = ft.losses.attribution(sae, sparsity=0.3, attribution_sparsity=0.3)
    trainer = ft.trainer(sae, loss)
    acts = jax.random.normal(jax.random.key(0), (16, 6))
    taps = ft.Taps(acts, lost * acts[:, None], jnp.ones(16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for check_data in (True, False):
            ft.fit(
                trainer,
                trainer.init(jax.random.key(1)),
                lambda step: taps,
                steps=1,
                progress=False,
                check_data=check_data,
            )
    told = [str(w.message) for w in caught if "all 0" in str(w.message)]
    assert len(told) == (reads_grads and not lost)
    assert all(text.startswith("fit: the first batch wants grad") for text in told)
