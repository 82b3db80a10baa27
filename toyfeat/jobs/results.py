"""Results of a job: the folder that is its own, and rows that are written once."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toyfeat.files.atomic import write_whole
from toyfeat.jobs.config import Attribution, Job

# Entries that may be extended in a folder that has results already.
_EXTENDABLE = {
    "train": ("kinds", "ks", "seeds"),
    "decompose": ("bases", "ranks"),
}


# Values of entries that older folders do not have.
_FORMER_TRAIN_DEFAULTS = {
    "train.population": False,
    "train.source": "store",
    "train.attribution.attribution": asdict(Attribution()),
}


_FORMER_DEFAULTS = {"weights": "float32"}


def claim_folder(job: Job, *parts: str) -> Path:
    """Make the folder of a job and keep the settings of its results in ``job.json``.

    Args:
      job: settings.
      parts: of the job that the results depend on, ``"collect"`` and so on.

    Returns:
      The folder.

    Raises:
      ValueError: if it has results of other settings; says what differs.
    """
    folder = Path(job.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if saved:
        saved = _FORMER_DEFAULTS | saved
    if "train.steps" in saved:
        saved = _FORMER_TRAIN_DEFAULTS | saved
    settings = _flat_settings(job, parts)
    for name in sorted(saved.keys() & settings.keys()):
        if saved[name] != settings[name]:
            raise ValueError(
                f"job: {folder} has work with {name} = {saved[name]!r}, not "
                f"{settings[name]!r}; give another folder as out, or move it away"
            )
    if settings.keys() - saved.keys():
        write_whole(path, json.dumps(saved | settings, indent=1) + "\n")
    return folder


def _flat_settings(job: Job, parts: Iterable[str]) -> dict[str, Any]:
    """Flatten the settings that results depend on, ``"part.entry"`` to value."""
    settings = asdict(job)
    for part, names in _EXTENDABLE.items():
        settings[part] = {n: x for n, x in settings[part].items() if n not in names}
    settings["train"]["site"] = job.site
    settings["train"]["source"] = job.source
    for loss in settings["train"].pop("attribution"):  # losses may be added, by name
        settings["train"][f"attribution.{loss['name']}"] = loss
    flat = {name: settings[name] for name in ("model", "text", "weights")}
    for part in parts:
        flat |= {f"{part}.{name}": value for name, value in settings[part].items()}
    return json.loads(json.dumps(flat))  # turns tuples into lists, as in the file


class Rows:
    """Results in a file of JSON lines, each result once.

    A line that a kill cut off is dropped when the file is opened.  A number that is
    not finite is ``null`` in the file and ``None`` here.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [x for x in text.splitlines(keepends=True) if x.endswith("}\n")]
        if "".join(lines) != text:
            write_whole(path, "".join(lines))
        self._path, self.rows = path, [json.loads(line) for line in lines]

    def has(self, key: dict[str, Any]) -> bool:
        """Check whether a row has these entries."""
        return any(key.items() <= row.items() for row in self._hashable_entries())

    def add(self, key: dict[str, Any], values: dict[str, Any]) -> bool:
        """Write a row, unless one has the entries of ``key`` already."""
        if self.has(key):
            return False
        row = {**key, **{name: _finite_or_none(x) for name, x in values.items()}}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self.rows.append(row)
        return True

    def _hashable_entries(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            yield {k: v for k, v in row.items() if isinstance(v, str | int)}


def _finite_or_none(value: Any) -> Any:
    """Replace a number that JSON does not have by ``None``."""
    is_bad = isinstance(value, float) and not math.isfinite(value)
    return None if is_bad else value
