import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from examples import phonemes as g2p
from toyfeat.jobs import cache_folder, locate

WIDE, PAIRS = 8, [("at", ("AE1", "T")), ("zoo", ("Z", "UW1")), ("a", ("AH0",))]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"fc_w": (74, WIDE), "fc_b": (74,)}
    for side, num in (("enc", 29), ("dec", 74)):
        shapes |= {f"{side}_emb": (num, 6), f"{side}_w_ih": (3 * WIDE, 6)}
        shapes |= {f"{side}_w_hh": (3 * WIDE, WIDE)}
        shapes |= {f"{side}_b_ih": (3 * WIDE,), f"{side}_b_hh": (3 * WIDE,)}
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def params(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("g2p") / "weights.npz"
    np.savez(path, **arrays)
    return g2p.load_phonemes(path)


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


def gru(p, side, state, x):
    """PyTorch's, one word in float64."""
    gi = p[f"{side}_w_ih"] @ x + p[f"{side}_b_ih"]
    gh = p[f"{side}_w_hh"] @ state + p[f"{side}_b_hh"]
    r, z = (sigmoid(gi[i : i + WIDE] + gh[i : i + WIDE]) for i in (0, WIDE))
    n = np.tanh(gi[2 * WIDE :] + r * gh[2 * WIDE :])
    return (1 - z) * n + z * state


def by_hand(arrays, word, spoken):
    p = {name: x.astype(np.float64) for name, x in arrays.items()}
    state = np.zeros(WIDE)
    for letter in [*word, "</s>"]:
        row = p["enc_emb"][g2p.LETTERS.index(letter)]
        state = gru(p, "enc", state, row)
    last, logits = state, []
    for phoneme in ["<s>", *spoken]:
        state = gru(p, "dec", state, p["dec_emb"][g2p.PHONEMES.index(phoneme)])
        logits.append(p["fc_w"] @ state + p["fc_b"])
    return last, np.array(logits)


@pytest.mark.slow
def test_logits_and_states_are_those_of_a_word_at_a_time(arrays, params):
    logits, acts = g2p.phonemes(params, g2p.words_from_pairs(PAIRS), {})
    for i, (word, spoken) in enumerate(PAIRS):
        last, wanted = by_hand(arrays, word, spoken)
        np.testing.assert_allclose(acts["state"][i], last, atol=2e-5)
        np.testing.assert_allclose(logits[i, : len(wanted)], wanted, atol=1e-4)


def test_the_loss_is_that_of_the_phonemes_and_of_no_padding(arrays, params):
    words = g2p.words_from_pairs(PAIRS)
    logits, _ = g2p.phonemes(params, words, {})
    found = jax.vmap(g2p.phoneme_loss)(logits, words.phonemes)
    for one, (word, spoken) in zip(found, PAIRS, strict=True):
        _, wanted = by_hand(arrays, word, spoken)
        targets = [g2p.PHONEMES.index(x) for x in (*spoken, "</s>")]
        chances = np.exp(wanted) / np.exp(wanted).sum(1, keepdims=True)
        nll = -np.log(chances[np.arange(len(targets)), targets]).sum()
        np.testing.assert_allclose(one, nll, rtol=1e-5)


@pytest.mark.slow
def test_gradients_at_the_state_are_those_of_every_word_alone(params):
    words = g2p.words_from_pairs(PAIRS)
    readout = ft.readouts.loss(g2p.phoneme_loss, words.phonemes)
    taps = ft.tap(g2p.phonemes, params, words, sites="state", readout=readout)["state"]

    def alone(delta, i):
        one = jax.tree.map(lambda x: x[i : i + 1], words)
        logits, _ = g2p.phonemes(params, one, {"state": delta[None]})
        return g2p.phoneme_loss(logits[0], one.phonemes[0])

    for i in range(len(PAIRS)):
        wanted = jax.grad(alone)(jnp.zeros(WIDE), i)
        np.testing.assert_allclose(taps.grads[i, 0], wanted, atol=1e-5)


def test_bad_words_and_files_are_refused(arrays, tmp_path):
    for bad in ([], [("", ("T",))], [("a1", ("T",))], [("a", ("XX",))]):
        with pytest.raises(ValueError, match="words_from_pairs: wanted words"):
            g2p.words_from_pairs(bad)
    with pytest.raises(FileNotFoundError, match="there is no"):
        g2p.load_phonemes(tmp_path / "no.npz")
    np.savez(tmp_path / "other.npz", **(arrays | {"fc_b": np.zeros(3)}))
    with pytest.raises(ValueError, match="other arrays than g2p-en at fc_b"):
        g2p.load_phonemes(tmp_path / "other.npz")
    whole = (tmp_path / "other.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no whole npz"):
        g2p.load_phonemes(tmp_path / "cut.npz")


@pytest.mark.slow
def test_the_released_network_pronounces_its_dictionary():
    for name in ("g2p", "cmudict"):
        if not (cache_folder() / name).exists():
            pytest.skip(f"needs: python scripts/fetch.py {name}")
    params = g2p.load_phonemes(locate("g2p"))
    entries = json.loads(locate("cmudict").read_text(encoding="utf-8"))
    known = [(w, s.split()) for w, s in entries.items() if w.isalpha() and w.isascii()]
    chosen = np.random.default_rng(0).choice(len(known), 2000, replace=False)
    words = g2p.words_from_pairs(known[i] for i in chosen)
    logits, _ = jax.jit(lambda p, w: g2p.phonemes(p, w, {}))(params, words)
    targets = words.phonemes[:, 1:]
    right = (logits.argmax(-1) == targets)[np.asarray(targets) > 0]
    assert 0.93 < right.mean() < 0.95
    readout = ft.readouts.loss(g2p.phoneme_loss, words.phonemes)
    taps = ft.tap(g2p.phonemes, params, words, sites="state", readout=readout)["state"]

    def ratio(rows):
        values = np.linalg.eigvalsh(rows.T @ rows)
        return values.sum() ** 2 / (values**2).sum()

    acts, grads = np.asarray(taps.acts, float), np.asarray(taps.grads[:, 0], float)
    assert 50 < ratio(acts - acts.mean(0)) < 65
    assert ratio(grads) < 30
