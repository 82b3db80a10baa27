import jax
import pytest

from examples.modular import network as modular
from examples.modular.compare import compare_bases, mean_table
from examples.modular.network import SITES, Modular
from examples.modular.training import train

TASK = Modular(modulus=59, d_model=64, heads=4, d_mlp=256)


@pytest.mark.slow  # compiling the bases and edges of all sites takes over a minute
def test_lib_needs_no_more_than_pca_where_addition_is_learned():
    settings = {"fraction": 0.8, "steps": 2000, "learning_rate": 2e-3, "batch": 512}
    key = jax.random.key(0)
    params = train(key, TASK, weight_decay=1.0, **settings)
    assert modular.accuracy(params, *modular.pairs(TASK)) > 0.999
    table = compare_bases(key, TASK, params, num=2048)
    rows = {(row["basis"], row["site"]): row for row in table}
    assert set(rows) == {(basis, site) for basis in ("PCA", "LIB") for site in SITES}
    for row in table:
        assert 1 <= row["features"] <= TASK.d_model
        assert 0 < row["edges"] <= row["of"]
    for site in SITES:
        assert rows["LIB", site]["features"] <= rows["PCA", site]["features"]
    edges = {
        basis: sum(rows[basis, site]["edges"] for site in SITES)
        for basis in ("PCA", "LIB")
    }
    assert edges["LIB"] < edges["PCA"]


def test_the_table_holds_the_means():
    figures = {("PCA", "features"): 9, ("LIB", "features"): 5}
    figures |= {("PCA", "edges"): 40, ("LIB", "edges"): 12}
    first = [
        {"basis": basis, "site": site}
        | {name: figures[basis, name] + place for name in ("features", "edges")}
        for basis in ("PCA", "LIB")
        for place, site in enumerate(SITES)
    ]
    second = [{**row, "features": row["features"] + 3, "edges": 7} for row in first]
    for place, line in enumerate(mean_table(first + second).splitlines()[1:]):
        site, *words = line.split()
        expected = [9 + 1.5, 5 + 1.5, (40 + 7) / 2, (12 + 7) / 2]
        shift = [place, place, place / 2, place / 2]
        assert site == SITES[place]
        assert [float(word) for word in words] == pytest.approx(
            [x + y for x, y in zip(expected, shift, strict=True)], abs=0.051
        )
