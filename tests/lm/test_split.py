import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, logits_with, weights, whole, windows

from toyfeat.lm.split import split_at
from toyfeat.models.decoder import SITES, Decoder, gpt2, neox
from toyfeat.tap import from_linen


@functools.cache
def plain():
    run = jax.jit(lambda p, tokens: whole()(p, tokens, {}))
    return jax.device_get(run(weights(), windows()[:2]))


@functools.cache
def split_of(site):
    """Split, with what it runs compiled."""
    split = split_at(CONFIG, site)
    run, run_with_cache = jax.jit(split.run), jax.jit(split.run_with_cache)
    return split._replace(run=run, run_with_cache=run_with_cache)


@pytest.mark.slow
@pytest.mark.parametrize("layer", range(CONFIG.layers))
@pytest.mark.parametrize("name", SITES)
def test_run_is_the_model_behind_the_site(name, layer):
    site, tokens = f"blocks_{layer}/{name}", windows()[:2]
    split = split_of(site)
    assert split.site == site
    assert split.entry == (site if "resid" in name else f"blocks_{layer}/resid_pre")
    logits, acts = plain()
    found = split.run(weights(), acts[split.entry], acts[site])
    np.testing.assert_allclose(found, logits, atol=1e-5)
    rng = np.random.default_rng(layer)
    value = acts[site] + rng.normal(size=acts[site].shape).astype(np.float32)
    found = split.run(weights(), acts[split.entry], value)
    wanted = logits_with(site, value, tokens)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(wanted - logits).max() > 0.1


@pytest.mark.slow_cases
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", SITES)
def test_run_behind_cached_positions_is_the_rest_of_the_window(name, layer):
    site, tokens, num = f"blocks_{layer}/{name}", windows()[:2], 3
    split = split_of(site)
    _, acts = plain()
    value = acts[site].copy()
    value[:, num:] *= -2
    wanted = logits_with(site, value, tokens)[:, num:]
    logits, past = split.run_with_cache(weights(), acts[split.entry], acts[site])
    np.testing.assert_allclose(logits, plain()[0], atol=1e-5)
    blocks = range(layer + (name == "resid_post"), CONFIG.layers)
    assert len(past) == 2 * len(blocks)
    past = {name: np.asarray(x)[:, :num] for name, x in past.items()}
    found = split.run(weights(), acts[split.entry][:, num:], value[:, num:], past=past)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


OTHER = ["resid_pre", "attn_out", "mlp_hidden"]


@functools.cache
def other(make):
    """Another decoder: its values, and logits where they are changed at a site."""
    more = {"context": 16} if make is gpt2 else {"rotary_share": 0.5}
    config = make(vocab=5, layers=2, dim=8, heads=2, hidden=12, **more)
    tokens = np.array([[0, 3, 1, 4], [2, 2, 1, 0]], np.int32)
    model = Decoder(config)
    params = model.init(jax.random.key(0), tokens)

    @jax.jit
    def run(params, scales, shifts):
        probes = {
            site: lambda act, site=site: scales[site] * act + shifts[site]
            for site in scales
        }
        return from_linen(model)(params, tokens, probes)

    plain = {f"blocks_1/{name}": np.float32(1) for name in OTHER}
    none = {site: np.float32(0) for site in plain}
    acts = run(params, plain, none)[1]
    changed = {
        site: run(params, plain | {site: np.float32(2)}, none | {site: np.float32(1)})
        for site in plain
    }
    return config, params, acts, {site: found[0] for site, found in changed.items()}


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, neox])
@pytest.mark.parametrize("name", OTHER)
def test_run_with_gpt2_and_neox_decoders(make, name):
    site = f"blocks_1/{name}"
    config, params, acts, wanted = jax.device_get(other(make))
    split = split_at(config, site)
    value = 2 * acts[site] + 1
    found = jax.jit(split.run)(params, acts[split.entry], value)
    np.testing.assert_allclose(found, wanted[site], atol=1e-5)


@pytest.mark.slow
def test_run_in_bfloat16_gives_float32_logits():
    site = "blocks_1/mlp_out"
    split = split_at(CONFIG, site, dtype=jnp.bfloat16)
    logits, acts = split.model(weights(), windows()[:2], {})
    found = split.run(weights(), acts[split.entry], acts[site])
    assert acts[site].dtype == jnp.bfloat16
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, logits)


@pytest.mark.parametrize(
    "site",
    [
        "blocks_3/resid_pre",
        "blocks_-1/resid_pre",
        "blocks_01/resid_pre",
        "blocks_٢/resid_pre",
        "blocks_1/resid",
        "blocks_1/attn/query",
        "blocks_1/resid_pre#1",
        "block_1/resid_pre",
        "embed",
        "",
    ],
)
def test_a_site_that_is_not_there_is_refused(site):
    with pytest.raises(ValueError, match=r"site: wanted 'blocks_<0 \.\. 2>/<name>'"):
        split_at(CONFIG, site)


@pytest.mark.slow_cases
@pytest.mark.parametrize("site", ["blocks_0/resid_post", "blocks_1/mlp_out"])
def test_run_alone_attends_to_the_clean_window(site):
    """One position at a time, with the keys and values of all overwritten by probes."""
    tokens = windows()[:2]
    split, (clean_logits, acts) = split_at(CONFIG, site), plain()
    rng = np.random.default_rng(0)
    value = acts[site] + rng.normal(size=acts[site].shape).astype(np.float32)
    found = jax.jit(split.run_alone)(weights(), acts[split.entry], value, acts[site])
    caches = {n: x for n, x in acts.items() if n.endswith(("attn/key", "attn/value"))}

    @jax.jit
    def run(value):
        probes = {name: lambda _, x=x: x for name, x in caches.items()}
        return whole()(weights(), tokens, {**probes, site: lambda _: value})[0]

    for t in (0, 3):
        at_t = acts[site].copy()
        at_t[:, t] = value[:, t]
        np.testing.assert_allclose(found[:, t], run(at_t)[:, t], atol=1e-4)
    assert np.abs(np.asarray(found) - clean_logits).max() > 0.1


def test_run_acts_has_the_later_streams():
    split, (_, acts) = split_of("blocks_0/resid_post"), plain()
    site = "blocks_0/resid_post"
    found = jax.jit(split.run_acts)(weights(), acts[site], acts[site])
    assert sorted(found) == ["blocks_1/resid_post", "blocks_2/resid_post"]
    for name, value in found.items():
        np.testing.assert_allclose(value, acts[name], atol=1e-5)
