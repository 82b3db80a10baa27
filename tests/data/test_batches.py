"""Batches: each row once per epoch, a function of the step, uniform orders."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from toyfeat.data.batches import array_batches, store_batches
from toyfeat.data.permutation import epoch_words, permute_index
from toyfeat.data.store import open_store
from toyfeat.data.writing import store_writer
from toyfeat.types import Taps


def numbered(rows, readouts=1):
    """Return rows whose entries all encode the index of the row."""
    ids = np.arange(rows, dtype=np.float32)
    acts = ids[:, None] + np.array([0, 0.25], np.float32)
    grads = None if readouts is None else -np.stack([acts] * readouts, axis=1)
    return Taps(acts, grads, ids + 1)


def write_store(path, rows, per_shard, readouts=1, dtype="float32"):
    settings = {"readouts": readouts, "dtype": dtype, "rows_per_shard": per_shard}
    with store_writer(path, dim=2, **settings) as writer:
        writer.append(numbered(rows, readouts))
    return open_store(path)


def row_ids(taps):
    """Return the row indices of a batch and check that all its fields agree."""
    ids = np.asarray(taps.weights).astype(int) - 1
    wanted = jax.tree.map(lambda x: x[ids], numbered(max(ids) + 1))
    np.testing.assert_array_equal(taps.acts, wanted.acts)
    if taps.grads is not None:
        np.testing.assert_array_equal(taps.grads[:, 0], wanted.grads[:, 0])
    return ids.tolist()


def store_and_array_batches(path, rows, batch, seed=0):
    yield store_batches(write_store(path, rows, 10), batch=batch, seed=seed, window=3)
    yield jitted(array_batches(numbered(rows), batch=batch, seed=seed))


call = jax.jit(lambda batches, step: batches(step))


def jitted(batches):
    return lambda step: call(batches, np.uint32(step))


@pytest.mark.slow_cases
@pytest.mark.parametrize(("rows", "batch"), [(103, 10), (60, 60), (7, 3), (101, 1)])
def test_each_row_comes_once_an_epoch(rows, batch, tmp_path):
    for batches in store_and_array_batches(tmp_path, rows, batch):
        served = Counter()
        for step in range(rows):  # batch epochs
            ids = row_ids(batches(step))
            assert len(ids) == batch
            served.update(ids)
            # Whole epochs are served, and no row of the next epoch comes twice.
            epochs = (step + 1) * batch // rows
            assert {served[i] for i in range(rows)} <= {epochs, epochs + 1}
            if step > 3 * rows // batch:
                break
        else:
            assert set(served.values()) == {batch}


def test_is_a_function_of_the_step_and_the_seed(tmp_path):
    first, second = (
        [*store_and_array_batches(tmp_path / name, 103, 20)] for name in "ab"
    )
    other = [*store_and_array_batches(tmp_path / "c", 103, 20, seed=1)]
    for f, g, h in zip(first, second, other, strict=True):
        forward = [row_ids(f(step)) for step in range(12)]
        assert [row_ids(g(step)) for step in reversed(range(12))] == forward[::-1]
        assert row_ids(h(0)) != forward[0]
        assert len({tuple(sorted(ids)) for ids in forward}) == 12


@pytest.mark.parametrize("readouts", [None, 2])
def test_dtype_and_shapes_are_those_of_the_store(readouts, tmp_path):
    store = write_store(tmp_path, 50, 10, readouts, "bfloat16")
    taps = store_batches(store, batch=8, seed=0)(2)
    assert taps.acts.dtype == jnp.bfloat16
    assert taps.weights.dtype == jnp.float32
    assert taps.acts.shape == (8, 2)
    assert (taps.grads is None) == (readouts is None)
    ids = np.asarray(taps.weights).astype(int) - 1
    wanted = numbered(50).acts[ids].astype(jnp.bfloat16)
    np.testing.assert_array_equal(taps.acts, wanted)
    if readouts:
        assert taps.grads.shape == (8, 2, 2)


def test_a_window_mixes_its_shards_and_epochs_pair_other_shards(tmp_path):
    batches = store_batches(write_store(tmp_path, 800, 50), batch=100, seed=3, window=2)
    together = set()
    for epoch in range(6):
        shards = [
            Counter(i // 50 for i in row_ids(batches(8 * epoch + s))) for s in range(8)
        ]
        assert all(set(count.values()) == {50} for count in shards)
        together |= {tuple(sorted(count)) for count in shards}
    assert len(together) > 35  # of 48 windows; 120 pairs are possible
    small = store_batches(write_store(tmp_path, 800, 50), batch=25, seed=3, window=4)
    spread = Counter(i // 50 for i in row_ids(small(0)))
    assert len(spread) == 4


def test_shards_that_leave_a_window_over_are_spread(tmp_path):
    # 5 shards in windows of 4 are 2 and 3, not 4 and 1 alone.
    batches = store_batches(write_store(tmp_path, 50, 10), batch=10, seed=0, window=4)
    seen = [{i // 10 for i in row_ids(batches(step))} for step in range(5)]
    assert all(len(shards) > 1 for shards in seen)


@pytest.mark.slow
@pytest.mark.parametrize("window", [3, None])
def test_positions_of_a_row_are_uniform_over_epochs(window, tmp_path):
    rows = 36
    store = write_store(tmp_path, rows, 6)
    batches = store_batches(store, batch=4, seed=1, window=window)
    table = np.zeros((rows, 9))
    epochs = 90
    for step in range(9 * epochs):
        table[row_ids(batches(step)), step % 9] += 1
    assert (table.sum(1) == epochs).all()
    at = table.reshape(6, 6, 9)[:, 0]  # rows of a shard are in a window: take one
    assert stats.chisquare(at.ravel()).pvalue > 1e-4


def test_runs_in_a_scan_with_arrays_passed_in():
    taps = numbered(37)
    batches = array_batches(taps, batch=8, seed=4)

    @jax.jit
    def run(batches, first):
        return jax.lax.map(batches, first + jnp.arange(10))

    scanned = run(batches, jnp.int32(3))
    for i in range(10):
        single = call(batches, np.uint32(3 + i))
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), scanned, single
        )
    closed = jax.make_jaxpr(run)(batches, jnp.int32(3))
    assert all(np.size(x) < 37 for x in closed.consts)
    again = array_batches(taps, batch=8, seed=5)
    size = run._cache_size()
    run(again, jnp.int32(0))
    assert run._cache_size() == size  # another seed is no other program


@pytest.mark.slow_cases
@pytest.mark.parametrize("step", [0, 77, 2**20 + 1, 2**31 - 1])
@pytest.mark.parametrize(("rows", "batch"), [(1000, 999), (1000, 64), (77, 1)])
def test_the_order_is_that_of_whole_numbers(step, rows, batch):
    batches = jitted(array_batches(numbered(rows), batch=batch, seed=9))
    wanted = []
    salt = np.asarray(jax.random.bits(jax.random.key(9), (2,), jnp.uint32))
    for position in range(step * batch, step * batch + batch):
        epoch, at = divmod(position, rows)
        words = epoch_words(salt, np.array(epoch % 2**32, np.uint32)[None])
        wanted.append(permute_index(np.array([at], np.uint32), rows, words)[0])
    assert row_ids(batches(step)) == wanted


def test_with_replacement_every_row_is_as_likely():
    batches = array_batches(numbered(20), batch=20, seed=0, replace=True)
    taps = jax.jit(lambda f: jax.lax.map(f, jnp.arange(200)))(batches)
    ids = np.asarray(taps.weights).astype(int) - 1
    assert stats.chisquare(np.bincount(ids.ravel(), minlength=20)).pvalue > 1e-4
    assert len(np.unique(ids[0])) < 20


def test_seeds_and_members_under_vmap():
    taps = numbered(40)
    member = jax.jit(lambda seed: array_batches(taps, batch=5, seed=seed)(3))
    members = jax.jit(jax.vmap(member))(jnp.arange(4))
    for seed in range(4):
        wanted = member(jnp.int32(seed))
        np.testing.assert_array_equal(members.acts[seed], wanted.acts)


def test_wrong_arguments(tmp_path):
    store = write_store(tmp_path, 20, 10)
    for batch, kind in ((0, ValueError), (21, ValueError), (2.0, TypeError)):
        match = r"batch must be .*in 1 \.\. 20, the rows there are, got "
        with pytest.raises(kind, match=match + str(batch)):
            store_batches(store, batch=batch, seed=0)
        with pytest.raises(kind, match=match + str(batch)):
            array_batches(numbered(20), batch=batch, seed=0)
    with pytest.raises(ValueError, match="seed must be an int of at least 0, got -1"):
        store_batches(store, batch=2, seed=-1)
    with pytest.raises(ValueError, match=r"window must be an int of at least 1, got 0"):
        store_batches(store, batch=2, seed=0, window=0)
    huge = store._replace(rows_per_shard=2 * 10**9)
    with pytest.raises(ValueError, match="got 2 shards of 2000000000"):
        store_batches(huge, batch=2, seed=0, window=None)
    with pytest.raises(ValueError, match="step must be an int of at least 0, got -1"):
        store_batches(store, batch=2, seed=0)(-1)
    acts, _, weights, *_ = numbered(20)
    with pytest.raises(ValueError, match=r"one length, .* got .*\(19,\)"):
        array_batches(Taps(acts, None, weights[1:]), batch=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [True, None, "a", 1.5, np.nan, np.array([2])])
@pytest.mark.parametrize("name", ["batch", "seed"])
def test_what_is_no_int_is_refused_and_numpy_ints_are_taken(name, wrong, tmp_path):
    store = write_store(tmp_path, 20, 10)
    for make, data in ((store_batches, store), (array_batches, numbered(20))):
        who = make.__name__
        with pytest.raises(TypeError, match=rf"^{who}: {name} must be an int.*; "):
            make(data, **({"batch": 2, "seed": 0} | {name: wrong}))
        one, other = (make(data, batch=x(2), seed=x(3))(1) for x in (int, np.int32))
        np.testing.assert_array_equal(one.acts, other.acts)


def test_bare_arrays_and_wrong_ranks_are_named():
    acts = np.ones((4, 3), np.float32)
    for taps, kind, match in (
        (
            acts,
            TypeError,
            r"must be a Taps, got .* array of shape .*; wrap .* Taps\(acts, None",
        ),
        (Taps(acts, None, acts), ValueError, r"weights \[N\], got .*\(4, 3\)"),
        (Taps(acts, None, 1.0), ValueError, "weights"),
        (Taps(acts, acts[1:], acts[:, 0]), ValueError, r"'grads': \(3, 3\)"),
    ):
        with pytest.raises(kind, match=f"^array_batches: .*{match}"):
            array_batches(taps, batch=2, seed=0)


@pytest.mark.parametrize("field", ["acts", "grads", "weights"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_are_none_are_refused(field, value):
    taps = Taps(*(np.ones(s, np.float32) for s in ((6, 3), (6, 1, 3), (6,))))
    getattr(taps, field)[2] = value
    if value == -1.0 and field != "weights":
        array_batches(taps, batch=2, seed=0)
        return
    match = "weights must be finite" if field == "weights" else "got 1 of 6 with NaN"
    with pytest.raises(ValueError, match=f"^array_batches: .*{match}"):
        array_batches(taps, batch=2, seed=0)
    if field != "weights":  # an example of weight 0 is not there
        taps.weights[2] = 0
        array_batches(taps, batch=2, seed=0)


def test_rows_of_ints_and_of_other_ranks_are_drawn_too():
    tokens = Taps(np.arange(12).reshape(6, 2), np.arange(6), np.ones(6, np.float32))
    batch = array_batches(tokens, batch=6, seed=0)(0)
    np.testing.assert_array_equal(np.asarray(batch.acts)[:, 0] // 2, batch.grads)


@pytest.mark.slow
def test_other_byte_orders_have_the_same_values():
    taps = Taps(np.arange(6, dtype=">f4").reshape(2, 3), None, np.ones(2, ">f4"))
    batch = array_batches(taps, batch=2, seed=0)(0)
    assert sorted(np.asarray(batch.acts).ravel()) == [*range(6)]
