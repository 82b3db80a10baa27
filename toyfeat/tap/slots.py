"""Recorded variables and their sites: one site, or one per layer of a scan."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp

from toyfeat.tap.probes import apply_probe, check_sites
from toyfeat.types import Acts, Array, Probe

_T = TypeVar("_T")


class Slot(NamedTuple):
    """A recorded variable and the sites that its value splits into.

    Attributes:
      site: the name of the site; inside a scan, without the layer.
      layers: extents of the leading axes that lifted transforms added outside the
        batch axis.  If empty, the slot holds one site.
      shape: ``[B, ..., D]``, the shape of the value at one site.
      dtype: of the value.
    """

    site: str
    layers: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any

    def site_names(self) -> list[str]:
        """List the sites of the slot, ``site@layer`` inside a scan."""
        if not self.layers:
            return [self.site]
        indices = itertools.product(*map(range, self.layers))
        return [f"{self.site}@{','.join(map(str, i))}" for i in indices]

    def stack_deltas(self, probes: Mapping[str, Probe]) -> Array | None:
        """Stack the array probes of the slot's sites; ``None`` without probes.

        Raises:
          ValueError: if a function is to be applied at one layer of a scan.
        """
        probed = [name for name in self.site_names() if name in probes]
        functions = [name for name in probed if callable(probes[name])]
        if functions and self.layers:
            raise ValueError(
                f"probe at site {functions[0]!r}: a function cannot be applied at one "
                "layer of a scan, which runs the same code for all; add an array "
                "there, or unroll the layers"
            )
        if functions or not probed:
            return None
        # A probe added to zeros is the probe broadcast to the shape of the site.
        zeros = jnp.zeros(self.shape, self.dtype)
        deltas = [apply_probe(s, zeros, probes.get(s)) for s in self.site_names()]
        return jnp.stack(deltas).reshape(self.layers + self.shape)

    def split_acts(self, value: Array) -> Acts:
        """Split a recorded value into the activations of its sites."""
        flat = value.reshape((-1, *self.shape))
        return {name: flat[i] for i, name in enumerate(self.site_names())}


def infer_slot(
    site: str, marker: Any, value: Any, batch: int, wider_marker: Any = None
) -> Slot:
    """Infer the lifted axes of a value from a scalar recorded with it.

    A scan stacks the scalar ``marker`` to ``[layers]``.  A module that was
    vmapped over the batch stacks it too, but then its value has no batch axis of
    its own, and the stacked axis is the batch: the one whose extent differs in
    ``wider_marker``, the same scalar with another batch.
    """
    layers = tuple(marker.shape)
    # Axes outside the one that grew with the batch are layers.
    if wider_marker is not None and wider_marker.ndim == len(layers):
        pairs = zip(layers, wider_marker.shape, strict=True)
        fixed = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        layers = tuple(extent for extent, _ in fixed)
    # Without a second batch: a value that is left with no batch axis was vmapped.
    else:
        inner = tuple(value.shape[len(layers) :])
        if layers[:1] == (batch,) and (inner[:1] != (batch,) or len(inner) < 2):
            layers = ()
    shape = tuple(value.shape[len(layers) :])
    return Slot(site=site, layers=layers, shape=shape, dtype=value.dtype)


def sort_slots(
    values: list[_T], sites: list[str], order: Mapping[str, int]
) -> list[_T]:
    """Sort recorded values in the order in which their sites were computed.

    A module that ran from a cached trace was not seen, and then all stay as they are.
    """
    if not all(site in order for site in sites):
        return values
    ranks = [order[site] for site in sites]
    return [values[i] for i in sorted(range(len(values)), key=ranks.__getitem__)]


def check_probes(slots: Iterable[Slot], probes: Mapping[str, Probe], who: str) -> None:
    """Raise if a probe names a site that no slot holds."""
    known = [name for slot in slots for name in slot.site_names()]
    check_sites(probes, known, who=who)
