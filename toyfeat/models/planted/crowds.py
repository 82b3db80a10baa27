"""A task with more features than dimensions, most of them rare."""

from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.models.planted import heads
from toyfeat.models.planted.heads import unit
from toyfeat.models.planted.task import Task, Truth
from toyfeat.types import Array

# Inputs on which frequencies are counted: .001 is counted 20 times, to a fifth.
_COUNTED = 20_000


def overcomplete(
    key: Array,
    *,
    dim: int = 64,
    features: int = 160,
    most: float = 0.03,
    least: float = 0.002,
    threshold: float = 0.3,
) -> Task:
    """Plant more features than dimensions, with rates that fall as a power of the rank.

    Every feature is written and read along one random direction, so what is written for
    one is read a little by all others; the threshold silences most of that.

    Args:
      key: random key of the task.
      dim: width ``D``.
      features: how many, at least 2.
      most: probability of the most frequent feature to be active.
      least: probability of the rarest one, at most ``most``.
      threshold: under which a reader is silent, in 0 .. 0.5; codes are .5 at least.

    Returns:
      :class:`toyfeat.models.planted.Task`, the most frequent feature first.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.

    References:
      Zipf's law for the rates, as of the latents of a language model in
      SynthSAEBench's worlds (:func:`toyfeat.worlds.synth_sae_bench`).
    """
    heads.check_ints("overcomplete", dim=dim, features=features)
    heads.check_threshold("overcomplete", threshold)
    if not (dim >= 2 and features >= 2 and 0 < least <= most <= 1):
        raise ValueError(
            "overcomplete: wanted dim >= 2, features >= 2 and 0 < least <= most <= 1, "
            f"got dim {dim}, features {features}, least {least}, most {most}"
        )
    rows_key, head_key, count_key = jax.random.split(key, 3)
    readers = unit(jax.random.normal(rows_key, (features, dim)))

    # rank ** -a, from most to least.
    ranks = jnp.arange(1.0, features + 1)
    exponent = jnp.log(most / least) / jnp.log(float(features))
    rates = most * ranks**-exponent
    params = heads.head(head_key, readers, threshold)
    params |= {"writers": readers}

    # Readers are active a little more often than what is written for them.
    draw = partial(_rare_codes, rates)
    codes = draw(count_key, _COUNTED)
    active = heads.features(params, heads.write_codes(params, codes)) > 0
    frequency = jnp.mean(active, axis=0, dtype=readers.dtype)
    return heads.make_task(
        "overcomplete",
        heads.write_codes,
        params,
        draw,
        Truth(readers=readers, writers=readers, frequency=frequency),
        about=f"{features} features in {dim} dimensions, active in {most:g} to "
        f"{least:g} of the inputs.",
        limits="Readers are known up to their lengths; so are writers, up to what they "
        "share with other writers. A reader that no sampled input activates is not.",
    )


def _rare_codes(rates: Array, key: Array, num: int) -> Array:
    return heads.sparse_codes(key, (num, len(rates)), rates[None, :])
