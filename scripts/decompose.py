"""PCA of activations, of gradients and of both at the sites of a language model.

    python scripts/decompose.py examples/smollm2.toml

After ``scripts/collect.py``, or straight from the model (``source = "model"``).  Prints
participation ratios and what the model loses when a site keeps the first directions of
a basis (``decompose.ranks``; ``decompose.bases`` may name LIB too).  Spectra are in
``decompose.jsonl`` too.
"""

from toyfeat.language import Job, command, pipeline


def main(job: Job) -> None:
    """All of it."""
    pipeline.decomposed(pipeline.opened(job))


if __name__ == "__main__":
    command(main)
