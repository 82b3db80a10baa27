"""Permutations computed per index: bijective, uniform, and as defined."""

import jax
import numpy as np
import pytest
from scipy import stats

from toyfeat.data.permutation import LARGEST, epoch_words, host_words, permute_index

SIZES = [*range(1, 130), 255, 256, 257, 1000, 4095, 4096, 4097, 65535, 65537]


def permutation(num, seed, epoch, hashed=False):
    """Permute by words of numpy's SeedSequence, or by those that a device hashes."""
    words = host_words(seed, epoch)
    if hashed:
        salt = np.random.SeedSequence(seed).generate_state(2)
        words = epoch_words(salt, np.uint32(epoch))
    index = np.arange(num, dtype=np.uint32)
    return permute_index(index, num, words).astype(np.int64)


def plain_integers(x, num, words):
    """Compute the definition with integers of unlimited width."""
    bits = num.bit_length() - 1
    block, shift = 2**bits, max(1, -(-bits // 2))

    def hashed(x, a, b, c):
        x = ((x * (a | 1)) ^ b) % block
        x ^= x >> shift
        x = x * (c | 1) % block
        return x ^ (x >> shift)

    for a, b, c, d, e, f in words.tolist():
        if x < block:
            x = hashed(x, a, b, c)
        if x >= num - block:
            x = hashed(x - (num - block), d, e, f) + num - block
        x = x // 2 + (x % 2) * ((num + 1) // 2)
    return x


@pytest.mark.parametrize("seed", range(3))
def test_every_size_gives_a_permutation(seed):
    for num in SIZES:
        np.testing.assert_array_equal(
            np.sort(permutation(num, seed, num)), np.arange(num)
        )


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2, 3, 100, 4097, 10**9, LARGEST])
def test_numpy_and_jax_agree_with_the_definition(num):
    index = np.unique(np.linspace(0, num - 1, 60).astype(np.uint32))
    words = host_words(num)
    wanted = [plain_integers(x, num, words) for x in index.tolist()]
    np.testing.assert_array_equal(permute_index(index, num, words), wanted)
    jitted = jax.jit(lambda index, words: permute_index(index, num, words))
    np.testing.assert_array_equal(jitted(index, words), wanted)


def test_a_billion_indices_do_not_collide():
    start = 10**9 - 300_000
    index = np.arange(start, 10**9, dtype=np.uint32)
    positions = permute_index(index, 10**9, host_words(3))
    assert len(np.unique(positions)) == len(index)
    assert positions.max() < 10**9
    assert stats.kstest(positions / 1e9, "uniform").pvalue > 1e-3


@pytest.mark.slow_cases
@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("num", [6, 31, 33, 64, 100])
def test_every_index_goes_everywhere_equally_often(num, hashed):
    permutations = np.stack(
        [permutation(num, 0, epoch, hashed) for epoch in range(1500)]
    )
    table = np.stack(
        [np.bincount(permutations[:, i], minlength=num) for i in range(num)]
    )
    expected = 1500 / num
    chi = ((table - expected) ** 2 / expected).sum() * (num - 1) / num
    assert 1e-4 < stats.chi2.sf(chi, (num - 1) ** 2) < 1 - 1e-4


@pytest.mark.slow_cases
@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("num", [31, 64, 100, 1000, 2047])
def test_neighbours_are_separated(num, hashed):
    permutations = np.stack(
        [permutation(num, 1, epoch, hashed) for epoch in range(400)]
    )
    for lag in (1, 2, 16):
        apart = (permutations[:, lag:] - permutations[:, :-lag]) % num
        counts = np.bincount(apart.ravel(), minlength=num)[1:]
        assert stats.chisquare(counts).pvalue > 1e-5  # pairs share indices


@pytest.mark.slow_cases
@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("num", [50, 1000, 2047, 30011])
def test_epochs_are_not_correlated(num, hashed):
    permutations = [permutation(num, 2, epoch, hashed) for epoch in range(40)]
    pairs = zip([np.arange(num), *permutations], permutations, strict=False)
    r = np.array([np.corrcoef(a, b)[0, 1] for a, b in pairs]) * np.sqrt(num - 1)
    assert abs(r.mean()) < 4 / np.sqrt(40)
    assert 1e-4 < stats.chi2.sf((r**2).sum(), 40) < 1 - 1e-4


@pytest.mark.slow_cases
@pytest.mark.parametrize("hashed", [False, True])
def test_all_orders_of_four_occur(hashed):
    permutations = np.stack([permutation(4, 5, epoch, hashed) for epoch in range(2400)])
    _, counts = np.unique(permutations, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_words_are_those_of_the_published_seed_sequence():
    # The first case of the reference implementation (O'Neill, randutils).
    words = host_words(3735928559, 195939070, 229505742, 305419896)
    wanted = [3914649087, 576849849, 3593928901, 2229911004]
    assert words.ravel()[:4].tolist() == wanted
