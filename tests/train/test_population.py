import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft

D, M, N, P = 6, 24, 64, 3
KINDS = {
    "standard": (lambda: ft.dictionaries.standard(D, M), {"sparsity": [0.1, 0.5, 2.0]}),
    "topk": (lambda: ft.dictionaries.topk(D, M, 5), {"k": [2, 3, 5]}),
    "batch": (
        lambda: ft.dictionaries.batch_topk(D, M, 4),
        {"learning_rate": [1e-4, 1e-3, 1e-2]},
    ),
    "jump": (lambda: ft.dictionaries.jump_relu(D, M), {"target": [2.0, 4.0, 8.0]}),
    "gated": (lambda: ft.dictionaries.gated(D, M), {"clip": [0.1, 1.0, 10.0]}),
    "paired": (lambda: ft.dictionaries.paired(D, M, 3), {"k": [1, 2, 3]}),
}


def trained(kind, steps, group=None):
    make, hyper = KINDS[kind]
    sae = make()
    objective = ft.losses.default(sae, sparsity=0.3)
    control = ft.controllers.target_l0(4.0) if "target" in hyper else None
    one = ft.trainer(sae, objective, controller=control, warm_up=5, dead_after=7)
    many = ft.population(one, group=group)
    keys = jax.random.split(jax.random.key(3), P)
    float_type = jnp.zeros(()).dtype
    rng = np.random.default_rng(0)
    acts = jnp.asarray(rng.normal(size=(steps, N, D)) ** 3, float_type)
    grads = jnp.asarray(rng.normal(size=(steps, N, 1, D)), float_type)
    data = ft.Taps(acts, grads, jnp.ones((steps, N), float_type))
    values = {name: jnp.asarray(v, float_type) for name, v in hyper.items()}

    def training(trainer):
        return jax.jit(lambda s: jax.lax.scan(trainer.update, s, data))

    together = training(many)(many.init(keys, **values))
    run = training(one)  # one program for all members
    alone = [
        run(one.init(keys[i], **{n: v[i] for n, v in values.items()})) for i in range(P)
    ]
    return together, alone


def compare(together, alone, tolerance):
    losses = np.asarray(together[1]["loss"])
    for i, (state, metrics) in enumerate(alone):
        for name in ("params", "opt_state", "running", "controller"):
            a, b = getattr(together[0], name), getattr(state, name)
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                member = np.asarray(x)[i]
                np.testing.assert_allclose(member, y, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(losses[:, i], metrics["loss"], rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_member_is_what_it_would_be_alone(kind):
    compare(*trained(kind, 20), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["topk", "jump"])
def test_and_stays_so_for_long_in_double_precision(kind):
    with jax.enable_x64(True):
        compare(*trained(kind, 200), 1e-9)


@pytest.mark.slow
def test_groups_change_nothing():
    together, alone = trained("standard", 5, group=1)
    compare(together, alone, 1e-5)


@pytest.mark.slow
def test_members_differ():
    (state, _), _ = trained("standard", 5)
    rows = np.asarray(state.params["W_dec"])
    assert np.abs(rows[0] - rows[1]).max() > 1e-2


def test_errors():
    sae = ft.dictionaries.topk(D, M, 4)
    many = ft.population(ft.trainer(sae, ft.losses.default(sae)))
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match=r"one per key \(3\), got shape \(2,\)"):
        many.init(keys, k=jnp.array([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"k must be a whole number in 1 \.\. 4"):
        many.init(keys, k=jnp.array([1.0, 2.0, 5.0]))
    with pytest.raises(ValueError, match="unknown hyper-parameters"):
        many.init(keys, learning=1.0)
    grouped = ft.population(ft.trainer(sae, ft.losses.default(sae)), group=2)
    taps = ft.Taps(jnp.ones((4, D)), None, jnp.ones(4))
    with pytest.raises(ValueError, match="got group 2 of 3 members"):
        grouped.update(grouped.init(keys), taps)
    one = ft.trainer(sae, ft.losses.default(sae))
    for wrong in (0, -1, 1.5, True, "a"):
        with pytest.raises((ValueError, TypeError), match=r"^population: group must"):
            ft.population(one, group=wrong)
    for wrong in (jax.random.key(0), keys[:0], None, 3, jnp.ones(3)):
        with pytest.raises(
            (ValueError, TypeError), match=r"^population: keys .*; pass"
        ):
            many.init(wrong)
    with pytest.raises(TypeError, match=r"^population: k must be numbers, got 'a'"):
        many.init(keys, k="a")
    with pytest.raises(TypeError, match=r"^population: trainer must be a Trainer, got"):
        ft.population(sae)
