"""Lenses as functions: what a stream says, and the directions that say a token."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.checks import as_integers, check_flag, check_int, check_type, show
from toyfeat.lens.averages import Estimate
from toyfeat.lens.clusters import nearest
from toyfeat.lens.model import LensModel
from toyfeat.linalg import psd_spectrum
from toyfeat.types import Array, Params

KINDS = ("jacobian", "second moment", "clustered", "contrast", "tuned", "logit")
"""Kinds of lenses, as files name them."""

_HIGHEST = jax.lax.Precision.HIGHEST


class LensMap(NamedTuple):
    """Map of a lens at one site, from its stream to the final one.

    Attributes:
      matrices: ``[E, D, D]``, out times in; the one of the nearest centre is applied.
      centres: ``[E, D]``, or ``None`` for ``E = 1``.
      bias: ``[D]``, added behind the matrix, or ``None``.
    """

    matrices: Array
    centres: Array | None = None
    bias: Array | None = None


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
      kind: one of :data:`KINDS`.
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
    *,
    save: Callable[..., None],
) -> Lens:
    """Make a lens of its maps; the functions of every lens.

    Args:
      model: the model that is read.
      params: its parameters.
      kind: one of :data:`KINDS`.
      maps: by site.
      about: what is known of the lens.
      save: ``(kind, maps, about, sites, path)``, writes a file.

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
        vectors=partial(_vectors, model, params, kind, maps),
        save=partial(save, kind, maps, about, model.sites),
        kind=kind,
        maps=maps,
        about=about,
    )


def estimated_maps(estimate: Estimate) -> dict[str, LensMap]:
    """Make maps of the matrices of a fit, one per site.

    Raises:
      TypeError: if it is no :class:`Estimate`.
      ValueError: if the fit has clusters, or has seen no prompt.
    """
    check_type("lenses", "estimate", estimate, Estimate, hint="finish(state) of a fit")
    if not int(estimate.prompts):
        raise ValueError(
            "lenses: the estimate must be of one prompt or more, got none; update the "
            "state with prompts that are longer than what is skipped"
        )
    wrong = [site for site, x in estimate.matrices.items() if x.ndim != 2]
    if wrong:
        raise ValueError(
            f"lenses: the estimate must have one matrix per site, got clusters at "
            f"{wrong[0]!r}; make a lens of them with ft.lenses.clustered_lens"
        )
    return {site: LensMap(x[None]) for site, x in estimate.matrices.items()}


def root_maps(maps: Mapping[str, LensMap], rank: int | None) -> dict[str, LensMap]:
    r"""Take the roots :math:`E[J^\top J]^{1/2}`, of the leading directions alone.

    Args:
      maps: of second moments.
      rank: directions that are kept, all by default.

    Returns:
      Symmetric maps.
    """

    def root(matrix: Array) -> Array:
        dim = len(matrix)
        num = dim if rank is None else check_int("lenses", "rank", rank, most=dim)
        spectrum = psd_spectrum(matrix)
        vectors, values = spectrum.vectors[:, :num], spectrum.values[:num]
        scaled = vectors * jnp.sqrt(jnp.maximum(values, 0))[None]
        return jnp.matmul(scaled, vectors.T, precision=_HIGHEST)

    return {site: LensMap(root(x.matrices[0])[None]) for site, x in maps.items()}


def contrast_weights(matrices: Array, shares: Array) -> Array:
    r"""Weigh experts by sign, so that what cancels in their mean is left.

    The weights :math:`\alpha` are those of the leading principal component of the
    experts as vectors, :math:`\sum_e \alpha_e J_e` with :math:`\alpha_e = \sqrt{p_e}
    v_e`, of the differences from the mean expert.

    Args:
      matrices: ``[E, D, D]``.
      shares: ``[E]``, share of the activations of each.

    Returns:
      ``[E]``, of absolute sum 1; the largest is positive.

    Example:
      >>> import jax.numpy as jnp
      >>> experts = jnp.array([[[2.0]], [[-2.0]]])
      >>> contrast_weights(experts, jnp.array([0.5, 0.5])).round(3).tolist()
      [0.5, -0.5]
    """
    shares = jnp.asarray(shares, matrices.dtype)
    shares = shares / jnp.sum(shares)
    # Clusters without activations have no matrix; they count nothing.
    rows = jnp.where(shares[:, None] > 0, matrices.reshape(len(shares), -1), 0)
    mean = jnp.einsum("e,ed->d", shares, rows, precision=_HIGHEST)
    rows = (rows - mean[None]) * jnp.sqrt(shares)[:, None]
    gram = jnp.matmul(rows, rows.T, precision=_HIGHEST)
    leading = psd_spectrum(gram).vectors[:, 0]
    weights = leading * jnp.sqrt(shares)
    sign = jnp.sign(weights[jnp.argmax(jnp.abs(weights))])
    return sign * weights / jnp.sum(jnp.abs(weights))


def _check_maps(who: str, model: LensModel, maps: Mapping[str, LensMap]) -> None:
    """Raise unless the maps are of sites of the model and of one width."""
    unknown = [site for site in maps if site not in model.sites[:-1]]
    if unknown:
        raise ValueError(
            f"{who}: a lens of this model has the sites {list(model.sites[:-1])}, got "
            f"{unknown[0]!r}; it is the lens of another model"
        )
    widths = {site: x.matrices.shape[1:] for site, x in maps.items()}
    if len({(*shape, *shape[::-1]) for shape in widths.values()}) > 1:
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
    kind: str,
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
