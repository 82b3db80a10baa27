"""A decoder in two halves at a site, so that the first is run once."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from toyfeat.models.decoder import SITES, Decoder, DecoderConfig
from toyfeat.tap import from_linen
from toyfeat.types import Array, Params, Probed

_SITE = re.compile(r"blocks_(0|[1-9][0-9]*)/(\w+)")


class Halves(NamedTuple):
    """A decoder up to a site and from there on.

    Attributes:
      site: where it is cut.
      entry: the site of the residual stream that the second half starts from; for
        residual sites the site itself.
      whole: the probed model, tokens to logits.
      after: ``(params, entry [B, T, D], value [B, T, width]) -> logits [B, T, V]``,
        the rest of the model with ``value`` at the site.
    """

    site: str
    entry: str
    whole: Probed
    after: Callable[[Params, Array, Array], Array]


def halves(config: DecoderConfig, site: str, *, dtype: Any = jnp.float32) -> Halves:
    """Cut a decoder at a site.

    Args:
      config: of the decoder, whose parameters are unrolled.
      site: ``"blocks_<i>/<name>"`` with a name of
        :data:`toyfeat.models.decoder.SITES`.
      dtype: of its products.

    Returns:
      :class:`Halves`.

    Raises:
      ValueError: for a site that the decoder does not have.

    Example:
      >>> from toyfeat.models.decoder import llama
      >>> config = llama(vocab=5, layers=3, dim=4, heads=1, hidden=6)
      >>> halves(config, "blocks_1/resid_post").entry
      'blocks_1/resid_post'
      >>> halves(config, "blocks_1/mlp_out").entry
      'blocks_1/resid_pre'
    """
    layer, name = checked_site(config, site)
    whole = from_linen(Decoder(config, dtype=dtype))
    if name in ("resid_pre", "resid_post"):
        start = layer + (name == "resid_post")
        from_resid = from_linen(Decoder(config, start=start, dtype=dtype))
        return Halves(
            site, site, whole, lambda p, _, value: from_resid(p, value, {})[0]
        )
    rest = from_linen(Decoder(config, start=layer, dtype=dtype))

    def after(params: Params, entry: Array, value: Array) -> Array:
        return rest(params, entry, {site: lambda _: value})[0]

    return Halves(site, f"blocks_{layer}/resid_pre", whole, after)


def checked_site(config: DecoderConfig, site: str) -> tuple[int, str]:
    """Layer and name of a site.

    Raises:
      ValueError: if the decoder does not have it.
    """
    found = _SITE.fullmatch(site)
    if not found or found[2] not in SITES or int(found[1]) >= config.layers:
        raise ValueError(
            f"site: wanted 'blocks_<0 .. {config.layers - 1}>/<name>' with a name of "
            f"{', '.join(SITES)}, got {site!r}"
        )
    return int(found[1]), found[2]
