"""The family of lenses: which maps each of them has, and their files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from toyfeat.checks import check_type
from toyfeat.lens.averages import Estimate
from toyfeat.lens.files import load_maps
from toyfeat.lens.maps import (
    LensMap,
    contrast_weights,
    estimated_maps,
    root_maps,
)
from toyfeat.lens.model import LensModel
from toyfeat.lens.reading import Lens, make_lens
from toyfeat.types import Array, Params

About = Mapping[str, Any] | None


def jacobian_lens(
    model: LensModel, params: Params, estimate: Estimate, *, about: About = None
) -> Lens:
    """Make the Jacobian lens: ``unembed(norm(J h))``.

    Args:
      model: the model.
      params: its parameters.
      estimate: of :func:`mean_jacobian`.
      about: JSON values for the file, such as ``{"model": ..., "revision": ...}``; the
        number of prompts and the estimator are added.

    Returns:
      :class:`Lens`.

    Raises:
      ValueError: if the estimate is of clusters, of no prompt, or of another model.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, toyfeat as ft
      >>> def chain(params, x, tap):
      ...     return tap("b", tap("a", x) @ params.T)
      >>> model = ft.lenses.from_probed(
      ...     ft.from_function(chain), sites=["a", "b"], unembed=lambda p, h: h
      ... )
      >>> turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])
      >>> acc = ft.lenses.mean_jacobian(model, 2, skip_first=0, skip_last=0)
      >>> state = jax.jit(acc.update)(acc.init(), turn, jnp.ones((3, 1, 2)))
      >>> lens = jacobian_lens(model, turn, acc.finish(state))
      >>> lens.read("a", jnp.array([1.0, 0.0])).tolist(), lens.about["prompts"]
      ([0.0, 1.0], 3)
    """
    return make_lens(
        model,
        params,
        "jacobian",
        estimated_maps(estimate),
        _about(about, estimate, "mean Jacobian"),
    )


def second_moment_lens(
    model: LensModel,
    params: Params,
    estimate: Estimate,
    *,
    rank: int | None = None,
    about: About = None,
) -> Lens:
    r"""Make the lens of the second moment: ``unembed(norm(S h))``.

    :math:`S = E[J^\top J]^{1/2}`, on its leading directions.  It keeps what the model
    goes on to use, whatever the sign of its effect, and knows nothing of where the
    effect goes: :math:`S` is the size of a Jacobian without its rotation.

    Args:
      model: the model.
      params: its parameters.
      estimate: of :func:`second_moment`.
      rank: leading directions that are kept, all by default.
      about: as of :func:`jacobian_lens`.

    Returns:
      :class:`Lens`.

    Raises:
      ValueError: as :func:`jacobian_lens`, or for a rank that is out of range.
      TypeError: as :func:`jacobian_lens`.
    """
    return make_lens(
        model,
        params,
        "second moment",
        root_maps(estimated_maps(estimate), rank),
        _about(about, estimate, "root of the second moment"),
    )


def clustered_lens(
    model: LensModel,
    params: Params,
    estimate: Estimate,
    centres: Mapping[str, Array],
    *,
    about: About = None,
) -> Lens:
    """Make a lens of one expert per cluster: each stream is read by the nearest.

    Args:
      model: the model.
      params: its parameters.
      estimate: of :func:`mean_jacobian` with ``centres``.
      centres: by site, ``[E, D]``, those of the fit.
      about: as of :func:`jacobian_lens`.

    Returns:
      :class:`Lens`; it has no vectors, :func:`contrast_lens` has.

    Raises:
      ValueError: if experts and centres do not fit.
      TypeError: if an argument has the wrong type.

    References:
      Ayonrinde and Lindsey (2026), J++ lens, for experts of clusters.
    """
    maps = _expert_maps(estimate, centres)
    about = _about(about, estimate, "mean Jacobian per cluster")
    return make_lens(model, params, "clustered", maps, about)


def contrast_lens(
    model: LensModel,
    params: Params,
    estimate: Estimate,
    shares: Mapping[str, Array],
    *,
    about: About = None,
) -> Lens:
    """Combine experts with signed weights into one matrix per site.

    The weights are those of the leading principal component of the experts
    (:func:`toyfeat.lens.maps.contrast_weights`): what their mean cancels is left, and
    what all of them share, such as the identity of a residual stream, is gone.

    Args:
      model: the model.
      params: its parameters.
      estimate: of :func:`mean_jacobian` with ``centres``.
      shares: by site, ``[E]``, the share of the activations in each cluster.
      about: as of :func:`jacobian_lens`.

    Returns:
      :class:`Lens`.

    Raises:
      ValueError: if experts and shares do not fit.
      TypeError: if an argument has the wrong type.
    """
    maps = {}
    for site, lens_map in _expert_maps(estimate, shares).items():
        weights = contrast_weights(lens_map.matrices, shares[site])
        matrix = jnp.einsum("e,eij->ij", weights, lens_map.matrices)
        maps[site] = LensMap(matrix[None])
    about = _about(about, estimate, "signed sum of experts")
    return make_lens(model, params, "contrast", maps, about)


def logit_lens(model: LensModel, params: Params) -> Lens:
    """Make the logit lens, which reads every stream as if it were the final one.

    Args:
      model: the model.
      params: its parameters.

    Returns:
      :class:`Lens` whose maps are identities.

    Raises:
      TypeError: if it is no lens model.
      ValueError: if it has no unembedding matrix, which says its width.

    Example:
      >>> import jax.numpy as jnp, toyfeat as ft
      >>> model = ft.lenses.from_probed(
      ...     ft.from_function(lambda p, x, tap: tap("b", -tap("a", x))),
      ...     sites=["a", "b"], unembed=lambda p, h: h @ p, head=lambda p: p,
      ... )
      >>> lens = logit_lens(model, 2 * jnp.eye(2))
      >>> lens.read("a", jnp.array([1.0, 0.0])).tolist()
      [2.0, 0.0]
      >>> lens.vectors([1], centred=False)["a"].tolist()
      [[0.0, 2.0]]

    References:
      nostalgebraist (2020), "Interpreting GPT: the logit lens".
    """
    check_type("logit_lens", "model", model, LensModel, hint="of ft.lenses.from_probed")
    if model.head is None:
        raise ValueError(
            "logit_lens: the model must have its unembedding matrix, got none; give "
            "from_probed a head"
        )
    eye = jnp.eye(model.head(params).shape[0])[None]
    maps = dict.fromkeys(model.sites[:-1], LensMap(eye))
    return make_lens(model, params, "logit", maps, {"estimator": "none"})


def load(
    path: str | Path, model: LensModel, params: Params, *, expected: About = None
) -> Lens:
    """Load a lens that ``lens.save`` wrote, or a published one.

    Args:
      path: ``NAME.safetensors`` of this library, or ``NAME.pt``, the published format
        ``{"J": {layer: [D, D] half}, "n_prompts", "source_layers", "d_model"}``, read
        without torch; nothing of the file is run.
      model: the model that it is of; layer ``i`` of a ``.pt`` is ``model.sites[i]``.
      params: its parameters.
      expected: what the file has to say of the lens, such as ``{"model": ...}``; two
        models of one shape cannot be told apart otherwise.

    Returns:
      :class:`Lens`, float32; ``lens.about`` has what the file says of it.

    Raises:
      ValueError: if the file is damaged, does not say what is expected, or is the lens
        of a model with other sites or another width.
      FileNotFoundError: if there is no such file.
      TypeError: if it is no lens model.

    Example:
      >>> import numpy as np, tempfile, toyfeat as ft
      >>> from toyfeat.files.torch_writing import save_dict
      >>> model = ft.lenses.from_probed(
      ...     ft.from_function(lambda p, x, tap: tap("b", -tap("a", x))),
      ...     sites=["a", "b"], unembed=lambda p, h: h,
      ... )
      >>> published = {"J": {0: -np.eye(2, dtype=np.float16)}, "n_prompts": 100}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_dict(Path(folder) / "lens.pt", published, "example")
      ...     lens = load(folder + "/lens.pt", model, {})
      >>> lens.read("a", np.float32([1, 2])).tolist(), lens.about
      ([-1.0, -2.0], {'prompts': 100})
    """
    check_type(
        "lenses.load", "model", model, LensModel, hint="of ft.lenses.from_probed"
    )
    dim = None if model.head is None else model.head(params).shape[0]
    kind, maps, about = load_maps(path, model.sites, dim)
    for name, value in (expected or {}).items():
        if about.get(name) != value:
            raise ValueError(
                f"lenses.load: {path} must be a lens with {name} {value!r}, got "
                f"{about.get(name)!r:.80}; it is the lens of another model, or another "
                "fit"
            )
    return make_lens(model, params, kind, maps, about)


def _about(about: About, estimate: Estimate, estimator: str) -> dict[str, Any]:
    """Add to what is known of a lens the number of prompts and the estimator."""
    facts = {"estimator": estimator, "prompts": int(estimate.prompts)}
    return {**facts, **(about or {})}


def _expert_maps(
    estimate: Estimate, by_site: Mapping[str, Array]
) -> dict[str, LensMap]:
    """Make maps of experts, with as many rows of ``by_site``."""
    check_type("lenses", "estimate", estimate, Estimate, hint="finish(state) of a fit")
    experts = {site: x.shape[:-2] for site, x in estimate.matrices.items()}
    rows = {site: jnp.shape(x)[:1] for site, x in by_site.items()}
    if experts != rows or () in experts.values():
        raise ValueError(
            f"lenses: centres or shares must be of the experts {experts}, got {rows}; "
            "give those of the fit with centres"
        )
    return {
        site: LensMap(
            matrices=jnp.nan_to_num(x),
            centres=by_site[site] if jnp.ndim(by_site[site]) == 2 else None,
        )
        for site, x in estimate.matrices.items()
    }
