"""Describe planted tasks, and write a page of them.  Needs matplotlib (``plot``)."""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import jax

from toyfeat.files.atomic import output_folder
from toyfeat.models.planted.task import Task
from toyfeat.report import page
from toyfeat.report.planted_figure import (
    POINTS,
    readers_and_writers,
    shared_rows,
    task_figure,
)
from toyfeat.report.plots import data_uri, png
from toyfeat.types import Array

__all__ = ["describe", "task_figure", "write_tasks"]

_CAPTION = (
    "Left: activations along the two directions in which they vary most. Middle: "
    "gradients of half the squared length of the output; an arrow is as long, to one "
    "scale, as the part of its reader that lies in the drawn plane, and has its colour "
    "where the key lists readers. Right: readers beside writers."
)


def describe(task: Task, *, fit: float | None = None) -> str:
    """Describe a task in a paragraph.

    Args:
      task: what to describe.
      fit: share of its targets' variance that the model leaves; ``task.fit`` by
        default.

    Returns:
      Plain text: the name, what is planted, sizes, the side that is scored, how well
      the model fits, which rows share planes and what no method could know.

    Raises:
      ValueError: if the truth lacks readers or writers.

    Example:
      >>> import jax
      >>> from toyfeat.models import planted
      >>> describe(planted.product_space(jax.random.key(0)))[:54]
      'product space: 10 colours times 10 shapes in 24 dimens'
    """
    # What is planted, how well the model has learned it, and what it ignores.
    num, width = readers_and_writers(task)[0].shape
    left = task.fit if fit is None else fit
    sentences = [
        f"{task.name}: {task.about}",
        f"{_count(num, 'feature')} in {_count(width, 'dimension')} at the site "
        f"“{task.site}”; the {task.side} are scored."
        if num
        else f"Nothing is planted in the {_count(width, 'dimension')} of the site "
        f"“{task.site}”; what is returned is counted.",
        "The model is the definition of its features."
        if left == 0
        else f"The trained model leaves {_percent(left)} of its targets' variance.",
    ]
    if task.ignored is not None:
        sentences.append(
            f"{len(task.ignored)} of the {width} dimensions hold structure that the "
            "model reads hardly or not at all."
        )
    # Rows of one plane can be told apart only as a whole.
    shared = [rows for rows in shared_rows(task) if len(rows) > 1]
    shape = "plane" if all(len(rows) == 2 for rows in shared) else "subspace"
    names = ", ".join(" and ".join(map(str, rows)) for rows in shared)
    sentences.append(f"Rows that share a {shape}: {names or 'none'}.")
    return " ".join([*sentences, f"Limits of what can be known: {task.limits}"])


def write_tasks(folder: Path, tasks: Sequence[Task], key: Array) -> Path:
    """Write ``tasks.html`` with a section per task, and a PNG for each.

    Args:
      folder: where to; it is made if need be.
      tasks: in the order of the page.
      key: random key of the examples in the pictures.

    Returns:
      The path of the page.

    Raises:
      ImportError: without matplotlib, naming the extra.
      ValueError: if there are no tasks, or the folder cannot be written.
    """
    if not tasks:
        raise ValueError("write_tasks: there are no tasks")
    folder, sections = output_folder(folder), []
    for i, task in enumerate(tasks):
        image = png(task_figure(jax.random.fold_in(key, i), task))
        (folder / f"{i + 1:02d}-{_slug(task.name)}.png").write_bytes(image)
        picture = page.picture(data_uri(image), f"{task.name}. {_CAPTION}")
        body = [page.paragraph(describe(task)), picture]
        sections.append(page.section(task.name, body))
    footer = f"{_count(len(tasks), 'task')}, {POINTS} examples in every picture."
    page.write_page(folder / "tasks.html", "Planted tasks", sections, footer)
    return folder / "tasks.html"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1g}%" if share < 1e-3 else f"{share:.1%}"


def _slug(name: str) -> str:
    """Make a name that any file system takes: ``x2`` of ``x²``."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-") or "task"
