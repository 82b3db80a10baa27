"""Examples made of subspaces that are read at random, for the tests of blocks."""

from typing import NamedTuple

import numpy as np
from planted_atoms import unit


class Planted(NamedTuple):
    """Mechanisms, directions near or inside of them, and gradients of readouts.

    ``rows`` ``[S, D]`` with ``group`` ``[S]``, ``directions`` ``[M, D]`` with ``owner``
    ``[M]``, ``stacks`` ``[N, K, D]``, ``active`` ``[N, G]``.
    """

    rows: np.ndarray
    group: np.ndarray
    directions: np.ndarray
    owner: np.ndarray
    stacks: np.ndarray
    active: np.ndarray


def planted_blocks(
    sizes,
    *,
    seed=0,
    dim=32,
    num=3000,
    readouts=4,
    rate=0.06,
    extra=1,
    linear=False,
    together=(),
):
    """Mechanisms of ``sizes`` dimensions, with spread directions inside of each.

    A mechanism contributes one direction to all readouts of an example, or with
    ``linear`` one of its own to each.
    """
    rng = np.random.default_rng(seed)
    bases = [np.linalg.qr(rng.normal(size=(dim, size)))[0].T for size in sizes]
    active = rng.random((num, len(sizes))) < rate
    for first, second in together:
        active[:, second] = active[:, first]
    stacks = np.zeros((num, readouts, dim))
    for mechanism, basis in enumerate(bases):
        examples = np.flatnonzero(active[:, mechanism])
        shape = (len(examples), readouts, len(basis) if linear else 1)
        codes = rng.normal(size=shape) * rng.uniform(0.5, 1.5, (len(examples), 1, 1))
        if not linear:
            codes = codes * rng.normal(size=(len(examples), 1, len(basis)))
        if len(basis) == 1 and not linear:  # the size of a reader is not near 0
            codes = np.sign(codes) * rng.uniform(0.5, 1.5, (len(examples), 1, 1))
            codes = codes * rng.normal(size=shape)
        stacks[examples] += codes @ basis
    directions = [_spread(rng, basis, extra) for basis in bases]
    return Planted(
        rows=np.concatenate(bases),
        group=np.repeat(np.arange(len(sizes)), sizes),
        directions=np.concatenate(directions),
        owner=np.repeat(np.arange(len(sizes)), [len(part) for part in directions]),
        stacks=stacks,
        active=active,
    )


def _spread(rng, basis, extra):
    """Directions of a subspace, ``extra`` more than it has dimensions."""
    if len(basis) == 1:
        return basis
    axes = np.linalg.qr(rng.normal(size=(len(basis), len(basis))))[0]
    sums = [unit(axes[i] + axes[(i + 1) % len(basis)]) for i in range(extra)]
    return np.concatenate([axes, *(row[None] for row in sums)]) @ basis
