"""Objectives by name."""

from toyfeat.dictionary import objectives
from toyfeat.types import Dictionary, Objective


def dictionary_objective(
    dictionary: Dictionary, *, sparsity: float = 1.0, dead_latents: float = 1.0
) -> Objective:
    """What an architecture is usually trained with, as in SAELens.

    Args:
      dictionary: of any architecture.
      sparsity: coefficient of the sparsity term, of architectures that have one;
        in units of a variance of 1 per entry where the trainer normalizes.
      dead_latents: coefficient of :func:`toyfeat.objectives.dead_latents`; 0 for
        none.

    Returns:
      Terms for :func:`toyfeat.trainer`.

    Example:
      >>> from toyfeat import gated
      >>> [term.name for term in dictionary_objective(gated(4, 16))]
      ['reconstruction', 'sparsity', 'gate', 'dead_latents']
    """
    config = dictionary.config
    terms = [objectives.reconstruction()]
    if config.k is None:
        terms.append(objectives.sparsity()._replace(coefficient=sparsity))
    if config.architecture == "gated":
        terms.append(objectives.gate())
    if config.architecture == "paired":
        terms.append(objectives.gradient_reconstruction())
    if dead_latents:
        terms.append(objectives.dead_latents()._replace(coefficient=dead_latents))
    return tuple(terms)


def attribution_objective(
    dictionary: Dictionary | None = None,
    *,
    sparsity: float = 0.1,
    attribution_sparsity: float = 0.1,
    unexplained: float = 0.1,
    dead_latents: float = 0.0,
    penalty: str = "geman_mcclure",
    form: str = "positive",
) -> Objective:
    r"""Attribution dictionary learning: sparse codes with sparse effects.

    .. math:: |x - \hat x|^2 + \lambda \sum_j f_j |w_j|
       + \alpha \sum_j \phi(f_j \, w_j \cdot g) + \beta \, u((x - \hat x) \cdot g)

    With ``penalty="l1", form="signed"`` the published loss, which is brittle; the
    defaults are bounded and positive.  A coefficient of 0 leaves its term out.

    Args:
      dictionary: adds what its architecture needs beside (a gate); ``None`` for
        :func:`toyfeat.standard`.
      sparsity: :math:`\lambda`; left out for top-k codes.
      attribution_sparsity: :math:`\alpha`.
      unexplained: :math:`\beta`.
      dead_latents: as in :func:`dictionary_objective`.
      penalty: of :func:`toyfeat.objectives.attribution_sparsity`.
      form: of :func:`toyfeat.objectives.unexplained`.

    Returns:
      Terms for :func:`toyfeat.trainer`.

    Example:
      >>> [term.name for term in attribution_objective()]
      ['reconstruction', 'sparsity', 'attribution_sparsity', 'unexplained']

    References:
      Olah, Templeton, Bricken and Jermyn (April 2024), "Attribution dictionary
      learning".
    """
    if dictionary is None:
        terms = [objectives.reconstruction()]
        terms.append(objectives.sparsity()._replace(coefficient=sparsity))
    else:
        terms = list(
            dictionary_objective(dictionary, sparsity=sparsity, dead_latents=0)
        )
    more = {
        objectives.attribution_sparsity(penalty): attribution_sparsity,
        objectives.unexplained(form): unexplained,
        objectives.dead_latents(): dead_latents,
    }
    terms += [term._replace(coefficient=size) for term, size in more.items()]
    return tuple(term for term in terms if term.coefficient != 0)
