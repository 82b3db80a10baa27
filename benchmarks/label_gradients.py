"""Time gradients at sampled labels against their number, at SmolLM2's shape.

    python benchmarks/label_gradients.py
    python benchmarks/label_gradients.py --tiny

Random weights of 30 blocks of width 576 and 49,152 tokens, the site in the middle, four
windows of 64 tokens.  ``sampled`` pulls every draw back from the logits, ``labels`` and
``signs`` from the last hidden states (:mod:`toyfeat.lm.label_gradients`).  Processor
seconds of one call after one that compiles, and the ratio to the activations and logits
alone.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, parse_command

import toyfeat as ft
from toyfeat.lm.collect import make_readout, tap_windows
from toyfeat.models.decoder import Decoder, llama


@dataclass(frozen=True)
class Config(BenchmarkConfig):
    """Options."""

    draws: tuple[int, ...] = (1, 4, 8)
    kinds: tuple[str, ...] = ("sampled", "labels", "signs")


def main(config: Config) -> None:
    """Time every kind at every number of draws."""
    tiny: Any = {"vocab": 64, "layers": 4, "dim": 16, "heads": 2, "hidden": 24}
    sizes = llama(kv_heads=3, tied=True) if not config.tiny else llama(**tiny)
    model = Decoder(sizes)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, sizes.vocab, (4, 64)))
    # Drawn by hand, since a program of all initializers takes minutes to compile.
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens[:1, :2])
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.05 * rng.standard_normal(x.shape, np.float32)), shapes
    )
    probed, site = ft.from_linen(model), f"blocks_{sizes.layers // 2 - 1}/resid_post"

    def seconds(run: object) -> float:
        jax.block_until_ready(run())  # type: ignore[operator]
        start = time.process_time()
        jax.block_until_ready(run())  # type: ignore[operator]
        return time.process_time() - start

    forward = jax.jit(lambda params, tokens: probed(params, tokens, {})[0])
    base = seconds(partial(forward, params, tokens))
    rows = [{"case": "forward", "draws": 0, "seconds": base, "ratio": 1.0}]
    print(json.dumps(rows[0]), flush=True)
    for kind in config.kinds:
        for draws in config.draws:
            readout = make_readout(kind, draws=draws)
            run = partial(
                tap_windows, probed, (site,), readout, 10.0, params, tokens, 0
            )
            time_taken = seconds(run)
            row = {"case": kind, "draws": draws, "seconds": time_taken}
            rows.append(row | {"ratio": time_taken / base})
            print(json.dumps(rows[-1]), flush=True)
    if config.json:
        config.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(parse_command(Config, __doc__))
