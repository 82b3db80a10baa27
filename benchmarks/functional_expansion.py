"""Rows of a study that expand the KL where a dictionary stands."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as ft
from toyfeat.data.batches import Batches
from toyfeat.jobs.results import Rows
from toyfeat.lm.expansion import draw_on_path, expand_kl, reconstruct
from toyfeat.lm.finetune import WindowTaps, window_batches, window_order
from toyfeat.types import Params

EXPANSIONS = ("expand", "mixed", "borrowed", "mean", "path")
BATCH = 16
POPULATION = 8
"""Dictionaries whose mean reconstruction rows named "mean" expand at."""

Plan = tuple[Callable[[Params], Batches], Any, int, dict[str, float]]
"""Function that makes batches of parameters, term, refreshes, seconds of taps."""


class Expansions(NamedTuple):
    """What rows that expand the KL need.

    Attributes:
      run: the model behind the site.
      params: of the model.
      tapped: name of taps to taps of all windows.
      draws: of the taps at the activations.
      starts: seed to dictionary and parameters before fine-tuning.
    """

    run: Any
    params: Params
    tapped: Callable[[str], dict[str, np.ndarray]]
    draws: int
    starts: Callable[[int], tuple[Any, Params]]

    def __call__(
        self, row: str, seed: int, start: tuple[Any, Params], options: dict[str, int]
    ) -> Plan:
        """Plan a row such as ``"expand 4 x4"``: draws, and refreshes."""
        kind, *words = row.split(" ")
        refreshes = int(words[-1][1:]) if words[-1].startswith("x") else 1
        numbers = [word for word in words if word.isdigit()]
        seconds: dict[str, float] = {}
        taps = self.tapped("acts")
        num = len(taps["weights"])
        parts = np.split(window_order(num, **options), refreshes)
        calls = iter(range(refreshes))

        def make(now: Params) -> Batches:
            part = next(calls)
            rows = np.sort(parts[part].ravel())
            if kind == "mean":  # dictionaries that are there before anything is tuned
                for other in range(POPULATION):
                    self.starts(other)
            began = time.process_time()
            point = self.reconstruct(kind, start[0], now, rows)
            found = self.expand(kind, words, int(numbers[0]), point, rows)
            seconds[f"part {part}"] = time.process_time() - began
            return window_batches(scatter(found, taps, rows), **options)

        is_path = kind == "path"
        term = ft.losses.fisher() if is_path else ft.losses.expanded_kl()
        return make, term, refreshes, seconds

    def reconstruct(self, kind: str, sae: Any, now: Params, rows: Any) -> np.ndarray:
        """Compute the reconstruction that a row expands at, its own or another."""
        acts = self.tapped("acts")["acts"][rows]
        if kind == "mean":
            whole = [reconstruct(*self.starts(i), acts) for i in range(POPULATION)]
            return np.mean(whole, axis=0)
        sae, params = self.starts(0) if kind == "borrowed" else (sae, now)
        return reconstruct(sae, params, acts)

    def expand(
        self, kind: str, words: list[str], draws: int, point: np.ndarray, rows: Any
    ) -> WindowTaps:
        """Compute what a row needs of some windows."""
        taps = self.tapped("acts")
        some = WindowTaps(taps["acts"][rows], taps["weights"][rows])
        if kind == "path":
            grads = draw_on_path(
                self.run,
                self.params,
                some,
                point,
                draws=draws,
                path=words[0],
                batch=BATCH,
            )
            return some._replace(grads=grads)
        own = 0 if kind == "mixed" else draws
        near = expand_kl(self.run, self.params, some, point, draws=own, batch=BATCH)
        if kind == "mixed":
            grads = jnp.asarray(self.tapped(f"labels {self.draws}")["grads"][rows])
            grads = jax.lax.bitcast_convert_type(grads[:, :, :draws], jnp.bfloat16)
            scale = (self.draws / draws) ** 0.5
            scaled = (grads.astype(jnp.float32) * scale).astype(jnp.bfloat16)
            near = near._replace(draws=np.asarray(scaled))
        return some._replace(expansion=near)


def scatter(
    found: WindowTaps, taps: dict[str, np.ndarray], rows: np.ndarray
) -> WindowTaps:
    """Put what is known of some windows at their places among all of them."""
    num = len(taps["weights"])

    def place(values: Any) -> np.ndarray:
        whole = np.zeros((num, *values.shape[1:]), values.dtype)
        whole[rows] = values
        return whole

    whole = WindowTaps(taps["acts"], taps["weights"])
    more = found._replace(acts=None, weights=None)
    more = jax.tree.map(place, more)
    return whole._replace(grads=more.grads, expansion=more.expansion)


def compare_errors(
    taps: dict[str, np.ndarray],
    starts: Callable[[int], tuple[Any, Params]],
    seeds: tuple[int, ...],
    rows: Rows,
) -> None:
    """Write the cosine between the errors of the first and of another dictionary."""
    acts, counts = taps["acts"][:256], taps["weights"][:256] > 0
    first = (reconstruct(*starts(0), acts) - acts)[counts]
    for seed in seeds:
        key = {"row": "cosine of errors", "seed": seed}
        if seed and not rows.has(key):
            other = (reconstruct(*starts(seed), acts) - acts)[counts]
            sizes = np.sum(first**2) * np.sum(other**2)
            cosine = float(np.sum(first * other) / np.sqrt(sizes))
            apart = float(np.sum((first - other) ** 2) / np.sum(other**2))
            rows.add(key, {"cosine": cosine, "apart": apart})
            print(key, cosine, apart, flush=True)
