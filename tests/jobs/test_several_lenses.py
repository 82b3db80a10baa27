"""Lenses of jobs in two real processes; the oracle is the same job in one."""

import re
import shutil

import numpy as np
import pytest
from several_jobs import BOUND, run, run_and_kill, write_job

KINDS = {
    "jacobian": {"layer_step": 2},
    "second moment": {"cotangents": 4, "chunk": 3},
    "tuned": {"steps": 9, "learning_rate": 0.02},
}
TEXT = {"text": "w1 w2 w40", "top": 3}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Function that runs the job of a kind in one process, once; returns its folder."""
    found = {}

    def run_alone(kind, **changes):
        if kind not in found:
            found[kind] = tmp_path_factory.mktemp("alone") / "job"
            job = lens_job(folder, found[kind], kind, **changes)
            done = run(1, folder, "lens", job)
            assert done.returncode == 0, done.stderr
        return found[kind]

    return run_alone


def lens_job(folder, out, kind, **changes):
    lens = {"kind": kind} | KINDS[kind] | changes.pop("lens", {})
    return write_job(folder, out, lens=lens, read=TEXT, **changes)


def assert_same_lens(out, wanted):
    safetensors = pytest.importorskip("safetensors")
    files = [
        safetensors.safe_open(x / "lens.safetensors", "numpy") for x in (out, wanted)
    ]
    assert files[0].metadata() == files[1].metadata()
    assert sorted(files[0].keys()) == sorted(files[1].keys())
    for name in files[1].keys():  # noqa: SIM118
        got, want = (file.get_tensor(name) for file in files)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)
    # The pages have the same texts; figures may be rounded otherwise.
    pages = [(x / "lens.html").read_text() for x in (out, wanted)]
    figures = [np.array(re.findall(r"\d+\.\d+", page), float) for page in pages]
    assert len(figures[1]) > 50
    np.testing.assert_allclose(*figures, rtol=1e-3, atol=2e-3)
    texts = [re.sub(r"\d+\.\d+", "", page) for page in pages]
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_fit_the_lens_of_one(kind, folder, alone, tmp_path):
    job = lens_job(folder, tmp_path / "job", kind)
    done = run(2, folder, "lens", job)
    assert done.returncode == 0, done.stdout
    assert_same_lens(tmp_path / "job", alone(kind))
    # The first process alone says how it goes, and writes.
    said = [line for line in done.stdout.splitlines() if "prompts" in line]
    assert said[-1].endswith(
        "batch 9 of 9: 16 prompts" if kind == "tuned" else "batch 4 of 4: 7 prompts"
    )
    assert all(line.startswith("[0]") for line in said)
    assert f"[0] the page is {tmp_path / 'job' / 'lens.html'}" in done.stdout
    # A second time there is nothing to fit, for any number of processes.
    if kind == "jacobian":
        for num in (1, 2):
            again = run(num, folder, "lens", job)
            assert again.returncode == 0, again.stdout
            assert "of 4" not in again.stdout
            assert_same_lens(tmp_path / "job", alone(kind))


@pytest.mark.slow
def test_four_devices_of_two_processes_fit_the_lens_of_one(folder, alone, tmp_path):
    lens = {"batch": 4}
    job = lens_job(folder, tmp_path / "job", "jacobian", lens=lens)
    done = run(2, folder, "lens", job, devices=2)
    assert done.returncode == 0, done.stdout
    assert_same_lens(tmp_path / "job", alone("jacobian"))


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2])
def test_a_killed_fit_ends_the_other_process_and_goes_on(num, folder, alone, tmp_path):
    """With another number of processes too."""
    lens = {"prompts": 30, "kind": "second moment", "cotangents": 0}
    out = tmp_path / "job"
    job = write_job(folder, out, lens=lens, read=TEXT)
    logs = [tmp_path / "log0", tmp_path / "log1"]
    victim = num - 1
    saved = out / "lens" / "step_00000002"
    status, seconds = run_and_kill(victim, folder, "lens", job, saved.exists, logs)
    assert status != 0
    assert seconds < BOUND
    said = logs[1 - victim].read_text(errors="replace")
    assert "another process has ended" in said or "another task died" in said
    assert not (out / "lens.safetensors").exists()
    done = run(num, folder, "lens", job)
    assert done.returncode == 0, done.stdout + done.stderr
    first = re.search(r"batch (\d+) of 15", done.stdout)
    assert first is not None
    assert int(first[1]) > 2
    wanted = write_job(folder, tmp_path / "wanted", lens=lens, read=TEXT)
    undisturbed = run(1, folder, "lens", wanted)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert_same_lens(out, tmp_path / "wanted")
    # From the checkpoint before the last, of this many processes, with the other.
    saved = sorted((out / "lens").glob("step_*"))
    assert [x.stem for x in saved] == ["step_00000014", "step_00000015"]
    assert [x.is_dir() for x in saved] == [num == 2] * 2
    saved[1].rename(tmp_path / "away")
    done = run(3 - num, folder, "lens", job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"batch (\d+) of 15", done.stdout) == ["15"]
    assert_same_lens(out, tmp_path / "wanted")


@pytest.mark.slow
def test_lenses_that_processes_cannot_fit_together_are_named_before_any_work(
    folder, tmp_path
):
    out = tmp_path / "job"
    uneven = write_job(folder, out, lens={"batch": 3})
    done = run(2, folder, "lens", uneven)
    assert done.returncode == 1
    wanted = "lens.batch: the 2 devices of the axis 'data' must divide the batch, got 3"
    assert wanted in done.stdout
    # The same words for other weights, other texts and no model, each in its folder.
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        shutil.copytree(folder, place / "model")
    job = write_job(folder, out, model="model", text="model/texts")
    changed = places[1] / "model" / "model.safetensors"
    data = bytearray(changed.read_bytes())
    data[-2] ^= 1
    changed.write_bytes(data)
    done = run(2, folder, "lens", job, places=places)
    assert done.returncode == 1
    assert "job: all processes must have the same weights of the model" in done.stdout
    shutil.copy(folder / "model.safetensors", changed)
    (places[1] / "model" / "texts" / "0.txt").write_text("w5 w6 " * 200)
    done = run(2, folder, "lens", job, places=places)
    assert done.returncode == 1
    assert "job: all processes must have the same windows of text" in done.stdout
    changed.unlink()
    done = run(2, folder, "collect", job, places=places)
    assert done.returncode == 1
    assert "job: process 1 of 2 failed (FileNotFoundError" in done.stdout
    assert not out.exists()
