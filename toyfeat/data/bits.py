"""Random words, uniforms and normals that fuse into what uses them.

``jax.random`` runs the rounds of threefry in a loop on CPU, ten times slower than
written out; these are the same rounds, as elementwise operations.
"""

import jax
import jax.numpy as jnp
from jax import lax

from toyfeat.types import Array

# Least relative error of P on 0 <= |x| <= 14 is 1.5e-7.
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
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def seed_words(key: Array) -> Array:
    """``[2]`` uint32 from a key of any kind."""
    return jax.random.bits(key, (2,), jnp.uint32)


def threefry(seed: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Two random words for each pair of counters (threefry2x32, 20 rounds)."""
    keys = seed[0], seed[1], seed[0] ^ seed[1] ^ jnp.uint32(0x1BD11BDA)
    first, second = first + keys[0], second + keys[1]
    for block in range(5):
        for by in _ROTATIONS[block % 2]:
            first = first + second
            turned = (second << jnp.uint32(by)) | (second >> jnp.uint32(32 - by))
            second = first ^ turned
        first = first + keys[(block + 1) % 3]
        second = second + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return first, second


def words(seed: Array, stream: int, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Two independent arrays of words; streams (below 256) do not overlap."""
    *front, last = shape
    rows = 1
    for size in front:
        rows *= size
    first = lax.broadcasted_iota(jnp.uint32, (rows, last), 0)
    second = lax.broadcasted_iota(jnp.uint32, (rows, last), 1)
    out = threefry(seed, first + jnp.uint32(stream << 24), second)
    return out[0].reshape(shape), out[1].reshape(shape)


def uniform(word: Array) -> Array:
    """Centres of ``2**23`` equal cells of (0, 1): never 0 and never 1."""
    mantissa = (word >> jnp.uint32(9)) | jnp.uint32(0x3F800000)
    one_to_two = lax.bitcast_convert_type(mantissa, jnp.float32)
    return one_to_two - jnp.float32(1 - 2.0**-24)


def fraction(word: Array) -> Array:
    """In [0, 1], with float32's relative precision for small values."""
    half = lax.bitcast_convert_type(word >> jnp.uint32(1), jnp.int32)
    return half.astype(jnp.float32) * jnp.float32(2.0**-31)


def normal(word: Array) -> Array:
    """Standard normals, by the inverse of their distribution."""
    return jnp.float32(2.0**0.5) * lax.erf_inv(2 * uniform(word) - 1)


def normal_cdf(x: Array) -> Array:
    """Standard normal probability of less than ``x``, to 1e-6 of itself below 0.

    ``exp(-x**2 / 2) t P(t)`` with ``t = 1 / (1 + .3 |x|)``; half the work of ``erfc``.
    """
    far = jnp.abs(x)
    t = 1 / (1 + jnp.float32(0.3) * far)
    factor = jnp.full_like(x, _TAIL[0])
    for coefficient in _TAIL[1:]:
        factor = factor * t + jnp.float32(coefficient)
    tail = jnp.exp(-0.5 * far * far) * t * factor
    return jnp.where(x < 0, tail, 1 - tail)
