"""One page on the dictionaries of a language model: scores, pictures, latents.

    python scripts/report.py examples/smollm2.toml

After ``scripts/evaluate.py``.  Writes ``report.html`` into the job's folder, with
everything in it: what the model keeps, attributions against leaving out, and, for each
kind of dictionary, latents with their contexts in the text.
"""

from dataclasses import asdict
from pathlib import Path

from toyfeat.language import Job, command, pipeline
from toyfeat.language.results import Rows
from toyfeat.language.training import curves
from toyfeat.report.language import write_language


def main(job: Job) -> None:
    """Gather what there is and write the page."""
    run = pipeline.opened(job)
    folder = Path(run.job.out)
    evaluation = Rows(folder / "evaluation.jsonl").rows
    decomposition = Rows(folder / "decompose.jsonl").rows
    if not evaluation and not decomposition:
        raise ValueError(f"{folder} has no scores yet; run scripts/evaluate.py first")
    latents = pipeline.looked_at(run)
    header = {
        "model": run.model.name,
        **asdict(run.job.collect),
        **asdict(run.job.train),
        "site": run.job.site,
    }
    measured = curves(run.job.train, folder / "train")
    page = write_language(
        folder, evaluation, decomposition, latents, header=header, curves=measured
    )
    print(f"the page is {page}")


if __name__ == "__main__":
    command(main)
