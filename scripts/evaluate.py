"""What dictionaries of a language model keep of it, on held-out text.

    python scripts/evaluate.py examples/smollm2.toml

After ``scripts/train_dictionary.py``.  Each dictionary is put in the place of the
activations it describes: cross-entropy recovered, divergence, attribution L0, and how
well attributions predict what leaving a latent out does.  ``evaluation.jsonl`` has it.
"""

import sys

from toyfeat.language import pipeline, read_job


def main(path: str) -> None:
    """All of it."""
    pipeline.evaluated(pipeline.opened(read_job(path)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("name a job: examples/smollm2.toml")
    try:
        main(sys.argv[1])
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from None
