"""Sparse dictionaries of activations and gradients.

An architecture is one file and one :class:`Architecture` record; docs/extending.md
shows how to write one of your own with :func:`make_dictionary`.
"""

from toyfeat.dictionary import controllers, losses
from toyfeat.dictionary.attributions import attribution_l0
from toyfeat.dictionary.base import make_dictionary
from toyfeat.dictionary.batch_topk import batch_topk, matryoshka
from toyfeat.dictionary.gated import gated
from toyfeat.dictionary.jump_relu import jump_relu
from toyfeat.dictionary.linear import from_basis
from toyfeat.dictionary.paired import paired
from toyfeat.dictionary.sharding import shard
from toyfeat.dictionary.standard import standard
from toyfeat.dictionary.topk import gradient_topk, topk
from toyfeat.dictionary.types import (
    Architecture,
    Codes,
    Config,
    Dictionary,
    Output,
    RuleInputs,
    SavedAs,
)

__all__ = [
    "Architecture",
    "Codes",
    "Config",
    "Dictionary",
    "Output",
    "RuleInputs",
    "SavedAs",
    "attribution_l0",
    "batch_topk",
    "controllers",
    "from_basis",
    "gated",
    "gradient_topk",
    "jump_relu",
    "losses",
    "make_dictionary",
    "matryoshka",
    "paired",
    "shard",
    "standard",
    "topk",
]
