"""Write a page on the dictionaries of a language model: scores, pictures, latents.

    python scripts/report.py examples/smollm2.toml

After ``scripts/evaluate.py``.  Writes ``report.html`` into the job's folder, with
everything in it: what the model keeps, attributions against leaving out, and, for each
kind of dictionary, latents with their contexts in the text.
"""

from dataclasses import asdict
from pathlib import Path

from toyfeat.jobs import Job, open_job, steps
from toyfeat.jobs.command import run_job_script
from toyfeat.jobs.results import Rows
from toyfeat.jobs.train import load_curves
from toyfeat.report.language import write_language


def main(job: Job) -> None:
    """Gather the results of the job and write the page."""
    work = open_job(job)
    folder = Path(job.out)
    evaluation = Rows(folder / "evaluation.jsonl").rows
    decomposition = Rows(folder / "decompose.jsonl").rows
    if not evaluation and not decomposition:
        raise ValueError(f"{folder} has no scores yet; run scripts/evaluate.py first")
    latents = steps.inspect_latents(work)
    header = {
        "model": work.model.name,
        **asdict(job.collect),
        **asdict(job.train),
        "site": job.site,
    }
    curves = load_curves(job.train, folder / "train")
    page = write_language(
        folder, evaluation, decomposition, latents, header=header, curves=curves
    )
    print(f"the page is {page}")


if __name__ == "__main__":
    run_job_script(main)
