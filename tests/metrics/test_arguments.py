"""NaN is no good score, and bad arguments are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat import metrics
from toyfeat.models import planted

KEY = jax.random.key(0)
RNG = np.random.default_rng(3)
X = jnp.asarray(RNG.standard_normal((20, 4)), jnp.float32)
STATS = ft.Moments(jnp.array(1.0), jnp.zeros(4), jnp.diag(jnp.arange(1.0, 5.0)))
BASIS = ft.pca(STATS, 2)
PROBED = ft.from_split(lambda p, x: x, lambda p, a: a if p is None else a * p)
SAE = ft.dictionaries.topk(4, 8, 2)
EDGES = jnp.array([[4.0, 1.0], [3.0, 2.0]])
NAN = jnp.float32(jnp.nan)


NAN_SCORES = {
    "output_preserved": lambda: metrics.output_preserved(
        PROBED, NAN, X, site="acts", basis=BASIS
    ),
    "output_preserved_constant": lambda: metrics.output_preserved(
        ft.from_split(lambda p, x: x, lambda p, a: jnp.where(a == X, 1.0, NAN)),
        None,
        X,
        site="acts",
        basis=BASIS,
    ),
    "variance_explained": lambda: metrics.variance_explained(
        BASIS, STATS._replace(scatter=NAN * STATS.scatter)
    ),
    "r_squared_scores": lambda: metrics.r_squared(X[:, 0].at[3].set(NAN), X[:, 1]),
    "r_squared_target": lambda: metrics.r_squared(X[:, 0], X[:, 1].at[3].set(NAN)),
    "r_squared_constant": lambda: metrics.r_squared(NAN * X[:, 0], jnp.ones(20)),
    "principal_angles": lambda: metrics.principal_angles(NAN * X[:1], X[:1])[0],
    "ablation_curve": lambda: metrics.ablation_curve(
        PROBED, NAN, X, jnp.var, site="acts", basis=BASIS
    )[1],
    "ce_recovered": lambda: metrics.ce_recovered(1.0, np.nan, 3.0),
    "ce_recovered_clean": lambda: metrics.ce_recovered(np.nan, 2.0, 3.0),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", NAN_SCORES)
def test_a_score_of_nan_is_nan(name):
    assert np.isnan(NAN_SCORES[name]())


def product_task():
    task = planted.product_space(KEY)
    return task, ft.Features(task.truth.readers, task.truth.writers)


def test_a_task_with_parameters_that_are_nan_has_no_score():
    task, features = product_task()
    bad = task._replace(params=jax.tree.map(lambda x: NAN * x, task.params))
    with pytest.raises(ValueError, match=r"^[a-z_]+: .*finite.*got.*; look"):
        metrics.score_task(KEY, bad, features)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("metric", "edges", "least"),
    [
        (lambda kept: NAN, EDGES, 1.0),
        (lambda kept: kept.sum(), EDGES.at[0, 0].set(NAN), 1.0),
        (lambda kept: kept.sum(), EDGES, np.nan),
    ],
)
def test_edges_are_not_counted_by_nan(metric, edges, least):
    with pytest.raises(ValueError, match=r"^edges_needed: .*got.*; (look|pass)"):
        metrics.edges_needed(metric, edges, least=least)


def ablate(probed=PROBED, metric=jnp.var, basis=BASIS, ranks=None):
    return metrics.ablation_curve(
        probed, None, X, metric, site="acts", basis=basis, ranks=ranks
    )


def ablate_edges(source=("acts", BASIS), kept=None, metric=jnp.var, target=None):
    kept = jnp.ones((4, 2), bool) if kept is None else kept
    return metrics.edge_ablation(
        PROBED, None, X, metric, source=source, target=target, kept=kept
    )


def preserve(outputs=lambda p, a: a, basis=BASIS):
    probed = ft.from_split(lambda p, x: x, outputs)
    return metrics.output_preserved(probed, None, X, site="acts", basis=basis)


ROWS = np.eye(4)
CASES = [
    ("ablation_curve", lambda: ablate(probed=None)),
    ("ablation_curve", lambda: ablate(metric=3)),
    ("ablation_curve", lambda: ablate(basis=None)),
    ("ablation_curve", lambda: ablate(ranks=2)),
    ("ablation_curve", lambda: ablate(ranks=[1.5])),
    ("ablation_curve", lambda: ablate(ranks=[True])),
    ("ablation_curve", lambda: ablate(ranks=[-1])),
    ("edge_ablation", lambda: ablate_edges(source="acts")),
    ("edge_ablation", lambda: ablate_edges(target=("acts", 3))),
    ("edge_ablation", lambda: ablate_edges(kept=None, metric=None)),
    ("edge_ablation", lambda: ablate_edges(kept=jnp.ones(4))),
    ("edge_ablation", lambda: ablate_edges(kept=jnp.ones((4, 3)))),
    ("edge_ablation", lambda: ablate_edges(kept="a")),
    ("edges_needed", lambda: metrics.edges_needed(None, EDGES, least=1)),
    ("edges_needed", lambda: metrics.edges_needed(jnp.sum, None, least=1)),
    ("edges_needed", lambda: metrics.edges_needed(jnp.sum, EDGES, least="a")),
    ("output_preserved", lambda: preserve(lambda p, a: {"logits": a, "n": None})),
    ("output_preserved", lambda: preserve(lambda p, a: a.argmax(-1))),
    ("output_preserved", lambda: preserve(lambda p, a: None)),
    ("output_preserved", lambda: preserve(basis=ROWS)),
    ("variance_explained", lambda: metrics.variance_explained(None, STATS)),
    ("variance_explained", lambda: metrics.variance_explained(BASIS, ROWS)),
    ("principal_angles", lambda: metrics.principal_angles(None, ROWS)),
    ("principal_angles", lambda: metrics.principal_angles("a", ROWS)),
    ("r_squared", lambda: metrics.r_squared(None, ROWS[0])),
    ("r_squared", lambda: metrics.r_squared(1j * ROWS, ROWS[0])),
    ("match_features", lambda: metrics.match_features(None, ROWS)),
    ("match_features", lambda: metrics.match_features(ROWS, ROWS, group=ROWS[0])),
    ("random_coverage", lambda: metrics.random_coverage(None, 2, ROWS)),
    ("random_coverage", lambda: metrics.random_coverage(KEY, 2.5, ROWS)),
    ("random_coverage", lambda: metrics.random_coverage(KEY, 2, ROWS, draws="a")),
    ("random_coverage", lambda: metrics.random_coverage(KEY, 2, 1.0)),
    ("feature_uniqueness", lambda: metrics.feature_uniqueness("a", ROWS)),
    (
        "latent_classification",
        lambda: metrics.latent_classification(ROWS, ROWS, None),
    ),
    (
        "latent_classification",
        lambda: metrics.latent_classification(ROWS, ROWS, [ROWS]),
    ),
    (
        "latent_classification",
        lambda: metrics.latent_classification(ROWS, ROWS, [("a", ROWS)]),
    ),
    ("splice", lambda: metrics.splice(None, {})),
    ("splice", lambda: metrics.splice(SAE, None)),
    ("ce_recovered", lambda: metrics.ce_recovered(None, 1.0, 2.0)),
    (
        "attribution_faithfulness",
        lambda: metrics.attribution_faithfulness(["a"], [1.0]),
    ),
    ("score_task", lambda: metrics.score_task(KEY, None, None)),
    ("score_task", lambda: metrics.score_task(None, *product_task())),
    ("score_task", lambda: metrics.score_task(KEY, product_task()[0], None)),
    ("mean_active_features", lambda: metrics.mean_active_features(KEY, 3)),
]


@pytest.mark.parametrize(("name", "call"), CASES)
def test_bad_arguments_of_metrics_are_named(name, call):
    with pytest.raises((TypeError, ValueError), match=rf"(?s)^{name}: .*got.*; "):
        call()


@pytest.mark.slow
def test_integers_and_lists_are_taken():
    assert metrics.random_coverage(KEY, np.int64(2), ROWS, draws=jnp.int32(1)) > 0
    curve = ablate(ranks=np.array([0, 2]))
    np.testing.assert_allclose(curve, ablate()[np.array([0, 2])], rtol=1e-6)
    assert metrics.r_squared([1, 2, 3], [2, 4, 6]) == 1
    np.testing.assert_allclose(metrics.principal_angles([[1, 0]], [[2, 0]]), 1.0)
    assert metrics.match_features([[0, 1]], [[0, 2]], group=[7]).coverage == 1
