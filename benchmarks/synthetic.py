"""Dictionaries of a synthetic world, trained by us and by SAELens on the same batches.

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
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contest import HERE, PEERS
from harness import finish, row

import toyfeat as tf
from toyfeat.report.synthetic import scores
from toyfeat.types import Array, ArrayBatches, Controller, Dictionary, Params, Taps

MARGIN, SEEDS, RATE = 0.02, (42, 43), 1e-3
INTEGRAL = 0.015
EQUAL = 0.05  # codes per example are equal within this share of them


class Case(NamedTuple):
    """An architecture as SAELens is given it.

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
    return tf.matryoshka(dim, latents, 4, widths=widths)


_JUMP = partial(tf.jump_relu, threshold=1.0, bandwidth=1.0, decoder_norm=0.5)
CASES = (
    Case("topk", partial(tf.topk, k=4)),
    Case("batchtopk", partial(tf.batch_topk, k=4)),
    Case("matryoshka", _matryoshka),
    Case("standard_l1_2", tf.standard, 2.0, True),
    Case("gated_l1_2", tf.gated, 2.0, True),
    Case("jumprelu", _JUMP, 1.0, True),
)


class Data(NamedTuple):
    """A world's arrays, as the peer writes them."""

    pool: np.ndarray
    order: np.ndarray
    eval: np.ndarray
    eval_codes: np.ndarray
    features: np.ndarray


def peer_runs(
    python: Path, folder: Path, seed: int
) -> tuple[Data, dict[str, dict[str, Any]]]:
    """SAELens makes a world, trains and scores on it; its parameters are kept."""
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
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in answers:
        for part in ("start", "end"):
            arrays = np.load(folder / f"{answer['name']}_{seed}_{part}.npz")
            answer[part] = {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}
    data = Data(*(np.load(folder / f"{name}.npy") for name in Data._fields))
    return data, {answer["name"]: answer for answer in answers}


def own_world(seed: int) -> Data:
    """A small world without a peer."""
    world = tf.data.synth_sae_bench(jax.random.key(seed), features=128, dim=16)
    pool = tf.data.world_acts(jax.random.key(1), world, 4096)
    acts, codes = tf.data.world_batch(jax.random.key(2), world, 1024)
    order = np.random.default_rng(seed).integers(0, len(pool), (40, 128))
    arrays = pool, order, acts, codes, world.feature_vectors
    return Data(*(np.asarray(x) for x in arrays))


def _rows(data: tuple[Array, Array], step: Array) -> Taps:
    pool, order = data
    acts = pool[order[step]]
    return Taps(acts, None, jnp.ones(len(acts), acts.dtype))


def trained(
    dictionary: Dictionary,
    trainer: tf.Trainer,
    data: Data,
    seed: int,
    start: Params | None = None,
    **hyper: Any,
) -> tuple[Params, float]:
    """Parameters for activations as they are, and seconds without compiling."""
    state = trainer.init(jax.random.key(seed), **hyper)
    if start is not None:
        shapes = [{k: v.shape for k, v in p.items()} for p in (start, state.params)]
        assert shapes[0] == shapes[1], "the peer's parameters are not ours"
        state = state._replace(params=start)
    batches = ArrayBatches(_rows, (jnp.asarray(data.pool), jnp.asarray(data.order)))
    steps = len(data.order)
    tf.fit(trainer, state, batches, steps=steps // 5, chunk=steps // 5, progress=False)
    begun = time.perf_counter()
    state = tf.fit(trainer, state, batches, steps=steps, chunk=steps // 5)
    return tf.folded(dictionary, state), time.perf_counter() - begun


def as_saelens(
    dictionary: Dictionary, sparsity: float, target: float | None
) -> tf.Trainer:
    """SAELens' settings: one clip of all gradients, and only the terms it has."""
    revived = float(dictionary.config.k is not None)
    return tf.trainer(
        dictionary,
        tf.dictionary_objective(dictionary, sparsity=sparsity, dead_latents=revived),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE)),
        _control(target),
        normalize=False,
        center=False,
        clip=float("inf"),
        warm_up=0 if target is None else 500,
        dead_after=1001,
    )


def with_defaults(dictionary: Dictionary, target: float | None) -> tf.Trainer:
    """Nothing is set but the codes per example."""
    objective = tf.dictionary_objective(dictionary)
    return tf.trainer(dictionary, objective, controller=_control(target))


def _control(target: float | None) -> Controller | None:
    if target is None:
        return None
    return tf.controllers.target_l0(target, integral=INTEGRAL)


def runs(
    case: Case, data: Data, seed: int, peer: dict[str, Any] | None
) -> Iterator[tuple[str, dict[str, float], float]]:
    """Method, scores and seconds of each of our runs."""
    sizes = data.pool.shape[1], 128 if peer else 32
    start = peer["start"] if peer else None
    target = (peer["l0"] if peer else 3.0) if case.aimed else None
    dictionary = case.make(*sizes)
    aims = {"same": None} | ({"aimed": target} if case.aimed else {})
    for method, aim in aims.items():
        trainer = as_saelens(dictionary, case.sparsity, aim)
        params, seconds = trained(dictionary, trainer, data, seed, start)
        yield method, _scored(dictionary, params, data), seconds
    trainer = with_defaults(dictionary, target)
    params, seconds = trained(dictionary, trainer, data, seed, learning_rate=RATE)
    yield "ours", _scored(dictionary, params, data), seconds


def _scored(dictionary: Dictionary, params: Params, data: Data) -> dict[str, float]:
    pairs = [(data.eval, data.eval_codes)]
    return scores(dictionary, params, data.features, pairs, train=True)


def disagreement(case: Case, data: Data, peer: dict[str, Any]) -> float:
    """Largest difference of a score of SAELens' parameters between the two sides."""
    dictionary = case.make(data.pool.shape[1], 128)
    mine = _scored(dictionary, peer["end"], data)
    return max(abs(mine[k] - peer[k]) for k in ("mcc", "ev", "uniqueness", "f1", "l0"))


def rows_of(
    case: Case, data: Data, seed: int, peer: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """One row per run of ours."""
    rows, judged = [], "aimed" if case.aimed else "same"
    size = {"dim": data.pool.shape[1], "steps": len(data.order), "seed": seed}
    names = ("mcc", "ev", "l0", "uniqueness", "f1", "dead")
    error = 0.0
    if peer is not None:
        _print("SAELens", case.name, seed, peer, peer["seconds"])
        error = disagreement(case, data, peer)
    for method, mine, seconds in runs(case, data, seed, peer):
        _print(method, case.name, seed, mine, seconds)
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
                **{name: mine[name] for name in names},
                **{f"peer_{name}": value for name, value in theirs.items()},
            )
        )
    return rows


def _print(
    method: str, name: str, seed: int, found: dict[str, Any], seconds: float
) -> None:
    print(
        f"{name:<14} {seed} {method:<8} mcc {found['mcc']:.4f}  ev {found['ev']:.4f}  "
        f"l0 {found['l0']:6.3f}  uniqueness {found['uniqueness']:.3f}  "
        f"f1 {found['f1']:.3f}  dead {found['dead']:3d}  {seconds:5.1f} s",
        flush=True,
    )


def missed_bars(rows: list[dict[str, Any]]) -> list[str]:
    """What is below the bar, seed by seed (and so in the median, too)."""
    missed = []
    for line in rows:
        if line["peer_mcc"] is None or not line["judged"]:
            continue
        who = f"{line['case']}, seed {line['size']['seed']}"
        missed += [
            f"{who}: {name} is {line[name]:.4f}, SAELens' {line[f'peer_{name}']:.4f}"
            for name in ("mcc", "ev")
            if line[name] < line[f"peer_{name}"] - MARGIN
        ]
        if line["error"] > 2e-3:
            missed.append(f"{who}: the sides' scores differ by {line['error']:.1e}")
        if abs(line["l0"] / line["peer_l0"] - 1) > EQUAL:
            missed.append(
                f"{who}: {line['l0']:.2f} codes per example, not {line['peer_l0']:.2f}"
            )
    return missed


def medians(rows: list[dict[str, Any]]) -> None:
    """Print differences to SAELens, median over worlds."""
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
    """Both sides on both worlds."""
    python = PEERS
    if "--peer" in sys.argv:
        python = Path(sys.argv[sys.argv.index("--peer") + 1])
    rows = []
    if "--tiny" in sys.argv:
        data = own_world(0)
        for case in (CASES[1], CASES[3]):
            rows += rows_of(case, data, 0, None)
        finish(rows, [])
    if not python.exists():
        finish(rows, [f"there is no {python}; run benchmarks/peers/setup.sh"])
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            data, peers = peer_runs(python, Path(folder) / "world", seed)
        for case in CASES:
            rows += rows_of(case, data, seed, peers[case.name])
    medians(rows)
    finish(rows, missed_bars(rows))


if __name__ == "__main__":
    main()
