"""Dictionaries of a language model's activations and gradients.

    python scripts/train_dictionary.py examples/smollm2.toml

After ``scripts/collect.py``.  Trains every kind with every number of codes and seed of
the job; each has a folder with ``metrics.jsonl``, checkpoints and SAELens' files.
The same command goes on where it was cut off.
"""

import sys

from toyfeat.language import pipeline, read_job


def main(path: str) -> None:
    """All of it."""
    pipeline.trained(read_job(path))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("name a job: examples/smollm2.toml")
    try:
        main(sys.argv[1])
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from None
