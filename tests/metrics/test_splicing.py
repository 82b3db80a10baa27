import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft


def dictionary(kind):
    made = {
        "standard": lambda: ft.dictionaries.standard(4, 12),
        "topk": lambda: ft.dictionaries.topk(4, 12, 3),
        "signed": lambda: ft.dictionaries.topk(4, 12, 3, signed=True),
        "batch_topk": lambda: ft.dictionaries.batch_topk(4, 12, 3),
        "jump_relu": lambda: ft.dictionaries.jump_relu(4, 12),
        "gated": lambda: ft.dictionaries.gated(4, 12),
        "gradient_topk": lambda: ft.dictionaries.gradient_topk(4, 12, 3),
        "paired": lambda: ft.dictionaries.paired(4, 12, 3),
    }[kind]()
    params = dict(made.init(jax.random.key(0)))
    params["b_dec"] = jnp.array([0.3, -0.2, 0.1, 0.5])
    params["W_dec"] = params["W_dec"] * jnp.linspace(1, 20, 12)[:, None]
    return made, params


KINDS = (
    "standard",
    "topk",
    "signed",
    "batch_topk",
    "jump_relu",
    "gated",
    "gradient_topk",
    "paired",
)


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", KINDS)
def test_splice_is_decode_of_encode_at_every_position(key, kind):
    sae, params = dictionary(kind)
    acts = jax.random.normal(key, (2, 3, 5, 4))
    rows = [
        sae.decode(params, sae.encode(params, a[None])) for a in acts.reshape(-1, 4)
    ]
    wanted = np.concatenate(rows).reshape(acts.shape)
    assert np.any(wanted != wanted[0, 0, 0])
    np.testing.assert_allclose(ft.metrics.splice(sae, params)(acts), wanted, atol=1e-6)


@pytest.mark.slow_cases
@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (2, 1, 3, 4)])
def test_splice_keeps_leading_axes(key, shape):
    sae, params = dictionary("topk")
    assert ft.metrics.splice(sae, params)(jax.random.normal(key, shape)).shape == shape


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_splice_keeps_the_dtype_and_computes_in_that_of_the_parameters(key, dtype):
    sae, params = dictionary("topk")
    acts = jax.random.normal(key, (5, 4)).astype(dtype)
    found = ft.metrics.splice(sae, params)(acts)
    exact = sae.decode(params, sae.encode(params, acts.astype(jnp.float32)))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, exact.astype(dtype))


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["gradient_topk", "paired"])
def test_splice_chooses_by_gradients_where_they_are_given(key, kind):
    sae, params = dictionary(kind)
    acts = jax.random.normal(key, (2, 3, 4))
    grads = 9 * jax.random.normal(jax.random.key(1), (6, 2, 4))
    codes = sae.encode(params, acts.reshape(6, 4), grads=grads)
    wanted = sae.decode(params, codes).reshape(acts.shape)
    found = ft.metrics.splice(sae, params, grads=grads)(acts)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(found - ft.metrics.splice(sae, params)(acts)).max() > 1e-3


def test_splice_is_a_probe_of_a_model_and_can_be_jitted(key):
    probed = ft.from_split(lambda p, x: x @ p, lambda p, a: jnp.tanh(a).sum(-1))
    sae, params = dictionary("topk")
    weights, x = jax.random.normal(key, (6, 4)), jnp.ones((2, 3, 6))

    @jax.jit
    def spliced(params, x):
        return probed(weights, x, {"acts": ft.metrics.splice(sae, params)})[0]

    flat = (x @ weights).reshape(-1, 4)
    wanted = np.tanh(sae.decode(params, sae.encode(params, flat))).sum(-1)
    np.testing.assert_allclose(spliced(params, x), wanted.reshape(2, 3), atol=1e-5)


def test_splice_of_another_width_is_refused(key):
    sae, params = dictionary("topk")
    with pytest.raises(ValueError, match=r"encode: wanted acts \[N, 4\]"):
        ft.metrics.splice(sae, params)(jnp.ones((2, 3)))


def test_ce_recovered_is_the_share_of_the_cost():
    found = ft.metrics.ce_recovered([3.0, 3.0, 3.0, 3.0], [3.0, 8.0, 5.0, 9.0], 8.0)
    np.testing.assert_allclose(found, [1, 0, 0.6, -0.2], rtol=1e-15)
    assert float(
        ft.metrics.ce_recovered(jnp.float32(2), jnp.float32(1.5), np.float64(4))
    ) == (1.25)


@pytest.mark.parametrize("ablated", [3.0, 2.0, -np.inf, np.nan])
def test_ce_recovered_is_nan_where_the_ablation_costs_nothing(ablated):
    assert np.isnan(ft.metrics.ce_recovered(3.0, 3.1, ablated))
    assert np.isnan(
        ft.metrics.ce_recovered([3.0, 1.0], 2.0, [ablated, 3.0])
    ).tolist() == [
        True,
        False,
    ]


SCALES = [1e-300, 1e-30, 1.0, 1e30, 1e300]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("predicted", "true", "correlation", "slope", "error"),
    [
        ([1, -2, 0.5], [1, -2, 0.5], 1, 1, 0),
        ([1, -2, 0.5], [2, -4, 1], 1, 2, 0.25),
        ([1, -2, 0.5], [-1, 2, -0.5], -1, -1, 4),
        ([1, -1, 0, 0], [0, 0, 1, -1], 0, 0, 2),
        ([0, 0, 0], [1, 2, -3], np.nan, np.nan, 1),
        ([1, 2, -3], [0, 0, 0], np.nan, 0, np.nan),
        ([0, 0], [0, 0], np.nan, np.nan, np.nan),
        ([2], [3], np.nan, 1.5, 1 / 9),
        ([1, 2, 3], [2, 4, 5], 3 / np.sqrt(28 / 3), 25 / 14, 9 / 45),
    ],
)
def test_faithfulness_has_its_closed_form(
    predicted, true, correlation, slope, error, scale
):
    found = ft.metrics.attribution_faithfulness(
        scale * np.asarray(predicted, float), scale * np.asarray(true, float)
    )
    wanted = correlation, slope, error, len(true)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("big", "small"), [(1e30, 1.0), (1.0, 1e-30), (1e30, 1e-30)])
def test_faithfulness_of_effects_of_unlike_sizes(big, small):
    p, t = np.array([1.0, 2, 3]), np.array([2.0, 4, 5])
    found = ft.metrics.attribution_faithfulness(small * p, big * t)
    wanted = 3 / np.sqrt(28 / 3), 25 / 14 * (big / small), 1.0, 3
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    found = ft.metrics.attribution_faithfulness(big * p, small * t)
    error = 14 / 45 * (big / small) ** 2
    np.testing.assert_allclose(found.error, error, rtol=1 if big / small < 10 else 1e-9)
    np.testing.assert_allclose(found.slope, 25 / 14 * (small / big), rtol=1e-9)


@pytest.mark.parametrize("constant", [0.1, 1 / 3, -0.7, 1e-30])
def test_a_constant_side_has_no_correlation(constant):
    for num in (3, 7, 10):
        other = np.random.default_rng(num).normal(size=num)
        same = np.full(num, constant)
        assert np.isnan(ft.metrics.attribution_faithfulness(same, other).correlation)
        assert np.isnan(ft.metrics.attribution_faithfulness(other, same).correlation)


def test_faithfulness_against_numpy():
    rng = np.random.default_rng(0)
    p = rng.normal(size=50).astype(np.float32)
    t = (0.7 * p + 0.3 * rng.normal(size=50)).astype(np.float32)
    found = ft.metrics.attribution_faithfulness(jnp.asarray(p), jnp.asarray(t))
    p, t = p.astype(np.float64), t.astype(np.float64)
    slope = np.linalg.lstsq(p[:, None], t, rcond=None)[0][0]
    wanted = np.corrcoef(p, t)[0, 1], slope, ((t - p) ** 2).sum() / (t**2).sum(), 50
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert [type(x) for x in found] == [float, float, float, int]


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        ([], [], r"P >= 1, got shapes \(0,\) and \(0,\)"),
        ([1.0], [1.0, 2.0], r"got shapes \(1,\) and \(2,\)"),
        ([[1.0]], [[1.0]], r"got shapes \(1, 1\) and \(1, 1\)"),
        (1.0, 1.0, r"got shapes \(\) and \(\)"),
        ([np.nan, 1], [1, 2], "must be finite"),
        ([1, 2], [np.inf, 2], "must be finite"),
    ],
)
def test_faithfulness_refuses(predicted, true, message):
    with pytest.raises(ValueError, match=f"attribution_faithfulness: .*{message}"):
        ft.metrics.attribution_faithfulness(predicted, true)
