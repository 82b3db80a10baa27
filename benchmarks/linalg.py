"""Time low-rank kernels against other libraries, and against their own products.

    bash benchmarks/peers/setup.sh          # once: the peers' own environment
    python benchmarks/linalg.py [--tiny] [--only NAME] [--json PATH] [--plot PATH]

Float32, singular values 1/j.  Ours and peers run in processes of their own, on the
same arrays and in turns, each with OpenBLAS at its default and at one thread; bars
bind with each library at the better of the two.  "stream" and "growth" run here, at
one thread unless the environment says otherwise.  Errors are printed before times.
A bar that is missed is printed with the figure, and the exit status is 1.
Without the peers' environment only the comparisons with ourselves run.
"""

import os
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from linalg_growth import growth

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before it is loaded

import jax
import jax.numpy as jnp
import numpy as np
from contest import PEERS, Contestant, Outcome, contest
from harness import (
    BenchmarkConfig,
    finish,
    gemm_flops_per_s,
    medians,
    parse_command,
    program,
    row,
)
from spectra import with_spectrum

import toyfeat as ft
from toyfeat.linalg.gram import unit_gram

TORCH, SKLEARN = "torch.svd_lowrank(niter=2)", "sklearn randomized_svd"
FBPCA, SSYRK = "fbpca", "numpy ssyrk + eigh"
OURS, PRODUCTS, ACCURATE = "toyfeat", "toyfeat, its products alone", "toyfeat, q=4"
NO_U = "toyfeat, without u"


# Bars of the stream: over its products, and in memory, a few blocks of 20 MB.
STREAM_OVERHEAD, STREAM_MB = 0.1, 64


@dataclass(frozen=True)
class Config(BenchmarkConfig):
    """Options."""

    only: str | None = None
    """One case, by its name."""
    plot: Path | None = None
    """Picture of the growth of times."""


class Case(NamedTuple):
    """A matrix, the contestants, and the bars.

    Attributes:
      name: for ``--only``.
      shape: ``(n, d)`` or ``(batch, n, d)``.
      rank: number of triplets.
      peers: methods of other libraries.
      bars: ours, peer, how many times faster, and whether at the peer's accuracy.
      products: the most our time may be, over that of the products alone.
      error: the most that values may be wrong by, relative.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    peers: tuple[str, ...]
    bars: tuple[tuple[str, str, float, bool], ...]
    products: float | None = 1.25
    error: float | None = None


CASES = (
    Case("tall", (100_000, 512), 32, (TORCH, SKLEARN), ((OURS, TORCH, 1.5, True),)),
    Case(
        "middle",
        (20_000, 4096),
        64,
        (TORCH, SKLEARN, FBPCA),
        ((OURS, TORCH, 1.5, True), (ACCURATE, SKLEARN, 3.0, True)),
    ),
    Case(
        "square",
        (8192, 8192),
        50,
        (TORCH, SKLEARN),
        ((OURS, TORCH, 1.5, True), (ACCURATE, SKLEARN, 3.0, True)),
    ),
    Case(
        "long",
        (1_000_000, 256),
        16,
        (SSYRK, TORCH),
        ((NO_U, SSYRK, 1 / 1.35, False), (NO_U, TORCH, 1.0, False)),
        products=None,
        error=1e-5,
    ),
    Case(
        "batch",
        (32, 4096, 256),
        16,
        (TORCH,),
        ((OURS, TORCH, 1.0, False),),
        products=None,
        error=1e-6,
    ),
)
TINY = (
    Case("tiny", (400, 96), 4, (), ()),
    Case("tiny batch", (2, 300, 140), 4, (), ()),
)


def contestants(case: Case, peers: bool) -> list[Contestant]:
    """List all methods, at one and at the default number of BLAS threads."""
    ours: list[tuple[str, str, dict[str, Any]]] = [("toyfeat", OURS, {})]
    names = [bar[0] for bar in case.bars]
    if ACCURATE in names:
        ours.append(("toyfeat", ACCURATE, {"power_iters": 4}))
    if NO_U in names:
        ours.append(("toyfeat", NO_U, {"compute_u": False}))
    if case.products is not None and len(case.shape) == 2:
        ours.append((PRODUCTS, PRODUCTS, {}))
    listed = [
        Contestant(
            method=method,
            threads=threads,
            ours=True,
            options=tuple(options.items()),
            label=label,
        )
        for method, label, options in ours
        for threads in ((1, None) if peers else (1,))
    ]
    if peers:
        listed += [Contestant(p, t, False) for p in case.peers for t in (1, None)]
    return listed


def measure(
    case: Case, peers: bool, rounds: int, peak: float
) -> tuple[list[dict], list[str]]:
    """Time a case; returns rows and missed bars."""
    # Matrices with a known spectrum, 1 / i: slow enough to be hard to truncate.
    *batch, rows, dim = case.shape
    spectrum = 1 / np.arange(1, min(rows, dim) + 1)
    if batch:
        array = np.stack(
            [with_spectrum(rows, dim, spectrum, seed=i) for i in range(batch[0])]
        )
    else:
        array = with_spectrum(rows, dim, spectrum)
    with tempfile.TemporaryDirectory() as folder:
        methods = contestants(case, peers)
        outcomes = contest(array, spectrum, case.rank, methods, Path(folder), rounds)
    best = {n: min(runs, key=lambda o: o.seconds) for n, runs in outcomes.items()}
    lines = []
    for name, runs in outcomes.items():
        for outcome in runs:
            print(
                f"{case.name:>7} {name:<28} threads {outcome.threads:<8}"
                f" s-error {outcome.error_s:8.1e}  excess {outcome.excess:8.1e}"
                f" {1e3 * outcome.seconds:9.1f} ms"
                f"  (spread {100 * outcome.spread:3.0f} %)"
                f"  {outcome.info.get('route', '')}",
                flush=True,
            )
            lines.append(_row(case, name, outcome, best, peak))
    return lines, missed_bars(case, best)


def _row(
    case: Case, name: str, outcome: Outcome, best: dict[str, Outcome], peak: float
) -> dict:
    *batch, rows, dim = case.shape
    # A pass over the matrix multiplies it by ``width`` columns.
    columns = outcome.info.get("width", 0) * outcome.info.get("passes", 0)
    flops = 2.0 * rows * dim * columns * (batch[0] if batch else 1)
    peer = next((best[p] for p in case.peers if p in best), None)
    return row(
        case.name,
        {"n": rows, "d": dim, "k": case.rank, "batch": batch[0] if batch else 1},
        name,
        ours_s=outcome.seconds,
        peer_s=peer.seconds if peer else None,
        ratio=peer.seconds / outcome.seconds if peer else None,
        error=outcome.error_s,
        excess=outcome.excess,
        peer_error=peer.error_s if peer else None,
        flops=flops,
        fraction_of_gemm_peak=flops / outcome.seconds / peak,
        blas_threads=outcome.threads,
        spread=outcome.spread,
        **outcome.info,
    )


def missed_bars(case: Case, best: dict[str, Outcome]) -> list[str]:
    """Name the bars of speed and of accuracy that are missed."""
    missed = []
    # Against peers.
    for ours, peer, times, accurate in case.bars:
        if peer not in best:
            continue
        a, b = best[ours], best[peer]
        ratio = b.seconds / a.seconds
        print(
            f"{case.name:>7} {ours}: {ratio:.2f} x as fast as {peer} (bar {times:.2f})"
        )
        if ratio < times:
            missed.append(
                f"{case.name}: {ours} is {ratio:.2f} x as fast as {peer}, the bar is "
                f"{times:.2f}"
            )
        if accurate and (a.error_s > b.error_s or a.excess > b.excess):
            missed.append(
                f"{case.name}: {ours} has s-error {a.error_s:.1e} and excess "
                f"{a.excess:.1e}, {peer} {b.error_s:.1e} and {b.excess:.1e}"
            )
    # Against the products alone, which no method can do without.
    if case.products is not None and PRODUCTS in best:
        ratio = best[OURS].seconds / best[PRODUCTS].seconds
        print(
            f"{case.name:>7} total / products alone: {ratio:.2f} (bar {case.products})"
        )
        if ratio > case.products:
            missed.append(
                f"{case.name}: {ratio:.2f} x its products alone, the bar is "
                f"{case.products}"
            )
    # Against the known spectrum.
    for name in (OURS, NO_U):
        if case.error is not None and name in best and best[name].error_s > case.error:
            missed.append(
                f"{case.name}: {name} has s-error {best[name].error_s:.1e}, the bar is "
                f"{case.error:.0e}"
            )
    return missed


def peak_memory() -> float:
    """Largest memory that this process has used so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stream(blocks: int, rows: int, dim: int, rank: int, peak: float) -> tuple:
    """Time the Gram stream against the same products, and measure its memory."""
    a = jnp.asarray(with_spectrum(rows, dim, 1 / np.arange(1, dim + 1)))
    acc = ft.linalg.stream_svd(dim, rank)
    step = jax.jit(acc.update, donate_argnums=0).lower(acc.init(), a).compile()
    product = program(lambda a: unit_gram(a), a)

    def fold(count: int) -> Any:
        state = acc.init()
        for _ in range(count):
            state = step(state, a)
        return jax.block_until_ready(state)

    # Memory after many blocks, beyond what two of them took.
    fold(2)
    before = peak_memory()
    svd = acc.finish(fold(blocks))
    grown = peak_memory() - before
    error = stream_error(np.asarray(svd.s), blocks)
    runs = {
        "stream": lambda: fold(blocks),
        "products": lambda: [product.run() for _ in range(blocks)],
    }
    taken = medians(runs, rounds=3)
    # The stream may cost a little more than the products that it cannot do without.
    over = taken["stream"] / taken["products"] - 1
    flops = 2.0 * blocks * rows * dim**2
    print(
        f" stream {blocks} blocks of {rows} x {dim}: s-error {error:.1e} of s1, "
        f"{100 * over:+.1f} % over the products (bar 10 %), memory grew {grown:.0f} MB"
    )
    line = row(
        "stream",
        {"n": blocks * rows, "d": dim, "k": rank},
        "stream_svd gram",
        ours_s=taken["stream"],
        peer_s=taken["products"],
        ratio=taken["products"] / taken["stream"],
        error=error,
        peer_error=0.0,
        flops=flops,
        fraction_of_gemm_peak=flops / taken["stream"] / peak,
        grown_mb=grown,
    )
    return [line], missed_stream_bars(over, grown)


def stream_error(values: np.ndarray, blocks: int) -> float:
    """Largest error of a singular value, in units of the first one.

    The blocks are equal, so singular values grow with the root of their number.
    """
    spectrum = np.sqrt(blocks) / np.arange(1, len(values) + 1)
    return float(np.max(np.abs(values - spectrum)) / spectrum[0])


def missed_stream_bars(over: float, grown: float) -> list[str]:
    """Name the bars of the time over the products, and of memory in MB."""
    slow = [f"stream: {100 * over:.1f} % over its products, the bar is 10 %"]
    grew = [f"stream: memory grew by {grown:.0f} MB"]
    return slow * (over > STREAM_OVERHEAD) + grew * (grown > STREAM_MB)


def main() -> None:
    """Measure what ``--only`` names, or everything."""
    config = parse_command(Config, __doc__)
    tiny, only = config.tiny, config.only
    peers = PEERS.exists() and not tiny
    if not peers:
        print("no peers: bash benchmarks/peers/setup.sh builds their environment")
    peak = gemm_flops_per_s(256 if tiny else 2048)
    results = [
        measure(case, peers, 2 if tiny else 5, peak)
        for case in (TINY if tiny else CASES)
        if only in (None, case.name)
    ]
    if only in (None, "stream"):
        size = (3, 300, 40, 4) if tiny else (100, 10_000, 512, 32)
        results.append(stream(*size, peak=peak))
    if only in (None, "growth"):
        results.append(growth(tiny, peak, config.plot))
    rows = [line for lines, _ in results for line in lines]
    missed = [text for _, texts in results for text in texts]
    finish(rows, [] if tiny else missed, config.json)


if __name__ == "__main__":
    main()
