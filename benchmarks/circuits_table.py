"""Print the table of ``circuits.py`` from its rows.

python benchmarks/circuits_table.py benchmarks/results/circuits-smollm2-cpu.jsonl
"""

import json
from pathlib import Path
from typing import Any

import tyro

COLUMNS = (
    "task, order, error kept, difference, right, all latents, most, 90 %, 95 %, "
    "on other prompts, s"
)


def show(value: float | None, ends: list[float] | None = None) -> str:
    """Write a number, with its interval."""
    if value is None:
        return ""
    text = f"{value:.2f}"
    return text if ends is None else f"{text} ({ends[0]:.2f} to {ends[1]:.2f})"


def model_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Name what the model does on, and with which dictionary."""
    dictionary = row.get("dictionary", "")
    return row["task"], dictionary, row["seed"], row["error"]


def main(file: Path, /) -> None:
    """Print a line for every task and method."""
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in file.read_text().splitlines()
    ]
    of_study = any("dictionary" in row for row in rows)
    names = COLUMNS.split(", ")
    names[1:1] = ["dictionary", "seed"] if of_study else []
    print("| " + " | ".join(names) + " |")
    print("|---" * len(names) + "|")
    models = {model_key(row): row for row in rows if row["row"] == "model"}
    for row in sorted(rows, key=model_key if of_study else lambda row: row["error"]):
        if row["row"] == "model":
            continue
        model = models[model_key(row)]
        sizes = [row["size_90"] or "unmet", row["size_95"] or "unmet"]
        cells = [
            row["task"].replace("_", " "),
            *([row["dictionary"], str(row["seed"])] if of_study else []),
            row["row"],
            "yes" if row["error"] else "no",
            show(model["difference"], model["interval"]),
            show(model["right"]),
            show(model["whole_kept"]),
            show(row["most_kept"]),
            *map(str, sizes),
            show(row.get("test_95"), row.get("test_95_interval")),
            f"{row['cpu']:.0f}",
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
