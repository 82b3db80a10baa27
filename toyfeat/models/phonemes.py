r"""A small released network: letters to phonemes, a GRU that reads and one that speaks.

The encoder's last state is all that the decoder knows of a word, so that it is a site
where every feature of the word's sound has to be.

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
      ValueError: if it is not whole, or has other arrays; names them.
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
    sizes = {name: x.shape for name, x in params.items()}
    wide = sizes.get("enc_w_hh", (0, 0))[-1]
    wanted = {"fc_w": (len(PHONEMES), wide), "fc_b": (len(PHONEMES),)}
    for side, words in (("enc", LETTERS), ("dec", PHONEMES)):
        inner = sizes.get(f"{side}_emb", (0, 0))[-1]
        wanted |= {
            f"{side}_emb": (len(words), inner),
            f"{side}_w_ih": (3 * wide, inner),
            f"{side}_w_hh": (3 * wide, wide),
            f"{side}_b_ih": (3 * wide,),
            f"{side}_b_hh": (3 * wide,),
        }
    if wrong := sorted(n for n in wanted | sizes if wanted.get(n) != sizes.get(n)):
        raise ValueError(
            f"load_phonemes: {path} has other arrays than g2p-en at {', '.join(wrong)}"
        )
    return params


def words_of(pairs: Iterable[tuple[str, Sequence[str]]]) -> Words:
    """Spellings and pronunciations as arrays.

    Args:
      pairs: of a word, in letters a to z, and its phonemes, such as ``("at", ("AE1",
        "T"))``.

    Returns:
      :class:`Words`.

    Raises:
      ValueError: for a word without letters, a letter or a phoneme that the network
        does not have, or no words.

    Example:
      >>> words = words_of([("at", ("AE1", "T")), ("a", ("AH0",))])
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
            "words_of: wanted words in letters a to z with phonemes of the CMU "
            f"dictionary, got {unknown[:3] or 'none'}"
        )
    letters = _padded(LETTERS, ([*word, "</s>"] for word, _ in pairs))
    phonemes = _padded(PHONEMES, (["<s>", *spoken, "</s>"] for _, spoken in pairs))
    length = jnp.asarray([len(word) for word, _ in pairs], jnp.int32)
    return Words(letters, length, phonemes)


def _padded(names: Sequence[str], rows: Iterable[Sequence[str]]) -> Array:
    index = {name: i for i, name in enumerate(names)}
    numbers = [[index[name] for name in row] for row in rows]
    width = max(map(len, numbers))
    table = np.zeros((len(numbers), width), np.int32)
    for row, found in zip(table, numbers, strict=True):
        row[: len(found)] = found
    return jnp.asarray(table)


def _speaking(
    params: Params, words: Words, tap: Callable[[str, Array], Array]
) -> Array:
    def run(side: str, state: Array, tokens: Array) -> Array:
        def step(state: Array, x: Array) -> tuple[Array, Array]:
            state = _cell(params, side, state, x)
            return state, state

        inputs = params[f"{side}_emb"][tokens].swapaxes(0, 1)
        return jax.lax.scan(step, state, inputs)[1].swapaxes(0, 1)

    zeros = jnp.zeros((len(words.letters), params["enc_w_hh"].shape[1]))
    states = run("enc", zeros, words.letters)
    last = states[jnp.arange(len(states)), words.length]  # at </s>
    decoded = run("dec", tap("state", last), words.phonemes[:, :-1])
    decoded = tap("decoded", decoded)
    return decoded @ params["fc_w"].T + params["fc_b"][None, None, :]


phonemes = from_function(_speaking)
"""Probed model: ``(params, Words, probes) -> (logits [B, T, 74], acts)``, the phonemes
that were spoken so far given."""


def phoneme_loss(logits: Array, spoken: Array) -> Array:
    """Summed cross-entropy of the phonemes of one word, padding left out.

    Args:
      logits: ``[T, 74]``.
      spoken: ``[T + 1]`` int, from ``<s>`` on.

    Returns:
      ``[]``, for :func:`toyfeat.readouts.loss` with the labels ``words.phonemes``.
    """
    targets = spoken[1:]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
    return jnp.sum(jnp.where(targets > 0, nll[:, 0], 0.0))


def _cell(params: Params, side: str, state: Array, x: Array) -> Array:
    """A gated recurrent unit, gates in the order of reset, update, new."""
    given = x @ params[f"{side}_w_ih"].T + params[f"{side}_b_ih"][None, :]
    kept = state @ params[f"{side}_w_hh"].T + params[f"{side}_b_hh"][None, :]
    reset, update, new = jnp.split(given, 3, axis=-1)
    old_reset, old_update, old_new = jnp.split(kept, 3, axis=-1)
    reset = jax.nn.sigmoid(reset + old_reset)
    update = jax.nn.sigmoid(update + old_update)
    new = jnp.tanh(new + reset * old_new)
    return (1 - update) * new + update * state
