"""A picture of causal importances: which parts matter for each feature alone."""

from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

_SHOWN = 2
"""Columns beyond one per feature that are shown: the next largest."""


def draw_importances(path: Path, name: str, seeds: list[dict[str, Any]]) -> None:
    """Draw a panel per site and seed, parts in the order of the features.

    Args:
      path: of the picture.
      name: of the toy.
      seeds: of each seed, site to ``[F, C]``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sites = list(seeds[0])
    size = (1.3 + 2.2 * len(seeds), 0.6 + 2.0 * len(sites))
    figure, axes = plt.subplots(
        len(sites), len(seeds), squeeze=False, figsize=size, layout="constrained"
    )
    image: Any = None
    colours = plt.get_cmap("Blues", 16)  # few of them make a small file
    for line, site in zip(axes, sites, strict=True):
        for axis, alone, seed in zip(line, seeds, range(len(seeds)), strict=True):
            values = np.asarray(alone[site])
            image = axis.imshow(
                sorted_columns(values),
                vmin=0,
                vmax=1,
                cmap=colours,
                aspect="auto",
                interpolation="nearest",
            )
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{site}, seed {seed}", fontsize=8)
    for line in axes:
        line[0].set_ylabel("input", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("part", fontsize=8)
    figure.colorbar(image, ax=axes, label="causal importance", shrink=0.8)
    figure.suptitle(f"{name}: parts that matter for each input alone", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def sorted_columns(values: np.ndarray) -> np.ndarray:
    """Put the part of each feature first, in their order, and the largest others."""
    _, own = linear_sum_assignment(values, maximize=True)
    others = [c for c in np.argsort(-values.sum(0)) if c not in own]
    return values[:, [*own, *others[:_SHOWN]]]
