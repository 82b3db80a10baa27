"""A job that fine-tunes dictionaries, from its store to scores, and what it refuses."""

import runpy
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from processes import ROOT

import toyfeat as ft
from toyfeat.interop import load_saelens, save_saelens
from toyfeat.jobs import Collect, Evaluate, Job, open_job, steps
from toyfeat.jobs.config import read_job
from toyfeat.jobs.finetune import _select_draws, finetune_job
from toyfeat.jobs.tuning import Finetune, Tuning
from toyfeat.lm.finetune import WindowTaps

SITE, WIDTH = "blocks_1/resid_post", 16
LOSSES = (
    Tuning(),
    Tuning(name="fisher one", term="fisher", draws=1, form="log"),
    Tuning(name="kl", term="kl"),
)


def saved(path, width=WIDTH, **about):
    sae = ft.dictionaries.topk(width, 24, 2)
    save_saelens(path, sae, sae.init(jax.random.key(0)), metadata=about)
    return str(path)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A collected job, with all losses on one dictionary of another library."""
    out = tmp_path_factory.mktemp("tuned")
    job = Job(
        model=str(folder),
        text=str(folder / "texts"),
        out=str(out / "job"),
        collect=Collect(
            sites=(SITE,),
            readout="labels",
            draws=2,
            skip=64,
            tokens=128,
            held_out=32,
            length=16,
            batch=4,
            every=3,
            dtype="bfloat16",
        ),
        finetune=Finetune(
            dictionaries=(saved(out / "start"),), losses=LOSSES, steps=2, windows=3
        ),
        evaluate=Evaluate(windows=2, batch=2),
    )
    work = open_job(job)
    steps.collect_taps(work)
    return work, finetune_job(work, log=lambda _: None)


def test_every_loss_has_a_dictionary_and_scores(done):
    work, rows = done
    names = [row["method"] for row in rows if row["what"] == "scores"]
    assert names == ["start 0", "mse 0", "fisher one 0", "kl 0"]
    assert all(np.isfinite(row["ce"]) for row in rows if row["what"] == "scores")
    before = load_saelens(work.job.finetune.dictionaries[0])[1]
    tuned = [
        load_saelens(f"{work.job.out}/finetune/{name}/features")[1]
        for name in names[1:]
    ]
    for params in (before, *tuned[1:]):
        assert np.abs(params["W_dec"] - tuned[0]["W_dec"]).max() > 1e-6


def test_again_nothing_is_trained(done, tmp_path, monkeypatch, capsys):
    work, rows = done
    monkeypatch.setattr("toyfeat.jobs.finetune.finetune", None)
    assert finetune_job(work) == rows
    # The script runs a job file; an error of it is one line.
    path = tmp_path / "job.toml"
    path.write_text(f'model = "{work.job.model}"\ntext = "{work.job.text}"\n')
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(path)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts/finetune.py"), run_name="__main__")
    assert "Traceback" not in capsys.readouterr().err


def test_tokens_that_another_job_trained_on_are_skipped(done):
    work = done[0]
    collect = replace(work.job.collect, skip=0, tokens=192)
    whole = open_job(replace(work.job, collect=collect)).tokens
    np.testing.assert_array_equal(work.tokens, whole[4:])


def test_fewer_draws_are_as_large_alone():
    grads = np.ones((1, 2, 4, 3), np.float32)
    taps = WindowTaps(np.ones((1, 2, 3)), np.ones((1, 2)), grads)
    fewer = _select_draws(taps, Tuning(term="fisher", draws=1)).grads
    np.testing.assert_array_equal(fewer, 2 * grads[:, :, :1])
    assert _select_draws(taps, Tuning(term="fisher")) is taps
    assert _select_draws(taps, Tuning(term="kl")).grads is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": (Tuning("f", "fisher", draws=3),)}, "f wants 3 draws, got a store"),
        ({"losses": (Tuning(), Tuning())}, "must have names of their own"),
        ({"steps": 3}, "at most the 8 windows"),
        ({"dictionaries": ("width",)}, "must be a dictionary of width 16"),
        ({"dictionaries": ("site",)}, r"is of site 'blocks_0/mlp_out', and the job"),
        ({"dictionaries": ("weights",)}, "is of weights 'others', and the job of"),
    ],
)
def test_what_cannot_be_tuned_is_said_before(done, tmp_path, changes, message):
    job = done[0].job
    if "dictionaries" in changes:
        (kind,) = changes["dictionaries"]
        about = {"site": "blocks_0/mlp_out"} if kind == "site" else {}
        about |= {"weights": "others"} if kind == "weights" else {}
        width = 8 if kind == "width" else WIDTH
        changes = {"dictionaries": (saved(tmp_path / kind, width, **about),)}
    work = done[0]._replace(job=replace(job, finetune=replace(job.finetune, **changes)))
    with pytest.raises(ValueError, match=message):
        finetune_job(work)


def test_the_example_is_a_job():
    job = read_job(ROOT / "examples/smollm2_finetune.toml")
    assert [loss.term for loss in job.finetune.losses] == ["mse", "fisher", "kl"]
    assert job.finetune.steps * job.finetune.windows * 64 <= job.collect.tokens
