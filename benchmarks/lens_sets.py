"""Test sets of lenses: prompts with an intermediate answer that should show in them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DATA = Path(__file__).parent / "data" / "lens"
KINDS = (
    "two_hop",
    "order_of_operations",
    "association",
    "typo",
    "rhyme",
    "other_languages",
)
LENGTH = 40
"""Tokens that prompts are filled up to behind their end, which no position sees."""


class Items(NamedTuple):
    """Test set.

    Attributes:
      texts: of the items: ``prompt``, ``intermediate``, ``answer`` and ``group``.
      tokens: ``[num, T]``, filled up.
      at: ``[num]``, position where the intermediate answer should show.
      last: ``[num]``, last position of the prompt.
      intermediate: ``[num]`` tokens.
      answer: ``[num]``, first tokens of the answers, -1 without one.
    """

    texts: list[dict[str, str]]
    tokens: np.ndarray
    at: np.ndarray
    last: np.ndarray
    intermediate: np.ndarray
    answer: np.ndarray


def read_items(kind: str, tokenizer: Any, start: int) -> Items:
    """Read a test set, and check that intermediate answers are single tokens."""
    lines = (DATA / f"{kind}.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line) for line in lines]
    rows, ats, lasts, intermediate, answers = [], [], [], [], []

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for text in texts:
        prompt, before = (
            [start, *encode(x)]
            for x in (text["prompt"], text.get("at", text["prompt"]))
        )
        token = encode(text["intermediate"])
        if len(token) != 1 or prompt[: len(before)] != before or len(prompt) > LENGTH:
            raise SystemExit(
                f"lens_recall: {kind} has an item that does not fit: {text}"
            )
        rows.append(prompt + [start] * (LENGTH - len(prompt)))
        ats.append(len(before) - 1)
        lasts.append(len(prompt) - 1)
        intermediate.append(token[0])
        answers.append(encode(text["answer"])[0] if text["answer"] else -1)
    return Items(texts, *map(np.array, (rows, ats, lasts, intermediate, answers)))


def others(tokens: np.ndarray, shift: int) -> np.ndarray:
    """Intermediate answers of other items, different from one's own."""
    result = []
    for index, token in enumerate(tokens):
        rolled = np.roll(tokens, -(index + 1 + 7 * shift))
        result.append(rolled[rolled != token][0])
    return np.array(result)
