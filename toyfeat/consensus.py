r"""Features of a model that independent descriptions of its gradients agree on.

Gradients of one example are combinations of the readers that are active in it.  Which
combinations, and how many readers, depends on the readout and on the model; a
dictionary that is trained with the wrong ones finds something else, but something else
every time.  So the gradients of two readouts are described by several dictionaries
each, and what recurs is kept and fitted to the gradients themselves.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.data import array_batches
from toyfeat.decompose.circles import circular_planes
from toyfeat.decompose.second_moments import covariance
from toyfeat.dictionary import dictionary_objective, topk
from toyfeat.moments import moments
from toyfeat.pursuit import sharpened
from toyfeat.tap import readouts, tap
from toyfeat.tap.readouts import Readout
from toyfeat.train import fit, population, trainer
from toyfeat.types import (
    Array,
    ArrayLike,
    Consensus,
    Description,
    Dictionary,
    Found,
    Inputs,
    Outputs,
    Params,
    Subject,
    Taps,
    TrainState,
)

_TURN = 0.05  # of a row's length, which a step of Adam moves it at most, or nearly so
_USED = 1e-3  # of the largest energy, below which a latent does not describe anything
_CHUNK = 5000
_INSIDE = 0.99  # of a direction's length, from where it is a mixture of circles
_FITTED = 6000  # rows that directions are fitted to
_SAME = 0.95  # |cos| of two directions that count as one
_OF_MOST = 3  # the largest support over this has to be reached
_SURE = 0.6  # of the largest support, from where on a direction is not left out
_IN_A_PLANE = np.cos(np.pi / 16)  # one direction in eight has it with another


DEFAULT = Description()


class Described(NamedTuple):
    """The gradients of both readouts, and what describes them.

    Attributes:
      sets: unit rows of dictionaries, one list of them for each setting.
      half: gradients ``[N, D]`` of half the squared output, by :func:`gradient_rows`.
      random: gradients ``[N, D]`` of random directions, likewise.
      planes: ``[2 P, D]``, circles of the first.
      taps: of half the squared output.
    """

    sets: list[list[np.ndarray]]
    half: Array
    random: Array
    planes: np.ndarray
    taps: Taps


def consensus(
    key: Array,
    subject: Subject,
    *,
    description: Description = DEFAULT,
    support: int | None = None,
    cosine: float = _SAME,
) -> Consensus:
    r"""Readers of a model, by the agreement of dictionaries of its gradients.

    Two readouts are tapped: half the squared norm of the output, whose gradient
    :math:`J^\top y` weighs every reader by what it adds to the output (the only one
    that tells readers apart behind a linear read-out), and random directions
    :math:`J^\top u` (the only one that tells apart features that always come
    together).  Each is described by TopK dictionaries of several ``k`` and starts, all
    trained at once, and a direction is a reader if enough of them agree on it within
    ``cosine``; then it is fitted to the gradients of one readout, if one is sparse in
    what was agreed on; there it is left out if it is not needed and recurs less often
    than most (:func:`agreed`).
    Circles, which no sparse code describes, are looked for in the first readout by
    :func:`circular_planes`; what else lies in their span is left out.  Writers are the
    regression patterns :math:`\Sigma r` of the readers.

    Args:
      key: random key.
      subject: the model, its inputs and the site.
      description: how gradients are described.
      support: descriptions in which a reader has to recur; ``None`` for a third
        (rounded down) of those in which the most frequent one does, two at least.
      cosine: from where on two directions are the same; none is fitted further away.

    Returns:
      :class:`Consensus`; readers that recur most often come first, planes at the end.

    Raises:
      ValueError: if the support or the cosine is out of range, or all gradients are 0.

    Example:
      >>> import jax
      >>> from toyfeat.models import planted
      >>> task = planted.product_space(jax.random.key(0), colours=2, shapes=2, dim=6)
      >>> few = Description(examples=500, steps=100)
      >>> subject = planted.blind(task)
      >>> found = consensus(jax.random.key(1), subject, description=few).found
      >>> found.readers.shape[1], found.readers.shape == found.writers.shape
      (6, True)

    References:
      Meinshausen and Bühlmann (2010), "Stability selection"; Haufe et al. (2014),
      equation 6, for the writers.
    """
    total = 2 * len(description.codes) * description.repeats
    if not (support is None or 1 <= support <= total) or not 0 < cosine < 1:
        raise ValueError(
            f"consensus: wanted support in 1 .. {total}, the number of descriptions, "
            f"and cosine in (0, 1), got {support} and {cosine}"
        )
    described = descriptions(key, subject, description)
    (sets,) = described.sets
    rows, counts = agreed(sets, described, support=support, cosine=cosine)
    readers = jnp.asarray(rows, float)
    found = Found(readers, readers @ covariance_of(described.taps))
    return Consensus(found, counts, len(sets))


def descriptions(
    key: Array,
    subject: Subject,
    description: Description,
    *,
    settings: Mapping[str, ArrayLike] | None = None,
) -> Described:
    """Dictionaries of the gradients of both readouts, and circles of the first.

    Args:
      key: random key.
      subject: the model, its inputs and the site.
      description: which dictionaries, and of what.
      settings: as in :func:`dictionaries`.

    Returns:
      :class:`Described`.

    Raises:
      ValueError: if all gradients are 0, or one is not finite.
    """
    sampled, drawn, *trained, circles = jax.random.split(key, 5)
    inputs = subject.sample(sampled, description.examples)
    random = readouts.random_directions(drawn, description.directions, "gaussian")
    each = len(description.codes) * description.repeats

    def by_setting(rows: Array, start: Array, signed: bool) -> list[list[np.ndarray]]:
        sets = dictionaries(start, rows, description, signed=signed, settings=settings)
        return [sets[i : i + each] for i in range(0, len(sets), each)]

    taps = tapped(subject, inputs, readouts.scalar(half_square))
    half = gradient_rows(taps)
    along = gradient_rows(tapped(subject, inputs, random))
    first = by_setting(half, trained[0], signed=False)
    second = by_setting(along, trained[1], signed=True)
    sets = [one + other for one, other in zip(first, second, strict=True)]
    planes = np.asarray(circular_planes(circles, half), np.float64)
    return Described(sets, half, along, planes, taps)


def agreed(
    sets: Sequence[ArrayLike],
    described: Described,
    *,
    support: int | None = None,
    cosine: float = _SAME,
) -> tuple[np.ndarray, np.ndarray]:
    """Circles, and what recurs and is needed, fitted to the gradients themselves.

    Dictionaries of too few codes pull on every direction, so what they have in common
    is near a reader and no more; and sums of features that come together recur, too.
    Both readouts have an equal say in what recurs.  The last word, on where readers are
    and on which of them are needed, has the one that is sparse in them, or moves them
    less if both are: random directions, unless there is a clear difference
    (:func:`toyfeat.pursuit.sharpened`).  What recurs three fifths as often as the most
    frequent direction is not left out.

    Args:
      sets: unit rows of several dictionaries, one of ``described.sets``.
      described: the gradients of both readouts and their circles.
      support: as in :func:`recurring`.
      cosine: as there; a direction that would move further stays.

    Returns:
      Unit rows ``[R, D]`` and in how many sets each was, most first; then two rows for
      every circle, with 0.
    """
    directions, counts = recurring(sets, support=support, cosine=cosine)
    half, random = map(_some, (described.half, described.random))
    sure = counts >= _SURE * counts.max(initial=0)
    directions, kept = sharpened(directions, (random, half), cosine=cosine, sure=sure)
    apart = _outside(directions, described.planes)
    rows = np.concatenate([directions[apart], described.planes])
    none = np.zeros(len(described.planes), int)
    return rows, np.concatenate([counts[kept][apart], none])


def _some(rows: Array) -> np.ndarray:
    """Rows from all over a table, enough to fit directions to."""
    index = np.linspace(0, len(rows) - 1, min(len(rows), _FITTED)).astype(int)
    return np.asarray(rows)[index].astype(np.float64)


def _outside(directions: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Which unit rows do not lie in the span of planes: mixtures of circles do."""
    if not len(planes):
        return np.ones(len(directions), bool)
    inside = directions @ np.linalg.svd(planes, full_matrices=False)[2].T
    return np.linalg.norm(inside, axis=1) < _INSIDE


def covariance_of(taps: Taps) -> Array:
    """``[D, D]``, of the activations."""
    stats = moments(taps.acts.shape[1])
    return covariance(stats.finish(stats.update(stats.init(), taps)))


def half_square(output: Outputs) -> Array:
    """Half the squared norm of everything in one output."""
    return jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(output)]).sum() / 2


def gradient_rows(taps: Taps) -> Array:
    """Gradients of all readouts that are not 0, ``[n, D]``, in units of their size."""
    assert taps.grads is not None
    rows = np.asarray(taps.grads).reshape(-1, taps.grads.shape[-1])
    largest = np.abs(rows).max(initial=0.0)
    if not (np.isfinite(largest) and largest > 0):
        raise ValueError(
            "consensus: gradients must be finite and not all 0, the largest is "
            f"{largest}"
        )
    rows = rows / largest
    lengths = np.linalg.norm(rows, axis=1)
    size = np.sqrt(np.mean(lengths**2))
    rows = rows[lengths > 1e-6 * size]
    return jnp.asarray(rows / np.sqrt(np.mean(rows**2)))


def dictionaries(
    key: Array,
    rows: Array,
    description: Description,
    *,
    signed: bool,
    settings: Mapping[str, ArrayLike] | None = None,
) -> list[np.ndarray]:
    """Train every dictionary of a description, all at once.

    Rows of the decoders begin at unit length, so that a code is a projection from the
    first step on: from short ones, a slow learning rate lets few latents grow before
    the others.  Adam moves every entry by the learning rate, which turns a long row of
    many dimensions too far: the rate is at most what moves one by a twentieth of its
    length.

    Args:
      key: random key.
      rows: ``[N, D]``, in units of their size.
      description: which dictionaries.
      signed: whether codes have a sign.
      settings: hyper-parameter to ``[S]`` values; the whole description is trained
        with each of them, instead of its learning rate and the defaults.  Learning
        rates are lowered as that of the description.

    Returns:
      Rows of the decoders ``[M_i, D]`` in the span of the gradients, of unit length, of
      latents that are used: dictionaries of the first setting, then of the next.
    """
    dim, basis = rows.shape[1], _span(rows)
    latents = int(np.clip(description.latents * len(basis), 16, description.most))
    codes = [min(k, latents) for k in description.codes]
    sae = topk(dim, latents, max(codes), signed=signed, decoder_norm=1.0)
    objective = dictionary_objective(sae, dead_latents=0)
    many = population(trainer(sae, objective, center=False))
    start, order = jax.random.split(key)
    every = np.repeat(np.array(codes, float), description.repeats)
    given = {"learning_rate": [description.learning_rate], **(settings or {})}
    num = max(np.size(values) for values in given.values())
    hyper = {
        name: jnp.asarray(np.repeat(np.broadcast_to(x, num), len(every)), float)
        for name, x in given.items()
    }
    hyper["learning_rate"] = jnp.minimum(hyper["learning_rate"], _TURN * dim**-0.5)
    state = many.init(
        jax.random.split(start, num * len(every)),
        k=jnp.asarray(np.tile(every, num), float),
        **hyper,
    )
    taps = Taps(rows, None, jnp.ones(len(rows)))
    batch = min(description.batch, len(rows))
    seed = int(jax.random.randint(order, (), 0, 2**31 - 1))
    state = fit(
        many,
        state,
        array_batches(taps, batch=batch, seed=seed),
        steps=description.steps,
        progress=False,
        check_data=False,
    )
    some = rows[:_CHUNK] / state.running["acts_scale"][0]
    return [_inside(basis, used) for used in _used_rows(sae, state, some)]


def _inside(basis: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Unit rows in a span; what they began with beside it is in no gradient."""
    rows = rows @ basis.T @ basis
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _used_rows(sae: Dictionary, state: TrainState, some: Array) -> list[np.ndarray]:
    """Rows of the latents that some rows use, of every member."""

    def mean_square(member: tuple[Params, Array]) -> Array:
        params, k = member
        return jnp.mean(sae.encode(params, some, k=k) ** 2, axis=0)

    # One member after the other: their codes together may fill the memory.
    energy = np.asarray(jax.lax.map(mean_square, (state.params, state.hyper["k"])))
    decoders = np.asarray(state.params["W_dec"], np.float64)
    pairs = zip(decoders, energy, strict=True)
    return [rows[each > _USED * each.max()] for rows, each in pairs]


def recurring(
    described: Sequence[ArrayLike],
    *,
    support: int | None = None,
    cosine: float = _SAME,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Directions that several sets of unit rows have in common.

    The direction with most neighbours (:math:`|\cos|` of at least ``cosine``) in other
    sets is replaced by the leading direction of them all, they are taken away, and so
    on.  In a plane, where every direction is near one of a few others, neighbours
    have to be within a sixteenth of a half turn.

    Args:
      described: sets of unit rows ``[R_i, D]``.
      support: sets in which a direction has to be, as in :func:`consensus`.
      cosine: from where on two directions are the same.

    Returns:
      Unit rows ``[R, D]`` and in how many sets each was, most first.

    Example:
      >>> import numpy as np
      >>> sets = [np.eye(3)[:2], np.eye(3)[1:]]
      >>> np.abs(recurring(sets, support=2, cosine=0.9)[0]).round(3)
      array([[0., 1., 0.]])
    """
    rows = np.concatenate([np.asarray(one, np.float64) for one in described])
    origin = np.repeat(np.arange(len(described)), [len(one) for one in described])
    if np.linalg.matrix_rank(rows, tol=1e-2 * len(rows) ** 0.5) == 2:
        cosine = max(cosine, _IN_A_PLANE)
    near = np.abs(rows @ rows.T) >= cosine
    member = origin[:, None] == np.arange(len(described))[None, :]
    counts = near.astype(np.float32) @ member  # neighbours in every set
    left = np.ones(len(rows), bool)
    found, supports = [], []
    while left.any():
        in_sets = np.where(left, (counts > 0.5).sum(1), 0)
        best = int(in_sets.argmax())
        if support is None:  # none recurs more often than the first
            support = max(2, int(in_sets[best]) // _OF_MOST)
        if in_sets[best] < support:
            break
        here = left & near[best]
        _, _, vt = np.linalg.svd(rows[here], full_matrices=False)
        found.append(vt[0] * np.sign(vt[0] @ rows[best]))
        supports.append(int(in_sets[best]))
        counts -= near[:, here].astype(np.float32) @ member[here]
        left &= ~here
    empty = np.zeros((0, rows.shape[1]))
    return np.stack(found) if found else empty, np.array(supports, int)


def tapped(subject: Subject, inputs: Inputs, readout: Readout) -> Taps:
    """Activations and gradients at the site of a subject."""
    one = tap(
        subject.probed,
        subject.params,
        inputs,
        sites=subject.site,
        readout=readout,
        batch_size=_CHUNK,
    )
    return one[subject.site]


def _span(rows: Array) -> np.ndarray:
    """Orthonormal rows that span what there is of rows ``[N, D]``."""
    parts = (np.asarray(rows[i : i + _CHUNK]) for i in range(0, len(rows), _CHUNK))
    square = sum(part.T.astype(np.float64) @ part for part in parts)
    values, axes = np.linalg.eigh(square)
    return axes.T[values > 1e-6 * values[-1]]
