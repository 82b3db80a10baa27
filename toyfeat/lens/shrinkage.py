"""Take the noise out of a fit by what two halves of its prompts agree on."""

import jax
import jax.numpy as jnp

from toyfeat.checks import check_number, check_type
from toyfeat.lens.averages import HALVES, Estimate, matrices_from_means
from toyfeat.lens.fits import JacobianState, finish_state
from toyfeat.linalg import dense
from toyfeat.types import Array

_HIGHEST = jax.lax.Precision.HIGHEST


def shrunken(state: JacobianState, *, centre: float = 1.0) -> Estimate:
    r"""Finish a fit with singular values that its other half confirms.

    The mean over few prompts is the truth and noise in all directions.  With the halves
    :math:`A, B` of the prompts and :math:`A - c I = \sum_k s_k u_k v_k^\top`, the
    coefficient :math:`t_k = u_k^\top (B - c I) v_k` is free of the noise of
    :math:`A`: its expectation is what the truth has along these directions.  The
    estimate is :math:`c I + \sum_k \min(\max(t_k, 0), s_k) u_k v_k^\top`, averaged over
    both orders of the halves.

    It is not the published estimator, and is biased towards :math:`c I`.  Its error is
    smaller where the spectrum of :math:`J - c I` falls and prompts are few.

    Args:
      state: of a fit with :func:`mean_jacobian`.
      centre: ``c``, what a Jacobian without evidence is.

    Returns:
      :class:`Estimate`; ``standard_error``, ``relative_error`` and ``refit_cosine`` are
      those of the plain mean.

    Raises:
      TypeError: if it is no state of a fit.
      ValueError: if there are less than two prompts, or a half has not seen the basis.

    Example:
      >>> import jax.numpy as jnp
      >>> from toyfeat.lens.averages import add_prompts, empty_means
      >>> rows = jnp.array([[[[3.0]]], [[[1.5]]]])  # of two prompts
      >>> half, group = jnp.arange(2), jnp.zeros(2, int)
      >>> empty = empty_means(1, 1, 1)
      >>> means = add_prompts(empty, rows, jnp.ones((2, 1)), half, group)
      >>> state = JacobianState(jnp.asarray(2), None, {"a": means})
      >>> shrunken(state).matrices["a"].tolist()  # plain: 2.25
      [[1.5]]

    References:
      Gavish and Donoho (2017), "Optimal shrinkage of singular values"; Owen and Perry
      (2009), "Bi-cross-validation of the SVD", for what is confirmed by other data.
    """
    who = "shrunken"
    check_type(who, "state", state, JacobianState, hint="of ft.lenses.fit")
    check_number(who, "centre", centre)
    # A fit without clusters has one matrix per site.
    single = all(means.mean.shape[1] == 1 for means in state.means.values())
    matrices = {}
    for site, means in state.means.items():
        if not bool(jnp.all(jnp.any(means.weight > 0, axis=(1, 2)))):
            raise ValueError(
                f"{who}: both halves of the prompts must have one, got "
                f"{int(state.prompts)} prompts; fit more of them"
            )
        halves = [
            matrices_from_means(jax.tree.map(lambda x, i=i: x[i], means), state.basis)
            for i in range(HALVES)
        ]
        eye = centre * jnp.eye(means.mean.shape[-1], dtype=means.mean.dtype)[None]
        changes = [half - eye for half in halves]
        confirmed = [_confirmed(*pair) for pair in (changes, changes[::-1])]
        shrunk = eye + sum(confirmed) / HALVES
        matrices[site] = shrunk[0] if single else shrunk
    return finish_state(state, squeeze=single)._replace(matrices=matrices)


def _confirmed(own: Array, other: Array) -> Array:
    """Reduce the singular values of matrices ``[E, D, D]`` to what others confirm."""
    u, s, vt = jax.vmap(dense.svd)(own)
    along = jnp.einsum("edk,edi,eki->ek", u, other, vt, precision=_HIGHEST)
    sizes = jnp.minimum(jnp.maximum(along, 0), s)
    return jnp.einsum("edk,ek,eki->edi", u, sizes, vt, precision=_HIGHEST)
