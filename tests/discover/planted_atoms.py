"""Atoms, sparse codes and their rows, for the tests of sparse coding."""

import numpy as np


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def planted(seed=0, *, dim=32, num=40, active=2, rows=3000):
    """Unit atoms and rows that are combinations of ``active`` of them."""
    rng = np.random.default_rng(seed)
    atoms = unit(rng.normal(size=(num, dim)))
    chosen = rng.permuted(np.tile(np.arange(num), (rows, 1)), axis=1)[:, :active]
    codes = np.zeros((rows, num))
    values = rng.choice([-1, 1], (rows, active)) * rng.uniform(0.5, 2, (rows, active))
    np.put_along_axis(codes, chosen, values, axis=1)
    return atoms, codes, codes @ atoms


def turned(atoms, angle, seed=1):
    """Every atom by the same angle, in a direction of its own."""
    beside = np.random.default_rng(seed).normal(size=atoms.shape)
    beside = unit(beside - np.sum(beside * atoms, axis=1, keepdims=True) * atoms)
    return np.cos(angle) * atoms + np.sin(angle) * beside
