r"""Terms of the losses that dictionaries are trained with.

A *term* is a function of the :class:`Inputs` of a batch with a name and a
coefficient; a loss is a tuple of terms, as :func:`default` and :func:`attribution`
return.  Means over examples are weighted by the taps' weights.  ``f`` are codes in
units of the rows ``w_j`` of ``W_dec``, ``x`` the target, ``x_hat`` its
reconstruction, ``g_k`` the gradients at the original activation, which are constants.
"""

import jax
import jax.numpy as jnp

from toyfeat.checks import check_choice, check_number, check_type
from toyfeat.dictionary.attributions import (
    PENALTIES,
    mean_penalty,
    unexplained_effect,
)
from toyfeat.dictionary.auxiliary import auxiliary_error
from toyfeat.dictionary.base import lengths, weighted_mean
from toyfeat.dictionary.functional import (
    Expansion,
    Windows,
    downstream_error,
    expanded_kl,
    fisher,
    spliced_kl,
)
from toyfeat.dictionary.gated import gate
from toyfeat.dictionary.jump_relu import quadratic_l0
from toyfeat.dictionary.paired import gradient_reconstruction
from toyfeat.dictionary.shared_kl import shared_kl
from toyfeat.dictionary.types import Dictionary, Inputs, Objective, Term
from toyfeat.types import Array

__all__ = [
    "Expansion",
    "Inputs",
    "Term",
    "Windows",
    "attribution",
    "attribution_sparsity",
    "dead_latents",
    "default",
    "downstream_error",
    "expanded_kl",
    "fisher",
    "gate",
    "gradient_reconstruction",
    "quadratic_l0",
    "reconstruction",
    "shared_kl",
    "sparsity",
    "spliced_kl",
    "unexplained",
]

GAMMA = 0.1
"""Attribution that counts as small for a bounded penalty, in units of the usual one."""


def default(
    dictionary: Dictionary, *, sparsity: float = 1.0, dead_latents: float = 1.0
) -> Objective:
    """Make the loss that an architecture is usually trained with, as in SAELens.

    Args:
      dictionary: of any architecture.
      sparsity: coefficient of the sparsity term, of architectures that have one; in
        units of a variance of 1 per entry where the trainer normalizes.
      dead_latents: coefficient of :func:`dead_latents`; 0 leaves it out.

    Returns:
      Terms for :func:`toyfeat.trainer`.

    Raises:
      TypeError: if the dictionary or a coefficient is of another type.
      ValueError: for a coefficient that is negative or not finite.

    Example:
      >>> from toyfeat.dictionary import gated
      >>> [term.name for term in default(gated(4, 16))]
      ['reconstruction', 'sparsity', 'gate', 'dead_latents']
    """
    _check_dictionary("default", dictionary)
    _check_coefficients("default", sparsity=sparsity, dead_latents=dead_latents)
    # Every dictionary reconstructs.
    terms = [_reconstruction_term()]
    if dictionary.architecture.selects == "all":  # otherwise k makes codes sparse
        terms.append(_sparsity_term()._replace(coefficient=sparsity))
    # What only this architecture is trained with, such as the gate's error.
    terms += dictionary.architecture.losses
    # Revival of silent latents.
    if dead_latents:
        terms.append(_dead_latents_term()._replace(coefficient=dead_latents))
    return tuple(terms)


def attribution(
    dictionary: Dictionary | None = None,
    *,
    sparsity: float = 0.1,
    attribution_sparsity: float = 0.1,
    unexplained: float = 0.1,
    dead_latents: float = 0.0,
    penalty: str = "geman_mcclure",
    form: str = "positive",
) -> Objective:
    r"""Make the loss of attribution dictionary learning: sparse codes, sparse effects.

    .. math:: |x - \hat x|^2 + \lambda \sum_j f_j |w_j|
       + \alpha \sum_j \phi(f_j \, w_j \cdot g) + \beta \, u((x - \hat x) \cdot g)

    With ``penalty="l1", form="signed"`` it is the published loss, which is brittle;
    the defaults are bounded and positive (docs/decisions/train.md, "What makes the
    attribution loss robust").  A coefficient of 0 leaves its term out.

    Args:
      dictionary: adds the terms of its architecture (a gate); ``None`` for
        :func:`toyfeat.dictionaries.standard`.
      sparsity: :math:`\lambda`; left out for top-k codes.
      attribution_sparsity: :math:`\alpha`.
      unexplained: :math:`\beta`.
      dead_latents: as in :func:`default`.
      penalty: of :func:`attribution_sparsity`.
      form: of :func:`unexplained`.

    Returns:
      Terms for :func:`toyfeat.trainer`.

    Raises:
      TypeError: if the dictionary or a coefficient is of another type.
      ValueError: for a coefficient that is negative or not finite, an unknown penalty
        or an unknown form.

    Example:
      >>> [term.name for term in attribution()]
      ['reconstruction', 'sparsity', 'attribution_sparsity', 'unexplained']

    References:
      Olah, Templeton, Bricken and Jermyn (April 2024), "Attribution dictionary
      learning".
    """
    if dictionary is not None:
        _check_dictionary("attribution", dictionary)
    _check_coefficients(
        "attribution",
        sparsity=sparsity,
        attribution_sparsity=attribution_sparsity,
        unexplained=unexplained,
        dead_latents=dead_latents,
    )
    # The terms of the activations; revival comes last, as its own coefficient.
    if dictionary is None:
        terms = (
            _reconstruction_term(),
            _sparsity_term()._replace(coefficient=sparsity),
        )
    else:
        terms = default(dictionary, sparsity=sparsity, dead_latents=0)
    # The terms of the gradients: few latents have an effect, the error has none.
    terms += (
        _attribution_sparsity_term(penalty)._replace(coefficient=attribution_sparsity),
        _unexplained_term(form)._replace(coefficient=unexplained),
        _dead_latents_term()._replace(coefficient=dead_latents),
    )
    return tuple(term for term in terms if term.coefficient != 0)


def reconstruction() -> Term:
    r"""Penalize the reconstruction error, :math:`|x - \hat x|^2`.

    Returns:
      :class:`Term`; of a Matryoshka dictionary the sum over its prefixes.

    References:
      Bussmann et al. (2025), "Learning multi-level features with Matryoshka sparse
      autoencoders", for the prefixes, :math:`\sum_m |x - \hat x_{<m}|^2`.
    """

    def loss(inputs: Inputs) -> Array:
        own = inputs.dictionary.architecture.reconstruction
        if own is not None:
            return own(inputs)
        error = jnp.sum((inputs.target - inputs.out.recon) ** 2, axis=1)
        return weighted_mean(inputs, error)

    return Term("reconstruction", loss)


def sparsity() -> Term:
    r"""Penalize codes, in the way of the architecture: :math:`\sum_j f_j |w_j|`.

    Returns:
      :class:`Term`; of gated dictionaries :math:`\sum_j \max(0, \pi_j) |w_j|`, of
      JumpReLU the number of codes, :math:`\sum_j [pre_j > \theta_j]`, whose
      derivative by the threshold is a kernel estimate.

    References:
      Anthropic (April 2024), "Update on how we train SAEs", for the lengths;
      Rajamanoharan et al. (2024), both papers.
    """
    return Term("sparsity", _sparsity, warm_up=True)


def dead_latents() -> Term:
    r"""Let latents that have long been silent reconstruct what the others leave.

    :math:`s |r - \sum_{j \in T} pre_j w_j|^2` with :math:`r = x - \hat x` constant,
    :math:`T` the ``D / 2`` dead latents that would add most, and :math:`s` the share
    of ``D / 2`` that is dead, at most 1.

    Returns:
      :class:`Term`.

    References:
      Gao et al. (2024), "Scaling and evaluating sparse autoencoders", appendix A.2;
      scaled as in SAELens, not by the residual's variance.
    """

    def loss(inputs: Inputs) -> Array:
        residual = jax.lax.stop_gradient(inputs.target - inputs.out.recon)
        return auxiliary_error(
            inputs.dictionary,
            inputs.params,
            inputs.acts,
            residual,
            inputs.dead,
            inputs.weights,
        )

    return Term("dead_latents", loss)


def attribution_sparsity(penalty: str = "l1", *, gamma: float = GAMMA) -> Term:
    r"""Penalize effects of latents: :math:`\sum_j \phi(A_j)`, mean over readouts.

    :math:`A_{kj} = f_j (w_j \cdot g_k)`.  With ``"l1"``, :math:`\phi(A) = |A|`, the
    published form.  Bounded forms are in units of :math:`s`, the running root mean
    square of attributions that are not 0: ``"geman_mcclure"``,
    :math:`c^2 / (c^2 + \gamma^2)`, and ``"log"``,
    :math:`\log(1 + |c| / \gamma) / \log(1 + 1 / \gamma)`, with :math:`c = A / s`.

    Args:
      penalty: ``"l1"``, ``"geman_mcclure"`` or ``"log"``.
      gamma: attribution that counts as small, of a bounded form.

    Returns:
      :class:`Term`.

    Raises:
      ValueError: for another penalty, or a ``gamma`` that is not positive.

    References:
      Olah et al. (April 2024), "Attribution dictionary learning", term 3; Geman and
      McClure (1987) for the bounded form.
    """
    check_choice("attribution_sparsity", "penalty", penalty, PENALTIES)
    check_number("attribution_sparsity", "gamma", gamma, above=0)
    form = PENALTIES[penalty](gamma)

    def loss(inputs: Inputs) -> Array:
        # The published penalty is in units of the attributions, bounded ones in units
        # of their running size.
        plain = penalty == "l1"
        scale = jnp.ones_like(inputs.scale) if plain else inputs.scale
        return mean_penalty(inputs, form, scale)

    return Term("attribution_sparsity", loss, warm_up=True, needs_grads=True)


def unexplained(form: str = "positive") -> Term:
    r"""Penalize the first-order effect of the reconstruction error.

    ``"signed"`` is the published :math:`|(x - \hat x) \cdot g|`, in which errors
    cancel; ``"positive"`` is :math:`((x - \hat x) \cdot g)^2`, whose sum over enough
    readouts is a reconstruction error in the metric of the gradients.  Mean over the
    readouts.

    Args:
      form: ``"signed"`` or ``"positive"``.

    Returns:
      :class:`Term`.

    Raises:
      ValueError: for another form.

    References:
      Olah et al. (April 2024), "Attribution dictionary learning", term 4.
    """
    check_choice("unexplained", "form", form, ("signed", "positive"))

    def loss(inputs: Inputs) -> Array:
        effect = unexplained_effect(inputs)
        # Squares add up over readouts to an error in the metric of the gradients.
        size = jnp.abs(effect) if form == "signed" else effect**2
        return weighted_mean(inputs, jnp.mean(size, axis=1))

    return Term("unexplained", loss, needs_grads=True)


# The coefficients of `default` and `attribution` have the names of the terms.
_reconstruction_term = reconstruction
_sparsity_term = sparsity
_dead_latents_term = dead_latents
_attribution_sparsity_term = attribution_sparsity
_unexplained_term = unexplained


def _check_dictionary(who: str, dictionary: Dictionary) -> None:
    """Check the dictionary that a loss is made for."""
    hint = "make one by toyfeat.dictionaries"
    check_type(who, "dictionary", dictionary, Dictionary, hint=hint)


def _check_coefficients(who: str, **coefficients: float) -> None:
    """Check coefficients: a penalty of a negative one has no minimum."""
    for name, value in coefficients.items():
        check_number(who, name, value, least=0)


def _sparsity(inputs: Inputs) -> Array:
    """Compute the architecture's own sparsity, or the lengths of what codes write."""
    architecture = inputs.dictionary.architecture
    if architecture.sparsity is not None:
        return architecture.sparsity(inputs)
    values, index = inputs.out.values, inputs.out.index
    # Codes of all latents: sum over examples first, then one product with the lengths.
    if index is None:
        sizes = jnp.abs(values) if architecture.signed else values
        by_latent = inputs.weights @ sizes
        return jnp.sum(by_latent * lengths(inputs.params["W_dec"]))
    # Codes of a few latents: the lengths of the rows that they use.
    length = lengths(inputs.params["W_dec"])[index]
    return weighted_mean(inputs, jnp.sum(jnp.abs(values) * length, axis=1))
