r"""Weights in factored form, and what a linear operation does to them.

A weight that is decomposed, seen as a matrix from what it reads to what it writes, is
:math:`W \approx V U`.  A model may transpose it, reshape it, cast it or multiply it by
other constants before an input meets it.  All of these are linear, and act on the axes
that are read or on those that are written, so they act on ``V`` or on ``U`` alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.types import Array


class Untraceable(Exception):
    """Raised where a weight is used in a way that has no form of masked parts."""


class Factored(NamedTuple):
    """A weight on its way through a model, with its factors.

    Attributes:
      name: of the weight.
      value: the target's own weight, after the same operations.
      read: ``[*axes that are read, C]``, in the order in which ``value`` has them.
      write: ``[C, *axes that are written]``.
      reads: for each axis of ``value`` whether it is one that is read.
    """

    name: str
    value: Array
    read: Array
    write: Array
    reads: tuple[bool, ...]

    def axes(self, side: bool) -> list[int]:
        """Return the axes of ``value`` that are read, or those that are written."""
        return [axis for axis, reads in enumerate(self.reads) if reads == side]

    def side(self, side: bool) -> Array:
        """Return the factor of a side with its components last, ``[*axes, C]``."""
        return self.read if side else jnp.moveaxis(self.write, 0, -1)

    def with_side(self, side: bool, factor: Array) -> "Factored":
        """Replace the factor of a side, given with its components last."""
        if side:
            return self._replace(read=factor)
        return self._replace(write=jnp.moveaxis(factor, -1, 0))


def transpose(weight: Factored, permutation: Sequence[int]) -> Factored:
    """Permute the axes of a weight."""
    weight = weight._replace(value=jnp.transpose(weight.value, permutation))
    for side in (True, False):
        # The axes of one side keep their factor, in the order that they have now.
        old = weight.axes(side)
        order = [old.index(axis) for axis in permutation if axis in old]
        factor = weight.side(side)
        weight = weight.with_side(side, jnp.transpose(factor, [*order, len(order)]))
    return weight._replace(reads=tuple(weight.reads[axis] for axis in permutation))


def reshape(weight: Factored, shape: Sequence[int]) -> Factored:
    """Merge or split axes of a weight, if no new axis is both read and written.

    Raises:
      Untraceable: if one is.
    """
    reads: list[bool] = []
    for old, new in _axis_groups(weight.value.shape, shape):
        # An axis of length 1 belongs to either side.
        sides = {weight.reads[axis] for axis in old if weight.value.shape[axis] > 1}
        if len(sides) > 1:
            raise Untraceable("reshape of an axis that is read with one that is not")
        side = sides.pop() if sides else all(weight.reads[axis] for axis in old)
        reads += [side] * len(new)
    for side in (True, False):
        sizes = [
            size for size, reads_ in zip(shape, reads, strict=True) if reads_ == side
        ]
        factor = weight.side(side)
        weight = weight.with_side(side, factor.reshape(*sizes, factor.shape[-1]))
    return weight._replace(value=weight.value.reshape(shape), reads=tuple(reads))


def _axis_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of one size into the smallest runs of axes of equal size."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first, second = [], []
        sizes = [1, 1]
        # Take axes from the side that is behind until both have the same size.
        while not (first or second) or sizes[0] != sizes[1]:
            take_old = sizes[0] < sizes[1] or (sizes[0] == sizes[1] and i < len(old))
            if take_old and i < len(old):
                first.append(i)
                sizes[0] *= old[i]
                i += 1
            else:
                second.append(j)
                sizes[1] *= new[j]
                j += 1
        groups.append((first, second))
    return groups


def cast(weight: Factored, dtype: Any) -> Factored:
    """Convert a weight and its factors to another type."""
    arrays = {n: getattr(weight, n).astype(dtype) for n in ("value", "read", "write")}
    return weight._replace(**arrays)


def multiply_constant(
    weight: Factored, other: Array, params: dict[str, Any], first: bool
) -> Factored:
    """Contract axes of one side with a matrix that does not depend on the inputs.

    Args:
      weight: of one operand.
      other: the other operand.
      params: of the ``dot_general``.
      first: whether the weight is the first operand.

    Raises:
      Untraceable: for batch dimensions, and for axes of both sides.
    """
    axes, other_axes = contracted_axes(params, first)
    sides = {weight.reads[axis] for axis in axes}
    if len(sides) != 1:
        raise Untraceable("product with a constant over axes of both sides")
    side = sides.pop()
    own = weight.axes(side)
    positions = [own.index(axis) for axis in axes]
    # New axes come after the free axes of the weight if it is the first operand.
    operands = (weight.value, other) if first else (other, weight.value)
    value = jax.lax.dot_general_p.bind(*operands, **params)
    new_axes = other.ndim - len(axes)
    kept = [r for axis, r in enumerate(weight.reads) if axis not in axes]
    reads = [*kept, *[side] * new_axes] if first else [*[side] * new_axes, *kept]
    # The factor of that side is contracted in the same way.
    factor = _dot(other, weight.side(side), other_axes, positions, params)
    if first:  # [new axes, free axes, C] to [free axes, new axes, C]
        free = len(own) - len(axes)
        order = [*range(new_axes, new_axes + free), *range(new_axes)]
        factor = jnp.transpose(factor, [*order, new_axes + free])
    return weight.with_side(side, factor)._replace(value=value, reads=tuple(reads))


def contracted_axes(
    params: dict[str, Any], first: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the contracted axes of a weight and those of the other operand.

    Raises:
      Untraceable: if the product has batch dimensions.
    """
    (left, right), (batch, _) = params["dimension_numbers"]
    if batch:
        raise Untraceable("product with batch dimensions")
    return (left, right) if first else (right, left)


def _dot(
    x: Array,
    y: Array,
    axes: Sequence[int],
    other: Sequence[int],
    params: dict[str, Any],
) -> Array:
    """Contract axes of two arrays with the precision of the model's own product."""
    dims = ((tuple(axes), tuple(other)), ((), ()))
    return jax.lax.dot_general(
        x,
        y,
        dims,
        precision=params.get("precision"),
        preferred_element_type=params.get("preferred_element_type"),
    )


class Use(NamedTuple):
    """An operation in which an input meets a decomposed weight.

    Attributes:
      name: of the site, the weight's with the number of the use.
      transposed: whether what the weight writes is read here.
      x: what the site reads, as the operation takes it.
      output: ``[B, ..., *axes]`` of the target, the axes that it keeps in front.
      inner: ``[B, ..., C]``, what each component reads.
      write: ``[C, *axes]``, what each component writes.
      restore: gives the model an output of that form back.
      precision: of the operation.
    """

    name: str
    transposed: bool
    x: Array
    output: Array
    inner: Array
    write: Array
    restore: Any
    precision: Any

    def masked(self, mask: Array, delta: Array) -> Array:
        r"""Compute :math:`((x V) \odot m) U + \delta x (W - V U)`.

        In the form :math:`\delta x W + ((x V) \odot (m - \delta)) U`, which is the
        target's own output where both are 1, to the bit, and needs no difference of
        weights.
        """
        lead = self.inner.shape[:-1]
        delta = spread(delta, lead)
        mask = spread(mask, lead, 1)
        gated = self.inner * (mask - delta[..., None])
        written = jnp.tensordot(gated, self.write, 1, precision=self.precision)
        rank = self.output.ndim - len(lead)
        scale = delta.reshape(*delta.shape, *(1,) * rank)
        return scale * self.output + written.astype(self.output.dtype)


def spread(values: Array, lead: Sequence[int], trailing: int = 0) -> Array:
    """Give values per example axes of length 1 for the positions that they lack."""
    missing = len(lead) + trailing - values.ndim
    front = values.ndim - trailing
    sizes = (*values.shape[:front], *(1,) * missing, *values.shape[front:])
    return values.reshape(sizes)


def use_dot(
    weight: Factored, x: Array, params: dict[str, Any], first: bool, name: str
) -> Use:
    """Split a product of inputs and a weight into its components.

    Raises:
      Untraceable: if the axes that are contracted are not all of one side.
    """
    axes, x_axes = contracted_axes(params, first)
    sides = {weight.reads[axis] for axis in axes}
    side = next(iter(sides), True)
    own = weight.axes(side)
    if len(sides) != 1 or sorted(axes) != own:
        raise Untraceable("product over some of the axes that are read")
    operands = (weight.value, x) if first else (x, weight.value)
    output = jax.lax.dot_general_p.bind(*operands, **params)
    positions = [own.index(axis) for axis in axes]
    inner = _dot(x, weight.side(side), x_axes, positions, params)
    restore = lambda y: y  # noqa: E731 - the other form stands below
    if first:  # the weight's axes come first: move them behind those of the inputs
        kept = weight.value.ndim - len(axes)
        order = np.roll(np.arange(output.ndim), -kept).tolist()
        output = jnp.transpose(output, order)
        restore = lambda y: jnp.transpose(y, np.argsort(order).tolist())  # noqa: E731
    write = jnp.moveaxis(weight.side(not side), -1, 0)
    return Use(
        name=name,
        transposed=not side,
        x=x,
        output=output,
        inner=inner,
        write=write,
        restore=restore,
        precision=params.get("precision"),
    )


def use_convolution(
    weight: Factored, x: Array, params: dict[str, Any], name: str
) -> Use:
    """Split a convolution with a kernel into its components.

    Raises:
      Untraceable: for grouped convolutions, and if more than the features are written.
    """
    dims = params["dimension_numbers"]
    features = dims.rhs_spec[0]
    groups = params["feature_group_count"], params["batch_group_count"]
    if groups != (1, 1) or weight.axes(False) != [features]:
        raise Untraceable("grouped convolution")
    output = jax.lax.conv_general_dilated_p.bind(x, weight.value, **params)
    # V is a kernel with C features; U is applied at each position.
    kernel = jnp.moveaxis(weight.read, -1, features)
    inner = jax.lax.conv_general_dilated_p.bind(x, kernel, **params)
    axis = dims.out_spec[1]
    return Use(
        name=name,
        transposed=False,
        x=x,
        output=jnp.moveaxis(output, axis, -1),
        inner=jnp.moveaxis(inner, axis, -1),
        write=weight.write,
        restore=lambda y: jnp.moveaxis(y, -1, axis),
        precision=params.get("precision"),
    )


def use_gather(
    weight: Factored, index: Array, params: dict[str, Any], name: str
) -> Use:
    """Split the rows that are taken of a table, an embedding, into components.

    Raises:
      Untraceable: if anything but whole rows is taken.
    """
    dims = params["dimension_numbers"]
    rows = tuple(dims.collapsed_slice_dims) == tuple(dims.start_index_map) == (0,)
    last = tuple(dims.offset_dims) == (index.ndim - 1,)
    if not (rows and last and weight.reads == (True, False)):
        raise Untraceable("a gather of anything but rows")
    output = jax.lax.gather_p.bind(weight.value, index, **params)
    sizes = {**params, "slice_sizes": (1, weight.read.shape[-1])}
    inner = jax.lax.gather_p.bind(weight.read, index, **sizes)
    return Use(
        name=name,
        transposed=False,
        x=index,
        output=output,
        inner=inner,
        write=weight.write,
        restore=lambda y: y,
        precision=None,
    )
