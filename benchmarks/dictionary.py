"""Steps of training dictionaries, beside SAELens, dictionary_learning and sparsify.

    bash benchmarks/peers/setup.sh                       # the peers, once
    python benchmarks/dictionary.py [--tiny] [--json PATH] [--only NAME]

Every library runs in a process of its own, on the same activations, from the same
start, with Adam, its own clipping, two threads, data in memory, and they take turns.
A time counts only if what was trained in it leaves as much unexplained as with
SAELens, whose losses ours mean (the others have their own).  Compile time is apart.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from contest import HERE, PEERS, Worker
from harness import finish, row

from toyfeat import data

THREADS = 2
SAME = 0.05  # relative difference of what is left unexplained, to SAELens
TINY = ("batch_topk", "population")
OURS = Path(sys.executable), HERE / "ours_dictionaries.py"
THEIRS = PEERS, HERE / "peers" / "dictionaries.py"


class Runner(NamedTuple):
    """One library's training in a case.

    Attributes:
      name: for tables.
      library: ``"toyfeat"`` or a peer.
      architecture: as the library calls it.
      options: what its order has beside the case's.
    """

    name: str
    library: str
    architecture: str
    options: dict[str, Any] = {}  # noqa: RUF012


class Case(NamedTuple):
    """What is trained.

    Attributes:
      name: of the case.
      size: ``d_in``, ``d_sae``, ``batch``, and ``k``, ``l1``, ``members``.
      runners: who takes part; the first is ours.
      rivals: names of those that the bar is about.
      bar: how many times as many samples per second as the best rival.
      steps: per turn.
    """

    name: str
    size: dict[str, Any]
    runners: tuple[Runner, ...]
    rivals: tuple[str, ...]
    bar: float
    steps: int


def peers(*names: str) -> tuple[Runner, ...]:
    """Peers from ``library architecture``."""
    pairs = [name.split(" ") for name in names]
    return tuple(Runner(" ".join(pair), pair[0], pair[1]) for pair in pairs)


def cases(tiny: bool) -> list[Case]:
    """All of them."""
    large = {"d_in": 512, "d_sae": 4096, "batch": 4096, "k": 32, "l1": 1.0}
    small = {"d_in": 32, "d_sae": 128, "batch": 1024, "k": 4, "l1": 1.0}
    steps, short, many = 8, 200, 32
    if tiny:
        large = {"d_in": 16, "d_sae": 64, "batch": 32, "k": 2, "l1": 1.0}
        small, steps, short, many = large, 2, 2, 4
    learning = "dictionary_learning standard"
    dense = peers(learning, "dictionary_learning april", "sae_lens standard")
    few = peers("sae_lens topk", "dictionary_learning topk", "sparsify topk")
    whole = peers("sae_lens batchtopk", "dictionary_learning batchtopk")
    ours = {
        name: Runner(f"toyfeat {name}", "toyfeat", name)
        for name in ("standard", "topk", "batch_topk")
    }
    names = {
        k: tuple(r.name for r in v) for k, v in {1: dense, 2: few, 3: whole}.items()
    }
    group = Runner("toyfeat standard", "toyfeat", "standard", {"group": min(many, 4)})
    listed = [
        Case("standard", large, (ours["standard"], *dense), (learning,), 1.2, steps),
        Case("topk", large, (ours["topk"], *few), names[2], 1.25, steps),
        Case(
            "batch_topk",
            large,
            (ours["batch_topk"], *whole, few[-1]),
            names[3],
            1.25,
            steps,
        ),
        Case("small", small, (ours["standard"], *dense), names[1], 2.0, short),
        Case(
            "population",
            {**small, "members": many},
            (group, *dense),
            names[1],
            4.0,
            max(2, short // 2),
        ),
    ]
    for name, runner in ours.items():
        costs = [
            runner._replace(
                name=f"{runner.name}, attributions of {k}",
                options={"attribution": True, "readouts": k},
            )
            for k in (1, 4)
        ]
        # The bar is about the cost: the plain step over the one with attributions.
        listed.append(
            Case(f"attribution {name}", large, (costs[0], costs[1], runner),
                 (runner.name,), 1 / 1.5, steps)
        )  # fmt: skip
    return [case for case in listed if not tiny or case.name in TINY]


def started(case: Case, runner: Runner, folder: Path) -> tuple[Worker, dict]:
    """A library's process, ready to run, and what it says."""
    ours = runner.library == "toyfeat"
    worker = Worker(*(OURS if ours else THEIRS), threads=THREADS)
    if not ours:
        worker.ask(op="settings", threads=THREADS)
    worker.ask(op="load", path=str(folder / "acts.npy"))
    order = {**case.size, "library": runner.library, "steps": case.steps, "lr": 3e-4}
    order |= {"architecture": runner.architecture, "seed": 0, **runner.options}
    init = {"W_dec": str(folder / "rows.npy")}
    return worker, worker.ask(op="prepare", **order, init=init)


def measured(case: Case, folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Name to median seconds per step, spread, share of the variance left, more."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((case.size["d_sae"], case.size["d_in"]))
    rows *= 0.1 / np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(folder / "rows.npy", rows.astype(np.float32))
    workers = {r.name: started(case, r, folder) for r in case.runners}
    for worker, _ in workers.values():
        worker.ask(op="run", steps=case.steps)
    taken: dict[str, list[dict]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, (worker, _) in workers.items():
            time.sleep(0.3)  # threads of the one before may go on spinning
            taken[name].append(worker.ask(op="run", steps=case.steps))
    found = {}
    acts = np.load(folder / "acts.npy")[: case.size["batch"]]
    for name, (worker, info) in workers.items():
        worker.ask(op="save", path=str(folder / "params.npz"))
        worker.end()
        params = dict(np.load(folder / "params.npz"))
        each = [turn["seconds"] / case.steps for turn in taken[name]]
        cpu = [turn["cpu_seconds"] / case.steps for turn in taken[name]]
        seconds = statistics.median(each)
        found[name] = {
            "seconds": seconds,
            "cpu_s": statistics.median(cpu),
            "spread": (max(each) - min(each)) / seconds,
            "fvu": unexplained(case, params, acts),
            **info,
        }
    return found


def unexplained(case: Case, params: dict[str, np.ndarray], acts: np.ndarray) -> float:
    """Share of the variance that a dictionary leaves, of the first member."""
    if params["W_dec"].ndim == 3:
        params = {name: x[0] for name, x in params.items()}
    acts = acts.astype(np.float64)
    bias, origin = params["b_enc"], params["b_dec"]
    codes = np.maximum((acts - origin) @ params["W_enc"] + bias, 0)
    if "topk" in case.name:
        size = codes * np.linalg.norm(params["W_dec"], axis=1)
        cut = np.partition(size, -case.size["k"], axis=1)[:, -case.size["k"]]
        codes = codes * (size >= cut[:, None])
    rest = acts - codes @ params["W_dec"] - origin
    return float(np.sum(rest**2) / np.sum((acts - acts.mean(0)) ** 2))


def reported(
    case: Case, found: dict[str, dict[str, Any]]
) -> tuple[list[dict], list[str]]:
    """Rows, and what was missed."""
    samples = case.size["batch"] * case.size.get("members", 1)
    for name, one in found.items():
        print(
            f"{case.name:>22} {name:<42} {1e3 * one['seconds']:9.2f} ms a step "
            f"({100 * one['spread']:3.0f} %) {samples / one['seconds']:12,.0f} samples"
            f"/s, left {one['fvu']:.3f}"
            + (f", compiled in {one['compile_s']:.1f} s" if "compile_s" in one else "")
        )
    best = {name: found[name]["seconds"] for name in case.rivals if name in found}
    rival = min(best, key=lambda name: best[name], default=None)
    lines, missed = [], []
    for runner in case.runners:
        if runner.library != "toyfeat" or runner.name in case.rivals:
            continue
        mine = found[runner.name]
        ratio = None if rival is None else best[rival] / mine["seconds"]
        same = [one["fvu"] for n, one in found.items() if n.startswith("sae_lens")]
        error = max((abs(mine["fvu"] / fvu - 1) for fvu in same), default=None)
        if error is not None and error > SAME:
            missed.append(f"{case.name}: {runner.name} is off SAELens by {error:.3f}")
        lines.append(
            row(
                case.name,
                case.size,
                runner.name,
                ours_s=mine["seconds"],
                peer=rival,
                peer_s=None if rival is None else best[rival],
                ratio=ratio,
                error=error,
                peer_error=None,
                left_unexplained={n: one["fvu"] for n, one in found.items()},
                others={n: one["seconds"] for n, one in found.items()},
                **{k: mine[k] for k in ("spread", "compile_s", "temporary_bytes")},
            )
        )
        if ratio is None:
            continue
        print(
            f"{case.name:>22} {runner.name}: {ratio:.2f} x {rival} (bar {case.bar:.2f})"
        )
        if ratio < case.bar and "of 4" not in runner.name:
            missed.append(
                f"{case.name}: {runner.name} is {ratio:.2f} x {rival}, "
                f"the bar is {case.bar:.2f}"
            )
    return lines, missed


def memory(tiny: bool, folder: Path) -> tuple[list[dict], list[str]]:
    """Bytes of a compiled chunk on four times the data: only the data may grow."""
    case = cases(tiny)[0]
    shape = 4 * case.size["batch"], case.size["d_in"]
    acts = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    needs = []
    for times in (1, 4):
        np.save(folder / "acts.npy", np.tile(acts, (times, 1)))
        np.save(folder / "rows.npy", acts[: case.size["d_sae"]])
        worker, info = started(case, case.runners[0], folder)
        worker.end()
        needs.append(info)
    size = case.size
    codes = 4 * size["batch"] * size["d_sae"]
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
    tiny = "--tiny" in sys.argv
    only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else None
    alone = tiny or not PEERS.exists()
    if not PEERS.exists():
        print("no peers: bash benchmarks/peers/setup.sh builds their environment")
    names = [case.name for case in cases(tiny)] + ["memory"]
    if only not in (None, *names):
        sys.exit(f"--only takes one of {', '.join(names)}, got {only!r}")
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases(tiny):
            if only not in (None, case.name):
                continue
            width, num = case.size["d_in"], 4 * case.size["batch"]
            world = data.synth_sae_bench(
                jax.random.key(0), features=8 * width, dim=width
            )
            acts = data.world_acts(jax.random.key(1), world, num)
            np.save(folder / "acts.npy", np.asarray(acts))
            if alone:
                mine = tuple(r for r in case.runners if r.library == "toyfeat")
                case = case._replace(runners=mine)
            found = measured(case, folder, 1 if tiny else 7)
            results.append(reported(case, found))
        if only in (None, "memory"):
            results.append(memory(tiny, folder))
    rows = list(itertools.chain.from_iterable(lines for lines, _ in results))
    missed = list(itertools.chain.from_iterable(texts for _, texts in results))
    finish(rows, [] if tiny else missed)


if __name__ == "__main__":
    main()
