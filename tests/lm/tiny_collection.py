"""A model of tokens that compiles at once, and collecting from it."""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as ft
from toyfeat.lm.collect import collect, make_readout

LENGTH, VOCAB = 7, 5
SITES = ("first/a", "b")


def _model(params, tokens, tap):
    act = tap("first/a", params["embed"][tokens])  # [B, T, 3]
    seen = jnp.cumsum(act, axis=1)
    act = tap("b", jnp.tanh(seen @ params["mix"]))  # [B, T, 4]
    return act @ params["head"]


PROBED = ft.from_function(_model)
LOSS = make_readout("loss")  # one, so that what it is part of is compiled once


def params_of(seed=0):
    shapes = {"embed": (VOCAB, 3), "mix": (3, 4), "head": (4, VOCAB)}
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


def tokens_of(num=7, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (num, LENGTH))


def collected(folder, **changes):
    """7 windows, two at a time, in shards that end inside of windows."""
    given = {
        "params": params_of(),
        "tokens": tokens_of(),
        "sites": SITES,
        "readout": LOSS,
        "batch": 2,
        "rows_per_shard": 10,
        "metadata": {"weights": "those"},
    } | changes
    args = (given.pop(name) for name in ("params", "tokens", "sites"))
    return collect(PROBED, *args, folder, **given)


def _kill_at(done):
    def report(now, total):
        del total
        if now >= done:
            os.kill(os.getpid(), signal.SIGKILL)

    return report


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    collected(sys.argv[1], report=_kill_at(int(sys.argv[2])))
