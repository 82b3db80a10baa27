"""Speed of dictionary training on one accelerator: precision, selection, populations.

    python benchmarks/accelerator.py [--tiny] [--json PATH] [--only precision]

- *precision*: a dense step (standard, 768 -> 16,384) in float32, TF32 and bfloat16
  products, as a share of the product of two matrices measured in the same precision;
- *cached*: TopK and BatchTopK with 24,576 latents and k = 32 on activations in memory,
  activations per second;
- *ways*: decoding k codes, with its gradients, by rows that are gathered and by the
  dense product with zeros, of which the library takes one or the other;
- *populations*: 1 to 4096 dictionaries of a toy model in one program, seeds per second
  against one alone.

Compile time is apart.  A precision that the device does not have is a row that says so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from harness import BenchmarkConfig, finish, medians, parse_command, program, row

import toyfeat as ft
from toyfeat.dictionary.gather import scatter
from toyfeat.train.chunks import run_chunk
from toyfeat.types import Array

PRECISIONS = {
    "float32": "highest",
    "TF32": "TF32_TF32_F32",
    "bfloat16": "BF16_BF16_F32",
}

# Bars on an accelerator; a CPU has none.
DENSE_SHARE = 0.5  # of the measured product in bfloat16
CACHED_RATE = 1e6  # activations per second
POPULATION_GAIN = 50.0  # times the seeds per second of one, at 256

# Products of a standard dictionary's step: two forward, and two backward of each, of
# batch x dim x latents multiplications and additions.
PRODUCTS = 6


@dataclass(frozen=True)
class AcceleratorConfig(BenchmarkConfig):
    """Options of this benchmark."""

    only: str | None = None
    """One part: precision, cached, ways or populations."""


class Size(NamedTuple):
    """Size of a training.

    Attributes:
      dim: of the activations.
      latents: of the dictionary.
      batch: activations per step.
      steps: of a compiled chunk.
    """

    dim: int
    latents: int
    batch: int
    steps: int


DENSE = Size(768, 16_384, 8192, 10), Size(16, 64, 32, 2)
CACHED = Size(768, 24_576, 8192, 10), Size(16, 64, 32, 2)
TOY = Size(16, 64, 256, 50), Size(8, 16, 16, 2)
MEMBERS = (1, 4, 16, 64, 256, 1024, 4096), (1, 2)
K = 32, 4  # codes of a row, of the true and of the tiny size


def main() -> None:
    """Measure every part."""
    config = parse_command(AcceleratorConfig, __doc__)
    parts = {"precision": precision, "cached": cached, "ways": ways}
    parts |= {"populations": populations}
    if config.only is not None and config.only not in parts:
        raise SystemExit(f"accelerator: --only is one of {[*parts]}, got {config.only}")
    rows, missed = [], []
    for name, part in parts.items():
        if config.only in (None, name):
            new, under = part(config.tiny)
            rows += new
            missed += under
    bars = jax.default_backend() != "cpu" and not config.tiny
    finish(rows, missed if bars else [], config.json)


def precision(tiny: bool) -> tuple[list[dict], list[str]]:
    """Time a dense step beside a product of matrices, in each precision."""
    size = DENSE[tiny]
    rows, missed = [], []
    for name, products in PRECISIONS.items():
        dense_row = partial(row, "dense step", size._asdict(), name)
        try:
            with jax.default_matmul_precision(products):
                peak = product_flops_per_s(size)
                sae = ft.dictionaries.standard(size.dim, size.latents)
                seconds, compile_s = step_seconds(sae, size)
        except Exception as error:  # whatever the device says
            if not is_unsupported(error):
                raise
            rows.append(dense_row(unsupported=str(error).splitlines()[0]))
            continue
        flops = PRODUCTS * 2 * size.batch * size.dim * size.latents
        share = flops / seconds / peak
        figures = {"step_s": seconds, "compile_s": compile_s, "peak_flops": peak}
        rows.append(dense_row(**figures, share_of_peak=share))
        if name == "bfloat16" and share < DENSE_SHARE:
            missed.append(f"dense step in bfloat16: {share:.2f} of the product's rate")
    return rows, missed


def is_unsupported(error: Exception) -> bool:
    """Tell whether a device says that it has no such precision."""
    return any(word in str(error).lower() for word in ("support", "unimplemented"))


def product_flops_per_s(size: Size) -> float:
    """Measure the rate of the step's own largest product, under the current precision.

    The precision is part of the traced program, so this is called inside its context.
    """
    acts = jax.random.normal(jax.random.key(0), (size.batch, size.dim))
    weights = jax.random.normal(jax.random.key(1), (size.dim, size.latents))
    taken = medians({"product": program(lambda a, w: a @ w, acts, weights).run})
    return 2 * size.batch * size.dim * size.latents / taken["product"]


def cached(tiny: bool) -> tuple[list[dict], list[str]]:
    """Time TopK and BatchTopK on activations in memory."""
    size, k = CACHED[tiny], K[tiny]
    rows, rates = [], {}
    for name in ("topk", "batch_topk"):
        sae = getattr(ft.dictionaries, name)(size.dim, size.latents, k)
        seconds, compile_s = step_seconds(sae, size)
        rates[name] = size.batch / seconds
        figures = {"step_s": seconds, "compile_s": compile_s}
        figures |= {"activations_per_s": rates[name]}
        rows.append(row("cached", size._asdict() | {"k": k}, name, **figures))
    best = max(rates.values())
    missed = [f"cached: {best:.3g} activations/s"] if best < CACHED_RATE else []
    return rows, missed


def ways(tiny: bool) -> tuple[list[dict], list[str]]:
    """Time both ways of decoding, with the gradients of codes and rows."""
    size, k = CACHED[tiny], K[tiny]
    rows_key, value_key, index_key = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(rows_key, (size.latents, size.dim))
    values = jax.random.normal(value_key, (size.batch, k))
    scores = jax.random.normal(index_key, (size.batch, size.latents))
    index = jax.lax.top_k(scores, k)[1]
    results, sums = [], {}
    for name in ("gathered", "dense"):
        decode = DECODERS[name]

        def step(values: Array, rows: Array, decode: Any = decode) -> Any:
            products, pull = decode(values, index, rows)
            return jnp.sum(products), pull(products)

        compiled = program(step, values, rows)
        sums[name] = compiled.run()[0]
        seconds = medians({name: compiled.run})[name]
        figures = {"step_s": seconds, "compile_s": compiled.compile_s}
        figures["sum"] = float(sums[name])
        results.append(row("ways", size._asdict() | {"k": k}, name, **figures))
    return results, []


def decode_gathered(values: Array, index: Array, rows: Array) -> tuple[Array, Any]:
    """Decode by the rows of each example; the products, and their pull-back."""
    return jax.vjp(
        lambda values, rows: jnp.einsum("nk,nkd->nd", values, rows[index]), values, rows
    )


def decode_dense(values: Array, index: Array, rows: Array) -> tuple[Array, Any]:
    """Decode by a product with codes that are zeros but for k."""
    return jax.vjp(
        lambda values, rows: scatter(values, index, len(rows)) @ rows, values, rows
    )


DECODERS = {"gathered": decode_gathered, "dense": decode_dense}


def populations(tiny: bool) -> tuple[list[dict], list[str]]:
    """Time populations of toy dictionaries."""
    size = TOY[tiny]
    sae = ft.dictionaries.standard(size.dim, size.latents)
    rows, missed, alone = [], [], 0.0
    for members in MEMBERS[tiny]:
        seconds, compile_s = step_seconds(sae, size, members)
        rate = members / seconds
        alone = alone or rate
        gain = rate / alone
        figures = {"step_s": seconds, "compile_s": compile_s, "gain": gain}
        sizes = size._asdict() | {"members": members}
        rows.append(row("population", sizes, "one program", **figures))
        if members == 256 and gain < POPULATION_GAIN:
            missed.append(f"population of 256: {gain:.0f} times the seeds of one")
    return rows, missed


def step_seconds(
    sae: ft.Dictionary, size: Size, members: int = 1
) -> tuple[float, float]:
    """Compile a chunk of steps and time it; seconds per step, and of compiling."""
    trainer = ft.trainer(sae, ft.losses.default(sae), normalize=False)
    keys: Array = jax.random.key(0)
    if members > 1:
        trainer = ft.population(trainer)
        keys = jax.random.split(keys, members)
    state = trainer.init(keys)
    num = size.batch * size.steps
    acts = jax.random.normal(jax.random.key(1), (num, size.dim))
    data = ft.Taps(acts, None, jnp.ones(num))

    def take(data: ft.Taps, step: Array) -> ft.Taps:
        first = step % size.steps * size.batch
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, size.batch), data
        )

    start = time.perf_counter()
    first = jnp.zeros((), jnp.int32)
    lowered = run_chunk.lower(trainer.update, take, size.steps, state, data, first)
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start
    latest = [state]

    def run() -> None:
        # The state is donated, so that every run goes on from the last one.
        latest[0], metrics, _ = compiled(latest[0], data, first)
        jax.block_until_ready(metrics)

    runs: dict[str, Callable[[], Any]] = {"chunk": run}
    return medians(runs)["chunk"] / size.steps, compile_s


if __name__ == "__main__":
    main()
