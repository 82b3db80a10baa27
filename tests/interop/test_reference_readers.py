"""Dictionaries of every published format, against what its own reader computes.

``tests/golden`` has small files in the layout of each format, and in every ``run.npz``
the codes and reconstructions of a reader: of the libraries that save the format
(``saelens_golden.py`` and ``dictionary_golden.py`` of ``benchmarks/peers``); in
``published``, of SAELens' loaders of other formats (``published_golden.py``), SAELens 5
(``saelens5_golden.py``), circuit-tracer (``circuit_tracer_golden.py``) and the library
that released Llama Scope (``llama_scope_golden.py``).  With ``-s`` the largest errors
are printed.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.interop import load_dictionary

GOLDEN = Path(__file__).parents[1] / "golden"
BOUND = 1e-6  # of the largest entry
LAYERS = {"clt": 1, "qwen3": 5}  # of folders with a file per layer


def cases(*readers):
    """Folders with what a reader computed."""
    runs = (run for reader in readers for run in (GOLDEN / reader).rglob("run.npz"))
    return sorted(str(run.parent.relative_to(GOLDEN)) for run in runs)


def arrays(name):
    with np.load(GOLDEN / name / "run.npz") as run:
        return dict(run)


def agree(name, **pairs):
    """Largest difference, relative to the largest entry, within the bound."""
    errors = {
        what: np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
        for what, (ours, theirs) in pairs.items()
    }
    print(f"{name}: " + ", ".join(f"{k} {error:.1e}" for k, error in errors.items()))
    assert all(error < BOUND for error in errors.values()), errors
    codes = pairs["codes"][1]
    assert 0.1 < np.mean(codes != 0) < 0.9


def codes_and_out(loaded, acts):
    """Codes and reconstructions; a pass of training agrees where it is the same."""
    sae, params, _ = loaded
    acts = jnp.asarray(acts)
    codes = sae.encode(params, acts)
    out = sae.decode(params, codes, acts=acts)
    if sae.architecture.rule_after_training is None:
        again = sae.forward(params, acts).recon
        np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-5)
    return codes, out


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", cases("saelens", "sparsify", "dictionary_learning"))
def test_as_the_library_that_saved_it_reads_it(name):
    run = arrays(name)
    codes, out = codes_and_out(load_dictionary(GOLDEN / name), run["acts"])
    agree(name, codes=(codes, run["codes"]), out=(out, run["out"]))


@pytest.mark.parametrize("name", cases("published/saelens", "published/saelens5"))
def test_as_saelens_reads_it(name):
    run = arrays(name)
    layer = next((layer for part, layer in LAYERS.items() if part in name), None)
    loaded = load_dictionary(GOLDEN / name, layer=layer)
    codes, out = codes_and_out(loaded, run["acts"])
    if "clt" in name:  # SAELens adds up what a latent writes to all layers
        out = out.reshape(len(out), -1, run["out"].shape[1]).sum(1)
    agree(name, codes=(codes, run["codes"]), out=(out, run["out"]))
    transcodes = any(part in name for part in ("transcoder", "clt"))
    assert (loaded.dictionary.config.d_out is not None) == transcodes


@pytest.mark.parametrize("name", cases("published/llama_scope"))
def test_as_the_library_of_llama_scope_reads_it(name):
    run = arrays(name)
    loaded = load_dictionary(GOLDEN / name)
    codes, out = codes_and_out(loaded, run["acts"])
    # What a code writes is compared: its own are in units of other rows.
    lengths = np.linalg.norm(loaded.params["W_dec"], axis=1)
    if loaded.dictionary.config.rescale_acts_by_decoder_norm:
        lengths = np.ones_like(lengths)
    theirs = run["codes"] * run["lengths"]
    agree(name, codes=(np.asarray(codes) * lengths, theirs), out=(out, run["out"]))


@pytest.mark.parametrize("name", cases("published/circuit_tracer"))
def test_as_circuit_tracer_reads_it(name):
    run = arrays(name)
    acts, wanted = run["acts"], run["out"]
    codes, out = np.zeros_like(run["codes"]), np.zeros_like(wanted)
    for layer in range(len(acts)):
        place, options = GOLDEN / name, {"layer": layer}
        if name.endswith(("gemma-scope", "gemma-scope-2")):  # a folder per layer
            (place,) = place.rglob(f"layer_{layer}*/**/params.*")
            options = {}
        loaded = load_dictionary(place, **options)
        codes[layer], written = codes_and_out(loaded, acts[layer])
        # Its own layer first, then those that it writes to, too.
        written = np.asarray(written).reshape(len(written), -1, wanted.shape[2])
        out[layer : layer + written.shape[1]] += written.transpose(1, 0, 2)
    agree(name, codes=(codes, run["codes"]), out=(out, wanted))
