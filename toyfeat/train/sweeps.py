"""Sweeps: a grid of settings for a population, and a table of its results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import as_host_floats, check_int, check_type
from toyfeat.train.health import SATURATED_SHARE
from toyfeat.train.types import TrainState
from toyfeat.types import Array, ArrayLike


class Row(NamedTuple):
    """The results of one member of a population, a row of a sweep's table.

    Attributes:
      index: of the member in the population.
      settings: the hyper-parameters in which members differ.
      figures: metrics at the end of training, and scores.
      finite: whether loss and parameters stayed finite.
      saturated: whether the controller was at a bound, so that its target was not
        reached.
    """

    index: int
    settings: dict[str, float]
    figures: dict[str, float]
    finite: bool = True
    saturated: bool = False


_LARGEST_SEED = np.iinfo(np.int32).max
_LARGEST_VALUE = np.finfo(np.float32).max
_FLOAT32_DIGITS = np.finfo(np.float32).precision  # decimal digits of a float32


def grid(*, seed: Any = 0, **axes: Any) -> dict[str, Array]:
    """Build every combination of settings, for the ``init`` of a population.

    Args:
      seed: of the random start, one for all members (so that they differ by their
        settings alone) or several, which are an axis, the slowest.
      axes: hyper-parameter to one value or a list of them; the last varies fastest.

    Returns:
      ``keys`` and every hyper-parameter, each ``[P]``.

    Raises:
      ValueError: if an axis is empty or not a list of finite numbers.

    Example:
      >>> settings = grid(learning_rate=[1e-3, 1e-2], sparsity=[0.1, 1.0, 10.0])
      >>> settings["keys"].shape, settings["sparsity"].tolist()[:4]
      ((6,), [0.10000000149011612, 1.0, 10.0, 0.10000000149011612])

      ``population(trainer(...)).init(**settings)`` starts them.
    """
    # Every axis must be a vector of finite numbers.
    if "keys" in axes:
        raise ValueError(
            "grid: keys come of seed, got keys as a hyper-parameter; pass seed="
        )
    vectors = {n: _axis(n, x) for n, x in {"seed": seed, **axes}.items()}
    seeds = vectors["seed"]
    if seeds.dtype.kind == "f" or np.any(np.abs(seeds) > _LARGEST_SEED):
        raise ValueError(
            f"grid: a seed must be an int that fits 32 bits, got {seed!r:.80}; pass "
            "ints such as 0"
        )
    # The seed comes first, so it is the slowest axis.
    flat = [x.ravel() for x in np.meshgrid(*vectors.values(), indexing="ij")]
    keys = jax.vmap(jax.random.key)(jnp.asarray(flat[0]))
    return {"keys": keys} | {
        name: jnp.asarray(x, float) for name, x in zip(axes, flat[1:], strict=True)
    }


def _axis(name: str, value: Any) -> np.ndarray:
    """Convert an axis of a grid to a vector of finite numbers.

    Raises:
      ValueError: if it is something else, or has no number.
    """
    try:
        values = np.atleast_1d(np.asarray(value))
    except ValueError:  # lists of different lengths
        values = np.zeros(0)
    numbers = values.ndim == 1 and values.size > 0 and values.dtype.kind in "iuf"
    if not numbers or not np.all(np.abs(values) <= _LARGEST_VALUE):
        raise ValueError(
            f"grid: {name} must be a number or a list of them, all finite in float32, "
            f"got {value!r:.80}; pass one or more numbers"
        )
    return values


def final_metrics(directory: str | Path, *, steps: int = 100) -> dict[str, np.ndarray]:
    """Average the metrics of the last steps of a run.

    Args:
      directory: of a run of :func:`toyfeat.fit`.
      steps: how many of the last steps; a chunk that is partly among them counts
        fully.

    Returns:
      Name to ``[]`` or ``[P]``, NaN where a metric was not finite; ``finite`` is
      whether it always was.

    Raises:
      FileNotFoundError: if there is no ``metrics.jsonl`` with a line.
      TypeError: if ``steps`` is no int.
      ValueError: if ``steps`` is not positive.

    Example:
      ``final_metrics("out/run", steps=500)["fvu"]``
    """
    steps = check_int("final_metrics", "steps", steps)
    path = Path(directory) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        raise FileNotFoundError(
            f"final_metrics: no metrics in {path}; give fit the same directory first"
        )
    # Every line is the mean of a chunk: weigh it by the length of the chunk.
    rows = [json.loads(line) for line in lines]
    ends = np.array([row["step"] for row in rows])
    lengths = np.diff(ends, prepend=0)
    if len(lengths) > 1:  # the first chunk may not have begun at 0
        lengths[0] = min(lengths[0], lengths[1:].max())
    last = [int(i) for i in np.flatnonzero(ends > ends[-1] - steps)]
    means = {}
    for name in (n for n in rows[-1] if n not in ("step", "seconds", "examples_per_s")):
        values = np.stack([np.asarray(rows[i][name], np.float64) for i in last])
        means[name] = np.average(values, axis=0, weights=lengths[last])
        if name == "finite":
            means[name] = values.min(0)
    return means


def table(
    state: TrainState,
    metrics: Mapping[str, ArrayLike],
    *,
    settings: Mapping[str, ArrayLike] | None = None,
    scores: Mapping[str, ArrayLike] | None = None,
) -> list[Row]:
    """Tabulate the settings and results of every member of a population.

    Args:
      state: the final state of :func:`toyfeat.fit`, of one member or ``P``.
      metrics: name to ``[P]``, from :func:`final_metrics` or the last call of
        ``on_chunk``.
      settings: name to ``[P]``, added to the hyper-parameters that vary; may be the
        result of :func:`grid`, whose ``keys`` become ``start``, a number for every
        different one.
      scores: name to ``[P]``, other figures, such as scores on held-out data.

    Returns:
      One :class:`Row` per member, in order.  Figures are the metrics (``dead``
      latents among them) and the scores; the metric of a term, which has the name of
      its coefficient, is called ``..._loss``.

    Raises:
      TypeError: if an argument is of another type.
      ValueError: if an entry does not have one value per member, or no numbers.

    Example:
      >>> from toyfeat import TrainState
      >>> hyper = {"rate": jnp.array([0.1, 9.0]), "clip": jnp.ones(2)}
      >>> params = {"w": jnp.array([[1.0], [jnp.nan]])}
      >>> state = TrainState(jnp.array([5, 5]), params, (), (), {}, hyper)
      >>> rows = table(state, {"loss": np.array([0.5, np.nan])})
      >>> [row.settings["rate"] for row in rows], [row.finite for row in rows]
      ([0.1, 9.0], [True, False])
    """
    check_type("table", "state", state, TrainState, hint="toyfeat.fit returns it")
    for name, values in {"metrics": metrics, "settings": settings or {}}.items():
        check_type("table", name, values, Mapping, hint="pass a dict of arrays")
    # Settings: the hyper-parameters that vary, and what else members differ in.
    num = np.size(state.step)
    varied = {n: _per_member("hyper", n, x, num) for n, x in state.hyper.items()}
    varied = {n: x for n, x in varied.items() if len(np.unique(x)) > 1}
    for name, values in (settings or {}).items():
        if name == "keys":
            varied["start"] = _number_keys(values, num)
        elif name not in state.hyper:
            varied[name] = _per_member("settings", name, values, num)
    # Figures: metrics and scores; the metric of a term must not hide its coefficient.
    figures = {
        f"{n}_loss" if n in state.hyper else n: _per_member("metrics", n, x, num)
        for n, x in metrics.items()
    }
    figures |= {n: _per_member("scores", n, x, num) for n, x in (scores or {}).items()}
    # Flags: a member is finite if its parameters, its loss and every chunk were.
    loss = figures.get("loss", np.zeros(num))
    finite = _finite_params(state, num) & np.isfinite(loss)
    finite &= figures.pop("finite", np.ones(num)) > 0
    saturated = figures.pop("saturated", np.zeros(num)) > SATURATED_SHARE
    return [
        Row(
            index=i,
            settings={n: _round_float32(x[i]) for n, x in varied.items()},
            figures={n: float(x[i]) for n, x in figures.items()},
            finite=bool(finite[i]),
            saturated=bool(saturated[i]),
        )
        for i in range(num)
    ]


def pareto_front(
    members: Sequence[Row], x: str, y: str, *, larger: Sequence[str] = ()
) -> list[Row]:
    """Select the Pareto front of two figures: members that no other one dominates.

    One member dominates another if it is as good in both figures and better in one.
    Members that are not finite are left out.

    Args:
      members: rows of a table.
      x: name of a figure or a setting.
      y: name of another.
      larger: which of the two are better when larger; the others when smaller.

    Returns:
      The front, by ascending ``x``.

    Raises:
      TypeError: if members are no rows of a table.
      ValueError: for a name that the members do not have, or one in ``larger`` that
        is neither.

    Example:
      >>> pairs = [(2.0, 0.1), (1.0, 0.3), (3.0, 0.2)]
      >>> rows = [Row(i, {}, {"l0": a, "fvu": b}) for i, (a, b) in enumerate(pairs)]
      >>> [row.index for row in pareto_front(rows, "l0", "fvu")]
      [1, 0]
    """
    for member in members:
        check_type("pareto_front", "a member", member, Row, hint="table() makes them")
    larger = (larger,) if isinstance(larger, str) else larger
    if extra := set(larger) - {x, y}:
        raise ValueError(f"pareto_front: larger names {sorted(extra)}, not {x} or {y}")
    points = np.array([[value_of(m, x), value_of(m, y)] for m in members])
    points = points.reshape(-1, 2)
    finite = np.isfinite(points).all(1) & np.array([m.finite for m in members], bool)
    # Turn the signs so that smaller is better in both.
    points = points * np.where(np.isin([x, y], list(larger)), -1.0, 1.0)
    front = []
    for i in map(int, np.flatnonzero(finite)):
        others = points[finite]
        dominates = (others <= points[i]).all(1) & (others < points[i]).any(1)
        if not dominates.any():
            front.append(members[i])
    return sorted(front, key=lambda m: value_of(m, x))


def value_of(member: Row, name: str) -> float:
    """Return a figure or a setting of a member by name.

    Raises:
      ValueError: if the member has neither.
    """
    values = {**member.settings, **member.figures}
    if name not in values:
        raise ValueError(
            f"sweep: members have no {name!r}; they have {', '.join(sorted(values))}"
        )
    return values[name]


def _per_member(what: str, name: str, values: Any, num: int) -> np.ndarray:
    """Convert to an array with one value per member, or raise."""
    array = np.atleast_1d(as_host_floats("table", f"{name} of the {what}", values))
    if array.shape != (num,):
        raise ValueError(
            f"table: {what} must have one value for each of {num} members, got "
            f"{name} of shape {array.shape}"
        )
    return array


def _number_keys(keys: Any, num: int) -> np.ndarray:
    """Number the different keys in order of appearance, ``[P]``."""
    if keys.shape != (num,):
        raise ValueError(
            f"table: settings must have one value for each of {num} members, got "
            f"keys of shape {keys.shape}"
        )
    words = [tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()]
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return np.array([numbers[word] for word in words], np.float64)


def _finite_params(state: TrainState, num: int) -> np.ndarray:
    """Return which members have finite parameters, ``[P]`` bool."""
    finite = np.ones(num, bool)
    for leaf in jax.tree.leaves(state.params):
        finite &= np.isfinite(np.asarray(leaf, np.float64).reshape(num, -1)).all(1)
    return finite


def _round_float32(value: float) -> float:
    """Round to the digits of float32: 0.1 instead of 0.10000000149."""
    return float(f"{value:.{_FLOAT32_DIGITS}g}")
