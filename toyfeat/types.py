"""Types that several packages share: pytrees, protocols and aliases.

No computation lives here.  Shape letters are the same in the whole library:
``B`` inputs in a batch, ``N`` examples (batch and positions flattened), ``D``
width of a site, ``K`` readouts per example, ``R`` kept rank, ``F`` true
features.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
"""An array of JAX or NumPy, for functions of the host that only read values."""

Params = Any
"""A pytree of arrays, the parameters of a model."""

Inputs = Any
"""A pytree whose leaves all have the leading axis ``B``."""

Outputs = Any
"""A pytree whose leaves all have the leading axis ``B``."""

Probe = Array | Callable[[Array], Array]
"""An array that is added to an activation, or a function that is applied to it."""

Acts = dict[str, Array]
"""Site name to the activation at that site, after its probe."""


class Probed(Protocol):
    """A model with named sites whose activations can be read and changed.

    ``probes`` maps a site to an array that is added there or to a function
    that is applied there; a site without a probe is left unchanged.  The
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
    """Activations and their gradients at one site.

    Attributes:
      acts: ``[N, D]``, the activations.
      grads: ``[N, K, D]``, the gradients of the readouts (what is differentiated)
        with respect to the activation at each position, or ``None``.
      weights: ``[N]``, the weight of each example; 0 leaves it out.
      targets: ``[N, E]``, the outputs that a transcoder reconstructs, if they are
        not ``acts``; ``grads`` are then ``[N, K, E]``, with respect to them.
      context: a pytree that terms of a loss read besides, such as the parameters of
        the model behind the site (:class:`toyfeat.losses.Windows`), or ``None``.
    """

    acts: Array
    grads: Array | None
    weights: Array
    targets: Array | None = None
    context: Any = None


class Accumulator(NamedTuple):
    """Functions that compute statistics over a stream and merge those of shards.

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


class Diagnostics(NamedTuple):
    """Diagnostics of a decomposition: numerical rank, total variance, tolerance.

    Attributes:
      rank: ``[]`` int32, the numerical rank: how many columns of the basis are not
        zero.
      total: ``[]``, the sum of the full spectrum, truncated or not, so that
        ``spectrum / total`` are shares of explained variance.
      cut: ``[]``, the absolute tolerance below which an eigenvalue counts as 0.
      centring_removed: ``[]``, the share of the uncentred second moment that
        centring removed; 0 without centring.  If it is 1 up to rounding, the data
        are constant and a rank of 0 is correct.
    """

    rank: Array
    total: Array
    cut: Array
    centring_removed: Array


class Basis(NamedTuple):
    """Pairs of reading and writing directions.

    ``encode(a) = (a - mean) @ readers`` and ``decode(z) = z @ writers + mean``.
    Beyond the numerical rank the columns of ``readers``, the rows of ``writers``
    and the entries of ``spectrum`` are zero.

    Attributes:
      mean: ``[D]``, subtracted before reading and added after writing.
      readers: ``[D, R]``, one covector per column, which the next layer takes the
        dot product with.
      writers: ``[R, D]``, one vector per row, which the previous layer adds.
      spectrum: ``[R]``, descending; its meaning depends on the method.
      diagnostics: numerical rank, total, tolerance and the effect of centring.
    """

    mean: Array
    readers: Array
    writers: Array
    spectrum: Array
    diagnostics: Diagnostics


class Subject(NamedTuple):
    """A model to find features of, without their truth: the input of a method.

    Attributes:
      probed: the model.
      params: its parameters.
      sample: ``(key, num) -> inputs`` with leading axis ``num``; ``num`` is static.
      site: the site whose features are to be found.
    """

    probed: Probed
    params: Params
    sample: Callable[[Array, int], Inputs]
    site: str


class Features(NamedTuple):
    """Features that a method found in a model, in pairs of reader and writer.

    A *mechanism* is the span of the rows of a group: a direction, a plane (of a gated
    unit, or a circle), or a subspace of more dimensions.  Inside of it no row means
    anything by itself.

    Attributes:
      readers: ``[R, D]``, one covector per row.
      writers: ``[R, D]``, one vector per row.
      group: ``[R]`` int, rows that share a value are one mechanism; ``None`` if every
        row is one of its own.
      strength: ``[R]``, how much of the model goes through the mechanism of each row,
        in units of the method, or ``None``.
      support: ``[R]``, how sure the method is of the mechanism of each row, in 0 .. 1,
        such as the share of independent runs that found it; or ``None``.
    """

    readers: Array
    writers: Array
    group: ArrayLike | None = None
    strength: ArrayLike | None = None
    support: ArrayLike | None = None
