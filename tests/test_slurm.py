"""The batch scripts: their syntax, what they would run, and what signals do to them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import ROOT

SCRIPT = ROOT / "scripts" / "slurm" / "toyfeat.sbatch"

# Stand-ins for SLURM's commands: they write down how they were called.
_SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
trap 'echo "srun got TERM" >> "$CALLS"; exit 0' TERM
for ((i = 0; i < ${SRUN_TENTHS:-0}; i++)); do sleep .1; done
exit ${SRUN_STATUS:-0}
"""
_SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
"""


@pytest.fixture
def cluster(tmp_path):
    """Folder of the stand-ins, and the environment that finds them."""
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {"CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "17"}
    return tmp_path, env


def calls(folder):
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("name", ["collect", "train", "lens"])
def test_the_batch_script_runs_a_step_on_every_node(name, cluster):
    folder, env = cluster
    assert subprocess.run(["bash", "-n", SCRIPT], timeout=10).returncode == 0
    head = [x for x in SCRIPT.read_text().splitlines() if x.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in head
    assert "#SBATCH --signal=B:USR1@120" in head
    command = ["bash", SCRIPT, name, "my job.toml"]
    done = subprocess.run(command, env=env, timeout=30)
    assert done.returncode == 0
    wanted = f"srun --kill-on-bad-exit=1 toyfeat {name} my job.toml"
    assert calls(folder) == [wanted]
    # A step that fails is the end: no way back into the queue.
    done = subprocess.run(command, env=env | {"SRUN_STATUS": "3"}, timeout=30)
    assert done.returncode == 3
    assert calls(folder) == [wanted, wanted]


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)]
)
def test_a_signal_stops_the_step_and_puts_the_job_back(number, requeued, cluster):
    folder, env = cluster
    env |= {"SRUN_TENTHS": "200"}
    with subprocess.Popen(["bash", SCRIPT, "train", "job.toml"], env=env) as shell:
        wait_for(lambda: calls(folder), 20)
        time.sleep(0.3)  # until its trap is set
        shell.send_signal(number)
        assert shell.wait(timeout=20) == 0
    assert "srun got TERM" in calls(folder)
    assert ("scontrol requeue 17" in calls(folder)) == requeued


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_job_that_is_put_back_goes_on_at_its_checkpoint(cluster):
    """Two real processes behind ``srun``."""
    folder, env = cluster
    text = _SRUN.splitlines()[:2]
    launch = f'"{sys.executable}" "{ROOT}/scripts/launch_local.py" -n 2'
    text += [f'exec {launch} "{sys.executable}" -m soak_job "${{@:4}}"']
    (folder / "srun").write_text("\n".join(text))
    (folder / "soak_job.py").write_text(_JOB)
    run = folder / "run"
    env |= {"PYTHONPATH": f"{ROOT}:{folder}", "JAX_PLATFORMS": "cpu"}
    command = ["bash", SCRIPT, "train", run]
    options = {"env": env, "cwd": folder, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, **options) as shell:
        try:
            wait_for((run / "metrics.jsonl").exists, 90)
            shell.send_signal(signal.SIGUSR1)
            assert shell.wait(timeout=90) == 0
        finally:  # or the block waits for ever
            shell.terminate()
    assert "scontrol requeue 17" in calls(folder)
    saved = [path.name for path in (run / "checkpoint").glob("step_*")]
    assert len(saved) == 1
    assert 0 < int(saved[0][5:]) < 100_000
    # As after the queue: the same script, to an end that is near now.
    end = int(saved[0][5:]) + 50
    options["env"] |= {"STEPS": str(end)}
    done = subprocess.run(command, **options, timeout=120)
    assert done.returncode == 0
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps[-1] == end
    assert sorted(set(steps)) == steps


# A step of SLURM's: trains a small dictionary, slowly.
_JOB = """
import os, sys, time
import jax, numpy as np
from jax.sharding import AxisType
import toyfeat as ft
from toyfeat import processes
from toyfeat.data.parts import batch_part

processes.join_processes(timeout=60)
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
sae = ft.dictionaries.shard(ft.dictionaries.topk(4, 8, 2), mesh, latents=None)
trainer = ft.trainer(sae, ft.losses.default(sae))
part = batch_part("job", 8, mesh, "data")

def batches(step):
    acts = np.random.default_rng(step).normal(size=(8, 4)).astype(np.float32)
    return part.assemble(ft.Taps(acts[part.rows], None, np.ones(4, np.float32)))

state = jax.jit(trainer.init)(jax.random.key(0))
steps = int(os.environ.get("STEPS", 100_000))
ft.fit(trainer, state, batches, steps=steps, directory=sys.argv[1], chunk=10)
"""
