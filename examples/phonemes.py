r"""Letters to phonemes: a small released network of two GRUs, encoder and decoder.

The decoder knows a word by the encoder's last state alone, so every feature of the
word's sound has to be at that site.

References:
  Park and Kim, g2p-en 2.1 (2019), for the network; Cho et al. (2014), arXiv 1406.1078,
  for gated recurrent units.
"""

import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toyfeat.tap import from_function
from toyfeat.types import Array, Params

LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
# The 70 phonemes of the CMU dictionary: vowels with a stress of 0, 1 or 2.
_VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW")
_OTHERS = (
    *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P", "R"),
    *("S", "SH", "T", "TH", "UW", "V", "W", "Y", "Z", "ZH"),
)
_STRESSED = [f"{vowel}{i}" for vowel in (*_VOWELS, "OY", "UH", "UW") for i in range(3)]
_SPOKEN = sorted([*_STRESSED, *_OTHERS])
PHONEMES = ("<pad>", "<unk>", "<s>", "</s>", *_SPOKEN)

SITES = ("state", "decoded")
"""The encoder's last state ``[B, 256]``, and the decoder's ``[B, T, 256]`` on the way
to its logits."""


class Words(NamedTuple):
    """Words and their pronunciations, padded.

    Attributes:
      letters: ``[B, L]`` int, with ``</s>`` at the end.
      length: ``[B]`` int, letters before ``</s>``.
      phonemes: ``[B, T + 1]`` int, from ``<s>`` to ``</s>``.
    """

    letters: Array
    length: Array
    phonemes: Array


def load_phonemes(path: str | Path) -> Params:
    """Read the weights of g2p-en.

    Args:
      path: ``checkpoint20.npz`` of the package.

    Returns:
      Arrays by name, ``enc_emb [29, D]``, ``enc_w_ih [3 H, D]`` and so on.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if the file is damaged, or has other arrays; names them.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_phonemes: there is no {path}")
    try:
        with Path(path).open("rb") as raw, np.load(raw) as file:
            params = {name: jnp.asarray(file[name]) for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"load_phonemes: {path} is no whole npz file ({error})"
        ) from None
    # Widths are those of the file; all shapes have to fit them.
    shapes = {name: x.shape for name, x in params.items()}
    hidden = shapes.get("enc_w_hh", (0, 0))[-1]
    expected = {"fc_w": (len(PHONEMES), hidden), "fc_b": (len(PHONEMES),)}
    for side, symbols in (("enc", LETTERS), ("dec", PHONEMES)):
        width = shapes.get(f"{side}_emb", (0, 0))[-1]
        expected |= {
            f"{side}_emb": (len(symbols), width),
            f"{side}_w_ih": (3 * hidden, width),
            f"{side}_w_hh": (3 * hidden, hidden),
            f"{side}_b_ih": (3 * hidden,),
            f"{side}_b_hh": (3 * hidden,),
        }
    names = sorted(expected | shapes)
    if wrong := [n for n in names if expected.get(n) != shapes.get(n)]:
        raise ValueError(
            f"load_phonemes: {path} has other arrays than g2p-en at {', '.join(wrong)}"
        )
    return params


def words_from_pairs(pairs: Iterable[tuple[str, Sequence[str]]]) -> Words:
    """Make arrays of spellings and pronunciations.

    Args:
      pairs: a word in letters a to z and its phonemes, such as ``("at", ("AE1",
        "T"))``.

    Returns:
      :class:`Words`.

    Raises:
      ValueError: for a word without letters, a letter or a phoneme that the network
        does not have, or no words.

    Example:
      >>> words = words_from_pairs([("at", ("AE1", "T")), ("a", ("AH0",))])
      >>> words.letters.shape, words.length.tolist(), words.phonemes.shape
      ((2, 3), [2, 1], (2, 4))
    """
    pairs = [(word.lower(), tuple(spoken)) for word, spoken in pairs]
    unknown = [
        word
        for word, spoken in pairs
        if not word or {*word} - {*LETTERS[3:]} or {*spoken} - {*_SPOKEN}
    ]
    if unknown or not pairs:
        raise ValueError(
            "words_from_pairs: wanted words in letters a to z with phonemes of the "
            f"CMU dictionary, got {unknown[:3] or 'none'}"
        )
    letters = _padded(LETTERS, ([*word, "</s>"] for word, _ in pairs))
    phonemes = _padded(PHONEMES, (["<s>", *spoken, "</s>"] for _, spoken in pairs))
    length = jnp.asarray([len(word) for word, _ in pairs], jnp.int32)
    return Words(letters=letters, length=length, phonemes=phonemes)


def _padded(names: Sequence[str], rows: Iterable[Sequence[str]]) -> Array:
    """Number the symbols of each row, and pad rows with 0 to the longest."""
    index = {name: i for i, name in enumerate(names)}
    numbers = [[index[name] for name in row] for row in rows]
    width = max(map(len, numbers))
    table = np.zeros((len(numbers), width), np.int32)
    for row, entries in zip(table, numbers, strict=True):
        row[: len(entries)] = entries
    return jnp.asarray(table)


def _forward(params: Params, words: Words, tap: Callable[[str, Array], Array]) -> Array:
    """Compute logits ``[B, T, 74]`` of each phoneme from those before it."""

    def run(side: str, state: Array, tokens: Array) -> Array:
        def step(state: Array, x: Array) -> tuple[Array, Array]:
            state = _gru_cell(params, side, state, x)
            return state, state

        inputs = params[f"{side}_emb"][tokens].swapaxes(0, 1)
        return jax.lax.scan(step, state, inputs)[1].swapaxes(0, 1)

    # The encoder reads the letters up to </s>.
    zeros = jnp.zeros((len(words.letters), params["enc_w_hh"].shape[1]))
    states = run("enc", zeros, words.letters)
    last = states[jnp.arange(len(states)), words.length]
    # The decoder starts from its state, and is given the phonemes so far.
    decoded = run("dec", tap("state", last), words.phonemes[:, :-1])
    decoded = tap("decoded", decoded)
    return decoded @ params["fc_w"].T + params["fc_b"][None, None, :]


phonemes = from_function(_forward)
"""Probed model: ``(params, Words, probes) -> (logits [B, T, 74], acts)``, where each
phoneme is predicted from those before it."""


def phoneme_loss(logits: Array, spoken: Array) -> Array:
    """Sum the cross-entropy of the phonemes of a word, without the padding.

    Args:
      logits: ``[T, 74]``.
      spoken: ``[T + 1]`` int, the phonemes from ``<s>`` on.

    Returns:
      ``[]``, for :func:`toyfeat.readouts.loss` with the labels ``words.phonemes``.
    """
    targets = spoken[1:]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
    return jnp.sum(jnp.where(targets > 0, nll[:, 0], 0.0))


def _gru_cell(params: Params, side: str, state: Array, x: Array) -> Array:
    """Run a gated recurrent unit, gates in the order of reset, update, new."""
    from_input = x @ params[f"{side}_w_ih"].T + params[f"{side}_b_ih"][None, :]
    from_state = state @ params[f"{side}_w_hh"].T + params[f"{side}_b_hh"][None, :]
    reset_x, update_x, new_x = jnp.split(from_input, 3, axis=-1)
    reset_h, update_h, new_h = jnp.split(from_state, 3, axis=-1)
    reset = jax.nn.sigmoid(reset_x + reset_h)
    update = jax.nn.sigmoid(update_x + update_h)
    new = jnp.tanh(new_x + reset * new_h)
    return (1 - update) * new + update * state
