"""Write a page on the dictionaries of a language model: scores, pictures, latents.

    python scripts/report.py examples/smollm2.toml

After ``scripts/evaluate.py``.  Writes ``report.html`` into the job's folder, with
everything in it: what the model keeps, attributions against leaving out, and, for each
kind of dictionary, latents with their contexts in the text.
"""

from toyfeat.cli import steps
from toyfeat.jobs import Job
from toyfeat.jobs.command import run_job_script


def main(job: Job) -> None:
    """Gather the results of the job and write the page."""
    steps.report(job)


if __name__ == "__main__":
    run_job_script(main)
