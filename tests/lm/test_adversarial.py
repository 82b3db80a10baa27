"""The worst ablation that is found, against all of them on a small window."""

from functools import cache
from itertools import product

import jax
import numpy as np
import pytest
from tiny_decoder import CONFIG, log_softmax, logits_with, weights
from tiny_held import described, held_at

from toyfeat.lm.adversarial import _unimportant, adversarial_ablation
from toyfeat.types import Taps

SITE = "blocks_1/resid_post"


@cache
def held():
    """Two windows of which three tokens count."""
    split, text = held_at(SITE)
    some = np.zeros_like(text.weights[:2])
    some[0, 2:4] = some[1, 3] = 1
    fields = {n: getattr(text, n)[:2] for n in ("tokens", "entry", "acts", "grads")}
    return split, text._replace(weights=some, **fields)


def ablations(share):
    """KL of every corner of the cube of factors, by the whole model in float64."""
    _, text = held()
    flat = text.acts.reshape(-1, CONFIG.dim)
    taps = jax.tree.map(np.asarray, _taps(text))
    replaced = described(CONFIG.dim).replace(taps)
    parts = np.asarray(replaced.parts, np.float64)
    free = np.asarray(_unimportant(replaced.parts, taps, share))
    counts = text.weights.reshape(-1) > 0
    places = np.argwhere(free & counts[:, None] & (np.abs(parts).max(2) > 0))
    clean = log_softmax(logits_with(SITE, text.acts, text.tokens))
    found = []
    for corner in product((1, 0), repeat=len(places)):
        factors = np.ones(free.shape)
        factors[tuple(places.T)] = corner
        value = np.asarray(replaced.recon) - np.einsum("nk,nkd->nd", 1 - factors, parts)
        value = np.where(counts[:, None], value, flat).reshape(text.acts.shape)
        spliced = log_softmax(logits_with(SITE, value, text.tokens))
        kl = (np.exp(clean) * (clean - spliced)).sum(2)
        found.append((text.weights * kl).sum() / text.weights.sum())
    return np.array(found), len(places)


def _taps(text):
    grads = text.grads.reshape(-1, *text.grads.shape[2:])
    acts = text.acts.reshape(-1, CONFIG.dim)
    return Taps(acts, grads, text.weights.reshape(-1))


def test_the_adversary_finds_the_worst_corner():
    split, text = held()
    method = described(CONFIG.dim)
    scores = adversarial_ablation(
        split, weights(), text, method, share=0.7, steps=40, batch=2
    )
    corners, num = ablations(0.7)
    assert 3 <= num <= 7
    np.testing.assert_allclose(scores.none, corners[0], rtol=1e-3)
    np.testing.assert_allclose(scores.all, corners[-1], rtol=1e-3)
    # The worst factors of the cube may lie inside of it, not below its corners.
    assert scores.adversarial >= 0.95 * corners.max()
    assert scores.random <= scores.adversarial


def test_with_nothing_to_ablate_there_is_nothing_to_find():
    split, text = held()
    scores = adversarial_ablation(
        split, weights(), text, described(CONFIG.dim), share=0.0, steps=40, batch=2
    )
    assert scores.unimportant < 0.5  # latents without any effect
    np.testing.assert_allclose(scores.adversarial, scores.none, rtol=0.05)


def test_the_smallest_attributions_come_first():
    parts = np.zeros((2, 4, 1), np.float32)
    parts[:, :, 0] = [[5, -1, 2, 0.5], [1, 1, 1, 1]]
    taps = _taps_of(parts)
    found = np.asarray(_unimportant(parts, taps, 0.2))
    np.testing.assert_array_equal(found[0], [False, True, False, True])
    assert found[1].sum() == 0


def _taps_of(parts):
    return Taps(parts[:, 0], np.ones((2, 1, 1), np.float32), np.ones(2))


def test_what_is_no_share_is_refused():
    split, text = held()
    with pytest.raises(ValueError, match="adversarial_ablation: share must be"):
        adversarial_ablation(split, {}, text, described(CONFIG.dim), share=2.0)
