"""The table of methods that look for the features of a model.

A new method is one row: its name and ``run(key, subject, *, budget) -> Features``, from
a model and its inputs to readers and writers.  ``method_tools.py`` has the rules by
which all of them choose their settings, and what most of them begin and end with.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from method_tools import (
    DIRECTIONS,
    LEARNING_RATE,
    Budget,
    choose_k,
    consensus_config,
    fit_quietly,
    num_latents,
    rows_as_taps,
    second_moments,
    tap_readout,
    train_dictionary,
    truncate_basis,
)

import toyfeat as ft
from toyfeat.dictionary.types import Dictionary
from toyfeat.discover.gradients import acts_covariance, gradient_rows
from toyfeat.models import planted
from toyfeat.models.planted import Task
from toyfeat.types import Array, Basis, Features, Subject, Taps


class Method(NamedTuple):
    """A row of the table.

    Attributes:
      name: of the method, without a comma.
      run: ``(key, subject, *, budget) -> Features``.
      ours: whether nobody has published it.
      hard_bar: whether it reads activations alone, and is held to the bar that hard
        tasks are too hard for it.
      package: what it needs beyond the dependencies, by the name of its import.
    """

    name: str
    run: Callable[..., Features]
    ours: bool = False
    hard_bar: bool = False
    package: str = ""


# Bases.


def random_directions(key: Array, subject: Subject, *, budget: Budget) -> Features:
    """Draw as many random directions as a dictionary has latents."""
    width = tap_readout(key, subject, budget._replace(examples=2)).acts.shape[1]
    rows = jax.random.normal(key, (num_latents(width), width))
    return Features(rows, rows)


def moments_basis(
    decompose: Callable[..., Basis], key: Array, subject: Subject, *, budget: Budget
) -> Features:
    """Decompose second moments; ``decompose(moments, rank)``."""
    stats = second_moments(key, subject, budget)
    return truncate_basis(decompose(stats, len(stats.mean)))


def interaction_basis(key: Array, subject: Subject, *, budget: Budget) -> Features:
    """Compute the local interaction basis of the site and the output."""
    input_key, source_key = jax.random.split(key)
    inputs = subject.sample(input_key, budget.examples)
    bases = ft.local_interaction_basis(
        subject.probed,
        subject.params,
        lambda: iter([inputs]),
        sites=[subject.site],
        sources=DIRECTIONS,
        key=source_key,
        batch_size=5000,
    )
    return truncate_basis(bases[subject.site])


def fast_ica(
    of_gradients: bool,
    key: Array,
    subject: Subject,
    *,
    budget: Budget,
    directions: int = 0,
) -> Features:
    """Run FastICA of scikit-learn on activations or gradients."""
    library = importlib.import_module("sklearn.decomposition")  # an extra

    taps = tap_readout(key, subject, budget, directions)
    rows = np.asarray(gradient_rows(taps) if of_gradients else taps.acts, np.float64)
    # As many components as the numerical rank in float32, whose epsilon is 1e-7.
    spectrum = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    rank = int(np.sum(spectrum > 1e-6 * spectrum[0]))
    # A component of unit variance, and the mixing that takes it back to the data.
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    model = library.FastICA(
        rank, whiten="unit-variance", max_iter=300, random_state=seed
    )
    model.fit(rows)
    mixing = jnp.asarray(np.asarray(model.mixing_, np.float32).T)
    if of_gradients:  # a component of the gradients is a reader
        return Features(mixing, mixing @ acts_covariance(taps))
    return Features(jnp.asarray(model.components_, jnp.float32), mixing)


# Dictionaries.


def activation_dictionary(
    make: Callable[..., Dictionary], key: Array, subject: Subject, *, budget: Budget
) -> Features:
    """Train a dictionary of activations; ``make(width, latents, k)``."""
    taps = tap_readout(key, subject, budget)
    width = taps.acts.shape[1]
    k_key, train_key = jax.random.split(key)
    k = choose_k(k_key, taps.acts, budget)
    sae = make(width, num_latents(width), k)
    control = {}
    if sae.config.k is None:
        control["controller"] = ft.controllers.target_l0(float(k))
    objective = ft.losses.default(sae)
    params = train_dictionary(train_key, sae, objective, taps, budget, **control)
    readers = params["W_read"] if "W_read" in params else params["W_enc"].T
    return Features(jnp.asarray(readers), jnp.asarray(params["W_dec"]))


def standard(width: int, latents: int, k: int) -> Dictionary:
    """Make a ReLU dictionary, whose penalty a controller steers to ``k`` codes."""
    del k
    return ft.dictionaries.standard(width, latents)


def matryoshka(width: int, latents: int, k: int) -> Dictionary:
    """Make nested dictionaries of a quarter, a half and all of the latents."""
    widths = (latents // 4, latents // 2, latents)
    return ft.dictionaries.matryoshka(width, latents, k, widths=widths)


def attribution_dictionary(
    published: bool, key: Array, subject: Subject, *, budget: Budget
) -> Features:
    """Train on the published four-term loss, or on ours with a controller."""
    taps = tap_readout(key, subject, budget)
    width = taps.acts.shape[1]
    k_key, train_key = jax.random.split(key)
    sae = ft.dictionaries.standard(width, num_latents(width))
    options: dict[str, Any] = {}
    if published:
        objective = ft.losses.attribution(sae, penalty="l1", form="signed")
    else:
        objective = ft.losses.attribution(sae)
        k = choose_k(k_key, taps.acts, budget)
        options["controller"] = ft.controllers.target_l0(float(k))
    params = train_dictionary(train_key, sae, objective, taps, budget, **options)
    return Features(jnp.asarray(params["W_enc"].T), jnp.asarray(params["W_dec"]))


def gradient_dictionary(
    key: Array, subject: Subject, *, budget: Budget, directions: int = 0
) -> Features:
    """Train a signed TopK dictionary of gradients, whose rows are readers."""
    taps = tap_readout(key, subject, budget, directions)
    rows = gradient_rows(taps)
    k_key, train_key = jax.random.split(key)
    k = choose_k(k_key, rows, budget, signed=True)
    sae = ft.dictionaries.topk(
        rows.shape[1], num_latents(rows.shape[1]), k, signed=True
    )
    objective, data = ft.losses.default(sae), rows_as_taps(rows)
    params = train_dictionary(train_key, sae, objective, data, budget, center=False)
    # Rows of the decoder are readers; writers are their regression patterns.
    readers = jnp.asarray(params["W_dec"])
    return Features(readers, readers @ acts_covariance(taps))


def run_consensus(key: Array, subject: Subject, *, budget: Budget) -> Features:
    """Run the consensus of dictionaries of the gradients of two readouts."""
    config = consensus_config(budget)
    return ft.consensus(key, subject, config=config).features


def oracle(key: Array, task: Task, *, budget: Budget) -> Features:
    """Train dictionaries of gradients from the truth: no method, but a ceiling.

    Of the two readouts, and of codes with a sign and without one, those with which most
    of the truth is kept.
    """
    truth = np.asarray(task.truth.readers, np.float64)
    if not len(truth):  # nothing is planted
        return Features(jnp.asarray(truth), jnp.asarray(truth))
    k = min(ft.metrics.mean_active_features(key, task), len(truth))
    best = Features(jnp.asarray(truth), jnp.asarray(truth))
    best_coverage = -1.0
    taps = {
        num: tap_readout(key, planted.subject_of(task), budget, num)
        for num in (0, DIRECTIONS)
    }
    for num, signed in ((0, False), (0, True), (DIRECTIONS, True)):
        readers = _train_from_truth(key, truth, taps[num], budget, k, signed)
        match = ft.metrics.match_features(readers, truth, group=task.truth.group)
        if match.coverage > best_coverage:
            writers = readers @ acts_covariance(taps[num])
            best = Features(readers, writers, group=task.truth.group)
            best_coverage = match.coverage
    return best


def _train_from_truth(
    key: Array, truth: np.ndarray, taps: Taps, budget: Budget, k: int, signed: bool
) -> Array:
    """Readers ``[F, D]`` after training a dictionary of gradients from the truth."""
    unit = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    rows = gradient_rows(taps)
    sae = ft.dictionaries.topk(rows.shape[1], len(unit), k, signed=signed)
    trainer = ft.trainer(sae, ft.losses.default(sae), center=False)
    state = trainer.init(key, learning_rate=LEARNING_RATE)
    start = {
        "W_dec": jnp.asarray(unit, jnp.float32),
        "W_enc": jnp.asarray(np.linalg.pinv(unit), jnp.float32),
    }
    state = state._replace(params=state.params | start)
    return fit_quietly(trainer, state, rows_as_taps(rows), budget).params["W_dec"]


METHODS: dict[str, Method] = {
    method.name: method
    for method in [
        Method("random", random_directions),
        Method("activation PCA", partial(moments_basis, ft.pca), hard_bar=True),
        Method("gradient PCA", partial(moments_basis, ft.gradient_pca)),
        Method("joint PCA", partial(moments_basis, ft.joint_pca)),
        Method("LIB", interaction_basis),
        # Reads activations alone, too, but three of the hard tasks are not too hard for
        # it (docs/research.md, section 6), so it has no bar.
        Method("ICA", partial(fast_ica, False), package="sklearn"),
        Method("gradient ICA", partial(fast_ica, True), package="sklearn"),
        Method(
            "ICA of directions",
            partial(fast_ica, True, directions=1),
            package="sklearn",
        ),
        Method("standard", partial(activation_dictionary, standard), hard_bar=True),
        Method(
            "TopK", partial(activation_dictionary, ft.dictionaries.topk), hard_bar=True
        ),
        Method(
            "BatchTopK",
            partial(activation_dictionary, ft.dictionaries.batch_topk),
            hard_bar=True,
        ),
        Method("Matryoshka", partial(activation_dictionary, matryoshka), hard_bar=True),
        Method("g-SAE", partial(activation_dictionary, ft.dictionaries.gradient_topk)),
        Method("four-term loss", partial(attribution_dictionary, True)),
        Method("robust four-term", partial(attribution_dictionary, False), ours=True),
        Method("gradient TopK", gradient_dictionary, ours=True),
        Method(
            "TopK of directions",
            partial(gradient_dictionary, directions=DIRECTIONS),
            ours=True,
        ),
        Method(
            "paired", partial(activation_dictionary, ft.dictionaries.paired), ours=True
        ),
        Method("consensus", run_consensus, ours=True),
    ]
}
"""Name to method; a new one is one row."""
