"""Models for tests of lenses: a decoder, and blocks in float64 written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as ft
from toyfeat import lens as lenses
from toyfeat.models.decoder import Decoder, llama

CONFIG = llama(vocab=17, layers=2, dim=8, heads=2, kv_heads=1, hidden=12)
SKIP = {"skip_first": 2, "skip_last": 1}


@functools.cache
def model():
    return lenses.from_decoder(CONFIG)


@functools.cache
def weights():
    params = Decoder(CONFIG).init(jax.random.key(0), windows(1))
    # Larger weights than those of the start make every block matter.
    return jax.tree.map(lambda x: np.asarray(x) * (1.0 if x.ndim == 1 else 2.0), params)


def windows(num=2, length=6, seed=1):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab, (num, length))


def norm(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def hand_written(params, tokens, tap):
    """Causal blocks in the dtype of the parameters."""
    resid = params["embed"][tokens]
    time = tokens.shape[1]
    allowed = jnp.tri(time, dtype=bool)[None]
    for i, block in enumerate(params["blocks"]):
        normed = norm(resid)
        scores = jnp.einsum("btd,de,bse->bts", normed, block["scores"], normed)
        pattern = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf))
        resid = resid + jnp.einsum("bts,bsd,de->bte", pattern, normed, block["value"])
        hidden = jax.nn.silu(norm(resid) @ block["up"])
        resid = tap(f"block_{i}", resid + hidden @ block["down"])
    return norm(resid) @ params["head"]


def hand_written_params(dtype=np.float64, blocks=3, dim=5, hidden=7, vocab=11):
    draw = np.random.default_rng(3).normal
    shapes = {
        "scores": (dim, dim),
        "value": (dim, dim),
        "up": (dim, hidden),
        "down": (hidden, dim),
    }
    return {
        "embed": draw(size=(vocab, dim)).astype(dtype),
        "blocks": [
            {n: (0.6 * draw(size=s)).astype(dtype) for n, s in shapes.items()}
            for _ in range(blocks)
        ],
        "head": draw(size=(dim, vocab)).astype(dtype),
    }


@functools.cache
def hand_written_model(blocks=3):
    return lenses.from_probed(
        ft.from_function(hand_written),
        sites=[f"block_{i}" for i in range(blocks)],
        unembed=lambda p, resid: norm(resid) @ p["head"],
        head=lambda p: p["head"],
    )
