"""An architecture that is defined here goes through all that the library's do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.dictionary import (
    Architecture,
    Codes,
    Config,
    RuleInputs,
    SavedAs,
    losses,
    make_dictionary,
)
from toyfeat.train import normalization

D, M, F, N = 10, 24, 16, 96
DEAD = 6


def soft_rule(config, params, batch: RuleInputs) -> Codes:
    """``max(0, pre - shrink)``."""
    del config
    return Codes(jax.nn.relu(batch.pre - params["shrink"][None, :]))


def soft_tensors(key, config, shared, *, shrink=0.05):
    del key, shared
    zeros = jnp.zeros(config.d_sae)
    return {"b_enc": zeros, "shrink": zeros + shrink}


def shrinkage() -> losses.Term:
    """Its own loss: shrink far, so that few codes are active."""

    def loss(inputs: losses.Inputs):
        return jnp.mean(jnp.exp(-inputs.params["shrink"]))

    return losses.Term("shrinkage", loss, coefficient=0.1)


SOFT = Architecture(
    name="soft_threshold",
    rule=soft_rule,
    tensors=soft_tensors,
    latent_axes={"b_enc": 0, "shrink": 0},
    losses=(shrinkage(),),
    nonnegative=("shrink",),
    saved_as=SavedAs("standard", extra_tensors=("shrink",)),
)


def soft(dim, latents, **start):
    return make_dictionary(SOFT, Config(SOFT.name, dim, latents), **start)


ROWS = np.random.default_rng(7).normal(size=(F, D))


def drawn(seed=0):
    """Sparse sums of planted directions, in units of their own."""
    rng = np.random.default_rng(seed)
    codes = rng.uniform(0.5, 1.5, (N, F)) * (rng.uniform(size=(N, F)) < 0.1)
    acts = jnp.asarray(20 * codes @ ROWS + 3, jnp.float32)
    return ft.Taps(acts, None, jnp.ones(N))


def train(trainer, state, steps):
    data = jax.tree.map(lambda *x: jnp.stack(x), *[drawn(i) for i in range(10)])
    step = lambda s, i: trainer.update(s, jax.tree.map(lambda x: x[i % 10], data))  # noqa: E731
    return jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))(state)


@pytest.fixture(scope="module")
def trained():
    sae = soft(D, M)
    trainer = ft.trainer(sae, losses.default(sae, sparsity=0.1), warm_up=0)
    start = trainer.init(jax.random.key(0), learning_rate=0.01)
    return sae, trainer, start, *train(trainer, start, 200)


def test_it_is_trained_with_its_own_tensor_and_loss(trained):
    sae, _, start, state, told = trained
    names = [term.name for term in losses.default(sae)]
    assert names == ["reconstruction", "sparsity", "shrinkage", "dead_latents"]
    assert told["fvu"][-1] < 0.5 * told["fvu"][0]
    assert told["shrinkage"][-1] < told["shrinkage"][0]
    assert np.all(state.params["shrink"] >= 0)
    assert np.any(state.params["shrink"] != start.params["shrink"])


def test_tensors_do_not_become_negative():
    sae = soft(D, M)
    terms = (losses.reconstruction(), shrinkage()._replace(coefficient=-10.0))
    trainer = ft.trainer(sae, terms, warm_up=0)
    state = trainer.init(jax.random.key(0), learning_rate=0.1)
    state, _ = train(trainer, state, 5)
    np.testing.assert_array_equal(state.params["shrink"], 0)


@pytest.mark.slow
def test_a_member_of_a_population_is_what_it_is_alone(trained):
    sae, one, _, _, _ = trained
    many = ft.population(one)
    keys = jax.random.split(jax.random.key(0), 2)
    rates = jnp.array([0.01, 0.03])
    both, _ = train(many, many.init(keys, learning_rate=rates), 20)
    for i in range(2):
        alone, _ = train(one, one.init(keys[i], learning_rate=rates[i]), 20)
        for name, x in alone.params.items():
            np.testing.assert_allclose(both.params[name][i], x, rtol=1e-3, atol=1e-4)
    state = jax.tree.map(lambda x: x[1], both)
    assert set(ft.denormalized(sae, state)) == {*alone.params}


def test_fit_reads_its_recipe(tmp_path):
    sae = soft(D, M)
    trainer = ft.population(ft.trainer(sae, losses.default(sae)))
    assert trainer.recipe.dictionary is sae
    state = trainer.init(jax.random.split(jax.random.key(0), 2))
    state = ft.fit(trainer, state, drawn, steps=2, chunk=1, directory=tmp_path)
    np.testing.assert_array_equal(state.step, 2)


def test_dead_latents_start_again():
    sae = soft(D, M, shrink=0.5)
    trainer = ft.trainer(sae, losses.default(sae), revive=1, dead_after=5, warm_up=0)
    state = trainer.init(jax.random.key(0), learning_rate=0.0)
    dead = jnp.arange(M) < DEAD
    shrink = jnp.where(dead, 100.0, 0.3)  # the first latents never fire
    running = state.running | {"silent": jnp.where(dead, 5, 0).astype(jnp.int32)}
    state = state._replace(params=state.params | {"shrink": shrink}, running=running)
    after, told = jax.jit(trainer.update)(state, drawn())
    assert told["revived"] == DEAD
    want = np.where(np.asarray(dead), 0.5, 0.3)
    np.testing.assert_allclose(after.params["shrink"], want, rtol=1e-6)
    around = drawn().acts / after.running["acts_scale"] - after.params["b_dec"][None]
    rows = np.asarray(after.params["W_dec"])[:DEAD]
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    near = (unit(rows) @ unit(np.asarray(around)).T).max(axis=1)
    np.testing.assert_allclose(near, 1, atol=1e-4)


def test_denormalized_parameters_do_for_taps_what_the_others_do_in_training(trained):
    sae, _, _, state, _ = trained
    params, units = ft.denormalized(sae, state), normalization(state)
    acts = drawn(50).acts
    inner = sae.encode(state.params, acts / units.acts)
    outer = sae.encode(params, acts)
    assert 0 < np.mean(inner != 0) < 1
    np.testing.assert_allclose(outer, inner, rtol=1e-4, atol=1e-4)
    want = sae.decode(state.params, inner)
    got = sae.decode(params, outer) / units.target
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_it_is_saved_and_loaded_and_is_another_to_saelens(trained, tmp_path):
    sae, _, _, state, _ = trained
    params = ft.denormalized(sae, state)
    ft.interop.save_saelens(tmp_path, sae, params)
    again, same = ft.interop.load_saelens(tmp_path, architectures=(SOFT,))
    assert again.config == sae.config
    assert again.architecture is SOFT
    assert set(same) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(same[name], value)
    acts = drawn(50).acts
    np.testing.assert_array_equal(again.encode(same, acts), sae.encode(params, acts))
    match = "of the architecture 'soft_threshold', which is not known .* architectures="
    with pytest.raises(ValueError, match=match):
        ft.interop.load_saelens(tmp_path)


def test_an_architecture_of_its_own_in_saelens_files(tmp_path):
    """Name and file format are its own; SAELens itself could not read it."""
    double = Architecture(
        name="double",
        rule=lambda config, params, batch: Codes(2 * jax.nn.relu(batch.pre)),
        saved_as=SavedAs("double"),
    )
    sae = make_dictionary(double, Config("double", D, M))
    params = sae.init(jax.random.key(0))
    ft.interop.save_saelens(tmp_path, sae, params)
    again, _ = ft.interop.load_saelens(tmp_path, architectures=(double,))
    loaded = ft.interop.load_dictionary(tmp_path, architectures=(double,))
    assert again.architecture is loaded.dictionary.architecture is double
    assert loaded.metadata["training_architecture"] == "double"
    match = "'double' is not known here; .* pass records of your own"
    with pytest.raises(ValueError, match=match):
        ft.interop.load_saelens(tmp_path)


def test_what_cannot_be_saved_is_named(tmp_path):
    unsaved = Architecture(name="unsaved", rule=soft_rule, tensors=soft_tensors)
    sae = make_dictionary(unsaved, Config("unsaved", D, M))
    with pytest.raises(ValueError, match=r"latent_axes must name every .*\['shrink'\]"):
        sae.init(jax.random.key(0))
    plain = Architecture(name="plain", rule=lambda c, p, batch: Codes(batch.pre))
    sae = make_dictionary(plain, Config("plain", D, M))
    match = "SAELens has no plain architecture; .* set saved_as if the architecture is"
    with pytest.raises(ValueError, match=match):
        ft.interop.save_saelens(tmp_path, sae, sae.init(jax.random.key(0)))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"nonnegative": ("shrnk",)},
            r"nonnegative names \['shrnk'\]; .* b_enc, shrink",
        ),
        ({"revived_from": {"P": "acts"}}, r"revived_from names \['P'\]; the tensors"),
        ({"averaged_threshold": "low"}, r"averaged_threshold names \['low'\]"),
        (
            {"latent_axes": {"b_enc": 0, "shrink": 1}},
            rf"axis 1 of shrink is that of the {M} latents, got shape \({M},\)",
        ),
        (
            {"tensors": lambda *_: {"b_enc": jnp.zeros(M), "shrink": jnp.zeros(())}},
            rf"axis 0 of shrink is that of the {M} latents, got shape \(\)",
        ),
    ],
)
def test_a_record_that_does_not_fit_its_tensors_is_refused(fields, match):
    record = dataclasses.replace(SOFT, **fields)
    with pytest.raises(ValueError, match=f"^soft_threshold: .*{match}"):
        make_dictionary(record, Config(SOFT.name, D, M)).init(jax.random.key(0))


@pytest.mark.parametrize(
    ("rule", "error", "match"),
    [
        (lambda c, p, b: b.pre, TypeError, "a rule returns Codes, got ArrayImpl"),
        (
            lambda c, p, b: Codes(b.pre[:, :3]),
            ValueError,
            rf"must be \({N}, {M}\), got shape \({N}, 3\)",
        ),
        (
            lambda c, p, b: Codes(b.pre, jnp.zeros((len(b.pre), 2), int)),
            ValueError,
            rf"must be \({N}, 2\), got shape \({N}, {M}\)",
        ),
    ],
)
def test_a_rule_that_returns_no_codes_is_refused(rule, error, match):
    sae = make_dictionary(dataclasses.replace(SOFT, rule=rule), Config(SOFT.name, D, M))
    params, acts = sae.init(jax.random.key(0)), jnp.ones((N, D))
    for function in (sae.encode, sae.forward):
        with pytest.raises(error, match=f"^soft_threshold: .*{match}"):
            function(params, acts)


@pytest.mark.parametrize("name", ["dim", "latents"])
def test_sizes_beyond_those_of_arrays_are_refused(name):
    sizes = {"dim": 4, "latents": 8} | {name: 2**63}
    with pytest.raises(
        ValueError, match=rf"{name} must be an int in 1 \.\. 2147483647"
    ):
        ft.dictionaries.standard(**sizes)
