r"""Terms of a loss that ask what a reconstruction does to the model.

With ``x`` the activations of windows of tokens and ``e = x_hat - x``, the predictions
``q`` of the model with ``x_hat`` in place of ``x`` differ from its own ``p`` by

.. math:: \mathrm{KL}(p | q) = \tfrac12 e^T F e + O(|e|^3), \qquad
   F = \mathbb{E}_{y \sim p}\, g_y g_y^T, \quad g_y = -\nabla_x \log p(y)

:func:`spliced_kl` runs the model behind the site for the left side, at every step.
:func:`fisher` estimates the right side from gradients at sampled labels, which are
computed once and serve any number of dictionaries.  :func:`expanded_kl` expands the
left side where a dictionary stands, at :math:`\hat x_0`, in place of :math:`x`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.checks import check_choice, check_function, check_int, check_number
from toyfeat.dictionary.attributions import unexplained_effect
from toyfeat.dictionary.base import weighted_mean
from toyfeat.dictionary.types import Inputs, Term
from toyfeat.types import Array, Params

RunBehind = Callable[[Params, Array, Array], Array]
"""``(params, entry [B, T, D], value [B, T, E]) -> logits [B, T, V]``, a model behind a
site; that of :func:`toyfeat.lm.split.split_at`."""


class Windows(NamedTuple):
    """Context of taps that are whole windows of tokens, for :func:`spliced_kl`.

    The rows of the taps are those of the windows in order.

    Attributes:
      params: of the model.
      acts: ``[B, T, E]``, the activations that are reconstructed, in their own units.
      entry: ``[B, T, D]``, the residual stream that the model behind the site starts
        from; ``acts`` themselves at a residual site.
    """

    params: Params
    acts: Array
    entry: Array


class Expansion(NamedTuple):
    """Context of taps: the KL near a reconstruction, for :func:`expanded_kl`.

    All in the taps' own units, and made by :func:`toyfeat.lm.expansion.expand_kl`.

    Attributes:
      point: ``[N, E]``, the reconstruction that the KL is expanded at.
      value: ``[N]``, the KL there, in nats.
      slope: ``[N, E]``, gradient of the summed KL of the window.
      draws: ``[N, K, E]``, gradients at labels that the model draws there, divided by
        the root of their number; or ``None`` for an expansion to first order.
    """

    point: Array
    value: Array
    slope: Array
    draws: Array | None = None


def _square(kl: Array, limit: float) -> Array:
    del limit
    return kl


def _huber(kl: Array, limit: float) -> Array:
    """Continue by the tangent in the size of the error, the root of the square."""
    large = jnp.maximum(kl, limit)  # whose root has a finite slope
    return jnp.where(kl <= limit, kl, 2 * jnp.sqrt(limit * large) - limit)


def _log(kl: Array, limit: float) -> Array:
    return limit * jnp.log1p(kl / limit)


FORMS: dict[str, Callable[[Array, float], Array]] = {
    "square": _square,
    "huber": _huber,
    "log": _log,
}
"""Name to a function of the second-order KL and the KL from which on it bends."""


def fisher(form: str = "square", *, limit: float = 1.0, length: int = 0) -> Term:
    r"""Penalize the second-order KL of the reconstruction error, in nats per token.

    .. math:: \phi(\tfrac{1}{2K} \sum_k (g_k \cdot (\hat x - x))^2)

    with :math:`g_k` the gradients of the loss at labels that the model draws
    (:func:`toyfeat.readouts.sampled_labels`, whose draws are divided by
    :math:`\sqrt K`).  The sum is unbiased for the block of :math:`F` of each token,
    the KL where one token of a window is replaced.

    Args:
      form: :math:`\phi`: ``"square"``, the quadratic itself; ``"huber"``, linear in
        the size of the error where the quadratic is over ``limit``; ``"log"``,
        :math:`c \log(1 + q / c)` with :math:`c` the limit.
      limit: nats beyond which the quadratic is not believed.
      length: tokens of a window, for taps that are whole windows in order: effects
        are summed over a window before they are squared, which is unbiased for the
        KL where all tokens of a window are replaced, with more variance.  0 squares
        every token's own.

    Returns:
      :class:`Term`.

    Raises:
      ValueError: for another form, or a limit that is not positive.
      TypeError: for a length that is not a number of tokens.
    """
    check_choice("fisher", "form", form, FORMS)
    check_number("fisher", "limit", limit, above=0)
    check_int("fisher", "length", length, least=0)
    bend = FORMS[form]

    def loss(inputs: Inputs) -> Array:
        units = jnp.reshape(jnp.asarray(inputs.effect_units), (1, -1))
        effect = unexplained_effect(inputs) * units  # [N, K], in nats
        kl, weights = _half_squares(inputs, effect, length)
        return jnp.sum(weights * bend(kl, limit))

    return Term("fisher", loss, needs_grads=True)


def _half_squares(inputs: Inputs, effect: Array, length: int) -> tuple[Array, Array]:
    """Halve the squares of effects ``[N, K]``, of tokens or of whole windows.

    Returns:
      Nats per token, and weights: ``[N]`` both, or of ``N / length`` windows.
    """
    if not length:
        return jnp.sum(effect**2, axis=1) / 2, inputs.weights
    # The joint effect of the tokens of a window that count, and its share of each.
    counts = (inputs.weights > 0).astype(effect.dtype)
    by_window = (effect * counts[:, None]).reshape(-1, length, effect.shape[1])
    num = jnp.maximum(jnp.sum(counts.reshape(-1, length), axis=1), 1)
    kl = jnp.sum(jnp.sum(by_window, axis=1) ** 2, axis=1) / 2 / num
    return kl, jnp.sum(inputs.weights.reshape(-1, length), axis=1)


def expanded_kl(*, length: int = 0) -> Term:
    r"""Penalize the KL's expansion around a reconstruction, in nats per token.

    .. math:: \mathrm{KL}(\hat x_0) + s \cdot \delta
       + \tfrac12 \sum_k (g_k \cdot \delta)^2, \qquad \delta = \hat x - \hat x_0

    with :math:`s` the gradient of the KL at :math:`\hat x_0`, all tokens of a window
    replaced, and :math:`g_k` gradients at labels drawn there: exact to first order
    where the dictionary stood, with a Gauss-Newton curvature.  Without draws it moves
    the target of the reconstruction error, :math:`|x - c s / 2 - \hat x|^2` for a
    coefficient :math:`c`.

    Args:
      length: tokens of a window, for taps that are whole windows in order: the changes
        :math:`g_k \cdot \delta` are summed over a window before they are squared, as
        tokens move together where a dictionary moves.  0 squares every token's own,
        which ends the move of one token and not that of all.

    Returns:
      :class:`Term` for taps with a context of :class:`Expansion`.

    Raises:
      TypeError: for a length that is not a number of tokens.
      ValueError: from the term, for taps with another context.
    """
    check_int("expanded_kl", "length", length, least=0)

    def loss(inputs: Inputs) -> Array:
        near = inputs.context
        if not isinstance(near, Expansion):
            raise ValueError(
                "expanded_kl: wanted taps with a context of losses.Expansion, got "
                f"{type(near).__name__}; make it by toyfeat.lm.expansion.expand_kl"
            )
        change = inputs.out.recon * inputs.unit - near.point
        kl = near.value + jnp.sum(near.slope * change, axis=1)
        total = weighted_mean(inputs, kl)
        if near.draws is None:
            return total
        effect = jnp.einsum("nkd,nd->nk", near.draws, change)
        kl, weights = _half_squares(inputs, effect, length)
        return total + jnp.sum(weights * kl)

    return Term("expanded_kl", loss)


def spliced_kl(
    run: RunBehind,
    *,
    temperature: float = 1.0,
    run_spliced: Callable[[Params, Array, Array, Array], Array] | None = None,
) -> Term:
    r"""Penalize the KL of the model with the reconstruction from the model itself.

    .. math:: \sum_v p_v \log(p_v / q_v), \quad p, q = \mathrm{softmax}(z / \tau)

    in nats, mean over the tokens that count; others keep their activations.  End to
    end training: the model behind the site is run forward and backward at every step
    of every dictionary.

    Args:
      run: the model behind the site.
      temperature: :math:`\tau`.
      run_spliced: ``(params, entry, value, acts) -> logits`` in place of ``run`` for
        the reconstruction, such as ``run_alone`` of
        :class:`toyfeat.lm.split.SplitDecoder`, in which the other tokens of a
        window are as the model has them (a clean prefix).

    Returns:
      :class:`Term` for taps with a context of :class:`Windows`.

    Raises:
      TypeError: if ``run`` is no function.
      ValueError: for a temperature that is not positive; from the term, for taps
        without windows.

    References:
      Braun et al. (2024), "Identifying functionally important features with
      end-to-end sparse dictionary learning".
    """
    check_function("spliced_kl", "run", run, "(params, entry, value)")
    check_number("spliced_kl", "temperature", temperature, above=0)

    def loss(inputs: Inputs) -> Array:
        windows = require_windows("spliced_kl", inputs)
        value = _splice(inputs, windows)
        logits = run(windows.params, windows.entry, windows.acts)
        clean = jax.nn.log_softmax(jax.lax.stop_gradient(logits) / temperature)
        if run_spliced is None:
            logits = run(windows.params, windows.entry, value)
        else:
            logits = run_spliced(windows.params, windows.entry, value, windows.acts)
        spliced = jax.nn.log_softmax(logits / temperature)
        kl = jnp.sum(jnp.exp(clean) * (clean - spliced), axis=2)
        return weighted_mean(inputs, kl.reshape(-1))

    return Term("spliced_kl", loss)


def downstream_error(
    run: Callable[[Params, Array, Array], dict[str, Array]],
) -> Term:
    r"""Penalize what the reconstruction changes at later sites.

    .. math:: \tfrac1S \sum_s |x_s - \hat x_s|^2 / \sigma_s^2

    with :math:`\hat x_s` the activation there with the reconstruction in the model
    and :math:`\sigma_s^2` the variance of its entries in the batch.

    Args:
      run: ``(params, entry, value) -> {site: [B, T, E]}``, the later sites to compare.

    Returns:
      :class:`Term` for taps with a context of :class:`Windows`.

    Raises:
      TypeError: if ``run`` is no function.
      ValueError: from the term, for taps without windows.

    References:
      Braun et al. (2024), "SAE e2e+ds".
    """
    check_function("downstream_error", "run", run, "(params, entry, value)")

    def loss(inputs: Inputs) -> Array:
        windows = require_windows("downstream_error", inputs)
        clean = run(windows.params, windows.entry, windows.acts)
        spliced = run(windows.params, windows.entry, _splice(inputs, windows))
        errors = []
        for site, acts in clean.items():
            rows = jax.lax.stop_gradient(acts).reshape(-1, acts.shape[2])
            error = jnp.sum((rows - spliced[site].reshape(rows.shape)) ** 2, axis=1)
            centred = rows - (inputs.weights @ rows)[None, :]
            spread = weighted_mean(inputs, jnp.mean(centred**2, axis=1))
            errors.append(weighted_mean(inputs, error) / spread)
        return jnp.mean(jnp.stack(errors))

    return Term("downstream_error", loss)


def require_windows(who: str, inputs: Inputs) -> Windows:
    """Return the windows of the taps.

    Args:
      who: name of the term, for the error.
      inputs: of the term.

    Raises:
      ValueError: if the taps have no context of :class:`Windows`, or one of other rows.
    """
    windows = inputs.context
    if not isinstance(windows, Windows):
        raise ValueError(
            f"{who}: wanted taps with a context of losses.Windows, got "
            f"{type(windows).__name__}; give taps of whole windows, with the model's "
            "parameters"
        )
    num = windows.acts.shape[0] * windows.acts.shape[1]
    if num != len(inputs.weights):
        raise ValueError(
            f"{who}: wanted windows of the taps' {len(inputs.weights)} rows, got "
            f"{windows.acts.shape[:2]}; give the windows that the rows are of"
        )
    return windows


def _splice(inputs: Inputs, windows: Windows) -> Array:
    """Put reconstructions in the place of the activations that count."""
    recon = (inputs.out.recon * inputs.unit).reshape(windows.acts.shape)
    counts = (inputs.weights > 0).reshape(*windows.acts.shape[:2], 1)
    return jnp.where(counts, recon, windows.acts)
