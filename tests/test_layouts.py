"""Layouts that cannot be: named before any work, with what to do."""

import os

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from processes import ROOT, run_python

from toyfeat.meshes import check_devices, place

MESH = AbstractMesh((4, 2), ("data", "latents"))
P = PartitionSpec

CHILD = ROOT / "tests" / "lens" / "layouts_child.py"


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (P("data"), r"4 devices of the axis 'data' must divide axis 0 of \['w'\], "
         "got 6; make it 8, or split another axis"),
        ({"w": P(None, ("data", "latents")), "b": P()},
         r"8 devices of the axes \('data', 'latents'\) must divide axis 1 of \['w'\]"),
        ({"w": P(), "b": P("latents", None)},
         r"layout of \['b'\] must have at most its 1 axes, got .*; leave out"),
        (P("date"), r"\['b'\] must be split over axes of the mesh.*got 'date'; name"),
        ({"w": P()}, "specs must be one PartitionSpec, or a tree.*; name every"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_are_named(specs, message):
    tree = {"b": np.ones(4, np.float32), "w": np.ones((6, 12), np.float32)}
    with pytest.raises(ValueError, match=f"place: .*{message}"):
        place(tree, MESH, specs)


def test_what_is_no_mesh_or_no_layout_is_named():
    with pytest.raises(
        TypeError, match=r"mesh must be a jax.sharding.Mesh, got 8; jax"
    ):
        place(np.ones(8), 8, P())
    with pytest.raises(
        TypeError, match=r"layout of the array must be a Part.*got 'data'"
    ):
        place(np.ones(8), MESH, "data")
    with pytest.raises(TypeError, match=r"mesh must have devices.*got an AbstractMesh"):
        place(np.ones(8), MESH, P("data"))


def test_arrays_of_the_host_are_put_where_they_belong():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    tree = {"w": np.arange(6.0, dtype=np.float32), "key": jax.random.key(1)}
    placed = place(tree, mesh, {"w": P("data"), "key": P()})
    np.testing.assert_array_equal(placed["w"], tree["w"])
    assert placed["w"].sharding.spec == P("data")
    assert jax.random.key_data(placed["key"]).tolist() == [0, 1]
    check_devices("test", (placed, tree, 3))  # what is on no device goes with any


@pytest.mark.slow
def test_arrays_on_different_devices_are_named_before_any_work():
    flags = "--xla_force_host_platform_device_count=8"
    env = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}", "JAX_PLATFORMS": "cpu"}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'lens'}"}
    done = run_python(CHILD, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert said.pop("numbers") == "are the same"
    context = said.pop("explicit")
    assert "explicit axes ('data',) of a mesh must be used in its context" in context
    whos = {"tap": "toyfeat", "lens": "lenses.fit", "batches": "lenses.fit"}
    whos |= {"tuned": "tuned_lens", "fit": "fit", "split": "fit"}
    assert said.keys() == whos.keys()
    for name, who in whos.items():
        assert said[name].startswith(f"{who}: all arrays must lie on the same devices")
        assert "4 devices, [0, 1, 2, 3]" in said[name]
        assert "8 devices, [0, 1, 2" in said[name]
        assert "; put all of them on one mesh" in said[name]


@pytest.mark.slow
def test_a_device_that_is_missing_is_named(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text("model = 'none'\n")
    for platform in ("cuda", "nonsense"):
        env = {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)}
        command = "-m", "toyfeat.cli.main", "train", job
        done = run_python(*command, env=env, timeout=120)
        if done.returncode == 1 and "there is no" in done.stderr:
            pytest.skip("this machine has such a device")
        assert done.returncode == 1
        assert done.stderr.startswith("toyfeat train: processes: wanted a device of")
        assert "got none" in done.stderr
        assert "or set JAX_PLATFORMS=cpu" in done.stderr
        assert len(done.stderr.splitlines()) == 1
