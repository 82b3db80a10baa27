"""Starts of decompositions: weights written by readers."""

import importlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def starts():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("partition_starts")
    patch.undo()


def test_rows_are_written_by_the_nearest_reader_alone(starts):
    readers = np.array([[0.0, 2.0], [3.0, 0.0]])
    weight = np.array([[1.0, 0.1], [0.2, -4.0]])
    v, u = starts.parts_from_readers(weight, readers, nearest=True)
    np.testing.assert_allclose(u, [[0, 1], [1, 0]])
    np.testing.assert_allclose(v, [[0, 1], [-4, 0]])
    v, u = starts.parts_from_readers(weight, readers, nearest=False)
    np.testing.assert_allclose(v @ u, weight)


def test_the_longest_parts_come_first_and_keep_their_products(starts):
    rng = np.random.default_rng(0)
    v, u = rng.normal(size=(5, 3)), rng.normal(size=(3, 2))
    v[:, 1] *= 100
    v[:, 2] = 0  # not a part
    random = {"V": rng.normal(size=(5, 4)), "U": rng.normal(size=(4, 2))}
    put = starts.put_parts(random, (v, u))
    np.testing.assert_allclose(put["V"][:, :2] @ put["U"][:2], v @ u)
    np.testing.assert_allclose(np.outer(put["V"][:, 0], put["U"][0]), v[:, 1:2] * u[1])
    lengths = np.linalg.norm(put["V"][:, 0]), np.linalg.norm(put["U"][0])
    assert lengths[0] == pytest.approx(lengths[1])
    np.testing.assert_allclose(put["U"][2:], starts.REST * random["U"][2:])
