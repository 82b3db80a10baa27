"""Time steps of training dictionaries, beside SAELens and other libraries.

    bash benchmarks/peers/setup.sh                       # the peers, once
    python benchmarks/dictionary.py [--tiny] [--json PATH] [--only NAME]

Beside SAELens, dictionary_learning and sparsify.  Every library runs in a process of
its own, on the same activations, from the same start, with Adam, its own clipping, two
threads, data in memory, and they take turns.  A time counts only if what was trained in
it leaves as much unexplained as with SAELens, whose losses ours mean (the others have
their own).  Compile time is apart.
"""

import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from contest import HERE, PEERS, Worker
from dictionary_cases import Case, Runner, cases
from harness import BenchmarkConfig, finish, parse_command, row

from toyfeat import worlds

THREADS = 2
SAME = 0.05  # relative difference of what is left unexplained, to SAELens
OURS = Path(sys.executable), HERE / "peers" / "toyfeat_dictionaries.py"
THEIRS = PEERS, HERE / "peers" / "dictionaries.py"


@dataclass(frozen=True)
class Config(BenchmarkConfig):
    """Options."""

    only: str | None = None
    """One case, by its name."""


def start_worker(case: Case, runner: Runner, folder: Path) -> tuple[Worker, dict]:
    """Start a library's process and compile; returns it, and what it says of that."""
    ours = runner.library == "toyfeat"
    worker = Worker(*(OURS if ours else THEIRS), threads=THREADS)
    if not ours:
        worker.ask(op="settings", threads=THREADS)
    worker.ask(op="load", path=str(folder / "acts.npy"))
    order = {**case.size, "library": runner.library, "steps": case.steps, "lr": 3e-4}
    order |= {"architecture": runner.architecture, "seed": 0, **runner.options}
    init = {"W_dec": str(folder / "rows.npy")}
    return worker, worker.ask(op="prepare", **order, init=init)


def measure(case: Case, folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Time a case in turns.

    Returns:
      Name to median seconds per step, their spread, the share of the variance that is
      left, and what the worker says of its program.
    """
    # All libraries start from one decoder, with rows of SAELens' length.
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((case.size["d_sae"], case.size["d_in"]))
    rows *= 0.1 / np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(folder / "rows.npy", rows.astype(np.float32))
    workers = {r.name: start_worker(case, r, folder) for r in case.runners}
    # A turn to warm up, then turns that count.
    for worker, _ in workers.values():
        worker.ask(op="run", steps=case.steps)
    taken: dict[str, list[dict]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, (worker, _) in workers.items():
            time.sleep(0.3)  # threads of the one before may go on spinning
            taken[name].append(worker.ask(op="run", steps=case.steps))
    # Judge what was trained in those times, by one formula for all.
    results = {}
    acts = np.load(folder / "acts.npy")[: case.size["batch"]]
    for name, (worker, info) in workers.items():
        worker.ask(op="save", path=str(folder / "params.npz"))
        worker.end()
        params = dict(np.load(folder / "params.npz"))
        wall = [turn["seconds"] / case.steps for turn in taken[name]]
        cpu = [turn["cpu_seconds"] / case.steps for turn in taken[name]]
        seconds = statistics.median(wall)
        results[name] = {
            "seconds": seconds,
            "cpu_s": statistics.median(cpu),
            "spread": (max(wall) - min(wall)) / seconds,
            "fvu": unexplained(case, params, acts),
            **info,
        }
    return results


def unexplained(case: Case, params: dict[str, np.ndarray], acts: np.ndarray) -> float:
    """Share of the variance that a dictionary leaves; the first of several members."""
    if params["W_dec"].ndim == 3:
        params = {name: x[0] for name, x in params.items()}
    # Codes as their own library makes them: ReLU, of which top-k keeps the k largest in
    # units of the output.
    acts = acts.astype(np.float64)
    bias, origin = params["b_enc"], params["b_dec"]
    codes = np.maximum((acts - origin) @ params["W_enc"] + bias, 0)
    if "topk" in case.name:
        size = codes * np.linalg.norm(params["W_dec"], axis=1)
        cut = np.partition(size, -case.size["k"], axis=1)[:, -case.size["k"]]
        codes = codes * (size >= cut[:, None])
    residual = acts - codes @ params["W_dec"] - origin
    return float(np.sum(residual**2) / np.sum((acts - acts.mean(0)) ** 2))


def report(
    case: Case, results: dict[str, dict[str, Any]]
) -> tuple[list[dict], list[str]]:
    """Print the times of a case; rows, and missed bars."""
    print_times(case, results)
    rivals = [name for name in case.rivals if name in results]
    rival = min(rivals, key=lambda name: results[name]["seconds"], default=None)
    saelens = [r["fvu"] for name, r in results.items() if name.startswith("sae_lens")]
    lines, missed = [], []
    for runner in case.runners:
        if runner.library != "toyfeat" or runner.name in case.rivals:
            continue
        line = make_row(case, runner.name, rival, results, saelens)
        lines.append(line)
        if line["error"] is not None and line["error"] > SAME:
            missed.append(
                f"{case.name}: {runner.name} is off SAELens by {line['error']:.3f}"
            )
        if rival is None:
            continue
        ratio = f"{line['ratio']:.2f} x {rival}"
        print(f"{case.name:>22} {runner.name}: {ratio} (bar {case.bar:.2f})")
        if line["ratio"] < case.bar and "of 4" not in runner.name:
            missed.append(
                f"{case.name}: {runner.name} is {ratio}, the bar is {case.bar:.2f}"
            )
    return lines, missed


def print_times(case: Case, results: dict[str, dict[str, Any]]) -> None:
    """Print a line per runner."""
    samples = case.size["batch"] * case.size.get("members", 1)
    for name, result in results.items():
        print(
            f"{case.name:>22} {name:<42} {1e3 * result['seconds']:9.2f} ms a step "
            f"({100 * result['spread']:3.0f} %) {samples / result['seconds']:12,.0f} "
            f"samples/s, left {result['fvu']:.3f}"
            + (
                f", compiled in {result['compile_s']:.1f} s"
                if "compile_s" in result
                else ""
            )
        )


def make_row(
    case: Case,
    name: str,
    rival: str | None,
    results: dict[str, dict[str, Any]],
    saelens: list[float],
) -> dict[str, Any]:
    """Make the row of a runner of ours.

    Args:
      case: of the runner.
      name: of the runner.
      rival: fastest one that the bar is about.
      results: of all runners.
      saelens: shares of the variance that SAELens leaves.

    Returns:
      A row, whose error is the relative difference to SAELens in what is left.
    """
    ours = results[name]
    rival_s = None if rival is None else results[rival]["seconds"]
    return row(
        case.name,
        case.size,
        name,
        ours_s=ours["seconds"],
        peer=rival,
        peer_s=rival_s,
        ratio=None if rival_s is None else rival_s / ours["seconds"],
        error=max((abs(ours["fvu"] / fvu - 1) for fvu in saelens), default=None),
        peer_error=None,
        left_unexplained={n: result["fvu"] for n, result in results.items()},
        others={n: result["seconds"] for n, result in results.items()},
        **{k: ours[k] for k in ("spread", "compile_s", "temporary_bytes")},
    )


def memory(tiny: bool, folder: Path) -> tuple[list[dict], list[str]]:
    """Compare bytes of a compiled chunk on four times the data: only that may grow."""
    case = cases(tiny)[0]
    shape = 4 * case.size["batch"], case.size["d_in"]
    acts = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    # The same chunk on data and on four copies of it.
    needs = []
    for times in (1, 4):
        np.save(folder / "acts.npy", np.tile(acts, (times, 1)))
        np.save(folder / "rows.npy", acts[: case.size["d_sae"]])
        worker, info = start_worker(case, case.runners[0], folder)
        worker.end()
        needs.append(info)
    size = case.size
    codes = 4 * size["batch"] * size["d_sae"]
    # Arguments grow by the three further copies and their weights, and nothing else.
    grown = needs[1]["temporary_bytes"] - needs[0]["temporary_bytes"]
    more = needs[1]["argument_bytes"] - needs[0]["argument_bytes"]
    data = 4 * 3 * len(acts) * (size["d_in"] + 1)
    print(
        f"{'memory':>22} a chunk needs {needs[0]['temporary_bytes'] / codes:.1f} "
        f"arrays of batch x latents, on four times the data {grown / codes:+.2f} more"
    )
    line = row(
        "memory",
        size,
        case.runners[0].name,
        ours_s=needs[0]["compile_s"],
        ratio=needs[0]["temporary_bytes"] / codes,
        error=None,
        grown_bytes=grown,
    )
    wrong = grown > 1024 or abs(more - data) > 0.01 * data
    return [line], ["memory: a chunk needs more on more data"] * wrong


def main() -> None:
    """Measure what ``--only`` names, or everything."""
    config = parse_command(Config, __doc__)
    tiny, only = config.tiny, config.only
    alone = tiny or not PEERS.exists()
    if not PEERS.exists():
        print("no peers: bash benchmarks/peers/setup.sh builds their environment")
    names = [case.name for case in cases(tiny)] + ["memory"]
    if only not in (None, *names):
        sys.exit(f"--only takes one of {', '.join(names)}, got {only!r}")
    reports = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases(tiny):
            if only not in (None, case.name):
                continue
            width, num = case.size["d_in"], 4 * case.size["batch"]
            world = worlds.synth_sae_bench(
                jax.random.key(0), features=8 * width, dim=width
            )
            acts = worlds.world_acts(jax.random.key(1), world, num)
            np.save(folder / "acts.npy", np.asarray(acts))
            if alone:
                ours = tuple(r for r in case.runners if r.library == "toyfeat")
                case = case._replace(runners=ours)
            results = measure(case, folder, 1 if tiny else 7)
            reports.append(report(case, results))
        if only in (None, "memory"):
            reports.append(memory(tiny, folder))
    rows = list(itertools.chain.from_iterable(lines for lines, _ in reports))
    missed = list(itertools.chain.from_iterable(texts for _, texts in reports))
    finish(rows, [] if tiny else missed, config.json)


if __name__ == "__main__":
    main()
