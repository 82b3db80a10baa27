import numpy as np
import pytest

from toyfeat.discover.separation import is_whole


def mechanisms(sizes, *, seed=0, num=1500, readouts=4, rate=1.0, spread=0.5):
    """Coefficients of mechanisms of given dimensions, each of one direction a time."""
    rng = np.random.default_rng(seed)
    parts = [
        rng.normal(size=(num, readouts, 1))
        * (rng.normal(size=(num, 1, size)) if size > 1 else 1.0)
        * rng.uniform(1 - spread, 1 + spread, (num, 1, 1))
        * (rng.random((num, 1, 1)) < rate)
        for size in sizes
    ]
    codes = np.concatenate(parts, axis=2)
    return codes[np.any(codes, axis=(1, 2))]


def mixed(codes, seed=1):
    """The same in other axes, not orthogonal ones, which are the pieces."""
    axes = np.random.default_rng(seed).normal(size=(codes.shape[2], codes.shape[2]))
    return codes @ axes, axes


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_gated_unit_is_whole(size):
    codes, _ = mixed(mechanisms([size]))
    assert is_whole([codes])


@pytest.mark.parametrize("rate", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 1], [2, 1], [2, 2]])
def test_several_mechanisms_are_not_whole_in_any_axes(sizes, rate):
    codes, axes = mixed(mechanisms(sizes, num=2000, rate=rate))
    assert not is_whole([codes], axes)


def test_readers_that_alternate_are_not_whole_with_the_same_writer():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(1000, 4, 1)) * rng.uniform(0.5, 1.5, (1000, 1, 2))
    assert is_whole([codes])  # always together, what differs is their ratio
    codes[:450, :, 0] = 0
    codes[450:900, :, 1] = 0
    assert not is_whole([codes])


@pytest.mark.parametrize("num", [200, 2000])
def test_a_linear_plane_is_whole_where_examples_are_enough(num):
    codes = np.random.default_rng(0).normal(size=(num, 4, 2))
    assert is_whole([codes]) == (num == 2000)


def test_every_table_has_to_agree_and_one_needs_several_readouts():
    whole, apart = mechanisms([2]), mechanisms([1, 1], rate=0.1)
    assert is_whole([whole, whole[:, :1]])
    assert not is_whole([whole, apart])
    assert not is_whole([whole, apart[:, :1]])
    assert not is_whole([whole[:, :1]])
    assert not is_whole([])
