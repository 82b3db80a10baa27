import jax
import pytest

from toyfeat.models import modular
from toyfeat.models.modular import Modular
from toyfeat.report.modular import compared

pytestmark = pytest.mark.slow
TASK = Modular(29, 64, 4, 128)


@pytest.fixture(scope="module")
def rows():
    settings = {"fraction": 0.8, "steps": 2500, "learning_rate": 3e-3, "batch": 256}
    params = modular.train(jax.random.key(0), TASK, weight_decay=1.0, **settings)
    assert modular.accuracy(params, *modular.pairs(TASK)) > 0.999
    found = compared(jax.random.key(1), TASK, params, num=841, batch=421)
    return {(row["basis"], row["site"]): row for row in found}


def test_counts_are_within_what_there_is(rows):
    for row in rows.values():
        assert 1 <= row["features"] <= TASK.d_model
        assert 0 < row["edges"] <= row["of"]
