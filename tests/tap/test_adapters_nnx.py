import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import toyfeat as ft
from toyfeat import readouts

RNG = np.random.default_rng(4)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


B, D = 5, 4
X = normal(B, D)
CUBES = readouts.scalar(lambda y: jnp.sum(y**3))


def assert_close(got, want, tol=1e-5):
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=tol, atol=tol * np.abs(want).max()
    )


def by_hand(linear, x):
    y = x @ linear.kernel[...]
    return y + jnp.broadcast_to(linear.bias[...], y.shape)


def linear(inputs, outputs, seed):
    """A layer with numbers of numpy, which need no compilation."""
    rng = np.random.default_rng(seed)

    def fill(key, shape, dtype):
        return jnp.asarray(rng.normal(0.0, 0.6, shape), dtype)

    rngs = nnx.Rngs(0)
    return nnx.Linear(inputs, outputs, kernel_init=fill, bias_init=fill, rngs=rngs)


def cubes_jacobian(suffix, acts):
    """[B, 1, D]: per-example jacrev of the sum of the cubed outputs."""
    grad = jax.jacrev(lambda a: jnp.sum(suffix(a) ** 3))
    return jax.jit(jax.vmap(grad))(acts)[:, None]


def taps_of(model, sites, x=X, readout=CUBES, **options):
    probed, params = ft.from_nnx(model)
    run = jax.jit(
        lambda p, x: ft.tap(probed, p, x, sites=sites, readout=readout, **options)
    )
    return run(params, x)


class Block(nnx.Module):
    def __init__(self, seed):
        self.up = linear(D, 7, seed)
        self.down = linear(7, D, seed + 1)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class RematBlock(Block):
    @nnx.remat
    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class CalledUnderRemat(nnx.Module):
    """The transform is in the caller, as in most transformers."""

    def __init__(self, seed):
        self.inner = Block(seed)

    def __call__(self, x):
        return nnx.remat(lambda block, x: block(x))(self.inner, x)


class Blocks(nnx.Module):
    def __init__(self, block=Block):
        self.blocks = nnx.List([block(10 * i) for i in range(2)])
        self.head = linear(D, 3, 20)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


REMATS = {"plain": Block, "remat": RematBlock}


def block_by_hand(block, x):
    block = getattr(block, "inner", block)
    return x + by_hand(block.down, jnp.tanh(by_hand(block.up, x)))


@functools.cache
def plain():
    return Blocks()


def test_every_module_is_a_site_named_by_its_path():
    probed, params = ft.from_nnx(plain())
    outputs, acts = probed(params, X, {})
    assert set(acts) == {
        "__call__",
        "head",
        "blocks/0",
        "blocks/0/up",
        "blocks/0/down",
        "blocks/1",
        "blocks/1/up",
        "blocks/1/down",
    }
    np.testing.assert_array_equal(outputs, plain()(X))
    np.testing.assert_array_equal(acts["head"], outputs)
    np.testing.assert_array_equal(acts["__call__"], outputs)


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", REMATS)
def test_blocks_give_the_per_example_jacobian(kind):
    taps = taps_of(Blocks(REMATS[kind]), ["blocks/0", "blocks/1", "blocks/0/up"])
    model = plain()
    first = block_by_hand(model.blocks[0], X)
    second = block_by_hand(model.blocks[1], first)
    suffix = lambda a: by_hand(model.head, a)  # noqa: E731
    late = cubes_jacobian(suffix, second)
    early = cubes_jacobian(lambda a: suffix(block_by_hand(model.blocks[1], a)), first)
    up = by_hand(model.blocks[0].up, X)
    slope = 1 - np.tanh(np.float64(up)) ** 2
    back = np.float64(early[:, 0]) @ np.float64(model.blocks[0].down.kernel[...]).T
    assert_close(taps["blocks/1"].acts, second)
    assert_close(taps["blocks/1"].grads, late)
    assert_close(taps["blocks/0"].acts, first)
    assert_close(taps["blocks/0"].grads, early)
    assert_close(taps["blocks/0/up"].acts, up)
    assert_close(taps["blocks/0/up"].grads, (back * slope)[:, None])


def test_blocks_called_under_remat_give_the_same():
    got = taps_of(Blocks(CalledUnderRemat), ["blocks/0/inner", "blocks/0/inner/up"])
    want = taps_of(plain(), ["blocks/0", "blocks/0/up"])
    for new, old in zip(got.values(), want.values(), strict=True):
        assert_close(new.acts, old.acts)
        assert_close(new.grads, old.grads)


# the user's object


class Counting(nnx.Module):
    def __init__(self):
        self.dense = linear(D, D, 0)
        self.norm = nnx.BatchNorm(D, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(3))
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.dropout(self.norm(self.dense(x)))


TRAINING = pytest.mark.filterwarnings("ignore:from_nnx.*statistics over the batch")


@pytest.mark.slow_cases
@TRAINING
@pytest.mark.parametrize("make", [Counting, Blocks, lambda: Blocks(RematBlock)])
def test_the_model_that_was_given_stays_as_it_is(make):
    model = make()

    def picture():
        graph, state = nnx.split(model)
        leaves = jax.tree.map(
            lambda v: (
                jax.random.key_data(v)
                if jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
                else np.array(v)
            ),
            nnx.to_pure_dict(state),
        )
        names = [
            (path, type(node), sorted(vars(node)))
            for path, node in nnx.iter_graph(model)
            if isinstance(node, nnx.Module)
        ]
        return graph, leaves, names

    before = picture()
    probed, params = ft.from_nnx(model)
    for probes in ({}, {"__call__": jnp.tanh}, {"__call__": jnp.ones(1)}):
        probed(params, X, probes)
    ft.tap(probed, params, X, sites="__call__", readout=CUBES)
    after = picture()
    assert before[0] == after[0]
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])
    assert before[2] == after[2]


@TRAINING
def test_state_that_a_call_changes_is_dropped():
    model = Counting()
    probed, params = ft.from_nnx(model)
    first, second = probed(params, X, {})[0], probed(params, X, {})[0]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, nnx.clone(model)(X))


def test_later_changes_of_the_model_do_not_reach_the_probed_one():
    model = Blocks()
    probed, params = ft.from_nnx(model)
    before = probed(params, X, {})[0]
    model.head.kernel[...] = 0 * model.head.kernel[...]
    model.blocks[0] = Block(99)
    np.testing.assert_array_equal(probed(params, X, {})[0], before)


def test_other_parameters_may_be_passed():
    probed, params = ft.from_nnx(plain())
    other = jax.tree.map(lambda p: 0.5 * p, params)
    model = nnx.clone(plain())
    nnx.update(model, jax.tree.map(lambda p: 0.5 * p, nnx.state(model)))
    np.testing.assert_array_equal(probed(other, X, {})[0], model(X))


def test_models_own_class_checks_still_hold():
    class Picky(nnx.Module):
        def __init__(self):
            self.dense = linear(D, D, 0)

        def __call__(self, x):
            assert isinstance(self.dense, nnx.Linear)
            assert type(self).__name__ == "Picky"
            return self.helper(super().__repr__() and self.dense(x))

        def helper(self, x):
            return 2.0 * x

    probed, params = ft.from_nnx(Picky())
    assert_close(probed(params, X, {})[0], 2 * by_hand(linear(D, D, 0), X))


def test_super_calls_reach_the_parent():
    class Base(nnx.Module):
        def __init__(self):
            super().__init__()
            self.dense = linear(D, D, 0)

        def __call__(self, x):
            return self.dense(x)

    class Child(Base):
        def __call__(self, x):
            return jnp.tanh(super().__call__(x))

    model = Child()
    probed, params = ft.from_nnx(model)
    outputs, acts = probed(params, X, {"__call__": lambda y: 3.0 * y})
    assert_close(outputs, 3 * jnp.tanh(by_hand(model.dense, X)))
    assert_close(acts["dense"], by_hand(model.dense, X))


# probes


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", REMATS)
@pytest.mark.parametrize("jitted", [False, True])
def test_every_call_sees_its_own_probes(kind, jitted):
    probed, params = ft.from_nnx(Blocks(REMATS[kind]))
    model = plain()
    wrap = jax.jit if jitted else lambda f: f

    def expected(change, inner=lambda a: a):
        up = inner(by_hand(model.blocks[0].up, X))
        hidden = change(X + by_hand(model.blocks[0].down, jnp.tanh(up)))
        return by_hand(model.head, block_by_hand(model.blocks[1], hidden))

    for scale in (0.0, 2.0, -1.0):

        def change(a, scale=scale):
            return scale * a

        def shift(a, scale=scale):
            return a + scale * X

        for probes, want in [
            ({"blocks/0": change}, expected(change)),
            ({"blocks/0": scale * X}, expected(shift)),
            ({"blocks/0/down": scale * X}, expected(shift)),
            ({"blocks/0/up": change}, expected(lambda a: a, change)),
            ({"blocks/0/up": jnp.sin, "blocks/0": change}, expected(change, jnp.sin)),
            ({}, expected(lambda a: a)),
        ]:
            run = wrap(lambda p, x, probes=probes: probed(p, x, probes)[0])
            assert_close(run(params, X), want)


def test_same_function_with_other_contents_is_applied_anew():
    probed, params = ft.from_nnx(Blocks(RematBlock))
    scale = [1.0]

    def change(a):
        return scale[0] * a

    first = probed(params, X, {"blocks/1": change})[1]["blocks/1"]
    scale[0] = 3.0
    second = probed(params, X, {"blocks/1": change})[1]["blocks/1"]
    assert_close(second, 3 * np.float64(first))


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", REMATS)
def test_a_probe_function_may_close_over_what_is_differentiated(kind):
    probed, params = ft.from_nnx(Blocks(REMATS[kind]))
    model = plain()

    def effect(scale):
        return probed(params, X, {"blocks/0": lambda a: scale * a})[0].sum()

    def hand(scale):
        hidden = scale * block_by_hand(model.blocks[0], X)
        return by_hand(model.head, block_by_hand(model.blocks[1], hidden)).sum()

    assert jax.grad(effect)(0.7) == pytest.approx(float(jax.grad(hand)(0.7)), rel=1e-5)


@pytest.mark.parametrize(
    ("probe", "change"),
    [
        (X, lambda a: a + X),
        (X[0], lambda a: a + X[:1] * jnp.ones((B, 1))),
        (np.asarray(X), lambda a: a + X),
        (lambda a: a.at[:, 1].set(0.0), lambda a: a.at[:, 1].set(0.0)),
    ],
    ids=["array", "width", "numpy", "ablation"],
)
def test_probe_changes_what_follows(probe, change):
    probed, params = ft.from_nnx(plain())
    model = plain()
    outputs, acts = probed(params, X, {"blocks/0": probe})
    hidden = change(block_by_hand(model.blocks[0], X))
    assert_close(acts["blocks/0"], hidden)
    assert_close(outputs, by_hand(model.head, block_by_hand(model.blocks[1], hidden)))


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", REMATS)
def test_later_activation_is_differentiable_in_an_earlier_probe(kind):
    probed, params = ft.from_nnx(Blocks(REMATS[kind]))
    model = plain()

    def later(d):
        return probed(params, X, {"blocks/0": d})[1]["blocks/1/up"]

    got = jax.jit(jax.jacrev(later))(jnp.zeros((B, D)))
    hidden = block_by_hand(model.blocks[0], X)
    for i in range(B):
        want = jax.jacrev(lambda a: by_hand(model.blocks[1].up, a))(hidden[i])
        assert_close(got[i, :, i], want)
        assert not np.any(np.delete(np.asarray(got[i]), i, axis=1))


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("probes", "match"),
    [
        ({"blocks/1": jnp.ones(D + 1)}, r"'blocks/1': .*\(5, 4\), got shape \(5,\)"),
        ({"blocks/1": jnp.ones((2, D))}, r"'blocks/1': .*\(5, 4\), got shape \(2, 4\)"),
        (
            {"blocks/1": lambda a: a[:, :2]},
            r"'blocks/1': .*keep the shape \(5, 4\), it returned \(5, 2\)",
        ),
        (
            {"blocks_1": X},
            r"from_nnx: no site 'blocks_1'; the sites are .*'blocks/0/up'.*'blocks/1'",
        ),
        ({"blocks/1#1": X}, r"no site 'blocks/1#1'"),
        ({"blocks/1": X, "nowhere": jnp.tanh}, r"no site 'nowhere'"),
    ],
)
@pytest.mark.parametrize("kind", REMATS)
def test_bad_probes_are_refused(kind, probes, match):
    probed, params = ft.from_nnx(Blocks(REMATS[kind]))
    with pytest.raises(ValueError, match=match):
        probed(params, X, probes)


@pytest.mark.parametrize(
    "model", [lambda x: x, Block, jnp.ones(3)], ids=["function", "class", "array"]
)
def test_only_modules_are_taken(model):
    with pytest.raises(TypeError, match=r"from_nnx: .*nnx"):
        ft.from_nnx(model)


# containers and sharing


def test_sequential_names_its_layers():
    model = nnx.Sequential(linear(D, 6, 0), jnp.tanh, linear(6, 3, 1))
    taps = taps_of(model, ["layers/0", "layers/2"])
    hidden = by_hand(model.layers[0], X)
    suffix = lambda a: by_hand(model.layers[2], jnp.tanh(a))  # noqa: E731
    assert_close(taps["layers/0"].acts, hidden)
    assert_close(taps["layers/0"].grads, cubes_jacobian(suffix, hidden))
    assert_close(taps["layers/2"].acts, suffix(hidden))


def test_dict_of_modules_names_its_keys():
    class Heads(nnx.Module):
        def __init__(self):
            self.heads = nnx.Dict({"a": linear(D, 3, 0), "b": linear(D, 3, 1)})

        def __call__(self, x):
            return jnp.tanh(self.heads["a"](x)) * self.heads["b"](x)

    model = Heads()
    taps = taps_of(model, ["heads/a", "heads/b"])
    a, b = (np.float64(by_hand(model.heads[k], X)) for k in "ab")
    slope = 3 * (np.tanh(a) * b) ** 2
    assert_close(taps["heads/a"].grads, (slope * (1 - np.tanh(a) ** 2) * b)[:, None])
    assert_close(taps["heads/b"].grads, (slope * np.tanh(a))[:, None])


class Shared(nnx.Module):
    def __init__(self, remat=False):
        self.shared = linear(D, D, 0)
        self.remat = remat

    def __call__(self, x):
        call = nnx.remat(lambda m, x: m(x)) if self.remat else lambda m, x: m(x)
        return jnp.tanh(call(self.shared, jnp.tanh(call(self.shared, x))))


@pytest.mark.slow_cases
@pytest.mark.parametrize("remat", [False, True])
def test_shared_module_called_twice_gives_two_sites(remat):
    model = Shared(remat)
    taps = taps_of(model, ["shared", "shared#1"])
    first = by_hand(model.shared, X)
    second = by_hand(model.shared, jnp.tanh(first))
    late = cubes_jacobian(jnp.tanh, second)
    early = cubes_jacobian(
        lambda a: jnp.tanh(by_hand(model.shared, jnp.tanh(a))), first
    )
    assert_close(taps["shared"].acts, first)
    assert_close(taps["shared#1"].acts, second)
    assert_close(taps["shared#1"].grads, late)
    assert_close(taps["shared"].grads, early)


@pytest.mark.parametrize("remat", [False, True])
def test_probe_of_one_call_of_a_shared_module_leaves_the_other(remat):
    model = Shared(remat)
    probed, params = ft.from_nnx(model)
    first = by_hand(model.shared, X)
    for probe in (2.0 * X, lambda a: a + 2.0 * X):
        outputs, acts = probed(params, X, {"shared#1": probe})
        assert_close(acts["shared"], first)
        want = jnp.tanh(by_hand(model.shared, jnp.tanh(first)) + 2 * X)
        assert_close(outputs, want)


def test_one_module_under_two_names_gives_two_sites():
    class TwoNames(nnx.Module):
        def __init__(self):
            self.a = linear(D, D, 0)
            self.b = self.a

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))

    model = TwoNames()
    probed, params = ft.from_nnx(model)
    _, acts = probed(params, X, {})
    sites = sorted(set(acts) - {"__call__"})
    assert len(sites) == 2
    first = by_hand(model.a, X)
    assert_close(acts[sites[0]], first)
    assert_close(acts[sites[1]], by_hand(model.a, jnp.tanh(first)))


def test_tied_parameter_stays_tied():
    class Tied(nnx.Module):
        def __init__(self):
            self.a = linear(D, D, 0)
            self.b = linear(D, D, 1)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))

    model = Tied()
    probed, params = ft.from_nnx(model)
    np.testing.assert_array_equal(probed(params, X, {})[0], model(X))
    taps = taps_of(model, "a")["a"]
    acts = by_hand(model.a, X)
    want = cubes_jacobian(lambda a: by_hand(model.b, jnp.tanh(a)), acts)
    assert_close(taps.grads, want)


def test_other_methods_are_sites_with_their_name():
    class Decoder(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(6, D, rngs=nnx.Rngs(0))
            self.mlp = linear(D, D, 1)

        def __call__(self, tokens):
            return self.embed.attend(jnp.tanh(self.mlp(self.embed(tokens))))

    model = Decoder()
    tokens = jnp.asarray(RNG.integers(0, 6, (B, 3)))
    readout = readouts.jacobian()
    taps = taps_of(model, ["embed", "embed.attend", "mlp"], tokens, readout)
    table = np.float64(model.embed.embedding[...])
    hidden = np.float64(by_hand(model.mlp, model.embed(tokens)))
    assert_close(taps["embed"].acts, table[tokens].reshape(-1, D))
    assert_close(taps["embed.attend"].acts, (np.tanh(hidden) @ table.T).reshape(-1, 6))
    slope = (1 - np.tanh(hidden) ** 2).reshape(B, 3, D)
    want = np.zeros((B, 3, 3, 6, D))  # input, position, output position, entry
    for t in range(3):
        want[:, t, t] = table[None] * slope[:, t, None]
    assert_close(taps["mlp"].grads, want.reshape(B * 3, 18, D))


def test_parts_of_a_tuple_are_sites_of_their_own():
    class Pair(nnx.Module):
        def __init__(self):
            self.dense = linear(D, 3, 0)

        def __call__(self, x):
            return self.dense(x), {"wide": jnp.tanh(x)}

    class OfPair(nnx.Module):
        def __init__(self):
            self.pair = Pair()
            self.out = linear(D, 3, 1)

        def __call__(self, x):
            left, right = self.pair(x)
            return jnp.sin(left) + self.out(right["wide"])

    model = OfPair()
    taps = taps_of(model, ["pair[0]", "pair[1][wide]"])
    left, wide = by_hand(model.pair.dense, X), jnp.tanh(X)
    slope = 3 * np.float64(jnp.sin(left) + by_hand(model.out, wide)) ** 2
    assert_close(taps["pair[0]"].acts, left)
    assert_close(taps["pair[1][wide]"].acts, wide)
    assert_close(taps["pair[0]"].grads, (slope * np.cos(np.float64(left)))[:, None])
    back = slope @ np.float64(model.out.kernel[...]).T
    assert_close(taps["pair[1][wide]"].grads, back[:, None])


def test_bfloat16_module_keeps_bfloat16_acts_and_grads():
    class Half(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.low = nnx.Linear(D, 6, dtype=jnp.bfloat16, rngs=rngs)
            self.high = linear(6, 3, 1)

        def __call__(self, x):
            return self.high(nnx.relu(self.low(x)).astype(jnp.float32))

    taps = taps_of(Half(), ["low", "high"])
    assert taps["low"].acts.dtype == taps["low"].grads.dtype == jnp.bfloat16
    assert taps["high"].acts.dtype == taps["high"].grads.dtype == jnp.float32


def test_inputs_in_a_tuple_are_positional_arguments():
    class Two(nnx.Module):
        def __init__(self):
            self.dense = linear(D, 3, 0)

        def __call__(self, x, scale):
            return jnp.tanh(self.dense(x) * scale[:, None])

    model, scale = Two(), normal(B)
    taps = taps_of(model, "dense", (X, scale), batch_size=2)["dense"]
    acts, s = np.float64(by_hand(model.dense, X)), np.float64(scale)[:, None]
    y = np.tanh(acts * s)
    assert_close(taps.acts, acts)
    assert_close(taps.grads, (3 * y**2 * (1 - y**2) * s)[:, None])


# scan


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(D, D, rngs=rngs, bias_init=nnx.initializers.normal(0.3))

    def __call__(self, x):
        return x + jnp.tanh(self.dense(x))


class Scanned(nnx.Module):
    def __init__(self, length=3, remat=False):
        @nnx.split_rngs(splits=length)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return Layer(rngs)

        self.first = linear(D, D, 1)
        self.layers = create(nnx.Rngs(0))
        self.remat = remat

    def __call__(self, x):
        def step(x, layer):
            return layer(x)

        if self.remat:
            step = nnx.remat(step)
        scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(self.first(x), self.layers)


def scan_by_hand(model, x, probes):
    kernels, biases = model.layers.dense.kernel[...], model.layers.dense.bias[...]
    x, acts = by_hand(model.first, x), []
    for kernel, bias, probe in zip(kernels, biases, probes, strict=True):
        acts.append(x @ kernel + bias + probe)
        x = x + jnp.tanh(acts[-1])
    return x, acts


@pytest.mark.slow_cases
@pytest.mark.parametrize(("length", "remat"), [(3, False), (3, True), (B, False)])
def test_scanned_layers_are_sites(length, remat):
    model = Scanned(length, remat)
    sites = [f"layers/dense@{i}" for i in range(length)]
    taps = taps_of(model, [*sites, "first"])
    zeros = jnp.zeros((length, D))

    def gradients(row):
        return jax.jacrev(lambda d: jnp.sum(scan_by_hand(model, row, d)[0] ** 3))(zeros)

    grads = jax.jit(jax.vmap(gradients))(X)
    acts = jax.jit(jax.vmap(lambda row: jnp.stack(scan_by_hand(model, row, zeros)[1])))(
        X
    )
    for i, site in enumerate(sites):
        assert_close(taps[site].acts, acts[:, i])
        assert_close(taps[site].grads, grads[:, i, None])
    assert_close(taps["first"].acts, by_hand(model.first, X))


@pytest.mark.slow_cases
@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layer_is_probed_alone_and_anew(remat):
    model = Scanned(remat=remat)
    probed, params = ft.from_nnx(model)
    for scale in (1.0, -2.0):
        probes = {"layers/dense@1": scale * X, "layers/dense@2": jnp.ones(D)}
        outputs, acts = probed(params, X, probes)
        for i, row in enumerate(X):
            delta = jnp.stack([jnp.zeros(D), scale * row, jnp.ones(D)])
            want, hand = scan_by_hand(model, row, delta)
            assert_close(outputs[i], want)
            for k in range(3):
                assert_close(acts[f"layers/dense@{k}"][i], hand[k])


@pytest.mark.slow
def test_later_scanned_layer_is_differentiable_in_an_earlier_one():
    model = Scanned()
    probed, params = ft.from_nnx(model)

    def later(d):
        return probed(params, X, {"layers/dense@0": d})[1]["layers/dense@2"]

    got = jax.jit(jax.jacrev(later))(jnp.zeros((B, D)))
    for i, row in enumerate(X):

        def hand(d, row=row):
            return scan_by_hand(model, row, jnp.zeros((3, D)).at[0].set(d))[1][2]

        want = jax.jacrev(hand)(jnp.zeros(D))
        np.testing.assert_allclose(got[i, :, i], want, rtol=1e-5, atol=1e-6)


def test_function_for_a_layer_of_a_scan_is_refused():
    probed, params = ft.from_nnx(Scanned())
    with pytest.raises(ValueError, match=r"layers/dense@1"):
        probed(params, X, {"layers/dense@1": jnp.tanh})


def test_unknown_layer_of_a_scan_is_refused():
    probed, params = ft.from_nnx(Scanned())
    with pytest.raises(ValueError, match=r"no site 'layers/dense@3'.*layers/dense@2"):
        probed(params, X, {"layers/dense@3": X})


# the model's own recording, other transforms


class Sowing(nnx.Module):
    def __init__(self):
        self.dense = linear(D, D, 0)

    def __call__(self, x):
        x = self.dense(x)
        self.sow(nnx.Intermediate, "hidden", x)
        x = self.perturb("shift", x)
        return jnp.tanh(x)


def test_models_own_sow_and_perturb_keep_working():
    model = Sowing()
    probed, params = ft.from_nnx(model)
    outputs, acts = probed(params, X, {})
    want = jnp.tanh(by_hand(model.dense, X))
    assert_close(outputs, want)
    assert set(acts) == {"__call__", "dense"}
    taps = taps_of(model, "dense")["dense"]
    assert_close(taps.grads, cubes_jacobian(jnp.tanh, by_hand(model.dense, X)))
    got, recorded = nnx.capture(model, nnx.Intermediate)(X)
    assert_close(got, want)
    assert_close(recorded["hidden"][0], by_hand(model.dense, X))
    got, deltas = nnx.capture(model, nnx.Perturbation)(X)
    assert_close(got, want)
    np.testing.assert_array_equal(deltas["shift"], np.zeros((B, D)))


def test_users_capture_around_a_probed_call_is_left_alone():
    model = Sowing()
    probed, params = ft.from_nnx(model)

    class Outer(nnx.Module):
        def __init__(self):
            self.dense = linear(D, D, 7)

        def __call__(self, x):
            x = self.dense(x)
            self.sow(nnx.Intermediate, "hidden", x)
            return probed(params, x, {"dense": jnp.ones(D)})[0]

    outer = Outer()
    outputs, recorded = nnx.capture(outer, nnx.Intermediate)(X)
    hidden = by_hand(outer.dense, X)
    assert_close(outputs, jnp.tanh(by_hand(model.dense, hidden) + 1))
    assert_close(recorded["hidden"][0], hidden)


@pytest.mark.slow_cases
@pytest.mark.parametrize("probe", [X, jnp.sin], ids=["array", "function"])
def test_jitted_methods_keep_their_sites_on_every_call(probe):
    class Jitted(Block):
        @nnx.jit
        def __call__(self, x):
            return x + self.down(jnp.tanh(self.up(x)))

    probed, params = ft.from_nnx(Blocks(Jitted))
    reference, _ = ft.from_nnx(plain())
    for probes in ({}, {"blocks/0": probe}, {"blocks/0": jnp.cos}, {}):
        outputs, acts = probed(params, X, probes)
        want, all_acts = reference(params, X, probes)
        assert set(acts) == set(all_acts)
        assert_close(outputs, want)
        for site, act in all_acts.items():
            assert_close(acts[site], act)


def test_module_vmapped_with_unmapped_state_raises():
    class Mapped(nnx.Module):
        def __init__(self):
            self.dense = linear(D, 3, 0)

        def __call__(self, x):
            apply = nnx.vmap(lambda m, row: m(row), in_axes=(None, 0), out_axes=0)
            return jnp.tanh(apply(self.dense, x))

    with pytest.raises(ValueError, match="vmap"):
        taps_of(Mapped(), "dense")


def test_module_that_is_no_pytree_may_be_rematerialised():
    class Listed(nnx.Module, pytree=False):
        def __init__(self):
            self.layers = [linear(D, D, 0), linear(D, D, 1)]

        @nnx.remat
        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    model = Listed()
    taps = taps_of(model, "layers/0")["layers/0"]
    acts = by_hand(model.layers[0], X)
    assert_close(taps.acts, acts)
    suffix = lambda a: jnp.tanh(by_hand(model.layers[1], jnp.tanh(a)))  # noqa: E731
    assert_close(taps.grads, cubes_jacobian(suffix, acts))


def test_recurrent_layer_of_flax_is_a_site():
    class Recurrent(nnx.Module):
        def __init__(self):
            self.rnn = nnx.RNN(nnx.LSTMCell(D, 3, rngs=nnx.Rngs(0)))
            self.head = linear(3, 2, 1)

        def __call__(self, x):
            return self.head(self.rnn(x))

    model, x = Recurrent(), normal(2, 3, D)
    taps = taps_of(model, "rnn", x, readouts.jacobian())["rnn"]
    want = np.zeros((2, 3, 3, 2, 3))
    for t in range(3):
        want[:, t, t] = np.float64(model.head.kernel[...]).T
    assert_close(taps.acts, model.rnn(x).reshape(6, 3))
    assert_close(taps.grads, want.reshape(6, 6, 3))


class Normed(nnx.Module):
    def __init__(self):
        self.dense = linear(D, 6, 0)
        self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.head = linear(6, 3, 1)

    def __call__(self, x):
        return self.head(self.dropout(self.norm(self.dense(x))))


def test_evaluation_mode_is_kept():
    model = Normed()
    model(X)
    model.eval()
    taps = taps_of(model, "dense")["dense"]
    norm = model.norm

    def suffix(act):
        act = (act - norm.mean[...]) * jax.lax.rsqrt(norm.var[...] + 1e-5)
        return by_hand(model.head, act * norm.scale[...] + norm.bias[...])

    acts = by_hand(model.dense, X)
    assert_close(taps.acts, acts)
    assert_close(taps.grads, cubes_jacobian(suffix, acts))


@TRAINING
def test_training_mode_draws_the_models_next_dropout():
    model = Normed()
    probed, params = ft.from_nnx(model)
    with pytest.warns(UserWarning, match=r"from_nnx: .*'norm' \(BatchNorm\).*eval"):
        outputs, acts = probed(params, X, {})
    np.testing.assert_allclose(outputs, nnx.clone(model)(X), rtol=1e-6, atol=1e-6)
    kept = np.float64(acts["dropout"]) / np.float64(acts["norm"])
    assert set(np.round(np.unique(kept), 5)) == {0.0, 2.0}
    taps = taps_of(model, ["norm", "dropout"])
    slope = 3 * np.float64(outputs) ** 2
    at_dropout = slope @ np.float64(model.head.kernel[...]).T
    assert_close(taps["dropout"].grads, at_dropout[:, None])
    assert_close(taps["norm"].grads, (at_dropout * kept)[:, None])


@pytest.mark.slow
def test_attention_of_flax_has_its_projections_as_sites():
    model = nnx.MultiHeadAttention(
        num_heads=2, in_features=D, decode=False, rngs=nnx.Rngs(0)
    )
    x = normal(2, 3, D)
    probed, params = ft.from_nnx(model)
    outputs, acts = probed(params, x, {})
    np.testing.assert_array_equal(outputs, model(x))
    assert {"query", "key", "value", "out", "__call__"} <= set(acts)
    taps = taps_of(model, "out", x, readouts.jacobian())["out"]
    want = np.zeros((2, 3, 3, D, D))
    for t in range(3):
        want[:, t, t] = np.eye(D)
    assert_close(taps.grads, want.reshape(6, 12, D))
