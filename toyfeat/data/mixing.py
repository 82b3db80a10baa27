"""Examples made on the fly, mixed over many calls of what makes them."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from toyfeat.data.permutation import LARGEST, host_words, permuted
from toyfeat.types import Taps

_EMPTY_CALLS = 100


def mixing_buffer(
    source: Callable[[int], Taps],
    *,
    rows: int,
    batch: int,
    keep: float = 0.5,
    seed: int,
) -> "MixingBuffer":
    """Batches from a buffer that is refilled whenever a part of it has been served.

    A refill adds a generation of ``(1 - keep) rows`` new rows, and the batches up to
    the next refill serve as many.  A row is served ``j`` refills after its own, in
    random order there; ``j`` is drawn evenly from ``0 .. a - 1`` by a permutation of
    the generation, with ``a = (1 + keep) / (1 - keep)`` (a mix of two neighbours if
    that is no integer), which is what makes the buffer hold ``rows``.  So the rows of
    one call of the source are spread over ``a`` refills, ``(1 + keep) rows / batch``
    batches; at ``keep = .5`` three refills.  No row waits longer, so what the
    buffer holds follows from three integers: a restore calls the source again for
    ``(1 + keep) rows`` rows at most, and goes on bit by bit.

    Args:
      source: ``index -> Taps`` for ``index`` 0, 1, ...; a pure function, any number
        of rows a call, such as a tap on chunk ``index`` of a text.  Rows of weight 0
        are dropped.
      rows: what the buffer holds after a refill, in host memory, to within a batch.
      batch: rows per step.
      keep: share of the buffer that stays when it is refilled, in ``[0, 1)``.
      seed: of the order, an int of at least 0.

    Returns:
      :class:`MixingBuffer`: call it with the step; ``state()`` and ``restore(state)``.

    Raises:
      ValueError: if the sizes do not fit; later, in a call, if the source changes
        shape or dtype or gives nothing, or steps are not asked for in order.

    Example:
      >>> def source(index):
      ...     acts = np.full((5, 2), index, np.float32)
      ...     return Taps(acts, None, np.ones(5, np.float32))
      >>> batches = mixing_buffer(source, rows=40, batch=4, seed=0)
      >>> first = [batches(step) for step in range(7)]
      >>> state = batches.state()
      >>> again = mixing_buffer(source, rows=40, batch=4, seed=0)
      >>> again.restore(state)
      >>> bool((again(7).acts == batches(7).acts).all())
      True

    References:
      The buffer of SAELens, which keeps rows for ever longer with ever smaller
      probability and so cannot be restored from a few integers.
    """
    if not (isinstance(batch, int) and batch >= 1):
        raise ValueError(f"mixing_buffer: batch must be an int above 0, got {batch!r}")
    if not (isinstance(rows, int) and batch <= rows <= LARGEST):
        raise ValueError(
            f"mixing_buffer: rows must be an int in {batch} (a batch) .. {LARGEST}, "
            f"got {rows!r}"
        )
    if not 0 <= keep < 1:
        raise ValueError(f"mixing_buffer: keep must be in [0, 1), got {keep!r}")
    if not (isinstance(seed, int) and seed >= 0):
        raise ValueError(f"mixing_buffer: seed must be an int above -1, got {seed!r}")
    return MixingBuffer(source, rows, batch, keep, seed)


class MixingBuffer:
    """Batches by step; what it holds can be told in three integers."""

    def __init__(
        self,
        source: Callable[[int], Taps],
        rows: int,
        batch: int,
        keep: float,
        seed: int,
    ):
        self._batch, self._seed = batch, seed
        self._steps = max(1, round(rows * (1 - keep) / batch))
        self._parts = _part_sizes(self._steps * batch, rows)
        self._settings = {"rows": rows, "batch": batch, "keep": keep, "seed": seed}
        self._stream = _Stream(source)
        self._begin(0, (0, 0))

    def _begin(self, step: int, cursor: tuple[int, int]) -> None:
        """Nothing is gathered until the first batch is asked for."""
        self._step, self._refill = step, step // self._steps
        self._cursors, self._waiting, self._ready = [cursor], [], None

    def __call__(self, step: int) -> Taps:
        """The batch of a step: of this refill, or the first of the next.

        Args:
          step: counted from 0.

        Returns:
          :class:`Taps` of ``batch`` rows, weights above 0.

        Raises:
          ValueError: if the step lies further off, or the source fails.
        """
        refill, at = divmod(int(step), self._steps)
        first = self._refill * self._steps
        last = first + self._steps - (self._ready is None)
        if not first <= step <= last:
            raise ValueError(
                f"mixing_buffer: wanted a step in {first} .. {last}, got {step}; steps "
                "come in order, restore(state) goes back"
            )
        if refill > self._refill or self._ready is None:
            self._fill(refill)
        low = at * self._batch
        self._step = int(step) + 1
        return jax.tree.map(
            lambda x: jax.device_put(x[low : low + self._batch]), self._ready
        )

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` wants: the next step, where the source is, settings."""
        call, row = self._cursors[self._step // self._steps - self._refill]
        return {"step": self._step, "call": call, "row": row, **self._settings}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a buffer with the same source and settings was.

        Args:
          state: from :meth:`state`, as it is or as numbers of numpy.

        Raises:
          ValueError: if the settings were others.
        """
        for name, value in self._settings.items():
            if state.get(name) != value:
                raise ValueError(
                    f"mixing_buffer: the state has {name} = {state.get(name)}, the "
                    f"buffer {value}; use the same settings"
                )
        self._begin(int(state["step"]), (int(state["call"]), int(state["row"])))

    def _fill(self, refill: int) -> None:
        """Gather what is missing for a refill; nothing is changed if that fails."""
        oldest = refill - len(self._parts) + 1
        cursors, waiting = self._cursors[:], self._waiting[:]
        if waiting:
            del cursors[0], waiting[0]
        self._stream.cursor = cursors[-1]
        for generation in range(oldest + len(waiting), refill + 1):
            waiting.append(self._generation(generation))
            cursors.append(self._stream.cursor)
        now = [held[refill - oldest - i] for i, held in enumerate(waiting)]
        later = [
            {j: taps for j, taps in held.items() if j > refill - oldest - i}
            for i, held in enumerate(waiting)
        ]
        order = _order(sum(len(x.weights) for x in now), self._seed, 1, refill)
        self._ready = jax.tree.map(lambda *x: np.concatenate(x)[order], *now)
        self._refill, self._cursors, self._waiting = refill, cursors, later

    def _generation(self, generation: int) -> dict[int, Taps]:
        """New rows by how many refills they wait; before refill 0, those that would."""
        delays = range(max(0, -generation), len(self._parts))
        cuts = np.cumsum([0, *(self._parts[j] for j in delays)])
        taps = self._stream.take(int(cuts[-1]))
        order = _order(int(cuts[-1]), self._seed, 0, generation + len(self._parts))
        return {
            j: jax.tree.map(lambda x, part=order[low:high]: x[part], taps)
            for j, (low, high) in zip(delays, pairwise(cuts), strict=True)
        }


class _Stream:
    """The rows of positive weight of a source, one call after the other."""

    def __init__(self, source: Callable[[int], Taps]):
        self._source, self._kind, self._call = source, None, None
        self.cursor = 0, 0

    def take(self, rows: int) -> Taps:
        """So many rows, from the cursor on."""
        found, empty = [], 0
        while rows:
            call, start = self.cursor
            taps = self._rows_of_call(call)
            part = jax.tree.map(lambda x, a=start, b=start + rows: x[a:b], taps)
            count = len(part.weights)
            stop = start + count
            self.cursor = (call, stop) if stop < len(taps.weights) else (call + 1, 0)
            if count:
                found.append(part)
            rows, empty = rows - count, 0 if count else empty + 1
            if empty == _EMPTY_CALLS:
                raise ValueError(
                    f"mixing_buffer: {empty} calls of the source, up to index {call}, "
                    "had no row of positive weight"
                )
        return jax.tree.map(lambda *x: np.concatenate(x), *found)

    def _rows_of_call(self, call: int) -> Taps:
        if self._call is None or self._call[0] != call:
            taps = jax.tree.map(np.asarray, self._source(call))
            kept = np.flatnonzero(taps.weights)
            self._check(call, taps)
            self._call = call, jax.tree.map(lambda x: x[kept], taps)
        return self._call[1]

    def _check(self, call: int, taps: Taps) -> None:
        kind = [None if x is None else (x.shape[1:], str(x.dtype)) for x in taps]
        lengths = [None if x is None else len(x) for x in taps]
        if self._kind is None:
            self._kind = kind
        if kind != self._kind or len({*lengths} - {None}) > 1:
            raise ValueError(
                "mixing_buffer: acts, grads and weights of every call must have rows "
                f"of shape and dtype {self._kind}, and as many of each; call {call} of "
                f"the source gave {lengths} rows of {kind}"
            )


def _order(num: int, *entropy: int) -> np.ndarray:
    return permuted(np.arange(num, dtype=np.uint32), num, host_words(*entropy))


def _part_sizes(new: int, rows: int) -> list[int]:
    """Rows of a generation by how many refills they wait.

    Evenly over ``0 .. a - 1`` or ``0 .. a``, such that what waits adds up to ``rows``.
    """
    wait = max(1.0, 2 * rows / new - 1)
    short = math.floor(wait)
    share = wait - short
    longer = short + (share > 0)
    at = np.arange(1, longer + 1)
    upto = (1 - share) * np.minimum(at, short) / short + share * at / longer
    cuts = np.round(new * upto).astype(int)
    return np.trim_zeros(np.diff([0, *cuts.tolist()]), "b").tolist()
