"""State of a fit, and the turn of a prompt in it: what all estimators share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.checks import check_flag, check_int, check_key, check_type
from toyfeat.lens.averages import (
    Estimate,
    RowMeans,
    add_prompts,
    empty_means,
    finish_means,
    merge_means,
)
from toyfeat.lens.model import LensModel, mark_positions, residual_shape
from toyfeat.lens.pullbacks import valid_positions
from toyfeat.linalg import dense
from toyfeat.types import Array, Inputs, Params


class JacobianState(NamedTuple):
    """Running sums of a fit; turn them into :class:`Estimate` with ``finish``.

    Attributes:
      prompts: ``[]`` int, number of prompts so far.
      basis: ``[D, D]``, orthonormal rows along which Jacobians are taken, or ``None``.
      means: by site.
    """

    prompts: Array
    basis: Array | None
    means: dict[str, RowMeans]


class FitOptions(NamedTuple):
    """Options of a fit, checked.

    Attributes:
      model: the model.
      dim: width ``D``.
      skip_first: tokens left out at the start of a prompt.
      skip_last: tokens left out at its end.
      num: cotangents per prompt ``M``; ``D`` of them are exact.
      key: of the basis, or ``None``.
      chunk: cotangents at a time.
      chain: whether to go block by block.
    """

    model: LensModel
    dim: int
    skip_first: int
    skip_last: int
    num: int
    key: Array | None
    chunk: int
    chain: bool


class Turn(NamedTuple):
    """Turn of the prompts of a batch.

    Attributes:
      directions: ``[M, B, D]`` or ``[M, 1, D]``, the cotangents of each prompt.
      group: ``[B]`` int, which rows of the basis they are.
      half: ``[B]`` int, the half of the prompts that it belongs to.
      counted: ``[B]`` bool, false for a prompt that is left out.
    """

    directions: Array
    group: Array
    half: Array
    counted: Array


def check_options(
    who: str,
    model: Any,
    dim: Any,
    skip_first: Any,
    skip_last: Any,
    cotangents: Any,
    key: Any,
    chunk: Any,
    chain: Any,
) -> FitOptions:
    """Check the arguments that all fits share."""
    check_type(
        who, "model", model, LensModel, hint="make it with ft.lenses.from_probed"
    )
    dim = check_int(who, "dim", dim)
    num = dim
    if cotangents is not None:
        num = check_int(who, "cotangents", cotangents, most=dim)
        if dim % num:
            raise ValueError(
                f"{who}: cotangents must divide the width {dim}, so that prompts see "
                f"the basis in turn, got {num}; pass a divisor"
            )
        check_key(who, key)
    return FitOptions(
        model=model,
        dim=dim,
        skip_first=check_int(who, "skip_first", skip_first, least=0),
        skip_last=check_int(who, "skip_last", skip_last, least=0),
        num=num,
        key=None if cotangents is None else key,
        chunk=check_int(who, "chunk", chunk),
        chain=check_flag(who, "chain", chain),
    )


def init_state(
    options: FitOptions, experts: int, groups: int | None = None
) -> JacobianState:
    """Make the state of no prompts, and draw the basis."""
    basis = None
    if options.key is not None:
        # Signs of the diagonal make the rows uniform over all orthonormal bases.
        normal = jax.random.normal(options.key, (options.dim, options.dim))
        q, r = dense.qr(normal)
        basis = q.T * jnp.sign(jnp.diag(r))[:, None]
    groups = options.dim // options.num if groups is None else groups
    return JacobianState(
        prompts=jnp.zeros((), jnp.int32),
        basis=basis,
        means={
            site: empty_means(experts, groups, options.dim)
            for site in options.model.sites[:-1]
        },
    )


def count_positions(
    who: str, options: FitOptions, params: Params, inputs: Inputs, mask: Any
) -> Array:
    """Mark the positions of a batch that count, ``[B, T]``; check the shapes."""
    batch, time, dim = residual_shape(options.model, params, inputs, who)
    if dim != options.dim:
        raise ValueError(
            f"{who}: the streams must have the width {options.dim} of the accumulator, "
            f"got {dim}; pass dim={dim}"
        )
    skipped = options.skip_first + options.skip_last
    if time <= skipped:
        raise ValueError(
            f"{who}: prompts must be longer than the {skipped} positions that are "
            f"skipped, got {time} tokens; give longer prompts, or skip less with "
            "skip_first and skip_last"
        )
    advice = "give 1 at tokens and 0 at padding"
    mask = mark_positions(who, "mask", mask, (batch, time), advice)
    return valid_positions(mask, options.skip_first, options.skip_last)


def take_turn(state: JacobianState, options: FitOptions, counted: Array) -> Turn:
    """Deal the rows of the basis, and the two halves, out to the prompts of a batch."""
    groups = options.dim // options.num
    number = counted.astype(jnp.int32)
    index = state.prompts + jnp.cumsum(number, dtype=jnp.int32) - number
    group = index % groups
    if state.basis is None:
        directions = jnp.eye(options.dim)[:, None]
    else:
        rows = state.basis.reshape(groups, options.num, options.dim)[group]
        directions = jnp.moveaxis(rows, 0, 1)
    # Whole turns go to one half, so that both see all of the basis.
    half = (index // groups) % 2
    return Turn(directions=directions, group=group, half=half, counted=counted)


def add_batch(
    state: JacobianState, turn: Turn, rows: dict[str, Array], weights: dict[str, Array]
) -> JacobianState:
    """Add the rows ``[B, E, M, D]`` of a batch with their weights ``[B, E]``."""
    means = {
        site: add_prompts(state.means[site], rows[site], weight, turn.half, turn.group)
        for site, weight in weights.items()
    }
    prompts = state.prompts + jnp.sum(turn.counted, dtype=jnp.int32)
    return state._replace(prompts=prompts, means=means)


def merge_states(left: JacobianState, right: JacobianState) -> JacobianState:
    """Merge the states of two shards."""
    means = {s: merge_means(left.means[s], right.means[s]) for s in left.means}
    return JacobianState(left.prompts + right.prompts, left.basis, means)


def finish_state(state: JacobianState, *, squeeze: bool) -> Estimate:
    """Turn a state into an estimate, without the axis of clusters if there is one."""
    finished = {
        site: finish_means(means, state.basis) for site, means in state.means.items()
    }
    if squeeze:
        finished = jax.tree.map(lambda x: x[0], finished)
    matrices, errors, cosines = (
        {site: parts[i] for site, parts in finished.items()} for i in range(3)
    )
    norms = {s: jnp.sqrt(jnp.sum(m**2, axis=(-2, -1))) for s, m in matrices.items()}
    return Estimate(
        matrices=matrices,
        standard_error=errors,
        relative_error={site: errors[site] / norms[site] for site in errors},
        refit_cosine=cosines,
        prompts=state.prompts,
    )
