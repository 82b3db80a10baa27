"""Measurements of squaring networks: what activations show and what is read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as ft
from examples.squaring import network
from examples.squaring.cases import (
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
from examples.squaring.network import SITE, Squaring, Trained
from toyfeat.decompose import covariance
from toyfeat.models.planted.task import Truth
from toyfeat.report.tables import Row
from toyfeat.types import Array, Basis, Params


class Measurements(NamedTuple):
    """Measurements of a trained network; under ``vmap`` with an axis of seeds.

    Attributes:
      error: mean squared error on fresh inputs.
      relative_error: the same over the variance of the targets.
      acts: ``[N, D]``, hidden activations of ``inputs``.
      inputs: ``[N, F]``.
      acts_pca: principal components of the activations.
      grads_pca: those of the gradients, not centred; gradients of the output for
        one feature, of the loss for several.
      centred: principal components of the gradients after centring.
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


def train_case(
    key: Array,
    case: Case,
    *,
    seeds: int,
    on_chunk: Callable[[int, Array], None] | None = None,
) -> Trained:
    """Train the networks of a case, one per seed.

    Args:
      key: random key.
      case: to train.
      seeds: number of networks.
      on_chunk: see :func:`examples.squaring.network.train`.

    Returns:
      Networks with the leading axis ``seeds``.
    """
    return network.train(
        jax.random.split(key, seeds),
        case.task,
        steps=case.steps,
        batch=case.batch,
        learning_rate=case.learning_rate,
        chunk=min(case.steps, 500),
        on_chunk=on_chunk,
    )


def measure_network(
    key: Array, task: Squaring, params: Params, rotation: Array, *, num: int
) -> Measurements:
    """Tap one network and decompose its activations and gradients.

    Args:
      key: for fresh inputs.
      task: of the network.
      params: its parameters.
      rotation: of its outputs.
      num: number ``N`` of inputs.

    Returns:
      All measurements of the report, as one pytree.
    """
    features, neurons = task.features, task.neurons
    x = network.random_inputs(key, task, num)
    y = network.targets(rotation, x)
    outputs, _ = network.probed(params, x, {})
    # The gradient of one output is its own; several outputs are read through the loss.
    single = features == 1
    readout = ft.readouts.jacobian() if single else ft.readouts.loss(_squared_error, y)
    taps = ft.tap(network.probed, params, x, sites=SITE, readout=readout)[SITE]
    acc = ft.moments(neurons)
    stats = acc.finish(acc.update(acc.init(), taps))
    # As many directions as there are features, of each method.
    leading = [f(stats, features) for f in (ft.gradient_pca, ft.pca, ft.joint_pca)]
    error = jnp.mean((outputs - y) ** 2)
    return Measurements(
        error=error,
        relative_error=error / jnp.mean((y - jnp.mean(y, 0, keepdims=True)) ** 2),
        acts=taps.acts,
        inputs=x,
        acts_pca=ft.pca(stats, neurons),
        grads_pca=ft.gradient_pca(stats, neurons),
        centred=ft.gradient_pca(stats, neurons, center=True),
        joint=ft.joint_pca(stats, neurons),
        truth=network.truth(task, params, rotation, covariance(stats)),
        preserved=tuple(_preserved(params, x, basis) for basis in leading),
        variance=tuple(
            ft.metrics.variance_explained(basis, stats) for basis in leading
        ),
    )


def measure_case(
    key: Array, case: Case, nets: Trained, *, num: int
) -> tuple[Measurements, list[Row]]:
    """Measure all networks of a case in one compiled call, and make rows of it.

    Args:
      key: random key.
      case: of the networks.
      nets: from :func:`train_case`.
      num: inputs per network.

    Returns:
      The measurements, with the leading axis of the seeds, and the rows.
    """
    keys = jax.random.split(jax.random.fold_in(key, 1), len(nets.loss))

    def measure(key: Array, params: Params, rotation: Array) -> Measurements:
        return measure_network(key, case.task, params, rotation, num=num)

    measurements = jax.jit(jax.vmap(measure))(keys, nets.params, nets.rotation)
    rows = make_rows(jax.random.fold_in(key, 2), case, nets, measurements)
    return measurements, rows


def make_rows(
    key: Array, case: Case, nets: Trained, measurements: Measurements
) -> list[Row]:
    """Make rows of the measurements of a case.

    Args:
      key: for the random baselines.
      case: of the networks.
      nets: the networks, with the leading axis of the seeds.
      measurements: of them, with the same axis.

    Returns:
      Rows with bounds where a closed form or a published figure exists.
    """
    figures_of = _single_figures if case.task.features == 1 else _many_figures
    # One network at a time: the figures are computed outside of the compiled call.
    figures, truths = [], []
    for seed in range(len(nets.loss)):
        net, params = jax.tree.map(lambda x, i=seed: x[i], (measurements, nets.params))
        figures.append(figures_of(case.task, net, params))
        truths.append(net.truth)
    random = _random_figures(key, case.task, truths)
    bounds = expected(case)
    return [
        Row(
            case=case.name,
            name=name,
            values=tuple(float(of_seed[name]) for of_seed in figures),
            bound=bounds.get(name),
            random=random.get(name),
        )
        for name in figures[0]
    ]


def _single_figures(
    task: Squaring, net: Measurements, params: Params
) -> dict[str, Any]:
    """Compute the figures of a network of one input, in the order of the table."""
    acts_pca, grads_pca = net.acts_pca, net.grads_pca
    # Shares of the spectrum; without a bias beside their closed form.
    shares = acts_pca.spectrum / acts_pca.diagnostics.total
    e = params["w_in"] if "embed" not in params else params["embed"] @ params["w_in"]
    figures: dict[str, Any] = {ERROR: net.error}
    figures |= dict(zip(SHARES, shares[:3], strict=True))
    if not task.bias:
        closed = network.no_bias_variances(task, e[0])
        off = jnp.abs(shares[:2] - closed / jnp.sum(closed))
        figures |= dict(zip(SHARE_ERRORS, off, strict=True))
        figures[THIRD] = _third_eigenvalue_ratio(net.acts)
    # Leading components: their plane, and what their scores say of x².
    rays = jnp.concatenate([jax.nn.relu(e), jax.nn.relu(-e)])
    cosines = ft.metrics.principal_angles(acts_pca.readers[:, :2].T, rays)
    r2 = ft.metrics.r_squared(
        ft.encode(acts_pca, net.acts)[:, :2], net.inputs[:, 0] ** 2
    )
    figures |= {
        COS_1: cosines[0],
        COS_2: cosines[1],
        R2_1: r2[0],
        R2_2: r2[1],
        CORR_2: jnp.sqrt(r2[1]),
    }
    # Directions against reader and writer.
    reader = jnp.asarray(net.truth.readers)[0]
    cos = jnp.abs(acts_pca.readers.T @ reader) / jnp.linalg.norm(reader)
    figures |= {
        BEST_PC: jnp.max(cos),
        "best |cos| of any activation PC with the writer": _best_cos(
            acts_pca, net.truth.writers
        ),
        "|cos| of the reader with its writer": _best_cos(
            grads_pca, net.truth.writers, 1
        ),
        GRAD_RANK: grads_pca.diagnostics.rank,
        GRAD_COS: _best_cos(grads_pca, net.truth.readers, 1),
    }
    return figures | _single_direction_figures(net)


def _single_direction_figures(net: Measurements) -> dict[str, Any]:
    """Compute what centring leaves, and what one direction of each method keeps."""
    return {
        CENTRED_RANK: net.centred.diagnostics.rank,
        "gradient PCA after centring: non-finite entries": sum(
            jnp.sum(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(net.centred)
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


def _many_figures(task: Squaring, net: Measurements, params: Params) -> dict[str, Any]:
    """Compute the figures of a network of several inputs, in the order of the table."""
    del params
    readers, writers = (
        np.asarray(side) for side in (net.truth.readers, net.truth.writers)
    )
    count = task.features
    grads = np.asarray(net.grads_pca.readers[:, :count].T)
    acts = np.asarray(net.acts_pca.readers[:, :count].T)
    match = ft.metrics.match_features(grads, readers)
    return {
        "mean squared error / variance of the targets": net.relative_error,
        SPAN: ft.metrics.principal_angles(grads, readers)[-1],
        "coverage of the readers, gradient PCA": match.coverage,
        "precision of the readers, gradient PCA": match.precision,
        "coverage of the readers, activation PCA": ft.metrics.match_features(
            acts, readers
        ).coverage,
        "coverage of the writers, activation PCA": ft.metrics.match_features(
            acts, writers
        ).coverage,
        "output preserved by 20 gradient directions": net.preserved[0],
        "activation variance explained by them": net.variance[0],
        "output preserved by 20 activation PCs": net.preserved[1],
        "activation variance explained by those": net.variance[1],
    }


def _random_figures(
    key: Array, task: Squaring, truths: list[Truth]
) -> dict[str, float]:
    """Compute coverages by random directions, medians over the networks."""

    def scores(side: str, num: int) -> float:
        keys = jax.random.split(key, len(truths))
        pairs = zip(keys, truths, strict=True)
        return float(
            np.median(
                [ft.metrics.random_coverage(k, num, getattr(t, side)) for k, t in pairs]
            )
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
    """Compute the largest |cos| of a row with the first ``num`` readers of a basis."""
    directions = np.asarray(basis.readers[:, :num].T)
    return ft.metrics.match_features(directions, np.asarray(rows)).coverage


def _third_eigenvalue_ratio(acts: Array) -> float:
    """Divide the third eigenvalue of the covariance by the first, in float64."""
    values = np.linalg.eigvalsh(np.cov(np.asarray(acts, np.float64).T))
    return max(values[-3], 0.0) / values[-1]


def _preserved(params: Params, x: Array, basis: Basis) -> Array:
    return ft.metrics.output_preserved(
        network.probed, params, x, site=SITE, basis=basis
    )


def _squared_error(output: Array, label: Array) -> Array:
    return (output - label) ** 2
