"""A directory of a run that had other settings or batches, or is in use."""

import functools
import json
import re
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_trainer import a_batch, bits, tiny

import toyfeat as ft
from toyfeat.train.fit import fit
from toyfeat.train.run import changed_settings, describe_trainer

D, M = 6, 12
X = np.random.default_rng(0).standard_normal((64, D)).astype(np.float32)
SAE = ft.dictionaries.standard(D, M)
SIZES = {"chunk": 5, "checkpoint_every": 1, "progress": False, "check_data": False}


@functools.cache  # the same trainer is compiled once
def default():
    return ft.trainer(SAE, ft.losses.default(SAE))


def make(**changed):
    if not changed:
        return default()
    return ft.trainer(
        **{"dictionary": SAE, "objective": ft.losses.default(SAE), **changed}
    )


def batches(rows=X, batch=16, seed=0):
    return ft.data.array_batches(
        ft.Taps(rows, None, np.ones(len(rows), np.float32)), batch=batch, seed=seed
    )


def train(folder, trainer, data, steps, **options):
    state = trainer.init(jax.random.key(1))
    return fit(trainer, state, data, steps=steps, directory=folder, **SIZES, **options)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "run"
    train(folder, make(), batches(), 10)
    return folder


GATHERED = ft.dictionaries.topk(D, M, 3)
PLAIN_TOPK = ft.dictionaries.topk(D, M, 3, rescale_acts_by_decoder_norm=False)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("before", "now", "name"),
    [
        ({}, {"normalize": False}, "normalize was True and is False"),
        ({}, {"center": False}, "center was True"),
        ({}, {"dead_after": 3}, "dead_after was 1000 and is 3"),
        ({"revive": 10}, {"revive": 7}, "revive was 10 and is 7"),
        ({}, {"threshold_rate": 0.5}, "threshold_rate was 0.01"),
        ({}, {"schedule": lambda step: 0.1}, "values of the schedule was None"),
        (
            {"schedule": lambda step: 0.1},
            {"schedule": lambda step: jnp.where(step < 900, 0.1, 0.2)},
            r"values of the schedule .* was 0\.1.* and is 0\.2",
        ),
        (
            {"optimizer": optax.adam(1e-3)},
            {"optimizer": optax.adam(1e-2)},
            "values of the optimizer",
        ),
        (
            {"optimizer": optax.adam(1e-3)},
            {"optimizer": optax.adam(1e-3, b1=0.5)},
            "values of the optimizer",
        ),
        (
            {"controller": ft.controllers.target_l0(3.0)},
            {"controller": ft.controllers.target_l0(3.0, integral=0.02)},
            "values of the controller",
        ),
        (
            {"controller": ft.controllers.target_l0(3.0)},
            {"controller": ft.controllers.target_fvu(3.0)},
            r"controller was \['sparsity', 'l0'\]",
        ),
        (
            {"dictionary": GATHERED},
            {"dictionary": PLAIN_TOPK},
            "rescale_acts_by_decoder_norm was True and is False",
        ),
    ],
)
def test_each_setting_that_differs_is_named(before, now, name):
    described = describe_trainer(make(**before))
    assert changed_settings(described, describe_trainer(make(**before))) == []
    changes = changed_settings(described, describe_trainer(make(**(before | now))))
    assert any(re.search(name, change) for change in changes), changes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"batch": 8}, r"that of step 10 has activations \[8, 6\], not \[16, 6\]"),
        ({"seed": 3}, "an example that begins"),
        ({"rows": X[::-1].copy() + 1}, "an example that begins"),
    ],
)
def test_other_batches_are_an_error_that_an_option_overrides(
    data, match, half, tmp_path
):
    folder = shutil.copytree(half, tmp_path / "run")
    with pytest.raises(ValueError, match=rf"^fit: .* other batches: .*{match}.*; cho"):
        train(folder, make(), batches(**data), 20)
    after = train(folder, make(), batches(**data), 20, allow_changes=True)
    assert int(after.step) == 20
    # From there on they are the run's own.
    train(folder, make(), batches(**data), 25)


def test_other_settings_are_an_error_that_an_option_overrides(half, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    with pytest.raises(ValueError, match=r"^fit: .* normalize was True.*; choose "):
        train(folder, make(normalize=False), batches(), 20)
    train(folder, make(normalize=False), batches(), 20, allow_changes=True)
    with pytest.raises(ValueError, match="normalize was False and is True"):
        train(folder, make(), batches(), 25)


def test_the_same_settings_go_on_with_the_same_bits(half, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    again = train(folder, make(), batches(), 20)
    assert bits(again.params) == bits(train(None, make(), batches(), 20).params)


def test_a_checkpoint_of_before_has_no_settings_and_is_taken(half, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    for path in (folder / "checkpoint").iterdir():
        members = zipfile.ZipFile(path)
        contents = {name: members.read(name) for name in members.namelist()}
        manifest = json.loads(contents["manifest.json"])
        del manifest["about"]["settings"], manifest["about"]["next_batch"]
        contents["manifest.json"] = json.dumps(manifest).encode()
        with zipfile.ZipFile(path, "w") as file:
            for name, content in contents.items():
                file.writestr(name, content)
    assert int(train(folder, make(dead_after=9), batches(seed=1), 15).step) == 15


def test_batches_of_the_host_are_compared_where_the_run_was_cut(tmp_path):
    tiny_trainer = tiny()
    start = tiny_trainer.init(jax.random.key(0))

    def stop(step, metrics):
        if step == 10:
            raise KeyboardInterrupt

    arguments = {"steps": 20, "directory": tmp_path, **SIZES}
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_trainer, start, a_batch, on_chunk=stop, **arguments)
    with pytest.raises(ValueError, match=r"other batches: that of step 10 has an exam"):
        fit(tiny_trainer, start, lambda step: a_batch(step + 1), **arguments)
    assert int(fit(tiny_trainer, start, a_batch, **arguments).step) == 20


def test_a_directory_is_used_by_one_run_at_a_time(tmp_path):
    tiny_trainer = tiny()
    start = tiny_trainer.init(jax.random.key(0))
    arguments = {"steps": 5, "directory": tmp_path, **SIZES}

    def inner(step, metrics):
        with pytest.raises(BlockingIOError, match=r"^fit: only one .* may use .*; w"):
            fit(tiny_trainer, start, a_batch, **arguments)

    fit(tiny_trainer, start, a_batch, on_chunk=inner, **arguments)
    fit(tiny_trainer, start, a_batch, **arguments)


def test_a_state_of_another_dictionary_is_named():
    other = ft.dictionaries.standard(D, M + 1)
    state = ft.trainer(other, ft.losses.default(other)).init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"^fit: .* W_dec \(12, 6\), got \(13, 6\); "):
        fit(make(), state, batches(), steps=2)


@pytest.mark.parametrize("wrong", [3, True, ["a"]])
def test_a_directory_that_is_no_path_is_refused(wrong, tmp_path):
    start = make().init(jax.random.key(0))
    with pytest.raises(TypeError, match=r"^fit: directory must be a path or None, got"):
        fit(make(), start, batches(), steps=2, directory=wrong)
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/sub"):
        with pytest.raises(ValueError, match=r"^fit: directory must be a folder, got"):
            fit(make(), start, batches(), steps=2, directory=tmp_path / name)


@pytest.mark.parametrize("dtype", [np.complex64, np.int32, bool])
def test_batches_that_are_no_floats_are_refused(dtype):
    taps = ft.Taps(X.astype(dtype), None, np.ones(len(X), np.float32))
    with pytest.raises(TypeError, match=r"^fit: .* real floats, got acts of .*; conv"):
        fit(make(), make().init(jax.random.key(0)), lambda step: taps, steps=2)
