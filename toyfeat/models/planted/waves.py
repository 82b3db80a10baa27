r"""Modular addition by waves, written down instead of trained.

Residual stream after the MLP: planes :math:`(\cos w_k (a + b), \sin w_k (a + b))`,
which the unembedding reads, and the embeddings of both summands, which it does not.

References:
  Nanda et al. (2023), arXiv 2301.05217; Gromov (2023), arXiv 2301.02679, whose
  quadratic network gives the planes in closed form.
"""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.models.planted.heads import (
    SITE,
    check_ints,
    dot,
    dual,
    rotation,
    unit,
)
from toyfeat.models.planted.task import Task, Truth
from toyfeat.tap import from_split
from toyfeat.types import Array, Params

_AMPLITUDES = (0.7, 1.3)
"""Range of the amplitudes of frequencies: different, but none negligible."""


def modular_addition(
    key: Array,
    *,
    modulus: int = 59,
    frequencies: int = 5,
    dim: int = 48,
    embedding: float = 2.0,
) -> Task:
    r"""Plant planes of a few frequencies, from which the model adds modulo ``p``.

    The outputs are logits of :math:`(a + b) \bmod p`.

    Args:
      key: random key of the task.
      modulus: ``p``, an odd prime.
      frequencies: how many of the ``(p - 1) / 2``; their amplitudes are U[.7, 1.3].
      dim: width ``D``, at least ``6 * frequencies``.
      embedding: length of a summand's wave, in 0 .. 1000; one that is read has 1.

    Returns:
      :class:`toyfeat.models.planted.Task` with one group per frequency.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.
    """
    _check(modulus, frequencies, dim, embedding)
    waves_key, rows_key, size_key, axes_key = jax.random.split(key, 4)
    angle, amplitude = _draw_waves(waves_key, size_key, modulus, frequencies)
    readers, embedding_axes = _draw_directions(rows_key, axes_key, dim, 2 * frequencies)
    # The activation is the planes of a + b by their writers, and both embeddings; the
    # unembedding reads the planes alone.
    writers = dual(readers)
    params = {
        "angle": angle,
        "embed": embedding * embedding_axes,
        "writers": writers,
        "unembed": dot(readers.T, _logits(angle, amplitude, modulus)),
    }
    return Task(
        probed=_PROBED,
        params=params,
        sample=partial(_pairs, modulus),
        site=SITE,
        truth=Truth(
            readers=readers,
            writers=writers,
            frequency=jnp.ones(2 * frequencies),
            group=jnp.repeat(jnp.arange(frequencies), 2),
        ),
        side="readers",
        name="modular addition",
        features=_planes,
        fit=0.0,
        ignored=embedding_axes,
        about=f"Logits of a + b mod {modulus} from {frequencies} frequencies, beside "
        f"the embeddings of a and b, {embedding:g} times as long and not read.",
        limits="Features are planes: no direction inside of one is preferred, and only "
        "the plane is scored.",
    )


def _draw_waves(
    key: Array, size_key: Array, modulus: int, frequencies: int
) -> tuple[Array, Array]:
    """Draw different frequencies ``k``, as angles ``2 pi k / p``, and amplitudes."""
    numbers = jnp.arange(1, (modulus - 1) // 2 + 1)  # p - k is the same wave as k
    waves = jnp.sort(jax.random.permutation(key, numbers)[:frequencies])
    low, high = _AMPLITUDES
    amplitude = jax.random.uniform(size_key, (frequencies,), minval=low, maxval=high)
    return 2 * jnp.pi / modulus * waves.astype(float), amplitude


def _draw_directions(
    rows_key: Array, axes_key: Array, dim: int, num: int
) -> tuple[Array, Array]:
    """Draw ``num`` readers, and axes for the embeddings of two summands.

    The axes are orthogonal to all readers, so that the model does not read them.
    """
    axes = rotation(axes_key, dim)
    read_axes, embedding_axes = axes[: dim - 2 * num], axes[dim - 2 * num :]
    readers = unit(dot(jax.random.normal(rows_key, (num, dim - 2 * num)), read_axes))
    return readers, embedding_axes


def _logits(angle: Array, amplitude: Array, modulus: int) -> Array:
    """``[2 K, p]``, what each cosine and sine adds to the logits of the answers.

    Summed over a plane they are ``cos w (a + b - c)``, which is largest at the answer.
    """
    angles = angle[:, None] * jnp.arange(modulus, dtype=angle.dtype)[None, :]
    waves = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)  # [K, 2, p]
    return (amplitude[:, None, None] * waves).reshape(2 * len(angle), modulus)


def _check(modulus: int, frequencies: int, dim: int, embedding: float) -> None:
    sizes = {"modulus": modulus, "frequencies": frequencies, "dim": dim}
    check_ints("modular_addition", **sizes)
    # Frequencies of an odd prime are all alike: each visits every answer.
    prime = modulus > 2 and all(modulus % n for n in range(2, modulus))
    if not prime or not 1 <= frequencies <= (modulus - 1) // 2:
        raise ValueError(
            "modular_addition: wanted an odd prime modulus and 1 .. (modulus - 1) / 2 "
            f"frequencies, got {modulus} and {frequencies}"
        )
    if 6 * frequencies > dim:
        raise ValueError(
            f"modular_addition: wanted dim >= 6 * frequencies = {6 * frequencies}, got "
            f"{dim}"
        )
    if not 0 <= embedding <= 1e3:
        raise ValueError(
            f"modular_addition: wanted embedding in 0 .. 1000, got {embedding}"
        )


def _pairs(modulus: int, key: Array, num: int) -> Array:
    return jax.random.randint(key, (num, 2), 0, modulus)


def _waves(angle: Array, number: Array) -> Array:
    """Cosine and sine of every angle times a number, ``[N, 2 K]``."""
    phase = number[:, None] * angle[None, :]
    waves = jnp.stack([jnp.cos(phase), jnp.sin(phase)], axis=2)
    return waves.reshape(len(number), -1)


def _planes(params: Params, pairs: Array) -> Array:
    return _waves(params["angle"], pairs.sum(1).astype(params["angle"].dtype))


def _prefix(params: Params, pairs: Array) -> Array:
    numbers = pairs.astype(params["angle"].dtype)
    summands = [_waves(params["angle"], numbers[:, i]) for i in (0, 1)]
    embedded = dot(jnp.concatenate(summands, axis=1), params["embed"])
    return dot(_planes(params, pairs), params["writers"]) + embedded


def _suffix(params: Params, acts: Array) -> Array:
    return dot(acts, params["unembed"])


_PROBED = from_split(_prefix, _suffix, site=SITE)
