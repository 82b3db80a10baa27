import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.linalg import stream_svd
from toyfeat.types import Accumulator

DIM, RANK, WIDTH, ROWS, SIZE = 40, 8, 16, 2000, 250
METHODS = ["gram", "incremental", "frequent_directions"]
SKETCHES = ["incremental", "frequent_directions"]
# Frequent Directions without a centre has its own tests below.
CASES = [(method, True) for method in METHODS]
CASES += [("gram", False), ("incremental", False)]
J = np.arange(DIM)

SPECTRA = {
    "flat": np.ones(DIM),
    "power_half": (J + 1) ** -0.5,
    "power_one": (J + 1) ** -1.0,
    "geometric_slow": 0.9**J,
    "geometric_3_percent": 0.0301 ** (J / (RANK - 1)),
    "step": np.where(J < RANK, 1.0, 1e-3),
    "pairs": 0.7 ** (J // 2),
}


def compiled(dim=DIM, rank=RANK, method="gram", center=False, width=None):
    """An accumulator with jitted functions: one for the same settings."""
    if width is None:
        width = min(dim, max(2 * rank, rank + 8))
    finish = _compiled(dim, rank, method, center, width).finish
    # Only the end depends on the rank: all ranks share the programs of the rest.
    least = _compiled(dim, 1, method, center, width)
    return least._replace(finish=finish)


@functools.cache
def _compiled(dim, rank, method, center, width):
    acc = stream_svd(dim, rank, method=method, center=center, width=width)
    return Accumulator(acc.init, *map(jax.jit, (acc.update, acc.merge, acc.finish)))


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


def with_spectrum(values, rows=ROWS, seed=0, dim=None):
    rng = np.random.default_rng(seed)
    left = orthonormal(rng, rows, len(values))
    right = orthonormal(rng, dim or len(values), len(values))
    return ((left * values) @ right.T).astype(np.float32)


def pieces(rows, sizes):
    if isinstance(sizes, int):
        return [rows[i : i + sizes] for i in range(0, len(rows), sizes)]
    return np.split(rows, np.cumsum(sizes)[:-1])


def fold(acc, rows, sizes=SIZE, state=None):
    state = acc.init() if state is None else state
    for batch in pieces(rows, sizes):
        state = acc.update(state, jnp.asarray(batch))
    return state


def svd_of(acc, rows, sizes=SIZE):
    return acc.finish(fold(acc, rows, sizes))


def oracle(rows, center=False):
    rows = np.asarray(rows, np.float64)
    rows = rows - rows.mean(axis=0) if center else rows
    _, s, vt = np.linalg.svd(rows, full_matrices=False)
    lead = np.take_along_axis(vt, np.abs(vt).argmax(axis=1)[:, None], axis=1)
    return rows, s, vt * np.sign(lead)


def f64(x):
    return np.asarray(x, np.float64)


def check_values(got, rows, center=False, tol=1e-6):
    _, s, _ = oracle(rows, center)
    np.testing.assert_allclose(f64(got.s), s[: len(got.s)], rtol=0, atol=tol * s[0])


def check_shape_of_answer(got, tol=1e-5):
    vt = f64(got.vt)
    lead = np.take_along_axis(vt, np.abs(vt).argmax(axis=1)[:, None], axis=1)
    assert got.u is None
    assert bool(got.info.finite)
    np.testing.assert_allclose(vt @ vt.T, np.eye(len(vt)), rtol=0, atol=tol)
    assert np.all(lead > 0)
    assert np.all(f64(got.s) >= 0)
    assert np.all(np.diff(f64(got.s)) <= 0)


def left_over(got, rows, center=False):
    """Residual of the projection on vt, and the least any R vectors leave."""
    rows, s, _ = oracle(rows, center)
    vt = f64(got.vt)
    best = np.linalg.norm(s[len(vt) :])
    return np.linalg.norm(rows - rows @ vt.T @ vt), best


def assert_same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_same_type(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


# --- gram ----------------------------------------------------------------------


@pytest.mark.slow_cases
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_gram_values_are_those_of_the_rows_in_memory(name, center):
    rows = with_spectrum(SPECTRA[name]) + np.float32(0.01 * center)
    got = svd_of(compiled(center=center), rows)
    check_values(got, rows, center)
    check_shape_of_answer(got)


@pytest.mark.parametrize("center", [False, True])
def test_gram_vectors_are_those_of_the_rows_in_memory(center):
    rows = with_spectrum(SPECTRA["geometric_3_percent"])
    got = svd_of(compiled(center=center), rows)
    _, _, vt = oracle(rows, center)
    np.testing.assert_allclose(f64(got.vt), vt[:RANK], rtol=0, atol=1e-4)
    residual, best = left_over(got, rows, center)
    assert residual <= best * (1 + 1e-6)
    np.testing.assert_allclose(float(got.info.residual), residual, rtol=0.1)


UNEVEN = (1, 1000, 250, 1, 250, 1, 1, 250)
CUTS = {"whole": (ROWS,), "1000": (1000, 1000), "uneven": UNEVEN}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", CUTS)
def test_gram_takes_batches_of_any_size(name):
    sizes = CUTS[name]
    rows = with_spectrum(SPECTRA["geometric_3_percent"], sum(sizes)) + np.float32(0.02)
    check_values(svd_of(compiled(center=True), rows, sizes), rows, True)


def test_gram_takes_rows_one_by_one():
    rows = with_spectrum(SPECTRA["power_one"], rows=120) + np.float32(0.02)
    check_values(svd_of(compiled(center=True), rows, 1), rows, True)


def tree(acc, states):
    while len(states) > 1:
        pairs = zip(states[::2], states[1::2], strict=True)
        states = [acc.merge(x, y) for x, y in pairs]
    return states[0]


MERGES = {
    "tree": tree,
    "left": lambda acc, states: functools.reduce(acc.merge, states),
    "reversed": lambda acc, states: functools.reduce(acc.merge, states[::-1]),
    "right": lambda acc, states: functools.reduce(
        lambda x, y: acc.merge(y, x), states[::-1]
    ),
}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("order", MERGES)
def test_gram_merges_in_any_order(order, center):
    rows = with_spectrum(SPECTRA["geometric_3_percent"]) + np.float32(0.02)
    rows[:SIZE] += np.float32(0.05)
    acc = compiled(center=center)
    states = [fold(acc, part) for part in pieces(rows, SIZE)]
    # A Gram matrix knows a value at a share r of the first to u / (2 r) of the first,
    # 5e-6 for the least of these (r = .006); processors differ within that.
    check_values(acc.finish(MERGES[order](acc, states)), rows, center, tol=2e-6)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_merge_with_an_empty_state_changes_nothing(method):
    acc = compiled(method=method, center=True)
    rows = with_spectrum(SPECTRA["power_one"]) + np.float32(1.0)
    state = fold(acc, rows)
    want = acc.finish(state)
    for pair in [(state, acc.init()), (acc.init(), state)]:
        got = acc.finish(acc.merge(*pair))
        np.testing.assert_allclose(got.s, want.s, rtol=0, atol=1e-6 * want.s[0])
        np.testing.assert_allclose(got.vt, want.vt, rtol=0, atol=1e-4)
    empty = acc.finish(acc.merge(acc.init(), acc.init()))
    np.testing.assert_array_equal(empty.s, 0)


def far_rows(mean, seed=0, kind="power_one"):
    rng = np.random.default_rng(seed)
    rows = with_spectrum(SPECTRA[kind], seed=seed)
    spread = np.sqrt(np.mean(np.square(rows, dtype=np.float64)))
    where = mean * np.sign(rng.normal(size=DIM))
    return (rows / spread + where).astype(np.float32)


@pytest.mark.parametrize("kind", ["power_one", "geometric_3_percent"])
def test_gram_centres_rows_far_from_the_origin(kind):
    rows = far_rows(1e4, kind=kind)
    acc = compiled(center=True)
    check_values(svd_of(acc, rows), rows, True)
    states = [fold(acc, part) for part in pieces(rows, SIZE)]
    check_values(acc.finish(tree(acc, states)), rows, True)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_at_first_does_not_spoil_the_centre(method):
    rows = far_rows(1e4)
    acc = compiled(method=method, center=True)
    state = acc.update(acc.init(), np.zeros((0, DIM), np.float32))
    got = acc.finish(fold(acc, rows, state=state))
    tol = 1e-6 if method == "gram" else 1e-3
    check_values(got, rows, True, tol)


@pytest.mark.parametrize("method", SKETCHES)
def test_sketches_centre_rows_far_from_the_origin(method):
    rows = far_rows(1e4)
    got = svd_of(compiled(method=method, center=True), rows)
    residual, best = left_over(got, rows, True)
    assert residual <= best * (1 + 1e-4)
    check_values(got, rows, True, 1e-3)


@pytest.mark.slow_cases
@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize(("method", "center"), CASES)
def test_scale_of_rows_is_scale_of_values(method, scale, center):
    rows = far_rows(1.0) * np.float32(scale)
    got = svd_of(compiled(method=method, center=center), rows)
    check_shape_of_answer(got)
    check_values(got, rows, center, 1e-6 if method == "gram" else 1e-3)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("method", "center"), [("gram", False), *((method, True) for method in METHODS)]
)
def test_counts_are_right_past_2_to_the_24_rows(method, center):
    doublings, rank = 21, 4
    rows = with_spectrum([1.0, 0.7, 0.4, 0.2], rows=SIZE, dim=DIM) + np.float32(0.01)
    acc = compiled(method=method, center=center)
    state = fold(acc, rows)
    for _ in range(doublings):
        state = acc.merge(state, state)
    got = f64(acc.finish(state).s)[:rank]
    copies = 2.0**doublings
    assert copies * SIZE > 16 * 2**24
    _, s, _ = oracle(rows, center)
    np.testing.assert_allclose(got, s[:rank] * np.sqrt(copies), rtol=1e-5)
    variance = got**2 / (copies * SIZE)
    np.testing.assert_allclose(variance, s[:rank] ** 2 / SIZE, rtol=2e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_two_long_streams_of_other_means_are_merged(method):
    doublings, rank = 18, 5
    parts = [
        with_spectrum([1.0, 0.7, 0.4, 0.2], rows=SIZE, dim=DIM) + np.float32(shift)
        for shift in (-0.02, 0.07)
    ]
    acc = compiled(method=method, center=True)
    states = [fold(acc, part) for part in parts]
    for _ in range(doublings):
        states = [acc.merge(state, state) for state in states]
    states[1] = acc.merge(states[1], states[1])
    rows = np.concatenate([parts[0], parts[1], parts[1]])
    got = f64(acc.finish(acc.merge(*states)).s)[:rank]
    _, s, _ = oracle(rows, True)
    assert 2**doublings * SIZE > 2**24
    want = s[:rank] * np.sqrt(2.0**doublings)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * want[0])


@pytest.mark.parametrize(("dim", "want"), [(4096, "gram"), (4097, "incremental")])
def test_auto_is_gram_up_to_4096_columns(dim, want):
    acc = stream_svd(dim, 2, width=8)
    other = stream_svd(dim, 2, width=8, method=want)
    one, two = jax.eval_shape(acc.init), jax.eval_shape(other.init)
    assert_same_type(one, two)


def test_gram_says_that_values_overflow():
    rows = np.full_like(far_rows(1.0), 3e37)
    got = svd_of(compiled(), rows)
    assert not bool(got.info.finite)
    assert np.all(np.isnan(got.s))
    assert np.all(np.isnan(got.vt))


# --- incremental ---------------------------------------------------------------


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("sizes", "center"), [(50, False), (250, False), (1000, False), (250, True)]
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["power_half", "power_one", "geometric_slow"])
def test_incremental_is_near_the_best_on_rows_in_random_order(
    name, seed, sizes, center
):
    rows = with_spectrum(SPECTRA[name], seed=seed) + np.float32(0.01 * center)
    acc = compiled(method="incremental", width=2 * RANK, center=center)
    got = svd_of(acc, rows, sizes)
    residual, best = left_over(got, rows, center)
    assert residual <= best * (1 + 1e-4)
    check_shape_of_answer(got)
    np.testing.assert_allclose(float(got.info.residual), residual, rtol=0.1)


def test_incremental_is_near_the_best_when_parts_are_merged():
    rows = with_spectrum(SPECTRA["power_one"])
    acc = compiled(method="incremental", width=2 * RANK, center=True)
    states = [fold(acc, part) for part in pieces(rows, SIZE)]
    for merge in MERGES.values():
        got = acc.finish(merge(acc, states))
        residual, best = left_over(got, rows, True)
        assert residual <= best * (1 + 1e-4)
        np.testing.assert_allclose(float(got.info.residual), residual, rtol=0.1)


@pytest.mark.parametrize(("method", "center"), CASES[1:3] + CASES[4:])
def test_sketch_of_rank_deficient_rows_is_exact(method, center):
    values = [3.0, 2.0, 1.0]
    rows = with_spectrum(values, dim=DIM)
    got = svd_of(compiled(method=method, center=center), rows)
    _, s, _ = oracle(rows, center)
    np.testing.assert_allclose(f64(got.s)[:3], s[:3], rtol=1e-5)
    assert np.all(f64(got.s)[3:] <= 1e-5 * s[0])
    check_shape_of_answer(got)


@pytest.mark.parametrize("method", METHODS)
def test_fast_decay_is_finite(method):
    rows = with_spectrum(0.1**J)
    got = svd_of(compiled(method=method, center=True), rows)
    check_shape_of_answer(got)
    check_values(got, rows, True, tol=1e-5 if method == "incremental" else 4e-4)
    np.testing.assert_allclose(f64(got.s)[:3], oracle(rows, True)[1][:3], rtol=2e-3)


# --- frequent directions -------------------------------------------------------

L = 16


def sorted_by_norm(rows, sign):
    return rows[np.argsort(sign * np.linalg.norm(rows, axis=1))]


def skewed(seed=0):
    rng = np.random.default_rng(seed)
    rows = with_spectrum(SPECTRA["power_half"], rows=1000, seed=seed)
    return (rows * rng.lognormal(size=(1000, 1))).astype(np.float32)


def one_direction_after_the_other(values, each=25, seed=0):
    rng = np.random.default_rng(seed)
    right = orthonormal(rng, DIM, DIM).T
    weights = rng.normal(size=(DIM, each, 1))
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    rows = values[:, None, None] * weights * right[:, None, :]
    return rows.reshape(-1, DIM).astype(np.float32)


def small_ones_after_large_ones():
    """Rows that fill the sketch, then many small ones of a new direction."""
    rows = np.zeros((5000, DIM), np.float32)
    rows[np.arange(L), np.arange(L)] = 1.0
    rows[L:, L] = 0.04
    return rows


ORDERS = {
    "random": lambda: with_spectrum(SPECTRA["power_half"], rows=1000),
    "flat": lambda: with_spectrum(SPECTRA["flat"], rows=1000),
    "steep": lambda: with_spectrum(0.5**J, rows=1000),
    "ascending": lambda: sorted_by_norm(skewed(), 1),
    "descending": lambda: sorted_by_norm(skewed(), -1),
    "directions_down": lambda: one_direction_after_the_other(0.95**J),
    "directions_up": lambda: one_direction_after_the_other(0.95 ** J[::-1]),
    "directions_flat": lambda: one_direction_after_the_other(np.ones(DIM)),
    "repeated": lambda: np.tile(with_spectrum(SPECTRA["power_half"], 50), (20, 1)),
    "small_after_large": small_ones_after_large_ones,
}


def covariance_error(got, rows):
    rows, vt = f64(rows), f64(got.vt)
    kept = (vt.T * f64(got.s) ** 2) @ vt
    return np.linalg.norm(rows.T @ rows - kept, 2)


def bound_of(rows, width):
    """The least over k of |A - A_k|_F^2 / (l - k), and the rounding allowed."""
    _, s, _ = oracle(rows)
    k = np.arange(width)
    tails = np.cumsum((s**2)[::-1])[::-1][:width]
    return np.min(tails / (width - k)), 2e-6 * s[0] ** 2


@pytest.mark.slow_cases
@pytest.mark.parametrize("sizes", [10, 250])
@pytest.mark.parametrize("order", ORDERS)
def test_frequent_directions_holds_its_bound_in_any_order(order, sizes):
    rows = ORDERS[order]()
    acc = compiled(rank=L, width=L, method="frequent_directions")
    got = svd_of(acc, rows, sizes)
    bound, rounding = bound_of(rows, L)
    assert covariance_error(got, rows) <= bound + rounding
    check_shape_of_answer(got)


@pytest.mark.slow_cases
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_frequent_directions_holds_its_bound_when_merged(order, parts):
    rows = ORDERS[order]()
    acc = compiled(rank=L, width=L, method="frequent_directions")
    states = [fold(acc, part, 10) for part in pieces(rows, len(rows) // parts)]
    got = acc.finish(functools.reduce(acc.merge, states))
    bound, rounding = bound_of(rows, L)
    assert covariance_error(got, rows) <= bound + rounding


def test_a_spiteful_order_defeats_incremental_but_not_frequent_directions():
    rows = small_ones_after_large_ones()
    bound, _ = bound_of(rows, L)
    error = {
        method: covariance_error(
            svd_of(compiled(rank=L, width=L, method=method), rows, 250), rows
        )
        for method in SKETCHES
    }
    assert error["frequent_directions"] <= bound * (1 + 1e-5)
    assert error["incremental"] > 5 * bound


# --- what holds for all methods ------------------------------------------------


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_jit_does_as_eager_does(method):
    rows = with_spectrum(SPECTRA["geometric_3_percent"])[:SIZE]
    eager = stream_svd(DIM, RANK, method=method, center=True)
    want = svd_of(eager, rows)
    got = svd_of(compiled(method=method, center=True), rows)
    np.testing.assert_allclose(got.s, want.s, rtol=0, atol=2e-6 * want.s[0])
    np.testing.assert_allclose(got.vt, want.vt, rtol=0, atol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_scan_carries_the_state(method):
    rows = with_spectrum(SPECTRA["geometric_3_percent"])
    acc = compiled(method=method, center=True)

    @jax.jit
    def scanned(batches):
        step = lambda state, batch: (acc.update(state, batch), None)  # noqa: E731
        return jax.lax.scan(step, acc.init(), batches)[0]

    state = scanned(jnp.asarray(rows.reshape(-1, SIZE, DIM)))
    assert_same_type(state, acc.init())
    assert_same_type(acc.merge(state, state), acc.init())
    got, want = acc.finish(state), svd_of(acc, rows)
    np.testing.assert_allclose(got.s, want.s, rtol=0, atol=2e-6 * want.s[0])
    np.testing.assert_allclose(got.vt, want.vt, rtol=0, atol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_vmap_over_streams_does_as_a_loop_does(method):
    acc = compiled(method=method, center=True)
    spectrum = SPECTRA["geometric_3_percent"]
    rows = np.stack([with_spectrum(spectrum, SIZE, seed) for seed in range(3)])

    @jax.jit
    @jax.vmap
    def both(batch):
        return acc.finish(acc.update(acc.init(), batch))

    many = both(jnp.asarray(rows))
    for i, batch in enumerate(rows):
        want = svd_of(acc, batch)
        np.testing.assert_allclose(many.s[i], want.s, rtol=0, atol=2e-6 * want.s[0])
        np.testing.assert_allclose(many.vt[i], want.vt, rtol=0, atol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_fewer_rows_than_rank(method):
    rows = with_spectrum([2.0, 1.0, 0.5], rows=10, dim=DIM)[:5] + np.float32(0.1)
    got = svd_of(compiled(method=method, center=True), rows, 1)
    _, s, _ = oracle(rows, True)
    want = np.pad(s, (0, RANK - len(s)))
    tol = 1e-3 if method == "gram" else 1e-5
    np.testing.assert_allclose(f64(got.s), want, rtol=0, atol=tol * s[0])
    np.testing.assert_allclose(f64(got.s)[:2], s[:2], rtol=1e-5)
    check_shape_of_answer(got)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_one_row_has_no_variance(method):
    row = np.linspace(-1, 2, DIM, dtype=np.float32)[None]
    got = svd_of(compiled(method=method, center=True), row)
    np.testing.assert_allclose(got.s, 0, atol=1e-6 * np.linalg.norm(row))
    check_shape_of_answer(got)


@pytest.mark.parametrize(("method", "center"), CASES)
def test_an_empty_stream_gives_zeros(method, center):
    acc = compiled(method=method, center=center)
    got = acc.finish(acc.init())
    np.testing.assert_array_equal(got.s, np.zeros(RANK))
    assert got.s.dtype == got.vt.dtype == jnp.float32
    assert got.vt.shape == (RANK, DIM)
    assert float(got.info.residual) == 0
    check_shape_of_answer(got)


@pytest.mark.parametrize(("method", "center"), CASES)
def test_an_empty_batch_leaves_the_state(method, center):
    acc = compiled(method=method, center=center)
    state = fold(acc, with_spectrum(SPECTRA["power_one"], SIZE))
    assert_same(acc.update(state, np.zeros((0, DIM), np.float32)), state)
    assert_same(acc.update(acc.init(), np.zeros((0, DIM), np.float32)), acc.init())


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_zeros_give_zeros(method):
    got = svd_of(compiled(method=method, center=True), np.zeros((SIZE, DIM), "f4"))
    np.testing.assert_array_equal(got.s, 0)
    check_shape_of_answer(got)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_the_same_rows_give_the_same_bits(method):
    rows = with_spectrum(SPECTRA["power_half"])
    one, two = (svd_of(compiled(method=method, center=True), rows) for _ in range(2))
    assert_same(one, two)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_info_names_the_method(method):
    got = svd_of(
        compiled(method=method, center=True), with_spectrum(SPECTRA["power_one"])
    )
    assert got.info.method == method
    assert got.info.passes == 1
    assert got.info.width == (DIM if method == "gram" else WIDTH)
    vt = f64(got.vt)
    error = np.abs(vt @ vt.T - np.eye(RANK)).max()
    assert error / 4 - 1e-6 <= float(got.info.orthogonality) <= 4 * error + 1e-6


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", METHODS)
def test_float64_stays_float64(method):
    with jax.enable_x64(True):
        acc = stream_svd(DIM, RANK, method=method, center=True)
        acc = acc._replace(update=jax.jit(acc.update), finish=jax.jit(acc.finish))
        values = SPECTRA["geometric_3_percent"][:RANK]
        rng = np.random.default_rng(0)
        right = orthonormal(rng, DIM, RANK)
        rows = 5 + orthonormal(rng, 2 * SIZE, RANK) * values @ right.T
        got = svd_of(acc, rows)
        assert got.s.dtype == got.vt.dtype == jnp.float64
        _, s, vt = oracle(rows, True)
        np.testing.assert_allclose(got.s, s[:RANK], rtol=1e-7)
        np.testing.assert_allclose(got.vt, vt[:RANK], rtol=0, atol=1e-6)
        check_shape_of_answer(got, 1e-12)


# --- the cases of scikit-learn's IncrementalPCA ----------------------------------
#
# Its attributes are: components_ = vt, singular_values_ = s, explained_variance_ =
# s**2 / (n - 1), transform(x) = (x - mean) @ vt.T.

PCA = ["gram", "incremental"]


def pca(dim, method):
    """All components of 3 or 20 columns, the first 8 of 40."""
    rank = RANK if dim == DIM else dim
    return compiled(dim=dim, rank=rank, method=method, center=True)


def normal(shape, seed=1999):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def flattened(rows=50):
    """A middle column without spread, and a large mean."""
    rows = normal((rows, 3)) * np.array([1, 1e-5, 1], np.float32)
    return rows + np.array([5, 4, 3], np.float32)


def low_rank(rows, dim, effective_rank):
    j = np.arange(min(rows, dim))
    return with_spectrum(np.exp(-((j / effective_rank) ** 2)), rows, dim=dim)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", PCA)
def test_pca_ratio_of_explained_variance(method):
    centres = normal((3, 3)) * np.float32(3)
    x = normal((150, 3), 1) + np.repeat(centres, 50, axis=0)
    got = svd_of(pca(3, method), x, 50)
    rows, s, _ = oracle(x, True)
    ratio = f64(got.s) ** 2 / np.sum(rows**2)
    np.testing.assert_allclose(ratio, s**2 / np.sum(s**2), rtol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", PCA)
def test_pca_projects_on_the_direction_between_two_clusters(method):
    x = normal((100, 3)) * np.float32(0.1)
    x[:10] += np.array([3, 4, 5], np.float32)
    new = np.array([3, 4, 5]) + 0.1 * normal((1, 3), 7)
    got = svd_of(pca(3, method), x, 10)
    y = (new - x.mean(0)) @ f64(got.vt[:2]).T
    np.testing.assert_allclose(np.abs(y[0, 0]) / np.linalg.norm(y), 1.0, atol=0.05)


@pytest.mark.parametrize("method", PCA)
def test_pca_is_inverted_on_rows_in_a_plane(method):
    x = flattened()
    vt = f64(svd_of(pca(3, method), x, 10).vt)[:2]
    mean = x.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose((x - mean) @ vt.T @ vt + mean, x, rtol=0, atol=1e-3)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", PCA)
def test_pca_of_as_many_rows_as_components(method):
    x = normal((20, 20))
    got = svd_of(pca(20, method), x, 20)
    check_values(got, x, True, 1e-3)
    check_shape_of_answer(got)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", PCA)
def test_pca_refuses_a_change_of_features(method):
    acc = pca(20, method)
    state = acc.update(acc.init(), normal((20, 20)))
    with pytest.raises(ValueError, match=r"wanted rows \[n, 20\], got .*50"):
        acc.update(state, normal((20, 50)))


@pytest.mark.slow_cases
@pytest.mark.parametrize("size", [1, 10, 50])
@pytest.mark.parametrize("method", PCA)
def test_pca_components_hold_signs_and_values_over_batch_sizes(method, size):
    x = normal((100, 3))
    _, _, want = oracle(x, True)
    vt = f64(svd_of(pca(3, method), x, size).vt)
    np.testing.assert_array_equal(np.sign(vt), np.sign(want))
    np.testing.assert_allclose(vt, want, rtol=0, atol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", PCA)
def test_pca_components_of_full_rank_are_those_in_memory(method):
    x = normal((100, 20))
    _, s, want = oracle(x, True)
    got = svd_of(pca(20, method), x, 20)
    np.testing.assert_allclose(f64(got.s), s, rtol=1e-4)
    np.testing.assert_allclose(f64(got.vt), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", PCA)
def test_pca_in_parts_is_pca_at_once(method):
    x, acc = flattened(), pca(3, method)
    whole, parts = svd_of(acc, x, 50), svd_of(acc, x, 10)
    np.testing.assert_allclose(whole.vt, parts.vt, rtol=0, atol=1e-4)
    np.testing.assert_allclose(whole.s[:2], parts.s[:2], rtol=1e-5)


SMALL_LATER = [(50, *(1,) * 50), (50, 10), (10, 50), (1, 10)]


@pytest.mark.slow_cases
@pytest.mark.parametrize("sizes", SMALL_LATER, ids=["ones", "50-10", "10-50", "1-10"])
@pytest.mark.parametrize("method", PCA)
def test_pca_takes_a_second_batch_of_another_size_and_mean(method, sizes):
    x = normal((sum(sizes), 3)) + 5 * np.linspace(0, 1, 3, dtype=np.float32)
    x[: sizes[0]] += np.float32(3)
    got = svd_of(pca(3, method), x, sizes)
    _, s, vt = oracle(x, True)
    np.testing.assert_allclose(f64(got.s), s, rtol=1e-5)
    np.testing.assert_allclose(f64(got.vt), vt, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", PCA)
def test_pca_scores_are_those_of_pca_on_random_data(method):
    x = normal((100, 3)) + 5 * np.array([0.3, 0.9, 0.1], np.float32)
    got = svd_of(pca(3, method), x, 50)
    rows, _, vt = oracle(x, True)
    np.testing.assert_allclose(rows @ f64(got.vt).T, rows @ vt.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", PCA)
def test_pca_explains_the_variance_that_pca_explains(method):
    x = low_rank(1000, DIM, 10)
    got = svd_of(pca(DIM, method), x)
    rows, s, _ = oracle(x, True)
    variance = s**2 / (len(x) - 1)
    mine = f64(got.s) ** 2 / (len(x) - 1)
    np.testing.assert_allclose(mine, variance[:RANK], rtol=0, atol=1e-3 * variance[0])
    noise = float(got.info.residual) ** 2 / (len(x) - 1)
    np.testing.assert_allclose(noise, variance[RANK:].sum(), rtol=1e-2)
    scores = np.linalg.norm(rows @ f64(got.vt).T, axis=0)
    np.testing.assert_allclose(scores, f64(got.s), rtol=0, atol=1e-3 * s[0])


@pytest.mark.parametrize("method", PCA)
def test_pca_gives_back_values_that_were_set(method):
    rng = np.random.default_rng(0)
    values = np.array([3.142, 2.718, 1.0])
    left = rng.normal(size=(30, 3))
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    x = (left * values @ orthonormal(rng, DIM, 3).T).astype(np.float32)
    got = svd_of(pca(DIM, method), x, 1)
    np.testing.assert_allclose(f64(got.s)[:3], values, rtol=2e-6)


@pytest.mark.parametrize("method", PCA)
def test_pca_whitens(method):
    x = low_rank(1000, 20, 2)
    got = svd_of(pca(20, method), x, 20)
    rows, s, vt = oracle(x, True)
    stable = np.sum(s > 1e-2 * s[0])
    n = np.sqrt(len(x) - 1)
    mine = n * rows @ f64(got.vt).T[:, :stable] / f64(got.s)[:stable]
    want = n * rows @ vt.T[:, :stable] / s[:stable]
    np.testing.assert_allclose(mine, want, rtol=0, atol=1e-3)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", PCA)
def test_pca_of_many_rows(method):
    x = np.random.default_rng(0).random((20_000, 3), dtype=np.float32)
    got = svd_of(pca(3, method), x, 50)
    want = np.sqrt(np.linalg.eigvalsh(len(x) * np.cov(x.T, bias=True))[::-1])
    tol = 1e-6 if method == "gram" else 1e-4
    np.testing.assert_allclose(f64(got.s), want, rtol=tol)


# --- errors --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, r"rank must be an int in 1 \.\. 40.*got 0"),
        ({"rank": -1}, r"rank must be an int in 1 \.\. 40.*got -1"),
        ({"rank": 41}, r"rank must be an int in 1 \.\. 40.*got 41"),
        ({"dim": 0}, r"stream_svd: .* got"),
        ({"method": "svd"}, "method must be one of .*gram.*got 'svd'"),
        ({"width": 7}, r"width must be an int in 8 \.\. 40, got 7"),
        ({"width": 41}, r"width must be an int in 8 \.\. 40, got 41"),
    ],
)
def test_bad_settings_raise(settings, match):
    arguments = {"dim": DIM, "rank": RANK, "method": "incremental"} | settings
    with pytest.raises(ValueError, match=match):
        stream_svd(**arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(DIM,), (3, DIM - 1), (2, 3, DIM), ()])
def test_rows_of_a_wrong_shape_raise(shape, method):
    acc = stream_svd(DIM, RANK, method=method)
    with pytest.raises(ValueError, match=r"wanted rows \[n, 40\], got shape \("):
        acc.update(acc.init(), np.zeros(shape, np.float32))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_rows_that_are_not_real_and_floating_raise(dtype, method):
    acc = stream_svd(DIM, RANK, method=method)
    with pytest.raises(TypeError, match=f"must be (real|floating-point), got {dtype}"):
        acc.update(acc.init(), np.zeros((3, DIM), dtype))


@pytest.mark.slow_cases
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_that_is_not_finite_raises_outside_of_a_trace(method, bad):
    rows = with_spectrum(SPECTRA["power_one"])
    rows[SIZE + 3, 5] = bad
    state = fold(compiled(method=method, center=True), rows)
    with pytest.raises(ValueError, match="rows must be finite"):
        stream_svd(DIM, RANK, method=method, center=True).finish(state)
    got = compiled(method=method, center=True).finish(state)
    assert not bool(got.info.finite)
    assert np.all(np.isnan(got.s))
    assert np.all(np.isnan(got.vt))


@pytest.mark.parametrize("sizes", [{"rank": 2.5}, {"rank": 2, "width": 8.0}])
def test_sizes_must_be_whole_numbers(sizes):
    with pytest.raises(TypeError, match="must be an int in "):
        stream_svd(16, **sizes)


def test_the_moments_of_plain_rows_have_derivatives():
    from toyfeat.linalg.compensated import unweighted_moments

    rows = normal((5000, 3))
    weight = np.arange(9, dtype=np.float32).reshape(3, 3)

    @jax.jit
    def moment(x):
        moments = unweighted_moments(x)
        return jnp.sum(weight * moments.scatter.high) * moments.unit**2

    got = np.asarray(jax.grad(moment)(rows))
    centred = np.asarray(rows, np.float64) - np.asarray(rows, np.float64).mean(0)
    want = centred @ np.asarray(weight + weight.T, np.float64)
    np.testing.assert_allclose(got, want, atol=2e-3)
