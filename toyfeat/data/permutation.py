"""Permutations of ``0 .. num - 1`` that are computed one index at a time.

The largest power of two ``P <= num`` gives two blocks, ``[0, P)`` and
``[num - P, num)``, that overlap and cover everything.  A round permutes the first by
a multiply-xorshift hash of ``log2 P`` bits, then the second by another, then sends
even indices to the lower half and odd ones to the upper.  Every step is a bijection
of ``[0, num)`` whatever ``num``, so nothing is walked, rejected or kept in memory.
From three rounds on no test of uniformity here tells the result from a drawn
permutation, unless ``num`` is a handful; five are made.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

ROUNDS = 5
WORDS = 6  # of a round: two hashes of three
LARGEST = 2**31 - 1


def host_words(*entropy: int) -> np.ndarray:
    """``[ROUNDS, WORDS]`` random words, the same under every version of numpy."""
    state = np.random.SeedSequence(entropy).generate_state(ROUNDS * WORDS)
    return state.astype(np.uint32).reshape(ROUNDS, WORDS)


def epoch_words(salt: Any, epoch: Any) -> Any:
    """``[ROUNDS, WORDS]`` words of two random ones and an epoch, cheap to compile."""
    counter = np.arange(ROUNDS * WORDS, dtype=np.uint32).reshape(ROUNDS, WORDS)
    counter = counter + epoch * np.uint32(ROUNDS * WORDS)
    return _scrambled(_scrambled(counter ^ salt[0]) + salt[1])


def permuted(index: Any, num: int, words: Any) -> Any:
    """Where a permutation sends each index: uint32 ``[n]`` from uint32 ``[n]``.

    ``num`` is static and at most ``LARGEST``; numpy in, numpy out, else jax.
    """
    xp = np if isinstance(index, np.ndarray) else jnp
    bits = num.bit_length() - 1
    block, half, one = np.uint32(1 << bits), np.uint32((num + 1) // 2), np.uint32(1)
    rest = np.uint32(num - (1 << bits))
    shift = np.uint32(max(1, (bits + 1) // 2))
    for word in words:
        low = _hashed(index, word[:3], block, shift)
        index = xp.where(index < block, low, index)
        high = _hashed(index - rest, word[3:6], block, shift) + rest
        index = xp.where(index >= rest, high, index)
        index = xp.where(index & one == one, half + (index >> one), index >> one)
    return index


def _hashed(x: Any, word: Any, block: np.uint32, shift: np.uint32) -> Any:
    """A bijection of ``[0, block)``; what lies outside it gives anything."""
    mask, one = block - np.uint32(1), np.uint32(1)
    x = (x * (word[0] | one) ^ word[1]) & mask
    x = x ^ (x >> shift)
    x = (x * (word[2] | one)) & mask
    return x ^ (x >> shift)


def _scrambled(x: Any) -> Any:
    """The finaliser of MurmurHash3, a bijection of 32 bits."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
