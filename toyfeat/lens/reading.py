"""Lenses as functions: what a stream says, and the directions that say a token."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import as_integers, check_flag, check_type, show
from toyfeat.lens.clusters import nearest
from toyfeat.lens.files import save_maps
from toyfeat.lens.maps import LensMap
from toyfeat.lens.model import LensModel
from toyfeat.types import Array, Params

_HIGHEST = jax.lax.Precision.HIGHEST


class Lens(NamedTuple):
    """Lens of a model as four functions, with its maps.

    Attributes:
      read: ``(site, acts [..., D]) -> logits [..., V]``, the model's own norm and
        unembedding of the transported stream.
      transport: ``(site, acts [..., D]) -> [..., D]``, where the stream is heading in
        the final stream; the final site stays as it is.
      vectors: ``(tokens [n], *, centred=True) -> {site: [n, D]}``, the directions
        ``J^T W_U[:, token]``.  Centred, the mean over the vocabulary is subtracted: it
        moves all logits alike, which no softmax sees, and is most of a raw vector.
      save: ``(path)``, to ``.safetensors``, or for a Jacobian lens to ``.pt`` as the
        published ones are; see :func:`load`.
      kind: one of :data:`toyfeat.lens.maps.KINDS`.
      maps: by site, without the final one.
      about: model, revision, prompts, estimator: what a file says of the lens.
    """

    read: Callable[[str, Array], Array]
    transport: Callable[[str, Array], Array]
    vectors: Callable[..., dict[str, Array]]
    save: Callable[[str | Path], None]
    kind: str
    maps: dict[str, LensMap]
    about: dict[str, Any]


def make_lens(
    model: LensModel,
    params: Params,
    kind: str,
    maps: Mapping[str, LensMap],
    about: Mapping[str, Any] | None = None,
) -> Lens:
    """Make a lens of its maps; the functions of every lens.

    Args:
      model: the model that is read.
      params: its parameters.
      kind: one of :data:`toyfeat.lens.maps.KINDS`.
      maps: by site.
      about: what is known of the lens.

    Returns:
      :class:`Lens`.

    Raises:
      ValueError: if a site is not one of the model's, or maps differ in width.
    """
    who = "lenses"
    check_type(
        who, "model", model, LensModel, hint="make it with ft.lenses.from_probed"
    )
    maps, about = dict(maps), dict(about or {})
    _check_maps(who, model, maps)

    def transport(site: str, acts: Array) -> Array:
        return _transport(model, maps, site, acts)

    def read(site: str, acts: Array) -> Array:
        return model.unembed(params, transport(site, acts))

    return Lens(
        read=read,
        transport=transport,
        vectors=partial(_vectors, model, params, maps),
        save=partial(save_maps, kind, maps, about, model.sites),
        kind=kind,
        maps=maps,
        about=about,
    )


def _check_maps(who: str, model: LensModel, maps: Mapping[str, LensMap]) -> None:
    """Raise unless the maps are of sites of the model and of one width."""
    unknown = [site for site in maps if site not in model.sites[:-1]]
    if unknown:
        raise ValueError(
            f"{who}: a lens of this model has the sites {list(model.sites[:-1])}, got "
            f"{unknown[0]!r}; it is the lens of another model"
        )
    widths = {site: x.matrices.shape[1:] for site, x in maps.items()}
    if len({size for shape in widths.values() for size in shape}) > 1:
        raise ValueError(
            f"{who}: matrices must be square and of one width, got {widths}; fit again"
        )


def _transport(
    model: LensModel, maps: Mapping[str, LensMap], site: str, acts: Array
) -> Array:
    """Apply the map of a site; the final stream is where it is heading."""
    acts = jnp.asarray(acts)
    if site == model.sites[-1]:
        return acts
    lens_map = _map_at(maps, site)
    dim = lens_map.matrices.shape[-1]
    if acts.shape[-1:] != (dim,):
        raise ValueError(
            f"lenses: the lens reads streams of width {dim} at {site!r}, got shape "
            f"{acts.shape}; is it the lens of another model?"
        )
    matrices, centres, bias = lens_map
    product = partial(jnp.einsum, precision=_HIGHEST)
    acts = acts.astype(matrices.dtype)
    if centres is None:
        moved = product("...d,od->...o", acts, matrices[0])
    else:
        chosen = nearest(acts, centres).astype(matrices.dtype)
        moved = product("...e,...d,eod->...o", chosen, acts, matrices)
    if bias is None:
        return moved
    return moved + jnp.expand_dims(bias, tuple(range(moved.ndim - 1)))


def _map_at(maps: Mapping[str, LensMap], site: str) -> LensMap:
    """Look up the map of a site."""
    if site not in maps:
        raise ValueError(
            f"lenses: the lens has maps at {list(maps)}, got {show(site)}; name one of "
            "these sites"
        )
    return maps[site]


def _vectors(
    model: LensModel,
    params: Params,
    maps: Mapping[str, LensMap],
    tokens: Sequence[int] | Array,
    *,
    centred: bool = True,
) -> dict[str, Array]:
    """Directions ``J^T W_U[:, token]`` of tokens at every site."""
    who = "lens.vectors"
    if model.head is None:
        raise ValueError(
            f"{who}: the model must have its unembedding matrix, got none; give "
            "from_probed a head"
        )
    if any(len(x.matrices) > 1 for x in maps.values()):
        raise ValueError(
            f"{who}: a lens must have one matrix per site, got several experts; make "
            "one of them with ft.lenses.contrast_lens"
        )
    head = model.head(params)
    ids = np.atleast_1d(np.asarray(as_integers(who, "tokens", tokens)))
    if ids.ndim != 1 or (ids < 0).any() or (ids >= head.shape[1]).any():
        raise ValueError(
            f"{who}: tokens must be ids in 0 .. {head.shape[1] - 1}, got "
            f"{show(ids.tolist())}; use the model's own tokenizer"
        )
    columns = head[:, ids]
    if check_flag(who, "centred", centred):
        columns = columns - jnp.mean(head, axis=1, keepdims=True)
    product = partial(jnp.einsum, precision=_HIGHEST)
    return {
        site: product("od,on->nd", x.matrices[0], columns.astype(x.matrices.dtype))
        for site, x in maps.items()
    }
