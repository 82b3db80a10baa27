"""Small decoders of every architecture, with the tensors of the oracle."""

from functools import cache
from typing import NamedTuple

import decoder_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as ft
from toyfeat.models.decoder import (
    SITES,
    Decoder,
    DecoderConfig,
    parse_config,
    stack_blocks,
)
from toyfeat.models.decoder.pieces import huggingface_pieces, param_shapes
from toyfeat.models.decoder.weights import Source, assemble_params

KINDS = list(oracle.CONFIGS)
SHAPES = ["gpt2", "neox", "llama"]
BATCH, TIME, LAYERS = 2, 6, 3
TOKENS = np.random.default_rng(1).integers(0, 13, (BATCH, TIME)).astype(np.int32)
LOGITS = "__call__"  # the site of the model itself
EVERY = (LOGITS, *(f"blocks_{i}/{site}" for i in range(LAYERS) for site in SITES))


class Case(NamedTuple):
    given: dict
    tensors: dict
    config: DecoderConfig
    params: dict


@cache
def case(kind):
    given = oracle.CONFIGS[kind]
    tensors = oracle.random_tensors(given)
    name, config = parse_config(given)
    plain = oracle.without_prefix(tensors)
    source = Source(kind, {n: x.shape for n, x in plain.items()}, plain.__getitem__)
    params = assemble_params(
        "test",
        param_shapes(config),
        huggingface_pieces(name, config),
        source,
        dtype=jnp.float32,
        ignored="$^",
    )
    return Case(given, tensors, config, params)


@cache
def stacked(kind):
    """Parameters of the scanned model."""
    return stack_blocks(case(kind).params)


@cache
def wanted(kind):
    given, tensors, _, _ = case(kind)
    return oracle.forward(given, tensors, TOKENS)


@cache
def run(kind, **options):
    """``probed(params, inputs, probes)``, compiled."""
    return jax.jit(ft.from_linen(Decoder(case(kind).config, **options)))


def values(kind, inputs=TOKENS, probes=None, **options):
    """Logits and values of the sites, in numpy."""
    params = stacked(kind) if options.get("scan") else case(kind).params
    return jax.device_get(run(kind, **options)(params, inputs, probes or {}))


@cache
def taps(kind, sites=EVERY, **options):
    """``taps(params, inputs, readout)``, compiled; few sets of sites compile less."""
    model = ft.from_linen(Decoder(case(kind).config, **options))
    return jax.jit(
        lambda params, inputs, readout: ft.tap(
            model, params, inputs, sites=sites, readout=readout
        )
    )


@cache
def tapped(kind):
    """Taps of every site for the loss, in numpy."""
    return jax.device_get(taps(kind)(case(kind).params, TOKENS, LOSS))


def close(found, wanted, tol=1e-5):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tol * np.abs(wanted).max())


def same_taps(found, wanted):
    close(found.acts, wanted.acts)
    close(found.grads, wanted.grads)
    np.testing.assert_array_equal(found.weights, wanted.weights)


def of_block(layer):
    return tuple(f"blocks_{layer}/{site}" for site in SITES)


LOSS = ft.readouts.next_token_loss(TOKENS)
