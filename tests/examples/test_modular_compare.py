import jax
import pytest

from examples.modular import network as modular
from examples.modular.compare import compare_bases, mean_table
from examples.modular.network import SITES, Modular

TASK = Modular(modulus=59, d_model=64, heads=4, d_mlp=256)


@pytest.fixture(scope="module")
def rows():
    """Of a transformer, by basis and site."""
    settings = {"fraction": 0.8, "steps": 2000, "learning_rate": 2e-3, "batch": 512}
    key = jax.random.key(0)
    params = modular.train(key, TASK, weight_decay=1.0, **settings)
    assert modular.accuracy(params, *modular.pairs(TASK)) > 0.999
    rows = compare_bases(key, TASK, params, num=2048)
    return {(row["basis"], row["site"]): row for row in rows}


def test_counts_are_within_what_there_is(rows):
    for row in rows.values():
        assert 1 <= row["features"] <= TASK.d_model
        assert 0 < row["edges"] <= row["of"]


@pytest.mark.parametrize("site", SITES)
def test_lib_needs_no_more_features_than_pca(rows, site):
    assert rows["LIB", site]["features"] <= rows["PCA", site]["features"]


def test_lib_needs_fewer_edges_than_pca(rows):
    edges = {
        basis: sum(rows[basis, site]["edges"] for site in SITES)
        for basis in ("PCA", "LIB")
    }
    assert edges["LIB"] < edges["PCA"]


def test_the_table_holds_the_means(rows):
    one = list(rows.values())
    other = [{**row, "features": row["features"] + 3, "edges": 7} for row in one]
    words = mean_table(one + other).splitlines()[1].split()
    for word, (figure, basis) in zip(
        words[1:],
        [(f, b) for f in ("features", "edges") for b in ("PCA", "LIB")],
        strict=True,
    ):
        here = [
            row[figure]
            for row in one + other
            if (row["basis"], row["site"]) == (basis, SITES[0])
        ]
        assert float(word) == pytest.approx(sum(here) / 2, abs=0.051)
