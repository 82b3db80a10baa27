"""The same task in other coordinates of its site, badly conditioned by construction."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.linalg import dense
from toyfeat.models.planted.heads import dot, rotation
from toyfeat.models.planted.task import Task
from toyfeat.tap.probes import apply_probe
from toyfeat.types import Acts, Array, ArrayLike, Inputs, Outputs, Params, Probe, Probed

# Largest condition number: float32 keeps 1e-7 of a number, so then 1e-3 of a reading.
_MAX_CONDITION = 1e4


def recondition(key: Array, task: Task, *, condition: float = 100.0) -> Task:
    r"""Change the coordinates of a task's site by a random matrix of a given condition.

    The activations become :math:`a' = a M` and the model goes on from
    :math:`a' M^{-1}`, so its outputs stay as they are.  Readers become
    :math:`r' = r M^{-\top}` (rows), since :math:`a' \cdot r' = a \cdot r`; gradients
    transform in the same way, writers as activations, :math:`w' = w M`.  What is
    planted is the same, and a method that depends on the model alone finds the same.

    :math:`M = U \mathrm{diag}(s) V^\top` with random orthogonal :math:`U`, :math:`V`
    and :math:`s` evenly spaced on a logarithmic scale from :math:`\sqrt{c}` to
    :math:`1 / \sqrt{c}`.

    Args:
      key: random key of the matrix.
      task: any planted task whose site is an array ``[..., D]``.
      condition: :math:`c`, ratio of the largest to the least singular value, in
        1 .. 1e4; a site of one dimension has condition 1.

    Returns:
      The task in the new coordinates.  Its parameters are ``{"model", "map",
      "inverse"}``: those of the task, :math:`M` and :math:`M^{-1}`.

    Raises:
      ValueError: if the condition is out of range, or the truth has no rows from which
        the width of the site could be known.

    Example:
      >>> import jax, numpy as np
      >>> from toyfeat.models import planted
      >>> task = planted.product_space(jax.random.key(0), dim=6, colours=2, shapes=2)
      >>> other = planted.recondition(jax.random.key(1), task, condition=30.0)
      >>> round(float(np.linalg.cond(other.params["map"])), 1)
      30.0
      >>> inputs = task.sample(jax.random.key(2), 3)
      >>> after, _ = other.probed(other.params, inputs, {})
      >>> bool((after == task.probed(task.params, inputs, {})[0]).all())
      True
    """
    if not 1 <= condition <= _MAX_CONDITION:  # also refuses NaN
        raise ValueError(
            f"recondition: wanted a condition in 1 .. {_MAX_CONDITION:g}, got "
            f"{condition}; 100 is bad enough for most methods"
        )
    matrix, inverse = _random_map(key, _site_width(task), condition)
    truth = task.truth
    return task._replace(
        probed=partial(_run, task.probed, task.site),
        params={"model": task.params, "map": matrix, "inverse": inverse},
        truth=truth._replace(
            readers=_times(truth.readers, inverse.T),
            writers=_times(truth.writers, matrix),
        ),
        name=f"{task.name}, condition {condition:g}",
        features=partial(_features, task.features),
        ignored=_moved_span(task.ignored, matrix),
        about=f"{task.about} The site is in random coordinates of condition "
        f"{condition:g}.",
    )


def _site_width(task: Task) -> int:
    """Return ``D``, which the rows of the truth have."""
    for rows in (task.truth.readers, task.truth.writers):
        if rows is not None:
            return rows.shape[1]
    raise ValueError(
        "recondition: wanted a truth with readers or writers [F, D], got a truth with "
        "neither; give rows [0, D] where nothing is planted"
    )


def _random_map(key: Array, width: int, condition: float) -> tuple[Array, Array]:
    """Draw a matrix ``[D, D]`` of a condition, and its inverse."""
    left_key, right_key = jax.random.split(key)
    left, right = rotation(left_key, width), rotation(right_key, width)
    # Exponents from 1/2 to -1/2: the geometric mean of the singular values is 1.
    half = math.log(condition) / 2 if width > 1 else 0.0
    sizes = jnp.exp(jnp.linspace(half, -half, width))
    matrix = dot(left * sizes[None, :], right.T)
    # The inverse by transposes, as exact as the matrix itself.
    return matrix, dot(right / sizes[None, :], left.T)


def _run(
    probed: Probed,
    site: str,
    params: Params,
    inputs: Inputs,
    probes: Mapping[str, Probe],
) -> tuple[Outputs, Acts]:
    """Run the model with the probe of the site in the new coordinates."""
    matrix, inverse = params["map"], params["inverse"]
    probe = probes.get(site)

    def probe_in_new_coordinates(acts: Array) -> Array:
        moved = dot(acts, matrix)
        # Only the change is taken back: without one the outputs are the same bits.
        return acts + dot(apply_probe(site, moved, probe) - moved, inverse)

    if probe is not None:
        probes = {**probes, site: probe_in_new_coordinates}
    outputs, acts = probed(params["model"], inputs, probes)
    if site in acts:
        acts = {**acts, site: dot(acts[site], matrix)}
    return outputs, acts


def _features(
    function: Callable[[Params, Inputs], Array], params: Params, inputs: Inputs
) -> Array:
    """Compute the planted features, which do not depend on coordinates."""
    return function(params["model"], inputs)


def _times(rows: ArrayLike | None, matrix: Array) -> Array | None:
    return None if rows is None else dot(jnp.asarray(rows), matrix)


def _moved_span(rows: Array | None, matrix: Array) -> Array | None:
    """Return orthonormal rows of the span of ``rows @ matrix``."""
    if rows is None:
        return None
    return dense.qr(dot(jnp.asarray(rows), matrix).T)[0].T
