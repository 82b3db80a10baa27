"""One recorded variable: a site or, inside a scan, one site per layer."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from toyfeat.tap.probes import check_sites, probed_value
from toyfeat.types import Acts, Array, Probe


class Slot(NamedTuple):
    """Where a value was recorded and how it splits into sites.

    ``layers`` are the extents of the leading axes that lifted transforms added
    outside the batch axis; without any, the slot holds one site.
    """

    site: str
    layers: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any

    def names(self) -> list[str]:
        """Names of the sites in the slot, ``site@layer`` inside a scan."""
        if not self.layers:
            return [self.site]
        indices = itertools.product(*map(range, self.layers))
        return [f"{self.site}@{','.join(map(str, i))}" for i in indices]

    def delta(self, probes: Mapping[str, Probe]) -> Array | None:
        """Stack the array probes of the slot's sites; ``None`` if there are none.

        Raises:
          ValueError: if a function is to be applied at one layer of a scan.
        """
        wanted = [name for name in self.names() if name in probes]
        functions = [name for name in wanted if callable(probes[name])]
        if functions and self.layers:
            raise ValueError(
                f"probe at site {functions[0]!r}: a function cannot be applied at one "
                "layer of a scan, which runs the same code for all; add an array "
                "there, or unroll the layers"
            )
        if functions or not wanted:
            return None
        zeros = jnp.zeros(self.shape, self.dtype)
        parts = [probed_value(name, zeros, probes.get(name)) for name in self.names()]
        return jnp.stack(parts).reshape(self.layers + self.shape)

    def acts(self, value: Array) -> Acts:
        """Split a recorded value into the activations of its sites."""
        flat = value.reshape((-1, *self.shape))
        return {name: flat[i] for i, name in enumerate(self.names())}


def slot_of(site: str, marker: Any, value: Any, batch: int) -> Slot:
    """Find the lifted axes of a value from a scalar recorded beside it.

    A scan stacks the scalar ``marker`` to ``[layers]``.  A module that was
    vmapped over the batch stacks it too, but then its value has no batch axis of
    its own, and the stacked axis is the batch.
    """
    layers = tuple(marker.shape)
    inner = tuple(value.shape[len(layers) :])
    if layers[:1] == (batch,) and (inner[:1] != (batch,) or len(inner) < 2):
        layers = ()
    return Slot(site, layers, tuple(value.shape[len(layers) :]), value.dtype)


def check_probes(slots: Iterable[Slot], probes: Mapping[str, Probe], who: str) -> None:
    """Raise if a probe names a site that no slot holds."""
    check_sites(probes, [name for slot in slots for name in slot.names()], who=who)
