"""Describe latents at a site of any model by the inputs that show them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.latents import (
    Latent,
    LatentView,
    Measurements,
    measure_latents,
    nearest_readers,
)
from toyfeat.tap import tap
from toyfeat.types import Array, Inputs, Params, Probed

_PROMOTED = 5  # outputs that are named of a latent, and as many suppressed ones
_SLOPE_INPUTS = 64  # inputs whose outputs a writer is seen in


class Example(NamedTuple):
    """Input in which a latent is active.

    Attributes:
      index: of the input.
      at: index of the position among those of the site, 0 if it has none.
      shape: of the positions, such as ``(T,)`` or ``(H, W)``, or ``()``.
      values: code of the latent at every position.
      effect: attribution of the latent at the position.
    """

    index: int
    at: int
    shape: tuple[int, ...]
    values: tuple[float, ...]
    effect: float


def describe_latents(
    probed: Probed,
    params: Params,
    inputs: Inputs,
    *,
    site: str,
    readout: Any,
    view: LatentView,
    num: int = 24,
    examples: int = 6,
    batch_size: int | None = None,
    outputs: Callable[[Any], Array] = lambda outputs: outputs,
    names: Sequence[str] | None = None,
) -> list[Latent]:
    """Describe the latents with the largest effects, for any probed model.

    A latent is described by how often it is active, by the inputs with its largest
    codes and its largest attributions, by the outputs that its writer promotes (the
    mean derivative of the outputs along it over the first 64 inputs, added at every
    position of the site) and by the latents whose readers are near.

    Args:
      probed: the model.
      params: its parameters.
      inputs: ``B`` inputs, of any kind.
      site: where the dictionary is.
      readout: of attributions, with one gradient per input.
      view: from :func:`toyfeat.dictionary.latents.from_acts` or ``from_grads``.
      num: number of latents.
      examples: of either kind per latent, each another input.
      batch_size: inputs at a time, all by default.
      outputs: array ``[B, ..., C]`` among what the model returns.
      names: of the ``C`` outputs; their indices by default.

    Returns:
      Latents, the largest mean absolute attribution first.

    Raises:
      ValueError: if the readout has several gradients per input, the outputs are no
        array, or there is another number of names.
    """
    taps = tap(
        probed, params, inputs, sites=site, readout=readout, batch_size=batch_size
    )[site]
    if taps.grads is None or taps.grads.shape[1] != 1:
        got = None if taps.grads is None else taps.grads.shape[1]
        raise ValueError(
            f"describe_latents: wanted one gradient per input, got {got}; use a scalar "
            "readout, such as ft.readouts.loss"
        )
    measured = measure_latents(
        view, lambda: iter([taps]), len(taps.acts), num, who="describe_latents"
    )
    shape = _position_shape(probed, params, inputs, site)
    slopes = _slopes(
        probed, params, inputs, site, outputs, view.writers[measured.chosen]
    )
    labels = _label_outputs(names, slopes.shape[1])
    latents = []
    for latent, slope in zip(
        summarize_latents(view, measured, shape, examples), slopes, strict=True
    ):
        order = np.argsort(-slope, kind="stable")
        raised = tuple(labels[i] for i in order[:_PROMOTED] if slope[i] > 0)
        lowered = tuple(labels[i] for i in order[::-1][:_PROMOTED] if slope[i] < 0)
        latents.append(latent._replace(promoted=raised, suppressed=lowered))
    return latents


def _label_outputs(names: Sequence[str] | None, num: int) -> tuple[str, ...]:
    """Return a name for each output, its index where there are none."""
    labels = tuple(map(str, range(num)) if names is None else names)
    if len(labels) != num:
        raise ValueError(
            f"describe_latents: names must be those of the {num} outputs, got "
            f"{len(labels)}; give one each"
        )
    return labels


def summarize_latents(
    view: LatentView, measured: Measurements, shape: tuple[int, ...], num: int
) -> list[Latent]:
    """Summarize the chosen latents, without what their writers promote.

    Args:
      view: of the dictionary.
      measured: of :func:`toyfeat.dictionary.latents.measure_latents`, ``N`` inputs and
        positions.
      shape: of the positions of an input.
      num: examples of either kind per latent, each another input.

    Returns:
      Latents in the order of ``measured.chosen``, whose examples are :class:`Example`.
    """
    near = nearest_readers(np.asarray(view.readers, np.float64), measured.chosen)
    latents = []
    for slot, index in enumerate(measured.chosen):
        codes, attributions = measured.codes[:, slot], measured.attributions[:, slot]
        show = partial(_largest, codes, attributions, shape, num)
        latents.append(
            Latent(
                index=int(index),
                frequency=float(measured.active[index] / measured.examples),
                effect=float(measured.effects[index] / measured.examples),
                activating=show(np.abs(codes)),
                attributed=show(np.abs(attributions)),
                promoted=(),
                suppressed=(),
                neighbours=near[slot],
            )
        )
    return latents


def _largest(
    codes: np.ndarray,
    attributions: np.ndarray,
    shape: tuple[int, ...],
    num: int,
    order_by: np.ndarray,
) -> tuple[Example, ...]:
    """Examples of the largest ``order_by``, at most one of an input."""
    positions = int(np.prod(shape, dtype=int))
    found: dict[int, Example] = {}
    for row in np.argsort(-order_by, kind="stable"):
        if order_by[row] <= 0 or len(found) == num:
            break
        index, at = divmod(int(row), positions)
        if index in found:
            continue
        values = codes[index * positions : (index + 1) * positions].tolist()
        effect = float(attributions[row])
        found[index] = Example(index, at, shape, tuple(values), effect)
    return tuple(found.values())


def _position_shape(
    probed: Probed, params: Params, inputs: Inputs, site: str
) -> tuple[int, ...]:
    """Axes of a site between the batch and the last."""
    _, acts = jax.eval_shape(lambda x: probed(params, x, {}), inputs)
    return tuple(acts[site].shape[1:-1])


def _slopes(
    probed: Probed,
    params: Params,
    inputs: Inputs,
    site: str,
    outputs: Callable[[Any], Array],
    writers: Array,
) -> np.ndarray:
    """Mean derivative of every output along each writer, ``[L, C]``."""
    inputs = jax.tree.map(lambda x: x[:_SLOPE_INPUTS], inputs)

    def run(move: Array) -> Array:
        values = outputs(probed(params, inputs, {site: move})[0])
        if not hasattr(values, "ndim"):
            raise ValueError(
                "describe_latents: outputs must be one array [B, ..., C], got a "
                f"{type(values).__name__}; pass outputs=lambda y: y[...]"
            )
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(
                "describe_latents: outputs must have derivatives, got "
                f"{values.dtype}; pass outputs= that returns logits"
            )
        values = values[:, None] if values.ndim == 1 else values
        return jnp.mean(values, axis=tuple(range(values.ndim - 1)))

    writers = jnp.asarray(writers)
    _, push = jax.linearize(run, jnp.zeros(writers.shape[1], writers.dtype))
    return np.asarray(jax.jit(lambda rows: jax.lax.map(push, rows))(writers))
