"""Time ours and peers in processes of their own, on the same arrays, in turns."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
PEERS = HERE / "peers" / ".venv" / "bin" / "python"
BLOCK = 50_000  # rows in float64 at a time, 400 MB of a thousand columns


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
        """Name for tables."""
        return self.label or self.method


class Outcome(NamedTuple):
    """Times and errors of a method.

    Attributes:
      seconds: median.
      spread: largest less smallest, over the median.
      error_s: largest relative error of a singular value.
      excess: residual over the best one, less 1.
      threads: of BLAS.
      info: what the worker says of its method.
    """

    seconds: float
    spread: float
    error_s: float
    excess: float
    threads: str
    info: dict


class Worker:
    """A process that answers one line for each line it is sent."""

    def __init__(self, python: Path, script: Path, threads: int | None) -> None:
        """Start the process."""
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
        print(json.dumps(order), file=self._pipe(self.process.stdin), flush=True)
        line = self._pipe(self.process.stdout).readline()
        if not line:
            raise RuntimeError(f"a worker ended while it was asked for {order}")
        return json.loads(line)

    def end(self) -> None:
        """Close its input, and wait until it ends."""
        self._pipe(self.process.stdin).close()
        self.process.wait()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        if pipe is None:
            raise RuntimeError("Worker: the process has no pipe")
        return pipe


def contest(
    array: np.ndarray,
    spectrum: np.ndarray,
    rank: int,
    contestants: Sequence[Contestant],
    folder: Path,
    rounds: int,
) -> dict[str, list[Outcome]]:
    """Time all contestants in turns, and score their results.

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
    # Load the array and compile.
    workers = start_workers(contestants)
    infos = {}
    for contestant, worker in workers.items():
        worker.ask(op="load", path=str(path))
        order = {"method": contestant.method, "options": dict(contestant.options)}
        infos[contestant] = worker.ask(op="prepare", rank=rank, **order)
    # Take turns, so that a slow spell of the machine is one of all.
    times = {contestant: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant, worker in workers.items():
            time.sleep(0.4)  # threads of the one before may go on spinning
            times[contestant].append(worker.ask(op="run")["seconds"])
    path.unlink()
    # Score the last results.
    outcomes: dict[str, list[Outcome]] = {}
    for contestant, worker in workers.items():
        error, excess = float("nan"), float("nan")
        if infos[contestant].get("scored", True):
            result = save_result(worker, folder)
            error, excess = scores(array, spectrum, result["s"], result["v"])
        worker.end()
        seconds, threads = times[contestant], contestant.threads
        outcome = Outcome(
            seconds=statistics.median(seconds),
            spread=(max(seconds) - min(seconds)) / statistics.median(seconds),
            error_s=error,
            excess=excess,
            threads="default" if threads is None else str(threads),
            info=infos[contestant],
        )
        outcomes.setdefault(contestant.name, []).append(outcome)
    return outcomes


def save_result(worker: Worker, folder: Path) -> Any:
    """Ask a worker for the arrays of its last run."""
    path = folder / "result.npz"
    worker.ask(op="save", path=str(path))
    return np.load(path)


def start_workers(contestants: Sequence[Contestant]) -> dict[Contestant, Worker]:
    """Start a process per contestant."""
    workers = {}
    for contestant in contestants:
        ours = contestant.ours
        python = Path(sys.executable) if ours else PEERS
        script = HERE / "peers" / ("toyfeat_linalg.py" if ours else "worker.py")
        workers[contestant] = Worker(python, script, contestant.threads)
    return workers


def scores(
    array: np.ndarray, spectrum: np.ndarray, s: np.ndarray, v: np.ndarray
) -> tuple[float, float]:
    """Compute the largest relative error of a value, and the excess residual."""
    if array.ndim == 3:
        pairs = [scores(a, spectrum, x, y) for a, x, y in zip(array, s, v, strict=True)]
        return max(error for error, _ in pairs), max(excess for _, excess in pairs)
    # The residual is what the found directions do not explain of |A|^2; the best one is
    # what the values past the rank sum to (Eckart and Young).
    rank = len(s)
    error = float(np.max(np.abs(s - spectrum[:rank]) / spectrum[:rank]))
    explained, v = 0.0, np.linalg.qr(v.astype(np.float64))[0]
    for start in range(0, len(array), BLOCK):
        block = array[start : start + BLOCK].astype(np.float64)
        explained += float(np.sum((block @ v) ** 2))
    total = float(np.sum(spectrum.astype(np.float64) ** 2))
    best = float(np.sum(spectrum[rank:].astype(np.float64) ** 2))
    return error, float(np.sqrt(max(total - explained, 0) / best) - 1)
