"""Methods that look for the features of a model, all called the same way.

``method(key, subject, *, budget) -> Found``: from a model and its inputs to readers
and writers.  No method sees the truth, the number of features or how often they fire;
what it has to choose it chooses by these rules:

- gradients are those of half the squared output, the only scalar that every model
  has, or of random directions of the output where a method is named so; second moments
  use these, and :func:`toyfeat.consensus` both;
- bases keep the directions that hold .99 of the spectrum;
- dictionaries have four latents per dimension, 16 at least and 512 at most, and ``k``
  is the least of 1, 2, 4, 8 with which a short TopK training leaves at most a tenth of
  the variance (8 if none does); a penalty is steered to that many codes, but the
  published four-term loss, which has no controller, keeps our default coefficient on
  activations and gradients in units of their size.
"""

import importlib
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as tf
from toyfeat.consensus import covariance_of, gradient_rows, half_square
from toyfeat.consensus import tapped as tap_subject
from toyfeat.types import (
    Array,
    Basis,
    Dictionary,
    Found,
    Moments,
    Objective,
    Subject,
    Taps,
    Task,
)


class Budget(NamedTuple):
    """How much a method may look and train.

    Attributes:
      examples: inputs that are tapped.
      steps: of training.
      batch: examples per step.
    """

    examples: int = 20_000
    steps: int = 2000
    batch: int = 256


Method = Callable[..., Found]
FEW = (1, 2, 4, 8)
SPECTRUM, LEFT = 0.99, 0.1
RATE = 3e-3


def tapped(key: Array, subject: Subject, budget: Budget, num: int = 0) -> Taps:
    """Gradients of half the squared output, or of ``num`` random directions."""
    sampled, drawn = jax.random.split(key)
    readout = tf.readouts.scalar(half_square)
    if num:
        readout = tf.readouts.random_directions(drawn, num, "gaussian")
    return tap_subject(subject, subject.sample(sampled, budget.examples), readout)


def statistics(key: Array, subject: Subject, budget: Budget) -> Moments:
    """Second moments, gradients along four random directions."""
    taps = tapped(key, subject, budget, 4)
    stats = tf.moments(taps.acts.shape[1])
    return stats.finish(stats.update(stats.init(), taps))


# Bases.


def random(key: Array, subject: Subject, *, budget: Budget) -> Found:
    """As many random directions as a dictionary has latents."""
    width = tapped(key, subject, budget._replace(examples=2)).acts.shape[1]
    rows = jax.random.normal(key, (latents_of(width), width))
    return Found(rows, rows)


def leading(basis: Basis) -> Found:
    """The directions that hold most of the spectrum."""
    share = np.cumsum(np.asarray(basis.spectrum)) / float(basis.diagnostics.total)
    num = min(int(np.searchsorted(share, SPECTRUM)) + 1, int(basis.diagnostics.rank))
    return Found(basis.readers.T[:num], basis.writers[:num])


def of_moments(
    decompose: Callable[..., Basis], key: Array, subject: Subject, *, budget: Budget
) -> Found:
    """A basis of second moments."""
    stats = statistics(key, subject, budget)
    return leading(decompose(stats, len(stats.mean)))


def interaction(key: Array, subject: Subject, *, budget: Budget) -> Found:
    """Local interaction basis of the site and the output."""
    sampled, drawn = jax.random.split(key)
    inputs = subject.sample(sampled, budget.examples)
    bases = tf.local_interaction_basis(
        subject.probed,
        subject.params,
        lambda: iter([inputs]),
        sites=[subject.site],
        sources=4,
        key=drawn,
        batch_size=5000,
    )
    return leading(bases[subject.site])


def independent(
    of_gradients: bool,
    key: Array,
    subject: Subject,
    *,
    budget: Budget,
    directions: int = 0,
) -> Found:
    """FastICA of scikit-learn."""
    library = importlib.import_module("sklearn.decomposition")  # an extra

    taps = tapped(key, subject, budget, directions)
    rows = np.asarray(gradient_rows(taps) if of_gradients else taps.acts, np.float64)
    spectrum = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    rank = int(np.sum(spectrum > 1e-6 * spectrum[0]))
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    model = library.FastICA(
        rank, whiten="unit-variance", max_iter=300, random_state=seed
    )
    model.fit(rows)
    parts = np.asarray(model.mixing_, np.float32).T
    if of_gradients:
        readers = jnp.asarray(parts)
        return Found(readers, readers @ covariance_of(taps))
    return Found(jnp.asarray(model.components_, jnp.float32), jnp.asarray(parts))


# Dictionaries.


def latents_of(width: int) -> int:
    """How many latents a dictionary has."""
    return int(np.clip(4 * width, 16, 512))


def trained(
    key: Array,
    dictionary: Dictionary,
    objective: Objective,
    taps: Taps,
    budget: Budget,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Parameters after training, latents that never fire left out."""
    start, order = jax.random.split(key)
    one = tf.trainer(dictionary, objective, warm_up=budget.steps // 10, **options)
    state = one.init(start, learning_rate=RATE)
    batches = tf.data.array_batches(
        taps,
        batch=min(budget.batch, len(taps.acts)),
        seed=int(jax.random.randint(order, (), 0, 2**31 - 1)),
    )
    quiet: dict[str, Any] = {"progress": False, "check_data": False}
    state = tf.fit(one, state, batches, steps=budget.steps, **quiet)
    scales = tf.scales(state)
    some = taps.acts[:5000] / scales.acts
    more = {}
    if dictionary.config.architecture in ("gradient_topk", "paired"):
        assert taps.grads is not None
        more["grads"] = taps.grads[:5000] / scales.grads[None, :, None]
    codes = dictionary.encode(state.params, some, **more)
    alive = np.asarray(jnp.any(codes != 0, axis=0))
    params = {name: np.asarray(x) for name, x in state.params.items()}
    rows = ("W_dec", "W_read")
    return {
        name: x[alive] if name in rows else x[:, alive] if name in ("W_enc", "P") else x
        for name, x in params.items()
    }


_ANSWERED: dict[Any, int] = {}


def codes_of(key: Array, rows: Array, budget: Budget, *, signed: bool = False) -> int:
    """The ``k`` of the rule, answered once for the same rows.

    So the seconds of the first dictionary of a task have the rule's in them.
    """
    words = np.asarray(jax.random.key_data(key)).tobytes()
    asked = (words, zlib.crc32(np.asarray(rows).data), rows.shape, budget, signed)
    if asked not in _ANSWERED:
        _ANSWERED[asked] = _least_codes(key, rows, budget, signed)
    return _ANSWERED[asked]


def _least_codes(key: Array, rows: Array, budget: Budget, signed: bool) -> int:
    latents = latents_of(rows.shape[1])
    sae = tf.topk(rows.shape[1], latents, max(FEW), signed=signed)
    many = tf.population(tf.trainer(sae, tf.dictionary_objective(sae)))
    settings = tf.grid(k=FEW, learning_rate=RATE)
    settings["keys"] = jax.random.split(key, len(FEW))
    taps = Taps(rows, None, jnp.ones(len(rows)))
    steps = max(200, budget.steps // 4)
    left: list[np.ndarray] = []
    tf.fit(
        many,
        many.init(**settings),
        tf.data.array_batches(taps, batch=min(budget.batch, len(rows)), seed=0),
        steps=steps,
        chunk=max(1, steps // 4),
        progress=False,
        check_data=False,
        on_chunk=lambda _, metrics: left.append(metrics["fvu"]),
    )
    good = [k for k, fvu in zip(FEW, left[-1], strict=True) if fvu <= LEFT]
    return min(good, default=max(FEW))


def of_acts(
    make: Callable[..., Dictionary], key: Array, subject: Subject, *, budget: Budget
) -> Found:
    """A dictionary of activations; ``make(width, latents, k)``."""
    taps = tapped(key, subject, budget)
    width = taps.acts.shape[1]
    chosen, start = jax.random.split(key)
    k = codes_of(chosen, taps.acts, budget)
    sae = make(width, latents_of(width), k)
    control = {}
    if sae.config.k is None:
        control["controller"] = tf.controllers.target_l0(float(k))
    params = trained(start, sae, tf.dictionary_objective(sae), taps, budget, **control)
    readers = params["W_read"] if "W_read" in params else params["W_enc"].T
    return Found(jnp.asarray(readers), jnp.asarray(params["W_dec"]))


def standard(width: int, latents: int, k: int) -> Dictionary:
    """A ReLU dictionary, whose penalty a controller steers to ``k`` codes."""
    del k
    return tf.standard(width, latents)


def matryoshka(width: int, latents: int, k: int) -> Dictionary:
    """Nested dictionaries of a quarter, a half and all of the latents."""
    widths = (latents // 4, latents // 2, latents)
    return tf.matryoshka(width, latents, k, widths=widths)


def four_terms(
    published: bool, key: Array, subject: Subject, *, budget: Budget
) -> Found:
    """Attribution dictionary: the published loss, or ours with a controller."""
    taps = tapped(key, subject, budget)
    width = taps.acts.shape[1]
    chosen, start = jax.random.split(key)
    sae = tf.standard(width, latents_of(width))
    options: dict[str, Any] = {}
    if published:
        objective = tf.attribution_objective(sae, penalty="l1", form="signed")
    else:
        objective = tf.attribution_objective(sae)
        k = codes_of(chosen, taps.acts, budget)
        options["controller"] = tf.controllers.target_l0(float(k))
    params = trained(start, sae, objective, taps, budget, **options)
    return Found(jnp.asarray(params["W_enc"].T), jnp.asarray(params["W_dec"]))


def of_gradients(
    key: Array, subject: Subject, *, budget: Budget, directions: int = 0
) -> Found:
    """A signed TopK dictionary of gradients."""
    taps = tapped(key, subject, budget, directions)
    rows = gradient_rows(taps)
    chosen, start = jax.random.split(key)
    k = codes_of(chosen, rows, budget, signed=True)
    sae = tf.topk(rows.shape[1], latents_of(rows.shape[1]), k, signed=True)
    alone = Taps(rows, None, jnp.ones(len(rows)))
    params = trained(
        start, sae, tf.dictionary_objective(sae), alone, budget, center=False
    )
    readers = jnp.asarray(params["W_dec"])
    return Found(readers, readers @ covariance_of(taps))


def agreement(key: Array, subject: Subject, *, budget: Budget) -> Found:
    """Consensus of dictionaries of the gradients of two readouts."""
    description = tf.Description()._replace(**budget._asdict())
    return tf.consensus(key, subject, description=description).found


def oracle(key: Array, task: Task, *, budget: Budget) -> Found:
    """A dictionary of gradients that starts at the truth: no method, but a ceiling.

    Of the two readouts, and of codes with a sign and without one, those with which most
    of the truth is kept.
    """
    truth = np.asarray(task.truth.readers, np.float64)
    unit = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    k = min(tf.active_features(key, task), len(unit))
    best, kept = Found(jnp.asarray(truth), jnp.asarray(truth)), -1.0
    readouts = {num: tapped(key, Subject(*task[:4]), budget, num) for num in (0, 4)}
    for num, signed in ((0, False), (0, True), (4, True)):
        taps = readouts[num]
        rows = gradient_rows(taps)
        sae = tf.topk(rows.shape[1], len(unit), k, signed=signed)
        one = tf.trainer(sae, tf.dictionary_objective(sae), center=False)
        state = one.init(key, learning_rate=RATE)
        start = {
            "W_dec": jnp.asarray(unit, jnp.float32),
            "W_enc": jnp.asarray(np.linalg.pinv(unit), jnp.float32),
        }
        state = state._replace(params=state.params | start)
        batches = tf.data.array_batches(
            Taps(rows, None, jnp.ones(len(rows))),
            batch=min(budget.batch, len(rows)),
            seed=0,
        )
        quiet: dict[str, Any] = {"progress": False, "check_data": False}
        state = tf.fit(one, state, batches, steps=budget.steps, **quiet)
        readers = state.params["W_dec"]
        match = tf.match_features(readers, truth, group=task.truth.group)
        if match.coverage > kept:
            best, kept = Found(readers, readers @ covariance_of(taps)), match.coverage
    return best


METHODS: dict[str, Method] = {
    "random": random,
    "activation PCA": partial(of_moments, tf.pca),
    "gradient PCA": partial(of_moments, tf.gradient_pca),
    "joint PCA": partial(of_moments, tf.joint_pca),
    "LIB": interaction,
    "ICA": partial(independent, False),
    "gradient ICA": partial(independent, True),
    "ICA of directions": partial(independent, True, directions=1),
    "standard": partial(of_acts, standard),
    "TopK": partial(of_acts, tf.topk),
    "BatchTopK": partial(of_acts, tf.batch_topk),
    "Matryoshka": partial(of_acts, matryoshka),
    "g-SAE": partial(of_acts, tf.gradient_topk),
    "four-term loss": partial(four_terms, True),
    "robust four-term": partial(four_terms, False),
    "gradient TopK": of_gradients,
    "TopK of directions": partial(of_gradients, directions=4),
    "paired": partial(of_acts, tf.paired),
    "consensus": agreement,
}
"""Name to method; a new one is one row."""

OURS = (
    "robust four-term",
    "gradient TopK",
    "TopK of directions",
    "paired",
    "consensus",
)
"""Methods that nobody has published."""
