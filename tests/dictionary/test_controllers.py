import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat import controllers

FAST = {"integral": 0.05, "memory": 5.0}


def single(x):
    return jnp.asarray(x, jnp.float32)


def steer(control, plant, target, steps=1500, start=0.0):
    """The loop of controller and plant, whose answer lags behind."""

    def step(carry, _):
        state, now = carry
        state, factor, saturated = control.update(state, jnp.exp(now), target)
        now = now + 0.1 * (jnp.log(plant(factor)) - now)
        return (state, now), (jnp.exp(now), factor, saturated)

    carry = control.init(), single(start)
    _, told = jax.jit(lambda c: jax.lax.scan(step, c, None, steps))(carry)
    return told


@pytest.mark.parametrize("power", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("name", ["target_l0", "target_attribution_l0"])
def test_a_count_is_steered_to_its_target(name, power):
    control = getattr(controllers, name)(8.0, **FAST)
    plant = lambda c: 40 * c**-power  # noqa: E731
    counts, factor, saturated = steer(control, plant, single(8.0), start=3.7)
    np.testing.assert_allclose(counts[-100:], 8.0, rtol=0.02)
    np.testing.assert_allclose(factor[-1], 5 ** (1 / power), rtol=0.1)
    assert not np.any(saturated)


def test_a_budget_is_used_up():
    control = controllers.target_fvu(0.1, **FAST)
    plant = lambda c: 0.02 * c**0.8  # noqa: E731
    errors, factor, saturated = steer(control, plant, single(0.1), start=-3.0)
    np.testing.assert_allclose(errors[-100:], 0.1, rtol=0.02)
    assert factor[-1] > 1
    assert not np.any(saturated)


def test_an_error_of_any_name_is_used_up():
    """The penalty falls while the error is over its target, and rises after."""
    control = controllers.target_error(1e-3, measures="mse", term="penalty", **FAST)
    plant = lambda c: 5e-3 * c**0.8  # noqa: E731
    errors, factor, saturated = steer(control, plant, single(1e-3), start=-1.0)
    assert factor[0] < control.start == 0.01  # the error is over its target
    np.testing.assert_allclose(errors[-100:], 1e-3, rtol=0.02)
    np.testing.assert_allclose(factor[-1], 0.2 ** (1 / 0.8), rtol=0.1)
    assert not np.any(saturated)
    assert (control.term, control.measures) == ("penalty", "mse")


@pytest.mark.parametrize("floor", [20.0, 1e-9])
def test_a_target_that_is_out_of_reach_is_told(floor):
    """The count is never below, or always 0."""
    control = controllers.target_l0(8.0, limit=100.0, **FAST)
    plant = lambda c: floor + 0 * c  # noqa: E731
    _, factor, saturated = steer(control, plant, single(8.0), start=np.log(floor))
    assert not saturated[0]
    assert saturated[-1]
    np.testing.assert_allclose(factor[-1], 100.0 if floor > 8 else 0.01, rtol=1e-5)


def test_from_the_limit_it_comes_back():
    control = controllers.target_l0(8.0, limit=100.0, **FAST)
    state = control.init()._replace(log_factor=single(np.log(100.0)))
    for _ in range(60):
        state, factor, saturated = control.update(state, single(1.0), single(8.0))
    assert not saturated
    assert factor < 50


def test_a_count_that_moves_at_its_own_speed_is_not_overrun():
    """A threshold goes up or down by so much a step, however large the factor."""
    control = controllers.target_l0(4.0)

    def step(carry, _):
        state, count = carry
        state, factor, _ = control.update(state, jnp.exp(count), single(4.0))
        rest = jnp.log(factor) + 0.5 * (count - np.log(4.0))  # 0 where it stays
        count = count - 0.002 * jnp.tanh(rest)
        return (state, count), (jnp.exp(count), factor)

    start = control.init(), single(np.log(200.0))
    _, told = jax.jit(lambda c: jax.lax.scan(step, c, None, 5000))(start)
    counts, factor = told
    assert factor.max() < 20
    assert counts.min() > 3.2
    np.testing.assert_allclose(counts[-250:], 4.0, rtol=0.05)


def test_one_step_is_its_formula():
    gains = {"integral": 0.2, "proportional": 0.5, "memory": 4.0}
    control = controllers.target_l0(8.0, **gains)
    state, whole, smooth, seen = control.init(), 0.0, 0.0, 0.0
    before = np.log(32.0 / 8.0)  # it starts without a jump
    for measured in (32.0, 3.0, 8.0):
        state, factor, _ = control.update(state, single(measured), single(8.0))
        smooth = 0.75 * smooth + 0.25 * np.log(measured)
        seen = 0.75 * seen + 0.25
        error = smooth / seen - np.log(8.0)
        whole += 0.2 * np.tanh(error) + 0.5 * (error - before)
        before = error
        np.testing.assert_allclose(factor, np.exp(whole), rtol=1e-5)


def test_nothing_at_all_is_too_few_and_finite():
    control = controllers.target_l0(8.0)
    state, factor, _ = control.update(control.init(), single(0.0), single(8.0))
    assert 0.98 < factor < 1
    assert all(np.isfinite(x) for x in state)


def test_many_at_once_are_each_of_them():
    control = controllers.target_l0(8.0, proportional=0.1)
    measured, targets = single([3.0, 8.0, 60.0, 0.0]), single([8.0, 2.0, 8.0, 1.0])
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (4,)), control.init())
    state = state._replace(log_factor=single([0.0, 1.0, -1.0, 9.3]))
    together = jax.vmap(control.update)(state, measured, targets)
    for i in range(4):
        one = jax.tree.map(lambda x, i=i: x[i], state)
        alone = control.update(one, measured[i], targets[i])
        same = lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-6)  # noqa: E731
        jax.tree.map(same, together, alone)


@pytest.mark.parametrize("start", [0.05, 1.0, 20.0])
def test_the_first_factor_is_the_start(start):
    control = controllers.target_l0(8.0, start=start)
    same = control.update(control.init(), single(8.0), single(8.0))[1]
    np.testing.assert_allclose([same, control.start], start, rtol=1e-6)


def test_a_trainer_begins_with_the_start():
    sae = ft.dictionaries.standard(4, 8)
    control = controllers.target_l0(2.0, start=0.25)
    run = ft.trainer(sae, ft.losses.default(sae), controller=control)
    assert float(run.init(jax.random.key(0)).running["factor"]) == 0.25


def test_errors():
    with pytest.raises(ValueError, match=r"start must be within the limit, 0\.1 to 10"):
        controllers.target_l0(8.0, start=0.01, limit=10.0)
    with pytest.raises(ValueError, match="start must be within the limit"):
        controllers.target_l0(8.0, start=0.0)
    with pytest.raises(TypeError, match="measures must be the name of a metric"):
        controllers.target_error(1.0, measures=3, term="penalty")
    for name in ("l0", "attribution_l0", "penalty"):
        with pytest.raises(ValueError, match="must be an error, which a penalty raise"):
            controllers.target_error(1.0, measures=name, term="penalty")
    with pytest.raises(
        ValueError, match="target must be a finite number above 0, got -1"
    ):
        controllers.target_l0(-1.0)
    with pytest.raises(
        ValueError, match="target must be a finite number above 0, got 0"
    ):
        controllers.target_fvu(0.0)
    with pytest.raises(ValueError, match=r"unknown gains \['speed'\]; known are .*'m"):
        controllers.target_attribution_l0(3.0, speed=1.0)


@pytest.mark.parametrize(
    "gain",
    [{"memory": 0.5}, {"limit": 0.5}, {"integral": -1.0}, {"proportional": np.nan}],
)
def test_gains_that_steer_nowhere_are_refused(gain):
    with pytest.raises(ValueError, match=f"controller: {next(iter(gain))} must be"):
        controllers.target_l0(4.0, **gain)
