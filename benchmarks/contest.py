"""Ours and peers in processes of their own, on the same arrays, in turns."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
PEERS = HERE / "peers" / ".venv" / "bin" / "python"


class Contestant(NamedTuple):
    """A method of a library, under one number of BLAS threads.

    Attributes:
      method: the name that the worker knows.
      threads: ``OPENBLAS_NUM_THREADS``, or ``None`` for the default.
      ours: whether it is ours or a peer's.
      label: what else to call it, for one method with other arguments.
      options: arguments of ours.
    """

    method: str
    threads: int | None
    ours: bool
    options: tuple[tuple[str, Any], ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """For tables."""
        return self.label or self.method


class Outcome(NamedTuple):
    """Median seconds, and how wrong the result is."""

    seconds: float
    spread: float
    error_s: float
    excess: float
    threads: str
    info: dict


class Worker:
    """A process that answers one line for each line it is sent."""

    def __init__(self, python: Path, script: Path, threads: int | None) -> None:
        """Start it."""
        env = dict(os.environ)
        env.pop("OPENBLAS_NUM_THREADS", None)
        if threads is not None:
            env["OPENBLAS_NUM_THREADS"] = str(threads)
        env["PYTHONPATH"] = str(HERE.parent)
        self.process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def ask(self, **order: Any) -> dict:
        """Send an order and wait for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended while it was asked for {order}")
        return json.loads(line)

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def contest(
    array: np.ndarray,
    spectrum: np.ndarray,
    rank: int,
    contestants: Sequence[Contestant],
    folder: Path,
    rounds: int,
) -> dict[str, list[Outcome]]:
    """Time all contestants in turns, and score what they return.

    Args:
      array: ``[n, d]`` or ``[batch, n, d]``, with the known spectrum.
      spectrum: its singular values.
      rank: how many are wanted.
      contestants: who takes part.
      folder: for the arrays.
      rounds: how many turns.

    Returns:
      Name to one outcome per thread setting.
    """
    path = folder / "array.npy"
    np.save(path, array)
    workers = {}
    for one in contestants:
        python = Path(sys.executable) if one.ours else PEERS
        script = HERE / ("ours.py" if one.ours else "peers/worker.py")
        workers[one] = Worker(python, script, one.threads)
    infos, times = {}, {one: [] for one in contestants}
    for one, worker in workers.items():
        worker.ask(op="load", path=str(path))
        options = dict(one.options)
        infos[one] = worker.ask(
            op="prepare", method=one.method, rank=rank, options=options
        )
    for _ in range(rounds):
        for one, worker in workers.items():
            time.sleep(0.4)  # threads of the one before may go on spinning
            times[one].append(worker.ask(op="run")["seconds"])
    found: dict[str, list[Outcome]] = {}
    for one, worker in workers.items():
        error, excess = float("nan"), float("nan")
        if infos[one].get("scored", True):
            out = folder / "result.npz"
            worker.ask(op="save", path=str(out))
            result = np.load(out)
            error, excess = scores(array, spectrum, result["s"], result["v"])
        worker.end()
        taken = times[one]
        found.setdefault(one.name, []).append(
            Outcome(
                statistics.median(taken),
                (max(taken) - min(taken)) / statistics.median(taken),
                error,
                excess,
                "default" if one.threads is None else str(one.threads),
                infos[one],
            )
        )
    path.unlink()
    return found


def scores(
    array: np.ndarray, spectrum: np.ndarray, s: np.ndarray, v: np.ndarray
) -> tuple[float, float]:
    """Largest relative error of a value, and the residual over the best, less 1."""
    if array.ndim == 3:
        each = [scores(a, spectrum, x, y) for a, x, y in zip(array, s, v, strict=True)]
        return max(e for e, _ in each), max(x for _, x in each)
    rank = len(s)
    error = float(np.max(np.abs(s - spectrum[:rank]) / spectrum[:rank]))
    kept, v = 0.0, np.linalg.qr(v.astype(np.float64))[0]
    for start in range(0, len(array), 50_000):
        block = array[start : start + 50_000].astype(np.float64)
        kept += float(np.sum((block @ v) ** 2))
    total = float(np.sum(spectrum.astype(np.float64) ** 2))
    best = float(np.sum(spectrum[rank:].astype(np.float64) ** 2))
    return error, float(np.sqrt(max(total - kept, 0) / best) - 1)
