"""Time torch's randomized SVD of a matrix in a file, on the GPU if there is one.

Run as ``python svd.py FOLDER RANK ROUNDS``; reads ``FOLDER/matrix.npy``.  Prints
seconds, singular values and the device as a JSON line.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch


def main(folder: str, rank: str, rounds: str) -> None:
    """Decompose again and again, and print the median."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.from_numpy(np.load(Path(folder) / "matrix.npy")).to(device)
    taken, values = [], None
    for _ in range(int(rounds) + 1):
        wait(device)
        start = time.perf_counter()
        _, values, _ = torch.svd_lowrank(matrix, q=int(rank) + 10, niter=2)
        wait(device)
        taken.append(time.perf_counter() - start)
    assert values is not None
    answer = {"seconds": statistics.median(taken[1:]), "device": device}
    print(json.dumps(answer | {"s": values[: int(rank)].tolist()}))


def wait(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
