"""Backward pass of a decoder with attention patterns and norms held fixed.

The layer-wise relevance rule for transformers: a pattern of attention and the size that
a norm divides by are taken as constants, so that the rest is what values and weights
do.  The forward pass is unchanged.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.models.decoder import DecoderConfig
from toyfeat.types import Acts, Array, Inputs, Outputs, Params, Probe, Probed


def freeze_backward(probed: Probed, config: DecoderConfig, blocks: range) -> Probed:
    """Hold attention patterns and norms fixed in the backward pass of a decoder.

    Args:
      probed: the decoder, from :func:`toyfeat.from_linen`.
      config: of the decoder.
      blocks: numbers of the blocks that it runs.

    Returns:
      The probed model with the same outputs and other derivatives.  Probes at the
      queries, keys and norms, and functions at ``resid_pre`` and ``attn_out``, replace
      those that hold the blocks fixed.

    References:
      Ali et al. (2022), "XAI for transformers: better explanations through
      conservative propagation", arXiv 2202.07304.

    Raises:
      ValueError: for a decoder that normalizes what its parts add, which is not held
        fixed here.
    """
    if config.norms != "pre" or config.norm_offset:
        raise ValueError(
            "from_decoder: frozen wants norms before the parts of a block alone, got "
            f"norms {config.norms!r} with offset {config.norm_offset}; use frozen=False"
        )

    def frozen(
        params: Params, inputs: Inputs, probes: Mapping[str, Probe]
    ) -> tuple[Outputs, Acts]:
        fixed: dict[str, Probe] = {}
        for block in blocks:
            fixed |= _block_probes(config, params["params"], f"blocks_{block}")
        return probed(params, inputs, {**fixed, **probes})

    return frozen


def _block_probes(config: DecoderConfig, tensors: Any, block: str) -> dict[str, Probe]:
    """Probes that hold one block fixed."""
    # Streams are kept as the block runs, for the norms that read them.
    streams: dict[str, Array] = {}

    def keep(name: str) -> Callable[[Array], Array]:
        def probe(act: Array) -> Array:
            streams[name] = act
            return act

        return probe

    def attn_norm(out: Array) -> Array:
        scale = tensors[block]["attn_norm"]["scale"]
        return _fixed_norm(config, out, streams["resid_pre"], scale)

    def mlp_norm(out: Array) -> Array:
        source = streams["resid_pre"]
        if not config.parallel:
            source = source + streams["attn_out"]
        return _fixed_norm(config, out, source, tensors[block]["mlp_norm"]["scale"])

    # The pattern depends on queries and keys alone.
    probes: dict[str, Probe] = {
        "attn/query": jax.lax.stop_gradient,
        "attn/key": jax.lax.stop_gradient,
        "resid_pre": keep("resid_pre"),
        "attn_out": keep("attn_out"),
        "attn_norm": attn_norm,
        "mlp_norm": mlp_norm,
    }
    return {f"{block}/{name}": probe for name, probe in probes.items()}


def _fixed_norm(config: DecoderConfig, out: Array, resid: Array, scale: Array) -> Array:
    """The value of a norm, with the derivative at a fixed size of its input."""
    x = resid.astype(jnp.float32)
    if config.norm == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
    size = jax.lax.stop_gradient(jax.lax.rsqrt(mean_square + float(config.eps)))
    linear = x * size * jnp.asarray(scale)[None, None]
    # The value comes from the norm itself, to the bit.
    change = (linear - jax.lax.stop_gradient(linear)).astype(out.dtype)
    return jax.lax.stop_gradient(out) + change
