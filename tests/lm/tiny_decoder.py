"""A small model, text that it would write itself, and plain arithmetic to judge by."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.models.decoder import SITES, Decoder, llama
from toyfeat.tap import from_linen, readouts, tap

CONFIG = llama(vocab=7, layers=3, dim=8, heads=2, kv_heads=1, hidden=10, context=32)
LENGTH = 7
ALL = tuple(f"blocks_{i}/{name}" for i in range(3) for name in SITES)


@functools.cache
def whole():
    return from_linen(Decoder(CONFIG))


@functools.cache
def weights():
    tokens = np.zeros((1, 2), np.int32)
    params = Decoder(CONFIG).init(jax.random.key(3), tokens)
    return jax.tree.map(lambda x: np.float32(1.5) * np.asarray(x), params)


@functools.cache
def windows(num=6):
    """Every token is what the model finds likeliest, so that damage costs it."""
    run = jax.jit(partial(Decoder(CONFIG).apply, weights()))
    tokens = np.zeros((num, LENGTH), np.int32)
    tokens[:, 0] = np.arange(num) % CONFIG.vocab
    for t in range(1, LENGTH):
        tokens[:, t] = np.asarray(run(tokens))[:, t - 1].argmax(axis=1)
    return tokens


@functools.cache
def tapped():
    """Everything about every site of these windows, as ``tap`` has it."""

    @jax.jit
    def run(params, tokens):
        readout = readouts.next_token_loss(tokens)
        return tap(whole(), params, tokens, sites=ALL, readout=readout)

    taps = run(weights(), windows())
    return jax.tree.map(np.asarray, taps)


@jax.jit
def _run_with(params, tokens, values, given):
    """With values at the sites where ``given``: one program for all sites."""
    probes = {
        site: lambda act, site=site: jnp.where(given[site], values[site], act)
        for site in ALL
    }
    return whole()(params, tokens, probes)[0]


def logits_with(site, value, tokens):
    """Of the whole model, float64, with ``value [B, T, width]`` at a site."""
    rows, shape = len(tokens), windows().shape
    widths = {name: CONFIG.hidden if "hidden" in name else CONFIG.dim for name in ALL}
    values = {x: np.zeros((*shape, dim), np.float32) for x, dim in widths.items()}
    values[site][:rows] = value
    given = {name: np.bool_(name == site) for name in ALL}
    filled = np.resize(tokens, shape)
    logits = _run_with(weights(), filled, values, given)
    return np.asarray(logits, np.float64)[:rows]


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cross_entropy(logits, tokens):
    """``[B, T - 1]``, of the next token."""
    picked = log_softmax(logits)[:, :-1]
    return -np.take_along_axis(picked, tokens[:, 1:, None], axis=2)[:, :, 0]


def top_codes(params, acts, k, *, rescale=True):
    """TopK codes in units of what they add, float64, one example after the other."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    units = np.linalg.norm(p["W_dec"], axis=1) if rescale else np.ones(len(p["W_dec"]))
    codes = np.zeros((len(acts), len(p["W_dec"])))
    for code, a in zip(codes, np.asarray(acts, np.float64), strict=True):
        pre = ((a - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * units
        kept = np.argsort(-pre)[:k]
        code[kept] = np.maximum(pre[kept], 0)
    writers = p["W_dec"] / units[:, None]
    return codes, writers, codes @ writers + p["b_dec"]
