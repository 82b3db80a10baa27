"""Files of lenses: safetensors with metadata, and the published format of torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from toyfeat.checks import check_type
from toyfeat.files.atomic import replace_files
from toyfeat.files.safetensors import metadata_of, saver, tensors_of
from toyfeat.files.tensors import finite_tensors
from toyfeat.files.torch_pickle import saved_dict
from toyfeat.files.torch_writing import save_dict
from toyfeat.lens.maps import KINDS, LensMap

_FORMAT = "toyfeat lens 1"
_SUFFIXES = (".safetensors", ".pt")
_PARTS = LensMap._fields


class LensFile(NamedTuple):
    """Contents of a file.

    Attributes:
      kind: one of :data:`toyfeat.lens.maps.KINDS`.
      maps: by site.
      about: model, revision, prompts, estimator, as far as the file says it.
    """

    kind: str
    maps: dict[str, LensMap]
    about: dict[str, Any]


def save_maps(
    kind: str,
    maps: Mapping[str, LensMap],
    about: Mapping[str, Any],
    sites: Sequence[str],
    path: str | Path,
) -> None:
    """Write a lens to a file, which appears when all of it is written.

    Args:
      kind: one of :data:`toyfeat.lens.maps.KINDS`.
      maps: by site.
      about: JSON values, such as ``model``, ``revision``, ``prompts``, ``estimator``.
      sites: all of the model, in order; the published format counts them.
      path: ``NAME.safetensors``, which any lens fits; or ``NAME.pt``, the published
        format of a Jacobian lens, in half precision.

    Raises:
      ValueError: for another suffix, a lens that ``.pt`` cannot hold, entries beyond
        half precision, or ``about`` that is no JSON.
      OSError: if the file cannot be written; one that was there stays.
    """
    who = "lens.save"
    path = Path(path)
    _check_suffix(who, path)
    if path.suffix == ".pt":
        state = _published(who, kind, maps, about, sites)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_dict(path, state, who)
        return
    tensors = {
        f"{site}/{name}": np.ascontiguousarray(part)
        for site, lens_map in maps.items()
        for name, part in lens_map._asdict().items()
        if part is not None
    }
    try:
        text = json.dumps(dict(about), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{who}: about must hold JSON values, got {error}; convert them"
        ) from error
    metadata = {"format": _FORMAT, "kind": kind, "about": text}
    save_file = saver(who)

    def write(part: Path) -> None:
        save_file(tensors, part, metadata=metadata)

    replace_files(who, path.parent, {path.name: write})


def load_maps(path: str | Path, sites: Sequence[str], dim: int | None) -> LensFile:
    """Read the maps of a lens; nothing of the file is run.

    Args:
      path: ``NAME.safetensors`` of this library, or ``NAME.pt`` of any.
      sites: of the model, in order; layer ``i`` of a ``.pt`` is ``sites[i]``.
      dim: width of the streams, if it is known.

    Returns:
      :class:`LensFile`, float32.

    Raises:
      ValueError: if the file is damaged, holds something else, or a lens of another
        width or with more layers.
      FileNotFoundError: if there is no such file.
    """
    who = "lenses.load"
    path = Path(path)
    _check_suffix(who, path)
    if not path.is_file():
        raise FileNotFoundError(f"{who}: there is no {path}; give a file on this disk")
    read = _load_published if path.suffix == ".pt" else _load_safetensors
    kind, tensors, about = read(who, path, sites)
    arrays = finite_tensors(tensors, path, who)
    # Parts of the maps by site.
    parts: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        site, _, part = name.rpartition("/")
        parts.setdefault(site, {})[part] = jnp.asarray(array)
    if kind not in KINDS or not all(_is_sound(x, dim) for x in parts.values()):
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(
            f"{who}: {path} must hold a lens of width {dim}, got kind {kind!r:.40} "
            f"with {shapes!s:.400}; it is the lens of another model, or damaged"
        )
    maps = {site: LensMap(**found) for site, found in parts.items()}
    return LensFile(kind=kind, maps=maps, about=about)


def _is_sound(parts: Mapping[str, Any], dim: int | None) -> bool:
    """Tell whether the parts of a map fit each other and the width."""
    if "matrices" not in parts or set(parts) - set(_PARTS):
        return False
    shape = parts["matrices"].shape
    width = shape[-1] if dim is None and shape else dim
    wanted = {
        "matrices": (shape[0] if shape else 0, width, width),
        "centres": (shape[0] if shape else 0, width),
        "bias": (width,),
    }
    fits = all(x.shape == wanted[name] for name, x in parts.items())
    return fits and shape[0] > 0 and ("centres" in parts or shape[0] == 1)


def _check_suffix(who: str, path: Path) -> None:
    """Raise for a file of an unknown format."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{who}: a lens is a file {' or '.join(_SUFFIXES)}, got {path.name!r}; "
            "give it one of these endings"
        )


def _published(
    who: str,
    kind: str,
    maps: Mapping[str, LensMap],
    about: Mapping[str, Any],
    sites: Sequence[str],
) -> dict[str, Any]:
    """Make the published dict, ``{J: {layer: [D, D] half}, n_prompts, ...}``."""
    if kind != "jacobian":
        raise ValueError(
            f"{who}: a .pt file holds a Jacobian lens, got kind {kind!r}; save it as "
            ".safetensors"
        )
    layers = {list(sites).index(site): x for site, x in maps.items()}
    with np.errstate(over="ignore"):  # becomes infinite, which is looked for next
        halves = {
            layer: np.asarray(layers[layer].matrices[0]).astype(np.float16)
            for layer in sorted(layers)
        }
    wrong = [layer for layer, x in halves.items() if not np.isfinite(x).all()]
    if wrong:
        raise ValueError(
            f"{who}: a .pt file has half precision, up to 65504, got larger or other "
            f"entries at layer {wrong[0]}; save it as .safetensors"
        )
    return {
        "J": halves,
        "n_prompts": int(about.get("prompts") or 0),
        "source_layers": sorted(layers),
        "d_model": len(next(iter(halves.values()))),
        "metadata": {str(name): value for name, value in about.items()},
    }


def _load_published(
    who: str, path: Path, sites: Sequence[str]
) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """Read the published dict: ``(kind, tensors, about)``."""
    contents = saved_dict(path, who)
    tensors = contents.tensors
    layers = {k[1]: x for k, x in tensors.items() if k[:-1] == ("J",)}
    known = range(len(sites) - 1)
    if not layers or len(layers) < len(tensors) or set(layers) - set(known):
        raise ValueError(
            f"{who}: {path} must hold {{'J': {{layer: matrix}}}} with layers of 0 .. "
            f"{len(sites) - 2}, got {sorted(map(str, tensors))!s:.200}; "
            "it is the lens of another model, or of another kind"
        )
    by_name = {f"{sites[int(i)]}/matrices": x[None] for i, x in layers.items()}
    values = contents.values.items()
    about = {str(k[-1]): x for k, x in values if k[:-1] == ("metadata",)}
    about.setdefault("prompts", contents.values.get(("n_prompts",)))
    return "jacobian", by_name, about


def _load_safetensors(
    who: str, path: Path, sites: Sequence[str]
) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """Read a file of this library: ``(kind, tensors, about)``."""
    metadata = metadata_of(path, who)
    tensors = tensors_of(path, who)
    try:
        about = json.loads(metadata["about"])
        check_type(who, "about", about, dict)
        wrong = metadata["format"] != _FORMAT
    except (KeyError, TypeError, ValueError, RecursionError):
        about, wrong = {}, True
    foreign = {name.rpartition("/")[0] for name in tensors} - set(sites[:-1])
    if wrong or foreign:
        raise ValueError(
            f"{who}: {path} must be a {_FORMAT!r} with sites of {list(sites[:-1])}, "
            f"got metadata {metadata!s:.200} and sites {sorted(foreign)[:3]}; it is "
            "the lens of another model, or another file"
        )
    return metadata.get("kind", ""), tensors, about
