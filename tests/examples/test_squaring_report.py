import json
import re
from collections import Counter
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import run_in_turn, run_python
from scipy.linalg import subspace_angles

import toyfeat as ft
from examples.squaring import cases, page
from examples.squaring.figures import draw_case
from examples.squaring.measure import measure_case, train_case
from examples.squaring.network import Squaring
from toyfeat.report.plots import png
from toyfeat.report.tables import settings


def values(rows, name):
    return next(row for row in rows if row.name == name).values


@pytest.fixture(scope="module")
def looked():
    """Two biased networks, briefly trained, with everything the report shows."""
    case = cases.CASES[2]._replace(steps=1000)
    nets = train_case(jax.random.key(3), case, seeds=2)
    found, rows = measure_case(jax.random.key(4), case, nets, num=3000)
    return case, nets, found, rows


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_figures_equal_float64_numpy(looked, seed):
    _, nets, found, rows = looked
    params = {k: np.asarray(v[seed], np.float64) for k, v in nets.params.items()}
    x = np.asarray(found.inputs[seed], np.float64)
    acts = np.maximum(x @ params["w_in"] + params["b_in"], 0)
    y = acts @ params["w_out"]
    error = np.mean((y - x**2) ** 2)
    assert values(rows, "mean squared error")[seed] == pytest.approx(error, rel=1e-3)
    spectrum, vectors = np.linalg.eigh(np.cov(acts.T))
    spectrum, vectors = spectrum[::-1], vectors[:, ::-1]
    for index, name in enumerate(cases.SHARES):
        share = spectrum[index] / spectrum.sum()
        assert values(rows, name)[seed] == pytest.approx(share, abs=1e-4)
    e = params["w_in"][0]
    span = np.stack([np.maximum(e, 0), np.maximum(-e, 0)], 1)
    angles = np.cos(np.sort(subspace_angles(span, vectors[:, :2])))
    assert values(rows, cases.COS_1)[seed] == pytest.approx(angles[0], abs=1e-3)
    assert values(rows, cases.COS_2)[seed] == pytest.approx(angles[1], abs=1e-3)
    scores = (acts - acts.mean(0)) @ vectors[:, :2]
    corr = [np.corrcoef(scores[:, j], x[:, 0] ** 2)[0, 1] for j in range(2)]
    assert values(rows, cases.R2_1)[seed] == pytest.approx(corr[0] ** 2, abs=2e-3)
    assert values(rows, cases.R2_2)[seed] == pytest.approx(corr[1] ** 2, abs=2e-3)
    assert values(rows, cases.CORR_2)[seed] == pytest.approx(abs(corr[1]), abs=2e-3)
    reader = params["w_out"][:, 0] / np.linalg.norm(params["w_out"])
    # Components past the float32 rank are not shown, in float64 they exist.
    kept = spectrum > 1e-5 * spectrum[0]
    best = np.abs(reader @ vectors[:, kept]).max()
    assert values(rows, cases.BEST_PC)[seed] == pytest.approx(best, abs=2e-2)
    one = vectors[:, :1]
    projected = (acts - acts.mean(0)) @ one @ one.T + acts.mean(0)
    lost = np.sum((y - projected @ params["w_out"]) ** 2) / np.sum((y - y.mean(0)) ** 2)
    assert values(rows, cases.PC_PRESERVED)[seed] == pytest.approx(1 - lost, abs=1e-3)


def test_gradient_pca_finds_the_reader_and_centring_deletes_it(looked):
    _, _, found, rows = looked
    assert set(values(rows, cases.GRAD_RANK)) == {1.0}
    assert min(values(rows, cases.GRAD_COS)) >= 0.9999
    assert set(values(rows, cases.CENTRED_RANK)) == {0.0}
    centred = jax.tree.map(lambda leaf: leaf[0], found.centred)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(centred))
    assert "centring removed everything" in ft.describe(centred)
    assert min(values(rows, cases.PRESERVED)) >= 0.999


@pytest.mark.slow
def test_no_bias_network_has_exactly_two_rays(key):
    case = cases.CASES[0]._replace(steps=1500)
    nets = train_case(key, case, seeds=2)
    _, rows = measure_case(key, case, nets, num=3000)
    assert max(values(rows, cases.THIRD)) <= 1e-6
    assert min(values(rows, cases.COS_2)) >= 0.9999
    assert max(values(rows, cases.SHARE_ERRORS[0])) <= 0.02


@pytest.mark.slow
def test_many_functions_show_the_span_and_not_the_readers(key):
    task = Squaring(6, 18, low=-0.5, probability=0.2)
    case = cases.Case("many", "many", task, steps=1500, batch=128, learning_rate=3e-3)
    nets = train_case(key, case, seeds=2)
    found, rows = measure_case(key, case, nets, num=4000)
    assert min(values(rows, cases.SPAN)) >= 0.99
    coverage = values(rows, "coverage of the readers, gradient PCA")
    for seed in range(2):
        x = np.asarray(found.inputs[seed], np.float64)
        p = {k: np.asarray(v[seed], np.float64) for k, v in nets.params.items()}
        acts = np.maximum(x @ p["w_in"] + p["b_in"], 0)
        rotation = np.asarray(nets.rotation[seed], np.float64)
        delta = 2 * (acts @ p["w_out"] - x**2 @ rotation.T)
        grads = delta @ p["w_out"].T
        top = np.linalg.eigh(grads.T @ grads)[1][:, ::-1][:, :6].T
        oracle = ft.metrics.match_features(top, rotation.T @ p["w_out"].T).coverage
        assert coverage[seed] == pytest.approx(oracle, abs=0.02)


@pytest.mark.slow
def test_pictures_are_drawn_for_both_kinds_of_case(looked, key):
    case, nets, found, _ = looked
    one = jax.tree.map(lambda leaf: leaf[0], (found, nets.params))
    assert png(draw_case(case, *one)).startswith(b"\x89PNG")


class Outline(HTMLParser):
    """Headings of a page, and how many tables and drawings are in front of folds."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.shown, self.folded = [], Counter(), Counter()
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        inside = self.folded if "details" in self._open else self.shown
        inside[tag] += 1
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open[-1:] == ["h2"]:
            self.headings.append(data)


@pytest.fixture
def written(looked, tmp_path, monkeypatch):
    """The text of the page and the rows that it shows; nothing is drawn."""
    case, nets, found, rows = looked
    monkeypatch.setattr(page, "png", lambda drawn: b"png")
    header = settings({}, seconds=1)
    path = page.write_report(tmp_path, [(case, nets, found)], rows, header)
    return path.read_text(), rows


def test_the_page_tells_its_story_first_and_folds_the_long_table(written):
    text, rows = written
    outline = Outline(text)
    assert outline.headings == [
        "What was asked",
        "What PCA of the activations returns",
        "What PCA of the gradients returns",
        "All networks in one table",
        "bias, U[-1, 1]",
        "How to read the figures",
    ]
    assert outline.shown["table"] == 1
    assert outline.shown["figure"] == 1
    assert outline.shown["details"] == 1
    assert outline.folded["table"] == 1
    assert outline.folded["img"] == 4
    assert outline.folded["tr"] == 1 + len(rows)
    bounded = [row.holds for row in rows if row.bound is not None]
    title = f"{sum(bounded)} of {len(bounded)} expectations are met</summary>"
    assert f"Picture and {len(rows)} figures; {title}" in text
    assert "report.json" in text


def test_the_story_has_the_medians_of_the_rows(written):
    text, rows = written
    best, cos, kept, variance = (
        np.median(values(rows, name))
        for name in (
            cases.BEST_PC,
            cases.GRAD_COS,
            cases.PRESERVED,
            cases.PC_VARIANCE,
        )
    )
    assert f"has |cos| {best:.2f} with the reader" in text
    assert f"|cos| with the reader is {cos:.4f}" in text
    assert f"{100 * kept:.0f} % of the output" in text
    assert f"keeps {100 * variance:.0f} % of the variance" in text
    # Nobody has to read 6.90e-16.
    assert not re.search(r">[^<]*\de-\d\d[^<]*</td>", text)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.slug)
def test_every_case_has_one_sentence(case):
    sentence = page.SENTENCES[case.slug]
    assert re.fullmatch(r"[A-Z]([^.!?]|\.(?=\S))+\.", sentence)


@pytest.fixture(scope="module")
def figure_names():
    """Names of the reported figures, by (bias, number of features)."""
    names = {}
    for case in (cases.CASES[0], cases.CASES[2], cases.CASES[-1]):
        nets = train_case(jax.random.key(0), case._replace(steps=1, batch=4), seeds=1)
        _, rows = measure_case(jax.random.key(0), case, nets, num=64)
        names[case.task.bias, case.task.features] = {row.name for row in rows}
    return names


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.slug)
def test_every_bound_belongs_to_a_figure_that_is_reported(case, figure_names):
    reported = figure_names[case.task.bias, case.task.features]
    assert set(cases.expected(case)) <= reported


@pytest.mark.slow
def test_the_demo_script_writes_a_whole_report(tmp_path):
    out = tmp_path / "demo"
    options = "--out", out, "--seeds", 2, "--samples", 500, "--shorten", 500
    done = run_python("scripts/demo.py", *options, "--only", "residual", "many")
    assert done.returncode in (0, 1), done.stderr
    assert "expectations missed" in done.stdout
    report_json = json.loads((out / "report.json").read_text())
    shown = {row["case"] for row in report_json["rows"]}
    assert shown == {case.name for case in cases.CASES[-2:]}
    html = (out / "report.html").read_text()
    # Two drawings of the story, four of a case of one input and three of the other.
    assert html.count("data:image/png;base64,") == 2 + 4 + 3
    assert {path.stem for path in out.glob("*.png")} == {"residual", "many"}
    assert 'src="http' not in html
    assert not list(out.glob("*.partial"))


@pytest.mark.slow
def test_the_demo_script_refuses_bad_options_before_it_trains():
    messages = {
        ("--out", "pyproject.toml"): "cannot write to pyproject.toml",
        ("--seeds", "0"): "--seeds must be at least 1",
        ("--sead", "1"): "sead",
        ("--only", "nothing"): "nothing",
    }
    ends = run_in_turn([("scripts/demo.py", *options) for options in messages])
    for message, (status, output) in zip(messages.values(), ends, strict=True):
        assert status != 0
        assert message in output
        assert "Traceback" not in output
