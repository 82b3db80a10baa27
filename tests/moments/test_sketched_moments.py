import functools

import jax
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.moments import sketched_moments

DIM, RANK, NUM, READOUTS = 60, 6, 900, 2


@pytest.fixture(scope="module")
def taps():
    rng = np.random.default_rng(0)
    decay = 0.6 ** np.arange(DIM)
    mix = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    acts = (rng.normal(size=(NUM, DIM)) * decay) @ mix + 3.0
    grads = rng.normal(size=(NUM, READOUTS, DIM)) * decay[::-1]
    weights = rng.uniform(size=NUM) > 0.2
    return ft.Taps(*(x.astype(np.float32) for x in (acts, grads, weights)))


@functools.cache
def compiled(make, *arguments, **settings):
    """An accumulator with jitted functions: one for the same settings."""
    acc = make(*arguments, **settings)
    return acc._replace(update=jax.jit(acc.update), merge=jax.jit(acc.merge))


def folded(acc, taps, start=0, stop=NUM, size=300):
    state = acc.init()
    for first in range(start, stop, size):
        part = jax.tree.map(lambda x, first=first: x[first : first + size], taps)
        state = acc.update(state, part)
    return state


@pytest.fixture(scope="module")
def both(taps):
    exact, sketch = (
        compiled(ft.moments, DIM),
        compiled(sketched_moments, DIM, 24, width=48),
    )
    return exact.finish(folded(exact, taps)), sketch.finish(folded(sketch, taps))


@pytest.mark.slow
@pytest.mark.parametrize("method", [ft.pca, ft.gradient_pca, ft.joint_pca])
def test_a_wide_sketch_gives_the_same_basis_as_the_moments(both, method):
    want, got = (method(stats, RANK) for stats in both)
    np.testing.assert_allclose(got.spectrum, want.spectrum, rtol=2e-3)
    np.testing.assert_allclose(got.mean, want.mean, atol=1e-5)
    np.testing.assert_allclose(got.diagnostics.total, want.diagnostics.total, rtol=1e-3)
    for ours, theirs in ((got.readers.T, want.readers.T), (got.writers, want.writers)):
        cosines = ft.metrics.principal_angles(ours, theirs)
        assert float(cosines.min()) > 0.999


def test_two_parts_merge_to_the_whole(taps, both):
    acc = compiled(sketched_moments, DIM, 24, width=48)
    parts = folded(acc, taps, 0, 600), folded(acc, taps, 600)
    merged = acc.finish(acc.merge(*parts))
    np.testing.assert_allclose(
        np.asarray(merged.acts.s)[:RANK], np.asarray(both[1].acts.s)[:RANK], rtol=1e-3
    )
    np.testing.assert_allclose(merged.mean, both[1].mean, atol=1e-5)
    np.testing.assert_allclose(merged.weight, taps.weights.sum())


def test_what_rows_of_weight_0_hold_does_not_matter(taps, both):
    hidden = np.where(taps.weights == 0, np.float32(np.nan), np.float32(1))
    acc = compiled(sketched_moments, DIM, 24, width=48)
    spoiled = taps._replace(acts=taps.acts * hidden[:, None])
    got = acc.finish(folded(acc, spoiled))
    np.testing.assert_allclose(
        np.asarray(got.acts.s)[:RANK], np.asarray(both[1].acts.s)[:RANK], rtol=1e-5
    )


def test_errors_say_what_is_wrong(taps, both):
    with pytest.raises(ValueError, match=r"rank must be an int in 1 \.\. 24"):
        ft.pca(both[1], 25)
    with pytest.raises(ValueError, match="not centred"):
        ft.gradient_pca(both[1], 2, center=True)
    acc = compiled(sketched_moments, DIM, 4, grads=False)
    without = acc.finish(acc.update(acc.init(), taps._replace(grads=None)))
    with pytest.raises(ValueError, match="hold no gradients"):
        ft.joint_pca(without, 2)
    with pytest.raises(ValueError, match="wanted acts"):
        acc.update(acc.init(), taps._replace(acts=taps.acts[:, :3]))
