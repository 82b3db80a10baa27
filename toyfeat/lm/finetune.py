"""Fine-tune dictionaries on whole windows of tokens, by what they do to the model."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_int
from toyfeat.data.batches import Batches
from toyfeat.dictionary import losses
from toyfeat.dictionary.types import Dictionary, Term
from toyfeat.train.fit import fit
from toyfeat.train.normalization import denormalized, warm_start
from toyfeat.train.population import population
from toyfeat.train.trainer import trainer
from toyfeat.train.types import Trainer, TrainState
from toyfeat.types import Array, ArrayLike, Params, Taps

_CHUNK = 25
"""Updates per compiled call: fine-tuning is short, and a chunk is what a kill loses."""


class WindowTaps(NamedTuple):
    """Taps of a site, window by window.

    Attributes:
      acts: ``[num, T, D]``.
      weights: ``[num, T]``, 0 at tokens that do not count.
      grads: ``[num, T, K, D]`` in any floating-point dtype, or ``None``.
      entry: ``[num, T, E]``, the residual stream that the model behind the site starts
        from, or ``None`` where that is ``acts``.
      expansion: :class:`toyfeat.losses.Expansion` with leading axes ``[num, T]``, from
        :func:`toyfeat.lm.expansion.expand_kl`, or ``None``.
    """

    acts: ArrayLike
    weights: ArrayLike
    grads: ArrayLike | None = None
    entry: ArrayLike | None = None
    expansion: losses.Expansion | None = None


def window_order(num: int, *, windows: int, seed: int, steps: int) -> np.ndarray:
    """Draw which of ``num`` windows are in which batch, ``[steps, windows]``.

    Raises:
      ValueError: if there are too few windows.
    """
    check_int("window_batches", "windows", windows)
    check_int("window_batches", "steps", steps)
    if steps * windows > num:
        raise ValueError(
            f"window_batches: {steps} steps of {windows} windows must be at most the "
            f"{num} there are, so that no token is seen twice; give fewer steps"
        )
    order = np.random.default_rng(seed).permutation(num)[: steps * windows]
    return order.reshape(steps, windows)


def window_batches(
    taps: WindowTaps, *, windows: int, seed: int, steps: int, params: Params = None
) -> Batches:
    """Batches of whole windows in random order, none of them twice.

    Args:
      taps: of all windows, held in memory.
      windows: per batch.
      seed: of the order.
      steps: number of batches.
      params: of the model, for terms that run it (:func:`toyfeat.losses.spliced_kl`).

    Returns:
      Batches for :func:`toyfeat.fit`, in float32, with a context of
      :class:`toyfeat.losses.Windows` where there are ``params``, and of
      :class:`toyfeat.losses.Expansion` where the taps have one.

    Raises:
      ValueError: if there are too few windows, or params and an expansion.
    """
    num = len(taps.weights)
    order = window_order(num, windows=windows, seed=seed, steps=steps)
    if params is not None and taps.expansion is not None:
        raise ValueError(
            "window_batches: a batch has one context, got params and an expansion; "
            "give params for terms that run the model only"
        )
    data = {
        "taps": jax.tree.map(jnp.asarray, taps),
        "order": jnp.asarray(order),
        "params": params,
    }
    return Batches(_take_windows, data)


def _take_windows(data: Any, step: Array) -> Taps:
    """Select the windows of a step, and flatten them to rows."""
    rows = data["order"][step]
    chosen = jax.tree.map(lambda x: x[rows].astype(jnp.float32), data["taps"])
    num = chosen.weights.size
    context: Any = None
    if chosen.expansion is not None:
        flatten = partial(_flatten_rows, num)
        context = jax.tree.map(flatten, chosen.expansion)
    if data["params"] is not None:
        entry = chosen.acts if chosen.entry is None else chosen.entry
        context = losses.Windows(data["params"], chosen.acts, entry)
    grads = chosen.grads
    return Taps(
        chosen.acts.reshape(num, -1),
        None if grads is None else grads.reshape(num, *grads.shape[2:]),
        chosen.weights.reshape(num),
        context=context,
    )


def _flatten_rows(num: int, values: Array) -> Array:
    """Merge the axes of windows and tokens."""
    return values.reshape(num, *values.shape[2:])


def finetune(
    dictionary: Dictionary,
    params: Any,
    batches: Batches | Callable[[Any], Batches],
    term: Term | None = None,
    *,
    steps: int,
    learning_rate: float,
    refreshes: int = 1,
    weight: float = 1.0,
    reconstruction: float = 1.0,
    directory: str | Path | None = None,
    on_chunk: Callable[..., None] | None = None,
) -> Any:
    """Fine-tune a dictionary by its reconstruction error and one term more.

    Or several of one architecture and size, side by side on the same batches, as a
    population: for :func:`toyfeat.losses.shared_kl`.

    The learning rate falls to 0 in a line.  The term's coefficient is such that it
    weighs ``weight`` times the reconstruction error in the first batch.

    Args:
      dictionary: of any architecture.
      params: for taps in their own units, as :func:`toyfeat.denormalized` and
        :func:`toyfeat.interop.load_saelens` return; or a list of those of several
        dictionaries.
      batches: from :func:`window_batches`; or a function of the parameters so far (for
        taps in their own units) that makes them, each time for all ``steps``, for
        terms of what a dictionary does, such as :func:`toyfeat.losses.expanded_kl`.
      term: :func:`toyfeat.losses.fisher`, :func:`toyfeat.losses.spliced_kl` or another;
        ``None`` for the reconstruction error alone.
      steps: of training.
      learning_rate: of Adam, at the start.
      refreshes: how many times batches are made, before equal parts of the steps.
      weight: of the term, relative to the reconstruction error at the start.
      reconstruction: coefficient of the reconstruction error.
      directory: of the run, which is resumed there.
      on_chunk: as of :func:`toyfeat.fit`.

    Returns:
      Parameters for taps in their own units, a list of them if a list was given.

    Raises:
      TypeError: for parameters that are no dictionary's.
      ValueError: for parameters of another width or number of latents, or none; for a
        term that is not above 0 in the first batch; for batches of fewer steps; for
        refreshes of batches that are no function, or in a directory, where a run that
        was cut off would need the batches of its own past.
    """
    _check_refreshes(batches, refreshes, steps, directory)
    make = batches if not isinstance(batches, Batches) else lambda _: batches
    params = _check_params(params)
    now = _made(make, params, steps)
    objective = (losses.reconstruction()._replace(coefficient=reconstruction),)
    if term is not None:
        objective += (term,)
    first = jax.jit(now.take)(now.data, jnp.int32(0))
    run = trainer(
        dictionary,
        objective,
        readouts=1 if first.grads is None else first.grads.shape[1],
        center=False,
        warm_up=0,
        schedule=lambda step: 1 - step / steps,
    )

    bare = first._replace(context=None)
    start = partial(_start, run, params, bare, learning_rate=learning_rate)
    run = population(run) if isinstance(params, list) else run
    state = _balance(run, start, first, term, weight)
    options: dict[str, Any] = {"chunk": min(_CHUNK, steps), "checkpoint_every": 4}
    options |= {"directory": directory, "on_chunk": on_chunk}
    options |= {"check_data": False, "progress": False}
    for part in range(refreshes):
        if part:
            now = _made(make, _in_own_units(dictionary, state, params), steps)
        end = (part + 1) * steps // refreshes
        state = fit(run, state, now, steps=end, **options)
    return _in_own_units(dictionary, state, params)


def _start(run: Trainer, params: Any, taps: Taps, **hyper: Any) -> TrainState:
    """Start the state of a dictionary, or of a list of them with a leading axis."""
    key = jax.random.key(0)
    if not isinstance(params, list):
        return warm_start(run, key, params, taps, **hyper)
    states = [warm_start(run, key, member, taps, **hyper) for member in params]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _in_own_units(dictionary: Dictionary, state: TrainState, params: Any) -> Any:
    """Return parameters for taps in their own units, in a list as ``params`` is."""
    if not isinstance(params, list):
        return denormalized(dictionary, state)
    members = (jax.tree.map(lambda x, i=i: x[i], state) for i in range(len(params)))
    return [denormalized(dictionary, member) for member in members]


def _check_params(params: Any) -> Any:
    """Return parameters of a dictionary, or a list of them.

    Raises:
      TypeError: if they are something else.
      ValueError: if the list is empty.
    """
    several = isinstance(params, list | tuple)
    for member in params if several else [params]:
        if not isinstance(member, Mapping):
            raise TypeError(
                "finetune: params must be names to arrays of a dictionary, or a list "
                f"of such, got {type(member).__name__}; give what load_saelens returns "
                "second"
            )
    if several and not params:
        raise ValueError(
            "finetune: params must be of one dictionary or more, got an empty list; "
            "give the parameters of each"
        )
    return list(params) if several else params


def _made(make: Callable[[Params], Batches], params: Params, steps: int) -> Batches:
    """Make batches, and check that they last: a missing one would be the last again."""
    batches = make(params)
    order = batches.data.get("order") if isinstance(batches.data, Mapping) else None
    if order is not None and len(order) < steps:
        raise ValueError(
            f"finetune: wanted batches of {steps} steps, got {len(order)}; the step "
            "goes on counting after a refresh, so make those of all steps each time"
        )
    return batches


def _check_refreshes(
    batches: Any, refreshes: int, steps: int, directory: str | Path | None
) -> None:
    """Refuse refreshes of what cannot be made again."""
    check_int("finetune", "refreshes", refreshes, most=steps, about=", the steps")
    fixed = isinstance(batches, Batches)
    if refreshes > 1 and (fixed or directory is not None):
        got = "batches that are made already" if fixed else f"directory {directory}"
        raise ValueError(
            f"finetune: {refreshes} refreshes want a function that makes batches, and "
            f"no directory, got {got}; give one refresh"
        )


def _balance(
    run: Trainer,
    start: Callable[..., TrainState],
    first: Taps,
    term: Term | None,
    weight: float,
) -> TrainState:
    """Start with the coefficient that makes a term as large as it is to be."""
    state = start()
    if term is None:
        return state
    # Terms are metrics, so that one update that is thrown away tells their sizes: of a
    # population the means over its members, which share a coefficient.
    _, sizes = jax.jit(run.update)(state, first)
    error, size = (float(jnp.mean(sizes[n])) for n in ("reconstruction", term.name))
    if not size > 0:
        raise ValueError(
            f"finetune: {term.name} must be above 0 in the first batch, which sets its "
            f"coefficient, got {size} beside a reconstruction error of {error}; give "
            "tokens that count, and dictionaries that change the model"
        )
    ratio = weight * error / size
    return start(**{term.name: float(f"{ratio:.3g}")})
