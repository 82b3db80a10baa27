"""Estimators of the mean Jacobian and its second moment, against jax.jacrev."""

import functools

import jax
import numpy as np
import pytest
from tiny_lens_model import (
    SKIP,
    hand_written_model,
    hand_written_params,
    model,
    weights,
    windows,
)

import toyfeat as ft
from toyfeat import lens as lenses

DIM = 5


def estimate(make, small, dim, batches, params, key=None, **options):
    """Fit with one compiled update; batches are ``(inputs, mask)``."""
    acc = make(small, dim, key=key, **{**SKIP, **options})
    update = jax.jit(acc.update)
    state = acc.init()
    for inputs, mask in batches:
        state = update(state, params, inputs, mask)
    return jax.jit(acc.finish)(state)


@functools.cache
def full_jacobian(small, site):
    """``(params, tokens [T]) -> [T', D, T, D]``, compiled once for all prompts."""

    @jax.jit
    def full(params, tokens):
        act = small.probed(params, tokens[None], {})[1][site][0]

        def run(resid):
            final = small.sites[-1]
            return small.run(params, tokens[None], resid[None], site, final)[0]

        return jax.jacrev(run)(act)

    return full


def position_jacobians(small, params, tokens, site, first=2, last=1):
    """``[valid, D, D]`` of one prompt by jacrev, from the definition alone."""
    full = np.asarray(full_jacobian(small, site)(params, tokens))
    valid = slice(first, len(tokens) - last)
    return full[valid][:, :, valid].sum(0).transpose(1, 0, 2)


@functools.cache
def oracle():
    """``{site: [prompt][valid, D, D]}`` in float64, of the model written by hand."""
    with jax.enable_x64(True):
        small, params = hand_written_model(), hand_written_params()
        return {
            site: [
                position_jacobians(small, params, tokens, site)
                for tokens in tokens_of_hand_written()
            ]
            for site in small.sites[:-1]
        }


def tokens_of_hand_written(num=4):
    return windows(num) % 11


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "options",
    [{"chunk": 5}, {"chunk": 2}, {"chain": True, "chunk": 3}],
    ids=["one vmap", "chunks", "chain"],
)
def test_exact_estimators_agree_with_jacrev_in_float64(options):
    tokens = tokens_of_hand_written()
    batches = [(tokens[:2], None), (tokens[2:], None)]
    with jax.enable_x64(True):
        small, params = hand_written_model(), hand_written_params()
        mean = estimate(lenses.mean_jacobian, small, DIM, batches, params, **options)
        second = estimate(lenses.second_moment, small, DIM, batches, params, **options)
    for site, prompts in oracle().items():
        wanted = np.mean([p.mean(0) for p in prompts], axis=0)
        assert mean.matrices[site].dtype == np.float64
        np.testing.assert_allclose(mean.matrices[site], wanted, rtol=0, atol=1e-9)
        wanted = np.mean(
            [np.einsum("tij,tik->jk", p, p) / len(p) for p in prompts], axis=0
        )
        np.testing.assert_allclose(second.matrices[site], wanted, rtol=0, atol=1e-9)


def test_a_decoder_agrees_with_jacrev():
    tokens = windows()
    fitted = estimate(
        lenses.mean_jacobian, model(), 8, [(tokens, None)], weights(), chunk=8
    )
    site = model().sites[0]
    jacobians = [position_jacobians(model(), weights(), t, site) for t in tokens]
    wanted = np.mean([p.mean(0) for p in jacobians], axis=0)
    np.testing.assert_allclose(fitted.matrices[site], wanted, atol=1e-5)
    assert np.linalg.norm(wanted - np.eye(8)) > 0.5


def test_errors_are_the_jackknife_s_and_halves_alternate():
    tokens = tokens_of_hand_written()
    with jax.enable_x64(True):
        fitted = estimate(
            lenses.mean_jacobian,
            hand_written_model(),
            DIM,
            [(tokens, None)],
            hand_written_params(),
        )
    for site, prompts in oracle().items():
        means = np.stack([p.mean(0) for p in prompts])
        num = len(means)
        left_out = np.stack([np.delete(means, i, 0).mean(0) for i in range(num)])
        spread = ((left_out - left_out.mean(0)) ** 2).sum()
        error = np.sqrt((num - 1) / num * spread)
        np.testing.assert_allclose(fitted.standard_error[site], error, rtol=1e-9)
        relative = error / np.linalg.norm(means.mean(0))
        np.testing.assert_allclose(fitted.relative_error[site], relative, rtol=1e-9)
        even, odd = means[::2].mean(0).ravel(), means[1::2].mean(0).ravel()
        cosine = even @ odd / np.linalg.norm(even) / np.linalg.norm(odd)
        np.testing.assert_allclose(fitted.refit_cosine[site], cosine, rtol=1e-9)
    assert fitted.prompts == 4


def test_the_error_of_one_prompt_is_unknown():
    batch = [(windows(1) % 11, None)]
    fitted = estimate(
        lenses.mean_jacobian, small32(), DIM, batch, hand_written_params(np.float32)
    )
    assert all(np.isnan(x) for x in fitted.standard_error.values())


def small32():
    return hand_written_model()


def test_shards_merge_and_empty_prompts_count_nothing():
    small, params = small32(), hand_written_params(np.float32)
    tokens = tokens_of_hand_written()
    acc = lenses.mean_jacobian(small, DIM, **SKIP)
    update = jax.jit(acc.update)
    ones = np.ones_like(tokens)
    finish = jax.jit(acc.finish)
    whole = finish(update(acc.init(), params, tokens, ones))
    # The second shard has two rows without any token.
    mask = ones.copy()
    mask[2:] = 0
    left = update(acc.init(), params, tokens, mask)
    right = update(acc.init(), params, tokens[[2, 3, 0, 0]], mask)
    merged = finish(jax.jit(acc.merge)(acc.merge(acc.init(), left), right))
    assert merged.prompts == whole.prompts == 4
    for name in ("matrices", "standard_error", "refit_cosine"):
        for site in small.sites[:-1]:
            np.testing.assert_allclose(
                getattr(merged, name)[site], getattr(whole, name)[site], rtol=2e-4
            )


def test_padding_changes_nothing():
    tokens, mask = windows(2, 8), np.ones((2, 8), int)
    mask[:, :2] = 0
    fitted = estimate(
        lenses.mean_jacobian, model(), 8, [((tokens, mask), mask)], weights()
    )
    alone = estimate(
        lenses.mean_jacobian, model(), 8, [(tokens[:, 2:], None)], weights()
    )
    for site in model().sites[:-1]:
        np.testing.assert_allclose(
            fitted.matrices[site], alone.matrices[site], atol=1e-5
        )


def test_a_prompt_that_is_left_out_may_hold_anything():
    means = lenses.averages.empty_means(1, 1, 2)
    rows = np.stack([np.full((1, 2, 2), np.nan), np.ones((1, 2, 2))])
    zeros = np.zeros(2, int)
    weights = np.array([[0.0], [1.0]])
    means = lenses.averages.add_prompts(means, rows, weights, zeros, zeros)
    np.testing.assert_array_equal(means.mean[0, 0, 0], np.ones((2, 2)))
    assert means.scatter[0] == 0


@pytest.mark.slow_cases
@pytest.mark.parametrize("make", [lenses.mean_jacobian, lenses.second_moment])
def test_random_cotangents_are_unbiased_over_keys(make):
    """The mean over keys comes to the exact one as fast as its own scatter says."""
    small, params = small32(), hand_written_params(np.float32)
    tokens = tokens_of_hand_written(2)[:1]
    exact = estimate(make, small, DIM, [(tokens, None)], params)

    @jax.jit
    @jax.vmap
    def draw(key):
        acc = make(small, DIM, cotangents=1, key=key, **SKIP)
        return acc.finish(acc.update(acc.init(), params, tokens)).matrices

    draws = draw(jax.random.split(jax.random.key(0), 2000))
    for site, matrices in draws.items():
        wanted = np.asarray(exact.matrices[site])
        noise = np.asarray(matrices).std(0) / np.sqrt(2000)
        off = np.abs(np.mean(matrices, axis=0) - wanted)
        assert (off < 5 * noise).all()
        # An estimate that is not scaled up would be told from the exact one.
        unscaled = matrices.mean(0) / DIM
        if make is lenses.mean_jacobian:
            unscaled = unscaled + (1 - 1 / DIM) * np.eye(DIM)
        assert (np.abs(unscaled - wanted) > 5 * noise).any()


@pytest.mark.slow_cases
@pytest.mark.parametrize("cotangents", [1, 5])
def test_a_turn_of_random_cotangents_sees_every_direction(cotangents):
    """Prompts that are all alike give the exact Jacobian once the basis is through."""
    small, params = small32(), hand_written_params(np.float32)
    tokens = np.repeat(tokens_of_hand_written(1), 10, axis=0)
    exact = estimate(lenses.mean_jacobian, small, DIM, [(tokens[:1], None)], params)
    fitted = estimate(
        lenses.mean_jacobian,
        small,
        DIM,
        [(tokens, None)],
        params,
        key=jax.random.key(3),
        cotangents=cotangents,
    )
    for site in small.sites[:-1]:
        np.testing.assert_allclose(
            fitted.matrices[site], exact.matrices[site], atol=1e-4
        )
        np.testing.assert_allclose(fitted.refit_cosine[site], 1, atol=1e-5)
        assert fitted.relative_error[site] < 1e-3 or cotangents == 1


def test_clusters_average_to_the_mean():
    small, params = small32(), hand_written_params(np.float32)
    tokens = tokens_of_hand_written()
    acts = jax.jit(small.probed)(params, tokens, {})[1]
    centres = {
        site: ft.lenses.cluster_centres(
            jax.random.key(0), acts[site].reshape(-1, DIM), 3
        )
        for site in small.sites[:-1]
    }
    acc = lenses.mean_jacobian(small, DIM, centres=centres, **SKIP)
    state = jax.jit(acc.update)(acc.init(), params, tokens)
    fitted = jax.jit(acc.finish)(state)
    exact = estimate(lenses.mean_jacobian, small, DIM, [(tokens, None)], params)
    for site, means in state.means.items():
        share = np.asarray(means.weight).sum((0, 2)) / 4
        np.testing.assert_allclose(share.sum(), 1, rtol=1e-5)
        mixed = np.einsum("e,eij->ij", share, fitted.matrices[site])
        np.testing.assert_allclose(mixed, exact.matrices[site], atol=1e-4)
        # Each by jacrev, of the positions that are nearest to its centre.
        label = np.asarray(lenses.clusters.nearest(acts[site], centres[site]))
        label = label[:, 2:-1].reshape(-1, 3)
        jacobians = np.concatenate(oracle()[site])
        for expert in range(3):
            members = jacobians[label[:, expert] == 1]
            if len(members):
                np.testing.assert_allclose(
                    fitted.matrices[site][expert], members.mean(0), atol=1e-4
                )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"dim": 0}, ValueError, "dim must be an int of at least 1"),
        ({"skip_first": -1}, ValueError, "skip_first must be an int of at least 0"),
        ({"chunk": 0}, ValueError, "chunk must be"),
        ({"chain": 1}, TypeError, "chain must be True or False"),
        ({"cotangents": 3}, ValueError, "must divide the width 5.*got 3; pass a div"),
        ({"cotangents": 6}, ValueError, r"in 1 \.\. 5, got 6"),
        ({"cotangents": 1}, TypeError, "key must be one random key, got None"),
        ({"centres": {}}, ValueError, r"centres must have \[E, 5\] for each of"),
        ({"centres": {"block_0": np.ones((2, 5))}}, ValueError, "cluster_centres"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, error, match):
    options = {"dim": DIM, **options}
    with pytest.raises(error, match=f"mean_jacobian: .*{match}"):
        lenses.mean_jacobian(small32(), **options)


def test_batches_that_do_not_fit_are_refused():
    small, params = small32(), hand_written_params(np.float32)
    tokens = tokens_of_hand_written()
    with pytest.raises(TypeError, match="model must be a LensModel, got function"):
        lenses.mean_jacobian(small.probed, DIM)
    acc = lenses.mean_jacobian(small, DIM)
    with pytest.raises(ValueError, match=r"longer than the 17 positions.*got 6 tokens"):
        acc.update(acc.init(), params, tokens)
    acc = lenses.mean_jacobian(small, DIM, **SKIP)
    with pytest.raises(
        ValueError, match=r"mask must have shape \(4, 6\), got \(4, 5\)"
    ):
        acc.update(acc.init(), params, tokens, np.ones((4, 5)))
    acc = lenses.mean_jacobian(small, 4, **SKIP)
    with pytest.raises(ValueError, match=r"width 4 of the accumulator, got 5; pass"):
        acc.update(acc.init(), params, tokens)
