import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.discover import ConsensusConfig, agreement, consensus_of_taps
from toyfeat.discover.agreement import (
    _near_rows,
    _outside_planes,
    agree_and_refine,
    shared_directions,
)
from toyfeat.discover.consensus import _train_level
from toyfeat.discover.gradients import (
    WhiteCoordinates,
    acts_covariance,
    gradient_rows,
    white_coordinates,
)
from toyfeat.discover.tables import (
    GradientTables,
    default_examples,
    gradient_tables,
    tap_readouts,
)
from toyfeat.discover.training import train_dictionaries
from toyfeat.models import planted

SHORT = ConsensusConfig(examples=1000, steps=30, batch_size=256)
TASKS = {
    "product_space": {"dim": 16, "colours": 5, "shapes": 5},
    "quiet_and_loud": {"dim": 10, "quiet": 4, "loud": 6, "probability": 0.15},
}

# Of five colours and shapes the 25 sums explain the gradients of the norm as well, by a
# code each, and which table moves less depends on the last bits of the training.
WIDER = {"dim": 20, "colours": 7, "shapes": 7}

EQUIVARIANT = {
    "ignored structure": planted.ignored_structure,
    "product space": planted.product_space,
    "quiet but strong": planted.quiet_and_loud,
    "superposition 40-10": functools.partial(
        planted.superposition, features=40, hidden=10
    ),
    "cross-layer": planted.cross_layer,
}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def by_loops(sets, support, cosine):
    """Direction by direction, as it is described."""
    left = [(i, row) for i, rows in enumerate(sets) for row in rows]
    found, supports = [], []
    while left:
        near = [
            [other for other in left if abs(row @ other[1]) >= cosine]
            for _, row in left
        ]
        most = [len({i for i, _ in others}) for others in near]
        best = int(np.argmax(most))
        if most[best] < support:
            break
        rows = np.array([row for _, row in near[best]])
        found.append(np.linalg.eigh(rows.T @ rows)[1][:, -1])
        supports.append(most[best])
        gone = {id(other[1]) for other in near[best]}
        left = [other for other in left if id(other[1]) not in gone]
    return np.array(found), supports


@pytest.mark.parametrize("support", [1, 2, 3])
@pytest.mark.parametrize("cosine", [0.7, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_shared_directions_equal_a_search_in_loops(seed, cosine, support):
    rng = np.random.default_rng(seed)
    sets = [unit(rng.normal(size=(num, 3))) for num in (5, 9, 7, 0, 6)]
    oracle, supports = by_loops(sets, support, cosine)
    found, counts = shared_directions(sets, support=support, cosine=cosine)
    assert counts.tolist() == supports
    assert found.shape == (len(supports), 3)
    if supports:
        same = np.abs(np.sum(found * oracle, axis=1))
        np.testing.assert_allclose(same, 1, rtol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-9)


@pytest.mark.parametrize("products", [1, 60, 2**25])
def test_near_rows_equal_a_search_in_loops(products, monkeypatch):
    monkeypatch.setattr(agreement, "_MAX_PRODUCTS", products)
    rows = unit(np.random.default_rng(0).normal(size=(25, 3)))
    near = _near_rows(rows, 0.8)
    assert [others.tolist() for others in near] == [
        [j for j, other in enumerate(rows) if abs(row @ other) >= 0.8] for row in rows
    ]
    assert _near_rows(np.zeros((0, 3)), 0.8) == []


def test_dictionaries_without_atoms_share_nothing():
    for support in (None, 1):
        found, counts = shared_directions([np.zeros((0, 4))] * 3, support=support)
        assert (found.shape, counts.shape) == ((0, 4), (0,))


@pytest.mark.parametrize("width", [2, 3])
def test_directions_of_a_plane_are_told_apart_36_degrees_apart(width):
    """Of a pentagon, whose lines lie 36 degrees apart."""

    def at(*degrees):
        angles = np.radians(degrees)
        rows = np.zeros((len(degrees), width))
        rows[:, 0], rows[:, 1] = np.cos(angles), np.sin(angles)
        return rows

    sets = [at(0, 30, 90), at(0, 30, 90), at(15), at(15), at(15)]
    found, counts = shared_directions(sets, support=2, cosine=0.95)
    assert counts.tolist() == [3, 2, 2, 2]
    cosines = np.abs(found @ at(15, 0, 30, 90).T)
    np.testing.assert_allclose(np.sort(cosines.max(axis=0)), 1, atol=1e-6)


def test_a_direction_and_its_negative_are_the_same():
    rng = np.random.default_rng(0)
    rows = unit(rng.normal(size=(4, 6)))
    sets = [rows, unit(-rows + 0.01 * rng.normal(size=rows.shape))]
    found, counts = shared_directions(sets, support=2, cosine=0.95)
    assert counts.tolist() == [2] * 4
    assert np.abs(found @ rows.T).max(0).min() > 0.999


def test_support_counts_dictionaries_and_not_rows():
    rows = np.eye(3)
    found, counts = shared_directions(
        [rows[[0, 0, 0, 1]], rows[[1, 2, 2]]], support=2, cosine=0.9
    )
    assert counts.tolist() == [2]
    np.testing.assert_allclose(np.abs(found), rows[1:2], atol=1e-12)


@pytest.mark.parametrize(("most", "least"), [(2, 2), (5, 2), (8, 2), (9, 3), (12, 4)])
def test_the_default_support_is_a_third_of_the_largest(most, least):
    rows = np.eye(12)
    sets = [rows[:1]] * most + [np.zeros((0, 12))] * (12 - most)
    for i, often in enumerate(range(1, most), start=1):
        for j in range(often):
            sets[j] = np.concatenate([sets[j], rows[i : i + 1]])
    _, counts = shared_directions(sets, support=None, cosine=0.9)
    assert counts.tolist() == list(range(most, least - 1, -1))


def test_directions_are_sorted_by_support():
    rows = np.eye(4)
    sets = [rows[[0, 1, 2]], rows[[1, 2]], rows[[2, 3]]]
    found, counts = shared_directions(sets, support=1, cosine=0.9)
    assert counts.tolist() == [3, 2, 1, 1]
    np.testing.assert_allclose(np.abs(found), rows[[2, 1, 0, 3]], atol=1e-12)


def test_a_shared_direction_is_the_middle_of_its_neighbours():
    turn = np.array([0.1, 0.2, 0.3])
    rows = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    found, counts = shared_directions(
        [rows[:1], rows[1:2], rows[2:]], support=3, cosine=0.99
    )
    assert counts.tolist() == [3]
    np.testing.assert_allclose(np.abs(found @ rows.T), np.cos([[0.1, 0, 0.1]]))


@pytest.mark.parametrize("support", [2, None])
def test_without_shared_directions_there_are_no_rows(support):
    rows = np.eye(4)
    found, counts = shared_directions([rows[:2], rows[2:]], support=support, cosine=0.9)
    assert found.shape == (0, 4)
    assert counts.shape == (0,)


def taps(grads, dtype=jnp.float32):
    grads = jnp.asarray(grads, dtype)
    return ft.Taps(
        jnp.zeros((len(grads), grads.shape[-1])), grads, jnp.ones(len(grads))
    )


@pytest.fixture
def grads():
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(30, 2, 5))
    grads[3] = grads[7, 1] = 0
    grads[9, 0] *= 1e-9
    return grads


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_nonzero_gradients_have_unit_entries_at_any_scale(scale, grads):
    rows = grads.reshape(-1, 5)
    rows = rows[np.linalg.norm(rows, axis=1) > 1e-6]
    assert len(rows) == 60 - 4
    found = gradient_rows(taps(scale * grads))
    oracle = rows / np.sqrt(np.mean(rows**2))
    np.testing.assert_allclose(found, oracle, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_gradients_must_be_finite_and_not_all_zero(bad, grads):
    grads = 0 * grads
    grads[5, 1, 2] = bad
    with pytest.raises(ValueError, match="gradients must be finite and not all 0"):
        gradient_rows(taps(grads))


@pytest.mark.parametrize("rank", [3, 5])
def test_white_coordinates_have_unit_second_moment_and_a_way_back(rank):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, rank)) @ rng.normal(size=(rank, 5))
    maps = white_coordinates(rows, min_eigenvalue=1e-9)
    white = rows @ maps.whiten
    assert white.shape == (50, rank)
    np.testing.assert_allclose(white.T @ white / 50, np.eye(rank), atol=1e-9)
    np.testing.assert_allclose(white @ maps.unwhiten, rows, atol=1e-9)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(maps.directions(white), rows / lengths, atol=1e-9)
    assert not maps.directions(np.zeros((1, rank))).any()


def test_white_rows_do_not_depend_on_the_coordinates():
    rng = np.random.default_rng(0)
    rows, change = rng.normal(size=(50, 5)), rng.normal(size=(5, 5))
    white, other = (
        table @ white_coordinates(table, min_eigenvalue=1e-9).whiten
        for table in (rows, rows @ change)
    )
    np.testing.assert_allclose(white @ white.T, other @ other.T, atol=1e-9)


def test_directions_below_the_least_eigenvalue_are_left_out():
    rows = np.diag([1.0, 1e-2, 1e-4])
    for least, rank in ((1e-9, 3), (1e-7, 2), (1e-3, 1)):
        assert white_coordinates(rows, min_eigenvalue=least).whiten.shape == (3, rank)


def test_a_level_has_dictionaries_of_both_readouts(key, monkeypatch):
    """Codes of the first have one sign."""
    seen = []
    module = sys.modules["toyfeat.discover.consensus"]  # its name is the function's

    def record(key, rows, **options):
        seen.append((rows, options))
        return [rows]

    monkeypatch.setattr(module, "train_dictionaries", record)
    tables = GradientTables("half", "random", None, None, None)
    assert _train_level(key, tables, SHORT, 4) == ["half", "random"]
    assert [(rows, options.pop("signed")) for rows, options in seen] == [
        ("half", False),
        ("random", True),
    ]
    fields = SHORT._asdict() | {"latents_per_dim": 4}
    del fields["examples"], fields["num_directions"]
    assert [options for _, options in seen] == [fields] * 2


def half_of(subject, shift, one):
    probes = {subject.site: shift[None]}
    inputs = jax.tree.map(lambda x: x[None], one)
    return jnp.sum(subject.probed(subject.params, inputs, probes)[0] ** 2) / 2


def test_five_readers_in_a_plane_of_a_wider_layer_are_found(key):
    """A pentagon, 36 degrees from line to line, in 16 dimensions."""
    rng = np.random.default_rng(0)
    angles = 2 * np.pi / 5 * np.arange(5)
    plane = np.linalg.qr(rng.normal(size=(16, 16)))[0][:2]
    true = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane
    sizes = rng.uniform(0.5, 1.5, (3000, 1))
    rows = jnp.asarray(sizes * true[rng.integers(5, size=3000)], float)
    sizes = {"latents_per_dim": 2, "max_latents": 99, "steps": 30, "batch_size": 256}
    trained = train_dictionaries(key, rows, ks=(1, 2), starts=2, signed=False, **sizes)
    for atoms in trained:
        np.testing.assert_allclose(atoms, atoms @ plane.T @ plane, atol=5e-3)
    found, _ = shared_directions(trained, support=None, cosine=0.95)
    assert ft.metrics.match_features(found, true).coverage >= 0.97


@functools.cache
def task(name):
    if name == "wider_product_space":
        return planted.product_space(jax.random.key(0), **WIDER)
    return getattr(planted, name)(jax.random.key(0), **TASKS[name])


def scaled(subject, factor):
    def probed(params, inputs, probes):
        outputs, acts = subject.probed(params, inputs, probes)
        return factor * outputs, acts

    return subject._replace(probed=probed)


def recorded(subject, seen):
    def sample(key, num):
        seen.append(subject.sample(key, num))
        return seen[-1]

    return subject._replace(sample=sample)


@functools.cache
def found(name):
    """What is found, and the inputs it was found with."""
    seen = []
    subject = recorded(planted.subject_of(task(name)), seen)
    return ft.consensus(jax.random.key(1), subject, config=SHORT), seen[0]


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", TASKS)
def test_the_consensus_finds_the_readers(name):
    result, truth = found(name)[0], task(name).truth
    assert (
        ft.metrics.match_features(result.features.readers, truth.readers).coverage
        >= 0.95
    )
    assert result.num_dictionaries in (12, 36)
    assert result.features.readers.shape == result.features.writers.shape
    assert result.support.shape == result.features.readers.shape[:1]
    assert np.all(np.diff(result.support) <= 0)
    assert result.support.max() <= result.num_dictionaries
    assert result.support.min() >= max(2, result.support.max() // 3)
    lengths = np.linalg.norm(result.features.readers, axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


@functools.cache
def first_level(name):
    """The tables that :func:`found` has, and the dictionaries of fewest latents."""
    tap_key, train_key = jax.random.split(jax.random.key(1))
    tables_key, level_key = jax.random.split(train_key, 4)[:2]
    size = {"examples": SHORT.examples, "num_directions": SHORT.num_directions}
    taps = tap_readouts(tap_key, planted.subject_of(task(name)), **size)
    tables = gradient_tables(tables_key, *taps)
    return tables, _train_level(level_key, tables, SHORT, SHORT.latents_per_dim[0])


@pytest.mark.slow
@pytest.mark.parametrize("draw", [2, 4])
def test_parts_of_a_small_product_space_come_back_and_not_their_sums(draw):
    """One code each of 24 sums explains the gradients of the norm as well."""
    key, run = jax.random.key(100 + draw), jax.random.key(draw)
    space = planted.product_space(key, dim=16, colours=4, shapes=6)
    readers = ft.discover.consensus(run, planted.subject_of(space)).features.readers
    assert len(readers) == 10
    assert ft.metrics.match_features(readers, space.truth.readers).coverage > 0.999


@pytest.mark.slow
def test_tables_have_white_gradients_of_both_readouts():
    subject = planted.subject_of(task("product_space"))
    tables, _ = first_level("product_space")
    tap_key = jax.random.split(jax.random.key(1))[0]
    inputs = subject.sample(jax.random.split(tap_key)[0], SHORT.examples)
    gradients = jax.vmap(jax.grad(lambda a, x: half_of(subject, a, x)), (None, 0))
    oracle = gradients(jnp.zeros(16), inputs)
    taps = tables.taps
    assert taps.grads.shape == (1000, 1, 16)
    assert len(tables.norm_grads) == 1000
    assert len(tables.direction_grads) == 1000 * SHORT.num_directions
    rank = len(tables.coordinates.unwhiten)
    assert tables.planes.shape == (0, rank)
    # All rows are in the white coordinates of the gradients of random directions.
    for rows in (tables.norm_grads, tables.direction_grads):
        np.testing.assert_allclose(np.mean(np.asarray(rows) ** 2), 1, rtol=1e-4)
    second = np.asarray(tables.direction_grads, np.float64)
    second = second.T @ second / len(second)
    np.testing.assert_allclose(second, np.eye(rank), atol=1e-4)
    back = np.asarray(tables.norm_grads, np.float64) @ tables.coordinates.unwhiten
    back *= np.sqrt(np.mean(np.square(gradient_rows(taps)))) / np.sqrt(np.mean(back**2))
    np.testing.assert_allclose(back, gradient_rows(taps), atol=1e-4)
    np.testing.assert_allclose(taps.grads[:, 0], oracle, rtol=1e-4, atol=1e-5)
    acts = np.asarray(taps.acts, np.float64)
    np.testing.assert_allclose(acts_covariance(taps), np.cov(acts.T, ddof=0), atol=1e-4)


def test_shared_directions_are_refined_on_the_gradients():
    name = "wider_product_space"
    true = np.asarray(task(name).truth.readers)
    tables, dictionaries = first_level(name)
    near, counts = shared_directions(dictionaries)
    of_norm = np.arange(len(dictionaries)) < len(dictionaries) // 2
    agreed = agree_and_refine(dictionaries, tables, of_norm=of_norm)
    assert agreed.explain
    # Some directions are left out, of low support.
    near = tables.coordinates.directions(near)
    cosines = np.abs(near @ agreed.rows.T)
    assert cosines.max(0).min() >= 0.95
    # Of those near a refined one the one of the largest support, which comes first.
    same = (cosines >= 0.95).argmax(0)
    assert len(set(same)) == len(agreed.rows)
    np.testing.assert_array_equal(counts[same], agreed.supports)
    lost = [
        1 - np.abs(unit(true) @ rows.T).max(1) for rows in (near[same], agreed.rows)
    ]
    assert np.median(lost[1]) < 0.5 * np.median(lost[0])
    result = found(name)[0]
    np.testing.assert_allclose(result.features.readers, agreed.rows, atol=1e-4)
    np.testing.assert_array_equal(result.support, agreed.supports)


def test_a_larger_support_returns_the_directions_that_have_it():
    _, dictionaries = first_level("product_space")
    usual, counts = shared_directions(dictionaries)
    most, same = shared_directions(dictionaries, support=6)
    assert 0 < np.sum(counts >= 6) < len(counts)
    np.testing.assert_array_equal(same, counts[counts >= 6])
    np.testing.assert_array_equal(most, usual[counts >= 6])


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("share", "num"), [(1, 12), (0.5, 6), (0.3, 4), (1e-9, 1), (None, None)]
)
def test_support_is_a_share_of_the_dictionaries(share, num, monkeypatch):
    module, seen = sys.modules["toyfeat.discover.consensus"], []
    tables, dictionaries = first_level("product_space")

    def agree(dictionaries, tables, *, of_norm, support, cosine):
        halves = [True] * 6 + [False] * 6
        assert of_norm is None if support else of_norm.tolist() == halves
        seen.append((len(dictionaries), support, cosine))
        return agreement.Agreement(np.eye(16)[:1], np.array([5]), True, True)

    monkeypatch.setattr(module, "agree_and_refine", agree)
    monkeypatch.setattr(module, "gradient_tables", lambda *_: tables)
    monkeypatch.setattr(module, "_train_level", lambda *_: dictionaries)
    subject = planted.subject_of(task("product_space"))
    result = ft.consensus(jax.random.key(1), subject, support=share, cosine=0.9)
    assert seen == [(12, num, 0.9)]
    assert (result.support.tolist(), result.num_dictionaries) == ([5], 12)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("explained", "most", "used"),
    [
        ({2}, 3, [(2, 12)]),
        ({4}, 3, [(2, 12), (4, 12)]),
        (set(), 3, [(2, 12), (4, 12), (8, 12), (8, 36)]),
        ({2, 8}, 9, [(2, 12), (4, 12), (8, 12)]),  # 9 of 10 latents are needed
    ],
)
def test_more_latents_are_tried_where_fewer_do_not_clearly_explain(
    explained, most, used, monkeypatch
):
    """All vote together where none do."""
    module, seen, levels = sys.modules["toyfeat.discover.consensus"], [], []

    def train(key, tables, config, latents_per_dim):
        levels.append(latents_per_dim)
        return [np.eye(16)[:10] if latents_per_dim == 2 else np.eye(16)] * 12

    def agree(dictionaries, tables, **_):
        seen.append((levels[-1], len(dictionaries)))
        supports, clear = np.full(most, 5), levels[-1] in explained
        return agreement.Agreement(np.eye(16)[:most], supports, True, clear)

    monkeypatch.setattr(module, "agree_and_refine", agree)
    monkeypatch.setattr(
        module, "gradient_tables", lambda *_: first_level("product_space")[0]
    )
    monkeypatch.setattr(module, "_train_level", train)
    subject = planted.subject_of(task("product_space"))
    result = ft.consensus(jax.random.key(1), subject)
    assert seen == used
    assert result.num_dictionaries == used[-1][1]


@pytest.mark.slow_cases
@pytest.mark.parametrize(("often", "kept"), [(5, False), (8, True)])
def test_a_sum_is_left_out_unless_its_support_is_large(often, kept):
    """Of 10 in 16 dimensions; its support stands between those of readers."""
    rng = np.random.default_rng(0)
    true = np.linalg.qr(rng.normal(size=(16, 16)))[0][:10]
    chosen = rng.permuted(np.tile(np.arange(10), (2000, 1)), axis=1)[:, :2]
    codes = np.zeros((2000, 10))
    np.put_along_axis(codes, chosen, rng.normal(size=(2000, 2)), axis=1)
    rows = np.concatenate([codes @ true, np.repeat([true[0] + true[1]], 30, axis=0)])
    between = unit(true[:1] + true[1:2])
    sets = [
        np.concatenate([true[: 10 if i < 4 else 5], between[: int(i < often)]])
        for i in range(12)
    ]
    rows = jnp.asarray(rows, float)
    dense = jnp.asarray(rng.normal(size=(500, 16)), float)
    for half, random in ((dense, rows), (rows, dense)):
        tables = GradientTables(
            norm_grads=half,
            direction_grads=random,
            planes=np.zeros((0, 16)),
            coordinates=WhiteCoordinates(np.eye(16), np.eye(16)),
            taps=None,
        )
        found, counts, explain, _ = agree_and_refine(sets, tables)
        assert explain
        assert counts.tolist() == [12] * 5 + [often] * kept + [4] * 5
        cosines = np.abs(found @ true.T)
        assert np.sum(cosines.max(1) > 0.999) == 10
        assert cosines.max(0).min() > 0.999
        assert (cosines[5].max() < 0.8) == kept


def test_mixtures_of_circles_are_left_out():
    planes = unit(np.random.default_rng(0).normal(size=(4, 9)))
    mixed = unit(np.random.default_rng(1).normal(size=(5, 4)) @ planes)
    beside = np.linalg.svd(planes)[2][4:]
    tilted = unit(mixed[0] + 0.2 * beside[0])  # .981 of it inside
    nearly = unit(mixed[0] + 0.1 * beside[0])  # .995
    rows = np.concatenate([mixed, beside, [tilted, nearly]])
    assert _outside_planes(rows, planes).tolist() == [False] * 5 + [True] * 6 + [False]
    assert _outside_planes(rows, planes[:0]).all()


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", TASKS)
def test_writers_are_the_readers_times_the_covariance(name):
    (result, inputs), subject = found(name), planted.subject_of(task(name))
    acts = subject.probed(subject.params, inputs, {})[1][subject.site]
    assert acts.shape == (SHORT.examples, TASKS[name]["dim"])
    spread = np.cov(np.asarray(acts, np.float64).T, bias=True)
    oracle = np.asarray(result.features.readers, np.float64) @ spread
    close = {"rtol": 1e-3, "atol": 1e-5 * np.abs(spread).max()}
    np.testing.assert_allclose(result.features.writers, oracle, **close)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_readers_are_found_in_badly_conditioned_coordinates(name):
    other = planted.recondition(jax.random.key(3), task(name), condition=100.0)
    result = ft.consensus(jax.random.key(1), planted.subject_of(other), config=SHORT)
    plain, moved = (
        ft.metrics.match_features(readers, truth.readers).coverage
        for readers, truth in (
            (found(name)[0].features.readers, task(name).truth),
            (result.features.readers, other.truth),
        )
    )
    assert moved >= plain - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", EQUIVARIANT)
def test_coverage_does_not_depend_on_the_coordinates(name, seed):
    """With the default settings, on five tasks, to a hundredth."""
    plain = EQUIVARIANT[name](jax.random.key(seed))
    matrix_key = jax.random.key(10 + seed)
    coverages = []
    for one in (plain, planted.recondition(matrix_key, plain, condition=100.0)):
        result = ft.consensus(jax.random.key(1), planted.subject_of(one))
        scores = ft.metrics.score_task(jax.random.key(2), one, result.features)
        coverages.append(scores.readers)
    assert abs(coverages[1] - coverages[0]) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("power", [0, -20, 20])
def test_the_unit_of_the_outputs_does_not_matter(power):
    result, _ = found("quiet_and_loud")
    subject = scaled(planted.subject_of(task("quiet_and_loud")), 2.0**power)
    again = ft.consensus(jax.random.key(1), subject, config=SHORT)
    np.testing.assert_array_equal(result.support, again.support)
    for one, two in zip(result.features[:2], again.features[:2], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_planes_come_last_and_have_no_support():
    waves = planted.modular_addition(
        jax.random.key(2), modulus=13, frequencies=2, dim=12
    )
    short = SHORT._replace(steps=20, ks=(1,), starts=3, latents_per_dim=(2,))
    result = ft.consensus(jax.random.key(1), planted.subject_of(waves), config=short)
    assert result.num_dictionaries == 6
    assert result.support[-4:].tolist() == [0] * 4
    assert np.all(result.support[:-4] >= 2)
    planes, truth = result.features.readers[-4:], waves.truth
    num = len(result.support) - 4
    expected = [*range(num), num, num, num + 1, num + 1]
    assert np.asarray(result.features.group).tolist() == expected
    inside = np.linalg.svd(planes, full_matrices=False)[2]
    others = np.linalg.norm(result.features.readers[:-4] @ inside.T, axis=1)
    assert others.max(initial=0.0) < 0.99
    assert (
        ft.metrics.match_features(planes, truth.readers, group=truth.group).coverage
        > 0.95
    )


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"support": 0}, r"wanted support in \(0, 1\], a share .* got 0 and 0.95"),
        ({"support": -0.5}, "got -0.5 and 0.95"),
        ({"support": 2}, "got 2 and 0.95"),
        ({"support": np.nan}, "got nan and 0.95"),
        ({"cosine": 0.0}, r"cosine in \(0, 1\), got None and 0.0"),
        ({"cosine": 1.0}, "got None and 1.0"),
    ],
)
def test_support_and_cosine_must_be_in_range(bad, match, key):
    with pytest.raises(ValueError, match=f"^consensus: .*{match}"):
        ft.consensus(
            key, planted.subject_of(task("product_space")), config=SHORT, **bad
        )


@pytest.mark.slow_cases
@pytest.mark.parametrize("factor", [0.0, np.nan])
def test_a_model_without_gradients_is_refused(factor, key):
    subject = scaled(planted.subject_of(task("product_space")), factor)
    short = SHORT._replace(examples=20)
    with pytest.raises(ValueError, match="consensus: gradients must be finite and not"):
        ft.consensus(key, subject, config=short)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_key_finds_the_readers_of_a_product_space(seed):
    """Smaller products are found with some keys only (docs/research.md, section 14)."""
    product = planted.product_space(jax.random.key(0))
    subject = planted.subject_of(product)
    config = SHORT._replace(batch_size=512)
    features = ft.consensus(jax.random.key(seed), subject, config=config).features
    match = ft.metrics.match_features(features.readers, product.truth.readers)
    assert match.coverage >= 0.99
    assert len(features.readers) == len(product.truth.readers)


@pytest.mark.slow
def test_stored_taps_give_what_the_subject_gives():
    result = found("product_space")[0]
    tap_key, train_key = jax.random.split(jax.random.key(1))
    size = {"examples": SHORT.examples, "num_directions": SHORT.num_directions}
    taps = tap_readouts(tap_key, planted.subject_of(task("product_space")), **size)
    again = consensus_of_taps(train_key, *taps, config=SHORT)
    np.testing.assert_array_equal(again.features.readers, result.features.readers)
    np.testing.assert_array_equal(again.features.strength, result.features.strength)
    # Examples of weight 0 may hold anything.
    filled = [
        x._replace(
            acts=jnp.concatenate([x.acts, jnp.full_like(x.acts[:3], jnp.nan)]),
            grads=jnp.concatenate([x.grads, jnp.full_like(x.grads[:3], 1e9)]),
            weights=jnp.concatenate([x.weights, jnp.zeros(3)]),
        )
        for x in taps
    ]
    again = consensus_of_taps(train_key, *filled, config=SHORT)
    np.testing.assert_array_equal(again.features.readers, result.features.readers)
    narrow = taps[1]._replace(grads=taps[1].grads[..., :-1])
    with pytest.raises(ValueError, match="taps must be of one site, got widths 16 and"):
        consensus_of_taps(train_key, taps[0], narrow, config=SHORT)


def test_strengths_are_those_of_mechanisms():
    """Of every mechanism once, they sum to 1."""
    features = found("product_space")[0].features
    first = np.unique(features.group, return_index=True)[1]
    assert np.sum(features.strength[first]) == pytest.approx(1)
    assert np.sum(np.asarray(features.strength) > 0.05) >= 10


@pytest.mark.slow
def test_planes_of_gated_units_are_mechanisms():
    """And their supports, strengths and writers are those of planes."""
    units = planted.gated_units(jax.random.key(0))
    result = ft.consensus(jax.random.key(1), planted.subject_of(units))
    truth, features = units.truth, result.features
    match = ft.metrics.match_mechanisms(
        features.readers, truth.readers, group=features.group, truth_group=truth.group
    )
    assert match.coverage > 0.99
    sizes = np.unique(np.asarray(features.group), return_counts=True)[1]
    assert sizes.tolist() == [2] * len(np.unique(np.asarray(truth.group)))
    for values in (features.strength, features.support):
        pairs = np.asarray(values).reshape(-1, 2)
        np.testing.assert_array_equal(pairs[:, 0], pairs[:, 1])


@pytest.mark.slow_cases
@pytest.mark.parametrize(("dim", "num"), [(16, 20_000), (576, 57_600)])
def test_wide_sites_are_tapped_at_more_examples(dim, num, key):
    subject = planted.subject_of(planted.overcomplete(key, dim=dim, features=dim))
    assert default_examples(key, subject) == num
