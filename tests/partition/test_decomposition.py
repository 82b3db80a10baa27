"""Weights of any model as sites: exact at masks of 1, right at all others."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import toyfeat as ft
from toyfeat.models.planted import residual
from toyfeat.models.planted.residual import RESIDUAL_STREAM
from toyfeat.partition.factors import _axis_groups
from toyfeat.partition.sites import decompose_weights

B, C = 3, 6
RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (2, 2), strides=2)(x))
        return nn.Dense(2)(x.reshape(len(x), -1))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 4)(tokens)
        return nn.MultiHeadDotProductAttention(2)(x)


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.last = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.first(x)))


def constant_first(params, x):
    """Multiplies weights by constants before inputs come, and from either side."""
    read = jnp.transpose(params["embed"] @ params["in"])  # [N, F]
    hidden = jax.nn.relu(jax.vmap(lambda v: read @ v)(x))
    return hidden @ (params["out"] @ params["embed"].T)


@cache
def case(kind):
    """Model, parameters, paths, inputs."""
    heads = "params/MultiHeadDotProductAttention_0/"
    if kind == "convolution":
        x = draw(B, 4, 4, 2)
        params = Convolutions().init(jax.random.key(0), x)
        paths = ["params/Conv_0/kernel", "params/Dense_0/kernel"]
        return Convolutions(), params, paths, x
    if kind == "attention":
        x = jnp.asarray(RNG.integers(0, 7, (B, 5)))
        params = Attention().init(jax.random.key(0), x)
        names = ("query", "key", "value", "out")
        paths = [f"{heads}{name}/kernel" for name in names]
        return (
            ft.from_linen(Attention()),
            params,
            ["params/Embed_0/embedding", *paths],
            x,
        )
    if kind == "nnx":
        probed, params = ft.from_nnx(Linear(nnx.Rngs(0)))
        return probed, params, ["first/kernel", "last/kernel"], draw(B, 4)
    params = {"embed": draw(6, 8), "in": draw(8, 5), "out": draw(5, 8)}
    return constant_first, params, ["in", "out"], draw(B, 6)


KINDS = ["convolution", "attention", "nnx", "constants"]


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", KINDS)
def test_all_masks_one_is_the_target_to_the_bit(kind):
    model, params, paths, x = case(kind)
    split = decompose_weights(model, params, paths, C, x)
    parts = split.init(jax.random.key(1))
    masks = {site.name: jnp.ones((B, C)) for site in split.sites}
    deltas = {site.name: jnp.ones(B) for site in split.sites}
    target = jax.jit(split.target)(params, x)
    masked = jax.jit(split.masked)(params, parts, x, masks, deltas)
    assert np.array_equal(target, masked)
    outputs, reads = split.read(params, parts, x)
    assert np.array_equal(split.target(params, x), outputs)
    assert {n: r.inner.shape[-1] for n, r in reads.items()} == {
        site.name: C for site in split.sites
    }


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", KINDS)
def test_random_masks_are_weights_of_each_example(kind):
    """The oracle gives every example weights of its own, by the definition."""
    model, params, paths, x = case(kind)
    split = decompose_weights(model, params, paths, C, x)
    parts = split.init(jax.random.key(1))
    assert [site.name for site in split.sites] == paths
    masks = {p: jnp.asarray(RNG.random((B, C)), jnp.float32) for p in paths}
    deltas = {p: jnp.asarray(RNG.random(B), jnp.float32) for p in paths}
    masked = jax.jit(split.masked)(params, parts, x, masks, deltas)
    leaves, tree = jax.tree.flatten(params)
    matrices = {path: np.float64(w) for path, w in split.matrices(params).items()}
    target = jax.jit(split.target)
    for b in range(B):
        own = list(leaves)
        for path, weight in split.weights.items():
            v, u = (np.float64(parts[path][name]) for name in "VU")
            mask, delta = np.float64(masks[path][b]), float(deltas[path][b])
            matrix = (v * mask[None]) @ u + delta * (matrices[path] - v @ u)
            own[weight.leaf] = jnp.asarray(matrix.reshape(weight.shape), jnp.float32)
        expected = target(jax.tree.unflatten(tree, own), x)[b]
        np.testing.assert_allclose(masked[b], expected, atol=2e-6)


def tied(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["w"].T


def test_a_weight_that_is_used_twice_is_two_sites_with_the_same_parts():
    params, x = {"w": draw(4, 3)}, draw(B, 4)
    split = decompose_weights(tied, params, "w", C, x)
    assert [(s.name, s.transposed, s.width) for s in split.sites] == [
        ("w", False, 4),
        ("w#1", True, 3),
    ]
    parts = split.init(jax.random.key(0))
    v, u = (np.asarray(parts["w"][name]) for name in "VU")
    first, second = (RNG.random((B, C)).astype(np.float32) for _ in range(2))
    masks = {"w": jnp.asarray(first), "w#1": jnp.asarray(second)}
    out = split.masked(params, parts, x, masks)
    hidden = np.maximum((np.asarray(x) @ v * first) @ u, 0)
    np.testing.assert_allclose(out, (hidden @ u.T * second) @ v.T, atol=1e-5)
    # A site without a mask is the target's.
    out = split.masked(params, parts, x, {"w#1": jnp.asarray(second)})
    hidden = np.maximum(np.asarray(x) @ np.asarray(params["w"]), 0)
    np.testing.assert_allclose(out, (hidden @ u.T * second) @ v.T, atol=1e-5)


def test_axes_of_two_shapes_are_grouped():
    assert _axis_groups((2, 3, 4), (6, 4)) == [([0, 1], [0]), ([2], [1])]
    assert _axis_groups((6,), (2, 3)) == [([0], [0, 1])]
    groups = _axis_groups((2, 3), (1, 2, 3, 1))
    assert [i for g in groups for i in g[0]] == [0, 1]
    assert [i for g in groups for i in g[1]] == [0, 1, 2, 3]


W = np.ones((4, 3), np.float32)
X = np.ones((2, 4), np.float32)
V = np.ones((4, 2), np.float32)


def noisy(params, x):
    return x @ params["w"] + RNG.random()


BAD = {
    "path": (lambda p, x: x @ p["w"], {"w": W}, ["v"], 2, "there are w"),
    "bias": (
        lambda p, x: x @ p["w"],
        {"w": W, "b": W[0]},
        ["b"],
        2,
        "two or more axes",
    ),
    "twice": (lambda p, x: x @ p["w"], {"w": W, "v": W}, ["w"], 2, "v, w; let"),
    "none": (lambda p, x: x @ p["w"], {"w": W}, ["w"], 0, "at least 1, got 0"),
    "counts": (lambda p, x: x @ p["w"], {"w": W}, ["w"], {"v": 2}, "each path once"),
    "nan": (lambda p, x: x @ p["w"], {"w": np.nan * W}, ["w"], 2, "must be finite"),
    "noise": (noisy, {"w": W}, ["w"], 2, "switch off dropout"),
    "unused": (lambda p, x: x @ p["w"], {"w": W, "v": V}, ["v"], 2, "does not use it"),
    "square": (lambda p, x: x @ p["w"] ** 2, {"w": W}, ["w"], 2, "'integer_pow'"),
    "product": (
        lambda p, x: x @ (p["w"].T @ p["v"]).T.repeat(2, 1)[:, :4].T,
        {"w": W, "v": V},
        ["w", "v"],
        2,
        "decompose one of them|leave it out",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_decomposed_is_refused(name):
    model, params, paths, components, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        decompose_weights(model, params, paths, components, X)


def test_a_model_that_is_none_is_refused():
    with pytest.raises(TypeError, match="wrap an nnx module in from_nnx"):
        decompose_weights(3, {"w": W}, ["w"], 2, X)


def test_masks_are_checked():
    split = decompose_weights(lambda p, x: x @ p["w"], {"w": W}, "w", 2, X)
    parts = split.init(jax.random.key(0))
    for masks, deltas, message in (
        ({"v": jnp.ones((2, 2))}, None, r"sites are \['w'\]"),
        ({"w": jnp.ones((2, 3))}, None, r"must be \[B, 2\]"),
        ({"w": 1.5 * jnp.ones((2, 2))}, None, r"\[0, 1\], got 1.5"),
        ({"w": jnp.ones((2, 2))}, {"w": -jnp.ones(2)}, r"deltas must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            split.masked({"w": W}, parts, X, masks, deltas)


def test_two_layers_of_a_residual_network_are_decomposed_in_their_stream():
    shapes = {"embed": (6, 8), "in": [(8, 3)] * 2, "out": [(3, 8)] * 2}
    params = jax.tree.map(
        lambda shape: draw(*shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    x = draw(B, 6)
    paths = ["in/0", "out/0", "in/1", "out/1"]
    split = decompose_weights(RESIDUAL_STREAM, params, paths, C, x)
    assert [site.name for site in split.sites] == paths
    expected = residual._NEURONS(params, x, {})[0]
    np.testing.assert_allclose(split.target(params, x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'out/0': the operation 'concatenate'"):
        decompose_weights(residual._NEURONS, params, paths, C, x)
