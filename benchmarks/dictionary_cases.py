"""Cases of the benchmark of training steps: sizes, runners and bars."""

from typing import Any, NamedTuple

TINY = ("batch_topk", "population")


class Runner(NamedTuple):
    """One library's training in a case.

    Attributes:
      name: for tables.
      library: ``"toyfeat"`` or a peer.
      architecture: as the library calls it.
      options: of its order, besides those of the case.
    """

    name: str
    library: str
    architecture: str
    options: dict[str, Any] = {}  # noqa: RUF012


class Case(NamedTuple):
    """A dictionary to train, the runners, and the bar.

    Attributes:
      name: of the case.
      size: ``d_in``, ``d_sae``, ``batch``, and ``k``, ``l1``, ``members``.
      runners: libraries that take part; the first is ours.
      rivals: names of the runners that the bar is about.
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
    """Make runners of peers from ``library architecture``."""
    pairs = [name.split(" ") for name in names]
    return tuple(Runner(" ".join(pair), pair[0], pair[1]) for pair in pairs)


def cases(tiny: bool) -> list[Case]:
    """List all cases, of which few are tiny."""
    large = {"d_in": 512, "d_sae": 4096, "batch": 4096, "k": 32, "l1": 1.0}
    small = {"d_in": 32, "d_sae": 128, "batch": 1024, "k": 4, "l1": 1.0}
    steps, short_steps, members = 8, 200, 32
    if tiny:
        large = {"d_in": 16, "d_sae": 64, "batch": 32, "k": 2, "l1": 1.0}
        small, steps, short_steps, members = large, 2, 2, 4
    ours = {
        name: Runner(f"toyfeat {name}", "toyfeat", name)
        for name in ("standard", "topk", "batch_topk")
    }
    listed = large_cases(large, steps, ours)
    listed += small_cases(small, short_steps, members, ours["standard"])
    listed += [attribution_case(large, steps, runner) for runner in ours.values()]
    return [case for case in listed if not tiny or case.name in TINY]


LEARNING = "dictionary_learning standard"
DENSE = peers(LEARNING, "dictionary_learning april", "sae_lens standard")
TOPK = peers("sae_lens topk", "dictionary_learning topk", "sparsify topk")
BATCH_TOPK = peers("sae_lens batchtopk", "dictionary_learning batchtopk")


def names_of(runners: tuple[Runner, ...]) -> tuple[str, ...]:
    """Names of runners."""
    return tuple(runner.name for runner in runners)


def large_cases(
    size: dict[str, Any], steps: int, ours: dict[str, Runner]
) -> list[Case]:
    """Cases whose products take most of the time."""
    return [
        Case(
            name="standard",
            size=size,
            runners=(ours["standard"], *DENSE),
            rivals=(LEARNING,),
            bar=1.2,
            steps=steps,
        ),
        Case(
            name="topk",
            size=size,
            runners=(ours["topk"], *TOPK),
            rivals=names_of(TOPK),
            bar=1.25,
            steps=steps,
        ),
        Case(
            name="batch_topk",
            size=size,
            runners=(ours["batch_topk"], *BATCH_TOPK, TOPK[-1]),
            rivals=names_of(BATCH_TOPK),
            bar=1.25,
            steps=steps,
        ),
    ]


def small_cases(
    size: dict[str, Any], steps: int, members: int, ours: Runner
) -> list[Case]:
    """Cases whose overheads count, and a population of them."""
    group = ours._replace(options={"group": min(members, 4)})
    return [
        Case(
            name="small",
            size=size,
            runners=(ours, *DENSE),
            rivals=names_of(DENSE),
            bar=2.0,
            steps=steps,
        ),
        Case(
            name="population",
            size={**size, "members": members},
            runners=(group, *DENSE),
            rivals=names_of(DENSE),
            bar=4.0,
            steps=max(2, steps // 2),
        ),
    ]


def attribution_case(size: dict[str, Any], steps: int, runner: Runner) -> Case:
    """The cost of attributions: the plain step over the one that has them."""
    costs = [
        runner._replace(
            name=f"{runner.name}, attributions of {k}",
            options={"attribution": True, "readouts": k},
        )
        for k in (1, 4)
    ]
    return Case(
        name=f"attribution {runner.architecture}",
        size=size,
        runners=(*costs, runner),
        rivals=(runner.name,),
        bar=1 / 1.5,
        steps=steps,
    )
