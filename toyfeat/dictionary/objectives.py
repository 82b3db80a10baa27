r"""Summands of the losses that dictionaries are trained with.

A *term* is a function of the :class:`toyfeat.types.Parts` of a batch with a name and
a coefficient; an objective is a tuple of them.  Means over examples are weighted by
the taps' weights.  ``f`` are codes in units of the rows ``w_j`` of ``W_dec``, ``x``
the target, ``x_hat`` its reconstruction, ``g_k`` the gradients at the original
activation, which are constants.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from toyfeat.dictionary.attributions import Penalty, penalised
from toyfeat.dictionary.attributions import unexplained as unexplained_effect
from toyfeat.dictionary.coding import lengths
from toyfeat.dictionary.kernels import decoded, weighted_rows
from toyfeat.dictionary.selection import best_of_each, stepped
from toyfeat.linalg.orthonormal import choose
from toyfeat.types import Array, Dictionary, Params, Parts, Term

_GAMMA = 0.1  # of the bounded penalties, in units of the usual attribution


def reconstruction() -> Term:
    r""":math:`|x - \hat x|^2`; for a matryoshka summed over its prefixes.

    References:
      Bussmann et al. (2025), "Learning multi-level features with Matryoshka sparse
      autoencoders", for the prefixes, :math:`\sum_m |x - \hat x_{<m}|^2`.
    """
    return Term("reconstruction", _reconstruction)


def sparsity() -> Term:
    r"""What makes few codes of the architecture: :math:`\sum_j f_j |w_j|` in general.

    Gated dictionaries have :math:`\sum_j \max(0, \pi_j) |w_j|`, JumpReLU the number
    of codes, :math:`\sum_j [pre_j > \theta_j]`, whose derivative by the threshold is
    a kernel estimate.

    References:
      Anthropic (April 2024), "Update on how we train SAEs", for the lengths;
      Rajamanoharan et al. (2024), both papers.
    """
    return Term("sparsity", _sparsity, warm_up=True)


def quadratic_l0(target: float) -> Term:
    r"""JumpReLU's own way to a number of codes: :math:`\frac 2 L (L_0 - L)^2`.

    References:
      SAELens 6 (``jumprelu_sparsity_loss_mode="quadratic"``).
    """

    def loss(parts: Parts) -> Array:
        count = jnp.sum(_steps(parts, "quadratic_l0"), axis=1)
        return _mean(parts, 2 / target * (count - target) ** 2)

    return Term("sparsity", loss, warm_up=True)


def gate() -> Term:
    r"""The gate reconstructs, too: :math:`|x - \max(0, \pi) W_{dec} - b_{dec}|^2`.

    References:
      Rajamanoharan et al. (2024), "Improving dictionary learning with gated sparse
      autoencoders", equation 8; the decoder is not frozen here, as in SAELens.
    """

    def loss(parts: Parts) -> Array:
        rows, origin = parts.params["W_dec"], parts.params["b_dec"]
        recon = decoded(jax.nn.relu(parts.out.hidden_pre), rows) + origin[None, :]
        return _mean(parts, jnp.sum((parts.target - recon) ** 2, axis=1))

    return Term("gate", loss)


def dead_latents() -> Term:
    r"""Latents that have long been silent reconstruct what the others leave.

    :math:`s |r - \sum_{j \in T} pre_j w_j|^2` with :math:`r = x - \hat x` constant,
    :math:`T` the ``D / 2`` dead latents that would add most, and :math:`s` the share
    of ``D / 2`` that is dead, at most 1.

    References:
      Gao et al. (2024), "Scaling and evaluating sparse autoencoders", appendix A.2;
      scaled as in SAELens, not by the residual's variance.
    """

    def loss(parts: Parts) -> Array:
        rest = jax.lax.stop_gradient(parts.target - parts.out.recon)
        return _revived(
            parts.dictionary,
            parts.params,
            parts.acts,
            rest,
            parts.dead,
            parts.weights,
        )

    return Term("dead_latents", loss)


def attribution_sparsity(penalty: str = "l1", *, gamma: float = _GAMMA) -> Term:
    r"""Few latents should have an effect: :math:`\sum_j \phi(A_j)`, mean over readouts.

    :math:`A_{kj} = f_j (w_j \cdot g_k)`.  With ``"l1"``, :math:`\phi(A) = |A|`, the
    published form.  Bounded forms are in units of :math:`s`, the running root mean
    square of attributions that are not 0: ``"geman_mcclure"``,
    :math:`c^2 / (c^2 + \gamma^2)`, and ``"log"``,
    :math:`\log(1 + |c| / \gamma) / \log(1 + 1 / \gamma)`, with :math:`c = A / s`.

    Args:
      penalty: which.
      gamma: what counts as small, of a bounded form.

    Raises:
      ValueError: for another penalty, or a ``gamma`` that is not positive.

    References:
      Olah et al. (April 2024), "Attribution dictionary learning", term 3; Geman and
      McClure (1987) for the bounded form.
    """
    if penalty not in _PENALTIES:
        raise ValueError(
            f"attribution_sparsity: penalty must be one of {', '.join(_PENALTIES)}, "
            f"got {penalty!r}"
        )

    if not 0 < gamma < math.inf:
        raise ValueError(
            f"attribution_sparsity: gamma must be positive and finite, got {gamma}"
        )
    form = _PENALTIES[penalty](gamma)

    def loss(parts: Parts) -> Array:
        plain = penalty == "l1"
        scale = jnp.ones_like(parts.scale) if plain else parts.scale
        return penalised(parts, form, scale)

    return Term("attribution_sparsity", loss, warm_up=True, needs_grads=True)


def unexplained(form: str = "positive") -> Term:
    r"""The first-order effect should be that of latents.

    ``"signed"`` is the published :math:`|(x - \hat x) \cdot g|`, in which errors
    cancel; ``"positive"`` is :math:`((x - \hat x) \cdot g)^2`, whose sum over enough
    readouts is a reconstruction error in the metric of the gradients.  Mean over the
    readouts.

    Raises:
      ValueError: for another form.

    References:
      Olah et al. (April 2024), "Attribution dictionary learning", term 4.
    """
    if form not in ("signed", "positive"):
        raise ValueError(
            f'unexplained: form must be "signed" or "positive", got {form!r}'
        )

    def loss(parts: Parts) -> Array:
        effect = unexplained_effect(parts)
        size = jnp.abs(effect) if form == "signed" else effect**2
        return _mean(parts, jnp.mean(size, axis=1))

    return Term("unexplained", loss, needs_grads=True)


def gradient_reconstruction() -> Term:
    r""":math:`\frac 1 K \sum_k |g_k - \hat g_k|^2` of a paired dictionary."""

    def loss(parts: Parts) -> Array:
        if parts.out.grad_recon is None or parts.grads is None:
            raise ValueError("gradient_reconstruction: only of a paired dictionary")
        rest = jnp.sum((parts.grads - parts.out.grad_recon) ** 2, axis=2)
        return _mean(parts, jnp.mean(rest, axis=1))

    return Term("gradient_reconstruction", loss, needs_grads=True)


def _mean(parts: Parts, values: Array) -> Array:
    return jnp.sum(parts.weights * values)


def _reconstruction(parts: Parts) -> Array:
    total = _mean(parts, jnp.sum((parts.target - parts.out.recon) ** 2, axis=1))
    widths = parts.dictionary.config.matryoshka_widths
    if not widths:
        return total
    values, rows = parts.out.values, parts.params["W_dec"]
    recon = parts.params["b_dec"][None, :]
    for first, last in zip((0, *widths), widths[:-1], strict=False):
        recon = recon + decoded(values[:, first:last], rows[first:last])
        total = total + _mean(parts, jnp.sum((parts.target - recon) ** 2, axis=1))
    return total


def _sparsity(parts: Parts) -> Array:
    name = parts.dictionary.config.architecture
    if name == "jumprelu":
        return _mean(parts, jnp.sum(_steps(parts, "sparsity"), axis=1))
    codes = parts.out.values
    if name == "gated":
        codes = jax.nn.relu(parts.out.hidden_pre)
    if parts.out.index is None:
        by_latent = parts.weights @ (jnp.abs(codes) if name == "linear" else codes)
        return jnp.sum(by_latent * lengths(parts.params["W_dec"]))
    size = lengths(parts.params["W_dec"])[parts.out.index]
    return _mean(parts, jnp.sum(jnp.abs(codes) * size, axis=1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _revived(dictionary: Dictionary, params: Params, *data: Array) -> Array:
    """While all latents (of all members) fire, only slopes of 0 are added."""
    zero = jnp.zeros((), params["W_dec"].dtype)
    silent = partial(_silent, dictionary)
    return choose(jnp.any(data[2]), silent, lambda *_: zero, params, *data)


def _revived_forward(dictionary: Dictionary, params: Params, *data: Array) -> tuple:
    slopes = jax.value_and_grad(partial(_silent, dictionary))

    def nothing(params: Params, *data: Array) -> tuple[Array, Params]:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.zeros((), data[1].dtype), zeros

    return choose(jnp.any(data[2]), slopes, nothing, params, *data)


def _revived_backward(dictionary: Dictionary, kept: Params, change: Array) -> tuple:
    del dictionary
    return jax.tree.map(lambda x: change * x, kept), None, None, None, None


_revived.defvjp(_revived_forward, _revived_backward)


def _silent(
    dictionary: Dictionary,
    params: Params,
    acts: Array,
    rest: Array,
    dead: Array,
    weights: Array,
) -> Array:
    rows, pre = params["W_dec"], dictionary.forward(params, acts).hidden_pre
    half = max(1, rest.shape[1] // 2)
    score = pre * lengths(rows)[None, :]
    if dictionary.config.architecture == "abstopk":
        score = jnp.abs(score)
    score = jnp.where(dead[None, :], score, jnp.full_like(score, -jnp.inf))
    index, here = best_of_each(score, min(half, len(rows)))
    values = jnp.take_along_axis(pre, index, axis=1)
    recon = weighted_rows(jnp.where(here, values, 0 * values), index, rows)
    share = jnp.minimum(jnp.sum(dead).astype(rest.dtype) / half, 1)
    return share * jnp.sum(weights * jnp.sum((rest - recon) ** 2, axis=1))


def _steps(parts: Parts, who: str) -> Array:
    config = parts.dictionary.config
    if config.architecture != "jumprelu":
        raise ValueError(f"{who}: only of jump_relu, got {config.architecture}")
    threshold = parts.params["threshold"]
    return stepped(parts.out.hidden_pre, threshold, config.bandwidth)


def _l1(gamma: float) -> Penalty:
    del gamma
    return Penalty(jnp.abs, lambda sizes, _: jnp.sign(sizes))


def _geman_mcclure(gamma: float) -> Penalty:
    """The slope is ``2 c (1 - value)**2 / gamma**2``: one division an entry for both.

    Where ``c`` is many ``gamma`` that has few digits, and is next to nothing.
    """

    def value(sizes: Array) -> Array:
        return sizes * sizes * (1 / (sizes * sizes + gamma**2))

    def slope(sizes: Array, values: Array) -> Array:
        rest = 1 - values
        return (2 / gamma**2) * sizes * rest * rest

    return Penalty(value, slope)


def _log(gamma: float) -> Penalty:
    whole = math.log1p(1 / gamma)

    def slope(sizes: Array, values: Array) -> Array:
        del values
        return jnp.sign(sizes) / (whole * (jnp.abs(sizes) + gamma))

    return Penalty(lambda sizes: jnp.log1p(jnp.abs(sizes) / gamma) / whole, slope)


_PENALTIES: dict[str, Callable[[float], Penalty]] = {
    "l1": _l1,
    "geman_mcclure": _geman_mcclure,
    "log": _log,
}
