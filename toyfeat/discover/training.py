"""Train an ensemble of TopK dictionaries on rows, all at once."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.data import array_batches
from toyfeat.dictionary import losses, topk
from toyfeat.dictionary.types import Dictionary
from toyfeat.discover.gradients import row_span
from toyfeat.train import fit, population, trainer
from toyfeat.train.types import TrainState
from toyfeat.types import Array, ArrayLike, Params, Taps

# Fewest latents of a dictionary, so that rows that span a line or a plane get latents
# to spare.  Not tuned.
_MIN_LATENTS = 16

# Smallest mean squared code of a latent that counts as in use, as a share of that of
# the strongest latent.  Not swept; section 8 of docs/research.md has how many latents
# stay in use, and section 12 how many die where rows turn too fast.
_MIN_ENERGY = 1e-3

# Rows whose codes decide which latents are in use: enough to meet a latent that one row
# in a thousand uses, and little memory.
_ENERGY_ROWS = 5000


def train_dictionaries(
    key: Array,
    rows: Array,
    *,
    ks: Sequence[int],
    starts: int,
    latents_per_dim: int,
    max_latents: int,
    steps: int,
    batch_size: int,
    max_row_step: float,
    settings: Mapping[str, ArrayLike],
    signed: bool,
) -> list[list[np.ndarray]]:
    r"""Train one TopK dictionary for every setting, ``k`` and random start.

    All of them are one population.  Decoder rows start at unit length, so that a code
    is a projection from the first step on: with short rows and a slow learning rate a
    few latents grow before the others.  Adam moves every entry by about the learning
    rate, and so a row of length 1 by :math:`\sqrt D` times that; the learning rate is
    lowered to ``max_row_step / sqrt(D)`` where it is larger.

    Args:
      key: random key.
      rows: ``[N, D]``, of unit root mean square.
      ks: codes per row, one dictionary for each; at most as many as there are latents.
      starts: random starts of each.
      latents_per_dim: latents per dimension of the span of the rows.
      max_latents: most latents of a dictionary.
      steps: of training.
      batch_size: rows per step.
      max_row_step: length by which a step may turn a decoder row.
      settings: hyper-parameter to ``[S]`` values or one; the whole ensemble is trained
        with each.  ``learning_rate`` must be among them.
      signed: whether codes may be negative.

    Returns:
      For each setting ``len(ks) * starts`` arrays ``[M_i, D]``: the decoder rows of the
      latents in use, inside the span of ``rows`` and of unit length.

    References:
      ``docs/research.md``, section 8 for the start and section 12 for the bound.
    """
    dim = rows.shape[1]
    basis = row_span(rows)

    # One trainer for the whole population: as many latents and codes as any member has.
    num_latents = int(np.clip(latents_per_dim * len(basis), _MIN_LATENTS, max_latents))
    ks = [min(k, num_latents) for k in ks]
    sae = topk(dim, num_latents, max(ks), signed=signed, decoder_norm=1.0)
    objective = losses.default(sae, dead_latents=0)
    members = population(trainer(sae, objective, center=False))

    # Every member's hyper-parameters, with a learning rate that turns no row too far.
    hyper = _member_settings(settings, ks, starts)
    hyper["learning_rate"] = jnp.minimum(
        hyper["learning_rate"], max_row_step * dim**-0.5
    )

    # Train them together, on the same batches.
    init_key, order_key = jax.random.split(key)
    state = members.init(jax.random.split(init_key, len(hyper["k"])), **hyper)
    batches = array_batches(
        Taps(rows, None, jnp.ones(len(rows))),
        batch=min(batch_size, len(rows)),
        seed=int(jax.random.randint(order_key, (), 0, 2**31 - 1)),
    )
    state = fit(members, state, batches, steps=steps, progress=False, check_data=False)

    # Keep the latents in use, without what their rows started with outside the span.
    sample = rows[:_ENERGY_ROWS] / state.running["acts_scale"][0]
    atoms = [_project(used, basis) for used in _used_rows(sae, state, sample)]
    per_setting = len(ks) * starts
    return [atoms[i : i + per_setting] for i in range(0, len(atoms), per_setting)]


def _member_settings(
    settings: Mapping[str, ArrayLike], ks: Sequence[int], starts: int
) -> dict[str, Array]:
    """Return hyper-parameters ``[P]``: settings slowest, then ``ks``, then starts."""
    num_settings = max(np.size(values) for values in settings.values())
    member_ks = np.repeat(np.array(ks, float), starts)
    hyper = {
        name: np.repeat(np.broadcast_to(values, num_settings), len(member_ks))
        for name, values in settings.items()
    }
    hyper["k"] = np.tile(member_ks, num_settings)
    return {name: jnp.asarray(values, float) for name, values in hyper.items()}


def _project(rows: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Project rows on the span of orthonormal ones, and scale them to unit length."""
    rows = rows @ basis.T @ basis
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _used_rows(sae: Dictionary, state: TrainState, sample: Array) -> list[np.ndarray]:
    """Return the decoder rows of every member's latents that the sample uses."""

    def mean_square(member: tuple[Params, Array]) -> Array:
        params, k = member
        return jnp.mean(sae.encode(params, sample, k=k) ** 2, axis=0)

    # One member after the other: their codes together may fill the memory.
    energy = np.asarray(jax.lax.map(mean_square, (state.params, state.hyper["k"])))
    decoders = np.asarray(state.params["W_dec"], np.float64)
    return [
        rows[share > _MIN_ENERGY * share.max()]
        for rows, share in zip(decoders, energy, strict=True)
    ]
