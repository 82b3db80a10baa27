"""Compare local interaction bases with rib's, of the same MLP on the same data.

    git clone https://github.com/ApolloResearch/rib ../rib
    bash benchmarks/peers/setup.sh                     # the peers' environment
    benchmarks/peers/.venv/bin/pip install mpi4py mpich    # rib imports them
    TOYFEAT_RIB=../rib python benchmarks/interaction_basis.py [--tiny] [--json PATH]

Three layers with biases and ReLUs; bases at the inputs of each, from the data on, with
exact Jacobians.  rib takes its "jacobian" formula with plain gradients, centred, as in
its examples of MLPs.  Both run in float64 and in float32, each at the better of the
batch sizes.  Values, spans and readers are compared with rib's in float64 first: where
ours are more than 1e-9 (in float64) or 1e-4 (in float32) off there are no times.
Without rib nothing is measured.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from contest import HERE, PEERS, Worker
from harness import BenchmarkConfig, finish, medians, parse_command, row

import toyfeat as ft

DEPTH = 3
SITES = [f"layers.{i}" for i in range(DEPTH)]  # as rib calls them
LIMITS = {"float64": 1e-9, "float32": 1e-4}  # of values, over the largest
Key = tuple[str, str, int]
"""Whose, precision, batch size."""


class Case(NamedTuple):
    """A size.

    Attributes:
      width: of the inputs, of every layer and of the outputs.
      rows: inputs.
      batches: sizes of a batch to try.
    """

    width: int
    rows: int
    batches: tuple[int, ...]


CASES = Case(64, 4096, (512, 4096)), Case(256, 1024, (256,))
TINY = (Case(16, 256, (128, 256)),)


@dataclass(frozen=True)
class Config(BenchmarkConfig):
    """Options of this benchmark."""

    rounds: int = 5
    """Turns."""
    width: int | None = None
    """One case, by its width."""


def arrays_of(case: Case) -> dict[str, Any]:
    """Draw inputs of falling variance, weights and biases."""
    rng = np.random.default_rng(0)
    fall = 16.0 ** -np.linspace(0, 1, case.width)
    arrays = {"x": rng.normal(size=(case.rows, case.width)) * fall}
    for i in range(DEPTH):
        weight = rng.normal(size=(case.width, case.width))
        arrays[f"w{i}"] = weight * (2 / case.width) ** 0.5
        arrays[f"b{i}"] = 0.1 * rng.normal(size=case.width)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def model(params: Any, x: jax.Array, tap: Any) -> jax.Array:
    """Apply the layers, with a site in front of each."""
    for i, site in enumerate(SITES):
        x = tap(site, x) @ params[f"w{i}"] + params[f"b{i}"]
        x = jax.nn.relu(x) if i + 1 < DEPTH else x
    return x


def ours(
    arrays: dict[str, Any], precision: str, batch: int
) -> Callable[[], dict[str, Any]]:
    """Make the function that computes all bases, and waits for them."""
    probed, wide = ft.from_function(model), precision == "float64"
    with jax.enable_x64(wide):
        cast = {n: jnp.asarray(a.astype(precision)) for n, a in arrays.items()}
        x = cast.pop("x")
        batches = [x[start : start + batch] for start in range(0, len(x), batch)]

    def run() -> dict[str, Any]:
        with jax.enable_x64(wide):
            bases = ft.local_interaction_basis(
                probed, cast, lambda: iter(batches), sites=SITES
            )
            return jax.block_until_ready(bases)

    return run


def theirs(worker: Worker, precision: str, batch: int, path: Path) -> dict[str, Any]:
    """Ask rib for its bases."""
    worker.ask(what="run", precision=precision, batch=batch)
    worker.ask(what="save", path=str(path))
    names = "values", "readers", "writers"
    with np.load(path) as saved:
        return {s: {name: saved[f"{s}/{name}"] for name in names} for s in SITES}


def plain(bases: dict[str, Any]) -> dict[str, Any]:
    """Our bases under rib's names, without what is past the numerical rank."""
    found = {}
    for site, basis in bases.items():
        rank = int(basis.diagnostics.rank)
        found[site] = {
            "values": np.asarray(basis.spectrum, np.float64)[:rank],
            "readers": np.asarray(basis.readers, np.float64)[:, :rank],
            "writers": np.asarray(basis.writers, np.float64)[:rank],
        }
    return found


def distances(found: dict[str, Any], true: dict[str, Any]) -> dict[str, float]:
    """Compare bases: the largest of each distance over the sites.

    Args:
      found: site to values, readers as columns, writers as rows.
      true: the same, of the reference.

    Returns:
      ``error``, of values over the largest; ``relative``, of the values above a
      hundredth of the largest; ``readers span`` and ``writers span``, sines of the
      largest angle between the spans of the leading quarter; ``readers``, of the sum
      of their outer products, whose signs and turns in degenerate planes do not count;
      ``ranks``, the largest difference of the numbers of directions.
    """
    worst: dict[str, float] = {}
    for site, basis in true.items():
        other, values = found[site], basis["values"]
        num = min(len(values), len(other["values"]))
        off = np.abs(other["values"][:num] - values[:num])
        large = np.flatnonzero(values[:num] > 1e-2 * values[0])
        outer = basis["readers"][:, :num] @ basis["readers"][:, :num].T
        outer_off = other["readers"][:, :num] @ other["readers"][:, :num].T - outer
        lead = max(1, len(values) // 4)
        figures = {
            "error": off.max() / values[0],
            "relative": (off / values[:num])[large].max(),
            "readers span": sine(other["readers"].T[:lead], basis["readers"].T[:lead]),
            "writers span": sine(other["writers"][:lead], basis["writers"][:lead]),
            "readers": np.linalg.norm(outer_off) / np.linalg.norm(outer),
            "ranks": abs(len(values) - len(other["values"])),
        }
        for name, figure in figures.items():
            worst[name] = max(worst.get(name, 0.0), float(figure))
    return worst


def sine(a: np.ndarray, b: np.ndarray) -> float:
    """Sine of the largest angle between the spans of two sets of rows."""
    a, b = (np.linalg.qr(np.asarray(x, np.float64).T)[0] for x in (a, b))
    return float(np.linalg.norm(b - a @ (a.T @ b), 2))


def measure(case: Case, worker: Worker, folder: Path, rounds: int) -> tuple:
    """Compare the bases of a size, and then time them; rows and missed bars."""
    arrays = arrays_of(case)
    np.savez(folder / "arrays.npz", **arrays)
    answer = worker.ask(what="load", path=str(folder / "arrays.npz"))
    if "missing" in answer:
        raise SystemExit(f"rib does not load: {answer['missing']}")
    saved = folder / "bases.npz"
    true = theirs(worker, "float64", case.batches[0], saved)
    runs, first, off = {}, {}, {}
    for precision, batch in itertools.product(LIMITS, case.batches):
        mine, peer = ("ours", precision, batch), ("rib", precision, batch)
        runs[mine] = ours(arrays, precision, batch)
        start = time.perf_counter()
        bases = runs[mine]()
        first[mine] = time.perf_counter() - start
        off[mine] = distances(plain(bases), true)
        if not off[mine]["error"] < LIMITS[precision]:
            text = f"values in {precision} are {off[mine]['error']:.1e} off rib's"
            return [], [f"width {case.width}: {text}, no time"]
        off[peer] = distances(theirs(worker, precision, batch, saved), true)
        order = {"precision": precision, "batch": batch}
        runs[peer] = partial(worker.ask, what="run", **order)
    taken = medians({str(key): run for key, run in runs.items()}, rounds=rounds)
    return rows_of(case, {key: taken[str(key)] for key in runs}, first, off)


def faster(seconds: dict[Key, float], who: str, precision: str) -> Key:
    """The better batch size of a side."""
    keys = [key for key in seconds if key[:2] == (who, precision)]
    return min(keys, key=lambda key: seconds[key])


def rows_of(
    case: Case,
    seconds: dict[Key, float],
    first: dict[Key, float],
    off: dict[Key, dict[str, float]],
) -> tuple[list[dict], list[str]]:
    """Make a row per precision, each side at its better batch size."""
    rows, missed = [], []
    for precision in LIMITS:
        mine, peer = (faster(seconds, who, precision) for who in ("ours", "rib"))
        ratio = seconds[peer] / seconds[mine]
        rows.append(
            row(
                f"width {case.width}",
                {"width": case.width, "rows": case.rows, "layers": DEPTH},
                f"local_interaction_basis, {precision}",
                peer=f"rib, {precision}",
                ours_s=seconds[mine],
                peer_s=seconds[peer],
                ratio=ratio,
                batch=mine[2],
                peer_batch=peer[2],
                compile_s=first[mine] - seconds[mine],
                **off[mine],
                peer_error=off[peer]["error"],
                peer_distances=off[peer],
            )
        )
        if ratio < 1:
            text = f"{ratio:.2f} x the speed of rib in {precision}, bar 1"
            missed.append(f"width {case.width}: {text}")
    return rows, missed


def show(line: dict[str, Any]) -> None:
    """Print a row."""
    print(
        f"{line['case']:>9} {line['ratio']:6.2f} x the speed of {line['peer']}"
        f"  (batches of {line['batch']} and {line['peer_batch']}), values off by "
        f"{line['error']:.1e} of the largest, spans by {line['readers span']:.1e}, "
        f"{line['ranks']:.0f} directions fewer",
        flush=True,
    )


def main() -> None:
    """Measure all sizes."""
    config = parse_command(Config, __doc__)
    if "TOYFEAT_RIB" not in os.environ or not PEERS.exists():
        print("no rib: TOYFEAT_RIB names its sources, peers/setup.sh its environment")
        finish([], [], config.json)
    worker = Worker(PEERS, HERE / "peers" / "rib_basis.py", None)
    rows, missed = [], []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for case in TINY if config.tiny else CASES:
                if config.width not in (None, case.width):
                    continue
                found = measure(case, worker, Path(folder), config.rounds)
                for line in found[0]:
                    show(line)
                rows += found[0]
                missed += [] if config.tiny and found[0] else found[1]
    finally:
        worker.end()
    finish(rows, missed, config.json)


if __name__ == "__main__":
    main()
