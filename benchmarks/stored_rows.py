"""Rows of the leaderboard on disk, of the same settings and versions only.

Rows of other settings, of an earlier version of a task or of earlier scores are
refused.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sizes import SIZES
from tasks import ALL

from toyfeat.files.atomic import write_whole

# Raised where a score changes its meaning: rows with other scores are refused.
SCORES_VERSION = 2
# A row without a version was measured before rows had one.
FIRST_VERSION = 1


def resume_rows(path: Path, *, size: str, root: int) -> list[dict[str, Any]]:
    """Read the rows that were measured before, under the same settings.

    Writes the settings beside them, and takes out a last line that was cut off.

    Args:
      path: file of rows; there need not be one.
      size: of the leaderboard.
      root: root of all task keys.

    Returns:
      The rows.

    Raises:
      SystemExit: if there are rows of other settings or versions, or damaged ones.
    """
    settings = path.with_name("settings.json")
    current = {
        "size": size,
        "root": root,
        "budget": SIZES[size].budget._asdict(),
        "scores": SCORES_VERSION,
    }
    stored, text = (
        file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        for file in (settings, path)
    )
    if (stored.strip() or text.strip()) and parse_object(stored) != current:
        raise SystemExit(
            f"leaderboard: {path.parent} holds rows of other settings, or a "
            "settings.json that is missing or damaged; give another --out, or move "
            "that folder away"
        )
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and parse_object(lines[-1]) is None and not text.endswith("\n"):
        del lines[-1]  # a kill cut it off
    rows = parse_rows(lines, path)
    write_whole(settings, json.dumps(current) + "\n")
    write_whole(path, "".join(line + "\n" for line in lines))
    return rows


def parse_rows(lines: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """Parse lines of JSON, all of them rows of the tasks as they are now.

    Args:
      lines: without empty ones.
      path: their file, for errors.

    Returns:
      The rows.

    Raises:
      SystemExit: if a line is no row, or is of another version of its task.
    """
    rows = []
    for line in lines:
        parsed = parse_object(line)
        if parsed is None or not {"case", "method", "seed", "side"} <= set(parsed):
            raise SystemExit(
                f"leaderboard: {path} has a line that is no row, {line[:40]!r}; take "
                "it out, or give another --out"
            )
        check_version(parsed, path)
        rows.append(parsed)
    return rows


def check_version(line: Mapping[str, Any], path: Path) -> None:
    """Refuse a row of another version of its task.

    Raises:
      SystemExit: if the versions differ.
    """
    task = ALL.get(line["case"])
    version = line.get("task_version", FIRST_VERSION)
    if task is not None and version != task.version:
        raise SystemExit(
            f"leaderboard: {path} has rows of version {version} of {task.name!r}, "
            f"which is at version {task.version} now; take them out, or give another "
            "--out"
        )


def parse_object(text: str) -> dict[str, Any] | None:
    """Parse a JSON object; ``None`` of anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
