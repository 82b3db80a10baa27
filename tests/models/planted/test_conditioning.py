"""Planted tasks in other coordinates: against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.models import planted

MAKERS = {
    "product_space": {"dim": 9, "colours": 4, "shapes": 3},
    "modular_addition": {"modulus": 11, "frequencies": 2, "dim": 15},
    "superposition": {"features": 5, "probability": 0.3, "steps": 20, "batch": 8},
}


def make(name):
    return getattr(planted, name)(jax.random.key(0), **MAKERS[name])


def taps_of(task, inputs):
    return ft.tap(
        task.probed,
        task.params,
        inputs,
        sites=task.site,
        readout=ft.readouts.half_squared_norm(),
    )[task.site]


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_taps_of_the_transformed_task_are_the_transformed_taps(name):
    with jax.enable_x64(True):
        task = make(name)
        other = planted.recondition(jax.random.key(1), task)
        inputs = task.sample(jax.random.key(2), 12)
        before, after = taps_of(task, inputs), taps_of(other, inputs)
        matrix = np.asarray(other.params["map"])
        assert matrix.dtype == np.float64
        assert np.linalg.cond(matrix) == pytest.approx(100, rel=1e-9)
        back = np.linalg.inv(matrix)
        acts = np.asarray(before.acts) @ matrix
        np.testing.assert_allclose(after.acts, acts, rtol=1e-9, atol=1e-12)
        grads = np.asarray(before.grads) @ back.T
        np.testing.assert_allclose(after.grads, grads, rtol=1e-9, atol=1e-11)
        readers = np.asarray(task.truth.readers) @ back.T
        np.testing.assert_allclose(other.truth.readers, readers, rtol=1e-9, atol=1e-11)
        writers = np.asarray(task.truth.writers) @ matrix
        np.testing.assert_allclose(other.truth.writers, writers, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["product_space", "superposition"])
def test_outputs_features_and_inputs_stay_as_they_are(name):
    task = make(name)
    other = planted.recondition(jax.random.key(1), task)
    inputs = task.sample(jax.random.key(2), 12)
    for a, b in zip(
        jax.tree.leaves(inputs),
        jax.tree.leaves(other.sample(jax.random.key(2), 12)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    outputs = [x.probed(x.params, inputs, {})[0] for x in (task, other)]
    np.testing.assert_array_equal(*outputs)
    np.testing.assert_array_equal(
        *(x.features(x.params, inputs) for x in (task, other))
    )
    assert other.truth.group is task.truth.group
    assert other.name == f"{task.name}, condition 100"


def test_ignored_rows_are_orthonormal_and_hold_what_moved():
    with jax.enable_x64(True):
        task = make("modular_addition")
        other = planted.recondition(jax.random.key(1), task)
        rows = np.asarray(other.ignored)
        np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-10)
        moved = np.asarray(task.ignored) @ np.asarray(other.params["map"])
        np.testing.assert_allclose(moved @ rows.T @ rows, moved, atol=1e-9)
        # No reader leaned into them, and none does now.
        np.testing.assert_allclose(
            np.asarray(other.truth.readers) @ rows.T, 0, atol=1e-9
        )


def test_probes_are_in_the_new_coordinates():
    with jax.enable_x64(True):
        task = make("product_space")
        other = planted.recondition(jax.random.key(1), task)
        inputs = task.sample(jax.random.key(2), 6)
        matrix = np.asarray(other.params["map"])
        step = jnp.linspace(-1.0, 1.0, 9)
        after, acts = other.probed(other.params, inputs, {"acts": step})
        back = jnp.asarray(np.asarray(step) @ np.linalg.inv(matrix))
        wanted, moved = task.probed(task.params, inputs, {"acts": back})
        np.testing.assert_allclose(after, wanted, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(acts["acts"], np.asarray(moved["acts"]) @ matrix)
        # A function that replaces the activation sees the new coordinates, too.
        after, acts = other.probed(other.params, inputs, {"acts": lambda a: 0 * a})
        np.testing.assert_allclose(acts["acts"], 0, atol=1e-10)


def test_every_key_has_its_matrix_and_jit_agrees():
    task = make("product_space")

    def matrix(key):
        return planted.recondition(key, task, condition=7.0).params["map"]

    first, other = matrix(jax.random.key(1)), matrix(jax.random.key(2))
    assert np.abs(first - other).max() > 0.1
    np.testing.assert_allclose(jax.jit(matrix)(jax.random.key(1)), first, atol=1e-5)
    sizes = np.linalg.svd(np.asarray(first, np.float64), compute_uv=False)
    np.testing.assert_allclose(sizes, np.geomspace(7**0.5, 7**-0.5, 9), rtol=1e-5)


@pytest.mark.parametrize("condition", [0.5, np.nan, 1e6])
def test_conditions_are_checked(condition):
    task = make("product_space")
    with pytest.raises(ValueError, match=r"^recondition: wanted a condition in 1 \.\."):
        planted.recondition(jax.random.key(1), task, condition=condition)
    bare = task._replace(truth=task.truth._replace(readers=None, writers=None))
    with pytest.raises(ValueError, match=r"^recondition: wanted a truth with"):
        planted.recondition(jax.random.key(1), bare)
