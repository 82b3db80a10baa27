"""Errors of forms of a lens fit, on Jacobians drawn with a known mean."""

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def error(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("lens_error")


def drawn(error, clusters=1, between=0.0):
    """Prompts around a mean; what a cluster adds counts by the prompt's share of it."""
    rng, num, layers, rows, dim = np.random.default_rng(0), 60, 2, 8, 8
    shares = rng.dirichlet(np.ones(clusters), (num, layers))
    parts = 0.1 * rng.normal(size=(num, layers, clusters, rows, dim)) + np.eye(dim)
    parts += between * rng.normal(size=(1, layers, clusters, rows, dim))
    whole = np.einsum("nle,nlerd->nlrd", shares, parts)
    equal = np.full((layers, clusters), 1 / clusters)
    return error.Sample(parts, shares, whole, np.eye(dim), equal)


def test_the_plain_fit_has_its_scatter_and_half_the_rows_twice_that(error):
    sample = drawn(error)
    plain = error.score(sample, 10, error.plain, 100).mean()
    half = error.score(sample, 10, error.random_rows, 100).mean()
    np.testing.assert_allclose([plain, half], [1, 2], rtol=0.05)
    np.testing.assert_allclose(error.block_ratios(sample, 4).mean(), 1, rtol=0.2)


def test_shares_of_clusters_take_their_part_of_the_scatter_away(error):
    sample = drawn(error, clusters=2, between=1.0)
    plain = error.score(sample, 10, error.plain, 100).mean()
    stratified = error.score(sample, 10, error.stratified, 100).mean()
    assert plain > 0.9
    assert stratified < 0.2


def test_shrinkage_helps_where_there_is_nothing_but_noise(error):
    sample = drawn(error)  # the mean is the identity
    for fit in (error.scaled, error.shrunken):
        assert error.score(sample, 10, fit, 20).mean() < 0.6
    whole = error.score(sample, 10, error.truncated(8), 20).mean()
    plain = error.score(sample, 10, error.plain, 20).mean()
    np.testing.assert_allclose(whole, plain, rtol=1e-6)
