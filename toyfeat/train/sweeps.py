"""Many settings at once: a grid that goes in, a table that comes out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.types import Array, ArrayLike, Member, TrainState


def grid(*, seed: Any = 0, **axes: Any) -> dict[str, Array]:
    """Every combination of settings, for the ``init`` of a population.

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
    whole = {"seed": np.atleast_1d(np.asarray(seed))}
    whole |= {name: np.atleast_1d(np.asarray(x)) for name, x in axes.items()}
    for name, values in whole.items():
        fits = values.ndim == 1 and values.size and values.dtype.kind in "iuf"
        if not fits or not np.isfinite(values).all():
            raise ValueError(
                f"grid: {name} must be a number or a list of them, all finite, got "
                f"{(axes | {'seed': seed})[name]!r}"
            )
    if whole["seed"].dtype.kind == "f":
        raise ValueError(f"grid: a seed is an int, got {seed!r}")
    if np.any(np.abs(whole["seed"]) > np.iinfo(np.int32).max):
        raise ValueError(f"grid: a seed must fit 32 bits, got {seed!r}")
    most = np.finfo(np.float32).max
    for name, values in whole.items():
        if name == "keys" or np.any(np.abs(values) > most):
            raise ValueError(
                f"grid: {name} must be the name of a hyper-parameter (keys come of "
                f"seed) with values that float32 has, got {axes.get(name)!r}"
            )
    flat = [x.ravel() for x in np.meshgrid(*whole.values(), indexing="ij")]
    keys = jax.vmap(jax.random.key)(jnp.asarray(flat[0]))
    return {"keys": keys} | {
        name: jnp.asarray(x, float) for name, x in zip(axes, flat[1:], strict=True)
    }


def final_metrics(directory: str | Path, *, steps: int = 100) -> dict[str, np.ndarray]:
    """Means of the metrics over the end of a run that :func:`fit` wrote.

    Args:
      directory: of the run.
      steps: how many of the last steps; a chunk that is in part among them counts
        as a whole.

    Returns:
      Name to ``[]`` or ``[P]``, NaN where a metric was not finite; ``finite`` is
      whether it always was.

    Raises:
      FileNotFoundError: if there is no ``metrics.jsonl`` with a line.

    Example:
      ``final_metrics("out/run", steps=500)["fvu"]``
    """
    path = Path(directory) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        raise FileNotFoundError(
            f"final_metrics: no metrics in {path}; give fit the same directory first"
        )
    rows = [json.loads(line) for line in lines]
    ends = np.array([row["step"] for row in rows])
    lengths = np.diff(ends, prepend=0)
    if len(lengths) > 1:  # the first chunk may not have begun at 0
        lengths[0] = min(lengths[0], lengths[1:].max())
    last = [int(i) for i in np.flatnonzero(ends > ends[-1] - steps)]
    found = {}
    for name in (n for n in rows[-1] if n not in ("step", "seconds", "examples_per_s")):
        values = np.stack([np.asarray(rows[i][name], np.float64) for i in last])
        found[name] = np.average(values, axis=0, weights=lengths[last])
        if name == "finite":
            found[name] = values.min(0)
    return found


def sweep_table(
    state: TrainState,
    metrics: Mapping[str, ArrayLike],
    *,
    settings: Mapping[str, ArrayLike] | None = None,
    scores: Mapping[str, ArrayLike] | None = None,
) -> list[Member]:
    """What became of every member of a population.

    Args:
      state: at the end, of :func:`fit`; of one member or ``P``.
      metrics: name to ``[P]``: of :func:`final_metrics`, or what ``on_chunk`` was
        given last.
      settings: name to ``[P]``, shown beside the hyper-parameters that vary; what
        :func:`grid` returned may be given as it is, its ``keys`` become ``start``, a
        number for every different one.
      scores: name to ``[P]``, figures from elsewhere, such as scores on data that
        were held out.

    Returns:
      One :class:`Member` per member, in order.  Figures are the metrics (``dead``
      latents among them) and the scores; the metric of a term, which has the name of
      its coefficient, is called ``..._loss``.

    Raises:
      ValueError: if something has not one value per member.

    Example:
      >>> from toyfeat import TrainState
      >>> hyper = {"rate": jnp.array([0.1, 9.0]), "clip": jnp.ones(2)}
      >>> params = {"w": jnp.array([[1.0], [jnp.nan]])}
      >>> state = TrainState(jnp.array([5, 5]), params, (), (), {}, hyper)
      >>> rows = sweep_table(state, {"loss": np.array([0.5, np.nan])})
      >>> [row.settings["rate"] for row in rows], [row.finite for row in rows]
      ([0.1, 9.0], [True, False])
    """
    num = np.size(state.step)
    varied = {n: _per_member("hyper", n, x, num) for n, x in state.hyper.items()}
    varied = {n: x for n, x in varied.items() if len(np.unique(x)) > 1}
    for name, values in (settings or {}).items():
        if name == "keys":
            varied["start"] = _numbered(values, num)
        elif name not in state.hyper:
            varied[name] = _per_member("settings", name, values, num)
    figures = {
        f"{n}_loss" if n in state.hyper else n: _per_member("metrics", n, x, num)
        for n, x in metrics.items()
    }
    figures |= {n: _per_member("scores", n, x, num) for n, x in (scores or {}).items()}
    finite = _finite(state, num) & np.isfinite(figures.get("loss", np.zeros(num)))
    finite &= figures.pop("finite", np.ones(num)) > 0
    saturated = figures.pop("saturated", np.zeros(num)) > 0.5
    return [
        Member(
            i,
            {n: _short(x[i]) for n, x in varied.items()},
            {n: float(x[i]) for n, x in figures.items()},
            bool(finite[i]),
            bool(saturated[i]),
        )
        for i in range(num)
    ]


def pareto_front(
    members: Sequence[Member], x: str, y: str, *, larger: Sequence[str] = ()
) -> list[Member]:
    """Members that no other beats in both of two figures.

    One member beats another if it is as good in both and better in one.  Members
    that are not finite take no part.

    Args:
      members: rows of a table.
      x: a figure or a setting.
      y: another.
      larger: which of the two should be large; small is good otherwise.

    Returns:
      The front, by ascending ``x``.

    Raises:
      ValueError: for a name that the members have not, or one in ``larger`` that is
        neither.

    Example:
      >>> pairs = [(2.0, 0.1), (1.0, 0.3), (3.0, 0.2)]
      >>> rows = [Member(i, {}, {"l0": a, "fvu": b}) for i, (a, b) in enumerate(pairs)]
      >>> [row.index for row in pareto_front(rows, "l0", "fvu")]
      [1, 0]
    """
    if extra := set(larger) - {x, y}:
        raise ValueError(f"pareto_front: larger names {sorted(extra)}, not {x} or {y}")
    points = np.array([[value_of(m, x), value_of(m, y)] for m in members])
    points = points.reshape(-1, 2)
    there = np.isfinite(points).all(1) & np.array([m.finite for m in members], bool)
    points = points * np.where(np.isin([x, y], list(larger)), -1.0, 1.0)
    front = []
    for i in map(int, np.flatnonzero(there)):
        others = points[there]
        beaten = (others <= points[i]).all(1) & (others < points[i]).any(1)
        if not beaten.any():
            front.append(members[i])
    return sorted(front, key=lambda m: value_of(m, x))


def value_of(member: Member, name: str) -> float:
    """A figure or a setting of a member.

    Raises:
      ValueError: if it has none of that name.
    """
    known = {**member.settings, **member.figures}
    if name not in known:
        raise ValueError(
            f"sweep: members have no {name!r}; they have {', '.join(sorted(known))}"
        )
    return known[name]


def _per_member(what: str, name: str, values: Any, num: int) -> np.ndarray:
    array = np.atleast_1d(np.asarray(values, np.float64))
    if array.shape != (num,):
        raise ValueError(
            f"sweep_table: {what} must have one value for each of {num} members, got "
            f"{name} of shape {array.shape}"
        )
    return array


def _numbered(keys: Any, num: int) -> np.ndarray:
    """Which keys are the same, numbered as they come."""
    if keys.shape != (num,):
        raise ValueError(
            f"sweep_table: settings must have one value for each of {num} members, got "
            f"keys of shape {keys.shape}"
        )
    words = [tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()]
    places = {word: place for place, word in enumerate(dict.fromkeys(words))}
    return np.array([places[word] for word in words], np.float64)


def _finite(state: TrainState, num: int) -> np.ndarray:
    finite = np.ones(num, bool)
    for leaf in jax.tree.leaves(state.params):
        finite &= np.isfinite(np.asarray(leaf, np.float64).reshape(num, -1)).all(1)
    return finite


def _short(value: float) -> float:
    """What was meant by a number that went through single precision."""
    return float(f"{value:.6g}")
