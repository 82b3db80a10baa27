"""Functions that predict how much each component matters for an example.

They see what the sites of the *unmasked* target read, and return numbers that
:mod:`toyfeat.partition.squashings` takes to [0, 1].  Their inputs are not detached: the
gradient of every loss reaches ``V`` through inner activations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.checks import check_int
from toyfeat.partition.decomposition import Decomposition, Read
from toyfeat.partition.squashings import lower_leaky, upper_leaky
from toyfeat.types import Array, Params

_GAIN = 2.0**0.5
"""Gain of weights in front of a GELU, He's for rectifiers."""

_RMS_FLOOR = 1e-6
"""Added to mean squares: inputs of a site that are 0 stay 0."""


class Importance(NamedTuple):
    """A family of importance functions for the sites of a decomposition.

    Attributes:
      init: ``key -> params``.
      apply: ``(params, reads) -> {site: [B, ..., C]}`` before they are squashed.
    """

    init: Callable[[Array], Params]
    apply: Callable[[Params, dict[str, Read]], dict[str, Array]]


def per_component(decomposition: Decomposition, hidden: int = 16) -> Importance:
    """Make an MLP of its own for every component, of its inner activation alone.

    Args:
      decomposition: with the sites.
      hidden: width of each.

    Returns:
      :class:`Importance`.

    References:
      Bushnaq et al. (2025), SPD, arXiv 2506.20790, section 2.
    """
    check_int("per_component", "hidden", hidden)

    def init(key: Array) -> Params:
        params = {}
        keys = jax.random.split(key, (len(decomposition.sites), 2))
        for site, (key_in, key_out) in zip(decomposition.sites, keys, strict=True):
            shape = (hidden, site.components)
            params[site.name] = {
                "W1": _GAIN * jax.random.normal(key_in, shape),  # of fan-in 1
                "b1": jnp.zeros(shape),
                "W2": jax.random.normal(key_out, shape) / hidden**0.5,
                "b2": jnp.zeros(site.components),
            }
        return params

    def apply(params: Params, reads: dict[str, Read]) -> dict[str, Array]:
        return {name: _scalar_mlp(params[name], reads[name].inner) for name in params}

    return Importance(init, apply)


def _scalar_mlp(params: dict[str, Array], inner: Array) -> Array:
    """Apply one MLP per component, ``[..., C] -> [..., C]``."""
    lead = (1,) * (inner.ndim - 1)
    w1, b1, w2 = (
        params[n].reshape(*lead, *params[n].shape) for n in ("W1", "b1", "W2")
    )
    hidden = jax.nn.gelu(inner[..., None, :] * w1 + b1, approximate=False)
    return jnp.sum(hidden * w2, axis=-2) + params["b2"].reshape(*lead, -1)


def per_site(decomposition: Decomposition, hidden: int = 256) -> Importance:
    """Make an MLP for every site, from what it reads to all its components.

    Args:
      decomposition: with the sites, none of them a convolution or an embedding.
      hidden: width of each.

    Returns:
      :class:`Importance`.
    """
    check_int("per_site", "hidden", hidden)

    def init(key: Array) -> Params:
        keys = jax.random.split(key, len(decomposition.sites))
        return {
            site.name: _init_mlp(k, site.width, hidden, site.components)
            for site, k in zip(decomposition.sites, keys, strict=True)
        }

    def apply(params: Params, reads: dict[str, Read]) -> dict[str, Array]:
        return {n: _mlp(params[n], _input("per_site", n, reads)) for n in params}

    return Importance(init, apply)


def shared(decomposition: Decomposition, hidden: int = 256) -> Importance:
    """Make one MLP of what all sites read, each divided by its root mean square.

    Args:
      decomposition: with sites of the same positions.
      hidden: width.

    Returns:
      :class:`Importance`.

    References:
      Goodfire (2026), "Interpreting language model parameters" (VPD), which has a
      transformer of eight blocks in the place of the MLP.
    """
    check_int("shared", "hidden", hidden)
    sites = decomposition.sites
    widths = sum(site.width for site in sites)
    ends = [sum(s.components for s in sites[: i + 1]) for i in range(len(sites))]

    def init(key: Array) -> Params:
        return _init_mlp(key, widths, hidden, ends[-1])

    def apply(params: Params, reads: dict[str, Read]) -> dict[str, Array]:
        parts = []
        for site in sites:
            x = _input("shared", site.name, reads)
            mean = jnp.mean(x**2, axis=-1, keepdims=True)
            parts.append(x * jax.lax.rsqrt(mean + _RMS_FLOOR))
        out = _mlp(params, jnp.concatenate(parts, axis=-1))
        pieces = jnp.split(out, ends[:-1], axis=-1)
        return {site.name: piece for site, piece in zip(sites, pieces, strict=True)}

    return Importance(init, apply)


def importances(
    decomposition: Decomposition,
    importance: Importance,
    target: Params,
    params: Params,
    inputs: Any,
) -> tuple[Any, dict[str, Array], dict[str, Array]]:
    """Compute the causal importances of a batch.

    Args:
      decomposition: with the sites.
      importance: the family of functions.
      target: parameters of the model.
      params: ``"components"`` and ``"importance"``, as in a state of :func:`trainer`.
      inputs: of the model.

    Returns:
      Outputs of the target, importances for masks, importances for penalties.
    """
    outputs, reads = decomposition.read(target, params["components"], inputs)
    raw = importance.apply(params["importance"], reads)
    lower = {name: lower_leaky(x) for name, x in raw.items()}
    upper = {name: upper_leaky(x) for name, x in raw.items()}
    return outputs, lower, upper


def _input(who: str, name: str, reads: dict[str, Read]) -> Array:
    """Return what a site reads.

    Raises:
      ValueError: if that is no vector per position.
    """
    x = reads[name].x
    if x is None:
        raise ValueError(
            f"{who}: a site must read vectors, got {name!r}, which reads patches or "
            "indices; use per_component"
        )
    return x


def _init_mlp(key: Array, width: int, hidden: int, outputs: int) -> dict[str, Array]:
    key_in, key_out = jax.random.split(key)
    return {
        "W1": _GAIN * jax.random.normal(key_in, (width, hidden)) / width**0.5,
        "b1": jnp.zeros(hidden),
        "W2": jax.random.normal(key_out, (hidden, outputs)) / hidden**0.5,
        "b2": jnp.zeros(outputs),
    }


def _mlp(params: dict[str, Any], x: Array) -> Array:
    lead = (1,) * (x.ndim - 1)
    hidden = x @ params["W1"] + params["b1"].reshape(*lead, -1)
    hidden = jax.nn.gelu(hidden, approximate=False)
    return hidden @ params["W2"] + params["b2"].reshape(*lead, -1)
