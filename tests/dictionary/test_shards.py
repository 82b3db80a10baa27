"""Dictionaries split over a mesh, in child processes with eight virtual devices.

The oracle of a choice is a stable sort with NumPy, that of training one device; what
is exchanged is read from the compiled programs.
"""

import json
import os
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from processes import run_python

import toyfeat as ft

CHILD = Path(__file__).parent / "shards_child.py"

# Devices for the examples and for the latents; 0 leaves the axis out.
MESHES = [(0, 8), (2, 4), (4, 2), (1, 8)]
ALL = [(*mesh, kind) for kind in ("Auto", "Explicit") for mesh in MESHES]
WITH_ROWS = [*ALL, (8, 0, "Auto"), (8, 0, "Explicit")]
DENSE = 160 * 512 // 8  # codes of a batch that one of eight devices has


@cache
def run_child(task, *meshes):
    """Reports of a task, one for each mesh."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags = f"{flags} --xla_force_host_platform_device_count=8"
    env = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = run_python(CHILD, task, *map(json.dumps, meshes), env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def one_device_mesh(kind="Auto"):
    types = (AxisType[kind],) * 2
    return jax.make_mesh((1, 1), ("data", "latents"), axis_types=types)


@pytest.mark.slow
def test_the_codes_of_all_shards_are_those_of_a_stable_sort():
    for mesh, wrong in zip(WITH_ROWS, run_child("choice", *WITH_ROWS), strict=True):
        assert len(wrong) == 6
        assert not any(wrong.values()), (mesh, wrong)


@pytest.mark.slow
def test_the_cut_of_a_batch_is_that_of_a_sort():
    for mesh, wrong in zip(WITH_ROWS, run_child("cut", *WITH_ROWS), strict=True):
        assert not wrong, (mesh, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["topk", "batchtopk"])
def test_training_on_eight_devices_is_that_on_one(task):
    for mesh, report in zip(ALL, run_child(task, *ALL), strict=True):
        check_training(mesh, report)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "mesh"),
    [
        ("signed", (8, 0, "Auto")),
        ("k above a shard", (1, 8, "Auto")),
        ("matryoshka", (2, 4, "Auto")),
        ("gradient_topk", (2, 4, "Auto")),
        ("paired", (2, 4, "Explicit")),
        ("standard", (2, 4, "Auto")),
    ],
)
def test_other_architectures_train_the_same(task, mesh):
    (report,) = run_child(task, mesh)
    # Where many latents may be active none is dead.
    many = task in ("k above a shard", "standard")
    check_training(mesh, report, with_dead=not many)
    assert report["exchanged"]["largest"] < DENSE


def check_training(mesh, report, with_dead=True):
    for name in ("params", "moments", "metrics", "outputs"):
        assert report[name] <= 1e-5, (mesh, name, report[name])
    assert report["silent"] == 0
    assert (report["dead"] > 0) == with_dead  # the loss of dead latents took part


@pytest.mark.slow
@pytest.mark.parametrize("task", ["topk", "batchtopk"])
def test_no_codes_of_a_batch_leave_their_device(task):
    for mesh, report in zip(ALL, run_child(task, *ALL), strict=True):
        exchanged = report["exchanged"]
        sources = exchanged["sources"]
        assert 0 < exchanged["largest"] < DENSE, (mesh, sources)
        # What is gathered over the latents is the scores of the candidates.
        assert "all-gather" in exchanged["kinds"]


@pytest.mark.slow
def test_a_dictionary_that_only_lies_on_a_mesh_gathers_its_codes():
    (report,) = run_child("plain", (8, 0, "Auto"))
    assert report["largest"] > DENSE


@pytest.mark.slow
def test_what_belongs_to_a_latent_is_on_its_device():
    for report in run_child("topk", *ALL):
        specs = report["specs"]
        assert specs["W_enc"] == [None, "latents"]
        assert specs["moment"] == ["latents", None]
        assert specs["silent"] == ["latents"]


@pytest.mark.slow
def test_fit_and_populations_run_on_a_mesh():
    for report in run_child("fit", (2, 4, "Auto"), (2, 4, "Explicit")):
        assert max(report["one"], report["population"]) <= 1e-5
        assert report["one spec"] == [None, "latents"]
        assert report["population spec"] == [None, None, "latents"]


@pytest.mark.parametrize(
    ("make", "kind"), [("topk", "Auto"), ("batch_topk", "Explicit")]
)
def test_one_device_is_a_mesh_too(make, kind):
    sae = getattr(ft.dictionaries, make)(4, 16, 3)
    with jax.set_mesh(one_device_mesh(kind)):
        split = ft.dictionaries.shard(sae, one_device_mesh(kind))
        params = jax.jit(split.init)(jax.random.key(0))
        acts = jax.random.normal(jax.random.key(1), (6, 4))
        out = jax.jit(split.forward)(params, acts)
    plain = {name: np.asarray(x) for name, x in params.items()}
    expected = jax.jit(sae.forward)(plain, np.asarray(acts))
    np.testing.assert_allclose(out.codes, expected.codes, rtol=1e-6)
    np.testing.assert_allclose(out.recon, expected.recon, rtol=1e-6, atol=1e-7)
    assert out.index is None
    assert out.values.shape == (6, 16)


def test_errors_of_shard_say_what_to_do():
    sae, mesh = ft.dictionaries.topk(4, 16, 2), one_device_mesh()
    wide = jax.sharding.AbstractMesh((2, 3), ("data", "latents"))
    shard = ft.dictionaries.shard
    with pytest.raises(ValueError, match=r"'latents' must divide .* got 16; .* 18 lat"):
        shard(sae, wide)
    with pytest.raises(
        ValueError, match=r"latents must be one of the axes .*'columns'"
    ):
        shard(sae, mesh, latents="columns")
    with pytest.raises(
        ValueError, match=r"data must be one of the axes .*'rows'; pass"
    ):
        shard(sae, mesh, data="rows")
    with pytest.raises(
        ValueError, match=r"two axes of the mesh, .* got 'data' for both"
    ):
        shard(sae, mesh, latents="data")
    with pytest.raises(ValueError, match=r"not split, got one over the mesh .*; pass"):
        shard(shard(sae, mesh), mesh)
    with pytest.raises(
        TypeError, match=r"mesh must be a jax.sharding.Mesh, got 3; jax"
    ):
        shard(sae, 3)
    with pytest.raises(TypeError, match=r"dictionary must be a Dictionary, got None"):
        shard(None, mesh)
    with pytest.raises(ValueError, match=r"topk: k must be .* 16, the latents, got 17"):
        ft.dictionaries.topk(4, 16, 17)
