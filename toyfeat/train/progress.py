"""Report the progress of a training run: JSON lines, a progress bar, TensorBoard."""

import contextlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from toyfeat.files.atomic import open_draft
from toyfeat.train.health import SATURATED_SHARE

Report = Callable[[int, float, float, dict[str, np.ndarray]], None]
"""``(step, seconds, examples_per_s, means)``, once for every chunk."""


@contextlib.contextmanager
def open_reports(
    folder: Path | None, start: int, steps: int, *, bar: bool, tensorboard: bool
) -> Iterator[Report]:
    """Open the requested reports and yield one function that writes them all."""
    with contextlib.ExitStack() as stack:
        sinks: list[Report] = []
        if tensorboard:
            sinks.append(stack.enter_context(_tensorboard_report(folder, start)))
        if folder is not None:
            sinks.append(_jsonl_report(folder / "metrics.jsonl", start))
        if bar and sys.stderr.isatty():
            sinks.append(stack.enter_context(_bar_report(start, steps)))

        def report(
            step: int, seconds: float, rate: float, means: dict[str, np.ndarray]
        ) -> None:
            for sink in sinks:
                sink(step, seconds, rate, means)

        yield report


def _jsonl_report(path: Path, start: int) -> Report:
    """Append a line of JSON per chunk to a file.

    Lines of steps after ``start`` are dropped: the run that wrote them was cut off
    before it saved a checkpoint of them.
    """
    # Keep whole lines up to the checkpoint that the run goes on from.
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    valid = [line for line in old if _line_step(line) <= start]
    if len(valid) < len(old):
        with open_draft(path, sync=False) as file:
            file.write(b"".join(valid))

    def report(
        step: int, seconds: float, rate: float, means: dict[str, np.ndarray]
    ) -> None:
        row = {"step": step, "seconds": seconds, "examples_per_s": rate}
        row |= {name: _to_json(value.tolist()) for name, value in means.items()}
        text = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            # Unbuffered writes may be partial; an error is not delayed to the close.
            with open(path, "ab", buffering=0) as file:
                while text:
                    text = text[file.write(text) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"fit: could not write {path}: {error.strerror}; the last checkpoint "
                "is whole. Make room, run again",
            ) from error

    return report


def _line_step(line: bytes) -> float:
    """Parse the step of a line; inf if the line is incomplete."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _to_json(value: Any) -> Any:
    """Replace the numbers that JSON does not have (NaN, inf) by ``None``."""
    if isinstance(value, list):
        return [_to_json(entry) for entry in value]
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _bar_report(start: int, steps: int) -> Iterator[Report]:
    """Show a bar with the rate, the time left, the (lowest) loss and problems."""
    progress = importlib.import_module("rich.progress")
    console = importlib.import_module("rich.console").Console(file=sys.stderr)
    columns = (
        progress.TextColumn("fit"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TextColumn("{task.fields[loss]}"),
        progress.TextColumn("[bold red]{task.fields[problems]}"),
    )
    with progress.Progress(*columns, console=console) as bar:
        empty = {"rate": "", "loss": "", "problems": ""}
        task = bar.add_task("fit", total=steps, completed=start, **empty)

        def report(
            step: int, seconds: float, rate: float, means: dict[str, np.ndarray]
        ) -> None:
            # Members that diverged do not count as the lowest loss.
            loss = means["loss"]
            lowest = np.min(loss, where=np.isfinite(loss), initial=np.inf)
            label = "loss" if loss.ndim == 0 else "lowest loss"
            bar.update(
                task,
                completed=step,
                rate=f"{rate:,.0f} examples/s",
                loss=f"{label} {lowest:.4g}",
                problems=_format_problems(means),
            )

        yield report


def _format_problems(means: dict[str, np.ndarray]) -> str:
    """Count the members that diverged and the controllers at their bounds."""
    # One number of a single member, or one of each of a population.
    diverged = ~np.atleast_1d(means.get("finite", np.ones((), bool))).astype(bool)
    saturated = np.atleast_1d(means.get("saturated", np.zeros(()))) > SATURATED_SHARE
    counts = {"not finite": diverged.sum(), "saturated": saturated.sum()}
    share = f" {{}} of {diverged.size}" if diverged.size > 1 else ""
    return ", ".join(what + share.format(n) for what, n in counts.items() if n)


@contextlib.contextmanager
def _tensorboard_report(folder: Path | None, start: int) -> Iterator[Report]:
    """Write every mean of a chunk to TensorBoard; later events are purged."""
    if folder is None:
        raise ValueError("fit: tensorboard=True needs a directory to write to")
    try:
        writers = importlib.import_module("tensorboardX")
    except ImportError as error:
        raise ImportError(
            'fit: tensorboard=True needs tensorboardX: pip install "toyfeat[scripts]"'
        ) from error
    # A run that goes on replaces what was written after its checkpoint.
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
