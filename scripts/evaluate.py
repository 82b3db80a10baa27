"""Score the dictionaries of a language model on held-out text.

    python scripts/evaluate.py examples/smollm2.toml

After ``scripts/train_dictionary.py``.  Each dictionary is put in the place of the
activations it describes: cross-entropy recovered, divergence, attribution L0, and how
well attributions predict what leaving a latent out does.  ``evaluation.jsonl`` has it.
"""

from toyfeat.cli import steps
from toyfeat.jobs import Job
from toyfeat.jobs.command import run_job_script


def main(job: Job) -> None:
    """Open the job and evaluate its dictionaries."""
    steps.evaluate(job)


if __name__ == "__main__":
    run_job_script(main)
