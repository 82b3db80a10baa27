"""What dictionaries of a language model keep of it, on held-out text.

    python scripts/evaluate.py examples/smollm2.toml

After ``scripts/train_dictionary.py``.  Each dictionary is put in the place of the
activations it describes: cross-entropy recovered, divergence, attribution L0, and how
well attributions predict what leaving a latent out does.  ``evaluation.jsonl`` has it.
"""

from toyfeat.language import Job, command, pipeline


def main(job: Job) -> None:
    """All of it."""
    pipeline.evaluated(pipeline.opened(job))


if __name__ == "__main__":
    command(main)
