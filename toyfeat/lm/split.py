"""Split a decoder at a site, and tap held-out text there.

Scores of replacements take both: the taps, and the part of the model behind the site.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.lm.collect import ReadoutOf, exclude_massive
from toyfeat.lm.label_gradients import bind_readout
from toyfeat.models.decoder import SITES, Decoder, DecoderConfig
from toyfeat.tap import from_linen, readouts, tap
from toyfeat.types import Array, Params, Probed, Taps

_SITE = re.compile(r"blocks_(0|[1-9][0-9]*)/(\w+)")
_CACHED = re.compile(r"blocks_[0-9]+/attn/(key|value)")
Cache = Mapping[str, Array] | None
"""Keys and values of the first positions by site (``None``: all positions are run)."""

# Scores are small differences of large losses, so that products of matrices get all
# the precision that a device has.
precise = jax.default_matmul_precision("highest")


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
      run_alone: ``(params, entry, value, acts) -> logits``, ``run`` with the keys and
        values that ``acts`` at the site have: every position attends to a window
        without replacements, its own key and value included.
      run_acts: ``(params, entry, value) -> {site: [B, T, .]}``, the residual streams
        after the blocks of the second part.
    """

    site: str
    entry: str
    model: Probed
    run: Callable[..., Array]
    run_with_cache: Callable[[Params, Array, Array], tuple[Array, dict[str, Array]]]
    run_alone: Callable[[Params, Array, Array, Array], Array]
    run_acts: Callable[[Params, Array, Array], dict[str, Array]]


class HeldOut(NamedTuple):
    """Held-out text with the taps of a site.

    Attributes:
      tokens: ``[num, T]``.
      entry: ``[num, T, D]``, the residual stream that the second part starts from.
      acts: ``[num, T, width]``, at the site.
      grads: ``[num, T, K, width]``, first of the summed cross-entropy of a window,
        then of the extra readout.
      weights: ``[num, T]``, 0 at the first and the last position and where
        activations are massive.
      mean: ``[width]``, mean over the training text of the activations that count.
    """

    tokens: np.ndarray
    entry: np.ndarray
    acts: np.ndarray
    grads: np.ndarray
    weights: np.ndarray
    mean: np.ndarray


class _TappedBatch(NamedTuple):
    """Taps of one batch of windows, fields as in :class:`HeldOut`."""

    entry: np.ndarray
    acts: np.ndarray
    grads: np.ndarray
    weights: np.ndarray


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
    run_probed = partial(_run_probed, second_part, site, is_residual)

    def run(params: Params, entry: Array, value: Array, past: Cache = None) -> Array:
        return run_probed(params, entry, value, past)[0]

    def run_with_cache(
        params: Params, entry: Array, value: Array
    ) -> tuple[Array, dict[str, Array]]:
        logits, acts = run_probed(params, entry, value)
        return logits, {n: x for n, x in acts.items() if _CACHED.fullmatch(n)}

    def run_alone(params: Params, entry: Array, value: Array, acts: Array) -> Array:
        _, cache = run_with_cache(params, entry, acts)
        return run_probed(params, entry, value, None, cache)[0]

    def run_acts(params: Params, entry: Array, value: Array) -> dict[str, Array]:
        _, acts = run_probed(params, entry, value)
        return {n: x for n, x in acts.items() if n.endswith("resid_post") and n != site}

    return SplitDecoder(
        site=site,
        entry=site if is_residual else f"blocks_{layer}/resid_pre",
        model=from_linen(Decoder(config, dtype=dtype)),
        run=run,
        run_with_cache=run_with_cache,
        run_alone=run_alone,
        run_acts=run_acts,
    )


def _run_probed(
    second_part: Probed,
    site: str,
    is_residual: bool,
    params: Params,
    entry: Array,
    value: Array,
    past: Cache = None,
    overwritten: Mapping[str, Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Run the second part with a value at the site, and others overwritten."""
    probes: dict[str, Any] = {
        name: lambda _, x=x: x for name, x in (overwritten or {}).items()
    }
    # At a residual site the value is what the second part starts from; any other site
    # lies inside the first block of it and is overwritten there.
    if is_residual:
        return second_part(params, (value, None, past), probes)
    probes[site] = lambda _: value
    return second_part(params, (entry, None, past), probes)


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


@precise
def tap_held_out(
    split: SplitDecoder,
    params: Params,
    tokens: np.ndarray,
    mean: Array,
    *,
    massive: float = 10.0,
    batch: int = 8,
    extra_readout: ReadoutOf | None = None,
) -> HeldOut:
    """Tap held-out windows once, for all replacements of a site.

    Args:
      split: the decoder split at the site.
      params: parameters of the decoder.
      tokens: ``[num, T]``, ``num`` a multiple of ``batch``.
      mean: ``[width]``, mean of the activations over the training text.
      massive: as of :func:`toyfeat.lm.collect.collect`.
      batch: windows at a time.
      extra_readout: another readout, whose gradients follow those of the loss.

    Returns:
      :class:`HeldOut`, in host memory: ``4 num T (width + K width + D)`` bytes.

    Raises:
      ValueError: if windows do not fill the batches, or have no position between
        the first and the last.
    """
    tokens = _check_windows(np.asarray(tokens), batch)
    # Batch by batch on the device, all of them together on the host.
    tap_batch = _make_batch_tap(split, massive, extra_readout)
    batches = [
        tap_batch(params, tokens[start : start + batch], start)
        for start in range(0, len(tokens), batch)
    ]
    entry, acts, grads, weights = (
        np.concatenate(parts) for parts in zip(*batches, strict=True)
    )
    return HeldOut(
        tokens=tokens,
        entry=entry,
        acts=acts,
        grads=grads,
        weights=weights,
        mean=np.asarray(mean),
    )


def _check_windows(tokens: np.ndarray, batch: int) -> np.ndarray:
    """Raise unless the windows fill batches and have positions that count."""
    if not len(tokens) or len(tokens) % batch:
        raise ValueError(
            f"tap_held_out: wanted whole batches of {batch} windows, got {len(tokens)}"
        )
    if tokens.shape[1] < 3:
        raise ValueError(
            "tap_held_out: the first and the last position do not count, wanted "
            f"windows of at least 3 tokens, got {tokens.shape[1]}"
        )
    return tokens


def _make_batch_tap(
    split: SplitDecoder, massive: float, extra_readout: ReadoutOf | None
) -> Callable[[Params, np.ndarray, int], _TappedBatch]:
    """Compile ``(params, windows [B, T], index of the first) -> _TappedBatch``."""
    sites = tuple(dict.fromkeys((split.entry, split.site)))

    @jax.jit
    def tap_sites(
        params: Params, tokens: Array, first: Array
    ) -> tuple[Array, Taps, Array | None]:
        # The loss taps both sites; massive activations of the site get weight 0.
        loss = readouts.next_token_loss(tokens)
        taps = tap(split.model, params, tokens, sites=sites, readout=loss)
        at_site = exclude_massive(taps[split.site], tokens.shape[1], massive)
        # The extra readout taps the site alone, for its gradients.
        extra_grads = None
        if extra_readout is not None:
            model, readout = bind_readout(
                split.model, extra_readout, params, tokens, first
            )
            extra = tap(model, params, tokens, sites=(split.site,), readout=readout)
            extra_grads = extra[split.site].grads
        return taps[split.entry].acts, at_site, extra_grads

    def tap_batch(params: Params, windows: np.ndarray, first: int) -> _TappedBatch:
        entry, at_site, extra_grads = tap_sites(params, jnp.asarray(windows), first)
        by_readout = [at_site.grads, extra_grads]
        grads = [np.asarray(x) for x in by_readout if x is not None]

        def by_window(rows: Array | np.ndarray) -> np.ndarray:
            return np.asarray(rows).reshape(*windows.shape, *rows.shape[1:])

        return _TappedBatch(
            entry=by_window(entry),
            acts=by_window(at_site.acts),
            grads=by_window(np.concatenate(grads, axis=1)),
            weights=by_window(at_site.weights),
        )

    return tap_batch
