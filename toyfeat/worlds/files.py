"""Read and write synthetic worlds in the format of SAELens."""

import json
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from toyfeat.files.atomic import replace_files
from toyfeat.files.json import check_keys, field, list_field, read_json
from toyfeat.files.safetensors import saver, tensors_of
from toyfeat.files.tensors import finite_tensors
from toyfeat.worlds.config import (
    ConstantMagnitude,
    CorrelationConfig,
    ExponentialMagnitude,
    FoldedNormalMagnitude,
    HierarchyConfig,
    LinearFiring,
    LinearMagnitude,
    OrthogonalizationConfig,
    RandomFiring,
    WorldConfig,
    ZipfianFiring,
    magnitudes,
)
from toyfeat.worlds.nodes import nest_trees, parse_trees
from toyfeat.worlds.world import World, assemble_world, firing

_CONFIG, _WEIGHTS = "synthetic_model_config.json", "synthetic_model.safetensors"
_HIERARCHY = "hierarchy.json"
_WHO = "load_synthetic_model"
_MAX_SIZE = 2**31 - 1  # JAX indexes arrays by int32
_RTOL, _ATOL = 1e-4, 1e-6
"""Agreement of stored arrays with recomputed ones.

Both are float32 of the same formula; torch and numpy differ by some 1e-6 of a value.
"""

_RANGES = {
    **dict.fromkeys(("num_features", "hidden_dim", "rank"), (1, _MAX_SIZE)),
    **dict.fromkeys(("std", "std_firing_magnitudes", "correlation_scale"), (0, None)),
    **dict.fromkeys(("min_prob", "max_prob", "mutually_exclusive_portion"), (0, 1)),
}
_FIRING = {"zipfian": ZipfianFiring, "linear": LinearFiring, "random": RandomFiring}
_MAGNITUDE = {
    "constant": ConstantMagnitude,
    "linear": LinearMagnitude,
    "exponential": ExponentialMagnitude,
    "folded_normal": FoldedNormalMagnitude,
}


def save_synthetic_model(path: str | Path, world: World) -> None:
    """Write a world in the format of SAELens' ``SyntheticModel.load_from_disk``.

    The format stores magnitudes, and with a correlation the firing probabilities, only
    as a configuration.  So ``world.config`` is written, and arrays of the world that
    disagree with it are an error.

    Args:
      path: a folder, created if it does not exist; its files are replaced, only when
        all of the new ones are written.
      world: from :func:`synthetic_world` or :func:`load_synthetic_model`.

    Raises:
      ValueError: if the world has no configuration, or was changed after it was made.
      OSError: if a file cannot be written; names it.
      ImportError: without safetensors (``pip install "toyfeat[sae]"``).

    References:
      SAELens 6, ``SyntheticModel.save``.
    """
    save_file = saver("save_synthetic_model")
    config = _check_config(world)
    # Arrays that no configuration determines.
    tensors = {
        "feature_vectors": world.feature_vectors,
        "bias": world.bias,
        "firing_probabilities": world.firing_probabilities,
        "correlation_factor": world.correlation_factor,
        "correlation_diag": world.correlation_diag,
    }
    arrays = {
        name: np.ascontiguousarray(value, np.float32)
        for name, value in tensors.items()
        if value is not None
    }
    # The configuration is written last: without it a folder is no world.
    writers: dict[str, Callable[[Path], object]] = {
        _WEIGHTS: lambda part: save_file(arrays, part)
    }
    if world.hierarchy is not None:
        trees = {"roots": nest_trees(world.hierarchy)}
        writers[_HIERARCHY] = lambda part: _write_json(part, trees)
    writers[_CONFIG] = lambda part: _write_json(part, _config_json(config))
    obsolete = () if _HIERARCHY in writers else (_HIERARCHY,)
    replace_files("save_synthetic_model", Path(path), writers, obsolete)


def load_synthetic_model(path: str | Path) -> World:
    """Read a world that SAELens or :func:`save_synthetic_model` wrote.

    Magnitudes that SAELens draws from a seed come out as SAELens draws them.

    Args:
      path: the folder.

    Returns:
      :class:`World`, float32.

    Raises:
      FileNotFoundError: if the configuration or the tensors are missing.
      ValueError: if a file is broken, a setting is not known here or of another type,
        magnitudes are to be drawn without a seed, or tensors are missing, of other
        shapes or not finite.
      ImportError: without safetensors.

    Example:
      >>> import jax, tempfile
      >>> from toyfeat.worlds import synthetic_world
      >>> world = synthetic_world(jax.random.key(0), 6, 4)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_synthetic_model(folder, world)
      ...     same = load_synthetic_model(folder)
      >>> same.config == world.config
      True
    """
    folder = Path(path)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{_WHO}: there is no {folder / name}; give a folder of a world"
            )
    config = _parse_config(read_json(folder / _CONFIG, _WHO), folder / _CONFIG)
    stored = tensors_of(folder / _WEIGHTS, _WHO)
    tensors = finite_tensors(stored, folder / _WEIGHTS, _WHO)
    _check_tensors(config, tensors, folder / _WEIGHTS)
    trees = None
    if (folder / _HIERARCHY).exists():
        trees = parse_trees(folder / _HIERARCHY, config.num_features)
    shared = None
    if "correlation_factor" in tensors:
        names = "correlation_factor", "correlation_diag"
        shared = jnp.asarray(tensors[names[0]]), jnp.asarray(tensors[names[1]])
    vectors, bias = (jnp.asarray(tensors[k]) for k in ("feature_vectors", "bias"))
    probabilities = tensors["firing_probabilities"]
    try:
        return assemble_world(config, vectors, bias, probabilities, shared, trees)
    except ValueError as error:  # a setting is out of its range
        raise ValueError(f"{_WHO}: {folder / _CONFIG}: {error}") from error


def _write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _check_config(world: World) -> WorldConfig:
    """Return the configuration, after checking it against the arrays of the world."""
    config = world.config
    if config is None:
        raise ValueError(
            "save_synthetic_model: wanted a world with its configuration, got config="
            "None; make it with synthetic_world or load_synthetic_model"
        )
    probabilities, _ = firing(config)
    wanted = {
        "firing_probabilities": probabilities,
        "mean_firing_magnitudes": magnitudes(config, "mean_firing_magnitudes"),
        "std_firing_magnitudes": magnitudes(config, "std_firing_magnitudes"),
    }
    for name, values in wanted.items():
        if not np.allclose(getattr(world, name), values, rtol=_RTOL, atol=_ATOL):
            raise ValueError(
                f"save_synthetic_model: {name} are not those of world.config, which is "
                "all that the format has for them"
            )
    return config


def _check_tensors(
    config: WorldConfig, tensors: dict[str, np.ndarray], source: Path
) -> None:
    """Check the shapes of tensors, and the ranges of probabilities and variances.

    Raises:
      ValueError: if they are not.
    """
    # Shapes, as the configuration says.
    num, dim = config.num_features, config.hidden_dim
    wanted = {"feature_vectors": (num, dim), "bias": (dim,)}
    wanted["firing_probabilities"] = (num,)
    if config.correlation is not None:
        wanted["correlation_factor"] = (num, config.correlation.rank)
        wanted["correlation_diag"] = (num,)
    shapes = {name: x.shape for name, x in tensors.items()}
    if shapes != wanted:
        raise ValueError(f"{_WHO}: wanted tensors {wanted} in {source}, got {shapes}")
    # Values: probabilities and variances.
    ranges = {"firing_probabilities": (0.0, 1.0), "correlation_diag": (0.0, np.inf)}
    for name, (low, high) in ranges.items():
        values = tensors.get(name, np.zeros(1))
        if values.min() < low or values.max() > high:
            raise ValueError(
                f"{_WHO}: tensor {name!r} in {source} must be in {low} .. {high}, got "
                f"{values.min()} .. {values.max()}; save it again"
            )


def _config_json(config: WorldConfig) -> dict[str, Any]:
    """Convert a configuration to the JSON values of SAELens."""
    pairs = (*_FIRING.items(), *_MAGNITUDE.items())
    names = {kind: name for name, kind in pairs}

    def plain(value: Any) -> Any:
        if not hasattr(value, "_asdict"):
            return value
        fields = {k: plain(v) for k, v in value._asdict().items()}
        return fields | (
            {"generator_name": names[type(value)]} if type(value) in names else {}
        )

    return plain(config) | {"dtype": "float32"}


def _parse_config(settings: dict[str, Any], source: Path) -> WorldConfig:
    """Build a configuration from the JSON values of SAELens."""
    settings = {k: v for k, v in settings.items() if k != "dtype"}
    # Replace the objects in the file by records.
    settings["firing_probability"] = _parse_generator(
        field(settings, "firing_probability", dict, source, _WHO), _FIRING, source
    )
    for name in ("std_firing_magnitudes", "mean_firing_magnitudes"):
        if isinstance(settings.get(name), dict):
            settings[name] = _parse_generator(settings[name], _MAGNITUDE, source)
    parts = {
        "hierarchy": HierarchyConfig,
        "orthogonalization": OrthogonalizationConfig,
        "correlation": CorrelationConfig,
    }
    for name, kind in parts.items():
        fields = field(settings, name, dict, source, _WHO, default=None)
        settings[name] = None if fields is None else _build_record(kind, fields, source)
    if isinstance(settings.get("bias"), bool):
        settings["bias"] = float(settings["bias"])  # true is a length of 1
    return _build_record(WorldConfig, settings, source)


def _parse_generator(settings: dict[str, Any], kinds: dict[str, Any], source: Path):
    """Build the record of a distribution, by the name of its generator."""
    fields = dict(settings)
    name = fields.pop("generator_name", None)
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(
            f"{_WHO}: generator {reprlib.repr(name)} is not known here; known are "
            f"{', '.join(kinds)}, another one is in {source}"
        )
    return _build_record(kinds[name], fields, source)


def _build_record(kind: Any, fields: dict[str, Any], source: Path) -> Any:
    """Build a record, or raise a ValueError that names the field that does not fit."""
    check_keys(fields, kind._fields, source, f"{_WHO}: {kind.__name__}")
    missing = [n for n in kind._fields if n not in {**kind._field_defaults, **fields}]
    # What is missing is looked up too, for the error.
    names = [*fields, *missing]
    return kind(**{name: _check_value(kind, name, fields, source) for name in names})


def _check_value(kind: Any, name: str, fields: dict[str, Any], source: Path) -> Any:
    """Check the type of a value against the annotation of a record's field."""
    value, annotation = fields.get(name), kind.__annotations__[name]
    if hasattr(value, "_asdict"):  # a record that was built before
        return value
    if name == "branching_factor" and isinstance(value, list):
        bounds = list_field(fields, name, int, source, _WHO, low=1)
        if len(bounds) == len(("least", "most")):
            return tuple(bounds)
    # The first type of a union that JSON has, an object being the other.
    types = get_args(annotation) or (annotation,)
    optional = {"default": None} if type(None) in types else {}
    scalar = next((t for t in (bool, int, float) if t in types), dict)
    low, high = _RANGES.get(name, (None, None))
    return field(fields, name, scalar, source, _WHO, low=low, high=high, **optional)
