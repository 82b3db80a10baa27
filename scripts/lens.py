"""Fit a Jacobian lens to a language model, and show what it reads in a text.

    python scripts/lens.py examples/smollm2_lens.toml

Writes ``lens.safetensors`` and the page ``lens.html`` to the folder of the job.  A fit
goes on where it was stopped.
"""

from pathlib import Path

from toyfeat.jobs import Job, open_job
from toyfeat.jobs.command import run_job_script
from toyfeat.jobs.lens import run_lens
from toyfeat.lens import FitProgress
from toyfeat.report.lens import write_lens


def main(job: Job) -> None:
    """Open the job, fit its lens and write the page."""

    def report(progress: FitProgress) -> None:
        print(f"batch {progress.step} of {progress.steps}: {progress.prompts} prompts")

    run = run_lens(open_job(job), report)
    print(f"the page is {write_lens(Path(job.out), run)}")


if __name__ == "__main__":
    run_job_script(main)
