"""Read and write synthetic worlds in the format of SAELens."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from toyfeat.files.safetensors import library, tensors_of
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
from toyfeat.worlds.hierarchy import Hierarchy, hierarchy
from toyfeat.worlds.world import World, assemble_world, firing

_CONFIG, _WEIGHTS = "synthetic_model_config.json", "synthetic_model.safetensors"
_HIERARCHY = "hierarchy.json"
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
      path: a folder, created if it does not exist; its files are overwritten.
      world: from :func:`synthetic_world` or :func:`load_synthetic_model`.

    Raises:
      ValueError: if the world has no configuration, or was changed after it was made.
      ImportError: without safetensors (``pip install "toyfeat[sae]"``).

    References:
      SAELens 6, ``SyntheticModel.save``.
    """
    save_file = library("save_synthetic_model").save_file
    config = _check_config(world)
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
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / _WEIGHTS)
    _write_json(folder / _CONFIG, _config_json(config))
    (folder / _HIERARCHY).unlink(missing_ok=True)
    if world.hierarchy is not None:
        _write_json(folder / _HIERARCHY, {"roots": _nodes(world.hierarchy)})


def load_synthetic_model(path: str | Path) -> World:
    """Read a world that SAELens or :func:`save_synthetic_model` wrote.

    Magnitudes that SAELens draws from a seed come out as SAELens draws them.

    Args:
      path: the folder.

    Returns:
      :class:`World`, float32.

    Raises:
      FileNotFoundError: if the configuration or the tensors are missing.
      ValueError: if a setting is not known here, magnitudes are to be drawn without a
        seed, or tensors are missing or of other shapes.
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
                f"load_synthetic_model: there is no {folder / name}"
            )
    config = _parse_config(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
    stored = tensors_of(folder / _WEIGHTS, "load_synthetic_model")
    tensors = {name: np.asarray(x, np.float32) for name, x in stored.items()}
    _check_shapes(config, tensors)
    trees = None
    if (folder / _HIERARCHY).exists():
        text = (folder / _HIERARCHY).read_text(encoding="utf-8")
        trees = _parse_nodes(json.loads(text)["roots"], config.num_features)
    shared = None
    if "correlation_factor" in tensors:
        names = "correlation_factor", "correlation_diag"
        shared = jnp.asarray(tensors[names[0]]), jnp.asarray(tensors[names[1]])
    vectors, bias = (jnp.asarray(tensors[k]) for k in ("feature_vectors", "bias"))
    probabilities = tensors["firing_probabilities"]
    return assemble_world(config, vectors, bias, probabilities, shared, trees)


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
        if not np.allclose(getattr(world, name), values, rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"save_synthetic_model: {name} are not those of world.config, which is "
                "all that the format has for them"
            )
    return config


def _check_shapes(config: WorldConfig, tensors: dict[str, np.ndarray]) -> None:
    """Raise a ValueError if tensors do not have the shapes of the configuration."""
    num, dim = config.num_features, config.hidden_dim
    wanted = {"feature_vectors": (num, dim), "bias": (dim,)}
    wanted["firing_probabilities"] = (num,)
    if config.correlation is not None:
        wanted["correlation_factor"] = (num, config.correlation.rank)
        wanted["correlation_diag"] = (num,)
    shapes = {name: x.shape for name, x in tensors.items()}
    if shapes != wanted:
        raise ValueError(f"load_synthetic_model: wanted tensors {wanted}, got {shapes}")


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


def _parse_config(settings: dict[str, Any]) -> WorldConfig:
    """Build a configuration from the JSON values of SAELens."""
    settings = {k: v for k, v in settings.items() if k != "dtype"}
    settings["firing_probability"] = _parse_generator(
        settings["firing_probability"], _FIRING
    )
    for name in ("std_firing_magnitudes", "mean_firing_magnitudes"):
        if isinstance(settings.get(name), dict):
            settings[name] = _parse_generator(settings[name], _MAGNITUDE)
    parts = {
        "hierarchy": HierarchyConfig,
        "orthogonalization": OrthogonalizationConfig,
        "correlation": CorrelationConfig,
    }
    for name, kind in parts.items():
        if settings.get(name) is not None:
            fields = dict(settings[name])
            factor = fields.get("branching_factor")
            if isinstance(factor, list):
                fields["branching_factor"] = tuple(factor)
            settings[name] = _build_record(kind, fields)
    settings["bias"] = float(settings.get("bias", 1.0))  # true is a length of 1
    return _build_record(WorldConfig, settings)


def _parse_generator(settings: dict[str, Any], kinds: dict[str, Any]) -> Any:
    """Build the record of a distribution, by the name of its generator."""
    fields = dict(settings)
    name = fields.pop("generator_name", None)
    if name not in kinds:
        raise ValueError(
            f"load_synthetic_model: generator {name!r} is not known here; known are "
            f"{', '.join(kinds)}"
        )
    return _build_record(kinds[name], fields)


def _build_record(kind: Any, fields: dict[str, Any]) -> Any:
    """Build a record, or raise a ValueError that names unknown fields."""
    unknown = set(fields) - set(kind._fields)
    if unknown:
        raise ValueError(
            f"load_synthetic_model: {kind.__name__} has no {sorted(unknown)}; known "
            f"are {', '.join(kind._fields)}"
        )
    return kind(**fields)


def _nodes(trees: Hierarchy) -> list[dict[str, Any]]:
    """Nest trees as SAELens does; siblings of several kinds get empty nodes."""
    parents, groups, scaled = (np.asarray(x) for x in trees[:3])
    below: dict[int, dict[tuple[int, bool], list[int]]] = {}
    for feature, parent in enumerate(parents):
        if parent >= 0 or groups[feature] >= 0:
            kind = int(groups[feature]), bool(scaled[feature])
            below.setdefault(int(parent), {}).setdefault(kind, []).append(feature)

    def node(feature: int | None, kinds: dict[tuple[int, bool], list[int]]) -> dict:
        flags, children = (-1, False), []
        if len(kinds) == 1:
            ((flags, members),) = kinds.items()
            children = [node(m, below.get(m, {})) for m in members]
        else:
            children = [node(None, {k: v}) for k, v in kinds.items()]
        return {
            "feature_index": feature,
            "mutually_exclusive_children": flags[0] >= 0 and len(children) > 1,
            "scale_children_by_parent": flags[1],
            "feature_id": None,
            "children": children,
        }

    tops = [f for f in below if f >= 0 and parents[f] < 0 and groups[f] < 0]
    roots = [node(top, below[top]) for top in sorted(tops)]
    return roots + [node(None, {k: v}) for k, v in below.get(-1, {}).items()]


def _parse_nodes(roots: list[dict[str, Any]], num: int) -> Hierarchy:
    """Build a hierarchy from nested nodes, which are visited depth first."""
    parents, groups = np.full(num, -1), np.full(num, -1)
    scaled, seen, count = np.zeros(num, bool), set(), 0
    waiting = [(root, -1, False) for root in roots]
    while waiting:
        node, parent, scales = waiting.pop()
        feature, children = node.get("feature_index"), node.get("children", [])
        if feature is not None:
            if feature in seen or not 0 <= feature < num:
                raise ValueError(
                    f"load_synthetic_model: feature_index {feature} appears twice or "
                    f"is not in 0 .. {num - 1}"
                )
            seen.add(feature)
            parents[feature], scaled[feature] = parent, scales and parent >= 0
            parent = feature
        if node.get("mutually_exclusive_children"):
            inside = [c.get("feature_index") for c in children]
            groups[[f for f in inside if f is not None]] = count
            count += 1
        flag = bool(node.get("scale_children_by_parent"))
        waiting += [(child, parent, flag) for child in children]
    return hierarchy(parents, groups, scaled)
