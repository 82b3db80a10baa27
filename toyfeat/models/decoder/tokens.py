"""Text to tokens, with the tokenizer of a model."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.models.decoder import gguf_files
from toyfeat.models.decoder.config import DecoderConfig

_SPECIAL = 3  # token type of a GGUF file: control tokens


def tokenizer_of(path: Path) -> Any:
    """The tokenizer of a folder or a GGUF file, ``None`` if it has none.

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
        try:
            return library.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"load_decoder: {file} is no tokenizer file ({error})"
            ) from error
    fields = {name: x.contents() for name, x in gguf_files.opened(path).fields.items()}
    return _of_gguf(library, fields, path)


def _of_gguf(library: Any, fields: dict[str, Any], path: Path) -> Any:
    """Byte-level pairs, with digits one by one if the file says so."""
    kind, split = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind is None:
        return None
    if kind != "gpt2" or split not in ("gpt-2", "smollm"):
        raise ValueError(
            f"load_decoder: the tokenizer of {path} is of the kind {kind!r}, "
            f"{split!r}, which is not covered; read without: tokenizer=False"
        )
    names = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    before, models = library.pre_tokenizers, library.models
    found = library.Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, merges))
    steps = [before.Digits(individual_digits=True)] if split == "smollm" else []
    steps.append(before.ByteLevel(add_prefix_space=False, use_regex=True))
    found.pre_tokenizer = before.Sequence(steps)
    found.decoder = library.decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [
        library.AddedToken(name, special=True)
        for name, one in zip(names, types, strict=True)
        if one == _SPECIAL
    ]
    found.add_special_tokens(special)
    return found


def check_tokenizer(tokenizer: Any, config: DecoderConfig) -> None:
    """Raise if a tokenizer has tokens that the model does not have.

    Raises:
      ValueError: with both sizes.
    """
    num = tokenizer.get_vocab_size(with_added_tokens=True)
    if num > config.vocab:
        raise ValueError(
            f"load_decoder: the tokenizer has {num} tokens, the model {config.vocab}; "
            "they do not belong together"
        )


def token_windows(
    tokenizer: Any, texts: Iterable[str], length: int, *, start: int | None = None
) -> np.ndarray:
    """Texts cut into windows of one length; what is left of a text is dropped.

    Args:
      tokenizer: of the ``tokenizers`` library.
      texts: documents; no window has parts of two.
      length: tokens per window.
      start: token put in front of every window, which then has ``length - 1`` of
        the text; none by default.

    Returns:
      ``[num, length]`` int32.

    Raises:
      ValueError: for a length below 2, or if no text fills a window.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
      >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> token_windows(words, ["a b a", "b b c a b"], 2).tolist()
      [[0, 1], [1, 1], [2, 0]]
    """
    if length < 2:
        raise ValueError(f"token_windows: length must be at least 2, got {length}")
    own = length - (start is not None)
    rows = []
    longest = 0
    for text in texts:
        ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        longest = max(longest, len(ids))
        rows.append(ids[: len(ids) // own * own].reshape(-1, own))
    windows = np.concatenate(rows) if rows else np.zeros((0, own), np.int32)
    if not len(windows):
        raise ValueError(
            f"token_windows: no text fills a window of {length} tokens, the longest of "
            f"{len(rows)} has {longest}; give more text or a smaller length"
        )
    if start is None:
        return windows
    first = np.full((len(windows), 1), start, np.int32)
    return np.concatenate([first, windows], axis=1)
