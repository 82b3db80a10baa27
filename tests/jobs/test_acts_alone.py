"""Jobs that collect activations alone: the same tokens, without gradients."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.jobs import Collect, Decompose, Evaluate, Job, Train, steps
from toyfeat.jobs.finetune import finetune_job
from toyfeat.jobs.latents import inspect_latents
from toyfeat.jobs.tuning import Finetune, Tuning
from toyfeat.jobs.workspace import open_job, probed_from, readout_from
from toyfeat.lm.collect import read_chunks, tap_windows

SITE = "blocks_0/resid_post"


def job_of(folder, out, readout="none", **more):
    return Job(
        model=str(folder),
        text=str(folder / "texts"),
        out=str(out),
        collect=Collect(
            sites=(SITE,),
            readout=readout,
            tokens=128,
            held_out=64,
            length=16,
            batch=4,
            every=3,
        ),
        decompose=Decompose(bases=("pca", "random"), ranks=(4,)),
        # More tokens a step than there are held-out ones, which nothing is trained on.
        train=Train(kinds=("acts",), ks=(2,), latents=24, steps=6, batch=128),
        evaluate=Evaluate(windows=4, batch=2, uniform=0, largest=0),
        **more,
    )


def rows_of(store):
    chunks = [*read_chunks(store)]
    acts, weights = ([getattr(x, name) for x in chunks] for name in ("acts", "weights"))
    return np.concatenate(acts), np.concatenate(weights)


def test_the_store_has_the_activations_of_one_with_gradients(folder, tmp_path):
    stores = {}
    for readout in ("none", "loss"):
        job = job_of(folder, tmp_path / readout, readout)
        stores[readout] = steps.collect_taps(open_job(job))[SITE]
    assert (stores["none"].readouts, stores["loss"].readouts) == (None, 1)
    acts, weights = rows_of(stores["none"])
    wanted, counts = rows_of(stores["loss"])
    np.testing.assert_allclose(acts, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(weights, counts)
    assert not weights.reshape(-1, 16)[:, -1].any()  # no token follows


def test_nothing_behind_the_site_is_run(folder, tmp_path):
    flops = {}
    for readout in ("none", "loss"):
        work = open_job(job_of(folder, tmp_path / readout, readout))
        program = partial(tap_windows.lower, probed_from(work), (SITE,))
        lowered = program(
            readout_from(work.job), 10.0, work.model.params, work.tokens[:4], 0
        )
        flops[readout] = lowered.compile().cost_analysis()["flops"]
    # One block of three forward, against all of them and two backward.
    assert flops["none"] < 0.3 * flops["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["store", "model"])
def test_a_job_goes_from_the_text_to_its_latents(folder, tmp_path, source):
    work = open_job(job_of(folder, tmp_path, source=source))
    if source == "store":
        steps.collect_taps(work)
    steps.train_job(work.job)
    assert {row["basis"] for row in steps.decompose_job(work) if "basis" in row} == {
        "pca",
        "random",
    }
    scored = [row for row in steps.evaluate_job(work) if row["what"] == "scores"]
    assert {row["method"] for row in scored} == {"acts-k2-s0", "pca-k2", "random-k2"}
    (latents,) = inspect_latents(work, num=3).values()
    assert len(latents) == 3
    # Effects are by the gradients of the loss on held-out text.
    assert all(abs(x.effect) > 0 for latent in latents for x in latent.attributed)
    held = {work.model.tokenizer.decode([i]) for i in work.held_out.ravel()}
    assert {t for x in latents for c in x.activating for t in c.tokens} <= held


@pytest.mark.slow
def test_dictionaries_are_fine_tuned_on_activations_alone(folder, tmp_path):
    sae = ft.dictionaries.topk(16, 24, 2)
    for i in range(2):
        ft.interop.save_saelens(tmp_path / f"{i}", sae, sae.init(jax.random.key(i)))
    settings = Finetune(
        dictionaries=(str(tmp_path / "0"), str(tmp_path / "1")),
        losses=(Tuning(), Tuning(name="shared", term="shared_kl")),
        steps=2,
        windows=2,
    )
    work = open_job(job_of(folder, tmp_path / "out", finetune=settings))
    steps.collect_taps(work)
    scored = {row["method"] for row in finetune_job(work) if "method" in row}
    assert scored == {f"{x} {i}" for x in ("start", "mse", "shared") for i in (0, 1)}


def test_what_needs_gradients_is_refused_before_work(folder, tmp_path):
    job = job_of(folder, tmp_path / "out")
    wants = replace(job, train=replace(job.train, kinds=("acts", "paired")))
    message = r"train.kinds must be of \['acts'\] .*got 'paired', which needs gradients"
    with pytest.raises(ValueError, match=message):
        open_job(wants)
    with pytest.raises(ValueError, match=message):
        steps.train_job(wants)
    work = open_job(replace(job, decompose=Decompose(bases=("pca", "joint pca"))))
    with pytest.raises(ValueError, match=r"decompose.bases must be .*got 'joint pca'"):
        steps.decompose_job(work)
    assert not (tmp_path / "out").exists()


def test_a_batch_without_gradients_has_the_same_dtype_of_weights(folder, tmp_path):
    work = open_job(job_of(folder, tmp_path))
    taps = tap_windows(
        probed_from(work), (SITE,), None, 10.0, work.model.params, work.tokens[:2], 0
    )[SITE]
    assert taps.grads is None
    assert taps.weights.dtype == jnp.float32
