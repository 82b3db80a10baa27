r"""Sparse dictionaries, with the names and the meaning they have in SAELens.

All of them read ``pre = (acts - b_dec) @ W_enc + b_enc`` and write
``codes @ W_dec + b_dec``; they differ in which codes are kept.  Parameters are a
dict of SAELens' tensors, rows of ``W_dec`` are the features.

References:
  Bloom et al., SAELens 6, whose tensors and conventions these are; the paper of
  each architecture is at its function.
"""

from collections.abc import Sequence

from toyfeat.dictionary.coding import of_config
from toyfeat.types import Dictionary, DictionaryConfig


def standard(
    dim: int, latents: int, *, target_dim: int | None = None, decoder_norm: float = 0.1
) -> Dictionary:
    r"""ReLU codes, :math:`f = \max(0, (a - b_{dec}) W_{enc} + b_{enc})`.

    Args:
      dim: width ``D`` of the activations.
      latents: how many features ``M``.
      target_dim: width of what is written, if it is another activation than the
        one that is read (a transcoder); ``b_dec`` is not subtracted then.
      decoder_norm: length of the rows of ``W_dec`` at the start.

    Returns:
      :class:`Dictionary`; parameters ``W_enc [D, M]``, ``b_enc [M]``, ``W_dec
      [M, D]``, ``b_dec [D]``.

    Raises:
      ValueError: if a size is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> sae = standard(4, 16)
      >>> params = sae.init(jax.random.key(0))
      >>> codes = sae.encode(params, jnp.ones((2, 4)))
      >>> codes.shape, sae.decode(params, codes).shape
      ((2, 16), (2, 4))

    References:
      Bricken et al. (2023), "Towards monosemanticity".
    """
    config = _config("standard", dim, latents, target_dim)
    return of_config(config, decoder_norm=decoder_norm)


def topk(
    dim: int,
    latents: int,
    k: int,
    *,
    signed: bool = False,
    rescale_acts_by_decoder_norm: bool = True,
    target_dim: int | None = None,
    decoder_norm: float = 0.1,
) -> Dictionary:
    """The ``k`` largest codes of every example.

    Args:
      dim: width ``D`` of the activations.
      latents: how many features ``M``.
      k: how many codes are kept; ``encode(..., k=)`` takes a smaller one, which
        may be traced.
      signed: keep the largest by magnitude with their sign (SAELens' AbsTopK), for
        gradients, whose sign means nothing; otherwise negative codes become 0.
      rescale_acts_by_decoder_norm: codes are in units of what they add: they are
        multiplied by the length of their row of ``W_dec`` before they are
        compared, and divided by it when decoded.
      target_dim: as in :func:`standard`.
      decoder_norm: as in :func:`standard`.

    Returns:
      :class:`Dictionary` with the parameters of :func:`standard`.

    Raises:
      ValueError: if a size is not positive or ``k`` is not in ``1 .. latents``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> sae = topk(4, 16, 2)
      >>> codes = sae.encode(sae.init(jax.random.key(0)), jnp.ones((3, 4)))
      >>> bool(((codes != 0).sum(1) <= 2).all())
      True

    References:
      Gao et al. (2024), "Scaling and evaluating sparse autoencoders".
    """
    name = "abstopk" if signed else "topk"
    config = _config(name, dim, latents, target_dim, k, rescale_acts_by_decoder_norm)
    return of_config(config, decoder_norm=decoder_norm)


def gradient_topk(
    dim: int,
    latents: int,
    k: int,
    *,
    weight: float = 1.0,
    rescale_acts_by_decoder_norm: bool = True,
    target_dim: int | None = None,
    decoder_norm: float = 0.1,
) -> Dictionary:
    r"""The ``k`` codes of the largest :math:`f_j (1 + \beta |w_j \cdot g|)`.

    Where ``encode`` is given gradients ``[N, K, D]``, a code counts for more the
    more its writer moves the readouts, :math:`|w_j \cdot g|` being the root mean
    square over the ``K`` of them; the codes themselves are unchanged.  Without
    gradients it is :func:`topk`.

    Args:
      dim: as in :func:`topk`.
      latents: as in :func:`topk`.
      k: as in :func:`topk`.
      weight: :math:`\beta`, in units of one over the gradients' size, which is 1
        for :func:`toyfeat.trainer` and ``grad_scale [K]`` in parameters that
        :func:`toyfeat.folded` returns.
      rescale_acts_by_decoder_norm: as in :func:`topk`.
      target_dim: as in :func:`topk`.
      decoder_norm: as in :func:`topk`.

    Returns:
      :class:`Dictionary` with the parameters of :func:`standard`.

    Raises:
      ValueError: as in :func:`topk`.

    References:
      Olmo et al. (2024), "Features that make a difference", arXiv 2411.10397,
      whose gradient is that of the loss (``K = 1``).
    """
    rescale = rescale_acts_by_decoder_norm
    config = _config("gradient_topk", dim, latents, target_dim, k, rescale)
    config = config._replace(gradient_weight=weight)
    return of_config(config, decoder_norm=decoder_norm)


def batch_topk(
    dim: int,
    latents: int,
    k: int,
    *,
    rescale_acts_by_decoder_norm: bool = True,
    target_dim: int | None = None,
    decoder_norm: float = 0.1,
) -> Dictionary:
    """The ``k N`` largest codes of a batch of ``N``; later those above a threshold.

    Codes that are equal to the smallest that is kept are kept too, so that equal
    examples have equal codes; SAELens keeps exactly ``k N`` of them and leaves it to
    the sort which.  Codes that are 0 do not count in either.

    Args:
      dim: as in :func:`topk`.
      latents: as in :func:`topk`.
      k: codes per example, on average over a batch.
      rescale_acts_by_decoder_norm: as in :func:`topk`.
      target_dim: as in :func:`topk`.
      decoder_norm: as in :func:`topk`.

    Returns:
      :class:`Dictionary` with the parameters of :func:`standard` and
      ``topk_threshold []``, above which ``encode(..., train=False)`` keeps codes.

    Raises:
      ValueError: as in :func:`topk`.

    References:
      Bussmann, Leask and Nanda (2024), "BatchTopK sparse autoencoders".
    """
    rescale = rescale_acts_by_decoder_norm
    config = _config("batchtopk", dim, latents, target_dim, k, rescale)
    return of_config(config, decoder_norm=decoder_norm)


def matryoshka(
    dim: int,
    latents: int,
    k: int,
    *,
    widths: Sequence[int],
    rescale_acts_by_decoder_norm: bool = True,
    decoder_norm: float = 0.1,
) -> Dictionary:
    """:func:`batch_topk` whose first features have to do without the later ones.

    Args:
      dim: as in :func:`topk`.
      latents: as in :func:`topk`.
      k: as in :func:`batch_topk`.
      widths: increasing; the first so many features reconstruct alone.  The last
        is ``latents``.
      rescale_acts_by_decoder_norm: as in :func:`topk`.
      decoder_norm: as in :func:`topk`.

    Returns:
      :class:`Dictionary` as from :func:`batch_topk`; the widths are in its
      ``config``, for the objective.

    Raises:
      ValueError: as in :func:`topk`, or if the widths do not increase to
        ``latents``.

    References:
      Bussmann et al. (2025), "Learning multi-level features with Matryoshka sparse
      autoencoders".
    """
    widths = tuple(widths)
    steps = zip((0, *widths), widths, strict=False)
    if not widths or widths[-1] != latents or any(a >= b for a, b in steps):
        raise ValueError(
            f"matryoshka: widths must increase to latents = {latents}, got {widths}"
        )
    name, rescale = "matryoshka_batchtopk", rescale_acts_by_decoder_norm
    config = _config(name, dim, latents, None, k, rescale)
    config = config._replace(matryoshka_widths=widths)
    return of_config(config, decoder_norm=decoder_norm)


def jump_relu(
    dim: int,
    latents: int,
    *,
    threshold: float = 0.01,
    bandwidth: float = 0.05,
    target_dim: int | None = None,
    decoder_norm: float = 0.1,
) -> Dictionary:
    r"""Codes above a learned threshold, :math:`f = \max(0, pre) [pre > \theta]`.

    The derivative by the threshold is a kernel estimate,
    :math:`-\theta / \epsilon` where ``pre`` is within :math:`\epsilon / 2`.  The
    defaults are SAELens'.  A threshold moves by about a learning rate a step, and from
    .01 it takes thousands of them to few codes; for activations of a variance of 1 per
    entry, as :func:`toyfeat.trainer` makes them, ``threshold=1, bandwidth=1,
    decoder_norm=0.5`` (SynthSAEBench's) start nearer.

    Args:
      dim: as in :func:`standard`.
      latents: as in :func:`standard`.
      threshold: of every feature at the start.
      bandwidth: :math:`\epsilon`, in units of ``pre``.
      target_dim: as in :func:`standard`.
      decoder_norm: as in :func:`standard`.

    Returns:
      :class:`Dictionary` with the parameters of :func:`standard` and ``threshold
      [M]``.

    Raises:
      ValueError: if a size, the threshold or the bandwidth is not positive.

    References:
      Rajamanoharan et al. (2024), "Jumping ahead", equations 11 and 12.
    """
    if not (threshold > 0 and bandwidth > 0):
        raise ValueError(
            "jump_relu: threshold and bandwidth must be positive, got "
            f"{threshold} and {bandwidth}"
        )
    config = _config("jumprelu", dim, latents, target_dim)._replace(bandwidth=bandwidth)
    return of_config(config, decoder_norm=decoder_norm, threshold=threshold)


def gated(dim: int, latents: int, *, decoder_norm: float = 0.1) -> Dictionary:
    r"""One encoder decides which codes are there, a scaled copy how large they are.

    .. math:: f = [\pi > 0] \max(0, \, x W_{enc} e^{r_{mag}} + b_{mag}), \quad
       \pi = x W_{enc} + b_{gate}, \quad x = a - b_{dec}

    Args:
      dim: as in :func:`standard`.
      latents: as in :func:`standard`.
      decoder_norm: as in :func:`standard`.

    Returns:
      :class:`Dictionary`; parameters ``W_enc``, ``W_dec``, ``b_dec``, ``b_gate``,
      ``b_mag`` and ``r_mag [M]``.

    Raises:
      ValueError: if a size is not positive.

    References:
      Rajamanoharan et al. (2024), "Improving dictionary learning with gated sparse
      autoencoders".
    """
    config = _config("gated", dim, latents, None)
    return of_config(config, decoder_norm=decoder_norm)


def _config(
    architecture: str,
    dim: int,
    latents: int,
    target_dim: int | None,
    k: int | None = None,
    rescale: bool = False,
) -> DictionaryConfig:
    return DictionaryConfig(
        architecture, dim, latents, target_dim, k, rescale, target_dim is None
    )
