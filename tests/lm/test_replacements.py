from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import top_codes

import toyfeat as ft
from toyfeat.lm.replacements import (
    Replacement,
    from_basis,
    from_dictionary,
    from_readers,
)

DIM, LATENTS, N = 5, 14, 9


@cache
def taps(seed=0, readouts=1, num=N):
    @jax.jit
    def drawn():
        keys = jax.random.split(jax.random.key(seed), 2)
        acts = jax.random.normal(keys[0], (num, DIM)) + 0.5
        return acts, 3 * jax.random.normal(keys[1], (num, readouts, DIM))

    return ft.Taps(*jax.device_get(drawn()), np.ones(num, np.float32))


@cache
def drawn_like(sae):
    """Parameters with everything in them: offsets, rows of all lengths, a threshold."""
    params = dict(sae.init(jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), 4)
    shape = params["W_dec"].shape
    lengths = jnp.geomspace(0.2, 5, len(params["W_dec"])).reshape(-1, 1)
    params["W_dec"] = jax.random.normal(keys[0], shape) * lengths
    params["W_enc"] = jax.random.normal(keys[1], params["W_enc"].shape)
    params["b_dec"] = jax.random.normal(keys[2], params["b_dec"].shape)
    if "b_enc" in params:
        params["b_enc"] = 0.3 * jax.random.normal(keys[3], params["b_enc"].shape)
    return jax.device_get(params)


def trained_like(sae):
    """A copy of the drawn parameters, to be changed."""
    return jax.tree.map(np.array, drawn_like(sae))


SPARSE = {
    "topk": ft.dictionaries.topk(DIM, LATENTS, 3),
    "plain rows": ft.dictionaries.topk(
        DIM, LATENTS, 3, rescale_acts_by_decoder_norm=False
    ),
    "signed": ft.dictionaries.topk(DIM, LATENTS, 3, signed=True),
    "gradient_topk": ft.dictionaries.gradient_topk(DIM, LATENTS, 3),
    "paired": ft.dictionaries.paired(DIM, LATENTS, 3),
}


@partial(jax.jit, static_argnums=0)
def coded(sae, params, given):
    codes = sae.encode(params, given.acts, grads=given.grads)
    return codes, sae.decode(params, codes)


@partial(jax.jit, static_argnums=0)
def decoded(sae, params, codes):
    return sae.decode(params, codes)


@partial(jax.jit, static_argnums=0)
def _replaced(rule, params, given):
    return Replacement(rule, LATENTS, None, params).replace(given)


RULES = {}


def replaced(method, given, kind=None):
    """What a method makes of taps, in numpy.

    Methods of one kind differ in their arrays alone, so that one rule serves them.
    """
    rule = method.rule if kind is None else RULES.setdefault(kind, method.rule)
    return jax.device_get(_replaced(rule, method.params, given))


def check(sae, params, method, given, most):
    """The dictionary itself, and its codes one by one, against what was made of it."""
    codes, recon = jax.device_get(coded(sae, params, given))
    found = replaced(method, given)
    np.testing.assert_allclose(found.recon, recon, atol=1e-5)
    assert found.parts.shape == (N, most, DIM)
    total = found.parts.sum(axis=1) + params["b_dec"]
    np.testing.assert_allclose(total, recon, atol=1e-5)
    writers = np.asarray(method.writers)
    assert method.latents == LATENTS
    for n in range(N):
        index = found.index[n]
        assert len(set(index.tolist())) == most
        alone = np.zeros((most + 1, LATENTS), np.float32)  # the last one has none
        alone[np.arange(most), index] = codes[n, index]
        lone = np.asarray(decoded(sae, params, alone), np.float64)
        np.testing.assert_allclose(found.parts[n], lone[:-1] - lone[-1], atol=1e-5)
        adds = codes[n] * np.abs(writers).max(axis=1)
        assert set(np.flatnonzero(adds)) <= set(index.tolist())
    apart = codes[:, :, None] * writers[None]
    apart = apart.sum(axis=1) + params["b_dec"]
    np.testing.assert_allclose(apart, recon, atol=1e-5)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("readouts", [1, 4])
def test_parts_are_what_the_codes_of_a_dictionary_add(name, readouts):
    sae = SPARSE[name]
    params, given = trained_like(sae), taps(readouts=readouts)
    found = check(sae, params, from_dictionary(sae, params), given, 3)
    if name in ("topk", "plain rows"):
        _, _, recon = top_codes(params, given.acts, 3, rescale=name == "topk")
        np.testing.assert_allclose(found.recon, recon, atol=1e-5)
    method = from_dictionary(sae, params)
    without = replaced(method, given._replace(grads=None)).recon
    chosen = name in ("gradient_topk", "paired")
    assert (np.abs(found.recon - without).max() > 1e-3) == chosen


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "sae",
    [
        ft.dictionaries.batch_topk(DIM, LATENTS, 2),
        ft.dictionaries.matryoshka(DIM, LATENTS, 2, widths=(4, LATENTS)),
        ft.dictionaries.jump_relu(DIM, LATENTS, threshold=0.5),
        ft.dictionaries.standard(DIM, LATENTS),
        ft.dictionaries.gated(DIM, LATENTS),
    ],
    ids=lambda sae: sae.config.architecture,
)
def test_all_codes_are_looked_at_where_max_latents_is_all(sae):
    params = trained_like(sae)
    if "topk_threshold" in params:
        params["topk_threshold"] = np.float32(2)
    method = from_dictionary(sae, params, max_latents=LATENTS)
    check(sae, params, method, taps(), LATENTS)
    with pytest.raises(
        ValueError, match=r"from_dictionary: .* has no k .*max_latents="
    ):
        from_dictionary(sae, params)


def test_max_latents_keeps_the_largest_effects_and_all_of_the_reconstruction():
    sae = ft.dictionaries.batch_topk(DIM, LATENTS, 2)
    params = trained_like(sae) | {"topk_threshold": np.float32(1)}
    given = taps()
    codes, recon = jax.device_get(coded(sae, params, given._replace(grads=None)))
    found = replaced(from_dictionary(sae, params, max_latents=2), given)
    np.testing.assert_allclose(found.recon, recon, atol=1e-5)
    sizes = np.sort(codes, axis=1)[:, ::-1][:, :2]  # of unit rows
    lengths = np.sort(np.linalg.norm(found.parts, axis=2), axis=1)[:, ::-1]
    np.testing.assert_allclose(lengths, sizes, rtol=1e-5, atol=1e-6)
    assert (codes > 0).sum(axis=1).max() > 2


@pytest.mark.parametrize("most", [0, -1, LATENTS + 1, 2.0])
def test_an_impossible_max_latents_is_refused(most):
    sae = SPARSE["topk"]
    with pytest.raises(
        ValueError, match=r"from_dictionary: max_latents must be .* 1 \.\. 14"
    ):
        from_dictionary(sae, trained_like(sae), max_latents=most)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_parts_of_rows_of_any_size(scale):
    sae = SPARSE["topk"]
    params = trained_like(sae)
    given = taps()
    scaled = params | {
        "W_dec": scale * params["W_dec"],
        "W_enc": params["W_enc"] / scale,
        "b_enc": params["b_enc"] / scale,
    }
    scaled = {name: np.asarray(x, "f4") for name, x in scaled.items()}
    found = replaced(from_dictionary(sae, scaled), given, "topk")
    total = found.parts.sum(axis=1) + params["b_dec"]
    np.testing.assert_allclose(total, found.recon, atol=1e-5)
    plain = replaced(from_dictionary(sae, params), given, "topk")
    np.testing.assert_allclose(found.parts, plain.parts, rtol=1e-3, atol=1e-5)


def test_a_zero_row_adds_nothing():
    sae = SPARSE["topk"]
    params = trained_like(sae)
    params["W_dec"][::2] = 0
    check(sae, params, from_dictionary(sae, params), taps(), 3)


def moments_of(given):
    return jax.device_get(_moments_of(given))


@jax.jit
def _moments_of(given):
    acc = ft.moments(DIM)
    return acc.finish(acc.update(acc.init(), given))


@partial(jax.jit, static_argnums=0)
def basis_of(kind, stats):
    return kind(stats, DIM)


@pytest.mark.slow_cases
@pytest.mark.parametrize("rank", [1, 3, DIM])
@pytest.mark.parametrize("kind", [ft.pca, ft.gradient_pca, ft.joint_pca])
def test_a_basis_is_its_first_directions(kind, rank):
    stats, given = moments_of(taps(7, num=40)), taps()
    basis = basis_of(kind, stats)
    method = from_basis(basis, rank)
    found = replaced(method, given)
    mean = np.asarray(basis.mean, np.float64)
    readers = np.asarray(basis.readers, np.float64)[:, :rank]
    writers = np.asarray(basis.writers, np.float64)[:rank]
    codes = (np.asarray(given.acts, np.float64) - mean) @ readers
    np.testing.assert_allclose(found.recon, codes @ writers + mean, atol=1e-4)
    np.testing.assert_allclose(found.parts, codes[:, :, None] * writers, atol=1e-4)
    assert found.index.tolist() == [list(range(rank))] * N
    assert (method.latents, method.writers.shape) == (rank, (rank, DIM))
    if rank == DIM:
        np.testing.assert_allclose(found.recon, given.acts, atol=1e-4)


@pytest.mark.parametrize("rank", [0, DIM + 1])
def test_a_rank_that_a_basis_does_not_have_is_refused(rank):
    basis = basis_of(ft.pca, moments_of(taps(7, num=40)))
    with pytest.raises(ValueError, match=rf"from_basis: .* 1 \.\. {DIM}, got {rank}"):
        from_basis(basis, rank)


def from_readers_numpy(params, given, k, mean, cov):
    """One token after the other, by the formula."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    rows = p["W_dec"] / np.linalg.norm(p["W_dec"], axis=1, keepdims=True)
    units = np.linalg.norm(p["W_dec"], axis=1)
    recons, parts = [], []
    for a, g in zip(
        np.asarray(given.acts, float), np.asarray(given.grads[:, 0], float), strict=True
    ):
        score = ((g - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * units
        kept = np.argsort(-np.abs(score), kind="stable")[:k]
        kept = kept[score[kept] != 0]
        readers = rows[kept].T
        inverse = np.linalg.pinv(readers.T @ cov @ readers, rcond=1e-5)
        columns = cov @ readers @ inverse
        recons.append(mean + columns @ (readers.T @ (a - mean)))
        whole = np.zeros((LATENTS, DIM))
        for j, latent in enumerate(kept):
            whole[latent] += columns[:, j] * (readers[:, j] @ (a - mean))
        parts.append(whole)
    return np.stack(recons), np.stack(parts)


def by_latent(found):
    whole = np.zeros((N, LATENTS, DIM))
    for n in range(N):
        for part, latent in zip(found.parts[n], found.index[n], strict=True):
            whole[n, latent] += part
    return whole


@pytest.mark.slow_cases
@pytest.mark.parametrize("k", [1, 3, DIM, 8])
@pytest.mark.parametrize("case", ["plain", "zero codes", "duplicates", "all zero"])
def test_readers_give_the_best_linear_guess(k, case):
    sae = ft.dictionaries.topk(DIM, LATENTS, k, signed=True)
    params, given = trained_like(sae), taps(readouts=2)
    if case == "zero codes":  # two latents see anything
        params["W_enc"][:, 2:] = 0
        params["b_enc"][2:] = 0
    if case == "all zero":
        params["W_enc"][:] = params["b_enc"][:] = 0
    if case == "duplicates":
        params["W_dec"][7:] = -params["W_dec"][:7]
        params["W_enc"][:, 7:] = params["W_enc"][:, :7]
        params["b_enc"][:] = 0
    stats = moments_of(taps(7, num=60))
    mean = np.asarray(stats.mean, np.float64)
    cov = np.asarray(stats.scatter, np.float64) / float(stats.weight)
    method = from_readers(sae, params, stats.mean, cov.astype("f4"))
    found = replaced(method, given, ("readers", k))
    recon, parts = from_readers_numpy(params, given, k, mean, cov)
    np.testing.assert_allclose(found.recon, recon, atol=1e-3)
    total = found.parts.sum(axis=1) + stats.mean
    np.testing.assert_allclose(total, found.recon, atol=1e-3)
    assert (method.latents, method.writers) == (LATENTS, None)
    if case in ("plain", "zero codes") and k <= DIM:  # else shares are not unique
        np.testing.assert_allclose(by_latent(found), parts, atol=1e-3)
    there = (np.abs(found.parts).max(axis=2) > 0).sum(axis=1)
    most = {"plain": k, "duplicates": k, "zero codes": min(k, 2), "all zero": 0}[case]
    assert there.tolist() == [most] * N
    if case == "all zero":
        np.testing.assert_array_equal(found.recon, np.tile(stats.mean, (N, 1)))


def test_what_the_readers_read_is_kept():
    sae = ft.dictionaries.topk(DIM, LATENTS, 3, signed=True)
    params, given = trained_like(sae), taps()
    stats = moments_of(taps(7, num=60))
    cov = stats.scatter / stats.weight
    method = from_readers(sae, params, stats.mean, cov)
    found = replaced(method, given, ("readers", 3))
    other = given._replace(acts=given.grads[:, 0], grads=None)
    codes = jax.device_get(coded(sae, params, other))[0]
    for n in range(N):
        readers = params["W_dec"][codes[n] != 0]
        left = readers @ (given.acts[n] - found.recon[n])
        np.testing.assert_allclose(left, 0, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_readers_of_activations_of_any_size(scale):
    sae = ft.dictionaries.topk(DIM, LATENTS, 3, signed=True)
    params, given = trained_like(sae), taps()
    stats = moments_of(taps(7, num=60))
    cov = stats.scatter / stats.weight
    method = from_readers(sae, params, stats.mean, cov)
    plain = replaced(method, given, ("readers", 3))
    scale = np.float32(scale)
    method = from_readers(sae, params, scale * stats.mean, scale * (scale * cov))
    given = given._replace(acts=scale * given.acts)
    found = replaced(method, given, ("readers", 3))
    np.testing.assert_allclose(found.recon / scale, plain.recon, atol=1e-4)


def test_readers_want_k_codes_and_gradients():
    sae = ft.dictionaries.standard(DIM, LATENTS)
    params = drawn_like(sae)
    with pytest.raises(ValueError, match="from_readers: wanted a dictionary with k"):
        from_readers(sae, params, np.zeros(DIM, "f4"), np.eye(DIM, dtype="f4"))


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["gradient_topk", "paired"])
def test_latents_can_be_chosen_by_another_gradient(name):
    sae = SPARSE[name]
    params, given = trained_like(sae), taps(readouts=3)
    for gradient_index in range(3):
        other = given._replace(
            grads=given.grads[:, gradient_index : gradient_index + 1]
        )
        wanted = replaced(from_dictionary(sae, params), other, name)
        method = from_dictionary(sae, params, gradient_index=gradient_index)
        found = replaced(method, given)
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_supports_can_be_chosen_by_another_gradient():
    sae = SPARSE["signed"]
    params, given = trained_like(sae), taps(readouts=2)
    args = sae, params, np.full(DIM, 0.5, "f4"), np.eye(DIM, dtype="f4")
    other = given._replace(grads=given.grads[:, 1:])
    found = replaced(from_readers(*args, gradient_index=1), given)
    wanted = replaced(from_readers(*args), other, ("readers", 3))
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    first = replaced(from_readers(*args), given, ("readers", 3))
    assert np.abs(first.recon - found.recon).max() > 1e-3
