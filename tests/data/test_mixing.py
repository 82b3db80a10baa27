from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from toyfeat.data.mixing import mixing_buffer
from toyfeat.types import Taps


class Source:
    """Rows with numbers, calls of many lengths, some rows of weight 0."""

    def __init__(self, lengths=(7, 0, 12, 1, 30), readouts=1):
        self.lengths, self.readouts, self.calls = lengths, readouts, []

    def rows_of(self, index):
        return self.lengths[index % len(self.lengths)]

    def __call__(self, index):
        self.calls.append(index)
        rows = self.rows_of(index)
        acts = np.stack([np.full(rows, index), np.arange(rows)], 1).astype(np.float32)
        grads = None if not self.readouts else -np.stack([acts] * self.readouts, 1)
        weights = (np.arange(rows) % 4 != 3).astype(np.float32) * (1 + index)
        return Taps(
            jnp.asarray(acts), None if grads is None else grads, jnp.asarray(weights)
        )

    def counted(self, index):
        return [(index, j) for j in range(self.rows_of(index)) if j % 4 != 3]


def ids_of(taps):
    acts = np.asarray(taps.acts).astype(int)
    np.testing.assert_array_equal(taps.weights, acts[:, 0] + 1)
    if taps.grads is not None:
        np.testing.assert_array_equal(taps.grads[:, 0], -acts)
    return [tuple(row) for row in acts.tolist()]


@pytest.mark.parametrize("keep", [0, 0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize(("rows", "batch"), [(64, 8), (50, 7), (9, 9), (100, 3)])
def test_each_row_is_served_once(keep, rows, batch):
    source = Source()
    batches = mixing_buffer(source, rows=rows, batch=batch, keep=keep, seed=0)
    served = Counter()
    for step in range(100):
        ids = ids_of(batches(step))
        assert len(ids) == batch
        served.update(ids)
    assert set(served.values()) == {1}
    assert source.calls == [*range(len(source.calls))]
    there = [row for call in source.calls for row in source.counted(call)]
    assert set(served) <= set(there)
    missing = len(there) - len(served)
    assert missing <= rows + batch + max(source.lengths)
    # All but the newest have been served: nothing waits for ever.
    oldest = min([*(set(there) - set(served)), (10**9, 0)])
    refills = -(-(1 + keep) // (1 - keep)) + 2
    assert there.index(oldest) > len(there) - refills * rows - 40 if missing else True


@pytest.mark.parametrize("keep", [0, 0.3, 0.5, 0.75, 0.9])
def test_the_buffer_is_as_large_as_was_asked(keep):
    source = Source(lengths=(1,))
    batches = mixing_buffer(source, rows=400, batch=10, keep=keep, seed=0)
    steps = round(40 * (1 - keep))
    for step in range(5 * steps):
        batches(step)
        if step % steps == 0:  # just refilled
            assert abs(len(source.calls) - 10 * step - 400) < 10


def test_the_order_depends_on_the_seed_and_on_it_alone():
    orders = []
    for seed in (0, 0, 1):
        batches = mixing_buffer(Source(), rows=60, batch=6, seed=seed)
        orders.append([ids_of(batches(step)) for step in range(20)])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("keep", [0, 0.5, 0.7])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 8, 9, 23, 24, 40])
def test_a_restore_goes_on_bit_by_bit(keep, stop):
    settings = {"rows": 48, "batch": 6, "keep": keep, "seed": 3}
    batches = mixing_buffer(Source(), **settings)
    for step in range(stop):
        batches(step)
    state = batches.state()
    assert all(np.size(x) == 1 for x in state.values())
    as_saved = {name: np.asarray(x) for name, x in state.items()}
    source = Source()
    again = mixing_buffer(source, **settings)
    again(0)  # used before
    source.calls.clear()
    again.restore(as_saved)
    assert again.state() == state
    for step in range(stop, stop + 30):
        assert ids_of(again(step)) == ids_of(batches(step))
        if step == stop:
            spared = sum(len(source.counted(call)) for call in source.calls)
            assert spared <= (1 + keep) * 48 + 6 + 3 * max(source.lengths)
        assert again.state() == batches.state()


def test_rows_of_one_call_are_spread():
    # keep = .5: a call's rows come in three refills, 3 x 32 batches of 4.
    source = Source(lengths=(64,), readouts=None)
    batches = mixing_buffer(source, rows=256, batch=4, seed=0)
    at = {}
    for step in range(400):
        for call, _ in ids_of(batches(step)):
            at.setdefault(call, []).append(step)
    settled = [at[call] for call in range(12, 24)]
    assert all(len(steps) == 48 for steps in settled)
    assert np.mean([len(set(steps)) for steps in settled]) > 34
    assert max(max(Counter(steps).values()) for steps in settled) <= 4
    assert min(max(steps) - min(steps) for steps in settled) > 80
    assert max(max(steps) - min(steps) for steps in settled) < 96 + 32
    # A batch draws from the calls that are in the buffer as if at random.
    calls = [len({c for c, _ in ids_of(batches(step))}) for step in range(400, 432)]
    assert np.mean(calls) > 3


def test_waits_and_places_are_even():
    source = Source(lengths=(60,), readouts=None)
    batches = mixing_buffer(source, rows=200, batch=20, seed=1)
    steps = 5
    place, first = Counter(), {}
    for step in range(600):
        for i, row in enumerate(ids_of(batches(step))):
            place[row[1], i] += 1
            first[row] = step // steps
    table = np.array([[place[j, i] for i in range(20)] for j in range(60) if j % 4 < 3])
    assert stats.chi2_contingency(table).pvalue > 1e-4
    # Generation g is rows 200 + 100 (g - 1) .. of the stream: three refills, alike.
    stream = [row for call in range(200) for row in source.counted(call)]
    waits = [first[row] - i // 100 for i, row in enumerate(stream[200:10200], 0)]
    counts = np.bincount(np.array(waits) - min(waits))
    assert len(counts) == 3
    assert max(counts) - min(counts) <= 100


def test_what_goes_wrong_is_told():
    source = Source()
    for settings, match in (
        ({"rows": 3, "batch": 4}, r"rows must be an int in 4 \(a batch\) .*, got 3"),
        ({"batch": 0}, "batch must be an int above 0, got 0"),
        ({"keep": 1.0}, r"keep must be in \[0, 1\), got 1.0"),
        ({"keep": -0.1}, r"keep must be in \[0, 1\), got -0.1"),
        ({"seed": -1}, "seed must be an int above -1, got -1"),
    ):
        with pytest.raises(ValueError, match=match):
            mixing_buffer(source, **({"rows": 8, "batch": 4, "seed": 0} | settings))

    def nothing(index):
        return Taps(jnp.ones((4, 2)), None, jnp.zeros(4))

    with pytest.raises(ValueError, match="100 calls of the source, up to index 99"):
        mixing_buffer(nothing, rows=8, batch=4, seed=0)(0)
    batches = mixing_buffer(source, rows=16, batch=4, seed=0)
    batches(0)
    for step in (-1, 3, 50):
        with pytest.raises(ValueError, match=rf"a step in 0 \.\. 2, got {step}"):
            batches(step)
    with pytest.raises(ValueError, match="the state has batch = 4, the buffer 8"):
        mixing_buffer(source, rows=16, batch=8, seed=0).restore(batches.state())


@pytest.mark.parametrize("wrong", ["width", "dtype", "grads", "length"])
def test_a_source_that_changes_later(wrong):
    good = Source(lengths=(9,))

    def source(index):
        taps = good(index)
        if index < 20 or fixed:
            return taps
        return {
            "width": taps._replace(acts=jnp.ones((9, 3))),
            "dtype": taps._replace(acts=taps.acts.astype(jnp.bfloat16)),
            "grads": taps._replace(grads=None),
            "length": taps._replace(grads=taps.grads[:5]),
        }[wrong]

    fixed = False
    batches = mixing_buffer(source, rows=40, batch=5, seed=0)
    plain = mixing_buffer(good, rows=40, batch=5, seed=0)
    with pytest.raises(ValueError, match="call 20 of the source gave"):
        [batches(step) for step in range(100)]
    step = batches.state()["step"]
    fixed = True  # a failure changes nothing: the step can be asked for again
    jax.tree.map(np.testing.assert_array_equal, batches(step), at_step(plain, step))


def at_step(batches, last):
    for step in range(last):
        batches(step)
    return batches(last)
