"""Activations and activation gradients at any site of any JAX model."""

from toyfeat.tap import readouts
from toyfeat.tap.checks import check_taps
from toyfeat.tap.equinox import from_equinox
from toyfeat.tap.functions import from_function, from_split
from toyfeat.tap.haiku import from_haiku
from toyfeat.tap.linen import from_linen
from toyfeat.tap.mixing import check_no_mixing
from toyfeat.tap.nnx import from_nnx
from toyfeat.tap.penzai import from_penzai
from toyfeat.tap.probes import site_shapes
from toyfeat.tap.taps import tap

__all__ = [
    "check_no_mixing",
    "check_taps",
    "from_equinox",
    "from_function",
    "from_haiku",
    "from_linen",
    "from_nnx",
    "from_penzai",
    "from_split",
    "readouts",
    "site_shapes",
    "tap",
]
