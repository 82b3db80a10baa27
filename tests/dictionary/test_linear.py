import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft

D, N = 7, 400
RANK = 5  # of the activations


def taps(seed=0):
    """Activations of rank 5 off centre, and gradients in a plane of them."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(RANK, D)) * np.arange(1, 6)[:, None]
    acts = rng.normal(size=(N, RANK)) @ mixing + 3
    grads = rng.normal(size=(N, 2, 2)) @ mixing[:2]
    return ft.Taps(
        jnp.asarray(acts, jnp.float32), jnp.asarray(grads, jnp.float32), jnp.ones(N)
    )


def stats():
    acc = ft.moments(D)
    return acc.finish(acc.update(acc.init(), taps()))


BASES = {
    "pca": lambda: ft.pca(stats(), D),
    "gradient": lambda: ft.gradient_pca(stats(), 3),
    "joint": lambda: ft.joint_pca(stats(), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_codes_and_reconstructions_are_those_of_the_basis(name):
    basis = BASES[name]()
    sae, params = ft.dictionaries.from_basis(basis)
    assert (sae.config.d_in, sae.config.d_sae) == basis.readers.shape
    assert set(params) == {"W_enc", "W_dec", "b_dec"}
    acts = taps(1).acts
    codes = sae.encode(params, acts)
    mean, readers, writers = (np.asarray(x, np.float64) for x in basis[:3])
    want = (np.asarray(acts, np.float64) - mean) @ readers
    scale = np.abs(want).max()
    np.testing.assert_allclose(codes, want, atol=1e-5 * scale)
    real = np.asarray(basis.diagnostics.rank)
    assert np.all((codes < 0).any(0)[:real] & (codes > 0).any(0)[:real])
    assert not codes[:, real:].any()
    assert real < codes.shape[1] or name == "joint"
    out = sae.decode(params, codes)
    np.testing.assert_allclose(out, want @ writers + mean, atol=1e-4 * scale)
    np.testing.assert_array_equal(codes, ft.encode(basis, acts))
    np.testing.assert_array_equal(out, ft.decode(basis, codes))


def test_the_ways_to_run_it_agree():
    sae, params = ft.dictionaries.from_basis(BASES["joint"]())
    acts, grads, *_ = taps(1)
    codes = sae.encode(params, acts)
    np.testing.assert_array_equal(sae.encode(params, acts, grads=grads), codes)
    np.testing.assert_array_equal(sae.encode(params, acts, train=True, k=2), codes)
    out = sae.forward(params, acts, grads=grads)
    for mine in (out.codes, out.values, out.hidden_pre):
        np.testing.assert_array_equal(mine, codes)
    assert out.index is None
    np.testing.assert_array_equal(out.recon, sae.decode(params, codes))
    jitted = jax.jit(sae.encode)(params, acts)
    np.testing.assert_allclose(jitted, codes, rtol=1e-5, atol=1e-5)
    wide = jax.tree.map(lambda x: x.astype(jnp.float16), acts)
    assert sae.encode(params, wide).dtype == jnp.float32


@pytest.mark.slow
def test_all_of_the_variance_is_explained_at_full_rank():
    sae, params = ft.dictionaries.from_basis(ft.pca(stats(), RANK))
    acts = taps(1).acts
    out = sae.decode(params, sae.encode(params, acts))
    np.testing.assert_allclose(out, acts, atol=1e-3)


@pytest.mark.slow
def test_training_one_reaches_the_error_of_principal_components():
    sae, _ = ft.dictionaries.from_basis(ft.pca(stats(), 2))
    trainer = ft.trainer(sae, (ft.losses.reconstruction(),))
    state = trainer.init(jax.random.key(0), learning_rate=0.01)
    batch = taps()._replace(grads=None)
    step = lambda s, _: trainer.update(s, batch)  # noqa: E731
    state, told = jax.jit(lambda s: jax.lax.scan(step, s, None, 1500))(state)
    acts = np.asarray(batch.acts, np.float64)
    values = np.linalg.svd(acts - acts.mean(0), compute_uv=False) ** 2
    best = values[2:].sum() / values.sum()
    np.testing.assert_allclose(told["fvu"][-1], best, rtol=1e-2)
    np.testing.assert_allclose(told["l0"], 2, rtol=1e-6)
    assert not told["dead"].any()
    params = ft.denormalized(sae, state)
    out = sae.decode(params, sae.encode(params, batch.acts))
    fvu = np.sum((acts - np.asarray(out)) ** 2) / values.sum()
    np.testing.assert_allclose(fvu, best, rtol=2e-2)


def test_wrong_shapes_are_named():
    basis = BASES["joint"]()
    sae, params = ft.dictionaries.from_basis(basis)
    with pytest.raises(ValueError, match=r"encode: wanted acts \[N, 7\], got .*\(2, 6"):
        sae.encode(params, jnp.ones((2, 6)))
    with pytest.raises(
        ValueError, match=r"decode: wanted codes \[N, 4\], got .*\(7,\)"
    ):
        sae.decode(params, jnp.ones(7))
    many = jax.tree.map(lambda x: jnp.stack([x, x]), basis)
    with pytest.raises(ValueError, match=r"wanted mean \[D\].*got \(2, 7\), .*x\[0\]"):
        ft.dictionaries.from_basis(many)
    with pytest.raises(ValueError, match=r"writers \[R, D\], got .*\(7, 4\)"):
        ft.dictionaries.from_basis(basis._replace(writers=basis.readers))
