"""Split a decoder at a site, to run only the part of the model behind it."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from toyfeat.models.decoder import SITES, Decoder, DecoderConfig
from toyfeat.tap import from_linen
from toyfeat.types import Array, Params, Probed

_SITE = re.compile(r"blocks_(0|[1-9][0-9]*)/(\w+)")
_CACHED = re.compile(r"blocks_[0-9]+/attn/(key|value)")
Cache = Mapping[str, Array] | None
"""Keys and values of the first positions by site (``None``: all positions are run)."""


class SplitDecoder(NamedTuple):
    """Decoder split at a site into the model up to it and the model behind it.

    Attributes:
      site: where the decoder is split.
      entry: site of the residual stream that the second part starts from; for
        residual sites the site itself.
      model: the probed decoder, tokens to logits.
      run: ``(params, entry [B, T, D], value [B, T, width], past=None) -> logits
        [B, T, V]``, the model behind the site with ``value`` at the site.  With the
        keys and values of the first positions as ``past``, all arrays are of the
        positions after those.
      run_with_cache: ``(params, entry, value) -> logits, {site: [B, T, .]}``, the same
        with the keys and values that the second part computes.
    """

    site: str
    entry: str
    model: Probed
    run: Callable[..., Array]
    run_with_cache: Callable[[Params, Array, Array], tuple[Array, dict[str, Array]]]


def split_at(
    config: DecoderConfig, site: str, *, dtype: Any = jnp.float32
) -> SplitDecoder:
    """Split a decoder at a site.

    Args:
      config: configuration of the decoder, whose parameters are unrolled.
      site: ``"blocks_<i>/<name>"`` with a name of
        :data:`toyfeat.models.decoder.SITES`.
      dtype: dtype of the matrix products.

    Returns:
      :class:`SplitDecoder`.

    Raises:
      ValueError: for a site that the decoder does not have.

    Example:
      >>> from toyfeat.models.decoder import llama
      >>> config = llama(vocab=5, layers=3, dim=4, heads=1, hidden=6)
      >>> split_at(config, "blocks_1/resid_post").entry
      'blocks_1/resid_post'
      >>> split_at(config, "blocks_1/mlp_out").entry
      'blocks_1/resid_pre'
    """
    # The second part starts at the block of the site, or behind it.
    layer, name = check_site(config, site)
    is_residual = name in ("resid_pre", "resid_post")
    start = layer + (name == "resid_post")
    second_part = from_linen(Decoder(config, start=start, dtype=dtype))

    def run_probed(
        params: Params, entry: Array, value: Array, past: Cache = None
    ) -> tuple[Array, dict[str, Array]]:
        # At a residual site the value is what the second part starts from; any other
        # site lies inside the first block of it and is overwritten there.
        if is_residual:
            return second_part(params, (value, None, past), {})
        return second_part(params, (entry, None, past), {site: lambda _: value})

    def run(params: Params, entry: Array, value: Array, past: Cache = None) -> Array:
        return run_probed(params, entry, value, past)[0]

    def run_with_cache(
        params: Params, entry: Array, value: Array
    ) -> tuple[Array, dict[str, Array]]:
        logits, acts = run_probed(params, entry, value)
        return logits, {n: x for n, x in acts.items() if _CACHED.fullmatch(n)}

    return SplitDecoder(
        site=site,
        entry=site if is_residual else f"blocks_{layer}/resid_pre",
        model=from_linen(Decoder(config, dtype=dtype)),
        run=run,
        run_with_cache=run_with_cache,
    )


def check_site(config: DecoderConfig, site: str) -> tuple[int, str]:
    """Parse the name of a site into its layer and the name inside of its block.

    Raises:
      ValueError: if the decoder does not have the site.
    """
    match = _SITE.fullmatch(site)
    if not match or match[2] not in SITES or int(match[1]) >= config.layers:
        raise ValueError(
            f"site: wanted 'blocks_<0 .. {config.layers - 1}>/<name>' with a name of "
            f"{', '.join(SITES)}, got {site!r}"
        )
    return int(match[1]), match[2]
