"""Compute PCA of activations, gradients and both at the sites of a language model.

    python scripts/decompose.py examples/smollm2.toml

After ``scripts/collect.py``, or straight from the model (``source = "model"``).  Prints
participation ratios and what the model loses when a site keeps the first directions of
a basis (``decompose.ranks``; ``decompose.bases`` may name LIB too).  Spectra are in
``decompose.jsonl`` too.
"""

from toyfeat.cli import steps
from toyfeat.jobs import Job
from toyfeat.jobs.command import run_job_script


def main(job: Job) -> None:
    """Open the job and decompose its sites."""
    steps.decompose(job)


if __name__ == "__main__":
    run_job_script(main)
