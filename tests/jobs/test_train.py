import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tiny_collection import SITES, collected

import toyfeat as ft
from toyfeat.data.store import shard_taps
from toyfeat.interop import load_saelens
from toyfeat.jobs import Attribution, Train
from toyfeat.jobs import taps as sources
from toyfeat.jobs import train as training
from toyfeat.jobs.kinds import KINDS
from toyfeat.jobs.results import Run, finished_runs, is_finished, list_runs
from toyfeat.jobs.taps import from_store, grads_as_acts, shuffled_batches
from toyfeat.jobs.train import design, load_curves, train_one, train_together


@pytest.mark.slow
def test_a_population_that_was_cut_off_goes_on_with_its_members(
    store, tmp_path, monkeypatch
):
    """Killed while members are saved; nothing is trained anew."""
    train = Train(kinds=("acts",), ks=(2, 3), seeds=(4, 1), latents=9, steps=8)
    source, runs = from_store(store, 20), list_runs(train)
    train_together(runs, train, source, tmp_path / "whole")
    save = training._save_features

    def killed(run, *args):
        if run == runs[1]:
            raise KeyboardInterrupt
        save(run, *args)

    monkeypatch.setattr(training, "_save_features", killed)
    with pytest.raises(KeyboardInterrupt):
        train_together(runs, train, source, tmp_path / "cut")
    monkeypatch.setattr(training, "_save_features", save)
    left = [run for run in runs if not is_finished(tmp_path / "cut", run)]
    assert left == runs[1:]
    none = source._replace(batches=lambda *_: lambda step: pytest.fail(f"step {step}"))
    train_together(left, train, none, tmp_path / "cut")
    for run in runs:
        parts = [tmp_path / name / run.name / "features" for name in ("whole", "cut")]
        (_, wanted), (_, found) = map(load_saelens, parts)
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)
    more = Run("acts", 5, 0)
    train_together([more], train, source, tmp_path / "cut")
    assert is_finished(tmp_path / "cut", more)


@pytest.mark.parametrize(("parts", "axis"), [(1, None), (2, "latents")])
def test_dictionaries_are_split_over_the_mesh_of_their_source(store, parts, axis):
    mesh = AbstractMesh((2, parts), ("data", "latents"))
    source = from_store(store, 20)._replace(mesh=mesh)
    run_trainer = training._make_trainer(Run("acts", 2, 0), Train(latents=8), source, 2)
    assert run_trainer.recipe.dictionary.split == (mesh, "data", axis)


def test_members_that_diverge_do_not_take_the_others_along(
    store, tmp_path, monkeypatch
):
    train = Train(kinds=("acts",), ks=(2,), seeds=(0, 1, 2), latents=9, steps=4)
    source, runs, fit = from_store(store, 20), list_runs(train), training.fit

    def diverging(*args, **options):
        state = fit(*args, **options)
        bad = state.params["W_dec"].at[1].set(jnp.nan)
        return state._replace(params={**state.params, "W_dec": bad})

    monkeypatch.setattr(training, "fit", diverging)
    with pytest.raises(FloatingPointError, match="train: acts-k2-s1 diverged in"):
        train_together(runs, train, source, tmp_path)
    assert [is_finished(tmp_path, run) for run in runs] == [True, False, True]


def test_a_loss_has_its_coefficients():
    loss = Attribution("x", 3.0, 0.0, "l1")
    _, objective = design("attribution", 5, 12, 3, loss)
    found = {term.name: term.coefficient for term in objective}
    assert found["attribution_sparsity"] == 3.0
    assert "unexplained" not in found


def test_the_settings_of_a_loss_are_arguments_of_the_library_s_with_its_defaults():
    arguments = inspect.signature(ft.losses.attribution).parameters
    settings = dataclasses.asdict(Attribution())
    del settings["name"]
    assert {name: arguments[name].default for name in settings} == settings


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["acts", "gradients", "paired", "attribution"])
def test_a_population_has_the_dictionaries_of_single_trainings(store, tmp_path, kind):
    """With batches of everything, seeds differ by the start alone."""
    train = Train(kinds=(kind,), ks=(2, 3), seeds=(0, 1), latents=9, steps=8)
    source, runs = from_store(store, 1000), list_runs(train)
    train_together(runs, train, source, tmp_path / "all")
    for run in runs:
        train_one(run, train, source, tmp_path / "one")
    found, wanted = (dict(finished_runs(train, tmp_path / x)) for x in ("all", "one"))
    assert len(found) == len(wanted) == 4
    for run in runs:
        (sae, mine), (other, alone) = (load_saelens(x[run]) for x in (found, wanted))
        assert sae.config == other.config
        for name, value in alone.items():
            np.testing.assert_allclose(
                mine[name], value, rtol=2e-2, atol=2e-3, err_msg=f"{run.name} {name}"
            )
    mine, alone = (load_curves(train, tmp_path / x) for x in ("all", "one"))
    assert mine.keys() == alone.keys() == {run.name for run in runs}
    for name, of in alone.items():
        assert mine[name]["step"].tolist() == of["step"].tolist() == [8]
        np.testing.assert_allclose(mine[name]["fvu"], of["fvu"], rtol=1e-2)


@pytest.mark.parametrize(
    ("kind", "architecture", "terms"),
    [
        ("acts", "topk", {"reconstruction", "dead_latents"}),
        (
            "attribution",
            "topk",
            {"reconstruction", "attribution_sparsity", "unexplained", "dead_latents"},
        ),
        ("gradients", "abstopk", {"reconstruction", "dead_latents"}),
        (
            "paired",
            "paired",
            {"reconstruction", "gradient_reconstruction", "dead_latents"},
        ),
    ],
)
def test_designs(kind, architecture, terms):
    sae, objective = design(kind, 5, 12, 3)
    config = sae.config
    assert (config.architecture, config.d_in, config.d_sae, config.k) == (
        architecture,
        5,
        12,
        3,
    )
    assert {term.name for term in objective} == terms
    assert KINDS[kind].of_gradients == (kind == "gradients")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("store"), dtype="bfloat16")[SITES[1]]


@pytest.mark.slow
@pytest.mark.parametrize("of_gradients", [False, True])
def test_batches_in_memory_are_the_tokens_that_count(store, of_gradients):
    parts = [shard_taps(store, i) for i in range(len(store.shards))]
    acts, grads, weights = (
        np.concatenate([np.asarray(part[i], np.float32) for part in parts])
        for i in range(3)
    )
    wanted = (grads[:, 0] if of_gradients else acts)[weights > 0]
    batches = shuffled_batches(store, 1000, 0, of_gradients)
    taps = batches(jnp.int32(0))
    assert taps.acts.shape == wanted.shape
    found = np.asarray(taps.acts)
    order = [np.lexsort(x.T) for x in (found, wanted)]
    np.testing.assert_array_equal(found[order[0]], wanted[order[1]])
    assert (taps.grads is None) == of_gradients
    np.testing.assert_array_equal(taps.weights, np.ones(len(wanted)))


@pytest.mark.parametrize("of_gradients", [False, True])
def test_batches_of_a_store_that_is_too_large_are_read(
    store, of_gradients, monkeypatch
):
    monkeypatch.setattr(sources, "MAX_BYTES_IN_MEMORY", 0)
    batches = shuffled_batches(store, 8, 0, of_gradients)
    taps = batches(0)
    assert taps.acts.shape == (8, store.dim)
    assert (taps.grads is None) == of_gradients
    rows = np.concatenate(
        [
            np.asarray(t.grads[:, 0] if of_gradients else t.acts, np.float32)
            for t in (shard_taps(store, i) for i in range(len(store.shards)))
        ]
    )
    for row in np.asarray(taps.acts, np.float32):
        assert (rows == row).all(axis=1).any()


def test_gradients_of_a_store_without_any_are_refused():
    taps = ft.Taps(jnp.ones((2, 3)), None, jnp.ones(2))
    with pytest.raises(ValueError, match="train: a dictionary of gradients wants"):
        grads_as_acts(taps)


def test_every_draw_of_a_gradient_is_an_example():
    rng = np.random.default_rng(0)
    taps = ft.Taps(np.zeros((3, 4)), rng.normal(size=(3, 2, 4)), np.array([1.0, 0, 2]))
    found = grads_as_acts(taps)
    for n in range(3):
        for k in range(2):
            wanted = np.sqrt(2) * taps.grads[n, k]
            np.testing.assert_allclose(found.acts[2 * n + k], wanted)
    assert found.weights.tolist() == [1, 1, 0, 0, 2, 2]
