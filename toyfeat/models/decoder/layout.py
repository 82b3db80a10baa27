"""Split the parameters of a decoder over the devices of a mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from toyfeat.models.decoder.config import DecoderConfig
from toyfeat.types import Params

# Layers that make columns, a head's or a neuron's, and layers that sum over them.
_MAKERS = {"query": "heads", "key": "heads", "value": "heads"}
_MAKERS |= {"gate": "neurons", "up": "neurons"}
_SUMS = {"out": "heads", "down": "neurons"}


def decoder_specs(
    config: DecoderConfig,
    params: Params,
    mesh: Mesh | AbstractMesh,
    *,
    axis: str = "model",
) -> Any:
    """Choose which axis of every parameter the devices of a mesh split.

    Every device has some heads of each attention layer, some neurons of each MLP and a
    part of the vocabulary, so that a block sums twice over the devices.  Norms,
    positions and biases of what is summed are on all of them, and so is whatever the
    devices do not divide: attention where they do not divide the heads of keys and
    values.

    Args:
      config: of the decoder.
      params: its variables, arrays or shapes, of blocks one by one or stacked.
      mesh: with the axis.
      axis: name of the axis that splits parameters; others split the batch.

    Returns:
      Tree of :class:`jax.sharding.PartitionSpec` like ``params``, for
      :func:`toyfeat.meshes.place`.

    Raises:
      ValueError: if the mesh has no such axis.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from toyfeat.models.decoder import Decoder, gpt2
      >>> config = gpt2(vocab=6, layers=1, dim=4, heads=2, context=3)
      >>> params = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 3), int))
      >>> mesh = jax.sharding.AbstractMesh((2,), ("model",))
      >>> specs = decoder_specs(config, params, mesh)["params"]["blocks_0"]
      >>> tuple(specs["up"]["kernel"]), tuple(specs["down"]["kernel"])
      ((None, 'model'), ('model', None))

    References:
      Shoeybi et al. (2019), "Megatron-LM", section 3.
    """
    if axis not in mesh.axis_names:
        raise ValueError(
            f"decoder_specs: axis must be one of the mesh, {mesh.axis_names}, got "
            f"{axis!r}; name the one that splits parameters"
        )
    num = mesh.shape[axis]
    is_split = {
        "heads": config.heads % num == 0 and config.kv_heads % num == 0,
        "neurons": config.hidden % num == 0,
        "tokens": config.vocab % num == 0,
    }

    def spec_of(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        *rest, layer, name = ("", "", *(str(key.key) for key in path))
        ndim = np.ndim(leaf) if not hasattr(leaf, "ndim") else leaf.ndim
        at = _split_axis(layer, name, is_split)
        if at is None:
            return PartitionSpec()
        # Stacked blocks have an axis of layers before the others.
        first = 1 if "blocks" in rest else 0
        return PartitionSpec(*(axis if i == at + first else None for i in range(ndim)))

    return jax.tree_util.tree_map_with_path(spec_of, params)


def _split_axis(layer: str, name: str, is_split: dict[str, bool]) -> int | None:
    """Return the axis of a block's parameter that is split, ``None`` for none."""
    if name in ("embedding", "head"):
        is_table = name == "embedding" and layer == "embed"
        by_token = 0 if is_table else 1 if name == "head" else None
        return by_token if is_split["tokens"] else None
    if is_split.get(_MAKERS.get(layer, "")):
        return 1 if name == "kernel" else 0
    if is_split.get(_SUMS.get(layer, "")) and name == "kernel":
        return 0
    return None
