"""Tokenizers of models, and windows of tokens."""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.models.decoder import gguf
from toyfeat.models.decoder.checks import is_size, shorten, show_value

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens of a GGUF file that are not split
_WITHOUT = "fetch it again, or read without: tokenizer=False"


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a folder or a GGUF file, ``None`` if it has none.

    Raises:
      ValueError: if it cannot be read, or is of a kind that is not covered.
      ImportError: without the ``lm`` extra.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        return None
    try:
        library = importlib.import_module("tokenizers")
    except ImportError as error:
        raise ImportError(
            'load_decoder: tokenizers is not installed: pip install "toyfeat[lm]"; or '
            "read without: tokenizer=False"
        ) from error
    if path.is_dir():
        with _naming_fault(f"load_decoder: {file} is no tokenizer file", _WITHOUT):
            tokenizer = library.Tokenizer.from_file(str(file))
        # A file may keep the settings of its last use; texts are not cut or padded.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    return _load_gguf_tokenizer(library, gguf.open_gguf(path).fields, path)


def _load_gguf_tokenizer(library: Any, fields: Mapping[str, Any], path: Path) -> Any:
    """Load a byte-level BPE tokenizer from the fields of a GGUF file."""
    # BPE over bytes, with one of two ways to split a text into words.
    kind, split = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind is None:
        return None
    if kind != "gpt2" or split not in ("gpt-2", "smollm"):
        raise ValueError(
            f"load_decoder: the tokenizer of {path} is of the kind "
            f"{show_value(kind)}, {show_value(split)}, which is not covered; read "
            "without: tokenizer=False"
        )
    # Names of the tokens, the pairs that join to them, and what kind each is.
    wanted = [f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "token_type")]
    missing = [name for name in wanted if name not in fields]
    if missing:
        raise ValueError(
            f"load_decoder: the tokenizer of {path} has no entry {missing[0]!r}; read "
            "without: tokenizer=False"
        )
    fault = f"load_decoder: the tokenizer of {path} does not fit together"
    with _naming_fault(fault, _WITHOUT):
        names, merges, types = (fields[name] for name in wanted)
        return _make_bpe(library, names, merges, types, split)


def _make_bpe(
    library: Any, names: list[str], merges: list[str], types: list[int], split: str
) -> Any:
    """Make a byte-level BPE tokenizer; ``"smollm"`` splits numbers into digits."""
    # Byte pairs.
    pairs = [tuple(pair.split(" ")) for pair in merges]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = library.Tokenizer(library.models.BPE(vocab, pairs))
    # What splits a text into words before.
    splitters = library.pre_tokenizers
    steps = [splitters.Digits(individual_digits=True)] if split == "smollm" else []
    steps.append(splitters.ByteLevel(add_prefix_space=False, use_regex=True))
    tokenizer.pre_tokenizer = splitters.Sequence(steps)
    tokenizer.decoder = library.decoders.ByteLevel()
    # Tokens that are not split.
    added = [
        library.AddedToken(name, special=kind == _CONTROL)
        for name, kind in zip(names, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


@contextmanager
def _naming_fault(fault: str, advice: str) -> Iterator[None]:
    """Turn what the library raises into a ``ValueError``, panics of its Rust code too.

    A panic is a ``BaseException``, which passes every ``except Exception``.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not (is_panic or isinstance(error, Exception)):
            raise  # KeyboardInterrupt and the like
        raise ValueError(f"{fault} ({shorten(error)}); {advice}") from error


def check_tokenizer(who: str, tokenizer: Any, vocab: int, path: Path) -> None:
    """Raise if a tokenizer has tokens that the model does not have.

    Raises:
      ValueError: with both sizes.
    """
    num = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if num > vocab:
        raise ValueError(
            f"{who}: the tokenizer has {num} tokens, the model {vocab}; they do not "
            f"belong together, take all of {path} from one place"
        )


def token_windows(
    tokenizer: Any, texts: Iterable[str], length: int, *, start: int | None = None
) -> np.ndarray:
    """Cut texts into windows of one length; the remainder of a text is dropped.

    Args:
      tokenizer: of the ``tokenizers`` library.
      texts: documents; no window spans two.
      length: tokens per window.
      start: token put in front of every window, which then has ``length - 1`` of
        the text; none by default.

    Returns:
      ``[num, length]`` int32.

    Raises:
      TypeError: for one text instead of several.
      ValueError: for a length below 2, a start that is no token, a text that the
        tokenizer cannot encode, or if no text fills a window.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
      >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> token_windows(words, ["a b a", "b b c a b"], 2).tolist()
      [[0, 1], [1, 1], [2, 0]]
    """
    if isinstance(texts, str):
        raise TypeError("token_windows: wanted several texts, got one; give [text]")
    if not is_size(length) or length < 2:
        raise ValueError(
            f"token_windows: length must be at least 2, got {show_value(length)}; give "
            "an int"
        )
    if start is not None and start not in tokenizer.get_vocab().values():
        raise ValueError(
            "token_windows: start must be the id of a token, got "
            f"{show_value(start)}; give one of the tokenizer's"
        )
    # Windows without the token in front.
    width = length - (start is not None)
    rows = []
    longest = 0
    for text in texts:
        fault = f"token_windows: the tokenizer cannot encode text {len(rows)}"
        with _naming_fault(fault, "fetch its file again"):
            encoded = tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray(encoded.ids, np.int32)
        longest = max(longest, len(ids))
        rows.append(ids[: len(ids) // width * width].reshape(-1, width))
    windows = np.concatenate(rows) if rows else np.zeros((0, width), np.int32)
    if not len(windows):
        raise ValueError(
            f"token_windows: no text fills a window of {length} tokens, the longest of "
            f"{len(rows)} has {longest}; give more text or a smaller length"
        )
    # The token in front.
    if start is None:
        return windows
    first = np.full((len(windows), 1), start, np.int32)
    return np.concatenate([first, windows], axis=1)
