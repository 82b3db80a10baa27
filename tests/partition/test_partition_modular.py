"""Parts of modular addition against waves."""

import importlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def test_shares_of_a_wave_and_of_two(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    modular = importlib.import_module("partition_modular")
    a, b = np.meshgrid(np.arange(29), np.arange(29), indexing="ij")
    angle = 2 * np.pi / 29
    one = 3 + np.cos(5 * angle * a) + np.sin(5 * angle * (a + b))
    two = np.cos(5 * angle * a) + 0.5 * np.cos(7 * angle * b)
    frequencies, shares = modular.wave_shares(np.stack([one, two], axis=-1))
    assert frequencies.tolist() == [5, 5]
    assert shares == pytest.approx([1, 0.8])
