"""Derivatives by weights against those that are written out."""

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat import partition
from toyfeat.partition.gradients import attributions, gradient_batch

RNG = np.random.default_rng(0)
PARAMS = {"b": RNG.normal(size=(4, 2)), "a": RNG.normal(size=(3, 4))}
PARAMS = {name: x.astype(np.float32) for name, x in PARAMS.items()}
X = RNG.normal(size=(5, 3)).astype(np.float32)


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


SPLIT = partition.decompose_weights(mlp, PARAMS, ["a", "b"], 3, X)


def test_attributions_are_projections_of_the_jacobian():
    parts = SPLIT.init(jax.random.key(0))
    found = jax.jit(lambda p, c, x: attributions(SPLIT, p, c, x))(PARAMS, parts, X)
    jacobian = jax.jit(jax.jacrev(mlp))(PARAMS, jnp.asarray(X))  # [B, O, *weight]
    for path in ("a", "b"):
        v, u = (np.float64(parts[path][name]) for name in "VU")
        for c in range(3):
            part = np.outer(v[:, c], u[c])
            slopes = (np.float64(jacobian[path]) * part).sum((2, 3))
            expected = np.sqrt((slopes**2).mean(1))
            np.testing.assert_allclose(found[path][:, c], expected, rtol=1e-4)


def test_gradients_by_weights_by_hand():
    key = jax.random.key(1)
    taps = jax.jit(lambda k, p, x: gradient_batch(k, SPLIT, p, x))(key, PARAMS, X)
    assert taps.acts.shape == (5, 12 + 8)
    order = np.asarray(jax.random.permutation(key, 5))
    x, a, b = np.float64(X), np.float64(PARAMS["a"]), np.float64(PARAMS["b"])
    hidden = np.tanh(x @ a)
    slope = (hidden @ b - (hidden @ b)[order]) * 2 / 2  # mean over two outputs
    for i in range(5):
        inner = (slope[i] @ b.T) * (1 - hidden[i] ** 2)
        expected = [
            np.outer(x[i], inner).ravel(),
            np.outer(hidden[i], slope[i]).ravel(),
        ]
        np.testing.assert_allclose(taps.acts[i], np.concatenate(expected), atol=2e-5)
