r"""Gated units: products of two reads, whose mechanism is the plane that both span.

A unit computes :math:`h = \phi(r \cdot a)\, \psi(g \cdot a)` and adds :math:`h` times a
vector to the outputs.  Its gradient is :math:`\phi' \psi\, r + \phi\, \psi'\, g`: a
vector of the plane of :math:`r` and :math:`g`, at an angle that depends on both reads.

What can be known of a unit:

- *From the function on an open set of activations:* both directions.  Of a bilinear
  unit the zeros are the lines :math:`r \cdot a = 0` and :math:`g \cdot a = 0`: a
  quadratic form of rank two has one factorisation, up to the order of its factors and
  up to :math:`(c r)(g / c)`.  Which of them is the gate is not defined.  A gate
  :math:`\mathrm{relu}(r \cdot a)` has a kink across :math:`r`, so order and sign are
  known too, and with SiLU or a sigmoid, which are not homogeneous, also the length of
  the row inside.
- *Of a sum of units:* each unit by itself, if the vectors that units add are
  independent, as they are here, and ``2 * units <= dim``: the outputs then span a space
  of quadratic forms whose only elements of rank two are those of single units (the
  uniqueness of block terms).  For more units in superposition we know of no proof.
- *From gradients at examples:* the plane, and its directions only where they occur
  alone.  While both sources of a unit come together, the gradient of a bilinear unit is
  :math:`(g \cdot a)\, r + (r \cdot a)\, g`, whose angle has a smooth density: no
  direction of the plane is preferred, and a sparse code of gradients has no reason to
  prefer one.  Where the source of :math:`g` comes alone the gradient of a bilinear unit
  is along :math:`r`, and the other way round.  But its output is 0 there, so that the
  gradient of half the squared output is 0, and only other readouts see it.

So a unit is scored as a plane.

References:
  Shazeer (2020), arXiv 2002.05202, for gated units; Pearce et al. (2024), arXiv
  2410.08417, for bilinear ones; De Lathauwer (2008), "Decompositions of a higher-order
  tensor in block terms, part II", for uniqueness.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toyfeat.models.planted.heads import (
    SITE,
    check_ints,
    dot,
    dual,
    rotation,
    unit,
)
from toyfeat.models.planted.task import Task, Truth
from toyfeat.tap import from_split
from toyfeat.types import Array, Params, Probed


class Gate(NamedTuple):
    """The two functions of a unit.

    Attributes:
      gate: of the first read, less the threshold.
      value: of the second read.
      threshold: under which the gate is silent; the ReLU of a read that is 0 up to
        float32 rounding would be open in half of the examples.
      signs: share of the signs of the first source that open the gate.
      needs_both: whether the unit is 0 without its second source.
    """

    gate: Callable[[Array], Array]
    value: Callable[[Array], Array]
    threshold: float
    signs: float
    needs_both: bool


def _itself(x: Array) -> Array:
    return x


GATES = {
    "bilinear": Gate(_itself, _itself, 0.0, 1.0, True),
    "relu": Gate(jax.nn.relu, _itself, 0.1, 0.5, True),
    "silu": Gate(jax.nn.silu, _itself, 0.0, 1.0, True),
    "sigmoid": Gate(jax.nn.relu, jax.nn.sigmoid, 0.1, 0.5, False),
}
"""Kind of a unit to its functions.

``"silu"`` is SwiGLU; ``"sigmoid"`` is a ReLU times a sigmoid.
"""


def gated_units(
    key: Array,
    *,
    units: int = 12,
    dim: int = 32,
    kind: str = "bilinear",
    probability: float = 0.08,
    together: float = 1.0,
) -> Task:
    r"""Plant gated units, each of which reads a plane.

    A unit has two sources with random signs, one that its gate reads and one that its
    value reads.  With ``2 * units <= dim`` every read sees its own source alone; with
    more units the reads are random directions in superposition.

    Args:
      key: random key of the task.
      units: ``K``.
      dim: width ``D``, at least 2.
      kind: key of :data:`GATES`.
      probability: of a unit's sources to be active.
      together: share of these examples in which both sources are; in the others it is
        one of the two.

    Returns:
      :class:`toyfeat.models.planted.Task` with ``2 K`` rows, a group per unit: the
      row of the gate, then that of the value.

    Raises:
      ValueError: if sizes or other knobs do not fit.
      TypeError: if a size is not an int.

    Example:
      >>> import jax
      >>> task = gated_units(jax.random.key(0), units=3, dim=8, kind="silu")
      >>> task.truth.readers.shape, task.truth.group.tolist()
      ((6, 8), [0, 0, 1, 1, 2, 2])
    """
    _check(units, dim, kind, probability, together)
    rows_key, mix_key = jax.random.split(key)
    rows = unit(jax.random.normal(rows_key, (2 * units, dim)))
    superposed = 2 * units > dim
    # Duals see their own source alone; in superposition there are none.
    readers = rows if superposed else dual(rows)
    gate = GATES[kind]
    params = {"writers": rows, "readers": readers, "mix": rotation(mix_key, units)}
    both = together if gate.needs_both else (1 + together) / 2
    active = probability * both * gate.signs
    place = "in superposition in" if superposed else "in"
    return Task(
        probed=_PROBED[kind],
        params=params,
        sample=partial(_sources, units, probability, together),
        site=SITE,
        truth=Truth(
            readers=readers,
            writers=rows,
            frequency=jnp.full(2 * units, active),
            group=jnp.repeat(jnp.arange(units), 2),
        ),
        side="mechanisms",
        name=f"{kind} units",
        features=partial(_own_outputs, kind),
        fit=0.0,
        ignored=None,
        about=f"{units} {kind} units {place} {dim} dimensions, each a product of two "
        f"reads whose sources come together in {together:.0%} of the examples.",
        limits=_LIMITS[kind],
    )


_PLANE = "Gradients lie in the planes of the units, and only the plane is scored. "
_LIMITS = {
    "bilinear": _PLANE + "The function has both directions, up to their order and to "
    "lengths whose product is fixed.",
    "relu": _PLANE + "The function has both directions up to lengths; the kink tells "
    "which one is the gate.",
    "silu": _PLANE + "The function has both directions, and the length of the gate's.",
    "sigmoid": _PLANE + "The function has both directions, and the length of the "
    "value's.",
}


def _check(
    units: int, dim: int, kind: str, probability: float, together: float
) -> None:
    """Raise for knobs that do not fit."""
    check_ints("gated_units", units=units, dim=dim)
    if kind not in GATES:
        raise ValueError(
            f"gated_units: wanted a kind of {', '.join(GATES)}, got {kind!r}"
        )
    if not (units >= 1 and dim >= 2 and 0 < probability <= 1 and 0 < together <= 1):
        raise ValueError(
            "gated_units: wanted units >= 1, dim >= 2, probability and together in "
            f"(0, 1], got units {units}, dim {dim}, probability {probability}, "
            f"together {together}"
        )


def _sources(
    units: int, probability: float, together: float, key: Array, num: int
) -> Array:
    """Draw sources ``[num, 2 K]``, U[.5, 1.5] of either sign where they are active."""
    active_key, both_key, which_key, size_key, sign_key = jax.random.split(key, 5)
    active = jax.random.bernoulli(active_key, probability, (num, units))
    both = jax.random.bernoulli(both_key, together, (num, units))
    first = jax.random.bernoulli(which_key, 0.5, (num, units))
    shown = jnp.stack([active & (both | first), active & (both | ~first)], axis=2)
    size = jax.random.uniform(size_key, shown.shape, minval=0.5, maxval=1.5)
    sign = jax.random.rademacher(sign_key, shown.shape, size.dtype)
    return jnp.where(shown, sign * size, 0.0).reshape(num, 2 * units)


def _products(kind: str, reads: Array) -> Array:
    """Return the units' outputs ``[B, K]`` from reads ``[B, 2 K]``."""
    gate = GATES[kind]
    pairs = reads.reshape(len(reads), -1, 2)
    return gate.gate(pairs[:, :, 0] - gate.threshold) * gate.value(pairs[:, :, 1])


def _own_outputs(kind: str, params: Params, sources: Array) -> Array:
    """Return what a unit makes of its own sources, once per row of the unit."""
    del params
    return jnp.repeat(jnp.abs(_products(kind, sources)), 2, axis=1)


def _prefix(params: Params, sources: Array) -> Array:
    return dot(sources, params["writers"])


def _suffix(kind: str, params: Params, acts: Array) -> Array:
    return dot(_products(kind, dot(acts, params["readers"].T)), params["mix"])


_PROBED: dict[str, Probed] = {
    kind: from_split(_prefix, partial(_suffix, kind), site=SITE) for kind in GATES
}
