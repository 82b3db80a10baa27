import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import toyfeat as ft
from toyfeat import readouts

RNG = np.random.default_rng(1)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


B, D, V = 6, 5, 4
X, W = normal(B, D), normal(D, V)
DRAWS = 4096
KEY = jax.random.key(11)


def to_logits(w, acts):
    return jnp.tanh(acts) @ w


SPLIT = ft.from_split(lambda w, x: x, to_logits)


@functools.partial(jax.jit, static_argnames=("probed", "batch_size"))
def jitted_taps(x, readout, probed, batch_size):
    options = {"sites": "acts", "readout": readout, "batch_size": batch_size}
    return ft.tap(probed, W, x, **options)["acts"]


def taps_of(readout, *, probed=SPLIT, x=X, batch_size=None):
    return jitted_taps(x, readout, probed, batch_size)


def float64(value):
    return np.asarray(value, np.float64)


def logits_and_jacobian(x=X):
    """Closed form in float64: logits [B, V] and d logits / d acts [B, V, D]."""
    x, w = float64(x), float64(W)
    slope = 1 - np.tanh(x) ** 2
    return np.tanh(x) @ w, np.einsum("dv,bd->bvd", w, slope)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def everything(outputs):
    return outputs


def assert_close(got, want, tol=1e-5):
    got, want = float64(got), float64(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol * np.abs(want).max())


def assert_mean_is(draws, want, errors=5.0):
    """The mean over the first axis is ``want`` to a few standard errors."""
    draws = float64(draws)
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert draws.shape[1:] == want.shape
    assert np.all(np.abs(draws.mean(axis=0) - want) <= errors * error + 1e-5)


def outer_products(grads):
    """[K, D, D] of unscaled gradients, from the scaled ones of one input."""
    grads = float64(grads) * np.sqrt(len(grads))
    return np.einsum("kd,ke->kde", grads, grads)


# half the squared norm


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["vector", "tuple", "tree", "scalar"])
def test_half_squared_norm_is_the_jacobian_times_the_output(kind):
    """Against per-example ``jacrev``, over everything in an output."""

    def suffix(w, acts):
        y = jnp.tanh(acts) @ w
        blocks = y[:, :2].reshape(-1, 2, 1) ** 2
        return {
            "vector": y,
            "tuple": (y, blocks, y[:, 0]),
            "tree": {"x": y, "y": [blocks, {"z": y[:, 0]}]},
            "scalar": y[:, 0],
        }[kind]

    def flat_output(act):
        leaves = jax.tree.leaves(suffix(W, act[None]))
        flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
        return flat, flat

    probed = ft.from_split(lambda w, x: x, suffix)
    grads = float64(taps_of(readouts.half_squared_norm(), probed=probed).grads)
    oracle = jax.jit(jax.vmap(jax.jacrev(flat_output, has_aux=True)))
    jacobians, outputs = map(float64, oracle(X))
    assert_close(grads[:, 0], np.einsum("bvd,bv->bd", jacobians, outputs))


def test_half_squared_norm_takes_a_mask_and_keeps_one_program():
    mask = jnp.arange(B) > 1
    taps = taps_of(readouts.half_squared_norm(mask=mask.astype(jnp.float32)))
    np.testing.assert_array_equal(taps.weights, mask)
    first, second = readouts.half_squared_norm(), readouts.half_squared_norm()
    assert jax.tree.structure(first) == jax.tree.structure(second)


# sampled labels


@pytest.mark.slow_cases
@pytest.mark.parametrize("num", [1, 3])
def test_categorical_gradient_is_that_of_some_label(num):
    grads = float64(taps_of(readouts.sampled_labels(KEY, num=num)).grads)
    logits, jacobian = logits_and_jacobian()
    residuals = softmax(logits)[:, None, :] - np.eye(V)[None]  # [B, label, V]
    candidates = np.einsum("blv,bvd->bld", residuals, jacobian)
    distance = np.abs(grads[:, :, None] * np.sqrt(num) - candidates[:, None]).max(-1)
    assert grads.shape == (B, num, D)
    assert np.all(distance.min(-1) < 1e-5)


def test_bernoulli_gradient_is_that_of_some_labels():
    grads = float64(taps_of(readouts.sampled_labels(KEY, family="bernoulli")).grads)
    logits, jacobian = logits_and_jacobian()
    labels = np.array(list(itertools.product([0, 1], repeat=V)))
    residuals = 1 / (1 + np.exp(-logits))[:, None, :] - labels[None]
    candidates = np.einsum("blv,bvd->bld", residuals, jacobian)
    distance = np.abs(grads - candidates).max(-1)
    assert np.all(distance.min(-1) < 1e-5)


def exact_fisher(family):
    logits, jacobian = logits_and_jacobian(X[:2])
    if family == "categorical":
        p = softmax(logits)
        middle = np.einsum("bv,vw->bvw", p, np.eye(V)) - p[:, :, None] * p[:, None]
    elif family == "bernoulli":
        p = 1 / (1 + np.exp(-logits))
        middle = np.einsum("bv,vw->bvw", p * (1 - p), np.eye(V))
    else:
        middle = np.stack([np.eye(V)] * 2)
    return np.einsum("bvd,bvw,bwe->bde", jacobian, middle, jacobian)


@pytest.mark.slow_cases
@pytest.mark.parametrize("family", ["categorical", "bernoulli", "gaussian"])
def test_second_moment_over_sampled_labels_is_the_true_fisher(family):
    readout = readouts.sampled_labels(KEY, num=DRAWS, family=family)
    grads = taps_of(readout, x=X[:2]).grads
    for row, want in zip(np.asarray(grads), exact_fisher(family), strict=True):
        assert_mean_is(outer_products(row), want)
        # the score has zero mean
        assert_mean_is(float64(row) * np.sqrt(DRAWS), np.zeros(D))


def test_labels_are_drawn_per_position_and_summed():
    logits = jnp.asarray(
        0.4 * np.asarray(normal(1, 3, V))
    )  # no rare labels, for the standard error
    probed = ft.from_split(lambda w, x: x, lambda w, a: a)
    readout = readouts.sampled_labels(KEY, num=DRAWS)
    grads = float64(taps_of(readout, probed=probed, x=logits).grads)  # [3, K, V]
    scores = np.moveaxis(grads, 0, 1).reshape(DRAWS, 3 * V) * np.sqrt(DRAWS)
    p = softmax(float64(logits)[0])
    want = np.zeros((3, V, 3, V))
    for t in range(3):
        want[t, :, t] = np.diag(p[t]) - np.outer(p[t], p[t])
    moment = np.einsum("ki,kj->kij", scores, scores)
    assert_mean_is(moment, want.reshape(3 * V, 3 * V))


# random directions


def test_rademacher_gradient_is_that_of_some_signs():
    grads = float64(taps_of(readouts.random_directions(KEY, 3)).grads)
    jacobian = logits_and_jacobian()[1]
    signs = np.array(list(itertools.product([-1, 1], repeat=V)))
    candidates = np.einsum("lv,bvd->bld", signs, jacobian) / np.sqrt(3)
    distance = np.abs(grads[:, :, None] - candidates[:, None]).max(-1)
    assert grads.shape == (B, 3, D)
    assert np.all(distance.min(-1) < 1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_expected_second_moment_of_random_directions_is_jtj(kind):
    grads = taps_of(readouts.random_directions(KEY, DRAWS, kind), x=X[:2]).grads
    jacobian = logits_and_jacobian(X[:2])[1]
    for row, j in zip(np.asarray(grads), jacobian, strict=True):
        assert_mean_is(outer_products(row), j.T @ j)
        total = np.einsum("kd,ke->de", float64(row), float64(row))
        assert_close(total, outer_products(row).mean(0), tol=1e-9)


def test_one_draw_per_input_averages_to_jtj_over_inputs():
    x = jnp.asarray(np.tile(np.asarray(X)[:1], (DRAWS, 1)))
    grads = taps_of(readouts.random_directions(KEY, 1), x=x).grads[:, 0]
    j = logits_and_jacobian(X[:1])[1][0]
    assert_mean_is(np.einsum("kd,ke->kde", float64(grads), float64(grads)), j.T @ j)


def test_directions_span_the_whole_output_tree():
    probed = ft.from_split(
        lambda w, x: x, lambda w, a: {"a": 2.0 * a[:, :2], "b": (3.0 * a[:, 2:],)}
    )
    readout = readouts.random_directions(KEY, 64, select=everything)
    grads = taps_of(readout, probed=probed).grads
    scaled = np.abs(float64(grads)) * 8
    assert_close(scaled[..., :2], np.full((B, 64, 2), 2.0))
    assert_close(scaled[..., 2:], np.full((B, 64, 3), 3.0))
    signs = np.sign(float64(grads)).reshape(-1, D)
    correlation = signs.T @ signs / len(signs)
    assert np.abs(correlation - np.eye(D)).max() < 5 / np.sqrt(len(signs))


RANDOM = {
    "sampled": lambda key: readouts.sampled_labels(key, num=3),
    "gaussian_labels": lambda key: readouts.sampled_labels(key, family="gaussian"),
    "rademacher": lambda key: readouts.random_directions(key, 3),
    "gaussian": lambda key: readouts.random_directions(key, 3, "gaussian"),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", RANDOM)
def test_randomness_is_the_keys_and_differs_between_inputs(name):
    x = jnp.asarray(np.tile(np.float32(0.2) * np.asarray(X)[:1], (B, 1)))
    grads = [
        float64(taps_of(RANDOM[name](jax.random.key(seed)), x=x).grads)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(grads[0], grads[1])
    assert np.abs(grads[0] - grads[2]).max() > 0.01
    distinct = {row.tobytes() for row in np.round(grads[0], 4)}
    assert len(distinct) > B // 2


@pytest.mark.parametrize("name", RANDOM)
def test_gradients_of_an_input_do_not_depend_on_the_other_inputs(name):
    readout = RANDOM[name](KEY)
    other = np.array(X)
    other[3:] *= -2.0
    changed, grads = (
        taps_of(readout, x=jnp.asarray(other)).grads,
        taps_of(readout).grads,
    )
    assert_close(np.asarray(changed)[:3], np.asarray(grads)[:3])


def test_a_path_draws_the_same_directions_at_all_scales():
    linear = ft.from_split(lambda w, x: x, lambda w, a: a @ w)
    readout = readouts.random_directions(KEY, 3, "gaussian")
    path = taps_of(
        readouts.along_path(readout, jnp.array([0.1, 1.0, 2.0])), probed=linear
    )
    once = taps_of(readout, probed=linear)
    assert_close(path.grads, np.tile(float64(once.grads), (1, 3, 1)))


# next-token loss

TOKENS = jnp.asarray(RNG.integers(0, V, (3, 5)))
STREAM = normal(3, 5, V)


def causal(w, acts):
    return jnp.cumsum(jnp.tanh(acts), axis=1)


SEQUENCE = ft.from_split(lambda w, x: x, causal)


def next_token_oracle(counts=None):
    """Gradients [15, 1, V] of the sum of the losses, in float64 and closed form.

    Args:
        counts: Of the predictions at all positions but the last, [3, 4].
    """
    slope = 1 - np.tanh(float64(STREAM)) ** 2
    grads = softmax(np.cumsum(np.tanh(float64(STREAM)), axis=1))
    grads[:, :-1] -= np.eye(V)[np.asarray(TOKENS)[:, 1:]]
    grads[:, :-1] *= 1 if counts is None else np.asarray(counts)[..., None]
    grads[:, -1] = 0
    # a position takes part in the logits of all the later ones
    sums = np.cumsum(grads[:, ::-1], axis=1)[:, ::-1]
    return (slope * sums).reshape(15, 1, V)


def next_token_taps(**options):
    return taps_of(
        readouts.next_token_loss(TOKENS, **options), probed=SEQUENCE, x=STREAM
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("first", "want"), [(False, [0, 1, 1, 1, 0]), (True, [1, 1, 1, 1, 0])]
)
def test_next_token_leaves_out_the_last_and_the_first_position(first, want):
    taps = next_token_taps(first=first)
    np.testing.assert_array_equal(taps.weights, np.tile(want, 3))
    assert_close(taps.grads, next_token_oracle())


PADDED = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])


@pytest.mark.parametrize("kind", ["int", "float", "bool"])
def test_padding_is_no_target(kind):
    mask = {
        "int": PADDED,
        "float": PADDED.astype(jnp.float32),
        "bool": PADDED == 1,
    }[kind]
    taps = next_token_taps(mask=mask, first=True)
    assert_close(taps.grads, next_token_oracle(np.asarray(PADDED)[:, 1:]))
    assert taps.weights.dtype == jnp.float32


def test_padding_is_no_example_and_neither_is_a_position_without_a_target():
    taps = next_token_taps(mask=PADDED, first=True)
    want = [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(taps.weights, np.ravel(want))
    taps = next_token_taps(mask=PADDED)
    want = [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(taps.weights, np.ravel(want))


def test_no_padded_position_predicts_on_the_left_either():
    mask = jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    taps = next_token_taps(mask=mask, first=True)
    want = [[0, 0, 1, 1, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    np.testing.assert_array_equal(taps.weights, np.ravel(want))
    keep = np.asarray(mask)
    assert_close(taps.grads, next_token_oracle(keep[:, :-1] * keep[:, 1:]))


def test_next_token_takes_logits_out_of_other_outputs():
    probed = ft.from_split(lambda w, x: x, lambda w, a: {"logits": causal(w, a)})
    readout = readouts.next_token_loss(TOKENS, select=lambda out: out["logits"])
    taps = taps_of(readout, probed=probed, x=STREAM)
    assert_close(taps.grads, next_token_oracle())


# outputs with integer leaves, other trees, own rules


def with_argmax(w, acts):
    logits = to_logits(w, acts)
    return logits, jnp.argmax(logits, axis=-1)


WITH_ARGMAX = ft.from_split(lambda w, x: x, with_argmax)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("with_integers", "plain"),
    [
        (
            readouts.scalar(lambda out: jnp.sum(out[0] ** 2)),
            readouts.scalar(lambda y: jnp.sum(y**2)),
        ),
        (readouts.jacobian(), readouts.jacobian()),
        (readouts.random_directions(KEY, 3), None),
        (
            readouts.sampled_labels(KEY, select=lambda out: out[0]),
            readouts.sampled_labels(KEY),
        ),
        (
            readouts.logit_difference(1, 2, select=lambda out: out[0]),
            readouts.logit_difference(1, 2),
        ),
        (
            readouts.loss(
                lambda out, label: optax.squared_error(out[0], label), jnp.zeros((B, V))
            ),
            readouts.scalar(lambda y: jnp.sum(y**2)),
        ),
    ],
    ids=["scalar", "jacobian", "random", "sampled", "logits", "loss"],
)
def test_integer_outputs_carry_no_gradient(with_integers, plain):
    grads = taps_of(with_integers, probed=WITH_ARGMAX).grads
    if plain is not None:
        assert_close(grads, taps_of(plain).grads)
    else:
        jacobian = logits_and_jacobian()[1]
        signs = np.array(list(itertools.product([-1, 1], repeat=V)))
        candidates = np.einsum("lv,bvd->bld", signs, jacobian) / np.sqrt(3)
        distance = np.abs(float64(grads)[:, :, None] - candidates[:, None]).max(-1)
        assert np.all(distance.min(-1) < 1e-5)


def test_jacobian_of_a_tree_follows_the_flattened_leaves():
    probed = ft.from_split(
        lambda w, x: x, lambda w, a: {"b": a**2, "a": a[:, :2].reshape(-1, 2, 1)}
    )
    readout = readouts.jacobian(select=everything)
    grads = float64(taps_of(readout, probed=probed).grads)
    x = float64(X)
    assert grads.shape == (B, 2 + D, D)
    assert_close(grads[:, :2], np.tile(np.eye(D)[None, :2], (B, 1, 1)))
    assert_close(grads[:, 2:], np.einsum("bd,de->bde", 2 * x, np.eye(D)))


def test_a_rule_of_ones_own_sees_labels_keys_and_options():
    def rule(options, outputs, chunk):
        (factor,) = options
        assert chunk.keys.shape == (outputs.shape[0],)
        rows = chunk.labels[:, None] * chunk.shared[None] * factor
        return jnp.stack([rows, -rows])

    readout = readouts.Readout(
        rule=rule, options=(3.0,), labels=jnp.arange(6.0), shared=jnp.ones(V), key=KEY
    )
    want = np.einsum("b,bvd->bd", 3.0 * np.arange(6.0), logits_and_jacobian()[1])
    for size in (None, 4):
        grads = taps_of(readout, batch_size=size).grads
        assert_close(grads, np.stack([want, -want], axis=1))


def test_readouts_are_trees_with_labels_keys_masks_and_scales_as_leaves():
    readout = readouts.along_path(
        readouts.sampled_labels(KEY, mask=jnp.ones(B)), jnp.ones(2)
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(readout)}
    assert shapes == {(), (B,), (2,)}
    other = readouts.along_path(
        readouts.sampled_labels(jax.random.key(3), mask=jnp.zeros(B)), jnp.zeros(2)
    )
    assert jax.tree.structure(readout) == jax.tree.structure(other)


# errors


def traced_tap(probed, x, readout):
    """Only the trace: that is where shapes are checked."""
    return jax.eval_shape(
        lambda x: ft.tap(probed, W, x, sites="acts", readout=readout), x
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: readouts.random_directions(KEY, 2, "uniform"),
            r"random_directions: kind .*rademacher, gaussian.*'uniform'",
        ),
        (
            lambda: readouts.sampled_labels(KEY, family="poisson"),
            r"sampled_labels: family .*categorical.*'poisson'",
        ),
        (
            lambda: readouts.random_directions(KEY, 0),
            r"random_directions: num must be an int of at least 1, got 0",
        ),
        (
            lambda: readouts.sampled_labels(KEY, num=0),
            r"sampled_labels: num must be an int of at least 1, got 0",
        ),
        (
            lambda: readouts.along_path(readouts.jacobian(), jnp.zeros(0)),
            r"along_path: scales .*got shape \(0,\)",
        ),
        (
            lambda: readouts.along_path(readouts.jacobian(), jnp.ones((2, 1))),
            r"along_path: scales .*got shape \(2, 1\)",
        ),
        (
            lambda: readouts.along_path(
                readouts.along_path(readouts.jacobian(), jnp.ones(2)), jnp.ones(2)
            ),
            r"along_path: .*a path already",
        ),
        (
            lambda: readouts.next_token_loss(jnp.zeros(3, jnp.int32)),
            r"next_token_loss: tokens must be \[B, T\].*got shape \(3,\)",
        ),
        (
            lambda: readouts.next_token_loss(jnp.zeros((3, 1), jnp.int32)),
            r"T >= 2, got shape \(3, 1\)",
        ),
        (
            lambda: readouts.next_token_loss(TOKENS, mask=jnp.ones((3, 4))),
            r"next_token_loss: mask .*\(3, 5\), got \(3, 4\)",
        ),
        (
            lambda: readouts.logit_difference(jnp.zeros((B, 2), jnp.int32), 0),
            r"logit_difference: .*\(6, 2\)",
        ),
    ],
)
def test_bad_options_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("readout", "match"),
    [
        (
            readouts.directions(jnp.ones((2, V + 1))),
            r"directions: .*'K', 4.*\(2, 5\)",
        ),
        (readouts.directions(jnp.ones(V)), r"directions: .*'K', 4.*\(4,\)"),
        (readouts.logit_difference(jnp.arange(5), 0), r"leading axis 6.*\(5,\)"),
        (
            readouts.Readout(rule=lambda o, y, c: jnp.ones((2, B, V - 1))),
            r"cotangents \[K, \*output.shape\].*\(2, 6, 3\).*\(6, 4\)",
        ),
        (
            readouts.Readout(rule=lambda o, y, c: jnp.ones((B, V))),
            r"cotangents \[K, \*output.shape\].*\(6, 4\)",
        ),
        (
            readouts.Readout(rule=lambda o, y, c: (jnp.ones((1, B, V)),) * 2),
            r"cotangents must have the structure of the outputs",
        ),
        (
            readouts.loss(optax.squared_error, {"a": X, "b": X[:2]}),
            r"labels .*leading axis 6.*\(2, 5\)",
        ),
        (readouts.logit_difference(V, 0), r"logit_difference: .*4"),
        (readouts.logit_difference(0, -V - 1), r"logit_difference: .*-5"),
        (readouts.logit_difference(1, 0, position=0), r"logit_difference: .*position"),
        (readouts.next_token_loss(TOKENS[:1].repeat(B, 0)), r"mask must have shape"),
    ],
)
def test_readout_that_does_not_fit_the_outputs_is_refused(readout, match):
    with pytest.raises(ValueError, match=match):
        traced_tap(SPLIT, X, readout)


@pytest.mark.parametrize("position", [5, -6])
def test_position_past_the_end_is_refused(position):
    readout = readouts.logit_difference(0, 1, position=position)
    with pytest.raises(ValueError, match=rf"position.*{position}"):
        traced_tap(SEQUENCE, STREAM, readout)


def test_negative_index_counts_from_the_end():
    grads = taps_of(readouts.logit_difference(-1, -V)).grads
    assert_close(grads, taps_of(readouts.logit_difference(V - 1, 0)).grads)


def test_function_that_reads_differently_as_one_and_as_a_batch_is_refused():
    def first_of_columns(y):
        return y[:, 0]

    with pytest.raises(ValueError, match=r"single input.*of a batch.*y\[\.\.\., i\]"):
        traced_tap(SEQUENCE, STREAM, readouts.scalar(first_of_columns))


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_reading_of_a_scalar_does_not_depend_on_the_batch_size(size):
    # of a batch of two, y[0, :2] would have a leading axis of two as well
    readout = readouts.scalar(lambda y: y[0, :2])
    grads = taps_of(readout, probed=SEQUENCE, x=STREAM, batch_size=size).grads
    want = np.zeros((3, 5, V))
    want[:, 0, :2] = 1 - np.tanh(float64(STREAM)[:, 0, :2]) ** 2
    assert_close(grads, want.reshape(15, 1, V))


def test_scalar_over_the_whole_batch_is_refused():
    with pytest.raises(IndexError, match=r"readout: .*one input, without the batch"):
        traced_tap(SPLIT, X, readouts.scalar(lambda y: y[:, 0].mean()))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: readouts.next_token_loss(jnp.zeros((B, 5))),
            r"next_token_loss: tokens .*float32",
        ),
        (
            lambda: readouts.logit_difference(1.0, 0),
            r"logit_difference: .*float64",  # of NumPy, for a number of Python
        ),
        (
            lambda: readouts.logit_difference(0, jnp.ones(B)),
            r"logit_difference: .*float32",
        ),
    ],
)
def test_indices_and_tokens_must_be_whole_numbers(make, match):
    def use(readout):
        return traced_tap(SEQUENCE, normal(B, 5, V), readout)

    with pytest.raises((TypeError, ValueError), match=match):
        use(make())


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        (lambda y: y[:, :-1], r"got \(6, 4, 4\)"),
        (lambda y: {"a": y, "b": y}, r"got \(6, 5, 4\), \(6, 5, 4\)"),
    ],
)
def test_logits_that_do_not_fit_the_tokens_are_named(outputs, found):
    probed = ft.from_split(lambda w, x: x, lambda w, acts: outputs(acts))
    readout = readouts.next_token_loss(jnp.zeros((B, 5), jnp.int32))
    wanted = r"next_token_loss: tokens \(6, 5\) need logits \(6, 5, 'V'\), " + found
    with pytest.raises(ValueError, match=wanted):
        traced_tap(probed, normal(B, 5, V), readout)


def test_the_first_token_after_left_padding_is_left_out_too():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    tokens = jnp.zeros((2, 5), jnp.int32)
    readout = readouts.next_token_loss(tokens, mask=mask)
    np.testing.assert_array_equal(readout.mask, [[0, 0, 0, 1, 0], [0, 1, 1, 0, 0]])
    shown = readouts.next_token_loss(tokens, mask=mask, first=True)
    np.testing.assert_array_equal(shown.mask, [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]])


# labels that do not count, and labels that the outputs do not have

LOGITS = normal(2, 5, V)
TO_LOGITS = ft.from_split(lambda w, x: x, lambda w, a: a)  # the site is the logits


def logit_taps(readout, batch_size=None, logits=LOGITS):
    return ft.tap(
        TO_LOGITS, None, logits, sites="acts", readout=readout, batch_size=batch_size
    )["acts"]


def cross_entropy_gradient(labels, counts, logits=LOGITS):
    """Softmax minus one-hot in float64, 0 where a label does not count."""
    grads = softmax(float64(logits))
    for place in zip(*np.nonzero(counts), strict=True):
        grads[(*place, labels[place])] -= 1
    return grads * np.asarray(counts)[..., None]


def taps_of_tokens(tokens, ignore):
    options = {} if ignore == -100 else {"ignore": np.int64(ignore)}
    return logit_taps(readouts.next_token_loss(tokens, first=True, **options))


jitted_taps_of_tokens = jax.jit(taps_of_tokens, static_argnames="ignore")


@pytest.mark.slow_cases
@pytest.mark.parametrize("ignore", [-100, -1, 3])
@pytest.mark.parametrize("places", [[2], [0], [4], [0, 1], [1, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("jit", [False, True])
def test_ignored_tokens_have_no_loss_and_no_weight(ignore, places, jit):
    tokens = np.array([[1, 0, 2, 0, 1], [0, 1, 1, 2, 0]])
    tokens[0, places] = ignore
    present = tokens != ignore
    counts = np.zeros((2, 5), bool)
    counts[:, :-1] = present[:, :-1] & present[:, 1:]

    fn = jitted_taps_of_tokens if jit else taps_of_tokens
    taps = fn(jnp.asarray(tokens), ignore)
    want = cross_entropy_gradient(np.roll(tokens, -1, axis=1), counts)
    assert_close(taps.grads, want.reshape(10, 1, V))
    np.testing.assert_array_equal(taps.weights, counts.ravel())


@functools.partial(jax.jit, static_argnames="batch_size")
def jitted_next_token_taps(tokens, batch_size):
    return logit_taps(readouts.next_token_loss(tokens), batch_size)


@pytest.mark.slow_cases
@pytest.mark.parametrize("token", [-1, V, 500])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_targets_that_the_logits_do_not_have_raise_or_are_nan(token, batch_size):
    tokens = np.zeros((2, 5), np.int32)
    tokens[1, 2] = token
    tokens = jnp.asarray(tokens)
    match = (
        rf"next_token_loss: .* 0 \.\. 3 .*got {token} at position 2 of input 1; mark"
    )
    with pytest.raises(ValueError, match=match):
        logit_taps(readouts.next_token_loss(tokens), batch_size)
    grads = float64(jitted_next_token_taps(tokens, batch_size).grads)
    grads = grads.reshape(2, 5, V)
    np.testing.assert_array_equal(
        np.isnan(grads).all(-1), np.arange(10).reshape(2, 5) == 6
    )
    # what is no target may be any number
    mask = jnp.asarray(np.asarray(tokens) == 0, jnp.float32)
    masked = readouts.next_token_loss(tokens, mask=mask)
    assert np.isfinite(np.asarray(logit_taps(masked, batch_size).grads)).all()


CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels


@pytest.mark.slow_cases
@pytest.mark.parametrize("ignore", [-100, 2, None])
@pytest.mark.parametrize("shape", [(2, 5), (2,)])
@pytest.mark.parametrize("jit", [False, True])
def test_ignored_labels_of_a_loss_have_no_gradient(ignore, shape, jit):
    labels = np.resize([1, 0, 3, 3, 0, 1, 1], shape)
    logits = LOGITS if len(shape) == 2 else LOGITS[:, 0]
    counts = np.ones(shape, bool)
    if ignore is not None:
        labels.flat[1::3], counts.flat[1::3] = ignore, False

    def taps_of_labels(labels):
        return logit_taps(
            readouts.loss(CROSS_ENTROPY, labels, ignore=ignore), None, logits
        )

    taps = (jax.jit(taps_of_labels) if jit else taps_of_labels)(jnp.asarray(labels))
    want = cross_entropy_gradient(labels, counts, logits)
    assert_close(taps.grads, want.reshape(-1, 1, V))
    of_input = counts.reshape(2, -1).any(1)
    np.testing.assert_array_equal(
        taps.weights, np.repeat(of_input, len(taps.weights) // 2)
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("reduce", [jnp.mean, jnp.sum])
def test_an_ignored_label_inside_a_mean_raises_or_is_nan(reduce):
    labels = np.zeros((2, 5), np.int32)
    labels[1, 3] = -100
    labels = jnp.asarray(labels)

    def mean_loss(y, label):
        return reduce(CROSS_ENTROPY(y, label))

    with pytest.raises(ValueError, match=r"loss: .*\(2,\) for labels \(2, 5\); do not"):
        logit_taps(readouts.loss(mean_loss, labels))
    traced = jax.jit(lambda x: logit_taps(readouts.loss(mean_loss, x)))(labels)
    grads = float64(traced.grads).reshape(2, -1)
    assert np.isfinite(grads[0]).all()
    assert np.isnan(grads[1]).all()
    counted = readouts.loss(mean_loss, jnp.zeros((2, 5), jnp.int32))
    assert np.isfinite(logit_taps(counted).grads).all()


@pytest.mark.slow_cases
@pytest.mark.parametrize("label", [-1, V, -V - 1])
def test_labels_of_a_loss_that_the_outputs_do_not_have_raise(label):
    labels = jnp.array([0, label])
    with pytest.raises(ValueError, match=rf"loss: .*{label}.*; .*ignore"):
        logit_taps(readouts.loss(CROSS_ENTROPY, labels), None, LOGITS[:, 0])


def test_integer_targets_of_a_regression_may_be_negative():
    labels = jnp.array([-1, -7])

    def squared(y, label):
        return (y[0] - label.astype(y.dtype)) ** 2

    grads = logit_taps(readouts.loss(squared, labels), None, LOGITS[:, 0]).grads
    want = 2 * (float64(LOGITS[:, 0, 0]) - np.array([-1, -7]))
    assert_close(grads[:, 0, 0], want)


def test_an_index_that_the_logits_do_not_have_is_refused_in_chunks_and_nan_in_jit():
    index = jnp.array([0, -100])
    with pytest.raises(ValueError, match=r"logit_difference: index .*-100.*; give"):
        logit_taps(readouts.logit_difference(index, 1), 1, LOGITS[:, 0])
    traced = jax.jit(
        lambda i: logit_taps(readouts.logit_difference(i, 1), None, LOGITS[:, 0]).grads
    )(index)
    traced = np.asarray(traced)
    assert np.isfinite(traced[0]).all()
    assert np.isnan(traced[1]).all()


@pytest.mark.parametrize(
    ("name", "readout"),
    [
        ("sampled_labels", readouts.sampled_labels(KEY)),
        ("jacobian", readouts.jacobian()),
        ("random_directions", readouts.random_directions(KEY, 2)),
        ("logit_difference", readouts.logit_difference(0, 1)),
    ],
)
def test_several_outputs_without_select_are_named(name, readout):
    both = ft.from_split(
        lambda w, x: x, lambda w, a: {"logits": a @ w, "hidden": a, "n": None}
    )
    match = rf"{name}: .*outputs\['hidden'\] \(6, 5\), outputs\['logits'\].*select"
    with pytest.raises(ValueError, match=match):
        traced_tap(both, X, readout)


@pytest.mark.slow_cases
@pytest.mark.parametrize("over", ["all", "positions", "units"])
def test_random_directions_of_half_precision_outputs(over):
    logits = LOGITS.astype(jnp.float16)
    readout = readouts.random_directions(KEY, 2, over=over)
    taps = taps_of(readout, probed=TO_LOGITS, x=logits)
    assert taps.grads.dtype == jnp.float16
    sizes = np.unique(np.abs(float64(taps.grads)))
    np.testing.assert_allclose(sizes[sizes > 0], 2**-0.5, rtol=1e-3)


BAD = {
    "scalar: fn": lambda: readouts.scalar(None),
    "scalar: mask": lambda: readouts.scalar(jnp.sum, mask="a"),
    "half_squared_norm: mask|scalar: mask": lambda: readouts.half_squared_norm(
        mask="a"
    ),
    "loss: fn": lambda: readouts.loss(None, X),
    "loss: labels": lambda: readouts.loss(jnp.sum, None),
    "loss: labels must": lambda: readouts.loss(jnp.sum, "a"),
    "loss: ignore": lambda: readouts.loss(jnp.sum, X, ignore=1.5),
    "next_token_loss: tokens": lambda: readouts.next_token_loss(None),
    "next_token_loss: first": lambda: readouts.next_token_loss(TOKENS, first="no"),
    "next_token_loss: select": lambda: readouts.next_token_loss(TOKENS, select=3),
    "next_token_loss: ignore": lambda: readouts.next_token_loss(TOKENS, ignore=True),
    "next_token_loss: mask": lambda: readouts.next_token_loss(TOKENS, mask=[[np.nan]]),
    "sampled_labels: key": lambda: readouts.sampled_labels(None),
    "sampled_labels: num": lambda: readouts.sampled_labels(KEY, num=2.0),
    "sampled_labels: family": lambda: readouts.sampled_labels(KEY, family=[]),
    "random_directions: key": lambda: readouts.random_directions(3, 2),
    "random_directions: num": lambda: readouts.random_directions(KEY, True),
    "random_directions: over": lambda: readouts.random_directions(KEY, 2, over=None),
    "directions: cotangents": lambda: readouts.directions(None),
    "directions: cotangents must": lambda: readouts.directions("a"),
    "jacobian: mask": lambda: readouts.jacobian(mask=np.array([-1.0])),
    "logit_difference: a": lambda: readouts.logit_difference(None, 1),
    "logit_difference: position": lambda: readouts.logit_difference(0, 1, position="a"),
    "along_path: readout": lambda: readouts.along_path(None, [1.0]),
    "along_path: scales": lambda: readouts.along_path(readouts.jacobian(), "a"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_of_readouts_are_named(name):
    with pytest.raises((TypeError, ValueError), match=rf"^({name}).*got.*; "):
        BAD[name]()


def test_integers_of_numpy_and_jax_are_taken():
    a = readouts.random_directions(KEY, np.int64(3))
    b = readouts.random_directions(KEY, jnp.int32(3))
    assert a.options[0] == b.options[0] == 3
    assert (
        readouts.logit_difference(np.int32(0), 1, position=np.int64(-1)).options[0]
        == -1
    )


@pytest.mark.parametrize(
    "fn", [lambda y: (y, y), lambda y: jnp.argmax(y), lambda y: None], ids=range(3)
)
def test_a_scalar_must_return_one_float_array(fn):
    with pytest.raises((TypeError, ValueError), match=r"^readout: .*got.*; what is"):
        traced_tap(SPLIT, X, readouts.scalar(fn))
