"""Nothing is traced again for the next batch, the next chunk or a run that goes on.

Traces are counted by JAX itself: every one of any function in the process.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.partition import losses

TRACED = []
# Traces for shapes alone, and two steps of the optimizer on 2 x 2 matrices, by which a
# call of fit tells other settings.
SHAPES = {"<lambda>", "_call_batches", "init_params"}
SHAPES |= {"_probe_optimizer", "jit(_probe_optimizer)"}
COUNTED = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/backend_compile_duration",
)


@jax.monitoring.register_event_duration_secs_listener
def count(event, seconds, **options):
    del seconds
    if event in COUNTED:
        TRACED.append(options.get("fun_name", event))


def assert_nothing_is_traced(run, *arguments):
    TRACED.clear()
    run(*arguments)
    assert not set(TRACED) - SHAPES


def test_the_counter_sees_a_trace():
    program = jax.jit(lambda x: x + 1)
    TRACED.clear()
    program(jnp.zeros(3))
    assert TRACED
    assert_nothing_is_traced(program, jnp.ones(3))


def take_rows(step):
    key = jax.random.fold_in(jax.random.key(1), step)
    return ft.Taps(jax.random.normal(key, (16, 4)), None, jnp.ones(16))


def fetch_rows(step):
    return jax.tree.map(np.asarray, take_rows(step))


def dictionary():
    sae = ft.dictionaries.topk(4, 8, 2)
    trainer = ft.trainer(sae, ft.losses.default(sae))
    return trainer, trainer.init(jax.random.key(0))


def members():
    population = ft.population(dictionary()[0])
    return population, population.init(jax.random.split(jax.random.key(0), 2))


def parts():
    params, identity = {"w": jnp.ones((4, 2))}, np.eye(4, dtype=np.float32)
    split = ft.partition.decompose_weights(
        lambda p, x: x @ p["w"], params, "w", 3, identity
    )
    family = ft.partition.importance.per_component(split, 4)
    objective = (losses.importance(1e-2), losses.stochastic())
    trainer = ft.partition.trainer(split, params, objective, family, steps=12)
    return trainer, trainer.init(jax.random.key(0))


@pytest.mark.slow_cases
@pytest.mark.parametrize("make", [dictionary, members, parts])
@pytest.mark.parametrize("batches", [jax.tree_util.Partial(take_rows), fetch_rows])
def test_fit_traces_its_chunk_once(make, batches, tmp_path):
    trainer, state = make()
    options = {"chunk": 2, "checkpoint_every": 1, "progress": False}

    def train(steps):
        return ft.fit(
            trainer, state, batches, steps=steps, directory=tmp_path, **options
        )

    train(4)
    train(6)  # resumed: reading a checkpoint compiles a little, once
    assert_nothing_is_traced(train, 12)


def model_of_blocks(params, x, tap):
    for name, matrix in params.items():
        x = tap(name, x + jax.nn.tanh(x @ matrix))
    return x


BLOCKS = {name: 0.3 * jnp.eye(4) for name in "abc"}


def test_a_lens_is_traced_once(tmp_path):
    model = ft.lenses.from_probed(
        ft.from_function(model_of_blocks), sites=[*"abc"], unembed=lambda p, h: h
    )
    accumulator = ft.lenses.mean_jacobian(model, 4, skip_first=0, skip_last=0)
    batches = [(jnp.full((2, 3, 4), 0.1 * i), None) for i in range(8)]

    def fit(num):
        fitted = ft.lenses.fit(
            model,
            accumulator,
            BLOCKS,
            batches[:num],
            directory=tmp_path,
            checkpoint_every=2,
        )
        return accumulator.finish(fitted)

    fit(2)
    fit(4)  # resumed: reading a checkpoint compiles a little, once
    assert_nothing_is_traced(fit, 8)


def test_statistics_are_traced_once():
    probed, accumulator = ft.from_function(model_of_blocks), ft.moments(4)

    @jax.jit
    def run(params, x, readout):
        return ft.tap(probed, params, x, sites="b", readout=readout)

    def accumulate(batches):
        state = accumulator.init()
        for x in batches:
            readout = ft.readouts.half_squared_norm()
            state = accumulator.update(state, run(BLOCKS, x, readout)["b"])
        return ft.joint_pca(accumulator.finish(state), 2)

    rows = [np.full((8, 4), 0.1 * i, np.float32) + np.eye(8, 4) for i in range(1, 5)]
    rows = [jnp.asarray(x, jnp.float32) for x in rows]
    accumulate(rows[:1])
    assert_nothing_is_traced(accumulate, rows)
