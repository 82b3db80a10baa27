import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat import gradient_pca, moments, moments_of
from toyfeat.types import Accumulator, Moments, Taps

DIM = 5


def stream(n=42, dim=DIM, k=2, seed=0, mean=0.3, std=1.0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    acts = mean * np.linspace(-1, 1, dim) + std * rng.normal(size=(n, dim)) @ mix
    grads = rng.normal(size=(n, k, dim)) + np.linspace(0, 1, dim)
    weights = rng.uniform(0.1, 2.0, size=n)
    return Taps(*(np.asarray(x, np.float32) for x in (acts, grads, weights)))


def oracle(taps):
    weights = np.asarray(taps.weights).astype(np.float64)
    seen = weights != 0
    weights, total = weights[seen], weights[seen].sum()
    acts = np.asarray(taps.acts).astype(np.float64)[seen]
    mean = weights @ acts / total
    scatter = (acts - mean).T @ (weights[:, None] * (acts - mean))
    if taps.grads is None:
        return Moments(total, mean, scatter)
    grads = np.asarray(taps.grads).astype(np.float64)[seen]
    return Moments(
        total,
        mean,
        scatter,
        np.einsum("n,nkd->d", weights, grads) / total / grads.shape[1],
        np.einsum("n,nkd,nke->de", weights, grads, grads) / total,
        float(grads.shape[1]),
    )


def batches(taps, size):
    n = taps.acts.shape[0]
    return [
        jax.tree.map(lambda x: jnp.asarray(x[i : i + size]), taps)  # noqa: B023
        for i in range(0, n, size)
    ]


@functools.cache
def compiled(dim, grads=True):
    return Accumulator(*(jax.jit(fn) for fn in moments(dim, grads=grads)))


def states(taps, size):
    acc = compiled(taps.acts.shape[1], taps.grads is not None)
    return [acc.update(acc.init(), batch) for batch in batches(taps, size)]


def folded(taps, size):
    acc = compiled(taps.acts.shape[1], taps.grads is not None)
    return acc.finish(functools.reduce(acc.update, batches(taps, size), acc.init()))


def assert_same(got, want, rtol=1e-6):
    for name, x, y in zip(Moments._fields, got, want, strict=True):
        assert (x is None) == (y is None), name
        if x is None:
            continue
        x, y = (np.asarray(z).astype(np.float64) for z in (x, y))
        assert x.shape == y.shape, name
        assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y), (name, x, y)


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [1, 7, 42])
@pytest.mark.parametrize("k", [1, 2])
def test_any_split_into_batches_equals_numpy(size, k):
    taps = stream(k=k)
    assert_same(folded(taps, size), oracle(taps))


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [7, 42])
def test_without_gradients_any_split_equals_numpy(size):
    taps = stream()._replace(grads=None)
    stats = folded(taps, size)
    assert stats.grad_mean is None
    assert stats.grad_second is None
    assert_same(stats._replace(readouts=1.0), oracle(taps))


def test_grads_false_ignores_the_gradients_of_a_batch():
    acc = compiled(DIM, False)
    taps = jax.tree.map(jnp.asarray, stream())
    stats = acc.finish(acc.update(acc.init(), taps))
    assert stats.grad_second is None
    assert_same(stats._replace(readouts=1.0), oracle(taps._replace(grads=None)))


def left_fold(merge, parts):
    return functools.reduce(merge, parts)


def right_fold(merge, parts):
    return functools.reduce(lambda acc, part: merge(part, acc), parts[::-1])


def tree(merge, parts):
    while len(parts) > 1:
        pairs = [merge(*parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(parts) // 2 * 2 :]
    return parts[0]


def shuffled(merge, parts):
    order = np.random.default_rng(0).permutation(len(parts))
    return left_fold(merge, [parts[i] for i in order])


@pytest.mark.slow_cases
@pytest.mark.parametrize("order", [left_fold, right_fold, tree, shuffled])
@pytest.mark.parametrize("size", [1, 7, 42])
def test_any_order_of_merges_equals_numpy(order, size):
    taps = stream()
    acc = compiled(DIM)
    merged = order(acc.merge, states(taps, size))
    assert_same(acc.finish(merged), oracle(taps))


def test_merge_is_commutative_to_rounding():
    acc = compiled(DIM)
    a, b, *_ = states(stream(), 7)
    assert_same(acc.finish(acc.merge(a, b)), acc.finish(acc.merge(b, a)), 3e-7)


def test_merge_is_associative_to_rounding():
    acc = compiled(DIM)
    a, b, c, *_ = states(stream(), 7)
    left = acc.merge(acc.merge(a, b), c)
    right = acc.merge(a, acc.merge(b, c))
    assert_same(acc.finish(left), acc.finish(right), 3e-7)


@pytest.mark.parametrize("k", [1, 2])
def test_init_is_an_identity_of_merge(k):
    acc = compiled(DIM)
    (state,) = states(stream(k=k), 42)
    alone = acc.finish(state)
    assert_same(acc.finish(acc.merge(acc.init(), state)), alone, 1e-7)
    assert_same(acc.finish(acc.merge(state, acc.init())), alone, 1e-7)


@pytest.mark.slow_cases
@pytest.mark.parametrize("n", [0, 3])
def test_a_batch_that_weighs_nothing_changes_nothing(n):
    acc = compiled(DIM)
    (state,) = states(stream(), 42)
    parts = np.ones((n, DIM)), np.ones((n, 2, DIM)), np.zeros(n)
    nothing = Taps(*(x.astype(np.float32) for x in parts))
    assert_same(acc.finish(acc.update(state, nothing)), acc.finish(state), 1e-7)
    first = acc.update(acc.init(), nothing)
    assert_same(acc.finish(acc.merge(first, state)), acc.finish(state), 1e-7)


@pytest.mark.parametrize("grads", [True, False])
def test_an_empty_stream_gives_zeros(grads):
    acc = compiled(DIM, grads)
    for state in (acc.init(), acc.merge(acc.init(), acc.init())):
        stats = acc.finish(state)
        assert stats.mean.shape == (DIM,)
        assert stats.scatter.shape == (DIM, DIM)
        assert (stats.grad_second is not None) == grads
        for leaf in jax.tree.leaves(stats._replace(readouts=0.0)):
            assert np.all(np.asarray(leaf) == 0)


@pytest.mark.parametrize("size", [1, 7, 42])
def test_an_integer_weight_is_that_many_copies(size):
    taps = stream()
    counts = np.random.default_rng(1).integers(0, 4, size=42)
    copies = jax.tree.map(lambda x: np.repeat(x, counts, axis=0), taps)
    copies = copies._replace(weights=np.ones(counts.sum(), np.float32))
    weighted = taps._replace(weights=counts.astype(np.float32))
    assert_same(folded(weighted, size), oracle(copies))


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.bfloat16])
def test_weights_may_be_counts_or_a_mask(dtype):
    mask = np.random.default_rng(1).integers(0, 2, size=42)
    taps = stream()._replace(weights=jnp.asarray(mask, dtype))
    assert_same(folded(taps, 42), oracle(taps._replace(weights=mask)))


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_factor_on_all_weights_scales_weight_and_scatter_only(factor):
    taps = stream()
    taps = taps._replace(weights=(factor * taps.weights).astype(np.float32))
    stats, plain = folded(taps, 7), folded(stream(), 7)
    assert_same(stats, oracle(taps))
    np.testing.assert_allclose(stats.mean, plain.mean, rtol=1e-5)
    np.testing.assert_allclose(stats.grad_second, plain.grad_second, rtol=1e-5)


@pytest.mark.parametrize("hidden", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("size", [1, 7, 42])
def test_what_rows_of_weight_zero_hold_does_not_matter(hidden, size):
    taps = stream()
    out = np.random.default_rng(2).random(42) < 0.4
    taps.acts[out], taps.grads[out], taps.weights[out] = hidden, hidden, 0
    assert_same(folded(taps, size), oracle(taps))


@pytest.mark.parametrize("field", ["acts", "grads"])
def test_a_nan_that_counts_stays_visible(field):
    taps = stream()
    getattr(taps, field)[3] = np.nan
    stats = folded(taps, 7)
    seen = {"acts": (1, 2), "grads": (3, 4)}[field]
    assert all(np.isnan(np.asarray(stats[i])).all() for i in seen)
    assert all(np.isfinite(np.asarray(stats[i])).all() for i in {1, 2, 3, 4} - {*seen})


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [1, 7, 42, 378])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_of_1e4_standard_deviations_costs_the_scatter_nothing(size, sign):
    rng = np.random.default_rng(3)
    acts = sign * 1e4 + rng.normal(size=(378, DIM))
    taps = stream(378)._replace(acts=acts.astype(np.float32))
    stats, want = folded(taps, size), oracle(taps)
    np.testing.assert_allclose(stats.mean, want.mean, rtol=2e-7)
    assert_same(stats, want, rtol=1e-5)


@pytest.mark.parametrize("size", [7, 378])
def test_one_column_far_off_does_not_spoil_the_others(size):
    taps = stream(378)
    taps.acts[:, 2] += 1e4
    stats, want = folded(taps, size), oracle(taps)
    others = np.ix_([0, 1, 3, 4], [0, 1, 3, 4])
    got, want = np.asarray(stats.scatter)[others], want.scatter[others]
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("place", [0, 3, 377])
def test_one_massive_row_costs_the_moments_nothing(place):
    taps = stream(378)
    taps.acts[place, 1], taps.weights[place] = 1e4, 2.5
    stats, want = folded(taps, 42), oracle(taps)
    assert_same(stats, want)
    np.testing.assert_allclose(stats.mean, want.mean, atol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [1, 7, 42, 378])
@pytest.mark.parametrize("value", [0.1, 1e4 / 3])
def test_constant_rows_have_no_scatter(value, size):
    taps = stream(378)
    taps.acts[:] = value
    level = np.float32(value) ** 2 * taps.weights.sum()
    assert np.abs(np.asarray(folded(taps, size).scatter)).max() <= 1e-13 * level


@pytest.mark.parametrize("size", [1, 7, 42])
def test_a_drifting_stream_equals_numpy(size):
    taps = stream(378)
    taps.acts[:] += 1e3 * np.linspace(-0.5, 0.5, 378, dtype=np.float32)[:, None]
    stats, want = folded(taps, size), oracle(taps)
    np.testing.assert_allclose(stats.mean, want.mean, atol=1e-4)
    assert_same(stats._replace(mean=want.mean), want)


def test_what_stands_across_a_drift_keeps_its_scatter():
    taps = stream(378, seed=4)
    taps.acts[:, 0] += 1e3 * np.linspace(-0.5, 0.5, 378, dtype=np.float32)
    got = np.asarray(folded(taps, 7).scatter)[1:, 1:]
    want = oracle(taps).scatter[1:, 1:]
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_tiny_and_huge_values_keep_their_digits(scale):
    taps = stream()
    taps = taps._replace(
        acts=(scale * taps.acts).astype(np.float32),
        grads=(scale * taps.grads).astype(np.float32),
    )
    assert_same(folded(taps, 7), oracle(taps))


SHIFTS = np.arange(8) / 8


def long_batch(rows):
    rng = np.random.default_rng(5)
    acts = 100 + np.round(rng.normal(size=(rows, 2)) * 64) / 64
    grads = np.round(rng.normal(size=(rows, 1, 2)) * 64) / 64 + 1
    return Taps(acts, grads, np.ones(rows))


def long_oracle(batch, times, multiplier):
    whole = Taps(
        np.concatenate([batch.acts + s for s in SHIFTS]),
        np.concatenate([batch.grads] * 8),
        np.concatenate([batch.weights] * 8),
    )
    want = oracle(whole)
    factor = times / 8 * multiplier
    return want._replace(weight=want.weight * factor, scatter=want.scatter * factor)


def long_run(acc, taps, updates, doublings):
    """Fold a batch many times, its activations moving, then double the state."""
    shifts = jnp.asarray(SHIFTS, jnp.float32)

    @jax.jit
    def run():
        def body(i, state):
            return acc.update(state, taps._replace(acts=taps.acts + shifts[i % 8]))

        state = jax.lax.fori_loop(0, updates, body, acc.init())
        twice = lambda _, s: acc.merge(s, s)  # noqa: E731
        return acc.finish(jax.lax.fori_loop(0, doublings, twice, state))

    return run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "updates", "doublings"),
    [(1000, 8000, 7), (8, 80_000, 11), (1, 80_000, 14)],
)
def test_a_long_stream_doubled_past_1e9_rows_keeps_every_moment(
    rows, updates, doublings
):
    batch = long_batch(rows)
    taps = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
    stats = long_run(moments(2), taps, updates, doublings)
    want = long_oracle(batch, updates, 2.0**doublings)
    assert want.weight >= 1e9
    np.testing.assert_allclose(stats.weight, want.weight, rtol=1e-6)
    assert_same(stats, want, rtol=3e-6)  # the rounding of one batch's product


@pytest.mark.parametrize(
    ("rows", "updates", "doublings"),
    [(8, 250_000, 9), pytest.param(1000, 1_000_000, 0, marks=pytest.mark.slow)],
)
def test_a_billion_unit_weights_in_many_updates(rows, updates, doublings):
    taps = jax.tree.map(
        lambda x: jnp.asarray(x[..., :1] if x.ndim > 1 else x, jnp.float32),
        long_batch(rows),
    )

    batch = jax.tree.map(lambda x: np.asarray(x, float), taps)
    want = long_oracle(batch, updates, 2.0**doublings)
    assert want.weight >= 1e9
    assert_same(long_run(moments(1), taps, updates, doublings), want)


def row_of(acts, grads):
    return Taps(*(np.asarray(x, np.float32) for x in ([acts], [[grads]], [1])))


@jax.jit
def one_row_and_then_another(doublings, num):
    """The states before and after ``num`` rows, and the moments after them."""
    acc = moments(2)
    old, new = row_of([1, -2], [1, 0]), row_of([9, 5], [0, 3])
    state = acc.update(acc.init(), old)
    twice = lambda _, s: acc.merge(s, s)  # noqa: E731
    state = jax.lax.fori_loop(0, doublings, twice, state)
    one = lambda _, s: acc.update(s, new)  # noqa: E731
    after = jax.lax.fori_loop(0, num, one, state)
    return state, after, acc.finish(after)


@pytest.mark.slow_cases
@pytest.mark.parametrize("doublings", [26, 30])
def test_single_rows_still_count_after_a_long_stream(doublings):
    num = 20_000
    before, after, stats = one_row_and_then_another(doublings, num)
    a, b = 2.0**doublings, float(num)
    step = np.array([8.0, 7.0])
    np.testing.assert_allclose(
        stats.scatter, a * b / (a + b) * np.outer(step, step), rtol=1e-5
    )
    np.testing.assert_allclose(stats.weight, a + b, rtol=2e-7)
    gained = np.asarray(after.acts.weight.high, np.float64) - float(
        before.acts.weight.high
    )
    gained += float(after.acts.weight.low) - float(before.acts.weight.low)
    np.testing.assert_allclose(gained, b, rtol=1e-3)
    mean, start = after.acts.mean, before.acts.mean
    moved = np.asarray(mean.high, np.float64) + np.asarray(mean.low, np.float64)
    moved *= float(after.acts.unit)
    moved -= np.asarray(start.high, np.float64) * float(before.acts.unit)
    np.testing.assert_allclose(moved, b / (a + b) * step, rtol=1e-3)
    np.testing.assert_allclose(
        stats.grad_second, np.diag([a, 9 * b]) / (a + b), rtol=1e-5
    )


def test_bf16_taps_are_folded_in_float32():
    taps = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), stream())
    stats = folded(taps, 7)
    assert {x.dtype for x in jax.tree.leaves(stats)} == {jnp.dtype(jnp.float32)}
    assert_same(stats, oracle(taps))


@pytest.mark.slow
def test_eager_is_jit_is_scan():
    taps = stream()
    acc = moments(DIM)
    eager = functools.reduce(acc.update, batches(taps, 7), acc.init())
    stacked = jax.tree.map(lambda x: x.reshape(6, 7, *x.shape[1:]), taps)
    scanned, _ = jax.lax.scan(
        lambda s, t: (acc.update(s, t), None),
        acc.init(),
        jax.tree.map(jnp.asarray, stacked),
    )
    assert jax.tree.structure(scanned) == jax.tree.structure(acc.init())
    assert_same(acc.finish(eager), folded(taps, 7), 3e-7)
    assert_same(acc.finish(scanned), folded(taps, 7), 3e-7)
    assert_same(jax.jit(acc.finish)(scanned), oracle(taps))


def test_a_state_keeps_its_shapes_and_dtypes():
    acc = compiled(DIM)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), acc.init())
    for state in states(stream(k=1), 7):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes


def test_vmap_is_a_loop():
    acc = compiled(DIM)
    streams = [stream(seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *streams)
    once = jax.jit(jax.vmap(lambda t: acc.finish(acc.update(acc.init(), t))))(stacked)
    for i, taps in enumerate(streams):
        assert_same(jax.tree.map(lambda x: x[i], once), oracle(taps))  # noqa: B023


def test_float64_inside_enable_x64():
    with jax.enable_x64(True):
        taps = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), stream())
        stats = folded(taps, 7)
        assert {x.dtype for x in jax.tree.leaves(stats)} == {jnp.dtype(jnp.float64)}
        assert_same(stats, oracle(taps), rtol=1e-14)


@pytest.mark.parametrize("dim", [0, -2])
def test_a_width_below_one_raises(dim):
    with pytest.raises(ValueError, match=rf"moments.*dim.*{dim}"):
        moments(dim)


@pytest.mark.parametrize(
    ("acts", "grads", "weights", "match"),
    [
        ((4, 7), (4, 1, 7), (4,), r"\b5\b.*\b7\b"),
        ((4, 5), None, (4,), "gradients"),
        ((4, 5), (4, 1, 7), (4,), r"\(4, 1, 7\)"),
        ((4, 5), (4, 5), (4,), r"\(4, 5\)"),
        ((4, 5), (3, 1, 5), (4,), r"\(3, 1, 5\)"),
        ((4, 5), (4, 1, 5), (3,), r"\(3,\)"),
        ((4, 5), (4, 1, 5), (4, 1), r"\(4, 1\)"),
        ((4, 5), (4, 1, 5), (), r"\(\)"),
        ((5,), (4, 1, 5), (4,), r"\(5,\)"),
        ((2, 2, 5), (4, 1, 5), (4,), r"\(2, 2, 5\)"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_batch_of_the_wrong_shape_raises(acts, grads, weights, match, wrap):
    acc = moments(DIM)
    taps = Taps(
        np.zeros(acts, np.float32),
        None if grads is None else np.zeros(grads, np.float32),
        np.ones(weights, np.float32),
    )
    with pytest.raises(ValueError, match=match):
        wrap(acc.update)(acc.init(), taps)


@pytest.mark.slow_cases
@pytest.mark.parametrize("grads", [True, False], ids=["grads", "no grads"])
def test_moments_of_taps_are_those_of_numpy(grads):
    taps = stream(n=7)  # as many rows as the eager batches above
    taps.weights[::5] = 0
    taps = jax.tree.map(jnp.asarray, taps)
    taps = taps if grads else taps._replace(grads=None)
    assert_same(moments_of(taps), oracle(taps))
    assert_same(moments_of({"layers_0": taps}), oracle(taps))


def test_moments_of_are_those_of_the_accumulator_and_the_same_inside_jit():
    taps = jax.tree.map(jnp.asarray, stream(n=7))
    acc = moments(DIM)
    stats = acc.finish(acc.update(acc.init(), taps))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, moments_of(taps), stats))
    assert_same(jax.jit(moments_of)(taps), oracle(taps))


def test_moments_of_several_sites_or_none_raise_and_say_what_to_do():
    taps = jax.tree.map(jnp.asarray, stream())
    with pytest.raises(ValueError, match=r"2 sites \['a', 'b'\].*taps\[site\]"):
        moments_of({"a": taps, "b": taps})
    with pytest.raises(ValueError, match=r"one site, got 0 sites \[\]"):
        moments_of({})


@pytest.mark.parametrize("taps", [None, np.zeros((3, 2)), {"a": np.zeros((3, 2))}])
def test_moments_of_something_else_raise(taps):
    with pytest.raises(TypeError, match="wanted Taps or a dict with one site, got"):
        moments_of(taps)


def test_moments_of_acts_that_are_no_matrix_raise():
    with pytest.raises(ValueError, match=r"acts \[N, D\], got shape \(5,\)"):
        moments_of(Taps(np.zeros(5, "f4"), None, np.ones(5, "f4")))


def test_a_first_call_compiles_few_programs():
    """Every program takes a time of its own, however small it is."""
    compiled_names = []

    def listen(name, _, **about):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled_names.append(about.get("fun_name"))

    # Shapes of no other test.
    taps = jax.tree.map(jnp.asarray, stream(n=23, dim=3, k=3))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        stats = moments_of(taps)
        of_moments = len(compiled_names)
        gradient_pca(stats, 2)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert 1 <= of_moments <= 4
    assert len(compiled_names) <= 10
