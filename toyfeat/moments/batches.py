"""Checks of the batches that an accumulator of moments takes."""

from collections.abc import Mapping

import jax.numpy as jnp

from toyfeat.checks import check_array, check_type
from toyfeat.meshes import by_rows, run_automatic
from toyfeat.types import Array, Taps


def check_types(who: str, taps: Taps) -> None:
    """Check that taps are taps of real arrays."""
    hint = "toyfeat.tap returns a dict of them"
    if isinstance(taps, Mapping):
        hint = "pass the taps of one site, taps[site]"
    check_type(who, "taps", taps, Taps, hint=hint)
    # Every field that is there is a real array.
    for name in ("acts", "weights", "grads"):
        value = getattr(taps, name)
        if name != "grads" or value is not None:
            check_array(who, name, value, hint="convert it with jnp.asarray")


def check_batch(who: str, taps: Taps, dim: int, grads: bool) -> Taps:
    """Check the types and shapes of a batch; gradients that are not wanted go."""
    check_types(who, taps)
    # Activations and weights.
    acts, gradients, weights = taps.acts, taps.grads, taps.weights
    if acts.ndim != 2 or acts.shape[1] != dim:
        raise ValueError(
            f"{who}: wanted acts [N, {dim}], got shape {acts.shape}; the accumulator "
            "is made for one site's width"
        )
    if weights.shape != acts.shape[:1]:
        raise ValueError(
            f"{who}: wanted one weight per example {acts.shape[:1]}, got shape "
            f"{weights.shape}"
        )
    # Gradients, if they are wanted.
    if not grads:
        return taps._replace(grads=None)
    if gradients is None:
        raise ValueError(
            f"{who}: the taps carry no gradients; tap with a readout, or use "
            f"{who}(..., grads=False)"
        )
    if gradients.ndim != 3 or gradients.shape[::2] != acts.shape:
        raise ValueError(
            f"{who}: wanted grads [{acts.shape[0]}, K, {dim}], got shape "
            f"{gradients.shape}"
        )
    return taps


def gradient_rows(grads: Array, weights: Array) -> tuple[Array, Array]:
    """Flatten gradients to one row per readout, each with the weight of its example.

    Args:
      grads: ``[N, K, D]``.
      weights: ``[N]``.

    Returns:
      Rows ``[N K, D]``, and their weights ``[N K]``.
    """

    def flatten(grads: Array, weights: Array) -> tuple[Array, Array]:
        _, num, dim = grads.shape
        return grads.reshape(-1, dim), jnp.repeat(weights, num)

    return run_automatic(flatten, by_rows(grads), grads, weights)
