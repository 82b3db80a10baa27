"""Print the table of a study of ``functional.py`` from its rows.

    python benchmarks/functional_table.py benchmarks/results/functional-small-cpu.jsonl

Per row, over seeds: cross-entropy, KL, the share of TopK's gap that is closed, the same
beyond the MSE fine-tune, the share of what ``kl`` gains beyond it, and seconds of a
processor for training and for the taps of the row alone.  Rows of a seed are compared
with ``topk``, ``mse`` and ``kl`` of the same seed and the same model.
"""

import json
from pathlib import Path
from typing import Any

import tyro

Row = dict[str, Any]


def gains(rows: list[Row], name: str) -> list[tuple[int, dict[str, float]]]:
    """Compute the figures of a row for every seed that has it."""
    found = []
    for row in rows:
        if row["row"] != name or "ce" not in row:
            continue
        same = [x for x in rows if x["seed"] == row["seed"] and "ce" in x]
        by_name = {x["row"]: x for x in same if x["clean"] == row["clean"]}
        topk, mse, kl = (by_name.get(x) for x in ("topk", "mse", "kl"))
        values = {"ce": row["ce"], "kl": row["kl"]}
        if topk:
            gap = topk["ce"] - row["clean"]
            values["closed"] = (topk["ce"] - row["ce"]) / gap
        if mse:
            gap = mse["ce"] - row["clean"]
            values["beyond"] = (mse["ce"] - row["ce"]) / gap
            if kl:
                values["share"] = (mse["ce"] - row["ce"]) / (mse["ce"] - kl["ce"])
        values |= {n: row[n] for n in ("train_cpu", "expand_cpu") if n in row}
        found.append((row["seed"], values))
    return sorted(found, key=lambda x: x[0])


DIGITS = {"ce": 3, "kl": 3, "train_cpu": 1, "expand_cpu": 1}


def main(file: Path, /) -> None:
    """Print a line for every row."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    columns = ["ce", "kl", "closed", "beyond", "share", "train_cpu", "expand_cpu"]
    print("| row | seeds | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for name in dict.fromkeys(row["row"] for row in rows if "ce" in row):
        found = gains(rows, name)
        cells = []
        for column in columns:
            values = [x[column] for _, x in found if column in x]
            digits = DIGITS.get(column, 2)
            cells.append(", ".join(f"{x:.{digits}f}" for x in values))
        seeds = ", ".join(str(seed) for seed, _ in found)
        print(f"| {name} | {seeds} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
