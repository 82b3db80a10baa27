import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.moments import sketched_moments

DIM, RANK, NUM, READOUTS = 60, 6, 900, 2


@pytest.fixture(scope="module")
def taps():
    keys = jax.random.split(jax.random.key(0), 4)
    decay = 0.6 ** jnp.arange(float(DIM))
    mix = jnp.linalg.qr(jax.random.normal(keys[0], (DIM, DIM)))[0]
    acts = (jax.random.normal(keys[1], (NUM, DIM)) * decay[None, :]) @ mix + 3.0
    grads = jax.random.normal(keys[2], (NUM, READOUTS, DIM)) * decay[::-1][None, None]
    weights = (jax.random.uniform(keys[3], (NUM,)) > 0.2).astype(jnp.float32)
    return ft.Taps(acts, grads, weights)


def folded(acc, taps, size=300):
    state = acc.init()
    for start in range(0, NUM, size):
        part = jax.tree.map(lambda x, start=start: x[start : start + size], taps)
        state = acc.update(state, part)
    return state


@pytest.fixture(scope="module")
def both(taps):
    exact, sketch = ft.moments(DIM), sketched_moments(DIM, 24, width=48)
    return exact.finish(folded(exact, taps)), sketch.finish(folded(sketch, taps))


@pytest.mark.parametrize("method", [ft.pca, ft.gradient_pca, ft.joint_pca])
def test_a_wide_sketch_gives_the_same_basis_as_the_moments(both, method):
    want, got = (method(stats, RANK) for stats in both)
    np.testing.assert_allclose(got.spectrum, want.spectrum, rtol=2e-3)
    np.testing.assert_allclose(got.mean, want.mean, atol=1e-5)
    np.testing.assert_allclose(got.diagnostics.total, want.diagnostics.total, rtol=1e-3)
    for ours, theirs in ((got.readers.T, want.readers.T), (got.writers, want.writers)):
        cosines = ft.metrics.principal_angles(ours, theirs)
        assert float(cosines.min()) > 0.999


def test_two_halves_merge_to_the_whole(taps, both):
    acc = sketched_moments(DIM, 24, width=48)
    halves = [
        acc.update(acc.init(), jax.tree.map(lambda x, part=part: x[part], taps))
        for part in (slice(0, 450), slice(450, NUM))
    ]
    merged = acc.finish(acc.merge(*halves))
    np.testing.assert_allclose(merged.acts.s[:RANK], both[1].acts.s[:RANK], rtol=1e-3)
    np.testing.assert_allclose(merged.mean, both[1].mean, atol=1e-5)
    np.testing.assert_allclose(merged.weight, taps.weights.sum())


def test_what_rows_of_weight_0_hold_does_not_matter(taps, both):
    hidden = jnp.where(taps.weights == 0, jnp.nan, 1.0)
    acc = sketched_moments(DIM, 24, width=48)
    spoiled = taps._replace(acts=taps.acts * hidden[:, None])
    got = acc.finish(folded(acc, spoiled))
    np.testing.assert_allclose(got.acts.s[:RANK], both[1].acts.s[:RANK], rtol=1e-5)


def test_errors_say_what_is_wrong(taps, both):
    with pytest.raises(ValueError, match=r"rank must be an int in 1 \.\. 24"):
        ft.pca(both[1], 25)
    with pytest.raises(ValueError, match="not centred"):
        ft.gradient_pca(both[1], 2, center=True)
    acc = sketched_moments(DIM, 4, grads=False)
    without = acc.finish(acc.update(acc.init(), taps._replace(grads=None)))
    with pytest.raises(ValueError, match="hold no gradients"):
        ft.joint_pca(without, 2)
    with pytest.raises(ValueError, match="wanted acts"):
        acc.update(acc.init(), taps._replace(acts=taps.acts[:, :3]))
