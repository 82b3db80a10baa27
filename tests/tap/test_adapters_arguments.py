"""Arguments of the flax adapters: methods, options, inputs, params, train mode."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import toyfeat as ft

RNG = np.random.default_rng(7)
B, D = 5, 4
X = jnp.asarray(RNG.standard_normal((B, D)), jnp.float32)
MASK = jnp.asarray(RNG.integers(0, 2, B), jnp.float32)
KEY = jax.random.key(0)
JACOBIAN = ft.readouts.jacobian()


class Linen(nn.Module):
    def setup(self):
        self.layer = nn.Dense(3)

    def __call__(self, ids=None, mask=None, *, scale=1.0):
        return self.layer(ids) * mask[:, None] * scale

    def encode(self, ids, *, scale=1.0):
        return self.layer(ids) * scale

    def batch(self, batch):
        return self.layer(batch["ids"])


class Nnx(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(D, 3, rngs=nnx.Rngs(0))

    __call__ = Linen.__call__
    encode = Linen.encode
    batch = Linen.batch


LINEN_VARIABLES = Linen().init(KEY, X, MASK)


def probed_of(library, **options):
    """Probed model, its parameters and its layer as a plain function."""
    if library == "nnx":
        model = Nnx()
        return *ft.from_nnx(model, **options), model.layer
    p = LINEN_VARIABLES["params"]["layer"]

    def layer(x):
        return x @ p["kernel"] + p["bias"][None]

    return ft.from_linen(Linen(), **options), LINEN_VARIABLES, layer


LIBRARIES = pytest.mark.parametrize("library", ["linen", "nnx"])


@pytest.mark.slow_cases
@LIBRARIES
@pytest.mark.parametrize("method", ["encode", "function"])
def test_another_method_with_an_option_is_the_model(library, method):
    if method == "function":
        method = (Linen if library == "linen" else Nnx).encode
    probed, params, layer = probed_of(library, method=method, scale=2.0)
    outputs, acts = probed(params, X, {"layer": lambda a: a + 1})
    np.testing.assert_allclose(outputs, 2 * (layer(X) + 1), rtol=1e-5)
    assert "layer" in acts
    taps = ft.tap(probed, params, X, sites="layer", readout=JACOBIAN)["layer"]
    want = np.broadcast_to(2 * np.eye(3), (B, 3, 3))
    np.testing.assert_allclose(taps.grads, want)


@LIBRARIES
def test_an_unknown_option_is_named(library):
    probed, params, _ = probed_of(library, scael=2.0)
    with pytest.raises(TypeError, match="scael"):
        probed(params, (X, MASK), {})


@pytest.mark.slow_cases
@LIBRARIES
def test_a_dict_gives_keyword_arguments(library):
    probed, params, layer = probed_of(library, scale=2.0)
    inputs = {"mask": MASK, "ids": X}
    want = 2 * layer(X) * MASK[:, None]
    np.testing.assert_allclose(probed(params, inputs, {})[0], want, rtol=1e-5)
    np.testing.assert_allclose(probed(params, (X, MASK), {})[0], want, rtol=1e-5)
    taps = ft.tap(
        probed, params, inputs, sites="layer", readout=JACOBIAN, batch_size=2
    )["layer"]
    want = 2 * np.float64(MASK)[:, None, None] * np.eye(3)
    np.testing.assert_allclose(taps.grads, want)


@LIBRARIES
def test_a_dict_may_be_the_one_argument(library):
    probed, params, layer = probed_of(library, method="batch")
    outputs, _ = probed(params, {"ids": X, "mask": MASK}, {})
    np.testing.assert_allclose(outputs, layer(X), rtol=1e-5)


@LIBRARIES
@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ([X, MASK], r"from_{}: inputs .*got a list of 2; give tuple\(inputs\)"),
        ({"x": X, "mask": MASK}, r"from_{}: inputs .*'ids', 'mask'.*got .*'mask', 'x'"),
    ],
    ids=["list", "names"],
)
def test_inputs_of_another_form_are_refused(library, inputs, match):
    probed, params, _ = probed_of(library)
    with pytest.raises(TypeError, match=match.format(library)):
        ft.site_shapes(probed, params, inputs)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lambda p, x: x, r"from_linen: module .*got function; .*from_function"),
        (Nnx, r"from_linen: module must be .*got Nnx; use from_nnx"),
        (lambda: Linen, r"from_linen: module must be .*got type"),
    ],
    ids=["function", "nnx", "class"],
)
def test_from_linen_takes_modules_only(make, match):
    with pytest.raises(TypeError, match=match):
        ft.from_linen(make())


def test_a_bound_module_is_refused():
    with pytest.raises(ValueError, match=r"from_linen: .*unbound.*module\.unbind"):
        ft.from_linen(Linen().bind(LINEN_VARIABLES))


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        (
            LINEN_VARIABLES["params"],
            ValueError,
            r"from_linen: params .*got \['layer'\] without 'params'; give",
        ),
        (
            LINEN_VARIABLES["params"]["layer"],
            ValueError,
            r"got \['bias', 'kernel'\] without 'params'",
        ),
        (X, TypeError, r"from_linen: params must be the variables .*got ArrayImpl"),
    ],
    ids=["without_params", "of_a_layer", "array"],
)
def test_linen_variables_of_another_form_are_refused(params, error, match):
    with pytest.raises(error, match=match):
        ft.from_linen(Linen())(params, (X, MASK), {})


@pytest.mark.parametrize("params", [{}, X, {"layer": {"kernel": X}}], ids=str)
def test_nnx_params_of_another_structure_are_refused(params):
    probed, _ = ft.from_nnx(Nnx())
    with pytest.raises(ValueError, match=r"from_nnx: params must be the whole state"):
        probed(params, (X, MASK), {})


def test_params_with_other_leaves_than_arrays_are_refused():
    params = {"w": X, "activation": jnp.tanh}
    probed = ft.from_function(lambda p, x, tap: tap("h", p["activation"](x)))
    with pytest.raises(TypeError, match=r"params .*pytree of arrays.*activation.*eqx"):
        ft.site_shapes(probed, params, X)
    # They may stay in params where nothing is traced.
    np.testing.assert_allclose(probed(params, X, {})[0], jnp.tanh(X))


# train mode


class OwnNoise(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x + train * jax.random.normal(self.make_rng("noise"), x.shape)


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, name="drop")(x, not train)
        x = nn.Dropout(0.0, deterministic=not train, name="none")(x)
        x = OwnNoise(name="noise")(x, 1.0) if train else x
        return nn.LayerNorm(name="layer_norm")(x)


class NnxNoise(nnx.Module):
    def __init__(self):
        self.rngs = nnx.Rngs(0)

    def __call__(self, x):
        return x + jax.random.normal(self.rngs.noise(), x.shape)


class NnxTraining(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.none = nnx.Dropout(0.0, rngs=rngs)
        self.noise = NnxNoise()

    def __call__(self, x, train=None):
        flag = None if train is None else not train
        x = self.none(self.drop(self.norm(x, flag), deterministic=flag))
        return x if flag else self.noise(x)


ALL = (
    "'norm' (BatchNorm) computes statistics over the batch",
    "'drop' (Dropout) draws random numbers",
    "'noise' ({}) draws random numbers",
)


@pytest.mark.slow_cases
@pytest.mark.parametrize("jitted", [False, True])
def test_layers_in_train_mode_are_named(jitted):
    module = (nn.jit(Training) if jitted else Training)()
    rngs = {"dropout": KEY, "noise": KEY}
    variables = Training().init(KEY, X, train=False)
    for train in (True,) if jitted else (True, False, True):
        options = {"rngs": rngs, "mutable": ["batch_stats"], "train": train}
        if jitted:
            del options["train"]
        probed = ft.from_linen(module, **options)
        want = tuple(name.format("OwnNoise") for name in ALL)
        named = probed.train_mode(variables, X)
        assert named == (want if train or jitted else ())
        if named:
            with pytest.warns(UserWarning, match=r"from_linen: .*'norm' \(BatchNorm\)"):
                probed(variables, X, {})
        else:
            probed(variables, X, {})


@pytest.mark.parametrize("mode", ["as_made", "eval", "train_false", "eval_train_true"])
def test_nnx_layers_in_train_mode_are_named(mode):
    model = NnxTraining()
    if mode.startswith("eval"):
        model.eval()
    options = {"train_false": {"train": False}, "eval_train_true": {"train": True}}
    probed, params = ft.from_nnx(model, **options.get(mode, {}))
    noise = ALL[2].format("NnxNoise")
    want = {
        "as_made": (*ALL[:2], noise),
        "eval": (noise,),
        "train_false": (),
        "eval_train_true": (*ALL[:2], noise),
    }
    named = probed.train_mode(params, X)
    assert named == want[mode]
    if ALL[0] in named:
        with pytest.warns(UserWarning, match=r"from_nnx: .*'norm' \(BatchNorm\)"):
            probed(params, X, {})
    else:
        probed(params, X, {})


def test_a_collection_that_a_call_updates_is_named():
    model = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    variables = model.init(KEY, jnp.ones((2, 3, D)))
    probed = ft.from_linen(model, mutable=["cache"])
    named = probed.train_mode(variables, jnp.ones((2, 1, D)))
    assert named == ("the collection 'cache' is updated by a call",)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rngs": {"dropout": KEY, "noise": KEY}}, r"\"mean\" in \"/norm\""),
        ({"mutable": ["batch_stats"]}, r"drop needs PRNG for \"dropout\""),
    ],
    ids=["mutable", "rngs"],
)
def test_a_model_in_train_mode_without_its_options_is_refused(options, match):
    variables = Training().init(KEY, X, train=False)
    with pytest.raises(ValueError, match=rf"from_linen: .*train mode.*{match}.*train="):
        ft.from_linen(Training(), **options)(variables, X, {})


def test_one_example_without_a_batch_axis_is_explained():
    probed, params = ft.from_equinox(eqx.nn.Linear(3, 2, key=jax.random.key(0)))
    with pytest.raises((ValueError, TypeError)) as raised:
        probed(params, jnp.ones(3), {})
    notes = " ".join(raised.value.__notes__)
    assert "called with one example, of shapes [()]; inputs have a batch axis" in notes


def test_what_nnx_and_equinox_return_is_unpacked():
    pair = ft.from_equinox(eqx.nn.Linear(3, 2, key=jax.random.key(0)))
    readout = ft.readouts.scalar(jnp.sum)
    with pytest.raises(TypeError, match=r"got tuple; pass one; .*probed, params ="):
        ft.tap(pair, pair[1], jnp.ones((2, 3)), sites="__call__", readout=readout)
