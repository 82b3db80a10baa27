"""Time fits of the Jacobian lens, and their error to a long one.

The plain fit, its fast forms at a fifth of its cost, and the reference estimator in
torch on the same weights.  Seconds are per prompt, taken in turns; a fit takes as many
prompts as its row says.  Errors are relative Frobenius distances to a fit of other,
more prompts, mean and largest over layers.

    python benchmarks/lens.py --folder SmolLM2-135M --tokens tokens.npy --json rows.json

``--folder`` has weights as ``load_decoder`` reads them, ``--tokens`` windows of text
``[num, T]``.  Without them weights are random and of the size of SmolLM2-135M, and so
are tokens: times are the same, errors mean nothing.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from contest import HERE, PEERS, Worker
from harness import BenchmarkConfig, finish, medians, parse_command, row
from tap_decoder import SIZE

import toyfeat as ft
from toyfeat.models.decoder import Decoder, DecoderConfig, llama, load_decoder

TINY = {**SIZE, "layers": 3, "dim": 36, "hidden": 64, "vocab": 128}
SHARE = 5
"""A fast fit may take a fifth of the time of the plain one."""


@dataclass(frozen=True)
class LensConfig(BenchmarkConfig):
    """Options of this benchmark."""

    folder: Path | None = None
    """Weights of a model; random ones otherwise."""
    tokens: Path | None = None
    """Windows of text, ``[num, T]`` as ``.npy``; random ones otherwise."""
    prompts: int = 100
    """Prompts of the plain fit."""
    long: int = 400
    """Prompts of the long fit, others than those of the plain one."""
    chunk: int = 16
    """Cotangents at a time, and copies of a prompt for torch."""
    rounds: int = 3
    """Turns of the timing."""


class Setup(NamedTuple):
    """Model, parameters and prompts.

    Attributes:
      config: of the decoder.
      model: lens model.
      params: its parameters.
      tokens: ``[num, T]``.
      skip: positions that are skipped.
    """

    config: DecoderConfig
    model: ft.lenses.LensModel
    params: Any
    tokens: np.ndarray
    skip: dict[str, int]


class Fit(NamedTuple):
    """A form of the fit.

    Attributes:
      prompts: how many it takes.
      options: of ``mean_jacobian``.
      shrink: whether the estimate is shrunken by its halves.
    """

    prompts: int
    options: dict[str, Any]
    shrink: bool = False


def fits(config: LensConfig, dim: int) -> dict[str, Fit]:
    """List the plain fit, and splits of a fifth of its cotangents over prompts."""
    plain = {"chunk": config.chunk}
    forms = {
        "plain": Fit(config.prompts, plain),
        "chain": Fit(config.prompts, {**plain, "chain": True}),
        "fewer prompts": Fit(config.prompts // SHARE, plain),
        "fewer prompts, shrunken": Fit(max(2, config.prompts // SHARE), plain, True),
        "plain, shrunken": Fit(config.prompts, plain, True),
    }
    # Fewer cotangents each, for more prompts, at the same cost.
    for divisor in (4, 9, 18, 36):
        num = max(1, dim // divisor)
        prompts = max(1, config.prompts * dim // num // SHARE)
        options = {**plain, "cotangents": num, "key": jax.random.key(0)}
        forms[f"{num} random cotangents"] = Fit(prompts, options)
    return forms


def open_setup(config: LensConfig, folder: Path | None) -> Setup:
    """Load the model, or draw one, and the prompts."""
    length = 24 if config.tiny else 128
    if folder is not None:
        loaded = load_decoder(folder, tokenizer=False)
        decoder, params = loaded.config, loaded.params
    else:
        size: dict[str, Any] = TINY if config.tiny else SIZE
        decoder = llama(**size, context=2048, tied=True)
        params = Decoder(decoder).init(jax.random.key(0), jnp.zeros((1, 2), int))
    if config.tokens is not None:
        tokens = np.load(config.tokens)
    else:
        most = max(f.prompts for f in fits(config, decoder.dim).values()) + config.long
        tokens = np.random.default_rng(0).integers(0, decoder.vocab, (most, length))
    skip = {"skip_first": 4 if config.tiny else 16, "skip_last": 1}
    return Setup(decoder, ft.lenses.from_decoder(decoder), params, tokens, skip)


class Compiled(NamedTuple):
    """A form of the fit, compiled for one prompt at a time.

    Attributes:
      prompts: how many it takes.
      init: makes an empty state.
      update: ``(state, params, tokens [1, T]) -> state``.
      finish: makes the estimate.
    """

    prompts: int
    init: Callable[[], Any]
    update: Callable[..., Any]
    finish: Callable[[Any], Any]


def compile_fit(setup: Setup, form: Fit) -> Compiled:
    """Compile the update by one prompt."""
    acc = ft.lenses.mean_jacobian(
        setup.model, setup.config.dim, **setup.skip, **form.options
    )
    update = jax.jit(acc.update)
    tokens = jnp.asarray(setup.tokens[:1])
    compiled = update.lower(acc.init(), setup.params, tokens).compile()
    finish = ft.lenses.shrunken if form.shrink else jax.jit(acc.finish)
    return Compiled(form.prompts, acc.init, compiled, finish)


def run_fit(setup: Setup, fit: Compiled, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Fit prompts, which are gone through again if there are too few."""
    state = fit.init()
    for index in range(fit.prompts):
        prompt = jnp.asarray(tokens[[index % len(tokens)]])
        state = fit.update(state, setup.params, prompt)
    return jax.tree.map(np.asarray, fit.finish(state).matrices)


def one_prompt(setup: Setup, fit: Compiled) -> Callable[[], Any]:
    """Make the update by one prompt, to be timed."""
    state, tokens = fit.init(), jnp.asarray(setup.tokens[:1])
    return lambda: jax.block_until_ready(fit.update(state, setup.params, tokens))


def relative_errors(
    matrices: dict[str, np.ndarray], truth: dict[str, np.ndarray]
) -> list[float]:
    """Relative Frobenius distances, layer by layer."""
    return [
        float(np.linalg.norm(matrices[site] - x) / np.linalg.norm(x))
        for site, x in truth.items()
    ]


def peer_run(
    setup: Setup, config: LensConfig, worker: Worker, plain: Compiled
) -> Callable[[], Any]:
    """One prompt by torch, after a check that its Jacobians are the same."""
    order = {"tokens": setup.tokens[0].tolist(), "batch": config.chunk, **setup.skip}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/jacobians.npy"
        worker.ask(what="run", **order)
        worker.ask(what="save", path=path)
        theirs = np.load(path)
    ours = run_fit(setup, plain._replace(prompts=1), setup.tokens[:1])
    truth = dict(zip(setup.model.sites[:-1], theirs, strict=True))
    if (error := max(relative_errors(ours, truth))) > 1e-3:
        raise SystemExit(f"lens: torch's Jacobians are {error:.1e} off, no time")
    return partial(worker.ask, what="run", **order)


def measure(config: LensConfig, worker: Worker | None, folder: Path | None) -> Any:
    """Time and score all fits; rows and missed bars."""
    setup = open_setup(config, folder)
    forms = {
        name: compile_fit(setup, form)
        for name, form in fits(config, setup.config.dim).items()
    }
    runs = {name: one_prompt(setup, form) for name, form in forms.items()}
    if worker is not None:
        worker.ask(what="load", folder=str(folder))
        runs["torch"] = peer_run(setup, config, worker, forms["plain"])
    seconds = medians(runs, rounds=config.rounds)
    # Errors: to the long fit of the first prompts, by fits of those behind.
    truth = run_fit(setup, forms["plain"]._replace(prompts=config.long), setup.tokens)
    size = {"prompts": config.prompts, "length": setup.tokens.shape[1]}
    size |= {"layers": setup.config.layers, "dim": setup.config.dim}
    rows, missed, whole = [], [], seconds["plain"] * config.prompts
    for name, form in forms.items():
        errors = relative_errors(
            run_fit(setup, form, setup.tokens[config.long :]), truth
        )
        rows.append(
            row(
                "lens",
                size,
                name,
                fit_prompts=form.prompts,
                seconds_per_prompt=seconds[name],
                ours_s=seconds[name] * form.prompts,
                times_faster=whole / (seconds[name] * form.prompts),
                peer_s=seconds["torch"] * config.prompts if worker else None,
                error=float(np.mean(errors)),
                worst_error=max(errors),
            )
        )
    # The bars, which tiny sizes say nothing of.
    plain, fast = rows[0], [x for x in rows[1:] if x["times_faster"] >= SHARE]
    if not any(x["error"] <= plain["error"] for x in fast):
        missed.append("lens: no fit has the plain one's error in a fifth of its time")
    if worker is not None and seconds["plain"] > seconds["torch"]:
        missed.append("lens: the plain fit is slower than torch's")
    return rows, [] if config.tiny else missed


def main() -> None:
    """Run the benchmark."""
    config = parse_command(LensConfig, __doc__)
    if config.tiny:
        config = LensConfig(
            tiny=True, json=config.json, prompts=5, long=8, chunk=8, rounds=1
        )
    if not PEERS.exists():
        print("lens: no peers (bash benchmarks/peers/setup.sh), torch is left out")
        rows, missed = measure(config, None, config.folder)
        finish(rows, missed, config.json)
    worker = Worker(PEERS, HERE / "lens_peer.py", None)
    try:
        with tempfile.TemporaryDirectory() as made:
            folder = config.folder or Path(made)
            if config.folder is None:
                size = TINY if config.tiny else SIZE
                worker.ask(what="make", folder=str(folder), **size)
            rows, missed = measure(config, worker, folder)
    finally:
        worker.end()
    finish(rows, missed, config.json)


if __name__ == "__main__":
    main()
