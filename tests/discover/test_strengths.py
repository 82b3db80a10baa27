import numpy as np
import pytest

from toyfeat.discover.gradients import WhiteCoordinates, white_coordinates
from toyfeat.discover.strengths import attribution_shares
from toyfeat.types import Taps


def sparse_taps(seed=0, num=3000, dim=6, active=2):
    """Activations, and gradients that are sums of two of six readers."""
    rng = np.random.default_rng(seed)
    readers = rng.normal(size=(dim, dim))
    acts = rng.normal(size=(num, dim)) + 5  # the mean has no part in it
    mask = rng.permuted(np.tile(np.arange(dim) < active, (num, 1)), axis=1)
    codes = mask * rng.normal(size=(num, dim)) * np.arange(1, dim + 1)
    return readers, acts, codes


def strengths(readers, acts, codes, group, found=None):
    grads = codes @ readers
    white = white_coordinates(grads, min_eigenvalue=1e-9)
    taps = Taps(acts, grads[:, None], np.ones(len(acts)))
    return attribution_shares(taps, readers if found is None else found, group, white)


def by_definition(readers, acts, codes, group):
    attribution = codes * ((acts - acts.mean(0)) @ readers.T)
    sums = [attribution[:, group == g].sum(1) for g in np.unique(group)]
    size = np.array([np.sqrt(np.mean(x**2)) for x in sums])
    return (size / size.sum())[np.searchsorted(np.unique(group), group)]


@pytest.mark.parametrize("group", [[0, 1, 2, 3, 4, 5], [4, 4, 2, 2, 9, 0]])
def test_strengths_are_shares_of_the_attribution(group):
    group = np.array(group)
    planted = sparse_taps()
    found = strengths(*planted, group)
    np.testing.assert_allclose(found, by_definition(*planted, group), rtol=1e-3)
    first = np.unique(group, return_index=True)[1]
    assert found[first].sum() == pytest.approx(1)


def test_strengths_do_not_depend_on_coordinates_or_lengths():
    readers, acts, codes = sparse_taps()
    group = np.arange(6)
    usual = strengths(readers, acts, codes, group)
    longer = strengths(readers, acts, codes, group, found=-3 * readers)
    np.testing.assert_allclose(longer, usual, rtol=1e-6)
    matrix = np.random.default_rng(1).normal(size=(6, 6))
    other = strengths(readers @ np.linalg.inv(matrix).T, acts @ matrix, codes, group)
    np.testing.assert_allclose(other, usual, rtol=1e-6)


def test_without_readers_or_attribution_there_is_no_strength():
    white = WhiteCoordinates(np.eye(2), np.eye(2))
    still = Taps(np.ones((4, 2)), np.ones((4, 1, 2)), np.ones(4))
    assert attribution_shares(still, np.zeros((0, 2)), np.zeros(0), white).shape == (0,)
    assert attribution_shares(still, np.eye(2), [0, 1], white).tolist() == [0, 0]
