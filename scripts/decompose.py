"""Compute PCA of activations, gradients and both at the sites of a language model.

    python scripts/decompose.py examples/smollm2.toml

After ``scripts/collect.py``, or straight from the model (``source = "model"``).  Prints
participation ratios and what the model loses when a site keeps the first directions of
a basis (``decompose.ranks``; ``decompose.bases`` may name LIB too).  Spectra are in
``decompose.jsonl`` too.
"""

from toyfeat.cli.main import run_script


def main() -> None:
    """Run the command ``toyfeat decompose``."""
    run_script("decompose", __doc__)


if __name__ == "__main__":
    main()
