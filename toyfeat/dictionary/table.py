"""Table of the architectures of this library, by name."""

from toyfeat.dictionary.batch_topk import BATCH_TOPK, MATRYOSHKA
from toyfeat.dictionary.gated import GATED
from toyfeat.dictionary.jump_relu import JUMP_RELU
from toyfeat.dictionary.linear import LINEAR
from toyfeat.dictionary.paired import PAIRED
from toyfeat.dictionary.standard import STANDARD
from toyfeat.dictionary.topk import ABS_TOPK, GRADIENT_TOPK, TOPK
from toyfeat.dictionary.types import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        STANDARD,
        TOPK,
        ABS_TOPK,
        JUMP_RELU,
        GATED,
        GRADIENT_TOPK,
        BATCH_TOPK,
        MATRYOSHKA,
        PAIRED,
        LINEAR,
    )
}
"""One row per architecture; loaders look names up here."""
