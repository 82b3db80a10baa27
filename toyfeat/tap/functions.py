"""Probed models from pure functions."""

from collections.abc import Callable, Mapping
from typing import Any

from jax.extend.core import get_opaque_trace_state

from toyfeat.tap.probes import (
    apply_probe,
    call_name,
    check_new_site,
    check_sites,
    visit,
)
from toyfeat.types import Acts, Inputs, Outputs, Params, Probe, Probed


def trace_state() -> Any:
    """Return a token of the JAX trace in progress, equal inside one trace."""
    return get_opaque_trace_state(convention="toyfeat")


def from_function(fn: Callable[..., Outputs]) -> Probed:
    """Make a probed model of a function that names its activations.

    Args:
      fn: ``fn(params, inputs, tap) -> outputs``.  It calls ``tap(name, value)``
        at each site and goes on with what that returns.  A value may be an
        array ``[B, ..., D]`` or a pytree of arrays, whose leaves become the
        sites ``name[0]``, ``name[key]``, ...  A name used a second time
        becomes ``name#1``.

    Returns:
      ``probed(params, inputs, probes) -> (outputs, acts)``.

    Raises:
      ValueError: when called, if a probe names a site that ``fn`` does not tap,
        if two values get one name (a tap named ``"name#1"`` beside a second one
        named ``"name"``), or if ``tap`` is called inside a transformation
        (``jit``, ``scan``, ``vmap``, ``checkpoint``) that ``fn`` applies itself:
        the value could not get out.  Return it from the transformed part and tap
        it outside.

    Example:
      >>> import jax.numpy as jnp
      >>> def mlp(params, x, tap):
      ...     hidden = tap("hidden", jnp.maximum(x @ params["in"], 0))
      ...     return hidden @ params["out"]
      >>> params = {"in": jnp.ones((2, 3)), "out": jnp.ones((3, 1))}
      >>> probed = from_function(mlp)
      >>> outputs, acts = probed(params, jnp.ones((4, 2)), {})
      >>> acts["hidden"].shape
      (4, 3)
      >>> steered, _ = probed(params, jnp.ones((4, 2)), {"hidden": jnp.ones(3)})
      >>> (steered - outputs)[0].tolist()
      [3.0]
    """

    def probed(
        params: Params, inputs: Inputs, probes: Mapping[str, Probe]
    ) -> tuple[Outputs, Acts]:
        acts: Acts = {}
        calls: dict[str, int] = {}
        outer = trace_state()

        def tap(name: str, value: Any) -> Any:
            # A value that belongs to an inner trace cannot be stored outside of it.
            if trace_state() != outer:
                raise ValueError(
                    f"from_function: tap({name!r}, ...) was called inside a jit, scan, "
                    "vmap, grad or checkpoint of the model's own, from which the value "
                    "cannot get out; return it from there and tap it outside, or use "
                    "from_linen, which lifts its sites"
                )

            def record_leaf(site: str, act: Any) -> Any:
                check_new_site(site, acts, "from_function")
                acts[site] = apply_probe(site, act, probes.get(site))
                return acts[site]

            # A repeated name is a site of its own, numbered by the call.
            call = calls.get(name, 0)
            calls[name] = call + 1
            return visit(call_name(name, call), value, record_leaf)

        outputs = fn(params, inputs, tap)
        check_sites(probes, acts, who="from_function")
        return outputs, acts

    return probed


def from_split(
    prefix: Callable[[Params, Inputs], Any],
    suffix: Callable[[Params, Any], Outputs],
    *,
    site: str = "acts",
) -> Probed:
    """Make a probed model with one site between two functions.

    Args:
      prefix: ``prefix(params, inputs) -> acts``.
      suffix: ``suffix(params, acts) -> outputs``.
      site: name of the activations between the two.

    Returns:
      ``probed(params, inputs, probes) -> (outputs, {site: acts})``.

    Example:
      >>> import jax.numpy as jnp
      >>> probed = from_split(lambda p, x: x @ p, lambda p, a: a**2, site="pre")
      >>> outputs, acts = probed(jnp.eye(2), jnp.ones((3, 2)), {})
      >>> list(acts), outputs.shape
      (['pre'], (3, 2))
    """
    return from_function(
        lambda params, inputs, tap: suffix(params, tap(site, prefix(params, inputs)))
    )
