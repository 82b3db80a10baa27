import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats

from toyfeat import worlds
from toyfeat.worlds.bits import fraction, normal, normal_cdf, threefry, uniform
from toyfeat.worlds.sampling import dense_codes
from toyfeat.worlds.world import orthogonalize

RUN = {
    name: jax.jit(getattr(worlds, name), static_argnums=2)
    for name in ("world_acts", "world_batch", "world_codes")
}
DENSE = jax.jit(dense_codes, static_argnums=2)
SAMPLERS = {
    "as it comes": RUN["world_codes"],
    "dense": lambda key, world, num: DENSE(jax.random.bits(key, (2,)), world, num),
}
N = 60_000
TREES = worlds.HierarchyConfig(2, 3, 2, 1.0, scale_children_by_parent=True)


@pytest.fixture(scope="module")
def treed():
    return worlds.synthetic_world(
        jax.random.key(0),
        32,
        6,
        firing_probability=worlds.LinearFiring(0.6, 0.2),
        hierarchy=TREES,
        correlation=worlds.CorrelationConfig(2, 0.3),
        mean_firing_magnitudes=worlds.LinearMagnitude(2.0, 1.0),
        std_firing_magnitudes=worlds.FoldedNormalMagnitude(0.5, 0.5),
        bias=0.5,
    )


def check(found, wanted, variance, num=N):
    """Means of samples against what they should be, in standard errors."""
    score = (np.asarray(found) - wanted) / np.sqrt(variance / num)
    assert np.abs(score).max() < 5.0
    assert np.sqrt(np.mean(score**2)) < 1.6


def rates(codes):
    return (np.asarray(codes) > 0).mean(0)


def test_words_are_those_of_jax():
    seed = jnp.asarray([7, 2**32 - 5], jnp.uint32)
    counters = jax.random.bits(jax.random.key(0), (2, 50))
    want = threefry_2x32(seed, counters.reshape(-1))
    np.testing.assert_array_equal(jnp.concatenate(threefry(seed, *counters)), want)


def test_uniforms_and_normals_are_so():
    word = jax.random.bits(jax.random.key(0), (N,))
    ends = jnp.asarray([0, 2**32 - 1], jnp.uint32)
    assert 0 < uniform(ends)[0] < uniform(ends)[1] < 1
    assert fraction(ends)[0] == 0
    for drawn in (uniform(word), fraction(word)):
        assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    assert stats.kstest(normal(word), "norm").pvalue > 1e-3


def test_the_normal_distribution_is_right_in_its_tail():
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    np.testing.assert_allclose(normal_cdf(x), stats.norm.cdf(x.astype(float)), 1e-5)
    ends = normal_cdf(jnp.asarray([-jnp.inf, jnp.inf]))
    np.testing.assert_array_equal(ends, [0.0, 1.0])


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "firing",
    [
        worlds.ZipfianFiring(0.5, 0.4, 0.05),
        worlds.LinearFiring(0.3, 0.3),
        worlds.RandomFiring(0.9, 0.1),
    ],
)
def test_features_fire_as_often_as_stated(firing, key):
    world = worlds.synthetic_world(key, 40, 5, firing_probability=firing)
    p = np.asarray(world.firing_probabilities, np.float64)
    if isinstance(firing, worlds.ZipfianFiring):
        shape = 1 / np.sqrt(np.arange(1, 41))
        shape = (shape - shape[-1]) / (shape[0] - shape[-1])
        np.testing.assert_allclose(p, 0.05 + 0.35 * shape, rtol=1e-5)
    assert p.min() >= firing.min_prob - 1e-6
    assert p.max() <= firing.max_prob + 1e-6
    codes = np.asarray(RUN["world_codes"](key, world, N))
    assert set(np.unique(codes)) == {0.0, 1.0}
    check(rates(codes), p, p * (1 - p))
    pairs = (codes.T @ codes / N)[np.triu_indices(40, 1)]
    both = np.outer(p, p)[np.triu_indices(40, 1)]
    check(pairs, both, both * (1 - both))


def test_pairs_fire_as_a_gaussian_copula_says(key):
    world = worlds.synthetic_world(
        key,
        8,
        5,
        firing_probability=worlds.LinearFiring(0.4, 0.1),
        correlation=worlds.CorrelationConfig(2, 0.8),  # some rows are shortened
    )
    factor = np.asarray(world.correlation_factor, np.float64)
    diag = np.asarray(world.correlation_diag, np.float64)
    covariance = factor @ factor.T + np.diag(diag)
    np.testing.assert_allclose(np.diag(covariance), 1, atol=1e-6)
    assert diag.min() >= 0.01 - 1e-6
    assert np.isclose(diag, 0.01, atol=1e-6).any()
    limit = stats.norm.ppf(np.asarray(world.firing_probabilities, np.float64))
    fires = np.asarray(RUN["world_codes"](key, world, N)) > 0
    found, wanted = [], []
    for i, j in itertools.combinations(range(8), 2):
        pair = covariance[np.ix_([i, j], [i, j])]
        wanted.append(stats.multivariate_normal.cdf(limit[[i, j]], cov=pair))
        found.append((fires[:, i] & fires[:, j]).mean())
    wanted = np.asarray(wanted)
    assert np.ptp(wanted) > 0.1
    check(found, wanted, wanted * (1 - wanted) + 1e-6)


def test_codes_are_a_normal_cut_at_zero(key):
    world = worlds.synthetic_world(
        key,
        24,
        5,
        firing_probability=worlds.LinearFiring(0.6, 0.2),
        mean_firing_magnitudes=worlds.ExponentialMagnitude(2.0, 0.2),
        std_firing_magnitudes=worlds.FoldedNormalMagnitude(0.5, 0.5),
    )
    p, m, s = (
        np.asarray(x, np.float64)
        for x in (
            world.firing_probabilities,
            world.mean_firing_magnitudes,
            world.std_firing_magnitudes,
        )
    )
    np.testing.assert_allclose(m, np.geomspace(2.0, 0.2, 24), rtol=1e-5)
    above, height = stats.norm.cdf(m / s), stats.norm.pdf(m / s)
    first = p * (m * above + s * height)
    second = p * ((m**2 + s**2) * above + m * s * height)
    codes = np.asarray(RUN["world_codes"](key, world, N), np.float64)
    assert codes.min() == 0
    check(rates(codes), p * above, p * above * (1 - p * above))
    check(codes.mean(0), first, second - first**2)
    check((codes**2).mean(0), second, (codes**4).mean(0) - second**2)


@pytest.mark.slow_cases
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_children_fire_with_their_parent_and_one_at_a_time(sampler, treed, key):
    assert treed.hierarchy.trees is not None
    codes = np.asarray(SAMPLERS[sampler](key, treed, N))
    parents = np.asarray(treed.hierarchy.parents)
    np.testing.assert_array_equal(parents[:8], [-1, -1, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(parents[8:26], np.repeat(np.arange(2, 8), 3))
    assert (parents[26:] == -1).all()
    for parent in range(8):
        fires = codes[:, parents == parent] > 0
        assert fires.any(0).all()
        assert not fires[codes[:, parent] == 0].any()
        assert fires.sum(1).max() == 1
    assert (codes[:, 26:] > 0).sum(1).max() > 1


@pytest.mark.slow_cases
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rates_under_a_root_are_those_of_all_cases(sampler, key):
    """Every pattern of 4 raw firings, with magnitudes that may be cut to 0."""
    world = worlds.synthetic_world(
        key,
        4,
        3,
        firing_probability=worlds.LinearFiring(0.8, 0.3),
        hierarchy=worlds.HierarchyConfig(1, 3, 1, 1.0, scale_children_by_parent=True),
        mean_firing_magnitudes=worlds.LinearMagnitude(1.5, 0.5),
        std_firing_magnitudes=1.0,
    )
    p, m = (
        np.asarray(x, np.float64)
        for x in (world.firing_probabilities, world.mean_firing_magnitudes)
    )
    active, size = p * stats.norm.cdf(m), m + stats.norm.pdf(m) / stats.norm.cdf(m)
    rate = np.zeros(4)
    for case in itertools.product([0, 1], repeat=4):
        case = np.asarray(case)
        chance = np.prod(np.where(case, active, 1 - active))
        rate[0] += chance * case[0]
        rate[1:] += chance * case[0] * case[1:] / max(case[1:].sum(), 1)
    mean = rate * size
    mean[1:] *= size[0] / m[0]
    codes = np.asarray(SAMPLERS[sampler](key, world, N), np.float64)
    check(rates(codes), rate, rate * (1 - rate))
    check(codes.mean(0), mean, codes.var(0))


@pytest.mark.slow_cases
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_children_grow_with_their_parent(sampler, key):
    options = {
        "firing_probability": worlds.LinearFiring(1.0, 1.0),
        "mean_firing_magnitudes": worlds.LinearMagnitude(3.0, 2.0),
    }
    for scale in (True, False):
        trees = worlds.HierarchyConfig(1, 2, 2, 1.0, scale_children_by_parent=scale)
        world = worlds.synthetic_world(
            key, 7, 3, hierarchy=trees, std_firing_magnitudes=0.5, **options
        )
        # only the root's magnitude is random
        world = world.replace(std_firing_magnitudes=jnp.eye(7)[0])
        codes = np.asarray(SAMPLERS[sampler](key, world, 500))
        mean = np.asarray(world.mean_firing_magnitudes)
        growth = codes[:, :1] / mean[0] if scale else (codes[:, :1] > 0)
        want = mean * growth
        at = codes[:, 1:] > 0
        assert at.sum(1).max() == 2
        np.testing.assert_allclose(codes[:, 1:][at], want[:, 1:][at], rtol=1e-5)


def test_compensation_gives_the_stated_rates_without_exclusion(key):
    world = worlds.synthetic_world(
        key,
        20,
        3,
        firing_probability=worlds.LinearFiring(0.4, 0.05),
        hierarchy=worlds.HierarchyConfig(2, (2, 3), 2, compensate_probabilities=True),
    )
    p = np.linspace(0.4, 0.05, 20)
    assert world.hierarchy.trees is None
    codes = RUN["world_codes"](key, world, N)
    check(rates(codes), p, p * (1 - p))


def test_vectors_are_pushed_apart_as_adam_on_the_loss_does(key):
    config = worlds.OrthogonalizationConfig(30, 0.01, 5)
    start = jax.random.normal(key, (12, 4))
    start = start / jnp.linalg.norm(start, axis=1, keepdims=True)

    rows = np.asarray(start, np.float64)
    mean, square = np.zeros_like(rows), np.zeros_like(rows)
    for step in range(1, 31):
        dots = rows @ rows.T
        weight = 12 * np.eye(12) * (dots - 1) + (1 - np.eye(12)) * dots
        slope = 4 * weight @ rows
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        root = np.sqrt(square / (1 - 0.999**step))
        rows = rows - 0.01 * mean / (1 - 0.9**step) / (root + 1e-8)
    want = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    got = orthogonalize(start, config)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.sum((got @ got.T) ** 2) < 0.95 * np.sum((start @ start.T) ** 2)


def test_activations_are_sums_of_vectors(treed, key):
    acts, codes = RUN["world_batch"](key, treed, 300)
    want = np.asarray(codes, np.float64) @ np.asarray(treed.feature_vectors)
    np.testing.assert_allclose(acts, want + np.asarray(treed.bias), atol=1e-5)
    np.testing.assert_allclose(RUN["world_acts"](key, treed, 300), acts, atol=1e-5)
    np.testing.assert_array_equal(RUN["world_codes"](key, treed, 300), codes)
    np.testing.assert_allclose(jnp.linalg.norm(treed.bias), 0.5, rtol=1e-5)
    norms = jnp.linalg.norm(treed.feature_vectors, axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_key_is_a_sample(sampler, treed, key):
    run = SAMPLERS[sampler]
    codes = run(key, treed, 300)
    np.testing.assert_array_equal(run(key, treed, 300), codes)
    np.testing.assert_array_equal(run(key, treed, 7), codes[:7])
    other = run(jax.random.key(1), treed, 300)
    assert not np.allclose(codes, other)
    assert len(np.unique(np.asarray(codes), axis=0)) > 200
    both = jnp.stack([key, jax.random.key(1)])
    many = jax.vmap(lambda k: run(k, treed, 300))(both)
    np.testing.assert_allclose(many, jnp.stack([codes, other]), rtol=1e-5)


@pytest.mark.slow
def test_any_kind_of_key_will_do(treed, key):
    for other in (jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")):
        assert RUN["world_codes"](other, treed, 10).shape == (10, 32)
    assert worlds.world_codes(key, treed, 1).shape == (1, 32)


def test_an_equal_key_makes_an_equal_world(key):
    small = {"features": 128, "dim": 16}
    one, two = (worlds.synth_sae_bench(key, **small) for _ in range(2))
    other = worlds.synth_sae_bench(jax.random.key(1), **small)
    for a, b, c in zip(*map(jax.tree.leaves, (one, two, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.shape == c.shape
    assert not np.array_equal(one.std_firing_magnitudes, other.std_firing_magnitudes)
    assert [x.size for x in one.hierarchy.trees] == [1, 4, 16, 64]
    p = np.asarray(one.firing_probabilities)
    np.testing.assert_allclose([p[0], p[-1]], [0.4, 5e-4], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"features": 0}, "features must be an int of at least 1, got 0"),
        ({"firing_probability": worlds.LinearFiring(0.1, 0.2)}, "min_prob=0.2"),
        ({"firing_probability": worlds.ZipfianFiring(-1.0)}, "positive, got -1.0"),
        (
            {"hierarchy": worlds.HierarchyConfig(branching_factor=1)},
            "branching_factor=1",
        ),
        ({"hierarchy": worlds.HierarchyConfig(0)}, "total_root_nodes=0"),
        ({"correlation": worlds.CorrelationConfig(0)}, "rank of at least 1"),
        ({"mean_firing_magnitudes": worlds.LinearMagnitude(1.0, 0.0)}, "above 0"),
        ({"hierarchy": TREES, "mean_firing_magnitudes": 0.0}, "got 0.0"),
    ],
)
def test_wrong_settings_are_named(options, match, key):
    options = {"features": 8, "dim": 3} | options
    with pytest.raises(ValueError, match=match):
        worlds.synthetic_world(key, **options)


def test_wrong_calls_are_named(treed, key):
    with pytest.raises(ValueError, match="num must be an int of at least 1, got 0"):
        worlds.world_codes(key, treed, 0)
    wrong = treed.replace(firing_probabilities=jnp.ones(3))
    with pytest.raises(ValueError, match=r"firing_probabilities \[32\].*\(3,\)"):
        worlds.world_batch(key, wrong, 5)
