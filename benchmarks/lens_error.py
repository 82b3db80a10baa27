"""What a fit of the Jacobian lens costs at a given error, on a language model.

The error of a mean over ``n`` prompts is known from the scatter ``V`` of single ones:
its square is ``V / n``.  So a few dozen prompts say what 20 or 100 would, and rows of
the Jacobians along a few directions of a random basis say it of all rows.  A fast form
of the fit that takes ``n`` prompts is scored by ``error^2 / (V / n)``: to have the
error of the plain fit in a fifth of its time it has to be a fifth or less.  The error
of a form is its distance to the mean of prompts that it has not seen, less what is due
to the scatter of those.

    python benchmarks/lens_prompts.py --out out/lens/rows --rows 16 --clusters 8
    python benchmarks/lens_prompts.py --out out/lens/whole --length 40 --skip-first 8
    python benchmarks/lens_error.py --rows out/lens/rows --whole out/lens/whole
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row
from lens_prompts import list_prompts

SHARE = 5
"""A fast fit may take a fifth of the time of the plain one."""
DRAWS = 40
"""Draws of the prompts of a fit."""


@dataclass(frozen=True)
class ErrorConfig(BenchmarkConfig):
    """Options of this benchmark."""

    rows: Path | None = None
    """Folder of prompts with a few rows."""
    whole: Path | None = None
    """Folder of prompts with all rows."""
    layers: str = "0,7,14,21,27"
    """Layers at which whole matrices are decomposed."""
    sizes: str = "2,4"
    """Prompts of the fits that are decomposed."""
    decompositions: int = 3
    """Draws of their prompts."""


class Sample(NamedTuple):
    """Jacobians of single prompts.

    Attributes:
      parts: ``[n, L, E, R, D]``, their rows in the clusters of activations.
      weights: ``[n, L, E]``, shares of the clusters.
      rows: ``[n, L, R, D]``, all clusters together.
      directions: ``[R, D]``, of the rows, of which the identity has these very ones.
      shares: ``[L, E]``, of the clusters in prompts that were not fitted.
    """

    parts: np.ndarray
    weights: np.ndarray
    rows: np.ndarray
    directions: np.ndarray
    shares: np.ndarray


def read_sample(folder: Path, layers: list[int] | None = None) -> Sample:
    """Read the prompts of a folder."""
    parts, weights = [], []
    for number in list_prompts(folder):
        with np.load(folder / f"prompt_{number:04d}.npz") as file:
            chosen = slice(None) if layers is None else layers
            parts.append(file["rows"][chosen])
            weights.append(file["weights"][chosen])
    joined, weighted = np.stack(parts), np.stack(weights)
    rows = np.einsum("nle,nlerd->nlrd", weighted, joined)
    basis = folder / "basis.npy"
    directions = np.load(basis) if basis.exists() else np.eye(rows.shape[-1])
    shares = np.load(folder / "shares.npy")[len(parts) :].mean(axis=0)
    shares = shares if layers is None else shares[layers]
    return Sample(joined, weighted, rows, directions, shares)


def scatter(rows: np.ndarray) -> np.ndarray:
    """Variance between prompts ``[L]``, summed over rows and columns."""
    return rows.var(axis=0, ddof=1).sum(axis=(-2, -1))


def score(
    sample: Sample,
    num: int,
    fit: Callable[[Sample, np.ndarray], np.ndarray],
    draws: int,
) -> np.ndarray:
    """Squared errors of a form of the fit over ``V / num``, ``[draws, L]``.

    Args:
      sample: of prompts.
      num: prompts of the fit.
      fit: ``(sample, numbers) -> [L, R, D]``.
      draws: of the prompts.

    Returns:
      Ratios; the plain fit has 1 in expectation.
    """
    rng, total, variance = (
        np.random.default_rng(0),
        len(sample.rows),
        scatter(sample.rows),
    )
    ratios = []
    for _ in range(draws):
        order = rng.permutation(total)
        chosen, unseen = order[:num], order[num:]
        distance = ((fit(sample, chosen) - sample.rows[unseen].mean(axis=0)) ** 2).sum(
            (-2, -1)
        )
        ratios.append((distance - variance / len(unseen)) / (variance / num))
    return np.array(ratios)


def plain(sample: Sample, chosen: np.ndarray) -> np.ndarray:
    """Mean over prompts."""
    return sample.rows[chosen].mean(axis=0)


def random_rows(sample: Sample, chosen: np.ndarray) -> np.ndarray:
    """Half of the rows each, of the prompts in turn."""
    half = sample.rows.shape[2] // 2
    upper = sample.rows[chosen[::2], :, :half].mean(axis=0)
    lower = sample.rows[chosen[1::2], :, half:].mean(axis=0)
    return np.concatenate([upper, lower], axis=1)


def stratified(sample: Sample, chosen: np.ndarray) -> np.ndarray:
    """Means of the clusters, by their shares in all of the text."""
    weights = sample.weights[chosen]
    total = weights.sum(axis=0)
    means = np.einsum("nle,nlerd->lerd", weights, sample.parts[chosen])
    means /= np.maximum(total, 1e-9)[:, :, None, None]
    # A cluster that no prompt has visited says nothing.
    shares = np.where(total > 0, sample.shares, 0)
    shares = shares / shares.sum(axis=1, keepdims=True)
    return np.einsum("le,lerd->lrd", shares, means)


def halves(sample: Sample, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of two halves of the prompts, less the identity."""
    one, other = (sample.rows[chosen[i::2]].mean(axis=0) for i in (0, 1))
    return one - sample.directions, other - sample.directions


def scaled(sample: Sample, chosen: np.ndarray) -> np.ndarray:
    """Scale ``J - I`` by the share of it that two halves agree on, layer by layer."""
    first, second = halves(sample, chosen)
    mean = (first + second) / 2
    agreed = (first * second).sum((-2, -1)) / (mean**2).sum((-2, -1))
    return sample.directions + np.clip(agreed, 0, 1)[:, None, None] * mean


def shrunken(sample: Sample, chosen: np.ndarray) -> np.ndarray:
    """Reduce singular values to what the other half confirms (``lenses.shrunken``)."""
    first, second = halves(sample, chosen)
    total = np.zeros_like(first)
    for own, other in ((first, second), (second, first)):
        u, s, vt = np.linalg.svd(own, full_matrices=False)
        along = np.einsum("ldk,ldi,lki->lk", u, other, vt, optimize=True)
        total += (u * np.clip(along, 0, s)[:, None]) @ vt
    return sample.directions + total / 2


def truncated(rank: int) -> Callable[[Sample, np.ndarray], np.ndarray]:
    """Make the best sketch of a rank, which no sketch from products can beat."""

    def fit(sample: Sample, chosen: np.ndarray) -> np.ndarray:
        mean = plain(sample, chosen) - sample.directions
        u, s, vt = np.linalg.svd(mean, full_matrices=False)
        return sample.directions + (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank]

    return fit


def error_row(
    name: str, num: int, ratios: np.ndarray, sample: Sample
) -> dict[str, Any]:
    """Make the row of a form: its squared error over that of the plain fit."""
    by_draw = ratios.mean(axis=1)
    spread = by_draw.std(ddof=1) / np.sqrt(len(by_draw)) if len(by_draw) > 1 else None
    return row(
        "lens error",
        {"sample": len(sample.rows), "rows": sample.rows.shape[2], "prompts": num},
        name,
        squared_error=float(ratios.mean()),
        spread_of_draws=None if spread is None else float(spread),
        layers=[round(float(x), 4) for x in ratios.mean(axis=0)],
        meets_bar=bool(ratios.mean() <= 1 / SHARE),
    )


def scatter_row(name: str, sample: Sample) -> dict[str, Any]:
    """Make the row of the scatter: what the law says of 20, 100 and 400 prompts."""
    variance, num = scatter(sample.rows), len(sample.rows)
    mean = sample.rows.mean(axis=0)
    # |mean|^2 has V / n of noise in it.
    norm = np.sqrt((mean**2).sum((-2, -1)) - variance / num)
    first, second = (scatter(sample.rows[i::2]) for i in (0, 1))
    a, b = (sample.rows[i::2].mean(axis=0) for i in (0, 1))
    cosine = (a * b).sum((-2, -1)) / np.sqrt(
        (a**2).sum((-2, -1)) * (b**2).sum((-2, -1))
    )
    figures = {
        f"error_{n}": [round(float(x), 4) for x in np.sqrt(variance / n) / norm]
        for n in (20, 100, 400)
    }
    return row(
        "lens scatter",
        {"sample": num, "rows": sample.rows.shape[2]},
        name,
        **figures,
        scatter_of_halves=float(np.mean(first / second)),
        cosine_of_halves=[round(float(x), 4) for x in cosine],
        norm_squared_per_row=[
            round(float(x), 4) for x in norm**2 / sample.rows.shape[2]
        ],
    )


def block_ratios(sample: Sample, num: int) -> np.ndarray:
    """Scatter of the means of ``num`` prompts in a row over ``V / num``, ``[1, L]``.

    The law is ``1``; prompts that depend on their neighbours would be above.
    """
    blocks = len(sample.rows) // num
    rows = sample.rows[: blocks * num].reshape(blocks, num, *sample.rows.shape[1:])
    return (scatter(rows.mean(axis=1)) / (scatter(sample.rows) / num))[None]


def few_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of what a few rows of every Jacobian say."""
    sample = read_sample(folder)
    yield scatter_row(folder.name, sample)
    for num in (4, 8):
        if num * 2 > len(sample.rows):
            continue
        yield error_row("means of neighbours", num, block_ratios(sample, num), sample)
    for num in (8, 20):
        if num * 2 > len(sample.rows):
            continue
        for name, fit in {
            "plain": plain,
            "random cotangents, half": random_rows,
            "stratified": stratified,
            "scaled": scaled,
        }.items():
            yield error_row(name, num, score(sample, num, fit, DRAWS), sample)


def whole_matrices(config: ErrorConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of what needs whole matrices."""
    layers = [int(x) for x in config.layers.split(",")]
    yield scatter_row(folder.name, read_sample(folder))
    sample = read_sample(folder, layers)
    for num in map(int, config.sizes.split(",")):
        for name, fit in {
            "plain, whole": plain,
            "stratified, whole": stratified,
            "scaled, whole": scaled,
            "shrunken": shrunken,
            "sketch of rank 64": truncated(64),
            "sketch of rank 256": truncated(256),
        }.items():
            ratios = score(sample, num, fit, config.decompositions)
            yield error_row(name, num, ratios, sample)


def main() -> None:
    """Measure what the folders say."""
    config = parse_command(ErrorConfig, __doc__)
    rows = []
    parts = [few_rows(config.rows)] if config.rows else []
    parts += [whole_matrices(config, config.whole)] if config.whole else []
    for part in parts:
        for line in part:
            print(line["method"], line["size"], line.get("squared_error"), flush=True)
            rows.append(line)
    finish(rows, [], config.json)


if __name__ == "__main__":
    main()
