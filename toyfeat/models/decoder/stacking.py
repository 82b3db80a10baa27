"""Conversion of parameters between a loop and a scan over the layers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from toyfeat.models.decoder.checks import show_value
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
      >>> jnp.allclose(Decoder(config).apply(params, tokens), scanned, atol=1e-5)
      Array(True, dtype=bool)
    """
    tree = _module_params("stack_blocks", params)
    num = sum(name.startswith(_PREFIX) for name in tree)
    names = [f"{_PREFIX}{i}" for i in range(num)]
    if not num or any(name not in tree for name in names):
        raise ValueError(
            f"stack_blocks: wanted params['params'] with {_PREFIX}0 .. {_PREFIX}<n>, "
            f"got {sorted(tree)}; give those of an unrolled decoder"
        )
    # One tree whose leaves have a first axis of layers.
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
    tree = _module_params("unstack_blocks", params)
    if "blocks" not in tree:
        raise ValueError(
            "unstack_blocks: wanted params['params'] with 'blocks', got "
            f"{sorted(tree)}; give those of a scanned decoder"
        )
    others = {name: x for name, x in tree.items() if name != "blocks"}
    num = len(jax.tree.leaves(tree["blocks"])[0])
    blocks = {
        f"{_PREFIX}{i}": jax.tree.map(lambda x, i=i: x[i], tree["blocks"])
        for i in range(num)
    }
    return {**params, "params": {**others, **blocks}}


def _module_params(who: str, params: Params) -> Mapping[str, Any]:
    """Look up the parameters of the module in its variables."""
    if not isinstance(params, Mapping) or "params" not in params:
        raise ValueError(
            f"{who}: wanted variables with 'params', got {show_value(params)}; give "
            "what init returns"
        )
    return params["params"]
