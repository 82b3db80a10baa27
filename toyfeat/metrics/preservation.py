"""Output of a model that is preserved by features in place of its activations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.metrics.assignment import unit_rows
from toyfeat.models.planted.task import Task
from toyfeat.tap import readouts, tap
from toyfeat.types import Array, Inputs, Outputs

# Standard deviation of what a reader reads, as a share of that of the activations,
# below which it reads float32 rounding.
_MIN_READ_STD = 1e-6

# Smallest eigenvalue that a pseudoinverse of standardized rows inverts, as a share of
# the largest: some rows may be the same.
_PINV_RCOND = 1e-6

# Variance of an output, as a share of its square, below which it is constant up to
# float32 rounding.
_MIN_OUTPUT_VARIANCE = 1e-10

# Held-out inputs whose activations give the mean and the covariance: many times as many
# as a planted site has dimensions.  Not tuned.
_NUM_HELD_OUT = 5000


class _Acts(NamedTuple):
    """Activations of a task, float64.

    Attributes:
      acts: ``[N, D]``, those that are replaced.
      grads: ``[N, D]``, gradients of half the squared output.
      held_out: ``[N', D]``, those that give the mean and the covariance.
      dtype: of the model's own activations.
    """

    acts: np.ndarray
    grads: np.ndarray
    held_out: np.ndarray
    dtype: np.dtype


def preserved_share(
    key: Array,
    task: Task,
    readers: np.ndarray,
    writers: np.ndarray,
    *,
    num: int,
    examples: int,
) -> float:
    r"""Compute the share of output variance that features preserve.

    The activation :math:`a` of every example is replaced in two ways, and the better
    one of the features counts:

    - by its projection on writers and on the mean activation, with the unit writers of
      the largest attributions :math:`|(w_j \cdot a) (w_j \cdot g)|`, where :math:`g` is
      the gradient of half the squared output;
    - by the best linear guess of it from what readers read, :math:`\mu + \Sigma R_S^T
      (R_S \Sigma R_S^T)^+ R_S (a - \mu)`, with the readers of the largest
      :math:`|r_j \cdot (a - \mu) \; g \cdot \Sigma r_j| / r_j^T \Sigma r_j`.

    Mean and covariance are those of held-out inputs.  The first suits writers that
    are features of the activations; the true readers can do poorly in it, because parts
    of writers that no reader reads may be large.  Where ``num`` rows span all that
    activations vary in, any rows preserve everything.

    Args:
      key: random key of the inputs.
      task: the model.
      readers: ``[R, D]`` float64, without rows of 0.
      writers: likewise.
      num: readers or writers per example, at most ``R``.
      examples: how many inputs.

    Returns:
      At most 1, and less than 0 where the replacement does harm; where the output is
      the same for all inputs, 1 if that is kept and 0 if not.

    Raises:
      ValueError: if the site has no gradients.
    """
    inputs = task.sample(key, examples)
    acts = _collect_acts(key, task, inputs)
    replacements = (
        _project_on_writers(num, writers, acts),
        _guess_from_readers(num, readers, acts),
    )

    # The model's output with each of them, against the output itself.
    outputs = _flat(task.probed(task.params, inputs, {})[0], examples)
    if not np.all(np.isfinite(outputs)):
        raise ValueError(
            "preserved_share: outputs must be finite, got "
            f"{int(np.sum(~np.isfinite(outputs)))} entries that are not; look at the "
            "parameters of the task"
        )
    shares = []
    for replacement in replacements:
        value = jnp.asarray(replacement, acts.dtype)
        probe = {task.site: lambda _, value=value: value}
        spliced = _flat(task.probed(task.params, inputs, probe)[0], examples)
        shares.append(_share_kept(outputs, spliced))
    return float(np.max(shares))


def _collect_acts(key: Array, task: Task, inputs: Inputs) -> _Acts:
    """Collect activations to replace, and others for their mean and covariance."""
    taps = tap(
        task.probed,
        task.params,
        inputs,
        sites=task.site,
        readout=readouts.half_squared_norm(),
    )[task.site]
    if taps.grads is None:
        raise ValueError(f"preserved_share: got no gradients at {task.site!r}")
    # Held out, so that no replacement gains by fitting the examples it is scored on.
    others = task.sample(jax.random.fold_in(key, 1), _NUM_HELD_OUT)
    held_out = task.probed(task.params, others, {})[1][task.site]
    return _Acts(
        acts=np.asarray(taps.acts, np.float64),
        grads=np.asarray(taps.grads[:, 0], np.float64),
        held_out=np.asarray(held_out, np.float64),
        dtype=taps.acts.dtype,
    )


def _share_kept(outputs: np.ndarray, spliced: np.ndarray) -> float:
    """Compute the share of the outputs' variance that is left; of constants, 0 or 1."""
    total = np.sum((outputs - outputs.mean(0)) ** 2)
    noise = _MIN_OUTPUT_VARIANCE * np.sum(outputs**2)
    lost = np.sum((outputs - spliced) ** 2)
    return float(1 - lost / total if total > noise else lost <= noise)


def _flat(outputs: Outputs, examples: int) -> np.ndarray:
    """Join all leaves of the outputs as ``[B, entries]``, float64."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(outputs)]
    return np.concatenate([x.reshape(examples, -1) for x in leaves], axis=1)


def _project_on_writers(num: int, writers: np.ndarray, data: _Acts) -> np.ndarray:
    """Project on the mean activation and the writers of the largest attributions."""
    # Attribution of a unit writer: its coordinate times the gradient along it.
    unit = unit_rows(writers)
    best = _largest(num, (data.acts @ unit.T) * (data.grads @ unit.T))
    # Every example also keeps its part along the mean activation.
    mean = data.held_out.mean(0) / (np.linalg.norm(data.held_out.mean(0)) or 1.0)
    mean = np.broadcast_to(mean, (len(data.acts), 1, len(mean)))
    rows = np.concatenate([unit[best], mean], axis=1)
    return _reconstruct(rows, rows, data.acts)


def _guess_from_readers(num: int, readers: np.ndarray, data: _Acts) -> np.ndarray:
    """Guess activations from what the readers of the largest attributions read."""
    # Readers in units of what they read, and the activation that goes with each.
    mean = data.held_out.mean(0)
    centred = (data.held_out - mean) / np.sqrt(len(data.held_out))
    unit = unit_rows(readers)
    std = np.linalg.norm(centred @ unit.T, axis=0)
    varies = std > _MIN_READ_STD * np.linalg.norm(centred)
    rows = unit / np.where(varies, std, np.inf)[:, None]
    patterns = (rows @ centred.T) @ centred

    # The best linear guess from the best readers of every example.
    attributions = ((data.acts - mean) @ rows.T) * (data.grads @ patterns.T)
    best = _largest(num, attributions)
    return mean + _reconstruct(rows[best], patterns[best], data.acts - mean)


def _largest(num: int, effects: np.ndarray) -> np.ndarray:
    """Return ``[N, num]``, the columns of the largest magnitudes in each row."""
    return np.argsort(-np.abs(effects), axis=1, kind="stable")[:, :num]


def _reconstruct(
    rows: np.ndarray, patterns: np.ndarray, acts: np.ndarray
) -> np.ndarray:
    r"""Reconstruct each example from its own rows: :math:`P^T (R P^T)^+ R a`.

    Rows and patterns are ``[N, k, D]``; :math:`R P^T` must be symmetric.
    """
    inverse = np.linalg.pinv(
        rows @ patterns.transpose(0, 2, 1), rcond=_PINV_RCOND, hermitian=True
    )
    codes = inverse @ (rows @ acts[..., None])
    return (codes.transpose(0, 2, 1) @ patterns)[:, 0]
