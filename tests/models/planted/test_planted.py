import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.models import planted
from toyfeat.worlds import HierarchyConfig
from toyfeat.worlds.config import ZipfianFiring

N = 24
FEW = {"steps": 300, "batch": 64}
ARGUMENTS = {
    "ignored_structure": {"dim": 16, "features": 5, "manifold": 4, "probability": 0.2},
    "tiled_curve": {"dim": 12, "harmonics": 5, "reads": 4},
    "product_space": {"dim": 9, "colours": 4, "shapes": 3},
    "quiet_and_loud": {"dim": 14, "quiet": 5, "loud": 9, "probability": 0.15},
    "overcomplete": {"dim": 16, "features": 20, "most": 0.3, "least": 0.1},
    "modular_addition": {"modulus": 11, "frequencies": 2, "dim": 15},
    "world_with_head": {
        "features": 40,
        "dim": 48,
        "read": 8,
        "composed": 4,
        "threshold": 0.2,
    },
    "squares": {"features": 3, "neurons": 12, **FEW},
    "circuits": {"features": 4, "neurons": 10, "each": 3, **FEW},
    "clipped circuits": {"features": 8, "neurons": 6, "each": 3, **FEW},
    "cross_layer": {"features": 5, "neurons": (6, 7), "each": 2, **FEW},
    "superposition": {"features": 5, "probability": 0.3, **FEW},
    "hidden identity": {"features": 5, "probability": 0.3, "identity": True, **FEW},
}
FUNCTIONS = {"clipped circuits": "circuits", "hidden identity": "superposition"}
HEADS = (
    "ignored_structure",
    "tiled_curve",
    "product_space",
    "quiet_and_loud",
    "overcomplete",
    "world_with_head",
)
SQUARES = ("squares", "circuits", "clipped circuits", "cross_layer")
TRAINED = (*SQUARES, "superposition", "hidden identity")
SHAPES = {  # of inputs, outputs, activations, features
    "ignored_structure": ({"codes": (N, 10), "angles": (N, 2)}, 5, 16, 5),
    "tiled_curve": ((N,), 4, 12, 4),
    "product_space": ((N, 7), 7, 9, 7),
    "quiet_and_loud": ((N, 14), 14, 14, 5),
    "overcomplete": ((N, 20), 20, 16, 20),
    "modular_addition": ((N, 2), 11, 15, 4),
    "world_with_head": ((N, 40), 12, 48, 12),
    "squares": ((N, 3), 3, 12, 3),
    "circuits": ((N, 4), 4, 10, 4),
    "clipped circuits": ((N, 8), 8, 6, 8),
    "cross_layer": ((N, 5), 5, 13, 5),
    "superposition": ((N, 5), 5, 2, 5),
    "hidden identity": ((N, 5), 5, 2, 5),
}
every = pytest.mark.parametrize("name", ARGUMENTS)
heads = pytest.mark.parametrize("name", HEADS)
trained = pytest.mark.parametrize("name", TRAINED)


def make_task(name, seed=0, **more):
    make = getattr(planted, FUNCTIONS.get(name, name))
    return make(jax.random.key(seed), **(ARGUMENTS[name] | more))


@functools.cache
def planted_task(name):
    return make_task(name)


def float64(x):
    return np.asarray(x, np.float64)


@functools.cache
def run(name, num=N):
    """Inputs, outputs, activations and features of a task."""
    task = planted_task(name)
    inputs = task.sample(jax.random.key(5), num)
    outputs, acts = task.probed(task.params, inputs, {})
    return inputs, outputs, acts[task.site], task.features(task.params, inputs)


@functools.cache
def jacobians(name):
    """``[N, O, D]``, of each example alone, through a probe that is added."""
    task = planted_task(name)

    def output(probe, example):
        inputs = jax.tree.map(lambda x: x[None], example)
        return task.probed(task.params, inputs, {task.site: probe[None]})[0][0]

    zero = jnp.zeros(task.truth.readers.shape[1])
    return float64(jax.vmap(jax.jacrev(output), in_axes=(None, 0))(zero, run(name)[0]))


def parts(name):
    """Rows that the model reads, what each adds to the outputs, and its slope there."""
    task, acts = planted_task(name), float64(run(name)[2])
    params, rows = task.params, float64(task.truth.readers)
    if name in HEADS:
        rows = np.concatenate([rows, float64(params["readers"])[len(rows) :]])
        adds = float64(params["gain"])[:, None] * float64(params["mix"])
        margin = acts @ rows.T - float64(params["threshold"])
    elif name == "modular_addition":
        adds = float64(task.truth.writers) @ float64(params["unembed"])
        margin = np.ones((N, len(rows)))
    elif name in SQUARES:
        adds = float64(params["mix"])
        margin = np.ones((N, len(rows)))
        if name == "clipped circuits":
            margin = acts @ rows.T + float64(params["out"])
    else:
        adds, margin = np.eye(len(rows)), acts @ rows.T + float64(params["bias"])
    assert np.abs(margin).min() > 1e-6  # else single precision decides who is on
    return rows, adds, margin > 0


@pytest.mark.slow_cases
@every
def test_shapes(name):
    task = planted_task(name)
    inputs, outputs, acts, features = run(name)
    wanted, width, dim, num = SHAPES[name]
    assert jax.tree.map(jnp.shape, inputs) == wanted
    assert outputs.shape == (N, width)
    assert acts.shape == (N, dim)
    assert features.shape == (N, num)
    assert task.truth.readers.shape == task.truth.writers.shape == (num, dim)
    assert task.truth.frequency.shape == (num,)
    assert task.side == "readers"
    assert isinstance(task.fit, float)
    assert all(isinstance(x, str) and x for x in (task.name, task.about, task.limits))


@pytest.mark.slow_cases
@every
def test_the_key_decides_the_task(name):
    task, same, other = planted_task(name), make_task(name), make_task(name, 1)
    for field in ("params", "truth", "ignored", "fit"):
        leaves = (jax.tree.leaves(getattr(x, field)) for x in (task, same))
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.abs(task.truth.readers - other.truth.readers).max() > 0.01


@pytest.mark.slow_cases
@every
def test_samples_are_keyed_and_can_be_compiled(name):
    task = planted_task(name)
    sample = jax.jit(task.sample, static_argnums=1)
    draws = run(name)[0], sample(jax.random.key(5), N), sample(jax.random.key(6), N)
    for a, b, c in zip(*map(jax.tree.leaves, draws), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        assert np.any(np.asarray(b) != np.asarray(c))


@pytest.mark.slow_cases
@every
def test_examples_do_not_mix(name):
    task = planted_task(name)
    ft.check_no_mixing(task.probed, task.params, run(name)[0])


@every
def test_a_subject_holds_no_truth(name):
    task = planted_task(name)
    subject = planted.subject_of(task)
    assert type(subject) is ft.Subject
    assert subject._fields == ("probed", "params", "sample", "site")
    assert all(a is b for a, b in zip(subject, task, strict=False))


@pytest.mark.slow_cases
@every
def test_gradients_are_sums_of_the_readers_that_are_active(name):
    rows, adds, active = parts(name)
    assert active.any(0).sum() >= len(rows) / 3
    oracle = np.einsum("nf,fo,fd->nod", active, adds, rows)
    found = jacobians(name)
    np.testing.assert_allclose(found, oracle, atol=1e-5 * np.abs(oracle).max())


@pytest.mark.slow_cases
@every
def test_active_readers_and_gradients_span_the_same(name):
    rows, adds, active = parts(name)
    weighted = rows * np.linalg.norm(adds, axis=1, keepdims=True)
    active = np.abs(active) > 1e-6 * np.abs(active).max()
    for jacobian, on in zip(jacobians(name), active, strict=True):
        if not on.any():
            assert np.all(jacobian == 0)
            continue
        _, size, vt = np.linalg.svd(weighted[on], full_matrices=False)
        vt = vt[size > 1e-4 * size[0]]
        left = jacobian - jacobian @ vt.T @ vt
        assert np.linalg.norm(left) < 1e-4 * np.linalg.norm(jacobian)
        rank = np.linalg.matrix_rank(jacobian, tol=1e-4 * np.linalg.norm(jacobian, 2))
        assert rank == len(vt)


@pytest.mark.slow_cases
@heads
def test_features_are_what_passes_the_thresholds(name):
    task = planted_task(name)
    _, outputs, acts, features = run(name)
    margin = float64(acts) @ float64(task.truth.readers).T
    margin -= float64(task.params["threshold"])[: margin.shape[1]]
    np.testing.assert_allclose(features, np.maximum(margin, 0), atol=1e-5)
    if len(task.params["gain"]) == margin.shape[1]:
        unmixed = float64(outputs) @ float64(task.params["mix"]).T
        np.testing.assert_allclose(unmixed, np.maximum(margin, 0), atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("ignored_structure", lambda x: x["codes"].reshape(-1, 5, 2).sum(2)),
        ("product_space", lambda x: x),
        ("quiet_and_loud", lambda x: x[:, :5]),
        ("squares", lambda x: x),
        ("circuits", lambda x: x),
        ("clipped circuits", lambda x: x),
        ("cross_layer", lambda x: x),
        ("superposition", lambda x: x),
    ],
)
def test_features_are_active_where_their_inputs_are_not_zero(name, codes):
    inputs, _, _, features = run(name)
    np.testing.assert_array_equal(float64(features) > 0, float64(codes(inputs)) != 0)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "name",
    [n for n in ARGUMENTS if n != "modular_addition"],
)
def test_frequency_is_how_often_features_are_active(name):
    num = 20_000
    rate = (float64(run(name, num)[3]) > 0).mean(0)
    stated = float64(planted_task(name).truth.frequency)
    error = np.sqrt(stated * (1 - stated) / num)
    assert np.all(np.abs(rate - stated) <= 4.5 * error)


@pytest.mark.parametrize(
    "name", ["ignored_structure", "product_space", "quiet_and_loud", "modular_addition"]
)
def test_every_reader_sees_its_own_writer_alone(name):
    truth = planted_task(name).truth
    seen = float64(truth.readers) @ float64(truth.writers).T
    np.testing.assert_allclose(seen, np.eye(len(seen)), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["ignored_structure", "quiet_and_loud", "modular_addition"]
)
def test_ignored_rows_are_orthonormal_and_no_reader_leans_into_them(name):
    task = planted_task(name)
    rows = float64(task.ignored)
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-5)
    readers = float64(task.truth.readers)
    readers /= np.linalg.norm(readers, axis=1, keepdims=True)
    np.testing.assert_allclose(rows @ readers.T, 0, atol=1e-5)


def moved(name, size):
    """Activations moved along the ignored rows, and outputs before and after."""
    task = planted_task(name)
    inputs, outputs, _, _ = run(name)
    along = np.random.default_rng(0).normal(size=(N, len(task.ignored)))
    move = jnp.asarray(size * along @ float64(task.ignored), outputs.dtype)
    after, _ = task.probed(task.params, inputs, {task.site: move})
    return float64(move), float64(outputs), float64(after)


@pytest.mark.parametrize("name", ["ignored_structure", "modular_addition"])
def test_outputs_do_not_change_along_ignored_rows(name):
    move, before, after = moved(name, 3.0)
    assert np.linalg.norm(move, axis=1).min() > 2
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_the_effect_of_what_is_loud_is_bounded_by_its_idleness():
    task = planted_task("quiet_and_loud")
    move, before, after = moved("quiet_and_loud", 3.0)
    unmixed = (after - before) @ float64(task.params["mix"]).T
    loud = float64(task.params["readers"])[5:]
    assert np.all(np.abs(unmixed[:, 5:]) <= 0.02 * np.abs(move @ loud.T) + 1e-5)
    np.testing.assert_allclose(unmixed[:, :5], 0, atol=1e-4)
    assert np.abs(unmixed[:, 5:]).max() > 0.01


def angles_on_a_grid(num):
    turn = 2 * np.pi * np.arange(num) / num
    return np.stack(np.meshgrid(turn, turn), axis=2).reshape(-1, 2)


def test_ignored_structure_is_writers_and_a_torus():
    task = planted_task("ignored_structure")
    inputs, _, acts, _ = run("ignored_structure")
    u, v = float64(inputs["angles"]).T
    torus = np.stack([np.cos(u), np.cos(v), np.sin(u), np.sin(v)], axis=1)
    torus = 4.0 * np.sqrt(2 / 4) * torus @ float64(task.ignored)
    writers = float64(task.params["writers"])
    oracle = float64(inputs["codes"]) @ writers + torus
    np.testing.assert_allclose(acts, oracle, atol=1e-5)
    lean = writers @ float64(task.ignored).T
    np.testing.assert_allclose(np.linalg.norm(lean, axis=1), 1.0, rtol=1e-5)


def test_ignored_structure_reads_every_source_of_a_sum_alike():
    task = planted_task("ignored_structure")
    writers = float64(task.params["writers"])
    seen = float64(task.truth.readers) @ writers.T
    np.testing.assert_allclose(seen, np.repeat(np.eye(5), 2, axis=1), atol=1e-5)
    both = writers[::2] / 2 + writers[1::2] / 2
    np.testing.assert_allclose(task.truth.writers, both, atol=1e-6)


@pytest.mark.slow_cases
@pytest.mark.parametrize("manifold", [2, 8, 12])
def test_the_surface_has_the_same_spread_in_all_of_its_dimensions(manifold):
    task = make_task("ignored_structure", dim=26, manifold=manifold, size=3.0, tilt=0.5)
    angles = angles_on_a_grid(12)
    inputs = {"codes": np.zeros((len(angles), 10)), "angles": angles}
    inputs = jax.tree.map(lambda x: jnp.asarray(x, float), inputs)
    acts = task.probed(task.params, inputs, {})[1][task.site]
    inside = float64(acts) @ float64(task.ignored).T
    np.testing.assert_allclose(inside.mean(0), 0, atol=1e-4)
    spread = inside.T @ inside / len(inside)
    np.testing.assert_allclose(spread, 9 / manifold * np.eye(manifold), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(float64(acts), axis=1), 3.0, rtol=1e-4)
    lean = float64(task.params["writers"]) @ float64(task.ignored).T
    np.testing.assert_allclose(np.linalg.norm(lean, axis=1), 0.5, rtol=1e-4)


def on_the_curve(share, decay=0.5):
    task = make_task("tiled_curve", share=share, decay=decay)
    turn = jnp.asarray(2 * np.pi * np.arange(2000) / 2000, float)
    acts = float64(task.probed(task.params, turn, {})[1][task.site])
    return task, float64(turn), acts, float64(task.features(task.params, turn)) > 0


def test_tiled_curve_is_a_closed_curve_with_decaying_harmonics():
    task, turn, acts, _ = on_the_curve(0.2, 0.8)
    curve = float64(task.params["curve"])
    sizes = np.tile(np.arange(1, 6) ** -0.8, 2)
    np.testing.assert_allclose(curve @ curve.T, np.diag(sizes**2), atol=1e-5)
    oracle = sum(
        np.cos(h * turn)[:, None] * curve[h - 1]
        + np.sin(h * turn)[:, None] * curve[h + 4]
        for h in range(1, 6)
    )
    np.testing.assert_allclose(acts, oracle, atol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_curve_readers_are_active_on_the_share_that_lies_farthest(share):
    task, _, acts, active = on_the_curve(share)
    np.testing.assert_allclose(active.mean(0), share, atol=2e-3)
    along = acts @ float64(task.truth.readers).T
    for on, far in zip(active.T, along.T, strict=True):
        assert far[on].min() > far[~on].max()


def test_curve_writers_are_the_readers_times_the_covariance():
    task, _, acts, _ = on_the_curve(0.2)
    oracle = float64(task.truth.readers) @ np.cov(acts.T, bias=True)
    np.testing.assert_allclose(task.truth.writers, oracle, atol=1e-5)
    lengths = np.linalg.norm(float64(task.truth.readers), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("ignored_structure", lambda x: x["codes"].reshape(-1, 5, 2).sum(2)),
        ("product_space", lambda x: x),
        ("quiet_and_loud", lambda x: x[:, :5]),
    ],
)
def test_a_feature_is_what_a_reader_reads_above_its_threshold(name, sources):
    task = make_task(name, threshold=0.4)
    inputs = task.sample(jax.random.key(1), 200)
    oracle = np.maximum(float64(sources(inputs)) - 0.4, 0)
    got = task.features(task.params, inputs)
    np.testing.assert_allclose(got, oracle, atol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "name",
    [
        "ignored_structure",
        "tiled_curve",
        "product_space",
        "quiet_and_loud",
        "modular_addition",
    ],
)
def test_tasks_that_are_written_down_are_made_under_jit(name):
    def arrays(key):
        task = getattr(planted, name)(key, **ARGUMENTS[name])
        return task.params, task.truth, task.ignored

    key = jax.random.key(5)
    for eager, compiled in zip(
        jax.tree.leaves(arrays(key)),
        jax.tree.leaves(jax.jit(arrays)(key)),
        strict=True,
    ):
        np.testing.assert_allclose(eager, compiled, rtol=1e-4, atol=1e-4)
    mapped = jax.vmap(arrays)(jax.random.split(key, 3))
    assert jax.tree.leaves(mapped)[0].shape[0] == 3


@pytest.mark.parametrize("embedding", [0.0, 3.0])
def test_summands_are_as_long_as_they_are_asked_to_be(embedding):
    task = make_task("modular_addition", embedding=embedding)
    _, acts = task.probed(task.params, task.sample(jax.random.key(1), 9), {})
    parts = float64(acts[task.site]) @ float64(task.ignored).T
    waves = parts.reshape(9, -1, 2)
    np.testing.assert_allclose(np.linalg.norm(waves, axis=2), embedding, atol=1e-5)


@pytest.mark.slow
def test_a_world_may_have_other_trees_and_rates():
    often = ZipfianFiring(max_prob=0.5, min_prob=0.4)
    trees = HierarchyConfig(total_root_nodes=1, branching_factor=2, max_depth=1)
    rates = [
        float(jnp.mean(task.sample(jax.random.key(1), 500) > 0))
        for task in (
            make_task("world_with_head"),
            make_task("world_with_head", firing=often, hierarchy=trees),
        )
    ]
    assert rates[1] > 0.3 > 0.1 > rates[0]


def test_product_space_has_one_colour_and_one_shape_of_one_size():
    inputs, _, acts, features = run("product_space", 2000)
    inputs = float64(inputs)
    active = float64(features) > 0
    np.testing.assert_array_equal(active[:, :4].sum(1), 1)
    np.testing.assert_array_equal(active[:, 4:].sum(1), 1)
    pairs = {tuple(np.flatnonzero(row)) for row in active}
    assert pairs == set(itertools.product(range(4), range(4, 7)))
    size = inputs.max(1)
    np.testing.assert_array_equal(inputs.sum(1), 2 * size)
    assert 0.5 <= size.min() < 0.55 < 1.45 < size.max() <= 1.5
    oracle = inputs @ float64(planted_task("product_space").truth.writers)
    np.testing.assert_allclose(acts, oracle, atol=1e-5)


@pytest.mark.parametrize(("quietness", "idleness"), [(0.1, 0.02), (0.03, 0.2)])
def test_quiet_and_loud_have_the_stated_lengths_and_effects(quietness, idleness):
    task = make_task("quiet_and_loud", quietness=quietness, idleness=idleness)
    writers = float64(task.params["writers"])
    np.testing.assert_array_equal(writers[:5], task.truth.writers)
    stated = np.repeat([quietness, 1.0], [5, 9])
    np.testing.assert_allclose(np.linalg.norm(writers, axis=1), stated, rtol=1e-5)
    codes = np.eye(14) * 1.3
    inputs = jnp.asarray(codes, float)
    outputs, acts = task.probed(task.params, inputs, {})
    np.testing.assert_allclose(acts[task.site], codes @ writers, atol=1e-5)
    own = np.diag(float64(outputs) @ float64(task.params["mix"]).T)
    effect = 1.2 * np.repeat([1.0, idleness], [5, 9])  # 1.3 less the threshold
    np.testing.assert_allclose(own, effect, rtol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize(("modulus", "frequencies"), [(11, 2), (23, 11)])
def test_modular_addition_adds(modulus, frequencies):
    task = make_task(
        "modular_addition",
        modulus=modulus,
        frequencies=frequencies,
        dim=6 * frequencies,
    )
    pairs = np.array(list(itertools.product(range(modulus), repeat=2)))
    logits = float64(task.probed(task.params, jnp.asarray(pairs, jnp.int32), {})[0])
    sums = pairs.sum(1) % modulus
    np.testing.assert_array_equal(logits.argmax(1), sums)
    shifted = np.stack([np.roll(x, -s) for x, s in zip(logits, sums, strict=True)])
    np.testing.assert_allclose(shifted - shifted[0], 0, atol=1e-4)
    waves = np.abs(np.fft.rfft(shifted[0])) / modulus
    frequencies = np.flatnonzero(waves > 0.01)
    turns = float64(task.params["angle"]) * modulus / (2 * np.pi)
    np.testing.assert_allclose(turns, frequencies, atol=1e-4)
    sizes = waves[frequencies]
    assert np.all((sizes >= 0.35 - 1e-4) & (sizes <= 0.65 + 1e-4))


def test_modular_addition_writes_planes_and_the_embeddings_of_its_summands():
    task = planted_task("modular_addition")
    pairs, _, acts, features = run("modular_addition")
    angle = float64(task.params["angle"])

    def waves(number):
        phase = number[:, None] * angle
        return np.stack([np.cos(phase), np.sin(phase)], axis=2).reshape(N, 4)

    a, b = float64(pairs).T
    np.testing.assert_allclose(features, waves(a + b), atol=1e-5)
    embedded = np.concatenate([waves(a), waves(b)], axis=1) @ float64(task.ignored)
    oracle = waves(a + b) @ float64(task.truth.writers) + 2 * embedded
    np.testing.assert_allclose(acts, oracle, atol=1e-5)


def test_groups_of_modular_addition_are_circles_that_any_basis_describes():
    task = planted_task("modular_addition")
    group = float64(task.truth.group)
    features = float64(run("modular_addition")[3])
    np.testing.assert_array_equal(group, [0, 0, 1, 1])
    for plane in (0, 1):
        radius = np.linalg.norm(features[:, group == plane], axis=1)
        np.testing.assert_allclose(radius, 1, rtol=1e-5)
    turn = np.array([[0.8, 0.6], [-0.6, 0.8]])
    rows = float64(task.truth.readers)
    rows = np.concatenate([turn @ rows[:2], turn @ rows[2:]])
    assert ft.metrics.match_features(rows, task.truth.readers).coverage < 0.95
    match = ft.metrics.match_features(rows, task.truth.readers, group=task.truth.group)
    assert match.coverage == pytest.approx(1, abs=1e-5)


def test_a_world_is_read_alone_and_in_normalised_sums():
    task = planted_task("world_with_head")
    inputs, _, acts, _ = run("world_with_head")
    world = float64(task.params["world"].feature_vectors)
    np.testing.assert_allclose(acts, float64(inputs) @ world, atol=1e-5)
    readers = float64(task.truth.readers)
    assert len(readers) == 8 + 4
    np.testing.assert_allclose(np.linalg.norm(readers, axis=1), 1, rtol=1e-5)
    weights = np.linalg.lstsq(world.T, readers.T, rcond=None)[0].T
    np.testing.assert_allclose(weights @ world, readers, atol=1e-5)
    used = np.abs(weights) > 1e-4
    np.testing.assert_array_equal(used.sum(1), [1] * 8 + [3] * 4)
    assert used.sum(0).max() == 1
    for row, parts in zip(weights, used, strict=True):
        np.testing.assert_allclose(row[parts], row[parts].max(), rtol=1e-3)
    np.testing.assert_allclose(weights[:8].max(1), 1, rtol=1e-4)
    assert task.ignored is None


@pytest.mark.parametrize("name", SQUARES)
def test_writers_of_squares_are_the_readers_times_the_covariance(name):
    acts = float64(run(name, 20_000)[2])
    truth = planted_task(name).truth
    oracle = float64(truth.readers) @ np.cov(acts.T)
    scale = np.linalg.norm(oracle, axis=1).max()
    np.testing.assert_allclose(truth.writers, oracle, atol=0.05 * scale)
    sizes = np.linalg.norm(oracle, axis=1), np.linalg.norm(truth.writers, axis=1)
    cosines = np.sum(oracle * float64(truth.writers), axis=1) / sizes[0] / sizes[1]
    assert cosines.min() > 0.99


@trained
def test_fit_is_the_share_of_the_variance_that_is_left(name):
    inputs, outputs, _, _ = run(name, 20_000)
    wanted = float64(inputs)
    if name in SQUARES:
        wanted = wanted**2 @ float64(planted_task(name).params["mix"])
    left = np.sum((float64(outputs) - wanted) ** 2)
    share = left / np.sum((wanted - wanted.mean(0)) ** 2)
    assert planted_task(name).fit == pytest.approx(share, rel=0.05)
    assert 0 < share < 0.9


@pytest.mark.parametrize("name", [*HEADS, "modular_addition"])
def test_what_is_defined_and_not_trained_leaves_nothing(name):
    assert planted_task(name).fit == 0.0


def test_training_learns():
    short, long = make_task("squares", steps=30), make_task("squares", steps=600)
    assert long.fit < short.fit / 2


@pytest.mark.slow_cases
@pytest.mark.parametrize(("features", "clipped"), [(5, False), (6, True), (8, True)])
def test_circuits_are_clipped_from_as_many_features_as_neurons(features, clipped):
    task = make_task("clipped circuits", features=features, steps=40)
    x = task.sample(jax.random.key(1), 300)
    unmixed = (
        float64(task.probed(task.params, x, {})[0]) @ float64(task.params["mix"]).T
    )
    assert (unmixed.min() > -1e-5) == clipped


def test_inputs_of_squares_are_uniform_and_sparse_as_stated():
    dense = float64(run("squares", 20_000)[0])
    assert -0.5 <= dense.min() < -0.49 < 0.99 < dense.max() <= 1
    assert dense.mean() == pytest.approx(0.25, abs=0.01)
    sparse = float64(run("circuits", 20_000)[0])
    assert (sparse != 0).mean() == pytest.approx(1 / 4, abs=0.01)
    cross = float64(run("cross_layer", 20_000)[0])
    assert (cross != 0).mean() == pytest.approx(1.5 / 5, abs=0.01)


def test_sparse_codes_are_uniform_from_a_half_to_one_and_a_half():
    for codes in (
        run("ignored_structure", 20_000)[0]["codes"],
        run("quiet_and_loud", 20_000)[0],
    ):
        size = float64(codes)[float64(codes) != 0]
        assert 0.5 <= size.min() < 0.51 < 1.49 < size.max() <= 1.5
        assert size.mean() == pytest.approx(1, abs=0.01)


def test_every_input_enters_as_many_neurons_as_stated():
    for name, each in (("circuits", 3), ("cross_layer", 2)):
        num = SHAPES[name][3]
        for layer in planted_task(name).params["layers"]:
            enters = float64(layer["weight"])[:num] != 0
            np.testing.assert_array_equal(enters.sum(1), each)
    assert np.all(float64(planted_task("squares").params["layers"][0]["weight"]) != 0)


def test_the_second_layer_reads_neurons_of_the_same_features():
    first, second = planted_task("cross_layer").params["layers"]
    enters_first = float64(first["weight"]) != 0
    enters_second = float64(second["weight"])[:5] != 0
    reads = float64(second["weight"])[5:] != 0
    for i, j in itertools.product(range(6), range(7)):
        assert reads[i, j] == np.any(enters_first[:, i] & enters_second[:, j])


def test_the_site_of_cross_layer_is_both_layers():
    params = planted_task("cross_layer").params
    x, outputs, acts, _ = run("cross_layer")
    first, second = params["layers"]
    pre_first = float64(x) @ float64(first["weight"]) + float64(first["bias"])
    both = np.concatenate([float64(x), np.maximum(pre_first, 0)], axis=1)
    pre_second = both @ float64(second["weight"]) + float64(second["bias"])
    oracle = np.maximum(np.concatenate([pre_first, pre_second], axis=1), 0)
    np.testing.assert_allclose(acts, oracle, atol=1e-5)
    linear = oracle @ float64(params["readers"]).T @ float64(params["mix"])
    np.testing.assert_allclose(outputs, linear, atol=1e-5)


def test_superposition_writes_and_reads_the_same_rows():
    task = planted_task("superposition")
    x, outputs, acts, features = run("superposition")
    rows = float64(task.truth.readers)
    np.testing.assert_array_equal(rows, task.truth.writers)
    np.testing.assert_allclose(acts, float64(x) @ rows, atol=1e-5)
    oracle = np.maximum(float64(acts) @ rows.T + float64(task.params["bias"]), 0)
    np.testing.assert_allclose(outputs, oracle, atol=1e-5)
    np.testing.assert_array_equal(features, x)


def test_a_hidden_identity_changes_nothing_and_has_a_site_of_its_own():
    task = planted_task("hidden identity")
    _, outputs, acts, _ = run("superposition")
    x, same, _, _ = run("hidden identity")
    np.testing.assert_allclose(same, outputs, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        task.truth.readers, planted_task("superposition").params["weight"]
    )
    sites = task.probed(task.params, x, {})[1]
    assert set(sites) == {"hidden", "after"}
    for site in sites.values():
        np.testing.assert_allclose(site, acts, rtol=1e-5, atol=1e-6)


ERRORS = [
    ("overcomplete", {"least": 0.4}, "most 0.3"),
    ("overcomplete", {"features": 1}, "features 1"),
    ("overcomplete", {"threshold": -0.1}, r"threshold in 0 \.\. 0.5, got -0.1"),
    ("ignored_structure", {"manifold": 3}, "wanted an even manifold >= 2"),
    ("ignored_structure", {"threshold": 0.7}, r"threshold in 0 \.\. 0.5, got 0.7"),
    ("product_space", {"threshold": -0.1}, r"threshold in 0 \.\. 0.5, got -0.1"),
    ("quiet_and_loud", {"threshold": np.nan}, r"threshold in 0 \.\. 0.5, got nan"),
    ("modular_addition", {"embedding": -1.0}, r"embedding in 0 \.\. 1000, got -1.0"),
    ("ignored_structure", {"manifold": 0}, "dim 16, manifold 0, features 5"),
    ("ignored_structure", {"features": 7}, "manifold 4, features 7, parts 2"),
    ("ignored_structure", {"parts": 0}, "features 5, parts 0"),
    ("ignored_structure", {"probability": 0.0}, "probability 0.0"),
    ("quiet_and_loud", {"quietness": 0.0}, "quietness 0.0"),
    ("quiet_and_loud", {"probability": 1.5}, "probability 1.5"),
    ("cross_layer", {"neurons": (4, 4, 4)}, "wanted neurons of two layers"),
    ("cross_layer", {"neurons": 4}, "wanted neurons of two layers, got 4"),
    *(
        ("ignored_structure", {knob: bad}, r"size and tilt in 0 \.\. 1000, got size ")
        for knob in ("size", "tilt")
        for bad in (np.nan, np.inf, -1.0, 1e30)
    ),
    *(
        ("tiled_curve", {"decay": bad}, rf"decay in -10 \.\. 10, got {bad}")
        for bad in (np.nan, np.inf, -20.0)
    ),
    ("quiet_and_loud", {"quietness": np.inf}, "quietness inf, idleness 0.02"),
    ("quiet_and_loud", {"quietness": 1e-6}, r"quietness in 1e-4 \.\. 1e4"),
    ("quiet_and_loud", {"idleness": np.nan}, "idleness nan"),
    ("quiet_and_loud", {"idleness": np.inf}, "idleness inf"),
    ("world_with_head", {"threshold": np.nan}, "finite threshold, got dim 48, "),
    ("world_with_head", {"threshold": 50.0}, r"no feature passes .* 50.0; lower it"),
    ("world_with_head", {"dim": 0}, "dim of at least 1 .*, got dim 0"),
    ("squares", {"low": -np.inf}, "the fit is nan, wanted a low nearer to 0"),
    ("circuits", {"probability": 1e-30}, "or a larger probability, got Spec"),
    ("superposition", {"probability": 1e-30}, "wanted a larger probability, got 1e-30"),
    ("modular_addition", {"modulus": 9}, "odd prime modulus"),
    ("ignored_structure", {"features": 0}, "manifold 4, features 0"),
    ("tiled_curve", {"harmonics": 7}, r"wanted dim >= 2 \* harmonics"),
    ("tiled_curve", {"harmonics": 0}, "dim 12, harmonics 0, reads 4"),
    ("tiled_curve", {"reads": 0}, "reads 0, share 0.2"),
    ("tiled_curve", {"share": 0.0}, r"share in \(0, 1\)"),
    ("tiled_curve", {"share": 1.0}, "share 1.0"),
    ("product_space", {"colours": 1}, "at least 2, .* got 1, 3 and dim 9"),
    ("product_space", {"shapes": 1}, "got 4, 1 and dim 9"),
    ("product_space", {"dim": 6}, "at most dim, got 4, 3 and dim 6"),
    ("quiet_and_loud", {"quiet": 0}, r"wanted quiet in 1 \.\. dim - 1"),
    ("quiet_and_loud", {"quiet": 14}, "got dim 14, quiet 14, loud 9"),
    ("quiet_and_loud", {"loud": 0}, "got dim 14, quiet 5, loud 0"),
    ("modular_addition", {"modulus": 10}, "wanted an odd prime .* got 10 and 2"),
    ("modular_addition", {"frequencies": 0}, "frequencies, got 11 and 0"),
    ("modular_addition", {"frequencies": 6}, "frequencies, got 11 and 6"),
    ("modular_addition", {"dim": 11}, r"dim >= 6 \* frequencies = 12, got 11"),
    ("world_with_head", {"read": 29}, "<= features = 40, got 29, 4, 3"),
    ("world_with_head", {"read": 0}, "at least one of read, composed and parts"),
    ("world_with_head", {"composed": 0}, "got 8, 0, 3"),
    ("world_with_head", {"parts": 0}, "got 8, 4, 0"),
    ("superposition", {"features": 0}, "sizes must be at least 1, .* features 0"),
    ("superposition", {"hidden": 0}, "hidden 0"),
    ("superposition", {"steps": 0}, "steps 0"),
    ("superposition", {"batch": 0}, "batch 0"),
    ("superposition", {"probability": 0.0}, r"probability in \(0, 1\]"),
    ("superposition", {"probability": 1.1}, "probability 1.1"),
    ("circuits", {"each": 11}, r"each must be in 0 \.\. 10, got 11"),
    ("circuits", {"each": -1}, "got -1"),
    ("cross_layer", {"each": 7}, r"each must be in 0 \.\. 6, got 7"),
    ("cross_layer", {"neurons": (0, 3)}, "sizes must be at least 1"),
    *(
        (name, bad, "sizes must be at least 1, the probability in")
        for name in ("squares", "circuits", "cross_layer")
        for bad in (
            {"features": 0},
            {"steps": 0},
            {"batch": 0},
            {"probability": 0.0},
            {"probability": 1.5},
            {"low": 1.0},
        )
    ),
    ("squares", {"neurons": 0}, "sizes must be at least 1"),
]


@pytest.mark.slow_cases
@pytest.mark.parametrize(("name", "bad", "match"), ERRORS)
def test_errors(name, bad, match):
    with pytest.raises(ValueError, match=f"^{name}: .*{match}"):
        make_task(name, **bad)


@pytest.mark.parametrize(
    ("name", "bad", "match"),
    [
        ("ignored_structure", {"features": 5.0}, "features must be an int, got 5.0"),
        ("tiled_curve", {"reads": 4.0}, "reads must be an int, got 4.0"),
        ("product_space", {"dim": 9.5}, "dim must be an int, got 9.5"),
        ("quiet_and_loud", {"loud": "many"}, "loud must be an int, got 'many'"),
        ("modular_addition", {"modulus": 11.0}, "modulus must be an int, got 11.0"),
        ("world_with_head", {"parts": 3.0}, "parts must be an int, got 3.0"),
        ("squares", {"neurons": (3, 4)}, r"neurons must be an int, got \(3, 4\)"),
        ("squares", {"batch": 1.5}, "batch must be an int, got 1.5"),
        ("circuits", {"neurons": (10,)}, r"neurons must be an int, got \(10,\)"),
        ("circuits", {"each": 1.5}, "each must be an int, got 1.5"),
        ("cross_layer", {"neurons": (6, 7.0)}, "neurons must be an int, got 7.0"),
        ("superposition", {"hidden": 2.0}, "hidden must be an int, got 2.0"),
    ],
)
def test_sizes_are_ints(name, bad, match):
    with pytest.raises(TypeError, match=f"^{name}: {match}; pass an int"):
        make_task(name, **bad)


def test_what_is_loud_may_have_no_effect_at_all():
    task = make_task("quiet_and_loud", idleness=0.0)
    assert task.about.endswith("than 9 others, which have no effect.")
    x = task.sample(jax.random.key(1), N)
    y, acts = task.probed(task.params, x, {})
    loud = jnp.asarray(float64(task.ignored[:1]).repeat(N, 0), acts[task.site].dtype)
    moved, _ = task.probed(task.params, x, {task.site: 3 * loud})
    np.testing.assert_allclose(moved, y, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["world_with_head", "product_space"])
def test_a_task_can_be_made_in_double_precision(name):
    with jax.enable_x64(True):
        task = make_task(name)
        x = task.sample(jax.random.key(1), N)
        y, acts = task.probed(task.params, x, {})
        arrays = (y, acts[task.site], task.features(task.params, x), *task.truth[:3])
        assert {str(array.dtype) for array in arrays} == {"float64"}
