"""Files of lenses against torch itself: what either writes, the other reads.

PYTHONPATH=. benchmarks/peers/.venv/bin/python benchmarks/peers/lens_files.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

import toyfeat as ft

DIM, LAYERS = 8, 3


def main() -> None:
    """Write and read both ways; any difference raises."""
    model = ft.lenses.from_probed(
        ft.from_function(lambda p, x, tap: tap("d", tap("c", tap("b", tap("a", x))))),
        sites=["a", "b", "c", "d"],
        unembed=lambda p, h: h,
    )
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(LAYERS, DIM, DIM)).astype(np.float16)
    layers = {i: torch.from_numpy(matrices[i].copy()) for i in range(LAYERS)}
    published = {
        "J": layers,
        "n_prompts": 100,
        "source_layers": list(range(LAYERS)),
        "d_model": DIM,
    }
    extra = {"metadata": {"model": "m", "revision": "r", "floats": [0.5, None, True]}}
    views = {i: torch.from_numpy(matrices[i].T.copy()).T for i in range(LAYERS)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Torch writes: plain, with metadata, transposed views, one shared storage.
        shared = torch.from_numpy(matrices.copy())
        cases = {
            "plain": published,
            "metadata": {**published, **extra},
            "transposed": {**published, "J": views},
            "shared": {**published, "J": {i: shared[i] for i in range(LAYERS)}},
            "float32": {**published, "J": {i: x.float() for i, x in layers.items()}},
        }
        for case, content in cases.items():
            path = folder / f"{case}.pt"
            torch.save(content, path)
            lens = ft.lenses.load(path, model, {})
            for i, site in enumerate("abc"):
                found = np.asarray(lens.maps[site].matrices[0])
                np.testing.assert_array_equal(found, matrices[i].astype(np.float32))
            print(f"torch wrote, toyfeat read: {case}, {lens.about}")
        # Toyfeat writes what torch reads without running code.
        lens.save(folder / "ours.pt")
        read = torch.load(folder / "ours.pt", weights_only=True)
        for i in range(LAYERS):
            np.testing.assert_array_equal(read["J"][i].numpy(), matrices[i])
        assert read["d_model"] == DIM
        assert list(read["source_layers"]) == [0, 1, 2]
        kinds = {key: type(value).__name__ for key, value in read.items()}
        print(f"toyfeat wrote, torch.load(weights_only=True) read: {kinds}")


if __name__ == "__main__":
    main()
