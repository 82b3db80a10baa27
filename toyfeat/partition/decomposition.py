r"""Weights split into rank-one parts, and the model with these parts masked.

A weight ``W [d_in, d_out]`` is a sum of ``C`` parts, :math:`V_{:c} U_{c:}`, and of the
remainder :math:`\Delta = W - V U`.  Each example (and position) has a mask
:math:`m \in [0, 1]^C` and a :math:`\delta \in [0, 1]` of the remainder at every site:

.. math:: y = ((x V) \odot m) U + \delta \, x \Delta + b

With all of them 1 this is the target, which is never changed.

References:
  Bushnaq, Braun, Sharkey (2025), "Stochastic parameter decomposition", arXiv
  2506.20790, section 2.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toyfeat.partition.factors import Factored, Use
from toyfeat.partition.tracing import Model, run_factored
from toyfeat.types import Array, Inputs, Outputs, Params

Components = dict[str, dict[str, Array]]
"""Weight to its parts: ``{"V": [d_in, C], "U": [C, d_out]}``."""

Masks = Mapping[str, Array]
"""Site to ``[B, C]`` or ``[B, ..., C]``; a site that is not there is the target's."""


class Site(NamedTuple):
    """One use of a weight that is decomposed.

    Attributes:
      name: of the weight, with ``#1`` for its second use.
      weight: path of the weight.
      transposed: whether it reads what the first use writes, as tied weights do: its
        ``V`` is then the transpose of the weight's ``U``.
      width: of what it reads, ``d_in``.
      components: ``C``.
      positions: axes between the examples and the width, such as the time.
    """

    name: str
    weight: str
    transposed: bool
    width: int
    components: int
    positions: int


class Read(NamedTuple):
    """Inputs of a site in the target.

    Attributes:
      x: ``[B, ..., d_in]``, its input, or ``None`` where that is no matrix product
        (a convolution, an embedding).
      inner: ``[B, ..., C]``, the inner activations ``x V``.
    """

    x: Array | None
    inner: Array


class WeightShape(NamedTuple):
    """A weight: its leaf, its shape, how many axes are read, how many components."""

    leaf: int
    shape: tuple[int, ...]
    num_read: int
    components: int

    def matrix_shape(self) -> tuple[int, int]:
        """Return ``(d_in, d_out)``."""
        read = math.prod(self.shape[: self.num_read])
        return read, math.prod(self.shape[self.num_read :])


@dataclasses.dataclass(frozen=True, eq=False)
class Decomposition:
    """A model with weights that are split into parts; pure functions and names.

    Attributes:
      model: ``(params, inputs) -> outputs``.
      weights: path of each weight to its place and its sizes.
      sites: uses of the weights, in the order in which the model meets them.
    """

    model: Model
    weights: dict[str, WeightShape]
    sites: tuple[Site, ...]

    def init(self, key: Array) -> Components:
        """Draw parts, ``V ~ N(0, 1 / d_in)`` and ``U ~ N(0, 1 / C)`` as published.

        Args:
          key: random key.

        Returns:
          Weight to ``{"V": [d_in, C], "U": [C, d_out]}``.
        """
        drawn: Components = {}
        keys = jax.random.split(key, (len(self.weights), 2))
        for (path, weight), (v_key, u_key) in zip(
            self.weights.items(), keys, strict=True
        ):
            (reads, writes), parts = weight.matrix_shape(), weight.components
            drawn[path] = {
                "V": jax.random.normal(v_key, (reads, parts)) / reads**0.5,
                "U": jax.random.normal(u_key, (parts, writes)) / parts**0.5,
            }
        return drawn

    def target(self, params: Params, inputs: Inputs) -> Outputs:
        """Run the model as it is."""
        return self.model(params, inputs)

    def matrices(self, params: Params) -> dict[str, Array]:
        """Return the weights of a target as matrices ``[d_in, d_out]``."""
        leaves = jax.tree.leaves(params)
        return {
            path: leaves[weight.leaf].reshape(weight.matrix_shape())
            for path, weight in self.weights.items()
        }

    def masked(
        self,
        params: Params,
        components: Components,
        inputs: Inputs,
        masks: Masks,
        deltas: Mapping[str, Array] | None = None,
    ) -> Outputs:
        """Run the model with masked parts.

        Args:
          params: of the target.
          components: parts of the weights.
          inputs: of the model, ``B`` examples.
          masks: site to masks in [0, 1]; sites that are not named are the target's.
          deltas: site to ``[B]`` or ``[B, ...]``, masks of the remainders; 0 where
            none is given, so that only the parts are left.

        Returns:
          Outputs of the model.

        Raises:
          ValueError: for a site that does not exist, a shape that does not fit, and
            values outside of [0, 1] (where they are not traced).
        """
        deltas = {} if deltas is None else deltas
        self._check_masks(masks, deltas)

        def answer(use: Use) -> Array:
            if use.name not in masks:
                return use.output
            mask = jnp.asarray(masks[use.name])
            none = jnp.zeros((1,) * (mask.ndim - 1), mask.dtype)
            return use.masked(mask, jnp.asarray(deltas.get(use.name, none)))

        return self.run(params, components, inputs, answer)

    def read(
        self, params: Params, components: Components, inputs: Inputs
    ) -> tuple[Outputs, dict[str, Read]]:
        """Run the target, and return what every site reads.

        Args:
          params: of the target.
          components: parts of the weights.
          inputs: of the model.

        Returns:
          The target's outputs, and site to :class:`Read`.
        """
        reads: dict[str, Read] = {}

        def answer(use: Use) -> Array:
            known = (
                use.x.ndim == use.inner.ndim
                and use.x.shape[:-1] == use.inner.shape[:-1]
            )
            reads[use.name] = Read(use.x if known else None, use.inner)
            return use.output

        return self.run(params, components, inputs, answer), reads

    def run(
        self, params: Params, components: Components, inputs: Inputs, answer: Any
    ) -> Outputs:
        """Run the model; ``answer`` returns the output of every :class:`Use`."""
        leaves = jax.tree.leaves(params)
        weights = {
            shape.leaf: factored(path, shape, leaves[shape.leaf], components[path])
            for path, shape in self.weights.items()
        }
        return run_factored(self.model, params, inputs, weights, answer)

    def _check_masks(self, masks: Masks, deltas: Mapping[str, Array]) -> None:
        """Check names, shapes, and values that are there to see."""
        sizes = {site.name: site.components for site in self.sites}
        for what, values in (("masks", masks), ("deltas", deltas)):
            if unknown := sorted(set(values) - set(sizes)):
                raise ValueError(
                    f"masked: {what} must be of sites of the decomposition, got "
                    f"{unknown}; sites are {sorted(sizes)}"
                )
            for name, value in values.items():
                if what == "masks" and value.shape[-1:] != (sizes[name],):
                    raise ValueError(
                        f"masked: the mask of {name!r} must be [B, {sizes[name]}], got "
                        f"{value.shape}; it has one entry per component"
                    )
                if isinstance(value, Tracer):
                    continue
                entries = np.asarray(value)
                if not np.all((entries >= 0) & (entries <= 1)):
                    raise ValueError(
                        f"masked: {what} must be in [0, 1], got {entries.min():.3g} to "
                        f"{entries.max():.3g} at {name!r}; squash them first"
                    )


def factored(
    path: str, shape: WeightShape, value: Array, parts: dict[str, Array]
) -> Factored:
    """Put a weight beside its parts, which get the axes that it has in its model."""
    reads, writes = shape.shape[: shape.num_read], shape.shape[shape.num_read :]
    return Factored(
        name=path,
        value=value,
        read=parts["V"].astype(value.dtype).reshape(*reads, -1),
        write=parts["U"].astype(value.dtype).reshape(-1, *writes),
        reads=(True,) * len(reads) + (False,) * len(writes),
    )
