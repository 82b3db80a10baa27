"""Language models: a decoder with named sites, and released weights."""

from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.models.decoder.generation import Generated, generate
from toyfeat.models.decoder.huggingface import parse_config
from toyfeat.models.decoder.layout import decoder_specs
from toyfeat.models.decoder.module import HEAD_SITES, SITES, Decoder
from toyfeat.models.decoder.pretrained import Pretrained, load_decoder
from toyfeat.models.decoder.shapes import gpt2, llama, neox
from toyfeat.models.decoder.stacking import stack_blocks, unstack_blocks
from toyfeat.models.decoder.tokens import token_windows

__all__ = [
    "HEAD_SITES",
    "SITES",
    "Decoder",
    "DecoderConfig",
    "Generated",
    "Pretrained",
    "decoder_specs",
    "generate",
    "gpt2",
    "llama",
    "load_decoder",
    "neox",
    "parse_config",
    "stack_blocks",
    "token_windows",
    "unstack_blocks",
]
