"""Models with planted mechanisms for lenses, with the truth that a lens is held to."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import toyfeat as ft

NO_SKIP = {"skip_first": 0, "skip_last": 0}


class LensTask(NamedTuple):
    """A model, inputs to fit on and others, and the truth.

    Attributes:
      model: lens model.
      params: its parameters.
      fit: inputs of the fit.
      held_out: inputs of the score.
      site: that is read.
      answers: which coordinates of the logits are the answers.
      readers: ``[k, D]``, the directions at the site that the answers depend on, or
        ``None`` where all of it is.
      truth: ``[N, T, answers]`` on the held-out inputs, the model's own by default.
      clusters: of the clustered lens.
    """

    model: ft.lenses.LensModel
    params: Any
    fit: np.ndarray
    held_out: np.ndarray
    site: str
    answers: slice
    readers: np.ndarray | None
    truth: np.ndarray | None = None
    clusters: int = 2


def own_logits(fn: Callable[..., Any], sites: Sequence[str], dim: int) -> Any:
    """Make a lens model whose logits are the entries of the final stream."""
    return ft.lenses.from_probed(
        ft.from_function(fn),
        sites=sites,
        unembed=lambda p, resid: resid,
        head=lambda p: jnp.eye(dim),
    )


def unit_rows(num: int, dim: int, seed: int = 0) -> np.ndarray:
    """Draw orthonormal rows."""
    normal = np.random.default_rng(seed).normal(size=(dim, dim))
    return np.linalg.qr(normal)[0][:num].astype(np.float32)


def draws(num: int, dim: int, seed: int) -> np.ndarray:
    """Draw normal streams ``[num, 1, D]``."""
    normal = np.random.default_rng(seed).normal(size=(num, 1, dim))
    return normal.astype(np.float32)


def chain(num: int) -> LensTask:
    """Blocks ``h + A h W`` with a causal mixing ``A`` of positions."""
    rng, time, dim = np.random.default_rng(0), 4, 8
    mixing = np.tril(rng.normal(size=(time, time))).astype(np.float32)
    blocks = list(0.4 * rng.normal(size=(3, dim, dim)).astype(np.float32))

    def run(params: Any, x: Any, tap: Any) -> Any:
        for i, matrix in enumerate(params):
            mixed = jnp.einsum("st,btd->bsd", mixing, x)
            x = tap(f"block_{i}", x + mixed @ matrix)
        return x

    x = rng.normal(size=(2 * num, time, dim)).astype(np.float32)
    model = own_logits(run, [f"block_{i}" for i in range(3)], dim)
    return LensTask(model, blocks, x[:num], x[num:], "block_0", slice(0, dim), None)


def square(num: int) -> LensTask:
    """``h + (w . h)^2 u``, symmetric inputs."""
    w, u = unit_rows(2, 8)

    def run(params: Any, x: Any, tap: Any) -> Any:
        resid = tap("in", x)
        return tap("out", resid + (resid @ w[:, None]) ** 2 * u)

    basis = np.vstack([u, unit_rows(8, 8, 1)[1:]])
    # The answer is the coordinate along u, of which the stream has nothing.
    model = own_logits(run, ["in", "out"], 8)._replace(
        unembed=lambda p, resid: resid @ basis.T
    )
    x = draws(2 * num, 8, 0)
    x -= (x @ u)[..., None] * u
    return LensTask(model, {}, x[:num], x[num:], "in", slice(0, 1), w[None])


def product(num: int) -> LensTask:
    """``h + (a . h) (b . h) u``: the sign of either effect is the other factor's."""
    a, b, u = unit_rows(3, 8)

    def run(params: Any, x: Any, tap: Any) -> Any:
        resid = tap("in", x)
        value = (resid @ a[:, None]) * (resid @ b[:, None])
        return tap("out", resid + value * u)

    model = own_logits(run, ["in", "out"], 8)._replace(
        unembed=lambda p, resid: resid @ u[:, None]
    )
    x = draws(2 * num, 8, 1)
    x -= (x @ u)[..., None] * u
    readers = np.stack([a, b])
    return LensTask(model, {}, x[:num], x[num:], "in", slice(0, 1), readers, clusters=4)


def late(num: int) -> LensTask:
    """A feature is written at layer 2 and read by a ReLU at layer 5."""
    e, a, b = np.eye(8, dtype=np.float32)[:3]

    def run(params: Any, x: Any, tap: Any) -> Any:
        resid = x
        for layer in range(6):
            if layer == 2:
                resid = resid + (resid @ e[:, None]) * a
            if layer == 5:
                resid = resid + jnp.maximum(resid @ a[:, None], 0) * b
            resid = tap(f"layer_{layer}", resid)
        return resid

    x = draws(2 * num, 8, 2)
    x[:, :, 1:3] = 0
    model = own_logits(run, [f"layer_{i}" for i in range(6)], 8)
    return LensTask(model, {}, x[:num], x[num:], "layer_0", slice(2, 3), e[None])


def superposed(num: int) -> LensTask:
    """Twelve features in eight dimensions, one at a time, each read by a ReLU."""
    rng, features, space, dim = np.random.default_rng(2), 12, 8, 24
    rows = rng.normal(size=(features, space))
    r = np.zeros((features, dim), np.float32)
    r[:, :space] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    b = np.eye(dim, dtype=np.float32)[space : space + features]

    def run(params: Any, x: Any, tap: Any) -> Any:
        resid = tap("in", x)
        return tap("out", resid + jnp.maximum(resid @ r.T - 0.5, 0) @ b)

    sizes = rng.uniform(0.5, 1.5, (2 * num, 1, 1)).astype(np.float32)
    x = sizes * r[rng.integers(0, features, 2 * num)][:, None]
    model = own_logits(run, ["in", "out"], dim)
    answers = slice(space, space + features)
    readers = np.eye(dim, dtype=np.float32)[:space]
    return LensTask(model, {}, x[:num], x[num:], "in", answers, readers, clusters=12)


def waves(num: int) -> LensTask:
    """Addition modulo 7 by products of waves of both summands."""
    modulus = 7
    angles = 2 * np.pi / modulus * np.arange(1, 4)

    def planes(numbers: np.ndarray) -> np.ndarray:
        phase = numbers[..., None] * angles
        both = np.stack([np.cos(phase), np.sin(phase)], -1)
        return both.reshape(*phase.shape[:-1], -1)

    def run(params: Any, x: Any, tap: Any) -> Any:
        resid = tap("in", x)
        a = resid[..., :6].reshape(*resid.shape[:-1], 3, 2)
        b = resid[..., 6:12].reshape(*resid.shape[:-1], 3, 2)
        cos = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
        sin = a[..., 1] * b[..., 0] + a[..., 0] * b[..., 1]
        both = jnp.stack([cos, sin], -1).reshape(*resid.shape[:-1], 6)
        zeros = jnp.zeros((*resid.shape[:-1], 12))
        return tap("out", resid + jnp.concatenate([zeros, both], -1))

    rng = np.random.default_rng(3)
    pairs = rng.integers(0, modulus, (2 * num, 2))
    x = np.zeros((2 * num, 1, 18), np.float32)
    x[:, 0, :12] = planes(pairs).reshape(len(pairs), -1)
    unembed = planes(np.arange(modulus)).T.astype(np.float32)
    model = own_logits(run, ["in", "out"], 18)._replace(
        unembed=lambda p, resid: resid[..., 12:] @ unembed
    )
    readers = np.eye(18, dtype=np.float32)[:12]
    return LensTask(model, {}, x[:num], x[num:], "in", slice(0, 7), readers, clusters=7)


PLANTED = {
    "linear chain": chain,
    "written at 2, read at 5": late,
    "superposition": superposed,
    "square": square,
    "product of two": product,
    "sum modulo 7, by waves": waves,
}
"""Makers of tasks, of a number of prompts to fit and to score each."""
