import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze

import toyfeat as ft
from toyfeat import readouts

RNG = np.random.default_rng(3)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


B, D = 5, 4
X = normal(B, D)
KEY = jax.random.key(0)
CUBES = readouts.scalar(lambda y: jnp.sum(y**3))


def assert_close(got, want, tol=1e-5):
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=tol, atol=tol * np.abs(want).max()
    )


def dense(params, x):
    y = x @ params["kernel"]
    return y + jnp.broadcast_to(params["bias"], y.shape)


def variables_of(module, x=X, *args):
    """Variables of the right shapes, filled without running an initialiser."""
    shapes = jax.eval_shape(module.init, KEY, x, *args)

    def fill(leaf):
        return jnp.asarray(RNG.normal(0.0, 0.6, leaf.shape), leaf.dtype)

    filled = {"params": jax.tree.map(fill, shapes["params"])}
    ones = {name: tree for name, tree in shapes.items() if name != "params"}
    return filled | jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), ones)


def cubes_jacobian(suffix, acts):
    """[B, 1, D]: per-example jacrev of the sum of the cubed outputs."""
    grad = jax.jacrev(lambda a: jnp.sum(suffix(a) ** 3))
    return jax.jit(jax.vmap(grad))(acts)[:, None]


def taps_of(module, variables, sites, x=X, readout=CUBES, **options):
    probed = ft.from_linen(module, **options)
    run = jax.jit(lambda v, x: ft.tap(probed, v, x, sites=sites, readout=readout))
    return run(variables, x)


# names, and shared modules


class Block(nn.Module):
    width: int = D

    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.Dense(7, name="up")(x))
        return x + nn.Dense(self.width, name="down")(hidden)


class Blocks(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = self.block(name=f"blocks_{i}")(x)
        return nn.Dense(3, name="head")(x)


def block_by_hand(params, x):
    return x + dense(params["down"], jnp.tanh(dense(params["up"], x)))


@functools.cache
def blocks_variables():
    return variables_of(Blocks())


def blocks_suffix(site):
    p = blocks_variables()["params"]
    if site == "blocks_0":
        return lambda a: dense(p["head"], block_by_hand(p["blocks_1"], a))
    if site == "blocks_1":
        return lambda a: dense(p["head"], a)
    raise KeyError(site)


def test_every_module_is_a_site_named_by_its_path():
    outputs, acts = ft.from_linen(Blocks())(blocks_variables(), X, {})
    assert set(acts) == {
        "__call__",
        "head",
        "blocks_0",
        "blocks_0/up",
        "blocks_0/down",
        "blocks_1",
        "blocks_1/up",
        "blocks_1/down",
    }
    np.testing.assert_array_equal(outputs, Blocks().apply(blocks_variables(), X))
    np.testing.assert_array_equal(acts["__call__"], outputs)
    np.testing.assert_array_equal(acts["head"], outputs)


RematBlock = nn.remat(Block)


@pytest.mark.slow_cases
@pytest.mark.parametrize("block", [Block, RematBlock], ids=["plain", "remat"])
@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_give_the_per_example_jacobian(block, frozen):
    variables = freeze(blocks_variables()) if frozen else blocks_variables()
    taps = taps_of(Blocks(block), variables, ["blocks_0", "blocks_1", "blocks_0/up"])
    p = blocks_variables()["params"]
    acts = {"blocks_0": block_by_hand(p["blocks_0"], X)}
    acts["blocks_1"] = block_by_hand(p["blocks_1"], acts["blocks_0"])
    for site, act in acts.items():
        assert_close(taps[site].acts, act)
        assert_close(taps[site].grads, cubes_jacobian(blocks_suffix(site), act))
    up = dense(p["blocks_0"]["up"], X)
    kernel = np.float64(p["blocks_0"]["down"]["kernel"])
    slope = 1 - np.tanh(np.float64(up)) ** 2
    want = (np.float64(taps["blocks_0"].grads[:, 0]) @ kernel.T) * slope
    assert_close(taps["blocks_0/up"].acts, up)
    assert_close(taps["blocks_0/up"].grads, want[:, None])


@pytest.mark.slow_cases
@pytest.mark.parametrize("block", [Block, RematBlock], ids=["plain", "remat"])
def test_each_call_sees_its_own_probe_functions(block):
    probed = ft.from_linen(Blocks(block))
    p = blocks_variables()["params"]
    for scale in (0.0, 2.0, -1.0):
        outputs, acts = probed(
            blocks_variables(), X, {"blocks_0": lambda a, s=scale: s * a}
        )
        hidden = scale * block_by_hand(p["blocks_0"], X)
        assert_close(acts["blocks_0"], hidden)
        assert_close(outputs, dense(p["head"], block_by_hand(p["blocks_1"], hidden)))
        outputs, _ = probed(blocks_variables(), X, {"blocks_0/down": scale * X})
        hidden = block_by_hand(p["blocks_0"], X) + scale * X
        assert_close(outputs, dense(p["head"], block_by_hand(p["blocks_1"], hidden)))


class Shared(nn.Module):
    def setup(self):
        self.shared = nn.Dense(D)

    def __call__(self, x):
        return jnp.tanh(self.shared(jnp.tanh(self.shared(x))))


def test_shared_module_called_twice_gives_two_sites():
    variables = variables_of(Shared())
    taps = taps_of(Shared(), variables, ["shared", "shared#1"])
    p = variables["params"]["shared"]
    first = dense(p, X)
    second = dense(p, jnp.tanh(first))
    assert_close(taps["shared"].acts, first)
    assert_close(taps["shared#1"].acts, second)
    late = cubes_jacobian(jnp.tanh, second)
    early = cubes_jacobian(lambda a: jnp.tanh(dense(p, jnp.tanh(a))), first)
    assert_close(taps["shared#1"].grads, late)
    assert_close(taps["shared"].grads, early)


def test_probe_of_one_call_of_a_shared_module_leaves_the_other():
    variables = variables_of(Shared())
    probed = ft.from_linen(Shared())
    p = variables["params"]["shared"]
    for probe in (2.0 * X, lambda a: a + 2.0 * X):
        outputs, acts = probed(variables, X, {"shared#1": probe})
        first = dense(p, X)
        assert_close(acts["shared"], first)
        assert_close(outputs, jnp.tanh(dense(p, jnp.tanh(first)) + 2 * X))


def test_remat_of_a_shared_module_gives_two_sites():
    class RematShared(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.remat(nn.Dense)(D, name="shared")
            return jnp.tanh(block(jnp.tanh(block(x))))

    variables = variables_of(Shared())
    got = taps_of(RematShared(), variables, ["shared", "shared#1"])
    want = taps_of(Shared(), variables, ["shared", "shared#1"])
    for site, taps in want.items():
        assert_close(got[site].acts, taps.acts)
        assert_close(got[site].grads, taps.grads)


# scan


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(D, name="dense")(x)), None


def layer_by_hand(p, x):
    return x + jnp.tanh(dense(p, x))


def scanned(collections, layer=Layer, length=3):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                layer,
                variable_axes={"params": 0} | dict.fromkeys(collections, 0),
                split_rngs={"params": True},
                length=length,
            )
            x, _ = scan(name="layers")(nn.Dense(D, name="first")(x), None)
            return nn.Dense(3, name="head")(x)

    return Scanned()


BOTH = ("toyfeat_acts", "toyfeat_probes")


@functools.cache
def scan_variables():
    return variables_of(scanned(BOTH))


def scan_by_hand(x, probes):
    """Outputs and the dense activation of each layer, in a Python loop."""
    p = scan_variables()["params"]
    x, acts = dense(p["first"], x), []
    for i in range(3):
        layer = jax.tree.map(lambda v, i=i: v[i], p["layers"]["dense"])
        acts.append(dense(layer, x) + probes[i])
        x = x + jnp.tanh(acts[-1])
    return dense(p["head"], x), acts


SCAN_SITES = [f"layers/dense@{i}" for i in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("layer", [Layer, nn.remat(Layer, prevent_cse=False)])
def test_scanned_layers_are_sites_when_both_collections_are_carried(layer):
    taps = taps_of(scanned(BOTH, layer), scan_variables(), [*SCAN_SITES, "first"])
    zeros = jnp.zeros((3, D))
    for i, site in enumerate(SCAN_SITES):

        def total(row, i=i):
            grad = jax.jacrev(lambda d: jnp.sum(scan_by_hand(row, d)[0] ** 3))
            return grad(zeros)[i]

        acts = jnp.stack([scan_by_hand(row, zeros)[1][i] for row in X])
        assert_close(taps[site].acts, acts)
        assert_close(taps[site].grads, jax.vmap(total)(X)[:, None])
    p = scan_variables()["params"]
    assert_close(taps["first"].acts, dense(p["first"], X))


def test_scanned_layer_is_probed_alone():
    probed = ft.from_linen(scanned(BOTH))
    outputs, acts = probed(scan_variables(), X, {"layers/dense@1": X})
    for i, row in enumerate(X):
        probes = jnp.zeros((3, D)).at[1].set(row)
        want, hand = scan_by_hand(row, probes)
        assert_close(outputs[i], want)
        for k, site in enumerate(SCAN_SITES):
            assert_close(acts[site][i], hand[k])
    outputs, _ = probed(
        scan_variables(),
        X,
        {"layers/dense@0": 0.5 * X, "layers/dense@2": jnp.ones(D)},
    )
    probes = jnp.stack([0.5 * X[0], jnp.zeros(D), jnp.ones(D)])
    assert_close(outputs[0], scan_by_hand(X[0], probes)[0])


def test_scan_output_is_a_site_per_layer():
    _, acts = ft.from_linen(scanned(BOTH))(scan_variables(), X, {})
    expected = {f"layers/dense@{i}" for i in range(3)}
    assert expected <= set(acts)
    last = jnp.stack([scan_by_hand(row, jnp.zeros((3, D)))[1][2] for row in X])
    assert_close(acts["layers/dense@2"], last)


@pytest.mark.slow
def test_later_scanned_layer_is_differentiable_in_an_earlier_one():
    probed = ft.from_linen(scanned(BOTH))

    def later(d):
        return probed(scan_variables(), X, {"layers/dense@0": d})[1]["layers/dense@2"]

    got = jax.jacrev(later)(jnp.zeros((B, D)))
    for i, row in enumerate(X):

        def hand(d, row=row):
            return scan_by_hand(row, jnp.zeros((3, D)).at[0].set(d))[1][2]

        np.testing.assert_allclose(
            got[i, :, i], jax.jacrev(hand)(jnp.zeros(D)), rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow_cases
@pytest.mark.parametrize("collections", [(), BOTH[:1], BOTH[1:]], ids=str)
def test_a_stack_carries_the_collections_that_its_code_does_not_name(collections):
    got = taps_of(scanned(collections), scan_variables(), SCAN_SITES)
    want = taps_of(scanned(BOTH), scan_variables(), SCAN_SITES)
    for site, taps in want.items():
        assert_close(got[site].acts, taps.acts)
        assert_close(got[site].grads, taps.grads)
    probe = {"layers/dense@1": X}
    outputs, _ = ft.from_linen(scanned(collections))(scan_variables(), X, probe)
    delta = jnp.zeros((3, D)).at[1].set(X[0])
    assert_close(outputs[0], scan_by_hand(X[0], delta)[0])


@pytest.mark.slow_cases
@pytest.mark.parametrize("collections", [(), ("toyfeat_acts",), ("toyfeat_probes",)])
def test_other_sites_of_such_a_model_still_work(collections):
    got = taps_of(scanned(collections), scan_variables(), ["first", "head"])
    want = taps_of(scanned(BOTH), scan_variables(), ["first", "head"])
    for site, taps in want.items():
        assert_close(got[site].acts, taps.acts)
        assert_close(got[site].grads, taps.grads)


def test_function_for_a_layer_of_a_scan_is_refused():
    with pytest.raises(ValueError, match=r"layers/dense@1"):
        ft.from_linen(scanned(BOTH))(scan_variables(), X, {"layers/dense@1": jnp.tanh})


def test_unknown_site_of_a_scanned_model_names_the_sites():
    with pytest.raises(ValueError, match=r"no site 'layers/dense@3'.*layers/dense@2"):
        taps_of(scanned(()), scan_variables(), "layers/dense@3")


class OfOne(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(3, name="dense")(x))


def mapped(**options):
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            options.setdefault("variable_axes", {"params": None})
            options["variable_axes"] |= dict.fromkeys(BOTH, 0)
            return nn.vmap(OfOne, **options)(name="one")(x)

    return Mapped()


@pytest.mark.slow_cases
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_module_vmapped_over_the_batch_has_sites_with_a_batch_axis(batch):
    # 3 is also the width of the site
    module = mapped(split_rngs={"params": False})
    variables = variables_of(module)
    taps = taps_of(module, variables, "one/dense", X[:batch])["one/dense"]
    acts = dense(variables["params"]["one"]["dense"], X[:batch])
    assert_close(taps.acts, acts)
    assert_close(taps.grads, cubes_jacobian(jnp.tanh, acts))


def test_members_of_a_vmapped_ensemble_are_sites():
    module = mapped(
        in_axes=None,
        out_axes=1,
        axis_size=2,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )
    variables = variables_of(module)
    taps = taps_of(module, variables, ["one/dense@0", "one/dense@1"])
    for i in range(2):
        p = jax.tree.map(lambda v, i=i: v[i], variables["params"]["one"]["dense"])
        acts = dense(p, X)
        assert_close(taps[f"one/dense@{i}"].acts, acts)
        assert_close(taps[f"one/dense@{i}"].grads, cubes_jacobian(jnp.tanh, acts))


def test_nested_scans_have_sites_by_two_indices():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + jnp.tanh(nn.Dense(D, name="dense")(x))

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0} | dict.fromkeys(BOTH, 0)
            return nn.remat_scan(Step, lengths=(2, 2), variable_axes=axes)(
                name="stack"
            )(x)

    variables = variables_of(Stack())
    sites = [f"stack/dense@{i},{j}" for i in range(2) for j in range(2)]
    taps = taps_of(Stack(), variables, sites)
    kernels = variables["params"]["stack"]["dense"]

    def suffix(step, act, x):
        x = x + jnp.tanh(act)
        for k in range(step + 1, 4):
            p = jax.tree.map(lambda v, k=k: v[k // 2, k % 2], kernels)
            x = x + jnp.tanh(dense(p, x))
        return x

    x = X
    for step, site in enumerate(sites):
        p = jax.tree.map(lambda v, s=step: v[s // 2, s % 2], kernels)
        act = dense(p, x)
        grad = jax.jacrev(lambda a, r, s=step: jnp.sum(suffix(s, a, r) ** 3))
        assert_close(taps[site].acts, act)
        assert_close(taps[site].grads, jax.vmap(grad)(act, x)[:, None])
        x = x + jnp.tanh(act)


def test_jitted_modules_keep_their_sites_on_every_call():
    probed = ft.from_linen(Blocks(nn.jit(Block)))
    plain = ft.from_linen(Blocks())
    for probes in ({}, {"blocks_0": X}, {"blocks_1/up": 2 * X[:, :1]}, {}):
        outputs, acts = probed(blocks_variables(), X, probes)
        want, all_acts = plain(blocks_variables(), X, probes)
        assert_close(outputs, want)
        assert set(acts) == set(all_acts)
        for site, act in all_acts.items():
            assert_close(acts[site], act)


@pytest.mark.slow_cases
@pytest.mark.parametrize("site", ["blocks_0/up", "blocks_1", "blocks_1/up"])
def test_a_function_is_applied_at_its_site_under_jit(site):
    probed, plain = ft.from_linen(Blocks(nn.jit(Block))), ft.from_linen(Blocks())
    for fn in (jnp.sin, jnp.cos):
        outputs, acts = probed(blocks_variables(), X, {site: fn})
        want, all_acts = plain(blocks_variables(), X, {site: fn})
        assert_close(outputs, want)
        assert set(acts) == set(all_acts)
    outputs, _ = probed(blocks_variables(), X, {})
    assert_close(outputs, Blocks().apply(blocks_variables(), X))


def test_branches_of_a_condition_share_their_site():
    class Branching(nn.Module):
        def setup(self):
            self.dense, self.head = nn.Dense(D), nn.Dense(3)

        def __call__(self, x):
            if self.is_initializing():
                return self.head(self.dense(x))
            hidden = nn.cond(
                x.sum() > 1e9,
                lambda module, x: module.dense(x),
                lambda module, x: module.dense(2.0 * x),
                self,
                x,
            )
            return self.head(hidden)

    variables = variables_of(Branching())
    taps = taps_of(Branching(), variables, ["dense", "head"])
    acts = dense(variables["params"]["dense"], 2 * X)
    suffix = lambda a: dense(variables["params"]["head"], a)  # noqa: E731
    assert_close(taps["dense"].acts, acts)
    assert_close(taps["dense"].grads, cubes_jacobian(suffix, acts))


# other outputs, methods, collections


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="a")(x), {"wide": jnp.tanh(x), "count": jnp.arange(B)}


class OfPair(nn.Module):
    @nn.compact
    def __call__(self, x):
        left, right = Pair(name="pair")(x)
        return jnp.sin(left) + nn.Dense(3, name="b")(right["wide"])


def test_parts_of_a_tuple_are_sites_of_their_own():
    variables = variables_of(OfPair())
    taps = taps_of(OfPair(), variables, ["pair[0]", "pair[1][wide]"])
    p = variables["params"]
    left, wide = dense(p["pair"]["a"], X), jnp.tanh(X)
    assert_close(taps["pair[0]"].acts, left)
    assert_close(taps["pair[1][wide]"].acts, wide)
    out = jnp.sin(left) + dense(p["b"], wide)
    slope = 3 * np.float64(out) ** 2
    assert_close(taps["pair[0]"].grads, (slope * np.cos(np.float64(left)))[:, None])
    assert_close(
        taps["pair[1][wide]"].grads,
        (slope @ np.float64(p["b"]["kernel"]).T)[:, None],
    )


def test_recurrent_cell_gives_its_carry_and_its_output():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            cell = nn.GRUCell(features=3, name="gru")
            carry = jnp.zeros((x.shape[0], 3))
            for _ in range(2):
                carry, out = cell(carry, x)
            return out

    variables = variables_of(Recurrent())
    outputs, acts = ft.from_linen(Recurrent())(variables, X, {})
    assert {"gru[0]", "gru[1]", "gru[0]#1", "gru[1]#1"} <= set(acts) or {
        "gru[0]",
        "gru[1]",
        "gru#1[0]",
        "gru#1[1]",
    } <= set(acts)
    np.testing.assert_array_equal(outputs, Recurrent().apply(variables, X))


def test_recurrent_layer_of_flax_is_a_site():
    class Layered(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(nn.RNN(nn.LSTMCell(3), name="rnn")(x))

    x = normal(2, 3, D)
    variables = variables_of(Layered(), x)
    taps = taps_of(Layered(), variables, "rnn", x, readouts.jacobian())["rnn"]
    want = np.zeros((2, 3, 3, 2, 3))
    for t in range(3):
        want[:, t, t] = np.float64(variables["params"]["head"]["kernel"]).T
    assert_close(taps.grads, want.reshape(6, 6, 3))


class Tied(nn.Module):
    def setup(self):
        self.embed = nn.Embed(6, D)
        self.mlp = nn.Dense(D)

    def __call__(self, tokens):
        return self.embed.attend(self.encode(tokens))

    def encode(self, tokens):
        return jnp.tanh(self.mlp(self.embed(tokens)))


TOKENS = jnp.asarray(RNG.integers(0, 6, (B, 3)))


@pytest.mark.slow
def test_other_methods_are_sites_with_their_name():
    variables = variables_of(Tied(), TOKENS)
    table = variables["params"]["embed"]["embedding"]
    readout = readouts.next_token_loss(TOKENS)
    taps = taps_of(Tied(), variables, ["embed", "embed.attend", "mlp"], TOKENS, readout)
    embedded = table[TOKENS]
    hidden = dense(variables["params"]["mlp"], embedded)

    def loss(logits, tokens):
        logs = jax.nn.log_softmax(logits)
        return -logs[0, tokens[1]] - logs[1, tokens[2]]

    logits = jnp.tanh(hidden) @ table.T
    at_logits = jax.vmap(jax.jacrev(loss))(logits, TOKENS)
    at_hidden = jax.vmap(jax.jacrev(lambda h, t: loss(jnp.tanh(h) @ table.T, t)))(
        hidden, TOKENS
    )
    assert_close(taps["embed"].acts, embedded.reshape(-1, D))
    assert_close(taps["embed.attend"].acts, logits.reshape(-1, 6))
    assert_close(taps["embed.attend"].grads, at_logits.reshape(-1, 1, 6))
    assert_close(taps["mlp"].grads, at_hidden.reshape(-1, 1, D))
    np.testing.assert_array_equal(taps["mlp"].weights, np.tile([0, 1, 0], B))


def test_own_method_of_the_module_is_a_site_and_may_be_the_model():
    variables = variables_of(Tied(), TOKENS)
    _, acts = ft.from_linen(Tied())(variables, TOKENS, {})
    assert "encode" in acts
    outputs, acts = ft.from_linen(Tied(), method="encode")(variables, TOKENS, {})
    want = Tied().apply(variables, TOKENS, method="encode")
    np.testing.assert_array_equal(outputs, want)
    np.testing.assert_array_equal(acts["encode"], want)
    assert "embed.attend" not in acts
    again, _ = ft.from_linen(Tied(), method=Tied.encode)(variables, TOKENS, {})
    np.testing.assert_array_equal(again, want)


class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, dtype=jnp.bfloat16, name="low")(x)
        return nn.Dense(3, name="high")(nn.relu(x).astype(jnp.float32))


def test_bfloat16_module_keeps_bfloat16_acts_and_grads():
    variables = variables_of(Half())
    taps = taps_of(Half(), variables, ["low", "high"])
    assert taps["low"].acts.dtype == taps["low"].grads.dtype == jnp.bfloat16
    assert taps["high"].acts.dtype == taps["high"].grads.dtype == jnp.float32
    outputs, acts = ft.from_linen(Half())(variables, X, {"low": jnp.zeros(6)})
    assert acts["low"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(outputs, Half().apply(variables, X))


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="dense")(x)
        x = nn.Dropout(0.5, deterministic=not train, name="dropout")(x)
        return nn.Dense(3, name="head")(x)


@pytest.mark.slow_cases
@pytest.mark.parametrize("train", [False, True])
def test_dropout_gets_its_rngs_and_keyword_arguments(train):
    variables = variables_of(Noisy())
    options = {"rngs": {"dropout": jax.random.key(5)}, "train": train}
    taps = taps_of(Noisy(), variables, ["dense", "dropout", "head"], **options)
    outputs, _ = ft.from_linen(Noisy(), **options)(variables, X, {})
    np.testing.assert_array_equal(outputs, Noisy().apply(variables, X, **options))
    kept = np.float64(taps["dropout"].acts) / np.float64(taps["dense"].acts)
    assert set(np.round(np.unique(kept), 5)) == ({0.0, 2.0} if train else {1.0})
    kernel = np.float64(variables["params"]["head"]["kernel"])
    at_dropout = (3 * np.float64(outputs) ** 2) @ kernel.T
    assert_close(taps["dropout"].grads, at_dropout[:, None])
    assert_close(taps["dense"].grads, (at_dropout * kept)[:, None])


class Normed(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not self.train, name="norm")(x)
        return nn.Dense(3, name="head")(x)


@pytest.mark.slow_cases
@pytest.mark.parametrize("train", [False, True])
def test_updates_of_user_collections_are_made_and_dropped(train):
    module = Normed(train)
    variables = variables_of(module)
    outputs, _ = module.apply(variables, X, mutable=["batch_stats"])
    probed = ft.from_linen(module, mutable=["batch_stats"])
    warned = pytest.warns(UserWarning, match=r"from_linen: .*'norm' \(BatchNorm\)")
    with warned if train else contextlib.nullcontext():
        got, acts = probed(variables, X, {})
    np.testing.assert_array_equal(got, outputs)
    assert acts["norm"].shape == (B, 6)


@pytest.mark.slow_cases
@pytest.mark.parametrize("mutable", [None, ["batch_stats"]])
def test_gradients_through_evaluated_batch_norm(mutable):
    variables = variables_of(Normed())
    options = {} if mutable is None else {"mutable": mutable}
    taps = taps_of(Normed(), variables, "dense", **options)["dense"]
    p, stats = variables["params"], variables["batch_stats"]["norm"]

    def suffix(act):
        act = (act - stats["mean"]) * jax.lax.rsqrt(stats["var"] + 1e-5)
        return dense(p["head"], act * p["norm"]["scale"] + p["norm"]["bias"])

    acts = dense(p["dense"], X)
    assert_close(taps.grads, cubes_jacobian(suffix, acts))


@pytest.mark.parametrize("mutable", [True, False, "intermediates", ["intermediates"]])
def test_modules_own_sow_and_perturb_keep_working(mutable):
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(D, name="dense")(x)
            self.sow("intermediates", "hidden", x)
            x = self.perturb("shift", x)
            return jnp.tanh(x)

    variables = variables_of(Sowing())
    variables = {name: variables[name] for name in ("params", "perturbations")}
    want = Sowing().apply(variables, X, mutable=mutable)
    got, acts = ft.from_linen(Sowing(), mutable=mutable)(variables, X, {})
    want = want if mutable is False else want[0]
    np.testing.assert_array_equal(got, want)
    assert_close(acts["dense"], dense(variables["params"]["dense"], X))


def test_inputs_in_a_tuple_are_positional_arguments():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, scale):
            return jnp.tanh(nn.Dense(3, name="dense")(x) * scale[:, None])

    scale = normal(B)
    variables = variables_of(Two(), X, scale)
    probed = ft.from_linen(Two())
    taps = ft.tap(
        probed, variables, (X, scale), sites="dense", readout=CUBES, batch_size=2
    )["dense"]
    acts = np.float64(dense(variables["params"]["dense"], X))
    s = np.float64(scale)[:, None]
    y = np.tanh(acts * s)
    assert_close(taps.acts, acts)
    assert_close(taps.grads, (3 * y**2 * (1 - y**2) * s)[:, None])


# probes


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("probes", "change"),
    [
        ({"blocks_1": X}, lambda a: a + X),
        ({"blocks_1": X[0]}, lambda a: a + X[0][None]),
        ({"blocks_1": np.asarray(X)}, lambda a: a + X),
        ({"blocks_1": jnp.sin}, jnp.sin),
        ({"blocks_1": lambda a: a.at[:, 1].set(0.0)}, lambda a: a.at[:, 1].set(0.0)),
    ],
    ids=["array", "width", "numpy", "function", "ablation"],
)
@pytest.mark.parametrize("block", [Block, RematBlock], ids=["plain", "remat"])
def test_probe_changes_what_follows(probes, change, block):
    p = blocks_variables()["params"]
    outputs, acts = ft.from_linen(Blocks(block))(blocks_variables(), X, probes)
    hidden = change(block_by_hand(p["blocks_1"], block_by_hand(p["blocks_0"], X)))
    assert_close(acts["blocks_1"], hidden)
    assert_close(outputs, dense(p["head"], hidden))


def test_two_sites_are_changed_at_once():
    p = blocks_variables()["params"]
    outputs, acts = ft.from_linen(Blocks())(
        blocks_variables(), X, {"blocks_0/up": jnp.abs, "blocks_1": X}
    )
    up = jnp.abs(dense(p["blocks_0"]["up"], X))
    low = X + dense(p["blocks_0"]["down"], jnp.tanh(up))
    assert_close(acts["blocks_0"], low)
    assert_close(outputs, dense(p["head"], block_by_hand(p["blocks_1"], low) + X))


def test_probe_of_the_whole_module_changes_its_outputs():
    outputs, acts = ft.from_linen(Blocks())(
        blocks_variables(), X, {"__call__": lambda y: 2.0 * y}
    )
    want = 2 * np.float64(Blocks().apply(blocks_variables(), X))
    assert_close(outputs, want)
    assert_close(acts["__call__"], want)


@pytest.mark.slow_cases
@pytest.mark.parametrize("block", [Block, RematBlock], ids=["plain", "remat"])
def test_later_activation_is_differentiable_in_an_earlier_probe(block):
    probed = ft.from_linen(Blocks(block))
    p = blocks_variables()["params"]

    def later(d):
        return probed(blocks_variables(), X, {"blocks_0": d})[1]["blocks_1/up"]

    got = jax.jit(jax.jacrev(later))(jnp.zeros((B, D)))
    hidden = block_by_hand(p["blocks_0"], X)
    for i in range(B):
        want = jax.jacrev(lambda a: dense(p["blocks_1"]["up"], a))(hidden[i])
        assert_close(got[i, :, i], want)
        assert not np.any(np.delete(np.asarray(got[i]), i, axis=1))


@pytest.mark.parametrize(
    ("probes", "match"),
    [
        ({"blocks_1": jnp.ones(D + 1)}, r"'blocks_1': .*\(5, 4\), got shape \(5,\)"),
        ({"blocks_1": jnp.ones((2, D))}, r"'blocks_1': .*\(5, 4\), got shape \(2, 4\)"),
        (
            {"blocks_1": lambda a: a[:, :2]},
            r"'blocks_1': .*keep the shape \(5, 4\), it returned \(5, 2\)",
        ),
        (
            {"block_1": X},
            r"from_linen: no site 'block_1'; the sites are .*'blocks_0/up'.*'blocks_1'",
        ),
        ({"blocks_1#1": X}, r"no site 'blocks_1#1'"),
        ({"blocks_1": X, "nowhere": jnp.tanh}, r"no site 'nowhere'"),
    ],
)
def test_bad_probes_are_refused(probes, match):
    with pytest.raises(ValueError, match=match):
        ft.from_linen(Blocks())(blocks_variables(), X, probes)


def test_sites_keep_apart_the_calls_of_one_adapter():
    probed = ft.from_linen(Blocks())
    first = probed(blocks_variables(), X, {})[1]
    second = probed(blocks_variables(), X, {})[1]
    assert set(first) == set(second)
    with pytest.raises(ValueError, match="no site"):
        probed(blocks_variables(), X, {"nowhere": X})
    assert_close(probed(blocks_variables(), X, {})[1]["head"], first["head"])


def test_one_module_inside_another_call_is_not_recorded_twice():
    plain = Blocks().apply(blocks_variables(), X)
    probed = ft.from_linen(Blocks())

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner, _ = probed(blocks_variables(), x, {"head": jnp.zeros(3)})
            return nn.Dense(3, name="top")(inner)

    variables = variables_of(Outer())
    outputs, acts = ft.from_linen(Outer())(variables, X, {})
    assert set(acts) == {"top", "__call__"}
    assert_close(outputs, dense(variables["params"]["top"], plain))


def test_module_without_parameters():
    model = nn.Sequential([nn.tanh, jnp.sin])
    outputs, acts = ft.from_linen(model)({}, X, {})
    assert_close(outputs, np.sin(np.tanh(np.float64(X))))
    assert list(acts) == ["__call__"]


def test_loss_of_a_classifier_through_sequential():
    model = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
    variables = variables_of(model)
    labels = jnp.arange(B) % 3
    readout = readouts.loss(optax.softmax_cross_entropy_with_integer_labels, labels)
    taps = taps_of(model, variables, ["layers_0", "layers_2"], readout=readout)
    p = variables["params"]
    hidden = dense(p["layers_0"], X)
    logits = np.float64(dense(p["layers_2"], jnp.maximum(hidden, 0)))
    e = np.exp(logits - logits.max(-1, keepdims=True))
    residual = e / e.sum(-1, keepdims=True) - np.eye(3)[np.asarray(labels)]
    assert_close(taps["layers_2"].grads, residual[:, None])
    back = (residual @ np.float64(p["layers_2"]["kernel"]).T) * (np.asarray(hidden) > 0)
    assert_close(taps["layers_0"].grads, back[:, None])
