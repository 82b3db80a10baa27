"""How far methods depend on settings that nobody knows how to set.

    python benchmarks/brittleness.py [--wide | --quick] [--json PATH]

On planted tasks, over a grid that was fixed before the first run: the coefficient
(three decades), the learning rate (a tenth to ten times), random starts, the scale of
the output and so of the gradients (1e-3 to 1e3), and the readout.  Success (a) is a run
that is finite and covers the readers within 10 % of the best that any run reached on
that task; (b) also has the number of codes that was asked for, within 10 %.

- ``published``: the four-term loss as it was written down, on raw activations and
  gradients, one coefficient for the sparsity and the attributions.  For (b) it is given
  its best coefficient at every other setting.  The better of decoder and encoder
  counts.
- ``robust``: our four-term loss with a controller, coefficients as they begin.
- ``consensus``: has no coefficient, no readout and no codes to choose: what it finds at
  a learning rate, scale and start, a fourth as many trainings, stands at every
  coefficient, and it has no (b).

The bar is that ours is at 95 % or more.  Writes maps of coverage and of both shares,
and ``out/brittleness/brittleness.html``; what was swept is kept there, and
the same command goes on (hours; every part of as many runs as the grid has rates times
coefficients is kept at once).  ``--wide`` sweeps the leaderboard's other tasks over a
smaller grid, which was fixed before its first run, too.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import row
from leaderboard import TASKS
from rich.console import Console

import toyfeat as tf
from toyfeat.consensus import agreed, descriptions, half_square, tapped
from toyfeat.report.rows import output_folder, write_whole
from toyfeat.report.sweeps import brittleness_figure, write_sweep
from toyfeat.tap.readouts import Readout
from toyfeat.types import Array, Member, Subject, Taps, Task, Trainer, TrainState


class Grid(NamedTuple):
    """What is swept, and how long every run is."""

    tasks: tuple[str, ...] = (
        "ignored structure",
        "product space",
        "circuits 20/60",
        "quiet but strong",
    )
    coefficients: tuple[float, ...] = (0.03, 0.3, 3.0, 30.0)
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    starts: int = 2
    scales: tuple[float, ...] = (1e-3, 1.0, 1e3)
    steps: int = 2000
    examples: int = 20_000


WIDE = Grid(
    tuple(name for name in TASKS if name not in Grid().tasks),
    rates=(3e-4, 3e-3, 3e-2),
    starts=1,
    scales=(1e-3, 1e3),
)
QUICK = Grid(("product space",), (0.03, 30.0), (3e-4, 3e-2), 1, (1e-3, 1e3), 1000, 6000)
GRIDS = {
    "full": Grid(),
    "wide": WIDE,
    "quick": QUICK,
    "tiny": QUICK._replace(scales=(1e3,), steps=10, examples=300),
}
OURS, WANTED = ("robust", "consensus"), 0.95
NEAR = 0.1  # of the best coverage and of the codes that were asked for


class Run(NamedTuple):
    """One point of the grid and what became of it."""

    learning_rate: float
    coefficient: float
    scale: float
    readout: str
    start: int
    finite: bool
    coverage: float
    codes: float | None


Part = Callable[[], list[Run]]
"""Every learning rate with every coefficient, all else the same."""

Sweep = Callable[[Task, float, Grid], list[Part]]


def readouts(key: Array) -> dict[str, Readout]:
    """Those that a user of the four-term loss may choose from."""
    return {
        "half square": tf.readouts.scalar(half_square),
        "random direction": tf.readouts.random_directions(key, 1, "gaussian"),
    }


def scaled(task: Task, scale: float) -> Subject:
    """The model with its output, and so all gradients, times ``scale``."""

    def probed(params: Any, inputs: Any, probes: Any) -> Any:
        outputs, acts = task.probed(params, inputs, probes)
        return jax.tree.map(lambda x: scale * x, outputs), acts

    return Subject(probed, task.params, task.sample, task.site)


def cells_of(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Every learning rate with every coefficient."""
    pairs = [(rate, c) for rate in grid.rates for c in grid.coefficients]
    rates, coefficients = np.array(pairs).T
    return rates, coefficients


def covered(found: np.ndarray, task: Task) -> float:
    """Coverage of the readers, 0 for what is not finite."""
    readers, group = task.truth.readers, task.truth.group
    assert readers is not None
    if not (len(found) and np.isfinite(found).all()):
        return 0.0
    return tf.match_features(found, readers, group=group).coverage


def published(task: Task, target: float, grid: Grid) -> list[Part]:
    """The four-term loss as it was written down."""
    del target
    width = len(np.asarray(task.truth.readers)[0])
    sae = tf.standard(width, int(np.clip(4 * width, 16, 512)))
    objective = tf.attribution_objective(sae, penalty="l1", form="signed")
    off: dict[str, Any] = {
        "normalize": False,
        "center": False,
        "clip": np.inf,
        "warm_up": 0,
    }
    return four_terms(task, grid, tf.trainer(sae, objective, **off))


def robust(task: Task, target: float, grid: Grid) -> list[Part]:
    """Our four-term loss, steered to the codes that were asked for."""
    width = len(np.asarray(task.truth.readers)[0])
    sae = tf.standard(width, int(np.clip(4 * width, 16, 512)))
    control = tf.controllers.target_l0(target)
    one = tf.trainer(
        sae,
        tf.attribution_objective(sae),
        controller=control,
        warm_up=grid.steps // 10,
    )
    return four_terms(task, grid, one)


def four_terms(task: Task, grid: Grid, one: Trainer) -> list[Part]:
    """An attribution dictionary over the whole grid."""
    many = tf.population(one)
    rates, coefficients = cells_of(grid)
    inputs, drawn = jax.random.split(jax.random.key(1))

    def part(scale: float, name: str, readout: Readout, start: int) -> list[Run]:
        subject = scaled(task, scale)
        taps = tapped(subject, subject.sample(inputs, grid.examples), readout)
        keys = jax.random.split(jax.random.key(start), len(rates))
        state = many.init(
            keys,
            learning_rate=jnp.asarray(rates, float),
            sparsity=jnp.asarray(coefficients, float),
            attribution_sparsity=jnp.asarray(coefficients, float),
        )
        state, codes = trained(many, state, taps, grid, start)
        decoders = np.asarray(state.params["W_dec"])
        encoders = np.asarray(state.params["W_enc"]).swapaxes(1, 2)
        runs = []
        for i, (rate, c) in enumerate(zip(rates, coefficients, strict=True)):
            sides = decoders[i], encoders[i]
            finite = all(np.isfinite(side).all() for side in sides)
            best = max(covered(side, task) for side in sides) if finite else 0.0
            where = (float(rate), float(c), scale, name, start)
            runs.append(Run(*where, finite, best, float(codes[i])))
        return runs

    return [
        partial(part, scale, name, readout, start)
        for scale in grid.scales
        for name, readout in readouts(drawn).items()
        for start in range(grid.starts)
    ]


def trained(
    many: Trainer, state: TrainState, taps: Taps, grid: Grid, seed: int
) -> tuple[TrainState, np.ndarray]:
    """A population at its end, and codes per example over the last tenth."""
    last: list[np.ndarray] = []
    batches = tf.data.array_batches(taps, batch=256, seed=seed)
    try:
        state = tf.fit(
            many,
            state,
            batches,
            steps=grid.steps,
            chunk=max(1, grid.steps // 10),
            progress=False,
            check_data=False,
            on_chunk=lambda _, metrics: last.append(metrics["l0"]),
        )
    except FloatingPointError:  # of all members
        lost = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params)
        return state._replace(params=lost), np.zeros(len(state.step))
    return state, np.nan_to_num(last[-1])


def consensus(task: Task, target: float, grid: Grid) -> list[Part]:
    """The consensus at every learning rate, in one population per readout."""
    del target
    settings = {"learning_rate": np.array(grid.rates)}
    description = tf.Description(examples=grid.examples, steps=grid.steps)

    def part(scale: float, start: int) -> list[Run]:
        subject = scaled(task, scale)
        described = descriptions(
            jax.random.key(start), subject, description, settings=settings
        )
        runs = []
        for rate, sets in zip(grid.rates, described.sets, strict=True):
            finite = all(map(len, sets))  # what diverged has no used latents
            reached = covered(agreed(sets, described)[0], task)
            for c in grid.coefficients:
                where = (rate, c, scale, "both", start)
                runs.append(Run(*where, finite, reached, None))
        return runs

    return [
        partial(part, scale, start)
        for scale in grid.scales
        for start in range(grid.starts)
    ]


class Family(NamedTuple):
    """A way to sweep; its version is raised where it comes to something else."""

    sweep: Sweep
    version: int = 1


FAMILIES = {
    "published": Family(published),
    "robust": Family(robust),
    "consensus": Family(consensus, 2),
}


def good(run: Run, best: float) -> bool:
    """Success (a)."""
    return run.finite and run.coverage >= (1 - NEAR) * best > 0


def sparse(run: Run, target: float) -> float:
    """Whether it has the codes that were asked for; NaN of one that is not asked."""
    if run.codes is None:
        return np.nan
    return float(abs(run.codes - target) <= NEAR * target)


def shares(
    runs: list[Run], best: float, target: float, *, choose: bool
) -> tuple[float, float | None]:
    """Success shares (a) and (b); with ``choose`` (b) takes the best coefficient.

    Without codes there is no (b).
    """
    a = float(np.mean([good(run, best) for run in runs]))
    if all(run.codes is None for run in runs):
        return a, None
    cells: dict[tuple[Any, ...], list[bool]] = {}
    for i, run in enumerate(runs):
        place = (run.learning_rate, run.scale, run.readout, run.start)
        place = place if choose else (i,)
        both = good(run, best) * sparse(run, target)
        cells.setdefault(place, []).append(both > 0)
    return a, float(np.mean([any(some) for some in cells.values()]))


def swept(
    path: Path, family: Family, task: Task, target: float, grid: Grid
) -> tuple[list[Run], float]:
    """The runs of a family, and seconds; every part is kept in a file at once."""
    runs, seconds = kept(path, family, grid)
    cells = len(cells_of(grid)[0])
    missing = family.sweep(task, target, grid)[len(runs) // cells :]
    if missing:
        jax.clear_caches()
    for part in missing:
        begun = time.perf_counter()
        runs += part()
        seconds += time.perf_counter() - begun
        of = {"grid": grid, "version": family.version}
        text = json.dumps({**of, "seconds": seconds, "runs": runs})
        write_whole(path, text + "\n")
    return runs, seconds


def kept(path: Path, family: Family, grid: Grid) -> tuple[list[Run], float]:
    """What a file has, whole parts of this grid by the family as it is, or nothing."""
    if not path.exists():
        return [], 0.0
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        grid_of, runs, seconds = (found[name] for name in ("grid", "runs", "seconds"))
        version, runs = found.get("version", 1), [Run(*one) for one in runs]
        whole = len(runs) % len(cells_of(grid)[0]) == 0
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"brittleness: {path} is damaged; move it away") from None
    if grid_of != json.loads(json.dumps(grid)) or not whole:
        raise SystemExit(f"brittleness: {path} is of another grid; move it away")
    if version != family.version:
        raise SystemExit(
            f"brittleness: {path} is of another version ({version}, now "
            f"{family.version}); move it away"
        )
    return runs, seconds


def members_of(runs: list[Run], best: float, target: float) -> list[Member]:
    """Runs as the maps want them."""
    return [
        Member(
            i,
            {"learning_rate": run.learning_rate, "coefficient": run.coefficient},
            {
                "share of the best": run.coverage / (best or 1),
                "codes": np.nan if run.codes is None else run.codes,
                "success (a)": float(good(run, best)),
                "success (b)": good(run, best) * sparse(run, target),
            },
            run.finite,
        )
        for i, run in enumerate(runs)
    ]


def maps(
    name: str, mine: dict[str, list[Member]], coded: Sequence[str]
) -> dict[str, tuple[Any, str]]:
    """Coverage and both successes over the grid, (b) of families with codes."""
    draw = partial(brittleness_figure, x="coefficient", y="learning_rate")
    share = {"good": 1.0, "middle": np.mean, "limits": (0.0, 1.0)}
    some = {family: mine[family] for family in coded}
    return {
        slug(name): (
            draw(mine, score="share of the best", good=1 - NEAR),
            f"{name}: coverage of the readers, as a share of the best run's; medians.",
        ),
        f"{slug(name)}-a": (
            draw(mine, score="success (a)", **share),
            f"{name}: share of a cell's runs within 10 % of the best coverage.",
        ),
        f"{slug(name)}-b": (
            draw(some, score="success (b)", **share),
            f"{name}: share of a cell's runs that also have the codes that were asked "
            "for, within 10 %, every coefficient by itself.",
        ),
    }


def slug(name: str) -> str:
    """A plain file name."""
    return name.replace(" ", "-").replace("/", "-")


def main() -> None:
    """Sweep what is missing, then print and write all of it."""
    options = parsed()
    grid, folder = GRIDS[options.size], Path(options.out)
    output_folder(folder)
    if options.json:
        output_folder(Path(options.json).parent)
    lines, families, pictures = [], {}, {}
    for name in grid.tasks:
        mine, rows = compared(name, grid, folder)
        lines += rows
        families |= {f"{name}: {family}": runs for family, runs in mine.items()}
        coded = [line["method"] for line in rows if line["b"] is not None]
        pictures |= maps(name, mine, coded)
    page = write_sweep(
        folder,
        families,
        pictures,
        title="How far methods depend on their settings",
        argument=[" ".join(part.split()) for part in str(__doc__).split("\n\n")[2:4]],
        header={"grid": options.size},
        console=Console(width=120) if options.table else None,
    )
    print(f"the page is {page.replace(folder / 'brittleness.html')}")
    if options.json:
        text = "".join(json.dumps(one) + "\n" for one in lines)
        Path(options.json).write_text(text, encoding="utf-8")


def compared(
    name: str, grid: Grid, folder: Path
) -> tuple[dict[str, list[Member]], list[dict[str, Any]]]:
    """Every family on one task: its runs for the maps, and a row each."""
    index = list(TASKS).index(name)
    task = TASKS[name](jax.random.fold_in(jax.random.key(0), index))
    target = float(tf.active_features(jax.random.key(2), task))
    paths = {family: folder / f"{slug(name)}-{family}.json" for family in FAMILIES}
    for family, path in paths.items():  # refused before the work
        kept(path, FAMILIES[family], grid)
    every = {
        family: swept(path, FAMILIES[family], task, target, grid)
        for family, path in paths.items()
    }
    best = max(run.coverage for runs, _ in every.values() for run in runs)
    mine, lines = {}, []
    for family, (runs, seconds) in every.items():
        a, b = shares(runs, best, target, choose=family == "published")
        shown = "none" if b is None else f"{b:4.0%}"
        bar = ""
        if family in OURS:
            bar = "ok" if min(a, 1.0 if b is None else b) >= WANTED else "MISSED"
            bar = f">= {WANTED:.0%}: {bar}"
        counted = f"{name:18} {family:10} (a) {a:4.0%}  (b) {shown}  {len(runs)} runs"
        print(f"{counted}  {bar}".rstrip())
        figures = {"best": best, "target": target, "a": a, "b": b}
        more = {"ours_s": seconds, "ratio": None, "error": None}
        lines.append(row(name, {"runs": len(runs)}, family, **figures, **more))
        mine[family] = members_of(runs, best, target)
    return mine, lines


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    wide = "the other tasks, a smaller grid"
    size.add_argument("--wide", action="store_true", help=wide)
    size.add_argument("--quick", action="store_true", help="one task, a small grid")
    size.add_argument("--tiny", action="store_true", help="only to see that it runs")
    parser.add_argument("--out", help="folder, out/brittleness by default")
    parser.add_argument("--json", help="also write the shares there, one per line")
    parser.add_argument("--table", action="store_true", help="print every run")
    options = parser.parse_args()
    asked = [name for name in ("wide", "quick", "tiny") if getattr(options, name)]
    options.size = asked[0] if asked else "full"
    if options.out is None:
        full = options.size == "full"
        options.out = "out/brittleness" + ("" if full else f"-{options.size}")
    return options


if __name__ == "__main__":
    main()
