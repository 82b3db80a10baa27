import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat import readouts

RNG = np.random.default_rng(2)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


X = normal(3, 4)
PARAMS = {"in": normal(4, 5), "mid": normal(5, 6), "out": normal(6, 2)}


def mlp(params, x, tap):
    low = tap("low", jnp.tanh(x @ params["in"]))
    high = tap("high", jnp.tanh(low @ params["mid"]))
    return high @ params["out"]


PROBED = ft.from_function(mlp)


def by_hand(x=X, low_probe=None, high_probe=None):
    """Outputs and both activations in float64, with functions as probes."""
    p = {name: np.asarray(w, np.float64) for name, w in PARAMS.items()}
    low = np.tanh(np.asarray(x, np.float64) @ p["in"])
    low = low if low_probe is None else low_probe(low)
    high = np.tanh(low @ p["mid"])
    high = high if high_probe is None else high_probe(high)
    return high @ p["out"], low, high


def assert_close(got, want, tol=1e-5):
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=tol, atol=tol * np.abs(want).max()
    )


DELTA, ROW = normal(3, 5), normal(5)

# probes, and what they do in float64
PROBES = {
    "none": ({}, {}),
    "array": ({"low": DELTA}, {"low_probe": lambda a: a + np.float64(DELTA)}),
    "width": ({"low": ROW}, {"low_probe": lambda a: a + np.float64(ROW)}),
    "one_row": ({"low": ROW[None]}, {"low_probe": lambda a: a + np.float64(ROW)}),
    "numpy": (
        {"low": np.asarray(DELTA)},
        {"low_probe": lambda a: a + np.float64(DELTA)},
    ),
    "function": ({"low": lambda a: 0.5 * a**2}, {"low_probe": lambda a: 0.5 * a**2}),
    "two_functions": (
        {"low": lambda a: a.at[:, 0].set(0.0), "high": lambda a: -a},
        {"low_probe": lambda a: a * [0, 1, 1, 1, 1], "high_probe": lambda a: -a},
    ),
    "array_and_function": (
        {"low": ROW, "high": jnp.flip},
        {"low_probe": lambda a: a + np.float64(ROW), "high_probe": np.flip},
    ),
    "ignored_none": ({"low": None}, {}),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("jitted", [False, True])
def test_probe_changes_its_site_and_all_that_follows(name, jitted):
    probes, hand = PROBES[name]
    run = lambda x: PROBED(PARAMS, x, probes)  # noqa: E731
    outputs, acts = (jax.jit(run) if jitted else run)(X)
    want, low, high = by_hand(**hand)
    assert_close(outputs, want)
    assert_close(acts["low"], low)
    assert_close(acts["high"], high)


@pytest.mark.slow
def test_later_activation_is_differentiable_in_an_earlier_probe():
    got = jax.jacrev(lambda d: PROBED(PARAMS, X, {"low": d})[1]["high"])(DELTA)
    for i in range(3):
        for j in range(3):
            want = np.zeros((6, 5))
            if i == j:
                _, _, high = by_hand(low_probe=lambda a: a + np.float64(DELTA))
                want = (1 - high[i] ** 2)[:, None] * np.float64(PARAMS["mid"]).T
            np.testing.assert_allclose(got[i, :, j], want, rtol=1e-5, atol=1e-6)
    forward = jax.jacfwd(lambda d: PROBED(PARAMS, X, {"low": d})[1]["high"])(DELTA)
    assert_close(forward, got)


def test_a_probe_function_is_differentiable_in_what_it_closes_over():
    def effect(scale):
        return PROBED(PARAMS, X, {"low": lambda a: scale * a})[0].sum()

    step = 1e-5
    up, down = (
        by_hand(low_probe=lambda a, s=s: s * a)[0].sum()
        for s in (0.7 + step, 0.7 - step)
    )
    assert jax.grad(effect)(0.7) == pytest.approx((up - down) / (2 * step), rel=1e-4)


def test_name_used_twice_gives_two_sites_with_gradients_of_their_own():
    square = normal(4, 4) * 0.5

    def twice(w, x, tap):
        for _ in range(2):
            x = jnp.tanh(tap("step", x @ w))
        return x

    taps = ft.tap(
        ft.from_function(twice),
        square,
        X,
        sites=["step", "step#1"],
        readout=readouts.jacobian(),
    )
    w, x = np.float64(square), np.float64(X)
    first = x @ w
    second = np.tanh(first) @ w
    slope = lambda a: 1 - np.tanh(a) ** 2  # noqa: E731
    last = slope(second)[:, None, :] * np.eye(4)[None]
    assert_close(taps["step#1"].acts, second)
    assert_close(taps["step#1"].grads, last)
    assert_close(taps["step"].acts, first)
    assert_close(taps["step"].grads, (last @ w.T) * slope(first)[:, None, :])


def test_probed_sites_of_one_name_are_probed_alone():
    def twice(w, x, tap):
        return tap("step", tap("step", x) * 2.0)

    probed = ft.from_function(twice)
    zero = jnp.zeros((2, 3))
    assert probed(None, zero, {"step": jnp.ones(3)})[0].tolist() == [[2.0] * 3] * 2
    assert probed(None, zero, {"step#1": jnp.ones(3)})[0].tolist() == [[1.0] * 3] * 2


def test_tree_values_become_one_site_per_leaf():
    def model(params, x, tap):
        pair = tap("pair", (x, {"wide": 2.0 * x, "count": jnp.arange(3)}))
        return pair[0] + pair[1]["wide"]

    probed = ft.from_function(model)
    outputs, acts = probed(None, X, {"pair[1][wide]": jnp.ones(4)})
    assert sorted(acts) == ["pair[0]", "pair[1][wide]"]
    assert_close(outputs, 3 * np.float64(X) + 1)


def test_tapped_tree_keeps_its_structure():
    def model(params, x, tap):
        value = tap("v", {"a": x, "n": 3, "none": None, "key": jax.random.key(0)})
        assert value["n"] == 3
        assert value["none"] is None
        return value["a"]

    assert_close(ft.from_function(model)(None, X, {})[0], X)


def test_calls_do_not_leak_into_each_other():
    with pytest.raises(ValueError, match="no site"):
        PROBED(PARAMS, X, {"nowhere": ROW})
    plain = PROBED(PARAMS, X, {})[0]
    assert_close(plain, by_hand()[0])
    nested = ft.from_function(
        lambda p, x, tap: tap("outer", PROBED(p, x, {"low": ROW})[0])
    )
    outputs, acts = nested(PARAMS, X, {})
    assert list(acts) == ["outer"]
    assert_close(outputs, by_hand(low_probe=lambda a: a + np.float64(ROW))[0])


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.vmap, jax.checkpoint, "scan", "grad", "cond"]
)
def test_tap_inside_a_transformation_of_the_model_is_refused(transform):
    def model(params, x, tap):
        inner = lambda v: tap("inside", v * 2.0)  # noqa: E731
        if transform == "scan":
            return jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=2)[0]
        if transform == "grad":
            return jax.grad(lambda v: inner(v).sum())(x)
        if transform == "cond":
            return jax.lax.cond(x.sum() > 0, inner, lambda v: v, x)
        return transform(inner)(x)

    match = r"from_function: tap\('inside', \.\.\.\) was called inside a .*outside"
    with pytest.raises(ValueError, match=match):
        ft.from_function(model)(None, X, {})


@pytest.mark.slow_cases
@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_the_whole_probed_model_may_be_transformed(transform):
    outputs, acts = transform(lambda x: PROBED(PARAMS, x, {}))(X)
    want, _, high = by_hand()
    assert_close(outputs, want)
    assert_close(acts["high"], high)


def test_probed_model_under_vmap_over_probes():
    shifts = normal(4, 5)
    outputs = jax.vmap(lambda d: PROBED(PARAMS, X, {"low": d})[0])(shifts)
    for shift, got in zip(shifts, outputs, strict=True):
        want = by_hand(low_probe=lambda a, s=shift: a + np.float64(s))[0]
        assert_close(got, want)


@pytest.mark.parametrize(
    ("probe", "match"),
    [
        (jnp.ones(4), r"probe at site 'low': .*\(3, 5\), got shape \(4,\)"),
        (jnp.ones((2, 5)), r"probe at site 'low': .*\(3, 5\), got shape \(2, 5\)"),
        (jnp.ones((1, 3, 5)), r"\(3, 5\), got shape \(1, 3, 5\)"),
        (lambda a: a[:, :2], r"must keep the shape \(3, 5\), it returned \(3, 2\)"),
        (lambda a: a[0], r"must keep the shape \(3, 5\), it returned \(5,\)"),
    ],
)
def test_probe_of_wrong_shape_is_refused(probe, match):
    with pytest.raises(ValueError, match=match):
        PROBED(PARAMS, X, {"low": probe})


def test_unknown_site_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no site 'lo'; the sites are 'low', 'high'"):
        PROBED(PARAMS, X, {"lo": ROW})


def test_model_without_sites_says_so():
    with pytest.raises(ValueError, match="no site"):
        ft.from_function(lambda p, x, tap: x)(None, X, {"a": ROW})


def test_site_shapes_do_not_run_the_model():
    shapes = ft.site_shapes(PROBED, PARAMS, jax.ShapeDtypeStruct((7, 4), jnp.float32))
    assert {name: s.shape for name, s in shapes.items()} == {
        "low": (7, 5),
        "high": (7, 6),
    }
    assert {s.dtype for s in shapes.values()} == {jnp.dtype(jnp.float32)}


# splits


SPLIT = ft.from_split(
    lambda p, x: jnp.tanh(x @ p["in"]),
    lambda p, a: jnp.tanh(a @ p["mid"]) @ p["out"],
    site="low",
)


@pytest.mark.parametrize("name", ["none", "array", "width", "function"])
def test_split_is_probed_like_a_function(name):
    probes, hand = PROBES[name]
    outputs, acts = SPLIT(PARAMS, X, probes)
    want, low, _ = by_hand(**hand)
    assert list(acts) == ["low"]
    assert_close(outputs, want)
    assert_close(acts["low"], low)


def test_split_site_is_called_acts_by_default():
    probed = ft.from_split(lambda p, x: x, lambda p, a: a)
    assert list(probed(None, X, {})[1]) == ["acts"]


def test_split_of_a_tree_has_one_site_per_leaf():
    probed = ft.from_split(lambda p, x: (x, 2 * x), lambda p, a: a[0] * a[1])
    outputs, acts = probed(None, X, {"acts[1]": jnp.ones(4)})
    assert sorted(acts) == ["acts[0]", "acts[1]"]
    assert_close(outputs, np.float64(X) * (2 * np.float64(X) + 1))


def test_split_may_transform_its_halves():
    probed = ft.from_split(
        jax.jit(lambda p, x: jnp.tanh(x @ p["in"])), jax.jit(lambda p, a: a)
    )
    assert_close(probed(PARAMS, X, {})[0], by_hand()[1])


def test_split_lists_its_site():
    with pytest.raises(ValueError, match=r"no site 'high'; the sites are 'low'"):
        SPLIT(PARAMS, X, {"high": ROW})
    with pytest.raises(ValueError, match=r"probe at site 'low': .*got shape \(4,\)"):
        SPLIT(PARAMS, X, {"low": jnp.ones(4)})


def test_two_values_with_one_name_are_refused():
    def twice(params, x, tap):
        hidden = tap("h", tap("h", x) @ params["in"])
        return tap("h#1", jnp.tanh(hidden))

    with pytest.raises(ValueError, match=r"from_function: .*two values named 'h#1'"):
        ft.from_function(twice)(PARAMS, X, {})

    # the names of a pytree's leaves may meet as well
    def meeting(params, x, tap):
        del params
        return tap("h[a]", tap("h", {"a": x})["a"])

    with pytest.raises(ValueError, match=r"two values named 'h\[a\]'"):
        ft.tap(
            ft.from_function(meeting), {}, X, sites="h[a]", readout=readouts.jacobian()
        )
