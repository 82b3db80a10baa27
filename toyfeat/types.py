"""Every pytree and callable alias that crosses a module boundary.

No computation lives here.  Shape letters, the same in the whole library:
``B`` inputs in a batch, ``N`` examples (batch and positions flattened), ``D``
width of a site, ``K`` readouts per example, ``R`` kept rank, ``F`` true
features.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import struct

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
"""What a host-side function accepts where it only reads values."""

Params = Any
"""A pytree of arrays: whatever the model calls its parameters."""

Inputs = Any
"""A pytree whose leaves all have the leading axis ``B``."""

Outputs = Any
"""A pytree whose leaves all have the leading axis ``B``."""

Probe = Array | Callable[[Array], Array]
"""Added to an activation if it is an array, applied to it if it is a function."""

Acts = dict[str, Array]
"""Site name to the value at that site, after its probe."""


class Probed(Protocol):
    """A model with named sites that can be read and written.

    ``probes`` maps a site to an array that is added there or to a function
    that is applied there; a site without a probe is left as it is.  The
    returned ``acts`` hold the value of every site *after* its probe and are
    differentiable with respect to the probes of earlier sites.  Examples must
    not mix along the batch axis (see :func:`toyfeat.check_no_mixing`).
    """

    def __call__(
        self, params: Params, inputs: Inputs, probes: Mapping[str, Probe], /
    ) -> tuple[Outputs, Acts]:
        """Run the model with its probes."""
        ...


class Taps(NamedTuple):
    """Activations and activation gradients of one site.

    Attributes:
      acts: ``[N, D]``, the activations.
      grads: ``[N, K, D]``, the gradient of readout ``k`` of an input with
        respect to the activation at each of its positions, or ``None``.
      weights: ``[N]``, how much an example counts; 0 leaves it out.
      targets: ``[N, E]``, what a transcoder writes, if that is not ``acts``;
        ``grads`` are then ``[N, K, E]``, with respect to it.
    """

    acts: Array
    grads: Array | None
    weights: Array
    targets: Array | None = None


class Accumulator(NamedTuple):
    """Statistics that are folded over a stream and merged over shards.

    Attributes:
      init: ``() -> state``.
      update: ``(state, batch) -> state``.
      merge: ``(state, state) -> state``; associative and commutative up to
        rounding, with ``init()`` as the identity.
      finish: ``state -> statistics``.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    merge: Callable[..., Any]
    finish: Callable[..., Any]


class DictionaryConfig(NamedTuple):
    """What a dictionary is, beside its parameters; the names are SAELens'.

    Attributes:
      architecture: ``"standard"``, ``"topk"``, ``"abstopk"``, ``"gradient_topk"``,
        ``"batchtopk"``, ``"matryoshka_batchtopk"``, ``"jumprelu"``, ``"gated"``,
        ``"paired"`` or ``"linear"``.
      d_in: width of the activations that are read.
      d_sae: how many features.
      d_out: width of what is written, or ``None`` if that is ``d_in``.
      k: how many codes are kept, or ``None``.
      rescale_acts_by_decoder_norm: codes are in units of what they add.
      apply_b_dec_to_input: ``b_dec`` is subtracted before reading.
      matryoshka_widths: features that have to reconstruct alone, or empty.
      bandwidth: of the derivative by a threshold, or 0.
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


class Forward(NamedTuple):
    """What a dictionary makes of a batch, for its training.

    Attributes:
      codes: ``[N, M]``.
      hidden_pre: ``[N, M]``, what decides which codes are there, before the
        lengths of the decoder's rows: the pre-activations, of a gated dictionary
        those of the gate.
      recon: ``[N, D]``, the reconstruction.
      values: ``[N, k]``, the codes at ``index`` in units of the rows of ``W_dec``,
        or ``[N, M]`` where all of them may be there.
      index: ``[N, k]`` int, which latents may be there, or ``None`` for all.
      grad_recon: ``[N, K, D]``, reconstructed gradients of a paired dictionary,
        or ``None``.
    """

    codes: Array
    hidden_pre: Array
    recon: Array
    values: Array
    index: Array | None = None
    grad_recon: Array | None = None


class Dictionary(NamedTuple):
    """A sparse code of activations.

    Attributes:
      init: ``key -> params``, a dict of tensors named as in SAELens.
      encode: ``(params, acts [N, D], *, grads=None, train=False, k=None) -> codes
        [N, M]``; ``grads [N, K, D]`` where the architecture looks at them,
        ``train`` where it acts otherwise in training, ``k`` to keep fewer codes.
      decode: ``(params, codes [N, M]) -> [N, D]``.
      forward: ``(params, acts, *, grads=None, k=None) -> Forward``, codes and
        reconstruction together, as in training; with ``weights=`` too where codes
        are chosen over a batch, from which an example of weight 0 is left out.
      config: what it is.
    """

    init: Callable[..., Params]
    encode: Callable[..., Array]
    decode: Callable[..., Array]
    forward: Callable[..., Forward]
    config: DictionaryConfig


class Parts(NamedTuple):
    """What the terms of an objective are made of; in scaled units.

    Attributes:
      dictionary: that is trained.
      params: its parameters.
      acts: ``[N, D]``.
      target: ``[N, D]``, what is to be reconstructed.
      out: :class:`Forward` of ``acts``.
      grads: ``[N, K, D]``, constants, or ``None``.
      weights: ``[N]``, summing to 1.
      dead: ``[M]`` bool, latents that have not fired for long.
      scale: ``[]``, the running root mean square of attributions that are not 0.
      coefficients: of every term, with the controller and the warm-up in them.
    """

    dictionary: Dictionary
    params: Params
    acts: Array
    target: Array
    out: Forward
    grads: Array | None
    weights: Array
    dead: Array
    scale: Array
    coefficients: dict[str, Array]


class Term(NamedTuple):
    """One summand of an objective.

    Attributes:
      name: of the term, of its coefficient in ``hyper`` and of its metric.
      loss: ``Parts -> []``, a mean over examples.
      coefficient: the default.
      warm_up: whether the coefficient grows from 0 in the first steps.
      needs_grads: whether the taps must have gradients.
    """

    name: str
    loss: Callable[[Parts], Array]
    coefficient: float = 1.0
    warm_up: bool = False
    needs_grads: bool = False


Objective = tuple[Term, ...]
"""A sum of terms with different names."""


class Controller(NamedTuple):
    """Steers the coefficient of one term to a target; without branches, pure.

    Attributes:
      term: whose coefficient it multiplies.
      measures: the metric it watches: ``"l0"``, ``"attribution_l0"`` or ``"fvu"``.
      target: the default of ``hyper["target"]``.
      init: ``() -> state``.
      update: ``(state, measured, target) -> (state, factor, saturated)``; the
        coefficient is its default times ``factor``, and ``saturated`` says that
        the factor is at a limit.
    """

    term: str
    measures: str
    target: float
    init: Callable[[], Any]
    update: Callable[[Any, Array, Array], tuple[Any, Array, Array]]


class TrainState(NamedTuple):
    """Everything that training a dictionary has to remember.

    In a population every leaf has a leading axis ``P``.

    Attributes:
      step: ``[]`` int32, updates done.
      params: of the dictionary.
      opt_state: of the optimizer.
      controller: of the controller, or ``()``.
      running: what is averaged or counted on the way (scale of the gradients,
        steps since each latent fired, ...), a dict of arrays.
      hyper: name to ``[]`` array, the settings that may differ from member to
        member of a population.
    """

    step: Array
    params: Params
    opt_state: Any
    controller: Any
    running: dict[str, Array]
    hyper: dict[str, Array]


class Scales(NamedTuple):
    """The units in which a dictionary was trained.

    Attributes:
      acts: ``[]``, what activations were divided by.
      target: ``[]``, what the targets were divided by, which is ``acts`` unless the
        dictionary is a transcoder.
      grads: ``[K]``, what the gradients of each readout were divided by.
    """

    acts: Array
    target: Array
    grads: Array


class Trainer(NamedTuple):
    """A dictionary, an objective and an optimizer as two pure functions.

    Attributes:
      init: ``(key, **hyper) -> TrainState``; ``hyper`` overrides defaults.
      update: ``(state, taps) -> (state, metrics)``, ``metrics`` a dict of ``[]``
        arrays with at least ``"loss"``.
    """

    init: Callable[..., TrainState]
    update: Callable[[TrainState, Taps], tuple[TrainState, dict[str, Array]]]


class Outliers(NamedTuple):
    """Dimensions of activations that stand out.

    Attributes:
      dims: ``[n]`` int, whose mean is far from 0 in units of their standard
        deviation, the farthest first.
      ratios: ``[n]``, how far; inf where a dimension does not vary.
      share: ``n / D``.
      severity: ``|mean| / |std|``, norms over all dimensions.
      massive: ``[m]`` int, whose standard deviation is far above the median one, the
        largest first.
      spread: the largest standard deviation in units of the median one.
      massive_variance: share of the variance that the massive dimensions have.
    """

    dims: np.ndarray
    ratios: np.ndarray
    share: float
    severity: float
    massive: np.ndarray
    spread: float
    massive_variance: float


class Member(NamedTuple):
    """What became of one member of a population.

    Attributes:
      index: its place in the population.
      settings: the hyper-parameters in which members differ.
      figures: metrics at the end of the training, and scores.
      finite: whether its loss and its parameters stayed finite.
      saturated: whether its controller was at a limit, the target not reached.
    """

    index: int
    settings: dict[str, float]
    figures: dict[str, float]
    finite: bool = True
    saturated: bool = False


class ArrayBatches(NamedTuple):
    """Batches that are taken from arrays on the device, inside a compiled loop.

    Attributes:
      take: ``(data, step) -> Taps``, traceable; ``step`` is ``[]`` int32.
      data: a pytree of arrays, an argument of the compiled loop.
    """

    take: Callable[[Any, Array], Taps]
    data: Any

    def __call__(self, step: int | Array) -> Taps:
        """Return the batch of a step."""
        return self.take(self.data, step)  # type: ignore[arg-type]


class Moments(NamedTuple):
    """First and second moments of activations and of their gradients.

    Attributes:
      weight: ``[]``, the sum of the weights.
      mean: ``[D]``, the weighted mean of the activations.
      scatter: ``[D, D]``, ``sum_n w_n (a_n - mean)(a_n - mean)^T``.
      grad_mean: ``[D]``, the weighted mean of the gradients over examples and
        readouts, or ``None`` if no gradients were folded.
      grad_second: ``[D, D]``, ``sum_n w_n sum_k g_nk g_nk^T / sum_n w_n``, not
        centred, or ``None``.
      readouts: ``[]``, the number ``K`` of readouts per example.
    """

    weight: ArrayLike
    mean: ArrayLike
    scatter: ArrayLike
    grad_mean: ArrayLike | None = None
    grad_second: ArrayLike | None = None
    readouts: ArrayLike | float = 1.0


@struct.dataclass
class SVDInfo:
    """How a singular value decomposition was found, and how good it is.

    Attributes:
      method: ``"gram"``, ``"subspace"``, ``"krylov"`` or ``"full"`` (in memory),
        ``"gram"``, ``"incremental"`` or ``"frequent_directions"`` (streams); not
        a leaf of the tree.
      passes: how often the matrix is read, most often for a product with a block
        of vectors from either side, unless a fallback adds to it; not a leaf.
      width: columns of such a block; not a leaf.
      residual: ``[]``, an estimate of ``|A - u diag(s) vt|_F``.
      orthogonality: ``[]``, largest entry of ``|u^T u - 1|`` and ``|vt vt^T - 1|``.
      fallback: ``[]`` bool, whether a fast step failed its check and a slower,
        safe one took its place.
      finite: ``[]`` bool; if it is false the matrix holds NaN or inf (or its
        products overflow), and ``u``, ``s``, ``vt`` are NaN.
    """

    method: str = struct.field(pytree_node=False)
    passes: int = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)
    residual: Array
    orthogonality: Array
    fallback: Array
    finite: Array


class SVD(NamedTuple):
    """Leading singular triplets, ``A ~ u @ diag(s) @ vt``.

    Attributes:
      u: ``[N, R]`` orthonormal columns, or ``None`` if they were not wanted or
        cannot be known (a stream is gone).
      s: ``[R]``, descending.
      vt: ``[R, D]`` orthonormal rows; the largest entry of each, by magnitude, is
        positive.
      info: how it was found and how good it is.
    """

    u: Array | None
    s: Array
    vt: Array
    info: SVDInfo


class SketchedMoments(NamedTuple):
    """Moments of which only the leading directions are kept.

    Attributes:
      weight: ``[]``, the sum of the weights.
      mean: ``[D]``, the weighted mean of the activations.
      acts: singular values and right vectors of the centred activations, each row
        times the root of its weight.
      grads: those of the gradients, not centred, or ``None``.
    """

    weight: ArrayLike
    mean: ArrayLike
    acts: SVD
    grads: SVD | None = None


class Diagnostics(NamedTuple):
    """What a decomposition found out on the way.

    Attributes:
      rank: ``[]`` int32, how many columns of the basis are not zero.
      total: ``[]``, the sum of the whole spectrum, kept or not, so that
        ``spectrum / total`` are shares.
      cut: ``[]``, the absolute level under which an eigenvalue counts as 0.
      centring_removed: ``[]``, the share of the uncentred second moment that
        centring took away; 0 where nothing was centred.  At 1 to rounding the
        data were constant and a rank of 0 is the right answer.
    """

    rank: Array
    total: Array
    cut: Array
    centring_removed: Array


class Basis(NamedTuple):
    """Directions that are read and directions that are written, in pairs.

    ``encode(a) = (a - mean) @ readers`` and ``decode(z) = z @ writers + mean``.
    Past the numerical rank the columns of ``readers``, the rows of ``writers``
    and the entries of ``spectrum`` are zero.

    Attributes:
      mean: ``[D]``, subtracted before reading and added after writing.
      readers: ``[D, R]``, one covector per column.
      writers: ``[R, D]``, one vector per row.
      spectrum: ``[R]``, descending; what it measures depends on the method.
      diagnostics: rank, total, cut and the effect of centring.
    """

    mean: Array
    readers: Array
    writers: Array
    spectrum: Array
    diagnostics: Diagnostics


class Truth(NamedTuple):
    """The features that a model was built or trained to have.

    Attributes:
      readers: ``[F, D]``, the covectors that the next layer takes the dot
        product with, or ``None``.
      writers: ``[F, D]``, the vectors that the previous layer adds, or ``None``.
      frequency: ``[F]``, how often a feature is active.
      group: ``[F]`` int, rows that share a value span a subspace inside which
        no direction is preferred, or ``None`` if every row stands alone.
    """

    readers: ArrayLike | None
    writers: ArrayLike | None
    frequency: ArrayLike
    group: ArrayLike | None = None


class Subject(NamedTuple):
    """A model whose features are wanted: what a method may see of a task.

    Attributes:
      probed: the model.
      params: its parameters.
      sample: ``(key, num) -> inputs`` with leading axis ``num``; ``num`` is static.
      site: where the features are looked for.
    """

    probed: Probed
    params: Params
    sample: Callable[[Array, int], Inputs]
    site: str


class Task(NamedTuple):
    """A model with planted features, and everything needed to score a method on it.

    The first four fields are a :class:`Subject`, which ``planted.blind`` takes out.

    Attributes:
      probed: the model.
      params: its parameters.
      sample: ``(key, num) -> inputs``.
      site: where the features are.
      truth: readers and writers of the features at the site.
      side: ``"readers"`` or ``"writers"``, the one that the task is about.
      name: of the task.
      features: ``(params, inputs) -> [B, F]``, how much each feature is there.
      fit: share of the variance of its targets that the model leaves; 0 where the
        model is the definition.
      ignored: ``[Q, D]`` orthonormal rows that span structure of the activations
        that the model reads not at all, or hardly, or ``None``.
      about: a paragraph, what is planted and what makes it hard.
      limits: what no method could know.
    """

    probed: Probed
    params: Params
    sample: Callable[[Array, int], Inputs]
    site: str
    truth: Truth
    side: str
    name: str
    features: Callable[[Params, Inputs], Array]
    fit: float
    ignored: Array | None
    about: str
    limits: str


class Found(NamedTuple):
    """What a method took for the features of a model, in pairs.

    Attributes:
      readers: ``[R, D]``, one covector per row.
      writers: ``[R, D]``, one vector per row.
    """

    readers: Array
    writers: Array


class Scores(NamedTuple):
    """How good what a method found in a task is.

    Attributes:
      readers: coverage of the true readers by the found ones.
      writers: coverage of the true writers.
      precision: share of the found rows, on the side of the task, whose best
        ``|cos|`` with any truth reaches .9.
      found: ``R``, how many pairs.
      random: coverage of the task's side by as many random directions.
      ignored: share of the dimensions of ignored structure that were returned.
      preserved: share of the variance of the output that is left when every
        activation is replaced by what a few of the found writers carry, or a few of
        the found readers tell; the larger one.
    """

    readers: float
    writers: float
    precision: float
    found: int
    random: float
    ignored: float
    preserved: float


class Description(NamedTuple):
    """How :func:`toyfeat.consensus` describes gradients; one default for all models.

    Attributes:
      examples: that are tapped.
      directions: random directions of the output per example.
      codes: ``k`` of the dictionaries, each of which is trained.
      repeats: random starts of each.
      latents: per dimension that the gradients span.
      most: latents at most.
      steps: of training.
      batch: gradients per step.
      learning_rate: of Adam, which is lowered to ``.05 / sqrt(D)`` if that is less.
    """

    examples: int = 20_000
    directions: int = 4
    codes: tuple[int, ...] = (1, 2, 4)
    repeats: int = 2
    latents: int = 8
    most: int = 512
    steps: int = 2000
    batch: int = 256
    learning_rate: float = 3e-3


class Consensus(NamedTuple):
    """What :func:`toyfeat.consensus` found.

    Attributes:
      found: readers and their writers.
      support: ``[R]`` int, in how many of the descriptions a reader recurred; 0 for
        the two rows of a circular plane, which have no direction of their own.
      descriptions: how many there were.
    """

    found: Found
    support: np.ndarray
    descriptions: int


class Match(NamedTuple):
    """A one-to-one assignment of found directions to true ones.

    Attributes:
      index: ``[F]`` int, the row of ``found`` given to each truth, -1 if none.
      similarity: ``[F]``, its ``|cos|``, 0 if none.
      coverage: mean similarity over all ``F`` truths.
      mcc: mean similarity over the ``min(R, F)`` assigned pairs.
      precision: share of the found rows whose best ``|cos|`` with any truth
        reaches .9.
      found: ``R``, the number of found rows that are not zero.
    """

    index: np.ndarray
    similarity: np.ndarray
    coverage: float
    mcc: float
    precision: float
    found: int


class Detection(NamedTuple):
    """How well latents tell where features fire; means over the latents.

    Attributes:
      precision: share of a latent's firings at which its feature fires, 0 if it
        never does.
      recall: share of the feature's firings at which the latent does.
      f1: harmonic mean of the two, latent by latent.
    """

    precision: float
    recall: float
    f1: float
