"""The squaring networks, measured: what their activations show and what is read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as tf
from toyfeat.decompose import covariance
from toyfeat.models import squaring
from toyfeat.models.squaring import SITE, Squaring, Trained
from toyfeat.report.cases import (
    BEST_PC,
    CENTRED_RANK,
    CORR_2,
    COS_1,
    COS_2,
    ERROR,
    GRAD_COS,
    GRAD_RANK,
    GRAD_VARIANCE,
    LIB_COS,
    LIB_PRESERVED,
    LIB_RANK,
    LIB_VARIANCE,
    PC_PRESERVED,
    PC_VARIANCE,
    PRESERVED,
    R2_1,
    R2_2,
    SHARE_ERRORS,
    SHARES,
    SPAN,
    THIRD,
    Case,
    expected,
)
from toyfeat.report.rows import Row
from toyfeat.types import Array, Basis, Params, Truth


class Measured(NamedTuple):
    """One trained network, looked at; under ``vmap`` one per seed.

    Attributes:
      error: mean squared error on fresh inputs.
      relative_error: the same over the variance of the targets.
      acts: ``[N, D]``, hidden activations of ``inputs``.
      inputs: ``[N, F]``.
      acts_pca: principal components of the activations.
      grads_pca: those of the gradients, uncentred; of the outputs for one
        feature, of the loss for many.
      centred: those of the gradients after centring.
      joint: the local interaction basis of the site, before its last scaling.
      truth: readers and writers.
      preserved: output preserved by the ``F`` leading directions of
        ``grads_pca``, of ``acts_pca`` and of ``joint``.
      variance: activation variance explained by the same.
    """

    error: Array
    relative_error: Array
    acts: Array
    inputs: Array
    acts_pca: Basis
    grads_pca: Basis
    centred: Basis
    joint: Basis
    truth: Truth
    preserved: tuple[Array, ...]
    variance: tuple[Array, ...]


def trained(
    key: Array,
    case: Case,
    *,
    seeds: int,
    on_chunk: Callable[[int, Array], None] | None = None,
) -> Trained:
    """Train the networks of a case, one per seed.

    Args:
      key: random key.
      case: what to train.
      seeds: how many networks.
      on_chunk: see :func:`toyfeat.models.squaring.train`.

    Returns:
      Networks with the leading axis ``seeds``.
    """
    return squaring.train(
        jax.random.split(key, seeds),
        case.task,
        steps=case.steps,
        batch=case.batch,
        learning_rate=case.learning_rate,
        chunk=min(case.steps, 500),
        on_chunk=on_chunk,
    )


def measured(
    key: Array, task: Squaring, params: Params, rotation: Array, *, num: int
) -> Measured:
    """Tap one network and decompose its activations and gradients.

    Args:
      key: for fresh inputs.
      task: what the network was trained for.
      params: its parameters.
      rotation: of its outputs.
      num: how many inputs ``N``.

    Returns:
      Everything the report shows, as one pytree.
    """
    features, neurons = task.features, task.neurons
    x = squaring.random_inputs(key, task, num)
    y = squaring.targets(rotation, x)
    outputs, _ = squaring.probed(params, x, {})
    single = features == 1
    readout = tf.readouts.jacobian() if single else tf.readouts.loss(_squared_error, y)
    taps = tf.tap(squaring.probed, params, x, sites=SITE, readout=readout)[SITE]
    acc = tf.moments(neurons)
    stats = acc.finish(acc.update(acc.init(), taps))
    leading = [f(stats, features) for f in (tf.gradient_pca, tf.pca, tf.joint_pca)]
    error = jnp.mean((outputs - y) ** 2)
    return Measured(
        error=error,
        relative_error=error / jnp.mean((y - jnp.mean(y, 0, keepdims=True)) ** 2),
        acts=taps.acts,
        inputs=x,
        acts_pca=tf.pca(stats, neurons),
        grads_pca=tf.gradient_pca(stats, neurons),
        centred=tf.gradient_pca(stats, neurons, center=True),
        joint=tf.joint_pca(stats, neurons),
        truth=squaring.truth(task, params, rotation, covariance(stats)),
        preserved=tuple(_preserved(params, x, basis) for basis in leading),
        variance=tuple(tf.variance_explained(basis, stats) for basis in leading),
    )


def look_at(
    key: Array, case: Case, nets: Trained, *, num: int
) -> tuple[Measured, list[Row]]:
    """Measure all networks of a case in one compiled call, and make rows of it.

    Args:
      key: random key.
      case: what was trained.
      nets: from :func:`trained`.
      num: inputs per network.

    Returns:
      The measurements, with the leading axis of the seeds, and the rows.
    """
    keys = jax.random.split(jax.random.fold_in(key, 1), _len(nets))

    def one(key: Array, params: Params, rotation: Array) -> Measured:
        return measured(key, case.task, params, rotation, num=num)

    found = jax.jit(jax.vmap(one))(keys, nets.params, nets.rotation)
    return found, rows_of(jax.random.fold_in(key, 2), case, nets, found)


def rows_of(key: Array, case: Case, nets: Trained, found: Measured) -> list[Row]:
    """Turn the measurements of a case into rows.

    Args:
      key: for the random baselines.
      case: what was measured.
      nets: the networks, with the leading axis of the seeds.
      found: their measurements, with the same axis.

    Returns:
      Rows with bounds where a closed form or a published figure exists.
    """
    seeds = [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(_len(nets))]
    params = [jax.tree.map(lambda p, i=i: p[i], nets.params) for i in range(_len(nets))]
    many = case.task.features > 1
    of_seed = _many_figures if many else _single_figures
    figures = [of_seed(case.task, s, p) for s, p in zip(seeds, params, strict=True)]
    random = _random_scores(key, case.task, [s.truth for s in seeds])
    bounds = expected(case)
    return [
        Row(
            case=case.name,
            name=name,
            values=tuple(float(f[name]) for f in figures),
            bound=bounds.get(name),
            random=random.get(name),
        )
        for name in figures[0]
    ]


def _single_figures(task: Squaring, net: Measured, params: Params) -> dict[str, Any]:
    acts_pca, grads_pca, centred = net.acts_pca, net.grads_pca, net.centred
    shares = acts_pca.spectrum / acts_pca.diagnostics.total
    e = params["w_in"] if "embed" not in params else params["embed"] @ params["w_in"]
    span = jnp.concatenate([jax.nn.relu(e), jax.nn.relu(-e)])
    cosines = tf.principal_angles(acts_pca.readers[:, :2].T, span)
    scores = tf.encode(acts_pca, net.acts)[:, :2]
    r2 = tf.r_squared(scores, net.inputs[:, 0] ** 2)
    reader = jnp.asarray(net.truth.readers)[0]
    cos = jnp.abs(acts_pca.readers.T @ reader) / jnp.linalg.norm(reader)
    figures: dict[str, Any] = {ERROR: net.error}
    figures |= dict(zip(SHARES, shares[:3], strict=True))
    if not task.bias:
        closed = squaring.no_bias_variances(task, e[0])
        off = jnp.abs(shares[:2] - closed / jnp.sum(closed))
        figures |= dict(zip(SHARE_ERRORS, off, strict=True))
        figures[THIRD] = _float64_ratio(net.acts)
    return figures | {
        COS_1: cosines[0],
        COS_2: cosines[1],
        R2_1: r2[0],
        R2_2: r2[1],
        CORR_2: jnp.sqrt(r2[1]),
        BEST_PC: jnp.max(cos),
        "best |cos| of any activation PC with the writer": _best_cos(
            acts_pca, net.truth.writers
        ),
        "|cos| of the reader with its writer": _best_cos(
            grads_pca, net.truth.writers, 1
        ),
        GRAD_RANK: grads_pca.diagnostics.rank,
        GRAD_COS: _best_cos(grads_pca, net.truth.readers, 1),
        CENTRED_RANK: centred.diagnostics.rank,
        "gradient PCA after centring: non-finite entries": sum(
            jnp.sum(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(centred)
        ),
        PRESERVED: net.preserved[0],
        GRAD_VARIANCE: net.variance[0],
        PC_PRESERVED: net.preserved[1],
        PC_VARIANCE: net.variance[1],
        LIB_RANK: net.joint.diagnostics.rank,
        LIB_COS: _best_cos(net.joint, net.truth.readers, 1),
        LIB_PRESERVED: net.preserved[2],
        LIB_VARIANCE: net.variance[2],
    }


def _many_figures(task: Squaring, net: Measured, params: Params) -> dict[str, Any]:
    readers, writers = (
        np.asarray(side) for side in (net.truth.readers, net.truth.writers)
    )
    count = task.features
    grads = np.asarray(net.grads_pca.readers[:, :count].T)
    acts = np.asarray(net.acts_pca.readers[:, :count].T)
    return {
        "mean squared error / variance of the targets": net.relative_error,
        SPAN: tf.principal_angles(grads, readers)[-1],
        "coverage of the readers, gradient PCA": tf.match_features(
            grads, readers
        ).coverage,
        "precision of the readers, gradient PCA": tf.match_features(
            grads, readers
        ).precision,
        "coverage of the readers, activation PCA": tf.match_features(
            acts, readers
        ).coverage,
        "coverage of the writers, activation PCA": tf.match_features(
            acts, writers
        ).coverage,
        "output preserved by 20 gradient directions": net.preserved[0],
        "activation variance explained by them": net.variance[0],
        "output preserved by 20 activation PCs": net.preserved[1],
        "activation variance explained by those": net.variance[1],
    }


def _random_scores(key: Array, task: Squaring, truths: list[Truth]) -> dict[str, float]:
    def scores(side: str, num: int) -> float:
        keys = jax.random.split(key, len(truths))
        pairs = zip(keys, truths, strict=True)
        return float(
            np.median([tf.random_coverage(k, num, getattr(t, side)) for k, t in pairs])
        )

    if task.features > 1:
        readers, writers = (scores(s, task.features) for s in ("readers", "writers"))
        return {
            "coverage of the readers, gradient PCA": readers,
            "coverage of the readers, activation PCA": readers,
            "coverage of the writers, activation PCA": writers,
        }
    best = scores("readers", task.neurons)
    return {
        BEST_PC: best,
        "best |cos| of any activation PC with the writer": best,
        GRAD_COS: scores("readers", 1),
    }


def _best_cos(basis: Basis, rows: Any, num: int | None = None) -> float:
    found = np.asarray(basis.readers[:, :num].T)
    return tf.match_features(found, np.asarray(rows)).coverage


def _float64_ratio(acts: Array) -> float:
    values = np.linalg.eigvalsh(np.cov(np.asarray(acts, np.float64).T))
    return max(values[-3], 0.0) / values[-1]


def _preserved(params: Params, x: Array, basis: Basis) -> Array:
    return tf.output_preserved(squaring.probed, params, x, site=SITE, basis=basis)


def _squared_error(output: Array, label: Array) -> Array:
    return (output - label) ** 2


def _len(nets: Trained) -> int:
    return len(nets.loss)
