"""Language models: a decoder with named sites, and weights that were released."""

from toyfeat.models.decoder.config import DecoderConfig, gpt2, llama, neox
from toyfeat.models.decoder.huggingface import config_of
from toyfeat.models.decoder.module import SITES, Decoder
from toyfeat.models.decoder.pretrained import Pretrained, load_decoder
from toyfeat.models.decoder.stacking import stacked, unstacked
from toyfeat.models.decoder.tokens import token_windows

__all__ = [
    "SITES",
    "Decoder",
    "DecoderConfig",
    "Pretrained",
    "config_of",
    "gpt2",
    "llama",
    "load_decoder",
    "neox",
    "stacked",
    "token_windows",
    "unstacked",
]
