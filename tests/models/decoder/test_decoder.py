from functools import partial

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
    LOSS,
    SHAPES,
    TIME,
    TOKENS,
    case,
    close,
    of_block,
    run,
    same_taps,
    taps,
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


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_sites_are_those_of_the_architecture(kind):
    logits, values = wanted(kind)
    found, acts = run(kind)(case(kind).params, TOKENS, {})
    assert found.dtype == jnp.float32
    close(found, logits)
    for (layer, site), value in values.items():
        close(acts[f"blocks_{layer}/{site}"], value)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_token_changes_no_logits_before_it(kind):
    params = case(kind).params
    clean = run(kind)(params, TOKENS, {})[0]
    for t in range(TIME):
        changed = TOKENS.at[:, t].set((TOKENS[:, t] + 1) % 13)
        logits = run(kind)(params, changed, {})[0]
        close(logits[:, :t], clean[:, :t], 1e-6) if t else None
        moved = jnp.abs(logits - clean)[:, t:].max(axis=-1)
        assert moved.min() > 1e-3, t  # and all of the later ones


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_central_differences(kind):
    given, tensors, _, params = case(kind)
    found = taps(kind, of_block(1))(params, TOKENS, LOSS)
    for name, site in zip(of_block(1), SITES, strict=True):
        each = [
            oracle.gradients(given, tensors, np.asarray(row), 1, site) for row in TOKENS
        ]
        grads = found[name].grads.reshape(np.shape(each))
        close(grads, each, 2e-5)
        close(found[name].acts.reshape(np.shape(each)), wanted(kind)[1][1, site])


def test_gradients_of_every_logit_are_jacobians_per_example():
    config, params = case("llama").config, case("llama").params
    site, few = "blocks_2/resid_pre", TOKENS[:, :3]
    model = ft.from_linen(Decoder(config))

    @jax.jit
    def both(params):
        found = ft.tap(model, params, few, sites=site, readout=ft.readouts.jacobian())[
            site
        ]
        rest = Decoder(config, start=2)
        acts = model(params, few, {})[1][site]
        each = jax.vmap(jax.jacrev(lambda a: rest.apply(params, a[None])[0]))(acts)
        return found.grads, each

    grads, each = both(params)  # [B T, K, D] and [B, T, V, T, D]
    each = jnp.moveaxis(each.reshape(BATCH, -1, 3, config.dim), 1, 2)
    close(grads, each.reshape(grads.shape))


@pytest.mark.parametrize("kind", SHAPES)
def test_array_probes_are_added_at_every_site(kind):
    given, tensors, _, params = case(kind)
    names = [f"blocks_1/{site}" for site in SITES]
    widths = {s: wanted(kind)[1][1, s].shape[-1] for s in SITES}
    zeros = {n: jnp.zeros(widths[s]) for n, s in zip(names, SITES, strict=True)}
    for name, site in zip(names, SITES, strict=True):
        delta = np.linspace(-1, 1, widths[site])
        probes = zeros | {name: jnp.asarray(delta, jnp.float32)}
        logits, values = oracle.forward(
            given, tensors, TOKENS, {(1, site): lambda x, d=delta: x + d}
        )
        found, acts = run(kind)(params, TOKENS, probes)
        close(found, logits)
        close(acts[name], values[1, site])
        close(acts["blocks_2/mlp_out"], values[2, "mlp_out"])


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
        logits, values = oracle.forward(given, tensors, TOKENS, edits)
        scales = dict.fromkeys(SITES, jnp.float32(1)) | {site: jnp.float32(0.5)}
        found, acts = spliced(params, scales)
        close(found, logits)
        close(acts[f"blocks_1/{site}"], values[1, site])


def test_every_site_of_every_block_has_its_width():
    config, params = case("llama").config, case("llama").params
    unrolled = ft.from_linen(Decoder(config))
    shapes = ft.site_shapes(unrolled, params, TOKENS)
    for layer in range(LAYERS):
        for site in SITES:
            width = config.hidden if site == "mlp_hidden" else config.dim
            assert shapes[f"blocks_{layer}/{site}"].shape == (BATCH, TIME, width)
    scanned = ft.from_linen(Decoder(config, scan=True))
    names = ft.site_shapes(scanned, stack_blocks(params), TOKENS)
    assert {f"blocks/{s}@{i}" for s in SITES for i in range(LAYERS)} <= names.keys()


def test_examples_do_not_mix():
    ft.check_no_mixing(run("gpt2"), case("gpt2").params, TOKENS)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_scan_over_the_layers_is_the_unrolled_model(kind):
    params = case(kind).params
    names = tuple(f"blocks/mlp_out@{i}" for i in range(LAYERS))
    found = taps(kind, names, scan=True)(stack_blocks(params), TOKENS, LOSS)
    sites = tuple(f"blocks_{i}/mlp_out" for i in range(LAYERS))
    whole = taps(kind, sites)(params, TOKENS, LOSS)
    for i in range(LAYERS):
        same_taps(found[names[i]], whole[sites[i]])
    delta = jnp.linspace(-1.0, 1.0, case(kind).config.dim)
    logits = run(kind, scan=True)(stack_blocks(params), TOKENS, {names[1]: delta})[0]
    close(logits, run(kind)(params, TOKENS, {sites[1]: delta})[0])


def test_a_scan_takes_no_functions():
    config, params = case("llama").config, case("llama").params
    model = ft.from_linen(Decoder(config, scan=True))
    with pytest.raises(ValueError, match=r"blocks/mlp_out@1"):
        model(stack_blocks(params), TOKENS, {"blocks/mlp_out@1": jnp.tanh})


@pytest.mark.parametrize("kind", SHAPES)
def test_parameters_are_stacked_and_back(kind):
    config, params = case(kind).config, case(kind).params
    equal_trees(unstack_blocks(stack_blocks(params)), params)
    for given, options in ((params, {}), (stack_blocks(params), {"scan": True})):
        init = partial(Decoder(config, **options).init, jax.random.key(0))
        shapes = jax.eval_shape(init, TOKENS)
        equal_trees(jax.tree.map(jnp.shape, given), jax.tree.map(jnp.shape, shapes))


def equal_trees(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_more_than_ten_layers_are_stacked_in_order():
    params = {"params": {f"blocks_{i}": {"x": jnp.float32(i)} for i in range(12)}}
    assert stack_blocks(params)["params"]["blocks"]["x"].tolist() == list(range(12))
    equal_trees(unstack_blocks(stack_blocks(params)), params)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_rest_of_the_model_runs_from_the_residual_stream(kind):
    params, start = case(kind).params, 1
    sites = (*of_block(1), *of_block(2))
    whole = taps(kind, sites)(params, TOKENS, LOSS)
    resid = run(kind)(params, TOKENS, {})[1][f"blocks_{start}/resid_pre"]
    rest = taps(kind, sites, start=start)(params, resid, LOSS)
    for site in sites:
        same_taps(rest[site], whole[site])
    close(run(kind, start=start)(params, resid, {})[0], wanted(kind)[0])


@pytest.mark.parametrize("scan", [False, True])
def test_the_first_start_is_what_the_tokens_become(scan):
    params = case("gpt2").params
    resid = jnp.asarray(wanted("gpt2")[1][0, "resid_pre"], jnp.float32)
    model = run("gpt2", start=0, scan=scan)
    close(
        model(stack_blocks(params) if scan else params, resid, {})[0], wanted("gpt2")[0]
    )


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("scan", [False, True])
def test_the_last_start_is_the_norm_and_the_logits(kind, scan):
    params = stack_blocks(case(kind).params) if scan else case(kind).params
    last = wanted(kind)[1][LAYERS - 1, "resid_post"]
    inputs = jnp.asarray(last, jnp.float32)
    model = run(kind, start=LAYERS, scan=scan)
    found, acts = model(params, inputs, {})
    close(found, wanted(kind)[0])
    assert not [site for site in acts if site.startswith("blocks")]


@pytest.mark.parametrize("kind", SHAPES)
def test_bfloat16_is_close(kind):
    logits, acts = run(kind, dtype=jnp.bfloat16)(case(kind).params, TOKENS, {})
    assert logits.dtype == jnp.float32
    close(logits, wanted(kind)[0], 0.06)
    assert np.abs(logits - wanted(kind)[0]).max() > 1e-4  # it is used
    for site in SITES:
        assert acts[f"blocks_1/{site}"].dtype == jnp.bfloat16
        value = np.asarray(acts[f"blocks_1/{site}"], np.float32)
        close(value, wanted(kind)[1][1, site], 0.06)


def test_bfloat16_parameters_run_in_either_type():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case("llama").params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    exact = run("llama")(rounded, TOKENS, {})[0]
    close(run("llama")(params, TOKENS, {})[0], exact)
    found = run("llama", dtype=jnp.bfloat16)(params, TOKENS, {})[0]
    assert found.dtype == jnp.float32
    close(found, exact, 0.06)


def test_bfloat16_gradients_are_close():
    sites = of_block(1)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case("llama").params)
    found = taps("llama", sites, dtype=jnp.bfloat16)(params, TOKENS, LOSS)
    whole = taps("llama", sites)(case("llama").params, TOKENS, LOSS)
    for site in sites:
        assert found[site].grads.dtype == jnp.bfloat16
        close(np.asarray(found[site].grads, np.float32), whole[site].grads, 0.1)


@pytest.mark.parametrize("shift", [0.0, 5.0, 20.0])
def test_what_all_keys_have_in_common_costs_bfloat16_no_gradients(shift):
    """A bias of the keys, and a smaller one of the values."""
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, cotangent = (jax.random.normal(k, (2, 16, 2, 8)) for k in keys)
    given = query, key + shift, value + shift / 5

    def pulled(dtype):
        typed = [x.astype(dtype) for x in given]
        mixed, pull = jax.vjp(causal_attention, *typed)
        return mixed, *pull(cotangent.astype(dtype))

    for found, exact in zip(pulled(jnp.bfloat16), pulled(jnp.float32), strict=True):
        assert found.dtype == jnp.bfloat16
        error = np.asarray(found, np.float32) - exact
        assert np.linalg.norm(error) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("kind", SHAPES)
def test_forward_mode_is_the_transpose_of_reverse_mode(kind):
    params = case(kind).params
    model = Decoder(case(kind).config, start=0)
    keys = jax.random.split(jax.random.key(0), 3)
    resid, tangent = (jax.random.normal(k, (2, 5, model.config.dim)) for k in keys[:2])

    @jax.jit
    def both(resid, tangent, cotangent):
        _, pull = jax.vjp(partial(model.apply, params), resid)
        pushed = jax.jvp(partial(model.apply, params), (resid,), (tangent,))[1]
        return jnp.vdot(pushed, cotangent), jnp.vdot(tangent, pull(cotangent)[0])

    shape = jax.eval_shape(partial(model.apply, params), resid).shape
    pushed, pulled = both(resid, tangent, jax.random.normal(keys[2], shape))
    np.testing.assert_allclose(pushed, pulled, rtol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_computing_blocks_again_changes_no_gradient(scan):
    kind, params = "llama", case("llama").params
    names = tuple(f"blocks/{s}@1" for s in SITES) if scan else of_block(1)
    given = stack_blocks(params) if scan else params
    found = taps(kind, names, scan=scan, remat=True)(given, TOKENS, LOSS)
    whole = taps(kind, of_block(1))(params, TOKENS, LOSS)
    for name, site in zip(names, of_block(1), strict=True):
        same_taps(found[name], whole[site])


def past_of(acts, num, layers=range(LAYERS)):
    names = [f"blocks_{i}/attn/{name}" for i in layers for name in ("key", "value")]
    return {name: acts[name][:, :num] for name in names}


@pytest.mark.parametrize("num", [1, 4])
@pytest.mark.parametrize("kind", SHAPES)
def test_positions_behind_a_past_are_those_of_the_whole(kind, num):
    """Tokens, and the residual stream before a block, and gradients there."""
    params = case(kind).params
    logits, values = wanted(kind)
    acts = run(kind)(params, TOKENS, {})[1]
    found, here = run(kind)(params, (TOKENS[:, num:], None, past_of(acts, num)), {})
    close(found, logits[:, num:])
    for (layer, site), value in values.items():
        close(here[f"blocks_{layer}/{site}"], value[:, num:])
    resid = acts["blocks_1/resid_pre"][:, num:]
    kept = past_of(acts, num, (1, 2))
    close(run(kind, start=1)(params, (resid, None, kept), {})[0], logits[:, num:])
    site = "blocks_2/mlp_hidden"
    later = jnp.arange(TIME) >= num
    loss = ft.readouts.next_token_loss(
        TOKENS, mask=jnp.broadcast_to(later, TOKENS.shape)
    )
    whole = taps(kind, (site,))(params, TOKENS, loss)[site].grads
    loss = ft.readouts.next_token_loss(
        TOKENS[:, num:], mask=jnp.ones((BATCH, TIME - num))
    )
    part = taps(kind, (site,))(
        params, (TOKENS[:, num:], None, past_of(acts, num)), loss
    )
    shape = BATCH, TIME, -1
    close(
        part[site].grads.reshape(BATCH, TIME - num, -1),
        whole.reshape(shape)[:, num:],
    )


def test_an_empty_past_is_none_and_the_norm_and_logits_need_none():
    params, acts = (
        case("llama").params,
        run("llama")(case("llama").params, TOKENS, {})[1],
    )
    for past in (None, {}, past_of(acts, 0)):
        close(run("llama")(params, (TOKENS, None, past), {})[0], wanted("llama")[0])
    resid = acts["blocks_2/resid_post"][:, 3:]
    found = run("llama", start=LAYERS)(params, (resid, None, past_of(acts, 3)), {})[0]
    close(found, wanted("llama")[0][:, 3:])


KEPT = jnp.zeros((2, 3, 12))


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
    inputs = jnp.zeros((2, 6, 12)) if "start" in options else TOKENS
    params = stack_blocks(params) if "scan" in options else params
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(Decoder(config, **options).apply, params, inputs, None, past)


@pytest.mark.parametrize("kind", SHAPES)
def test_jit_is_eager(kind):
    config, params = case(kind).config, case(kind).params
    model = ft.from_linen(Decoder(config))
    logits, acts = model(params, TOKENS, {})
    compiled = run(kind)(params, TOKENS, {})
    close(logits, compiled[0])
    assert acts.keys() == compiled[1].keys()
    close(acts["blocks_2/mlp_hidden"], compiled[1]["blocks_2/mlp_hidden"])


def test_a_subject_is_tapped_in_chunks():
    params = case("neox").params
    model = ft.from_linen(Decoder(case("neox").config))
    site = "blocks_1/mlp_out"
    found = jax.jit(
        lambda p: ft.tap(model, p, TOKENS, sites=site, readout=LOSS, batch_size=1)
    )(params)[site]
    whole = taps("neox", of_block(1))(params, TOKENS, LOSS)[site]
    same_taps(found, whole)


def test_weights_are_those_of_positions_with_a_target():
    weights = taps("gpt2", of_block(1))(case("gpt2").params, TOKENS, LOSS)
    found = weights["blocks_1/mlp_out"].weights.reshape(BATCH, TIME)
    np.testing.assert_array_equal(found, [[0, 1, 1, 1, 1, 0]] * BATCH)


# Errors.

RESID = jnp.zeros((1, 2, 12))


@pytest.mark.parametrize(
    ("kind", "options", "inputs", "match"),
    [
        ("gpt2", {"start": -1}, RESID, r"start must be in 0 \.\. 3, .* got -1"),
        ("gpt2", {"start": 4}, RESID, r"start must be in 0 \.\. 3, .* got 4"),
        ("gpt2", {"start": 2}, TOKENS, r"residual stream \[B, T, 12\].*got shape \(2"),
        ("gpt2", {"start": 0}, TOKENS, r"residual stream .* before block 0, got shape"),
        ("gpt2", {"start": 2}, RESID[..., :5], r"before block 2, got shape \(1, 2, 5"),
        ("gpt2", {"start": 2}, jnp.zeros((1, 2, 12), int), r"got shape .* of int32"),
        ("gpt2", {"start": 1, "scan": True}, RESID, r"start 1 wants some; use scan=F"),
        ("gpt2", {}, jnp.zeros((2, 3)), r"tokens \[B, T\] of integers, got .*float32"),
        ("gpt2", {}, jnp.zeros((2, 3), bool), r"tokens .* got .* of bool"),
        ("gpt2", {}, jnp.zeros((2, 3, 4), int), r"tokens .* got shape \(2, 3, 4\)"),
        ("gpt2", {}, jnp.zeros(3, int), r"tokens \[B, T\] of integers, got shape \(3"),
        ("gpt2", {}, jnp.zeros((2, 0), int), r"no position, the inputs are empty"),
        ("gpt2", {}, jnp.zeros((1, 9), int), r"8 learned positions, got 9 tokens"),
        ("llama", {"start": 3}, RESID[:, :0], r"no position, the inputs are empty"),
    ],
)
def test_inputs_that_do_not_fit(kind, options, inputs, match):
    config, params = case(kind).config, case(kind).params
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(Decoder(config, **options).apply, params, inputs)


def test_rotations_have_no_last_position():
    model, params = Decoder(case("llama").config), case("llama").params
    shape = jax.eval_shape(model.apply, params, jnp.zeros((1, 20), int)).shape
    assert shape == (1, 20, 13)


def test_a_base_of_rotations_and_an_eps_are_any_whole_number():
    model = Decoder(llama(vocab=13, rotary_base=10**10, eps=10**18))
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
        stack_blocks(stack_blocks(params))
    with pytest.raises(ValueError, match=r"unstack_blocks: .*'blocks', got \['blo"):
        unstack_blocks(params)
    gap = {"params": {"blocks_0": {}, "blocks_2": {}}}
    with pytest.raises(ValueError, match=r"stack_blocks: wanted"):
        stack_blocks(gap)


def test_it_is_a_module_like_another():
    assert issubclass(Decoder, nn.Module)
    config = gpt2(vocab=5, layers=2, dim=4, heads=2, context=3)
    tokens = jnp.zeros((1, 3), int)
    params = Decoder(config).init(jax.random.key(0), tokens)
    logits = Decoder(config).apply(params, tokens)
    assert logits.shape == (1, 3, 5)
    assert bool(jnp.isfinite(logits).all())
