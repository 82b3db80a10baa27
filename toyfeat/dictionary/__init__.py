"""Sparse dictionaries of activations and gradients."""

from toyfeat.dictionary import controllers, objectives
from toyfeat.dictionary.architectures import (
    batch_topk,
    gated,
    gradient_topk,
    jump_relu,
    matryoshka,
    standard,
    topk,
)
from toyfeat.dictionary.attributions import attribution_l0
from toyfeat.dictionary.linear import from_basis
from toyfeat.dictionary.paired import paired
from toyfeat.dictionary.presets import attribution_objective, dictionary_objective

__all__ = [
    "attribution_l0",
    "attribution_objective",
    "batch_topk",
    "controllers",
    "dictionary_objective",
    "from_basis",
    "gated",
    "gradient_topk",
    "jump_relu",
    "matryoshka",
    "objectives",
    "paired",
    "standard",
    "topk",
]
