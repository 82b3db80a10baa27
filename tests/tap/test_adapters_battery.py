"""One battery for the adapters of all libraries, against the network by hand."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import (
    HEAD,
    LIBRARIES,
    SHARED,
    STYLES,
    B,
    D,
    X,
    after,
    apply,
    block,
    make_case,
)

import toyfeat as ft

CUBES = ft.readouts.scalar(lambda y: jnp.sum(y**3))
STEPS = ("block_0", "block_1", "shared", "shared#1", "head")
ALL = pytest.mark.parametrize("style", STYLES)
EVERY = pytest.mark.parametrize("library", LIBRARIES)

case_of = functools.cache(make_case)


def sites_of(library, style):
    """Names of the sites of the steps in a library."""
    sites = case_of(library, style).sites
    if style == "scan":
        return dict(zip(STEPS, (*sites[4:6], *sites[-4:-1]), strict=True))
    return dict(zip(STEPS, (sites[2], sites[5], *sites[-4:-1]), strict=True))


@functools.cache
def by_hand():
    """Values at the steps, and per-example gradients by jacrev."""
    x = jnp.asarray(X)
    values = {}
    for name, step in (
        ("block_0", lambda x: block(0, x)),
        ("block_1", lambda x: block(1, x)),
        ("shared", lambda x: apply(SHARED, x)),
        ("shared#1", lambda x: apply(SHARED, jnp.tanh(x))),
        ("head", lambda x: apply(HEAD, x)),
    ):
        x = values[name] = step(x)
    grads = {
        name: jax.vmap(jax.jacrev(lambda a, n=name: jnp.sum(after(n, a) ** 3)))(value)
        for name, value in values.items()
    }
    return values, grads


@functools.cache
def run_of(library, style):
    case = case_of(library, style)
    return jax.jit(lambda p, probes: case.probed(p, jnp.asarray(X), probes))


def close(got, want, tol=2e-5):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=tol, atol=tol * np.abs(want).max()
    )


@pytest.mark.slow_cases
@EVERY
@ALL
def test_names_are_in_order_of_computation_and_values_those_by_hand(library, style):
    case, names = case_of(library, style), sites_of(library, style)
    outputs, acts = case.probed(case.params, jnp.asarray(X), {})
    assert tuple(acts) == case.sites
    assert tuple(ft.site_shapes(case.probed, case.params, X)) == case.sites
    values, _ = by_hand()
    close(outputs, values["head"])
    for step, site in names.items():
        close(acts[site], values[step])
    jitted, jitted_acts = run_of(library, style)(case.params, {})
    close(jitted, outputs)
    close(jitted_acts[names["shared"]], acts[names["shared"]])


@pytest.mark.slow_cases
@EVERY
@ALL
def test_gradients_are_those_of_per_example_jacrev(library, style):
    case, names = case_of(library, style), sites_of(library, style)
    _, grads = by_hand()
    tap = jax.jit(
        lambda p, x: ft.tap(
            case.probed, p, x, sites=list(names.values()), readout=CUBES
        )
    )
    taps = tap(case.params, jnp.asarray(X))
    for step, site in names.items():
        close(taps[site].grads[:, 0], grads[step], 1e-4)


@pytest.mark.slow_cases
@EVERY
@ALL
def test_arrays_are_added_and_functions_applied(library, style):
    case, names = case_of(library, style), sites_of(library, style)
    values, _ = by_hand()
    run = run_of(library, style)
    rows = np.arange(B, dtype=np.float32)[:, None]
    for step in ("block_0", "shared", "shared#1"):
        site = names[step]
        # Each example has a probe of its own, one width is for all of them.
        for delta in (jnp.asarray(rows * np.ones(D, np.float32)), jnp.ones(D)):
            outputs, acts = run(case.params, {site: jnp.broadcast_to(delta, (B, D))})
            moved = values[step] + jnp.broadcast_to(delta, (B, D))
            close(acts[site], moved)
            close(outputs, after(step, moved))
        if "@" in site:
            continue

        def function(act):
            assert act.shape == (B, D)  # it sees the whole batch
            return act * 2.0 + jnp.asarray(rows)

        outputs, acts = jax.jit(
            lambda p, f=function, s=site: case.probed(p, jnp.asarray(X), {s: f})
        )(case.params)
        close(outputs, after(step, values[step] * 2.0 + jnp.asarray(rows)))
        close(acts[names["head"]], outputs)


@EVERY
def test_a_function_in_a_scan_and_unknown_sites_are_refused(library):
    case = case_of(library, "scan")
    site = sites_of(library, "scan")["block_0"]
    with pytest.raises(ValueError, match=r"probe at site .*a function cannot be"):
        case.probed(case.params, jnp.asarray(X), {site: jnp.tanh})
    with pytest.raises(ValueError, match=rf"from_{library}: no site 'nope'.*shared"):
        case.probed(case.params, jnp.asarray(X), {"nope": jnp.ones(D)})


@pytest.mark.slow_cases
@EVERY
def test_a_function_that_is_differentiated_keeps_its_gradient(library):
    values = by_hand()[0]["block_0"]
    want = jax.grad(lambda scale: jnp.sum(after("block_0", values * scale)))(2.0)
    for style in ("plain", "remat"):
        case, site = case_of(library, style), sites_of(library, style)["block_0"]

        def loss(scale, case=case, site=site):
            probes = {site: lambda act: act * scale}
            return jnp.sum(case.probed(case.params, jnp.asarray(X), probes)[0])

        close(jax.jit(jax.grad(loss))(2.0), want)


@pytest.mark.slow_cases
@EVERY
@pytest.mark.parametrize("style", ["plain", "scan"])
def test_vmap_over_parameters_is_a_loop(library, style):
    case, names = case_of(library, style), sites_of(library, style)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 0.5]), case.params)
    site = names["shared"]

    def gradients(params):
        taps = ft.tap(case.probed, params, jnp.asarray(X), sites=site, readout=CUBES)
        return taps[site]

    together = jax.jit(jax.vmap(gradients))(stacked)
    alone = jax.jit(gradients)
    for i in range(2):
        one = alone(jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        close(together.acts[i], one.acts)
        close(together.grads[i], one.grads)


@pytest.mark.slow_cases
@EVERY
def test_the_dtype_of_the_model_is_kept(library):
    case, site = case_of(library, "remat"), sites_of(library, "remat")["shared"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.params)
    x = jnp.asarray(X, jnp.bfloat16)
    tap = jax.jit(lambda p: ft.tap(case.probed, p, x, sites=site, readout=CUBES))
    taps = tap(params)[site]
    # flax's layers compute in the promoted dtype of inputs and parameters, too.
    assert taps.acts.dtype == taps.grads.dtype == jnp.bfloat16
    close(taps.acts, by_hand()[0]["shared"], 0.05)


@pytest.mark.slow_cases
@EVERY
def test_chunks_and_the_check_of_mixing_take_the_model(library):
    case, names = case_of(library, "plain"), sites_of(library, "plain")
    tap = functools.partial(ft.tap, sites=names["block_0"], readout=CUBES)
    x = jnp.asarray(X)
    whole = jax.jit(lambda p: tap(case.probed, p, x))(case.params)
    parts = jax.jit(lambda p: tap(case.probed, p, x, batch_size=2))(case.params)
    jax.tree.map(close, parts, whole)
    ft.check_no_mixing(case.probed, case.params, x)


# What only equinox has


class Mapped(eqx.Module):
    """Maps its layers over positions itself, in every way that equinox has."""

    layer: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self):
        self.layer = eqx.nn.Linear(D, D, key=jax.random.key(0))
        self.norm = eqx.nn.LayerNorm(D)

    @eqx.filter_jit
    def encode(self, x):
        x = jax.vmap(self.layer)(x)
        return eqx.filter_vmap(self.norm)(x)

    def __call__(self, x):
        return jax.vmap(eqx.filter_jit(self.layer))(self.encode(x)), self.norm


@pytest.mark.slow
def test_a_module_that_the_model_maps_has_positions():
    model = Mapped()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, 3, D)), jnp.float32)
    probed, params = ft.from_equinox(model)
    _, acts = probed(params, x, {})
    assert {name: a.shape for name, a in acts.items()} == {
        "layer": (B, 3, D),
        "norm": (B, 3, D),
        "encode": (B, 3, D),
        "layer#1": (B, 3, D),
        "__call__[0]": (B, 3, D),  # the module in the outputs is no activation
    }
    delta = jnp.asarray(np.random.default_rng(1).normal(size=(B, 3, D)), jnp.float32)
    (got, _), _ = probed(params, x, {"encode": delta})
    want = jax.vmap(jax.vmap(model.layer))(jax.vmap(model.encode)(x) + delta)
    close(got, want)
    # The same model under the name of another method, for a whole batch.
    alone, params = ft.from_equinox(model.layer, batched=False)
    close(alone(params, x[:, 0], {})[0], jax.vmap(model.layer)(x[:, 0]))


class Stateful(eqx.Module):
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout

    def __init__(self):
        self.norm = eqx.nn.BatchNorm(D, axis_name="batch", mode="batch")
        self.drop = eqx.nn.Dropout(0.5)

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(x, state)
        return self.drop(x, key=key), state


@pytest.mark.slow
def test_states_keys_and_train_mode():
    model, state = eqx.nn.make_with_state(Stateful)()
    x = jnp.asarray(X)
    # In train mode layers lack what they need, and are named.
    probed, params = ft.from_equinox(model, state=state)
    with pytest.raises(ValueError, match=r"from_equinox: a layer in train mode.*infer"):
        probed(params, x, {})
    assert probed.train_mode(params, x) == (
        "'norm' (BatchNorm) computes statistics over the batch",
        "'drop' (Dropout) draws random numbers",
    )
    # In evaluation mode the state is read, and the new one dropped.
    calm = eqx.nn.inference_mode(model)
    probed, params = ft.from_equinox(calm, state=state)
    assert probed.train_mode(params, x) == ()
    outputs, acts = probed(params, x, {})
    assert tuple(acts) == ("norm[0]", "drop", "__call__[0]")
    want, _ = jax.vmap(calm, in_axes=(0, None), out_axes=(0, None))(x, state)
    close(outputs, want)
    # With a key every example has a mask of its own.
    dropped = eqx.nn.Dropout(0.5)
    key = jax.random.key(3)
    probed, params = ft.from_equinox(dropped, key=key)
    want = jax.vmap(lambda x, k: dropped(x, key=k))(x, jax.random.split(key, B))
    close(probed(params, x, {})[0], want)
    with pytest.raises(ValueError, match=r"tap: batch_size=2 .*Dropout"):
        ft.tap(probed, params, x, sites="__call__", readout=CUBES, batch_size=2)


def test_bad_arguments_of_the_adapters_are_explained(monkeypatch):
    model = eqx.nn.Linear(D, D, key=jax.random.key(0))
    probed, _ = ft.from_equinox(eqx.nn.MLP(D, D, 4, 1, key=jax.random.key(0)))
    with pytest.raises(ValueError, match=r"from_equinox: params must be the arrays.*i"):
        probed(model, jnp.asarray(X), {})
    with pytest.raises(TypeError, match=r"from_equinox: wanted an equinox module.*f"):
        ft.from_equinox(jnp.tanh)
    with pytest.raises(TypeError, match=r"from_haiku: wanted what hk.transform"):
        ft.from_haiku(jnp.tanh)
    network = hk.transform(lambda x: hk.dropout(hk.next_rng_key(), 0.5, x))
    with pytest.raises(ValueError, match=r"from_haiku: params must be .*got NoneType;"):
        ft.from_haiku(network)(None, jnp.asarray(X), {})
    with pytest.raises(ValueError, match=r"non-None PRNGKey") as caught:
        ft.from_haiku(network)({}, jnp.asarray(X), {})
    assert "rng=key), or have it" in "".join(caught.value.__notes__)
    with pytest.raises(TypeError, match=r"key must be"):
        ft.from_equinox(model, key="a")
    # Without the libraries, the line that installs them.
    adapters = {"equinox": ft.from_equinox, "haiku": ft.from_haiku}
    adapters["penzai"] = lambda model: ft.from_penzai(model, ("batch",))
    for name, adapter in adapters.items():
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(ImportError, match=rf'pip install "toyfeat\[{name}\]"'):
            adapter(model)


def test_haiku_has_states_and_keys():
    def network(x, is_training):
        shift = hk.get_state("shift", [D], init=jnp.ones)
        x = hk.Linear(D, name="layer")(x) + jnp.broadcast_to(shift, x.shape)
        if not is_training:
            return x
        noise = jax.random.normal(hk.next_rng_key(), x.shape)
        return x - jnp.mean(x, 0, keepdims=True) + noise

    transformed = hk.transform_with_state(network)
    params = transformed.init(jax.random.key(0), jnp.asarray(X), False)
    probed = ft.from_haiku(transformed, is_training=False)
    outputs, acts = probed(params, jnp.asarray(X), {})
    want, _ = transformed.apply(*params, None, jnp.asarray(X), is_training=False)
    close(outputs, want)
    assert list(acts) == ["layer", "__call__"]
    ft.check_no_mixing(probed, params, jnp.asarray(X))
    # In train mode the batch is mixed, which the check sees.
    train = ft.from_haiku(transformed, rng=jax.random.key(1), is_training=True)
    with pytest.raises(ValueError, match="check_no_mixing: examples of a batch"):
        ft.check_no_mixing(train, params, jnp.asarray(X))
