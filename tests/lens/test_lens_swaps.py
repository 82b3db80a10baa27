"""The benchmark of swaps, on a tiny model with items of its own."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.models.decoder import Decoder, llama


@pytest.mark.slow
def test_swaps_of_what_the_model_answers_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    swaps, sets = map(importlib.import_module, ("lens_swaps", "lens_sets"))
    config = llama(vocab=40, layers=3, dim=16, heads=2, hidden=24)
    tokens = np.random.default_rng(0).integers(0, 40, (6, sets.LENGTH))
    params = Decoder(config).init(jax.random.key(0), tokens[:1])
    model = ft.lenses.from_decoder(config)
    last = np.full(6, 9)
    logits = Decoder(config).apply(params, tokens)
    # The model answers five of six.
    answers = np.asarray(logits)[:, 9].argmax(-1)
    answers[5] = (answers[5] + 1) % 40
    texts = [{"group": "one"}] * 6
    items = sets.Items(texts, tokens, last - 2, last, np.arange(6), answers)
    work = SimpleNamespace(model=SimpleNamespace(params=params))
    plain = ft.lenses.logit_lens(model, params)
    lenses = {"logit": plain, "jacobian": plain}
    setup = swaps.Setup(work, model, lenses, {"set": items})
    options = swaps.SwapsConfig(band="0,2", batch=4)
    compiled = swaps.compile_swaps(setup, options)
    rows = swaps.swap_rows(setup, compiled, options, "set")
    assert [row["method"] for row in rows] == [
        "logit",
        "logit, turned",
        "jacobian",
        "jacobian, turned",
    ]
    assert all(row["size"]["known"] == 5 for row in rows)
    assert rows[0]["prefers_new"] == rows[2]["prefers_new"]  # the same lens twice
    assert all(0 <= row["top1"] <= row["top5"] <= 1 for row in rows)
