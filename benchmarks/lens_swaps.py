"""Whether swapping two intermediate answers in a language model moves its answer.

Of the items that the model answers, the share whose answer follows when the coordinates
of two intermediate answers are swapped at a band of layers, from where the intermediate
answer should show to the end of the prompt.  Controls: the same with directions turned
at random.

    python benchmarks/lens_prompts.py --out out/lens/whole --length 40 --skip-first 8
    python benchmarks/lens_swaps.py --folder out/lens/whole --json rows.jsonl
"""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import bootstrap_interval, finish, parse_command, row
from lens_recall import OpenConfig, Setup, open_setup
from lens_sets import LENGTH, Items

import toyfeat as ft


@dataclass(frozen=True)
class SwapsConfig(OpenConfig):
    """Options of this benchmark."""

    band: str = "8,20"
    """First layer of the swaps, and the one behind their last."""
    strength: float = 1.0
    """Of the swaps."""
    lenses: tuple[str, ...] = ()
    """Names of lenses; all but the one turned at random by default."""


def partners(items: Items, known: np.ndarray) -> list[tuple[int, int]]:
    """Pair every known item with the next one of its group with other answers."""
    pairs = []
    for i in np.flatnonzero(known):
        for j in np.roll(np.arange(len(items.at)), -(i + 1)):
            same = items.texts[i]["group"] == items.texts[j]["group"]
            different = (
                items.intermediate[i] != items.intermediate[j]
                and items.answer[i] != items.answer[j]
            )
            if same and different:
                pairs.append((int(i), int(j)))
                break
    return pairs


class Compiled(NamedTuple):
    """Runs of the model, compiled once for all sets.

    Attributes:
      clean: ``(tokens [B, T], at [B]) -> [B]``, the likeliest next token.
      swapped: ``(tokens [1, T], at, vectors, places [1, T]) -> [V]``, logits.
    """

    clean: Any
    swapped: Any


def compile_swaps(setup: Setup, config: SwapsConfig) -> Compiled:
    """Compile the runs; parameters are an argument, for constants are copied."""
    model, params = setup.model, setup.work.model.params
    final = model.sites[-1]

    @jax.jit
    def clean(params: Any, tokens: Any, at: Any) -> Any:
        acts = model.probed(params, tokens, {})[1][final]
        return jnp.argmax(model.unembed(params, acts[jnp.arange(len(at)), at]), axis=-1)

    @jax.jit
    def swapped(params: Any, tokens: Any, at: Any, vectors: Any, places: Any) -> Any:
        # Logits of one position are enough.
        narrow = model._replace(unembed=lambda p, x: model.unembed(p, x[:, at]))
        return ft.lenses.swap(
            narrow,
            params,
            tokens,
            vectors,
            [1, 0],
            strength=config.strength,
            positions=places,
        )[0]

    return Compiled(partial(clean, params), partial(swapped, params))


def swap_outcome(
    setup: Setup,
    compiled: Compiled,
    items: Items,
    pair: tuple[int, int],
    how: dict[str, Any],
) -> list[Any]:
    """Swap the intermediate answers of a pair of items in the first one's prompt.

    Args:
      setup: lenses and sets.
      compiled: of :func:`compile_swaps`.
      items: a set.
      pair: places of two items.
      how: ``lens``, its name; ``band``, sites of the swaps; ``turned``, number of the
        random turn of the directions, or ``None``.

    Returns:
      Whether the other item's answer is likelier then than the own one, whether it is
      the likeliest, whether among the five likeliest, and whether the likeliest token
      is another one than before.
    """
    i, j = pair
    ids = [int(items.intermediate[i]), int(items.intermediate[j])]
    vectors = setup.lenses[how["lens"]].vectors(ids)
    vectors = {site: vectors[site] for site in how["band"]}
    if how["turned"] is not None:
        key = jax.random.key(how["turned"])
        vectors = ft.lenses.random_control(key, vectors)
    # Where the intermediate answer should show, and behind it.
    positions = np.arange(LENGTH)
    place = (positions >= items.at[i]) & (positions <= items.last[i])
    tokens, last = items.tokens[i : i + 1], int(items.last[i])
    weights = place[None].astype(np.float32)
    logits = np.asarray(compiled.swapped(tokens, last, vectors, weights))
    own, new = logits[items.answer[i]], logits[items.answer[j]]
    rank = int((logits > new).sum())
    return [new > own, rank < 1, rank < 5, logits.argmax() != items.answer[i]]


def swap_rows(
    setup: Setup, compiled: Compiled, config: SwapsConfig, kind: str
) -> list[dict]:
    """Swap intermediate answers of the items that the model answers."""
    items = setup.sets[kind]
    first, stop = map(int, config.band.split(","))
    band = setup.model.sites[first:stop]
    known = answered(compiled, items, config.batch)
    pairs = partners(items, known)
    size = {
        "items": len(known),
        "known": int(known.sum()),
        "first": first,
        "stop": stop,
    }
    rows = []
    names = config.lenses or list(setup.lenses)
    for name in (x for x in names if pairs and x != "jacobian, turned"):
        for control in (False, True):
            outcomes = [
                swap_outcome(
                    setup,
                    compiled,
                    items,
                    pair,
                    {"lens": name, "band": band, "turned": number if control else None},
                )
                for number, pair in enumerate(pairs)
            ]
            method = f"{name}, turned" if control else name
            figures = summarize(np.array(outcomes, float))
            rows.append(row(f"swap {kind}", size, method, **figures))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def answered(compiled: Compiled, items: Items, batch: int) -> np.ndarray:
    """Tell of every item whether the model's likeliest next token is its answer."""
    num, parts = len(items.last), []
    for start in range(0, num, batch):
        index = np.minimum(np.arange(start, start + batch), num - 1)
        parts.append(np.asarray(compiled.clean(items.tokens[index], items.last[index])))
    return np.concatenate(parts)[:num] == items.answer


def summarize(outcomes: np.ndarray) -> dict[str, Any]:
    """Compute shares of pairs from their outcomes ``[N, 4]``, :func:`swap_outcome`."""
    prefers_new, top1, top5, changed = outcomes.T
    return {
        "pairs": len(outcomes),
        "prefers_new": float(prefers_new.mean()),
        "prefers_new_interval": bootstrap_interval(prefers_new),
        "top1": float(top1.mean()),
        "top5": float(top5.mean()),
        "answer_changed": float(changed.mean()),
    }


def main() -> None:
    """Swap in all sets that have answers."""
    config = parse_command(SwapsConfig, __doc__)
    setup = open_setup(config, every_lens=False)
    rows, compiled = [], compile_swaps(setup, config)
    for kind, items in setup.sets.items():
        if (items.answer >= 0).any():
            rows += swap_rows(setup, compiled, config, kind)
    finish(rows, [], config.json)


if __name__ == "__main__":
    main()
