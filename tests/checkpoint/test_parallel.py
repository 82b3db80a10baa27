"""Checkpoints by orbax, in one process; two are in tests/train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.checkpoint import DamagedFileError, checkpoints, newest_checkpoint
from toyfeat.checkpoint.parallel import (
    checksum,
    draft_of,
    read_manifest,
    remove,
    start_write,
)

pytest.importorskip("orbax.checkpoint")
ABOUT = {"start": {"step": 0, "sum": 1}, "hyper": {"a": 0.5}}


def tree():
    key = jax.random.key(0)
    return {
        "w": jax.random.normal(key, (5, 7)),
        "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "step": jnp.int32(3),
        "key": jax.random.split(key, 2),
        "flag": jnp.array([True, False]),
    }


@pytest.fixture
def saved(tmp_path):
    start_write(tmp_path / "step_00000003", tree(), ABOUT, "fit")()
    return tmp_path


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def test_a_tree_comes_back_bit_by_bit(saved):
    like = jax.tree.map(jnp.zeros_like, tree())
    step, state, about = newest_checkpoint(saved, like)
    assert (step, about) == (3, ABOUT)
    assert jax.tree.map(bits, state) == jax.tree.map(bits, tree())
    assert [path.name for path in saved.iterdir()] == ["step_00000003"]


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow_cases
@pytest.mark.parametrize("change", ["flip", "cut", "gone"])
def test_any_damaged_file_is_reported(change, saved):
    """Also those that orbax reads without a word."""
    for path in files_of(saved):
        data = path.read_bytes()
        if not data and change != "gone":
            continue
        if change == "gone":
            path.unlink()
        elif change == "cut":
            path.write_bytes(data[:-1])
        else:
            middle = len(data) // 2
            path.write_bytes(data[:middle] + b"\x7f" + data[middle + 1 :])
            if data[middle] == 0x7F:
                continue
        with pytest.raises(DamagedFileError, match="step_00000003 is damaged"):
            newest_checkpoint(saved, tree())
        path.write_bytes(data)
    assert newest_checkpoint(saved, tree()) is not None


def test_another_tree_is_no_damage(saved):
    other = tree() | {"w": jnp.zeros((5, 8))}
    with pytest.raises(ValueError, match=r"\['w'\] is float32\[5,7\] in the file"):
        newest_checkpoint(saved, other)
    del other["w"]
    with pytest.raises(ValueError, match=r"\['w'\] is in the file only"):
        newest_checkpoint(saved, other)


def test_what_is_not_complete_is_not_there(tmp_path):
    path = tmp_path / "step_00000004"
    finish = start_write(path, tree(), ABOUT, "fit")
    assert checkpoints(tmp_path) == []
    finish()
    assert checkpoints(tmp_path) == [(4, path)]
    assert read_manifest(path, "fit")["about"] == ABOUT
    # A killed writer's draft is replaced by the next.
    path.rename(draft_of(path))
    assert newest_checkpoint(tmp_path, tree()) is None
    start_write(path, tree(), ABOUT, "fit")()
    assert newest_checkpoint(tmp_path, tree()).step == 4
    remove(path)
    assert list(tmp_path.iterdir()) == []


def test_a_checksum_sees_values_and_places():
    one = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(3, dtype=jnp.bfloat16)}
    same = jax.tree.map(jnp.array, one)
    assert checksum(one) == checksum(same)
    swapped = one | {"a": one["a"][::-1]}
    changed = one | {"b": one["b"].at[1].add(1)}
    assert len({checksum(x) for x in (one, swapped, changed)}) == 3
    assert checksum({"key": jax.random.key(1)}) != checksum({"key": jax.random.key(2)})
