"""What a person sees of a training: lines of JSON, a bar, TensorBoard."""

import contextlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Report = Callable[[int, float, float, dict[str, np.ndarray]], None]
"""``(step, seconds, examples_per_s, means)``, once for every chunk."""


@contextlib.contextmanager
def reporting(
    folder: Path | None, start: int, steps: int, *, bar: bool, tensorboard: bool
) -> Iterator[Report]:
    """Everything that was asked for, as one function of a chunk."""
    with contextlib.ExitStack() as stack:
        sinks: list[Report] = []
        if tensorboard:
            sinks.append(stack.enter_context(_events(folder, start)))
        if folder is not None:
            sinks.append(_lines(folder / "metrics.jsonl", start))
        if bar and sys.stderr.isatty():
            sinks.append(stack.enter_context(_bar(start, steps)))

        def report(
            step: int, seconds: float, rate: float, means: dict[str, np.ndarray]
        ) -> None:
            for sink in sinks:
                sink(step, seconds, rate, means)

        yield report


def _lines(path: Path, start: int) -> Report:
    """Appends to the lines up to ``start``; later ones are of a run that was cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in old if _step_of(line) <= start]
    if len(kept) < len(old):
        half = path.with_name(f".{path.name}.half")
        half.write_bytes(b"".join(kept))
        os.replace(half, path)

    def report(
        step: int, seconds: float, rate: float, means: dict[str, np.ndarray]
    ) -> None:
        row = {"step": step, "seconds": seconds, "examples_per_s": rate}
        row |= {name: _plain(value.tolist()) for name, value in means.items()}
        text = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            with open(path, "ab", buffering=0) as file:
                while text:
                    text = text[file.write(text) :]
        except OSError as error:
            said = f"fit: could not write {path}: {error.strerror}; the last checkpoint"
            raise OSError(
                error.errno, f"{said} is whole. Make room, run again"
            ) from error

    return report


def _step_of(line: bytes) -> float:
    """Step of a line, inf of a part of one."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _plain(value: Any) -> Any:
    """Lists and numbers, with ``None`` where JSON has no number."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _bar(start: int, steps: int) -> Iterator[Report]:
    """A bar with the rate, the time left, the (lowest) loss and what is wrong."""
    progress = importlib.import_module("rich.progress")
    console = importlib.import_module("rich.console").Console(file=sys.stderr)
    columns = (
        progress.TextColumn("fit"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TextColumn("{task.fields[loss]}"),
        progress.TextColumn("[bold red]{task.fields[trouble]}"),
    )
    with progress.Progress(*columns, console=console) as bar:
        empty = {"rate": "", "loss": "", "trouble": ""}
        task = bar.add_task("fit", total=steps, completed=start, **empty)

        def report(
            step: int, seconds: float, rate: float, means: dict[str, np.ndarray]
        ) -> None:
            loss = means["loss"]
            lowest = np.min(loss, where=np.isfinite(loss), initial=np.inf)
            said = "loss" if loss.ndim == 0 else "lowest loss"
            shown = {"rate": f"{rate:,.0f} examples/s", "loss": f"{said} {lowest:.4g}"}
            bar.update(task, completed=step, trouble=_trouble(means), **shown)

        yield report


def _trouble(means: dict[str, np.ndarray]) -> str:
    """Members that are lost, controllers at their limits."""
    lost = ~np.atleast_1d(means.get("finite", np.ones((), bool))).astype(bool)
    stuck = np.atleast_1d(means.get("saturated", np.zeros(()))) > 0.5
    counts = {"not finite": lost.sum(), "saturated": stuck.sum()}
    of = f" {{}} of {lost.size}" if lost.size > 1 else ""
    return ", ".join(what + of.format(n) for what, n in counts.items() if n)


@contextlib.contextmanager
def _events(folder: Path | None, start: int) -> Iterator[Report]:
    if folder is None:
        raise ValueError("fit: tensorboard=True needs a directory to write to")
    try:
        writers = importlib.import_module("tensorboardX")
    except ImportError as error:
        raise ImportError(
            'fit: tensorboard=True needs tensorboardX: pip install "toyfeat[scripts]"'
        ) from error
    purge = {"purge_step": start + 1} if start else {}
    writer = writers.SummaryWriter(str(folder / "tensorboard"), **purge)

    def report(
        step: int, seconds: float, rate: float, means: dict[str, np.ndarray]
    ) -> None:
        writer.add_scalar("examples_per_s", rate, step)
        for name, value in means.items():
            for index in np.ndindex(value.shape):
                tag = "/".join((name, *map(str, index)))
                writer.add_scalar(tag, float(value[index]), step)

    try:
        yield report
    finally:
        writer.close()
