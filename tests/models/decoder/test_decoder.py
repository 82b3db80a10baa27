from dataclasses import replace
from functools import cache, partial

import decoder_oracle as oracle
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import (
    BATCH,
    KINDS,
    LAYERS,
    LOGITS,
    LOSS,
    SHAPES,
    TIME,
    TOKENS,
    case,
    close,
    of_block,
    run,
    same_taps,
    stacked,
    tapped,
    taps,
    values,
    wanted,
)

import toyfeat as ft
from toyfeat.models.decoder import (
    SITES,
    Decoder,
    gpt2,
    llama,
    neox,
    stack_blocks,
    unstack_blocks,
)
from toyfeat.models.decoder.attention import causal_attention

ALL_KEPT = [f"blocks_{i}/attn/{n}" for i in range(LAYERS) for n in ("key", "value")]


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_sites_are_those_of_the_architecture(kind):
    logits, expected = wanted(kind)
    found = tapped(kind)
    assert found[LOGITS].acts.dtype == np.float32
    close(found[LOGITS].acts.reshape(logits.shape), logits)
    for (layer, site), value in expected.items():
        close(found[f"blocks_{layer}/{site}"].acts.reshape(value.shape), value)


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", SHAPES)
def test_a_token_changes_no_logits_before_it(kind):
    clean = values(kind)[0]
    for t in range(TIME):
        changed = TOKENS.copy()
        changed[:, t] = (TOKENS[:, t] + 1) % 13
        logits = values(kind, changed)[0]
        close(logits[:, :t], clean[:, :t], 1e-6) if t else None
        moved = np.abs(logits - clean)[:, t:].max(axis=-1)
        assert moved.min() > 1e-3, t  # and all of the later ones


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_central_differences(kind):
    given, tensors, _, _ = case(kind)
    found = tapped(kind)
    for name, site in zip(of_block(1), SITES, strict=True):
        each = [oracle.gradients(given, tensors, row, 1, site) for row in TOKENS]
        grads = found[name].grads.reshape(np.shape(each))
        close(grads, each, 2e-5)


@pytest.mark.slow
def test_gradients_of_every_logit_are_jacobians_per_example():
    config, params = replace(case("llama").config, layers=2), case("llama").params
    site, few = "blocks_1/resid_pre", TOKENS[:, :3]
    model = ft.from_linen(Decoder(config))

    @jax.jit
    def both(params):
        found = ft.tap(model, params, few, sites=site, readout=ft.readouts.jacobian())[
            site
        ]
        rest = Decoder(config, start=1)
        acts = model(params, few, {})[1][site]
        each = jax.vmap(jax.jacrev(lambda a: rest.apply(params, a[None])[0]))(acts)
        return found.grads, each

    # [B T, K, D] and [B, T, V, T, D]
    grads, each = jax.device_get(both(params))
    each = np.moveaxis(each.reshape(BATCH, -1, 3, config.dim), 1, 2)
    close(grads, each.reshape(grads.shape))


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", SHAPES)
def test_array_probes_are_added_at_every_site(kind):
    given, tensors, _, _ = case(kind)
    for site in SITES:
        delta = np.linspace(-1, 1, wanted(kind)[1][1, site].shape[-1])
        logits, expected = oracle.forward(
            given, tensors, TOKENS, {(1, site): lambda x, d=delta: x + d}
        )
        found, acts = values(kind, probes=probes_of(kind, site, delta))
        close(found, logits)
        close(acts[f"blocks_1/{site}"], expected[1, site])
        close(acts["blocks_2/mlp_out"], expected[2, "mlp_out"])


def probes_of(kind, site, delta):
    """A probe at a site of block 1, and zeros at its others: one program for all."""
    zeros = {s: np.zeros(wanted(kind)[1][1, s].shape[-1], np.float32) for s in SITES}
    probes = zeros | {site: delta.astype(np.float32)}
    return {f"blocks_1/{s}": probe for s, probe in probes.items()}


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", SHAPES)
def test_functions_are_spliced_in_at_every_site(kind):
    given, tensors, config, params = case(kind)
    model = ft.from_linen(Decoder(config))

    @jax.jit
    def spliced(params, scales):
        probes = {
            f"blocks_1/{site}": partial(lambda scale, act: scale * act, scales[site])
            for site in SITES
        }
        return model(params, TOKENS, probes)

    for site in SITES:
        edits = {(1, site): lambda x: 0.5 * x}
        logits, expected = oracle.forward(given, tensors, TOKENS, edits)
        scales = dict.fromkeys(SITES, np.float32(1)) | {site: np.float32(0.5)}
        found, acts = spliced(params, scales)
        close(found, logits)
        close(acts[f"blocks_1/{site}"], expected[1, site])


def test_every_site_of_every_block_has_its_width():
    config, params = case("llama").config, case("llama").params
    shapes = ft.site_shapes(run("llama"), params, TOKENS)
    for layer in range(LAYERS):
        for site in SITES:
            width = config.hidden if site == "mlp_hidden" else config.dim
            assert shapes[f"blocks_{layer}/{site}"].shape == (BATCH, TIME, width)
    names = ft.site_shapes(run("llama", scan=True), stacked("llama"), TOKENS)
    assert {f"blocks/{s}@{i}" for s in SITES for i in range(LAYERS)} <= names.keys()


@pytest.mark.slow
def test_examples_do_not_mix():
    model = ft.from_linen(Decoder(replace(case("gpt2").config, layers=1)))
    ft.check_no_mixing(jax.jit(model), case("gpt2").params, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_a_scan_over_the_layers_is_the_unrolled_model(kind):
    names = tuple(f"blocks/mlp_out@{i}" for i in range(LAYERS))
    found = taps(kind, names, scan=True)(stacked(kind), TOKENS, LOSS)
    for i in range(LAYERS):
        same_taps(found[names[i]], tapped(kind)[f"blocks_{i}/mlp_out"])
    delta = np.linspace(-1, 1, case(kind).config.dim, dtype=np.float32)
    logits = values(kind, probes={names[1]: delta}, scan=True)[0]
    close(logits, values(kind, probes=probes_of(kind, "mlp_out", delta))[0])


def test_a_scan_takes_no_functions():
    model = ft.from_linen(Decoder(case("llama").config, scan=True))
    with pytest.raises(ValueError, match=r"blocks/mlp_out@1"):
        model(stacked("llama"), TOKENS, {"blocks/mlp_out@1": jnp.tanh})


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", SHAPES)
def test_parameters_are_stacked_and_back(kind):
    config, params = case(kind).config, case(kind).params
    equal_trees(unstack_blocks(stacked(kind)), params)
    for given, options in ((params, {}), (stacked(kind), {"scan": True})):
        init = partial(Decoder(config, **options).init, jax.random.key(0))
        shapes = jax.eval_shape(init, TOKENS)
        equal_trees(jax.tree.map(jnp.shape, given), jax.tree.map(jnp.shape, shapes))


def equal_trees(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_more_than_ten_layers_are_stacked_in_order():
    params = {"params": {f"blocks_{i}": {"x": np.float32(i)} for i in range(12)}}
    assert stack_blocks(params)["params"]["blocks"]["x"].tolist() == list(range(12))
    equal_trees(unstack_blocks(stack_blocks(params)), params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_the_rest_of_the_model_runs_from_the_residual_stream(kind):
    resid = wanted(kind)[1][1, "resid_pre"].astype(np.float32)
    sites = (LOGITS, *of_block(1), *of_block(2))
    found = taps(kind, sites, start=1)(case(kind).params, resid, LOSS)
    for site in sites:
        same_taps(found[site], tapped(kind)[site])


@pytest.mark.slow_cases
@pytest.mark.parametrize("scan", [False, True])
def test_the_first_start_is_what_the_tokens_become(scan):
    resid = wanted("gpt2")[1][0, "resid_pre"].astype(np.float32)
    close(values("gpt2", resid, start=0, scan=scan)[0], wanted("gpt2")[0])


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("scan", [False, True])
def test_the_last_start_is_the_norm_and_the_logits(kind, scan):
    last = wanted(kind)[1][LAYERS - 1, "resid_post"].astype(np.float32)
    found, acts = values(kind, last, start=LAYERS, scan=scan)
    close(found, wanted(kind)[0])
    assert not [site for site in acts if site.startswith("blocks")]


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", SHAPES)
def test_bfloat16_is_close(kind):
    logits, acts = values(kind, dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    close(logits, wanted(kind)[0], 0.06)
    assert np.abs(logits - wanted(kind)[0]).max() > 1e-4  # it is used
    for site in SITES:
        assert acts[f"blocks_1/{site}"].dtype == jnp.bfloat16
        value = np.asarray(acts[f"blocks_1/{site}"], np.float32)
        close(value, wanted(kind)[1][1, site], 0.06)


def halved(kind):
    return jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), case(kind).params)


@cache
def tapped_in_bfloat16():
    model = taps("llama", (LOGITS, *of_block(1)), dtype=jnp.bfloat16)
    return jax.device_get(model(halved("llama"), TOKENS, LOSS))


@pytest.mark.slow
def test_bfloat16_parameters_run_in_either_type():
    params = halved("llama")
    rounded = jax.tree.map(lambda x: x.astype(np.float32), params)
    exact = np.asarray(run("llama")(rounded, TOKENS, {})[0])
    close(run("llama")(params, TOKENS, {})[0], exact)
    found = tapped_in_bfloat16()[LOGITS].acts
    assert found.dtype == jnp.float32
    close(found.reshape(exact.shape), exact, 0.06)


@pytest.mark.slow
def test_bfloat16_gradients_are_close():
    for site in of_block(1):
        grads = tapped_in_bfloat16()[site].grads
        assert grads.dtype == jnp.bfloat16
        close(grads.astype(np.float32), tapped("llama")[site].grads, 0.1)


@cache
def attention_inputs():
    @jax.jit
    def drawn():
        keys = jax.random.split(jax.random.key(0), 4)
        return [jax.random.normal(key, (2, 16, 2, 8)) for key in keys]

    return jax.device_get(drawn())


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 5.0, 20.0])
def test_what_all_keys_have_in_common_costs_bfloat16_no_gradients(shift):
    """A bias of the keys, and a smaller one of the values."""
    query, key, value, cotangent = attention_inputs()
    given = query, key + shift, value + shift / 5

    def pulled(dtype):
        typed = [jnp.asarray(x.astype(dtype)) for x in (*given, cotangent)]
        mixed, pull = jax.vjp(causal_attention, *typed[:3])
        return jax.device_get((mixed, *pull(typed[3])))

    for found, exact in zip(pulled(jnp.bfloat16), pulled(jnp.float32), strict=True):
        assert found.dtype == jnp.bfloat16
        error = found.astype(np.float32) - exact
        assert np.linalg.norm(error) < 0.05 * np.linalg.norm(exact)


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", SHAPES)
def test_forward_mode_is_the_transpose_of_reverse_mode(kind):
    params = case(kind).params
    model = Decoder(case(kind).config, start=0)
    rng = np.random.default_rng(0)
    resid, tangent = rng.normal(size=(2, 2, 5, model.config.dim)).astype(np.float32)
    cotangent = rng.normal(size=(2, 5, 13)).astype(np.float32)

    @jax.jit
    def both(resid, tangent, cotangent):
        _, pull = jax.vjp(partial(model.apply, params), resid)
        pushed = jax.jvp(partial(model.apply, params), (resid,), (tangent,))[1]
        return jnp.vdot(pushed, cotangent), jnp.vdot(tangent, pull(cotangent)[0])

    pushed, pulled = both(resid, tangent, cotangent)
    np.testing.assert_allclose(pushed, pulled, rtol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize("scan", [False, True])
def test_computing_blocks_again_changes_no_gradient(scan):
    names = tuple(f"blocks/{s}@1" for s in SITES) if scan else of_block(1)
    params = stacked("llama") if scan else case("llama").params
    found = taps("llama", names, scan=scan, remat=True)(params, TOKENS, LOSS)
    for name, site in zip(names, of_block(1), strict=True):
        same_taps(found[name], tapped("llama")[site])


def past_of(acts, num, layers=range(LAYERS)):
    names = [f"blocks_{i}/attn/{name}" for i in layers for name in ("key", "value")]
    return {name: acts[name][:, :num] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 4])
@pytest.mark.parametrize("kind", SHAPES)
def test_positions_behind_a_past_are_those_of_the_whole(kind, num):
    """Tokens, and the residual stream before a block, and gradients there."""
    logits, expected = wanted(kind)
    acts, later = values(kind)[1], np.arange(TIME) >= num
    mask = np.broadcast_to(later, TOKENS.shape)
    whole = ft.readouts.next_token_loss(TOKENS, mask=mask)
    whole = jax.device_get(taps(kind)(case(kind).params, TOKENS, whole))
    inputs = TOKENS[:, num:], None, past_of(acts, num)
    part = ft.readouts.next_token_loss(TOKENS[:, num:])
    part = jax.device_get(taps(kind)(case(kind).params, inputs, part))
    close(part[LOGITS].acts.reshape(BATCH, TIME - num, -1), logits[:, num:])
    for (layer, site), value in expected.items():
        found = part[f"blocks_{layer}/{site}"]
        close(found.acts.reshape(BATCH, TIME - num, -1), value[:, num:])
        grads = whole[f"blocks_{layer}/{site}"].grads.reshape(value.shape)
        close(found.grads.reshape(BATCH, TIME - num, -1), grads[:, num:])
    kept = past_of(acts, num, (1, 2))
    inputs = acts["blocks_1/resid_pre"][:, num:], None, kept
    close(values(kind, inputs, start=1)[0], logits[:, num:])


@pytest.mark.slow
def test_an_empty_past_is_none_and_the_norm_and_logits_need_none():
    acts = values("llama")[1]
    for past in (None, {}, past_of(acts, 0)):
        close(values("llama", (TOKENS, None, past))[0], wanted("llama")[0])
    resid = acts["blocks_2/resid_post"][:, 3:]
    found = values("llama", (resid, None, past_of(acts, 3)), start=LAYERS)[0]
    close(found, wanted("llama")[0][:, 3:])


KEPT = np.zeros((2, 3, 12), np.float32)


@pytest.mark.parametrize(
    ("kind", "options", "past", "match"),
    [
        ("llama", {"scan": True}, {"x": KEPT}, r"a scanned model takes no past"),
        ("llama", {}, {"x": KEPT}, r"values of 3 blocks, such as 'blocks_0/attn/key'"),
        (
            "llama",
            {"start": 2},
            {"blocks_2/attn/key": KEPT},
            r"of 1 blocks, such as 'blocks_2/attn/value', got \['blocks_2/attn/key'\]",
        ),
        ("llama", {}, past_of(dict.fromkeys(ALL_KEPT, KEPT[:1]), 3), r"\[2, P, 12\]"),
        ("llama", {}, past_of(dict.fromkeys(ALL_KEPT, KEPT[..., :5]), 3), "one shape"),
        ("llama", {}, past_of(dict.fromkeys(ALL_KEPT, KEPT[0]), 3), "one shape"),
        ("gpt2", {}, past_of(dict.fromkeys(ALL_KEPT, KEPT), 3), "8 learned .* got 9"),
    ],
)
def test_a_past_that_does_not_fit(kind, options, past, match):
    config, params = case(kind).config, case(kind).params
    inputs = np.zeros((2, 6, 12), np.float32) if "start" in options else TOKENS
    params = stacked(kind) if "scan" in options else params
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(Decoder(config, **options).apply, params, inputs, None, past)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_jit_is_eager(kind):
    model = ft.from_linen(Decoder(case(kind).config))
    logits, acts = jax.device_get(model(case(kind).params, TOKENS, {}))
    compiled = values(kind)
    close(logits, compiled[0])
    assert acts.keys() == compiled[1].keys()
    for site, value in acts.items():
        close(value, compiled[1][site])
    for (layer, site), value in wanted(kind)[1].items():
        close(acts[f"blocks_{layer}/{site}"], value)
    close(logits, wanted(kind)[0])


@pytest.mark.slow
def test_a_subject_is_tapped_in_chunks():
    model = ft.from_linen(Decoder(case("neox").config))
    site = "blocks_1/mlp_out"
    found = jax.jit(
        lambda p: ft.tap(model, p, TOKENS, sites=site, readout=LOSS, batch_size=1)
    )(case("neox").params)[site]
    same_taps(found, tapped("neox")[site])


def test_weights_are_those_of_positions_with_a_target():
    found = tapped("gpt2")["blocks_1/mlp_out"].weights.reshape(BATCH, TIME)
    np.testing.assert_array_equal(found, [[0, 1, 1, 1, 1, 0]] * BATCH)


# Errors.

RESID, INTS = np.zeros((1, 2, 12), np.float32), partial(np.zeros, dtype=np.int32)


@pytest.mark.parametrize(
    ("kind", "options", "inputs", "match"),
    [
        ("gpt2", {"start": -1}, RESID, r"start must be in 0 \.\. 3, .* got -1"),
        ("gpt2", {"start": 4}, RESID, r"start must be in 0 \.\. 3, .* got 4"),
        ("gpt2", {"start": 2}, TOKENS, r"residual stream \[B, T, 12\].*got shape \(2"),
        ("gpt2", {"start": 0}, TOKENS, r"residual stream .* before block 0, got shape"),
        ("gpt2", {"start": 2}, RESID[..., :5], r"before block 2, got shape \(1, 2, 5"),
        ("gpt2", {"start": 2}, INTS((1, 2, 12)), r"got shape .* of int32"),
        ("gpt2", {"start": 1, "scan": True}, RESID, r"start 1 wants some; use scan=F"),
        (
            "gpt2",
            {},
            np.zeros((2, 3), np.float32),
            r"tokens \[B, T\] of integers, got .*float32",
        ),
        ("gpt2", {}, np.zeros((2, 3), bool), r"tokens .* got .* of bool"),
        ("gpt2", {}, INTS((2, 3, 4)), r"tokens .* got shape \(2, 3, 4\)"),
        ("gpt2", {}, INTS(3), r"tokens \[B, T\] of integers, got shape \(3"),
        ("gpt2", {}, INTS((2, 0)), r"no position, the inputs are empty"),
        ("gpt2", {}, INTS((1, 9)), r"8 learned positions, got 9 tokens"),
        ("llama", {"start": 3}, RESID[:, :0], r"no position, the inputs are empty"),
    ],
)
def test_inputs_that_do_not_fit(kind, options, inputs, match):
    config, params = case(kind).config, case(kind).params
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(Decoder(config, **options).apply, params, inputs)


def test_rotations_have_no_last_position():
    model, params = Decoder(case("llama").config), case("llama").params
    shape = jax.eval_shape(model.apply, params, INTS((1, 20))).shape
    assert shape == (1, 20, 13)


def test_a_base_of_rotations_and_an_eps_are_any_whole_number():
    model = Decoder(llama(vocab=13, layers=1, rotary_base=10**10, eps=10**18))
    jax.eval_shape(model.init, jax.random.key(0), TOKENS)  # more than an int32


@pytest.mark.parametrize(
    ("make", "sizes", "match"),
    [
        (gpt2, {"dim": 10, "heads": 3}, r"gpt2: heads must divide dim, got 3 and 10"),
        (gpt2, {"heads": 0}, r"gpt2: heads must divide dim, got 0"),
        (gpt2, {"layers": 0}, r"sizes must be whole and positive, .*'layers': 0"),
        (gpt2, {"vocab": 2.5}, r"whole and positive, .*'vocab': 2.5"),
        (gpt2, {"context": -1}, r"whole and positive, .*'context': -1"),
        (gpt2, {"hidden": -4}, r"whole and positive, .*'hidden': -4"),
        (gpt2, {"hidden": 0}, r"whole and positive, .*'hidden': 0"),
        (gpt2, {"eps": 0.0}, r"eps and rotary_base must be positive, got 0.0"),
        (neox, {"dim": 10, "heads": 4}, r"neox: heads must divide dim, got 4 and 10"),
        (neox, {"rotary_share": 0.0}, r"neox: rotary_share .* at most 1, got 0.0"),
        (neox, {"rotary_share": 1.5}, r"neox: rotary_share .* at most 1, got 1.5"),
        (neox, {"rotary_share": 3 / 64}, r"rotary_dim must be even .* got 3"),
        (neox, {"rotary_base": -1.0}, r"must be positive, got 1e-05 and -1.0"),
        (neox, {"hidden": 0}, r"whole and positive, .*'hidden': 0"),
        (llama, {"dim": 10, "heads": 4}, r"llama: heads must divide dim, got 4 and 10"),
        (llama, {"heads": 9, "kv_heads": 2}, r"kv_heads must divide heads, got 2 and"),
        (llama, {"kv_heads": 0}, r"whole and positive, .*'kv_heads': 0"),
        (llama, {"head_dim": 5}, r"rotary_dim must be even .* got 5"),
        (llama, {"head_dim": 0}, r"whole and positive, .*'head_dim': 0"),
        (llama, {"hidden": 0}, r"whole and positive, .*'hidden': 0"),
        (llama, {"eps": -1.0}, r"must be positive, got -1.0"),
        (llama, {"layers": True}, r"whole and positive, .*'layers': True"),
        (llama, {"heads": "9"}, r"llama: .*'9'"),
        (llama, {"dim": None}, r"llama: .*None"),
        (llama, {"eps": "small"}, r"rotary_base must be positive, got 'small'"),
        (llama, {"eps": float("nan")}, r"must be positive, got nan"),
        (llama, {"rotary_base": None}, r"must be positive, got 1e-05 and None"),
        (neox, {"rotary_share": None}, r"neox: rotary_share .* got None"),
        (neox, {"rotary_share": "0.25"}, r"neox: rotary_share .* got '0.25'"),
        (neox, {"rotary_base": float("inf")}, r"must be positive, got 1e-05 and inf"),
        (gpt2, {"activation": "gelu_new"}, r"activation must be .* got 'gelu_new'"),
        (
            llama,
            {"rotary_divisors": (1.0,)},
            r"must be 32 positive .* half of rotary_d",
        ),
        (llama, {"rotary_divisors": [1.0] * 32}, r"32 positive numbers in a tuple"),
        (neox, {"rotary_divisors": (0.0,) * 8}, r"must be 8 positive numbers"),
        (gpt2, {"tied": "no"}, r"flags must be True or False, got .*'tied': 'no'"),
        (neox, {"parallel": None}, r"flags must be .*'parallel': None"),
    ],
)
def test_sizes_that_do_not_fit(make, sizes, match):
    with pytest.raises(ValueError, match=match):
        make(**sizes)


def test_parameters_of_the_other_layout():
    params = case("gpt2").params
    with pytest.raises(ValueError, match=r"^stack_blocks: .*blocks_0 .*got \['blo"):
        stack_blocks(stacked("gpt2"))
    with pytest.raises(ValueError, match=r"unstack_blocks: .*'blocks', got \['blo"):
        unstack_blocks(params)
    gap = {"params": {"blocks_0": {}, "blocks_2": {}}}
    with pytest.raises(ValueError, match=r"stack_blocks: wanted"):
        stack_blocks(gap)


@pytest.mark.slow
def test_it_is_a_module_like_another():
    assert issubclass(Decoder, nn.Module)
    model = Decoder(case("gpt2").config)
    params = model.init(jax.random.key(0), TOKENS)
    logits = np.asarray(model.apply(params, TOKENS))
    assert logits.shape == (BATCH, TIME, 13)
    assert np.isfinite(logits).all()
