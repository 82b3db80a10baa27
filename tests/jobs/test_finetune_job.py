"""A job that fine-tunes dictionaries, from its store to scores, and what it refuses."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import ROOT

import toyfeat as ft
from toyfeat.interop import load_saelens, save_saelens
from toyfeat.jobs import Collect, Evaluate, Job, open_job, steps
from toyfeat.jobs.config import read_job
from toyfeat.jobs.finetune import _choose_taps, _expander, finetune_job
from toyfeat.jobs.tuning import Finetune, Tuning
from toyfeat.lm.finetune import WindowTaps

SITE, WIDTH = "blocks_1/resid_post", 16
LOSSES = (
    Tuning(),
    Tuning(name="fisher one", term="fisher", draws=1, form="log"),
    Tuning(name="kl", term="kl"),
    Tuning(name="near", term="expanded_kl", draws=2),
    Tuning(name="near mean", term="expanded_kl", draws=2, at="mean"),
    Tuning(name="mse 0", term="shared_kl"),  # as a folder of the first is named
)


def saved(path, width=WIDTH, key=0, latents=24, **about):
    sae = ft.dictionaries.topk(width, latents, 2)
    save_saelens(path, sae, sae.init(jax.random.key(key)), metadata=about)
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
            dictionaries=(saved(out / "start"), saved(out / "other", key=1)),
            losses=LOSSES,
            steps=2,
            windows=3,
        ),
        evaluate=Evaluate(windows=2, batch=2),
    )
    work = open_job(job)
    steps.collect_taps(work)
    return work, finetune_job(work, log=lambda _: None)


def test_every_loss_has_a_dictionary_and_scores(done):
    work, rows = done
    names = [row["method"] for row in rows if row["what"] == "scores"]
    expected = ["start", *(loss.name for loss in LOSSES)]
    assert names == [f"{name} {i}" for i in (0, 1) for name in expected]
    assert all(np.isfinite(row["ce"]) for row in rows if row["what"] == "scores")
    before = load_saelens(work.job.finetune.dictionaries[0])[1]
    tuned = [
        load_saelens(f"{work.job.out}/finetune/{name}/features")[1]
        for name in names[1 : len(expected)]
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
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
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
    fewer = _choose_taps(taps, Tuning(term="fisher", draws=1), None).grads
    np.testing.assert_array_equal(fewer, 2 * grads[:, :, :1])
    assert _choose_taps(taps, Tuning(term="fisher"), None) is taps
    assert _choose_taps(taps, Tuning(term="kl"), None).grads is None
    near = _choose_taps(taps, Tuning(term="expanded_kl"), lambda: "expansion")
    assert near.grads is None
    assert near.expansion == "expansion"


def test_one_expansion_at_the_mean_reconstruction_serves_all(done, monkeypatch):
    work = done[0]
    starts = [load_saelens(path) for path in work.job.finetune.dictionaries]
    acts = np.random.default_rng(0).normal(size=(2, 16, WIDTH)).astype(np.float32)
    points = []

    def record(run, params, taps, point, **options):
        points.append(point)
        return options["draws"]

    monkeypatch.setattr("toyfeat.jobs.finetune.expand_kl", record)
    expand = _expander(work, WindowTaps(acts, np.ones((2, 16))), starts)
    at_mean = Tuning(term="expanded_kl", at="mean")
    assert [expand(i, at_mean) for i in (0, 1)] == [4, 4]  # draws by default
    assert expand(1, Tuning(term="expanded_kl", draws=3)) == 3
    own = [
        np.asarray(sae.decode(params, sae.encode(params, acts.reshape(-1, WIDTH))))
        for sae, params in starts
    ]
    own = [x.reshape(acts.shape) for x in own]
    assert len(points) == 2
    np.testing.assert_allclose(points[0], (own[0] + own[1]) / 2, atol=1e-6)
    np.testing.assert_allclose(points[1], own[1], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": (Tuning("f", "fisher", draws=3),)}, "f wants 3 draws, got a store"),
        ({"losses": (Tuning(), Tuning())}, "must have names of their own"),
        (
            {"losses": (Tuning("e", "expanded_kl", draws=10**7),)},
            r"expansion of 10000000 draws must fit into 2\.1 GB",
        ),
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


def test_members_of_a_population_are_alike(done, tmp_path):
    job = done[0].job
    first, larger = saved(tmp_path / "one"), saved(tmp_path / "more", latents=32)
    alike = ft.dictionaries.topk(WIDTH, 24, 2)
    other = alike._replace(config=alike.config._replace(apply_b_dec_to_input=False))
    save_saelens(tmp_path / "raw", other, other.init(jax.random.key(0)))
    raw = str(tmp_path / "raw")
    for second, name in ((larger, "d_sae.*24, 32"), (raw, "apply_b_dec.*False")):
        others = (first, second)
        losses = (Tuning(name="all", term="shared_kl"),)
        changed = replace(job.finetune, dictionaries=others, losses=losses)
        work = done[0]._replace(job=replace(job, finetune=changed))
        with pytest.raises(ValueError, match=f"all trains .* side by side.*{name}"):
            finetune_job(work)


def test_dictionaries_are_trained_side_by_side_once(done):
    """Both are of one run, in a folder that is not that of another loss."""
    folder = Path(done[0].job.out) / "finetune"
    tuned = [load_saelens(folder / f"mse 0 {i}" / "features")[1] for i in (0, 1)]
    plain = [load_saelens(folder / f"mse {i}" / "features")[1] for i in (0, 1)]
    for mine, theirs in zip(tuned, plain, strict=True):
        assert np.abs(mine["W_dec"] - theirs["W_dec"]).max() > 1e-6
    assert np.abs(tuned[0]["W_dec"] - tuned[1]["W_dec"]).max() > 1e-3
    trained = {path.parent.name for path in folder.glob("*/metrics.jsonl")}
    assert {"mse 0", "mse 1", "mse 0 together"} <= trained
    assert not {"mse 0 0", "mse 0 1"} & trained


def test_the_example_is_a_job():
    job = read_job(ROOT / "examples/smollm2_finetune.toml")
    terms = [loss.term for loss in job.finetune.losses]
    assert terms == ["mse", "fisher", "kl", "shared_kl", "expanded_kl"]
    assert job.finetune.steps * job.finetune.windows * 64 <= job.collect.tokens
