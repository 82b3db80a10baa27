"""Conversion of parameters between a loop and a scan over the layers."""

import jax
import jax.numpy as jnp

from toyfeat.types import Params

_PREFIX = "blocks_"


def stack_blocks(params: Params) -> Params:
    """Stack the parameters of all blocks, for ``Decoder(config, scan=True)``.

    Args:
      params: variables of an unrolled decoder, ``{"params": {"blocks_0": ...}}``.

    Returns:
      The parameters with ``"blocks"``, leaves ``[layers, ...]``.

    Raises:
      ValueError: if there are no ``blocks_0 .. blocks_<n>``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from toyfeat.models.decoder import Decoder, gpt2
      >>> config = gpt2(vocab=5, layers=2, dim=4, heads=1, context=3)
      >>> tokens = jnp.zeros((1, 3), int)
      >>> params = Decoder(config).init(jax.random.key(0), tokens)
      >>> scanned = Decoder(config, scan=True).apply(stack_blocks(params), tokens)
      >>> jnp.allclose(Decoder(config).apply(params, tokens), scanned)
      Array(True, dtype=bool)
    """
    tree = params["params"]
    num = sum(name.startswith(_PREFIX) for name in tree)
    names = [f"{_PREFIX}{i}" for i in range(num)]
    if not num or any(name not in tree for name in names):
        raise ValueError(
            f"stack_blocks: wanted params['params'] with {_PREFIX}0 .. {_PREFIX}<n>, "
            f"got {sorted(tree)}"
        )
    others = {name: x for name, x in tree.items() if name not in names}
    blocks = jax.tree.map(lambda *x: jnp.stack(x), *(tree[name] for name in names))
    return {**params, "params": {**others, "blocks": blocks}}


def unstack_blocks(params: Params) -> Params:
    """Undo :func:`stack_blocks`, for ``Decoder(config)``.

    Args:
      params: variables of a scanned decoder, ``{"params": {"blocks": ...}}``.

    Returns:
      The parameters with ``"blocks_0"`` and so on.

    Raises:
      ValueError: if there are no ``blocks``.
    """
    tree = params["params"]
    if "blocks" not in tree:
        raise ValueError(
            f"unstack_blocks: wanted params['params'] with 'blocks', got {sorted(tree)}"
        )
    others = {name: x for name, x in tree.items() if name != "blocks"}
    num = len(jax.tree.leaves(tree["blocks"])[0])
    blocks = {
        f"{_PREFIX}{i}": jax.tree.map(lambda x, i=i: x[i], tree["blocks"])
        for i in range(num)
    }
    return {**params, "params": {**others, **blocks}}
