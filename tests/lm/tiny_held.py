"""A site of the small model on held-out text, and ways to describe it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny_decoder import CONFIG, weights, windows

import toyfeat as ft
from toyfeat.lm.replacements import Replaced, Replacement, from_dictionary
from toyfeat.lm.split import split_at, tap_held_out

SITES = "blocks_1/resid_post", "blocks_1/mlp_hidden", "blocks_0/attn_out"
LATENTS, K = 20, 3


@functools.cache
def held_at(site):
    width = CONFIG.hidden if site.endswith("hidden") else CONFIG.dim
    mean = np.float32(0.1) * np.arange(width, dtype=np.float32)
    split = split_at(CONFIG, site)
    return split, tap_held_out(split, weights(), windows(), mean, batch=2)


@functools.cache
def dictionary(width):
    sae = ft.dictionaries.topk(width, LATENTS, K)

    @jax.jit
    def drawn():
        params = dict(sae.init(jax.random.key(4)))
        keys = jax.random.split(jax.random.key(5), 2)
        rows = jax.random.normal(keys[0], params["W_dec"].shape)
        params |= {"W_dec": rows, "W_enc": 0.3 * rows.T / width**0.5}
        params["b_dec"] = 0.2 * jax.random.normal(keys[1], (width,))
        params["b_enc"] = params["b_enc"].at[-4:].set(-50)  # never there
        return params

    return sae, drawn()


@functools.cache
def described(width):
    """The dictionary as a method: one, so that it is compiled once."""
    return from_dictionary(*dictionary(width))


def replaced_by(value):
    """A method of one latent that puts a value in the place of every activation."""

    def rule(_, taps):
        recon = jnp.broadcast_to(value, taps.acts.shape) + 0 * taps.acts
        return Replaced(recon, recon[:, None], jnp.zeros((len(recon), 1), int))

    return Replacement(rule, 1, None)
