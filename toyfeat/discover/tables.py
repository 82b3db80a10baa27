"""Gradients of two readouts as tables of white rows, and the circles in them."""

from typing import NamedTuple

import jax
import numpy as np

from toyfeat.discover.circles import circular_planes
from toyfeat.discover.gradients import (
    WhiteCoordinates,
    gradient_rows,
    tap_subject,
    unit_mean_square,
    white_coordinates,
)
from toyfeat.tap import readouts, site_shapes
from toyfeat.types import Array, Subject, Taps

# Smallest eigenvalue of the gradients' second moment that counts, as a share of the
# largest.  Float32 rounds the strongest direction at 6e-8 of its size; a direction with
# a standard deviation of 3e-5 of it has .2 % of rounding in it.
_MIN_EIGENVALUE = 1e-9

# Examples in which planes and subspaces are looked for, not swept; and the shortest
# gradients of an example that count, as a share of the root mean square, as of rows.
_STACK_EXAMPLES = 4000
_MIN_LENGTH = 1e-6

# Inputs that are tapped, at least, and per dimension of the site.  Of 2000 readers in
# 576 dimensions, the rarest in one of a thousand examples, 983 are found with 20,000
# examples and 1994 with 60,000 (docs/research.md, section 15).
_MIN_EXAMPLES = 20_000
_EXAMPLES_PER_DIM = 100


class GradientTables(NamedTuple):
    """Gradients of two readouts, and the circles found in them.

    All rows are in the ``R`` white coordinates of the gradients along random directions
    of the output; their entries have a root mean square of 1.

    Attributes:
      norm_grads: ``[N, R]``, gradients of half the squared norm of the output.
      direction_grads: ``[N', R]``, those along random directions of the output.
      planes: ``[2 P, R]``, circular planes of ``norm_grads``.
      coordinates: maps from the site to the white coordinates, and back.
      taps: activations, and gradients of half the squared norm of the output.
      stacks: ``[n, K, R]`` of both, of examples whose ``K`` readouts stay together.
    """

    norm_grads: Array
    direction_grads: Array
    planes: np.ndarray
    coordinates: WhiteCoordinates
    taps: Taps
    stacks: tuple[np.ndarray, ...] = ()


def tap_readouts(
    key: Array, subject: Subject, *, examples: int | None, num_directions: int
) -> tuple[Taps, Taps]:
    """Tap the gradients of both readouts.

    Args:
      key: random key.
      subject: the model, its inputs and the site.
      examples: inputs that are tapped; ``None`` for 20,000, or a hundred per dimension
        of the site where that is more.
      num_directions: random directions of the output per example.

    Returns:
      Taps of half the squared norm of the output, and along random directions of it.
    """
    inputs_key, directions_key = jax.random.split(key)
    num = examples if examples is not None else default_examples(key, subject)
    inputs = subject.sample(inputs_key, num)
    directions = readouts.random_directions(directions_key, num_directions, "gaussian")
    norm = readouts.half_squared_norm()
    return tap_subject(subject, inputs, norm), tap_subject(subject, inputs, directions)


def default_examples(key: Array, subject: Subject) -> int:
    """Return how many inputs are tapped at a site, by its width."""
    inputs = subject.sample(key, 1)
    shapes = site_shapes(subject.probed, subject.params, inputs)
    return max(_MIN_EXAMPLES, _EXAMPLES_PER_DIM * shapes[subject.site].shape[-1])


def gradient_tables(
    key: Array, norm_taps: Taps, direction_taps: Taps
) -> GradientTables:
    """Whiten the gradients of both readouts, and look for circles.

    Examples of weight 0, such as padding and massive activations, are left out; of
    other weights only the writers know.

    Args:
      key: random key.
      norm_taps: gradients ``[N, 1, D]`` of half the squared norm of the output.
      direction_taps: gradients ``[N', K, D]`` along random directions of the output.

    Returns:
      Rows in white coordinates.

    Raises:
      ValueError: if widths differ, all gradients are 0, or one is not finite.
    """
    norm_taps, direction_taps = map(_counted, (norm_taps, direction_taps))
    norm_rows, direction_rows = map(gradient_rows, (norm_taps, direction_taps))
    if norm_rows.shape[1] != direction_rows.shape[1]:
        raise ValueError(
            "consensus: both taps must be of one site, got widths "
            f"{norm_rows.shape[1]} and {direction_rows.shape[1]}"
        )
    coordinates, norm_grads, direction_grads = _whiten(norm_rows, direction_rows)
    planes = np.asarray(circular_planes(key, norm_grads), np.float64)
    return GradientTables(
        norm_grads=norm_grads,
        direction_grads=direction_grads,
        planes=planes,
        coordinates=coordinates,
        taps=norm_taps,
        stacks=tuple(_stack(part, coordinates) for part in (norm_taps, direction_taps)),
    )


def _counted(taps: Taps) -> Taps:
    """Leave out the examples of weight 0."""
    counts = np.asarray(taps.weights) > 0
    if counts.all() or not counts.any():
        return taps
    return taps._replace(
        acts=taps.acts[counts],
        grads=None if taps.grads is None else taps.grads[counts],
        weights=taps.weights[counts],
    )


def _stack(taps: Taps, coordinates: WhiteCoordinates) -> np.ndarray:
    """Return white gradients ``[n, K, R]`` of evenly spaced examples with any."""
    grads = np.asarray(taps.grads)
    grads = grads / np.abs(grads).max()
    lengths = np.linalg.norm(grads, axis=(1, 2))
    nonzero = np.flatnonzero(lengths > _MIN_LENGTH * np.sqrt(np.mean(lengths**2)))
    place = np.linspace(0, len(nonzero) - 1, min(len(nonzero), _STACK_EXAMPLES))
    return grads[nonzero[place.astype(int)]] @ coordinates.whiten


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
