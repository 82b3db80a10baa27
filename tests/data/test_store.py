"""Stores: rows in order, interrupted writers, damage and wrong settings."""

import hashlib
import json
import os
import resource
import textwrap
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from processes import run_python

from toyfeat.data import array_batches, store_batches
from toyfeat.data.store import open_store, shard_taps, store_size, verify_store
from toyfeat.data.writing import store_writer
from toyfeat.lm.collect import read_chunks
from toyfeat.types import Taps

D, K = 3, 2


def random_taps(rows, readouts=K, start=0):
    rng = np.random.default_rng([7, start, rows])
    acts = rng.standard_normal((rows, D)).astype(np.float32)
    grads = None
    if readouts:
        grads = rng.standard_normal((rows, readouts, D)).astype(np.float32)
    return Taps(acts, grads, rng.random(rows).astype(np.float32))


def concatenate(parts):
    return Taps(
        *(
            None if x[0] is None else np.concatenate([np.asarray(y) for y in x])
            for x in zip(*(part[:3] for part in parts), strict=True)
        )
    )


def contents(store):
    return concatenate([shard_taps(store, i) for i in range(len(store.shards))])


def assert_equal(taps, wanted):
    for x, y in zip(taps[:3], wanted[:3], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow_cases
@pytest.mark.parametrize("calls", [(1, 2, 3), (25,), (0, 10, 10), (7, 0, 23, 1)])
@pytest.mark.parametrize("readouts", [None, K])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_come_back_in_order(calls, readouts, dtype, tmp_path):
    parts = [random_taps(n, readouts, i) for i, n in enumerate(calls)]
    settings = {"dim": D, "readouts": readouts, "dtype": dtype, "rows_per_shard": 10}
    about = {"model": "toy", "site": "mlp"}
    with store_writer(tmp_path / "a" / "b", **settings, metadata=about) as writer:
        for part in parts:
            writer.append(Taps(*(x if x is None else jnp.asarray(x) for x in part)))
        assert writer.rows == sum(calls)
    store = open_store(tmp_path / "a" / "b")
    verify_store(store.path)
    assert store.rows == sum(calls)
    assert store.metadata == about
    assert [s.rows for s in store.shards[:-1]] == [10] * (len(store.shards) - 1)
    wanted = concatenate(parts)
    kind = np.dtype(jnp.dtype(dtype))
    cast = [None if x is None else x.astype(kind) for x in wanted[:2]]
    assert_equal(contents(store), (*cast, wanted.weights))
    assert contents(store).acts.dtype == kind
    assert not list(store.path.glob("*.tmp"))


def test_the_layout_is_what_is_documented(tmp_path):
    taps = random_taps(5)
    with store_writer(tmp_path, dim=D, readouts=K, rows_per_shard=8) as writer:
        writer.append(taps)
    about = json.loads((tmp_path / "store.json").read_text())
    assert about["format"] == "toyfeat store"
    (shard,) = about["shards"]
    raw = (tmp_path / shard["file"]).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == shard["sha256"]
    at = 0
    for x in taps[:3]:
        block = x.astype("<f4").tobytes()
        assert raw[at : at + len(block)] == block
        at += -(-len(block) // 64) * 64
    assert len(raw) == at
    mapped = shard_taps(open_store(tmp_path), 0)
    with pytest.raises(ValueError, match="read-only"):
        mapped.acts[0] = 0


@pytest.mark.parametrize("rows", [0, 9, 10, 35])
@pytest.mark.parametrize("readouts", [None, 1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_size_is_known_before(rows, readouts, dtype, tmp_path):
    shape = {"dim": D, "readouts": readouts, "dtype": dtype, "rows_per_shard": 10}
    with store_writer(tmp_path, **shape) as writer:
        writer.append(random_taps(rows, readouts))
    size = sum(file.stat().st_size for file in tmp_path.glob("*.bin"))
    assert store_size(rows, **shape) == size


def test_stops_leave_no_trace(tmp_path):
    settings = {"dim": D, "readouts": K, "rows_per_shard": 10}
    taps = random_taps(47)
    with store_writer(tmp_path / "once", **settings) as writer:
        writer.append(taps)
    for size in (4, 3, 10, 0, 12, 18):
        with store_writer(tmp_path / "often", **settings) as writer:
            start = writer.rows
            writer.append(Taps(*(x[start : start + size] for x in taps[:3])))
        verify_store(tmp_path / "often")
        assert open_store(tmp_path / "often").rows == start + size
    same_files(tmp_path / "once", tmp_path / "often")


def same_files(folder, other):
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_a_writer_that_is_dropped_loses_only_what_filled_no_shard(tmp_path):
    settings = {"dim": D, "readouts": K, "rows_per_shard": 10}
    writer = store_writer(tmp_path, **settings)
    writer.append(random_taps(25))
    assert writer.rows == 25
    del writer
    assert open_store(tmp_path).rows == 20
    with store_writer(tmp_path, **settings) as writer:
        assert writer.rows == 20
    assert len(list(tmp_path.iterdir())) == 3


def test_what_a_killed_writer_left_is_finished(tmp_path):
    settings = {"dim": D, "readouts": K, "rows_per_shard": 10}
    taps = random_taps(30)
    with store_writer(tmp_path / "once", **settings) as writer:
        writer.append(taps)
    with store_writer(tmp_path / "killed", **settings) as writer:
        writer.append(Taps(*(x[:20] for x in taps[:3])))
    # A kill leaves the beginning of a shard, or of store.json.
    for name, draft in (("shard-000002-10.bin",) * 2, ("store.json", "store.json.tmp")):
        content = (tmp_path / "once" / name).read_bytes()
        (tmp_path / "killed" / draft).write_bytes(content[: len(content) // 2])
    with store_writer(tmp_path / "killed", **settings) as writer:
        writer.append(Taps(*(x[20:] for x in taps[:3])))
    same_files(tmp_path / "once", tmp_path / "killed")


@pytest.mark.parametrize("link", [False, True])
def test_files_of_others_stay_as_they_are(link, tmp_path):
    settings = {"dim": D, "readouts": K, "rows_per_shard": 10}
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "store"
    folder.mkdir()
    names = "thesis.tmp", "shard-of-another-tool.bin", "store.json.tmp", "notes"
    others = {folder / name: f"mine: {name}" for name in names}
    for file, text in others.items():
        if link:
            file.symlink_to(outside)
            others[file] = "mine"
        else:
            file.write_text(text)
    with store_writer(folder, **settings) as writer:
        writer.append(random_taps(5))
    late = folder / "shard-000001-10.bin"  # and one that comes later
    late.write_text("mine, too")
    with store_writer(folder, **settings) as writer:
        writer.append(random_taps(20))
    verify_store(folder)
    store = open_store(folder)
    assert store.rows == 25
    assert [s.file for s in store.shards][1] == "shard-000001-10-1.bin"
    assert late.read_text() == "mine, too"
    assert {file: file.read_text() for file in others} == others
    assert all(file.is_symlink() == link for file in others)
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("lost", ["gone", "link", "empty", "bit", "list"])
def test_without_its_record_a_store_loses_no_shard(lost, tmp_path):
    settings = {"dim": D, "readouts": K, "rows_per_shard": 10}
    folder = tmp_path / "store"
    with store_writer(folder, **settings) as writer:
        writer.append(random_taps(25))
    file = folder / "store.json"
    text = file.read_text()
    file.unlink()
    if lost == "link":
        file.symlink_to(tmp_path / "nowhere")
    elif lost != "gone":
        bit = text.replace("shard-000001-10", "shard-000001-11")
        file.write_text({"empty": "", "bit": bit, "list": "[]"}[lost])
    before = {f.name: f.read_bytes() for f in folder.glob("*.bin")}
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"store_writer: .*{folder}"
    ):
        store_writer(folder, **settings)
    assert {f.name: f.read_bytes() for f in folder.glob("*.bin")} == before


@pytest.mark.parametrize(
    "name",
    ["../victim.bin", "/tmp/shard-000002-5.bin", "sub/shard-000002-5.bin", "..", ""],
)
def test_a_shard_outside_of_the_folder_is_refused(name, tmp_path):
    settings = {"dim": D, "readouts": K, "rows_per_shard": 10}
    folder = tmp_path / "store"
    with store_writer(folder, **settings) as writer:
        writer.append(random_taps(25))
    victim = tmp_path / "victim.bin"
    victim.write_bytes((folder / "shard-000002-5.bin").read_bytes())
    file = folder / "store.json"
    file.write_text(file.read_text().replace("shard-000002-5.bin", name))
    for act in (open_store, partial(store_writer, **settings)):
        with pytest.raises(ValueError, match=r"store.json names a shard '.*a name in"):
            act(folder)
    assert victim.exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rows_per_shard": "eight"}, "'rows_per_shard' in .* must be an int"),
        ({"dim": True}, "'dim' in .* must be an int"),
        ({"dim": None}, "'dim' in .* must be an int"),
        ({"readouts": -1}, "'readouts' in .* at least 1"),
        ({"dtype": {}}, "'dtype' in .* must be a string"),
        ({"dtype": "float8"}, "dtype in .* must be one of"),
        ({"metadata": "x"}, "'metadata' in .* must be an object"),
        ({"shards": [5]}, "shards in .* must be objects, got 5"),
        ({"shards": [{"file": "a", "rows": 1}]}, "'sha256' in .* got nothing"),
        ({"shards": {}}, "'shards' in .* must be a list"),
        ({"rows_per_shard": 9}, ".* must be different files of 9 rows"),
    ],
)
def test_wrong_values_in_the_record_are_named(change, match, tmp_path):
    settings = {"dim": D, "readouts": K, "rows_per_shard": 10}
    with store_writer(tmp_path, **settings) as writer:
        writer.append(random_taps(25))
    file = tmp_path / "store.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=rf"open_store: {match}"):
        open_store(tmp_path)


def test_a_shard_that_is_cut_short_is_named_and_ends_nothing(tmp_path):
    with store_writer(tmp_path, dim=64, rows_per_shard=100) as writer:
        writer.append(Taps(np.ones((200, 64)), None, np.ones(200)))
    store = open_store(tmp_path)
    batches = store_batches(store, batch=50, seed=0)
    chunks = read_chunks(store, rows=10)
    batches(0), next(chunks)
    os.truncate(tmp_path / "shard-000000-100.bin", 100)
    with pytest.raises(ValueError, match=r"shard-000000-100.bin must have .* got 100"):
        [batches(step) for step in range(4)]
    with pytest.raises(ValueError, match=r"shard-000000-100.bin must have .* got 100"):
        list(chunks)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("acts", np.nan),
        ("acts", 1e300),
        ("grads", -np.inf),
        ("grads", np.nan),
        ("weights", np.nan),
        ("weights", -1.0),
        ("weights", np.inf),
    ],
)
def test_values_that_a_store_cannot_hold_are_refused(name, value, tmp_path):
    taps = random_taps(7)
    fields = {x: np.array(getattr(taps, x), np.float64) for x in taps._fields[:3]}
    fields[name][(3,) + (0,) * (fields[name].ndim - 1)] = value
    settings = {"dim": D, "readouts": K, "rows_per_shard": 10}
    with store_writer(tmp_path, **settings) as writer:
        with pytest.raises(ValueError, match=rf"append: {name} must be finite numbers"):
            writer.append(Taps(**fields))
        assert writer.rows == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_weight_0_may_hold_anything_as_in_batches_of_arrays(
    value, dtype, tmp_path
):
    acts, grads, weights, *_ = random_taps(7)
    acts, grads = acts.astype(np.float64), grads.astype(np.float64)
    acts[3, 0] = grads[3, 0, 0] = value
    taps = Taps(acts, grads, weights * (np.arange(7) != 3))
    with store_writer(tmp_path, dim=D, readouts=K, dtype=dtype) as writer:
        writer.append(taps)
    stored, wanted = contents(open_store(tmp_path)), np.arange(7) != 3
    np.testing.assert_array_equal(stored.weights, taps.weights)
    for x, y in zip(stored[:2], taps[:2], strict=True):
        np.testing.assert_allclose(x[wanted].astype(float), y[wanted], rtol=2**-8)
    with np.errstate(over="ignore"):
        small = Taps(*(x.astype(np.float32) for x in taps[:3]))
    array_batches(small, batch=2, seed=0)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from toyfeat.data.store import open_store, verify_store
from toyfeat.data.writing import store_writer
from toyfeat.types import Taps

ROWS, SETTINGS = 400, {"dim": 3, "readouts": 1, "rows_per_shard": 10}
acts = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3)
TAPS = Taps(acts, -acts[:, None], acts[:, 0])


def collect(path):
    with store_writer(path, **SETTINGS) as writer:
        while writer.rows < ROWS:
            at = writer.rows
            writer.append(Taps(*(x[at : at + 7] for x in TAPS[:3])))


random.seed(int(sys.argv[2]))
path, kills, seen = Path(sys.argv[1]) / "killed", 0, set()
collect(path.with_name("once"))
while True:
    child = os.fork()
    if child == 0:
        collect(path)
        os._exit(0)
    # On a busy machine a child takes longer to get anywhere.
    if kills < 25 or (len(seen) < 4 and kills < 100):
        time.sleep(random.uniform(0, 0.02) * (1 + kills / 10))
        os.kill(child, signal.SIGKILL)
    kills += 1
    _, status = os.waitpid(child, 0)
    if (path / "store.json").exists():
        store = open_store(path)
        verify_store(path)
        seen.add(store.rows)
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
    assert all(s.rows == 10 for s in store.shards) if seen else True
print(kills, len(seen))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_bit_by_bit(tmp_path):
    script = textwrap.dedent(KILLED)
    done = run_python("-c", script, tmp_path, 0)
    assert done.returncode == 0, done.stderr
    kills, stages = map(int, done.stdout.split())
    assert kills > 3
    assert stages > 2
    same_files(tmp_path / "once", tmp_path / "killed")


def test_a_full_disk_is_told_and_harms_nothing(tmp_path):
    settings = {"dim": 100, "rows_per_shard": 200}
    taps = Taps(np.ones((500, 100)), None, np.ones(500))
    writer = store_writer(tmp_path, **settings)
    writer.append(Taps(*(None if x is None else x[:250] for x in taps[:3])))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(
            OSError,
            match=r"could not write 80832 bytes of shard-000001-200.bin .* "
            r"bytes are free\); the 200 rows of earlier shards are whole",
        ):
            writer.append(Taps(*(None if x is None else x[250:] for x in taps[:3])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    verify_store(tmp_path)
    assert open_store(tmp_path).rows == 200
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ValueError, match="writer is closed; call store_writer"):
        writer.append(taps)
    writer.close()
    with store_writer(tmp_path, **settings) as writer:
        assert writer.rows == 200


def test_other_settings_are_refused(tmp_path):
    good = {"dim": D, "readouts": K, "rows_per_shard": 10, "metadata": {"site": "mlp"}}
    store_writer(tmp_path, **good).close()
    store_writer(tmp_path, **good).close()
    for name, value in {
        "dim": 4,
        "readouts": None,
        "rows_per_shard": 11,
        "dtype": "bfloat16",
        "metadata": {"site": "attn"},
    }.items():
        with pytest.raises(ValueError, match=f"was begun with {name} = .*, got "):
            store_writer(tmp_path, **(good | {name: value}))
    for name, value, match in (
        ("dim", 0, "dim must be an int of at least 1, got 0"),
        ("readouts", 1.5, "readouts must be an int of at least 1, got 1.5"),
        ("rows_per_shard", -1, "rows_per_shard must be an int of at least 1, got -1"),
        ("dtype", "float16", "dtype must be one of .*bfloat16.*, got 'float16'"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            store_writer(tmp_path / "new", **(good | {name: value}))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="rows must be an int of at least 0, got -1"):
        store_size(-1, dim=3)


def test_only_one_writer_at_a_time(tmp_path):
    with (
        store_writer(tmp_path, dim=D),
        pytest.raises(
            BlockingIOError, match=r"only one at a time may use .* another has open"
        ),
    ):
        store_writer(tmp_path, dim=D)
    store_writer(tmp_path, dim=D).close()


def test_taps_of_another_kind_are_refused(tmp_path):
    with store_writer(tmp_path, dim=D, readouts=K) as writer:
        acts, grads, weights, *_ = random_taps(5)
        for taps, match in (
            (Taps(acts[:, :2], grads, weights), r"\(\(5, 3\), \(5, 2, 3\), \(5,\)\)"),
            (Taps(acts, None, weights), r"got \(\(5, 3\), None, \(5,\)\)"),
            (Taps(acts, grads[:, :1], weights), r"got .*\(5, 1, 3\)"),
            (Taps(acts, grads, weights[:4]), r"\(4,\)"),
            (Taps(np.float32(0), grads, weights), "wants acts, grads, weights"),
        ):
            with pytest.raises(ValueError, match=match):
                writer.append(taps)
        with pytest.raises(TypeError, match="acts must be floating-point, got int32"):
            writer.append(Taps(acts.astype(np.int32), grads, weights))
        assert writer.rows == 0


def test_damage_is_found_and_named(tmp_path):
    settings = {"dim": D, "readouts": K, "rows_per_shard": 10}
    with store_writer(tmp_path, **settings) as writer:
        writer.append(random_taps(25))
    files = [tmp_path / shard.file for shard in open_store(tmp_path).shards]
    originals = [file.read_bytes() for file in files]
    for i in (1, 2):
        files[i].write_bytes(originals[i][:40] + b"\x55" + originals[i][41:])
    open_store(tmp_path)
    with pytest.raises(
        ValueError, match=r"2 of 3 shards .*: shard-000001-10.bin, shard-000002-5.bin"
    ):
        verify_store(tmp_path)
    with pytest.raises(
        ValueError, match=r"shard-000002-5\.bin is not what was written"
    ):
        store_writer(tmp_path, **settings)
    files[1].write_bytes(originals[1][:-1])
    with pytest.raises(ValueError, match=r"must have 448 bytes for 10 rows, got 447"):
        open_store(tmp_path)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"shard .*000001-10.bin is missing"):
        open_store(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*store.json"):
        open_store(tmp_path / "elsewhere")
    saved = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(saved | {"version": 2}))
    with pytest.raises(ValueError, match=r"of version 1, .* version 2"):
        open_store(tmp_path)
