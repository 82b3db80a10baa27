"""Jobs in two real processes; the oracle is the same job in one."""

import json
import shutil

import numpy as np
import pytest
from several_jobs import BOUND, STORE, content, run, run_and_kill, write_job

from toyfeat.data import open_store, verify_store
from toyfeat.interop import load_saelens


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The job in one process: its folder, collected and trained."""
    out = tmp_path_factory.mktemp("alone") / "job"
    job = write_job(folder, out)
    for command in ("collect", "train"):
        done = run(1, folder, command, job)
        assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def collected(folder, alone, tmp_path):
    """A job that two processes collected: its folder and its file."""
    job = write_job(folder, tmp_path / "job")
    done = run(2, folder, "collect", job)
    assert done.returncode == 0, done.stdout
    return tmp_path / "job", job, done


@pytest.mark.slow
def test_two_processes_make_the_store_of_one_and_train_the_same(
    folder, alone, collected
):
    out, job, done = collected
    assert content(out / STORE) == content(alone / STORE)
    assert [line for line in done.stdout.splitlines() if "tokens in" in line]
    assert not [x for x in done.stdout.splitlines() if x.startswith("[1]") and "%" in x]
    moments = "moments/blocks_1-resid_post"
    with np.load(out / moments) as found, np.load(alone / moments) as wanted:
        for name in sorted(set(wanted) - {"manifest.json"}):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    # A second time there is nothing to do, for any number of processes.
    for num in (2, 1):
        again = run(num, folder, "collect", job)
        assert again.returncode == 0, again.stdout
        assert content(out / STORE) == content(alone / STORE)
    done = run(2, folder, "train", job)
    assert done.returncode == 0, done.stdout
    assert_same_dictionaries(out, alone)
    assert all("fvu" not in x for x in done.stdout.splitlines() if x[:3] == "[1]")


def assert_same_dictionaries(out, alone):
    names = sorted(path.name for path in (alone / "train").iterdir())
    assert names == ["acts-k2-s0", "acts-k2-s1", "gradients-k2-s0", "gradients-k2-s1"]
    for name in names:
        _, wanted = load_saelens(alone / "train" / name / "features")
        _, params = load_saelens(out / "train" / name / "features")
        for key, value in wanted.items():
            np.testing.assert_allclose(params[key], value, rtol=1e-5, atol=1e-5)
        lines = (out / "train" / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [6]


@pytest.mark.slow
def test_a_population_of_two_processes_is_that_of_one(folder, alone, tmp_path):
    """Its latents over devices or not."""
    train = {"population": True, "kinds": ["acts"], "ks": [2, 4]}
    found = []
    for num, parts in ((1, 1), (2, 1), (2, 2)):
        out = tmp_path / f"{num}-{parts}"
        job = write_job(folder, out, train=train | {"latent_devices": parts})
        for command in ("collect", "train"):
            done = run(num, folder, command, job)
            assert done.returncode == 0, done.stdout + done.stderr
        found.append(
            [
                load_saelens(path / "features")[1]
                for path in sorted((out / "train").glob("acts-*"))
            ]
        )
    assert [len(x) for x in found] == [4] * 3
    for one, *others in zip(*found, strict=True):
        for key, value in one.items():
            for other in others:
                np.testing.assert_allclose(other[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("num", "devices"), [(2, 1), (2, 2), (1, 2)])
def test_latents_over_devices_give_the_dictionaries_of_one(
    num, devices, folder, alone, tmp_path
):
    """On meshes of 1 x 2 and 2 x 2 devices of two processes, 1 x 2 of one."""
    out, train = tmp_path / "job", {"latent_devices": 2}
    job = write_job(folder, out, train=train)
    done = run(1, folder, "collect", job)
    assert done.returncode == 0, done.stderr
    done = run(num, folder, "train", job, devices=devices)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_dictionaries(out, alone)
    # A folder of orbax in several processes, a file in one.
    one = out / "train" / "acts-k2-s0"
    saved = [*(one / "checkpoint").iterdir()]
    assert [x.stem for x in saved] == ["step_00000006"]
    assert saved[0].is_dir() == (num > 1)
    # Elsewhere, whole, the run goes on from that checkpoint.
    shutil.rmtree(one / "features")
    whole = write_job(folder, out, suffix=".2.toml")
    done = run(1, folder, "train", whole)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_dictionaries(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_nothing_is_lost(
    victim, folder, alone, tmp_path
):
    """Without the launcher: the other notices by itself."""
    job = write_job(folder, tmp_path / "job")
    logs = [tmp_path / "log0", tmp_path / "log1"]
    # As soon as it writes: rows of its first shard are in memory.
    record = tmp_path / "job" / STORE / f"share-{victim}-of-2.json"
    status, seconds = run_and_kill(victim, folder, "collect", job, record.exists, logs)
    assert status != 0
    assert seconds < BOUND
    said = logs[1 - victim].read_text(errors="replace")
    assert "another process has ended" in said or "another task died" in said
    assert not (tmp_path / "job" / STORE / "store.json").exists()
    # No training on a part of a store; then the rest is collected.
    done = run(2, folder, "train", job)
    assert done.returncode == 1
    assert "run toyfeat collect first" in done.stdout
    done = run(2, folder, "collect", job)
    assert done.returncode == 0, done.stdout
    assert content(tmp_path / "job" / STORE) == content(alone / STORE)
    verify_store(tmp_path / "job" / STORE)
    assert open_store(tmp_path / "job" / STORE).rows == 512


@pytest.mark.slow
def test_stores_that_another_number_of_processes_began_are_named(
    folder, alone, tmp_path
):
    out = tmp_path / "job"
    job = write_job(folder, out)
    done = run(1, folder, "collect", job)
    assert done.returncode == 0, done.stderr
    # As one process would leave it half way: its first shards.
    record = json.loads((out / STORE / "store.json").read_text())
    gone = record["shards"][2:]
    record["shards"] = record["shards"][:2]
    for shard in gone:
        (out / STORE / shard["file"]).unlink()
    (out / STORE / "store.json").write_text(json.dumps(record))
    done = run(2, folder, "collect", job)
    assert done.returncode == 1
    assert "was begun by one process and has 200 of 512 rows" in done.stdout
    # As two of three would leave it.
    (out / STORE / "store.json").rename(out / STORE / "share-0-of-3.json")
    for num in (1, 2):
        done = run(num, folder, "collect", job)
        assert done.returncode == 1
        said = done.stdout + done.stderr
        assert f"was begun by 3 processes (share-0-of-3.json), got {num}" in said


@pytest.mark.slow
def test_processes_with_other_work_are_named_before_any(folder, tmp_path):
    out = tmp_path / "job"
    first = write_job(folder, out)
    second = write_job(folder, out, suffix=".2.toml", train={"steps": 7})
    done = run(2, folder, "collect", first, second)
    assert done.returncode == 1
    assert "job: all processes must have the same train" in done.stdout
    # Another version, and a device more, in the second.
    version = "from importlib import metadata; metadata.version = lambda name: '9.9'"
    done = run(2, folder, "collect", first, prelude=version)
    assert done.returncode == 1
    assert "job: all processes must have the same versions" in done.stdout
    flag = "--xla_force_host_platform_device_count=2"
    device = f"os.environ['XLA_FLAGS'] = '{flag}'"
    done = run(2, folder, "train", first, prelude=device)
    assert done.returncode == 1
    wanted = "equal devices, got 1 x cpu in process 0 and 2 x cpu in process 1; see"
    assert wanted in done.stdout
    missing = tmp_path / "none.toml"
    done = run(2, folder, "train", first, missing)
    assert done.returncode == 1
    assert (
        "process 1 of 2 failed (FileNotFoundError: read_job: there is no" in done.stdout
    )
    uneven = write_job(folder, out, suffix=".3.toml", train={"batch": 63})
    done = run(2, folder, "train", uneven)
    assert done.returncode == 1
    assert "2 devices of the axis 'data' must divide the batch, got 63" in done.stdout
    model = write_job(folder, out, suffix=".4.toml", source="model")
    done = run(2, folder, "train", model)
    assert done.returncode == 1
    assert "source is 'model', which one process trains on" in done.stdout
    for train, message in (
        ({"latents": 25, "latent_devices": 2}, "must divide train.latents, got 25"),
        ({"latent_devices": 3}, "must divide the 2 devices of all processes, got 3"),
    ):
        split = write_job(folder, out, suffix=".5.toml", train=train)
        done = run(2, folder, "train", split)
        assert done.returncode == 1
        assert message in done.stdout
    done = run(2, folder, "evaluate", first)
    assert done.returncode == 1
    assert "evaluate runs in one process, got 2" in done.stdout
    assert not out.exists()
