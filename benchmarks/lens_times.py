r"""Seconds of a prompt of a lens fit: plain, block by block, and by torch.

A few cotangents of a prompt are timed, in turns; the time of all is in proportion, but
for one forward pass.  Before that, torch's Jacobian is compared with that of
``lens_prompts.py``, on the same weights.

    python benchmarks/lens_times.py --weights SmolLM2.gguf --whole out/lens/whole \
      --length 40 --skip-first 8
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from contest import HERE, PEERS, Worker
from harness import BenchmarkConfig, finish, medians, parse_command, row
from lens_prompts import PromptsConfig, Text, open_text

import toyfeat as ft

SKIP_LAST = 1


@dataclass(frozen=True)
class TimesConfig(BenchmarkConfig):
    """Options of this benchmark."""

    weights: Path | None = None
    """The ``.gguf`` file of the job's model, for torch; torch is left out without."""
    whole: Path | None = None
    """Folder of whole prompts, of this length and skip, to compare torch with."""
    peer: Path = PEERS
    """Python that has torch."""
    job: Path = Path("examples/smollm2_lens.toml")
    """Model and text."""
    length: int = 128
    """Tokens of the prompt."""
    skip_first: int = 16
    """Tokens left out at the start."""
    rows: int = 32
    """Cotangents, a divisor of the width."""
    chunk: int = 16
    """Cotangents at a time, and copies of a prompt for torch."""
    chain: bool = True
    """Whether to time the fit block by block too."""
    rounds: int = 5
    """Turns."""


def ours(config: TimesConfig, text: Text, chain: bool) -> Callable[[], Any]:
    """Make a fit of a few cotangents of one prompt."""
    acc = ft.lenses.mean_jacobian(
        text.model,
        text.work.model.config.dim,
        skip_first=config.skip_first,
        cotangents=config.rows,
        key=jax.random.key(0),
        chunk=config.chunk,
        chain=chain,
    )
    update, state = jax.jit(acc.update), acc.init()
    tokens = text.tokens[:1]
    return lambda: jax.block_until_ready(update(state, text.work.model.params, tokens))


def compare(
    config: TimesConfig, worker: Worker, tokens: list[int], whole: Path
) -> float:
    """Compare the first rows of prompt 0 with torch's; the largest relative error."""
    sizes = {"skip_first": config.skip_first, "skip_last": SKIP_LAST}
    rows = config.chunk
    worker.ask(what="run", tokens=tokens, batch=rows, rows=rows, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        worker.ask(what="save", path=f"{folder}/torch.npy")
        theirs = np.load(f"{folder}/torch.npy")
    with np.load(whole / "prompt_0000.npz") as file:
        found = np.einsum("le,leij->lij", file["weights"], file["rows"][:, :, :rows])
    distances = np.linalg.norm(found - theirs, axis=(1, 2))
    return float(np.max(distances / np.linalg.norm(theirs, axis=(1, 2))))


def main() -> None:
    """Compare, then time."""
    config = parse_command(TimesConfig, __doc__)
    settings = PromptsConfig(
        out=Path(), job=config.job, num=1, population=1, length=config.length
    )
    text = open_text(settings)
    tokens = text.tokens[0].tolist()
    runs = {"plain": ours(config, text, False)}
    if config.chain:
        runs["chain"] = ours(config, text, True)
    figures: dict[str, Any] = {}
    worker = None
    if config.weights is not None:
        worker = Worker(config.peer, HERE / "lens_peer.py", None)
        worker.ask(what="load", folder=str(config.weights))
        if config.whole is not None:
            figures["torch_differs"] = compare(config, worker, tokens, config.whole)
        order = {"batch": config.chunk, "rows": config.rows}
        order |= {"skip_first": config.skip_first, "skip_last": SKIP_LAST}
        runs["torch"] = partial(worker.ask, what="run", tokens=tokens, **order)
    seconds = medians(runs, rounds=config.rounds)
    if worker is not None:
        worker.end()
    scale = text.work.model.config.dim / config.rows
    size = {"length": config.length, "rows": config.rows, "chunk": config.chunk}
    rows = [
        row(
            "lens times",
            size,
            name,
            seconds=taken,
            prompt_s=taken * scale,
            over_plain=taken / seconds["plain"],
            **figures,
        )
        for name, taken in seconds.items()
    ]
    missed = []
    if seconds["plain"] > seconds.get("torch", np.inf):
        missed.append("lens: the plain fit is slower than torch's")
    finish(rows, missed, config.json)


if __name__ == "__main__":
    main()
