"""Fit a Jacobian lens to a language model, and show what it reads in a text.

    python scripts/lens.py examples/smollm2_lens.toml

Writes ``lens.safetensors`` and the page ``lens.html`` to the folder of the job.  A fit
goes on where it was stopped.
"""

from toyfeat.cli import steps
from toyfeat.jobs import Job
from toyfeat.jobs.command import run_job_script


def main(job: Job) -> None:
    """Open the job, fit its lens and write the page."""
    steps.lens(job)


if __name__ == "__main__":
    run_job_script(main)
