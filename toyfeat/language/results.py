"""Results of a job in a file, and whether a folder is this job's."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toyfeat.checkpoint.files import write_whole
from toyfeat.language.jobs import Attribution, Job

_ADDED = {  # more of them may be asked for
    "train": ("kinds", "codes", "seeds"),
    "decompose": ("bases", "ranks"),
}
_BEFORE = {  # what folders were that do not say it
    "train.population": False,
    "train.source": "store",
    "train.attribution.attribution": asdict(Attribution()),
}


def own_folder(job: Job, *parts: str) -> Path:
    """The folder of a job, which keeps what the job was in ``job.json``.

    Args:
      job: what is done.
      parts: of the job that what is made depends on, ``"collect"`` and so on.

    Returns:
      The folder.

    Raises:
      ValueError: if it has work with other settings in it; says what differs.
    """
    folder = Path(job.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found:
        found = {"weights": "float32"} | found
    if "train.steps" in found:
        found = _BEFORE | found
    wanted = _settings(job, parts)
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            raise ValueError(
                f"job: {folder} has work with {name} = {found[name]!r}, not "
                f"{wanted[name]!r}; give another folder as out, or move it away"
            )
    if wanted.keys() - found.keys():
        write_whole(path, json.dumps(found | wanted, indent=1) + "\n")
    return folder


def _settings(job: Job, parts: Iterable[str]) -> dict[str, Any]:
    """What results depend on, by name."""
    given = asdict(job)
    for part, names in _ADDED.items():
        given[part] = {n: x for n, x in given[part].items() if n not in names}
    given["train"]["site"] = job.site
    given["train"]["source"] = job.source
    for loss in given["train"].pop("attribution"):  # more may be added, by name
        given["train"][f"attribution.{loss['name']}"] = loss
    flat = {name: given[name] for name in ("model", "text", "weights")}
    for part in parts:
        flat |= {f"{part}.{name}": value for name, value in given[part].items()}
    return json.loads(json.dumps(flat))  # tuples are lists there


class Rows:
    """Results in a file of JSON lines, each there once.

    A line that a kill cut off is dropped when the file is opened.  A number that is
    not finite is ``null`` in the file and ``None`` here.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = [x for x in text.splitlines(keepends=True) if x.endswith("}\n")]
        if "".join(whole) != text:
            write_whole(path, "".join(whole))
        self._path, self.rows = path, [json.loads(line) for line in whole]

    def has(self, where: dict[str, Any]) -> bool:
        """Whether there is a row with these entries."""
        return any(where.items() <= row.items() for row in self._plain())

    def add(self, where: dict[str, Any], more: dict[str, Any]) -> bool:
        """Write a row, unless there is one with the entries of ``where``."""
        if self.has(where):
            return False
        row = {**where, **{name: _finite(x) for name, x in more.items()}}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self.rows.append(row)
        return True

    def _plain(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            yield {k: v for k, v in row.items() if isinstance(v, str | int)}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    bad = isinstance(value, float) and not math.isfinite(value)
    return None if bad else value
