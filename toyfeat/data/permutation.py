"""Pseudorandom permutations of ``0 .. num - 1``, computed one index at a time.

The largest power of two ``P <= num`` gives two blocks, ``[0, P)`` and
``[num - P, num)``, that overlap and together cover the range.  Each round

1. permutes the lower block by a multiply-xorshift hash of ``log2 P`` bits,
2. permutes the upper block by another such hash,
3. moves even indices to the lower half of the range and odd indices to the upper.

Every step is a bijection of ``[0, num)`` for any ``num``, so no index is rejected and
no table is kept in memory.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

# From 3 rounds on the tests of uniformity in tests/data/test_permutation.py do not tell
# the result from a drawn permutation (unless num is a handful); 2 more are a margin.
ROUNDS = 5
WORDS = 6  # random words per round: two hashes of three words
# Twice an index has to fit in 32 bits (see _divmod_of_product of batches.py).
LARGEST = 2**31 - 1


def host_words(*entropy: int) -> np.ndarray:
    """Draw ``[ROUNDS, WORDS]`` uint32 words, the same under every version of numpy."""
    state = np.random.SeedSequence(entropy).generate_state(ROUNDS * WORDS)
    return state.astype(np.uint32).reshape(ROUNDS, WORDS)


def epoch_words(salt: Any, epoch: Any) -> Any:
    """Hash two random words and an epoch to ``[ROUNDS, WORDS]``; cheap to compile."""
    counter = np.arange(ROUNDS * WORDS, dtype=np.uint32).reshape(ROUNDS, WORDS)
    counter = counter + epoch * np.uint32(ROUNDS * WORDS)
    return _murmur_finalizer(_murmur_finalizer(counter ^ salt[0]) + salt[1])


def permute_index(index: Any, num: int, words: Any) -> Any:
    """Permute indices, uint32 ``[n]``, by the permutation that the words select.

    Args:
      index: values in ``[0, num)``; a numpy array is computed by numpy, else by jax.
      num: size of the range, static and at most ``LARGEST``.
      words: from :func:`host_words` or :func:`epoch_words`.

    Returns:
      The position of each index after the permutation, uint32 ``[n]``.
    """
    xp = np if isinstance(index, np.ndarray) else jnp
    bits = num.bit_length() - 1
    block, half = np.uint32(1 << bits), np.uint32((num + 1) // 2)
    upper, low_bit = np.uint32(num - (1 << bits)), np.uint32(1)
    shift = np.uint32(max(1, (bits + 1) // 2))  # half the bits, so that all are mixed
    for word in words:
        # 1. Permute the lower block, [0, P).
        hashed = _hash_block(index, word[:3], block, shift)
        index = xp.where(index < block, hashed, index)
        # 2. Permute the upper block, [num - P, num).
        hashed = _hash_block(index - upper, word[3:6], block, shift) + upper
        index = xp.where(index >= upper, hashed, index)
        # 3. Send even indices to the lower half of the range, odd ones to the upper.
        odd = index & low_bit == low_bit
        index = xp.where(odd, half + (index >> low_bit), index >> low_bit)
    return index


def _hash_block(x: Any, word: Any, block: np.uint32, shift: np.uint32) -> Any:
    """Permute ``[0, block)`` by multiplications and xorshifts.

    Values outside the block come out as anything; the caller discards them.
    """
    mask, low_bit = block - np.uint32(1), np.uint32(1)
    # An odd factor is invertible modulo a power of two, and so is a xorshift.
    x = (x * (word[0] | low_bit) ^ word[1]) & mask
    x = x ^ (x >> shift)
    x = (x * (word[2] | low_bit)) & mask
    return x ^ (x >> shift)


def _murmur_finalizer(x: Any) -> Any:
    """Hash 32 bits by the finaliser of MurmurHash3, a bijection."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
