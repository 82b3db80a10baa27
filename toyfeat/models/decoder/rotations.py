"""Scaled rotations of models that were trained on longer texts later."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from toyfeat.models.decoder.checks import is_positive, show_value, show_values
from toyfeat.models.decoder.config import DecoderConfig

_WHO = "load_decoder"
_CONTEXT = "original_max_position_embeddings"
# Entries that each type of rotations must have, and others that it may have.
_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _CONTEXT),
    "yarn": ("factor", _CONTEXT),
    "dynamic": ("factor",),
}
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
# YaRN's constants, as the paper has them for Llama (sections 3.2 and 3.4); the span
# keeps the mix defined where both ends are one pair, as in transformers.
_YARN_FAST, _YARN_SLOW, _YARN_SLOPE, _YARN_SPAN = 32.0, 1.0, 0.1, 0.001


def missing_entry(error: KeyError) -> ValueError:
    """Make the error of an entry that a file lacks."""
    return ValueError(f"{_WHO}: config.json has no entry {error}; fetch it again")


def rope_entries(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """Entries on rotations, which newer files keep together.

    If a file has both names, transformers takes the older one and ignores the other.
    Where local layers have rotations of their own, these are those of the others.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if rope := entries.get(name):
            if not isinstance(rope, Mapping):
                raise ValueError(
                    f"{_WHO}: {name} must be entries, got {show_value(rope)}; fetch "
                    "it again"
                )
            return rope.get("full_attention", rope)
    return {}


def scale_rotations(config: DecoderConfig, rope: Mapping[str, Any]) -> DecoderConfig:
    """Set the divisors of rotations of models that were trained on longer texts."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return config
    if kind not in tuple(_NEEDED):  # a list has no hash
        raise ValueError(
            f"{_WHO}: rotations of type {show_value(kind)} are not covered, only "
            f"'default', {', '.join(map(repr, _NEEDED))}; use another model"
        )
    # The entries of the type, checked.
    known = {"original_max_position_embeddings": config.context, **rope}
    try:
        sizes = {name: known[name] for name in _NEEDED[kind]}
    except KeyError as error:
        raise missing_entry(error) from None
    sizes |= {name: rope[name] for name in _OPTIONAL if rope.get(name) is not None}
    if not all(is_positive(size) for size in sizes.values()):
        raise ValueError(
            f"{_WHO}: rotations of type {kind!r} want positive numbers, got "
            f"{show_values(sizes)}; fetch it again"
        )
    if sizes.get("low_freq_factor", 0) >= sizes.get("high_freq_factor", 1):
        raise ValueError(
            f"{_WHO}: rotations of type {kind!r} want high_freq_factor above "
            f"low_freq_factor, got {sizes}; fetch it again"
        )
    factor, pairs = float(sizes["factor"]), config.rotary_dim // 2
    if kind == "linear":  # all rates are divided by the factor
        return replace(config, rotary_divisors=(factor,) * pairs)
    if kind == "dynamic":  # the base grows with the number of positions
        return replace(config, rotary_growth=factor)
    if kind == "yarn":
        is_whole = rope.get("truncate", True) is not False
        divisors = _yarn_divisors(config, sizes, is_whole)
        return replace(
            config, rotary_divisors=divisors, rotary_scale=_yarn_scale(sizes)
        )
    needed = (sizes[name] for name in _NEEDED[kind])
    return replace(config, rotary_divisors=_llama3_divisors(config, *needed))


def _yarn_scale(sizes: Mapping[str, float]) -> float:
    """Factor of cosines and sines of YaRN: ``1 + log(factor) / 10``, by default."""

    def scale(share: float) -> float:
        grown = max(sizes["factor"], 1.0)
        return _YARN_SLOPE * share * math.log(grown) + 1.0

    if "attention_factor" in sizes:
        return float(sizes["attention_factor"])
    if "mscale" in sizes and "mscale_all_dim" in sizes:
        return scale(sizes["mscale"]) / scale(sizes["mscale_all_dim"])
    return scale(1.0)


def _yarn_divisors(
    config: DecoderConfig, sizes: Mapping[str, float], is_whole: bool
) -> tuple[float, ...]:
    """Divisors of the rates of rotation of YaRN.

    Pairs that turn more than ``beta_fast`` times in the old context keep their rate,
    those that turn less than ``beta_slow`` times are divided by the factor, and rates
    between are mixed linearly in the number of the pair.

    References:
      Peng et al. (2023), "YaRN", arXiv 2309.00071, section 3.2.
    """
    width, context = config.rotary_dim, sizes["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        """Number of the pair that turns so often in the old context."""
        length = context / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(config.rotary_base))

    low = pair_of(sizes.get("beta_fast", _YARN_FAST))
    high = pair_of(sizes.get("beta_slow", _YARN_SLOW))
    if is_whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else _YARN_SPAN
    slowed = [min(max((i - low) / span, 0.0), 1.0) for i in range(width // 2)]
    factor = sizes["factor"]
    return tuple(1 / (share / factor + 1 - share) for share in slowed)


def _llama3_divisors(
    config: DecoderConfig, factor: float, low: float, high: float, context: float
) -> tuple[float, ...]:
    """Divisors of the rates of rotation of Llama 3, for a context that has grown.

    Waves that fit into the old context ``high`` times keep their rate, those that fit
    ``low`` times are divided by ``factor``, and rates between are mixed linearly.
    """
    pairs = config.rotary_dim // 2
    wavelengths = [
        2 * math.pi * config.rotary_base ** (i / pairs) for i in range(pairs)
    ]
    shares = [(context / length - low) / (high - low) for length in wavelengths]
    kept = [min(max(share, 0.0), 1.0) for share in shares]
    return tuple(1 / ((1 - k) / factor + k) for k in kept)
