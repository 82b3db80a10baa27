"""PCA of activations, of gradients and of both at the sites of a language model.

    python scripts/decompose.py examples/smollm2.toml

After ``scripts/collect.py``.  Prints participation ratios and what the model loses when
a site keeps the first 1, 4, 16, 64 or 256 directions; ``decompose.jsonl`` has spectra
too.
"""

import sys

from toyfeat.language import pipeline, read_job


def main(path: str) -> None:
    """All of it."""
    pipeline.decomposed(pipeline.opened(read_job(path)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("name a job: examples/smollm2.toml")
    try:
        main(sys.argv[1])
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from None
