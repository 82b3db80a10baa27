import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft


def stats_of(rng, dim, rank=None):
    root = rng.normal(size=(dim, dim if rank is None else rank))
    cov = root @ root.T
    g = rng.normal(size=(dim, dim))
    g = g @ g.T / dim
    return cov, g


def moments_of(cov, g):
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    dim = len(cov)
    return ft.Moments(
        jnp.array(2.0), jnp.zeros(dim), f32(2 * cov), jnp.zeros(dim), f32(g)
    )


def lost(cov, g, basis):
    p = np.asarray(basis.readers, float) @ np.asarray(basis.writers, float)
    rest = np.eye(len(cov)) - p  # acts act from the left: a -> a @ p
    return np.trace(rest.T @ cov @ rest @ g)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_oblique_projection_of_the_rank_loses_less(rank, seed):
    rng = np.random.default_rng(seed)
    cov, g = stats_of(rng, 6)
    basis = ft.joint_pca(moments_of(cov, g), rank)
    values, v = np.linalg.eigh(cov)
    root = v * np.sqrt(values) @ v.T
    spectrum = np.linalg.eigvalsh(root @ g @ root)[::-1]
    np.testing.assert_allclose(basis.spectrum, spectrum[:rank], rtol=1e-4)
    best = lost(cov, g, basis)
    np.testing.assert_allclose(best, spectrum[rank:].sum(), rtol=1e-3, atol=1e-4)
    for _ in range(200):
        step = 0.3 * rng.normal(size=(6, rank))
        readers = np.asarray(basis.readers, float) + step
        writers = np.linalg.lstsq(readers.T @ cov @ readers, readers.T @ cov, None)[0]
        other = basis._replace(readers=readers, writers=writers)
        assert lost(cov, g, other) >= best * (1 - 1e-4)


def test_codes_have_unit_variance_and_no_correlation():
    cov, g = stats_of(np.random.default_rng(3), 5)
    readers = np.asarray(ft.joint_pca(moments_of(cov, g), 5).readers, float)
    np.testing.assert_allclose(readers.T @ cov @ readers, np.eye(5), atol=1e-4)


def test_directions_without_variance_are_left_out():
    cov, g = stats_of(np.random.default_rng(4), 6, rank=3)
    basis = ft.joint_pca(moments_of(cov, g), 6)
    assert int(basis.diagnostics.rank) == 3
    assert np.isfinite(np.asarray(basis.readers)).all()
    assert not np.asarray(basis.readers[:, 3:]).any()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_scales_do_not_matter(size):
    cov, g = stats_of(np.random.default_rng(5), 5)
    basis = ft.joint_pca(moments_of(cov * size, g / size), 3)
    plain = ft.joint_pca(moments_of(cov, g), 3)
    np.testing.assert_allclose(basis.spectrum, plain.spectrum, rtol=1e-3)


def test_errors():
    cov, g = stats_of(np.random.default_rng(6), 4)
    with pytest.raises(ValueError, match=r"rank must be an int in 1 \.\. 4"):
        ft.joint_pca(moments_of(cov, g), 5)
    with pytest.raises(ValueError, match="hold no gradients"):
        ft.joint_pca(moments_of(cov, g)._replace(grad_second=None), 2)
