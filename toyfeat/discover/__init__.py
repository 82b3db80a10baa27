"""Methods that find the features of a model: from a subject to readers and writers."""

from toyfeat.discover.circles import circular_planes
from toyfeat.discover.circuits import Circuit, find_circuit, keep_latents
from toyfeat.discover.consensus import (
    ConsensusConfig,
    ConsensusResult,
    consensus,
    consensus_of_taps,
)

__all__ = [
    "Circuit",
    "ConsensusConfig",
    "ConsensusResult",
    "circular_planes",
    "consensus",
    "consensus_of_taps",
    "find_circuit",
    "keep_latents",
]
