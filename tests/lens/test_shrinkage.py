"""Shrinkage by two halves: less error where there is noise, none where there is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat import lens as lenses
from toyfeat.lens.averages import add_prompts, empty_means
from toyfeat.lens.fits import JacobianState

DIM, PROMPTS = 24, 10


def errors(spectrum, noise, seed):
    """Relative errors of the shrunken and of the plain mean, of ``J - I``."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] for _ in range(2))
    truth = (left * spectrum) @ right
    draws = noise * rng.normal(size=(PROMPTS, 1, DIM, DIM)) / np.sqrt(DIM)
    rows = jnp.asarray(np.eye(DIM) + truth + draws, jnp.float32)
    half = jnp.arange(PROMPTS) % 2
    means = jax.jit(add_prompts)(
        empty_means(1, 1, DIM), rows, jnp.ones((PROMPTS, 1)), half, 0 * half
    )
    state = JacobianState(jnp.asarray(PROMPTS), None, {"a": means})
    estimate = lenses.shrunken(state)
    assert estimate.matrices["a"].shape == (DIM, DIM)
    return [
        np.linalg.norm(np.asarray(matrix) - np.eye(DIM) - truth) / np.linalg.norm(truth)
        for matrix in (estimate.matrices["a"], rows.mean((0, 1)))
    ]


def mean_errors(spectrum, noise):
    return np.mean([errors(spectrum, noise, seed) for seed in range(4)], axis=0)


def test_noise_is_taken_out_where_the_spectrum_falls():
    shrunk, plain = mean_errors(3.0 / np.arange(1, DIM + 1) ** 2, 1.0)
    assert shrunk < 0.6 * plain
    shrunk, plain = mean_errors(3.0 / np.arange(1, DIM + 1), 1.0)
    assert shrunk < 0.95 * plain


def test_a_flat_spectrum_is_not_made_worse():
    shrunk, plain = mean_errors(np.ones(DIM), 1.0)
    assert shrunk < 1.02 * plain


def test_without_noise_nothing_changes():
    shrunk, plain = errors(3.0 / np.arange(1, DIM + 1), 0.0, 0)
    assert plain < 1e-6
    assert shrunk < 1e-5


def test_two_prompts_are_needed():
    empty = JacobianState(jnp.asarray(0), None, {"a": empty_means(1, 1, DIM)})
    with pytest.raises(ValueError, match=r"both halves .* got 0 prompts; fit more"):
        lenses.shrunken(empty)
    with pytest.raises(TypeError, match="state must be a JacobianState, got dict"):
        lenses.shrunken({})
