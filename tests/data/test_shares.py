"""Shares of a store; two real processes are in tests/jobs/test_several_jobs.py."""

import itertools

import jax
import numpy as np
import pytest

from toyfeat.data import open_store, store_batches, store_writer
from toyfeat.data.format import empty_store
from toyfeat.data.merging import is_complete, merge_shares
from toyfeat.data.parts import batch_part
from toyfeat.data.shares import Share
from toyfeat.types import Taps

D = 3


def taps(rows):
    rng = np.random.default_rng(0)
    acts = rng.normal(size=(rows, D)).astype(np.float32)
    return Taps(acts, None, np.ones(rows, np.float32))


def part(rows, where):
    return jax.tree.map(lambda x: x[where], taps(rows))


def settings(path, **more):
    about = {"readouts": None, "dtype": "float32", "metadata": {"a": 1}}
    return empty_store("test", path, dim=D, rows_per_shard=8, **about, **more)


def write_share(path, share, upto=None):
    rows = share.rows(8)
    about = {"dim": D, "rows_per_shard": 8, "metadata": {"a": 1}}
    with store_writer(path, **about, share=share) as writer:
        begin = rows.start + writer.rows
        stop = rows.stop if upto is None else min(rows.stop, rows.start + upto)
        writer.append(part(share.total, slice(begin, max(begin, stop))))


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_shares_have_every_row_once_in_whole_shards():
    for total, size, count in itertools.product((1, 7, 8, 50), (3, 8), (1, 2, 5)):
        shares = [Share(i, count, total).rows(size) for i in range(count)]
        rows = [row for share in shares for row in range(share.start, share.stop)]
        assert rows == list(range(total))
        assert all(share.start % size == 0 or share.start == total for share in shares)


def test_shards_that_no_record_tells_of_are_refused(tmp_path):
    """As by one process: they may be of anything."""
    write_share(tmp_path, Share(0, 2, 45))
    assert not is_complete(settings(tmp_path), 45, 2)
    (tmp_path / Share(0, 2, 45).record).unlink()
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"has 3 shards, such as .*no store\.json"):
        is_complete(settings(tmp_path), 45, 2)
    assert content(tmp_path) == before


@pytest.mark.parametrize("total", [45, 16, 5])
def test_shares_make_the_store_of_one_writer(total, tmp_path):
    about = {"dim": D, "rows_per_shard": 8, "metadata": {"a": 1}}
    with store_writer(tmp_path / "whole", **about) as writer:
        writer.append(taps(total))
    folder = tmp_path / "shares"
    wanted = settings(folder)
    assert not is_complete(wanted, total, 3)
    # The last first, and one of them in two pieces.
    for index in (2, 0, 1):
        write_share(folder, Share(index, 3, total), upto=3 if index == 1 else None)
    if Share(1, 3, total).rows(8).stop - Share(1, 3, total).rows(8).start > 3:
        with pytest.raises(ValueError, match=r"share-1-of-3.json must have \d+ rows"):
            merge_shares(wanted, total, 3)
    write_share(folder, Share(1, 3, total))
    assert merge_shares(wanted, total, 3).rows == total
    assert content(folder) == content(tmp_path / "whole")
    # A kill between the two leaves records, which go.
    (folder / "share-0-of-3.json").write_text("{}")
    assert is_complete(wanted, total, 2)
    assert content(folder) == content(tmp_path / "whole")


def test_another_number_of_writers_is_named(tmp_path):
    write_share(tmp_path, Share(0, 2, 45))
    for count in (1, 3):
        with pytest.raises(ValueError, match=rf"begun by 2 processes .*, got {count}"):
            is_complete(settings(tmp_path), 45, count)
    with pytest.raises(ValueError, match="begun by 2 processes"):
        store_writer(tmp_path, dim=D, rows_per_shard=8, metadata={"a": 1})
    with pytest.raises(FileNotFoundError, match="share-1-of-2"):
        merge_shares(settings(tmp_path), 45, 2)


def test_a_store_of_one_process_is_not_finished_by_several(tmp_path):
    about = {"dim": D, "rows_per_shard": 8, "metadata": {"a": 1}}
    with store_writer(tmp_path, **about) as writer:
        writer.append(part(45, slice(0, 16)))
    with pytest.raises(ValueError, match="by one process and has 16 of 45 rows, got 2"):
        is_complete(settings(tmp_path), 45, 2)
    with pytest.raises(ValueError, match="begun with dtype"):
        is_complete(settings(tmp_path)._replace(dtype="bfloat16"), 16, 2)


def test_batches_on_a_mesh_are_the_same(tmp_path):
    about = {"dim": D, "rows_per_shard": 8}
    with store_writer(tmp_path, **about) as writer:
        writer.append(taps(45))
    store = open_store(tmp_path)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    plain = store_batches(store, batch=12, seed=1)
    split = store_batches(store, batch=12, seed=1, mesh=mesh)
    for step in (0, 3, 4):
        one, two = plain(step), split(step)
        assert two.acts.sharding.spec == jax.P("data")
        np.testing.assert_array_equal(one.acts, two.acts)
        np.testing.assert_array_equal(one.weights, two.weights)
    with pytest.raises(ValueError, match=r"one of .*'data'.*, got 'rows'"):
        store_batches(store, batch=12, seed=1, mesh=mesh, axis="rows")
    with pytest.raises(TypeError, match="mesh must be"):
        store_batches(store, batch=12, seed=1, mesh="data")


def test_a_mesh_without_devices_has_no_rows():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    with pytest.raises(TypeError, match="mesh must be"):
        batch_part("test", 12, mesh, "data")
