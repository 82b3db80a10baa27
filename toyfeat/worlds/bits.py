"""Random bits and the normal CDF as plain elementwise operations, fast on a CPU.

Everything here exists in JAX, and this module is an optimization for CPUs alone.  XLA
fuses elementwise operations into the code that uses their results, but not loops and
library calls.  ``jax.random`` runs the rounds of threefry in a loop on a CPU, at 17 ns
a word.  The same rounds written out take 1.5 ns and give the same bits
(docs/decisions/files.md).  The normal CDF needs about half the operations of the one
that is built on ``erfc``.  On a GPU ``jax.random`` and ``jax.scipy.special`` would do.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from toyfeat.types import Array

# Coefficients of P in normal_cdf, from the highest power down: the polynomial of
# degree 7 with the least relative error, 1.5e-7, on 0 <= |x| <= 14.
_TAIL = (
    0.035677513,
    -0.157214799,
    0.206374121,
    -0.053702910,
    0.128571912,
    0.099910368,
    0.120754455,
    0.119629267,
)
# Of threefry2x32, and its parity constant: Salmon et al., "Parallel random numbers: as
# easy as 1, 2, 3" (2011).
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
STREAM_SHIFT = 24  # the stream's number fills the upper 8 bits of the first counter


def seed_words(key: Array) -> Array:
    """Draw a seed for :func:`threefry`, ``[2]`` uint32, from a key of any kind."""
    return jax.random.bits(key, (2,), jnp.uint32)


def threefry(seed: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Hash each pair of counters to two random words (threefry2x32, 20 rounds)."""
    keys = seed[0], seed[1], seed[0] ^ seed[1] ^ jnp.uint32(_PARITY)
    first, second = first + keys[0], second + keys[1]
    for block in range(5):
        # Four rounds of additions, rotations and xors.
        for bits in _ROTATIONS[block % 2]:
            first = first + second
            rotated = (second << jnp.uint32(bits)) | (second >> jnp.uint32(32 - bits))
            second = first ^ rotated
        # Inject the next words of the key.
        first = first + keys[(block + 1) % 3]
        second = second + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return first, second


def words(seed: Array, stream: int, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Draw two independent arrays of words; streams (below 256) do not overlap."""
    *leading, last = shape
    rows = math.prod(leading)
    first = lax.broadcasted_iota(jnp.uint32, (rows, last), 0)
    second = lax.broadcasted_iota(jnp.uint32, (rows, last), 1)
    out = threefry(seed, first + jnp.uint32(stream << STREAM_SHIFT), second)
    return out[0].reshape(shape), out[1].reshape(shape)


def row_words(seed: Array, stream: int, rows: int, samples: Array) -> Array:
    """Draw words, ``[rows, n]``, that depend on the stream, the row and the sample."""
    return row_word_pairs(seed, stream, rows, samples)[0]


def row_word_pairs(
    seed: Array, stream: int, rows: int, samples: Array
) -> tuple[Array, Array]:
    """Draw two independent arrays of words, ``[rows, n]``."""
    shape = rows, len(samples)
    row = lax.broadcasted_iota(jnp.uint32, shape, 0) + jnp.uint32(
        stream << STREAM_SHIFT
    )
    return threefry(seed, row, jnp.broadcast_to(samples[None, :], shape))


def uniform(word: Array) -> Array:
    """Map words to the centres of ``2**23`` equal cells of (0, 1), never 0 or 1."""
    mantissa = (word >> jnp.uint32(9)) | jnp.uint32(0x3F800000)
    one_to_two = lax.bitcast_convert_type(mantissa, jnp.float32)
    return one_to_two - jnp.float32(1 - 2.0**-24)


def fraction(word: Array) -> Array:
    """Map words to [0, 1], with the relative precision of float32 for small values."""
    half = lax.bitcast_convert_type(word >> jnp.uint32(1), jnp.int32)
    return half.astype(jnp.float32) * jnp.float32(2.0**-31)


def normal(word: Array) -> Array:
    """Map words to standard normals, by the inverse CDF."""
    return jnp.float32(2.0**0.5) * lax.erf_inv(2 * uniform(word) - 1)


def normal_cdf(x: Array) -> Array:
    """Standard normal CDF, with a relative error of at most 1e-6 below 0.

    The tail beyond ``|x|`` is ``exp(-x**2 / 2) t P(t)`` with ``t = 1 / (1 + 0.3 |x|)``.
    """
    distance = jnp.abs(x)
    t = 1 / (1 + jnp.float32(0.3) * distance)
    # Evaluate P by Horner's scheme.
    factor = jnp.full_like(x, _TAIL[0])
    for coefficient in _TAIL[1:]:
        factor = factor * t + jnp.float32(coefficient)
    tail = jnp.exp(-0.5 * distance * distance) * t * factor
    return jnp.where(x < 0, tail, 1 - tail)
