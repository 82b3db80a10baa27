"""Sparse dictionaries of activations and gradients."""

from toyfeat.dictionary.architectures import (
    batch_topk,
    gated,
    gradient_topk,
    jump_relu,
    matryoshka,
    standard,
    topk,
)

__all__ = [
    "batch_topk",
    "gated",
    "gradient_topk",
    "jump_relu",
    "matryoshka",
    "standard",
    "topk",
]
