import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_trainer import bits

import toyfeat as ft
from toyfeat.dictionary.tensors import latent_axes
from toyfeat.train.revival import _forget, revive_dead

D, M, F, N, K = 10, 24, 16, 96, 3
DEAD = 8  # the first latents are planted so that they never fire
ALL = {  # what has tensors of its own
    "transcoder": lambda: ft.dictionaries.standard(D, M, target_dim=D),
    "batch": lambda: ft.dictionaries.batch_topk(D, M, K),
    "jump": lambda: ft.dictionaries.jump_relu(D, M, threshold=0.05, bandwidth=0.3),
    "gated": lambda: ft.dictionaries.gated(D, M),
    "paired": lambda: ft.dictionaries.paired(D, M, K),
}
ROWS = np.random.default_rng(7).normal(size=(F, D))


def drawn(seed=0, num=N):
    """Sparse sums of planted directions, and gradients that are sums of them too."""
    rng = np.random.default_rng(seed)
    there = rng.uniform(size=(num, F)) < 0.1
    acts = (there * rng.uniform(0.5, 1.5, (num, F))) @ ROWS
    grads = np.stack([there @ ROWS, 0.1 * rng.normal(size=(num, D))], axis=1)
    acts, grads = (jnp.asarray(x, jnp.float32) for x in (acts, grads))
    return ft.Taps(acts, grads, jnp.ones(num), acts)


def made(name, **options):
    sae = (ALL | {"standard": lambda: ft.dictionaries.standard(D, M)})[name]()
    objective = ft.losses.default(sae, dead_latents=0, sparsity=0.1)
    options = {"readouts": 2, "warm_up": 0, "dead_after": 5, "revive": 1} | options
    return sae, ft.trainer(sae, objective, **options)


def planted(state, silent=5, num=DEAD):
    """Latents whose bias keeps them silent, and that have been so for long."""
    params, which = dict(state.params), jnp.arange(M) < num
    bias = "b_gate" if "b_gate" in params else "b_enc"
    params[bias] = jnp.where(which, -100.0, params[bias])
    now = jnp.where(which, silent, 0).astype(jnp.int32)
    return state._replace(params=params, running=state.running | {"silent": now})


def cosines(rows, others):
    rows, others = (
        np.asarray(x) / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
        for x in (rows, others)
    )
    return rows @ others.T


def lengths(rows):
    return np.linalg.norm(rows, axis=1)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ALL)
def test_dead_latents_start_again_and_the_others_are_left_alone(name):
    sae, trainer = made(name)
    start, taps = planted(trainer.init(jax.random.key(0))), drawn()
    rng = np.random.default_rng(1)  # as after some training
    old = jax.tree.map(
        lambda x: x + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype), start.params
    )
    moments = jax.tree.map(jnp.ones_like, start.opt_state)
    before = start._replace(params=old, opt_state=moments, step=jnp.int32(7))

    @jax.jit
    def after(state):
        out = sae.forward(state.params, taps.acts, grads=taps.grads)
        dead = state.running["silent"] >= 5
        inputs = ft.losses.Inputs(
            dictionary=sae,
            params=state.params,
            acts=taps.acts,
            target=taps.acts,
            out=out,
            grads=taps.grads,
            weights=taps.weights,
            dead=dead,
            scale=jnp.ones(()),
            coefficients={},
        )
        return revive_dead(inputs, state, every=7, dead_after=5)

    state, told = after(before)
    assert told["revived"] == DEAD
    np.testing.assert_array_equal(state.running["silent"][:DEAD], 0)
    new, old = (jax.tree.map(np.asarray, s.params) for s in (state, before))
    around = np.asarray(taps.acts) - new["b_dec"]
    read = np.asarray(taps.acts) if name == "transcoder" else around
    best = cosines(new["W_dec"][:DEAD], around)
    given = np.arange(DEAD), best.argmax(1)
    np.testing.assert_allclose(best.max(1), 1, atol=1e-4)
    assert len(set(given[1])) == DEAD  # no example twice
    same = cosines(new["W_enc"].T[:DEAD], read)
    np.testing.assert_allclose(same[given], 1, atol=1e-4)
    share = 0.2 if sae.config.k is None else 1.0
    pairs = [("W_dec", 1.0), ("W_enc", share), ("W_read", 1.0), ("P", share)]
    for tensor, part in pairs[: None if name == "paired" else 2]:
        mine, others = (
            x[tensor].T if tensor in "W_enc P" else x[tensor] for x in (new, old)
        )
        size = part * lengths(others[DEAD:]).mean()
        np.testing.assert_allclose(lengths(mine[:DEAD]), size, rtol=1e-4)
    if name == "paired":
        near = [cosines(new["W_read"][:DEAD], taps.grads[:, k]) for k in range(2)]
        np.testing.assert_allclose(np.max(near, axis=0)[given], 1, atol=1e-4)
        near = cosines(new["P"].T[:DEAD], new["W_read"][:DEAD])
        np.testing.assert_allclose(np.diagonal(near), 1, atol=1e-4)
    adam = state.opt_state.inner_state[0]
    for tensor, value in new.items():
        if tensor in ("b_dec", "topk_threshold"):
            np.testing.assert_array_equal(value, old[tensor])
            continue
        columns = tensor in ("W_enc", "P")
        mine, others = (x.T if columns else x for x in (value, old[tensor]))
        np.testing.assert_array_equal(mine[DEAD:], others[DEAD:])
        if value.ndim == 1:  # biases and thresholds
            fresh = 0.05 if tensor == "threshold" else 0.0
            np.testing.assert_allclose(mine[:DEAD], fresh)
        for moment in (adam.mu[tensor], adam.nu[tensor]):
            there = np.asarray(moment.T if columns else moment)
            assert np.all(there[:DEAD] == 0)
            assert np.all(there[DEAD:] == 1)
    np.testing.assert_array_equal(adam.mu["b_dec"], 1)
    kept, told = after(before._replace(step=jnp.int32(8)))  # not the step for it
    assert told["revived"] == 0
    assert bits(kept.params) == bits(before.params)


def test_examples_are_drawn_by_error_and_weight_and_the_rest_waits():
    _, trainer = made("standard")
    state = planted(trainer.init(jax.random.key(0), learning_rate=0.01))
    taps = drawn(num=40)._replace(targets=None)
    few = taps._replace(weights=jnp.zeros(40).at[:3].set(1))
    update = jax.jit(trainer.update)
    after, told = update(state, few)
    assert told["revived"] == 3
    assert np.sum(after.running["silent"] == 0) == M - DEAD + 3 - np.sum(
        after.running["silent"][DEAD:] > 0
    )
    around = few.acts / after.running["acts_scale"]
    around = np.asarray(around) - np.asarray(after.params["b_dec"])
    found = cosines(after.params["W_dec"][:3], around).argmax(1)
    assert set(found.tolist()) == {0, 1, 2}
    none, told = update(state, few._replace(acts=0 * few.acts, targets=None))
    assert told["revived"] == 0  # nothing is reconstructed badly
    assert all(np.isfinite(x).all() for x in none.params.values())


@pytest.mark.slow
def test_a_large_error_is_chosen_more_often():
    _, trainer = made("standard", center=False, normalize=False)
    state = planted(trainer.init(jax.random.key(0), learning_rate=0.0))
    only = jnp.where(jnp.arange(M) == 0, 5, 0).astype(jnp.int32)
    state = state._replace(running=state.running | {"silent": only})
    acts = jnp.zeros((4, D)).at[jnp.arange(4), jnp.arange(4)].set(1.0)
    taps = ft.Taps(acts * jnp.array([[3.0], [1.0], [1.0], [0.0]]), None, jnp.ones(4))
    bias = state.params | {"b_enc": jnp.full(M, -100.0)}  # errors are 9, 1, 1, 0
    state = state._replace(params=bias)
    keys = jax.random.split(jax.random.key(1), 500)

    @jax.jit
    @jax.vmap
    def chosen(key):
        running = state.running | {"key": key}
        after, _ = trainer.update(state._replace(running=running), taps)
        return jnp.argmax(after.params["W_dec"][0])

    counts = np.bincount(np.asarray(chosen(keys)), minlength=D)
    np.testing.assert_allclose(counts[:4] / 500, [9 / 11, 1 / 11, 1 / 11, 0], atol=0.06)


def trained(trainer, steps, seed=0, **hyper):
    state = planted(trainer.init(jax.random.key(seed), **hyper), silent=0, num=16)
    data = jax.tree.map(lambda *x: jnp.stack(x), *[drawn(i) for i in range(20)])
    step = lambda s, i: trainer.update(s, jax.tree.map(lambda x: x[i % 20], data))  # noqa: E731
    return jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))(state)


@pytest.mark.slow
def test_revived_latents_find_what_the_others_cannot():
    found = {}
    for revive in (None, 50):
        _, trainer = made("batch", revive=revive, dead_after=30)
        state, told = trained(trainer, 500, learning_rate=0.01)
        match = ft.metrics.match_features(np.asarray(state.params["W_dec"]), ROWS)
        found[revive] = match.coverage, float(told["fvu"][-20:].mean())
        assert (told["dead"][-1] >= 16) == (revive is None)
    assert found[50][0] > found[None][0] + 0.1
    assert found[50][1] < 0.8 * found[None][1]


@pytest.fixture(scope="module")
def several():
    """A population in which members have dead latents at different times."""
    _, one = made("standard", revive=2, dead_after=3)
    many = ft.population(one)
    state = many.init(jax.random.split(jax.random.key(3), 3), learning_rate=0.01)
    parts = [
        planted(jax.tree.map(lambda x, i=i: x[i], state), silent=3 * (i == 1))
        for i in range(3)
    ]
    parts[2] = jax.tree.map(lambda x: x[2], state)  # no latent of it is silent
    return one, many, jax.tree.map(lambda *x: jnp.stack(x), *parts), parts


@pytest.mark.slow
def test_a_member_is_what_it_would_be_alone(several):
    one, many, together, alone = several
    update, told = jax.jit(many.update), []
    for i in range(6):
        together, metrics = update(together, drawn(i))
        told.append(metrics["revived"])
    told = np.array(told)
    assert np.all(told[::2] == 0)
    assert np.all(told[1, :2] == [0, DEAD])
    assert np.all(told[3, :2] == [DEAD, 0])
    assert told[:, 2].sum() == 0
    update = jax.jit(one.update)
    for i, state in enumerate(alone):
        for step in range(6):
            state, _ = update(state, drawn(step))
        mine = jax.tree.map(lambda x, i=i: x[i], together)
        for a, b in zip(
            jax.tree.leaves((mine.params, mine.opt_state, mine.running["silent"])),
            jax.tree.leaves((state.params, state.opt_state, state.running["silent"])),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def outside_of_conditions(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name == "cond":
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from outside_of_conditions(inner)


def test_other_steps_do_none_of_the_work_in_a_population_either(several):
    _, many, state, _ = several
    names = list(
        outside_of_conditions(jax.make_jaxpr(many.update)(state, drawn()).jaxpr)
    )
    assert "cond" in names
    # Choosing 64 examples for attributions is there in any case, drawing is not.
    assert names.count("top_k") == 1
    assert "log" not in names


@pytest.mark.slow
def test_a_run_that_is_cut_off_ends_with_the_same_bits(several, tmp_path):
    _, many, state, _ = several
    arguments = {"steps": 8, "chunk": 2, "checkpoint_every": 1, "progress": False}
    whole = ft.fit(many, state, drawn, **arguments)

    def killed(step):
        if step == 6:
            raise KeyboardInterrupt
        return drawn(step)

    with pytest.raises(KeyboardInterrupt):
        ft.fit(many, state, killed, directory=tmp_path, **arguments)
    again = ft.fit(many, state, drawn, directory=tmp_path, **arguments)
    assert bits(again) == bits(whole)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
        optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
        optax.apply_if_finite(optax.lion(0.1), 3),
        optax.contrib.schedule_free_adamw(0.1),
    ],
    ids=["adam", "chain", "momentum", "apply_if_finite", "schedule_free"],
)
def test_every_optimizer_forgets_those_latents_and_nothing_else(optimizer):
    sae = ft.dictionaries.gated(4, 4)  # as wide as it has latents
    params = sae.init(jax.random.key(0))
    start = optimizer.init(params)
    full = jax.tree.map(jnp.ones_like, start)
    again = jnp.array([True, False, False, True])
    after = _forget(full, params, latent_axes(sae.architecture), again)
    assert jax.tree.structure(after) == jax.tree.structure(full)
    leaves, seen = jax.tree_util.tree_leaves_with_path(after), 0
    for path, leaf in leaves:
        name = getattr(path[-1], "key", None)
        want = np.ones(np.shape(leaf))
        if name in params and name != "b_dec":
            seen += 1
            want[(slice(None), [0, 3]) if name == "W_enc" else [0, 3]] = 0
        np.testing.assert_array_equal(leaf, want)
    assert seen >= len(params) - 1


def test_without_gradients_readers_stay_as_they_are():
    sae = ALL["paired"]()
    objective = (ft.losses.reconstruction(),)
    trainer = ft.trainer(sae, objective, warm_up=0, dead_after=5, revive=1)
    state = planted(trainer.init(jax.random.key(0), learning_rate=0.0))
    after, told = jax.jit(trainer.update)(state, drawn()._replace(grads=None))
    assert told["revived"] == DEAD
    for name in ("W_read", "P"):
        np.testing.assert_array_equal(after.params[name], state.params[name])
    assert np.all(np.any(after.params["W_dec"] != state.params["W_dec"], 1)[:DEAD])


def test_off_is_as_if_it_were_not_there():
    sae = ft.dictionaries.standard(D, M)
    trainer = ft.trainer(sae, ft.losses.default(sae))
    assert "key" not in trainer.init(jax.random.key(0)).running
    for wrong in (0, -3):
        with pytest.raises(ValueError, match=f"at least 1, or None, got {wrong}"):
            ft.trainer(sae, ft.losses.default(sae), revive=wrong)
