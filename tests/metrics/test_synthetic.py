import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat import worlds
from toyfeat.metrics.synthetic import score_dictionary


@pytest.mark.slow_cases
@pytest.mark.parametrize("train", [False, True])
def test_scores_are_their_definitions(train):
    world = worlds.synth_sae_bench(jax.random.key(0), features=128, dim=16)
    sae = ft.dictionaries.batch_topk(16, 24, 3)
    params = sae.init(jax.random.key(1))
    params |= {"b_dec": world.bias, "topk_threshold": jnp.asarray(0.02)}
    acts, planted = worlds.world_batch(jax.random.key(2), world, 300)
    pairs = [(acts, planted)] if train else [(acts[:90], planted[:90])]
    pairs += [] if train else [(acts[90:], planted[90:])]
    got = score_dictionary(sae, params, world.feature_vectors, pairs, train=train)
    x = np.asarray(acts, np.float64)
    rows = np.asarray(params["W_dec"], np.float64)
    size = np.linalg.norm(rows, axis=1)
    pre = (x - np.asarray(world.bias)) @ np.asarray(params["W_enc"], np.float64)
    codes = np.maximum(pre, 0) * size
    cut = np.sort(codes.ravel())[-3 * 300] if train else 0.02
    codes = codes * (codes >= cut)
    rest = x - (codes / size) @ rows - np.asarray(world.bias)
    variance = np.sum((x - x.mean(0)) ** 2)
    assert got["ev"] == pytest.approx(1 - np.sum(rest**2) / variance, abs=1e-5)
    assert got["l0"] == pytest.approx(np.sum(codes > 0) / 300)
    assert got["dead"] == np.sum(~np.any(codes > 0, axis=0))
    assert got["mcc"] == ft.metrics.match_features(rows, world.feature_vectors).mcc
    assert got["uniqueness"] == ft.metrics.feature_uniqueness(
        rows, world.feature_vectors
    )
    same = ft.metrics.latent_classification(
        rows, world.feature_vectors, [(codes, planted)]
    )
    np.testing.assert_allclose([got[k] for k in same._fields], same, rtol=1e-6)
