import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft

N, K, D = 5, 2, 3
ACTS, GRADS, ONES = jnp.ones((N, D)), jnp.ones((N, K, D)), jnp.ones(N)
RNG = np.random.default_rng(5)


# values of taps


@pytest.mark.parametrize(
    "taps",
    [
        ft.Taps(ACTS, GRADS, ONES),
        ft.Taps(ACTS, None, ONES),
        {"a": ft.Taps(ACTS, GRADS, ONES), "b": ft.Taps(ACTS, None, 0.5 * ONES)},
        ft.Taps(ACTS.astype(jnp.bfloat16), GRADS.astype(jnp.bfloat16), ONES),
        # what has no weight does not count
        ft.Taps(ACTS.at[2].set(jnp.nan), GRADS, ONES.at[2].set(0.0)),
        ft.Taps(ACTS, GRADS.at[2].set(jnp.inf), ONES.at[2].set(0.0)),
        ft.Taps(1e30 * ACTS, 1e30 * GRADS, ONES),
        ft.Taps(1e30 * ACTS, 1e-30 * GRADS, 1e-30 * ONES),
    ],
)
def test_good_taps_pass(taps):
    assert ft.check_taps(taps) is None


BAD_TAPS = {
    "nan_act": (
        {"a": ft.Taps(ACTS.at[3, 1].set(jnp.nan), GRADS, ONES)},
        r"check_taps: site 'a' has 1 non-finite of 15 entries in acts.*example 3",
    ),
    "inf_acts": (
        {"a": ft.Taps(ACTS.at[1:3].set(-jnp.inf), None, ONES)},
        r"site 'a' has 6 non-finite of 15 entries in acts.*example 1",
    ),
    "nan_grad": (
        {"a": ft.Taps(ACTS, GRADS.at[4, 1, 0].set(jnp.nan), ONES)},
        r"site 'a' has 1 non-finite of 30 entries in grads.*example 4",
    ),
    "bfloat16": (
        {"a": ft.Taps(ACTS.astype(jnp.bfloat16).at[0, 0].set(jnp.inf), None, ONES)},
        r"site 'a' has 1 non-finite of 15 entries in acts",
    ),
    "second_site": (
        {
            "good": ft.Taps(ACTS, GRADS, ONES),
            "bad": ft.Taps(ACTS, GRADS.at[0].set(jnp.inf), ONES),
        },
        r"site 'bad' has 6 non-finite of 30 entries in grads",
    ),
    "weighted_only": (
        {
            "a": ft.Taps(
                ACTS.at[:2].set(jnp.nan), GRADS, ONES.at[0].set(0.0).at[4].set(0.0)
            )
        },
        r"site 'a' has 3 non-finite .*example 1",
    ),
    "negative_weight": (
        {"a": ft.Taps(ACTS, GRADS, ONES.at[1].set(-2.0))},
        r"'a' .*weights >= 0, got .*-2",
    ),
    "nan_weight": (
        {"a": ft.Taps(ACTS, GRADS, ONES.at[1].set(jnp.nan))},
        r"'a' .*finite weights .*nan",
    ),
    "no_weight": (
        {"a": ft.Taps(ACTS, GRADS, 0 * ONES)},
        r"'a' has no example of positive weight among 5",
    ),
    "without_a_name": (
        ft.Taps(ACTS.at[3, 1].set(jnp.nan), GRADS, ONES),
        r"check_taps: .* 1 non-finite of 15 entries in acts",
    ),
}


@pytest.mark.parametrize("name", BAD_TAPS)
def test_bad_taps_say_which_site_and_how_many(name):
    taps, match = BAD_TAPS[name]
    with pytest.raises(ValueError, match=match):
        ft.check_taps(taps)


def test_taps_of_an_overflowing_model_are_caught():
    probed = ft.from_split(lambda p, x: x, lambda p, a: jnp.log(a))
    taps = ft.tap(
        probed,
        None,
        jnp.array([[1.0, 2.0], [0.0, 1.0]]),
        sites="acts",
        readout=ft.readouts.jacobian(),
    )
    with pytest.raises(ValueError, match=r"site 'acts' has \d non-finite .*grads"):
        ft.check_taps(taps)


# gradients that hold nothing


LOST = {
    "nothing_reads_it": (lambda a: 0 * a, "float32"),
    "stop_gradient": (jax.lax.stop_gradient, "float32"),
    "all_underflowed": (lambda a: a * 1e-9, "float16"),
    "many_underflowed": (lambda a: a**2 * 1e-7, "float16"),
    "many_underflowed_bfloat16": (lambda a: a * 1e-38, "bfloat16"),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", LOST)
def test_lost_gradients_are_told(name):
    fn, dtype = LOST[name]

    def suffix(p, acts):  # the factors are small in float32 only
        return fn(acts.astype(jnp.float32)).sum(-1)

    x = jnp.asarray(RNG.standard_normal((50, 4)), dtype)
    probed = ft.from_split(lambda p, x: x, suffix)
    taps = ft.tap(
        probed, None, x, sites="acts", readout=ft.readouts.scalar(lambda y: y)
    )
    underflowed = dtype != "float32"
    match = r"^check_taps: site 'acts' wants .*got .*" + (
        r"underflowed.*scale the readout up" if underflowed else r"all 0.*take another"
    )
    with pytest.warns(UserWarning, match=match):
        ft.check_taps(taps)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_sparse_gradients_of_ordinary_size_are_not_lost(dtype, scale):
    grads = scale * RNG.standard_normal((50, 2, 3)) * (RNG.random((50, 2, 3)) < 0.1)
    acts, weights = jnp.ones((50, 3)), jnp.ones(50)
    ft.check_taps(ft.Taps(acts, jnp.asarray(grads, dtype), weights))


def test_only_examples_that_count_have_gradients():
    grads = jnp.zeros((N, K, D)).at[2].set(1.0)
    with pytest.warns(UserWarning, match="all 0"):
        ft.check_taps(ft.Taps(ACTS, grads, ONES.at[2].set(0.0)))


@pytest.mark.parametrize(
    "taps",
    [
        None,
        {},
        3,
        {"a": None},
        {"a": ACTS},
        ft.Taps(ACTS, None, jnp.ones(3)),
        ft.Taps(ACTS, GRADS[:, 0], ONES),
        ft.Taps(ACTS, GRADS[:, :, :1], ONES),
        ft.Taps(ACTS[0], None, ONES),
        ft.Taps(ACTS, None, ONES, jnp.full((N, 2), jnp.nan)),
    ],
    ids=range(10),
)
def test_what_are_no_taps_is_named(taps):
    with pytest.raises((TypeError, ValueError), match=r"^check_taps: .*; "):
        ft.check_taps(taps)


def test_check_of_taps_refuses_to_run_inside_jit():
    with pytest.raises(TypeError, match=r"check_taps: .*outside of jit"):
        jax.jit(lambda a: ft.check_taps(ft.Taps(a, None, a[:, 0])))(ACTS)
