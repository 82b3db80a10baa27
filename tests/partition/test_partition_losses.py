"""Squashings, importance functions and losses against their definitions in NumPy."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from toyfeat.partition import (
    decompose_weights,
    importance,
    losses,
    lower_leaky,
    reconstructions,
    upper_leaky,
)
from toyfeat.partition.sources import (
    LossInputs,
    draw_routes,
    draw_sources,
    kl_divergence,
    mean_squared_error,
    reconstruction_error,
)

# x, incoming gradient, gradient of the lower squashing, slope of the upper one.
TABLE = [
    (-0.5, -2.0, -0.02, 0.0),  # a gradient that would raise the importance leaks
    (-0.5, 2.0, 0.0, 0.0),
    (0.0, -2.0, -0.02, None),  # 0 belongs to the leak
    (0.0, 2.0, 0.0, None),
    (0.5, -2.0, -2.0, 1.0),
    (0.5, 2.0, 2.0, 1.0),
    (1.0, 2.0, 2.0, None),
    (1.5, -2.0, 0.0, 0.01),
    (1.5, 2.0, 0.0, 0.01),
]


def test_squashings_follow_the_table():
    x, grad, lower, slope = (np.array(column) for column in zip(*TABLE, strict=True))
    x = x.astype(np.float32)
    values, pull = jax.vjp(lower_leaky, jnp.asarray(x))
    assert np.array_equal(values, np.clip(x, 0, 1))
    pulled = pull(jnp.asarray(grad, jnp.float32))[0]
    np.testing.assert_allclose(pulled, lower, rtol=1e-6)
    upper = np.asarray(upper_leaky(jnp.asarray(x)))
    expected = np.where(x > 1, 1 + 0.01 * (x - 1), np.clip(x, 0, 1))
    np.testing.assert_allclose(upper, expected, rtol=1e-6)
    slopes = np.asarray(jax.vmap(jax.grad(upper_leaky))(jnp.asarray(x)))
    for got, want in zip(slopes, slope, strict=True):
        assert want is None or got == pytest.approx(want)


B, C = 4, 3
RNG = np.random.default_rng(0)
PARAMS = {
    "in": RNG.normal(size=(5, 6)).astype(np.float32),
    "out": RNG.normal(size=(6, 2)).astype(np.float32),
}
X = RNG.normal(size=(B, 5)).astype(np.float32)
WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4], np.float32)


def mlp(params, x):
    return jax.nn.relu(x @ params["in"]) @ params["out"]


@cache
def split():
    return decompose_weights(mlp, PARAMS, ["in", "out"], C, X)


@cache
def parts():
    drawn = split().init(jax.random.key(0))
    return {p: {n: np.asarray(x) for n, x in d.items()} for p, d in drawn.items()}


@cache
def inputs():
    lower = {n: RNG.random((B, C)).astype(np.float32) for n in ("in", "out")}
    return LossInputs(
        decomposition=split(),
        params=PARAMS,
        components=parts(),
        inputs=jnp.asarray(X),
        weights=jnp.asarray(WEIGHTS),
        count=jnp.asarray(8.0),
        outputs=mlp(PARAMS, X),
        lower={n: jnp.asarray(x) for n, x in lower.items()},
        upper={n: jnp.asarray(1.02 * x) for n, x in lower.items()},
        key=jax.random.key(5),
        progress=jnp.asarray(0.25),
        distance=mean_squared_error,
        sources={},
    )


def numpy_error(masks, deltas):
    """The weighted error with every site masked, in double precision."""
    hidden = np.float64(X)
    for name in ("in", "out"):
        w, v, u = (
            np.float64(a)
            for a in (PARAMS[name], parts()[name]["V"], parts()[name]["U"])
        )
        own = ((hidden @ v) * masks[name]) @ u + deltas[name][:, None] * (
            hidden @ (w - v @ u)
        )
        hidden = np.maximum(own, 0) if name == "in" else own
    target = np.maximum(np.float64(X) @ PARAMS["in"], 0) @ PARAMS["out"]
    return WEIGHTS @ ((hidden - target) ** 2).mean(1)


def masks_of(sources):
    lower = {n: np.float64(g) for n, g in inputs().lower.items()}
    masks = {n: lower[n] + (1 - lower[n]) * s[..., :-1] for n, s in sources.items()}
    return masks, {n: np.broadcast_to(s[..., -1], B) for n, s in sources.items()}


@cache
def terms():
    """Values of all terms from one program."""
    made = [
        losses.stochastic(),
        losses.layerwise(),
        losses.subset(),
        losses.pgd(steps=3, step_size=0.2),
        losses.importance(1.0, p=2.0),
        losses.importance(1.0, p=2.0, p_end=0.4, beta=0.5)._replace(name="annealed"),
        losses.frequency(1.0, p=2.0, p_end=0.4),
        losses.smooth_l0(1.0, frequency=0.5)._replace(name="smooth"),
        losses.faithfulness(),
        losses.faithfulness(relative=True)._replace(name="relative"),
    ]
    fixed = inputs()._replace(decomposition=None, distance=None)

    def values(fixed):
        full = fixed._replace(decomposition=split(), distance=mean_squared_error)
        return {term.name: term.loss(full) for term in made}

    return {n: float(x) for n, x in jax.jit(values)(fixed).items()}


def test_stochastic_and_layerwise_errors_are_those_of_the_definition():
    key = jax.random.split(inputs().key, 1)[0]
    sources = {n: np.asarray(s) for n, s in draw_sources(key, inputs().lower).items()}
    assert terms()["stochastic"] == pytest.approx(
        numpy_error(*masks_of(sources)), rel=1e-5
    )
    # One site masked, the other the target's own: masks and deltas of 1.
    key = jax.random.fold_in(inputs().key, 1)
    sources = {n: np.asarray(s) for n, s in draw_sources(key, inputs().lower).items()}
    masks, deltas = masks_of(sources)
    errors = []
    for name in ("in", "out"):
        own = {n: masks[n] if n == name else np.ones((B, C)) for n in masks}
        rest = {n: deltas[n] if n == name else np.ones(B) for n in masks}
        errors.append(numpy_error(own, rest))
    assert terms()["layerwise"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_a_subset_leaves_other_sites_to_the_target():
    source_key, route_key = jax.random.split(jax.random.fold_in(inputs().key, 2))
    sources = draw_sources(source_key, inputs().lower)
    masks, deltas = masks_of({n: np.asarray(s) for n, s in sources.items()})
    routes = {
        n: np.asarray(r) for n, r in draw_routes(route_key, B, ["in", "out"]).items()
    }
    masks = {n: np.where(routes[n][:, None], masks[n], 1) for n in masks}
    deltas = {n: np.where(routes[n], deltas[n], 1) for n in masks}
    assert terms()["subset"] == pytest.approx(numpy_error(masks, deltas), rel=1e-5)


def test_sizes_of_subsets_are_uniform():
    routes = draw_routes(jax.random.key(0), 30_000, ["a", "b", "c"])
    sizes = sum(np.asarray(route, int) for route in routes.values())
    shares = np.bincount(sizes, minlength=4) / 30_000
    # Standard error of a share: sqrt(2 / 9 / 30,000) = .003.
    np.testing.assert_allclose(shares, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.015)
    np.testing.assert_allclose(np.mean(routes["b"]), 2 / 3, atol=0.015)


def test_penalties_are_those_of_the_definition():
    upper = [np.float64(g) for g in inputs().upper.values()]
    assert terms()["importance"] == pytest.approx(
        sum(WEIGHTS @ (g**2).sum(1) for g in upper), rel=1e-5
    )
    # A quarter of the way from 2 to .4; 8 is the number of examples.
    means = np.concatenate([WEIGHTS @ g**1.6 for g in upper])
    logs = means * np.log2(1 + 8 * means)
    assert terms()["annealed"] == pytest.approx((means + 0.5 * logs).sum(), rel=1e-5)
    assert terms()["frequency"] == pytest.approx(logs.sum(), rel=1e-5)
    gamma = 1 + 0.25 * (0.01 - 1)
    f = np.concatenate([WEIGHTS @ (g**2 / (g**2 + gamma**2)) for g in upper])
    smooth = (f + 0.5 * f * np.log2(1 + 32768 * f)).sum()
    assert terms()["smooth"] == pytest.approx(smooth, rel=1e-5)


def test_errors_of_weights_are_those_of_the_definition():
    errors = {n: PARAMS[n] - parts()[n]["V"] @ parts()[n]["U"] for n in PARAMS}
    squares = {n: (np.float64(e) ** 2).sum() for n, e in errors.items()}
    assert terms()["faithfulness"] == pytest.approx(
        sum(squares.values()) / (30 + 12), rel=1e-5
    )
    shares = [squares[n] / (np.float64(PARAMS[n]) ** 2).sum() for n in PARAMS]
    assert terms()["relative"] == pytest.approx(np.mean(shares), rel=1e-5)


def test_an_adversary_is_worse_than_its_start():
    key, _ = jax.random.split(jax.random.fold_in(inputs().key, 3))
    start = draw_sources(key, inputs().lower, shared=True)
    assert {s.shape for s in start.values()} == {(1, C + 1)}
    assert terms()["pgd"] > float(reconstruction_error(inputs(), start))


def test_no_delta_leaves_remainders_out():
    sources = {n: jnp.full((1, C + 1), 0.5) for n in ("in", "out")}
    got = reconstruction_error(inputs(), sources, delta=False)
    masks, _ = masks_of({n: np.asarray(s) for n, s in sources.items()})
    none = {n: np.zeros(B) for n in masks}
    assert float(got) == pytest.approx(numpy_error(masks, none), rel=1e-5)


def test_divergence_of_logits_by_hand():
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    expected = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    got = kl_divergence(jnp.asarray(q + 3, jnp.float32), jnp.asarray(p, jnp.float32))
    np.testing.assert_allclose(got, [expected], rtol=1e-5)


def gelu(x):
    return x * ndtr(x)


def test_importance_functions_are_those_of_the_definition():
    reads = split().read(PARAMS, parts(), jnp.asarray(X))[1]
    x = {"in": np.float64(X), "out": np.maximum(np.float64(X) @ PARAMS["in"], 0)}
    for make in (importance.per_component, importance.per_site, importance.shared):
        family = make(split(), 4)
        params = family.init(jax.random.key(0))
        got = family.apply(params, reads)
        params = jax.tree.map(np.float64, params)
        if make is importance.shared:
            parts_ = [a / np.sqrt((a**2).mean(1, keepdims=True)) for a in x.values()]
            joined = gelu(np.concatenate(parts_, 1) @ params["W1"] + params["b1"])
            expected = np.split(joined @ params["W2"] + params["b2"], 2, axis=1)
            expected = dict(zip(x, expected, strict=True))
        elif make is importance.per_site:
            expected = {
                n: gelu(x[n] @ p["W1"] + p["b1"]) @ p["W2"] for n, p in params.items()
            }
        else:
            inner = {n: x[n] @ parts()[n]["V"] for n in x}
            expected = {
                n: sum(
                    gelu(inner[n] * p["W1"][j] + p["b1"][j]) * p["W2"][j]
                    for j in range(4)
                )
                for n, p in params.items()
            }
        for name in x:
            np.testing.assert_allclose(got[name], expected[name], rtol=2e-4, atol=2e-5)


def test_reconstructions_of_a_decomposition_without_remainder():
    """All parts whole and no remainder left: nothing is wrong without masks."""
    exact = {n: np.linalg.svd(PARAMS[n], full_matrices=False) for n in PARAMS}
    wide = decompose_weights(mlp, PARAMS, ["in", "out"], {"in": 5, "out": 2}, X)
    components = {n: {"V": u * s, "U": vt} for n, (u, s, vt) in exact.items()}
    family = importance.per_site(wide, 4)
    params = {"components": components, "importance": family.init(jax.random.key(0))}
    got = jax.jit(
        lambda key, params: reconstructions(
            key, wide, family, PARAMS, params, jnp.asarray(X)
        )
    )(jax.random.key(0), params)
    assert float(got["unmasked"]) < 1e-9
    assert float(got["adversarial"]) > float(got["stochastic"]) > 0
    assert float(got["ci_masked"]) > 0
    assert float(got["rounded"]) > 0


BAD = [
    (lambda: losses.importance(-1.0), ValueError, "coefficient"),
    (lambda: losses.importance(1.0, p=0), ValueError, "p must be"),
    (lambda: losses.pgd(steps=0), ValueError, "steps"),
    (lambda: losses.stochastic(samples=1.5), TypeError, "samples"),
    (lambda: losses.stochastic(delta=1), TypeError, "delta"),
    (lambda: losses.smooth_l0(1.0, gamma=0), ValueError, "gamma"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
