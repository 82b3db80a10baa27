"""What is in the folder of a job: dictionaries, stores, moments and rows."""

import errno
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from toyfeat.data import store as data_store
from toyfeat.data.writing import store_writer
from toyfeat.jobs import Attribution, Job, Train, steps
from toyfeat.jobs import taps as sources
from toyfeat.jobs.config import Collect
from toyfeat.jobs.results import (
    Rows,
    Run,
    claim_folder,
    finished_runs,
    list_runs,
    moments_path,
    store_path,
)
from toyfeat.jobs.taps import load_moments, open_collected, open_moments
from toyfeat.jobs.train import load_curves, train_together
from toyfeat.lm.collect import store_moments
from toyfeat.types import Taps

SITE = "blocks_1/resid_post"
DIM = 3


def test_a_job_has_every_kind_number_of_codes_and_seed():
    train = Train(kinds=("acts", "paired"), ks=(2, 4), seeds=(0, 5))
    runs = list_runs(train)
    assert len(runs) == len({run.name for run in runs}) == 8
    assert Run("paired", 4, 5) in runs
    assert Run("paired", 4, 5).name == "paired-k4-s5"
    assert list_runs(Train(ks=())) == []


def test_an_unknown_kind_is_refused(tmp_path):
    train = Train(kinds=("acts", "weights"))
    with pytest.raises(ValueError, match=r"train: kinds must be of acts, .*'weights'"):
        list_runs(train)
    with pytest.raises(ValueError, match="train: kinds"):
        list(finished_runs(train, tmp_path))


def test_every_loss_of_attributions_is_a_run():
    losses = Attribution(), Attribution("strong 10", 1.0, 1.0)
    train = Train(kinds=("acts", "attribution"), ks=(4,), attribution=losses)
    names = ["acts-k4-s0", "attribution-k4-s0", "strong 10-k4-s0"]
    assert [run.name for run in list_runs(train)] == names


@pytest.mark.parametrize(
    "names",
    [
        ("a", "a"),
        ("acts",),
        ("../a",),
        ("",),
        ("a-k3-s0",),
        ("paired alone",),
        ("gradients sampled",),
        ("random",),
    ],
)
def test_names_of_losses_must_differ_and_be_names(names):
    train = Train(attribution=tuple(Attribution(name) for name in names))
    with pytest.raises(ValueError, match=f"train: losses want names.*{names[-1]!r}"):
        list_runs(train)


def test_losses_that_nothing_is_trained_with_are_refused():
    train = Train(kinds=("acts",), attribution=(Attribution("weak"),))
    with pytest.raises(ValueError, match=r"are losses \(weak\), but kinds has no"):
        list_runs(train)


@pytest.fixture(scope="module")
def collected_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected")
    job = Job(out=str(folder))
    rng = np.random.default_rng(0)
    taps = Taps(rng.normal(size=(40, DIM)), rng.normal(size=(40, 1, DIM)), np.ones(40))
    options = {"dim": DIM, "readouts": 1, "rows_per_shard": 8}
    with store_writer(store_path(job, SITE), **options) as writer:
        writer.append(taps)
    store = data_store.open_store(store_path(job, SITE))
    open_moments(job, SITE, DIM, lambda: store_moments(store), print)
    return folder


@pytest.fixture
def job(collected_once, tmp_path):
    """A job that was collected, of a copy of its own."""
    shutil.copytree(collected_once, tmp_path / "job")
    return Job(
        out=str(tmp_path / "job"),
        collect=Collect(sites=(SITE,)),
        train=Train(site=SITE, kinds=("acts",), ks=(1,), latents=4, steps=2, batch=8),
    )


def flip(path, at=3):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


@pytest.mark.slow_cases
@pytest.mark.parametrize("shard", range(5))
def test_a_flipped_bit_of_a_shard_ends_the_training_before_it_begins(job, shard):
    path = store_path(job, SITE) / f"shard-{shard:06d}-8.bin"
    flip(path)
    match = rf"^job: the store must .*{path.name}; delete the folder .* run toyfeat col"
    with pytest.raises(ValueError, match=match):
        steps.train_job(job)
    assert not (Path(job.out) / "train").exists()


def test_a_store_is_verified_once_and_again_when_a_file_changes(job, monkeypatch):
    calls = []

    def count_calls(path):
        calls.append(path)
        data_store.verify_store(path)

    monkeypatch.setattr(sources, "verify_store", count_calls)
    for _ in range(3):
        open_collected(job, SITE)
    assert len(calls) == 1
    # A marker that is broken, and a file with another time, say nothing.
    marker = store_path(job, SITE).with_name("blocks_1-resid_post.verified.json")
    marker.write_text("{")
    open_collected(job, SITE)
    assert len(calls) == 2
    shard = store_path(job, SITE) / "shard-000002-8.bin"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    open_collected(job, SITE)
    assert len(calls) == 3
    flip(shard)
    with pytest.raises(ValueError, match=r"shard-000002-8\.bin"):
        open_collected(job, SITE)
    flip(shard)
    open_collected(job, SITE)


def test_damaged_moments_are_computed_again(job):
    path = moments_path(job, SITE)
    before, said = load_moments(path, DIM), []
    flip(path, at=path.stat().st_size // 2)
    store = open_collected(job, SITE)
    compute = lambda: store_moments(store)  # noqa: E731
    stats = open_moments(job, SITE, DIM, compute, said.append)
    for saved in (stats, load_moments(path, DIM)):
        jax.tree.map(np.testing.assert_array_equal, saved, before)
    acts = np.concatenate([data_store.shard_taps(store, i).acts for i in range(5)])
    np.testing.assert_allclose(stats.mean, acts.mean(0), rtol=1e-4, atol=1e-6)
    assert len(said) == 1
    assert "is damaged" in said[0]
    assert said[0].endswith("computed again")


def test_moments_of_another_width_are_refused(job):
    with pytest.raises(ValueError, match="holds another tree"):
        open_moments(job, SITE, DIM + 1, None, print)


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[]", b"[" * 200_000, b"null"])
def test_broken_settings_of_a_folder_are_named(job, data):
    (Path(job.out) / "job.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"^job: .*job\.json must be a JSON object .*"):
        claim_folder(job, "collect")


def test_results_without_their_settings_are_not_taken_for_this_jobs(job):
    match = r"^job: .* must have job\.json, .*got stores without it; give another"
    with pytest.raises(ValueError, match=match):
        claim_folder(job, "collect")


@pytest.mark.parametrize("line", [b'{"a": oops}', b"\xff}", b"{} {}", b"3", b'{"a": 1'])
def test_a_broken_row_is_named_and_nothing_is_thrown_away(tmp_path, line):
    path = tmp_path / "evaluation.jsonl"
    data = b'{"a": 1}\n' + line + b'\n{"a": 3}\n{"a"'
    path.write_bytes(data)
    match = r"^job: line 2 of .*evaluation\.jsonl must be .*; delete that line, and its"
    with pytest.raises(ValueError, match=match):
        Rows(path)
    assert path.read_bytes() == data


def test_numbers_that_json_does_not_have_are_null_in_lists_too(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add({"a": 1}, {"spectrum": [1.0, float("nan")], "effects": [[float("inf")]]})
    row = {"a": 1, "spectrum": [1.0, None], "effects": [[None]]}
    assert rows.rows == Rows(tmp_path / "rows.jsonl").rows == [row]


def test_a_row_on_a_full_disk_names_the_file_and_leaves_no_part(tmp_path, monkeypatch):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add({"a": 1}, {})

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    match = r"job: could not write .*rows\.jsonl: No space left .*; make room"
    for call in ("pathlib.Path.open", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(call, full)
            with pytest.raises(OSError, match=match):
                rows.add({"a": 2}, {})
    rows.add({"a": 3}, {})
    assert rows.rows == Rows(tmp_path / "rows.jsonl").rows == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize(
    "data", [b"[", b"{}", b"[1]", b"[[1]]", b'[["1", 2]]', b"[[true, 1]]", b"\xff"]
)
def test_broken_members_of_a_population_are_named(tmp_path, data):
    path = tmp_path / "acts together 0" / "members.json"
    path.parent.mkdir()
    path.write_bytes(data)
    match = r"^train: .*members\.json must be .*; delete the folder .* begins anew"
    with pytest.raises(ValueError, match=match):
        train_together([Run("acts", 1, 0)], Train(), None, tmp_path)


def test_curves_of_broken_lines_are_named_and_numbers_are_numbers(tmp_path):
    train = Train(kinds=("acts",), ks=(1,), seeds=(0,))
    features = tmp_path / "acts-k1-s0" / "features"
    features.mkdir(parents=True)
    (features / "cfg.json").write_text("{}")
    path = features.parent / "metrics.jsonl"
    rows = [{"step": 1, "fvu": None}, {"step": 2, "fvu": "x"}, {"step": 3, "fvu": 0.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4')
    curves = load_curves(train, tmp_path)["acts-k1-s0"]
    np.testing.assert_array_equal(curves["step"], [1, 2, 3])
    np.testing.assert_array_equal(curves["fvu"], [np.nan, np.nan, 0.5])
    path.write_text('{"step": 1}\nnot json\n')
    with pytest.raises(ValueError, match=r"train: line 2 of .*metrics\.jsonl"):
        load_curves(train, tmp_path)
