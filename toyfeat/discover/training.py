"""Train dictionaries of rows by sparse coding, without a learning rate."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.types import Array, ArrayLike

# Fewest latents of a dictionary, so that rows that span a line or a plane get latents
# to spare.  Not tuned.
_MIN_LATENTS = 16

# Steps between two looks at which atoms are in use.
_STEPS_PER_CHUNK = 10

# Last share of the training in which unused atoms are not replaced, so that all atoms
# have time to become exact: the last third.
_SETTLING_SHARE = 1 / 3

# Rows of the last chunk that have to use an atom.  A chunk has some 20,000 rows, so an
# atom that one row in ten thousand uses is in use once in two chunks.
_MIN_USES = 3

# |cos| from which two atoms are copies of one another, as between dictionaries.
_SAME_COSINE = 0.95

# Uses after which an atom, a weighted mean of the rows that used it last, has forgotten
# all but a third.  Fewer are noise, more keep what other atoms were at the time.
_MEMORY = 200

# Ridge of the fit of codes, as a share of an atom's square; float32 atoms may become
# one.
_RIDGE = 1e-4

# Length of a residual that counts, as a share of its row: above what the ridge leaves.
_MIN_RESIDUAL = 1e-2

_HIGHEST = jax.lax.Precision.HIGHEST


def train_dictionaries(
    key: Array,
    rows: ArrayLike,
    *,
    ks: Sequence[int],
    starts: int,
    latents_per_dim: int,
    max_latents: int,
    steps: int,
    batch_size: int,
    signed: bool,
) -> list[np.ndarray]:
    r"""Train one dictionary for every ``k`` and start, each start on rows of its own.

    Alternating minimization on batches: codes by orthogonal matching pursuit, then
    every atom becomes the direction of what is left of its rows when all other atoms
    are taken away, a weighted mean over its last uses.  Atoms start at rows.  Those
    that few rows use are replaced by residuals, drawn with a probability that is
    proportional to their square: what is unexplained is where an atom is missing.  So
    are near copies of other atoms.

    Args:
      key: random key.
      rows: ``[N, D]``, none of them zero.
      ks: codes per row, one dictionary for each; at most as many as there are latents.
      starts: random starts of each; with ``S`` starts each one sees every ``S``-th row.
      latents_per_dim: latents per dimension of the rows.
      max_latents: most latents of a dictionary.
      steps: of training, rounded to tens.
      batch_size: rows per step.
      signed: whether codes may be negative.

    Returns:
      Arrays ``[M_i, D]``, for each ``k`` one per start: the unit atoms in use.

    Example:
      >>> import jax, numpy as np
      >>> rows = np.random.default_rng(0).normal(size=(400, 1)) * np.eye(5)[2]
      >>> sizes = dict(latents_per_dim=2, max_latents=99, steps=20, batch_size=50)
      >>> key = jax.random.key(0)
      >>> atoms = train_dictionaries(key, rows, ks=[1], starts=1, signed=True, **sizes)
      >>> np.abs(atoms[0][0]).round(3)
      array([0., 0., 1., 0., 0.], dtype=float32)

    References:
      Agarwal et al. (2014), "Learning sparsely used overcomplete dictionaries via
      alternating minimization"; Mairal et al. (2010), "Online learning for matrix
      factorization and sparse coding"; Arthur and Vassilvitskii (2007), "k-means++",
      for the drawing of residuals; ``docs/research.md``, section 14.
    """
    rows = np.asarray(rows, np.float32)
    num_latents = int(
        np.clip(latents_per_dim * rows.shape[1], _MIN_LATENTS, max_latents)
    )
    keys = iter(jax.random.split(key, len(ks) * starts))
    size = {"num_latents": num_latents, "max_k": min(max(ks), num_latents)}
    return [
        _train(
            next(keys),
            rows[start::starts] if len(rows) >= starts else rows,
            k=min(k, num_latents),
            steps=steps,
            batch_size=batch_size,
            signed=signed,
            **size,
        )
        for k in ks
        for start in range(starts)
    ]


class _State(NamedTuple):
    """State of the training.

    Attributes:
      atoms: ``[M, D]``, of unit length.
      sums: ``[M, D]``, weighted sums of what the rows left to each atom.
      uses: ``[M]``, rows that used each atom since unused ones were last replaced.
    """

    atoms: Array
    sums: Array
    uses: Array


def _train(
    key: Array,
    rows: np.ndarray,
    *,
    num_latents: int,
    max_k: int,
    k: int,
    steps: int,
    batch_size: int,
    signed: bool,
) -> np.ndarray:
    """Train one dictionary; return its atoms in use."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    atoms = jnp.asarray(_unit(rows[_draw(rng, len(rows), num_latents)]))
    state = _State(atoms, jnp.zeros_like(atoms), jnp.zeros(num_latents))
    num_chunks = max(1, round(steps / _STEPS_PER_CHUNK))
    settling = int(num_chunks * (1 - _SETTLING_SHARE))
    for chunk, chunk_key in enumerate(jax.random.split(key, num_chunks)):
        if chunk:
            state = state._replace(uses=jnp.zeros(num_latents))
        order = _draw(rng, len(rows), _STEPS_PER_CHUNK * batch_size)
        batches = rows[order].reshape(_STEPS_PER_CHUNK, batch_size, -1)
        state = _train_chunk(max_k, state, batches, k, signed)
        if chunk < settling:
            state = _replace_unused(max_k, chunk_key, state, batches[-1], k, signed)
    return np.asarray(state.atoms)[np.asarray(state.uses) >= _MIN_USES]


def _draw(rng: np.random.Generator, num_rows: int, num: int) -> np.ndarray:
    """Draw ``num`` indices of rows, all rows equally often up to one."""
    repeats = -(-num // num_rows)
    return np.concatenate([rng.permutation(num_rows) for _ in range(repeats)])[:num]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@partial(jax.jit, static_argnums=0)
def _train_chunk(
    max_k: int, state: _State, batches: Array, k: Array, signed: Array
) -> _State:
    """Take one step per batch ``[T, B, D]``."""

    def step(state: _State, rows: Array) -> tuple[_State, None]:
        atoms, sums, uses = state
        index, codes, residual = _pursue(max_k, rows, atoms, k, signed)

        # Sum what each atom's rows are without all other atoms: its own part, and the
        # residual.  Entries without a code add nothing.
        pulls = codes[:, :, None] * residual[:, None, :]
        pulls = pulls.reshape(-1, atoms.shape[1])
        index, codes = index.reshape(-1), codes.reshape(-1)
        energy = jnp.zeros_like(uses).at[index].add(codes**2)
        new_uses = jnp.zeros_like(uses).at[index].add(jnp.sign(jnp.abs(codes)))
        new_sums = (energy[:, None] * atoms).at[index].add(pulls)

        # Forget by uses, so that rare atoms remember rows as long ago as they need.
        keep = jnp.maximum(0.0, 1 - new_uses / _MEMORY)
        sums = keep[:, None] * sums + new_sums
        length = jnp.linalg.norm(sums, axis=1, keepdims=True)
        atoms = jnp.where(length > 0, sums / jnp.where(length > 0, length, 1), atoms)
        return _State(atoms, sums, uses + new_uses), None

    return jax.lax.scan(step, state, batches)[0]


def _pursue(
    max_k: int, rows: Array, atoms: Array, k: Array, signed: Array
) -> tuple[Array, Array, Array]:
    """Run orthogonal matching pursuit with ``k <= max_k`` atoms per row.

    Returns:
      Atoms ``[B, max_k]`` of each row, their codes, 0 beyond ``k``, and residuals
      ``[B, D]``.
    """
    each = jnp.arange(len(rows))

    def add_atom(i: Array, state: tuple[Array, Array, Array]) -> Any:
        # The atom that is closest to each residual and not chosen yet.
        index, _, residual = state
        scores = residual @ atoms.T
        scores = jnp.where(signed, jnp.abs(scores), scores)
        is_chosen = jnp.arange(max_k) < i
        taken = jnp.where(is_chosen[None, :], index, len(atoms))  # else out of range
        scores = scores.at[each[:, None], taken].set(-jnp.inf, mode="drop")
        index = index.at[:, i].set(jnp.argmax(scores, axis=1))

        # The codes of all chosen atoms, by the normal equations.
        is_chosen = jnp.arange(max_k) <= i
        chosen = jnp.where(is_chosen[None, :, None], atoms[index], 0)
        gram = jnp.einsum("bid,bjd->bij", chosen, chosen, precision=_HIGHEST)
        gram += jnp.diag(jnp.where(is_chosen, _RIDGE, 1.0))[None]
        products = jnp.einsum("bid,bd->bi", chosen, rows, precision=_HIGHEST)
        codes = jnp.linalg.solve(gram, products[:, :, None])[:, :, 0]
        codes = jnp.where(signed, codes, jnp.maximum(codes, 0.0))
        explained = jnp.einsum("bi,bid->bd", codes, chosen, precision=_HIGHEST)
        return index, codes, rows - explained

    index = jnp.zeros((len(rows), max_k), int)
    codes = jnp.zeros((len(rows), max_k), rows.dtype)
    return jax.lax.fori_loop(0, k, add_atom, (index, codes, rows))


@partial(jax.jit, static_argnums=0)
def _replace_unused(
    max_k: int, key: Array, state: _State, rows: Array, k: Array, signed: Array
) -> _State:
    """Replace atoms that are not needed by residuals of other rows.

    They are those that few rows use, and near copies of an atom that more rows use,
    which share its rows.
    """
    atoms, sums, uses = state
    place = jnp.arange(len(atoms))
    earlier = (uses[None, :] == uses[:, None]) & (place[None, :] < place[:, None])
    ahead = (uses[None, :] > uses[:, None]) | earlier
    is_copy = jnp.any((jnp.abs(atoms @ atoms.T) >= _SAME_COSINE) & ahead, axis=1)
    residual = _pursue(max_k, rows, atoms, k, signed)[2]
    square = jnp.sum(residual**2, axis=1)
    floor = _MIN_RESIDUAL**2 * jnp.sum(rows**2, axis=1)
    square = jnp.where(square > floor, square, 0)

    # Draw different rows with probabilities proportional to their squares: those with
    # the largest logarithms plus Gumbel noise.
    noise = jax.random.gumbel(key, square.shape)
    order = jnp.argsort(-(jnp.log(square) + noise))

    # One for each of these atoms, as far as there are residuals.
    spare = (uses < _MIN_USES) | is_copy
    rank = jnp.cumsum(spare) - 1
    drawn = order[jnp.minimum(rank, len(rows) - 1)]
    replace = spare & (rank < len(rows)) & (square[drawn] > 0)
    new = residual[drawn] / jnp.sqrt(jnp.where(replace, square[drawn], 1))[:, None]
    return _State(
        atoms=jnp.where(replace[:, None], new, atoms),
        sums=jnp.where(replace[:, None], 0, sums),
        uses=uses,
    )
