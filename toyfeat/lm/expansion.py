r"""The KL of a model near a reconstruction, and gradients along the way to it.

With :math:`\phi(t)` the KL at :math:`x + t e`, all tokens of a window replaced,
:math:`\phi(0) = \phi'(0) = 0` and :math:`\phi''(t) = e^T H_t e`, so that

.. math:: \mathrm{KL}(x + e) = \int_0^1 (1 - t)\, e^T H_t e \, dt, \qquad
   \nabla \mathrm{KL}(x + e) = \int_0^1 H_t e \, dt

The Gauss-Newton part of :math:`H_t` is the second moment of gradients at labels that
the model draws at :math:`x + t e`, and all of it where logits are linear in the
activations.  So ``1/2 sum_k (g_k . e)^2`` is unbiased for the KL with :math:`t` of
density :math:`2 (1 - t)`, and has the gradient of the KL, by :math:`e`, with uniform
:math:`t`; both up to that part, and to blocks between tokens where each is squared.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_choice, check_function, check_int
from toyfeat.dictionary.functional import RunBehind
from toyfeat.dictionary.losses import Expansion
from toyfeat.dictionary.types import Dictionary
from toyfeat.lm.finetune import WindowTaps
from toyfeat.tap.random_rules import draw_labels
from toyfeat.types import Array, ArrayLike, Params

_PATHS: dict[str, Callable[[Array], Array]] = {
    "slope": lambda uniform: uniform,
    "value": lambda uniform: 1 - jnp.sqrt(1 - uniform),
}
"""Name to the place on the way from the activation (0) to the reconstruction (1) that a
uniform number stands for."""


class _Windows(NamedTuple):
    """Some windows, as float32 on the device.

    Attributes:
      entry: ``[B, T, D]``, the stream that the model behind the site starts from.
      acts: ``[B, T, E]``, activations at the site.
      weights: ``[B, T]``.
      point: ``[B, T, E]``, reconstructions.
    """

    entry: Array
    acts: Array
    weights: Array
    point: Array


def expand_kl(
    run: RunBehind,
    params: Params,
    taps: WindowTaps,
    point: ArrayLike,
    *,
    draws: int = 0,
    seed: int = 0,
    batch: int = 8,
) -> Expansion:
    r"""Expand the KL of a model at a reconstruction: a backward pass, and one a draw.

    Args:
      run: the model behind the site, of :func:`toyfeat.lm.split.split_at`.
      params: of the model.
      taps: activations and weights of whole windows.
      point: ``[num, T, E]``, the reconstruction; tokens that do not count keep their
        activations.
      draws: ``K``, of the curvature.
      seed: of the draws.
      batch: windows at a time.

    Returns:
      :class:`toyfeat.losses.Expansion` with leading axes ``[num, T]``, in host memory;
      draws in bfloat16, ``2 num T K E`` bytes.

    Raises:
      TypeError: if ``run`` is no function, or a size no number.
    """
    check_function("expand_kl", "run", run, "(params, entry, value)")
    check_int("expand_kl", "draws", draws, least=0)
    pull = partial(_expand, run, draws)
    parts = _by_batch("expand_kl", pull, params, taps, point, seed, batch)
    where: Any = np.asarray(point)
    return Expansion(where, *parts)


def draw_on_path(
    run: RunBehind,
    params: Params,
    taps: WindowTaps,
    point: ArrayLike,
    *,
    draws: int,
    path: str = "slope",
    seed: int = 0,
    batch: int = 8,
) -> np.ndarray:
    """Draw gradients on the way to a reconstruction, for :func:`toyfeat.losses.fisher`.

    Args:
      run: as of :func:`expand_kl`.
      params: of the model.
      taps: activations and weights of whole windows.
      point: ``[num, T, E]``, the reconstruction.
      draws: ``K``, each at a place of its own, the same for all tokens of a window.
      path: ``"slope"``, uniform places, which make the gradient of the square that of
        the KL at the reconstruction; ``"value"``, density ``2 (1 - t)``, which makes
        its value that.
      seed: of the draws.
      batch: windows at a time.

    Returns:
      ``[num, T, K, E]`` bfloat16, divided by the root of their number.

    Raises:
      ValueError: for another path.
      TypeError: if ``run`` is no function, or a size no number.
    """
    check_function("draw_on_path", "run", run, "(params, entry, value)")
    check_int("draw_on_path", "draws", draws)
    check_choice("draw_on_path", "path", path, _PATHS)
    pull = partial(_draw_on_path, run, draws, path)
    return _by_batch("draw_on_path", pull, params, taps, point, seed, batch)


def reconstruct(
    dictionary: Dictionary, params: Params, acts: ArrayLike, *, batch: int = 64
) -> np.ndarray:
    """Reconstruct the activations of windows, some windows at a time.

    Args:
      dictionary: of activations.
      params: for taps in their own units.
      acts: ``[num, T, D]`` in any floating-point dtype.
      batch: windows at a time.

    Returns:
      ``[num, T, D]`` float32, in host memory: the ``point`` of :func:`expand_kl`.
    """
    check_int("reconstruct", "batch", batch)
    rows = np.asarray(acts)
    parts = [
        np.asarray(_decode(dictionary, params, rows[i : i + batch]))
        for i in range(0, len(rows), batch)
    ]
    return np.concatenate(parts) if parts else np.zeros(rows.shape, np.float32)


@partial(jax.jit, static_argnums=0)
def _decode(dictionary: Dictionary, params: Params, acts: Array) -> Array:
    """Encode and decode windows of activations."""
    flat = acts.astype(jnp.float32).reshape(-1, acts.shape[-1])
    codes = dictionary.encode(params, flat)
    return dictionary.decode(params, codes, acts=flat).reshape(acts.shape)


def _by_batch(
    who: str,
    pull: Any,
    params: Params,
    taps: WindowTaps,
    point: ArrayLike,
    seed: int,
    batch: int,
) -> Any:
    """Run a function of batches of windows, and concatenate its results."""
    check_int(who, "batch", batch)
    if np.shape(point) != np.shape(taps.acts) or not len(taps.acts):
        raise ValueError(
            f"{who}: point must have the shape of taps.acts, {np.shape(taps.acts)}, "
            f"with at least one window, got {np.shape(point)}; decode the codes of all "
            "of the windows"
        )
    entry = taps.acts if taps.entry is None else taps.entry
    arrays = [np.asarray(x) for x in (entry, taps.acts, taps.weights, point)]
    results = []
    for start in range(0, len(arrays[0]), batch):
        part = [jnp.asarray(x[start : start + batch], jnp.float32) for x in arrays]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(seed), start + jnp.arange(len(part[0]))
        )
        results.append(jax.device_get(pull(params, keys, _Windows(*part))))
    return jax.tree.map(lambda *x: np.concatenate(x), *results)


@partial(jax.jit, static_argnums=(0, 1))
def _expand(
    run: RunBehind, draws: int, params: Params, keys: Array, windows: _Windows
) -> tuple[Array, Array, Array | None]:
    """Compute value, slope and draws at the reconstructions of some windows."""
    counts = windows.weights[:, :, None] > 0
    clean = jax.nn.log_softmax(run(params, windows.entry, windows.acts))
    splice = partial(_splice, run, params, windows)
    logits, pull = jax.vjp(splice, windows.point)
    spliced = jax.nn.log_softmax(logits)
    kl = jnp.sum(jnp.exp(clean) * (clean - spliced), axis=2)
    # Backward from q - p of the tokens that count.
    change = jnp.where(counts, jnp.exp(spliced) - jnp.exp(clean), 0)
    (slope,) = pull(change)
    if not draws:
        return kl, slope, None
    probs = jnp.exp(spliced)
    labels = jax.vmap(draw_labels, (0, 0, None))(keys, probs, draws)
    by_draw = jnp.moveaxis(labels, 2, 0)
    grads = jax.lax.map(lambda x: _pull_label(pull, probs, x, counts), by_draw)
    return kl, slope, _last_axis(grads)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _draw_on_path(
    run: RunBehind,
    draws: int,
    path: str,
    params: Params,
    keys: Array,
    windows: _Windows,
) -> Array:
    """Draw gradients at places between activations and reconstructions."""
    counts = windows.weights[:, :, None] > 0
    error = windows.point - windows.acts
    splice = partial(_splice, run, params, windows)

    def draw(k: Array) -> Array:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
        pairs = jax.vmap(jax.random.split)(own)
        # One place in each of K equal parts, the same for the tokens of a window.
        place = jax.vmap(jax.random.uniform)(pairs[:, 0])
        uniform = (k.astype(place.dtype) + place) / draws
        error_there = _PATHS[path](uniform)[:, None, None] * error
        logits, pull = jax.vjp(lambda x: splice(windows.acts + x), error_there)
        probs = jax.nn.softmax(logits)
        labels = jax.vmap(draw_labels, (0, 0, None))(pairs[:, 1], probs, 1)
        return _pull_label(pull, probs, labels[:, :, 0], counts)

    return _last_axis(jax.lax.map(draw, jnp.arange(draws)))


def _splice(run: RunBehind, params: Params, windows: _Windows, value: Array) -> Array:
    """Compute logits with other activations at the tokens that count."""
    counts = windows.weights[:, :, None] > 0
    return run(params, windows.entry, jnp.where(counts, value, windows.acts))


def _pull_label(pull: Any, probs: Array, labels: Array, counts: Array) -> Array:
    """Compute gradients of the loss at labels of the tokens that count."""
    hits = jax.nn.one_hot(labels, probs.shape[2], dtype=probs.dtype)
    return pull(jnp.where(counts, probs - hits, 0))[0]


def _last_axis(grads: Array) -> Array:
    """Move draws from axis 0 to axis 2, and divide them by the root of their number."""
    scale = len(grads) ** 0.5
    return jnp.moveaxis(grads / scale, 0, 2).astype(jnp.bfloat16)
