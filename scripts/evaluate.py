"""Score the dictionaries of a language model on held-out text.

    python scripts/evaluate.py examples/smollm2.toml

After ``scripts/train_dictionary.py``.  Each dictionary is put in the place of the
activations it describes: cross-entropy recovered, divergence, attribution L0, and how
well attributions predict what leaving a latent out does.  ``evaluation.jsonl`` has it.
"""

from toyfeat.cli.main import run_script


def main() -> None:
    """Run the command ``toyfeat evaluate``."""
    run_script("evaluate", __doc__)


if __name__ == "__main__":
    main()
