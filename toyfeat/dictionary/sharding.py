"""A dictionary whose latents, and whose batches, are split over a mesh."""

from functools import partial
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from toyfeat.checks import check_type, show
from toyfeat.dictionary.shards import (
    Split,
    lay_out,
    run_automatic,
    sharding,
    split_axes,
    tensor_sharding,
)
from toyfeat.dictionary.tensors import latent_axes
from toyfeat.dictionary.types import Dictionary, Output
from toyfeat.types import Array, Params


def shard(
    dictionary: Dictionary,
    mesh: Mesh | AbstractMesh,
    *,
    data: str | None = "data",
    latents: str | None = "latents",
) -> Dictionary:
    """Split the latents of a dictionary, and its batches, over the axes of a mesh.

    Codes are the same as on one device: those of the largest scores over all shards,
    the first latents of equal ones.  Of each example a shard sends its ``k`` largest
    scores; reconstructions are sums over the shards.  No array of examples times
    latents leaves its device.

    Args:
      dictionary: of any architecture.
      mesh: of devices, its axes automatic or explicit; explicit ones need
        ``jax.set_mesh(mesh)`` around functions under ``jax.jit``.
      data: axis that examples are split over, or ``None``.  Batches whose number of
        examples it does not divide are computed on each of its devices.
      latents: axis that latents are split over, or ``None``.

    Returns:
      :class:`Dictionary` for the mesh.  Its ``init`` lays the parameters out (under
      ``jax.jit`` they are never on one device), and so does that of
      :func:`toyfeat.trainer` with all that belongs to a latent: moments of Adam,
      counts of silent steps.

    Raises:
      TypeError: if an argument is of another type.
      ValueError: if the mesh does not have the axes, or one of them is to split both,
        or the latents do not divide.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import AxisType
      >>> from toyfeat.dictionary import topk
      >>> num, auto = jax.device_count(), (AxisType.Auto, AxisType.Auto)
      >>> mesh = jax.make_mesh((1, num), ("data", "latents"), axis_types=auto)
      >>> sae = shard(topk(4, 16 * num, 2), mesh)
      >>> params = jax.jit(sae.init)(jax.random.key(0))
      >>> params["W_enc"].sharding.shard_shape((4, 16 * num))  # of a device
      (4, 16)
      >>> int((jax.jit(sae.encode)(params, jnp.ones((3, 4))) != 0).sum()) <= 6
      True
    """
    hint = "make one by toyfeat.dictionaries"
    check_type("shard", "dictionary", dictionary, Dictionary, hint=hint)
    _check_mesh(mesh, {"data": data, "latents": latents})
    _check_latents(dictionary, mesh, latents)
    split = Split(mesh, data, latents)
    return dictionary._replace(
        init=partial(_init, split, dictionary),
        encode=partial(_encode, split, dictionary),
        decode=partial(_decode, split, dictionary),
        forward=partial(_forward, split, dictionary),
        split=split,
    )


def _check_mesh(mesh: Any, axes: dict[str, str | None]) -> None:
    """Check that a mesh has the axes, and that they are not the same."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"shard: mesh must be a jax.sharding.Mesh, got {show(mesh)}; jax.make_mesh "
            "makes one"
        )
    for name, axis in axes.items():
        if axis is not None and axis not in mesh.axis_names:
            raise ValueError(
                f"shard: {name} must be one of the axes {mesh.axis_names} of the mesh, "
                f"got {axis!r}; pass {name}= one of them, or None not to split"
            )
    if axes["data"] == axes["latents"]:
        raise ValueError(
            "shard: data and latents must be two axes of the mesh, or one of them "
            f"None, got {axes['data']!r} for both; make a mesh of two axes"
        )


def _check_latents(dictionary: Dictionary, mesh: Any, axis: str | None) -> None:
    """Check that a dictionary is whole, and that the axis divides its latents."""
    if dictionary.split is not None:
        raise ValueError(
            "shard: wanted a dictionary that is not split, got one over the mesh "
            f"{dict(dictionary.split.mesh.shape)}; pass what that was made from"
        )
    num, shards = dictionary.config.d_sae, 1 if axis is None else mesh.shape[axis]
    if num % shards:
        raise ValueError(
            f"shard: the {shards} devices of the axis {axis!r} must divide the "
            f"latents, got {num}; make the dictionary with "
            f"{-(-num // shards) * shards} latents, or a mesh with another axis"
        )


def _init(split: Split, whole: Dictionary, key: Array) -> Params:
    axes = latent_axes(whole.architecture)
    return {
        name: lay_out(x, tensor_sharding(split, axes[name]))
        for name, x in whole.init(key).items()
    }


def _encode(
    split: Split,
    whole: Dictionary,
    params: Params,
    acts: Array,
    *,
    grads: Array | None = None,
    train: bool = False,
    k: Array | None = None,
) -> Array:
    """Encode on the shards, ``[N, M]``."""
    by_latent = sharding(split, *split_axes(split, len(acts)))

    def encode(params: Params, acts: Array, grads: Any, k: Any) -> Array:
        codes = whole.encode(params, acts, grads=grads, train=train, k=k, split=split)
        return lay_out(codes, by_latent)

    return run_automatic(split, encode, by_latent, params, acts, grads, k)


def _decode(
    split: Split,
    whole: Dictionary,
    params: Params,
    codes: Array,
    *,
    acts: Array | None = None,
) -> Array:
    """Decode on the shards and sum over them, ``[N, D]``."""
    by_example = sharding(split, split_axes(split, len(codes))[0])

    def decode(params: Params, codes: Array, acts: Any) -> Array:
        return lay_out(whole.decode(params, codes, acts=acts), by_example)

    return run_automatic(split, decode, by_example, params, codes, acts)


def _forward(
    split: Split,
    whole: Dictionary,
    params: Params,
    acts: Array,
    *,
    grads: Array | None = None,
    k: Array | None = None,
    weights: Array | None = None,
) -> Output:
    """Encode and decode on the shards, by the rule of training."""
    by_latent = sharding(split, *split_axes(split, len(acts)))
    by_example = sharding(split, by_latent.spec[0])
    # Codes of all latents: none has an index.
    fields = dict.fromkeys(("codes", "hidden_pre", "values"), by_latent)
    fields |= dict.fromkeys(("recon", "grad_recon"), by_example)

    def forward(params: Params, acts: Array, grads: Any, k: Any, weights: Any) -> Any:
        options: dict[str, Any] = {"grads": grads, "k": k, "weights": weights}
        out = whole.forward(params, acts, **options, split=split)
        placed = {
            name: lay_out(getattr(out, name), where)
            for name, where in fields.items()
            if getattr(out, name) is not None
        }
        return out._replace(**placed)

    shardings: dict[str, Any] = fields | {"index": None}
    args = params, acts, grads, k, weights
    return run_automatic(split, forward, Output(**shardings), *args)
