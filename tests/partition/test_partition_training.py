"""Training decompositions by the trainer of dictionaries, and its batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.partition import losses
from toyfeat.partition.training import _loss_inputs

P = ft.partition
TARGETS = {"w": np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)}
FIRST = {"w": TARGETS["w"][0]}
BATCHES = P.sparse_batches(jax.random.key(1), 3, probability=0.2, batch=16)


def tied(params, x):
    return jax.nn.relu(x @ params["w"] @ params["w"].T)


SPLIT = P.decompose_weights(tied, FIRST, "w", 4, np.eye(3, dtype=np.float32))
FAMILY = P.importance.per_component(SPLIT, 3)
OBJECTIVE = (losses.importance(1e-2), losses.stochastic(), losses.layerwise())


def make(objective=OBJECTIVE, **options):
    params = TARGETS if options.get("networks") else FIRST
    return P.trainer(SPLIT, params, objective, FAMILY, steps=20, warm_up=5, **options)


def same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.slow
def test_a_population_of_targets_and_settings_is_each_alone_and_resumes(tmp_path):
    trainer = make(networks=True)
    keys = jnp.stack([jax.random.key(3), jax.random.key(4)])
    settings = {"importance": jnp.array([1e-2, 1.0]), "network": jnp.arange(2)}
    many = ft.population(trainer)
    state = many.init(keys, **settings)
    options = {"chunk": 2, "checkpoint_every": 1, "progress": False}
    whole = ft.fit(many, state, BATCHES, steps=4, **options)
    # Stopped after two steps, and gone on with from the checkpoint.
    ft.fit(many, state, BATCHES, steps=2, directory=tmp_path, **options)
    resumed = ft.fit(many, state, BATCHES, steps=4, directory=tmp_path, **options)
    same(resumed.params, whole.params, rtol=0)
    # The second member alone.
    alone = trainer.init(keys[1], importance=1.0, network=1)
    np.testing.assert_array_equal(alone.running["target"]["w"], TARGETS["w"][1])
    update = jax.jit(trainer.update)
    for step in range(4):
        alone, metrics = update(alone, BATCHES(step))
    same(alone.params, jax.tree.map(lambda x: x[1], whole.params), atol=2e-5)
    assert set(metrics) >= {"loss", "l0", "alive", "remainder", "importance"}
    # The target itself is the same bits as before.
    np.testing.assert_array_equal(whole.running["target"]["w"], TARGETS["w"])


def test_the_warm_up_brings_the_parts_near_the_weights():
    near = P.trainer(SPLIT, FIRST, OBJECTIVE, FAMILY, steps=20, warm_up=300)
    parts = near.init(jax.random.key(0)).params["components"]["w"]
    error = np.asarray(parts["V"] @ parts["U"]) - FIRST["w"]
    start = SPLIT.init(jax.random.split(jax.random.key(0), 4)[0])["w"]
    before = np.asarray(start["V"] @ start["U"]) - FIRST["w"]
    assert (error**2).sum() < 0.05 * (before**2).sum()


def test_a_controller_steers_the_importance_to_an_l0():
    control = ft.controllers.target_l0(0.1, term="importance", integral=0.1)
    trainer = make(controller=control)
    state = trainer.init(jax.random.key(0))
    state, first = jax.jit(trainer.update)(state, BATCHES(0))
    assert float(first["l0"]) > 0.1
    assert float(state.running["factor"]) == float(first["factor"]) > 1


@pytest.mark.parametrize(("target", "rises"), [(1e-9, False), (1e3, True)])
def test_a_controller_spends_an_error_on_the_importance(target, rises):
    """Over its target the error lowers the penalty, under it it raises it."""
    control = ft.controllers.target_error(
        target, measures="stochastic", term="importance", integral=0.1
    )
    trainer = make(controller=control)
    state = trainer.init(jax.random.key(0))
    assert float(state.running["factor"]) == pytest.approx(0.01)
    _, first = jax.jit(trainer.update)(state, BATCHES(0))
    assert (float(first["factor"]) > 0.01) is rises


def test_a_run_goes_on_with_the_settings_that_it_had(tmp_path):
    def run(**options):
        trainer = make(controller=ft.controllers.target_l0(0.1, **options))
        state = trainer.init(jax.random.key(0))
        return ft.fit(trainer, state, BATCHES, steps=2, chunk=1, directory=tmp_path)

    importance = {"term": "importance"}
    run(**importance)
    assert int(run(**importance).step) == 2
    for other in ({"start": 0.5}, {"integral": 0.5}, {"proportional": 0.0}):
        with pytest.raises(ValueError, match="values of the controller"):
            run(**importance, **other)
    with pytest.raises(ValueError, match=r"controller was .*importance"):
        run(term="stochastic")


def test_persistent_sources_rise_against_fixed_parameters():
    rows = len(BATCHES(0).acts)
    term = P.persistent_pgd(batch=rows, ramp=0.0)
    trainer = make((losses.importance(1e-2), term))
    state = trainer.init(jax.random.key(0), learning_rate=0.0)
    first = trainer._replace(update=jax.jit(trainer.update))
    errors, taps = [], BATCHES(0)
    for _ in range(5):
        state, metrics = first.update(state, taps)
        errors.append(float(metrics["persistent_pgd"]))
    assert errors == sorted(errors)
    assert errors[-1] > 1.2 * errors[0]
    sources = state.running["persistent_pgd"]["sources"]
    assert {s.shape for s in sources.values()} == {(rows, 5)}
    assert float(state.running["persistent_pgd"]["count"]) == 15  # two and one each
    for source in sources.values():
        assert 0 <= float(source.min()) <= float(source.max()) <= 1


def test_importances_come_from_the_unmasked_target():
    trainer = make()
    state, taps = trainer.init(jax.random.key(0)), BATCHES(0)
    inputs = _loss_inputs(make_recipe(trainer), state, taps, state.params)
    weight, v = np.float64(FIRST["w"]), np.float64(state.params["components"]["w"]["V"])
    u = np.float64(state.params["components"]["w"]["U"])
    x = np.float64(taps.acts)
    reads = SPLIT.read(FIRST, state.params["components"], taps.acts)[1]
    np.testing.assert_allclose(reads["w"].inner, x @ v, atol=1e-5)
    np.testing.assert_allclose(reads["w#1"].inner, x @ weight @ u.T, atol=1e-5)
    assert float(inputs.weights.sum()) == pytest.approx(1)
    assert float(inputs.count) == 16


def make_recipe(trainer):
    return trainer.update.args[0]


def test_batches_have_the_moments_of_independent_inputs():
    """The mean of any function of the inputs is that of independent ones."""
    p, features, rows = 0.3, 3, 20_000
    batches = P.sparse_batches(jax.random.key(0), features, probability=p, batch=rows)
    x, weights = (np.float64(a) for a in (batches(0).acts, batches(0).weights))
    assert weights.sum() == rows
    assert len(x) == round(rows * (1 - 0.7**3)) + 1
    assert weights[-1] == pytest.approx(rows * 0.7**3, abs=0.5)
    assert not x[-1].any()
    assert (x[:-1] > 0).any(1).all()
    active = x > 0
    for pattern in np.ndindex(2, 2, 2):
        share = weights @ (active == np.array(pattern)).all(1) / rows
        expected = p ** sum(pattern) * (1 - p) ** (3 - sum(pattern))
        assert share == pytest.approx(expected, abs=0.012)  # 4 standard errors
    assert x[active].mean() == pytest.approx(0.5, abs=0.01)
    plain = P.sparse_batches(
        jax.random.key(0), 3, probability=p, batch=64, join_zeros=False
    )
    assert plain(0).acts.shape == (64, 3)
    assert not np.array_equal(plain(0).acts, plain(1).acts)


# Toy: components, coefficient, power, batch, steps, rate, by hand from the table.
PUBLISHED = {
    "5-2": (20, 3e-3, 1, 4096, 10_000, 1e-3),
    "5-2+identity": (20, 3e-3, 1, 4096, 10_000, 1e-3),
    "40-10": (200, 1e-4, 2, 4096, 10_000, 1e-3),
    "40-10+identity": (200, 1e-4, 2, 4096, 20_000, 1e-3),
    "residual 1": (100, 1e-5, 2, 2048, 20_000, 2e-3),
    "residual 2": (400, 1e-4, 2, 2048, 25_000, 3e-4),
    "residual 3": (500, 1e-5, 2, 2048, 50_000, 1e-3),
}


def test_presets_are_as_published_and_cited():
    for toy, values in PUBLISHED.items():
        components, coefficient, _, *sizes = values
        preset = P.spd_2025(toy)
        assert preset.components == components
        assert [preset.batch, preset.steps, preset.learning_rate] == sizes
        assert preset.warm_up == 200
        assert {t.name: t.coefficient for t in preset.objective} == (
            {"importance": coefficient, "subset": 2, "pgd": 2}
            if toy == "residual 2"
            else {"importance": coefficient, "stochastic": 1, "layerwise": 1}
        )
        assert set(preset._fields) - {"cited"} <= set(preset.cited)
    vpd = P.vpd_2026(components=4, hidden=8, batch=len(BATCHES(0).acts), steps=100)
    assert {t.name: t.coefficient for t in vpd.objective} == {
        "importance": 2e-4,
        "frequency": 1e-4,
        "persistent_pgd": 0.5,
        "subset": 0.5,
        "faithfulness": 1e7,
    }
    assert (vpd.learning_rate, vpd.end_rate) == (5e-5, 0.1)
    # It trains.
    trainer = vpd.trainer(SPLIT, FIRST, warm_up=5)
    _, metrics = jax.jit(trainer.update)(trainer.init(jax.random.key(0)), BATCHES(0))
    assert np.isfinite(float(metrics["loss"]))


BAD = [
    (lambda: make((*OBJECTIVE, losses.stochastic())), ValueError, "different names"),
    (lambda: make(controller=ft.controllers.target_l0(1.0)), ValueError, "steers"),
    (
        lambda: make(controller=ft.controllers.target_fvu(1.0, term="importance")),
        ValueError,
        "reads 'fvu', the objective has .*stochastic.*l0",
    ),
    (lambda: make().init(jax.random.key(0), k=2), ValueError, "unknown.*importance"),
    (lambda: make().init(jax.random.key(0), importance=-1), ValueError, "importance"),
    (
        lambda: P.trainer(tied, FIRST, OBJECTIVE, FAMILY, steps=1),
        TypeError,
        "decompose",
    ),
    (lambda: P.spd_2025("6-2"), ValueError, "5-2"),
    (
        lambda: P.sparse_batches(jax.random.key(0), 3, probability=0, batch=2),
        ValueError,
        "probability",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
