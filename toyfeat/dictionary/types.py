"""Types of dictionaries: architecture, settings, functions, terms of a loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.dictionary.shards import Split
from toyfeat.types import Array, Params


class Config(NamedTuple):
    """Settings of a dictionary, with the names that they have in SAELens.

    Attributes:
      architecture: name of the :class:`toyfeat.dictionary.Architecture`, such as
        ``"topk"``.
      d_in: width of the activations that are read.
      d_sae: number of latents.
      d_out: width of the output, or ``None`` if it is ``d_in``.
      k: number of codes that are kept, or ``None``.
      rescale_acts_by_decoder_norm: whether codes are multiplied by the lengths of
        their rows of ``W_dec``.
      apply_b_dec_to_input: whether ``b_dec`` is subtracted from the input.
      matryoshka_widths: numbers of leading latents that reconstruct alone, or empty.
      bandwidth: of the kernel for the derivative by a threshold, or 0.
      gradient_weight: how much gradients count in the choice of codes.
    """

    architecture: str
    d_in: int
    d_sae: int
    d_out: int | None = None
    k: int | None = None
    rescale_acts_by_decoder_norm: bool = False
    apply_b_dec_to_input: bool = True
    matryoshka_widths: tuple[int, ...] = ()
    bandwidth: float = 0.0
    gradient_weight: float = 0.0


class Output(NamedTuple):
    """Output of a dictionary for a batch, as training needs it.

    Attributes:
      codes: ``[N, M]``.
      hidden_pre: ``[N, M]``, the pre-activations that decide which codes are kept,
        before they are multiplied by the lengths of the decoder's rows; those of the
        gate for a gated dictionary.
      recon: ``[N, D]``, the reconstruction.
      values: ``[N, k]``, the codes at ``index`` in units of the rows of ``W_dec``,
        or ``[N, M]`` where all latents may be active, or are split over devices.
      index: ``[N, k]`` int, the latents that may be active, or ``None`` for all.
      grad_recon: ``[N, K, D]``, the reconstruction of the gradients by a paired
        dictionary, or ``None``.
    """

    codes: Array
    hidden_pre: Array
    recon: Array
    values: Array
    index: Array | None = None
    grad_recon: Array | None = None


class RuleInputs(NamedTuple):
    """Arguments of a rule: a batch and its pre-activations.

    Attributes:
      acts: ``[N, D]``.
      pre: ``[N, M]``, pre-activations, with ``b_enc`` if there is one.
      grads: ``[N, K, D]``, or ``None``.
      k: number of codes to keep if it is less than that of the configuration, may be
        traced, or ``None``.
      weights: ``[N]``, weights of the examples, or ``None``.
      split: how examples and latents are split over devices, or ``None``.
    """

    acts: Array
    pre: Array
    grads: Array | None = None
    k: Array | None = None
    weights: Array | None = None
    split: Split | None = None


class Codes(NamedTuple):
    """Result of a rule: sparse codes.

    Attributes:
      values: ``[N, M]``, or ``[N, k]`` with ``index``, in units of the rows of
        ``W_dec``; 0 where no code is kept.
      index: ``[N, k]`` int, the latents that ``values`` belong to, or ``None``.
      hidden_pre: ``[N, M]``, the pre-activations that decided, or ``None`` for
        ``pre``.
      grad_recon: ``[N, K, D]``, a reconstruction of the gradients, or ``None``.
    """

    values: Array
    index: Array | None = None
    hidden_pre: Array | None = None
    grad_recon: Array | None = None


class SavedAs(NamedTuple):
    """Form of an architecture in files of SAELens.

    Attributes:
      architecture: name of the architecture that SAELens reads from the files, or the
        own name of an architecture that only this library reads.
      transcoder: whether SAELens has a transcoder of it.
      extra_tensors: tensors that SAELens has no place for; they are written to a file
        of their own and read back by :func:`toyfeat.interop.load_saelens`.  SAELens
        computes codes without them.
      metadata: fields of :class:`Config` that go into the metadata.
      overrides: fields of :class:`Config` with the values that SAELens reads; they
        are the defaults of :class:`Config` in the dictionary itself.
      fold: ``(config, tensors) -> tensors`` of ``architecture``, numpy, for an
        architecture that is another after training and is read back as that one;
        ``None`` for architectures that are read back as they were.
    """

    architecture: str
    transcoder: bool = False
    extra_tensors: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = {}
    fold: Callable[[Config, dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None


MEMBERS = "members"
"""Name of the axis over which :func:`toyfeat.population` maps a trainer."""


class Inputs(NamedTuple):
    """Arguments of a loss: a batch and its reconstruction, in normalized units.

    Attributes:
      dictionary: that is trained.
      params: its parameters.
      acts: ``[N, D]``.
      target: ``[N, D]``, what is reconstructed.
      out: :class:`Output` for ``acts``.
      grads: ``[N, K, D]``, constants, or ``None``.
      weights: ``[N]``, summing to 1.
      dead: ``[M]`` bool, latents that have not fired for many steps.
      scale: ``[]``, running root mean square of the attributions that are not 0.
      coefficients: of every term, with warm-up and controller applied.
      unit: ``[]``, what ``target`` was divided by.
      effect_units: ``[K]``, what effects, products of targets and gradients, were
        divided by.
      context: of the taps.
    """

    dictionary: "Dictionary"
    params: Params
    acts: Array
    target: Array
    out: Output
    grads: Array | None
    weights: Array
    dead: Array
    scale: Array
    coefficients: dict[str, Array]
    unit: Array | float = 1.0
    effect_units: Array | float = 1.0
    context: Any = None


class Term(NamedTuple):
    """Summand of a loss.

    Attributes:
      name: of the term, of its coefficient in ``hyper`` and of its metric.
      loss: ``Inputs -> []``, a mean over examples.
      coefficient: the default.
      warm_up: whether the coefficient grows from 0 in the first steps.
      needs_grads: whether the taps must have gradients.
    """

    name: str
    loss: Callable[[Inputs], Array]
    coefficient: float = 1.0
    warm_up: bool = False
    needs_grads: bool = False


Objective = tuple[Term, ...]
"""Sum of terms with different names."""


def zero_bias(key: Array, config: Config, shared: Params) -> Params:
    """Make ``b_enc``, the tensor that most architectures add to the shared ones."""
    del key, shared
    return {"b_enc": jnp.zeros(config.d_sae)}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Architecture:
    """Everything in which one kind of dictionary differs from the others.

    A dictionary works in three steps.  An affine map reads pre-activations from the
    activations; a *rule* makes sparse codes of them; the rows of ``W_dec`` write the
    reconstruction.  The first and the last are shared, the rule is handed in.

    A new architecture is one record.  Training, populations, the revival of dead
    latents, :func:`toyfeat.denormalized` and files read its fields, so none of them
    needs an edit.  ``name`` and ``rule`` are enough for an architecture with the
    tensors of :func:`toyfeat.dictionaries.standard`; :func:`make_dictionary` makes a
    dictionary of it.  ``standard.py`` is the shortest example, ``jump_relu.py`` has a
    tensor and a loss of its own, ``topk.py`` keeps a few codes per example.

    Attributes:
      name: identifies it in ``config.architecture``, in files and in messages.
      rule: ``(config, params, batch) -> Codes`` from :class:`RuleInputs`; pure.
      rule_after_training: ``rule`` of ``encode(..., train=False)`` where it is
        another, or ``None``.
      tensors: ``(key, config, shared, **start) -> dict``, the tensors at the start
        beside the shared ``W_enc [D, M]``, ``W_dec [M, D]`` and ``b_dec [D]``;
        ``start`` are keywords of :func:`make_dictionary`.
      latent_axes: for each tensor of ``tensors`` the axis along which it has one
        entry per latent, or ``None`` if it has none.
      read: ``(config, params, acts) -> pre [N, M]`` in place of the affine map.
      write: ``(params, values [N, M]) -> [N, D]`` in place of ``values @ W_dec +
        b_dec``.
      selects: where the largest codes are chosen: in each ``"example"`` or in a whole
        ``"batch"``, both by ``config.k``, or ``"all"`` if codes do not compete.
      signed: whether codes have either sign; must be set for a rule that makes
        negative ones, as the sparsity term else takes codes for their sizes.
      reads_gradients: whether ``grads`` take part in the choice; parameters may then
        hold ``grad_scale [K]``, see :func:`normalized_grads`.
      transcodes: whether it can write another activation than it reads.
      sparsity: ``Inputs -> []``, its own :func:`toyfeat.losses.sparsity`, or ``None``.
      reconstruction: ``Inputs -> []``, its own
        :func:`toyfeat.losses.reconstruction`, or ``None``.
      losses: terms that :func:`toyfeat.losses.default` adds.
      averaged_threshold: name of a scalar tensor that is not learned but follows the
        smallest code of a batch, or ``None``.
      nonnegative: names of tensors whose entries are cut off at 0 after a step.
      revived_from: for matrices of ``tensors``, what the entries of a revived latent
        are set to: ``"acts"``, ``"target"`` or ``"grads"`` of an example.  Vectors
        start again from ``tensors``, other matrices stay.
      denormalize: ``(config, params, units) -> dict`` of tensors that have other
        values for data in their own units, given :class:`toyfeat.train.Normalization`;
        ``None`` if only the shared tensors have.
      saved_as: how SAELens' files hold it, or ``None`` if they cannot.
      defaults: fields of :class:`Config` where a file does not have them.
    """

    # What it computes.
    name: str
    rule: Callable[[Config, Params, RuleInputs], Codes]
    rule_after_training: Callable[[Config, Params, RuleInputs], Codes] | None = None
    tensors: Callable[..., Params] = zero_bias
    latent_axes: Mapping[str, int | None] = dataclasses.field(
        default_factory=lambda: {"b_enc": 0}
    )
    read: Callable[[Config, Params, Array], Array] | None = None
    write: Callable[[Params, Array], Array] | None = None
    selects: Literal["example", "batch", "all"] = "all"
    signed: bool = False
    reads_gradients: bool = False
    transcodes: bool = True
    # How it is trained.
    sparsity: Callable[[Inputs], Array] | None = None
    reconstruction: Callable[[Inputs], Array] | None = None
    losses: tuple[Term, ...] = ()
    averaged_threshold: str | None = None
    nonnegative: tuple[str, ...] = ()
    revived_from: Mapping[str, Literal["acts", "target", "grads"]] = dataclasses.field(
        default_factory=dict
    )
    denormalize: Callable[[Config, Params, Any], Params] | None = None
    # How it is saved.
    saved_as: SavedAs | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Dictionary(NamedTuple):
    """Sparse dictionary as four pure functions, with its settings.

    Attributes:
      init: ``key -> params``, a dict of tensors with the names of SAELens.
      encode: ``(params, acts [N, D], *, grads=None, train=False, k=None) -> codes
        [N, M]``; ``grads [N, K, D]`` for architectures that read gradients,
        ``train`` for the rule of training where it differs, ``k`` to keep fewer
        codes.
      decode: ``(params, codes [N, M], *, acts=None) -> [N, D]``; parameters of a
        published transcoder may hold ``W_skip [D_in, D]``, a linear path beside the
        codes, which takes ``acts``.
      forward: ``(params, acts, *, grads=None, k=None, weights=None) -> Output``,
        codes and reconstruction together, as in training; where codes are chosen
        over a batch, an example of weight 0 is left out of the choice.
      config: its settings.
      architecture: the record that the functions are made from.
      split: how :func:`toyfeat.dictionaries.shard` split it, or ``None``.
    """

    init: Callable[..., Params]
    encode: Callable[..., Array]
    decode: Callable[..., Array]
    forward: Callable[..., Output]
    config: Config
    architecture: Architecture
    split: Split | None = None
