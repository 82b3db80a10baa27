"""Parts of a decoder that its blocks share: named values and norms."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.types import Array


class Site(nn.Module):
    """Identity that gives a value a name."""

    def __call__(self, value: Array) -> Array:
        """Return the value."""
        return value


class Norm(nn.Module):
    """LayerNorm or RMSNorm in float32, whatever the dtype of the stream.

    Products of rows are written as such: the sums of rows in the gradients of flax's
    modules are slow on a CPU (``docs/decisions/language.md``).
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalize every row of ``[B, T, D]``."""
        config = self.config
        shape, is_centred = (x.shape[-1],), config.norm == "layer"
        ones = nn.initializers.constant(1.0 - config.norm_offset)
        scale = self.param("scale", ones, shape, jnp.float32)
        x = x.astype(jnp.float32)
        if is_centred:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        # Divide by the root mean square.
        einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        mean_square = einsum("btd,btd->bt", x, x) / x.shape[-1]
        inverse = jax.lax.rsqrt(mean_square + float(config.eps))
        scale = scale[None, None].astype(jnp.float32)
        scale = scale + config.norm_offset if config.norm_offset else scale
        x = einsum("btd,bt->btd", x, inverse) * scale
        if is_centred:
            bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
            x = x + bias[None, None].astype(jnp.float32)
        return x
