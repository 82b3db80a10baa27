"""Fine-tune dictionaries of a language model by what they do to it, and score them.

    python scripts/finetune.py examples/smollm2_finetune.toml

After ``scripts/collect.py`` of the same job.  Every dictionary that the job names, of
this or another library, is trained further with every loss of ``[finetune]`` on the
same windows, none of them seen twice.  ``finetune.jsonl`` has the scores on held-out
text before and after, ``finetune/`` SAELens files.  The same command goes on where it
was cut off.
"""

from toyfeat.cli.main import run_script


def main() -> None:
    """Run the command ``toyfeat finetune``."""
    run_script("finetune", __doc__)


if __name__ == "__main__":
    main()
