"""Logit differences of tasks under masks, against the whole model by probes."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, logits_with, top_codes, weights
from tiny_held import LATENTS, K, dictionary, held_at

from toyfeat.discover.circuits import find_circuit
from toyfeat.lm.circuits import (
    Prompts,
    encode_prompts,
    tap_task,
    task_differences,
    task_effect,
)

SITE = "blocks_1/resid_post"
P = 4


@cache
def task():
    """Prompts of four lengths, what the model does after them, and a baseline."""
    split, held = held_at(SITE)
    last = np.array([2, 3, 5, 6])
    logits = logits_with(SITE, held.acts, held.tokens)[:P][np.arange(P), last]
    prompts = Prompts(held.tokens[:P], last, logits.argmax(1), logits.argmin(1))
    sae, params = dictionary(CONFIG.dim)
    baseline = np.linspace(0, 0.2, LATENTS, dtype=np.float32)
    data = tap_task(split, weights(), prompts, sae, params, jnp.asarray(baseline))
    return split, held, prompts, data, baseline


def by_hand(mask, error):
    """Differences of the whole model in float64, with codes one by one."""
    _, held, prompts, _, baseline = task()
    acts = np.float64(held.acts[:P])
    flat = acts.reshape(-1, CONFIG.dim)
    codes, writers, recon = top_codes(dictionary(CONFIG.dim)[1], flat, K)
    change = (1 - mask) * (baseline - codes)
    value = (recon + change @ writers + error * (flat - recon)).reshape(acts.shape)
    value[:, 0] = acts[:, 0]
    logits = logits_with(SITE, value, prompts.tokens)[np.arange(P), prompts.last]
    rows = np.arange(P)
    return logits[rows, prompts.right] - logits[rows, prompts.wrong]


@pytest.mark.parametrize("error", [False, True])
def test_differences_are_those_of_the_whole_model(error):
    data = task()[3]
    run = jax.jit(
        task_differences(CONFIG, SITE, dictionary(CONFIG.dim)[0], error=error)
    )
    mask = np.random.default_rng(0).random(LATENTS).astype(np.float32)
    for m in (mask, np.ones(LATENTS, np.float32)):
        np.testing.assert_allclose(run(data, m), by_hand(m, error), atol=2e-4)
    own = np.asarray(run(data, None))
    np.testing.assert_allclose(own, by_hand(np.ones(LATENTS), True), atol=2e-4)
    assert np.ptp(own) > 0.1


def test_a_circuit_of_a_task_keeps_its_share():
    """Counts and shares that are found are those of the whole model."""
    run = task_differences(CONFIG, SITE, dictionary(CONFIG.dim)[0], error=True)
    circuit = find_circuit(task_effect(run), task()[3], LATENTS, shares=(0.5, 0.8))
    empty, whole = by_hand(np.zeros(LATENTS), True), by_hand(np.ones(LATENTS), True)
    for count, kept in zip(circuit.counts, circuit.kept, strict=True):
        mask = np.zeros(LATENTS)
        mask[circuit.order[:count]] = 1
        found = by_hand(mask, True).mean() - empty.mean()
        wanted = found / (whole.mean() - empty.mean())
        np.testing.assert_allclose(kept, wanted, atol=2e-3)
    assert circuit.sizes[0] is not None


def test_prompts_are_filled_up_and_answers_differ():
    words = {"a b": [3, 4], "a": [3], " c": [5, 9], " d": [6], " cc": [5]}

    def encode(text, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(ids=words[text])

    tokenizer = SimpleNamespace(encode=encode)
    rows = [
        {"prompt": "a b", "right": " c", "wrong": " d"},
        {"prompt": "a", "right": " d", "wrong": " c"},
    ]
    prompts = encode_prompts(rows, tokenizer, 1)
    np.testing.assert_array_equal(prompts.tokens, [[1, 3, 4], [1, 3, 0]])
    assert prompts.last.tolist() == [2, 1]
    assert (prompts.right.tolist(), prompts.wrong.tolist()) == ([5, 6], [6, 5])
    rows[0]["wrong"] = " cc"
    with pytest.raises(ValueError, match="begin with the same token 5"):
        encode_prompts(rows, tokenizer, 1)
