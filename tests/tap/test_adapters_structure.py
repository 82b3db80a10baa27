"""Structures of other people's flax models: lifted functions, conditions, stacks.

The oracles are the plain model under a shift of a bias, and ``jax.grad`` by it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import toyfeat as ft
from toyfeat import readouts

RNG = np.random.default_rng(6)
B, D = 5, 4
X = jnp.asarray(RNG.standard_normal((B, D)), jnp.float32)
KEY = jax.random.key(0)
CUBES = readouts.scalar(lambda y: jnp.sum(y**3))


def filled(tree):
    return jax.tree.map(
        lambda leaf: jnp.asarray(RNG.normal(0.0, 0.6, leaf.shape), leaf.dtype), tree
    )


def variables_of(module, x=X):
    return filled(jax.eval_shape(module.init, KEY, x))


def assert_close(got, want, tol=2e-5):
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=tol, atol=tol * np.abs(want).max()
    )


def taps_of(probed, params, sites, x=X):
    run = jax.jit(lambda p, x: ft.tap(probed, p, x, sites=sites, readout=CUBES))
    return run(params, x)


# two values with one name


def lifted(lift):
    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            def mlp(module, x):
                return nn.Dense(D, name="mlp")(jnp.tanh(x))

            return nn.Dense(3, name="head")(lift(mlp)(self, x))

    return Lifted()


@pytest.mark.slow
@pytest.mark.parametrize("lift", [nn.remat, nn.jit], ids=["remat", "jit"])
def test_a_lifted_function_is_no_site(lift):
    model = lifted(lift)
    variables = variables_of(model)
    probed = ft.from_linen(model)
    outputs, acts = probed(variables, X, {})
    assert set(acts) == {"mlp", "head", "__call__"}
    # The gradient of a bias is the sum of the gradients at its layer.
    grads = jax.grad(lambda v: jnp.sum(model.apply(v, X) ** 3))(variables)
    taps = taps_of(probed, variables, "mlp")["mlp"]
    assert_close(taps.grads.sum((0, 1)), grads["params"]["mlp"]["bias"])
    shifted = jax.tree.map(lambda leaf: leaf, variables)
    shifted["params"]["mlp"]["bias"] += 1.0
    for probe in (jnp.ones(D), lambda a: a + 1.0):
        moved, moved_acts = probed(variables, X, {"mlp": probe})
        assert_close(moved_acts["mlp"], acts["mlp"] + 1.0)
        assert_close(moved, model.apply(shifted, X))
    assert_close(outputs, model.apply(variables, X))


class Encoding(nn.Module):
    def setup(self):
        self.encoder = nn.Dense(D, name="encode")

    def encode(self, x):
        return jnp.tanh(self.encoder(x))

    def __call__(self, x):
        return self.encode(x)


class Numbered(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(D, name="d")
        return nn.Dense(D, name="d#1")(layer(layer(x)))


class NnxNumbered(nnx.Module):
    def __init__(self):
        self.d = nnx.Linear(D, D, rngs=nnx.Rngs(0))
        setattr(self, "d#1", nnx.Linear(D, D, rngs=nnx.Rngs(0)))

    def __call__(self, x):
        return getattr(self, "d#1")(self.d(self.d(x)))


@pytest.mark.parametrize(
    ("make", "site"),
    [(Encoding, "encode"), (Numbered, "d#1"), (NnxNumbered, "d#1")],
)
@pytest.mark.parametrize("probed_site", [False, True])
def test_two_values_with_one_name_are_refused(make, site, probed_site):
    model = make()
    if isinstance(model, nnx.Module):
        probed, params = ft.from_nnx(model)
    else:
        probed, params = ft.from_linen(model), variables_of(model)
    with pytest.raises(ValueError, match=rf"from_.*: .*two values named '{site}'.*sub"):
        probed(params, X, {site: X} if probed_site else {})


def test_the_remedy_for_two_values_with_one_name_works():
    class Outer(nn.Module):
        def setup(self):
            self.model = Encoding()

        def __call__(self, x):
            return self.model(x)

    variables = {"params": {"model": variables_of(Encoding())["params"]}}
    _, acts = ft.from_linen(Outer())(variables, X, {})
    assert set(acts) == {"model/encode", "model.encode", "model", "__call__"}
    assert_close(acts["model.encode"], jnp.tanh(acts["model/encode"]))


class Adapted(nn.Module):
    """A low-rank update in the scope of the layer that it updates."""

    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    @nn.compact
    def __call__(self, x):
        return self.inner(x) + x @ self.param("a", nn.initializers.ones, (D, D))


class AdaptedDense(nn.Dense):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(self.features, parent=self)
        nn.share_scope(self, layer)
        return jnp.tanh(layer(x))


class Sharing(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Adapted(nn.Dense(D, name="dense"), name="lora")(x)
        return AdaptedDense(D, name="wrapped")(x)


def test_modules_of_one_scope_have_their_own_names():
    variables = variables_of(Sharing())
    p = variables["params"]
    probed = ft.from_linen(Sharing())
    _, acts = probed(variables, X, {})
    names = {"dense", "lora", "wrapped/Dense_0", "wrapped", "__call__"}
    assert set(acts) == names
    dense = X @ p["dense"]["kernel"] + jnp.broadcast_to(p["dense"]["bias"], (B, D))
    assert_close(acts["dense"], dense)
    assert_close(acts["lora"], dense + X @ p["dense"]["a"])
    assert_close(acts["wrapped"], jnp.tanh(acts["wrapped/Dense_0"]))
    for site in names - {"wrapped", "__call__"}:
        moved = probed(variables, X, {site: X})[1]
        assert_close(moved[site], acts[site] + X)
        assert not np.allclose(moved["wrapped"], acts["wrapped"])


# conditions and loops of linen


def branching(branches, first):
    class Branching(nn.Module):
        @nn.compact
        def __call__(self, x):
            if self.is_initializing():
                hidden = max([branch(self, x) for branch in first], key=id)
            else:
                hidden = nn.switch(jnp.int32(1), branches, self, x)
            return nn.Dense(3, name="head")(hidden)

    return Branching()


def shared(module, x):
    return nn.Dense(D, name="shared")(x)


def negated(module, x):
    return -nn.Dense(D, name="shared")(x)


def other(module, x):
    return nn.Dense(D, name="other")(nn.Dense(2, name="narrow")(x))


def test_branches_of_named_functions_share_their_site():
    model = branching([shared, negated], first=[shared])
    variables = variables_of(model)
    probed = ft.from_linen(model)
    grads = jax.grad(lambda v: jnp.sum(model.apply(v, X) ** 3))(variables)
    taps = taps_of(probed, variables, "shared")["shared"]
    assert_close(taps.grads.sum((0, 1)), grads["params"]["shared"]["bias"])


def test_branches_with_modules_of_their_own_run_without_sites():
    model = branching([shared, other], first=[shared, other])
    variables = variables_of(model)
    probed = ft.from_linen(model)
    outputs, acts = probed(variables, X, {})
    assert set(acts) == {"head", "__call__"}
    assert_close(outputs, model.apply(variables, X))
    grads = jax.grad(lambda v: jnp.sum(model.apply(v, X) ** 3))(variables)
    taps = taps_of(probed, variables, "head")["head"]
    assert_close(taps.grads.sum((0, 1)), grads["params"]["head"]["bias"])
    for probe in (X, jnp.tanh):
        with pytest.raises(ValueError, match=r"no site 'other'.*branch of a condition"):
            probed(variables, X, {"other": probe})


def transformed(way):
    class Transformed(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(D, name="layer")
            hidden = layer(x) if self.is_initializing() else way(layer, x)
            return nn.Dense(3, name="head")(hidden)

    return Transformed()


class NnxTransformed(nnx.Module):
    def __init__(self, way):
        self.layer = nnx.Linear(D, D, rngs=nnx.Rngs(0))
        self.spare = nnx.Linear(D, D, rngs=nnx.Rngs(1))
        self.head = nnx.Linear(D, 3, rngs=nnx.Rngs(2))
        self.way = way

    def __call__(self, x):
        return self.head(self.way(self, x))


PLAIN_TRANSFORMS = {
    "vmap": lambda f, x: jax.vmap(f)(x),
    "checkpoint": lambda f, x: jax.checkpoint(lambda x: f(x))(x),
    "jit": lambda f, x: jax.jit(lambda x: f(x))(x),
    "map": lambda f, x: jax.lax.map(f, x),
    "scan": lambda f, x: jax.lax.scan(lambda c, _: (f(c), 0), x, None, length=2)[0],
    "cond": lambda f, x: jax.lax.cond(x.sum() > 0, lambda x: f(x), jnp.negative, x),
    "grad": lambda f, x: jax.grad(lambda x: jnp.sum(f(x) ** 2))(x),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", PLAIN_TRANSFORMS)
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_module_in_a_plain_transformation_is_no_site(name, library):
    way = PLAIN_TRANSFORMS[name]
    if library == "linen":
        model = transformed(way)
        params = variables_of(model)
        probed, want = ft.from_linen(model), model.apply(params, X)
    else:
        module = NnxTransformed(lambda model, x: way(model.layer, x))
        (probed, params), want = ft.from_nnx(module), module(X)
    outputs, acts = probed(params, X, {})
    assert_close(outputs, want)
    assert set(acts) == {"head", "__call__"}
    assert_close(probed(params, X, {"head": jnp.ones(3)})[0], want + 1)
    with pytest.raises(ValueError, match=r"no site 'layer'.*plain jax\.vmap"):
        ft.tap(probed, params, X, sites="layer", readout=CUBES)


# stacks of linen


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(D, name="dense")(x)), None


MADE_BEFORE = nn.scan(
    nn.remat(Residual),
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=3,
)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(MADE_BEFORE(name="layers")(x, None)[0])


def test_layers_of_a_stack_that_was_made_elsewhere_are_sites():
    variables = variables_of(Stack())
    probed = ft.from_linen(Stack())
    sites = [f"layers/dense@{i}" for i in range(3)]
    taps = taps_of(probed, variables, sites)
    grads = jax.grad(lambda v: jnp.sum(Stack().apply(v, X) ** 3))(variables)
    biases = grads["params"]["layers"]["dense"]["bias"]
    for i, site in enumerate(sites):
        assert_close(taps[site].grads.sum((0, 1)), biases[i])
    # A model that runs on its own is left as it is.
    _, updated = Stack().apply(variables, X, mutable=["toyfeat_acts"])
    assert updated == {}


def test_a_loop_over_time_is_one_site():
    x = jnp.ones((2, 6, D))
    model = nn.RNN(nn.LSTMCell(3))
    _, acts = ft.from_linen(model)(variables_of(model, x), x, {})
    assert set(acts) == {"__call__"}


def test_members_of_an_ensemble_are_sites():
    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            dense = nn.vmap(nn.Dense, in_axes=None, out_axes=1, axis_size=3, **options)
            return dense(2, name="dense")(x)

    variables = variables_of(Ensemble())
    taps = taps_of(ft.from_linen(Ensemble()), variables, "dense@2")["dense@2"]
    acts = Ensemble().apply(variables, X)[:, 2]
    assert_close(taps.acts, acts)
    assert_close(taps.grads, 3 * np.float64(acts)[:, None] ** 2)


@pytest.mark.parametrize("positions", [B, 3])
def test_a_batch_axis_is_told_from_as_many_positions(positions):
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.vmap(
                Residual,
                variable_axes={"params": None},
                split_rngs={"params": False},
                in_axes=(0, None),
            )
            return block(name="block")(x, None)[0]

    x = jnp.asarray(RNG.standard_normal((B, positions, D)), jnp.float32)
    variables = variables_of(Mapped(), x)
    _, acts = ft.from_linen(Mapped())(variables, x, {})
    p = variables["params"]["block"]["dense"]
    want = x @ p["kernel"] + jnp.broadcast_to(p["bias"], x.shape)
    assert_close(acts["block/dense"], want)


def test_a_stack_of_as_many_layers_as_examples_keeps_its_layers():
    variables, x = variables_of(Stack()), X[:3]
    _, acts = ft.from_linen(Stack())(variables, x, {})
    assert acts["layers/dense@2"].shape == (3, D)
    assert "layers/dense" not in acts


# transforms of nnx


def stack_of(make):
    create = nnx.split_rngs(splits=3)(nnx.vmap(make, in_axes=0, out_axes=0))
    return create(nnx.Rngs(0))


class WithList(nnx.Module):
    def __init__(self, rngs):
        self.parts = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for part in self.parts:
            x = jnp.tanh(part(x))
        return x


def sequential(rngs):
    return nnx.Sequential(nnx.Linear(D, D, rngs=rngs), jnp.tanh)


STACKS = {
    "list": (WithList, "stack/parts/1", lambda g: g["stack"]["parts"][1]),
    "sequential": (sequential, "stack/layers/0", lambda g: g["stack"]["layers"][0]),
}


class Stacked(nnx.Module):
    def __init__(self, make, remat):
        self.stack = stack_of(make) if not remat else make(nnx.Rngs(0))
        self.head = nnx.Linear(D, 3, rngs=nnx.Rngs(2))
        self.remat = remat

    def __call__(self, x):
        step = nnx.remat(lambda x, block: block(x))
        if not self.remat:
            step = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(step(x, self.stack))


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("remat", [False, True])
def test_containers_in_a_stack_have_sites(kind, remat):
    make, site, layer = STACKS[kind]
    model = Stacked(make, remat)
    probed, params = ft.from_nnx(model)
    graph, state = nnx.split(model)
    grads = jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(X) ** 3))(state)
    bias = layer(grads)["bias"][...]
    if not remat:
        site, bias = f"{site}@1", bias[1]
    taps = taps_of(probed, params, [site, "head"])
    assert_close(taps[site].grads.sum((0, 1)), bias)
    assert_close(taps["head"].acts, model(X))


def test_elements_of_a_dict_are_the_models_own():
    class Heads(nnx.Module):
        def __init__(self):
            linears = {k: nnx.Linear(D, 3, rngs=nnx.Rngs(0)) for k in "ab"}
            self.heads = nnx.Dict(linears)

        def __call__(self, x):
            return sum(self.heads[name](x) for name in self.heads)

    probed, params = ft.from_nnx(Heads())
    outputs, acts = probed(params, X, {})
    assert set(acts) == {"heads/a", "heads/b", "__call__"}
    assert_close(outputs, 2 * acts["heads/a"])


NNX_CONTROL = {
    "cond": lambda m, x: nnx.cond(
        x.sum() > 0, lambda m, x: m.layer(x), lambda m, x: m.spare(x), m, x
    ),
    "switch": lambda m, x: nnx.switch(
        jnp.int32(1),
        [lambda m, x: m.layer(x), lambda m, x: m.spare(m.layer(x))],
        m,
        x,
    ),
    "fori": lambda m, x: nnx.fori_loop(
        0, 3, lambda i, c: (c[0], c[0](c[1])), (m.layer, x)
    )[1],
    "while": lambda m, x: nnx.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1], c[1](c[2])), (0, m.layer, x)
    )[2],
    "vmap": lambda m, x: nnx.vmap(lambda f, x: f(x), in_axes=(None, 0))(m.layer, x),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", NNX_CONTROL)
def test_control_flow_of_nnx_runs_without_sites_inside(name):
    model = NnxTransformed(NNX_CONTROL[name])
    probed, params = ft.from_nnx(model)
    outputs, acts = probed(params, X, {})
    assert_close(outputs, model(X))
    assert set(acts) == {"head", "__call__"}
    taps = taps_of(probed, params, "head")["head"]
    assert_close(taps.grads, 3 * np.float64(outputs)[:, None] ** 2)
    assert_close(probed(params, X, {"head": lambda a: a + 1})[0], model(X) + 1)
    for probe in (X, jnp.tanh):
        with pytest.raises(ValueError, match=r"no site 'layer'"):
            probed(params, X, {"layer": probe})


def test_branches_of_nnx_that_call_one_module_share_its_site():
    model = NnxTransformed(
        lambda m, x: nnx.cond(
            x.sum() > 1e9, lambda f, x: f(x), lambda f, x: f(2 * x), m.layer, x
        )
    )
    probed, params = ft.from_nnx(model)
    outputs, acts = probed(params, X, {"layer": lambda a: 3 * a})
    assert_close(acts["layer"], 3 * model.layer(2 * X))
    assert_close(outputs, model.head(3 * model.layer(2 * X)))


def test_an_error_of_a_probe_is_not_taken_for_one_of_the_model():
    model = NnxTransformed(lambda m, x: nnx.remat(lambda f, x: f(x))(m.layer, x))
    probed, params = ft.from_nnx(model)
    with pytest.raises(ValueError, match=r"'layer': .*must keep the shape"):
        probed(params, X, {"layer": lambda a: a[:, :2]})


def test_an_error_of_the_model_is_raised_as_it_is():
    def fails(model, x):
        raise RuntimeError(f"width {x.shape[-1]} of {model.layer.out_features}")

    probed, params = ft.from_nnx(NnxTransformed(fails))
    with pytest.raises(RuntimeError, match="width 4 of 4"):
        probed(params, X, {})


def test_a_bridged_linen_module_is_a_site():
    class Bridged(nnx.Module):
        def __init__(self):
            bridge = nnx.bridge.ToNNX(nn.Dense(D), rngs=nnx.Rngs(0))
            self.old = bridge.lazy_init(X)
            self.head = nnx.Linear(D, 3, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.head(jnp.tanh(self.old(x)))

    model = Bridged()
    probed, params = ft.from_nnx(model)
    outputs, acts = probed(params, X, {})
    assert_close(outputs, model(X))
    assert set(acts) == {"old", "head", "__call__"}
    graph, state = nnx.split(model)
    total = jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(X) ** 3), allow_int=True)
    grads = total(state)  # its state has counters of keys
    taps = taps_of(probed, params, "old")["old"]
    assert_close(taps.grads.sum((0, 1)), grads["old"]["bias"][...])
