import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ROOT, run_python
from tiny_collection import (
    LENGTH,
    LOSS,
    PROBED,
    SITES,
    VOCAB,
    collected,
    params_of,
    tokens_of,
)

import toyfeat as ft
from toyfeat.data import writing
from toyfeat.data.store import open_store, shard_taps, verify_store
from toyfeat.lm.collect import (
    exclude_massive,
    fingerprint,
    make_readout,
    store_moments,
)
from toyfeat.lm.windows import site_folder


@partial(jax.jit, static_argnums=0)
def tap_all(make, params, tokens, first):
    """Taps for a readout by its maker, or the loss of the next token for ``None``."""
    readout = make(tokens, first) if make else ft.readouts.next_token_loss(tokens)
    return ft.tap(PROBED, params, tokens, sites=SITES, readout=readout)


def tapped(make=None, first=0, tokens=None):
    tokens = tokens_of() if tokens is None else tokens
    tokens = tokens.astype(np.int32)
    return jax.device_get(tap_all(make, params_of(), tokens, first))


def whole(store):
    parts = [shard_taps(store, i) for i in range(len(store.shards))]
    return jax.tree.map(
        lambda *x: np.concatenate([np.asarray(y, np.float32) for y in x]), *parts
    )


def content(folder):
    """Every file of a folder, bit by bit."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder of stores that was made without a stop; to be read only."""
    folder = tmp_path_factory.mktemp("once")
    return folder, collected(folder)


def close(found, wanted, rtol=1e-5):
    for x, y in zip(found[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def test_stores_have_the_taps_of_all_windows(once):
    folder, stores = once
    assert sorted(stores) == sorted(SITES)
    for site, taps in tapped().items():
        store = stores[site]
        verify_store(store.path)
        assert store.path == folder / site_folder(site)
        assert (store.rows, store.readouts) == (49, 1)
        assert [shard.rows for shard in store.shards] == [10, 10, 10, 10, 9]
        assert store.metadata["site"] == site
        assert store.metadata["weights"] == "those"
        assert store.metadata["length"] == LENGTH
        close(whole(store), taps)
    counted = np.ones((7, LENGTH))
    counted[:, [0, -1]] = 0
    np.testing.assert_array_equal(whole(stores["b"]).weights, counted.reshape(-1))
    assert [stores[site].dim for site in SITES] == [3, 4]


READOUTS = {"loss": LOSS, "sampled": make_readout("sampled", draws=2, seed=3)}


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", READOUTS)
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_stores_do_not_depend_on_the_batch(tmp_path, batch, kind):
    readout = READOUTS[kind]
    plain = collected(tmp_path / "plain", readout=readout)
    found = collected(tmp_path / "found", readout=readout, batch=batch)
    for site in SITES:
        close(whole(found[site]), whole(plain[site]))


def test_a_bfloat16_store_is_rounded(tmp_path):
    stores = collected(tmp_path, dtype="bfloat16")
    for site, taps in tapped().items():
        found = whole(stores[site])
        np.testing.assert_allclose(found.acts, taps.acts, rtol=2**-8)
        np.testing.assert_allclose(found.grads, taps.grads, rtol=2**-8, atol=1e-6)
        as_stored = found.acts.astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found.acts, as_stored)
        np.testing.assert_array_equal(found.weights, taps.weights)


def test_one_site_alone_is_what_it_is_among_others(once, tmp_path):
    collected(tmp_path, sites=("b",))
    wanted = {k: v for k, v in content(once[0]).items() if k.startswith("b/")}
    found = content(tmp_path)
    assert found.keys() == wanted.keys()
    close(whole(open_store(tmp_path / "b")), whole(once[1]["b"]))


def test_report_gets_the_tokens_done(tmp_path):
    reports = []
    collected(tmp_path, report=lambda done, total: reports.append((done, total)))
    assert reports == [(14, 49), (28, 49), (42, 49), (49, 49)]


class StopError(Exception):
    pass


@pytest.mark.parametrize("stops", [(14,), (28,), (42,), (14, 28), (14, 14, 42)])
def test_a_stopped_collection_resumes(once, tmp_path, stops):
    for stop in stops:
        reports = []

        def report(done, total, stop=stop, reports=reports):
            reports.append(done)
            if done >= stop:
                raise StopError

        with pytest.raises(StopError):
            collected(tmp_path, report=report)
        for site in SITES:
            verify_store(tmp_path / site_folder(site))
    reports = []
    collected(tmp_path, report=lambda done, total: reports.append(done))
    assert content(tmp_path) == content(once[0])
    assert reports[0] >= stops[-1]  # what is there is not computed again


@pytest.mark.slow
def test_a_killed_collection_resumes(once, tmp_path):
    child = Path(__file__).with_name("tiny_collection.py")
    done = run_python(child, tmp_path, 28, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == -9, done.stderr
    left = {site: open_store(tmp_path / site_folder(site)).rows for site in SITES}
    assert left == dict.fromkeys(SITES, 20)  # whole shards of the 28 rows
    collected(tmp_path)
    assert content(tmp_path) == content(once[0])


def test_a_full_disk_closes_every_writer(once, tmp_path, monkeypatch):
    write = writing._write_file

    def full(store, name, content):
        if name.endswith("-9.bin"):  # the last ones
            raise OSError(28, "No space left on device")
        return write(store, name, content)

    monkeypatch.setattr(writing, "_write_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        collected(tmp_path)
    monkeypatch.undo()
    collected(tmp_path)
    assert content(tmp_path) == content(once[0])
    del error  # which held on to the writers up to here


def test_collecting_again_changes_nothing(once):
    folder, _ = once
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    reports = []
    collected(folder, report=lambda done, total: reports.append(done))
    assert reports == [49]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.bin")}.items() <= (
        before.items()
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"weights": "others"}}, "begun with metadata .*those.*others"),
        ({"tokens": tokens_of(seed=1)}, "begun with metadata"),
        ({"tokens": tokens_of(num=8)}, "begun with metadata"),
        ({"tokens": tokens_of()[:, :-1]}, "begun with metadata"),
        ({"dtype": "bfloat16"}, "begun with dtype = 'float32', got 'bfloat16'"),
        ({"rows_per_shard": 20}, "begun with rows_per_shard = 10, got 20"),
        (
            {"readout": make_readout("sampled", draws=3)},
            "begun with readouts = 1, got 3",
        ),
        ({"sites": ("b", "nowhere")}, r"tap: no site 'nowhere'"),
        ({"sites": ()}, "tap: .* sites is empty"),
        ({"tokens": tokens_of()[0]}, r"collect: wanted tokens \[num, T\].*\(7,\)"),
        ({"tokens": tokens_of()[:, :1]}, r"T >= 2, got shape \(7, 1\)"),
        ({"tokens": tokens_of()[:0]}, r"got shape \(0, 7\)"),
        ({"batch": 0}, "collect: batch must be an int of at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("rows", [14, 49])
def test_a_store_with_other_settings_is_refused(tmp_path, changes, message, rows):
    def report(done, total):
        if done == rows:
            raise StopError

    with pytest.raises(StopError):
        collected(tmp_path, report=report)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=message):
        collected(tmp_path, **changes)
    assert content(tmp_path) == before


def test_a_refusal_leaves_no_stores_of_other_sites(tmp_path):
    for site in SITES:  # whichever is opened first
        collected(tmp_path / site, sites=(site,))
        before = content(tmp_path)
        with pytest.raises(ValueError, match="begun with metadata"):
            collected(tmp_path / site, metadata={"weights": "others"})
        assert content(tmp_path) == before
        assert [p.name for p in (tmp_path / site).iterdir()] == [site_folder(site)]


def test_a_store_without_a_shard_is_refused(tmp_path):
    stores = collected(tmp_path)
    last = stores["b"].shards[-1].file
    raw = bytearray((tmp_path / "b" / last).read_bytes())
    raw[0] ^= 1
    (tmp_path / "b" / last).write_bytes(raw)
    with pytest.raises(ValueError, match=f"{last} is not what was written"):
        collected(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 8192])
def test_moments_of_a_store_against_numpy(once, rows):
    store = once[1]["b"]
    taps = tapped()["b"]
    weights = np.asarray(taps.weights, np.float64)
    acts = np.asarray(taps.acts, np.float64)[weights > 0]
    grads = np.asarray(taps.grads, np.float64)[weights > 0, 0]
    found = store_moments(store, rows=rows)
    assert float(found.weight) == len(acts) == 35
    np.testing.assert_allclose(found.mean, acts.mean(axis=0), atol=1e-6)
    cov = np.cov(acts.T, bias=True)
    scatter = np.asarray(found.scatter) / np.asarray(found.weight)
    np.testing.assert_allclose(scatter, cov, atol=1e-5)
    np.testing.assert_allclose(found.grad_mean, grads.mean(axis=0), atol=1e-6)
    second = grads.T @ grads / len(grads)
    np.testing.assert_allclose(found.grad_second, second, atol=1e-5)


def test_the_loss_is_that_of_the_next_token():
    found = tapped(LOSS)
    for site, wanted in tapped().items():
        close(found[site], wanted)


@pytest.mark.slow
def test_sampled_gradients_are_residuals_of_tokens_that_are_drawn_anew():
    tokens, params = tokens_of(), params_of()
    make = make_readout("sampled", draws=4, seed=1)

    def of(first, tokens=tokens, make=make):
        return tapped(make, first, tokens)["b"][:3]

    acts, grads, weights = of(0)
    counted = np.ones((7, LENGTH))
    counted[:, [0, -1]] = 0
    np.testing.assert_array_equal(weights, counted.reshape(-1))
    assert grads.shape == (49, 4, 4)
    head = np.asarray(params["head"], np.float64)  # "b" is the last site
    logits = np.asarray(acts, np.float64) @ head
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    possible = (p[:, None] - np.eye(VOCAB)[None]) @ head.T / 2  # over sqrt(4)
    gaps = np.abs(grads[:, :, None] - possible[:, None]).max(axis=3)
    assert gaps.min(axis=2).max() < 1e-5
    drawn = gaps.argmin(axis=2)
    share = np.bincount(drawn.reshape(-1), minlength=VOCAB) / drawn.size
    wanted, error = p.mean(axis=0), np.sqrt(p * (1 - p)).mean(axis=0) / drawn.size**0.5
    assert np.all(np.abs(share - wanted) < 4 * error)
    np.testing.assert_array_equal(of(0)[1], grads)
    np.testing.assert_array_equal(of(2, tokens[2:])[1], grads[2 * LENGTH :])
    assert np.abs(of(7)[1] - grads).max() > 0.1  # other windows, other draws
    other = make_readout("sampled", draws=4, seed=2)
    assert np.abs(of(0, make=other)[1] - grads).max() > 0.1


def test_an_unknown_readout_is_refused():
    with pytest.raises(
        ValueError, match="must be 'loss', 'sampled', 'labels', 'signs' or 'none', got"
    ):
        make_readout("logits")
    with pytest.raises(ValueError, match="num must be an int of at least 1, got 0"):
        make_readout("sampled", draws=0)(jnp.asarray(tokens_of()), 0)


def test_a_fingerprint_tells_weights_apart():
    params = jax.device_get(params_of())
    params |= {"bias": np.float32(0), "none": np.zeros((0, 3), np.float32)}
    first = fingerprint(params)
    assert first == fingerprint(jax.tree.map(jnp.asarray, params))
    changed = params["mix"].copy()
    changed[1, 2] += np.float32(1e-6)
    unlike = [
        params | {"mix": changed},
        params | {"mix": params["mix"].T},
        params | {"mix": params["mix"].astype(jnp.bfloat16)},
        {("Mix" if k == "mix" else k): v for k, v in params.items()},
        {k: v for k, v in params.items() if k != "bias"},
        params | {"bias": np.float32(-0.0)},
    ]
    assert len({first, *map(fingerprint, unlike)}) == len(unlike) + 1


@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("blocks_3/resid_pre", "blocks_3-resid_pre"),
        ("a.b_c/d", "a.b_c-d"),
    ],
)
def test_names_of_folders(site, name):
    assert site_folder(site) == name


def test_every_site_has_a_folder_of_its_own(tmp_path):
    sites = [
        "a/b",
        "a-b",
        "a@b",
        "a#b",
        "..",
        ".",
        "../a",
        "/a",
        "a/",
        "",
        "é",
        "a" * 300,
    ]
    folders = [site_folder(site) for site in sites]
    assert len({folder.lower() for folder in folders}) == len(sites)
    for folder in folders:
        assert (tmp_path / folder).resolve().parent == tmp_path.resolve()
        (tmp_path / folder).mkdir()


def test_the_metadata_of_a_store_is_json(once):
    about = json.loads((once[0] / "b" / "store.json").read_text())["metadata"]
    assert about.keys() == {"weights", "site", "tokens", "length", "massive"}


@pytest.mark.parametrize("factor", [10.0, float("inf")])
def test_an_infinite_multiple_keeps_the_weights_of_silent_windows(factor):
    """Most activations of the first window are 0, and so is their median."""
    acts = np.array([[0.0], [0.0], [1.0], [1.0], [1.0], [50.0]])
    taps = exclude_massive(ft.Taps(jnp.asarray(acts), None, jnp.ones(6)), 3, factor)
    counts = [1, 1, 1, 1, 1, 1] if factor == float("inf") else [1, 1, 0, 1, 1, 0]
    assert taps.weights.tolist() == counts


def test_massive_tokens_do_not_count_and_nothing_else_changes(tmp_path):
    """The embedding of one token is a hundred times as long as the others."""
    params = params_of()
    embed = np.array(params["embed"])
    embed[2] *= 100
    tokens = tokens_of()
    given = {"params": params | {"embed": jnp.asarray(embed)}}
    kept = collected(tmp_path / "all", massive=float("inf"), **given)["first/a"]
    some = collected(tmp_path / "some", massive=10.0, **given)["first/a"]
    rows = [whole(store) for store in (kept, some)]
    np.testing.assert_array_equal(rows[0].acts, rows[1].acts)
    np.testing.assert_array_equal(rows[0].grads, rows[1].grads)
    lengths = np.linalg.norm(rows[0].acts, axis=1).reshape(tokens.shape)
    long = lengths > 10 * np.median(lengths, axis=1, keepdims=True)
    assert long.any()
    wanted = np.where(long.reshape(-1), 0, rows[0].weights)
    np.testing.assert_array_equal(rows[1].weights, wanted)
