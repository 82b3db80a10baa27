r"""Find the readers of a model as the directions that many dictionaries agree on.

Gradients of one example are combinations of the readers that are active in it.  Which
combinations, and of how many readers, depends on the readout and on the model.  A
dictionary trained on the wrong gradients, or with the wrong number of codes, finds
other atoms than the readers, but other ones every time.  So several dictionaries are
trained on the gradients of two readouts, and the directions that they share are kept
and refined on the gradients.

``training`` trains the dictionaries, ``agreement`` compares them, ``refinement`` makes
directions exact, ``circles`` finds the planes that no sparse code describes.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.discover.agreement import (
    SAME_COSINE,
    GradientDictionaries,
    agree_and_refine,
)
from toyfeat.discover.circles import circular_planes
from toyfeat.discover.gradients import (
    WhiteCoordinates,
    acts_covariance,
    gradient_rows,
    tap_subject,
    unit_mean_square,
    white_coordinates,
)
from toyfeat.discover.training import train_dictionaries
from toyfeat.tap import readouts
from toyfeat.types import Array, ArrayLike, Features, Subject

# Smallest eigenvalue of the gradients' second moment that counts, as a share of the
# largest.  Float32 rounds the strongest direction at 6e-8 of its size; a direction with
# a standard deviation of 3e-5 of it has .2 % of rounding in it.
_MIN_EIGENVALUE = 1e-9


class ConsensusConfig(NamedTuple):
    """Settings of :func:`toyfeat.discover.consensus`; the defaults serve all models.

    Attributes:
      examples: inputs that are tapped.
      num_directions: random directions of the output per example.
      ks: codes per gradient; a dictionary is trained with each.
      starts: random starts of each dictionary.
      latents_per_dim: latents per dimension that the gradients span.
      max_latents: most latents of a dictionary.
      steps: of training.
      batch_size: gradients per step.
      learning_rate: of Adam; lowered to ``max_row_step / sqrt(D)`` if that is less.
      max_row_step: length by which a step may turn a decoder row of unit length.  A
        row that turns too far leaves its examples and dies (``docs/research.md``,
        section 12).
    """

    examples: int = 20_000
    num_directions: int = 4
    ks: tuple[int, ...] = (1, 2, 4)
    starts: int = 2
    latents_per_dim: int = 8
    max_latents: int = 512
    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 3e-3
    max_row_step: float = 0.05


DEFAULT_CONFIG = ConsensusConfig()


class ConsensusResult(NamedTuple):
    """Features found by :func:`toyfeat.discover.consensus`.

    Attributes:
      features: readers and their writers; the two rows of a circular plane share a
        ``group``.
      support: ``[R]`` int, in how many dictionaries a reader is; 0 for the two rows of
        a circular plane, which have no direction of their own.
      num_dictionaries: how many dictionaries there were.
    """

    features: Features
    support: np.ndarray
    num_dictionaries: int


def consensus(
    key: Array,
    subject: Subject,
    *,
    config: ConsensusConfig = DEFAULT_CONFIG,
    support: int | None = None,
    cosine: float = SAME_COSINE,
) -> ConsensusResult:
    r"""Find the readers of a model by the agreement of dictionaries of its gradients.

    1. Tap the gradients of two readouts: half the squared norm of the output, whose
       gradient :math:`J^\top y` weighs every reader by what it adds to the output (the
       only one that tells readers apart behind a linear read-out), and random
       directions :math:`J^\top u` (the only one that tells apart features that always
       come together).
    2. Train TopK dictionaries of each with several ``k`` and random starts.
    3. Keep the directions that enough dictionaries share within ``cosine``.
    4. Refine them on the gradients of the readout that is sparse in them, and leave out
       those that are not needed there and have little support.
    5. Add the circles of the first readout (:func:`toyfeat.discover.circular_planes`),
       which no sparse code describes, and leave out other directions in their span.
    6. Return the regression patterns :math:`\Sigma r` of the readers as writers.

    Args:
      key: random key.
      subject: the model, its inputs and the site.
      config: how gradients are sampled and dictionaries are trained.
      support: dictionaries in which a reader has to be; ``None`` for more than half of
        the largest support, or a third where those do not explain the gradients
        (``docs/research.md``, sections 8 and 13).
      cosine: ``|cos|`` from which two directions are the same; refinement moves none
        further than that.

    Returns:
      :class:`toyfeat.discover.ConsensusResult`; the readers with the largest support
      first, circular planes last.

    Raises:
      ValueError: if the support or the cosine is out of range, or all gradients are 0.

    Example:
      >>> import jax
      >>> from toyfeat.models import planted
      >>> task = planted.product_space(jax.random.key(0), colours=2, shapes=2, dim=6)
      >>> short = ConsensusConfig(examples=500, steps=100)
      >>> result = consensus(jax.random.key(1), planted.subject_of(task), config=short)
      >>> readers, writers = result.features[:2]
      >>> readers.shape[1], readers.shape == writers.shape
      (6, True)

    References:
      Meinshausen and Bühlmann (2010), "Stability selection"; Haufe et al. (2014),
      equation 6, for the writers; ``docs/research.md`` for the experiments.
    """
    num_dictionaries = 2 * len(config.ks) * config.starts
    possible = support is None or 1 <= support <= num_dictionaries
    if not possible or not 0 < cosine < 1:
        raise ValueError(
            f"consensus: wanted support in 1 .. {num_dictionaries}, the number of "
            f"dictionaries, and cosine in (0, 1), got {support} and {cosine}"
        )
    gradients = train_gradient_dictionaries(key, subject, config)
    (dictionaries,) = gradients.dictionaries
    rows, supports = agree_and_refine(
        dictionaries, gradients, support=support, cosine=cosine
    )
    readers = jnp.asarray(rows, float)
    writers = readers @ acts_covariance(gradients.taps)

    # The two rows of a circular plane, which come last, are one mechanism.
    num_planes = len(gradients.planes) // 2
    num_directions = len(rows) - 2 * num_planes
    group = np.append(
        np.arange(num_directions), num_directions + np.arange(2 * num_planes) // 2
    )
    features = Features(readers, writers, group=group)
    return ConsensusResult(features, supports, len(dictionaries))


def train_gradient_dictionaries(
    key: Array,
    subject: Subject,
    config: ConsensusConfig,
    *,
    settings: Mapping[str, ArrayLike] | None = None,
) -> GradientDictionaries:
    """Train dictionaries of the gradients of both readouts, and look for circles.

    Args:
      key: random key.
      subject: the model, its inputs and the site.
      config: which dictionaries, and of how many gradients.
      settings: hyper-parameter to ``[S]`` values; all dictionaries are trained with
        each of them, instead of ``config.learning_rate`` and the trainer's defaults.
        Learning rates are lowered as that of the config.

    Returns:
      :class:`GradientDictionaries`, with ``S`` lists of dictionaries.

    Raises:
      ValueError: if all gradients are 0, or one is not finite.
    """
    inputs_key, directions_key, norm_key, random_key, circles_key = jax.random.split(
        key, 5
    )

    # Gradients of both readouts, at the same inputs.
    inputs = subject.sample(inputs_key, config.examples)
    directions = readouts.random_directions(
        directions_key, config.num_directions, "gaussian"
    )
    taps = tap_subject(subject, inputs, readouts.half_squared_norm())
    coordinates, norm_grads, direction_grads = _whiten(
        gradient_rows(taps), gradient_rows(tap_subject(subject, inputs, directions))
    )

    # Dictionaries of each.  Codes of the first have one sign, which tells a direction
    # from its opposite; random directions have none (docs/research.md, section 5).
    train = partial(
        train_dictionaries,
        ks=config.ks,
        starts=config.starts,
        latents_per_dim=config.latents_per_dim,
        max_latents=config.max_latents,
        steps=config.steps,
        batch_size=config.batch_size,
        max_row_step=config.max_row_step,
        settings={"learning_rate": np.array(config.learning_rate), **(settings or {})},
    )
    of_norm = train(norm_key, norm_grads, signed=False)
    of_directions = train(random_key, direction_grads, signed=True)

    # Circles, which no sparse code describes.
    planes = np.asarray(circular_planes(circles_key, norm_grads), np.float64)
    return GradientDictionaries(
        dictionaries=[a + b for a, b in zip(of_norm, of_directions, strict=True)],
        norm_grads=norm_grads,
        direction_grads=direction_grads,
        planes=planes,
        coordinates=coordinates,
        taps=taps,
    )


def _whiten(
    norm_grads: Array, direction_grads: Array
) -> tuple[WhiteCoordinates, Array, Array]:
    """Map both tables to the coordinates in which the second one is white.

    Readers are covariant: in other coordinates of the site they are other rows.  In
    white coordinates the rows are the same for all of them, up to a rotation.
    """
    coordinates = white_coordinates(direction_grads, min_eigenvalue=_MIN_EIGENVALUE)
    norm_grads, direction_grads = (
        unit_mean_square(np.asarray(rows) @ coordinates.whiten)
        for rows in (norm_grads, direction_grads)
    )
    return coordinates, norm_grads, direction_grads
