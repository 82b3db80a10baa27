import jax
import pytest

from toyfeat.models import modular
from toyfeat.models.modular import SITES, Modular
from toyfeat.report.modular import compared, means

TASK = Modular(modulus=59, d_model=64, heads=4, d_mlp=256)


@pytest.fixture(scope="module")
def rows():
    """Two transformers, the rows of each by basis and site."""
    found = []
    for seed in range(2):
        settings = {"fraction": 0.8, "steps": 2000, "learning_rate": 2e-3, "batch": 512}
        key = jax.random.key(seed)
        params = modular.train(key, TASK, weight_decay=1.0, **settings)
        assert modular.accuracy(params, *modular.pairs(TASK)) > 0.999
        rows = compared(key, TASK, params, num=2048)
        found.append({(row["basis"], row["site"]): row for row in rows})
    return found


def test_counts_are_within_what_there_is(rows):
    for row in [row for each in rows for row in each.values()]:
        assert 1 <= row["features"] <= TASK.d_model
        assert 0 < row["edges"] <= row["of"]


@pytest.mark.parametrize("site", SITES)
def test_lib_needs_no_more_features_than_pca(rows, site):
    for each in rows:
        assert each["LIB", site]["features"] <= each["PCA", site]["features"]


def test_lib_needs_fewer_edges_than_pca(rows):
    edges = {
        basis: sum(each[basis, site]["edges"] for each in rows for site in SITES)
        for basis in ("PCA", "LIB")
    }
    assert edges["LIB"] < edges["PCA"]


def test_the_table_holds_the_means(rows):
    flat = [row for each in rows for row in each.values()]
    words = means(flat).splitlines()[1].split()
    for word, (figure, basis) in zip(
        words[1:],
        [(f, b) for f in ("features", "edges") for b in ("PCA", "LIB")],
        strict=True,
    ):
        mean = sum(each[basis, SITES[0]][figure] for each in rows) / 2
        assert float(word) == pytest.approx(mean, abs=0.051)
