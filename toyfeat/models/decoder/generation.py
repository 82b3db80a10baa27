"""Generation of text with keys and values that are kept, under probes."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.checks import check_int, check_key, check_number
from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.models.decoder.module import Decoder
from toyfeat.tap.linen import from_linen
from toyfeat.types import Acts, Array, Params, Probe


class Generated(NamedTuple):
    """Tokens that a model went on with.

    Attributes:
      tokens: ``[B, num]`` int32.
      logits: ``[B, num, V]`` float32, from which each was chosen.
    """

    tokens: Array
    logits: Array


def generate(
    config: DecoderConfig,
    params: Params,
    tokens: Array,
    num: int,
    *,
    probes: Mapping[str, Probe] | None = None,
    mask: Array | None = None,
    temperature: float = 0.0,
    key: Array | None = None,
    heads: bool = False,
    dtype: Any = jnp.float32,
) -> Generated:
    """Continue texts token by token, with probes at every position.

    Keys and values of earlier positions are kept, so that each token costs one
    position.  The result is that of running the whole text again for every token, with
    the same probes.

    Args:
      config: of the decoder.
      params: its variables.
      tokens: ``[B, T]`` int, what the texts begin with.
      num: number of tokens to add.
      probes: by site: an array that is added at every position (``[D]``, or
        ``[B, 1, D]``), or a function of the activations that treats positions alike.
        Steering along a direction is ``{"blocks_3/resid_post": 4.0 * direction}``.
      mask: ``[B, T]``, 1 at tokens and 0 at padding, which must be on the left.
      temperature: 0 takes the most likely token, others draw from the logits divided
        by it.
      key: for drawing.
      heads: as of :class:`Decoder`, for probes at the sites of heads.
      dtype: as of :class:`Decoder`.

    Returns:
      :class:`Generated`.

    Raises:
      ValueError: for a number, temperature, key or probe that does not fit, for more
        positions than a model with learned positions has, or than the context of one
        with dynamic rotations.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from toyfeat.models.decoder import Decoder, llama
      >>> config = llama(vocab=11, layers=2, dim=8, heads=2, hidden=12)
      >>> tokens = jnp.arange(6).reshape(2, 3)
      >>> params = Decoder(config).init(jax.random.key(0), tokens)
      >>> steering = {"blocks_0/resid_post": jnp.ones(8)}
      >>> generate(config, params, tokens, 4, probes=steering).tokens.shape
      (2, 4)
    """
    num = check_int("generate", "num", num)
    check_number("generate", "temperature", temperature, least=0.0)
    if temperature:
        check_key("generate", key)
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    _check_text(config, tokens, mask, num)
    probes = {} if probes is None else dict(probes)
    _check_probes(probes)
    probed = from_linen(Decoder(config, dtype=dtype, heads=heads))
    sites = _cached_sites(config, heads)
    choose = partial(_choose, temperature=temperature)

    def run(inputs: Any) -> tuple[Any, Acts]:
        return probed(params, inputs, probes)

    # The prompt at once, then one token at a time.
    carry = _read_prompt(run, sites, tokens, mask, num)
    step = partial(_add_token, run, sites, choose)
    keys = jax.random.split(key, num) if temperature and key is not None else None
    first = None if keys is None else keys[:-1]
    (logits, _, _), (chosen, seen) = jax.lax.scan(step, carry, first, length=num - 1)
    last = choose(logits, None if keys is None else keys[-1])
    return Generated(
        jnp.concatenate([jnp.moveaxis(chosen, 0, 1), last[:, None]], axis=1),
        jnp.concatenate([jnp.moveaxis(seen, 0, 1), logits[:, None]], axis=1),
    )


class _Carry(NamedTuple):
    """State between two tokens.

    The oldest column of the kept keys is padding and makes room for a new one, so that
    all steps are one program.

    Attributes:
      logits: ``[B, V]``, from which the next token is chosen.
      past: keys and values of all positions so far, by site.
      mask: ``[B, S]`` bool, false at padding.
    """

    logits: Array
    past: dict[str, Array]
    mask: Array


def _read_prompt(
    run: Any, sites: dict[str, str], tokens: Array, mask: Array, num: int
) -> _Carry:
    """Run the prompt, and make room for the tokens that follow but the last."""
    logits, acts = run((tokens, mask))
    padding = ((0, 0), (num - 1, 0))
    past = {site: _rows(acts[name], padding) for site, name in sites.items()}
    return _Carry(logits[:, -1], past, jnp.pad(mask, padding))


def _add_token(
    run: Any, sites: dict[str, str], choose: Any, carry: _Carry, key: Array | None
) -> tuple[_Carry, tuple[Array, Array]]:
    """Choose a token and run its position; returns it beside the logits it is from."""
    logits, past, mask = carry
    token = choose(logits, key)
    new_mask = jnp.concatenate([mask, jnp.ones_like(mask[:, :1])], axis=1)
    new, acts = run((token[:, None], new_mask, past))
    past = {
        site: jnp.concatenate([past[site], _rows(acts[name])], axis=1)[:, 1:]
        for site, name in sites.items()
    }
    return _Carry(new[:, -1], past, new_mask[:, 1:]), (token, logits)


def _choose(logits: Array, key: Array | None, *, temperature: float) -> Array:
    """Choose the next token ``[B]``, the most likely one without a key."""
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def _cached_sites(config: DecoderConfig, heads: bool) -> dict[str, str]:
    """Map the sites of a past to those that hold its values after all probes."""
    return {
        f"blocks_{i}/attn/{name}": f"blocks_{i}/attn/{name[0] if heads else name}"
        for i in range(config.layers)
        for name in ("key", "value")
    }


def _rows(act: Array, padding: Any = ((0, 0), (0, 0))) -> Array:
    """Flatten heads to rows ``[B, T, kv_heads * head_dim]`` and pad the positions."""
    rows = act.reshape((*act.shape[:2], -1))
    return jnp.pad(rows, (*padding, (0, 0)))


def _check_text(config: DecoderConfig, tokens: Array, mask: Array, num: int) -> None:
    """Raise for padding on the right, or for a text that outgrows its rotations."""
    if not isinstance(mask, Tracer) and not np.asarray(mask)[:, -1].all():
        raise ValueError(
            "generate: padding must be on the left, got rows that end in it; move the "
            "tokens to the end"
        )
    length = tokens.shape[1] + num
    if config.rotary_growth is not None and length > config.context:
        raise ValueError(
            "generate: dynamic rotations turn all positions anew beyond the context of "
            f"{config.context}, got {length} positions; generate fewer tokens"
        )


def _check_probes(probes: Mapping[str, Probe]) -> None:
    """Raise for an array that has values for more than one position."""
    for site, probe in probes.items():
        shape = jnp.shape(probe) if not callable(probe) else ()
        # Positions stand before the width, or before the heads and their width.
        axis = 3 if site.rpartition("/")[2] in ("q", "k", "v", "z") else 2
        if len(shape) >= axis and shape[-axis] != 1:
            raise ValueError(
                f"generate: a probe must be the same at every position, got shape "
                f"{shape} at {site!r}; give [D] or [B, 1, D], "
                "of heads [heads, head_dim]"
            )
