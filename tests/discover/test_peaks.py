"""Directions in which rows pile up, against densities that are known."""

import numpy as np
import pytest

from toyfeat.discover.peaks import with_peaks


def fan(num: int, start: float) -> np.ndarray:
    """Unit rows at equal angles over a half circle, ``[num, 2]``."""
    angles = np.deg2rad(start + 180 * np.arange(num) / num)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def sparse_rows(
    rng: np.random.Generator, readers: np.ndarray, rate: float, noise: float = 0.0
) -> np.ndarray:
    """Signed sums of readers that are active at a rate, with normal noise."""
    shape = 10_000, len(readers)
    codes = rng.uniform(-1, 1, shape) * (rng.random(shape) < rate)
    rows = codes @ readers
    return rows + noise * rng.standard_normal(rows.shape)


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("num", [4, 5, 6])
def test_readers_have_peaks_and_sums_of_two_have_none(num, noise):
    rng = np.random.default_rng(num)
    readers, middles = fan(num, 10), fan(num, 10 + 90 / num)
    rows = sparse_rows(rng, readers, 0.1, noise)
    peaked = with_peaks(rows, np.concatenate([readers, middles]))
    np.testing.assert_array_equal(peaked, np.arange(2 * num) < num)


def test_copy_of_a_reader_has_no_peak_of_its_own():
    rng = np.random.default_rng(0)
    readers = fan(5, 0)
    copy = fan(36, 0)[[35]]  # five degrees from the first one
    peaked = with_peaks(sparse_rows(rng, readers, 0.1), np.vstack([readers, copy]))
    np.testing.assert_array_equal(peaked, [True] * 5 + [False])


def test_nothing_is_left_out_where_no_reader_is_alone():
    rng = np.random.default_rng(1)
    readers = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    rows = rng.standard_normal((20_000, 3)) @ readers
    middle = readers.sum(0, keepdims=True) / np.sqrt(3)
    assert with_peaks(rows, np.vstack([readers, middle])).all()


def test_nothing_is_left_out_without_rows_to_tell():
    rng = np.random.default_rng(2)
    readers, middles = fan(5, 0), fan(5, 18)
    rows = sparse_rows(rng, readers, 0.1)[:40]
    assert with_peaks(rows, np.vstack([readers, middles])).all()


def test_rare_reader_keeps_its_place():
    rng = np.random.default_rng(3)
    readers = fan(5, 0)
    shape = 20_000, 5
    rates = np.array([0.1, 0.1, 0.1, 0.1, 0.004])
    codes = rng.random(shape) * (rng.random(shape) < rates)
    peaked = with_peaks(codes @ readers, np.vstack([readers, fan(5, 18)[:1]]))
    np.testing.assert_array_equal(peaked, [True] * 5 + [False])


@pytest.mark.parametrize("dim", [1, 5, 64])
def test_other_widths_are_left_alone(dim):
    rng = np.random.default_rng(4)
    directions = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    assert with_peaks(rng.standard_normal((100, dim)), directions).all()
