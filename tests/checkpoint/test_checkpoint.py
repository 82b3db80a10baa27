import errno
import json
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import run_python

from toyfeat.checkpoint import (
    DamagedFileError,
    checkpoints,
    load_tree,
    newest_checkpoint,
    save_checkpoint,
    save_tree,
)
from toyfeat.types import Basis, Diagnostics, Moments


def bits(tree):
    """Every leaf as dtype, shape and bytes."""

    def of(x):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return str(x.dtype), x.shape, np.asarray(jax.random.key_data(x)).tobytes()
        return str(np.asarray(x).dtype), np.shape(x), np.asarray(x).tobytes()

    return jax.tree.map(of, tree), jax.tree.structure(tree)


def a_state():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros((), jnp.bfloat16)}
    return {
        "params": params,
        "opt": optax.adam(1e-3).init(params),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "count": jnp.int32(-5),
        "on": jnp.array([True, False]),
        "empty": jnp.zeros((0, 4), jnp.uint8),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]),
        "small": jnp.arange(3, dtype=jnp.float8_e4m3fn),
        "wide": np.arange(3.0),
        "swapped": np.arange(3, dtype=">i4"),
        "none": None,
        "list": [jnp.ones(1), (np.float64(2.5), 3, 0.5, True)],
    }


@pytest.mark.slow_cases
@pytest.mark.parametrize("abstract", [False, True])
def test_there_and_back_bit_by_bit(tmp_path, abstract):
    state = a_state() | {"swapped": np.arange(3, dtype="i4")}
    save_tree(tmp_path / "new" / "folder" / "state.npz", a_state())
    like = state
    if abstract:
        shapes = jax.eval_shape(lambda: (state["params"], state["keys"]))
        like = state | {"params": shapes[0], "keys": shapes[1]}
    again = load_tree(tmp_path / "new" / "folder" / "state.npz", like)
    assert bits(again) == bits(state)
    kinds = [[type(x) for x in jax.tree.leaves(tree)] for tree in (again, state)]
    assert kinds[0] == kinds[1]
    assert os.listdir(tmp_path / "new" / "folder") == ["state.npz"]


def test_trees_of_the_library_and_a_lone_array(tmp_path):
    key = jax.random.key(0)
    basis = Basis(
        *(jax.random.normal(key, s) for s in [(4,), (4, 2), (2, 4), (2,)]),
        Diagnostics(jnp.int32(2), jnp.ones(()), jnp.zeros(()), jnp.zeros(())),
    )
    stats = Moments(jnp.ones(()), jnp.ones(4), np.eye(4))
    for tree in (basis, stats, jnp.arange(3), 2.5):
        save_tree(tmp_path / "tree.npz", tree)
        again = load_tree(tmp_path / "tree.npz", tree)
        assert bits(again) == bits(tree)
        assert type(again) is type(tree)


def test_numpy_alone_can_open_a_file(tmp_path):
    save_tree(tmp_path / "t.npz", {"a": {"b": jnp.arange(3)}, "c": [jnp.ones(2)]})
    with np.load(tmp_path / "t.npz") as file:
        np.testing.assert_array_equal(file["a/b"], [0, 1, 2])
        np.testing.assert_array_equal(file["c/0"], [1, 1])


def test_names_that_would_collide(tmp_path):
    tree = {"a/b": jnp.zeros(1), "a": {"b": jnp.ones(1)}, "manifest.json": jnp.ones(3)}
    save_tree(tmp_path / "t.npz", tree)
    assert bits(load_tree(tmp_path / "t.npz", tree)) == bits(tree)


def test_a_number_of_python_and_a_scalar_array_stand_for_each_other(tmp_path):
    save_tree(tmp_path / "t.npz", {"a": 1.0, "b": jnp.int32(3)})
    again = load_tree(tmp_path / "t.npz", {"a": jnp.zeros(()), "b": 0})
    assert again["a"].dtype == jnp.float32
    assert (float(again["a"]), again["b"], type(again["b"])) == (1.0, 3, int)
    with pytest.raises(ValueError, match=r"\['a'\] is float64\[\] in the file"):
        load_tree(tmp_path / "t.npz", {"a": jnp.int32(0), "b": 0})
    with pytest.raises(
        ValueError, match=r"\['a'\] is float64\[\].*wanted key<fry>\[\]"
    ):
        load_tree(tmp_path / "t.npz", {"a": jax.random.key(0), "b": 0})


def test_sharding_is_taken_from_like(tmp_path):
    device = jax.devices()[0]
    save_tree(tmp_path / "t.npz", [jnp.ones(4)])
    like = [jax.device_put(jnp.zeros(4), device)]
    assert load_tree(tmp_path / "t.npz", like)[0].committed
    assert not load_tree(tmp_path / "t.npz", [jnp.zeros(4)])[0].committed


@pytest.mark.parametrize(
    ("like", "match"),
    [
        (
            {"w": jnp.zeros((3, 2)), "k": "key"},
            r"\['w'\] is float32\[2,3\] in .*\[3,2\]",
        ),
        ({"w": jnp.zeros((2, 3), jnp.int32), "k": "key"}, r"wanted int32\[2,3\]"),
        (
            {"v": jnp.zeros((2, 3)), "k": "key"},
            r"\['v'\] is not in .*\['w'\] is in the",
        ),
        ({"w": jnp.zeros((2, 3))}, r"\['k'\] is in the file only"),
        ({"w": jnp.zeros((2, 3)), "k": jnp.zeros(())}, r"\['k'\] is key<fry>\[\] in"),
        ({"w": jnp.zeros((2, 3)), "k": "rbg"}, r"wanted key<rbg>\[\]"),
        ([jnp.zeros((2, 3))], r"\[0\] is not in the file"),
    ],
)
def test_another_tree_is_named_leaf_by_leaf(tmp_path, like, match):
    keys = {"key": jax.random.key(0), "rbg": jax.random.key(0, impl="rbg")}
    if isinstance(like, dict):
        like = {n: keys[x] if isinstance(x, str) else x for n, x in like.items()}
    save_tree(tmp_path / "t.npz", {"w": jnp.ones((2, 3)), "k": keys["key"]})
    with pytest.raises(ValueError, match=match):
        load_tree(tmp_path / "t.npz", like)


def test_what_is_no_array_is_named(tmp_path):
    for leaf in ("text", object(), np.array(["text"]), np.array([object()])):
        with pytest.raises(TypeError, match=r"save_tree: \['a'\]\[1\] (is|has) "):
            save_tree(tmp_path / "t.npz", {"a": [1, leaf]})
    with pytest.raises(FileNotFoundError, match=r"load_tree: there is no .*t\.npz"):
        load_tree(tmp_path / "t.npz", {})
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_later_format_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as file:
        file.writestr("manifest.json", json.dumps({"format": 99, "leaves": []}))
    with pytest.raises(DamagedFileError, match="format 99 is not known here"):
        load_tree(tmp_path / "t.npz", {})


SMALL = {"w": np.arange(5.0), "b": np.ones(2, jnp.bfloat16)}


def test_any_flipped_byte_and_any_cut_is_harmless_or_reported(tmp_path):
    path = tmp_path / "t.npz"
    save_tree(path, SMALL)
    good, wanted = path.read_bytes(), bits(SMALL)
    reported = 0
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= (0x01, 0x10, 0x80)[at % 3]
        path.write_bytes(bad)
        try:
            assert bits(load_tree(path, SMALL)) == wanted, at
        except DamagedFileError:
            reported += 1
    assert reported > len(good) / 2
    for length in range(0, len(good), 9):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedFileError, match="is damaged"):
            load_tree(path, SMALL)


def test_values_that_were_exchanged_with_a_right_crc_are_reported(tmp_path):
    save_tree(tmp_path / "t.npz", {"w": jnp.arange(5.0)})
    with zipfile.ZipFile(tmp_path / "t.npz") as old:
        parts = {name: old.read(name) for name in old.namelist()}
    parts["w.npy"] = parts["w.npy"][:-4] + np.float32(9).tobytes()
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as new:
        for name, data in parts.items():
            new.writestr(name, data)
    with pytest.raises(DamagedFileError, match=r"\['w'\] does not have the SHA-256"):
        load_tree(tmp_path / "t.npz", {"w": jnp.zeros(5)})


def state_at(step):
    return {"w": jnp.full(50, float(step)), "step": jnp.int32(step)}


def three(folder):
    for step in (10, 20, 30):
        save_checkpoint(folder, step, state_at(step), {"step": step}, keep=3)
    return state_at(0)


def test_the_newest_comes_back_and_old_ones_go(tmp_path):
    assert newest_checkpoint(tmp_path / "none", state_at(0)) is None
    for step in (5, 10, 20, 100_000_000_000):
        save_checkpoint(tmp_path, step, state_at(0), {"seen": [step]}, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [20, 100_000_000_000]
    found = newest_checkpoint(tmp_path, state_at(0))
    assert found is not None
    assert (found.step, found.about) == (100_000_000_000, {"seen": [100_000_000_000]})


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_one_is_reported_and_the_one_before_is_used(tmp_path, damage):
    like = three(tmp_path)
    path = checkpoints(tmp_path)[-1][1]
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[data.index(np.float32(30).tobytes())] ^= 4
    path.write_bytes(
        {"cut": data[:-100], "empty": b"", "gone": b"x" * 99}.get(damage, data)
    )
    with pytest.warns(
        UserWarning, match=r"step_00000030\.npz cannot be used .* step 20"
    ):
        found = newest_checkpoint(tmp_path, like)
    assert bits(found.state) == bits(state_at(20))
    assert newest_checkpoint(tmp_path, like).step == 20  # reported once
    assert (tmp_path / "step_00000030.npz.damaged").exists()
    save_checkpoint(tmp_path, 30, state_at(30), {}, keep=3)
    assert newest_checkpoint(tmp_path, like).step == 30


def test_each_file_in_turn(tmp_path):
    like = three(tmp_path)
    whole = {path: path.read_bytes() for _, path in checkpoints(tmp_path)}
    for victim in whole:
        for path, data in whole.items():
            middle = len(data) // 4
            bad = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
            path.write_bytes(bad if path == victim else data)
        if victim.name == "step_00000030.npz":
            with pytest.warns(UserWarning, match="cannot be used"):
                assert newest_checkpoint(tmp_path, like).step == 20
        else:
            found = newest_checkpoint(tmp_path, like)
            assert bits(found.state) == bits(state_at(30))


def test_none_that_is_whole_is_an_error_as_often_as_it_is_asked(tmp_path):
    like = three(tmp_path)
    for _, path in checkpoints(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(DamagedFileError, match=r"none of the 3 .* move the folder"):
            newest_checkpoint(tmp_path, like)
    assert len(checkpoints(tmp_path)) == 3


def test_another_tree_is_no_reason_to_go_back(tmp_path):
    three(tmp_path)
    with pytest.raises(
        ValueError, match=r"\['w'\] is float32\[50\].*choose another dir"
    ):
        newest_checkpoint(tmp_path, {"w": jnp.zeros(4), "step": jnp.int32(0)})


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "write_array"])
def test_a_full_disk_leaves_the_last_one_whole(tmp_path, monkeypatch, where):
    like = three(tmp_path)
    before = sorted(os.listdir(tmp_path))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = np.lib.format if where == "write_array" else os
    monkeypatch.setattr(target, where.split(".")[-1], full)
    with pytest.raises(
        OSError, match=r"could not write .*00000040.*No space.*Make room"
    ) as e:
        save_checkpoint(tmp_path, 40, state_at(40), {}, keep=2)
    assert e.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == before
    assert newest_checkpoint(tmp_path, like).step == 30


LIMITED = """
import errno, os, resource, signal, sys
import numpy as np
from pathlib import Path
from toyfeat.checkpoint import checkpoints, newest_checkpoint, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
state = {"w": np.arange(1000.0)}
save_checkpoint(folder, 1, state, {}, keep=2)
size = (folder / "step_00000001.npz").stat().st_size
for limit in (0, 10, 5000, 8200, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(folder, 2, state, {}, keep=2)
        raise SystemExit(f"written in spite of {limit}")
    except OSError as error:
        assert error.errno == errno.EFBIG and "File too large" in str(error), error
    assert os.listdir(folder) == ["step_00000001.npz"], os.listdir(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
save_checkpoint(folder, 2, state, {}, keep=2)
assert newest_checkpoint(folder, state).step == 2
"""


@pytest.mark.slow
def test_a_real_limit_of_size(tmp_path):
    done = run_python("-W", "error", "-c", LIMITED, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_halves_of_a_killed_process_are_neither_read_nor_kept(tmp_path):
    like = three(tmp_path)
    whole = (tmp_path / "step_00000030.npz").read_bytes()
    (tmp_path / ".step_00000050.npz.draft").write_bytes(whole[:100])
    assert newest_checkpoint(tmp_path, like).step == 30
    save_checkpoint(tmp_path, 50, state_at(50), {}, keep=1)
    assert os.listdir(tmp_path) == ["step_00000050.npz"]


@pytest.mark.parametrize(
    ("saved", "dtype"),
    [
        (3_000_000_000, jnp.int32),
        (2**40 + 1, jnp.int32),
        (70_000, np.int16),
        (-1, np.uint8),
        (2**24 + 1.0, jnp.float32),
        (1e300, jnp.float32),
        (-1e6, np.float16),
        (1e-60, jnp.float32),
        (1e-300 + 1e300j, jnp.complex64),
    ],
)
def test_a_number_that_the_dtype_does_not_hold_is_refused(tmp_path, saved, dtype):
    save_tree(tmp_path / "t.npz", {"n": saved})
    for like in (np.zeros((), dtype), jnp.zeros((), dtype)):
        with pytest.raises(ValueError, match=r"^load_tree: .*\['n'\] is .* not hold; "):
            load_tree(tmp_path / "t.npz", {"n": like})
    again = load_tree(tmp_path / "t.npz", {"n": type(saved)(0)})["n"]
    assert (again, type(again)) == (saved, type(saved))


@pytest.mark.parametrize(
    ("saved", "dtype"),
    [
        (5, jnp.int32),
        (255, np.uint8),
        (0.1, jnp.float32),
        (1e-3, np.float16),
        (np.inf, jnp.float32),
        (np.nan, jnp.float32),
        (2.0**100, jnp.bfloat16),
        (1 + 0.1j, jnp.complex64),
        (True, jnp.bool_),
    ],
)
def test_a_number_that_the_dtype_holds_is_the_nearest(tmp_path, saved, dtype):
    save_tree(tmp_path / "t.npz", {"n": saved})
    again = load_tree(tmp_path / "t.npz", {"n": jnp.zeros((), dtype)})["n"]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(saved).astype(dtype))


@pytest.mark.parametrize("number", [2**70, -(2**63) - 1])
def test_an_int_of_more_than_64_bits_is_refused(tmp_path, number):
    with pytest.raises(ValueError, match=r"^save_tree: \['n'\] .* 64 bits, got .*; sa"):
        save_tree(tmp_path / "t.npz", {"n": number})
    save_tree(tmp_path / "t.npz", {"n": 2**64 - 1})
    assert load_tree(tmp_path / "t.npz", {"n": 0})["n"] == 2**64 - 1


def test_foreign_byte_orders_are_saved_and_loaded_by_value(tmp_path):
    save_tree(tmp_path / "t.npz", {"w": np.arange(3, dtype=">f4")})
    again = load_tree(tmp_path / "t.npz", {"w": np.zeros(3, ">f4")})["w"]
    assert again.dtype == np.dtype(">f4")
    for w in (again, load_tree(tmp_path / "t.npz", {"w": jnp.zeros(3)})["w"]):
        np.testing.assert_array_equal(np.asarray(w), [0, 1, 2])


def test_files_of_others_are_neither_deleted_nor_overwritten(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, 1, state_at(1), {"start": 1}, keep=1)
    others = {"step_1.npz", ".step_a.half", "step_00000002.npz", "notes.tmp"}
    for name in others:
        (folder / name).write_text("mine")
    (folder / ".step_00000005.npz.draft").symlink_to(victim)
    (folder / "step_00000002.npz.damaged").write_text("mine")
    for step in (4, 5):
        save_checkpoint(folder, step, state_at(step), {"start": 2}, keep=1)
    assert newest_checkpoint(folder, state_at(0)).step == 5
    names = {"step_00000001.npz", "step_00000005.npz", "step_00000002.npz.damaged"}
    assert set(os.listdir(folder)) == others | names
    assert victim.read_text() == "mine"
    assert all((folder / name).read_text() == "mine" for name in others)


def test_a_run_keeps_its_own_checkpoints_beside_those_of_others(tmp_path):
    for step, start in ((10, 1), (15, 2), (20, 1), (25, 2), (35, 2)):
        save_checkpoint(tmp_path, step, state_at(step), {"start": start}, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 20, 25, 35]
