import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.metrics import preservation
from toyfeat.models import planted

KEY = jax.random.key(3)
TASKS = {
    "product": planted.product_space(KEY, colours=3, shapes=4, dim=9),
    "ignored": planted.ignored_structure(KEY, dim=16, features=4, manifold=4),
    "quiet": planted.quiet_and_loud(KEY, dim=16, quiet=4, loud=5),
}
every = pytest.mark.parametrize("name", TASKS)


def truth_of(task):
    return ft.Features(task.truth.readers, task.truth.writers)


@pytest.mark.slow
@every
def test_the_truth_scores_one(name):
    task = TASKS[name]
    scores = ft.metrics.score_task(KEY, task, truth_of(task))
    assert scores.readers == pytest.approx(1, abs=1e-5)
    assert scores.writers == pytest.approx(1, abs=1e-5)
    assert scores.precision == 1
    assert scores.num_found == len(task.truth.frequency)
    assert scores.ignored_share == 0
    assert 0 < scores.random_coverage < 0.9


def test_swapped_readers_and_writers_score_less():
    task = TASKS["ignored"]
    turned = ft.metrics.score_task(KEY, task, ft.Features(*truth_of(task)[1::-1]))
    direct = ft.metrics.match_features(task.truth.writers, task.truth.readers).coverage
    assert turned.readers == pytest.approx(direct, abs=1e-6)
    assert turned.readers < 0.8
    assert turned.precision < 1


def test_lengths_signs_and_zero_rows_do_not_matter():
    task = TASKS["product"]
    readers, writers = truth_of(task)[:2]
    size = jnp.linspace(-3.0, 5.0, len(readers))[:, None]
    none = jnp.zeros((2, readers.shape[1]))
    more = ft.Features(
        jnp.concatenate([size * readers, none]), jnp.concatenate([writers, none + 1])
    )
    np.testing.assert_allclose(
        ft.metrics.score_task(KEY, task, more),
        ft.metrics.score_task(KEY, task, truth_of(task)),
        atol=1e-4,
    )


def test_writers_of_a_product_space_preserve_the_output():
    task = TASKS["product"]
    readers, writers = truth_of(task)[:2]
    assert (
        ft.metrics.score_task(KEY, task, ft.Features(readers, writers)).preserved > 0.99
    )
    noise = jax.random.normal(KEY, writers.shape)
    assert ft.metrics.score_task(KEY, task, ft.Features(noise, noise)).preserved < 0.7


def by_hand(task, found, examples):
    """Both replacements, example by example: least squares on writers, regressions."""
    inputs = task.sample(jax.random.split(KEY)[0], examples)
    outputs, acts = task.probed(task.params, inputs, {})
    acts = np.asarray(acts[task.site], np.float64)
    more = task.sample(
        jax.random.fold_in(jax.random.split(KEY)[0], 1), preservation._NUM_HELD_OUT
    )
    more = np.asarray(task.probed(task.params, more, {})[1][task.site], np.float64)

    def half(shift, one):
        probe = {task.site: shift[None]}
        y = task.probed(task.params, jax.tree.map(lambda x: x[None], one), probe)[0]
        return jnp.sum(y**2) / 2

    zero = jnp.zeros(acts.shape[1])
    grads = np.asarray(jax.vmap(jax.grad(half), in_axes=(None, 0))(zero, inputs))
    unit = np.asarray(found.writers, np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    readers = np.asarray(found.readers, np.float64)
    num = ft.metrics.mean_active_features(jax.random.split(KEY)[0], task, examples)
    mean = more.mean(0)
    middle = mean / np.linalg.norm(mean)
    read = (more - mean) @ readers.T
    slopes = [  # of the activation on each reader alone
        np.linalg.lstsq(one[:, None], more - mean, rcond=None)[0][0] for one in read.T
    ]
    projected, guessed = [], []
    for act, grad in zip(acts, grads, strict=True):
        best = np.argsort(-np.abs((unit @ act) * (unit @ grad)))[:num]
        rows = np.concatenate([unit[best], middle[None]])
        codes = np.linalg.lstsq(rows.T, act, rcond=1e-3)[0]
        projected.append(codes @ rows)
        now = readers @ (act - mean)
        best = np.argsort(-np.abs(now * (slopes @ grad)))[:num]
        table = np.linalg.lstsq(read[:, best], more - mean, rcond=None)[0]
        guessed.append(mean + now[best] @ table)
    whole = np.asarray(outputs, np.float64)
    shares = []
    for spliced in (projected, guessed):
        value = jnp.asarray(np.array(spliced), jnp.float32)
        probe = {task.site: lambda _, value=value: value}
        now = np.asarray(task.probed(task.params, inputs, probe)[0], np.float64)
        shares.append(
            1 - ((whole - now) ** 2).sum() / ((whole - whole.mean(0)) ** 2).sum()
        )
    return shares


@pytest.mark.slow
@every
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("side", [0, 1])
def test_preserved_equals_a_loop_over_examples(name, side, noise, monkeypatch):
    task = TASKS[name]
    found = ft.Features(
        *(
            rows + noise * jax.random.normal(jax.random.key(7 + i), rows.shape)
            for i, rows in enumerate(truth_of(task)[:2])
        )
    )
    shares = by_hand(task, found, 60)
    got = ft.metrics.score_task(KEY, task, found, examples=60).preserved
    assert got == pytest.approx(max(shares), abs=1e-3)
    both = "_project_on_writers", "_guess_from_readers"
    one = getattr(preservation, both[side])  # alone, whichever is the better one
    monkeypatch.setattr(preservation, both[1 - side], one)
    rows = found.writers if side == 0 else found.readers
    alone = ft.metrics.score_task(
        KEY, task, ft.Features(rows, rows), examples=60
    ).preserved
    assert alone == pytest.approx(shares[side], abs=1e-3)


@pytest.mark.slow
def test_true_readers_preserve_the_output_whatever_their_writers():
    task = TASKS["ignored"]
    projected, guessed = by_hand(task, truth_of(task), 200)
    assert projected < 0.5 < 0.9 < guessed
    readers, writers = truth_of(task)[:2]
    for other in (writers, jax.random.normal(KEY, writers.shape)):
        assert (
            ft.metrics.score_task(KEY, task, ft.Features(readers, other)).preserved
            > 0.9
        )


@pytest.mark.slow
def test_true_writers_preserve_the_output_whatever_their_readers():
    task = TASKS["product"]
    readers, writers = truth_of(task)[:2]
    noise = jax.random.normal(KEY, readers.shape)
    projected, guessed = by_hand(task, ft.Features(noise, writers), 200)
    assert guessed < 0.9 < 0.99 < projected
    assert (
        ft.metrics.score_task(KEY, task, ft.Features(noise, writers)).preserved > 0.99
    )


def test_readers_of_constant_activations_guess_the_mean():
    acts = np.random.default_rng(0).normal(size=(50, 6))
    acts[:, 0] = 0.0  # dead
    acts[:, 1] = 1.0 - acts[:, 2]  # their sum is constant
    rows = np.zeros((2, 6))
    rows[0, 0] = rows[1, 1] = rows[1, 2] = 1.0
    data = preservation._Acts(acts[:9], acts[:9], acts, acts.dtype)
    for size in (1e-160, 1.0, 1e150):
        guess = preservation._guess_from_readers(2, size * rows, data)
        np.testing.assert_allclose(guess, np.tile(acts.mean(0), (9, 1)), atol=1e-12)
    constant = data._replace(held_out=0 * acts + acts[0])
    guess = preservation._guess_from_readers(2, rows, constant)
    np.testing.assert_allclose(guess, np.tile(acts[0], (9, 1)), atol=1e-12)


def test_repeated_rows_reconstruct_the_same():
    task = TASKS["product"]
    readers, writers = truth_of(task)[:2]
    twice = ft.Features(jnp.repeat(readers[:2], 6, 0), jnp.repeat(writers[:2], 6, 0))
    some = np.asarray(task.probed(task.params, task.sample(KEY, 200), {})[1][task.site])
    some = some.astype(np.float64)
    for replaced in (
        preservation._guess_from_readers,
        preservation._project_on_writers,
    ):
        rows = (
            twice.readers
            if replaced is preservation._guess_from_readers
            else twice.writers
        )
        rows = np.asarray(rows, np.float64)
        data = preservation._Acts(some, some, some, np.dtype(np.float32))
        many = replaced(12, rows, data)
        few = replaced(2, rows[::6], data)
        np.testing.assert_allclose(many, few, atol=1e-6)


def test_ignored_structure_is_counted_by_dimension():
    task = TASKS["ignored"]
    readers = np.asarray(task.truth.readers)
    surface = np.asarray(task.ignored)
    for rows, share in (
        (surface[:1], 0.25),
        (np.concatenate([surface[:2], surface[:2]]), 0.5),
        (surface, 1.0),
        (surface[:1] + readers[:1] / np.linalg.norm(readers[0]), 0.0),
    ):
        both = np.concatenate([readers, rows])
        assert (
            ft.metrics.score_task(KEY, task, ft.Features(both, both)).ignored_share
            == share
        )


def test_no_features_score_zero():
    task = TASKS["product"]
    none = jnp.zeros((3, 9))
    scores = ft.metrics.score_task(KEY, task, ft.Features(none, none))
    assert scores == (0,) * len(scores)


def test_where_nothing_is_planted_only_counts_are_not_zero():
    task = TASKS["product"]
    none = jnp.zeros((0, 9))
    empty = task._replace(
        truth=planted.Truth(readers=none, writers=none, frequency=jnp.zeros(0)),
        features=lambda params, inputs: jnp.zeros((len(inputs), 0)),
    )
    rows = jnp.eye(9)[:3]
    features = ft.Features(rows, rows, group=np.array([0, 0, 1]))
    scores = ft.metrics.score_task(KEY, empty, features)
    assert (scores.num_found, scores.num_mechanisms) == (3, 2)
    assert scores[:3] == (0, 0, 0)
    assert scores.mechanisms == scores.random_coverage == 0
    scores = ft.metrics.score_task(KEY, empty, ft.Features(none, none))
    assert scores == (0,) * len(scores)


def test_a_plane_counts_as_a_mechanism_where_it_is_returned_as_a_plane():
    pair = np.array([0, 0, 1, 1, 2, 3, 4])
    task = TASKS["product"]
    # Rows at right angles: those of the task are within .9 of each other.
    truth = task.truth._replace(readers=jnp.eye(9)[:7], group=pair)
    task = task._replace(truth=truth, side="mechanisms")
    rows = truth_of(task)[:2]
    whole = ft.metrics.score_task(KEY, task, ft.Features(*rows, group=pair))
    assert whole.mechanisms == pytest.approx(1, abs=1e-6)
    assert (whole.precision, whole.mechanism_precision, whole.inside) == (1, 1, 0)
    assert (whole.num_found, whole.num_mechanisms) == (7, 5)
    alone = ft.metrics.score_task(KEY, task, ft.Features(*rows))
    assert alone.readers == pytest.approx(1, abs=1e-6)  # the rows span the planes
    assert alone.mechanisms == pytest.approx(3 / 5, abs=1e-6)
    assert alone.precision == pytest.approx(3 / 7)
    assert alone.inside == pytest.approx(4 / 7)
    with pytest.raises(ValueError, match="score_task: group needs one entry per row"):
        ft.metrics.score_task(KEY, task, ft.Features(*rows, group=pair[:3]))


@pytest.mark.parametrize(
    ("readers", "writers", "match"),
    [
        (np.ones((3, 8)), np.ones((3, 8)), r"\[R, 9\], got shapes \(3, 8\)"),
        (np.ones((3, 9)), np.ones((2, 9)), r"got shapes \(3, 9\) and \(2, 9\)"),
        (np.ones(9), np.ones(9), r"got shapes \(9,\)"),
        (np.full((2, 9), np.nan), np.ones((2, 9)), "must be finite"),
    ],
)
def test_features_must_be_finite_and_fit_the_task(readers, writers, match):
    with pytest.raises(ValueError, match=match):
        ft.metrics.score_task(KEY, TASKS["product"], ft.Features(readers, writers))


def test_rows_of_zero_length_are_left_out():
    task = TASKS["product"]
    readers, writers = (np.asarray(rows, np.float64) for rows in truth_of(task)[:2])
    size = np.where(np.arange(len(readers)) > 1, 1.0, 1e-200)[:, None]
    scores = ft.metrics.score_task(KEY, task, ft.Features(size * readers, writers))
    assert scores.num_found == len(readers) - 2
    assert scores.readers == pytest.approx(1 - 2 / len(readers), abs=1e-5)


@pytest.mark.parametrize("examples", [0, -1, 2.5])
def test_examples_must_be_a_positive_int(examples):
    task = TASKS["product"]
    with pytest.raises(ValueError, match="score_task: examples must be an int of"):
        ft.metrics.score_task(KEY, task, truth_of(task), examples=examples)
    with pytest.raises(
        ValueError, match="mean_active_features: examples must be an int"
    ):
        ft.metrics.mean_active_features(KEY, task, examples)


def test_the_truth_must_have_the_side_of_the_task():
    task = TASKS["product"]
    bare = task._replace(truth=task.truth._replace(readers=None))
    with pytest.raises(ValueError, match=r"score_task: .* 'readers' and \['writers'\]"):
        ft.metrics.score_task(KEY, bare, truth_of(task))
    with pytest.raises(ValueError, match=r"score_task: .* got 'both'"):
        ft.metrics.score_task(KEY, task._replace(side="both"), truth_of(task))


def test_an_output_that_varies_by_rounding_is_constant():
    task = TASKS["product"]
    steady = ft.from_split(
        lambda p, x: x @ p["writers"],
        lambda _, a: 7 + jnp.float32(1e-6) * jnp.sign(a),  # to a last digit or two
        site=task.site,
    )
    outputs = steady(task.params, task.sample(KEY, 50), {})[0]
    assert np.ptp(outputs) > 0
    noise = jax.random.normal(KEY, task.truth.writers.shape)
    scores = ft.metrics.score_task(
        KEY, task._replace(probed=steady), ft.Features(noise, noise)
    )
    assert scores.preserved == 1


@pytest.mark.slow_cases
@pytest.mark.parametrize(("kept", "preserved"), [(True, 1), (False, 0)])
def test_a_constant_output_is_preserved_or_not(kept, preserved):
    task = TASKS["product"]
    if kept:
        silent = ft.from_split(
            lambda p, x: x @ p["writers"], lambda _, a: 0 * a, site=task.site
        )
        scores = ft.metrics.score_task(
            KEY, task._replace(probed=silent), truth_of(task)
        )
    else:  # one example has no variance
        noise = jax.random.normal(KEY, task.truth.writers.shape)
        scores = ft.metrics.score_task(KEY, task, ft.Features(noise, noise), examples=1)
    assert scores.preserved == preserved
