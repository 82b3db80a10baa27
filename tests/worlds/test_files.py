import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from toyfeat import worlds
from toyfeat.worlds.hierarchy import hierarchy

# benchmarks/peers/synthetic_golden.py
GOLDEN = Path(__file__).parents[1] / "golden" / "synthetic"
NAMES = ("paths", "ragged", "plain")
N = 100_000
FILES = ("synthetic_model_config.json", "hierarchy.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_statistics_of_saelens_own(name):
    world = worlds.load_synthetic_model(GOLDEN / name)
    peer = np.load(GOLDEN / name / "samples.npz")
    assert (world.hierarchy is not None) == (name != "plain")
    if world.hierarchy is not None:
        assert (world.hierarchy.trees is not None) == (name == "paths")
    for which in ("mean_firing_magnitudes", "std_firing_magnitudes"):
        np.testing.assert_allclose(getattr(world, which), peer[which], atol=1e-6)
    run = jax.jit(worlds.world_codes, static_argnums=2)
    codes = np.asarray(run(jax.random.key(0), world, N), np.float64)
    fires = (codes > 0).astype(np.float64)
    powers = np.stack([fires, codes, codes**2])
    noise = powers.var(1) / N + peer["var"] / peer["num"]
    score = (powers.mean(1) - peer["mean"]) / np.sqrt(noise + 1e-14)
    assert np.abs(score).max() < 5.0
    assert np.sqrt(np.mean(score**2)) < 1.4
    p = peer["together"].astype(np.float64)
    upper = np.triu_indices(len(p), 1)
    noise = (p * (1 - p) * (1 / N + 1 / peer["num"]))[upper]
    away = (fires.T @ fires / N - p)[upper]
    assert (away[noise == 0] == 0).all()  # siblings that exclude each other
    score = away[noise > 0] / np.sqrt(noise[noise > 0])
    assert np.abs(score).max() < 5.5
    assert np.sqrt(np.mean(score**2)) < 1.3


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_saelens_wrote(name, tmp_path):
    from safetensors.numpy import load_file

    worlds.save_synthetic_model(tmp_path, worlds.load_synthetic_model(GOLDEN / name))
    for file in FILES:
        assert (tmp_path / file).exists() == (GOLDEN / name / file).exists()
        if (tmp_path / file).exists():
            ours, theirs = (
                json.loads((folder / file).read_text())
                for folder in (tmp_path, GOLDEN / name)
            )
            assert ours == theirs
    ours, theirs = (
        load_file(folder / "synthetic_model.safetensors")
        for folder in (tmp_path, GOLDEN / name)
    )
    assert set(ours) == set(theirs)
    for tensor in ours:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor])


def test_there_and_back(tmp_path):
    world = worlds.synthetic_world(
        jax.random.key(0),
        30,
        4,
        firing_probability=worlds.RandomFiring(),
        hierarchy=worlds.HierarchyConfig(2, (2, 3), 2, 0.7),
        correlation=worlds.CorrelationConfig(3),
        std_firing_magnitudes=worlds.FoldedNormalMagnitude(0.2, 0.3, 0.1, 0.4),
    )
    worlds.save_synthetic_model(tmp_path, world)
    again = worlds.load_synthetic_model(tmp_path)
    assert again.config == world.config
    jax.tree.map(np.testing.assert_array_equal, again, world)
    plain = worlds.synthetic_world(jax.random.key(0), 30, 4)
    worlds.save_synthetic_model(tmp_path, plain)  # no trees are left behind
    assert worlds.load_synthetic_model(tmp_path).hierarchy is None


@pytest.mark.slow
def test_siblings_of_several_kinds_survive(tmp_path):
    parents = np.asarray([-1, 0, 0, 0, 0, 3, 3, -1, -1, 7])
    groups = np.asarray([-1, 0, 0, -1, -1, -1, -1, 1, 1, -1])
    scaled = np.asarray([0, 1, 1, 1, 0, 1, 1, 0, 0, 0], bool)
    trees = hierarchy(parents, groups, scaled)
    world = worlds.synthetic_world(jax.random.key(0), 10, 4).replace(hierarchy=trees)
    worlds.save_synthetic_model(tmp_path, world)
    again = worlds.load_synthetic_model(tmp_path).hierarchy
    np.testing.assert_array_equal(again.parents, parents)
    np.testing.assert_array_equal(again.scaled, scaled)
    same = (groups[:, None] == groups) & (groups >= 0)
    found = np.asarray(again.groups)
    np.testing.assert_array_equal((found[:, None] == found) & (found >= 0), same)
    codes = np.asarray(worlds.world_codes(jax.random.key(0), world, 3000)) > 0
    assert not (codes[:, 7] & codes[:, 8]).any()
    assert not (codes[:, 1] & codes[:, 2]).any()
    assert (codes[:, 9] <= codes[:, 7]).all()


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*config\.json"):
        worlds.load_synthetic_model(tmp_path)
    world = worlds.load_synthetic_model(GOLDEN / "paths")
    with pytest.raises(ValueError, match="got config=None"):
        worlds.save_synthetic_model(tmp_path, world.replace(config=None))
    other = world.replace(mean_firing_magnitudes=2 * world.mean_firing_magnitudes)
    with pytest.raises(ValueError, match="mean_firing_magnitudes are not those"):
        worlds.save_synthetic_model(tmp_path, other)
    other = world.replace(firing_probabilities=world.firing_probabilities / 2)
    with pytest.raises(ValueError, match="firing_probabilities are not those"):
        worlds.save_synthetic_model(tmp_path, other)
    worlds.save_synthetic_model(tmp_path, world)
    path = tmp_path / FILES[0]
    good = json.loads(path.read_text())
    for change, match in (
        ({"seed": None}, "drawn and needs a seed"),
        ({"hidden_dim": 13}, r"wanted tensors .*\(32, 13\).* got .*\(32, 12\)"),
        ({"firing_probability": {"generator_name": "mine"}}, "'mine' is not known"),
        ({"colour": 1}, r"WorldConfig: 'colour' in .*config\.json is not known"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=match):
            worlds.load_synthetic_model(tmp_path)
    path.write_text(json.dumps(good))
    node = {"feature_index": 40, "children": []}
    (tmp_path / FILES[1]).write_text(json.dumps({"roots": [node]}))
    with pytest.raises(ValueError, match=r"'feature_index' in .* at most 31, got 40"):
        worlds.load_synthetic_model(tmp_path)


@pytest.fixture
def changed(tmp_path):
    """A copy of a world of SAELens that may be changed."""
    shutil.copytree(GOLDEN / "ragged", tmp_path, dirs_exist_ok=True)
    return tmp_path


def write_changed(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 200_000, b"[]", b"null"])
def test_a_broken_file_is_refused_by_name(changed, file, data):
    (changed / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"^load_synthetic_model: .*{file}"):
        worlds.load_synthetic_model(changed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_features", "32"),
        ("num_features", True),
        ("num_features", 10**30),
        ("num_features", ...),
        ("hidden_dim", 0),
        ("firing_probability", None),
        ("firing_probability", ...),
        ("firing_probability", {"generator_name": "zipfian", "exponent": "1"}),
        ("firing_probability", {"generator_name": "zipfian", "max_prob": np.nan}),
        ("firing_probability", {"generator_name": "zipfian", "mx_prob": 0.1}),
        ("firing_probability", {"generator_name": []}),
        ("firing_probability", {"generator_name": "zipfian", "max_prob": 2.0}),
        ("std_firing_magnitudes", -1.0),
        ("std_firing_magnitudes", {"generator_name": "folded_normal", "std": -1.0}),
        ("std_firing_magnitudes", None),
        ("std_firing_magnitudes", {"generator_name": "linear", "start": 1.0}),
        ("mean_firing_magnitudes", "x"),
        ("bias", "x"),
        ("bias", np.inf),
        ("seed", 1.5),
        ("hierarchy", [1]),
        ("hierarchy", {"max_depth": "2"}),
        ("hierarchy", {"branching_factor": [1, 2, 3]}),
        ("hierarchy", {"scale_children_by_parent": "false"}),
        ("correlation", {"rank": 1.5}),
        ("biass", 1.0),
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(changed, key, value):
    def change(values):
        values.pop(key, None)
        if value is not ...:
            values[key] = value

    write_changed(changed / FILES[0], change)
    with pytest.raises(ValueError, match=rf"^load_synthetic_model: .*{FILES[0]}"):
        worlds.load_synthetic_model(changed)


@pytest.mark.parametrize(
    "node",
    [
        1,
        {"feature_index": 1.5},
        {"feature_index": True},
        {"feature_index": -1},
        {"feature_index": 0, "children": {}},
        {"feature_index": 0, "children": [None]},
        {"feature_index": 0, "children": [{"feature_index": 0}]},
        {"feature_index": 0, "mutually_exclusive_children": "false"},
        {"feature_index": 0, "scale_children_by_parent": 1},
        {"feature_index": 0, "mutually_exclusive_childern": False},
    ],
)
def test_a_node_of_another_type_is_refused_by_name(changed, node):
    (changed / FILES[1]).write_text(json.dumps({"roots": [node]}))
    with pytest.raises(ValueError, match=rf"^load_synthetic_model: .*{FILES[1]}"):
        worlds.load_synthetic_model(changed)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.5])
def test_tensors_that_make_no_sense_are_refused_by_name(changed, value):
    from safetensors.numpy import load_file, save_file

    path = changed / "synthetic_model.safetensors"
    good = load_file(path)
    is_finite = np.isfinite(value)
    for name in ("firing_probabilities",) if is_finite else good:
        tensors = {n: np.array(x) for n, x in good.items()}
        tensors[name].flat[1] = value
        save_file(tensors, path)
        match = rf"^load_synthetic_model: tensor '{name}' in .*\.safetensors must be"
        with pytest.raises(ValueError, match=match):
            worlds.load_synthetic_model(changed)


def test_without_safetensors_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install \"toyfeat\[sae\]\""):
        worlds.load_synthetic_model(GOLDEN / "plain")
