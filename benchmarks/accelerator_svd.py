"""Time the randomized SVD beside torch's on the same device.

    bash benchmarks/peers/setup.sh     # once: torch, in an environment of its own
    python benchmarks/accelerator_svd.py [--tiny] [--json PATH] [--peer PYTHON]

Float32, singular values 1/j, the same matrix for both, one after the other, each in a
process of its own.  The error is the largest of the leading singular values, relative
to the first.  Without the peer's environment only ours is timed.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from contest import HERE, PEERS
from harness import (
    BenchmarkConfig,
    finish,
    medians,
    parse_command,
    program,
    row,
    run_peer,
)

import toyfeat as ft

SIZES = ((16_384, 2048, 32), (4096, 4096, 64)), ((200, 40, 4),)


@dataclass(frozen=True)
class SVDConfig(BenchmarkConfig):
    """Options of this benchmark."""

    peer: Path = PEERS
    """Python that has torch."""


def main() -> None:
    """Measure every size."""
    config = parse_command(SVDConfig, __doc__)
    rows = []
    for num, dim, rank in SIZES[config.tiny]:
        rows.append(measure(num, dim, rank, config))
        print(describe(rows[-1]))
    finish(rows, [], config.json)


def measure(num: int, dim: int, rank: int, config: SVDConfig) -> dict[str, Any]:
    """Time both on one matrix."""
    matrix, values = make_matrix(num, dim)
    rounds = 1 if config.tiny else 5

    def decompose(key: jax.Array, matrix: jax.Array) -> Any:
        return ft.linalg.randomized_svd(key, matrix, rank=rank)

    ours = program(decompose, jax.random.key(0), jax.numpy.asarray(matrix))
    figures = {
        "ours_s": medians({"ours": ours.run}, rounds=rounds)["ours"],
        "compile_s": ours.compile_s,
        "error": largest_error(ours.run().s, values[:rank]),
    }
    if config.peer.exists():
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder) / "matrix.npy", matrix)
            script, options = HERE / "peers" / "svd.py", (str(rank), str(rounds))
            peer = run_peer(str(config.peer), script, Path(folder), *options)
        figures |= {"peer_s": peer["seconds"], "peer_device": peer["device"]}
        figures["peer_error"] = largest_error(peer["s"], values[:rank])
        figures["ratio"] = figures["ours_s"] / peer["seconds"]
    return row("svd", {"rows": num, "dim": dim, "rank": rank}, "randomized", **figures)


def make_matrix(num: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Make a matrix with the singular values 1/j, and these."""
    rng = np.random.default_rng(0)
    left, right = (
        np.linalg.qr(rng.normal(size=(size, min(num, dim))))[0] for size in (num, dim)
    )
    values = 1 / np.arange(1, min(num, dim) + 1)
    return ((left * values) @ right.T).astype(np.float32), values


def largest_error(found: Any, wanted: np.ndarray) -> float:
    """Largest error of singular values, relative to the first."""
    return float(np.max(np.abs(np.asarray(found, np.float64) - wanted)) / wanted[0])


def describe(line: dict[str, Any]) -> str:
    """Line for the terminal."""
    text = f"{line['size']}: {1e3 * line['ours_s']:.1f} ms, error {line['error']:.1e}"
    if "peer_s" in line:
        text += f"; torch on {line['peer_device']} {1e3 * line['peer_s']:.1f} ms, "
        text += f"error {line['peer_error']:.1e}"
    return text


if __name__ == "__main__":
    main()
