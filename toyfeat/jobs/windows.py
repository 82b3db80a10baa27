"""Batches of one shape of the windows of a text."""

from collections.abc import Iterator

import numpy as np


def full_batches(num: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut windows into batches of one shape, in order.

    The last batch is filled up with the first windows, which do not count again.

    Args:
      num: windows.
      size: of a batch.

    Yields:
      Numbers ``[size]`` of the windows of a batch, and whether each counts.

    Example:
      >>> [(list(map(int, rows)), int(counts.sum())) for rows, counts in
      ...  full_batches(5, 3)]
      [([0, 1, 2], 3), ([3, 4, 0], 2)]
    """
    for start in range(0, num, size):
        rows = np.arange(start, start + size)
        yield rows % num, rows < num
