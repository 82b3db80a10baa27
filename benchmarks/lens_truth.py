"""What lenses say of planted and trained mechanisms, against the truth.

Lenses are fitted on some inputs and scored on others:

- *answer*: squared correlation of what the lens reads with the answer that the model
  comes to, the mean over the coordinates of the answer. 1 is all of it.
- *readers*: mean squared cosine between the true directions that the answer depends on
  and the span of as many leading right singular vectors of the lens' map.

    python benchmarks/lens_truth.py --json benchmarks/results/lens-truth-cpu.jsonl
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import BenchmarkConfig, finish, parse_command, row
from lens_recall import least_squares_lens
from lens_tasks import NO_SKIP, PLANTED, LensTask
from lens_trained import TRAINED

import toyfeat as ft


@dataclass(frozen=True)
class TruthConfig(BenchmarkConfig):
    """Options of this benchmark."""

    prompts: int = 256
    """Prompts to fit on, and as many to score."""
    trained: bool = True
    """Whether to train the networks too."""
    table: Path | None = None
    """Markdown file for the table."""


def make_lenses(task: LensTask) -> dict[str, ft.lenses.Lens]:
    """Fit every lens of a task."""
    model, params, inputs = task.model, task.params, task.fit
    acts = jax.jit(lambda p, x: model.probed(p, x, {})[1])(params, inputs)
    dim = acts[task.site].shape[-1]

    def fitted(make: Any, **options: Any) -> ft.lenses.Estimate:
        acc = make(model, dim, **NO_SKIP, **options)
        update = jax.jit(lambda p, x: acc.finish(acc.update(acc.init(), p, x)))
        return update(params, inputs)

    flat = {s: acts[s].reshape(-1, dim) for s in model.sites[:-1]}
    centres = {
        site: ft.lenses.cluster_centres(jax.random.key(0), x, task.clusters)
        for site, x in flat.items()
    }
    experts = fitted(ft.lenses.mean_jacobian, centres=centres)
    shares = {s: nearest_shares(np.asarray(x), centres[s]) for s, x in flat.items()}
    mean = fitted(ft.lenses.mean_jacobian)
    second = fitted(ft.lenses.second_moment)
    eye = dict.fromkeys(model.sites[:-1], jnp.eye(dim))
    plain = mean._replace(matrices=eye)
    return {
        "logit": ft.lenses.jacobian_lens(model, params, plain),
        "Jacobian": ft.lenses.jacobian_lens(model, params, mean),
        "second moment": ft.lenses.second_moment_lens(model, params, second),
        "clustered": ft.lenses.clustered_lens(model, params, experts, centres),
        "contrast": ft.lenses.contrast_lens(model, params, experts, shares),
        "least squares": least_squares_lens(model, params, inputs, 0),
    }


def nearest_shares(acts: np.ndarray, centres: Any) -> Any:
    """Shares of the activations by their nearest centre."""
    distance = ((acts[:, None] - np.asarray(centres)[None]) ** 2).sum(-1)
    return jnp.bincount(jnp.asarray(distance.argmin(1)), length=len(centres)) / len(
        acts
    )


def answer_score(task: LensTask, lens: ft.lenses.Lens) -> float:
    """Squared correlation of what is read and what is true, on held-out inputs."""
    acts = jax.jit(lambda p, x: task.model.probed(p, x, {})[1])(
        task.params, task.held_out
    )
    said = np.asarray(lens.read(task.site, acts[task.site]))[..., task.answers]
    truth = task.truth
    if truth is None:
        final = acts[task.model.sites[-1]]
        truth = np.asarray(task.model.unembed(task.params, final))[..., task.answers]
    if said.shape[-1] > 1:  # logits count up to a constant
        said = said - said.mean(-1, keepdims=True)
        truth = truth - truth.mean(-1, keepdims=True)
    said, truth = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (said, truth))
    said, truth = said - said.mean(0), truth - truth.mean(0)
    # A lens that says nothing but rounding has no correlation.
    silent = (said**2).mean(0) < 1e-8 * (truth**2).mean(0)
    products = (said * truth).sum(0) ** 2
    sizes = (said**2).sum(0) * (truth**2).sum(0)
    return float(np.mean(np.where(silent, 0, products / np.maximum(sizes, 1e-300))))


def reader_score(task: LensTask, lens: ft.lenses.Lens) -> float | None:
    """Overlap of the true readers with the leading directions of a lens."""
    if task.readers is None:
        return None
    matrices = np.asarray(lens.maps[task.site].matrices)
    # Experts together read what any of them reads.
    leading = np.linalg.svd(np.concatenate(matrices))[2][: len(task.readers)]
    return float(np.mean(np.sum((task.readers @ leading.T) ** 2, axis=1)))


def table(rows: list[dict[str, Any]]) -> str:
    """Make the table of all lenses and tasks: answer, and readers behind a stroke."""
    lenses = list(dict.fromkeys(line["method"] for line in rows))
    tasks = list(dict.fromkeys(line["case"] for line in rows))
    lines = [f"| task | {' | '.join(lenses)} |", "|---" * (len(lenses) + 1) + "|"]
    for task in tasks:
        cells = {x["method"]: x for x in rows if x["case"] == task}
        texts = [cell(cells[name]) for name in lenses]
        lines.append(f"| {task} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def cell(line: dict[str, Any]) -> str:
    """Make a cell of the table."""
    text = f"{line['answer']:.2f}"
    readers = line["readers"]
    return text if readers is None else f"{text} / {readers:.2f}"


def main() -> None:
    """Fit and score all lenses on all tasks."""
    config = parse_command(TruthConfig, __doc__)
    prompts = 32 if config.tiny else config.prompts
    makers = {**PLANTED, **(TRAINED if config.trained and not config.tiny else {})}
    rows = []
    for name, make in makers.items():
        task = make(prompts)
        for lens_name, lens in make_lenses(task).items():
            # The identity has no leading directions.
            readers = None if lens_name == "logit" else reader_score(task, lens)
            figures = {"answer": answer_score(task, lens), "readers": readers}
            size = {"prompts": prompts, "clusters": task.clusters}
            rows.append(row(name, size, lens_name, **figures))
        print(table(rows[-6:]), flush=True)
    if config.table is not None:
        config.table.write_text(table(rows), encoding="utf-8")
    finish(rows, [], config.json)


if __name__ == "__main__":
    main()
