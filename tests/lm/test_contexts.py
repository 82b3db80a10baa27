from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_collection import tokens_of

import toyfeat as ft
from toyfeat.data import store_writer
from toyfeat.data.store import open_store
from toyfeat.dictionary import latents
from toyfeat.lm import contexts
from toyfeat.lm.collect import read_chunks
from toyfeat.models.decoder import Decoder, Pretrained, gpt2, llama

NUM, LENGTH, VOCAB, DIM, LATENTS = 9, 7, 5, 4, 6
MEAN = np.full(DIM, 0.5, np.float32)


class Words:
    """A tokenizer that names tokens by letters."""

    def decode(self, ids):
        return "abcde"[ids[0]]


def model_of(config):
    tokens = np.zeros((1, 2), np.int32)
    params = Decoder(config).init(jax.random.key(0), tokens)
    return Pretrained("tiny", config, params, Words())


LLAMA = model_of(llama(vocab=VOCAB, layers=1, dim=DIM, heads=1, hidden=4))


@pytest.fixture(scope="module")
def taps():
    rng = np.random.default_rng(0)
    weights = np.ones((NUM, LENGTH), np.float32)
    weights[:, 0] = weights[:, -1] = 0
    acts = rng.normal(size=(NUM * LENGTH, DIM)).astype(np.float32)
    grads = rng.normal(size=(NUM * LENGTH, 1, DIM)).astype(np.float32)
    return ft.Taps(acts, grads, weights.reshape(-1))


@pytest.fixture(scope="module")
def store(taps, tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    with store_writer(path, dim=DIM, readouts=1, rows_per_shard=20) as writer:
        writer.append(taps)
    return open_store(path)


@cache
def dictionary(signed):
    sae = ft.dictionaries.topk(DIM, LATENTS, 2, signed=signed)
    params = jax.jit(sae.init)(jax.random.key(1))
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(LATENTS, DIM)) * rng.uniform(0.2, 3, (LATENTS, 1))
    return sae, params | {"W_dec": jnp.asarray(rows, jnp.float32)}


@partial(jax.jit, static_argnums=0)
def encoded(sae, params, source):
    return sae.encode(params, source)


def by_hand(taps, signed):
    """Codes and attributions in float64 of every token that counts."""
    sae, params = dictionary(signed)
    source = taps.grads[:, 0] if signed else taps.acts
    codes = np.asarray(encoded(sae, params, source), np.float64)
    rows = np.asarray(params["W_dec"], np.float64)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    other = taps.acts - 0.5 if signed else taps.grads[:, 0]
    effects = codes * (other @ units.T)
    there = taps.weights[:, None] > 0
    return np.where(there, codes, 0), np.where(there, effects, 0)


@pytest.mark.slow_cases
@pytest.mark.parametrize("signed", [False, True])
def test_latents_and_contexts_against_numpy(store, taps, signed):
    sae, params = dictionary(signed)
    view = latents.from_acts(sae, params)
    if signed:
        view = latents.from_grads(sae, params, MEAN, np.eye(DIM, dtype="f4"))
    tokens = tokens_of(NUM)
    found = contexts.find_contexts(
        view,
        partial(read_chunks, store),
        tokens,
        LLAMA,
        residual=True,
        num=4,
        contexts=3,
    )
    codes, effects = by_hand(taps, signed)
    sizes = np.abs(effects).sum(0) / taps.weights.sum()
    order = np.argsort(-sizes)[:4]
    assert [latent.index for latent in found] == order.tolist()
    for latent in found:
        code, effect = codes[:, latent.index], effects[:, latent.index]
        assert latent.effect == pytest.approx(sizes[latent.index], rel=1e-4)
        share = np.mean(code[taps.weights > 0] != 0)
        assert latent.frequency == pytest.approx(share)
        for shown, by in ((latent.activating, code), (latent.attributed, effect)):
            best = np.abs(by).reshape(NUM, LENGTH)
            windows = np.argsort(-best.max(1), kind="stable")
            windows = [w for w in windows if best[w].max() > 0][:3]
            assert len(shown) == len(windows)
            for one, window in zip(shown, windows, strict=True):
                at = int(best[window].argmax())
                assert one.at == at
                assert one.tokens == tuple("abcde"[t] for t in tokens[window])
                here = slice(window * LENGTH, (window + 1) * LENGTH)
                np.testing.assert_allclose(one.values, code[here], atol=1e-5)
                assert one.effect == pytest.approx(effect[here][at], abs=1e-4)


def test_attributions_of_gradients_sum_to_the_first_order_effect(taps):
    """``(g_hat - b_dec) . (a - mean)``, also for rows that have no unit length."""
    sae, params = dictionary(True)
    view = latents.from_grads(sae, params, MEAN, np.eye(DIM, dtype="f4"))
    _, effects = jax.device_get(jax.jit(view.rule)(view.arrays, taps))
    codes = encoded(sae, params, taps.grads[:, 0])
    recon = np.asarray(jax.jit(sae.decode)(params, codes))
    recon = recon - np.asarray(params["b_dec"])
    wanted = np.sum(recon * (taps.acts - 0.5), axis=1)
    np.testing.assert_allclose(effects.sum(1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("centred", [False, True])
def test_promoted_tokens_are_those_whose_logits_rise_to_first_order(centred):
    sizes = {"vocab": VOCAB, "layers": 1, "dim": DIM, "heads": 1}
    model = model_of(gpt2(**sizes)) if centred else LLAMA
    writers = np.random.default_rng(2).normal(size=(3, DIM))
    found = contexts._promoted(model.params, jnp.asarray(writers, jnp.float32))
    tree = model.params["params"]
    logits = tree["embed"]["embedding"].T if centred else tree["head"]
    scale = np.asarray(tree["final_norm"]["scale"], float)
    if centred:
        writers = writers - writers.mean(1, keepdims=True)
    wanted = (writers * scale) @ np.asarray(logits, float)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_taps_of_other_tokens_or_without_gradients_are_refused(store, taps):
    view = latents.from_acts(*dictionary(False))
    chunks = partial(read_chunks, store)
    with pytest.raises(ValueError, match=r"find_contexts: .* 56 .*, got 63"):
        contexts.find_contexts(view, chunks, tokens_of(8), LLAMA, residual=True)
    alone = [taps._replace(grads=None)]
    with pytest.raises(ValueError, match="find_contexts: wanted taps with gradients"):
        contexts.find_contexts(
            view, lambda: iter(alone), tokens_of(NUM), LLAMA, residual=True
        )
