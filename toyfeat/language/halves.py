"""A decoder in two halves at a site, so that the first is run once."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from toyfeat.models.decoder import SITES, Decoder, DecoderConfig
from toyfeat.tap import from_linen
from toyfeat.types import Array, Params, Probed

_SITE = re.compile(r"blocks_(0|[1-9][0-9]*)/(\w+)")
Past = Mapping[str, Array] | None
_KEPT = re.compile(r"blocks_[0-9]+/attn/(key|value)")


class Halves(NamedTuple):
    """A decoder up to a site and from there on.

    Attributes:
      site: where it is cut.
      entry: the site of the residual stream that the second half starts from; for
        residual sites the site itself.
      whole: the probed model, tokens to logits.
      after: ``(params, entry [B, T, D], value [B, T, width], past=None) -> logits
        [B, T, V]``, the rest of the model with ``value`` at the site; with a past all
        of it is of the positions behind.
      seen: ``(params, entry, value) -> logits, {site: [B, T, .]}`` with the keys and
        values of the rest of the model, whose first positions are the past of the
        others.
    """

    site: str
    entry: str
    whole: Probed
    after: Callable[..., Array]
    seen: Callable[[Params, Array, Array], tuple[Array, dict[str, Array]]]


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
    is_resid = name in ("resid_pre", "resid_post")
    start = layer + (name == "resid_post")
    rest = from_linen(Decoder(config, start=start, dtype=dtype))

    def run(
        params: Params, entry: Array, value: Array, past: Past = None
    ) -> tuple[Array, dict[str, Array]]:
        if is_resid:
            return rest(params, (value, past), {})
        return rest(params, (entry, past), {site: lambda _: value})

    def after(params: Params, entry: Array, value: Array, past: Past = None) -> Array:
        return run(params, entry, value, past)[0]

    def seen(
        params: Params, entry: Array, value: Array
    ) -> tuple[Array, dict[str, Array]]:
        logits, acts = run(params, entry, value)
        return logits, {n: x for n, x in acts.items() if _KEPT.fullmatch(n)}

    entry = site if is_resid else f"blocks_{layer}/resid_pre"
    whole = from_linen(Decoder(config, dtype=dtype))
    return Halves(site, entry, whole, after, seen)


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
