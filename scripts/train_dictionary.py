"""Train dictionaries of a language model's activations and gradients.

    python scripts/train_dictionary.py examples/smollm2.toml

After ``scripts/collect.py``, or straight from the model (``source = "model"``).  Trains
every kind with every ``k`` and seed of the job, one after the other or side
by side (``train.population``); each has a folder with ``metrics.jsonl``, checkpoints
and SAELens' files.  The same command goes on where it was cut off.
"""

from toyfeat.cli.main import run_script


def main() -> None:
    """Run the command ``toyfeat train``."""
    run_script("train", __doc__)


if __name__ == "__main__":
    main()
