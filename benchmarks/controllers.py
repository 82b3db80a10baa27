"""See whether sparsity controllers reach targets, with one setting for all runs.

    python benchmarks/controllers.py [--tiny] [--json PATH]

Standard, gated and JumpReLU dictionaries, targets of 4 to 64 codes per example, data
of three scales, two starts: 90 runs in which nothing else differs, gains and learning
rate included.  Activations are a world of 512 independent features in 128 dimensions,
9 of them at a time on average and of sizes 2 to 0.5, dictionaries have 256 latents.
JumpReLU starts as SynthSAEBench's do (threshold and bandwidth 1, rows of length .5).
A run lands if the codes per held-out example, averaged over ten states of the last
5 % of the steps, are within 5 % of the target; the bar is 95 % of the runs.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row

import toyfeat as ft
from toyfeat import worlds
from toyfeat.dictionary.types import Dictionary
from toyfeat.types import Array, Taps

ARCHITECTURES = {
    "standard": ft.dictionaries.standard,
    "gated": ft.dictionaries.gated,
    "jump_relu": partial(
        ft.dictionaries.jump_relu, threshold=1.0, bandwidth=1.0, decoder_norm=0.5
    ),
}
WITHIN, BAR = 0.05, 0.95


class Setting(NamedTuple):
    """Sizes and rates, the same for all runs."""

    dim: int = 128
    latents: int = 256
    features: int = 512
    targets: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0, 64.0)
    scales: tuple[float, ...] = (1e-3, 1.0, 1e3)
    seeds: int = 2
    steps: int = 5000
    batch: int = 128
    pool: int = 100_000
    held_out: int = 10_000
    looks: int = 10
    learning_rate: float = 1e-3
    warm_up: int = 500


TINY = Setting(
    dim=8,
    latents=16,
    features=16,
    targets=(2.0, 4.0),
    scales=(1e3,),
    seeds=1,
    steps=400,
    batch=64,
    pool=4096,
    held_out=1024,
    looks=2,
    learning_rate=1e-2,
    warm_up=50,
)


def sample_acts(setting: Setting) -> tuple[Array, Array]:
    """Sample activations to train on, and others of the same world."""
    world = worlds.synthetic_world(
        jax.random.key(0),
        setting.features,
        setting.dim,
        firing_probability=worlds.ZipfianFiring(0.5, 0.2, 0.01),
        mean_firing_magnitudes=worlds.ExponentialMagnitude(2.0, 0.5),
        std_firing_magnitudes=0.5,
    )
    acts = jax.jit(worlds.world_acts, static_argnums=2)
    pool = acts(jax.random.key(1), world, setting.pool)
    return pool, acts(jax.random.key(2), world, setting.held_out)


@partial(jax.jit, static_argnums=0)
def codes_per_example(dictionary: Dictionary, state: Any, acts: Array) -> Array:
    """Count codes per example of every member, ``[P]``."""

    def count(state: Any) -> Array:
        codes = dictionary.encode(ft.denormalized(dictionary, state), acts)
        return (codes != 0).sum(1).astype(jnp.float32).mean()

    return jax.lax.map(count, state)


def train_members(
    dictionary: Dictionary, pool: Array, held_out: Array, setting: Setting
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train a population, a member per target and seed.

    Returns:
      Targets, codes per held-out example and last factors of the controller.
    """
    objective = ft.losses.default(dictionary, dead_latents=0)
    control = ft.controllers.target_l0(8.0)
    options = {"controller": control, "warm_up": setting.warm_up}
    trainer = ft.population(ft.trainer(dictionary, objective, **options))
    # A member for every pair of a target and a seed, seeds slowest.
    targets = jnp.tile(jnp.asarray(setting.targets), setting.seeds)
    keys = jnp.repeat(
        jax.random.split(jax.random.key(3), setting.seeds), len(setting.targets)
    )
    state = trainer.init(keys, target=targets, learning_rate=setting.learning_rate)
    batches = ft.data.array_batches(
        Taps(pool, None, jnp.ones(len(pool))), batch=setting.batch, seed=0
    )
    # Train to the last twentieth of the steps, then count codes in looks over it.
    every = max(1, setting.steps // 20 // setting.looks)
    first = setting.steps - every * setting.looks
    state = ft.fit(trainer, state, batches, steps=first, chunk=every)
    counts = []
    for look in range(setting.looks):
        steps = first + (look + 1) * every
        state = ft.fit(trainer, state, batches, steps=steps, chunk=every)
        counts.append(codes_per_example(dictionary, state, held_out))
    # Counts are averaged: at one step they are off by the noise of a batch.
    factors = np.asarray(state.running["factor"])
    return np.asarray(targets), np.mean(counts, axis=0), factors


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Train all architectures on all scales; a row per run."""
    pool, held_out = sample_acts(setting)
    rows = []
    size = {"dim": setting.dim, "latents": setting.latents, "steps": setting.steps}
    for name, make in ARCHITECTURES.items():
        dictionary = make(setting.dim, setting.latents)
        for scale in setting.scales:
            start = time.perf_counter()
            targets, counts, factors = train_members(
                dictionary, scale * pool, scale * held_out, setting
            )
            seconds = (time.perf_counter() - start) / len(targets)
            for i, (target, count) in enumerate(zip(targets, counts, strict=True)):
                rows.append(
                    row(
                        "target_l0",
                        size,
                        name,
                        ours_s=seconds,
                        ratio=float(count / target),
                        error=float(abs(count / target - 1)),
                        target=float(target),
                        l0=float(count),
                        scale=scale,
                        seed=i // len(setting.targets),
                        factor=float(factors[i]),
                    )
                )
                print(
                    f"{name:<10} scale {scale:<6g} target {target:4.0f} "
                    f"reached {count:7.3f} ({count / target - 1:+.1%}), "
                    f"factor {factors[i]:.4g}",
                    flush=True,
                )
    return rows


def main() -> None:
    """Train all; print the share of runs near their targets, and the worst."""
    config = parse_command(BenchmarkConfig, __doc__)
    setting = TINY if config.tiny else Setting()
    rows = measure(setting)
    landed = [line["error"] <= WITHIN for line in rows]
    share = sum(landed) / len(rows)
    print(f"{sum(landed)} of {len(rows)} runs within {WITHIN:.0%} of their targets")
    for name in ARCHITECTURES:
        errors = [line["error"] for line in rows if line["method"] == name]
        inside = sum(error <= WITHIN for error in errors)
        print(f"{name:<10} {inside} of {len(errors)}, the worst {max(errors):.1%} off")
    for line in sorted(rows, key=lambda line: -line["error"])[:5]:
        print(
            f"worst: {line['method']}, scale {line['scale']:g}, seed {line['seed']}, "
            f"target {line['target']:g}, reached {line['l0']:.3f}"
        )
    missed = [f"{share:.1%} of the runs landed, the bar is {BAR:.0%}"]
    finish(rows, missed if share < BAR and not config.tiny else [], config.json)


if __name__ == "__main__":
    main()
