import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ROOT, run_python

import toyfeat as ft
from toyfeat.data.store import verify_store
from toyfeat.interop import load_saelens
from toyfeat.jobs import (
    PACKAGES,
    Attribution,
    Collect,
    Decompose,
    Evaluate,
    Job,
    Train,
    evaluate,
    steps,
)
from toyfeat.jobs.evaluate import compute_bases
from toyfeat.jobs.latents import inspect_latents
from toyfeat.jobs.results import Rows
from toyfeat.jobs.sites import model_taps, open_site, open_taps
from toyfeat.jobs.workspace import open_job
from toyfeat.lm.collect import fingerprint, read_chunks
from toyfeat.lm.windows import site_folder
from toyfeat.models.decoder import Decoder

SITE = "blocks_1/resid_post"
KINDS = ("acts", "attribution", "gradients", "paired")


def job_of(folder, out, **more):
    return Job(
        model=str(folder),
        text=str(folder / "texts"),
        out=str(out),
        collect=Collect(
            sites=(SITE,),
            readout="sampled",
            draws=2,
            tokens=256,
            held_out=64,
            length=16,
            batch=4,
            rows_per_shard=100,
            every=3,
        ),
        decompose=Decompose(ranks=(4, 16)),
        train=Train(site=SITE, kinds=KINDS, ks=(2,), latents=24, steps=6, batch=64),
        evaluate=Evaluate(windows=5, batch=2, uniform=20, largest=6, pair_batch=8),
    )


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Done(dict):
    """What the steps gave, and what they said."""


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A job from beginning to end, with a step too early now and then."""
    out = tmp_path_factory.mktemp("job")
    job, found = job_of(folder, out), Done(said=[])
    run = open_job(job)
    for step, given in (
        ("train_job", job),
        ("decompose_job", run),
        ("evaluate_job", run),
    ):
        with pytest.raises(FileNotFoundError, match=r"nothing of .*toyfeat collect"):
            getattr(steps, step)(given)
    found |= {"job": job, "run": run, "out": out}
    found["stores"] = steps.collect_taps(run)
    with pytest.raises(FileNotFoundError, match="toyfeat train"):
        steps.evaluate_job(run)
    steps.train_job(job, found["said"].append)
    found["decomposed"] = steps.decompose_job(run, found["said"].append)
    found["evaluated"] = steps.evaluate_job(run, found["said"].append)
    return found


@pytest.mark.slow
def test_text_is_cut_into_windows_of_texts_of_their_own(done):
    run, texts = done["run"], {}
    for i in range(6):
        text = Path(run.job.text, f"{i}.txt").read_text()
        ids = run.model.tokenizer.encode(text).ids
        texts[i] = {tuple(ids[s : s + 16]) for s in range(0, 192, 16)}
    assert run.tokens.shape == (16, 16)
    assert run.held_out.shape == (4, 16)
    away = texts[1] | texts[4]  # every third
    rest = texts[0] | texts[2] | texts[3] | texts[5]
    assert {tuple(w) for w in run.held_out.tolist()} <= away
    assert {tuple(w) for w in run.tokens.tolist()} <= rest
    assert len({tuple(w) for w in run.tokens.tolist()}) == 16


def test_the_store_is_whole_and_says_what_it_is_of(done):
    store = done["stores"][SITE]
    verify_store(store.path)
    assert (store.rows, store.dim, store.readouts) == (256, 16, 2)
    about = store.metadata
    assert (about["site"], about["readout"], about["draws"]) == (SITE, "sampled", 2)
    assert about["weights"] == fingerprint(done["run"].model.params)
    size = sum(p.stat().st_size for p in store.path.glob("*.bin"))
    wanted = f"256 tokens at 1 sites, {size / 1e6:,.0f} MB"
    assert steps.describe_size(done["run"]) == wanted
    stats = open_site(done["run"], SITE).stats
    model = from_model(done["run"])
    acts = np.asarray(model(done["run"].tokens))[:, 1:-1].reshape(-1, 16)
    np.testing.assert_allclose(stats.mean, acts.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(
        stats.scatter / stats.weight, np.cov(acts.T, bias=True), atol=1e-4
    )


def from_model(run):
    probed = ft.from_linen(Decoder(run.model.config))
    return jax.jit(lambda x: probed(run.model.params, jnp.asarray(x), {})[1][SITE])


def test_every_dictionary_has_a_folder(done):
    for kind in KINDS:
        folder = done["out"] / "train" / f"{kind}-k2-s0"
        assert (folder / "metrics.jsonl").exists()
        sae, params = load_saelens(folder / "features")
        assert (sae.config.d_in, sae.config.d_sae, sae.config.k) == (16, 24, 2)
        assert all(bool(jnp.isfinite(x).all()) for x in params.values())
        about = json.loads((folder / "features" / "cfg.json").read_text())["metadata"]
        assert (about["kind"], about["site"]) == (kind, SITE)
    assert [line.split(":")[0] for line in done["said"][:4]] == [
        f"{kind}-k2-s0" for kind in KINDS
    ]


def test_decompose_has_spectra_and_what_is_kept(done):
    rows = done["decomposed"]
    assert rows == rows_in(done["out"] / "decompose.jsonl")
    names = {"pca", "gradient pca", "joint pca", "random"}
    spectra = {row["basis"]: row for row in rows if "basis" in row}
    assert spectra.keys() == names
    stats = open_site(done["run"], SITE).stats
    values = np.linalg.eigvalsh(np.float64(stats.scatter / stats.weight))[::-1]
    np.testing.assert_allclose(spectra["pca"]["spectrum"], values, rtol=1e-3, atol=1e-5)
    ratio = values.sum() ** 2 / (values**2).sum()
    assert spectra["pca"]["participation"] == pytest.approx(ratio, rel=1e-3)
    assert spectra["random"]["participation"] == pytest.approx(16)
    scores = {row["method"]: row for row in rows if "method" in row}
    assert scores.keys() == {f"{name}, 4" for name in names}  # 16 would be all
    assert scores["pca, 4"]["explained"] > scores["random, 4"]["explained"]


def test_evaluate_has_scores_of_all_and_baselines(done):
    rows = done["evaluated"]
    assert rows == rows_in(done["out"] / "evaluation.jsonl")
    scores = {r["method"]: r for r in rows if r["what"] == "scores"}
    bases = ("pca", "gradient pca", "joint pca", "random")
    names = {f"{kind}-k2-s0" for kind in KINDS}
    ways = "gradients sampled", "paired sampled", "paired alone"
    others = {f"{name}-k2" for name in bases} | {f"{way}-k2-s0" for way in ways}
    assert scores.keys() == names | others
    for row in scores.values():
        assert row["l0"] <= 2
        assert row["kl"] >= 0
        assert 0 <= row["unexplained"] <= 1
        assert 0 <= row["dead"] <= 1
        assert row["ce"] > 0
    faithful = {r["method"]: r for r in rows if r["what"] == "faithfulness"}
    assert faithful.keys() == names | {"pca-k2", "random-k2"}
    for row in faithful.values():
        assert row["pairs"] == len(row["effects"]) == 26
        again = ft.metrics.attribution_faithfulness(*np.array(row["effects"]).T)
        assert [row[k] for k in ("correlation", "slope", "error")] == list(again[:3])


@pytest.fixture
def copy(done, tmp_path):
    """The finished job again, in a folder of its own."""
    shutil.copytree(done["out"], tmp_path / "job")
    return replace(done["job"], out=str(tmp_path / "job"))


def content(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def never(*_, **__):
    raise AssertionError("computed again")


def test_again_nothing_is_computed(copy, done, monkeypatch, capsys):
    out = Path(copy.out)
    before = content(out)
    for module, names in {
        steps: ("train_one", "store_moments"),
        evaluate: ("evaluate_replacements", "faithfulness", "tap_held_out"),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, never)
    run = done["run"]._replace(job=copy)
    told = []
    steps.collect_taps(run, lambda now, total: told.append((now, total)))
    steps.train_job(copy)
    assert len(steps.decompose_job(run)) == len(done["decomposed"])
    assert len(steps.evaluate_job(run)) == len(done["evaluated"])
    assert told == [(256, 256)]
    assert capsys.readouterr().out == ""
    assert content(out) == before


def test_without_pairs_attributions_are_not_checked(copy, done, monkeypatch):
    out = Path(copy.out)
    path = out / "evaluation.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(x for x in lines if '"faithfulness"' not in x))
    said = json.loads((out / "job.json").read_text())
    none = {"evaluate.uniform": 0, "evaluate.largest": 0}
    (out / "job.json").write_text(json.dumps(said | none))
    monkeypatch.setattr(evaluate, "faithfulness", never)
    few = replace(copy, evaluate=replace(copy.evaluate, uniform=0, largest=0))
    rows = steps.evaluate_job(done["run"]._replace(job=few))
    assert {row["what"] for row in rows} == {"losses", "scores"}


@pytest.mark.slow_cases
@pytest.mark.parametrize("what", ["scores", "faithfulness"])
def test_a_row_that_was_cut_off_is_dropped_and_computed_again(copy, done, what):
    path = Path(copy.out) / "evaluation.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    last = [i for i, line in enumerate(lines) if f'"{what}"' in line][-1]
    lines = [*lines[:last], *lines[last + 1 :], lines[last]]
    path.write_text("".join(lines)[:-30])
    said = []
    rows = steps.evaluate_job(done["run"]._replace(job=copy), said.append)
    assert len(said) == 1
    assert rows == rows_in(path)
    assert path.read_text().startswith("".join(lines[:-1]))
    again, first = rows[-1], json.loads(lines[-1])
    for row in (again, first):
        row.pop("seconds", None)
    np.testing.assert_allclose(
        np.array(again.pop("effects", 0)), np.array(first.pop("effects", 0)), rtol=1e-5
    )
    assert again == pytest.approx(first)


def test_another_model_is_refused(copy, done):
    params = jax.tree.map(lambda x: x * 1.001, done["run"].model.params)
    model = done["run"].model._replace(params=params)
    run = done["run"]._replace(job=copy, model=model, weights=fingerprint(params))
    with pytest.raises(ValueError, match="was begun with metadata"):
        steps.collect_taps(run)
    for step in (steps.decompose_job, steps.evaluate_job):
        with pytest.raises(ValueError, match=r"job: .* was written by other weights"):
            step(run)


def toml_of(job, path, **changes):
    """A file of the few entries that tests change."""
    given = {
        "model": job.model,
        "text": job.text,
        "out": job.out,
        "site": SITE,
        "every": 3,
        "held_out": 64,
        "start": -1,
        "tokens": 256,
        "length": 16,
    } | changes
    path.write_text(
        f"""
        model = "{given["model"]}"
        text = "{given["text"]}"
        out = "{given["out"]}"
        [collect]
        sites = ["{given["site"]}"]
        readout = "sampled"
        draws = 2
        tokens = {given["tokens"]}
        held_out = {given["held_out"]}
        length = {given["length"]}
        batch = 4
        rows_per_shard = 100
        every = {given["every"]}
        start = {given["start"]}
        [decompose]
        ranks = [4, 16]
        [train]
        site = "{given["site"]}"
        ks = [2]
        latents = 24
        steps = 6
        batch = 64
        [evaluate]
        windows = 5
        batch = 2
        uniform = 20
        largest = 6
        pair_batch = 8
        """
    )
    return str(path)


def ended(script, *arguments):
    """What a script prints and with what it ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        # Tests have a cache of programs of their own.
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as end:
            return str(end.code)
    return None


def test_scripts_go_through_a_finished_job(copy, tmp_path, capsys):
    path = toml_of(copy, tmp_path / "job.toml")
    assert ended("collect.py", path) is None
    assert "256 tokens at 1 sites" in capsys.readouterr().out
    for script in ("train_dictionary.py", "decompose.py"):
        assert ended(script, path) is None
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("step", "part", "change", "message"),
    [
        ("collect_taps", "collect", {"seed": 1}, r"collect.seed = 0, not 1"),
        ("train_job", "train", {"steps": 7}, r"train.steps = 6, not 7"),
        ("evaluate_job", "evaluate", {"windows": 4}, r"evaluate.windows = 5, not 4"),
        ("decompose_job", "evaluate", {"windows": 4}, r"evaluate.windows = 5, not 4"),
    ],
)
def test_work_of_other_settings_is_not_taken_for_this_job(
    copy, step, part, change, message
):
    job = replace(copy, **{part: replace(getattr(copy, part), **change)})
    before = sorted(x.stat().st_mtime_ns for x in Path(copy.out).rglob("*"))
    given = job if step == "train_job" else open_job(job)
    with pytest.raises(ValueError, match=f"job: .* has work with {message}; give"):
        getattr(steps, step)(given)
    assert before == sorted(x.stat().st_mtime_ns for x in Path(copy.out).rglob("*"))


def test_more_dictionaries_may_be_asked_for(copy):
    said = []
    more = replace(copy.train, kinds=("acts",), seeds=(0, 1))
    steps.train_job(replace(copy, train=more), said.append)
    assert [line.split(":")[0] for line in said] == ["acts-k2-s1"]


JOBS = "collect.py", "decompose.py", "train_dictionary.py", "evaluate.py"


@pytest.mark.parametrize("script", [*JOBS, "report.py"])
def test_a_script_without_a_job_or_with_one_that_is_not_there(script, capsys):
    assert ended(script) == "2"
    assert "the following arguments are required: job" in capsys.readouterr().err
    assert ended(script, "none.toml") == "read_job: there is no none.toml"
    assert ended(script, "--help") == "0"
    assert f"python scripts/{script} examples/smollm2.toml" in capsys.readouterr().out


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "blocks_9/resid_post"}, r"site: wanted .*got 'blocks_9/resid_post'"),
        ({"site": "nowhere"}, r"site: wanted .*got 'nowhere'"),
        ({"model": "EMPTY"}, r"load_decoder: .* has no config\.json; is it the folder"),
        (
            {"model": "/nowhere"},
            r"there is no /nowhere; give a path, one of smollm2",
        ),
        ({"model": "TEXT"}, r"load_decoder: wanted a folder or a \.gguf file, got"),
        ({"text": "EMPTY"}, r"read_texts: there is no text in "),
        ({"text": "BLANK"}, r"read_texts: .*blank\.txt has no words"),
        ({"text": "TEXT"}, r"job: one of every 3 texts is to be held out, there are 1"),
        ({"every": 1}, r"job: one of every 1 texts is to be held out"),
        (
            {"tokens": 10**6},
            r"job: wanted 1000000 tokens in windows of 16, the text has",
        ),
        ({"held_out": 10**6}, r"job: wanted 1000000 tokens .*collect\.held_out"),
        ({"length": 300}, r"token_windows: no text fills a window of 300 tokens"),
        ({"start": 48}, r"job: .*start.* 0 \.\. 47.*got 48"),
    ],
)
def test_a_job_that_cannot_be_done_says_why(folder, tmp_path, changes, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("w1 w2 w3")
    for name, path in (("EMPTY", "empty"), ("BLANK", "blank.txt"), ("TEXT", "one.txt")):
        changes = {
            k: str(tmp_path / path) if v == name else v for k, v in changes.items()
        }
    job = job_of(folder, tmp_path / "out")
    said = ended("collect.py", toml_of(job, tmp_path / "job.toml", **changes))
    assert re.match(message, said)
    assert not (tmp_path / "out").exists()


def test_steps_of_scripts_that_are_too_early(folder, tmp_path):
    path = toml_of(job_of(folder, tmp_path / "out"), tmp_path / "job.toml")
    for script in JOBS[1:]:
        said = ended(script, path)
        assert said.endswith(f"has nothing of {SITE!r} yet; run toyfeat collect first")


def test_a_library_that_is_missing_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    path = toml_of(job_of(folder, tmp_path / "out"), tmp_path / "job.toml")
    assert ended("collect.py", path).startswith("load_decoder: tokenizers is not inst")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("collect.py", ["none.toml"], "read_job: there is no none.toml\n"),
        ("fetch.py", ["nothing"], "fetch: wanted one of smollm2"),
    ],
)
def test_a_process_that_fails_prints_a_line_and_no_traceback(
    script, arguments, message
):
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = run_python(f"scripts/{script}", *arguments, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_fetch_lists_what_there_is(capsys):
    assert ended("fetch.py") is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PACKAGES)


def test_a_broken_row_is_dropped_wherever_the_file_ends(tmp_path):
    path = tmp_path / "some" / "rows.jsonl"
    rows = Rows(path)
    assert rows.add({"a": 1, "b": "x"}, {"c": [1.0]})
    assert rows.add({"a": 2, "b": "x"}, {"c": float("nan")})
    assert not rows.add({"a": 1, "b": "x"}, {"c": 3})
    text = path.read_text()
    for end in range(len(text) + 1):
        path.write_text(text[:end])
        found = Rows(path)
        whole = text[:end].count("\n")
        assert len(found.rows) == whole
        assert path.read_text() == "".join(text.splitlines(keepends=True)[:whole])
    assert found.rows == rows.rows
    assert found.rows[1]["c"] is None
    assert "NaN" not in text
    assert found.has({"b": "x"})
    assert not found.has({"a": 3})


def straight(job, out, **train):
    """The same job without a store, with losses and a basis of its own."""
    losses = Attribution(), Attribution("strong", 10.0, 1.0)
    return replace(
        job,
        out=str(out),
        source="model",
        decompose=Decompose(bases=("pca", "lib"), ranks=(4,), sources=2),
        train=replace(
            job.train,
            kinds=("attribution", "gradients"),
            attribution=losses,
            seeds=(0, 1),
            **train,
        ),
    )


@pytest.mark.slow
def test_a_job_without_a_store_goes_straight_to_the_model(done, tmp_path):
    job = straight(done["job"], tmp_path / "out", population=True)
    run, said = done["run"]._replace(job=job), []
    with pytest.raises(ValueError, match="job: source is 'model', so that nothing is"):
        steps.collect_taps(run)
    rows = steps.decompose_job(run, said.append)
    assert said[0] == f"{SITE}: 256 tokens straight from the model"
    assert {row["basis"] for row in rows if "basis" in row} == {"pca", "lib"}
    for name in ("stores", "moments"):  # nothing is looked for there
        (tmp_path / "out" / name).mkdir()
        (tmp_path / "out" / name / site_folder(SITE)).write_text("broken")
    mine, theirs = (open_site(x, SITE).stats for x in (run, done["run"]))
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    opened = []

    def open_source(job):
        """The model is open: it is not read once more."""
        opened.append(job)
        return open_taps(run, job.site)

    steps.train_job(job, said.append, open_source=open_source)
    assert opened == [job]
    names = "attribution", "strong", "gradients"
    wanted = {f"{name}-k2-s{seed}" for name in names for seed in (0, 1)}
    assert {line.split(":")[0] for line in said[-len(wanted) :]} == wanted
    scored = steps.evaluate_job(run, said.append)
    faithful = {row["method"] for row in scored if row["what"] == "faithfulness"}
    assert wanted <= faithful
    same = {"method": "pca-k2", "what": "scores"}
    mine, theirs = (
        next(row for row in of if same.items() <= row.items())
        for of in (scored, done["evaluated"])
    )
    for name in ("ce", "kl", "explained", "attribution_l0", "unexplained"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4)
    latents = inspect_latents(run, num=3)
    assert latents.keys() == {f"{name}-k2-s0" for name in names}
    before = {p: p.read_bytes() for p in Path(job.out).rglob("*") if p.is_file()}
    for step, given in (
        ("train_job", job),
        ("decompose_job", run),
        ("evaluate_job", run),
    ):
        getattr(steps, step)(given, never)
    assert before == {
        p: p.read_bytes() for p in Path(job.out).rglob("*") if p.is_file()
    }
    other = jax.tree.map(lambda x: 2 * x, run.model.params)
    model = run.model._replace(params=other)
    changed = run._replace(model=model, weights=fingerprint(other))
    with pytest.raises(ValueError, match=r"job: .* was written by other weights"):
        open_site(changed, SITE)


def test_batches_straight_from_the_model_are_windows_of_the_store(done):
    """Each once an epoch, with the gradients that the store has."""
    run = done["run"]._replace(job=replace(done["job"], source="model"))
    whole = [*read_chunks(done["stores"][SITE])]
    rows = jax.tree.map(
        lambda *x: np.concatenate(x).reshape(16, 16, *x[0].shape[1:]), *whole
    )
    source = model_taps(run, SITE)
    assert (source.dim, source.readouts) == (16, 2)
    assert source.metadata.items() <= done["stores"][SITE].metadata.items()
    chunks = jax.tree.map(lambda *x: np.concatenate(x), *source.chunks())
    for mine, theirs in zip(*map(jax.tree.leaves, (chunks, rows)), strict=True):
        wanted = theirs.reshape(mine.shape)
        np.testing.assert_allclose(mine, wanted, rtol=1e-3, atol=1e-4)
    batches, seen = source.batches(3, False), []
    for step in range(4):
        taps = batches.take(batches.data, jnp.int32(step))
        for window in range(4):
            part = slice(16 * window, 16 * window + 16)
            gaps = np.abs(rows.acts - np.asarray(taps.acts[part])).max(axis=(1, 2))
            seen.append(int(gaps.argmin()))
            assert gaps.min() < 1e-4
            wanted = rows.grads[seen[-1]]
            np.testing.assert_allclose(taps.grads[part], wanted, rtol=1e-3, atol=1e-4)
            np.testing.assert_array_equal(taps.weights[part], rows.weights[seen[-1]])
    assert sorted(seen) == list(range(16))
    other = source.batches(3, True)
    taps = other.take(other.data, jnp.int32(0))
    assert (taps.acts.shape, taps.grads) == ((128, 16), None)
    np.testing.assert_allclose(
        taps.acts[:2], np.sqrt(2) * rows.grads[seen[0], 0], rtol=1e-3, atol=1e-4
    )


def test_a_batch_straight_from_the_model_is_of_whole_windows(done, tmp_path):
    for batch in (40, 512):
        job = straight(done["job"], tmp_path / "out", batch=batch)
        with pytest.raises(ValueError, match=f"train.batch must be whole .*{batch}"):
            steps.train_job(job)
    assert not (tmp_path / "out").exists()  # what was wrong is not kept


def test_a_job_without_a_store_is_of_one_text(done, tmp_path):
    job = straight(done["job"], tmp_path / "out")
    run = done["run"]._replace(job=job)
    open_site(run, SITE)
    other = run._replace(tokens=run.tokens[::-1])
    with pytest.raises(ValueError, match="has work on another text than"):
        open_site(other, SITE)
    with pytest.raises(ValueError, match="has work on another text than"):
        open_taps(other, SITE)


@pytest.mark.slow
def test_products_in_bfloat16_are_trained_on_as_float32(done, tmp_path):
    job = straight(done["job"], tmp_path / "out")
    job = replace(job, collect=replace(job.collect, compute="bfloat16"))
    run = done["run"]._replace(job=job)
    for source in (model_taps(x, SITE) for x in (run, done["run"])):
        batches = source.batches(0, False)
        taps = batches.take(batches.data, jnp.int32(0))
        assert {x.dtype for x in jax.tree.leaves(taps)} == {jnp.dtype("float32")}
        first = next(source.chunks())
        assert {x.dtype for x in jax.tree.leaves(first)} == {np.dtype("float32")}


@pytest.mark.slow
def test_weights_in_bfloat16_are_near_and_others(done, folder, tmp_path):
    few = replace(done["job"].decompose, bases=("pca",), ranks=(4,))
    job = replace(job_of(folder, tmp_path / "out"), weights="bfloat16", decompose=few)
    run = open_job(job)
    kinds = {x.dtype for x in jax.tree.leaves(run.model.params)}
    assert kinds == {jnp.dtype("bfloat16")}
    steps.collect_taps(run)
    rows = {row.get("method"): row for row in steps.decompose_job(run)}
    wanted = {row.get("method"): row for row in done["decomposed"]}
    for name in ("ce", "explained", "unexplained"):
        value = wanted["pca, 4"][name]
        assert rows["pca, 4"][name] == pytest.approx(value, rel=0.05)
        assert rows["pca, 4"][name] != value
    plain = open_job(replace(job, weights="float32"))
    for step in (steps.decompose_job, steps.collect_taps):
        with pytest.raises(ValueError, match=r"weights = 'bfloat16', not 'float32'"):
            step(plain)


@pytest.mark.slow_cases
@pytest.mark.parametrize("massive", [1.2, float("inf")])
def test_lib_is_of_the_tokens_that_count(done, tmp_path, massive):
    """Its readers see what PCA of the same weights does; every output by a source."""
    job = straight(done["job"], tmp_path / "out")
    job = replace(job, collect=replace(job.collect, massive=massive, batch=5))
    run = done["run"]._replace(job=job)
    site = open_site(run, SITE)
    stats = site.stats
    assert (float(stats.weight) == 16 * 14) == (massive > 2)
    basis = compute_bases(site, ["lib"])["lib"]
    np.testing.assert_allclose(basis.mean, stats.mean, rtol=1e-4, atol=1e-5)
    covariance = np.asarray(stats.scatter / stats.weight, np.float64)
    readers = np.asarray(basis.readers, np.float64)
    codes = readers.T @ covariance @ readers  # their mean squares are the spectrum
    top = float(basis.spectrum[0])
    np.testing.assert_allclose(codes / top, np.diag(basis.spectrum / top), atol=1e-3)


@pytest.mark.slow
def test_more_losses_may_be_asked_for_and_none_changed(copy):
    with_more = replace(
        copy.train, attribution=(Attribution(), Attribution("strong", 1.0))
    )
    said = []
    steps.train_job(replace(copy, train=with_more), said.append)
    assert [line.split(":")[0] for line in said] == ["strong-k2-s0"]
    other = replace(copy.train, attribution=(Attribution("strong", 2.0),))
    with pytest.raises(ValueError, match=r"train\.attribution\.strong = .*, not"):
        steps.train_job(replace(copy, train=other))
