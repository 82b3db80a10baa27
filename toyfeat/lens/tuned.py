"""The tuned lens: an affine map per site, trained to say what the model will say."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from toyfeat.checks import check_function, check_int, check_number, check_type
from toyfeat.lens.maps import LensMap
from toyfeat.lens.model import (
    LensModel,
    check_model,
    mark_positions,
    residual_shape,
)
from toyfeat.lens.reading import Lens, make_lens
from toyfeat.meshes import check_devices, everywhere, run_automatic
from toyfeat.types import Array, Inputs, Params


def tuned_lens(
    model: LensModel,
    params: Params,
    batches: Sequence[tuple[Inputs, Any]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    start: Lens | None = None,
    about: Mapping[str, Any] | None = None,
    on_step: Callable[[int, dict[str, Array]], Any] = lambda step, losses: None,
) -> Lens:
    r"""Train an affine map per site by the divergence from the model's own output.

    :math:`KL(p_L \| p_l)` of the next token, :math:`p_l` the softmax of
    ``unembed(norm(A h + b))``, over all tokens of a batch.  Maps start from the
    identity, the logit lens, or from another lens, and are trained by Adam.

    Args:
      model: from :func:`from_decoder` or :func:`from_probed`.
      params: its parameters.
      batches: ``(inputs, mask)`` of one shape, gone through in turn, again and again.
      steps: batches in all.
      learning_rate: of Adam.
      start: lens of the same sites, one map each, from which the training goes on.
      about: JSON values for the file.
      on_step: called with the step and the losses by site, arrays of the device.

    Returns:
      :class:`Lens` of the kind ``"tuned"``.

    Raises:
      ValueError: if there are no batches, a mask has another shape, a number is out of
        range, the lens to start from has other sites or several maps per site, or the
        model cannot have a lens.
      TypeError: if an argument has the wrong type.

    References:
      Belrose et al. (2023), "Eliciting latent predictions from transformers with the
      tuned lens", arXiv 2303.08112.
    """
    who = "tuned_lens"
    steps = check_int(who, "steps", steps)
    check_number(who, "learning_rate", learning_rate, above=0)
    check_function(who, "on_step", on_step, "of a step and losses")
    _check_batches(who, batches)
    check_devices(who, (params, batches))
    check_model(model, params, batches[0][0])
    dim = residual_shape(model, params, batches[0][0], who)[-1]
    maps: Any = _first_maps(who, model, dim, start)
    adam = optax.adam(learning_rate)
    state = adam.init(maps)

    def update(maps: Any, state: Any, params: Params, inputs: Inputs, mask: Any) -> Any:
        acts = model.probed(params, inputs, {})[1]
        gradient = jax.grad(partial(_total_divergence, who), has_aux=True)
        slopes, losses = gradient(maps, model, params, acts, mask)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
            updates, state = adam.update(slopes, state)
            return optax.apply_updates(maps, updates), state, losses

    step = jax.jit(partial(run_automatic, update, everywhere))
    for number in range(steps):
        inputs, mask = batches[number % len(batches)]
        maps, state, losses = step(maps, state, params, inputs, mask)
        on_step(number + 1, losses)
    known = {"estimator": f"KL, {steps} steps", **(about or {})}
    return make_lens(model, params, "tuned", maps, known)


def output_divergence(
    model: LensModel,
    params: Params,
    lens: Lens,
    batches: Sequence[tuple[Inputs, Any]],
) -> dict[str, float]:
    r"""Measure how far what a lens says is from what the model says, by site.

    Args:
      model: from :func:`from_decoder` or :func:`from_probed`.
      params: its parameters.
      lens: a lens of the model.
      batches: ``(inputs, mask)`` of one shape; held-out ones for a lens of a fit.

    Returns:
      Mean of :math:`KL(p_L \| p_l)` over tokens, in nats, by site.

    Raises:
      ValueError: if there are no batches or no tokens in them, a mask has another
        shape, or the lens is of other sites than the model.
      TypeError: if the lens or the model is none.
    """
    who = "output_divergence"
    check_type(who, "lens", lens, Lens, hint="make one with ft.lenses")
    _check_batches(who, batches)
    residual_shape(model, params, batches[0][0], who)

    @jax.jit
    def measure(maps: Any, params: Params, inputs: Inputs, mask: Any) -> Any:
        acts = model.probed(params, inputs, {})[1]
        losses = _total_divergence(who, maps, model, params, acts, mask)[1]
        return losses, _weight(who, mask, acts[model.sites[-1]]).sum()

    # Batches count by their tokens.
    parts = [measure(lens.maps, params, *batch) for batch in batches]
    total = sum(float(weight) for _, weight in parts)
    if not total:
        raise ValueError(
            f"{who}: masks must leave a token or more, got none in {len(batches)} "
            "batches; a mask is 1 where a token counts"
        )
    return {
        site: sum(float(x[site]) * float(weight) for x, weight in parts) / total
        for site in lens.maps
    }


def _check_batches(who: str, batches: Sequence[Any]) -> None:
    """Raise unless there is a batch."""
    if not len(batches):
        raise ValueError(
            f"{who}: batches must be one (inputs, mask) or more, got none; give prompts"
        )


def _first_maps(
    who: str, model: LensModel, dim: int, start: Lens | None
) -> dict[str, LensMap]:
    """Maps that the training starts from: the identity, or those of a lens."""
    sites = model.sites[:-1]
    if start is None:
        eye, zero = jnp.eye(dim)[None], jnp.zeros(dim)
        return {site: LensMap(matrices=eye, bias=zero) for site in sites}
    check_type(who, "start", start, Lens, hint="make one with ft.lenses")
    shapes = {site: x.matrices.shape for site, x in start.maps.items()}
    if shapes != dict.fromkeys(sites, (1, dim, dim)):
        raise ValueError(
            f"{who}: start must have one map of [{dim}, {dim}] at each of "
            f"{list(sites)}, got {shapes}; start from a lens of this model"
        )
    zero = jnp.zeros(dim)
    return {
        site: LensMap(x.matrices, bias=zero if x.bias is None else x.bias)
        for site, x in start.maps.items()
    }


def _weight(who: str, mask: Any, acts: Array) -> Array:
    """Weight of every token ``[B, T]``: 1 where the mask is not 0, or everywhere."""
    batch, time, _ = acts.shape
    counts = mark_positions(who, "mask", mask, (batch, time), "a mask is [B, T]")
    return counts.astype(bool).astype(jnp.result_type(float))


def _total_divergence(
    who: str,
    maps: dict[str, LensMap],
    model: LensModel,
    params: Params,
    acts: dict[str, Array],
    mask: Any,
) -> tuple[Array, dict[str, Array]]:
    """Sum of the mean divergences of all sites, and each of them; 0 of no tokens."""
    final = jax.nn.log_softmax(model.unembed(params, acts[model.sites[-1]]))
    weights = _weight(who, mask, final).astype(final.dtype)
    weights = weights / jnp.maximum(jnp.sum(weights), 1)
    losses = {}
    # One lens for all of them, as it is read later.
    lens = make_lens(model, params, "tuned", maps)
    for site in maps:
        predicted = jax.nn.log_softmax(lens.read(site, acts[site]))
        divergence = jnp.sum(jnp.exp(final) * (final - predicted), axis=-1)
        losses[site] = jnp.sum(weights * divergence)
    return sum(losses.values(), jnp.zeros(())), losses
