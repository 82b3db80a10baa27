import functools
import itertools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import toyfeat as ft
from toyfeat import readouts

B = 10
WIDTHS = (5, 8, 6, 4)
SITES = ("dense_0", "dense_1", "dense_2")
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


LABELS = jnp.asarray(np.arange(B) % 4)
TARGETS = normal(B, 4)
COTANGENTS = normal(3, 4)
SCALES = jnp.array([0.0, 0.3, 1.0, 1.7])
X = normal(B, WIDTHS[0])
PARAMS = {
    name: {
        "kernel": normal(WIDTHS[i], WIDTHS[i + 1]) * 0.6,
        "bias": normal(WIDTHS[i + 1]) * 0.3,
    }
    for i, name in enumerate(SITES)
}


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, width in zip(SITES[:-1], WIDTHS[1:-1], strict=True):
            x = jnp.tanh(nn.Dense(width, name=name)(x))
        return nn.Dense(WIDTHS[-1], name=SITES[-1])(x)


class NnxMlp(nnx.Module):
    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.dense_0 = nnx.Linear(5, 8, rngs=rngs)
        self.dense_1 = nnx.Linear(8, 6, rngs=rngs)
        self.dense_2 = nnx.Linear(6, 4, rngs=rngs)
        for name in SITES:
            getattr(self, name).kernel[...] = params[name]["kernel"]
            getattr(self, name).bias[...] = params[name]["bias"]

    def __call__(self, x):
        x = jnp.tanh(self.dense_0(x))
        x = jnp.tanh(self.dense_1(x))
        return self.dense_2(x)


def mlp(params, x, tap):
    for name in SITES:
        x = tap(name, x @ params[name]["kernel"] + params[name]["bias"][None])
        if name != SITES[-1]:
            x = jnp.tanh(x)
    return x


def assert_close(got, want, tol=1e-5):
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=tol, atol=tol * np.abs(want).max()
    )


def one_layer(params, name, x):
    return x @ params[name]["kernel"] + params[name]["bias"]


def one_prefix(params, site, x):
    x = one_layer(params, SITES[0], x)
    for name in SITES[1 : SITES.index(site) + 1]:
        x = one_layer(params, name, jnp.tanh(x))
    return x


def one_suffix(params, site, act):
    for name in SITES[SITES.index(site) + 1 :]:
        act = one_layer(params, name, jnp.tanh(act))
    return act


def batch_split(site):
    return ft.from_split(
        lambda p, x: jax.vmap(lambda row: one_prefix(p, site, row))(x),
        lambda p, a: jax.vmap(lambda row: one_suffix(p, site, row))(a),
        site=site,
    )


def model_by(adapter):
    if adapter == "function":
        return ft.from_function(mlp), PARAMS
    if adapter == "linen":
        return ft.from_linen(LinenMlp()), {"params": PARAMS}
    return ft.from_nnx(NnxMlp(PARAMS))


def taps_by(adapter, readout, *, params=None, x=X, sites=SITES, **options):
    if adapter == "split":
        return {
            site: ft.tap(
                batch_split(site), PARAMS, x, sites=site, readout=readout, **options
            )[site]
            for site in sites
        }
    probed, own = model_by(adapter)
    params = own if params is None else params
    return ft.tap(probed, params, x, sites=sites, readout=readout, **options)


ADAPTERS = ("function", "split", "linen", "nnx")

# name: (readout, metric(output of one input, its index) -> [K])
CASES = {
    "scalar": (
        readouts.scalar(lambda y: jnp.sum(y**3)),
        lambda y, i: jnp.sum(y**3)[None],
    ),
    "scalar_of_a_batch": (
        readouts.scalar(lambda y: jnp.sin(y[:, 1])),
        lambda y, i: jnp.sin(y[1])[None],
    ),
    "loss": (
        readouts.loss(optax.softmax_cross_entropy_with_integer_labels, LABELS),
        lambda y, i: -jax.nn.log_softmax(y)[LABELS[i]][None],
    ),
    "loss_with_terms": (
        readouts.loss(optax.squared_error, TARGETS),
        lambda y, i: jnp.sum((y - TARGETS[i]) ** 2)[None],
    ),
    "jacobian": (readouts.jacobian(), lambda y, i: y),
    "selected_jacobian": (
        readouts.jacobian(select=lambda y: y[..., 1:3]),
        lambda y, i: y[1:3],
    ),
    "logit_difference": (
        readouts.logit_difference(2, 0),
        lambda y, i: (y[2] - y[0])[None],
    ),
    "logit_difference_of_arrays": (
        readouts.logit_difference(LABELS, (LABELS + 1) % 4),
        lambda y, i: (y[LABELS[i]] - y[(LABELS[i] + 1) % 4])[None],
    ),
    "directions": (readouts.directions(COTANGENTS), lambda y, i: COTANGENTS @ y),
}


def expected(params, site, x, metric, scales=None):
    """Acts and gradients [B, K, D], example by example, at scaled activations."""

    def one(row, i):
        act = one_prefix(params, site, row)
        grad = jax.jacrev(lambda a: metric(one_suffix(params, site, a), i))
        if scales is None:
            return act, grad(act)
        return act, jnp.concatenate([grad(s * act) for s in scales])

    return jax.vmap(one)(x, jnp.arange(x.shape[0]))


@functools.cache
def all_expected():
    """Case to site to (acts, grads)."""

    def run(params, x):
        plain = {
            case: {site: expected(params, site, x, metric) for site in SITES}
            for case, (_, metric) in CASES.items()
        }
        paths = {
            f"path_of_{case}": {
                site: expected(params, site, x, CASES[case][1], SCALES)
                for site in SITES
            }
            for case in ("loss", "jacobian")
        }
        return plain | paths

    return jax.jit(run)(PARAMS, X)


READOUTS = {name: readout for name, (readout, _) in CASES.items()} | {
    "path_of_loss": readouts.along_path(CASES["loss"][0], SCALES),
    "path_of_jacobian": readouts.along_path(CASES["jacobian"][0], SCALES),
    "sampled_labels": readouts.sampled_labels(jax.random.key(5), num=2),
    "rademacher": readouts.random_directions(jax.random.key(6), 3),
    "gaussian": readouts.random_directions(jax.random.key(7), 3, "gaussian"),
    "random_path": readouts.along_path(
        readouts.random_directions(jax.random.key(8), 2), SCALES
    ),
    "masked": readouts.jacobian(mask=jnp.asarray(np.linspace(0, 1, B), jnp.float32)),
}


def other_batch(readout):
    """The same readout with every leaf changed."""

    def change(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.fold_in(leaf, 1)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return (leaf + 1) % 4
        return leaf * 0.5 + 0.25

    return jax.tree.map(lambda leaf: change(jnp.asarray(leaf)), readout)


CORE = ["scalar", "loss", "jacobian", "logit_difference_of_arrays", "directions"]
CHUNKED = [*CORE, "sampled_labels", "rademacher", "random_path", "masked"]
CASES_OF = {
    "function": list(READOUTS),
    "split": [*CORE, "path_of_loss"],
    "linen": [*CORE, "path_of_loss", "rademacher"],
    "nnx": [*CORE, "path_of_loss", "sampled_labels"],
}


@functools.cache
def all_taps(adapter, batch_size=None):
    """Case to site to taps, from the second call of one compiled function.

    The first call has other inputs, labels, keys and scales, so every figure
    here comes from a trace that was made for another batch.
    """
    names = CASES_OF[adapter] if batch_size is None else CHUNKED
    sites = SITES if batch_size is None else ["dense_1"]
    traces = []

    def run(x, cases):
        traces.append(None)
        return {
            case: taps_by(
                adapter,
                readout,
                x=x,
                sites=["dense_1"] if case == "random_path" else sites,
                batch_size=batch_size,
            )
            for case, readout in cases.items()
        }

    jitted = jax.jit(run)
    cases = {name: READOUTS[name] for name in names}
    other = {name: other_batch(readout) for name, readout in cases.items()}
    first, second = jitted(X + 1, other), jitted(X, cases)
    return first, second, len(traces)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "case"),
    [
        (adapter, case)
        for adapter, cases in CASES_OF.items()
        for case in cases
        if case in CASES or case in ("path_of_loss", "path_of_jacobian")
    ],
)
def test_taps_are_the_per_example_jacobian(adapter, case):
    taps = all_taps(adapter)[1][case]
    assert set(taps) == set(SITES)
    for site in SITES:
        acts, grads = all_expected()[case][site]
        assert_close(taps[site].acts, acts)
        assert_close(taps[site].grads, grads)
        np.testing.assert_array_equal(taps[site].weights, np.ones(B))


@pytest.mark.slow
def test_taps_outside_of_jit_are_the_same():
    taps = taps_by("function", READOUTS["loss"])
    chex.assert_trees_all_close(
        taps, all_taps("function")[1]["loss"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_mean_over_the_path_times_activation_sums_to_the_difference():
    scales = (jnp.arange(64.0) + 0.5) / 64
    readout, metric = CASES["scalar"]
    taps = jax.jit(taps_by, static_argnums=0)(
        "function", readouts.along_path(readout, scales)
    )
    for site in SITES:
        integrated = jnp.sum(taps[site].grads.mean(1) * taps[site].acts, axis=-1)

        def effect(row, site=site):
            act = one_prefix(PARAMS, site, row)
            full = metric(one_suffix(PARAMS, site, act), 0)
            return (full - metric(one_suffix(PARAMS, site, 0 * act), 0))[0]

        assert_close(integrated, jax.vmap(effect)(X), tol=2e-3)


@pytest.mark.slow_cases
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_readout_gives_activations_alone(adapter):
    taps = jax.jit(lambda x: taps_by(adapter, None, x=x, batch_size=7))(X)
    for site in SITES:
        assert taps[site].grads is None
        assert_close(taps[site].acts, all_expected()["loss"][site][0])


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", CHUNKED)
@pytest.mark.parametrize("size", [1, 7, B])
def test_batch_size_does_not_change_the_taps(size, case):
    whole = all_taps("function")[1][case]["dense_1"]
    chunked = all_taps("function", size)[1][case]["dense_1"]
    assert_close(chunked.acts, whole.acts)
    assert_close(chunked.grads, whole.grads)
    np.testing.assert_array_equal(chunked.weights, whole.weights)


@pytest.mark.slow_cases
@pytest.mark.parametrize("adapter", ["linen", "nnx"])
def test_modules_are_chunked_too(adapter):
    chunked = jax.jit(lambda r: taps_by(adapter, r, batch_size=7))(READOUTS["loss"])
    chex.assert_trees_all_close(
        chunked, all_taps("function")[1]["loss"], rtol=1e-5, atol=1e-5
    )


def test_batch_size_may_exceed_the_batch():
    chunked = jax.jit(lambda r: taps_by("function", r, batch_size=64))(
        READOUTS["jacobian"]
    )
    chex.assert_trees_all_close(
        chunked, all_taps("function")[1]["jacobian"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("adapter", ["linen", "nnx"])
def test_random_readouts_do_not_depend_on_the_adapter(adapter):
    case = {"linen": "rademacher", "nnx": "sampled_labels"}[adapter]
    chex.assert_trees_all_close(
        all_taps(adapter)[1][case],
        all_taps("function")[1][case],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [None, 4])
def test_first_entry_of_one_output_is_no_function_of_the_batch(size):
    # 4 is the width of the output: y[0] has the same shape read either way
    x = X[:4]
    readout = readouts.scalar(lambda y: y[0])
    run = jax.jit(lambda x: taps_by("function", readout, x=x, batch_size=size))
    taps = run(x)
    want = all_expected()["jacobian"]["dense_0"][1][:4, :1]
    assert_close(taps["dense_0"].grads, want)


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [None, 7])
def test_one_trace_serves_all_labels_keys_scales_and_masks(size):
    first, second, traces = all_taps("function", size)
    assert traces == 1
    for case in CASES_OF["function"] if size is None else CHUNKED:
        old, new = first[case]["dense_1"], second[case]["dense_1"]
        assert not np.allclose(old.grads, new.grads)
        assert np.allclose(old.weights, new.weights) == (case != "masked")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["split", "linen", "nnx"])
def test_one_trace_serves_all_batches_of_any_adapter(adapter):
    first, second, traces = all_taps(adapter)
    assert traces == 1
    assert not np.allclose(
        first["loss"]["dense_0"].grads, second["loss"]["dense_0"].grads
    )


def test_a_jitted_model_is_traced_once_for_all_labels_and_keys():
    traces = []

    def counted(params, x, tap):
        traces.append(None)
        return mlp(params, x, tap)

    probed = ft.from_function(counted)

    @jax.jit
    def grads_of(x, readout):
        return ft.tap(probed, PARAMS, x, sites="dense_1", readout=readout)

    def batch(seed):
        labels = jnp.asarray(np.random.default_rng(seed).integers(0, 4, B))
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        grads_of(X, readouts.sampled_labels(jax.random.key(seed)))
        grads_of(X, readouts.loss(cross_entropy, labels))
        grads_of(X, readouts.logit_difference(seed % 4, 0))

    batch(0)
    once = len(traces)
    batch(1)
    batch(2)
    assert len(traces) == once


# sites with positions


def sequence(params, x, tap):
    hidden = tap("hidden", x @ params["in"])
    return jnp.tanh(jnp.cumsum(hidden, axis=1)) @ params["out"]


def one_sequence_suffix(params, hidden):
    return jnp.tanh(jnp.cumsum(hidden, axis=0)) @ params["out"]


T = 3
SEQUENCE_PARAMS = {"in": normal(2, 5), "out": normal(5, 4)}
TOKENS = jnp.array([[0, 1, 2], [3, 3, 0], [1, 0, 2], [2, 2, 2], [0, 3, 1]])
SEQUENCES = normal(5, T, 2)


def token_losses(y, i, first=0, last=T - 1):
    logs = jax.nn.log_softmax(y)
    return -sum(logs[t, TOKENS[i, t + 1]] for t in range(first, last))


SEQUENCE_CASES = {
    "scalar": (
        readouts.scalar(lambda y: jnp.sum(y**2)),
        lambda y, i: jnp.sum(y**2)[None],
    ),
    "terms_at_positions": (
        readouts.scalar(lambda y: jax.nn.logsumexp(y, axis=-1)),
        lambda y, i: jax.nn.logsumexp(y, axis=-1).sum()[None],
    ),
    "loss_at_positions": (
        readouts.loss(optax.softmax_cross_entropy_with_integer_labels, TOKENS),
        lambda y, i: (
            -sum(jax.nn.log_softmax(y)[t, TOKENS[i, t]] for t in range(T))[None]
        ),
    ),
    "jacobian": (readouts.jacobian(), lambda y, i: y.ravel()),
    "logit_difference": (
        readouts.logit_difference(1, 3),
        lambda y, i: (y[:, 1] - y[:, 3]).sum()[None],
    ),
    "logit_difference_at_last": (
        readouts.logit_difference(TOKENS[:, 0], 3, position=-1),
        lambda y, i: (y[-1, TOKENS[i, 0]] - y[-1, 3])[None],
    ),
    "logit_difference_at_1": (
        readouts.logit_difference(TOKENS[:, 0], TOKENS[:, 1], position=1),
        lambda y, i: (y[1, TOKENS[i, 0]] - y[1, TOKENS[i, 1]])[None],
    ),
    "directions": (
        readouts.directions(jnp.ones((1, T, 4)).at[0, 0].set(2.0)),
        lambda y, i: (y.sum() + y[0].sum())[None],
    ),
    "next_token": (
        readouts.next_token_loss(TOKENS),
        lambda y, i: token_losses(y, i)[None],
    ),
}


@functools.cache
def sequence_taps(batch_size):
    def run(x, cases):
        return {
            case: ft.tap(
                ft.from_function(sequence),
                SEQUENCE_PARAMS,
                x,
                sites="hidden",
                readout=readout,
                batch_size=batch_size,
            )["hidden"]
            for case, readout in cases.items()
        }

    cases = {name: readout for name, (readout, _) in SEQUENCE_CASES.items()}
    return jax.jit(run)(SEQUENCES, cases)


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", SEQUENCE_CASES)
@pytest.mark.parametrize("size", [None, 2])
def test_gradient_is_read_at_each_position(case, size):
    metric = SEQUENCE_CASES[case][1]
    taps = sequence_taps(size)[case]
    acts = jnp.einsum("btc,cd->btd", SEQUENCES, SEQUENCE_PARAMS["in"])

    def one(act, i):
        return jax.jacrev(lambda a: metric(one_sequence_suffix(SEQUENCE_PARAMS, a), i))(
            act
        )

    grads = jax.jit(jax.vmap(one))(acts, jnp.arange(5))  # [B, K, T, D]
    assert_close(taps.acts, acts.reshape(5 * T, 5))
    assert_close(taps.grads, jnp.moveaxis(grads, 1, 2).reshape(5 * T, -1, 5))


MASKS = {
    "inputs": jnp.array([1.0, 0.0, 0.5, 2.0, 1.0]),
    "positions": jnp.arange(15.0).reshape(5, 3),
    "bool": jnp.arange(15).reshape(5, 3) % 2 == 0,
    "int": jnp.arange(15).reshape(5, 3) % 2,
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [None, 2])
def test_mask_gives_the_weights_and_leaves_gradients(size):
    def run(masks):
        return {
            name: ft.tap(
                ft.from_function(sequence),
                SEQUENCE_PARAMS,
                SEQUENCES,
                sites="hidden",
                readout=readouts.scalar(jnp.sum, mask=mask),
                batch_size=size,
            )["hidden"]
            for name, mask in masks.items()
        }

    taps = jax.jit(run)(MASKS | {"none": None})
    np.testing.assert_array_equal(taps["none"].weights, np.ones(15))
    for name, mask in MASKS.items():
        want = np.asarray(mask, np.float32)
        want = np.repeat(want, T) if want.ndim == 1 else want.ravel()
        np.testing.assert_array_equal(taps[name].weights, want)
        assert taps[name].weights.dtype == jnp.float32
        assert_close(taps[name].grads, taps["none"].grads)


def test_image_positions_are_flattened_input_major():
    x, w = normal(2, 4, 3, 2), normal(2, 5)
    probed = ft.from_function(
        lambda w, x, tap: jnp.tanh(tap("pixels", x @ w)).sum((1, 2))
    )
    run = jax.jit(
        lambda x: ft.tap(probed, w, x, sites="pixels", readout=readouts.jacobian())
    )
    taps = run(x)["pixels"]
    acts = np.asarray(x, np.float64).reshape(24, 2) @ np.asarray(w, np.float64)
    slope = 1 - np.tanh(acts) ** 2
    assert_close(taps.acts, acts)
    assert_close(taps.grads, slope[:, None, :] * np.eye(5)[None])


# composition with transformations


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["function", "nnx"])
def test_taps_of_many_seeds_by_vmap_equal_the_loop(adapter):
    probed, params = model_by(adapter)
    factors = np.array([1.0, 0.5, -1.0], np.float32)
    many = jax.tree.map(lambda p: jnp.asarray(np.multiply.outer(factors, p)), params)

    @jax.jit
    def run(params):
        return ft.tap(
            probed, params, X, sites=SITES, readout=READOUTS["loss"], batch_size=7
        )

    together = jax.jit(jax.vmap(run))(many)
    alone = [
        run(jax.tree.map(lambda p, f=f: jnp.asarray(f * np.asarray(p)), params))
        for f in factors
    ]
    for site in SITES:
        for i in range(3):
            assert_close(together[site].acts[i], alone[i][site].acts)
            assert_close(together[site].grads[i], alone[i][site].grads)


def test_taps_are_differentiable_in_the_parameters():
    def size(params):
        taps = taps_by("function", READOUTS["jacobian"], params=params)
        return jnp.sum(taps["dense_1"].grads ** 2)

    def size_by_hand(params):
        metric = CASES["jacobian"][1]
        return jnp.sum(expected(params, "dense_1", X, metric)[1] ** 2)

    got, want = jax.jit(jax.grad(size))(PARAMS), jax.jit(jax.grad(size_by_hand))(PARAMS)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_inputs_may_be_any_tree_with_a_batch_axis():
    def by_name(params, inputs, tap):
        return mlp(params, inputs["x"] * inputs["scale"][:, None], tap)

    scale = jnp.linspace(0.5, 1.5, B)

    @jax.jit
    def run(inputs):
        return ft.tap(
            ft.from_function(by_name),
            PARAMS,
            inputs,
            sites="dense_1",
            readout=READOUTS["jacobian"],
            batch_size=7,
        )

    taps = run({"x": X, "scale": scale})["dense_1"]
    acts, grads = jax.jit(expected, static_argnums=(1, 3))(
        PARAMS, "dense_1", X * scale[:, None], CASES["jacobian"][1]
    )
    assert_close(taps.acts, acts)
    assert_close(taps.grads, grads)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "case", ["loss", "jacobian", "rademacher", "sampled_labels", "logit_difference"]
)
def test_bfloat16_site_keeps_its_dtype(case):
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)

    @jax.jit
    def run(x, readout):
        return taps_by("function", readout, params=low, x=x, batch_size=7)

    taps = run(X.astype(jnp.bfloat16), READOUTS[case])
    for site in SITES:
        want = all_taps("function")[1][case][site]
        assert taps[site].acts.dtype == taps[site].grads.dtype == jnp.bfloat16
        assert taps[site].weights.dtype == jnp.float32
        assert_close(taps[site].acts.astype(jnp.float32), want.acts, tol=0.05)
        if case != "sampled_labels":  # a label may flip on the rounding of a logit
            assert_close(taps[site].grads.astype(jnp.float32), want.grads, tol=0.1)


def test_sites_may_have_different_positions_and_dtypes():
    def model(params, x, tap):
        wide = tap("wide", jnp.tanh(x))
        pooled = tap("pooled", wide.mean(1).astype(jnp.bfloat16))
        return pooled.astype(jnp.float32)

    readout = readouts.jacobian(mask=jnp.arange(5.0))
    taps = jax.jit(
        lambda x: ft.tap(
            ft.from_function(model), None, x, sites=["pooled", "wide"], readout=readout
        )
    )(SEQUENCES)
    assert set(taps) == {"pooled", "wide"}
    assert taps["pooled"].grads.shape == (5, 2, 2)
    assert taps["wide"].grads.shape == (15, 2, 2)
    assert taps["pooled"].grads.dtype == jnp.bfloat16
    assert taps["wide"].grads.dtype == jnp.float32
    np.testing.assert_array_equal(taps["wide"].weights, np.repeat(np.arange(5.0), 3))


# cost


WIDE, BATCH, BLOCKS = 256, 64, 4


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(WIDE)(x))
        return x + nn.Dense(WIDE)(hidden)


class LinenBlocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(BLOCKS):
            x = LinenBlock(name=f"blocks_{i}")(x)
        return x


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDE, WIDE, rngs=rngs)
        self.down = nnx.Linear(WIDE, WIDE, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class NnxBlocks(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(BLOCKS)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def function_blocks(params, x, tap):
    for i, p in enumerate(params):
        x = tap(f"blocks_{i}", x + nn.relu(x @ p["up"]) @ p["down"])
    return x


def wide_model(adapter):
    """Probed model, its parameters, and the sites of its blocks."""
    x = jnp.ones((2, WIDE))
    if adapter == "function":
        w = jnp.full((WIDE, WIDE), 1e-3)
        params = [{"up": w, "down": w} for _ in range(BLOCKS)]
        probed = ft.from_function(function_blocks)
    elif adapter == "linen":
        probed = ft.from_linen(LinenBlocks())
        params = LinenBlocks().init(jax.random.key(0), x)
    else:
        probed, params = ft.from_nnx(NnxBlocks(nnx.Rngs(0)))
        return probed, params, [f"blocks/{i}" for i in range(BLOCKS)]
    return probed, params, [f"blocks_{i}" for i in range(BLOCKS)]


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.slow_cases
@pytest.mark.parametrize("adapter", ["function", "linen", "nnx"])
def test_tap_costs_one_backward_of_what_follows_the_sites(adapter):
    probed, params, sites = wide_model(adapter)
    x = jnp.ones((BATCH, WIDE))
    readout = readouts.loss(optax.squared_error, x)

    def cost(sites):
        return flops(
            lambda p, x, r: ft.tap(probed, p, x, sites=sites, readout=r),
            params,
            x,
            readout,
        )

    forward = flops(lambda p, x: probed(p, x, {})[0], params, x)
    exact = 2 * BATCH * WIDE * WIDE * 2 * BLOCKS
    assert forward == pytest.approx(exact, rel=0.05)
    every, last = cost(sites), cost(sites[-1:])
    assert every <= 2.2 * forward
    assert last <= 1.2 * forward
    # three blocks are pulled back, each for the price of its forward
    assert every == pytest.approx(forward * 1.75, rel=0.05)


@pytest.mark.slow_cases
@pytest.mark.parametrize("adapter", ["function", "linen", "nnx"])
def test_no_parameter_gradient_is_formed(adapter):
    probed, params = model_by(adapter)
    readout = READOUTS["loss"]

    def taps_of(params, x, readout):
        return ft.tap(probed, params, x, sites=SITES, readout=readout)

    def parameter_gradient(params, x, readout):
        def total(params):
            return jnp.sum(probed(params, x, {})[0] ** 2)

        return jax.grad(total, allow_int=True)(params)

    def kernel_shaped_products(fn):
        text = jax.jit(fn).lower(params, X, readout).compile().as_text()
        found = re.findall(r"f32\[(\d+),(\d+)\]\S* (?:dot|custom-call)\(", text)
        kernels = set(itertools.pairwise(WIDTHS))
        shapes = {(int(a), int(b)) for a, b in found}
        return {s for s in shapes if s in kernels or s[::-1] in kernels}

    assert kernel_shaped_products(parameter_gradient)
    assert not kernel_shaped_products(taps_of)


@pytest.mark.slow
def test_tap_grows_with_the_backward_alone_not_with_the_parameters():
    probed, params, sites = wide_model("linen")
    x = jnp.ones((BATCH, WIDE))

    def gradient(params, x):
        return jax.grad(lambda p: jnp.sum(probed(p, x, {})[0] ** 2))(params)

    def taps_of(params, x):
        readout = readouts.scalar(lambda y: jnp.sum(y**2))
        return ft.tap(probed, params, x, sites=sites, readout=readout)

    assert flops(taps_of, params, x) <= 0.7 * flops(gradient, params, x)


# errors


def tap_with(**changes):
    options = {"sites": "dense_0", "readout": readouts.jacobian()} | changes
    return jax.eval_shape(
        lambda x: ft.tap(ft.from_function(mlp), PARAMS, x, **options), X
    )


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"sites": "dens_0"},
            ValueError,
            r"tap: no site 'dens_0'.*'dense_0'.*misspelt",
        ),
        (
            {"sites": ["dense_0", "a", "b"]},
            ValueError,
            r"'a', 'b'.*'dense_0', 'dense_1', 'dense_2'",
        ),
        ({"sites": []}, ValueError, "sites is empty"),
        ({"sites": ""}, ValueError, "tap: "),
        (
            {"batch_size": 0},
            ValueError,
            "batch_size must be an int of at least 1, got 0",
        ),
        (
            {"batch_size": -3},
            ValueError,
            "batch_size must be an int of at least 1, got -3",
        ),
        ({"readout": lambda y: y}, TypeError, "readout must come from .*got function"),
        (
            {"readout": readouts.loss(optax.squared_error, jnp.zeros((9, 4)))},
            ValueError,
            r"labels .*leading axis 10 .*\(9, 4\)",
        ),
        (
            {"readout": readouts.jacobian(mask=jnp.ones(9))},
            ValueError,
            r"mask .*leading axis 10 .*\(9,\)",
        ),
        (
            {"readout": readouts.jacobian(mask=jnp.ones((B, 2)))},
            ValueError,
            r"'dense_0'.*\(10,\).*\(10, 2\)",
        ),
        (
            {"readout": readouts.jacobian(mask=jnp.ones(()))},
            ValueError,
            r"mask .*leading axis 10 .*\(\)",
        ),
    ],
)
@pytest.mark.parametrize("size", [None, 7])
def test_bad_arguments_say_what_is_wanted(changes, error, match, size):
    with pytest.raises(error, match=match):
        tap_with(**({"batch_size": size} | changes))


def test_mask_of_other_positions_is_refused():
    with pytest.raises(ValueError, match=r"'hidden'.*\(5, 3\).*\(5, 2\)"):
        jax.eval_shape(
            lambda x: ft.tap(
                ft.from_function(sequence),
                SEQUENCE_PARAMS,
                x,
                sites="hidden",
                readout=readouts.jacobian(mask=jnp.ones((5, 2))),
            ),
            SEQUENCES,
        )


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (lambda x: x.sum(-1), r"\(10,\)"),
        (lambda x: x.sum(0), r"\(5,\)"),
        (lambda x: x.sum(), r"\(\)"),
        (lambda x: x[:3], r"\(3, 5\)"),
    ],
)
def test_site_needs_a_batch_and_a_feature_axis(value, shape):
    def model(params, x, tap):
        tap("s", value(x))
        return x

    with pytest.raises(ValueError, match=rf"site 's' .*\[B, \.\.\., D\].*{shape}"):
        ft.tap(ft.from_function(model), None, X, sites="s", readout=readouts.jacobian())


@pytest.mark.parametrize(
    "inputs",
    [{"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))}, {}, jnp.float32(1.0)],
    ids=["ragged", "empty", "scalar"],
)
def test_inputs_without_one_batch_axis_are_refused(inputs):
    with pytest.raises(ValueError, match="leading"):
        ft.tap(
            ft.from_function(lambda p, x, tap: x),
            None,
            inputs,
            sites="s",
            readout=None,
        )


@pytest.mark.parametrize(
    "readout",
    [
        readouts.jacobian(),
        readouts.scalar(lambda y: y),
        readouts.random_directions(jax.random.key(0), 2),
        readouts.sampled_labels(jax.random.key(0)),
        readouts.logit_difference(0, 1),
        readouts.directions(jnp.ones((2, 4))),
    ],
    ids=["jacobian", "scalar", "random", "sampled", "logits", "directions"],
)
@pytest.mark.parametrize("reduced", [(0,), (0, 1)])
def test_outputs_without_a_batch_axis_are_refused(readout, reduced):
    def pooled(params, x, tap):
        return tap("s", x).sum(reduced)

    probed = ft.from_function(pooled)
    with pytest.raises(ValueError, match=r"outputs.* 10"):
        jax.eval_shape(lambda x: ft.tap(probed, None, x, sites="s", readout=readout), X)


# randomness of the model and chunks


class Dropped(nn.Module):
    rate: float = 0.5
    broadcast: tuple = ()

    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.Dense(4, name="hidden")(x))
        drop = nn.Dropout(
            self.rate, self.broadcast, deterministic=self.rate == 0, name="drop"
        )
        return nn.Dense(2, name="out")(drop(h))


def dropped(batch_size, **options):
    model = Dropped(**options)
    variables = Dropped(0.0).init(jax.random.key(1), X)
    probed = ft.from_linen(model, rngs={"dropout": jax.random.key(2)})
    return ft.tap(
        probed,
        variables,
        X,
        sites="drop",
        readout=readouts.scalar(lambda y: y[0] ** 2),
        batch_size=batch_size,
    )["drop"]


def keyed(params, inputs, tap):
    """Dropout from one key of each input."""
    x, keys = inputs
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (WIDTHS[0],)))(keys)
    return tap("s", jnp.where(keep, x, 0.0)).sum(-1)


def noisy(params, x, tap):
    """The same key in every chunk: rows 0 and 2 of chunks of two would be alike."""
    return tap("s", x + jax.random.normal(jax.random.key(0), x.shape)).sum(-1)


def split_keys(params, x, tap):
    keys = jax.random.split(jax.random.key(0), len(x))
    draw = jax.vmap(lambda key: jax.random.normal(key, (WIDTHS[0],)))
    return tap("s", x + draw(keys)).sum(-1)


def projected(params, x, tap):
    """What is drawn does not depend on the batch."""
    matrix = jax.random.normal(jax.random.key(0), (WIDTHS[0], 3))
    return tap("s", x @ matrix).sum(-1)


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [1, 3, B - 1])
@pytest.mark.parametrize("model", [noisy, split_keys, None])
def test_a_model_that_draws_for_the_whole_batch_is_refused_in_chunks(model, size):
    match = (
        rf"^tap: batch_size={size} .*10 inputs, got a model in train mode: .*; switch"
    )
    with pytest.raises(ValueError, match=match):
        dropped(size) if model is None else tap_of(
            ft.from_function(model), sites="s", readout=None, batch_size=size
        )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"rate": 0.0}, {"broadcast": (0,)}])
def test_masks_that_do_not_depend_on_the_batch_are_the_same_in_chunks(options):
    whole, chunks = dropped(None, **options), dropped(3, **options)
    assert_close(chunks.acts, whole.acts)
    assert_close(chunks.grads, whole.grads)


@pytest.mark.slow_cases
@pytest.mark.parametrize("model", [keyed, projected])
def test_a_key_of_each_input_or_of_the_model_is_fine_in_chunks(model):
    keys = jax.random.split(jax.random.key(5), B)
    inputs = (X, keys) if model is keyed else X

    def run(batch_size):
        probed = ft.from_function(model)
        return ft.tap(
            probed, None, inputs, sites="s", readout=None, batch_size=batch_size
        )["s"].acts

    assert_close(run(3), run(None))


@pytest.mark.slow
def test_dropout_of_the_whole_batch_is_the_models_own():
    """Without chunks the mask is that of the module itself, one for each example."""
    taps = dropped(None)
    variables = Dropped(0.0).init(jax.random.key(1), X)
    _, state = Dropped().apply(
        variables,
        X,
        rngs={"dropout": jax.random.key(2)},
        capture_intermediates=lambda module, _: module.name == "drop",
    )
    assert_close(taps.acts, state["intermediates"]["drop"]["__call__"][0])
    assert len(np.unique(np.asarray(taps.acts) == 0, axis=0)) > 1


IDENTITY = ft.from_split(lambda p, x: x, lambda p, a: a.sum(-1))
READ = readouts.scalar(lambda y: y)


def tap_of(probed=IDENTITY, inputs=X, sites="acts", readout=READ, **options):
    return ft.tap(probed, None, inputs, sites=sites, readout=readout, **options)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch_size": 2.5}, r"batch_size .*got 2.5"),
        ({"batch_size": "a"}, r"batch_size .*got 'a'"),
        ({"batch_size": True}, r"batch_size .*got True"),
        ({"batch_size": np.nan}, r"batch_size .*got nan"),
        ({"sites": 3}, r"sites .*got 3"),
        ({"sites": [3]}, r"sites .*got 3"),
        ({"sites": None}, r"sites .*got None"),
        ({"probed": None}, r"probed .*got None"),
        ({"probed": lambda p, x, probes: x}, r"probed .*got PyTreeDef"),
        ({"readout": "loss"}, r"readout .*got str"),
        ({"inputs": X[:0]}, r"inputs .*leading axis 0"),
        (
            {"probed": ft.from_split(lambda p, x: x, lambda p, a: a.argmax(-1))},
            r"no floating-point output to differentiate, got int32\[10\]",
        ),
        (
            {"probed": ft.from_split(lambda p, x: x, lambda p, a: None)},
            r"no floating-point output to differentiate, got none",
        ),
        (
            {"probed": ft.from_split(lambda p, x: x[:, :0], lambda p, a: a.sum(-1))},
            r"site 'acts' must have a width .*got .*\(10, 0\)",
        ),
        (
            {
                "probed": ft.from_function(
                    lambda p, x, tap: tap("i", x.argmax(-1, keepdims=True))
                ),
                "sites": "i",
            },
            r"no site 'i'; .*floating-point",
        ),
    ],
)
def test_arguments_of_tap_are_named(changes, match):
    with pytest.raises((TypeError, ValueError), match=rf"(?s)^tap: .*{match}"):
        tap_of(**changes)


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [np.int64(3), jnp.int32(3), np.uint8(3)])
def test_batch_size_may_be_an_integer_of_numpy_or_jax(size):
    assert_close(tap_of(batch_size=size)["acts"].grads, np.ones((B, 1, WIDTHS[0])))


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one():
    layers = {"params": {"layers_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}}
    probed = ft.from_linen(nn.Sequential([nn.Dense(3)]))
    readout = ft.readouts.scalar(jnp.sum)
    with pytest.raises(
        ValueError, match=r"Likely: the path is misspelt, 'layers_0' was meant"
    ):
        ft.tap(probed, layers, jnp.ones((4, 2)), sites="layers/0", readout=readout)
    with pytest.raises(TypeError, match=r"inputs: wanted arrays, got the text 'Hi'"):
        ft.tap(probed, layers, "Hi", sites="layers_0", readout=readout)
