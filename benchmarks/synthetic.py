"""Train dictionaries of a synthetic world, by us and by SAELens on the same batches.

    pip install sae-lens==6.54.12           # into the peers' environment
    python benchmarks/synthetic.py [--tiny] [--json PATH] [--peer PYTHON]

Two worlds of SynthSAEBench's recipe (512 features in 64 dimensions), sampled by
SAELens: 200k activations, 1500 batches of 1024 of them in one order for both sides,
128 latents, Adam at 1e-3, 40k other samples for the scores.  Ours are

- ``same``: SAELens' settings and its very start parameters,
- ``aimed``: the same, steered by ``target_l0`` from step 500 on to the codes per
  example that SAELens came to, of architectures that are not told how many (the
  coefficient grows until then, as in SynthSAEBench, and gains are larger than the
  default, which is for more than 1000 steps),
- ``ours``: our own start and the trainer's defaults (scaled, centred, coefficients
  that grow over 500 steps, each tensor clipped alone, dead latents revived), aimed.

MCC and explained variance at equal codes per example (``same`` of top-k dictionaries,
``aimed`` of the others) must not be below SAELens' by more than .02, on either world.
SAELens' own parameters are scored by both sides first, and the scores have to agree.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contest import HERE, PEERS
from harness import BenchmarkConfig, finish, parse_command, row

import toyfeat as ft
from toyfeat import worlds
from toyfeat.data.batches import Batches
from toyfeat.dictionary.controllers import Controller
from toyfeat.dictionary.types import Dictionary
from toyfeat.metrics.synthetic import score_dictionary
from toyfeat.types import Array, Params, Taps

MARGIN, SEEDS, RATE = 0.02, (42, 43), 1e-3
INTEGRAL = 0.015
EQUAL = 0.05  # codes per example are equal within this share of them


@dataclass(frozen=True)
class Config(BenchmarkConfig):
    """Options."""

    peer: Path = PEERS
    """Python of the peers' environment."""


class Case(NamedTuple):
    """An architecture with the settings that SAELens gets.

    Attributes:
      name: of the peer's case.
      make: our dictionary, from its width and latents.
      sparsity: coefficient of its penalty.
      aimed: whether codes per example are steered.
    """

    name: str
    make: Any
    sparsity: float = 1.0
    aimed: bool = False


def _matryoshka(dim: int, latents: int) -> Dictionary:
    widths = (latents // 8, latents // 2, latents)
    return ft.dictionaries.matryoshka(dim, latents, 4, widths=widths)


_JUMP = partial(
    ft.dictionaries.jump_relu, threshold=1.0, bandwidth=1.0, decoder_norm=0.5
)
CASES = (
    Case("topk", partial(ft.dictionaries.topk, k=4)),
    Case("batchtopk", partial(ft.dictionaries.batch_topk, k=4)),
    Case("matryoshka", _matryoshka),
    Case("standard_l1_2", ft.dictionaries.standard, 2.0, True),
    Case("gated_l1_2", ft.dictionaries.gated, 2.0, True),
    Case("jumprelu", _JUMP, 1.0, True),
)


class Data(NamedTuple):
    """A world's arrays, as the peer writes them.

    Attributes:
      pool: ``[N, D]`` activations to train on.
      order: ``[steps, batch]`` int, rows of the pool.
      eval: ``[M, D]`` other activations.
      eval_codes: ``[M, F]``, their true codes.
      features: ``[F, D]``.
    """

    pool: np.ndarray
    order: np.ndarray
    eval: np.ndarray
    eval_codes: np.ndarray
    features: np.ndarray


def peer_runs(
    python: Path, folder: Path, seed: int
) -> tuple[Data, dict[str, dict[str, Any]]]:
    """Let SAELens make a world, train and score; its data, and its answers by case."""
    script = HERE / "peers" / "saelens_synthetic.py"
    base = [str(python), str(script), str(folder), "--seed", str(seed)]
    env = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([*base, "--make"], check=True, capture_output=True, env=env)
    names = [case.name for case in CASES]
    done = subprocess.run(
        [*base, "--save", str(folder), "--only", *names],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    )
    # Its parameters at the start, from which ours start too, and at the end.
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in answers:
        for part in ("start", "end"):
            arrays = np.load(folder / f"{answer['name']}_{seed}_{part}.npz")
            answer[part] = {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}
    data = Data(*(np.load(folder / f"{name}.npy") for name in Data._fields))
    return data, {answer["name"]: answer for answer in answers}


def own_world(seed: int) -> Data:
    """Make a small world without a peer."""
    world = worlds.synth_sae_bench(jax.random.key(seed), features=128, dim=16)
    pool = worlds.world_acts(jax.random.key(1), world, 4096)
    acts, codes = worlds.world_batch(jax.random.key(2), world, 1024)
    order = np.random.default_rng(seed).integers(0, len(pool), (40, 128))
    arrays = pool, order, acts, codes, world.feature_vectors
    return Data(*(np.asarray(x) for x in arrays))


def _rows(data: tuple[Array, Array], step: Array) -> Taps:
    pool, order = data
    acts = pool[order[step]]
    return Taps(acts, None, jnp.ones(len(acts), acts.dtype))


def train(
    dictionary: Dictionary,
    trainer: ft.Trainer,
    data: Data,
    seed: int,
    start: Params | None = None,
    **hyper: Any,
) -> tuple[Params, float]:
    """Train; parameters for activations as they are, and seconds after compiling."""
    state = trainer.init(jax.random.key(seed), **hyper)
    if start is not None:
        shapes = [{k: v.shape for k, v in p.items()} for p in (start, state.params)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"wanted parameters of shapes {shapes[1]}, got {shapes[0]}"
            )
        state = state._replace(params=start)
    # The peer's batches, in its order; the first fifth compiles and is not timed.
    batches = Batches(_rows, (jnp.asarray(data.pool), jnp.asarray(data.order)))
    steps = len(data.order)
    ft.fit(trainer, state, batches, steps=steps // 5, chunk=steps // 5, progress=False)
    begin = time.perf_counter()
    state = ft.fit(trainer, state, batches, steps=steps, chunk=steps // 5)
    return ft.denormalized(dictionary, state), time.perf_counter() - begin


def as_saelens(
    dictionary: Dictionary, sparsity: float, target: float | None
) -> ft.Trainer:
    """Make a trainer with SAELens' settings: one clip of all gradients, its terms."""
    revived = float(dictionary.config.k is not None)
    return ft.trainer(
        dictionary,
        ft.losses.default(dictionary, sparsity=sparsity, dead_latents=revived),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE)),
        _control(target),
        normalize=False,
        center=False,
        clip=float("inf"),
        warm_up=0 if target is None else 500,
        dead_after=1001,
    )


def with_defaults(dictionary: Dictionary, target: float | None) -> ft.Trainer:
    """Make a trainer of defaults, but for the codes per example."""
    objective = ft.losses.default(dictionary)
    return ft.trainer(dictionary, objective, controller=_control(target))


def _control(target: float | None) -> Controller | None:
    if target is None:
        return None
    return ft.controllers.target_l0(target, integral=INTEGRAL)


def runs(
    case: Case, data: Data, seed: int, peer: dict[str, Any] | None
) -> Iterator[tuple[str, dict[str, float], float]]:
    """Train each of our runs; yields its method, scores and seconds."""
    sizes = data.pool.shape[1], 128 if peer else 32
    start = peer["start"] if peer else None
    target = (peer["l0"] if peer else 3.0) if case.aimed else None
    dictionary = case.make(*sizes)
    # With SAELens' coefficient, and steered to as many codes as SAELens reached.
    aims = {"same": None} | ({"aimed": target} if case.aimed else {})
    for method, aim in aims.items():
        trainer = as_saelens(dictionary, case.sparsity, aim)
        params, seconds = train(dictionary, trainer, data, seed, start)
        yield method, _score(dictionary, params, data), seconds
    # With all that our trainer does by default.
    trainer = with_defaults(dictionary, target)
    params, seconds = train(dictionary, trainer, data, seed, learning_rate=RATE)
    yield "ours", _score(dictionary, params, data), seconds


def _score(dictionary: Dictionary, params: Params, data: Data) -> dict[str, float]:
    pairs = [(data.eval, data.eval_codes)]
    return score_dictionary(dictionary, params, data.features, pairs, train=True)


def disagreement(case: Case, data: Data, peer: dict[str, Any]) -> float:
    """Score SAELens' parameters on both sides; the largest difference."""
    dictionary = case.make(data.pool.shape[1], 128)
    ours = _score(dictionary, peer["end"], data)
    return max(abs(ours[k] - peer[k]) for k in ("mcc", "ev", "uniqueness", "f1", "l0"))


def run_case(
    case: Case, data: Data, seed: int, peer: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Run a case; a row per run of ours."""
    rows, judged = [], "aimed" if case.aimed else "same"
    size = {"dim": data.pool.shape[1], "steps": len(data.order), "seed": seed}
    names = ("mcc", "ev", "l0", "uniqueness", "f1", "dead")
    error = 0.0
    if peer is not None:
        _print("SAELens", case.name, seed, peer, peer["seconds"])
        error = disagreement(case, data, peer)
    for method, ours, seconds in runs(case, data, seed, peer):
        _print(method, case.name, seed, ours, seconds)
        theirs = {name: peer[name] if peer else None for name in names}
        rows.append(
            row(
                case.name,
                size,
                method,
                ours_s=seconds,
                peer_s=peer["seconds"] if peer else None,
                ratio=peer["seconds"] / seconds if peer else None,
                error=error,
                peer_error=None,
                judged=method == judged,
                **{name: ours[name] for name in names},
                **{f"peer_{name}": value for name, value in theirs.items()},
            )
        )
    return rows


def _print(
    method: str, name: str, seed: int, result: dict[str, Any], seconds: float
) -> None:
    print(
        f"{name:<14} {seed} {method:<8} mcc {result['mcc']:.4f}  "
        f"ev {result['ev']:.4f}  l0 {result['l0']:6.3f}  "
        f"uniqueness {result['uniqueness']:.3f}  "
        f"f1 {result['f1']:.3f}  dead {result['dead']:3d}  {seconds:5.1f} s",
        flush=True,
    )


def missed_bars(rows: list[dict[str, Any]]) -> list[str]:
    """Name what is below a bar, seed by seed (and so in the median, too)."""
    missed = []
    for line in rows:
        if line["peer_mcc"] is None or not line["judged"]:
            continue
        run = f"{line['case']}, seed {line['size']['seed']}"
        missed += [
            f"{run}: {name} is {line[name]:.4f}, SAELens' {line[f'peer_{name}']:.4f}"
            for name in ("mcc", "ev")
            if line[name] < line[f"peer_{name}"] - MARGIN
        ]
        if line["error"] > 2e-3:
            missed.append(f"{run}: the sides' scores differ by {line['error']:.1e}")
        if abs(line["l0"] / line["peer_l0"] - 1) > EQUAL:
            missed.append(
                f"{run}: {line['l0']:.2f} codes per example, not {line['peer_l0']:.2f}"
            )
    return missed


def print_medians(rows: list[dict[str, Any]]) -> None:
    """Print median differences to SAELens over worlds."""
    print(f"\n{'median of ours less SAELens':<32} mcc      ev")
    for case in CASES:
        for method in ("same", "aimed", "ours"):
            lines = [r for r in rows if (r["case"], r["method"]) == (case.name, method)]
            if lines and lines[0]["peer_mcc"] is not None:
                mcc, ev = (
                    statistics.median(r[k] - r[f"peer_{k}"] for r in lines)
                    for k in ("mcc", "ev")
                )
                print(f"{case.name:<16} {method:<15} {mcc:+.4f}  {ev:+.4f}")


def main() -> None:
    """Run both sides on both worlds."""
    config = parse_command(Config, __doc__)
    rows = []
    if config.tiny:
        data = own_world(0)
        for case in (CASES[1], CASES[3]):
            rows += run_case(case, data, 0, None)
        finish(rows, [], config.json)
    if not config.peer.exists():
        missed = [f"there is no {config.peer}; run benchmarks/peers/setup.sh"]
        finish(rows, missed, config.json)
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            data, peers = peer_runs(config.peer, Path(folder) / "world", seed)
        for case in CASES:
            rows += run_case(case, data, seed, peers[case.name])
    print_medians(rows)
    finish(rows, missed_bars(rows), config.json)


if __name__ == "__main__":
    main()
