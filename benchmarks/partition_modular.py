"""Decompose the MLP of a transformer that adds modulo 29, and compare parts with waves.

The weight that its ReLUs read by is split into parts, several coefficients at once.  A
part is *a wave* of frequency ``k`` as far as the variance of what it reads, over all
pairs of summands, lies at ``k``: in waves of one summand, or of both with the same
``k``.  The same share of random directions stands beside it.

    python benchmarks/partition_modular.py --json rows.jsonl
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row

import toyfeat as ft
from examples.modular import network
from examples.modular.training import train
from toyfeat import metrics, partition
from toyfeat.metrics.partition import ALIVE
from toyfeat.partition.sources import kl_divergence

MODULUS = 29
PGD_STEPS = 20, 320
WAVE = 0.9
"""Share of the variance at one frequency from which a part is a wave."""


@dataclass(frozen=True)
class ModularConfig(BenchmarkConfig):
    """Options of this benchmark."""

    coefficients: tuple[float, ...] = (1e-3, 1e-2)
    """Of the importances."""
    components: int = 64
    """Parts of the weight, which has 64 rows."""
    steps: int = 3000
    """Of the decomposition."""
    target_steps: int = 1500
    """Of the transformer's training."""
    batch: int = 128
    """Pairs per step."""


def wave_shares(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the best frequency of functions of two summands, and its share.

    Args:
      values: ``[n, n, C]``, a function of the summands for each part.

    Returns:
      ``[C]`` frequencies in 1 .. n // 2, and ``[C]`` shares of the variance at it.
    """
    n = len(values)
    power = np.abs(np.fft.fft2(values, axes=(0, 1))) ** 2
    power[0, 0] = 0  # the mean
    total = np.maximum(power.sum((0, 1)), 1e-30)
    shares = []
    for k in range(1, n // 2 + 1):
        rows = np.ix_([0, k, n - k], [0, k, n - k])
        shares.append(power[rows].sum((0, 1)) / total)
    table = np.array(shares)
    return 1 + table.argmax(0), table.max(0)


def _batch(pairs: np.ndarray, size: int, data: Any, step: jax.Array) -> ft.Taps:
    """Draw pairs; they travel as floats and are turned back into ints."""
    key = jax.random.fold_in(jax.random.wrap_key_data(data), step)
    rows = jax.random.randint(key, (size,), 0, len(pairs))
    acts = jnp.asarray(pairs, jnp.float32)[rows]
    return ft.Taps(acts, None, jnp.ones(size))


def _as_tokens(acts: jax.Array) -> jax.Array:
    return acts.astype(jnp.int32)


def _cross_entropy(logits: Any, labels: Any) -> float:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -float(chosen.mean())


def measure(config: ModularConfig) -> list[dict[str, Any]]:
    """Train the transformer, decompose its MLP, and score every coefficient."""
    task = network.Modular(modulus=MODULUS, d_model=64, heads=4, d_mlp=128)
    target = train(
        jax.random.key(0), task, fraction=1.0, steps=config.target_steps, batch=256
    )
    pairs, labels = network.pairs(task)
    accuracy = float(network.accuracy(target, pairs, labels))
    print(f"accuracy of the target {accuracy:.4f}", flush=True)
    model = ft.from_function(network.logits)
    split = partition.decompose_weights(
        model, target, "w_in", config.components, jnp.asarray(pairs[:4])
    )
    family = partition.importance.per_component(split)
    stacked = _decompose(config, split, family, target, np.asarray(pairs))
    size = {"steps": config.steps, "batch": config.batch, "parts": config.components}
    rows = []
    for member, coefficient in enumerate(config.coefficients):
        params = jax.tree.map(lambda x, m=member: x[m], stacked)
        judged = (split, family, target, params)
        figures = _score(judged, jnp.asarray(pairs), jnp.asarray(labels))
        about = {"coefficient": coefficient, "accuracy": accuracy}
        rows.append(row("modular 29", size, "stochastic", **about, **figures))
    return rows


def _decompose(
    config: ModularConfig, split: Any, family: Any, target: Any, pairs: np.ndarray
) -> Any:
    """Train parts at every coefficient at once; returns their stacked parameters."""
    terms = (
        partition.losses.importance(1e-3, p=1.0),
        partition.losses.stochastic(),
    )
    trainer = ft.population(
        partition.trainer(
            split,
            target,
            terms,
            family,
            steps=config.steps,
            schedule=partition.cosine(config.steps),
            distance=kl_divergence,
            inputs_from=_as_tokens,
        ),
        group=1,
    )
    keys = jax.random.split(jax.random.key(1), len(config.coefficients))
    state = ft.fit(
        trainer,
        trainer.init(keys, importance=jnp.array(config.coefficients)),
        ft.data.Batches(
            partial(_batch, pairs, config.batch),
            jax.random.key_data(jax.random.key(2)),
        ),
        steps=config.steps,
        chunk=max(1, config.steps // 20),
        progress=False,
    )
    return state.params


def _score(judged: Any, pairs: jax.Array, labels: jax.Array) -> dict[str, Any]:
    """Score one decomposition on all pairs."""
    split, family, target, params = judged
    outputs, reads = split.read(target, params["components"], pairs)
    lower = partition.importances(split, family, target, params, pairs)[1]["w_in"]
    alive = np.asarray(lower > ALIVE).any(0)
    figures: dict[str, Any] = {"l0": float(metrics.component_l0(lower))}
    figures |= {"alive": int(alive.sum()), "ce target": _cross_entropy(outputs, labels)}
    # Cross-entropy with masks at random, rounded, and with all parts alone.
    draw = jax.random.uniform(jax.random.key(3), (len(pairs), lower.shape[1] + 1))
    masks = {
        "stochastic": (lower + (1 - lower) * draw[:, :-1], draw[:, -1]),
        "rounded": ((lower > ALIVE).astype(lower.dtype), None),
        "unmasked": (jnp.ones_like(lower), None),
    }
    for kind, (mask, delta) in masks.items():
        deltas = None if delta is None else {"w_in": delta}
        own = split.masked(target, params["components"], pairs, {"w_in": mask}, deltas)
        figures[f"ce {kind}"] = _cross_entropy(own, labels)
    for steps in PGD_STEPS:
        errors = partition.reconstructions(
            jax.random.key(4),
            split,
            family,
            target,
            params,
            pairs,
            distance=kl_divergence,
            steps=steps,
        )
        figures[f"kl adversarial {steps}"] = float(errors["adversarial"])
        figures["kl stochastic"] = float(errors["stochastic"])
    inner, x = reads["w_in"].inner[:, alive], reads["w_in"].x
    return figures | _wave_figures(pairs, inner, x)


def _wave_figures(pairs: Any, inner: Any, x: Any) -> dict[str, Any]:
    """Compare what parts read with waves, and random directions of the same input."""
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    grid = (MODULUS, MODULUS, -1)
    x = np.asarray(x, np.float64)
    other = x @ np.random.default_rng(0).normal(size=(x.shape[1], 1000))
    _, chance = wave_shares(other[order].reshape(grid))
    figures: dict[str, Any] = {"wave share random": float(np.median(chance))}
    figures["waves random"] = float((chance >= WAVE).mean())
    if inner.shape[1]:
        rows = np.asarray(inner, np.float64)[order]
        frequencies, shares = wave_shares(rows.reshape(grid))
        figures["wave share"] = float(np.median(shares))
        figures["waves"] = float((shares >= WAVE).mean())
        found, counts = np.unique(frequencies[shares >= WAVE], return_counts=True)
        figures["parts of frequency"] = {
            str(k): int(n) for k, n in zip(found, counts, strict=True)
        }
        found, counts = np.unique(frequencies, return_counts=True)
        figures["best frequency of parts"] = {
            str(k): int(n) for k, n in zip(found, counts, strict=True)
        }
    return figures


if __name__ == "__main__":
    settings = parse_command(ModularConfig, __doc__)
    finish(measure(settings), [], settings.json)
