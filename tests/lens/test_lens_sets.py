"""Test sets of intermediate answers: whole, and not given away by their prompts."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

KINDS = (
    "two_hop",
    "order_of_operations",
    "association",
    "typo",
    "rhyme",
    "other_languages",
)


@pytest.fixture
def sets(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("lens_sets")


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_has_sixty_items_that_do_not_say_their_answer(sets, kind):
    assert kind in sets.KINDS
    lines = (sets.DATA / f"{kind}.jsonl").read_text("utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    assert len(items) >= 60
    assert len({item["prompt"] for item in items}) == len(items)
    for item in items:
        assert {"prompt", "intermediate", "answer", "group"} <= set(item)
        assert item["prompt"].startswith(item.get("at", ""))
        before = item.get("at", item["prompt"])
        words = before.lower().replace(",", " ").split()
        assert item["intermediate"].strip().lower() not in words


def test_the_answers_of_others_are_others(sets):
    tokens = np.array([1, 1, 2, 3, 2])
    for shift in range(3):
        assert np.all(sets.others(tokens, shift) != tokens)
