import jax
import pytest

from toyfeat.models import modular
from toyfeat.models.modular import Modular
from toyfeat.report.modular import compared

TASK = Modular(29, 64, 4, 128)


@pytest.fixture(scope="module")
def rows():
    settings = {"fraction": 0.8, "steps": 2500, "learning_rate": 3e-3, "batch": 256}
    params = modular.train(jax.random.key(0), TASK, weight_decay=1.0, **settings)
    assert modular.accuracy(params, *modular.pairs(TASK)) > 0.999
    found = compared(jax.random.key(1), TASK, params, num=841, batch=421)
    return {(row["basis"], row["site"]): row for row in found}


@pytest.mark.parametrize("site", modular.SITES)
def test_lib_needs_no_more_features_than_pca(rows, site):
    assert rows["LIB", site]["features"] <= rows["PCA", site]["features"]


def test_lib_needs_fewer_edges_than_pca(rows):
    total = {
        basis: sum(rows[basis, site]["edges"] for site in modular.SITES)
        for basis in ("PCA", "LIB")
    }
    assert total["LIB"] < total["PCA"]


def test_counts_are_within_what_there_is(rows):
    for row in rows.values():
        assert 1 <= row["features"] <= TASK.d_model
        assert 0 < row["edges"] <= row["of"]
