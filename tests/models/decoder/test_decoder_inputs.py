"""Padding and ids; the oracle runs every row alone, in float64."""

from functools import cache

import decoder_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import (
    LAYERS,
    SHAPES,
    TIME,
    TOKENS,
    case,
    close,
    of_block,
    taps,
    values,
)

import toyfeat as ft
from toyfeat.models.decoder import SITES, Decoder, gpt2

# Four and five tokens of six: where they are, by the side of the padding.
PLACES = {
    "left": ([2, 3, 4, 5], [1, 2, 3, 4, 5]),
    "right": ([0, 1, 2, 3], [0, 1, 2, 3, 4]),
    "both": ([1, 2, 3, 4], [0, 1, 2, 3, 4]),
    "gaps": ([0, 2, 3, 5], [0, 1, 2, 4, 5]),
}
ROWS = [TOKENS[i, : len(place)] for i, place in enumerate(PLACES["left"])]
PAD = 7


def padded(side, pad=PAD):
    tokens, mask = np.full((2, TIME), pad), np.zeros((2, TIME), int)
    for i, place in enumerate(PLACES[side]):
        tokens[i, place], mask[i, place] = ROWS[i], 1
    return tokens.astype(np.int32), mask.astype(np.int32)


def close_at_tokens(side, found, rows, tol=1e-5):
    for i, place in enumerate(PLACES[side]):
        close(np.asarray(found)[i, place], rows[i], tol)


@cache
def alone(kind):
    """Logits and values of every row without padding."""
    given, tensors, _, _ = case(kind)
    results = [oracle.forward(given, tensors, row[None]) for row in ROWS]
    logits = [logits[0] for logits, _ in results]
    names = results[0][1]
    return logits, {name: [acts[name][0] for _, acts in results] for name in names}


@cache
def gradients_alone(kind, site):
    given, tensors, _, _ = case(kind)
    return [oracle.gradients(given, tensors, row, 1, site) for row in ROWS]


@pytest.mark.slow_cases
@pytest.mark.parametrize("side", PLACES)
@pytest.mark.parametrize("kind", SHAPES)
def test_a_padded_row_has_the_values_that_it_has_alone(kind, side):
    logits, expected = alone(kind)
    found, acts = values(kind, padded(side))
    assert np.isfinite(found).all()
    close_at_tokens(side, found, logits)
    for (layer, site), rows in expected.items():
        close_at_tokens(side, acts[f"blocks_{layer}/{site}"], rows)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2"])
def test_a_padded_row_has_the_gradients_that_it_has_alone(kind, side):
    tokens, mask = padded(side)
    loss = ft.readouts.next_token_loss(tokens, mask=mask)
    found = jax.device_get(taps(kind)(case(kind).params, (tokens, mask), loss))
    for site in SITES:
        one = found[f"blocks_1/{site}"]
        grads = one.grads.reshape(2, TIME, -1)
        close_at_tokens(side, grads, gradients_alone(kind, site), 2e-5)
        assert not grads[mask == 0].any()
        # The first token and the last are no examples.
        weights = one.weights.reshape(2, TIME)
        expected = [[0.0] + [1.0] * (len(row) - 2) + [0.0] for row in ROWS]
        close_at_tokens(side, weights, [np.array(row) for row in expected])


@pytest.mark.slow_cases
@pytest.mark.parametrize("mask", [np.bool_, np.float32])
def test_masks_of_any_dtype(mask):
    tokens, ones = padded("left")
    model, params = Decoder(case("gpt2").config), case("gpt2").params
    found = model.apply(params, tokens, ones.astype(mask))
    close_at_tokens("left", found, alone("gpt2")[0])


def test_padding_and_a_scan_over_the_layers():
    found = values("llama", padded("left"), scan=True)[0]
    close_at_tokens("left", found, alone("llama")[0])


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padding_behind_a_past_and_from_a_residual_stream(kind):
    """The mask is then of the positions of the past too."""
    tokens, mask = padded("left")
    acts = values(kind, (tokens, mask))[1]
    logits = np.zeros((2, TIME, 13))
    for i, place in enumerate(PLACES["left"]):
        logits[i, place] = alone(kind)[0][i]
    blocks = [f"blocks_{i}/attn/{x}" for i in range(LAYERS) for x in ("key", "value")]
    past = {site: acts[site][:, :3] for site in blocks}
    found = values(kind, (tokens[:, 3:], mask, past))[0]
    close(found, logits[:, 3:])
    resid = acts["blocks_1/resid_pre"]
    found = values(kind, (resid, mask), start=1)[0]
    close_at_tokens("left", found, alone(kind)[0])


@pytest.mark.parametrize("pad", [-1, 13, -100])
def test_ids_of_padding_are_not_read(pad):
    """Neither where they can be seen nor under jit."""
    inputs, params = padded("left", pad), case("gpt2").params
    expected = values("gpt2", padded("left"))[0]
    found = values("gpt2", inputs)[0]
    np.testing.assert_array_equal(found, expected)
    close(Decoder(case("gpt2").config).apply(params, *inputs), expected)


def test_a_row_of_padding_is_finite():
    tokens, mask = padded("left")
    mask[0] = 0
    loss = ft.readouts.next_token_loss(tokens, mask=mask)
    found = jax.device_get(taps("gpt2")(case("gpt2").params, (tokens, mask), loss))
    for site in of_block(1):
        assert np.isfinite(found[site].acts).all()
        assert not found[site].grads.reshape(2, -1)[0].any()


def test_padding_in_bfloat16():
    found = values("llama", padded("left"), dtype=jnp.bfloat16)[0]
    close_at_tokens("left", found, alone("llama")[0], 0.06)


# Ids.


@pytest.mark.slow_cases
@pytest.mark.parametrize("last", [-1, -100, 13, 502])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ids_outside_of_the_vocabulary(kind, last):
    params, model = case(kind).params, Decoder(case(kind).config)
    tokens = TOKENS.copy()
    tokens[1, 4] = last
    match = rf"^Decoder: tokens must be ids in 0 \.\. 12, got {last} in row 1 at pos"
    with pytest.raises(ValueError, match=match):
        model.apply(params, tokens)
    with pytest.raises(ValueError, match=match):
        ft.from_linen(model)(params, (tokens, np.ones_like(tokens)), {})
    # Under jit they cannot be seen; no word takes their place.
    logits = values(kind, tokens)[0]
    assert np.isnan(logits[1]).all()
    np.testing.assert_array_equal(logits[0], values(kind)[0][0])


@cache
def small():
    """A model whose vocabulary is no number of short dtypes, and logits of int32."""
    config = gpt2(vocab=300, layers=1, dim=2, heads=1, context=3, tied=False)
    tokens = np.asarray([[0, 99, 127]], np.int32)
    params = Decoder(config).init(jax.random.key(0), tokens)
    return Decoder(config), params, Decoder(config).apply(params, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_ids_of_any_dtype(dtype):
    """Also where the size of the vocabulary is no number of the dtype."""
    model, params, expected = small()
    found = model.apply(params, jnp.asarray([[0, 99, 127]], dtype))
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found).all()


# Masks that do not fit.

ONES = np.ones((2, TIME), np.int32)


def changed(value, mask=ONES):
    mask = mask.copy()
    mask[0, 0] = value
    return mask


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (
            ONES[:, 1:],
            r"mask must be of all positions, 0 of the past .* \(2, 5\)",
        ),
        (ONES[:1], r"shape \(2, 6\), got \(1, 6\)"),
        (ONES[0], r"shape \(2, 6\), got \(6,\)"),
        (
            {"blocks_0/attn/key": ONES},
            r"mask must be an array .* a mapping; .*past=",
        ),
        (changed(2), r"1 at tokens and 0 at padding, got values \[1 2\]"),
        (changed(-np.inf, np.zeros((2, TIME), np.float32)), r"-inf.* scores"),
        (changed(np.nan, ONES.astype(np.float32)), r"1 at tokens .* nan"),
    ],
)
def test_masks_that_do_not_fit(mask, match):
    model = Decoder(case("gpt2").config)
    with pytest.raises(ValueError, match=rf"^Decoder: the .*{match}"):
        model.apply(case("gpt2").params, TOKENS, mask)


@pytest.mark.parametrize("past", [ONES, [ONES]])
def test_a_past_that_is_no_mapping(past):
    with pytest.raises(ValueError, match=r"^Decoder: the past must map sites to keys"):
        Decoder(case("gpt2").config).apply(case("gpt2").params, TOKENS, None, past)


@pytest.mark.parametrize("start", ["1", 1.5])
def test_a_start_that_is_no_layer(start):
    with pytest.raises(ValueError, match=r"^Decoder: start must be in 0 .* got .*1"):
        Decoder(case("gpt2").config, start=start).apply(case("gpt2").params, TOKENS)


def test_a_mask_behind_a_past_is_of_the_past_too():
    past = {
        f"blocks_{i}/attn/{name}": np.zeros((2, 3, 12), np.float32)
        for i in range(LAYERS)
        for name in ("key", "value")
    }
    with pytest.raises(ValueError, match=r"3 of the past and 3 of .*\(2, 6"):
        Decoder(case("gpt2").config).apply(
            case("gpt2").params, TOKENS[:, :3], ONES[:, :3], past
        )
