"""The command that fits a lens, reads a text and writes a page."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from toyfeat import lens as lenses
from toyfeat.jobs import open_job, read_job
from toyfeat.jobs.lens import FILE, LensReading, run_lens
from toyfeat.report.lens import _errors, heat_map, write_lens


def job_of(folder, out, *lines):
    path = out / "job.toml"
    path.write_text(
        f"model = '{folder}'\ntext = '{folder}/texts'\nout = '{out}/out'\n"
        "[collect]\nsites = ['blocks_1/resid_post']\ntokens = 48\nheld_out = 8\n"
        "length = 8\nevery = 3\n"
        "[lens]\nprompts = 5\nbatch = 2\nskip_first = 2\nchunk = 16\n"
        + "\n".join(lines)
    )
    return open_job(read_job(path))


def test_a_lens_is_fitted_saved_and_shown(folder, tmp_path):
    work = job_of(folder, tmp_path, "[read]\ntext = 'w1 w2 w40'\ntop = 3")
    steps = []
    run = run_lens(work, steps.append)
    assert (steps[-1].step, steps[-1].prompts) == (3, 5)
    assert run.tokens == ["w1", "w2", "w40"]
    assert [x.name for x in run.readings] == ["jacobian", "logit"]
    # The final stream is the model's own output, by both lenses.
    model = lenses.from_decoder(work.model.config)
    logits = model.probed(work.model.params, np.array([[1, 2, 40]]), {})[0][0]
    for reading in run.readings:
        assert reading.sites == model.sites
        assert reading.tops.shape == reading.shares.shape == (3, 3, 3)
        wanted = np.sort(jax.nn.softmax(logits))[:, ::-1][:, :3]
        np.testing.assert_allclose(reading.shares[-1], wanted, rtol=1e-4)
        assert reading.tops[-1, 0, 0] == f"w{int(logits[0].argmax())}"
    # The file is the lens of the first five windows.
    saved = lenses.load(tmp_path / "out" / FILE, model, work.model.params)
    assert saved.about["prompts"] == 5
    assert saved.about["revision"] == work.weights
    acc = lenses.mean_jacobian(model, 16, skip_first=2, chunk=16)
    state = jax.jit(acc.update)(acc.init(), work.model.params, work.tokens[:5])
    wanted = acc.finish(state).matrices["blocks_0/resid_post"]
    matrix = saved.maps["blocks_0/resid_post"].matrices[0]
    np.testing.assert_allclose(matrix, wanted, atol=1e-5)
    # The page has both, and the folder refuses a lens of other settings.
    text = Path(write_lens(tmp_path / "out", run)).read_text()
    assert text.count('<table class="lens">') == 2
    assert all(f">{name}</th>" in text for name in ("output", "layer 1", "layer 0"))
    other = job_of(folder, tmp_path, "chain = true")
    with pytest.raises(ValueError, match=r"has work with lens.chain = False"):
        run_lens(other)


def test_too_few_windows_or_too_long_a_text_are_refused(folder, tmp_path):
    work = job_of(folder, tmp_path)
    path = tmp_path / "job.toml"
    path.write_text(path.read_text().replace("prompts = 5", "prompts = 9"))
    with pytest.raises(ValueError, match=r"lens.prompts must be windows.*are 6, got 9"):
        run_lens(work._replace(job=read_job(path)))
    long = job_of(folder, tmp_path, f"[read]\ntext = '{'w1 ' * 600}'")
    with pytest.raises(ValueError, match=r"1 \.\. 512 tokens, got 600"):
        run_lens(long)
    assert not (tmp_path / "out").exists()


def test_texts_of_the_model_are_escaped():
    reading = LensReading(
        name="jacobian",
        sites=("a", "b"),
        tops=np.array([[["<b>", '"']], [["\n", "  "]]], object),
        shares=np.array([[[0.5, 0.1]], [[np.nan, 0.1]]]),
    )
    text = heat_map(["<i>"], reading)
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;" in text
    assert "0.100 ␣␣" in text
    assert "nan," not in text
    assert text.index(">output<") < text.index(">a<")  # the final layer is on top


def test_rows_of_the_heat_map_are_in_the_order_of_the_depth():
    sites = tuple(f"blocks_{i}/resid_post" for i in range(12))
    tops = np.array([[[f"of {i}"]] for i in range(12)], object)
    text = heat_map(["a"], LensReading("jacobian", sites, tops, np.ones((12, 1, 1))))
    names = ["output", *(f"layer {i}" for i in range(10, -1, -1))]
    places = [text.index(f">{name}</th>") for name in names]
    assert places == sorted(places)
    for place, i in zip(places, range(11, -1, -1), strict=True):
        cell = text.index(f">of {i}<")
        assert text[place:cell].count("</th>") == 1  # in the row of its layer


def test_errors_are_listed_in_the_order_of_the_depth():
    sites = [f"blocks_{i}/resid_post" for i in range(11)]
    figures = {site: np.float32(0.5) for site in sorted(sites)}
    estimate = lenses.Estimate({}, figures, figures, figures, np.int32(2))
    text = _errors(sites, estimate)
    places = [text.index(f"<td>layer {i}</td>") for i in range(11)]
    assert places == sorted(places)


def test_a_tuned_lens_is_trained_saved_and_shown(folder, tmp_path):
    lines = "kind = 'tuned'\nsteps = 40\nlearning_rate = 0.02\n[read]\ntext = 'w1 w2'"
    work = job_of(folder, tmp_path, lines)
    seen = []
    run = run_lens(work, seen.append)
    # The last batch of three has one window, and they come again and again.
    assert [x.prompts for x in seen[:4]] == [2, 4, 5, 7]
    assert (seen[-1].step, seen[-1].prompts) == (40, 67)
    assert [x.name for x in run.readings] == ["tuned", "logit"]
    assert run.estimate is None
    # Nearer to the output than the logit lens is, on the text that it was trained on.
    model, params = lenses.from_decoder(work.model.config), work.model.params
    mask = np.arange(8) % 7 >= 2  # without two tokens at the start and one at the end
    batch = (work.tokens[:5], np.broadcast_to(mask, (5, 8)))
    plain = lenses.logit_lens(model, params)
    near = lenses.output_divergence(model, params, run.lens, [batch])
    far = lenses.output_divergence(model, params, plain, [batch])
    assert all(near[site] < 0.5 * far[site] for site in model.sites[:-1])
    # The page has the divergences on the text that is held out.
    held_out = work.held_out
    batch = (held_out, np.broadcast_to(mask, held_out.shape))
    wanted = lenses.output_divergence(model, params, run.lens, [batch])
    assert run.divergences is not None
    tuned = run.divergences["tuned"]
    for site in model.sites[:-1]:
        assert abs(tuned[site] - wanted[site]) < 1e-4 * wanted[site]
    saved = lenses.load(tmp_path / "out" / FILE, model, work.model.params)
    assert saved.kind == "tuned"
    assert saved.about["prompts"] == 5
    text = Path(write_lens(tmp_path / "out", run)).read_text()
    assert "How far from the output" in text
    assert f"{tuned['blocks_0/resid_post']:.3f}" in text
    with pytest.raises(ValueError, match=r"held_out must be tokens .* got 8"):
        run_lens(work._replace(held_out=work.held_out[:0]))
    long = work.job.lens
    job = dataclasses.replace(work.job, lens=dataclasses.replace(long, skip_first=7))
    with pytest.raises(
        ValueError, match=r"collect.length must be more than the 7 \+ 1"
    ):
        run_lens(work._replace(job=job))


def test_one_of_so_many_layers_has_a_lens(folder, tmp_path):
    run = run_lens(job_of(folder, tmp_path, "layer_step = 2\n[read]\ntext = 'w1'"))
    assert list(run.lens.maps) == ["blocks_0/resid_post"]
    assert run.readings[0].sites == ("blocks_0/resid_post", "blocks_2/resid_post")
