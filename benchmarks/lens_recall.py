"""Whether lenses find intermediate answers in a language model, and swaps act.

Six sets of prompts (``benchmarks/data/lens``), each with the one token of an
intermediate answer and a position where it should show.

- *Recall*: the share of items whose intermediate answer is among the ``k`` likeliest
  tokens of a lens, at every layer, and at the best layer of each item.  Intervals are
  by the bootstrap over items, of a lens and of its difference from the logit lens.
  Controls: a Jacobian lens whose ``J - I`` is turned at random, of the same spectrum,
  and the intermediate answers of other items.
- *Swaps*: of the items that the model answers, the share whose answer follows when the
  coordinates of two intermediate answers are swapped at a band of layers.  Controls:
  the same with directions turned at random.

    python benchmarks/lens_prompts.py --out out/lens/whole --length 40 --skip-first 8
    python benchmarks/lens_recall.py --folder out/lens/whole --json rows.jsonl
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row
from lens_prompts import list_prompts, read_state

import toyfeat as ft
from toyfeat.jobs.config import read_job
from toyfeat.jobs.workspace import Workspace, open_job
from toyfeat.lens.maps import LensMap
from toyfeat.lens.reading import Lens, make_lens

DATA = Path(__file__).parent / "data" / "lens"
KINDS = (
    "two_hop",
    "order_of_operations",
    "association",
    "typo",
    "rhyme",
    "other_languages",
)
LENGTH = 40
"""Tokens that prompts are filled up to behind their end, which no position sees."""
KS = (1, 10)
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class RecallConfig(BenchmarkConfig):
    """Options of this benchmark."""

    folder: Path = Path("out/lens/whole")
    """Jacobians of single prompts, of ``lens_prompts.py``."""
    second: Path | None = None
    """Lens file of second moments, read too."""
    job: Path = Path("examples/smollm2_lens.toml")
    """Model and text."""
    band: str = "8,20"
    """First layer of the swaps, and the one behind their last."""
    strength: float = 1.0
    """Of the swaps."""
    batch: int = 16
    """Items at a time."""
    swaps: bool = True
    """Whether to swap."""


class Items(NamedTuple):
    """Test set.

    Attributes:
      texts: of the items: ``prompt``, ``intermediate``, ``answer`` and ``group``.
      tokens: ``[num, T]``, filled up.
      at: ``[num]``, position where the intermediate answer should show.
      last: ``[num]``, last position of the prompt.
      intermediate: ``[num]`` tokens.
      answer: ``[num]``, first tokens of the answers, -1 without one.
    """

    texts: list[dict[str, str]]
    tokens: np.ndarray
    at: np.ndarray
    last: np.ndarray
    intermediate: np.ndarray
    answer: np.ndarray


def read_items(kind: str, tokenizer: Any, start: int) -> Items:
    """Read a test set, and check that intermediate answers are single tokens."""
    lines = (DATA / f"{kind}.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line) for line in lines]
    rows, ats, lasts, intermediate, answers = [], [], [], [], []

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for text in texts:
        prompt, before = (
            [start, *encode(x)]
            for x in (text["prompt"], text.get("at", text["prompt"]))
        )
        token = encode(text["intermediate"])
        if len(token) != 1 or prompt[: len(before)] != before or len(prompt) > LENGTH:
            raise SystemExit(
                f"lens_recall: {kind} has an item that does not fit: {text}"
            )
        rows.append(prompt + [start] * (LENGTH - len(prompt)))
        ats.append(len(before) - 1)
        lasts.append(len(prompt) - 1)
        intermediate.append(token[0])
        answers.append(encode(text["answer"])[0] if text["answer"] else -1)
    return Items(texts, *map(np.array, (rows, ats, lasts, intermediate, answers)))


class Setup(NamedTuple):
    """Model, lenses and test sets.

    Attributes:
      work: the job.
      model: lens model.
      lenses: by name.
      sets: by kind.
    """

    work: Workspace
    model: ft.lenses.LensModel
    lenses: dict[str, Lens]
    sets: dict[str, Items]


def least_squares_lens(
    model: ft.lenses.LensModel, params: Any, tokens: np.ndarray, skip: int
) -> Lens:
    """Fit the affine map from every stream to the final one by least squares."""
    streams = jax.jit(lambda p, x: model.probed(p, x, {})[1])
    parts: dict[str, list[np.ndarray]] = {site: [] for site in model.sites}
    for start in range(0, len(tokens), 8):
        acts = streams(params, tokens[start : start + 8])
        for site in model.sites:
            parts[site].append(
                np.asarray(acts[site][:, skip:]).reshape(-1, acts[site].shape[-1])
            )
    final = np.concatenate(parts.pop(model.sites[-1])).astype(np.float64)
    maps = {}
    for site, blocks in parts.items():
        acts = np.concatenate(blocks).astype(np.float64)
        mean, goal = acts.mean(axis=0), final.mean(axis=0)
        gram = (acts - mean).T @ (acts - mean)
        # A ridge of 1e-3 of the mean variance, for directions that hardly vary.
        ridge = 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
        matrix = np.linalg.solve(gram + ridge, (acts - mean).T @ (final - goal)).T
        bias = goal - matrix @ mean
        maps[site] = LensMap(
            jnp.asarray(matrix, jnp.float32)[None], bias=jnp.asarray(bias, jnp.float32)
        )
    return make_lens(model, params, "tuned", maps, {"estimator": "least squares"})


def turned(key: Any, estimate: ft.lenses.Estimate) -> ft.lenses.Estimate:
    """Turn ``J - I`` at random: the same spectrum, other directions."""
    matrices = {}
    for site, matrix in estimate.matrices.items():
        key, *keys = jax.random.split(key, 3)
        eye = np.eye(len(matrix), dtype=np.float32)
        left, right = (
            np.linalg.qr(np.asarray(jax.random.normal(k, eye.shape)))[0] for k in keys
        )
        matrices[site] = jnp.asarray(eye + left @ (np.asarray(matrix) - eye) @ right)
    return estimate._replace(matrices=matrices)


def open_lenses(config: RecallConfig, work: Workspace, model: Any) -> dict[str, Lens]:
    """Make all lenses."""
    params, sites = work.model.params, model.sites[:-1]
    state = read_state(config.folder, sites, list_prompts(config.folder))
    estimate = ft.lenses.mean_jacobian(model, work.model.config.dim).finish(state)
    shrunken = ft.lenses.shrunken(state)
    del state
    lenses = {
        "logit": ft.lenses.logit_lens(model, params),
        "jacobian": ft.lenses.jacobian_lens(model, params, estimate),
        "jacobian, shrunken": ft.lenses.jacobian_lens(model, params, shrunken),
        "jacobian, turned": ft.lenses.jacobian_lens(
            model, params, turned(jax.random.key(0), estimate)
        ),
        "least squares": least_squares_lens(model, params, work.tokens, 8),
        **clustered_lenses(config.folder, model, params),
    }
    if config.second is not None:
        lenses["second moment"] = ft.lenses.load(config.second, model, params)
    return lenses


def clustered_lenses(folder: Path, model: Any, params: Any) -> dict[str, Lens]:
    """Make the lenses of the clusters of a folder of prompts."""
    sums, total = 0.0, 0.0
    for number in list_prompts(folder):
        with np.load(folder / f"prompt_{number:04d}.npz") as file:
            weights = file["weights"]
            sums = sums + weights[:, :, None, None] * file["rows"]
            total = total + weights
    sites = model.sites[:-1]
    experts = sums / np.maximum(total, 1e-9)[:, :, None, None]
    matrices = {s: jnp.asarray(x) for s, x in zip(sites, experts, strict=True)}
    nan = dict.fromkeys(sites, jnp.full(total.shape[1], jnp.nan))
    found = ft.lenses.Estimate(
        matrices, nan, nan, nan, jnp.asarray(len(list_prompts(folder)))
    )
    with np.load(folder / "centres.npz") as file:
        centres = {site: jnp.asarray(file[site]) for site in sites}
    shares = {s: jnp.asarray(x) for s, x in zip(sites, total, strict=True)}
    return {
        "clustered": ft.lenses.clustered_lens(model, params, found, centres),
        "contrast": ft.lenses.contrast_lens(model, params, found, shares),
    }


def measure_ranks(
    setup: Setup, config: RecallConfig, items: Items
) -> dict[str, np.ndarray]:
    """Ranks ``[num, layers]`` of intermediate answers by every lens, 0 the likeliest.

    ``"<lens>, other answers"`` has those of the intermediate answers of other items,
    the mean over three.
    """
    model, params = setup.model, setup.work.model.params

    @jax.jit
    def streams(tokens: Any, at: Any) -> Any:
        acts = model.probed(params, tokens, {})[1]
        return {s: acts[s][jnp.arange(len(at)), at] for s in model.sites}

    @jax.jit
    def ranks(moved: Any, tokens: Any) -> Any:
        logits = model.unembed(params, moved)  # [B, V]
        chosen = jnp.take_along_axis(logits, tokens, axis=1)  # [B, n]
        return jnp.sum(logits[:, None] > chosen[:, :, None], axis=2)

    num = len(items.at)
    other = np.stack([others(items.intermediate, shift) for shift in range(3)], 1)
    wanted = np.concatenate([items.intermediate[:, None], other], axis=1)
    found: dict[str, list] = {name: [] for name in setup.lenses}
    for start in range(0, num, config.batch):
        index = np.minimum(np.arange(start, start + config.batch), num - 1)
        acts = streams(items.tokens[index], items.at[index])
        for name, lens in setup.lenses.items():
            parts = [
                np.asarray(ranks(lens.transport(site, acts[site]), wanted[index]))
                for site in model.sites
            ]
            found[name].append(np.stack(parts, axis=1))  # [B, L, n]
    return {name: np.concatenate(parts)[:num] for name, parts in found.items()}


def others(tokens: np.ndarray, shift: int) -> np.ndarray:
    """Intermediate answers of other items, different from one's own."""
    result = []
    for index, token in enumerate(tokens):
        rolled = np.roll(tokens, -(index + 1 + 7 * shift))
        result.append(rolled[rolled != token][0])
    return np.array(result)


def interval(values: np.ndarray) -> list[float]:
    """Bootstrap interval, 95 %, of the mean over items."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(values), (BOOTSTRAPS, len(values)))
    return [float(x) for x in np.quantile(values[draws].mean(axis=1), [0.025, 0.975])]


def recall_rows(
    kind: str, ranks: dict[str, np.ndarray], size: Mapping[str, int]
) -> list[dict]:
    """Make a row per lens and ``k``; the final stream is the model, no lens."""
    rows = []
    for k in KS:
        hits = {name: x[:, :-1, 0] < k for name, x in ranks.items()}
        best = {name: x.any(axis=1).astype(float) for name, x in hits.items()}
        for name, x in ranks.items():
            chance = (x[:, :-1, 1:] < k).any(axis=1).mean(axis=1)
            margin = best[name] - best["logit"]
            rows.append(
                row(
                    kind,
                    size,
                    name,
                    k=k,
                    recall=float(best[name].mean()),
                    interval=interval(best[name]),
                    over_logit=float(margin.mean()),
                    over_logit_interval=interval(margin),
                    other_answers=float(chance.mean()),
                    model_output=float((x[:, -1, 0] < k).mean()),
                    layers=[round(float(v), 4) for v in hits[name].mean(axis=0)],
                )
            )
    return rows


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


def swap_rows(setup: Setup, config: RecallConfig, kind: str) -> list[dict]:
    """Swap intermediate answers of the items that the model answers."""
    model, params, items = setup.model, setup.work.model.params, setup.sets[kind]
    first, stop = map(int, config.band.split(","))
    band = model.sites[first:stop]
    last = jnp.asarray(items.last)
    final = model.sites[-1]

    @jax.jit
    def clean(tokens: Any, at: Any) -> Any:
        acts = model.probed(params, tokens, {})[1][final]
        return jnp.argmax(model.unembed(params, acts[jnp.arange(len(at)), at]), axis=-1)

    @jax.jit
    def swapped(tokens: Any, at: Any, vectors: Any, places: Any) -> Any:
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

    parts = []
    for start in range(0, len(last), config.batch):
        index = np.minimum(np.arange(start, start + config.batch), len(last) - 1)
        parts.append(np.asarray(clean(items.tokens[index], items.last[index])))
    known = np.concatenate(parts)[: len(last)] == items.answer
    pairs = partners(items, known)
    rows = []
    size = {
        "items": len(known),
        "known": int(known.sum()),
        "first": first,
        "stop": stop,
    }
    for name in ("logit", "jacobian", "jacobian, shrunken", "least squares"):
        for control in (False, True):
            outcomes = []
            for number, (i, j) in enumerate(pairs):
                ids = [int(items.intermediate[i]), int(items.intermediate[j])]
                vectors = setup.lenses[name].vectors(ids)
                vectors = {site: vectors[site] for site in band}
                if control:
                    vectors = ft.lenses.random_control(jax.random.key(number), vectors)
                # Where the intermediate answer should show, and behind it.
                place = (np.arange(LENGTH) >= items.at[i]) & (
                    np.arange(LENGTH) <= items.last[i]
                )
                logits = np.asarray(
                    swapped(
                        items.tokens[i : i + 1],
                        int(items.last[i]),
                        vectors,
                        place[None].astype(np.float32),
                    )
                )
                own, new = logits[items.answer[i]], logits[items.answer[j]]
                rank = int((logits > new).sum())
                outcomes.append(
                    [new > own, rank < 1, rank < 5, logits.argmax() != items.answer[i]]
                )
            values = np.array(outcomes, float).reshape(-1, 4)
            if not len(values):
                continue
            rows.append(
                row(
                    f"swap {kind}",
                    size,
                    f"{name}, turned" if control else name,
                    pairs=len(values),
                    prefers_new=float(values[:, 0].mean()),
                    prefers_new_interval=interval(values[:, 0]),
                    top1=float(values[:, 1].mean()),
                    top5=float(values[:, 2].mean()),
                    answer_changed=float(values[:, 3].mean()),
                )
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Run the benchmark."""
    config = parse_command(RecallConfig, __doc__)
    job = read_job(config.job)
    collect = replace(job.collect, tokens=200 * LENGTH, length=LENGTH)
    work = open_job(replace(job, collect=collect))
    model = ft.lenses.from_decoder(work.model.config)
    kinds = KINDS[:1] if config.tiny else KINDS
    sets = {k: read_items(k, work.model.tokenizer, job.collect.start) for k in kinds}
    setup = Setup(work, model, open_lenses(config, work, model), sets)
    rows = []
    for kind, items in sets.items():
        ranks = measure_ranks(setup, config, items)
        size = {"items": len(items.at), "prompts": len(list_prompts(config.folder))}
        rows += recall_rows(kind, ranks, size)
        for line in rows[-len(ranks) * len(KS) :]:
            print(
                line["case"],
                line["method"],
                line["k"],
                line["recall"],
                line["interval"],
                line["other_answers"],
                flush=True,
            )
    if config.swaps:
        for kind, items in sets.items():
            if (items.answer >= 0).any():
                rows += swap_rows(setup, config, kind)
    finish(rows, [], config.json)


if __name__ == "__main__":
    main()
