import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_trainer import a_batch, tiny

import toyfeat as ft
from toyfeat.train.sweeps import Row


def test_a_grid_is_every_combination_once():
    settings = ft.sweeps.grid(
        seed=[3, 4], rate=[1e-3, 1e-2], sparsity=[1, 2, 3], clip=5
    )
    assert {x.shape for x in settings.values()} == {(12,)}
    values = np.stack([settings[n] for n in ("rate", "sparsity", "clip")], axis=1)
    pairs = [tuple(float(f"{x:.3g}") for x in row) for row in values]
    assert pairs[:4] == [(1e-3, 1, 5), (1e-3, 2, 5), (1e-3, 3, 5), (1e-2, 1, 5)]
    assert pairs[:6] == pairs[6:]
    assert len(set(pairs)) == 6
    data = jax.random.key_data(settings["keys"])
    for seed, part in ((3, data[:6]), (4, data[6:])):
        np.testing.assert_array_equal(part, np.tile([0, seed], (6, 1)))


def test_a_grid_starts_a_population():
    sae = ft.dictionaries.standard(4, 8)
    one = ft.trainer(sae, ft.losses.default(sae))
    settings = ft.sweeps.grid(learning_rate=[1e-3, 1e-2], sparsity=[0.1, 1.0])
    state = ft.population(one).init(**settings)
    np.testing.assert_array_equal(state.hyper["sparsity"], settings["sparsity"])
    rows = np.asarray(state.params["W_dec"])
    assert np.all(rows == rows[:1])  # one seed: members differ by their settings alone
    alone = one.init(jax.random.key(0), learning_rate=1e-3)
    np.testing.assert_allclose(rows[0], alone.params["W_dec"])


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        (
            {"rate": []},
            r"rate must be a number or a list of them, all finite .*, got \[\]; pass",
        ),
        ({"rate": [1.0, np.nan]}, "rate must be a number"),
        ({"rate": [[1.0]]}, "rate must be a number"),
        ({"rate": ["fast"]}, r"got \['fast'\]"),
        ({"rate": "fast"}, "got 'fast'; pass"),
        ({"rate": [1.0, [2.0]]}, r"got \[1.0, \[2.0\]\]; pass"),
        ({"rate": None}, "got None; pass"),
        ({"rate": [True]}, r"got \[True\]; pass"),
        ({"seed": 0.5}, "a seed must be an int .*, got 0.5; pass"),
        ({"seed": []}, r"seed must be a number .*, got \[\]; pass"),
    ],
)
def test_axes_are_checked(axes, match):
    with pytest.raises(ValueError, match=match):
        ft.sweeps.grid(**axes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three rates, of which the last diverges and two are saturated."""
    plain = tiny(saturated=0.04)

    def update(state, taps):
        after, metrics = plain.update(state, taps)
        bad = (state.step >= 5) & (state.hyper["rate"] > 0.1)
        worse = jnp.where(bad[:, None], jnp.inf, after.params["w"])
        return after._replace(params=after.params | {"w": worse}), metrics

    trainer = ft.Trainer(plain.init, update)
    folder = tmp_path_factory.mktemp("sweep")
    settings = ft.sweeps.grid(rate=[0.01, 0.05, 0.2], seed=[1, 2])
    state = jax.vmap(lambda key, rate: plain.init(key, rate=rate))(
        settings["keys"], settings["rate"]
    )
    state = state._replace(hyper=state.hyper | {"clip": jnp.ones(6)})
    told = []
    with (
        pytest.warns(UserWarning, match="was saturated"),
        pytest.warns(UserWarning, match="the others go on"),
    ):
        state = ft.fit(
            trainer, state, a_batch, steps=11, chunk=2, directory=folder,
            on_chunk=lambda step, means: told.append(means),
        )  # fmt: skip
    return folder, settings, state, told


def test_a_table_says_what_became_of_every_member(run):
    folder, settings, state, _ = run
    metrics = ft.sweeps.final_metrics(folder, steps=3)
    rows = ft.sweeps.table(
        state, metrics, settings=settings, scores={"writers": np.arange(6) / 6}
    )
    assert [r.index for r in rows] == list(range(6))
    assert [r.settings for r in rows] == [  # what varies; clip does not
        {"rate": rate, "start": float(start)}
        for start in (0, 1)
        for rate in (0.01, 0.05, 0.2)
    ]
    assert [r.finite for r in rows] == [True, True, False] * 2
    assert [r.saturated for r in rows] == [False, True, True] * 2
    assert sorted(rows[0].figures) == ["bias", "loss", "writers"]
    np.testing.assert_allclose([r.figures["writers"] for r in rows], np.arange(6) / 6)
    assert np.isfinite(rows[0].figures["loss"])
    assert np.isnan(rows[2].figures["loss"])


def test_figures_are_means_over_the_last_steps(run):
    folder, _, _, told = run
    ends = [chunk["bias"] for chunk in told]  # of 2, 2, 2, 2, 2 and 1 updates
    for steps, want in ((1, ends[5]), (2, (2 * ends[4] + ends[5]) / 3)):
        got = ft.sweeps.final_metrics(folder, steps=steps)["bias"]
        np.testing.assert_allclose(got[:2], want[:2], rtol=1e-6)
    whole = ft.sweeps.final_metrics(folder, steps=1000)
    np.testing.assert_allclose(
        whole["bias"][:2], (2 * np.sum(ends[:5], axis=0) + ends[5])[:2] / 11, rtol=1e-6
    )
    assert whole["finite"].tolist() == [1, 1, 0] * 2
    assert {"step", "seconds", "examples_per_s"}.isdisjoint(whole)


def test_a_member_is_not_finite_if_anything_says_so(run):
    _, _, state, _ = run
    state = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
    good = {"loss": np.ones(6)}
    assert all(r.finite for r in ft.sweeps.table(state, good))
    for worse in (
        {"loss": np.where(np.arange(6) == 4, np.nan, 1)},
        good | {"finite": np.arange(6) != 4},
    ):
        assert [r.index for r in ft.sweeps.table(state, worse) if not r.finite] == [4]
    spoiled = state.params | {"b": state.params["b"].at[4].set(jnp.nan)}
    rows = ft.sweeps.table(state._replace(params=spoiled), good)
    assert [r.index for r in rows if not r.finite] == [4]


def test_one_member_is_a_table_of_one_row():
    trainer = tiny()
    state = trainer.init(jax.random.key(0))
    (row,) = ft.sweeps.table(state, {"loss": np.array(2.0)})
    assert row == Row(0, {}, {"loss": 2.0}, True, False)


def test_tables_are_checked(run, tmp_path):
    _, settings, state, _ = run
    with pytest.raises(
        ValueError, match=r"metrics .* 6 members, got loss of shape \(3"
    ):
        ft.sweeps.table(state, {"loss": np.ones(3)})
    with pytest.raises(ValueError, match=r"scores .*, got mcc of shape \(6, 2\)"):
        ft.sweeps.table(state, {"loss": np.ones(6)}, scores={"mcc": np.ones((6, 2))})
    few = {"keys": settings["keys"][:2]}
    with pytest.raises(ValueError, match=r"settings .*, got keys of shape \(2,\)"):
        ft.sweeps.table(state, {"loss": np.ones(6)}, settings=few)
    with pytest.raises(FileNotFoundError, match="give fit the same directory first"):
        ft.sweeps.final_metrics(tmp_path)


def members(points, **more):
    return [Row(i, {}, {"x": a, "y": b}, **more) for i, (a, b) in enumerate(points)]


@pytest.mark.parametrize("larger", [(), ("x",), ("y",), ("x", "y")])
def test_a_front_is_what_no_other_beats(larger):
    rng = np.random.default_rng(0)
    points = rng.integers(0, 12, (60, 2)).astype(float)
    rows = members(points)
    signs = np.array([-1.0 if n in larger else 1.0 for n in ("x", "y")])
    want = []
    for i, p in enumerate(points * signs):
        others = points * signs
        beaten = any(np.all(q <= p) and np.any(q < p) for q in others)
        want += [] if beaten else [i]
    got = ft.sweeps.pareto_front(rows, "x", "y", larger=larger)
    assert sorted(m.index for m in got) == want
    assert [m.figures["x"] for m in got] == sorted(m.figures["x"] for m in got)


def test_members_that_are_not_finite_are_on_no_front():
    rows = members([(1.0, 1.0), (0.0, np.nan), (2.0, 0.5)])
    rows.append(Row(3, {}, {"x": 0.0, "y": 0.0}, finite=False))
    assert [m.index for m in ft.sweeps.pareto_front(rows, "x", "y")] == [0, 2]
    assert ft.sweeps.pareto_front([], "x", "y") == []
    with pytest.raises(ValueError, match="members have no 'z'; they have x, y"):
        ft.sweeps.pareto_front(rows, "x", "z")
    with pytest.raises(ValueError, match=r"larger names \['l0'\], not x or y"):
        ft.sweeps.pareto_front(rows, "x", "y", larger=["l0"])


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        ({"seed": [0, 2**32]}, "a seed must be an int that fits 32 bits"),
        ({"learning_rate": [1e300]}, "all finite in float32"),
        ({"keys": [1, 2]}, "keys come of seed"),
    ],
)
def test_a_grid_that_would_be_another_is_refused(axes, match):
    with pytest.raises(ValueError, match=match):
        ft.sweeps.grid(**axes)


def test_the_first_chunk_counts_by_its_length_wherever_the_run_began(tmp_path):
    lines = ['{"step": 950, "loss": 3.0}', '{"step": 1000, "loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert ft.sweeps.final_metrics(tmp_path, steps=100)["loss"] == 2.0


MEMBERS = [ft.sweeps.Row(0, {}, {"x": 1.0, "y": 2.0})]
STATE = ft.TrainState(np.array([1, 1]), {"w": np.ones((2, 1))}, (), (), {}, {})


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ft.sweeps.final_metrics(".", steps=0), ValueError, "steps must be an"),
        (lambda: ft.sweeps.final_metrics(".", steps=2.0), TypeError, "got 2.0; pass"),
        (lambda: ft.sweeps.table(None, {}), TypeError, "state must be a TrainState"),
        (lambda: ft.sweeps.table(STATE, [1, 2]), TypeError, "metrics must be a Map"),
        (lambda: ft.sweeps.table(STATE, {"l0": "no"}), TypeError, "l0 of the metrics"),
        (lambda: ft.sweeps.pareto_front([3], "x", "y"), TypeError, "must be a Row"),
        (lambda: ft.sweeps.pareto_front(MEMBERS, "x", "z"), ValueError, "no 'z'"),
    ],
)
def test_arguments_of_sweeps_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_front_of_no_members_is_empty():
    assert ft.sweeps.pareto_front([], "x", "y") == []
    assert ft.sweeps.pareto_front(MEMBERS, "x", "y", larger="x") == MEMBERS
